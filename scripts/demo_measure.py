"""The demo's measurements, without ComfyUI: loss on held-out pictures, and a judge's opinion."""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from comfy_server import ROOT
from pack import load_module, load_pack
from PIL import Image
from torch import Tensor

NANO = ROOT / "assets" / "nano"
JUDGE = NANO / "judge.safetensors"
OPENMOJI = 3
"""Place of this artwork in the judge's answers."""


@torch.no_grad()
def held_out_losses(
    comfyui: Path,
    run_folder: Path,
    lora_path: Path,
    pictures: list[Image.Image],
    captions: list[str],
) -> dict[str, float]:
    """The loss of a run's base model and of its LoRA on pictures, all on the same noise.

    Computed in float32 on the run's own quantized weights, at its guidance and prompt length.
    `comfyui` is the folder whose tokenizers are used.
    """
    load_pack()
    from atelier.trainers.adapters import attach_lora, load_lora_state
    from atelier.trainers.evaluate import eval_loss
    from atelier.trainers.flux import build_transformer
    from atelier.trainers.job import read_job
    from atelier.trainers.load import load_flux

    job = read_job(run_folder / "job.json")
    base = load_flux(job.model, format=job.format)
    transformer = build_transformer(base.store, base.config, torch.float32)
    latents, length = encode_pictures(pictures), job.data.prompts.length
    right = encode_texts(comfyui, captions, length)
    empty = encode_texts(comfyui, [""] * len(captions), length)

    def loss(texts: tuple[Tensor, Tensor]) -> float:
        return eval_loss(
            transformer,
            latents,
            prompt_embeds=texts[0],
            pooled=texts[1],
            guidance=job.settings.train.guidance,
        )

    losses = {"eval_loss_base": loss(right), "eval_loss_empty_caption": loss(empty)}
    # The file's alpha is folded into its tensors, so that the LoRA's scale is 1 here.
    lora = attach_lora(transformer, dataclasses.replace(job.settings.lora, alpha=None), seed=0)
    lora.load_state(load_lora_state(lora_path))
    return {**losses, "eval_loss_lora": loss(right)}


def encode_pictures(pictures: list[Image.Image]) -> Tensor:
    """The nano model's latents [N, 16, h, w] of RGB pictures of one size."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(NANO / "vae", local_files_only=True).float()
    mean = vae.encode(to_tensor(pictures) * 2 - 1).latent_dist.mean
    return (mean - vae.config.shift_factor) * vae.config.scaling_factor


def encode_texts(comfyui: Path, texts: list[str], length: int) -> tuple[Tensor, Tensor]:
    """The nano model's prompt embeddings [N, length, D] and pooled ones [N, D2]."""
    from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

    clip = CLIPTextModel.from_pretrained(NANO / "text_encoder", local_files_only=True).float()
    t5 = T5EncoderModel.from_pretrained(NANO / "text_encoder_2", local_files_only=True).float()
    clip_tokenizer = CLIPTokenizer.from_pretrained(comfyui / "comfy" / "sd1_tokenizer")
    t5_folder = comfyui / "comfy" / "text_encoders" / "t5_tokenizer"
    t5_tokenizer = T5TokenizerFast.from_pretrained(t5_folder)
    padding = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    clip_ids = clip_tokenizer(texts, max_length=77, **padding).input_ids
    t5_ids = t5_tokenizer(texts, max_length=length, **padding).input_ids
    return t5(t5_ids).last_hidden_state, clip(clip_ids).pooler_output


def judge_pictures(rows: dict[str, list[Image.Image]], codes: list[str]) -> dict[str, float]:
    """What a classifier of real pictures sees in each row of pictures, one of each code.

    style_score is the mean probability of OpenMoji's artwork, subject_score that of the subject of
    the code, and subject_top1 the share of pictures with that subject in the first place.
    """
    judge = load_judge()
    wanted = torch.tensor([judge.subjects.index(code.lower()) for code in codes])
    scores = {}
    for name, pictures in rows.items():
        images = to_tensor(pictures)
        subject = judge.subject(images)
        scores[f"style_score_{name}"] = mean(judge.style(images)[:, OPENMOJI])
        scores[f"subject_score_{name}"] = mean(subject.gather(1, wanted[:, None]))
        scores[f"subject_top1_{name}"] = mean(subject.argmax(1) == wanted)
    return scores


def judge_accuracy(pictures: list[Image.Image]) -> float:
    """The share of real OpenMoji pictures that the judge takes for that artwork."""
    return mean(load_judge().style(to_tensor(pictures)).argmax(1) == OPENMOJI)


def load_judge():
    """The judge that lies beside the nano model, with its own code."""
    return load_module("nano_judge", NANO / "judge.py").load_judge(JUDGE)


def to_tensor(pictures: list[Image.Image]) -> Tensor:
    """[N, 3, H, W] in 0..1."""
    pixels = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
    return torch.from_numpy(pixels).movedim(-1, 1).float() / 255


def mean(values: Tensor) -> float:
    return float(values.float().mean())
