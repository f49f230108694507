"""The examples in docstrings are run."""

from __future__ import annotations

import doctest
import importlib.util
import pkgutil

import pytest

import dngd

MODULES = sorted(
    module.name for module in pkgutil.walk_packages(dngd.__path__, "dngd.") if "__main__" not in module.name
)


def examples_of(name: str) -> list[doctest.DocTest]:
    """The docstrings of a module that have examples."""
    found = doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name), name)
    return [test for test in found if test.examples]


def written_in(name: str) -> bool:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    with open(spec.origin, encoding="utf-8") as file:
        return ">>> " in file.read()


WITH_EXAMPLES = [name for name in MODULES if written_in(name)]


TRAINS = "dngd.launch.trainer"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == TRAINS else name for name in WITH_EXAMPLES]
)
def test_examples(name: str) -> None:
    tests = examples_of(name)
    assert tests, "the module has >>> outside of docstrings"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in tests:
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


def test_the_public_surface_has_examples() -> None:
    homes = {"dngd.optim.preconditioner", "dngd.optim.natural_gradient", "dngd.graph.store", TRAINS}
    assert homes <= set(WITH_EXAMPLES)
