"""Which text and which picture a sample of a micro-step trains."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
import torch
from atelier.trainers.caches import PromptEntry
from atelier.trainers.data import TrainingData
from atelier.trainers.flow import seeded
from atelier.trainers.flux import FluxConfig
from atelier.trainers.shards import Shards
from scipy.stats import chisquare
from training import CONTEXT, TEXT_TOKENS, VECTOR, training_data, with_entries, write_entries

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
    latents = with_entries(data.latents, (entry,))
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
    batch = data.load(samples, torch.device("cpu"), seeded(0, "noise", 0))
    assert batch.weights is None
    for index, sample in enumerate(samples):
        mean, text = data.latents.load(sample.key).mean, data.prompts.load(sample.text)
        assert (batch.latents[index] - mean).abs().max() < 1  # the deviation is 0.1, or 0
        assert torch.equal(batch.prompt_embeds[index], text.prompt_embeds)
        assert torch.equal(batch.pooled[index], text.pooled)


def test_a_picture_and_its_mirror_image_have_their_own_masks(
    data: TrainingData, tmp_path: Path
) -> None:
    (entry,) = data.latents.entries
    left = torch.zeros(8, 8)
    left[:, :4] = 1
    write_entries(tmp_path, {"left": {"mask": left}, "right": {"mask": left.flip(1)}})
    masked = dataclasses.replace(entry, masks=("left", "right"))
    samples = data.choose([masked] * 8, seeded(0, "choice", 0))
    assert {(s.key, s.mask) for s in samples} == {(entry.name, "left"), ("mirrored", "right")}
    (plain,) = data.choose([entry], seeded(0, "choice", 0))
    batch = data.load([*samples, plain], torch.device("cpu"), seeded(0, "noise", 0))
    assert batch.weights is not None
    assert batch.weights.shape == (9, 1, 8, 8)
    for weights, sample in zip(batch.weights, samples, strict=False):
        assert torch.equal(weights[0], left if sample.mask == "left" else left.flip(1))
    assert batch.weights[8].eq(1).all()


def test_choices_are_those_of_their_micro_step(data: TrainingData) -> None:
    batch = [data.latents.entries[0]] * 20
    first = data.choose(batch, seeded(1, "choice", 7))
    assert data.choose(batch, seeded(1, "choice", 7)) == first
    assert data.choose(batch, seeded(1, "choice", 8)) != first


CONFIG = FluxConfig(
    hidden_size=128,
    depth=1,
    depth_single=1,
    in_channels=64,
    context_dim=CONTEXT,
    vector_dim=VECTOR,
    guidance=True,
)
LOST = "An entry of the cache .* is missing or damaged"


@pytest.mark.parametrize("name", ["no text", "other text", "mirrored"])
def test_whatever_a_step_may_draw_is_looked_for_before_the_first(
    data: TrainingData, tmp_path: Path, name: str
) -> None:
    data.check_fits(CONFIG)
    entries = {key: Shards(tmp_path).read(key) for key in _keys(data) if key != name}
    Shards(tmp_path).clear()
    write_entries(tmp_path, entries)
    with pytest.raises(ValueError, match=LOST):
        data.check_fits(CONFIG)


def test_the_empty_caption_is_needed_for_dropout_only(data: TrainingData) -> None:
    (entry,) = data.latents.entries
    described = tuple(e for e in data.prompts.entries if e.text)
    prompts = dataclasses.replace(data.prompts, entries=described)
    with pytest.raises(ValueError, match="The caption '' is not in the prompt cache"):
        dataclasses.replace(data, prompts=prompts).check_fits(CONFIG)
    latents = with_entries(data.latents, (dataclasses.replace(entry, dropout=0.0),))
    TrainingData(latents=latents, prompts=prompts).check_fits(CONFIG)


def test_the_check_reads_one_entry_of_each_kind(data: TrainingData, tmp_path: Path) -> None:
    """Damage is found when an entry is read, so a check that read all would find it."""
    unread = "other text"
    tensors = Shards(tmp_path).read(unread)
    everything = {key: Shards(tmp_path).read(key) for key in _keys(data) if key != unread}
    Shards(tmp_path).clear()
    write_entries(tmp_path, everything)
    before = {*tmp_path.glob("*.safetensors")}
    write_entries(tmp_path, {unread: tensors})
    (path,) = {*tmp_path.glob("*.safetensors")} - before
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    data.check_fits(CONFIG)
    with pytest.raises(ValueError, match=LOST):
        Shards(tmp_path).read(unread)


def _keys(data: TrainingData) -> list[str]:
    pictures = [key for entry in data.latents.entries for key in entry.keys]
    return [*pictures, *(entry.key for entry in data.prompts.entries)]
