"""How far copying and computing overlap when every block is streamed, in sampling and in training.

    python -P benchmarks/streaming.py [--format nf4] [--pixels 1024] [--out streaming.json]

A random FLUX of true width with a sixth of its blocks; a CPU copies when it is asked, and hides
nothing. Times are the smallest of `--runs`, of one
forward pass without gradients and of one micro-step with checkpointing: with the whole model on the
device, with all blocks in RAM, with all on disk. `copy` is the time to bring the same blocks with
nothing else to do; `hidden` is the part of it that took no time beside the computation.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "scripts"), str(ROOT / "tests" / "support")]

from pack import load_pack  # noqa: E402

load_pack()

from atelier.trainers.adapters import attach_lora  # noqa: E402
from atelier.trainers.devices import compute_dtype, default_device  # noqa: E402
from atelier.trainers.flux import build_transformer, recompute_blocks, velocity  # noqa: E402
from atelier.trainers.load import LoadedFlux, load_flux  # noqa: E402
from atelier.trainers.lora_settings import LoraSettings  # noqa: E402
from atelier.trainers.packed_copy import PackedCopies  # noqa: E402
from flux_files import write_flux  # noqa: E402

DEVICE = default_device()
DTYPE = compute_dtype("auto", DEVICE)
TEXT_TOKENS = 512


def passes(base: LoadedFlux, pixels: int) -> dict[str, Callable[[], object]]:
    """A forward pass and a micro-step."""
    config, size = base.config, pixels // 8
    transformer = build_transformer(base.store, config, DTYPE)
    attach_lora(transformer, LoraSettings(), seed=0)
    recompute_blocks(transformer.train().to(DEVICE))
    inputs = {
        "sigma": torch.tensor([0.5], device=DEVICE),
        "prompt_embeds": torch.ones(1, TEXT_TOKENS, config.context_dim, device=DEVICE),
        "pooled": torch.ones(1, config.vector_dim, device=DEVICE),
        "guidance": 1.0,
    }
    latents = torch.ones(1, 16, size, size, device=DEVICE, dtype=DTYPE)

    def sample() -> None:
        with torch.no_grad():
            velocity(transformer, latents, **inputs)

    def train() -> None:
        velocity(transformer, latents, **inputs).float().square().mean().backward()

    return {"sampling": sample, "training": train}


def seconds(work: Callable[[], object], runs: int) -> float:
    """The shortest time, after one run that is not counted."""
    times = []
    for _ in range(runs + 1):
        begin = time.perf_counter()
        work()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def copy_seconds(base: LoadedFlux, runs: int) -> float:
    """Bringing every block once."""
    stream = base.store.stream
    assert stream is not None
    positions = sorted({w.streamed.position for w in base.store.packed.values() if w.streamed})
    return seconds(lambda: [stream.fetch(position) for position in positions], runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--format", default="nf4")
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--width", type=int, default=3072)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results: dict[str, object] = {
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else DEVICE.type,
        "format": arguments.format,
        "pixels": arguments.pixels,
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "flux.safetensors"
        write_flux(path, width=arguments.width, depth=3, depth_single=6, context=4096, vector=768)
        whole: dict[str, float] = {}
        for streaming in ("off", "ram", "disk"):
            base = load_flux(
                path,
                format=arguments.format,
                quantize_on=DEVICE,
                streaming=streaming,
                copies=PackedCopies(Path(folder) / "packed") if streaming == "disk" else None,
            )
            base.store.prepare(DEVICE)
            copy = copy_seconds(base, arguments.runs) if streaming != "off" else 0.0
            if streaming != "off":
                results[f"{streaming} copy"] = copy
            for kind, work in passes(base, arguments.pixels).items():
                taken = seconds(work, arguments.runs)
                results[f"{streaming} {kind}"] = taken
                whole.setdefault(kind, taken)
                if copy:
                    # Training brings the blocks twice, but for two at each turn.
                    needed = copy if kind == "sampling" else copy * (2 * 9 - 4) / 9
                    hidden = (whole[kind] + needed - taken) / min(whole[kind], needed)
                    results[f"{streaming} {kind} hidden"] = hidden
            results[f"{streaming} resident_gb"] = base.store.resident_bytes / 1e9
    text = json.dumps(results, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
