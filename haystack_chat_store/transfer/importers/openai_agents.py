# SPDX-License-Identifier: Apache-2.0
"""
Sessions of the OpenAI Agents SDK (`SQLiteSession`): each row is an item of OpenAI's Responses API.

An `AdvancedSQLiteSession` has branches. The same table holds the rows of all of them, and the table `message_structure`
says which row belongs to which branch, in which order. The branch `main` becomes the history with the session's id,
each other one a history `{session}~{branch}`.

The items of one response (reasoning, text, tool calls) become one message, in the form of Haystack's
`OpenAIResponsesChatGenerator`.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from haystack.dataclasses import ChatMessage, ChatRole, ReasoningContent, TextContent, ToolCall, ToolCallResult

from haystack_chat_store.ids import BRANCH_OF_KEY, branch_id
from haystack_chat_store.json_values import encode_meta
from haystack_chat_store.transfer.histories import Faults, Histories
from haystack_chat_store.transfer.importers import parts
from haystack_chat_store.transfer.importers.conversations import Report
from haystack_chat_store.transfer.importers.database import ForeignDatabase, ForeignMessage, ForeignRow, Layout
from haystack_chat_store.types import Fault

_ROLES = {
    "user": ChatRole.USER,
    "assistant": ChatRole.ASSISTANT,
    "system": ChatRole.SYSTEM,
    "developer": ChatRole.SYSTEM,
}


def _messages(rows: Iterable[ForeignRow], report: Report) -> Iterator[ForeignMessage]:
    calls: dict[str, ToolCall] = {}
    response = _Response()
    for row in rows:
        kind = row.data.get("type", "message")
        role = _ROLES.get(parts.text_in(row.data, "role"))
        if kind == "reasoning":
            added: list[Any] = [_reasoning(row.data)]
        elif kind == "function_call":
            call = _call(row.data)
            calls[parts.text_in(row.data, "call_id")] = call
            added = [call]
        elif kind == "message" and role is ChatRole.ASSISTANT:
            added = _content(row, report, is_assistant=True)
        elif kind == "message" and role is not None:
            yield from response.finish()
            content = _content(row, report)
            if content:
                meta = parts.unused_fields(row.data, ("type", "role", "content"))
                yield ForeignMessage(row, ChatMessage(role, content, None, meta))
            continue
        elif kind == "function_call_output":
            yield from response.finish()
            yield ForeignMessage(row, ChatMessage(ChatRole.TOOL, [_result(row, calls, report)]))
            continue
        else:
            report(f"Row {row.key} was left out: there is no message for an item of the type {parts.shown_kind(kind)}.")
            continue
        if kind != "function_call" and response.is_complete:
            yield from response.finish()
        response.add(row, added)
    yield from response.finish()


class _Response:
    """The items of one response of the model."""

    def __init__(self) -> None:
        self._rows: list[ForeignRow] = []
        self._content: list[Any] = []
        self._refusals: list[str] = []

    @property
    def is_complete(self) -> bool:
        """Whether it has text and no tool calls. The next item then belongs to another response."""
        kinds = {type(part) for part in self._content}
        return (TextContent in kinds or bool(self._refusals)) and ToolCall not in kinds

    def add(self, row: ForeignRow, content: list[Any]) -> None:
        self._rows.append(row)
        self._content += content
        if row.data.get("role") == "assistant":
            self._refusals += parts.refusals_in(row.data.get("content"))

    def finish(self) -> Iterator[ForeignMessage]:
        """Yield the response as a message, unless it is empty, and begin the next response."""
        if self._content or self._refusals:
            meta: dict[str, Any] = {}
            for row in self._rows:
                if row.data.get("role") == "assistant":
                    meta.update(parts.unused_fields(row.data, ("type", "role", "content")))
            meta |= parts.refusal_meta(self._refusals)
            yield ForeignMessage(self._rows[-1], ChatMessage(ChatRole.ASSISTANT, self._content, None, meta))
        self._rows, self._content, self._refusals = [], [], []


def _reasoning(item: dict[str, Any]) -> ReasoningContent:
    text = parts.texts_of(parts.objects_in(item, "summary")) or parts.texts_of(parts.objects_in(item, "content"))
    return ReasoningContent(text, {key: value for key, value in item.items() if key != "summary"})


def _call(item: dict[str, Any]) -> ToolCall:
    call_id = item.get("call_id")
    return ToolCall(
        parts.text_in(item, "name"),
        parts.arguments_of(item.get("arguments")),
        parts.text_in(item, "id") or parts.text_or_none(call_id),
        {"call_id": call_id},
    )


def _result(row: ForeignRow, calls: dict[str, ToolCall], report: Report) -> ToolCallResult:
    call_id, output = row.data.get("call_id"), row.data.get("output")
    origin = parts.answered_call(calls, call_id, None)
    if origin.extra is None:
        origin = ToolCall(origin.tool_name, origin.arguments, origin.id, {"call_id": call_id})
    if not isinstance(output, list):
        return ToolCallResult(parts.as_text(output), origin, error=False)
    return ToolCallResult(parts.one_text_or_parts(_parts(output, row.key, report)), origin, error=False)


def _content(row: ForeignRow, report: Report, *, is_assistant: bool = False) -> list[Any]:
    content = row.data.get("content")
    if is_assistant:
        content = parts.without_refusals(content)
    return (
        [TextContent(content)]
        if isinstance(content, str)
        else _parts(content if isinstance(content, list) else [], row.key, report)
    )


def _parts(content: list[Any], key: int, report: Report) -> list[Any]:
    made = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        found: Any = None
        if kind in ("input_text", "output_text", "text") and isinstance(part.get("text"), str):
            found = TextContent(part["text"])
        elif kind == "input_image":
            found = parts.image_from_url(part.get("image_url"), part.get("detail"))
        elif kind == "input_file":
            found = parts.file_from_base64(part.get("file_data"), None, part.get("filename"))
        elif kind == "input_audio":
            audio = parts.object_in(part, "input_audio")
            found = parts.file_from_base64(audio.get("data"), f"audio/{parts.text_in(audio, 'format') or 'mpeg'}")
        if found is None:
            name = parts.shown_kind(kind)
            report(f"Row {key} has a part of the type {name} without content of its own. It was left out.")
        else:
            made.append(found)
    return made


class AgentsDatabase(ForeignDatabase):
    """The database of the Agents SDK, with branches or without."""

    def _find_tables(self) -> list[str]:
        tables = super()._find_tables()
        self._has_branches = {"session_id", "message_id", "branch_id", "sequence_number"} <= self._columns(_STRUCTURE)
        # The session and the branch that each history is made of.
        self._branches: dict[str, tuple[str, str]] = {}
        # Branches whose history would have the id of another session or branch.
        self._clashes: list[tuple[str, str]] = []
        return [*tables, _STRUCTURE] if self._has_branches else tables

    def histories(self, faults: Faults) -> Histories:
        """Yield each session, or each of its branches, as a history. Report rows that belong to no branch."""
        yield from super().histories(faults)
        for session, clash in self._clashes:
            description = f"A branch was left out: another session or branch has its id {clash!r}."
            faults.add(Fault(chat_history_id=session, description=description))
        if not self._has_branches:
            return
        for session, count in self._query(
            f"SELECT session_id, count(*) FROM {self._table} AS messages "  # noqa: S608  (quoted)
            f"WHERE session_id IN (SELECT session_id FROM {_STRUCTURE}) "
            f"AND id NOT IN (SELECT message_id FROM {_STRUCTURE}) GROUP BY session_id ORDER BY session_id"
        ):
            rows = "1 row belongs" if count == 1 else f"{count:,} rows belong"
            description = f"{rows} to no branch, and {'was' if count == 1 else 'were'} left out."
            faults.add(Fault(chat_history_id=session, description=description))

    def _history_rows(self) -> Iterator[tuple[Any, ...]]:
        """
        Yield a row for each branch of each session, because each becomes a history of its own.

        Remember in `_branches` what each history is made of, for `_stored`. A branch whose history's id is taken is
        left out, and noted in `_clashes`.
        """
        if not self._has_branches:
            yield from super()._history_rows()
            return
        for session, first, last, _ in super()._history_rows():
            branches = [
                branch
                for (branch,) in self._query(
                    f"SELECT branch_id FROM {_STRUCTURE} WHERE session_id = ? "  # noqa: S608  (a constant)
                    "GROUP BY branch_id ORDER BY branch_id <> 'main', min(id)",
                    session,
                )
            ]
            for branch in branches:
                chat_history_id = session if branch == _MAIN else branch_id(session, branch)
                if branch != _MAIN and (self._is_session(chat_history_id) or chat_history_id in self._branches):
                    self._clashes.append((session, chat_history_id))
                    continue
                self._branches[chat_history_id] = session, branch
                yield chat_history_id, first, last, None if branch == _MAIN else encode_meta({BRANCH_OF_KEY: session})
            if not branches:
                yield session, first, last, None

    def _is_session(self, name: str) -> bool:
        found = self._query(f"SELECT 1 FROM {self._table} WHERE session_id = ? LIMIT 1", name)  # noqa: S608  (quoted)
        return next(found, None) is not None

    def _stored(self, chat_history_id: str) -> Iterator[tuple[Any, ...]]:
        if chat_history_id not in self._branches:
            return super()._stored(chat_history_id)
        return self._query(
            f"SELECT messages.id, message_data, messages.created_at FROM {_STRUCTURE} AS structure "  # noqa: S608
            f"JOIN {self._table} AS messages ON messages.id = message_id "
            "WHERE structure.session_id = ? AND branch_id = ? ORDER BY sequence_number",
            *self._branches[chat_history_id],
        )


_STRUCTURE, _MAIN = "message_structure", "main"
LAYOUT = Layout("openai-agents", "agent_messages", "session_id", "message_data", "created_at", _messages)
