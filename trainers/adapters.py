"""LoRA on the training face: attach, read and write its tensors, and its file.

The file has diffusers' module names with the prefix `transformer.`, `lora_A` / `lora_B` weights and
an `alpha` per module: ComfyUI, diffusers and kohya's tools read it at the same strength.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .files import read_safetensors, write_safetensors
from .flow import seeded
from .load import BaseFlux
from .lora_settings import LORA_TARGETS, LoraSettings
from .packages import importing

_ADAPTER = "default"
_PREFIX = "transformer."


class Lora:
    """The LoRA attached to a transformer.

    `parameters` maps `<module>.lora_A.weight` [rank, in] and `<module>.lora_B.weight` [out, rank]
    to what is trained, float32 whatever the network computes in.
    """

    def __init__(self, transformer: nn.Module, settings: LoraSettings) -> None:
        self.settings = settings
        self._transformer = transformer
        self.parameters: dict[str, nn.Parameter] = {
            name.replace(f".{_ADAPTER}.", "."): parameter
            for name, parameter in transformer.named_parameters()
            if f".{_ADAPTER}." in name
        }

    def state(self) -> dict[str, Tensor]:
        """Copies of the trained tensors on the CPU."""
        return {name: p.detach().cpu().clone() for name, p in self.parameters.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state[name])

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within it the transformer computes as if it had no LoRA."""
        self._enable(False)
        try:
            yield
        finally:
            self._enable(True)

    def is_finite(self) -> bool:
        return all(bool(torch.isfinite(p).all()) for p in self.parameters.values())

    def detach(self) -> None:
        """Take the adapter off the transformer, which is then as it was before."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        for name, module in list(self._transformer.named_modules()):
            if isinstance(module, BaseTunerLayer):
                self._transformer.set_submodule(name, module.get_base_layer())
        del self._transformer.peft_config  # else peft warns of a second adapter

    def _enable(self, enabled: bool) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        for module in self._transformer.modules():
            if isinstance(module, BaseTunerLayer):
                module.enable_adapters(enabled)


def attach_lora(transformer: nn.Module, settings: LoraSettings, *, seed: int) -> Lora:
    """Put a LoRA with gaussian initialisation on the target layers; nothing else will train.

    A ~ N(0, 1 / rank), B = 0, drawn on the CPU in the order of the modules.

    Raises:
        ValueError: if a target names no layer of this network, or peft cannot be imported.
    """
    with importing("peft"):
        from peft import LoraConfig, inject_adapter_in_model

    targets = list(LORA_TARGETS[settings.targets])
    names = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    for target in targets:
        if not any(name.endswith(f".{target}") for name in names):
            raise ValueError(
                f"The LoRA target '{target}' matches no layer of this model. Choose other targets: "
                f"{', '.join(LORA_TARGETS)}."
            )
    wanted = [n for n in names if "blocks." in n and any(n.endswith(f".{t}") for t in targets)]
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.resolved_alpha,  # pyright: ignore[reportArgumentType]
        target_modules=wanted,
        init_lora_weights=True,
    )
    inject_adapter_in_model(config, transformer, adapter_name=_ADAPTER)
    lora = Lora(transformer, settings)
    generator = seeded(seed, "lora")
    with torch.no_grad():
        for name, parameter in lora.parameters.items():
            if name.endswith("lora_A.weight"):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise / settings.rank)
    return lora


def file_tensors(state: dict[str, Tensor], settings: LoraSettings) -> dict[str, Tensor]:
    """The tensors of a LoRA file: float32, named as diffusers does, with an alpha per module."""
    tensors = {f"{_PREFIX}{name}": tensor.float() for name, tensor in state.items()}
    alpha = settings.resolved_alpha
    for name in state:
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            tensors[f"{_PREFIX}{module}.alpha"] = torch.tensor(alpha)
    return tensors


def save_lora(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a LoRA file atomically.

    Raises:
        ValueError: if a weight is not finite, or the disk is full.
    """
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise ValueError(
            "The LoRA holds values that are not finite and was not saved: the training diverged. "
            "Lower the learning rate, or compute in bf16 or fp32."
        )
    write_safetensors(path, tensors, {"format": "pt", **metadata})


def load_lora_state(path: Path) -> dict[str, Tensor]:
    """The `lora_A` / `lora_B` tensors of a file that `save_lora` wrote, alpha folded into B."""
    tensors, _ = read_safetensors(path)
    state = {}
    for name, tensor in tensors.items():
        module, _, end = name.removeprefix(_PREFIX).rpartition(".lora_")
        if end == "A.weight":
            state[f"{module}.lora_A.weight"] = tensor
        elif end == "B.weight":
            alpha = tensors[f"{_PREFIX}{module}.alpha"].item()
            state[f"{module}.lora_B.weight"] = tensor * (alpha / tensor.shape[1])
    return state


def lora_metadata(
    *, name: str, settings: LoraSettings, base: BaseFlux, steps: int, run: dict[str, Any]
) -> dict[str, str]:
    """Safetensors metadata of a LoRA file: the modelspec convention and our own settings."""
    variant = "dev" if base.config.guidance else "schnell"
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"flux-1-{variant}/lora",
        "modelspec.implementation": "https://github.com/black-forest-labs/flux",
        "modelspec.title": name,
        "atelier.base_format": base.format,
        "atelier.rank": str(settings.rank),
        "atelier.steps": str(steps),
        "atelier.settings": json.dumps(run, sort_keys=True),
    }
