"""Score LoRA in ComfyUI's own executor: on a tiny FLUX, random caches and drawn pictures."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.model_management
import executor
import folder_paths
import numpy as np
import pytest
import torch
from atelier.nodes import folders
from atelier.nodes.native import build_model
from atelier.nodes.native_lora import add_lora
from atelier.nodes.score_lora import FROM_WIRE, ScoreLora
from atelier.nodes.trainable import base_flux
from atelier.trainers.buckets import Resolution
from atelier.trainers.caches import PromptEntry
from atelier.trainers.data import TrainingData
from atelier.trainers.dataset import Dataset
from atelier.trainers.evaluate import held_out_loss, predict_by
from atelier.trainers.flux import build_transformer
from atelier.trainers.image_folder import image_folder
from atelier.trainers.load import load_flux
from clip_files import SIDE, clip_model, load_clip, load_vision, random_pictures, write_text_encoder
from core_flux import core_model
from executor import Give, Runner
from flux_files import write_flux
from graphs import Graph, node, write_pictures
from lora_files import lora_tensors
from PIL import Image
from torch import Tensor
from training import CONTEXT, TEXT_TOKENS, VECTOR, training_data, write_entries

GUIDANCE = 3.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    path = write_flux(tmp_path_factory.mktemp("flux") / "flux.safetensors")
    yield build_model(load_flux(path, format="nf4"), torch.float32)
    comfy.model_management.unload_all_models()
    executor.forget_networks()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    """Random caches with the empty text among the prompts."""
    folder = tmp_path_factory.mktemp("caches")
    found = training_data(folder, ((64, 64), (64, 96)))
    generator = torch.Generator().manual_seed(5)
    embeds = torch.randn(TEXT_TOKENS, CONTEXT, generator=generator)
    pooled = torch.randn(VECTOR, generator=generator)
    write_entries(folder, {"empty": {"prompt_embeds": embeds, "pooled": pooled}})
    entries = (*found.prompts.entries, PromptEntry(text="", key="empty"))
    return dataclasses.replace(found, prompts=dataclasses.replace(found.prompts, entries=entries))


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Runner:
    import nodes

    classes: dict[str, Any] = {"AtelierScoreLoRA": ScoreLora, "Keep": executor.Keep, "Give": Give}
    for name, kind in classes.items():
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, name, kind)
    return Runner()


def score(runner: Runner, monkeypatch: pytest.MonkeyPatch, **given: Any) -> dict[str, Any]:
    """The values; `given` are values of inputs, the widgets as they are, the others by wires."""
    widgets = {"lora_name": FROM_WIRE, "strength": 1.0, "guidance": GUIDANCE, "texts": ""}
    widgets |= {name: given.pop(name) for name in widgets if name in given}
    monkeypatch.setattr(Give, "values", given)
    graph: Graph = {name: node("Give", name=name) for name in given}
    wires = {name: [name, 0] for name in given}
    graph["score"] = node("AtelierScoreLoRA", **widgets, **wires)
    graph["keep"] = node("Keep", value=["score", 1])
    return json.loads(runner.run(graph))


def loss_of_diffusers(model: Any, data: TrainingData, *, with_text: bool = True) -> float:
    """By the network that trains, with the LoRAs of the MODEL as frozen ones."""
    base = base_flux(model)
    network = build_transformer(base.store, base.config, torch.float32, base.frozen)
    predict = predict_by(network, guidance=GUIDANCE, dtype=torch.float32)
    return held_out_loss(predict, data, device=torch.device("cpu"), with_text=with_text)


def test_the_loss_is_that_of_the_network_that_trains(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, model: Any, data: TrainingData
) -> None:
    lora = lora_tensors("plain")
    inputs = {"latents": data.latents, "prompts": data.prompts, "lora": lora}
    values = score(runner, monkeypatch, model=model, **inputs, strength=10.0)
    patched = add_lora(model, lora, 10.0)
    for kind, with_text in {"loss": True, "loss_empty_caption": False}.items():
        for name, one in {"base": model, "lora": patched}.items():
            expected = loss_of_diffusers(one, data, with_text=with_text)
            assert values[kind][name] == pytest.approx(expected, rel=1e-5)
    assert abs(values["loss"]["lora"] / values["loss"]["base"] - 1) > 1e-3
    first, second = runner.texts["score"][0].splitlines()
    assert first.startswith(f"Loss of 2 samples: {values['loss']['base']:.4f} without the LoRA, ")
    assert second.startswith("With the empty caption: ")


def test_a_model_of_the_core_has_the_same_loss(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, model: Any, data: TrainingData
) -> None:
    inputs = {"latents": data.latents, "prompts": data.prompts, "lora": lora_tensors("plain")}
    ours = score(runner, monkeypatch, model=model, **inputs, strength=10.0)["loss"]
    core = score(runner, monkeypatch, model=core_model("nf4"), **inputs, strength=10.0)["loss"]
    assert core == pytest.approx(ours, rel=1e-5)


def test_a_lokr_is_measured_too(
    runner: Runner,
    monkeypatch: pytest.MonkeyPatch,
    model: Any,
    tmp_path: Path,
) -> None:
    data = training_data(tmp_path, ((64, 64),))
    inputs = {"latents": data.latents, "prompts": data.prompts, "lora": lora_tensors("lokr")}
    values = score(runner, monkeypatch, model=model, **inputs)
    assert [*values] == ["loss"]  # the empty text was not encoded
    assert abs(values["loss"]["lora"] / values["loss"]["base"] - 1) > 1e-4


@pytest.fixture
def trained(tmp_path: Path) -> Dataset:
    write_pictures(tmp_path / "trained", count=3)
    square = Resolution(width=64, height=64)
    return Dataset(subsets=(image_folder(tmp_path / "trained", resolution=square),))


def drawn(trained: Dataset) -> Tensor:
    """One that is like none, and a mirrored copy of the second with some noise."""
    copy = torch.from_numpy(np.array(Image.open(trained.subsets[0].records[1].path))) / 255
    noise = torch.randn(copy.shape, generator=torch.Generator().manual_seed(0))
    other = random_pictures(1, 64, 64)[0]
    return torch.stack([other, (copy.flip(1) + 0.02 * noise).clamp(0, 1)])


def test_a_picture_that_was_learned_by_heart_is_named(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, trained: Dataset
) -> None:
    values = score(runner, monkeypatch, images=drawn(trained), dataset=trained)
    other, copy = values["likeness by pixels"]["pictures"]
    assert copy["nearest"] == "1.png"
    assert copy["likeness"] > 0.97
    assert other["likeness"] < 0.7
    warnings = [line for line in runner.texts["score"] if "by heart" in line]
    assert len(warnings) == 1
    assert warnings[0].startswith("Nearly training pictures by pixels: 2 ('1.png', 1.00). The LoRA")


def test_with_clip_vision_embeddings_are_compared_too(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, trained: Dataset, tmp_path: Path
) -> None:
    clip = clip_model()
    vision = load_vision(tmp_path, clip)
    images = drawn(trained)
    values = score(runner, monkeypatch, images=images, dataset=trained, clip_vision=vision)
    paths = [record.path for record in trained.subsets[0].records]
    own = [torch.from_numpy(np.array(Image.open(path))) / 255 for path in paths]
    with torch.no_grad():
        found = [vision.encode_image(one[None])["image_embeds"][0] for one in (*own, *images)]
    embeds = [one.numpy() for one in found]
    unit = np.stack([one / np.linalg.norm(one) for one in embeds])
    cosines = unit[3:] @ unit[:3].T
    found = values["likeness by CLIP vision"]
    for row, one in zip(cosines, found["pictures"], strict=True):
        assert one["likeness"] == pytest.approx(row.max(), abs=1e-4)
        assert one["nearest"] == f"{row.argmax()}.png"
    among = (unit[:3] @ unit[:3].T - 2 * np.eye(3)).max()
    assert found["among_training_pictures"] == pytest.approx(among, abs=1e-4)


def test_the_score_of_pictures_is_the_mean_of_the_picture_text_scores(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = clip_model()
    clip = load_clip(model, write_text_encoder(tmp_path, model))
    vision = load_vision(tmp_path, model)
    images = random_pictures(2, SIDE, SIDE)
    inputs = {"images": images, "clip": clip, "clip_vision": vision}
    values = score(runner, monkeypatch, texts="a cat\na dog", **inputs)["score"]
    assert values["mean"] == pytest.approx(np.mean(values["pictures"]))
    one = score(runner, monkeypatch, texts="a dog", **{**inputs, "images": images[1:]})["score"]
    assert one["mean"] == pytest.approx(values["pictures"][1], abs=1e-3)
    with pytest.raises(RuntimeError, match=r"^There are 2 pictures and 3 lines of prompts\."):
        score(runner, monkeypatch, texts="a\nb\nc", **inputs)


def test_what_cannot_be_measured_is_said(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, trained: Dataset, data: TrainingData
) -> None:
    with pytest.raises(RuntimeError, match=r"^Score LoRA has nothing to measure\. Connect model"):
        score(runner, monkeypatch, images=drawn(trained))
    given = {"images": drawn(trained), "dataset": trained, "latents": data.latents}
    score(runner, monkeypatch, **given)
    assert "The loss was not measured: it also needs prompts, model." in runner.texts["score"]


def test_the_loss_needs_one_lora(
    runner: Runner,
    monkeypatch: pytest.MonkeyPatch,
    model: Any,
    data: TrainingData,
    tmp_path: Path,
) -> None:
    inputs = {"model": model, "latents": data.latents, "prompts": data.prompts}
    with pytest.raises(RuntimeError, match=r"^Score LoRA has no LoRA: connect one"):
        score(runner, monkeypatch, **inputs)
    two = {"lora": lora_tensors("plain"), "lora_name": "a.safetensors"}
    with pytest.raises(RuntimeError, match=r"^Score LoRA has two LoRAs: the file a\.safetensors "):
        score(runner, monkeypatch, **inputs, **two)
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    folder = folders.lora_folder()
    folder.mkdir()
    torch.save(lora_tensors("plain"), folder / "a.safetensors")
    with pytest.raises(RuntimeError, match=r"^'a\.safetensors' is a pickle, a file that can run"):
        score(runner, monkeypatch, **inputs, lora_name="a.safetensors")
