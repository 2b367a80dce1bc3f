"""A LoRA file to the Hugging Face Hub."""

from __future__ import annotations

import io as bytes_io
from pathlib import Path
from typing import Any

from comfy_api.latest import io
from PIL import Image
from torch import Tensor

from ..trainers.checks import require
from ..trainers.files import write_atomically
from ..trainers.hub_push import push, require_login, require_repo_id
from ..trainers.lora_file import lora_facts, read_lora
from ..trainers.model_card import DEV, Card, Sample, base_model_of, training_settings
from ..trainers.prompt_list import prompts_of_pictures
from . import folders, host, lora_choice

FROM_INPUT = "from the lora_file input"


class PushToHub(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="AtelierPushToHub",
            display_name="Push LoRA to Hub",
            category="Atelier/lora",
            description="Writes a model card for a LoRA and uploads both, with sample pictures, "
            "to a repository of the Hugging Face Hub. The token is the one of `hf auth login` or "
            "HF_TOKEN; it never stands in a workflow.",
            search_aliases=["hugging face", "upload lora", "model card", "publish"],
            inputs=[*_inputs(), *_card_inputs()],
            outputs=[
                io.String.Output(
                    display_name="url",
                    tooltip="Address of the repository; empty while dry_run is on.",
                ),
                io.String.Output(display_name="card", tooltip="The model card, as markdown."),
            ],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, repo_id: str | None) -> bool | str:
        try:
            if repo_id is not None:  # a linked input is not known yet
                require_repo_id(repo_id)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(
        cls, lora_name: str, lora_file: str | None = None, **_: Any
    ) -> list[tuple[str, int, int]]:
        name = lora_file or lora_name
        return [] if name == FROM_INPUT else lora_choice.versions(name)

    @classmethod
    def execute(
        cls,
        lora_name: str,
        repo_id: str,
        private: bool,
        dry_run: bool,
        message: str,
        lora_file: str | None = None,
        images: Tensor | None = None,
        **texts: str,
    ) -> io.NodeOutput:
        require_repo_id(repo_id)
        if not dry_run:
            require_login()
        path = lora_choice.lora_file(_name(lora_name, lora_file))
        pictures = _pictures(path.stem, images)
        card = _card(path, repo_id, _samples([*pictures], texts.get("prompts", "")), texts)
        markdown = card.markdown().encode()
        beside = folders.lora_folder() / f"{path.stem}.md"
        write_atomically(beside, lambda file: file.write_bytes(markdown))
        files = {"README.md": markdown, **pictures, path.name: path}
        lines, url = [f"The card: {beside}"], ""
        if dry_run:
            lines.append(f"Nothing was uploaded: dry_run is on. Files: {', '.join(files)}.")
        else:
            url = push(
                repo_id,
                files,
                private=private,
                message=message.strip() or f"add {path.name}",
                check_stop=host.check_interrupted,
            )
            lines.append(f"Uploaded to {url}: {', '.join(files)}.")
        ui = host.report(cls.hidden.unique_id, "\n".join(lines))
        return io.NodeOutput(url, markdown.decode(), ui=ui)


def _inputs() -> list[Any]:
    return [
        io.Combo.Input(
            "lora_name",
            options=[FROM_INPUT, *lora_choice.lora_names()],
            default=FROM_INPUT,
            tooltip="A LoRA file, or the one whose name comes in at lora_file.",
        ),
        io.String.Input(
            "repo_id",
            default="your-name/my-lora",
            tooltip="Owner and name of the repository. It is made if it is not there; if it is, "
            "its README.md and files of the same names are replaced, and the hub keeps the old "
            "ones in its history.",
        ),
        io.Boolean.Input(
            "private",
            default=True,
            tooltip="Make the repository so that only you see it. One that is there already stays "
            "as it is.",
        ),
        io.Boolean.Input(
            "dry_run",
            default=True,
            tooltip="Only write the card into output/loras and list what would be uploaded, "
            "without the network. Turn it off to upload.",
        ),
        io.String.Input(
            "message",
            default="",
            tooltip="What the history of the repository says of this upload. Empty: the name of "
            "the file.",
        ),
        io.String.Input(
            "lora_file",
            optional=True,
            force_input=True,
            tooltip="The name of a LoRA file, from the lora_name output of Train LoRA or of "
            "Export LoRA, while lora_name says so.",
        ),
        io.Image.Input(
            "images",
            optional=True,
            tooltip="Pictures that the LoRA drew, for the gallery of the card.",
        ),
    ]


def _card_inputs() -> list[Any]:
    return [
        io.String.Input(
            "prompts",
            default="",
            multiline=True,
            optional=True,
            tooltip="The prompts of the pictures: one line each in their order, or one line for "
            "all.",
        ),
        io.String.Input(
            "trigger_words",
            default="",
            optional=True,
            tooltip="The words that call up what was learned, with commas between. Empty: those "
            "that the file names.",
        ),
        io.String.Input(
            "base_model",
            default="",
            optional=True,
            tooltip="The repository of the model it was trained on. Empty: FLUX.1-dev or "
            "FLUX.1-schnell, as the file says. The licence note follows from it.",
        ),
        io.String.Input(
            "description",
            default="",
            multiline=True,
            optional=True,
            tooltip="Text of your own at the top of the card, in markdown.",
        ),
    ]


def _name(lora_name: str, lora_file: str | None) -> str:
    """That of the file to upload."""
    require(
        lora_name != FROM_INPUT or bool(lora_file),
        "Push LoRA to Hub has no LoRA: choose a file in lora_name, or connect the lora_name output "
        "of Train LoRA or Export LoRA to lora_file.",
    )
    require(
        lora_name == FROM_INPUT or lora_file is None,
        f"Push LoRA to Hub has two LoRAs: {lora_name} and {lora_file}. Disconnect lora_file, or "
        f"set lora_name to '{FROM_INPUT}'.",
    )
    return lora_name if lora_file is None else lora_file


def _pictures(stem: str, images: Tensor | None) -> dict[str, bytes]:
    """[N, H, W, 3] in 0..1 as PNG files, without a graph in them."""
    files = {}
    for number, image in enumerate([] if images is None else images, start=1):
        pixels = (image.clamp(0, 1) * 255).round().byte().cpu().numpy()
        stream = bytes_io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        files[f"images/{stem}-{number}.png"] = stream.getvalue()
    return files


def _samples(paths: list[str], prompts: str) -> list[Sample]:
    texts = prompts_of_pictures(prompts, len(paths)) if prompts.strip() else [""] * len(paths)
    return [Sample(path, text) for path, text in zip(paths, texts, strict=True)]


def _card(path: Path, repo_id: str, samples: list[Sample], texts: dict[str, str]) -> Card:
    lora = read_lora(path)
    facts = lora_facts(lora)
    base_model = texts.get("base_model", "").strip() or base_model_of(facts)
    require(
        bool(base_model),
        f"The file {path.name} does not say which model it was trained on. Write its repository "
        f"into base_model, such as {DEV}.",
    )
    words = [word.strip() for word in texts.get("trigger_words", "").split(",") if word.strip()]
    return Card(
        repo_id=repo_id,
        file=path.name,
        facts=facts,
        base_model=base_model,
        samples=samples,
        trigger_words=words or facts.trigger_words,
        settings=training_settings(lora.metadata),
        description=texts.get("description", ""),
    )
