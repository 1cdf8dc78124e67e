# SPDX-License-Identifier: Apache-2.0
"""
Measure what a turn of a long transcript costs, beside the same turn of a short one.

A client sends its whole conversation with each request. `match_transcript` looks at each message that it is sent, but
reads only the end of the history.
"""

import argparse
import platform
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from engines import KEYS, SERVERS, chosen
from haystack.dataclasses import ChatMessage, ImageContent
from measuring import Trial, medians

from haystack_chat_store import BaseChatMessageStore, match_transcript

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
#: What a transcript begins with. All questions with known texts are read in one pass, other transcripts one by one.
BEGINNINGS: dict[str, list[ChatMessage]] = {
    "texts": [],
    "an image": [
        ChatMessage.from_user(content_parts=["Look", ImageContent(PNG, mime_type="image/png")]),
        ChatMessage.from_assistant("Nice."),
    ],
}


def conversation(rounds: int, beginning: list[ChatMessage]) -> list[ChatMessage]:
    messages = list(beginning)
    for number in range(rounds):
        messages.append(ChatMessage.from_user(f"What does the palace look like at night? ({number})"))
        messages.append(ChatMessage.from_assistant(f"It is lit from below, and the river shows it again. ({number})"))
    return messages


def turn(store: BaseChatMessageStore, rounds: int, beginning: list[ChatMessage]) -> Callable[[], object]:
    """Store a conversation, and return the call that finds what is new in it with one more question."""
    history, said = f"{rounds} {len(beginning)}", conversation(rounds, beginning)
    store.write_messages(history, match_transcript(store, history, said).messages)
    sent = [*said, ChatMessage.from_user("And tomorrow?")]
    assert [message.text for message in match_transcript(store, history, sent).messages] == ["And tomorrow?"]
    return lambda: match_transcript(store, history, sent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3000)
    parser.add_argument("--engines", default="memory,sqlite-normal,postgres,redis", help=f"of {', '.join(KEYS)}")
    options = parser.parse_args()
    print(f"Python {platform.python_version()}, {options.rounds} rounds against 10, medians of {options.repetitions}.")
    print("\n| store | transcript begins with | 10 rounds, µs | long, µs | ratio |\n|---|---|---|---|---|")
    with ExitStack() as running, tempfile.TemporaryDirectory() as folder:
        for engine in chosen(options.engines.split(","), dict.fromkeys(SERVERS), running):
            with engine.open_store(Path(folder)) as store:
                for what, beginning in BEGINNINGS.items():
                    calls = {rounds: turn(store, rounds, beginning) for rounds in (10, options.rounds)}
                    trials = [Trial(rounds, call, tuple) for rounds, call in calls.items()]
                    took = medians([trials], options.repetitions)
                    short, long = took[10], took[options.rounds]
                    print(f"| {engine.name} | {what} | {short:.0f} | {long:.0f} | {long / short:.1f} |")


if __name__ == "__main__":
    main()
