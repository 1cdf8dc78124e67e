# SPDX-License-Identifier: Apache-2.0
"""What the tests of providers share. Those of integrations that are not installed are skipped."""

from pathlib import Path

import pytest
from histories import PROVIDERS, is_installed


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent != Path(__file__).parent:
            continue
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        values = [value for value in values if isinstance(value, str)]
        needed = {*values, *(name for mark in item.iter_markers("provider") for name in mark.args)}
        missing = [name for name in PROVIDERS if name in needed and not is_installed(name)]
        if missing:
            item.add_marker(pytest.mark.skip(reason=f"the integration of {' and '.join(missing)} is not installed"))


def pytest_configure(config):
    config.addinivalue_line("markers", "provider(*names): needs the integrations of these providers")
    # Haystack's own generators change chunks of streams.
    config.addinivalue_line("filterwarnings", "ignore:Mutating attribute")
