# SPDX-License-Identifier: Apache-2.0
"""Measure what the possibility of tracing costs as long as it is off: on the store in memory, which is the fastest."""

import time

from conversations import conversation

from haystack_chat_store import InMemoryChatMessageStore
from haystack_chat_store.stores.in_memory.engine import InMemoryEngine

REPETITIONS, CALLS = 30, 500


class Untraced(InMemoryEngine):
    """The engine without the question whether tracing is on."""

    run = InMemoryEngine.execute
    run_async = InMemoryEngine.execute_async


def main() -> None:
    store, untraced = (InMemoryChatMessageStore(namespace="tracing", search=False) for _ in range(2))
    untraced.engine = Untraced()
    store.delete_all_messages()
    store.write_messages("read", conversation(20))
    for name, call in (
        ("write a turn", lambda each: each.write_messages("written", conversation(2))),
        ("read 20 messages", lambda each: each.retrieve_messages("read", None)),
        ("count", lambda each: each.count_messages("read")),
    ):
        best = [float("inf"), float("inf")]
        for _ in range(REPETITIONS):
            for index, each in enumerate((store, untraced)):
                store.delete_messages("written")
                start = time.perf_counter()
                for _ in range(CALLS):
                    call(each)
                best[index] = min(best[index], (time.perf_counter() - start) / CALLS)
        asked, plain = best
        print(f"{name}: {asked * 1e6:.2f} µs, {plain * 1e6:.2f} µs without the question, ratio {asked / plain:.3f}")


if __name__ == "__main__":
    main()
