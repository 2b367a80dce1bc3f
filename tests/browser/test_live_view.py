"""The live view on Train LoRA and the tab of all runs, on the real page, in both canvases."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comfy_server import ComfyServer
from frontend import ROOT, Frontend
from graphs import write_pictures
from run_folders import SETTINGS, WrittenRun
from test_frontend import CANVASES, our_problems, read

QUICKSTART = ROOT / "workflows" / "atelier_quickstart_nano.json"
TAB_BUTTON = "button:has(.pi-chart-line)"
NODE = {False: ".dom-widget .atelier-run", True: "[data-node-id] .atelier-run"}
"""Where the view of the node is, on the classic canvas and in Nodes 2.0."""

SHOW_NODE = """
const node = app.graph.nodes.find((node) => node.type === 'AtelierTrainLoRA')
app.canvas.ds.scale = 0.8
app.canvas.ds.offset = [-node.pos[0] + 700, -node.pos[1] + 100]
app.canvas.setDirty(true, true)
await new Promise((resolve) => setTimeout(resolve, 800))
"""
UNTIL = """
const end = performance.now() + 120000
while (performance.now() < end) {
  const found = (() => { %s })()
  if (found) return found
  await new Promise((resolve) => setTimeout(resolve, 50))
}
throw new Error('it did not happen within two minutes')
"""
IS_DRAWN = """
const canvas = document.querySelector(argument)
if (!canvas?.width) return false
const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height)
return data.some((value) => value > 0)
"""
COLUMNS = """
const { follow } = await import(`/extensions/${argument[0]}/run_data.mjs`)
let known
const unfollow = follow(argument[1], (run) => (known = run))
while (!known) await new Promise((resolve) => setTimeout(resolve, 20))
unfollow()
return known.columns
"""


def until(frontend: Frontend, body: str, argument: Any = None) -> Any:
    return frontend.evaluate(UNTIL % body, argument)


def workflow_with(run: str | None = None, **values: Any) -> dict[str, Any]:
    """The quickstart, with a run that its Train LoRA remembers and other values of its widgets."""
    graph = read(QUICKSTART)
    node = next(node for node in graph["nodes"] if node["type"] == "AtelierTrainLoRA")
    if run is not None:
        node["properties"]["atelier_run"] = run
    names = [entry["name"] for entry in node["inputs"] if "widget" in entry]
    for name, value in values.items():
        node["widgets_values"][names.index(name)] = value
    return graph


@pytest.fixture
def output(browser_server: ComfyServer) -> Iterator[Path]:
    """The output folder, without runs before and after."""
    folder = browser_server.base_directory / "output"
    shutil.rmtree(folder / "atelier", ignore_errors=True)
    yield folder
    shutil.rmtree(folder / "atelier", ignore_errors=True)


@pytest.mark.parametrize("vue_nodes", CANVASES.values(), ids=CANVASES)
@pytest.mark.parametrize(
    ("locale", "theme", "state", "quantity"),
    [("en", "dark", "Finished", "Loss"), ("zh", "light", "已完成", "损失")],
)
def test_the_node_shows_the_run_that_it_remembers(
    frontend: Frontend,
    output: Path,
    vue_nodes: bool,
    locale: str,
    theme: str,
    state: str,
    quantity: str,
) -> None:
    run = WrittenRun(name="kept", eval_every=100)
    run.write(output)
    frontend.open(locale=locale, vue_nodes=vue_nodes, theme=theme)
    frontend.load(workflow_with(run.id))
    frontend.evaluate(SHOW_NODE)
    view = NODE[vue_nodes]
    assert frontend.wait_for(f"{view} .atelier-state") == state
    assert frontend.wait_for(f"{view} .atelier-steps") == "400 / 400"
    chosen = "return document.querySelector(argument).selectedOptions[0].textContent"
    assert frontend.evaluate(chosen, f"{view} select") == quantity
    assert until(frontend, IS_DRAWN, f"{view} canvas")
    pictures = "return document.querySelectorAll(argument).length"
    assert frontend.evaluate(pictures, f"{view} .atelier-sample") == len(run.sample_steps)
    assert our_problems(frontend) == []


def test_without_a_run_the_node_says_what_will_be_there(frontend: Frontend, output: Path) -> None:
    frontend.open()
    frontend.load(workflow_with("gone-00000000"))
    frontend.evaluate(SHOW_NODE)
    shown = frontend.wait_for(f"{NODE[False]} .atelier-empty")
    assert shown == "Queue the graph: the training is shown here."
    assert our_problems(frontend) == []


def test_a_run_is_saved_with_the_workflow_but_not_queued(frontend: Frontend, output: Path) -> None:
    run = WrittenRun(name="kept")
    run.write(output)
    frontend.open()
    frontend.load(workflow_with(run.id))
    frontend.wait_for(f"{NODE[False]} .atelier-state")
    saved = frontend.evaluate("return app.graph.serialize()")
    node = next(node for node in saved["nodes"] if node["type"] == "AtelierTrainLoRA")
    assert node["properties"]["atelier_run"] == run.id
    inputs = frontend.to_prompt()[str(node["id"])]["inputs"]
    assert "live_view" not in inputs


def test_the_mouse_over_a_step_shows_its_values(frontend: Frontend, output: Path) -> None:
    run = WrittenRun(name="kept", step=11, num_steps=11, sample_steps=(0,))
    folder = run.write(output)
    frontend.open()
    frontend.load(workflow_with(run.id))
    frontend.evaluate(SHOW_NODE)
    assert until(frontend, IS_DRAWN, f"{NODE[False]} canvas")
    frontend.hover(f"{NODE[False]} canvas", x=0.999)
    readout = frontend.wait_for(f"{NODE[False]} .atelier-readout").split()
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert readout[:2] == ["Step", "11"]
    assert float(readout[-1]) == pytest.approx(last["loss"], rel=1e-3)


def test_a_sample_is_enlarged_and_turned_with_keys(frontend: Frontend, output: Path) -> None:
    run = WrittenRun(name="kept", prompts=("a fox", "a house"))
    run.write(output)
    frontend.open()
    frontend.load(workflow_with(run.id))
    frontend.evaluate(SHOW_NODE)
    frontend.wait_for(f"{NODE[False]} .atelier-sample")
    frontend.evaluate("document.querySelectorAll('.dom-widget .atelier-sample')[3].click()")
    assert frontend.wait_for("dialog figcaption").split() == ["Step", "300", "a", "fox"]
    frontend.press("ArrowRight")
    frontend.press("ArrowRight")
    assert frontend.wait_for("dialog figcaption").split() == ["Step", "0", "a", "house"]
    frontend.press("Escape")
    assert until(frontend, "return !document.querySelector('dialog.atelier-enlarged')")


def open_tab(frontend: Frontend) -> None:
    frontend.click(TAB_BUTTON)
    frontend.wait_for(".atelier-tab h2")


@pytest.mark.parametrize(("locale", "title"), [("en", "Runs"), ("zh", "训练记录")])
def test_the_tab_compares_runs_in_one_chart(
    frontend: Frontend, output: Path, locale: str, title: str
) -> None:
    runs = [WrittenRun(name="one", floor=0.2), WrittenRun(name="two", state="stopped", step=200)]
    for run in runs:
        run.write(output)
    frontend.open(locale=locale)
    open_tab(frontend)
    assert frontend.wait_for(".atelier-tab h2") == title
    for run in runs:
        frontend.click(f"li[data-run='{run.id}'] input")
    assert until(frontend, IS_DRAWN, ".atelier-comparison canvas")
    frontend.hover(".atelier-comparison canvas", x=0.3)
    shown = frontend.wait_for(".atelier-readout").split()
    assert [run.id in shown for run in runs] == [True, True]
    frontend.click(f"li[data-run='{runs[0].id}'] input")
    assert frontend.wait_for(".atelier-legend") == runs[1].id
    assert our_problems(frontend) == []


def test_a_run_is_deleted_when_that_is_confirmed(frontend: Frontend, output: Path) -> None:
    kept, gone = WrittenRun(name="kept"), WrittenRun(name="gone")
    folders = [kept.write(output), gone.write(output)]
    frontend.open()
    open_tab(frontend)
    frontend.click(f"li[data-run='{gone.id}'] .atelier-open")
    frontend.click(".atelier-danger")
    frontend.wait_for(f"[role=dialog]:has-text('{gone.id}')")
    frontend.click("[role=dialog] button:has-text('Cancel')")
    assert folders[1].is_dir()
    frontend.click(".atelier-danger")
    frontend.click("[role=dialog] button:has-text('Delete')")
    gone_row = f"return !document.querySelector(\"li[data-run='{gone.id}']\")"
    assert until(frontend, f"{gone_row} && document.querySelector('.atelier-list li')")
    assert [folder.exists() for folder in folders] == [True, False]
    assert our_problems(frontend) == []


@pytest.mark.parametrize("vue_nodes", CANVASES.values(), ids=CANVASES)
def test_settings_are_copied_into_a_new_node(
    frontend: Frontend, output: Path, vue_nodes: bool
) -> None:
    run = WrittenRun(name="copied")
    run.write(output)
    frontend.open(vue_nodes=vue_nodes)
    frontend.load(read(QUICKSTART))
    open_tab(frontend)
    frontend.click(f"li[data-run='{run.id}'] .atelier-open")
    frontend.click("button:has-text('Copy settings')")
    until(frontend, "return document.querySelector('[role=alert]')")
    values = frontend.evaluate(
        "const node = app.graph.nodes.at(-1)\n"
        "return Object.fromEntries(node.widgets.map(({ name, value }) => [name, value]))"
    )
    assert values | SETTINGS | {"name": "copied"} == values
    assert our_problems(frontend) == []


def test_a_refusal_is_told_in_the_language_of_the_page(frontend: Frontend, output: Path) -> None:
    """The graph of a written run has no model, so it cannot be queued again."""
    run = WrittenRun(name="ended", state="cancelled", step=200)
    run.write(output)
    frontend.open(locale="zh")
    open_tab(frontend)
    frontend.click(f"li[data-run='{run.id}'] .atelier-open")
    frontend.click("[data-command=resume]")
    told = frontend.wait_for("[role=alert]")
    assert "继续" in told
    assert "无法继续这次训练" in told


TIME_TO_OPEN = """
document.querySelector('.atelier-opened header button')?.click()
const start = performance.now()
document.querySelector('.atelier-open').click()
while (true) {
  const canvas = document.querySelector('.atelier-opened canvas')
  const drawn = canvas?.width && canvas.getContext('2d')
    .getImageData(0, 0, canvas.width, canvas.height).data.some((value) => value > 0)
  if (drawn) return (performance.now() - start) / 1000
  await new Promise((resolve) => requestAnimationFrame(resolve))
}
"""


def test_a_run_of_100000_steps_opens_in_a_second(frontend: Frontend, output: Path) -> None:
    run = WrittenRun(name="long", step=100_000, num_steps=100_000, sample_steps=(0, 100_000))
    run.write(output)
    frontend.open()
    open_tab(frontend)
    frontend.wait_for(f"li[data-run='{run.id}']")
    # The fastest of three: what is open nowhere is forgotten, so each asks for all of it again.
    assert min(frontend.evaluate(TIME_TO_OPEN) for _ in range(3)) < 1


SERIES = "const series = await import(`/extensions/${argument[0]}/series.mjs`)\n"


def test_smoothing_is_the_weighted_mean_of_all_values_before(frontend: Frontend) -> None:
    values = np.random.default_rng(5).normal(size=50)
    frontend.open()
    smoothed = frontend.evaluate(
        SERIES + "return series.smooth(argument[1], 0.9)", [ROOT.name, list(values)]
    )
    weights = 0.9 ** np.arange(50)
    means = [np.average(values[: n + 1][::-1], weights=weights[: n + 1]) for n in range(50)]
    np.testing.assert_allclose(smoothed, means, rtol=1e-9)


def test_fewer_columns_than_points_keep_every_extreme(frontend: Frontend) -> None:
    values = np.random.default_rng(6).normal(size=9_999)
    frontend.open()
    points = frontend.evaluate(
        SERIES + "return series.reduceToColumns(argument[1].map((_, i) => i), argument[1], "
        "(i) => Math.floor(i / 100))",
        [ROOT.name, list(values)],
    )
    columns = np.array_split(values, range(100, 9_999, 100))
    for number, column in enumerate(columns):
        drawn = [value for place, value in points if place == number]
        assert (min(drawn), max(drawn)) == (column.min(), column.max())
        assert len(drawn) <= 4


@pytest.fixture
def training(frontend: Frontend, output: Path) -> Iterator[dict[str, Any]]:
    """The quickstart while it trains, far longer than a test; its samples at step 0 and at 10."""
    name = f"live{time.monotonic_ns()}"
    graph = workflow_with(name=name, length=5000, sample_every=10, sample_steps=2, batch_size=1)
    write_pictures(output.parent / "input" / "openmoji", size=128)
    frontend.open()
    frontend.load(graph)
    frontend.evaluate(SHOW_NODE)
    frontend.evaluate("await app.queuePrompt(0)")
    frontend.wait_for(f"{NODE[False]} .atelier-state:has-text('Training')")
    yield {"name": name, "graph": graph}
    frontend.evaluate("await app.api.interrupt()")


STEP = "return Number(document.querySelector(argument[0]).textContent.split('/')[0]) > argument[1]"


def wait_for_step(frontend: Frontend, step: int) -> None:
    until(frontend, STEP, [f"{NODE[False]} .atelier-steps", step])


def columns_of(frontend: Frontend) -> dict[str, list[Any]]:
    run = frontend.evaluate(
        "return app.graph.nodes.find((node) => node.type === 'AtelierTrainLoRA')"
        ".properties.atelier_run"
    )
    return frontend.evaluate(COLUMNS, [ROOT.name, run])


def test_a_training_is_watched_and_stopped(
    frontend: Frontend, output: Path, training: dict[str, Any]
) -> None:
    view = NODE[False]
    wait_for_step(frontend, 3)
    first = len(columns_of(frontend)["step"])
    wait_for_step(frontend, 14)
    columns = columns_of(frontend)
    assert len(columns["step"]) > first
    assert columns["step"] == list(range(1, len(columns["step"]) + 1))
    samples = "return document.querySelectorAll(argument).length"
    assert frontend.evaluate(samples, f"{view} button.atelier-sample") >= 2

    frontend.evaluate("app.api.socket.close()")  # what is missed meanwhile is asked for
    until(frontend, "return app.api.socket.readyState === 1")
    wait_for_step(frontend, columns["step"][-1] + 5)
    columns = columns_of(frontend)
    assert columns["step"] == list(range(1, len(columns["step"]) + 1))

    frontend.reload()
    frontend.load(training["graph"])
    frontend.evaluate(SHOW_NODE)
    frontend.wait_for(f"{view} .atelier-state:has-text('Training')")
    wait_for_step(frontend, columns["step"][-1])
    columns = columns_of(frontend)
    assert columns["step"] == list(range(1, len(columns["step"]) + 1))

    frontend.click(f"{view} [data-command=stop]")
    frontend.wait_for(f"{view} .atelier-state:has-text('Stopped and kept')")
    assert list((output / "loras").glob(f"{training['name']}-*.safetensors"))
    assert our_problems(frontend) == []


def test_another_page_sees_the_training_and_pauses_it(
    frontend: Frontend, training: dict[str, Any]
) -> None:
    wait_for_step(frontend, 1)
    frontend.open_another()
    open_tab(frontend)
    frontend.click(".atelier-list .atelier-open")
    frontend.click(".atelier-tab [data-command=pause]")
    assert frontend.wait_for(".atelier-opened .atelier-state:has-text('Paused')")
    frontend.go_to(0)
    frontend.wait_for(f"{NODE[False]} .atelier-notice:has-text('The VRAM is free')")
    before = columns_of(frontend)["step"][-1]
    frontend.click(f"{NODE[False]} [data-command=resume]")
    frontend.wait_for(f"{NODE[False]} .atelier-state:has-text('Training')")
    wait_for_step(frontend, before + 1)
    assert our_problems(frontend) == []
