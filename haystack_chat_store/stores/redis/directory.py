# SPDX-License-Identifier: Apache-2.0
"""
The directory of histories: listing and describing them, titles, erasing.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from haystack_chat_store.errors import StoreUnavailableError
from haystack_chat_store.stores.redis.base import GAP, STEP, RedisOperations, moment, number
from haystack_chat_store.stores.redis.keys import BUCKETS, bucket_of
from haystack_chat_store.stores.redis.scripts import TIME_LENGTH, Script
from haystack_chat_store.stores.redis.scripts import directory as scripts
from haystack_chat_store.stores.rows import UNCHANGED, HistoryRow, Unchanged, end_of_prefix
from haystack_chat_store.stores.times import datetime_of
from haystack_chat_store.types import StoreStatistics

if TYPE_CHECKING:
    from haystack_chat_store.stores.redis.connections import Session

# The times of so many messages are read at once.
_TIMES_PER_STEP = 10_000
# So many histories are deleted by one script.
_ERASED_PER_STEP = 100
_MICROSECONDS_PER_DAY = 24 * 3600 * 10**6


class _Place(NamedTuple):
    """
    Where a history stands in a list: by time and id, or by id alone.
    """

    time: float
    chat_history_id: str


class _List(NamedTuple):
    """
    A script by which each bucket lists its histories in the same order.

    :param asked: Returns its arguments: for a place after which to begin, or none, and a number of histories.
    :param answered: Returns, of its answer, the place to go on from, or none, and the places found.
    :param is_falling: Whether what is greater comes first.
    """

    script: Script
    asked: Callable[[_Place | None, int], list[str | int]]
    answered: Callable[[Any], tuple[_Place | None, list[_Place]]]
    is_falling: bool

    def is_before(self, one: _Place, other: _Place) -> bool:
        return one > other if self.is_falling else one < other


class _Described(NamedTuple):
    """
    A history, and what it takes to read its times.
    """

    row: HistoryRow
    next_position: int
    has_times: bool


class RedisDirectory(RedisOperations):
    """
    The operations on whole histories.
    """

    async def _history(self, session: "Session", chat_history_id: str) -> HistoryRow | None:
        found = await self._described(session, [chat_history_id])
        return found[chat_history_id].row if found else None

    async def _histories(
        self, session: "Session", prefix: str, before: tuple[int, str] | None, limit: int
    ) -> list[HistoryRow]:
        def asked(place: _Place | None, count: int) -> list[str | int]:
            after = ("", "") if place is None else (str(_whole(place.time)), place.chat_history_id)
            return [prefix, *_range(prefix), count, *after]

        def answered(answer: Any) -> tuple[_Place | None, list[_Place]]:
            time, chat_history_id, found = answer
            places = [_Place(float(score), other) for score, other in zip(found[::2], found[1::2], strict=True)]
            return (_Place(float(time), chat_history_id) if time else None), places

        start = None if before is None else _Place(*before)
        return await self._merged(session, _List(scripts.NEWEST, asked, answered, is_falling=True), start, limit)

    async def _histories_by_id(self, session: "Session", prefix: str, after: str, limit: int) -> list[HistoryRow]:
        def asked(place: _Place | None, count: int) -> list[str | int]:
            return [*_range(prefix, after if place is None else place.chat_history_id), count, ""]

        def answered(answer: Any) -> tuple[_Place | None, list[_Place]]:
            last, found = answer
            return (_Place(0, last) if last else None), [_Place(0, chat_history_id) for chat_history_id in found]

        return await self._merged(session, _List(scripts.BY_ID, asked, answered, is_falling=False), None, limit)

    async def _update_history(
        self, session: "Session", chat_history_id: str, title: str | Unchanged | None, meta: str | Unchanged | None
    ) -> HistoryRow | None:
        changes = {name: value for name, value in (("title", title), ("meta", meta)) if value is not UNCHANGED}
        values = [each for name, value in changes.items() if value is not None for each in (name, str(value))]
        gone = [name for name, value in changes.items() if value is None]
        bucket, history = self._keys_of(chat_history_id)
        info = await session.run(scripts.UPDATE, [*bucket, history.counters], [len(values), *values, *gone])
        found = _described(chat_history_id, info)
        return None if found is None else found.row

    async def _statistics(self, session: "Session", prefix: str) -> StoreStatistics:
        histories = messages = rounds = 0
        days: Counter[int] = Counter()
        for bucket in range(BUCKETS):
            after: str | None = ""
            while after is not None:
                after, chat_history_ids = await self._next_ids(session, bucket, prefix, after)
                found = await self._described(session, chat_history_ids)
                histories += len(found)
                messages += sum(each.row.message_count for each in found.values())
                rounds += sum(each.row.round_count for each in found.values())
                days.update(await self._days(session, bucket, list(found.values())))
        per_day = {datetime_of(day * _MICROSECONDS_PER_DAY).date(): count for day, count in sorted(days.items())}
        return StoreStatistics(histories, messages, rounds, await self._size(session), per_day)

    async def _erase_some(self, session: "Session", prefix: str, updated_before: int | None, limit: int) -> int:
        erased = 0
        for bucket in range(BUCKETS):
            after: str | None = ""
            while after is not None:
                if prefix or updated_before is None:
                    after, found = await self._next_ids(session, bucket, prefix, after, updated_before)
                else:
                    keys = self._keys.of_bucket(bucket)
                    has_more, found = await session.run(scripts.OLDEST, keys, [STEP, updated_before])
                    after = "" if has_more else None
                while found:
                    several = found[: min(limit - erased, _ERASED_PER_STEP)]
                    del found[: len(several)]
                    erased += await self._delete_several(session, bucket, several, updated_before)
                    if erased >= limit:
                        return erased
        return erased

    async def _vacuum(self, session: "Session") -> None:
        await self._wait_for_files(session)  # what is being written now may have begun before the deletion
        has_log = any(info.get("aof_enabled") != "0" for info in await self._info(session, "persistence"))
        has_snapshots = any(settings[1:2] != [""] for settings in await session.ask_masters("CONFIG", "GET", "save"))
        for is_used, command in ((has_log, "BGREWRITEAOF"), (has_snapshots, "BGSAVE")):
            if is_used:
                await session.ask_masters(command)
                await self._wait_for_files(session)

    async def _delete_several(
        self, session: "Session", bucket: int, chat_history_ids: list[str], updated_before: int | None = None
    ) -> int:
        """
        Delete histories of a bucket, of those only that have not changed since a time, and return how many there were.
        """
        keys = [key for chat_history_id in chat_history_ids for key in self._keys.of_history(chat_history_id)]
        only = "" if updated_before is None else updated_before
        deleted: int = await session.run(
            scripts.DELETE, [*self._keys.of_bucket(bucket), *keys], [only, *chat_history_ids]
        )
        return deleted

    # ------------------------------------------------------------------ finding histories

    async def _merged(self, session: "Session", each: _List, start: _Place | None, limit: int) -> list[HistoryRow]:
        """
        Return the first histories of all buckets together.

        Few are asked of each bucket at first, then more of those only whose next ones may still be among the first.
        """
        rows: list[HistoryRow] = []
        waiting: list[_Place] = []
        to_go_on: dict[int, _Place | None] = dict.fromkeys(range(BUCKETS), start)
        count = 2 * limit // BUCKETS + 2
        while True:
            needed = limit - len(rows)
            waiting.sort(reverse=each.is_falling)
            last = waiting[needed - 1] if len(waiting) >= needed else None
            asked = [
                (bucket, place)
                for bucket, place in to_go_on.items()
                if last is None or place is None or each.is_before(place, last)
            ]
            if asked:
                calls = [(self._keys.of_bucket(bucket), each.asked(place, count)) for bucket, place in asked]
                for (bucket, _), answer in zip(asked, await session.run_each(each.script, calls), strict=True):
                    place, found = each.answered(answer)
                    waiting += found
                    to_go_on[bucket] = place
                    if place is None:
                        del to_go_on[bucket]
                count = min(2 * count, STEP)
                continue
            infos = await self._described(session, [place.chat_history_id for place in waiting[:needed]])
            for time, chat_history_id in waiting[:needed]:
                if chat_history_id in infos:  # or it has gone in this moment
                    row = infos[chat_history_id].row
                    # One that has changed in this moment keeps its place in this list.
                    is_same = not each.is_falling or float(row.updated_at) == time
                    rows.append(row if is_same else row._replace(updated_at=_whole(time)))
            del waiting[:needed]
            if len(rows) == limit or not (waiting or to_go_on):
                return rows

    async def _described(self, session: "Session", chat_history_ids: Iterable[str]) -> dict[str, _Described]:
        """
        Return what is known of histories, but for those that are not there.
        """
        by_bucket: dict[int, list[str]] = {}
        for chat_history_id in chat_history_ids:
            by_bucket.setdefault(bucket_of(chat_history_id), []).append(chat_history_id)
        calls = []
        for bucket, members in by_bucket.items():
            keys = [self._keys.of_history(member).counters for member in members]
            calls.append(([self._keys.of_bucket(bucket).schema_version, *keys], ()))
        answers = await session.run_each(scripts.INFOS, calls)
        infos = {
            member: _described(member, info)
            for members, infos in zip(by_bucket.values(), answers, strict=True)
            for member, info in zip(members, infos, strict=True)
        }
        return {chat_history_id: info for chat_history_id, info in infos.items() if info is not None}

    async def _next_ids(
        self, session: "Session", bucket: int, prefix: str, after: str, updated_before: int | None = None
    ) -> tuple[str | None, list[str]]:
        """
        Return ids of a bucket's histories with a prefix, and the one to go on after, or `None` if those were all.

        :param updated_before: Only those that have not changed since this time.
        """
        ends, only = _range(prefix, after), "" if updated_before is None else updated_before
        last, found = await session.run(scripts.BY_ID, self._keys.of_bucket(bucket), [*ends, STEP, only])
        return last or None, found

    # ------------------------------------------------------------------ statistics, and the server's files

    async def _days(self, session: "Session", bucket: int, histories: Sequence[_Described]) -> Counter[int]:
        """
        Return how many messages of a bucket's histories were stored on which day since 1970.
        """
        days: Counter[int] = Counter()
        keys: list[str] = []
        ranges: list[int] = []
        room = _TIMES_PER_STEP
        for each in histories:
            if not each.has_times:
                days[each.row.created_at // _MICROSECONDS_PER_DAY] += each.row.message_count
                continue
            history = self._keys.of_history(each.row.chat_history_id)
            first = 0
            while first < each.next_position:
                last = min(first + room, each.next_position) - 1
                keys += [history.roles, history.times]
                ranges += [first, last]
                room -= last - first + 1
                first = last + 1
                if room == 0:
                    days.update(await self._days_of(session, bucket, keys, ranges))
                    keys, ranges, room = [], [], _TIMES_PER_STEP
        if keys:
            days.update(await self._days_of(session, bucket, keys, ranges))
        return days

    async def _days_of(
        self, session: "Session", bucket: int, keys: Sequence[str], ranges: Sequence[int]
    ) -> Counter[int]:
        found = await session.run(scripts.TIMES, [self._keys.of_bucket(bucket).schema_version, *keys], ranges)
        return Counter(
            (moment(times[index * TIME_LENGTH : (index + 1) * TIME_LENGTH]) or 0) // _MICROSECONDS_PER_DAY
            for roles, times in zip(found[::2], found[1::2], strict=True)
            for index, letter in enumerate(roles)
            if letter != GAP
        )

    async def _size(self, session: "Session") -> int | None:
        try:
            return sum(int(info["used_memory"]) for info in await self._info(session, "memory"))
        except (StoreUnavailableError, LookupError):  # this user may not ask
            return None

    async def _wait_for_files(self, session: "Session") -> None:
        """
        Wait until no server writes a file in the background.
        """
        while True:
            infos = await self._info(session, "persistence")
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

    async def _info(self, session: "Session", section: str) -> list[dict[str, str]]:
        texts = await session.ask_masters("INFO", section)
        return [dict(line.split(":", 1) for line in text.splitlines() if ":" in line) for text in texts]


def _described(chat_history_id: str, info: Sequence[str | None]) -> _Described | None:
    message_count, round_count, created_at, updated_at, title, meta, next_position, version = info
    if message_count is None:
        return None
    counts = number(message_count), number(round_count)
    row = HistoryRow(chat_history_id, *counts, moment(created_at) or 0, moment(updated_at) or 0, title, meta)
    return _Described(row, number(next_position), version is not None)


def _whole(time: float) -> int:
    """
    Return a time as a number that a cursor can have, however far something else has moved a history in the directory.
    """
    return int(max(-(2.0**62), min(time, 2.0**62)))


def _range(prefix: str, after: str = "") -> tuple[str, str]:
    """
    Return the ends of the range of ids that begin with a prefix and are greater than another, for ZRANGEBYLEX.
    """
    end = end_of_prefix(prefix)
    least = f"({after}" if after and after >= prefix else f"[{prefix}" if prefix else "-"
    return least, "+" if end is None else f"({end}"
