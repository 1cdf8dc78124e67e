# SPDX-License-Identifier: Apache-2.0
"""A forked program behaves as one that a fresh interpreter runs: nearly every test here is for both."""

import contextlib
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import threading
from functools import partial

import pytest
from servers import wait_until

from haystack_chat_store import SQLiteChatMessageStore
from haystack_chat_store.testing import fork_server
from haystack_chat_store.testing.processes import read_history, run_program, write_batches

# Not all that is usual, or each of these servers would take a second to start.
run_python = partial(fork_server.run_python, preload=["json"])
start_python = partial(fork_server.start_python, preload=["json"])

pytestmark = pytest.mark.skipif(not fork_server.IS_SUPPORTED, reason="processes cannot be forked safely here")
PIPES = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}


@pytest.fixture(params=["forked", pytest.param("fresh", marks=pytest.mark.full)])
def kind(request, monkeypatch):
    monkeypatch.setattr(fork_server, "IS_SUPPORTED", request.param == "forked")
    return request.param


def output_of(source, *arguments, **options):
    return run_python(["-c", source, *arguments], stdout=subprocess.PIPE, text=True, check=True, **options).stdout


# ---------------------------------------------------------------------- what is forked


def test_the_parent_is_a_server_that_has_imported_what_was_asked_for():
    source = "import sys, os; print(os.getppid(), 'haystack_chat_store' in sys.modules, 'pytest' in sys.modules)"
    first, second = (output_of(source, preload=["haystack_chat_store"]).split() for _ in range(2))
    assert first == second
    assert first[1:] == ["True", "False"]
    assert int(first[0]) != os.getpid()


def test_by_default_what_programs_of_ours_need_is_imported():
    source = f"import sys; print([name for name in {fork_server.EVERYTHING} if name not in sys.modules])"
    assert fork_server.run_python(["-c", source], capture_output=True, text=True).stdout == "[]\n"


def test_what_cannot_be_imported_is_left_to_the_program():
    missing = run_python(["-c", "import no_such_module"], preload=["no_such_module"], capture_output=True, text=True)
    assert missing.returncode == 1
    assert "No module named 'no_such_module'" in missing.stderr


def test_options_and_variables_that_an_interpreter_reads_at_its_start_get_a_server_of_their_own():
    parents = {
        output_of("import os; print(os.getppid())"),
        run_python(["-W", "error", "-c", "import os; print(os.getppid())"], capture_output=True, text=True).stdout,
        output_of("import os; print(os.getppid())", env={**os.environ, "PYTHONHASHSEED": "1"}),
    }
    assert len(parents) == 3
    assert output_of("import os; print(os.getppid())", env={**os.environ, "OTHER": "1"}) in parents


# ---------------------------------------------------------------------- how programs end


@pytest.mark.parametrize(
    ("source", "status", "said"),
    [
        ("pass", 0, ""),
        ("import sys; sys.exit(7)", 7, ""),
        ("import sys; sys.exit('Bye.')", 1, "Bye.\n"),
        ("raise SystemExit", 0, ""),
        ("raise SystemExit(258)", 2, ""),
        ("raise SystemExit(-1)", 255, ""),
        ("raise SystemExit(True)", 1, ""),
        ("raise SystemExit(1.0)", 1, "1.0\n"),
        ("import sys; sys.stdout = open('/dev/full', 'w'); print('lost')", 120, "No space left on device\n"),
        ("import os; os._exit(9)", 9, ""),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        ("nonsense nonsense", 1, "SyntaxError: invalid syntax\n"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM, ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGINT)", -signal.SIGINT, "KeyboardInterrupt\n"),
        ("import os; os.abort()", -signal.SIGABRT, ""),
    ],
)
def test_the_exit_status_and_the_last_words_are_those_of_python(kind, source, status, said):
    ended = run_python(["-c", source], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (status, "")
    assert ended.stderr.endswith(said)
    assert (ended.stderr == "") is (said == "")


def test_a_traceback_shows_the_program_last(kind, tmp_path):
    (tmp_path / "script.py").write_text("def fail():\n    1 / 0\n\nfail()\n")
    stderr = run_python([tmp_path / "script.py"], capture_output=True, text=True).stderr
    assert 'script.py", line 4, in <module>\n    fail()\n' in stderr
    assert 'script.py", line 2, in fail\n    1 / 0\n' in stderr


def test_exit_handlers_threads_and_buffers_are_waited_for(kind):
    source = """
import atexit, sys, threading, time
atexit.register(print, "the exit handler")
def late():
    threading.main_thread().join()
    print("the thread")
threading.Thread(target=late).start()
sys.stdout.write("the program\\n")
"""
    assert output_of(source) == "the program\nthe thread\nthe exit handler\n"


@pytest.mark.parametrize("ends_at_once", [True, False])
@pytest.mark.parametrize("status", [0, 1, 7])
def test_what_a_program_made_is_finalized_after_its_exit_handlers(kind, tmp_path, monkeypatch, ends_at_once, status):
    monkeypatch.setattr(fork_server, "ENDS_AT_ONCE", ends_at_once)
    (tmp_path / "imported.py").write_text("class Said:\n    def __del__(self): print(self.words)\nsaid = Said()\n")
    source = f"""
import atexit, imported
imported.said.words = "in a module"
circle = imported.Said()
circle.words, circle.itself = "in a circle", circle
last = imported.Said()
last.words = "last"
atexit.register(print, "the exit handler")
file = open(__import__("os").devnull)
def fail(local=imported.Said()):
    local.words = "in a traceback"
    if {status}:
        raise (RuntimeError if {status} == 1 else SystemExit({status}))
fail()
"""
    ended = run_python(["-W", "always", "-c", source], capture_output=True, text=True, cwd=tmp_path)
    first, *others = ended.stdout.splitlines()
    assert first == "the exit handler"
    assert sorted(others) == ["in a circle", "in a module", "in a traceback", "last"]
    assert ended.stderr.count("ResourceWarning: unclosed file") == 1
    assert ended.returncode == status


def test_daemon_threads_do_not_outlive_what_they_use(kind):
    source = """
import threading, time
def work():
    while True:
        time.sleep(0.0001)
for _ in range(20):
    threading.Thread(target=work, daemon=True).start()
"""
    ended = run_python(["-c", source], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_child_of_a_program_ends_as_the_interpreter_ends_it(kind):
    source = """
import atexit, json, os
class Said:
    def __del__(self): os.write(1, b"finalized\\n")
json.kept = Said()  # in a module that was imported before
if os.fork():
    os.wait()
    os._exit(0)
"""
    assert output_of(source) == "finalized\n"


def test_a_failed_program_is_an_error_where_it_is_checked(kind):
    with pytest.raises(subprocess.CalledProcessError) as raised:
        run_python(["-c", "print('So far.'); exit(3)"], capture_output=True, text=True, check=True)
    assert (raised.value.returncode, raised.value.stdout) == (3, "So far.\n")


# ---------------------------------------------------------------------- what programs are given


def test_a_program_gets_its_arguments_folder_environment_and_path(kind, tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    source = "import json, os, sys; print(json.dumps([sys.argv, os.getcwd(), dict(os.environ), sys.path[0]]))"
    for environment in ({**os.environ, "ONLY": "this\udcff"}, {"ONLY": "this", "LC_CTYPE": "C.UTF-8"}):
        printed = output_of(f"{source}; assert os.environ == {environment}", "a", "ü", cwd=tmp_path, env=environment)
        assert printed.startswith(f'[["-c", "a", "\\u00fc"], "{tmp_path}", {{')
        assert printed.endswith(', ""]\n')


def test_a_script_finds_its_neighbours_and_those_on_the_path(kind, tmp_path):
    for name in ("beside", "elsewhere"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.py").write_text(f"print({name!r})\n")
    script = tmp_path / "beside" / "script.py"
    script.write_text("import sys, beside, elsewhere\nprint(__name__, __file__, sys.argv)\n")
    options = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": "elsewhere"}}
    for path in (script, "beside/script.py"):
        printed = run_python([path, "x"], capture_output=True, text=True, **options).stdout
        assert printed == f"beside\nelsewhere\n__main__ {script} {[str(path), 'x']}\n"


def test_a_module_runs_as_the_program(kind, tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__main__.py").write_text("import sys\nprint(__name__, __package__, sys.argv)\n")
    ran = run_python(["-m", "package", "x"], cwd=tmp_path, capture_output=True, text=True)
    assert ran.stdout == f"__main__ package {[str(tmp_path / 'package' / '__main__.py'), 'x']}\n"
    missing = run_python(["-m", "no_such_module"], capture_output=True, text=True)
    assert (missing.returncode, missing.stdout) == (1, "")
    assert missing.stderr.endswith(": No module named no_such_module\n")


def test_nothing_of_the_server_is_left_in_the_program(kind):
    source = """
import __main__, os, signal, sys
print(sorted(set(vars(__main__)) - {"__annotations__"}))
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler, signal.getsignal(signal.SIGCHLD), end=" ")
print(signal.set_wakeup_fd(-1), signal.pthread_sigmask(signal.SIG_BLOCK, []))
print(sorted(os.listdir("/proc/self/fd"), key=int)[:-1] if os.path.exists("/proc/self/fd") else ["0", "1", "2"])
print([(stream.name, stream.encoding, stream.errors, stream.line_buffering, stream.write_through, stream.seekable())
       for stream in (sys.stdin, sys.stdout, sys.stderr)])
print(sys.orig_argv[1], sys.stdin is sys.__stdin__, sys.stdout is sys.__stdout__, sys.stderr is sys.__stderr__)
"""
    printed = output_of(source, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    fresh = subprocess.run(
        [sys.executable, "-c", source],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    assert printed == fresh


def test_options_of_the_interpreter_hold(kind):
    warned = run_python(["-W", "error", "-c", "import warnings; warnings.warn('!')"], capture_output=True, text=True)
    assert warned.returncode == 1
    assert warned.stderr.endswith("UserWarning: !\n")
    assert run_python(["-O", "-c", "assert False"]).returncode == 0
    with start_python(["-u", "-c", "print('now', end=''); input()"], **PIPES) as process:
        assert os.read(process.stdout.fileno(), 3) == b"now"  # though nothing was flushed
        process.communicate(b"\n")
    assert process.returncode == 0


def test_two_programs_draw_different_random_numbers(kind):
    source = "import random, uuid, os; print(random.random(), uuid.uuid4(), os.urandom(8))"
    assert output_of(source) != output_of(source)


def test_a_program_does_not_start_in_a_folder_that_is_not_there(kind, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        start_python(["-c", "pass"], cwd=tmp_path / "no folder")
    assert run_python(["-c", "pass"]).returncode == 0


# ---------------------------------------------------------------------- streams


@pytest.mark.parametrize("size", [0, 1, 5_000_000])
def test_input_and_both_outputs_are_passed_whole(kind, size):
    source = "import sys; data = sys.stdin.buffer.read(); sys.stderr.buffer.write(data); sys.stdout.buffer.write(data)"
    sent = os.urandom(size)
    ended = run_python(["-c", source], input=sent, capture_output=True)
    assert (ended.returncode, ended.stdout == sent, ended.stderr == sent) == (0, True, True)


def test_a_long_program_with_many_arguments_is_passed_whole(kind):
    source = "import sys; print(len(sys.argv), sum(map(len, sys.argv)))" + "\n# comment" * 10_000
    assert output_of(source, *["x" * 1000] * 500) == "501 500002\n"


def test_outputs_go_to_files_and_to_each_other(kind, tmp_path):
    source = "import sys; print('out', flush=True); print('err', file=sys.stderr)"
    with open(tmp_path / "output", "wb") as output:
        assert run_python(["-c", source], stdout=output, stderr=subprocess.STDOUT).returncode == 0
    assert (tmp_path / "output").read_text() == "out\nerr\n"


def test_when_a_program_is_killed_its_pipes_end(kind):
    with start_python(["-c", "print('begun', flush=True); input()"], text=True, **PIPES) as process:
        assert process.stdout.readline() == "begun\n"
        assert process.poll() is None
        process.kill()
        assert process.stdout.read() == ""
    assert process.returncode == process.poll() == -signal.SIGKILL
    process.kill()  # does nothing


def test_who_waits_no_longer_than_a_while_is_told_so(kind):
    with start_python(["-c", "input()"], **PIPES) as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.01)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0)
        process.stdin.write(b"\n")
        process.stdin.close()
        assert process.wait(60) == 0
    with pytest.raises(subprocess.TimeoutExpired):
        run_python(["-c", "import time; time.sleep(600)"], timeout=0.2)


def test_several_threads_wait_for_one_program(kind):
    with start_python(["-c", "input(); exit(5)"], **PIPES) as process:
        statuses = []
        threads = [threading.Thread(target=lambda: statuses.append(process.wait(60))) for _ in range(5)]
        for thread in threads:
            thread.start()
        process.stdin.write(b"\n")
        process.stdin.close()
        for thread in threads:
            thread.join()
    assert statuses == [5] * 5


def test_fifty_programs_run_at_once(kind):
    source = "import sys; print(sys.argv[1], flush=True); exit(int(input()))"
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(start_python(["-c", source, str(number)], text=True, **PIPES)) for number in range(50)
        ]
        assert [process.stdout.readline() for process in processes] == [f"{number}\n" for number in range(50)]
        for number, process in reversed(list(enumerate(processes))):
            process.communicate(f"{number}\n")
    assert [process.returncode for process in processes] == list(range(50))


# ---------------------------------------------------------------------- sessions, terminals, servers


def test_what_a_program_forked_is_killed_with_its_session(kind):
    source = "import os, time; os.fork(); os.write(1, b'%d %d\\n' % (os.getsid(0), os.getpgid(0))); time.sleep(600)"
    with start_python(["-c", source], start_new_session=True, stdout=subprocess.PIPE, text=True) as process:
        lines = [process.stdout.readline() for _ in range(2)]
        os.killpg(process.pid, signal.SIGKILL)
        assert lines == [f"{process.pid} {process.pid}\n"] * 2
        assert process.stdout.read() == ""
    assert process.returncode == -signal.SIGKILL


def test_without_a_session_of_its_own_a_program_stays_in_ours(kind):
    assert output_of("import os; print(os.getsid(0), os.getpgid(0))") == f"{os.getsid(0)} {os.getpgid(0)}\n"


def test_a_program_that_has_ended_keeps_its_id_until_that_was_seen(kind):
    with start_python(["-c", "pass"], stdout=subprocess.PIPE) as process:
        assert process.stdout.read() == b""
        os.kill(process.pid, signal.SIGKILL)  # reaches what has ended, and nothing else
    assert process.returncode in (0, -signal.SIGKILL)
    with pytest.raises(ProcessLookupError):
        wait_until(lambda: os.kill(process.pid, 0), "the id to be free")


def test_a_program_has_a_terminal(kind):
    master, slave = pty.openpty()
    source = "import sys; print([s.isatty() for s in (sys.stdin, sys.stdout, sys.stderr)], end='?\\n'); print(input())"
    with start_python(["-c", source], stdin=slave, stdout=slave, stderr=slave, start_new_session=True) as process:
        os.close(slave)
        seen = b""
        while b"?" not in seen:  # the line is not flushed, as it need not be on a terminal
            assert select.select([master], [], [], 60)[0]
            seen += os.read(master, 1000)
        assert not termios.tcgetattr(master)[3] & termios.TOSTOP
        os.write(master, "Grüße\n".encode())
        with contextlib.suppress(OSError):  # Linux' way to say that nothing has the terminal open any more
            while read := os.read(master, 1000):
                seen += read
    os.close(master)
    assert process.returncode == 0
    assert seen.decode().split() == ["[True,", "True,", "True]?", "Grüße", "Grüße"]


def test_a_server_ends_with_its_client_and_what_it_has_forked_goes_on():
    program = "import os; print(os.getppid(), flush=True); print(input(), flush=True)"
    client = f"""
import sys, time
from haystack_chat_store.testing.fork_server import start_python
start_python(["-c", {program!r}], preload=[])
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", client], text=True, **PIPES) as process:
        server = int(process.stdout.readline())
        process.kill()
        process.wait()
        wait_until(lambda: not is_alive(server), "the server to end")
        process.stdin.write("still here\n")
        process.stdin.flush()
        assert process.stdout.readline() == "still here\n"


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    if not os.path.exists(f"/proc/{pid}/stat"):
        return False
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] != "Z"  # in a container, nothing may reap it


def test_a_server_ends_with_a_client_that_ends_by_itself():
    client = """
from haystack_chat_store.testing.fork_server import run_python
run_python(["-c", "import os; print(os.getppid())"], preload=[])
"""
    ended = subprocess.run([sys.executable, "-W", "error", "-c", client], capture_output=True, text=True, check=True)
    assert ended.stderr == ""
    assert not is_alive(int(ended.stdout))


def test_a_server_that_is_gone_is_reported():
    killed = start_python(["-c", "import os, signal; os.kill(os.getppid(), signal.SIGKILL); input()"], **PIPES)
    with killed:
        assert killed.wait(60) < 0
    with pytest.raises(RuntimeError, match="fork server has failed"):
        start_python(["-c", "pass"])
    fork_server._servers.clear()


def test_a_program_of_the_kit_runs_in_a_fresh_interpreter_where_nothing_can_be_forked(kind, tmp_path):
    with contextlib.closing(SQLiteChatMessageStore(tmp_path / "chat.db")) as store:
        assert run_program(write_batches, store, "history", [[["Hello!"]]]) == ["Hello!"]
        assert run_program(read_history, store, "history") == [["Hello!"], ["Hello!"]]
