# SPDX-License-Identifier: Apache-2.0
"""The command line shows users, previews and usage, and with --user only one user's histories."""

import json

import pytest
from haystack.dataclasses import ChatMessage

from haystack_chat_store import SQLiteChatMessageStore
from haystack_chat_store.cli import main


@pytest.fixture
def run(tmp_path, capsys):
    url = f"sqlite:///{tmp_path}/chat.db"
    store = SQLiteChatMessageStore(tmp_path / "chat.db", durability="normal", search=True)
    usage = {"prompt_tokens": 1000, "completion_tokens": 5, "total_tokens": 1005}
    for user_id in ("ada", "bob"):
        store.for_user(user_id).write_messages(
            f"of {user_id}",
            [
                ChatMessage.from_user(f"A secret of {user_id}"),
                ChatMessage.from_assistant("Noted.", meta={"usage": usage, "model": "small"}),
            ],
        )
    store.write_messages("of all", [ChatMessage.from_user("A secret of all")])

    def run(*arguments, status=0):
        with pytest.raises(SystemExit) as ended:
            main([*arguments, "--store", url])
        captured = capsys.readouterr()
        assert ended.value.code == status, captured.err
        return captured.out

    run.store = store
    yield run
    store.close()


def test_list_names_users_and_previews(run):
    rows = [line.split("\t") for line in run("ls").splitlines()]
    assert [(row[0], row[5], row[6]) for row in rows] == [
        ("of all", "", "A secret of all"),
        ("of bob", "bob", "A secret of bob"),
        ("of ada", "ada", "A secret of ada"),
    ]
    (history,) = map(json.loads, run("ls", "--user", "ada", "--json").splitlines())
    assert (history["user_id"], history["preview"], history["last_message"]["text"]) == (
        "ada",
        "A secret of ada",
        "Noted.",
    )


def test_statistics_show_the_tokens_of_each_model(run):
    assert run("stats").count("2,010") == 1
    assert run("stats", "--user", "ada").count("1,005") == 1
    assert json.loads(run("stats", "--user", "bob", "--json"))["usage"]["small"]["total_tokens"] == 1005


@pytest.mark.parametrize(
    "command",
    [
        ["show", "of bob"],
        ["title", "of bob"],
        ["title", "of bob", "mine"],
        ["delete", "of bob", "--yes"],
        ["export", "of bob"],
        ["copy", "of bob", "--to-namespace", "other"],
    ],
    ids=" ".join,
)
def test_no_command_reaches_the_history_of_another_user(run, command):
    before = run.store.get_chat_history("of bob")
    run(*command, "--user", "ada", status=1)
    assert run.store.get_chat_history("of bob") == before


def test_commands_on_many_histories_take_only_the_users(run, tmp_path):
    assert "bob" not in run("search", "secret", "--user", "ada")
    assert "bob" not in run("export", "--user", "ada")
    run("copy", "--user", "ada", "--to-namespace", "other")
    run("delete", "--prefix", "of", "--user", "ada", "--yes")
    assert [info.chat_history_id for info in run.store.list_chat_histories().items] == ["of all", "of bob"]
    run("purge", "--older-than", "2026-01-01", "--prefix", "of", "--user", "bob", "--yes")
    assert run.store.count_messages("of bob") == 2
    run("delete", "--user", "bob", "--yes")
    assert [info.chat_history_id for info in run.store.list_chat_histories().items] == ["of all"]
    (copied,) = map(json.loads, run("ls", "--namespace", "other", "--json").splitlines())
    assert (copied["chat_history_id"], copied["user_id"]) == ("of ada", "ada")


def test_what_is_exported_and_imported_keeps_its_user(run, tmp_path):
    file = tmp_path / "export.jsonl"
    run("export", "--output", str(file))
    run("import", str(file), "--namespace", "all")
    found = map(json.loads, run("ls", "--namespace", "all", "--json").splitlines())
    assert {each["chat_history_id"]: each["user_id"] for each in found} == {
        "of all": None,
        "of ada": "ada",
        "of bob": "bob",
    }
    run("import", str(file), "--namespace", "hers", "--user", "eve")
    assert {
        each.user_id for each in SQLiteChatMessageStore(run.store.path, namespace="hers").list_chat_histories().items
    } == {"eve"}
