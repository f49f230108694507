"""Which layers take part in which steps: one that is unfrozen late, or used by turns, is measured when it is used."""

from __future__ import annotations

from collections.abc import Collection

MOST_STEPS = 32
"""Most factor steps in a row that are taken for a layer that was used once and is not used again."""


class Participation:
    """Asks for factor steps beyond the schedule's, for layers that the schedule's steps miss.

    A layer takes part in a step where it has a gradient, not known to be of zeros (StepGradients), which all ranks know
    alike once gradients are reduced. Where it does so after it had no part in the last two factor steps, or in any
    before, the steps after are factor steps until it takes part again, for as long as a period at most. A layer that
    takes part in all steps asks for none.
    """

    def __init__(self) -> None:
        self._factor_steps = 0
        self._measured: dict[str, int] = {}
        """The number of factor steps that there had been when a layer last took part in one."""
        self._wanted: dict[str, int] = {}
        """The last step that is to be a factor step for a layer."""

    def note(self, step: int, layers: Collection[str], *, is_factor_step: bool, period: int) -> list[str]:
        """Note which layers took part in a step that counts; return those that were late and are measured by it.

        period: of factor steps, at this step.
        """
        found = []
        is_first = self._factor_steps == 0
        self._wanted = {name: until for name, until in self._wanted.items() if until >= step}
        for name in layers:
            last = self._measured.get(name)
            is_late = last is None or self._factor_steps - last >= 2
            if is_factor_step:
                if is_late and not is_first:
                    found.append(name)
                self._measured[name] = self._factor_steps + 1
                self._wanted.pop(name, None)
            elif is_late:
                self._wanted[name] = step + min(period, MOST_STEPS)
        self._factor_steps += is_factor_step
        return found

    def wants(self, step: int) -> bool:
        """Return whether this step is to be a factor step, whatever the schedule says."""
        return any(until >= step for until in self._wanted.values())

    def was_measured(self, layer: str) -> bool:
        """Return whether a layer took part in a factor step."""
        return layer in self._measured

    def state(self, names: Collection[str]) -> list[int]:
        """Return what is known of each layer, in the order of the names, -1 for none: the number of factor steps since
        it took part in one, and the last step that is to be one for it."""
        ages = {name: self._factor_steps - last for name, last in self._measured.items()}
        return [value for name in names for value in (ages.get(name, -1), self._wanted.get(name, -1))]

    def restore(self, names: Collection[str], state: list[int]) -> None:
        """Go on from what `state` returned."""
        pairs = list(zip(names, state[::2], state[1::2], strict=True))
        self._factor_steps = max((age for _, age, _ in pairs), default=0) + 1
        self._measured = {name: self._factor_steps - age for name, age, _ in pairs if age >= 0}
        self._wanted = {name: until for name, _, until in pairs if until >= 0}
