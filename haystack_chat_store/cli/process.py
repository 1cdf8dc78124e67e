# SPDX-License-Identifier: Apache-2.0
"""
What the process of a command gets from its caller and gives back. This module imports nothing.

| status | means |
|---|---|
| 0 | done |
| 1 | it failed, or the doctor found faults that are not repaired |
| 2 | wrong use |
| 130 | interrupted with Ctrl-C |
| 141 | the reader of the output, such as `head`, has ended, as a shell says it of other programs |
"""

DONE, FAILED, WRONG_USE, INTERRUPTED, READER_GONE = 0, 1, 2, 130, 141

#: A shell sets this variable to request completions.
COMPLETION_VARIABLE = "_HAYSTACK_CHAT_STORE_COMPLETE"
