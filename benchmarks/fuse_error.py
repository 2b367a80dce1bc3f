"""What fusing a LoRA into a weight format costs, against the same LoRA beside the packed weights.

    python -P benchmarks/fuse_error.py [--out benchmarks/results/fuse_error.json]

Writes the JSON, whose numbers the help page of Fuse LoRA has. The nano model draws with ComfyUI's
sampler in float32 on the CPU; bf16 with the LoRA beside it is the reference. Every error is the
norm of a difference over the norm of the reference, of the network's output (velocity, the mean
over the shares of noise) and of what is drawn (latents):

- beside: the LoRA beside the packed weights, as Apply LoRA has it.
- fused: what Fuse LoRA gives, the file's numbers with the LoRA in them, packed once.
- packed twice: the LoRA fused into the packed weights, as without the file.

`kept` is the share of the LoRA's change of the velocity that arrives: the part of the change in
this format along the change in bf16, 1 where nothing is lost.

Then a matrix of FLUX.1-dev's width, of independent numbers and of heavy-tailed ones, with a LoRA of
rank 16 that is `SHARE` of its norm: the error of the weights beside and fused, how much of the LoRA
is kept, and what fusing adds to it, both of the norm of the LoRA.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

# The first one loads the pack and ComfyUI.
from sampling_error import LORA, NANO, Task, captions, error, random_lora  # noqa: E402

CPU = torch.device("cpu")

import comfy.sd  # noqa: E402, TID251
from atelier.nodes.native import build_model  # noqa: E402
from atelier.nodes.native_fuse import model_of, origin_of_model, with_patches_of  # noqa: E402
from atelier.trainers.adapters import file_tensors  # noqa: E402
from atelier.trainers.flow import seeded  # noqa: E402
from atelier.trainers.formats import FORMATS  # noqa: E402
from atelier.trainers.fuse import Origin, WeightTensors, pack_flux  # noqa: E402
from atelier.trainers.load import load_flux  # noqa: E402
from atelier.trainers.packed_weight import PackedWeight  # noqa: E402

NUM_PICTURES = 2
STRENGTH = 0.5
WIDTH, RANK, SHARE = 3072, 16, 0.03


def put_on(model: Any, lora: dict[str, Tensor]) -> Any:
    return comfy.sd.load_lora_for_models(model, None, lora, STRENGTH, 0.0)[0]


def fused(model: Any, format: str, *, from_packed: bool = False) -> Any:
    origin = origin_of_model(model)
    if from_packed:
        loaded = model.model.atelier
        tensors = WeightTensors(loaded.store)
        origin = Origin(
            tensors=tensors, config=loaded.config, identity=loaded.identity, format=format
        )
    packed = pack_flux(with_patches_of(model, origin), format=format, device=CPU, quantize_on=CPU)
    return model_of(packed, model)


class Drawn:
    """What a MODEL computes for the task."""

    def __init__(self, task: Task, model: Any, pictures: Tensor | None = None) -> None:
        self.latents = task.draw(model)
        given = self.latents if pictures is None else pictures
        self.velocities = task.velocities(model, given)

    def errors(self, reference: Drawn) -> dict[str, float]:
        pairs = zip(self.velocities, reference.velocities, strict=True)
        return {
            "velocity": statistics.fmean(error(*pair) for pair in pairs),
            "latents": error(self.latents, reference.latents),
        }


def kept(found: Drawn, without: Drawn, reference: Drawn, plain: Drawn) -> float:
    """The part of found - without along reference - plain."""
    change = torch.stack(found.velocities) - torch.stack(without.velocities)
    wanted = torch.stack(reference.velocities) - torch.stack(plain.velocities)
    return float((change * wanted).sum() / wanted.square().sum())


def measure_nano() -> dict[str, Any]:
    path, task = NANO / "nano-flux.safetensors", Task(captions()[:NUM_PICTURES])
    loaded = load_flux(path, format="bf16")
    base = build_model(loaded, torch.float32)
    lora = file_tensors(random_lora(loaded), LORA)
    reference = Drawn(task, put_on(base, lora))
    plain = Drawn(task, base, reference.latents)
    rows = {}
    for format in FORMATS:
        without = build_model(load_flux(path, format=format), torch.float32)
        model = put_on(without, lora)
        drawn_without = Drawn(task, without, reference.latents)
        rows[format] = {"without LoRA": drawn_without.errors(plain)}
        models = {
            "beside": model,
            "fused": fused(model, format),
            "packed twice": fused(model, format, from_packed=True),
        }
        for name, one in models.items():
            drawn = Drawn(task, one, reference.latents)
            share = kept(drawn, drawn_without, reference, plain)
            rows[format][name] = drawn.errors(reference) | {"kept": share}
        print(format, json.dumps(rows[format]), flush=True)
    return {"lora_change": reference.errors(plain), "formats": rows}


def measure_matrix(weights: Tensor) -> dict[str, Any]:
    generator = seeded(1, "lora")
    down = torch.randn(RANK, WIDTH, generator=generator)
    delta = torch.randn(WIDTH, RANK, generator=generator) @ down
    delta *= SHARE * weights.norm() / delta.norm()
    rows = {}
    for format in FORMATS:
        packed = PackedWeight.pack(weights, format).dequantize(torch.float32)
        with_lora = PackedWeight.pack(weights + delta, format).dequantize(torch.float32)
        arrived = with_lora - packed
        rows[format] = {
            "beside": error(packed + delta, weights + delta),
            "fused": error(with_lora, weights + delta),
            "kept": float((arrived * delta).sum() / delta.square().sum()),
            "added": error(arrived, delta),
        }
        print(format, json.dumps(rows[format]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/fuse_error.json")
    arguments = parser.parse_args()
    generator = seeded(0, "weights")
    numbers = 0.02 * torch.randn(WIDTH, WIDTH, generator=generator)
    tails = torch.randn(5, WIDTH, WIDTH, generator=generator).square().sum(0).div_(5).rsqrt_()
    matrices = {"normal": numbers, "student t, 5 degrees": numbers * tails}
    result = {
        "torch": torch.__version__,
        "nano": {"strength": STRENGTH, "rank": LORA.rank, **measure_nano()},
        "matrix": {
            "width": WIDTH,
            "rank": RANK,
            "share": SHARE,
            **{name: measure_matrix(each.bfloat16().float()) for name, each in matrices.items()},
        },
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
