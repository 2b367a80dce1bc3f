"""The README.md of a LoRA on the Hugging Face Hub: what it is, how it was made, how it is used.

Its header is the hub's metadata of model cards, https://huggingface.co/docs/hub/model-cards; the
card is in English. Nothing here uses the network.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from string import Template
from typing import Any

from .checks import require
from .config import is_hub_id
from .lora_file import LoraFacts

DEV, SCHNELL = "black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell"
_BASES = {
    "schnell": SCHNELL,
    "kontext": "black-forest-labs/FLUX.1-Kontext-dev",
    "krea": "black-forest-labs/FLUX.1-Krea-dev",
    "fill": "black-forest-labs/FLUX.1-Fill-dev",
    "dev": DEV,
}
"""Words in the names of FLUX.1's models; the first that is found decides."""
_LICENCE_FILE = "https://huggingface.co/{}/blob/main/LICENSE.md"

_CARD = Template("""\
---
$header---

# $title
$description
A LoRA for [$base_model](https://huggingface.co/$base_model).
$gallery$trigger$settings
## Use

In ComfyUI, put `$file` into `models/loras` and choose it in a LoRA loader.

With diffusers:

```python
import torch
from diffusers import FluxPipeline

pipeline = FluxPipeline.from_pretrained("$base_model", torch_dtype=torch.bfloat16)
pipeline.load_lora_weights("$repo_id", weight_name="$file")
picture = pipeline($prompt).images[0]
```

$licence
""")
_NON_COMMERCIAL = Template(
    "## Licence\n\nThis LoRA is a derivative of $base_model and falls under the [FLUX.1 [dev] "
    "Non-Commercial License]($link): the weights may not be used for commercial purposes without a "
    "licence from Black Forest Labs."
)
_APACHE = Template(
    "## Licence\n\nThis LoRA is under the Apache License 2.0, as its base $base_model is."
)
_OF_ITS_BASE = Template(
    "## Licence\n\nThis LoRA is a derivative of $base_model: what it may be used for is said by "
    "that model's licence."
)


@dataclass(frozen=True)
class Sample:
    """A picture that the LoRA drew."""

    path: str
    """In the repository."""
    prompt: str
    """May be empty if it is not known."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a model card says."""

    repo_id: str
    file: str
    """Name of the LoRA file in the repository."""
    facts: LoraFacts
    """What the file itself tells."""
    base_model: str
    """The hub's id of the model that it was trained on, such as `DEV`."""
    samples: Sequence[Sample] = ()
    trigger_words: Sequence[str] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    """Further rows of the table of settings."""
    description: str = ""
    """Markdown that stands before everything else; may be empty."""

    def __post_init__(self) -> None:
        require(
            is_hub_id(self.base_model),
            "The base model of a card is named by the owner and the name of its repository, such "
            f"as {DEV}, got {self.base_model!r}.",
        )

    def markdown(self) -> str:
        """The whole README.md."""
        return _CARD.substitute(
            header=_yaml(self._header()),
            title=PurePosixPath(self.file).stem,
            description=f"\n{self.description.strip()}\n" if self.description.strip() else "",
            base_model=self.base_model,
            gallery="\n<Gallery />\n" if self.samples else "",
            trigger=self._trigger(),
            settings=self._settings(),
            file=self.file,
            repo_id=self.repo_id,
            prompt=repr(self._example()),
            licence=self._licence(),
        )

    def _header(self) -> dict[str, Any]:
        header: dict[str, Any] = {
            "base_model": self.base_model,
            "base_model_relation": "adapter",
            **_licence_fields(self.base_model),
            "library_name": "diffusers",
            "pipeline_tag": "text-to-image",
            "tags": ["text-to-image", "lora", "diffusers", "flux", "template:diffusion-lora"],
        }
        if self.trigger_words:
            header["instance_prompt"] = ", ".join(self.trigger_words)
        if self.samples:
            header["widget"] = [
                {"text": sample.prompt or "-", "output": {"url": sample.path}}
                for sample in self.samples
            ]
        return header

    def _trigger(self) -> str:
        if not self.trigger_words:
            return ""
        words = "\n".join(f"- `{word}`" for word in self.trigger_words)
        return f"\n## Trigger words\n\n{words}\n"

    def _settings(self) -> str:
        facts = self.facts
        rows = {
            "Trainer": facts.trainer,
            "Rank": facts.rank,
            "Alpha": facts.alpha,
            "Steps": facts.steps,
            "Guidance while training": facts.guidance,
            "Format of the base model while training": facts.base_format,
            **self.settings,
        }
        known = {name: value for name, value in rows.items() if value is not None}
        lines = [f"| {name} | {_plain(value)} |" for name, value in known.items()]
        return "\n".join(["\n## Training\n\n| | |\n|---|---|", *lines, ""]) if lines else ""

    def _example(self) -> str:
        prompts = [sample.prompt for sample in self.samples if sample.prompt]
        return next(iter([*prompts, *self.trigger_words]), "a photo of a cat")

    def _licence(self) -> str:
        link = _LICENCE_FILE.format(self.base_model)
        text = {"other": _NON_COMMERCIAL, "apache-2.0": _APACHE}.get(
            _licence_fields(self.base_model).get("license", ""), _OF_ITS_BASE
        )
        return text.substitute(base_model=self.base_model, link=link)


def base_model_of(facts: LoraFacts) -> str:
    """The hub's id of the FLUX.1 that a LoRA file names as its base; empty if it names none."""
    name = f"{facts.architecture} {facts.base_name}".lower()
    if not re.search(r"flux[.\-_ ]?1", name):
        return ""
    return next((repository for word, repository in _BASES.items() if word in name), "")


def training_settings(metadata: Mapping[str, str]) -> dict[str, str]:
    """What a file of ours says of its training beyond its facts, by names for readers."""
    settings = json.loads(metadata.get("atelier.settings", "{}"))
    train = {**settings.get("train", {}), **settings.get("lora", {})}
    names = {
        "learning_rate": "Learning rate",
        "batch_size": "Batch size",
        "gradient_accumulation": "Gradient accumulation",
        "targets": "Layers",
    }
    return {name: _plain(train[key]) for key, name in names.items() if key in train}


def _licence_fields(base_model: str) -> dict[str, str]:
    """Of FLUX.1's own repositories; what others allow is not known here."""
    if base_model == SCHNELL:
        return {"license": "apache-2.0"}
    if base_model.startswith("black-forest-labs/FLUX.1-") and base_model.lower().endswith("dev"):
        link = _LICENCE_FILE.format(base_model)
        name = "flux-1-dev-non-commercial-license"
        return {"license": "other", "license_name": name, "license_link": link}
    return {}


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _yaml(values: dict[str, Any]) -> str:
    import yaml  # the hub's client and ComfyUI need it too

    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=10_000)
