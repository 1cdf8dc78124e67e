# SPDX-License-Identifier: Apache-2.0
"""Conversions of times as engines store them: microseconds since 1970, in UTC."""

import time
from datetime import datetime, timedelta, timezone
from typing import Any

EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
MICROSECOND = timedelta(microseconds=1)


def microseconds_now() -> int:
    """Return the present time in microseconds since 1970."""
    return time.time_ns() // 1000


def datetime_of(microseconds: int) -> datetime:
    """Return microseconds since 1970 as an aware datetime in UTC."""
    return EPOCH + microseconds * MICROSECOND  # exact, and twice as fast as timedelta(microseconds=…)


def readable_time(microseconds: Any) -> datetime:
    """Return a stored time as an aware datetime, or the beginning of 1970 if the stored value is damaged."""
    try:
        readable: datetime = EPOCH + microseconds * MICROSECOND
    except (TypeError, OverflowError):
        return EPOCH
    return readable
