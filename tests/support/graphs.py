"""API graphs for the host tests: the main line in few steps.

The base is a random FLUX of one double and one single block, whose every layer counts; text
encoders and autoencoder are nano's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flux_files import write_flux
from PIL import Image, ImageDraw

Graph = dict[str, dict[str, Any]]


WATCHED = {
    "every": 2,
    "unit": "steps",
    "at_start": True,
    "at_end": True,
    "prompts": "a red circle",
    "library": "none",
    "negative": "",
    "sizes": "64x64",
    "seed": 7,
    "steps": 2,
    "sampler_name": "euler",
    "scheduler": "simple",
    "guidance": 2.5,
    "cfg": 1.0,
    "clip": ["nano", 1],
    "vae": ["nano", 2],
}
"""Inputs of Validation Settings that draw a picture in a moment."""


def write_pictures(folder: Path, count: int = 4, size: int = 64) -> None:
    """Circles of several colours with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    colours = ("red", "green", "blue", "orange", "purple", "teal")
    for index in range(count):
        colour = colours[index % len(colours)]
        picture = Image.new("RGB", (size, size), "white")
        ImageDraw.Draw(picture).ellipse((8, 8, size - 8 - 4 * index, size - 8), fill=colour)
        picture.save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a {colour} circle", encoding="utf-8")


def write_base(models: Path) -> None:
    """The random FLUX, as models/diffusion_models/tiny.safetensors."""
    write_flux(models / "diffusion_models" / "tiny.safetensors")


def train_graph(folder: str, *, sampling: bool = True, **train: Any) -> Graph:
    """Load, cache, train and sample; `train` overrides inputs of Train LoRA."""
    settings = {
        "name": "test",
        "length": 3,
        "unit": "steps",
        "rank": 4,
        "targets": "all+ffs",
        "learning_rate": 1e-2,
        "batch_size": 2,
        "gradient_accumulation": 1,
        "seed": 0,
        "guidance": 1.0,
        "compute_dtype": "fp32",
        "gradient_checkpointing": True,
        "checkpoint_every": 250,
        "sample_every": 0,
        "sample_steps": 2,
        "sample_seed": 7,
    }
    graph: Graph = {
        "load": node(
            "AtelierLoadQuantizedFlux", model="tiny.safetensors", format="nf4", compute_dtype="fp32"
        ),
        "nano": node(
            "AtelierLoadQuantizedFlux", model="nano (built in)", format="bf16", compute_dtype="fp32"
        ),
        "data": node(
            "AtelierImageFolderDataset",
            folder=folder,
            width=64,
            height=64,
            mode="fixed",
            repeats=1,
            trigger="",
            missing_captions="error",
        ),
        "latents": node("AtelierCacheLatents", dataset=["data", 0], vae=["nano", 2], batch_size=1),
        "prompts": node("AtelierEncodePrompts", dataset=["data", 0], clip=["nano", 1], length=77),
        "train": node(
            "AtelierTrainLoRA",
            model=["load", 0],
            latents=["latents", 0],
            prompts=["prompts", 0],
            **{**settings, **train},
        ),
        "name": node("PreviewAny", source=["train", 2]),
    }
    if sampling:
        graph |= {
            "text": node("CLIPTextEncode", clip=["nano", 1], text="a red circle"),
            "guided": node("FluxGuidance", conditioning=["text", 0], guidance=2.5),
            "samples": node("SaveImage", images=["train", 4], filename_prefix="samples"),
            "empty": node("EmptySD3LatentImage", width=64, height=64, batch_size=1),
            **sampled("after", ["train", 1]),
        }
        graph["train"]["inputs"] |= {"vae": ["nano", 2], "positive": ["guided", 0]}
    return graph


def validated(folder: str, *, train: dict[str, Any] | None = None, **changed: Any) -> Graph:
    """Train with Validation Settings, whose inputs `changed` overrides; None takes one away."""
    graph = train_graph(folder, sampling=False, **{"name": "validated", **(train or {})})
    inputs = {name: value for name, value in {**WATCHED, **changed}.items() if value is not None}
    graph["validation"] = node("AtelierValidationSettings", **inputs)
    graph["train"]["inputs"]["validation"] = ["validation", 0]
    if "clip" in inputs:
        graph["samples"] = node("SaveImage", images=["train", 4], filename_prefix="samples")
    return graph


def sampled(name: str, model: list) -> Graph:
    """KSampler, VAE Decode and Save Image on `model`, with the prompt and latent of the graph."""
    sampler = node(
        "KSampler",
        model=model,
        positive=["guided", 0],
        negative=["guided", 0],
        latent_image=["empty", 0],
        seed=7,
        steps=2,
        cfg=1.0,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
    )
    return {
        f"{name}.sampler": sampler,
        f"{name}.decode": node("VAEDecode", samples=[f"{name}.sampler", 0], vae=["nano", 2]),
        f"{name}.save": node("SaveImage", images=[f"{name}.decode", 0], filename_prefix=name),
    }


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}
