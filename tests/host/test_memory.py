"""Estimate Memory and the format `auto`, in a real ComfyUI."""

from __future__ import annotations

from typing import Any

import pytest
from comfy_server import ComfyServer, Event
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
