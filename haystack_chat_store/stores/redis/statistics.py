# SPDX-License-Identifier: Apache-2.0
"""The statistics of histories."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from haystack_chat_store.errors import StoreConfigurationError, StoreUnavailableError
from haystack_chat_store.stores.redis.histories import ListedHistory, is_branch, next_ids, read_histories
from haystack_chat_store.stores.redis.keys import BUCKETS, Keys
from haystack_chat_store.stores.redis.operations import server_info
from haystack_chat_store.stores.redis.schema import BATCH_SIZE, GAP, TIME_LENGTH, number
from haystack_chat_store.stores.redis.scripts import directory as scripts
from haystack_chat_store.stores.redis.session import Session
from haystack_chat_store.stores.times import datetime_of
from haystack_chat_store.stores.usage import UsageCounter
from haystack_chat_store.types import StoreStatistics

# How many parts of histories, each of up to BATCH_SIZE messages, one script returns the times of.
_PARTS_PER_STEP = 50
_MICROSECONDS_PER_DAY = 24 * 3600 * 10**6


async def count_all(session: Session, keys: Keys, prefix: str, *, with_branches: bool) -> StoreStatistics:
    """Add up the counters of all histories, and count the times of their messages by day."""
    histories = messages = rounds = 0
    days: Counter[int] = Counter()
    usage = UsageCounter()
    for bucket in range(BUCKETS):
        after: str | None = ""
        while after is not None:
            after, chat_history_ids = await next_ids(session, keys, bucket, prefix, after)
            found = await read_histories(session, keys, chat_history_ids)
            if not with_branches:
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
        size=await _used_memory(session) if not keys.user else None,
        messages_per_day={
            datetime_of(day * _MICROSECONDS_PER_DAY).date(): count for day, count in sorted(days.items())
        },
        usage=usage.total(),
        usage_per_day=usage.per_day(),
    )


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
        await session.to_thread_if_large(found[1::2], _add_usage, usage, found)
    return usage


def _add_usage(usage: UsageCounter, found: Sequence[Any]) -> None:
    for time, content in zip(found[::2], found[1::2], strict=True):
        usage.add_text(number(time), content)


async def _used_memory(session: Session) -> int | None:
    try:
        return sum(int(info["used_memory"]) for info in await server_info(session, "memory"))
    except (StoreConfigurationError, StoreUnavailableError, LookupError):  # this user may not ask
        return None
