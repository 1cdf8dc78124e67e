# SPDX-License-Identifier: Apache-2.0
"""What is kept of whole histories: reads it, and deletes them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from haystack_chat_store.stores.conflicts import check_revision, no_access
from haystack_chat_store.stores.redis.keys import Keys, bucket_of
from haystack_chat_store.stores.redis.schema import BATCH_SIZE, ROLES, number
from haystack_chat_store.stores.redis.scripts import directory as scripts
from haystack_chat_store.stores.redis.session import Session
from haystack_chat_store.stores.rows import HistoryRow, branch_origin, end_of_prefix


@dataclass(frozen=True, kw_only=True)
class ListedHistory:
    """
    A history, and what else its hash has.

    :param row: The history.
    :param next_position: How many times of messages it has.
    :param expires_at: When it expires, in milliseconds since 1970, or nothing.
    :param renamed_from: The id that it had before it was renamed, or nothing.
    :param renaming: Of what the history with this id is the copy, until that is gone: its time of creation, its state
        and, separated by blanks, the state that the copy had at first. Otherwise nothing.
    """

    row: HistoryRow
    next_position: int
    expires_at: str
    renamed_from: str
    renaming: str


class StateOfHistory(NamedTuple):
    """
    A history, a text that differs after each change of it, and the renaming that has claimed it.

    :param history: The history.
    :param state: The text.
    :param stage: The name of the messages that wait for the renaming, or nothing.
    :param claimed_for: The new id, or nothing.
    :param claimed_since: For how many milliseconds it has been claimed.
    """

    history: ListedHistory
    state: str
    stage: str
    claimed_for: str
    claimed_since: int

    def is_copy_of(self, other: "StateOfHistory") -> bool:
        """Whether this is a copy that was made to rename the other one, which is still there."""
        row = other.history.row
        is_its = self.history.renamed_from == row.chat_history_id
        return is_its and self.history.renaming.partition(" ")[0] == str(row.created_at)

    def copied_state(self) -> str:
        """Return the state that the other history had when this copy of it was made."""
        return self.history.renaming.split(" ")[1]

    def first_state(self) -> str:
        """Return the state that this copy had when it was made."""
        return self.history.renaming.split(" ")[2]


class Deleted(NamedTuple):
    """
    What was deleted.

    :param number: How many histories there were.
    :param may_have_branches: Whether one of them had branches, or was not there, so that this is not known.
    :param owner: The user of the last one, an empty text for none, or `None` if this is not known.
    :param renamed_from: The old id of the last one, which branches may name still, or nothing.
    """

    number: int
    may_have_branches: bool
    owner: str | None
    renamed_from: str


async def read_histories(
    session: Session, keys: Keys, chat_history_ids: Iterable[str], *, of_all: bool = False
) -> dict[str, ListedHistory]:
    """
    Return what is kept of histories, by their ids, without those that do not exist.

    :param of_all: Whether histories of other users are returned, too, for a check before a write.
    """
    by_bucket: dict[int, list[str]] = {}
    for chat_history_id in chat_history_ids:
        by_bucket.setdefault(bucket_of(chat_history_id), []).append(chat_history_id)
    calls = []
    for bucket, members in by_bucket.items():
        hashes = [keys.of_history(member).counters for member in members]
        calls.append(([keys.of_bucket(bucket).schema_version, *hashes], ()))
    answers = await session.run_each(scripts.INFOS, calls)
    found = {
        member: listed_history(member, fields)
        for members, infos in zip(by_bucket.values(), answers, strict=True)
        for member, fields in zip(members, infos, strict=True)
    }
    return {
        chat_history_id: history
        for chat_history_id, history in found.items()
        if history is not None and (of_all or not keys.user or history.row.user_id == keys.user)
    }


def listed_history(chat_history_id: str, fields: Sequence[str | None]) -> ListedHistory | None:
    """Return what the fields of a history's hash say, in the order of the script INFOS, or `None` if there are none."""
    message_count, round_count, created_at, updated_at, title, meta, next_position, revision, *others = fields
    if message_count is None:
        return None
    user_id, preview, last_role, last_text, last_at, expires_at, renamed_from, renaming = others
    row = HistoryRow(
        chat_history_id=chat_history_id,
        message_count=number(message_count),
        round_count=number(round_count),
        created_at=number(created_at),
        updated_at=number(updated_at),
        title=title,
        meta=meta,
        revision=number(revision),
        user_id=user_id,
        preview=preview,
        last_role=None if last_role is None else ROLES.get(last_role, last_role),
        last_text=last_text or None,
        last_at=None if last_at is None else number(last_at),
    )
    return ListedHistory(
        row=row,
        next_position=number(next_position),
        expires_at=expires_at or "",
        renamed_from=renamed_from or "",
        renaming=renaming or "",
    )


async def next_ids(
    session: Session,
    keys: Keys,
    bucket: int,
    prefix: str,
    after: str,
    count: int = BATCH_SIZE,
    updated_before: int | None = None,
) -> tuple[str | None, list[str]]:
    """
    Return some ids of a bucket's histories with a prefix, and the id to go on after, or `None` if those were all.

    :param updated_before: Only histories that have not changed since this time.
    """
    ends, only = id_range(prefix, after), "" if updated_before is None else updated_before
    last, found = await session.run(scripts.BY_ID, keys.of_bucket(bucket), [*ends, count, only, keys.user])
    return last or None, found


def id_range(prefix: str, after: str = "") -> tuple[str, str]:
    """Return the ends of the range of ids that begin with a prefix and are greater than another, for ZRANGEBYLEX."""
    end = end_of_prefix(prefix)
    least = f"({after}" if after and after >= prefix else f"[{prefix}" if prefix else "-"
    return least, "+" if end is None else f"({end}"


def is_branch(row: HistoryRow) -> bool:
    """Whether a history is a branch."""
    return branch_origin(row.chat_history_id, row.meta) is not None


async def delete_histories(
    session: Session,
    keys: Keys,
    bucket: int,
    chat_history_ids: list[str],
    updated_before: int | None = None,
    expected_revision: int | None = None,
    *,
    only_own: bool = False,
) -> Deleted:
    """
    Delete histories of a bucket.

    :param updated_before: Only those that have not changed since this time.
    :param expected_revision: The revision that the only one of them must have, if it exists.
    :param only_own: Whether a history of another user is an error. Otherwise it is left out.
    """
    names = [name for chat_history_id in chat_history_ids for name in keys.of_history(chat_history_id)]
    conditions = ["" if each is None else each for each in (updated_before, expected_revision)]
    keys_of_script = [*keys.of_bucket(bucket), *names]
    arguments = [*conditions, keys.user, int(only_own), "", *chat_history_ids]
    answer, is_repeated = await session.run_reporting(scripts.DELETE, keys_of_script, arguments)
    if answer[0] == "ACCESS":
        raise no_access()
    if answer[0] == "CHANGED":
        check_revision(expected_revision, answer[1])
    deleted, may_have_branches, owner, renamed_from = answer
    if is_repeated:  # the first attempt may have deleted them, and only its answer was lost
        deleted = len(chat_history_ids) - len(await read_histories(session, keys, chat_history_ids))
    may_have_branches = is_repeated or bool(may_have_branches)
    return Deleted(int(deleted), may_have_branches, owner[1:] if owner else None, renamed_from or "")


async def read_state(session: Session, keys: Keys, chat_history_id: str) -> StateOfHistory | None:
    """Return a history of any user, and its state, or `None` if it does not exist."""
    names = [keys.of_bucket_of(chat_history_id).schema_version, keys.of_history(chat_history_id).counters]
    fields, *others = await session.run(scripts.STATE, names)
    history = listed_history(chat_history_id, fields)
    return None if history is None else StateOfHistory(history, *others)


async def delete_in_state(
    session: Session, keys: Keys, chat_history_id: str, state: str, claimed_for: str = ""
) -> int | None:
    """
    Delete a history of any user if it has a state still. Return how many there were, or `None` if it is still there.

    :param state: The state, from `read_state`.
    :param claimed_for: The id that a renaming must have claimed it for, or nothing for any.
    """
    names = [*keys.of_bucket_of(chat_history_id), *keys.of_history(chat_history_id)]
    arguments: list[str | int] = ["", "", "", 0, f"{state} {claimed_for}", chat_history_id]
    answer = await session.run(scripts.DELETE, names, arguments)
    return None if answer[0] == "CHANGED" else int(answer[0])
