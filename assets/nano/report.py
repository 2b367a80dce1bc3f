"""Measures the finished model and draws its sample sheet."""

import json
import math
from itertools import pairwise
from pathlib import Path

import torch
from autoencoder import SCALING_FACTOR, SHIFT_FACTOR
from base import Latents
from data import ARTWORKS, BASE_ARTWORKS, EmojiPictures, load_subjects, to_tensor
from diffusers import AutoencoderKL
from flux import NanoFlux, pack, unpack
from judge import Judge
from PIL import Image, ImageDraw
from text import CaptionWriter, TextEncoders
from torch import Tensor

TIMES = (0.2, 0.4, 0.6, 0.8)


def sigmas(num_steps: int, shift: float = 1.15) -> list[float]:
    """ComfyUI's ModelSamplingFlux, scheduler `simple`: num_steps + 1 values from 1 to 0."""
    times = [1 - step / num_steps for step in range(num_steps)]
    return [math.exp(shift) / (math.exp(shift) + 1 / t - 1) for t in times] + [0.0]


class Painter:
    """Captions to pictures, the way ComfyUI's KSampler with euler and FluxGuidance does it."""

    def __init__(self, flux: NanoFlux, autoencoder: AutoencoderKL, encoders: TextEncoders) -> None:
        self.flux, self.autoencoder, self.encoders = flux, autoencoder, encoders

    @torch.no_grad()
    def paint(
        self,
        captions: list[str],
        *,
        guidance: float,
        num_steps: int = 20,
        length: int = 256,
        cfg: float = 1.0,
    ) -> Tensor:
        """[B, 3, 128, 128] in 0..1; `cfg` other than 1 adds an empty-caption pass (for a base)."""
        device = self.flux.img_in.weight.device
        noise = torch.cat(
            [
                torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(row))
                for row in range(len(captions))
            ]
        )
        x, ones = noise.to(device), torch.ones(len(captions), device=device)
        text, empty = self.encoders(captions, length), self.encoders([""] * len(captions), length)
        steps = sigmas(num_steps)
        for sigma, following in pairwise(steps):
            velocity = self.flux(x, ones * sigma, *text, ones * guidance)
            if cfg != 1.0:
                velocity = torch.lerp(
                    self.flux(x, ones * sigma, *empty, ones * guidance), velocity, cfg
                )
            x = x + (following - sigma) * velocity
        latents = unpack(x) / SCALING_FACTOR + SHIFT_FACTOR
        return (self.autoencoder.decode(latents).sample.clamp(-1, 1) + 1) / 2


class Examiner:
    """Losses on fixed noise and times over pictures as drawn; `stride` thins the pictures out."""

    def __init__(
        self,
        flux: NanoFlux,
        latents: Latents,
        encoders: TextEncoders,
        writer: CaptionWriter,
        *,
        stride: int = 4,
    ) -> None:
        self.flux, self.encoders, self.writer = flux, encoders, writer
        self.subjects = load_subjects()["subjects"]
        self.which = list(range(0, latents.mean.shape[1], stride))
        self.clean = pack(latents.mean[0][self.which])

    @torch.no_grad()
    def losses(
        self,
        captions: list[str],
        *,
        length: int = 32,
        guidance: float = 1.0,
        rows: list[int] | None = None,
    ) -> Tensor:
        """Mean squared velocity error per picture [N], over `TIMES`."""
        clean = self.clean if rows is None else self.clean[rows]
        seeds = range(len(self.clean)) if rows is None else rows
        total = torch.zeros(len(clean))
        for number, time in enumerate(TIMES):
            noise = torch.stack(
                [
                    torch.randn(64, 64, generator=torch.Generator().manual_seed(9973 * s + number))
                    for s in seeds
                ]
            )
            for part in torch.arange(len(clean)).split(64):
                x, eps = clean[part], noise[part].to(clean.device)
                ones = torch.ones(len(part), device=clean.device)
                text = self.encoders([captions[i] for i in part.tolist()], length)
                velocity = self.flux(torch.lerp(x, eps, time), ones * time, *text, ones * guidance)
                total[part] += (velocity - (eps - x)).square().mean((1, 2)).cpu() / len(TIMES)
        return total

    def caption(self, picture: int, *, other_subject: int = 0, other_artwork: int = 0) -> str:
        subject = self.subjects[(picture // 3 + other_subject) % len(self.subjects)]
        return self.writer.plain(subject, BASE_ARTWORKS[(picture + other_artwork) % 3])

    def table(self) -> dict[str, float]:
        """What the words are worth, and what the padding costs."""
        right = [self.caption(p) for p in self.which]
        base = self.losses(right)
        figures = {
            f"eval loss, {a}": base[[p % 3 == i for p in self.which]].mean().item()
            for i, a in enumerate(BASE_ARTWORKS)
        }
        for length in (77, 256, 512):
            figures[f"loss at {length} tokens against 32"] = (
                self.losses(right, length=length).mean() / base.mean() - 1
            ).item()
        wrong = [self.caption(p, other_subject=37) for p in self.which]
        figures["a wrong subject costs"] = (self.losses(wrong).mean() / base.mean() - 1).item()
        wrong = [self.caption(p, other_artwork=1) for p in self.which]
        figures["a wrong artwork costs"] = (self.losses(wrong).mean() / base.mean() - 1).item()
        figures["an empty caption costs"] = (
            self.losses([""] * len(right)).mean() / base.mean() - 1
        ).item()
        return {"eval loss": base.mean().item(), **figures, **self.retrieval()}

    def retrieval(self, num_pictures: int = 32, num_choices: int = 16) -> dict[str, float]:
        """How often the right caption has the lowest loss among 16 subjects."""
        ranks = []
        rows = list(range(0, len(self.which), max(1, len(self.which) // num_pictures)))[
            :num_pictures
        ]
        for row in rows:
            captions = [
                self.caption(self.which[row], other_subject=11 * k) for k in range(num_choices)
            ]
            losses = self.losses(captions, rows=[row] * num_choices)
            ranks.append((losses < losses[0]).sum().item())
        return {
            f"retrieval among 16, top {k}": sum(r < k for r in ranks) / len(ranks) for k in (1, 5)
        }


def judged(
    painter: Painter,
    judge: Judge,
    writer: CaptionWriter,
    *,
    guidance: float,
    subjects: list[int],
    cfg: float = 1.0,
) -> dict:
    """Shares of pictures of training captions that the judge takes for what the caption says."""
    table, right, first, styled = load_subjects()["subjects"], [], [], []
    for artwork in BASE_ARTWORKS:
        captions = [writer.plain(table[i], artwork) for i in subjects]
        parts = [captions[k : k + 32] for k in range(0, len(captions), 32)]
        images = torch.cat(
            [painter.paint(part, guidance=guidance, length=77, cfg=cfg) for part in parts]
        ).cpu()
        order = judge.subject(images).argsort(-1, descending=True)
        right += (order[:, 0] == torch.tensor(subjects)).tolist()
        first += (order[:, :5] == torch.tensor(subjects)[:, None]).any(-1).tolist()
        styled += (judge.style(images).argmax(-1) == ARTWORKS.index(artwork)).tolist()
    share = {"subject, top 1": right, "subject, top 5": first, "artwork": styled}
    return {f"generated at guidance {guidance}, {k}": sum(v) / len(v) for k, v in share.items()}


def judged_real(pictures: EmojiPictures, judge: Judge, subjects: list[int]) -> dict[str, float]:
    """The same shares on the real pictures (of which the judge has seen the subjects)."""
    table, right, styled = load_subjects()["subjects"], [], []
    for number, artwork in enumerate(BASE_ARTWORKS):
        images = to_tensor([pictures.picture(artwork, table[i]["code"]) for i in subjects]) / 255
        right += (judge.subject(images).argmax(-1) == torch.tensor(subjects)).tolist()
        styled += (judge.style(images).argmax(-1) == number).tolist()
    return {
        "real pictures, subject": sum(right) / len(right),
        "real pictures, artwork": sum(styled) / len(styled),
    }


def sample_sheet(
    painter: Painter, writer: CaptionWriter, path: Path, *, guidance: float, cfg: float = 1.0
) -> None:
    """32 training captions, eight to a row, each under its picture."""
    table = load_subjects()["subjects"]
    numbers = [round(i * (len(table) - 1) / 31) for i in range(32)]
    captions = [writer.plain(table[n], BASE_ARTWORKS[k % 3]) for k, n in enumerate(numbers)]
    images = (painter.paint(captions, guidance=guidance, cfg=cfg) * 255).round().byte().cpu()
    sheet = Image.new("RGB", (8 * 136, 4 * 164), "white")
    pen = ImageDraw.Draw(sheet)
    for k, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = k % 8 * 136 + 4, k // 8 * 164 + 4
        sheet.paste(Image.fromarray(image.permute(1, 2, 0).numpy()), (left, top))
        pen.multiline_text(
            (left, top + 130), caption.replace(", ", ",\n"), fill="black", font_size=10
        )
    sheet.quantize(256).save(path, optimize=True)


def write_figures(figures: dict, path: Path) -> None:
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
