# SPDX-License-Identifier: Apache-2.0
"""
The engine of a store: it keeps encoded messages, and knows nothing of `ChatMessage`s.

A store checks arguments, gives ids and encodes; its engine stores the texts. To write an engine, implement `run`,
`run_async` and the five abstract operations. Each further operation makes more of the store's methods work; without it,
they raise an `UnsupportedOperationError`.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, Concatenate, Generic, ParamSpec, TypeAlias, TypeVar, cast

from haystack.document_stores.types import DuplicatePolicy

from haystack_chat_store.errors import UnsupportedOperationError
from haystack_chat_store.rounds import Window
from haystack_chat_store.search_text import Phrase
from haystack_chat_store.stores.rows import EncodedMessage, FoundRow, HistoryRow, MessageRow, Scope, Unchanged
from haystack_chat_store.types import Fault, StoreStatistics

SessionT = TypeVar("SessionT")
ResultT = TypeVar("ResultT")
ArgumentsT = ParamSpec("ArgumentsT")
OperationT = TypeVar("OperationT", bound=Callable[..., Any])

#: What an operation returns: its result or, if it is a coroutine function, a coroutine that returns the result.
Operation: TypeAlias = ResultT | Coroutine[Any, Any, ResultT]


def reads_only(operation: OperationT) -> OperationT:
    """
    Mark an operation that changes nothing: it may run beside a write, and on what can only be read.
    """
    operation.reads_only = True  # type: ignore[attr-defined]  # a mark for `is_marked`
    return operation


def is_brief(operation: OperationT) -> OperationT:
    """
    Mark an operation that looks at no more than it writes or returns, however much is stored.
    """
    operation.is_brief = True  # type: ignore[attr-defined]  # a mark for `is_marked`
    return operation


def is_marked(operation: Callable[..., Any], mark: Callable[[OperationT], OperationT]) -> bool:
    """
    Whether `Engine` marks an operation with `reads_only` or `is_brief`. The mark holds for every engine.
    """
    return hasattr(getattr(Engine, operation.__name__, None), mark.__name__)


def plain_result(result: Operation[ResultT]) -> ResultT:
    """
    Return the result of an operation that is a plain method, not a coroutine.
    """
    return cast(ResultT, result)


class Engine(ABC, Generic[SessionT]):
    """
    Keeps the encoded messages of chat histories.

    An operation is a method whose first argument is a *session*, such as a connection, which `run` and `run_async`
    provide, and whose second argument is the scope: only what is in it may be seen and changed. An operation is written
    once and serves both ways of calling: as a plain method if it never waits or if `run_async` runs it in a thread, or
    as a coroutine that awaits what its session does. Each operation is atomic: it takes effect whole or not at all, and
    sees the database as of one moment.

    ```python
    from haystack_chat_store import InMemoryChatMessageStore

    store = InMemoryChatMessageStore()
    print(store.engine.run(store.engine.count, store.scope, "user_456"))
    ```

    An engine holds settings only. Its connections belong to a registry of the process, so that engines with equal
    settings share them, and an engine can be copied and pickled.
    """

    #: Whether histories outlive the process.
    is_durable = True

    @abstractmethod
    def run(
        self,
        operation: Callable[Concatenate[SessionT, ArgumentsT], Operation[ResultT]],
        *arguments: ArgumentsT.args,
        **options: ArgumentsT.kwargs,
    ) -> ResultT:
        """
        Open a session, run an operation on it to its end, and return its result.

        :param operation: An operation of this engine, such as `engine.count`.
        :param arguments: The operation's arguments after the session.
        :raises ChatMessageStoreError: In place of each exception of the driver.
        """

    @abstractmethod
    async def run_async(
        self,
        operation: Callable[Concatenate[SessionT, ArgumentsT], Operation[ResultT]],
        *arguments: ArgumentsT.args,
        **options: ArgumentsT.kwargs,
    ) -> ResultT:
        """
        Do what `run` does, without blocking the event loop.
        """

    def check_exists(self) -> None:
        """
        Check that the database exists, where the first write would make it. Makes nothing.

        :raises StoreConfigurationError: If there is none.
        """

    def close(self) -> None:
        """
        Release connections and threads. The next use opens them again; closing twice does nothing.
        """

    async def close_async(self) -> None:
        """
        Do what `close` does, without blocking the event loop.
        """
        await asyncio.to_thread(self.close)

    # ------------------------------------------------------------------ required: messages

    @is_brief
    @abstractmethod
    def append(
        self,
        session: SessionT,
        scope: Scope,
        chat_history_id: str,
        messages: Sequence[EncodedMessage],
        policy: DuplicatePolicy,
        expected_count: int | None,
    ) -> Operation[int]:
        """
        Write a batch of messages to the end of a history, which is made if it does not exist.

        Messages whose ids the history has are dealt with by the policy, as `conflicts.planned` says. What is replaced
        keeps its position and time.

        :param messages: No id twice. May be empty if a count is expected.
        :param policy: SKIP, OVERWRITE or FAIL.
        :param expected_count: How many messages the history must have, or `None` for any number.
        :returns: How many messages were appended or replaced.
        :raises DuplicateMessageError: If the policy is FAIL, and an id is there.
        :raises ChatHistoryChangedError: If the history has another number of messages (see `conflicts.check_count`).
        """

    @reads_only
    @is_brief
    @abstractmethod
    def read(
        self, session: SessionT, scope: Scope, chat_history_id: str, window: Window
    ) -> Operation[tuple[list[str], int]]:
        """
        Return the contents in a window, oldest first, and the window's size, as of one moment.

        `rounds.window_start` is the rule for where a window begins. An engine that does not hold all roles of a history
        in memory finds the same place in its own way.
        """

    @reads_only
    @is_brief
    @abstractmethod
    def count(self, session: SessionT, scope: Scope, chat_history_id: str) -> Operation[int]:
        """
        Return the number of messages in a history, from a counter.
        """

    @abstractmethod
    def delete(self, session: SessionT, scope: Scope, chat_history_id: str) -> Operation[None]:
        """
        Delete a history and all that belongs to it.
        """

    @abstractmethod
    def delete_all(self, session: SessionT, scope: Scope) -> Operation[None]:
        """
        Delete every history of the scope.
        """

    # ------------------------------------------------------------------ changing messages

    def delete_messages(
        self,
        session: SessionT,
        scope: Scope,
        chat_history_id: str,
        message_ids: Sequence[str] | None,
        from_message_id: str | None,
    ) -> Operation[None]:
        """
        Delete single messages: those with these ids, or a message and all that come after it. Exactly one is given.

        The history stays, even if it has no messages any more, and no position is used again.

        :raises MessageNotFoundError: If the history does not have `from_message_id`.
        """
        raise self.unsupported("deleting single messages")

    def copy(
        self, session: SessionT, scope: Scope, source_id: str, target_id: str, until_message_id: str | None
    ) -> Operation[int]:
        """
        Append all messages of a history, or those up to and including one, to another that has none.

        They keep their ids and times, and come in the same order, without gaps; the target's times of creation and
        change are now. If there is nothing to copy, nothing is changed, and no target is made.

        :returns: The number of messages copied.
        :raises ChatHistoryNotFoundError: If there is no history `source_id`.
        :raises MessageNotFoundError: If it does not have `until_message_id`.
        :raises ChatHistoryExistsError: If the target has messages.
        """
        raise self.unsupported("copying histories")

    def import_history(
        self,
        session: SessionT,
        scope: Scope,
        history: HistoryRow,
        batches: Iterable[Sequence[MessageRow]],
        expected_count: int,
    ) -> Operation[int]:
        """
        Append messages in batches, all of which become visible together or not at all.

        They keep their times, and get the next positions. A new history gets the title, the meta and the times of
        `history`; one that exists keeps its own, and its `updated_at` becomes the later of both.

        :param batches: Yields lists of rows, whose positions do not count. It may read slowly, from a file or another
            store. No two rows have the same id, and none has one that the history has. It raises if what it reads is
            damaged; then nothing is stored.
        :param expected_count: How many messages the history has now; 0 if there is none.
        :returns: The number of messages imported.
        :raises ChatHistoryChangedError: If it has another number.
        """
        raise self.unsupported("importing")

    def import_histories(
        self, session: SessionT, scope: Scope, histories: Sequence[tuple[HistoryRow, Sequence[MessageRow]]]
    ) -> Operation[int]:
        """
        Do what `import_history` does for several histories that do not exist yet: each whole, and faster than alone.

        :returns: The number of messages imported.
        :raises ChatHistoryChangedError: If one of them exists, even without messages. Then none was imported, unless it
            came to exist just now.
        """
        raise self.unsupported("importing")

    # ------------------------------------------------------------------ the directory

    @reads_only
    @is_brief
    def history(self, session: SessionT, scope: Scope, chat_history_id: str) -> Operation[HistoryRow | None]:
        """
        Return one history, or `None` if it does not exist.
        """
        raise self.unsupported("the directory of histories")

    @reads_only
    def histories(
        self, session: SessionT, scope: Scope, prefix: str, before: tuple[int, str] | None, limit: int
    ) -> Operation[list[HistoryRow]]:
        """
        Return the histories whose ids begin with `prefix`, the one updated last first.

        Of the same time, that with the greater id (by code points) comes first.

        :param before: `updated_at` and id of a history. Only what comes after it in this order is returned.
        :param limit: How many histories at most.
        """
        raise self.unsupported("the directory of histories")

    @reads_only
    def histories_by_id(
        self, session: SessionT, scope: Scope, prefix: str, after: str, limit: int
    ) -> Operation[list[HistoryRow]]:
        """
        Return the histories whose ids begin with `prefix` and are greater than `after`, by their ids' code points.
        """
        raise self.unsupported("the directory of histories")

    def update_history(
        self,
        session: SessionT,
        scope: Scope,
        chat_history_id: str,
        title: str | Unchanged | None,
        meta: str | Unchanged | None,
    ) -> Operation[HistoryRow | None]:
        """
        Set title and meta, and return the history as it is then, or `None` if it does not exist.
        """
        raise self.unsupported("titles and meta")

    @reads_only
    def statistics(self, session: SessionT, scope: Scope, prefix: str) -> Operation[StoreStatistics]:
        """
        Return how much there is in histories whose ids begin with `prefix`.
        """
        raise self.unsupported("statistics")

    def erase_some(
        self, session: SessionT, scope: Scope, prefix: str, updated_before: int | None, limit: int
    ) -> Operation[int]:
        """
        Delete up to `limit` of the histories whose ids begin with `prefix`. Return their number, 0 if none are left.

        :param updated_before: Only histories whose messages have not changed since, in microseconds since 1970.
        """
        raise self.unsupported("erasing by prefix or age")

    def vacuum(self, session: SessionT, scope: Scope) -> Operation[None]:
        """
        Remove the bytes of what was deleted from the engine's files.
        """
        raise self.unsupported("vacuuming")

    # ------------------------------------------------------------------ pages and search

    @reads_only
    @is_brief
    def page(
        self, session: SessionT, scope: Scope, chat_history_id: str, before: int | None, after: int | None, limit: int
    ) -> Operation[list[MessageRow]]:
        """
        Return up to `limit` messages in order: the newest; or those just before a position, or just after one.
        """
        raise self.unsupported("pages of messages")

    @reads_only
    def search(
        self,
        session: SessionT,
        scope: Scope,
        phrases: Sequence[Phrase],
        chat_history_id: str | None,
        prefix: str,
        limit: int,
    ) -> Operation[list[FoundRow] | None]:
        """
        Return the messages that have all phrases, the best first, or `None` if some messages are not indexed yet.

        :param chat_history_id: Only messages of this history.
        :param prefix: Only messages of histories whose ids begin so.
        """
        raise self.unsupported("search")

    def index_some(self, session: SessionT, scope: Scope, limit: int) -> Operation[bool]:
        """
        Index up to `limit` of the messages that are not indexed yet, and return whether there are more.
        """
        raise self.unsupported("search")

    # ------------------------------------------------------------------ checking and repairing

    def check(self, session: SessionT, scope: Scope, repair: bool) -> Operation[list[Fault]]:
        """
        Find what does not fit together: counts, positions, rows without a history, the search index.

        What single messages say is for the caller to check.

        :param repair: Whether to recount and index again what is wrong.
        """
        raise self.unsupported("checking")

    def remove(
        self, session: SessionT, scope: Scope, chat_history_id: str, positions: Sequence[int]
    ) -> Operation[None]:
        """
        Delete messages by their positions, whatever they contain.
        """
        raise self.unsupported("repairing")

    def unsupported(self, what: str) -> UnsupportedOperationError:
        """
        Return the error of an operation that this engine does not have.
        """
        return UnsupportedOperationError(f"{type(self).__name__} does not support {what}.")
