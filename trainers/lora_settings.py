"""What kind of LoRA is trained, and on which layers."""

from __future__ import annotations

from dataclasses import dataclass

from .checks import require

# Suffixes of diffusers' module names, as peft matches them: a name equals the target or ends with
# "." + target. `qlora` is the list of the Hugging Face QLoRA script; `all` and `all+ffs` are
# SimpleTuner's names, here without the model's own final `proj_out`, which `all+ffs` would match.
LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "qlora": ("to_k", "to_q", "to_v", "to_out.0"),
    "all": (
        *("to_k", "to_q", "to_v", "to_out.0"),
        *("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out"),
    ),
    "all+ffs": (
        *("to_k", "to_q", "to_v", "to_out.0"),
        *("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
        *("proj_mlp", "proj_out"),
    ),
}


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    rank: int = 4
    """Size of the bottleneck, 1 to 4096. A higher rank learns more and makes a larger file."""
    alpha: float | None = None
    """Strength numerator: the LoRA is scaled by alpha / rank. None means alpha = rank."""
    targets: str = "qlora"
    """Which layers learn: a name of LORA_TARGETS."""

    def __post_init__(self) -> None:
        require(
            1 <= self.rank <= 4096,
            f"The LoRA rank must be between 1 and 4096, got {self.rank}. 4 to 32 is usual.",
        )
        require(
            self.alpha is None or self.alpha > 0,
            f"The LoRA alpha must be above 0, got {self.alpha}. Use the rank if in doubt.",
        )
        require(
            self.targets in LORA_TARGETS,
            f"Unknown LoRA targets '{self.targets}'. Choose one of: {', '.join(LORA_TARGETS)}.",
        )

    @property
    def resolved_alpha(self) -> float:
        """The alpha that goes into the file; the LoRA is scaled by it over the rank."""
        return float(self.alpha or self.rank)
