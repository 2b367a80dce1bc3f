"""Save Fused Model: its file in ComfyUI, in diffusers and in our loader."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import folder_paths
import pytest
import torch
from allocated import profiled
from atelier.nodes import host
from atelier.nodes.fuse import FuseLora, SaveFusedModel
from atelier.nodes.native import build_model
from atelier.trainers.load import load_flux
from core_flux import core_model_of
from dense import dense_transformer, to_diffusers
from diffusers import FluxTransformer2DModel
from diffusers.loaders import single_file_model
from drawing import draw
from flux_files import flux_shapes, flux_tensors, write_flux
from lora_files import QKV, lora_tensors
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

TRUE = {"width": 3072, "context": 4096, "vector": 768}
"""FLUX.1-dev's sizes, with one double and one single block."""


@pytest.fixture(scope="module")
def flux_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_flux(tmp_path_factory.mktemp("flux") / "flux.safetensors")


@pytest.fixture(autouse=True)
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ComfyUI's output folder; and what its executor does for a node."""
    for kind in (FuseLora, SaveFusedModel):
        monkeypatch.setattr(kind, "hidden", type("Hidden", (), {"unique_id": "1"}), raising=False)
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    return tmp_path / "output"


def with_lora(path: Path, format: str = "bf16", kind: str = "plain") -> Any:
    model = build_model(load_flux(path, format=format), torch.float32)
    return comfy.sd.load_lora_for_models(model, None, lora_tensors(kind), 1.0, 0.0)[0]


@torch.inference_mode()
def save(model: Any, prefix: str = "diffusion_models/fused", dtype: str = "bf16") -> Path:
    return Path(SaveFusedModel.execute(model, prefix, dtype).args[0])


def merged(kind: str = "plain", **sizes: int) -> dict[str, Tensor]:
    """What ComfyUI merges into its own network, in float32 under the original names."""
    tensors = {name: tensor.float() for name, tensor in flux_tensors(**sizes).items()}
    model = core_model_of(tensors)
    model = comfy.sd.load_lora_for_models(model, None, lora_tensors(kind), 1.0, 0.0)[0]
    model.patch_model()
    for key in model.patches:
        name = key.removeprefix("diffusion_model.")
        tensors[name] = model.model.diffusion_model.state_dict()[name].detach()
    return tensors


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_file_holds_the_originals_with_the_lora_under_the_original_names(
    flux_file: Path, dtype: str
) -> None:
    path = save(with_lora(flux_file, "nf4"), dtype=dtype)
    saved, expected = load_file(path), merged()
    assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == flux_shapes()
    for name, tensor in saved.items():
        in_block = tensor.ndim == 2 and name.startswith(("double_blocks.", "single_blocks."))
        is_rest = dtype == "fp8" and not in_block
        assert tensor.dtype == (torch.bfloat16 if is_rest else DTYPES[dtype]), name
        wanted = expected[name].to(tensor.dtype).float()
        difference = (tensor.float() - wanted).norm() / wanted.norm()
        assert difference < 1e-3, name  # sums in another order round few to the other side


def test_the_metadata_follow_the_modelspec(flux_file: Path) -> None:
    path = save(with_lora(flux_file))
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.architecture"] == "flux-1-dev"
    assert metadata["modelspec.title"] == path.stem
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    digest = hashlib.sha256(content[8 + length :]).hexdigest()
    assert metadata["modelspec.hash_sha256"] == f"0x{digest}"
    assert metadata["atelier.fused_into"] == "flux.safetensors"


def test_files_are_numbered_where_the_loaders_list_them(flux_file: Path, output: Path) -> None:
    paths = [save(with_lora(flux_file)) for _ in range(2)]
    names = [f"fused_0000{number}_.safetensors" for number in (1, 2)]
    assert paths == [output / "diffusion_models" / name for name in names]


def test_a_fused_model_is_saved_of_the_numbers_before_they_were_packed(flux_file: Path) -> None:
    with torch.inference_mode():
        fused = FuseLora.execute(with_lora(flux_file, "nf4"), 1.0, "int2").args[0]
    of_fused, of_run_time = load_file(save(fused)), load_file(save(with_lora(flux_file)))
    assert all(torch.equal(of_fused[name], of_run_time[name]) for name in of_run_time)


def test_our_loader_reads_the_file(flux_file: Path) -> None:
    saved = save(with_lora(flux_file, "nf4"))
    with torch.inference_mode():
        fused = FuseLora.execute(with_lora(flux_file), 1.0, "bf16").args[0]
    assert (
        load_flux(saved, format="bf16").store.content_hash()
        == fused.model.atelier.store.content_hash()
    )


def known_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions before 2026 take the number of heads of the true FLUX for granted."""
    detect = comfy.model_detection.detect_unet_config

    def detected(*args: Any, **options: Any) -> dict | None:
        config = detect(*args, **options)
        if config is not None and config.get("image_model") == "flux":
            config["num_heads"] = config["hidden_size"] // 128
        return config

    monkeypatch.setattr(comfy.model_detection, "detect_unet_config", detected)


def conditioning() -> list:
    generator = torch.Generator().manual_seed(3)
    pooled = torch.randn(1, 64, generator=generator)
    embeds = torch.randn(1, 20, 128, generator=generator)
    return [[embeds, {"pooled_output": pooled, "guidance": 2.5}]]


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_comfyuis_loader_draws_with_the_file_as_with_the_lora(
    flux_file: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    known_width(monkeypatch)
    model, positive = with_lora(flux_file), conditioning()
    loaded = comfy.sd.load_diffusion_model(
        str(save(model, dtype=dtype)), model_options={"dtype": torch.float32}
    )
    expected, drawn = draw(model, positive, steps=2), draw(loaded, positive, steps=2)
    comfy.model_management.unload_all_models()
    assert (drawn - expected).norm() / expected.norm() < {"bf16": 2e-3, "fp8": 0.1}[dtype]


def config_folder(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """A local configuration, as that of a downloaded repository."""
    dense_transformer(tensors).save_config(folder / "transformer")
    return folder


def test_diffusers_loads_the_file_with_a_local_configuration(
    flux_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of this width, for which its converter must be told that it is not 3072."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    entry = single_file_model.SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
    convert = lambda checkpoint, **_: to_diffusers(checkpoint)  # noqa: E731
    monkeypatch.setitem(entry, "checkpoint_mapping_fn", convert)
    saved, expected = save(with_lora(flux_file, "nf4")), merged()
    network = FluxTransformer2DModel.from_single_file(
        str(saved),
        config=str(config_folder(tmp_path / "config", expected)),
        subfolder="transformer",
        local_files_only=True,
        torch_dtype=torch.float32,
    )
    wanted = to_diffusers(expected)
    for name, tensor in network.state_dict().items():
        assert torch.allclose(tensor, wanted[name], rtol=2**-8, atol=1e-6), name


@pytest.mark.slow
def test_at_the_true_width_comfyui_and_diffusers_load_the_file(tmp_path: Path) -> None:
    path = write_flux(tmp_path / "flux.safetensors", **TRUE)
    module, down, up = QKV, torch.randn(4, 3072), 0.01 * torch.randn(9216, 4)
    lora = {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
    model = build_model(load_flux(path, format="nf4"), torch.float32)
    model = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]
    saved = save(model)
    expected = flux_tensors(**TRUE)
    name = f"{module.removeprefix('diffusion_model.')}.weight"
    expected[name] = (expected[name].float() + up @ down).bfloat16()

    loaded = comfy.sd.load_diffusion_model(str(saved), {"dtype": torch.bfloat16})
    state = loaded.model.diffusion_model.state_dict()
    for name, tensor in expected.items():
        theirs = state.get(name, state.get(name.replace("norm.scale", "norm.weight")))
        assert torch.allclose(theirs.float(), tensor.float(), rtol=2**-7, atol=1e-6), name
    del loaded, state

    network = FluxTransformer2DModel.from_single_file(
        str(saved),
        config=str(config_folder(tmp_path / "config", expected)),
        subfolder="transformer",
        local_files_only=True,
        torch_dtype=torch.bfloat16,
    )
    wanted = to_diffusers(expected)
    for name, tensor in network.state_dict().items():
        assert torch.allclose(tensor.float(), wanted[name].float(), rtol=2**-7, atol=1e-6), name


def test_no_more_than_the_work_on_one_matrix_is_in_memory(tmp_path: Path) -> None:
    path = write_flux(tmp_path / "flux.safetensors", depth=3, depth_single=3)
    model = with_lora(path, "nf4")
    shapes = flux_shapes(depth=3, depth_single=3).values()
    allowed = max(4 * 4 * torch.Size(shape).numel() for shape in shapes)
    assert allowed < path.stat().st_size / 2  # else the last line would say nothing
    allocated = profiled(lambda: save(model), tmp_path / "trace.json")
    assert allocated.peak <= allowed


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_numbers_that_fp16_cannot_hold_are_refused(tmp_path: Path, output: Path) -> None:
    tensors = flux_tensors()
    tensors["img_in.weight"][0, 0] = 1e5
    save_file(tensors, tmp_path / "large.safetensors")
    with pytest.raises(ValueError, match=r"^'img_in.weight' .* above 65504, .* Save .* in bf16\.$"):
        save(with_lora(tmp_path / "large.safetensors"), dtype="fp16")
    assert not leftovers(output)


@pytest.mark.parametrize("prefix", ["../fused", "/fused", "", "a/../../b", "C:/fused"])
def test_a_name_outside_of_the_output_folder_is_refused(
    flux_file: Path, output: Path, prefix: str
) -> None:
    with pytest.raises(ValueError, match="must lie below the output folder"):
        save(with_lora(flux_file), prefix)
    assert not leftovers(output)


def test_a_full_disk_is_said_before_anything_is_written(
    flux_file: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match=r"has 0\.0 GB free\. Free some space"):
        save(with_lora(flux_file))
    assert not leftovers(output)


def test_cancel_leaves_no_file(
    flux_file: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_lora(flux_file)
    management = comfy.model_management
    show = host.Progress.show

    def cancel(self: host.Progress, done: int, *others: Any) -> None:
        show(self, done, *others)
        if done == 5:
            management.interrupt_current_processing()

    monkeypatch.setattr(host.Progress, "show", cancel)
    with pytest.raises(management.InterruptProcessingException):
        save(model)
    assert not leftovers(output)
