# SPDX-License-Identifier: Apache-2.0
"""
Logs of Simon Willison's `llm`: its database `logs.db`.

Version 0.36 keeps conversations as trees of messages (`threads`, `turns`, `messages`, `parts`). Before it, each answer
was a row with the prompt that led to it (`conversations`, `responses`). One file may have both, of different times.
What the tables hold is in `llm/migrations.py` and `llm/logs.py`.
"""

import base64
import json
import sqlite3
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

from haystack.dataclasses import ChatMessage, ChatRole, ReasoningContent, TextContent, ToolCall, ToolCallResult

from haystack_chat_store.errors import DamagedFileError
from haystack_chat_store.json_values import parse_json
from haystack_chat_store.transfer.histories import Faults, Histories
from haystack_chat_store.transfer.importers import parts
from haystack_chat_store.transfer.importers.conversations import (
    Conversation,
    ImportedMessage,
    Report,
    branch_of,
    history_of,
    time_of,
)
from haystack_chat_store.transfer.importers.database import ReadOnlyDatabase
from haystack_chat_store.transfer.importers.trees import Branch, branches_of
from haystack_chat_store.transfer.seen_ids import SeenIds
from haystack_chat_store.types import Fault

_LIBRARY = "llm"
# Tables with what belongs to the messages and answers.
_LINKED_TABLES = (
    "attachments",
    "fragments",
    "prompt_attachments",
    "prompt_fragments",
    "system_fragments",
    "tool_calls",
    "tool_results",
    "tool_results_attachments",
)
_ROLES = {
    "user": ChatRole.USER,
    "assistant": ChatRole.ASSISTANT,
    "system": ChatRole.SYSTEM,
    "tool": ChatRole.TOOL,
}


class LlmDatabase(ReadOnlyDatabase):
    """The database of `llm`, of any version since conversations have a table."""

    def message_count(self) -> int | None:
        """Return `None`: the number of messages is not known before they are converted."""
        return None

    def histories(self, faults: Faults) -> Histories:
        """
        Yield each conversation, and each other branch of it, as a history.

        :param faults: Receives what is left out.
        """
        with SeenIds() as ids:
            for conversation in chain(self._threads(faults), self._conversations()):
                if not ids.add(conversation.chat_history_id):
                    description = "What an earlier version of llm logged under the same id was left out."
                    faults.add(Fault(chat_history_id=conversation.chat_history_id, description=description))
                elif (history := history_of(_LIBRARY, conversation, faults)) is not None:
                    yield history

    def _find_tables(self) -> list[str]:
        self._connection.row_factory = sqlite3.Row
        tables = ("threads", "turns", "messages", "parts", "conversations", "responses")
        has = {table: bool(self._columns(table)) for table in tables}
        self._has_threads = all(has[table] for table in tables[:4])
        self._has_conversations = all(has[table] for table in tables[4:])
        if not (self._has_threads or self._has_conversations):
            raise DamagedFileError(f"{self._name} is not a database of the format llm: it has no table conversations.")
        return [table for table in (*tables, *_LINKED_TABLES) if self._columns(table)]

    def _rows(self, sql: str, *values: Any) -> list[dict[str, Any]]:
        """Return the rows of a query. What should be text is text, whatever type a damaged row gives it."""
        return [{name: _readable(value) for name, value in dict(row).items()} for row in self._query(sql, *values)]

    # ------------------------------------------------------------------ trees of messages

    def _threads(self, faults: Faults) -> Iterator[Conversation]:
        if not self._has_threads:
            return
        for thread in self._rows("SELECT * FROM threads ORDER BY id"):
            turns = self._rows("SELECT * FROM turns WHERE thread_id = ? ORDER BY datetime_utc, id", thread["id"])
            nodes = self._nodes({thread["tip_message_hash"], *(turn["tip_message_hash"] for turn in turns)})
            tree = branches_of({key: node["parent_hash"] for key, node in nodes.items()}, thread["tip_message_hash"])
            for key in tree.broken:
                description = f"Message {key} was left out: its path to the first message is broken."
                faults.add(Fault(chat_history_id=thread["id"], description=description))
            for branch in tree.branches:
                conversation = Conversation(
                    thread["id"],
                    self._messages_of(branch, nodes, turns),
                    created_at=time_of(turns[0]["datetime_utc"]) if turns else None,
                    updated_at=time_of(turns[-1]["datetime_utc"]) if turns else None,
                    title=thread["name"],
                    meta=parts.unused_fields(
                        {"model": turns[-1]["model"] if turns else None, "forked_from": thread["forked_from"]}, ()
                    ),
                )
                yield conversation if branch.own_key is None else branch_of(conversation, branch.own_key)

    def _nodes(self, tips: set[str | None]) -> dict[str, dict[str, Any]]:
        """Return the messages that lead to some messages, in the order in which they were stored."""
        found = self._rows(
            "WITH RECURSIVE path (hash) AS (SELECT value FROM json_each(?) UNION "
            "SELECT parent_hash FROM messages JOIN path USING (hash) WHERE parent_hash IS NOT NULL) "
            "SELECT * FROM messages WHERE hash IN path ORDER BY rowid",
            json.dumps([tip for tip in tips if tip]),
        )
        return {row["hash"]: row for row in found}

    def _messages_of(
        self, branch: Branch, nodes: dict[str, dict[str, Any]], turns: list[dict[str, Any]]
    ) -> Callable[[Report], Iterator[ImportedMessage]]:
        return lambda report: self._messages(branch, nodes, turns, report)

    def _messages(
        self, branch: Branch, nodes: dict[str, dict[str, Any]], turns: list[dict[str, Any]], report: Report
    ) -> Iterator[ImportedMessage]:
        by_tip = {turn["tip_message_hash"]: turn for turn in reversed(turns)}
        # A message was said in the first turn whose answer comes after it.
        turn_of: dict[str, dict[str, Any]] = {}
        turn: dict[str, Any] | None = None
        for key in reversed(branch.keys):
            turn = by_tip.get(key, turn)
            turn_of.update({key: turn} if turn else {})
        calls: dict[str, ToolCall] = {}
        for key in branch.keys:
            turn = turn_of.get(key, {})
            role = _ROLES.get(nodes[key]["role"])
            if role is None:
                report(f"Message {key} was left out: there is no role for {parts.shown_kind(nodes[key]['role'])}.")
                continue
            read = self._parts(key, calls, report)
            meta = self._usage(turn) if key in by_tip else {}
            if metadata := _parsed(nodes[key]["provider_metadata"]):
                meta["provider_metadata"] = metadata
            for number, (said_by, content) in enumerate(_in_messages(role, read)):
                message = ChatMessage(said_by, content, None, dict(meta) if said_by is role else {})
                yield ImportedMessage(f"{key}:{number}" if number else key, message, time_of(turn.get("datetime_utc")))

    def _parts(self, key: str, calls: dict[str, ToolCall], report: Report) -> list[Any]:
        read: list[Any] = []
        for row in self._rows("SELECT * FROM parts WHERE message_hash = ? ORDER BY position", key):
            payload = _parsed(row["payload"])
            text = row["text"] if row["text"] is not None else self._text(payload)
            extra = payload.get("provider_metadata")
            kind = row["type"]
            if kind == "text":
                read += [TextContent(text)] if text else []
            elif kind == "reasoning":
                rest = parts.unused_fields(payload, ("text", "text_ref"))
                read += (
                    [ReasoningContent(text, rest)] if text or extra else []
                )  # without both, it only says there was some
            elif kind == "tool_call":
                call = ToolCall(
                    parts.text_in(payload, "name"),
                    parts.arguments_of(payload.get("arguments")),
                    parts.text_or_none(payload.get("tool_call_id")),
                    {"provider_metadata": extra} if extra else None,
                )
                calls.update({call.id: call} if call.id else {})
                read.append(call)
            elif kind == "tool_result":
                origin = parts.answered_call(calls, payload.get("tool_call_id"), payload.get("name"))
                ids = [parts.text_in(each, "id") for each in parts.objects_in(payload, "attachments")]
                read.append(self._result(key, origin, payload.get("output"), payload.get("exception"), ids, report))
            elif kind == "attachment":
                read += self._attachments(key, [parts.text_in(parts.object_in(payload, "attachment"), "id")], report)
            else:
                report(f"Message {key} has a part of the type {parts.shown_kind(kind)}. It was left out.")
        return read

    def _text(self, payload: dict[str, Any]) -> str:
        """Return the text of a part that borrows from fragments."""
        said = [
            parts.text_in(piece, "literal")
            if "literal" in piece
            else "".join(
                row["content"] or ""
                for row in self._rows("SELECT content FROM fragments WHERE id = ?", piece.get("fragment"))
            )
            for piece in parts.objects_in(payload, "text_ref")
        ]
        return "".join(said) or parts.text_in(payload, "text")

    # ------------------------------------------------------------------ answers with their prompts

    def _conversations(self) -> Iterator[Conversation]:
        if not self._has_conversations:
            return
        for row in self._rows(
            "SELECT conversations.id, name, conversations.model, min(datetime_utc) AS first, max(datetime_utc) AS last "
            "FROM conversations JOIN responses ON conversation_id = conversations.id "
            "GROUP BY conversations.id ORDER BY conversations.id"
        ):
            yield Conversation(
                row["id"],
                self._answers_of(row["id"]),
                created_at=time_of(row["first"]),
                updated_at=time_of(row["last"]),
                title=row["name"],
                meta={"model": row["model"]},
            )

    def _answers_of(self, conversation_id: str) -> Callable[[Report], Iterator[ImportedMessage]]:
        return lambda report: self._answers(conversation_id, report)

    def _answers(self, conversation_id: str, report: Report) -> Iterator[ImportedMessage]:
        calls: dict[str, ToolCall] = {}
        system = None
        # By rowid, because ids of early versions do not rise within a millisecond.
        for row in self._rows("SELECT * FROM responses WHERE conversation_id = ? ORDER BY rowid", conversation_id):
            key, moment = row["id"], time_of(row["datetime_utc"])
            instruction = self._with_fragments("system_fragments", key, row["system"])
            if instruction and instruction != system:
                yield ImportedMessage(f"{key}:system", ChatMessage.from_system(instruction), moment)
            system = instruction
            for number, result in enumerate(self._linked("tool_results", key)):
                ids = self._attachment_ids("tool_results_attachments", "tool_result_id", result["id"])
                origin = parts.answered_call(calls, result["tool_call_id"], result["name"])
                answer = self._result(key, origin, result["output"], result.get("exception"), ids, report)
                yield ImportedMessage(f"{key}:result:{number}", ChatMessage(ChatRole.TOOL, [answer]), moment)
            text = self._with_fragments("prompt_fragments", key, row["prompt"])
            attached = self._attachment_ids("prompt_attachments", "response_id", key)
            said = [*([TextContent(text)] if text else []), *self._attachments(key, attached, report)]
            if said:
                yield ImportedMessage(f"{key}:prompt", ChatMessage(ChatRole.USER, said), moment)
            yield ImportedMessage(key, self._answer(row, calls), moment)

    def _answer(self, row: dict[str, Any], calls: dict[str, ToolCall]) -> ChatMessage:
        content: list[Any] = [ReasoningContent(row["reasoning"])] if row.get("reasoning") else []
        content += [TextContent(row["response"])] if row["response"] else []
        for each in self._linked("tool_calls", row["id"]):
            call = ToolCall(each["name"] or "", parts.arguments_of(each["arguments"]), each["tool_call_id"])
            calls.update({call.id: call} if call.id else {})
            content.append(call)
        return ChatMessage(ChatRole.ASSISTANT, content, None, self._usage(row))

    def _with_fragments(self, table: str, response_id: str, text: str | None) -> str:
        """Return a prompt as the model was given it: its fragments first, as `llm` joins them."""
        fragments = []
        if self._columns(table):
            fragments = self._rows(
                f"SELECT content FROM {table} JOIN fragments ON fragments.id = fragment_id "  # noqa: S608  (a constant)
                'WHERE response_id = ? ORDER BY "order"',
                response_id,
            )
        return "\n".join(filter(None, [*(row["content"] for row in fragments), text]))

    def _linked(self, table: str, response_id: str) -> list[dict[str, Any]]:
        if not self._columns(table):
            return []
        return self._rows(f"SELECT * FROM {table} WHERE response_id = ? ORDER BY id", response_id)  # noqa: S608

    def _attachment_ids(self, table: str, column: str, value: Any) -> list[str]:
        if not self._columns(table):
            return []
        found = self._rows(f'SELECT attachment_id FROM {table} WHERE {column} = ? ORDER BY "order"', value)  # noqa: S608
        return [row["attachment_id"] for row in found]

    # ------------------------------------------------------------------ both

    def _usage(self, turn: dict[str, Any]) -> dict[str, Any]:
        """Return the model and the usage of an answer where Haystack's generators keep them."""
        counts = (turn.get("input_tokens"), turn.get("output_tokens"))
        sent, received = (count if isinstance(count, int) else None for count in counts)
        usage = parts.unused_fields({"prompt_tokens": sent, "completion_tokens": received}, ())
        if sent is not None and received is not None:
            usage["total_tokens"] = sent + received
        return parts.unused_fields({"model": turn.get("resolved_model") or turn.get("model"), "usage": usage}, ())

    def _result(
        self, key: str, origin: ToolCall, output: Any, exception: Any, attachment_ids: list[str], report: Report
    ) -> ToolCallResult:
        attached = self._attachments(key, attachment_ids, report)
        said = parts.as_text("" if output is None else output)
        return ToolCallResult([TextContent(said), *attached] if attached else said, origin, error=bool(exception))

    def _attachments(self, key: str, attachment_ids: list[str], report: Report) -> list[Any]:
        read: list[Any] = []
        for attachment_id in attachment_ids:
            found = self._rows("SELECT type, path, url FROM attachments WHERE id = ?", attachment_id)
            row = found[0] if found else {}
            kind = row.get("type") or ""
            contents = self._query("SELECT content FROM attachments WHERE id = ?", attachment_id)
            (content,) = next(contents, (None,))
            if not isinstance(content, bytes) or not content:
                where = "at a URL" if row.get("url") else "in a file" if row.get("path") else "missing"
                report(f"Message {key} has an attachment that is {where}, not in the database. It was left out.")
                continue
            data = base64.b64encode(content).decode()
            if kind.startswith("image/"):
                read.append(parts.image_from_base64(data, kind))
            else:
                read.append(parts.file_from_base64(data, kind or None))
        return read


def _readable(value: Any) -> Any:
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value


def _parsed(text: Any) -> dict[str, Any]:
    try:
        found = parse_json(text) if text else {}
    except (ValueError, TypeError, RecursionError):
        found = {}
    return found if isinstance(found, dict) else {}


def _in_messages(role: ChatRole, read: list[Any]) -> Iterator[tuple[ChatRole, list[Any]]]:
    """
    Yield what a message becomes. A model that calls tools at its provider says calls and results in one message.
    """
    said: list[Any] = []
    for part in read:
        if isinstance(part, ToolCallResult) and role is not ChatRole.TOOL:
            if said:
                yield role, said
            yield ChatRole.TOOL, [part]
            said = []
        else:
            said.append(part)
    if said:
        yield role, said
