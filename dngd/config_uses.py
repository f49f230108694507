"""When a field of a configuration is of use: an idle one does not define the run, and as a flag is refused."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Use:
    """What fields have a use, and when.

    names: dotted, those that end with * by their beginning. holds: whether the run uses them. why: said of one that was
    given and is not used, after "has no effect", with the fix; None: it may be given. defines: whether they are part of
    what defines a run only where they are used.
    """

    names: tuple[str, ...]
    holds: bool
    why: str | None
    defines: bool = True

    def is_of(self, key: str) -> bool:
        """Return whether this is about a field."""
        return any(key.startswith(name[:-1]) if name.endswith("*") else key == name for name in self.names)
