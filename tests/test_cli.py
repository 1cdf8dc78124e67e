# SPDX-License-Identifier: Apache-2.0
"""
The command line does what it says, prints what programs can rely on, and ends with the status that it promises.
"""

import json
import os
import sqlite3
import subprocess
import sys
from datetime import datetime, timedelta, timezone

import pytest
from haystack.dataclasses import ChatMessage
from servers import PostgresServer, RedisCluster, RedisServer

from haystack_chat_store import HistoryRow, MessageRow, store_from_url
from haystack_chat_store.cli import main
from haystack_chat_store.codec import encode_message
from haystack_chat_store.testing.messages import conversation, sample_messages, user

DAMAGED = '{"no": "message"}'


@pytest.fixture(autouse=True)
def as_started_anew(monkeypatch):
    """
    The environment of a new shell, and afterwards the interpreter's settings as they were.
    """
    for name in ("HAYSTACK_CHAT_STORE_URL", "FORCE_COLOR", "NO_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    digits = sys.get_int_max_str_digits()
    yield
    sys.set_int_max_str_digits(digits)


@pytest.fixture
def run(capsys):
    """
    Run a command in this process; returns its exit status, its output, and what it said on the other output.
    """

    def run(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        return exit_.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def run_json(run):
    """
    Run a command with `--json`; returns its objects.
    """

    def run_json(*arguments, status=0):
        code, out, err = run(*arguments, "--json")
        assert code == status, err
        assert out.isascii()
        return [json.loads(line) for line in out.splitlines()]

    return run_json


@pytest.fixture(scope="module")
def postgres():
    with PostgresServer(fsync="off") as server:
        yield server


@pytest.fixture(scope="module")
def redis_server():
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="module")
def redis_cluster():
    with RedisCluster() as cluster:
        yield cluster


@pytest.fixture
def path(tmp_path):
    return tmp_path / "chat.db"


@pytest.fixture
def url(path):
    return f"sqlite:///{path}"


@pytest.fixture(params=["sqlite", "postgres", "redis_server", "redis_cluster"])
def any_url(request):
    """
    The URL of an empty database of each engine.
    """
    if request.param == "sqlite":
        return request.getfixturevalue("url")
    server = request.getfixturevalue(request.param)
    if request.param == "postgres":
        return server.create_database()
    store = store_from_url(server.url)
    store.delete_all_messages()
    store.close()
    return server.url


def filled(url, **settings):
    """
    A store with the histories `ada:1` (4 messages), `ada:2` (2) and `bob:1` (1), which changed in this order.
    """
    store = store_from_url(url, last_k=None, **settings)
    store.write_messages("ada:1", conversation("uaua"))
    store.update_chat_history("ada:1", title="Zürich", meta={"a": 1})
    store.write_messages(
        "ada:2", [ChatMessage.from_user("Why a chrysanthemum?"), ChatMessage.from_assistant("It *blooms*.")]
    )
    store.write_messages("bob:1", [ChatMessage.from_user("Hi")])
    return store


def names(store):
    return {info.chat_history_id for info in store.list_chat_histories().items}


def damage(path, content=DAMAGED):
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE chat_messages SET content = ? WHERE role = 'assistant'", (content,))
    connection.close()


# ------------------------------------------------------------------ every command, on every engine


def test_every_command_works_on_every_engine(any_url, run, run_json, tmp_path, request):
    at = ("--store", any_url)
    store = filled(any_url, namespace="default")
    store.write_messages("every kind", list(sample_messages().values()))
    total = store.count_messages("every kind") + 7

    assert [line["chat_history_id"] for line in run_json("ls", *at)] == ["every kind", "bob:1", "ada:2", "ada:1"]
    assert [line["position"] for line in run_json("show", "ada:1", "-n", 2, *at)] == [2, 3]
    assert run_json("stats", *at)[0]["messages"] == total
    assert run_json("title", "bob:1", "Greeting", *at)[0]["title"] == "Greeting"
    if "redis" in request.node.name:  # a server without a search of its own
        assert run("search", "chrysanthemum", *at)[:2] == (1, "")
    else:
        assert [line["chat_history_id"] for line in run_json("search", "chrysanthemum", *at)] == ["ada:2"]
    assert run_json("export", "--output", tmp_path / "all.jsonl", *at) == [moved(4, total)]
    assert run_json("copy", "--to-namespace", "copy", *at) == [moved(4, total)]
    assert run_json("delete", "bob:1", "--yes", *at) == [{"chat_histories": 1}]
    assert run_json("import", tmp_path / "all.jsonl", *at) == [moved(1, 1, skipped=total - 1)]
    assert run_json("delete", "--prefix", "ada:", "--yes", *at) == [{"chat_histories": 2}]
    assert run_json("doctor", *at) == []
    assert run_json("purge", "--older-than", "0h", "--yes", *at) == [{"chat_histories": 2}]
    assert run("ls", *at) == (0, "", "")

    assert [line["message_count"] for line in run_json("ls", "--namespace", "copy", "--prefix", "ada", *at)] == [2, 4]
    assert run("delete", "--prefix", "ada", "--yes", "--vacuum", "--namespace", "copy", *at)[0] == 0


def moved(chat_histories, messages, skipped=0):
    return {"chat_histories": chat_histories, "messages": messages, "skipped": skipped, "faults": []}


# ------------------------------------------------------------------ ls


def test_ls_prints_one_history_a_line_for_programs(url, run):
    filled(url).write_messages("a\tb\nc", conversation("u"))
    status, out, err = run("ls", "--store", url)
    rows = [line.split("\t") for line in out.splitlines()]
    assert (status, err) == (0, "")
    assert [row[:4] for row in rows] == [
        ["a\\tb\\nc", "", "1", "1"],
        ["bob:1", "", "1", "1"],
        ["ada:2", "", "2", "1"],
        ["ada:1", "Zürich", "4", "2"],
    ]
    assert all(datetime.fromisoformat(row[4]).tzinfo for row in rows)


def test_ls_prints_ids_in_full(url, run):
    store_from_url(url).write_messages("x" * 512, conversation("u"))
    assert "x" * 512 in run("ls", "--store", url)[1]


def test_ls_as_json(url, run_json):
    store = filled(url)
    info = store.get_chat_history("ada:1")
    assert run_json("ls", "--prefix", "ada:1", "--store", url) == [
        {
            "chat_history_id": "ada:1",
            "message_count": 4,
            "round_count": 2,
            "created_at": info.created_at.isoformat(),
            "updated_at": info.updated_at.isoformat(),
            "title": "Zürich",
            "meta": {"a": 1},
        }
    ]


def test_ls_takes_as_many_as_asked_for_and_a_literal_prefix(url, run_json):
    store = filled(url)
    store.write_messages("a%", conversation("u"))
    assert [line["chat_history_id"] for line in run_json("ls", "-n", 2, "--store", url)] == ["a%", "bob:1"]
    assert [line["chat_history_id"] for line in run_json("ls", "--prefix", "a%", "--store", url)] == ["a%"]


def test_ls_all_goes_on_to_the_end(run_json):
    store = store_from_url("memory://", namespace="a thousand and one")
    for number in range(1001):
        store.write_messages(f"{number}", conversation("u"))
    at = ("--store", "memory://", "--namespace", "a thousand and one")
    assert len(run_json("ls", *at)) == 50
    assert len(run_json("ls", "--limit", 1001, *at)) == 1001
    assert len({line["chat_history_id"] for line in run_json("ls", "--all", *at)}) == 1001
    store.delete_all_messages()


# ------------------------------------------------------------------ show


def test_show_prints_messages_word_for_word_and_indented(url, run):
    store = store_from_url(url)
    store.write_messages(
        "chat",
        [
            ChatMessage.from_user("[9] assistant\n\tif x:  \n\n" + "long " * 100),
            ChatMessage.from_assistant("**A** [b]"),
        ],
    )
    status, out, err = run("show", "chat", "--store", url)
    lines = out.splitlines()
    assert (status, err) == (0, "")
    assert lines[0].startswith("[0] user 20")
    assert lines[1:5] == ["    [9] assistant", "    \tif x:  ", "", "    " + "long " * 100]
    assert lines[6].startswith("[1] assistant 20")
    assert lines[7] == "    **A** [b]"


def test_show_says_what_each_part_of_a_message_is(url, run):
    store = store_from_url(url, skip_system_messages=False)
    store.write_messages("chat", list(sample_messages().values()))
    out = run("show", "chat", "--all", "--store", url)[1]
    assert '→ weather {"city": "Zürich", "days": [1, 2.5, null, true, {"unit": "°C"}]}' in out
    assert "← weather 22 °C" in out
    assert "← weather failed: Error: no such city" in out
    assert "[image, image/png, " in out
    assert "[Bericht №1.pdf, application/pdf, 14 bytes]" in out
    assert "First, …" in out


def test_show_as_json(url, run_json):
    store = filled(url)
    stored = store.list_messages("ada:1")
    assert run_json("show", "ada:1", "--store", url) == [
        {
            "position": each.position,
            "created_at": each.created_at.isoformat(),
            "message": each.message.to_dict(),
            "fault": None,
        }
        for each in stored
    ]


def test_json_holds_what_no_terminal_could(url, run_json):
    text = "\x00\x1b\x7f\x9b\u2028\u202e \ud800 \U0001f600"
    number = 10**6000
    store_from_url(url).write_messages("chat", [ChatMessage.from_user(text, meta={"n": number})])
    (line,) = run_json("show", "chat", "--store", url)
    assert line["message"]["content"] == [{"text": text}]
    assert line["message"]["meta"]["n"] == number


def test_json_has_no_control_character_at_all(url, run):
    text = "".join(map(chr, range(0xA0)))
    store_from_url(url).write_messages("chat", [ChatMessage.from_user(text)])
    out = run("show", "chat", "--json", "--store", url)[1]
    assert out.removesuffix("\n").isprintable()


def test_show_pages_by_position(url, run_json):
    store_from_url(url).write_messages("chat", conversation("ua" * 60))
    at = ("--store", url)
    positions = lambda *arguments: [line["position"] for line in run_json("show", "chat", *arguments, *at)]  # noqa: E731
    assert positions() == list(range(100, 120))
    assert positions("--last", 3) == [117, 118, 119]
    assert positions("-n", 3, "--before", 50) == [47, 48, 49]
    assert positions("-n", 3, "--after", 50) == [51, 52, 53]
    assert positions("--all") == list(range(120))
    assert positions("-n", 1, "--before", "9" * 20) == [119]
    assert positions("--after", "9" * 20) == []


def test_a_damaged_message_is_shown_as_such_and_hides_no_other(url, path, run, run_json):
    filled(url)
    damage(path)
    status, out, _ = run("show", "ada:2", "--store", url)
    assert status == 0
    assert "    Why a chrysanthemum?" in out
    assert "    This message is damaged: Its stored text is not that of a message." in out
    first, second = run_json("show", "ada:2", "--store", url)
    assert first["fault"] is None
    assert (second["message"], second["fault"]) == (None, "Its stored text is not that of a message.")


def test_show_of_no_history_fails(url, run):
    filled(url)
    assert run("show", "nobody", "--store", url) == (1, "", "Error: There is no chat history 'nobody'.\n")


# ------------------------------------------------------------------ search, stats, title


def test_search_prints_one_hit_a_line_for_programs(url, run, run_json):
    filled(url)
    assert run("search", "CHRYSANTHEMUM", "--store", url) == (0, "ada:2\t0\tWhy a chrysanthemum?\n", "")
    (hit,) = run_json("search", '"a chrysanthemum"', "--in", "ada:2", "--store", url)
    assert hit.pop("score") is not None
    assert len(hit.pop("message_id")) == 32
    assert hit == {"chat_history_id": "ada:2", "position": 0, "snippet": "Why a chrysanthemum?"}


def test_search_keeps_to_a_history_a_prefix_and_a_number(url, run_json):
    filled(url)
    count = lambda *arguments: len(run_json("search", "text", *arguments, "--store", url))  # noqa: E731
    assert count() == 4
    assert count("-n", 3) == 3
    assert count("--in", "ada:1") == count("--prefix", "ada:") == 4
    assert count("--in", "ada:2") == count("--prefix", "bob:") == 0


def test_a_search_without_hits_is_no_failure(url, run):
    filled(url)
    assert run("search", "nothing like it", "--store", url) == (0, "", "")


def test_stats_draw_days_and_sizes(url, path, run, run_json):
    filled(url)
    today = datetime.now(timezone.utc).date()
    with sqlite3.connect(path) as connection:  # three messages of the day before yesterday
        connection.execute(
            "UPDATE chat_messages SET created_at = created_at - 2 * 86400000000 WHERE message_key IN "
            "(SELECT message_key FROM chat_messages ORDER BY message_key LIMIT 3)"
        )
    connection.close()
    status, out, _ = run("stats", "--store", url)
    lines = out.splitlines()
    assert status == 0
    assert lines[0].split() == ["chat", "histories", "3"]
    assert f"{today - timedelta(2)}  3 " + "█" * 30 in lines
    assert f"{today - timedelta(1)}  0 " in lines
    assert f"{today}  4 " + "█" * 40 in lines
    assert f"{today - timedelta(1)}" not in run("stats", "--days", 1, "--store", url)[1]
    (totals,) = run_json("stats", "--store", url)
    assert totals.pop("size") >= path.stat().st_size > 0
    assert totals == {
        "chat_histories": 3,
        "messages": 7,
        "rounds": 4,
        "messages_per_day": {str(today - timedelta(2)): 3, str(today): 4},
        "chat_histories_by_message_count": {"1": 3},
    }


def test_stats_of_an_empty_store(run):
    status, out, err = run("stats", "--store", "memory://", "--namespace", "nothing")
    assert (status, err) == (0, "")
    assert out.split() == ["chat", "histories", "0", "messages", "0", "rounds", "0"]


def test_a_title_is_shown_set_and_cleared(url, run):
    store = filled(url)
    at = ("--store", url)
    assert run("title", "ada:1", *at) == (0, "Zürich\n", "")
    assert run("title", "ada:1", "[red]" + "x" * 200, *at) == (0, "[red]" + "x" * 200 + "\n", "")
    assert store.get_chat_history("ada:1").title == "[red]" + "x" * 200
    assert run("title", "ada:1", "--clear", *at) == (0, "", "")
    assert store.get_chat_history("ada:1").title is None
    assert run("title", "nobody", "x", *at)[0] == run("title", "nobody", *at)[0] == 1


# ------------------------------------------------------------------ export, import, copy


def test_an_export_to_the_standard_output_can_be_imported(url, tmp_path):
    filled(url)
    exported = subprocess.run(command("export", "--prefix", "ada:", "--store", url), capture_output=True, check=True)
    assert exported.stderr == b"Exported 2 chat histories with 6 messages.\n"
    (tmp_path / "ada.jsonl").write_bytes(exported.stdout)
    target = f"sqlite:///{tmp_path / 'target.db'}"
    imported = subprocess.run(
        command("import", tmp_path / "ada.jsonl", "--store", target), capture_output=True, check=True
    )
    assert imported.stdout == b"Imported 2 chat histories with 6 messages.\n"
    assert names(store_from_url(target)) == {"ada:1", "ada:2"}


def test_an_export_is_of_the_histories_named_and_in_the_format_asked_for(url, run, tmp_path):
    filled(url)
    status, out, _ = run("export", "ada:2", "bob:1", "-o", tmp_path / "x.html", "--format", "html", "--store", url)
    assert (status, out) == (0, "Exported 2 chat histories with 3 messages.\n")
    assert "Why a chrysanthemum?" in (tmp_path / "x.html").read_text()


def test_what_an_export_leaves_out_makes_it_fail_and_hides_nothing(url, path, run, run_json, tmp_path):
    filled(url)
    damage(path)
    status, out, err = run("export", "-o", tmp_path / "all.jsonl", "--store", url)
    assert (status, out) == (1, "Exported 3 chat histories with 4 messages.\n")
    assert err.count("fault") == 3
    assert "ada:2 1: " in err
    (report,) = run_json("export", "-o", tmp_path / "all.jsonl", "--store", url, status=1)
    assert [(fault["chat_history_id"], fault["position"]) for fault in report["faults"]] == [
        ("ada:1", 1),
        ("ada:1", 3),
        ("ada:2", 1),
    ]


def test_an_import_makes_the_database_and_can_be_run_again(url, run, tmp_path):
    filled(url)
    file, target = tmp_path / "all.jsonl", f"sqlite:///{tmp_path / 'new.db'}"
    run("export", "-o", file, "--store", url)
    assert run("import", file, "--store", target)[1] == "Imported 3 chat histories with 7 messages.\n"
    again = run("import", file, "--store", target)
    assert again == (0, "Imported 0 chat histories with 0 messages, 7 were there already.\n", "")


def test_a_damaged_file_is_not_imported(url, run, tmp_path):
    filled(url)
    file, target = tmp_path / "all.jsonl", f"sqlite:///{tmp_path / 'new.db'}"
    run("export", "-o", file, "--store", url)
    file.write_bytes(file.read_bytes()[:-40])
    status, out, err = run("import", file, "--store", target)
    assert (status, out) == (1, "")
    assert err.startswith("Error: ")
    assert names(store_from_url(target)) == set()


def test_a_copy_makes_the_database_and_is_of_what_was_named(url, run, tmp_path):
    filled(url)
    target = f"sqlite:///{tmp_path / 'new.db'}"
    assert run("copy", "ada:1", "--to", target, "--to-namespace", "of ada", "--store", url)[0] == 0
    assert names(store_from_url(target, namespace="of ada")) == {"ada:1"}
    assert run("copy", "--to", target, "--store", url)[1] == "Copied 3 chat histories with 7 messages.\n"
    assert names(store_from_url(target)) == {"ada:1", "ada:2", "bob:1"}


# ------------------------------------------------------------------ delete, purge


@pytest.mark.parametrize(
    "arguments", [("delete", "ada:1"), ("delete", "--prefix", "ada"), ("purge", "--older-than", "0d")]
)
def test_nothing_is_deleted_when_nobody_can_be_asked(url, run, arguments):
    store = filled(url)
    status, out, err = run(*arguments, "--store", url)
    assert (status, out) == (2, "")
    assert "--yes" in err
    assert names(store) == {"ada:1", "ada:2", "bob:1"}


def test_of_several_histories_none_is_deleted_if_one_is_not_there(url, run):
    store = filled(url)
    assert run("delete", "ada:1", "nobody", "--yes", "--store", url)[0] == 1
    assert names(store) == {"ada:1", "ada:2", "bob:1"}


def test_an_id_is_no_prefix(url, run):
    store = filled(url)
    store.write_messages("ada:11", conversation("u"))
    assert run("delete", "ada:1", "--yes", "--store", url)[1] == "Deleted 1 chat history.\n"
    assert names(store) == {"ada:11", "ada:2", "bob:1"}


def test_deleting_what_is_not_there_by_prefix_needs_no_answer(url, run):
    filled(url)
    assert run("delete", "--prefix", "nobody", "--store", url) == (
        0,
        "Deleted 0 chat histories.\n",
        "",
    )


@pytest.mark.parametrize("arguments", [("ada:2",), ("--prefix", "ada:2")])
def test_after_a_vacuum_the_file_has_nothing_left_of_what_was_deleted(url, path, run, arguments):
    filled(url, search=True).close()
    run("search", "chrysanthemum", "--store", url)
    assert b"chrysanthemum" in path.read_bytes()
    assert run("delete", *arguments, "--yes", "--vacuum", "--store", url)[0] == 0
    for file in path.parent.iterdir():
        assert b"chrysanthemum" not in file.read_bytes(), file


@pytest.mark.parametrize(
    ("older_than", "left"),
    [
        ("3d", {"ada:1", "ada:2", "bob:1"}),
        ("1d", {"ada:2", "bob:1"}),
        ("24h", {"ada:2", "bob:1"}),
        ("1w", {"ada:1", "ada:2", "bob:1"}),
        ("2001-01-01", {"ada:1", "ada:2", "bob:1"}),
        ("2001-01-01T00:00:00Z", {"ada:1", "ada:2", "bob:1"}),
        ("2999-01-01", set()),
    ],
)
def test_purge_deletes_what_has_not_changed_since(url, path, run, older_than, left):
    store = filled(url)
    with sqlite3.connect(path) as connection:
        connection.execute(
            "UPDATE chat_histories SET updated_at = updated_at - 2 * 86400000000 WHERE chat_history_id = 'ada:1'"
        )
    connection.close()
    assert run("purge", "--older-than", older_than, "--yes", "--store", url)[0] == 0
    assert names(store) == left


# ------------------------------------------------------------------ doctor


def test_the_doctor_reports_repairs_and_says_by_its_status_whether_all_is_well(url, path, run, run_json, tmp_path):
    filled(url)
    at = ("--store", url)
    assert run("doctor", *at) == (0, "No faults.\n", "")
    damage(path)
    status, out, _ = run("doctor", *at)
    assert status == 1
    assert "ada:2 1: Its stored text is not that of a message." in out
    assert out.endswith("3 faults, 3 not repaired.\n")
    assert run("doctor", "--repair", *at)[0] == 1
    repaired = run_json("doctor", "--repair", "--salvage", tmp_path / "salvage.jsonl", *at)
    assert repaired[2] == {
        "chat_history_id": "ada:2",
        "position": 1,
        "description": "Its stored text is not that of a message.",
        "is_repaired": True,
    }
    saved = [json.loads(line)["content"] for line in (tmp_path / "salvage.jsonl").read_text().splitlines()]
    assert saved == [DAMAGED] * 3
    assert run("doctor", *at)[0] == 0


def test_a_damaged_message_is_found_saved_and_removed_on_every_engine(any_url, run_json, tmp_path):
    store = store_from_url(any_url)
    rows = [MessageRow(0, 1, "a", "user", DAMAGED), MessageRow(1, 1, "b", "user", encode_message(user(), "b"))]
    store._run(store._import, HistoryRow("chat", 2, 2, 1, 1, None, None), [rows], 0)
    at = ("--store", any_url)

    assert [line["fault"] is None for line in run_json("show", "chat", *at)] == [False, True]
    assert [fault["position"] for fault in run_json("doctor", *at, status=1)] == [0]
    run_json("doctor", "--repair", "--salvage", tmp_path / "salvage.jsonl", *at)

    assert json.loads(json.loads((tmp_path / "salvage.jsonl").read_text())["content"]) == json.loads(DAMAGED)
    assert [line["position"] for line in run_json("show", "chat", *at)] == [1]
    assert store.count_messages("chat") == 1
    assert run_json("doctor", *at) == []


# ------------------------------------------------------------------ what goes wrong


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
        ("search",),
        ("search", "x" * 2000),
        ("title", "x", "y", "--clear"),
        ("title", "ada:1", "x" * 2000),
        ("export", "x", "--prefix", "y"),
        ("export", "--format", "nonsense"),
        ("export", "--json"),
        ("import",),
        ("import", "no such file"),
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


def test_the_store_comes_from_the_environment_too(url, run, monkeypatch):
    filled(url)
    status, _, err = run("ls")
    assert status == 2
    assert "--store URL" in err
    assert "HAYSTACK_CHAT_STORE_URL" in err
    monkeypatch.setenv("HAYSTACK_CHAT_STORE_URL", url)
    assert run("ls")[0] == 0
    assert run("ls", "--store", "memory://", "--namespace", "empty") == (0, "", "")


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
    assert run(*arguments, "--store", "sqlite:///chta.db") == (1, "", "Error: There is no file chta.db.\n")
    assert list(tmp_path.iterdir()) == []


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
    ],
)
def test_wrong_use_shows_no_password_either(run, arguments):
    status, _, err = run(*arguments)
    assert status == 2
    assert "cr" not in err.replace("extra", "").replace("script", "")


def test_a_file_that_cannot_be_written_is_an_error(url, run, tmp_path):
    filled(url)
    status, _, err = run("export", "-o", tmp_path / "no folder" / "x.jsonl", "--store", url)
    assert status == 1
    assert "No such file or directory" in err
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


# ------------------------------------------------------------------ the process


def command(*arguments):
    return [sys.executable, "-m", "haystack_chat_store", *map(str, arguments)]


def test_it_is_installed_as_a_command_of_its_own():
    program = os.path.join(os.path.dirname(sys.executable), "haystack-chat-store")
    for start in ([program], command()):
        result = subprocess.run([*start, "--help"], capture_output=True, text=True, check=True)
        assert "Usage: haystack-chat-store" in result.stdout


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra_it_says_what_to_install(missing):
    code = f"""
import sys
sys.modules[{missing!r}] = None
from haystack_chat_store.cli import main
main(["ls"])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "haystack-chat-store[cli]" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_package_itself_needs_neither_typer_nor_rich():
    code = """
import sys
import haystack_chat_store, haystack_chat_store.doctor, haystack_chat_store.transfer
imported = set(sys.modules)
sys.modules.update(typer=None, rich=None)
import haystack_chat_store.cli
print("haystack_chat_store.cli.app" in imported, "typer" in imported)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False False\n"


@pytest.mark.parametrize("arguments", [("show", "long", "--all"), ("ls", "--all", "--json"), ("export",)])
def test_whoever_reads_may_stop_reading(url, arguments):
    store = store_from_url(url, durability="normal")
    store.write_messages("long", [ChatMessage.from_user("word " * 1000) for _ in range(200)])
    for number in range(200):
        store.write_messages("x" * 400 + str(number), conversation("u"))
    process = subprocess.Popen(
        command(*arguments, "--store", url), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(60) in (0, 1)


def test_text_that_the_encoding_does_not_have_is_printed_all_the_same(url):
    store_from_url(url).write_messages("chat", [ChatMessage.from_user("Zürich 京都 \ud800")])
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    for arguments in (("show", "chat"), ("ls",), ("stats",)):
        subprocess.run(
            command(*arguments, "--store", url), check=True, capture_output=True, env=environment, encoding="ascii"
        )


# ------------------------------------------------------------------ completion


@pytest.fixture
def completed(run, monkeypatch):
    """
    Return what bash is offered for the last of these words.
    """

    def completed(url, *words):
        monkeypatch.setenv("_HAYSTACK_CHAT_STORE_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", " ".join(["haystack-chat-store", *words]))
        monkeypatch.setenv("COMP_CWORD", str(len(words)))
        monkeypatch.setenv("HAYSTACK_CHAT_STORE_URL", url)
        _, out, err = run()
        assert err == ""
        return out.split()

    return completed


def test_the_shell_completes_commands_and_ids(url, completed):
    store = filled(url)
    store.write_messages("ada:\x1b[31m", conversation("u"))
    assert completed(url, "sh") == ["show"]
    assert set(completed(url, "show", "ada")) == {"ada:1", "ada:2"}
    assert completed("", "show", "--store", url, "b") == ["bob:1"]
    assert completed(url, "title", "--namespace", "other", "b") == []


@pytest.mark.parametrize("url", ["", "nonsense", "sqlite:///missing.db", "redis://127.0.0.1:1"])
def test_completion_is_quiet_about_errors(url, completed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert completed(url, "show", "x") == []
    assert list(tmp_path.iterdir()) == []
