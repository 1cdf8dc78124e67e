# SPDX-License-Identifier: Apache-2.0
"""Reads the part of a history that a model is shown."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any

from haystack.dataclasses import ChatMessage, ChatRole
from haystack.token_counters import ApproximateTokenCounter
from haystack.token_counters.types import TokenCounter

from haystack_chat_store import protocol
from haystack_chat_store.conversation.provider_content import as_text
from haystack_chat_store.conversation.rounds import (
    Window,
    in_question_order,
    last_messages,
    last_rounds,
    question_groups,
    question_of,
    round_count,
)
from haystack_chat_store.conversation.shown import messages_for_model
from haystack_chat_store.conversation.turns import answer_of, last_question, up_to_turn, validate_question
from haystack_chat_store.errors import MessageNotFoundError
from haystack_chat_store.ids import message_id_of, question_id_of
from haystack_chat_store.store_requests import HasMessage, Requests, Retrieve, run, run_async
from haystack_chat_store.types import ChatMessageStore
from haystack_chat_store.validation import (
    usable_id_of,
    validate_last_k,
    validate_window_step,
    validated_flag,
    validated_id,
)

# If only the token budget limits the window, the first page has this many rounds, and each next page is larger by this
# factor.
_FIRST_PAGE_SIZE = 8
_PAGE_GROWTH = 4


@dataclass(frozen=True, kw_only=True)
class TurnWindow:
    """
    What a model is shown of a history in a turn, and what the history has of the turn itself.

    :param before: The window: rounds before the turn, in question order.
    :param turn: The messages of the turn, its question first. Empty if its question is not stored.
    :param rounds_after: The number of rounds that were stored after the turn, or after `until_message_id`.
    :param rounds: The number of rounds in the history, or `None` if the store does not say and it was not read whole.
    :param revision: The revision of the history that was read, 0 if it does not exist, or `None` if the store does not
        say.
    """

    before: list[ChatMessage]
    turn: list[ChatMessage]
    rounds_after: int
    rounds: int | None
    revision: int | None

    def answer(self, current_messages: Sequence[ChatMessage]) -> ChatMessage | None:
        """
        Return the stored answer of the turn, or `None` if the model is to be asked.

        :param current_messages: The messages of this turn. The model is asked if a message after the question is not
            stored yet, such as the result of a tool, and if the stored answer itself is among these messages.
        """
        answer = answer_of(self.turn)
        question = last_question(current_messages)
        if answer is None or question is None:
            return None
        known = {message_id_of(message) for message in self.turn if message is not answer}
        after = current_messages[next(at for at, each in enumerate(current_messages) if each is question) :]
        goes_on = any(message.role is not ChatRole.SYSTEM and message_id_of(message) not in known for message in after)
        return None if goes_on else answer

    def omitted_rounds(self) -> int | None:
        """Return how many rounds before the turn are not shown, or `None` if that is not known."""
        if self.rounds is None:
            return None
        return max(self.rounds - self.rounds_after - round_count([*self.before, *self.turn]), 0)


class WindowReader:
    """
    Reads the part of a history that a model is shown: a number of rounds, or as many as fit a number of tokens.

    The messages of each question stand together, one question after the other, as they are stored. How they are shown
    depends on the messages of this turn, so pass both to `shown`.
    """

    def __init__(
        self,
        last_k: int | None = 10,
        *,
        max_tokens: int | None = None,
        token_counter: TokenCounter | None = None,
        window_step: int = 1,
        portable: bool = True,
        merge_consecutive: bool = False,
        model: str | None = None,
    ) -> None:
        """
        Check and keep the settings.

        :param last_k: The number of rounds that a read without `last_k` reads. Defaults to 10. `None` for as many as
            fit `max_tokens` or, without `max_tokens`, for the store's own `last_k`. (If the store has
            `last_k_unit="message"`, this is a number of messages, and the read goes back to the beginning of the round
            in which they begin.)
        :param max_tokens: The largest number of tokens that the model is shown, the messages of this turn included.
            Defaults to `None`: any number. If the history has more, the newest whole rounds that fit are read. If the
            newest round alone does not fit, its question and the newest of its steps are read (a step is an assistant
            message and the tool messages after it). If the question alone does not fit, nothing is read.
        :param token_counter: The Haystack `TokenCounter` that counts the tokens. Defaults to `ApproximateTokenCounter`.
        :param window_step: The start of the window moves only in steps of this many rounds, so that the prompts of
            several turns begin with the same messages and a provider's prompt cache can be used. Defaults to 1. The
            window then holds up to `window_step - 1` rounds more than `last_k` or, with `max_tokens`, up to that many
            fewer than would fit.
        :param portable: Whether completed rounds are shown in a form that every provider takes. Defaults to True.
        :param merge_consecutive: Whether user and assistant speak in turns: see `messages_for_model`. Defaults to
            False.
        :param model: The name of the model that is asked: see `messages_for_model`. Defaults to `None`: not known.
        :raises ValueError: If a setting is wrong.
        """
        validate_last_k(last_k)
        validate_window_step(window_step)
        if max_tokens is not None and (isinstance(max_tokens, bool) or not isinstance(max_tokens, int)):
            raise ValueError(f"max_tokens must be an integer or None, got {type(max_tokens).__name__}.")
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens must be 1 or greater, got {max_tokens}.")
        # Texts, lists and classes have a `count`, too, which does not count tokens.
        is_counter = callable(getattr(token_counter, "count", None)) and not isinstance(token_counter, (type, Sequence))
        if token_counter is not None and not is_counter:
            raise ValueError(f"token_counter must be a TokenCounter or None, got {type(token_counter).__name__}.")
        self.last_k = last_k
        self.max_tokens = max_tokens
        self.token_counter = token_counter or (None if max_tokens is None else ApproximateTokenCounter())
        self.window_step = window_step
        self.portable = validated_flag(portable, "portable")
        self.merge_consecutive = validated_flag(merge_consecutive, "merge_consecutive")
        if model is not None and not isinstance(model, str):
            raise ValueError(f"model must be a text or None, got {type(model).__name__}.")
        if model is not None and not model.strip():
            raise ValueError("model must be the name of a model or None, got a blank text.")
        self.model = model

    def warm_up(self) -> None:
        """Warm up the token counter, if it can be warmed up."""
        counter: Any = self.token_counter
        if hasattr(counter, "warm_up"):
            counter.warm_up()

    def read(
        self,
        store: ChatMessageStore,
        chat_history_id: str,
        current_messages: Sequence[ChatMessage] = (),
        last_k: int | None = None,
        *,
        until_message_id: str | None = None,
        before_message_id: str | None = None,
    ) -> list[ChatMessage]:
        """
        Read the part of a history that the model is shown.

        :param store: The store that keeps the history.
        :param chat_history_id: The history's id.
        :param current_messages: The messages of this turn, which the model is shown around the history. They count
            towards `max_tokens`, and are not returned. Defaults to none.
        :param last_k: The number of rounds; 0 for none. Defaults to this reader's `last_k`.
        :param until_message_id: The id of the last message to read. Defaults to `None`: the last one of the history.
        :param before_message_id: The id of the message after the last one to read. Give only one of the two. Defaults
            to `None`.
        :returns: The messages of the window, in question order.
        :raises ValueError: If an argument is wrong.
        :raises MessageNotFoundError: If the history does not have `until_message_id` or `before_message_id`.
        :raises ChatMessageStoreError: If the store fails.
        """
        until = {"until_message_id": until_message_id, "before_message_id": before_message_id}
        return run(self.requests(store, current_messages, last_k, **until), store, chat_history_id)

    async def read_async(
        self,
        store: ChatMessageStore,
        chat_history_id: str,
        current_messages: Sequence[ChatMessage] = (),
        last_k: int | None = None,
        *,
        until_message_id: str | None = None,
        before_message_id: str | None = None,
    ) -> list[ChatMessage]:
        """Do what `read` does, without blocking the event loop: neither for the store nor for the token counter."""
        until = {"until_message_id": until_message_id, "before_message_id": before_message_id}
        requests = self.requests(store, current_messages, last_k, **until)
        computes_in_thread = self.max_tokens is not None  # a token counter may be slow, or call a server
        return await run_async(requests, store, chat_history_id, computes_in_thread=computes_in_thread)

    def requests(
        self,
        store: ChatMessageStore,
        current_messages: Sequence[ChatMessage] = (),
        last_k: int | None = None,
        *,
        until_message_id: str | None = None,
        before_message_id: str | None = None,
    ) -> Requests[list[ChatMessage]]:
        """
        Make the requests of `read`, for work that has other requests, too.

        :param store: The store that the requests go to. It is asked how it counts.
        """
        search = _WindowSearch(_validated_until(until_message_id), before_message_id=before_message_id)
        return self._reads(store, current_messages, last_k, search)

    def read_turn(
        self,
        store: ChatMessageStore,
        chat_history_id: str,
        current_messages: Sequence[ChatMessage] = (),
        last_k: int | None = None,
        *,
        until_message_id: str | None = None,
        before_message_id: str | None = None,
    ) -> TurnWindow:
        """
        Read the part of a history before a turn, and what is stored of the turn itself.

        The turn is known by the id of the last question in `current_messages`. What other turns have stored after this
        question is left out.

        :param store: The store that keeps the history.
        :param chat_history_id: The history's id.
        :param current_messages: The messages of this turn.
        :param last_k: The number of rounds before the turn; 0 for none. Defaults to this reader's `last_k`.
        :param until_message_id: The id of the last message to read. Defaults to `None`: the last one of the history.
        :param before_message_id: The id of the message after the last one to read. If the history does not have it, but
            has the turn's question, this turn has taken its place: all is read. Give only one of the two. Defaults to
            `None`.
        :raises ValueError: If an argument is wrong, or the question says nothing.
        :raises MessageNotFoundError: If the history does not have `until_message_id` or `before_message_id`.
        :raises ChatMessageStoreError: If the store fails.
        """
        search = _WindowSearch.before_turn_of(current_messages, until_message_id, before_message_id)
        before = run(self._turn_reads(store, current_messages, last_k, search), store, chat_history_id)
        return search.turn_window(before)

    async def read_turn_async(
        self,
        store: ChatMessageStore,
        chat_history_id: str,
        current_messages: Sequence[ChatMessage] = (),
        last_k: int | None = None,
        *,
        until_message_id: str | None = None,
        before_message_id: str | None = None,
    ) -> TurnWindow:
        """Do what `read_turn` does, without blocking the event loop."""
        search = _WindowSearch.before_turn_of(current_messages, until_message_id, before_message_id)
        requests = self._turn_reads(store, current_messages, last_k, search)
        computes_in_thread = self.max_tokens is not None  # a token counter may be slow, or call a server
        before = await run_async(requests, store, chat_history_id, computes_in_thread=computes_in_thread)
        return search.turn_window(before)

    def shown(self, window: Sequence[ChatMessage], current_messages: Sequence[ChatMessage]) -> list[ChatMessage]:
        """
        Return what the model is shown: the messages of this turn around a window, in a form that providers accept.

        :param window: The window that was read.
        :param current_messages: The messages of this turn.
        """
        return messages_for_model(
            window,
            current_messages,
            portable=self.portable,
            merge_consecutive=self.merge_consecutive,
            model=self.model,
        )

    def shown_turn(self, window: TurnWindow, current_messages: Sequence[ChatMessage]) -> list[ChatMessage]:
        """
        Return what the model is shown in a turn: the window, then the turn, in a form that providers accept.

        The question is shown as `current_messages` have it.

        :param window: The window that was read for these messages.
        :param current_messages: The messages of this turn.
        """
        return self.shown([*window.before, *_steps_of(window.turn, current_messages)], current_messages)

    def _turn_reads(
        self,
        store: ChatMessageStore,
        current_messages: Sequence[ChatMessage],
        last_k: int | None,
        search: "_WindowSearch",
    ) -> Requests[list[ChatMessage]]:
        """Read the rounds before the turn. If the turn has taken the place of `before_message_id`, read all."""
        try:
            return (yield from self._reads_before_turn(store, current_messages, last_k, search))
        except MessageNotFoundError:
            may_be_replaced = search.before_message_id is not None and search.question_id is not None
            if not may_be_replaced or not (yield HasMessage(str(search.question_id))):
                raise
        search.before_message_id = None  # an earlier attempt of this turn has taken its place
        return (yield from self._reads_before_turn(store, current_messages, last_k, search))

    def _reads_before_turn(
        self,
        store: ChatMessageStore,
        current_messages: Sequence[ChatMessage],
        last_k: int | None,
        search: "_WindowSearch",
    ) -> Requests[list[ChatMessage]]:
        """
        Read the rounds before the turn.

        If the question is not on the first page, look it up. If the history has it further back, read again.
        """
        if (self.last_k if last_k is None else last_k) == 0:
            # No rounds are wanted, but the revision and the stored turn are.
            yield from search.page(store, 0 if search.is_open else 1, self.window_step)
        window = yield from self._reads(store, current_messages, last_k, search)
        if search.may_be_further_back and (yield HasMessage(str(search.question_id))):
            search.is_turn_stored = True
            yield from search.page(store, 1, self.window_step)
            window = yield from self._reads(store, current_messages, last_k, search)
        return window

    def _reads(
        self,
        store: ChatMessageStore,
        current_messages: Sequence[ChatMessage],
        last_k: int | None,
        search: "_WindowSearch",
    ) -> Requests[list[ChatMessage]]:
        """Read the rounds before the end: `last_k` of them or, if only the tokens limit them, as many as fit."""
        validate_last_k(last_k)
        last_k = self.last_k if last_k is None else last_k
        if last_k == 0:
            return []
        if last_k is not None or self.max_tokens is None:
            page = yield from self._whole_rounds(store, last_k, search)
            page = yield from _without_earlier_questions(page, store, last_k)
            return self._newest_that_fit(page, current_messages, search)
        count = _FIRST_PAGE_SIZE
        while True:
            page = yield from self._whole_rounds(store, count, search)
            own = yield from _without_earlier_questions(page, store, count)
            fitting = self._newest_that_fit(own, current_messages, search)
            if len(fitting) < len(in_question_order(own)) or _size(page, store) < count:
                return fitting
            count *= _PAGE_GROWTH

    def _whole_rounds(
        self, store: ChatMessageStore, last_k: int | None, search: "_WindowSearch"
    ) -> Requests[list[ChatMessage]]:
        """
        Read a window. If it begins in the middle of a round, read more pages, back to the round's question.

        In a store that counts messages, a window can begin anywhere. In a store that counts rounds, it can begin at a
        user message that a hook added to a round.
        """
        window = page = yield from search.page(store, last_k, self.window_step)
        limit = protocol.default_last_k(store) if last_k is None else last_k
        if not window or limit is None or _size(window, store) < limit:
            return window
        more = _FIRST_PAGE_SIZE
        while (question := question_of(page, len(page) - len(window))) is None:
            longer = yield from search.page(store, _size(window, store) + more, self.window_step)
            if len(longer) <= len(page):
                return longer[max(len(longer) - len(window), 0) :]  # the page is the whole history
            page, more = longer, more * _PAGE_GROWTH
        return page[question:]

    def _newest_that_fit(
        self, page: list[ChatMessage], current_messages: Sequence[ChatMessage], search: "_WindowSearch"
    ) -> list[ChatMessage]:
        """Return the newest part of a page that fits `max_tokens`, in question order."""
        history = in_question_order(page)
        counter, max_tokens = self.token_counter, self.max_tokens
        if counter is None or max_tokens is None:
            return history

        def fits(part: list[ChatMessage]) -> bool:
            shown = self.shown([*part, *_steps_of(search.turn, current_messages)], current_messages)
            return counter.count([as_text(message) for message in shown]) <= max_tokens

        def longest(starts: Sequence[int], part_from: Callable[[int], list[ChatMessage]]) -> list[ChatMessage] | None:
            # Each part is shorter than the one before, so bisection finds the first that fits.
            found = bisect_left(starts, True, key=lambda start: fits(part_from(start)))
            return part_from(starts[found]) if found < len(starts) else None

        if fits(history):
            return history
        _, *rounds = question_groups(page)
        if not rounds:
            return []

        def rounds_from(start: int) -> list[ChatMessage]:
            return list(chain.from_iterable(rounds[start:]))

        def newest_steps_from(start: int) -> list[ChatMessage]:
            return [question, *rest[start:]]

        aligned = range(0, len(rounds), self.window_step)
        after_aligned = range(aligned[-1] + 1, len(rounds))
        question, *rest = rounds[-1]
        # Replies that follow each other may be parts of one reply, so a step does not begin between them.
        steps = [
            index
            for index, (before, message) in enumerate(pairwise(rounds[-1]))
            if message.role is not ChatRole.TOOL
            and not (message.role is ChatRole.ASSISTANT and before.role is ChatRole.ASSISTANT)
        ]
        return (
            longest(aligned, rounds_from)
            or longest(after_aligned, rounds_from)
            or longest([*steps, len(rest)], newest_steps_from)
            or []
        )


def _without_earlier_questions(
    page: list[ChatMessage], store: ChatMessageStore, last_k: int | None
) -> Requests[list[ChatMessage]]:
    """
    Leave out the messages of questions that are stored before the page: they would pass for answers to another one.

    Messages of a question that was deleted stay.

    :param last_k: The number of rounds or messages that the page was to have.
    """
    limit = protocol.default_last_k(store) if last_k is None else last_k
    if limit is None or _size(page, store) < limit:
        return page  # the whole history
    ids = {message_id_of(message) for message in page}
    earlier = set()
    for question in dict.fromkeys(map(question_id_of, page)):
        if isinstance(question, str) and question not in ids and (yield HasMessage(question)):
            earlier.add(question)
    return [message for message in page if question_id_of(message) not in earlier] if earlier else page


@dataclass
class _WindowSearch:
    """
    The search for a window, page by page, and what the last page had of the turn and of the history.

    A window ends at the end of the history, at a message, or before a turn, which is read apart.

    :param until_message_id: The id of the last message to read, or `None` for all.
    :param before_message_id: The id of the message after the last one to read, or `None` for all.
    :param question_id: The id of the turn's question, or `None`.
    :param is_turn_stored: Whether the history is known to have the question. If so, larger pages are read until it is
        found.
    :param turn: The messages of the turn, its question first, as the last page had them.
    :param rounds_after: The number of rounds after the end, on the last page.
    :param rounds: The number of rounds in the history, as the last page was read, or `None` if it is not known.
    :param revision: The revision of the history, as the last page was read, or `None` if it is not known.
    :param may_be_further_back: Whether the question may be stored before the last page.
    """

    until_message_id: str | None = None
    question_id: str | None = None
    is_turn_stored: bool = False
    turn: list[ChatMessage] = field(default_factory=list)
    rounds_after: int = 0
    rounds: int | None = None
    revision: int | None = None
    may_be_further_back: bool = False
    before_message_id: str | None = None
    # The number of rounds or messages, in the store's unit, that a page is to have after the end.
    _size_after: int = 0

    @property
    def is_open(self) -> bool:
        """Whether the window ends with the history: no message or question is looked for."""
        return self.until_message_id is None and self.before_message_id is None and self.question_id is None

    @classmethod
    def before_turn_of(
        cls, current_messages: Sequence[ChatMessage], until_message_id: str | None, before_message_id: str | None
    ) -> "_WindowSearch":
        """
        Return a search for the window before the turn of the last question.

        If the question has an id, its turn is probably stored as the last one.
        """
        validate_question(current_messages, "current_messages")
        if until_message_id is not None and before_message_id is not None:
            raise ValueError("until_message_id and before_message_id cannot be given together.")
        question_id = usable_id_of(last_question(current_messages))
        return cls(
            None if until_message_id is None else validated_id(until_message_id, "until_message_id"),
            question_id,
            before_message_id=None
            if before_message_id is None
            else validated_id(before_message_id, "before_message_id"),
            _size_after=0 if question_id is None else 1,
        )

    def page(self, store: ChatMessageStore, last_k: int | None, window_step: int) -> Requests[list[ChatMessage]]:
        """Read the last rounds or messages before the end, and what comes after it, so that it is found."""
        limit = protocol.default_last_k(store) if last_k is None else last_k
        while True:
            asked = last_k if limit is None or self._size_after == 0 else limit + self._size_after
            read, self.revision, self.rounds = yield Retrieve(asked, window_step)
            size = _size(read, store)
            is_whole = limit is None or size < limit + self._size_after
            if self.rounds is None and is_whole:
                self.rounds = round_count(read)
            before, is_found = self._before(read, is_whole=is_whole)
            if is_whole or (is_found and _size(before, store) >= (limit or 0)):
                if limit is None or (len(before) == len(read) and self._size_after == 0):
                    return before
                return _last(before, Window(protocol.last_k_unit(store), limit, window_step))
            growth = max(self._size_after * _PAGE_GROWTH, _FIRST_PAGE_SIZE)
            self._size_after = size - _size(before, store) if is_found else growth

    def turn_window(self, before: list[ChatMessage]) -> TurnWindow:
        """Return the window before the turn with what the last page had of the turn and of the history."""
        return TurnWindow(
            before=before,
            turn=self.turn,
            rounds_after=self.rounds_after,
            rounds=self.rounds,
            revision=self.revision,
        )

    def _before(self, read: list[ChatMessage], *, is_whole: bool) -> tuple[list[ChatMessage], bool]:
        """Return the messages before the end, and whether it was found."""
        page = read
        if (end_id := self.until_message_id or self.before_message_id) is not None:
            place = next((at for at, each in enumerate(read) if message_id_of(each) == end_id), None)
            if place is None and is_whole:
                raise MessageNotFoundError(f"The history has no message with the id {end_id!r}.")
            if place is None:
                return read, False
            page = read[: place + 1] if self.until_message_id is not None else read[:place]
        before, self.turn = (page, []) if self.question_id is None else up_to_turn(page, self.question_id)
        self.rounds_after = round_count(read) - round_count([*before, *self.turn])
        is_after = any(message_id_of(message) == self.question_id for message in read[len(page) :])
        self.may_be_further_back = not (self.question_id is None or self.turn or is_whole or is_after)
        return before, bool(self.turn) or not self.is_turn_stored


def _validated_until(until_message_id: str | None) -> str | None:
    return None if until_message_id is None else validated_id(until_message_id, "until_message_id")


def _steps_of(turn: Sequence[ChatMessage], current_messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """
    Return the turn as the history of this turn shows it: nothing if it is only the question, which this turn brings.

    Otherwise the question as this turn has it, and the steps after it.
    """
    question = last_question(current_messages)
    return [] if len(turn) < 2 or question is None else [question, *turn[1:]]


def _last(messages: Sequence[ChatMessage], window: Window) -> list[ChatMessage]:
    """Return the last rounds or messages."""
    if window.unit == "round":
        return last_rounds(messages, window)
    return last_messages(messages, window.size(len(messages)))


def _size(messages: Sequence[ChatMessage], store: ChatMessageStore) -> int:
    """Return the number of rounds or messages, in the store's unit of `last_k`."""
    return round_count(messages) if protocol.last_k_unit(store) == "round" else len(messages)
