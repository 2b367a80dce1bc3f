"""How well a network knows pictures: its loss on fixed noise at fixed timesteps, without training.

Shapes: N pictures, C latent channels, H W latent size, T text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .caches import digest
from .data import TrainingData
from .flow import add_noise, flow_loss, seeded
from .flux import velocity

EVAL_SIGMAS = (0.0625, 0.1875, 0.3125, 0.4375, 0.5625, 0.6875, 0.8125, 0.9375)
"""Shares of noise to measure at: the middles of eight equal parts of 0..1."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Conditions:
    """What a network is given beside noisy latents."""

    prompt_embeds: Tensor
    """[B, T, D] of the T5 encoder."""
    pooled: Tensor
    """[B, D2] of the CLIP encoder."""
    text_mask: Tensor | None = None
    """[B, T], 0 for tokens that are not seen; None if all are."""
    reference: Tensor | None = None
    """[B, C, h, w], what a Kontext sees beside the latents."""

    def of(self, part: Tensor) -> Conditions:
        """Those of the samples with these numbers."""
        return Conditions(
            prompt_embeds=self.prompt_embeds[part],
            pooled=self.pooled[part],
            text_mask=None if self.text_mask is None else self.text_mask[part],
            reference=None if self.reference is None else self.reference[part],
        )


Predict = Callable[[Tensor, Tensor, Conditions], Tensor]
"""A network's prediction of noise - image, [B, C, H, W]. It is given noisy latents of this shape in
float32, their shares of noise [B], and their conditions."""


@torch.no_grad()
def eval_loss(
    transformer,
    latents: Tensor,
    *,
    prompt_embeds: Tensor,
    pooled: Tensor,
    guidance: float = 1.0,
    sigmas: tuple[float, ...] = EVAL_SIGMAS,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 8,
    names: Sequence[str] | None = None,
) -> float:
    """Mean loss over every picture at every sigma; each pair has noise of its own from `seed`.

    Two networks, or one with and without a LoRA, are compared on exactly the same task.

    Args:
        latents: [N, C, H, W], shifted and scaled as the model expects.
        prompt_embeds: [N, T, D] of the T5 encoder.
        pooled: [N, D2] of the CLIP encoder.
        dtype: what to compute in; float32 gives the same number on every machine, but for rounding.
        batch_size: changes speed and memory, not the result.
        names: of the pictures, by which their noise is drawn; their numbers if None.
    """
    return _loss(
        predict_by(transformer, guidance=guidance, dtype=dtype),
        latents,
        Conditions(prompt_embeds=prompt_embeds, pooled=pooled),
        names or [str(number) for number in range(len(latents))],
        sigmas=sigmas,
        seed=seed,
        batch_size=batch_size,
    )


@torch.no_grad()
def held_out_loss(
    predict: Predict,
    data: TrainingData,
    *,
    device: torch.device,
    with_text: bool = True,
    check_stop: Callable[[], None] = lambda: None,
) -> float:
    """`eval_loss` of samples that are not trained, one after the other, each with its first text.

    The noise of a picture is drawn by its content, so it stays the same when others are added.

    Args:
        with_text: False for the empty text in place of the samples' own, which must be encoded.
        check_stop: called before every picture; it raises to stop.
    """
    losses = []
    for entry in sorted(data.latents.entries, key=lambda entry: entry.name):
        check_stop()
        text = data.prompts.load(entry.texts[0][0] if with_text else "")
        reference = data.reference(entry.references[0] if entry.references else "")
        loss = _loss(
            predict,
            data.latents.load(entry.keys[0]).mean[None].to(device),
            Conditions(
                prompt_embeds=text.prompt_embeds[None].to(device),
                pooled=text.pooled[None].to(device),
                text_mask=None if text.mask is None else text.mask[None].to(device),
                reference=None if reference is None else reference[None].to(device),
            ),
            [entry.name],
        )
        losses.append(loss)
    return sum(losses) / len(losses)


def predict_by(transformer, *, guidance: float, dtype: torch.dtype) -> Predict:
    """What diffusers' network predicts, computed in `dtype`."""

    def predict(latents: Tensor, sigma: Tensor, given: Conditions) -> Tensor:
        return velocity(
            transformer,
            latents.to(dtype),
            sigma=sigma,
            prompt_embeds=given.prompt_embeds,
            pooled=given.pooled,
            guidance=guidance,
            text_mask=given.text_mask,
            reference=given.reference,
        )

    return predict


def _loss(
    predict: Predict,
    latents: Tensor,
    given: Conditions,
    names: Sequence[str],
    *,
    sigmas: tuple[float, ...] = EVAL_SIGMAS,
    seed: int = 0,
    batch_size: int = 8,
) -> float:
    losses = []
    for number, sigma in enumerate(sigmas):
        for part in torch.arange(len(latents)).split(batch_size):
            noise = torch.stack(
                [_noise(latents[0], seed, number, names[int(index)]) for index in part]
            )
            noise, sigma_B = noise.to(latents.device), latents.new_full((len(part),), sigma)
            noisy = add_noise(latents[part], noise, sigma_B)
            prediction = predict(noisy, sigma_B, given.of(part.to(latents.device)))
            losses.append(flow_loss(prediction, latents[part], noise))
    return float(torch.cat(losses).mean())


def held_out_key(data: TrainingData) -> str:
    """Hash of what `held_out_loss` measures on: two losses of one key can be compared."""
    return digest(
        sorted([e.name, e.texts[0][0], *e.references[:1]] for e in data.latents.entries)
        + [["masked"]] * data.prompts.has_masks
    )[:8]


def _noise(like: Tensor, seed: int, sigma_number: int, picture: str) -> Tensor:
    return torch.randn(like.shape, generator=seeded(seed, "eval", sigma_number, picture))
