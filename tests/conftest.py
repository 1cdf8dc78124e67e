# SPDX-License-Identifier: Apache-2.0
import os

# Before anything imports Haystack: tests send nothing anywhere.
os.environ.setdefault("HAYSTACK_TELEMETRY_ENABLED", "False")
