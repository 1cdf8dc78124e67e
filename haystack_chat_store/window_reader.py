# SPDX-License-Identifier: Apache-2.0
"""Reads the part of a history that a model is shown."""

import asyncio
from bisect import bisect_left
from collections.abc import Callable, Generator, Sequence
from itertools import chain, pairwise
from typing import Any, TypeAlias

from haystack.dataclasses import ChatMessage, ChatRole
from haystack.token_counters import ApproximateTokenCounter
from haystack.token_counters.types import TokenCounter

from haystack_chat_store import protocol_calls
from haystack_chat_store.conversation.provider_content import as_text
from haystack_chat_store.conversation.rounds import (
    in_question_order,
    question_groups,
    question_of,
    round_starts,
)
from haystack_chat_store.conversation.shown import messages_for_model
from haystack_chat_store.types import ChatMessageStore
from haystack_chat_store.validation import validate_last_k, validate_window_step, validated_flag

# If only the token budget limits the window, the first page has this many rounds, and each next page is larger by this
# factor.
_FIRST_PAGE_SIZE = 8
_PAGE_GROWTH = 4

# Yields the `last_k` of each read, receives the messages that were read, and returns the window.
_Reads: TypeAlias = Generator[int | None, list[ChatMessage], list[ChatMessage]]


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
        :param merge_consecutive: Whether messages of the same role that follow each other are joined. Defaults to
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
    ) -> list[ChatMessage]:
        """
        Read the part of a history that the model is shown.

        :param store: The store that keeps the history.
        :param chat_history_id: The history's id.
        :param current_messages: The messages of this turn, which the model is shown around the history. They count
            towards `max_tokens`, and are not returned. Defaults to none.
        :param last_k: The number of rounds; 0 for none. Defaults to this reader's `last_k`.
        :returns: The messages of the window, in question order.
        :raises ValueError: If an argument is wrong.
        :raises ChatMessageStoreError: If the store fails.
        """
        reads = self._reads(store, current_messages, last_k)
        next_last_k, window = _advance(reads)
        while window is None:
            page = protocol_calls.retrieve(store, chat_history_id, next_last_k, self.window_step)
            next_last_k, window = _advance(reads, page)
        return window

    async def read_async(
        self,
        store: ChatMessageStore,
        chat_history_id: str,
        current_messages: Sequence[ChatMessage] = (),
        last_k: int | None = None,
    ) -> list[ChatMessage]:
        """Do what `read` does, without blocking the event loop: neither for the store nor for the token counter."""
        reads = self._reads(store, current_messages, last_k)
        next_last_k, window = _advance(reads)
        while window is None:
            page = await protocol_calls.retrieve_async(store, chat_history_id, next_last_k, self.window_step)
            if self.max_tokens is None:
                next_last_k, window = _advance(reads, page)
            else:  # a token counter may be slow, or call a server
                next_last_k, window = await asyncio.to_thread(_advance, reads, page)
        return window

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

    def _reads(self, store: ChatMessageStore, current_messages: Sequence[ChatMessage], last_k: int | None) -> _Reads:
        validate_last_k(last_k)
        last_k = self.last_k if last_k is None else last_k
        if last_k == 0:
            return []  # A store of another package may slice with `messages[-0:]`, which is the whole history.
        if last_k is not None or self.max_tokens is None:
            page = yield from _whole_rounds(store, last_k)
            return self._newest_that_fit(page, current_messages)
        count = _FIRST_PAGE_SIZE
        while True:
            page = yield from _whole_rounds(store, count)
            fitting = self._newest_that_fit(page, current_messages)
            if len(fitting) < len(in_question_order(page)) or _size(page, store) < count:
                return fitting
            count *= _PAGE_GROWTH

    def _newest_that_fit(self, page: list[ChatMessage], current_messages: Sequence[ChatMessage]) -> list[ChatMessage]:
        """Return the newest part of a page that fits `max_tokens`, in question order."""
        history = in_question_order(page)
        counter, max_tokens = self.token_counter, self.max_tokens
        if counter is None or max_tokens is None:
            return history

        def fits(part: list[ChatMessage]) -> bool:
            return counter.count([as_text(message) for message in self.shown(part, current_messages)]) <= max_tokens

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


def _advance(reads: _Reads, page: list[ChatMessage] | None = None) -> tuple[int | None, list[ChatMessage] | None]:
    """Pass on the page that was read, and return the `last_k` of the next read or, after the last read, the window."""
    try:
        return (next(reads) if page is None else reads.send(page)), None
    except StopIteration as done:
        return None, done.value


def _whole_rounds(store: ChatMessageStore, last_k: int | None) -> _Reads:
    """
    Read a window. If it begins in the middle of a round, read more pages, back to the round's question.

    In a store that counts messages, a window can begin anywhere. In a store that counts rounds, it can begin at a user
    message that a hook added to a round.
    """
    window = page = yield last_k
    limit = protocol_calls.default_last_k(store) if last_k is None else last_k
    if not window or limit is None or _size(window, store) < limit:
        return window
    more = _FIRST_PAGE_SIZE
    while (question := question_of(page, len(page) - len(window))) is None:
        longer = yield _size(window, store) + more
        if len(longer) <= len(page):
            return window  # the page is the whole history
        page, more = longer, more * _PAGE_GROWTH
    return page[question:]


def _size(messages: Sequence[ChatMessage], store: ChatMessageStore) -> int:
    """Return the number of rounds or messages, in the store's unit of `last_k`."""
    return len(round_starts(messages)) if protocol_calls.last_k_unit(store) == "round" else len(messages)
