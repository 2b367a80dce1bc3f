"""What a cache will take on disk is known before it is written, and one sample takes half of it."""

import re
from pathlib import Path

import pytest
import torch
from atelier.trainers import caching
from atelier.trainers.buckets import Resolution
from atelier.trainers.caching import LatentSettings, cache_latents, cache_prompts
from atelier.trainers.data import Sample, TrainingData
from atelier.trainers.dataset import Dataset, PictureSettings
from atelier.trainers.image_folder import image_folder
from atelier.trainers.masks import ALPHA
from PIL import Image
from small_disk import small_disk

SAMPLE = LatentSettings(kept="one sample")
ADVICE = r"Raise limit_gb, or make it smaller: .*latents as one sample"


def encode(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """16 channels of the mean of 8 x 8 pixels, with a deviation of a tenth."""
    mean = torch.nn.functional.avg_pool2d(pixels, 8).mean(1, keepdim=True).repeat(1, 16, 1, 1)
    return mean, torch.full_like(mean, 0.1)


def encode_texts(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(len(texts), 7, 5, dtype=torch.bfloat16), torch.zeros(len(texts), 3)


def never(_: object) -> None:
    raise AssertionError("the encoder was called although nothing may be written")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(3):
        Image.new("RGBA", (80, 160), (40 * index, 9, 200, 99)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"caption {index}", encoding="utf-8")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def read(pictures: Path, /, **options: object) -> Dataset:
    resolution = Resolution(width=64, height=96)
    return Dataset(subsets=(image_folder(pictures, resolution=resolution, **options),))


@pytest.mark.parametrize("settings", [LatentSettings(), SAMPLE], ids=["distribution", "sample"])
@pytest.mark.parametrize(
    "options",
    [{}, {"masks": ALPHA}, {"pictures": PictureSettings(flip=True)}],
    ids=["plain", "masked", "mirrored"],
)
def test_the_predicted_size_of_latents_is_the_one_they_take(
    pictures: Path, folder: Path, settings: LatentSettings, options: dict[str, object]
) -> None:
    dataset = read(pictures, **options)
    taken = cache_latents(dataset, encode, "vae", folder / "1", settings=settings).total_bytes
    with pytest.raises(ValueError, match=ADVICE):
        cache_latents(dataset, never, "vae", folder / "2", settings=settings, limit_bytes=taken - 1)
    assert not (folder / "2").exists()
    cache_latents(dataset, encode, "vae", folder / "2", settings=settings, limit_bytes=taken)


def test_the_predicted_size_of_prompts_is_the_one_they_take(folder: Path) -> None:
    texts = ("a cat", "a dog", "a horse")
    taken = cache_prompts(texts, encode_texts, "clip", 7, folder / "1").total_bytes
    assert taken == 4 * (7 * 5 * 2 + 3 * 4)
    with pytest.raises(ValueError, match=ADVICE):
        cache_prompts(texts, encode_texts, "clip", 7, folder / "2", limit_bytes=taken - 1)
    assert not (folder / "2").exists()
    cache_prompts(texts, encode_texts, "clip", 7, folder / "2", limit_bytes=taken)


def test_only_the_first_batch_of_prompts_is_encoded_to_know_their_size(folder: Path) -> None:
    asked: list[str] = []

    def count(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        asked.extend(texts)
        return encode_texts(texts)

    with pytest.raises(ValueError, match=ADVICE):
        cache_prompts(map(str, range(9)), count, "clip", 7, folder, batch_size=2, limit_bytes=99)
    assert asked == ["0", "1"]


def test_what_is_cached_already_does_not_count(pictures: Path, folder: Path) -> None:
    taken = cache_latents(read(pictures), encode, "vae", folder).total_bytes
    cache_latents(read(pictures), never, "vae", folder, limit_bytes=0)
    Image.new("RGB", (80, 160), "white").save(pictures / "1.png")
    cache_latents(read(pictures), encode, "vae", folder, limit_bytes=taken // 3)


def test_the_sentence_names_both_sizes(pictures: Path, folder: Path) -> None:
    size = 3 * 2 * 16 * 8 * 12 * 4
    sentence = f"would take {size / 1e6:.1f} MB more, and limit_gb allows 0.0 MB."
    with pytest.raises(ValueError, match=re.escape(sentence)):
        cache_latents(read(pictures), never, "vae", folder, limit_bytes=20_000)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_encoded(
    pictures: Path, tmp_path: Path
) -> None:
    """3 pictures of 1536 x 1536 are 14 MB of latents."""
    resolution = Resolution(width=1536, height=1536)
    dataset = Dataset(subsets=(image_folder(pictures, resolution=resolution),))
    with small_disk(tmp_path / "disk") as disk:
        with pytest.raises(ValueError, match=r"the disk of .* has 1\.0 MB free\. Free some"):
            cache_latents(dataset, never, "vae", disk / "cache")
        assert not list(disk.rglob("*"))


def test_a_sample_is_drawn_from_the_distribution(pictures: Path, folder: Path) -> None:
    """Of 3 x 16 x 96 numbers with a deviation of 0.1."""
    whole = cache_latents(read(pictures), encode, "vae", folder)
    drawn = cache_latents(read(pictures), encode, "vae", folder, settings=SAMPLE)
    pairs = zip(whole.keys, drawn.keys, strict=True)
    noise = torch.stack([drawn.load(b).mean - whole.load(a).mean for a, b in pairs])
    assert noise.std() == pytest.approx(0.1, rel=0.05)
    assert noise.mean() == pytest.approx(0, abs=0.01)
    assert not torch.equal(noise[0], noise[1])


def test_the_sample_of_a_picture_is_always_the_same(pictures: Path, tmp_path: Path) -> None:
    one, two = (
        cache_latents(read(pictures), encode, "vae", tmp_path / name, settings=SAMPLE, batch_size=n)
        for name, n in (("1", 1), ("2", 3))
    )
    assert one.keys == two.keys
    assert all(torch.equal(one.load(key).mean, two.load(key).mean) for key in one.keys)


def test_a_sample_takes_half_the_space(pictures: Path, tmp_path: Path) -> None:
    whole = cache_latents(read(pictures), encode, "vae", tmp_path / "1")
    drawn = cache_latents(read(pictures), encode, "vae", tmp_path / "2", settings=SAMPLE)
    assert drawn.total_bytes * 2 == whole.total_bytes


def test_a_training_sees_the_sample_as_it_is(pictures: Path, folder: Path) -> None:
    latents = cache_latents(read(pictures), encode, "vae", folder, settings=SAMPLE)
    prompts = cache_prompts(["caption 0"], encode_texts, "clip", 7, folder)
    data = TrainingData(latents=latents, prompts=prompts)
    key = latents.keys[0]
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        batch = data.load([Sample(key, "caption 0")], torch.device("cpu"), generator)
        assert torch.equal(batch.latents[0], latents.load(key).mean)


def test_what_is_kept_belongs_to_the_keys(pictures: Path, folder: Path) -> None:
    def keys(settings: LatentSettings) -> tuple[str, ...]:
        return caching.latent_cache(read(pictures), "vae", folder, settings).keys

    plain = keys(LatentSettings())
    assert not set(plain) & set(keys(SAMPLE))
    assert keys(LatentSettings(tile=96)) == plain  # no picture is larger
    assert not set(plain) & set(keys(LatentSettings(tile=64)))
    assert not set(keys(SAMPLE)) & set(keys(LatentSettings(kept="one sample", tile=64)))


def test_latents_of_an_unknown_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="one of distribution, one sample, got 'x'"):
        LatentSettings(kept="x")
