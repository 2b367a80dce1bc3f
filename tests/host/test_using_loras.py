"""Apply LoRA and the LoRA Mixer, on our MODEL and on ComfyUI's own: what they draw is compared with
ComfyUI's loader, with its advanced sampler, and with peft's set_adapters."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import comfy.hooks
import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.supported_models
import executor
import folder_paths
import pytest
import torch
from atelier.nodes import host, loaders
from atelier.nodes.lora import ApplyLora, LoraMixer
from atelier.nodes.lora_choice import FROM_WIRE, NONE
from atelier.nodes.native import build_model
from atelier.nodes.native_lora import add_lora, apply_lora
from atelier.nodes.native_ranges import SamplingRange
from atelier.nodes.trainable import base_flux
from atelier.trainers.adapters import lora_metadata, save_lora
from atelier.trainers.block_weights import parse_block_weights
from atelier.trainers.load import load_flux
from atelier.trainers.lora_file import LoraTensors, read_lora
from atelier.trainers.lora_settings import LoraSettings
from core_flux import core_model
from core_models import sd_15, without_bytes
from dense import dense_transformer, stored_tensors
from executor import Give, Keep, Runner
from flux_files import write_flux
from graphs import Graph, node
from lora_files import ATTENTION, KINDS, PROJ, QKV, lora_tensors, write_loras
from torch import Tensor

FORMAT, STEPS, SHAPE = "nf4", 4, (1, 16, 8, 8)
CPU = torch.device("cpu")
TE = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def flux_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_flux(tmp_path_factory.mktemp("flux") / "flux.safetensors")


@pytest.fixture(scope="module")
def models(flux_file: Path) -> Iterator[dict[str, Any]]:
    ours = build_model(load_flux(flux_file, format=FORMAT), torch.float32)
    yield {"ours": ours, "core": core_model(FORMAT)}
    comfy.model_management.unload_all_models()
    executor.forget_networks()


@pytest.fixture(params=["ours", "core"])
def model(models: dict[str, Any], request: pytest.FixtureRequest) -> Any:
    return models[request.param]


@pytest.fixture
def loras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of ComfyUI's LoRAs, with one of each kind."""
    write_loras(tmp_path)
    entry = ([str(tmp_path)], {".safetensors"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", entry)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


def prompts(hooks: comfy.hooks.HookGroup | None = None) -> tuple[list, list]:
    """A positive and a negative one; the hooks are the positive's."""
    generator = torch.Generator().manual_seed(3)
    both = []
    for options in ({"hooks": hooks} if hooks else {}, {}):
        embeds = torch.randn(1, 20, 128, generator=generator)
        pooled = torch.randn(1, 64, generator=generator)
        both.append([[embeds, {"pooled_output": pooled, "guidance": 3.5, **options}]])
    return both[0], both[1]


def drawn(
    model: Any,
    latents: Tensor | None = None,
    *,
    steps: tuple[int, int] = (0, STEPS),
    cfg: float = 1.0,
    hooks: comfy.hooks.HookGroup | None = None,
) -> Tensor:
    """What KSampler (Advanced) draws in some of the steps, with noise at the first."""
    empty = torch.zeros(SHAPE)
    noise = comfy.sample.prepare_noise(empty, 5) if latents is None else torch.zeros(SHAPE)
    with torch.inference_mode():
        return comfy.sample.sample(
            model,
            noise,
            STEPS,
            cfg,
            "euler",
            "simple",
            *prompts(hooks),
            empty if latents is None else latents,
            disable_noise=latents is not None,
            start_step=steps[0],
            last_step=steps[1],
            force_full_denoise=steps[1] == STEPS,
            disable_pbar=True,
            seed=5,
        )


def by_core(model: Any, tensors: Tensors, strength: float = 1.0) -> Any:
    """The same as ComfyUI's own loader puts it on."""
    return comfy.sd.load_lora_for_models(model, None, tensors, strength, 0.0)[0]


def state_of(model: Any) -> Tensors:
    comfy.model_management.unload_all_models()
    return {name: tensor.clone() for name, tensor in model.model.state_dict().items()}


def close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= 1e-5 * other.abs().max())


RANGES = {"the start": (0.0, 0.5), "the end": (0.5, 1.0), "the middle": (0.25, 0.75)}


@pytest.mark.parametrize(
    ("part", "kind", "cfg"),
    [("the start", "plain", 1.0), ("the end", "plain", 3.0), ("the middle", "lokr", 1.0)],
)
def test_a_range_draws_what_two_advanced_samplers_draw(
    model: Any, part: str, kind: str, cfg: float
) -> None:
    start, end = RANGES[part]
    tensors, before = lora_tensors(kind), state_of(model)
    span = SamplingRange(start_percent=start, end_percent=end)
    ranged = drawn(apply_lora(model, tensors, 0.8, span=span).model, cfg=cfg)
    with_lora, latents = by_core(model, tensors, 0.8), None
    borders = [0, int(start * STEPS), int(end * STEPS), STEPS]
    for index, steps in enumerate(pairwise(borders)):
        if steps[0] < steps[1]:
            chosen = with_lora if index == 1 else model
            latents = drawn(chosen, latents, steps=steps, cfg=cfg)
    assert close(ranged, latents)
    for other in (model, with_lora):
        assert not torch.allclose(ranged, drawn(other, cfg=cfg), rtol=1e-3)
    after = state_of(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_two_ranges_that_meet_are_one_lora(model: Any) -> None:
    tensors = lora_tensors("plain")
    twice = model
    for start, end in ((0.0, 0.5), (0.5, 1.0)):
        span = SamplingRange(start_percent=start, end_percent=end)
        twice = apply_lora(twice, tensors, 0.8, span=span).model
    assert close(drawn(twice), drawn(by_core(model, tensors, 0.8)))


def computed_with(model: Any, sampler: str, **options: float) -> tuple[list[float], list[bool]]:
    """The sigma of each computation of a sampling, and whether a LoRA on `QKV` was on in it."""
    layer = model.model.get_submodule(QKV)
    matrix = layer.patched_weight if hasattr(layer, "patched_weight") else layer.weight.clone
    comfy.model_management.unload_all_models()
    before, sigmas, on = matrix(), [], []

    def look(network: Any, args: dict) -> Tensor:
        sigmas.append(float(args["timestep"].max()))
        on.append(not torch.equal(matrix(), before))
        return network(args["input"], args["timestep"], **args["c"])

    looked = model.clone()
    looked.set_model_unet_function_wrapper(look)
    schedule = comfy.samplers.calculate_sigmas(
        model.get_model_object("model_sampling"), "simple", STEPS
    )
    kind, empty = comfy.samplers.ksampler(sampler, options), torch.zeros(SHAPE)
    torch.manual_seed(5)  # of the noise between steps
    with torch.inference_mode():
        noise = comfy.sample.prepare_noise(empty, 5)
        comfy.sample.sample_custom(
            looked, noise, 1.0, kind, schedule, *prompts(), empty, disable_pbar=True, seed=5
        )
    return sigmas, on


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "seeds_2"])
def test_each_computation_of_a_step_is_on_or_off_by_its_own_sigma(model: Any, sampler: str) -> None:
    span = SamplingRange(start_percent=0.25, end_percent=0.5)
    ranged = apply_lora(model, lora_tensors("without_alpha"), 1.0, span=span).model
    sigmas, on = computed_with(ranged, sampler)
    sampling = model.get_model_object("model_sampling")
    first, last = (sampling.percent_to_sigma(percent) for percent in (0.25, 0.5))
    assert len(sigmas) > STEPS
    assert on == [last + 1e-3 < sigma < first + 1e-3 for sigma in sigmas]
    assert any(on)


def test_a_range_from_the_start_holds_where_noise_lifts_the_first_sigma(model: Any) -> None:
    span, tensors = SamplingRange(end_percent=0.5), lora_tensors("without_alpha")
    ranged = apply_lora(model, tensors, 1.0, span=span).model
    sigmas, on = computed_with(ranged, "euler", s_churn=2.0)
    last = model.get_model_object("model_sampling").percent_to_sigma(0.5)
    assert sigmas[0] > 1.01
    assert on == [sigma > last + 1e-3 for sigma in sigmas]


def test_a_range_acts_beside_a_prompt_with_a_hook(model: Any) -> None:
    """The hook's LoRA is on the positive prompt only; over the whole sampling two ranges, which
    are compared with the same LoRA without a range."""
    other, tensors = lora_tensors("without_alpha"), lora_tensors("plain")
    hooks = comfy.hooks.create_hook_lora(other, 0.7, 0.0)
    ranged = model
    for start, end in ((0.0, 0.25), (0.25, 1.0)):
        span = SamplingRange(start_percent=start, end_percent=end)
        ranged = apply_lora(ranged, tensors, 0.8, span=span).model
    expected = drawn(by_core(model, tensors, 0.8), cfg=3.0, hooks=hooks)
    assert close(drawn(ranged, cfg=3.0, hooks=hooks), expected)
    assert not torch.allclose(drawn(ranged, cfg=3.0), expected, rtol=1e-3)


def test_training_refuses_a_range(model: Any) -> None:
    span = SamplingRange(end_percent=0.5)
    with pytest.raises(ValueError, match="acts in a part of the sampling only"):
        base_flux(apply_lora(model, lora_tensors("plain"), 1.0, span=span).model)


@pytest.mark.parametrize(("start", "end"), [(0.5, 0.5), (0.7, 0.2), (-0.1, 1.0), (0.0, 1.1)])
def test_a_range_that_holds_nothing_is_one_sentence(start: float, end: float) -> None:
    with pytest.raises(ValueError, match=f"got {start} to {end}. Set start_percent below"):
        SamplingRange(start_percent=start, end_percent=end)


def test_block_weights_are_those_of_a_lora_scaled_by_hand(model: Any) -> None:
    tensors = {**lora_tensors("plain"), **lora_tensors("lokr")}
    scaled = dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith("lora_B.weight"):
            scaled[name] = tensor * (0.5 if "single" in name else -2.0)
        if "lokr" in name:
            del scaled[name]
    weights = parse_block_weights("double_blocks: -2\n*_attn.proj: 0\nsingle_blocks.0-3: 0.5")
    applied = apply_lora(model, tensors, 0.8, block_weights=weights)
    assert close(drawn(applied.model), drawn(by_core(model, scaled, 0.8)))
    assert applied.idle_patterns == ()


def test_a_block_weight_of_no_layer_is_one_sentence(model: Any) -> None:
    weights = parse_block_weights("double_blocks: 1\nsingle_blocks.38: 0")
    with pytest.raises(ValueError, match=r"'single_blocks.38' matches no layer of this MODEL"):
        apply_lora(model, lora_tensors("plain"), 1.0, block_weights=weights)


def test_a_block_weight_that_the_lora_does_not_need_is_told(model: Any) -> None:
    weights = parse_block_weights("img_mlp: 0\nimg_attn: 0.5")
    applied = apply_lora(model, lora_tensors("plain"), 1.0, block_weights=weights)
    assert applied.idle_patterns == ("img_mlp",)


def text_lora() -> Tensors:
    generator = torch.Generator().manual_seed(4)
    fc1 = executor.nano_clip().cond_stage_model.clip_l.transformer.get_submodule(
        "text_model.encoder.layers.0.mlp.fc1"
    )
    return {
        f"{TE}.lora_down.weight": torch.randn(4, fc1.in_features, generator=generator),
        f"{TE}.lora_up.weight": torch.randn(fc1.out_features, 4, generator=generator),
        f"{TE}.alpha": torch.tensor(2.0),
    }


def encoded(clip: Any) -> Tensor:
    with torch.inference_mode():
        (_, options), *_ = clip.encode_from_tokens_scheduled(clip.tokenize("a red cat"))
    return options["pooled_output"]


def test_a_clip_gets_what_the_core_loader_gives_it(models: dict[str, Any]) -> None:
    tensors, clip = {**lora_tensors("plain"), **text_lora()}, executor.nano_clip()
    applied = apply_lora(models["ours"], tensors, 1.0, clip=clip, strength_clip=0.3)
    _, expected = comfy.sd.load_lora_for_models(models["ours"], clip, tensors, 1.0, 0.3)
    assert torch.equal(encoded(applied.clip), encoded(expected))
    assert not torch.allclose(encoded(applied.clip), encoded(clip), rtol=1e-2)
    assert (applied.num_layers, applied.num_text_layers, applied.num_left) == (3, 1, 0)


def test_layers_for_text_encoders_are_told_where_no_clip_is(models: dict[str, Any]) -> None:
    tensors = {**lora_tensors("plain"), **text_lora()}
    applied = apply_lora(models["ours"], tensors, 1.0)
    assert (applied.num_left, applied.unknown, applied.clip) == (1, (), None)
    with pytest.raises(ValueError, match="of text encoders only"):
        apply_lora(models["ours"], text_lora(), 1.0)


def of_block(number: int) -> Tensors:
    return {
        name.replace("blocks.0", f"blocks.{number}"): tensor
        for name, tensor in lora_tensors("plain").items()
    }


def test_a_few_unknown_layers_are_told_and_the_others_applied(model: Any) -> None:
    unknown = {name: one for name, one in of_block(7).items() if "to_q" in name}
    applied = apply_lora(model, {**lora_tensors("plain"), **unknown}, 0.8)
    assert applied.unknown == ("transformer.transformer_blocks.7.attn.to_q",)
    assert close(drawn(applied.model), drawn(by_core(model, lora_tensors("plain"), 0.8)))


def test_half_of_the_layers_unknown_is_one_sentence(model: Any) -> None:
    with pytest.raises(
        ValueError, match=r"3 of the 6 layers of the LoRA .* are not in .*blocks\.7"
    ):
        apply_lora(model, {**lora_tensors("plain"), **of_block(7)}, 1.0)


def test_a_lora_of_another_architecture_is_one_sentence(model: Any) -> None:
    name = "lora_unet_input_blocks_1_1_proj_in"
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 9)}
    tensors[f"{name}.lora_up.weight"] = torch.ones(9, 2)
    with pytest.raises(ValueError, match=f"changes nothing in this MODEL: .*'{name}'"):
        apply_lora(model, tensors, 1.0)


OTHER_WIDTHS: dict[str, Tensors] = {
    "lora": {f"{QKV}.lora_A.weight": torch.ones(2, 384), f"{QKV}.lora_B.weight": torch.ones(9, 2)},
    "lokr": {f"{QKV}.lokr_w1": torch.ones(4, 4), f"{QKV}.lokr_w2": torch.ones(192, 65)},
    "difference": {f"{QKV}.diff": torch.ones(768, 384)},
    "loha": {
        **{f"{QKV}.hada_w{n}_a": torch.ones(768, 2) for n in (1, 2)},
        **{f"{QKV}.hada_w{n}_b": torch.ones(2, 384) for n in (1, 2)},
    },
}


@pytest.mark.parametrize("kind", OTHER_WIDTHS)
def test_a_lora_of_other_widths_is_one_sentence(model: Any, kind: str) -> None:
    with pytest.raises(ValueError, match=r"for another model: its '.*qkv\.weight' is"):
        apply_lora(model, OTHER_WIDTHS[kind], 1.0)


DORAS: dict[str, Tensors] = {
    "lora": {
        f"{QKV}.lora_A.weight": torch.ones(2, 256),
        f"{QKV}.lora_B.weight": torch.ones(768, 2),
    },
    "lokr": {f"{QKV}.lokr_w1": torch.ones(4, 4), f"{QKV}.lokr_w2": torch.ones(192, 64)},
    "loha": {
        **{f"{QKV}.hada_w{n}_a": torch.ones(768, 2) for n in (1, 2)},
        **{f"{QKV}.hada_w{n}_b": torch.ones(2, 256) for n in (1, 2)},
    },
}


@pytest.mark.parametrize("kind", DORAS)
def test_magnitudes_that_do_not_fit_are_one_sentence(model: Any, kind: str) -> None:
    for shape in ((768, 1), (1, 256)):
        fits = {f"{QKV}.dora_scale": torch.ones(shape)}
        assert apply_lora(model, DORAS[kind] | fits, 1.0).num_layers == 1
    scale = {f"{QKV}.dora_scale": torch.ones(256, 1)}
    with pytest.raises(ValueError, match=r"qkv\.weight' have the shape \[256, 1\], and 768 x 1 or"):
        apply_lora(model, DORAS[kind] | scale, 1.0)


def test_an_oft_draws_what_it_draws_by_the_core_loader(models: dict[str, Any]) -> None:
    blocks = 0.3 * torch.randn(8, 32, 32, generator=torch.Generator().manual_seed(2))
    tensors = {f"{PROJ}.oft_blocks": blocks, f"{PROJ}.rescale": torch.full((256, 1), 1.2)}
    applied = apply_lora(models["ours"], tensors, 0.8)
    assert (applied.num_layers, applied.unknown) == (1, ())
    expected = drawn(by_core(models["core"], tensors, 0.8))
    assert close(drawn(applied.model), expected)
    assert not torch.allclose(expected, drawn(models["core"]), rtol=1e-3)


@pytest.mark.parametrize("end", ["lora_B.bias", "lora_B.default.bias"])
def test_pefts_biases_are_one_sentence(model: Any, end: str) -> None:
    """ComfyUI's loader leaves them out without a word."""
    tensors = {**lora_tensors("plain"), f"{ATTENTION}.to_q.{end}": torch.ones(256)}
    with pytest.raises(ValueError, match=f"with lora_bias of peft, .*to_q.{end}"):
        apply_lora(model, tensors, 1.0)


SPELLINGS = {
    "that ComfyUI reads": "lora_unet_double_blocks_0_img_attn_proj",
    "of diffusers": "transformer.transformer_blocks.0.attn.to_out.0",
    "of XLabs": "double_blocks.0.processor.proj_lora1",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_one_matrix_under_two_names_is_one_sentence(model: Any, spelling: str) -> None:
    tensors = {f"{PROJ}.lora_A.weight": torch.ones(4, 256)}
    tensors[f"{PROJ}.lora_B.weight"] = torch.ones(256, 4)
    twice = dict(tensors)
    for name, tensor in tensors.items():
        end = {"lora_A.weight": "down.weight", "lora_B.weight": "up.weight"}[name[-13:]]
        dot = "." if "XLabs" in spelling else ".lora_"
        twice[f"{SPELLINGS[spelling]}{dot}{end}"] = tensor
    assert apply_lora(model, tensors, 1.0).num_layers == 1
    with pytest.raises(ValueError, match="has two tensors for the same matrix"):
        apply_lora(model, twice, 1.0)


def control_lora() -> Tensors:
    """As Black Forest Labs' for Canny and Depth, whose picture doubles the channels of `img_in`."""
    generator, tensors = torch.Generator().manual_seed(6), {}
    for name, columns in (("img_in", 128), ("double_blocks.0.img_attn.proj", 256)):
        for end, shape in (("A.weight", (4, columns)), ("B.weight", (256, 4)), ("B.bias", (256,))):
            tensors[f"{name}.lora_{end}"] = torch.randn(shape, generator=generator)
    for norm in ("query_norm", "key_norm"):
        tensors[f"single_blocks.0.norm.{norm}.scale"] = torch.ones(128)
    return tensors


def test_a_control_lora_on_our_model_is_one_sentence(models: dict[str, Any]) -> None:
    """Each loader's own; on ComfyUI's MODEL it is what ComfyUI's loader makes of it."""
    tensors = LoraTensors(control_lora(), name="canny")
    with pytest.raises(ValueError, match="The LoRA 'canny' is a control LoRA"):
        apply_lora(models["ours"], tensors, 1.0)
    with pytest.raises(ValueError, match=r"A control LoRA .* makes its .*'img_in' larger"):
        drawn(by_core(models["ours"], tensors))
    on_core = apply_lora(models["core"], tensors, 1.0)
    assert on_core.model.patches.keys() == by_core(models["core"], tensors).patches.keys()
    assert (on_core.num_layers, on_core.unknown) == (4, ())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_lora_draws_what_it_draws_by_the_core_loader(
    models: dict[str, Any], kind: str
) -> None:
    tensors = lora_tensors(kind)
    ours = drawn(add_lora(models["ours"], tensors, 0.8))
    assert close(ours, drawn(by_core(models["core"], tensors, 0.8)))


OTHER_KINDS = {
    "ltxv": lambda: without_bytes(
        comfy.supported_models.LTXV,
        {"image_model": "ltxv", "num_layers": 1, "attention_head_dim": 64},
    ),
    "ace": lambda: without_bytes(
        comfy.supported_models.ACEStep, {"audio_model": "ace", "num_layers": 1}
    ),
}
"""Models with modules that FLUX also has, by other names in ComfyUI."""


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_a_lora_of_another_kind_of_model_is_on_all_of_its_layers(kind: str) -> None:
    model, tensors = OTHER_KINDS[kind](), {}
    for name, layer in model.model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            tensors[f"{name}.lora_A.weight"] = torch.ones(1, layer.in_features)
            tensors[f"{name}.lora_B.weight"] = torch.ones(layer.out_features, 1)
    applied = apply_lora(model, tensors, 1.0)
    assert applied.model.patches.keys() == by_core(model, tensors).patches.keys()
    assert (applied.num_layers, applied.unknown) == (len(tensors) // 2, ())


def test_a_lora_of_sd_15_goes_through_comfyuis_own_names() -> None:
    """Its patches are those of ComfyUI's loader; the network has no bytes."""
    model = sd_15()
    kohya = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {
        f"{kohya}.lora_down.weight": torch.ones(4, 320),
        f"{kohya}.lora_up.weight": torch.ones(320, 4),
        f"{kohya}.alpha": torch.tensor(1.0),
        "lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight": torch.ones(4, 320, 3, 3),
        "lora_unet_down_blocks_0_resnets_0_conv1.lora_up.weight": torch.ones(320, 4, 1, 1),
    }
    weights = parse_block_weights("input_blocks.1-3: 0.5")
    ours = apply_lora(model, tensors, 1.0, block_weights=weights)
    theirs = by_core(model, tensors, 0.5)
    assert ours.num_layers == 2
    assert ours.model.patches.keys() == theirs.patches.keys()
    for key, [(strength, adapter, *rest)] in theirs.patches.items():
        [(our_strength, our_adapter, *our_rest)] = ours.model.patches[key]
        assert (our_strength, our_rest) == (strength, rest)
        pairs = zip(our_adapter.weights, adapter.weights, strict=True)
        assert all(one is other or one == other for one, other in pairs)
    with pytest.raises(ValueError, match="changes nothing in this MODEL"):
        apply_lora(model, lora_tensors("plain"), 1.0)


@pytest.mark.parametrize("prefix", ["unet.", "", "base_model.model."])
@pytest.mark.parametrize("ends", ["lora_A.weight lora_B.weight", "lora.down.weight lora.up.weight"])
def test_a_lora_of_sd_15_that_diffusers_wrote(prefix: str, ends: str) -> None:
    """It changes what ComfyUI's loader changes by the older names, which it reads."""
    model, tensors, older = sd_15(), {}, {}
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    for layer, old in (
        ("attn1.to_q", "attn1.processor.to_q"),
        ("attn2.to_out.0", "attn2.processor.to_out"),
        ("ff.net.2", "ff.net.2"),
    ):
        columns = 1280 if "ff" in layer else 320
        for end, shape in zip(ends.split(), ((4, columns), (320, 4)), strict=True):
            tensors[f"{prefix}{block}.{layer}.{end}"] = torch.ones(shape)
            older[f"unet.{block}.{old}.{end}"] = torch.ones(shape)
    applied = apply_lora(model, tensors, 1.0)
    assert applied.model.patches.keys() == by_core(model, older).patches.keys()
    assert (applied.num_layers, applied.unknown) == (3, ())


class Called:
    """A node as ComfyUI calls it, and what it shows."""

    def __init__(self, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shown: list[str] = []
        monkeypatch.setattr(host, "show_text", lambda text, _: self.shown.extend(text.split("\n")))
        hidden = {"hidden": type("Hidden", (), {"unique_id": "1"})}
        self._kind = type(kind.__name__, (kind,), hidden)
        inputs = kind.GET_SCHEMA().inputs
        self._defaults = {one.id: one.default for one in inputs if hasattr(one, "default")}
        self._defaults = {k: v for k, v in self._defaults.items() if v is not None}

    def outputs(self, model: Any, **inputs: Any) -> tuple:
        return self._kind.execute(model, **{**self._defaults, **inputs}).args

    def __call__(self, model: Any, **inputs: Any) -> Any:
        return self.outputs(model, **inputs)[0]


@pytest.fixture
def apply(monkeypatch: pytest.MonkeyPatch) -> Called:
    return Called(ApplyLora, monkeypatch)


@pytest.fixture
def mix(monkeypatch: pytest.MonkeyPatch) -> Called:
    return Called(LoraMixer, monkeypatch)


def test_apply_lora_says_what_the_file_says_and_what_is_odd(
    models: dict[str, Any], loras: Path, apply: Called, flux_file: Path
) -> None:
    base = load_flux(flux_file, format="int8")
    settings = LoraSettings(rank=4, alpha=2.0)
    run = {"train": {"guidance": 3.5}}
    said = lora_metadata(name="cats", settings=settings, base=base, steps=250, run=run)
    said["modelspec.trigger_phrase"] = "ohwx cat"
    save_lora(loras / "cats.safetensors", {**lora_tensors("plain"), **text_lora()}, said)
    apply(models["ours"], lora_name="cats.safetensors", strength=0.0)
    assert apply.shown[0] == "'cats' is on the MODEL: strength 0, layers: 3."
    assert apply.shown[1:4] == [
        "Trigger words of 'cats': ohwx cat.",
        "'cats' has rank 4 and alpha 2.",
        "'cats' was trained for 250 steps.",
    ]
    odd = "\n".join(apply.shown[4:])
    for part in (
        "'cats' has a strength of 0",
        "Layers of 'cats' for text encoders, which were left out: 1.",
        "on a base in int8, and this MODEL is in nf4",
        "trained with a guidance of 3.5",
    ):
        assert part in odd
    assert len(apply.shown) == 8


def test_a_lora_without_metadata_has_nothing_odd(
    models: dict[str, Any], apply: Called, loras: Path
) -> None:
    apply(models["core"], lora=lora_tensors("without_alpha"))
    assert apply.shown == [
        "The LoRA is on the MODEL: strength 1, layers: 1.",
        "The LoRA has rank 4 and no alpha, so its scale is 1.",
    ]


def test_a_diverged_lora_on_the_wire_is_one_sentence(
    models: dict[str, Any], apply: Called, loras: Path
) -> None:
    tensors = lora_tensors("without_alpha")
    tensors[f"{QKV}.lora_A.weight"][0, 0] = torch.nan
    with pytest.raises(ValueError, match="'on the wire' holds values that are not finite"):
        apply(models["ours"], lora=tensors)


def test_without_a_clip_only_what_wants_one_stops(
    models: dict[str, Any], apply: Called, mix: Called, loras: Path
) -> None:
    for output in (
        apply.outputs(models["ours"], lora_name="plain.safetensors"),
        mix.outputs(models["ours"], lora_1="plain.safetensors"),
    ):
        assert "has no CLIP to give" in output[1].message


def test_two_loras_or_none_are_one_sentence(
    models: dict[str, Any], apply: Called, loras: Path
) -> None:
    with pytest.raises(ValueError, match="has no LoRA"):
        apply(models["ours"], lora_name=FROM_WIRE)
    with pytest.raises(ValueError, match="has two LoRAs"):
        apply(models["ours"], lora_name="plain.safetensors", lora=lora_tensors("plain"))
    assert "is not there any more" in str(ApplyLora.validate_inputs("gone.safetensors"))
    assert ApplyLora.validate_inputs("plain.safetensors") is True


def test_a_mix_is_that_of_pefts_set_adapters(
    models: dict[str, Any], loras: Path, mix: Called
) -> None:
    pytest.importorskip("peft")
    plain = {name: one for name, one in lora_tensors("plain").items() if "alpha" not in name}
    other = {name: one.flip(0) for name, one in plain.items()}
    network = dense_transformer(stored_tensors(FORMAT)).float()
    for number, tensors in enumerate((plain, other)):
        save_lora(loras / f"{number}.safetensors", tensors, {})
        network.load_lora_adapter(tensors, adapter_name=str(number), prefix="transformer")
    network.set_adapters(["0", "1"], [0.8 * 0.5, -0.3 * 0.5])
    mixed = mix(
        models["ours"],
        lora_1="0.safetensors",
        weight_1=0.8,
        lora_4="1.safetensors",
        weight_4=-0.3,
        scale=0.5,
    )
    assert torch.allclose(velocity(mixed), diffusers_velocity(network), atol=1e-4)
    assert not torch.allclose(velocity(mixed), velocity(models["ours"]), atol=1e-2)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(8)
    shapes = ((1, 16, 8, 8), (1, 20, 128), (1, 64))
    latents, embeds, pooled = (torch.randn(shape, generator=generator) for shape in shapes)
    return latents, embeds, pooled


def velocity(model: Any) -> Tensor:
    latents, embeds, pooled = inputs()
    comfy.model_management.load_models_gpu([model])
    with torch.inference_mode():
        return model.model.diffusion_model(
            latents, torch.tensor([0.6]), context=embeds, y=pooled, guidance=torch.tensor([3.5])
        )


def diffusers_velocity(network: Any) -> Tensor:
    latents, embeds, pooled = inputs()
    tokens = latents.view(1, 16, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, 16, 64)
    ids = torch.zeros(4, 4, 3)
    ids[..., 1], ids[..., 2] = torch.arange(4)[:, None], torch.arange(4)[None]
    with torch.no_grad():
        out = network(
            hidden_states=tokens,
            timestep=torch.tensor([0.6]),
            guidance=torch.tensor([3.5]),
            pooled_projections=pooled,
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(20, 3),
            img_ids=ids.reshape(16, 3),
        ).sample
    return out.view(1, 4, 4, 16, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(latents.shape)


def test_an_empty_mix_is_one_sentence(models: dict[str, Any], mix: Called, loras: Path) -> None:
    with pytest.raises(ValueError, match="has no LoRA: choose at least one file"):
        mix(models["ours"], lora_1=NONE)


def test_a_mix_says_which_of_its_loras_does_not_fit(
    models: dict[str, Any], loras: Path, mix: Called
) -> None:
    strange = {"lora_unet_input_blocks_1_1_proj_in.lora_down.weight": torch.ones(2, 9)}
    strange["lora_unet_input_blocks_1_1_proj_in.lora_up.weight"] = torch.ones(9, 2)
    cases = {"strange": strange, "words": text_lora(), "large": OTHER_WIDTHS["lora"]}
    cases["deep"] = {**lora_tensors("plain"), **of_block(7)}
    for name, tensors in cases.items():
        save_lora(loras / f"{name}.safetensors", tensors, {})
        with pytest.raises(ValueError, match=f"LoRA '{name}'"):
            mix(models["ours"], lora_1="plain.safetensors", lora_2=f"{name}.safetensors")


def test_a_file_that_is_in_the_mix_twice_is_told(
    models: dict[str, Any], loras: Path, mix: Called
) -> None:
    name = "plain.safetensors"
    mixed = mix(models["core"], lora_1=name, weight_1=0.5, lora_2=name, weight_2=0.3)
    assert f"'{name}' is in the mix 2 times: its weights add up." in mix.shown
    assert close(drawn(mixed), drawn(by_core(models["core"], lora_tensors("plain"), 0.8)))
    assert "is not there any more" in str(
        LoraMixer.validate_inputs(NONE, NONE, "gone.safetensors", NONE, NONE)
    )


def swap_graph(lora_name: str, strength: float) -> Graph:
    sampler = {"steps": 1, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "seed": 0}
    load = {"model": loaders.NANO, "format": FORMAT, "compute_dtype": "fp32"}
    return {
        "load": node("AtelierLoadQuantizedFlux", **load),
        "lora": node("AtelierApplyLoRA", model=["load", 0], lora_name=lora_name, strength=strength),
        "text": node("Give", name="text"),
        "empty": node("Give", name="empty"),
        "out": node(
            "KSampler",
            model=["lora", 0],
            positive=["text", 0],
            negative=["text", 0],
            latent_image=["empty", 0],
            denoise=1.0,
            **sampler,
        ),
        "keep": node("Keep", value=["out", 0]),
    }


def test_a_swap_between_two_queued_prompts_moves_nothing_and_takes_no_time(
    loras: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nodes

    loaded = []

    def build(flux: Any, dtype: torch.dtype) -> Any:
        loaded.append(build_model(flux, dtype))
        loaded[-1].offload_device = torch.device("cpu", 0)  # not the load device, as on a GPU
        return loaded[-1]

    monkeypatch.setattr(loaders, "build_model", build)
    kinds = {"AtelierApplyLoRA": ApplyLora, "AtelierLoadQuantizedFlux": loaders.LoadQuantizedFlux}
    for name, kind in {"Give": Give, "Keep": Keep, **kinds}.items():
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, name, kind)
    values = {"text": prompts()[0], "empty": {"samples": torch.zeros(SHAPE)}}
    monkeypatch.setattr(Give, "values", values)
    runner = Runner(one_after_the_other=True)
    first = runner.run(swap_graph("plain.safetensors", 0.8))["samples"]
    [model] = loaded
    moved, content = model.store.bytes_moved, model.store.content_hash()
    other = runner.run(swap_graph("plain.safetensors", 0.3))["samples"]
    swapped = runner.run(swap_graph("without_alpha.safetensors", 0.8))["samples"]
    again = runner.run(swap_graph("plain.safetensors", 0.8))["samples"]
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, rtol=1e-3)
    assert not torch.allclose(first, swapped, rtol=1e-3)
    assert loaded == [model]
    assert (model.store.bytes_moved, model.store.content_hash()) == (moved, content)
    times = []
    for strength in (0.1, 0.2, 0.4):
        begin = time.perf_counter()
        patched = add_lora(model, read_lora(loras / "plain.safetensors"), strength)
        comfy.model_management.load_models_gpu([patched])
        times.append(time.perf_counter() - begin)
    assert min(times) <= 0.1
    assert model.store.bytes_moved == moved
