"""The laws of sampling. Each is a function that raises AssertionError; each is seen to catch a mutant.

A law is checked on one sampler over many batches: DGL's own fused sampler is right for its first batch only.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from dngd.errors import TrainingError
from dngd.sampling import import_dgl, pipeline, process, schedule
from dngd.sampling.minibatch import LayerGraph, MiniBatch
from dngd.sampling.pipeline import SamplerPipeline
from dngd.sampling.sampler import NeighborSampler
from dngd.sampling.topology import Topology
from tests.unit.sampling.graphs import (
    ROOT,
    digest,
    graphs,
    in_neighbours,
    make_pipeline,
    run_python,
    skewed_graph,
    take,
    topology,
)

Sample = Callable[[torch.Tensor, int], Sequence[LayerGraph]]
FANOUTS = (4, 3, 5)


@contextmanager
def patched(target: object, name: str, value: object) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, name, value)
        yield


def sampler_of(graph: Topology, fanouts: Sequence[int] = FANOUTS) -> Sample:
    return NeighborSampler(graph.indptr, graph.indices, graph.edge_weight, fanouts).sample


def seed_sets(num_nodes: int, count: int = 25, size: int = 20) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randperm(num_nodes, generator=generator)[:size] for _ in range(count)]


# --- what a batch is


def law_batch_is_of_the_graph(graph: Topology, sample: Sample, fanouts: Sequence[int], sets: Any) -> None:
    """Edges are edges of the graph, with their own weights; each destination gets min(fanout, degree)
    distinct neighbours; layers fit on each other; degrees are the full graph's."""
    num_nodes = graph.indptr.shape[0] - 1
    for number, seeds in enumerate(sets):
        layers = sample(seeds, number)
        assert len(layers) == len(fanouts)
        assert torch.equal(layers[-1].dst_nodes, seeds)
        for depth, (layer, fanout) in enumerate(zip(layers, fanouts, strict=True)):
            assert layer.global_indices == (depth == 0)
            assert layer.num_dst == layer.dst_nodes.shape[0] == layer.degrees.shape[0]
            assert layer.indptr.shape == (layer.num_dst + 1,)
            assert int(layer.indptr[0]) == 0
            assert int(layer.indptr[-1]) == layer.num_edges
            if depth == 0:
                sources = layer.indices
                assert layer.num_src == num_nodes
            else:
                below = layers[depth - 1].dst_nodes
                assert layer.num_src == below.shape[0] == below.unique().shape[0]
                assert torch.equal(below[: layer.num_dst], layer.dst_nodes)
                sources = below[layer.indices]
            for row, node in enumerate(layer.dst_nodes.tolist()):
                neighbours = in_neighbours(graph, node)
                first, last = int(layer.indptr[row]), int(layer.indptr[row + 1])
                drawn = sources[first:last].tolist()
                assert int(layer.degrees[row]) == len(neighbours)
                assert len(drawn) == (len(neighbours) if fanout == -1 else min(fanout, len(neighbours)))
                assert len(set(drawn)) == len(drawn)
                assert set(drawn) <= set(neighbours)
                if len(drawn) == len(neighbours) and fanout == -1:
                    assert drawn == neighbours
                if graph.edge_weight is None:
                    assert layer.edge_weight is None
                    continue
                assert layer.edge_weight is not None
                start = int(graph.indptr[node])
                edges = [start + neighbours.index(source) for source in drawn]
                assert torch.equal(layer.edge_weight[first:last], graph.edge_weight[edges])


@given(
    graph=graphs(),
    fanouts=st.lists(st.sampled_from([-1, 1, 2, 3, 100]), min_size=1, max_size=3),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_batches_are_of_the_graph(graph: Topology, fanouts: list[int], data: st.DataObject) -> None:
    nodes = st.integers(0, graph.indptr.shape[0] - 2)
    sets = data.draw(st.lists(st.lists(nodes, unique=True), min_size=1, max_size=4))
    tensors = [torch.tensor(seeds, dtype=torch.int64) for seeds in sets]
    law_batch_is_of_the_graph(graph, sampler_of(graph, fanouts), fanouts, tensors)


def test_one_sampler_stays_right_over_many_batches() -> None:
    graph = skewed_graph()
    law_batch_is_of_the_graph(graph, sampler_of(graph), FANOUTS, seed_sets(400))


def with_replacement() -> AbstractContextManager[None]:
    sampling = import_dgl().sampling
    draw = sampling.sample_neighbors
    return patched(sampling, "sample_neighbors", lambda *args: draw(*args, replace=True))


def one_too_few() -> AbstractContextManager[None]:
    sampling = import_dgl().sampling
    draw = sampling.sample_neighbors
    return patched(sampling, "sample_neighbors", lambda g, nodes, fanout: draw(g, nodes, max(fanout - 1, 1)))


def changed_layer(change: Callable[[LayerGraph], dict[str, Any]]) -> AbstractContextManager[None]:
    original = NeighborSampler._sample_layer

    def mutant(self: NeighborSampler, *drawn: Any, **options: Any) -> Any:
        layer, sources = original(self, *drawn, **options)
        return LayerGraph(**{**vars(layer), **change(layer)}), sources

    return patched(NeighborSampler, "_sample_layer", mutant)


def shifted_sources() -> AbstractContextManager[None]:
    return changed_layer(lambda layer: {"indices": (layer.indices + 1) % layer.num_src})


def neighbouring_weights() -> AbstractContextManager[None]:
    return changed_layer(lambda layer: {"edge_weight": layer.edge_weight.roll(1)})  # type: ignore[union-attr]


def sampled_degrees() -> AbstractContextManager[None]:
    return changed_layer(lambda layer: {"degrees": layer.indptr.diff()})


def sorted_sources() -> AbstractContextManager[None]:
    """Source rows renumbered by node id: destinations are no longer the first of them."""
    original = NeighborSampler._sample_layer

    def mutant(self: NeighborSampler, *drawn: Any, **options: Any) -> Any:
        layer, sources = original(self, *drawn, **options)
        return layer, sources.sort().values

    return patched(NeighborSampler, "_sample_layer", mutant)


@pytest.mark.parametrize(
    "mutant",
    [with_replacement, one_too_few, shifted_sources, neighbouring_weights, sampled_degrees, sorted_sources],
)
def test_law_of_batches_catches(mutant: Callable[[], AbstractContextManager[None]]) -> None:
    graph = skewed_graph()
    with mutant(), pytest.raises((AssertionError, IndexError)):
        law_batch_is_of_the_graph(graph, sampler_of(graph), FANOUTS, seed_sets(400))


def test_duplicate_seeds_are_refused() -> None:
    with pytest.raises(AssertionError, match="distinct"):
        sampler_of(skewed_graph())(torch.tensor([3, 3]), 0)


DGL_FUSED = """
import torch
from dngd.sampling import import_dgl
from dngd.sampling.minibatch import LayerGraph
from tests.laws.test_sampling_laws import FANOUTS, law_batch_is_of_the_graph, sampler_of, seed_sets
from tests.unit.sampling.graphs import skewed_graph
dgl = import_dgl()
dgl.utils.set_num_threads(2)  # with one thread DGL does not take its fused path
graph = skewed_graph(weighted=False)
sets = seed_sets(400)

def fused(dtype):
    csc = dgl.graph(("csc", (graph.indptr.to(dtype), graph.indices.to(dtype), torch.empty(0, dtype=dtype))))
    sampler = dgl.dataloading.NeighborSampler(list(FANOUTS), fused=True)
    def sample(seeds, rng_seed):
        dgl.seed(rng_seed)
        _, _, blocks = sampler.sample_blocks(csc, seeds.to(dtype))
        layers = []
        for depth, block in enumerate(blocks):
            indptr, indices, _ = block.adj_tensors("csc")
            nodes = block.srcdata[dgl.NID].long()
            dst = nodes[: block.num_dst_nodes()]
            indices = nodes[indices.long()] if depth == 0 else indices.long()
            layers.append(LayerGraph(indptr.long(), indices, 400 if depth == 0 else len(nodes), len(dst),
                                     graph.indptr[dst + 1] - graph.indptr[dst], None, dst, depth == 0))
        return layers
    return sample

def holds(sample, sets):
    try:
        law_batch_is_of_the_graph(graph, sample, FANOUTS, sets)
    except (AssertionError, IndexError):
        return False
    return True

print(holds(sampler_of(graph), sets), holds(fused(torch.int32), sets[:1]), holds(fused(torch.int32), sets))
"""


def test_law_of_batches_catches_dgls_fused_int32_sampler() -> None:
    """It passes on its first batch and fails later; ours holds in the same process with two DGL threads."""
    done = run_python(DGL_FUSED, OMP_NUM_THREADS="2")
    assert done.stdout.split() == ["True", "True", "False"], done.stdout + done.stderr


# --- each neighbour equally likely


def law_neighbours_are_equally_likely(
    graph: Topology, sample: Sample, fanout: int, seeds: torch.Tensor | None = None
) -> None:
    """Inclusion counts over many batches of one sampler pass a chi-square test, at every degree.

    A neighbour is drawn with p = k/d; counts of a draw without replacement have variance np(1 - p) d/(d - 1),
    which the statistic divides out.
    """
    degrees = graph.indptr.diff()
    if seeds is None:
        seeds = (degrees > fanout).nonzero().flatten()
    counts: dict[int, Counter[int]] = {node: Counter() for node in seeds.tolist()}
    num_batches = 600
    for number in range(num_batches):
        (layer,) = sample(seeds, schedule.sampling_seed(0, 0, number, 0))
        for node, drawn in zip(seeds.tolist(), layer.indices.reshape(-1, fanout).tolist(), strict=True):
            counts[node].update(drawn)
    statistic, freedom = 0.0, 0
    for node, seen in counts.items():
        degree = int(degrees[node])
        share = fanout / degree
        expected = num_batches * share
        squares = sum((seen[source] - expected) ** 2 for source in in_neighbours(graph, node))
        statistic += squares / (expected * (1 - share)) * (degree - 1) / degree
        freedom += degree - 1
    assert chi2.ppf(1e-4, freedom) < statistic < chi2.ppf(1 - 1e-4, freedom), (statistic, freedom)


def skewed_stars() -> Topology:
    graph = skewed_graph(seed=3, weighted=False)
    assert int(graph.indptr.diff().max()) >= 150
    return graph


def test_neighbours_are_equally_likely() -> None:
    graph = skewed_stars()
    law_neighbours_are_equally_likely(graph, sampler_of(graph, [3]), 3)


def few_streams() -> AbstractContextManager[None]:
    return patched(schedule, "derive_seed", lambda run_seed, *words: sum(words) % 50)


def low_ids_first() -> AbstractContextManager[None]:
    """Low node ids slightly preferred."""
    dgl = import_dgl()
    draw = dgl.sampling.sample_neighbors

    def biased(graph: Any, nodes: torch.Tensor, fanout: int) -> Any:
        with graph.local_scope():
            sources, _ = graph.edges(order="eid")
            graph.edata["p"] = 1.2 - 0.4 * (sources > 200).float()
            return draw(graph, nodes, fanout, prob="p")

    return patched(dgl.sampling, "sample_neighbors", biased)


@pytest.mark.parametrize("mutant", [few_streams, low_ids_first])
def test_law_of_likelihood_catches(mutant: Callable[[], AbstractContextManager[None]]) -> None:
    graph = skewed_stars()
    with mutant(), pytest.raises(AssertionError):
        law_neighbours_are_equally_likely(graph, sampler_of(graph, [3]), 3)


# --- who gets which seeds


def law_each_seed_once_an_epoch(
    nodes: torch.Tensor, run_seed: int, epoch: int, num_shards: int, batch_size: int
) -> None:
    """Over steps and shards each node once; shards are full but in the last step, and there differ by 1."""
    seen: list[int] = []
    num_steps = schedule.steps_per_epoch(nodes.shape[0], num_shards, batch_size)
    for step in range(num_steps):
        parts = schedule.shard_seeds(nodes, run_seed, epoch, step, num_shards, batch_size)
        sizes = [part.shape[0] for part in parts]
        assert len(sizes) == num_shards
        assert max(sizes) <= batch_size
        assert max(sizes) - min(sizes) <= 1
        assert sum(sizes) > 0
        assert step == num_steps - 1 or min(sizes) == batch_size
        seen += torch.cat(parts).tolist()
    assert sorted(seen) == sorted(nodes.tolist())


@given(
    num_nodes=st.integers(1, 200),
    run_seed=st.integers(-(2**63), 2**63 - 1),
    epoch=st.integers(0, 10**6),
    num_shards=st.integers(1, 9),
    batch_size=st.integers(1, 40),
)
@settings(deadline=None)
def test_each_seed_once_an_epoch(num_nodes: int, run_seed: int, epoch: int, num_shards: int, batch_size: int) -> None:
    law_each_seed_once_an_epoch(torch.arange(num_nodes) * 3, run_seed, epoch, num_shards, batch_size)


def truncated_division() -> AbstractContextManager[None]:
    """The remainder of an uneven last batch is dropped."""

    def mutant(num_train: int, step: int, num_shards: int, batch_size: int) -> tuple[int, ...]:
        first = step * num_shards * batch_size
        each = min(batch_size, (num_train - first) // num_shards)
        return tuple(first + shard * each for shard in range(num_shards + 1))

    return patched(schedule, "shard_bounds", mutant)


def full_first_shards() -> AbstractContextManager[None]:
    """The last batch fills the first shards and starves the others."""

    def mutant(num_train: int, step: int, num_shards: int, batch_size: int) -> tuple[int, ...]:
        first = step * num_shards * batch_size
        return tuple(min(first + shard * batch_size, num_train) for shard in range(num_shards + 1))

    return patched(schedule, "shard_bounds", mutant)


@pytest.mark.parametrize("mutant", [truncated_division, full_first_shards])
def test_law_of_seeds_catches(mutant: Callable[[], AbstractContextManager[None]]) -> None:
    with mutant(), pytest.raises(AssertionError):
        law_each_seed_once_an_epoch(torch.arange(107), 0, 0, 4, 10)


# --- what a batch depends on


def law_content_depends_on_coordinates_alone(open_pipeline: Callable[..., SamplerPipeline]) -> None:
    """Starting mid-way, or executing other shards in another order, gives the same batches; and batches
    of different coordinates or run seeds differ."""
    reference = {batch.coordinates: digest([batch]) for batch in take(open_pipeline(), 3 * 17)}
    assert {at.epoch for at in reference} == {0, 1, 2}
    for changes in ({"start": (1, 3)}, {"shards": [3, 1]}, {"start": (0, 6), "shards": [1]}):
        for batch in take(open_pipeline(**changes), 8):
            assert digest([batch]) == reference[batch.coordinates], (changes, batch.coordinates)

    def draws(batches: list[MiniBatch]) -> list[tuple[int, ...]]:
        # all nodes have the same neighbours here, so that only the random draw tells batches apart
        return [tuple(layer.indices.tolist()) for batch in batches for layer in batch.layers]

    everything = [list(range(60))] * 60
    uniform = {"store": topology(everything), "train_nodes": torch.arange(60), "fanouts": (3,)}
    uniform |= {"batch_size": 4, "aggregation": None}
    first = draws(take(open_pipeline(**uniform), 24))
    assert len(set(first)) == len(first)
    other = draws(take(open_pipeline(**uniform, run_seed=12), 24))
    assert set(first).isdisjoint(other)


def inline(**changes: object) -> SamplerPipeline:
    """A pipeline without processes, whatever thread of this test run used DGL first."""
    with patched(pipeline, "inline_sampling_is_canonical", lambda: True):
        return make_pipeline(0, **changes)


def test_content_depends_on_coordinates_alone() -> None:
    law_content_depends_on_coordinates_alone(inline)


def unseeded() -> AbstractContextManager[None]:
    """Seeds DGL once, not for each batch."""
    dgl = import_dgl()
    return patched(dgl, "seed", lambda value: None)


def seeds_without(*dropped: str) -> Callable[[], AbstractContextManager[None]]:
    original = schedule.sampling_seed

    def mutant(run_seed: int, epoch: int, step: int, shard: int) -> int:
        words = {"run_seed": run_seed, "epoch": epoch, "step": step, "shard": shard}
        return original(**{**words, **dict.fromkeys(dropped, 0)})

    return lambda: patched(pipeline, "sampling_seed", mutant)


@pytest.mark.parametrize(
    "mutant",
    [unseeded, *(seeds_without(word) for word in ("run_seed", "epoch", "step", "shard"))],
    ids=["unseeded", "without run seed", "without epoch", "without step", "without shard"],
)
def test_law_of_content_catches(mutant: Callable[[], AbstractContextManager[None]]) -> None:
    with mutant(), pytest.raises(AssertionError):
        law_content_depends_on_coordinates_alone(inline)


NUM_BATCHES = 30

INLINE = f"""
import logging
logging.basicConfig(level=logging.INFO)
from tests.unit.sampling.graphs import digest, make_pipeline, take
with make_pipeline(0) as batches:
    print(len(batches.pids), digest(take(batches, {NUM_BATCHES})))
"""
USED_ELSEWHERE = "from dngd.sampling import import_dgl; dgl = import_dgl(); dgl.seed(5); dgl.random.choice(9, 2)"


@pytest.fixture(scope="module")
def inline_digest() -> str:
    done = run_python(INLINE)
    assert done.returncode == 0, done.stderr
    num_children, result = done.stdout.split()
    assert num_children == "0"
    return result


@pytest.fixture(scope="module")
def pipelines() -> Iterator[dict[int, SamplerPipeline]]:
    """One a number of samplers, started together; the tests of failures below end them."""
    with make_pipeline(1) as one, make_pipeline(2) as two, make_pipeline(4) as four:
        yield {1: one, 2: two, 4: four}


def law_same_batches_for_any_number_of_samplers(inline_digest: str, batches: SamplerPipeline) -> None:
    assert digest(take(batches, NUM_BATCHES)) == inline_digest


@pytest.mark.parametrize("num_samplers", [1, 2, 4])
def test_same_batches_for_any_number_of_samplers(
    inline_digest: str, pipelines: dict[int, SamplerPipeline], num_samplers: int
) -> None:
    assert len(set(pipelines[num_samplers].pids)) == num_samplers
    law_same_batches_for_any_number_of_samplers(inline_digest, pipelines[num_samplers])


def test_law_of_samplers_catches_seeds_by_process(inline_digest: str) -> None:
    original = SamplerPipeline._rng_seed
    mutant = patched(SamplerPipeline, "_rng_seed", lambda self, at: original(self, at) ^ len(self.pids))
    with mutant, make_pipeline(1) as batches, pytest.raises(AssertionError):
        law_same_batches_for_any_number_of_samplers(inline_digest, batches)


def test_inline_falls_back_to_a_child_where_another_thread_used_dgl_first(inline_digest: str) -> None:
    done = run_python(USED_ELSEWHERE + "\n" + INLINE)
    assert done.stdout.split() == ["1", inline_digest], done.stderr
    assert "another thread" in done.stderr


@pytest.mark.slow
def test_law_of_samplers_catches_a_missing_thread_check(inline_digest: str) -> None:
    """Without the check at the start, the other thread's stream is drawn: the trap is real."""
    unchecked = "from dngd.sampling import pipeline; pipeline.inline_sampling_is_canonical = lambda: True"
    done = run_python("\n".join([USED_ELSEWHERE, unchecked, INLINE]))
    num_children, result = done.stdout.split()
    assert num_children == "0", done.stderr
    assert result != inline_digest


# --- failures end, and say where


def law_a_killed_child_is_named_at_once(batches: SamplerPipeline, timeout_seconds: float) -> None:
    """Within seconds, far from the timeout: the signal, the process and the batch's coordinates."""
    last = take(batches, 3)[-1].coordinates
    victim = batches.pids[-1]
    os.kill(victim, signal.SIGKILL)
    begin = time.monotonic()
    try:
        while time.monotonic() - begin < 2 * timeout_seconds:
            last = next(batches).coordinates
        raise AssertionError("batches went on without the process")
    except TrainingError as error:
        message = str(error)
    assert time.monotonic() - begin < timeout_seconds / 2
    assert "SIGKILL" in message
    assert f"pid {victim}" in message
    assert f"epoch {last.epoch}, step {last.step if last.shard < 3 else last.step + 1}, shard" in message
    assert all(gone(pid) for pid in batches.pids)


def gone(pid: int, within_seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + within_seconds
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{pid}/stat") as stat:
                if stat.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_a_killed_child_is_named_at_once(pipelines: dict[int, SamplerPipeline]) -> None:
    law_a_killed_child_is_named_at_once(pipelines[4], 60.0)


def test_law_of_killed_children_catches_a_deaf_reader() -> None:
    def deaf(replies: Any, answers: Any) -> None:
        with replies:
            try:
                while True:
                    answers.put(process.wire.receive(replies))
            except ConnectionError:
                return

    with patched(process, "_read", deaf):
        batches = impatient(make_pipeline(1))
        with pytest.raises(AssertionError):
            law_a_killed_child_is_named_at_once(batches, 1.0)


def impatient(batches: SamplerPipeline) -> SamplerPipeline:
    """Wait for the processes to start, and from then on one second for a batch."""
    take(batches, len(batches.pids))
    for child in batches._processes:
        child._timeout_seconds = 1.0
    return batches


def law_a_silent_child_is_an_error(batches: SamplerPipeline, timeout_seconds: float) -> None:
    """After the timeout and not for ever: the coordinates, what the process does; then it is ended."""
    take(batches, 1)
    child = batches.pids[0]
    os.kill(child, signal.SIGSTOP)
    begin = time.monotonic()
    with pytest.raises(TrainingError) as caught:
        take(batches, 10)
    assert time.monotonic() - begin < timeout_seconds + 10
    for words in (f"pid {child}", "epoch ", "step ", "shard ", f"within {timeout_seconds:g} s", "stopped"):
        assert words in str(caught.value), words
    assert gone(child)


def test_a_silent_child_is_an_error_that_stays(pipelines: dict[int, SamplerPipeline]) -> None:
    law_a_silent_child_is_an_error(impatient(pipelines[1]), 1.0)
    with pytest.raises(TrainingError, match="stopped"):
        next(pipelines[1])


@pytest.mark.slow
def test_law_of_silence_catches_a_child_left_behind(pipelines: dict[int, SamplerPipeline]) -> None:
    with patched(SamplerPipeline, "close", lambda self: None), pytest.raises(AssertionError):
        law_a_silent_child_is_an_error(impatient(pipelines[2]), 1.0)


PARENT = """
import time
from tests.unit.sampling.graphs import make_pipeline, take
batches = make_pipeline(1)
take(batches, 2)
print(*batches.pids, flush=True)
time.sleep(600)
"""


def test_children_end_with_a_killed_parent() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        (child,) = map(int, parent.stdout.readline().split())
        assert os.path.exists(f"/proc/{child}")
    finally:
        parent.kill()
        parent.wait()
        if parent.stdout is not None:
            parent.stdout.close()
    assert gone(child)
