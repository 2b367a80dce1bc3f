"""What TREAD saves of a training step: the same network and picture with and without it.

    python -P benchmarks/tread.py [--tokens 64] [--width 3072] [--out results/tread.json]

A random FLUX with fewer blocks; its text has 77 tokens. A step is forward and backward with
gradient checkpointing, of one picture of `--tokens` squared image tokens. Dense and routed steps
take turns, so that other work on the machine meets both; `ratio` is that of their shortest times.
The true network has 57 blocks, of which 2 to -2 are 54; here `routed_blocks` of `blocks` are.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "scripts"), str(ROOT / "tests" / "support")]

from pack import load_pack  # noqa: E402

load_pack()

from atelier.trainers.adapters import attach_lora  # noqa: E402
from atelier.trainers.blocks import BlockRunner  # noqa: E402
from atelier.trainers.devices import compute_dtype, default_device  # noqa: E402
from atelier.trainers.flow import seeded  # noqa: E402
from atelier.trainers.flux import build_transformer, velocity  # noqa: E402
from atelier.trainers.load import load_flux  # noqa: E402
from atelier.trainers.lora_settings import LoraSettings  # noqa: E402
from atelier.trainers.segments import segments_of  # noqa: E402
from atelier.trainers.speed_settings import SpeedSettings, TreadRoute  # noqa: E402
from flux_files import write_flux  # noqa: E402

DEVICE = default_device()
DTYPE = compute_dtype("auto", DEVICE)
TEXT_TOKENS = 77


class Training:
    """Steps of the training face on one random picture."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        path = folder / "flux.safetensors"
        write_flux(path, width=options.width, depth=options.depth, depth_single=options.single)
        self.base = load_flux(path, format="bf16")
        self.base.store.prepare(DEVICE)
        config, size = self.base.config, 2 * options.tokens
        self.transformer = build_transformer(self.base.store, config, DTYPE).train().to(DEVICE)
        attach_lora(self.transformer, LoraSettings(rank=16), seed=0)
        self.latents = torch.randn(1, 16, size, size, device=DEVICE, dtype=DTYPE)
        self.inputs = {
            "sigma": torch.tensor([0.5], device=DEVICE),
            "prompt_embeds": torch.randn(1, TEXT_TOKENS, config.context_dim, device=DEVICE),
            "pooled": torch.randn(1, config.vector_dim, device=DEVICE),
            "guidance": 1.0,
        }

    def seconds(self, routes: tuple[TreadRoute, ...]) -> float:
        """Of one step."""
        count = self.base.config.num_blocks
        segments = segments_of(SpeedSettings(tread=routes), count, gradient_checkpointing=True)
        blocks = BlockRunner(self.transformer, segments)
        begin = time.perf_counter()
        with blocks.routed(seeded(0, "tread", 0), None):
            prediction = velocity(self.transformer, self.latents, **self.inputs)
        prediction.float().square().mean().backward()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--width", type=int, default=3072)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--single", type=int, default=9)
    parser.add_argument("--selection-ratio", type=float, default=0.5)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    route = TreadRoute(selection_ratio=options.selection_ratio, start_layer=2, end_layer=-2)
    blocks = options.depth + options.single
    results: dict[str, object] = {
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else DEVICE.type,
        "threads": torch.get_num_threads(),
        "dtype": str(DTYPE).removeprefix("torch."),
        "tokens": f"{options.tokens}x{options.tokens}",
        "width": options.width,
        "blocks": blocks,
        "routed_blocks": blocks - 3,
        "selection_ratio": options.selection_ratio,
    }
    with tempfile.TemporaryDirectory() as folder:
        training = Training(options, Path(folder))
        dense, routed = list[float](), list[float]()
        for _ in range(options.runs):
            dense.append(training.seconds(()))
            routed.append(training.seconds((route,)))
            results["dense_seconds"], results["routed_seconds"] = min(dense), min(routed)
            results["ratio"] = min(routed) / min(dense)
            text = json.dumps(results, indent=2)
            if options.out:  # after each run: on a CPU one takes a minute
                options.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
