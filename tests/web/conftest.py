# SPDX-License-Identifier: Apache-2.0
"""The examples for the web need libraries of their own. Without these, their tests are not collected."""

from importlib.util import find_spec

import pytest
from apps import App, OpenAIServer

NEEDS = {
    "test_fastapi_chat.py": ["fastapi", "uvicorn"],
    "test_durable.py": ["hayhooks"],
    "test_hayhooks.py": ["hayhooks"],
    "test_web_chatbot.py": ["streamlit", "playwright"],
    "test_web_pages.py": ["fastapi", "uvicorn", "hayhooks"],
}
collect_ignore = [name for name, libraries in NEEDS.items() if not all(map(find_spec, libraries))]


@pytest.fixture
def model():
    """A server with OpenAI's interface. It answers word by word, and waits where a test wants it to."""
    with OpenAIServer() as server:
        yield server


@pytest.fixture
def start():
    """A function that starts an example as a server, which ends with the test."""
    running = []

    def start_app(*command, **settings):
        app = App(*command, **settings).__enter__()
        running.append(app)
        return app

    yield start_app
    for app in running:
        app.__exit__()
