"""Uses that would be silently wrong: each is handled, warned of once, or refused with the fix."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import GCNConv, Linear

from dngd.errors import TrainingError, UserError
from dngd.optim import FactorLayout, KFACPreconditioner, NaturalGradient
from dngd.optim.capture import Capture
from tests.helpers.mutants import assert_caught
from tests.helpers.thread_world import ThreadCommunicator, run_threads

F64 = torch.float64


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def make_data(n: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=generator, dtype=F64), torch.randint(3, (n,), generator=generator)


def law_only_reached_rows_are_drawn() -> None:
    """20 labelled rows of 2,000 and at most 50 measured: all 20 are, whatever the draw."""
    net = make_net()
    x, y = make_data(2000)
    found = []
    for max_rows in (None, 50):
        pre = KFACPreconditioner(net, max_rows=max_rows)
        net.zero_grad()
        F.cross_entropy(net(x)[:20], y[:20]).backward()
        pre.step(num_samples=20)
        found.append(pre.factors()["2"])
        pre.close()
    for mine, theirs in zip(*found):
        assert torch.allclose(mine, theirs, rtol=1e-9)


def test_only_reached_rows_are_drawn() -> None:
    def draws_first(self: Capture, layer: Any, reached: Tensor) -> tuple[Tensor | None, float]:
        chosen = torch.arange(reached.numel())[:: max(1, reached.numel() // 50)]
        return chosen, reached.numel() / chosen.numel()

    law_only_reached_rows_are_drawn()
    original = Capture._choose

    def mutant(self: Capture, layer: Any, reached: Tensor) -> tuple[Tensor | None, float]:
        return original(self, layer, reached) if self.max_rows is None else draws_first(self, layer, reached)

    assert_caught(law_only_reached_rows_are_drawn, Capture, "_choose", mutant)


def test_dropped_units_do_not_end_a_constant_input() -> None:
    """Full batch with few hidden units and dropout: rows come and go, the product is soon taken no more."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Dropout(0.5), nn.Linear(3, 3))
    x, y = (t.float() if t.is_floating_point() else t for t in make_data(60))
    pre = KFACPreconditioner(net, damping_mode="relative", dense_steps=60, inverse_update_period=4)
    for _ in range(60):
        net.zero_grad()
        F.cross_entropy(net(x), y).backward()
        pre.step(num_samples=60)
    layer = pre.layers["0"]
    alive = (net[0](x) > 0).any(dim=1)
    assert layer.constant.reach is not None
    assert torch.equal(layer.constant.reach, alive)
    assert pre.states["0"].reused_inversions >= 5


def test_an_output_layer_that_starts_at_zero() -> None:
    """No hidden row has a gradient in the first step: nothing is measured then, and nothing is poisoned."""
    net = make_net()
    nn.init.zeros_(net[2].weight)
    x, y = make_data(12)
    optimizer = NaturalGradient(net)
    for step in range(6):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if step == 0 else "error")
            optimizer.step(num_samples=12)
        assert all(
            torch.isfinite(t).all() for s in optimizer.preconditioner.states.values() for t in s.folded.tensors()
        )
    assert optimizer.preconditioner.pipeline.discarded_statistics == 0
    rows = torch.cat([x, torch.ones(12, 1, dtype=F64)], dim=1)
    assert torch.allclose(optimizer.preconditioner.factors()["0"].A, rows.T @ rows / 12)


def test_a_layout_is_kept_with_eigenbases_where_it_has_one() -> None:
    for wide, label in (("low_rank", "diagonal 5"), ("block_diagonal", "blocks"), ("dense", "dense 5")):
        pre = KFACPreconditioner(make_net(), method="ekfac", layout=FactorLayout(max_dimension=3, wide=wide, rank=2))
        assert pre.layers["0"].a.label.startswith(label)
        pre.close()


@pytest.mark.parametrize("in_between", [False, True])
def test_two_heads_add_up(in_between: bool) -> None:
    """Observed one after another, the trunk's G is the sum of the two heads' own; in_between: whether the first is
    observed before the second one runs."""

    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = torch.tanh(self.trunk(x))
            return self.a(hidden), self.b(hidden)

    x, y = make_data(8)
    found = []
    for which in ((0,), (1,), (0, 1)):
        torch.manual_seed(0)
        net = TwoHeads().double()
        pre = KFACPreconditioner(net, fisher="ggn")
        if in_between:
            hidden, outputs = torch.tanh(net.trunk(x)), {}
            for head in which:
                outputs[head] = (net.a, net.b)[head](hidden)
                pre.observe(outputs[head], key=head)
        else:
            outputs = dict(enumerate(net(x)))
            for head in which:
                pre.observe(outputs[head], key=head)
        sum(F.cross_entropy(outputs[head], y) for head in which).backward()  # type: ignore[union-attr]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pre.step(num_samples=8)
        found.append(pre.factors()["trunk"])
        pre.close()
    first, second, both = found
    assert torch.allclose(first.G + second.G, both.G, rtol=1e-9)
    assert torch.allclose(first.A, both.A, rtol=1e-9)


def test_each_micro_batch_must_be_observed() -> None:
    net = make_net()
    pre = KFACPreconditioner(net, fisher="monte_carlo")
    for i, (x, y) in enumerate((make_data(4, 1), make_data(4, 2))):
        outputs = net(x)
        if i == 0:
            pre.observe(outputs)
        (F.cross_entropy(outputs, y) / 2).backward()
    with pytest.raises(UserError, match="each forward pass"):
        pre.step(num_samples=8)


def test_micro_batches_draw_labels_of_their_own() -> None:
    """Without keys too: the same rows twice are not the same labels twice."""
    net = make_net()
    x, y = make_data(64)
    sums = []
    for calls in (1, 2):
        pre = KFACPreconditioner(net, fisher="monte_carlo")
        for _ in range(calls):
            net.zero_grad()
            outputs = net(x)
            pre.observe(outputs)
            F.cross_entropy(outputs, y).backward()
        pre.step(num_samples=64 * calls)
        sums.append(pre.factors()["2"].G)
        pre.close()
    assert not torch.allclose(sums[0], sums[1], rtol=1e-6)


def test_gradients_given_up_leave_no_rows() -> None:
    """`model.zero_grad()` before a new forward pass, without the preconditioner being told."""
    net = make_net()
    pre = KFACPreconditioner(net)
    for _ in range(3):
        net.zero_grad()
        x, y = make_data(8)
        F.cross_entropy(net(x), y).backward()
    pre.step(num_samples=8)
    assert float(pre.states["0"].folded.counts[0]) == 8


def test_a_weight_used_by_a_function_is_said() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(torch.tanh(self.first(x)), self.second.weight, self.second.bias)

    x, y = make_data(8)
    for strict in (False, True):
        net = Functional().double()
        pre = KFACPreconditioner(net, strict=strict)
        F.cross_entropy(net(x), y).backward()
        if strict:
            with pytest.raises(UserError, match="'second'"):
                pre.step(num_samples=8)
            continue
        with pytest.warns(UserWarning, match="'second' has a gradient"):
            pre.step(num_samples=8)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # once is enough
            pre.step(num_samples=8)


def test_a_second_backward_pass_is_said() -> None:
    net = make_net()
    pre = KFACPreconditioner(net)
    x, y = make_data(8)
    loss = F.cross_entropy(net(x), y)
    loss.backward(retain_graph=True)
    with pytest.warns(UserWarning, match="second backward"):
        loss.backward()
    pre.close()


def test_a_weight_shared_with_another_kind_of_module_is_refused() -> None:
    class Bag(nn.Module):
        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.table = weight

    linear = nn.Linear(4, 3)
    with pytest.raises(UserError, match="share a parameter"):
        KFACPreconditioner(nn.ModuleList([linear, Bag(linear.weight)]))
    embedding, decoder = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
    decoder.weight = embedding.weight
    with pytest.raises(UserError, match="share a parameter"):
        KFACPreconditioner(nn.ModuleList([embedding, decoder]))


def test_wrappers_that_cannot_be_followed_are_refused() -> None:
    class DistributedDataParallel(nn.Module):
        static_graph = True

        def __init__(self) -> None:
            super().__init__()
            self.module = make_net()

    with pytest.raises(UserError, match="static_graph"):
        KFACPreconditioner(DistributedDataParallel(), fisher="monte_carlo")
    KFACPreconditioner(DistributedDataParallel()).close()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kl_clip": lambda step: 1e-3 - step}, "kl_clip"),
        ({"norm_constraint": lambda step: 1.0 - step}, "norm_constraint"),
        ({"momentum": lambda step: 0.5 + step}, "momentum"),
        ({"weight_decay": lambda step: -float(step)}, "weight_decay"),
        ({"damping": lambda step: 1.0 - step}, "damping"),
    ],
)
def test_a_schedule_that_leaves_its_range_stops(options: dict[str, Any], said: str) -> None:
    net = make_net()
    optimizer = NaturalGradient(net, dense_steps=9, inverse_update_period=1, **options)
    x, y = make_data(8)

    def three_steps() -> None:
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step(num_samples=8)

    with pytest.raises(UserError, match=said):
        three_steps()
    assert all(torch.isfinite(p).all() for p in net.parameters())


def test_schedulers_find_momentum_and_weight_decay() -> None:
    optimizer = NaturalGradient(make_net(), lr=0.1, momentum=0.8, weight_decay=1e-3)
    assert optimizer.param_groups[0]["momentum"] == 0.8
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=10)
    assert optimizer.param_groups[0]["momentum"] == 0.95


def test_state_of_another_rank_or_optimizer_is_refused() -> None:
    net = make_net()
    optimizer = NaturalGradient(net)
    x, y = make_data(8)
    F.cross_entropy(net(x), y).backward()
    optimizer.step(num_samples=8)
    state = optimizer.preconditioner.state_dict()
    state["local.rank"] = torch.tensor([1, 3])
    with pytest.raises(UserError, match=r"ranks \[1\] of 3"):
        optimizer.preconditioner.load_state_dict(state)
    adam = torch.optim.Adam(net.parameters())
    with pytest.raises(UserError, match="no curvature"):
        optimizer.load_state_dict(adam.state_dict())
    with pytest.raises(UserError, match="make a new one"):
        copy.deepcopy(optimizer)


def test_a_state_that_one_rank_refuses_is_refused_by_all() -> None:
    """A file of rank 0 alone: rank 0 took it, and waited for the others in what came next."""

    def work(communicator: ThreadCommunicator) -> Any:
        x, y = make_data(8, communicator.rank)

        def begin() -> Any:
            net = make_net()
            for parameter in net.parameters():
                nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
            return net, KFACPreconditioner(net, inverse_delay=3, communicator=communicator)

        net, pre = begin()
        for _ in range(2):
            net.zero_grad()
            F.cross_entropy(net(x), y).backward()
            for parameter in net.parameters():
                assert parameter.grad is not None
                communicator.all_reduce(parameter.grad.view(-1), "gradient").wait()
            pre.step(num_samples=8)
        own = pre.state_dict()
        files[communicator.rank] = own
        communicator.barrier()
        _, other = begin()
        with pytest.raises(UserError) as refused:
            other.load_state_dict(files[0])
        assert other.steps == 0
        other.load_state_dict(own)
        return str(refused.value), other.steps

    files: dict[int, Any] = {}
    (first, steps), (second, others) = run_threads(2, work)
    assert "another rank was given a state that it cannot load; with several ranks each saves" in first
    assert "of ranks [0] of 2" in second
    assert steps == others == 2


def test_a_cast_model_is_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 3))
    pre = KFACPreconditioner(net)
    net.double()
    x, y = make_data(8)
    F.cross_entropy(net(x), y).backward()
    with pytest.raises(UserError, match="before the preconditioner is made"):
        pre.step(num_samples=8)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("to_sparse", [Tensor.to_sparse, Tensor.to_sparse_csr], ids=["coo", "csr"])
@pytest.mark.parametrize("fisher", ["empirical", "monte_carlo"])
@pytest.mark.parametrize("is_graph", [False, True])
def test_torchs_sparse_features_are_refused_in_a_sentence(to_sparse: Any, fisher: Any, is_graph: bool) -> None:
    """At the first forward pass; passes that are not measured take them, and so do layers that are frozen."""
    x, y = make_data(16)
    x = x.clamp_min(0)
    edge_index = torch.randint(16, (2, 40), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    first: Any = GCNConv(4, 6).double() if is_graph else nn.Linear(4, 6).double()
    net = nn.ModuleDict({"first": first, "out": nn.Linear(6, 3).double()})

    def run(given: Tensor) -> Tensor:
        hidden = first(given, edge_index) if is_graph else first(given)
        out: Tensor = net["out"](hidden)
        return out

    sparse = to_sparse(x)
    optimizer = NaturalGradient(net, fisher=fisher)
    with torch.no_grad():
        expected = run(sparse)
    with pytest.raises(UserError, match=r"layer 'first' was given features as a sparse_\w+ tensor, .*x\.to_dense\(\)"):
        run(sparse)
    with optimizer.preconditioner.paused():
        assert torch.equal(run(sparse), expected)
    first.requires_grad_(False)
    out = run(sparse)
    if fisher != "empirical":
        optimizer.observe(out)
    F.cross_entropy(out, y).backward()
    optimizer.step(num_samples=16)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_gradients_are_refused(kind: Any) -> None:
    net = nn.Sequential(kind(5, 4, sparse=True), nn.Linear(4, 3))
    with pytest.raises(UserError, match="sparse=True"):
        NaturalGradient(net)


def hooks_of(net: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in net.modules())


def test_an_optimizer_that_was_never_made_leaves_no_hooks() -> None:
    """Strict, a shared weight, a layer without a size."""
    net = nn.Sequential(nn.Linear(4, 6), nn.PReLU(), nn.Linear(6, 3))
    shared = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    shared[1].weight = shared[0].weight
    lazy = nn.Sequential(nn.Linear(4, 4), Linear(-1, 3))
    for model, options, said in ((net, {"strict": True}, "strict"), (shared, {}, "share"), (lazy, {}, "no size yet")):
        before = hooks_of(model)  # a lazy layer has one of its own
        for make in (KFACPreconditioner, NaturalGradient):
            with pytest.raises(UserError, match=said):
                make(model, **options)  # type: ignore[arg-type]
        assert hooks_of(model) == before


def test_an_optimizer_that_is_dropped_takes_its_hooks_along() -> None:
    """As in a notebook whose cell is run again, without close()."""
    net = make_net()
    x, y = make_data(8)
    optimizer = NaturalGradient(net)
    counts = {hooks_of(net)}
    for _ in range(3):
        F.cross_entropy(net(x), y).backward()
        optimizer.step(num_samples=8)
        optimizer = NaturalGradient(net)
        gc.collect()
        counts.add(hooks_of(net))
    assert len(counts) == 1
    assert 0 not in counts
    optimizer.preconditioner.close()
    assert hooks_of(net) == 0


def test_derivatives_of_torch_func_are_no_rows() -> None:
    """Nor does the hook of a factor step stand in their way."""
    net = make_net()
    x, y = make_data(6)
    plain = torch.func.jacrev(net)(x[0])
    pre = KFACPreconditioner(net)
    assert torch.equal(torch.func.jacrev(net)(x[0]), plain)
    assert torch.allclose(torch.func.vmap(torch.func.jacrev(net))(x)[0], plain)
    assert torch.allclose(torch.autograd.functional.jacobian(net, x[0], vectorize=True), plain)
    torch.func.grad(lambda rows: net(rows).sum())(x)
    assert all(layer.pending is None for layer in pre.layers.values())
    F.cross_entropy(net(x), y).backward()
    pre.step(num_samples=6)
    assert {float(state.folded.counts[0]) for state in pre.states.values()} == {6.0}


@pytest.mark.parametrize("fisher", ["empirical", "ggn"])
@pytest.mark.parametrize("is_first", [False, True])
def test_passes_that_are_no_training_are_not_measured(fisher: Any, is_first: bool) -> None:
    """An attack before or after the step's own pass, inside paused()."""
    x, y = make_data(16)
    found = []
    for attacks in (True, False):
        net = make_net()
        pre = KFACPreconditioner(net, fisher=fisher)

        def attack(net: nn.Module = net, pre: KFACPreconditioner = pre) -> None:
            inputs = x.clone().requires_grad_()
            with pre.paused():
                outputs = net(inputs)
                pre.observe(outputs)
                torch.autograd.grad(F.cross_entropy(outputs, y), inputs)

        if attacks and is_first:
            attack()
        outputs = net(x)
        pre.observe(outputs)
        F.cross_entropy(outputs, y).backward()
        if attacks and not is_first:
            attack()
        pre.step(num_samples=16)
        found.append(pre.factors())
    for name in ("0", "2"):
        assert torch.equal(found[0][name].A, found[1][name].A)
        assert torch.equal(found[0][name].G, found[1][name].G)


def test_a_bias_beside_a_frozen_weight_keeps_the_rows_of_each_micro_batch() -> None:
    net = make_net()
    pre = KFACPreconditioner(net)
    net[0].weight.requires_grad_(False)
    for seed in range(4):
        x, y = make_data(16, seed)
        (F.cross_entropy(net(x), y) / 4).backward()
    pre.step(num_samples=64)
    assert [state.folded.counts.tolist() for state in pre.states.values()] == [[64.0, 64.0]] * 2


def test_a_layer_that_was_frozen_for_long_keeps_its_inverses() -> None:
    """Its sums decay to nothing, and on the way there float32 has no precision left."""
    net = make_net().float()
    pre = KFACPreconditioner(net, factor_decay=0.5, factor_update_period=1, inverse_update_period=5)
    x, y = make_data(16)

    def train(steps: int) -> list[Tensor]:
        for _ in range(steps):
            net.zero_grad()
            F.cross_entropy(net(x.float()), y).backward()
            pre.step(num_samples=16)
        return [tensor.clone() for which in "AG" for tensor in pre.states["0"].inverses[which].tensors]

    before = train(20)
    net[0].requires_grad_(False)
    for kept, found in zip(before, train(200)):
        assert torch.allclose(found, kept, rtol=1e-4)
    assert float(pre.states["0"].folded.counts.max()) == 0


def test_layers_that_are_unfrozen_later_are_named() -> None:
    net = make_net()
    net[0].requires_grad_(False)
    optimizer = NaturalGradient(net)
    x, y = make_data(8)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step(num_samples=8)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step()
    net[0].requires_grad_(True)
    with pytest.warns(UserWarning, match=r"0\.weight, 0\.bias did not require a gradient when the optimizer was made"):
        step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step()


@pytest.mark.parametrize("frozen", ["0", "0.bias"])
def test_the_preconditioner_names_layers_that_are_unfrozen_later(frozen: str) -> None:
    """In a warning, once; a layer whose weight alone has factors, by its bias."""

    def begin(*, strict: bool) -> tuple[nn.Sequential, Callable[[], bool]]:
        net = make_net()
        kept = net[0] if frozen == "0" else net[0].bias
        kept.requires_grad_(False)
        # What was left over from before is no gradient.
        net[0].bias.grad = torch.ones_like(net[0].bias)
        pre = KFACPreconditioner(net, strict=strict)
        x, y = make_data(8)

        def step() -> bool:
            for parameter in net.parameters():
                if parameter.requires_grad:
                    parameter.grad = None
            F.cross_entropy(net(x), y).backward()
            taken = pre.step(num_samples=8)
            assert ("0.bias" in pre.left_over) == net[0].bias.requires_grad
            return taken

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            step()
        net[0].requires_grad_(True)
        return net, step

    net, step = begin(strict=False)
    names = r"0\.weight, 0\.bias" if frozen == "0" else r"^0\.bias"
    with pytest.warns(UserWarning, match=names + " did not require a gradient when the preconditioner was made"):
        step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step()
    net, step = begin(strict=True)
    before = [p.detach().clone() for p in net.parameters()]
    for _ in range(2):
        with pytest.raises(UserError, match=r"strict: .*0\.bias did not require a gradient when the precond"):
            step()
    assert all(torch.equal(p, kept) for p, kept in zip(net.parameters(), before))


def test_a_strict_optimizer_refuses_layers_that_are_unfrozen_later() -> None:
    net = make_net()
    net[0].requires_grad_(False)
    optimizer = NaturalGradient(net, strict=True)
    x, y = make_data(8)
    net[0].requires_grad_(True)
    F.cross_entropy(net(x), y).backward()
    with pytest.raises(UserError, match=r"strict: 0\.weight, 0\.bias did not require a gradient when the optimizer"):
        optimizer.step(num_samples=8)


def test_parameters_added_after_they_were_unfrozen_are_named_once() -> None:
    net = make_net()
    net[0].requires_grad_(False)
    optimizer = NaturalGradient(net, strict=True)
    x, y = make_data(8)
    net[0].requires_grad_(True)
    with pytest.warns(UserWarning, match="take their plain gradient"):
        optimizer.add_param_group({"params": list(net[0].parameters())})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step(num_samples=8)


def test_complex_weights_keep_their_gradient() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4, dtype=torch.complex64), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(self.a(x.to(torch.complex64)).abs())
            return out

    net = Net()
    with pytest.warns(UserWarning, match=r"plain gradient.*a\.weight, a\.bias"):
        pre = KFACPreconditioner(net)
    F.cross_entropy(net(torch.randn(5, 3)), torch.tensor([0, 1, 0, 1, 1])).backward()
    before = net.a.weight.grad.clone()
    assert pre.step(num_samples=5)
    assert torch.equal(net.a.weight.grad, before)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss_scale": 1024.0}, "give one that returns the scale, scaler.get_scale"),
        ({"max_rows": 10.5}, "max_rows=10.5 is out of range; give a whole number"),
        ({"factor_update_period": 2.5}, "factor_update_period=2.5 is out of range; give a whole number"),
        ({"layout": "low_rank"}, "is no FactorLayout"),
    ],
)
def test_arguments_of_another_kind_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        KFACPreconditioner(make_net(), **options)


def test_samples_of_an_empty_batch() -> None:
    net = make_net()
    pre = KFACPreconditioner(net, weight_sharing="reduce")
    outputs = net(torch.zeros(0, 4, dtype=F64))
    pre.observe(outputs, row_samples=torch.zeros(0, dtype=torch.int64))
    outputs.sum().backward()
    assert pre.step(num_samples=0)


def test_steps_that_a_grad_scaler_skips_are_counted() -> None:
    net = make_net()
    optimizer = NaturalGradient(net, loss_scale=lambda: 1.0, max_dropped_steps=3)
    x, y = make_data(8)

    def skipped_steps() -> None:
        for _ in range(5):
            optimizer.zero_grad()
            (F.cross_entropy(net(x), y) * float("inf")).backward()  # and no step: the scaler found an overflow

    with pytest.raises(TrainingError, match="3 steps in a row"):
        skipped_steps()
    assert optimizer.preconditioner.dropped_steps == 3


def test_half_precision_only_where_rounding_is_harmless() -> None:
    """λ = tr M / 100 may be rounded to float16, a λ far below may not: the direction stays right either way."""
    for damping, half in ((1e-2, True), (1e-5, False)):
        directions = []
        for precision in ("float16", "full"):
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(30, 20))
            pre = KFACPreconditioner(
                net, damping_mode="relative", damping=damping, damping_g_ratio=1.0, inverse_precision=precision
            )
            x = torch.randn(200, 30) * torch.logspace(0, -3, 30)
            F.mse_loss(net(x), torch.randn(200, 20), reduction="sum").backward()
            pre.step(num_samples=200, mean_gradients=True)
            kept = {t.dtype for t in pre.states["0"].inverses["A"].tensors}
            assert kept == ({torch.float16} if half and precision == "float16" else {torch.float32})
            directions.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
        error = torch.linalg.vector_norm(directions[0] - directions[1]) / torch.linalg.vector_norm(directions[1])
        assert float(error) < (2e-2 if half else 1e-6)


def test_curvature_is_computed_outside_autocast() -> None:
    """Everything inside autocast: rows are half as precise, the products of rows are not."""
    found = []
    for inside in (True, False):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(16, 3))
        x, y = torch.randn(64, 16).bfloat16().float(), torch.randint(3, (64,))
        pre = KFACPreconditioner(net)
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(net(x).float(), y)
            if inside:
                loss.backward()
                pre.step(num_samples=64)
        if not inside:
            loss.backward()
            pre.step(num_samples=64)
        found.append([*pre.factors()["0"], *(p.grad for p in net.parameters())])
    for mine, theirs in zip(*found):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fisher", ["empirical", "monte_carlo", "ggn"])
def test_an_input_overwritten_after_its_layer_is_refused_under_autocast(fisher: Any) -> None:
    """autograd keeps a copy in bfloat16 there, and says nothing; the rows would be those of another input."""
    net = make_net().float()
    x, y = make_data(8)
    x = x.float()
    pre = KFACPreconditioner(net, fisher=fisher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = net(x)
        x.zero_()
    measure = F.cross_entropy(outputs, y).backward if fisher == "empirical" else partial(pre.observe, outputs)
    with pytest.raises(UserError, match="layer '0', of shape \\(8, 4\\), was overwritten"):
        measure()


def test_edge_weights_overwritten_after_their_layer_are_refused() -> None:
    """autograd does not need them for the gradient of W; the aggregated rows do."""
    conv = GCNConv(4, 3).double()
    x, y = make_data(8)
    edge_index = torch.arange(8).repeat(2, 1).roll(1, 1)
    edge_weight = torch.ones(8, dtype=F64)
    pre = KFACPreconditioner(conv)
    outputs = conv(x, edge_index, edge_weight)
    edge_weight *= 2
    with pytest.raises(UserError, match="overwritten"):
        F.cross_entropy(outputs, y).backward()
    pre.close()


def test_rows_of_inference_mode_are_measured() -> None:
    """Features made under inference_mode carry no count of writes; under autocast autograd takes them."""
    net = nn.Linear(4, 3)
    with torch.inference_mode():
        x = make_data(8)[0].float()
    pre = KFACPreconditioner(net)
    for _ in range(2):
        net.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = net(x)
        F.cross_entropy(outputs, make_data(8)[1]).backward()
        pre.step(num_samples=8)
    rows = torch.cat([x, torch.ones(8, 1)], dim=1)
    assert torch.allclose(pre.factors()[""].A, rows.T @ rows / 8, rtol=1e-5)


@pytest.mark.parametrize("fisher", ["monte_carlo", "ggn"])
@pytest.mark.parametrize("successor", ["NaturalGradient", "Adam"])
def test_an_optimizer_that_was_replaced_keeps_no_forward_passes(fisher: Any, successor: str) -> None:
    """Not closed, it still sees every call of the layers: it keeps those of a step's forward passes at most, and
    goes on where it is used again."""
    net = make_net()
    x, y = make_data(8)
    old = NaturalGradient(net, fisher=fisher)
    new: Any = (
        NaturalGradient(net, fisher=fisher) if successor == "NaturalGradient" else torch.optim.Adam(net.parameters())
    )
    for _ in range(10):
        new.zero_grad()
        outputs = net(x)
        net(x)  # an evaluation that forgot torch.no_grad()
        if successor == "NaturalGradient":
            new.observe(outputs)
        F.cross_entropy(outputs, y).backward()
        new.step(**({"num_samples": 8} if successor == "NaturalGradient" else {}))
        assert len(old.preconditioner.capture._records) <= 4
    assert old.preconditioner.capture.is_waiting_for_outputs
    old.zero_grad()
    outputs = net(x)
    old.observe(outputs)
    F.cross_entropy(outputs, y).backward()
    old.step(num_samples=8)
    rows = torch.cat([x, torch.ones(8, 1, dtype=F64)], dim=1)
    assert torch.allclose(old.preconditioner.factors()["0"].A, rows.T @ rows / 8)


def test_a_sparse_matrix_that_two_layers_read_is_not_taken_for_overwritten() -> None:
    """torch counts what PyG's normalisation does with it as writes, though its values stay."""
    net = nn.ModuleList([GCNConv(4, 4), GCNConv(4, 3)]).double()
    x, y = make_data(8)
    adjacency = torch.eye(8, dtype=F64).roll(1, 0).to_sparse_coo()
    pre = KFACPreconditioner(net)
    written = adjacency._version
    F.cross_entropy(net[1](net[0](x, adjacency), adjacency), y).backward()
    assert adjacency._version > written, "otherwise this test says nothing"
    assert pre.step(num_samples=8)
    pre.close()


def first_step_of_a_sampled_loop(
    num_samples: float, *, kind: str = "natural_gradient", max_rows: int | None = 30
) -> None:
    """A GCN on 200 nodes of which the first 20 are the seeds."""
    torch.manual_seed(0)
    conv, head = GCNConv(4, 8).double(), GCNConv(8, 3).double()
    net = nn.ModuleList([conv, head])
    x, y = make_data(200)
    edges = torch.randint(200, (2, 600), generator=torch.Generator().manual_seed(2))
    fisher = "monte_carlo" if kind == "monte_carlo" else "empirical"
    optimizer: Any = (
        KFACPreconditioner(net, max_rows=max_rows)
        if kind == "preconditioner"
        else NaturalGradient(net, max_rows=max_rows, fisher=fisher)
    )
    for _ in range(2):
        net.zero_grad()
        out = head(conv(x, edges).relu(), edges)[:20]
        if fisher == "monte_carlo":
            optimizer.observe(out)
        F.cross_entropy(out, y[:20]).backward()
        optimizer.step(num_samples=num_samples)


@pytest.mark.parametrize("kind", ["natural_gradient", "preconditioner", "monte_carlo"])
def test_a_batchs_nodes_instead_of_its_seeds_are_said(kind: str) -> None:
    """Once, and not where num_samples is that of the seeds, or may be that of pairs of rows."""
    with pytest.warns(
        UserWarning, match=r"num_samples=200\), but the loss has a gradient at the first 20 rows"
    ) as caught:
        first_step_of_a_sampled_loop(200, kind=kind)
    assert len(caught) == 1
    for right in (20, 10, 150, 1000):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            first_step_of_a_sampled_loop(right, kind=kind)


def test_rows_that_are_not_drawn_count_as_reached() -> None:
    """At most 5 rows of a layer are measured, of 20 and more."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first_step_of_a_sampled_loop(20, max_rows=5)


def test_a_batch_norm_does_not_hide_that() -> None:
    """It gives every row before it a gradient; the last layer has one at the seeds' rows."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).double()
    x, y = make_data(200)
    pre = KFACPreconditioner(net)
    F.cross_entropy(net(x)[:20], y[:20]).backward()
    with pytest.warns(UserWarning, match="gradient at the first 20 rows"):
        pre.step(num_samples=200)


def test_rows_without_a_gradient_are_no_mistake() -> None:
    """Of a loss that is satisfied at most rows, all of which it averages over."""
    net = make_net()
    x, _ = make_data(200)
    wanted = torch.where(torch.arange(200) % 5 == 0, 100.0, -100.0).double()
    pre = KFACPreconditioner(net)
    F.relu(wanted - net(x)[:, 0]).mean().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pre.step(num_samples=200)


@pytest.mark.parametrize("wrong", ["8", [8], torch.ones(8)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_number_of_seeds_that_is_none_is_refused(wrong: Any, reduction: Any) -> None:
    net = make_net()
    x, y = make_data(8)
    optimizer = NaturalGradient(net, loss_reduction=reduction)
    F.cross_entropy(net(x), y, reduction=reduction).backward()
    with pytest.raises(UserError, match=r"num_samples is a \w+, no number; give the number of seeds"):
        optimizer.step(num_samples=wrong)
    optimizer.step(num_samples=torch.tensor(8))  # type: ignore[arg-type]  # a mask's sum, say


def test_no_seeds_and_a_gradient_is_doubted() -> None:
    """Rightly 0 is on a rank without seeds, whose loss has no gradient."""
    net = make_net()
    x, y = make_data(8)
    optimizer = NaturalGradient(net)
    F.cross_entropy(net(x), y).backward()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step(num_samples=0)
    assert "step(num_samples=0), but the loss has a gradient" in str(caught[0].message)
    net = make_net()
    optimizer = NaturalGradient(net)
    (0.0 * net(x).sum()).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(num_samples=0)
