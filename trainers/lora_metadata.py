"""What the file of an exported, resized or merged LoRA says of it."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from .adapters import save_lora
from .flux_lora import FluxLora
from .lora_file import LoraTensors, lora_facts

_OF_BASE = ("modelspec.architecture", "ss_sd_model_name", "ss_base_model_version")
_HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
_PEFT = "lora_adapter_metadata"
"""diffusers' metadata with alphas: it refuses a file that has them as tensors too."""


def resized_metadata(metadata: Mapping[str, str], lora: FluxLora) -> dict[str, str]:
    """The metadata of a LoRA with the rank and alpha of what `resized` made of it: those of the
    module with the highest rank. What else it says of the training stays."""
    modules = [adapter.parts for adapter in (*lora.adapters, *lora.text)]
    if not modules:
        return dict(metadata)
    highest = max(modules, key=lambda parts: len(parts["down"]))
    rank, alpha = str(len(highest["down"])), f"{highest['alpha'].item():g}"
    news = {"ss_network_dim": rank, "ss_network_alpha": alpha}
    said = {key: value for key, value in news.items() if key in metadata}
    return {**metadata, **said, "atelier.rank": rank, "atelier.alpha": alpha}


def merged_metadata(loras: Sequence[tuple[LoraTensors, float]]) -> dict[str, str]:
    """What is known of the sum of LoRAs with their weights, in the modelspec convention; of the
    models they were trained on, what all say alike."""
    facts = [lora_facts(lora) for lora, _ in loras]
    words = dict.fromkeys(word for fact in facts for word in fact.trigger_words)
    formats = {fact.base_format for fact in facts}
    metadata = {
        "modelspec.merged_from": ", ".join(lora.name for lora, _ in loras),
        "atelier.merged": json.dumps([[lora.name, weight] for lora, weight in loras]),
    }
    for key in _OF_BASE:
        said = {lora.metadata.get(key) for lora, _ in loras}
        if len(said) == 1 and (value := said.pop()):
            metadata[key] = value
    if words:
        metadata["modelspec.trigger_phrase"] = ", ".join(words)
    if len(formats) == 1 and (format := formats.pop()):
        metadata["atelier.base_format"] = format
    return metadata


def different_bases(loras: Sequence[LoraTensors]) -> list[str]:
    """The architectures of the models that LoRAs were trained on, or else their files, if some
    that name theirs differ."""
    for key in _OF_BASE[:2]:
        said = dict.fromkeys(lora.metadata[key] for lora in loras if lora.metadata.get(key))
        if len(said) > 1:
            return [*said]
    return []


def save_export(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a LoRA file with metadata in the modelspec convention: what `metadata` holds, the date,
    and the SHA-256 of the tensors' bytes.

    Raises:
        ValueError: if a value is not finite, or the disk refuses.
    """
    from safetensors.torch import save

    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    body = save(whole)
    digest = hashlib.sha256(body[8 + int.from_bytes(body[:8], "little") :]).hexdigest()
    now = datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0)
    kept = {key: value for key, value in metadata.items() if key not in (*_HASHES, _PEFT, "format")}
    save_lora(
        path,
        whole,
        {
            **kept,
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.implementation": "https://github.com/black-forest-labs/flux",
            "modelspec.title": path.stem,
            "modelspec.date": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "modelspec.hash_sha256": f"0x{digest}",
        },
    )
