"""Which layers take part in which steps: one that is unfrozen late, or used by turns, is measured when it is used."""

from __future__ import annotations

from collections.abc import Collection

MOST_STEPS = 32
"""Most factor steps in a row that are taken for a layer that was used once and is not used again."""


class Participation:
    """Asks for factor steps beyond the schedule's, for layers that the schedule's steps miss.

    A layer takes part in a step where it has a gradient, which all ranks know alike once gradients are reduced. Where
    it last did so on a factor step more than two periods ago, or never, the steps after are factor steps until it takes
    part again, for as long as a period at most. A layer that takes part in all steps asks for none.
    """

    def __init__(self) -> None:
        self._measured: dict[str, int] = {}
        self._wanted: dict[str, int] = {}

    def note(self, step: int, layers: Collection[str], *, is_factor_step: bool, period: int) -> list[str]:
        """Note which layers took part in a step; return those that were waited for and are measured by it.

        period: of factor steps, at this step.
        """
        found = []
        self._wanted = {name: until for name, until in self._wanted.items() if until >= step}
        for name in layers:
            last = self._measured.get(name)
            is_late = last is None or step - last > 2 * period
            if is_factor_step:
                if is_late and step > 0:
                    found.append(name)
                self._measured[name] = step
                self._wanted.pop(name, None)
            elif is_late:
                self._wanted[name] = step + min(period, MOST_STEPS)
        return found

    def wants(self, step: int) -> bool:
        """Return whether this step is to be a factor step, whatever the schedule says."""
        return any(until >= step for until in self._wanted.values())

    def was_measured(self, layer: str) -> bool:
        """Return whether a layer took part in a factor step."""
        return layer in self._measured

    def state(self, names: Collection[str]) -> list[int]:
        """Return what is known of each layer, in the order of the names: two numbers each, -1 for none."""
        return [value for name in names for value in (self._measured.get(name, -1), self._wanted.get(name, -1))]

    def restore(self, names: Collection[str], state: list[int]) -> None:
        """Go on from what `state` returned."""
        pairs = list(zip(names, state[::2], state[1::2], strict=True))
        self._measured = {name: measured for name, measured, _ in pairs if measured >= 0}
        self._wanted = {name: until for name, _, until in pairs if until >= 0}
