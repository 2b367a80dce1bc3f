"""LoRA files of every trainer, and their exports, do the same in ComfyUI and in diffusers.

What is compared: ComfyUI's own loader and arithmetic on its own FLUX, and diffusers' loader and
peft's on a plain transformer. Neither knows this pack.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Iterator
from pathlib import Path

import comfy.lora
import comfy.sd
import executor
import pytest
import torch
from atelier.nodes.native import build_model
from atelier.trainers.flux_lora import FluxLora, parse_flux_lora
from atelier.trainers.load import load_flux
from atelier.trainers.lora_export import FORMATS, exported, merged, resized
from atelier.trainers.lora_file import read_lora
from atelier.trainers.lora_metadata import save_export
from atelier.trainers.lora_names import comfy_names
from atelier.trainers.lora_settings import LORA_TARGETS
from core_flux import core_model_of
from dense import dense_transformer, stored_tensors, to_diffusers
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.loaders import lora_conversion_utils, lora_pipeline
from drawing import draw
from flux_files import write_flux
from lora_keys import LISTS, shapes_of, written_by
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

WIDTH = 256
LORAS = [name for name in LISTS if not name.endswith(("_lycoris", "_dora", "_loha"))]
PLAIN = functools.cache(lambda: stored_tensors("bf16"))
core = functools.cache(lambda: core_model_of(PLAIN()))


@pytest.fixture(scope="module", autouse=True)
def networks_end_before_python_does() -> Iterator[None]:
    """ComfyUI's patchers need its modules when they go."""
    yield
    core.cache_clear()
    executor.forget_networks()


def in_comfyui(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """FLUX's weights by original names, patched by ComfyUI."""
    patched, _ = comfy.sd.load_lora_for_models(core(), None, tensors, 1.0, 0.0)
    weights = dict(PLAIN())
    for key, patches in patched.patches.items():
        name = key.removeprefix("diffusion_model.")
        weights[name] = comfy.lora.calculate_weight(patches, weights[name].clone(), key)
    return weights


def in_diffusers(path: Path, clip: CLIPTextModel | None = None) -> dict[str, Tensor]:
    """The weights of diffusers' transformer, or of CLIP-L, with the LoRA fused by peft."""
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=dense_transformer({name: t.clone() for name, t in PLAIN().items()}),
        text_encoder=clip,
        **dict.fromkeys(("vae", "tokenizer", "text_encoder_2", "tokenizer_2")),
    )
    pipeline.load_lora_weights(path.parent, weight_name=path.name)
    part = "text_encoder" if clip else "transformer"
    pipeline.fuse_lora(components=[part])
    pipeline.unload_lora_weights()
    return {k: v.detach().clone() for k, v in getattr(pipeline, part).state_dict().items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-6, msg=name)


@pytest.fixture
def diffusers_of_this_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its converter of original names knows only FLUX.1-dev's width."""
    name = "_convert_kohya_flux_lora_to_diffusers"
    source = inspect.getsource(getattr(lora_conversion_utils, name))
    assert "[3072, 3072, 3072, 12288]" in source
    scope = dict(vars(lora_conversion_utils))
    exec(source.replace("[3072, 3072, 3072, 12288]", str([*[WIDTH] * 3, 4 * WIDTH])), scope)
    monkeypatch.setattr(lora_pipeline, name, scope[name])


@pytest.mark.parametrize("trainer", LISTS)
def test_comfyui_reads_every_tensor_of_every_trainer(
    trainer: str, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = comfy_names(written_by(trainer))
    with caplog.at_level(logging.WARNING):
        model, clip = comfy.sd.load_lora_for_models(core(), executor.nano_clip(), tensors, 1.0, 1.0)
    assert [r.message for r in caplog.records if "not loaded" in r.message.lower()] == []
    num_patches = sum(len(p) for p in (*model.patches.values(), *clip.patcher.patches.values()))
    assert num_patches == len(parse_flux_lora(tensors).adapters + parse_flux_lora(tensors).text)


@pytest.mark.parametrize("trainer", LORAS)
def test_every_export_of_a_lora_does_the_same_in_comfyui(trainer: str) -> None:
    tensors = written_by(trainer)
    expected = in_comfyui(comfy_names(tensors))
    assert any(not torch.equal(expected[name], PLAIN()[name]) for name in expected)
    for format in FORMATS:
        assert_equal(in_comfyui(exported(parse_flux_lora(tensors), format)), expected)


@pytest.mark.parametrize(
    ("trainer", "format"),
    [
        *((trainer, "comfyui") for trainer in LISTS if trainer not in LORAS),
        *(("onetrainer_dora", "kohya"), ("lycoris_loha", "kohya"), ("lycoris_loha", "diffusers")),
    ],
)
def test_an_export_of_another_kind_does_the_same_in_comfyui(trainer: str, format: str) -> None:
    tensors = written_by(trainer)
    found = in_comfyui(exported(parse_flux_lora(tensors), format))
    assert_equal(found, in_comfyui(comfy_names(tensors)))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("trainer", ["ai_toolkit", "kohya", "comfyui", "onetrainer_omi", "xlabs"])
def test_an_export_does_the_same_in_diffusers(
    trainer: str, format: str, tmp_path: Path, diffusers_of_this_width: None
) -> None:
    adapters = parse_flux_lora(written_by(trainer)).adapters
    if format != "diffusers":  # its converter forgets the prefix of other modules: they do nothing
        adapters = tuple(a for a in adapters if a.name.startswith(("double", "single")))
    lora = FluxLora(adapters=adapters, rest={})
    path = tmp_path / "lora.safetensors"
    save_export(path, exported(lora, format), {"modelspec.architecture": "flux-1-dev/lora"})
    expected = in_comfyui(exported(lora, "comfyui"))
    assert_equal(in_diffusers(path), to_diffusers(expected))


def ours(targets: str, rank: int = 4) -> dict[str, Tensor]:
    """A LoRA on one of our choices of layers, as Train LoRA writes it."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for name, module in dense_transformer(dict(PLAIN())).named_modules():
        if "blocks." in name and name.endswith(tuple(f".{end}" for end in LORA_TARGETS[targets])):
            rows, columns = module.weight.shape
            for part, shape in (("A", (rank, columns)), ("B", (rows, rank))):
                values = 0.05 * torch.randn(shape, generator=generator)
                tensors[f"transformer.{name}.lora_{part}.weight"] = values
            tensors[f"transformer.{name}.alpha"] = torch.tensor(float(rank))
    return tensors


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("targets", sorted(LORA_TARGETS.keys() - {"tiny", "nano"}))
def test_a_lora_of_ours_keeps_its_strength_in_diffusers(
    targets: str, format: str, tmp_path: Path, diffusers_of_this_width: None
) -> None:
    tensors = ours(targets)
    path = tmp_path / "lora.safetensors"
    made = exported(parse_flux_lora(tensors), format)
    save_export(path, made, {})
    assert_equal(in_diffusers(path), to_diffusers(in_comfyui(comfy_names(tensors))))
    back = exported(parse_flux_lora(made), "diffusers")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def test_different_ranks_keep_their_strength_in_diffusers_own_format(tmp_path: Path) -> None:
    tensors = ours("all") | {n: t for n, t in ours("qlora", rank=2).items() if ".to_out.0" in n}
    path = tmp_path / "lora.safetensors"
    save_export(path, exported(parse_flux_lora(tensors), "diffusers"), {})
    assert_equal(in_diffusers(path), to_diffusers(in_comfyui(comfy_names(tensors))))


def test_diffusers_fails_at_a_dora_in_some_modules_only(tmp_path: Path) -> None:
    """Why such an export is refused."""
    whole = exported(parse_flux_lora(written_by("peft_dora")), "diffusers")
    magnitudes = [name for name in whole if name.endswith("lora_magnitude_vector")]
    path = tmp_path / "lora.safetensors"
    save_export(path, {n: t for n, t in whole.items() if n != magnitudes[0]}, {})
    with pytest.raises(RuntimeError, match="device meta"):
        in_diffusers(path)


def test_diffusers_reads_the_part_for_clip_at_its_strength(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    clip = CLIPTextModel(CLIPTextConfig(**sizes, num_hidden_layers=2, vocab_size=100))
    generator = torch.Generator().manual_seed(0)
    tensors, deltas = ours("qlora"), {}
    for layer, alpha in enumerate((4.0, 1.0)):
        module = f"encoder.layers.{layer}.self_attn.q_proj"
        down, up = (torch.randn(s, generator=generator) for s in ((4, 64), (64, 4)))
        name = f"lora_te1_text_model_{module.replace('.', '_')}"
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
        deltas[f"{module}.weight"] = alpha / 4 * up @ down
    path = tmp_path / "lora.safetensors"
    save_export(path, exported(parse_flux_lora(tensors), "diffusers"), {})
    plain = {name: t.clone() for name, t in clip.state_dict().items()}
    fused = in_diffusers(path, clip)
    for name, tensor in plain.items():
        delta = next((d for end, d in deltas.items() if name.endswith(end)), None)
        expected = tensor if delta is None else tensor + delta
        torch.testing.assert_close(fused[name], expected, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("trainer", ["simpletuner_comfyui", "kohya", "xlabs"])
def test_there_and_back_is_the_first(trainer: str) -> None:
    first = exported(parse_flux_lora(written_by(trainer)), "diffusers")
    for format in ("comfyui", "kohya"):
        there = exported(parse_flux_lora(first), format)
        back = exported(parse_flux_lora(there), "diffusers")
        assert back.keys() == first.keys()
        assert all(torch.equal(back[name], tensor) for name, tensor in first.items())


@pytest.mark.parametrize("format", FORMATS)
def test_the_picture_is_the_same_with_every_export(format: str, tmp_path: Path) -> None:
    loaded = load_flux(write_flux(tmp_path / "flux.safetensors"), format="nf4")
    embeds = torch.randn(1, 20, 128, generator=torch.Generator().manual_seed(0))
    positive = [[embeds, {"pooled_output": embeds[:, 0, :64], "guidance": 2.5}]]

    def latents(tensors: dict[str, Tensor]) -> Tensor:
        model, _ = comfy.sd.load_lora_for_models(
            build_model(loaded, torch.float32), None, tensors, 1.0, 0.0
        )
        with torch.inference_mode():
            return draw(model, positive, steps=3)

    tensors = written_by("simpletuner_comfyui")
    path = tmp_path / "lora.safetensors"
    save_export(path, exported(parse_flux_lora(tensors), format), {})
    expected, found = latents(tensors), latents(dict(read_lora(path)))
    assert torch.max(torch.abs(expected - latents({}))) > 0.01
    assert torch.max(torch.abs(found - expected)) <= 1e-4


@pytest.mark.parametrize(
    ("trainer", "format"),
    [
        *(("kohya", "kohya"), ("diffsynth_opensource", "kohya"), ("comfyui", "comfyui")),
        *(("simpletuner_comfyui", "diffusers"), ("peft_dora", "diffusers")),
        *((trainer, "diffusers") for trainer in ("diffusers", "ai_toolkit", "simpletuner")),
    ],
)
def test_an_export_has_the_names_and_shapes_that_trainers_write(trainer: str, format: str) -> None:
    found = shapes_of(exported(parse_flux_lora(written_by(trainer)), format))
    without_alphas = {name: shape for name, shape in found.items() if not name.endswith(".alpha")}
    expected = LISTS[trainer]["tensors"]
    assert found == expected or without_alphas == expected


def test_a_merge_is_the_sum_of_what_its_parts_do() -> None:
    parts = [("kohya", 0.7), ("ai_toolkit", -1.2), ("lycoris_loha", 0.5)]
    found = in_comfyui(
        exported(merged([(parse_flux_lora(written_by(n)), w) for n, w in parts]), "comfyui")
    )
    expected = dict(PLAIN())
    for trainer, weight in parts:
        alone = in_comfyui(comfy_names(written_by(trainer)))
        expected = {n: t + weight * (alone[n] - PLAIN()[n]) for n, t in expected.items()}
    assert_equal(found, expected)


@pytest.mark.parametrize("trainer", ["kohya", "lycoris_loha", "simpletuner_lycoris"])
def test_a_lora_of_a_smaller_rank_is_the_nearest_one(trainer: str) -> None:
    tensors, rank = comfy_names(written_by(trainer)), 3
    found = in_comfyui(exported(resized(parse_flux_lora(tensors), rank), "diffusers"))
    whole = in_comfyui(tensors)
    for adapter in parse_flux_lora(tensors).adapters:
        name, rows = f"{adapter.name}.weight", adapter.rows
        plain = PLAIN()[name][rows].double()
        u, s, v = torch.linalg.svd(whole[name][rows].double() - plain, full_matrices=False)
        nearest = (u[:, :rank] * s[:rank]) @ v[:rank]
        torch.testing.assert_close(found[name][rows] - plain, nearest, rtol=0, atol=2e-5)
