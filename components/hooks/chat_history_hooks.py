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
    portable: bool = True,
    merge_consecutive: bool = False,
    model: str | None = None,
    exit_conditions: list[str] | None = None,
    raise_on_failure: bool = True,
    require_user_id: bool = False,
    hooks: Mapping[HookPoint, Sequence[Hook]] | None = None,
) -> dict[HookPoint, list[Hook]]:
    """
    Return the hooks that give an agent a memory.

    The history is loaded before a run. Each step is saved as soon as it is taken. So after a crash, a run without new
    messages finishes the turn from the last saved step.

    ```python
    from haystack.components.agents import Agent
    from haystack.components.generators.chat import MockChatGenerator
    from haystack.dataclasses import ChatMessage
    from haystack_chat_store import InMemoryChatMessageStore
    from haystack_integrations.hooks.chat_store import chat_history_hooks

    agent = Agent(chat_generator=MockChatGenerator(), hooks=chat_history_hooks(InMemoryChatMessageStore()))
    agent.run([ChatMessage.from_user("Hello!")], hook_context={"chat_history_id": "user_456"})
    ```

    The keys of `hook_context` are `chat_history_id` and, optionally,

    - `replace_from_message_id`: the id of a message. The run replaces it and all messages after it, to regenerate an
      answer or to edit a question. The agent is shown what comes before this message. As soon as the first reply is
      there, the question and this reply replace the old messages in one step. So a failing model leaves the old answer.
    - `until_message_id`: the id of the last message of the history that the agent is shown.
    - `user_id`: the user of the history. A history of another user looks empty, and saving to it is refused.
    - `expected_revision`: the revision that the history must have when the run first writes to it. With
      `replace_from_message_id`, it defaults to the revision at the beginning of the run.

    :param chat_message_store: The store of the chat histories: any object that follows the `ChatMessageStore` protocol.
    :param last_k: The number of rounds of the history to load. Defaults to 10; see `ChatHistoryLoader`.
    :param max_tokens: The largest number of tokens that the model is shown. Defaults to `None`: any number.
    :param token_counter: The Haystack `TokenCounter` that counts the tokens. Defaults to `ApproximateTokenCounter`.
    :param window_step: The start of the window moves only in steps of this many rounds. Defaults to 1.
    :param portable: Whether completed rounds are shown in a form that every provider takes. Defaults to True; see
        `ChatHistoryLoader`.
    :param merge_consecutive: Whether user and assistant speak in turns, for models that insist on it. Defaults to
        False; see `ChatHistoryLoader`.
    :param model: The name of the agent's model, so that it can resume a round of another model, and is shown the files
        that it has taken before. Defaults to `None`; see `ChatHistoryLoader`.
    :param exit_conditions: The agent's own `exit_conditions`, if it ends with a tool. Defaults to `None`.
    :param raise_on_failure: Whether the run fails if saving fails. Defaults to True; see `ChatHistorySaver`.
    :param require_user_id: Whether a run without `hook_context["user_id"]` is refused. Then a forgotten user id is an
        error, and never shows the conversations of all users. Defaults to False.
    :param hooks: Other hooks of the agent, by hook point. The mapping is not changed. They are ordered so that the
        history gets the messages as the model and the tools got them: confirmation runs before saving, offloading after
        it.
    :returns: All hooks, for `Agent(hooks=...)`.
    :raises ValueError: If an argument is wrong.
    """
    loader = ChatHistoryLoader(
        chat_message_store,
        last_k,
        max_tokens=max_tokens,
        token_counter=token_counter,
        window_step=window_step,
        portable=portable,
        merge_consecutive=merge_consecutive,
        model=model,
        exit_conditions=exit_conditions,
        require_user_id=require_user_id,
    )
    saver = ChatHistorySaver(chat_message_store, raise_on_failure=raise_on_failure, require_user_id=require_user_id)
    others = {point: list(listed) for point, listed in (hooks or {}).items()}
    # The saver comes first, because it corrects the result of a run without steps. It comes last again, because other
    # hooks may have added messages.
    after_run: list[Hook] = [saver, *others["after_run"], saver] if others.get("after_run") else [saver]
    return {
        **others,
        "before_run": [loader, *others.get("before_run", ()), saver],
        "before_tool": [*others.get("before_tool", ()), saver],
        "after_tool": [saver, *others.get("after_tool", ())],
        "on_exit": [*others.get("on_exit", ()), saver],
        "after_run": after_run,
    }
