# SPDX-License-Identifier: Apache-2.0
"""`delete` and `purge` delete what was named, after asking, and nothing else."""

import sqlite3
from contextlib import closing
from functools import partial

import pytest
from filled_stores import age, branched, filled, names

from haystack_chat_store import SQLiteChatMessageStore
from haystack_chat_store.cli.histories import with_branches
from haystack_chat_store.cli.options import open_store
from haystack_chat_store.ids import branch_id
from haystack_chat_store.testing.messages import conversation


@pytest.mark.parametrize(
    "arguments", [("delete", "ada:1"), ("delete", "--prefix", "ada"), ("purge", "--older-than", "1d")]
)
def test_nothing_is_deleted_when_nobody_can_be_asked(url, path, run, arguments):
    store = filled(url)
    age(path, 2, "ada:1")
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


def test_branches_that_go_with_a_named_history_are_counted(url, run_json):
    store, branch = branched(url)
    store.copy_messages(branch, branch_id(branch, "again"), meta={"branch_of": branch})
    assert run_json("delete", "h", branch, "--yes", "--store", url) == [{"chat_histories": 3}]
    assert store.list_chat_histories(branches=True).items == []


def test_branches_of_another_user_stay_and_are_not_counted(url, run_json):
    store, branch = branched(url)
    store.update_chat_history(branch, user_id="bob")
    assert run_json("delete", "h", "--yes", "--store", url) == [{"chat_histories": 1}]
    assert [each.chat_history_id for each in store.list_chat_histories(branches=True).items] == [branch]


def test_the_branches_are_looked_for_once_if_nobody_is_asked(url, run, monkeypatch):
    branched(url)
    calls = []

    def counted(store, history):
        calls.append(history.chat_history_id)
        return with_branches(store, history)

    monkeypatch.setattr("haystack_chat_store.cli.erasing.with_branches", counted)
    assert run("delete", "h", "--yes", "--store", url)[0] == 0
    assert calls == ["h"]


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


@pytest.mark.parametrize("arguments", [("ada:2",), ("--prefix", "ada:2")])
def test_a_vacuum_that_fails_says_that_the_deletions_are_done(url, path, run, monkeypatch, arguments):
    store = filled(url)
    monkeypatch.setattr("haystack_chat_store.cli.erasing.open_store", partial(open_store, timeout=0.2))
    with closing(sqlite3.connect(path)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM haystack_chat_messages").fetchone()
        status, out, err = run("delete", *arguments, "--yes", "--vacuum", "--store", url)
    assert (status, out) == (1, "")
    assert "The histories were deleted" in err
    assert names(store) == {"ada:1", "bob:1"}


@pytest.mark.parametrize(
    ("older_than", "left"),
    [
        ("3d", {"ada:1", "ada:2", "bob:1"}),
        ("1d", {"ada:2", "bob:1"}),
        ("24h", {"ada:2", "bob:1"}),
        ("1w", {"ada:1", "ada:2", "bob:1"}),
        ("2001-01-01", {"ada:1", "ada:2", "bob:1"}),
        ("2001-01-01T00:00:00Z", {"ada:1", "ada:2", "bob:1"}),
        ("2001-01-01 00:00", {"ada:1", "ada:2", "bob:1"}),
        ("2001-01-01T00:00:00+02:00", {"ada:1", "ada:2", "bob:1"}),
    ],
)
def test_purge_deletes_what_has_not_changed_since(url, path, run, older_than, left):
    store = filled(url)
    age(path, 2, "ada:1")
    assert run("purge", "--older-than", older_than, "--yes", "--store", url)[0] == 0
    assert names(store) == left


@pytest.mark.parametrize("older_than", ["0h", "0d", "000w", "2999-01-01", "9999-12-31T23:59:59Z"])
def test_purge_refuses_what_would_leave_nothing(url, run, older_than):
    store = filled(url)
    status, _, err = run("purge", "--older-than", older_than, "--yes", "--store", url)
    assert status == 2
    assert "not in the past" in err
    assert names(store) == {"ada:1", "ada:2", "bob:1"}


@pytest.mark.parametrize(
    "older_than",
    ["20010131", "2001-W05-3", "2001-01", "2001-02-30", "2001-01-31T", "2001-01-31T12", "٢d", "1.5d", "-1d"],
)
def test_an_age_is_of_one_form_on_every_version_of_python(url, run, older_than):
    status, _, err = run("purge", "--older-than", older_than, "--yes", "--store", url)
    assert status == 2
    assert "such as 90d, 36h or 2w" in err


@pytest.mark.parametrize("arguments", [("delete", "--prefix", "ada"), ("purge", "--older-than", "1d")])
def test_what_is_not_asked_about_is_not_listed_first(url, path, run, arguments, monkeypatch):
    filled(url)
    age(path, 2, "ada:1", "ada:2")
    monkeypatch.setattr(SQLiteChatMessageStore, "list_chat_histories", None)
    assert run(*arguments, "--yes", "--store", url)[1] == "Deleted 2 chat histories.\n"
