"""The baselines' best settings out of a result of `dngd bench accuracy`, so that its finals alone are run anew.

A search takes hours, and what it finds, validation accuracies by setting, does not change where the baselines do not;
seconds do, with the machine and with every step that became cheaper. Finals anew are of the same settings, seeds and
graph: anything else is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dngd.bench.accuracy_files import ALIKE, read_result
from dngd.bench.competitors import Setting
from dngd.bench.optimizers import SUBJECT
from dngd.bench.protocol import Protocol
from dngd.errors import UserError

SAME_GRAPH = ("digest", "num_nodes", "num_edges", "num_features", "num_classes", "split", "split_sizes")

SHARED = ("max_steps", "lr_schedule", "warmup_steps", "lr_half_steps", "average_share", "momentum")


class EarlierSearch:
    """What an earlier result found for each graph and model. path: the file.

    Raises UserError if it is no such result, or one without a search.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._result = read_result(path)
        self._panels: dict[str, Mapping[str, Any]] = {panel["name"]: panel for panel in self._result["panels"]}
        if not self._result["config"].get("grid"):
            raise UserError(f"{path} was measured without a search; give a result of --protocol full or quick")

    def check(self, described: Mapping[str, Any], searched: Sequence[str]) -> None:
        """Raise UserError unless the command describes the same comparison of the same optimizers.

        described: the new result's config. searched: the optimizers beside K-FAC.
        """
        theirs = self._result["config"]
        before = theirs["grid"]["rates"]
        if set(searched) != set(before):
            raise UserError(
                f"{self.path} searched {', '.join(before)}, the command {', '.join(searched)}; give --optimizers as it "
                "had them"
            )
        wanted = {name: described[name] for name in ALIKE} | {"grid": described["grid"]}
        # What baselines share with K-FAC, where the file says so: they were tuned with it.
        wanted |= {name: described[name] for name in SHARED if name in theirs}
        for name, value in wanted.items():
            if theirs.get(name) != value:
                raise UserError(
                    f"{self.path} was searched with {name}={theirs.get(name)}, the command says {value}; give the "
                    "flags that it was made with"
                )

    def panel(self, title: str, graph: Mapping[str, Any], fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return what the file has of a graph and model. fields: further ones that must be the same, where it has them.

        Raises UserError if there is nothing, or another graph of the name.
        """
        found = self._panels.get(title)
        if found is None:
            raise UserError(f"{self.path} has no {title}, but {', '.join(self._panels)}; leave it out of the command")
        of_graph = {name: graph[name] for name in SAME_GRAPH if name in found["graph"] and name in graph}
        for name, value in (of_graph | dict(fields)).items():
            theirs = found["graph"].get(name) if name in of_graph else found.get(name, value)
            if theirs != value:
                raise UserError(f"{self.path} has {title} with {name}={theirs}, here it is {value}; search it anew")
        return found


def finalists_of(
    panel: Mapping[str, Any], protocol: Protocol, rates: Mapping[str, Sequence[float]]
) -> tuple[list[Setting], dict[str, list[str]]]:
    """Return the baselines' settings that were trained with all seeds, and in what each lies at its grid's border.

    rates: the grid's, by optimizer.
    Files say the latter of those alone that led; of others that were trained for longest it is taken that they were
    still improving.
    """
    settings, borders = [], {}
    batches = [own["overrides"]["batch_size"] for own in panel["settings"].values() if "batch_size" in own["overrides"]]
    sizes = {max(1, round(multiple * panel["batch_size"])) for multiple in protocol.batches} | set(batches)
    for label, own in panel["settings"].items():
        if own["optimizer"] == SUBJECT:
            continue
        note = label.partition(f"{own['optimizer']} lr={own['lr']:g} ")[2]
        setting = Setting(own["group"], own["optimizer"], own["lr"], own["overrides"], note)
        if setting.label != label:
            raise UserError(f"a setting is called {label!r}, not {setting.label!r}; search anew")
        settings.append(setting)
        found = []
        if own["lr"] in (min(rates[own["optimizer"]]), max(rates[own["optimizer"]])):
            found.append("learning rate")
        if len(protocol.batches) > 1 and own["overrides"].get("batch_size") in (min(sizes), max(sizes)):
            found.append("batch size")
        if own["overrides"]["epochs"] == protocol.max_epochs:
            found.append("epochs")
        borders[label] = list(own.get("borders", found))
    return settings, borders
