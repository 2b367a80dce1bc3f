"""Encoded texts on disk. The encoder is a stand-in that counts letters."""

from pathlib import Path

import pytest
import torch
from atelier.trainers.caches import PromptCache
from atelier.trainers.caching import cache_prompts


class TextEncoder:
    """Embeddings [B, 4, 2] and pooled [B, 3] filled with the number of letters."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.texts: list[str] = []
        self.dtype = dtype

    def __call__(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        self.texts += texts
        sizes = torch.tensor([len(text) for text in texts], dtype=self.dtype)
        return sizes[:, None, None].expand(-1, 4, 2), sizes[:, None].expand(-1, 3)


def never(_: object) -> None:
    raise AssertionError("the encoder was called although nothing is missing")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_each_distinct_text_and_the_empty_one_are_encoded_once(folder: Path) -> None:
    encoder = TextEncoder()
    cache_prompts(["cat", "horse", "cat"], encoder, "clip", 77, folder)
    assert encoder.texts == ["cat", "horse", ""]


@pytest.mark.parametrize("text", ["cat", "horse", ""])
def test_a_text_loads_its_own_embeddings(folder: Path, text: str) -> None:
    cache = cache_prompts(["cat", "horse"], TextEncoder(), "clip", 77, folder, batch_size=2)
    loaded = cache.load(text)
    assert torch.equal(loaded.prompt_embeds, torch.full((4, 2), float(len(text))))
    assert torch.equal(loaded.pooled, torch.full((3,), float(len(text))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_embeddings_keep_the_dtype_of_the_encoder(folder: Path, dtype: torch.dtype) -> None:
    cache = cache_prompts(["cat"], TextEncoder(dtype), "clip", 77, folder)
    assert cache.load("cat").prompt_embeds.dtype == dtype


def test_a_changed_caption_encodes_just_itself(folder: Path) -> None:
    cache_prompts(["cat", "horse"], TextEncoder(), "clip", 77, folder)
    encoder = TextEncoder()
    cache_prompts(["cat", "a horse"], encoder, "clip", 77, folder)
    assert encoder.texts == ["a horse"]


@pytest.mark.parametrize(("encoder_id", "length"), [("other", 77), ("clip", 512)])
def test_another_encoder_or_length_encodes_all(folder: Path, encoder_id: str, length: int) -> None:
    cache_prompts(["cat"], TextEncoder(), "clip", 77, folder)
    encoder = TextEncoder()
    cache_prompts(["cat"], encoder, encoder_id, length, folder)
    assert encoder.texts == ["cat", ""]


def test_a_full_prompt_cache_never_touches_the_encoder(folder: Path) -> None:
    first = cache_prompts(["cat"], TextEncoder(), "clip", 77, folder)
    assert cache_prompts(["cat"], never, "clip", 77, folder) == first


def test_a_text_that_was_not_encoded_is_refused_by_name(folder: Path) -> None:
    cache = cache_prompts(["cat"], TextEncoder(), "clip", 77, folder)
    with pytest.raises(ValueError, match=r"caption 'dog' is not in the prompt cache\. Connect"):
        cache.load("dog")


@pytest.mark.parametrize("batch_size", [0, -1])
def test_no_batch_size_is_refused(folder: Path, batch_size: int) -> None:
    with pytest.raises(ValueError, match=f"batch size must be 1 or more, got {batch_size}"):
        cache_prompts(["cat"], TextEncoder(), "clip", 77, folder, batch_size=batch_size)


def test_prompts_survive_their_manifest(folder: Path) -> None:
    cache = cache_prompts(["Kätzchen 猫"], TextEncoder(), "clip", 77, folder)
    assert PromptCache.from_json(cache.to_json()) == cache


def test_the_folder_in_a_manifest_is_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cache = cache_prompts(["cat"], TextEncoder(), "clip", 77, "relative")
    assert cache.to_json()["folder"] == str(tmp_path / "relative")


def test_the_fingerprint_of_prompts_tells_texts_apart(folder: Path) -> None:
    one = cache_prompts(["cat"], TextEncoder(), "clip", 77, folder)
    two = cache_prompts(["dog"], TextEncoder(), "clip", 77, folder)
    assert one.fingerprint() != two.fingerprint()
