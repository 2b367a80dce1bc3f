"""LoRA on the training face: attach, read and write its tensors, and its file.

The file has diffusers' module names with the prefix `transformer.`, `lora_A` / `lora_B` weights and
an `alpha` per module: ComfyUI, diffusers and kohya's tools read it at the same strength. LoKr and
LoHa have the names of LyCORIS after the module.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checks import require
from .files import read_safetensors, write_safetensors
from .flow import seeded
from .flux import LinearView
from .load import BaseFlux
from .lora_init import Originals, originals_of, start_factors
from .lora_layers import Adapted, DoraLinear, Dropout, LoraLinear
from .lora_settings import LoraSettings
from .lora_start import StartLora, read_start
from .lora_targets import learning_ranks
from .lycoris import LohaLinear, LokrLinear, lokr_shapes

_PREFIX = "transformer."
State = dict[str, Tensor]


class Lora:
    """The LoRA attached to a transformer.

    `parameters` maps `<module>.<name>` to what is trained, float32 whatever the network computes
    in: `lora_A.weight` [rank, in] and `lora_B.weight` [out, rank], a DoRA's `magnitude` [out], or
    the factors of a LoKr or LoHa.
    """

    def __init__(
        self, transformer: nn.Module, layers: Mapping[str, Adapted], dropout: Dropout
    ) -> None:
        self._transformer, self._layers, self._dropout = transformer, layers, dropout
        self.parameters: dict[str, nn.Parameter] = {
            f"{module}.{name}": parameter
            for module, layer in layers.items()
            for name, parameter in layer.trained().items()
        }

    def state(self) -> State:
        """Copies on the CPU of the trained tensors, and of what else tells what they do: of a start
        that is taken off its factors `start_A.weight` and `start_B.weight`, of a DoRA the lengths
        of the rows without and with it, `base_norm` and `norm`."""
        kept = {
            f"{module}.{name}": tensor
            for module, layer in self._layers.items()
            for name, tensor in layer.kept().items()
        }
        return {n: t.detach().cpu().clone() for n, t in {**self.parameters, **kept}.items()}

    def load_state(self, state: State) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state[name])
        modules = by_module(state)
        for module, layer in self._layers.items():
            layer.load_kept(modules[module])

    def take_off_start(self) -> None:
        """Again, after the factors were rounded: what is taken off a LoRA is what it is now."""
        for layer in self._layers.values():
            if isinstance(layer, LoraLinear) and layer.start_A is not None:
                layer.subtract_start()

    def at_micro_step(self, micro_step: int) -> None:
        """Which inputs dropout takes away from now on follows from this."""
        self._dropout.micro_step = micro_step

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
        """Take the LoRA off the transformer, which is then as it was before."""
        for module, layer in self._layers.items():
            self._transformer.set_submodule(module, layer.base)

    def _enable(self, enabled: bool) -> None:
        for layer in self._layers.values():
            layer.enabled = enabled


def attach_lora(
    transformer: nn.Module,
    settings: LoraSettings,
    *,
    seed: int,
    base: BaseFlux | None = None,
    saved: State | None = None,
    ranks: Mapping[str, int] | None = None,
) -> Lora:
    """Put a LoRA on the layers that learn; nothing else will train.

    Its random numbers are drawn on the CPU, in the order of the modules.

    Args:
        transformer: from `build_transformer`.
        base: what the transformer was built from; LoftQ reads its original weights.
        saved: the state that `load_state` will be given: the LoRA has its layers, and what it would
            start with is not computed.
        ranks: the layers and their ranks, in place of those of the settings; what it would start
            with is not computed.

    Raises:
        ValueError: if a target or pattern names no layer of this network, or its start cannot be
            had.
    """
    is_fresh = saved is None and ranks is None
    start = read_start(settings) if settings.start_from and is_fresh else None
    tensors = by_module(saved) if saved is not None else start.modules if start else {}
    names = [n for n, module in transformer.named_modules() if isinstance(module, LinearView)]
    if saved is not None:  # in the order of the network, which the optimizer's state has
        ranks = {name: settings.rank for name in names if name in tensors}
    ranks = learning_ranks(names, settings) if ranks is None else ranks
    dropout = Dropout(share=settings.dropout, seed=seed)
    layers = {
        name: _layer(view, name, rank, settings, tensors.get(name, {}), dropout)
        for name, rank in ranks.items()
        if isinstance(view := transformer.get_submodule(name), LinearView)
    }
    if start is not None:
        _go_on(layers, start, settings)
    elif is_fresh:
        _begin(layers, settings, seed, base)
    elif settings.is_subtracted:
        for layer in layers.values():
            if isinstance(layer, LoraLinear):
                layer.subtract_start()
    for name, layer in layers.items():
        transformer.set_submodule(name, layer)
    return Lora(transformer, layers, dropout)


def _layer(
    view: LinearView,
    name: str,
    rank: int,
    settings: LoraSettings,
    tensors: Mapping[str, Tensor],
    dropout: Dropout,
) -> Adapted:
    """`tensors` are those that it will have, if they are known; they say its rank."""
    for part in ("lora_A.weight", "lokr_w2_b", "hada_w1_b"):
        rank = len(tensors[part]) if part in tensors else rank
    scale = settings.scale(rank)
    if settings.kind == "lokr":
        shapes = lokr_shapes(view.out_features, view.in_features, rank, settings)
        if tensors:
            shapes = {n: (t.shape[0], t.shape[1]) for n, t in tensors.items() if "lokr" in n}
        return LokrLinear(view, name, dropout, shapes, scale)
    kind = LohaLinear if settings.kind == "loha" else DoraLinear if settings.dora else LoraLinear
    return kind(view, name, dropout, rank, scale)


def _begin(
    layers: Mapping[str, Adapted], settings: LoraSettings, seed: int, base: BaseFlux | None
) -> None:
    """A start of its own."""
    generator, originals = seeded(seed, "lora"), None
    if settings.init == "loftq":
        assert base is not None
        originals = originals_of(base)
    for layer in layers.values():
        if settings.init in ("gaussian", "default"):
            layer.start(generator, settings.init)
        elif isinstance(layer, LoraLinear):
            _start_at_weights(layer, settings, originals)
        if isinstance(layer, DoraLinear):
            layer.measure()


def _start_at_weights(
    layer: LoraLinear, settings: LoraSettings, originals: Originals | None
) -> None:
    rank = layer.lora_A.shape[0]
    factors = start_factors(settings.init, layer.base, rank, layer.scale, originals)
    layer.start_at(*factors, subtracted=settings.is_subtracted)


def _go_on(layers: Mapping[str, Adapted], start: StartLora, settings: LoraSettings) -> None:
    """With the numbers of a file. Of a layer with another scale, its factor is made larger."""
    with torch.no_grad():
        for name, layer in layers.items():
            tensors = start.modules[name]
            if isinstance(layer, DoraLinear):
                layer.measure()
            for part, parameter in layer.trained().items():
                value = tensors[part]
                require(
                    value.shape == parameter.shape,
                    f"The LoRA to start from does not fit this model: '{name}' has "
                    f"'{part}' {[*value.shape]} where {[*parameter.shape]} is needed. Choose a "
                    "LoRA that was trained on a model of this size.",
                )
                if part in ("lora_B.weight", "lokr_w2_a", "hada_w1_a"):
                    value = value * (start.scale(name) / settings.scale(start.ranks[name]))
                parameter.copy_(value)


def by_module(state: Mapping[str, Tensor]) -> dict[str, State]:
    """The tensors of a state by their modules; names of LoRA factors have two parts."""
    modules: dict[str, State] = {}
    for name, tensor in state.items():
        module, _, part = name.removesuffix(".weight").rpartition(".")
        end = ".weight" if name.endswith(".weight") else ""
        modules.setdefault(module, {})[part + end] = tensor
    return modules


def file_tensors(state: State, settings: LoraSettings) -> State:
    """The tensors of a LoRA file: float32, named as diffusers does, with an alpha per module.

    What a start that is taken off leaves is a LoRA of twice the rank. A DoRA has its magnitudes as
    `lora_magnitude_vector`, which diffusers reads, and as `dora_scale`: ComfyUI divides by the
    lengths of the rows without the LoRA, so they are made smaller by what it adds to them.
    """
    return {
        f"{_PREFIX}{module}.{name}": tensor.float()
        for module, parts in by_module(state).items()
        for name, tensor in _in_file(parts, settings).items()
    }


def _in_file(parts: State, settings: LoraSettings) -> State:
    """The tensors of one module."""
    if "lora_A.weight" not in parts:
        names = ("lokr_w2_b", "hada_w1_b")
        rank = next((len(parts[name]) for name in names if name in parts), 1)
        is_whole = "lokr_w2" in parts
        return {**parts, "alpha": torch.tensor(1.0 if is_whole else settings.file_alpha(rank))}
    a, b = parts["lora_A.weight"], parts["lora_B.weight"]
    alpha = settings.file_alpha(len(a))
    if "start_A.weight" in parts:
        a = torch.cat([a, parts["start_A.weight"]])
        b, alpha = torch.cat([b, -parts["start_B.weight"]], dim=1), 2 * alpha
    tensors = {"lora_A.weight": a, "lora_B.weight": b, "alpha": torch.tensor(alpha)}
    if "magnitude" in parts:
        scale = parts["magnitude"] * parts["base_norm"] / parts["norm"]
        tensors["dora_scale"] = scale[:, None]
        tensors["lora_magnitude_vector"] = parts["magnitude"]
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
    twice = 2 if settings.is_subtracted else 1
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"flux-1-{variant}/lora",
        "modelspec.implementation": "https://github.com/black-forest-labs/flux",
        "modelspec.title": name,
        "atelier.base_format": base.format,
        "atelier.rank": str(twice * settings.rank),
        "atelier.alpha": f"{twice * settings.file_alpha(settings.rank):g}",
        "atelier.steps": str(steps),
        "atelier.settings": json.dumps(run, sort_keys=True),
    }
