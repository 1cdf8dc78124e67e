# SPDX-License-Identifier: Apache-2.0
"""What differs between versions of Python and of Haystack."""

import sys
from importlib.metadata import version

#: Every warning is an error, but for one: Python 3.12.0 to 3.12.3 take `?1` in SQL for a name, and warn.
STRICTLY = ["-W", "error", *(["-W", "ignore:Binding"] if (3, 12) <= sys.version_info < (3, 12, 4) else [])]

_HAYSTACK = tuple(map(int, version("haystack-ai").split(".")[:2]))

#: Haystack's converters for OpenAI send refusals since 3.4. Before, a reply that is nothing else is an error.
SENDS_REFUSALS = _HAYSTACK >= (3, 4)

#: They read a content of several parts, such as an image, since 3.4. Before, they take the parts for a text.
READS_PARTS = _HAYSTACK >= (3, 4)
