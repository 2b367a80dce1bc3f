"""A LoRA file: its tensors, checked, and what its metadata says of the training."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import not_read, read_safetensors
from .lora_names import split_name
from .tensor_files import PICKLES, read_header

_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""torch's zip files, and pickles of the protocols 2 to 5."""
_PARTNERS = {
    "up": "down",
    "down": "up",
    "lokr_w1_a": "lokr_w1_b",
    "lokr_w1_b": "lokr_w1_a",
    "lokr_w2_a": "lokr_w2_b",
    "lokr_w2_b": "lokr_w2_a",
    "hada_w1_a": "hada_w1_b",
    "hada_w1_b": "hada_w2_a",
    "hada_w2_a": "hada_w2_b",
    "hada_w2_b": "hada_w1_a",
}
"""What a part of a module cannot do without."""
_DIFFUSERS = "lora_adapter_metadata"
_MANY_TAGS = 5


class LoraTensors(dict[str, Tensor]):
    """The tensors of a LoRA by name, as the file spells it, with what else the file says.

    ComfyUI's wire type LORA_MODEL is a dict of tensors, and so is this.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        metadata: Mapping[str, str] | None = None,
        name: str = "",
    ) -> None:
        """`name` is the file's, without its ending."""
        super().__init__(tensors)
        self.metadata = dict(metadata or {})
        self.name = name


@dataclass(frozen=True, kw_only=True)
class LoraFacts:
    """What a LoRA file says of itself; None and empty where it does not."""

    trigger_words: tuple[str, ...] = ()
    """Words that call up what was learned. Of kohya's files: the most frequent tags."""
    base_format: str | None = None
    """How the weights it was trained on were kept: a name of FORMATS."""
    base_name: str | None = None
    architecture: str | None = None
    """modelspec's, such as `flux-1-dev/lora`."""
    title: str | None = None
    rank: int | None = None
    alpha: float | None = None
    has_alphas: bool = True
    """Whether its tensors have alphas; without, every program takes the ranks: a scale of 1."""
    steps: int | None = None
    guidance: float | None = None
    """The guidance it was trained with."""
    trainer: str | None = None


def read_lora(path: Path) -> LoraTensors:
    """Read and check a LoRA file.

    Alphas that diffusers keeps in the metadata become tensors, as every other reader wants them.

    Raises:
        ValueError: if it is missing, a pickle, damaged, no LoRA, not finite, of rank 0, or if half
            of a pair is missing.
    """
    name = path.name
    _require_safetensors(path)
    entries, _ = read_header(path)
    if not any(split_name(entry)[1] for entry in entries):
        raise ValueError(
            f"'{name}' is not a LoRA: none of its {len(entries)} tensors belongs to one. Choose a "
            "LoRA file."
        )
    tensors, metadata = read_safetensors(path)
    require_sound(tensors, name)
    alphas = _alphas_in_metadata(tensors, metadata)
    return LoraTensors({**tensors, **alphas}, metadata=metadata, name=path.stem)


def require_sound(tensors: Mapping[str, Tensor], name: str) -> None:
    """See that the LoRA called `name` can be computed with.

    Raises:
        ValueError: if values are not finite, a rank is 0, or half of a pair is missing.
    """
    parts: dict[str, set[str]] = {}
    for key, tensor in tensors.items():
        module, _, part = split_name(key)
        parts.setdefault(module, set()).add(part)
        if tensor.numel() == 0:
            raise ValueError(
                f"The LoRA '{name}' has rank 0: its tensor '{key}' is empty. Choose another file."
            )
        if not bool(torch.isfinite(tensor.float()).all()):
            raise ValueError(
                f"The LoRA '{name}' holds values that are not finite, first in '{key}': its "
                "training diverged. Choose an earlier file of it."
            )
    for module, found in parts.items():
        for part in sorted(found):
            partner = _PARTNERS.get(part)
            if partner and partner not in found:
                raise ValueError(
                    f"The LoRA '{name}' is not whole: '{module}' has '{part}' without '{partner}'. "
                    "Download it again, or choose another file."
                )


def lora_facts(tensors: Mapping[str, Tensor]) -> LoraFacts:
    """What the metadata of a `LoraTensors` says, and what the shapes say where it does not."""
    metadata = tensors.metadata if isinstance(tensors, LoraTensors) else {}
    ours = _json(metadata.get("atelier.settings"))
    diffusers = _json(metadata.get(_DIFFUSERS))
    training = _json(metadata.get("training_info"))  # ai-toolkit's
    first = metadata.get
    lora, train = _json(ours.get("lora")), _json(ours.get("train"))
    return LoraFacts(
        trigger_words=_trigger_words(metadata),
        base_format=first("atelier.base_format") or _kohya_format(metadata),
        base_name=first("ss_sd_model_name") or first("ss_base_model_version"),
        architecture=first("modelspec.architecture"),
        title=first("modelspec.title") or first("name") or first("ss_output_name"),
        rank=_whole(first("atelier.rank"), first("ss_network_dim"), diffusers.get("transformer.r"))
        or _shape_rank(tensors),
        has_alphas=any(name.endswith(".alpha") for name in tensors),
        alpha=_number(
            first("atelier.alpha"),  # of a file with a new rank, whose settings are the old ones
            lora.get("alpha"),
            first("ss_network_alpha"),
            diffusers.get("transformer.lora_alpha"),
        ),
        steps=_whole(first("atelier.steps"), first("ss_steps"), training.get("step")),
        guidance=_number(train.get("guidance"), first("ss_guidance_scale")),
        trainer=_trainer(metadata),
    )


def _require_safetensors(path: Path) -> None:
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except FileNotFoundError:
        raise ValueError(
            f"The LoRA '{path}' does not exist. Put it there, or choose another."
        ) from None
    except OSError as error:
        raise not_read(path, error) from error
    if path.suffix.lower() in PICKLES or start.startswith(_PICKLE_STARTS):
        raise ValueError(
            f"'{path.name}' is a pickle, a file that can run code when it is opened, and is not "
            "read. Choose the .safetensors file of this LoRA."
        )


def _alphas_in_metadata(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> dict[str, Tensor]:
    """Alpha tensors for modules without one, from the configuration that diffusers saves.

    With rank-stabilised scaling, peft's scale is alpha / sqrt(rank).
    """
    settings = _json(metadata.get(_DIFFUSERS))
    alphas: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module, _, part = split_name(name)
        if part != "down" or f"{module}.alpha" in tensors:
            continue
        component, _, inner = module.partition(".")
        patterns = settings.get(f"{component}.alpha_pattern") or {}
        alpha = _number(
            *(value for key, value in patterns.items() if inner.endswith(key)),
            settings.get(f"{component}.lora_alpha"),
        )
        if alpha is not None:
            rank = tensor.shape[0]
            scaled = math.sqrt(rank) if settings.get(f"{component}.use_rslora") else 1.0
            alphas[f"{module}.alpha"] = torch.tensor(alpha * scaled)
    return alphas


def _trigger_words(metadata: Mapping[str, str]) -> tuple[str, ...]:
    for key in ("modelspec.trigger_phrase", "ss_trigger_words", "trigger_word", "trigger_words"):
        words = [word.strip() for word in metadata.get(key, "").split(",")]
        if any(words):
            return tuple(word for word in words if word)
    counts: dict[str, int] = {}
    for tags in _json(metadata.get("ss_tag_frequency")).values():
        for tag, count in _json(tags).items():
            counts[tag.strip()] = counts.get(tag.strip(), 0) + (_whole(count) or 0)
    # As frequent as the most frequent one, give or take a tenth: what all pictures have.
    most = max(counts.values(), default=0)
    frequent = [tag for tag, count in counts.items() if tag and count >= 0.9 * most]
    return tuple(sorted(frequent, key=lambda tag: -counts[tag])[:_MANY_TAGS])


def _kohya_format(metadata: Mapping[str, str]) -> str | None:
    in_fp8 = {metadata.get(key) for key in ("ss_fp8_base", "ss_fp8_base_unet")}
    return "fp8" if "True" in in_fp8 else None


def _trainer(metadata: Mapping[str, str]) -> str | None:
    if "atelier.settings" in metadata:
        return "Atelier"
    if software := _json(metadata.get("software")).get("name"):
        return str(software)
    if any(key.startswith("ss_") for key in metadata):
        return "sd-scripts"
    return "diffusers" if _DIFFUSERS in metadata else None


def _shape_rank(tensors: Mapping[str, Tensor]) -> int | None:
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if split_name(name)[2] == "down"}
    return max(ranks, default=None)


def _json(text: Any) -> dict[str, Any]:
    """A JSON object, or an empty one: other programs write what they like."""
    if isinstance(text, str):
        try:
            text = json.loads(text)
        except ValueError:
            return {}
    return text if isinstance(text, dict) else {}


def _number(*values: Any) -> float | None:
    """The first that is a number."""
    for value in values:
        try:
            number = float(value)
        except (TypeError, ValueError):
            continue
        if math.isfinite(number):
            return number
    return None


def _whole(*values: Any) -> int | None:
    number = _number(*values)
    return None if number is None else int(number)
