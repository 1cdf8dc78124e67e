# SPDX-License-Identifier: Apache-2.0
"""The windows through which a history is shown."""

import random
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Window:
    """
    :param name: The kind of window.
    :param unit: What the store counts.
    :param settings: The settings of the retriever.
    """

    name: str
    unit: Literal["round", "message"] = "round"
    last_k: int | None = None
    max_tokens: int | None = None
    window_step: int = 1

    @property
    def settings(self) -> dict[str, Any]:
        return {"last_k": self.last_k, "max_tokens": self.max_tokens, "window_step": self.window_step}


WHOLE = Window("whole")


def windows(rng: random.Random, length: int) -> list[Window]:
    """Return one window of each kind, for a history of so many messages."""
    return [
        WHOLE,
        Window("last_k", last_k=rng.choice((1, 2, 3))),
        Window("messages", unit="message", last_k=rng.randrange(1, length + 1)),
        Window("max_tokens", max_tokens=rng.choice((20, 40, 80, 160, 400, 1500))),
        Window("window_step", last_k=rng.choice((1, 2)), window_step=rng.choice((2, 3))),
        Window("max_tokens_step", max_tokens=rng.choice((60, 160, 400)), window_step=2),
    ]
