"""The demo's style LoRA with one thing at a time changed: what each method learns, and its price.

    python -P benchmarks/methods.py [--only TEXT …] [--page]

Writes benchmarks/results/methods.json after every row, and docs/methods.md at the end. A row that
is measured is not trained again unless its settings, its pictures or the base changed; one that
failed is. `--page` writes only the page.

Everything is the nano model, on one thread of a CPU, in float32. Each row trains with the same
noise on the same batches, in fewer steps than the demo, and is measured on subjects that are not
among the pictures: the loss of `eval_loss` on their true pictures, and the scores of the demo's
judge on pictures that the training's own network draws in Euler steps. Seconds are those that the
processor spent, so that other work on the machine counts little. Memory is the most that torch's
allocator gave out in two steps, with the packed weights. The last column is the estimate of
Estimate Memory for FLUX.1-dev at 1024x1024 and a batch of 1, with gradient checkpointing.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / part) for part in ("scripts", "tests/support", "benchmarks")]

import torch  # noqa: E402
from pack import load_pack  # noqa: E402

load_pack()

import demo_measure  # noqa: E402
import demo_pictures  # noqa: E402
from allocated import profiled  # noqa: E402
from atelier.trainers.adapters import attach_lora  # noqa: E402
from atelier.trainers.batches import BatchOrder  # noqa: E402
from atelier.trainers.caches import (  # noqa: E402
    LatentCache,
    LatentEntry,
    LatentSubset,
    PromptCache,
    PromptEntry,
)
from atelier.trainers.config import JobSettings  # noqa: E402
from atelier.trainers.data import TrainingData  # noqa: E402
from atelier.trainers.evaluate import eval_loss  # noqa: E402
from atelier.trainers.flow import seeded  # noqa: E402
from atelier.trainers.flux import FluxConfig, build_transformer, velocity  # noqa: E402
from atelier.trainers.hooks import Hooks, Step, Trained  # noqa: E402
from atelier.trainers.load import LoadedFlux, load_flux  # noqa: E402
from atelier.trainers.loop import open_run, train, workload  # noqa: E402
from atelier.trainers.memory import estimate_training  # noqa: E402
from atelier.trainers.step import TrainState, optimizer_step  # noqa: E402
from demo_pictures import Subject  # noqa: E402
from method_list import Method, rows  # noqa: E402
from methods_page import write_page  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor  # noqa: E402
from training import write_entries  # noqa: E402

COMFYUI = Path(os.environ.get("ATELIER_COMFYUI") or ROOT / ".dev" / "ComfyUI")
"""Only its tokenizers are used."""
RESULT = ROOT / "benchmarks" / "results" / "methods.json"
PROMPT_LENGTH = 32
DRAWING_STEPS, DRAWING_GUIDANCE = 12, 2.5
SHIFT = 3.1582
"""FLUX.1-dev's, which ComfyUI samples every size with."""
FLUX1_DEV = FluxConfig(
    hidden_size=3072,
    depth=19,
    depth_single=38,
    in_channels=64,
    context_dim=4096,
    vector_dim=768,
    guidance=True,
)


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Subjects that are not trained."""

    subjects: list[Subject]
    latents: Tensor
    """[N, C, h, w] of their true pictures."""
    prompt_embeds: Tensor
    pooled: Tensor


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", default=[], help="rows whose names hold one of these")
    parser.add_argument("--page", action="store_true", help="write only docs/methods.md")
    options = parser.parse_args()
    result = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {"rows": {}}
    if not options.page:
        torch.set_num_threads(1)
        result["machine"] = machine()
        wanted = [m for m in rows() if not options.only or any(t in m.key for t in options.only)]
        measure_all(wanted, result)
    write_page(result)
    return 0


def measure_all(methods: list[Method], result: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory(prefix="atelier-") as home:
        data, held_out = make_data(Path(home) / "cache"), make_held_out()
        for method in methods:
            found = measured_or_refused(method, data, held_out, result["rows"].get(method.key))
            result["rows"][method.key] = found
            RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def measured_or_refused(
    method: Method, data: TrainingData, held_out: HeldOut, before: dict[str, Any] | None
) -> dict[str, Any]:
    """The numbers of a row, or the sentence with which its training was refused."""
    began = time.monotonic()
    try:
        found = measure(method, data, held_out, before)
    except Exception as error:  # one row that fails is a row that says so
        found = {"error": f"{type(error).__name__}: {error}"}
    say(f"{method.key:45} {time.monotonic() - began:5.0f} s  {summary(found)}")
    return found


def summary(found: dict[str, Any]) -> str:
    if "error" in found:
        return found["error"]
    return f"loss {found['eval_loss']:.4f}  style {found['style_score']:.3f}"


def measure(
    method: Method, data: TrainingData, held_out: HeldOut, before: dict[str, Any] | None
) -> dict[str, Any]:
    job = method.job
    base = load_flux(demo_measure.NANO / "nano-flux.safetensors", format=method.format)
    with tempfile.TemporaryDirectory(prefix="atelier-") as folder:
        run = open_run(Path(folder), job, base, data)
        identity = f"{method.group}/{run.identity.hash8()}"
        if before and before.get("of") == identity:
            return before
        clock = StepClock()
        trained = train(run, base, data, job, Hooks(on_step=clock.on_step))
        trace = Path(folder) / "trace.json"
        return {
            "of": identity,
            "learning_rate": job.train.learning_rate,
            "loss_last": statistics.fmean(trained.losses[-20:]),
            "seconds_per_step": clock.mean(),
            **quality(base, job, trained, held_out),
            "parameters": sum(tensor.numel() for tensor in trained.lora.values()),
            "peak_bytes": peak_bytes(base, job, data, trace),
            "flux1_dev_bytes": flux1_dev_bytes(base, job, data),
        }


class StepClock:
    """Seconds of this process's work between two steps."""

    def __init__(self) -> None:
        self._times: list[float] = []

    def on_step(self, step: Step) -> None:
        self._times.append(time.process_time())

    def mean(self) -> float:
        return (self._times[-1] - self._times[0]) / (len(self._times) - 1)


@torch.no_grad()
def quality(
    base: LoadedFlux, job: JobSettings, trained: Trained, held_out: HeldOut
) -> dict[str, float]:
    """The loss on held out pictures, and the judge's scores of pictures drawn of their captions."""
    transformer = build_transformer(base.store, base.config, torch.float32)
    lora = attach_lora(transformer, job.lora, seed=job.train.seed, saved=trained.lora)
    lora.load_state(trained.lora)
    transformer.eval()
    loss = eval_loss(
        transformer,
        held_out.latents,
        prompt_embeds=held_out.prompt_embeds,
        pooled=held_out.pooled,
        guidance=job.train.guidance,
    )
    pictures = decode(draw(transformer, held_out))
    codes = [subject.code for subject in held_out.subjects]
    scores = demo_measure.judge_pictures({"lora": pictures}, codes)
    names = ("style_score", "subject_score")
    return {"eval_loss": loss, **{name: scores[f"{name}_lora"] for name in names}}


def draw(transformer: Any, held_out: HeldOut) -> Tensor:
    """Latents [N, C, h, w] by Euler steps over the sigmas of ComfyUI's `simple`."""
    sigma = torch.linspace(1, 0, DRAWING_STEPS + 1)
    sigma = SHIFT * sigma / (1 + (SHIFT - 1) * sigma)
    shape = held_out.latents.shape
    noise = [torch.randn(shape[1:], generator=seeded(0, "draw", n)) for n in range(shape[0])]
    latents = torch.stack(noise)
    for now, then in itertools.pairwise(sigma):
        direction = velocity(
            transformer,
            latents,
            sigma=now.expand(len(latents)),
            prompt_embeds=held_out.prompt_embeds,
            pooled=held_out.pooled,
            guidance=DRAWING_GUIDANCE,
        )
        latents = latents + (then - now) * direction
    return latents


def decode(latents: Tensor) -> list[Image.Image]:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(demo_measure.NANO / "vae", local_files_only=True).float()
    pixels = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
    values = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().byte().movedim(1, -1)
    return [Image.fromarray(picture.numpy()) for picture in values]


def peak_bytes(base: LoadedFlux, job: JobSettings, data: TrainingData, trace: Path) -> int:
    order = BatchOrder(data.latents.subsets, batch_size=job.train.batch_size, seed=job.train.seed)

    def two_steps() -> None:
        state = TrainState(base, job)
        for step in range(2):
            optimizer_step(state, step, order, data)

    return base.store.num_bytes + profiled(two_steps, trace).peak


def flux1_dev_bytes(base: LoadedFlux, job: JobSettings, data: TrainingData) -> int:
    task = workload(job, base, data, torch.device("cpu"))
    full_size = dataclasses.replace(
        task,
        width=1024,
        height=1024,
        prompt_length=512,
        batch_size=1,
        dtype=torch.bfloat16,
        gradient_checkpointing=True,
    )
    return estimate_training(FLUX1_DEV, base.format, full_size).total


def make_data(folder: Path) -> TrainingData:
    """Caches of the demo's training pictures."""
    subjects = demo_pictures.load_subjects("train")
    latents = demo_measure.encode_pictures(demo_pictures.draw(subjects)).detach()
    captions = [subject.caption for subject in subjects]
    texts = [*captions, ""]
    embeds, pooled = demo_measure.encode_texts(COMFYUI, texts, PROMPT_LENGTH)
    stored = {
        f"text {n}": {"prompt_embeds": embeds[n].detach(), "pooled": pooled[n].detach()}
        for n in range(len(texts))
    }
    pictures = {
        subject.code: {"mean": mean, "std": torch.zeros_like(mean)}
        for subject, mean in zip(subjects, latents, strict=True)
    }
    write_entries(folder, {**stored, **pictures})
    side = demo_pictures.SIDE_PX
    entries = tuple(
        LatentEntry(record=s.code, keys=(s.code,), texts=((s.caption,),), width=side, height=side)
        for s in subjects
    )
    subset = LatentSubset(name="pictures", entries=entries)
    prompts = tuple(PromptEntry(text=text, key=f"text {n}") for n, text in enumerate(texts))
    return TrainingData(
        latents=LatentCache(folder=str(folder), encoder="vae", subsets=(subset,)),
        prompts=PromptCache(
            folder=str(folder), encoder="clip", length=PROMPT_LENGTH, entries=prompts
        ),
    )


@torch.no_grad()
def make_held_out() -> HeldOut:
    subjects = demo_pictures.load_subjects("held_out")
    captions = [subject.caption for subject in subjects]
    embeds, pooled = demo_measure.encode_texts(COMFYUI, captions, PROMPT_LENGTH)
    latents = demo_measure.encode_pictures(demo_pictures.draw(subjects))
    return HeldOut(subjects=subjects, latents=latents, prompt_embeds=embeds, pooled=pooled)


def machine() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.system(),
        "cpu_count": os.cpu_count(),
    }


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    sys.exit(main())
