"""Real graphs, from DNGD_DATA_ROOT."""

from __future__ import annotations

from pathlib import Path

import pytest

import dngd
from dngd.graph import import_npz, import_planetoid

pytestmark = pytest.mark.data


@pytest.mark.parametrize("name", ["Cora", "CiteSeer", "PubMed"])
def test_npz_and_planetoid_originals_train_identically(data_root: Path, tmp_path: Path, name: str) -> None:
    stores = [
        import_npz(data_root / f"{name.lower()}.npz", tmp_path / "npz"),
        import_planetoid(data_root / "planetoid" / name / "raw", tmp_path / "planetoid"),
    ]
    curves = []
    for store in stores:
        config = dngd.TrainConfig(
            dataset=str(store.path),
            split="public",
            engine="local",
            num_layers=2,
            fanout=(10, 10),
            hidden=16,
            batch_size="full",
            epochs=3,
            num_samplers=0,
            run_dir=tmp_path / f"run-{store.path.name}",
        )
        result = dngd.Trainer(config, quiet=True).fit()
        curves.append([(r.train_loss, r.val_loss, r.val_accuracy, r.test_accuracy) for r in result.history])
    assert curves[0] == curves[1]
    assert curves[0][-1][0] < curves[0][0][0]
