"""Nodes that make LoRA files of others: other formats and ranks, several as one."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..trainers.checks import require
from ..trainers.config import require_file_name
from ..trainers.flux_lora import parse_flux_lora
from ..trainers.lora_export import (
    DTYPES,
    FORMATS,
    balanced,
    exported,
    merged,
    ranks,
    resized,
    rounded,
)
from ..trainers.lora_file import LoraTensors
from ..trainers.lora_metadata import merged_metadata, resized_metadata, save_export
from . import folders, host
from .lora_choice import FROM_WIRE, NONE, checked, chosen_lora, lora_file, lora_input, versions
from .lora_losses import (
    cut,
    cut_lokrs,
    cut_sum,
    left_out,
    of_different_bases,
    rounded_to_zero,
    unlike_in_diffusers,
)

NUM_MERGED = 4


class ExportLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="AtelierExportLoRA",
            display_name="Export LoRA",
            category="Atelier/lora",
            description="Writes a LoRA of FLUX.1 as a file for other programs: diffusers, ComfyUI, "
            "kohya's tools. Reads the files of every trainer, and can make them smaller.",
            search_aliases=["convert lora", "save lora", "resize lora", "lora rank"],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            inputs=[
                lora_input("lora_name", FROM_WIRE),
                io.Combo.Input(
                    "format",
                    options=[*FORMATS],
                    default=FORMATS[0],
                    tooltip="Whose names: diffusers, which ComfyUI reads too; comfyui, the "
                    "original names; kohya, for sd-scripts and what reads its files.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=[*DTYPES],
                    default="fp32",
                    tooltip="fp32 keeps every digit. bf16 and fp16 take half; fp16 is the finer of "
                    "the two.",
                ),
                _rank(tooltip="Of each module. 0: as it is. A smaller one keeps what matters."),
                io.String.Input(
                    "name",
                    default="exported",
                    tooltip="Name of the file in output/loras. A file of this name is replaced.",
                ),
                io.LoraModel.Input(
                    "lora", optional=True, tooltip="A LoRA, while lora_name says so."
                ),
                io.String.Input(
                    "trigger_words",
                    default="",
                    optional=True,
                    tooltip="Words that call up what the LoRA learned, with commas between, for "
                    "the file's metadata. Empty: those that it has.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="lora_name", tooltip="Name of the file."),
                io.LoraModel.Output(display_name="lora", tooltip="What is in it."),
            ],
        )

    @classmethod
    def validate_inputs(cls, lora_name: str | None, name: str | None) -> bool | str:
        try:
            if name is not None:  # a linked input is not known yet
                require_file_name(name)
        except ValueError as error:
            return str(error)
        return checked(lora_name)

    @classmethod
    def fingerprint_inputs(cls, lora_name: str | None = None, **_: Any) -> list[Any]:
        return versions(lora_name)

    @classmethod
    def execute(
        cls,
        lora_name: str,
        format: str,
        dtype: str,
        rank: int,
        name: str,
        lora: Any = None,
        trigger_words: str = "",
    ) -> io.NodeOutput:
        require_file_name(name)
        path = folders.lora_folder() / f"{name}.safetensors"
        if lora_name != FROM_WIRE:
            require(
                path.resolve() != lora_file(lora_name).resolve(),
                f"'{name}' is the name of the LoRA that is exported. Choose another name.",
            )
        given = chosen_lora("Export LoRA", lora_name, lora)
        parsed = parse_flux_lora(given, given.name or "on the wire")
        whole = resized(parsed, rank) if rank else parsed
        metadata = resized_metadata(given.metadata, whole) if rank else dict(given.metadata)
        if trigger_words.strip():
            metadata["modelspec.trigger_phrase"] = trigger_words.strip()
        precise = whole if dtype == "fp32" else balanced(whole)
        exact = exported(precise, format)
        tensors = rounded(exact, DTYPES[dtype])
        save_export(path, tensors, metadata)
        size, (modules, span) = path.stat().st_size / 1e6, ranks(tensors)
        said = f"Written: {path.name}, {size:.1f} MB; modules: {modules}, of rank {span}."
        return io.NodeOutput(
            path.name,
            LoraTensors(tensors, metadata=metadata, name=name),
            ui=host.report(
                cls.hidden.unique_id,
                said,
                *left_out(parsed),
                *cut(parsed, whole),
                *rounded_to_zero(exact, tensors),
                *unlike_in_diffusers(precise, format),
            ),
        )


class MergeLoras(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="AtelierMergeLoRAs",
            display_name="Merge LoRAs",
            category="Atelier/lora",
            description="Makes one LoRA of several: their weighted sum, exactly, or as near as a "
            "smaller rank can be.",
            search_aliases=["combine loras", "lora sum"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                *_slots(),
                _rank(
                    tooltip="Of each module of the sum. 0: as high as the sum needs, which is "
                    "exact. A LoKr needs a rank."
                ),
            ],
            outputs=[
                io.LoraModel.Output(
                    display_name="lora", tooltip="The sum, for Apply LoRA or Export LoRA."
                )
            ],
        )

    @classmethod
    def validate_inputs(
        cls, lora_1: str | None, lora_2: str | None, lora_3: str | None, lora_4: str | None
    ) -> bool | str:
        return checked(lora_1, lora_2, lora_3, lora_4)

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> list[Any]:
        return versions(*(inputs.get(f"lora_{number}") for number in range(1, NUM_MERGED + 1)))

    @classmethod
    def execute(cls, rank: int, **slots: Any) -> io.NodeOutput:
        numbers = range(1, NUM_MERGED + 1)
        names = {n: slots[f"lora_{n}"] for n in numbers if slots[f"lora_{n}"] != NONE}
        require(bool(names), "There is no LoRA to merge: choose at least one file.")
        given = [chosen_lora("Merge LoRAs", name, None) for name in names.values()]
        weights = [slots[f"weight_{number}"] for number in names]
        parsed = [parse_flux_lora(lora, lora.name) for lora in given]
        whole = merged([*zip(parsed, weights, strict=True)], rank)
        smaller = resized(whole, rank) if rank else whole
        tensors = exported(smaller, "diffusers")
        repeated = {name for name in names.values() if [*names.values()].count(name) > 1}
        warnings = [f"'{name}' is there more than once: its weights add up." for name in repeated]
        modules, span = ranks(tensors)
        metadata = merged_metadata([*zip(given, weights, strict=True)])
        return io.NodeOutput(
            LoraTensors(tensors, metadata=metadata, name="merged"),
            ui=host.report(
                cls.hidden.unique_id,
                f"LoRAs merged: {len(given)}; modules: {modules}, of rank {span}.",
                *warnings,
                *of_different_bases(given),
                *(warning for lora in parsed for warning in left_out(lora)),
                *(
                    said
                    for name, lora in zip(names.values(), parsed, strict=True)
                    for said in cut_lokrs(name, lora, rank)
                ),
                *cut_sum(whole, smaller),
            ),
        )


def _rank(*, tooltip: str) -> Any:
    return io.Int.Input("rank", default=0, min=0, max=4096, tooltip=tooltip)


def _slots() -> list[Any]:
    slots = []
    for number in range(1, NUM_MERGED + 1):
        slots += [
            lora_input(f"lora_{number}", NONE),
            io.Float.Input(
                f"weight_{number}",
                default=1.0,
                min=-10.0,
                max=10.0,
                step=0.05,
                tooltip="1 is as trained; negative takes the style away.",
            ),
        ]
    return slots
