# SPDX-License-Identifier: Apache-2.0
"""The names of the keys. `docs/redis.md` shows what is kept in each."""

import re
import zlib
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import quote, unquote

#: The number of buckets that the histories of a namespace are spread over. All keys of a bucket lie on one node of a
#: cluster. `docs/redis.md` says why it never changes.
BUCKETS = 64


class BucketKeys(NamedTuple):
    """
    The keys of a bucket: its version, the lists of its histories, the greatest revision of a deleted one, their users.

    Scripts make the names of further keys: the set of the histories that have branches, and the directory of each user
    that has histories in the bucket. This has more parts than the keys of a history, so they never coincide.
    """

    schema_version: str
    directory: str
    expiries: str
    names: str
    deleted_revision: str
    owners: str


class HistoryKeys(NamedTuple):
    """The keys of one history."""

    counters: str
    contents: str
    roles: str
    message_ids: str
    times: str


class StagedKeys(NamedTuple):
    """The keys of messages that wait to become part of a history."""

    contents: str
    roles: str
    message_ids: str
    times: str


class Keys(NamedTuple):
    """
    The keys of a namespace.

    A cluster places a key by the text in its first braces. Names are percent-encoded, except letters, digits and
    `-._~`. So no id can close the braces or look like a separator, and no two ids share a key.

    :param user: The user whose histories alone are seen, or an empty text for all.
    """

    key_prefix: str
    namespace: str
    user: str = ""

    def of_bucket(self, bucket: int) -> BucketKeys:
        """Return the keys of a bucket."""
        tag = self._tag(bucket)
        return BucketKeys(
            f"{tag}:schema_version",
            f"{tag}:histories",
            f"{tag}:expiries",
            f"{tag}:names",
            f"{tag}:deleted_revision",
            f"{tag}:owners",
        )

    def of_history(self, chat_history_id: str) -> HistoryKeys:
        """Return the keys of one history."""
        name = f"{self._tag(bucket_of(chat_history_id))}:{_encoded(chat_history_id)}"
        return HistoryKeys(
            f"{name}:history", f"{name}:contents", f"{name}:roles", f"{name}:message_ids", f"{name}:times"
        )

    def of_bucket_of(self, chat_history_id: str) -> BucketKeys:
        """Return the keys of the bucket that a history belongs to."""
        return self.of_bucket(bucket_of(chat_history_id))

    def of_all_users(self) -> "Keys":
        """Return the same keys, for what is done for all users."""
        return self._replace(user="")

    def to_read(self, chat_history_id: str) -> list[str]:
        """Return the keys of scripts that read a history."""
        return [self.of_bucket_of(chat_history_id).schema_version, *self.of_history(chat_history_id)]

    def to_write(self, chat_history_id: str) -> list[str]:
        """Return the keys of scripts that write to a history."""
        return [*self.of_bucket_of(chat_history_id), *self.of_history(chat_history_id)]

    def of_staged(self, bucket: int, stage: str) -> StagedKeys:
        """
        Return the keys of waiting messages. They have one part more than those of a history, so they never coincide.
        """
        name = f"{self._tag(bucket)}:staged:{stage}"
        return StagedKeys(f"{name}:contents", f"{name}:roles", f"{name}:message_ids", f"{name}:times")

    def index_name(self) -> str:
        """Return the name of the namespace's index of words."""
        return f"{{{self.key_prefix}:{_encoded(self.namespace)}}}:terms"

    def document(self, chat_history_id: str, position: int) -> str:
        """
        Return the key of the words of a message, which scripts name as well.

        It begins differently from all others, since the index has all keys with a prefix.
        """
        return f"terms{self._tag(bucket_of(chat_history_id))}:{_encoded(chat_history_id)}:{position}"

    def document_prefixes(self) -> list[str]:
        """Return what the keys of words begin with, for each bucket. No other namespace's begin so."""
        return [f"terms{self._tag(bucket)}:" for bucket in range(BUCKETS)]

    def documents_pattern(self) -> str:
        """Return the pattern that matches all keys of words, for SCAN."""
        return f"terms{self.pattern()}"

    def place_of(self, document: str) -> tuple[str, int] | None:
        """Return the history and the position of a message whose words a key has, or `None` if it has none."""
        *_, name, position = document.rsplit(":", 2)
        if not (position.isascii() and position.isdecimal()):
            return None
        place = unquote(name), int(position)
        return place if document == self.document(*place) else None

    def pattern(self) -> str:
        """Return the pattern that matches all keys of histories, for SCAN."""
        return f"{{{_literal(self.key_prefix)}:{_encoded(self.namespace)}:*}}:*:*"

    def directories_pattern(self) -> str:
        """Return the pattern that matches the directories of all namespaces, for SCAN."""
        return f"{{{_literal(self.key_prefix)}:*}}:histories"

    def namespace_of(self, directory: str) -> str | None:
        """Return the namespace that a directory belongs to, or `None` if the key is none of this key prefix."""
        parts = directory[len(self.key_prefix) + 2 :].split(":")
        namespace = unquote(parts[0])
        buckets = [f"{number}}}" for number in range(BUCKETS)]
        is_one = directory.startswith(f"{{{self.key_prefix}:") and len(parts) == 3 and parts[1] in buckets
        return namespace if is_one and parts[0] == _encoded(namespace) else None

    def history_of(self, key: str) -> str | None:
        """Return the id of the history that a key belongs to, or `None` if it belongs to none."""
        parts = key.rsplit(":", 2)
        chat_history_id = unquote(parts[1]) if len(parts) == 3 else ""
        return chat_history_id if chat_history_id and key in self.of_history(chat_history_id) else None

    def user_of(self, key: str) -> str | None:
        """Return the user whose directory in a bucket a key is, or `None` if it is no such directory."""
        tag, separator, user = key.partition(":users::")
        return user if separator and any(tag == self._tag(bucket) for bucket in range(BUCKETS)) else None

    def _tag(self, bucket: int) -> str:
        return f"{{{self.key_prefix}:{_encoded(self.namespace)}:{bucket}}}"


def bucket_of(chat_history_id: str) -> int:
    """Return the bucket of a history. This must never change, or stored histories would not be found again."""
    return zlib.crc32(chat_history_id.encode()) % BUCKETS


def _literal(text: str) -> str:
    """Return the pattern that matches only this text."""
    return re.sub(r"([\\*?\[\]^])", r"\\\1", text)


@lru_cache(maxsize=1024)
def _encoded(name: str) -> str:
    return quote(name, safe="")
