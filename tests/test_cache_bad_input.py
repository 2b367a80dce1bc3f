"""Caches that were cut, come from elsewhere, meet a full disk or another process."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from atelier.trainers import shards
from atelier.trainers.buckets import Resolution
from atelier.trainers.caches import LatentCache
from atelier.trainers.caching import cache_latents, num_missing
from atelier.trainers.captions import CaptionSettings
from atelier.trainers.dataset import Dataset
from atelier.trainers.image_folder import image_folder
from PIL import Image
from small_disk import fill, small_disk

ROOT = Path(__file__).resolve().parent.parent
NUM_PICTURES = 6


class Encoder:
    def __init__(self) -> None:
        self.num_pictures = 0

    def __call__(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.num_pictures += len(pixels)
        mean = torch.nn.functional.avg_pool2d(pixels, 8).mean(1, keepdim=True).repeat(1, 16, 1, 1)
        return mean, mean + 1


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(NUM_PICTURES):
        Image.new("RGB", (256, 256), (40 * index, 9, 200)).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def one_entry_a_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_SECONDS", 0.0)


def read(source: Path) -> Dataset:
    resolution, captions = Resolution(width=256, height=256), CaptionSettings(missing="empty")
    subset = image_folder(source, resolution=resolution, captions=captions)
    return Dataset(subsets=(subset,))


def means(cache: LatentCache) -> torch.Tensor:
    return torch.stack([cache.load(key).mean for key in cache.keys])


def test_of_a_shard_cut_in_half_only_the_lost_half_is_encoded(
    pictures: Path, tmp_path: Path
) -> None:
    cache = cache_latents(read(pictures), Encoder(), "vae", tmp_path / "cache")
    expected = means(cache)
    (path,) = (tmp_path / "cache").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    lost = num_missing(cache)
    assert NUM_PICTURES // 2 <= lost < NUM_PICTURES
    encoder = Encoder()
    again = cache_latents(read(pictures), encoder, "vae", tmp_path / "cache")
    assert encoder.num_pictures == lost
    assert torch.equal(means(again), expected)


def test_shards_of_another_encoder_are_not_taken(pictures: Path, tmp_path: Path) -> None:
    other = cache_latents(read(pictures), lambda p: (p[:, :1, ::8, ::8],) * 2, "other", tmp_path)
    encoder = Encoder()
    cache = cache_latents(read(pictures), encoder, "vae", tmp_path)
    assert encoder.num_pictures == NUM_PICTURES
    assert means(cache).shape[1] == 16
    assert means(other).shape[1] == 1  # they stay


@pytest.mark.usefixtures("one_entry_a_shard")
def test_a_disk_that_fills_up_while_caching_keeps_what_was_written(
    pictures: Path, tmp_path: Path
) -> None:
    encoder = Encoder()

    def encode(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if encoder.num_pictures == 3:
            fill(disk)
        return encoder(pixels)

    with small_disk(tmp_path / "disk", 2) as disk:
        with pytest.raises(ValueError, match=r"^The disk of .*cache is full\. Free some space"):
            cache_latents(read(pictures), encode, "vae", disk / "cache")
        assert len(list((disk / "cache").iterdir())) == 3  # nothing half-written
        (disk / "filler").unlink()
        again = Encoder()
        cache = cache_latents(read(pictures), again, "vae", disk / "cache")
        assert again.num_pictures == NUM_PICTURES - 3
        assert len(means(cache)) == NUM_PICTURES


CACHE_ALONE = """
import sys, time
sys.path.append(sys.argv[1])
from pack import load_pack
load_pack()
sys.path.append(sys.argv[2])
import test_cache_bad_input as shared
from pathlib import Path
encoder = shared.Encoder()
def encode(pixels):
    time.sleep(0.2)
    return encoder(pixels)
dataset = shared.read(Path(sys.argv[3]))
print("ready", flush=True)
sys.stdin.readline()
shared.shards.SHARD_SECONDS = 0.0
cache = shared.cache_latents(dataset, encode, "vae", sys.argv[4])
print(encoder.num_pictures, float(shared.means(cache).sum()))
"""


def test_two_processes_may_cache_the_same_pictures_at_once(pictures: Path, tmp_path: Path) -> None:
    folders = (ROOT / "scripts", ROOT / "tests", pictures, tmp_path / "cache")
    command = [sys.executable, "-c", CACHE_ALONE, *map(str, folders)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    support = {"PYTHONPATH": str(ROOT / "tests" / "support")}
    processes = [subprocess.Popen(command, env={**os.environ, **support}, **pipes) for _ in "ab"]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [process.communicate(timeout=120)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    cache = cache_latents(read(pictures), Encoder(), "vae", tmp_path / "alone")
    expected = float(means(cache).sum())
    assert [float(total) for _, total in answers] == [pytest.approx(expected)] * 2
    assert sum(int(count) for count, _ in answers) > NUM_PICTURES  # they did it at once
    assert not list((tmp_path / "cache").glob(".*"))
    assert num_missing(dataclasses.replace(cache, folder=str(tmp_path / "cache"))) == 0
