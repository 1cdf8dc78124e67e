# SPDX-License-Identifier: Apache-2.0
"""Which names may be of the same model."""

import re
from typing import Any

# A version at the end of a model's name: a date, a number of three digits or more, or "latest".
# Shorter numbers are parts of the name: Claude Opus 4.1 is `claude-opus-4-1`.
_VERSION = re.compile(r"[-@:](?:latest|\d{3,8}|\d{4}-\d{2}-\d{2}|\d{2}-\d{4})\Z")


def is_same_model(one: Any, other: Any) -> bool:
    """
    Whether two names may be the same model: providers name the version in their replies.

    A name that goes on otherwise, such as `gpt-4o-mini` after `gpt-4o`, is another model. To take two models for one
    can make a provider refuse the request; to take one for two cannot.
    """
    if not (isinstance(one, str) and isinstance(other, str)):
        return True  # one of them is not known
    (name, version), (other_name, other_version) = _name_and_version(one), _name_and_version(other)
    return name == other_name and (not version or not other_version or version == other_version)


def _name_and_version(model: str) -> tuple[str, str]:
    """Split the name of a model into what comes before its version, and the digits of the version, if it has one."""
    name = model.strip().lower()
    found = _VERSION.search(name)
    return (name, "") if found is None else (name[: found.start()], re.sub(r"\D", "", found[0]))
