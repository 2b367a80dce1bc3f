"""Builds the nano FLUX model: `python assets/nano/build.py --comfyui PATH --work DIR`.

Every stage leaves its result and a checkpoint in the work folder; a second call goes on from there.
"""

import argparse
import json
import logging
import os
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from autoencoder import new_autoencoder, train_autoencoder
from base import Batches, base_latents, distill_guidance, train_base
from data import EmojiPictures, fetch_packages
from diffusers import AutoencoderKL
from flux import NanoFlux
from judge import Judge, load_judge
from judge_training import train_judge
from loop import Recipe
from report import Examiner, Painter, judged, judged_real, sample_sheet, write_figures
from safetensors.torch import load_file, save_file
from text import CaptionWriter, TextEncoders, train_text
from torch import nn

logger = logging.getLogger("nano")

HERE = Path(__file__).parent
SHEET_GUIDANCE = 3.0
RECIPES = {
    "vae": Recipe(steps=1800, learning_rate=1.5e-3, warmup=50, ema=0.995, save_every=200),
    "text": Recipe(
        steps=1500, learning_rate=2e-3, warmup=50, ema=0.99, weight_decay=0.0, save_every=300
    ),
    "base": Recipe(steps=7300, learning_rate=1e-3, warmup=150, ema=0.998, save_every=100),
    "distill": Recipe(steps=500, learning_rate=4e-4, warmup=30, ema=0.99, save_every=100),
    "judge_style": Recipe(steps=800, learning_rate=2e-3, warmup=50, save_every=300),
    "judge_subject": Recipe(steps=3000, learning_rate=2e-3, warmup=50, save_every=300),
}


class Build:
    """The stages in order; each property trains, or loads what an earlier call trained."""

    def __init__(self, comfyui: Path, work: Path, recipes: dict[str, Recipe]) -> None:
        self.comfyui, self.work, self.recipes = comfyui, work, recipes
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        fetch_packages(work / "packages")
        self.pictures = EmojiPictures(work / "packages")
        self.writer = CaptionWriter(self.pictures)

    def finished(
        self, name: str, fresh: Callable[[], nn.Module], train: Callable[[], nn.Module]
    ) -> nn.Module:
        """The module of a finished stage, frozen; trains it first if there is none."""
        path = self.work / f"{name}.safetensors"
        if not path.exists():
            logger.info("stage %s", name)
            write_tensors(train().state_dict(), path, torch.float32)
        module = fresh()
        module.load_state_dict(
            load_file(path), strict=False
        )  # T5 ties a weight that is stored once
        return module.to(self.device).requires_grad_(False).eval()

    @cached_property
    def autoencoder(self) -> AutoencoderKL:
        def train() -> AutoencoderKL:
            return train_autoencoder(self.pictures, self.recipes["vae"], self.work, self.device)

        return self.finished("vae", new_autoencoder, train)

    @cached_property
    def encoders(self) -> TextEncoders:
        def train() -> TextEncoders:
            return train_text(
                self.pictures, self.recipes["text"], self.comfyui, self.work, self.device
            )

        return self.finished("text", lambda: TextEncoders(self.comfyui), train)

    @cached_property
    def batches(self) -> Batches:
        latents = base_latents(self.pictures, self.autoencoder, self.device, seed=0)
        return Batches(latents, self.writer, self.encoders, self.device)

    @cached_property
    def base(self) -> NanoFlux:
        return self.finished(
            "base", NanoFlux, lambda: train_base(self.batches, self.recipes["base"], self.work)
        )

    @cached_property
    def distilled(self) -> NanoFlux:
        def train() -> NanoFlux:
            return distill_guidance(self.base, self.batches, self.recipes["distill"], self.work)

        return self.finished("distill", NanoFlux, train)

    def export(self, out: Path) -> None:
        """Writes the model folder in bf16: FLUX's own key names, and diffusers' for the rest."""
        write_tensors(self.distilled.state_dict(), out / "nano-flux.safetensors", torch.bfloat16)
        export_parts(self.autoencoder, self.encoders, out)

    @cached_property
    def judge(self) -> Judge:
        path = self.work / "judge.safetensors"
        if not (self.work / "judge.json").exists():
            recipes = self.recipes["judge_style"], self.recipes["judge_subject"]
            figures = train_judge(self.pictures, self.autoencoder, recipes, self.work, self.device)
            write_figures(figures, self.work / "judge.json")
        return load_judge(path)

    def report(self, out: Path) -> None:
        """Judge, sample sheet, and `figures.json` in the work folder with everything measured."""
        judge, figures = (
            self.judge,
            json.loads((self.work / "judge.json").read_text(encoding="utf-8")),
        )
        shutil.copyfile(self.work / "judge.safetensors", out / "judge.safetensors")
        for name, flux in (("base", self.base), ("distilled", self.distilled)):
            table = Examiner(flux, self.batches.latents, self.encoders, self.writer).table()
            figures |= {f"{name}: {key}": value for key, value in table.items()}
        painter = Painter(self.distilled, self.autoencoder, self.encoders)
        sample_sheet(painter, self.writer, out / "samples.png", guidance=SHEET_GUIDANCE)
        subjects = list(range(0, len(self.batches.subjects), 2))
        figures |= judged_real(self.pictures, judge, subjects)
        figures |= judged(painter, judge, self.writer, guidance=SHEET_GUIDANCE, subjects=subjects)
        write_figures(figures, self.work / "figures.json")


def export_parts(autoencoder: AutoencoderKL, encoders: TextEncoders, out: Path) -> None:
    """The autoencoder and both text encoders as diffusers folders, swapped in whole."""
    parts = {"vae": autoencoder, "text_encoder": encoders.clip, "text_encoder_2": encoders.t5}
    for name, module in parts.items():
        state = {key: value.to(torch.bfloat16) for key, value in module.state_dict().items()}
        part = (
            type(module).from_config(module.config)
            if name == "vae"
            else type(module)(module.config)
        )
        part.load_state_dict(state)
        part.to(torch.bfloat16).save_pretrained(out / f"{name}.part")
        (out / name).mkdir(exist_ok=True)
        for file in (out / f"{name}.part").iterdir():
            file.chmod(0o644)
            os.replace(file, out / name / file.name)
        (out / f"{name}.part").rmdir()


def write_tensors(state: dict[str, torch.Tensor], path: Path, dtype: torch.dtype) -> None:
    tensors = {
        key: value.detach().to("cpu", dtype).clone().contiguous() for key, value in state.items()
    }
    save_file(tensors, path.with_suffix(".part"), metadata={"format": "pt"})
    os.replace(path.with_suffix(".part"), path)
    path.chmod(0o644)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--comfyui", type=Path, required=True, help="a ComfyUI checkout, for its tokenizers"
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for packages, checkpoints and figures"
    )
    parser.add_argument(
        "--out", type=Path, default=HERE, help="folder of the model; default: beside this file"
    )
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    options.work.mkdir(parents=True, exist_ok=True)
    build = Build(options.comfyui, options.work, RECIPES)
    build.export(options.out)
    build.report(options.out)


if __name__ == "__main__":
    main()
