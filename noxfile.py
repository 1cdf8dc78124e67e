# SPDX-License-Identifier: Apache-2.0
"""All commands of the project: `nox -l` lists them, `nox -s NAME` runs one."""

import os
import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv|virtualenv"  # uv takes seconds where pip takes a minute
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "types", "tests"]

# Tests start hundreds of processes. Without bytecode files, each of them would compile every module that it imports.
ENVIRONMENT = {"HAYSTACK_TELEMETRY_ENABLED": "False", "PYTHONDONTWRITEBYTECODE": None}
PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]
PYTHON_OF_COVERAGE = "3.11"


def install(session: nox.Session, *groups: str) -> None:
    session.install(
        "-e", ".[postgres,redis,cli,testing]", *(argument for group in groups for argument in ("--group", group))
    )


# A test waits for more than half of its time: for a server, a process or a lock.
ON_ALL_CORES = [f"--numprocesses={5 * (os.cpu_count() or 1) // 2}", "--dist=worksteal"]
COVERAGE = ["--cov", "--cov-report=term", "--cov-fail-under=95"]
# Interrupting the coverage tracer deadlocks it.
INTERRUPTIONS = "tests/test_interruptions.py"


@nox.session
def tests(session: nox.Session) -> None:
    """Run each test once, where it can fail: every rule, fault, crash and command. Starts the servers that it needs."""
    install(session, "test")
    session.run("pytest", *ON_ALL_CORES, *session.posargs, env=ENVIRONMENT)


@nox.session(python=PYTHONS)
def full(session: nox.Session) -> None:
    """Run all variants, with many examples, on each supported Python. On one of them, coverage must be 95 %."""
    install(session, "test")
    if session.python == PYTHON_OF_COVERAGE and not session.posargs:
        session.run("pytest", *ON_ALL_CORES, "--full", *COVERAGE, f"--ignore={INTERRUPTIONS}", env=ENVIRONMENT)
        session.run("pytest", "--full", INTERRUPTIONS, env=ENVIRONMENT)
        session.notify("web")
        session.notify("browser")
    else:
        session.run("pytest", *ON_ALL_CORES, "--full", *session.posargs, env=ENVIRONMENT)


@nox.session(python="3.10", reuse_venv=False)  # an old environment would keep newer versions
def lowest(session: nox.Session) -> None:
    """Run the tests with the lowest dependencies that pyproject.toml allows."""
    session.install("uv")
    everything = ["-e", ".[postgres,redis,cli,testing]", "--group", "test"]
    session.run("uv", "pip", "install", "--resolution=lowest-direct", *everything)
    session.run("pytest", *ON_ALL_CORES, *session.posargs, env=ENVIRONMENT)


@nox.session
def powerloss(session: nox.Session) -> None:
    """Cut the power, at every system call and below the file system. Needs `strace`, `fuse3`, `e2fsprogs` and root."""
    install(session, "powerloss")
    session.run("pytest", "tests/power_loss", "--full", "-rs", *session.posargs, env=ENVIRONMENT)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting."""
    session.install("--group", "lint")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session(name="format")
def format_code(session: nox.Session) -> None:
    """Format all code, and fix what ruff can fix."""
    session.install("--group", "lint")
    session.run("ruff", "check", "--fix", ".")
    session.run("ruff", "format", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Check types in mypy's strict mode."""
    install(session, "types")
    session.run("mypy")


@nox.session
def providers(session: nox.Session) -> None:
    """Check that no provider would refuse what it is shown, by the converters of Haystack's generators."""
    install(session, "providers")
    session.run("pytest", "tests/providers", "--full", *ON_ALL_CORES, *session.posargs, env=ENVIRONMENT)


@nox.session
def docs(session: nox.Session) -> None:
    """Run every example in the README and in docstrings."""
    install(session, "test")
    session.run("pytest", "tests/test_documentation.py", *session.posargs, env=ENVIRONMENT)


@nox.session
def examples(session: nox.Session) -> None:
    """Run the example chatbots."""
    install(session, "test")
    session.run(
        "pytest", "tests/test_examples.py", "tests/agents/test_agent_examples.py", *session.posargs, env=ENVIRONMENT
    )


@nox.session
def web(session: nox.Session) -> None:
    """Run the examples for the web: as servers, driven by real clients, with several workers, killed and restarted."""
    install(session, "web")
    session.run("pytest", "tests/web", *ON_ALL_CORES, *session.posargs, env=ENVIRONMENT)


@nox.session
def browser(session: nox.Session) -> None:
    """Use the chatbot for the browser in a real one: headless Chromium, the system's or else the one of Playwright."""
    install(session, "browser")
    if shutil.which("chromium") is None:
        session.run("playwright", "install", "chromium-headless-shell")
    session.run("pytest", "tests/web/test_web_chatbot.py", *session.posargs, env=ENVIRONMENT)


@nox.session
def demo(session: nox.Session) -> None:
    """Chat with the example chatbot in the terminal."""
    session.install("-e", ".")
    session.run("python", "examples/terminal_chatbot.py", *session.posargs, env=ENVIRONMENT)


@nox.session
def benchmarks(session: nox.Session) -> None:
    """Measure the stores against the least that their engines allow."""
    install(session, "test")
    session.run("python", "benchmarks/run.py", *session.posargs, env=ENVIRONMENT)


@nox.session
def large(session: nox.Session) -> None:
    """Measure the management of conversations in a database of 5,000,000 messages. Takes almost an hour."""
    install(session, "test")
    session.run("python", "benchmarks/management.py", *session.posargs, env=ENVIRONMENT)


@nox.session
def torture(session: nox.Session) -> None:
    """Write from many processes while they are killed and servers restart; then look for what is lost or doubled."""
    install(session, "test")
    session.run("python", "tests/torture.py", *session.posargs, env=ENVIRONMENT)


@nox.session
def site(session: nox.Session) -> None:
    """Build the site with all pages and the API reference into build/site. A broken link is an error."""
    install(session, "docs")
    session.run("python", "publishing/pages.py", "build/pages")
    session.run("mkdocs", "build", "--strict", env={"NO_MKDOCS_2_WARNING": "1"})


def build_distributions(session: nox.Session, folder: str, repository: str, version: str) -> None:
    """Build sdist and wheel from the files that git knows. The links of their README lead to the repository."""
    session.install("--group", "release")
    source = Path(session.create_tmp()) / "source"
    shutil.rmtree(source, ignore_errors=True)
    tracked = session.run("git", "ls-files", "-z", external=True, silent=True, log=False) or ""
    for name in filter(None, tracked.split("\0")):
        if Path(name).exists():  # a file that was deleted is still known to git
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(name, source / name)
    session.run("python", "publishing/links.py", str(source / "README.md"), repository, version)
    shutil.rmtree(folder, ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", folder, str(source))
    session.run("twine", "check", "--strict", *map(str, sorted(Path(folder).iterdir())))


@nox.session
def package(session: nox.Session) -> None:
    """Test wheel, sdist and an editable install, together with another package in Haystack's namespace."""
    folder = str(Path(session.create_tmp()) / "distributions")
    build_distributions(session, folder, "https://example.org/repository", "main")
    session.install("haystack-ai", "ollama-haystack")
    install(session)  # the dependencies of all modules
    (sdist,) = Path(folder).glob("*.tar.gz")
    wheel = ["--no-index", f"--find-links={folder}", "--only-binary=:all:", "haystack-chat-store"]
    for source in (wheel, [str(sdist)], ["--editable", "."]):
        session.install("--no-deps", "--force-reinstall", *source)
        session.run("python", "-I", "-c", NEIGHBOURS, env=ENVIRONMENT)


@nox.session(python=PYTHONS, reuse_venv=False)
def installed(session: nox.Session) -> None:
    """Use the built wheel and sdist in clean environments, without extras, on each supported Python."""
    folder = str(Path(session.create_tmp()) / "distributions")
    build_distributions(session, folder, "https://example.org/repository", "main")
    for distribution in sorted(Path(folder).iterdir()):
        session.install("--reinstall-package", "haystack-chat-store", str(distribution))
        session.run("python", "-I", "publishing/try_installed.py", env=ENVIRONMENT)


@nox.session
def release(session: nox.Session) -> None:
    """Build the files of a release into dist/, from a commit with the tag of the version. See RELEASING.md."""
    project = nox.project.load_toml("pyproject.toml")["project"]
    repository, tag = project.get("urls", {}).get("Repository"), f"v{project['version']}"
    if not repository:
        session.error("[project.urls] in pyproject.toml has no Repository: see RELEASING.md")
    if session.run("git", "status", "--porcelain", external=True, silent=True):
        session.error("There are changes that are not committed")
    tags = session.run("git", "tag", "--points-at", "HEAD", external=True, silent=True) or ""
    if tag not in tags.split():
        session.error(f"This commit has no tag {tag}")
    build_distributions(session, "dist", repository, tag)


NEIGHBOURS = """
from haystack_integrations.components.generators.ollama import OllamaChatGenerator
from haystack_integrations.components.retrievers.chat_store import ChatMessageRetriever
from haystack_integrations.components.writers.chat_store import ChatMessageWriter
from haystack_integrations.hooks.chat_store import chat_history_hooks
import haystack_chat_store
import pkgutil

# Import every module, to check that the package contains all of them.
found = [module.name for module in pkgutil.walk_packages(haystack_chat_store.__path__, "haystack_chat_store.")]
for name in found:
    if name != "haystack_chat_store.__main__":
        __import__(name)
print(haystack_chat_store.__file__, len(found), "modules")
"""
