# SPDX-License-Identifier: Apache-2.0
"""Says what is new in a transcript that a client sends whole, and brings the history to where the client is."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from haystack.dataclasses import ChatMessage

from haystack_chat_store.conversation import transcripts
from haystack_chat_store.conversation.transcripts import Conversation, Plan
from haystack_chat_store.errors import (
    ChatHistoryAccessError,
    ChatHistoryChangedError,
    ChatHistoryExistsError,
    ChatHistoryNotFoundError,
    ChatMessageStoreError,
    MessageNotFoundError,
    TranscriptError,
)
from haystack_chat_store.ids import BRANCH_OF_KEY, MESSAGE_ID_KEY, branch_id, new_message_id
from haystack_chat_store.store_requests import Request, Requests, run, run_async
from haystack_chat_store.stores.base import BaseChatMessageStore
from haystack_chat_store.types import ChatHistoryInfo, MatchedTranscript
from haystack_chat_store.validation import validated_flag, validated_id

# How many rounds, or messages, are read to find the last question: one or, if hooks have added user messages, more.
_READS = (1, 16)
# A `last_k` that is larger than any history, and small enough for any database.
_ALL = 2**31 - 1


def match_transcript(
    store: BaseChatMessageStore,
    chat_history_id: str,
    transcript: Iterable[ChatMessage],
    *,
    question_id: str | None = None,
    is_retry: bool = False,
    keep_branches: bool = True,
    user_id: str | None = None,
) -> MatchedTranscript:
    """
    Say what is new in a transcript that a client sent whole, and bring the history to where the client is.

    Clients of OpenAI's chat completions send the whole conversation with each request, without ids. Here its questions
    are compared with those of the history, in order, by their content. What the client does not have any more is taken
    back. It is kept in a branch: a copy of the whole history, made before anything is deleted, whose meta has the
    history's id as `branch_of`. What is new is returned, and not stored: give it to a pipeline or an agent.

    ```python
    from haystack.dataclasses import ChatMessage
    from haystack_chat_store import InMemoryChatMessageStore, match_transcript

    store = InMemoryChatMessageStore()
    store.write_messages("chat", [ChatMessage.from_user("Hi!"), ChatMessage.from_assistant("Hello!")])
    transcript = [
        ChatMessage.from_user("Hi!"), ChatMessage.from_assistant("Hello!"), ChatMessage.from_user("How are you?")
    ]
    turn = match_transcript(store, "chat", transcript)
    print(turn.outcome, [message.text for message in turn.messages])  # append ['How are you?']
    ```

    :param store: The store that keeps the history.
    :param chat_history_id: The history's id. A history that does not exist is empty.
    :param transcript: The client's messages, oldest first. System messages are left out. A client may have cut off the
        beginning; then what it sends must begin with the end of the history.
    :param question_id: The client's id of the newest question, if it names one. It becomes the id of the message.
        Defaults to `None`: the id is made from the questions up to this one.
    :param is_retry: Whether the client repeats a request that may have failed, such as with the header
        `x-stainless-retry-count`. Then a stored answer counts. Defaults to False: the same transcript asks for another
        answer.
    :param keep_branches: Whether what is taken back is kept in a branch. Defaults to True. If False, it is deleted for
        good.
    :param user_id: The user of the history. Defaults to `None`: the user of the store, if it has one.
    :returns: The messages of this turn, what the transcript means, and the id of the branch.
    :raises ValueError: If an argument is wrong.
    :raises TranscriptError: If the transcript has no question, or nothing in common with the history. Nothing was
        changed.
    :raises ChatHistoryChangedError: If another request has changed the history meanwhile, and the change would be taken
        back. Nothing was deleted.
    :raises ChatHistoryAccessError: If `store` is the store of another user.
    :raises ChatMessageStoreError: If the store fails. The same request, sent again, goes on from there.
    """
    store = store if user_id is None else store.for_user(user_id)
    matching = _Matching(store, chat_history_id, transcript, question_id, is_retry, keep_branches)
    return run(matching.requests(), store, chat_history_id)


async def match_transcript_async(
    store: BaseChatMessageStore,
    chat_history_id: str,
    transcript: Iterable[ChatMessage],
    *,
    question_id: str | None = None,
    is_retry: bool = False,
    keep_branches: bool = True,
    user_id: str | None = None,
) -> MatchedTranscript:
    """Do what `match_transcript` does, without blocking the event loop."""
    store = store if user_id is None else store.for_user(user_id)
    matching = _Matching(store, chat_history_id, transcript, question_id, is_retry, keep_branches)
    return await run_async(matching.requests(), store, chat_history_id)


@dataclass(frozen=True)
class _Find(Request):
    """A request for the history without its messages or, with `branch`, for this branch."""

    branch: str | None = None

    def run(self, store: BaseChatMessageStore, chat_history_id: str) -> ChatHistoryInfo | None:
        return store.get_chat_history(self.branch or chat_history_id)

    async def run_async(self, store: BaseChatMessageStore, chat_history_id: str) -> ChatHistoryInfo | None:
        return await store.get_chat_history_async(self.branch or chat_history_id)


@dataclass(frozen=True)
class _Read(Request):
    """A request for the last rounds of the history or, with `branch`, of this branch."""

    last_k: int
    branch: str | None = None

    def run(self, store: BaseChatMessageStore, chat_history_id: str) -> list[ChatMessage]:
        return store.retrieve_messages(self.branch or chat_history_id, self.last_k)

    async def run_async(self, store: BaseChatMessageStore, chat_history_id: str) -> list[ChatMessage]:
        return await store.retrieve_messages_async(self.branch or chat_history_id, self.last_k)


@dataclass(frozen=True)
class _Copy(Request):
    """A request to copy the history to a branch."""

    branch: str
    options: dict[str, Any]

    def run(self, store: BaseChatMessageStore, chat_history_id: str) -> int:
        return store.copy_messages(chat_history_id, self.branch, **self.options)

    async def run_async(self, store: BaseChatMessageStore, chat_history_id: str) -> int:
        return await store.copy_messages_async(chat_history_id, self.branch, **self.options)


@dataclass(frozen=True)
class _Delete(Request):
    """A request to delete messages of the history."""

    options: dict[str, Any]

    def run(self, store: BaseChatMessageStore, chat_history_id: str) -> None:
        store.delete_messages(chat_history_id, **self.options)

    async def run_async(self, store: BaseChatMessageStore, chat_history_id: str) -> None:
        await store.delete_messages_async(chat_history_id, **self.options)


class _Stored(NamedTuple):
    """
    A history, as far as it was read, and what the transcript means for it.

    :param info: The history when the reading began, or `None` if it did not exist.
    :param messages: Its messages, or the last of them.
    :param conversation: The same, put together.
    :param plan: What the transcript means.
    """

    info: ChatHistoryInfo | None
    messages: list[ChatMessage]
    conversation: Conversation
    plan: Plan


class _Matching:
    """One call of `match_transcript`: its checked arguments, and the requests that it makes to the store."""

    def __init__(
        self,
        store: BaseChatMessageStore,
        chat_history_id: str,
        transcript: Iterable[ChatMessage],
        question_id: str | None,
        is_retry: bool,
        keep_branches: bool,
    ) -> None:
        if not isinstance(store, BaseChatMessageStore):
            raise ValueError(f"store must be a BaseChatMessageStore, got {type(store).__name__}.")
        self._chat_history_id = validated_id(chat_history_id, "chat_history_id")
        self._asked = transcripts.transcript_of(transcript)
        self._question_id = None if question_id is None else validated_id(question_id, "question_id")
        self._is_retry = validated_flag(is_retry, "is_retry")
        self._keep_branches = validated_flag(keep_branches, "keep_branches")
        if not self._asked.keys:
            raise TranscriptError("The transcript has no user message that says something. Nothing was changed.")

    def requests(self) -> Requests[MatchedTranscript]:
        refusal: ChatMessageStoreError | None = None
        while True:
            stored = yield from self._stored()
            going = transcripts.taken_back(stored.plan, stored.messages, stored.conversation)
            if going and refusal is not None:  # what another request has done meanwhile is not taken back unseen
                raise ChatHistoryChangedError(
                    "Another request has changed the history meanwhile. Nothing was deleted. Send the request again."
                ) from refusal
            try:
                branch = (yield from self._take_back(stored.info, stored.messages, going)) if going else None
            except (ChatHistoryChangedError, ChatHistoryNotFoundError, MessageNotFoundError) as error:
                refusal = error
                continue
            new = transcripts.new_messages(
                stored.plan, self._asked, stored.conversation, self._question_id, with_preamble=not stored.messages
            )
            return MatchedTranscript(messages=new, outcome=stored.plan.outcome, branch_id=branch)

    def _stored(self) -> Requests[_Stored]:
        """Read as much of the history as it takes to know what the transcript means."""
        info: ChatHistoryInfo | None = yield _Find()
        messages: list[ChatMessage] = []
        for last_k in _READS:
            if info is None:
                break
            messages = yield _Read(last_k)
            end = transcripts.conversation_of(messages)
            plan = transcripts.plan_from_end(self._asked, end, messages, info.round_count)
            if plan is not None:
                return _Stored(info, messages, end, transcripts.with_outcome(plan, end, is_retry=self._is_retry))
            if end.rounds:
                break
        if info is not None:  # one read: others may have written since the last one, or since the count was read
            messages = yield _Read(_ALL)
        whole = transcripts.conversation_of(messages)
        plan = transcripts.plan_from_all(self._asked, whole)
        return _Stored(info, messages, whole, transcripts.with_outcome(plan, whole, is_retry=self._is_retry))

    def _take_back(
        self, info: ChatHistoryInfo | None, messages: list[ChatMessage], going: list[ChatMessage]
    ) -> Requests[str | None]:
        """Delete messages of the history, and return the id of the branch that keeps them."""
        if info is None:
            return None
        current: ChatHistoryInfo | None = yield _Find()
        if current is None or current.revision != info.revision:
            raise ChatHistoryChangedError("The history has changed while it was read.")
        branch = (yield from self._branch(info, messages)) if self._keep_branches else None
        ids = [message.meta[MESSAGE_ID_KEY] for message in going]
        is_end = messages[len(messages) - len(going)] is going[0]
        which = {"from_message_id": ids[0]} if is_end else {"message_ids": ids}
        yield _Delete({**which, "expected_revision": info.revision})
        return branch

    def _branch(self, info: ChatHistoryInfo, messages: list[ChatMessage]) -> Requests[str]:
        """
        Copy the history as it was read. If an earlier attempt did, its copy is used.

        If another history has the id, or a user has taken it before, the branch gets an id that cannot be guessed.
        """
        branch = branch_id(self._chat_history_id, info.revision)
        last_id = messages[-1].meta[MESSAGE_ID_KEY]
        options = {"until_message_id": last_id, "meta": {BRANCH_OF_KEY: self._chat_history_id}}
        try:
            yield _Copy(branch, options)
        except (ChatHistoryExistsError, ChatHistoryAccessError):
            copy: ChatHistoryInfo | None = yield _Find(branch)
            end: list[ChatMessage] = yield _Read(1, branch)
            is_copy = (
                copy is not None
                and copy.meta.get(BRANCH_OF_KEY) == self._chat_history_id
                and (copy.message_count, copy.user_id) == (info.message_count, info.user_id)
            )
            if not is_copy or not end or end[-1].meta[MESSAGE_ID_KEY] != last_id:
                branch = branch_id(self._chat_history_id, new_message_id())
                yield _Copy(branch, options)
        return branch
