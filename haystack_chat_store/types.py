# SPDX-License-Identifier: Apache-2.0
"""
The protocols that components and hooks use, and the results that stores return.

Any object that follows the protocols is a chat message store.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import date, datetime
from typing import Any, Literal, Protocol, runtime_checkable

from haystack.dataclasses import ChatMessage


@runtime_checkable
class ChatMessageStore(Protocol):
    """
    Keeps the messages of many chat histories, each under its `chat_history_id`.

    The methods are those of haystack-experimental's `ChatMessageStore`, so that package's store follows this protocol,
    too. The stores of this package promise more than the signatures: they keep the rules below. The test kit
    `haystack_chat_store.testing` checks each rule by its number.

    1. **Signatures.** A store has the methods of this protocol. Each method except `to_dict` and `from_dict` has a twin
       that ends in `_async` and takes the same arguments. Constructors take `skip_system_messages=True` and
       `last_k=10`.
    2. **Validation comes before any I/O.** A wrong argument raises a `ValueError` that names the argument, and nothing
       is written. An iterable of messages is written whole or refused. `last_k=0` returns nothing. `last_k=None` means
       the store's own `last_k`; if that is `None`, too, everything is returned. Ids are non-empty text of a stated
       length, without NUL and without lone surrogates.
    3. **A write is one atomic batch.** The whole batch becomes visible at once, or nothing of it. On a durable engine,
       a batch that a call has acknowledged stays.
    4. **One order.** Messages get the positions 0, 1, 2 … without gaps, at commit. Concurrent writers never lose,
       duplicate, split or reorder a batch. The order does not depend on clocks.
    5. **Every message has an id**, in `meta["chat_message_id"]` of the returned message. A message that already has an
       id keeps it. Any other message gets an id that is unique everywhere. The caller's objects are never changed.
    6. **Writing is idempotent by id.** A message whose id the history already has is skipped. The returned number
       counts only the messages that were written.
    7. **`last_k` counts rounds.** A round begins at each user message. Messages before the first user message belong to
       no round; they are returned if the history has fewer than `last_k` rounds. With `last_k_unit="message"`, `last_k`
       counts single messages, and more are returned if a tool result would otherwise come without its call. The stores
       of this package also take `window_step`: the start of the window moves only in steps of that many rounds (or
       messages), and the window holds `last_k` to `last_k + window_step - 1` of them. If a component with a step uses
       any other store, it reads the whole history.
    8. **Cost follows the window**, not the length of the history.
    9. **Isolation.** Histories never mix, whatever their ids contain. Namespaces never mix, either.
    10. **No aliasing.** A change to a message that was written or returned changes nothing in the store.
    11. **Lossless.** No value in a message's `meta` or in a part's `extra` costs the message. A value that has a
        documented JSON form is stored in this form. Any other value is stored as its `repr`, and the log says so; a
        store with `strict=True` refuses it with a `MessageEncodingError`. The parts of a message (text, calls, results,
        images, files, reasoning, and kinds that a newer Haystack adds) come back equal or are refused. A field of a
        part with another type than Haystack declares, such as a number as text, is refused. An integer has at most
        4,300 digits. Keys that become the same text are refused by name. Iterators are not run.
    12. **Threads, event loops, processes.** One store object serves all of them, a forked child included. Asynchronous
        calls never block the event loop. A cancelled call leaves neither half a batch nor a leaked connection.
    13. **Lifecycle.** The constructor opens nothing. The first use opens connections, `close()` releases them, and the
        next use opens them again. Stores with equal connection settings share their connections.
    14. **Serialization.** `from_dict(to_dict(store))` equals the store. No secret is ever written out.
    15. **Errors** are `ChatMessageStoreError`s. An error's text names the cause in words, and contains neither message
        text nor credentials. The cause of a `StoreUnavailableError` (also a `ConnectionError`) may go away by itself; a
        `StoreTimeoutError` (also a `TimeoutError`) is one of these. The cause of a `StoreConfigurationError` does not.
    16. **Schema versions.** A durable store records its schema version, upgrades an older database in place, and does
        not touch a database that a newer version wrote. Writing upgrades; reading does not.

    Components and hooks keep this rule on any store that keeps those above:

    26. **A turn, once.** Every reply that a component or a hook stores names its question, in
        `meta["chat_question_id"]`. The writer gives the i-th reply of a batch an id that is made from its question's id
        and i and, if the batch replaces a message, from that message's id. Messages of an agent's run have ids of their
        own; only the first reply of a run that replaces a message has an id that is made from that message's id. A turn
        that is sent again is stored once, with its first answer. What others have said after a turn's question is not
        shown in this turn.

    The stores of this package can do more than this protocol asks for. These rules hold for it:

    17. **Directory.** `list_chat_histories` returns pages of the histories whose ids begin with a literal prefix. The
        history whose messages changed last comes first. A walk along the cursors sees each history exactly once if it
        exists during the whole walk and does not change. A history that changes moves to the front, and is seen at most
        once. The cost of a page does not grow with the number of messages. `get_chat_history` and `update_chat_history`
        read and set title and meta; a new title or meta is not a change of messages. `list_namespaces` names the
        namespaces of the database that have histories. Times are aware, in UTC. A history can be made before its first
        message. `preview` and `last_message` are right after every change. A history whose `ttl` is over is as absent
        as one that does not exist; only writes and `purge` delete it. Lists, search and `statistics` leave branches
        out, unless called with `branches=True`: histories whose meta names another history as `branch_of`, and whose
        ids begin with its id (of which the first 400 characters count) and `~`.
    18. **Pages.** `list_messages` returns messages by position, in order: the newest, those just before a position, or
        those just after one. Positions rise, and are not used again as long as the history lives. `iterate_messages`
        walks through a whole history, in memory that does not grow with the history.
    19. **Changing what was said.** A write takes a `DuplicatePolicy`: OVERWRITE puts a message in the place of the
        stored message with the same id, FAIL refuses the batch. Single messages, or a message and all after it, can
        be deleted. Rounds, counts and windows are right afterwards. A history's `revision` grows with every change of
        its messages, edits in place included; a history that does not exist has revision 0, and one that is deleted
        and begins anew has greater revisions than before. With `expected_revision`, a write or a deletion is refused
        if the history has another revision. A call that finds its work done is no conflict with itself: a batch whose
        messages are all stored already, equal, returns 0 whatever `expected_revision` is (unless the policy is FAIL;
        with SKIP, messages are equal even if their meta differs, as after a rating), and a deletion of messages that
        are not there does nothing. `retrieve_window` returns what `retrieve_messages` returns,
        with the revision and the number of rounds of the same moment.
    20. **Forking.** `copy_messages` copies a history, or its beginning, to a history without messages. The copy appears
        whole or not at all, with its meta. So a copy that is to be a branch is never seen as a history of its own.
    21. **Search.** `search_messages` finds exactly the messages and titles that have all words, symbols and phrases of
        the query, for any query and in any language. They can be found as soon as they are written, and no longer once
        they are deleted. A score depends on nothing but what is found: it tells nothing of other users and namespaces.
    22. **Erasing.** `delete_chat_histories` deletes the histories with a prefix, `purge` those that have not changed
        for a long time. Both work in batches, and delete each history whole. A history that is deleted by its id takes
        its branches with it, and theirs. Erasing treats branches like other histories.
    23. **Moving.** Export and import preserve messages, ids, order, titles and meta, on any engine. They have branches.
        A second import adds nothing. A damaged file is refused. A history is never imported in part.

    24. **Reading never writes.** Calls that read change nothing in the database or its files: no table, index, upgrade
        or checkpoint. What can only be read can be read. A database that was not made yet reads as empty.

    25. **Users.** A history belongs to one user or to none. A store of a user (`for_user`, or the setting `user_id`)
        sees, counts, finds, changes and deletes only this user's histories. Calls that read treat a history of another
        user, or of no user, like one that does not exist. A write to it raises a `ChatHistoryAccessError`, which says
        nothing about it. The engine checks that in the statement that reads or writes. `list_chat_histories`,
        `search_messages`, `purge` and `statistics` take a `user_id`, too, and `delete_user` deletes all histories of a
        user. A branch belongs to the user of its history, and follows it to another user. A history of another user is
        never a branch of it.

    27. **Replacing.** `replace_messages` deletes a message and all messages after it, and appends others, in one atomic
        step: a reader sees the old end of the history or the new one. Ids of deleted messages can be used again;
        messages whose ids the history keeps are skipped; positions are not used again. If the history does not have
        the message to replace, nothing is changed. A repeated call that finds its messages, equal, at
        the end of the history returns 0.

    28. **What is shown is not what is stored.** A message that a component or a hook shows otherwise than it is stored
        carries `meta["chat_shown"]`, and is never stored.

    29. **A transcript, once.** What `match_transcript` finds new in a transcript that a client sends whole is stored
        once. What it takes back is in a branch as a whole before it is deleted, and is deleted only if the history has
        the revision that was read.
    """

    def to_dict(self) -> dict[str, Any]:
        """Serialize the store's settings."""
        ...

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ChatMessageStore":
        """Create a store from the result of `to_dict`."""
        ...

    def count_messages(self, chat_history_id: str) -> int:
        """Return the number of messages in a history."""
        ...

    def write_messages(self, chat_history_id: str, messages: list[ChatMessage]) -> int:
        """Append messages to a history and return how many were written."""
        ...

    def retrieve_messages(self, chat_history_id: str, last_k: int | None = None) -> list[ChatMessage]:
        """Return the end of a history, oldest message first."""
        ...

    def delete_messages(self, chat_history_id: str) -> None:
        """Delete a history."""
        ...

    def delete_all_messages(self) -> None:
        """Delete every history."""
        ...


@runtime_checkable
class AsyncChatMessageStore(ChatMessageStore, Protocol):
    """A `ChatMessageStore` that also has the asynchronous methods. All stores of this package have them."""

    async def count_messages_async(self, chat_history_id: str) -> int:
        """Return the number of messages in a history."""
        ...

    async def write_messages_async(self, chat_history_id: str, messages: list[ChatMessage]) -> int:
        """Append messages to a history and return how many were written."""
        ...

    async def retrieve_messages_async(self, chat_history_id: str, last_k: int | None = None) -> list[ChatMessage]:
        """Return the end of a history, oldest message first."""
        ...

    async def delete_messages_async(self, chat_history_id: str) -> None:
        """Delete a history."""
        ...

    async def delete_all_messages_async(self) -> None:
        """Delete every history."""
        ...


class Result:
    """The base of the results of stores: frozen dataclasses that can be turned into JSON."""

    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary of JSON values. Times are ISO 8601 text."""
        return {field.name: _json_ready(getattr(self, field.name)) for field in fields(self)}  # type: ignore[arg-type]  # all subclasses are dataclasses


@dataclass(frozen=True, kw_only=True, slots=True)
class MessagePreview(Result):
    """
    The beginning of a message.

    :param role: The message's role: `"user"`, `"assistant"` or `"tool"`.
    :param text: Up to 200 characters of its first text that is not blank, or `None`. Results of tools are texts, too.
    :param created_at: The time when the message was stored. Aware, in UTC.
    """

    role: str
    text: str | None
    created_at: datetime


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatHistoryInfo(Result):
    """
    A chat history without its messages.

    :param chat_history_id: The history's id.
    :param message_count: The number of its messages.
    :param round_count: The number of its rounds. A round is a user message and everything up to the next one.
    :param revision: Its revision, 1 or greater. It grows with every change of its messages, edits in place included. A
        history that is deleted and begins anew has greater revisions than before.
    :param created_at: The time when its first message was stored. Aware, in UTC.
    :param updated_at: The time when its messages last changed. Aware, in UTC. A new title or meta does not count.
    :param title: The title, or `None` if it has none.
    :param meta: The meta. Empty if it has none.
    :param user_id: The user that it belongs to, or `None`.
    :param preview: Up to 200 characters of the first question that has text, or `None`. Lists show it if a history has
        no title.
    :param last_message: The beginning of the last message that is not a system message, or `None`.
    """

    chat_history_id: str
    message_count: int
    round_count: int
    revision: int
    created_at: datetime
    updated_at: datetime
    title: str | None
    meta: dict[str, Any]
    user_id: str | None = None
    preview: str | None = None
    last_message: MessagePreview | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatHistoryPage(Result):
    """
    A page of the directory.

    :param items: The histories. The one whose messages changed last comes first.
    :param cursor: The `cursor` for the call of `list_chat_histories` that returns the next page, or `None` if this is
        the last page.
    """

    items: list[ChatHistoryInfo]
    cursor: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredMessage(Result):
    """
    A message with its position in its history.

    :param position: Its position. Positions rise from 0 and are not used again as long as the history lives, so
        deletions leave gaps.
    :param created_at: The time when the message was stored. Aware, in UTC.
    :param message: The message, with its id in `meta["chat_message_id"]`.
    """

    position: int
    created_at: datetime
    message: ChatMessage


@dataclass(frozen=True, kw_only=True, slots=True)
class HistoryWindow(Result):
    """
    The last rounds of a history, with its revision and its number of rounds at the same moment.

    :param messages: The messages, oldest first, each with its id in `meta["chat_message_id"]`.
    :param revision: The history's revision, 0 if it does not exist. Pass it as `expected_revision` to a write that
        depends on these messages.
    :param round_count: The number of rounds in the whole history.
    """

    messages: list[ChatMessage]
    revision: int
    round_count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchHit(Result):
    """
    A message, or the title of a history, that a search has found.

    :param chat_history_id: The id of the history.
    :param message_id: The message's id, or `None` if the title was found.
    :param position: The message's position in its history, or `None` for a title.
    :param role: The message's role: `"user"`, `"assistant"`, `"tool"` or `"system"`, or `None` for a title.
    :param created_at: The time when the message was stored or, for a title, the history's first message. In UTC.
    :param snippet: The part of the text or title around the first match, on one line.
    :param score: The quality of the match. A higher score is better. Scores of different searches cannot be compared.
    """

    chat_history_id: str
    message_id: str | None
    position: int | None
    role: str | None
    created_at: datetime
    snippet: str
    score: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenUsage(Result):
    """
    Sums of the token usage that replies carry in `meta["usage"]`.

    :param prompt_tokens: The number of tokens that models were shown.
    :param completion_tokens: The number of tokens that they wrote.
    :param total_tokens: The sum of both.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreStatistics(Result):
    """
    The amount of data in a store's namespace.

    :param chat_histories: The number of chat histories.
    :param messages: The number of their messages.
    :param rounds: The number of their rounds.
    :param size: The number of bytes that the engine uses for everything in the same file, tables or keys. `None` if the
        engine does not know it, or if only one user is counted: a user must not learn how much others have.
    :param messages_per_day: The number of messages stored on each day (UTC), in order. Days without messages are left
        out.
    :param usage: The token usage of each model, by its name in `meta["model"]` (`"unknown"` for none).
    :param usage_per_day: The same for each day (UTC), in order. Days without usage are left out.
    """

    chat_histories: int
    messages: int
    rounds: int
    size: int | None
    messages_per_day: Mapping[date, int]
    usage: Mapping[str, TokenUsage] = field(default_factory=dict)
    usage_per_day: Mapping[date, Mapping[str, TokenUsage]] = field(default_factory=dict)


#: What a transcript means for a history: see `MatchedTranscript`.
TranscriptOutcome = Literal["first", "append", "resume", "repeat", "regenerate", "rewind"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MatchedTranscript(Result):
    """
    What is new in a transcript that a client sent whole.

    :param messages: The messages of this turn, with ids: what is new, or the stored question that is asked again. Give
        them to the components or the agent as they are.
    :param outcome: What the transcript means:

        - `"first"`: nothing was stored. All of it is new.
        - `"append"`: it goes on after what is stored.
        - `"resume"`: its last question is stored, and not answered yet.
        - `"repeat"`: its last question is stored and answered, and the client tries again. The stored answer counts.
        - `"regenerate"`: its last question is stored and answered, and is to be answered anew.
        - `"rewind"`: the client went back: an earlier question is asked again, or was edited.
    :param branch_id: The id of the history that keeps what was taken back, or `None` if nothing was.
    """

    messages: list[ChatMessage]
    outcome: TranscriptOutcome
    branch_id: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault(Result):
    """
    An inconsistency in a store.

    :param chat_history_id: The id of the history that has the fault, or `None`.
    :param position: The position of the message that has the fault, or `None`.
    :param description: What is wrong. It contains no message text.
    :param is_repaired: Whether the fault has been repaired. Defaults to False.
    :param count: How many faults this stands for. Defaults to 1. It is greater for faults that are not listed, because
        there are too many of their kind.
    """

    chat_history_id: str | None = None
    position: int | None = None
    description: str
    is_repaired: bool = False
    count: int = 1


def _json_ready(value: Any) -> Any:
    if isinstance(value, (Result, ChatMessage)):
        return value.to_dict()
    if isinstance(value, date):  # a datetime is a date, too
        return value.isoformat()
    if isinstance(value, Mapping):
        return {str(_json_ready(key)): _json_ready(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_json_ready(item) for item in value]
    return value
