# SPDX-License-Identifier: Apache-2.0
"""The pages of the site and of the package index: their links lead somewhere, and what they list is complete."""

import re
from importlib.metadata import requires
from pathlib import Path

import links
import pages
import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site") / "pages"
    pages.write_pages(folder)
    return folder


def test_every_link_of_the_site_leads_to_a_page_of_it(site):
    for page in site.rglob("*.md"):
        for target in links.relative(page.read_text(encoding="utf-8")):
            assert (page.parent / target).is_file(), f"{page.relative_to(site)} links to {target}"


def test_the_navigation_has_every_page_of_the_docs(site):
    named = set(re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE))
    assert {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")} <= named
    assert all((site / name).is_file() for name in named)


def test_an_example_is_a_page_that_shows_it(site):
    page = (site / "files/examples/rag_pipeline.yaml.md").read_text(encoding="utf-8")
    assert (ROOT / "examples/rag_pipeline.yaml").read_text(encoding="utf-8") in page
    assert "(files/examples/rag_pipeline.yaml.md)" in (site / "rag.md").read_text(encoding="utf-8")


def test_a_folder_is_a_page_that_shows_its_files():
    page = pages._shown("publishing")
    assert page.startswith("# publishing\n\n## links.py\n\n````python\n# SPDX")
    assert "## pages.py" in page


def test_the_readme_of_the_package_index_has_no_relative_link():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    text = links.absolute(readme, "https://example.org/repository/", "v1.0")
    assert links.relative(readme)
    assert links.relative(text) == []
    assert "(https://example.org/repository/blob/v1.0/docs/agents.md)" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[a](docs/a.md#b)", "[a](https://x/blob/v1/docs/a.md#b)"),
        ("![a](docs/images/a.png)", "![a](https://x/raw/v1/docs/images/a.png)"),
        ("[a](https://y/z.md) [b](#c)", "[a](https://y/z.md) [b](#c)"),
        ("```text\n[a](b.md)\n```", "```text\n[a](b.md)\n```"),
    ],
)
def test_only_relative_links_outside_of_code_become_absolute(text, expected):
    assert links.absolute(text, "https://x", "v1") == expected


def test_every_dependency_is_listed_with_its_license():
    page = (ROOT / "docs/dependencies.md").read_text(encoding="utf-8")
    needed = {re.match(r"[\w-]+", requirement)[0] for requirement in requires("haystack-chat-store")}
    assert set(re.findall(r"^\| ([\w-]+) \| [\w.-]+ \|", page, re.MULTILINE)) - {"package"} == needed


def test_the_readme_is_one_page():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
