"""Run folders as trainings leave them, for what would take hours to train in a test."""

from __future__ import annotations

import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

SETTINGS = {"name": "written", "length": 400, "unit": "steps", "rank": 7, "learning_rate": 0.0003}


@dataclass(frozen=True, kw_only=True)
class WrittenRun:
    """A run of `num_steps` steps, of which `step` are done. Losses fall towards `floor`."""

    name: str
    hash8: str = "0a1b2c3d"
    step: int = 400
    num_steps: int = 400
    state: str = "finished"
    floor: float = 0.3
    sample_steps: tuple[int, ...] = (0, 100, 200, 300, 400)
    prompts: tuple[str, ...] = ("a fox in the snow",)
    eval_every: int = 0
    picture: Path | None = None
    """Its colours fade in over the steps; without it the pictures are plain."""

    @property
    def id(self) -> str:
        return f"{self.name}-{self.hash8}"

    def losses(self) -> list[float]:
        draw = random.Random(self.name)
        fall = [self.floor + 0.5 * math.exp(-3 * at / self.num_steps) for at in range(self.step)]
        return [value * math.exp(draw.gauss(0, 0.25)) for value in fall]

    def write(self, output: Path) -> Path:
        """Make the folder below ComfyUI's output folder."""
        folder = output / "atelier" / self.id
        (folder / "checkpoints" / f"step-{self.step:06d}").mkdir(parents=True, exist_ok=True)
        (folder / "samples").mkdir(exist_ok=True)
        (folder / "checkpoints" / f"step-{self.step:06d}" / "adapter.safetensors").write_bytes(
            bytes(50_000)
        )
        node = {"class_type": "AtelierTrainLoRA", "inputs": {**SETTINGS, "name": self.name}}
        now = time.time()
        status = {
            "state": self.state,
            "step": self.step,
            "num_steps": self.num_steps,
            "started": now - 600,
            "updated": now,
            "error": None,
            "lora": None,
            "node": "8",
            "can_sample": True,
        }
        _write(folder / "run.json", {"version": 1})
        _write(folder / "job.json", {"name": self.name, "num_steps": self.num_steps})
        _write(folder / "status.json", status)
        _write(folder / "prompt.json", {"node": "8", "prompt": {"8": node}})
        lines = "\n".join(json.dumps(line) for line in self._lines())
        (folder / "metrics.jsonl").write_text(lines + "\n", encoding="utf-8")
        self._draw_samples(folder / "samples")
        return folder

    def _lines(self) -> list[dict[str, Any]]:
        draw = random.Random(self.hash8)
        lines: list[dict[str, Any]] = []
        for step, loss in enumerate(self.losses(), 1):
            lines.append(
                {
                    "step": step,
                    "loss": round(loss, 6),
                    "grad_norm": round(loss * draw.uniform(0.5, 1.5), 6),
                    "learning_rate": 1e-4 * min(1, step / (0.1 * self.num_steps)),
                    "seconds": round(draw.uniform(1.1, 1.4), 4),
                    "memory": 11_400_000_000,
                    "ram": 8_100_000_000,
                }
            )
            if self.eval_every and step % self.eval_every == 0:
                smooth = self.floor + 0.5 * math.exp(-3 * step / self.num_steps)
                lines.append({"step": step, "eval_loss": round(smooth * 1.05, 6)})
                lines.append({"step": step, "score": round(31 - 10 * smooth, 4)})
        return lines

    def _draw_samples(self, folder: Path) -> None:
        strip = []
        for number, prompt in enumerate(self.prompts):
            key = f"{number:08x}"
            strip.append(
                {"key": key, "name": prompt[:20], "prompt": prompt, "width": 512, "height": 512}
            )
            for step in self.sample_steps:
                self._draw(step).save(folder / f"step-{step:06d}-{key}.png")
        _write(folder / "samples.json", strip)

    def _draw(self, step: int) -> Image.Image:
        done = step / max(1, self.num_steps)
        if self.picture is None:
            picture = Image.new("RGB", (512, 512), (round(40 + 180 * done), 110, 150))
            ImageDraw.Draw(picture).text((200, 230), str(step), fill="white", font_size=60)
            return picture
        picture = Image.open(self.picture).convert("RGB").resize((512, 512))
        draw = random.Random(step)
        noise = Image.new("RGB", (16, 16))
        noise.putdata([tuple(draw.randrange(90, 190) for _ in "RGB") for _ in range(256)])
        noise = noise.resize((512, 512), Image.Resampling.BICUBIC)
        return Image.blend(noise, picture, min(1, 0.1 + 0.9 * done))


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
