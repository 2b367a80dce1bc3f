"""What kind of LoRA is trained, on which layers, and from where it starts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .block_weights import Pattern
from .checks import require

Kind = Literal["lora", "lokr", "loha"]
KINDS: tuple[Kind, ...] = ("lora", "lokr", "loha")
Init = Literal["gaussian", "default", "pissa", "olora", "loftq"]
INITS: tuple[Init, ...] = ("gaussian", "default", "pissa", "olora", "loftq")
_OF_WEIGHTS = ("pissa", "olora", "loftq")
"""Starts that are computed from the model's weights."""
SUBTRACTED = ("pissa", "olora")
"""Those of them whose product at the start is taken off again."""

_IMAGE = ("to_k", "to_q", "to_v", "to_out.0")
_TEXT = ("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out")
_TEXT_FEED_FORWARD = ("ff_context.net.0.proj", "ff_context.net.2")
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", *_TEXT_FEED_FORWARD)
_SINGLE = ("proj_mlp", "proj_out")
_MODULATION = ("norm.linear", "norm1.linear", "norm1_context.linear")
# Ends of diffusers' names of layers in the blocks. The model's own final `proj_out` is never meant,
# which the names of SimpleTuner's presets match too.
LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "qlora": _IMAGE,
    "all": (*_IMAGE, *_TEXT),
    "all+ffs": (*_IMAGE, *_TEXT, *_FEED_FORWARD, *_SINGLE),
    "mmdit": _IMAGE,
    "context": _TEXT,
    "context+ffs": (*_TEXT, *_TEXT_FEED_FORWARD),
    "tiny": ("single_transformer_blocks.7.proj_out", "single_transformer_blocks.20.proj_out"),
    "nano": ("single_transformer_blocks.7.proj_out",),
    "fal": (*_IMAGE, *_TEXT, *_FEED_FORWARD),
    "ai-toolkit": (*_IMAGE, *_TEXT, *_FEED_FORWARD, *_SINGLE, *_MODULATION),
    "kohya": (*_IMAGE, *_TEXT, *_FEED_FORWARD, *_SINGLE, *_MODULATION),
}
"""Presets by their known names: the Hugging Face QLoRA script's `qlora`, SimpleTuner's `mmdit` to
`nano`, diffusers' `fal`, and what ai-toolkit and kohya's sd-scripts train by default: all layers of
the blocks. (kohya's q, k, v and mlp are one matrix; here each has a LoRA of its own.)"""


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Without `start_from`, `targets` or `patterns`, and `blocks` say which layers learn; with it,
    its file does, and kind, rank, alpha and dora are those of the file."""

    rank: int = 4
    """Size of the bottleneck, 1 to 4096. A higher rank learns more and makes a larger file."""
    alpha: float | None = None
    """Strength numerator: the LoRA is scaled by alpha / rank. None means alpha = rank."""
    targets: str = "qlora"
    """Which layers learn: a name of LORA_TARGETS."""
    kind: Kind = "lora"
    """lora: two thin matrices. lokr: a Kronecker product. loha: a product of two LoRAs, number by
    number."""
    blocks: str = ""
    """Blocks that learn, such as `double_blocks.0-9, single_blocks.20-37`; empty for all."""
    patterns: str = ""
    """Layers that learn in place of `targets`: parts of their names, such as `attn.to_q, ff.net`,
    by diffusers' names or the original ones."""
    rank_patterns: str = ""
    """Lines `pattern: rank` for layers with another rank; the last one that matches holds."""
    dropout: float = 0.0
    """Share of a layer's inputs that the LoRA does not see in a training step, 0 to 0.99."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) (Kalajdzievski 2023) in place of alpha / rank."""
    init: Init = "gaussian"
    """What it starts from: see `lora_init`."""
    dora: bool = False
    """Learn the length of each row of a matrix apart from its direction (Liu et al. 2024)."""
    lokr_factor: int = -1
    """Size of the small factor of a LoKr; -1 takes the largest one, about the square root."""
    full_matrix: bool = False
    """Whether the large factor of a LoKr is a whole matrix, whatever the rank."""
    start_from: str = ""
    """Path of a LoRA file to go on from; empty for a start of its own."""
    start_hash: str = ""
    """SHA-256 of that file's bytes in hex."""

    def __post_init__(self) -> None:
        require_rank(self.rank)
        require(
            self.alpha is None or self.alpha > 0,
            f"The LoRA alpha must be above 0, got {self.alpha}. Use the rank if in doubt.",
        )
        require(
            self.targets in LORA_TARGETS,
            f"Unknown LoRA targets '{self.targets}'. Choose one of: {', '.join(LORA_TARGETS)}.",
        )
        require(
            self.kind in KINDS,
            f"Unknown kind of LoRA '{self.kind}'. Choose one of: {', '.join(KINDS)}.",
        )
        require(
            self.init in INITS,
            f"Unknown start of a LoRA '{self.init}'. Choose one of: {', '.join(INITS)}.",
        )
        require(
            0 <= self.dropout < 1,
            f"The dropout of a LoRA must be 0 (off) or more and below 1, got {self.dropout}. "
            "0.05 to 0.1 is usual.",
        )
        require(
            self.lokr_factor == -1 or self.lokr_factor >= 1,
            f"The factor of a LoKr must be -1 (the largest) or 1 and more, got {self.lokr_factor}. "
            "4 to 16 is usual.",
        )
        self._require_consistent()
        _ = self.block_patterns, self.layer_patterns, self.ranks

    def _require_consistent(self) -> None:
        require(
            not self.dora or self.kind == "lora",
            f"DoRA splits the weights of a plain LoRA, and the kind is {self.kind}. Turn dora off, "
            "or set kind to lora.",
        )
        require(
            self.init not in _OF_WEIGHTS or self.kind == "lora",
            f"The start {self.init} is one of plain LoRAs, and the kind is {self.kind}, which has "
            "a start of its own. Set init to default, or kind to lora.",
        )
        require(
            self.init not in _OF_WEIGHTS or not self.dora,
            f"The start {self.init} changes the weights whose lengths DoRA keeps. Set init to "
            "gaussian or default, or turn dora off.",
        )

    @property
    def resolved_alpha(self) -> float:
        """The alpha of a layer with the usual rank."""
        return float(self.alpha or self.rank)

    def file_alpha(self, rank: int) -> float:
        """What a file says for a layer of this rank, whose readers scale by it over the rank."""
        alpha = float(self.alpha or rank)
        return alpha * math.sqrt(rank) if self.rslora else alpha

    def scale(self, rank: int) -> float:
        """What the product of a layer's factors is multiplied by."""
        alpha = float(self.alpha or rank)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    @property
    def is_subtracted(self) -> bool:
        """Whether the product that it starts with is taken off, so that a file has twice its
        rank."""
        return self.init in SUBTRACTED and not self.start_hash

    @property
    def has_own_ranks(self) -> bool:
        """Whether layers may have other ranks than `rank`."""
        return bool(self.rank_patterns.strip() or self.start_hash)

    @property
    def block_patterns(self) -> tuple[Pattern, ...]:
        return tuple(map(Pattern, _listed(self.blocks)))

    @property
    def layer_patterns(self) -> tuple[Pattern, ...]:
        return tuple(map(Pattern, _listed(self.patterns)))

    @property
    def ranks(self) -> tuple[tuple[Pattern, int], ...]:
        """The lines of `rank_patterns`."""
        return tuple(_rank_line(line) for line in self.rank_patterns.splitlines() if line.strip())


REPLACED_BY_A_FILE = ("kind", "rank", "alpha", "dora", "rslora", "init")
"""What the settings of a training that starts from a file have from it, whatever was set."""
_SAID_BY_A_FILE = ("targets", "patterns", "blocks", "rank_patterns", "lokr_factor", "full_matrix")
_OF_LOKR = ("lokr_factor", "full_matrix")
_OF_THIN_FACTORS = ("rank", "alpha", "rslora", "rank_patterns")


def without_effect(settings: LoraSettings) -> list[str]:
    """A sentence for every setting that was changed and does nothing beside the others."""
    recipe = LoraSettings()

    def changed(names: tuple[str, ...]) -> list[str]:
        return [name for name in names if getattr(settings, name) != getattr(recipe, name)]

    if settings.start_hash:
        return [_said_by_the_file(name) for name in changed(_SAID_BY_A_FILE)]
    lines = []
    if settings.layer_patterns and changed(("targets",)):
        lines.append("The setting targets has no effect: patterns chooses the layers.")
    if settings.kind != "lokr":
        lines += [
            f"The setting {name} has no effect: the kind is {settings.kind}, not lokr."
            for name in changed(_OF_LOKR)
        ]
    elif settings.full_matrix:
        lines += [
            f"The setting {name} has no effect: the factors of this LoKr are whole matrices."
            for name in changed(_OF_THIN_FACTORS)
        ]
    return lines


def replaced(given: Mapping[str, Any], settings: LoraSettings) -> list[str]:
    """A sentence for every setting that was changed, and that the file to start from made another.

    Args:
        given: by name what was set of REPLACED_BY_A_FILE.
        settings: with the file's.
    """
    recipe = LoraSettings()
    kept = {name: getattr(settings, name) for name in given} | {"alpha": settings.resolved_alpha}
    return [
        _said_by_the_file(name)
        for name, value in given.items()
        if value not in (getattr(recipe, name), kept[name])
    ]


def _said_by_the_file(name: str) -> str:
    return f"The setting {name} has no effect: the file to start from says it."


def require_rank(rank: int) -> None:
    """Raises ValueError if a LoRA cannot have it."""
    require(
        1 <= rank <= 4096,
        f"The LoRA rank must be between 1 and 4096, got {rank}. 4 to 32 is usual.",
    )


def _listed(text: str) -> list[str]:
    """What is between commas and line ends."""
    return [part.strip() for part in text.replace("\n", ",").split(",") if part.strip()]


def _rank_line(line: str) -> tuple[Pattern, int]:
    pattern, _, number = (part.strip() for part in line.rpartition(":"))
    require(
        bool(pattern) and number.isdecimal(),
        "Each line of rank_patterns is a part of the model's names, a colon and a rank, such as "
        f"'attn.to_q: 16', got {line.strip()!r}.",
    )
    require_rank(int(number))
    return Pattern(pattern), int(number)
