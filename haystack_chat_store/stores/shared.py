# SPDX-License-Identifier: Apache-2.0
"""
What stores with equal connection settings share: one object of the process that holds their connections.
"""

import atexit
import ctypes
import os
import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeVar

from haystack.utils import Secret

from haystack_chat_store.errors import StoreUnavailableError


class Connections(Protocol):
    """
    Holds the connections of all stores with the same settings.
    """

    def close(self) -> None:
        """
        Close what is idle now, and what is in use as soon as it is given back.
        """

    def before_fork(self) -> None:
        """
        Bring into order what a child must not inherit. Nothing, if it can do without all of it.
        """

    def after_fork_in_parent(self) -> None:
        """
        Go on after `before_fork`.
        """

    def after_fork_in_child(self) -> None:
        """
        Call `never_free` on all that is still open: it belongs to the parent.
        """


SettingsT = TypeVar("SettingsT", bound=Hashable)
ConnectionsT = TypeVar("ConnectionsT", bound=Connections)


class Shared(Generic[SettingsT, ConnectionsT]):
    """
    The connections of this process, by their settings.

    A forked child starts with none. What is open when the interpreter ends is closed.
    """

    def __init__(self, make: Callable[[SettingsT], ConnectionsT]) -> None:
        """
        Start with none.

        :param make: Makes the object that holds the connections. It opens nothing yet.
        """
        self._make = make
        self._made: dict[SettingsT, ConnectionsT] = {}
        self._alive: weakref.WeakSet[ConnectionsT] = weakref.WeakSet()  # with those closed while in use
        self._lock = threading.Lock()
        atexit.register(self._close_all)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(
                before=self._before_fork,
                after_in_parent=self._after_fork_in_parent,
                after_in_child=self._after_fork_in_child,
            )

    def get(self, settings: SettingsT) -> ConnectionsT:
        """
        Return what all stores with these settings share.
        """
        made = self._made.get(settings)
        if made is None:
            with self._lock:
                made = self._made.get(settings)
                if made is None:
                    made = self._made[settings] = self._make(settings)
                    self._alive.add(made)
        return made

    def close(self, settings: SettingsT) -> None:
        """
        Close what stores with these settings share. The next use makes a new one.
        """
        with self._lock:
            made = self._made.pop(settings, None)
        if made is not None:
            made.close()

    def _close_all(self) -> None:
        for settings in list(self._made):
            self.close(settings)

    def _before_fork(self) -> None:
        for made in list(self._alive):  # this may take a while, in which others still get what they ask for
            made.before_fork()
        self._lock.acquire()
        for made in self._alive:
            made.before_fork()

    def _after_fork_in_parent(self) -> None:
        for made in self._alive:
            made.after_fork_in_parent()
        self._lock.release()

    def _after_fork_in_child(self) -> None:
        for made in self._alive:
            made.after_fork_in_child()
        self._made.clear()
        self._alive.clear()
        self._lock.release()


class ServerSettings(Hashable, Protocol):
    """
    Settings of stores on a server. Where it is, a secret of them says, which may change.
    """

    def location(self) -> str:
        """
        Return what the secret says now.
        """


class ServerConnections(Connections, Protocol):
    """
    Holds the connections to a server.
    """

    location: str
    """What the secret said when this was made."""


ServerSettingsT = TypeVar("ServerSettingsT", bound=ServerSettings)
ServerConnectionsT = TypeVar("ServerConnectionsT", bound=ServerConnections)


class SharedByServer(Shared[ServerSettingsT, ServerConnectionsT]):
    """
    The connections of this process to servers.
    """

    def get(self, settings: ServerSettingsT) -> ServerConnectionsT:
        """
        Return what all stores with these settings share: a new one if the secret says something else by now.
        """
        location = settings.location()
        made = super().get(settings)
        if made.location != location:
            self.close(settings)  # or connections would stay open to wherever it has ever led
            made = super().get(settings)
        return made


def resolved(secret: Secret, name: str) -> str:
    """
    Return what a secret says.

    :param name: What errors call it.
    :raises StoreUnavailableError: If it cannot be had, such as from an environment variable that is not set.
    """
    try:
        return secret.resolve_value() or ""
    except ValueError as error:
        raise StoreUnavailableError(f"The {name} cannot be used. {error}") from error


def never_free(connection: object) -> None:
    """
    Keep an object for as long as the process lives, whoever lets go of it, even while the interpreter shuts down.

    To free a connection is to close it, which in a forked child would say goodbye in the parent's name.

    :param connection: An object that the parent opened.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))
