"""TREAD against a reference that computes each sample by itself, with plain diffusers blocks."""

from __future__ import annotations

import pytest
import torch
from atelier.trainers.adapters import attach_lora
from atelier.trainers.blocks import BlockRunner
from atelier.trainers.flow import seeded
from atelier.trainers.flux import build_transformer, pack_latents, velocity
from atelier.trainers.load import LoadedFlux, load_flux
from atelier.trainers.lora_settings import LoraSettings
from atelier.trainers.segments import segments_of
from atelier.trainers.speed_settings import SpeedSettings, TreadRoute, routes_from_text
from atelier.trainers.tread import draw_kept, forced_tokens, routes_around
from dense import dense_transformer, stored_tensors
from flux_files import write_flux
from torch import Tensor

SIZES = {"depth": 3, "depth_single": 4}
NUM_BLOCKS = 7
IMAGE, TEXT = 24, 10
"""Tokens."""
ROUTES = {
    "double blocks": ["0.5: 1 to 2"],
    "single blocks": ["0.5: 3 to -2"],
    "both kinds": ["0.6: 1 to -2"],
    "all blocks": ["0.25: 0 to -1"],
    "two routes": ["0.5: 0 to 1", "0.25: 2 to 5"],
}


def settings(*lines: str, **others: object) -> SpeedSettings:
    return SpeedSettings(tread=routes(*lines), **others)  # pyright: ignore[reportArgumentType]


def routes(*lines: str) -> tuple[TreadRoute, ...]:
    return routes_from_text("\n".join(lines))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> LoadedFlux:
    path = write_flux(tmp_path_factory.mktemp("flux") / "flux.safetensors", **SIZES)
    return load_flux(path, format="nf4")


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "latents": torch.randn(2, 16, 8, 12, generator=generator),
        "prompt_embeds": torch.randn(2, TEXT, 128, generator=generator),
        "pooled": torch.randn(2, 64, generator=generator),
        "sigma": torch.tensor([0.7, 0.2]),
    }


def weights() -> Tensor:
    """[2, 1, 8, 12] of latents: the upper left quarter of the first picture, all of the second."""
    mask = torch.ones(2, 1, 8, 12)
    mask[0, :, 4:] = 0
    mask[0, :, :, 6:] = 0
    return mask


class Training:
    """The training face with a LoRA on every layer."""

    def __init__(self, base: LoadedFlux, speed: SpeedSettings, **options: bool | int) -> None:
        self.transformer = build_transformer(base.store, base.config, torch.float32).train()
        self.lora = attach_lora(self.transformer, LoraSettings(targets="all+ffs"), seed=0)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(3)
            for parameter in self.lora.parameters.values():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        options = {"gradient_checkpointing": False, **options}
        segments = segments_of(speed, NUM_BLOCKS, **options)  # pyright: ignore
        self.blocks = BlockRunner(self.transformer, segments)

    def velocity(
        self, forced: Tensor | None = None, micro_step: int = 5, text_mask: Tensor | None = None
    ) -> Tensor:
        with self.blocks.routed(seeded(0, "tread", micro_step), forced):
            return velocity(self.transformer, **inputs(), guidance=1.0, text_mask=text_mask)

    def gradients(self, forced: Tensor | None = None) -> dict[str, Tensor]:
        for parameter in self.lora.parameters.values():
            parameter.grad = None
        self.velocity(forced).square().mean().backward()
        return {name: p.grad for name, p in self.lora.parameters.items()}  # pyright: ignore


class Reference:
    """Plain diffusers with the weights and the LoRA added into them, one sample after the other;
    the tokens of each block and their positions written out."""

    def __init__(self, training: Training) -> None:
        self.network = dense_transformer(stored_tensors("nf4", **SIZES))
        self.factors = {
            name: parameter.detach().clone().requires_grad_()
            for name, parameter in training.lora.parameters.items()
        }
        for name in {name.rpartition(".lora_")[0] for name in self.factors}:
            layer = self.network.get_submodule(name)
            down, up = (self.factors[f"{name}.lora_{part}.weight"] for part in "AB")
            matrix = layer.weight.detach() + up @ down  # alpha is the rank
            del layer.weight
            layer.weight = matrix

    def velocity(self, lines: list[str], kept: list[Tensor]) -> Tensor:
        """Tokens [B, S, 64]. `kept` are the ids [B, K] of the tokens that stay, of each route."""
        values = inputs()
        samples = [
            self._sample({k: v[b : b + 1] for k, v in values.items()}, lines, [k[b] for k in kept])
            for b in range(2)
        ]
        return torch.cat(samples)

    def _sample(self, values: dict[str, Tensor], lines: list[str], kept: list[Tensor]) -> Tensor:
        net, sigma = self.network, values["sigma"] * 1000
        condition = net.time_text_embed(sigma, torch.full((1,), 1000.0), values["pooled"])
        image = net.x_embedder(pack_latents(values["latents"]))
        text = net.context_embedder(values["prompt_embeds"])
        rows, columns = torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij")
        places = torch.stack([torch.zeros(IMAGE), rows.flatten(), columns.flatten()], dim=1)
        for number, block in enumerate([*net.transformer_blocks, *net.single_transformer_blocks]):
            stay = torch.arange(IMAGE)
            for line, ids in zip(lines, kept, strict=True):
                first, last = (int(part) % NUM_BLOCKS for part in line.split(": ")[1].split(" to "))
                if first <= number <= last:
                    stay = ids
            positions = net.pos_embed(torch.cat([torch.zeros(text.shape[1], 3), places[stay]]))
            text, some = block(
                hidden_states=image[:, stay],
                encoder_hidden_states=text,
                temb=condition,
                image_rotary_emb=positions,
            )
            image = torch.stack(
                [
                    some[0, stay.tolist().index(token)] if token in stay else image[0, token]
                    for token in range(IMAGE)
                ]
            )[None]
        return net.proj_out(net.norm_out(image, condition))


def drawn(lines: list[str], forced: Tensor | None = None) -> list[Tensor]:
    """The ids that a training draws in micro-step 5: a route after the other."""
    generator = seeded(0, "tread", 5)
    found = routes_around(routes(*lines), NUM_BLOCKS)
    return [draw_kept(route, 2, IMAGE, generator, forced).ids for route in found]


MASK = torch.arange(TEXT) < torch.tensor([[7], [4]])
"""[2, TEXT], the words of the two texts that are no padding."""


@pytest.mark.parametrize(
    ("name", "is_masked"), [*((name, False) for name in ROUTES), ("two routes", True)], ids=str
)
def test_velocities_and_gradients_are_those_of_each_sample_by_itself(
    base: LoadedFlux, name: str, is_masked: bool
) -> None:
    lines, forced = ROUTES[name], forced_tokens(weights()) if is_masked else None
    training = Training(base, settings(*lines))
    reference = Reference(training)
    kept = drawn(lines, forced)
    assert not torch.equal(kept[0][0], kept[0][1])
    found, expected = training.velocity(forced), reference.velocity(lines, kept)
    assert torch.allclose(pack_latents(found), expected, atol=1e-5)
    gradients = training.gradients(forced)
    expected.square().mean().backward()
    for parameter, factor in reference.factors.items():
        assert factor.grad is not None
        limit = 1e-5 * float(factor.grad.abs().max()) + 1e-9
        assert torch.allclose(gradients[parameter], factor.grad, atol=10 * limit), parameter


RECOMPUTED = {
    "all": {},
    "interval": {"checkpointing": "interval", "checkpointing_interval": 3},
    "selective": {"checkpointing": "selective"},
}


@pytest.fixture(scope="module")
def gradients(base: LoadedFlux) -> dict[str, Tensor]:
    """With two routes, all activations kept."""
    return Training(base, settings(*ROUTES["two routes"])).gradients()


@pytest.mark.parametrize("kind", RECOMPUTED)
def test_gradients_are_the_same_bits_when_blocks_are_computed_again_or_streamed(
    base: LoadedFlux, gradients: dict[str, Tensor], kind: str
) -> None:
    options = {"gradient_checkpointing": True, "kept_blocks": 3 if kind == "selective" else 0}
    training = Training(base, settings(*ROUTES["two routes"], **RECOMPUTED[kind]), **options)
    try:
        for budget in (None, 0):
            base.store.place("cpu", budget)
            found = training.gradients()
            assert all(torch.equal(found[name], gradients[name]) for name in gradients)
    finally:
        base.store.place("cpu", None)


def test_padding_of_the_texts_stays_hidden(base: LoadedFlux) -> None:
    """The reference sees the same texts without their padding, each in its own length."""
    lines = ROUTES["two routes"]
    training = Training(base, settings(*lines))
    with torch.no_grad():
        reference, kept = Reference(training), drawn(lines)
        expected = torch.cat(
            [
                reference._sample(
                    {name: value[b : b + 1] for name, value in inputs().items()}
                    | {"prompt_embeds": inputs()["prompt_embeds"][b : b + 1, MASK[b]]},
                    lines,
                    [ids[b] for ids in kept],
                )
                for b in range(2)
            ]
        )
    found = training.velocity(text_mask=MASK)
    assert torch.allclose(pack_latents(found), expected, atol=1e-5)


def test_other_micro_steps_draw_other_tokens_and_the_same_ones_the_same(base: LoadedFlux) -> None:
    training = Training(base, settings(*ROUTES["both kinds"]))
    first, other, again = (training.velocity(micro_step=n) for n in (5, 6, 5))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-3)


def test_without_gradients_or_outside_of_a_micro_step_nothing_goes_around(base: LoadedFlux) -> None:
    training = Training(base, settings(*ROUTES["all blocks"]))
    whole = Training(base, SpeedSettings()).velocity()
    assert not torch.allclose(training.velocity(), whole, atol=1e-3)
    assert torch.equal(velocity(training.transformer, **inputs(), guidance=1.0), whole)
    with torch.no_grad():
        assert torch.equal(training.velocity(), whole)


def test_tokens_under_the_white_of_a_mask_stay() -> None:
    forced = forced_tokens(weights())
    assert forced is not None
    expected = torch.zeros(4, 6, dtype=torch.bool)
    expected[:2, :3] = True  # 6 of 24; the second picture is white all over, so none must stay
    assert torch.equal(forced, torch.stack([expected.flatten(), torch.zeros(24, dtype=torch.bool)]))
    (few,) = routes_around(routes("0.9: 1 to 2"), NUM_BLOCKS)
    kept = draw_kept(few, 2, IMAGE, seeded(0, "tread", 1), forced).ids
    assert kept.shape == (2, 6)  # and not 24 - 22
    assert kept[0].tolist() == [0, 1, 2, 6, 7, 8]
    assert kept[1].tolist() != kept[0].tolist()
    (half,) = routes_around(routes("0.5: 1 to 2"), NUM_BLOCKS)
    kept = draw_kept(half, 2, IMAGE, seeded(0, "tread", 1), forced).ids
    assert kept.shape == (2, 12)
    assert {0, 1, 2, 6, 7, 8} < set(kept[0].tolist())


def test_every_token_stays_as_often_as_the_others() -> None:
    """Chi-squared of 24 tokens over 2000 draws of half of them: mean 23 * 0.5, 5 deviations."""
    (half,) = routes_around(routes("0.5: 1 to 2"), NUM_BLOCKS)
    generator, counts = seeded(0, "tread", 1), torch.zeros(IMAGE)
    for _ in range(1000):
        counts += torch.bincount(draw_kept(half, 2, IMAGE, generator).ids.flatten(), minlength=24)
    deviation = ((counts - 1000).square() / 500).sum()  # a variance of 2000 / 4
    assert 5 < deviation < 60


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["0.5: 2 to 7"], "no TREAD route from block 2 to 7 in this model: its blocks are 0 to 6"),
        (["0.5: -8 to 3"], "no TREAD route from block -8 to 3"),
        (["0.5: 4 to 2"], "no TREAD route from block 4 to 2"),
        (["0.5: 1 to 3", "0.5: 3 to 4"], "blocks 1-3 and 3-4 overlap"),
        (["0.5: 3 to 4", "0.5: 1 to 2"], "blocks 3-4 and 1-2 overlap"),
    ],
)
def test_routes_that_do_not_fit_are_explained(lines: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        routes_around(routes(*lines), NUM_BLOCKS)


@pytest.mark.parametrize(
    "line", ["half: 2 to -2", "0.5: 2", "0.5 2 to 3", "1.5: 2 to 3", "0: 1 to 2"]
)
def test_lines_that_are_no_routes_are_explained(line: str) -> None:
    with pytest.raises(ValueError, match="TREAD route"):
        routes(line)
