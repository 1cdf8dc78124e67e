# SPDX-License-Identifier: Apache-2.0
"""`doctor` reports and mends."""

import json

from filled_stores import DAMAGED, damage, filled

from haystack_chat_store.stores import faults


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
        "count": 1,
    }
    saved = [json.loads(line)["content"] for line in (tmp_path / "salvage.jsonl").read_text().splitlines()]
    assert saved == [DAMAGED] * 3
    assert run("doctor", *at)[0] == 0


def test_the_doctor_counts_the_faults_that_it_does_not_list(url, path, run, monkeypatch):
    monkeypatch.setattr(faults, "MAX_FAULTS_OF_KIND", 1)
    filled(url)
    damage(path)
    _, out, _ = run("doctor", "--store", url)
    assert "There are 2 more such faults: Its stored text is not that of a message." in out
    assert out.endswith("3 faults, 3 not repaired.\n")
