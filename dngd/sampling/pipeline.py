"""From a graph and its training nodes to mini-batches in a fixed order, drawn ahead of use.

Owns the order, the queues and the processes. What a batch holds depends on (run seed, epoch, step, shard)
alone: not on the number of samplers, nor on where the iteration started.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from dngd.errors import TrainingError, UserError
from dngd.graph.advice import read_randomly
from dngd.models.message_passing import Aggregation
from dngd.models.sparse_rows import SparseRows
from dngd.sampling.forked import STOP_SECONDS
from dngd.sampling.hops import HopSampler
from dngd.sampling.inline import inline_sampling_is_canonical, submit_to_sampling_thread
from dngd.sampling.left_out import left_out_by
from dngd.sampling.link_seeds import LinkSeeds
from dngd.sampling.minibatch import BatchCoordinates, Drawn, MiniBatch
from dngd.sampling.operators import FirstRows, LayerOperators, first_rows_of, node_norm
from dngd.sampling.process import SamplerProcess
from dngd.sampling.sampler import NeighborSampler, check_fanouts
from dngd.sampling.schedule import UnlabelledSeeds, epoch_permutation, sampling_seed, shard_bounds, steps_per_epoch
from dngd.sampling.sparse_features import SparseFirstRows, arrays_of
from dngd.sampling.topology import HasTopology, SharedTopology, open_store

logger = logging.getLogger(__name__)

INLINE_AHEAD = 2
"""Batches that the thread is ahead at most: one thread fills no longer queue, and each batch takes memory."""
HELD_BATCHES = 2
"""Slots of a child beyond those in its queue: for batches that the caller still works on."""
MAX_SLOTS = 10
"""Of a child: each is an open file in the trainer. What finds none free comes over the socket."""


class SamplerPipeline:
    """Iterates for ever over this rank's mini-batches: each step in order, and in it each of its shards.

    store: an open GraphStore (or any graph with indptr, indices, edge_weight), or a store's path.
    train_nodes: int64 [n], distinct seed nodes; each is a seed exactly once an epoch.
    fanouts: entry i is layer i, input side first; -1 is all neighbours.
    num_shards, batch_size: a step's global batch is num_shards shards of batch_size seeds each.
    shards: those that this rank executes, in order.
    num_samplers: child processes; with 0 batches are drawn by a thread of this process.
    prefetch: batches that each child draws ahead. The thread draws as many ahead, two at most, while this process
        works; with prefetch=0 it draws a batch when it is asked for.
    aggregation: of the model's layers; with it batches bring the first layer's rows (MiniBatch.first_rows), taken from
        the graph's features by the children (by the caller's thread, when it takes the batch, where there are none).
    start: the (epoch, step) to begin with.
    timeout_seconds: the longest wait for one batch, the start of a child included.
    on_mapped: called with each shared memory that children's batches will lie in (uint8), to pin it for a GPU.
    on_host: bool [N], where a device keeps the feature rows of the other nodes: first rows come without their part, and
        with the operator to add it (MiniBatch.first_operator).
    random_reads: whether to tell the system that features are read here and there (see dngd.graph.advice).
    unlabelled: further seeds of each shard, behind those of train_nodes; distinct from them.
    links: of link prediction: train_nodes are entries of the graph's indices then, one a training link, and the seeds
        are the end nodes of a shard's links and negatives.
    shuffle: whether each epoch has train_nodes in an order of its own; else in theirs.
    each_once: whether a node's neighbours are drawn once a batch, see HopSampler, without first rows.
    sparse: the graph's features as entries, from which first rows are taken then, as SparseRows; without on_host.

    Raises UserError for arguments that cannot be; iterating raises TrainingError, which names the batch, when
    a child fails, dies or is silent. After an error and after close() the pipeline is finished.

        with SamplerPipeline(store, split.train, (15, 10), run_seed=0, num_shards=1,
                             batch_size=1024, shards=[0], num_samplers=1) as batches:
            for batch in batches: ...
    """

    def __init__(
        self,
        store: str | Path | HasTopology,
        train_nodes: Tensor,
        fanouts: Sequence[int],
        run_seed: int,
        num_shards: int,
        batch_size: int,
        shards: Sequence[int],
        num_samplers: int,
        prefetch: int = 4,
        start: tuple[int, int] = (0, 0),
        timeout_seconds: float = 120.0,
        *,
        aggregation: Aggregation | None = None,
        on_mapped: Callable[[Tensor], None] | None = None,
        on_host: Tensor | None = None,
        random_reads: bool = False,
        unlabelled: UnlabelledSeeds | None = None,
        links: LinkSeeds | None = None,
        shuffle: bool = True,
        each_once: bool = False,
        sparse: SparseRows | None = None,
    ) -> None:
        graph = open_store(store) if isinstance(store, str | Path) else store
        fanouts = check_fanouts(fanouts)
        if links is None:
            _check_nodes(train_nodes, graph.indptr.shape[0] - 1)
        for name, value, least in (
            ("num_shards", num_shards, 1),
            ("batch_size", batch_size, 1),
            ("num_samplers", num_samplers, 0),
            ("prefetch", prefetch, min(1, num_samplers)),
        ):
            if value < least:
                raise UserError(f"{name}={value} is too small; give at least {least}")
        if not shards or not all(0 <= shard < num_shards for shard in shards):
            raise UserError(f"shards={list(shards)} must name at least one of the shards 0 to {num_shards - 1}")
        self.steps_per_epoch = steps_per_epoch(train_nodes.shape[0], num_shards, batch_size)
        epoch, step = start
        if epoch < 0 or not 0 <= step < self.steps_per_epoch:
            raise UserError(f"start={tuple(start)} is not in this run; an epoch has {self.steps_per_epoch} steps")
        self._graph = graph
        self._train_nodes = train_nodes
        self._run_seed = run_seed
        self._unlabelled = unlabelled
        self._links = links
        self._shuffle = shuffle
        self._num_shards = num_shards
        self._batch_size = batch_size
        self._shards = tuple(shards)
        self._timeout_seconds = timeout_seconds
        self._order: tuple[int, Tensor] | None = None
        self._ahead = self._coordinates(epoch, step)
        self._pending: deque[MiniBatch] = deque()
        self._num_requested = 0
        self._failure: str | None = None
        self._processes: list[SamplerProcess] = []
        self._inline: _InlineSampler | None = None
        if num_samplers == 0:
            if inline_sampling_is_canonical():
                sampler_type = HopSampler if each_once else NeighborSampler
                sampler = sampler_type(graph.indptr, graph.indices, graph.edge_weight, fanouts)
                first_rows: FirstRows | SparseFirstRows | None
                if sparse is not None and aggregation is not None:
                    first_rows = SparseFirstRows(LayerOperators(graph, aggregation), sparse)
                else:
                    first_rows = first_rows_of(graph, aggregation, on_host=on_host)
                features: Tensor | None = getattr(graph, "features", None)
                if random_reads and features is not None:
                    read_randomly(features)
                self._inline = _InlineSampler(sampler, first_rows, ahead=min(prefetch, INLINE_AHEAD))
                return
            logger.info(
                "DGL's generator was used in another thread of this process before; sampling in one child "
                "process instead, so that batches stay the same"
            )
            num_samplers, prefetch = 1, max(prefetch, 1)
        # One copy for all children, which would each compute it again.
        extra = {"norm": node_norm(graph)} if aggregation == "gcn" else {}
        if on_host is not None:
            extra["on_host"] = on_host
        if aggregation is None:
            sparse = None
        if sparse is not None:
            extra |= arrays_of(sparse)
        shared = SharedTopology(graph, extra)
        try:
            for number in range(num_samplers):
                self._processes.append(
                    SamplerProcess(
                        shared,
                        fanouts,
                        timeout_seconds,
                        f"sampler process {number}",
                        aggregation=aggregation,
                        num_slots=slots_of_sampler(prefetch),
                        on_mapped=on_mapped,
                        random_reads=random_reads,
                        each_once=each_once,
                        sparse_width=None if sparse is None else sparse.width,
                    )
                )
            for _ in range(num_samplers * prefetch):
                self._request_next()
        except BaseException:
            self.close()
            raise
        finally:
            shared.close()

    @property
    def pids(self) -> tuple[int, ...]:
        """The sampler processes' ids; empty when batches are drawn in this process."""
        return tuple(process.pid for process in self._processes)

    @property
    def is_open(self) -> bool:
        """Whether it has not failed, and was not closed."""
        return self._failure is None

    @property
    def has_next(self) -> bool:
        """Whether the next batch, or an error in its place, is there already: `next` does not wait for it."""
        if self._failure is not None:
            return True
        if self._inline is not None:
            return self._inline.has_answer
        number = self._num_requested - len(self._pending)
        return self._processes[number % len(self._processes)].has_answer

    @property
    def is_idle(self) -> bool:
        """Whether all batches that were asked for have been drawn, so that nothing works until the next is taken."""
        if self._inline is not None:
            return self._inline.is_idle
        return all(process.is_idle for process in self._processes)

    def __iter__(self) -> Iterator[MiniBatch]:
        return self

    def __next__(self) -> MiniBatch:
        if self._failure is not None:
            raise TrainingError(self._failure)
        try:
            if self._inline is not None:
                return self._next_inline(self._inline)
            batch = self._receive()
            self._request_next()
            return batch
        except BaseException as error:
            self._failure = str(error) or f"sampling ended with {type(error).__name__}"
            self.close()
            raise

    def __enter__(self) -> SamplerPipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the sampler processes and wait for them; idempotent."""
        self._failure = self._failure or "the sampler pipeline is closed"
        if self._inline is not None:
            self._inline.close()
        self._inline = None
        deadline = time.monotonic() + STOP_SECONDS
        for process in self._processes:
            process.hang_up()
        for process in self._processes:
            process.end(deadline)
        for process in self._processes:
            process.close()

    def _coordinates(self, epoch: int, step: int) -> Iterator[BatchCoordinates]:
        while True:
            while step < self.steps_per_epoch:
                for shard in self._shards:
                    yield BatchCoordinates(epoch, step, shard)
                step += 1
            epoch, step = epoch + 1, 0

    def _next_seeds(self) -> MiniBatch:
        """Return the next batch to be drawn, still without layers."""
        at = next(self._ahead)
        if self._order is None or self._order[0] != at.epoch:
            nodes = self._train_nodes
            self._order = (at.epoch, epoch_permutation(nodes, self._run_seed, at.epoch) if self._shuffle else nodes)
        bounds = shard_bounds(self._train_nodes.shape[0], at.step, self._num_shards, self._batch_size)
        seeds = self._order[1][bounds[at.shard] : bounds[at.shard + 1]]
        if self._links is not None:
            return self._links.batch(seeds, at)
        if self._unlabelled is None:
            return MiniBatch(seeds=seeds, layers=(), coordinates=at)
        others = self._unlabelled.of(at.epoch, at.step, at.shard)
        return MiniBatch(torch.cat([seeds, others]), layers=(), coordinates=at, num_labelled=seeds.shape[0])

    def _rng_seed(self, at: BatchCoordinates) -> int:
        return sampling_seed(self._run_seed, at.epoch, at.step, at.shard)

    def _next_inline(self, inline: _InlineSampler) -> MiniBatch:
        """Return the next batch, having asked the thread for those ahead of it."""
        while len(self._pending) <= inline.ahead:
            batch = self._next_seeds()
            self._pending.append(batch)
            inline.request(batch, self._rng_seed(batch.coordinates))
        batch = self._pending.popleft()
        try:
            drawn = inline.answer(self._timeout_seconds)
        except FutureTimeoutError:
            raise TrainingError(
                f"the sampling thread drew no batch ({batch.coordinates}) within {self._timeout_seconds:g} s; raise "
                "the sampler timeout if it is only slow"
            ) from None
        except Exception as error:
            raise TrainingError(f"sampling failed on the batch ({batch.coordinates}): {error}") from error
        return replace(batch, **drawn._asdict())

    def _request_next(self) -> None:
        batch = self._next_seeds()
        number = self._num_requested
        process = self._processes[number % len(self._processes)]
        process.request(number, self._rng_seed(batch.coordinates), batch)
        self._pending.append(batch)
        self._num_requested += 1

    def _receive(self) -> MiniBatch:
        batch = self._pending[0]
        number = self._num_requested - len(self._pending)
        process = self._processes[number % len(self._processes)]
        drawn = process.answer(number, str(batch.coordinates))
        if batch.excluded is not None:
            # Two arrays of a few nodes: sooner computed again than sent.
            left_out = left_out_by(self._graph.indptr, self._graph.edge_weight, batch.excluded)
            drawn = drawn._replace(layers=tuple(replace(layer, left_out=left_out) for layer in drawn.layers))
        self._pending.popleft()
        return replace(batch, **drawn._asdict())


class _InlineSampler:
    """Draws on this process's sampling thread, ahead of use, and takes dense first rows in the caller's."""

    def __init__(self, sampler: NeighborSampler, first_rows: FirstRows | SparseFirstRows | None, ahead: int) -> None:
        self.ahead = ahead
        self._sampler = sampler
        self._first_rows = first_rows
        self._drawn: deque[Future[Drawn]] = deque()

    def request(self, batch: MiniBatch, rng_seed: int) -> None:
        """Queue a draw."""
        sampler, rows = self._sampler, self._first_rows

        def draw() -> Drawn:
            drawn = sampler.draw(batch.seeds, rng_seed, batch.excluded)
            # Sparse rows are one thread's work, beside the caller's; dense ones are that of all cores.
            return drawn._replace(first_rows=rows.of(drawn.layers[0])) if isinstance(rows, SparseFirstRows) else drawn

        self._drawn.append(submit_to_sampling_thread(draw))

    @property
    def has_answer(self) -> bool:
        """Whether the oldest queued draw is done."""
        return bool(self._drawn) and self._drawn[0].done()

    @property
    def is_idle(self) -> bool:
        """Whether all queued draws are done."""
        return all(drawn.done() for drawn in self._drawn)

    def answer(self, timeout_seconds: float) -> Drawn:
        """Return the oldest queued draw with its first rows. Raises TimeoutError, and what the draw raised."""
        drawn = self._drawn.popleft().result(timeout_seconds)
        if self._first_rows is None or isinstance(self._first_rows, SparseFirstRows):
            return drawn
        first = drawn.layers[0]
        operator = self._first_rows.operator(first)
        return drawn._replace(first_rows=self._first_rows.of(first, operator=operator), first_operator=operator)

    def close(self) -> None:
        """Give up what is queued."""
        for future in self._drawn:
            future.cancel()


def slots_of_sampler(prefetch: int) -> int:
    """Return the number of batches that a child's shared memory holds."""
    return min(prefetch + HELD_BATCHES, MAX_SLOTS)


def _check_nodes(train_nodes: Tensor, num_nodes: int) -> None:
    if train_nodes.numel() == 0:
        raise UserError("there are no training nodes; choose a split whose training part is not empty")
    assert (train_nodes.dtype, train_nodes.dim()) == (torch.int64, 1), (train_nodes.dtype, train_nodes.shape)
    first, last = int(train_nodes.min()), int(train_nodes.max())
    if first < 0 or last >= num_nodes:
        wrong = first if first < 0 else last
        raise UserError(f"training node {wrong} is not in the graph, whose nodes are 0 to {num_nodes - 1}")
    if torch.unique(train_nodes).shape != train_nodes.shape:
        raise UserError("the training nodes name a node more than once; remove the duplicates")
