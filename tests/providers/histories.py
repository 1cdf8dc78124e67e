# SPDX-License-Identifier: Apache-2.0
"""Conversations of any number of rounds, deterministic from a seed, made of what each provider's generator receives."""

import base64
import random
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from itertools import count

from haystack.dataclasses import ChatMessage, FileContent, ImageContent, TextContent, ToolCall
from receiving import RECEIVE
from replies import Call, Reply
from versions import SENDS_REFUSALS

from haystack_chat_store.ids import MESSAGE_ID_KEY, QUESTION_ID_KEY

#: The module of each provider's integration; the first two are part of Haystack.
MODULES = {
    "openai": "haystack",
    "responses": "haystack",
    "anthropic": "haystack_integrations.components.generators.anthropic",
    "gemini": "haystack_integrations.components.generators.google_genai",
    "bedrock": "haystack_integrations.components.generators.amazon_bedrock",
    "mistral": "haystack_integrations.components.generators.mistral",
    "cohere": "haystack_integrations.components.generators.cohere",
    "ollama": "haystack_integrations.components.generators.ollama",
    "openrouter": "haystack_integrations.components.generators.openrouter",
}
PROVIDERS = list(MODULES)

THINKING = {"responses", "anthropic", "gemini", "bedrock", "mistral", "ollama", "openrouter"}
#: The types of images and files that a user's message has, as far as the converter of the provider takes them.
IMAGES = {
    "openai": ("image/png", "image/gif", "image/jpg", "image/bmp", None),
    "responses": ("image/png", "image/gif", "image/webp", None),
    "anthropic": ("image/png", "image/gif", "image/webp"),
    "gemini": ("image/png", "image/jpg", "image/heic"),
    "bedrock": ("image/png", "image/gif", "image/jpg"),
    "mistral": ("image/png", "image/gif", None),
    "cohere": ("image/png", "image/gif", "image/webp"),
    "ollama": ("image/png", "image/bmp", None),
    "openrouter": ("image/png", "image/gif", None),
}
_DOCX = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"
_PDF, _TEXT, _AUDIO = "application/pdf", "text/plain", "audio/mpeg"
FILES = {
    "openai": (_PDF, _TEXT, _DOCX, _AUDIO, None),
    "responses": (_PDF, _TEXT, _DOCX, "text/csv", None),
    "anthropic": (_PDF,),
    "gemini": (_PDF, _TEXT, _AUDIO, "video/mp4"),
    "bedrock": (_PDF, _TEXT, _DOCX, "video/mp4"),
    "openrouter": (_PDF, _TEXT, _AUDIO),
}
LISTS_AS_RESULTS = {"openai", "responses", "anthropic", "gemini", "bedrock", "mistral", "openrouter"}
IMAGES_AS_RESULTS = {"responses", "anthropic", "gemini", "bedrock"}
CITATIONS = {"anthropic", "cohere", "bedrock"}
REFUSALS = {"openai", "responses", "anthropic", "gemini", "bedrock", "openrouter"}

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="
BINARY = base64.b64encode(b"PK\x03\x04\xff nothing").decode()
PDF = base64.b64encode(b"%PDF-1.4 nothing").decode()


@cache
def is_installed(provider: str) -> bool:
    try:
        is_found = find_spec(MODULES[provider]) is not None
    except ModuleNotFoundError:
        return False
    return is_found and (SENDS_REFUSALS or MODULES[provider] != "haystack")


def installed() -> list[str]:
    return [provider for provider in PROVIDERS if is_installed(provider)]


def model_of(provider: str, thinking: bool, other: bool = False) -> str:
    """Return the name of one of two models of a provider."""
    if provider == "gemini":  # whether it signs its calls is a matter of the model
        return ("gemini-3-pro", "gemini-3-flash")[other] if thinking else ("gemini-2.0-flash", "gemini-2.5-lite")[other]
    return f"{provider}-model-{'ab'[other]}"


@dataclass
class Speaker:
    """A model of a provider that answers, in an agent that stores its messages with ids or in a pipeline without."""

    provider: str
    thinking: bool
    model: str
    has_ids: bool = True
    is_agent: bool = False


def speaker(rng: random.Random, provider: str, other_model: bool = False) -> Speaker:
    thinking = provider in THINKING and rng.random() < 0.6
    return Speaker(
        provider,
        thinking,
        model_of(provider, thinking, other_model),
        has_ids=rng.random() < 0.5,
        is_agent=rng.random() < 0.5,
    )


class Talk:
    """Makes the rounds of one conversation. Every number, key and text in it is unique."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._numbers = count(1)
        self._keys = count(1)

    def rounds(self, by: Speaker, number: int) -> list[list[ChatMessage]]:
        return [self.round(by) for _ in range(number)]

    def question(self, by: Speaker) -> ChatMessage:
        rng, number = self._rng, next(self._numbers)
        text = f"Question {number}: what is new?"
        meta = {MESSAGE_ID_KEY: f"m{number}"} if by.is_agent else {}
        extra = rng.random()
        if extra < 0.4:
            text, *media = parts = self._parts(by, text)
            return ChatMessage.from_user(content_parts=parts if media else [text], meta=meta)
        return ChatMessage.from_user(text, meta=meta)

    def _parts(self, by: Speaker, text: str) -> list[str | ImageContent | FileContent]:
        """Return a question with images and files, before, behind and between its texts."""
        rng = self._rng
        media = [self._image(by), self._image(by)] if rng.random() < 0.5 else []
        media += [self._file(by)] * rng.choice((1, 1, 2)) if by.provider in FILES and rng.random() < 0.7 else []
        media = rng.sample(media, min(len(media), 2))
        kind = rng.random()
        if kind < 0.15 and by.provider != "ollama":  # which takes one text
            return [text, *media, "That is all."]
        return [*media, text] if kind < 0.3 and media else [text, *media]

    def _image(self, by: Speaker) -> ImageContent:
        mime_type = self._rng.choice(IMAGES[by.provider])
        return ImageContent(base64_image=PIXEL, mime_type=mime_type, detail="auto", validation=False)

    def _file(self, by: Speaker) -> FileContent:
        rng, number = self._rng, next(self._numbers)
        mime_type = rng.choice(FILES[by.provider])
        data = {_PDF: PDF, _TEXT: base64.b64encode(f"Text of file {number}.".encode()).decode()}.get(mime_type, BINARY)
        name = rng.choice((None, "report.pdf", f"file {number}.x"))
        return FileContent(data, mime_type=mime_type, filename=name, validation=False)

    def round(self, by: Speaker) -> list[ChatMessage]:
        """Return a question, the steps of the model and its answer."""
        rng = self._rng
        messages = [self.question(by)]
        for _ in range(rng.choice((0, 0, 1, 1, 2))):
            messages += self.step(by)
        messages += self.answer(by)
        return self._named(messages, by)

    def step(self, by: Speaker, calls: int | None = None) -> list[ChatMessage]:
        """Return an assistant message with calls, and their results."""
        rng = self._rng
        calls = calls or rng.choice((1, 1, 2, 3))
        same_tool = rng.random() < 0.7
        asked = tuple(Call("look_up" if same_tool else f"tool_{i}", f"k{next(self._keys)}") for i in range(calls))
        number = next(self._numbers)
        reply = Reply(
            number,
            text=f"Step {number}: let me look." if rng.random() < 0.4 else "",
            thinking=self._thought(by, number),
            calls=asked,
            ends="tool_calls",
            searches=by.provider == "anthropic" and rng.random() < 0.3,
            streamed=rng.random() < 0.5,
            has_ids=by.has_ids,
        )
        message = RECEIVE[by.provider](reply, by.model)
        return [message, *(self._result(by, call) for call in message.tool_calls)]

    def answer(self, by: Speaker) -> list[ChatMessage]:
        """Return the last messages of a round: an answer of any kind."""
        rng = self._rng
        number = next(self._numbers)
        reply = Reply(
            number,
            text=f"Answer {number}: it is so.",
            thinking=self._thought(by, number),
            searches=by.provider == "anthropic" and rng.random() < 0.25,
            cites=by.provider in CITATIONS and rng.random() < 0.3,
            streamed=rng.random() < 0.5,
            has_ids=by.has_ids,
        )
        kind = rng.random()
        if kind < 0.07:
            reply = replace(reply, ends="length", text=reply.text[:-3] if rng.random() < 0.6 else "")
        elif kind < 0.12:
            reply = replace(reply, ends="content_filter", text=reply.text[:-3] if rng.random() < 0.6 else "")
        elif kind < 0.2 and by.provider in REFUSALS:
            reply = replace(reply, ends="refusal", text=f"Refusal {number}: I cannot help.", searches=False)
        elif kind < 0.27 and by.provider == "anthropic":
            # A paused reply is sent back as it is, and the model goes on.
            paused = RECEIVE[by.provider](replace(reply, ends="pause", searches=True), by.model)
            number = next(self._numbers)
            resumed = replace(reply, number=number, text=f"Answer {number}: it is so.", searches=False, continues=True)
            resumed = replace(resumed, thinking=self._thought(by, number))
            return [paused, RECEIVE[by.provider](resumed, by.model)]
        return [RECEIVE[by.provider](reply, by.model)]

    def _thought(self, by: Speaker, number: int) -> str:
        if not by.thinking:
            return ""
        return f"Thought {number}: " + "I think about it. " * self._rng.choice((1, 1, 1, 60))

    def _result(self, by: Speaker, call: ToolCall) -> ChatMessage:
        value = Call(call.tool_name, call.arguments["key"]).value
        kind = self._rng.random()
        if kind < 0.1:
            return ChatMessage.from_tool('{"result": "' + value + '"}', origin=call)
        if kind < 0.17 and by.provider in LISTS_AS_RESULTS:
            return ChatMessage.from_tool([TextContent(value)], origin=call)
        if kind < 0.22 and by.provider in IMAGES_AS_RESULTS:
            image = ImageContent(base64_image=PIXEL, mime_type="image/png", validation=False)
            file = FileContent(PDF, mime_type=_PDF, filename=f"{call.id}.pdf", validation=False)
            return ChatMessage.from_tool([TextContent(value), self._rng.choice((image, file))], origin=call)
        return ChatMessage.from_tool(value, origin=call, error=kind > 0.95)

    def _named(self, messages: list[ChatMessage], by: Speaker) -> list[ChatMessage]:
        """Return the messages as the hooks of an agent store them, each with its id and that of its question."""
        if not by.is_agent:
            return messages
        question = messages[0].meta[MESSAGE_ID_KEY]
        for index, message in enumerate(messages[1:], 1):
            message.meta[MESSAGE_ID_KEY] = f"{question}.{index}"
            message.meta[QUESTION_ID_KEY] = question
        return messages
