"""Masks, class pictures and class captions train as in a plain loop, and nothing is overlooked."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from atelier.trainers.adapters import attach_lora
from atelier.trainers.caches import LatentSubset, PromptEntry, digest
from atelier.trainers.data import Sample, TrainingData
from atelier.trainers.flux import build_transformer
from atelier.trainers.load import LoadedFlux, load_flux
from atelier.trainers.loop import open_run, train, workload
from atelier.trainers.optimizer_settings import OptimizerSettings
from atelier.trainers.preservation import (
    class_captions,
    mask_weights,
    require_class_captions,
    with_class_captions,
    without_effect,
)
from atelier.trainers.preservation_settings import PreservationSettings
from atelier.trainers.speed_settings import SpeedSettings, routes_from_text
from bitsandbytes.optim import AdamW8bit
from dense import dense_transformer, stored_tensors
from flux_files import write_flux
from plain_loop import plain_loop
from runs import LORA, Stop, assert_same_checkpoint, assert_same_lora, job, stop_before
from training import CONTEXT, TEXT_TOKENS, VECTOR, training_data, write_entries

DOG = {"trigger": "caption", "class_word": "dog"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> LoadedFlux:
    path = write_flux(tmp_path_factory.mktemp("flux") / "flux.safetensors")
    return load_flux(path, format="bf16")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    """Two pictures to learn, one of them with a mask and one without the trigger, and one of the
    class; the captions also with the class word."""
    folder = tmp_path_factory.mktemp("caches")
    data = training_data(folder, ((64, 64),) * 3)
    generator = torch.Generator().manual_seed(1)
    embeds = {
        "prompt_embeds": torch.randn(TEXT_TOKENS, CONTEXT, generator=generator),
        "pooled": torch.randn(VECTOR, generator=generator),
    }
    mask = torch.rand(8, 8, generator=generator) * (torch.arange(8) > 3)
    write_entries(folder, {"mask": {"mask": mask}, "dog": embeds})
    first, second, third = data.latents.entries
    own = data.prompts.entries[1]
    texts = (
        *data.prompts.entries,
        PromptEntry(text="dog 0", key="dog"),
        PromptEntry(text="another", key=own.key),
    )
    subsets = (
        LatentSubset(
            name="taught",
            entries=(
                dataclasses.replace(first, masks=("mask",)),
                dataclasses.replace(second, texts=(("another",),)),
            ),
        ),
        LatentSubset(
            name="dogs", entries=(dataclasses.replace(third, texts=(("another",),), is_prior=True),)
        ),
    )
    return TrainingData(
        latents=dataclasses.replace(data.latents, subsets=subsets),
        prompts=dataclasses.replace(data.prompts, entries=texts),
    )


METHODS = {
    "unmasked weight": {"unmasked_weight": 0.3},
    "normalized masks": {"normalize_masks": True},
    "prior weight": {"prior_weight": 0.25},
    "class captions": {**DOG, "class_weight": 2.0},
    "all": {"unmasked_weight": 0.1, "normalize_masks": True, "prior_weight": 3.0, **DOG},
}


@pytest.mark.parametrize("name", METHODS)
def test_losses_and_gradients_are_those_of_a_plain_loop(
    tmp_path: Path, base: LoadedFlux, data: TrainingData, name: str
) -> None:
    # Batches of two hold a caption with the trigger and one without.
    batch = {"gradient_accumulation": 3}
    if name == "all":
        batch = {"batch_size": 2, "gradient_checkpointing": True}
    kept, clipped = PreservationSettings(**METHODS[name]), OptimizerSettings(clip_limit=0.05)
    settings = job(5, learning_rate=1e-3, optimizer=clipped, preservation=kept, **batch)
    transformer = build_transformer(base.store, base.config, torch.float32)
    start = attach_lora(transformer, LORA, seed=settings.train.seed).state()
    losses, norms = plain_loop(
        dense_transformer(stored_tensors("bf16")), data, settings, start, AdamW8bit
    )
    run = open_run(tmp_path, settings, base, data)
    found = train(run, base, data, settings).losses
    torch.testing.assert_close(found, losses, rtol=1e-5, atol=0)
    found_norms = [line["grad_norm"] for line in run.metrics()]
    torch.testing.assert_close(found_norms, norms, rtol=1e-3, atol=0)


def test_the_parts_of_a_loss_are_in_the_metrics(
    tmp_path: Path, base: LoadedFlux, data: TrainingData
) -> None:
    """The first step, whose LoRA does nothing yet: class captions give what they gave."""
    kept = PreservationSettings(prior_weight=0.5, class_weight=7, **DOG)
    settings = job(2, gradient_accumulation=3, preservation=kept)
    run = open_run(tmp_path, settings, base, data)
    train(run, base, data, settings)
    plain = job(2, gradient_accumulation=3, preservation=PreservationSettings(prior_weight=1.5))
    other = open_run(tmp_path, plain, base, data)
    train(other, base, data, plain)
    (first, second), (heavy, _) = run.metrics(), other.metrics()
    assert first["class_loss"] == 0 < second["class_loss"]
    # The one class picture of three counts 1.5 in place of 0.5.
    assert heavy["loss"] - first["loss"] == pytest.approx(first["prior_loss"] / 3)
    assert "class_loss" not in heavy


def test_a_resumed_run_with_all_of_it_ends_as_an_unbroken_one(
    tmp_path: Path, base: LoadedFlux, data: TrainingData
) -> None:
    settings = job(4, preservation=PreservationSettings(**METHODS["all"]))
    whole_run = open_run(tmp_path / "whole", settings, base, data)
    whole = train(whole_run, base, data, settings)
    halved = open_run(tmp_path / "halved", settings, base, data)
    with pytest.raises(Stop):
        train(halved, base, data, settings, stop_before(2))
    resumed = train(halved, base, data, settings)
    assert_same_lora(resumed, whole)
    assert_same_checkpoint(halved.load(4), whole_run.load(4))


def test_class_captions_keep_what_the_class_looked_like(
    tmp_path: Path, base: LoadedFlux, data: TrainingData
) -> None:
    """With them the LoRA moves the answer to the class caption less, with the trigger as before."""

    def last_drift(class_weight: float) -> float:
        kept = PreservationSettings(class_weight=class_weight, **DOG)
        only = LatentSubset(name="taught", entries=data.latents.entries[:1])
        taught = dataclasses.replace(
            data, latents=dataclasses.replace(data.latents, subsets=(only,))
        )
        settings = job(30, preservation=kept)
        run = open_run(tmp_path, settings, base, taught)
        train(run, base, taught, settings)
        return sum(line["class_loss"] for line in run.metrics()[-10:])

    assert last_drift(10.0) < 0.5 * last_drift(1e-6)


def test_weights_of_masks() -> None:
    """By hand: black, grey and white; an all black mask stays one."""
    masks = torch.tensor([[[[0.0, 0.25], [0.5, 1.0]]], [[[0.0, 0.0], [0.0, 0.0]]]])
    kept = PreservationSettings(unmasked_weight=0.3)
    expected = [[[[0.3, 0.3], [0.5, 1.0]]], [[[0.3, 0.3], [0.3, 0.3]]]]
    torch.testing.assert_close(mask_weights(kept, masks), torch.tensor(expected))
    alike = mask_weights(PreservationSettings(normalize_masks=True), masks)
    assert alike is not None
    assert alike.mean((1, 2, 3)).tolist() == pytest.approx([1, 0])
    assert mask_weights(kept, None) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a photo of sks dog on a beach", "a photo of dog on a beach"),
        ("sks dog, sks dog", "dog, dog"),
        ("a dog on a beach", None),
        ("", None),
    ],
)
def test_the_class_word_takes_the_place_of_the_trigger(text: str, expected: str | None) -> None:
    kept = PreservationSettings(trigger=" sks dog", class_word="dog ")
    assert kept.class_caption(text) == expected


def test_the_estimate_of_class_captions_has_no_route(base: LoadedFlux, data: TrainingData) -> None:
    """They are computed with all tokens, which is the most that a step takes."""
    routed = SpeedSettings(tread=routes_from_text("0.5: 0 to -1"))
    for kept, expected in ((PreservationSettings(**DOG), ()), (None, routed.tread)):
        settings = job(speed=routed, preservation=kept or PreservationSettings())
        assert workload(settings, base, data, torch.device("cpu")).speed.tread == expected


def test_a_trigger_within_a_word_is_none() -> None:
    kept = PreservationSettings(trigger="sks", class_word="dog")
    assert kept.class_caption("she asks for tasks, sks.") == "she asks for tasks, dog."
    assert kept.class_caption("tasks") is None
    assert kept.class_caption("一只sks在奔跑") == "一只dog在奔跑"


def test_texts_to_encode_are_all_captions_and_those_of_the_class_once() -> None:
    kept = PreservationSettings(trigger="sks", class_word="dog")
    texts = with_class_captions(kept, ["sks", "a sks", "a dog", "a cat"])
    assert texts == ("sks", "a sks", "a dog", "a cat", "dog")
    assert with_class_captions(PreservationSettings(), ["sks"]) == ("sks",)


def test_a_batch_without_the_trigger_has_no_class_captions() -> None:
    kept = PreservationSettings(trigger="sks", class_word="dog")
    found = class_captions(kept, [Sample("a", "sks"), Sample("b", "")])
    assert found is not None
    assert (found.texts, found.rows.tolist()) == (["dog", ""], [1, 0])
    assert class_captions(kept, [Sample("a", ""), Sample("b", "a cat")]) is None


BAD = {
    "unmasked_weight must be between 0 and 1, got 1.5": {"unmasked_weight": 1.5},
    "prior_weight must be above 0, got 0": {"prior_weight": 0},
    "class_weight must be above 0, got inf": {"class_weight": float("inf")},
    "got 'sks' and ''. Write both": {"trigger": "sks"},
    "got ' ' and 'dog'. Write both": {"trigger": " ", "class_word": "dog"},
    "'a sks' holds the trigger 'sks'": {"trigger": "sks", "class_word": "a sks"},
}


@pytest.mark.parametrize("sentence", BAD)
def test_bad_settings_are_one_sentence(sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        PreservationSettings(**BAD[sentence])


def test_class_captions_that_are_not_there_are_told_before_the_training(
    tmp_path: Path, base: LoadedFlux, data: TrainingData
) -> None:
    kept = PreservationSettings(trigger="caption", class_word="cat")
    settings = job(1, preservation=kept)
    with pytest.raises(ValueError, match=r"'cat 0' is not encoded\. Connect Preservation Set"):
        train(open_run(tmp_path, settings, base, data), base, data, settings)
    assert not any(tmp_path.iterdir())
    with pytest.raises(ValueError, match="No caption holds the trigger 'sks'"):
        require_class_captions(PreservationSettings(trigger="sks", class_word="dog"), data)


def test_settings_without_effect_are_told(tmp_path: Path, data: TrainingData) -> None:
    plain = training_data(tmp_path)
    kept = PreservationSettings(
        unmasked_weight=0.5, normalize_masks=True, prior_weight=2, class_weight=2
    )
    told = without_effect(kept, plain)
    for line, name in zip(
        told, ("unmasked_weight", "normalize_masks", "prior_weight", "class_weight"), strict=True
    ):
        assert line.startswith(f"The setting {name} has no effect: ")
    assert without_effect(dataclasses.replace(kept, **DOG), data) == []
    (masks,) = without_effect(PreservationSettings(unmasked_weight=1), data)
    assert masks.startswith("The masks have no effect")
    assert without_effect(PreservationSettings(), plain) == []


def test_class_pictures_are_a_run_of_their_own_and_others_are_found_again(
    data: TrainingData,
) -> None:
    taught, dogs = data.latents.subsets
    learned = LatentSubset(
        name="dogs", entries=tuple(dataclasses.replace(e, is_prior=False) for e in dogs.entries)
    )
    assert learned.fingerprint() != dogs.fingerprint()
    # That of the same caches before there were class pictures.
    old = [[*e.keys, *e.masks, *e.texts, e.repeats, e.dropout, False] for e in taught.entries]
    assert taught.fingerprint() == digest([sorted(old), (0.0, 0)])
