"""ComfyUI's frontend in a headless Chromium.

Called as a script it draws every graph of workflows/ and saves the picture beside it:
`.dev/venv/bin/python tests/browser/frontend.py`, after a change of a workflow.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
MODULES = ROOT / ".dev" / "browser"
PACKAGE = Path(__file__).parent / "package.json"
DRIVER = Path(__file__).parent / "driver.mjs"
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge")

PICTURE_SIZE = (2400, 1200)
"""The page of a workflow's picture, which is cut to the graph."""
MARGIN = 24
"""Pixels around the graph in its picture."""

SETTINGS = {
    "Comfy.TutorialCompleted": True,  # else a new user's page opens with the template browser
    "Comfy.NodeBadge.NodeSourceBadgeMode": "None",  # the name of the checkout's folder
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,  # draw texts at every zoom
}

SHOW_GRAPH_ALONE = """
const margin = argument
const style = document.createElement('style')
style.textContent = `
  body * { visibility: hidden !important }
  #graph-canvas, .dom-widget, .dom-widget * { visibility: visible !important }`
document.head.append(style)
const boxes = [...app.graph.nodes, ...app.graph.groups].map((item) => item.boundingRect)
const left = Math.min(...boxes.map((box) => box[0]))
const top = Math.min(...boxes.map((box) => box[1]))
const width = Math.max(...boxes.map((box) => box[0] + box[2])) - left
const height = Math.max(...boxes.map((box) => box[1] + box[3])) - top
const page = document.querySelector('#graph-canvas').getBoundingClientRect()
const scale = Math.min((page.width - 2 * margin) / width, (page.height - 2 * margin) / height)
app.canvas.ds.scale = scale
app.canvas.ds.offset[0] = margin / scale - left
app.canvas.ds.offset[1] = margin / scale - top
app.canvas.setDirty(true, true)
await new Promise((resolve) => setTimeout(resolve, 1000))
return {
  x: page.x,
  y: page.y,
  width: width * scale + 2 * margin,
  height: height * scale + 2 * margin
}
"""

BOX_OF = """
const { x, y, width, height } = document.querySelector(argument[0]).getBoundingClientRect()
const margin = argument[1]
return { x: x - margin, y: y - margin, width: width + 2 * margin, height: height + 2 * margin }
"""


class Unavailable(Exception):
    """There is no browser to drive; the message says what is missing."""


def find_chromium() -> Path:
    """The executable: ATELIER_CHROMIUM, or the first known name on the PATH."""
    named = os.environ.get("ATELIER_CHROMIUM")
    found = named or next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
    if found is None:
        raise Unavailable("no Chromium is installed: install it, or name it in ATELIER_CHROMIUM")
    return Path(found)


def install_playwright() -> Path:
    """A node_modules folder that holds playwright-core, installed once under .dev."""
    npm = shutil.which("npm")
    if npm is None:
        raise Unavailable("npm is not installed, so playwright-core cannot be installed")
    installed = MODULES / "package.json"
    same = installed.exists() and installed.read_bytes() == PACKAGE.read_bytes()
    if not (same and (MODULES / "node_modules" / "playwright-core").is_dir()):
        MODULES.mkdir(parents=True, exist_ok=True)
        shutil.copy(PACKAGE, installed)
        command = [npm, "install", "--no-audit", "--no-fund", "--prefix", str(MODULES)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            installed.unlink()
            raise Unavailable(f"npm could not install playwright-core: {done.stderr[-300:]}")
    return MODULES / "node_modules"


class Frontend:
    """One page at a time on `server` (a ComfyClient), whose user's settings it changes."""

    def __init__(self, server: Any) -> None:
        self._server = server
        command = ["node", str(DRIVER), str(install_playwright()), str(find_chromium())]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._driver = subprocess.Popen(command, text=True, encoding="utf-8", **pipes)

    def __enter__(self) -> Frontend:
        return self

    def __exit__(self, *_: object) -> None:
        self._driver.stdin.close()  # the driver closes the browser
        try:
            self._driver.wait(timeout=20)
        finally:
            self._driver.kill()

    def open(
        self,
        *,
        locale: str = "en",
        vue_nodes: bool = False,
        theme: str = "dark",
        size: tuple[int, int] = (1920, 1080),
        sharpness: int = 1,
    ) -> None:
        """Load the page anew: language, classic canvas or Nodes 2.0, palette of colours.

        Screenshots have `sharpness` times as many pixels as the page.
        """
        chosen = {
            "Comfy.Locale": locale,
            "Comfy.VueNodes.Enabled": vue_nodes,
            "Comfy.ColorPalette": theme,
        }
        self._server.post("/settings", {**SETTINGS, **chosen})
        width, height = size
        page = {"url": self._server.url, "locale": locale, "sharpness": sharpness}
        self._call("open", **page, width=width, height=height)

    def open_another(self) -> None:
        """Another page of the same browser, which is driven from then on."""
        self._call("openAnother", url=self._server.url)

    def go_to(self, index: int) -> None:
        """Drive the page that was opened as the `index`-th."""
        self._call("goTo", index=index)

    def reload(self) -> None:
        self._call("reload")

    def load(self, workflow: dict[str, Any]) -> None:
        """Open a workflow in UI form, as if its file had been chosen.

        A page that is slow may replace it by what it opens with; then it is opened again.
        """
        self.evaluate(
            """
            for (let attempt = 0; attempt < 5; attempt++) {
              await app.loadGraphData(argument, true, true)
              await new Promise((resolve) => setTimeout(resolve, 1500))
              if (app.graph.nodes.length === argument.nodes.length) return
            }
            """,
            workflow,
        )

    def evaluate(self, body: str, argument: Any = None) -> Any:
        """What the JavaScript function body `body` returns; it sees `argument` and `app`."""
        return self._call("evaluate", body=body, argument=argument)

    def to_prompt(self) -> dict[str, Any]:
        """The open graph in API form, as the Run button queues it."""
        return self.evaluate("return (await app.graphToPrompt()).output")

    def click(self, selector: str) -> None:
        self._call("click", selector=selector)

    def hover(self, selector: str, x: float = 0.5, y: float = 0.5) -> None:
        """Move the mouse over an element; the place in parts of its width and height."""
        self._call("hover", selector=selector, x=x, y=y)

    def press(self, keys: str) -> None:
        self._call("press", keys=keys)

    def enter(self, selector: str, text: str) -> None:
        """Write a text into a field, and press Enter."""
        self._call("fill", selector=selector, text=text)
        self._call("press", keys="Enter")

    def wait_for(self, selector: str) -> str:
        """The text of the first element that matches, once it is visible."""
        return self._call("wait", selector=selector)

    def screenshot(self, path: Path, of: str | None = None, margin: int = 0) -> None:
        """A picture of the page, or of the first element that `of` selects."""
        clip = self.evaluate(BOX_OF, [of, margin]) if of else None
        self._call("screenshot", path=str(path), clip=clip)

    def picture_of_graph(self, path: Path) -> None:
        """A picture of the whole graph, as large as the page allows, and of nothing else."""
        clip = self.evaluate(SHOW_GRAPH_ALONE, MARGIN)
        self._call("screenshot", path=str(path), clip=clip)

    def problems(self) -> list[str]:
        """Errors on the console and uncaught exceptions since the page was opened."""
        return self._call("problems")

    def _call(self, command: str, **options: Any) -> Any:
        self._driver.stdin.write(json.dumps({"command": command, **options}) + "\n")
        self._driver.stdin.flush()
        answer = json.loads(self._driver.stdout.readline() or '{"error": "the driver ended"}')
        if "error" in answer:
            raise RuntimeError(f"{command} in the browser: {answer['error']}")
        return answer["result"]


def draw_pictures() -> None:
    """Save the picture of every workflow beside it."""
    sys.path.append(str(ROOT / "scripts"))
    from comfy_server import ComfyServer

    comfyui = Path(os.environ.get("ATELIER_COMFYUI") or ROOT / ".dev" / "ComfyUI")
    with (
        tempfile.TemporaryDirectory() as base,
        ComfyServer(comfyui, Path(base), arguments=("--cpu",)) as server,
        Frontend(server) as frontend,
    ):
        for path in WORKFLOWS:
            frontend.open(size=PICTURE_SIZE)
            frontend.load(json.loads(path.read_text(encoding="utf-8")))
            frontend.picture_of_graph(path.with_suffix(".jpg"))


if __name__ == "__main__":
    draw_pictures()
