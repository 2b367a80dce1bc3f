"""Model cards, read back by the hub's own client."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from atelier.trainers.adapters import lora_metadata
from atelier.trainers.config import JobSettings, TrainSettings, to_json
from atelier.trainers.load import load_flux
from atelier.trainers.lora_file import LoraFacts, LoraTensors, lora_facts
from atelier.trainers.lora_settings import LoraSettings
from atelier.trainers.model_card import (
    DEV,
    SCHNELL,
    Card,
    Sample,
    base_model_of,
    training_settings,
)
from flux_files import write_flux
from huggingface_hub import ModelCard

FACTS = LoraFacts(rank=8, alpha=4.0, steps=700, base_format="nf4", guidance=1.0)
PROMPT = 'a "cat": $x, 50% 猫\u0085 \\ # [😀]'


def card(**changed: Any) -> Card:
    values = {"repo_id": "me/cats", "file": "cats-1.safetensors", "facts": FACTS}
    return Card(**{**values, "base_model": DEV, **changed})


def test_the_hub_reads_the_header_of_a_card() -> None:
    samples = [Sample("images/1.png", PROMPT), Sample("images/2.png", "")]
    text = card(samples=samples, trigger_words=("sks", "ohwx: cat")).markdown()
    data = ModelCard(text).data
    assert data.base_model == DEV
    assert data.license == "other"
    assert data.license_name == "flux-1-dev-non-commercial-license"
    assert data.license_link == f"https://huggingface.co/{DEV}/blob/main/LICENSE.md"
    assert data.instance_prompt == "sks, ohwx: cat"
    assert data.widget == [
        {"text": PROMPT, "output": {"url": "images/1.png"}},
        {"text": "-", "output": {"url": "images/2.png"}},
    ]
    assert {"lora", "flux", "text-to-image"} <= set(data.tags)
    assert "| Rank | 8 |" in text
    assert "| Alpha | 4 |" in text
    assert "may not be used for commercial purposes" in text


def test_the_example_of_a_card_is_python() -> None:
    text = card(samples=[Sample("images/1.png", PROMPT)]).markdown()
    code = text.partition("```python\n")[2].partition("```")[0]
    compile(code, "card", "exec")
    assert 'load_lora_weights("me/cats", weight_name="cats-1.safetensors")' in code
    assert repr(PROMPT) in code


def test_the_licence_is_that_of_the_base() -> None:
    schnell = card(base_model=SCHNELL)
    assert ModelCard(schnell.markdown()).data.license == "apache-2.0"
    assert "Apache License 2.0" in schnell.markdown()
    other = card(base_model="somebody/flux")
    assert ModelCard(other.markdown()).data.license is None
    assert "is a derivative of somebody/flux: what it may be used for" in other.markdown()


def test_what_is_not_known_is_left_out() -> None:
    text = card(facts=LoraFacts()).markdown()
    assert "## Training" not in text
    assert "<Gallery />" not in text
    assert "## Trigger words" not in text
    assert "widget" not in ModelCard(text).data.to_dict()
    assert "\n# cats-1\n\nMine.\n\nA LoRA" in card(description=" Mine.\n").markdown()


BASES = {
    "flux-1-dev/lora": DEV,
    "flux-1-schnell/lora": SCHNELL,
    "flux1-kontext-dev.safetensors": "black-forest-labs/FLUX.1-Kontext-dev",
    "black-forest-labs/FLUX.1-Krea-dev": "black-forest-labs/FLUX.1-Krea-dev",
    "flux2-dev.safetensors": "",
    "stable-diffusion-xl-v1-base/lora": "",
}


@pytest.mark.parametrize("name", BASES)
def test_the_base_is_told_by_its_name(name: str) -> None:
    assert base_model_of(LoraFacts(architecture=name)) == BASES[name]
    assert base_model_of(LoraFacts(base_name=name)) == BASES[name]


def test_a_file_of_ours_tells_how_it_was_trained(tmp_path: Path) -> None:
    job = JobSettings(lora=LoraSettings(rank=8), train=TrainSettings(learning_rate=2e-4))
    base = load_flux(write_flux(tmp_path / "flux.safetensors"), format="nf4")
    metadata = lora_metadata(name="cats", settings=job.lora, base=base, steps=3, run=to_json(job))
    assert json.loads(metadata["atelier.settings"])["train"]["learning_rate"] == 2e-4
    facts = lora_facts(LoraTensors({}, metadata=metadata))
    assert base_model_of(facts) == DEV
    settings = training_settings(metadata)
    text = card(facts=facts, settings=settings).markdown()
    for row in ("Rank | 8", "Steps | 3", "Learning rate | 0.0002", "Layers | qlora"):
        assert f"| {row} |" in text


def test_a_base_that_is_no_repository_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^The base model of a card is named .*, got 'flux'"):
        card(base_model="flux")
