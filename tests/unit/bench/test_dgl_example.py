"""The peer's parts: its seeds are dngd's, its kept buffer gathers, its first rows are what its layers make of them.

Nothing here draws with DGL: its random stream belongs to the first thread that does (see dngd.sampling.sampler).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dngd.bench import dgl_example
from dngd.bench.dgl_example import SAGE, GatherBuffer, LoaderOptions, first_rows, seeds_in_order
from dngd.sampling import epoch_permutation, import_dgl
from tests.helpers.mutants import assert_caught

SOURCES, DESTINATIONS = torch.tensor([3, 1, 4, 0, 2, 4]), torch.tensor([0, 0, 0, 1, 1, 2])


def block() -> Any:
    """Three destinations with 3, 2, 1 edges, among five sources."""
    return import_dgl().create_block((SOURCES, DESTINATIONS), num_src_nodes=5, num_dst_nodes=3)


def options(**changes: Any) -> LoaderOptions:
    fields: dict[str, Any] = {"fanouts": (3, 3), "batch_size": 4, "num_workers": 0, "gather": "kept", "seed": 5}
    return LoaderOptions(**fields | {"affinity": False, "threads": 1, "num_batches": 5} | changes)


def test_seeds_are_whole_batches_in_dngds_order() -> None:
    train = torch.arange(100, 111)
    seeds = seeds_in_order(train, options())
    # 11 nodes make two batches of 4 an epoch: five batches end within the third.
    expected = [epoch_permutation(train, 5, epoch)[:count] for epoch, count in ((0, 8), (1, 8), (2, 4))]
    assert torch.equal(seeds, torch.cat(expected))


def test_the_kept_buffer_gathers_and_is_kept() -> None:
    table = torch.arange(40.0).reshape(10, 4)
    buffer = GatherBuffer(table)
    nodes = torch.tensor([7, 7, 0, 9])

    def gathers() -> None:
        assert torch.equal(buffer.rows(nodes), table[nodes])
        assert torch.equal(buffer.rows(nodes[1:]), table[nodes[1:]])

    address = buffer.rows(nodes).data_ptr()
    assert buffer.rows(nodes[:2]).data_ptr() == buffer.rows(nodes).data_ptr() == address
    assert_caught(gathers, torch, "index_select", lambda table, dim, nodes, out: out)


def test_sages_first_rows_are_own_row_and_mean() -> None:
    rows = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))

    def law() -> None:
        own, mean = first_rows(block(), rows, "mean")
        assert torch.equal(own, rows[:3])
        assert torch.allclose(mean, torch.stack([rows[[3, 1, 4]].mean(0), rows[[0, 2]].mean(0), rows[4]]))

    law()
    with pytest.raises(AssertionError):
        _with(law, "mean", import_dgl().function.sum)


def _with(law: Any, name: str, replacement: Any) -> None:
    function = import_dgl().function
    before = getattr(function, name)
    setattr(function, name, replacement)
    try:
        law()
    finally:
        setattr(function, name, before)


def test_its_layers_see_those_rows() -> None:
    """The example's first layer, from its own linear maps, on the rows that the input contenders stop at."""
    rows = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    model = SAGE((4, 6), dropout=0.5).eval()
    layer: Any = model.layers[0]
    own, mean = first_rows(block(), rows, "mean")
    expected: Tensor = layer.fc_self(own) + layer.fc_neigh(mean)
    if layer.fc_self.bias is None:
        expected = expected + layer.bias
    assert torch.allclose(model([block()], rows), expected, atol=1e-6)


def test_gcns_first_rows_are_the_normalised_sum() -> None:
    rows = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    (found,) = first_rows(block(), rows, "gcn")
    out_degree = torch.bincount(SOURCES, minlength=5).clamp(min=1).float()
    in_degree = torch.bincount(DESTINATIONS, minlength=3).float()
    dense = torch.zeros(3, 5).index_put_((DESTINATIONS, SOURCES), torch.ones(6), accumulate=True)
    assert torch.allclose(found, (dense @ (rows / out_degree.sqrt()[:, None])) / in_degree.sqrt()[:, None], atol=1e-6)


def test_dropout_and_relu_stand_between_layers_only() -> None:
    rows = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    model = SAGE((4, 6, 3), dropout=0.5)
    inner = import_dgl().create_block((torch.tensor([1, 2]), torch.tensor([0, 0])), num_src_nodes=3, num_dst_nodes=1)
    blocks = [block(), inner]
    assert model(blocks, rows).shape == (1, 3)
    assert torch.equal(model.eval()(blocks, rows), model(blocks, rows))
    assert (model.train()(blocks, rows) < 0).any() or (model(blocks, -rows) < 0).any()
    assert dgl_example.LEARNING_RATE == 1e-3
