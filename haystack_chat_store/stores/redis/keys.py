# SPDX-License-Identifier: Apache-2.0
"""
The names of the keys. `docs/redis.md` shows what is kept in each.
"""

import re
import zlib
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import quote, unquote

#: Among so many groups the histories of a namespace are spread. All keys of a group lie on one node of a cluster.
BUCKETS = 64


class BucketKeys(NamedTuple):
    """
    The keys that the histories of a bucket have in common.
    """

    schema_version: str
    directory: str
    expiries: str
    names: str


class HistoryKeys(NamedTuple):
    """
    The keys of one history.
    """

    counters: str
    contents: str
    roles: str
    message_ids: str
    times: str


class StagedKeys(NamedTuple):
    """
    The keys under which messages wait until they become a history's, or are given up.
    """

    contents: str
    roles: str
    message_ids: str
    times: str


class Keys(NamedTuple):
    """
    The keys of a namespace.

    A cluster places a key by what stands in its first braces. Names are percent-encoded but for letters, digits and
    `-._~`, so nothing in an id can close the braces or be taken for a separator, and no two ids become the same key.
    """

    key_prefix: str
    namespace: str

    def of_bucket(self, bucket: int) -> BucketKeys:
        """
        Return the keys that the histories of a bucket have in common.
        """
        tag = self._tag(bucket)
        return BucketKeys(f"{tag}:schema_version", f"{tag}:histories", f"{tag}:expiries", f"{tag}:names")

    def of_history(self, chat_history_id: str) -> HistoryKeys:
        """
        Return the keys of one history.
        """
        name = f"{self._tag(bucket_of(chat_history_id))}:{_encoded(chat_history_id)}"
        return HistoryKeys(
            f"{name}:history", f"{name}:contents", f"{name}:roles", f"{name}:message_ids", f"{name}:times"
        )

    def of_bucket_of(self, chat_history_id: str) -> BucketKeys:
        """
        Return the keys of the bucket that a history belongs to.
        """
        return self.of_bucket(bucket_of(chat_history_id))

    def to_read(self, chat_history_id: str) -> list[str]:
        """
        Return the keys of scripts that read a history.
        """
        return [self.of_bucket_of(chat_history_id).schema_version, *self.of_history(chat_history_id)]

    def to_write(self, chat_history_id: str) -> list[str]:
        """
        Return the keys of scripts that write to a history.
        """
        return [*self.of_bucket_of(chat_history_id), *self.of_history(chat_history_id)]

    def of_staged(self, bucket: int, stage: str) -> StagedKeys:
        """
        Return the keys of messages that wait. They have a part more than those of a history, and so are never the same.
        """
        name = f"{self._tag(bucket)}:staged:{stage}"
        return StagedKeys(f"{name}:contents", f"{name}:roles", f"{name}:message_ids", f"{name}:times")

    def pattern(self) -> str:
        """
        Return what Redis' SCAN takes for all keys of histories.
        """
        literal = re.sub(r"([\\*?\[\]^])", r"\\\1", f"{{{self.key_prefix}:{_encoded(self.namespace)}:")
        return f"{literal}*}}:*:*"

    def history_of(self, key: str) -> str | None:
        """
        Return the id of the history whose key this is, or `None` if it is no history's.
        """
        parts = key.rsplit(":", 2)
        chat_history_id = unquote(parts[1]) if len(parts) == 3 else ""
        return chat_history_id if chat_history_id and key in self.of_history(chat_history_id) else None

    def _tag(self, bucket: int) -> str:
        return f"{{{self.key_prefix}:{_encoded(self.namespace)}:{bucket}}}"


def bucket_of(chat_history_id: str) -> int:
    """
    Return the bucket of a history. Never to be changed: what is stored would not be found again.
    """
    return zlib.crc32(chat_history_id.encode()) % BUCKETS


@lru_cache(maxsize=1024)
def _encoded(name: str) -> str:
    return quote(name, safe="")
