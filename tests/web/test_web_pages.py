# SPDX-License-Identifier: Apache-2.0
"""The pages about web apps: what they show is sent to a running example, and the answer is what they show below."""

import re
import subprocess
import sys

import pytest
import test_durable
import test_fastapi_chat
import test_hayhooks
from servers import HOST
from test_documentation import ROOT, blocks


@pytest.fixture
def servers(redis_server):
    """The servers of each page, by the address that the page gives them."""
    durable = test_durable.COMMAND, test_durable.settings_of(redis_server)
    return {
        "web_apps.md": {"localhost:8000": (test_fastapi_chat.COMMAND, {})},
        "hayhooks.md": {
            "localhost:1416": (test_hayhooks.COMMAND, test_hayhooks.SETTINGS),
            "localhost:1417": durable,
        },
    }


@pytest.mark.parametrize("page", ["web_apps.md", "hayhooks.md"])
def test_the_examples_of_a_page_run_against_its_servers(page, servers, start):
    printed = None
    running = {address: start(*command, **settings) for address, (command, settings) in servers[page].items()}
    for language, _, block in blocks((ROOT / "docs" / page).read_text(encoding="utf-8")):
        code = block
        for address, app in running.items():
            code = code.replace(address, f"{HOST}:{app.port}")
        if language == "python":
            printed = output_of([sys.executable, "-c", code])
        elif language == "bash" and "curl" in code:
            printed = output_of(["bash", "-c", code])
        elif language == "output":
            lines = ["(.*\n)*" if line == "..." else re.escape(f"{line}\n") for line in block.split("\n")]
            assert re.fullmatch("".join(lines), f"{printed.rstrip()}\n"), f"The page shows:\n{block}\nIt is:\n{printed}"
            printed = None
    assert printed is None, "Each example has its output below it."


def output_of(command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
