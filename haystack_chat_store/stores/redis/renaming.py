# SPDX-License-Identifier: Apache-2.0
"""The operation that gives histories another id."""

import time
from dataclasses import replace

from haystack_chat_store.errors import (
    ChatHistoryAccessError,
    ChatHistoryExistsError,
    ChatHistoryNotFoundError,
    StoreUnavailableError,
)
from haystack_chat_store.stores.conflicts import check_access, history_is_there, history_not_found, no_access
from haystack_chat_store.stores.redis.branches import branches_of, follow_origin, may_have_branches
from haystack_chat_store.stores.redis.documents import index_written, prepare_index
from haystack_chat_store.stores.redis.failures import SlotsDifferError, StagedLostError
from haystack_chat_store.stores.redis.histories import (
    ListedHistory,
    StateOfHistory,
    delete_in_state,
    listed_history,
    read_histories,
    read_state,
)
from haystack_chat_store.stores.redis.keys import Keys
from haystack_chat_store.stores.redis.operations import RedisOperations
from haystack_chat_store.stores.redis.schema import new_name
from haystack_chat_store.stores.redis.scripts import directory as scripts
from haystack_chat_store.stores.redis.session import Session
from haystack_chat_store.stores.redis.staging import Stage, fence, note_branch
from haystack_chat_store.stores.redis.writing import written
from haystack_chat_store.stores.rows import HistoryRow, Scope, branch_origin, meta_of_branch, renamed_branch_ids

# How often a renaming begins again because the history was changed meanwhile.
_ATTEMPTS = 10
# For how long another call waits for one that has claimed the history. Then it takes it to be cut off.
_CLAIM_MILLISECONDS = 5_000
# For how long the server surely knows that a renaming has deleted a history: half as long as it says so.
_KNOWN_SECONDS = scripts.RENAMED_TO_MILLISECONDS / 2000


class _MetaChangedError(Exception):
    """The meta of a branch is not the one that it had when it was found."""


class _Meta:
    """
    The meta of a branch that is renamed.

    :param before: The meta that it has.
    :param origin: The new id of its history.
    """

    def __init__(self, before: str | None, origin: str) -> None:
        self.before = before
        self.after = meta_of_branch(before, origin)


class Renaming(RedisOperations):
    """The operation that gives histories another id."""

    async def rename_history(self, session: Session, scope: Scope, old_id: str, new_id: str) -> HistoryRow:
        """Rename the history, then its branches. A repeated call finds those that still name the old id."""
        row = await self._rename_one(session, scope, old_id, new_id, None)
        await self.rename_branches(session, scope, old_id, row, set())
        return row

    async def rename_branches(
        self, session: Session, scope: Scope, old_id: str, renamed: HistoryRow, passed: set[str]
    ) -> None:
        """
        Have the branches of a history that was renamed follow it, and theirs: those that have the same user.

        :param old_id: The id that it had. No history has it.
        :param passed: The histories that this was done for: two may name each other as their origin.
        """
        keys, new_id = self.keys(scope), renamed.chat_history_id
        passed.add(new_id)
        for listed in (await branches_of(session, keys, old_id)).values():
            if listed.row.user_id == renamed.user_id:
                await self._rename_branch(session, scope, listed.row, old_id, renamed)
        # Also those that an earlier call has renamed, whose own branches it may not have reached.
        of_new_id = await branches_of(session, keys, new_id) if await may_have_branches(session, keys, new_id) else {}
        for listed in of_new_id.values():
            before = listed.renamed_from
            is_own = listed.row.user_id == renamed.user_id and listed.row.chat_history_id not in passed
            if is_own and before and not await read_histories(session, keys, [before], of_all=True):
                await self.rename_branches(session, scope, before, listed.row, passed)
        await self._end_renaming(session, keys, old_id, new_id)

    async def _rename_branch(
        self, session: Session, scope: Scope, branch: HistoryRow, old_id: str, renamed: HistoryRow
    ) -> None:
        """Have a branch follow its history, unless it is none any more, or deleted."""
        keys, new_id, found = self.keys(scope), renamed.chat_history_id, branch
        for name in renamed_branch_ids(branch.chat_history_id, old_id, new_id):
            while branch_origin(found.chat_history_id, found.meta) == old_id:
                try:
                    await self._rename_one(session, scope, found.chat_history_id, name, _Meta(found.meta, new_id))
                    # The history may have been handed over, renamed or deleted meanwhile.
                    await follow_origin(session, keys, name, new_id, renamed.user_id)
                    return
                except _MetaChangedError:
                    rows = await read_histories(session, keys, [found.chat_history_id])
                    if not rows:
                        return
                    found = rows[found.chat_history_id].row
                except (ChatHistoryExistsError, ChatHistoryAccessError):
                    break
                except ChatHistoryNotFoundError:  # one of them was deleted meanwhile
                    return

    async def _rename_one(
        self, session: Session, scope: Scope, old_id: str, new_id: str, meta: "_Meta | None"
    ) -> HistoryRow:
        """
        Rename the keys by one script, or copy the history if the server says that no script can use the keys of both.

        The server knows that better than the settings of the store: there may be one node of a cluster, or a proxy.

        :param meta: The meta that a branch gets, or `None` if the history is no branch.
        :raises _MetaChangedError: If the branch does not have the meta that it had.
        """
        keys = self.keys(scope)
        await prepare_index(self, session, keys)
        await note_branch(session, keys, new_id, None if meta is None else meta.after)
        names = [*keys.to_write(old_id), *keys.to_write(new_id)]
        metas = ("", "") if meta is None else (meta.after, meta.before or "")
        try:
            fields = await session.run(scripts.RENAME, names, [old_id, new_id, new_name(), *metas, keys.user])
        except SlotsDifferError:
            fields = ["UNFINISHED"]
        if fields[0] == "UNFINISHED":
            return await self._rename_by_copying(session, scope, old_id, new_id, meta)
        if fields[0] == "ACCESS":
            raise no_access()
        if fields[0] == "EXISTS":
            raise history_is_there(new_id)
        if fields[0] == "CHANGED":
            raise _MetaChangedError
        renamed = None if fields[0] == "MISSING" else listed_history(new_id, fields)
        if renamed is None:
            raise history_not_found(old_id)
        await index_written(self, session, keys, new_id)
        return renamed.row

    async def _rename_by_copying(
        self, session: Session, scope: Scope, old_id: str, new_id: str, meta: "_Meta | None"
    ) -> HistoryRow:
        """
        Copy the history, and delete the old one if nothing about it has changed meanwhile; otherwise begin again.

        Before the copy appears, the old history is claimed for the new id, and it is only deleted if it is. So of two
        calls with different new ids, one finds the claim of the other, and waits until the old history is gone. If the
        other was cut off, it finishes that renaming, and goes on from there.

        Until the old one is gone, the new one notes of which state it is the copy, so that a repeated call finishes
        what another one began. Neither is deleted if it has a change that the other lacks.
        """
        keys = self.keys(scope)
        for _ in range(_ATTEMPTS):
            began = time.time()
            old, new = await self._unclaimed_states(session, keys, old_id, new_id)
            if old is None:
                if new is None or new.history.renamed_from != old_id:
                    raise history_not_found(old_id)
                check_access(scope, new.history.row.user_id)
                return new.history.row
            for each in filter(None, (old, new)):
                check_access(scope, each.history.row.user_id)
            if old.history.renaming:
                await self.finish_renaming(session, scope, old.history)
                return await self._rename_one(session, scope, old_id, new_id, meta)
            if old.claimed_for not in ("", new_id):
                claimed_for = await self._rename_as_claimed(session, scope, old)
                if claimed_for is None:
                    continue
                row = await self._rename_one(session, scope, claimed_for, new_id, meta)
                await self.rename_branches(session, scope, claimed_for, row, set())
                return row
            if new is not None and await self._is_present_copy(session, scope, keys, old, new):
                stage = old.stage or await self._claim(session, keys, old, new_id, new_name())
            else:
                stage = await self._copy_whole(session, keys, old, new_id, meta)
            if stage and await self._delete_copied(session, keys, old, new_id, stage, began):
                await index_written(self, session, keys, new_id)
                found = await read_histories(session, keys, [new_id])
                return found[new_id].row if found else replace(old.history.row, chat_history_id=new_id)
        raise StoreUnavailableError("The history was changed each time while it was being renamed. Try again.")

    @staticmethod
    async def _unclaimed_states(
        session: Session, keys: Keys, old_id: str, new_id: str
    ) -> tuple[StateOfHistory | None, StateOfHistory | None]:
        """Return the states of both histories, when no call that may still go on has claimed the old one."""
        while True:
            old, new = await read_state(session, keys, old_id), await read_state(session, keys, new_id)
            if old is None or (new is not None and new.is_copy_of(old)):  # either of two calls can finish
                return old, new
            if new is not None and new.history.renamed_from == old_id and not await read_state(session, keys, old_id):
                continue  # another call has finished between the two
            if not old.claimed_for or abs(old.claimed_since) >= _CLAIM_MILLISECONDS:
                return old, new
            await session.pause()

    async def _delete_copied(
        self, session: Session, keys: Keys, old: StateOfHistory, new_id: str, stage: str, began: float
    ) -> bool:
        """
        Delete a history that was copied, and return True. If it has changed or was deleted since, delete the copy.

        :param began: When its state was read, as a time of `time.time`. After a long pause of this process, it is not
            known any more what became of the history: the copy stays then.
        :returns: False if the history has changed.
        :raises ChatHistoryNotFoundError: If the history was deleted, or another call has finished this renaming and the
            copy is gone again.
        """
        old_id = old.history.row.chat_history_id
        deleted = await delete_in_state(session, keys, old_id, old.state, new_id)
        if deleted:
            return True
        names = [keys.of_bucket_of(old_id).schema_version, keys.of_history(old_id).counters]
        is_finished = deleted is not None and (
            await session.run(scripts.RENAMED_TO, names) == new_id or abs(time.time() - began) > _KNOWN_SECONDS
        )
        copy = await read_state(session, keys, new_id)
        if is_finished and copy is not None:
            return True
        if copy is not None and copy.is_copy_of(old) and copy.copied_state() == old.state:
            await delete_in_state(session, keys, new_id, copy.first_state())
        if deleted is not None:
            raise history_not_found(old_id)
        await self._give_up_claim(session, keys, old_id, stage)
        return False

    async def finish_renaming(self, session: Session, scope: Scope, history: ListedHistory) -> None:
        """Finish the renaming that gave a history its id, and have its branches follow."""
        keys, before, chat_history_id = self.keys(scope), history.renamed_from, history.row.chat_history_id
        try:
            await self.rename_history(session, scope, before, chat_history_id)
        except (ChatHistoryExistsError, ChatHistoryAccessError):  # these are two histories by now
            await self._end_renaming(session, keys, before, chat_history_id)
        except ChatHistoryNotFoundError:  # it was deleted meanwhile
            pass

    async def _rename_as_claimed(self, session: Session, scope: Scope, old: StateOfHistory) -> str | None:
        """
        Finish the renaming that has claimed a history, and return the id that it has then.

        If another history has this id, give the claim up, and return `None`.
        """
        old_id = old.history.row.chat_history_id
        of_all = replace(scope, user_id=None)  # the copy may be of the user that the history had before
        try:
            return (await self._rename_by_copying(session, of_all, old_id, old.claimed_for, None)).chat_history_id
        except ChatHistoryExistsError:
            await self._give_up_claim(session, self.keys(scope), old_id, old.stage)
            return None

    @staticmethod
    async def _is_present_copy(
        session: Session, scope: Scope, keys: Keys, old: StateOfHistory, new: StateOfHistory
    ) -> bool:
        """
        Whether a call that was cut off has copied the old history as it is. A copy of an earlier state is deleted.

        :raises ChatHistoryExistsError: If the new history is no such copy, or has changed since.
        """
        if new.is_copy_of(old):
            if new.copied_state() == old.state:
                return True
            new_id = new.history.row.chat_history_id
            if await delete_in_state(session, keys, new_id, new.first_state()) is not None:
                return False
        check_access(scope, old.history.row.user_id)
        raise history_is_there(new.history.row.chat_history_id)

    async def _copy_whole(
        self, session: Session, keys: Keys, old: StateOfHistory, new_id: str, meta: "_Meta | None"
    ) -> str:
        """
        Copy a history with everything, and claim it.

        :returns: The name under which the messages have waited, or nothing if the history was changed meanwhile or the
            new id was taken: then nothing was copied.
        """
        row = old.history.row
        if meta is not None and (row.meta or "") != (meta.before or ""):
            raise _MetaChangedError
        async with Stage(session, keys, new_id) as stage:
            try:
                is_added = await stage.add_history(row.chat_history_id, None, gaps=True) is not None
            except ChatHistoryNotFoundError:  # another client has ended the same renaming, perhaps
                is_added = False
            if not is_added or not await self._claim(session, keys, old, new_id, stage.name):
                return ""
            further = {"renamed_from": row.chat_history_id, "renaming": f"{row.created_at} {old.state}"}
            described = row if meta is None else replace(row, meta=meta.after)
            expiry = f"@{old.history.expires_at}" if old.history.expires_at else 0
            try:
                answer = await stage.finish(
                    0, expiry, described, user_id=row.user_id, further=further, least_revision=row.revision
                )
            except StagedLostError:
                return ""
        if isinstance(answer, int):
            return stage.name
        new = await read_state(session, keys, new_id)
        if new is None or not new.is_copy_of(old):  # it is not the same call of another client
            await self._give_up_claim(session, keys, row.chat_history_id, stage.name)
        if answer[0] != "CHANGED":
            written(answer, 0)
        return ""

    @staticmethod
    async def _claim(session: Session, keys: Keys, old: StateOfHistory, new_id: str, stage: str) -> str:
        """
        Claim a history as it is for a renaming. If a call with the same new id was cut off, it cannot go on then.

        :param stage: The name of the messages that wait for the renaming.
        :returns: The name, or nothing if the history was changed or claimed meanwhile.
        """
        old_id = old.history.row.chat_history_id
        if old.stage:
            await fence(session, keys, new_id, old.stage)
        names = [keys.of_bucket_of(old_id).schema_version, keys.of_history(old_id).counters]
        is_claimed = await session.run(scripts.CLAIM, names, [old.state, old.stage, stage, new_id])
        return stage if is_claimed else ""

    @staticmethod
    async def _give_up_claim(session: Session, keys: Keys, old_id: str, stage: str) -> None:
        names = [keys.of_bucket_of(old_id).schema_version, keys.of_history(old_id).counters]
        await session.run(scripts.GIVE_UP_CLAIM, names, [stage])

    @staticmethod
    async def _end_renaming(session: Session, keys: Keys, old_id: str, new_id: str) -> None:
        """Note that nothing of a renaming is left to do."""
        names = [keys.of_bucket_of(new_id).schema_version, keys.of_history(new_id).counters]
        await session.run(scripts.END_RENAMING, names, [old_id])
