"""Every kind of LoRA in ComfyUI's own loader and in Apply LoRA (DESIGN I2, I4)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import comfy.sd
import executor
import folder_paths
import pytest
import torch
from atelier.nodes import host
from atelier.nodes.lora_settings import LoraSettingsNode
from atelier.nodes.native import build_model
from atelier.nodes.native_lora import add_lora
from atelier.trainers.adapters import attach_lora, file_tensors, save_lora
from atelier.trainers.flux import build_transformer, velocity
from atelier.trainers.flux_lora import parse_flux_lora
from atelier.trainers.load import LoadedFlux, load_flux
from atelier.trainers.lora_export import FORMATS, exported
from atelier.trainers.lora_file import read_lora
from atelier.trainers.lora_settings import LoraSettings
from executor import Runner
from flux_files import write_flux
from lora_kinds import KINDS, trained_like
from torch import Tensor, nn

SIGMA, GUIDANCE = torch.tensor([0.7, 0.2]), 2.5


@pytest.fixture(scope="module")
def flux_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_flux(tmp_path_factory.mktemp("flux") / "flux.safetensors")


@pytest.fixture(scope="module")
def loaded(flux_file: Path) -> LoadedFlux:
    return load_flux(flux_file, format="bf16")


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"latents": (2, 16, 12, 8), "prompt_embeds": (2, 20, 128), "pooled": (2, 64)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def live_velocity(transformer: nn.Module) -> Tensor:
    with torch.no_grad():
        return velocity(transformer, **inputs(), sigma=SIGMA, guidance=GUIDANCE)


def native_velocity(model) -> Tensor:
    values = inputs()
    model.load(torch.device("cpu"))
    with torch.inference_mode():
        return model.model.diffusion_model(
            values["latents"],
            SIGMA,
            context=values["prompt_embeds"],
            y=values["pooled"],
            guidance=torch.full((2,), GUIDANCE),
        )


@pytest.mark.parametrize("kind", KINDS)
def test_the_core_loader_and_ours_give_the_live_velocity(
    loaded: LoadedFlux, tmp_path: Path, kind: str
) -> None:
    before = loaded.store.content_hash()
    settings = KINDS[kind]
    transformer = build_transformer(loaded.store, loaded.config, torch.float32)
    base = live_velocity(transformer)
    lora = trained_like(transformer, settings, loaded)
    live = live_velocity(transformer)
    save_lora(tmp_path / "lora.safetensors", file_tensors(lora.state(), settings), {})
    tensors = read_lora(tmp_path / "lora.safetensors")
    model = build_model(loaded, torch.float32)
    by_core, _ = comfy.sd.load_lora_for_models(model, None, dict(tensors), 1.0, 0.0)
    assert torch.max(torch.abs(live - base)) > 0.01
    assert torch.max(torch.abs(native_velocity(by_core) - live)) <= 1e-4
    assert torch.max(torch.abs(native_velocity(add_lora(model, tensors, 1.0)) - live)) <= 1e-4
    for format in FORMATS:
        if settings.kind == "lora" or format == "comfyui":
            other = exported(parse_flux_lora(tensors), format)
            added = native_velocity(add_lora(model, other, 1.0))
            # A DoRA for diffusers has the magnitudes that diffusers reads, and no others.
            if not (settings.dora and format == "diffusers"):
                assert torch.max(torch.abs(added - live)) <= 1e-4
    assert loaded.store.content_hash() == before


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_a_loftq_lora_acts_on_the_format_it_was_trained_on(flux_file: Path, format: str) -> None:
    """From its start on it brings the quantized network nearer to the original."""
    base, original = load_flux(flux_file, format=format), load_flux(flux_file, format="bf16")
    transformer = build_transformer(base.store, base.config, torch.float32)
    quantized = live_velocity(transformer)
    settings = LoraSettings(rank=32, init="loftq", targets="ai-toolkit")
    lora = attach_lora(transformer, settings, seed=0, base=base)
    live = live_velocity(transformer)
    tensors = file_tensors(lora.state(), settings)
    model = add_lora(build_model(base, torch.float32), tensors, 1.0)
    assert torch.max(torch.abs(native_velocity(model) - live)) <= 1e-4
    wanted = live_velocity(build_transformer(original.store, original.config, torch.float32))
    assert (live - wanted).norm() < 0.95 * (quantized - wanted).norm()


# The node


DEFAULTS = {one.id: one.default for one in LoraSettingsNode.GET_SCHEMA().inputs}
SET = {
    **{"kind": "lokr", "rank": 6, "alpha": 3.0, "targets": "all", "blocks": "double_blocks.0-3"},
    **{"patterns": "ff.net", "rank_patterns": "ff.net.2: 8", "dropout": 0.1, "rslora": True},
    **{"init": "default", "lokr_factor": 4, "full_matrix": True},
}


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Runner:
    import nodes

    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "AtelierLoRASettings", LoraSettingsNode)
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "Keep", executor.Keep)
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"})
    )
    folder_paths.filename_list_cache.clear()
    return Runner()


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    texts: list[str] = []
    monkeypatch.setattr(host, "show_text", lambda text, _: texts.append(text))
    return texts


def graph(**inputs: Any) -> dict[str, Any]:
    return {
        "lora": {"class_type": "AtelierLoRASettings", "inputs": {**DEFAULTS, **inputs}},
        "keep": {"class_type": "Keep", "inputs": {"value": ["lora", 0]}},
    }


def test_the_widgets_are_the_settings_and_their_size_is_shown(
    runner: Runner, shown: list[str]
) -> None:
    assert runner.run(graph()) == LoraSettings()
    assert runner.run(graph(**SET)) == LoraSettings(**SET)
    assert runner.run(graph(dora=True, init="gaussian")).dora
    said = [text.splitlines() for text in shown]
    assert said[0] == ["On FLUX.1-dev 4.67 million numbers learn."]
    assert "The setting rank has no effect: the factors of this LoKr are whole matrices." in said[1]


def test_a_file_says_what_it_is(
    runner: Runner, shown: list[str], loaded: LoadedFlux, tmp_path: Path
) -> None:
    transformer = build_transformer(loaded.store, loaded.config, torch.float32)
    settings = KINDS["dora"]
    tensors = file_tensors(trained_like(transformer, settings, loaded).state(), settings)
    save_lora(tmp_path / "start.safetensors", tensors, {})
    found = runner.run(graph(start_from="start.safetensors", targets="all", rank=9))
    assert (found.kind, found.dora, found.rank, found.alpha) == ("lora", True, 4, 2.0)
    assert shown[0].splitlines() == [
        "The file is a DoRA of rank 4 and alpha 2 on 17 layers, which learn on.",
        "The setting targets has no effect: the file to start from says it.",
        "The setting rank has no effect: the file to start from says it.",
    ]


def test_what_a_file_replaces_is_told_and_not_refused(
    runner: Runner, shown: list[str], loaded: LoadedFlux, tmp_path: Path
) -> None:
    transformer = build_transformer(loaded.store, loaded.config, torch.float32)
    settings = LoraSettings(rank=4)
    tensors = file_tensors(trained_like(transformer, settings, loaded).state(), settings)
    save_lora(tmp_path / "start.safetensors", tensors, {})
    changed = {"kind": "lokr", "init": "pissa", "dora": True, "alpha": 9.0, "rslora": True}
    inputs = {"start_from": "start.safetensors", **changed}
    assert LoraSettingsNode.validate_inputs(**{**DEFAULTS, **inputs}) is True
    found = runner.run(graph(**inputs))
    assert (found.kind, found.init, found.dora, found.alpha) == ("lora", "gaussian", False, None)
    said = [line for line in shown[0].splitlines() if " no effect: the file" in line]
    assert [line.split()[2] for line in said] == ["kind", "alpha", "dora", "rslora", "init"]
    runner.run(graph(start_from="start.safetensors", rank=4, alpha=4.0))
    assert "no effect" not in shown[1]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"kind": "lokr", "dora": True}, "^DoRA splits the weights of a plain LoRA, .* is lokr"),
        ({"kind": "loha", "init": "pissa"}, "^The start pissa is one of plain LoRAs"),
        ({"init": "olora", "dora": True}, "^The start olora changes the weights"),
        ({"rank_patterns": "to_q"}, "^Each line of rank_patterns is .* got 'to_q'"),
        ({"rank_patterns": "to_q: 0"}, "rank must be between 1 and 4096, got 0"),
        ({"start_from": "gone.safetensors"}, "'gone.safetensors' is not there any more"),
    ],
)
def test_what_does_not_go_together_is_refused_before_the_graph_runs(
    inputs: dict[str, Any], message: str
) -> None:
    assert re.search(message, str(LoraSettingsNode.validate_inputs(**{**DEFAULTS, **inputs})))


def test_a_linked_input_is_not_judged() -> None:
    assert LoraSettingsNode.validate_inputs(**{**DEFAULTS, "rank_patterns": None}) is True
    assert LoraSettingsNode.validate_inputs(**DEFAULTS) is True
