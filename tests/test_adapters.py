"""LoRAs: their start, their file, and diffusers reading that file (DESIGN I4)."""

from __future__ import annotations

import errno
import math
import re
from pathlib import Path

import pytest
import torch
from atelier.trainers import files
from atelier.trainers.adapters import (
    Lora,
    attach_lora,
    file_tensors,
    load_lora_state,
    lora_metadata,
    save_lora,
)
from atelier.trainers.flux import build_transformer, velocity
from atelier.trainers.formats import FORMATS
from atelier.trainers.load import LoadedFlux, load_flux
from atelier.trainers.lora_layers import Adapted
from atelier.trainers.lora_settings import LORA_TARGETS, LoraSettings
from atelier.trainers.lora_targets import FLUX_DEV, learning_ranks, linear_names, num_parameters
from dense import dense_transformer, stored_tensors
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from flux_files import write_flux
from safetensors import safe_open
from safetensors.torch import load_file

IMAGE = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
TEXT = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
SINGLE = ("attn.to_q", "attn.to_k", "attn.to_v")
TEXT_FEED_FORWARD = FEED_FORWARD[2:]
MODULATION = ("norm1.linear", "norm1_context.linear")
EVERYTHING = {
    "double": (*IMAGE, *TEXT, *FEED_FORWARD, *MODULATION),
    "single": (*SINGLE, "proj_mlp", "proj_out", "norm.linear"),
}
GOLDEN_MODULES = {
    "qlora": {"double": IMAGE, "single": SINGLE},
    "all": {"double": (*IMAGE, *TEXT), "single": SINGLE},
    "all+ffs": {
        "double": (*IMAGE, *TEXT, *FEED_FORWARD),
        "single": (*SINGLE, "proj_mlp", "proj_out"),
    },
    "mmdit": {"double": IMAGE, "single": SINGLE},
    "context": {"double": TEXT, "single": ()},
    "context+ffs": {"double": (*TEXT, *TEXT_FEED_FORWARD), "single": ()},
    "fal": {"double": (*IMAGE, *TEXT, *FEED_FORWARD), "single": SINGLE},
    "ai-toolkit": EVERYTHING,
    "kohya": EVERYTHING,
}
"""The modules that learn in one double and one single block, written out anew."""
OF_SOME_BLOCKS = {
    "tiny": ("single_transformer_blocks.7.proj_out", "single_transformer_blocks.20.proj_out"),
    "nano": ("single_transformer_blocks.7.proj_out",),
}
MILLIONS = {
    "qlora": 18.68,
    "mmdit": 18.68,
    "all": 26.15,
    "context": 7.47,
    "context+ffs": 16.81,
    "all+ffs": 65.42 - 16 * (3072 + 64) / 1e6,
    "ai-toolkit": 85.92,
    "kohya": 85.92,
    "tiny": 0.59,
    "nano": 0.29,
    "fal": 44.83,
}
"""Parameters of FLUX.1-dev at rank 16, of the presets in the trainers that have them; SimpleTuner's
all+ffs has the final proj_out too, ours not."""


def golden_keys(targets: str) -> set[str]:
    modules = [f"transformer_blocks.0.{name}" for name in GOLDEN_MODULES[targets]["double"]]
    modules += [f"single_transformer_blocks.0.{name}" for name in GOLDEN_MODULES[targets]["single"]]
    ends = ("lora_A.weight", "lora_B.weight", "alpha")
    return {f"transformer.{module}.{end}" for module in modules for end in ends}


@pytest.fixture(scope="module")
def flux_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_flux(tmp_path_factory.mktemp("flux") / "flux.safetensors")


@pytest.fixture(scope="module")
def loaded(flux_file: Path) -> LoadedFlux:
    return load_flux(flux_file, format="bf16")


@pytest.fixture
def transformer(loaded: LoadedFlux) -> torch.nn.Module:
    return build_transformer(loaded.store, loaded.config, torch.float32)


def velocity_of(transformer: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return velocity(
            transformer,
            torch.randn(1, 16, 8, 4, generator=generator),
            sigma=torch.tensor([0.6]),
            prompt_embeds=torch.randn(1, 10, 128, generator=generator),
            pooled=torch.randn(1, 64, generator=generator),
            guidance=2.0,
        )


def as_if_trained(lora: Lora) -> Lora:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in lora.parameters.values():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return lora


def of_kind(lora: Lora, kind: str) -> torch.Tensor:
    chosen = [p.flatten() for name, p in lora.parameters.items() if f"lora_{kind}" in name]
    return torch.cat(chosen).detach()


@pytest.mark.parametrize("rank", [4, 16])
def test_a_starts_gaussian_with_deviation_one_over_rank(
    transformer: torch.nn.Module, rank: int
) -> None:
    a = of_kind(attach_lora(transformer, LoraSettings(rank=rank), seed=0), "A") * rank
    five_sigma = 5 / math.sqrt(a.numel())
    assert abs(a.mean()) < five_sigma
    assert abs(a.std() - 1) < five_sigma
    assert abs((a.abs() < 1).float().mean() - math.erf(math.sqrt(0.5))) < five_sigma


def test_b_starts_at_zero(transformer: torch.nn.Module) -> None:
    assert not of_kind(attach_lora(transformer, LoraSettings(), seed=0), "B").any()


def test_a_fresh_lora_changes_nothing(transformer: torch.nn.Module) -> None:
    before = velocity_of(transformer)
    attach_lora(transformer, LoraSettings(), seed=0)
    assert torch.equal(velocity_of(transformer), before)


def start(loaded: LoadedFlux, seed: int) -> torch.Tensor:
    transformer = build_transformer(loaded.store, loaded.config, torch.float32)
    return of_kind(attach_lora(transformer, LoraSettings(), seed=seed), "A")


def test_the_start_follows_the_seed_alone(loaded: LoadedFlux) -> None:
    torch.manual_seed(1)
    one = start(loaded, 3)
    torch.manual_seed(2)
    assert torch.equal(start(loaded, 3), one)
    assert not torch.equal(start(loaded, 4), one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_only_the_adapters_train_and_they_are_float32(
    loaded: LoadedFlux, dtype: torch.dtype
) -> None:
    transformer = build_transformer(loaded.store, loaded.config, dtype)
    lora = attach_lora(transformer, LoraSettings(), seed=0)
    trainable = [p for p in transformer.parameters() if p.requires_grad]
    assert {id(p) for p in trainable} == {id(p) for p in lora.parameters.values()}
    assert {p.dtype for p in trainable} == {torch.float32}


def test_a_detached_lora_leaves_the_network_as_it_was(transformer: torch.nn.Module) -> None:
    before, modules = velocity_of(transformer), [name for name, _ in transformer.named_modules()]
    lora = as_if_trained(attach_lora(transformer, LoraSettings(targets="all+ffs"), seed=0))
    assert not torch.equal(velocity_of(transformer), before)
    lora.detach()
    assert torch.equal(velocity_of(transformer), before)
    assert [name for name, _ in transformer.named_modules()] == modules
    assert not any(isinstance(module, Adapted) for module in transformer.modules())


def test_another_lora_can_follow_a_detached_one(transformer: torch.nn.Module) -> None:
    attach_lora(transformer, LoraSettings(rank=4), seed=0).detach()
    lora = attach_lora(transformer, LoraSettings(rank=8, targets="all"), seed=0)
    assert {parameter.shape[0] for n, parameter in lora.parameters.items() if "_A" in n} == {8}


def test_every_preset_of_targets_is_held_here() -> None:
    assert {*GOLDEN_MODULES, *OF_SOME_BLOCKS} == LORA_TARGETS.keys() == MILLIONS.keys()


@pytest.mark.parametrize("targets", OF_SOME_BLOCKS)
def test_presets_of_single_layers_name_them(targets: str) -> None:
    found = learning_ranks(linear_names(FLUX_DEV), LoraSettings(targets=targets))
    assert tuple(found) == OF_SOME_BLOCKS[targets]


@pytest.mark.parametrize("targets", MILLIONS)
def test_presets_have_the_sizes_that_the_trainers_have(targets: str) -> None:
    count = num_parameters(FLUX_DEV, LoraSettings(rank=16, targets=targets))
    assert count / 1e6 == pytest.approx(MILLIONS[targets], abs=0.006)


@pytest.mark.parametrize("targets", GOLDEN_MODULES)
def test_the_file_has_these_names(
    transformer: torch.nn.Module, tmp_path: Path, targets: str
) -> None:
    settings = LoraSettings(targets=targets)
    lora = attach_lora(transformer, settings, seed=0)
    save_lora(tmp_path / "lora.safetensors", file_tensors(lora.state(), settings), {})
    assert load_file(tmp_path / "lora.safetensors").keys() == golden_keys(targets)


@pytest.mark.parametrize(("alpha", "expected"), [(None, 4.0), (2.0, 2.0), (32.0, 32.0)])
def test_the_file_has_an_alpha_for_every_module(
    transformer: torch.nn.Module, alpha: float | None, expected: float
) -> None:
    settings = LoraSettings(rank=4, alpha=alpha)
    tensors = file_tensors(attach_lora(transformer, settings, seed=0).state(), settings)
    alphas = [tensor for name, tensor in tensors.items() if name.endswith(".alpha")]
    assert len(alphas) == len(tensors) / 3
    assert {tensor.item() for tensor in alphas} == {expected}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


@pytest.mark.parametrize(("guidance", "variant"), [(True, "dev"), (False, "schnell")])
def test_the_file_names_its_base_and_settings(tmp_path: Path, guidance: bool, variant: str) -> None:
    base = load_flux(write_flux(tmp_path / "flux.safetensors", guidance=guidance), format="nf4")
    metadata = lora_metadata(
        name="cats", settings=LoraSettings(rank=8), base=base, steps=9, run={"base": "x"}
    )
    save_lora(tmp_path / "lora.safetensors", {"a": torch.zeros(1)}, metadata)
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        found = file.metadata()
    assert found["modelspec.title"] == "cats"
    assert found["modelspec.architecture"] == f"flux-1-{variant}/lora"
    assert (found["atelier.rank"], found["atelier.base_format"]) == ("8", "nf4")


@pytest.mark.parametrize(
    ("format", "alpha", "targets"),
    [
        *((format, 2.0, "qlora") for format in FORMATS),
        ("bf16", None, "all"),
        ("bf16", 12.0, "all+ffs"),
    ],
)
def test_diffusers_gives_the_live_velocity_with_the_file(
    flux_file: Path, tmp_path: Path, format: str, alpha: float | None, targets: str
) -> None:
    loaded = load_flux(flux_file, format=format)
    transformer = build_transformer(loaded.store, loaded.config, torch.float32)
    base = velocity_of(transformer)
    settings = LoraSettings(rank=4, alpha=alpha, targets=targets)
    lora = as_if_trained(attach_lora(transformer, settings, seed=0))
    save_lora(tmp_path / "lora.safetensors", file_tensors(lora.state(), settings), {})
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=dense_transformer(stored_tensors(format)),
        **dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")),
    )
    pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    live = velocity_of(transformer)
    assert torch.max(torch.abs(live - base)) > 0.01
    assert torch.max(torch.abs(velocity_of(pipeline.transformer) - live)) <= 1e-4


def test_a_file_read_back_has_its_alpha_in_b(transformer: torch.nn.Module, tmp_path: Path) -> None:
    settings = LoraSettings(rank=4, alpha=12.0)
    state = as_if_trained(attach_lora(transformer, settings, seed=0)).state()
    save_lora(tmp_path / "lora.safetensors", file_tensors(state, settings), {})
    found = load_lora_state(tmp_path / "lora.safetensors")
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(found[name], 3 * tensor if "lora_B" in name else tensor)


def test_a_state_is_a_copy_and_comes_back(transformer: torch.nn.Module) -> None:
    lora = attach_lora(transformer, LoraSettings(), seed=0)
    state = lora.state()
    as_if_trained(lora)
    assert not torch.equal(of_kind(lora, "B"), torch.zeros_like(of_kind(lora, "B")))
    lora.load_state(state)
    assert all(torch.equal(lora.parameters[name], tensor) for name, tensor in state.items())
    assert not of_kind(lora, "B").any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused_and_leave_nothing(
    tmp_path: Path, value: float
) -> None:
    tensors = {"a": torch.zeros(3), "b": torch.tensor([0.0, value])}
    with pytest.raises(
        ValueError, match=r"not finite and was not saved: .* Lower the learning rate"
    ):
        save_lora(tmp_path / "lora.safetensors", tensors, {})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_lora_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lora.safetensors"
    save_lora(path, {"a": torch.zeros(3)}, {})

    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "_sync", full)
    with pytest.raises(
        ValueError, match=rf"^The disk of {re.escape(str(tmp_path))} is full\. Free"
    ):
        save_lora(path, {"a": torch.ones(3)}, {})
    assert [file.name for file in tmp_path.iterdir()] == ["lora.safetensors"]
    assert not load_file(path)["a"].any()


def test_a_target_that_fits_no_layer_is_one_sentence(
    transformer: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LORA_TARGETS, "odd", ("to_q", "to_nothing"))
    with pytest.raises(ValueError, match=r"^The LoRA target 'to_nothing' matches no layer"):
        attach_lora(transformer, LoraSettings(targets="odd"), seed=0)
