"""Which blocks are computed again in backward: never what comes out, only how often they run."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
import torch
from atelier.trainers import loop
from atelier.trainers.adapters import attach_lora
from atelier.trainers.blocks import BlockRunner
from atelier.trainers.flux import FluxConfig, build_transformer, velocity
from atelier.trainers.load import LoadedFlux, load_flux
from atelier.trainers.loop import open_run, train
from atelier.trainers.lora_settings import LoraSettings
from atelier.trainers.memory import Workload, estimate_training, most_kept_blocks
from atelier.trainers.segments import segments_of, without_effect
from atelier.trainers.speed_settings import SpeedSettings, TreadRoute
from flux_files import flux_shapes, write_flux
from runs import Stop, assert_same_checkpoint, job, stop_before
from torch import Tensor
from training import training_data

SIZES = {"depth": 1, "depth_single": 4}
NUM_BLOCKS = 5
SELECTIVE = SpeedSettings(checkpointing="selective")
ROUTES = (TreadRoute(selection_ratio=0.5, start_layer=1, end_layer=-2),)


def interval(length: int) -> SpeedSettings:
    return SpeedSettings(checkpointing="interval", checkpointing_interval=length)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> LoadedFlux:
    path = write_flux(tmp_path_factory.mktemp("flux") / "flux.safetensors", **SIZES)
    return load_flux(path, format="bf16")


class Training:
    """A step of the training face that counts how often each block runs."""

    def __init__(self, base: LoadedFlux, speed: SpeedSettings, kept_blocks: int = 0) -> None:
        self.base = base
        self.transformer = build_transformer(base.store, base.config, torch.float32).train()
        self.lora = attach_lora(self.transformer, LoraSettings(), seed=0)
        segments = segments_of(
            speed, NUM_BLOCKS, gradient_checkpointing=True, kept_blocks=kept_blocks
        )
        BlockRunner(self.transformer, segments)
        self.runs: Counter[int] = Counter()
        blocks = [*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks]
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda *_, n=number: self.runs.update([n]))

    def gradients(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(3)
        output = velocity(
            self.transformer,
            torch.randn(1, 16, 4, 4, generator=generator),
            sigma=torch.tensor([0.5]),
            prompt_embeds=torch.randn(1, 6, self.base.config.context_dim, generator=generator),
            pooled=torch.randn(1, self.base.config.vector_dim, generator=generator),
            guidance=1.0,
        )
        output.square().mean().backward()
        return {name: p.grad for name, p in self.lora.parameters.items()}  # pyright: ignore


@pytest.mark.parametrize(
    ("speed", "kept", "once"),
    [
        (SpeedSettings(), 0, set()),
        (SpeedSettings(), 5, set()),
        (interval(2), 0, set()),
        (interval(9), 0, set()),
        (SELECTIVE, 0, set()),
        (SELECTIVE, 2, {0, 1}),
        (SELECTIVE, 5, {0, 1, 2, 3, 4}),
    ],
    ids=str,
)
def test_gradients_are_those_without_checkpointing(
    base: LoadedFlux, plain: dict[str, Tensor], speed: SpeedSettings, kept: int, once: set[int]
) -> None:
    training = Training(base, speed, kept)
    found = training.gradients()
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    assert training.runs == {number: 1 if number in once else 2 for number in range(NUM_BLOCKS)}


@pytest.fixture(scope="module")
def plain(base: LoadedFlux) -> dict[str, Tensor]:
    """Gradients without any runner."""
    training = Training(base, SELECTIVE)
    training.transformer.disable_gradient_checkpointing()
    found = training.gradients()
    assert set(training.runs.values()) == {1}
    return found


@pytest.mark.parametrize(
    ("speed", "lengths"),
    [
        (SpeedSettings(), [1] * 5),
        (interval(2), [2, 2, 1]),
        (interval(50), [5]),
        (dataclasses.replace(interval(2), tread=ROUTES), [1, 2, 1, 1]),
    ],
    ids=str,
)
def test_blocks_in_a_row_are_one_unless_a_route_begins_or_ends(
    speed: SpeedSettings, lengths: list[int]
) -> None:
    segments = segments_of(speed, NUM_BLOCKS, gradient_checkpointing=True)
    assert [segment.stop - segment.start for segment in segments] == lengths
    assert [segment.start for segment in segments] == [
        sum(lengths[:n]) for n in range(len(lengths))
    ]


CONFIG = FluxConfig.from_shapes(flux_shapes(width=256, context=128, vector=64, **SIZES))
WORK = Workload(
    width=256,
    height=256,
    prompt_length=77,
    batch_size=1,
    lora=LoraSettings(),
    dtype=torch.bfloat16,
    gradient_checkpointing=True,
    accumulates=False,
    speed=SELECTIVE,
)


def needed(kept: int) -> int:
    return estimate_training(
        CONFIG, "nf4", dataclasses.replace(WORK, kept_blocks=kept)
    ).beside_weights


def test_as_many_blocks_are_kept_as_the_free_bytes_allow() -> None:
    sizes = [needed(kept) for kept in range(NUM_BLOCKS + 1)]
    assert sizes[:-1] == sorted(sizes[:-1])
    assert sizes[-1] > 1.5 * sizes[0]
    for kept in (1, 3):
        free = (sizes[kept] + sizes[kept + 1]) / 2 / 0.9  # a tenth is for gaps
        assert most_kept_blocks(CONFIG, "nf4", WORK, free) == kept
    assert most_kept_blocks(CONFIG, "nf4", WORK, 0) == 0
    assert most_kept_blocks(CONFIG, "nf4", WORK, 10**12) == NUM_BLOCKS
    off = dataclasses.replace(WORK, gradient_checkpointing=False)
    assert most_kept_blocks(CONFIG, "nf4", off, 10**12) == 0


@pytest.mark.parametrize("speed", [SELECTIVE, SpeedSettings(tread=ROUTES)], ids=["free", "tread"])
def test_a_run_goes_on_to_the_same_bits_with_another_amount_of_free_memory(
    base: LoadedFlux, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, speed: SpeedSettings
) -> None:
    """Its losses and its checkpoint; and TREAD's tokens follow from the micro-step alone."""
    kept, free = [], iter([10**12, 0, 10**12])
    set_kept = loop.TrainState.keep_activations
    monkeypatch.setattr(loop, "free_bytes", lambda _: next(free))
    monkeypatch.setattr(
        loop.TrainState,
        "keep_activations",
        lambda state, count: (kept.append(count), set_kept(state, count)),
    )
    data = training_data(tmp_path / "data")
    settings = job(2, gradient_checkpointing=True, speed=speed)
    whole = open_run(tmp_path / "whole", settings, base, data)
    expected = train(whole, base, data, settings)
    halved = open_run(tmp_path / "halved", settings, base, data)
    with pytest.raises(Stop):
        train(halved, base, data, settings, stop_before(1))
    found = train(halved, base, data, settings)
    assert found.losses == expected.losses
    assert_same_checkpoint(halved.load(2), whole.load(2))
    assert kept == ([NUM_BLOCKS, 0, NUM_BLOCKS] if speed == SELECTIVE else [0, 0, 0])


def test_a_way_of_checkpointing_without_checkpointing_is_told() -> None:
    assert without_effect(SELECTIVE, gradient_checkpointing=True) == []
    assert without_effect(SpeedSettings(), gradient_checkpointing=False) == []
    (line,) = without_effect(interval(3), gradient_checkpointing=False)
    assert "'interval' of Speed Settings has no effect" in line


def test_an_interval_without_its_way_of_checkpointing_is_told() -> None:
    assert without_effect(interval(3), gradient_checkpointing=True) == []
    (line,) = without_effect(SpeedSettings(checkpointing_interval=3), gradient_checkpointing=True)
    assert line.startswith("The setting checkpointing_interval has no effect: ")
