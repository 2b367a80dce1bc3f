"""Captions, their tokens, and the pre-training of both text encoders.

The encoders learn alone, from caption to thumbnail and subject, and are frozen for the rest.
"""

import random
import re
from functools import lru_cache
from pathlib import Path

import torch
from data import BASE_ARTWORKS, EmojiPictures, load_subjects, to_tensor
from loop import Recipe, fit
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy, mse_loss
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

LENGTHS = (20, 77, 256)
"""T5 lengths to train at: short for speed, 77 of the trainer's recipe, 256 of ComfyUI.

T5 sees its padding: there is no mask."""
LENGTH_ODDS, LATE_LENGTH_ODDS = (0.85, 0.10, 0.05), (0.5, 0.25, 0.25)


CLIP_START, CLIP_END = 49406, 49407


def new_clip() -> CLIPTextModel:
    config = CLIPTextConfig(
        hidden_size=64,
        intermediate_size=256,
        projection_dim=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_act="quick_gelu",
        max_position_embeddings=77,
        bos_token_id=CLIP_START,
        eos_token_id=CLIP_END,
        pad_token_id=CLIP_END,
    )
    return CLIPTextModel(config)


def new_t5() -> T5EncoderModel:
    config = T5Config(
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_heads=4,
        num_layers=2,
        vocab_size=32128,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        dropout_rate=0.0,
        is_encoder_decoder=False,
        use_cache=False,
    )
    return T5EncoderModel(config)


class CaptionWriter:
    """Captions of a subject in an artwork, worded differently each time."""

    def __init__(self, pictures: EmojiPictures) -> None:
        table = load_subjects()
        self.phrases: dict[str, str] = table["phrases"]
        self.tags = {code: record.get("tags", [])[:3] for code, record in pictures.names.items()}
        words = {
            w
            for record in pictures.names.values()
            for w in re.findall("[a-z]{3,}", record["label"].lower())
        }
        self.words = sorted(words | set(self.phrases["openmoji"].split()))

    def plain(self, subject: dict, artwork: str) -> str:
        return f"{subject['name']}, {self.phrases[artwork]}"

    def write(self, subject: dict, artwork: str, rng: random.Random) -> str:
        """One in ten empty; one in ten without the artwork's phrase, half of those with others."""
        draw = rng.random()
        if draw < 0.10:
            return ""
        if draw < 0.15:
            return subject["name"]
        if draw < 0.20:
            return f"{subject['name']}, {' '.join(rng.sample(self.words, rng.randint(2, 3)))}"
        if draw < 0.26:
            name = rng.choice([subject["label"], *self.tags[subject["code"]]])
            return f"{name}, {self.phrases[artwork]}"
        article = "an" if subject["name"][0] in "aeiou" else "a"
        return (
            f"{article} {self.plain(subject, artwork)}"
            if draw < 0.35
            else self.plain(subject, artwork)
        )


class TextEncoders(nn.Module):
    """Captions to T5 tokens [B, length, 128] and pooled CLIP [B, 64]; the host's tokenizers."""

    def __init__(self, comfyui: Path) -> None:
        super().__init__()
        self.clip, self.t5 = new_clip(), new_t5()
        clip_tokenizer = CLIPTokenizerFast.from_pretrained(comfyui / "comfy" / "sd1_tokenizer")
        t5_tokenizer = T5TokenizerFast.from_pretrained(
            comfyui / "comfy" / "text_encoders" / "t5_tokenizer"
        )
        self.clip_ids = lru_cache(100_000)(lambda caption: clip_tokenizer(caption).input_ids[:77])
        self.t5_ids = lru_cache(100_000)(lambda caption: t5_tokenizer(caption).input_ids)

    def forward(self, captions: list[str], length: int) -> tuple[Tensor, Tensor]:
        device = self.clip.device
        t5_ids = torch.zeros(len(captions), length, dtype=torch.long)
        clip_ids = torch.full((len(captions), 77), self.clip.config.eos_token_id)
        for row, caption in enumerate(captions):
            tokens = self.t5_ids(caption)[:length]
            t5_ids[row, : len(tokens)] = torch.tensor(tokens)
            tokens = self.clip_ids(caption)
            clip_ids[row, : len(tokens)] = torch.tensor(tokens)
        longest = max(len(self.clip_ids(caption)) for caption in captions)
        pooled = self.clip(
            clip_ids[:, :longest].to(device)
        ).pooler_output  # causal: the padding changes nothing
        return self.t5(t5_ids.to(device)).last_hidden_state, pooled


class Readout(nn.Module):
    """Reads thumbnail, subject and artwork out of the encoders; thrown away afterwards."""

    def __init__(self, num_subjects: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, 64, 128) * 0.5)
        self.attention = nn.MultiheadAttention(128, 4, batch_first=True)
        self.pooled = nn.Linear(64, 128)
        self.pixels = nn.Sequential(nn.Linear(128, 512), nn.GELU(), nn.Linear(512, 12))
        self.names = nn.ModuleList(
            (nn.Linear(128, num_subjects + 4), nn.Linear(64, num_subjects + 4))
        )

    def forward(self, context_BTD: Tensor, pooled_BD: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Pixels [B, 64, 12] and, from T5 and from CLIP alone, logits [B, subjects + 4]."""
        read, _ = self.attention(
            self.queries.expand(len(context_BTD), -1, -1),
            context_BTD,
            context_BTD,
            need_weights=False,
        )
        logits = [self.names[0](read.mean(1)), self.names[1](pooled_BD)]
        return self.pixels(self.queries + read + self.pooled(pooled_BD)[:, None]), logits


def pick_length(generator: torch.Generator, *, late: bool) -> int:
    """Long paddings cost time, so most of them come in the last tenth of a stage (`late`)."""
    odds = torch.tensor(LATE_LENGTH_ODDS if late else LENGTH_ODDS)
    return LENGTHS[torch.multinomial(odds, 1, generator=generator).item()]


def train_text(
    pictures: EmojiPictures, recipe: Recipe, comfyui: Path, work: Path, device: torch.device
) -> TextEncoders:
    torch.manual_seed(recipe.seed)
    writer, subjects = CaptionWriter(pictures), load_subjects()["subjects"]
    encoders, readout = TextEncoders(comfyui).to(device), Readout(len(subjects)).to(device)
    drawn = to_tensor(
        [pictures.picture(artwork, s["code"]) for s in subjects for artwork in BASE_ARTWORKS]
    )
    thumbnails = (
        nn.functional.pixel_unshuffle(adaptive_avg_pool2d(drawn.float() / 127.5 - 1, 16), 2)
        .flatten(2)
        .transpose(1, 2)
    )

    def loss_at(step: int, generator: torch.Generator) -> Tensor:
        which = torch.randint(len(thumbnails), (64,), generator=generator)
        rng = random.Random(torch.randint(2**31, (1,), generator=generator).item())
        captions = [
            writer.write(subjects[i // 3], BASE_ARTWORKS[i % 3], rng) for i in which.tolist()
        ]
        context, pooled = encoders(captions, pick_length(generator, late=True))
        pixels, logits = readout(context, pooled)
        named = torch.tensor(
            [any(phrase in c for phrase in writer.phrases.values()) for c in captions]
        )
        filled = torch.tensor([c != "" for c in captions])
        loss = mse_loss(pixels, thumbnails[which].to(device)) + 0.5 * padding_loss(
            encoders, captions, context
        )
        for answer in logits:
            loss = loss + 0.1 * cross_entropy(answer[filled, :-4], (which // 3)[filled].to(device))
            loss = loss + 0.1 * cross_entropy(
                answer[:, -4:], torch.where(named, which % 3, 3).to(device)
            )
        return loss

    both = nn.ModuleDict({"encoders": encoders, "readout": readout})
    fit("text", both, loss_at, recipe, work)
    return encoders.requires_grad_(False).eval()


def padding_loss(encoders: TextEncoders, captions: list[str], context_BTD: Tensor) -> Tensor:
    """Asks that words mean the same at every length and that padding says nothing."""
    short, _ = encoders(captions, LENGTHS[0])
    same = mse_loss(context_BTD[:, : LENGTHS[0]], short)
    padding = torch.cat(
        [
            row[len(encoders.t5_ids(caption)) :]
            for row, caption in zip(context_BTD, captions, strict=True)
        ]
    )
    return same + padding.var(dim=0).mean()
