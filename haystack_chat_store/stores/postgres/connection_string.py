# SPDX-License-Identifier: Apache-2.0
"""Parses connection strings, and says which part of one is wrong."""

import re
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import Conninfo

from haystack_chat_store.errors import StoreConfigurationError
from haystack_chat_store.urls import without_driver

#: The schema of the tables where neither the store nor the connection string names one.
DEFAULT_SCHEMA = "public"

_FORM = "It must be like postgresql://user:password@host:port/database."
# Of the options for the server: -c search_path=app, -csearch_path=app or --search_path=app. A backslash escapes.
_SEARCH_PATH = re.compile(r"(?:-c\s*|--)search_path\s*=\s*((?:\\.|\S)+)")
_SCHEMA_ADVICE = "For a schema, give the store its schema_name, or write ?options=-csearch_path%3Dname."
_POOL_ADVICE = "The size of the pool is the store's max_pool_size."
# Advice about the options of other drivers.
_ADVICE = {
    "ssl": "For TLS, write ?sslmode=require, or verify-full.",
    **dict.fromkeys(("schema", "currentschema", "search_path"), _SCHEMA_ADVICE),
    **dict.fromkeys(("pool_size", "max_overflow", "connection_limit", "max_pool_size"), _POOL_ADVICE),
    **dict.fromkeys(
        ("pgbouncer", "statement_cache_size", "prepared_statement_cache_size", "prepare_threshold"),
        "Behind a pooler, the store needs no option.",
    ),
    **dict.fromkeys(("timeout", "command_timeout", "pool_timeout"), "The timeout is a setting of the store."),
}


class ConnectionString(NamedTuple):
    """
    A connection string that libpq understands.

    :param text: The string in libpq's form.
    :param parts: Its parts, by libpq's keywords.
    :param schema_name: The first schema of its `search_path`, if it has one.
    """

    text: str
    parts: dict[str, Any]
    schema_name: str | None


def parsed(connection_string: str) -> ConnectionString:
    """
    Take a connection string apart.

    :param connection_string: A URL, with or without the name of a driver in its scheme, or `key=value` pairs.
    :raises StoreConfigurationError: If libpq does not understand it. The error names the wrong part, and no password.
    """
    text = without_driver(connection_string)
    try:
        parts: dict[str, Any] = conninfo_to_dict(text)
    except psycopg.ProgrammingError:
        # Without its cause, which quotes the connection string.
        raise StoreConfigurationError(f"The connection string cannot be used. {_wrong_part(text)}") from None
    if "@" in str(parts.get("host", "")) or not str(parts.get("port", 0)).replace(",", "").isdigit():
        raise StoreConfigurationError(f"The connection string cannot be used. {_wrong_part(text)}")
    return ConnectionString(text, parts, _schema_name(str(parts.get("options") or "")))


def _wrong_part(text: str) -> str:
    try:
        url = urlsplit(text)
        is_whole = not url.fragment and "@" not in url.path + url.query and url.netloc.count("@") < 2
        names = [name for name, _ in parse_qsl(url.query, keep_blank_values=True)] if is_whole else []
    except ValueError:
        url, is_whole, names = urlsplit(""), False, []
    known = {option.keyword.decode() for option in Conninfo.get_defaults()}
    for name in names:
        if name not in known:
            return f"libpq has no option {name!r}. {_ADVICE.get(name.lower(), 'Leave it out.')}"
    if "@" in text and not (is_whole and _has_sound_ports(url.netloc)):
        # Most likely part of a password, which errors must not repeat.
        return "Percent-encode what is neither letter nor digit in its password, such as %40 for @."
    return _FORM


def _has_sound_ports(netloc: str) -> bool:
    ports = (host.rpartition("]")[2].partition(":")[2] for host in netloc.rpartition("@")[2].split(","))
    return all(port.isdigit() for port in ports if port)


def _schema_name(options: str) -> str | None:
    found = _SEARCH_PATH.findall(options)
    for listed in re.sub(r"\\(.)", r"\1", found[-1]).split(",") if found else ():
        name = listed.strip()
        unquoted = name[1:-1].replace('""', '"') if name.startswith('"') else name.lower()
        if unquoted and unquoted != "$user":
            return unquoted
    return None
