# SPDX-License-Identifier: Apache-2.0
"""The connections of this process. Stores with equal settings share them."""

import atexit
import ctypes
import hashlib
import os
import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Any, Generic, Protocol, TypeVar

from haystack.utils import Secret

from haystack_chat_store.errors import StoreConfigurationError


class Connections(Protocol):
    """Holds the connections of all stores with the same settings."""

    def close(self) -> None:
        """Close what is idle now, and what is in use as soon as it is given back."""

    def before_fork(self) -> None:
        """Close what a child must not inherit. Connections that a child can simply leave alone may stay."""

    def after_fork_in_parent(self) -> None:
        """Go on after `before_fork`."""

    def after_fork_in_child(self) -> None:
        """Call `keep_alive_forever` for each connection that is still open: it belongs to the parent."""


SettingsT = TypeVar("SettingsT", bound=Hashable)
ConnectionsT = TypeVar("ConnectionsT", bound=Connections)
ResultT = TypeVar("ResultT")


class ConnectionRegistry(Generic[SettingsT, ConnectionsT]):
    """
    The connections of this process, by their settings.

    A forked child starts without any. When the interpreter ends, all are closed.
    """

    def __init__(self, make: Callable[[SettingsT], ConnectionsT]) -> None:
        """
        Start without any.

        :param make: Makes the object that holds the connections for some settings. It opens nothing yet.
        """
        self._make = make
        self._made: dict[SettingsT, ConnectionsT] = {}
        self._alive: weakref.WeakSet[ConnectionsT] = weakref.WeakSet()  # with those closed while in use
        self._lock = threading.RLock()  # a finalizer may run in the middle, and use a store
        atexit.register(self._close_all)
        _registries.append(self)

    def get(self, settings: SettingsT) -> ConnectionsT:
        """Return the connections for these settings."""
        made = self._made.get(settings)
        if made is None:
            with self._lock:
                made = self._made.get(settings)
                if made is None:
                    made = self._made.setdefault(settings, self._make(settings))
                    self._alive.add(made)
        return made

    def all(self) -> list[ConnectionsT]:
        """Return the connections for all settings, with those that were closed while in use."""
        with self._lock:
            return list(self._alive)

    def close(self, settings: SettingsT) -> None:
        """Close the connections for these settings. The next use opens new ones."""
        with self._lock:
            made = self._made.pop(settings, None)
        if made is not None:
            made.close()

    def _close_all(self) -> None:
        for settings in list(self._made):
            self.close(settings)

    def prepare_fork(self, prepared: set[Any]) -> None:
        """
        Prepare what holds connections for a fork, which may have to wait for calls.

        :param prepared: The preparations that were made already. Those that are made now are added.
        """
        for made in self.all():
            if made not in prepared:
                made.before_fork()
                prepared.add(made)

    def hold(self, prepared: set[Any]) -> bool:
        """Let nothing new hold connections until `release`. Return whether all that does is prepared for a fork."""
        self._lock.acquire()
        return prepared.issuperset(self._alive)

    def release(self) -> None:
        """End what `hold` began."""
        self._lock.release()

    def after_fork_in_parent(self) -> None:
        """Go on after a fork."""
        for made in self._alive:
            made.after_fork_in_parent()
        self._lock.release()

    def after_fork_in_child(self) -> None:
        """Begin without connections."""
        for made in self._alive:
            made.after_fork_in_child()
        self._made.clear()
        self._alive.clear()
        self._lock.release()


_registries: list[ConnectionRegistry[Any, Any]] = []
_held_during_forks: list[Any] = []


def hold_during_forks(lock: Any) -> None:
    """
    Have every fork of this process hold a lock.

    It is taken last, when no fork has to wait for calls any more: such a call may need the lock.
    """
    _held_during_forks.append(lock)


def _before_fork() -> None:
    # A call that a fork waits for may need connections of another engine. So no lock is held while it waits.
    prepared: set[Any] = set()
    while True:
        for registry in _registries:
            registry.prepare_fork(prepared)
        are_prepared = [registry.hold(prepared) for registry in _registries]
        if all(are_prepared):
            break
        for registry in _registries:
            registry.release()
    for lock in _held_during_forks:
        lock.acquire()


def _after_fork_in_parent() -> None:
    for lock in _held_during_forks:
        lock.release()
    for registry in _registries:
        registry.after_fork_in_parent()


def _after_fork_in_child() -> None:
    for lock in _held_during_forks:
        lock.release()
    for registry in _registries:
        registry.after_fork_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)


class ServerSettings(Hashable, Protocol):
    """Settings of stores on a server, whose location is a secret that may change."""

    def location(self) -> str:
        """Return the secret's present value."""

    def fingerprint(self) -> bytes:
        """Return what changes when the secret's value does, and does not tell it: see `fingerprint_of`."""


class ServerConnections(Connections, Protocol):
    """Holds the connections to a server."""

    fingerprint: bytes
    """That of the settings when this object was made."""


ServerSettingsT = TypeVar("ServerSettingsT", bound=ServerSettings)
ServerConnectionsT = TypeVar("ServerConnectionsT", bound=ServerConnections)


class ServerConnectionRegistry(ConnectionRegistry[ServerSettingsT, ServerConnectionsT]):
    """The connections of this process to servers."""

    def get(self, settings: ServerSettingsT) -> ServerConnectionsT:
        """Return the connections for these settings: new ones if the location has changed."""
        fingerprint = settings.fingerprint()
        made = super().get(settings)
        if made.fingerprint != fingerprint:
            self.close(settings)  # else the connections to the old location would stay open
            made = super().get(settings)
        return made


_KEY = os.urandom(16)


def fingerprint_of(secret: str) -> bytes:
    """
    Return a digest of a secret, which is kept in its place.

    A program that reports errors with the values of local variables would send the secret along.
    """
    return hashlib.blake2b(secret.encode(), key=_KEY).digest()


def read_hidden(read: Callable[[], ResultT]) -> ResultT:
    """
    Call a function that has a secret in its local variables.

    :raises StoreConfigurationError: If the function does, but without a trace of where: see `fingerprint_of`.
    """
    try:
        return read()
    except StoreConfigurationError as error:
        message = str(error)
    raise StoreConfigurationError(message)


def resolved(secret: Secret, name: str) -> str:
    """
    Return the value of a secret.

    :param name: The name of the setting, for errors.
    :raises StoreConfigurationError: If it has no value, such as an environment variable that is not set.
    """
    try:
        value = secret.resolve_value() or ""
    except ValueError as error:
        raise StoreConfigurationError(f"The {name} cannot be used. {error}") from error
    if _is_text(value):
        return value
    del value  # see `fingerprint_of`
    raise StoreConfigurationError(f"The {name} cannot be used. It is not text in UTF-8.")


def _is_text(value: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in value)


def keep_alive_forever(connection: object) -> None:
    """
    Never let a connection be garbage-collected, not even while the interpreter shuts down.

    Garbage collection closes it, which in a forked child would disconnect the parent.

    :param connection: A connection that the parent opened.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))
