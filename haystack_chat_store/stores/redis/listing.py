# SPDX-License-Identifier: Apache-2.0
"""Lists of the histories of all buckets: merges those of each."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from haystack_chat_store.stores.redis.histories import id_range, is_branch, read_histories
from haystack_chat_store.stores.redis.keys import BUCKETS, Keys
from haystack_chat_store.stores.redis.schema import BATCH_SIZE, GREATEST_TIME, time_of_score
from haystack_chat_store.stores.redis.scripts import Script
from haystack_chat_store.stores.redis.scripts import directory as scripts
from haystack_chat_store.stores.redis.session import Session
from haystack_chat_store.stores.rows import HistoryRow


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


async def newest_histories(
    session: Session, keys: Keys, prefix: str, before: tuple[int, str] | None, limit: int, *, with_branches: bool
) -> list[HistoryRow]:
    """Merge the newest histories of all buckets, from a place on."""

    def arguments_of(place: _Place | None, count: int) -> list[str | int]:
        after = ("", "") if place is None else (_score_text(place.time), place.chat_history_id)
        return [prefix, *id_range(prefix), count, *after, keys.user]

    def parsed(answer: Any) -> tuple[_Place | None, list[_Place]]:
        time, chat_history_id, found = answer
        places = [_Place(float(score), other) for score, other in zip(found[::2], found[1::2], strict=True)]
        return (_Place(float(time), chat_history_id) if time else None), places

    order = _Order(script=scripts.NEWEST, arguments_of=arguments_of, parsed=parsed, is_descending=True)
    start = None if before is None else _Place(_score_of(before[0]), before[1])
    return await _merged(session, keys, order, start, limit, with_branches=with_branches)


async def next_histories(
    session: Session, keys: Keys, prefix: str, after: str, limit: int, *, with_branches: bool
) -> list[HistoryRow]:
    """Merge the histories of all buckets whose ids are greater than one, in the order of their ids."""

    def arguments_of(place: _Place | None, count: int) -> list[str | int]:
        ends = id_range(prefix, after if place is None else place.chat_history_id)
        return [*ends, count, "", keys.user]

    def parsed(answer: Any) -> tuple[_Place | None, list[_Place]]:
        last, found = answer
        return (_Place(0, last) if last else None), [_Place(0, chat_history_id) for chat_history_id in found]

    order = _Order(script=scripts.BY_ID, arguments_of=arguments_of, parsed=parsed, is_descending=False)
    return await _merged(session, keys, order, None, limit, with_branches=with_branches)


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


def _score_of(time: int) -> float:
    """Return the score of a time that `time_of_score` returned. The greatest stands for an infinite score."""
    return float(time) if abs(time) < GREATEST_TIME else math.copysign(math.inf, time)


def _score_text(score: float) -> str:
    return str(int(score)) if math.isfinite(score) else str(score)
