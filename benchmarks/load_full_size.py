"""FLUX.1-dev at its true size into NF4, from its quantized copy, and one training step: on a CPU.

    python -P benchmarks/load_full_size.py [--folder DIR] [--out FILE]

Makes a bf16 file of FLUX.1-dev's names and shapes with random weights (23.8 GB) in a temporary
folder, and removes it at the end. Each stage runs in a process of its own, whose peaks Linux
counts: VmHWM of the resident set, and the largest RssAnon seen every 20 ms. The page cache is
emptied of the file before it is read. The step is that of the recipe (rank 4, its targets), at
64x64 pixels with 77 text tokens. GB are 10^9 bytes.

A load from the copy is compared with a plain read of the same file into memory that stays, both
`RUNS` times in turn; the fastest run of each is kept, because what disturbs a run only makes it
longer. `disk_gb_per_second` is a read into one small buffer.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "scripts"), str(ROOT / "tests" / "support")]

from pack import load_pack  # noqa: E402

STATUS = Path(os.sep, "proc", "self", "status")
FLUX_DEV = {"width": 3072, "depth": 19, "depth_single": 38, "context": 4096, "vector": 768}
TRAINABLE = 4_669_440
"""Parameters of the recipe's LoRA on FLUX.1-dev, as its authors print them."""
LIMITS_GB = {"load": 8.0, "reload": 8.0, "step": 8.5}
OVERHEAD_GB = 1.5
"""What a load may take beside the packed weights."""
RELOAD_RATIO = 1.25
"""The time that a load from the copy may take, in those of a plain read of it."""
RUNS = 3
ROOM_GB = 40
GB = 1e9
PIXELS, TEXT_TOKENS = 64, 77


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="where the files are made")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/load_full_size.json")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        sys.stdout.write(json.dumps(run_stage(arguments.stage, arguments.folder)))
        return
    if not STATUS.is_file():
        raise SystemExit("Peaks of memory are read from Linux; this system does not give them.")
    with tempfile.TemporaryDirectory(prefix="atelier-", dir=arguments.folder) as name:
        if shutil.disk_usage(name).free < ROOM_GB * GB:
            raise SystemExit(f"{name} has less than {ROOM_GB} GB free: name another --folder.")
        result = measure(Path(name))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    show(result)


def measure(folder: Path) -> dict[str, Any]:
    began = time.perf_counter()
    write_flux_dev(folder / "flux1-dev.safetensors")
    sys.stdout.write(f"wrote the file in {time.perf_counter() - began:.0f} s\n")
    result = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB,
        "torch": torch.__version__,
        "source_gb": (folder / "flux1-dev.safetensors").stat().st_size / GB,
        "limits_peak_rss_gb": LIMITS_GB,
        "limit_overhead_gb": OVERHEAD_GB,
        "limit_reload_ratio": RELOAD_RATIO,
        "load": measure_stage("load", folder),
    }
    turns = [[measure_stage(stage, folder) for stage in ("read", "reload")] for _ in range(RUNS)]
    for stage, runs in zip(("read", "reload"), zip(*turns, strict=True), strict=True):
        fastest = min(runs, key=lambda run: run["seconds"])
        result[stage] = {**fastest, "seconds_of_runs": [run["seconds"] for run in runs]}
    result["reload_ratio"] = result["reload"]["seconds"] / result["read"]["seconds"]
    result["step"] = measure_stage("step", folder)
    result["is_within_limits"] = is_within_limits(result)
    return result


def measure_stage(stage: str, folder: Path) -> dict[str, Any]:
    for path in folder.rglob("*.safetensors"):
        drop_from_page_cache(path)
    command = [sys.executable, "-P", __file__, "--stage", stage, "--folder", str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    sys.stdout.write(f"{stage}: {done.stdout.decode()}\n")
    sys.stdout.flush()
    return json.loads(done.stdout)


def write_flux_dev(path: Path) -> None:
    """Random numbers scaled as those of a new network, in little memory."""
    load_pack()
    from flux_files import flux_shapes

    shapes = flux_shapes(**FLUX_DEV)
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    noise = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0))
    scaled: dict[float, memoryview] = {}
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for index, (name, shape) in enumerate(shapes.items()):
            scale = shape[-1] ** -0.5
            if scale not in scaled:
                scaled[scale] = memoryview((scale * noise).bfloat16().view(torch.uint8).numpy())
            write_turned(file, scaled[scale], start=2 * 7919 * index, size=num_bytes(header[name]))


def num_bytes(info: dict[str, Any]) -> int:
    begin, end = info["data_offsets"]
    return end - begin


def write_turned(file: BinaryIO, values: memoryview, *, start: int, size: int) -> None:
    """`size` bytes of `values`, from another place for every tensor and around its end: to draw
    twelve billion new ones takes long."""
    start %= len(values)
    while size > 0:
        piece = values[start : start + size]
        file.write(piece)
        size, start = size - len(piece), 0


def drop_from_page_cache(path: Path) -> None:
    """So that reading it again is reading the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run_stage(stage: str, folder: Path) -> dict[str, Any]:
    load_pack()
    peaks: dict[str, int] = {}
    with sampled_peaks(peaks):
        figures = STAGES[stage](folder)
    return {
        **figures,
        "peak_rss_gb": status_kib("VmHWM") * 1024 / GB,
        "peak_rss_anon_gb": peaks["RssAnon"] * 1024 / GB,
    }


def load(folder: Path) -> dict[str, Any]:
    began = time.perf_counter()
    base = load_base(folder)
    return {
        "seconds": time.perf_counter() - began,
        "packed_gb": base.store.num_bytes / GB,
        "copy_gb": copy_of(folder).stat().st_size / GB,
    }


def read(folder: Path) -> dict[str, Any]:
    """The copy's bytes in memory, by as little as that takes."""
    path = copy_of(folder)
    size = path.stat().st_size
    began = time.perf_counter()
    kept = torch.empty(size, dtype=torch.uint8).numpy().data
    with path.open("rb", buffering=0) as file:
        done = 0
        while count := file.readinto(kept[done:]):
            done += count
    seconds = time.perf_counter() - began
    assert done == size
    drop_from_page_cache(path)
    began = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(kept[: 32 << 20]):
            pass
    return {
        "seconds": seconds,
        "gb_per_second": size / GB / seconds,
        "disk_gb_per_second": size / GB / (time.perf_counter() - began),
    }


def reload(folder: Path) -> dict[str, Any]:
    began = time.perf_counter()
    base = load_base(folder)
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "gb_per_second": copy_of(folder).stat().st_size / GB / seconds,
        "packed_gb": base.store.num_bytes / GB,
    }


def copy_of(folder: Path) -> Path:
    (path,) = (folder / "packed").iterdir()
    return path


def step(folder: Path) -> dict[str, Any]:
    """One optimizer step of the loop itself, on one random picture and caption."""
    from atelier.trainers.batches import BatchOrder
    from atelier.trainers.config import JobSettings, TrainSettings
    from atelier.trainers.lora_settings import LoraSettings
    from atelier.trainers.step import TrainState, optimizer_step
    from training import training_data

    base = load_base(folder)
    job = JobSettings(lora=LoraSettings(rank=4), train=TrainSettings(gradient_accumulation=1))
    data = training_data(
        folder / "cache",
        sizes=((PIXELS, PIXELS),),
        text_tokens=TEXT_TOKENS,
        widths=(base.config.context_dim, base.config.vector_dim),
    )
    state = TrainState(base, job)
    order = BatchOrder(data.latents.entries, batch_size=1, seed=job.train.seed)
    began = time.perf_counter()
    loss, grad_norm = optimizer_step(state, 0, order, data)
    return {
        "seconds": time.perf_counter() - began,
        "loss": loss,
        "grad_norm": grad_norm,
        "trainable_parameters": sum(parameter.numel() for parameter in state.parameters),
        "compute_dtype": str(state.dtype).removeprefix("torch."),
    }


STAGES = {"load": load, "read": read, "reload": reload, "step": step}


def load_base(folder: Path):
    from atelier.trainers.load import load_flux
    from atelier.trainers.packed_copy import PackedCopies

    path, copies = folder / "flux1-dev.safetensors", PackedCopies(folder / "packed")
    return load_flux(path, format="nf4", copies=copies)


def status_kib(kind: str) -> int:
    lines = dict(line.split(":", 1) for line in STATUS.read_text(encoding="utf-8").splitlines())
    return int(lines[kind].split()[0])


@contextmanager
def sampled_peaks(peaks: dict[str, int]) -> Iterator[None]:
    """Leave the largest RssAnon in `peaks`: the kernel keeps no peak of it."""
    is_over = threading.Event()

    def sample() -> None:
        while not is_over.wait(0.02):
            peaks["RssAnon"] = max(peaks.get("RssAnon", 0), status_kib("RssAnon"))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def is_within_limits(result: dict[str, Any]) -> bool:
    peaks = {stage: result[stage]["peak_rss_gb"] for stage in LIMITS_GB}
    overhead = peaks["load"] - result["load"]["packed_gb"]
    return (
        all(peaks[stage] <= limit for stage, limit in LIMITS_GB.items())
        and overhead <= OVERHEAD_GB
        and result["reload_ratio"] <= RELOAD_RATIO
        and result["step"]["trainable_parameters"] == TRAINABLE
    )


def show(result: dict[str, Any]) -> None:
    lines = [f"{'':8} {'seconds':>8} {'peak RSS':>10} {'RssAnon':>10} {'limit':>8}"]
    for stage, limit in LIMITS_GB.items():
        row = result[stage]
        peaks = f"{row['peak_rss_gb']:7.2f} GB {row['peak_rss_anon_gb']:7.2f} GB"
        lines.append(f"{stage:8} {row['seconds']:8.1f} {peaks} {limit:5.1f} GB")
    lines += [
        f"packed {result['load']['packed_gb']:.2f} GB of {result['source_gb']:.2f} GB",
        f"loaded from the copy at {result['reload']['gb_per_second']:.2f} GB/s, "
        f"{result['reload_ratio']:.2f} times as long as a plain read; "
        f"the disk alone gives {result['read']['disk_gb_per_second']:.2f} GB/s",
        f"trainable parameters {result['step']['trainable_parameters']:,}",
        f"within the limits: {result['is_within_limits']}",
    ]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
