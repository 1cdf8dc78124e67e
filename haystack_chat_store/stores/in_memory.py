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
    contents: list[str] = field(default_factory=list)
    roles: list[str] = field(default_factory=list)
    user_positions: list[int] = field(default_factory=list)
    message_ids: set[str] = field(default_factory=set)


_Namespace = dict[str, _History]
_namespaces: dict[str, _Namespace] = {}
# One lock for all: an operation holds it for microseconds.
_lock = threading.Lock()
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
        history = session.get(chat_history_id) or _History()
        new = [message for message in messages if message.message_id not in history.message_ids]
        position = len(history.contents)
        history.message_ids.update(message.message_id for message in new)
        history.user_positions.extend(
            position + index for index, message in enumerate(new) if message.role == ChatRole.USER.value
        )
        history.roles.extend(message.role for message in new)
        history.contents.extend(message.content for message in new)
        session[chat_history_id] = history
        return len(new)

    def _read(self, session: _Namespace, chat_history_id: str, window: Window) -> list[str]:
        history = session.get(chat_history_id)
        if history is None:
            return []
        return history.contents[_window_start(history, window) :]

    def _count(self, session: _Namespace, chat_history_id: str) -> int:
        history = session.get(chat_history_id)
        return 0 if history is None else len(history.contents)

    def _delete(self, session: _Namespace, chat_history_id: str) -> None:
        session.pop(chat_history_id, None)

    def _delete_all(self, session: _Namespace) -> None:
        session.clear()


def _window_start(history: _History, window: Window) -> int:
    if window.count is None:
        return 0
    if window.unit == "round":
        has_enough = len(history.user_positions) >= window.count
        return history.user_positions[-window.count] if has_enough else 0
    start = max(len(history.contents) - window.count, 0)
    while start > 0 and history.roles[start] == ChatRole.TOOL.value:
        start -= 1
    return start
