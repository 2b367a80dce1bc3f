"""FLUX's two text encoders, CLIP-L and T5-XXL: their names, their sizes, both files in one store.

The names are those of the files, with `clip_l.` or `t5xxl.` in front.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from .load import load_store, require_format
from .packed_copy import CopyKey, PackedCopies
from .packed_weight import PackedWeight
from .store import WeightStore
from .tensor_files import TensorFiles, model_files

T5_VOCABULARY = 32128
CLIP_L_WIDTH = 768
_CLIP_HEAD_SIZE = 64
"""Of every CLIP of OpenAI; a file's shapes do not tell it."""
_T5_MARK = "encoder.block.0.layer.0.SelfAttention.q.weight"
_T5_BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
_T5_LINEARS = (
    *(f"layer.0.SelfAttention.{part}" for part in "qkvo"),
    *(f"layer.1.DenseReluDense.{part}" for part in ("wi_0", "wi_1", "wo")),
)
_T5_NORMS = ("layer.0.layer_norm", "layer.1.layer_norm")
_CLIP_LINEARS = (
    *(f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")),
    *("mlp.fc1", "mlp.fc2"),
)
_CLIP_NORMS = ("layer_norm1", "layer_norm2")
_ENDS = ("weight", "bias")
_CLIP_EMBEDDINGS = "text_model.embeddings"
_CLIP_PROJECTION = "text_projection.weight"


@dataclass(frozen=True, kw_only=True)
class ClipSizes:
    """The numbers of a CLIP text encoder, read from the shapes in its file."""

    width: int
    feed_forward: int
    depth: int
    num_positions: int

    @property
    def num_heads(self) -> int:
        return max(1, self.width // _CLIP_HEAD_SIZE)

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> ClipSizes:
        num_positions, width = shapes[f"{_CLIP_EMBEDDINGS}.position_embedding.weight"]
        return cls(
            width=width,
            feed_forward=shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
            depth=_count(shapes, "text_model.encoder.layers."),
            num_positions=num_positions,
        )


@dataclass(frozen=True, kw_only=True)
class T5Sizes:
    """The numbers of a T5 encoder, read from the shapes in its file."""

    width: int
    feed_forward: int
    depth: int
    num_heads: int
    head_size: int

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> T5Sizes:
        num_heads = shapes[_T5_BIAS][1]
        return cls(
            width=shapes["shared.weight"][1],
            feed_forward=shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0],
            depth=_count(shapes, "encoder.block."),
            num_heads=num_heads,
            head_size=shapes[_T5_MARK][0] // num_heads,
        )


@dataclass(frozen=True, kw_only=True)
class LoadedTextEncoders:
    """Both text encoders in memory."""

    store: WeightStore
    clip_l: ClipSizes
    t5xxl: T5Sizes
    identity: str
    format: str


def load_text_encoders(
    clip_l: str | Path,
    t5xxl: str | Path,
    *,
    format: str,
    quantize_on: torch.device | str = "cpu",
    copies: PackedCopies | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> LoadedTextEncoders:
    """Read both files, in either order, into one store on the CPU.

    The matrices of T5's blocks are packed in `format`. All else stays bf16: embeddings, norms, and
    CLIP-L, whose blocks are 2% of both and whose one vector steers every block of FLUX.

    Args:
        copies: where T5 is kept once it is quantized, so that the next load only reads it.

    Raises:
        ValueError: if the format is unknown, or a file is damaged, is another text encoder, or
            lacks tensors.
    """
    require_format(format)
    clip_path, t5_path = Path(clip_l), Path(t5xxl)
    clip_files, t5_files = (TensorFiles(model_files(path)) for path in (clip_path, t5_path))
    if _T5_MARK in clip_files:
        clip_path, t5_path, clip_files, t5_files = t5_path, clip_path, t5_files, clip_files
    clip_formats = _clip_l_formats(clip_path, clip_files.shapes)
    t5_formats = _t5xxl_formats(t5_path, t5_files.shapes, format)
    clip_key = CopyKey(clip_path, clip_files.identity(), "bf16")
    t5_key = CopyKey(t5_path, t5_files.identity(), format)
    clip_store = load_store(clip_files, clip_formats, clip_key, num_bytes=clip_files.num_bytes)
    if _CLIP_PROJECTION not in clip_files:  # FLUX does not use it, and most files lack it
        projection = torch.eye(ClipSizes.from_shapes(clip_files.shapes).width)
        clip_store.packed[_CLIP_PROJECTION] = PackedWeight.pack(projection, "bf16")
    t5_store = load_store(
        t5_files,
        t5_formats,
        t5_key,
        num_bytes=t5_files.num_bytes,
        quantize_on=quantize_on,
        copies=copies,
        on_progress=on_progress,
    )
    return LoadedTextEncoders(
        store=_joined({"clip_l": clip_store, "t5xxl": t5_store}),
        clip_l=ClipSizes.from_shapes(clip_files.shapes),
        t5xxl=T5Sizes.from_shapes(t5_files.shapes),
        identity=f"{clip_key.identity} {t5_key.identity}",
        format=format,
    )


def _joined(stores: dict[str, WeightStore]) -> WeightStore:
    packed, plain = {}, {}
    for part, store in stores.items():
        packed |= {f"{part}.{name}": weight for name, weight in store.packed.items()}
        plain |= {f"{part}.{name}": tensor for name, tensor in store.plain.items()}
    return WeightStore(packed, plain)


_Shapes = Mapping[str, tuple[int, ...]]


def _clip_l_formats(path: Path, shapes: _Shapes) -> dict[str, str | None]:
    """What each tensor of CLIP-L is kept in, by its name in the file."""
    formats: dict[str, str | None] = {
        f"{_CLIP_EMBEDDINGS}.{kind}_embedding.weight": None for kind in ("token", "position")
    }
    for index in range(max(1, _count(shapes, "text_model.encoder.layers."))):
        block = f"text_model.encoder.layers.{index}"
        formats |= {f"{block}.{name}.weight": "bf16" for name in _CLIP_LINEARS}
        formats |= {f"{block}.{name}.bias": None for name in _CLIP_LINEARS}
        formats |= {f"{block}.{name}.{end}": None for name in _CLIP_NORMS for end in _ENDS}
    formats |= {f"text_model.final_layer_norm.{end}": None for end in _ENDS}
    _require(path, shapes, formats, "CLIP-L", "clip_l.safetensors")
    width = ClipSizes.from_shapes(shapes).width
    if width > CLIP_L_WIDTH:
        raise ValueError(
            f"'{path.name}' is another CLIP than CLIP-L: its width is {width}, not {CLIP_L_WIDTH}. "
            "Choose a file such as clip_l.safetensors."
        )
    return formats | ({_CLIP_PROJECTION: "bf16"} if _CLIP_PROJECTION in shapes else {})


def _t5xxl_formats(path: Path, shapes: _Shapes, format: str) -> dict[str, str | None]:
    """What each tensor of T5-XXL is kept in, by its name in the file."""
    formats: dict[str, str | None] = {_T5_MARK: format, "shared.weight": None, _T5_BIAS: None}
    for index in range(max(1, _count(shapes, "encoder.block."))):
        block = f"encoder.block.{index}"
        formats |= {f"{block}.{name}.weight": format for name in _T5_LINEARS}
        formats |= {f"{block}.{name}.weight": None for name in _T5_NORMS}
    formats["encoder.final_layer_norm.weight"] = None
    _require(path, shapes, formats, "T5-XXL", "t5xxl_fp16.safetensors")
    vocabulary = shapes["shared.weight"][0]
    if vocabulary != T5_VOCABULARY:
        raise ValueError(
            f"'{path.name}' is another T5 than T5-XXL: it knows {vocabulary} tokens, not "
            f"{T5_VOCABULARY}. Choose a file such as t5xxl_fp16.safetensors."
        )
    return formats


def _require(path: Path, shapes: _Shapes, names: Iterable[str], kind: str, example: str) -> None:
    missing = next((name for name in names if name not in shapes), None)
    if missing is not None:
        raise ValueError(
            f"'{path.name}' is not a whole {kind} text encoder: it has no '{missing}'. "
            f"Choose a file such as {example}, and download it again if it is one."
        )


def _count(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in shapes if name.startswith(prefix)})
