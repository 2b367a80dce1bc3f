"""What makes two trainings the same run."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from .config import JobSettings, LossSettings, TimestepSettings, to_json

_VERSION = 1


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

    def to_json(self) -> dict[str, Any]:
        """Length, name and checkpoint distance do not change what a step computes."""
        job = to_json(self.job)
        job["lora"]["alpha"] = self.job.lora.resolved_alpha
        # Recomputing blocks gives the same gradients; turning it on must not lose a run.
        del job["train"]["gradient_checkpointing"]
        # Runs from before there were any, and those of the recipe, are the same.
        for name, default in (("timesteps", TimestepSettings()), ("loss", LossSettings())):
            if getattr(self.job.train, name) == default:
                del job["train"][name]
        values = {
            "version": _VERSION,
            "base": self.base,
            "base_format": self.base_format,
            "latents": self.latents,
            "prompts": self.prompts,
            "lora": job["lora"],
            "train": job["train"],
        }
        # Runs from before there were any, and those without, are the same.
        return values | ({"frozen_loras": self.frozen} if self.frozen else {})

    def hash8(self) -> str:
        text = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]
