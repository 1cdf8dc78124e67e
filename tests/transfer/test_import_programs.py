# SPDX-License-Identifier: Apache-2.0
"""
What becomes of conversations in the files of ChatGPT, Claude, OpenAI's format, llm, LlamaIndex and the Agents SDK.

The files of llm, LlamaIndex and the Agents SDK were written by these programs themselves, by the scripts in tests/data.
Those of ChatGPT and Claude follow what is known of their exports: for ChatGPT,
https://github.com/mohamed-chs/convoviz (docs/dev/chatgpt-spec.md); for Claude, the tests of importers such as
https://github.com/CherryHQ/cherry-studio (AnthropicImporter.test.ts).
"""

import asyncio
import base64
import copy
import json
import shutil
import sqlite3
import zipfile
from contextlib import closing, suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from haystack.dataclasses import ChatMessage, FileContent, ImageContent, ReasoningContent, ToolCall, ToolCallResult
from transferred import counts

from haystack_chat_store import (
    ChatHistoryAccessError,
    ChatHistoryExistsError,
    DamagedFileError,
    DuplicateMessageError,
    MessageEncodingError,
    with_message_ids,
)
from haystack_chat_store.testing.kit import number_of_examples, without_ids
from haystack_chat_store.testing.messages import conversation, user
from haystack_chat_store.transfer import export_histories, import_histories, import_messages, import_messages_async
from haystack_chat_store.transfer.importers.conversations import time_of

DATA = Path(__file__).parents[1] / "data"
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
START = 1_769_848_200.5  # 2026-01-31 08:30:00.5 UTC


def said(store, chat_history_id):
    """Who said what, in a form that is easy to compare."""
    return [
        (message.role.value, *(_shown(part) for part in message._content))
        for message in store.retrieve_messages(chat_history_id)
    ]


def _shown(part):
    if isinstance(part, ToolCall):
        return f"{part.tool_name}({part.arguments})"
    if isinstance(part, ToolCallResult):
        return f"{part.origin.tool_name} -> {part.result}" + " (error)" * part.error
    if isinstance(part, ReasoningContent):
        return f"thought: {part.reasoning_text}"
    if isinstance(part, ImageContent):
        return f"image {part.mime_type}"
    if isinstance(part, FileContent):
        return f"file {part.filename}: {base64.b64decode(part.base64_data).decode()}"
    return part.text


def faults_of(imported):
    return [fault.description for fault in imported.faults]


def ids(store, prefix=""):
    return sorted(info.chat_history_id for info in store.list_chat_histories(prefix=prefix, branches=True).items)


def written(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


# ---------------------------------------------------------------------- ChatGPT


def node(key, parent, role=None, text=None, at=0, *, content=None, name=None, recipient="all", **metadata):
    message = role and {
        "id": key,
        "author": {"role": role, "name": name, "metadata": {}},
        "create_time": START + at,
        "update_time": None,
        "content": content or {"content_type": "text", "parts": [text or ""]},
        "status": "finished_successfully",
        "end_turn": True,
        "weight": 1.0,
        "metadata": metadata,
        "recipient": recipient,
    }
    return {"id": key, "message": message, "parent": parent, "children": []}


def chatgpt_conversation(current="answer-2", **changed):
    image = {"content_type": "image_asset_pointer", "asset_pointer": "sediment://file_1", "width": 1, "height": 1}
    nodes = [
        node("root", None),
        node("system", "root", "system", "", is_visually_hidden_from_conversation=True),
        node("question", "system", "user", "What is a fox?", 1, attachments=[{"id": "file_1", "name": "fox.pdf"}]),
        node("answer-1", "question", "assistant", "A plant.", 2, model_slug="gpt-5"),
        node("answer-2", "question", "assistant", "An animal.", 3, model_slug="gpt-5"),
        node("more", "answer-1", "user", "Really?", 4),
    ]
    return {
        "id": "conversation-1",
        "conversation_id": "conversation-1",
        "title": "Foxes 🦊",
        "create_time": START,
        "update_time": START + 60,
        "current_node": current,
        "mapping": {each["id"]: each for each in nodes},
        "is_archived": True,
        **changed,
    }, image


@pytest.fixture
def chatgpt(tmp_path):
    return written(tmp_path / "conversations.json", [chatgpt_conversation()[0]])


def test_the_current_branch_of_a_chat_is_the_history_and_others_are_forks(store, chatgpt):
    imported = import_histories(store, chatgpt, format="chatgpt")
    assert ids(store) == ["conversation-1", "conversation-1~answer-1"]
    assert said(store, "conversation-1") == [("user", "What is a fox?"), ("assistant", "An animal.")]
    assert said(store, "conversation-1~answer-1") == [
        ("user", "What is a fox?"),
        ("assistant", "A plant."),
        ("user", "Really?"),
    ]
    info, fork = (store.get_chat_history(each) for each in ids(store))
    assert (info.title, info.meta) == ("Foxes 🦊", {"is_archived": True})
    assert (fork.title, fork.meta["branch_of"]) == ("Foxes 🦊", "conversation-1")
    begin = datetime(2026, 1, 31, 8, 30, 0, 500_000, tzinfo=timezone.utc)
    assert (info.created_at, info.updated_at) == (begin, begin + timedelta(seconds=60))
    assert [each.created_at for each in store.list_messages("conversation-1")] == [
        begin + timedelta(seconds=1),
        begin + timedelta(seconds=3),
    ]
    assert store.retrieve_messages("conversation-1")[1].meta["model"] == "gpt-5"
    assert [(fault.chat_history_id, fault.description) for fault in imported.faults] == [
        (each, "Node question has the attachment 'fox.pdf', which was left out: only its name is in the conversation.")
        for each in ids(store)
    ]


def test_importing_a_chat_again_adds_only_what_is_new(store, chatgpt, tmp_path):
    first = import_histories(store, chatgpt, format="chatgpt")
    assert counts(import_histories(store, chatgpt, format="chatgpt")) == (0, 0, first.messages)
    later, _ = chatgpt_conversation(current="more-2")
    later["mapping"]["more-2"] = node("more-2", "answer-2", "user", "Thanks.", 90)
    grown = written(tmp_path / "later.json", [later])
    assert counts(import_histories(store, grown, format="chatgpt")) == (1, 1, first.messages)
    assert said(store, "conversation-1")[-1] == ("user", "Thanks.")


def test_a_chat_that_took_another_branch_meanwhile_is_left_alone(store, chatgpt, tmp_path):
    import_histories(store, chatgpt, format="chatgpt")
    other = written(tmp_path / "later.json", [chatgpt_conversation(current="more")[0]])
    with pytest.raises(ChatHistoryExistsError, match="'conversation-1'"):
        import_histories(store, other, format="chatgpt")
    assert said(store, "conversation-1")[-1] == ("assistant", "An animal.")


def test_tools_thoughts_and_images_of_chatgpt(store, tmp_path):
    entry, image = chatgpt_conversation()
    code = {"content_type": "code", "language": "python", "text": "1 + 1"}
    steps = [
        node("a", None, "user", "Count.", 1),
        node("b", "a", "assistant", at=2, content={
            "content_type": "thoughts", "thoughts": [{"summary": "Adding", "content": "One and one."}]}),
        node("c", "b", "assistant", at=3, content=code, recipient="python"),
        node("d", "c", "tool", at=4, name="python", content={"content_type": "execution_output", "text": "2"}),
        node("e", "d", "tool", at=5, name="web", content={"content_type": "system_error", "name": "E", "text": "No."}),
        node("f", "e", "assistant", at=6, content={"content_type": "reasoning_recap", "content": "Thought for 2s"}),
        node("g", "f", "assistant", "It is 2.", 7),
        node("h", "g", "user", at=8, content={"content_type": "multimodal_text", "parts": [image, "And this?"]}),
        node("i", "h", "assistant", at=9, content={"content_type": "user_editable_context", "user_profile": "x"}),
        node("j", "i", "critic", "Hm.", 10),
    ]  # fmt: skip
    entry.update(mapping={each["id"]: each for each in steps}, current_node="j")
    imported = import_histories(store, written(tmp_path / "c.json", [entry]), format="chatgpt")
    assert said(store, "conversation-1") == [
        ("user", "Count."),
        ("assistant", "thought: Adding\nOne and one."),
        ("assistant", "python({'': '1 + 1'})"),
        ("tool", "python -> 2"),
        ("tool", "web -> No. (error)"),
        ("assistant", "thought: Thought for 2s"),
        ("assistant", "It is 2."),
        ("user", "And this?"),
    ]
    assert faults_of(imported) == [
        "Node h has a part of the type 'image_asset_pointer' without content of its own. It was left out.",
        "Node i was left out: there is no message for content of the type 'user_editable_context'.",
        "Node j was left out: there is no role for 'critic'.",
    ]
    assert {fault.chat_history_id for fault in imported.faults} == {"conversation-1"}


def test_a_tree_that_is_broken_is_reported_and_never_joined(store, tmp_path):
    entry, _ = chatgpt_conversation()
    entry["mapping"]["lost"] = node("lost", "nowhere", "user", "Lost.")
    entry["mapping"]["circle-1"] = node("circle-1", "circle-2", "user", "Round")
    entry["mapping"]["circle-2"] = node("circle-2", "circle-1", "user", "and round.")
    imported = import_histories(store, written(tmp_path / "c.json", [entry]), format="chatgpt")
    assert ids(store) == ["conversation-1", "conversation-1~answer-1"]
    assert said(store, "conversation-1") == [("user", "What is a fox?"), ("assistant", "An animal.")]
    assert faults_of(imported)[:3] == [
        f"Node {key} of conversation-1 was left out: its path to the first message is broken."
        for key in ("lost", "circle-1", "circle-2")
    ]


@pytest.mark.parametrize("current", [None, "nowhere", 5, {}])
def test_a_chat_without_a_current_node_says_so(store, tmp_path, current):
    file = written(tmp_path / "c.json", {"conversations": [chatgpt_conversation(current=current)[0]]})
    imported = import_histories(store, file, format="chatgpt")
    assert "conversation-1 does not say which of its branches is the current one." in faults_of(imported)
    assert said(store, "conversation-1")[-1] == ("user", "Really?")
    assert len(ids(store)) == 2


def test_an_archive_with_numbered_files_is_read_whole(store, tmp_path):
    with zipfile.ZipFile(tmp_path / "export.zip", "w") as archive:
        for number in range(2):
            entry, _ = chatgpt_conversation(conversation_id=f"chat-{number}")
            archive.writestr(f"conversations-00{number}.json", json.dumps([entry]))
        archive.writestr("user.json", "{}")
    import_histories(store, tmp_path / "export.zip", format="chatgpt")
    assert ids(store) == ["chat-0", "chat-0~answer-1", "chat-1", "chat-1~answer-1"]
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("user.json", "{}")
    with pytest.raises(DamagedFileError, match=r"has no file conversations\.json"):
        import_histories(store, tmp_path / "other.zip", format="chatgpt")


@pytest.mark.parametrize("damage", ["flipped", "encrypted", "cut off"])
def test_an_archive_that_cannot_be_unpacked_is_refused(store, tmp_path, damage):
    path = tmp_path / "export.zip"
    entries = [chatgpt_conversation(conversation_id=f"chat-{number}")[0] for number in range(50)]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("conversations.json", json.dumps(entries))
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[200:230] = b"\xff" * 30
    elif damage == "encrypted":  # one bit of the file's header, and of its entry in the directory
        data[6] |= 1
        data[data.rindex(b"PK\x01\x02") + 8] |= 1
    else:
        directory = data.rindex(b"PK\x01\x02")
        data[300:directory] = bytes(directory - 300)
    path.write_bytes(data)
    with pytest.raises(DamagedFileError, match=r"export\.zip"):
        import_histories(store, path, format="chatgpt")
    assert ids(store) == []


# ---------------------------------------------------------------------- Claude


ROOT = "00000000-0000-4000-8000-000000000000"


def claude_message(uuid, sender, text, parent=None, at=0, **changed):
    message = {
        "uuid": uuid,
        "text": text,
        "content": [{"type": "text", "text": text, "citations": []}],
        "sender": sender,
        "created_at": f"2026-01-31T08:30:{at:02}.000000Z",
        "updated_at": f"2026-01-31T08:30:{at:02}.000000Z",
        "attachments": [],
        "files": [],
    }
    return {**message, **({"parent_message_uuid": parent} if parent else {}), **changed}


def claude_export(*messages, **changed):
    entry = {
        "uuid": "chat-1",
        "name": "Foxes",
        "summary": "About foxes.",
        "created_at": "2026-01-31T08:30:00.000000Z",
        "updated_at": "2026-01-31T08:31:00.000000Z",
        "account": {"uuid": "account-1"},
        "chat_messages": list(messages),
    }
    return [{**entry, **changed}]


CLAUDE_TREE = [
    claude_message("q", "human", "What is a fox?", ROOT, 1),
    claude_message("a1", "assistant", "A plant.", "q", 2),
    claude_message("a2", "assistant", "An animal.", "q", 3),
    claude_message("more", "human", "Thanks.", "a2", 4),
]


def test_claudes_branches_are_histories_of_their_own(store, tmp_path):
    file = written(tmp_path / "conversations.json", claude_export(*CLAUDE_TREE))
    imported = import_histories(store, file, format="claude")
    assert imported.faults == ()
    assert said(store, "chat-1") == [("user", "What is a fox?"), ("assistant", "An animal."), ("user", "Thanks.")]
    assert said(store, "chat-1~a1") == [("user", "What is a fox?"), ("assistant", "A plant.")]
    info = store.get_chat_history("chat-1")
    assert (info.title, info.meta) == ("Foxes", {"summary": "About foxes."})
    assert info.updated_at == datetime(2026, 1, 31, 8, 31, tzinfo=timezone.utc)
    assert store.list_messages("chat-1")[2].created_at == datetime(2026, 1, 31, 8, 30, 4, tzinfo=timezone.utc)
    assert counts(import_histories(store, file, format="claude")) == (0, 0, 5)


def test_claudes_current_branch_is_the_one_that_the_export_names(store, tmp_path):
    file = written(tmp_path / "c.json", claude_export(*CLAUDE_TREE, current_leaf_message_uuid="a1"))
    import_histories(store, file, format="claude")
    assert said(store, "chat-1")[-1] == ("assistant", "A plant.")
    assert said(store, "chat-1~a2")[-1] == ("user", "Thanks.")


def test_tools_thoughts_and_files_of_claude(store, tmp_path):
    blocks = [
        {"type": "thinking", "thinking": "I count.", "start_timestamp": "x"},
        {"type": "text", "text": "Let me count."},
        {"type": "tool_use", "id": "toolu_1", "name": "repl", "input": {"code": "1 + 1"}},
        {"type": "tool_result", "tool_use_id": "toolu_1", "name": "repl", "is_error": False,
         "content": [{"type": "text", "text": "2"}, {"type": "image", "file_uuid": "x"}]},
        {"type": "token_budget"},
        {"type": "text", "text": "It is 2."},
        {"type": "voice_note", "text": "hm"},
    ]  # fmt: skip
    attached = [{"file_name": "a.txt", "file_type": "txt", "file_size": 3, "extracted_content": "one"}]
    file = written(
        tmp_path / "c.json",
        claude_export(
            claude_message("q", "human", "Count.", ROOT, 1, attachments=attached, files=[{"file_name": "b.png"}]),
            claude_message("a", "assistant", "Let me count. It is 2.", "q", 2, content=blocks),
            claude_message("x", "critic", "Hm.", "a", 3),
        ),
    )
    imported = import_histories(store, file, format="claude")
    assert said(store, "chat-1") == [
        ("user", "file a.txt: one", "Count."),
        ("assistant", "thought: I count.", "Let me count.", "repl({'code': '1 + 1'})"),
        ("tool", "repl -> 2"),
        ("assistant", "It is 2."),
    ]
    assert faults_of(imported) == [
        "Message q has the file 'b.png', which was left out: only its name is in the export.",
        "Message a has a tool's result with parts that are not text. They were left out.",
        "Message a has a block of the type 'voice_note'. It was left out.",
        "Message x was left out: there is no role for 'critic'.",
    ]
    assert counts(import_histories(store, file, format="claude")) == (0, 0, 4)


def test_early_exports_of_claude_have_one_row_and_say_where_they_are_not_clear(store, tmp_path):
    messages = [
        claude_message("q", "human", "What is a fox?", content=[]),
        claude_message("a1", "assistant", "A plant.", content=[]),
        claude_message("a2", "assistant", "An animal.", content=[]),
    ]
    imported = import_histories(store, written(tmp_path / "c.json", claude_export(*messages)), format="claude")
    assert [each[1] for each in said(store, "chat-1")] == ["What is a fox?", "A plant.", "An animal."]
    (fault,) = faults_of(imported)
    assert fault.startswith("Message a2 of chat-1 follows another one of the same sender.")


# ---------------------------------------------------------------------- OpenAI's format


CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Zürich"}'}}
OPENAI = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "What is the weather?", "name": "ada"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "22 °C"},
    {"role": "assistant", "content": "It is 22 °C.", "weight": 1},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "What is this?"},
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}},
            {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}},
        ],
    },
    {"role": "assistant", "content": None, "refusal": "I cannot say."},
]
OPENAI_SAID = [
    ("system", "Be kind."),
    ("user", "What is the weather?"),
    ("assistant", "weather({'city': 'Zürich'})"),
    ("tool", "weather -> 22 °C"),
    ("assistant", "It is 22 °C."),
    ("user", "What is this?", "image image/png"),
    ("assistant",),
]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (json.dumps(OPENAI), ["chats"]),
        (json.dumps(OPENAI, indent=2), ["chats"]),
        (json.dumps({"messages": OPENAI}), ["chats/1"]),
        (json.dumps([{"messages": OPENAI}, {"messages": OPENAI}]), ["chats/1", "chats/2"]),
        (f"\ufeff{json.dumps({'messages': OPENAI})}\n\n{json.dumps({'messages': OPENAI})}\n", ["chats/1", "chats/2"]),
        (json.dumps([OPENAI, OPENAI]), ["chats/1", "chats/2"]),
        ("", []),
        ("[]", []),
    ],
)
def test_openai_messages_come_in_every_form(store, tmp_path, text, names):
    file = tmp_path / "chats.jsonl"
    file.write_text(text, encoding="utf-8")
    imported = import_histories(store, file, format="openai")
    assert ids(store) == names
    for name in names:
        assert said(store, name) == OPENAI_SAID
    if names:
        assert store.retrieve_messages(names[0])[-1].meta["refusal"] == "I cannot say."
        assert faults_of(imported)[0] == (
            "Message 6 has a part of the type 'image_url' without content of its own. It was left out."
        )
    assert counts(import_histories(store, file, format="openai")) == (0, 0, 7 * len(names))


def test_what_is_exported_for_openai_comes_back(store, target, tmp_path):
    call = ToolCall("weather", {"city": "Zürich"}, "call_1")
    for name in ("a", "b"):
        store.write_messages(name, [
            ChatMessage.from_system("Be kind."),
            ChatMessage.from_user("Hi"),
            ChatMessage.from_assistant(tool_calls=[call]),
            ChatMessage.from_tool("22 °C", origin=call),
            ChatMessage.from_assistant("It is 22 °C."),
        ])  # fmt: skip
    export_histories(store, tmp_path / "chats.jsonl", format="openai")
    assert import_histories(target, tmp_path / "chats.jsonl", format="openai").messages == 10
    assert without_ids(target.retrieve_messages("chats/1")) == without_ids(store.retrieve_messages("a"))
    export_histories(target, tmp_path / "again.jsonl", format="openai")
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "chats.jsonl").read_bytes()


def test_a_conversation_that_went_on_in_openais_format_gets_what_is_new_and_another_one_is_not_joined(store, tmp_path):
    import_histories(store, written(tmp_path / "chats.json", OPENAI[:5]), format="openai")
    assert import_histories(store, written(tmp_path / "chats.json", OPENAI), format="openai").messages == 2
    other = [*OPENAI[:1], {"role": "user", "content": "Another question"}, *OPENAI[2:], *OPENAI]
    with pytest.raises(ChatHistoryExistsError, match="'chats'"):
        import_histories(store, written(tmp_path / "chats.json", other), format="openai")
    assert said(store, "chats") == OPENAI_SAID


# ---------------------------------------------------------------------- llm


LLM_SAID = [
    ("system", "Be kind."),
    ("user", "Hi 👋"),
    ("assistant", "Hello!"),
    ("user", "What is the weather in Zürich?"),
    ("assistant", "weather({'city': 'Zürich'})"),
    ("tool", "weather -> 22 °C"),
    ("assistant", "It is 22 °C."),
    ("user", "What is this?", "image image/png"),
    ("assistant", "A dot."),
    ("user", "A fragment.\n\nHow long is it?"),
    ("assistant", "Long."),
]


@pytest.mark.parametrize("version", ["0_27", "0_36"])
def test_the_log_of_llm(store, tmp_path, version):
    file = shutil.copy(DATA / f"llm_{version}.sqlite", tmp_path / "logs.db")
    imported = import_histories(store, file, format="llm")
    by_title = {info.title: info for info in store.list_chat_histories().items}
    assert by_title.keys() == {"Hi 👋", "Another one"}
    first = by_title["Hi 👋"]
    assert said(store, first.chat_history_id) == LLM_SAID
    reply = store.retrieve_messages(first.chat_history_id)[2]
    usage = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
    assert (reply.meta["model"], reply.meta["usage"]) == ("scripted", usage)
    times = [each.created_at for each in store.list_messages(first.chat_history_id)]
    assert times == sorted(times)
    assert first.created_at == times[0] < times[-1] == first.updated_at
    (fault,) = imported.faults
    assert fault.chat_history_id == first.chat_history_id
    assert fault.description.endswith("has an attachment that is at a URL, not in the database. It was left out.")
    assert counts(import_histories(store, file, format="llm")) == (0, 0, imported.messages)


def test_an_answer_that_llm_was_given_again_is_a_branch(store, tmp_path):
    import_histories(store, shutil.copy(DATA / "llm_0_36.sqlite", tmp_path / "logs.db"), format="llm")
    (fork,) = (info for info in store.list_chat_histories(branches=True).items if "branch_of" in info.meta)
    source = fork.meta["branch_of"]
    assert fork.chat_history_id.startswith(f"{source}~")
    assert said(store, source) == [("user", "Another one"), ("assistant", "Hello again!")]
    assert said(store, fork.chat_history_id) == [("user", "Another one"), ("assistant", "Hello, too!")]


@pytest.mark.parametrize("version", ["0_27", "0_36"])
def test_no_odd_value_in_any_column_breaks_an_import_from_llm(memory, tmp_path, version):
    original = DATA / f"llm_{version}.sqlite"
    with closing(sqlite3.connect(original)) as connection:
        columns = [
            (table, column)
            for (table,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
            if "fts" not in table and "search" not in table and not table.startswith("_")
            for (column,) in connection.execute("SELECT name FROM pragma_table_info(?)", [table]).fetchall()
            if connection.execute(f'SELECT count("{column}") FROM "{table}"').fetchone()[0]
        ]
    odd_values = [None, 5, 1.5, b"\xff\x00", "", "x", "[1]", '{"text_ref": [5, {"fragment": "x"}], "name": 5}']
    for number, (table, column) in enumerate(columns):
        for odd in odd_values if number_of_examples(1) > 1 else odd_values[number % len(odd_values) :][:2]:
            file = shutil.copy(original, tmp_path / "logs.db")
            with closing(sqlite3.connect(file)) as connection, connection, suppress(sqlite3.IntegrityError):
                connection.execute(f'UPDATE OR IGNORE "{table}" SET "{column}" = ?', [odd])
            store = memory()
            import_histories(store, file, format="llm")
            for each in ids(store):
                store.retrieve_messages(each)


def test_a_database_of_something_else_is_not_a_log_of_llm(store, tmp_path):
    with pytest.raises(DamagedFileError, match="is not a database of the format llm"):
        import_histories(store, shutil.copy(DATA / "langchain.sqlite", tmp_path / "copy.db"), format="llm")
    with pytest.raises(DamagedFileError, match="cannot be read as an SQLite database"):
        import_histories(store, written(tmp_path / "x.json", [1] * 1000), format="llm")


# ---------------------------------------------------------------------- LlamaIndex as JSON, branches of the Agents SDK


def test_a_json_file_of_llama_index_is_the_same_as_its_database(store, target, tmp_path):
    imported = import_histories(store, DATA / "llama_index.json", format="llama-index")
    import_histories(target, shutil.copy(DATA / "llama_index.sqlite", tmp_path / "copy.db"), format="llama-index")
    assert (ids(store), imported.faults) == (["another", "user_456"], ())
    for each in ids(store):
        assert without_ids(store.retrieve_messages(each)) == without_ids(target.retrieve_messages(each))
    assert counts(import_histories(store, DATA / "llama_index.json", format="llama-index")) == (0, 0, 13)

    as_text = written(tmp_path / "text.json", (DATA / "llama_index.json").read_text(encoding="utf-8"))
    assert counts(import_histories(store, as_text, format="llama-index")) == (0, 0, 13)
    changed = json.loads((DATA / "llama_index.json").read_text(encoding="utf-8"))
    changed["store"]["another"] = changed["store"]["user_456"]  # a conversation that began anew under the same key
    with pytest.raises(ChatHistoryExistsError, match="'another'"):
        import_histories(store, written(tmp_path / "new.json", changed), format="llama-index")
    assert store.count_messages("another") == 2


def test_the_branches_of_an_advanced_session_are_histories_of_their_own(store, tmp_path):
    file = shutil.copy(DATA / "openai_agents_branches.sqlite", tmp_path / "copy.db")
    imported = import_histories(store, file, format="openai-agents")
    assert {each: [words[1] for words in said(store, each)] for each in ids(store)} == {
        "plain": ["Hi", "Hello!"],
        "user_456": [
            *("What is a fox?", "An animal.", "Where does it live?", "In woods.", "And in winter?", "There, too."),
            "Thanks.",
        ],
        "user_456~diet": ["What is a fox?", "An animal.", "What does it eat?", "Mice.", "Only mice?", "Berries, too."],
        "user_456~plants": ["What is a fox?", "An animal.", "What does it eat?", "Mice.", "And grass?", "No."],
    }
    assert store.get_chat_history("user_456~diet").meta == {"branch_of": "user_456"}
    assert imported.faults == ()
    assert counts(import_histories(store, file, format="openai-agents")) == (0, 0, imported.messages)


def test_a_branch_with_the_id_of_another_session_is_not_joined_to_it(store, tmp_path):
    file = shutil.copy(DATA / "openai_agents_branches.sqlite", tmp_path / "copy.db")
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("UPDATE agent_messages SET session_id = 'user_456~diet' WHERE session_id = 'plain'")
    imported = import_histories(store, file, format="openai-agents")
    assert [words[1] for words in said(store, "user_456~diet")] == ["Hi", "Hello!"]
    assert faults_of(imported) == ["A branch was left out: another session or branch has its id 'user_456~diet'."]


@pytest.mark.parametrize("column", ["session_id", "branch_id", "message_id", "sequence_number"])
@pytest.mark.parametrize("odd", [5, 1.5, "", "x", b"\xff\x00", "a\0b", "x" * 600])
def test_no_odd_branch_breaks_an_import(store, tmp_path, column, odd):
    file = shutil.copy(DATA / "openai_agents_branches.sqlite", tmp_path / "copy.db")
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute(f"UPDATE message_structure SET {column} = ? WHERE branch_id = 'diet'", [odd])
    import_histories(store, file, format="openai-agents")
    assert [words[1] for words in said(store, "user_456~plants")][-1] == "No."
    assert store.count_messages("plain") == 2


def test_rows_that_belong_to_no_branch_are_reported(store, tmp_path):
    file = shutil.copy(DATA / "openai_agents_branches.sqlite", tmp_path / "copy.db")
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("DELETE FROM message_structure WHERE message_id IN (12, 13)")
    imported = import_histories(store, file, format="openai-agents")
    (fault,) = imported.faults
    assert (fault.chat_history_id, fault.description) == ("user_456", "2 rows belong to no branch, and were left out.")


# ---------------------------------------------------------------------- damaged files


GOOD = {
    "chatgpt": [chatgpt_conversation()[0]],
    "claude": claude_export(*CLAUDE_TREE),
    "openai": [{"messages": OPENAI}],
}
WRONG = ["", "{", "[1, 2", '[{"a": 1}]', '{"messages": 5}', "5", "null", '[[["x"]]]', '"text"', "[" * 100_000, "[1}"]


@pytest.mark.parametrize("program", GOOD)
@pytest.mark.parametrize("text", WRONG)
def test_what_is_not_such_a_file_is_refused(store, tmp_path, program, text):
    file = tmp_path / "c.json"
    file.write_text(text, encoding="utf-8")
    if text == "":
        assert counts(import_histories(store, file, format=program)) == (0, 0, 0)
        return
    with pytest.raises(DamagedFileError, match=f"cannot be read as a file of the format {program}"):
        import_histories(store, file, format=program)


@pytest.mark.parametrize("program", GOOD)
def test_an_integer_of_millions_of_digits_is_refused_before_it_is_parsed(store, tmp_path, program):
    (tmp_path / "c.json").write_text(f"[{'7' * 3_000_000}]")
    with pytest.raises(DamagedFileError, match="more than 4,300 digits"):
        import_histories(store, tmp_path / "c.json", format=program)


@pytest.mark.parametrize("program", GOOD)
def test_a_file_that_was_cut_off_is_refused_whole(store, tmp_path, program):
    text = json.dumps(GOOD[program] * 50).encode()
    for end in (len(text) - 1, len(text) // 2, 100):
        (tmp_path / "c.json").write_bytes(text[:end])
        with pytest.raises(DamagedFileError, match=r"was cut off|not JSON"):
            import_histories(store, tmp_path / "c.json", format=program)
    (tmp_path / "c.json").write_bytes(text + b" [")
    with pytest.raises(DamagedFileError, match="more text after its end"):
        import_histories(store, tmp_path / "c.json", format=program)
    (tmp_path / "c.json").write_bytes(b"[\xff\xfe]")
    with pytest.raises(DamagedFileError, match="not UTF-8"):
        import_histories(store, tmp_path / "c.json", format=program)
    assert ids(store) == []


@pytest.mark.parametrize("as_lines", [True, False])
def test_a_file_is_read_piece_by_piece_whatever_lies_across_two_pieces(store, tmp_path, as_lines):
    texts = ["ü" * length for length in (1, 65_530, 200_000, 3, 65_536, 1_000_000, 7)]
    entries = [{"messages": [{"role": "user", "content": text, "weight": 0.125}]} for text in texts]
    lines = (json.dumps(entry, ensure_ascii=False) for entry in entries)
    text = "\n".join(lines) if as_lines else json.dumps(entries, ensure_ascii=False)
    (tmp_path / "c.json").write_text(text, encoding="utf-8")
    assert import_histories(store, tmp_path / "c.json", format="openai").messages == len(texts)
    assert [store.retrieve_messages(f"c/{number}")[0].text for number in range(1, 8)] == texts


def test_conversations_with_the_same_id_are_not_joined(store, tmp_path):
    other, _ = chatgpt_conversation()
    other["mapping"] = {"x": node("x", None, "user", "Another")}
    file = written(tmp_path / "c.json", [chatgpt_conversation()[0], {**other, "current_node": "x"}])
    imported = import_histories(store, file, format="chatgpt")
    assert said(store, "conversation-1")[-1] == ("assistant", "An animal.")
    assert "Another conversation with the same id was left out." in faults_of(imported)


ODD = [None, True, 5, 1e300, -1e18, "", "\ud800", [], {}, [[1]], {"id": {}}, "x" * 2000]


def places(value, path=()):
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


@pytest.mark.parametrize("program", GOOD)
def test_no_odd_value_in_any_place_breaks_an_import(memory, tmp_path, program):
    good = GOOD[program]
    for number, path in enumerate(places(good)):
        if not path:
            continue
        for odd in ODD if number_of_examples(1) > 1 else ODD[number % len(ODD) :][:2]:
            changed = copy.deepcopy(good)
            place = changed
            for step in path[:-1]:
                place = place[step]
            place[path[-1]] = odd
            store = memory()
            try:
                import_histories(store, written(tmp_path / "c.json", changed), format=program)
            except DamagedFileError:
                assert ids(store) == []


# ---------------------------------------------------------------------- from a program of one's own


WHEN = [datetime(2026, 1, 31, 8, minute, tzinfo=timezone.utc) for minute in range(10)]


def timed(messages):
    return list(zip(WHEN, messages, strict=False))


def import_async(*arguments, **options):
    return asyncio.run(import_messages_async(*arguments, **options))


@pytest.mark.parametrize("importing", [import_messages, import_async])
def test_a_program_imports_messages_with_their_times(store, importing):
    messages = timed(conversation("uaua"))
    assert importing(store, "user_456", messages, title="Foxes", meta={"source": "mine"}) == 4
    assert without_ids(store.retrieve_messages("user_456")) == without_ids([each for _, each in messages])
    assert [each.created_at for each in store.list_messages("user_456")] == WHEN[:4]
    info = store.get_chat_history("user_456")
    assert (info.title, info.meta, info.created_at, info.updated_at) == ("Foxes", {"source": "mine"}, WHEN[0], WHEN[3])
    assert importing(store, "user_456", messages) == 0
    assert importing(store, "user_456", timed([*(each for _, each in messages), *conversation("u")])) == 1
    with pytest.raises(ChatHistoryExistsError):
        importing(store, "user_456", timed(conversation("au")))
    assert store.count_messages("user_456") == 5


@pytest.mark.parametrize("importing", [import_messages, import_async])
def test_a_program_imports_what_a_user_said(store, importing):
    messages = timed(conversation("ua"))
    assert importing(store, "hers", messages, user_id="ada") == 2
    assert store.get_chat_history("hers").user_id == "ada"
    assert importing(store, "hers", messages, user_id="ada") == 0
    assert importing(store.for_user("ada"), "hers", timed(conversation("uau")), user_id="ada") == 1
    store.write_messages("without a user", conversation("u"))
    for history, where, user_id in (("hers", store, "bob"), ("hers", store.for_user("ada"), "bob")):
        with pytest.raises(ChatHistoryAccessError):
            importing(where, history, timed(conversation("uauau")), user_id=user_id)
    with pytest.raises(ChatHistoryAccessError):
        importing(store, "without a user", timed(conversation("uau")), user_id="ada")
    with pytest.raises(ValueError, match="user_id"):
        importing(store, "hers", messages, user_id="")
    assert (store.count_messages("hers"), store.count_messages("without a user")) == (3, 1)


def test_messages_keep_the_ids_that_they_have(store):
    messages = with_message_ids(conversation("ua"))
    import_messages(store, "user_456", timed(messages))
    assert store.retrieve_messages("user_456") == messages


@pytest.mark.parametrize(
    ("messages", "error", "match"),
    [
        ([(datetime(2026, 1, 31), conversation("u")[0])], ValueError, r"the time of messages\[0\] must be a datetime"),  # noqa: DTZ001
        ([(WHEN[0], "Hi")], ValueError, r"messages\[0\] must be a time and a ChatMessage"),
        (conversation("u"), ValueError, r"messages\[0\] must be a time and a ChatMessage"),
        (timed(with_message_ids(conversation("u")) * 2), DuplicateMessageError, r"messages\[1\] has the id of another"),
        ([(WHEN[0], user(number=10**5000))], MessageEncodingError, r"messages\[0\]"),
    ],
)
def test_wrong_messages_are_refused_and_nothing_is_imported(store, messages, error, match):
    with pytest.raises(error, match=match):
        import_messages(store, "user_456", messages)
    assert ids(store) == []


def test_a_history_without_messages_can_be_imported(store):
    assert import_messages(store, "user_456", [], title="Empty") == 0
    assert store.get_chat_history("user_456").title == "Empty"


def test_a_time_that_could_not_be_read_back_is_refused(store):
    for time in (
        datetime.max.replace(tzinfo=timezone(timedelta(hours=-14))),
        datetime.min.replace(tzinfo=timezone(timedelta(hours=14))),
    ):
        with pytest.raises(ValueError, match="years 1 to 9999"):
            import_messages(store, "user_456", [(time, user())])
        assert time_of(time.isoformat()) is None
    assert ids(store) == []
