"""A node that shows what a training will see of a dataset."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from comfy_api.latest import io, ui

from ..trainers.config import PROMPT_LENGTH, TrainSettings
from ..trainers.contact_sheet import contact_sheet
from ..trainers.dataset import Dataset
from ..trainers.inspection import report
from . import host
from .encoders import cut_sentences, unknown_texts
from .inputs import shared_input
from .wires import AtelierDataset


class InspectDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="AtelierInspectDataset",
            display_name="Inspect Dataset",
            category="Atelier/dataset",
            description="Shows the pictures of a dataset as they will be trained: crops, masks, "
            "sizes and captions on a contact sheet, and in words what an epoch is and what is "
            "probably not meant. Needs no model.",
            search_aliases=["contact sheet", "preview dataset", "dataset report", "debug dataset"],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            inputs=[
                AtelierDataset.Input("dataset", tooltip="What to look at."),
                io.Int.Input(
                    "length",
                    default=PROMPT_LENGTH,
                    min=8,
                    max=512,
                    tooltip="T5 tokens of a caption, as in Encode Prompts: the report names "
                    "captions that are longer.",
                ),
                shared_input("batch_size"),
                shared_input("gradient_accumulation"),
                io.Int.Input(
                    "max_pictures",
                    default=48,
                    min=1,
                    max=240,
                    tooltip="Pictures on a sheet. Only these are decoded; the report is about all.",
                ),
                io.Int.Input(
                    "page",
                    default=1,
                    min=1,
                    max=1_000_000,
                    tooltip="Which sheet is drawn, when the dataset has more pictures than one "
                    "holds.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="sheet", tooltip="The contact sheet, for Save Image."),
                io.String.Output(display_name="report", tooltip="The report, a sentence a line."),
            ],
        )

    @classmethod
    def execute(
        cls,
        dataset: Dataset,
        length: int,
        batch_size: int,
        gradient_accumulation: int,
        max_pictures: int,
        page: int,
    ) -> io.NodeOutput:
        sheet = contact_sheet(
            dataset,
            page=page,
            pictures_per_page=max_pictures,
            on_progress=host.Progress().update,
        )
        settings = TrainSettings(batch_size=batch_size, gradient_accumulation=gradient_accumulation)
        words = [*report(dataset, settings), *_captions(dataset.texts, length), *sheet.unreadable]
        image = torch.from_numpy(np.array(sheet.image, dtype=np.float32) / 255)[None]
        shown: dict[str, Any] = {
            **ui.PreviewImage(image).as_dict(),
            **host.report(cls.hidden.unique_id, *words),
        }
        return io.NodeOutput(image, "\n".join(words), ui=shown)


def _captions(texts: tuple[str, ...], length: int) -> list[str]:
    sentences, unknown = cut_sentences(texts, length), unknown_texts(texts)
    if unknown:
        sentences.append(
            "Captions with signs that T5 does not know, such as Chinese, which it cannot learn "
            f"from: {len(unknown)}, for example {unknown[0][:60]!r}. Write these in English."
        )
    return sentences
