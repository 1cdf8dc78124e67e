# SPDX-License-Identifier: Apache-2.0
"""
The operation that finds and repairs damage, such as keys that the server has evicted.

A damaged history is rebuilt from its contents: each message states its id and its role. All else is counted again.
"""

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass, replace

from haystack import logging
from haystack.dataclasses import ChatRole

from haystack_chat_store.errors import (
    MessageDecodingError,
    StoreUnavailableError,
    UnsupportedOperationError,
)
from haystack_chat_store.ids import branch_id
from haystack_chat_store.stores.faults import FaultList
from haystack_chat_store.stores.previews import beginning_of_content, kept_row, last_said, preview_faults
from haystack_chat_store.stores.redis.branches import branches_of
from haystack_chat_store.stores.redis.documents import (
    Unindexed,
    ask_index,
    create_index,
    document_fields,
    document_of,
    index_next,
    is_searched,
    read_unindexed,
)
from haystack_chat_store.stores.redis.histories import ListedHistory, read_histories
from haystack_chat_store.stores.redis.keys import BUCKETS, Keys, bucket_of
from haystack_chat_store.stores.redis.reading import MAX_COUNT, read_ids, read_part
from haystack_chat_store.stores.redis.renaming import Renaming
from haystack_chat_store.stores.redis.schema import (
    BATCH_SIZE,
    GAP,
    ROLES,
    TIME_LENGTH,
    id_and_role,
    letters_of,
    new_name,
    number,
    time_of_score,
)
from haystack_chat_store.stores.redis.scripts import checking as scripts
from haystack_chat_store.stores.redis.scripts import directory as of_directory
from haystack_chat_store.stores.redis.scripts import searching
from haystack_chat_store.stores.redis.session import Session
from haystack_chat_store.stores.redis.staging import Stage, note_branch
from haystack_chat_store.stores.rows import HistoryRow, MessageRow, Scope, branch_origin
from haystack_chat_store.stores.times import microseconds_now
from haystack_chat_store.types import Fault

logger = logging.getLogger(__name__)

# How often a history is looked at again because others write to it, before its faults are reported unrepaired.
_ATTEMPTS = 10
# What the script DOCUMENTS returns of a message without words.
_NO_WORDS = "   "


@dataclass(frozen=True)
class _Inspected:
    """What the script INSPECT returns of a history."""

    chat_history_id: str
    next_position: str
    message_count: str
    round_count: str
    created_at: str
    updated_at: str
    expires_at: str
    edits: str
    revision: str
    contents_length: int
    roles_length: int
    index_length: int
    times_length: int
    directory_time: str
    name_score: str
    expiries_time: str
    expiring_keys: int
    keys: int
    schema_version: str
    user_id: str
    owner: str
    user_time: str
    preview: str
    last_role: str
    last_text: str
    last_at: str
    meta: str
    is_origin: int

    def end(self) -> int:
        """Return the position after the last message."""
        return max(number(self.next_position), self.contents_length)

    def joined(self) -> str:
        """Return this as the script REBUILD compares it."""
        return " ".join(map(str, vars(self).values()))


class _Examination:
    """Finds what a history should be, and how it differs from that."""

    def __init__(self, inspected: _Inspected, index: Mapping[str, int]) -> None:
        """
        Begin without messages.

        :param index: The stored positions of the message ids.
        """
        self.inspected = inspected
        self.faults: list[str] = []
        self._index = index
        self._ids_by_position = {position: message_id for message_id, position in index.items()}
        self._ids: dict[str, int] = {}
        self._letters = ""
        self._stored_letters = ""
        self._first_time = 0
        self._questions: list[str] = []
        self._last: MessageRow | None = None

    def examine(self, contents: Sequence[str], letters: str, times: str, count: int) -> list[MessageRow]:
        """
        Return the messages that follow as they should be stored. A gap has no role.

        :param count: How many positions there are. The stored parts may have fewer.
        """
        rows = []
        for index in range(count):
            position = len(self._letters) + index
            content = contents[index] if index < len(contents) else ""
            message_id, role = self._id_and_role(content, position, letters[index : index + 1]) if content else ("", "")
            if content:
                self._ids[message_id] = position
            time = number(times[TIME_LENGTH * index : TIME_LENGTH * (index + 1)])
            self._first_time = self._first_time or time
            rows.append(
                MessageRow(
                    position=position,
                    created_at=time or number(self.inspected.created_at) or self._last_time(),
                    message_id=message_id,
                    role=role,
                    content=content,
                )
            )
        for row in rows:
            if row.role == ChatRole.USER.value and not any(map(beginning_of_content, self._questions[-1:])):
                self._questions.append(row.content)  # up to the first that has text
        self._last = last_said([row for row in rows if row.role]) or self._last
        self._letters += letters_of(row.role or GAP for row in rows)
        self._stored_letters += letters
        return rows

    def conclude(self, chat_history_id: str) -> None:
        """Find the faults, when all messages have been examined."""
        inspected, fields = self.inspected, self.fields(chat_history_id)
        end = inspected.end()
        lengths = inspected.contents_length, inspected.roles_length, inspected.times_length
        gone = sum(
            stored != GAP and letter == GAP for stored, letter in zip(self._stored_letters, self._letters, strict=False)
        )
        is_right = {
            "not all of its keys have equally many messages": lengths == (end, end, TIME_LENGTH * end),
            "its index does not fit its messages": self._index == self._ids,
            f"{gone} of its messages are gone": not gone,
            "its roles do not fit its messages": self._stored_letters == self._letters,
            **{f"its {name} is wrong": getattr(inspected, name) == str(value) for name, value in fields.items()},
            "is missing in the directory, or in a wrong place of it": (
                inspected.directory_time and float(inspected.directory_time) == float(fields["updated_at"])
            ),
            "is missing among the names": inspected.name_score,
            "is missing in the directory of its user, or in a wrong place of it": (
                inspected.user_id == inspected.owner
                and (not inspected.owner or inspected.user_time == inspected.directory_time)
            ),
            "the schema version of its bucket is lost": inspected.schema_version,
            "not all of it expires at the same time": (
                number(inspected.expires_at) == float(inspected.expiries_time or 0)
                and inspected.expiring_keys == (inspected.keys if inspected.expires_at else 0)
            ),
        }
        self.faults = [description for description, is_so in is_right.items() if not is_so]
        if not self.faults:  # else the messages may be others than those that it shows
            self.faults = preview_faults(self._shown(chat_history_id), self._questions, self._last)

    def _shown(self, chat_history_id: str) -> HistoryRow:
        """Return what lists show of the history's messages."""
        inspected = self.inspected
        return kept_row(
            chat_history_id,
            inspected.preview or None,
            ROLES.get(inspected.last_role, inspected.last_role) or None,
            inspected.last_text or None,
            number(inspected.last_at) if inspected.last_at else None,
        )

    def fields(self, chat_history_id: str) -> dict[str, str | int]:
        """Return what the hash of the history should hold."""
        user_id = self.inspected.user_id or self.inspected.owner
        return {
            **({"user_id": user_id} if user_id else {}),
            "chat_history_id": chat_history_id,
            "next_position": self.inspected.end(),
            "message_count": len(self._ids),
            "round_count": self._letters.count("u"),
            "created_at": number(self.inspected.created_at) or self._first_time or self._last_time(),
            "updated_at": self._last_time(),
            # Without it, a number that is hardly less: most changes append messages.
            "revision": number(self.inspected.revision) or self.inspected.end() + 1,
        }

    def _last_time(self) -> int:
        """Return when the history last changed."""
        inspected = self.inspected
        times = number(inspected.updated_at), float(inspected.directory_time or 0)
        return next(filter(None, map(time_of_score, times)), microseconds_now())

    def _id_and_role(self, content: str, position: int, letter: str) -> tuple[str, str]:
        stated = id_and_role(content)
        message_id, role = stated or (self._ids_by_position.get(position, ""), ROLES.get(letter, "assistant"))
        return (message_id if message_id and message_id not in self._ids else new_name()), role


class Checking(Renaming):
    """The operation that finds and repairs damage."""

    async def check(self, session: Session, scope: Scope) -> list[Fault]:
        """Check each history by itself: those in the lists of the buckets, and those whose keys a scan finds."""
        return await self._check(session, scope, repair=False)

    async def repair(self, session: Session, scope: Scope) -> list[Fault]:
        """Check each history, and write those with faults anew. Then index what is not indexed."""
        faults = await self._check(session, scope, repair=True)
        keys = self.keys(scope)
        if not self.cluster and await is_searched(session, keys):
            while await index_next(session, keys, BATCH_SIZE):
                pass
        return faults

    async def _check(self, session: Session, scope: Scope, *, repair: bool) -> list[Fault]:
        keys = self.keys(scope)
        ids: dict[str, None] = {}
        listed: list[tuple[str, str]] = []
        for bucket in range(BUCKETS):
            ids.update(dict.fromkeys(await session.run(of_directory.ALL, keys.of_bucket(bucket))))
        for address in await session.masters():
            cursor = ""
            while cursor != "0":
                options = "MATCH", keys.pattern(), "COUNT", BATCH_SIZE
                cursor, names = await session.ask(address, "SCAN", cursor or "0", *options)
                ids.update(dict.fromkeys(filter(None, map(keys.history_of, names))))
                for name in names:
                    user = keys.user_of(name)
                    if user is not None:
                        listed += [(user, each) for each in await session.ask(address, "ZRANGE", name, 0, -1)]
        faults = FaultList()
        branches: dict[str, str] = {}
        for chat_history_id in ids:
            faults.extend(await check_history(session, keys, chat_history_id, repair, branches))
        for origin, branch_meta in branches.items():
            faults.extend(await _check_origin(session, keys, origin, branch_meta, repair))
        faults.extend(await self._check_renamings(session, scope, list(ids), set(branches), repair=repair))
        for user, chat_history_id in listed:
            faults.extend(await _check_listing(session, keys, user, chat_history_id, repair))
        if not self.cluster and await is_searched(session, keys):
            faults.extend(await _check_index(session, keys, ids, repair))
        return list(faults)

    async def _check_renamings(
        self, session: Session, scope: Scope, chat_history_ids: Sequence[str], origins: set[str], *, repair: bool
    ) -> list[Fault]:
        """
        Find histories whose renaming is not done, and finish it.

        :param origins: The ids that branches name as that of their history.
        """
        keys, faults = self.keys(scope), []
        suspects = await self._unfinished_renamings(session, keys, chat_history_ids, origins)
        if suspects:
            await session.pause()  # most are done by then
            suspects = await self._unfinished_renamings(session, keys, list(suspects), origins)
        for chat_history_id, listed in suspects.items():
            is_repaired = repair
            if repair:
                try:
                    await self.finish_renaming(session, scope, listed)
                except StoreUnavailableError:  # they change all the time
                    is_repaired = False
            wrong = "The chat history: it was renamed, and what has its old id is left, or is being renamed now."
            faults.append(Fault(chat_history_id=chat_history_id, description=wrong, is_repaired=is_repaired))
        return faults

    @staticmethod
    async def _unfinished_renamings(
        session: Session, keys: Keys, chat_history_ids: Sequence[str], origins: AbstractSet[str]
    ) -> dict[str, ListedHistory]:
        found = {}
        for first in range(0, len(chat_history_ids), BATCH_SIZE):
            some = chat_history_ids[first : first + BATCH_SIZE]
            for chat_history_id, listed in (await read_histories(session, keys, some)).items():
                old_id, is_done = listed.renamed_from, not listed.renaming
                if is_done and old_id in origins and not await read_histories(session, keys, [old_id]):
                    branches = (await branches_of(session, keys, old_id)).values()
                    is_done = all(branch.row.user_id != listed.row.user_id for branch in branches)
                if not is_done:
                    found[chat_history_id] = listed
        return found


async def _check_index(session: Session, keys: Keys, ids: Iterable[str], repair: bool) -> list[Fault]:
    """Check that the index has the words of all messages, and no others."""
    faults: list[Fault] = []
    with suppress(UnsupportedOperationError):  # the server has no query engine any more
        if await ask_index(session, "FT.INFO", keys.index_name()) is None:
            if repair:
                await create_index(session, keys)
            faults.append(Fault(description="The search index is gone.", is_repaired=repair))
    (address,) = await session.masters()
    indexed: dict[str, set[int]] = {chat_history_id: set() for chat_history_id in ids}
    cursor = ""
    while cursor != "0":
        options = "MATCH", keys.documents_pattern(), "COUNT", BATCH_SIZE
        cursor, names = await session.ask(address, "SCAN", cursor or "0", *options)
        for chat_history_id, position in filter(None, map(keys.place_of, names)):
            indexed.setdefault(chat_history_id, set()).add(position)
    unindexed_in: dict[int, Unindexed] = {}
    for chat_history_id, positions in indexed.items():
        bucket = bucket_of(chat_history_id)
        if bucket not in unindexed_in:
            unindexed_in[bucket] = await read_unindexed(session, keys, MAX_COUNT, [bucket])
        faults += await _check_words(session, keys, chat_history_id, positions, unindexed_in[bucket], repair)
    return faults


async def _check_words(
    session: Session,
    keys: Keys,
    chat_history_id: str,
    positions: AbstractSet[int],
    unindexed: Unindexed,
    repair: bool,
) -> list[Fault]:
    """
    Check that the index has the words of a history's messages.

    :param positions: The positions that the index has words of.
    :param unindexed: What was not indexed in the bucket when these were found, or later.
    """
    with suppress(MessageDecodingError):  # its messages cannot be read, which is a fault already
        wrong = await _wrong_words(session, keys, chat_history_id, positions, unindexed)
        if wrong:  # unless it was written to meanwhile
            unindexed = await read_unindexed(session, keys, MAX_COUNT, [bucket_of(chat_history_id)])
            wrong &= await _wrong_words(session, keys, chat_history_id, positions, unindexed)
        if wrong:
            if repair:
                names = [keys.document(chat_history_id, position) for position in wrong]
                for first in range(0, len(names), BATCH_SIZE):
                    some: list[str] = [chat_history_id, *names[first : first + BATCH_SIZE]]
                    await session.run(searching.REINDEX, keys.of_bucket_of(chat_history_id), some)
            says = "The search index says something else than its messages."
            return [Fault(chat_history_id=chat_history_id, description=says, is_repaired=repair)]
    return []


async def _wrong_words(
    session: Session, keys: Keys, chat_history_id: str, positions: AbstractSet[int], unindexed: Unindexed
) -> AbstractSet[int]:
    """Return the positions of which the index has other words than the messages."""
    first = unindexed.first_positions.get(chat_history_id, MAX_COUNT) if unindexed.is_used else 0
    version = keys.of_bucket_of(chat_history_id).schema_version
    wrong: set[int] = set()
    gone, after = set(positions), -1
    while True:
        part = await read_part(session, keys, chat_history_id, BATCH_SIZE, after=after)
        rows = [row for row in part.rows if row.position < first]
        gone.difference_update(row.position for row in part.rows)
        if rows:
            names = [keys.document(chat_history_id, row.position) for row in rows]
            tags = document_fields(chat_history_id, part.user_id)
            expected = await session.to_thread(_expected_words, tags, rows)
            found = await session.run(searching.DOCUMENTS, [version, *names])
            wrong.update(row.position for row, one, other in zip(rows, expected, found, strict=True) if one != other)
        if len(part.rows) < BATCH_SIZE:
            break
        after = part.rows[-1].position
    left = sorted(gone)
    for start in range(0, len(left), BATCH_SIZE):  # unless they were deleted with their messages meanwhile
        some = left[start : start + BATCH_SIZE]
        names = [keys.document(chat_history_id, position) for position in some]
        found = await session.run(searching.DOCUMENTS, [version, *names])
        wrong.update(position for position, words in zip(some, found, strict=True) if words != _NO_WORDS)
    return wrong


def _expected_words(tags: tuple[str, str], rows: Sequence[MessageRow]) -> list[str]:
    """Return what the script DOCUMENTS returns if the index is right."""
    documents = [document_of(row.content) for row in rows]
    return [" ".join([*tags, *map(str, each)]) if each.tags else _NO_WORDS for each in documents]


async def _check_origin(session: Session, keys: Keys, origin: str, meta: str, repair: bool) -> list[Fault]:
    """Check that a history knows of its branches, which otherwise would not be deleted with it."""
    inspected = await _inspect(session, keys, origin)
    if inspected is None or not inspected.keys or inspected.is_origin:
        return []
    if not await branches_of(session, keys, origin):  # they were deleted meanwhile
        return []
    if repair:
        await note_branch(session, keys, branch_id(origin, ""), meta)
    wrong = "The chat history: it has branches and does not know of them."
    return [Fault(chat_history_id=origin, description=wrong, is_repaired=repair)]


async def _check_listing(session: Session, keys: Keys, user: str, chat_history_id: str, repair: bool) -> list[Fault]:
    """Check that a history in the directory of a user is this user's."""
    names = [*keys.of_bucket_of(chat_history_id), keys.of_history(chat_history_id).counters]
    if not await session.run(of_directory.CHECK_LISTING, names, [chat_history_id, user, int(repair)]):
        return []
    wrong = "The chat history: it is in the directory of a user whose it is not."
    return [Fault(chat_history_id=chat_history_id, description=wrong, is_repaired=repair)]


async def check_history(
    session: Session, keys: Keys, chat_history_id: str, repair: bool, branches: dict[str, str] | None = None
) -> list[Fault]:
    """
    Return the faults of a history. What others write meanwhile is neither taken for a fault nor lost.

    :param branches: Receives, if the history is a branch, its origin and its meta.
    """
    faults: list[Fault] = []
    repaired: list[Fault] = []  # by an attempt whose answer was lost, if nothing is wrong any more
    for _ in range(_ATTEMPTS):
        inspected = await _inspect(session, keys, chat_history_id)
        if inspected is None:
            return repaired
        origin = branch_origin(chat_history_id, inspected.meta or None)
        if origin is not None and branches is not None:
            branches[origin] = inspected.meta
        examination = await examine_history(session, keys, chat_history_id, inspected)
        faults = [
            Fault(chat_history_id=chat_history_id, description=f"The chat history: {description}.")
            for description in examination.faults
        ]
        if not faults:
            return repaired
        if repair:
            is_rebuilt, is_repeated = await _rebuild(session, keys, chat_history_id, inspected)
            if is_rebuilt or is_repeated:
                repaired = [replace(fault, is_repaired=True) for fault in faults]
            if is_rebuilt:
                logger.info("Repaired {count} faults of a chat history in Redis.", count=len(faults))
                return repaired
        elif await _inspect(session, keys, chat_history_id) == inspected:
            return faults
    return faults


async def examine_history(
    session: Session, keys: Keys, chat_history_id: str, inspected: _Inspected, stage: Stage | None = None
) -> _Examination:
    """
    Read all of a history and find its faults.

    :param stage: Takes the messages as they should be, if given.
    """
    if not inspected.keys:
        examination = _Examination(inspected, {})
        if inspected.directory_time or inspected.name_score or inspected.expiries_time or inspected.owner:
            examination.faults = ["is listed, but not there"]
        return examination
    examination = _Examination(inspected, await read_ids(session, keys, chat_history_id))
    for first in range(0, inspected.end(), BATCH_SIZE):
        count = min(BATCH_SIZE, inspected.end() - first)
        raw = await read_raw(session, keys, chat_history_id, first, count)
        rows = await session.to_thread(examination.examine, *raw, count)
        if stage is not None:
            await stage.add(rows)
    examination.conclude(chat_history_id)
    return examination


async def read_raw(
    session: Session, keys: Keys, chat_history_id: str, first: int, count: int
) -> tuple[list[str], str, str]:
    """Return the contents, the letters of roles and the times at some positions."""
    contents, roles, times = await session.run(scripts.RAW, keys.to_read(chat_history_id), [first, first + count - 1])
    return contents, roles, times


async def _inspect(session: Session, keys: Keys, chat_history_id: str) -> _Inspected | None:
    found = await session.run(scripts.INSPECT, keys.to_write(chat_history_id), [chat_history_id])
    return None if found == ["expired"] else _Inspected(*found)


async def _rebuild(session: Session, keys: Keys, chat_history_id: str, inspected: _Inspected) -> tuple[bool, bool]:
    """
    Put the history in order, unless it was written to meanwhile.

    :returns: Whether it is in order now, and whether it may be because an answer was lost.
    """
    async with Stage(session, keys, chat_history_id) as stage:
        examination = await examine_history(session, keys, chat_history_id, inspected, stage)
        fields = examination.fields(chat_history_id)
        expires_at = inspected.expires_at if number(inspected.expires_at) else inspected.expiries_time
        values = [value for field in fields.items() for value in field] if inspected.keys else []
        arguments = [chat_history_id, inspected.joined(), expires_at, fields["updated_at"], *values]
        names = [*keys.to_write(chat_history_id), *stage.keys]
        is_rebuilt, is_repeated = await session.run_reporting(scripts.REBUILD, names, arguments)
        if is_rebuilt:
            stage.length = 0  # no messages wait any more
        return bool(is_rebuilt), is_repeated
