"""Packages that a ComfyUI may lack, or have in a version that does not fit its others.

Standard library only: a test runs this file with the Python of a host that has nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

_NEEDED = {
    "diffusers": "diffusers>=0.33.0",
    "bitsandbytes": "bitsandbytes>=0.50.0",  # the first with AdamW8bit on CPUs
    "pyarrow": "pyarrow>=16.1.0",
    "tensorboard": "tensorboard>=2.18.0",  # the first for numpy 2
    "torch-optimi": "torch-optimi>=0.3.0",
    "pytorch-optimizer": "pytorch-optimizer>=4.0.0",
    "prodigyopt": "prodigyopt>=1.1.0",
    "prodigy-plus-schedule-free": "prodigy-plus-schedule-free>=2.0.0",
    "schedulefree": "schedulefree>=1.4.0",
    "torchao": "torchao>=0.18.0",
    "wandb": "wandb>=0.30.0",  # logins that never ask, and an end that does not wait for a network
}
_HELD = ("torch", "transformers", "huggingface_hub", "safetensors", "protobuf")
"""What the host, or another pack, needs in its version; pip would replace them for the newest of
ours."""


@contextmanager
def importing(package: str) -> Iterator[None]:
    """Around an import from one of our packages.

    Raises:
        ValueError: if it cannot be imported or is too old, with the command that helps.
    """
    try:
        if _numbers(version(package)) < _numbers(_NEEDED[package].partition(">=")[2]):
            raise ImportError(version(package))
        yield
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        # diffusers' lazy modules raise RuntimeError; one made for another torch finds no name, or
        # no library of it.
        raise ValueError(
            f"The package {package} is missing, or does not fit the others here. Run this with the "
            f"Python of ComfyUI, then start ComfyUI again: {install_command(package)}"
        ) from error


def is_usable(package: str) -> bool:
    """Whether one of our packages can be imported, in a version that is new enough."""
    try:
        with importing(package):
            import_module(package)
    except ValueError:
        return False
    return True


def _is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _numbers(version: str) -> list[int]:
    """[0, 50, 0] of "0.50.0.dev0", to compare."""
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


def install_command(package: str) -> str:
    """One command for `package` that leaves the host's own packages as they are."""
    # Three signs: 2.13.0 would also be replaced by a 2.13.0+cpu.
    held = [f"{name}==={version(name)}" for name in _HELD if _is_installed(name)]
    quoted = " ".join(f'"{requirement}"' for requirement in [_NEEDED[package], *held])
    return f"python -m pip install --upgrade {quoted}"
