"""References and hidden padding as ComfyUI's own FLUX sees them, and an assistant on the node."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.latent_formats
import comfy.model_management
import executor
import folder_paths
import pytest
import torch
from atelier.nodes import host
from atelier.nodes.encoders import latent_encoder, text_masks, token_ids
from atelier.nodes.lora_scores import Findings, measure_loss
from atelier.nodes.native import build_model
from atelier.nodes.sampling import draw_latents, encode_prompt
from atelier.nodes.session import Asker, Session
from atelier.nodes.trainable import assistant_loras, base_flux
from atelier.nodes.validation import Sampler, Validation
from atelier.trainers.buckets import Resolution
from atelier.trainers.caching import cache_latents
from atelier.trainers.captions import CaptionSettings
from atelier.trainers.config import JobSettings, Length, TrainSettings
from atelier.trainers.data import TrainingData
from atelier.trainers.dataset import Dataset
from atelier.trainers.evaluate import held_out_loss, predict_by
from atelier.trainers.flux import attention_mask, build_transformer, velocity
from atelier.trainers.image_folder import image_folder
from atelier.trainers.load import load_flux
from atelier.trainers.lora_file import LoraTensors
from atelier.trainers.rhythm import NEVER
from comfy_extras.nodes_edit_model import ReferenceLatent
from core_flux import core_model
from executor import nano_clip, nano_vae
from flux_files import write_flux
from lora_files import lora_tensors
from PIL import Image
from torch import Tensor
from training import CONTEXT, TEXT_TOKENS, VECTOR, training_data

SIGMA, GUIDANCE = torch.tensor([0.7, 0.2]), 2.5
NO_SAMPLES = Validation(rhythm=NEVER)


@pytest.fixture(autouse=True)
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    yield tmp_path / "output"
    comfy.model_management.unload_all_models()
    executor.forget_networks()


@pytest.fixture(scope="module")
def flux_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_flux(tmp_path_factory.mktemp("flux") / "flux.safetensors", depth=2, depth_single=2)


def given(*shape: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "latents": torch.randn(2, 16, *shape, generator=generator),
        "prompt_embeds": torch.randn(2, TEXT_TOKENS, CONTEXT, generator=generator),
        "pooled": torch.randn(2, VECTOR, generator=generator),
    }


def native_velocity(values: dict[str, Tensor], **options: Any) -> Tensor:
    """ComfyUI's own network, of its own dense weights."""
    network = core_model("bf16", depth=2, depth_single=2).model.diffusion_model
    with torch.inference_mode():
        return network(
            values["latents"],
            SIGMA,
            context=values["prompt_embeds"],
            y=values["pooled"],
            guidance=torch.full((2,), GUIDANCE),
            **options,
        )


def training_velocity(flux_file: Path, values: dict[str, Tensor], **options: Any) -> Tensor:
    loaded = load_flux(flux_file, format="bf16")
    transformer = build_transformer(loaded.store, loaded.config, torch.float32)
    with torch.no_grad():
        return velocity(transformer, **values, sigma=SIGMA, guidance=GUIDANCE, **options)


@pytest.mark.parametrize("size", [(12, 8), (8, 16), (4, 4)])
def test_a_reference_lies_where_comfyui_puts_it(flux_file: Path, size: tuple[int, int]) -> None:
    """Of the picture's size, of another shape, and smaller."""
    values = given(12, 8)
    reference = torch.randn(2, 16, *size, generator=torch.Generator().manual_seed(1))
    found = training_velocity(flux_file, values, reference=reference)
    expected = native_velocity(values, ref_latents=[reference])
    assert torch.max(torch.abs(found - expected)) <= 1e-5
    assert torch.max(torch.abs(found - training_velocity(flux_file, values))) > 1e-2


def test_hidden_padding_is_an_attention_mask_of_comfyuis(flux_file: Path) -> None:
    values = given(12, 8)
    mask = torch.arange(TEXT_TOKENS) < torch.tensor([[3], [6]])
    found = training_velocity(flux_file, values, text_mask=mask)
    tokens = TEXT_TOKENS + 24
    bias = torch.zeros(2, tokens, tokens)
    for sample, length in enumerate((3, 6)):
        bias[sample, :, length:TEXT_TOKENS] = -torch.inf
    expected = native_velocity(values, attention_mask=bias)
    assert torch.max(torch.abs(found - expected)) <= 1e-5
    assert attention_mask(mask, 24).shape == (2, 1, 1, tokens)


def edits(folder: Path) -> Dataset:
    """A picture of noise, and another one of another shape before it."""
    for name, size, seed in (("after", (96, 64), 0), ("before", (64, 96), 1)):
        noise = torch.rand((*size, 3), generator=torch.Generator().manual_seed(seed))
        (folder / name).mkdir()
        Image.fromarray((noise * 255).to(torch.uint8).numpy()).save(folder / name / "cat.png")
    subset = image_folder(
        folder / "after",
        resolution=Resolution(width=80, height=80, mode="preserved"),
        captions=CaptionSettings(missing="empty"),
        references=folder / "before",
    )
    return Dataset(subsets=(subset,))


def test_a_cached_reference_is_what_reference_latent_gives_the_model(
    tmp_path: Path, flux_file: Path
) -> None:
    """From the file on disk: Load Image, VAE Encode and ReferenceLatent of ComfyUI, whose latents
    its FLUX turns into the model's; then both networks on what was cached."""
    encode, encoder_id = latent_encoder(nano_vae())
    dataset = edits(tmp_path)
    cache = cache_latents(dataset, encode, encoder_id, tmp_path / "cache")
    (entry,) = cache.entries
    assert (entry.reference_width, entry.reference_height) == (entry.height, entry.width)
    picture = Image.open(tmp_path / "before" / "cat.png").convert("RGB")
    size = (entry.reference_width, entry.reference_height)
    resized = picture.resize(size, Image.Resampling.LANCZOS)
    pixels = torch.tensor(list(resized.tobytes()), dtype=torch.float32).view(1, *size[::-1], 3)
    samples = {"samples": nano_vae().encode(pixels / 255)}
    (conditioning,) = ReferenceLatent.execute([[torch.zeros(1), {}]], samples).result
    (latents,) = conditioning[0][1]["reference_latents"]
    expected = comfy.latent_formats.Flux().process_in(latents)
    found = TrainingData(latents=cache, prompts=None).reference(entry.references[0])  # pyright: ignore[reportArgumentType]
    assert found is not None
    torch.testing.assert_close(found[None], expected, atol=1e-4, rtol=1e-4)
    values = given(entry.height // 8, entry.width // 8)
    reference = found[None].expand(2, -1, -1, -1)
    mine = training_velocity(flux_file, values, reference=reference)
    assert torch.max(torch.abs(mine - native_velocity(values, ref_latents=[reference]))) <= 1e-5


CAPTIONS = ["", "a cat", "a painting of a fox, by an unknown artist", "(a:1.2) [b]"]


@pytest.mark.parametrize("length", [8, 77])
def test_masks_are_those_of_the_t5_tokenizer(length: int) -> None:
    tokenizer = nano_clip().tokenizer.t5xxl.tokenizer
    padding = {"padding": "max_length", "truncation": True, "max_length": length}
    expected = tokenizer(CAPTIONS, **padding)["attention_mask"]
    masks = text_masks(CAPTIONS, length)
    assert masks.tolist() == expected
    ids = torch.tensor(token_ids(nano_clip().tokenizer.t5xxl, CAPTIONS, length))
    assert torch.equal(ids * masks, ids)  # what is hidden is the padding, 0


def test_a_score_sees_references_and_masks_as_training_does(
    tmp_path: Path, flux_file: Path
) -> None:
    """Score LoRA's loss on ComfyUI's network is that on the training network."""
    data = training_data(tmp_path / "caches", ((64, 64), (64, 96)))
    (subset,) = data.latents.subsets
    one, two = subset.entries
    entries = (
        dataclasses.replace(one, references=two.keys, reference_width=64, reference_height=96),
        dataclasses.replace(two, references=one.keys, reference_width=64, reference_height=64),
    )
    masks = {entry.text: f"mask {entry.text}" for entry in data.prompts.entries}
    from training import write_entries

    mask = (torch.arange(TEXT_TOKENS) < 5).to(torch.uint8)
    write_entries(tmp_path / "caches", {key: {"mask": mask} for key in masks.values()})
    latents = dataclasses.replace(
        data.latents, subsets=(dataclasses.replace(subset, entries=entries),)
    )
    prompts = dataclasses.replace(
        data.prompts,
        entries=tuple(dataclasses.replace(e, mask=masks[e.text]) for e in data.prompts.entries),
    )
    data = TrainingData(latents=latents, prompts=prompts)
    loaded = load_flux(flux_file, format="bf16")
    model, findings = build_model(loaded, torch.float32), Findings()
    tensors = LoraTensors(lora_tensors("plain"))
    measure_loss(findings, model, data, tensors, strength=0.0, guidance=GUIDANCE)
    network = build_transformer(loaded.store, loaded.config, torch.float32)
    predict = predict_by(network, guidance=GUIDANCE, dtype=torch.float32)
    expected = held_out_loss(predict, data, device=torch.device("cpu"))
    assert findings.values["loss"]["base"] == pytest.approx(expected, rel=1e-4)


def job(num_steps: int = 2) -> JobSettings:
    values: dict[str, Any] = {"gradient_accumulation": 1, "compute_dtype": "fp32"}
    return JobSettings(name="test", length=Length(amount=num_steps), train=TrainSettings(**values))


def assistant(kind: str = "plain") -> LoraTensors:
    return LoraTensors(lora_tensors(kind))


def test_an_assistant_trains_as_the_same_lora_on_the_model_and_is_not_on_the_output(
    tmp_path: Path, flux_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses are those of a MODEL with the LoRA on it; the MODEL itself stays without."""
    from atelier.nodes.native_lora import add_lora

    shown: list[str] = []
    monkeypatch.setattr(host, "show_text", lambda text, node_id: shown.append(text))
    data = training_data(tmp_path / "caches")
    model = build_model(load_flux(flux_file, format="bf16"), torch.float32)
    asker = Asker(node_id="1")
    assisted = Session(model, data, job(), asker, NO_SAMPLES, assistant=assistant()).train()
    carried = add_lora(model, assistant(), 1.0)
    expected = Session(carried, data, job(), asker, NO_SAMPLES).train()
    alone = Session(model, data, job(), asker, NO_SAMPLES).train()
    assert assisted.losses == expected.losses
    assert assisted.losses != alone.losses
    assert "The assistant computes along in the training, and at no other time." in shown[0]
    assert not base_flux(model).frozen
    assert len({assisted.run_id, expected.run_id, alone.run_id}) == 3


@pytest.mark.parametrize("is_core", [False, True], ids=["ours", "core"])
def test_an_assistant_fits_models_of_both_kinds(flux_file: Path, is_core: bool) -> None:
    loaded = load_flux(flux_file, format="bf16")
    model = (
        core_model("bf16", depth=2, depth_single=2)
        if is_core
        else build_model(loaded, torch.float32)
    )
    base = base_flux(model)
    loras = assistant_loras(model, base, assistant())
    assert {lora.name for lora in loras} <= {
        name.removesuffix(".weight") for name in base.store.packed
    }
    assert len(loras) > 0


def test_an_assistant_that_is_no_plain_lora_is_refused(flux_file: Path) -> None:
    model = build_model(load_flux(flux_file, format="bf16"), torch.float32)
    with pytest.raises(ValueError, match="only plain LoRAs can assist a training"):
        assistant_loras(model, base_flux(model), assistant("lokr"))


def test_a_prompt_with_hidden_padding_draws_as_a_shorter_one(flux_file: Path) -> None:
    """ComfyUI's own sampling, and its own network: the mask enlarged to the picture's tokens is as
    if the padding were cut off."""
    from atelier.nodes.masked_text import MaskedTextEncode

    model, text = core_model("bf16", depth=2, depth_single=2), "a red circle"
    (conditioning,) = MaskedTextEncode.execute(nano_clip(), text, GUIDANCE).result
    ((embeds, options),) = conditioning
    pooled = torch.randn(1, VECTOR, generator=torch.Generator().manual_seed(0))
    length = int(text_masks([text], embeds.shape[1]).sum())
    assert 3 <= length < 20 < embeds.shape[1]
    masked = [[embeds, {**options, "pooled_output": pooled}]]
    plain = {"pooled_output": pooled, "guidance": GUIDANCE}
    drawn = [
        draw_latents(
            model, one, one, width=64, height=48, sampler=Sampler(steps=2), show=lambda _: None
        )
        for one in (masked, [[embeds[:, :length], plain]], [[embeds, plain]])
    ]
    assert torch.max(torch.abs(drawn[0] - drawn[1])) <= 1e-4
    assert torch.max(torch.abs(drawn[0] - drawn[2])) > 1e-2


def test_padding_is_hidden_of_prompts_with_t5_only() -> None:
    clip = SimpleNamespace(tokenize=lambda text: {"l": [[(49406, 1.0)]]})
    with pytest.raises(ValueError, match="this CLIP has no T5"):
        encode_prompt(clip, "a cat", 1.0, hides_padding=True)
