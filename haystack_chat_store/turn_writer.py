# SPDX-License-Identifier: Apache-2.0
"""Writes the messages of a turn, and says what the history has of it afterwards."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count

from haystack.dataclasses import ChatMessage, ChatRole
from haystack.document_stores.types import DuplicatePolicy

from haystack_chat_store import protocol
from haystack_chat_store.conversation.rounds import round_count
from haystack_chat_store.conversation.turns import (
    answer_of,
    is_whole,
    last_question,
    turn_of,
    validate_question,
    with_message_ids,
)
from haystack_chat_store.errors import ChatHistoryChangedError, DuplicateMessageError, MessageNotFoundError
from haystack_chat_store.ids import (
    MESSAGE_ID_KEY,
    QUESTION_ID_KEY,
    is_reply_id_instead_of,
    message_id_of,
    question_id_of,
    reply_id,
)
from haystack_chat_store.store_requests import (
    HasMessage,
    Requests,
    Retrieve,
    Write,
    append_answer,
    read_until,
    replace_keeping_others,
    run,
    run_async,
)
from haystack_chat_store.types import ChatMessageStore
from haystack_chat_store.validation import usable_id_of, validated_id, validated_policy


@dataclass(frozen=True, kw_only=True)
class WrittenTurn:
    """
    What a history has of a turn after it was written.

    :param messages_written: The number of messages that were written now.
    :param messages: The batch as the history has it, with ids. System messages that the store skips stand among them.
    :param replies: The replies of the batch as the history has them. If the question was answered before, this answer.
    """

    messages_written: int
    messages: list[ChatMessage]
    replies: list[ChatMessage]


class TurnWriter:
    """
    Writes the messages of a turn so that a turn that is sent again is stored once.

    What answers a question names it in `meta["chat_question_id"]`, and has an id that is made from the question's id
    and its number in the turn. So a second answer to the same question has the id of the first, and the store skips it.
    """

    def __init__(
        self,
        store: ChatMessageStore,
        policy: DuplicatePolicy,
        expected_revision: int | None = None,
        replace_from_message_id: str | None = None,
        *,
        question_is_stored: bool = False,
    ) -> None:
        """
        Keep the store and the options of the write.

        :param store: The store that keeps the histories.
        :param policy: Decides about messages whose ids the history already has.
        :param expected_revision: The revision that the history must have. Defaults to `None`: any revision.
        :param replace_from_message_id: The id of a message. It is taken back with all messages after it, and the turn
            takes their place, in one step. Defaults to `None`: the turn is appended.
        :param question_is_stored: Whether the turn is refused if the history does not have its question. Defaults to
            False.
        :raises ValueError: If the store does not take one of the options.
        """
        self._store = store
        self._policy = policy
        self._question_is_stored = question_is_stored
        self._expected_revision = expected_revision
        self._is_skipping = validated_policy(policy) is DuplicatePolicy.SKIP
        self._options = protocol.write_options(store, policy, expected_revision)
        self._replaced_id: str | None = None
        if replace_from_message_id is not None:
            self._replaced_id = validated_id(replace_from_message_id, "replace_from_message_id")
            protocol.validate_replaces(store)
            if not self._is_skipping:
                raise ValueError("replace_from_message_id cannot be given with another policy than SKIP.")

    def write(
        self, chat_history_id: str, messages: Sequence[ChatMessage], replies: Sequence[ChatMessage]
    ) -> WrittenTurn:
        """
        Write the messages of a turn, then the replies.

        :param chat_history_id: The history's id.
        :param messages: The messages of this turn, oldest first. They are not changed.
        :param replies: The replies to them. They are not changed.
        :raises ValueError: If an argument is wrong, or the question says nothing. Nothing was written.
        :raises MessageNotFoundError: If the message to take back, or the question that must be stored, is not there.
            Nothing was written.
        :raises ConflictError: If the options forbid the write. Nothing was written.
        :raises ChatMessageStoreError: If the store fails.
        """
        return run(self._requests(messages, replies), self._store, chat_history_id)

    async def write_async(
        self, chat_history_id: str, messages: Sequence[ChatMessage], replies: Sequence[ChatMessage]
    ) -> WrittenTurn:
        """Do what `write` does, without blocking the event loop."""
        return await run_async(self._requests(messages, replies), self._store, chat_history_id)

    def _requests(self, messages: Sequence[ChatMessage], replies: Sequence[ChatMessage]) -> Requests[WrittenTurn]:
        validate_question(messages, "messages")
        if self._replaced_id is not None:
            return (yield from self._replacing_requests(messages, replies, self._replaced_id))
        turn = yield from self._stored_turn(messages, replies)
        if self._is_skipping:
            messages = [_known(message, turn) for message in messages]
            answer = answer_of(turn)
            said = {id(message) for message in messages if message.role is not ChatRole.SYSTEM}
            if replies and answer is not None and said <= set(map(id, turn)) and not any(map(message_id_of, replies)):
                return WrittenTurn(messages_written=0, messages=[*messages, answer], replies=[answer])

        given, answers = self._identified(messages, replies, turn)
        ids = {message_id_of(message) for message in [*given, *answers] if not self._is_skipped(message)}
        written = yield from self._append([*given, *answers])
        self._options = protocol.write_options(self._store, self._policy, None)  # of a further write
        if written >= len(ids):
            return WrittenTurn(messages_written=written, messages=[*given, *answers], replies=answers)

        while True:
            page = yield from _page_with(ids, round_count(given))
            stored = {message_id_of(message): message for message in page}
            _check_roles(given, stored)
            turn = _turn_of_reply(page, answers)
            answer = answer_of(turn)
            skipped = [each for each in answers if stored.get(message_id_of(each), each)._content != each._content]
            if not skipped or answer is not None or not turn:
                break
            # A step of the turn has the id, such as a call whose tool the application ran. The reply comes after it.
            question_id = message_id_of(turn[0]) or ""
            free = (number for number in count(len(turn) - 1) if reply_id(question_id, number) not in stored)
            moved = {id(reply): _answering(reply, question_id, next(free)) for reply in skipped}
            answers = [moved.get(id(reply), reply) for reply in answers]
            ids.update(map(message_id_of, answers))
            written += yield from self._append(list(moved.values()))
        stored_answers = [stored.get(message_id_of(reply), reply) for reply in answers]
        if skipped and answer is not None:
            stored_answers = [answer]
        return self._written(written, given, stored_answers, stored)

    def _append(self, batch: list[ChatMessage]) -> Requests[int]:
        """
        Append a batch. If its question must be stored, append it only as long as the history has the question.

        :raises MessageNotFoundError: If it does not.
        """
        if not self._question_is_stored or all(map(self._is_skipped, batch)):
            return int((yield Write(batch, self._options)))
        named = [question_id_of(each) for each in batch]
        question_id = usable_id_of(last_question(batch)) or next((each for each in reversed(named) if each), None)
        return (yield from append_answer(self._store, batch, question_id, self._options))

    def _replacing_requests(
        self, messages: Sequence[ChatMessage], replies: Sequence[ChatMessage], replaced_id: str
    ) -> Requests[WrittenTurn]:
        """
        Replace messages by the turn.

        The ids of the replies are made from the id of the message that is taken back, too. So a repeated call, which
        does not find that message any more, finds what the first call has put in its place, and writes nothing.
        """
        if last_question(messages) is None and replies:
            turn = yield from _turn_that_is_replaced(replaced_id)
        else:
            turn = _kept((yield from self._stored_turn(messages, replies)), replaced_id)
        messages = [_known(message, turn) for message in messages]
        given, answers = self._identified(messages, replies, turn)
        batch = [*given, *answers]
        ids = {message_id_of(message) for message in batch if not self._is_skipped(message)}
        is_repeated = False
        try:
            written = yield from replace_keeping_others(self._store, replaced_id, batch, self._options)
        except (MessageNotFoundError, ChatHistoryChangedError):
            # A repeated call may come with another answer. The first reply shows what was stored.
            ids = {message_id_of(answers[0])} if answers else ids
            is_done = bool(ids) and not (yield HasMessage(replaced_id))
            for message_id in ids:
                is_done = is_done and (yield HasMessage(str(message_id)))
            if not is_done:
                raise
            written, is_repeated = 0, True
        if not is_repeated and written >= len(ids):
            return WrittenTurn(messages_written=written, messages=batch, replies=answers)
        page = yield from _page_with(ids, round_count(given))
        stored = {message_id_of(message): message for message in page}
        if is_repeated:
            answers = [answer for answer in answers if message_id_of(answer) in stored]
        return self._written(written, given, [stored.get(message_id_of(each), each) for each in answers], stored)

    def _written(
        self,
        written: int,
        given: Sequence[ChatMessage],
        stored_answers: list[ChatMessage],
        stored: Mapping[str | int | None, ChatMessage],
    ) -> WrittenTurn:
        """Return the batch as the history has it."""
        stored_given = [
            message if self._is_skipped(message) else stored.get(message_id_of(message), message) for message in given
        ]
        return WrittenTurn(messages_written=written, messages=[*stored_given, *stored_answers], replies=stored_answers)

    def _stored_turn(
        self, messages: Sequence[ChatMessage], replies: Sequence[ChatMessage]
    ) -> Requests[list[ChatMessage]]:
        """
        Read the stored turn that the messages go on with, if the ids of what answers depend on it. It may be empty.

        A question with its replies needs no turn: if it is stored, the ids of the replies show it.
        """
        question = last_question(messages)
        if question is None:
            return (yield from _last_turn()) if replies else []
        question_id = usable_id_of(question)
        if question_id is None or not any(_is_answer(each) and message_id_of(each) is None for each in messages):
            return []
        page = (yield Retrieve(1)).messages
        if question_id not in map(message_id_of, page):
            if not (yield HasMessage(question_id)):
                return []
            page = yield from _page_with({question_id}, rounds=8)
        return turn_of(page, question_id)

    def _identified(
        self, messages: Sequence[ChatMessage], replies: Sequence[ChatMessage], turn: Sequence[ChatMessage]
    ) -> tuple[list[ChatMessage], list[ChatMessage]]:
        """
        Give ids to the messages and to the replies, and let those that answer a question name it.

        A reply to a question among the messages names this one, whatever its meta says.

        :param turn: The stored turn that the messages go on with. It may be empty.
        """
        question, number = (turn[0] if turn else None), self._first_number(turn)
        is_asked = last_question(messages) is not None
        taken = set(map(message_id_of, turn)) if self._is_skipping and self._replaced_id is None else set()
        identified: list[ChatMessage] = []
        ids: set[str | int | None] = set()
        for place, message in enumerate([*messages, *replies]):
            is_reply = place >= len(messages)
            own_id = message_id_of(message)
            # A generator may give its reply the meta of the question, or of an answer that it was shown.
            if is_reply and (own_id in ids or (is_asked and _names_another(message, question))):
                message, own_id = _without_ids(message), None  # noqa: PLW2901
            is_answer = is_reply or _is_answer(message)
            if self._is_skipped(message):
                identified.append(message)
                continue
            question_id = None if question is None else message_id_of(question)
            while question_id is not None and reply_id(question_id, number) in taken:
                number += 1
            if is_answer and question_id is not None and own_id is None:
                message = _answering(message, question_id, number, self._replaced_id)  # noqa: PLW2901
            elif is_reply and question_id is not None and question_id_of(message) is None:
                message = replace(message, _meta={**message.meta, QUESTION_ID_KEY: question_id})  # noqa: PLW2901
            elif own_id is None:
                (message,) = with_message_ids([message])  # noqa: PLW2901
            if is_answer and not any(message is each for each in turn):
                number += 1
            elif last_question([message]) is not None:
                is_stored = bool(turn) and message_id_of(turn[0]) == message_id_of(message)
                question, number = message, self._first_number(turn) if is_stored else 0
            identified.append(message)
            ids.add(message_id_of(message))
        return identified[: len(messages)], identified[len(messages) :]

    def _first_number(self, turn: Sequence[ChatMessage]) -> int:
        """
        Return the number of the next reply to a stored turn. Other policies than SKIP are meant for its replies.

        What takes the place of others is counted by itself, so that the ids are the same if the call is repeated.
        """
        return max(len(turn) - 1, 0) if self._is_skipping and self._replaced_id is None else 0

    def _is_skipped(self, message: ChatMessage) -> bool:
        """Whether the store leaves the message out."""
        return message.role is ChatRole.SYSTEM and bool(getattr(self._store, "skip_system_messages", True))


def _last_turn() -> Requests[list[ChatMessage]]:
    """Read the last turn of the history. It is empty if the history has no question."""
    page = yield from read_until(lambda read: is_whole(turn_of(read, None)))
    turn = turn_of(page.messages, None)
    return turn if is_whole(turn) else []


def _turn_that_is_replaced(replaced_id: str) -> Requests[list[ChatMessage]]:
    """Read the kept part of the turn whose end is replaced. It is empty if the history does not have it."""

    def is_enough(read: Sequence[ChatMessage]) -> bool:
        kept = _kept(read, replaced_id)
        return len(kept) < len(read) and is_whole(turn_of(kept, None))

    page = yield from read_until(is_enough)
    return turn_of(_kept(page.messages, replaced_id), None) if is_enough(page.messages) else []


def _page_with(ids: set[str | int | None], rounds: int) -> Requests[list[ChatMessage]]:
    """Read the end of the history that has all these messages."""
    page = yield from read_until(lambda read: ids <= set(map(message_id_of, read)), max(rounds, 1))
    return page.messages


def _kept(messages: Sequence[ChatMessage], replaced_id: str) -> list[ChatMessage]:
    """Return the messages before the one that is taken back or, if it is gone, before what took its place."""
    ids = list(map(message_id_of, messages))
    if replaced_id in ids:
        return list(messages[: ids.index(replaced_id)])
    place = next((at for at, each in enumerate(ids) if is_reply_id_instead_of(each, replaced_id)), len(ids))
    return list(messages[:place])


def _known(message: ChatMessage, turn: Sequence[ChatMessage]) -> ChatMessage:
    """Return the stored message with the same id or, if it has none, the one that says the same. If none, itself."""
    own_id = message_id_of(message)
    for stored in turn:
        says_the_same = _is_answer(message) and stored.role is message.role and stored._content == message._content
        if says_the_same if own_id is None else message_id_of(stored) == own_id:
            return stored
    return message


def _check_roles(given: Sequence[ChatMessage], stored: Mapping[str | int | None, ChatMessage]) -> None:
    """
    Check that no message was taken for a stored one of another role.

    :raises DuplicateMessageError: If a message has the id of a stored message of another role, such as a reply.
    """
    for message in given:
        other = stored.get(message_id_of(message), message)
        if other.role is not message.role:
            raise DuplicateMessageError(
                f"A message of the role {message.role.value!r} has the id {message_id_of(message)!r}, which a stored "
                f"message of the role {other.role.value!r} has already, so it was not stored. Give it an id of its own."
            )


def _is_answer(message: ChatMessage) -> bool:
    return message.role in (ChatRole.ASSISTANT, ChatRole.TOOL)


def _names_another(reply: ChatMessage, question: ChatMessage | None) -> bool:
    """Whether a reply names another question than this one."""
    named = reply.meta.get(QUESTION_ID_KEY)
    return question is not None and named is not None and named != message_id_of(question)


def _turn_of_reply(page: Sequence[ChatMessage], answers: Sequence[ChatMessage]) -> list[ChatMessage]:
    question_id = question_id_of(answers[-1]) if answers else None
    return turn_of(page, str(question_id)) if question_id is not None else []


def _answering(reply: ChatMessage, question_id: str | int, number: int, replaced_id: str | None = None) -> ChatMessage:
    """Return a copy of a reply that names its question, with the id of the reply with this number."""
    question_id = question_id_of(reply) or question_id
    ids = {QUESTION_ID_KEY: question_id, MESSAGE_ID_KEY: reply_id(question_id, number, replaced_id)}
    return replace(reply, _meta={**reply.meta, **ids})


def _without_ids(reply: ChatMessage) -> ChatMessage:
    meta = {key: value for key, value in reply.meta.items() if key not in (MESSAGE_ID_KEY, QUESTION_ID_KEY)}
    return replace(reply, _meta=meta)
