# SPDX-License-Identifier: Apache-2.0
"""
Pairs tool calls with their results.

An **exchange** is a reply with tool calls and the tool messages that directly follow it. Model providers accept a tool
result nowhere else.
"""

from collections import Counter
from collections.abc import Callable, Sequence

from haystack.dataclasses import ChatMessage, ChatRole, ToolCall, ToolCallResult


def answers_of(messages: Sequence[ChatMessage], index: int) -> Sequence[ChatMessage]:
    """Return the tool messages of the exchange that begins at `index`. If none begins there, the result is empty."""
    if messages[index].role is not ChatRole.ASSISTANT or not messages[index].tool_calls:
        return ()
    end = index + 1
    while end < len(messages) and messages[end].role is ChatRole.TOOL:
        end += 1
    return messages[index + 1 : end]


def results_of_calls(calls: Sequence[ToolCall], results: Sequence[ToolCallResult]) -> list[int | None]:
    """
    Pair the tool calls of an exchange with their results: each call with one result, each result with one call.

    The id of a call is only a hint: some providers give no ids, some give the same id to all calls of a reply, and
    importers change ids. A result names its call in `origin`. These ways are tried, one after the other:

    1. the same id, tool and arguments;
    2. the same tool and arguments, if the id is missing or does not tell the calls apart;
    3. the same id, if only one call has it;
    4. the order, if the origin says nothing.

    So a result is never paired with a call that has other arguments, unless the id says so.

    :param calls: The calls of the exchange, in order.
    :param results: Its results, in order.
    :returns: For each call, the index of its result, or `None` if it has none.
    """
    if len(calls) == len(results) and all(map(_is_result_of, results, calls)):  # as most exchanges are
        return list(range(len(calls)))
    ids = Counter(call.id for call in calls if call.id)
    paired: list[int | None] = [None] * len(calls)
    left = dict(enumerate(results))

    def pair(belongs: Callable[[ToolCall, ToolCall], bool]) -> None:
        for index, result in list(left.items()):
            for place, call in enumerate(calls):
                if paired[place] is None and belongs(call, result.origin):
                    paired[place] = index
                    del left[index]
                    break

    pair(lambda call, origin: _has_id_of(call, origin) and _same_work(call, origin))
    if left:
        pair(lambda call, origin: ids[origin.id or ""] != 1 and _same_work(call, origin))
        pair(lambda call, origin: ids[origin.id or ""] == 1 and call.id == origin.id)
        pair(lambda _, origin: not (origin.id or origin.tool_name or origin.arguments))
    return paired


def _is_result_of(result: ToolCallResult, call: ToolCall) -> bool:
    return _has_id_of(call, result.origin) and _same_work(call, result.origin)


def _has_id_of(call: ToolCall, origin: ToolCall) -> bool:
    return bool(origin.id) and call.id == origin.id


def _same_work(call: ToolCall, origin: ToolCall) -> bool:
    return call.tool_name == origin.tool_name and call.arguments == origin.arguments
