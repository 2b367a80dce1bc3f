"""What one training step takes, beside what the pre-flight says of it, and beside the plain recipe.

    python -P benchmarks/memory.py [--formats nf4 int8 bf16] [--runs 5]        # an NVIDIA card
    python -P benchmarks/memory.py --nano                          # a CPU, in some minutes

On a card: a FLUX.1-dev of true shape with random weights, which are made and packed matrix by
matrix, so there is no file and no 24 GB in between; they wait in RAM (6.4 GB in nf4, 12 in int8, 24
in bf16; a format for which RAM is too small is skipped). The recipe at 512x768 and batch 1, rank 4,
with the steps of the loop itself: formats, 77 and 512 text tokens, with and without checkpointing,
streaming (`auto` with room for half of the weights, `ram` with all blocks in RAM), activations in
RAM. Last, the plain diffusers recipe of train_step.py on the same weights, batch and process. What
does not fit on the card is skipped.

Bytes are those of torch's allocator: of CUDA (`max_memory_allocated`), or of the CPU by torch's
profiler. They are counted part by part beyond what was there before:

- weights: what packing them leaves on a CPU, on a card bringing them there.
- network: what making the training network leaves. Predicted is the LoRA; the rest are copies of
  biases, norms and the final modulation.
- optimizer: what the first step leaves, with a card also cuBLAS' workspace (8 to 32 MB).
- step: the peak of the second step beyond its start. Predicted are activations and batch.

`deviation` is predicted / measured - 1 of the total. On a card `ram` has the same of system memory:
blocks that wait there, and the peak of what torch pins during a step. Seconds are medians of
further steps, on a card only (train_step.py compares the times on a CPU). GB are 10^9 bytes.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "scripts"), str(ROOT / "tests" / "support")]

from pack import load_module, load_pack  # noqa: E402

load_pack()

from allocated import Allocated, profiled  # noqa: E402
from atelier.trainers import loop  # noqa: E402
from atelier.trainers.batches import BatchOrder  # noqa: E402
from atelier.trainers.config import JobSettings, TrainSettings  # noqa: E402
from atelier.trainers.data import TrainingData  # noqa: E402
from atelier.trainers.devices import system_memory  # noqa: E402
from atelier.trainers.flux import FluxConfig, is_block_matrix  # noqa: E402
from atelier.trainers.load import LoadedFlux, inspect_flux  # noqa: E402
from atelier.trainers.lora_settings import LoraSettings  # noqa: E402
from atelier.trainers.memory import estimate_training, placed_bytes, store_bytes  # noqa: E402
from atelier.trainers.packed_weight import PackedWeight  # noqa: E402
from atelier.trainers.step import TrainState, optimizer_step  # noqa: E402
from atelier.trainers.store import WeightStore  # noqa: E402
from flux_files import flux_shapes  # noqa: E402
from training import training_data  # noqa: E402

train_step = load_module("train_step", ROOT / "benchmarks" / "train_step.py")

RESULTS = ROOT / "benchmarks" / "results"
FLUX_DEV = {"width": 3072, "depth": 19, "depth_single": 38, "context": 4096, "vector": 768}
NANO = ROOT / "assets" / "nano" / "nano-flux.safetensors"
WIDTH, HEIGHT = 512, 768
RANK = 4
GB = 1e9
LIMITS_GB = {"off": 9.0, "ram": 4.0}
"""NF4 with checkpointing on a card, by streaming."""
LIMIT_STREAMING = 0.15
"""What streaming may add to the seconds of such a step."""
LIMIT_DEVIATION = 0.05


@dataclass(frozen=True, kw_only=True)
class Case:
    """One training to measure."""

    text_tokens: int = 77
    checkpointing: bool = True
    streaming: str = "off"
    share: float | None = None
    """Part of the weights that has room on the device, with streaming `auto`."""
    activations_in_ram: bool = False

    @property
    def title(self) -> str:
        words = [f"{self.text_tokens} tokens"]
        words += ["checkpointing"] if self.checkpointing else ["no checkpointing"]
        words += [f"streaming {self.streaming}"] if self.streaming != "off" else []
        words += [f"room for {self.share:.0%} of the weights"] if self.share is not None else []
        words += ["activations in RAM"] if self.activations_in_ram else []
        return ", ".join(words)

    @property
    def job(self) -> JobSettings:
        return JobSettings(
            lora=LoraSettings(rank=RANK),
            train=TrainSettings(gradient_accumulation=1, gradient_checkpointing=self.checkpointing),
            activations_in_ram=self.activations_in_ram,
        )


def cases(format: str, device: torch.device) -> list[Case]:
    if device.type == "cpu":  # where nothing is streamed but from disk, and all is RAM
        return [Case(checkpointing=is_on) for is_on in (True, False)]
    recipe = [Case(text_tokens=count) for count in (77, 512)]
    streamed = [Case(text_tokens=count, streaming="ram") for count in (77, 512)]
    if format != "nf4":
        return [recipe[1], streamed[1]]
    return [
        *recipe,
        *streamed,
        Case(text_tokens=512, streaming="auto", share=0.5),
        Case(text_tokens=512, activations_in_ram=True),
        Case(text_tokens=512, streaming="ram", activations_in_ram=True),
        Case(checkpointing=False),
        Case(checkpointing=False, activations_in_ram=True),
    ]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--formats", nargs="+", default=["nf4", "int8", "bf16"])
    parser.add_argument("--runs", type=int, default=5, help="steps of each row that a card times")
    parser.add_argument("--nano", action="store_true", help="the nano model on the CPU")
    parser.add_argument("--out", type=Path, help="the default is in benchmarks/results")
    given = parser.parse_args(arguments)
    if not given.nano and not torch.cuda.is_available():
        raise SystemExit("The true size is measured on an NVIDIA or AMD card: here, take --nano.")
    device = torch.device("cpu" if given.nano else "cuda")
    result: dict[str, Any] = {
        "device": "cpu" if given.nano else torch.cuda.get_device_name(),
        "machine": platform.machine(),
        **{name: version(name) for name in ("torch", "diffusers", "bitsandbytes")},
        "network": "nano" if given.nano else "FLUX.1-dev's shape",
        "pixels": [WIDTH, HEIGHT],
        "rank": RANK,
        "runs": given.runs,
        "rows": {},
    }
    out = given.out or RESULTS / ("memory_nano.json" if given.nano else "memory.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for format in given.formats:
            for title, row in measure_format(format, device, Path(folder), given.runs):
                result["rows"][title] = row
                sys.stdout.write(f"{title}: {json.dumps(row)}\n")
                result["summary"] = summary(result["rows"])
                # After every row: a later one may run out of memory.
                out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(result["summary"], indent=2) + "\n")
    return result


def measure_format(
    format: str, device: torch.device, folder: Path, runs: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Title and figures of every row."""
    shapes = shapes_of(device)
    config = FluxConfig.from_shapes(shapes)
    needed, free = store_bytes(config, format), system_memory().free
    if needed > free:
        yield format, {"skipped": f"{needed / GB:.1f} GB of weights, {free / GB:.1f} of RAM free"}
        return
    made: list[LoadedFlux] = []
    packed = allocated(lambda: made.append(random_flux(shapes, format, device)), device)
    (base,) = made
    at_hand = packed.kept if device.type == "cpu" else 0  # nothing has to be brought there
    for case in cases(format, device):
        row = measure(base, case, data_of(case, config, folder), device, runs, at_hand)
        base.store.place("cpu")
        forget(device)
        yield f"{format}, {case.title}", row
    if format == "nf4":
        for count in sorted({case.text_tokens for case in cases(format, device)}):
            case = Case(text_tokens=count)
            row = measure_plain(base, case, data_of(case, config, folder), device, runs)
            yield f"plain diffusers recipe in nf4, {case.title}", row


def shapes_of(device: torch.device) -> dict[str, tuple[int, ...]]:
    if device.type != "cpu":
        return flux_shapes(**FLUX_DEV)
    nano = inspect_flux(NANO).config
    return flux_shapes(
        width=nano.hidden_size,
        depth=nano.depth,
        depth_single=nano.depth_single,
        context=nano.context_dim,
        vector=nano.vector_dim,
        guidance=nano.guidance,
    )


def random_flux(
    shapes: dict[str, tuple[int, ...]], format: str, device: torch.device
) -> LoadedFlux:
    """In RAM, packed on `device`. Values are scaled so that activations stay near 1."""
    generator = torch.Generator(device).manual_seed(0)
    packed, plain = {}, {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
        if len(shape) == 2:
            kept = format if is_block_matrix(name, shape) else "bf16"
            packed[name] = PackedWeight.pack(noise * shape[1] ** -0.5, kept)
            packed[name].to(torch.device("cpu"))
        else:
            plain[name] = (0.1 * noise + float(name.endswith(".scale"))).to("cpu")
    store = WeightStore(packed, plain)
    return LoadedFlux(store, FluxConfig.from_shapes(shapes), "", "", format)


def data_of(case: Case, config: FluxConfig, folder: Path) -> TrainingData:
    return training_data(
        folder / f"{config.hidden_size}-{case.text_tokens}",
        sizes=((WIDTH, HEIGHT),),
        text_tokens=case.text_tokens,
        widths=(config.context_dim, config.vector_dim),
    )


def allocated(work: Callable[[], object], device: torch.device) -> Allocated:
    """What a piece of work takes on the device."""
    gc.collect()
    if device.type == "cpu":
        with tempfile.TemporaryDirectory() as folder:
            return profiled(work, Path(folder) / "trace.json")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return Allocated(
        torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    )


def forget(device: torch.device) -> None:
    """Let every row begin alike: torch keeps freed memory, and the matrix library its workspace."""
    gc.collect()
    if device.type == "cuda":
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


def measure(
    base: LoadedFlux,
    case: Case,
    data: TrainingData,
    device: torch.device,
    runs: int,
    at_hand: int,
) -> dict[str, Any]:
    """One row; `at_hand` are the bytes of weights that are on the device already."""
    job, store = case.job, base.store
    estimate = estimate_training(base.config, base.format, loop.workload(job, base, data, device))
    budgets = {"off": store.num_bytes, "auto": (case.share or 0) * store.num_bytes, "ram": 0}
    on_device, waiting = placed_bytes(base.config, base.format, budgets[case.streaming])
    predicted = {
        "weights": on_device,
        "network": estimate.adapters,
        "optimizer": estimate.optimizer,
        "step": estimate.activations + estimate.batch,
    }
    total = sum(predicted.values())
    if device.type == "cuda" and total > torch.cuda.mem_get_info(device)[0]:
        return {"skipped": f"{total / GB:.1f} GB do not fit on this card"}

    store.streaming = case.streaming
    brought = allocated(lambda: store.prepare(device, budgets[case.streaming]), device)
    made: list[TrainState] = []
    network = allocated(lambda: made.append(TrainState(base, job)), device)
    (state,) = made
    order = BatchOrder(data.latents.subsets, batch_size=1, seed=job.train.seed)

    def step() -> None:
        optimizer_step(state, 0, order, data)

    first = allocated(step, device)
    with PinnedPeak(device) as pinned:
        second = allocated(step, device)
    measured = {
        "weights": at_hand + brought.kept,
        "network": network.kept,
        "optimizer": first.kept,
        "step": second.peak,
    }
    row = compared(measured, predicted)
    if device.type == "cuda":
        row["seconds"] = median_seconds(step, device, runs)
        ram = {"weights": waiting, "activations": estimate.saved}
        found = {"weights": store.bytes_in_ram, "activations": pinned.num_bytes}
        row |= {"ram_predicted_gb": in_gb(ram), "ram_measured_gb": in_gb(found)}
    state.close()
    return row


def compared(measured: dict[str, int], predicted: dict[str, int]) -> dict[str, Any]:
    totals = sum(predicted.values()), sum(measured.values())
    return {
        "predicted_gb": {**in_gb(predicted), "total": totals[0] / GB},
        "measured_gb": {**in_gb(measured), "total": totals[1] / GB},
        "deviation": totals[0] / totals[1] - 1,
    }


def in_gb(sizes: dict[str, int]) -> dict[str, float]:
    return {name: size / GB for name, size in sizes.items()}


class PinnedPeak:
    """The most pinned memory that torch had given out at one time, beyond that at the start."""

    def __init__(self, device: torch.device) -> None:
        self._is_known = device.type == "cuda" and hasattr(torch.cuda, "host_memory_stats")
        self.num_bytes = 0

    def __enter__(self) -> PinnedPeak:
        if self._is_known:
            torch.cuda.reset_peak_host_memory_stats()
            self._before = self._stat("current")
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_known:
            self.num_bytes = self._stat("peak") - self._before

    def _stat(self, kind: str) -> int:
        return torch.cuda.host_memory_stats().get(f"active_bytes.{kind}", 0)


def median_seconds(step: Callable[[], object], device: torch.device, runs: int) -> float:
    return statistics.median(train_step.seconds(step, device) for _ in range(runs))


def measure_plain(
    base: LoadedFlux, case: Case, data: TrainingData, device: torch.device, runs: int
) -> dict[str, Any]:
    """The plain recipe on the same weights and batch, its adapters in float32 as ours."""
    base.store.streaming = "off"
    base.store.prepare(device)
    made: list[Callable[[], float]] = []
    model = allocated(
        lambda: made.append(train_step.plain_step(base, data, case.job, torch.float32)), device
    ).kept
    base.store.place("cpu")
    (step,) = made
    first = allocated(step, device).kept
    peak = allocated(step, device).peak
    measured = {"model": model, "optimizer": first, "step": peak}
    row: dict[str, Any] = {
        "measured_gb": {**in_gb(measured), "total": (model + first + peak) / GB},
    }
    if device.type == "cuda":
        row["seconds"] = median_seconds(step, device, runs)
    del step
    made.clear()
    forget(device)
    return row


def summary(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the numbers to reach are held against."""
    found = {title: row for title, row in rows.items() if "skipped" not in row}
    deviations = [abs(row["deviation"]) for row in found.values() if "deviation" in row]
    said: dict[str, Any] = {
        "largest_deviation": max(deviations, default=0.0),
        "is_within_5_percent": max(deviations, default=0.0) <= LIMIT_DEVIATION,
    }
    for count in (77, 512):
        whole, streamed = (
            found.get(f"nf4, {Case(text_tokens=count, streaming=kind).title}")
            for kind in ("off", "ram")
        )
        plain = found.get(f"plain diffusers recipe in nf4, {Case(text_tokens=count).title}")
        if whole and plain:
            if "seconds" in whole:
                ratio = whole["seconds"] / plain["seconds"]
                said[f"ours / plain, seconds, {count} tokens"] = ratio
            totals = [row["measured_gb"]["total"] for row in (whole, plain)]
            said[f"ours / plain, peak, {count} tokens"] = totals[0] / totals[1]
        if whole and streamed:
            cost = streamed["seconds"] / whole["seconds"] - 1
            peaks = {"off": whole, "ram": streamed}
            said[f"streaming's part of the step, {count} tokens"] = cost
            said[f"is_within_limits, {count} tokens"] = cost <= LIMIT_STREAMING and all(
                peaks[kind]["measured_gb"]["total"] <= limit for kind, limit in LIMITS_GB.items()
            )
    return said


if __name__ == "__main__":
    main()
