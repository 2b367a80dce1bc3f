"""Which layers of a FLUX learn, with which rank, and how many numbers that is."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

from .block_weights import Pattern
from .checks import require
from .flux import FINAL_MODULATION, FluxConfig, empty_transformer, linear_sources
from .lora_names import DIFFUSERS_OF, PARTS, block_zero, in_block
from .lora_settings import LORA_TARGETS, LoraSettings
from .lora_start import read_start
from .lycoris import lokr_shapes

FLUX_DEV = FluxConfig(
    hidden_size=3072,
    depth=19,
    depth_single=38,
    in_channels=64,
    context_dim=4096,
    vector_dim=768,
    guidance=True,
)
_ORIGINAL = {part: matrix for matrix, parts in PARTS.items() for part, _, _ in parts} | {
    diffusers: matrix for matrix, diffusers in DIFFUSERS_OF.items()
}

_NAMES = {
    ("lora", False): "LoRA",
    ("lora", True): "DoRA",
    ("lokr", False): "LoKr",
    ("loha", False): "LoHa",
}


def learning_ranks(names: Iterable[str], settings: LoraSettings) -> dict[str, int]:
    """The layers that learn, of Linears with these diffusers names and in their order, and their
    ranks.

    Raises:
        ValueError: if a pattern matches nothing, or the file to start from is not of this model.
    """
    names = list(names)
    if settings.start_from:
        return _of_file(names, settings)
    in_blocks = [name for name in names if "blocks." in name]
    learning = _in_chosen_blocks(_chosen(in_blocks, settings), in_blocks, settings)
    ranks = dict.fromkeys(learning, settings.rank)
    for pattern, rank in settings.ranks:
        found = [name for name in learning if _matches(pattern, name)]
        require(
            bool(found),
            f"The pattern '{pattern.text}' of rank_patterns matches no layer that learns. Layers "
            f"are called such as {learning[0]}.",
        )
        ranks |= dict.fromkeys(found, rank)
    return ranks


def _of_file(names: list[str], settings: LoraSettings) -> dict[str, int]:
    ranks = read_start(settings).ranks
    unknown = sorted(ranks.keys() - set(names))
    require(
        not unknown,
        f"The LoRA to start from has {len(unknown)} layers that this model has not, such as "
        f"'{(unknown or [''])[0]}'. Choose a LoRA that was trained on a model of this size.",
    )
    return {name: ranks[name] for name in names if name in ranks}


def _chosen(names: list[str], settings: LoraSettings) -> list[str]:
    if patterns := settings.layer_patterns:
        for pattern in patterns:
            require(
                any(_matches(pattern, name) for name in names),
                f"The pattern '{pattern.text}' matches no layer of this model's blocks. Layers are "
                f"called such as {_sample(names)}.",
            )
        return [n for n in names if any(_matches(pattern, n) for pattern in patterns)]
    ends = [f".{target}" for target in LORA_TARGETS[settings.targets]]
    for end in ends:
        require(
            any(f".{name}".endswith(end) for name in names),
            f"The LoRA target '{end[1:]}' matches no layer of this model. Choose other targets: "
            f"{', '.join(LORA_TARGETS)}.",
        )
    return [name for name in names if f".{name}".endswith(tuple(ends))]


def _in_chosen_blocks(chosen: list[str], in_blocks: list[str], settings: LoraSettings) -> list[str]:
    patterns = settings.block_patterns
    for pattern in patterns:
        require(
            any(_matches(pattern, name) for name in in_blocks),
            f"'{pattern.text}' of blocks matches no block of this model. Write them such as "
            "'double_blocks.0-9, single_blocks.20-37', or leave blocks empty for all.",
        )
    found = [n for n in chosen if not patterns or any(_matches(p, n) for p in patterns)]
    require(
        bool(found),
        f"No layer learns: the blocks '{settings.blocks}' have none of those that "
        f"'{settings.patterns or settings.targets}' chooses. Choose other blocks or other layers.",
    )
    return found


def _sample(names: list[str]) -> str:
    return names[0] if names else "transformer_blocks.0.attn.to_q"


def _matches(pattern: Pattern, name: str) -> bool:
    """By diffusers' name of a layer, or the original one of its matrix."""
    zero, index = block_zero(name)
    return pattern.matches(name) or pattern.matches(in_block(_ORIGINAL.get(zero, zero), index))


def linear_names(config: FluxConfig) -> list[str]:
    """diffusers' names of the Linears of this network, block by block."""
    return [*linear_sources(config), FINAL_MODULATION[0]]


@functools.lru_cache(maxsize=8)
def _shapes(config: FluxConfig) -> Mapping[str, tuple[int, int]]:
    """out and in of its Linears; those of block 0 stand for all blocks."""
    network = empty_transformer(config)
    linears: Any = ((name, network.get_submodule(name)) for name in linear_names(config))
    return {name: (linear.out_features, linear.in_features) for name, linear in linears}


def num_parameters(config: FluxConfig, settings: LoraSettings) -> int:
    """How many numbers a LoRA of these settings trains on this network.

    Raises:
        ValueError: as `learning_ranks`.
    """
    ranks = learning_ranks(linear_names(config), settings)
    if settings.start_from:
        modules = read_start(settings).modules.values()
        return sum(t.numel() for parts in modules for name, t in parts.items() if name != "alpha")
    return num_numbers(config, ranks, settings)


def describe_lora(config: FluxConfig, settings: LoraSettings) -> str:
    """How large it is, as a sentence.

    Raises:
        ValueError: as `learning_ranks`.
    """
    num_layers = len(learning_ranks(linear_names(config), settings))
    millions = num_parameters(config, settings) / 1e6
    return (
        f"The {_NAMES[settings.kind, settings.dora]} learns {millions:.2f} million numbers on "
        f"{num_layers} layers."
    )


def rank_without_effect(config: FluxConfig, settings: LoraSettings) -> list[str]:
    """A sentence if a LoKr's rank is so high that factors are whole matrices, as full_matrix says.

    Raises:
        ValueError: as `learning_ranks`.
    """
    if settings.kind != "lokr" or settings.full_matrix or settings.start_from:
        return []
    ranks = learning_ranks(linear_names(config), settings)
    shapes = _shapes(dataclasses.replace(config, depth=1, depth_single=1))
    num_whole = sum(
        "lokr_w2" in lokr_shapes(*shapes[block_zero(name)[0]], rank, settings)
        for name, rank in ranks.items()
    )
    if not num_whole:
        return []
    return [
        f"On {num_whole} of {len(ranks)} layers rank, alpha and rslora have no effect: with a rank "
        "of half the side of a LoKr's large factor or more, that is a whole matrix."
    ]


def in_all_blocks(config: FluxConfig, settings: LoraSettings) -> dict[str, int]:
    """Layers as they learn in any block, by their names in block 0, and their highest ranks."""
    ranks: dict[str, int] = {}
    for name, rank in learning_ranks(linear_names(config), settings).items():
        zero, _ = block_zero(name)
        ranks[zero] = max(rank, ranks.get(zero, 0))
    return ranks


def of_network(zero_ranks: Mapping[str, int], config: FluxConfig) -> dict[str, int]:
    """The layers of a network that are these in some block."""
    zeros = {name: block_zero(name)[0] for name in linear_names(config)}
    return {name: zero_ranks[zero] for name, zero in zeros.items() if zero in zero_ranks}


def num_numbers(config: FluxConfig, ranks: Mapping[str, int], settings: LoraSettings) -> int:
    """How many numbers a LoRA on these layers has."""
    shapes = _shapes(dataclasses.replace(config, depth=1, depth_single=1))
    return sum(
        _num_numbers(*shapes[block_zero(name)[0]], rank, settings) for name, rank in ranks.items()
    )


def _num_numbers(rows: int, columns: int, rank: int, settings: LoraSettings) -> int:
    if settings.kind == "lokr":
        shapes = lokr_shapes(rows, columns, rank, settings)
        return sum(first * second for first, second in shapes.values())
    thin = rank * (rows + columns)
    return 2 * thin if settings.kind == "loha" else thin + (rows if settings.dora else 0)
