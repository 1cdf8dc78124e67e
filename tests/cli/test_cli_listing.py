# SPDX-License-Identifier: Apache-2.0
"""`ls`, `stats` and `title` tell what there is, for people and for programs."""

import sys
from datetime import datetime, timedelta, timezone
from time import tzset

import pytest
from filled_stores import branched, change, filled

from haystack_chat_store import store_from_url
from haystack_chat_store.testing.messages import conversation


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
            "revision": 1,
            "created_at": info.created_at.isoformat(),
            "updated_at": info.updated_at.isoformat(),
            "title": "Zürich",
            "meta": {"a": 1},
            "user_id": None,
            "preview": info.preview,
            "last_message": info.last_message.to_dict(),
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


def test_stats_draw_days_and_sizes(url, path, run, run_json):
    filled(url)
    today = datetime.now(timezone.utc).date()
    change(  # three messages of the day before yesterday
        path,
        "UPDATE haystack_chat_messages SET created_at = created_at - 2 * 86400000000 WHERE message_key IN "
        "(SELECT message_key FROM haystack_chat_messages ORDER BY message_key LIMIT 3)",
    )
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
        "usage": {},
        "usage_per_day": {},
        "chat_histories_by_message_count": {"1": 3},
    }


def test_stats_of_an_empty_store(run):
    status, out, _ = run("stats", "--store", "memory://", "--namespace", "nothing")
    assert status == 0
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


def test_stats_name_the_size_as_what_it_is(url, run):
    filled(url)
    assert "database size" in run("stats", "--prefix", "nobody", "--store", url)[1]


def test_stats_draw_no_days_before_the_first_that_has_something(url, path, run):
    filled(url)
    change(path, "UPDATE haystack_chat_messages SET created_at = 0 WHERE role = 'assistant'")
    out = run("stats", "--store", url)[1]
    assert f"{datetime.now(timezone.utc).date()}  4 " in out
    assert out.count("-") == 2


@pytest.mark.parametrize("time", ["0001-01-01T00:00:00+00:00", "9999-12-31T23:59:59+00:00"])
@pytest.mark.parametrize("zone", ["Pacific/Kiritimati", "Pacific/Pago_Pago", "UTC"])
def test_times_at_the_ends_of_the_calendar_are_shown(url, path, run, monkeypatch, time, zone):
    filled(url)
    since_1970 = datetime.fromisoformat(time) - datetime(1970, 1, 1, tzinfo=timezone.utc)
    change(path, "UPDATE haystack_chat_messages SET created_at = ?", since_1970 // timedelta(microseconds=1))
    change(path, "UPDATE haystack_chat_histories SET updated_at = ?", since_1970 // timedelta(microseconds=1))
    monkeypatch.setenv("TZ", zone)
    tzset()
    try:
        for is_terminal in (False, True):
            monkeypatch.setattr(sys.stdout, "isatty", lambda answer=is_terminal: answer)
            for arguments in (("ls",), ("show", "ada:1"), ("stats",)):
                status, out, err = run(*arguments, "--store", url)
                assert (status, err) == (0, "")
                assert time[:4] in out
    finally:
        monkeypatch.undo()
        tzset()


def test_a_title_is_never_empty(url, run):
    store = filled(url)
    for title in ("", "  "):
        status, _, err = run("title", "ada:1", title, "--store", url)
        assert status == 2
        assert "--clear" in err
    assert store.get_chat_history("ada:1").title == "Zürich"


def test_branches_are_listed_found_and_counted_if_asked_for(url, run, run_json):
    _, branch = branched(url)
    run("index", "--store", url)
    listed = [
        [each["chat_history_id"] for each in run_json("ls", "--store", url, *more)] for more in ([], ["--branches"])
    ]
    assert [set(each) for each in listed] == [{"h"}, {"h", branch}]
    assert run_json("search", "lavender", "--store", url, status=0) == []
    (hit,) = run_json("search", "lavender", "--branches", "--store", url)
    assert hit["chat_history_id"] == branch
    assert run_json("stats", "--store", url)[0]["chat_histories"] == 1
    counted = run_json("stats", "--branches", "--store", url)[0]
    assert counted["chat_histories"] == 2
    assert counted["chat_histories_by_message_count"] == {"1": 2}  # 1 to 9
