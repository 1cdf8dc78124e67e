# SPDX-License-Identifier: Apache-2.0
from collections.abc import Mapping, Sequence

from haystack.hooks import Hook, HookPoint
from haystack.token_counters import TokenCounter

from haystack_chat_store.types import ChatMessageStore

from .loader import ChatHistoryLoader
from .saver import ChatHistorySaver


def chat_history_hooks(
    chat_message_store: ChatMessageStore,
    last_k: int | None = 10,
    *,
    max_tokens: int | None = None,
    token_counter: TokenCounter | None = None,
    window_step: int = 1,
    exit_conditions: list[str] | None = None,
    raise_on_failure: bool = True,
    hooks: Mapping[HookPoint, Sequence[Hook]] | None = None,
) -> dict[HookPoint, list[Hook]]:
    """
    Return the hooks that give an agent a memory: loaded before its run, saved at every step, intact after a crash.

    ```python
    from haystack.components.agents import Agent
    from haystack.components.generators.chat import MockChatGenerator
    from haystack.dataclasses import ChatMessage
    from haystack_chat_store import InMemoryChatMessageStore
    from haystack_integrations.hooks.chat_store import chat_history_hooks

    agent = Agent(chat_generator=MockChatGenerator(), hooks=chat_history_hooks(InMemoryChatMessageStore()))
    agent.run([ChatMessage.from_user("Hello!")], hook_context={"chat_history_id": "user_456"})
    ```

    :param chat_message_store: Where the chat histories are kept. Any object that follows the `ChatMessageStore`
        protocol.
    :param last_k: How many rounds of the history to load. Defaults to 10; see `ChatHistoryLoader`.
    :param max_tokens: How many tokens the model may see. Defaults to `None`, for no limit.
    :param token_counter: What counts them. Defaults to Haystack's `ApproximateTokenCounter`.
    :param window_step: In steps of how many rounds the window's beginning moves. Defaults to 1.
    :param exit_conditions: Those of the agent, if it ends with a tool.
    :param raise_on_failure: Whether the run fails if saving does. Defaults to True; see `ChatHistorySaver`.
    :param hooks: Other hooks of the agent, by hook point. They are put where the history gets what was really said and
        done: confirmation before saving, offloading after it. The mapping is not changed.
    :returns: All hooks, for `Agent(hooks=...)`.
    :raises ValueError: If an argument is wrong.
    """
    loader = ChatHistoryLoader(
        chat_message_store,
        last_k,
        max_tokens=max_tokens,
        token_counter=token_counter,
        window_step=window_step,
        exit_conditions=exit_conditions,
    )
    saver = ChatHistorySaver(chat_message_store, raise_on_failure=raise_on_failure)
    others = {point: list(listed) for point, listed in (hooks or {}).items()}
    # First, for then the result of a run without steps is put right; and last, for the others may have added to it.
    after_run: list[Hook] = [saver, *others["after_run"], saver] if others.get("after_run") else [saver]
    return {
        **others,
        "before_run": [loader, *others.get("before_run", ()), saver],
        "before_tool": [*others.get("before_tool", ()), saver],
        "after_tool": [saver, *others.get("after_tool", ())],
        "on_exit": [*others.get("on_exit", ()), saver],
        "after_run": after_run,
    }
