"""The workflows, texts and help pages in ComfyUI's own frontend, in both of its canvases."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
import workflow
from comfy_server import ComfyServer
from frontend import ROOT, WORKFLOWS, Frontend
from PIL import Image

CANVASES = {"classic": False, "nodes2": True}
"""Name to whether the nodes are drawn in HTML, as Nodes 2.0 does."""
RECIPE, LARGEST_RECIPE = "atelier_recipe_", "atelier_recipe_diffsynth_ink_wash"
ON_BOTH = [path.stem for path in WORKFLOWS if not path.stem.startswith(RECIPE)] + [LARGEST_RECIPE]
OPENED = [
    (path.stem, canvas)
    for path in WORKFLOWS
    for canvas in CANVASES
    if canvas == "classic" or path.stem in ON_BOTH
]
"""The recipes are laid out alike: one of them is opened on both canvases."""

NODES_OUTSIDE_THEIR_GROUP = """
return app.graph.nodes.filter((node) => node.type !== 'MarkdownNote').filter((node) => {
  const inside = app.graph.groups.filter((group) => {
    const [x, y, width, height] = group.boundingRect
    const [left, top] = node.pos
    return left >= x && top >= y &&
      left + node.size[0] <= x + width && top + node.size[1] <= y + height
  })
  return inside.length !== 1
}).map((node) => `${node.id} ${node.title}`)
"""

UNKNOWN_NODES = """
return app.graph.nodes
  .filter((node) => node.has_errors || !LiteGraph.registered_node_types[node.type])
  .map((node) => node.type)
"""

TOUCH_LEARNING_RATE = """
const node = app.graph.nodes.find((node) => node.type === 'AtelierTrainLoRA')
const widget = node.widgets.find((widget) => widget.name === 'learning_rate')
const field = document.querySelector(`[data-node-id="${node.id}"] [aria-label="learning_rate"]`)
const input = field.matches('input') ? field : field.querySelector('input')
input.focus()
await new Promise((resolve) => setTimeout(resolve, 300))
const shown = input.value
input.blur()
await new Promise((resolve) => setTimeout(resolve, 300))
return { shown, value: widget.value }
"""

SELECT_NODE = """
app.canvas.selectNode(app.graph.nodes.find((node) => node.type === argument))
await new Promise((resolve) => setTimeout(resolve, 500))
"""


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def our_problems(frontend: Frontend) -> list[str]:
    """ComfyUI's page has errors of its own; ours name our files or our nodes."""
    names = (f"/extensions/{ROOT.name}/", "Atelier", "atelier")
    # The page asks for the metadata of every node online, which the server's policy forbids.
    problems = [text for text in frontend.problems() if "api.comfy.org" not in text]
    return [text for text in problems if any(name in text for name in names)]


@pytest.fixture(scope="module", params=OPENED, ids="-".join)
def opened(request: pytest.FixtureRequest, frontend: Frontend) -> tuple[dict[str, Any], bool]:
    """A graph that is open on one of the two canvases, and whether that is the one in HTML."""
    name, canvas = request.param
    graph = read(ROOT / "workflows" / f"{name}.json")
    frontend.open(vue_nodes=CANVASES[canvas])
    frontend.load(graph)
    return graph, CANVASES[canvas]


@pytest.fixture(scope="module")
def graph(opened: tuple[dict[str, Any], bool]) -> dict[str, Any]:
    return opened[0]


@pytest.fixture(scope="module")
def is_html(opened: tuple[dict[str, Any], bool]) -> bool:
    return opened[1]


def test_workflows_open_whole(frontend: Frontend, graph: dict[str, Any], is_html: bool) -> None:
    assert frontend.evaluate(UNKNOWN_NODES) == []
    assert frontend.evaluate("return app.graph.nodes.length") == len(graph["nodes"])
    assert frontend.evaluate("return app.graph.links.size") == len(graph["links"])
    drawn_in_html = frontend.evaluate("return document.querySelectorAll('[data-node-id]').length")
    assert drawn_in_html == (len(graph["nodes"]) if is_html else 0)


@pytest.mark.usefixtures("is_html")
def test_nodes_lie_in_their_groups(frontend: Frontend) -> None:
    assert frontend.evaluate(NODES_OUTSIDE_THEIR_GROUP) == []


@pytest.mark.usefixtures("is_html")
def test_the_pack_causes_no_error_on_the_page(frontend: Frontend) -> None:
    assert our_problems(frontend) == []


@pytest.mark.usefixtures("is_html")
def test_the_page_queues_what_the_command_line_queues(
    frontend: Frontend, browser_server: ComfyServer, graph: dict[str, Any]
) -> None:
    object_info = browser_server.object_info()
    queued = frontend.to_prompt()
    for node in queued.values():  # PreviewAny's page adds the field of what it shows
        declared = object_info[node["class_type"]]["input"]
        known = declared.get("required", {}) | declared.get("optional", {})
        node["inputs"] = {n: value for n, value in node["inputs"].items() if n in known}
    assert queued == workflow.to_api(graph, object_info)


def test_the_library_takes_the_recipes_as_nodes(frontend: Frontend) -> None:
    """The page reads every blueprint when it opens, and names those that it cannot."""
    frontend.open()
    frontend.evaluate("await new Promise((resolve) => setTimeout(resolve, 2000))")
    assert [text for text in frontend.problems() if "blueprint" in text] == []


def test_a_small_learning_rate_survives_a_visit_of_its_field(frontend: Frontend) -> None:
    frontend.open(vue_nodes=True)
    frontend.load(read(ROOT / "workflows" / "atelier_flux1_dev_qlora.json"))
    touched = frontend.evaluate(TOUCH_LEARNING_RATE)
    assert (float(touched["shown"]), touched["value"]) == (1e-4, 1e-4)


@pytest.mark.parametrize(
    ("locale", "title", "heading"),
    [("en", "Train LoRA", "Inputs"), ("zh", "训练 LoRA", "输入")],
)
def test_the_help_of_train_lora_is_shown(
    frontend: Frontend, locale: str, title: str, heading: str
) -> None:
    frontend.open(locale=locale)
    frontend.load(read(ROOT / "workflows" / "atelier_quickstart_nano.json"))
    frontend.evaluate(SELECT_NODE, "AtelierTrainLoRA")
    frontend.click('[data-testid="info-button"]')
    assert frontend.wait_for(".node-help-content h1") == title
    assert frontend.wait_for(f".node-help-content h2:has-text('{heading}')")
    assert frontend.wait_for(".node-help-content table")


RUN_WITH_FOLDER = """
const node = app.graph.nodes.find((node) => node.type === 'AtelierImageFolderDataset')
node.widgets.find((widget) => widget.name === 'folder').value = argument
await app.queuePrompt(0)
"""


@pytest.mark.parametrize(
    ("locale", "message"),
    [
        ("en", "is damaged, cut off or not a picture. Replace or remove it."),
        ("zh", "已损坏、不完整或不是图片。请替换或删除它。"),
    ],
)
def test_errors_speak_the_language_of_the_page(
    frontend: Frontend, browser_server: ComfyServer, locale: str, message: str
) -> None:
    folder = browser_server.base_directory / "input" / "damaged"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "cut.txt").write_text("a caption", encoding="utf-8")
    frontend.open(locale=locale)
    frontend.load(read(ROOT / "workflows" / "atelier_quickstart_nano.json"))
    frontend.evaluate(RUN_WITH_FOLDER, "damaged")
    dialog, summary = f".p-dialog:has-text('{message}')", "[data-testid=error-overlay-see-errors]"
    if message not in frontend.wait_for(
        f"{dialog}, {summary}"
    ):  # newer pages: the text is behind it
        frontend.click(summary)
    panel = f"[data-testid=runtime-error-panel]:has-text('{message}')"
    assert message in frontend.wait_for(f"{dialog}, {panel}")


def test_refusals_speak_the_language_of_the_page(frontend: Frontend) -> None:
    frontend.open(locale="zh")
    frontend.load(read(ROOT / "workflows" / "atelier_quickstart_nano.json"))
    frontend.evaluate(RUN_WITH_FOLDER, "nowhere")
    refused = frontend.evaluate("return Object.values(app.lastNodeErrors)")
    details = [error["details"] for node in refused for error in node["errors"]]
    assert any(text.startswith("folder - 图片文件夹 'nowhere' 不在") for text in details), details
    frontend.evaluate("await app.api.interrupt()")


PRESS_CLEAR = """
const node = app.graph.nodes.find((node) => node.type === argument)
node.widgets.find((widget) => widget.type === 'button').callback()
"""

CLEAR_TEXTS = {
    "en": ("Clear cache", "Remove all encoded pictures?", "Confirm", "3.0 MiB are free again."),
    "zh": ("清空缓存", "删除所有已编码的图片？", "确认", "已释放 3.0 MiB。"),
}


@pytest.fixture
def cached_latents(browser_server: ComfyServer) -> Path:
    """A file that stands for a shard of encoded pictures."""
    folder = browser_server.base_directory / "output" / "atelier" / "cache" / "latents"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.safetensors").write_bytes(bytes(3 << 20))
    return folder / "a.safetensors"


@pytest.mark.parametrize("vue_nodes", CANVASES.values(), ids=CANVASES)
@pytest.mark.parametrize("locale", CLEAR_TEXTS)
def test_the_button_of_cache_latents_clears_its_cache_when_it_is_confirmed(
    frontend: Frontend, cached_latents: Path, vue_nodes: bool, locale: str
) -> None:
    label, question, confirm, done = CLEAR_TEXTS[locale]
    frontend.open(locale=locale, vue_nodes=vue_nodes)
    frontend.load(read(ROOT / "workflows" / "atelier_quickstart_nano.json"))
    if vue_nodes:
        node = frontend.evaluate(
            "return app.graph.nodes.find((node) => node.type === 'AtelierCacheLatents').id"
        )
        frontend.click(f'[data-node-id="{node}"] button:has-text("{label}")')
    else:
        frontend.evaluate(PRESS_CLEAR, "AtelierCacheLatents")
    assert question in frontend.wait_for(f"[role=dialog]:has-text('{question}')")
    assert cached_latents.is_file()
    frontend.click(f"[role=dialog] button:has-text('{confirm}')")
    assert done in frontend.wait_for(f"[role=alert]:has-text('{done}')")
    assert not cached_latents.exists()
    assert our_problems(frontend) == []


def test_a_button_that_is_not_confirmed_clears_nothing(
    frontend: Frontend, cached_latents: Path
) -> None:
    frontend.open()
    frontend.load(read(ROOT / "workflows" / "atelier_quickstart_nano.json"))
    frontend.evaluate(PRESS_CLEAR, "AtelierCacheLatents")
    frontend.wait_for("[role=dialog]:has-text('Remove all encoded pictures?')")
    frontend.click("[role=dialog] button:has-text('Cancel')")
    frontend.evaluate("await new Promise((resolve) => setTimeout(resolve, 1000))")
    assert cached_latents.is_file()


UPLOAD = """
const node = app.graph.nodes.find((node) => node.type === 'AtelierImageFolderDataset')
node.widgets.find((widget) => widget.type === 'button').callback()
const picker = document.querySelector('.atelier-upload')
const files = new DataTransfer()
for (const [name, bytes] of argument)
  files.items.add(new File([Uint8Array.from(atob(bytes), (c) => c.charCodeAt(0))], name))
picker.files = files.files
picker.dispatchEvent(new Event('change'))
"""
UPLOAD_TEXTS = {
    "en": ("Upload pictures", "4 files lie in the folder"),
    "zh": ("上传图片", "4 个文件已放入文件夹"),
}


def png_bytes(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("vue_nodes", CANVASES.values(), ids=CANVASES)
@pytest.mark.parametrize("locale", UPLOAD_TEXTS)
def test_pictures_and_captions_are_uploaded_into_a_folder_that_is_then_chosen(
    frontend: Frontend, browser_server: ComfyServer, vue_nodes: bool, locale: str
) -> None:
    label, done = UPLOAD_TEXTS[locale]
    folder = f"uploaded {locale} {vue_nodes}"
    files = {
        "one.png": png_bytes("red"),
        "one.txt": b"a red picture",
        "two.png": png_bytes("blue"),
        "two.txt": "蓝色".encode(),
    }
    frontend.open(locale=locale, vue_nodes=vue_nodes)
    frontend.load(read(ROOT / "workflows" / "atelier_quickstart_nano.json"))
    sent = [[name, base64.b64encode(data).decode()] for name, data in files.items()]
    frontend.evaluate(UPLOAD, sent)
    assert label in frontend.wait_for(f"[role=dialog]:has-text('{label}')")
    frontend.enter("[role=dialog] input", folder)
    assert done in frontend.wait_for(f"[role=alert]:has-text('{done}')")
    lying = browser_server.base_directory / "input" / folder
    assert {path.name: path.read_bytes() for path in lying.iterdir()} == files
    chosen = frontend.evaluate(
        "return app.graph.nodes.find((node) => node.type === 'AtelierImageFolderDataset')"
        ".widgets.find((widget) => widget.name === 'folder').value"
    )
    assert chosen == folder
    assert our_problems(frontend) == []
