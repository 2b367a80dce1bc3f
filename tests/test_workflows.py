"""The graphs of workflows/ as files; tests/host and tests/browser open them in a real ComfyUI."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
TITLE_HEIGHT = 30
"""Pixels of a node's title, which the canvas draws above its position."""

workflows = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def box(node: dict[str, Any]) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of a node with its title."""
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE_HEIGHT, x + width, y + height


def test_all_workflows_are_there() -> None:
    names = {path.stem for path in WORKFLOWS}
    assert names == {
        *("atelier_quickstart_nano", "atelier_flux1_dev_qlora"),
        *("atelier_multi_resolution", "atelier_masks_and_regularization"),
        *("atelier_images_from_a_graph", "atelier_watched_training"),
        "atelier_dynamic_threshold",
        "atelier_fuse_and_requantize",
        *("atelier_compare_grid", "atelier_style_hot_swap"),
        *("atelier_recipe_qlora_10gb", "atelier_recipe_fp8", "atelier_recipe_ai_toolkit_24gb"),
        *("atelier_recipe_simpletuner_nf4_10gb", "atelier_recipe_diffsynth_ink_wash"),
        *("atelier_recipe_int8_compile_48gb", "atelier_recipe_low_vram_6gb"),
    }


@workflows
def test_every_workflow_has_a_picture(path: Path) -> None:
    picture = path.with_suffix(".jpg")
    assert picture.stat().st_size < 300_000
    assert Image.open(picture).width >= 1600


@workflows
def test_nodes_do_not_overlap(path: Path) -> None:
    def overlap(one: dict[str, Any], other: dict[str, Any]) -> bool:
        a, b = box(one), box(other)
        return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]

    pairs = itertools.combinations(read(path)["nodes"], 2)
    assert not [(one["id"], other["id"]) for one, other in pairs if overlap(one, other)]


@workflows
def test_every_node_but_the_note_lies_in_one_group(path: Path) -> None:
    graph = read(path)

    def holders(node: dict[str, Any]) -> list[str]:
        left, top, right, bottom = box(node)
        return [
            group["title"]
            for group in graph["groups"]
            for x, y, width, height in [group["bounding"]]
            if x <= left and y <= top and right <= x + width and bottom <= y + height
        ]

    nodes = [node for node in graph["nodes"] if node["type"] != "MarkdownNote"]
    assert [node["id"] for node in nodes if len(holders(node)) != 1] == []


@workflows
def test_links_go_from_left_to_right(path: Path) -> None:
    graph = read(path)
    nodes = {node["id"]: node for node in graph["nodes"]}
    for _, source, _, target, _, _ in graph["links"]:
        assert nodes[source]["pos"][0] <= nodes[target]["pos"][0]


@workflows
def test_the_view_is_saved_with_the_graph(path: Path) -> None:
    """Without it Nodes 2.0 (frontend 1.32) zooms while it measures, and scatters the nodes."""
    assert read(path)["extra"]["ds"]["scale"] > 0


@pytest.mark.parametrize("name", ["atelier_quickstart_nano", "atelier_flux1_dev_qlora"])
def test_the_nodes_that_people_look_for_have_plain_titles(name: str) -> None:
    """A node with its own name is saved without a title, so that it is shown in any language."""
    english = read(ROOT / "locales" / "en" / "nodeDefs.json")
    names = {node_id: texts["display_name"] for node_id, texts in english.items()}
    nodes = read(ROOT / "workflows" / f"{name}.json")["nodes"]
    titles = [node.get("title") or names.get(node["type"]) for node in nodes]
    wanted = ["Read me", "Pictures", "Prompt", "Train LoRA", "Samples", "Before", "After"]
    assert [titles.count(title) for title in wanted] == [1] * len(wanted)
