# SPDX-License-Identifier: Apache-2.0
"""What a file holds, which files are refused, and that there is never half a one."""

import json
import os
import stat

import pytest
from transferred import MOMENT, content, digest, everything, in_progress, joined, moved, put

from haystack_chat_store import (
    DamagedFileError,
)
from haystack_chat_store.stores.rows import HistoryRow, MessageRow
from haystack_chat_store.testing.messages import user
from haystack_chat_store.transfer import (
    EXPORT_FORMATS,
    copy_histories,
    export_histories,
    import_histories,
)

# ---------------------------------------------------------------------- the format


def test_a_file_is_what_the_documentation_says(store, file):
    put(store, "one", "Grüezi", title="Ein “Titel”", meta='{"a":[1,2]}')
    put(store, "two")
    time = "2026-01-01T00:00:00.000001+00:00"
    times = f'"created_at":"{time}","updated_at":"{time}"'

    assert export_histories(store, file) == moved(2, 1, 0, ())

    lines = ['{"format":"haystack-chat-store","version":1}']
    lines.append(f'{{"chat_history":{{"id":"one","title":"Ein “Titel”","meta":{{"a":[1,2]}},{times}}}}}')
    lines.append(f'{{"created_at":"{time}","message":{content("m0", "Grüezi")}}}')
    lines.append(f'{{"end_of_chat_history":{{"messages":1,"sha256":"{digest(lines)}"}}}}')
    lines.append(f'{{"chat_history":{{"id":"two","title":null,"meta":null,{times}}}}}')
    lines.append(f'{{"end_of_chat_history":{{"messages":0,"sha256":"{digest(lines)}"}}}}')
    lines.append(f'{{"end_of_file":{{"chat_histories":2,"messages":1,"sha256":"{digest(lines)}"}}}}')
    assert file.read_bytes() == joined(lines)


def test_a_file_that_another_program_wrote_is_imported(store, file):
    times = '"created_at":"2026-01-01T01:00:00+01:00","updated_at":"2026-01-01T00:00:00.500000+00:00"'
    lines = ['{"format":"haystack-chat-store","version":1}']
    lines.append(f'{{"chat_history":{{"id":"a","title":"T","meta":{{"x":1}},{times}}}}}')
    lines.append(f'{{"created_at":"2026-01-01T00:00:00+00:00","message":{content("m0", "Hi")}}}')
    lines.append(json.dumps({"end_of_chat_history": {"messages": 1, "sha256": digest(lines)}}))
    lines.append(json.dumps({"end_of_file": {"chat_histories": 1, "messages": 1, "sha256": digest(lines)}}))
    file.write_bytes(joined(lines))

    assert import_histories(store, file) == moved(1, 1, 0, ())
    ((row, messages),) = everything(store)
    assert (row.created_at, row.updated_at) == (MOMENT - 1, MOMENT + 499_999)
    assert (row.message_count, row.round_count, row.title, row.meta) == (1, 1, "T", '{"x":1}')
    assert messages == [(MOMENT - 1, "m0", "user", content("m0", "Hi"))]


def test_the_stored_text_is_moved_as_it_is(store, target, file):
    spaced = content("m0", "Hi").replace(":", " :\n ")  # as somebody's own tool may have formatted it
    row = MessageRow(position=0, created_at=MOMENT, message_id="m0", role="user", content=spaced)
    store.engine.run(
        store.engine.import_history,
        store.scope,
        HistoryRow(
            chat_history_id="a",
            message_count=0,
            round_count=0,
            created_at=MOMENT,
            updated_at=MOMENT,
            title=None,
            meta=None,
        ),
        [[row]],
        0,
    )

    export_histories(store, file)
    import_histories(target, file)

    ((_, messages),) = everything(target)
    assert messages[0][3] == spaced.replace("\n", " ")


# ---------------------------------------------------------------------- files are whole or not there


def fails(_done, _total):
    raise RuntimeError("stop")


@pytest.mark.parametrize("name", EXPORT_FORMATS)
def test_an_export_that_fails_leaves_what_was_there(several, file, name):
    file.write_text("before")
    with pytest.raises(RuntimeError, match="stop"):
        export_histories(several, file, format=name, progress=fails)
    assert file.read_text() == "before"
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="only Linux tells which file a descriptor is of")
@pytest.mark.parametrize("name", EXPORT_FORMATS)
def test_an_export_is_on_the_disk_before_it_takes_its_place_and_its_place_is_then(several, file, monkeypatch, name):
    fsync, replace, done = os.fsync, os.replace, []

    def recorded_fsync(descriptor):
        fsync(descriptor)
        done.append(("on the disk", os.readlink(f"/proc/self/fd/{descriptor}"), os.fstat(descriptor).st_size))

    def recorded_replace(source, target):
        replace(source, target)
        done.append(("in its place", source, target))

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    export_histories(several, file, format=name)

    (synced, temporary, size), placed, (synced_too, folder, _) = done
    assert synced == synced_too == "on the disk"
    assert size == file.stat().st_size  # nothing was left in a buffer
    assert placed == ("in its place", temporary, str(file))
    assert folder == str(file.parent)


def test_an_export_takes_the_place_of_what_was_there_behind_a_link_too(several, tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("before")
    link.symlink_to(real)
    export_histories(several, link)
    assert link.is_symlink()
    assert real.read_bytes().startswith(b'{"format"')


def test_an_export_can_be_read_by_its_owner_alone(several, file):
    export_histories(several, file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_what_is_no_file_is_never_replaced(several, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ValueError, match="not a file"):
            export_histories(several, path)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_database_is_never_replaced(several, sqlite):
    several.write_messages("a", [user()])
    copy_histories(several, sqlite)
    for store in (several, sqlite):
        with pytest.raises(ValueError, match="is an SQLite database"):
            export_histories(store, sqlite.path)
    assert everything(sqlite) == everything(several)


@pytest.mark.parametrize("ending", ["-wal", "-shm", "-journal"])
def test_nor_is_what_lies_beside_a_database(several, sqlite, ending):
    several.write_messages("a", [user()])
    copy_histories(several, sqlite)
    for beside in (f"{sqlite.path}{ending}", f"{sqlite.path}{ending}.link"):
        if beside.endswith(".link"):
            os.symlink(f"{sqlite.path}{ending}", beside)
        with pytest.raises(ValueError, match="is a part of an SQLite database"):
            export_histories(several, beside)
    export_histories(several, f"{sqlite.path}.jsonl{ending}")
    assert everything(sqlite) == everything(several)


def test_a_name_as_long_as_the_system_takes_is_taken(several, tmp_path):
    for name in ("a" * 255, "👋" * 63):
        export_histories(several, tmp_path / name)
    assert len(list(tmp_path.iterdir())) == 2


def test_errors_name_the_file_as_the_caller_has(several, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("missing/file", "a" * 256, "file/file"):
        (tmp_path / "file").touch()
        with pytest.raises(OSError) as caught:
            export_histories(several, name)
        assert caught.value.filename == name


def test_a_folder_that_is_missing_is_an_error_of_the_system(several, tmp_path):
    with pytest.raises(FileNotFoundError):
        export_histories(several, tmp_path / "missing" / "file")
    with pytest.raises(FileNotFoundError):
        import_histories(several, tmp_path / "missing")


# ---------------------------------------------------------------------- damaged files


def assert_refused(store, file, data, says=None):
    file.write_bytes(data)
    with pytest.raises(DamagedFileError, match=says):
        import_histories(store, file)
    assert everything(store) == []


@pytest.fixture
def exported(store, file):
    put(store, "a", "zero", "one", title="T", meta='{"a":1}')
    put(store, "b", "zero")
    export_histories(store, file)
    return file.read_bytes()


def test_a_file_that_was_cut_off_anywhere_is_refused(exported, target, file):
    for end in range(len(exported)):
        assert_refused(target, file, exported[:end])


def test_a_file_with_any_byte_changed_is_refused(exported, target, file):
    for place in range(len(exported)):
        for bit in (1, 32):
            changed = bytearray(exported)
            changed[place] ^= bit
            assert_refused(target, file, bytes(changed))


def test_a_file_with_lines_missing_doubled_or_in_another_order_is_refused(exported, target, file):
    lines = exported.splitlines(keepends=True)
    for index in range(len(lines)):
        assert_refused(target, file, b"".join(lines[:index] + lines[index + 1 :]))
        assert_refused(target, file, b"".join([*lines[:index], lines[index], *lines[index:]]))
    assert_refused(target, file, b"".join([*lines[:2], lines[3], lines[2], *lines[4:]]))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: b"", "is not an export of haystack-chat-store"),
        (lambda data: b"\xff\xfe" + data, "is not an export of haystack-chat-store"),
        (lambda data: b'{"role":"user"}\n', "is not an export of haystack-chat-store"),
        (lambda data: data.replace(b'"version":1', b'"version":2'), "has version 2 of the format.*Upgrade"),
        (lambda data: data[:-1], "line 9.*cut off"),
        (lambda data: data + b"\n", "more text after the end of the file"),
        (lambda data: data.replace(b"one", b"eno"), "line 5, the counts or the checksum do not agree"),
        (lambda data: data.replace(b"\n", b"\r\n"), "is damaged|was damaged"),
        (lambda data: data.replace(b"zero", b"z\xffro"), "line 3, the text is not UTF-8"),
        (lambda data: data.replace(b'"id":"b"', b'"id":""'), "line 6, there should be a chat history"),
    ],
)
def test_the_error_says_what_is_wrong_and_where(exported, target, file, change, says):
    assert_refused(target, file, change(exported), says)


TIME = "2026-01-01T00:00:00+00:00"


def history_line(**fields):
    fields = {"title": None, "meta": None, "created_at": TIME, "updated_at": TIME, **fields}
    return json.dumps({"chat_history": fields})


def with_right_checksums(lines):
    """A file of these lines, the ends of the history and of the file added."""
    messages = len(lines) - 2
    lines = [*lines, json.dumps({"end_of_chat_history": {"messages": messages, "sha256": digest(lines)}})]
    lines.append(json.dumps({"end_of_file": {"chat_histories": 1, "messages": messages, "sha256": digest(lines)}}))
    return joined(lines)


@pytest.mark.parametrize(
    ("history", "messages"),
    [
        ({"id": "a" * 513}, []),
        ({"id": ""}, []),
        ({"id": None}, []),
        ({"id": "a\0"}, []),
        ({"title": "t" * 1001}, []),
        ({"title": 5}, []),
        ({"meta": []}, []),
        ({"created_at": "yesterday"}, []),
        ({"created_at": "2026-01-01T00:00:00"}, []),
        # What some versions of Python take for a time, and others do not.
        ({"created_at": "20260101T000000Z"}, []),
        ({"created_at": "2026-W01-4T00:00:00Z"}, []),
        ({"created_at": "2026-01-01T00:00:00,5Z"}, []),
        ({"created_at": "2026-01-01T00:00:00+01"}, []),
        ({"created_at": "2026-01-01x00:00:00Z"}, []),
        ({"created_at": "\uff12\uff10\uff12\uff16-01-01T00:00:00Z"}, []),
        ({"created_at": "2026-13-01T00:00:00Z"}, []),
        ({"updated_at": None}, []),
        ({"updated_at": []}, []),
        ({"updated_at": "0001-01-01T00:00:00+01:00"}, []),
        ({}, [content("m0", "a"), content("m0", "b")]),
        ({}, [content("", "a")]),
        ({}, [content("m" * 513, "a")]),
        ({}, [content("m\\u0000", "a")]),
        ({}, [content("m0", "a").replace('"chat_message_id":"m0"', "")]),
        ({}, [content("m0", "a").replace('"m0"', "5")]),
        ({}, [content("m0", "a").replace("user", "nobody")]),
        ({}, ["{}"]),
        ({}, ['{"a":[{}', "{}]}"]),
        ({}, [content("m0", "a") + "," + content("m1", "a")]),
    ],
)
def test_a_file_that_holds_what_no_store_may_have_is_refused(target, file, history, messages):
    header = ['{"format":"haystack-chat-store","version":1}', history_line(**{"id": "a", **history})]
    lines = [f'{{"created_at":"{TIME}","message":{message}}}' for message in messages]
    assert_refused(target, file, with_right_checksums(header + lines), "was damaged or changed. In line [234], there")


def test_a_history_that_is_there_twice_is_refused(store, target, file):
    put(store, "a", "zero")
    export_histories(store, file)
    lines = file.read_text().splitlines()[:-1]
    lines += lines[1:3]
    lines.append(json.dumps({"end_of_chat_history": {"messages": 1, "sha256": digest(lines)}}))
    lines.append(json.dumps({"end_of_file": {"chat_histories": 2, "messages": 2, "sha256": digest(lines)}}))
    assert_refused(target, file, joined(lines), "line 5, there is a second chat history with the same id")


@pytest.mark.parametrize("first", [0, 9_999, 15_000])
def test_an_id_that_comes_again_after_thousands_of_others_is_found(target, file, first):
    header = ['{"format":"haystack-chat-store","version":1}', history_line(id="a")]
    ids = [*range(20_100), first]
    lines = [f'{{"created_at":"{TIME}","message":{content(f"m{each}", "x")}}}' for each in ids]
    assert_refused(target, file, with_right_checksums(header + lines), "a second message with the same id")
    file.write_bytes(with_right_checksums(header + lines[:-1]))
    assert import_histories(target, file) == moved(1, 20_100, 0, ())


@pytest.mark.parametrize(
    ("text", "microseconds"),
    [
        ("2026-01-01T00:00:00Z", 0),
        ("2026-01-01 01:00:00+01:00", 0),
        ("2025-12-31T18:30:00.5-05:30", 500_000),
        ("2026-01-01T00:00:00.000001Z", 1),
    ],
)
def test_times_may_be_written_as_other_programs_do(target, file, text, microseconds):
    header = ['{"format":"haystack-chat-store","version":1}', history_line(id="a", created_at=text, updated_at=text)]
    line = f'{{"created_at":"{text}","message":{content("m0", "x")}}}'
    file.write_bytes(with_right_checksums([*header, line]))
    import_histories(target, file)
    ((row, messages),) = everything(target)
    assert {row.created_at, row.updated_at, messages[0][0]} == {MOMENT - 1 + microseconds}


def test_errors_never_quote_the_file(exported, target, file):
    for place in range(len(exported)):
        file.write_bytes(exported[:place].replace(b"zero", b"secret") + b"secret" + exported[place:])
        with pytest.raises(DamagedFileError) as caught:
            import_histories(target, file)
        assert "secret" not in str(caught.value)
        assert caught.value.__cause__ is None


def test_a_file_that_changes_while_it_is_imported_adds_no_part_of_a_history(store, target, file):
    put(store, "a", "zero")
    put(store, "b", *["x" * 1000] * 3_000)
    export_histories(store, file)
    place = file.read_bytes().index(b"xxx", 2_500_000)

    def change():
        with file.open("r+b") as stream:
            stream.seek(place)
            stream.write(b"y")

    with pytest.raises(DamagedFileError, match=r"the counts or the checksum.*changed while it was imported"):
        import_histories(target, file, progress=in_progress(change))
    assert [row.chat_history_id for row, _ in everything(target)] == ["a"]
