"""Estimate Memory and the format `auto`, in a real ComfyUI."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from atelier.nodes import host
from atelier.nodes.memory import EstimateMemory
from atelier.trainers.flux import FluxConfig
from atelier.trainers.lora_settings import LoraSettings
from atelier.trainers.memory import Workload, estimate_training, store_bytes
from comfy_server import ComfyServer, Event
from executor import Keep, Runner
from flux_files import flux_shapes
from graphs import Graph, node

NANO = "nano (built in)"
RESERVE_GB = {"bf16": 0.0, "nf4": 1000.0}
"""Nothing, and more than any machine has free."""


def estimate(**inputs: Any) -> Graph:
    settings = {
        "model": NANO,
        "format": "nf4",
        "width": 128,
        "height": 128,
        "prompt_length": 77,
        "batch_size": 2,
        "gradient_accumulation": 1,
        "rank": 4,
        "targets": "qlora",
        "compute_dtype": "bf16",
        "gradient_checkpointing": True,
        "activations_in_ram": False,
    }
    return {"estimate": node("AtelierEstimateMemory", **{**settings, **inputs})}


def shown(server: ComfyServer, graph: Graph) -> tuple[list[str], dict[str, Any]]:
    """Texts on nodes, and outputs."""
    texts = []

    def listen(event: Event) -> None:
        if event.type == "progress_text":
            texts.append(event.data["text"])

    return texts, server.run(graph, listen)["outputs"]


def test_the_report_is_shown_and_given(server: ComfyServer) -> None:
    texts, outputs = shown(server, estimate())
    (report,) = outputs["estimate"]["text"]
    assert texts == [report]
    lines = report.splitlines()
    assert lines[0].startswith("The training takes 0.")
    assert lines[-2].startswith("It fits: ")
    assert lines[-1].startswith("On a CPU ")


def test_it_says_when_it_does_not_fit(server: ComfyServer) -> None:
    huge = {"width": 8192, "height": 8192, "batch_size": 256, "gradient_checkpointing": False}
    _, outputs = shown(server, estimate(**huge))
    (report,) = outputs["estimate"]["text"]
    assert "This training does not fit: " in report


def test_beside_a_card_the_parts_of_system_memory_are_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In this process, as on a machine whose card has room for all weights but one byte."""
    import nodes

    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "AtelierEstimateMemory", EstimateMemory)
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "Keep", Keep)
    nano = flux_shapes(width=256, depth=2, depth_single=4)
    config = FluxConfig.from_shapes(nano)
    workload = Workload(
        width=128,
        height=128,
        prompt_length=77,
        batch_size=2,
        lora=LoraSettings(),
        dtype=torch.bfloat16,
        gradient_checkpointing=True,
        accumulates=False,
        activations_in_ram=True,
    )
    taken = estimate_training(config, "bf16", workload)
    monkeypatch.setattr(host, "compute_device", lambda: torch.device("xpu"))
    monkeypatch.setattr(host, "free_memory", lambda: taken.total - 1)
    graph = estimate(activations_in_ram=True, format="bf16")
    lines = Runner().run({**graph, "keep": node("Keep", value=["estimate", 0])}).splitlines()

    # A single block in bf16: what streaming one takes.
    single = 2 * sum(
        torch.Size(shape).numel()
        for name, shape in nano.items()
        if name.startswith("single_blocks.0.") and len(shape) == 2
    )
    said = re.fullmatch(
        r"Of system memory it takes [\d.]+ GB: ([\d.]+) GB for weights .*, ([\d.]+) GB for "
        r"activations, .* Caches are read from disk\.",
        lines[1],
    )
    assert said is not None
    assert float(said[1]) * 1e9 >= single - 0.005e9
    assert float(said[2]) * 1e9 == pytest.approx(taken.saved, abs=0.005e9)
    whole = f"{store_bytes(config, 'bf16') / 1e9:.2f} GB"
    assert lines[2] == f"Off the device, the weights take {whole} of system memory."
    assert lines[3].startswith("System memory is enough: ")
    assert lines[4].startswith("It fits when blocks are streamed")


@pytest.mark.parametrize("format", RESERVE_GB)
def test_auto_takes_the_best_that_leaves_the_reserve(server: ComfyServer, format: str) -> None:
    load = node("AtelierLoadQuantizedFlux", model=NANO, format="auto", compute_dtype="fp32")
    load["inputs"]["reserve_gb"] = RESERVE_GB[format]
    graph = {"load": load, "look": node("PreviewAny", source=["load", 0])}
    texts, _ = shown(server, graph)
    assert any(text.startswith(f"Format auto chose {format}: ") for text in texts)


def test_the_estimate_feeds_the_loader(server: ComfyServer) -> None:
    load = node("AtelierLoadQuantizedFlux", model=NANO, format="auto", compute_dtype="fp32")
    load["inputs"]["reserve_gb"] = ["estimate", 1]
    graph = {**estimate(), "load": load, "look": node("PreviewAny", source=["load", 0])}
    texts, _ = shown(server, graph)
    assert any("of them reserved" in text for text in texts)
