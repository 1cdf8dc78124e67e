# SPDX-License-Identifier: Apache-2.0
"""The operations on whole histories: listing, titles, statistics, erasing."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from haystack_chat_store.errors import StoreConfigurationError, StoreUnavailableError
from haystack_chat_store.ids import branch_prefix
from haystack_chat_store.stores.conflicts import check_revision, history_not_found, no_access
from haystack_chat_store.stores.redis.documents import index_written, prepare_index
from haystack_chat_store.stores.redis.failures import contradicting
from haystack_chat_store.stores.redis.keys import BUCKETS, Keys, bucket_of
from haystack_chat_store.stores.redis.operations import RedisOperations, lifetime
from haystack_chat_store.stores.redis.schema import (
    BATCH_SIZE,
    GAP,
    GREATEST_TIME,
    ROLES,
    TIME_LENGTH,
    number,
    time_of_score,
)
from haystack_chat_store.stores.redis.scripts import Script
from haystack_chat_store.stores.redis.scripts import directory as scripts
from haystack_chat_store.stores.redis.session import Session
from haystack_chat_store.stores.redis.staging import Stage, note_branch
from haystack_chat_store.stores.rows import UNCHANGED, HistoryChange, HistoryRow, Scope, branch_origin, end_of_prefix
from haystack_chat_store.stores.times import datetime_of
from haystack_chat_store.stores.usage import UsageCounter
from haystack_chat_store.types import StoreStatistics

# How many parts of histories, each of up to BATCH_SIZE messages, one script returns the times of.
_PARTS_PER_STEP = 50
# How often the creation of a history begins again because it was deleted meanwhile.
_CREATE_ATTEMPTS = 10
# How many histories one script deletes.
_ERASED_PER_STEP = 100
_MICROSECONDS_PER_DAY = 24 * 3600 * 10**6


class _Place(NamedTuple):
    """Where a history stands in a list: by time and id, or by id alone. Places compare as tuples."""

    time: float
    chat_history_id: str


@dataclass(frozen=True, kw_only=True)
class _Order:
    """
    An order of histories, in which a script lists those of one bucket.

    :param arguments_of: Returns the script's arguments: for a place to begin after, or `None`, and a number of ids.
    :param parsed: Returns, of the script's answer, the place to go on from, or `None`, and the places found.
    :param is_descending: Whether greater places come first.
    """

    script: Script
    arguments_of: Callable[[_Place | None, int], list[str | int]]
    parsed: Callable[[Any], tuple[_Place | None, list[_Place]]]
    is_descending: bool

    def is_before(self, one: _Place, other: _Place) -> bool:
        return one > other if self.is_descending else one < other


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


class Directory(RedisOperations):
    """The operations on whole histories."""

    async def history(self, session: Session, scope: Scope, chat_history_id: str) -> HistoryRow | None:
        """Read the hash of a history."""
        found = await read_histories(session, self.keys(scope), [chat_history_id])
        return found[chat_history_id].row if found else None

    async def histories(
        self, session: Session, scope: Scope, prefix: str, before: tuple[int, str] | None, limit: int
    ) -> list[HistoryRow]:
        """Merge the newest histories of all buckets."""

        def arguments_of(place: _Place | None, count: int) -> list[str | int]:
            after = ("", "") if place is None else (_score_text(place.time), place.chat_history_id)
            return [prefix, *id_range(prefix), count, *after, scope.user_id or ""]

        def parsed(answer: Any) -> tuple[_Place | None, list[_Place]]:
            time, chat_history_id, found = answer
            places = [_Place(float(score), other) for score, other in zip(found[::2], found[1::2], strict=True)]
            return (_Place(float(time), chat_history_id) if time else None), places

        order = _Order(script=scripts.NEWEST, arguments_of=arguments_of, parsed=parsed, is_descending=True)
        start = None if before is None else _Place(_score_of(before[0]), before[1])
        return await _merged(session, self.keys(scope), order, start, limit, with_branches=scope.with_branches)

    async def histories_by_id(
        self, session: Session, scope: Scope, prefix: str, after: str, limit: int
    ) -> list[HistoryRow]:
        """Merge the next histories of all buckets."""

        def arguments_of(place: _Place | None, count: int) -> list[str | int]:
            ends = id_range(prefix, after if place is None else place.chat_history_id)
            return [*ends, count, "", scope.user_id or ""]

        def parsed(answer: Any) -> tuple[_Place | None, list[_Place]]:
            last, found = answer
            return (_Place(0, last) if last else None), [_Place(0, chat_history_id) for chat_history_id in found]

        order = _Order(script=scripts.BY_ID, arguments_of=arguments_of, parsed=parsed, is_descending=False)
        return await _merged(session, self.keys(scope), order, None, limit, with_branches=scope.with_branches)

    async def update_history(
        self,
        session: Session,
        scope: Scope,
        chat_history_id: str,
        change: HistoryChange,
    ) -> HistoryRow | None:
        """
        Set and delete fields of the hash of a history. Keys of the meta are set only if it is still the same.

        Branches get another user before the history does, so that a repeated call finishes what another one began.
        Those that were made meanwhile get it afterwards.
        """
        keys, handing_over = self.keys(scope), None
        if change.user_id is not UNCHANGED:
            found = await read_histories(session, keys, [chat_history_id])
            before = next((each.row.user_id for each in found.values()), change.user_id)
            handing_over = _HandingOver(before, change.user_id)
            await _hand_over_branches(session, keys, chat_history_id, handing_over, set())
        names = [*keys.of_bucket_of(chat_history_id), keys.of_history(chat_history_id).counters]
        while True:
            meta, required = change.meta, ""
            if change.merged is not None:
                found = await read_histories(session, keys, [chat_history_id], of_all=True)
                stored = next((each.row.meta for each in found.values()), None)
                meta, required = change.new_meta(stored), f"={stored or ''}"
            wanted = (("title", change.title), ("meta", meta), ("user_id", change.user_id))
            changes = {name: value for name, value in wanted if value is not UNCHANGED}
            if isinstance(meta, str):
                await note_branch(session, keys, chat_history_id, meta)
            values = [each for name, value in changes.items() if value is not None for each in (name, str(value))]
            deleted = [name for name, value in changes.items() if value is None]
            default_title = "" if change.default_title is None else f"={change.default_title}"
            arguments: list[str | int] = [
                chat_history_id,
                len(values),
                *values,
                *deleted,
                default_title,
                required,
                keys.user,
            ]
            fields = await session.run(scripts.UPDATE, names, arguments)
            if fields == ["ACCESS"]:
                raise no_access()
            if fields != ["CHANGED"]:
                updated = listed_history(chat_history_id, fields)
                if updated is not None and handing_over is not None:
                    await _hand_over_branches(session, keys, chat_history_id, handing_over, set())
                if change.user_id is not UNCHANGED:
                    await index_written(self, session, keys, chat_history_id)
                return None if updated is None else updated.row

    async def create_history(self, session: Session, scope: Scope, history: HistoryRow) -> tuple[HistoryRow, bool]:
        """Make a history with the script that ends an import, without messages."""
        keys, new_id = self.keys(scope), history.chat_history_id
        await prepare_index(self, session, keys)
        user_id = history.user_id if scope.user_id is None else scope.user_id
        for _ in range(_CREATE_ATTEMPTS):
            stage = Stage(session, keys, new_id)
            answer = await stage.finish(0, lifetime(scope), history, user_id=user_id)
            if not isinstance(answer, int) and answer[0] == "ACCESS":
                raise no_access()
            found = await read_histories(session, keys, [new_id])
            if new_id in found:  # unless it was deleted just now
                return found[new_id].row, isinstance(answer, int)
        raise contradicting(new_id)

    async def namespaces(self, session: Session, scope: Scope) -> list[str]:
        """Look through the keys of all servers for the lists of histories."""
        keys = self.keys(scope)
        found: set[str | None] = set()
        for address in await session.masters():
            cursor = ""
            while cursor != "0":
                options = "MATCH", keys.directories_pattern(), "COUNT", BATCH_SIZE
                cursor, names = await session.ask(address, "SCAN", cursor or "0", *options)
                found.update(map(keys.namespace_of, names))
        return sorted(filter(None, found))

    async def statistics(self, session: Session, scope: Scope, prefix: str) -> StoreStatistics:
        """Add up the counters of all histories, and count the times of their messages by day."""
        keys = self.keys(scope)
        histories = messages = rounds = 0
        days: Counter[int] = Counter()
        usage = UsageCounter()
        for bucket in range(BUCKETS):
            after: str | None = ""
            while after is not None:
                after, chat_history_ids = await next_ids(session, keys, bucket, prefix, after)
                found = await read_histories(session, keys, chat_history_ids)
                if not scope.with_branches:
                    found = {each: history for each, history in found.items() if not is_branch(history.row)}
                days_of = await _messages_per_day(session, keys, list(found.values()))
                for chat_history_id, history in found.items():
                    days_of_history, usage_of_history = days_of[chat_history_id], await _usage(session, keys, history)
                    if days_of_history is None or usage_of_history is None:  # it was handed over meanwhile
                        continue
                    histories += 1
                    messages += history.row.message_count
                    rounds += history.row.round_count
                    days.update(days_of_history)
                    usage.add_all(usage_of_history)
        return StoreStatistics(
            chat_histories=histories,
            messages=messages,
            rounds=rounds,
            # The size is that of the whole server, so a store of one user does not tell it.
            size=await _used_memory(session) if scope.user_id is None else None,
            messages_per_day={
                datetime_of(day * _MICROSECONDS_PER_DAY).date(): count for day, count in sorted(days.items())
            },
            usage=usage.total(),
            usage_per_day=usage.per_day(),
        )

    async def erase_some(
        self, session: Session, scope: Scope, prefix: str, updated_before: int | None, limit: int
    ) -> int:
        """Go through the buckets: by age if only the age matters, otherwise by id."""
        keys = self.keys(scope)
        erased = 0
        for bucket in range(BUCKETS):
            after: str | None = ""
            seen: set[str] = set()
            while after is not None:
                count = min(limit - erased, _ERASED_PER_STEP)
                if prefix or (updated_before is None and not keys.user):
                    after, found = await next_ids(session, keys, bucket, prefix, after, count, updated_before)
                else:
                    before = "+inf" if updated_before is None else updated_before
                    found = await session.run(scripts.OLDEST, keys.of_bucket(bucket), [before, count, keys.user])
                    after = None if seen.issuperset(found) else ""  # else it cannot be deleted
                    seen.update(found)
                if found:
                    erased += (await delete_histories(session, keys, bucket, found, updated_before)).number
                if erased == limit:
                    return erased
        return erased

    async def vacuum(self, session: Session, scope: Scope) -> None:  # noqa: ARG002  (its files hold all namespaces)
        """Have every server write its files anew."""
        await _wait_for_files(session)  # the file being written now may have been begun before the deletion
        has_log = any(info.get("aof_enabled") != "0" for info in await _info(session, "persistence"))
        has_snapshots = any(settings[1:2] != [""] for settings in await session.ask_masters("CONFIG", "GET", "save"))
        for is_used, command in ((has_log, "BGREWRITEAOF"), (has_snapshots, "BGSAVE")):
            if is_used:
                await session.ask_masters(command)
                await _wait_for_files(session)


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


class _HandingOver(NamedTuple):
    """From which user to which one, or none, histories go."""

    before: str | None
    after: str | None


async def delete_branches(session: Session, keys: Keys, chat_history_id: str, deleted: Deleted) -> None:
    """
    Delete the branches of a history that was deleted, and theirs. If it was renamed, some may name its old id still.

    If the user of the history is not known, all of the scope that name it as their origin are deleted.
    """
    origins = [chat_history_id] if deleted.may_have_branches else []
    before = deleted.renamed_from
    if before and not await read_histories(session, keys, [before], of_all=True):
        origins.append(before)
    for origin in origins:
        for branch, history in (await branches_of(session, keys, origin)).items():
            user_id = history.row.user_id or ""
            if deleted.owner in (None, user_id):
                of_branch = await delete_histories(session, keys, bucket_of(branch), [branch])
                await delete_branches(session, keys, branch, of_branch._replace(owner=user_id))


async def follow_origin(session: Session, keys: Keys, branch: str, origin: str, owner: str | None) -> None:
    """
    Have a branch that was just made go where its history went meanwhile: to another user, or away.

    A call that hands over, renames or deletes the history looks for its branches after it has changed the history. So
    either that call finds the branch, or the change is found here.

    :param owner: The user of both when the branch was made.
    :raises ChatHistoryNotFoundError: If the history is gone. The branch is deleted.
    """
    found = (await read_histories(session, keys, [origin], of_all=True)).get(origin)
    if found is None:
        await delete_histories(session, keys, bucket_of(branch), [branch])
        raise history_not_found(origin)
    await _hand_over(session, keys, branch, _HandingOver(owner, found.row.user_id))


async def _hand_over_branches(
    session: Session, keys: Keys, chat_history_id: str, handing_over: _HandingOver, passed: set[str]
) -> None:
    """
    Give the branches of a history, and theirs, to another user, or to none. Those of a branch go before it.

    :param passed: The histories that this was done for: two may name each other as their origin.
    """
    passed.add(chat_history_id)
    if handing_over.before == handing_over.after or not await _may_have_branches(session, keys, chat_history_id):
        return
    for branch, history in (await branches_of(session, keys, chat_history_id)).items():
        if history.row.user_id == handing_over.before and branch not in passed:
            await _hand_over_branches(session, keys, branch, handing_over, passed)
            await _hand_over(session, keys, branch, handing_over)


async def _hand_over(session: Session, keys: Keys, branch: str, handing_over: _HandingOver) -> None:
    """Give a branch to another user, or to none."""
    before, after = handing_over
    if before != after:
        names = [*keys.of_bucket_of(branch), keys.of_history(branch).counters]
        user = ["user_id"] if after is None else ["user_id", after]
        await session.run(scripts.UPDATE, names, [branch, len(user) if after else 0, *user, "", "", before or ""])


async def _may_have_branches(session: Session, keys: Keys, chat_history_id: str) -> bool:
    """Whether a history that is there has branches, or had some. One that is not there may have some in any case."""
    return bool(await session.run(scripts.HAS_BRANCHES, keys.of_bucket_of(chat_history_id), [chat_history_id]))


async def branches_of(session: Session, keys: Keys, chat_history_id: str) -> dict[str, ListedHistory]:
    """Return the branches of a history by their ids. They are found by these, and known by their meta."""
    parts: dict[int, str | None] = dict.fromkeys(range(BUCKETS), "")
    branches: dict[str, ListedHistory] = {}
    while parts:
        calls: list[tuple[Sequence[str], Sequence[str | int]]] = []
        for bucket, after in parts.items():
            ends = id_range(branch_prefix(chat_history_id), after or "")
            calls.append((keys.of_bucket(bucket), [*ends, BATCH_SIZE, "", keys.user]))
        answers = await session.run_each(scripts.BY_ID, calls)
        found = await read_histories(session, keys, [each for _, ids in answers for each in ids])
        branches |= {
            each: history for each, history in found.items() if branch_origin(each, history.row.meta) == chat_history_id
        }
        parts = {bucket: last for bucket, (last, _) in zip(parts, answers, strict=True) if last}
    return branches


def is_branch(row: HistoryRow) -> bool:
    """Whether a history is a branch."""
    return branch_origin(row.chat_history_id, row.meta) is not None


async def _merged(
    session: Session, keys: Keys, order: _Order, start: _Place | None, limit: int, *, with_branches: bool
) -> list[HistoryRow]:
    """
    Return the first histories of all buckets together.

    Each bucket is asked for a few at first, then only those for more whose next histories may still be among the first.
    """
    rows: list[HistoryRow] = []
    waiting: list[_Place] = []
    continue_from: dict[int, _Place | None] = dict.fromkeys(range(BUCKETS), start)
    count = 2 * limit // BUCKETS + 2
    while True:
        needed = limit - len(rows)
        waiting.sort(reverse=order.is_descending)
        last = waiting[needed - 1] if len(waiting) >= needed else None
        asked = [
            (bucket, place)
            for bucket, place in continue_from.items()
            if last is None or place is None or order.is_before(place, last)
        ]
        if asked:
            calls = [(keys.of_bucket(bucket), order.arguments_of(place, count)) for bucket, place in asked]
            for (bucket, _), answer in zip(asked, await session.run_each(order.script, calls), strict=True):
                place, found = order.parsed(answer)
                waiting += found
                continue_from[bucket] = place
                if place is None:
                    del continue_from[bucket]
            count = min(2 * count, BATCH_SIZE)
            continue
        histories = await read_histories(session, keys, [place.chat_history_id for place in waiting[:needed]])
        for time, chat_history_id in waiting[:needed]:
            if chat_history_id in histories:  # unless it was deleted just now
                row = histories[chat_history_id].row
                if not with_branches and is_branch(row):
                    continue
                # A history that has changed just now keeps its place in this list.
                is_same = not order.is_descending or row.updated_at == time
                rows.append(row if is_same else replace(row, updated_at=time_of_score(time)))
        del waiting[:needed]
        if len(rows) == limit or not (waiting or continue_from):
            return rows


async def _messages_per_day(
    session: Session, keys: Keys, histories: Sequence[ListedHistory]
) -> dict[str, Counter[int] | None]:
    """
    Return, by the ids of histories of one bucket, how many messages were stored on which day since 1970.

    A history that is another user's by now has `None`.
    """
    days_of: dict[str, Counter[int] | None] = {each.row.chat_history_id: Counter() for each in histories}
    parts = _parts(histories)
    for index in range(0, len(parts), _PARTS_PER_STEP):
        some = parts[index : index + _PARTS_PER_STEP]
        names = [name for chat_history_id, *_ in some for name in _counted_keys(keys, chat_history_id)]
        ranges = [end for _, *ends in some for end in ends]
        version = keys.of_bucket_of(some[0][0]).schema_version
        found = await session.run(scripts.TIMES, [version, *names], [*ranges, keys.user])
        for (chat_history_id, _, _), roles, times in zip(some, found[::2], found[1::2], strict=True):
            days = days_of[chat_history_id]
            if roles is None or days is None:
                days_of[chat_history_id] = None
                continue
            starts = (TIME_LENGTH * place for place, letter in enumerate(roles) if letter != GAP)
            days.update(number(times[start : start + TIME_LENGTH]) // _MICROSECONDS_PER_DAY for start in starts)
    return days_of


def _counted_keys(keys: Keys, chat_history_id: str) -> tuple[str, str, str]:
    names = keys.of_history(chat_history_id)
    return names.counters, names.roles, names.times


def _parts(histories: Sequence[ListedHistory]) -> list[tuple[str, int, int]]:
    """Divide histories into parts of a size for one script: the id, the first position and the last one of each."""
    return [
        (each.row.chat_history_id, first, min(first + BATCH_SIZE, each.next_position) - 1)
        for each in histories
        for first in range(0, each.next_position, BATCH_SIZE)
    ]


async def _usage(session: Session, keys: Keys, history: ListedHistory) -> UsageCounter | None:
    """Return what the replies of a history say of their token usage, or `None` if it is another user's by now."""
    chat_history_id, usage = history.row.chat_history_id, UsageCounter()
    version, names = keys.of_bucket_of(chat_history_id).schema_version, keys.of_history(chat_history_id)
    first = 0
    while first < history.next_position:
        last = min(first + BATCH_SIZE, history.next_position) - 1
        counted = [version, *_counted_keys(keys, chat_history_id), names.contents]
        first, found = await session.run(scripts.USAGE, counted, [first, last, keys.user])
        if first < 0:
            return None
        for time, content in zip(found[::2], found[1::2], strict=True):
            usage.add_text(number(time), content)
    return usage


async def _used_memory(session: Session) -> int | None:
    try:
        return sum(int(info["used_memory"]) for info in await _info(session, "memory"))
    except (StoreConfigurationError, StoreUnavailableError, LookupError):  # this user may not ask
        return None


async def _wait_for_files(session: Session) -> None:
    """Wait until no server writes a file in the background."""
    while True:
        infos = await _info(session, "persistence")
        for info in infos:
            for what in ("aof_last_bgrewrite_status", "rdb_last_bgsave_status"):
                if info.get(what, "ok") != "ok":
                    raise StoreUnavailableError(
                        f"A Redis server could not write its files anew ({what}: {info[what]}). Its log says why. "
                        "What was deleted may still be in them."
                    )
        at_work = ("aof_rewrite_in_progress", "aof_rewrite_scheduled", "rdb_bgsave_in_progress")
        if not any(info.get(what, "0") != "0" for info in infos for what in at_work):
            return
        await session.pause()


async def _info(session: Session, section: str) -> list[dict[str, str]]:
    texts = await session.ask_masters("INFO", section)
    return [dict(line.split(":", 1) for line in text.splitlines() if ":" in line) for text in texts]


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


def _score_of(time: int) -> float:
    """Return the score of a time that `time_of_score` returned. The greatest stands for an infinite score."""
    return float(time) if abs(time) < GREATEST_TIME else math.copysign(math.inf, time)


def _score_text(score: float) -> str:
    return str(int(score)) if math.isfinite(score) else str(score)


def id_range(prefix: str, after: str = "") -> tuple[str, str]:
    """Return the ends of the range of ids that begin with a prefix and are greater than another, for ZRANGEBYLEX."""
    end = end_of_prefix(prefix)
    least = f"({after}" if after and after >= prefix else f"[{prefix}" if prefix else "-"
    return least, "+" if end is None else f"({end}"
