"""How LoRA files of other trainers call FLUX's modules, and the names that ComfyUI reads.

Knows names only. Facts: the trainers' own savers (kohya's sd-scripts, diffusers, ai-toolkit,
SimpleTuner, OneTrainer, x-flux), and ComfyUI's `comfy/lora.py`.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping

from torch import Tensor

from .flux import FINAL_MODULATION, HEAD_SIZE, FluxConfig, linear_sources, norm_sources

SINGLE_QKV = "single_blocks.0.linear1_qkv"
"""ComfyUI's name for the first three parts of `linear1`, which XLabs trains alone."""

_ENDINGS = tuple(
    (part, re.compile(rf"(?:{pattern})$"))
    for part, pattern in (
        ("down", r"\.lora_(?:A|down)(?:\.\w+)?\.weight|\.lora_A|[._]lora\.down\.weight"),
        ("down", r"\.lora_linear_layer\.down\.weight|(?<=lora[12])\.down\.weight"),
        ("up", r"\.lora_(?:B|up)(?:\.\w+)?\.weight|\.lora_B|[._]lora\.up\.weight"),
        ("up", r"\.lora_linear_layer\.up\.weight|(?<=lora[12])\.up\.weight"),
        ("mid", r"\.lora_mid\.weight"),
        ("dora_scale", r"\.dora_scale|\.lora_magnitude_vector(?:\.\w+)*"),
        ("", r"\.(?:alpha|diff|diff_b|set_weight|reshape_weight|w_norm|b_norm)"),
        ("", r"\.(?:lokr_(?:w1|w2|t2)(?:_a|_b)?|hada_(?:w1|w2)_[ab]|hada_t[12])"),
        ("", r"\.(?:oft_blocks|rescale)"),
        ("bias", r"\.lora_B(?:\.\w+)?\.bias"),
    )
)
_PREFIXES = re.compile(
    r"(?:transformer\.|diffusion_model\.|base_model\.model\.|model\.|unet\.|module\.|_orig_mod\.|"
    r"lora_unet[_.]|lora_transformer[_.]|lycoris[_.])*_*"
)
_BLOCK = re.compile(
    r"(transformer_blocks|single_transformer_blocks|double_blocks|single_blocks)([._])(\d+)\2(.+)"
)
_XLABS = {
    "double_blocks.0.processor.qkv_lora1": "double_blocks.0.img_attn.qkv",
    "double_blocks.0.processor.qkv_lora2": "double_blocks.0.txt_attn.qkv",
    "double_blocks.0.processor.proj_lora1": "double_blocks.0.img_attn.proj",
    "double_blocks.0.processor.proj_lora2": "double_blocks.0.txt_attn.proj",
    "single_blocks.0.processor.qkv": SINGLE_QKV,
    "single_blocks.0.processor.proj": "single_blocks.0.linear2",
}
_CLIP = re.compile(
    r"(?:text_encoders\.clip_l\.transformer\.|text_encoder\.|clip_l\.|lora_te1?[._])"
    r"(?:text_model[._])?encoder[._]layers[._](\d+)[._]"
    r"(?:(mlp)[._](fc[12])|(self_attn)[._]((?:q|k|v|out)_proj))"
)
_T5 = re.compile(
    r"(?:text_encoders\.t5xxl\.transformer\.|text_encoder_2\.|t5\.|lora_te[23][._])"
    r"encoder[._]block[._](\d+)[._]layer[._]([01])[._]"
    r"(SelfAttention|DenseReluDense)[._](q|k|v|o|wi_0|wi_1|wo)"
)
_TEXT_ENCODER = re.compile(r"lora_te\d?[_.]|text_encoders?(?:_\d)?\.|clip_l\.|t5\.")


def _one_block() -> FluxConfig:
    return FluxConfig(
        hidden_size=HEAD_SIZE,
        depth=1,
        depth_single=1,
        in_channels=64,
        context_dim=1,
        vector_dim=1,
        guidance=True,
    )


_SOURCES = linear_sources(_one_block())
_NORMS = norm_sources(_one_block())
DIFFUSERS = frozenset([*_SOURCES, *_NORMS, FINAL_MODULATION[0]])
"""diffusers' names of FLUX's modules; those of block 0 stand for all blocks."""
ORIGINAL = frozenset(
    [*(s.name for s in _SOURCES.values()), *_NORMS.values(), FINAL_MODULATION[1], SINGLE_QKV]
)
"""The same in the original files."""


def _parts() -> dict[str, tuple[tuple[str, int, int], ...]]:
    parts: dict[str, list[tuple[str, int, int]]] = {}
    for name, source in _SOURCES.items():
        if source.rows.stop is not None:
            start, stop = ((row or 0) // HEAD_SIZE for row in (source.rows.start, source.rows.stop))
            parts.setdefault(source.name, []).append((name, start, stop))
    return {name: tuple(found) for name, found in parts.items()}


PARTS = _parts()
"""The fused matrices of block 0 -> diffusers' modules that they hold: name, first row and the row
after the last, in units of the model's width."""
DIFFUSERS_OF = {
    **{source.name: name for name, source in _SOURCES.items() if source.name not in PARTS},
    FINAL_MODULATION[1]: FINAL_MODULATION[0],
}
"""The original name of block 0 -> diffusers', of all other matrices."""


def _spellings() -> dict[str, str]:
    """Every spelling of a module, block 0 for all, without what stands before it -> its name."""
    names = {name: name for name in DIFFUSERS | ORIGINAL} | _XLABS
    names["img_in.proj"] = "img_in"  # OneTrainer
    for matrix, parts in PARTS.items():  # OneTrainer numbers the parts of fused matrices
        names |= {f"{matrix}.{number}": part for number, (part, _, _) in enumerate(parts)}
    return {name.replace(".", "_"): known for name, known in names.items()} | names


_SPELLINGS = _spellings()


def comfy_names(
    tensors: Mapping[str, Tensor], known: Container[str] = frozenset()
) -> dict[str, Tensor]:
    """The same tensors under names that ComfyUI reads for FLUX; what it reads stays untouched.

    `known` are the modules that ComfyUI reads for the model at hand: other kinds of models have
    modules called as FLUX's are. Unknown names stay as they are. peft's magnitudes [out] of
    a DoRA become a `dora_scale` [out, 1], unless there is one beside them. A control LoRA of Black
    Forest Labs is left to ComfyUI, which knows it by its names.
    """
    if "img_in.lora_A.weight" in tensors and "single_blocks.0.norm.key_norm.scale" in tensors:
        return dict(tensors)
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module, ending, part = split_name(name)
        if is_second_magnitude(name, tensors):
            continue
        if part == "dora_scale" and tensor.dim() == 1:
            tensor = tensor.unsqueeze(1)
        renamed[read_module(module, known) + _comfy_ending(ending)] = tensor
    return renamed


def is_second_magnitude(name: str, tensors: Container[str]) -> bool:
    """Whether a tensor of a DoRA is the magnitude as peft reads it, beside a `dora_scale` of the
    same module as ComfyUI reads it: they divide by other norms, so our files have both."""
    module, ending, _ = split_name(name)
    is_pefts = ending.startswith(".lora_magnitude_vector")
    return is_pefts and f"{module}.dora_scale" in tensors


def read_module(module: str, known: Container[str]) -> str:
    """A module's name in `comfy_names`."""
    if module in known:
        return module
    # Attention of Stable Diffusion, which diffusers has written without its processors since 2023.
    of_processor = module[_prefix_length(module) :].replace(".to_", ".processor.to_")
    of_processor = of_processor.replace(".to_out.0", ".to_out")
    return of_processor if of_processor in known else _comfy_module(module)


def split_name(name: str) -> tuple[str, str, str]:
    """A tensor's module, the rest of its name, and what it is: `down`, `up`, `mid`, `dora_scale`,
    `bias` (of the up matrix), or the rest without its dot (`alpha`, `lokr_w1`, …). The rest is
    empty if it is no part of a LoRA."""
    for part, pattern in _ENDINGS:
        if match := pattern.search(name):
            ending = match.group()
            return name[: match.start()], ending, part or ending[1:]
    return name, "", ""


def flux_module(module: str) -> str | None:
    """The dotted name, diffusers' or the original one, of a FLUX module in any spelling; None for
    anything else."""
    bare = module[_prefix_length(module) :].rstrip("_")
    block = _BLOCK.fullmatch(bare)
    if block is None:
        return _SPELLINGS.get(bare)
    kind, dot, index, leaf = block.groups()
    known = _SPELLINGS.get(f"{kind}{dot}0{dot}{leaf}")
    return known and in_block(known, index)


def text_module(module: str) -> tuple[str, str] | None:
    """The encoder, `clip_l` or `t5xxl`, and the dotted name of a module of it in any spelling; None
    for anything else."""
    if match := _CLIP.fullmatch(module):
        layer, *parts = (group for group in match.groups() if group)
        return "clip_l", f"text_model.encoder.layers.{layer}.{'.'.join(parts)}"
    if match := _T5.fullmatch(module):
        block, layer, *parts = match.groups()
        return "t5xxl", f"encoder.block.{block}.layer.{layer}.{'.'.join(parts)}"
    return None


def block_zero(known: str) -> tuple[str, str]:
    """A module's name in block 0, and the number of its block; empty for one that is in none."""
    block = _BLOCK.fullmatch(known)
    if block is None:
        return known, ""
    kind, _, index, leaf = block.groups()
    return f"{kind}.0.{leaf}", index


def in_block(name: str, index: str) -> str:
    """The other way round."""
    return name.replace(".0.", f".{index}.", 1) if index else name


def is_text_encoder(module: str) -> bool:
    """Whether a module belongs to CLIP-L or T5, in any spelling."""
    return _TEXT_ENCODER.match(module) is not None


def _prefix_length(module: str) -> int:
    match = _PREFIXES.match(module)
    return match.end() if match else 0


def _comfy_module(module: str) -> str:
    if text := text_module(module):
        encoder, name = text
        read = _comfy_text_spellings(encoder, name)
        return module if module in read else read[0]
    if is_text_encoder(module) or (known := flux_module(module)) is None:
        return module
    read = _comfy_spellings(known)
    return module if module in read else read[0]


def _comfy_text_spellings(encoder: str, name: str) -> tuple[str, ...]:
    """What ComfyUI reads for a module of a text encoder; OneTrainer calls T5 te2."""
    flat, dotted = name.replace(".", "_"), f"text_encoders.{encoder}.transformer.{name}"
    if encoder == "clip_l":
        return (dotted, f"lora_te1_{flat}", f"lora_te_{flat}", f"text_encoder.{name}")
    return (dotted, f"lora_te3_{flat}", f"lora_te2_{flat}")


def _comfy_spellings(known: str) -> tuple[str, ...]:
    """What ComfyUI reads for a module, its own way first."""
    flat = known.replace(".", "_")
    if _is_original(known):
        return (f"diffusion_model.{known}", f"lora_unet_{flat}")
    return (f"transformer.{known}", f"lora_transformer_{flat}", f"lycoris_{flat}")


def _is_original(known: str) -> bool:
    return block_zero(known)[0] in ORIGINAL


def _comfy_ending(ending: str) -> str:
    if ending.startswith(".lora_magnitude_vector"):
        return ".dora_scale"
    if ending in (".down.weight", ".up.weight", "_lora.down.weight", "_lora.up.weight"):
        return f".lora_{ending.removeprefix('_lora')[1:]}"
    return re.sub(r"^(\.lora_(?:A|B|down|up))\.\w+\.weight$", r"\1.weight", ending)
