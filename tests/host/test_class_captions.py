"""A user's way to class captions, in ComfyUI's own executor: which texts are encoded, and what is
said where a wire is missing."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.model_management
import executor
import folder_paths
import pytest
import torch
from atelier.nodes import host, loader_memory
from atelier.nodes.caches import CacheLatents, EncodePrompts
from atelier.nodes.dataset import ImageFolderDataset
from atelier.nodes.native import build_model
from atelier.nodes.preservation_settings import PreservationSettingsNode
from atelier.nodes.train import TrainLora
from atelier.trainers.load import load_flux
from executor import CountingLoader, Give, Keep, Runner, nano_vae
from flux_files import write_flux
from graphs import node, train_graph, write_pictures

NODES = [ImageFolderDataset, CacheLatents, EncodePrompts, PreservationSettingsNode, TrainLora]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text that was shown on a node."""
    texts: list[str] = []
    monkeypatch.setattr(host, "show_text", lambda text, node_id: texts.append(text))
    return texts


@pytest.fixture
def graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Two captions get the trigger 'sks dog'; Preservation Settings is connected to Train LoRA."""
    import nodes

    for name in ("input", "output"):
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
    write_pictures(tmp_path / "input" / "dogs", count=2)
    folder = tmp_path / "text_encoders"
    folder.mkdir()
    (folder / "c.safetensors").write_bytes(b"weights")
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "text_encoders", ([str(folder)], {".safetensors"})
    )
    # Files here are new, and a loader's is remembered only if it is older than ComfyUI's start.
    monkeypatch.setattr(loader_memory, "_STARTED_NS", time.time_ns() + 86_400 * 10**9)
    classes = {one.GET_SCHEMA().node_id: one for one in NODES}
    classes |= {"DualCLIPLoader": executor.NanoClipLoader, "Give": Give, "Keep": Keep}
    for name, kind in classes.items():
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, name, kind)
    path = write_flux(tmp_path / "flux.safetensors")
    model = build_model(load_flux(path, format="nf4"), torch.float32)
    monkeypatch.setattr(Give, "values", {"model": model, "vae": nano_vae()})
    made = train_graph("dogs", sampling=False, length=2, preservation_settings=["kept", 0])
    wanted = {name: made[name] for name in ("data", "latents", "prompts", "train")}
    wanted["data"]["inputs"]["trigger"] = "sks dog"
    wanted["latents"]["inputs"]["vae"] = ["vae", 0]
    wanted["prompts"]["inputs"]["clip"] = ["clip", 0]
    wanted["train"]["inputs"]["model"] = ["model", 0]
    settings = {"unmasked_weight": 0.0, "normalize_masks": False, "prior_weight": 1.0}
    settings |= {"trigger": "sks dog", "class_word": "dog", "class_weight": 1.0}
    loader = {"clip_name1": "c.safetensors", "clip_name2": "c.safetensors"}
    yield {
        **wanted,
        "model": node("Give", name="model"),
        "vae": node("Give", name="vae"),
        "clip": node("DualCLIPLoader", **loader),
        "kept": node("AtelierPreservationSettings", **settings),
        "keep": node("Keep", value=["prompts", 0]),
    }
    comfy.model_management.unload_all_models()
    executor.forget_networks()


def test_a_first_try_is_told_what_to_connect_and_then_trains(
    graph: dict[str, Any], tmp_path: Path, shown: list[str]
) -> None:
    with pytest.raises(RuntimeError, match="Connect Preservation Settings to Encode Prompts too"):
        Runner().run(graph)
    assert not list((tmp_path / "output").rglob("run.json"))
    graph["prompts"]["inputs"]["preservation_settings"] = ["kept", 0]
    cache = Runner().run(graph)
    assert {entry.text for entry in cache.entries} == {
        *("sks dog, a red circle", "sks dog, a green circle"),
        *("dog, a red circle", "dog, a green circle", ""),
    }
    (metrics,) = (tmp_path / "output").rglob("metrics.jsonl")
    first, second = map(json.loads, metrics.read_text(encoding="utf-8").splitlines())
    assert first["class_loss"] == 0 < second["class_loss"]
    assert "Captions with the class word: 2." in "\n".join(shown)
    assert not any("no effect" in text for text in shown)
    Runner().run(graph)
    assert CountingLoader.runs == 0  # all of it is encoded
