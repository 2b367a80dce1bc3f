"""Using LoRAs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..trainers.files import read_safetensors
from . import host
from .native import add_lora

FROM_WIRE = "from the lora input"


class ApplyLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="AtelierApplyLoRA",
            display_name="Apply LoRA",
            category="Atelier/lora",
            description="Puts a LoRA on a MODEL: one just trained, or a file. On a quantized model "
            "nothing is merged, so a changed strength costs no time and no precision.",
            search_aliases=["lora loader", "load lora"],
            inputs=[
                io.Model.Input("model", tooltip="Any MODEL."),
                io.Combo.Input(
                    "lora_name",
                    options=[FROM_WIRE, *host.model_names("loras")],
                    default=FROM_WIRE,
                    tooltip="A LoRA file, or the one connected to the lora input.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="1 is as trained, 0 is off, negative takes the style away.",
                ),
                io.LoraModel.Input(
                    "lora",
                    optional=True,
                    tooltip="The LoRA of Train LoRA, while lora_name says so.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The MODEL with the LoRA.")],
        )

    @classmethod
    def validate_inputs(cls, lora_name: str | None) -> bool | str:
        if lora_name is None:  # a linked input is not known yet
            return True
        try:
            _file(lora_name)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, lora_name: str, **_: Any) -> tuple[int, int] | None:
        file = _file(lora_name)
        return (file.stat().st_size, file.stat().st_mtime_ns) if file else None

    @classmethod
    def execute(
        cls, model: Any, lora_name: str, strength: float, lora: Any = None
    ) -> io.NodeOutput:
        return io.NodeOutput(add_lora(model, _tensors(lora_name, lora), strength))


def _tensors(lora_name: str, lora: Any) -> Any:
    file = _file(lora_name)
    if file is None:
        if lora is None:
            raise ValueError(
                "Apply LoRA has no LoRA: connect one to its lora input, or choose a file."
            )
        return lora
    if lora is not None:
        raise ValueError(
            f"Apply LoRA has two LoRAs: the file {lora_name} and the one on its lora input. "
            f"Disconnect the input, or set lora_name to '{FROM_WIRE}'."
        )
    return read_safetensors(file)[0]


def _file(lora_name: str) -> Path | None:
    """The chosen file, or None for the LoRA on the wire."""
    if lora_name == FROM_WIRE:
        return None
    path = host.model_file("loras", lora_name)
    if path is None:
        raise ValueError(f"The LoRA '{lora_name}' is not there any more. Press R and choose again.")
    return path
