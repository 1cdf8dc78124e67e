# SPDX-License-Identifier: Apache-2.0
"""
Writes the pages of the site into a folder, from which `nox -s site` builds it.

    python publishing/pages.py build/pages

The README is the home page. A file or folder outside docs/ to which a page links, such as an example, becomes a page
that shows it. So the site needs no address of a repository, and its links lead to the files of the same version.
"""

import posixpath
import shutil
import sys
from functools import partial
from pathlib import Path

import links

ROOT = Path(__file__).parent.parent
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml"}


def write_pages(folder: Path) -> None:
    """
    Write all pages, and what they show.

    :param folder: Where the pages are written. What was there is deleted.
    """
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "docs", folder)
    paths = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md"]
    paths += [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))]
    done: set[str] = set()
    while paths:
        path = paths.pop()
        if path in done:
            continue
        done.add(path)
        target = folder / _place(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.endswith(".md"):
            text = (ROOT / path).read_text(encoding="utf-8")
            linked = [_path(path, target) for target in links.relative(text)]
            paths += [one for one in linked if not one.startswith("docs/") or one.endswith(".md")]
            target.write_text(links.replaced(text, partial(_link, path)), encoding="utf-8")
        else:
            target.write_text(_shown(path), encoding="utf-8")


def _path(page: str, target: str) -> str:
    """Return the path, in the repository, of what a link on a page leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), target))


def _link(page: str, target: str) -> str:
    """Return the link of the site in the place of one of the repository."""
    return posixpath.relpath(_place(_path(page, target)), posixpath.dirname(_place(page)) or ".")


def _place(path: str) -> str:
    """Return where the site has a file of the repository."""
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/"):
        return path[len("docs/") :]
    return f"files/{path}" if path.endswith(".md") else f"files/{path}.md"


def _shown(path: str) -> str:
    """Return the page that shows a file, or the files of a folder."""
    place = ROOT / path
    files = [place] if place.is_file() else sorted(file for file in place.rglob("*") if file.suffix in LANGUAGES)
    return f"# {path}\n" + "".join(f"\n{_block(file, '' if file == place else file.name)}" for file in files)


def _block(file: Path, heading: str) -> str:
    text = f"````{LANGUAGES.get(file.suffix, 'text')}\n{file.read_text(encoding='utf-8')}````\n"
    return f"## {heading}\n\n{text}" if heading else text


if __name__ == "__main__":
    write_pages(Path(sys.argv[1]))
