# SPDX-License-Identifier: Apache-2.0
"""
The engine of a store: it keeps encoded messages, and does not use `ChatMessage`s.

A store checks arguments, gives ids and encodes messages; its engine stores the texts. To write an engine, implement
`execute`, `execute_async` and the five abstract operations. Each further operation makes more of the store's methods
work; methods whose operation is missing raise an `UnsupportedOperationError`.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, Concatenate, Generic, ParamSpec, TypeAlias, TypeVar, cast

from haystack.document_stores.types import DuplicatePolicy

from haystack_chat_store.conversation.rounds import Window
from haystack_chat_store.errors import UnsupportedOperationError
from haystack_chat_store.search_text import Phrase
from haystack_chat_store.stores.rows import (
    NO_ROWS,
    EncodedMessage,
    FoundRow,
    HistoryChange,
    HistoryRow,
    MessageRow,
    Scope,
    WindowRows,
)
from haystack_chat_store.stores.tracing import is_tracing_enabled, traced
from haystack_chat_store.types import Fault, StoreStatistics

SessionT = TypeVar("SessionT")
ResultT = TypeVar("ResultT")
ArgumentsT = ParamSpec("ArgumentsT")
OperationT = TypeVar("OperationT", bound=Callable[..., Any])

_WITHOUT_DATABASE: dict[str, Callable[[], Any]] = {
    "read": lambda: NO_ROWS,
    "count": int,
    "page": list,
    "position": lambda: None,
    "history": lambda: None,
    "histories": list,
    "histories_by_id": list,
    "search": list,
    "search_titles": list,
    "namespaces": list,
    "statistics": lambda: StoreStatistics(
        chat_histories=0, messages=0, rounds=0, size=0, messages_per_day={}, usage={}, usage_per_day={}
    ),
    "check": list,
}

#: The return type of an operation: its result or, if it is a coroutine function, a coroutine that returns the result.
Operation: TypeAlias = ResultT | Coroutine[Any, Any, ResultT]


def reads_only(operation: OperationT) -> OperationT:
    """Mark an operation that changes nothing. It may run beside a write, and on a database that can only be read."""
    operation.reads_only = True  # type: ignore[attr-defined]  # a mark for `is_marked`
    return operation


def is_brief(operation: OperationT) -> OperationT:
    """Mark an operation whose cost depends only on what it writes or returns, not on the amount of stored data."""
    operation.is_brief = True  # type: ignore[attr-defined]  # a mark for `is_marked`
    return operation


def is_marked(operation: Callable[..., Any], mark: Callable[[OperationT], OperationT]) -> bool:
    """Whether `Engine` marks an operation with `reads_only` or `is_brief`. The mark holds for every engine."""
    return hasattr(getattr(Engine, operation.__name__, None), mark.__name__)


def result_without_database(operation: Callable[..., Any]) -> Any:
    """Return what an operation that is marked with `reads_only` returns as long as the database was not made."""
    return _WITHOUT_DATABASE[operation.__name__]()


def plain_result(result: Operation[ResultT]) -> ResultT:
    """Return the result of an operation that is a plain method, not a coroutine."""
    return cast(ResultT, result)


class Engine(ABC, Generic[SessionT]):
    """
    Keeps the encoded messages of chat histories.

    An operation is a method. Its first argument is a *session*, such as a connection, which `execute` and
    `execute_async` provide. Its second argument is the scope: the operation sees and changes only histories of this
    scope. Each operation is atomic: it takes effect whole or not at all, and sees the database as of one moment.

    If the scope has a user, operations that read treat a history of another user, or of no user, like one that does not
    exist. An operation that would write to it raises the `ChatHistoryAccessError` of `conflicts.check_access`. If an
    operation creates a history, it belongs to the user.

    If the scope has a lifetime, a history that is appended to, created, copied to or imported to expires after this
    time, otherwise never. Operations that read do not see an expired history, and a write to its id begins anew.

    An operation is written once, for synchronous and asynchronous calls. It is a plain method if it never waits or if
    `execute_async` runs it in a thread. Otherwise it is a coroutine function that awaits the calls of its session.

    ```python
    from haystack_chat_store import InMemoryChatMessageStore

    store = InMemoryChatMessageStore()
    print(store.engine.run(store.engine.count, store.scope, "user_456"))
    ```

    `execute_async` can tell what an operation costs: `is_marked(operation, reads_only)` says that it changes nothing,
    and `is_marked(operation, is_brief)` that it looks at no more than it writes or returns.

    The engines of this package hold settings only. Their connections belong to a registry of the process, so that
    engines with equal settings share them, and an engine can be copied and pickled. Another engine may open a
    connection for each call.
    """

    #: Whether histories outlive the process.
    is_durable = True
    #: Whether the engine looks at the user of a scope. Without it, no store has a user.
    keeps_users = False
    #: Whether the engine keeps the beginnings of messages for lists of histories: see `previews`.
    keeps_previews = False
    #: Whether histories expire after the lifetime of a scope. Without it, no store has a `ttl`.
    keeps_expiry = False

    #: The name of the database system in traces, such as `"postgresql"`, or `None` if there is no database.
    system_name: str | None = None

    def run(
        self,
        operation: Callable[Concatenate[SessionT, ArgumentsT], Operation[ResultT]],
        *arguments: ArgumentsT.args,
        **options: ArgumentsT.kwargs,
    ) -> ResultT:
        """
        Run an operation to its end, and return its result. If Haystack's tracing is on, the operation is a span.

        :param operation: An operation of this engine, such as `engine.count`.
        :param arguments: The operation's arguments after the session.
        :param options: The operation's keyword arguments.
        :raises ChatMessageStoreError: If the operation fails. Exceptions of the driver are turned into this package's.
        """
        if not is_tracing_enabled():
            return self.execute(operation, *arguments, **options)
        with traced(self.system_name, operation, arguments, options) as finish:
            result = self.execute(operation, *arguments, **options)
            finish(result)
            return result

    def run_async(
        self,
        operation: Callable[Concatenate[SessionT, ArgumentsT], Operation[ResultT]],
        *arguments: ArgumentsT.args,
        **options: ArgumentsT.kwargs,
    ) -> Coroutine[Any, Any, ResultT]:
        """Do what `run` does, without blocking the event loop."""
        if not is_tracing_enabled():
            return self.execute_async(operation, *arguments, **options)
        return self._traced_async(operation, *arguments, **options)

    async def _traced_async(
        self,
        operation: Callable[Concatenate[SessionT, ArgumentsT], Operation[ResultT]],
        *arguments: ArgumentsT.args,
        **options: ArgumentsT.kwargs,
    ) -> ResultT:
        with traced(self.system_name, operation, arguments, options) as finish:
            result = await self.execute_async(operation, *arguments, **options)
            finish(result)
            return result

    @abstractmethod
    def execute(
        self,
        operation: Callable[Concatenate[SessionT, ArgumentsT], Operation[ResultT]],
        *arguments: ArgumentsT.args,
        **options: ArgumentsT.kwargs,
    ) -> ResultT:
        """
        Open a session, run an operation on it to its end, and return its result. Only `run` calls it.

        :param operation: An operation of this engine, such as `engine.count`.
        :param arguments: The operation's arguments after the session.
        :param options: The operation's keyword arguments.
        :raises ChatMessageStoreError: If the operation fails. Exceptions of the driver are turned into this package's.
        """

    @abstractmethod
    async def execute_async(
        self,
        operation: Callable[Concatenate[SessionT, ArgumentsT], Operation[ResultT]],
        *arguments: ArgumentsT.args,
        **options: ArgumentsT.kwargs,
    ) -> ResultT:
        """Do what `execute` does, without blocking the event loop. Only `run_async` calls it."""

    def check_exists(self) -> None:
        """
        Check that the database exists, if the first write would otherwise create it. Creates nothing.

        :raises StoreConfigurationError: If the database does not exist.
        """

    def close(self) -> None:
        """Release connections and threads. The next use opens them again. Closing twice does nothing."""

    async def close_async(self) -> None:
        """Do what `close` does, without blocking the event loop."""
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
        expected_revision: int | None,
    ) -> Operation[int]:
        """
        Append a batch of messages to a history. A history that does not exist is created, unless the batch is empty.

        The policy decides about messages whose ids the history already has: see `conflicts.planned`. A message that
        replaces a stored message gets its position and time. If anything was appended or replaced, the history's
        revision becomes greater. The first revision of a history is greater than those of all histories of the
        namespace that were deleted.

        :param messages: The batch. All ids are different. It may be empty if `expected_revision` is given.
        :param policy: SKIP, OVERWRITE or FAIL.
        :param expected_revision: The revision that the history must have, 0 if it must not exist, or `None` for any.
        :returns: The number of messages appended or replaced. Messages that are stored already, equal, are not
            replaced.
        :raises DuplicateMessageError: If the policy is FAIL, and the history already has an id.
        :raises ChatHistoryChangedError: If the history has another revision, unless all messages of the batch are
            stored already, equal (see `conflicts.planned`).
        """

    @reads_only
    @is_brief
    @abstractmethod
    def read(self, session: SessionT, scope: Scope, chat_history_id: str, window: Window) -> Operation[WindowRows]:
        """
        Return the contents of the messages in a window, oldest first, and the history's revision, as of one moment.

        `rounds.window_start` defines where a window begins. An engine that does not have all roles of a history in
        memory finds the same place in its own way.
        """

    @reads_only
    @is_brief
    @abstractmethod
    def count(self, session: SessionT, scope: Scope, chat_history_id: str) -> Operation[int]:
        """Return the number of messages in a history, from a counter."""

    @abstractmethod
    def delete(
        self, session: SessionT, scope: Scope, chat_history_id: str, expected_revision: int | None
    ) -> Operation[None]:
        """
        Delete a history with its messages, title and meta, and the branches of it and of its branches.

        A history that does not exist is ignored, but its branches are not. A history of another user is never a branch
        of it. If this is not one atomic step, the history is deleted first, and a repeated call deletes what is left.

        :param expected_revision: The revision that a history that exists must have, or `None` for any.
        :raises ChatHistoryChangedError: If it has another revision.
        """

    @abstractmethod
    def delete_all(self, session: SessionT, scope: Scope) -> Operation[bool]:
        """
        Delete every history of the scope, or as many as others should wait for. Return whether there are more.

        The caller repeats it until there are no more.
        """

    # ------------------------------------------------------------------ changing messages

    def delete_messages(
        self,
        session: SessionT,
        scope: Scope,
        chat_history_id: str,
        message_ids: Sequence[str] | None,
        from_message_id: str | None,
        expected_revision: int | None,
    ) -> Operation[None]:
        """
        Delete single messages: those with some ids, or a message and all messages after it.

        The history stays, even if it has no messages any more, and no position is used again. If anything was deleted,
        its revision becomes greater.

        :param message_ids: The ids of the messages to delete, or `None`. Unknown ids are ignored.
        :param from_message_id: The id of the first message to delete, or `None`. Exactly one of the two is given.
        :param expected_revision: The revision that the history must have, or `None` for any.
        :raises ChatHistoryChangedError: If the history has another revision, unless it has none of `message_ids`.
        :raises MessageNotFoundError: If the history does not have `from_message_id`.
        """
        raise self.unsupported("deleting single messages", "delete_messages")

    def replace(
        self,
        session: SessionT,
        scope: Scope,
        chat_history_id: str,
        from_message_id: str,
        messages: Sequence[EncodedMessage],
        expected_revision: int | None,
    ) -> Operation[int]:
        """
        Delete a message and all messages after it, and append a batch in their place, at new positions.

        Messages of the batch whose ids the history has before the deleted ones are skipped. The history's revision
        becomes greater, unless an earlier attempt of the call has done its work (see `conflicts.is_replaced_already`).

        :param from_message_id: The id of the first message to delete.
        :param messages: The batch. All ids are different. It may be empty.
        :param expected_revision: The revision that the history must have, or `None` for any.
        :returns: The number of messages appended, 0 if an earlier attempt has appended them.
        :raises ChatHistoryChangedError: If the history has another revision, unless an earlier attempt was successful.
        :raises MessageNotFoundError: If the history does not have `from_message_id`, unless an earlier attempt was
            successful.
        """
        raise self.unsupported("replacing messages", "replace")

    def update_message(
        self,
        session: SessionT,
        scope: Scope,
        chat_history_id: str,
        message_id: str,
        change: Callable[[str], str],
    ) -> Operation[MessageRow]:
        """
        Change the content of a message, but not what was said: its meta. The history's revision becomes greater.

        Its `updated_at` stays. No other change of the message comes between reading and writing it.

        :param change: Returns the new content for the stored one. It may be called several times.
        :raises MessageNotFoundError: If the history does not have the message.
        """
        raise self.unsupported("changing the meta of a message", "update_message")

    def copy(
        self,
        session: SessionT,
        scope: Scope,
        source_id: str,
        target_id: str,
        until_message_id: str | None,
        meta: str | None,
    ) -> Operation[int]:
        """
        Append the messages of a history to another history that has no messages.

        The copies keep their ids, times and order, without gaps. The target's `created_at` and `updated_at` are the
        present time. A target that is made is the source's user's. If the source has no messages to copy, nothing is
        changed, and no target is created.

        If the meta makes the target a branch of the source, it appears as one. Where a hand-over, renaming or deletion
        of the source can come in between, the branch follows it.

        :param until_message_id: The id of the last message to copy, or `None` for all messages.
        :param meta: The meta that the target gets, as the text of a JSON object, or `None` if it keeps its own.
        :returns: The number of messages copied.
        :raises ChatHistoryNotFoundError: If the source does not exist.
        :raises MessageNotFoundError: If the source does not have `until_message_id`.
        :raises ChatHistoryExistsError: If the target has messages.
        """
        raise self.unsupported("copying histories", "copy")

    def import_history(
        self,
        session: SessionT,
        scope: Scope,
        history: HistoryRow,
        batches: Iterable[Sequence[MessageRow]],
        expected_revision: int,
    ) -> Operation[int]:
        """
        Append messages in batches. All batches become visible together or not at all.

        The messages keep their times, and get the next positions. A new history gets the title, the meta, the times and
        the user of `history` (of the scope, if that has one). An existing history keeps its own, and its `updated_at`
        becomes the later of both.

        :param batches: Yields lists of rows, whose positions are ignored. It may be slow, because it reads a file or
            another store. All ids are different, and the history has none of them. It raises an error if its source is
            damaged; then nothing is stored. If it is no iterator, the engine may go through it again.
        :param expected_revision: The revision that the history must have, 0 if it does not exist.
        :returns: The number of messages imported.
        :raises ChatHistoryChangedError: If the history has another revision.
        """
        raise self.unsupported("importing", "import_history")

    def import_histories(
        self, session: SessionT, scope: Scope, histories: Sequence[tuple[HistoryRow, Sequence[MessageRow]]]
    ) -> Operation[int]:
        """
        Import several new histories, each whole. This is faster than `import_history` for each.

        :param histories: The histories, each with its messages.
        :returns: The number of messages imported.
        :raises ChatHistoryChangedError: If one of the histories exists, even without messages. Nothing was imported,
            unless another writer created the history during the import.
        """
        raise self.unsupported("importing", "import_histories")

    # ------------------------------------------------------------------ the directory

    @reads_only
    @is_brief
    def history(self, session: SessionT, scope: Scope, chat_history_id: str) -> Operation[HistoryRow | None]:
        """Return one history, or `None` if it does not exist."""
        raise self.unsupported("the directory of histories", "history")

    @reads_only
    def histories(
        self, session: SessionT, scope: Scope, prefix: str, before: tuple[int, str] | None, limit: int
    ) -> Operation[list[HistoryRow]]:
        """
        Return the histories whose ids begin with `prefix`, in the order of the directory. Those of a user are indexed.

        Branches (see `rows.branch_origin`) are among them only if the scope has them.

        The history with the latest `updated_at` comes first. Of histories with the same time, the one with the greatest
        id (by code points) comes first.

        :param before: `updated_at` and id of a history, or `None`. Only histories after it in this order are returned.
        :param limit: The largest number of histories.
        """
        raise self.unsupported("the directory of histories", "histories")

    @reads_only
    def histories_by_id(
        self, session: SessionT, scope: Scope, prefix: str, after: str, limit: int
    ) -> Operation[list[HistoryRow]]:
        """
        Return up to `limit` histories whose ids begin with `prefix` and are greater than `after`, ordered by id.

        Ids are compared by code points.
        """
        raise self.unsupported("the directory of histories", "histories_by_id")

    def update_history(
        self,
        session: SessionT,
        scope: Scope,
        chat_history_id: str,
        change: HistoryChange,
    ) -> Operation[HistoryRow | None]:
        """
        Change title, meta or user, and return the changed history, or `None` if the history does not exist.

        If the user changes, that of its branches changes, too, and of their branches, if they had the same user. If
        this is not one atomic step, the branches change first, and a repeated call finishes it.

        If keys of the meta are set, no other change of the meta comes between reading and writing it.
        """
        raise self.unsupported("titles and meta", "update_history")

    def create_history(
        self, session: SessionT, scope: Scope, history: HistoryRow
    ) -> Operation[tuple[HistoryRow, bool]]:
        """
        Make a history without messages, with the title, the meta and the user of `history`, unless it exists.

        :returns: The history, and whether it was made.
        """
        raise self.unsupported("making a history without messages", "create_history")

    def rename_history(self, session: SessionT, scope: Scope, old_id: str, new_id: str) -> Operation[HistoryRow]:
        """
        Give a history another id. All else stays, apart from the revision, which becomes greater.

        Its branches follow it, and theirs: those that have the same user, each to the first id that no history has of
        `rows.renamed_branch_ids`, and with its history's new id in its meta.

        Where that is not one atomic step, each history is complete under its new id before the old one is deleted. A
        repeated call finishes it, as does `repair`.

        :raises ChatHistoryNotFoundError: If there is no history `old_id`, whatever there is under `new_id`.
        :raises ChatHistoryExistsError: If there is a history `new_id`.
        """
        raise self.unsupported("renaming", "rename_history")

    def renew(self, session: SessionT, scope: Scope, chat_history_id: str) -> Operation[None]:
        """Let the lifetime of a history begin anew. A history that does not exist, or never expires, is ignored."""
        raise self.unsupported("a ttl that reading renews", "renew")

    @reads_only
    def statistics(self, session: SessionT, scope: Scope, prefix: str) -> Operation[StoreStatistics]:
        """
        Return the statistics of the histories whose ids begin with `prefix`, with branches if the scope has them.

        `usage.UsageCounter` adds up what replies carry of their token usage. With a user, the size is `None`.
        """
        raise self.unsupported("statistics", "statistics")

    @reads_only
    def namespaces(self, session: SessionT, scope: Scope) -> Operation[list[str]]:
        """Return the names of all namespaces of the database that have histories, in order, whatever the scope is."""
        raise self.unsupported("listing namespaces", "namespaces")

    def erase_some(
        self, session: SessionT, scope: Scope, prefix: str, updated_before: int | None, limit: int
    ) -> Operation[int]:
        """
        Delete up to `limit` of the histories whose ids begin with `prefix`. Return their number, 0 if none are left.

        :param updated_before: Only histories whose messages last changed before this time, in microseconds since 1970,
            UTC, and those that have expired. `None` for all.
        """
        raise self.unsupported("erasing by prefix or age", "erase_some")

    def vacuum(self, session: SessionT, scope: Scope) -> Operation[None]:
        """Remove the bytes of deleted messages from the engine's files."""
        raise self.unsupported("vacuuming", "vacuum")

    # ------------------------------------------------------------------ pages and search

    @reads_only
    @is_brief
    def page(
        self, session: SessionT, scope: Scope, chat_history_id: str, before: int | None, after: int | None, limit: int
    ) -> Operation[list[MessageRow]]:
        """
        Return up to `limit` messages in order: the newest, or those just before or just after a position.

        :param before: A position, or `None`. The page ends just before it.
        :param after: A position, or `None`. The page begins just after it. At most one of the two is given.
        """
        raise self.unsupported("pages of messages", "page")

    @reads_only
    @is_brief
    def position(self, session: SessionT, scope: Scope, chat_history_id: str, message_id: str) -> Operation[int | None]:
        """Return the position of a message, or `None` if the history does not have it. This is a look into an index."""
        raise self.unsupported("finding a message by its id", "position")

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

        Those of branches are among them only if the scope has branches.

        How good a match is, is for the engine to say. At least, of two messages with the same word, the one in which
        the word is a larger part of the text has the greater score. A score depends on nothing but the message and the
        query, so that it tells nothing of what is stored outside the scope; neither does the order of equal scores.

        :param chat_history_id: Only messages of this history, or `None` for all.
        :param prefix: Only messages of histories whose ids begin with this text.
        :param limit: The largest number of messages.
        """
        raise self.unsupported("search", "search")

    @reads_only
    def search_titles(
        self,
        session: SessionT,
        scope: Scope,
        phrases: Sequence[Phrase],
        chat_history_id: str | None,
        prefix: str,
        limit: int,
    ) -> Operation[list[HistoryRow]]:
        """
        Return the histories whose titles have all phrases. The shortest title comes first, then the latest change.

        The terms of a title can be searched as soon as it is set, in every database. Those of branches are among them
        only if the scope has branches.

        :param chat_history_id: Only this history, or `None` for all.
        :param prefix: Only histories whose ids begin with this text.
        :param limit: The largest number of histories.
        """
        raise self.unsupported("search", "search_titles")

    def index_some(self, session: SessionT, scope: Scope, limit: int) -> Operation[bool]:
        """
        Index up to `limit` of the messages that are not indexed yet, and return whether more are left.

        An engine that searches without an index returns False.
        """
        raise self.unsupported("a search index", "index_some")

    # ------------------------------------------------------------------ checking and repairing

    @reads_only
    def check(self, session: SessionT, scope: Scope) -> Operation[list[Fault]]:
        """
        Find inconsistencies: counts, positions, rows without a history, what lists show, the search index.

        What lists show is the previews, branches and users of histories. Terms of titles belong to the search index.

        The caller checks the contents of messages.
        """
        raise self.unsupported("checking", "check")

    def repair(self, session: SessionT, scope: Scope) -> Operation[list[Fault]]:
        """
        Find what `check` finds, and repair it: correct wrong counts, and index messages again if the index is wrong.

        :returns: All faults, each with whether it was repaired.
        """
        raise self.unsupported("repairing", "repair")

    @reads_only
    def backup(self, session: SessionT, scope: Scope, path: str) -> Operation[None]:
        """
        Write everything that the database holds, of all namespaces, to a new file, while others go on writing.

        :param path: Where the file is to be. Nothing is there yet.
        """
        raise UnsupportedOperationError(
            f"{type(self).__name__} does not write backups. Use its server's own programs: see docs/backup.md."
        )

    def remove(
        self, session: SessionT, scope: Scope, chat_history_id: str, rows: Sequence[MessageRow]
    ) -> Operation[list[int]]:
        """
        Delete messages, even if they are damaged. What is not stored as in its row any more stays.

        :param rows: Some of the messages of a page, as `page` returned them, in their order.
        :returns: The positions where another message stays.
        """
        raise self.unsupported("repairing", "remove")

    def unsupported(self, what: str, operation: str) -> UnsupportedOperationError:
        """
        Return the error of an operation that this engine does not have.

        :param what: The operation that is not supported, in words for users.
        :param operation: The name of the operation.
        """
        return UnsupportedOperationError(
            f"{type(self).__name__} does not support {what}: it has no operation {operation!r}.", operation
        )
