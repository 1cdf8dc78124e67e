# SPDX-License-Identifier: Apache-2.0
"""
What an engine does for its store: the operations, and how they are run.

The base class of `BaseChatMessageStore`, which calls them. Of a store of one's own only the first few have to be there;
without one of the others, the public methods that need it say that this store cannot do that.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from enum import Enum
from typing import Any, Final, Generic, NamedTuple, TypeAlias, TypeVar

from haystack.document_stores.types import DuplicatePolicy

from haystack_chat_store.errors import (
    ChatHistoryChangedError,
    ChatHistoryExistsError,
    ChatHistoryNotFoundError,
    DuplicateMessageError,
    MessageNotFoundError,
    UnsupportedOperationError,
)
from haystack_chat_store.rounds import Window
from haystack_chat_store.search_text import Phrase
from haystack_chat_store.types import Fault, StoreStatistics

SessionT = TypeVar("SessionT")
ResultT = TypeVar("ResultT")

#: The namespace to which a repair moves histories whose own cannot be known any more.
RECOVERED: Final = "recovered"

#: What an operation returns: its result or, if it is a coroutine function, a coroutine that does.
Operation: TypeAlias = ResultT | Coroutine[Any, Any, ResultT]


class EncodedMessage(NamedTuple):
    """
    A message as an engine gets it to store it.

    :param message_id: Its id, unique in its history.
    :param role: `"user"`, `"assistant"`, `"tool"` or `"system"`.
    :param content: The whole message as JSON text, id included.
    :param brought_its_id: Whether the id came with the message. If not, no history can have it yet.
    """

    message_id: str
    role: str
    content: str
    brought_its_id: bool


class HistoryRow(NamedTuple):
    """
    What an engine keeps of a chat history beside its messages.

    :param created_at: When its first message was stored, in microseconds since 1970, UTC.
    :param updated_at: When its messages last changed, likewise. It never goes back. A new title or meta does not count.
    :param meta: A JSON object as text.
    """

    chat_history_id: str
    message_count: int
    round_count: int
    created_at: int
    updated_at: int
    title: str | None
    meta: str | None


class MessageRow(NamedTuple):
    """
    A stored message, as it is stored.

    :param position: Its place in its history. Positions rise, and none is ever used again.
    :param created_at: When it was stored, in microseconds since 1970, UTC.
    :param content: The whole message as JSON text, unless something has damaged it.
    """

    position: int
    created_at: int
    message_id: str
    role: str
    content: str


class FoundRow(NamedTuple):
    """
    A message that a search has found.

    :param score: How well it matches by the engine's own measure; more is better.
    """

    chat_history_id: str
    position: int
    message_id: str
    content: str
    score: float


class Unchanged(Enum):
    """
    Says that something is to stay as it is, where `None` says that there is to be none.
    """

    UNCHANGED = "unchanged"

    def __repr__(self) -> str:
        return self.name


UNCHANGED: Final = Unchanged.UNCHANGED


class Plan(NamedTuple):
    """
    What a write does to a history.

    :param new: What is appended.
    :param replaced: What takes the place of a stored message, each under that one's key.
    """

    new: list[EncodedMessage]
    replaced: dict[Any, EncodedMessage]


def planned(messages: Sequence[EncodedMessage], known: Mapping[str, Any], policy: DuplicatePolicy) -> Plan:
    """
    Return what to write of a batch.

    :param messages: The batch, no id twice.
    :param known: Those of its ids that the history has, each with the key of the message that has it.
    :param policy: What becomes of them.
    :raises DuplicateMessageError: If there are any, and the policy is FAIL.
    """
    if known and policy is DuplicatePolicy.FAIL:
        raise duplicate(next(iter(known)))
    new = [message for message in messages if message.message_id not in known]
    if policy is not DuplicatePolicy.OVERWRITE:
        return Plan(new, {})
    return Plan(new, {known[message.message_id]: message for message in messages if message.message_id in known})


def duplicate(message_id: str) -> DuplicateMessageError:
    """
    Return what a write under the policy FAIL raises for an id that is there already.
    """
    return DuplicateMessageError(f"The history already has a message with the id {message_id!r}. Nothing was written.")


def changed_meanwhile(expected_count: int, count: int) -> ChatHistoryChangedError:
    """
    Return what a call raises that expected another number of messages than the history has.
    """
    return ChatHistoryChangedError(
        f"The history has {count} messages now, and not {expected_count} as expected. Nothing was written. Read what "
        "is new, then write again with the new count."
    )


def not_found(message_id: str) -> MessageNotFoundError:
    """
    Return what a call raises that names a message which the history does not have.
    """
    return MessageNotFoundError(f"The history has no message with the id {message_id!r}. Nothing was changed.")


def no_history(chat_history_id: str) -> ChatHistoryNotFoundError:
    """
    Return what a call raises that needs a history which is not there.
    """
    return ChatHistoryNotFoundError(f"There is no chat history {chat_history_id!r}.")


def has_messages(chat_history_id: str) -> ChatHistoryExistsError:
    """
    Return what copying to a history raises that is not empty.
    """
    return ChatHistoryExistsError(f"The chat history {chat_history_id!r} has messages already. Nothing was copied.")


def end_of_prefix(prefix: str) -> str | None:
    """
    Return the least text that is greater, by code points, than all that begin with `prefix`; `None` if there is none.
    """
    stem = prefix.rstrip("\U0010ffff")
    if not stem:
        return None
    following = ord(stem[-1]) + 1
    return stem[:-1] + chr(0xE000 if following == 0xD800 else following)  # there are no surrogates in ids


class Operations(ABC, Generic[SessionT]):
    """
    The operations of an engine.

    An operation is a method whose first argument is the engine's *session*, such as a connection: `_run` and
    `_run_async` provide it. An operation is written once and serves both: as a plain function if `_run_async` runs it
    on a thread or it never waits, or as a coroutine function that awaits what its session does. Each is atomic: it
    takes effect whole or not at all, and sees the database as of one moment.
    """

    # ------------------------------------------------------------------ every store has these

    @abstractmethod
    def _run(self, operation: Callable[..., Any], *arguments: Any) -> Any:
        """
        Run an operation to its end: open a session, call `operation(session, *arguments)`, return its result.

        Raises the engine's exceptions as `ChatMessageStoreError`s.
        """

    @abstractmethod
    async def _run_async(self, operation: Callable[..., Any], *arguments: Any) -> Any:
        """
        Do what `_run` does, without ever blocking the event loop.
        """

    @abstractmethod
    def _write(self, session: SessionT, chat_history_id: str, messages: Sequence[EncodedMessage]) -> "Operation[int]":
        """
        Append the messages whose id the history does not have, as one atomic batch. Return their number.

        :param messages: At least one, no id twice.
        """

    @abstractmethod
    def _read(self, session: SessionT, chat_history_id: str, window: Window) -> "Operation[tuple[list[str], int]]":
        """
        Return the contents in the window, oldest first, and the window's size, as of one moment.

        The size is `window.size` of the number of rounds or messages that the history has, which an engine keeps count
        of; it is not asked for a window of everything. For the unit `"round"`, the window begins at the `size`-th last
        user message, or holds everything if there are fewer. For the unit `"message"`, it holds the last `size`
        messages; where the first of these is a tool message, they are preceded by what comes before it up to and
        including the nearest message that is not.
        """

    @abstractmethod
    def _count(self, session: SessionT, chat_history_id: str) -> "Operation[int]":
        """
        Return the number of messages in a history, from a counter.
        """

    @abstractmethod
    def _delete(self, session: SessionT, chat_history_id: str) -> "Operation[None]":
        """
        Delete a history and all that belongs to it.
        """

    @abstractmethod
    def _delete_all(self, session: SessionT) -> "Operation[None]":
        """
        Delete every history of this namespace.
        """

    # ------------------------------------------------------------------ changing messages

    def _write_checked(
        self,
        session: SessionT,
        chat_history_id: str,
        messages: Sequence[EncodedMessage],
        policy: DuplicatePolicy,
        expected_count: int | None,
    ) -> "Operation[int]":
        """
        Do what `_write` does, by the policy (see `planned`), and only if the history has `expected_count` messages.

        What is replaced keeps its position and time. Return how many messages were appended or replaced.

        :param messages: No id twice; may be none.
        :raises ConflictError: If the count (see `changed_meanwhile`) or the policy forbids the write.
        """
        raise self._unsupported("duplicate policies and expected counts")

    def _delete_some(
        self, session: SessionT, chat_history_id: str, message_ids: Sequence[str] | None, from_message_id: str | None
    ) -> "Operation[None]":
        """
        Delete single messages: those with these ids, or a message and all that come after it. Exactly one is given.

        The history stays, even if it has no messages any more, and no position is used again.

        :raises MessageNotFoundError: If the history does not have `from_message_id`.
        """
        raise self._unsupported("deleting single messages")

    def _copy(
        self, session: SessionT, source_id: str, target_id: str, until_message_id: str | None
    ) -> "Operation[int]":
        """
        Append all messages of a history, or those up to and including one, to another that has none.

        Return their number. They keep their ids and times, and come in the same order, without gaps; the target's times
        of creation and change are now. Where there is nothing to copy, nothing is changed, and no target made.

        :raises ChatHistoryNotFoundError: If there is no history `source_id`.
        :raises MessageNotFoundError: If it does not have `until_message_id`.
        :raises ChatHistoryExistsError: If the target has messages.
        """
        raise self._unsupported("copying histories")

    def _import(
        self,
        session: SessionT,
        history: HistoryRow,
        batches: Iterable[Sequence[MessageRow]],
        expected_count: int,
    ) -> "Operation[int]":
        """
        Append messages in batches, all of which become visible together or not at all. Return their number.

        They keep their times, and get the next positions. A history that is new gets the title, the meta and the times
        of `history`, one that is there keeps them, and `updated_at` becomes the later of both.

        :param batches: Yields lists of rows, whose positions do not count. No two have the same id, and none has one
            that the history has. Raises if what it reads is damaged; then nothing is stored.
        :param expected_count: How many messages the history has now; 0 if there is none.
        :raises ChatHistoryChangedError: If it has another number.
        """
        raise self._unsupported("importing")

    def _import_several(
        self, session: SessionT, histories: Sequence[tuple[HistoryRow, Sequence[MessageRow]]]
    ) -> "Operation[int]":
        """
        Do what `_import` does for several histories that are not there yet: each whole, and in less time than alone.

        :param histories: As many as make up a batch.
        :raises ChatHistoryChangedError: If one of them is there, even without messages. Then none was imported, unless
            it came to be there just now.
        """
        raise self._unsupported("importing")

    # ------------------------------------------------------------------ the directory

    def _history(self, session: SessionT, chat_history_id: str) -> "Operation[HistoryRow | None]":
        """
        Return one history, or `None` if there is none.
        """
        raise self._unsupported("the directory of histories")

    def _histories(
        self, session: SessionT, prefix: str, before: tuple[int, str] | None, limit: int
    ) -> "Operation[list[HistoryRow]]":
        """
        Return the histories whose ids begin with `prefix`, the one updated last first.

        Of the same time, that with the greater id (by code points) comes first.

        :param before: `updated_at` and id of a history. Only what comes after it in this order is returned.
        """
        raise self._unsupported("the directory of histories")

    def _histories_by_id(self, session: SessionT, prefix: str, after: str, limit: int) -> "Operation[list[HistoryRow]]":
        """
        Return the histories whose ids begin with `prefix` and are greater than `after`, by their ids' code points.
        """
        raise self._unsupported("the directory of histories")

    def _update_history(
        self, session: SessionT, chat_history_id: str, title: str | Unchanged | None, meta: str | Unchanged | None
    ) -> "Operation[HistoryRow | None]":
        """
        Set title and meta, and return the history as it is then, or `None` if there is none.
        """
        raise self._unsupported("titles and meta")

    # ------------------------------------------------------------------ reading

    def _page(
        self, session: SessionT, chat_history_id: str, before: int | None, after: int | None, limit: int
    ) -> "Operation[list[MessageRow]]":
        """
        Return up to `limit` messages in order: the newest; or those just before a position, or just after one.
        """
        raise self._unsupported("pages of messages")

    def _search(
        self, session: SessionT, phrases: Sequence[Phrase], chat_history_id: str | None, prefix: str, limit: int
    ) -> "Operation[list[FoundRow] | None]":
        """
        Return the messages that have all phrases, the best first, or `None` if some are not indexed yet.

        :param chat_history_id: Only messages of this history.
        :param prefix: Only messages of histories whose ids begin so.
        """
        raise self._unsupported("search")

    def _index_some(self, session: SessionT, limit: int) -> "Operation[bool]":
        """
        Index up to `limit` of the messages that are not indexed yet, and return whether there are more.
        """
        raise self._unsupported("search")

    def _statistics(self, session: SessionT, prefix: str) -> "Operation[StoreStatistics]":
        """
        Return what there is in histories whose ids begin with `prefix`.
        """
        raise self._unsupported("statistics")

    # ------------------------------------------------------------------ erasing and repairing

    def _erase_some(self, session: SessionT, prefix: str, updated_before: int | None, limit: int) -> "Operation[int]":
        """
        Delete up to `limit` of the histories whose ids begin with `prefix`. Return their number, 0 if none are left.

        :param updated_before: Only histories whose messages have not changed since, in microseconds since 1970.
        """
        raise self._unsupported("erasing by prefix or age")

    def _vacuum(self, session: SessionT) -> "Operation[None]":
        """
        Have what was deleted leave the engine's files.
        """
        raise self._unsupported("vacuuming")

    def _faults(self, session: SessionT, repair: bool) -> "Operation[list[Fault]]":
        """
        Find, and mend, what does not fit together: counts, positions, rows without a history, the search index.

        What single messages say is for the caller to check.
        """
        raise self._unsupported("checking")

    def _remove(self, session: SessionT, chat_history_id: str, positions: Sequence[int]) -> "Operation[None]":
        """
        Delete messages by their positions, whatever is in them.
        """
        raise self._unsupported("repairing")

    def _unsupported(self, what: str) -> UnsupportedOperationError:
        return UnsupportedOperationError(f"{type(self).__name__} does not support {what}.")
