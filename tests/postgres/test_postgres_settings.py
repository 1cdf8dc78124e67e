# SPDX-License-Identifier: Apache-2.0
"""Settings of the store, and what the role of a database may do."""

import os
import re
import traceback
import uuid
from urllib.parse import quote

import psycopg
import pytest
from haystack.utils import Secret
from postgres_stores import DOCUMENTATION, execute, say, store_at
from servers import PASSWORD, USER, PostgresServer, wait_until

from haystack_chat_store.doctor import check
from haystack_chat_store.errors import StoreConfigurationError, StoreUnavailableError, UnsupportedOperationError
from haystack_chat_store.stores.postgres import PostgresChatMessageStore
from haystack_chat_store.testing.kit import Calls, texts
from haystack_chat_store.testing.messages import conversation, with_id
from haystack_chat_store.transfer import export_histories

# ---------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "setting",
    [
        {"connection_string": "postgresql://localhost/db"},
        {"schema_name": ""},
        {"schema_name": "x" * 64},
        {"schema_name": "a\x00b"},
        {"table_prefix": ""},
        {"table_prefix": "x" * 41},
        {"table_prefix": "a\x00b"},
        {"table_prefix": "app.chat"},
        {"min_pool_size": -1},
        {"min_pool_size": 3, "max_pool_size": 2},
        {"min_pool_size": None},
        {"min_pool_size": True},
        {"max_pool_size": 0},
        {"max_pool_size": "10"},
        {"max_pool_size": 2.5},
        {"timeout": 0},
        {"timeout": True},
        {"timeout": float("nan")},
        {"timeout": float("inf")},
        {"timeout": "30"},
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_name(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        PostgresChatMessageStore(**setting)


def test_a_store_without_its_environment_variable_loads_and_says_so_when_used(monkeypatch, calls):
    monkeypatch.delenv("PG_CONN_STR", raising=False)
    store = PostgresChatMessageStore(table_prefix="other", timeout=5)
    assert PostgresChatMessageStore.from_dict(store.to_dict()) == store
    assert "CREATE TABLE" in store.create_schema_sql()
    with pytest.raises(StoreConfigurationError, match="PG_CONN_STR"):
        calls.count(store, "history")
    calls.close(store)


@pytest.mark.parametrize("way", ["sync", "async"])
def test_a_connection_string_that_changes_leaves_no_connection_behind(server, monkeypatch, way):
    store = PostgresChatMessageStore(Secret.from_env_var("ROTATING"), schema_name=f"test_{uuid.uuid4().hex}")
    calls = Calls(is_async=way == "async")

    def names():
        statement = "SELECT application_name FROM pg_stat_activity WHERE application_name LIKE %s"
        return [name for (name,) in server.execute(statement, [f"{store.schema_name}-%"])]

    for number in range(5):
        monkeypatch.setenv("ROTATING", f"{server.url}?application_name={store.schema_name}-{number}")
        assert calls.write(store, "history", [with_id("a"), with_id(f"{number}")]) == (1 if number else 2)
        wait_until(lambda last=f"{store.schema_name}-{number}": names() == [last], "the former connection to be closed")
    monkeypatch.delenv("ROTATING")
    calls.close(store)
    wait_until(lambda: not names(), "the last connection to be closed")
    calls.end()


def test_a_connection_string_that_changes_leads_to_another_database(server, database, monkeypatch, calls):
    store = PostgresChatMessageStore(Secret.from_env_var("ROTATING"), schema_name=f"test_{uuid.uuid4().hex}")
    monkeypatch.setenv("ROTATING", server.url)
    assert calls.write(store, "history", [with_id("a")]) == 1
    monkeypatch.setenv("ROTATING", database)
    assert calls.count(store, "history") == 0
    monkeypatch.setenv("ROTATING", server.url)
    assert calls.count(store, "history") == 1
    calls.close(store)


def test_a_connection_string_that_is_not_utf_8_is_refused_and_not_repeated(monkeypatch, calls):
    monkeypatch.setenv("PG_CONN_STR", "postgresql://user:secr\udce4t@127.0.0.1/db")
    with pytest.raises(StoreConfigurationError, match="UTF-8") as caught:
        calls.count(PostgresChatMessageStore(), "chat")
    assert "secr" not in "".join(traceback.format_exception(caught.value))


def test_a_password_is_never_serialized():
    with pytest.raises(ValueError, match="serialize"):
        store_at("postgresql://user:password@localhost/db").to_dict()


@pytest.mark.parametrize(
    "connection_string",
    [
        "not a connection string my-secret",
        "postgresql://user:pass@my-secret@localhost/db",  # where the password has an unescaped @
        "postgresql://user:pass@my:secret@localhost:5432/db",
        "postgresql://user:my-secret/pass@localhost/db",
        "postgresql://user:password@localhost:my-secret/db",
    ],
)
def test_a_connection_string_that_is_none_is_refused_and_not_repeated(connection_string):
    with pytest.raises(StoreConfigurationError, match="connection string") as raised:
        store_at(connection_string).count_messages("history")
    assert "secret" not in "".join(traceback.format_exception(raised.value)).replace(connection_string, "")


@pytest.mark.parametrize(
    ("connection_string", "says"),
    [
        ("postgresql://u:my-secret@localhost/db?ssl=require", "no option 'ssl'.*sslmode=require"),
        ("postgresql://u:my-secret@localhost/db?sslmode=require&pool_size=5", "no option 'pool_size'.*max_pool_size"),
        ("postgresql://u:my-secret@localhost/db?pgbouncer=true&connection_limit=1", "no option 'pgbouncer'.*no option"),
        ("postgresql://u:my-secret@localhost/db?schema=app", "no option 'schema'.*schema_name"),
        ("postgresql://u:my-secret@localhost/db?search_path=app", "no option 'search_path'.*options=-csearch_path"),
        ("postgresql://u:my-secret@localhost/db?colour=my-secret", "no option 'colour'. Leave it out"),
        ("postgresql+asyncpg://u:my-secret@localhost/db?colour", "no option 'colour'"),
        ("postgresql://u:p@ss:my-secret/rd#%?@localhost/db?colour=blue", "Percent-encode"),
        ("postgresql+mysql://u:my-secret@localhost/db", "must be like"),
        ("mysql://u:my-secret@localhost/db", "must be like"),
    ],
)
def test_the_wrong_part_of_a_connection_string_is_named(connection_string, says, calls):
    store = store_at(connection_string)
    with pytest.raises(StoreConfigurationError, match=says) as raised:
        calls.count(store, "history")
    assert "secret" not in "".join(traceback.format_exception(raised.value)).replace(connection_string, "")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("/postgres", "/nowhere", "does not have the database.*nowhere"),
        (f"{USER}:", "nobody:", "refused the user name or the password"),
        (f":{PASSWORD}@", "@", "asks for a password"),
        ("/postgres", "/postgres?sslmode=require", "has no TLS.*sslmode"),
        ("/postgres", "/postgres?sslmode=perhaps", "TLS settings.*sslmode.*perhaps"),
        ("/postgres", "/postgres?options=-cnothing%3D1", "refused the options.*nothing"),
        ("/postgres", "/postgres?target_session_attrs=any-other", "one of whose values is wrong.*target_session_attrs"),
    ],
)
def test_what_a_retry_does_not_change_is_an_error_of_configuration(server, calls, monkeypatch, old, new, says):
    for name in [name for name in os.environ if name.startswith("PG")]:
        monkeypatch.delenv(name)
    with pytest.raises(StoreConfigurationError, match=says) as raised:
        calls.count(store_at(server.url.replace(old, new)), "history")
    assert PASSWORD not in str(raised.value)


def test_a_server_that_takes_only_tls_says_so():
    with PostgresServer(fsync="off") as server, psycopg.connect(server.url) as connection:
        (server.folder / "data" / "pg_hba.conf").write_text("hostssl all all all scram-sha-256\n")
        connection.execute("SELECT pg_reload_conf()")

        def is_refused():
            with pytest.raises(StoreConfigurationError, match=r"does not admit this user.*no encryption"):
                store_at(server.url, schema_name=f"test_{uuid.uuid4().hex}").count_messages("history")
            return True

        wait_until(lambda: suppressed(is_refused), "the server to read its rules")


def suppressed(check):
    try:
        return check()
    except pytest.fail.Exception:  # it is admitted still
        return False


# ---------------------------------------------------------------------- schemas and encodings


@pytest.mark.parametrize(
    ("options", "schema"),
    [
        ("-csearch_path=app1", "app1"),
        ("-c search_path=App2,public", "app2"),
        ("-cjit=off --search_path=app3", "app3"),
        (r'-csearch_path="$user",\ "App\ 4",public', "App 4"),
        ("-cjit=off", "public"),
    ],
)
@pytest.mark.parametrize("form", ["postgresql", "postgresql+psycopg", "pairs"])
def test_the_schema_of_the_connection_string_is_that_of_the_tables(server, database, calls, form, options, schema):
    url = psycopg.conninfo.make_conninfo(database, options=options)
    if form != "pairs":
        url = f"{database.replace('postgresql', form, 1)}?options={quote(options)}"
    store = store_at(url)
    assert f'"{schema}"' in store.create_schema_sql()
    assert calls.write(store, "history", [with_id("a")]) == 1
    found = "SELECT schemaname FROM pg_tables WHERE tablename = 'haystack_chat_messages'"
    assert execute(database, found) == [(schema,)]
    other = store_at(url, schema_name="other")
    assert calls.count(other, "history") == 0
    assert store_at(url, schema_name=schema).count_messages("history") == 1
    calls.close(store)
    calls.close(other)


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
@pytest.mark.parametrize("way", ["directly", "behind PgBouncer"])
def test_a_database_that_is_not_utf_8_is_refused_when_it_is_opened(server, pooler, calls, encoding, way):
    name = f"test_{uuid.uuid4().hex}"
    execute(server.url, f"CREATE DATABASE {name} ENCODING '{encoding}' TEMPLATE template0 LOCALE 'C'")
    url = (server if way == "directly" else pooler).url.replace("/postgres", f"/{name}")
    store = store_at(url)
    for _ in range(2):
        with pytest.raises(StoreConfigurationError, match=f"{name}.*{encoding}.*UTF8"):
            calls.write(store, "history", [with_id("a", "hello")])
    calls.close(store)
    assert execute(url, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'") == []
    server.drop_database(server.url.replace("/postgres", f"/{name}"))


HOSTILE = ["Ünïcode", "a b", 'quoted"name', "it's; DROP TABLE x; --", "100%s", "%(key)s", "{0}", "{histories}", "\\"]


@pytest.mark.parametrize("name", HOSTILE)
def test_any_name_can_be_that_of_schema_and_tables(make_store, calls, server, name):
    store = make_store(schema_name=f"{name} {uuid.uuid4().hex[:8]}", table_prefix=name)
    assert calls.write(store, "history", conversation("uaua")) == 4
    assert calls.write(store, "history", [with_id("a"), with_id("a")]) == 1
    assert len(calls.retrieve(store, "history", last_k=1)) == 1
    assert calls.count(store, "history") == 5
    names = "SELECT tablename FROM pg_tables WHERE schemaname = %s ORDER BY 1"
    found = [table for (table,) in server.execute(names, [store.schema_name])]
    assert found == [f"{name}_{table}" for table in ("histories", "messages", "namespaces", "version")]
    calls.delete_all(store)


@pytest.mark.parametrize("name", HOSTILE)
def test_the_schema_for_an_administrator_takes_any_name(make_store, server, name):
    store = make_store(schema_name=f"{name} {uuid.uuid4().hex[:8]}", table_prefix=name)
    execute(server.url, store.create_schema_sql())
    assert say(store, "Hello") == 1


def test_the_longest_prefix_leaves_the_names_of_tables_whole(make_store):
    store, other = make_store(table_prefix="x" * 40), make_store(table_prefix="x" * 39 + "y")
    assert say(store, "Hello") == 1
    assert other.count_messages("history") == 0


# ---------------------------------------------------------------------- rights


@pytest.fixture
def restricted(database):
    """The URL of a role that owns nothing and may create nothing."""
    role = f"chatbot_{uuid.uuid4().hex[:8]}"
    execute(database, f"CREATE ROLE {role} LOGIN PASSWORD '{PASSWORD}'", "REVOKE CREATE ON SCHEMA public FROM public")
    yield database.replace(f"{USER}:", f"{role}:")
    execute(database, f"DROP OWNED BY {role}", f"DROP ROLE {role}")


@pytest.mark.parametrize("settings", [{}, {"schema_name": "chatbot"}], ids=["no tables", "no schema"])
def test_a_role_that_may_not_create_the_tables_is_told_what_to_do(restricted, calls, settings):
    with pytest.raises(StoreConfigurationError, match=r"permission denied.*create_schema_sql\(\)"):
        calls.write(store_at(restricted, **settings), "history", conversation("ua"))


@pytest.mark.parametrize("missing", ["UPDATE", "SELECT", "USAGE"])
def test_a_role_that_may_not_do_something_with_the_tables_is_told_what_it_lacks(restricted, database, calls, missing):
    administrator, store = store_at(database, schema_name="chatbot"), store_at(restricted, schema_name="chatbot")
    say(administrator, "Hello")
    administrator.close()
    role = psycopg.conninfo.conninfo_to_dict(restricted)["user"]
    rights = {"UPDATE": ["USAGE", "SELECT"], "SELECT": ["USAGE"], "USAGE": []}[missing]
    if "USAGE" in rights:
        execute(database, f"GRANT USAGE ON SCHEMA chatbot TO {role}")
    if "SELECT" in rights:
        execute(database, f"GRANT SELECT ON ALL TABLES IN SCHEMA chatbot TO {role}")
    with pytest.raises(StoreConfigurationError, match=f"permission denied.*grant.*{missing}") as raised:
        calls.call(store, "update_chat_history", "history", title="new")
    assert "create_schema_sql" not in str(raised.value)
    calls.close(store)


@pytest.mark.parametrize("search", [False, True], ids=["without index", "with index"])
def test_a_role_that_may_only_read_can_read_everything(restricted, database, calls, tmp_path, search):
    role = psycopg.conninfo.conninfo_to_dict(restricted)["user"]
    administrator = store_at(database, schema_name="chatbot", search=search)
    say(administrator, "Hello")
    execute(
        database,
        f"GRANT USAGE ON SCHEMA chatbot TO {role}",
        f"GRANT SELECT ON ALL TABLES IN SCHEMA chatbot TO {role}",
        f"ALTER ROLE {role} SET default_transaction_read_only = on",
    )
    store = store_at(restricted, schema_name="chatbot", search=True)
    for _ in range(2):
        assert texts(calls.retrieve(store, "history")) == ["Hello"]
        assert calls.count(store, "history") == calls.call(store, "statistics").messages == 1
        assert calls.call(store, "get_chat_history", "history").message_count == 1
        assert len(calls.call(store, "list_chat_histories", prefix="h").items) == 1
        assert len(calls.iterate(store, "history")) == 1
        assert export_histories(store, tmp_path / "export.jsonl").messages == 1
        assert check(store) == []
        if search:
            assert len(calls.call(store, "search_messages", "hello")) == 1
        else:
            with pytest.raises(UnsupportedOperationError, match="haystack-chat-store index"):
                calls.call(store, "search_messages", "hello")
    with pytest.raises(StoreUnavailableError, match=r"permission denied|(?i:read-?only)"):
        calls.write(store, "history", conversation("u"))
    for each in (store, administrator):
        each.close()


def test_a_role_that_may_not_turn_search_on_is_told_what_to_do(restricted, database, calls):
    role = psycopg.conninfo.conninfo_to_dict(restricted)["user"]
    administrator = store_at(database, schema_name="chatbot")
    rights = re.search(r"```sql\n(GRANT.*?)```", DOCUMENTATION, re.DOTALL)[1].replace("my_app", role)
    execute(database, administrator.create_schema_sql(), rights.replace("public", "chatbot"))
    store = store_at(restricted, schema_name="chatbot", search=True)
    assert calls.count(store, "history") == 0
    with pytest.raises(StoreConfigurationError, match=r"must be owner.*create_schema_sql\(\)"):
        calls.write(store, "history", conversation("u"))
    calls.close(store)


def test_a_role_without_rights_to_create_uses_what_an_administrator_has_made(restricted, database, calls):
    store = store_at(restricted, schema_name="chatbot")
    role = psycopg.conninfo.conninfo_to_dict(restricted)["user"]
    # What the documentation tells the administrator, for this role.
    rights = re.search(r"```sql\n(GRANT.*?)```", DOCUMENTATION, re.DOTALL)[1].replace("my_app", role)
    own_table = "CREATE TABLE chatbot.of_the_application (secret text)"
    execute(database, store.create_schema_sql(), own_table, rights.replace("public", "chatbot"))
    changed = "INSERT", "UPDATE", "DELETE"
    for table, permitted in (
        ("haystack_chat_histories", {"SELECT", *changed}),
        ("haystack_chat_messages", {"SELECT", *changed}),
        ("haystack_chat_namespaces", {"SELECT", *changed}),
        ("haystack_chat_version", {"SELECT"}),
        ("of_the_application", set()),
    ):
        may = "SELECT name FROM unnest(%s::text[]) AS name WHERE has_table_privilege(%s, %s, name)"
        with psycopg.connect(database) as connection:
            found = connection.execute(may, [["SELECT", *changed, "TRUNCATE"], role, f"chatbot.{table}"])
            assert {name for (name,) in found} == permitted
    assert calls.write(store, "history", [with_id("a"), with_id("b")]) == 2
    assert calls.write(store, "history", [with_id("b"), with_id("c")]) == 1
    assert len(calls.retrieve(store, "history")) == calls.count(store, "history") == 3
    calls.delete(store, "history")
    calls.delete_all(store)
    calls.close(store)
