# SPDX-License-Identifier: Apache-2.0
"""
The rules of transcripts: which part of what a client sends whole is stored already, and what the client wants.

A transcript and a history are compared by their questions, in order. Answers are not compared, because clients keep
less of them (no tool calls) or more (status lines). A stored question carries the digest of itself and all questions
before it. So if the newest stored question has the digest of the transcript, the others need not be read.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from haystack.dataclasses import ChatMessage, ChatRole, TextContent

from haystack_chat_store.conversation.rounds import is_question, question_groups, said_parts
from haystack_chat_store.conversation.turns import answer_of
from haystack_chat_store.errors import TranscriptError
from haystack_chat_store.ids import (
    MESSAGE_ID_KEY,
    QUESTION_ID_KEY,
    TRANSCRIPT_KEY,
    message_id_of,
    question_id_of,
    reply_id,
)
from haystack_chat_store.types import TranscriptOutcome

# The fields of images and files in which a client may differ from itself.
_INCIDENTAL_FIELDS = ("meta", "validation")
# The number of bytes of a digest.
_DIGEST_SIZE = 16


class Conversation(NamedTuple):
    """
    The messages of a transcript or a history.

    :param preamble: The messages before the first question.
    :param rounds: The messages of each question, the question first. In a history, messages that name a missing
        question are left out.
    """

    preamble: list[ChatMessage]
    rounds: list[list[ChatMessage]]


class Place(NamedTuple):
    """
    The place of a question in its conversation.

    :param number: Its number, 1 for the first question.
    :param users_before: The number of stored user messages before it. Blank ones, and those of hooks, count.
    :param digest: The digest of its content and of those of all questions before it.
    """

    number: int
    users_before: int
    digest: str


@dataclass(frozen=True)
class Plan:
    """
    What a transcript means for a history.

    :param outcome: See `MatchedTranscript`.
    :param kept: The number of stored rounds that stay.
    :param known: The number of rounds of the transcript that are stored.
    :param place: The place of the last question that stays, but with all user messages that stay before the next one.
    :param is_asked_again: Whether the last of the stored rounds that stay is the client's newest question.
    """

    outcome: TranscriptOutcome
    kept: int
    known: int
    place: Place
    is_asked_again: bool = False


def conversation_of(messages: Sequence[ChatMessage]) -> Conversation:
    """Put the messages of each question together. Blank user messages, and those of hooks, are not questions."""
    said = [message for message in messages if message.role is not ChatRole.SYSTEM]
    preamble, *groups = question_groups(said, with_strays=False)
    rounds: list[list[ChatMessage]] = []
    for group in groups:
        if is_question(group[0]) and question_id_of(group[0]) is None:
            rounds.append(group)
        elif rounds:
            rounds[-1] += group
        else:
            preamble += group
    return Conversation(preamble, rounds)


def plan_from_end(
    asked: Conversation, end: Conversation, messages: Sequence[ChatMessage], round_count: int
) -> Plan | None:
    """
    Decide by the last stored question, without the questions before it.

    :param asked: The transcript.
    :param end: The end of the history. The plan counts only the rounds in it.
    :param messages: The messages that make up `end`.
    :param round_count: The number of user messages in the whole history.
    :returns: The plan, or `None` if it takes the whole history to decide.
    """
    grouped = len(end.preamble) + sum(map(len, end.rounds))
    place = place_of(end.rounds[-1][0]) if end.rounds else None
    if place is None or grouped < sum(message.role is not ChatRole.SYSTEM for message in messages):
        return None
    place = place._replace(users_before=place.users_before + _users(end.rounds[-1]))
    if place.users_before != round_count:  # others have written or deleted questions
        return None
    asked_keys = [_key(round_[0]) for round_ in asked.rounds]
    if place.number > len(asked_keys) or _digest("", asked_keys[: place.number]) != place.digest:
        return None
    if place.number < len(asked_keys):
        return Plan("append", len(end.rounds), place.number, place)
    if len(_overlaps(asked_keys, asked_keys)) > 1:  # such as "yes", "yes": it may also be a window
        return None
    return Plan("resume", len(end.rounds), place.number, place, is_asked_again=True)


def plan_from_all(asked: Conversation, stored: Conversation) -> Plan:
    """
    Decide by all questions.

    :param asked: The transcript. It has a question.
    :param stored: The whole history.
    :raises TranscriptError: If the transcript has nothing in common with the history.
    """
    if not stored.rounds:
        return Plan("first", 0, 0, Place(0, _users(stored.preamble), ""))
    asked_keys = [_key(round_[0]) for round_ in asked.rounds]
    stored_keys = [_key(round_[0]) for round_ in stored.rounds]
    all_asked, all_stored = len(asked_keys), len(stored_keys)

    def plan(outcome: TranscriptOutcome, kept: int, known: int, *, is_asked_again: bool = False) -> Plan:
        users = _users(stored.preamble) + sum(map(_users, stored.rounds[:kept]))
        return Plan(outcome, kept, known, Place(kept, users, _digest("", stored_keys[:kept])), is_asked_again)

    same = 0
    while same < min(all_asked, all_stored) and asked_keys[same] == stored_keys[same]:
        same += 1
    if same == all_stored and same < all_asked:
        return plan("append", all_stored, same)

    # A client that cuts off the beginning sends the end of the history. It counts if the beginning does not fit at all,
    # or if more of the answers agree: "yes", "yes", "yes".
    said, stored_answers = _answers(asked), _answers(stored)
    overlaps = [length for length in _overlaps(asked_keys, stored_keys) if length < all_stored and all_asked > 1]
    agreeing = {length: _agreeing(said, stored_answers[all_stored - length :]) for length in overlaps}
    overlap = max(overlaps, key=lambda length: (agreeing[length], length), default=0)
    if overlap and (same == 0 or agreeing[overlap] > _agreeing(said[:same], stored_answers)):
        if overlap == all_asked:
            return plan("resume", all_stored, all_asked, is_asked_again=True)
        return plan("append", all_stored, overlap)

    if same == 0:
        raise TranscriptError(
            f"The transcript has nothing in common with the history: none of its {all_asked} questions is the first of "
            f"the {all_stored} that are stored, nor does it begin with the last of them. Nothing was changed."
        )
    if same == all_asked:
        return plan("resume" if same == all_stored else "rewind", same, same, is_asked_again=True)
    return plan("rewind", same, same)


def with_outcome(plan: Plan, stored: Conversation, *, is_retry: bool) -> Plan:
    """Say what becomes of a question that is the last one in both: it is answered, or answered anew."""
    if plan.outcome != "resume" or answer_of(stored.rounds[-1]) is None:
        return plan
    return replace(plan, outcome="repeat" if is_retry else "regenerate")


def taken_back(plan: Plan, messages: Sequence[ChatMessage], stored: Conversation) -> list[ChatMessage]:
    """
    Return the messages that the client does not have any more.

    :param plan: What the transcript means.
    :param messages: The history, or its end.
    :param stored: The same, put together.
    """
    if plan.outcome not in ("regenerate", "rewind"):
        return []
    rounds = stored.rounds[: plan.kept]
    if plan.is_asked_again:
        rounds = [*rounds[:-1], rounds[-1][:1]]
    kept = {id(message) for group in (stored.preamble, *rounds) for message in group}
    going = {id(message) for round_ in stored.rounds for message in round_} - kept
    first = next((place for place, message in enumerate(messages) if id(message) in going), len(messages))
    return [message for message in messages[first:] if id(message) not in kept]


def new_messages(
    plan: Plan, asked: Conversation, stored: Conversation, question_id: str | None, *, with_preamble: bool
) -> list[ChatMessage]:
    """
    Return what is new in a transcript, or the stored question that is asked again.

    New messages get ids that are made from the transcript's questions, so that a transcript that is sent twice at the
    same moment is stored once.

    :param plan: What the transcript means.
    :param asked: The transcript.
    :param stored: The history, or its end.
    :param question_id: The id of the newest question, or `None` to make one.
    :param with_preamble: Whether the messages before the first question are new.
    """
    if plan.is_asked_again:
        return [stored.rounds[plan.kept - 1][0]]
    place = plan.place
    new: list[ChatMessage] = []
    if plan.kept and len(stored.rounds[plan.kept - 1]) == 1:  # the client has an answer that was never stored
        question = stored.rounds[plan.kept - 1][0]
        said = [
            each for each in asked.rounds[plan.known - 1][1:] if each.role is not ChatRole.USER and said_parts(each)
        ]
        new += _answering(said, message_id_of(question) or place.digest)
    for index, (question, *others) in enumerate(asked.rounds[plan.known :], plan.known + 1):
        place = Place(place.number + 1, place.users_before, _digest(place.digest, [_key(question)]))
        if with_preamble and index == 1:
            new += [
                _with_meta(each, {MESSAGE_ID_KEY: message_id_of(each) or f"{place.digest}:before:{number}"})
                for number, each in enumerate(asked.preamble)
            ]
        own_id = message_id_of(question) or place.digest
        if index == len(asked.rounds) and question_id is not None:
            own_id = question_id
        new.append(_with_meta(question, {MESSAGE_ID_KEY: own_id, TRANSCRIPT_KEY: ":".join(map(str, place))}))
        new += _answering(others, own_id)
        place = place._replace(users_before=place.users_before + _users([question, *others]))
    return new


def place_of(question: ChatMessage) -> Place | None:
    """Return the place that a stored question carries, or `None` if it carries none."""
    number, _, rest = str(question.meta.get(TRANSCRIPT_KEY, "")).partition(":")
    users_before, _, digest = rest.partition(":")
    return Place(int(number), int(users_before), digest) if number.isdecimal() and users_before.isdecimal() else None


def _answering(messages: Sequence[ChatMessage], question_id: str | int) -> list[ChatMessage]:
    return [
        _with_meta(
            each,
            {QUESTION_ID_KEY: question_id, MESSAGE_ID_KEY: message_id_of(each) or reply_id(question_id, number)},
        )
        for number, each in enumerate(messages)
    ]


def _with_meta(message: ChatMessage, meta: dict[str, Any]) -> ChatMessage:
    return replace(message, _meta={**message.meta, **meta})


def _users(messages: Sequence[ChatMessage]) -> int:
    return sum(message.role is ChatRole.USER for message in messages)


def _key(question: ChatMessage) -> str:
    """Return the content of a question as text that is equal if the contents are."""
    return json.dumps([_part_key(part) for part in said_parts(question)], sort_keys=True, default=repr)


def _part_key(part: Any) -> Any:
    if isinstance(part, TextContent):
        return part.text.strip()
    fields = {name: value for name, value in part.to_dict().items() if name not in _INCIDENTAL_FIELDS}
    return [type(part).__name__, fields]


def _digest(before: str, keys: Sequence[str]) -> str:
    """Go on with the digest of a conversation."""
    for key in keys:
        before = hashlib.blake2b(f"{before}\n{key}".encode(), digest_size=_DIGEST_SIZE).hexdigest()
    return before


def _overlaps(asked: Sequence[str], stored: Sequence[str]) -> list[int]:
    """
    Return the lengths of all beginnings of one list that are the end of another, the longest first.

    The algorithm is that of Knuth, Morris and Pratt: `borders[n]` is the longest for the first `n` items alone.
    """
    items: list[str | None] = [*asked, None, *stored]
    borders = [0, 0]
    for item in items[1:]:
        length = borders[-1]
        while length and items[length] != item:
            length = borders[length]
        borders.append(length + (items[length] == item))
    lengths = []
    length = borders[-1]
    while length:
        lengths.append(length)
        length = borders[length]
    return lengths


def _agreeing(answers: Sequence[str], others: Sequence[str]) -> int:
    """Count the answers that agree."""
    return sum(bool(answer) and answer == other for answer, other in zip(answers, others, strict=False))


def _answers(conversation: Conversation) -> list[str]:
    """Return what a client can have kept of each answer: its texts one after the other, without blank space."""
    return [
        "".join("".join(text for each in answer if each.role is ChatRole.ASSISTANT for text in each.texts).split())
        for _, *answer in conversation.rounds
    ]
