"""Padding of captions that a model does not see: cached beside the embeddings, hidden in a step."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from atelier.trainers.caches import PromptCache
from atelier.trainers.caching import cache_prompts, num_missing, prompt_cache
from atelier.trainers.config import JobSettings, Length, TrainSettings
from atelier.trainers.data import TrainingData
from atelier.trainers.evaluate import held_out_loss, predict_by
from atelier.trainers.flux import build_transformer, velocity
from atelier.trainers.load import load_flux
from atelier.trainers.loop import open_run, train
from atelier.trainers.speed_settings import SpeedSettings, TreadRoute
from flux_files import write_flux
from torch import Tensor
from training import CONTEXT, TEXT_TOKENS, VECTOR, training_data

SIGMA = torch.tensor([0.6, 0.2])
LENGTHS = (3, 7)


@pytest.fixture(scope="module")
def flux_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_flux(tmp_path_factory.mktemp("flux") / "flux.safetensors", depth=2, depth_single=2)


def test_hidden_padding_is_as_if_it_were_not_there(flux_file: Path) -> None:
    """Text tokens have no positions, so a mask and a shorter text are the same; each of a batch."""
    loaded = load_flux(flux_file, format="bf16")
    transformer = build_transformer(loaded.store, loaded.config, torch.float32)
    generator = torch.Generator().manual_seed(0)
    given = {
        "latents": torch.randn(2, 16, 8, 4, generator=generator),
        "prompt_embeds": torch.randn(2, TEXT_TOKENS, CONTEXT, generator=generator),
        "pooled": torch.randn(2, VECTOR, generator=generator),
        "reference": torch.randn(2, 16, 4, 8, generator=generator),
    }
    mask = torch.arange(TEXT_TOKENS) < torch.tensor(LENGTHS)[:, None]
    with torch.no_grad():
        found = velocity(
            transformer, **given, sigma=SIGMA, guidance=2.0, text_mask=mask.to(torch.uint8)
        )
        whole = velocity(transformer, **given, sigma=SIGMA, guidance=2.0)
        for index, length in enumerate(LENGTHS):
            one = {name: tensor[index : index + 1] for name, tensor in given.items()}
            one["prompt_embeds"] = one["prompt_embeds"][:, :length]
            short = velocity(transformer, **one, sigma=SIGMA[index : index + 1], guidance=2.0)
            assert torch.max(torch.abs(found[index] - short[0])) <= 1e-5
            assert torch.max(torch.abs(found[index] - whole[index])) > 1e-3


def encode(texts: list[str]) -> tuple[Tensor, Tensor]:
    """Stands for text encoders."""
    ones = torch.tensor([float(len(text)) for text in texts])
    return ones[:, None, None].expand(-1, 6, 4).clone(), ones[:, None].expand(-1, 2).clone()


def mask(texts: list[str]) -> Tensor:
    """Stands for a tokenizer of one token a word, and one for the end."""
    counts = torch.tensor([len(text.split()) + 1 for text in texts])
    return (torch.arange(6) < counts[:, None]).to(torch.uint8)


def test_masks_come_beside_embeddings_that_are_cached_already(tmp_path: Path) -> None:
    texts = ["a cat", "a small dog"]
    plain = cache_prompts(texts, encode, "clip", 6, tmp_path)

    def refuse(_: list[str]) -> tuple[Tensor, Tensor]:
        raise AssertionError("the embeddings are there")

    masked = cache_prompts(texts, refuse, "clip", 6, tmp_path, mask=mask)
    assert [entry.key for entry in masked.entries] == [entry.key for entry in plain.entries]
    assert masked.load("a small dog").mask.tolist() == [1, 1, 1, 1, 0, 0]  # pyright: ignore[reportOptionalMemberAccess]
    assert masked.load("").mask.tolist() == [1, 0, 0, 0, 0, 0]  # pyright: ignore[reportOptionalMemberAccess]
    assert plain.load("a cat").mask is None
    assert masked.fingerprint() != plain.fingerprint()
    assert PromptCache.from_json(masked.to_json()) == masked


def test_a_mask_that_is_missing_is_known(tmp_path: Path) -> None:
    cache_prompts(["a cat"], encode, "clip", 6, tmp_path)
    wanted = prompt_cache(["a cat"], "clip", 6, tmp_path, is_masked=True)
    assert num_missing(wanted) == 2  # and that of the empty text
    with pytest.raises(ValueError, match="is missing or damaged"):
        wanted.require(["a cat"])


def cut(data: TrainingData, folder: Path, length: int) -> TrainingData:
    """The same captions of `length` tokens, as they are in a cache."""
    texts = {entry.text: data.prompts.load(entry.text) for entry in data.prompts.entries}

    def embeds(some: list[str]) -> tuple[Tensor, Tensor]:
        of = [texts.get(text, texts["caption 0"]) for text in some]
        return (
            torch.stack([one.prompt_embeds[:length] for one in of]),
            torch.stack([one.pooled for one in of]),
        )

    return dataclasses.replace(data, prompts=cache_prompts(texts, embeds, "x", length, folder))


def hidden(data: TrainingData, folder: Path, length: int) -> TrainingData:
    """The same captions with all behind the first `length` tokens hidden."""
    whole = cut(data, folder, TEXT_TOKENS)

    def first(texts: list[str]) -> Tensor:
        return (torch.arange(TEXT_TOKENS) < length).to(torch.uint8).expand(len(texts), -1)

    texts = [entry.text for entry in whole.prompts.entries]
    cache = cache_prompts(texts, encode, "x", TEXT_TOKENS, folder, mask=first)
    return dataclasses.replace(data, prompts=cache)


ROUTED = SpeedSettings(
    tread=(TreadRoute(selection_ratio=0.5, start_layer=1, end_layer=2),), checkpointing="interval"
)


@pytest.mark.parametrize("speed", [SpeedSettings(), ROUTED], ids=["all tokens", "TREAD"])
def test_a_training_with_hidden_padding_is_one_on_shorter_captions(
    flux_file: Path, tmp_path: Path, speed: SpeedSettings
) -> None:
    """From the caches through some steps, and the loss on held out pictures. A route leads through
    double and single blocks, and takes out image tokens only."""
    data = training_data(tmp_path / "caches")
    base = load_flux(flux_file, format="bf16")
    job = JobSettings(
        name="masked",
        length=Length(amount=2),
        train=TrainSettings(
            compute_dtype="fp32",
            gradient_accumulation=1,
            batch_size=2,
            learning_rate=1e-2,
            speed=speed,
        ),
    )
    network = build_transformer(base.store, base.config, torch.float32)
    predict = predict_by(network, guidance=1.0, dtype=torch.float32)
    losses, measured = [], []
    for make in (hidden, cut):
        made = make(data, tmp_path / make.__name__, 5)
        losses.append(train(open_run(tmp_path, job, base, made), base, made, job).losses)
        measured.append(held_out_loss(predict, made, device=torch.device("cpu")))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert measured[0] == pytest.approx(measured[1], rel=1e-5)
    whole = cut(data, tmp_path / "whole", TEXT_TOKENS)
    assert abs(held_out_loss(predict, whole, device=torch.device("cpu")) - measured[0]) > 1e-4
