"""What a LoRA at run time adds to sampling, and how long a swap takes.

    python -P benchmarks/lora_sampling.py [--runs 11] [--out benchmarks/results/lora_sampling.json]

ComfyUI's own network over a packed base computes one step with a LoRA and one without, in turns;
`added` is the median of the ratios of such pairs, less 1. The LoRA is on the same matrices as one
of Train LoRA: `qlora` is the four projections of attention, `all+ffs` every matrix that one can
train. A swap is another strength, or another file, until the model is ready to compute again; the
store's counter shows that no packed byte moved. On a CPU the networks are nano and one of width
1024, on one thread and in CPU time, which other work on the machine does not change; on a GPU one
of FLUX.1-dev's width with a sixth of its blocks.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
COMFYUI = Path(os.environ.get("ATELIER_COMFYUI") or ROOT / ".dev" / "ComfyUI")
HOME = tempfile.TemporaryDirectory(prefix="atelier-")
sys.path += [str(ROOT / "scripts"), str(ROOT / "tests" / "support")]

from comfy_in_process import make_comfy_importable  # noqa: E402
from pack import load_pack  # noqa: E402

load_pack()
make_comfy_importable(COMFYUI, HOME.name)

import comfy.model_management  # noqa: E402, TID251
from atelier.nodes.native import build_model  # noqa: E402
from atelier.nodes.native_lora import add_lora  # noqa: E402
from atelier.trainers.adapters import attach_lora, file_tensors  # noqa: E402
from atelier.trainers.devices import compute_dtype, default_device  # noqa: E402
from atelier.trainers.flux import build_transformer  # noqa: E402
from atelier.trainers.load import LoadedFlux, load_flux  # noqa: E402
from atelier.trainers.lora_settings import LoraSettings  # noqa: E402
from flux_files import write_flux  # noqa: E402

DEVICE = default_device()
DTYPE = torch.float32 if DEVICE.type == "cpu" else compute_dtype("auto", DEVICE)
LORAS = {f"{targets} rank 16": (16, targets) for targets in ("qlora", "all+ffs")}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A network and what it draws."""

    path: Path
    format: str
    pixels: int
    text_tokens: int


def cases(folder: Path) -> dict[str, Case]:
    if DEVICE.type == "cuda":
        path = write_flux(
            folder / "wide.safetensors",
            width=3072,
            depth=3,
            depth_single=6,
            context=4096,
            vector=768,
        )
        return {
            f"width 3072, {format}": Case(path=path, format=format, pixels=1024, text_tokens=512)
            for format in ("nf4", "int8", "bf16")
        }
    wide = write_flux(folder / "wide.safetensors", width=1024, depth=2, depth_single=2)
    nano = ROOT / "assets" / "nano" / "nano-flux.safetensors"
    found = {}
    for format in ("nf4", "bf16"):
        found[f"nano, {format}"] = Case(path=nano, format=format, pixels=128, text_tokens=64)
        found[f"width 1024, {format}"] = Case(path=wide, format=format, pixels=256, text_tokens=128)
    return found


def lora_of(base: LoadedFlux, rank: int, targets: str) -> dict[str, Tensor]:
    """The tensors of a LoRA file with random values."""
    settings = LoraSettings(rank=rank, targets=targets)
    transformer = build_transformer(base.store, base.config, torch.float32)
    state = attach_lora(transformer, settings, seed=0).state()
    for name, tensor in state.items():
        state[name] = tensor if "lora_A" in name else torch.randn_like(tensor) / 100
    return file_tensors(state, settings)


def step_of(base: LoadedFlux, case: Case) -> Callable[[Any], None]:
    """One call of a MODEL's network."""
    config, side = base.config, case.pixels // 8
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, DTYPE)

    latents = drawn(1, 16, side, side)
    inputs = {
        "context": drawn(1, case.text_tokens, config.context_dim),
        "y": drawn(1, config.vector_dim),
        "guidance": torch.full((1,), 3.5, device=DEVICE),
    }
    sigma = torch.full((1,), 0.5, device=DEVICE, dtype=DTYPE)

    def step(model: Any) -> None:
        with torch.inference_mode():
            model.model.diffusion_model(latents, sigma, **inputs)

    return step


def seconds(work: Callable[[], object]) -> float:
    clock = time.perf_counter if DEVICE.type == "cuda" else time.process_time
    begin = clock()
    work()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return clock() - begin


def ready(model: Any) -> Any:
    comfy.model_management.load_models_gpu([model])
    return model


def measure(case: Case, runs: int) -> dict[str, Any]:
    base = load_flux(case.path, format=case.format, quantize_on=DEVICE)
    model = build_model(base, DTYPE)
    if DEVICE.type == "cpu":
        model.offload_device = torch.device("cpu", 0)  # not the load device, as on a GPU
    step = step_of(base, case)
    row: dict[str, Any] = {}
    for name, (rank, targets) in LORAS.items():
        patched = add_lora(model, lora_of(base, rank, targets), 1.0)
        pairs = []
        for _ in range(runs + 1):
            both = [ready(one) and seconds(lambda one=one: step(one)) for one in (model, patched)]
            pairs.append(both)
        row[name] = {  # the first pair also fills caches
            "base_s": min(plain for plain, _ in pairs[1:]),
            "added": statistics.median(beside / plain for plain, beside in pairs[1:]) - 1,
        }
    row |= swaps(model, base, runs)
    comfy.model_management.unload_all_models()
    return row


def swaps(model: Any, base: LoadedFlux, runs: int) -> dict[str, Any]:
    """Another strength, and another file, of a LoRA of rank 16 on everything."""
    first, other = (lora_of(base, 16, "all+ffs") for _ in range(2))
    ready(add_lora(model, first, 1.0))
    moved, strengths, files = model.store.bytes_moved, [], []
    for number in range(runs):
        strengths.append(seconds(lambda n=number: ready(add_lora(model, first, 0.1 * n + 0.1))))
        copy = {name: tensor.clone() for name, tensor in other.items()}
        files.append(seconds(lambda copy=copy: ready(add_lora(model, copy, 1.0))))
    return {
        "swap_strength_s": statistics.median(strengths),
        "swap_file_s": statistics.median(files),
        "bytes_moved_by_swaps": model.store.bytes_moved - moved,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=11)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else DEVICE.type,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "dtype": str(DTYPE).removeprefix("torch."),
        "runs": arguments.runs,
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, case in cases(Path(folder)).items():
            results[name] = measure(case, arguments.runs)
            print(name, json.dumps(results[name], indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
