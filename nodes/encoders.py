"""ComfyUI's VAE and CLIP objects as the encoders of the caches, and both built from a folder.

Shapes: B batch, C latent channels, H W pixels, h w latent size, L text tokens, D width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.model_management
import comfy.sd
import comfy.text_encoders.flux as flux_text_encoders
import comfy.utils
import torch
from comfy.supported_models_base import ClipTarget
from safetensors import safe_open
from torch import Tensor

from ..trainers.caching import EncodePictures, EncodeTexts
from ..trainers.tensor_files import original_name

CLIP_LENGTH = 77
TILE_OVERLAP = 64
"""Pixels by which tiles overlap, as in ComfyUI's own tiled encoding."""
_SAMPLES = 1024


def latent_encoder(vae: Any, tile: int = 0) -> tuple[EncodePictures, str]:
    """The encoder of a FLUX autoencoder and its identity.

    ComfyUI's own `encode` gives only the mean, so the network is called here. Mean and deviation
    are those of the model's latents: shifted and scaled as FLUX expects. Pictures with a side
    longer than `tile` pixels, if that is above 0, are encoded in squares of that side, blended
    where they overlap.

    Raises:
        ValueError: the VAE is of another kind.
    """
    require_flux_vae(vae)
    latent_format, network = comfy.latent_formats.Flux(), vae.first_stage_model

    def encode_whole(pixels: Tensor) -> Tensor:
        """Mean and log-variance [B, 2 C, h, w] of pixels [B, 3, H, W]."""
        moments = network.encoder(_as_input(vae, pixels))
        if hasattr(network, "quant_conv"):  # FLUX's own file has none, diffusers' may
            moments = network.quant_conv(moments)
        return moments.float()

    def encode_tiles(pixels: Tensor) -> Tensor:
        """The same, tile by tile."""
        scale, channels = 1 / vae.downscale_ratio, 2 * vae.latent_channels
        return comfy.utils.tiled_scale(
            pixels, encode_whole, tile, tile, TILE_OVERLAP, scale, channels, vae.output_device
        )

    def encode(pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [B, 3, H, W] in -1..1 to mean and deviation [B, C, h, w], float32 on the CPU."""
        is_tiled = 0 < tile < max(pixels.shape[-2:])
        at_once = (1, 3, tile, tile) if is_tiled else pixels.shape
        memory = vae.memory_used_encode(at_once, vae.vae_dtype)
        comfy.model_management.load_models_gpu([vae.patcher], memory_required=memory)
        with torch.no_grad():
            moments = encode_tiles(pixels) if is_tiled else encode_whole(pixels)
        mean, log_variance = moments.chunk(2, dim=1)
        mean = latent_format.process_in(mean)
        deviation = torch.exp(0.5 * log_variance.clamp(-30, 20)) * latent_format.scale_factor
        return _result(mean), _result(deviation)

    facts = (vae.vae_dtype, latent_format.scale_factor, latent_format.shift_factor)
    return encode, _identity(vae.patcher, facts, lambda name: name.startswith(_VAE_PARTS))


def prompt_encoder(clip: Any, length: int) -> tuple[EncodeTexts, str]:
    """The encoder of FLUX's two text encoders and its identity.

    Texts are taken literally: no weights in brackets, no `embedding:`. T5 gets exactly `length`
    tokens, padded or cut, without an attention mask; CLIP-L gives the pooled vector. This is what
    diffusers' `FluxPipeline.encode_prompt` computes.

    Raises:
        ValueError: the CLIP is of another kind, or the length is not between 8 and 512.
    """
    if not 8 <= length <= 512:
        raise ValueError(f"The prompt length must be between 8 and 512 tokens, got {length}.")
    clip_l, t5xxl = _flux_text_encoders(clip)

    def encode(texts: list[str]) -> tuple[Tensor, Tensor]:
        """B texts to prompt embeddings [B, length, D] and pooled [B, D2], float32 on the CPU."""
        clip.cond_stage_model.reset_clip_options()
        clip.load_model()
        # Newer versions run weights from the CPU and must be told where to compute.
        clip.cond_stage_model.set_clip_options({"execution_device": clip.patcher.load_device})
        with torch.no_grad():
            embeds, _ = t5xxl.encode(token_ids(clip.tokenizer.t5xxl, texts, length))
            _, pooled = clip_l.encode(token_ids(clip.tokenizer.clip_l, texts, CLIP_LENGTH))
        return _result(embeds), _result(pooled)

    loaded = getattr(clip.cond_stage_model, "atelier", None)
    # A state names the packed bytes of a quantized encoder, not their scales: its files tell more.
    facts = (loaded.identity, loaded.format) if loaded is not None else ()
    return encode, _identity(
        clip.patcher, facts, lambda name: not name.endswith(_UNUSED_CLIP_PARTS)
    )


def text_masks(texts: list[str], length: int) -> Tensor:
    """Which of the tokens that `prompt_encoder` gives T5 are those of B texts, their end among
    them: [B, length] uint8, 0 for padding. Needs no CLIP, as `cut_texts`."""
    _, tokens = _t5_tokens(tuple(texts))
    counts = torch.tensor([len(ids) for ids in tokens])
    return (torch.arange(length) < counts[:, None]).to(torch.uint8)


def cut_texts(texts: tuple[str, ...], length: int) -> list[str]:
    """The texts of more than `length` T5 tokens, whose end is not encoded. Needs no CLIP: every
    CLIP of FLUX's kind has this tokenizer."""
    _, tokens = _t5_tokens(texts)
    return [text for text, ids in zip(texts, tokens, strict=True) if len(ids) > length]


def cut_sentences(texts: tuple[str, ...], length: int) -> list[str]:
    """What a user should read of the texts that are cut, if there are any."""
    cut = cut_texts(texts, length)
    if not cut:
        return []
    return [
        f"Captions longer than {length} tokens, whose end is cut off: {len(cut)}, for example "
        f"{cut[0][:60]!r}."
    ]


def unknown_texts(texts: tuple[str, ...]) -> list[str]:
    """The texts with signs that T5 does not know, as Chinese ones: all of them are one token."""
    unknown, tokens = _t5_tokens(texts)
    return [text for text, ids in zip(texts, tokens, strict=True) if unknown in ids]


def _t5_tokens(texts: tuple[str, ...]) -> tuple[int, list[list[int]]]:
    """The token of what is unknown, and those of each text."""
    tokenizer = flux_text_encoders.FluxTokenizer().t5xxl.tokenizer
    return tokenizer.unk_token_id, tokenizer(list(texts))["input_ids"] if texts else []


_VAE_PARTS = ("encoder.", "quant_conv.")
_UNUSED_CLIP_PARTS = ("text_projection.weight", "logit_scale")  # files may lack them


def vae_identity(vae: Any) -> str:
    """SHA-256 over samples of all weights of a VAE, and its dtype."""
    return _identity(vae.patcher, (vae.vae_dtype,), lambda name: True)


def patcher_identity(patcher: Any) -> str:
    """SHA-256 over samples of the weights of a text or vision encoder, but for those that files may
    lack, which are then whatever was in memory."""
    return _identity(patcher, (), lambda name: not name.endswith(_UNUSED_CLIP_PARTS))


def patches_identity(patcher: Any) -> str:
    """SHA-256 over the LoRAs and other patches on a MODEL."""
    digest = hashlib.sha256()
    for name, patches in sorted(patcher.patches.items()):
        digest.update(name.encode())
        for part in _parts(patches):
            digest.update(part)
    return digest.hexdigest()


def require_flux_vae(vae: Any) -> None:
    """Raises ValueError if a VAE is not one of FLUX's kind."""
    network = getattr(vae, "first_stage_model", None)
    if not hasattr(network, "encoder") or vae.latent_dim != 2 or vae.latent_channels != 16:
        channels = getattr(vae, "latent_channels", "no")
        raise ValueError(
            f"This VAE does not fit FLUX: it gives {channels} latent channels, or only a preview; "
            "FLUX needs 16. Load ae.safetensors with Load VAE."
        )


def _as_input(vae: Any, pixels: Tensor) -> Tensor:
    return vae.process_input((pixels + 1) / 2).to(vae.device, vae.vae_dtype)


def _flux_text_encoders(clip: Any) -> tuple[Any, Any]:
    networks = getattr(clip, "cond_stage_model", None)
    clip_l, t5xxl = getattr(networks, "clip_l", None), getattr(networks, "t5xxl", None)
    if clip_l is None or t5xxl is None or t5xxl.enable_attention_masks:
        raise ValueError(
            "This CLIP is not FLUX's, which has two text encoders, CLIP-L and T5-XXL. Load both "
            "with Load Quantized Text Encoders, or with DualCLIPLoader and type flux."
        )
    return clip_l, t5xxl


def token_ids(tokenizer: Any, texts: list[str], length: int) -> list[list[int]]:
    """Literal texts as exactly `length` tokens each, padded or cut, by a tokenizer of ComfyUI's."""
    # The inner tokenizer is transformers' own: ComfyUI's wrapper would read brackets as weights.
    padding = {"padding": "max_length", "truncation": True, "max_length": length}
    return tokenizer.tokenizer(texts, **padding)["input_ids"]


def _result(tensor: Tensor) -> Tensor:
    with torch.inference_mode(False):  # a copy made here is an ordinary tensor
        return tensor.to("cpu", torch.float32, copy=True)


def _identity(patcher: Any, facts: tuple, is_used: Callable[[str], bool]) -> str:
    """SHA-256 over samples of the weights in use, their LoRAs, and `facts`; moving changes none."""
    digest = hashlib.sha256(repr(facts).encode())
    # Not get_key_patches(): newer versions list packed weights by names that are no attributes.
    for name, weight in sorted(patcher.model_state_dict().items()):
        if is_used(name):
            digest.update(name.encode())
            original = patcher.backup[name].weight if name in patcher.backup else weight
            for part in _parts([original, patcher.patches.get(name, [])]):
                digest.update(part)
    return digest.hexdigest()


def _parts(value: Any) -> Iterator[bytes]:
    if isinstance(value, Tensor):
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        yield _sample(value)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _parts(item)
    elif hasattr(value, "weights"):  # a LoRA, LoKr, ... of comfy.weight_adapter
        yield type(value).__name__.encode()
        yield from _parts(value.weights)
    elif not callable(value):
        yield repr(value).encode()


def _sample(tensor: Tensor) -> bytes:
    flat = tensor.detach().reshape(-1)
    step = max(1, flat.numel() // _SAMPLES)
    chosen = (flat[:_SAMPLES], flat[::step], flat[-_SAMPLES:])
    return b"".join(part.cpu().contiguous().view(torch.uint8).numpy().tobytes() for part in chosen)


def build_clip(folder: str | Path) -> Any:
    """A ComfyUI CLIP of FLUX's kind from `text_encoder/` and `text_encoder_2/` of a folder.

    The folder has diffusers' layout; the sizes come from its config.json files and may be any. The
    weights keep their dtype. The tokenizers are ComfyUI's own.

    Raises:
        ValueError: a file or a weight is missing.
    """
    clip_config, clip_tensors = _read_part(folder, "text_encoder")
    clip_weights = {original_name(name): tensor for name, tensor in clip_tensors.items()}
    t5_config, t5_weights = _read_part(folder, "text_encoder_2")
    options = {
        "clip_l_model_config": {name: clip_config[name] for name in _CLIP_SIZES},
        "t5xxl_model_config": {
            **{name: t5_config[name] for name in _T5_SIZES},
            "dense_act_fn": _T5_ACTIVATIONS[t5_config["dense_act_fn"]],
        },
        "dtype": clip_weights["text_model.final_layer_norm.weight"].dtype,
    }
    network = flux_text_encoders.flux_clip(dtype_t5=t5_weights["shared.weight"].dtype)
    target = ClipTarget(flux_text_encoders.FluxTokenizer, network)
    clip = comfy.sd.CLIP(target, model_options=options)
    # ComfyUI's CLIP-L has a projection that FLUX does not use and its files do not hold.
    clip_weights.setdefault("text_projection.weight", torch.eye(clip_config["hidden_size"]))
    for part, weights in (("clip_l", clip_weights), ("t5xxl", t5_weights)):
        _require_complete(getattr(clip.cond_stage_model, part).load_sd(weights), folder, part)
    return clip


def build_vae(folder: str | Path) -> Any:
    """A ComfyUI VAE from `vae/` of a folder in diffusers' layout; its sizes may be any.

    Raises:
        ValueError: a file is missing.
    """
    config, weights = _read_part(folder, "vae")
    if "quant_conv.weight" not in weights:  # FLUX.1's own shape, which ComfyUI recognizes
        return comfy.sd.VAE(sd=weights)
    channels = config["block_out_channels"]
    sizes = {
        "double_z": True,
        "z_channels": config["latent_channels"],
        "resolution": 256,
        "in_channels": config["in_channels"],
        "out_ch": config["out_channels"],
        "ch": channels[0],
        "ch_mult": [width // channels[0] for width in channels],
        "num_res_blocks": config["layers_per_block"],
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    parameters = {"ddconfig": sizes, "embed_dim": config["latent_channels"]}
    vae = comfy.sd.VAE(sd=weights, config={"params": parameters})
    vae.latent_channels = config["latent_channels"]  # a VAE made from a config keeps 4
    return vae


_CLIP_SIZES = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"),
    *("hidden_act", "max_position_embeddings"),
)
_T5_SIZES = (
    *("d_ff", "d_kv", "d_model", "num_heads", "num_layers", "vocab_size"),
    *("is_gated_act", "model_type"),
)
_T5_ACTIVATIONS = {
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
}


def _read_part(folder: str | Path, part: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and all weights (in one or several files) of one sub-folder."""
    path = Path(folder) / part
    files = sorted(path.glob("*.safetensors"))
    if not (path / "config.json").is_file() or not files:
        raise ValueError(
            f"{folder} has no complete {part} folder: it needs config.json and *.safetensors."
        )
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"The file {path / 'config.json'} is damaged. Copy it again.") from None
    weights: dict[str, Tensor] = {}
    for file in files:
        weights.update(comfy.utils.load_torch_file(str(file), safe_load=True))
    return config, weights


def _require_complete(result: Any, folder: str | Path, part: str) -> None:
    if result.missing_keys:
        raise ValueError(
            f"The text encoder {part} in {folder} lacks {len(result.missing_keys)} weights, for "
            f"example {result.missing_keys[0]}. Copy the folder again."
        )


def checkpoint_parts(path: str | Path) -> tuple[Any, Any]:
    """CLIP and VAE of an all-in-one checkpoint, each None if the file does not hold it."""
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
    has_clip = any(name.startswith(("text_encoders.", "cond_stage_model.")) for name in names)
    has_vae = any(name.startswith(("vae.", "first_stage_model.")) for name in names)
    if not has_clip and not has_vae:
        return None, None
    with torch.inference_mode(False):
        _, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(
            str(path), output_vae=has_vae, output_clip=has_clip, output_model=False
        )
    return clip, vae
