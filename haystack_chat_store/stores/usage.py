# SPDX-License-Identifier: Apache-2.0
"""Adds up the token usage that replies carry in `meta["usage"]`, by model and by day."""

import re
from collections.abc import Mapping
from datetime import date
from typing import Any, TypeGuard

from haystack_chat_store.json_values import parse_json
from haystack_chat_store.stores.times import readable_time
from haystack_chat_store.types import TokenUsage

#: The name of the model of replies that do not name theirs.
UNKNOWN_MODEL = "unknown"
# A greater number of tokens is none. A sum may have too many digits to be written.
_MAX_NUMBER = 2**63 - 1
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class UsageCounter:
    """Sums of token usage."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._per_day: dict[date, dict[str, list[int]]] = {}

    def add(self, created_at: Any, meta: Any) -> None:
        """
        Add the usage of a reply.

        :param created_at: The time of the reply, in microseconds since 1970.
        :param meta: The meta of the reply. What is no usage in it is ignored. A number counts if it is a positive
            integer of at most 64 bits. A name counts if it is text that every engine can keep.
        """
        usage = meta.get("usage") if isinstance(meta, dict) else None
        if not isinstance(usage, dict):
            return
        prompt, completion = (_number(usage.get(f"{each}_tokens")) for each in ("prompt", "completion"))
        total = _number(usage.get("total_tokens")) or prompt + completion
        if total == 0:
            return
        model = meta.get("model")
        models = self._per_day.setdefault(readable_time(created_at).date(), {})
        sums = models.setdefault(model if _is_name(model) else UNKNOWN_MODEL, [0, 0, 0])
        for index, number in enumerate((prompt, completion, total)):
            sums[index] += number

    def add_all(self, other: "UsageCounter") -> None:
        """Add what another counter has summed."""
        for day, models in other._per_day.items():
            own = self._per_day.setdefault(day, {})
            for model, sums in models.items():
                own[model] = [one + another for one, another in zip(own.get(model, [0, 0, 0]), sums, strict=True)]

    def add_text(self, created_at: Any, text: str) -> None:
        """
        Do what `add` does.

        :param text: The meta as JSON text, or the content of the whole message. It may be damaged.
        """
        try:
            data = parse_json(text)
        except (ValueError, TypeError, RecursionError):
            return
        self.add(created_at, data.get("meta", data) if isinstance(data, dict) else None)

    def per_day(self) -> Mapping[date, Mapping[str, TokenUsage]]:
        """Return the sums of each day and model, in the order of the days."""
        return {
            day: {model: _usage(sums) for model, sums in sorted(models.items())}
            for day, models in sorted(self._per_day.items())
        }

    def total(self) -> Mapping[str, TokenUsage]:
        """Return the sums of each model."""
        totals: dict[str, list[int]] = {}
        for models in self._per_day.values():
            for model, sums in models.items():
                known = totals.get(model, [0, 0, 0])
                totals[model] = [one + other for one, other in zip(known, sums, strict=True)]
        return {model: _usage(sums) for model, sums in sorted(totals.items())}


def _number(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _MAX_NUMBER else 0


def _is_name(value: Any) -> TypeGuard[str]:
    is_text = isinstance(value, str) and value != "" and "\x00" not in value
    return is_text and not _LONE_SURROGATE.search(value)


def _usage(sums: list[int]) -> TokenUsage:
    return TokenUsage(prompt_tokens=sums[0], completion_tokens=sums[1], total_tokens=sums[2])
