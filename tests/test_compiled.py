"""Compiled blocks: the same gradients as without, from one compilation for each kind of block.

The quick test takes torch's way from a graph to gradients and runs the graphs as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from atelier.trainers.adapters import attach_lora
from atelier.trainers.blocks import BlockRunner
from atelier.trainers.compiled import compile_blocks, require_compiler
from atelier.trainers.flow import seeded
from atelier.trainers.flux import build_transformer, velocity
from atelier.trainers.load import LoadedFlux, load_flux
from atelier.trainers.loop import open_run, train
from atelier.trainers.lora_settings import LoraSettings
from atelier.trainers.segments import segments_of
from atelier.trainers.speed_settings import SpeedSettings, routes_from_text
from flux_files import write_flux
from runs import job
from torch import Tensor
from torch._dynamo.utils import counters
from training import training_data

NUM_BLOCKS = 4
ROUTED = SpeedSettings(tread=routes_from_text("0.5: 1 to -2"))


@pytest.fixture(scope="module")
def flux_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_flux(tmp_path_factory.mktemp("flux") / "flux.safetensors", depth=1, depth_single=3)


@pytest.fixture(autouse=True)
def nothing_is_compiled() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


class Training:
    """The training face with a LoRA, all of it computed again in backward."""

    def __init__(
        self,
        base: LoadedFlux,
        speed: SpeedSettings,
        backend: str = "",
        settings: LoraSettings = LoraSettings(targets="all"),  # noqa: B008 - frozen
    ) -> None:
        self.base = base
        self.transformer = build_transformer(base.store, base.config, torch.float32).train()
        self.lora = attach_lora(self.transformer, settings, seed=0)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(3)
            for parameter in self.lora.parameters.values():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        if backend:
            compile_blocks(self.transformer, backend)
        segments = segments_of(speed, NUM_BLOCKS, gradient_checkpointing=True)
        self.blocks = BlockRunner(self.transformer, segments)

    def gradients(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        for parameter in self.lora.parameters.values():
            parameter.grad = None
        with self.blocks.routed(seeded(0, "tread", 1), None):
            output = velocity(
                self.transformer,
                torch.randn(2, 16, 8, 8, generator=generator),
                sigma=torch.tensor([0.7, 0.2]),
                prompt_embeds=torch.randn(2, 10, 128, generator=generator),
                pooled=torch.randn(2, 64, generator=generator),
                guidance=1.0,
            )
        output.square().mean().backward()
        return {name: p.grad for name, p in self.lora.parameters.items()}  # pyright: ignore


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, atol=1e-5 * float(gradient.abs().max())), name


def inside_inference_mode(base: LoadedFlux) -> None:
    """As a host that moves a model: none of its tensors may be kept for backward."""
    with torch.inference_mode():
        for weight in base.store.packed.values():
            weight.data = weight.data.clone()
            weight.scale = weight.scale.clone() if weight.scale is not None else None
    assert weight.data.is_inference()


def test_gradients_are_those_without_and_blocks_of_a_kind_share_a_graph(flux_file: Path) -> None:
    base = load_flux(flux_file, format="nf4")
    expected = Training(base, SpeedSettings()).gradients()
    inside_inference_mode(base)
    training = Training(base, SpeedSettings(), "aot_eager")
    assert_close(training.gradients(), expected)
    # Of double blocks, of single ones, and of the first of these, whose tokens lie in other steps.
    assert counters["stats"]["unique_graphs"] == 3
    assert not counters["graph_break"]
    base.store.place("cpu", 0)
    assert_close(training.gradients(), expected)
    assert counters["stats"]["unique_graphs"] == 3


def test_blocks_with_a_dora_share_a_graph_too(flux_file: Path) -> None:
    base, dora = load_flux(flux_file, format="nf4"), LoraSettings(targets="all", dora=True)
    expected = Training(base, SpeedSettings(), settings=dora).gradients()
    training = Training(base, SpeedSettings(), "aot_eager", dora)
    assert_close(training.gradients(), expected)
    assert counters["stats"]["unique_graphs"] == 3
    assert not counters["graph_break"]


def test_dropout_is_left_out_of_graphs(flux_file: Path) -> None:
    base, settings = load_flux(flux_file, format="nf4"), LoraSettings(dropout=0.3)
    plain = Training(base, SpeedSettings(), settings=settings)
    training = Training(base, SpeedSettings(), "aot_eager", settings)
    for micro_step in range(2):
        plain.lora.at_micro_step(micro_step)
        training.lora.at_micro_step(micro_step)
        assert_close(training.gradients(), plain.gradients())
    assert all("torch.compiler.disable" in reason for reason in counters["graph_break"])


@pytest.mark.slow
def test_routed_blocks_compile_too(flux_file: Path) -> None:
    base = load_flux(flux_file, format="int8")
    expected = Training(base, ROUTED).gradients()
    assert_close(Training(base, ROUTED, "aot_eager").gradients(), expected)
    assert not counters["graph_break"]


@pytest.mark.slow
def test_a_run_with_compiled_blocks_has_the_losses_of_one_without(
    flux_file: Path, tmp_path: Path
) -> None:
    """Compiled to machine code."""
    base, data = load_flux(flux_file, format="nf4"), training_data(tmp_path / "data")
    losses = {}
    for is_compiled in (False, True):
        settings = job(2, speed=SpeedSettings(compile=is_compiled))
        run = open_run(tmp_path / str(is_compiled), settings, base, data)
        losses[is_compiled] = train(run, base, data, settings).losses
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)
    assert counters["stats"]["unique_graphs"] >= 3


def test_without_a_compiler_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    with pytest.raises(
        ValueError, match=r"torch\.compile does not work here: .* compiler on a CPU"
    ):
        require_compiler(torch.device("cpu"))


def test_products_in_8_bits_are_not_compiled() -> None:
    with pytest.raises(ValueError, match="turn compile off"):
        SpeedSettings(compile=True, products="8bit")
