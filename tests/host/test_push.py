"""Push LoRA to Hub in ComfyUI's own executor, with the hub's client and a hub on this machine."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import executor
import folder_paths
import huggingface_hub
import numpy as np
import pytest
import torch
from atelier.nodes import folders
from atelier.nodes.push import FROM_INPUT, PushToHub
from executor import Give, Runner
from graphs import Graph, node
from huggingface_hub import ModelCard
from lora_files import lora_tensors
from PIL import Image
from safetensors.torch import save_file
from upload_hub import UploadHub

TOKEN = "hf_a-secret"
METADATA = {"modelspec.architecture": "flux-1-dev/lora", "atelier.steps": "3"}
IMAGES = torch.linspace(0, 1, 2 * 8 * 8 * 3).reshape(2, 8, 8, 3)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadHub]:
    constants = huggingface_hub.constants
    with UploadHub(tmp_path / "repositories", {TOKEN: ("me",)}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its storage is not here
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    import nodes

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    folder = folders.lora_folder()
    folder.mkdir(parents=True)
    save_file(lora_tensors("plain"), folder / "cats.safetensors", METADATA)
    save_file(lora_tensors("plain"), folder / "nobody.safetensors")
    classes: dict[str, Any] = {"AtelierPushToHub": PushToHub, "Keep": executor.Keep, "Give": Give}
    for name, kind in classes.items():
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, name, kind)
    monkeypatch.setattr(Give, "values", {"images": IMAGES, "file": "cats.safetensors"})
    return Runner()


def graph(output: int = 0, **inputs: Any) -> Graph:
    """Keeps one output of a push of cats.safetensors with two pictures."""
    values = {"lora_name": FROM_INPUT, "repo_id": "me/cats", "private": True, "dry_run": False}
    values |= {"message": "", "lora_file": ["file", 0], "images": ["images", 0], **inputs}
    return {
        "images": node("Give", name="images"),
        "file": node("Give", name="file"),
        "push": node("AtelierPushToHub", **values),
        "keep": node("Keep", value=["push", output]),
    }


def test_file_card_and_pictures_are_on_the_hub(hub: UploadHub, runner: Runner) -> None:
    url = runner.run(graph(prompts="a cat\na dog", trigger_words="sks, ohwx"))
    assert url == f"{hub.url}/me/cats"
    assert hub.commits == [{"repo": "me/cats", "summary": "add cats.safetensors"}]
    assert hub.is_private == {"me/cats": True}
    place = hub.folder / "me" / "cats"
    local = folders.lora_folder()
    uploaded = (place / "cats.safetensors").read_bytes()
    assert uploaded == (local / "cats.safetensors").read_bytes()
    card = (place / "README.md").read_text(encoding="utf-8")
    assert card == (local / "cats.md").read_text(encoding="utf-8")
    data = ModelCard(card).data
    assert (data.base_model, data.license) == ("black-forest-labs/FLUX.1-dev", "other")
    assert data.instance_prompt == "sks, ohwx"
    shown = {one["text"]: place / one["output"]["url"] for one in data.widget}
    assert [*shown] == ["a cat", "a dog"]
    for image, path in zip(IMAGES, shown.values(), strict=True):
        pixels = np.array(Image.open(io.BytesIO(path.read_bytes())))
        assert np.array_equal(pixels, (image * 255).round().byte().numpy())
    files = [path for path in place.rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in path.read_bytes() for path in files)
    assert TOKEN not in str(runner.texts)


def test_a_dry_run_writes_the_card_and_asks_nobody(
    hub: UploadHub, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    card = runner.run(graph(1, dry_run=True))
    assert (folders.lora_folder() / "cats.md").read_text(encoding="utf-8") == card
    names = "README.md, images/cats-1.png, images/cats-2.png, cats.safetensors"
    assert runner.texts["push"][0].endswith(f"dry_run is on. Files: {names}.")
    assert hub.requests == []


def test_without_a_login_it_stops_before_anything(
    hub: UploadHub, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RuntimeError, match=r"^There is no login of the Hugging Face Hub\. Run `hf"):
        runner.run(graph())
    assert hub.requests == []
    assert not (folders.lora_folder() / "cats.md").exists()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no lora": ({"lora_file": None}, "Push LoRA to Hub has no LoRA: choose a file in lora_name"),
    "two loras": ({"lora_name": "nobody.safetensors"}, "Push LoRA to Hub has two LoRAs: nobody"),
    "no base": (
        {"lora_name": "nobody.safetensors", "lora_file": None},
        "The file nobody.safetensors does not say which model it was trained on. Write its repo",
    ),
    "prompts": ({"prompts": "a\nb\nc"}, "There are 2 pictures and 3 lines of prompts. Write a "),
    "id": ({"repo_id": "cats"}, "The repository to upload to is named by its owner and its name"),
    "not mine": ({"repo_id": "you/cats"}, "Your token may not write to 'you/cats'. Use a token"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_pushed_is_a_sentence(hub: UploadHub, runner: Runner, name: str) -> None:
    changed, expected = REFUSED[name]
    wrong = graph(**changed)
    inputs = wrong["push"]["inputs"]
    wrong["push"]["inputs"] = {key: value for key, value in inputs.items() if value is not None}
    with pytest.raises(RuntimeError, match=f"^{expected}"):
        runner.run(wrong)
    assert hub.commits == []
    assert not [path for path in hub.folder.rglob("*") if path.is_file()]
