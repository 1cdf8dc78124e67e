# SPDX-License-Identifier: Apache-2.0
"""Options of the interpreters that run programs of tests."""

import sys

#: Every warning is an error, but for one: Python 3.12.0 to 3.12.3 take `?1` in SQL for a name, and warn.
STRICTLY = ["-W", "error", *(["-W", "ignore:Binding"] if (3, 12) <= sys.version_info < (3, 12, 4) else [])]
