"""The recipes as graphs: the numbers of their sources, and ten steps of each on the nano model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import workflow
from comfy_server import ComfyServer
from graphs import write_pictures

ROOT = Path(__file__).resolve().parent.parent.parent
NUM_STEPS = 10
RECIPES: dict[str, dict[str, Any]] = {
    "qlora_10gb": {
        "format": "nf4",
        "rank": 4,
        "targets": "qlora",
        "gradient_accumulation": 4,
        "weight_decay": 1e-4,
        "length": 700,
        "tokens": 77,
    },
    "fp8": {
        "format": "bf16",
        "rank": 4,
        "targets": "qlora",
        "gradient_accumulation": 1,
        "products": "8bit",
        "length": 700,
        "tokens": 77,
    },
    "ai_toolkit_24gb": {
        "format": "fp8",
        "rank": 16,
        "targets": "ai-toolkit",
        "ema_decay": 0.99,
        "sampling": "sigmoid",
        "dropout": 0.05,
        "more_sizes": "768x768, 1024x1024",
        "length": 2000,
        "keep_checkpoints": 4,
    },
    "simpletuner_nf4_10gb": {
        "format": "nf4",
        "targets": "all",
        "optimizer": "lion8bit_paged",
        "clipping": "value",
        "clip_limit": 0.01,
        "sampling": "sigmoid",
        "shift": 0.0,
        "width": 512,
    },
    "diffsynth_ink_wash": {
        "format": "fp8",
        "rank": 32,
        "optimizer": "adamw",
        "shift": 3.0,
        "weight": "bell",
        "repeats": 50,
        "length": 5,
        "unit": "epochs",
    },
    "int8_compile_48gb": {
        "format": "int8",
        "rank": 16,
        "optimizer": "adamw_bf16",
        "compile": True,
        "sampling": "sigmoid",
        "width": 1024,
    },
    "low_vram_6gb": {
        "format": "nf4",
        "block_streaming": "auto",
        "activations_in_ram": True,
        "optimizer": "adamw8bit_paged",
    },
}
"""Of each recipe what its source says, by inputs of any of its nodes."""
SMALL: dict[str, dict[str, Any]] = {
    "AtelierImageFolderDataset": {"width": 64, "height": 64, "repeats": 1},
    "AtelierEncodePrompts": {"length": 16},
    "AtelierTrainLoRA": {
        "length": NUM_STEPS,
        "unit": "steps",
        "gradient_accumulation": 1,
        "sample_every": 0,
        "sample_steps": 1,
    },
    # Products in 8 bits need a card and are refused without one. Compiled blocks need a compiler of
    # C++, which not every machine has, and minutes; test_compiled.py runs the loop with them.
    "AtelierSpeedSettings": {"products": "dequantized", "compile": False},
}

recipes = pytest.mark.parametrize("name", RECIPES)


def load(server: ComfyServer, name: str) -> workflow.Graph:
    return workflow.load(ROOT / "workflows" / f"atelier_recipe_{name}.json", server.object_info())


def on_nano(graph: workflow.Graph) -> workflow.Graph:
    """The graph with the nano model in place of FLUX.1-dev's files, and small pictures."""
    (model,) = (i for i, n in graph.items() if n["class_type"] == "AtelierLoadQuantizedFlux")
    graph[model]["inputs"]["model"] = "nano (built in)"
    replaced = {
        node_id: [model, 2 if node["class_type"] == "VAELoader" else 1]
        for node_id, node in graph.items()
        if node["class_type"] in ("DualCLIPLoader", "AtelierLoadQuantizedTextEncoders", "VAELoader")
    }
    kept = {node_id: node for node_id, node in graph.items() if node_id not in replaced}
    for node in kept.values():
        inputs = node["inputs"]
        for name, value in inputs.items():
            if isinstance(value, list) and value[0] in replaced:
                inputs[name] = replaced[value[0]]
        inputs |= SMALL.get(node["class_type"], {})
        if inputs.get("more_sizes"):
            inputs["more_sizes"] = "64x96, 96x64"
    return kept


@recipes
def test_a_recipe_holds_the_numbers_of_its_source(server: ComfyServer, name: str) -> None:
    graph = load(server, name)
    said: dict[str, list[Any]] = {}
    for node in graph.values():
        for input_name, value in node["inputs"].items():
            said.setdefault(input_name, []).append(value)
    said["tokens"] = [
        node["inputs"]["length"]
        for node in graph.values()
        if node["class_type"] == "AtelierEncodePrompts"
    ]
    for input_name, value in RECIPES[name].items():
        assert value in said.get(input_name, []), input_name


def test_every_recipe_is_a_blueprint_too(server: ComfyServer) -> None:
    """Its settings and Train LoRA in one node, which ComfyUI lists among its subgraphs."""
    object_info = server.object_info()

    def settings(graph: workflow.Graph) -> dict[str, dict[str, Any]]:
        nodes = (node for node in graph.values() if "Settings" in node["class_type"])
        trains = (n for n in graph.values() if n["class_type"] == "AtelierTrainLoRA")
        return {
            node["class_type"]: {n: v for n, v in node["inputs"].items() if not is_link(v)}
            for node in (*nodes, *trains)
            if node["class_type"] != "AtelierCaptionSettings"
        }

    offered = [entry["name"] for entry in server.get("/global_subgraphs").values()]
    found = []
    for path in (ROOT / "subgraphs").glob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert text.isascii()  # ComfyUI reads it in the encoding of the system
        assert path.stem in offered
        found.append(settings(workflow.to_api(json.loads(text), object_info)))
    wanted = [settings(load(server, name)) for name in RECIPES]
    assert sorted(found, key=str) == sorted(wanted, key=str)


def is_link(value: Any) -> bool:
    return isinstance(value, list)


@recipes
def test_a_recipe_trains_on_the_nano_model(server: ComfyServer, name: str) -> None:
    write_pictures(server.base_directory / "input" / "my_pictures")
    outputs = server.run(on_nano(load(server, name)), timeout_s=300)["outputs"].values()
    (run_id,) = (output["atelier_run"][0] for output in outputs if "atelier_run" in output)
    metrics = server.get(f"/atelier/runs/{run_id}/metrics")
    assert metrics["step"] == list(range(1, NUM_STEPS + 1))
    folder = server.base_directory / "output" / "atelier" / run_id
    settings = json.loads((folder / "job.json").read_text(encoding="utf-8"))["settings"]
    reached = {**settings["lora"], **settings["train"]["optimizer"], **settings["train"]}
    for setting in ("rank", "targets", "optimizer", "clip_limit", "ema_decay", "weight_decay"):
        if setting in RECIPES[name] and not isinstance(reached[setting], dict):
            assert reached[setting] == RECIPES[name][setting]
