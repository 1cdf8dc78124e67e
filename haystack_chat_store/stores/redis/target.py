# SPDX-License-Identifier: Apache-2.0
"""What a URL says, and which part of it is wrong."""

import re
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, parse_qs, unquote, urlencode, urlsplit, urlunsplit

from redis.connection import Connection, parse_url

from haystack_chat_store.errors import StoreConfigurationError
from haystack_chat_store.stores.redis.failures import Address

_FORM = (
    "It must be like redis://user:password@host:6379/0, rediss:// for TLS, unix:///path for a socket, or "
    "redis+sentinel://user:password@host:26379,host:26379/0?service=name."
)
_ENCODE = "Percent-encode what is not a letter or a digit in the user name and the password."
_WRONG_VALUE = re.compile("Invalid value for [`']([a-z_]+)[`']")
_SENTINEL_PORT = 26379
_SENTINEL_OPTIONS = ("service", "sentinel_username", "sentinel_password")
_TLS_ADVICE = "For TLS, write rediss://."


@dataclass(frozen=True, kw_only=True)
class Target:
    """
    Where a URL leads.

    :param url: A URL as redis-py takes it. Of several addresses, it has the first.
    :param addresses: The server, a node of the cluster, or the Sentinels.
    :param service: The name by which Sentinels know the master, or `None` without Sentinels.
    :param sentinel_options: User name and password for the Sentinels.
    """

    url: str = field(repr=False)
    addresses: tuple[Address, ...]
    service: str | None = None
    sentinel_options: dict[str, Any] = field(default_factory=dict, repr=False)


def parsed(text: str, *, cluster: bool) -> Target:
    """
    Take a URL apart.

    :param text: The URL.
    :param cluster: Whether it leads to a cluster.
    :raises StoreConfigurationError: If it cannot be used. The error names the wrong part, and no password.
    """
    try:
        url = urlsplit(text)
        if url.fragment or "@" in url.path + url.query:  # the end of a password that is not percent-encoded
            raise _refused(_ENCODE)
        if url.scheme in ("redis+sentinel", "rediss+sentinel"):
            if cluster:
                raise _refused("Sentinels do not watch clusters: leave out cluster=True.")
            return _of_sentinels(url)
        if url.scheme in ("redis+cluster", "rediss+cluster"):
            scheme = url.scheme.partition("+")[0]
            raise _refused(f"Give the store cluster=True and write {scheme}://, or make it by store_from_url.")
        return Target(url=text, addresses=(_address_of(text),))
    except ValueError:  # which may quote the password
        raise _refused(f"{_FORM} {_ENCODE}") from None


def _of_sentinels(url: SplitResult) -> Target:
    user, at, hosts = url.netloc.rpartition("@")
    addresses = []
    for host in hosts.split(","):
        parts = urlsplit(f"//{host}")
        if not parts.hostname:
            raise _refused("One of its Sentinels has no host.")
        addresses.append(Address(parts.hostname, _port(parts) or _SENTINEL_PORT))
    options = parse_qs(url.query, keep_blank_values=True)
    service, user_name, password = (options.pop(name, [""])[0] for name in _SENTINEL_OPTIONS)
    if not service:
        raise _refused("The name of the service is missing: ?service=name, as in sentinel monitor name …")
    first = f"[{addresses[0].host}]" if ":" in addresses[0].host else addresses[0].host
    netloc = f"{user}{at}{first}:{addresses[0].port}"
    of_master = urlunsplit((url.scheme.partition("+")[0], netloc, url.path, urlencode(options, doseq=True), ""))
    _address_of(of_master)
    return Target(
        url=of_master,
        addresses=tuple(addresses),
        service=service,
        sentinel_options={"username": user_name or None, "password": password or None, "db": 0},
    )


def _address_of(text: str) -> Address:
    url = urlsplit(text)
    _port(url)
    if url.scheme != "unix" and not (url.path in ("", "/") or unquote(url.path).strip("/").isdigit()):
        raise _refused("The database behind the slash must be a number, such as 0.")
    try:
        options = parse_url(text)  # type: ignore[no-untyped-call]  # redis-py has no types for it
    except ValueError as error:
        named = _WRONG_VALUE.match(str(error))
        raise _refused(
            f"The value of its option {named[1]!r} cannot be used." if named else f"{_FORM} {_ENCODE}"
        ) from None
    options.pop("max_connections", None)
    connection_class: Any = options.pop("connection_class", Connection)
    try:
        connection = connection_class(**options)
    except TypeError:
        raise _refused(_wrong_option(connection_class, options)) from None
    path = getattr(connection, "path", None)
    return Address(path) if path else Address(connection.host, connection.port)


def _wrong_option(connection_class: Any, options: dict[str, Any]) -> str:
    for name, value in options.items():
        try:
            connection_class(**{name: value})
        except TypeError:
            advice = _TLS_ADVICE if name.startswith(("ssl", "tls")) else "Leave it out."
            return f"redis-py's connections have no option {name!r}. {advice}"
        except ValueError:
            continue
    return "Its options do not go together."


def _port(url: SplitResult) -> int | None:
    try:
        return url.port
    except ValueError:  # which may quote the end of a password
        raise _refused(f"The port must be a number. {_ENCODE}") from None


def _refused(what: str) -> StoreConfigurationError:
    return StoreConfigurationError(f"The url cannot be used. {what}")
