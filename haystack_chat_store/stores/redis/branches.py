# SPDX-License-Identifier: Apache-2.0
"""The branches of histories: finds them, and has them go where their history goes."""

from collections.abc import Sequence
from typing import NamedTuple

from haystack_chat_store.ids import branch_prefix
from haystack_chat_store.stores.conflicts import history_not_found
from haystack_chat_store.stores.redis.histories import (
    Deleted,
    ListedHistory,
    delete_histories,
    id_range,
    read_histories,
)
from haystack_chat_store.stores.redis.keys import BUCKETS, Keys, bucket_of
from haystack_chat_store.stores.redis.schema import BATCH_SIZE
from haystack_chat_store.stores.redis.scripts import directory as scripts
from haystack_chat_store.stores.redis.session import Session
from haystack_chat_store.stores.rows import branch_origin


class HandingOver(NamedTuple):
    """From which user to which one, or none, histories go."""

    before: str | None
    after: str | None


async def branches_of(session: Session, keys: Keys, chat_history_id: str) -> dict[str, ListedHistory]:
    """Return the branches of a history by their ids. They are found by these, and known by their meta."""
    parts: dict[int, str | None] = dict.fromkeys(range(BUCKETS), "")
    branches: dict[str, ListedHistory] = {}
    while parts:
        calls: list[tuple[Sequence[str], Sequence[str | int]]] = []
        for bucket, after in parts.items():
            ends = id_range(branch_prefix(chat_history_id), after or "")
            calls.append((keys.of_bucket(bucket), [*ends, BATCH_SIZE, "", keys.user]))
        answers = await session.run_each(scripts.BY_ID, calls)
        found = await read_histories(session, keys, [each for _, ids in answers for each in ids])
        branches |= {
            each: history for each, history in found.items() if branch_origin(each, history.row.meta) == chat_history_id
        }
        parts = {bucket: last for bucket, (last, _) in zip(parts, answers, strict=True) if last}
    return branches


async def delete_branches(session: Session, keys: Keys, chat_history_id: str, deleted: Deleted) -> None:
    """
    Delete the branches of a history that was deleted, and theirs. If it was renamed, some may name its old id still.

    If the user of the history is not known, all of the scope that name it as their origin are deleted.
    """
    origins = [chat_history_id] if deleted.may_have_branches else []
    before = deleted.renamed_from
    if before and not await read_histories(session, keys, [before], of_all=True):
        origins.append(before)
    for origin in origins:
        for branch, history in (await branches_of(session, keys, origin)).items():
            user_id = history.row.user_id or ""
            if deleted.owner in (None, user_id):
                of_branch = await delete_histories(session, keys, bucket_of(branch), [branch])
                await delete_branches(session, keys, branch, of_branch._replace(owner=user_id))


async def follow_origin(session: Session, keys: Keys, branch: str, origin: str, owner: str | None) -> None:
    """
    Have a branch that was just made go where its history went meanwhile: to another user, or away.

    A call that hands over, renames or deletes the history looks for its branches after it has changed the history. So
    either that call finds the branch, or the change is found here.

    :param owner: The user of both when the branch was made.
    :raises ChatHistoryNotFoundError: If the history is gone. The branch is deleted.
    """
    found = (await read_histories(session, keys, [origin], of_all=True)).get(origin)
    if found is None:
        await delete_histories(session, keys, bucket_of(branch), [branch])
        raise history_not_found(origin)
    await _hand_over(session, keys, branch, HandingOver(owner, found.row.user_id))


async def hand_over_branches(
    session: Session, keys: Keys, chat_history_id: str, handing_over: HandingOver, passed: set[str]
) -> None:
    """
    Give the branches of a history, and theirs, to another user, or to none. Those of a branch go before it.

    :param passed: The histories that this was done for: two may name each other as their origin.
    """
    passed.add(chat_history_id)
    if handing_over.before == handing_over.after or not await may_have_branches(session, keys, chat_history_id):
        return
    for branch, history in (await branches_of(session, keys, chat_history_id)).items():
        if history.row.user_id == handing_over.before and branch not in passed:
            await hand_over_branches(session, keys, branch, handing_over, passed)
            await _hand_over(session, keys, branch, handing_over)


async def _hand_over(session: Session, keys: Keys, branch: str, handing_over: HandingOver) -> None:
    """Give a branch to another user, or to none."""
    before, after = handing_over
    if before != after:
        names = [*keys.of_bucket_of(branch), keys.of_history(branch).counters]
        user = ["user_id"] if after is None else ["user_id", after]
        await session.run(scripts.UPDATE, names, [branch, len(user) if after else 0, *user, "", "", before or ""])


async def may_have_branches(session: Session, keys: Keys, chat_history_id: str) -> bool:
    """Whether a history that is there has branches, or had some. One that is not there may have some in any case."""
    return bool(await session.run(scripts.HAS_BRANCHES, keys.of_bucket_of(chat_history_id), [chat_history_id]))
