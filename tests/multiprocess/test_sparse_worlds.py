"""Sparse features at world sizes 1, 2 and 4, on real processes: one curve, and that of the dense table."""

from __future__ import annotations

from pathlib import Path

import pytest

from dngd.train import prepare_run_folder
from tests.helpers.ranks import run_ranks
from tests.helpers.survival import curve, settings
from tests.unit.train.test_sparse_features import words_store


@pytest.mark.parametrize("model", ["gcn", "sage"])
def test_one_curve_at_all_world_sizes(tmp_path: Path, model: str) -> None:
    """A is wide enough to be low rank, and inverses travel."""
    store = words_store(tmp_path / "words", width=500)
    found = {}
    for world_size in (1, 2, 4):
        prepared = []
        for sparse in (True, False):
            run_dir = tmp_path / f"{world_size}-{sparse}"
            changes = {"num_shards": 4, "num_workers": 4, "batch_size": 10, "model": model, "sparse_features": sparse}
            prepared.append(prepare_run_folder(settings(store, run_dir, **changes)).model_dump(mode="json"))
        run_ranks("tests.helpers.survival:train_rank", world_size, prepared)
        for sparse in (True, False):
            found[world_size, sparse] = curve(tmp_path / f"{world_size}-{sparse}")
            said = (tmp_path / f"{world_size}-{sparse}" / "result.json").read_text()
            assert f'"sparse_features": {str(sparse).lower()}' in said
    expected = found.pop((1, False))
    assert expected[0] != expected[-1]
    for rows in found.values():
        assert len(rows) == len(expected)
        for row, other in zip(rows, expected):
            assert row == pytest.approx(other, rel=2e-3)
