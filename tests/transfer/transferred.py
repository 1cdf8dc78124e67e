# SPDX-License-Identifier: Apache-2.0
"""What the tests of this folder look at: histories whose every part is known, and all that a store or a file holds."""

import hashlib
from dataclasses import replace

from haystack_chat_store.stores.rows import HistoryRow, MessageRow
from haystack_chat_store.transfer import TransferResult

MOMENT = 1_767_225_600_000_001  # 2026-01-01, and a microsecond


def everything(store):
    """All that a store holds, in the order of the ids, without revisions, which an import assigns anew."""
    rows = store.engine.run(store.engine.histories_by_id, store.scope, "", "", 10_000)
    return [
        (
            replace(row, revision=0),
            [
                (message.created_at, message.message_id, message.role, message.content)
                for message in store.engine.run(store.engine.page, store.scope, row.chat_history_id, None, -1, 100_000)
            ],
        )
        for row in rows
    ]


def moved(chat_histories, messages, skipped, faults):
    return TransferResult(chat_histories=chat_histories, messages=messages, skipped=skipped, faults=faults)


def counts(result):
    return result.chat_histories, result.messages, result.skipped


def put(store, chat_history_id, *texts, title=None, meta=None):
    """Store messages whose ids, times and contents are known."""
    rows = [
        MessageRow(
            position=index,
            created_at=MOMENT + index,
            message_id=f"m{index}",
            role="user",
            content=content(f"m{index}", text),
        )
        for index, text in enumerate(texts)
    ]
    store.engine.run(
        store.engine.import_history,
        store.scope,
        HistoryRow(
            chat_history_id=chat_history_id,
            message_count=0,
            round_count=0,
            created_at=MOMENT,
            updated_at=MOMENT,
            title=title,
            meta=meta,
        ),
        [rows],
        0,
    )


def content(message_id, text):
    return f'{{"role":"user","meta":{{"chat_message_id":"{message_id}"}},"name":null,"content":[{{"text":"{text}"}}]}}'


def in_progress(work):
    """A callback that does something, once, as soon as histories are on their way."""
    waiting = [work]

    def step(_done, total):
        if total is not None and waiting:
            waiting.pop()()

    return step


def joined(lines):
    return "".join(f"{line}\n" for line in lines).encode()


def digest(lines):
    return hashlib.sha256(joined(lines)).hexdigest()
