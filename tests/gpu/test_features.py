"""Where features lie on a GPU machine; run by `pytest -m gpu` on one."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dngd
from dngd.bench.trace import trace_training
from dngd.graph import GraphStore
from dngd.sampling import SamplerPipeline
from dngd.sampling.slots import SlotPool, SlotWriter
from dngd.train import hot_rows
from dngd.train.batch import PropagationBuilder
from dngd.train.feeder import CudaCopyStream, DeviceFeeder
from dngd.train.metrics import StepClock
from dngd.train.page_lock import CudaHostRegistration, PageLockedMemory
from dngd.train.placement import Placement, place_features
from tests.helpers.graphs import small_store

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here"),
]

CPU = torch.device("cpu")
REGISTER_READ_ONLY = 8
"""cudaHostRegisterReadOnly"""


@pytest.fixture
def gpu() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def curve(store: GraphStore, run_dir: Path, **changes: Any) -> list[float]:
    fields: dict[str, Any] = {
        "dataset": str(store.path),
        "engine": "local",
        "num_layers": 2,
        "fanout": (5, 5),
        "hidden": 32,
        "batch_size": 64,
        "epochs": 2,
        "dropout": 0.0,
        "optimizer": "adam",
        "run_dir": run_dir,
    }
    result = dngd.Trainer(dngd.TrainConfig(**(fields | changes)), quiet=True).fit()
    return [value for record in result.history for value in (record.train_loss, record.val_loss)]


FULL_BATCH: dict[str, Any] = {"batch_size": "full", "fanout": (-1, -1), "epochs": 3}
PLACEMENTS: list[dict[str, Any]] = [
    {"feature_placement": "auto"},
    {"feature_placement": "device"},
    {"feature_placement": "pinned"},
    {"feature_placement": "pinned", "num_samplers": 0},
    {"feature_placement": "pinned", "feature_cache_bytes": 20_000},
    {"feature_placement": "disk", "feature_cache_bytes": 20_000},
    {"feature_placement": "pinned"} | FULL_BATCH,
    {"feature_placement": "device"} | FULL_BATCH,
]


@pytest.mark.parametrize("model", ["gcn", "sage"])
def test_runs_train_alike_wherever_the_features_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.setattr(hot_rows, "SPLIT_BYTES", 0)
    store = small_store(tmp_path / "store")
    sampled = curve(store, tmp_path / "sampled", model=model)
    full = curve(store, tmp_path / "full", model=model, **FULL_BATCH)
    for number, changes in enumerate(PLACEMENTS):
        got = curve(store, tmp_path / f"gpu-{number}", model=model, use_gpu=True, **changes)
        assert got == pytest.approx(full if "batch_size" in changes else sampled, rel=5e-3), changes


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_features_train_alike_on_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any) -> None:
    """Sums of 16-bit rows are rounded on the way: M to their precision, in float32."""
    monkeypatch.setattr(hot_rows, "SPLIT_BYTES", 0)
    full = small_store(tmp_path / "full")
    store = GraphStore.write(
        tmp_path / "store",
        features=full.features,
        labels=full.labels,
        indptr=full.indptr,
        indices=full.indices,
        masks={name: mask.numpy() for name, mask in full.split_masks.items()},
        feature_dtype=dtype,
    )
    assert store.features.element_size() == 2
    expected = curve(store, tmp_path / "cpu", model="sage")
    for placement, cache in (("device", None), ("pinned", 12_000)):
        run = tmp_path / placement
        got = curve(store, run, model="sage", use_gpu=True, feature_placement=placement, feature_cache_bytes=cache)
        assert got == pytest.approx(expected, rel=2e-2)


class LateCopies(CudaCopyStream):
    """Copies that wait for about 20 ms before they run."""

    @contextlib.contextmanager
    def enqueuing(self) -> Iterator[None]:
        with super().enqueuing():
            torch.cuda._sleep(40_000_000)
            yield


@pytest.mark.parametrize("cached", [False, True])
def test_late_copies_bring_whole_batches(
    tmp_path: Path, gpu: torch.device, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    """Slots are filled again while copies wait to run: never those that a copy still reads."""
    monkeypatch.setattr(hot_rows, "SPLIT_BYTES", 0)
    store = small_store(tmp_path / "store")
    placed = place_features(store, Placement("pinned", 20_000 if cached else 0), gpu, sampled=True)
    assert (placed.cache is not None) == cached

    def pipeline(on_mapped: Callable[[Tensor], None] | None, on_host: Tensor | None) -> SamplerPipeline:
        train = store.split("masks").train
        return SamplerPipeline(
            store, train, (4, 3), 5, 1, 32, [0], 1, prefetch=1, aggregation="mean", on_mapped=on_mapped, on_host=on_host
        )

    steps = 24
    with pipeline(None, None) as batches:
        builder = PropagationBuilder(store, "mean", CPU)
        per_epoch = batches.steps_per_epoch
        expected = [builder.batch(next(batches)).first_aggregation for _ in range(steps)]
        expected = [None if rows is None else rows.clone() for rows in expected]
    on_host = None if placed.cache is None else placed.cache.on_host
    with PageLockedMemory(CudaHostRegistration(gpu)) as locked, pipeline(locked.add, on_host) as batches:
        builder = PropagationBuilder(store, "mean", gpu, placed.cache)
        with DeviceFeeder(batches, builder, StepClock(), LateCopies(gpu)) as feeder:
            got = []
            for step in range(steps):
                batch = feeder.batch(*divmod(step, per_epoch), 0)
                assert batch.first_aggregation is not None
                got.append(batch.first_aggregation * 1.0)
                feeder.look_ahead()
        assert locked.num_bytes > 0
    for mine, theirs in zip(got, expected, strict=True):
        assert theirs is not None
        assert torch.allclose(mine.cpu(), theirs, rtol=1e-5, atol=1e-5)


def test_shared_memory_is_page_locked_and_released(gpu: torch.device) -> None:
    pool = SlotPool(1)
    writer = SlotWriter(pool.fds)
    specs = [("float32", [1000, 50]), ("int64", [77])]
    slot = pool.acquire()
    assert slot is not None
    for place in writer.lay_out(slot, specs):
        place.copy_(torch.arange(place.numel()).view(place.shape))
    locked = PageLockedMemory(CudaHostRegistration(gpu))
    pool._on_mapped = locked.add
    rows, ids = pool.read(slot, specs)
    assert rows.is_pinned()
    assert ids.is_pinned()
    assert torch.equal(rows.to(gpu, non_blocking=True).cpu(), rows)
    torch.cuda.synchronize()
    locked.close()
    assert not rows.is_pinned()
    assert int(ids[-1]) == 76


def test_a_refused_registration_leaves_no_error_behind(gpu: torch.device) -> None:
    """CUDA keeps an error until it is asked for; the next kernel must not find it."""
    memory = torch.frombuffer(mmap.mmap(-1, 1 << 20), dtype=torch.uint8)
    driver = CudaHostRegistration(gpu)
    assert driver.register(memory.data_ptr(), memory.numel()) == 0
    assert driver.register(memory.data_ptr(), memory.numel()) != 0
    assert float(torch.ones(3, device=gpu).add(1).sum()) == 6
    assert driver.unregister(memory.data_ptr()) == 0
    assert driver.unregister(memory.data_ptr()) != 0
    assert float(torch.ones(3, device=gpu).add(1).sum()) == 6


def private_bytes(address: int) -> int:
    """How much of the mapping at an address is this process's own copy."""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            found = begin <= address < end
        elif found and first == "Private_Dirty:":
            return int(line.split()[1]) * 1024
    return 0


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
@pytest.mark.parametrize("way", ["private", "shared-read-only", "shared-read-only-flag"])
def test_whether_a_file_can_be_registered(
    tmp_path: Path, gpu: torch.device, record_property: Callable[[str, object], None], way: str
) -> None:
    """A record, not a demand: nothing in dngd registers a file's map.

    private is how a store is mapped. Where that is registered, each page is copied first: the table is then no longer
    one copy a machine, which is why `pinned` registers the samplers' slots alone.
    """
    size = 8 << 20
    path = tmp_path / "table"
    path.write_bytes(bytes(range(256)) * (size // 256))
    with path.open("r+b") as file:
        if way == "private":
            mapped = mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        else:
            mapped = mmap.mmap(file.fileno(), size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    table = torch.frombuffer(mapped, dtype=torch.uint8)
    assert int(table[255]) == 255
    driver = CudaHostRegistration(gpu)
    flags = REGISTER_READ_ONLY if way == "shared-read-only-flag" else 0
    error = driver._checked(torch.cuda.cudart().cudaHostRegister(table.data_ptr(), size, flags))
    record_property("cudaHostRegister", error)
    assert float(torch.ones(3, device=gpu).sum()) == 3, "an error stayed behind"
    if error:
        pytest.skip(f"a {way} map of a file was refused: {driver.describe(error)}")
    try:
        record_property("private_bytes", private_bytes(table.data_ptr()))
        print(f"a {way} map of {size} bytes was registered; {private_bytes(table.data_ptr())} are now private")
        assert torch.equal(table.to(gpu, non_blocking=True).cpu(), table)
        torch.cuda.synchronize()
    finally:
        assert driver.unregister(table.data_ptr()) == 0


def test_copies_run_while_the_gpu_computes(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """Layers so wide that the GPU has work left when the host comes to the next batch."""
    store = small_store(tmp_path / "store", nodes=50_000, edges=2_000_000)
    config = dngd.TrainConfig(
        dataset=str(store.path),
        engine="local",
        use_gpu=True,
        feature_placement="pinned",
        model="sage",
        hidden=4096,
        batch_size=1024,
        epochs=20,
        optimizer="adam",
        num_samplers=4,
        prefetch=4,
    )
    traced = trace_training(config, steps=12, warmup=12, output=tmp_path / "trace.json")
    for name, value in traced.items():
        record_property(name, value)
    print(traced)
    assert traced["copies"] > 0
    assert traced["pageable_seconds"] < 0.5 * traced["copy_seconds"], "rows are copied from page-locked memory"
    assert traced["hidden_share"] > 0
    assert (tmp_path / "trace.json").stat().st_size > 0
