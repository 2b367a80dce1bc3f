"""The optimizers, each from its own package, and what is done with gradients before them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from .checks import require
from .flow import seeded
from .optimizer_settings import SCHEDULE_FREE, OptimizerSettings
from .packages import importing

_Groups = list[dict[str, Any]]
_Maker = Callable[[_Groups, float, float], torch.optim.Optimizer]
"""Of the groups of parameters, the learning rate and the weight decay."""


def require_optimizer(settings: OptimizerSettings, kind: str, dtype: torch.dtype) -> None:
    """See that a LoRA of this kind can be trained by it, with the network computed in `dtype`.

    Raises:
        ValueError: if it cannot, or the package of the optimizer cannot be imported.
    """
    # The scaler of float16 has no kernel for gradients in bfloat16.
    require(
        settings.optimizer != "adamw_bf16" or dtype != torch.float16,
        "The optimizer adamw_bf16 needs a device that computes in bf16, and this training computes "
        "in fp16. Choose adamw or adamw8bit, or set the compute dtype to bf16.",
    )
    name = "lora_B.weight" if kind == "lora" else kind
    with torch.inference_mode(False):
        make_optimizer(settings, {f"layer.{name}": nn.Parameter(torch.zeros(1))}, 1e-4)


def make_optimizer(
    settings: OptimizerSettings, parameters: Mapping[str, nn.Parameter], learning_rate: float
) -> torch.optim.Optimizer:
    """The optimizer of these parameters, all on one device, by their names in a LoRA.

    Raises:
        ValueError: if its package cannot be imported, or LoRA+ finds no B matrices.
    """
    groups = _groups(settings, parameters, learning_rate)
    name = settings.on(next(iter(parameters.values())).device.type).optimizer
    optimizer = _MAKERS[name](groups, learning_rate, settings.weight_decay)
    for group in optimizer.param_groups:
        group["initial_lr"] = float(group["lr"])
    if name in SCHEDULE_FREE:
        optimizer.train()  # pyright: ignore[reportAttributeAccessIssue]
    return optimizer


def cast_parameters(settings: OptimizerSettings, parameters: Iterable[nn.Parameter]) -> None:
    """Give them the type that the optimizer trains: float32, or bfloat16 of adamw_bf16 but for the
    magnitudes of a DoRA, which are vectors: rounded they would be no start at the base model."""
    if settings.optimizer == "adamw_bf16":
        for parameter in parameters:
            if parameter.ndim > 1:
                parameter.data = parameter.data.bfloat16()


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Give every group its learning rate times `factor`."""
    for group in optimizer.param_groups:
        rate = group["initial_lr"] * factor
        if isinstance(group["lr"], Tensor):  # torchao's
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def rate_of(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate of the first group; with Prodigy's step size in it."""
    group = optimizer.param_groups[0]
    return float(group["lr"]) * group.get("d", 1.0)


def clip_gradients(settings: OptimizerSettings, parameters: list[nn.Parameter]) -> float:
    """Clip them, and return the norm that they had together."""
    limit = settings.clip_limit
    norm = nn.utils.clip_grad_norm_(parameters, limit if settings.clipping == "norm" else math.inf)
    if settings.clipping == "value":
        nn.utils.clip_grad_value_(parameters, limit)
    return float(norm)


@contextmanager
def own_draws(seed: int, step: int, device: torch.device) -> Iterator[None]:
    """Within it torch's own random numbers follow from the step, and go on after it as before:
    rounding at random must be the same after a resume."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seeded(seed, "optimizer", step).initial_seed())
        yield


def _groups(
    settings: OptimizerSettings, parameters: Mapping[str, nn.Parameter], learning_rate: float
) -> _Groups:
    """One group; with LoRA+ the B matrices are in another one, and so are the magnitudes of a DoRA,
    which no decay may pull to zero: the base model's rows would go with them."""
    magnitudes = [p for name, p in parameters.items() if name.endswith(".magnitude")]
    others = {name: p for name, p in parameters.items() if not name.endswith(".magnitude")}
    own = [{"params": magnitudes, "weight_decay": 0.0}] if magnitudes else []
    if settings.lora_plus_ratio == 1:
        return [{"params": list(others.values())}, *own]
    b_matrices = {name: p for name, p in others.items() if ".lora_B." in name}
    if not b_matrices:
        raise ValueError(
            "LoRA+ trains the B matrices of a LoRA faster, and this kind of LoRA has none. Set "
            "lora_plus_ratio of Optimizer Settings to 1."
        )
    return [
        {"params": [p for name, p in others.items() if name not in b_matrices]},
        {"params": list(b_matrices.values()), "lr": learning_rate * settings.lora_plus_ratio},
        *own,
    ]


def _bitsandbytes(name: str, **options: Any) -> _Maker:
    def make(groups: _Groups, rate: float, decay: float) -> torch.optim.Optimizer:
        with importing("bitsandbytes"):
            optim = import_module("bitsandbytes.optim")
        return getattr(optim, name)(groups, lr=rate, weight_decay=decay, **options)

    return make


def _adamw(groups: _Groups, rate: float, decay: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=rate, weight_decay=decay)


def _adamw_bf16(groups: _Groups, rate: float, decay: float) -> torch.optim.Optimizer:
    with importing("torchao"):
        from torchao.optim import _AdamW

    class AdamW(_AdamW):
        """torchao compiles each step, which needs a compiler; the same arithmetic runs without."""

        def step(self, closure: Any = None) -> Any:
            with torch.compiler.set_stance("force_eager"):
                return super().step(closure)

    # The second moment is in bf16 too, where 0.999 of a value rounds to the value itself.
    return AdamW(
        groups,
        lr=rate,
        betas=(0.9, 0.99),
        weight_decay=decay,
        eps=1e-6,
        bf16_stochastic_round=True,
    )


def _lion(groups: _Groups, rate: float, decay: float) -> torch.optim.Optimizer:
    with importing("torch-optimi"):
        from optimi import Lion
    return Lion(groups, lr=rate, weight_decay=decay)


def _stableadamw(groups: _Groups, rate: float, decay: float) -> torch.optim.Optimizer:
    with importing("torch-optimi"):
        from optimi import StableAdamW
    return StableAdamW(groups, lr=rate, weight_decay=decay)


def _adafactor(groups: _Groups, rate: float, decay: float) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    # As the trainers of FLUX have it: at the learning rate that was asked for.
    return Adafactor(
        groups, lr=rate, weight_decay=decay, scale_parameter=False, relative_step=False
    )


def _came(groups: _Groups, rate: float, decay: float) -> torch.optim.Optimizer:
    with importing("pytorch-optimizer"):
        from pytorch_optimizer import CAME
    return CAME(groups, lr=rate, weight_decay=decay)


def _prodigy(groups: _Groups, rate: float, decay: float) -> torch.optim.Optimizer:
    with importing("prodigyopt"):
        from prodigyopt import Prodigy
    # The options of diffusers' script.
    return Prodigy(
        groups,
        lr=rate,
        weight_decay=decay,  # pyright: ignore[reportArgumentType]
        decouple=True,
        use_bias_correction=True,
        safeguard_warmup=True,
    )


def _prodigy_schedulefree(groups: _Groups, rate: float, decay: float) -> torch.optim.Optimizer:
    with importing("prodigy-plus-schedule-free"):
        from prodigyplus import ProdigyPlusScheduleFree
    # There is one group: this leaves out a line in the console that says so.
    return ProdigyPlusScheduleFree(groups, lr=rate, weight_decay=decay, split_groups=False)


def _adamw_schedulefree(groups: _Groups, rate: float, decay: float) -> torch.optim.Optimizer:
    with importing("schedulefree"):
        from schedulefree import AdamWScheduleFree
    return AdamWScheduleFree(groups, lr=rate, weight_decay=decay)


_MAKERS: dict[str, _Maker] = {
    # As the Hugging Face QLoRA script sets it up.
    "adamw8bit": _bitsandbytes("AdamW8bit", betas=(0.9, 0.999), eps=1e-8),
    "adamw8bit_paged": _bitsandbytes("PagedAdamW8bit", betas=(0.9, 0.999), eps=1e-8),
    "adamw": _adamw,
    "adamw_bf16": _adamw_bf16,
    "lion8bit": _bitsandbytes("Lion8bit"),
    "lion8bit_paged": _bitsandbytes("PagedLion8bit"),
    "lion": _lion,
    "stableadamw": _stableadamw,
    "adafactor": _adafactor,
    "came": _came,
    "ademamix8bit": _bitsandbytes("AdEMAMix8bit"),
    "prodigy": _prodigy,
    "prodigy_schedulefree": _prodigy_schedulefree,
    "adamw_schedulefree": _adamw_schedulefree,
}
