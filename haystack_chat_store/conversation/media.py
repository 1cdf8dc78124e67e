# SPDX-License-Identifier: Apache-2.0
"""
Images and files in a form that every provider takes.

Read in the generators' conversion functions, in the versions that `provider_content` names. Anthropic's takes PDFs and
no other files, Bedrock's no audio, Gemini's no GIF. Several refuse an image or file without a type, and Ollama's more
than one text in a message. OpenAI's, Mistral's and OpenRouter's take all files; Cohere's and Ollama's leave files out.
"""

import base64
import re
from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import Any

from haystack.dataclasses import FileContent, ImageContent, TextContent

from haystack_chat_store.conversation.copies import changed

#: The longest text of a file that is shown, in characters. A longer one is not shown in part.
MAX_FILE_TEXT = 10_000

_FILE_TYPE = "application/pdf"
_IMAGE_TYPES = frozenset({"image/jpeg", "image/png", "image/webp"})
_OTHER_NAMES_OF_TYPES = {"image/jpg": "image/jpeg"}
_NO_TEXT_TYPES = re.compile(r"(audio|font|image|video)/|application/pdf\Z")
# Control characters other than tabs and ends of lines. No text has them.
_NO_TEXT = re.compile("[\x00-\x08\x0e-\x1f\x7f]")
_MAX_BYTES_OF_CHARACTER = 4
# Bedrock takes names of up to 200 characters. It leaves out all but letters and digits of ASCII, blanks, and `-()[]`.
_MAX_NAME_LENGTH = 150


def is_media(part: Any) -> bool:
    """Whether a part of a message is an image or a file."""
    return isinstance(part, (ImageContent, FileContent))


def portable_question(content: Sequence[Any], mark: Callable[[int], str]) -> list[Any]:
    """
    Return the parts of a user's message in a form that every provider takes.

    JPEG, PNG and WebP images and PDFs stay images and files. All others become text. A text names each PDF, too:
    Cohere's and Ollama's converters leave files out, and fail if nothing else is left.

    :param content: The parts. None is changed.
    :param mark: Returns a text for the number of a file that no other file of the conversation has. Bedrock refuses two
        files of one name.
    """
    shown: list[Any] = []
    number = 0
    for part in content:
        if isinstance(part, FileContent):
            shown += _portable_file(part, mark(number))
            number += 1
        else:
            shown.append(_portable_image(part) if isinstance(part, ImageContent) else part)
    return _with_one_text(with_joined_texts(shown))


def as_text(part: Any) -> Any:
    """Return text that stands for an image or file: what it is and, of a file that is a short text, the text."""
    if not is_media(part):
        return part
    description = _description(part)
    text = _text_of(part) if isinstance(part, FileContent) else ""
    return TextContent(f"{description}\n{text}\n[end of the file]" if text else description)


def with_joined_texts(content: Sequence[Any]) -> list[Any]:
    """Join texts that follow each other. Some providers take only one."""
    joined: list[Any] = []
    for part in content:
        if joined and isinstance(part, TextContent) and isinstance(joined[-1], TextContent):
            joined[-1] = TextContent(f"{joined[-1].text}\n\n{part.text}")
        else:
            joined.append(part)
    return joined


def _with_one_text(content: list[Any]) -> list[Any]:
    """Put texts that stand before and after images or files together, with descriptions where the others stood."""
    texts = [place for place, part in enumerate(content) if isinstance(part, TextContent)]
    if len(texts) < 2:
        return content
    before = content[: texts[-1] + 1]
    said = [
        part.text if isinstance(part, TextContent) else _description(part)
        for part in before
        if not isinstance(part, FileContent)  # which a text names already
    ]
    media = [part for part in before if not isinstance(part, TextContent)]
    return [TextContent("\n\n".join(said)), *media, *content[texts[-1] + 1 :]]


def _portable_image(image: ImageContent) -> Any:
    mime_type = _OTHER_NAMES_OF_TYPES.get(image.mime_type or "", image.mime_type)
    if mime_type not in _IMAGE_TYPES or not _is_whole(image.base64_image):
        return as_text(image)
    return image if mime_type == image.mime_type else changed(image, mime_type=mime_type)


def _portable_file(file: FileContent, mark: str) -> list[Any]:
    if file.mime_type != _FILE_TYPE or not _is_whole(file.base64_data):
        return [as_text(file)]
    name = PurePath(_name_of(file)).stem
    # The other fields are for one provider, such as whether the file is to be cited.
    portable = changed(file, filename=f"{name} [{mark}].pdf".strip(), extra={})
    return [TextContent(_description(file)), portable]


def _is_whole(data: str) -> bool:
    """Whether this is base64 text of something. Two converters decode it."""
    try:
        return bool(base64.b64decode(data, validate=True))
    except (ValueError, TypeError):
        return False


def _text_of(file: FileContent) -> str:
    """Return the text of a file that is a text, and not too long. Otherwise nothing."""
    if (
        _NO_TEXT_TYPES.match(file.mime_type or "")
        or _size_of(file.base64_data) > MAX_FILE_TEXT * _MAX_BYTES_OF_CHARACTER
    ):
        return ""
    try:
        text = base64.b64decode(file.base64_data, validate=True).decode("utf-8-sig")
    except (ValueError, TypeError):
        return ""
    return "" if len(text) > MAX_FILE_TEXT or _NO_TEXT.search(text) else text.strip()


def _description(part: ImageContent | FileContent) -> str:
    """Return in a line what an image or file is: its name, its type and its size."""
    is_file = isinstance(part, FileContent)
    size = _size_of(part.base64_data if isinstance(part, FileContent) else part.base64_image)
    described = [_name_of(part) if isinstance(part, FileContent) else "", _one_line(part.mime_type or "unknown type")]
    return f"[{'file' if is_file else 'image'}: {', '.join(filter(None, described))}, {size} bytes]"


def _name_of(file: FileContent) -> str:
    return _one_line(file.filename or "")


def _one_line(text: str) -> str:
    """Return the beginning of a text without ends of lines and brackets, which would end a description."""
    return " ".join(re.sub(r"[\[\]]", " ", text).split())[-_MAX_NAME_LENGTH:]


def _size_of(data: str) -> int:
    """Return the number of bytes that are in a base64 text."""
    return len(data) * 3 // 4 - data[-2:].count("=")
