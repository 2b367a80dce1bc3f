"""What a training will take, before it is started."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..trainers.config import PROMPT_LENGTH
from ..trainers.devices import compute_dtype as resolve_dtype
from ..trainers.devices import describe_device, system_memory
from ..trainers.eight_bit import require_products
from ..trainers.formats import FORMATS
from ..trainers.hub import inspect_hub_flux
from ..trainers.load import inspect_flux
from ..trainers.lora_settings import LoraSettings
from ..trainers.memory import Workload, store_bytes
from ..trainers.optimizer_settings import OptimizerSettings
from ..trainers.plan import Plan
from ..trainers.preflight import describe
from ..trainers.speed_settings import SpeedSettings
from . import host
from .inputs import shared_input
from .loaders import model_names, model_path


class EstimateMemory(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="AtelierEstimateMemory",
            display_name="Estimate Memory",
            category="Atelier/training",
            description="Says what a training will take of the card's memory and of the system's, "
            "whether it fits, and what would fit instead. Reads only the headers of the model's "
            "files.",
            search_aliases=["vram", "memory", "out of memory"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "model",
                    options=model_names(),
                    tooltip="The model that will be trained on, as in Load Quantized FLUX.",
                ),
                io.Combo.Input(
                    "format",
                    options=list(FORMATS),
                    default="nf4",
                    tooltip="How its weights will be kept.",
                ),
                io.Int.Input(
                    "width",
                    default=512,
                    min=16,
                    max=8192,
                    step=16,
                    tooltip="Width of the largest pictures, in pixels.",
                ),
                io.Int.Input(
                    "height",
                    default=768,
                    min=16,
                    max=8192,
                    step=16,
                    tooltip="Height of the largest pictures, in pixels.",
                ),
                io.Int.Input(
                    "prompt_length",
                    default=PROMPT_LENGTH,
                    min=8,
                    max=512,
                    tooltip="Tokens of a caption, as in Encode Prompts.",
                ),
                shared_input("batch_size"),
                shared_input("gradient_accumulation"),
                shared_input("rank"),
                shared_input("targets"),
                shared_input("compute_dtype"),
                shared_input("gradient_checkpointing"),
                shared_input("activations_in_ram"),
                host.make_input(
                    io.String,
                    "hub_id",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="A Hugging Face repository that takes the place of model, as in Load "
                    "Quantized FLUX. Only the headers of its files are read: no model is "
                    "downloaded.",
                ),
                shared_input("lora_settings"),
                shared_input("optimizer_settings"),
                shared_input("speed_settings"),
                host.make_input(
                    io.Boolean,
                    "references",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Whether each picture has a reference of its size, as FLUX.1-Kontext "
                    "is trained.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.String.Output(display_name="report", tooltip="What is needed, in words."),
                io.Float.Output(
                    display_name="reserve_gb",
                    tooltip="What is needed beside the weights, in GB: for the input reserve_gb of "
                    "Load Quantized FLUX with format auto.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls, model: str, format: str, gradient_accumulation: int, hub_id: str = "", **settings
    ) -> io.NodeOutput:
        config = inspect_hub_flux(hub_id) if hub_id else inspect_flux(model_path(model)).config
        plan = Plan(
            config=config,
            format=format,
            weights=store_bytes(config, format),
            workload=_workload(accumulates=gradient_accumulation > 1, **settings),
            device=host.compute_device(),
            streaming="auto",
        )
        require_products(plan.workload.speed.products, plan.device, format)
        lines = describe(plan, host.free_memory(), system_memory())
        report = "\n".join([*lines, describe_device(plan.device)])
        host.show_text(report, cls.hidden.unique_id)
        return io.NodeOutput(report, plan.needed.beside_weights / 1e9, ui=ui.PreviewText(report))


def _workload(
    *,
    rank: int,
    targets: str,
    compute_dtype: str,
    lora_settings: LoraSettings | None = None,
    optimizer_settings: OptimizerSettings | None = None,
    speed_settings: SpeedSettings | None = None,
    references: bool = False,
    **others,
) -> Workload:
    return Workload(
        reference_width=others["width"] if references else 0,
        reference_height=others["height"] if references else 0,
        lora=lora_settings or LoraSettings(rank=rank, targets=targets),
        optimizer=(optimizer_settings or OptimizerSettings()).on(host.compute_device().type),
        speed=speed_settings or SpeedSettings(),
        dtype=resolve_dtype(compute_dtype, host.compute_device()),
        **others,
    )
