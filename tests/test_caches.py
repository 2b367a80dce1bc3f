"""Latents on disk: what is encoded, under which key, and what happens when the disk misbehaves.

The encoder is a stand-in whose results follow from the pixels by arithmetic.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from atelier.trainers import pictures as pixels
from atelier.trainers.buckets import Resolution
from atelier.trainers.caches import LatentCache
from atelier.trainers.caching import cache_latents
from atelier.trainers.captions import CaptionSettings
from atelier.trainers.dataset import Dataset
from atelier.trainers.image_folder import image_folder
from PIL import Image
from training import with_entries

COLOURS = {"a": (255, 0, 0), "b": (0, 255, 0), "c": (0, 0, 255)}


class Encoder:
    """Latents [B, 3, h, w] that are the mean of 8 x 8 pixels; it notes the batches it was given."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, ...]] = []

    def __call__(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.batches.append(tuple(pixels.shape))
        mean = torch.nn.functional.avg_pool2d(pixels, 8)
        return mean, mean.abs() + 1

    @property
    def num_pictures(self) -> int:
        return sum(batch[0] for batch in self.batches)


def never(_: object) -> None:
    raise AssertionError("the encoder was called although nothing is missing")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, colour in COLOURS.items():
        Image.new("RGB", (80, 80), colour).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"caption {name}", encoding="utf-8")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def read(pictures: Path, width: int = 64, height: int = 64, **options: object) -> Dataset:
    resolution = Resolution(width=width, height=height)
    return Dataset(subsets=(image_folder(pictures, resolution=resolution, **options),))


def test_every_entry_loads_the_latents_of_its_own_picture(pictures: Path, folder: Path) -> None:
    cache = cache_latents(read(pictures), Encoder(), "vae", folder)
    for entry in cache.entries:
        colour = COLOURS[entry.texts[0][0].removeprefix("caption ")]
        expected = torch.tensor(colour)[:, None, None].expand(3, 8, 8) / 127.5 - 1
        torch.testing.assert_close(cache.load(entry.name).mean, expected)
        torch.testing.assert_close(cache.load(entry.name).std, expected.abs() + 1)


def test_entries_describe_the_records_in_order(pictures: Path, folder: Path) -> None:
    dataset = read(pictures, repeats=2)
    cache = cache_latents(dataset, Encoder(), "vae", folder)
    assert [(e.record, e.texts, e.repeats, e.width, e.height) for e in cache.entries] == [
        (r.id, r.texts, 2, 64, 64) for r in dataset.subsets[0].records
    ]


def test_a_full_cache_never_touches_the_encoder(pictures: Path, folder: Path) -> None:
    first = cache_latents(read(pictures), Encoder(), "vae", folder)
    assert cache_latents(read(pictures), never, "vae", folder) == first


def test_a_changed_picture_encodes_just_itself(pictures: Path, folder: Path) -> None:
    cache_latents(read(pictures), Encoder(), "vae", folder)
    Image.new("RGB", (80, 80), "white").save(pictures / "b.png")
    encoder = Encoder()
    cache = cache_latents(read(pictures), encoder, "vae", folder)
    assert encoder.num_pictures == 1
    assert cache.load(cache.entries[1].name).mean.min() == 1


def test_an_added_picture_encodes_just_itself(pictures: Path, folder: Path) -> None:
    cache_latents(read(pictures), Encoder(), "vae", folder)
    Image.new("RGB", (80, 80)).save(pictures / "0 comes first.png")
    encoder = Encoder()
    cache_latents(read(pictures, captions=CaptionSettings(missing="empty")), encoder, "vae", folder)
    assert encoder.num_pictures == 1


@pytest.mark.parametrize("change", ["caption", "name", "repeats", "removal"])
def test_what_pixels_do_not_depend_on_encodes_nothing(
    pictures: Path, folder: Path, change: str
) -> None:
    cache_latents(read(pictures), Encoder(), "vae", folder)
    if change == "caption":
        (pictures / "a.txt").write_text("another", encoding="utf-8")
    if change == "name":
        for extension in (".png", ".txt"):
            (pictures / f"a{extension}").rename(pictures / f"z{extension}")
    if change == "removal":
        (pictures / "a.png").unlink()
    encoder = Encoder()
    cache_latents(read(pictures, repeats=1 + (change == "repeats")), encoder, "vae", folder)
    assert encoder.num_pictures == 0


@pytest.mark.parametrize("change", ["encoder", "size", "transform"])
def test_another_encoder_size_or_transform_encodes_all(
    pictures: Path, folder: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_latents(read(pictures), Encoder(), "vae", folder)
    encoder = Encoder()
    if change == "transform":
        defaults = (pixels.TRANSFORM_VERSION + 1,)
        monkeypatch.setitem(pixels.Transform.__init__.__kwdefaults__, "version", *defaults)
    width = 80 if change == "size" else 64
    cache_latents(read(pictures, width), encoder, f"vae{change == 'encoder'}", folder)
    assert encoder.num_pictures == 3


def test_the_key_is_the_hash_of_content_transform_and_encoder(pictures: Path, folder: Path) -> None:
    dataset = read(pictures)
    content = hashlib.sha256((pictures / "a.png").read_bytes()).hexdigest()
    facts = [content, {"height": 64, "version": 2, "width": 64}, "vae"]
    expected = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    assert cache_latents(dataset, Encoder(), "vae", folder).entries[0].name == expected


def test_a_picture_that_is_there_twice_is_encoded_once(pictures: Path, folder: Path) -> None:
    for name in ("a", "b"):
        (pictures / f"{name}.png").write_bytes((pictures / "c.png").read_bytes())
    encoder = Encoder()
    cache = cache_latents(read(pictures), encoder, "vae", folder)
    assert encoder.num_pictures == 1
    assert len(cache.entries) == 3


def test_a_batch_has_pictures_of_one_size(pictures: Path, folder: Path) -> None:
    for name, size in (("d", (160, 80)), ("e", (160, 80))):
        Image.new("RGB", size, name and (len(name), 9, ord(name))).save(pictures / f"{name}.png")
    resolution = Resolution(width=64, height=64, mode="buckets")
    subset = image_folder(
        pictures, resolution=resolution, captions=CaptionSettings(missing="empty")
    )
    dataset = Dataset(subsets=(subset,))
    encoder = Encoder()
    cache_latents(dataset, encoder, "vae", folder, batch_size=2)
    assert [batch[0] for batch in encoder.batches] == [2, 1, 2]


def test_batches_do_not_change_what_is_stored(pictures: Path, tmp_path: Path) -> None:
    one = cache_latents(read(pictures), Encoder(), "vae", tmp_path / "1")
    two = cache_latents(read(pictures), Encoder(), "vae", tmp_path / "2", batch_size=2)
    for left, right in zip(one.entries, two.entries, strict=True):
        assert torch.equal(one.load(left.name).mean, two.load(right.name).mean)


def test_what_was_encoded_before_a_cancel_stays(pictures: Path, folder: Path) -> None:
    def cancel(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache_latents(read(pictures), Encoder(), "vae", folder, on_progress=cancel)
    encoder = Encoder()
    cache_latents(read(pictures), encoder, "vae", folder)
    assert encoder.num_pictures == 1


def test_progress_counts_what_was_there_already(pictures: Path, folder: Path) -> None:
    cache_latents(read(pictures), Encoder(), "vae", folder)
    Image.new("RGB", (80, 80), "white").save(pictures / "b.png")
    seen = []
    progress = lambda done, total: seen.append((done, total))  # noqa: E731
    cache_latents(read(pictures), Encoder(), "vae", folder, on_progress=progress)
    assert seen == [(2, 3), (3, 3)]


def test_a_damaged_entry_is_refused_and_encoded_anew(pictures: Path, folder: Path) -> None:
    cache = cache_latents(read(pictures), Encoder(), "vae", folder)
    expected = cache.load(cache.entries[1].name).mean
    (shard,) = folder.glob("*.safetensors")
    start = shard.read_bytes().index(expected.numpy().tobytes())
    with shard.open("r+b") as file:
        file.seek(start)
        file.write(b"\xff")
    with pytest.raises(ValueError, match=r"is missing or damaged\. Queue the graph"):
        cache.load(cache.entries[1].name)
    encoder = Encoder()
    again = cache_latents(read(pictures), encoder, "vae", folder)
    assert encoder.num_pictures == 1
    assert torch.equal(again.load(again.entries[1].name).mean, expected)


def test_numbers_that_are_not_finite_are_refused_by_name(pictures: Path, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"invalid numbers for the picture .*a\.png"):
        cache_latents(read(pictures), lambda p: (p / 0, p), "vae", folder)
    assert not list(folder.rglob("*.safetensors"))


def test_the_size_is_that_of_the_tensors(pictures: Path, folder: Path) -> None:
    cache = cache_latents(read(pictures), Encoder(), "vae", folder)
    assert cache.total_bytes == len(cache.entries) * 2 * (3 * 8 * 8) * 4


def test_latents_survive_their_manifest(pictures: Path, folder: Path) -> None:
    cache = cache_latents(read(pictures), Encoder(), "vae", folder)
    assert LatentCache.from_json(cache.to_json()) == cache


@pytest.mark.parametrize("values", [[], {}, {"kind": "prompts", "version": 1}, None])
def test_a_foreign_manifest_is_refused(values: Any) -> None:
    with pytest.raises(ValueError, match="not a manifest of cached latents"):
        LatentCache.from_json(values)


def test_the_fingerprint_ignores_folder_and_order(pictures: Path, tmp_path: Path) -> None:
    cache = cache_latents(read(pictures), Encoder(), "vae", tmp_path / "1")
    other = dataclasses.replace(with_entries(cache, cache.entries[::-1]), folder="elsewhere")
    assert other.fingerprint() == cache.fingerprint()


@pytest.mark.parametrize(
    "change", [{"keys": ("0",)}, {"texts": (("x",),)}, {"repeats": 9}, {"dropout": 0.5}]
)
def test_the_fingerprint_tells_contents_apart(
    pictures: Path, folder: Path, change: dict[str, object]
) -> None:
    cache = cache_latents(read(pictures), Encoder(), "vae", folder)
    changed = (dataclasses.replace(cache.entries[0], **change), *cache.entries[1:])
    assert with_entries(cache, changed).fingerprint() != cache.fingerprint()
