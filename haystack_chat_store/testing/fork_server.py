# SPDX-License-Identifier: Apache-2.0
"""
Python processes that start at once, because a server that has imported Haystack already forks them.

`start_python` and `run_python` take what follows `python` on a command line, and return what `subprocess.Popen` and
`subprocess.run` return. A program runs as `__main__` and ends as any other, with its exit handlers, exit status and
traceback. What differs from a fresh interpreter: the modules of `preload` are imported already, from where the test
process would import them; the parent is the server; umask and limits are those of the moment when the server started;
at the end, what the program made is finalized, but not what was imported before it (see `ENDS_AT_ONCE`).

A server is started, as a fresh interpreter, when it is first needed, and ends with the process that started it. Each
set of interpreter options (such as `-W error`), and of the environment variables that an interpreter or Haystack read
while they start, has a server of its own. Where processes cannot be forked safely, each program gets a fresh
interpreter.

This file is also the server's program, so it imports nothing but the standard library.
"""

import atexit
import gc
import importlib
import io
import json
import math
import os
import runpy
import select
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import warnings
from collections.abc import Container, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

# macOS has `fork`, but its own libraries do not survive one.
IS_SUPPORTED = hasattr(os, "fork") and hasattr(os, "waitid") and sys.platform != "darwin"
# Whether programs leave to the system what was imported before they began. Python takes 60 ms to free it.
ENDS_AT_ONCE = True

HAYSTACK = ("haystack", "haystack.components.agents", "haystack.components.generators.chat.openai")
EVERYTHING = (
    *HAYSTACK,
    "haystack_chat_store.stores.in_memory",
    "haystack_chat_store.stores.sqlite",
    "haystack_chat_store.stores.postgres",
    "haystack_chat_store.stores.redis",
    "haystack_chat_store.cli.running",
    "haystack_chat_store.cli.app",
    "haystack_integrations.components.retrievers.chat_store",
    "haystack_integrations.components.writers.chat_store",
    "haystack_integrations.hooks.chat_store",
)

# The beginnings of the names of variables that are read while an interpreter starts or Haystack is imported.
_READ_AT_START = ("PYTHON", "LANG", "LC_", "HAYSTACK_")
_NOT_READ_AT_START = ("PYTHONPATH", "HAYSTACK_CHAT_STORE_")
_OPTIONS_WITH_VALUE = ("-W", "-X", "--check-hash-based-pycs")


# ---------------------------------------------------------------------- in the test process


def start_python(
    arguments: Sequence["str | os.PathLike[str]"],
    *,
    cwd: "str | os.PathLike[str] | None" = None,
    env: Mapping[str, str] | None = None,
    start_new_session: bool = False,
    preload: Sequence[str] = EVERYTHING,
    **streams: Any,
) -> "subprocess.Popen[Any]":
    """
    Start a Python process.

    ```python
    import subprocess
    from haystack_chat_store.testing.fork_server import start_python

    with start_python(["-c", "print(input())"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        print(process.communicate("Hello!")[0])
    ```

    :param arguments: What follows `python` on a command line: interpreter options, then `-c` and source, `-m` and a
        module, or the path of a script, then arguments of the program.
    :param cwd: The folder to start in. Defaults to that of this process.
    :param env: All environment variables. Defaults to those of this process.
    :param start_new_session: Whether the process gets a session, and so a process group, of its own.
    :param preload: The modules that may have been imported before the program begins.
    :param streams: As for `subprocess.Popen`: `stdin`, `stdout`, `stderr`, `text`, `encoding`, `errors`, `bufsize`.
    :returns: The process. It has begun.
    :raises OSError: If it cannot start in that folder.
    """
    command = [os.fspath(argument) for argument in arguments]
    environment = dict(os.environ if env is None else env)
    if not IS_SUPPORTED:
        command = [sys.executable, *command]
        return subprocess.Popen(command, cwd=cwd, env=environment, start_new_session=start_new_session, **streams)
    start = 0
    while command[start].startswith("-") and command[start] not in ("-c", "-m"):
        start += 2 if command[start] in _OPTIONS_WITH_VALUE else 1
    request = {
        "arguments": command[start:],
        "cwd": os.path.abspath(cwd or "."),
        "env": environment,
        "start_new_session": start_new_session,
        "ends_at_once": ENDS_AT_ONCE,
    }
    return _ForkedProcess(_server_for(command[:start], environment, preload), command, request, streams)


def run_python(
    arguments: Sequence["str | os.PathLike[str]"],
    *,
    input: Any = None,  # noqa: A002  (as subprocess.run calls it)
    capture_output: bool = False,
    timeout: float | None = None,
    check: bool = False,
    **options: Any,
) -> "subprocess.CompletedProcess[Any]":
    """
    Run a Python process to its end, as `subprocess.run` does.

    :param arguments: See `start_python`.
    :param input: The standard input of the process.
    :param capture_output: Whether to return what it writes to its standard output and error.
    :param timeout: The number of seconds after which the process is killed. Defaults to never.
    :param check: Whether an exit status other than 0 is an error.
    :param options: See `start_python`.
    :returns: The exit status and the outputs.
    :raises subprocess.TimeoutExpired: If the process was killed because of `timeout`.
    :raises subprocess.CalledProcessError: If the process failed, and `check` is set.
    """
    if input is not None:
        options["stdin"] = subprocess.PIPE
    if capture_output:
        options["stdout"] = options["stderr"] = subprocess.PIPE
    with start_python(arguments, **options) as process:
        try:
            outputs = process.communicate(input, timeout)
        except BaseException:
            process.kill()
            raise
    completed = subprocess.CompletedProcess(process.args, process.returncode, *outputs)
    if check:
        completed.check_returncode()
    return completed


class _ForkedProcess(subprocess.Popen[Any]):
    """
    A process of a fork server. As of a child of one's own, its id stays its own until `poll` or `wait` saw its end.

    Three methods take the place of those with which `Popen` starts a process and waits for it on POSIX systems.
    """

    def __init__(
        self, server: "_Server", command: Sequence[str], request: dict[str, Any], streams: dict[str, Any]
    ) -> None:
        self._server, self._request = server, request
        self._reading = threading.Lock()
        super().__init__([sys.executable, *command], **streams)

    def _execute_child(self, *given: Any) -> None:
        pipes = given[10:16]  # both ends for each standard stream, or -1 where nothing is redirected
        try:
            standard = (pipes[0], pipes[3], pipes[5])
            descriptors = [own if given == -1 else given for own, given in enumerate(standard)]
            self.pid, self._lease = self._server.fork(self._request, descriptors)
            self._child_created = True
        finally:
            self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]  # private

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        return self._status(0)

    def _wait(self, timeout: float | None) -> int:
        status = self._status(timeout)
        if status is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return status

    def _status(self, timeout: float | None) -> int | None:
        # One thread at a time waits for the status; those that wait for the thread find the status in `returncode`.
        end = math.inf if timeout is None else time.monotonic() + max(timeout, 0)
        if self.returncode is None and self._reading.acquire(timeout=-1 if timeout is None else max(timeout, 0)):
            try:
                if self.returncode is None and self._has_answer(end):
                    status = self._lease.recv(16)
                    self._lease.close()
                    self.returncode = int(status) if status else -signal.SIGKILL  # the server is gone
            finally:
                self._reading.release()
        return self.returncode

    def _has_answer(self, end: float) -> bool:
        poll = select.poll()
        poll.register(self._lease, select.POLLIN)
        return bool(poll.poll(None if end == math.inf else max(end - time.monotonic(), 0) * 1000))


class _Server:
    """A fork server, as its client sees it."""

    def __init__(self, options: Sequence[str], environment: Mapping[str, str], preload: Sequence[str]) -> None:
        self._requests, its_end = socket.socketpair()
        with its_end:
            settings = json.dumps([its_end.fileno(), sys.path, preload])
            self._process = subprocess.Popen(
                [sys.executable, *options, __file__, settings],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={name: value for name, value in environment.items() if name != "PYTHONPATH"},
                pass_fds=[its_end.fileno()],
            )
        atexit.register(self._close)

    def _close(self) -> None:
        self._requests.close()
        self._process.wait()

    def fork(self, request: dict[str, Any], descriptors: Sequence[int]) -> tuple[int, socket.socket]:
        """
        Start a process.

        :param request: What `_become` needs to know.
        :param descriptors: The standard streams of the process.
        :returns: The id of the process, and a lease of that id: the server sends the exit status through it, and waits
            until it is closed before it lets the system use the id again.
        """
        lease, its_lease = socket.socketpair()
        try:
            talk, its_talk = socket.socketpair()
            with talk, suppress(ConnectionError):
                with its_lease, its_talk:
                    socket.send_fds(self._requests, [b"."], [its_talk.fileno(), its_lease.fileno(), *descriptors])
                talk.sendall(json.dumps(request).encode())
                talk.shutdown(socket.SHUT_WR)
                if answer := _read_all(talk):
                    pid, error = json.loads(answer)
                    if error:
                        raise OSError(*error)
                    return pid, lease
            raise RuntimeError("The fork server has failed; its standard error says why.")
        except BaseException:
            lease.close()
            raise


_servers: dict[Any, _Server] = {}
_starting = threading.Lock()


def _server_for(options: Sequence[str], environment: Mapping[str, str], preload: Sequence[str]) -> _Server:
    read_at_start = {
        (name, value)
        for name, value in environment.items()
        if name.startswith(_READ_AT_START) and not name.startswith(_NOT_READ_AT_START)
    }
    key = (os.getpid(), tuple(options), frozenset(read_at_start), tuple(preload))
    with _starting:
        if key not in _servers:
            _servers[key] = _Server(options, environment, preload)
        return _servers[key]


def _read_all(connection: socket.socket) -> bytes:
    with connection.makefile("rb") as file:
        return file.read()


# ---------------------------------------------------------------------- in the server


class _Children:
    """The children of a server, each with the lease of its id."""

    def __init__(self, selector: selectors.BaseSelector) -> None:
        self._selector = selector
        self._running: dict[int, socket.socket] = {}
        self._ended: dict[int, socket.socket] = {}

    def add(self, pid: int, lease: socket.socket) -> None:
        self._running[pid] = lease

    def tell_ends(self) -> None:
        """Send the exit status of each that has ended. It stays a zombie, so that its id is not used again."""
        for pid, lease in list(self._running.items()):
            end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if end is not None:
                status = end.si_status if end.si_code == os.CLD_EXITED else -end.si_status
                with suppress(OSError):  # if nothing waits for it any more
                    lease.send(str(status).encode())
                self._ended[pid] = self._running.pop(pid)
                self._selector.register(lease, selectors.EVENT_READ)

    def reap(self, ready: Container[Any]) -> None:
        """Let go of those that have ended and whose lease the client has closed."""
        for pid, lease in list(self._ended.items()):
            if lease in ready:
                os.waitpid(pid, 0)
                self._selector.unregister(lease)
                self._ended.pop(pid).close()

    def close(self) -> None:
        """Close what a forked child does not need."""
        for lease in (*self._running.values(), *self._ended.values()):
            lease.close()


def _serve(requests: socket.socket) -> tuple[socket.socket, list[int]]:
    """
    Fork a child for each request, and tell how each ends, until the client is gone. Returns in the children only.

    :returns: The child's connection to the client, and its standard streams.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the client decides what ends when Ctrl-C is pressed
    waker, woken = socket.socketpair()
    waker.setblocking(False)
    signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    with selectors.DefaultSelector() as selector, waker, woken, requests:
        selector.register(requests, selectors.EVENT_READ)
        selector.register(woken, selectors.EVENT_READ)
        children = _Children(selector)
        while True:
            ready = {key.fileobj for key, _ in selector.select()}
            children.reap(ready)
            if woken in ready:
                woken.recv(4096)
                children.tell_ends()
            if requests not in ready:
                continue
            _, descriptors, _, _ = socket.recv_fds(requests, 1, 5)
            if not descriptors:
                os._exit(0)
            talk, lease = (socket.socket(fileno=descriptor) for descriptor in descriptors[:2])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python's own about threads: those of OpenBLAS know how to be forked
                pid = os.fork()
            if pid == 0:
                lease.close()
                children.close()
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                signal.signal(signal.SIGINT, before)
                return talk, descriptors[2:]
            children.add(pid, lease)
            talk.close()
            for descriptor in descriptors[2:]:
                os.close(descriptor)


def _become(talk: socket.socket, descriptors: Sequence[int], path: Sequence[str]) -> tuple[list[str], bool]:
    """
    Give this process everything that its client asks for.

    :param talk: The connection to the client.
    :param descriptors: The standard streams.
    :param path: Where all programs look for modules.
    :returns: The program and its arguments, and whether it ends at once.
    """
    with talk:
        request = json.loads(_read_all(talk))
        try:
            if request["start_new_session"]:
                os.setsid()
            os.chdir(request["cwd"])
        except OSError as error:
            talk.sendall(json.dumps([0, [error.errno, error.strerror, error.filename]]).encode())
            os._exit(1)
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            stream = _standard_stream(number, getattr(sys, name))
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        os.environ.clear()
        os.environ.update(request["env"])
        time.tzset()
        own_path = [os.path.abspath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
        sys.path[:] = [*own_path, *path]
        importlib.invalidate_caches()
        talk.sendall(json.dumps([os.getpid(), None]).encode())
    arguments: list[str] = request["arguments"]
    sys.orig_argv[sys.orig_argv.index(__file__) :] = arguments
    return arguments, request["ends_at_once"]


def _standard_stream(number: int, servers: Any) -> io.TextIOWrapper:
    """Open a standard stream as an interpreter does when it starts."""
    is_output, is_unbuffered = number > 0, servers.write_through
    buffering = 0 if is_output and is_unbuffered else -1
    binary: Any = open(number, "wb" if is_output else "rb", buffering, closefd=False)
    getattr(binary, "raw", binary).name = servers.name
    return io.TextIOWrapper(
        binary,
        encoding=servers.encoding,
        errors=servers.errors,
        newline="\n",
        line_buffering=not is_unbuffered and (number == 2 or binary.isatty()),
        write_through=is_unbuffered,
    )


class _QuickExit:
    """
    An exit handler that ends the process without taking apart what was imported before the program.

    To take it apart would take six times as long as all else. This is the first exit handler, so it runs last. What the
    program has forked ends as the interpreter ends it.
    """

    def __init__(self) -> None:
        self._status: int | None = None
        self._imported: frozenset[str] = frozenset()
        self._pid = 0
        atexit.register(self)

    def run(self, arguments: Sequence[str]) -> None:
        """Run a program, and remember its exit status."""
        self._imported = frozenset(sys.modules)
        self._pid = os.getpid()
        try:
            _run(arguments)
            self._status = 0
        except SystemExit as ending:
            code = 0 if ending.code is None else ending.code
            self._status = code & 0xFF if isinstance(code, int) else 1
            raise
        except Exception:
            self._status = 1
            raise

    def __call__(self) -> None:
        """Finalize what the program made, and end."""
        # What Ctrl-C has ended has no status, and daemon threads are the interpreter's to stop.
        if self._status is None or os.getpid() != self._pid or threading.active_count() > 1:
            return
        for name in ("last_exc", "last_type", "last_value", "last_traceback"):
            vars(sys).pop(name, None)
        for name in (sys.modules.keys() - self._imported) | {"__main__"}:
            sys.modules.pop(name, None)
        gc.collect()
        with suppress(Exception):  # the interpreter fails in the same way, and says so
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self._status)


def _run(arguments: Sequence[str]) -> None:
    """Run a program as `__main__`."""
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = __builtins__
    kind = arguments[0]
    if kind == "-m":
        sys.argv = [kind, *arguments[2:]]
        sys.path.insert(0, os.getcwd())
        runpy._run_module_as_main(arguments[1])  # type: ignore[attr-defined]  # private
        return
    if kind == "-c":
        sys.argv = [kind, *arguments[2:]]
        sys.path.insert(0, "")
        code = compile(arguments[1], "<string>", "exec", dont_inherit=True)
    else:
        sys.argv = list(arguments)
        sys.path.insert(0, str(Path(kind).resolve().parent))
        script = os.path.abspath(kind)
        main.__dict__.update(__file__=script, __cached__=None)
        code = compile(Path(script).read_bytes(), script, "exec", dont_inherit=True)
    exec(code, main.__dict__)


def _preload(modules: Sequence[str], path: Sequence[str]) -> list[str]:
    """
    Import modules.

    :returns: Where a fresh interpreter looks for modules, whatever program it runs.
    """
    own = os.path.dirname(os.path.abspath(__file__))
    fresh = [entry for entry in sys.path if entry != own]
    sys.path[:] = path
    for module in modules:
        with suppress(Exception):  # the program imports it itself, and fails as it would have
            importlib.import_module(module)
    gc.collect()
    gc.freeze()  # the children share it
    return fresh


def _main() -> None:
    descriptor, path, modules = json.loads(sys.argv[1])
    requests = socket.socket(fileno=descriptor)
    quick_exit = _QuickExit()
    fresh_path = _preload(modules, path)
    arguments, ends_at_once = _become(*_serve(requests), fresh_path)
    (quick_exit.run if ends_at_once else _run)(arguments)


if __name__ == "__main__":
    _main()
