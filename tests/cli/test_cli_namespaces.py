# SPDX-License-Identifier: Apache-2.0
"""A result that is empty says in which namespaces there is something; `namespaces` lists them; titles are found."""

import pytest
from filled_stores import filled

from haystack_chat_store import store_from_url

HINT = "The namespace default is empty. There are chat histories in: my_app, tests. Choose one: --namespace NAME\n"
EMPTY_RESULTS = [
    ("ls",),
    ("ls", "--json"),
    ("ls", "--prefix", "ada"),
    ("search", "zürich"),
    ("stats",),
    ("export",),
    ("export", "--format", "markdown"),
    ("copy", "--to-namespace", "other"),
    ("delete", "--prefix", "ada", "--yes"),
    ("purge", "--older-than", "1d", "--yes"),
    ("doctor",),
]


@pytest.mark.parametrize("arguments", EMPTY_RESULTS, ids=" ".join)
def test_an_empty_result_says_in_which_namespaces_there_is_something(url, run, arguments):
    for namespace in ("tests", "my_app"):
        filled(url, namespace=namespace, search=True).close()
    status, _, err = run(*arguments, "--store", url)
    assert status == 0
    assert HINT in err
    assert "are chat histories in" not in run(*arguments, "--store", url, "--namespace", "my_app")[2]


def test_an_empty_result_in_a_namespace_that_is_not_empty_says_no_more(url, run):
    filled(url, search=True).close()
    filled(url, namespace="other").close()
    for arguments in (("ls", "--prefix", "x"), ("search", "x"), ("purge", "--older-than", "1d", "--yes")):
        assert "are chat histories in" not in run(*arguments, "--store", url)[2]


def test_of_many_namespaces_the_first_are_named(url, run):
    for number in range(12):
        filled(url, namespace=f"{number:02}").close()
    named = ", ".join(f"{number:02}" for number in range(10))
    assert f"There are chat histories in: {named} and 2 more." in run("ls", "--store", url)[2]


def test_namespaces_are_listed(any_url, run, run_json):
    store = store_from_url(any_url)
    for namespace in ("tests", "my\tapp"):
        filled(any_url, namespace=namespace).close()
    listed = set(store.list_namespaces())
    assert {"my\tapp", "tests"} <= listed
    assert {"my\\tapp", "tests"} <= set(run("namespaces", "--store", any_url)[1].splitlines())
    assert [line["namespace"] for line in run_json("namespaces", "--store", any_url)] == sorted(listed)
    for namespace in ("tests", "my\tapp"):
        store_from_url(any_url, namespace=namespace).delete_all_messages()


def test_search_finds_titles_and_beginnings_of_words(url, run, run_json):
    filled(url, search=True).close()
    assert run("search", "zürich", "--store", url)[:2] == (0, "ada:1\ttitle\tZürich\n")
    assert run("search", "zür", "--store", url)[1] == ""
    assert run("search", "zür", "--match-prefix", "--store", url)[1] == "ada:1\ttitle\tZürich\n"
    assert [line["position"] for line in run_json("search", "chrys", "--match-prefix", "--store", url)] == [0]
    (title,) = run_json("search", "zürich", "--store", url)
    assert (title["message_id"], title["position"], title["role"]) == (None, None, None)
