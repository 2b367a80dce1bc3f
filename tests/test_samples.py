"""Which text and which picture a sample of a micro-step trains."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
import torch
from atelier.trainers.caches import PromptEntry
from atelier.trainers.flow import seeded
from atelier.trainers.loop import TrainingData
from scipy.stats import chisquare
from training import CONTEXT, TEXT_TOKENS, VECTOR, training_data, write_entries

DRAWS = 4000


@pytest.fixture
def data(tmp_path: Path) -> TrainingData:
    """One entry of two texts and a mirror image, whose latents are the picture's reversed."""
    data = training_data(tmp_path, ((64, 64),))
    (entry,) = data.latents.entries
    mirrored = {"mean": data.latents.load(entry.name).mean.flip(-1), "std": torch.zeros(16, 8, 8)}
    text = {"prompt_embeds": torch.zeros(TEXT_TOKENS, CONTEXT), "pooled": torch.zeros(VECTOR)}
    write_entries(tmp_path, {"mirrored": mirrored, "no text": text, "other text": text})
    more = (PromptEntry(text="", key="no text"), PromptEntry(text="other", key="other text"))
    prompts = dataclasses.replace(data.prompts, entries=(*data.prompts.entries, *more))
    entry = dataclasses.replace(
        entry,
        keys=(entry.name, "mirrored"),
        texts=(("caption 0",), ("other", "caption 0")),
        dropout=0.2,
    )
    latents = dataclasses.replace(data.latents, entries=(entry,))
    return TrainingData(latents=latents, prompts=prompts)


def test_pictures_and_their_mirror_images_are_equally_likely(data: TrainingData) -> None:
    entry = data.latents.entries[0]
    counts = Counter(sample.key for sample in data.choose([entry] * DRAWS, seeded(0, "choice", 0)))
    assert counts.keys() == set(entry.keys)
    assert chisquare([*counts.values()]).pvalue > 0.001


def test_texts_have_their_shares_beside_the_dropout(data: TrainingData) -> None:
    entry = data.latents.entries[0]
    samples = data.choose([entry] * DRAWS, seeded(0, "choice", 0))
    counts = Counter(sample.text for sample in samples)
    shares = {"": 0.2, "other": 0.8 / 4, "caption 0": 0.8 * 3 / 4}
    assert counts.keys() == shares.keys()
    expected = [DRAWS * share for share in shares.values()]
    assert chisquare([counts[text] for text in shares], expected).pvalue > 0.001


def test_a_batch_has_the_tensors_of_what_was_chosen(data: TrainingData) -> None:
    entry = data.latents.entries[0]
    samples = data.choose([entry] * 8, seeded(0, "choice", 0))
    assert {sample.key for sample in samples} == set(entry.keys)
    latents, embeds, pooled = data.load(samples, torch.device("cpu"), seeded(0, "noise", 0))
    for index, sample in enumerate(samples):
        mean, text = data.latents.load(sample.key).mean, data.prompts.load(sample.text)
        assert (latents[index] - mean).abs().max() < 1  # the deviation is 0.1, or 0
        assert torch.equal(embeds[index], text.prompt_embeds)
        assert torch.equal(pooled[index], text.pooled)


def test_choices_are_those_of_their_micro_step(data: TrainingData) -> None:
    batch = [data.latents.entries[0]] * 20
    first = data.choose(batch, seeded(1, "choice", 7))
    assert data.choose(batch, seeded(1, "choice", 7)) == first
    assert data.choose(batch, seeded(1, "choice", 8)) != first
