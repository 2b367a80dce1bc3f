"""LoRAs beside packed weights: what they take, what ComfyUI is told of it, and how often they are
cast. Bytes are counted by torch's dispatch, and from the tensors of the files."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import comfy.hooks
import comfy.model_management
import comfy.sample
import pytest
import torch
from allocated import AllocatedBytes
from atelier.nodes.native import StorePatcher, build_model
from atelier.nodes.native_lora import add_lora
from atelier.trainers.load import load_flux
from comfy.patcher_extension import CallbacksMP
from flux_files import write_flux
from lora_files import lora_tensors
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device("cpu")
RANK = 7
"""No other dimension of the tiny network is 7."""
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def flux_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_flux(tmp_path_factory.mktemp("flux") / "flux.safetensors", depth=2, depth_single=4)


@pytest.fixture(autouse=True)
def unloaded() -> Iterator[None]:
    yield
    comfy.model_management.unload_all_models()


def model_of(
    flux_file: Path, dtype: torch.dtype = torch.float32, streaming: str = "auto"
) -> StorePatcher:
    model = build_model(load_flux(flux_file, format="nf4", streaming=streaming), dtype)
    model.offload_device = torch.device("cpu", 0)  # not the load device, as on a GPU
    return model


def lora_of(model: StorePatcher, rank: int = RANK, dtype: torch.dtype = torch.float32) -> Tensors:
    """A LoRA on every matrix of the blocks."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, packed in model.store.packed.items():
        if name.startswith(("double_blocks.", "single_blocks.")):
            for end, shape in {"A": (rank, packed.shape[1]), "B": (packed.shape[0], rank)}.items():
                key = f"diffusion_model.{name.removesuffix('.weight')}.lora_{end}.weight"
                tensors[key] = (0.02 * torch.randn(shape, generator=generator)).to(dtype)
    return tensors


def bytes_in(tensors: Tensors, dtype: torch.dtype) -> int:
    matrices = [tensor for tensor in tensors.values() if tensor.dim() == 2]
    return sum(matrix.numel() for matrix in matrices) * dtype.itemsize


class Casts(TorchDispatchMode):
    """Counts the casts, and copies to a device, of the LoRA's tensors, and those still alive."""

    def __init__(self) -> None:
        super().__init__()
        self._made: list[StorageWeakRef] = []

    @property
    def count(self) -> int:
        return len(self._made)

    @property
    def alive(self) -> int:
        return sum(not made.expired() for made in self._made)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        # In inference mode `aten.to` arrives, also where it gives back what it was given.
        if func.overloadpacket in (torch.ops.aten.to, torch.ops.aten._to_copy):
            if RANK in result.shape and result.data_ptr() != args[0].data_ptr():
                self._made.append(StorageWeakRef(result.untyped_storage()))
        return result


def drawn(model: StorePatcher, hooks: comfy.hooks.HookGroup | None = None, cfg: float = 1.0):
    """What a KSampler draws in two steps; the hooks are on the positive prompt."""
    generator = torch.Generator().manual_seed(0)
    config = model.model.atelier.config
    embeds = torch.randn(1, 20, config.context_dim, generator=generator)
    pooled = {"pooled_output": torch.randn(1, config.vector_dim, generator=generator)}
    empty = torch.zeros(1, 16, 8, 8)
    with torch.inference_mode():
        return comfy.sample.sample(
            model,
            comfy.sample.prepare_noise(empty, 0),
            2,
            cfg,
            "euler",
            "simple",
            [[embeds, pooled | ({"hooks": hooks} if hooks else {})]],
            [[embeds.flip(-1), pooled]],
            empty,
            disable_pbar=True,
            seed=0,
        )


@pytest.mark.parametrize("of_file", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("computing", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_sizes_that_comfyui_asks_for_hold_the_loras(
    flux_file: Path, computing: torch.dtype, of_file: torch.dtype
) -> None:
    model = model_of(flux_file, computing)
    tensors = lora_of(model, dtype=of_file)
    patched = add_lora(model, tensors, 0.8)
    expected = bytes_in(tensors, computing)
    assert patched.model_size() == model.model_size() + expected
    model.load(CPU)
    assert model.loaded_size() == model.model_size() == model.store.num_bytes
    with AllocatedBytes() as allocated:
        patched.load(CPU)
    assert allocated.peak == (expected if computing != of_file else 0)  # else the host's own
    assert patched.loaded_size() == patched.model_size()
    model.load(CPU)
    assert model.loaded_size() == model.store.num_bytes


@pytest.mark.parametrize("kind", ["plain", "final_layer", "without_alpha"])
def test_every_kind_of_names_is_counted(flux_file: Path, kind: str) -> None:
    model = model_of(flux_file)
    patched = add_lora(model, lora_tensors(kind), 0.8)
    patched.load(CPU)
    expected = model.store.num_bytes + bytes_in(lora_tensors(kind), torch.float32)
    assert patched.loaded_size() == patched.model_size() == expected


def test_loras_that_need_the_matrix_take_nothing_that_stays(flux_file: Path) -> None:
    model = model_of(flux_file)
    patched = add_lora(add_lora(model, lora_tensors("loha"), 1.0), lora_tensors("lokr"), 1.0)
    patched.load(CPU)
    assert patched.loaded_size() == patched.model_size() == model.store.num_bytes


@pytest.mark.parametrize("computing", [torch.float16, torch.bfloat16], ids=str)
def test_a_lora_is_cast_once_and_not_while_it_computes(
    flux_file: Path, computing: torch.dtype
) -> None:
    model = model_of(flux_file, computing)
    tensors = lora_of(model)
    patched = add_lora(model, tensors, 0.8)
    with Casts() as casts:
        drawn(patched)
    assert casts.count == len(tensors)
    with Casts() as casts:
        drawn(add_lora(model, tensors, -0.3))  # a new strength
        drawn(add_lora(patched, tensors, -0.3))  # two at once
    assert casts.count == 0


def test_the_node_that_sets_another_dtype_gets_the_numbers_of_the_file(flux_file: Path) -> None:
    exact = model_of(flux_file)
    tensors = lora_of(exact)
    expected = drawn(add_lora(exact, tensors, 0.8))
    patched = add_lora(model_of(flux_file, torch.bfloat16), tensors, 0.8)
    drawn(patched)
    changed = patched.clone()
    changed.set_model_compute_dtype(torch.float32)
    assert changed.model_size() == patched.model_size() + bytes_in(tensors, torch.bfloat16)
    assert torch.allclose(drawn(changed), expected, atol=1e-5)
    assert changed.loaded_size() == changed.model_size()


def test_the_same_lora_at_two_strengths_takes_its_bytes_once(flux_file: Path) -> None:
    model = model_of(flux_file)
    tensors = lora_of(model)
    once = add_lora(model, tensors, 1.0)
    twice = add_lora(add_lora(model, tensors, 1.5), tensors, -0.5)
    assert twice.model_size() == once.model_size()
    assert torch.allclose(drawn(twice), drawn(once), atol=1e-4)
    assert twice.loaded_size() == once.loaded_size() == once.model_size()
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    two = add_lora(once, copies, 0.5)
    assert two.model_size() == once.model_size() + bytes_in(tensors, torch.float32)


def test_the_loras_of_hooks_are_counted_and_cast_once(flux_file: Path) -> None:
    model = model_of(flux_file, torch.bfloat16)
    tensors = lora_of(model)
    hooks = comfy.hooks.create_hook_lora(lora=tensors, strength_model=0.8, strength_clip=0.0)
    asked = []
    model.add_callback(CallbacksMP.ON_LOAD, lambda patcher, *_: asked.append(patcher.model_size()))
    plain = drawn(model, cfg=2.0)
    with Casts() as casts:
        assert not torch.equal(drawn(model, hooks, cfg=2.0), plain)
    assert casts.count == len(tensors)
    assert asked == [
        model.store.num_bytes,
        model.store.num_bytes + bytes_in(tensors, torch.bfloat16),
    ]
    assert torch.equal(drawn(model, cfg=2.0), plain)
    assert model.loaded_size() == model.store.num_bytes


@pytest.fixture
def vram(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets what ComfyUI lets the next models that it loads take of the device."""
    load = comfy.model_management.LoadedModel.model_load

    def limit(free_bytes: float) -> None:
        def limited(self, lowvram_model_memory=0, force_patch_weights=False):
            # As load_models_gpu computes it: what is free now, less what the model has already.
            return load(self, free_bytes - self.model_loaded_memory(), force_patch_weights)

        monkeypatch.setattr(comfy.model_management.LoadedModel, "model_load", limited)

    return limit


def test_blocks_make_room_for_a_large_lora(flux_file: Path, vram: Callable[[float], None]) -> None:
    model = model_of(flux_file)
    tensors = lora_of(model, rank=10)
    lora = bytes_in(tensors, torch.float32)
    budget = model.store.num_bytes + 1
    assert budget / 4 < lora < budget / 3
    expected = drawn(add_lora(model, tensors, 0.8))
    assert model.store.stream is None
    vram(budget)
    plain = drawn(model)
    assert model.store.stream is None  # without the LoRA all of them fit
    assert torch.equal(drawn(add_lora(model, tensors, 0.8)), expected)
    assert model.store.stream
    assert model.store.resident_bytes <= budget - lora
    assert model.loaded_size() == model.store.resident_bytes + lora
    assert torch.equal(drawn(model), plain)
    assert model.store.stream is None


def test_blocks_leave_and_the_lora_stays_where_others_need_room(flux_file: Path) -> None:
    model = model_of(flux_file)
    patched = add_lora(model, lora_of(model), 0.8)
    expected = drawn(patched)
    before = patched.loaded_size()
    freed = patched.partially_unload(patched.offload_device, 1 << 20)
    assert 1 << 20 <= freed < model.store.num_bytes / 2
    assert patched.loaded_size() == before - freed
    assert torch.equal(drawn(patched), expected)


@pytest.mark.parametrize(
    ("streaming", "way"),
    [("auto", "detach"), *itertools.product(("off", "ram"), ("detach", "partially_unload"))],
)
def test_an_unloaded_model_leaves_no_lora_on_the_device(
    flux_file: Path, streaming: str, way: str
) -> None:
    model = model_of(flux_file, torch.bfloat16, streaming)
    tensors = lora_of(model)
    patched = add_lora(model, tensors, 0.8)
    with Casts() as casts:
        expected = drawn(patched)
    assert casts.alive == len(tensors)
    size = patched.loaded_size()
    if way == "detach":
        patched.detach()
    else:
        assert patched.partially_unload(patched.offload_device, size) == size
    assert patched.loaded_size() == 0
    assert casts.alive == 0
    assert torch.equal(drawn(patched), expected)
