# SPDX-License-Identifier: Apache-2.0
"""`export`, `import` and `copy` move histories whole, and say what they could not move."""

import gzip

import pytest
from filled_stores import command, damage, filled, names

from haystack_chat_store import store_from_url
from haystack_chat_store.testing.fork_server import run_python


def test_an_export_to_the_standard_output_can_be_imported(url, tmp_path):
    filled(url)
    exported = run_python(command("export", "--prefix", "ada:", "--store", url), capture_output=True, check=True)
    assert exported.stderr == b"Exported 2 chat histories with 6 messages.\n"
    (tmp_path / "ada.jsonl").write_bytes(exported.stdout)
    target = f"sqlite:///{tmp_path / 'target.db'}"
    imported = run_python(command("import", tmp_path / "ada.jsonl", "--store", target), capture_output=True, check=True)
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


def test_an_import_reads_the_standard_input(url, run, tmp_path):
    filled(url)
    run("export", "-o", tmp_path / "all.jsonl", "--store", url)
    exported = (tmp_path / "all.jsonl").read_bytes()
    for number, name in enumerate(("-", "/dev/stdin")):
        target = f"sqlite:///{tmp_path / f'{number}.db'}"
        arguments = command("import", name, "--store", target)
        imported = run_python(arguments, input=exported, capture_output=True, check=True)
        assert imported.stdout == b"Imported 3 chat histories with 7 messages.\n"
        assert names(store_from_url(target)) == {"ada:1", "ada:2", "bob:1"}


def test_a_damaged_standard_input_is_not_imported(url, tmp_path):
    for name, called in (("-", b"The standard input"), ("/dev/stdin", b"/dev/stdin")):
        for format_, wrong in (
            ("jsonl", b" is not an export of haystack-chat-store"),
            ("langchain", b" cannot be read as an SQLite database"),
        ):
            arguments = command("import", name, "--format", format_, "--store", url)
            imported = run_python(arguments, input=b"no export", capture_output=True, check=False)
            assert imported.returncode == 1
            assert imported.stderr.startswith(b"Error: " + called + wrong)
            assert b"haystack-chat-store-" not in imported.stderr
    compressed = run_python(
        command("import", "-", "--store", url), input=gzip.compress(b"text"), capture_output=True, check=False
    )
    assert b"Error: The standard input is compressed" in compressed.stderr


def test_of_a_compressed_file_it_is_said_how_to_import_it(url, run, tmp_path):
    (tmp_path / "all.jsonl.gz").write_bytes(gzip.compress(b"text"))
    status, _, err = run("import", tmp_path / "all.jsonl.gz", "--store", url)
    assert status == 2
    assert "is compressed" in err
    assert "| haystack-chat-store import -" in err


@pytest.mark.parametrize("arguments", [("copy", "--to", "memory://"), ("import", "all.jsonl", "--store", "memory://")])
def test_nothing_is_moved_to_where_it_would_be_gone(url, run, tmp_path, monkeypatch, arguments):
    filled(url)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HAYSTACK_CHAT_STORE_URL", url)
    run("export", "-o", "all.jsonl")
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert "would be gone" in err
