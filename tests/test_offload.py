"""Block streaming on a CPU, which runs the same code as a GPU with plain copies.

The network has 3 double and 4 single blocks, so positions 0 … 6.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from allocated import AllocatedBytes
from atelier.trainers.adapters import attach_lora
from atelier.trainers.flux import build_transformer, recompute_blocks, velocity
from atelier.trainers.formats import FORMATS
from atelier.trainers.load import LoadedFlux, load_flux
from atelier.trainers.lora_settings import LoraSettings
from atelier.trainers.offload import DiskFeed, RamFeed, Slot, resident_blocks
from atelier.trainers.packed_copy import PackedCopies
from atelier.trainers.store import WeightStore
from flux_files import flux_shapes, write_flux
from small_disk import small_disk
from torch import Tensor

BLOCKS = 7
STREAMED_FORMATS = ["bf16", "fp8", "nf4", "int4"]


@pytest.fixture(scope="module")
def flux_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_flux(tmp_path_factory.mktemp("flux") / "flux.safetensors", depth=3, depth_single=4)


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> PackedCopies:
    return PackedCopies(tmp_path_factory.mktemp("packed"))


def load(flux_file: Path, format: str = "nf4", streaming: str = "auto") -> LoadedFlux:
    return load_flux(flux_file, format=format, streaming=streaming)


@pytest.fixture
def loaded(flux_file: Path) -> LoadedFlux:
    return load(flux_file)


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The positions of streamed blocks in the order in which their copies begin."""
    positions: list[int] = []

    def record(feed: type) -> None:
        start = feed.start

        def recorded(self, slot: Slot, position: int) -> Callable[[], None]:
            positions.append(position)
            return start(self, slot, position)

        monkeypatch.setattr(feed, "start", recorded)

    record(RamFeed)
    record(DiskFeed)
    return positions


def forward(base: LoadedFlux, transformer, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    device, config = base.store.device, base.config
    return velocity(
        transformer,
        torch.randn(1, 16, 4, 4, generator=generator).to(device),
        sigma=torch.tensor([0.5], device=device),
        prompt_embeds=torch.randn(1, 6, config.context_dim, generator=generator).to(device),
        pooled=torch.randn(1, config.vector_dim, generator=generator).to(device),
        guidance=1.0,
    )


class Training:
    """The training face with a LoRA on every layer."""

    def __init__(self, base: LoadedFlux, *, checkpointing: bool) -> None:
        self.base = base
        self.transformer = build_transformer(base.store, base.config, torch.float32).train()
        self.lora = attach_lora(self.transformer, LoraSettings(targets="all+ffs"), seed=0)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in self.lora.parameters.values():
                noise = 0.02 * torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise.to(parameter.device))
        if checkpointing:
            recompute_blocks(self.transformer)

    def gradients(self) -> dict[str, Tensor]:
        for parameter in self.lora.parameters.values():
            parameter.grad = None
        forward(self.base, self.transformer).square().mean().backward()
        return {name: p.grad for name, p in self.lora.parameters.items()}  # pyright: ignore


def sampled(base: LoadedFlux) -> Tensor:
    with torch.inference_mode():
        return forward(base, build_transformer(base.store, base.config, torch.float32))


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert all(torch.equal(found[name], expected[name]) for name in expected)


CHECKPOINTING = pytest.mark.parametrize(
    "checkpointing", [False, True], ids=["plain", "checkpoints"]
)


def test_sampling_fetches_the_blocks_in_turn_and_then_the_first_again(
    loaded: LoadedFlux, fetched: list[int]
) -> None:
    loaded.store.place("cpu", 0)
    sampled(loaded)
    sampled(loaded)
    assert fetched == [*range(7), *range(7), 0]


@CHECKPOINTING
def test_training_fetches_the_blocks_there_and_back(
    loaded: LoadedFlux, fetched: list[int], checkpointing: bool
) -> None:
    """The recomputation of a block is no fetch, and the two at a turn are still here."""
    training = Training(loaded, checkpointing=checkpointing)
    loaded.store.place("cpu", 0)
    training.gradients()
    # At the end the first block comes, as in sampling: it is not known yet that backward begins.
    assert fetched == [0, 1, 2, 3, 4, 5, 6, 0, 5, 4, 3, 2, 1, 0]
    fetched.clear()
    training.gradients()
    training.gradients()
    assert fetched == 2 * [2, 3, 4, 5, 6, 4, 3, 2, 1, 0]


def streamed_blocks(store: WeightStore) -> set[int]:
    return {weight.streamed.position for weight in store.packed.values() if weight.streamed}


def test_resident_blocks_are_not_fetched(loaded: LoadedFlux, fetched: list[int]) -> None:
    store = loaded.store
    store.place("cpu", store.num_bytes * 0.8)
    streamed = streamed_blocks(store)
    assert 3 <= len(streamed) < BLOCKS
    sampled(loaded)
    assert fetched == [*streamed, 0]


def test_a_turn_after_sampling_costs_one_block_and_no_more(
    loaded: LoadedFlux, fetched: list[int]
) -> None:
    training = Training(loaded, checkpointing=True)
    loaded.store.place("cpu", 0)
    training.gradients()
    sampled(loaded)
    sampled(loaded)
    fetched.clear()
    training.gradients()
    assert fetched == [1, 2, 3, 4, 5, 6, 0, 5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("part", [0.0, 0.7, 0.9])
@pytest.mark.parametrize("format", STREAMED_FORMATS)
def test_the_velocity_is_that_of_a_whole_store(flux_file: Path, format: str, part: float) -> None:
    base = load(flux_file, format)
    expected = sampled(base)
    base.store.place("cpu", part * base.store.num_bytes)
    assert base.store.stream
    assert torch.equal(sampled(base), expected)


@CHECKPOINTING
@pytest.mark.parametrize("format", STREAMED_FORMATS)
def test_gradients_are_those_of_a_whole_store(
    flux_file: Path, format: str, checkpointing: bool
) -> None:
    base = load(flux_file, format)
    training = Training(base, checkpointing=checkpointing)
    expected = training.gradients()
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    for budget in (0, base.store.num_bytes * 2 // 3, 0):
        base.store.place("cpu", budget)
        assert_equal(training.gradients(), expected)


def test_training_sampling_and_training_again_in_the_middle_of_a_run(loaded: LoadedFlux) -> None:
    training = Training(loaded, checkpointing=True)
    picture, expected = sampled(loaded), training.gradients()
    for training_budget, sampling_budget in itertools.permutations((0, 6 << 20, None), 2):
        loaded.store.place("cpu", training_budget)
        assert_equal(training.gradients(), expected)
        loaded.store.place("cpu", sampling_budget)
        assert torch.equal(sampled(loaded), picture)


def test_two_models_at_once_do_not_mix(tmp_path: Path) -> None:
    files = [write_flux(tmp_path / f"{i}.safetensors", seed=i, depth_single=3) for i in (0, 1)]
    bases = [load(file) for file in files]
    alone = [Training(base, checkpointing=True).gradients() for base in bases]
    for base in bases:
        base.store.place("cpu", 0)
    trainings = [Training(base, checkpointing=True) for base in bases]
    losses = [forward(t.base, t.transformer).square().mean() for t in trainings]
    sum(losses).backward()  # pyright: ignore[reportAttributeAccessIssue]
    for training, expected in zip(trainings, alone, strict=True):
        found = {name: p.grad for name, p in training.lora.parameters.items()}
        assert_equal(found, expected)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("format", list(FORMATS))
def test_the_hash_is_the_same_wherever_the_blocks_are(flux_file: Path, format: str) -> None:
    base = load(flux_file, format)
    before = base.store.content_hash()
    training = Training(base, checkpointing=True)
    for budget in (0, base.store.num_bytes // 2, base.store.num_bytes * 4 // 5, None, 0):
        base.store.place("cpu", budget)
        training.gradients()
        assert base.store.content_hash() == before


def bytes_on(store: WeightStore, device: str) -> int:
    """Counted anew from the tensors, and the slots."""
    tensors = [*store.plain.values()]
    for weight in store.packed.values():
        tensors += [weight.data] if weight.scale is None else [weight.data, weight.scale]
    tensors += [slot.data for slot in store.stream._slots] if store.stream else []
    return sum(tensor.nbytes for tensor in tensors if tensor.device.type == device)


def test_no_more_bytes_than_the_budget_are_on_the_device(flux_file: Path) -> None:
    """The device is `meta`, which every machine has beside its CPU."""
    counts = set()
    for part in range(60, 102, 2):
        store = load(flux_file).store
        budget = store.num_bytes * part // 100
        store.place("meta", budget)
        assert store.resident_bytes == bytes_on(store, "meta") <= budget
        assert store.bytes_moved == store.num_bytes - bytes_on(store, "cpu")
        counts.add(len(streamed_blocks(store)))
    assert len(counts) >= 4
    assert 0 in counts


def ram_of_tensors() -> int:
    """Of every tensor on the CPU that is alive in this process, the shared ones once."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if isinstance(item, Tensor)]
    storages = [t.untyped_storage() for t in tensors if t.device.type == "cpu"]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_what_waits_in_ram_is_there_once(flux_file: Path) -> None:
    before = ram_of_tensors()
    store = load(flux_file).store
    for device, part in (("cpu", 1.0), ("meta", 0.5), ("meta", 0.8), ("meta", 1.0)):
        store.place(device, part * store.num_bytes)
        aligned = 7 * 20 * 256  # 20 tensors of 7 blocks
        assert ram_of_tensors() - before == pytest.approx(store.bytes_in_ram, abs=aligned)
        assert (store.bytes_in_ram == 0) == (part == 1.0 and device == "meta")
        assert store.bytes_in_ram == store.num_bytes or device == "meta"


def test_a_budget_splits_the_bytes_as_placing_does(flux_file: Path) -> None:
    store = load(flux_file).store
    expected = {part: store.split(part * store.num_bytes) for part in (0, 0.5, 0.8, 1)}
    for part, split in expected.items():
        moved = load(flux_file).store
        moved.place("meta", part * store.num_bytes)
        assert split == (bytes_on(moved, "meta"), bytes_on(moved, "cpu"))


def matrix_bytes() -> dict[str, float]:
    """Bytes of the matrices of every block in nf4: 4 bits and a bf16 scale per 64 weights."""
    blocks: dict[str, float] = {}
    for name, shape in flux_shapes(depth=3, depth_single=4).items():
        if "blocks." in name and len(shape) == 2:
            block = ".".join(name.split(".")[:2])
            blocks[block] = blocks.get(block, 0) + shape[0] * shape[1] * 4.25 / 8
    return blocks


def test_the_least_is_two_slots_and_what_belongs_to_no_block(loaded: LoadedFlux) -> None:
    store, matrices = loaded.store, matrix_bytes()
    store.place("meta", 0)
    least = store.num_bytes - sum(matrices.values()) + 2 * max(matrices.values())
    assert 0 <= store.resident_bytes - least < 2 * 20 * 256  # 20 tensors, each aligned
    assert store.resident_bytes == bytes_on(store, "meta")


def test_a_little_more_room_keeps_the_same_blocks_and_others() -> None:
    """FLUX.1-dev's blocks in nf4, in megabytes."""
    sizes = [180] * 19 + [75] * 38
    kept = [resident_blocks(sizes, room) for room in range(0, sum(sizes), 50)]
    assert all(less <= more for less, more in itertools.pairwise(kept))
    half = sorted(kept[len(kept) // 2])
    assert max(after - before for before, after in itertools.pairwise(half)) <= 4


@CHECKPOINTING
def test_a_streamed_pass_allocates_nothing_for_blocks(flux_file: Path, checkpointing: bool) -> None:
    """Beside the slots, which are made when the store is placed."""
    peaks = []
    for budget in (None, 0):
        base = load(flux_file)
        training = Training(base, checkpointing=checkpointing)
        base.store.place("cpu", budget)
        with AllocatedBytes() as allocated:
            training.gradients()
        peaks.append(allocated.peak)
    assert peaks[1] <= peaks[0] * 1.001


def test_a_device_without_room_for_the_slots_leaves_everything_where_it_was(
    loaded: LoadedFlux, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, picture = loaded.store.content_hash(), sampled(loaded)

    def no_room(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as full:
        full.setattr(Slot, "__init__", no_room)
        with pytest.raises(torch.OutOfMemoryError):
            loaded.store.place("cpu:0", 0)
    assert loaded.store.device == torch.device("cpu")
    assert loaded.store.content_hash() == before
    assert torch.equal(sampled(loaded), picture)


@pytest.mark.parametrize(
    ("streaming", "counts"), [("off", [0, 0]), ("auto", [0, 7]), ("ram", [7, 7])]
)
def test_the_choice_decides_what_a_budget_does(
    flux_file: Path, streaming: str, counts: list[int]
) -> None:
    found = []
    for free_bytes in (None, 0):
        store = load(flux_file, streaming=streaming).store
        store.prepare("cpu", free_bytes)
        found.append(len(streamed_blocks(store)))
    assert found == counts


def test_an_unknown_choice_is_one_sentence(flux_file: Path) -> None:
    with pytest.raises(ValueError, match=r"^Unknown block streaming 'all'\. Choose one of: auto, "):
        load(flux_file, streaming="all")


def on_disk(flux_file: Path, copies: PackedCopies, format: str = "nf4") -> LoadedFlux:
    return load_flux(flux_file, format=format, copies=copies, streaming="disk")


@CHECKPOINTING
@pytest.mark.parametrize("format", STREAMED_FORMATS)
def test_blocks_from_disk_compute_the_same(
    flux_file: Path, copies: PackedCopies, format: str, checkpointing: bool
) -> None:
    whole, base = load(flux_file, format), on_disk(flux_file, copies, format)
    assert base.identity == whole.identity
    assert torch.equal(sampled(base), sampled(whole))
    gradients = [Training(b, checkpointing=checkpointing).gradients() for b in (base, whole)]
    assert_equal(*gradients)
    assert base.store.content_hash() == whole.store.content_hash()
    base.store.prepare("cpu:0")
    assert torch.equal(sampled(base), sampled(whole))


def test_blocks_from_disk_come_in_the_same_order(
    flux_file: Path, copies: PackedCopies, fetched: list[int]
) -> None:
    sampled(on_disk(flux_file, copies))
    assert fetched == [*range(7), 0]


def test_blocks_on_disk_take_no_ram(flux_file: Path, copies: PackedCopies) -> None:
    store, whole = on_disk(flux_file, copies).store, load(flux_file).store
    held = {}
    for weight in store.packed.values():
        for tensor in (weight.data, weight.scale):
            if tensor is not None:
                held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    packed = sum(weight.num_bytes for weight in whole.packed.values())
    in_blocks = sum(matrix_bytes().values())
    assert sum(held.values()) <= packed - in_blocks + 200  # one zero each
    assert store.num_bytes == whole.num_bytes
    assert store.bytes_in_ram == whole.num_bytes - in_blocks


def delete(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def change(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 6 // 10] ^= 1  # in the last double block
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [delete, cut, change])
@pytest.mark.parametrize("when", ["forward", "backward"])
def test_a_copy_changed_under_way_is_one_sentence(
    flux_file: Path, tmp_path: Path, damage: Callable, when: str
) -> None:
    base = on_disk(flux_file, PackedCopies(tmp_path))
    training = Training(base, checkpointing=True)
    loss = forward(base, training.transformer).square().mean()
    if when == "forward":
        base.store.prepare("cpu:0")  # forgets the blocks that are here
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    damage(path)
    with pytest.raises(ValueError, match=r"deleted or changed while the model computed from it\."):
        loss.backward() if when == "backward" else sampled(base)
    path.write_bytes(whole)
    sampled(base)  # it is read again when it is back


def test_a_copy_that_exists_needs_no_leave_to_be_written(
    flux_file: Path, copies: PackedCopies, tmp_path: Path
) -> None:
    on_disk(flux_file, copies)
    assert on_disk(flux_file, PackedCopies(copies.folder, writes=False)).store.stream
    for without in (PackedCopies(tmp_path, writes=False), None):
        with pytest.raises(ValueError, match=r"^Blocks can only .* Turn keep_copy on, or set"):
            load_flux(flux_file, format="nf4", copies=without, streaming="disk")
    assert not [*tmp_path.iterdir()]


def test_a_disk_without_room_for_the_copy_is_one_sentence(flux_file: Path, tmp_path: Path) -> None:
    expected = r"could not be written to this disk\. Free some space"
    with small_disk(tmp_path / "small") as folder, pytest.raises(ValueError, match=expected):
        on_disk(flux_file, PackedCopies(folder))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@CHECKPOINTING
@pytest.mark.parametrize("streaming", ["ram", "disk"])
def test_a_gpu_computes_the_same_with_streamed_blocks(
    flux_file: Path, copies: PackedCopies, streaming: str, checkpointing: bool
) -> None:
    whole = load(flux_file)
    base = load_flux(flux_file, format="nf4", copies=copies, streaming=streaming)
    whole.store.place("cuda")
    base.store.prepare("cuda")
    trainings = [Training(b, checkpointing=checkpointing) for b in (base, whole)]
    for _ in range(3):
        assert_equal(*(training.gradients() for training in trainings))
