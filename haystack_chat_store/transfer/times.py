# SPDX-License-Identifier: Apache-2.0
"""
Times that other programs have written.
"""

import re
from datetime import datetime

_TIME = re.compile(r"(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d:\d\d)(?:\.(\d{1,6}))?(Z|[+-]\d\d:\d\d)?", re.ASCII)


def parsed_time(text: str) -> datetime:
    """
    Return a time such as `2026-01-31T08:30:00.5Z`. Without a zone, it is naive.

    What `datetime.fromisoformat` takes for a time is another thing in each version of Python.

    :raises ValueError: If it is none.
    :raises TypeError: If it is no text.
    """
    found = _TIME.fullmatch(text)
    if found is None:
        raise ValueError("It is not a time.")
    day, clock, fraction, zone = found.groups("")
    return datetime.fromisoformat(f"{day}T{clock}.{fraction:0<6}{zone.replace('Z', '+00:00')}")
