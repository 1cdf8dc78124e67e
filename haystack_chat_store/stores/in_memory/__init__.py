# SPDX-License-Identifier: Apache-2.0
from typing import Any

from typing_extensions import Self

from haystack_chat_store.rounds import LastKUnit
from haystack_chat_store.stores.base import BaseChatMessageStore
from haystack_chat_store.stores.in_memory.engine import InMemoryEngine


class InMemoryChatMessageStore(BaseChatMessageStore):
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
        search: bool = False,
        strict: bool = False,
    ) -> None:
        """
        Create the store.

        :param skip_system_messages: Whether system messages are left out when writing. Defaults to True.
        :param last_k: How many rounds `retrieve_messages` returns when it is not told. Defaults to 10; `None` for all.
        :param last_k_unit: What `last_k` counts: `"round"`, the default, or `"message"`.
        :param namespace: Which of the process's sets of histories this store holds. Defaults to `"default"`.
        :param search: Whether messages can be searched. The index takes several times the memory of the messages; it is
            made by the first search. Defaults to False.
        :param strict: Whether a message is refused if its `meta` holds a value without a JSON form. Defaults to False:
            the value's `repr` is stored.
        :raises ValueError: If a setting is not one of these.
        """
        super().__init__(
            InMemoryEngine(),
            skip_system_messages=skip_system_messages,
            last_k=last_k,
            last_k_unit=last_k_unit,
            namespace=namespace,
            search=search,
            strict=strict,
        )

    @classmethod
    def from_url(cls, url: str, **settings: Any) -> Self:
        """
        Make a store from `memory://`.

        :param url: `memory://`.
        :param settings: Further settings of the constructor.
        :raises ValueError: If the URL has anything after its scheme.
        """
        if url != "memory://":
            raise ValueError("The URL of histories in memory is memory://, with nothing after it.")
        return cls(**settings)
