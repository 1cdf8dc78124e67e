# SPDX-License-Identifier: Apache-2.0
"""What goes wrong is said in a line or two, with the status that it promises and without passwords."""

import sqlite3
from contextlib import closing

import pytest
from filled_stores import filled, names

from haystack_chat_store import SQLiteChatMessageStore
from haystack_chat_store.cli import main
from haystack_chat_store.testing.messages import user


@pytest.mark.parametrize(
    "arguments",
    [
        ("ls", "--nonsense"),
        ("nonsense",),
        ("ls", "extra"),
        ("ls", "--limit", "0"),
        ("ls", "--limit", "many"),
        ("ls", "--namespace", ""),
        ("ls", "--prefix", "x" * 600),
        ("show",),
        ("show", ""),
        ("show", "x", "--before", "1", "--after", "1"),
        ("show", "x", "--all", "--after", "1"),
        ("show", "x", "--last", "1001"),
        ("show", "x", "--all", "--last", "3"),
        ("ls", "--all", "-n", "2"),
        ("search",),
        ("search", "x" * 2000),
        ("title", "x", "y", "--clear"),
        ("title", "ada:1", "x" * 2000),
        ("export", "x", "--prefix", "y"),
        ("export", "--format", "nonsense"),
        ("export", "--json"),
        ("import",),
        ("import", "no such file"),
        ("import", "/"),
        ("copy",),
        ("copy", "--to", "nonsense"),
        ("copy", "--to-namespace", "default"),
        ("delete",),
        ("delete", "--prefix", ""),
        ("purge",),
        ("purge", "--older-than", "soon"),
        ("purge", "--older-than", "999999w"),
        ("doctor", "--salvage", "x"),
    ],
)
def test_wrong_use_is_explained_and_ends_with_2(url, run, arguments):
    store = filled(url)
    status, out, err = run(*arguments, *(("--store", url) if arguments != ("nonsense",) else ()))
    assert (status, out) == (2, "")
    assert err.startswith("Error: ")
    assert 1 <= err.count("\n") <= 2
    assert names(store) == {"ada:1", "ada:2", "bob:1"}


def test_without_arguments_there_is_help(run):
    status, out, err = run()
    assert (status, err) == (0, "")
    assert "Usage: haystack-chat-store" in out
    assert run("--help")[0] == 0
    assert run("ls", "--help")[0] == 0


def test_help_shows_what_may_be_left_out_and_what_may_be_repeated(run):
    for name, argument in (("copy", "ID"), ("export", "ID"), ("delete", "ID"), ("title", "TITLE")):
        out = run(name, "--help")[1]
        assert f"[{argument}]" in out
        assert "[[" not in out


def test_the_store_comes_from_the_environment_too(url, run, monkeypatch):
    filled(url)
    status, _, err = run("ls")
    assert status == 2
    assert "--store URL" in err
    assert "HAYSTACK_CHAT_STORE_URL" in err
    monkeypatch.setenv("HAYSTACK_CHAT_STORE_URL", url)
    assert run("ls")[0] == 0
    assert run("ls", "--store", "memory://", "--namespace", "empty")[:2] == (0, "")


def test_a_path_in_place_of_a_url_is_recognized(url, path, run):
    filled(url)
    status, _, err = run("ls", "--store", path)
    assert status == 2
    assert f"Did you mean sqlite:///{path}?" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ("ls",),
        ("show", "x"),
        ("search", "x"),
        ("index",),
        ("backup", "copy.db"),
        ("stats",),
        ("title", "x"),
        ("export", "-o", "out.jsonl"),
        ("copy", "--to", "sqlite:///other.db"),
        ("delete", "x", "--yes"),
        ("purge", "--older-than", "1d", "--yes"),
        ("doctor",),
    ],
)
def test_a_mistyped_file_is_an_error_and_not_a_new_database(arguments, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments, "--store", "sqlite:///chta.db") == (1, "", f"Error: There is no file {tmp_path}/chta.db.\n")
    assert list(tmp_path.iterdir()) == []


READING = [
    ("ls",),
    ("show", "x"),
    ("search", "x"),
    ("stats",),
    ("title", "x"),
    ("export",),
    ("copy", "--to", "sqlite:///target.db"),
    ("doctor",),
    ("backup", "copy.db"),
]
WRITING = [
    ("index",),
    ("title", "x", "A title"),
    ("import", "histories.jsonl"),
    ("delete", "x", "--yes"),
    ("purge", "--older-than", "1d", "--yes"),
    ("doctor", "--repair"),
]


@pytest.mark.parametrize("journal_mode", ["wal", "delete"])
@pytest.mark.parametrize("arguments", [*READING, *WRITING])
def test_another_programs_database_is_named_as_such_and_left_alone(
    arguments, journal_mode, run, tmp_path, monkeypatch, path, url
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "histories.jsonl").touch()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA journal_mode = {journal_mode}")
        connection.execute("CREATE TABLE bookmarks (url)")
        connection.commit()
    before = path.read_bytes()
    status, out, err = run(*arguments, "--store", url)
    if arguments[0] == "import":
        assert status in (0, 1)
    else:
        assert (status, out) == (1, "")
        assert f"{path} is a database of another program" in err
    assert path.read_bytes() == before
    assert not (tmp_path / "copy.db").exists()


@pytest.mark.parametrize("arguments", [*READING, *WRITING[3:]])
def test_an_empty_file_is_an_error(arguments, run, tmp_path, monkeypatch, path, url):
    monkeypatch.chdir(tmp_path)
    path.touch()
    status, out, err = run(*arguments, "--store", url)
    assert (status, out, err) == (1, "", f"Error: {path} is empty: it has no chat histories.\n")
    assert path.read_bytes() == b""


@pytest.mark.parametrize("arguments", READING)
def test_commands_that_read_change_nothing(arguments, run, tmp_path, monkeypatch, path, url):
    monkeypatch.chdir(tmp_path)
    store = filled(url, timeout=29)  # with connections of its own, as in another process
    store.write_messages("x", [user("x")])
    files = [path, path.with_name("chat.db-wal")]
    before = [file.read_bytes() for file in files]
    run(*arguments, "--store", url)
    assert [file.read_bytes() for file in files] == before
    store.close()
    before = path.read_bytes()
    run(*arguments, "--store", url)
    assert path.read_bytes() == before


def test_backup_writes_a_store_and_replaces_nothing(run, run_json, tmp_path, url):
    store = filled(url)
    copy = tmp_path / "copy.db"
    assert run("backup", copy, "--store", url) == (0, f"Wrote {copy}.\n", "")
    assert run_json("ls", "--store", f"sqlite:///{copy}") == run_json("ls", "--store", url)
    before = copy.read_bytes()
    store.write_messages("later", [user()])
    status, _, err = run("backup", copy, "--store", url)
    assert (status, err) == (
        1,
        f"Error: {copy}: There is a file already. Give another path, or remove the file first\n",
    )
    assert copy.read_bytes() == before


def test_backup_of_another_engine_says_what_to_use(run, tmp_path):
    status, _, err = run("backup", tmp_path / "copy.db", "--store", "memory://")
    assert status == 1
    assert "docs/backup.md" in err


def test_a_file_that_is_no_database_is_an_error(run, tmp_path):
    (tmp_path / "notes.txt").write_text("not a database, but long enough to be taken for one" * 100)
    status, out, err = run("ls", "--store", f"sqlite:///{tmp_path / 'notes.txt'}")
    assert (status, out) == (1, "")
    assert err.startswith("Error: ")


def test_a_server_that_is_not_there_is_an_error_without_the_password(run, redis_server):
    for url in (
        "postgresql://ada:s3cret@127.0.0.1:1/db",
        "redis://:s3cret@127.0.0.1:1/0",
        "redis+cluster://:s3cret@[::1]:1",
    ):
        status, out, err = run("ls", "--store", url)
        assert (status, out) == (1, "")
        assert "s3cret" not in err
        assert "Traceback" not in err


@pytest.mark.parametrize(
    "arguments",
    [
        ("ls", "postgresql://ada:s3cret@localhost/db"),
        ("ls", "--store", "postgres//ada:s3cret@localhost/db"),
        ("ls", "--store", "mysql://ada:s3cret@localhost/db"),
        ("postgresql://ada:s3/cr@et@localhost/db",),
        ("show", "postgresql://ada:s3cret@localhost/db", "postgresql:///db?password=s3cret"),
        ("import", "postgresql://ada:s3cret@localhost/db"),
        ("ls", "postgresql://ada@localhost/db?sslmode=require&sslpassword=s3cret"),
        ("ls", "redis://s3cret@localhost/0"),
        ("ls", "redis://:s3cret"),
        ("ls", "postgresql://ada:s3 cret@localhost/db"),
        ("ls", "postgresql://ada:s3 cret"),
        ("ls", "postgresql://ada:s3://cret@localhost/db"),
        ("ls", "host=localhost password='s3 cret'"),
        (r"host=localhost password='s3\' cret'",),
        ("host=localhost password = s3cret",),
        ("--limit=postgresql://ada:s3cret@localhost/db", "ls"),
    ],
)
def test_wrong_use_shows_no_password_either(run, arguments):
    status, _, err = run(*arguments)
    assert status == 2
    assert "cr" not in err.replace("extra", "").replace("script", "")


def test_no_more_than_the_password_is_left_out(run):
    assert "(postgresql:///db?password=***)" in run("ls", "postgresql:///db?password=s3cret")[2]
    assert "(postgresql://***@localhost/db)" in run("ls", "postgresql://ada:s3cret@localhost/db")[2]
    for harmless in ("sqlite:///chat.db", "redis://localhost:6379/0", "ada@example.org"):
        assert f"({harmless})" in run("ls", harmless)[2]
    err = run("ls", "--store", "mysql://x")[2]
    assert "postgresql://user:password@host:port/database, redis://:password@host:port/0, " in err
    assert "***" not in err


def test_a_file_that_cannot_be_written_is_an_error(url, run, tmp_path):
    filled(url)
    status, _, err = run("export", "-o", tmp_path / "no folder" / "x.jsonl", "--store", url)
    assert status == 1
    assert f"The folder {tmp_path / 'no folder'} does not exist." in err
    assert err.count("\n") == 1


def test_control_characters_in_arguments_reach_no_terminal(url, run):
    filled(url)
    for arguments in (
        ("show", "\x1b[31m\x9b\u202e"),
        ("\x1b[31m",),
        ("ls", "--\x1b[31m"),
        ("purge", "--older-than", "\x9b"),
    ):
        _, _, err = run(*arguments, *(("--store", url) if len(arguments) > 1 else ()))
        assert err.replace("\n", "").isprintable()
        assert "\\x" in err


def test_an_unexpected_error_is_a_line_and_a_traceback_when_asked_for(url, run, monkeypatch):
    filled(url)
    monkeypatch.setattr(SQLiteChatMessageStore, "statistics", None)
    status, out, err = run("stats", "--store", url)
    assert (status, out) == (1, "")
    assert err.startswith("Error: TypeError: ")
    assert "HAYSTACK_CHAT_STORE_DEBUG=1" in err
    monkeypatch.setenv("HAYSTACK_CHAT_STORE_DEBUG", "1")
    with pytest.raises(TypeError):
        main(["stats", "--store", url])
