"""A training by diffusers and peft alone, as diffusers' train_dreambooth_lora_flux.py does it.

Of the pack it takes only what is drawn at random: which pictures, their latents, the noise. Masks
count as in OneTrainer, captions of the class as in ai-toolkit.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from atelier.trainers.batches import BatchOrder
from atelier.trainers.caches import LatentEntry
from atelier.trainers.config import JobSettings
from atelier.trainers.data import TrainingData
from atelier.trainers.flow import seeded
from atelier.trainers.preservation_settings import PreservationSettings
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.training_utils import compute_density_for_timestep_sampling
from peft import LoraConfig, set_peft_model_state_dict
from torch import Tensor

ATTENTION = ["to_k", "to_q", "to_v", "to_out.0"]
TARGETS = {
    "qlora": ATTENTION,
    "all": [*ATTENTION, "add_k_proj", "add_q_proj", "add_v_proj", "to_add_out"],
}
"""Those of the Hugging Face QLoRA script and of SimpleTuner, as peft takes them."""


def plain_loop(
    model: FluxTransformer2DModel,
    data: TrainingData,
    settings: JobSettings,
    start: dict[str, Tensor],
    optimizer_class: Callable[..., torch.optim.Optimizer],
) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of the steps of a job.

    Args:
        model: without a LoRA; it gets one, with the tensors `start`.
        optimizer_class: AdamW of any kind.
    """
    train_settings, lora = settings.train, settings.lora
    kept = train_settings.preservation
    targets = TARGETS[lora.targets]
    model.add_adapter(LoraConfig(r=lora.rank, lora_alpha=lora.rank, target_modules=targets))
    assert not set_peft_model_state_dict(model, start).unexpected_keys
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(parameters) == len(start)
    optimizer = optimizer_class(
        parameters,
        lr=train_settings.learning_rate,
        betas=(0.9, 0.999),
        weight_decay=1e-4,
        eps=1e-8,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    order = BatchOrder(
        data.latents.subsets, batch_size=train_settings.batch_size, seed=train_settings.seed
    )
    accumulation, losses, norms = train_settings.gradient_accumulation, [], []
    for step in range(settings.length.amount):
        parts = []
        for micro_step in range(step * accumulation, (step + 1) * accumulation):
            generator = seeded(train_settings.seed, "micro-step", micro_step)
            entries = order.batch(micro_step)
            pictures = [data.latents.load(entry.name) for entry in entries]
            mean = torch.stack([picture.mean for picture in pictures])
            std = torch.stack([picture.std for picture in pictures])
            latents = mean + std * torch.randn(mean.shape, generator=generator)
            texts = [data.prompts.load(entry.texts[0][0]) for entry in entries]
            embeds = torch.stack([text.prompt_embeds for text in texts])
            pooled = torch.stack([text.pooled for text in texts])
            noise = torch.randn(latents.shape, generator=generator)
            density = compute_density_for_timestep_sampling(
                "none", len(entries), generator=generator
            )
            indices = (density * 1000).long()
            timesteps = scheduler.timesteps[indices]
            sigmas = scheduler.sigmas[indices].view(-1, 1, 1, 1)
            noisy = (1.0 - sigmas) * latents + sigmas * noise
            batch, channels, height, width = latents.shape
            inputs = dict(
                hidden_states=FluxPipeline._pack_latents(noisy, batch, channels, height, width),
                timestep=timesteps / 1000,
                guidance=torch.full((batch,), train_settings.guidance),
                pooled_projections=pooled,
                encoder_hidden_states=embeds,
                txt_ids=torch.zeros(embeds.shape[1], 3),
                img_ids=FluxPipeline._prepare_latent_image_ids(
                    batch, height // 2, width // 2, torch.device("cpu"), torch.float32
                ),
                return_dict=False,
            )
            target = noise - latents
            if entries[0].is_regularization:
                model.disable_adapters()
                with torch.no_grad():
                    taught = model(**inputs)[0]
                target = FluxPipeline._unpack_latents(taught, height * 8, width * 8, 8)
                model.enable_adapters()
            prediction = FluxPipeline._unpack_latents(model(**inputs)[0], height * 8, width * 8, 8)
            error = (prediction - target) ** 2
            for place, entry in enumerate(entries):
                if entry.masks:
                    mask = data.latents.load_mask(entry.masks[0])
                    mask = torch.where(mask < kept.unmasked_weight, kept.unmasked_weight, mask)
                    error[place] *= mask / mask.mean() if kept.normalize_masks else mask
            loss = error.reshape(batch, -1).mean(1).mean()
            if entries[0].is_prior:
                loss = kept.prior_weight * loss
            if kept.trigger:
                texts = [data.prompts.load(_class_text(entry, kept)) for entry in entries]
                inputs["encoder_hidden_states"] = torch.stack([t.prompt_embeds for t in texts])
                inputs["pooled_projections"] = torch.stack([t.pooled for t in texts])
                model.disable_adapters()
                with torch.no_grad():
                    taught = model(**inputs)[0]
                model.enable_adapters()
                drift = torch.nn.functional.mse_loss(model(**inputs)[0], taught, reduction="none")
                has_trigger = torch.tensor([kept.trigger in e.texts[0][0] for e in entries])
                loss = loss + kept.class_weight * drift[has_trigger].sum() / drift.numel()
            (loss / accumulation).backward()
            parts.append(loss.item())
        norm = torch.nn.utils.clip_grad_norm_(parameters, train_settings.optimizer.clip_limit)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum(parts) / accumulation)
        norms.append(norm.item())
    return losses, norms


def _class_text(entry: LatentEntry, kept: PreservationSettings) -> str:
    return re.sub(re.escape(kept.trigger), kept.class_word, entry.texts[0][0])
