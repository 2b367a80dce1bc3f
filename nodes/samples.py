"""Sample pictures of a run: drawn by ComfyUI's sampler, kept in the run's folder."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..trainers.adapters import file_tensors
from ..trainers.files import write_atomically, write_json
from ..trainers.lora_settings import LoraSettings
from .native_lora import add_lora
from .sampling import draw_latents
from .validation import Picture, Validation

LIST_FILE = "samples.json"
ShowPreview = Callable[[int, Picture, str], None]
"""Called with the step, the picture, and a JPEG of it as a data URL, while it is denoised."""


class Samples:
    """The sample pictures of one run, `folder`/step-000250-<key>.png.

    Args:
        model: the MODEL on which the LoRA is put.
        default_size: width and height in pixels where the validation names none.
    """

    def __init__(
        self,
        folder: Path,
        model: Any,
        lora: LoraSettings,
        validation: Validation,
        default_size: tuple[int, int],
        show_preview: ShowPreview,
    ) -> None:
        self._folder, self._model, self._lora = folder, model, lora
        self._validation, self._show_preview = validation, show_preview
        # A prompt that is there twice is drawn once.
        pictures = {one.key: one for one in validation.pictures(default_size)}
        self._pictures = tuple(pictures.values())

    def missing(self, step: int) -> list[Picture]:
        """Those that are not drawn yet with the LoRA of `step`."""
        return [one for one in self._pictures if not one.path(self._folder, step).exists()]

    def draw(self, step: int, lora: dict[str, Tensor]) -> list[tuple[Picture, Path]]:
        """Draw with the LoRA's tensors of `step` what is missing; returns that and its files."""
        missing = self.missing(step)
        self._write_list()
        if not missing:
            return []
        with torch.inference_mode():
            model = add_lora(self._model, file_tensors(lora, self._lora), 1.0)
            for picture in missing:
                save_png(picture.path(self._folder, step), self._draw(model, picture, step))
        return [(one, one.path(self._folder, step)) for one in missing]

    def of(self, step: int) -> list[tuple[Picture, Tensor]]:
        """The pictures of a step that are drawn, and their pixels [H, W, 3] in 0..1."""
        paths = [(one, one.path(self._folder, step)) for one in self._pictures]
        return [(one, _pixels(path)) for one, path in paths if path.exists()]

    def steps_drawn(self) -> list[int]:
        """The steps of which there is a picture of now."""
        return sorted({_step(file) for one in self._pictures for file in self._files(one)})

    def tensor(self, last_step: int) -> Tensor:
        """The pictures [N, H, W, 3] in 0..1 up to a step, by step, then by prompt; of several sizes
        those of the first."""
        first = self._pictures[0]
        same = [p for p in self._pictures if (p.width, p.height) == (first.width, first.height)]
        files = [file for one in same for file in self._files(one) if _step(file) <= last_step]
        ordered = sorted(files, key=_step)  # stable: the prompts keep their order
        return torch.stack([_pixels(file) for file in ordered])

    def _files(self, picture: Picture) -> Iterable[Path]:
        return self._folder.glob(f"step-*-{picture.key}.png")

    def _draw(self, model: Any, picture: Picture, step: int) -> Tensor:
        """Pixels [H, W, 3] in 0..1."""

        def show(preview: Image.Image) -> None:
            self._show_preview(step, picture, _data_url(preview))

        latents = draw_latents(
            model,
            picture.prompt.positive,
            picture.prompt.negative,
            width=picture.width,
            height=picture.height,
            sampler=self._validation.sampler,
            show=show,
        )
        return self._validation.vae.decode(latents)[0]

    def _write_list(self) -> None:
        """What the pages need to show the pictures under their names."""
        entries = [
            {
                "key": one.key,
                "name": one.prompt.name,
                "prompt": one.prompt.text,
                "width": one.width,
                "height": one.height,
            }
            for one in self._pictures
        ]
        write_json(self._folder / LIST_FILE, entries)


def save_png(path: Path, pixels: Tensor) -> None:
    """Write pixels [H, W, 3] in 0..1, atomically."""
    # Cut to 8 bits as Save Image does: the picture of a KSampler is the same to the bit.
    whole = (pixels * 255).clamp(0, 255).byte().cpu().numpy()
    write_atomically(path, lambda file: Image.fromarray(whole).save(file, format="PNG"))


def _pixels(path: Path) -> Tensor:
    """[H, W, 3] in 0..1 of a PNG."""
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).float() / 255


def _step(path: Path) -> int:
    return int(path.name.split("-")[1])


def _data_url(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
