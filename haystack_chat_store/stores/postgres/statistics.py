# SPDX-License-Identifier: Apache-2.0
"""The statistics of histories."""

from collections.abc import Sequence
from datetime import date, timedelta
from typing import Any

from haystack_chat_store.stores.postgres.session import Session
from haystack_chat_store.stores.postgres.statements import READ_WHOLE_TABLES, Statement
from haystack_chat_store.stores.usage import UsageCounter
from haystack_chat_store.types import StoreStatistics

_TOTALS = Statement("""
    SELECT count(*), coalesce(sum(message_count), 0)::bigint, coalesce(sum(round_count), 0)::bigint
    FROM {histories} WHERE {with_prefix}
""")
_PER_DAY = Statement("""
    SELECT extract(epoch FROM day)::bigint / 86400, count(*) FROM (
        SELECT date_trunc('day', time AT TIME ZONE 'UTC') AS day
        FROM {messages} JOIN (SELECT history_key FROM {histories} WHERE {with_prefix}) AS h USING (history_key)
        CROSS JOIN LATERAL (SELECT CASE WHEN {created_at_is_readable} THEN created_at ELSE 'epoch' END) AS s (time)
    ) AS days GROUP BY day ORDER BY day
""")
# PostgreSQL cannot look into a content that has a NUL or a lone surrogate anywhere. They are written as \u…
_USAGE = Statement("""
    SELECT CASE WHEN {created_at_is_readable} THEN {message_time} ELSE 0 END,
        CASE WHEN can_be_read
            THEN json_build_object('model', content -> 'meta' -> 'model', 'usage', content -> 'meta' -> 'usage')
            ELSE content END
    FROM {messages} JOIN (SELECT history_key FROM {histories} WHERE {with_prefix}) AS h USING (history_key)
    CROSS JOIN LATERAL (SELECT strpos(content::text, '\\u') = 0) AS s (can_be_read)
    WHERE role = 'assistant' AND CASE WHEN can_be_read
        THEN json_typeof(content -> 'meta' -> 'usage') = 'object' ELSE strpos(content::text, '"usage":') > 0 END
""")
_SIZE_ON_DISK = Statement("""
    SELECT sum(pg_total_relation_size(part))::bigint
    FROM unnest(ARRAY[{histories_name}, {messages_name}]::regclass[]) AS whole
    CROSS JOIN LATERAL (
        SELECT whole AS part UNION SELECT relid FROM pg_partition_tree(whole)
    ) AS parts
""")


_EPOCH = date(1970, 1, 1)


async def count_all(session: Session, parameters: dict[str, Any]) -> StoreStatistics:
    """
    Count every message of some histories.

    :param parameters: The parameters of the fragment `with_prefix`.
    """
    await session.run(READ_WHOLE_TABLES)
    ((histories, messages, rounds),) = await session.fetch(_TOTALS, parameters)
    ((size,),) = await session.fetch(_SIZE_ON_DISK)
    per_day = await session.fetch(_PER_DAY, parameters)
    replies = await session.fetch(_USAGE, parameters)
    usage = await session.to_thread(_usage, replies)
    return StoreStatistics(
        chat_histories=histories,
        messages=messages,
        rounds=rounds,
        # The size is that of the whole database, so a store of one user does not tell it.
        size=size if parameters["user"] is None else None,
        messages_per_day={_EPOCH + timedelta(days=day): count for day, count in per_day},
        usage=usage.total(),
        usage_per_day=usage.per_day(),
    )


def _usage(replies: Sequence[tuple[int, str]]) -> UsageCounter:
    usage = UsageCounter()
    for created_at, meta in replies:
        usage.add_text(created_at, meta)
    return usage
