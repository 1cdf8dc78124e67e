# SPDX-License-Identifier: Apache-2.0
"""`show` and `search` print what messages say: all of it, and nothing that could pass for something else."""

from filled_stores import damage, filled
from haystack.dataclasses import ChatMessage

from haystack_chat_store import store_from_url
from haystack_chat_store.json_values import MAX_DIGITS
from haystack_chat_store.testing.messages import conversation, sample_messages


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


def test_show_and_search_print_a_refusal(url, run):
    store = store_from_url(url, search=True)
    store.write_messages("chat", [ChatMessage.from_assistant(meta={"refusal": "I cannot\nhelp\x1b."})])
    assert run("show", "chat", "--store", url)[1].splitlines()[1:3] == ["    Refused: I cannot", "    help\\x1b."]
    assert run("search", "cannot help", "--store", url)[1].startswith("chat\t0\tI cannot help")


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
    number = 10**MAX_DIGITS - 1
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


def test_search_prints_one_hit_a_line_for_programs(url, run, run_json):
    filled(url, search=True)
    assert run("search", "CHRYSANTHEMUM", "--store", url) == (0, "ada:2\t0\tWhy a chrysanthemum?\n", "")
    (hit,) = run_json("search", '"a chrysanthemum"', "--in", "ada:2", "--store", url)
    assert hit.pop("score") is not None
    assert len(hit.pop("message_id")) == 32
    assert hit.pop("created_at").endswith("+00:00")
    assert hit == {"chat_history_id": "ada:2", "position": 0, "role": "user", "snippet": "Why a chrysanthemum?"}


def test_search_keeps_to_a_history_a_prefix_and_a_number(url, run_json):
    filled(url, search=True)
    count = lambda *arguments: len(run_json("search", "text", *arguments, "--store", url))  # noqa: E731
    assert count() == 4
    assert count("-n", 3) == 3
    assert count("--in", "ada:1") == count("--prefix", "ada:") == 4
    assert count("--in", "ada:2") == count("--prefix", "bob:") == 0


def test_a_search_without_hits_is_no_failure(url, run):
    filled(url, search=True)
    assert run("search", "nothing like it", "--store", url) == (0, "", "")
