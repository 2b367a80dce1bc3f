"""Our encoders against diffusers and transformers, on small random networks."""

import json
from pathlib import Path
from typing import Any

import comfy.text_encoders.flux
import pytest
import torch
from atelier.nodes.encoders import (
    build_clip,
    build_vae,
    cut_texts,
    latent_encoder,
    prompt_encoder,
)
from diffusers import AutoencoderKL, FluxPipeline
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

SHIFT, SCALE = 0.1159, 0.3611

CAPTIONS = [
    "",
    "a cat",
    "a (cat:1.3) and ((a dog)) [fish], \\(brackets\\) {x|y} BREAK <lora:z:1>",
    "embedding:badhands and embedding:x",
    "ein Kätzchen, 猫, кошка, 🐈",
    "  spaces \n and\tlines  ",
    " ".join(f"word{number}" for number in range(60)),  # more than 77 tokens of CLIP and of T5
    "cat " * 700,  # more than 512 tokens
]


def save_vae(folder: Path, **options: Any) -> AutoencoderKL:
    torch.manual_seed(0)
    small = {"block_out_channels": (32, 32, 64, 64), "layers_per_block": 1}
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=16,
        **{**small, **options},
    )
    vae.save_pretrained(folder / "vae")
    return vae.eval()


def save_text_encoders(folder: Path) -> tuple[CLIPTextModel, T5EncoderModel]:
    torch.manual_seed(0)
    clip = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            hidden_act="quick_gelu",
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            d_model=48,
            d_kv=8,
            d_ff=64,
            num_heads=6,
            num_layers=2,
            vocab_size=32128,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )
    clip.save_pretrained(folder / "text_encoder")
    t5.save_pretrained(folder / "text_encoder_2")
    return clip.eval(), t5.eval()


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("text")


@pytest.fixture(scope="module")
def pipeline(text_folder: Path) -> FluxPipeline:
    """diffusers' pipeline of the two text encoders, with ComfyUI's tokenizer files."""
    text_encoder, text_encoder_2 = save_text_encoders(text_folder)
    tokenizers = comfy.text_encoders.flux.FluxTokenizer()
    tokenizers.clip_l.tokenizer.model_max_length = 77  # ComfyUI's file says 8192, FLUX's 77
    return FluxPipeline(
        scheduler=None,
        vae=None,
        transformer=None,
        text_encoder=text_encoder,
        tokenizer=tokenizers.clip_l.tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizers.t5xxl.tokenizer,
    )


@pytest.fixture(scope="module")
def clip(pipeline: FluxPipeline, text_folder: Path) -> Any:
    return build_clip(text_folder)


@pytest.mark.parametrize("length", [77, 512])
@pytest.mark.parametrize("caption", CAPTIONS, ids=lambda caption: caption[:20])
def test_prompts_equal_those_of_diffusers(
    pipeline: FluxPipeline, clip: Any, caption: str, length: int
) -> None:
    expected, expected_pooled, _ = pipeline.encode_prompt(
        prompt=caption, prompt_2=None, max_sequence_length=length, device="cpu"
    )
    encode, _ = prompt_encoder(clip, length)
    prompt_embeds, pooled = encode([caption])
    assert prompt_embeds.shape == (1, length, 48)
    torch.testing.assert_close(prompt_embeds, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pooled, expected_pooled, atol=1e-5, rtol=1e-5)


def test_a_batch_of_prompts_equals_single_ones(clip: Any) -> None:
    encode, _ = prompt_encoder(clip, 77)
    together = encode(CAPTIONS)
    for index, caption in enumerate(CAPTIONS):
        for batch, single in zip(together, encode([caption]), strict=True):
            torch.testing.assert_close(batch[index], single[0], atol=1e-5, rtol=1e-5)


def test_a_clip_with_its_options_changed_encodes_the_same(clip: Any) -> None:
    encode, _ = prompt_encoder(clip, 77)
    expected = encode(["a cat"])
    changed = clip.clone()
    changed.cond_stage_model.set_clip_options({"layer": -2, "projected_pooled": True})
    for left, right in zip(prompt_encoder(changed, 77)[0](["a cat"]), expected, strict=True):
        assert torch.equal(left, right)


def test_results_are_ordinary_tensors_although_nodes_run_in_inference_mode(
    clip: Any, tmp_path: Path
) -> None:
    save_vae(tmp_path)
    with torch.inference_mode():
        prompts = prompt_encoder(clip, 77)[0](["a cat"])
        latents = latent_encoder(build_vae(tmp_path))[0](torch.zeros(1, 3, 64, 64))
    assert not any(tensor.is_inference() for tensor in (*prompts, *latents))


def test_texts_that_do_not_fit_are_found(clip: Any) -> None:
    """By what the CLIP encodes: without its last word, a text that is cut gives the same."""
    for length in (77, 512):
        encode, _ = prompt_encoder(clip, length)
        found = cut_texts(tuple(CAPTIONS), length)
        for caption in CAPTIONS[-2:]:
            shorter = caption.strip().rpartition(" ")[0]
            is_same = torch.equal(encode([caption])[0], encode([shorter])[0])
            assert is_same == (caption in found)
    assert found == [CAPTIONS[-1]]


class WrongClip:
    """The parts of ComfyUI's CLIP of Stable Diffusion 1.5, SDXL and SD3 that tell them apart."""

    def __init__(self, **parts: Any) -> None:
        self.cond_stage_model = type("Networks", (), parts)()


class Masked:
    enable_attention_masks = True


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        WrongClip(clip_l=object()),
        WrongClip(clip_l=object(), clip_g=object()),
        WrongClip(clip_l=None, t5xxl=Masked()),
        WrongClip(clip_l=object(), t5xxl=Masked()),
    ],
)
def test_a_clip_of_the_wrong_kind_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"This CLIP is not FLUX's.*DualCLIPLoader"):
        prompt_encoder(wrong, 77)


@pytest.mark.parametrize("length", [0, 7, 513])
def test_a_length_out_of_range_is_refused(clip: Any, length: int) -> None:
    with pytest.raises(ValueError, match=f"between 8 and 512 tokens, got {length}"):
        prompt_encoder(clip, length)


def test_the_identity_of_a_clip_is_that_of_its_weights(clip: Any, text_folder: Path) -> None:
    identity = prompt_encoder(clip, 77)[1]
    assert prompt_encoder(build_clip(text_folder), 512)[1] == identity
    changed = build_clip(text_folder)
    with torch.no_grad():
        changed.cond_stage_model.t5xxl.transformer.encoder.final_layer_norm.weight[-1] += 0.5
    assert prompt_encoder(changed, 77)[1] != identity


@pytest.mark.parametrize("strengths", [(1.0, 0.5)])
def test_a_lora_on_the_clip_changes_its_identity(clip: Any, strengths: tuple) -> None:
    name = "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
    identities = {prompt_encoder(clip, 77)[1]}
    for strength in strengths:
        patched = clip.clone()
        assert patched.add_patches({name: ("diff", (torch.ones(64, 32),))}, strength)
        identities.add(prompt_encoder(patched, 77)[1])
    assert len(identities) == 3


@pytest.mark.parametrize("missing", ["text_encoder", "text_encoder_2"])
def test_a_folder_without_a_text_encoder_is_refused(
    pipeline: FluxPipeline, text_folder: Path, tmp_path: Path, missing: str
) -> None:
    other = {"text_encoder", "text_encoder_2"} - {missing}
    for part in other:
        (tmp_path / part).symlink_to(text_folder / part)
    with pytest.raises(ValueError, match=f"has no complete {missing} folder"):
        build_clip(tmp_path)


def expected_latents(vae: AutoencoderKL, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        distribution = vae.encode(pixels).latent_dist
    return (distribution.mean - SHIFT) * SCALE, distribution.std * SCALE


@pytest.mark.parametrize("size", [(1, 3, 64, 64), (2, 3, 48, 80)])
def test_latents_equal_those_of_diffusers(tmp_path: Path, size: tuple[int, ...]) -> None:
    reference = save_vae(tmp_path)
    pixels = torch.rand(size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    encode, _ = latent_encoder(build_vae(tmp_path))
    for ours, expected in zip(encode(pixels), expected_latents(reference, pixels), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_latents_of_flux_own_shape_equal_those_of_diffusers(tmp_path: Path) -> None:
    """FLUX.1's autoencoder has no quant_conv, and ComfyUI builds another class for it."""
    shape = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
    reference = save_vae(tmp_path, **shape, use_quant_conv=False, use_post_quant_conv=False)
    vae = build_vae(tmp_path)
    assert not hasattr(vae.first_stage_model, "quant_conv")
    pixels = torch.rand((1, 3, 32, 48), generator=torch.Generator().manual_seed(1)) * 2 - 1
    for ours, expected in zip(
        latent_encoder(vae)[0](pixels), expected_latents(reference, pixels), strict=True
    ):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


LARGE = [(1, 3, 512, 128), (2, 3, 128, 320)]


@pytest.mark.parametrize("shape", LARGE)
def test_a_tile_equals_what_diffusers_gives_for_it(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Where only the first tile lies: the others begin 64 pixels, 8 latents, further."""
    reference = save_vae(tmp_path)
    pixels = torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    encode, _ = latent_encoder(build_vae(tmp_path), tile=128)
    first = expected_latents(reference, pixels[..., :128, :128])
    for ours, expected in zip(encode(pixels), first, strict=True):
        assert ours.shape == (shape[0], 16, shape[2] // 8, shape[3] // 8)
        torch.testing.assert_close(ours[..., :8, :8], expected[..., :8, :8], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", LARGE)
def test_the_middle_of_a_tile_is_as_in_the_whole_picture(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    """The attention and the norms of a VAE see all of a tile, so this needs a picture whose parts
    are alike: a pattern of 8 pixels."""
    save_vae(tmp_path)
    vae = build_vae(tmp_path)
    pattern = torch.rand((1, 3, 8, 8), generator=torch.Generator().manual_seed(1)) * 2 - 1
    pixels = pattern.repeat(shape[0], 1, shape[2] // 8, shape[3] // 8)
    whole, tiled = (latent_encoder(vae, tile)[0](pixels) for tile in (0, 128))
    for expected, ours in zip(whole, tiled, strict=True):
        middle = (..., slice(6, 10), slice(6, 10))
        assert (ours - expected)[middle].abs().max() < 0.1 * expected.abs().max()


def test_pictures_no_larger_than_a_tile_are_encoded_whole(tmp_path: Path) -> None:
    save_vae(tmp_path)
    vae = build_vae(tmp_path)
    pixels = torch.rand((1, 3, 128, 64), generator=torch.Generator().manual_seed(1)) * 2 - 1
    for whole, ours in zip(
        latent_encoder(vae)[0](pixels), latent_encoder(vae, 128)[0](pixels), strict=True
    ):
        assert torch.equal(whole, ours)


def test_the_mean_is_what_vae_encode_gives_to_the_model(tmp_path: Path) -> None:
    import comfy.latent_formats

    save_vae(tmp_path)
    vae = build_vae(tmp_path)
    picture = torch.rand((1, 64, 64, 3), generator=torch.Generator().manual_seed(1))
    expected = comfy.latent_formats.Flux().process_in(vae.encode(picture))
    mean, _ = latent_encoder(vae)[0](picture.movedim(-1, 1) * 2 - 1)
    torch.testing.assert_close(mean, expected, atol=1e-5, rtol=1e-5)


def test_a_decoder_of_its_own_leaves_the_identity_of_a_vae(tmp_path: Path) -> None:
    save_vae(tmp_path)
    identities = []
    for part in (None, "decoder.conv_in", "encoder.conv_in"):
        vae = build_vae(tmp_path)
        if part:
            with torch.no_grad():
                vae.first_stage_model.get_submodule(part).weight += 1
        identities.append(latent_encoder(vae)[1])
    assert identities[0] == identities[1] != identities[2]


def test_a_vae_of_another_size_is_refused(tmp_path: Path) -> None:
    save_vae(tmp_path)
    vae = build_vae(tmp_path)
    vae.latent_channels = 4
    with pytest.raises(ValueError, match="does not fit FLUX: it gives 4 latent channels"):
        latent_encoder(vae)


@pytest.mark.parametrize("vae", [None, object()])
def test_what_is_no_vae_is_refused(vae: Any) -> None:
    with pytest.raises(ValueError, match=r"does not fit FLUX.*Load ae\.safetensors with Load VAE"):
        latent_encoder(vae)


def test_a_folder_without_a_vae_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps({}), encoding="utf-8")
    with pytest.raises(ValueError, match="has no complete vae folder"):
        build_vae(tmp_path)
