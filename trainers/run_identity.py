"""What makes two trainings the same run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from .config import JobSettings

_VERSION = 1
_LORA = frozenset({"rank", "alpha", "targets"})
_TRAIN = frozenset(
    {
        *("learning_rate", "batch_size", "gradient_accumulation", "guidance"),
        *("compute_dtype", "seed"),
    }
)
_NEVER = frozenset(
    {
        *("gradient_checkpointing", "checkpointing", "checkpointing_interval", "compile"),
        *("clip_limit", "start_from"),
    }
)
"""Settings that give the same weights, or but for their rounding, as another device does: changing
one must not lose a run. clip_limit is there as `max_grad_norm` of the training, as before there
were settings of the optimizer; what is in the file that a LoRA starts from counts, not its path."""


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """Everything that determines the weights of a run, its length aside."""

    base: str
    """Identity of the base model's file."""
    base_format: str
    latents: str
    """Fingerprint of the latent cache."""
    prompts: str
    """Fingerprint of the prompt cache."""
    job: JobSettings
    frozen: str = ""
    """Fingerprint of the LoRAs that belong to the base model; empty if it has none."""
    assistant: str = ""
    """The same of those that only help to train."""
    num_steps: int = 0
    """The length, if the learning rate follows it; else 0, and a run can be made longer."""

    def to_json(self) -> dict[str, Any]:
        """Length, name and checkpoint distance do not change what a step computes."""
        lora = _that_count(self.job.lora, _LORA)
        if not self.job.lora.has_own_ranks:  # there no alpha is as many as there are ranks
            lora["alpha"] = self.job.lora.resolved_alpha
        values = {
            "version": _VERSION,
            "base": self.base,
            "base_format": self.base_format,
            "latents": self.latents,
            "prompts": self.prompts,
            "lora": lora,
            "train": _that_count(self.job.train, _TRAIN)
            | {"max_grad_norm": self.job.train.optimizer.clip_limit},
        }
        # Runs from before there were any, and those without, are the same.
        later = {
            "frozen_loras": self.frozen,
            "assistant_loras": self.assistant,
            "num_steps": self.num_steps,
        }
        return values | {name: value for name, value in later.items() if value}

    def hash8(self) -> str:
        text = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]


def _that_count(settings: Any, always: frozenset[str]) -> dict[str, Any]:
    """The fields called `always`, and of the others, also of settings in them, those that are not
    the recipe's: runs from before there was such a setting are the same as those without it."""
    values, recipe = {}, type(settings)()
    for name in (field.name for field in dataclasses.fields(settings)):
        value = getattr(settings, name)
        if name in _NEVER or (name not in always and value == getattr(recipe, name)):
            continue
        values[name] = _plain(value)
    # A group that differs in nothing that counts is the recipe's.
    return {name: value for name, value in values.items() if value != {}}


def _plain(value: Any) -> Any:
    """A setting as JSON: a group of settings, or several groups, whose fields all count."""
    if isinstance(value, tuple):
        return [vars(one) if dataclasses.is_dataclass(one) else one for one in value]
    return _that_count(value, frozenset()) if dataclasses.is_dataclass(value) else value
