"""Clearing the caches, by function and by command."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from atelier.trainers.buckets import Resolution
from atelier.trainers.captions import CaptionSettings
from atelier.trainers.clearing import CACHES, clear_caches
from atelier.trainers.image_folder import image_folder
from atelier.trainers.picture_files import PictureFiles
from atelier.trainers.shards import Shards
from PIL import Image
from training import write_entries

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """An output folder of ComfyUI with something in every cache, and other things beside them."""
    cache = tmp_path / "output" / "atelier" / "cache"
    for kind in ("latents", "prompts"):
        write_entries(cache / kind, {"a" * 64: {"x": torch.zeros(1000)}})
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "pictures" / "a.png")
    image_folder(
        tmp_path / "pictures",
        resolution=Resolution(width=64, height=64),
        captions=CaptionSettings(missing="empty"),
        index_folder=cache / "files",
    )
    assert list((cache / "files").glob("*.json"))
    PictureFiles(cache / "pictures").keep_pixels(np.zeros((8, 8), np.uint8))
    (tmp_path / "output" / "atelier" / "my_lora").mkdir()
    (tmp_path / "output" / "atelier" / "my_lora" / "job.json").write_text("{}", encoding="utf-8")
    return tmp_path / "output"


def cached(output: Path) -> dict[str, int]:
    """Bytes of every cache, but for the marks of their generations."""
    return {
        kind: sum(
            path.stat().st_size
            for path in (output / "atelier" / "cache" / kind).rglob("*")
            if path.is_file() and path.name != "generation"
        )
        for kind in CACHES
    }


@pytest.mark.parametrize("what", [*CACHES, "all"])
def test_what_is_named_is_removed_and_nothing_else(output: Path, what: str) -> None:
    before = cached(output)
    names = CACHES if what == "all" else (what,)
    freed = clear_caches(output / "atelier" / "cache", what)
    assert freed == sum(before[name] for name in names)
    assert cached(output) == {name: 0 if name in names else size for name, size in before.items()}
    assert (output / "atelier" / "my_lora" / "job.json").is_file()


def test_a_cleared_cache_is_known_to_have_changed(output: Path) -> None:
    shards = Shards(output / "atelier" / "cache" / "latents")
    before = shards.generation()
    clear_caches(output / "atelier" / "cache", "latents")
    assert shards.generation() != before
    assert shards.missing(["a" * 64]) == ["a" * 64]


def test_a_cache_that_was_never_made_frees_nothing(output: Path) -> None:
    clear_caches(output / "atelier" / "cache", "all")
    assert clear_caches(output / "atelier" / "cache", "all") == 0


@pytest.mark.parametrize("what", ["", "..", "../my_lora", "latents/..", "loaders"])
def test_a_name_that_is_no_cache_is_refused(output: Path, what: str) -> None:
    before = cached(output)
    with pytest.raises(ValueError, match=r"There is no cache .* Choose one of latents, prompts"):
        clear_caches(output / "atelier" / "cache", what)
    assert cached(output) == before


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trainers", "clear-caches", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=False)


def test_the_command_clears_and_says_how_much(output: Path) -> None:
    size = sum(cached(output).values())
    done = run("--output", output)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{size / 2**20:.1f} MiB are free again\n"
    assert set(cached(output).values()) == {0}


def test_the_command_clears_one_cache(output: Path) -> None:
    assert run("prompts", "--output", output).returncode == 0
    assert {name for name, size in cached(output).items() if not size} == {"prompts"}


def test_an_output_folder_without_caches_is_one_sentence(tmp_path: Path) -> None:
    done = run("--output", tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"The folder {tmp_path / 'atelier' / 'cache'} does not exist")
