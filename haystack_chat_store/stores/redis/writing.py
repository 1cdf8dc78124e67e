# SPDX-License-Identifier: Apache-2.0
"""The operations that change what was said."""

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from haystack.document_stores.types import DuplicatePolicy

from haystack_chat_store.errors import StoreUnavailableError
from haystack_chat_store.search_text import searchable_text_of_content
from haystack_chat_store.stores.conflicts import (
    check_access,
    check_revision,
    duplicate,
    history_exists,
    history_has_messages,
    message_not_found,
    no_access,
    other_user,
)
from haystack_chat_store.stores.previews import first_question, last_said
from haystack_chat_store.stores.redis.branches import follow_origin
from haystack_chat_store.stores.redis.documents import index_written, prepare_index
from haystack_chat_store.stores.redis.failures import changed_each_time, contradicting
from haystack_chat_store.stores.redis.histories import read_histories
from haystack_chat_store.stores.redis.keys import Keys
from haystack_chat_store.stores.redis.operations import RedisOperations, lifetime
from haystack_chat_store.stores.redis.reading import read_ids, read_part, read_position
from haystack_chat_store.stores.redis.schema import BATCH_SIZE, letters_of, new_name
from haystack_chat_store.stores.redis.scripts import messages as scripts
from haystack_chat_store.stores.redis.session import Session
from haystack_chat_store.stores.redis.staging import Stage
from haystack_chat_store.stores.rows import EncodedMessage, HistoryRow, MessageRow, Scope, branch_origin, compare_rows

# How often a copy begins again because its source was edited.
_COPY_ATTEMPTS = 10
# How often a change begins again because the messages and the index of a history contradict each other. They do so for
# a moment if the history is deleted and begins anew between the steps, and always if they are damaged.
_ATTEMPTS = 10


class Writing(RedisOperations):
    """The operations that change what was said."""

    async def append(
        self,
        session: Session,
        scope: Scope,
        chat_history_id: str,
        messages: Sequence[EncodedMessage],
        policy: DuplicatePolicy,
        expected_revision: int | None,
    ) -> int:
        """Append and replace by one script."""
        keys, last = self.keys(scope), last_said(messages)
        await prepare_index(self, session, keys)
        answer = await session.run(
            scripts.WRITE,
            keys.to_write(chat_history_id),
            [
                chat_history_id,
                lifetime(scope),
                letters_of(message.role for message in messages),
                "\x00".join(message.message_id for message in messages),
                policy.value,
                "" if expected_revision is None else expected_revision,
                new_name(),
                *(message.content for message in messages),
                first_question(messages) or "",
                "" if last is None else letters_of([last.role]),
                "" if last is None else last.text or "",
                keys.user,
            ],
        )
        count = written(answer, expected_revision)
        # What overwriting has changed may be far before the end, and was indexed.
        await index_written(
            self, session, keys, chat_history_id, None if policy is DuplicatePolicy.OVERWRITE else count
        )
        return count

    async def delete_messages(
        self,
        session: Session,
        scope: Scope,
        chat_history_id: str,
        message_ids: Sequence[str] | None,
        from_message_id: str | None,
        expected_revision: int | None,
    ) -> None:
        """Delete by ids. Of a message and all that follow it, the ids are read first."""
        keys = self.keys(scope)
        if from_message_id is None:
            answer = await remove_ids(session, keys, chat_history_id, message_ids or (), expected_revision)
            written(answer, expected_revision)
            return

        async def remove(ids: Sequence[str], next_position: int) -> Any:
            return await remove_ids(
                session,
                keys,
                chat_history_id,
                ids,
                expected_revision,
                required=from_message_id,
                next_position=next_position,
            )

        await _with_ids_from(session, keys, chat_history_id, from_message_id, remove, expected_revision)

    async def replace(
        self,
        session: Session,
        scope: Scope,
        chat_history_id: str,
        from_message_id: str,
        messages: Sequence[EncodedMessage],
        expected_revision: int | None,
    ) -> int:
        """Delete and append by one script. The ids to delete are read first."""
        keys, call = self.keys(scope), new_name()
        await prepare_index(self, session, keys)

        async def replace(ids: Sequence[str], next_position: int) -> Any:
            return await session.run(
                scripts.REPLACE,
                keys.to_write(chat_history_id),
                [
                    chat_history_id,
                    from_message_id,
                    next_position,
                    call,
                    "\x00".join(ids),
                    "" if expected_revision is None else expected_revision,
                    lifetime(scope),
                    letters_of(message.role for message in messages),
                    "\x00".join(message.message_id for message in messages),
                    *(message.content for message in messages),
                    keys.user,
                ],
            )

        count = await _with_ids_from(session, keys, chat_history_id, from_message_id, replace, expected_revision)
        await index_written(self, session, keys, chat_history_id, count)
        return count

    async def update_message(
        self, session: Session, scope: Scope, chat_history_id: str, message_id: str, change: Callable[[str], str]
    ) -> MessageRow:
        """Read the content, and write the new one if it is still the same; otherwise begin again."""
        keys = self.keys(scope)
        await prepare_index(self, session, keys)
        misses = 0
        states: set[str] = set()  # of the history at each miss: if all differ, others are at work
        while misses < _ATTEMPTS:
            position = await read_position(session, keys, chat_history_id, message_id)
            after = -1 if position is None else position - 1
            part = await read_part(session, keys, chat_history_id, 1, after=after)
            row = part.rows[0] if position is not None and part.rows and part.rows[0].message_id == message_id else None
            if row is None:
                await _check_is_own(session, scope, keys, chat_history_id)
                if position is None:
                    raise message_not_found(message_id)
                misses += 1
                states.add(part.state)
                continue
            content, changes_words = await session.to_thread_if_large([row.content], _changed, row.content, change)
            arguments: list[str | int] = [message_id, row.position, row.content, content, new_name()]
            arguments += [int(changes_words), keys.user]
            answer = await session.run(scripts.SET_CONTENT, keys.to_write(chat_history_id), arguments)
            if answer == 1:
                if changes_words:
                    await index_written(self, session, keys, chat_history_id)
                return replace(row, content=content)
            if answer[0] == "ACCESS":
                raise no_access()
        raise (changed_each_time if len(states) == misses else contradicting)(chat_history_id)

    async def renew(self, session: Session, scope: Scope, chat_history_id: str) -> None:
        """Set the time of all keys of the history."""
        keys = self.keys(scope)
        arguments: list[str | int] = [chat_history_id, lifetime(scope), keys.user]
        await session.run(scripts.RENEW, keys.to_write(chat_history_id), arguments)

    async def remove(
        self, session: Session, scope: Scope, chat_history_id: str, rows: Sequence[MessageRow]
    ) -> list[int]:
        """
        Compare the messages, and delete what the index has at their positions if the revision is still the same.

        A message that no id points to stays: a repair gives it one.
        """
        if not rows:
            return []
        keys = self.keys(scope)
        first, last = rows[0].position, rows[-1].position
        for _ in range(_ATTEMPTS):
            histories = await read_histories(session, keys, [chat_history_id])
            part = await read_part(session, keys, chat_history_id, last - first + 1, after=first - 1)
            gone, others = compare_rows(rows, part.rows)
            if not histories or not gone:
                return others
            index = await read_ids(session, keys, chat_history_id)
            removable = set(gone).intersection(index.values())
            ids = [message_id for message_id, position in index.items() if position in removable]
            staying = sorted({*gone, *others} - removable)
            revision = histories[chat_history_id].row.revision
            if await remove_ids(session, keys, chat_history_id, ids, revision) == len(removable):
                return staying
        return [row.position for row in rows]

    # ------------------------------------------------------------------ copying and importing

    async def copy(
        self,
        session: Session,
        scope: Scope,
        source_id: str,
        target_id: str,
        until_message_id: str | None,
        meta: str | None,
    ) -> int:
        """Read the source and stage its messages, again if the source is edited or handed over meanwhile."""
        keys, further = self.keys(scope), {} if meta is None else {"meta": meta}
        await prepare_index(self, session, keys)
        for _ in range(_COPY_ATTEMPTS):
            async with Stage(session, keys, target_id) as stage:
                source = await stage.add_history(source_id, until_message_id)
                if source is not None:
                    answer = await stage.finish(None, lifetime(scope), user_id=source.user_id, further=further)
                    if not isinstance(answer, int) and answer[0] == "CHANGED":
                        raise history_has_messages(target_id)
                    copied = written(answer, None)
                    if copied and branch_origin(target_id, meta) == source_id:
                        await follow_origin(session, keys, target_id, source_id, source.user_id)
                    await index_written(self, session, keys, target_id)
                    return copied
        raise StoreUnavailableError(
            "The history was edited each time while it was being copied. Nothing was copied. Try again."
        )

    async def import_history(
        self,
        session: Session,
        scope: Scope,
        history: HistoryRow,
        batches: Iterable[Sequence[MessageRow]],
        expected_revision: int,
    ) -> int:
        """Stage the messages, and append them by one script when all have come."""
        keys = self.keys(scope)
        await prepare_index(self, session, keys)
        found = await read_histories(session, keys, [history.chat_history_id], of_all=True)
        for each in found.values():
            check_access(scope, each.row.user_id)
        check_revision(expected_revision, next((each.row.revision for each in found.values()), 0))
        remaining = iter(batches)
        async with Stage(session, keys, history.chat_history_id) as stage:
            while True:
                rows = await session.to_thread(next, remaining, None)
                if rows is None:
                    break
                await stage.add(rows)
            user_id = history.user_id if scope.user_id is None else scope.user_id
            answer = await stage.finish(expected_revision, lifetime(scope), history, user_id=user_id)
            count = written(answer, expected_revision)
        await index_written(self, session, keys, history.chat_history_id)
        return count

    async def import_histories(
        self, session: Session, scope: Scope, histories: Sequence[tuple[HistoryRow, Sequence[MessageRow]]]
    ) -> int:
        """Import one after the other, if none of them exists."""
        ids = [history.chat_history_id for history, _ in histories]
        for existing_id, existing in (await read_histories(session, self.keys(scope), ids, of_all=True)).items():
            check_access(scope, existing.row.user_id)
            raise history_exists(existing_id)
        return sum([await self.import_history(session, scope, history, [rows], 0) for history, rows in histories])


def _changed(content: str, change: Callable[[str], str]) -> tuple[str, bool]:
    """Return the changed content of a message, and whether other words are found in it."""
    after = change(content)
    return after, searchable_text_of_content(content) != searchable_text_of_content(after)


async def _check_is_own(session: Session, scope: Scope, keys: Keys, chat_history_id: str) -> None:
    """
    Check that a history that cannot be read is none of another user.

    :raises ChatHistoryAccessError: If it is.
    """
    for each in (await read_histories(session, keys, [chat_history_id], of_all=True)).values():
        check_access(scope, each.row.user_id)


async def remove_ids(
    session: Session,
    keys: Keys,
    chat_history_id: str,
    message_ids: Sequence[str],
    expected_revision: int | None = None,
    *,
    required: str = "",
    next_position: int | None = None,
) -> Any:
    """
    Delete messages by their ids, and return how many there were, or why nothing was deleted.

    :param expected_revision: The revision that the history must have, or `None` for any.
    :param required: The id of a message that the history must have, and which is deleted with all that follow it.
    :param next_position: The history's next position, if nothing may have been appended meanwhile.
    """
    position, revision = ("" if each is None else each for each in (next_position, expected_revision))
    arguments = [chat_history_id, required, position, new_name(), "\x00".join(message_ids), revision, keys.user]
    return await session.run(scripts.REMOVE, keys.to_write(chat_history_id), arguments)


async def _with_ids_from(
    session: Session,
    keys: Keys,
    chat_history_id: str,
    from_message_id: str,
    change: Callable[[Sequence[str], int], Awaitable[Any]],
    expected_revision: int | None,
) -> int:
    """
    Read the ids of a message and all that follow it, and make a change with them, until no message comes meanwhile.

    :param change: Gets the ids, and the next position of the history: no ids and 0 if it does not have the message.
        Returns what the script returns.
    :returns: The number that the script returns.
    """
    ids: list[str] = []
    first: int | None = None
    misses, state = 0, ""
    states: set[str] = set()  # of the history at each miss: if all differ, others are at work
    while misses < _ATTEMPTS:
        next_position = 0
        if first is None:
            first = await read_position(session, keys, chat_history_id, from_message_id)
        if first is not None:
            limit = BATCH_SIZE if misses == 0 else 1
            part = await read_part(session, keys, chat_history_id, limit, after=first - 1)
            next_position, state = part.next_position, part.state
            if misses == 0:
                ids += [row.message_id for row in part.rows]
                first = part.rows[-1].position + 1 if part.rows else next_position
                if first < next_position:
                    continue
            else:  # the messages may state other ids than the index, which has those of all messages
                ids = list(await read_ids(session, keys, chat_history_id))
        answer = await change(ids, next_position)
        if answer == ["MISSING"]:
            raise message_not_found(from_message_id)
        if answer == ["OTHERS"]:
            misses += 1
            states.add(state)
            ids, first = [], None
        elif answer != ["MORE"]:
            return written(answer, expected_revision)
    raise (changed_each_time if len(states) == misses else contradicting)(chat_history_id)


def written(answer: Any, expected_revision: int | None) -> int:
    """Return how many messages a script has written, or raise the error for the reason why it has written nothing."""
    if isinstance(answer, int):
        return answer
    reason, found = answer
    if reason == "ACCESS":
        raise no_access()
    if reason == "OTHER":
        raise other_user()
    if reason == "CHANGED":
        check_revision(expected_revision, found)
    raise duplicate(found)
