"""The parameters of ComfyUI's own FLUX as weights that LoRAs are trained on: no byte is copied.

The host moves its parameters, replaces them and merges LoRAs into them. So a tensor is looked up by
its name whenever it is used, after the host was asked for a model without patches.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..trainers.flux import FluxConfig
from ..trainers.formats import FORMATS, row_slices
from ..trainers.load import ESSENTIAL_NAMES, BaseFlux, first_missing, needed_names
from ..trainers.packed_weight import Matrix
from ..trainers.tensor_files import original_name

_PREFIX = "diffusion_model."
_SAMPLES, _SAMPLE_SIZE = 4, 1024
"""How many runs of numbers of a tensor tell one model from another, and how many numbers each."""


class ParameterMatrix(Matrix):
    """The weight of a Linear of the host, wherever it lies: rows are moved when they are used.

    Dense weights, fp8 with a factor (`scale_weight`), and the host's own quantized tensors, which
    it unpacks itself, and only whole.
    """

    def __init__(self, network: nn.Module, name: str, device: torch.device) -> None:
        """`name` is that of the Linear; `device` the one that computes."""
        self._network, self._name, self._device = network, name, device
        module = self._module
        self.shape = module.weight.shape
        is_readable = module.weight.is_floating_point() if self._is_dense else self._can_unpack
        if not is_readable:
            raise ValueError(
                f"This MODEL keeps its '{name}.weight' as {type(module.weight.data).__name__} in "
                f"{module.weight.dtype}, which is not known here. Load the model by Load Quantized "
                "FLUX."
            )

    @property
    def format(self) -> str | None:
        return "fp8" if self._is_dense and self._module.weight.itemsize == 1 else None

    def fetch(self) -> tuple[Tensor, Tensor]:
        weight = self._module.weight.data.to(self._device)
        scale = getattr(self._module, "scale_weight", None)
        scale = torch.ones(1) if scale is None else scale.data
        return weight, scale.to(self._device).expand(len(weight), 1)

    def dequantize(self, dtype: torch.dtype, rows: slice = slice(None)) -> Tensor:
        module = self._module
        if not self._is_dense:
            weight = module.weight.to(self._device)
            return module.convert_weight(weight)[rows].to(dtype)
        # Not detach(): what the host moved in inference mode shares no version counter with a view.
        weight = module.weight.data[rows].to(self._device)
        scale = getattr(module, "scale_weight", None)
        if scale is None:
            return weight.to(dtype)
        of_rows = scale.data.to(self._device).expand(len(weight), 1)
        return FORMATS["fp8"].unpack(weight, of_rows, dtype)

    def slices(self, dtype: torch.dtype, rows: slice = slice(None)) -> list[slice]:
        start, stop, _ = rows.indices(self.shape[0])
        if not self._is_dense or self._module.weight.dtype == dtype:
            return [slice(start, stop)]
        return row_slices(range(start, stop), self.shape[1], dtype)

    @property
    def _module(self) -> Any:
        return self._network.get_submodule(self._name)

    @property
    def _is_dense(self) -> bool:
        return type(self._module.weight) in (Tensor, nn.Parameter)

    @property
    def _can_unpack(self) -> bool:
        # A smoothed layer also changes what it is given, which no weight can tell.
        is_smoothed = getattr(self._module, "pre_quant_scale", None) is not None
        return hasattr(self._module, "convert_weight") and not is_smoothed


class PlainParameters(Mapping[str, Tensor]):
    """Biases and norm scales of the host's network by original names, on `device`."""

    def __init__(self, network: nn.Module, names: Mapping[str, str], device: torch.device) -> None:
        """`names` are those of the host by original ones."""
        self._network, self._names, self._device = network, names, device

    def __getitem__(self, name: str) -> Tensor:
        return self._network.get_parameter(self._names[name]).data.to(self._device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class ParameterStore:
    """The weights of the host's network, as training asks for them."""

    streaming = "auto"  # the host keeps on the device what fits, and the rest is moved when used

    def __init__(self, patcher: Any, names: Mapping[str, str]) -> None:
        """`names` are those of the host by original ones."""
        network, device = patcher.model.diffusion_model, patcher.load_device
        self._patcher = patcher
        self.device, self.num_bytes = device, patcher.model_size()
        shapes = {name: network.get_parameter(theirs).shape for name, theirs in names.items()}
        matrices = [name for name, shape in shapes.items() if len(shape) == 2]
        self.packed = {
            name: ParameterMatrix(network, names[name].removesuffix(".weight"), device)
            for name in matrices
        }
        plain = {name: names[name] for name in names if name not in self.packed}
        self.plain = PlainParameters(network, plain, device)

    @property
    def bytes_in_ram(self) -> int:
        return self.num_bytes - self._patcher.loaded_size()


def flux_of_parameters(patcher: Any) -> BaseFlux:
    """The FLUX of a MODEL that one of ComfyUI's own loaders gave.

    Raises:
        ValueError: if it is no FLUX.1, or its weights are kept in an unknown way.
    """
    network = patcher.model.diffusion_model
    theirs = {original_name(name): name for name, _ in network.named_parameters()}
    shapes = {name: tuple(network.get_parameter(theirs[name]).shape) for name in theirs}
    missing = first_missing(ESSENTIAL_NAMES, shapes)
    if missing is None:
        config = FluxConfig.from_shapes(shapes)
        missing = first_missing(needed_names(config), shapes)
    if missing is not None:
        raise ValueError(
            f"This MODEL is not a FLUX.1: it has no '{missing}'. Connect FLUX.1-dev, schnell, Krea "
            "or Kontext."
        )
    store = ParameterStore(patcher, {name: theirs[name] for name in needed_names(config)})
    num_weights = sum(math.prod(shape) for shape in shapes.values())
    format = "fp8" if store.num_bytes < 1.5 * num_weights else "bf16"  # what takes as much memory
    return BaseFlux(store, config, _identity(patcher, theirs), path="", format=format)


def _identity(patcher: Any, names: Mapping[str, str]) -> str:
    """SHA-256 over the names, shapes and samples of all parameters, as they are without patches.

    Samples are hashed as float32: the same weights in a wider type are the same model.
    """
    digest = hashlib.sha256()
    for name in sorted(names):
        key = _PREFIX + names[name]
        # Parameters that LoRAs are merged into at the moment are kept here as they were.
        backup = patcher.backup.get(key)
        tensor = backup.weight if backup else patcher.model.get_parameter(key)
        digest.update(f"{name} {[*tensor.shape]} ".encode())
        digest.update(_sample(getattr(tensor, "_qdata", tensor).data).numpy().tobytes())
    return digest.hexdigest()


def _sample(tensor: Tensor) -> Tensor:
    """Some numbers of a tensor, spread evenly, in float32 on the CPU."""
    numbers = tensor.reshape(-1)
    last = max(0, len(numbers) - _SAMPLE_SIZE)
    starts = sorted({last * part // (_SAMPLES - 1) for part in range(_SAMPLES)})
    runs = [numbers[start : start + _SAMPLE_SIZE].cpu().float() for start in starts]
    return torch.cat(runs)
