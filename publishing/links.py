# SPDX-License-Identifier: Apache-2.0
"""
Replaces the links of a Markdown page: for the site, and for the package index, which has no other files.

    python publishing/links.py README.md https://github.com/owner/name v0.1.0
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path

# A link or an image: `](target)` or `](target#heading)`. Web addresses and links within the page are left alone.
_LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")
# A block of code. One with four backquotes may have one with three in it.
_FENCE = re.compile(r"(^ *````.*?^ *````$|^ *```.*?^ *```$)", re.MULTILINE | re.DOTALL)


def replaced(text: str, replace: Callable[[str], str]) -> str:
    """
    Return a page with other link targets. What stands in code blocks stays.

    :param text: The Markdown text.
    :param replace: Returns the new target for a relative one, without the heading after `#`.
    :returns: The text with the new targets.
    """
    parts = _FENCE.split(text)
    parts[::2] = [_LINK.sub(lambda link: f"]({replace(link[1])}{link[2] or ''})", part) for part in parts[::2]]
    return "".join(parts)


def relative(text: str) -> list[str]:
    """Return the relative link targets of a page."""
    return [target for part in _FENCE.split(text)[::2] for target, _ in _LINK.findall(part)]


def absolute(text: str, repository: str, version: str) -> str:
    """
    Return a page whose relative links lead to the files of a release in the repository.

    :param text: The Markdown text of a page in the repository's root folder.
    :param repository: The address of the repository, such as `https://github.com/owner/name`.
    :param version: The tag of the release.
    :returns: The text with absolute links.
    """
    root = repository.rstrip("/")
    return replaced(text, lambda target: f"{root}/{'raw' if _is_image(target) else 'blob'}/{version}/{target}")


def _is_image(target: str) -> bool:
    return target.lower().endswith((".png", ".svg", ".gif", ".jpg", ".webp"))


def main(page: str, repository: str, version: str) -> None:
    """Make the links of a page absolute, in its file."""
    path = Path(page)
    text = absolute(path.read_text(encoding="utf-8"), repository, version)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
