"""FLUX files of every kind into a store: names, dtypes, shards, identity and damage."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from atelier.trainers.formats import FORMATS
from atelier.trainers.load import load_flux
from atelier.trainers.store import WeightStore
from dense import ROUND_TRIPS, dense_transformer, to_diffusers
from diffusers import Flux2Transformer2DModel
from flux_files import flux_shapes, flux_tensors, write_flux
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]
BIG = {"width": 3072, "context": 4096, "vector": 768}
"""FLUX.1-dev's true sizes, with one double and one single block."""


def is_block_matrix(name: str, tensor: Tensor) -> bool:
    return name.startswith(("double_blocks.", "single_blocks.")) and tensor.ndim == 2


def store_of(path: Path, format: str = "bf16") -> WeightStore:
    return load_flux(path, format=format).store


def save(path: Path, tensors: Tensors) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return flux_tensors(depth_single=2)


@pytest.fixture(scope="module")
def expected_hash(tensors: Tensors, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The content of a store loaded from a plain file in the original names."""
    path = save(tmp_path_factory.mktemp("plain") / "flux.safetensors", tensors)
    return store_of(path).content_hash()


def original(folder: Path, tensors: Tensors) -> Path:
    return save(folder / "flux.safetensors", tensors)


def with_prefix(folder: Path, tensors: Tensors) -> Path:
    named = {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}
    return save(folder / "flux.safetensors", named)


def all_in_one(folder: Path, tensors: Tensors) -> Path:
    """A checkpoint that also holds encoders, whose tensors may have other types."""
    named = {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}
    named["vae.decoder.conv_in.bias"] = torch.zeros(16)
    named["text_encoders.clip_l.embeddings.position_ids"] = torch.arange(77)[None]
    return save(folder / "flux.safetensors", named)


def saved_by_a_newer_comfyui(folder: Path, tensors: Tensors) -> Path:
    renamed = {name.replace("_norm.scale", "_norm.weight"): t for name, t in tensors.items()}
    assert renamed.keys() != tensors.keys()
    return with_prefix(folder, renamed)


def float32(folder: Path, tensors: Tensors) -> Path:
    return original(folder, {name: tensor.float() for name, tensor in tensors.items()})


def diffusers_file(folder: Path, tensors: Tensors) -> Path:
    return save(folder / "flux.safetensors", to_diffusers(tensors))


def diffusers_folder(folder: Path, tensors: Tensors) -> Path:
    """As diffusers' save_pretrained writes it, in several files with an index."""
    dense_transformer(tensors).save_pretrained(folder, max_shard_size="4MB")
    assert len(list(folder.glob("*.safetensors"))) >= 2
    return folder


def pipeline_folder(folder: Path, tensors: Tensors) -> Path:
    dense_transformer(tensors).save_pretrained(folder / "transformer")
    return folder


LAYOUTS: list[Callable[[Path, Tensors], Path]] = [
    original,
    with_prefix,
    all_in_one,
    saved_by_a_newer_comfyui,
    float32,
    diffusers_file,
    diffusers_folder,
    pipeline_folder,
]


@pytest.mark.parametrize("write", LAYOUTS, ids=lambda write: write.__name__)
def test_every_layout_gives_the_same_store(
    tmp_path: Path, tensors: Tensors, expected_hash: str, write: Callable
) -> None:
    assert store_of(write(tmp_path, tensors)).content_hash() == expected_hash


@pytest.mark.parametrize("format", FORMATS)
def test_a_store_holds_the_tensors_of_its_file(
    tmp_path: Path, tensors: Tensors, format: str
) -> None:
    store = store_of(original(tmp_path, tensors), format)
    assert {*store.packed, *store.plain} == {*tensors}
    for name, tensor in tensors.items():
        if tensor.ndim == 1:
            assert torch.equal(store.plain[name], tensor), name
        else:
            in_block = is_block_matrix(name, tensor)
            expected = ROUND_TRIPS[format if in_block else "bf16"](tensor)
            assert torch.equal(store.packed[name].dequantize(torch.float32), expected), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_a_cast_file_gives_the_store_of_the_cast_values(
    tmp_path: Path, tensors: Tensors, dtype: torch.dtype
) -> None:
    cast = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    expected = {name: tensor.to(torch.bfloat16) for name, tensor in cast.items()}
    found = store_of(original(tmp_path / "cast", cast))
    assert found.content_hash() == store_of(original(tmp_path, expected)).content_hash()


@pytest.mark.parametrize("end", ["scale_weight", "weight_scale"])
def test_fp8_scales_are_multiplied_in(tmp_path: Path, tensors: Tensors, end: str) -> None:
    """ComfyUI's scaled fp8 files, in its older and newer name of the scale."""
    scaled, expected = {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}, {}
    for name, tensor in tensors.items():
        if is_block_matrix(name, tensor):
            scale = tensor.float().abs().max() / 448
            scaled[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            scaled[name.removesuffix("weight") + end] = scale
            expected[name] = (scaled[name].float() * scale).to(torch.bfloat16)
        else:
            scaled[name] = expected[name] = tensor
    found = store_of(original(tmp_path / "scaled", scaled))
    assert found.content_hash() == store_of(original(tmp_path, expected)).content_hash()


@pytest.mark.parametrize("shape", [(), (1,), (256,), (256, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float32], ids=str)
def test_scales_of_rows_are_multiplied_along_rows(
    tmp_path: Path, tensors: Tensors, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """On a square matrix, where the other way would go unseen."""
    name = "double_blocks.0.img_attn.proj.weight"
    assert tensors[name].shape == (256, 256)
    weight = tensors[name].to(dtype)
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.5
    rows = scale.numpy().reshape(-1, 1)
    expected = torch.from_numpy(weight.float().numpy() * rows).to(torch.bfloat16)
    scaled = {**tensors, name: weight, f"{name.removesuffix('weight')}scale_weight": scale}
    store = store_of(original(tmp_path, scaled))
    assert torch.equal(store.packed[name].data, expected)


@pytest.mark.parametrize("shape", [None, (), (256, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_fp8_keeps_the_numbers_of_an_fp8_file(
    tmp_path: Path, tensors: Tensors, dtype: torch.dtype, shape: tuple[int, ...] | None
) -> None:
    name = "double_blocks.0.img_attn.proj.weight"
    file = {**tensors, name: tensors[name].to(dtype)}
    expected = file[name].float().numpy()
    if shape is not None:
        scale = torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.5
        file[f"{name.removesuffix('weight')}weight_scale"] = scale
        expected = expected * scale.numpy().reshape(-1, 1)
    found = store_of(original(tmp_path, file), "fp8").packed[name]
    assert found.dequantize(torch.float32).numpy().tolist() == expected.tolist()
    assert found.data.dtype == dtype
    assert found.num_bytes <= expected.size + 4 * 256


def test_joined_matrices_of_an_fp8_file_keep_the_scale_of_each(
    tmp_path: Path, tensors: Tensors
) -> None:
    """diffusers' names: q, k and v with a factor each are one matrix of the store."""
    path = diffusers_file(tmp_path, tensors)
    file = load_file(path)
    rows = []
    for number, part in enumerate(("to_q", "to_k", "to_v")):
        name = f"transformer_blocks.0.attn.{part}."
        file[f"{name}weight"] = file[f"{name}weight"].to(torch.float8_e4m3fn)
        file[f"{name}weight_scale"] = torch.tensor(0.3 + number)
        rows.append(file[f"{name}weight"].float() * file[f"{name}weight_scale"])
    save_file(file, path)
    weight = store_of(path, "fp8").packed["double_blocks.0.img_attn.qkv.weight"]
    assert torch.equal(weight.dequantize(torch.float32), torch.cat(rows))


@pytest.mark.parametrize("format", ["bf16", "fp8"])
@pytest.mark.parametrize("shape", [(1, 256), (128,), (256, 2), (256, 256)], ids=str)
def test_scales_of_anything_else_are_one_sentence(
    tmp_path: Path, tensors: Tensors, shape: tuple[int, ...], format: str
) -> None:
    name = "double_blocks.0.img_attn.proj."
    weight = tensors[f"{name}weight"].to(torch.float8_e4m3fn)
    scaled = {**tensors, f"{name}weight": weight, f"{name}weight_scale": torch.ones(shape)}
    path = original(tmp_path, scaled)
    sentence = (
        f"The scale '{name}weight_scale' in 'flux.safetensors' has the shape {list(shape)}, and "
        "its weight [256, 256]. Use a file whose scales are one number"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
        store_of(path, format)


def test_reading_one_tensor_does_not_change_another(tmp_path: Path, tensors: Tensors) -> None:
    """All are read through one buffer."""
    path = original(tmp_path, tensors)
    store = store_of(path)
    for name, tensor in load_file(path).items():
        held = store.plain[name] if name in store.plain else store.packed[name].data
        assert torch.equal(held, tensor), name


def test_progress_ends_at_the_number_of_tensors(tmp_path: Path, tensors: Tensors) -> None:
    seen: list[tuple[int, int]] = []
    path = original(tmp_path, tensors)
    load_flux(path, format="bf16", on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, len(tensors)) for done in range(1, len(tensors) + 1)]


def test_the_identity_follows_a_byte_of_every_matrix(tmp_path: Path) -> None:
    """Also of a small model, none of whose tensors is large."""
    small = flux_tensors()
    identities = {load_flux(original(tmp_path, small), format="bf16").identity}
    matrices = [name for name, tensor in small.items() if tensor.ndim == 2]
    for name in matrices:
        changed = small[name].clone()
        changed.view(torch.uint8).view(-1)[0] ^= 1
        path = original(tmp_path, {**small, name: changed})
        identities.add(load_flux(path, format="bf16").identity)
    assert len(identities) == len(matrices) + 1


def test_the_identity_does_not_follow_time_or_place(tmp_path: Path) -> None:
    path = write_flux(tmp_path / "a.safetensors")
    before = load_flux(path, format="bf16").identity
    moved = path.rename(tmp_path / "b.safetensors")
    os.utime(moved, (1, 1))
    assert load_flux(moved, format="nf4").identity == before


def cut(folder: Path, tensors: Tensors) -> Path:
    path = original(folder, tensors)
    path.write_bytes(path.read_bytes()[:-1])
    return path


def pickled(folder: Path, tensors: Tensors) -> Path:
    torch.save(tensors, folder / "flux.safetensors")
    return folder / "flux.safetensors"


def named_pickle(folder: Path, tensors: Tensors) -> Path:
    return pickled(folder, tensors).rename(folder / "flux.ckpt")


def empty(folder: Path, tensors: Tensors) -> Path:
    (folder / "flux.safetensors").touch()
    return folder / "flux.safetensors"


def text(folder: Path, tensors: Tensors) -> Path:
    (folder / "flux.safetensors").write_text("<!DOCTYPE html><html>Sign in to download</html>")
    return folder / "flux.safetensors"


def stable_diffusion(folder: Path, tensors: Tensors) -> Path:
    name = "model.diffusion_model.input_blocks.0.0.weight"
    return save(folder / "sd15.safetensors", {name: torch.zeros(320, 4, 3, 3)})


def sdxl(folder: Path, tensors: Tensors) -> Path:
    """As sd_xl_base_1.0.safetensors."""
    shapes = {
        "conditioner.embedders.1.model.ln_final.weight": (1280,),
        "first_stage_model.encoder.conv_in.weight": (128, 3, 3, 3),
        "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
        "model.diffusion_model.time_embed.0.weight": (1280, 320),
    }
    named = {name: torch.zeros(shape).half() for name, shape in shapes.items()}
    return save(folder / "sd_xl_base_1.0.safetensors", named)


def sd3(folder: Path, tensors: Tensors) -> Path:
    """As sd3_medium.safetensors."""
    shapes = {
        "model.diffusion_model.context_embedder.weight": (1536, 4096),
        "model.diffusion_model.final_layer.linear.weight": (64, 1536),
        "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.bias": (4608,),
        "model.diffusion_model.pos_embed": (1, 36864, 1536),
        "model.diffusion_model.x_embedder.proj.weight": (1536, 16, 2, 2),
    }
    named = {name: torch.zeros(shape, dtype=torch.float8_e4m3fn) for name, shape in shapes.items()}
    return save(folder / "sd3_medium.safetensors", named)


def diffusers_sd3(folder: Path, tensors: Tensors) -> Path:
    """A diffusers folder, whose names are near those of FLUX.1."""
    shapes = {
        "context_embedder.weight": (1536, 4096),
        "pos_embed.proj.weight": (1536, 16, 2, 2),
        "time_text_embed.text_embedder.linear_1.weight": (1536, 2048),
        "transformer_blocks.0.attn.to_q.weight": (1536, 1536),
    }
    named = {name: torch.zeros(shape).half() for name, shape in shapes.items()}
    save(folder / "transformer" / "diffusion_pytorch_model.safetensors", named)
    return folder


def flux_2(folder: Path, tensors: Tensors) -> Path:
    names = ("double_stream_modulation_img.lin.weight", "img_in.weight", "txt_in.weight")
    return save(folder / "flux2.safetensors", {name: torch.zeros(8, 8) for name in names})


def diffusers_flux_2(folder: Path, tensors: Tensors) -> Path:
    """diffusers' own, in little."""
    sizes = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1}
    widths = {"attention_head_dim": 128, "joint_attention_dim": 64, "in_channels": 16}
    Flux2Transformer2DModel(**sizes, **widths).save_pretrained(folder / "transformer")
    return folder


def lora_file(folder: Path, tensors: Tensors) -> Path:
    name = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"
    return save(folder / "lora.safetensors", {name: torch.zeros(4, 8)})


def without_a_tensor(folder: Path, tensors: Tensors) -> Path:
    return original(
        folder, {name: t for name, t in tensors.items() if name != "single_blocks.1.linear2.bias"}
    )


def without_a_diffusers_tensor(folder: Path, tensors: Tensors) -> Path:
    named = to_diffusers(tensors)
    del named["transformer_blocks.0.attn.to_k.weight"]
    return save(folder / "flux.safetensors", named)


def four_bits(folder: Path, tensors: Tensors) -> Path:
    """Packed bytes without what says how they were packed."""
    bytes_of = {
        name: torch.zeros(8, 1, dtype=torch.uint8) if is_block_matrix(name, t) else t
        for name, t in tensors.items()
    }
    return original(folder, bytes_of)


def without_a_shard(folder: Path, tensors: Tensors) -> Path:
    sorted(diffusers_folder(folder, tensors).glob("*.safetensors"))[1].unlink()
    return folder


def without_a_whole_index(folder: Path, tensors: Tensors) -> Path:
    next(diffusers_folder(folder, tensors).glob("*.index.json")).write_text('{"weight_map"')
    return folder


def a_header_that_is_no_table(folder: Path, tensors: Tensors) -> Path:
    header = b"[1, 2]  "
    path = folder / "flux.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    return path


def empty_folder(folder: Path, tensors: Tensors) -> Path:
    return folder


def nowhere(folder: Path, tensors: Tensors) -> Path:
    return folder / "nowhere.safetensors"


BAD_FILES: dict[Callable, str] = {
    cut: r"^The file 'flux.safetensors' is cut short: download it again\.$",
    pickled: r"^'flux.safetensors' is not a whole safetensors file\. Choose a .safetensors file",
    empty: r"^'flux.safetensors' is not a whole safetensors file\. ",
    text: r"^'flux.safetensors' is not a whole safetensors file\. ",
    a_header_that_is_no_table: r"^'flux.safetensors' is not a whole safetensors file\. ",
    without_a_whole_index: r"^The index '.*index.json' is damaged: download it again\.$",
    stable_diffusion: r"^'sd15.safetensors' is not a FLUX.1 model: .*Choose a FLUX.1 file",
    sdxl: r"^'sd_xl_base_1.0.safetensors' is not a FLUX.1 model: .*Choose a FLUX.1 file",
    sd3: r"^'sd3_medium.safetensors' is not a FLUX.1 model: .*Choose a FLUX.1 file",
    diffusers_sd3: r"^'.*' is not a FLUX.1 model: .*Choose a FLUX.1 file",
    flux_2: r"^'flux2.safetensors' is a FLUX.2 model, .* Choose a FLUX.1 file",
    diffusers_flux_2: r"^'.*' is a FLUX.2 model, .* Choose a FLUX.1 file",
    lora_file: r"^'lora.safetensors' is not a FLUX.1 model: ",
    without_a_tensor: r"is an incomplete FLUX.1 model: 'single_blocks.1.linear2.bias' is missing\.",
    without_a_diffusers_tensor: r"is an incomplete FLUX.1 model: .*double_blocks.0.img_attn.qkv",
    four_bits: r"^The tensor '.*' in 'flux.safetensors' has the type U8\. Use a file in bf16, ",
    named_pickle: r"^'flux.ckpt' is a pickle, a file that can run code .*Choose the .safetensors",
    without_a_shard: r"^The shard 'diffusion_pytorch_model-00002-of-\d+.safetensors' is missing in",
    empty_folder: r"^There is no .safetensors file in '.*'\. Download the model into it",
    nowhere: r"^The model file '.*nowhere.safetensors' does not exist\. Put it there",
}


@pytest.mark.parametrize("write", BAD_FILES, ids=lambda write: write.__name__)
def test_a_bad_file_is_one_sentence(tmp_path: Path, tensors: Tensors, write: Callable) -> None:
    with pytest.raises(ValueError, match=BAD_FILES[write]):
        load_flux(write(tmp_path, tensors), format="bf16")


def test_a_cut_file_is_refused_before_anything_is_read(tmp_path: Path, tensors: Tensors) -> None:
    steps: list[int] = []
    with pytest.raises(ValueError, match="is cut short"):
        load_flux(
            cut(tmp_path, tensors),
            format="bf16",
            on_progress=lambda done, total: steps.append(done),
        )
    assert steps == []


def test_an_unknown_format_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Unknown format 'nf5'\. Choose one of: .*nf4"):
        load_flux(tmp_path, format="nf5")


@pytest.mark.slow
def test_a_file_of_flux_devs_true_width_loads_into_four_bits(tmp_path: Path) -> None:
    """Zeros of the true names and shapes, but for one row of numbers in each kind of block."""
    shapes = flux_shapes(**BIG)
    tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    noise = torch.randn(3072, generator=torch.Generator().manual_seed(0)).bfloat16()
    for name in ("double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"):
        tensors[name][5000] = noise
    path = original(tmp_path, tensors)
    del tensors
    loaded = load_flux(path, format="nf4")
    path.unlink()  # a gigabyte
    expected = ROUND_TRIPS["nf4"](noise[None])
    for name in ("double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"):
        row = loaded.store.packed[name].dequantize(torch.float32, slice(5000, 5001))
        assert torch.equal(row, expected)
    assert {name: tuple(weight.shape) for name, weight in loaded.store.packed.items()} == {
        name: shape for name, shape in shapes.items() if len(shape) == 2
    }
    assert loaded.config.num_heads == 24


def test_the_shards_of_an_index_are_the_ones_that_are_read(
    tmp_path: Path, tensors: Tensors, expected_hash: str
) -> None:
    """A left-over file beside them is not."""
    folder = diffusers_folder(tmp_path, tensors)
    save(folder / "old.safetensors", {"x_embedder.weight": torch.zeros(4, 4)})
    index = json.loads(next(folder.glob("*.index.json")).read_text())
    assert "old.safetensors" not in index["weight_map"].values()
    assert store_of(folder).content_hash() == expected_hash
