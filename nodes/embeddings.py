"""Nodes that bring embeddings of captions from the QLoRA recipe, and take ours there."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..trainers.caches import PromptCache
from ..trainers.config import require_file_name
from ..trainers.dataset import Dataset
from ..trainers.embeddings_parquet import export_embeddings, import_embeddings
from ..trainers.shards import Shards
from . import folders, host
from .wires import AtelierDataset, AtelierPromptCache


class ImportEmbeddings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="AtelierImportEmbeddings",
            display_name="Import Embeddings",
            category="Atelier/dataset",
            description="Takes the encoded captions from an embeddings.parquet of Hugging Face's "
            "QLoRA recipe, in place of Encode Prompts: no text encoder is needed. Its rows are "
            "found by the pixels of the pictures.",
            search_aliases=["embeddings.parquet", "compute_embeddings"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                AtelierDataset.Input(
                    "dataset",
                    tooltip="The pictures of the file, with one caption each. Only that two "
                    "pictures have the same caption matters, not its words.",
                ),
                io.Combo.Input(
                    "file",
                    options=folders.dataset_files((".parquet",)),
                    tooltip="A parquet file below ComfyUI's input folder, with the columns "
                    "image_hash, prompt_embeds, pooled_prompt_embeds and text_ids. Press R to list "
                    "new files.",
                ),
            ],
            outputs=[
                AtelierPromptCache.Output(
                    display_name="prompts", tooltip="The encoded captions, for Train LoRA."
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, **_: Any) -> list[Any]:
        stat = folders.dataset_file(file).stat()
        mark = Shards(folders.cache_folder("prompts")).generation()
        return [mark, stat.st_size, stat.st_mtime_ns]

    @classmethod
    def execute(cls, dataset: Dataset, file: str) -> io.NodeOutput:
        prompts = import_embeddings(
            dataset,
            folders.dataset_file(file),
            folders.cache_folder("prompts"),
            host.Progress().update,
        )
        done = f"Captions imported: {len(prompts.entries)}, of {prompts.length} tokens."
        return io.NodeOutput(prompts, ui=host.report(cls.hidden.unique_id, done))


class ExportEmbeddings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="AtelierExportEmbeddings",
            display_name="Export Embeddings",
            category="Atelier/dataset",
            description="Writes encoded captions as an embeddings.parquet that the training script "
            "of Hugging Face's QLoRA recipe reads, with one row for each picture.",
            search_aliases=["embeddings.parquet"],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            inputs=[
                AtelierDataset.Input("dataset", tooltip="The pictures, with one caption each."),
                AtelierPromptCache.Input(
                    "prompts",
                    tooltip="Their encoded captions, from Encode Prompts. The script takes 77 "
                    "tokens.",
                ),
                io.String.Input(
                    "name",
                    default="embeddings",
                    tooltip="Name of the file in output/atelier/embeddings. A file of this name is "
                    "replaced.",
                ),
            ],
            outputs=[io.String.Output(display_name="file", tooltip="Path of the file.")],
        )

    @classmethod
    def validate_inputs(cls, name: str | None) -> bool | str:
        try:
            if name is not None:  # a linked input is not known yet
                require_file_name(name)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, dataset: Dataset, prompts: PromptCache, name: str) -> io.NodeOutput:
        require_file_name(name)
        path = folders.atelier_output() / "embeddings" / f"{name}.parquet"
        rows = export_embeddings(dataset, prompts, path, host.Progress().update)
        done = f"Rows written: {rows}, to {path}."
        return io.NodeOutput(str(path), ui=host.report(cls.hidden.unique_id, done))
