# SPDX-License-Identifier: Apache-2.0
"""Servers that crash at a commit, forget the transaction, and give its number to another one."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import psycopg
import pytest
from gateways import Gateway
from haystack.document_stores.types import DuplicatePolicy
from postgres_stores import ENGINES, NEWEST, execute, said, say, stores_on
from servers import PostgresServer, wait_until

from haystack_chat_store.errors import StoreUnavailableError
from haystack_chat_store.testing.messages import with_id

COMMITTING = "SELECT pid, backend_xid::text::bigint FROM pg_stat_activity WHERE wait_event = 'advisory'"


@pytest.fixture(scope="module")
def server():
    """A server that writes its log as late as it may, for all but commits."""
    with PostgresServer(ENGINES.get(NEWEST), fsync="off", autovacuum="off", wal_writer_delay="10s") as server:
        yield server


@pytest.fixture
def gateway(server):
    with Gateway(server.port) as gateway:
        yield gateway


@pytest.fixture
def store(server, gateway):
    """A store whose transactions wait at their commit while another connection holds the lock `1`."""
    with stores_on(gateway.url(server.url), last_k=None) as make:
        store = make()
        say(store, "before", history="another")
        waits = f"{store.schema_name}.waits"
        execute(
            server.url,
            f"CREATE FUNCTION {waits}() RETURNS trigger LANGUAGE plpgsql AS "
            "'BEGIN PERFORM pg_advisory_xact_lock_shared(1); RETURN NULL; END'",
            f"CREATE CONSTRAINT TRIGGER waits AFTER INSERT OR UPDATE OR DELETE "
            f"ON {store.schema_name}.haystack_chat_histories DEFERRABLE INITIALLY DEFERRED FOR EACH ROW "
            f"EXECUTE FUNCTION {waits}()",
        )
        yield store


def crash(server, how, pid):
    """End the whole server, or one of its processes, after which it ends the others and starts them again."""
    if how == "server":
        server.kill()
        server.start()
    else:
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: server.log.read_text().count("all server processes terminated") > server.crashes, "a crash")
        server.crashes += 1
        wait_until(server._answers, "the server to recover")


@pytest.fixture
def call_at_a_crash(server, gateway):
    """Make a call whose server crashes at the commit. Before its caller hears of it, others have used the number."""
    server.crashes = server.log.read_text().count("all server processes terminated")

    def make(how, call):
        with ThreadPoolExecutor(1) as executor:
            with closing(psycopg.connect(server.url, autocommit=True)) as other:
                other.execute("SELECT pg_advisory_lock(1)")
                made = executor.submit(call)
                wait_until(lambda: other.execute(COMMITTING).fetchone(), "the commit")
                ((pid, number),) = other.execute(COMMITTING).fetchall()
                gateway.forget()
                crash(server, how, pid)
            while server.execute("SELECT txid_current()")[0][0] <= number:
                pass
            assert server.execute("SELECT txid_status(%s)", [number]) == [("committed",)]
            gateway.cut()
            return made.result()

    return make


both_crashes = pytest.mark.parametrize("how", ["server", "process"])


@both_crashes
def test_messages_are_stored_though_another_transaction_has_their_number(store, call_at_a_crash, calls, how):
    messages = [with_id("a", "a"), with_id("b", "b")]
    assert call_at_a_crash(how, lambda: calls.write(store, "history", messages)) == 2
    assert said(store) == ["a", "b"]
    calls.close(store)


@pytest.mark.parametrize("change", ["write once", "update", "delete", "replace", "rename"])
def test_a_change_is_not_taken_for_made_because_another_transaction_has_its_number(
    store, call_at_a_crash, calls, change
):
    """The caller hears that it is not known, and may call again."""
    calls.write(store, "history", [with_id("a", "a"), with_id("b", "b")])
    before = store.get_chat_history("history"), said(store)
    change = {
        "write once": lambda: calls.write(store, "history", [with_id("c", "c")], policy=DuplicatePolicy.FAIL),
        "update": lambda: calls.call(store, "update_chat_history", "history", title="A title"),
        "delete": lambda: calls.call(store, "delete_messages", "history"),
        "replace": lambda: calls.call(store, "replace_messages", "history", "b", [with_id("c", "c")]),
        "rename": lambda: calls.call(store, "rename_chat_history", "history", "renamed"),
    }[change]
    with pytest.raises(StoreUnavailableError):
        call_at_a_crash("server", change)
    assert (store.get_chat_history("history"), said(store)) == before
    change()
    assert (store.get_chat_history("history"), said(store)) != before
    calls.close(store)
