# SPDX-License-Identifier: Apache-2.0
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from haystack.dataclasses import ChatRole

from haystack_chat_store.rounds import LastKUnit, Window
from haystack_chat_store.stores.base import BaseChatMessageStore, EncodedMessage


@dataclass
class _History:
    """
    The messages of a history and an index of them.

    Only the messages are written; the index catches up before it is used. So a write is a single step, which neither
    Ctrl-C can cut in two nor a signal handler that writes to the same history.
    """

    messages: list[EncodedMessage] = field(default_factory=list)
    message_ids: set[str] = field(default_factory=set)
    user_positions: list[int] = field(default_factory=list)
    indexed: int = 0

    def catch_up(self) -> None:
        """
        Index the messages that are new. Each step may be done twice without harm.
        """
        for position in range(self.indexed, len(self.messages)):
            message = self.messages[position]
            self.message_ids.add(message.message_id)
            if message.role == ChatRole.USER.value and position > max(self.user_positions[-1:], default=-1):
                self.user_positions.append(position)
            self.indexed = position + 1

    def read(self, window: Window) -> tuple[list[str], int]:
        """
        Return the contents in the window, and its size.
        """
        if window.count is None:
            start, size = 0, 0
        elif window.unit == "round":
            self.catch_up()
            size = window.size(len(self.user_positions))
            start = self.user_positions[-size] if size <= len(self.user_positions) else 0
        else:
            size = window.size(len(self.messages))
            start = max(len(self.messages) - size, 0)
            while start > 0 and self.messages[start].role == ChatRole.TOOL.value:
                start -= 1
        return [message.content for message in self.messages[start:]], size


_Namespace = dict[str, _History]
_namespaces: dict[str, _Namespace] = {}
# One lock for all, for an operation holds it only briefly. Reentrant, for an operation may be interrupted by a signal
# handler or a finalizer that writes, in its own thread.
_lock = threading.RLock()
if hasattr(os, "register_at_fork"):  # a child gets the histories as they were between two operations
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


class InMemoryChatMessageStore(BaseChatMessageStore[_Namespace]):
    """
    Keeps chat histories in the memory of the process, for tests, notebooks and conversations that need not last.

    All stores of a namespace in one process hold the same histories, so that the writer and the retriever of a
    pipeline that was loaded from YAML see each other's messages. They last as long as the process.

    ```python
    from haystack.dataclasses import ChatMessage
    from haystack_chat_store import InMemoryChatMessageStore

    store = InMemoryChatMessageStore()
    store.write_messages("user_456", [ChatMessage.from_user("Hi!"), ChatMessage.from_assistant("Hello!")])
    print(store.retrieve_messages("user_456"))
    ```
    """

    def __init__(
        self,
        skip_system_messages: bool = True,
        last_k: int | None = 10,
        *,
        last_k_unit: LastKUnit = "round",
        namespace: str = "default",
    ) -> None:
        """
        Create the store.

        :param skip_system_messages: Whether system messages are left out when writing. Defaults to True.
        :param last_k: How many rounds `retrieve_messages` returns when it is not told. Defaults to 10; `None` for all.
        :param last_k_unit: What `last_k` counts: `"round"`, the default, or `"message"`.
        :param namespace: Which of the process's sets of histories this store holds. Defaults to `"default"`.
        :raises ValueError: If a setting is not one of these.
        """
        super().__init__(skip_system_messages, last_k, last_k_unit=last_k_unit, namespace=namespace)

    def to_dict(self) -> dict[str, Any]:
        """
        Serialize the store's settings. The histories are not among them.
        """
        return self._settings_to_dict()

    def _run(self, operation: Callable[..., Any], *arguments: Any) -> Any:
        with _lock:
            return operation(_namespaces.setdefault(self.namespace, {}), *arguments)

    async def _run_async(self, operation: Callable[..., Any], *arguments: Any) -> Any:
        return self._run(operation, *arguments)

    def _write(self, session: _Namespace, chat_history_id: str, messages: Sequence[EncodedMessage]) -> int:
        history = session.setdefault(chat_history_id, _History())
        history.catch_up()
        new = [message for message in messages if message.message_id not in history.message_ids]
        history.messages.extend(new)
        return len(new)

    def _read(self, session: _Namespace, chat_history_id: str, window: Window) -> tuple[list[str], int]:
        return session.get(chat_history_id, _History()).read(window)

    def _count(self, session: _Namespace, chat_history_id: str) -> int:
        history = session.get(chat_history_id)
        return 0 if history is None else len(history.messages)

    def _delete(self, session: _Namespace, chat_history_id: str) -> None:
        session.pop(chat_history_id, None)

    def _delete_all(self, session: _Namespace) -> None:
        session.clear()
