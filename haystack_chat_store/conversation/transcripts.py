# SPDX-License-Identifier: Apache-2.0
"""
The rules of transcripts: which part of what a client sends whole is stored already, and what the client wants.

A transcript and a history are compared by their questions, in order. Answers are not compared, because clients keep
less of them (no tool calls) or more (status lines). A stored question carries the digest of itself and all questions
before it. So if the newest stored question has the digest of the transcript, the others need not be read.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
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
from haystack_chat_store.validation import validated_messages

# The fields of images and files in which a client may differ from itself.
_INCIDENTAL_FIELDS = ("meta", "validation")
# The fields of images and files that may be megabytes long. Their digests are compared.
_DATA_FIELDS = frozenset({"base64_image", "base64_data"})
# The number of hexadecimal digits of a digest.
_DIGEST_LENGTH = 32
# In the text that a digest is made of, each question ends with the first of these. A question as JSON begins with the
# second one.
_END, _JSON_FOLLOWS = "\0", "\1"


class Transcript(NamedTuple):
    """
    What a client has sent. System messages count for nothing.

    :param messages: The messages, oldest first.
    :param keys: The content of each question, in a form that is equal if the contents are. Blank user messages, and
        those that hooks added, are no questions.
    """

    messages: list[ChatMessage]
    keys: list[Any]

    def rounds_from(self, number: int) -> list[list[ChatMessage]]:
        """Return each question from one on, 0 for the first, with what follows it. The cost is that of these rounds."""
        rounds: list[list[ChatMessage]] = []
        others: list[ChatMessage] = []
        for message in reversed(self.messages):
            if len(rounds) == len(self.keys) - number:
                break
            if message._role is not ChatRole.SYSTEM:
                others.append(message)
            if _asked_key(message):
                rounds.append(others[::-1])
                others = []
        return rounds[::-1]

    def preamble(self) -> list[ChatMessage]:
        """Return what comes before the first question."""
        before = takewhile(lambda message: not _asked_key(message), self.messages)
        return [message for message in before if message._role is not ChatRole.SYSTEM]


class Conversation(NamedTuple):
    """
    The messages of a history, or of its end.

    :param preamble: The messages before the first question.
    :param rounds: The messages of each question, the question first. Messages that name a missing question are left
        out.
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


@dataclass(frozen=True, kw_only=True)
class Plan:
    """
    What a transcript means for a history.

    :param outcome: See `MatchedTranscript`.
    :param kept: The number of rounds that stay, of those that were read.
    :param known: The number of rounds of the transcript that are stored.
    :param questions: The number of all questions that stay.
    :param users: The number of user messages that stay.
    :param digest: The digest of the questions that stay, to go on with.
    :param is_asked_again: Whether the last of the rounds that stay is the client's newest question.
    """

    outcome: TranscriptOutcome
    kept: int
    known: int
    questions: int
    users: int
    digest: "hashlib._Hash"
    is_asked_again: bool = False


def transcript_of(messages: Iterable[ChatMessage]) -> Transcript:
    """
    Find the questions in what a client has sent.

    A transcript is as long as its conversation, so what is done for each of its messages is what a turn costs.

    :raises ValueError: If the value is not an iterable, or an item is not a `ChatMessage`. Messages with known texts
        are looked at no closer than it takes to see that.
    """
    listed = list(messages) if isinstance(messages, (list, tuple)) else validated_messages(messages, "transcript")
    user, hooks_key = ChatRole.USER, QUESTION_ID_KEY  # to look them up each time would take twice as long
    try:
        contents: Any = [
            message._content
            for message in listed
            if message._role is user
            and (not message._meta or hooks_key not in message._meta or question_id_of(message) is None)
        ]
        # A content that is not one text raises one of the errors below. That is faster than to look first.
        keys: list[Any] = list(map(str.strip, [part.text for (part,) in contents]))
    except (AttributeError, TypeError, ValueError):  # there are other parts than a text, or other values than messages
        keys = _checked_keys(listed)
    return Transcript(listed, keys if all(keys) else [key for key in keys if key])


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
    asked: Transcript, end: Conversation, messages: Sequence[ChatMessage], round_count: int
) -> Plan | None:
    """
    Decide what a transcript means for a history, by the last stored question alone.

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
    users = place.users_before + _users(end.rounds[-1])
    if users != round_count:  # others have written or deleted questions
        return None
    keys = asked.keys[: place.number]
    digest = _digest_of(keys)
    if len(keys) < place.number or digest.hexdigest()[:_DIGEST_LENGTH] != place.digest:
        return None
    # An end that is the beginning, too, such as "yes" of "yes", "no", "yes": the transcript may also be a window.
    if keys.count(keys[0]) > 1 and len(_overlaps(keys, keys)) > 1:
        return None
    is_asked_again = place.number == len(asked.keys)
    return Plan(
        outcome="resume" if is_asked_again else "append",
        kept=len(end.rounds),
        known=place.number,
        questions=len(keys),
        users=users,
        digest=digest,
        is_asked_again=is_asked_again,
    )


def plan_from_all(asked: Transcript, stored: Conversation) -> Plan:
    """
    Decide what a transcript means for a history, by comparing all questions of both.

    :param asked: The transcript. It has a question.
    :param stored: The whole history.
    :raises TranscriptError: If the transcript has nothing in common with the history.
    """
    if not stored.rounds:
        users = _users(stored.preamble)
        return Plan(outcome="first", kept=0, known=0, questions=0, users=users, digest=_digest_of([]))
    asked_keys = asked.keys
    stored_keys = [_key(round_[0]) for round_ in stored.rounds]
    all_asked, all_stored = len(asked_keys), len(stored_keys)

    def plan(outcome: TranscriptOutcome, kept: int, known: int, *, is_asked_again: bool = False) -> Plan:
        users = _users(stored.preamble) + sum(map(_users, stored.rounds[:kept]))
        return Plan(
            outcome=outcome,
            kept=kept,
            known=known,
            questions=kept,
            users=users,
            digest=_digest_of(stored_keys[:kept]),
            is_asked_again=is_asked_again,
        )

    same_at_start = 0
    while same_at_start < min(all_asked, all_stored) and asked_keys[same_at_start] == stored_keys[same_at_start]:
        same_at_start += 1

    # The client may have cut off the beginning of the conversation. Then its questions overlap with the end of the
    # history. This overlap is used if the first questions differ, or if more answers agree in it than at the beginning,
    # as may be with three times "yes".
    said = list(map(_answer, asked.rounds_from(0)))
    stored_answers = list(map(_answer, stored.rounds))
    overlaps = [length for length in _overlaps(asked_keys, stored_keys) if length < all_stored and all_asked > 1]
    agreeing = {length: _agreeing(said, stored_answers[all_stored - length :]) for length in overlaps}
    overlap = max(overlaps, key=lambda length: (agreeing[length], length), default=0)
    if overlap and (same_at_start == 0 or agreeing[overlap] > _agreeing(said[:same_at_start], stored_answers)):
        if overlap == all_asked:
            return plan("resume", all_stored, all_asked, is_asked_again=True)
        return plan("append", all_stored, overlap)

    if same_at_start == 0:
        raise TranscriptError(
            f"The transcript has nothing in common with the history: none of its {all_asked} questions is the first of "
            f"the {all_stored} that are stored, nor does it begin with the last of them. Nothing was changed."
        )
    if same_at_start == all_stored and same_at_start < all_asked:
        return plan("append", all_stored, same_at_start)
    if same_at_start == all_asked:
        outcome: TranscriptOutcome = "resume" if same_at_start == all_stored else "rewind"
        return plan(outcome, same_at_start, same_at_start, is_asked_again=True)
    return plan("rewind", same_at_start, same_at_start)


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
    plan: Plan, asked: Transcript, stored: Conversation, question_id: str | None, *, with_preamble: bool
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
    new: list[ChatMessage] = []
    rounds = asked.rounds_from(max(plan.known - 1, 0))
    validated_messages([message for round_ in rounds for message in round_], "transcript")
    if plan.kept and len(stored.rounds[plan.kept - 1]) == 1:  # the client may have an answer that was never stored
        question_id_before = message_id_of(stored.rounds[plan.kept - 1][0])
        said = [each for each in rounds[0] if each.role is not ChatRole.USER and said_parts(each)]
        new += _answering(said, str(question_id_before))
    digest, questions, users = plan.digest.copy(), plan.questions, plan.users
    for number, (question, *others) in enumerate(rounds[bool(plan.known) :], plan.known):
        digest.update(_text_of([asked.keys[number]]))
        questions += 1
        place = Place(questions, users, digest.hexdigest()[:_DIGEST_LENGTH])
        is_newest = number == len(asked.keys) - 1
        own_id = (question_id if is_newest else None) or message_id_of(question) or place.digest
        if with_preamble and number == 0:
            new += [
                _with_meta(each, {MESSAGE_ID_KEY: message_id_of(each) or f"{place.digest}:before:{index}"})
                for index, each in enumerate(asked.preamble())
            ]
        new.append(_with_meta(question, {MESSAGE_ID_KEY: own_id, TRANSCRIPT_KEY: ":".join(map(str, place))}))
        new += _answering(others, own_id)
        users += _users([question, *others])
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


def _key(question: ChatMessage) -> Any:
    """Return what a question says, in a form that JSON knows. It is equal if the contents are, and empty if blank."""
    content = question._content
    if len(content) == 1 and type(content[0]) is TextContent:  # as most are
        return str(content[0].text).strip()
    parts = [_part_key(part) for part in said_parts(question)]
    return parts[0] if len(parts) == 1 else parts


def _part_key(part: Any) -> Any:
    if isinstance(part, TextContent):
        return part.text.strip()
    fields = {name: value for name, value in part.to_dict().items() if name not in _INCIDENTAL_FIELDS}
    for name in _DATA_FIELDS & fields.keys():
        fields[name] = hashlib.sha256(str(fields[name]).encode("utf-8", "surrogatepass")).hexdigest()
    return [type(part).__name__, fields]


def _asked_key(message: ChatMessage) -> Any:
    """Return the key of a question, or something empty if the message is none."""
    return _key(message) if message._role is ChatRole.USER and question_id_of(message) is None else ""


def _checked_keys(messages: list[Any]) -> list[Any]:
    """Return the keys of all questions, whatever they have beside texts."""
    user = ChatRole.USER
    try:
        return [
            part.text.strip()
            if len(message._content) == 1
            and type(part := message._content[0]) is TextContent
            and QUESTION_ID_KEY not in message._meta
            else _asked_key(message)
            for message in messages
            if message._role is user
        ]
    except (AttributeError, TypeError):
        validated_messages(messages, "transcript")  # says which one is not a message
        raise


def _digest_of(keys: Sequence[Any]) -> "hashlib._Hash":
    """Begin the digest of a conversation."""
    return hashlib.sha256(_text_of(keys))


def _text_of(keys: Sequence[Any]) -> bytes:
    """
    Return what the digest of a conversation takes in for some of its questions, one after the other.

    Each ends with a NUL. What is no text, or has a character with a meaning here, stands there as JSON.
    """
    try:
        text = "".join(keys)
        are_plain = _END not in text and _JSON_FOLLOWS not in text
    except TypeError:
        are_plain = False
    texts = keys if are_plain else map(_text_or_json, keys)
    return "".join([_END.join(texts), _END if keys else ""]).encode("utf-8", "surrogatepass")


def _text_or_json(key: Any) -> str:
    is_plain = isinstance(key, str) and _END not in key and _JSON_FOLLOWS not in key
    return key if is_plain else _JSON_FOLLOWS + _json(key)


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=repr)


def _overlaps(asked: Sequence[Any], stored: Sequence[Any]) -> list[int]:
    """
    Return the lengths of all beginnings of one list that are the end of another, the longest first.

    The algorithm is that of Knuth, Morris and Pratt: `borders[n]` is the longest for the first `n` items alone.
    """
    items: list[Any] = [*asked, None, *stored]
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


def _answer(round_: Sequence[ChatMessage]) -> str:
    """Return what a client can have kept of an answer: its texts one after the other, without blank space."""
    texts = [text for each in round_ if each.role is ChatRole.ASSISTANT for text in each.texts]
    return "".join("".join(texts).split())
