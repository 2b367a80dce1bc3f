"""The node that draws a grid of pictures: prompts, LoRAs, checkpoints, strengths, guidance."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image

from ..trainers.checks import require
from ..trainers.config import require_file_name
from ..trainers.files import write_atomically
from ..trainers.grid import parse_numbers, sheet, table
from ..trainers.prompt_list import prompts_of_lines
from . import folders, host
from .grid_cells import Cells, Comparison, networks_identity
from .inputs import sampler_inputs
from .looks import NO_LORA, Look, looks_of_files, looks_of_run
from .validation import Sampler

NO_RUN = "none"
_RANGES = {"strengths": (-10.0, 10.0), "guidances": (0.0, 100.0), "cfgs": (0.0, 100.0)}


class CompareGrid(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="AtelierCompareGrid",
            display_name="Compare Grid",
            category="Atelier/lora",
            description="Draws every combination of prompts, LoRAs or checkpoints of a training, "
            "strengths and guidance, and puts the pictures on one sheet with labels. Each picture "
            "is kept at once: a grid that was stopped goes on where it was, and one that grows "
            "draws only what is new.",
            search_aliases=["xy plot", "xyz plot", "lora comparison", "checkpoint grid"],
            inputs=[*_networks(), *_compared(), *_shared(), *_optional()],
            outputs=[
                io.Image.Output(display_name="grid", tooltip="All pictures with their labels."),
                io.String.Output(
                    display_name="table",
                    tooltip="A line for each picture as CSV: its settings and its file.",
                ),
            ],
            is_output_node=True,
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
        )

    @classmethod
    def validate_inputs(
        cls,
        loras: str | None,
        strengths: str | None,
        guidances: str | None,
        cfgs: str | None,
        name: str | None,
        checkpoints: str | None = None,
    ) -> bool | str:
        numbers = {"strengths": strengths, "guidances": guidances, "cfgs": cfgs}
        try:
            for input_name, text in numbers.items():
                if text is not None:  # a linked input is not known yet
                    parse_numbers(text, input_name, *_RANGES[input_name])
            if name is not None:
                require_file_name(name)
            looks_of_files(loras or "")
            _steps(checkpoints or "")
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(
        cls,
        loras: str | None = "",
        run: str | None = NO_RUN,
        checkpoints: str | None = "",
        **_: Any,
    ) -> list[tuple[str, int, int]]:
        # A linked input is not known yet; what it gives is a change of its own.
        looks = [*looks_of_files(loras or ""), *_looks_of_run(run or NO_RUN, checkpoints or "")]
        return folders.fingerprints(look.path for look in looks if look.path)

    @classmethod
    def execute(cls, model: Any, clip: Any, vae: Any, **settings: Any) -> io.NodeOutput:
        node_id = cls.hidden.unique_id
        comparison = _comparison(settings)
        networks = networks_identity(cls.hidden.dynprompt, node_id, model)
        shared = hashlib.sha256((networks + comparison.identity()).encode()).hexdigest()[:8]
        folder = folders.atelier_output() / "grids" / f"{settings['name']}-{shared}"
        cells = Cells(folder, comparison)
        num_drawn = len(cells.missing())
        warnings = cells.draw(model, clip, vae, lambda text: host.show_text(text, node_id))
        image = sheet(
            settings["name"],
            comparison.facts,
            comparison.axes,
            (comparison.width, comparison.height),
            lambda place: Image.open(cells.path(place)),
        )
        write_atomically(folder / "grid.png", lambda file: image.save(file, format="PNG"))
        text = table(cells.rows())
        write_atomically(folder / "grid.csv", lambda file: _write(file, text))
        pixels = torch.from_numpy(np.array(image)).float()[None] / 255
        message = f"Pictures: {len(cells)}, new: {num_drawn}, in {folder}."
        return io.NodeOutput(pixels, text, ui=host.report(node_id, message, *warnings))


def _networks() -> list[Any]:
    return [
        io.Model.Input("model", tooltip="The FLUX on which the LoRAs are put."),
        io.Clip.Input("clip", tooltip="The text encoders, for the prompts."),
        io.Vae.Input("vae", tooltip="The autoencoder, for the pictures."),
    ]


def _compared() -> list[Any]:
    return [
        io.String.Input(
            "prompts",
            default="",
            multiline=True,
            tooltip="One prompt in each line: the rows of the grid.",
        ),
        io.String.Input(
            "negative",
            default="",
            tooltip="What should not be in the pictures. It has an effect where cfg is above 1.",
        ),
        io.String.Input(
            "loras",
            default=NO_LORA,
            multiline=True,
            tooltip="One LoRA file in each line, by its name as Apply LoRA lists it; none is the "
            "model alone. Its layers for text encoders act too.",
        ),
        io.Combo.Input(
            "run",
            options=[NO_RUN, *folders.run_ids()],
            default=NO_RUN,
            tooltip="A training whose checkpoints come after the LoRA files.",
        ),
        _numbers("strengths", "1", tooltip="Strengths of the LoRAs, with commas: 0.5, 1."),
        _numbers(
            "guidances", "3.5", tooltip="Guidance of FLUX.1-dev, as FluxGuidance sets it: 2.5, 3.5."
        ),
        _numbers("cfgs", "1", tooltip="True classifier-free guidance, as in KSampler: 1 is off."),
    ]


def _shared() -> list[Any]:
    return [
        *sampler_inputs(),
        *(
            io.Int.Input(
                side,
                default=1024,
                min=64,
                max=8192,
                step=16,
                tooltip=f"The {side} of each picture in pixels. On the sheet they are smaller if "
                "there are many.",
            )
            for side in ("width", "height")
        ),
        io.String.Input(
            "name",
            default="grid",
            tooltip="Name of the folder in output/atelier/grids, and title of the sheet.",
        ),
    ]


def _optional() -> list[Any]:
    return [
        io.String.Input(
            "checkpoints",
            default="",
            optional=True,
            tooltip="Which checkpoints of the run, by their steps: 250, 500. Empty takes all.",
        ),
        io.String.Input(
            "trained",
            optional=True,
            force_input=True,
            tooltip="The lora_name of Train LoRA, whose checkpoints are compared, in place of run.",
        ),
    ]


def _numbers(name: str, default: str, *, tooltip: str) -> Any:
    return io.String.Input(name, default=default, tooltip=tooltip)


def _comparison(settings: dict[str, Any]) -> Comparison:
    prompts = tuple(prompt.text for prompt in prompts_of_lines(settings["prompts"]))
    require(bool(prompts), "Compare Grid has no prompt. Write one in each line of prompts.")
    trained, run = settings.get("trained"), settings["run"]
    require(
        not trained or run == NO_RUN,
        f"Compare Grid has two trainings: the one connected to trained, and {run}. Disconnect "
        f"trained, or set run to '{NO_RUN}'.",
    )
    run = _run_of(trained) if trained else run
    looks = looks_of_files(settings["loras"]) + _looks_of_run(run, settings.get("checkpoints", ""))
    numbers = {
        name: parse_numbers(settings[name], name, *limits) for name, limits in _RANGES.items()
    }
    return Comparison(
        prompts=prompts,
        negative=settings["negative"],
        looks=looks or looks_of_files(NO_LORA),
        **numbers,
        width=settings["width"],
        height=settings["height"],
        sampler=Sampler(
            steps=settings["steps"],
            seed=settings["seed"],
            name=settings["sampler_name"],
            scheduler=settings["scheduler"],
        ),
    )


def _looks_of_run(run: str, checkpoints: str) -> tuple[Look, ...]:
    if run == NO_RUN:
        return ()
    return looks_of_run(folders.atelier_output() / run, _steps(checkpoints))


def _run_of(lora_name: str) -> str:
    """The id of the run that wrote a LoRA file, such as my_lora-1a2b3c4d-000500.safetensors."""
    run = Path(lora_name).stem.rpartition("-")[0]
    require(
        run in folders.run_ids(),
        f"'{lora_name}' is not the LoRA of a training in output/atelier. Connect the lora_name of "
        "Train LoRA to trained, or choose a run.",
    )
    return run


def _steps(text: str) -> list[int]:
    words = text.replace(",", " ").split()
    require(
        all(word.isdecimal() for word in words),
        f"checkpoints must be steps with commas between them, such as '250, 500', got {text!r}.",
    )
    return sorted({int(word) for word in words})


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
