"""What it costs to watch a training, and how long a long run's curves take to open.

    python -P benchmarks/live_view.py [--comfyui .dev/ComfyUI] [--out live_view.json]

A real ComfyUI with a client at its websocket trains the tests' random FLUX. Blocks of steps that
are watched (memory is asked for, a line goes to the metrics, events to the pages, progress to the
node) and blocks of bare steps take turns in random order; the difference of such a pair is the
cost. In ComfyUI this file is a node of its own, which trains and takes the times: seconds by the
wall clock, which other work on the machine disturbs, and seconds of the processor, of all threads
of the server. The curves are those of a run of 100,000 steps, over HTTP.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COMFYUI = ROOT / ".dev" / "ComfyUI"
sys.path += [str(ROOT / "scripts"), str(ROOT / "tests" / "support")]

KINDS = {
    "long steps": {"pixels": 256, "batch_size": 8, "format": "nf4", "pairs": 120, "block": 1},
    "short steps": {"pixels": 64, "batch_size": 1, "format": "bf16", "pairs": 40, "block": 20},
}
"""Of short steps only some are told of, so that blocks of them are compared."""
LIMITS = {"share_of_long_step": 0.01, "long_step_ms": 200, "ms": 2, "events_per_s": 10, "open_s": 1}
WARM_UP = 5
LONG_RUN = "long-00000000"


class Watched:
    """Turns the watching of a training on and off, and takes the times of its steps."""

    def __init__(self, pairs: int, block: int) -> None:
        order = random.Random(0)
        turns = [turn for _ in range(pairs) for turn in order.sample((True, False), 2)]
        self.is_on = True
        self._plan = [True] * WARM_UP + [turn for turn in turns for _ in range(block)]
        self._marks: list[tuple[float, float]] = []
        self._block = block

    @property
    def num_steps(self) -> int:
        return len(self._plan) + 1

    def next(self) -> None:
        """A step was computed: what follows, up to the end of the next one, has the next turn."""
        self._marks.append((time.perf_counter(), time.process_time()))
        self.is_on = self._plan[min(len(self._marks), len(self._plan)) - 1]

    def milliseconds(self) -> list[dict[str, float]]:
        """Of each pair, for each clock: those of a watched and of a bare step."""
        pairs = []
        width = 2 * self._block
        for begin in range(WARM_UP, len(self._plan), width):
            pair = {}
            for clock, index in (("wall", 0), ("processor", 1)):
                for name, turn in (("watched", True), ("bare", False)):
                    steps = [i for i in range(begin, begin + width) if self._plan[i] == turn]
                    spent = [self._marks[i + 1][index] - self._marks[i][index] for i in steps]
                    pair[f"{clock} {name}"] = statistics.mean(spent) * 1000
            pairs.append(pair)
        return pairs


class MeasureWatching:
    """The node."""

    FUNCTION, CATEGORY, RETURN_TYPES, OUTPUT_NODE = "measure", "benchmark", (), True

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        texts = {name: ("STRING", {}) for name in ("kind", "folder")}
        return {"required": texts, "hidden": {"node_id": "UNIQUE_ID"}}

    def measure(self, kind: str, folder: str, node_id: str) -> tuple:
        watched = Watched(KINDS[kind]["pairs"], KINDS[kind]["block"])
        train(watched, Path(folder), node_id, **KINDS[kind])
        text = json.dumps(watched.milliseconds())
        Path(folder, "milliseconds.json").write_text(text, encoding="utf-8")
        return ()


NODE_CLASS_MAPPINGS = {"MeasureWatching": MeasureWatching}


def train(
    watched: Watched, folder: Path, node_id: str, *, pixels: int, batch_size: int, format: str, **_
) -> None:
    import torch
    from pack import load_pack

    load_pack()
    from atelier.nodes.native import build_model
    from atelier.nodes.session import Asker, Session
    from atelier.nodes.validation import Validation
    from atelier.trainers import loop
    from atelier.trainers.config import JobSettings, Length, TrainSettings
    from atelier.trainers.load import load_flux
    from atelier.trainers.lora_settings import LoraSettings
    from atelier.trainers.rhythm import NEVER
    from atelier.trainers.run import Run
    from flux_files import write_flux
    from training import training_data

    ask_memory, log, tell = loop.memory_in_use, Run.log, Session._on_step

    def ask_memory_if_watched(device: Any) -> Any:
        watched.next()
        return ask_memory(device) if watched.is_on else (None, 0)

    loop.memory_in_use = ask_memory_if_watched
    Run.log = lambda *arguments: log(*arguments) if watched.is_on else None
    Session._on_step = lambda *arguments: tell(*arguments) if watched.is_on else None
    try:
        torch.set_num_threads(1)
        file = write_flux(folder / "flux.safetensors")
        model = build_model(load_flux(file, format=format), torch.float32)
        job = JobSettings(
            length=Length(amount=watched.num_steps),
            lora=LoraSettings(rank=16),
            train=TrainSettings(
                batch_size=batch_size,
                gradient_accumulation=1,
                gradient_checkpointing=False,
                compute_dtype="fp32",
            ),
            checkpoint_every=1_000_000,
        )
        data = training_data(folder / "caches", ((pixels, pixels),) * batch_size)
        Session(model, data, job, Asker(node_id=node_id), Validation(rhythm=NEVER)).train()
    finally:
        loop.memory_in_use, Run.log, Session._on_step = ask_memory, log, tell


def measure_kind(server: Any, kind: str, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    arrivals: list[tuple[str, float]] = []

    def on_event(event: Any) -> None:
        if event.data.get("node") == "1":
            arrivals.append((event.type, time.monotonic()))

    inputs = {"kind": kind, "folder": str(folder)}
    server.run({"1": {"class_type": "MeasureWatching", "inputs": inputs}}, on_event)
    pairs = json.loads((folder / "milliseconds.json").read_text(encoding="utf-8"))
    times: dict[str, list[float]] = {}
    for name, arrived in arrivals:
        times.setdefault(name, []).append(arrived)
    return {
        **{f"{clock} ms": costs(pairs, clock) for clock in ("wall", "processor")},
        "pairs": len(pairs),
        "steps_of_each": KINDS[kind]["block"],
        "most events in a second": {name: most_in_a_second(times[name]) for name in times},
    }


def costs(pairs: list[dict[str, float]], clock: str) -> dict[str, float]:
    """Median of the bare steps, and quartiles of what watched ones take more."""
    more = [pair[f"{clock} watched"] - pair[f"{clock} bare"] for pair in pairs]
    low, middle, high = statistics.quantiles(more, n=4)
    step = statistics.median(pair[f"{clock} bare"] for pair in pairs)
    named = {"step": step, "cost": middle, "cost, lower quartile": low, "upper": high}
    return {name: round(value, 3) for name, value in named.items()} | {
        "share": round(middle / step, 5)
    }


def most_in_a_second(times: list[float]) -> int:
    return max(sum(begin <= t < begin + 1 for t in times) for begin in times)


def write_long_run(root: Path) -> None:
    folder, numbers = root / LONG_RUN, random.Random(0)
    folder.mkdir(parents=True)
    (folder / "run.json").write_text('{"version": 1}', encoding="utf-8")
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for step in range(1, 100_001):
            names = ("loss", "grad_norm", "learning_rate", "seconds")
            line = {"step": step, **{name: numbers.random() for name in names}}
            line |= {"memory": numbers.randrange(1 << 34), "ram": numbers.randrange(1 << 34)}
            file.write(json.dumps(line) + "\n")


def measure_opening(server: Any) -> dict[str, float]:
    """The smallest of five times; other work on the machine only adds to it."""
    found: dict[str, float] = {}
    for name, path in {
        "list": "/atelier/runs",
        "run": f"/atelier/runs/{LONG_RUN}",
        "curves": f"/atelier/runs/{LONG_RUN}/metrics",
        "curves since the last step": f"/atelier/runs/{LONG_RUN}/metrics?since=99999",
    }.items():
        seconds = []
        for _ in range(5):
            began = time.perf_counter()
            with urllib.request.urlopen(server.url + path, timeout=60) as response:
                body = response.read()
            seconds.append(time.perf_counter() - began)
        found |= {f"{name}, s": round(min(seconds), 4), f"{name}, bytes": len(body)}
    return found


def main() -> None:
    from comfy_server import ComfyServer

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comfyui", type=Path, default=COMFYUI)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/live_view.json")
    arguments = parser.parse_args()
    result = {"machine": platform.machine(), "cores": os.cpu_count(), "limits": LIMITS}
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        (base / "custom_nodes").mkdir()
        (base / "custom_nodes" / "measure_watching.py").symlink_to(Path(__file__).resolve())
        write_long_run(base / "output" / "atelier")
        allowed = ("--cpu", "--whitelist-custom-nodes", ROOT.name, "measure_watching.py")
        with ComfyServer(arguments.comfyui, base, arguments=allowed) as server:
            result |= {kind: measure_kind(server, kind, base / kind) for kind in KINDS}
            result["100,000 steps"] = measure_opening(server)
    text = json.dumps(result, indent=2) + "\n"
    sys.stdout.write(text)
    arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
