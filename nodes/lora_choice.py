"""Which LoRA a node takes: a file, or the one on its wire."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..trainers.lora_file import LoraTensors, read_lora, require_sound
from . import folders

FROM_WIRE = "from the lora input"
NONE = "none"
ON_THE_WIRE = "on the wire"
"""What a LoRA is called that has no file."""
_STYLES = Path(__file__).parent.parent / "assets" / "nano" / "styles"


def lora_names() -> list[str]:
    """What can be chosen: the files that ComfyUI lists, then the styles of the nano model."""
    return [*folders.model_names("loras"), *_built_in()]


def _built_in() -> dict[str, Path]:
    return {f"nano {path.stem} (built in)": path for path in sorted(_STYLES.glob("*.safetensors"))}


def lora_input(name: str, first: str) -> Any:
    """A list of the LoRA files, after `first`: FROM_WIRE or NONE."""
    where = "the one connected to the lora input" if first == FROM_WIRE else "none"
    return io.Combo.Input(
        name,
        options=[first, *lora_names()],
        default=first,
        tooltip=f"A LoRA file, or {where}.",
    )


def lora_file(lora_name: str) -> Path:
    """The file of this name.

    Raises:
        ValueError: if it is gone.
    """
    path = _built_in().get(lora_name) or folders.model_file("loras", lora_name)
    if path is None:
        raise ValueError(f"The LoRA '{lora_name}' is not there any more. Press R and choose again.")
    return path


def chosen_lora(node: str, lora_name: str, lora: Any) -> LoraTensors:
    """The LoRA that a node called `node` works with.

    Raises:
        ValueError: if there is none, or two, or it cannot be used.
    """
    if lora_name != FROM_WIRE:
        if lora is not None:
            raise ValueError(
                f"{node} has two LoRAs: the file {lora_name} and the one on its lora input. "
                f"Disconnect the input, or set lora_name to '{FROM_WIRE}'."
            )
        return read_lora(lora_file(lora_name))
    if lora is None:
        raise ValueError(f"{node} has no LoRA: connect one to its lora input, or choose a file.")
    require_sound(lora, ON_THE_WIRE)
    return lora if isinstance(lora, LoraTensors) else LoraTensors(lora)


def checked(*lora_names: str | None) -> bool | str:
    """For `validate_inputs`: whether the files are there; a linked input, None, is not known."""
    try:
        for name in lora_names:
            if name and name not in (FROM_WIRE, NONE):
                lora_file(name)
    except ValueError as error:
        return str(error)
    return True


def versions(*lora_names: str | None) -> list[tuple[str, int, int]]:
    """For `fingerprint_inputs`: what changes with the files; a linked input, None, is not known."""
    return folders.fingerprints(
        lora_file(name) for name in lora_names if name and name not in (FROM_WIRE, NONE)
    )
