# SPDX-License-Identifier: Apache-2.0
"""
What is said to the tables: every statement that reads or changes what is in them.
"""

from typing import Any, NamedTuple

from haystack_chat_store.stores.rows import Scope, end_of_prefix

# What others commit while this transaction waits for a lock, it sees, whatever the database's default is.
BEGIN = "BEGIN ISOLATION LEVEL READ COMMITTED"
# For what reads much: one moment for all of it.
BEGIN_READING = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
# What reads much of a table had better not walk along an index.
READ_WHOLE_TABLES = """
    SELECT set_config('enable_seqscan', 'on', true), set_config('enable_bitmapscan', 'on', true),
        set_config('enable_sort', 'on', true)
"""

#: Greater than all ids, which have 512 characters at most.
AFTER_ALL_IDS = "\U0010ffff" * 513

#: What stands for 'infinity', which somebody else may have left in a column, and its negative for '-infinity'.
INFINITY = 2**62
# All other times are this one at most, so that the numbers which stand for them are less than that.
_LATEST = "timestamptz '140000-01-01 00:00:00+00'"
# The first time that there is, in 4713 BC.
_EARLIEST = -210_866_803_200_000_000


def prefix_parameters(scope: Scope, prefix: str) -> dict[str, Any]:
    """
    Return the parameters of the fragment `with_prefix`.
    """
    return {"namespace": scope.namespace, "prefix": prefix, "end": end_of_prefix(prefix) or AFTER_ALL_IDS}


def _microseconds(column: str) -> str:
    """
    Return what makes microseconds since 1970 of a time. Whatever time that is: one must not hide others.

    Before PostgreSQL 14, extract() returns numbers that are exact only if they are whole and not too large.
    """
    time = f"least({column}, {_LATEST})"
    return (
        f"CASE {column} WHEN 'infinity' THEN {INFINITY} WHEN '-infinity' THEN {-INFINITY} ELSE"
        f" extract(epoch FROM date_trunc('second', {time}))::bigint * 1000000"
        f" + mod(extract(microseconds FROM {time})::bigint, 1000000) END"
    )


def _time(microseconds: str) -> str:
    """
    Return what makes a time of microseconds since 1970.

    An interval is multiplied in floating point, which is exact for whole hours of any year.
    """
    return (
        f"('epoch'::timestamptz + {microseconds} / 3600000000 * interval '1 hour'"
        f" + mod({microseconds}, 3600000000) * interval '1 microsecond')"
    )


def _is_readable(time: str) -> str:
    """
    Return what tells whether Python's `datetime` has a time.
    """
    return f"{time} BETWEEN '0001-01-01 00:00:00+00' AND '9999-12-31 23:59:59.999999+00'"


_BY_ID = 'chat_history_id COLLATE "C"'
_CURSOR = "%(updated_at)s::bigint"
_UPDATED_AT_OF_CURSOR = (
    f"CASE WHEN {_CURSOR} = {INFINITY} THEN 'infinity' WHEN {_CURSOR} < {_EARLIEST} THEN '-infinity'"
    f" ELSE {_time(_CURSOR)} END"
)

#: What statements have in common, under the names by which they include it.
FRAGMENTS = {
    "history_row": (
        f"chat_history_id, message_count, round_count, {_microseconds('created_at')}, {_microseconds('updated_at')}, "
        "title, meta"
    ),
    "message_row": f"position, {_microseconds('created_at')}, message_id, role, content",
    "by_id": _BY_ID,
    "with_prefix": f"namespace = %(namespace)s AND {_BY_ID} >= %(prefix)s AND {_BY_ID} < %(end)s",
    "further": f"(updated_at, {_BY_ID}) < ({_UPDATED_AT_OF_CURSOR}, %(id)s)",
    "newest_first": f"ORDER BY updated_at DESC, {_BY_ID} DESC",
    "created_at": _time("%(created_at)s::bigint"),
    "updated_at": _time("%(updated_at)s::bigint"),
    "updated_before": _time("%(updated_before)s::bigint"),
    "time_sent": _time("number"),
    # Of a statement whose transaction has the history locked. Clocks of servers that follow each other may differ.
    "now": "greatest(updated_at, statement_timestamp())",
    "created_at_is_readable": _is_readable("created_at"),
    "updated_at_is_readable": _is_readable("updated_at"),
    # Rows as they are sent: psycopg takes as long to send three arrays as for all the rest. No content needs a line
    # break, for it is JSON, and terms have none.
    "sent": """
        ROWS FROM (
            json_array_elements_text(%(message_ids)s::json),
            unnest(
                string_to_array(%(roles)s, ' '),
                string_to_array(%(contents)s, E'\n'),
                string_to_array(%(terms)s, E'\n')
            )
        ) WITH ORDINALITY AS sent (message_id, role, content, terms, place)
    """,
    "sent_with_numbers": """
        ROWS FROM (
            json_array_elements_text(%(message_ids)s::json),
            unnest(
                string_to_array(%(roles)s, ' '),
                string_to_array(%(contents)s, E'\n'),
                string_to_array(%(terms)s, E'\n'),
                string_to_array(%(numbers)s, ' ')::bigint[]
            )
        ) WITH ORDINALITY AS sent (message_id, role, content, terms, number, place)
    """,
}

# The row of the history is the lock that hands out positions: writers of one history queue for it, and it moves on only
# when its messages are committed.
_APPEND = """
    WITH history AS ({move_on} RETURNING next_position - %(count)s AS start)
    INSERT INTO {{messages}} (history_key, position, message_id, role, content, search_terms)
    SELECT %(key)s, start + place - 1, message_id, role, content::json, terms::tsvector
    FROM history, {{sent}}
"""
_APPEND_ALL = _APPEND.format(
    move_on="""
        INSERT INTO {histories} AS h
            (history_key, namespace, chat_history_id, next_position, message_count, round_count)
        VALUES (%(key)s, %(namespace)s, %(id)s, %(count)s, %(count)s, %(rounds)s)
        ON CONFLICT (history_key) DO UPDATE SET
            next_position = h.next_position + excluded.next_position,
            message_count = h.message_count + excluded.message_count,
            round_count = h.round_count + excluded.round_count,
            updated_at = greatest(h.updated_at, excluded.updated_at)
    """
)
# For the rest of a batch: only to a history that nobody has changed since it was found to have the others.
_APPEND_REST = _APPEND.format(
    move_on="""
        UPDATE {histories} SET
            next_position = next_position + %(count)s,
            message_count = message_count + %(count)s,
            round_count = round_count + %(rounds)s,
            updated_at = {now}
        WHERE history_key = %(key)s AND xmin = %(version)s::xid
    """
)
_KNOWN_IDS = """
    SELECT message_id, position, role, h.xmin::text FROM {messages} JOIN {histories} AS h USING (history_key)
    WHERE history_key = %s AND message_id = ANY (%s)
"""
_COUNT = "SELECT message_count FROM {histories} WHERE history_key = %s"

# The upper bounds exclude nothing. They tell the planner that the range is narrow, whatever it knows of the table, so
# that it walks along the primary key (a range between two unknown bounds is taken for 0.5 % of the table).
_READ = """
    SELECT content, {size} FROM {{messages}}
    WHERE history_key = %(key)s AND position BETWEEN {start} AND %(end)s ORDER BY position
"""
_START_OF_ROUNDS = """coalesce(
        (SELECT position FROM {{messages}}
            WHERE history_key = %(key)s AND role = 'user' AND position BETWEEN 0 AND %(end)s
            ORDER BY position DESC OFFSET {size} - 1 LIMIT 1),
        0)"""
_START_OF_MESSAGES = """coalesce(
        (SELECT position FROM {{messages}} WHERE history_key = %(key)s AND role <> 'tool' AND position <=
            (SELECT position FROM {{messages}} WHERE history_key = %(key)s AND position BETWEEN 0 AND %(end)s
                ORDER BY position DESC OFFSET {size} - 1 LIMIT 1)
            ORDER BY position DESC LIMIT 1),
        0)"""
# The window's size: only with a step does it depend on how long the history is.
_SIZE = "%(count)s::bigint"
_SIZE_BY_STEP = """(SELECT %(count)s::bigint + mod(greatest({total} - %(count)s::bigint, 0), %(step)s::bigint)
            FROM {{histories}} WHERE history_key = %(key)s)"""

_READ_ALL = _READ.format(start="0", size="0")
_READ_ROUNDS, _READ_ROUNDS_BY_STEP, _READ_MESSAGES, _READ_MESSAGES_BY_STEP = (
    _READ.format(start=start.format(size=size), size=size)
    for start, total in ((_START_OF_ROUNDS, "round_count"), (_START_OF_MESSAGES, "message_count"))
    for size in (_SIZE, _SIZE_BY_STEP.format(total=total))
)
_NEXT_HISTORIES = """
    SELECT chat_history_id, history_key, message_count FROM {histories}
    WHERE namespace = %s AND chat_history_id COLLATE "C" > %s ORDER BY chat_history_id COLLATE "C" LIMIT %s
"""
# The row of the history first: who has deleted it holds its lock, and no writer slips in before its messages go.
_DELETE_HISTORIES = "DELETE FROM {histories} WHERE history_key = ANY (%s) RETURNING history_key"
_DELETE_MESSAGES = "DELETE FROM {messages} WHERE history_key = ANY (%s)"

# ------------------------------------------------------------------ changing messages

_LOCK_HISTORY = """
    SELECT next_position, message_count FROM {histories} WHERE history_key = %s FOR UPDATE
"""
_MAKE_HISTORY = """
    INSERT INTO {histories} (history_key, namespace, chat_history_id, next_position, message_count, round_count)
    VALUES (%s, %s, %s, 0, 0, 0) ON CONFLICT (history_key) DO NOTHING
"""
_OVERWRITE = """
    UPDATE {messages} AS m SET role = sent.role, content = sent.content::json, search_terms = sent.terms::tsvector
    FROM {sent_with_numbers} WHERE history_key = %(key)s AND position = number
"""
_DELETE_SOME = """
    WITH gone AS (DELETE FROM {{messages}} WHERE history_key = %(key)s AND {which} RETURNING role),
        counted AS (SELECT count(*) AS messages, count(*) FILTER (WHERE role = 'user') AS rounds FROM gone)
    UPDATE {{histories}} SET
        message_count = message_count - messages,
        round_count = round_count - rounds,
        updated_at = {{now}}
    FROM counted WHERE history_key = %(key)s AND messages > 0
"""
_DELETE_BY_ID, _DELETE_FROM, _DELETE_BY_POSITION = (
    _DELETE_SOME.format(which=which)
    for which in ("message_id = ANY (%(ids)s)", "position BETWEEN %(start)s AND %(end)s", "position = ANY (%(places)s)")
)
_POSITION_OF = "SELECT position FROM {messages} WHERE history_key = %s AND message_id = %s"
_COPY = """
    WITH copied AS (
        INSERT INTO {messages} (history_key, position, created_at, message_id, role, content, search_terms)
        SELECT %(target)s, %(start)s + row_number() OVER (ORDER BY position) - 1,
            created_at, message_id, role, content, search_terms
        FROM {messages} WHERE history_key = %(source)s AND position BETWEEN 0 AND %(end)s
        RETURNING role
    ), counted AS (SELECT count(*) AS messages, count(*) FILTER (WHERE role = 'user') AS rounds FROM copied)
    UPDATE {histories} SET
        next_position = next_position + messages,
        message_count = message_count + messages,
        round_count = round_count + rounds,
        updated_at = {now}
    FROM counted WHERE history_key = %(target)s RETURNING messages
"""
_IMPORT_HISTORY = """
    UPDATE {histories} SET created_at = {created_at}, updated_at = {updated_at},
        title = %(title)s, meta = %(meta)s::json
    WHERE history_key = %(key)s
"""
_IMPORT = """
    INSERT INTO {messages} (history_key, position, created_at, message_id, role, content, search_terms)
    SELECT %(key)s, %(start)s + place - 1, {time_sent}, message_id, role, content::json, terms::tsvector
    FROM {sent_with_numbers}
"""
_IMPORTED = """
    UPDATE {histories} SET
        next_position = next_position + %(count)s,
        message_count = message_count + %(count)s,
        round_count = round_count + %(rounds)s,
        updated_at = greatest(updated_at, {updated_at})
    WHERE history_key = %(key)s
"""

# ------------------------------------------------------------------ the directory

_HISTORY = "SELECT {history_row} FROM {histories} WHERE history_key = %s"
_HISTORIES = """
    SELECT {history_row} FROM {histories} WHERE {with_prefix} AND {further} {newest_first} LIMIT %(limit)s
"""
# Those among the next so many of the namespace.
_HISTORIES_NEAR = """
    SELECT {history_row} FROM (
        SELECT * FROM {histories} WHERE namespace = %(namespace)s AND {further} {newest_first} LIMIT %(near)s
    ) AS near
    WHERE {with_prefix} {newest_first} LIMIT %(limit)s
"""
# The fence keeps the planner from walking along the times all the same.
_HISTORIES_OF_FEW = """
    WITH few AS MATERIALIZED (SELECT * FROM {histories} WHERE {with_prefix} ORDER BY {by_id})
    SELECT {history_row} FROM few WHERE {further} {newest_first} LIMIT %(limit)s
"""
# Whether more than a few have the prefix, and whether more follow than are near.
_HAVE_MORE = """
    SELECT
        (SELECT true FROM {histories} WHERE {with_prefix} ORDER BY {by_id} OFFSET %(few)s LIMIT 1),
        (SELECT true FROM {histories} WHERE namespace = %(namespace)s AND {further}
            {newest_first} OFFSET %(near)s LIMIT 1)
"""
_HISTORIES_BY_ID = """
    SELECT {history_row} FROM {histories} WHERE {with_prefix} AND {by_id} > %(after)s
    ORDER BY {by_id} LIMIT %(limit)s
"""
_UPDATE_HISTORY = """
    UPDATE {histories} SET
        title = CASE WHEN %(has_title)s THEN %(title)s ELSE title END,
        meta = CASE WHEN %(has_meta)s THEN %(meta)s::json ELSE meta END
    WHERE history_key = %(key)s RETURNING {history_row}
"""
_ERASABLE = """
    SELECT chat_history_id, history_key, message_count FROM {{histories}}
    WHERE {{with_prefix}} AND {before} ORDER BY {order} LIMIT %(limit)s
"""
_ERASABLE_BY_PREFIX = _ERASABLE.format(before="true", order="{by_id}")
_ERASABLE_BY_AGE = _ERASABLE.format(before="updated_at < {updated_before}", order="updated_at, {by_id}")
_DELETE_OLD_HISTORIES = """
    DELETE FROM {histories} WHERE history_key = ANY (%(keys)s) AND updated_at < {updated_before}
    RETURNING history_key
"""
_TOTALS = """
    SELECT count(*), coalesce(sum(message_count), 0)::bigint, coalesce(sum(round_count), 0)::bigint
    FROM {histories} WHERE {with_prefix}
"""
_PER_DAY = """
    SELECT extract(epoch FROM day)::bigint / 86400, count(*) FROM (
        SELECT date_trunc('day', time AT TIME ZONE 'UTC') AS day
        FROM {messages} JOIN (SELECT history_key FROM {histories} WHERE {with_prefix}) AS h USING (history_key)
        CROSS JOIN LATERAL (SELECT CASE WHEN {created_at_is_readable} THEN created_at ELSE 'epoch' END) AS shown (time)
    ) AS days GROUP BY day ORDER BY day
"""
_SIZE_ON_DISK = """
    SELECT sum(pg_total_relation_size(part))::bigint
    FROM unnest(ARRAY[{histories_name}, {messages_name}]::regclass[]) AS whole
    CROSS JOIN LATERAL (
        SELECT whole AS part UNION SELECT relid FROM pg_partition_tree(whole)
    ) AS parts
"""

# ------------------------------------------------------------------ reading

_PAGE_BEFORE = """
    SELECT {message_row} FROM {messages} WHERE history_key = %s AND position < %s ORDER BY position DESC LIMIT %s
"""
_PAGE_AFTER = """
    SELECT {message_row} FROM {messages} WHERE history_key = %s AND position > %s ORDER BY position LIMIT %s
"""

# ------------------------------------------------------------------ search

# What is searched, if these are few histories. They are all that is looked at beyond so many messages that match.
_FEW_HISTORIES = """
    SELECT CASE WHEN count(*) <= %(few)s THEN coalesce(array_agg(history_key), '{{}}') END,
        coalesce(sum(message_count), 0)::bigint
    FROM (
        SELECT history_key, message_count FROM {histories} WHERE {with_prefix} ORDER BY {by_id} LIMIT %(few)s + 1
    ) AS few
"""
# The fence has the planner look along the index for all, of which the server then takes only as many as are asked for.
_MORE_MATCH = """
    WITH matching AS MATERIALIZED (
        SELECT FROM {messages} WHERE search_terms @@ %(query)s::tsquery AND search_terms IS NOT NULL
    )
    SELECT FROM matching OFFSET %(messages)s LIMIT 1
"""
# Fenced off from each other: what matches, which the planner would not look for along its index otherwise, since that
# is discouraged on the store's connections; and the histories, each looked up by its key, for the planner would rather
# begin with all that have the prefix. They are looked up in the order of the scores until there are enough hits.
_SEARCH = """
    WITH found AS MATERIALIZED (
        SELECT history_key, position, ts_rank(search_terms, %(query)s::tsquery) AS score FROM {searched}
        WHERE search_terms @@ %(query)s::tsquery AND search_terms IS NOT NULL
    ), best AS MATERIALIZED (
        SELECT chat_history_id, history_key, position, score
        FROM (SELECT * FROM found {restrict} ORDER BY score DESC, position DESC) AS ranked
        CROSS JOIN LATERAL (
            SELECT chat_history_id FROM {{histories}} AS h
            WHERE h.history_key = ranked.history_key AND {{with_prefix}} OFFSET 0
        ) AS histories
        LIMIT %(limit)s
    )
    SELECT chat_history_id, position, message_id, content, score
    FROM best JOIN {{messages}} USING (history_key, position) ORDER BY score DESC, position DESC
"""
# In an order: else a planner that expects many might look through the table itself for the first.
_AN_UNINDEXED = "SELECT FROM {messages} WHERE search_terms IS NULL ORDER BY history_key, position LIMIT 1"
_UNINDEXED = """
    SELECT history_key, position, pg_column_size(content) FROM {messages}
    WHERE (history_key, position) > (%s, %s) AND search_terms IS NULL ORDER BY history_key, position LIMIT %s
"""
_UNINDEXED_CONTENTS = """
    SELECT history_key, position, content FROM {messages}
    WHERE (history_key, position) > (%s, %s) AND (history_key, position) <= (%s, %s) AND search_terms IS NULL
    ORDER BY history_key, position FOR UPDATE
"""
_SET_TERMS = """
    UPDATE {messages} AS m SET search_terms = sent.terms::tsvector
    FROM unnest(%s::uuid[], %s::bigint[], string_to_array(%s, E'\n')) AS sent (history_key, position, terms)
    WHERE m.history_key = sent.history_key AND m.position = sent.position
"""

# ------------------------------------------------------------------ checking

_MISCOUNTED = """
    SELECT h.history_key, chat_history_id, next_position, message_count, round_count,
        messages, rounds, coalesce(last, -1)
    FROM {histories} AS h CROSS JOIN LATERAL (
        SELECT count(*) AS messages, count(*) FILTER (WHERE role = 'user') AS rounds, max(position) AS last
        FROM {messages} AS m WHERE m.history_key = h.history_key
    ) AS counted
    WHERE namespace = %s
        AND (message_count <> messages OR round_count <> rounds OR next_position <= coalesce(last, -1))
    ORDER BY chat_history_id COLLATE "C"
"""
_RECOUNT = """
    UPDATE {histories} SET message_count = messages, round_count = rounds,
        next_position = greatest(next_position, last + 1)
    FROM (
        SELECT count(*) AS messages, count(*) FILTER (WHERE role = 'user') AS rounds, max(position) AS last
        FROM {messages} WHERE history_key = %(key)s
    ) AS counted
    WHERE history_key = %(key)s
"""
_ORPHANS = """
    SELECT history_key, count(*) FROM {messages} AS m
    WHERE NOT EXISTS (SELECT FROM {histories} AS h WHERE h.history_key = m.history_key)
    GROUP BY history_key ORDER BY history_key
"""
_KEYS = """
    SELECT chat_history_id, history_key FROM {histories}
    WHERE namespace = %s AND ({by_id}, history_key) > (%s, %s) ORDER BY {by_id}, history_key LIMIT %s
"""
_ROWS = """
    SELECT m.history_key, position, content, chat_history_id
    FROM {messages} AS m JOIN {histories} AS h USING (history_key)
    WHERE namespace = %s AND (m.history_key, position) > (%s, %s)
    ORDER BY m.history_key, position LIMIT %s
"""
_MISMATCHED = """
    SELECT place FROM {messages} AS m
    JOIN unnest(%s::uuid[], %s::bigint[], %s::text[]) WITH ORDINALITY AS sent (history_key, position, terms, place)
        ON m.history_key = sent.history_key AND m.position = sent.position
    WHERE search_terms <> terms::tsvector ORDER BY place
"""
_FORGET_TERMS = """
    UPDATE {messages} SET search_terms = NULL WHERE history_key = %s AND position = %s
"""
_UNREADABLE_TIMES = """
    SELECT history_key, chat_history_id FROM {histories}
    WHERE namespace = %s AND NOT ({created_at_is_readable} AND {updated_at_is_readable}) ORDER BY {by_id}
"""


class Statements(NamedTuple):
    """
    The statements of a store, with the names of its tables in them.
    """

    version: str = "SELECT max(version) FROM {version}"
    append_all: str = _APPEND_ALL
    append_rest: str = _APPEND_REST
    known_ids: str = _KNOWN_IDS
    message_count: str = _COUNT
    read_all: str = _READ_ALL
    read_rounds: str = _READ_ROUNDS
    read_rounds_by_step: str = _READ_ROUNDS_BY_STEP
    read_messages: str = _READ_MESSAGES
    read_messages_by_step: str = _READ_MESSAGES_BY_STEP
    next_histories: str = _NEXT_HISTORIES
    delete_histories: str = _DELETE_HISTORIES
    delete_messages: str = _DELETE_MESSAGES

    lock_history: str = _LOCK_HISTORY
    make_history: str = _MAKE_HISTORY
    overwrite: str = _OVERWRITE
    delete_by_id: str = _DELETE_BY_ID
    delete_from: str = _DELETE_FROM
    delete_by_position: str = _DELETE_BY_POSITION
    position_of: str = _POSITION_OF
    copy_messages: str = _COPY
    import_history: str = _IMPORT_HISTORY
    import_messages: str = _IMPORT
    imported: str = _IMPORTED

    history: str = _HISTORY
    histories: str = _HISTORIES
    histories_near: str = _HISTORIES_NEAR
    histories_of_few: str = _HISTORIES_OF_FEW
    have_more: str = _HAVE_MORE
    histories_by_id: str = _HISTORIES_BY_ID
    update_history: str = _UPDATE_HISTORY
    erasable_by_prefix: str = _ERASABLE_BY_PREFIX
    erasable_by_age: str = _ERASABLE_BY_AGE
    delete_old_histories: str = _DELETE_OLD_HISTORIES

    page_before: str = _PAGE_BEFORE
    page_after: str = _PAGE_AFTER

    few_histories: str = _FEW_HISTORIES
    more_match: str = _MORE_MATCH
    search: str = _SEARCH.format(searched="{messages}", restrict="")
    search_for_few: str = _SEARCH.format(
        searched="{messages}", restrict="WHERE history_key IN (SELECT unnest(%(keys)s::uuid[]))"
    )
    search_few: str = _SEARCH.format(
        searched="(SELECT * FROM {messages} WHERE history_key = ANY (%(keys)s) OFFSET 0) AS of_few", restrict=""
    )
    an_unindexed: str = _AN_UNINDEXED
    unindexed: str = _UNINDEXED
    unindexed_contents: str = _UNINDEXED_CONTENTS
    set_terms: str = _SET_TERMS

    vacuum_messages: str = "VACUUM (FULL) {messages}"
    vacuum_histories: str = "VACUUM (FULL) {histories}"
    totals: str = _TOTALS
    per_day: str = _PER_DAY
    size_on_disk: str = _SIZE_ON_DISK
    miscounted: str = _MISCOUNTED
    recount: str = _RECOUNT
    orphans: str = _ORPHANS
    keys: str = _KEYS
    rows: str = _ROWS
    mismatched: str = _MISMATCHED
    forget_terms: str = _FORGET_TERMS
    unreadable_times: str = _UNREADABLE_TIMES
