# SPDX-License-Identifier: Apache-2.0
import os
import signal

# Before anything imports Haystack: tests send nothing anywhere.
os.environ.setdefault("HAYSTACK_TELEMETRY_ENABLED", "False")

# What a shell runs in the background ignores Ctrl-C, and so do its children. Some tests press it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
