# SPDX-License-Identifier: Apache-2.0
"""One case: a stored history, a window, the messages of this turn, and the model that is asked; and what is wrong."""

import base64
import inspect
import logging
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import count
from typing import Any

from damages import DAMAGES, RAW_KEY, Damaged, flat
from haystack.dataclasses import ChatMessage, ChatRole
from haystack_integrations.components.retrievers.chat_store import ChatMessageRetriever
from histories import Speaker, Talk, speaker
from judging import Asked, Problem, lost_pairs, problems_of, rule_of, texts_of
from sending import OUTLINE, REQUEST, Step, characters
from windows import WHOLE, Window, windows

from haystack_chat_store import InMemoryChatMessageStore
from haystack_chat_store.ids import MESSAGE_ID_KEY, QUESTION_ID_KEY

_INIT = inspect.signature(ChatMessageRetriever.__init__).parameters
_RUN = inspect.signature(ChatMessageRetriever.run).parameters
#: Providers that insist on alternating roles.
ALTERNATING = {"bedrock", "mistral"}

STORES = {
    unit: InMemoryChatMessageStore(last_k=None, last_k_unit=unit, namespace="providers")
    for unit in ("round", "message")
}
_histories = count()

# The generators warn of each reply that was cut off.
logging.getLogger("haystack").setLevel(logging.ERROR)
logging.getLogger("haystack_integrations").setLevel(logging.ERROR)


def is_offered(setting: str) -> bool:
    """Whether the retriever has a setting, such as `portable`."""
    return setting in _INIT or setting in _RUN


#: The values of `portable` that the retriever can be asked for.
PORTABLE: tuple[bool | None, ...] = (True, False) if is_offered("portable") else (None,)


@dataclass
class Case:
    """
    :param stored: The history.
    :param current: The messages of this turn.
    :param model: The model that is asked, if the retriever is told.
    """

    name: str
    asked: Asked
    stored: list[ChatMessage]
    current: list[ChatMessage]
    window: Window = WHOLE
    portable: bool | None = None
    merges: bool = False
    gone: list[str] = field(default_factory=list)
    history_id: str | None = None
    model: str | None = None

    @property
    def provider(self) -> str:
        return self.asked.provider


# ---------------------------------------------------------------------- show


@cache
def _retriever(unit: str, **settings: Any) -> ChatMessageRetriever:
    # Making a component takes longer than running it.
    return ChatMessageRetriever(STORES[unit], **settings)


def store(messages: list[ChatMessage]) -> str:
    """Store a history, and return its id."""
    history_id = f"history {next(_histories)}"
    STORES["round"].write_messages(history_id, messages)
    return history_id


def show(case: Case) -> list[ChatMessage]:
    """Return what the retriever shows the model."""
    history_id = case.history_id or store(case.stored)
    wanted = {**case.window.settings, "portable": case.portable, "merge_consecutive": case.merges or None}
    wanted["model"] = case.model
    wanted = {name: value for name, value in wanted.items() if not (name not in case.window.settings and value is None)}
    init = {name: value for name, value in wanted.items() if name in _INIT}
    run = {name: value for name, value in wanted.items() if name not in _INIT and name in _RUN}
    try:
        return _retriever(case.window.unit, **init).run(history_id, current_messages=case.current, **run)["messages"]
    finally:
        if case.history_id is None:
            STORES["round"].delete_messages(history_id)


# ---------------------------------------------------------------------- what must be in it


def said_by(message: ChatMessage) -> str:
    """Return what a message says: its text, or a refusal."""
    text = message.text or ""
    if not text.strip():
        refusal = message.meta.get("refusal")
        return refusal if isinstance(refusal, str) else ""
    return text


def shown_part(case: Case) -> list[ChatMessage]:
    """Return the stored messages that the window must show; nothing where a number of tokens decides."""
    if case.window.max_tokens is not None:
        return []
    stored, last_k = case.stored, case.window.last_k
    if last_k is not None:
        if case.window.unit == "message":
            stored = stored[-last_k:]
        else:
            starts = [index for index, message in enumerate(stored) if message.role is ChatRole.USER]
            stored = stored[starts[-last_k] :] if len(starts) >= last_k else stored
    # A message whose question is not in the window is not shown, unless its question was deleted.
    outside = {message.meta.get(MESSAGE_ID_KEY) for message in case.stored[: len(case.stored) - len(stored)]} - {None}
    stored = [message for message in stored if message.meta.get(QUESTION_ID_KEY) not in outside]
    # Nothing is shown before the first question.
    for index, message in enumerate(stored):
        if message.role is ChatRole.USER and said_by(message):
            return stored[index:]
    return []


def in_question_order(messages: list[ChatMessage]) -> list[ChatMessage]:
    """Return the messages of each question together, as two agents' are shown."""
    groups: dict[Any, list[ChatMessage]] = {}
    key: Any = None
    for index, message in enumerate(messages):
        named = message.meta.get(QUESTION_ID_KEY)
        if message.role is ChatRole.USER:
            key = message.meta.get(MESSAGE_ID_KEY, index)
        elif named in groups:
            key = named
        groups.setdefault(key, []).append(message)
    return [message for group in groups.values() for message in group]


def stored_pairs(messages: list[ChatMessage]) -> set[str]:
    """Return the keys of the calls whose own results follow in the same exchange."""
    keys: set[str] = set()
    calls: set[str] = set()
    answered = False
    for message in messages:
        if message.role is ChatRole.ASSISTANT and message.tool_calls:
            if answered:
                calls, answered = set(), False
            calls |= {call.arguments.get("key", "") for call in message.tool_calls}
        elif message.role is ChatRole.TOOL:
            answered = True
            keys |= calls & {result.origin.arguments.get("key", "") for result in message.tool_call_results}
        elif message.meta.get("index", 0) == 0:
            calls = set()
    return keys


def expected_problems(case: Case, steps: list[Step]) -> Iterator[Problem]:
    """Yield what is missing in a request, and what should not be in it."""
    texts = texts_of(steps)
    part = in_question_order(shown_part(case))
    current_texts = [said_by(message) for message in case.current if message.role is ChatRole.USER]
    for text in current_texts:
        if text and text not in texts:
            yield Problem("question-lost", f"{text!r}, of this turn")
    unsigned = _unsigned_texts(case)
    for message in part:
        text = said_by(message)
        if not text or text in texts:
            continue
        if message.role is ChatRole.USER:
            yield Problem("question-lost", repr(text))
        elif message.role is ChatRole.ASSISTANT and not message.meta.get("index") and text not in unsigned:
            yield Problem("answer-lost", repr(text))
    if case.portable:
        yield from _lost_files(case, part, steps)
    for text in case.gone:
        if text in texts:
            rule = "alternative-shown" if text.startswith("Alternative") else "old-text"
            yield Problem(rule, repr(text))
    yield from lost_pairs(steps, case.provider, stored_pairs(part))
    if case.window.max_tokens is not None:
        # Messages of this turn are never cut; the counter takes four characters for a token.
        this_turn = sum(len(said_by(m)) + sum(len(str(r.result)) for r in m.tool_call_results) for m in case.current)
        sent = characters(steps)
        if sent // 4 > case.window.max_tokens and sent > this_turn:
            yield Problem("over-budget", f"{sent} characters for {case.window.max_tokens} tokens")


def _lost_files(case: Case, part: list[ChatMessage], steps: list[Step]) -> Iterator[Problem]:
    """Yield the files of questions of which neither the file itself is sent, nor its text or type."""
    texts = texts_of(steps)
    for message in part:
        question = said_by(message)
        has_media = any(step.media and question in "\n".join(step.texts) for step in steps)
        for file in message.files if question and not has_media else ():
            data = base64.b64decode(file.base64_data)
            said = (
                data.decode()
                if file.mime_type == "text/plain"
                else f"{file.mime_type or 'unknown type'}, {len(data)} bytes"
            )
            if said not in texts:
                yield Problem("file-lost", f"{said!r}, of {question!r}")


def _unsigned_texts(case: Case) -> set[str]:
    """Return the texts that Gemini's converter does not send, because only another part of the message is signed."""
    if case.provider != "gemini":
        return set()
    return {said_by(m) for m in case.stored if m.meta.get("thought_signatures") and m.tool_calls}


def judged(case: Case) -> list[Problem]:
    """Show a history to a model, and return what is wrong with the request."""
    shown = show(case)
    if case.window.max_tokens is not None and not any(m.role is not ChatRole.SYSTEM for m in shown):
        return []  # not even the question fits the tokens
    try:
        request = REQUEST[case.provider](shown)
    except Exception as error:  # whatever a converter raises ends the user's turn
        return [Problem("converter-error", f"{type(error).__name__}: {str(error)[:160]}")]
    steps = OUTLINE[case.provider](request)
    return [*problems_of(request, steps, case.asked), *expected_problems(case, steps)]


# ---------------------------------------------------------------------- cases from a seed


def _this_turn(rng: random.Random, talk: Talk, by: Speaker, damaged: Damaged) -> list[list[ChatMessage]]:
    """Return what may come with the request: a new question, or nothing but the results of stored calls."""
    system = [ChatMessage.from_system("Be brief.", meta=dict(damaged.marks))] if rng.random() < 0.5 else []
    question = talk.question(by)
    if damaged.marks:
        system = [ChatMessage.from_system("Be brief.", meta=dict(damaged.marks))]
        question = ChatMessage.from_user(str(question.text), meta={**question.meta, **damaged.marks})
    turns = [[*system, *damaged.results, question]]
    if damaged.goes_on:
        turns.append([*system, *damaged.results])
    return turns


def _cases_of(
    name: str, damaged: Damaged, asked: Asked, turns: list[list[ChatMessage]], rng: random.Random
) -> Iterator[Case]:
    history_id = store(damaged.stored)
    try:
        for turn in turns:
            for window in windows(rng, len(damaged.stored)):
                merges = asked.provider in ALTERNATING or rng.random() < 0.15
                for portable in PORTABLE:
                    model = asked.model if rng.random() < 0.3 else None
                    yield Case(
                        name, asked, damaged.stored, turn, window, portable, merges, damaged.gone, history_id, model
                    )
    finally:
        STORES["round"].delete_messages(history_id)


def after_damage(seed: Any, provider: str, names: list[str]) -> Iterator[Case]:
    """Yield the cases of one conversation: after each damage, its history is shown to the same model again."""
    rng = random.Random(f"{seed} {provider}")
    talk = Talk(rng)
    by = speaker(rng, provider)
    rounds = talk.rounds(by, rng.choice((1, 1, 2, 2, 3, 4, 5, 6)))
    asked = Asked(provider, by.model, by.thinking)
    for name in names:
        damaged = DAMAGES[name](rounds, by, rng, talk)
        if damaged is not None:
            yield from _cases_of(name, damaged, asked, _this_turn(rng, talk, by, damaged), rng)


def same_provider(seed: Any, providers: list[str], damages_each: int = 5) -> Iterator[Case]:
    """Yield cases without end, of each provider in turn, after damages of all kinds."""
    names = [name for name in DAMAGES if name != "nothing"]
    for number in count():
        for provider in providers:
            chosen = random.Random(f"{seed} {number} {provider}").sample(names, damages_each)
            yield from after_damage(f"{seed} {number}", provider, ["nothing", *chosen])


def after_switch(seed: Any, first: str, second: str) -> Iterator[Case]:
    """
    Yield the cases of one conversation with which another model goes on, of another provider or of the same one.

    The switch is behind any round, also behind one that was interrupted. The new model then has any number of rounds of
    its own, and may be in the middle of one.
    """
    rng = random.Random(f"{seed} {first} {second}")
    talk = Talk(rng)
    before = speaker(rng, first)
    after = speaker(rng, second, other_model=first == second)
    after.is_agent = before.is_agent
    old = talk.rounds(before, rng.choice((1, 1, 2, 3)))
    new = talk.rounds(after, rng.choice((0, 0, 1, 2)))
    name = rng.choice(list(DAMAGES)) if rng.random() < 0.5 else "nothing"
    damaged = DAMAGES[name](old, before, rng, talk) or Damaged(flat(old))
    stored = [*damaged.stored, *damaged.results, *flat(new)]
    goes_on = rng.random() < 0.3
    if goes_on:
        stored += talk._named([talk.question(after), *talk.step(after)], after)
    switch = Damaged(stored, goes_on=goes_on, gone=damaged.gone)
    turn = _this_turn(rng, talk, after, switch)[-1]
    asked = Asked(second, after.model, after.thinking)
    for case in _cases_of(f"{first}>{second} {name}", switch, asked, [turn], rng):
        if case.portable is not False:
            yield case


def after_resumption(seed: Any, first: str, second: str) -> Iterator[Case]:
    """Yield the cases of one conversation whose interrupted last round another model resumes."""
    rng = random.Random(f"resumed {seed} {first} {second}")
    talk = Talk(rng)
    before = speaker(rng, first)
    after = speaker(rng, second, other_model=first == second)
    stored = flat(talk.rounds(before, rng.choice((0, 1, 2))))
    begun = talk._named([talk.question(before), *talk.step(before), *talk.step(before)], before)
    stored += begun[: rng.randint(2, len(begun))]
    asked = Asked(second, after.model, after.thinking)
    for case in _cases_of(f"{first}>{second} resumed", Damaged(stored), asked, [[]], rng):
        if case.portable is not False:
            yield replace(case, model=after.model)


def switched(seed: Any, providers: list[str]) -> Iterator[Case]:
    """Yield cases without end, of each pair of providers in turn."""
    for number in count():
        for first in providers:
            for second in providers:
                yield from after_switch(f"{seed} {number}", first, second)


def described(messages: list[ChatMessage]) -> list[str]:
    """Return a line for each message."""
    lines = []
    for message in messages:
        parts = [repr(text) for text in message.texts]
        parts += [f"thinks({len(part.reasoning_text)})" for part in message.reasonings]
        parts += [f"{call.tool_name}({call.arguments.get('key')}) id={call.id!r}" for call in message.tool_calls]
        for result in message.tool_call_results:
            value = result.result if isinstance(result.result, str) else "[parts]"
            parts.append(f"{value!r} for {result.origin.arguments.get('key')} id={result.origin.id!r}")
        parts += ["image"] * len(message.images) + ["file"] * len(message.files)
        for key in ("refusal", "thought_signatures", "cache_control", "cachePoint", QUESTION_ID_KEY):
            if message.meta.get(key):
                value = message.meta[key]
                parts.append(f"{key}={value if isinstance(value, (str, dict)) else len(value)}")
        if message.meta.get(RAW_KEY):
            parts.append(f"raw={[block['type'] for block in message.meta[RAW_KEY]]}")
        lines.append(f"{message.role.value}: {', '.join(parts) or '(nothing)'}")
    return lines


def refused(cases: Iterable[Case]) -> dict[str, Case]:
    """Return the smallest case that breaks each rule that is not unsure."""
    smallest: dict[str, Case] = {}
    for case in cases:
        for rule in {problem.rule for problem in judged(case)}:
            if not fails(case.provider, rule):
                continue
            if rule not in smallest or len(case.stored) < len(smallest[rule].stored):
                smallest[rule] = case
    return smallest


def explained(case: Case, rule: str) -> str:
    """Return what a reader needs to see why a case breaks a rule, after shrinking it."""
    case = shrunk(case, rule)
    known = rule_of(case.provider, rule)
    lines = [
        f"{case.provider}: {rule} ({known.level}: {known.source}), after {case.name!r}",
        f"  {case.window}, portable={case.portable}, merge_consecutive={case.merges}",
    ]
    lines += [f"  {problem.rule}: {problem.where}" for problem in judged(case)]
    for label, messages in (("stored", case.stored), ("this turn", case.current), ("shown", show(case))):
        lines += [f"  {label}:", *(f"    {line[:240]}" for line in described(messages))]
    return "\n".join(lines)


def fails(provider: str, rule: str) -> bool:
    """Whether a test fails where a rule is broken."""
    return rule_of(provider, rule).level in ("sure", "likely")


def _units(messages: list[ChatMessage]) -> list[tuple[int, int]]:
    """Return the parts that can be left out: rounds, and in them assistant messages with what belongs to them."""
    starts = [index for index, message in enumerate(messages) if message.role is ChatRole.USER]
    rounds = list(zip(starts, [*starts[1:], len(messages)], strict=True))
    edges = [
        index
        for index, message in enumerate(messages)
        if message.role is ChatRole.USER
        or (message.role is ChatRole.ASSISTANT and messages[index - 1].role is not ChatRole.ASSISTANT)
    ]
    return [*rounds, *zip(edges, [*edges[1:], len(messages)], strict=True)]


def shrunk(case: Case, rule: str) -> Case:
    """Return the case with as few stored messages as still break the rule."""
    case = replace(case, history_id=None)
    found: Case | None = case
    while found is not None:
        case, found = found, None
        for start, end in _units(case.stored):
            shorter = replace(case, stored=[*case.stored[:start], *case.stored[end:]])
            if shorter.stored and any(problem.rule == rule for problem in judged(shorter)):
                found = shorter
                break
    return case
