"""The cells of a Compare Grid: each a picture of its own file, drawn once."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..trainers.files import clear_leftovers
from ..trainers.grid import Axis, Place, places
from ..trainers.lora_file import lora_facts
from . import folders, host
from .encoders import patches_identity, require_flux_vae
from .graph_queue import nodes_before
from .looks import Look, content_digests
from .lora_words import warned_of
from .native_lora import AppliedLora, apply_lora, base_format
from .samples import save_png
from .sampling import draw_latents, encode_prompt
from .validation import Sampler


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What determines a picture, but for the networks and what all pictures share."""

    prompt: str
    look: Look
    strength: float
    guidance: float
    cfg: float

    @property
    def lora(self) -> Look | None:
        """What is put on the MODEL, if it acts."""
        return self.look if self.look.path is not None and self.strength != 0 else None

    def key(self, digests: dict[Path, str], negative: str) -> str:
        """Equal for equal pictures: also without a LoRA at every strength."""
        lora = self.lora
        negative = negative if self.cfg != 1 else ""
        embeddings = folders.embedding_files(f"{self.prompt} {negative}")
        values = {
            "prompt": self.prompt,
            "lora": (digests[lora.path], self.strength) if lora else None,
            "guidance": self.guidance,
            "cfg": self.cfg,
            "negative": negative,
            "embeddings": folders.fingerprints(embeddings),
        }
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All that is compared, and what all pictures share."""

    prompts: tuple[str, ...]
    looks: tuple[Look, ...]
    strengths: tuple[float, ...]
    guidances: tuple[float, ...]
    cfgs: tuple[float, ...]
    negative: str
    width: int
    height: int
    sampler: Sampler

    @property
    def axes(self) -> tuple[Axis, ...]:
        strengths = (f"strength {value:g}" for value in self.strengths)
        has_lora = any(look.path for look in self.looks)
        return (
            Axis(labels=self.prompts, is_text=True),
            Axis(labels=tuple(look.label for look in self.looks)),
            Axis(labels=tuple(strengths) if has_lora else ("",)),
            Axis(labels=tuple(f"guidance {value:g}" for value in self.guidances)),
            Axis(labels=tuple(f"cfg {value:g}" for value in self.cfgs)),
        )

    @property
    def facts(self) -> str:
        sampler = self.sampler
        facts = [
            f"{self.width} x {self.height}",
            f"{sampler.steps} steps",
            f"{sampler.name} {sampler.scheduler}",
            f"seed {sampler.seed}",
        ]
        has_negative = self.negative and any(cfg != 1 for cfg in self.cfgs)
        return "  ·  ".join([*facts, f"not: {self.negative}"] if has_negative else facts)

    def cell(self, place: Place) -> Cell:
        prompt, look, strength, guidance, cfg = place
        return Cell(
            prompt=self.prompts[prompt],
            look=self.looks[look],
            strength=self.strengths[strength],
            guidance=self.guidances[guidance],
            cfg=self.cfgs[cfg],
        )

    def cells(self) -> dict[Place, Cell]:
        return {place: self.cell(place) for place in places(self.axes)}

    def identity(self) -> str:
        """Of what all pictures share, the networks aside."""
        return repr((self.width, self.height, dataclasses.replace(self.sampler, cfg=1.0)))


class Cells:
    """The pictures of a comparison, `folder`/<key>.png."""

    def __init__(self, folder: Path, comparison: Comparison) -> None:
        self.folder, self._comparison = folder, comparison
        digests = content_digests(comparison.looks)
        cells = comparison.cells()
        self._keys = {
            place: cell.key(digests, comparison.negative) for place, cell in cells.items()
        }
        self._cells = {self._keys[place]: cell for place, cell in cells.items()}

    def __len__(self) -> int:
        """Different pictures."""
        return len(self._cells)

    def path(self, place: Place) -> Path:
        return self._path(self._keys[place])

    def missing(self) -> list[str]:
        """Keys of what is not drawn yet, by LoRA and strength, so that each is put on once."""
        keys = [key for key in self._cells if not self._path(key).exists()]
        loras = list(dict.fromkeys(self._lora(key) for key in self._cells))
        return sorted(keys, key=lambda key: loras.index(self._lora(key)))

    def rows(self) -> list[dict[str, object]]:
        """What is in each picture, in the order of the sheet."""
        cells = self._comparison.cells()
        return [
            {
                "prompt": cell.prompt,
                "lora": cell.look.label,
                "strength": cell.strength,
                "guidance": cell.guidance,
                "cfg": cell.cfg,
                "seed": self._comparison.sampler.seed,
                "file": self.path(place).name,
            }
            for place, cell in cells.items()
        ]

    def draw(self, model: Any, clip: Any, vae: Any, show: Callable[[str], None]) -> list[str]:
        """Draw what is missing, each picture into its file at once; returns what is odd in the
        LoRAs, in sentences.

        Raises:
            ValueError: the VAE is not FLUX's, or a LoRA was made for another kind of model.
        """
        missing = self.missing()
        if not missing:
            return []
        require_flux_vae(vae)
        warnings = self._check(model, clip, missing)  # before the first picture takes its time
        show(f"Pictures: {len(self)}, to draw: {len(missing)}.")
        bar = _Bar(len(missing) * self._comparison.sampler.steps)
        with torch.inference_mode():
            plain = self._encode(clip, missing)
            drawn, began = 0, time.monotonic()
            for (lora, strength), keys in itertools.groupby(missing, key=self._lora):
                group, patched, texts = list(keys), model, plain
                if lora:
                    with_lora = self._with(model, clip, lora, strength)
                    patched = with_lora.model
                    if with_lora.num_text_layers:
                        texts = self._encode(with_lora.clip, group)
                for key in group:
                    self._draw(patched, vae, texts, key, bar)
                    drawn += 1
                    rest = (time.monotonic() - began) / drawn * (len(missing) - drawn)
                    show(f"{drawn} of {len(missing)} pictures are drawn, {_duration(rest)} left.")
        return warnings

    def _check(self, model: Any, clip: Any, keys: Sequence[str]) -> list[str]:
        """Sentences on the LoRAs of some pictures. Raises ValueError if one cannot be used."""
        warnings = []
        for lora in dict.fromkeys(self._cells[key].lora for key in keys):
            if lora:
                applied, facts = self._with(model, clip, lora, 1.0), lora_facts(lora.tensors())
                warnings += warned_of(lora.label, applied, facts, 1.0, base_format(model))
        return warnings

    def _with(self, model: Any, clip: Any, lora: Look, strength: float) -> AppliedLora:
        return apply_lora(model, lora.tensors(), strength, clip=clip, strength_clip=strength)

    def _draw(self, model: Any, vae: Any, texts: dict[str, list], key: str, bar: _Bar) -> None:
        cell, comparison = self._cells[key], self._comparison
        host.check_interrupted()
        latents = draw_latents(
            model,
            _guided(texts[cell.prompt], cell.guidance),
            _guided(texts.get(comparison.negative, texts[cell.prompt]), cell.guidance),
            width=comparison.width,
            height=comparison.height,
            sampler=dataclasses.replace(comparison.sampler, cfg=cell.cfg),
            show=bar.step,
        )
        path = self._path(key)
        clear_leftovers(path)
        save_png(path, vae.decode(latents)[0])

    def _encode(self, clip: Any, keys: Sequence[str]) -> dict[str, list]:
        """The CONDITIONING of each text that is needed; the negative only where cfg is not 1."""
        cells = [self._cells[key] for key in keys]
        texts = {cell.prompt for cell in cells}
        if any(cell.cfg != 1 for cell in cells):
            texts.add(self._comparison.negative)
        return {text: encode_prompt(clip, text, 0.0) for text in sorted(texts)}

    def _lora(self, key: str) -> tuple[Look | None, float]:
        cell = self._cells[key]
        return cell.lora, cell.strength if cell.lora else 0.0

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.png"


class _Bar:
    """The node's bar over the steps of all pictures, with the one that is drawn."""

    def __init__(self, total: int) -> None:
        self._progress, self._total, self._done = host.Progress(total), total, 0

    def step(self, preview: Image.Image) -> None:
        self._done += 1
        self._progress.update(self._done, self._total, preview)


def networks_identity(graph: Any, node_id: str, model: Any) -> str:
    """Hash of what gives the node its networks: the nodes before it and their settings, which are
    known also of nodes of other packs; and the LoRAs on the MODEL, which may have been trained.

    Args:
        graph: ComfyUI's DynamicPrompt.
    """
    nodes = nodes_before(graph, node_id, ("model", "clip", "vae"))
    return hashlib.sha256(repr([*nodes, patches_identity(model)]).encode()).hexdigest()


def _guided(conditioning: list, guidance: float) -> list:
    return [[embeds, {**options, "guidance": guidance}] for embeds, options in conditioning]


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes / 60:.1f} h"
