# SPDX-License-Identifier: Apache-2.0
"""What the SQL statements of the operations have in common. Each statement stands beside its use."""

from typing import Any

from haystack_chat_store.stores.rows import Scope, end_of_prefix

# The transaction sees what others commit while it waits for a lock, whatever the database's default is.
BEGIN = "BEGIN ISOLATION LEVEL READ COMMITTED"
# If the answer to COMMIT is lost, the transaction's number finds out whether it was committed. PostgreSQL 12 does not
# have the newer names of these functions.
BEGIN_AND_NUMBER = f"{BEGIN}; SELECT txid_current()"
_START, _RESET = "pg_postmaster_start_time()", "pg_stat_get_bgwriter_stat_reset_time()"
#: What no two servers share, and no crash leaves as they were: with it, the server's statistics begin anew.
SERVER_RUN = f"SELECT extract(epoch FROM {_START})::text, extract(epoch FROM {_RESET})::text"
STATUS_OF_TRANSACTION = "SELECT txid_status(%s)"
# For operations that read with several statements, as of one moment.
BEGIN_READING = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
# Connections switch sequential scans off (`_KEEP_TO_INDEXES`). Operations that read most of a table switch them on.
READ_WHOLE_TABLES = "SET LOCAL enable_seqscan = on"
#: Greater than all ids, which have 512 characters at most.
AFTER_ALL_IDS = "\U0010ffff" * 513

#: Later than all times, in microseconds since 1970.
AFTER_ALL_TIMES = 2**62
# The first timestamp of PostgreSQL, in 4713 BC, in microseconds since 1970.
_EARLIEST_TIME = -210_866_803_200_000_000


class Statement(str):
    """
    An SQL statement that has the names of tables and of `FRAGMENTS` in braces. A session fills them in.
    """

    __slots__ = ()


def prefix_parameters(scope: Scope, prefix: str) -> dict[str, Any]:
    """Return the parameters of the fragment `with_prefix`."""
    end = end_of_prefix(prefix) or AFTER_ALL_IDS
    return {
        "namespace": scope.namespace,
        "user": scope.user_id,
        "prefix": prefix,
        "end": end,
        "with_branches": scope.with_branches,
    }


def _microseconds_sql(column: str) -> str:
    """
    Return the SQL expression that makes microseconds since 1970 of a timestamp.

    Before PostgreSQL 14, extract() returns numbers that are exact only if they are whole and not too large.
    """
    return (
        f"extract(epoch FROM date_trunc('second', {column}))::bigint * 1000000"
        f" + mod(extract(microseconds FROM {column})::bigint, 1000000)"
    )


def _timestamp_sql(microseconds: str) -> str:
    """
    Return the SQL expression that makes a timestamp of microseconds since 1970.

    An interval is multiplied in floating point, which is exact for whole hours of any year.

    :param microseconds: An SQL expression of the type `bigint`.
    """
    return (
        f"('epoch'::timestamptz + {microseconds} / 3600000000 * interval '1 hour'"
        f" + mod({microseconds}, 3600000000) * interval '1 microsecond')"
    )


def _is_readable_sql(timestamp: str) -> str:
    """Return the SQL expression for whether Python's `datetime` can hold a timestamp."""
    return f"{timestamp} BETWEEN '0001-01-01 00:00:00+00' AND '9999-12-31 23:59:59.999999+00'"


# The histories of the scope: of its user, unless it has none, and not those that have expired.
_OF_USER = "(%(user)s::text IS NULL OR user_id = %(user)s)"
_HAS_EXPIRED = "coalesce(expires_at <= statement_timestamp(), false)"
# The planner knows from its statistics that this excludes few.
_IS_ALIVE = "(expires_at IS NULL OR expires_at > statement_timestamp())"
_VISIBLE = f"{_OF_USER} AND {_IS_ALIVE}"

_BY_ID = 'chat_history_id COLLATE "C"'
_IS_SEEN = "(%(with_branches)s OR branch_of IS NULL)"
_CURSOR = "%(updated_at)s::bigint"
_UPDATED_AT_OF_CURSOR = (
    f"CASE WHEN {_CURSOR} = {AFTER_ALL_TIMES} THEN 'infinity' WHEN {_CURSOR} < {_EARLIEST_TIME} THEN '-infinity'"
    f" ELSE {_timestamp_sql(_CURSOR)} END"
)

# Messages are sent as joined texts, because psycopg takes as long for three arrays as for all the rest. Contents are
# JSON, which needs no line breaks, and terms have none.
_SENT = """
    ROWS FROM (
        json_array_elements_text(%(message_ids)s::json),
        unnest(
            string_to_array(%(roles)s, ' '),
            string_to_array(%(contents)s, E'\n'),
            string_to_array(%(terms)s, E'\n'){numbers}
        )
    ) WITH ORDINALITY AS sent (message_id, role, content, terms, {names}place)
"""

#: What statements have in common, under the names by which they include it.
FRAGMENTS = {
    "history_row": (
        f"chat_history_id, {_microseconds_sql('created_at')}, {_microseconds_sql('updated_at')}, message_count, "
        f"round_count, title, meta, revision, user_id, preview, last_role, last_text, {_microseconds_sql('last_at')}"
    ),
    "message_row": f"position, {_microseconds_sql('created_at')}, message_id, role, content",
    "message_time": _microseconds_sql("created_at"),
    "by_id": _BY_ID,
    "with_prefix": (
        f"namespace = %(namespace)s AND {_BY_ID} >= %(prefix)s AND {_BY_ID} < %(end)s AND {_VISIBLE} AND {_IS_SEEN}"
    ),
    "is_seen": _IS_SEEN,
    "visible": _VISIBLE,
    "of_user": _OF_USER,
    "has_expired": _HAS_EXPIRED,
    "is_alive": _IS_ALIVE,
    # Of messages that are appended: the first question stays, and the last message is another one.
    "count_previews": """
            preview = coalesce(preview, %(preview)s),
            last_role = coalesce(%(last_role)s, last_role),
            last_text = CASE WHEN %(last_role)s::text IS NULL THEN last_text ELSE %(last_text)s END""".strip(),
    "expires_at": "statement_timestamp() + %(lifetime)s::bigint * interval '1 microsecond'",
    "further": f"(updated_at, {_BY_ID}) < ({_UPDATED_AT_OF_CURSOR}, %(id)s)",
    "newest_first": f"ORDER BY updated_at DESC, {_BY_ID} DESC",
    "created_at": _timestamp_sql("%(created_at)s::bigint"),
    "updated_at": _timestamp_sql("%(updated_at)s::bigint"),
    "updated_before": _timestamp_sql("%(updated_before)s::bigint"),
    "time_sent": _timestamp_sql("number"),
    "last_at": _timestamp_sql("%(last_at)s::bigint"),
    # For statements whose transaction holds the history's lock. After a failover, the server's clock may be behind.
    "now": "greatest(updated_at, statement_timestamp())",
    "created_at_is_readable": _is_readable_sql("created_at"),
    "updated_at_is_readable": _is_readable_sql("updated_at"),
    "sent": _SENT.format(numbers="", names=""),
    "sent_with_numbers": _SENT.format(numbers=", string_to_array(%(numbers)s, ' ')::bigint[]", names="number, "),
}

#: Whether messages belong to a history of the scope, under the name `is_visible`.
IS_VISIBLE = f"EXISTS (SELECT FROM {{histories}} WHERE history_key = %(key)s AND {_VISIBLE})"

#: The first revision of a history that begins now, under the name `first_revision`.
FIRST_REVISION = "coalesce((SELECT deleted_revision FROM {namespaces} WHERE namespace = %(namespace)s), 0) + 1"
