"""YAML from files of unknown origin, of which a few lines can stand for more values than a machine holds.

An alias (`*a`) stands for the part that its anchor (`&a`) names, in which there may be aliases again: twenty lines of
two each stand for a million values, which reading, merging and messages would visit one by one.
"""

from __future__ import annotations

from typing import Any

import yaml

MOST_ALIASED = 10_000
"""Values that a document's aliases may stand for, all together."""

NOT_YAML = (yaml.YAMLError, ValueError, RecursionError, LookupError, AttributeError, TypeError, OverflowError)
"""What reading raises: YAML's own errors, and those of Python for a date such as 2020-99-99 or a wrong !!tag."""


class RefusedError(yaml.YAMLError):
    """What is YAML, but most likely a mistake. The message goes on from the name of what was read."""


class BoundedLoader(yaml.SafeLoader):
    """Raises RefusedError where aliases stand for more than MOST_ALIASED values, or lead back to themselves."""

    def get_single_node(self) -> Any:
        """Return the document's node, checked before anything is made of it."""
        node = super().get_single_node()
        sizes: dict[int, int] = {}
        if node is not None and _size(node, sizes) - len(sizes) > MOST_ALIASED:
            raise RefusedError(f"has aliases that stand for more than {MOST_ALIASED} values; write out what is meant")
        return node


def load(text: str, loader_type: type[BoundedLoader] = BoundedLoader) -> Any:
    """Return the one document in a text. Raises one of NOT_YAML."""
    loader = loader_type(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _size(node: Any, sizes: dict[int, int]) -> int:
    """Return the number of values that a node stands for. sizes: of those that were visited, 0 for one that is not
    finished."""
    known = sizes.get(id(node))
    if known == 0:
        raise RefusedError("is nested in itself, by an alias that leads back; write out what is meant")
    if known is not None:
        return known
    sizes[id(node)] = 0
    total = 1
    if isinstance(node, yaml.CollectionNode):
        for part in node.value:
            for child in part if isinstance(part, tuple) else (part,):
                total += _size(child, sizes)
    sizes[id(node)] = total
    return total
