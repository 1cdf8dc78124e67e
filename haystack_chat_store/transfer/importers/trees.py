# SPDX-License-Identifier: Apache-2.0
"""Takes a tree of messages apart into the branches that it consists of, so that none is mixed with another."""

from collections.abc import Mapping
from typing import Any, NamedTuple

# Stands for a parent that cannot be the key of a node. Keys are not so long.
_NO_KEY = "\0" * 1000


class Branch(NamedTuple):
    """
    A way through the tree, from its root to one of its ends.

    :param keys: The keys of its nodes, the root first.
    :param own_key: The first node that no branch before it has, or `None` for the first branch. It stays the same when
        the branch grows, so it can name the branch.
    """

    keys: list[str]
    own_key: str | None


class Tree(NamedTuple):
    """
    The branches of a tree.

    :param branches: The current branch, if it is whole, and then the others.
    :param broken: The keys of nodes whose way to a root is interrupted or goes in a circle.
    """

    branches: list[Branch]
    broken: list[str]


def branches_of(named_parents: Mapping[str, Any], current: str | None) -> Tree:
    """
    Return the branches of a tree.

    :param named_parents: The key of each node, and of the node before it, `None` for a root. A parent that is no key
        interrupts the way.
    :param current: The last node of the current branch, or a key that is no node: then the
        end that comes last in `named_parents` is taken.
    """
    parents = {key: each if each is None or isinstance(each, str) else _NO_KEY for key, each in named_parents.items()}
    inner = set(parents.values())
    ends = [key for key in parents if key not in inner]
    if current not in parents:
        current = ends[-1] if ends else None
    if current is not None:
        ends = [current, *(end for end in ends if end != current)]
    taken: set[str] = set()
    branches: list[Branch] = []
    for end in ends:
        keys = _way(parents, end)
        if keys is None:
            continue
        own_key = next((key for key in keys if key not in taken), None)
        if branches and own_key is None:
            continue
        branches.append(Branch(keys, own_key if branches or end != current else None))
        taken.update(keys)
    return Tree(branches, [key for key in parents if key not in taken])


def _way(parents: Mapping[str, str | None], end: str) -> list[str] | None:
    """Return the keys from the root to a node, or `None` if the way is interrupted or a circle."""
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
