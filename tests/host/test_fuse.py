"""Fuse LoRA: LoRAs in the weights, of our MODELs and the core's.

What is compared with is ComfyUI's own merge into its own dense network, and quantization by other
code.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.lora_convert
import comfy.model_management
import comfy.model_sampling
import comfy.sd
import pytest
import torch
from allocated import profiled
from atelier.nodes import host, native_fuse
from atelier.nodes.fuse import AS_THE_MODEL, FuseLora
from atelier.nodes.native import build_model
from atelier.nodes.native_lora import apply_lora
from atelier.nodes.native_ranges import SamplingRange
from atelier.nodes.trainable import base_flux
from atelier.trainers.fuse import working_bytes
from atelier.trainers.load import load_flux
from atelier.trainers.store import WeightStore
from core_flux import core_model_of
from dense import ROUND_TRIPS
from drawing import draw
from flux_files import flux_tensors, write_flux
from lora_files import KINDS, lora_tensors
from safetensors.torch import save_file
from torch import Tensor

FP8 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def flux_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_flux(tmp_path_factory.mktemp("flux") / "flux.safetensors")


@pytest.fixture(autouse=True)
def outside_of_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ComfyUI's executor does for a node."""
    monkeypatch.setattr(FuseLora, "hidden", type("Hidden", (), {"unique_id": "1"}), raising=False)


def ours(path: Path, format: str = "bf16") -> Any:
    return build_model(load_flux(path, format=format), torch.float32)


def put_on(model: Any, kind: str, strength: float = 1.0) -> Any:
    """As the core's loader does."""
    return comfy.sd.load_lora_for_models(model, None, lora_tensors(kind), strength, 0.0)[0]


@torch.inference_mode()
def fuse(model: Any, scale: float = 1.0, format: str = AS_THE_MODEL) -> Any:
    """As a node does."""
    return FuseLora.execute(model, scale, format).args[0]


def store_of(model: Any) -> WeightStore:
    return model.model.atelier.store


def numbers(store: WeightStore) -> dict[str, Tensor]:
    matrices = {name: matrix.dequantize(torch.float32) for name, matrix in store.packed.items()}
    return matrices | {name: tensor.float() for name, tensor in store.plain.items()}


def merged_by_the_core(*loras: tuple[str, float], base: dict[str, Tensor] | None = None):
    """The float32 tensors of ComfyUI's own FLUX with LoRAs merged into it, by original names."""
    tensors = base or flux_tensors()
    model = core_model_of({name: tensor.float() for name, tensor in tensors.items()})
    for kind, strength in loras:
        model = put_on(model, kind, strength)
    model.patch_model()
    merged = {
        name: value.detach() for name, value in model.model.diffusion_model.state_dict().items()
    }
    renamed = (("query_norm.weight", "query_norm.scale"), ("key_norm.weight", "key_norm.scale"))
    for theirs, original in renamed:
        merged = {name.replace(theirs, original): value for name, value in merged.items()}
    assert merged.keys() == tensors.keys()
    return merged


def is_block_matrix(name: str, tensor: Tensor) -> bool:
    return tensor.ndim == 2 and name.startswith(("double_blocks.", "single_blocks."))


def conditioning() -> list:
    generator = torch.Generator().manual_seed(3)
    pooled = torch.randn(1, 64, generator=generator)
    embeds = torch.randn(1, 20, 128, generator=generator)
    return [[embeds, {"pooled_output": pooled, "guidance": 2.5}]]


def relative(difference: Tensor, reference: Tensor) -> float:
    return float(difference.norm() / reference.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_are_those_that_comfyui_merges(flux_file: Path, kind: str) -> None:
    fused = numbers(store_of(fuse(put_on(ours(flux_file), kind, 0.7))))
    expected, before = merged_by_the_core((kind, 0.7)), flux_tensors()
    changed = {name for name in before if not torch.equal(expected[name], before[name].float())}
    assert changed
    for name, tensor in fused.items():
        # The last bit of bf16, and of sums in another order.
        assert torch.allclose(tensor, expected[name], rtol=2**-8, atol=1e-6), name
        if name not in changed:
            assert torch.equal(tensor, before[name].float())


@pytest.mark.parametrize("format", ["nf4", "int4", "fp8"])
def test_the_numbers_of_the_file_are_packed_with_the_lora_in_them(
    flux_file: Path, format: str
) -> None:
    fused = numbers(store_of(fuse(put_on(ours(flux_file, "int2"), "plain"), format=format)))
    expected = merged_by_the_core(("plain", 1.0))
    for name, tensor in fused.items():
        if is_block_matrix(name, tensor):
            packed = ROUND_TRIPS[format](expected[name])
            # Sums in another order round a number in ten thousand to the other side.
            assert relative(tensor - packed, packed) < 2e-3, name


def test_several_loras_are_fused_at_once_or_one_after_the_other(flux_file: Path) -> None:
    model = put_on(put_on(ours(flux_file, "nf4"), "plain", 0.7), "lokr", -0.5)
    at_once = numbers(store_of(fuse(model)))
    in_turn = fuse(put_on(fuse(put_on(ours(flux_file, "nf4"), "plain", 0.7)), "lokr", -0.5))
    expected = merged_by_the_core(("plain", 0.7), ("lokr", -0.5))
    for fused in (at_once, numbers(store_of(in_turn))):  # rounded once, also in turn
        for name, tensor in fused.items():
            if is_block_matrix(name, tensor):
                packed = ROUND_TRIPS["nf4"](expected[name])
                assert relative(tensor - packed, packed) < 2e-3, name


@pytest.mark.parametrize("kind", ["plain", "dora", "difference"])
def test_scale_multiplies_the_strength(flux_file: Path, kind: str) -> None:
    scaled = numbers(store_of(fuse(put_on(ours(flux_file), kind, 0.8), scale=-0.5)))
    expected = merged_by_the_core((kind, -0.4))
    for name, tensor in scaled.items():
        assert torch.allclose(tensor, expected[name], rtol=2**-8, atol=1e-6), name


def test_what_no_lora_touches_keeps_its_packed_bytes(flux_file: Path) -> None:
    before = load_flux(flux_file, format="nf4")
    model = put_on(build_model(before, torch.float32), "plain")
    fused = store_of(fuse(model))
    for name, matrix in before.store.packed.items():
        is_same = torch.equal(matrix.data, fused.packed[name].data)
        assert is_same == (f"diffusion_model.{name}" not in model.patches), name


def test_pictures_are_those_of_the_lora_beside_the_model(flux_file: Path) -> None:
    model = put_on(ours(flux_file, "bf16"), "plain")
    positive = conditioning()
    plain, beside = (draw(one, positive, steps=2) for one in (ours(flux_file), model))
    fused = draw(fuse(model), positive, steps=2)
    assert relative(beside - plain, plain) > 0.02
    assert relative(fused - beside, beside) < 2e-3


def test_the_given_model_stays_as_it_is(flux_file: Path) -> None:
    loaded = load_flux(flux_file, format="nf4")
    model = put_on(build_model(loaded, torch.float32), "plain")
    before, patches = loaded.store.content_hash(), {**model.patches}
    fused = fuse(model)
    assert loaded.store.content_hash() == before
    assert model.patches == patches
    assert not fused.patches
    assert not store_of(fused).packed.keys() ^ loaded.store.packed.keys()
    assert store_of(fused).content_hash() != before


def test_what_nodes_set_for_sampling_goes_along(flux_file: Path) -> None:
    model = put_on(ours(flux_file), "plain")
    sampling = type(model.get_model_object("model_sampling"))(model.model.model_config)
    sampling.set_parameters(shift=0.37)
    model.add_object_patch("model_sampling", sampling)
    model.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * 0)
    fused = fuse(model)
    assert fused.get_model_object("model_sampling").shift == 0.37
    positive = conditioning()
    assert torch.equal(draw(fused, positive, steps=2), draw(model, positive, steps=2))


def test_a_lora_of_a_part_of_the_sampling_stays_beside(
    flux_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    monkeypatch.setattr(host, "show_text", lambda text, node_id: shown.append(text))
    half = SamplingRange(start_percent=0.0, end_percent=0.5)
    base = put_on(ours(flux_file), "plain")
    model = apply_lora(base, lora_tensors("without_alpha"), 3.0, span=half).model
    fused = fuse(model)
    assert "it stays on the MODEL" in shown[0]
    positive = conditioning()
    without, expected, drawn = (draw(one, positive, steps=4) for one in (base, model, fused))
    assert relative(expected - without, without) > 0.01
    assert relative(drawn - expected, expected) < 2e-3


def core_model(path: Path, **options: Any) -> Any:
    model = comfy.sd.load_diffusion_model(str(path), model_options=options)
    model.model.diffusion_model.num_heads = 2
    return model


@pytest.fixture(autouse=True)
def every_width_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions before 2026 take the number of heads of the true FLUX for granted."""
    detect = comfy.model_detection.detect_unet_config

    def detected(*args: Any, **options: Any) -> dict | None:
        config = detect(*args, **options)
        if config is not None and config.get("image_model") == "flux":
            config["num_heads"] = config["hidden_size"] // 128
        return config

    monkeypatch.setattr(comfy.model_detection, "detect_unet_config", detected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_core_model_is_fused_past_what_is_merged_into_it(
    flux_file: Path, dtype: torch.dtype
) -> None:
    model = put_on(core_model(flux_file, dtype=dtype), "plain")
    comfy.model_management.load_models_gpu([model])
    assert model.backup  # the LoRA is in the weights now
    fused, expected = (
        fuse(model, format="nf4"),
        fuse(put_on(ours(flux_file), "plain"), format="nf4"),
    )
    assert store_of(fused).content_hash() == store_of(expected).content_hash()
    comfy.model_management.unload_all_models()


def test_an_fp8_model_of_the_core_keeps_the_bytes_that_no_lora_touches(tmp_path: Path) -> None:
    tensors = flux_tensors()
    values = {name: tensor.to(FP8).to(torch.bfloat16) for name, tensor in tensors.items()}
    save_file(values, tmp_path / "fp8.safetensors")
    model = put_on(core_model(tmp_path / "fp8.safetensors", dtype=FP8), "plain")
    fused = fuse(model)
    assert fused.model.atelier.format == "fp8"
    merged = merged_by_the_core(("plain", 1.0), base=values)
    for name, tensor in numbers(store_of(fused)).items():
        if f"diffusion_model.{name}" not in model.patches:
            assert torch.equal(tensor, values[name].float())
        else:
            packed = ROUND_TRIPS["fp8"](merged[name])
            assert relative(tensor - packed, packed) < 2e-3


def test_a_model_whose_weights_are_paged_is_fused_from_its_file(
    flux_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As newer ComfyUIs load it for NVIDIA cards, of which a CPU has none."""
    patcher = comfy.model_patcher
    if not hasattr(patcher, "ModelPatcherDynamic"):
        pytest.skip("this ComfyUI pages no weights")
    with monkeypatch.context() as patched:
        patched.setattr(patcher, "CoreModelPatcher", patcher.ModelPatcherDynamic)
        model = core_model(flux_file, load_device=torch.device("meta"), dtype=torch.bfloat16)
    assert model.is_dynamic()
    fused = fuse(put_on(model, "plain"), format="nf4")
    expected = fuse(put_on(ours(flux_file), "plain"), format="nf4")
    assert store_of(fused).content_hash() == store_of(expected).content_hash()


def test_a_model_fused_of_parameters_is_fused_again_of_what_it_holds(flux_file: Path) -> None:
    model = put_on(core_model(flux_file, dtype=torch.bfloat16), "plain")
    again = fuse(put_on(fuse(model), "lokr"))
    expected = merged_by_the_core(("plain", 1.0), ("lokr", 1.0))
    for name, tensor in numbers(store_of(again)).items():
        assert torch.allclose(tensor, expected[name], rtol=2**-7, atol=1e-4), name


def test_a_fused_model_is_another_base_for_runs(flux_file: Path) -> None:
    model = ours(flux_file, "nf4")
    bases = [
        base_flux(one)
        for one in (
            model,
            fuse(put_on(model, "plain")),
            fuse(put_on(model, "plain")),
            fuse(put_on(model, "plain", 0.5)),
            fuse(put_on(model, "plain"), scale=0.5),
            fuse(put_on(model, "lokr")),
            fuse(put_on(fuse(put_on(model, "plain")), "lokr")),
        )
    ]
    identities = [base.identity for base in bases]
    assert identities[1] == identities[2]
    assert len({*identities}) == len(identities) - 1
    assert [bool(base.path) for base in bases] == [True] + [False] * 6


def test_the_model_that_was_fused_may_be_freed(flux_file: Path) -> None:
    loaded = load_flux(flux_file, format="nf4")
    model = put_on(build_model(loaded, torch.float32), "plain")
    fused, store = fuse(model), weakref.ref(loaded.store)
    del model, loaded
    gc.collect()
    assert store() is None
    assert fuse(put_on(fused, "lokr")) is not None


def test_fusing_takes_the_packed_model_and_the_work_on_one_matrix(tmp_path: Path) -> None:
    path = write_flux(tmp_path / "flux.safetensors", depth=3, depth_single=3)
    model = put_on(ours(path, "nf4"), "plain")
    packed, working = store_of(model).num_bytes, working_bytes(native_fuse.origin_of_model(model))
    assert packed + working < path.stat().st_size / 1.5  # else the last line would say nothing
    allocated = profiled(lambda: fuse(model), tmp_path / "trace.json")
    assert allocated.kept >= packed
    assert allocated.peak <= packed + working


def refusal(model: Any, scale: float = 1.0, format: str = AS_THE_MODEL) -> str:
    with pytest.raises(ValueError, match=r"\.$") as refused:
        fuse(model, scale, format)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_nothing_to_fuse_is_refused(flux_file: Path, scale: float) -> None:
    model = ours(flux_file)
    given = put_on(model, "plain") if scale == 0 else model
    assert refusal(given, scale).startswith("Fuse LoRA has nothing to fuse")


def test_a_lora_for_a_part_of_the_sampling_alone_is_refused(flux_file: Path) -> None:
    span = SamplingRange(end_percent=0.5)
    model = apply_lora(ours(flux_file), lora_tensors("plain"), 1.0, span=span).model
    assert "the LoRA on its MODEL acts in a part of the sampling" in refusal(model)


def test_too_little_memory_is_said_before_anything_is_read(
    flux_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = put_on(ours(flux_file, "nf4"), "plain")
    monkeypatch.setattr(host, "free_system_memory", lambda: 1_000_000)
    monkeypatch.setattr("atelier.nodes.fuse.pack_flux", lambda *_, **__: pytest.fail("it began"))
    assert "of memory, and 0.0 are free" in refusal(model)


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    path = write_flux(tmp_path / "gone.safetensors")
    model = put_on(ours(path), "plain")
    path.unlink()
    assert str(path) in refusal(model)


def test_a_file_that_was_changed_is_refused(tmp_path: Path) -> None:
    path = write_flux(tmp_path / "other.safetensors")
    model = put_on(ours(path), "plain")
    write_flux(path, seed=1)
    assert "was changed since" in refusal(model)


def spoiled(change: Callable[[dict[str, Tensor]], None]) -> dict[str, Tensor]:
    tensors = lora_tensors("without_alpha")
    change(tensors)
    return tensors


def with_nan(tensors: dict[str, Tensor]) -> None:
    next(tensor for name, tensor in tensors.items() if "lora_B" in name)[3, 1] = torch.nan


def of_other_widths(tensors: dict[str, Tensor]) -> None:
    name = next(name for name in tensors if "lora_A" in name)
    tensors[name] = tensors[name][:, :128].clone()


@pytest.mark.parametrize(
    ("change", "text"),
    [(with_nan, "values that are not finite"), (of_other_widths, "was made for another one")],
)
def test_a_lora_that_does_not_fit_is_refused(flux_file: Path, change: Callable, text: str) -> None:
    model, _ = comfy.sd.load_lora_for_models(ours(flux_file), None, spoiled(change), 1.0, 0.0)
    assert text in refusal(model)


def test_another_kind_of_model_is_refused() -> None:
    network = torch.nn.Module()
    network.diffusion_model = torch.nn.Linear(4, 4)
    network.diffusion_model.dtype = torch.float32
    cpu = torch.device("cpu")
    model = comfy.model_patcher.ModelPatcher(network, load_device=cpu, offload_device=cpu)
    model.patches["diffusion_model.weight"] = [(1.0, (torch.ones(4, 4),), 1.0, None, None)]
    assert "is not a FLUX.1" in refusal(model)


def test_a_replaced_network_is_refused(flux_file: Path) -> None:
    model = put_on(ours(flux_file), "plain")
    model.add_object_patch("diffusion_model", torch.nn.Identity())
    assert "Put that node behind Fuse LoRA" in refusal(model)
