# SPDX-License-Identifier: Apache-2.0
"""
Reading as much of a history as a model is to be shown.
"""

import asyncio
from bisect import bisect_left
from collections.abc import Callable, Generator, Sequence
from itertools import chain
from typing import Any, TypeAlias

from haystack.dataclasses import ChatMessage, ChatRole
from haystack.token_counters import ApproximateTokenCounter
from haystack.token_counters.types import TokenCounter

from haystack_chat_store import protocol_calls
from haystack_chat_store.rounds import in_question_order, question_groups, question_of, round_starts, valid_for_model
from haystack_chat_store.types import ChatMessageStore
from haystack_chat_store.validation import validate_last_k, validate_window_step

# How many rounds are read first when only the budget says how many, and how many times as many next.
_FIRST_PAGE = 8
_PAGE_GROWTH = 4

# Yields the `last_k` of each read that it wants, is sent what was read, and returns the window.
_Reads: TypeAlias = Generator[int | None, list[ChatMessage], list[ChatMessage]]


class WindowReader:
    """
    Reads the part of a history that a model is to be shown: so many rounds, or as many as fit a number of tokens.

    The messages of each question stand together, one question after the other. What a model would reject is still among
    them, for only together with the messages of this turn can it be told: give both to `rounds.valid_for_model`.
    """

    def __init__(
        self,
        last_k: int | None = 10,
        *,
        max_tokens: int | None = None,
        token_counter: TokenCounter | None = None,
        window_step: int = 1,
    ) -> None:
        """
        Check and keep the settings.

        :param last_k: How many rounds to read when a read does not say. Defaults to 10. `None` for as many as fit
            `max_tokens` or, without `max_tokens`, for the store's own `last_k`. (If the store has
            `last_k_unit="message"`, these are messages, and as many before them as belong to the round in which they
            begin.)
        :param max_tokens: How many tokens all that the model is shown may have, the messages of this turn included.
            Defaults to `None`: any number. Of a history with more, the newest whole rounds that fit are read; if not
            even the newest round fits, its question and the newest of its steps (a step is an assistant message and
            the tool messages after it); if not even the question fits, nothing.
        :param token_counter: What counts the tokens. Defaults to Haystack's `ApproximateTokenCounter`.
        :param window_step: How many rounds have to come before the window's start moves on. Defaults to 1. A window
            with a step holds up to `window_step - 1` rounds more than `last_k`, and with `max_tokens` it may hold as
            many fewer than would fit; in return prompts share their beginning for several turns, as a provider's
            prompt cache wants it.
        :raises ValueError: If a setting is not one of these.
        """
        validate_last_k(last_k)
        validate_window_step(window_step)
        if max_tokens is not None and (isinstance(max_tokens, bool) or not isinstance(max_tokens, int)):
            raise ValueError(f"max_tokens must be an integer or None, got {type(max_tokens).__name__}.")
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens must be 1 or greater, got {max_tokens}.")
        # Texts, lists and classes have a `count` too, of something else.
        is_counter = callable(getattr(token_counter, "count", None)) and not isinstance(token_counter, (type, Sequence))
        if token_counter is not None and not is_counter:
            raise ValueError(f"token_counter must be a TokenCounter or None, got {type(token_counter).__name__}.")
        self.last_k = last_k
        self.max_tokens = max_tokens
        self.token_counter = token_counter or (None if max_tokens is None else ApproximateTokenCounter())
        self.window_step = window_step

    def warm_up(self) -> None:
        """
        Warm up the token counter, if there is something to.
        """
        counter: Any = self.token_counter
        if hasattr(counter, "warm_up"):
            counter.warm_up()

    def read(
        self,
        store: ChatMessageStore,
        chat_history_id: str,
        current_messages: Sequence[ChatMessage] = (),
        last_k: int | None = None,
    ) -> list[ChatMessage]:
        """
        Read the part of a history to show.

        :param store: Where the history is kept.
        :param chat_history_id: Which conversation.
        :param current_messages: The messages of this turn, which the model is shown around the history. They are not
            returned; they count towards `max_tokens`.
        :param last_k: How many rounds; 0 for none. Defaults to this reader's `last_k`.
        :raises ValueError: If an argument is wrong.
        :raises ChatMessageStoreError: If the store fails.
        """
        reads = self._reads(store, current_messages, last_k)
        wanted, window = _advanced(reads)
        while window is None:
            page = protocol_calls.retrieve(store, chat_history_id, wanted, self.window_step)
            wanted, window = _advanced(reads, page)
        return window

    async def read_async(
        self,
        store: ChatMessageStore,
        chat_history_id: str,
        current_messages: Sequence[ChatMessage] = (),
        last_k: int | None = None,
    ) -> list[ChatMessage]:
        """
        Do what `read` does, without blocking the event loop: neither for the store nor for the token counter.
        """
        reads = self._reads(store, current_messages, last_k)
        wanted, window = _advanced(reads)
        while window is None:
            page = await protocol_calls.retrieve_async(store, chat_history_id, wanted, self.window_step)
            # A counter may take its time, or ask a server.
            is_counted = self.max_tokens is not None
            wanted, window = await asyncio.to_thread(_advanced, reads, page) if is_counted else _advanced(reads, page)
        return window

    def _reads(self, store: ChatMessageStore, current_messages: Sequence[ChatMessage], last_k: int | None) -> _Reads:
        validate_last_k(last_k)
        last_k = self.last_k if last_k is None else last_k
        if last_k == 0:
            return []  # Not left to the store: to anybody's slice of the last 0 messages, 0 may mean all.
        if last_k is not None or self.max_tokens is None:
            page = yield from _whole_turns(store, last_k)
            return self._fitting(page, current_messages)
        count = _FIRST_PAGE
        while True:
            page = yield from _whole_turns(store, count)
            fitting = self._fitting(page, current_messages)
            if len(fitting) < len(in_question_order(page)) or _size(page, store) < count:
                return fitting
            count *= _PAGE_GROWTH

    def _fitting(self, page: list[ChatMessage], current_messages: Sequence[ChatMessage]) -> list[ChatMessage]:
        """
        Return the newest part of a page that fits, in question order.
        """
        history = in_question_order(page)
        counter, max_tokens = self.token_counter, self.max_tokens
        if counter is None or max_tokens is None:
            return history

        def fits(part: list[ChatMessage]) -> bool:
            return counter.count(valid_for_model(part, current_messages)) <= max_tokens

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
        steps = [index for index, message in enumerate(rest) if message.role is not ChatRole.TOOL]
        return (
            longest(aligned, rounds_from)
            or longest(after_aligned, rounds_from)
            or longest([*steps, len(rest)], newest_steps_from)
            or []
        )


def _advanced(reads: _Reads, page: list[ChatMessage] | None = None) -> tuple[int | None, list[ChatMessage] | None]:
    """
    Hand over what was read, and return the `last_k` of the next read or, when there is none, the window.
    """
    try:
        return (next(reads) if page is None else reads.send(page)), None
    except StopIteration as done:
        return None, done.value


def _whole_turns(store: ChatMessageStore, last_k: int | None) -> _Reads:
    """
    Read a window, and if it begins in the middle of a turn, more pages, back to the turn's question.

    A store that counts messages begins a window anywhere, and one that counts rounds also at a user message that a hook
    added to a turn.
    """
    window = page = yield last_k
    limit = protocol_calls.default_last_k(store) if last_k is None else last_k
    if not window or limit is None or _size(window, store) < limit:
        return window
    more = _FIRST_PAGE
    while (question := question_of(page, len(page) - len(window))) is None:
        longer = yield _size(window, store) + more
        if len(longer) <= len(page):
            return window  # It is all there is.
        page, more = longer, more * _PAGE_GROWTH
    return page[question:]


def _size(messages: Sequence[ChatMessage], store: ChatMessageStore) -> int:
    """
    Return how many rounds or messages these are, as the store counts them.
    """
    return len(round_starts(messages)) if protocol_calls.last_k_unit(store) == "round" else len(messages)
