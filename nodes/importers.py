"""Nodes that read datasets which were made for other programs."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..trainers.import_dataset import imported_files, plan_import, read_import
from ..trainers.import_settings import CONFIG_EXTENSIONS, Places, Plan
from ..trainers.scan import ON_BAD_FILE
from . import host
from .dataset import dataset_output
from .wires import AtelierDataset


class ImportDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="AtelierImportDataset",
            display_name="Import Dataset",
            category="Atelier/dataset",
            description="A dataset configuration of kohya's sd-scripts (TOML), ai-toolkit (YAML) "
            "or SimpleTuner (JSON) as a dataset. What has no counterpart here is listed.",
            search_aliases=["kohya", "sd-scripts", "ai-toolkit", "simpletuner", "multidatabackend"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=host.dataset_files(CONFIG_EXTENSIONS),
                    tooltip="A configuration below ComfyUI's input folder. The folders that it "
                    "names must lie beside it or below input/ too. Repeats are converted: kohya's "
                    "and ai-toolkit's 1 is once per epoch, SimpleTuner's 0 is once. Press R to "
                    "list new files.",
                ),
                host.make_input(
                    io.Combo,
                    "on_bad_file",
                    options=list(ON_BAD_FILE),
                    default=ON_BAD_FILE[0],
                    advanced=True,
                    tooltip="A file that has a picture's name and is none, cannot be read, or has "
                    "no right mask. stop: end with its name. skip: go on without it, and say so.",
                ),
            ],
            outputs=[
                AtelierDataset.Output(
                    display_name="dataset",
                    tooltip="The description of the pictures, for Cache Latents and Encode "
                    "Prompts, with the schedule of each part.",
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str | None) -> bool | str:
        try:
            if file is not None:  # a linked input is not known yet
                _plan(file)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, file: str, **_: Any) -> list[tuple[str, int, int]]:
        plan = _plan(file)
        return host.fingerprints([host.dataset_file(file), *imported_files(plan)])

    @classmethod
    def execute(cls, file: str, on_bad_file: str) -> io.NodeOutput:
        plan = _plan(file)
        dataset = read_import(
            plan,
            on_bad_file=on_bad_file,
            index_folder=host.cache_folder("files"),
            on_progress=host.Progress().update,
        )
        return dataset_output(dataset, cls.hidden.unique_id, *plan.notes)


def _plan(file: str) -> Plan:
    return plan_import(Places(config=host.dataset_file(file), roots=tuple(host.dataset_roots())))
