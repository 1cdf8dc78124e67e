# SPDX-License-Identifier: Apache-2.0
"""What the tests of providers share. Those of integrations that are not installed are left out."""

import pytest
from histories import PROVIDERS, is_installed


def pytest_itemcollected(item):
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    values = [value for value in values if isinstance(value, str)]
    needed = {*values, *(name for mark in item.iter_markers("provider") for name in mark.args)}
    if any(name in needed and not is_installed(name) for name in PROVIDERS):
        item.add_marker(pytest.mark.left_to("nox -s providers"))


def pytest_configure(config):
    config.addinivalue_line("markers", "provider(*names): needs the integrations of these providers")
    # Haystack's own generators change chunks of streams.
    config.addinivalue_line("filterwarnings", "ignore:Mutating attribute")
