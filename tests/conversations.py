# SPDX-License-Identifier: Apache-2.0
"""Conversations for the tests of their rules: messages, and hypothesis strategies."""

from dataclasses import replace
from itertools import takewhile

from haystack.dataclasses import ChatMessage, ChatRole, ToolCall, ToolCallResult
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from strict_model import call_key

from haystack_chat_store.conversation.tool_calls import results_of_calls
from haystack_chat_store.ids import MESSAGE_ID_KEY, QUESTION_ID_KEY

SYSTEM = ChatMessage.from_system("Be brief.")
GREETING = ChatMessage.from_assistant("Hello, how can I help?")
QUESTION = ChatMessage.from_user("What is the weather in Rome and in Oslo?")
ANSWER = ChatMessage.from_assistant("Sunny in Rome, snow in Oslo.")
ROME = ToolCall("weather", {"city": "Rome"}, id="call_1")
OSLO = ToolCall("weather", {"city": "Oslo"}, id="call_2")
NAMELESS = ToolCall("weather", {"city": "Rome"})


def calling(*calls, text=None, reasoning=None):
    return ChatMessage.from_assistant(text, tool_calls=list(calls), reasoning=reasoning)


def result_of(*calls):
    return ChatMessage(ChatRole.TOOL, [ToolCallResult("done", call, False) for call in calls])


def with_id(message, message_id):
    return ChatMessage(message.role, message._content, _meta={MESSAGE_ID_KEY: message_id})


def same_objects(some, others):
    return [*map(id, some)] == [*map(id, others)]


# How long an example takes says something about the machine, nothing about the rules.
untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def plain_messages(said):
    return st.one_of(
        st.sampled_from([SYSTEM, GREETING]), said.map(ChatMessage.from_user), said.map(ChatMessage.from_assistant)
    )


tool_calls = st.builds(
    ToolCall,
    tool_name=st.sampled_from(["weather", "time"]),
    arguments=st.sampled_from([{}, {"city": "Rome"}]),
    id=st.sampled_from([None, "a", "b", "c"]),
)
remarks = st.none() | st.just("Let me look.")
reasonings = st.none() | st.just("Hm.")


@st.composite
def exchanges(draw, *, complete=False):
    """
    Calls, and results of them in any order and grouping. Unless complete: some missing, some twice, some of others.
    """
    calls = draw(st.lists(tool_calls, min_size=1, max_size=4, unique_by=call_key if complete else None))
    if complete:
        answered = draw(st.permutations(calls))
    else:
        answered = draw(st.lists(st.sampled_from(calls) | tool_calls, max_size=5))
    said = draw(remarks if complete else remarks | st.just(" "))
    exchange = [calling(*calls, text=said, reasoning=draw(reasonings))]
    while answered:
        size = draw(st.integers(1, len(answered)))
        exchange.append(result_of(*answered[:size]))
        answered = answered[size:]
    return exchange


def conversations_of(*pieces):
    return st.lists(st.one_of(*pieces), max_size=8).map(lambda drawn: [message for piece in drawn for message in piece])


single_messages = st.one_of(
    plain_messages(st.text(max_size=3)),
    st.builds(calling, tool_calls, text=remarks | st.just(""), reasoning=reasonings),
    st.lists(tool_calls, min_size=1, max_size=3).map(lambda calls: result_of(*calls)),
).map(lambda message: [message])
somethings = st.text(min_size=1, max_size=3).filter(str.strip)
valid_conversations = conversations_of(
    plain_messages(somethings).map(lambda message: [message]), exchanges(complete=True)
).map(lambda conversation: [QUESTION, *conversation])
any_conversations = conversations_of(single_messages, exchanges(), exchanges(complete=True))
after_a_question = any_conversations.map(lambda conversation: [QUESTION, *conversation])


def pairs(messages):
    """Return (index of the call's message, index of its result's message) for each call that has a result."""
    found = []
    for index, message in enumerate(messages):
        answers = list(takewhile(lambda at: messages[at].role is ChatRole.TOOL, range(index + 1, len(messages))))
        places = [(at, result) for at in answers for result in messages[at].tool_call_results]
        paired = results_of_calls(message.tool_calls, [result for _, result in places])
        found += [(index, places[number][0]) for number in paired if number is not None]
    return found


ids = st.sampled_from(["1", "2", "3"])


@st.composite
def marked_histories(draw):
    """Conversations with ids that may be missing or come again, and marks that point anywhere."""
    history = []
    for message in draw(any_conversations):
        keys = {MESSAGE_ID_KEY: draw(st.none() | ids), QUESTION_ID_KEY: draw(st.none() | st.none() | ids)}
        history.append(replace(message, _meta={key: value for key, value in keys.items() if value is not None}))
    return history
