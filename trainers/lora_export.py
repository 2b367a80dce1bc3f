"""LoRAs under the names of other programs, in another rank, and several as one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from .checks import require
from .flux import FINAL_MODULATION
from .flux_lora import Adapter, FluxLora, is_of_text, swapped_halves
from .lora_names import DIFFUSERS_OF, PARTS, block_zero, in_block, split_name
from .low_rank import LowRank, stacked

FORMATS = ("diffusers", "comfyui", "kohya")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_DIFFUSERS_PARTS = {"down": "lora_A.weight", "up": "lora_B.weight"}
_OTHER_PARTS = {"down": "lora_down.weight", "up": "lora_up.weight"}
_TEXT_PREFIXES = {
    "clip_l": {
        "diffusers": "text_encoder.",
        "comfyui": "text_encoders.clip_l.transformer.",
        "kohya": "lora_te1_",
    },
    "t5xxl": {
        "diffusers": "text_encoder_2.",
        "comfyui": "text_encoders.t5xxl.transformer.",
        "kohya": "lora_te3_",
    },
}
_NO_MAGNITUDES: Mapping[str, Tensor] = {}
_EXACT = (".alpha", ".dora_scale", ".lora_magnitude_vector")
"""One number, or one for each row: magnitudes change by less than a rounding of them."""
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def exported(lora: FluxLora, format: str) -> dict[str, Tensor]:
    """The tensors of a file of this format, one of `FORMATS`, with an alpha for each module.

    diffusers: `transformer.` and diffusers' names, `lora_A` / `lora_B`. comfyui:
    `diffusion_model.` and the original names, `lora_down` / `lora_up`. kohya: `lora_unet_` and the
    original names with underscores. The last two have fused matrices: the parts of one become a
    LoRA with a block-diagonal `lora_up`, whose rank is the sum of theirs, with zeros for parts
    that have none, and such a one is taken apart again, exactly.

    Raises:
        ValueError: if the format cannot hold what the LoRA is.
    """
    tensors: dict[str, Tensor] = {}
    modules = [*_modules(lora.adapters, format)]
    if format == "diffusers":
        for of_one_model in (modules, lora.text):
            _require_one_kind(of_one_model)
    for adapter in (*modules, *lora.text):
        tensors |= _spelled(adapter, format)
    if lora.rest:
        require(
            format == "comfyui",
            f"The format {format} cannot hold what this LoRA changes beside matrices, such as "
            f"'{next(iter(lora.rest))}'. Choose comfyui.",
        )
        tensors |= lora.rest
    return tensors


def rounded(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a file in another dtype; alphas and a DoRA's magnitudes stay as they are.

    Raises:
        ValueError: if a value is too large for `dtype`.
    """
    return {name: _cast(name, tensor, dtype) for name, tensor in tensors.items()}


def balanced(lora: FluxLora) -> FluxLora:
    """The same LoRA, fit to be rounded: a small difference of two large products, as a training
    with PiSSA or OLoRA writes it, becomes one small product. Other modules stay bit for bit."""
    return dataclasses.replace(
        lora,
        adapters=tuple(_balanced(adapter) for adapter in lora.adapters),
        text=tuple(_balanced(adapter) for adapter in lora.text),
    )


def resized(lora: FluxLora, rank: int) -> FluxLora:
    """Every module as the nearest LoRA of at most this rank (SVD); LoKr and LoHa become LoRAs.

    A fused matrix that was trained as parts is resized by its parts.
    """
    return dataclasses.replace(
        lora,
        adapters=tuple(_resized(adapter, rank) for adapter in lora.adapters),
        text=tuple(_resized(adapter, rank) for adapter in lora.text),
    )


def merged(loras: Sequence[tuple[FluxLora, float]], rank: int = 0) -> FluxLora:
    """The sum of LoRAs with their weights, exactly: its ranks are the sums of theirs. LoKrs, which
    no LoRA equals, are taken at `rank`.

    Raises:
        ValueError: if one is a DoRA or changes more than matrices, or a LoKr and no rank is given.
    """
    require(bool(loras), "There is no LoRA to merge: choose at least one file.")
    groups: dict[tuple[str, int, int], list[LowRank]] = {}
    for lora, weight in loras:
        require(
            not lora.rest,
            "A LoRA that also changes biases, norms or whole matrices cannot be merged: it has "
            f"'{next(iter(lora.rest), '')}'. Leave it out, or export it alone.",
        )
        plain = [_resized(a, rank) if a.kind == "lokr" else a for a in lora.adapters]
        for adapter in (*_modules(plain, "diffusers"), *lora.text):
            require(
                adapter.dora_scale is None,
                f"A DoRA cannot be merged with others: '{adapter.name}' has magnitudes, which "
                "depend on the model. Leave it out, or use Apply LoRA for each.",
            )
            key = (adapter.name, adapter.start, adapter.shape[0])
            groups.setdefault(key, []).append(
                adapter.low_rank(rank if adapter.kind == "lokr" else 0).times(weight)
            )
    sums = []
    for (name, start, num_rows), pieces in groups.items():
        sums.append(_lora(name, start, stacked([(0, piece) for piece in pieces], num_rows)))
    return FluxLora(
        adapters=tuple(adapter for adapter in sums if not is_of_text(adapter)),
        text=tuple(adapter for adapter in sums if is_of_text(adapter)),
        rest={},
    )


def share_kept(lora: FluxLora, smaller: FluxLora) -> float:
    """How much of the squared norm of what a LoRA adds is left, 0 to 1: `smaller` has the same
    modules, each the nearest of a smaller rank."""
    whole, kept = 0.0, 0.0
    pairs = zip(_all(lora), _all(smaller), strict=True)
    for adapter, nearest in pairs:
        kept += nearest.low_rank().squared_norm()
        whole += adapter.squared_norm()
    return kept / whole if whole else 1.0


def ranks(tensors: Mapping[str, Tensor]) -> tuple[int, str]:
    """How many modules a file has, and the ranks of its LoRAs, such as `4` or `4–32`."""
    names = {name: split_name(name) for name in tensors}
    found = sorted({tensors[name].shape[0] for name, split in names.items() if split[2] == "down"})
    span = "–".join(map(str, dict.fromkeys([*found[:1], *found[-1:]])))
    return len({module for module, _, _ in names.values()}), span or "?"


def ranks_of_parts(lora: FluxLora) -> list[int]:
    """The ranks of its plain LoRAs, each once and in their order, where every part of a fused
    matrix has its own.

    From the formats comfyui and kohya, diffusers (0.39, `get_peft_kwargs`) gives the alpha of the
    first module to all: with one rank that is right.
    """
    plain = [adapter for adapter in lora.adapters if _is_plain(adapter)]
    return sorted({len(module.parts["down"]) for module in _modules(plain, "diffusers")})


def _all(lora: FluxLora) -> tuple[Adapter, ...]:
    return (*lora.adapters, *lora.text)


def _require_one_kind(modules: Sequence[Adapter]) -> None:
    """diffusers (0.39) fails at a file in which only some modules are DoRAs."""
    plain = [module.name for module in modules if module.dora_scale is None]
    require(
        not plain or len(plain) == len(modules),
        "diffusers has no LoRA of which only some modules are DoRAs: "
        f"'{next(iter(plain), '')}' is none. Choose comfyui.",
    )


def _modules(adapters: Sequence[Adapter], format: str) -> Iterator[Adapter]:
    """One adapter for each module of FLUX in a file of this format; by its name and its rows one
    sees which."""
    matrices: dict[str, list[Adapter]] = {}
    for adapter in adapters:
        matrices.setdefault(adapter.name, []).append(adapter)
    for name, found in matrices.items():
        parts = PARTS.get(block_zero(name)[0])
        if parts is None:
            rows = [found[0].rows]
        elif format == "comfyui" and not all(_is_plain(adapter) for adapter in found):
            rows = [adapter.rows for adapter in found]  # ComfyUI reads diffusers' modules too
        else:
            width = found[0].shape[1]
            rows = [slice(start * width, stop * width) for _, start, stop in parts]
            if format != "diffusers":
                found += _empty_parts(name, found, rows)
                rows = [slice(0, rows[-1].stop)]
        yield from (module for part in rows if (module := _on_rows(name, found, part)))


def _empty_parts(name: str, adapters: Sequence[Adapter], rows: Sequence[slice]) -> list[Adapter]:
    """LoRAs of zeros for the parts of a fused matrix that have none, if others have their own.

    diffusers takes a fused LoRA apart only where every part has as many ranks as the others.
    """
    taken = [adapter.rows for adapter in adapters]
    if any(own not in rows for own in taken):
        return []
    products = [adapter.low_rank() for adapter in adapters]
    rank, scale = max(product.rank for product in products), products[0].scale
    down = torch.zeros(rank, adapters[0].shape[1])
    empty: list[Adapter] = []
    for part in rows:
        if part not in taken:
            up = torch.zeros(part.stop - part.start, rank)
            empty.append(_lora(name, part.start, LowRank(down=down, up=up, scale=scale)))
    return empty


def _on_rows(name: str, adapters: Sequence[Adapter], rows: slice) -> Adapter | None:
    """What several adapters of a matrix do to some rows of it, as one; None for nothing."""
    hits = [a for a in adapters if a.rows.start < rows.stop and a.rows.stop > rows.start]
    hits.sort(key=lambda adapter: adapter.start)  # a file's order is that of its names
    if len(hits) == 1 and hits[0].rows == rows:
        return hits[0]
    pieces, magnitudes = [], dict[str, list[Tensor]]()
    for adapter in hits:
        first, last = max(adapter.start, rows.start), min(adapter.rows.stop, rows.stop)
        own = slice(first - adapter.start, last - adapter.start)
        piece = adapter.low_rank()
        if len(piece.up) > own.stop - own.start:
            piece = piece.on_rows(own)
        if piece is not None:
            pieces.append((first - rows.start, piece))
        for which, magnitude in adapter.magnitudes.items():
            of_rows = [magnitude[own]] if magnitude.shape[1] == 1 else []
            magnitudes.setdefault(which, []).extend(of_rows)
    if not pieces:
        return None
    for found in magnitudes.values():
        require(
            sum(map(len, found)) == rows.stop - rows.start == sum(len(p.up) for _, p in pieces),
            f"The parts of '{name}' cannot become one module: magnitudes of a DoRA are there for "
            "some of its rows only, or for its columns. Choose another format, such as comfyui.",
        )
    product = stacked(pieces, rows.stop - rows.start)
    joined = {which: torch.cat(found) for which, found in magnitudes.items()}
    return _lora(name, rows.start, product, joined)


def _lora(
    name: str, start: int, product: LowRank, magnitudes: Mapping[str, Tensor] = _NO_MAGNITUDES
) -> Adapter:
    parts = {
        "down": product.down,
        "up": product.up,
        "alpha": torch.tensor(product.scale * product.rank),
        **magnitudes,
    }
    return Adapter(name=name, start=start, parts=parts)


def _is_plain(adapter: Adapter) -> bool:
    return adapter.kind == "lora" and adapter.dora_scale is None


def _resized(adapter: Adapter, rank: int) -> Adapter:
    product = adapter.low_rank(rank)
    return _lora(adapter.name, adapter.start, product, adapter.magnitudes)


def _balanced(adapter: Adapter) -> Adapter:
    if adapter.kind != "lora" or not (product := adapter.low_rank()).cancels:
        return adapter
    return _lora(adapter.name, adapter.start, product.balanced(), adapter.magnitudes)


def _spelled(adapter: Adapter, format: str) -> dict[str, Tensor]:
    """The tensors of one module."""
    is_diffusers = format == "diffusers"
    if adapter.kind == "lora" or is_diffusers:  # which knows no other kind
        adapter = _lora(adapter.name, adapter.start, adapter.low_rank(), adapter.magnitudes)
    parts = dict(adapter.parts)
    if is_diffusers and "magnitude" in parts:
        parts["dora_scale"] = parts.pop("magnitude")
    if is_diffusers and adapter.name == FINAL_MODULATION[1]:
        parts = swapped_halves(parts)
    module = _text_module(adapter.name, format) or _flux_module(adapter, format)
    return dict(_spelled_part(module, part, tensor, format) for part, tensor in parts.items())


def _spelled_part(module: str, part: str, tensor: Tensor, format: str) -> tuple[str, Tensor]:
    if format == "diffusers" and part == "dora_scale":
        require(
            tensor.shape[1] == 1,
            f"diffusers has no DoRA with magnitudes of columns, as '{module}' has. Choose comfyui.",
        )
        return f"{module}.lora_magnitude_vector", tensor.flatten()
    if part == "magnitude":
        return f"{module}.lora_magnitude_vector", tensor.flatten()
    names = _DIFFUSERS_PARTS if format == "diffusers" else _OTHER_PARTS
    return f"{module}.{names.get(part, part)}", tensor


def _flux_module(adapter: Adapter, format: str) -> str:
    zero, index = block_zero(adapter.name)
    if format == "diffusers":
        return f"transformer.{in_block(_diffusers_name(adapter, zero), index)}"
    if zero in PARTS and adapter.shape[0] != PARTS[zero][-1][2] * adapter.shape[1]:
        return f"transformer.{in_block(_diffusers_name(adapter, zero), index)}"
    flat = adapter.name.replace(".", "_")
    return f"lora_unet_{flat}" if format == "kohya" else f"diffusion_model.{adapter.name}"


def _diffusers_name(adapter: Adapter, zero: str) -> str:
    width = adapter.shape[1]
    parts = {start * width: name for name, start, _ in PARTS.get(zero, ())}
    return parts[adapter.start] if parts else DIFFUSERS_OF[zero]


def _text_module(name: str, format: str) -> str:
    """A text encoder's module in a format; empty for one of FLUX."""
    encoder, _, module = name.partition(".")
    prefixes = _TEXT_PREFIXES.get(encoder)
    if prefixes is None:
        return ""
    return prefixes[format] + (module.replace(".", "_") if format == "kohya" else module)


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if name.endswith(_EXACT) or not tensor.is_floating_point():
        return tensor
    cast = tensor.to(dtype)
    require(
        bool(torch.isfinite(cast.float()).all()),
        f"'{name}' holds {tensor.abs().max():.3g}, which is too large for {_DTYPE_NAMES[dtype]}. "
        "Choose bf16 or fp32.",
    )
    return cast
