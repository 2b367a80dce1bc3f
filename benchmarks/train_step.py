"""One optimizer step of ours beside the plain loop of the QLoRA recipe, in one process.

    python -P benchmarks/train_step.py [--runs 7] [--out benchmarks/results/train_step.json]

The plain loop is a diffusers FLUX whose block Linears are `bitsandbytes.nn.Linear4bit`, with peft's
`add_adapter` and bitsandbytes' AdamW8bit, its batch lying in memory. Ours is the loop's own step,
and reads the caches. Both hold the same weights in NF4 and float32 adapters, compute in the same
dtype on the same batch, with gradient checkpointing. (peft makes the adapters of a bfloat16 network
bfloat16 as well, which is less work: that plain loop is the second row of each network.)

Runs alternate, so that a busy machine slows both; the ratio is the median over the pairs. Memory is
the process's, and the two share it: it is not measured.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
TEXT_TOKENS = 77
PIXELS = 128


sys.path += [str(ROOT / "scripts"), str(ROOT / "tests" / "support")]

from pack import load_pack  # noqa: E402

load_pack()

from atelier.trainers.batches import BatchOrder  # noqa: E402
from atelier.trainers.caches import (  # noqa: E402
    LatentCache,
    LatentEntry,
    LatentSubset,
    PromptCache,
    PromptEntry,
)
from atelier.trainers.config import JobSettings, TrainSettings  # noqa: E402
from atelier.trainers.data import Sample, TrainingData  # noqa: E402
from atelier.trainers.devices import compute_dtype, default_device, dtype_name  # noqa: E402
from atelier.trainers.flow import add_noise, flow_loss, sample_sigmas, seeded  # noqa: E402
from atelier.trainers.flux import image_ids, pack_latents, unpack_latents  # noqa: E402
from atelier.trainers.load import LoadedFlux, load_flux  # noqa: E402
from atelier.trainers.lora_settings import LoraSettings  # noqa: E402
from atelier.trainers.step import TrainState, optimizer_step  # noqa: E402
from flux_files import write_flux  # noqa: E402
from training import write_entries  # noqa: E402


def make_data(folder: Path, base: LoadedFlux) -> TrainingData:
    """Caches of one random picture and caption."""
    size, config = PIXELS // 8, base.config
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(16, size, size, generator=generator)
    embeds = torch.randn(TEXT_TOKENS, config.context_dim, generator=generator)
    pooled = torch.randn(config.vector_dim, generator=generator)
    picture = {"mean": latents, "std": torch.zeros_like(latents)}
    text = {"prompt_embeds": embeds, "pooled": pooled}
    write_entries(folder, {"a" * 64: picture, "b" * 64: text})
    entry = LatentEntry(record="a", keys=("a" * 64,), texts=(("a",),), width=PIXELS, height=PIXELS)
    return TrainingData(
        latents=LatentCache(
            folder=str(folder),
            encoder="",
            subsets=(LatentSubset(name="picture", entries=(entry,)),),
        ),
        prompts=PromptCache(
            folder=str(folder),
            encoder="",
            length=TEXT_TOKENS,
            entries=(PromptEntry(text="a", key="b" * 64),),
        ),
    )


def our_step(base: LoadedFlux, data: TrainingData, job: JobSettings) -> Callable[[], float]:
    state = TrainState(base, job)
    order = BatchOrder(data.latents.subsets, batch_size=1, seed=job.train.seed)
    return lambda: optimizer_step(state, 0, order, data)[0]


def plain_step(
    base: LoadedFlux, data: TrainingData, job: JobSettings, adapter_dtype: torch.dtype
) -> Callable[[], float]:
    """The loop of the Hugging Face script, down to what one step needs."""
    from bitsandbytes.optim import AdamW8bit
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    device = base.store.device
    dtype = compute_dtype(job.train.compute_dtype, device)
    transformer = plain_transformer(base, dtype)
    transformer.add_adapter(LoraConfig(r=job.lora.rank, target_modules=list(TARGETS)))
    cast_training_params(transformer, dtype=adapter_dtype)
    transformer.enable_gradient_checkpointing()
    transformer.train()
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    optimizer = AdamW8bit(parameters, lr=job.train.learning_rate, weight_decay=1e-4)
    generator = seeded(job.train.seed, "micro-step", 0)
    entry = data.latents.entries[0]
    batch = data.load([Sample(entry.keys[0], entry.texts[0][0])], device, generator)
    latents = batch.latents
    noise = torch.randn(latents.shape, generator=generator).to(device)
    sigma = sample_sigmas(1, generator).to(device)
    height, width = latents.shape[-2:]

    def step() -> float:
        tokens = transformer(
            hidden_states=pack_latents(add_noise(latents, noise, sigma).to(dtype)),
            encoder_hidden_states=batch.prompt_embeds.to(dtype),
            pooled_projections=batch.pooled.to(dtype),
            timestep=sigma,
            img_ids=image_ids(height, width, device),
            txt_ids=torch.zeros(batch.prompt_embeds.shape[1], 3, device=device),
            guidance=torch.ones(1, device=device),
            return_dict=False,
        )[0]
        loss = flow_loss(unpack_latents(tokens, height, width), latents, noise).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


TARGETS = ("to_k", "to_q", "to_v", "to_out.0")


def plain_transformer(base: LoadedFlux, dtype: torch.dtype) -> nn.Module:
    """A diffusers model of the same weights on the store's device, its block Linears replaced by
    Linear4bit. No more than one matrix is there unquantized."""
    from atelier.trainers.flux import build_transformer, empty_transformer

    views = build_transformer(base.store, base.config, dtype)
    model = empty_transformer(base.config)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            view = views.get_submodule(name)
            bias = view.store.plain[f"{view.source.name}.bias"][view.source.rows]
            weight = view.dequantize(torch.bfloat16).clone()
            model.set_submodule(name, plain_linear(name, weight, bias, dtype))
        elif name.endswith(("norm_q", "norm_k", "norm_added_q", "norm_added_k")):
            module.weight = nn.Parameter(views.get_submodule(name).weight.clone())
    assert not any(parameter.is_meta for parameter in model.parameters())
    return model.requires_grad_(False)


def plain_linear(
    name: str, weight: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype
) -> nn.Linear:
    from bitsandbytes.nn import Linear4bit, Params4bit

    out_features, in_features = weight.shape
    if "blocks." not in name:
        linear = nn.Linear(in_features, out_features, device="meta", dtype=dtype)
        linear.weight = nn.Parameter(weight.to(dtype))
    else:
        linear = Linear4bit(
            in_features,
            out_features,
            compute_dtype=dtype,
            quant_type="nf4",
            compress_statistics=False,
            device="meta",
        )
        packed = Params4bit(
            weight, requires_grad=False, quant_type="nf4", compress_statistics=False
        )
        linear.weight = packed.to(weight.device)  # which quantizes
        # Else an evaluation repacks the weight on a CPU and the layer stops being differentiable.
        linear.support_avx512bf16_for_cpu = False
    linear.bias = nn.Parameter(bias.to(dtype))
    return linear


def seconds(step: Callable[[], float], device: torch.device) -> float:
    began = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def compare(
    base: LoadedFlux, folder: Path, adapter_dtype: torch.dtype, runs: int
) -> dict[str, float]:
    """Median seconds of both, and the median of ours / plain over alternating pairs."""
    data = make_data(folder, base)
    job = JobSettings(lora=LoraSettings(rank=4), train=TrainSettings(gradient_accumulation=1))
    ours, plain = our_step(base, data, job), plain_step(base, data, job, adapter_dtype)
    losses = [(ours(), plain()) for _ in range(2)]  # warm-up
    pairs = []
    for index in range(runs):
        first, second = (ours, plain) if index % 2 == 0 else (plain, ours)
        times = {first: seconds(first, base.store.device)}
        times[second] = seconds(second, base.store.device)
        pairs.append((times[ours], times[plain]))
    return {
        "ours_s": statistics.median(pair[0] for pair in pairs),
        "plain_s": statistics.median(pair[1] for pair in pairs),
        "ratio": statistics.median(pair[0] / pair[1] for pair in pairs),
        "ratio_min": min(pair[0] / pair[1] for pair in pairs),
        "ratio_max": max(pair[0] / pair[1] for pair in pairs),
        "first_loss_ours": losses[0][0],
        "first_loss_plain": losses[0][1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7, help="pairs per network, at least 5")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/train_step.json")
    arguments = parser.parse_args()
    device = default_device()
    rows = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wide = {"width": 1024, "depth": 2, "depth_single": 2}
        files = {
            "nano": ROOT / "assets/nano/nano-flux.safetensors",
            "width 1024, 2 + 2 blocks": write_flux(folder / "wide.safetensors", **wide),
        }
        for title, file in files.items():
            base = load_flux(file, format="nf4", device=device, quantize_on=device)
            for dtype in (torch.float32, torch.bfloat16):
                row = f"{title}, plain adapters in {dtype_name(dtype)}"
                rows[row] = compare(base, folder / "cache", dtype, arguments.runs)
                sys.stdout.write(f"{row}: {json.dumps(rows[row], indent=1)}\n")
    result = {"device": str(device), "torch": torch.__version__, "machine": platform.machine()}
    result |= {"threads": torch.get_num_threads(), "runs": arguments.runs, "networks": rows}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
