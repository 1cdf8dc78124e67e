# SPDX-License-Identifier: Apache-2.0
"""Takes a tree of messages apart into the branches that it consists of, so that none is mixed with another."""

from collections.abc import Mapping
from typing import Any, NamedTuple

# Stands for a parent that cannot be the key of a node, because it is not text.
_NO_KEY = object()


class Branch(NamedTuple):
    """
    A path through the tree, from a root to the current node or to a node without children.

    :param keys: The keys of its nodes, the root first.
    :param own_key: The key of the first node that no earlier branch has. It stays the same when the branch grows, so it
        can name the branch. `None` for the current branch, and only for it.
    """

    keys: list[str]
    own_key: str | None


class Tree(NamedTuple):
    """
    The branches of a tree.

    :param branches: The current branch, if its path is unbroken, and then the others.
    :param broken: The keys of nodes whose path to a root is broken, because a parent is missing, or has a cycle.
    """

    branches: list[Branch]
    broken: list[str]


def branches_of(parent_of: Mapping[str, Any], current: str | None) -> Tree:
    """
    Return the branches of a tree.

    :param parent_of: The key of each node's parent, `None` for a root. A parent that is not the key of a node breaks
        the path.
    :param current: The last node of the current branch. If it is not the key of a node, the last node in `parent_of`
        that has no children is taken.
    """
    parents: dict[str, Any] = {
        key: parent if parent is None or isinstance(parent, str) else _NO_KEY for key, parent in parent_of.items()
    }
    inner = set(parents.values())
    ends = [key for key in parents if key not in inner]
    if current not in parents:
        current = ends[-1] if ends else None
    if current is not None:
        ends = [current, *(end for end in ends if end != current)]
    taken: set[str] = set()
    branches: list[Branch] = []
    for end in ends:
        keys = _path_to(parents, end)
        if keys is None:
            continue
        own_key = next((key for key in keys if key not in taken), None)
        if branches and own_key is None:
            continue
        branches.append(Branch(keys, own_key if branches or end != current else None))
        taken.update(keys)
    return Tree(branches, [key for key in parents if key not in taken])


def _path_to(parents: Mapping[str, Any], end: str) -> list[str] | None:
    """Return the keys from the root to a node, or `None` if the path is broken or has a cycle."""
    keys: list[str] = []
    seen = set()
    key: str | None = end
    while key is not None:
        if key in seen or key not in parents:
            return None
        seen.add(key)
        keys.append(key)
        key = parents[key]
    return keys[::-1]
