# SPDX-License-Identifier: Apache-2.0
"""
What happens to stored histories: crashes, results that are lost or late, edits, deletions, other programs.

Each damage takes rounds and returns a `Damaged`, or `None` where it cannot happen.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from haystack.dataclasses import ChatMessage, ChatRole, TextContent, ToolCall, ToolCallResult
from histories import Speaker, Talk

from haystack_chat_store.ids import QUESTION_ID_KEY

Rounds = list[list[ChatMessage]]
RAW_KEY = "raw_content_for_server_tools"


@dataclass
class Damaged:
    """
    A history after a damage.

    :param stored: The messages of the store.
    :param goes_on: Whether the last round can be gone on with: it has no answer, and its question is there.
    :param results: Results that come with the next request, for calls that are stored.
    :param gone: Texts that the model must not be shown any more.
    :param marks: The mark that this turn's system message and question carry.
    """

    stored: list[ChatMessage]
    goes_on: bool = False
    results: list[ChatMessage] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    marks: dict[str, Any] = field(default_factory=dict)


Damage = Callable[[Rounds, Speaker, random.Random, Talk], Damaged | None]


def flat(rounds: Rounds) -> list[ChatMessage]:
    return [message for messages in rounds for message in messages]


def _steps(rounds: Rounds) -> list[tuple[int, int, int]]:
    """Return the round, the index of the assistant message and the end of each exchange."""
    found = []
    for number, messages in enumerate(rounds):
        for index, message in enumerate(messages):
            if message.tool_calls:
                end = index + 1
                while end < len(messages) and messages[end].role is ChatRole.TOOL:
                    end += 1
                found.append((number, index, end))
    return found


def nothing(rounds: Rounds, by: Speaker, rng: random.Random, talk: Talk) -> Damaged:
    return Damaged(flat(rounds))


def under_way(rounds: Rounds, by: Speaker, rng: random.Random, talk: Talk) -> Damaged | None:
    """No damage: an agent has got its results and asks the model again."""
    *before, last = rounds
    ends = [end for number, _, end in _steps(rounds) if number == len(before)]
    if not ends:
        last = [*last[:1], *talk.step(by)]
        return Damaged([*flat(before), *talk._named(last, by)], goes_on=True)
    return Damaged([*flat(before), *last[: rng.choice(ends)]], goes_on=True)


def crash(rounds: Rounds, by: Speaker, rng: random.Random, talk: Talk) -> Damaged:
    """The process died at some point of the last round."""
    *before, last = rounds
    kept = rng.randrange(len(last)) + 1 if len(last) > 1 else 1
    stored = last[:kept]
    open_ = stored[-1].role is not ChatRole.ASSISTANT or bool(stored[-1].tool_calls)
    return Damaged([*flat(before), *stored], goes_on=open_)


def crash_before(rounds: Rounds, by: Speaker, rng: random.Random, talk: Talk) -> Damaged | None:
    """The process died in an earlier round; the user went on with a new question."""
    if len(rounds) < 2:
        return None
    number = rng.randrange(len(rounds) - 1)
    cut = rounds[number][: rng.randrange(len(rounds[number])) + 1]
    return Damaged(flat([*rounds[:number], cut, *rounds[number + 1 :]]))


def results_arrive(rounds: Rounds, by: Speaker, rng: random.Random, talk: Talk) -> Damaged | None:
    """The calls are stored; their results come with the request."""
    steps = [step for step in _steps(rounds) if step[0] == len(rounds) - 1]
    if not steps:
        return None
    number, index, end = rng.choice(steps)
    last = rounds[number]
    between = rng.randrange(index + 1, end + 1)
    return Damaged([*flat(rounds[:number]), *last[:between]], goes_on=True, results=last[between:end])


def lost_result(rounds: Rounds, by: Speaker, rng: random.Random, talk: Talk) -> Damaged | None:
    steps = [step for step in _steps(rounds) if step[2] > step[1] + 1]
    if not steps:
        return None
    number, index, end = rng.choice(steps)
    lost = rng.randrange(index + 1, end)
    messages = [*rounds[number][:lost], *rounds[number][lost + 1 :]]
    is_last = number == len(rounds) - 1
    if is_last and rng.random() < 0.5:
        return Damaged([*flat(rounds[:number]), *messages[: end - 1]], goes_on=True)
    return Damaged(flat([*rounds[:number], messages, *rounds[number + 1 :]]))


def late_result(rounds: Rounds, by: Speaker, rng: random.Random, talk: Talk) -> Damaged | None:
    """A result is stored after other messages: of its step, of its round, or of a later round."""
    steps = [step for step in _steps(rounds) if step[2] > step[1] + 1]
    if not steps:
        return None
    number, index, end = rng.choice(steps)
    moved = rng.randrange(index + 1, end)
    start = sum(map(len, rounds[:number])) + moved
    stored = flat(rounds)
    result = stored.pop(start)
    stored.insert(rng.randrange(start, len(stored)) + 1, result)
    return Damaged(stored)


def swapped_results(rounds: Rounds, by: Speaker, rng: random.Random, talk: Talk) -> Damaged | None:
    """Tools that run in parallel finish in any order."""
    steps = [step for step in _steps(rounds) if step[2] > step[1] + 2]
    if not steps:
        return None
    number, index, end = rng.choice(steps)
    messages = rounds[number]
    if rng.random() < 0.5 and number == len(rounds) - 1:
        stored = [*messages[: index + 1], *messages[index + 1 : end][::-1]]
        return Damaged([*flat(rounds[:number]), *stored], goes_on=True)
    messages = [*messages[: index + 1], *messages[index + 1 : end][::-1], *messages[end:]]
    return Damaged(flat([*rounds[:number], messages, *rounds[number + 1 :]]))


def with_text(message: ChatMessage, text: str) -> ChatMessage:
    """Return the message as an application edits it: the text is replaced, all else is kept."""
    content: list[Any] = []
    for part in message._content:
        if isinstance(part, TextContent):
            if text is not None:
                content.append(TextContent(text))
            text = ""  # only the first text is kept
        else:
            content.append(part)
    return replace(message, _content=[part for part in content if part != TextContent("")] or [TextContent("")])


def edited(rounds: Rounds, by: Speaker, rng: random.Random, talk: Talk) -> Damaged | None:
    """A text was replaced in place; the rest of the message and its meta were kept."""
    stored = flat(rounds)
    places = [i for i, message in enumerate(stored) if message.text and message.role is not ChatRole.SYSTEM]
    if not places:
        return None
    place = rng.choice(places)
    old = str(stored[place].text)
    stored[place] = with_text(stored[place], f"Edited {place}: it is otherwise.")
    return Damaged(stored, gone=[old])


def blanked(rounds: Rounds, by: Speaker, rng: random.Random, talk: Talk) -> Damaged | None:
    """A text was replaced by nothing, or by a blank."""
    stored = flat(rounds)
    places = [i for i, message in enumerate(stored) if message.text]
    place = rng.choice(places)
    old = str(stored[place].text)
    blank = rng.choice(("", " ", "\n"))
    stored[place] = replace(
        stored[place],
        _content=[TextContent(blank) if isinstance(part, TextContent) else part for part in stored[place]._content],
    )
    return Damaged(stored, gone=[old])


def deleted(rounds: Rounds, by: Speaker, rng: random.Random, talk: Talk) -> Damaged:
    """A message was deleted that is not a question."""
    stored = flat(rounds)
    places = [i for i, message in enumerate(stored) if message.role is not ChatRole.USER]
    del stored[rng.choice(places)]
    return Damaged(stored)


def deleted_question(rounds: Rounds, by: Speaker, rng: random.Random, talk: Talk) -> Damaged:
    number = rng.randrange(len(rounds))
    return Damaged(flat([*rounds[:number], rounds[number][1:], *rounds[number + 1 :]]))


def two_agents(rounds: Rounds, by: Speaker, rng: random.Random, talk: Talk) -> Damaged | None:
    """Two agents answered two questions at the same time; each names the question of its messages."""
    if len(rounds) < 2 or not by.is_agent:
        return None
    *before, first, second = rounds
    left, right = list(first[1:]), list(second[1:])
    if rng.random() < 0.3:
        left = left[: rng.randrange(len(left) + 1)]
    mixed = [first[0], second[0]]
    while left or right:
        mixed.append((left if not right or (left and rng.random() < 0.5) else right).pop(0))
    return Damaged([*flat(before), *mixed])


# ---------------------------------------------------------------------- ids


def key_of(call: ToolCall) -> str:
    return str(call.arguments["key"])


def with_ids(message: ChatMessage, new_id: Callable[[ToolCall], tuple[str | None, str | None]]) -> ChatMessage:
    """Return the message with other ids of its calls, in all places where they stand."""

    def changed(call: ToolCall) -> ToolCall:
        call_id, extra_id = new_id(call)
        extra = {**call.extra, "call_id": extra_id} if call.extra and "call_id" in call.extra else call.extra
        return replace(call, id=call_id, extra=extra)

    content: list[Any] = []
    for part in message._content:
        if isinstance(part, ToolCall):
            content.append(changed(part))
        elif isinstance(part, ToolCallResult):
            content.append(replace(part, origin=changed(part.origin)))
        else:
            content.append(part)
    meta = message.meta
    if meta.get(RAW_KEY):
        calls = {call.id: new_id(call)[0] for call in message.tool_calls}
        raw = [{**b, "id": calls.get(b["id"])} if b["type"] == "tool_use" else b for b in meta[RAW_KEY]]
        meta = {**meta, RAW_KEY: raw}
    return replace(message, _content=content, _meta=meta)


_COUNTED = {
    "anthropic": "toolu_{}",
    "bedrock": "tooluse_{}",
    "mistral": "call0000{}",
    "responses": "fc_{}",
}


def counted_ids(rounds: Rounds, by: Speaker, rng: random.Random, talk: Talk) -> Damaged | None:
    """The model counts its calls anew in each reply."""
    form = _COUNTED.get(by.provider, "call_{}")
    ids: dict[str, tuple[str, str]] = {}
    stored = flat(rounds)
    for message in stored:
        for index, call in enumerate(message.tool_calls):
            ids[key_of(call)] = form.format(index), f"call_{index}"
    if len({call_id for call_id, _ in ids.values()}) == len(ids):
        return None
    return Damaged([with_ids(message, lambda call: ids[key_of(call)]) for message in stored])


def shared_ids(rounds: Rounds, by: Speaker, rng: random.Random, talk: Talk) -> Damaged | None:
    """All calls of a reply have one id, such as the name of the tool. A result may be lost, or come first."""
    ids: dict[str, tuple[str, str]] = {}
    stored = flat(rounds)
    if not any(len(message.tool_calls) > 1 for message in stored):
        return None
    for number, message in enumerate(stored):
        for call in message.tool_calls:
            shared = f"lookup{number:03d}" if by.provider == "mistral" else f"fc_lookup_{number}"
            ids[key_of(call)] = shared, shared
    damaged = rng.choice((nothing, nothing, swapped_results, lost_result))(rounds, by, rng, talk)
    if damaged is None:
        return None
    damaged.stored = [with_ids(message, lambda call: ids[key_of(call)]) for message in damaged.stored]
    return damaged


def no_ids(rounds: Rounds, by: Speaker, rng: random.Random, talk: Talk) -> Damaged | None:
    """Calls have no ids, or empty ones. Results may be in another order."""
    if not _steps(rounds):
        return None
    damaged = rng.choice((nothing, under_way, swapped_results, lost_result, crash))(rounds, by, rng, talk)
    if damaged is None:
        return None
    missing = rng.choice((None, ""))
    damaged.stored = [with_ids(message, lambda call: (missing, missing)) for message in damaged.stored]
    return damaged


# ---------------------------------------------------------------------- other programs


def split_calls(rounds: Rounds, by: Speaker, rng: random.Random, talk: Talk) -> Damaged | None:
    """Parallel calls are stored as one assistant message each, as streams and other programs store them."""
    steps = [step for step in _steps(rounds) if len(rounds[step[0]][step[1]].tool_calls) > 1]
    if not steps:
        return None
    number, index, end = rng.choice(steps)
    messages = rounds[number]
    whole = messages[index]
    calls = whole.tool_calls
    kept_meta = {key: whole.meta[key] for key in (QUESTION_ID_KEY,) if key in whole.meta}
    first = replace(whole, _content=[part for part in whole._content if part not in calls[1:]])
    if RAW_KEY in first.meta:
        rest_ids = {call.id for call in calls[1:]}
        raw = [block for block in first.meta[RAW_KEY] if block.get("id") not in rest_ids]
        first = replace(first, _meta={**first.meta, RAW_KEY: raw})
    others = [ChatMessage.from_assistant(tool_calls=[call], meta=dict(kept_meta)) for call in calls[1:]]
    messages = [*messages[:index], first, *others, *messages[index + 1 :]]
    end += len(others)
    if number == len(rounds) - 1 and rng.random() < 0.4:
        return Damaged([*flat(rounds[:number]), *messages[:end]], goes_on=True)
    return Damaged(flat([*rounds[:number], messages, *rounds[number + 1 :]]))


def stored_twice(rounds: Rounds, by: Speaker, rng: random.Random, talk: Talk) -> Damaged | None:
    """A turn was stored twice: its messages have no ids by which the store could know them."""
    if by.is_agent:
        return None
    number = rng.randrange(len(rounds))
    start = rng.choice((0, 1))
    return Damaged(flat([*rounds[: number + 1], rounds[number][start:], *rounds[number + 1 :]]))


def alternatives(rounds: Rounds, by: Speaker, rng: random.Random, talk: Talk) -> Damaged:
    """The model was asked for two replies, and both are stored."""
    stored: list[ChatMessage] = []
    gone: list[str] = []
    for message in flat(rounds):
        stored.append(message)
        if message.role is ChatRole.ASSISTANT and (message.text or message.tool_calls) and rng.random() < 0.4:
            text = f"Alternative {len(stored)}: it is not so."
            meta = {key: value for key, value in message.meta.items() if key in (QUESTION_ID_KEY, "model")}
            stored.append(ChatMessage.from_assistant(text, meta={**meta, "index": 1, "finish_reason": "stop"}))
            gone.append(text)
    return Damaged(stored, gone=gone)


_MARKS: dict[str, dict[str, Any]] = {
    "anthropic": {"cache_control": {"type": "ephemeral"}},
    "bedrock": {"cachePoint": {"type": "default"}},
}


def marked(rounds: Rounds, by: Speaker, rng: random.Random, talk: Talk) -> Damaged | None:
    """Every turn marks its question for the provider's prompt cache; some mark results and answers, too."""
    mark = _MARKS.get(by.provider)
    if mark is None:
        return None
    roles = rng.choice(([ChatRole.USER], [ChatRole.USER, ChatRole.TOOL], list(ChatRole)))
    stored = [replace(m, _meta={**m.meta, **mark}) if m.role in roles else m for m in flat(rounds)]
    return Damaged(stored, marks=mark)


DAMAGES: dict[str, Damage] = {
    damage.__name__: damage
    for damage in (
        nothing,
        under_way,
        crash,
        crash_before,
        results_arrive,
        lost_result,
        late_result,
        swapped_results,
        edited,
        blanked,
        deleted,
        deleted_question,
        two_agents,
        counted_ids,
        shared_ids,
        no_ids,
        split_calls,
        stored_twice,
        alternatives,
        marked,
    )
}
