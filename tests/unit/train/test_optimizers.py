"""What the configured optimizer is made with where settings are left open."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from dngd.bench.learner import initial_model
from dngd.comm import LocalCommunicator
from dngd.config import TrainConfig
from dngd.curvature import Dense, LowRank
from dngd.errors import UserError
from dngd.graph import GraphStore
from dngd.optim import KLTrustRegion, value_at
from dngd.train.optimizers import (
    TrainingSet,
    build_optimizer,
    damping_in_use,
    factor_layout,
    fused,
    kl_clip_in_use,
    load_moments,
    training_set_of,
)
from dngd.train.plan import make_plan


def kfac(**settings: object) -> TrainConfig:
    return TrainConfig(dataset="products-mini", kfac=settings)


@pytest.mark.parametrize(
    ("settings", "training_set", "a_share", "g_share"),
    [
        ({}, TrainingSet(2500, 10), 2e-3, 0.05),
        ({}, TrainingSet(250000, 2), 2e-4, 0.25),
        ({}, TrainingSet(250000), 2e-4, 6e-3),
        ({}, TrainingSet(), 1e-3, 0.03),
        ({"damping": 0.05}, TrainingSet(2500, 10), 0.05, 0.05),
        ({"damping": 0.05, "damping_g_ratio": 3.0}, TrainingSet(2500, 10), 0.05, 0.15),
        ({"damping_g_ratio": 10.0}, TrainingSet(2500, 10), 2e-3, 0.02),
        ({"damping_mode": "tikhonov"}, TrainingSet(2500, 10), 1e-2, 0.3),
    ],
)
def test_damping(settings: dict[str, object], training_set: TrainingSet, a_share: float, g_share: float) -> None:
    damping, ratio = damping_in_use(kfac(**settings), training_set)
    assert (damping, damping * ratio) == pytest.approx((a_share, g_share))


def test_optimizer_takes_the_damping_of_its_training_set_and_a_falling_clip() -> None:
    config = kfac(kl_clip=3e-2)
    optimizer = build_optimizer(config, nn.Linear(3, 2), LocalCommunicator(), training_set=TrainingSet(2500, 4))
    pre = optimizer.preconditioner
    assert pre is not None
    assert pre.kl_clip is not None
    assert value_at(pre.damping, 0) == pytest.approx(2e-3)
    assert value_at(pre.damping_g_ratio, 0) == pytest.approx(0.125 / 2e-3)
    assert [value_at(pre.kl_clip, step) for step in (0, 10, 30)] == pytest.approx([3e-2, 7.5e-3, 1.875e-3])
    assert optimizer.torch_optimizer.param_groups[0]["momentum"] == 0.8
    pre.close()


@pytest.mark.parametrize(
    ("batch_size", "expected"), [(1, "empirical"), (1024, "empirical"), (1025, "monte_carlo"), ("full", "monte_carlo")]
)
def test_fisher_depends_on_how_many_seeds_share_nodes(batch_size: object, expected: str) -> None:
    config = TrainConfig(dataset="products-mini", batch_size=batch_size)
    assert config.fisher == expected
    assert config.identity()["kfac.fisher"] == expected


def test_clip_that_stays_and_none() -> None:
    assert kl_clip_in_use(kfac(kl_clip=0.5, kl_clip_steps=None)) == 0.5
    assert kl_clip_in_use(kfac(kl_clip=None)) is None


def test_adam_in_the_eigenbasis_keeps_its_momentum() -> None:
    optimizer = build_optimizer(
        kfac(update="adam_eigenbasis"), nn.Linear(3, 2), LocalCommunicator(), training_set=TrainingSet(2500, 2)
    )
    assert optimizer.torch_optimizer.param_groups[0]["momentum"] == 0.9
    assert optimizer.preconditioner is not None
    optimizer.preconditioner.close()


@pytest.mark.parametrize("name", ["kfac", "adam"])
def test_a_dropped_step_is_none_of_the_average(name: str) -> None:
    config = TrainConfig(dataset="products-mini", optimizer=name, average_share=0.3)
    net = nn.Linear(3, 2)
    optimizer = build_optimizer(config, net, LocalCommunicator(), training_set=TrainingSet(2500, 2))
    assert optimizer.average is not None
    for finite in (True, False, True):
        net.zero_grad()
        nn.functional.cross_entropy(net(torch.randn(4, 3)), torch.tensor([0, 1, 0, 1]), reduction="sum").backward()
        optimizer.step(num_seeds_here=4, finite=finite)
    assert optimizer.average.steps == 2
    if optimizer.preconditioner is not None:
        optimizer.preconditioner.close()


def test_a_bound_of_the_measured_divergence_takes_the_place_of_the_clip() -> None:
    clip = kl_clip_in_use(kfac(kl_bound=0.2, kl_bound_steps=4.0, kl_bound_period=7))
    assert isinstance(clip, KLTrustRegion)
    assert [clip.bound(step) for step in (0, 4)] == pytest.approx([0.2, 0.05])  # type: ignore[operator]
    assert clip.period == 7
    constant = kl_clip_in_use(kfac(kl_bound=0.2, kl_bound_steps=None))
    assert isinstance(constant, KLTrustRegion)
    assert constant.bound == 0.2
    named = kfac(kl_bound=0.2).identity()
    assert named["kfac.kl_bound"] == 0.2
    assert not any(key.startswith("kfac.kl_clip") for key in named)
    assert not any(key.startswith("kfac.kl_bound") for key in kfac(kl_clip=3e-2).identity())
    both = kfac(kl_bound=0.2, kl_clip=3e-2)  # as runs were saved when a number stood where auto stands now
    assert both.identity() == named
    assert isinstance(kl_clip_in_use(both), KLTrustRegion)


@pytest.mark.parametrize(
    ("fields", "measured"),
    [
        ({}, True),
        ({"batch_size": "full"}, True),
        ({"kfac": {"kl_clip": 0.03}}, False),
        ({"kfac": {"kl_clip": None}}, False),
        ({"kfac": {"kl_clip_steps": None}}, False),
        ({"kfac": {"kl_clip_power": 1.0}}, False),
        ({"kfac": {"update": "adam_eigenbasis"}}, False),
        ({"class_weights": "balanced"}, False),
        ({"model": "custom"}, False),
        ({"kfac": {"update": "momentum"}}, False),
        ({"kfac": {"variant": "paper"}}, False),
        ({"task": "link"}, False),
        ({"semi": "pooled"}, False),
    ],
)
def test_steps_are_measured_where_that_goes_and_no_clip_is_given(fields: dict[str, object], measured: bool) -> None:
    """A run's identity holds what stands for what is left open; a run that was saved with its clip goes on with it."""
    config = TrainConfig(dataset="any", **fields)
    clip, named = kl_clip_in_use(config), config.identity()
    assert isinstance(clip, KLTrustRegion) == measured
    assert ("kfac.kl_bound" in named) == measured
    assert ("kfac.kl_clip" in named) != measured
    if measured:
        assert named["kfac.kl_bound"] == 0.1
        assert clip is not None
        assert [value_at(clip, step) for step in (0, 5)] == pytest.approx([0.2 / 3, 0.05 / 3])
        assert TrainConfig(dataset="any", **fields, kfac={"kl_bound": 0.1}).identity() == named
    elif config.kfac.kl_clip is None:
        assert clip is None
        assert named["kfac.kl_clip"] is None
    else:
        assert named["kfac.kl_clip"] == 3e-2
        saved = config.model_dump() | {"kfac": config.kfac.model_dump() | {"kl_clip": 3e-2}}
        assert TrainConfig(**saved).identity() == named


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        (
            {"kfac": {"kl_bound": 0.1, "update": "momentum"}},
            "update=momentum: it predicts the step of one",
        ),
        ({"kfac": {"kl_bound": 0.1, "variant": "paper"}}, "variant=paper: the paper's factors are not the Fisher"),
        ({"kfac": {"kl_bound": 0.1}, "task": "link"}, "task=link: it was not tried"),
        ({"kfac": {"kl_bound": 0.1}, "semi": "pooled"}, "semi=pooled: it was not tried"),
    ],
)
def test_where_no_divergence_is_measured_a_bound_is_refused(fields: dict[str, object], why: str) -> None:
    with pytest.raises(UserError, match=why):
        TrainConfig(dataset="any", **fields)


def test_a_run_of_the_former_clip_is_told_apart() -> None:
    assert kfac(kl_clip=3e-2).identity()["kfac.kl_clip_power"] == 2.0
    assert "kfac.kl_clip_power" not in kfac(kl_clip=3e-2, kl_clip_power=1.0).identity()
    assert "kfac.kl_clip_power" not in kfac(kl_clip=3e-2, kl_clip_steps=None).identity()
    assert "kfac.kl_clip_power" not in kfac(kl_clip=None).identity()
    clip = kl_clip_in_use(kfac(kl_clip=3e-2, kl_clip_power=1.0))
    assert clip is not None
    assert value_at(clip, 10) == pytest.approx(1.5e-2)


@pytest.mark.parametrize(
    ("fields", "training_set", "columns"),
    [
        ({}, TrainingSet(2500, 2), 16),
        ({}, TrainingSet(2500, 8), 16),
        ({}, TrainingSet(2500, 9), 32),
        ({}, TrainingSet(2500, 47), 96),
        ({}, TrainingSet(2500), 32),
        ({"kfac": {"damping": 0.01, "damping_g_ratio": 10.0}}, TrainingSet(2500, 47), 16),
        ({"kfac": {"output_rank": 5}}, TrainingSet(2500, 47), 5),
        ({"kfac": {"output_rank": 5, "damping_mode": "tikhonov"}}, TrainingSet(2500, 7), 5),
        ({"kfac": {"output_rank": 0}}, TrainingSet(2500, 7), None),
        ({"kfac": {"damping_mode": "tikhonov"}}, TrainingSet(2500, 7), None),
        ({"kfac": {"wide_inputs": "dense"}}, TrainingSet(2500, 7), None),
        ({"kfac": {"variant": "paper"}}, TrainingSet(2500, 7), None),
        ({"kfac": {"method": "ekfac"}}, TrainingSet(2500, 7), None),
        ({"kfac": {"update": "adam_eigenbasis"}}, TrainingSet(2500, 7), None),
        ({"task": "link"}, TrainingSet(2500), None),
    ],
)
def test_a_hidden_layers_g_has_as_many_columns_as_its_damping_leaves_of_use(
    fields: dict[str, object], training_set: TrainingSet, columns: int | None
) -> None:
    layout = factor_layout(TrainConfig(dataset="any", **fields), training_set)  # type: ignore[arg-type]
    assert layout.output_rank == columns


def test_what_becomes_of_a_wide_g_is_seen_in_the_optimizer() -> None:
    for output_rank, expected in ((None, LowRank(64, 16)), (8, LowRank(64, 8)), (0, Dense(64))):
        net = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 7))
        optimizer = build_optimizer(
            kfac(output_rank=output_rank), net, LocalCommunicator(), training_set=TrainingSet(1000, 7)
        )
        pre = optimizer.preconditioner
        assert pre is not None
        assert pre.layers["0"].g == expected
        assert pre.layers["2"].g == Dense(7)
        pre.close()


@pytest.mark.parametrize(
    ("fields", "num_train", "columns"),
    [
        ({}, 40_000, 64),
        ({}, 40_001, None),  # the damping is below 5e-4 of the trace
        ({"kfac": {"damping": 4e-4}}, 100, None),
        ({"kfac": {"inverse_rank": 0}}, 100, None),
        ({"kfac": {"inverse_rank": 50}}, 10**7, 50),
        ({"kfac": {"damping_mode": "tikhonov", "damping": 0.1}}, 100, None),
        ({"task": "link"}, 100, None),
    ],
)
def test_columns_of_a_wide_as_inverse(fields: dict[str, object], num_train: int, columns: int | None) -> None:
    layout = factor_layout(TrainConfig(dataset="any", **fields), TrainingSet(num_train, 4))  # type: ignore[arg-type]
    assert layout.inverse_rank == columns


@pytest.mark.parametrize("model", ["gcn", "sage"])
def test_the_plan_has_the_structures_of_the_run(store: GraphStore, model: str) -> None:
    """What a dry run counts the bytes of is what the optimizer keeps."""
    config = TrainConfig(dataset=str(store.path), model=model, num_layers=3, hidden=64, batch_size=60)
    split = store.split("masks")
    planned = [(layer.factors.a, layer.factors.g) for layer in make_plan(config, store, split).layers]
    training_set = training_set_of(config, int(split.train.numel()), store.num_classes)
    optimizer = build_optimizer(config, initial_model(config, store), LocalCommunicator(), training_set=training_set)
    pre = optimizer.preconditioner
    assert pre is not None
    assert planned == [(layer.a.label, layer.g.label) for layer in pre.layers.values()]
    assert [label for _, label in planned] == ["rank 16 of 64", "rank 16 of 64", f"dense {store.num_classes}"]
    pre.close()


def test_a_run_of_before_g_was_low_rank_is_told_apart() -> None:
    assert kfac().identity()["kfac.output_rank"] == "by damping"
    assert "kfac.output_rank" not in kfac(output_rank=0).identity()
    assert "kfac.output_rank" not in kfac(damping_mode="tikhonov").identity()
    assert kfac(output_rank=16).identity()["kfac.output_rank"] == 16
    assert kfac(method="ekfac").identity() == kfac(method="ekfac", output_rank=0).identity()


def test_a_whole_file_of_a_run_leaves_open_what_the_task_decides(tmp_path: Path) -> None:
    """`--config RUN/config.yaml --task link` takes the metric and the damping of links, not those of nodes."""
    file = tmp_path / "config.yaml"
    node = TrainConfig(dataset="any")
    file.write_text(node.to_yaml())
    link = TrainConfig.from_yaml(file, {"task": "link"})
    assert (node.metric_in_use, node.damping_mode) == ("accuracy", "relative")
    assert (link.metric_in_use, link.damping_mode) == ("roc_auc", "tikhonov")
    assert damping_in_use(link, TrainingSet(2500, 10))[0] == 1e-2
    own = TrainConfig.from_yaml(file, {"task": "link", "metric": "accuracy", "kfac": {"damping_mode": "relative"}})
    assert (own.metric_in_use, own.damping_mode) == ("accuracy", "relative")
    assert own.identity() != link.identity()


def test_a_run_says_what_a_default_stands_for() -> None:
    """Naming a default is the same run, and a run of before these fields could be left open is too."""
    for task, metric, mode in (("node", "accuracy", "relative"), ("link", "roc_auc", "tikhonov")):
        left_open = TrainConfig(dataset="any", task=task)
        named = TrainConfig(dataset="any", task=task, metric=metric, kfac={"damping_mode": mode})
        assert left_open.identity() == named.identity()
        assert left_open.identity()["kfac.damping_mode"] == mode


@pytest.mark.parametrize(
    ("made", "options", "entry", "device"),
    [
        (torch.optim.SGD, {"momentum": 0.9}, "0.momentum_buffer", "meta"),
        (torch.optim.SGD, {"momentum": 0.9}, "1.momentum_buffer", "meta"),
        (torch.optim.Adam, {}, "0.step", "cpu"),
        (torch.optim.Adam, {}, "1.step", "cpu"),
        (torch.optim.Adam, {"capturable": True}, "1.step", "meta"),
        (torch.optim.Adam, {}, "1.exp_avg", "meta"),
        (torch.optim.Adam, {}, "1.weight", "cpu"),
    ],
)
def test_counts_lie_where_the_optimizer_has_them(
    made: type[torch.optim.Optimizer], options: dict[str, object], entry: str, device: str
) -> None:
    """Moments lie where their parameters are, those of a parameter without dimensions too; the device "meta" stands for
    a GPU."""
    parameters = [nn.Parameter(torch.zeros(3, device="meta")), nn.Parameter(torch.zeros((), device="meta"))]
    optimizer = made(parameters, lr=0.1, **options)  # type: ignore[call-arg]
    index, key = entry.split(".")
    value = torch.zeros(3 if index == "0" and key != "step" else ())
    load_moments(optimizer, {entry: value})
    assert optimizer.state[parameters[int(index)]][key].device.type == device


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_one_pass_where_there_is_one(kind: type[torch.optim.Adam]) -> None:
    """The same steps within rounding; as it comes for complex weights, which have no such step."""
    found = []
    for make in (partial(fused, kind), kind):
        model = nn.Linear(4, 3)
        nn.init.constant_(model.weight, 0.1)
        nn.init.constant_(model.bias, 0.1)
        optimizer = make([{"params": list(model.parameters())}], lr=0.01)
        assert bool(optimizer.param_groups[0]["fused"]) == (make is not kind)
        for step in range(5):
            optimizer.zero_grad()
            (model(torch.full((2, 4), 0.5 + step)) ** 2).sum().backward()
            optimizer.step()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(*found, rtol=1e-5)
    plain = fused(kind, [{"params": [nn.Parameter(torch.ones(2, dtype=torch.complex64))]}], lr=0.01)
    assert not plain.param_groups[0]["fused"]
