# SPDX-License-Identifier: Apache-2.0
"""The operations that change what was said."""

from collections.abc import Callable, Iterable, Sequence

from haystack.document_stores.types import DuplicatePolicy

from haystack_chat_store.stores.conflicts import (
    check_revision,
    check_same_user,
    compares_contents,
    history_has_messages,
    history_not_found,
    message_not_found,
    planned,
)
from haystack_chat_store.stores.engine import Engine
from haystack_chat_store.stores.rows import EncodedMessage, HistoryRow, MessageRow, Scope, compare_rows
from haystack_chat_store.stores.sqlite.connections import Database
from haystack_chat_store.stores.sqlite.histories import Histories
from haystack_chat_store.stores.sqlite.reading import page_after
from haystack_chat_store.stores.sqlite.schema import key_range
from haystack_chat_store.stores.sqlite.turns import WriteSession
from haystack_chat_store.stores.times import microseconds_now

_HISTORY_HAS_MESSAGES = "SELECT EXISTS (SELECT 1 FROM haystack_chat_messages WHERE message_key BETWEEN ? AND ?)"

# Up to this many histories are deleted by one step of `delete_all`, or fewer if they are long.
_HISTORIES_PER_STEP = 1_000


class Writing(Engine[Database]):
    """The operations that change what was said."""

    def append(
        self,
        session: WriteSession,
        scope: Scope,
        chat_history_id: str,
        messages: Sequence[EncodedMessage],
        policy: DuplicatePolicy,
        expected_revision: int | None,
    ) -> int:
        """Look for the ids that came with messages, and insert what is new at the next positions."""
        with session.transaction() as connection:
            histories = Histories(connection, scope, session.settings.search)
            now = microseconds_now()
            history = histories.find(chat_history_id)
            revision = 0 if history is None else history.revision
            known = {} if history is None else histories.known(history, messages)
            compares = compares_contents(policy, expected_revision, revision)
            equal = histories.equal(messages, known) if compares else ()
            plan = planned(messages, known, equal, policy, expected_revision, revision)
            if plan.new or plan.replaced:
                history = history or histories.make(_new(chat_history_id, now))
                histories.carry_out(plan, history, now)
        return len(plan.new) + len(plan.replaced)

    def delete(self, session: Database, scope: Scope, chat_history_id: str, expected_revision: int | None) -> None:
        """Delete the history and its branches, with their messages."""
        with session.transaction() as connection:
            histories = Histories(connection, scope, session.settings.search)
            history = histories.find(chat_history_id)
            if history is not None:
                check_revision(expected_revision, history.revision)
                histories.delete(history.history_key)
            user_id = None if history is None else history.user_id
            histories.delete_branches(chat_history_id, is_there=history is not None, user_id=user_id)

    def delete_all(self, session: Database, scope: Scope) -> bool:
        """Delete some histories, so that no other writer waits for long."""
        return bool(self.erase_some(session, scope, "", None, _HISTORIES_PER_STEP))

    def delete_messages(
        self,
        session: Database,
        scope: Scope,
        chat_history_id: str,
        message_ids: Sequence[str] | None,
        from_message_id: str | None,
        expected_revision: int | None,
    ) -> None:
        """Delete messages by ranges of keys."""
        with session.transaction() as connection:
            histories = Histories(connection, scope, session.settings.search)
            history = histories.find(chat_history_id)
            if from_message_id is not None:
                check_revision(expected_revision, 0 if history is None else history.revision)
                first = None if history is None else histories.find_message(history, from_message_id)
                if history is None or first is None:
                    raise message_not_found(from_message_id)
                histories.delete_messages(history, [(first[0], history.next_key)])
            elif history is not None:
                keys = histories.find_keys(history, message_ids or ())
                if keys:
                    check_revision(expected_revision, history.revision)
                histories.delete_messages(history, [(key, key) for key in keys])

    def replace(
        self,
        session: Database,
        scope: Scope,
        chat_history_id: str,
        from_message_id: str,
        messages: Sequence[EncodedMessage],
        expected_revision: int | None,
    ) -> int:
        """Delete a range of keys, and insert at the next positions."""
        with session.transaction() as connection:
            histories = Histories(connection, scope, session.settings.search)
            history = histories.find(chat_history_id)
            if history is not None and histories.has_replaced(history, from_message_id, messages):
                return 0
            check_revision(expected_revision, 0 if history is None else history.revision)
            first = None if history is None else histories.find_message(history, from_message_id)
            if history is None or first is None:
                raise message_not_found(from_message_id)
            return histories.replace(history, first[0], messages, microseconds_now())

    def copy(
        self,
        session: Database,
        scope: Scope,
        source_id: str,
        target_id: str,
        until_message_id: str | None,
        meta: str | None,
    ) -> int:
        """Copy rows within the table."""
        with session.transaction() as connection:
            histories = Histories(connection, scope, session.settings.search)
            now = microseconds_now()
            source = histories.find_to_read(source_id)
            if source is None:
                raise history_not_found(source_id)
            first_key, last_key = key_range(source.history_key)
            if until_message_id is not None:
                until = histories.find_message(source, until_message_id)
                if until is None:
                    raise message_not_found(until_message_id)
                last_key = until[0]
            target = histories.find(target_id)
            if target is not None and target.message_count:
                raise history_has_messages(target_id)
            if not connection.execute(_HISTORY_HAS_MESSAGES, (first_key, last_key)).fetchone()[0]:
                return 0
            if target is not None:
                check_same_user(source.user_id, target.user_id)
            target = target or histories.make(_new(target_id, now, source.user_id))
            if meta is not None:
                histories.set_meta(target.history_key, target_id, meta)
            return histories.copy(first_key, last_key, target, now)

    def update_message(
        self, session: WriteSession, scope: Scope, chat_history_id: str, message_id: str, change: Callable[[str], str]
    ) -> MessageRow:
        """Read and write the content in one transaction."""
        with session.transaction() as connection:
            histories = Histories(connection, scope, session.settings.search)
            history = histories.find(chat_history_id)
            found = None if history is None else histories.find_message(history, message_id)
            if history is None or found is None:
                raise message_not_found(message_id)
            return histories.update_message(history, found[0], change)

    def import_history(
        self,
        session: Database,
        scope: Scope,
        history: HistoryRow,
        batches: Iterable[Sequence[MessageRow]],
        expected_revision: int,
    ) -> int:
        """Insert all batches in one transaction."""
        with session.transaction() as connection:
            histories = Histories(connection, scope, session.settings.search)
            return histories.import_batches(history, batches, expected_revision)

    def import_histories(
        self, session: Database, scope: Scope, histories: Sequence[tuple[HistoryRow, Sequence[MessageRow]]]
    ) -> int:
        """Insert all histories in one transaction."""
        with session.transaction() as connection:
            stored = Histories(connection, scope, session.settings.search)
            for row, _ in histories:
                stored.check_is_new(row.chat_history_id)
            return sum(stored.import_batches(row, [messages], 0) for row, messages in histories)

    def remove(self, session: Database, scope: Scope, chat_history_id: str, rows: Sequence[MessageRow]) -> list[int]:
        """Compare the messages and delete them by their keys, and recount the history."""
        with session.transaction() as connection:
            histories = Histories(connection, scope, session.settings.search)
            history = histories.find(chat_history_id)
            if history is None or not rows:
                return []
            first, last = rows[0].position, rows[-1].position
            stored = page_after(connection, scope, chat_history_id, first - 1, last - first + 1)
            gone, others = compare_rows(rows, stored)
            keys = [history.first_key + position for position in gone]
            histories.delete_messages(history, [(key, key) for key in keys])
            histories.recount(history.history_key)
            return others


def _new(chat_history_id: str, now: int, user_id: str | None = None) -> HistoryRow:
    return HistoryRow(chat_history_id=chat_history_id, created_at=now, updated_at=now, user_id=user_id)
