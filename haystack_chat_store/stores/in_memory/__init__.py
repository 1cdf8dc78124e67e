# SPDX-License-Identifier: Apache-2.0
from typing import Any

from typing_extensions import Self

from haystack_chat_store.conversation.rounds import LastKUnit
from haystack_chat_store.stores.base import BaseChatMessageStore
from haystack_chat_store.stores.in_memory.engine import InMemoryEngine


class InMemoryChatMessageStore(BaseChatMessageStore):
    """
    Keeps chat histories in the memory of the process, for tests, notebooks and short-lived conversations.

    All stores of a namespace in one process share their histories. So the writer and the retriever of a pipeline that
    was loaded from YAML see each other's messages. The histories exist as long as the process runs.

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
        user_id: str | None = None,
        ttl: float | None = None,
        renew_ttl_on_read: bool = False,
    ) -> None:
        """
        Create the store.

        :param skip_system_messages: Whether system messages are left out when writing. Defaults to True.
        :param last_k: The number of rounds that `retrieve_messages` returns if it is called without `last_k`. Defaults
            to 10. `None` for all.
        :param last_k_unit: The unit of `last_k`: `"round"`, the default, or `"message"`.
        :param namespace: The namespace of the store's histories, 1 to 128 characters. Stores in one process with the
            same namespace share their histories. Defaults to `"default"`.
        :param search: Whether messages can be searched. The first search creates the index, which takes several times
            the memory of the messages. Defaults to False.
        :param strict: Whether a message is refused if its `meta` contains a value without a JSON form. Defaults to
            False: the value's `repr` is stored, and the log says so.
        :param user_id: The store sees and changes only histories of this user: see `for_user`. Defaults to `None`: all
            histories of the namespace.
        :param ttl: The number of seconds after which a history expires as a whole. The time starts anew when messages
            are stored in it. Defaults to `None`: a history never expires.
        :param renew_ttl_on_read: Whether reading messages of a history starts the time anew, too. Defaults to False.
        :raises ValueError: If a setting is wrong.
        """
        super().__init__(
            InMemoryEngine(),
            skip_system_messages=skip_system_messages,
            last_k=last_k,
            last_k_unit=last_k_unit,
            namespace=namespace,
            search=search,
            strict=strict,
            user_id=user_id,
            ttl=ttl,
            renew_ttl_on_read=renew_ttl_on_read,
        )

    @classmethod
    def from_url(cls, url: str, **settings: Any) -> Self:
        """
        Create a store from the URL `memory://`.

        :param url: `memory://`.
        :param settings: Arguments of the constructor.
        :raises ValueError: If the URL continues after its scheme.
        """
        if url != "memory://":
            raise ValueError("The URL of an in-memory store is memory://, with nothing after it.")
        return cls(**settings)
