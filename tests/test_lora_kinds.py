"""Kinds of LoRAs and their starts, beside peft's and diffusers' (DESIGN I2, I4)."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from atelier.trainers.adapters import attach_lora, file_tensors, save_lora
from atelier.trainers.flux import (
    build_transformer,
    recompute_blocks,
    velocity,
    without_assistant,
)
from atelier.trainers.flux_lora import parse_flux_lora
from atelier.trainers.frozen import FrozenLora
from atelier.trainers.load import LoadedFlux, load_flux
from atelier.trainers.loop import open_run, train
from atelier.trainers.lora_export import exported, resized
from atelier.trainers.lora_settings import LoraSettings, without_effect
from atelier.trainers.lora_start import settings_from
from atelier.trainers.lora_targets import (
    FLUX_DEV,
    describe_lora,
    linear_names,
    num_parameters,
    rank_without_effect,
)
from atelier.trainers.lycoris import factorization
from atelier.trainers.memory import Workload, estimate_training
from atelier.trainers.optimizer_settings import OptimizerSettings
from atelier.trainers.optimizers import cast_parameters
from atelier.trainers.run import lora_settings
from atelier.trainers.step import TrainState
from dense import dense_transformer, stored_tensors
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from flux_files import write_flux
from lora_kinds import KINDS, trained_like
from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model
from peft.tuners.lokr.layer import factorization as pefts_factorization
from runs import Stop, assert_same_lora, job, stop_before
from torch import Tensor, nn
from training import training_data

PLAIN = [name for name, settings in KINDS.items() if settings.kind == "lora"]
PRODUCTS = [name for name, settings in KINDS.items() if settings.kind != "lora"]


@pytest.fixture(scope="module")
def flux_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_flux(tmp_path_factory.mktemp("flux") / "flux.safetensors")


@pytest.fixture(scope="module")
def loaded(flux_file: Path) -> LoadedFlux:
    return load_flux(flux_file, format="bf16")


@pytest.fixture
def transformer(loaded: LoadedFlux) -> nn.Module:
    return build_transformer(loaded.store, loaded.config, torch.float32)


def prediction(transformer: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return velocity(
        transformer,
        torch.randn(1, 16, 8, 4, generator=generator),
        sigma=torch.tensor([0.6]),
        prompt_embeds=torch.randn(1, 10, 128, generator=generator),
        pooled=torch.randn(1, 64, generator=generator),
        guidance=2.0,
    )


def velocity_of(transformer: nn.Module) -> Tensor:
    with torch.no_grad():
        return prediction(transformer)


def pipeline(format: str = "bf16") -> FluxPipeline:
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=dense_transformer(stored_tensors(format)),
        **dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")),
    )


@pytest.mark.parametrize("kind", PLAIN)
def test_diffusers_gives_the_live_velocity_with_the_file(
    loaded: LoadedFlux, transformer: nn.Module, tmp_path: Path, kind: str
) -> None:
    base, settings = velocity_of(transformer), KINDS[kind]
    lora = trained_like(transformer, settings, loaded)
    save_lora(tmp_path / "lora.safetensors", file_tensors(lora.state(), settings), {})
    other = pipeline()
    other.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    live = velocity_of(transformer)
    assert torch.max(torch.abs(live - base)) > 0.01
    assert torch.max(torch.abs(velocity_of(other.transformer) - live)) <= 1e-4


def pefts(settings: LoraSettings, state: dict[str, Tensor]) -> nn.Module:
    """A plain diffusers network with peft's layers that hold these tensors."""
    network = dense_transformer(stored_tensors("bf16"))
    modules = sorted({name.rpartition(".")[0] for name in state})
    rank = 10_000 if settings.full_matrix else settings.rank
    alpha = rank if settings.full_matrix else settings.resolved_alpha
    if settings.kind == "lokr":
        config = LoKrConfig(
            r=rank,
            alpha=alpha,  # pyright: ignore[reportArgumentType]
            target_modules=modules,
            decompose_factor=settings.lokr_factor,
        )
    else:
        config = LoHaConfig(r=rank, alpha=alpha, target_modules=modules)  # pyright: ignore[reportArgumentType]
    inject_adapter_in_model(config, network)
    theirs = {n.replace(".default", ""): p for n, p in network.named_parameters() if "_w" in n}
    assert theirs.keys() == state.keys()
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameter.copy_(state[name])
    return network


@pytest.mark.parametrize("kind", PRODUCTS)
def test_a_lokr_and_a_loha_compute_as_pefts(
    loaded: LoadedFlux, transformer: nn.Module, kind: str
) -> None:
    base, settings = velocity_of(transformer), KINDS[kind]
    lora = trained_like(transformer, settings, loaded)
    network = pefts(settings, lora.state())
    ours, theirs = prediction(transformer), prediction(network)
    assert torch.max(torch.abs(ours - base)) > 0.01
    assert torch.max(torch.abs(theirs - ours)) <= 1e-4
    ours.square().sum().backward()
    theirs.square().sum().backward()
    gradients = {n.replace(".default", ""): p.grad for n, p in network.named_parameters()}
    for name, parameter in lora.parameters.items():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", PRODUCTS)
def test_a_lokr_and_a_loha_are_exactly_a_lora_of_enough_ranks(
    loaded: LoadedFlux, transformer: nn.Module, tmp_path: Path, kind: str
) -> None:
    """diffusers knows neither: it gets what Export LoRA makes of them."""
    settings = KINDS[kind]
    tensors = file_tensors(trained_like(transformer, settings, loaded).state(), settings)
    adapters = parse_flux_lora(tensors).adapters
    whole = parse_flux_lora(tensors)
    if settings.kind == "lokr":
        whole = resized(whole, 256)
    save_lora(tmp_path / "lora.safetensors", exported(whole, "diffusers"), {})
    other = pipeline()
    other.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    assert {adapter.kind for adapter in adapters} == {settings.kind}
    difference = velocity_of(other.transformer) - velocity_of(transformer)
    assert torch.max(torch.abs(difference)) <= 1e-4


@pytest.mark.parametrize("factor", [-1, 1, 4, 5, 7, 8, 16, 10_000])
def test_matrices_are_taken_apart_as_peft_does(factor: int) -> None:
    for size in (64, 128, 192, 257, 512, 3072, 9216, 12288, 15360):
        assert [*factorization(size, factor)] == sorted(pefts_factorization(size, factor))


def test_a_dora_learns_as_pefts(loaded: LoadedFlux, transformer: nn.Module) -> None:
    settings = KINDS["dora"]
    lora = trained_like(transformer, settings, loaded)
    network = dense_transformer(stored_tensors("bf16"))
    modules = sorted({name.rsplit(".lora_A")[0] for name in lora.parameters if "lora_A" in name})
    config = LoraConfig(r=4, lora_alpha=2, target_modules=modules, use_dora=True)
    inject_adapter_in_model(config, network)
    theirs = {
        re.sub(
            r"lora_magnitude_vector\.default\.weight", "magnitude", n.replace("A.default", "A")
        ).replace("B.default", "B"): p
        for n, p in network.named_parameters()
        if "lora_" in n
    }
    assert theirs.keys() == lora.parameters.keys()
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameter.copy_(lora.parameters[name])
    ours = prediction(transformer)
    other = prediction(network)
    assert torch.max(torch.abs(ours - other)) <= 1e-4
    ours.square().sum().backward()
    other.square().sum().backward()
    for name, parameter in lora.parameters.items():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("init", ["default", "pissa", "olora", "dora", "lokr", "loha"])
def test_a_start_changes_nothing(loaded: LoadedFlux, transformer: nn.Module, init: str) -> None:
    before = velocity_of(transformer)
    settings = KINDS[init] if init in KINDS else LoraSettings(init="default")
    attach_lora(transformer, settings, seed=0, base=loaded)
    assert torch.max(torch.abs(velocity_of(transformer) - before)) <= 1e-5


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_starts_from_the_weights_are_pefts(loaded: LoadedFlux, init: str) -> None:
    """Factors of another sign are the same product. Random weights have many singular values of
    about the same size, so that PiSSA's nearest product is compared by what it leaves."""
    settings = LoraSettings(rank=4, alpha=2.0, init=init)  # pyright: ignore[reportArgumentType]
    transformer = build_transformer(loaded.store, loaded.config, torch.float32)
    state = attach_lora(transformer, settings, seed=0, base=loaded).state()
    network = dense_transformer(stored_tensors("bf16"))
    modules = sorted({name.rsplit(".lora_")[0] for name in state if ".lora_" in name})
    weights = {module: network.get_submodule(module).weight.clone() for module in modules}
    config = LoraConfig(r=4, lora_alpha=2, target_modules=modules, init_lora_weights=init)
    inject_adapter_in_model(config, network)
    for module in modules:
        layer = network.get_submodule(module)
        theirs = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        a, b = state[f"{module}.lora_A.weight"], state[f"{module}.lora_B.weight"]
        if init == "olora":
            torch.testing.assert_close(b @ a, theirs, rtol=1e-3, atol=1e-4)
            continue
        left = [(weights[module] - product / 2).norm() for product in (b @ a, theirs)]
        assert float(left[0]) <= 1.0005 * float(left[1])
        torch.testing.assert_close(b.norm(dim=0), a.norm(dim=1))  # shared by both factors


@pytest.mark.parametrize(
    ("init", "is_of_kind"),
    [
        ("default", lambda a: a.abs().max() <= 1 / math.sqrt(a.shape[1])),
        ("gaussian", lambda a: a.abs().max() > 1 / math.sqrt(a.shape[1])),
    ],
)
def test_default_is_uniform_as_torchs_own(transformer: nn.Module, init: str, is_of_kind) -> None:
    settings = LoraSettings(rank=8, init=init)  # pyright: ignore[reportArgumentType]
    state = attach_lora(transformer, settings, seed=0).state()
    assert all(is_of_kind(a) for name, a in state.items() if "lora_A" in name)


@pytest.mark.parametrize("format", ["nf4", "int4"])
def test_loftq_is_the_svd_of_what_quantization_took(flux_file: Path, format: str) -> None:
    base = load_flux(flux_file, format=format)
    settings = LoraSettings(rank=4, alpha=2.0, init="loftq", targets="all+ffs")
    transformer = build_transformer(base.store, base.config, torch.float32)
    state = attach_lora(transformer, settings, seed=0, base=base).state()
    original = dense_transformer(stored_tensors("bf16"))
    quantized = dense_transformer(stored_tensors(format))
    for module in {name.rsplit(".lora_")[0] for name in state}:
        taken = original.get_submodule(module).weight - quantized.get_submodule(module).weight
        values = np.linalg.svd(taken.detach().double().numpy(), compute_uv=False)
        product = state[f"{module}.lora_B.weight"] @ state[f"{module}.lora_A.weight"] / 2
        left, least = float((taken - product).norm()) ** 2, float((values[4:] ** 2).sum())
        assert left <= 1.001 * least < float(taken.norm()) ** 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_stays_and_the_lora_learns(loaded: LoadedFlux, kind: str) -> None:
    bytes_before = [tensor.clone() for tensor in loaded.store.tensors()]
    transformer = build_transformer(loaded.store, loaded.config, torch.float32)
    before = velocity_of(transformer)
    lora = trained_like(transformer, KINDS[kind], loaded)
    prediction(transformer).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in lora.parameters.values())
    with lora.disabled():
        assert torch.equal(velocity_of(transformer), before)
    lora.detach()
    assert torch.equal(velocity_of(transformer), before)
    pairs = zip(bytes_before, loaded.store.tensors(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_of_bf16_computes_in_float32(loaded: LoadedFlux, kind: str) -> None:
    """As one of float32 with the same rounded numbers does."""
    transformer = build_transformer(loaded.store, loaded.config, torch.float32)
    lora = trained_like(transformer, KINDS[kind], loaded)
    cast_parameters(OptimizerSettings(optimizer="adamw_bf16"), lora.parameters.values())
    found = velocity_of(transformer)
    prediction(transformer).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in lora.parameters.values())
    for parameter in lora.parameters.values():
        parameter.data = parameter.data.float()
    assert torch.equal(velocity_of(transformer), found)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_state_is_all_that_a_lora_needs(loaded: LoadedFlux, kind: str) -> None:
    settings = KINDS[kind]
    first = build_transformer(loaded.store, loaded.config, torch.float32)
    trained = trained_like(first, settings, loaded)
    state = dict(sorted(trained.state().items()))  # as it is read from a file
    second = build_transformer(loaded.store, loaded.config, torch.float32)
    lora = attach_lora(second, settings, seed=7, saved=state)
    lora.load_state(state)
    assert [*lora.parameters] == [*trained.parameters]  # an optimizer knows them by their numbers
    assert torch.equal(velocity_of(second), velocity_of(first))
    again = lora.state()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)


@pytest.mark.parametrize("kind", ["lora", "pissa", "dora", "lokr", "loha"])
def test_it_learns_in_bfloat16_too(loaded: LoadedFlux, transformer: nn.Module, kind: str) -> None:
    """Whose numbers a file has."""
    lora = trained_like(transformer, KINDS[kind], loaded)
    cast_parameters(OptimizerSettings(optimizer="adamw_bf16"), lora.parameters.values())
    prediction(transformer).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in lora.parameters.values())
    state = lora.state()
    again = build_transformer(loaded.store, loaded.config, torch.float32)
    attach_lora(again, KINDS[kind], seed=0, saved=state).load_state(state)
    assert torch.max(torch.abs(velocity_of(again) - velocity_of(transformer))) <= 1e-5


@pytest.mark.parametrize("kind", ["lora", "pissa", "olora", "dora"])
def test_a_start_in_bfloat16_changes_nothing(loaded: LoadedFlux, kind: str) -> None:
    """The rounded factors are those whose product is taken off."""
    optimizer = OptimizerSettings(optimizer="adamw_bf16")
    state = TrainState(loaded, dataclasses.replace(job(optimizer=optimizer), lora=KINDS[kind]))
    found = velocity_of(state.transformer)
    with state.lora.disabled():
        assert torch.max(torch.abs(velocity_of(state.transformer) - found)) <= 1e-5


@pytest.mark.parametrize("kind", ["lora", "dora", "pissa"])
def test_an_assistant_adds_the_same_whatever_learns(loaded: LoadedFlux, kind: str) -> None:
    """It computes beside the layer: of a DoRA it is no part of the weights that have a length."""
    name, width = "double_blocks.0.img_attn.proj", loaded.config.hidden_size
    generator = torch.Generator().manual_seed(5)
    down, up = (torch.randn(shape, generator=generator) for shape in ((2, width), (width, 2)))
    assistant = [FrozenLora(name=name, start=0, down=down, up=0.1 * up, scale=1.0)]
    network = build_transformer(loaded.store, loaded.config, torch.float32, assistant=assistant)
    settings = dataclasses.replace(KINDS[kind], targets="qlora")
    trained_like(network, settings, loaded)
    layer = network.get_submodule("transformer_blocks.0.attn.to_out.0")
    x = torch.randn(3, width, generator=generator)
    with torch.no_grad():
        with_it = layer(x)
        with without_assistant(network):
            difference = with_it - layer(x)
    torch.testing.assert_close(difference, 0.1 * x @ down.T @ up.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_that_learn_are_counted(
    loaded: LoadedFlux, transformer: nn.Module, kind: str
) -> None:
    lora = attach_lora(transformer, KINDS[kind], seed=0, base=loaded)
    learned = sum(parameter.numel() for parameter in lora.parameters.values())
    assert num_parameters(loaded.config, KINDS[kind]) == learned


def test_the_size_is_told() -> None:
    said = describe_lora(FLUX_DEV, LoraSettings())
    assert said == "The LoRA learns 4.67 million numbers on 190 layers."


# Dropout


def dropped(loaded: LoadedFlux, micro_step: int, *, rerun: bool) -> list[Tensor]:
    transformer = build_transformer(loaded.store, loaded.config, torch.float32).train()
    settings = LoraSettings(rank=4, dropout=0.5, targets="all+ffs")
    lora = trained_like(transformer, settings, loaded)
    if rerun:
        recompute_blocks(transformer)
    lora.at_micro_step(micro_step)
    prediction(transformer).square().sum().backward()
    return [parameter.grad for parameter in lora.parameters.values()]  # pyright: ignore[reportReturnType]


def test_dropout_is_the_same_in_a_block_that_is_computed_again(loaded: LoadedFlux) -> None:
    one, other = dropped(loaded, 3, rerun=False), dropped(loaded, 3, rerun=True)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(one[0], dropped(loaded, 4, rerun=False)[0])


def test_dropout_takes_its_share_and_keeps_the_mean(transformer: nn.Module) -> None:
    from atelier.trainers.lora_layers import Dropout

    dropout = Dropout(share=0.25, seed=1)
    out = dropout(torch.ones(400, 500), "a")
    assert float((out == 0).float().mean()) == pytest.approx(0.25, abs=0.005)
    assert float(out.mean()) == pytest.approx(1, abs=0.01)
    with torch.no_grad():
        assert torch.equal(dropout(torch.ones(4, 5), "a"), torch.ones(4, 5))


# Which layers


def test_blocks_and_patterns_choose_layers_by_both_names(loaded: LoadedFlux) -> None:
    from atelier.trainers.lora_targets import learning_ranks

    names = linear_names(FLUX_DEV)
    some = learning_ranks(
        names,
        LoraSettings(targets="all", blocks="double_blocks.0-1, single_transformer_blocks.37"),
    )
    blocks = {name.rsplit(".attn")[0] for name in some}
    assert blocks == {
        "transformer_blocks.0",
        "transformer_blocks.1",
        "single_transformer_blocks.37",
    }
    fused = learning_ranks(names, LoraSettings(patterns="double_blocks.3.img_attn.qkv"))
    assert [*fused] == [f"transformer_blocks.3.attn.to_{part}" for part in "qkv"]
    ranks = learning_ranks(
        names, LoraSettings(rank=2, rank_patterns="attn.to_q: 8\nsingle_blocks: 6")
    )
    assert ranks["transformer_blocks.0.attn.to_q"] == 8
    assert ranks["single_transformer_blocks.0.attn.to_q"] == 6
    assert ranks["transformer_blocks.0.attn.to_k"] == 2
    assert "proj_out" not in learning_ranks(names, LoraSettings(patterns="proj_out"))


WRONG = {
    "^'double_blocks.90' of blocks matches no block": {"blocks": "double_blocks.90"},
    "^The pattern 'img_atn' matches no layer": {"patterns": "img_atn"},
    "^The pattern 'ff.net' of rank_patterns matches no layer": {"rank_patterns": "ff.net: 8"},
    "^No layer learns: the blocks 'single_blocks.0'": {
        "blocks": "single_blocks.0",
        "targets": "context",
    },
    "^The start pissa gives at most .* 256 here, and the rank is 300": {
        "init": "pissa",
        "rank": 300,
    },
    "^LoftQ makes up for what quantization took, and this model is in bf16": {"init": "loftq"},
}


@pytest.mark.parametrize("said", WRONG)
def test_what_does_not_fit_a_model_is_a_sentence(
    loaded: LoadedFlux, transformer: nn.Module, said: str
) -> None:
    settings = LoraSettings(**WRONG[said])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=said):
        attach_lora(transformer, settings, seed=0, base=loaded)


def test_loftq_needs_the_file_of_more_bits(flux_file: Path) -> None:
    base = load_flux(flux_file, format="nf4")
    transformer = build_transformer(base.store, base.config, torch.float32)
    with pytest.raises(ValueError, match=r"^LoftQ needs the file that the model was"):
        attach_lora(
            transformer,
            LoraSettings(init="loftq"),
            seed=0,
            base=dataclasses.replace(base, source=None),
        )


def test_settings_without_effect_are_told() -> None:
    assert without_effect(LoraSettings()) == []
    (line,) = without_effect(LoraSettings(patterns="to_q", targets="all"))
    assert line == "The setting targets has no effect: patterns chooses the layers."
    (line,) = without_effect(LoraSettings(lokr_factor=4))
    assert line == "The setting lokr_factor has no effect: the kind is lora, not lokr."
    (line,) = without_effect(LoraSettings(kind="lokr", full_matrix=True, rank=9))
    assert line == "The setting rank has no effect: the factors of this LoKr are whole matrices."


def test_a_rank_that_makes_a_lokr_whole_is_told() -> None:
    """The large factors of FLUX.1's attention have a side of 64, those of its feed-forward 128."""

    def told(rank: int, full_matrix: bool = False) -> list[str]:
        settings = LoraSettings(
            kind="lokr", rank=rank, patterns="attn.to_q, ff.net.0", full_matrix=full_matrix
        )
        return rank_without_effect(FLUX_DEV, settings)

    assert told(31) == []
    (some,) = told(32)
    assert some.startswith("On 57 of 76 layers rank, alpha and rslora have no effect: ")
    (every,) = told(64)
    assert every.startswith("On 76 of 76 layers ")
    assert told(64, full_matrix=True) == rank_without_effect(FLUX_DEV, LoraSettings(rank=64)) == []


# From a file


@pytest.mark.parametrize(
    ("kind", "format"),
    [
        (kind, format)
        for kind in KINDS
        for format in ("ours", "comfyui", "kohya")
        if kind in PLAIN or format != "kohya"  # which has LoKrs and LoHas of q, k and v as one
    ],
)
def test_a_training_goes_on_from_a_file(
    loaded: LoadedFlux, tmp_path: Path, kind: str, format: str
) -> None:
    settings = KINDS[kind]
    first = build_transformer(loaded.store, loaded.config, torch.float32)
    tensors = file_tensors(trained_like(first, settings, loaded).state(), settings)
    if format != "ours":
        tensors = exported(parse_flux_lora(tensors), format)
    save_lora(tmp_path / "start.safetensors", tensors, {})
    going_on = settings_from(tmp_path / "start.safetensors", LoraSettings(targets="tiny"))
    assert (going_on.kind, going_on.dora) == (settings.kind, settings.dora)
    second = build_transformer(loaded.store, loaded.config, torch.float32)
    lora = attach_lora(second, going_on, seed=0, base=loaded)
    assert torch.max(torch.abs(velocity_of(second) - velocity_of(first))) <= 1e-5
    learned = sum(parameter.numel() for parameter in lora.parameters.values())
    assert num_parameters(loaded.config, going_on) == learned
    third = pipeline()
    if settings.kind == "lora":
        save_lora(tmp_path / "next.safetensors", file_tensors(lora.state(), going_on), {})
        third.load_lora_weights(tmp_path, weight_name="next.safetensors")
        assert torch.max(torch.abs(velocity_of(third.transformer) - velocity_of(second))) <= 1e-4


def test_rank_and_alpha_are_those_of_the_file(loaded: LoadedFlux, tmp_path: Path) -> None:
    transformer = build_transformer(loaded.store, loaded.config, torch.float32)
    settings = LoraSettings(rank=6, alpha=3.0)
    tensors = file_tensors(trained_like(transformer, settings, loaded).state(), settings)
    save_lora(tmp_path / "start.safetensors", tensors, {})
    going_on = settings_from(tmp_path / "start.safetensors", LoraSettings(init="pissa"))
    assert (going_on.rank, going_on.alpha, going_on.init) == (6, 3.0, "gaussian")
    second = build_transformer(loaded.store, loaded.config, torch.float32)
    state = attach_lora(second, going_on, seed=0).state()
    again = file_tensors(state, going_on)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)


def test_a_file_of_another_size_or_changed_is_a_sentence(
    loaded: LoadedFlux, tmp_path: Path
) -> None:
    path = tmp_path / "start.safetensors"
    transformer = build_transformer(loaded.store, loaded.config, torch.float32)
    settings = LoraSettings(rank=2)
    tensors = file_tensors(trained_like(transformer, settings, loaded).state(), settings)
    deeper = {name.replace("blocks.0.", "blocks.9."): tensor for name, tensor in tensors.items()}
    save_lora(path, deeper, {})
    other = build_transformer(loaded.store, loaded.config, torch.float32)
    with pytest.raises(ValueError, match=r"^The LoRA to start from has 7 layers that this model"):
        attach_lora(other, settings_from(path, LoraSettings()), seed=0)
    going_on = settings_from(path, LoraSettings())
    save_lora(path, tensors, {})
    with pytest.raises(ValueError, match=r"'start.safetensors', was changed since"):
        attach_lora(other, going_on, seed=0)
    path.unlink()
    with pytest.raises(ValueError, match=r"start.safetensors', is not there"):
        attach_lora(other, going_on, seed=0)
    wide = {n: torch.cat([t] * 2, -1) if "lora_A" in n else t for n, t in tensors.items()}
    wide = {n: torch.cat([t] * 2) if "lora_B" in n else t for n, t in wide.items()}
    save_lora(path, wide, {})
    with pytest.raises(ValueError, match=r"^The LoRA to start from does not fit this model"):
        attach_lora(other, settings_from(path, LoraSettings()), seed=0)
    save_lora(path, {"lora_unet_input_blocks_1.lora_down.weight": torch.ones(2, 2)}, {})
    with pytest.raises(ValueError, match=r"not made for FLUX.1|is not whole"):
        settings_from(path, LoraSettings())


# Runs


RESUMED = {
    "dora": dataclasses.replace(KINDS["dora"], dropout=0.2),
    "pissa": dataclasses.replace(KINDS["pissa"], dropout=0.2),
    "lokr": KINDS["lokr"],
    "loha": KINDS["loha"],
}


@pytest.mark.parametrize("kind", RESUMED)
def test_a_stopped_run_goes_on_to_the_same_bits(
    loaded: LoadedFlux, tmp_path: Path, kind: str
) -> None:
    data = training_data(tmp_path / "caches")
    whole, parts = (
        dataclasses.replace(job(4, checkpoint_every=every), lora=RESUMED[kind]) for every in (9, 1)
    )
    expected = train(open_run(tmp_path / "whole", whole, loaded, data), loaded, data, whole)
    run = open_run(tmp_path / "parts", parts, loaded, data)
    with pytest.raises(Stop):
        train(run, loaded, data, parts, stop_before(2))
    resumed = open_run(tmp_path / "parts", parts, loaded, data)
    assert_same_lora(train(resumed, loaded, data, parts), expected)
    assert len(set(expected.losses)) == 4


def test_what_a_lora_starts_from_makes_another_run(loaded: LoadedFlux, tmp_path: Path) -> None:
    """Its content does, not where it lies."""
    data = training_data(tmp_path / "caches")
    network = build_transformer(loaded.store, loaded.config, torch.float32)
    tensors = file_tensors(trained_like(network, KINDS["lora"], loaded).state(), KINDS["lora"])
    doubled = {name: tensor * 2 for name, tensor in tensors.items()}
    names = set()
    for file, content in (("a", tensors), ("b", tensors), ("c", doubled)):
        path = tmp_path / f"{file}.safetensors"
        save_lora(path, content, {})
        settings = dataclasses.replace(job(2), lora=settings_from(path, LoraSettings()))
        run = open_run(tmp_path, settings, loaded, data)
        names.add(run.name)
        trained = train(run, loaded, data, settings)
        assert lora_settings(run.folder).start_hash == settings.lora.start_hash
        path.unlink()
        assert_same_lora(train(run, loaded, data, settings), trained)  # answered from disk
    assert len(names) == 2


def test_a_run_with_own_ranks_is_read_back_as_it_was(loaded: LoadedFlux, tmp_path: Path) -> None:
    settings = dataclasses.replace(job(1), lora=KINDS["own ranks"])
    run = open_run(tmp_path, settings, loaded, training_data(tmp_path / "caches"))
    run.create()
    assert lora_settings(run.folder) == KINDS["own ranks"]


# Memory


@pytest.mark.parametrize("kind", KINDS)
def test_the_memory_of_what_learns_is_foreseen(loaded: LoadedFlux, kind: str) -> None:
    work = Workload(
        width=64,
        height=64,
        prompt_length=16,
        batch_size=1,
        lora=dataclasses.replace(KINDS[kind], dropout=0.1),
        dtype=torch.float32,
        gradient_checkpointing=True,
        accumulates=False,
    )
    network = build_transformer(loaded.store, loaded.config, torch.float32)
    lora = attach_lora(network, KINDS[kind], seed=0, base=loaded)
    taken = [*lora.parameters.values(), *network.buffers()]
    estimate = estimate_training(loaded.config, "bf16", work)
    assert estimate.adapters == sum(tensor.nbytes for tensor in taken)


def test_the_memory_of_some_blocks_is_theirs() -> None:
    """Also of those that the small networks have not which are computed for it."""
    config = dataclasses.replace(FLUX_DEV, hidden_size=256, context_dim=128, vector_dim=64)
    for changes in ({"targets": "tiny"}, {"blocks": "double_blocks.7-9"}):
        settings = LoraSettings(**changes)
        work = Workload(
            width=64,
            height=64,
            prompt_length=16,
            batch_size=1,
            lora=settings,
            dtype=torch.float32,
            gradient_checkpointing=True,
            accumulates=False,
        )
        wanted = 4 * num_parameters(config, settings)
        assert abs(estimate_training(config, "bf16", work).adapters - wanted) <= 1
