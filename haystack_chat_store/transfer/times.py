# SPDX-License-Identifier: Apache-2.0
"""Parses times that other programs have written."""

import re
from datetime import datetime

_TIME = re.compile(r"(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d:\d\d)(?:\.(\d{1,6}))?(Z|[+-]\d\d:\d\d)?", re.ASCII)


def parsed_time(text: str) -> datetime:
    """
    Parse a time such as `2026-01-31T08:30:00.5Z`. Without a time zone, the result is naive.

    `datetime.fromisoformat` accepts different formats in each version of Python. This function accepts one.

    :raises ValueError: If the text is not a time.
    :raises TypeError: If the value is not text.
    """
    found = _TIME.fullmatch(text)
    if found is None:
        raise ValueError("The text is not a time in ISO 8601 format.")
    day, clock, fraction, zone = found.groups("")
    return datetime.fromisoformat(f"{day}T{clock}.{fraction:0<6}{zone.replace('Z', '+00:00')}")
