"""The demo: a style LoRA on the nano model through ComfyUI's queue, shown and measured.

`main` is called by `python scripts/dev.py demo`. The LoRA learns OpenMoji's look from 24 pictures
and is judged on other subjects, of which the nano model has only seen other artworks.
"""

import json
import shutil
import statistics
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import demo_graph
import demo_measure
import demo_pictures
import psutil
from comfy_server import ComfyServer
from demo_graph import AFTER, BEFORE, TRAIN, Graph
from demo_pictures import Subject
from demo_sheet import Row, contact_sheet
from pack import load_pack
from PIL import Image
from progress import NodeProgress, OutputProgress

DATASET = "openmoji"
"""The folder below input/ that the quickstart workflow reads."""
ARTWORK_CREDIT = "The true pictures: OpenMoji (openmoji.org), CC BY-SA 4.0."


def main(
    server: ComfyServer,
    out_dir: Path,
    *,
    settings: tuple[str, ...] = (),
    num_held_out: int | None = None,
) -> None:
    """Train, paint and measure; writes the pictures, the LoRA and summary.json into `out_dir`.

    `settings` change the quickstart, for example "AtelierTrainLoRA.length=20"; of the subjects to
    paint and to measure only the first `num_held_out` are taken.
    """
    began = time.monotonic()
    out_dir.mkdir(parents=True, exist_ok=True)
    write_dataset(server)
    with PeakMemory() as memory:
        graph = demo_graph.load(server.object_info(), settings)
        trained = train(server, graph)
        held_out = demo_pictures.load_subjects("held_out")[:num_held_out]
        rows = paint(server, graph, held_out)
    print("\nMeasuring", flush=True)
    summary = {
        "comfyui_version": server.get("/system_stats")["system"]["comfyui_version"],
        **trained.figures(),
        **measure(server, trained, held_out, rows),
        "lora_path": str(shutil.copy(trained.lora_path, out_dir)),
        "peak_rss_mb": round(memory.peak_bytes / 2**20),
        "total_seconds": round(time.monotonic() - began, 1),
    }
    write_results(out_dir, summary, trained, held_out, rows)
    print(describe(summary, out_dir), flush=True)


@dataclass(frozen=True)
class Trained:
    """What came out of the training node."""

    lora_path: Path
    run_folder: Path
    losses: list[float]
    seconds: float

    def figures(self) -> dict[str, Any]:
        """`loss_first` and `loss_last` are means over the first and the last tenth of the steps."""
        tenth = max(1, len(self.losses) // 10)
        return {
            "steps": len(self.losses),
            "train_seconds": round(self.seconds, 1),
            "loss_first": statistics.fmean(self.losses[:tenth]),
            "loss_last": statistics.fmean(self.losses[-tenth:]),
        }


def write_dataset(server: ComfyServer) -> None:
    """Put the training pictures where the quickstart workflow looks for them."""
    folder = server.base_directory / "input" / DATASET
    demo_pictures.write_dataset(folder, demo_pictures.load_subjects("train"))


def train(server: ComfyServer, graph: Graph) -> Trained:
    """Queue the quickstart workflow as it is."""
    progress = NodeProgress(graph)
    outputs = server.run(graph, progress)["outputs"]
    lora_path = (
        server.base_directory / "output" / "loras" / outputs[demo_graph.LORA_NAME]["text"][0]
    )
    run_name = lora_path.stem.rpartition("-")[0]  # what follows is the number of steps
    run_folder = server.base_directory / "output" / "atelier" / run_name
    metrics = (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return Trained(
        lora_path=lora_path,
        run_folder=run_folder,
        losses=[json.loads(line)["loss"] for line in metrics],
        seconds=progress.seconds.get(demo_graph.node_called(graph, TRAIN), 0.0),
    )


def paint(
    server: ComfyServer, graph: Graph, subjects: list[Subject]
) -> dict[str, list[Image.Image]]:
    """The pictures `base` and `lora` of the subjects, by the workflow's own nodes, and `true`."""
    ids = {
        name: [demo_graph.output_of(graph, title, number) for number in range(len(subjects))]
        for name, title in (("base", BEFORE), ("lora", AFTER))
    }
    print(f"\nPainting {len(subjects)} subjects that the LoRA has not seen, without and with it")
    whole = demo_graph.with_prompts(graph, [subject.caption for subject in subjects])
    progress = OutputProgress([node_id for row in ids.values() for node_id in row])
    outputs = server.run(whole, progress)["outputs"]
    rows = {
        name: [Image.open(server.path_of(outputs[node_id]["images"][0])) for node_id in row]
        for name, row in ids.items()
    }
    return {**rows, "true": demo_pictures.draw(subjects)}


def measure(
    server: ComfyServer,
    trained: Trained,
    subjects: list[Subject],
    rows: dict[str, list[Image.Image]],
) -> dict[str, float]:
    """The loss on true pictures that the LoRA was not trained on, and the judge's scores."""
    losses = demo_measure.held_out_losses(
        server.comfyui,
        trained.run_folder,
        trained.lora_path,
        rows["true"],
        [subject.caption for subject in subjects],
    )
    scores = demo_measure.judge_pictures(rows, [subject.code for subject in subjects])
    return {
        **losses,
        **scores,
        "judge_accuracy_openmoji": demo_measure.judge_accuracy(rows["true"]),
    }


def write_results(
    out_dir: Path,
    summary: dict[str, Any],
    trained: Trained,
    subjects: list[Subject],
    rows: dict[str, list[Image.Image]],
) -> None:
    """before_after.png, loss.png and summary.json."""
    phrase = subjects[0].caption.partition(", ")[2]
    sheet = contact_sheet(
        [subject.name for subject in subjects],
        [
            Row("base", rows["base"]),
            Row("with the\nLoRA", rows["lora"]),
            Row("true\npicture", rows["true"]),
        ],
        title=f"A style LoRA for 4-bit FLUX, {summary['steps']} steps in "
        f"{summary['train_seconds']:.0f} s",
        subtitle=f"Prompts: “{subjects[0].name}, {phrase}” and so on. "
        "None of these subjects is in the pictures that the LoRA was trained on.",
        footnote=ARTWORK_CREDIT,
    )
    sheet.save(out_dir / "before_after.png")
    draw_losses(trained.losses).save(out_dir / "loss.png")
    text = json.dumps(summary, indent=1)
    (out_dir / "summary.json").write_text(text + "\n", encoding="utf-8")


def draw_losses(losses: list[float]) -> Image.Image:
    """The curve, smoothed over about a twentieth of the steps."""
    load_pack()
    from atelier.trainers.loss_plot import loss_plot

    smoothing = 1 - 1 / max(1, len(losses) / 20)
    return loss_plot(losses, smoothing=smoothing, title="Training loss")


def describe(summary: dict[str, Any], out_dir: Path) -> str:
    """The end of the demo in a few lines."""
    fall = 1 - summary["eval_loss_lora"] / summary["eval_loss_base"]
    return f"""
Trained {summary["steps"]} steps in {summary["train_seconds"]:.0f} s; \
all of the demo took {summary["total_seconds"]:.0f} s and {summary["peak_rss_mb"]} MB at most.
On subjects that the LoRA was not trained on:
  loss           {summary["eval_loss_base"]:.3f} -> {summary["eval_loss_lora"]:.3f} \
({fall:.0%} less)
  style score    {summary["style_score_base"]:.2f} -> {summary["style_score_lora"]:.2f} \
(true pictures {summary["style_score_true"]:.2f})
  subject score  {summary["subject_score_base"]:.2f} -> {summary["subject_score_lora"]:.2f} \
(true pictures {summary["subject_score_true"]:.2f})
Look at  {out_dir / "before_after.png"}
         {out_dir / "loss.png"}
The LoRA (for the nano model) is {summary["lora_path"]}
All numbers are in {out_dir / "summary.json"}"""


class PeakMemory:
    """The largest sum of the resident memory of this process's children: the server's tree."""

    def __enter__(self) -> "PeakMemory":
        self.peak_bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.2):
            self.peak_bytes = max(self.peak_bytes, resident_bytes(psutil.Process()))


def resident_bytes(parent: psutil.Process) -> int:
    total = 0
    for process in parent.children(recursive=True):
        try:
            total += process.memory_info().rss
        except psutil.Error:  # it has just ended
            continue
    return total
