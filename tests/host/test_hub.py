"""hub_id of our nodes in ComfyUI: what is in the hub's cache loads without a network."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any

import atelier
import huggingface_hub.constants
import pytest
import torch
from atelier.nodes.loaders import LoadQuantizedFlux
from atelier.trainers.load import load_flux
from atelier.trainers.lora_settings import LoraSettings
from atelier.trainers.memory import Workload, estimate_training
from comfy_server import ComfyServer, GraphError
from executor import Keep, Runner
from flux_files import write_flux
from graphs import Graph, node

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model of `flux/tiny` in a hub's cache, and no network."""
    repository = tmp_path / "models--flux--tiny"
    path = write_flux(repository / "snapshots" / COMMIT / "flux-dev.safetensors")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))

    def refuse(*_: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return path


@pytest.fixture(autouse=True)
def pack(monkeypatch: pytest.MonkeyPatch) -> None:
    import nodes

    async def own() -> list:
        return await (await atelier.comfy_entrypoint()).get_node_list()

    kinds = {kind.GET_SCHEMA().node_id: kind for kind in asyncio.run(own())}
    for name, kind in {**kinds, "Keep": Keep}.items():
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, name, kind)


def graph() -> Graph:
    """Keeps the loader's MODEL; its input model is nano for want of another choice."""
    settings = {"model": "nano (built in)", "format": "nf4", "compute_dtype": "fp32"}
    load = node("AtelierLoadQuantizedFlux", **settings, hub_id="flux/tiny")
    return {"load": load, "keep": node("Keep", value=["load", 0])}


def test_a_cached_repository_takes_the_place_of_the_model(cached: Path) -> None:
    model = Runner().run(graph())
    assert model.store.content_hash() == load_flux(cached, format="nf4").store.content_hash()


def test_the_encoders_are_not_those_of_the_model_it_replaces(cached: Path) -> None:
    loaded = LoadQuantizedFlux.execute("nano (built in)", "nf4", "fp32", hub_id="flux/tiny")
    _, clip, vae = loaded.args
    assert "Add the node Load Quantized Text Encoders, or DualCLIPLoader" in clip.message
    assert "Add the node Load VAE" in vae.message


def test_the_memory_of_a_repository_is_estimated(cached: Path) -> None:
    settings = {"width": 64, "height": 64, "prompt_length": 77, "batch_size": 1}
    settings |= {"gradient_checkpointing": True, "activations_in_ram": False}
    lora = {"gradient_accumulation": 1, "rank": 4, "targets": "all+ffs", "compute_dtype": "fp32"}
    model = {"model": "nano (built in)", "format": "nf4", "hub_id": "flux/tiny"}
    estimate = node("AtelierEstimateMemory", **model, **settings, **lora)
    reserve_gb = Runner().run({"estimate": estimate, "keep": node("Keep", value=["estimate", 1])})
    workload = Workload(
        lora=LoraSettings(rank=4, targets="all+ffs"),
        dtype=torch.float32,
        accumulates=False,
        **settings,
    )
    config = load_flux(cached, format="nf4").config
    assert reserve_gb == estimate_training(config, "nf4", workload).beside_weights / 1e9


def test_what_is_no_id_is_refused_before_the_graph_runs(server: ComfyServer) -> None:
    wrong = graph()
    wrong["load"]["inputs"]["hub_id"] = "https://huggingface.co/flux/tiny"
    wrong["keep"] = node("PreviewAny", source=["load", 0])
    expected = r"named by its owner and its name, such as .*, got 'https:"
    with pytest.raises(GraphError, match=expected):
        server.run(wrong)
