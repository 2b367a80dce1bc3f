"""Draws the pictures of the live view in docs/, during real trainings of the nano model.

`.dev/venv/bin/python tests/browser/live_pictures.py [BASE]`, after a change of the live view. What
was trained lies below BASE, so a second call with it goes on there; else in a temporary folder.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from frontend import ROOT, Frontend

sys.path.append(str(ROOT / "scripts"))
import demo
from comfy_server import ComfyServer

DOCS = ROOT / "docs"
QUICKSTART = ROOT / "workflows" / "atelier_quickstart_nano.json"
RATES = {"careful": 2e-4, "bold": 2e-3, "openmoji_style": 5e-4}
NUM_STEPS = 60
SETTINGS = {
    "length": NUM_STEPS,
    "batch_size": 1,
    "sample_every": 15,
    "sample_steps": 8,
    "checkpoint_every": 15,
}
VIEW = ".dom-widget .atelier-run"

PREPARE = """
const node = app.graph.nodes.find((node) => node.type === 'AtelierTrainLoRA')
for (const widget of node.widgets)
  if (widget.name in argument) widget.value = argument[widget.name]
app.canvas.ds.scale = 1
app.canvas.ds.offset = [-node.pos[0] + 650, -node.pos[1] - node.size[1] + 960]
app.canvas.setDirty(true, true)
await new Promise((resolve) => setTimeout(resolve, 500))
await app.queuePrompt(0)
"""
UNTIL_STEP = """
const [view, step] = argument
const node = app.graph.nodes.find((node) => node.type === 'AtelierTrainLoRA')
const isThere = () => {
  const steps = document.querySelector(`${view} .atelier-body:not([hidden]) .atelier-steps`)
  const name = node.widgets.find(({ name }) => name === 'name').value
  return node.properties.atelier_run?.startsWith(`${name}-`) && parseInt(steps?.textContent) >= step
}
while (!isThere()) await new Promise((resolve) => setTimeout(resolve, 100))
await new Promise((resolve) => setTimeout(resolve, 300))
"""
COMPARE = """
document.querySelector('.atelier-tab header button').click()
await new Promise((resolve) => setTimeout(resolve, 1000))
for (const box of document.querySelectorAll('.atelier-list input')) box.click()
await new Promise((resolve) => setTimeout(resolve, 2000))
"""
UNTIL_IDLE = """
while ((await (await fetch('/prompt')).json()).exec_info.queue_remaining)
  await new Promise((resolve) => setTimeout(resolve, 500))
"""


def workflow() -> dict[str, Any]:
    return json.loads(QUICKSTART.read_text(encoding="utf-8"))


def draw(frontend: Frontend) -> None:
    frontend.open(size=(1800, 1000), sharpness=2)
    frontend.load(workflow())
    for name, rate in RATES.items():
        frontend.evaluate(PREPARE, {**SETTINGS, "name": name, "learning_rate": rate})
        frontend.evaluate(UNTIL_STEP, [VIEW, int(0.9 * NUM_STEPS)])
        if name == list(RATES)[-1]:
            frontend.screenshot(DOCS / "live_view.png", of=VIEW, margin=10)
        frontend.evaluate(UNTIL_STEP, [VIEW, NUM_STEPS])
        frontend.evaluate("await app.api.interrupt()")  # what comes after the training
        frontend.evaluate(UNTIL_IDLE)
    frontend.click("button:has(.pi-chart-line)")
    frontend.wait_for(".atelier-list li")
    frontend.evaluate(COMPARE)
    frontend.hover(".atelier-comparison canvas", x=0.6)
    frontend.wait_for(".atelier-readout")
    frontend.screenshot(DOCS / "runs_tab.png", of=".atelier-page")


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the server ends too
    comfyui = Path(os.environ.get("ATELIER_COMFYUI") or ROOT / ".dev" / "ComfyUI")
    with ExitStack() as stack:
        base = sys.argv[1] if len(sys.argv) > 1 else None
        base = base or stack.enter_context(tempfile.TemporaryDirectory())
        server = stack.enter_context(ComfyServer(comfyui, Path(base), arguments=("--cpu",)))
        demo.write_dataset(server)
        draw(stack.enter_context(Frontend(server)))


if __name__ == "__main__":
    main()
