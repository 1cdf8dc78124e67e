# SPDX-License-Identifier: Apache-2.0
"""
What becomes of the conversations that other libraries have stored.

Their databases in the folder data were written by these libraries themselves, by the script that lies there.
"""

import json
import shutil
import sqlite3
from contextlib import closing
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from haystack.dataclasses import (
    ChatMessage,
    ChatRole,
    FileContent,
    ImageContent,
    ReasoningContent,
    TextContent,
    ToolCall,
    ToolCallResult,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transferred import counts, moved

from haystack_chat_store import ChatHistoryExistsError, DamagedFileError, Fault
from haystack_chat_store.conversation.shown import messages_for_model
from haystack_chat_store.testing.kit import number_of_examples, without_ids
from haystack_chat_store.testing.messages import user
from haystack_chat_store.transfer import import_histories

DATA = Path(__file__).parents[1] / "data"
FILES = {"openai-agents": "openai_agents.sqlite", "langchain": "langchain.sqlite", "llama-index": "llama_index.sqlite"}
# Where each library keeps its messages: the table, the column with the session, the one with the message.
TABLES = {
    "openai-agents": ("agent_messages", "session_id", "message_data"),
    "langchain": ("message_store", "session_id", "message"),
    "llama-index": ("data_chatstore", "key", "value"),
}
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
PDF = "JVBERi0xLjQKJSVFT0Y="


@pytest.fixture(params=FILES)
def library(request):
    return request.param


@pytest.fixture
def database(library, tmp_path):
    """A copy of a library's database."""
    return copied(library, tmp_path)


def copied(library, folder):
    # SQLite lays files beside a database even to read it, if it is in WAL mode.
    return shutil.copy(DATA / FILES[library], folder / "copy.db")


def execute(database, *statements):
    with closing(sqlite3.connect(database, isolation_level=None)) as connection:
        for statement, *values in statements:
            connection.execute(statement, values)


def insert(library, database, session, *messages):
    table, session_column, data_column = TABLES[library]
    statement = f"INSERT INTO {table} ({session_column}, {data_column}) VALUES (?, ?)"
    execute(database, *((statement, session, json.dumps(message)) for message in messages))


def message(role, *parts, name=None, **meta):
    return ChatMessage(role, [TextContent(part) if isinstance(part, str) else part for part in parts], name, meta)


def image(detail=None):
    return ImageContent(PNG, "image/png", detail, validation=False)


def file(name="a.pdf"):
    return FileContent(PDF, "application/pdf", name, validation=False)


USER, ASSISTANT, SYSTEM, TOOL = ChatRole.USER, ChatRole.ASSISTANT, ChatRole.SYSTEM, ChatRole.TOOL
QUESTION = "What is the weather in Zürich? 👋"


# ---------------------------------------------------------------------- what is in them


def test_sessions_of_the_openai_agents_sdk(store, tmp_path):
    imported = import_histories(store, copied("openai-agents", tmp_path), format="openai-agents")

    call = ToolCall("weather", {"city": "Zürich"}, "fc_1", {"call_id": "call_1"})
    unknown_call = ToolCall("", {}, "call_9", {"call_id": "call_9"})
    reasoning = ReasoningContent("I look it up.", {"id": "rs_1", "type": "reasoning"})
    assert without_ids(store.retrieve_messages("user_456")) == [
        message(SYSTEM, "Be kind."),
        message(USER, QUESTION),
        message(ASSISTANT, reasoning, call),
        message(TOOL, ToolCallResult("22 °C", call, False)),
        message(ASSISTANT, "It is 22 °C.", id="msg_1", status="completed"),
        message(USER, "What is this?", image("low"), file()),
        message(ASSISTANT, id="msg_2", status="completed", refusal="I cannot do that."),
        message(TOOL, ToolCallResult("late", unknown_call, False)),
        message(USER, "And this?"),
    ]
    assert [each.text for each in store.retrieve_messages("another")] == ["Hi", "Hello!"]
    assert imported == moved(
        2,
        11,
        0,
        (
            Fault(
                chat_history_id="user_456",
                position=None,
                description="Row 10 was left out: there is no message for an item of the type 'web_search_call'.",
                is_repaired=False,
            ),
            Fault(
                chat_history_id="user_456",
                position=None,
                description="Row 11 has a part of the type 'input_image' without content of its own. It was left out.",
                is_repaired=False,
            ),
        ),
    )


def test_sessions_of_langchain(store, tmp_path):
    imported = import_histories(store, copied("langchain", tmp_path), format="langchain")

    call, zoom = ToolCall("weather", {"city": "Zürich"}, "call_1"), ToolCall("zoom", {"by": 2}, "call_2")
    said = {
        "response_metadata": {"model_name": "gpt-5", "finish_reason": "tool_calls"},
        "usage_metadata": {"input_tokens": 5, "output_tokens": 7, "total_tokens": 12},
    }
    thought = ReasoningContent("A dot.", {"type": "thinking", "signature": "c2ln"})
    assert without_ids(store.retrieve_messages("user_456")) == [
        message(SYSTEM, "Be kind."),
        message(USER, QUESTION, name="Ada", id="human-1"),
        message(ASSISTANT, "Let me look.", call, **said),
        message(TOOL, ToolCallResult("22 °C", call, False)),
        message(ASSISTANT, "It is 22 °C."),
        message(USER, "What is this?", image("low"), image(), file()),
        message(ASSISTANT, thought, "A dot.", zoom),
        message(TOOL, ToolCallResult("No lens.", zoom, True)),
        message(TOOL, ToolCallResult("Old.", ToolCall("legacy", {}), False)),
        message(ASSISTANT, "Custom."),
    ]
    assert [each.text for each in store.retrieve_messages("another")] == ["Hi", "Hello!"]
    assert counts(imported) == (2, 12, 0)
    assert [fault.description for fault in imported.faults] == [
        "Row 11 was left out: there is no role for 'narrator'.",
        "Row 12 has a part of the type 'image_url' without content of its own. It was left out.",
    ]


def test_chats_of_llama_index(store, tmp_path):
    imported = import_histories(store, copied("llama-index", tmp_path), format="llama-index")

    call, zoom = ToolCall("weather", {"city": "Zürich"}, "call_1"), ToolCall("zoom", {"by": 2}, "call_2")
    assert without_ids(store.retrieve_messages("user_456")) == [
        message(SYSTEM, "Be kind."),
        message(USER, QUESTION),
        message(ASSISTANT, ReasoningContent("I look it up.", {"signature": "c2ln"}), "Let me look.", call),
        message(TOOL, ToolCallResult("22 °C", call, False)),
        message(ASSISTANT, "It is 22 °C."),
        message(USER, "What is this?", image("low"), file()),
        message(ASSISTANT, "A dot.", zoom),
        message(TOOL, ToolCallResult("No lens.", zoom, False)),
        message(USER, "Listen.", FileContent("UklGRg==", "audio/wav", None, validation=False)),
        message(ASSISTANT, "Bot."),
        message(ASSISTANT, "Model."),
    ]
    assert [each.text for each in store.retrieve_messages("another")] == ["Hi", "Hello!"]
    assert imported == moved(2, 13, 0, ())


def test_ids_are_made_of_the_library_and_the_row(store, library, database):
    import_histories(store, database, format=library)
    ids = [each.meta["chat_message_id"] for each in store.retrieve_messages("user_456")]
    assert ids[:2] == [f"{library}:1", f"{library}:2"]
    assert len(set(ids)) == len(ids)


def test_times_are_those_of_the_library_where_it_has_any(store, library, database):
    if library == "openai-agents":
        execute(database, ["UPDATE agent_messages SET created_at = '2025-03-01 10:00:00'"])
        expected = datetime(2025, 3, 1, 10, tzinfo=timezone.utc), timedelta(0)
    else:
        expected = datetime.now(timezone.utc), timedelta(minutes=10)
    import_histories(store, database, format=library)
    times = [each.created_at for each in store.list_messages("user_456")]
    info = store.get_chat_history("user_456")
    for time in (*times, info.created_at, info.updated_at):
        assert abs(time - expected[0]) <= expected[1]


def test_a_time_with_a_zone_is_that_moment(store, tmp_path):
    database = copied("openai-agents", tmp_path)
    for text in ("2025-03-01 10:00:00+02:00", "2025-03-01T08:00:00Z"):
        execute(database, ["UPDATE agent_messages SET created_at = ?", text])
        import_histories(store, database, format="openai-agents")
        assert store.get_chat_history("user_456").created_at == datetime(2025, 3, 1, 8, tzinfo=timezone.utc)
        store.delete_all_messages()


# ---------------------------------------------------------------------- importing again


def test_importing_again_adds_nothing(store, library, database):
    first = import_histories(store, database, format=library)
    before = store.retrieve_messages("user_456")
    assert counts(import_histories(store, database, format=library)) == (0, 0, first.messages)
    assert store.retrieve_messages("user_456") == before


NEW_MESSAGES = {
    "openai-agents": {"role": "user", "content": "new"},
    "langchain": {"type": "human", "data": {"content": "new", "type": "human"}},
    "llama-index": {"role": "user", "blocks": [{"block_type": "text", "text": "new"}]},
}


def test_a_conversation_that_went_on_gets_what_is_new(store, library, database):
    before = import_histories(store, database, format=library).messages
    insert(library, database, "user_456", NEW_MESSAGES[library])
    assert counts(import_histories(store, database, format=library)) == (1, 1, before)
    assert store.retrieve_messages("user_456")[-1].text == "new"


def test_a_history_of_ours_by_the_same_id_stays(store, library, database):
    store.write_messages("user_456", [user("mine")])
    with pytest.raises(ChatHistoryExistsError, match="'user_456'"):
        import_histories(store, database, format=library)
    assert [each.text for each in store.retrieve_messages("user_456")] == ["mine"]
    assert store.count_messages("another") == 2


def test_the_database_is_only_read(store, library, database):
    before = Path(database).read_bytes()
    import_histories(store, database, format=library)
    assert Path(database).read_bytes() == before


def test_reading_a_database_with_a_log_leaves_nothing_beside_it(store, library, database):
    execute(database, ["PRAGMA journal_mode = WAL"])
    before = {path.name: path.read_bytes() for path in Path(database).parent.iterdir()}
    assert "copy.db-wal" not in before
    import_histories(store, database, format=library)
    assert store.list_chat_histories().items
    assert {path.name: path.read_bytes() for path in Path(database).parent.iterdir()} == before


def test_a_database_that_is_damaged_is_refused_whole(store, library, database):
    table, session, _ = TABLES[library]
    with closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute(f"CREATE INDEX lost ON {table} ({session})")
        ((root,),) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'lost'")
        ((page_size,),) = connection.execute("PRAGMA page_size")
        connection.execute("PRAGMA wal_checkpoint")
    with open(database, "r+b") as file:  # an empty leaf of an index: SQLite finds no row by it
        file.seek((root - 1) * page_size)
        file.write(bytes([10, 0, 0, 0, 0]) + page_size.to_bytes(2, "big") + bytes([0]))
    with pytest.raises(DamagedFileError, match=r"is damaged.* missing from index lost"):
        import_histories(store, database, format=library)
    assert store.list_chat_histories().items == []


def declare(database, name, old, new):
    """Change what the schema declares, whatever is stored."""
    execute(
        database,
        ["PRAGMA writable_schema = ON"],
        ["UPDATE sqlite_master SET sql = replace(sql, ?, ?) WHERE name = ?", old, new, name],
    )


def test_rows_that_do_not_keep_to_the_schema_are_no_damage(store, library, database):
    table, _, _ = TABLES[library]
    declare(database, table, "id INTEGER", "id INTEGER CHECK (id < 0)")
    with closing(sqlite3.connect(database)) as connection:
        assert "CHECK constraint failed" in str(connection.execute(f"PRAGMA integrity_check({table})").fetchall())
    import_histories(store, database, format=library)
    assert store.count_messages("another") == 2


def test_duplicates_in_a_unique_index_are_damage_because_they_hide_rows(store, library, database):
    table, session, _ = TABLES[library]
    execute(database, [f"CREATE INDEX shared ON {table} ({session})"])
    declare(database, "shared", "CREATE INDEX", "CREATE UNIQUE INDEX")
    with pytest.raises(DamagedFileError, match="non-unique entry in index shared"):
        import_histories(store, database, format=library)


def test_damage_is_found_after_many_rows_that_do_not_keep_to_the_schema(store, library, database):
    table, session, _ = TABLES[library]
    insert(library, database, "new", *({} for _ in range(150)))
    with closing(sqlite3.connect(database)) as connection:
        ((last,),) = connection.execute(f"SELECT max(id) FROM {table}")
    execute(database, [f"CREATE INDEX lost ON {table} ({session}) WHERE id < {last}"])
    declare(database, "lost", f" WHERE id < {last}", "")
    declare(database, table, "id INTEGER", "id INTEGER CHECK (id < 0)")
    with pytest.raises(DamagedFileError, match=f"row {last} missing from index lost"):
        import_histories(store, database, format=library)
    assert store.list_chat_histories().items == []


def test_what_its_application_has_only_just_written_comes_too_and_stays_where_it_is(store, tmp_path):
    database = copied("openai-agents", tmp_path)
    with closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute(
            "INSERT INTO agent_messages (session_id, message_data) VALUES ('new', ?)",
            [json.dumps({"role": "user", "content": "just now"})],
        )
        (tmp_path / "at work").mkdir()
        files = [
            shutil.copy(path, tmp_path / "at work") for path in tmp_path.glob("copy.db*") if path.suffix != ".db-shm"
        ]
    before = [Path(path).read_bytes() for path in files]

    import_histories(store, tmp_path / "at work" / "copy.db", format="openai-agents")

    assert [each.text for each in store.retrieve_messages("new")] == ["just now"]
    assert [Path(path).read_bytes() for path in files] == before


# ---------------------------------------------------------------------- the OpenAI Agents SDK: what belongs together


def imported_items(store, tmp_path, *items):
    database = copied("openai-agents", tmp_path)
    insert("openai-agents", database, "new", *items)
    faults = import_histories(store, database, format="openai-agents").faults
    return store.retrieve_messages("new"), [fault for fault in faults if fault.chat_history_id == "new"]


def item_call(number):
    return {"type": "function_call", "name": "f", "arguments": "{}", "call_id": str(number), "id": f"fc_{number}"}


def item_output(number):
    return {"type": "function_call_output", "call_id": str(number), "output": f"result {number}"}


def item_text(text):
    return {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]}


def test_calls_that_were_made_together_are_one_message(store, tmp_path):
    messages, _ = imported_items(
        store,
        tmp_path,
        {"role": "user", "content": "Go"},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        item_text("I go."),
        item_call(1),
        {"type": "reasoning", "id": "rs_2", "summary": []},
        item_call(2),
        item_output(1),
        item_output(2),
        item_text("One."),
        item_text("Two."),
    )
    assert [each.role.value for each in messages] == ["user", "assistant", "tool", "tool", "assistant", "assistant"]
    assert [type(part) for part in messages[1]._content] == [
        ReasoningContent,
        TextContent,
        ToolCall,
        ReasoningContent,
        ToolCall,
    ]
    assert len(messages_for_model(messages)) == len(messages)


def test_a_response_that_was_not_complete_is_not_taken_for_the_whole_one(store, tmp_path):
    imported_items(store, tmp_path, {"role": "user", "content": "Go"}, item_call(1))
    database = tmp_path / "copy.db"
    insert("openai-agents", database, "new", item_call(2))
    with pytest.raises(ChatHistoryExistsError, match="'new'"):
        import_histories(store, database, format="openai-agents")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [("{", {"": "{"}), ("[1]", {"": [1]}), ("0", {"": 0}), ('{"a":1}', {"a": 1})],
)
def test_arguments_that_are_no_object_are_kept(store, tmp_path, arguments, expected):
    messages, _ = imported_items(store, tmp_path, {**item_call(1), "arguments": arguments})
    assert messages[0].tool_call.arguments == expected


@pytest.mark.parametrize("fields", [{"arguments": ""}, {"arguments": None}, {"arguments": "null"}, {}])
def test_a_call_without_arguments_has_none(store, tmp_path, fields):
    call = {key: value for key, value in item_call(1).items() if key != "arguments"}
    messages, _ = imported_items(store, tmp_path, {**call, **fields})
    assert messages[0].tool_call.arguments == {}


# ---------------------------------------------------------------------- early versions


def test_langchain_messages_of_early_versions(store, tmp_path):
    database = copied("langchain", tmp_path)
    function = {"name": "f", "arguments": '{"a":1}'}
    kwargs = {"tool_calls": [{"id": "1", "type": "function", "function": function}]}
    insert(
        "langchain",
        database,
        "old",
        {"type": "ai", "data": {"content": "", "additional_kwargs": kwargs, "type": "ai", "example": False}},
        {"type": "tool", "data": {"content": "done", "tool_call_id": "1"}},
        {"type": "ai", "data": {"content": ""}},
    )
    import_histories(store, database, format="langchain")
    call, result, empty = store.retrieve_messages("old")
    assert call.tool_call == result.tool_call_result.origin == ToolCall("f", {"a": 1}, "1")
    assert empty._content == []


def test_refusals_are_kept_as_haystack_keeps_them(store, library, database):
    no = {"type": "refusal", "refusal": "No."}
    rows = {
        "openai-agents": [
            {"type": "message", "role": "assistant", "content": [no], "status": "completed"},
            {"type": "message", "role": "assistant", "content": [no, {"type": "output_text", "text": "But."}, no]},
        ],
        "langchain": [
            {"type": "ai", "data": {"content": "", "additional_kwargs": {"refusal": "No.", "status": "completed"}}},
            {"type": "ai", "data": {"content": [no, "But."], "additional_kwargs": {"refusal": "No."}}},
        ],
        "llama-index": [
            {"role": "assistant", "blocks": [], "additional_kwargs": {"refusal": "No.", "status": "completed"}},
            {
                "role": "assistant",
                "blocks": [{"block_type": "text", "text": "But."}],
                "additional_kwargs": {"refusal": "No."},
            },
        ],
    }
    insert(library, database, "refusals", *rows[library])
    imported = import_histories(store, database, format=library)
    alone, beside_text = without_ids(store.retrieve_messages("refusals"))
    assert (alone.meta["refusal"], alone._content) == ("No.", [])
    assert beside_text == message(ASSISTANT, "But.", refusal="No.")
    assert not [fault for fault in imported.faults if fault.chat_history_id == "refusals"]
    others = {key: value for key, value in alone.meta.items() if key != "refusal"}
    if library == "langchain":
        others = others["additional_kwargs"]
    assert others == {"status": "completed"}


def test_llama_index_messages_of_early_versions(store, tmp_path):
    database = copied("llama-index", tmp_path)
    insert("llama-index", database, "old", {"role": "user", "content": "Hi", "additional_kwargs": {"a": 1}})
    import_histories(store, database, format="llama-index")
    (old,) = store.retrieve_messages("old")
    assert (old.text, old.meta["a"]) == ("Hi", 1)


# ---------------------------------------------------------------------- what cannot be imported


def test_a_session_whose_id_cannot_be_one_of_ours_is_reported(store, library, database):
    for session in ("", "x" * 513, "a\0b"):
        insert(library, database, session, NEW_MESSAGES[library])
    imported = import_histories(store, database, format=library)
    refused = [fault for fault in imported.faults if fault.chat_history_id is None]
    assert len(refused) == 3
    assert all("the id of a session must" in fault.description for fault in refused)
    assert store.count_messages("another") == 2


@pytest.mark.parametrize("damaged", ["", "{", "[]", "null", '"text"', "[" * 100_000, b"\xff\x00", 5])
def test_a_damaged_row_is_reported_and_hides_no_other(store, library, database, damaged):
    table, _, data = TABLES[library]
    execute(database, [f"UPDATE {table} SET {data} = ? WHERE id = 2", damaged])
    imported = import_histories(store, database, format=library)
    assert imported.faults[0] == Fault(
        chat_history_id="user_456",
        position=None,
        description="Row 2 is not a JSON object, and was left out.",
        is_repaired=False,
    )
    assert store.retrieve_messages("user_456")[0].text == "Be kind."
    assert store.count_messages("another") == 2


def test_what_cannot_be_stored_is_reported(store, library, database):
    deep = []
    for _ in range(300):
        deep = [deep]
    message = {
        "openai-agents": {"role": "user", "content": "x", "deep": deep},
        "langchain": {"type": "human", "data": {"content": "x", "deep": deep}},
        "llama-index": {"role": "user", "content": "x", "additional_kwargs": {"deep": deep}},
    }[library]
    insert(library, database, "deep", message)
    imported = import_histories(store, database, format=library)
    (fault,) = (fault for fault in imported.faults if fault.chat_history_id == "deep")
    assert "nested more than 200 levels deep" in fault.description
    assert store.count_messages("deep") == 0


# What a row may hold in any place: what libraries write there, or JSON of another kind, of any size.
ODD_VALUES = [
    "null",
    "true",
    "5",
    "1" * 5000,
    "1e999",
    '""',
    '"\\ud800"',
    "[]",
    "{}",
    "[[1]]",
    '{"id": {}}',
    "[" * 99 + "]" * 99,
]
KEYS = """type data role content id name tool_calls tool_call_id args additional_kwargs function arguments status
 blocks block_type text tool_name tool_kwargs image image_mimetype detail url title document_mimetype data format audio
 call_id output summary refusal image_url file_data filename input_audio source media_type mime_type base64
 file""".split()
WORDS = """human user ai assistant system tool function chat reasoning function_call function_call_output message text
 input_text output_text refusal input_image input_file input_audio thinking image_url image file audio video document
 tool_call call_1""".split()


def as_object(fields):
    return "{" + ",".join(f"{json.dumps(name)}:{value}" for name, value in fields.items()) + "}"


odd_rows = st.recursive(
    st.sampled_from([*ODD_VALUES, *map(json.dumps, [*WORDS, f"data:image/png;base64,{PNG}"])]),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: f"[{','.join(items)}]")
        | st.dictionaries(st.sampled_from(KEYS), inner, max_size=6).map(as_object)
    ),
    max_leaves=25,
)


def likely_rows(library):
    """Rows that an importer looks into: with one of the roles or types that it knows."""
    name, words = {
        "openai-agents": ("type", ["message", "function_call", "function_call_output", "reasoning"]),
        "langchain": ("type", ["human", "ai", "tool", "chat"]),
        "llama-index": ("role", ["user", "assistant", "tool"]),
    }[library]
    fields = st.dictionaries(st.sampled_from(KEYS), odd_rows, max_size=8)
    inner = fields.map(as_object) | odd_rows
    return st.tuples(st.sampled_from(words), fields, inner).map(
        lambda drawn: as_object({**drawn[1], "data": drawn[2], name: json.dumps(drawn[0])})
    )


@settings(max_examples=number_of_examples(40), deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_row_stops_an_import(store, library, database, data):
    table, session, column = TABLES[library]
    texts = [*data.draw(st.lists(likely_rows(library) | odd_rows, max_size=4)), json.dumps(NEW_MESSAGES[library])]
    execute(database, *((f"INSERT INTO {table} ({session}, {column}) VALUES ('odd', ?)", text) for text in texts))
    import_histories(store, database, format=library)
    assert store.retrieve_messages("odd")[-1].text == "new"
    store.delete_all_messages()
    execute(database, [f"DELETE FROM {table} WHERE {session} = 'odd'"])


def with_one_odd_value(value, odd):
    """Yield JSON with an odd value in place of each value in turn, whole lists and objects included."""
    yield odd
    if isinstance(value, dict):
        for name, inner in value.items():
            for changed in with_one_odd_value(inner, odd):
                yield as_object({**{key: json.dumps(other) for key, other in value.items()}, name: changed})
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            for changed in with_one_odd_value(inner, odd):
                yield f"[{','.join([*map(json.dumps, value[:index]), changed, *map(json.dumps, value[index + 1 :])])}]"


def test_no_odd_value_in_any_place_of_a_row_stops_an_import(store, library, database):
    table, session, column = TABLES[library]
    with closing(sqlite3.connect(database)) as connection:
        written = [json.loads(text) for (text,) in connection.execute(f"SELECT {column} FROM {table}")]
    odd = [text for row in written for value in ODD_VALUES for text in with_one_odd_value(row, value)]
    with closing(sqlite3.connect(database)) as connection, connection:
        rows = [("odd", text) for text in [*odd, json.dumps(NEW_MESSAGES[library])]]
        connection.executemany(f"INSERT INTO {table} ({session}, {column}) VALUES (?, ?)", rows)
    import_histories(store, database, format=library)
    assert store.retrieve_messages("odd")[-1].text == "new"


def test_an_empty_result_of_a_tool_stays_an_empty_text(store, library, database):
    rows = {
        "openai-agents": [{"type": "function_call_output", "call_id": "1", "output": output} for output in ("", [])],
        "langchain": [{"type": "tool", "data": {"content": output, "tool_call_id": "1"}} for output in ("", [])],
        "llama-index": [{"role": "tool", "blocks": blocks} for blocks in ([], [{"block_type": "text", "text": ""}])],
    }[library]
    insert(library, database, "empty", *rows)
    import_histories(store, database, format=library)
    assert [each.tool_call_result.result for each in store.retrieve_messages("empty")] == ["", ""]


def test_a_row_whose_id_another_has_is_reported_and_hides_no_other(store, library, database):
    table, _, _ = TABLES[library]
    execute(
        database,
        [f"CREATE TABLE other AS SELECT * FROM {table}"],
        [f"DROP TABLE {table}"],
        [f"ALTER TABLE other RENAME TO {table}"],
        [f"UPDATE {table} SET id = 1 WHERE id = 2"],
    )
    imported = import_histories(store, database, format=library)
    assert (
        Fault(chat_history_id="user_456", position=None, description="A second row 1 was left out.", is_repaired=False)
        in imported.faults
    )
    assert store.count_messages("another") == 2
    assert counts(import_histories(store, database, format=library)) == (0, 0, imported.messages)


@pytest.mark.parametrize("call_id", [[], {}, 5, None])
def test_only_a_text_is_the_id_of_a_call(store, library, database, call_id):
    function = {"id": call_id, "function": {"name": "f", "arguments": "{}"}}
    call = {"name": "f", "args": {}, "id": call_id}
    block = {"block_type": "tool_call", "tool_name": "f", "tool_kwargs": {}, "tool_call_id": call_id}
    odd = {
        "openai-agents": [{"type": "function_call", "name": "f", "arguments": "{}", "id": call_id, "call_id": call_id}],
        "langchain": [
            {"type": "ai", "data": {"content": [{"id": call_id}], "tool_calls": [call]}},
            {"type": "ai", "data": {"content": "", "additional_kwargs": {"tool_calls": [function]}}},
        ],
        "llama-index": [
            {"role": "assistant", "blocks": [block]},
            {"role": "assistant", "blocks": [], "additional_kwargs": {"tool_calls": [function]}},
        ],
    }[library]
    insert(library, database, "odd", *odd)
    import_histories(store, database, format=library)
    calls = [each.tool_call for each in store.retrieve_messages("odd")]
    assert [(each.tool_name, each.arguments, each.id) for each in calls] == [("f", {}, None)] * len(odd)


def test_a_table_by_another_name_is_found_if_it_is_the_only_one(store, library, database):
    table, _, _ = TABLES[library]
    execute(database, [f'ALTER TABLE {table} RENAME TO "my ""own"" table"'])
    assert import_histories(store, database, format=library).chat_histories == 2

    execute(database, ['CREATE TABLE other AS SELECT * FROM "my ""own"" table"'])
    with pytest.raises(DamagedFileError, match="has 2 tables with the columns") as caught:
        import_histories(store, database, format=library)
    for name in ('my "own" table', "other", table):
        assert name in str(caught.value)
    execute(database, [f"ALTER TABLE other RENAME TO {table}"])
    assert import_histories(store, database, format=library).chat_histories == 0  # the store has them


def test_a_database_of_something_else_is_refused(store, library, tmp_path):
    others = [shutil.copy(DATA / name, tmp_path / name) for other, name in FILES.items() if other != library]
    others.append(tmp_path / "empty.db")
    execute(others[-1], ["CREATE TABLE t (a)"])
    for path in others:
        with pytest.raises(DamagedFileError, match=f"is not a database of the format {library}: it has no table"):
            import_histories(store, path, format=library)
    (tmp_path / "text").write_text("no database at all" * 100)
    with pytest.raises(DamagedFileError, match="cannot be read as an SQLite database"):
        import_histories(store, tmp_path / "text", format=library)
    with pytest.raises(FileNotFoundError):
        import_histories(store, tmp_path / "missing", format=library)
    assert not (tmp_path / "missing").exists()


def test_a_file_with_an_odd_name_is_read(store, library, database, tmp_path):
    odd = Path(database).rename(tmp_path / "a b%20?#&.db")
    assert import_histories(store, odd, format=library).chat_histories == 2
