"""Every public name is documented, and typed for those who use the package."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dngd

MODULES = (
    "dngd",
    "dngd.graph",
    "dngd.models",
    "dngd.optim",
    "dngd.sampling",
    "dngd.train",
    "dngd.launch",
    "dngd.config",
)


def public_names() -> Iterator[tuple[str, Any]]:
    for name in MODULES:
        module = importlib.import_module(name)
        for attribute in getattr(module, "__all__", ["TrainConfig", "KFACConfig", "CheckpointConfig", "RayConfig"]):
            yield f"{name}.{attribute}", getattr(module, attribute)


def own_methods(cls: type) -> Iterator[tuple[str, Any]]:
    for name, member in vars(cls).items():
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if not name.startswith("_") and inspect.isfunction(function):
            yield name, function


@pytest.mark.parametrize(("name", "value"), [pytest.param(n, v, id=n) for n, v in public_names() if callable(v)])
def test_a_public_name_is_documented(name: str, value: Any) -> None:
    if not getattr(value, "__module__", "").startswith("dngd"):
        return  # an alias of typing's
    assert inspect.getdoc(value), f"{name} has no docstring"
    if inspect.isclass(value):
        missing = [method for method, function in own_methods(value) if not inspect.getdoc(getattr(value, method))]
        assert missing == [], f"{name} has undocumented methods"


def test_every_field_of_the_configuration_says_what_it_is() -> None:
    from dngd import config

    for section in (config.TrainConfig, config.KFACConfig, config.CheckpointConfig, config.RayConfig):
        assert [name for name, field in section.model_fields.items() if not field.description] == []


def test_the_package_is_typed_and_its_names_are_there() -> None:
    assert (Path(dngd.__file__).parent / "py.typed").exists()
    assert sorted(dngd.__all__) == dngd.__all__ == dir(dngd)
    for name in dngd.__all__:
        getattr(dngd, name)
