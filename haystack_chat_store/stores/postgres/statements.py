# SPDX-License-Identifier: Apache-2.0
"""The SQL statements of all operations."""

from typing import Any, NamedTuple

from haystack_chat_store.stores.rows import Scope, end_of_prefix

# The transaction sees what others commit while it waits for a lock, whatever the database's default is.
BEGIN = "BEGIN ISOLATION LEVEL READ COMMITTED"
# If the answer to COMMIT is lost, the transaction's number finds out whether it was committed. PostgreSQL 12 does not
# have the newer names of these functions.
BEGIN_AND_NUMBER = f"{BEGIN}; SELECT txid_current()"
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
    # Messages are sent as joined texts, because psycopg takes as long for three arrays as for all the rest. Contents
    # are JSON, which needs no line breaks, and terms have none.
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

#: Whether messages belong to a history of the scope, under the name `is_visible`.
IS_VISIBLE = f"EXISTS (SELECT FROM {{histories}} WHERE history_key = %(key)s AND {_VISIBLE})"

#: The first revision of a history that begins now, under the name `first_revision`.
FIRST_REVISION = "coalesce((SELECT deleted_revision FROM {namespaces} WHERE namespace = %(namespace)s), 0) + 1"

# The history's row is the lock that gives out positions. A writer holds it until its messages are committed. A history
# that this transaction has made has revision 0. Its first revision is looked up by a later statement than the one that
# has made it: that statement may have begun before another history with this id was deleted. The last message has the
# time that the history keeps of it.
_APPEND = """
    WITH history AS (
        UPDATE {{histories}} SET
            next_position = next_position + %(count)s,
            message_count = message_count + %(count)s,
            round_count = round_count + %(rounds)s,
            revision = {revision},
            expires_at = {{expires_at}},
            {{count_previews}},
            last_at = CASE WHEN %(last_role)s::text IS NULL THEN last_at
                ELSE greatest(last_at, statement_timestamp()) END,
            updated_at = {{now}}
        WHERE history_key = %(key)s {condition} RETURNING next_position - %(count)s AS start, revision, last_at
    )
    INSERT INTO {{messages}} (history_key, position, message_id, role, content, search_terms, revision, created_at)
    SELECT %(key)s, start + place - 1, message_id, role, content::json, terms::tsvector, revision,
        CASE WHEN %(last_role)s::text IS NULL THEN statement_timestamp() ELSE last_at END
    FROM history, {{sent}}
"""
_APPEND_ALL = _APPEND.format(revision="revision + 1", condition="AND {visible}")
# The transaction that has locked the history has looked at its user and its expiry.
_APPEND_FIRST = _APPEND.format(revision="{first_revision}", condition="")
_APPEND_LOCKED = _APPEND.format(revision="%(revision)s", condition="")
# Appends the rest of a batch, if the history is unchanged since it was found to have the other messages.
_APPEND_REST = _APPEND.format(revision="revision + 1", condition="AND xmin = %(version)s::xid AND {visible}")

# Both bounds are subqueries, even where they exclude nothing. The planner takes a range between two bounds that it does
# not know for 0.5 % of the rows. So it walks along the primary key, instead of sorting, or reading the whole table,
# however much of the table the history is.
_READ = """
    SELECT content, {size},
        (SELECT revision FROM {{histories}} WHERE history_key = %(key)s),
        (SELECT round_count FROM {{histories}} WHERE history_key = %(key)s)
    FROM {{messages}}
    WHERE history_key = %(key)s AND position BETWEEN {start} AND (SELECT %(end)s::bigint) AND {{is_visible}}
    ORDER BY position
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
# The window's size. With a step, it depends on the length of the history.
_SIZE = "%(count)s::bigint"
_SIZE_BY_STEP = """(SELECT %(count)s::bigint + mod(greatest({total} - %(count)s::bigint, 0), %(step)s::bigint)
            FROM {{histories}} WHERE history_key = %(key)s)"""

_READ_ALL = _READ.format(start="(SELECT 0::bigint)", size="0")
_READ_ROUNDS, _READ_ROUNDS_BY_STEP, _READ_MESSAGES, _READ_MESSAGES_BY_STEP = (
    _READ.format(start=start.format(size=size), size=size)
    for start, total in ((_START_OF_ROUNDS, "round_count"), (_START_OF_MESSAGES, "message_count"))
    for size in (_SIZE, _SIZE_BY_STEP.format(total=total))
)

# ------------------------------------------------------------------ changing messages

_DELETE_SOME = """
    WITH gone AS (DELETE FROM {{messages}} WHERE history_key = %(key)s AND {which} RETURNING role),
        counted AS (SELECT count(*) AS messages, count(*) FILTER (WHERE role = 'user') AS rounds FROM gone)
    UPDATE {{histories}} SET
        message_count = message_count - messages,
        round_count = round_count - rounds,
        revision = %(revision)s,
        updated_at = {{now}}
    FROM counted WHERE history_key = %(key)s AND messages > 0
"""
_DELETE_BY_ID, _DELETE_FROM, _DELETE_BY_POSITION = (
    _DELETE_SOME.format(which=which)
    for which in ("message_id = ANY (%(ids)s)", "position BETWEEN %(start)s AND %(end)s", "position = ANY (%(places)s)")
)

# ------------------------------------------------------------------ the directory

# Those of a user, or that have expired, are found by indexes of their own, and others by that of ids or of times.
_ERASABLE = """
    SELECT chat_history_id, history_key, message_count FROM {{histories}}
    WHERE namespace = %(namespace)s AND {which} ORDER BY {order} LIMIT %(limit)s
"""
_IN_RANGE = "{by_id} >= %(prefix)s AND {by_id} < %(end)s"
_STARTS = "starts_with(chat_history_id, %(prefix)s)"
_ERASABLE_BY_PREFIX = _ERASABLE.format(which=_IN_RANGE, order="{by_id}")
_ERASABLE_BY_AGE = _ERASABLE.format(
    which=f"{_IN_RANGE} AND updated_at < {{updated_before}}", order="updated_at, {by_id}"
)
_ERASABLE_OF_USER = _ERASABLE.format(
    which=f"user_id = %(user)s AND {_STARTS}"
    " AND (%(updated_before)s::bigint IS NULL OR updated_at < {updated_before})",
    order="updated_at, {by_id}",
)
_ERASABLE_EXPIRED = _ERASABLE.format(
    which=f"expires_at <= statement_timestamp() AND {_STARTS} AND {{of_user}}", order="expires_at"
)

# The namespace keeps the greatest revision. Its row is written, and locked, only if that grows.
_DELETE_HISTORIES = """
    WITH gone AS (
        DELETE FROM {{histories}} WHERE history_key = ANY (%(keys)s) AND {before}
        RETURNING history_key, namespace, revision, user_id, {{has_expired}} AS has_expired
    ), kept AS (
        INSERT INTO {{namespaces}} AS n (namespace, deleted_revision)
        SELECT namespace, greatest_revision
        FROM (SELECT namespace, max(revision) AS greatest_revision FROM gone GROUP BY namespace) AS greatest
        WHERE NOT EXISTS (
            SELECT FROM {{namespaces}} AS k
            WHERE k.namespace = greatest.namespace AND deleted_revision >= greatest_revision
        )
        ON CONFLICT (namespace) DO UPDATE SET deleted_revision = greatest(n.deleted_revision, excluded.deleted_revision)
    )
    SELECT history_key, revision, user_id, has_expired FROM gone
"""

# ------------------------------------------------------------------ search

# Histories are looked up in the order of the scores, until there are enough hits. A score depends on the message alone,
# and so does the order of equal ones: neither tells what others have.
_SEARCH = """
    SELECT chat_history_id, position, message_id, role, {{message_time}}, content, score FROM (
        SELECT chat_history_id, history_key, position, score FROM (
            SELECT history_key, position, ts_rank(search_terms, %(query)s::tsquery) AS score FROM {searched}
            WHERE search_terms @@ %(query)s::tsquery AND search_terms IS NOT NULL {restrict}
            ORDER BY score DESC, position DESC, history_key
        ) AS found
        JOIN {{histories}} USING (history_key)
        WHERE {{with_prefix}} ORDER BY score DESC, position DESC, history_key LIMIT %(limit)s
    ) AS best
    JOIN {{messages}} USING (history_key, position) ORDER BY score DESC, position DESC, history_key
"""
# The planner does not know how common a word is. OFFSET 0 keeps it from the index of terms, which has the messages of
# all histories.
_OF_FEW_HISTORIES = "(SELECT * FROM {messages} WHERE history_key = ANY (%(keys)s) OFFSET 0) AS of_few"


class Statements(NamedTuple):
    """The statements of a store, with the names of its tables in them."""

    version: str = "SELECT max(version) FROM {version}"
    append_all: str = _APPEND_ALL
    append_first: str = _APPEND_FIRST
    append_locked: str = _APPEND_LOCKED
    append_rest: str = _APPEND_REST
    known_ids: str = """
        SELECT message_id, position, role, h.xmin::text, {visible}
        FROM {messages} JOIN {histories} AS h USING (history_key)
        WHERE history_key = %(key)s AND message_id = ANY (%(ids)s)
    """
    revision: str = "SELECT revision, round_count FROM {histories} WHERE history_key = %(key)s AND {visible}"
    message_count: str = "SELECT message_count FROM {histories} WHERE history_key = %(key)s AND {visible}"
    read_all: str = _READ_ALL
    read_rounds: str = _READ_ROUNDS
    read_rounds_by_step: str = _READ_ROUNDS_BY_STEP
    read_messages: str = _READ_MESSAGES
    read_messages_by_step: str = _READ_MESSAGES_BY_STEP
    next_histories: str = """
        SELECT chat_history_id, history_key, message_count FROM {histories}
        WHERE namespace = %s AND chat_history_id COLLATE "C" > %s ORDER BY chat_history_id COLLATE "C" LIMIT %s
    """
    # The history's row goes first: its lock keeps writers out until the messages are deleted, too.
    delete_histories: str = _DELETE_HISTORIES.format(before="{of_user}")
    delete_messages: str = "DELETE FROM {messages} WHERE history_key = ANY (%s)"
    # Those of a history that is there are its user's. Otherwise all of the scope are asked for.
    branches: str = """
        SELECT chat_history_id, history_key, user_id FROM {histories}
        WHERE namespace = %(namespace)s AND branch_of = ANY (%(ids)s)
            AND CASE WHEN %(is_there)s THEN user_id IS NOT DISTINCT FROM %(owner)s ELSE {of_user} END
    """
    hand_over_branches: str = """
        UPDATE {histories} SET user_id = %(new_owner)s
        WHERE namespace = %(namespace)s AND branch_of = ANY (%(ids)s) AND user_id IS NOT DISTINCT FROM %(owner)s
        RETURNING chat_history_id
    """

    lock_key: str = "SELECT FROM {histories} WHERE history_key = %s FOR UPDATE"
    # A history that this transaction has made has revision 0 until its first change.
    lock_history: str = """
        SELECT next_position, message_count, revision,
            CASE WHEN revision = 0 THEN {first_revision} ELSE revision + 1 END, user_id, {has_expired}
        FROM {histories} WHERE history_key = %(key)s FOR UPDATE
    """
    make_history: str = """
        INSERT INTO {histories}
            (history_key, namespace, chat_history_id, next_position, message_count, round_count, revision, user_id,
            expires_at)
        VALUES (%(key)s, %(namespace)s, %(id)s, 0, 0, 0, 0, %(user)s, {expires_at}) ON CONFLICT (history_key) DO NOTHING
    """
    begin_history: str = """
        UPDATE {histories} SET
            title = %(title)s, title_terms = %(title_terms)s::tsvector, meta = %(meta)s::json,
            branch_of = %(branch_of)s, revision = %(revision)s
        WHERE history_key = %(key)s
    """
    meta: str = "SELECT meta FROM {histories} WHERE history_key = %s"
    renew: str = """
        UPDATE {histories} SET expires_at = {expires_at}
        WHERE history_key = %(key)s AND {visible} AND expires_at IS NOT NULL
    """
    # The old row keeps its revision for the namespace when it is deleted.
    take_over_history: str = """
        UPDATE {histories} AS h SET next_position = old.next_position, message_count = old.message_count,
            round_count = old.round_count, revision = greatest({first_revision}, old.revision + 1),
            created_at = old.created_at, updated_at = old.updated_at,
            title = old.title, title_terms = old.title_terms, meta = %(meta)s::json,
            user_id = old.user_id, expires_at = old.expires_at, branch_of = %(branch_of)s, preview = old.preview,
            last_role = old.last_role, last_text = old.last_text, last_at = old.last_at, summary = old.summary
        FROM {histories} AS old WHERE h.history_key = %(key)s AND old.history_key = %(old_key)s
    """
    take_over_messages: str = """
        INSERT INTO {messages} (history_key, position, created_at, message_id, role, content, search_terms, revision,
            question_id)
        SELECT %(key)s, position, created_at, message_id, role, content, search_terms, revision, question_id
        FROM {messages} WHERE history_key = %(old_key)s
    """
    message: str = "SELECT {message_row} FROM {messages} WHERE history_key = %s AND position = %s"
    set_content: str = """
        WITH history AS (UPDATE {histories} SET revision = %(revision)s WHERE history_key = %(key)s)
        UPDATE {messages} SET content = %(content)s::json, revision = %(revision)s
        WHERE history_key = %(key)s AND position = %(position)s
    """
    next_questions: str = """
        SELECT position, content FROM {messages} WHERE history_key = %s AND role = 'user' AND position > %s
        ORDER BY position LIMIT 10
    """
    last_message: str = """
        SELECT position, role, content FROM {messages} WHERE history_key = %s AND role <> 'system' AND position >= 0
        ORDER BY position DESC LIMIT 1
    """
    set_previews: str = """
        UPDATE {histories} SET preview = %(preview)s, last_role = %(last_role)s, last_text = %(last_text)s,
            last_at = (SELECT created_at FROM {messages} WHERE history_key = %(key)s AND position = %(position)s)
        WHERE history_key = %(key)s
    """
    # The messages that are stored as they are sent.
    equal: str = """
        SELECT m.message_id FROM {messages} AS m JOIN {sent} USING (message_id)
        WHERE history_key = %(key)s AND m.role = sent.role AND m.content::text = sent.content
    """
    count_from: str = "SELECT count(*) FROM {messages} WHERE history_key = %s AND position >= %s"
    overwrite: str = """
        UPDATE {messages} AS m SET role = sent.role, content = sent.content::json, search_terms = sent.terms::tsvector,
            revision = %(revision)s
        FROM {sent_with_numbers} WHERE history_key = %(key)s AND position = number
    """
    delete_by_id: str = _DELETE_BY_ID
    delete_from: str = _DELETE_FROM
    delete_by_position: str = _DELETE_BY_POSITION
    position_of: str = "SELECT position FROM {messages} WHERE history_key = %s AND message_id = %s"
    position_to_read: str = """
        SELECT position FROM {messages} WHERE history_key = %(key)s AND message_id = %(message_id)s AND {is_visible}
    """
    copy_messages: str = """
        WITH copied AS (
            INSERT INTO {messages}
                (history_key, position, created_at, message_id, role, content, search_terms, revision)
            SELECT %(target)s, %(start)s + row_number() OVER (ORDER BY position) - 1,
                created_at, message_id, role, content, search_terms, %(revision)s
            FROM {messages} WHERE history_key = %(source)s AND position BETWEEN 0 AND %(end)s
            RETURNING role
        ), counted AS (SELECT count(*) AS messages, count(*) FILTER (WHERE role = 'user') AS rounds FROM copied)
        UPDATE {histories} SET
            next_position = next_position + messages,
            message_count = message_count + messages,
            round_count = round_count + rounds,
            revision = %(revision)s,
            expires_at = {expires_at},
            updated_at = {now},
            meta = coalesce(%(meta)s::json, meta),
            branch_of = CASE WHEN %(meta)s::text IS NULL THEN branch_of ELSE %(branch_of)s END
        FROM counted WHERE history_key = %(target)s RETURNING messages
    """
    import_history: str = """
        UPDATE {histories} SET created_at = {created_at}, updated_at = {updated_at},
            title = %(title)s, title_terms = %(title_terms)s::tsvector, meta = %(meta)s::json,
            branch_of = %(branch_of)s, user_id = %(user)s
        WHERE history_key = %(key)s RETURNING {first_revision}
    """
    import_messages: str = """
        INSERT INTO {messages} (history_key, position, created_at, message_id, role, content, search_terms, revision)
        SELECT %(key)s, %(start)s + place - 1, {time_sent}, message_id, role, content::json, terms::tsvector,
            %(revision)s
        FROM {sent_with_numbers}
    """
    imported: str = """
        UPDATE {histories} SET
            next_position = next_position + %(count)s,
            message_count = message_count + %(count)s,
            round_count = round_count + %(rounds)s,
            revision = %(revision)s,
            expires_at = {expires_at},
            {count_previews},
            last_at = CASE WHEN %(last_role)s::text IS NULL THEN last_at ELSE {last_at} END,
            updated_at = greatest(updated_at, {updated_at})
        WHERE history_key = %(key)s
    """

    history: str = "SELECT {history_row} FROM {histories} WHERE history_key = %(key)s AND {visible}"
    # Its plan is kept. The best plan for a prefix depends on how many histories have it.
    all_histories: str = """
        SELECT {history_row} FROM {histories}
        WHERE namespace = %(namespace)s AND {further} AND {visible} AND {is_seen} {newest_first} LIMIT %(limit)s
    """
    histories_of_user: str = """
        SELECT {history_row} FROM {histories}
        WHERE namespace = %(namespace)s AND user_id = %(user)s AND {further} AND {is_alive}
            AND starts_with(chat_history_id, %(prefix)s) AND {is_seen}
        {newest_first} LIMIT %(limit)s
    """
    histories: str = """
        SELECT {history_row} FROM {histories} WHERE {with_prefix} AND {further} {newest_first} LIMIT %(limit)s
    """
    # The histories with the prefix among the next `near` ones of the namespace.
    histories_near: str = """
        SELECT {history_row} FROM (
            SELECT * FROM {histories} WHERE namespace = %(namespace)s AND {further} {newest_first} LIMIT %(near)s
        ) AS near
        WHERE {with_prefix} {newest_first} LIMIT %(limit)s
    """
    # MATERIALIZED, because the planner would otherwise walk along the index by time, past newer histories of others.
    histories_of_few: str = """
        WITH few AS MATERIALIZED (SELECT * FROM {histories} WHERE {with_prefix} ORDER BY {by_id})
        SELECT {history_row} FROM few WHERE {further} {newest_first} LIMIT %(limit)s
    """
    # Whether more than `few` histories have the prefix, and whether more than `near` come after the cursor.
    have_more: str = """
        SELECT
            (SELECT true FROM {histories} WHERE {with_prefix} ORDER BY {by_id} OFFSET %(few)s LIMIT 1),
            (SELECT true FROM {histories} WHERE namespace = %(namespace)s AND {further}
                {newest_first} OFFSET %(near)s LIMIT 1)
    """
    histories_by_id: str = """
        SELECT {history_row} FROM {histories} WHERE {with_prefix} AND {by_id} > %(after)s
        ORDER BY {by_id} LIMIT %(limit)s
    """
    update_history: str = """
        UPDATE {histories} SET
            title = CASE WHEN %(has_title)s THEN %(title)s ELSE coalesce(title, %(title)s) END,
            title_terms = CASE
                WHEN %(has_title)s OR title IS NULL THEN %(title_terms)s::tsvector ELSE title_terms
            END,
            meta = CASE WHEN %(has_meta)s THEN %(meta)s::json ELSE meta END,
            branch_of = CASE WHEN %(has_meta)s THEN %(branch_of)s ELSE branch_of END,
            user_id = CASE WHEN %(has_user)s THEN %(user)s ELSE user_id END
        WHERE history_key = %(key)s RETURNING {history_row}
    """
    erasable_by_prefix: str = _ERASABLE_BY_PREFIX
    erasable_by_age: str = _ERASABLE_BY_AGE
    erasable_of_user: str = _ERASABLE_OF_USER
    erasable_expired: str = _ERASABLE_EXPIRED
    delete_old_histories: str = _DELETE_HISTORIES.format(
        before="{of_user} AND (updated_at < {updated_before} OR {has_expired})"
    )

    page_before: str = """
        SELECT {message_row} FROM {messages}
        WHERE history_key = %(key)s AND position < %(place)s AND {is_visible} ORDER BY position DESC LIMIT %(limit)s
    """
    page_after: str = """
        SELECT {message_row} FROM {messages}
        WHERE history_key = %(key)s AND position > %(place)s AND {is_visible} ORDER BY position LIMIT %(limit)s
    """

    titles: str = """
        SELECT {history_row} FROM {histories}
        WHERE {with_prefix} AND title_terms @@ %(query)s::tsquery AND title_terms IS NOT NULL
        ORDER BY char_length(title), updated_at DESC LIMIT %(limit)s
    """
    namespaces: str = """
        WITH RECURSIVE names (name) AS (
            (SELECT namespace FROM {histories} ORDER BY namespace LIMIT 1)
            UNION ALL
            SELECT (SELECT namespace FROM {histories} WHERE namespace > name ORDER BY namespace LIMIT 1)
            FROM names WHERE name IS NOT NULL
        )
        SELECT name FROM names WHERE name IS NOT NULL
    """

    # The keys of the histories to search, and the number of their messages. No keys if the histories are too many.
    few_histories: str = """
        SELECT CASE WHEN count(*) <= %(few)s THEN coalesce(array_agg(history_key), '{{}}') END,
            coalesce(sum(message_count), 0)::bigint
        FROM (
            SELECT history_key, message_count FROM {histories} WHERE {with_prefix} ORDER BY {by_id} LIMIT %(few)s + 1
        ) AS few
    """
    # Whether more messages match than the few histories have.
    more_match: str = """
        SELECT FROM {messages} WHERE search_terms @@ %(query)s::tsquery AND search_terms IS NOT NULL
        OFFSET %(messages)s LIMIT 1
    """
    search: str = _SEARCH.format(searched="{messages}", restrict="")
    search_for_few: str = _SEARCH.format(searched="{messages}", restrict="AND history_key = ANY (%(keys)s)")
    search_few: str = _SEARCH.format(searched=_OF_FEW_HISTORIES, restrict="")
    # Ordered, because a planner that expects many rows would otherwise read the table itself for the first one.
    an_unindexed: str = "SELECT FROM {messages} WHERE search_terms IS NULL ORDER BY history_key, position LIMIT 1"
    unindexed: str = """
        SELECT history_key, position, pg_column_size(content) FROM {messages}
        WHERE (history_key, position) > (%s, %s) AND search_terms IS NULL ORDER BY history_key, position LIMIT %s
    """
    unindexed_contents: str = """
        SELECT history_key, position, content FROM {messages}
        WHERE (history_key, position) > (%s, %s) AND (history_key, position) <= (%s, %s) AND search_terms IS NULL
        ORDER BY history_key, position FOR UPDATE
    """
    set_terms: str = """
        UPDATE {messages} AS m SET search_terms = sent.terms::tsvector
        FROM unnest(%s::uuid[], %s::bigint[], string_to_array(%s, E'\n')) AS sent (history_key, position, terms)
        WHERE m.history_key = sent.history_key AND m.position = sent.position
    """

    vacuum_messages: str = "VACUUM (FULL) {messages}"
    vacuum_histories: str = "VACUUM (FULL) {histories}"
    totals: str = """
        SELECT count(*), coalesce(sum(message_count), 0)::bigint, coalesce(sum(round_count), 0)::bigint
        FROM {histories} WHERE {with_prefix}
    """
    per_day: str = """
        SELECT extract(epoch FROM day)::bigint / 86400, count(*) FROM (
            SELECT date_trunc('day', time AT TIME ZONE 'UTC') AS day
            FROM {messages} JOIN (SELECT history_key FROM {histories} WHERE {with_prefix}) AS h USING (history_key)
            CROSS JOIN LATERAL (SELECT CASE WHEN {created_at_is_readable} THEN created_at ELSE 'epoch' END) AS s (time)
        ) AS days GROUP BY day ORDER BY day
    """
    # PostgreSQL cannot look into a content that has a NUL or a lone surrogate anywhere. They are written as \u…
    usage: str = """
        SELECT CASE WHEN {created_at_is_readable} THEN {message_time} ELSE 0 END,
            CASE WHEN can_be_read
                THEN json_build_object('model', content -> 'meta' -> 'model', 'usage', content -> 'meta' -> 'usage')
                ELSE content END
        FROM {messages} JOIN (SELECT history_key FROM {histories} WHERE {with_prefix}) AS h USING (history_key)
        CROSS JOIN LATERAL (SELECT strpos(content::text, '\\u') = 0) AS s (can_be_read)
        WHERE role = 'assistant' AND CASE WHEN can_be_read
            THEN json_typeof(content -> 'meta' -> 'usage') = 'object' ELSE strpos(content::text, '"usage":') > 0 END
    """
    size_on_disk: str = """
        SELECT sum(pg_total_relation_size(part))::bigint
        FROM unnest(ARRAY[{histories_name}, {messages_name}]::regclass[]) AS whole
        CROSS JOIN LATERAL (
            SELECT whole AS part UNION SELECT relid FROM pg_partition_tree(whole)
        ) AS parts
    """
    miscounted: str = """
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
    described: str = """
        SELECT h.history_key, chat_history_id, title, meta, branch_of, preview, last_role, last_text,
            last_at IS NOT DISTINCT FROM said.created_at
                OR said.created_at NOT BETWEEN '0001-01-01 00:00:00+00' AND '9999-12-31 23:59:59.999999+00',
            question.content, said.role, said.content
        FROM {histories} AS h
        LEFT JOIN LATERAL (
            SELECT content FROM {messages} AS m WHERE m.history_key = h.history_key AND role = 'user'
            ORDER BY position LIMIT 1
        ) AS question ON true
        LEFT JOIN LATERAL (
            SELECT role, content, created_at FROM {messages} AS m
            WHERE m.history_key = h.history_key AND role <> 'system' AND position >= 0 ORDER BY position DESC LIMIT 1
        ) AS said ON true
        WHERE namespace = %s AND h.history_key > %s ORDER BY h.history_key LIMIT %s
    """
    mismatched_titles: str = """
        SELECT h.history_key FROM {histories} AS h
        JOIN unnest(%s::uuid[], %s::text[]) AS sent (history_key, terms) USING (history_key)
        WHERE title_terms IS DISTINCT FROM terms::tsvector
    """
    title_and_meta: str = "SELECT chat_history_id, title, meta FROM {histories} WHERE history_key = %s FOR UPDATE"
    describe_anew: str = """
        UPDATE {histories} SET title_terms = %s::tsvector, branch_of = %s WHERE history_key = %s
    """
    recount: str = """
        UPDATE {histories} SET message_count = messages, round_count = rounds,
            next_position = greatest(next_position, last + 1)
        FROM (
            SELECT count(*) AS messages, count(*) FILTER (WHERE role = 'user') AS rounds, max(position) AS last
            FROM {messages} WHERE history_key = %(key)s
        ) AS counted
        WHERE history_key = %(key)s
    """
    orphans: str = """
        SELECT history_key, count(*) FROM {messages} AS m
        WHERE NOT EXISTS (SELECT FROM {histories} AS h WHERE h.history_key = m.history_key)
        GROUP BY history_key ORDER BY history_key
    """
    rows: str = """
        SELECT m.history_key, position, content, chat_history_id
        FROM {messages} AS m JOIN {histories} AS h USING (history_key)
        WHERE namespace = %s AND (m.history_key, position) > (%s, %s)
        ORDER BY m.history_key, position LIMIT %s
    """
    mismatched: str = """
        SELECT place FROM {messages} AS m
        JOIN unnest(%s::uuid[], %s::bigint[], %s::text[]) WITH ORDINALITY AS sent (history_key, position, terms, place)
            ON m.history_key = sent.history_key AND m.position = sent.position
        WHERE search_terms <> terms::tsvector ORDER BY place
    """
    forget_terms: str = """
        UPDATE {messages} SET search_terms = NULL WHERE history_key = %s AND position = %s
    """
    unreadable_times: str = """
        SELECT history_key, chat_history_id FROM {histories}
        WHERE namespace = %s AND NOT ({created_at_is_readable} AND {updated_at_is_readable}) ORDER BY {by_id}
    """
