# SPDX-License-Identifier: Apache-2.0
"""
Reading as much of a history as a model is to be shown.
"""

import asyncio
from bisect import bisect_left
from collections.abc import Generator, Sequence
from typing import Any, TypeAlias

from haystack.dataclasses import ChatMessage, ChatRole
from haystack.token_counters import ApproximateTokenCounter
from haystack.token_counters.types import TokenCounter

from haystack_chat_store import any_store
from haystack_chat_store.rounds import (
    LastKUnit,
    in_question_order,
    round_starts,
    valid_for_model,
    validate_last_k,
    validate_window_step,
)
from haystack_chat_store.types import ChatMessageStore

# How many rounds are read first when only the budget says how many, and how many times as many next.
_FIRST_PAGE = 8
_PAGE_GROWTH = 4

# Yields the `last_k` of each read that it wants, and is sent what was read; last, yields the window.
_Reads: TypeAlias = Generator[int | list[ChatMessage] | None, list[ChatMessage], None]


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
            `last_k_unit="message"`, these are messages.)
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
        if token_counter is not None and not callable(getattr(token_counter, "count", None)):
            raise ValueError(f"token_counter must be a TokenCounter or None, got {type(token_counter).__name__}.")
        self.last_k = last_k
        self.max_tokens = max_tokens
        self.token_counter = token_counter or (None if max_tokens is None else ApproximateTokenCounter())
        self.window_step = window_step

    def settings(self) -> dict[str, Any]:
        """
        Return what the constructor takes, for the serialization of whatever reads windows.
        """
        return {
            "last_k": self.last_k,
            "max_tokens": self.max_tokens,
            "token_counter": self.token_counter,
            "window_step": self.window_step,
        }

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
        reads = self._reads(current_messages, last_k, any_store.last_k_unit(store))
        wanted = next(reads)
        while not isinstance(wanted, list):
            wanted = reads.send(any_store.retrieve(store, chat_history_id, wanted, self.window_step))
        return wanted

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
        reads = self._reads(current_messages, last_k, any_store.last_k_unit(store))
        wanted = next(reads)
        while not isinstance(wanted, list):
            page = await any_store.retrieve_async(store, chat_history_id, wanted, self.window_step)
            # A counter may take its time, or ask a server.
            is_counted = self.max_tokens is not None
            wanted = await asyncio.to_thread(reads.send, page) if is_counted else reads.send(page)
        return wanted

    def _reads(self, current_messages: Sequence[ChatMessage], last_k: int | None, unit: LastKUnit) -> _Reads:
        validate_last_k(last_k)
        last_k = self.last_k if last_k is None else last_k
        if last_k == 0:
            yield []  # Not left to the store: to anybody's slice of the last 0 messages, 0 may mean all.
        elif last_k is not None or self.max_tokens is None:
            yield self._fitting(in_question_order((yield last_k)), current_messages)
        else:
            count = _FIRST_PAGE
            while True:
                page = yield count
                history = in_question_order(page)
                fitting = self._fitting(history, current_messages)
                is_all = (len(round_starts(page)) if unit == "round" else len(page)) < count
                if is_all or len(fitting) < len(history):
                    break
                count *= _PAGE_GROWTH
            yield fitting

    def _fitting(self, history: list[ChatMessage], current_messages: Sequence[ChatMessage]) -> list[ChatMessage]:
        """
        Return the newest part of the history that fits, beginning at a round if it can be.
        """
        counter, max_tokens = self.token_counter, self.max_tokens
        if counter is None or max_tokens is None:
            return history

        def fits(part: list[ChatMessage]) -> bool:
            return counter.count(valid_for_model(part, current_messages)) <= max_tokens

        if fits(history):
            return history
        starts = round_starts(history)
        aligned = starts[:: self.window_step]
        # Parts of the history, as where their first message stands and where the others begin: each shorter than the
        # one before, so that the first that fits is found by bisection.
        parts = [(start, start + 1) for start in aligned if start > 0]
        parts += [(start, start + 1) for start in starts if start > aligned[-1]]
        if starts:
            question, end = starts[-1], len(history)
            steps = (index for index in range(question, end) if history[index].role == ChatRole.ASSISTANT)
            parts += [(question, index) for index in (*steps, end)]

        def messages_of(part: tuple[int, int]) -> list[ChatMessage]:
            return [history[part[0]], *history[part[1] :]]

        found = bisect_left(parts, True, key=lambda part: fits(messages_of(part)))
        return messages_of(parts[found]) if found < len(parts) else []
