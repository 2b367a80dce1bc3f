"""The graphs of workflows/ and the texts of the nodes in a real ComfyUI."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import workflow
from atelier.trainers.load import inspect_flux
from comfy_server import ComfyServer, GraphError
from english_texts import english_texts
from executor import NANO
from graphs import write_pictures

ROOT = Path(__file__).resolve().parent.parent.parent
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
QUICKSTART = ROOT / "workflows" / "atelier_quickstart_nano.json"
FLUX1_DEV = ROOT / "workflows" / "atelier_flux1_dev_qlora.json"
FILES = {
    "model": "flux1-dev.safetensors",
    "clip_name1": "clip_l.safetensors",
    "clip_name2": "t5xxl_fp16.safetensors",
    "vae_name": "ae.safetensors",
}
"""What the graph for FLUX.1-dev expects in models/, by input."""

FOLDERS = ("openmoji", "my_pictures", "my_masks", "my_class_pictures")
"""What the graphs expect below input/."""

workflows = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


def inputs_of(info: dict[str, Any]) -> dict[str, Any]:
    return info["input"].get("required", {}) | info["input"].get("optional", {})


def text_at(server: ComfyServer, path: str) -> str:
    with urllib.request.urlopen(server.url + path, timeout=30) as response:
        return response.read().decode("utf-8")


@workflows
def test_workflows_use_nodes_and_inputs_that_exist(server: ComfyServer, path: Path) -> None:
    object_info = server.object_info()
    for node in workflow.load(path, object_info).values():
        declared = inputs_of(object_info[node["class_type"]])
        required = object_info[node["class_type"]]["input"].get("required", {})
        assert required.keys() <= node["inputs"].keys() <= declared.keys()


@workflows
def test_workflows_hold_values_of_the_declared_types(server: ComfyServer, path: Path) -> None:
    """A value in a wrong place of `widgets_values` is of another type or out of its range."""
    object_info = server.object_info()
    python_types = {"INT": int, "FLOAT": int | float, "STRING": str, "BOOLEAN": bool}
    for node in workflow.load(path, object_info).values():
        declared = inputs_of(object_info[node["class_type"]])
        for name, value in node["inputs"].items():
            kind, options = declared[name][0], declared[name][1] if len(declared[name]) > 1 else {}
            choices = kind if isinstance(kind, list) else options.get("options")
            if isinstance(value, list):  # a link
                continue
            if choices is not None:
                assert value in {*choices, *FILES.values(), *FOLDERS}
            else:
                assert isinstance(value, python_types[kind])
                assert options.get("min", value) <= value <= options.get("max", value)


SHORTER = (
    "Train LoRA.length=2",
    "Train LoRA.sample_every=0",
    "Train LoRA.sample_steps=2",
    "Without the LoRA.steps=2",
    "With the LoRA.steps=2",
)


def test_the_quickstart_runs(server: ComfyServer) -> None:
    """As it is, but for the number of steps; changed by titles, as `dev.py run --set` does."""
    write_pictures(server.base_directory / "input" / "openmoji", size=128)
    object_info = server.object_info()
    graph = workflow.load(QUICKSTART, object_info)
    for setting in SHORTER:
        workflow.apply_setting(graph, setting, object_info)
    outputs = server.run(graph, timeout_s=300)["outputs"]
    images = {
        graph[node_id]["_meta"]["title"]: out.get("images") for node_id, out in outputs.items()
    }
    assert images.keys() >= {"Before", "After", "Samples", "Loss"}
    assert server.view(images["Before"][0]) != server.view(images["After"][0])
    assert server.path_of(images["After"][0]).parent.name == "atelier"


def test_a_folder_at_several_sizes_trains(server: ComfyServer) -> None:
    run_briefly(server, "atelier_multi_resolution")


def test_a_graph_of_masks_and_regularization_trains(server: ComfyServer) -> None:
    """Long enough to see the class pictures, which begin at step 50 of the graph."""
    inputs = server.base_directory / "input"
    for folder in ("my_class_pictures", "my_masks"):
        write_pictures(inputs / folder, size=128)
    texts = run_briefly(server, "atelier_masks_and_regularization", "Schedule: keep.start_step=1")
    assert any("regularization" in text for text in texts)


def test_pictures_of_a_graph_train(server: ComfyServer) -> None:
    run_briefly(server, "atelier_images_from_a_graph")


def test_a_watched_training_draws_and_measures(server: ComfyServer) -> None:
    """Before the first of two steps, between them and at the end."""
    write_pictures(server.base_directory / "input" / "my_pictures", size=128)
    object_info = server.object_info()
    graph = workflow.load(ROOT / "workflows" / "atelier_watched_training.json", object_info)
    settings = ("AtelierValidationSettings.every=1", "AtelierValidationSettings.steps=2")
    for setting in ("AtelierTrainLoRA.length=2", *settings):
        workflow.apply_setting(graph, setting, object_info)
    outputs = server.run(graph, timeout_s=300)["outputs"]
    shown = {graph[node]["_meta"]["title"]: outputs[node].get("images", []) for node in outputs}
    assert len(shown["Samples"]) == 3 * 3
    assert len(shown["Loss"]) == 1
    (run_id,) = (output["atelier_run"][0] for output in outputs.values() if "atelier_run" in output)
    metrics = server.get(f"/atelier/runs/{run_id}/metrics")
    assert metrics["step"] == [1, 2]
    assert metrics["eval_loss"]["step"] == [0, 1, 2]
    details = server.get(f"/atelier/runs/{run_id}")
    names = [(sample["step"], sample["name"]) for sample in details["samples"]]
    assert names == [
        (step, name) for name in ("a red apple", "a cat", "a house") for step in range(3)
    ]


def test_a_negative_prompt_counts_with_dynamic_threshold(server: ComfyServer) -> None:
    """Without it, with it, and with it brought back: three pictures of one prompt and seed."""
    pictures, _ = drawn_in_two_steps(server, "atelier_dynamic_threshold")
    assert len(pictures) == 3


def test_a_lora_is_fused_and_saved(server: ComfyServer) -> None:
    """Without it, beside the model and in its weights: three pictures; and a file that loads."""
    pictures, texts = drawn_in_two_steps(server, "atelier_fuse_and_requantize")
    assert len(pictures) == 3
    (path,) = (server.base_directory / "output" / "diffusion_models").glob("*.safetensors")
    assert any(path.name in text for text in texts)
    options = inputs_of(server.object_info()["AtelierLoadQuantizedFlux"])["model"]
    assert path.name in (options[1].get("options") or options[0])
    assert inspect_flux(path).config == inspect_flux(NANO / "nano-flux.safetensors").config


def test_styles_take_turns_on_one_base(server: ComfyServer) -> None:
    """No LoRA, three styles and a mix of two: five pictures of one prompt and seed."""
    pictures, texts = drawn_in_two_steps(server, "atelier_style_hot_swap")
    assert len(pictures) == 5
    assert any("Trigger words of 'sunset': sunset colours." in text for text in texts)


def drawn_in_two_steps(server: ComfyServer, name: str) -> tuple[set[bytes], list[str]]:
    """The different pictures that a graph draws, and the texts that its nodes gave."""
    graph = workflow.load(ROOT / "workflows" / f"{name}.json", server.object_info())
    for node in graph.values():
        if node["class_type"] == "KSampler":
            node["inputs"]["steps"] = 2
    outputs = server.run(graph, timeout_s=300)["outputs"].values()
    pictures = {server.view(image) for output in outputs for image in output.get("images", [])}
    return pictures, [text for output in outputs for text in output.get("text", [])]


def run_briefly(server: ComfyServer, name: str, *settings: str) -> list[str]:
    """Two steps of a graph on pictures of random colours; the texts that its nodes gave."""
    write_pictures(server.base_directory / "input" / "my_pictures", size=128)
    object_info = server.object_info()
    graph = workflow.load(ROOT / "workflows" / f"{name}.json", object_info)
    for setting in ("Train LoRA.length=2", *settings):
        workflow.apply_setting(graph, setting, object_info)
    outputs = server.run(graph, timeout_s=300)["outputs"].values()
    shown = [image for output in outputs for image in output.get("images", [])]
    assert len(shown) == 2  # the contact sheet, and the loss
    (run_id,) = (output["atelier_run"][0] for output in outputs if "atelier_run" in output)
    assert server.get(f"/atelier/runs/{run_id}")["checkpoints"] == [2]
    return [text for output in outputs for text in output.get("text", [])]


def test_the_flux1_dev_graph_lacks_only_its_files(server: ComfyServer) -> None:
    write_pictures(server.base_directory / "input" / "my_pictures")
    graph = workflow.load(FLUX1_DEV, server.object_info())
    with pytest.raises(GraphError) as refusal:
        server.queue(graph)
    problems = refusal.value.details["node_errors"].values()
    missing = {e["extra_info"]["input_name"] for problem in problems for e in problem["errors"]}
    # Not every ComfyUI compares the combos of V3 nodes, such as `model`, with their options; what a
    # node finds wrong itself is said of all inputs that it looked at, here of `hub_id` too.
    assert (missing | {"model"}) - {"hub_id"} == FILES.keys()


def test_the_flux1_dev_graph_holds_the_defaults_of_the_recipe(server: ComfyServer) -> None:
    object_info = server.object_info()
    graph = workflow.load(FLUX1_DEV, object_info)
    (train,) = (node for node in graph.values() if node["class_type"] == "AtelierTrainLoRA")
    declared = inputs_of(object_info["AtelierTrainLoRA"])
    defaults = {name: spec[1]["default"] for name, spec in declared.items() if "default" in spec[1]}
    changed = {name for name, value in defaults.items() if train["inputs"][name] != value}
    assert changed == {"name"}
    assert (defaults["rank"], defaults["targets"], defaults["learning_rate"]) == (4, "qlora", 1e-4)


def test_workflows_are_offered_as_templates_with_their_pictures(server: ComfyServer) -> None:
    offered = server.get("/workflow_templates")[ROOT.name]
    assert sorted(offered) == [path.stem for path in WORKFLOWS]
    for name in offered:
        address = f"{server.url}/api/workflow_templates/{ROOT.name}/{name}.jpg"
        with urllib.request.urlopen(address, timeout=30) as response:
            assert response.headers["Content-Type"] == "image/jpeg"


def test_english_texts_are_those_of_the_schemas(server: ComfyServer) -> None:
    """After a change of a text: `python scripts/english_texts.py`, and translate it."""
    saved = (ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8")
    assert json.loads(saved) == english_texts(server.object_info())


@pytest.mark.parametrize("language", ["en", "zh"])
def test_translations_are_served(server: ComfyServer, language: str) -> None:
    served = server.get("/i18n")[language]
    folder = ROOT / "locales" / language
    ours = json.loads((folder / "nodeDefs.json").read_text(encoding="utf-8"))
    categories = json.loads((folder / "main.json").read_text(encoding="utf-8"))["nodeCategories"]
    assert ours.items() <= served["nodeDefs"].items()
    assert categories.items() <= served["nodeCategories"].items()


def test_every_category_is_translated(server: ComfyServer) -> None:
    """Ours or ComfyUI's own translation; `loaders` and `training` are ComfyUI's words."""
    nodes = [info for name, info in server.object_info().items() if name.startswith("Atelier")]
    parts = {part for info in nodes for part in info["category"].split("/")}
    ours = server.get("/i18n")["zh"]["nodeCategories"]
    assert parts <= ours.keys() | {"loaders", "training"}


@pytest.mark.parametrize("language", ["en", "zh"])
def test_help_is_served_where_the_frontend_looks(server: ComfyServer, language: str) -> None:
    for node_id in (name for name in server.object_info() if name.startswith("Atelier")):
        served = text_at(server, f"/extensions/{ROOT.name}/docs/{node_id}/{language}.md")
        page = ROOT / "js" / "docs" / node_id / f"{language}.md"
        assert served == page.read_text(encoding="utf-8")
