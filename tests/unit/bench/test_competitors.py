"""Grids, variants, seeds and targets from text, and what is refused."""

from __future__ import annotations

import re
import sys

import pytest

from dngd.bench.competitors import (
    SETTABLE,
    make_settings,
    parse_datasets,
    parse_fields,
    parse_models,
    parse_rates,
    parse_seeds,
    parse_targets,
    parse_variants,
)
from dngd.bench.optimizers import check_optimizers
from dngd.config import TrainConfig
from dngd.errors import UserError

BASE = TrainConfig(dataset="x", engine="local", hidden=8, kfac={"damping": 0.05})


def test_default_grids() -> None:
    settings = make_settings(BASE, ("kfac", "adam"), None, None)
    assert [(s.group, s.lr) for s in settings] == [("kfac", 0.3), ("adam", 3e-3), ("adam", 1e-2), ("adam", 2e-2)]


def test_grids_and_variants_make_settings_with_their_own_configuration() -> None:
    settings = make_settings(
        BASE, ("kfac", "adam"), "adam=1e-3,3e-3; kfac=0.2", "strong:kfac.damping=0.5,lr=0.3;slow:kfac.momentum=0"
    )
    assert [(s.label, s.optimizer) for s in settings] == [
        ("kfac lr=0.2", "kfac"),
        ("adam lr=0.001", "adam"),
        ("adam lr=0.003", "adam"),
        ("strong lr=0.3", "kfac"),
        ("slow lr=0.2", "kfac"),
    ]
    kfac, adam, _, strong, slow = (setting.config(BASE, 7) for setting in settings)
    assert {c.seed for c in (kfac, adam, strong, slow)} == {7}
    assert {c.hidden for c in (kfac, adam, strong, slow)} == {8}
    assert (kfac.optimizer, kfac.learning_rate, kfac.kfac.damping) == ("kfac", 0.2, 0.05)
    assert (adam.optimizer, adam.learning_rate) == ("adam", 0.001)
    assert (strong.kfac.damping, strong.learning_rate) == (0.5, 0.3)
    assert (slow.kfac.damping, slow.kfac.momentum) == (0.05, 0.0)


@pytest.mark.parametrize(
    ("rates", "variants", "message"),
    [
        ("adam", None, "not OPTIMIZER=LR"),
        ("adam=", None, "not OPTIMIZER=LR"),
        ("adam=fast", None, "'fast' is no learning rate"),
        ("adam=-1", None, "'-1' is no learning rate"),
        ("adam=nan", None, "'nan' is no learning rate"),
        ("adam=0.1,0.1", None, "repeats a learning rate"),
        ("adam=0.1;adam=0.2", None, "twice"),
        ("sgd=0.1", None, "does not take part"),
        (None, "plain", "not NAME:KEY=VALUE"),
        (None, "a:", "not NAME:KEY=VALUE"),
        (None, "a:kfac.damping", "not key=value"),
        (None, "a:kfac.dampng=1", "did you mean kfac.damping"),
        (None, "a:kfac.damping=-1", "kfac.damping=-1 is not valid"),
        (None, "a:kfac.damping=1;a:kfac.damping=2", "in use already"),
        (None, "adam:kfac.damping=1", "in use already"),
        (None, "a:hidden=3", "hidden cannot be set here"),
        (None, "a:lr=0", "no learning rate"),
        ("a=0.1", "a:lr=0.2", "in one place"),
    ],
)
def test_bad_grids_and_variants_are_told_in_a_sentence(rates: str | None, variants: str | None, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        make_settings(BASE, ("kfac", "adam"), rates, variants)


@pytest.mark.parametrize("text", ["", "a", "0,-1", "1.5", "0,0"])
def test_bad_seeds(text: str) -> None:
    with pytest.raises(UserError, match="--seeds"):
        parse_seeds(text)


@pytest.mark.parametrize("text", ["", "0", "1.1", "high", "nan"])
def test_bad_targets(text: str) -> None:
    with pytest.raises(UserError, match="--targets"):
        parse_targets(text)


def test_good_lists() -> None:
    assert parse_seeds(" 0, 2 ") == (0, 2)
    assert parse_targets("0.5,1") == (0.5, 1.0)
    assert parse_rates("adam=1e-3,0.01;") == {"adam": (0.001, 0.01)}
    assert parse_variants("a:kfac.damping=0.1,kfac.momentum=0") == {"a": {"kfac": {"damping": 0.1, "momentum": 0}}}
    assert parse_fields(["dropout=0", "kfac.damping=1"], SETTABLE, "--set") == {"dropout": 0, "kfac": {"damping": 1}}


def test_only_what_matters_can_be_set() -> None:
    with pytest.raises(UserError, match=re.escape("epochs cannot be set here; --set takes dropout, kfac.*")):
        parse_fields(["epochs=3"], SETTABLE, "--set")


@pytest.mark.parametrize(
    ("names", "message"),
    [((), "no optimizer"), (("kfac", "lbfgs"), "'lbfgs' is unknown"), (("adam", "adam"), "named twice")],
)
def test_bad_optimizers(names: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_optimizers(names)


@pytest.mark.parametrize("name", ["soap", "shampoo"])
def test_a_missing_package_is_told_with_the_command_that_installs_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(UserError, match=re.escape("pip install 'pytorch-optimizer")):
        check_optimizers(("adam", name))
    check_optimizers(("adam", "kfac"))


def test_a_data_set_may_have_a_split_of_its_own() -> None:
    found = parse_datasets("cora,products-shaped@masks, data/x.npz@random:0.6/0.2/0.2", "random:0.5/0.25/0.25")
    assert found == (
        ("cora", "random:0.5/0.25/0.25"),
        ("products-shaped", "masks"),
        ("data/x.npz", "random:0.6/0.2/0.2"),
    )
    assert parse_datasets("a@b/graph.npz", "masks") == (("a@b/graph.npz", "masks"),), "an @ in a folder's name"


@pytest.mark.parametrize("text", ["cora@", "@masks", "cora@some", "cora,cora"])
def test_bad_data_sets_are_told(text: str) -> None:
    with pytest.raises(UserError, match=r"split|--datasets"):
        parse_datasets(text, "masks")


def test_models_have_their_number_of_layers() -> None:
    assert parse_models("gcn:2, sage:3") == (("gcn", 2), ("sage", 3))


@pytest.mark.parametrize("text", ["", "gcn", "gcn:x", "gcn:2,gcn:2"])
def test_bad_models_are_told(text: str) -> None:
    with pytest.raises(UserError, match="--models"):
        parse_models(text)
