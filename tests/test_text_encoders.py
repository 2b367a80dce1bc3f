"""Files of CLIP-L and T5-XXL into one store: names, formats, order, copies and damage."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import text_files
import torch
from atelier.trainers.formats import FORMATS
from atelier.trainers.packed_copy import PackedCopies
from atelier.trainers.text_encoders import load_text_encoders
from dense import ROUND_TRIPS
from safetensors.torch import save_file
from text_files import is_packed, random_tensors, scaled_fp8, t5_shapes, write_pair
from torch import Tensor

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def clip() -> Tensors:
    return text_files.small_clip()


@pytest.fixture(scope="module")
def t5() -> Tensors:
    return text_files.small_t5()


@pytest.fixture(scope="module")
def pair(clip: Tensors, t5: Tensors, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_pair(tmp_path_factory.mktemp("pair"), clip, t5)


@pytest.mark.parametrize("format", FORMATS)
def test_a_store_holds_the_tensors_of_both_files(
    pair: tuple[Path, Path], clip: Tensors, t5: Tensors, format: str
) -> None:
    store = load_text_encoders(*pair, format=format).store
    expected = {f"clip_l.{name}": tensor.float() for name, tensor in clip.items()}
    expected["clip_l.text_projection.weight"] = torch.eye(128)  # a file without it
    for name, tensor in t5.items():
        kept = format if is_packed(name) else "bf16"
        expected[f"t5xxl.{name}"] = ROUND_TRIPS[kept](tensor).float()
    found = {name: weight.dequantize(torch.float32) for name, weight in store.packed.items()}
    found |= {name: tensor.float() for name, tensor in store.plain.items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_files_may_be_given_in_either_order(pair: tuple[Path, Path]) -> None:
    right, reversed_ = (load_text_encoders(*paths, format="nf4") for paths in (pair, pair[::-1]))
    assert right.store.content_hash() == reversed_.store.content_hash()
    assert (right.identity, right.t5xxl) == (reversed_.identity, reversed_.t5xxl)


def test_sizes_are_read_from_the_shapes(pair: tuple[Path, Path]) -> None:
    loaded = load_text_encoders(*pair, format="bf16")
    sizes = (loaded.t5xxl.width, loaded.t5xxl.feed_forward, loaded.t5xxl.depth)
    assert (*sizes, loaded.t5xxl.num_heads, loaded.t5xxl.head_size) == (128, 192, 2, 3, 64)
    clip_l = loaded.clip_l
    sizes = (clip_l.width, clip_l.feed_forward, clip_l.depth, clip_l.num_positions)
    assert (*sizes, clip_l.num_heads) == (128, 512, 2, 77, 2)


def test_names_as_transformers_5_saves_them_are_known(
    pair: tuple[Path, Path], tmp_path: Path, clip: Tensors, t5: Tensors
) -> None:
    renamed = {name.removeprefix("text_model."): tensor for name, tensor in clip.items()}
    assert "final_layer_norm.weight" in renamed
    saved = write_pair(tmp_path, renamed, t5)
    stores = [load_text_encoders(*paths, format="bf16").store for paths in (pair, saved)]
    assert stores[0].content_hash() == stores[1].content_hash()


def test_a_projection_in_the_file_is_kept(tmp_path: Path, clip: Tensors, t5: Tensors) -> None:
    projection = torch.randn(128, 128).to(torch.bfloat16)
    pair = write_pair(tmp_path, {**clip, "text_projection.weight": projection}, t5)
    store = load_text_encoders(*pair, format="bf16").store
    assert torch.equal(store.packed["clip_l.text_projection.weight"].data, projection)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2], ids=str
)
def test_cast_files_give_the_store_of_the_cast_values(
    tmp_path: Path, clip: Tensors, t5: Tensors, dtype: torch.dtype
) -> None:
    cast = [{name: tensor.to(dtype) for name, tensor in file.items()} for file in (clip, t5)]
    plain = [{name: tensor.to(torch.bfloat16) for name, tensor in file.items()} for file in cast]
    found, expected = (
        load_text_encoders(*write_pair(tmp_path / str(index), *files), format="bf16").store
        for index, files in enumerate((cast, plain))
    )
    assert found.content_hash() == expected.content_hash()


@pytest.mark.parametrize("end", ["scale_weight", "weight_scale"])
def test_fp8_scales_are_multiplied_in(tmp_path: Path, clip: Tensors, t5: Tensors, end: str) -> None:
    scaled = scaled_fp8(t5, end)
    pair = write_pair(tmp_path, clip, scaled)
    store = load_text_encoders(*pair, format="bf16").store
    for name in filter(is_packed, t5):
        scale = scaled[name.removesuffix("weight") + end]
        expected = (scaled[name].float() * scale).to(torch.bfloat16)
        assert torch.equal(store.packed[f"t5xxl.{name}"].data, expected)


@pytest.mark.slow
def test_a_scaled_file_of_true_width_takes_what_the_node_says(
    tmp_path: Path, clip: Tensors
) -> None:
    """One block of T5-XXL, of 24: the node promises 3.0 GB for both encoders in nf4."""
    t5 = scaled_fp8(random_tensors(t5_shapes(depth=1)))
    loaded = load_text_encoders(*write_pair(tmp_path, clip, t5), format="nf4")
    sizes = loaded.t5xxl
    assert (sizes.width, sizes.feed_forward, sizes.num_heads) == (4096, 10240, 64)
    blocks = {n: w for n, w in loaded.store.packed.items() if n.startswith("t5xxl.encoder.block.")}
    assert {name.removeprefix("t5xxl.") for name in blocks} == {*filter(is_packed, t5)}
    plain = sum(t.nbytes for n, t in loaded.store.plain.items() if n.startswith("t5xxl."))
    clip_l = 2 * sum(
        torch.Size(s).numel() for s in text_files.clip_shapes(width=768, depth=12).values()
    )
    total = 24 * sum(weight.num_bytes for weight in blocks.values()) + plain + clip_l
    assert round(total / 1e9, 1) == 3.0
    name = "encoder.block.0.layer.1.DenseReluDense.wo.weight"
    weight = t5[name].float() * t5[name.removesuffix("weight") + "scale_weight"]
    rows = weight[:64].to(torch.bfloat16)
    found = blocks[f"t5xxl.{name}"].dequantize(torch.float32, slice(0, 64))
    assert torch.equal(found, ROUND_TRIPS["nf4"](rows))


def test_the_second_load_reads_the_quantized_copy_of_t5(
    tmp_path: Path, clip: Tensors, t5: Tensors
) -> None:
    """Bytes are zeroed in between that the identity of the file does not see."""
    pair = write_pair(tmp_path, clip, t5)
    copies = PackedCopies(tmp_path / "packed", min_source_bytes=0)
    first = load_text_encoders(*pair, format="nf4", copies=copies)
    (copy,) = (tmp_path / "packed").iterdir()
    assert copy.name.startswith("t5xxl_fp16-")
    with pair[1].open("rb+") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        place = header["encoder.block.1.layer.1.DenseReluDense.wo.weight"]["data_offsets"][0]
        file.seek(8 + length + place + 5000)
        file.write(bytes(1000))
    second = load_text_encoders(*pair, format="nf4", copies=copies)
    assert second.store.content_hash() == first.store.content_hash()
    without = load_text_encoders(*pair, format="nf4")
    assert without.identity == first.identity
    assert without.store.content_hash() != first.store.content_hash()


def test_the_identity_follows_both_files(tmp_path: Path, clip: Tensors, t5: Tensors) -> None:
    norm = "text_model.encoder.layers.1.mlp.fc1.weight"
    wo = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    files = [
        (clip, t5),
        ({**clip, norm: clip[norm] * 2}, t5),
        (clip, {**t5, wo: t5[wo] * 2}),
    ]
    identities = {
        load_text_encoders(*write_pair(tmp_path, *pair), format="nf4").identity for pair in files
    }
    assert len(identities) == 3


def test_progress_ends_at_the_number_of_t5s_tensors(pair: tuple[Path, Path], t5: Tensors) -> None:
    seen: list[tuple[int, int]] = []
    load_text_encoders(
        *pair, format="nf4", on_progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(done, len(t5)) for done in range(1, len(t5) + 1)]


def cut(clip: Path, t5: Path) -> tuple[Path, Path]:
    t5.write_bytes(t5.read_bytes()[:-1])
    return clip, t5


def pickled(clip: Path, t5: Path) -> tuple[Path, Path]:
    path = t5.with_suffix(".bin")
    torch.save({"shared.weight": torch.zeros(4, 4)}, path)
    return clip, path


def twice_t5(clip: Path, t5: Path) -> tuple[Path, Path]:
    return t5, t5


def twice_clip(clip: Path, t5: Path) -> tuple[Path, Path]:
    return clip, clip


def without(name: str) -> Callable[[Path, Path], tuple[Path, Path]]:
    def write(clip: Path, t5: Path) -> tuple[Path, Path]:
        clip_tensors, t5_tensors = text_files.small_clip(), text_files.small_t5()
        for tensors in (clip_tensors, t5_tensors):
            tensors.pop(name, None)
        return write_pair(clip.parent, clip_tensors, t5_tensors)

    return write


def clip_g(clip: Path, t5: Path) -> tuple[Path, Path]:
    """SDXL's second encoder, cut to few blocks."""
    shapes = text_files.clip_shapes(width=1280, depth=1)
    small = {name: torch.zeros(1, dtype=torch.uint8).expand(s).bool() for name, s in shapes.items()}
    save_file({name: t.to(torch.float8_e4m3fn) for name, t in small.items()}, clip)
    return clip, t5


def umt5(clip: Path, t5: Path) -> tuple[Path, Path]:
    """WAN's encoder knows more tokens."""
    tensors = text_files.small_t5()
    tensors["shared.weight"] = torch.zeros(256384, 128, dtype=torch.bfloat16)
    save_file(tensors, t5)
    return clip, t5


def odd_width(clip: Path, t5: Path) -> tuple[Path, Path]:
    shapes = text_files.t5_shapes(**{**text_files.SMALL_T5, "feed_forward": 100})
    save_file(random_tensors(shapes), t5)
    return clip, t5


WRONG = [
    (cut, "The file 't5xxl_fp16.safetensors' is cut short"),
    (pickled, "'t5xxl_fp16.bin' is a pickle"),
    (
        twice_t5,
        "'t5xxl_fp16.safetensors' is not a whole CLIP-L text encoder: it has no "
        "'text_model.embeddings.token_embedding.weight'",
    ),
    (twice_clip, "'clip_l.safetensors' is not a whole T5-XXL text encoder: it has no 'encoder."),
    (
        without("encoder.block.1.layer.0.SelfAttention.k.weight"),
        "'encoder.block.1.layer.0.SelfAttention.k.weight'. Choose a file such as t5xxl_fp16.safe",
    ),
    (without("shared.weight"), "not a whole T5-XXL text encoder: it has no 'shared.weight'"),
    (
        without("text_model.encoder.layers.0.mlp.fc2.bias"),
        "not a whole CLIP-L text encoder: it has no 'text_model.encoder.layers.0.mlp.fc2.bias'",
    ),
    (clip_g, "'clip_l.safetensors' is another CLIP than CLIP-L: its width is 1280, not 768."),
    (umt5, "'t5xxl_fp16.safetensors' is another T5 than T5-XXL: it knows 256384 tokens, not 32128"),
    (odd_width, "A weight of 100 columns cannot be stored in nf4"),
]


@pytest.mark.parametrize(("write", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_a_wrong_file_is_one_sentence(
    tmp_path: Path, clip: Tensors, t5: Tensors, write: Callable, message: str
) -> None:
    paths = write(*write_pair(tmp_path, clip, t5))
    copies = PackedCopies(tmp_path / "packed", min_source_bytes=0)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_text_encoders(*paths, format="nf4", copies=copies)
    assert not (tmp_path / "packed").exists()


def test_an_unknown_format_is_refused(pair: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match="Unknown format 'nf5'"):
        load_text_encoders(*pair, format="nf5")
