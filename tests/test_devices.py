"""What a device is said to do; none but the CPU is needed to ask."""

import sys

import pytest
import torch
from atelier.trainers.devices import describe_device, require_format_on, require_trainable_on
from atelier.trainers.formats import FORMATS
from atelier.trainers.optimizer_settings import OPTIMIZERS, OptimizerSettings
from atelier.trainers.optimizers import make_optimizer
from torch import nn


@pytest.mark.parametrize(("device", "named"), [("cpu", "CPU"), ("mps", "Apple"), ("xpu", "Intel")])
def test_every_kind_of_device_has_its_sentence(device: str, named: str) -> None:
    sentence = describe_device(torch.device(device))
    assert named in sentence
    assert sentence.endswith(".")


@pytest.mark.parametrize(
    ("capability", "hip", "named"),
    [((8, 6), None, "bf16"), ((7, 5), None, "fp16"), ((11, 0), "6.4", "AMD")],
)
def test_cuda_devices_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], hip: str | None, named: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert named in describe_device(torch.device("cuda"))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_apples_gpus_are_refused_for_the_optimizers_of_bitsandbytes(
    monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    parameters = {"lora_B.weight": nn.Parameter(torch.zeros(2, 2))}
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "bitsandbytes.optim", raising=False)
    require_trainable_on(torch.device("cpu"), optimizer)
    try:
        make_optimizer(OptimizerSettings(optimizer=optimizer), parameters, 1e-4)
    except ValueError:
        with pytest.raises(ValueError, match=rf"^The optimizer {optimizer} does not run on Apple"):
            require_trainable_on(torch.device("mps"), optimizer)
    else:
        require_trainable_on(torch.device("mps"), optimizer)


def test_only_fp8_is_refused_on_apples_gpus() -> None:
    for format in FORMATS.keys() - {"fp8"}:
        require_format_on(format, torch.device("mps"))
    for device in ("cpu", "cuda", "cuda:1", "xpu"):
        require_format_on("fp8", device)
    for device in (torch.device("mps"), torch.device("mps", 0), "mps"):
        with pytest.raises(ValueError, match=r"^Apple's GPUs cannot hold .* as nf4; or"):
            require_format_on("fp8", device)


def test_without_bitsandbytes_it_is_said_what_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with_it = describe_device(torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    sentence, missing = describe_device(torch.device("cpu")).splitlines()
    assert sentence == with_it
    assert missing.startswith("The package bitsandbytes is missing here, ")
    assert "nf4 and fp4" in missing
