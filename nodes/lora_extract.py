"""Node that makes a LoRA of the difference of two models."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..trainers.lora_export import exported, ranks
from ..trainers.lora_extract import extract_lora
from ..trainers.lora_file import LoraTensors
from . import host
from .native import to_training_device
from .trainable import model_to_train


class ExtractLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="AtelierExtractLoRA",
            display_name="Extract LoRA",
            category="Atelier/lora",
            description="Makes a LoRA of the difference of two FLUX.1 MODELs, such as a fine-tuned "
            "one and the one it was made from. LoRAs that they carry count.",
            search_aliases=["lora difference", "svd", "model difference"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input("model", tooltip="The changed MODEL, of any loader."),
                io.Model.Input(
                    "model_base",
                    tooltip="The one it was made from. Load both in bf16: what packing loses is a "
                    "difference too.",
                ),
                io.Int.Input(
                    "rank",
                    default=32,
                    min=1,
                    max=1024,
                    tooltip="The highest rank of a matrix. The higher, the nearer, and the larger "
                    "the file.",
                ),
                io.Float.Input(
                    "energy",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="The share of each matrix's squared difference that is enough: a "
                    "matrix that reaches it sooner gets a smaller rank. 1: all get the rank above.",
                ),
            ],
            outputs=[
                io.LoraModel.Output(
                    display_name="lora", tooltip="The difference, for Apply LoRA or Export LoRA."
                )
            ],
        )

    @classmethod
    def execute(cls, model: Any, model_base: Any, rank: int, energy: float) -> io.NodeOutput:
        given = [model_to_train(one) for one in (model_base, model)]
        for one in given:
            one.require_memory()
            to_training_device(one.load(), 0)
        base, tuned = (one.base for one in given)
        found = extract_lora(
            tuned, base, rank=rank, energy=energy, on_progress=host.Progress().update
        )
        tensors = exported(found.lora, "comfyui")
        modules, span = ranks(tensors)
        variant = "dev" if base.config.guidance else "schnell"
        metadata = {"modelspec.architecture": f"flux-1-{variant}/lora"}
        others = (
            f"Biases and norms that differ too, and that a LoRA cannot hold: {found.num_others}.",
        )
        return io.NodeOutput(
            LoraTensors(tensors, metadata=metadata, name="extracted"),
            ui=host.report(
                cls.hidden.unique_id,
                f"Extracted: {found.kept:.1%} of the squared difference; modules: {modules}, of "
                f"rank {span}.",
                *(others if found.num_others else ()),
            ),
        )
