# SPDX-License-Identifier: Apache-2.0
"""
Every Python example in the documentation runs: those of a page together, in order, in a process of their own.
"""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# A fenced block; a name behind the language is the file that the reader is told to save it as.
FENCE = re.compile(r"^ *```(\w+) *(\S*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def blocks(text):
    for language, name, block in FENCE.findall(text):
        margin = min(len(line) - len(line.lstrip()) for line in block.splitlines() if line.strip())
        yield language, name, "\n".join(line[margin:] for line in block.splitlines())


def docstrings(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""


def sources_with_examples():
    for folder in ("haystack_chat_store", "components"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if "```python" in path.read_text(encoding="utf-8"):
                yield path


def run(code, folder):
    environment = {**os.environ, "HAYSTACK_TELEMETRY_ENABLED": "False", "PYTHONPATH": str(ROOT / "examples")}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_examples_of_a_page_run(page, tmp_path):
    code = []
    for language, name, block in blocks(page.read_text(encoding="utf-8")):
        if name:
            (tmp_path / name).write_text(block, encoding="utf-8")
        elif language == "python":
            code.append(block)

    run("\n".join(code), tmp_path)


@pytest.mark.parametrize("source", list(sources_with_examples()), ids=lambda source: str(source.relative_to(ROOT)))
def test_the_examples_in_docstrings_run(source, tmp_path):
    for docstring in docstrings(source):
        for language, _, block in blocks(docstring):
            if language == "python":
                run(block, tmp_path)


def test_links_between_pages_lead_somewhere():
    for page in (*PAGES, ROOT / "ARCHITECTURE.md", ROOT / "CHANGELOG.md"):
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
