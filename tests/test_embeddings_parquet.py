"""embeddings.parquet, written and read as diffusers' flux_lora_quantization scripts do.

`recipe_file` makes one like compute_embeddings.py, and `read_by_the_recipe` reads one like the
training script's dataset: in our own words, with pyarrow in place of pandas.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from atelier.trainers.buckets import Resolution
from atelier.trainers.caching import cache_prompts
from atelier.trainers.captions import CaptionSettings
from atelier.trainers.dataset import Dataset
from atelier.trainers.embeddings_parquet import export_embeddings, import_embeddings
from atelier.trainers.image_folder import image_folder
from PIL import Image, ImageOps
from small_disk import small_disk

TOKENS, WIDTH, POOLED = 77, 24, 5
NAMES = ("a", "b", "c")
SIDEWAYS = 6
"""EXIF orientation of a picture that viewers turn by 90 degrees."""


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """An RGB, a grey and a turned picture."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    noise = [Image.effect_noise((40, 24), 50 + index) for index in range(3)]
    Image.merge("RGB", noise).save(folder / "a.png")
    noise[1].save(folder / "b.png")
    exif = Image.Exif()
    exif[0x0112] = SIDEWAYS
    Image.merge("RGB", noise[::-1]).save(folder / "c.jpg", exif=exif)
    for name in NAMES:
        (folder / f"{name}.txt").write_text(f"caption {name}", encoding="utf-8")
    return folder


def read(pictures: Path, /, **captions: Any) -> Dataset:
    resolution, settings = Resolution(width=64, height=64), CaptionSettings(**captions)
    return Dataset(subsets=(image_folder(pictures, resolution=resolution, captions=settings),))


def decoded(path: Path) -> Image.Image:
    """As the package `datasets` gives a picture to the scripts."""
    return ImageOps.exif_transpose(Image.open(path))


def image_hash(path: Path) -> str:
    return hashlib.sha256(decoded(path).tobytes()).hexdigest()


def embeddings(seed: int) -> dict[str, np.ndarray]:
    """What FluxPipeline.encode_prompt returns, as numpy arrays: T5 in 8 bits gives float16."""
    random = np.random.default_rng(seed)
    return {
        "prompt_embeds": random.normal(size=(1, TOKENS, WIDTH)).astype(np.float16),
        "pooled_prompt_embeds": random.normal(size=(1, POOLED)).astype(np.float32),
        "text_ids": np.zeros((TOKENS, 3), np.float16),
    }


def recipe_file(path: Path, rows: list[tuple[str, dict[str, np.ndarray]]]) -> Path:
    """Rows of a hash and flat lists of Python floats, which parquet has as float64."""
    columns: dict[str, list] = {"image_hash": [name for name, _ in rows]}
    for column in ("prompt_embeds", "pooled_prompt_embeds", "text_ids"):
        columns[column] = [values[column].flatten().tolist() for _, values in rows]
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def read_by_the_recipe(path: Path) -> dict[str, tuple[torch.Tensor, ...]]:
    """{hash: tensors}; what is not of the right length cannot be reshaped."""
    shapes = {
        "prompt_embeds": (TOKENS, WIDTH),
        "pooled_prompt_embeds": (POOLED,),
        "text_ids": (77, 3),
    }
    rows = pyarrow.parquet.read_table(path).to_pylist()
    return {
        row["image_hash"]: tuple(
            torch.from_numpy(np.array(row[name]).reshape(shape)) for name, shape in shapes.items()
        )
        for row in rows
    }


@pytest.fixture
def recipe(pictures: Path, tmp_path: Path) -> Path:
    files = sorted(path for path in pictures.iterdir() if path.suffix != ".txt")
    rows = [(image_hash(path), embeddings(seed)) for seed, path in enumerate(files)]
    return recipe_file(tmp_path / "embeddings.parquet", rows[::-1])  # not in our order


def prompts_of(dataset: Dataset, folder: Path):
    """A prompt cache of random embeddings."""

    def encode(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(len(texts[0]) + ord((texts[0] or "0")[-1]))
        embeds = torch.randn(1, TOKENS, WIDTH, generator=generator).bfloat16()
        return embeds, torch.randn(1, POOLED, generator=generator)

    return cache_prompts(dataset.texts, encode, "clip", TOKENS, folder)


def test_every_caption_gets_the_embeddings_of_its_picture(
    pictures: Path, recipe: Path, tmp_path: Path
) -> None:
    prompts = import_embeddings(read(pictures), recipe, tmp_path / "cache")
    assert prompts.length == TOKENS
    for seed, name in enumerate(NAMES):
        loaded, expected = prompts.load(f"caption {name}"), embeddings(seed)
        whole = torch.from_numpy(expected["prompt_embeds"][0]).float()
        assert torch.equal(loaded.prompt_embeds, whole)
        assert torch.equal(loaded.pooled, torch.from_numpy(expected["pooled_prompt_embeds"][0]))


def test_what_is_imported_is_written_once(pictures: Path, recipe: Path, tmp_path: Path) -> None:
    first = import_embeddings(read(pictures), recipe, tmp_path / "cache")
    before = sorted((tmp_path / "cache").iterdir())
    assert import_embeddings(read(pictures), recipe, tmp_path / "cache") == first
    assert sorted((tmp_path / "cache").iterdir()) == before


def test_the_recipe_reads_what_is_exported(pictures: Path, tmp_path: Path) -> None:
    dataset = read(pictures)
    prompts = prompts_of(dataset, tmp_path / "cache")
    path = tmp_path / "out" / "embeddings.parquet"
    assert export_embeddings(dataset, prompts, path) == 3
    found = read_by_the_recipe(path)
    for record in dataset.subsets[0].records:
        embeds, pooled, text_ids = found.pop(image_hash(Path(record.path)))
        expected = prompts.load(record.texts[0][0])
        assert torch.equal(embeds.float(), expected.prompt_embeds.float())
        assert torch.equal(pooled.float(), expected.pooled)
        assert not text_ids.any()
    assert not found


def test_what_is_exported_is_imported_again(pictures: Path, tmp_path: Path) -> None:
    dataset = read(pictures)
    prompts = prompts_of(dataset, tmp_path / "cache")
    path = tmp_path / "embeddings.parquet"
    export_embeddings(dataset, prompts, path)
    again = import_embeddings(dataset, path, tmp_path / "other")
    for name in NAMES:
        ours, theirs = (cache.load(f"caption {name}") for cache in (prompts, again))
        assert torch.equal(ours.prompt_embeds.float(), theirs.prompt_embeds)


def test_one_caption_for_all_pictures_is_imported(pictures: Path, tmp_path: Path) -> None:
    """As in DreamBooth: every row of the file holds the same embeddings."""
    files = [path for path in pictures.iterdir() if path.suffix != ".txt"]
    rows = [(image_hash(path), embeddings(0)) for path in files]
    recipe = recipe_file(tmp_path / "embeddings.parquet", rows)
    dataset = read(pictures, source="instance prompt", instance_prompt="a yarn art style dog")
    prompts = import_embeddings(dataset, recipe, tmp_path / "cache")
    assert [entry.text for entry in prompts.entries] == ["a yarn art style dog"]


def test_captions_may_be_unknown(pictures: Path, recipe: Path, tmp_path: Path) -> None:
    for path in pictures.glob("*.txt"):
        path.unlink()
    prompts = import_embeddings(read(pictures, missing="file name"), recipe, tmp_path / "cache")
    assert len({entry.key for entry in prompts.entries}) == 3
    with pytest.raises(ValueError, match=r"Several pictures have the caption '', and .* different"):
        import_embeddings(read(pictures, missing="empty"), recipe, tmp_path / "other")


def test_a_picture_that_the_file_lacks_is_named(
    pictures: Path, recipe: Path, tmp_path: Path
) -> None:
    Image.effect_noise((40, 24), 90).save(pictures / "b.png")
    with pytest.raises(ValueError, match=r"has no embeddings of these pictures: b\.png\. It knows"):
        import_embeddings(read(pictures), recipe, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        ({"dropout": 0.1}, "no empty caption, which caption dropout needs. Set dropout to 0"),
        ({"shuffle": True, "keep_tokens": 0}, "has several captions or variants of one"),
    ],
)
def test_a_dataset_with_more_than_one_text_a_picture_is_refused(
    pictures: Path, recipe: Path, tmp_path: Path, captions: dict[str, Any], message: str
) -> None:
    (pictures / "a.txt").write_text("one, two", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        import_embeddings(read(pictures, **captions), recipe, tmp_path / "cache")
    with pytest.raises(ValueError, match=message):
        export_embeddings(read(pictures, **captions), None, tmp_path / "out.parquet")


def changed(path: Path, **columns: Any) -> Path:
    """The file with other columns; None removes one."""
    table = {**pyarrow.parquet.read_table(path).to_pydict(), **columns}
    kept = {name: values for name, values in table.items() if values is not None}
    pyarrow.parquet.write_table(pyarrow.table(kept), path)
    return path


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text_ids": None}, "it has no column text_ids of the right type"),
        ({"image_hash": None}, "it has no column image_hash of the right type"),
        ({"image_hash": [1, 2, 3]}, "it has no column image_hash of the right type"),
        ({"prompt_embeds": [1.0, 2.0, 3.0]}, "it has no column prompt_embeds of the right type"),
        ({"prompt_embeds": [["x"]] * 3}, "it has no column prompt_embeds of the right type"),
        ({"text_ids": [[0.0] * 230] * 3}, "Row 1 of .* lists of 1848, 5 and 230 numbers, which do"),
        ({"prompt_embeds": [[0.5] * 100] * 3}, "Row 1 of .* lists of 100, 5 and 231 numbers"),
        (
            {"pooled_prompt_embeds": [None, [0.5], [0.5]]},
            "Row 1 of .* lists of 1848, 0 and",
        ),
        ({"pooled_prompt_embeds": [[0.5] * 5, [0.5] * 4, [0.5] * 5]}, "Row 2 of .* other lengths"),
        ({"pooled_prompt_embeds": [[float("nan")] * 5] * 3}, "Row 1 of .* that are not finite"),
    ],
)
def test_a_file_with_other_columns_or_lengths_is_one_sentence(
    pictures: Path, recipe: Path, tmp_path: Path, columns: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        import_embeddings(read(pictures), changed(recipe, **columns), tmp_path / "cache")


@pytest.mark.parametrize("how", ["empty", "text", "half", "no end"])
def test_a_file_that_is_no_parquet_is_one_sentence(
    pictures: Path, recipe: Path, tmp_path: Path, how: str
) -> None:
    data = recipe.read_bytes()
    damaged = {"empty": b"", "text": b"a" * 99, "half": data[: len(data) // 2], "no end": data[:-9]}
    recipe.write_bytes(damaged[how])
    with pytest.raises(ValueError, match=r"embeddings\.parquet cannot be read as parquet"):
        import_embeddings(read(pictures), recipe, tmp_path / "cache")


def test_a_file_with_damaged_data_is_one_sentence(
    pictures: Path, recipe: Path, tmp_path: Path
) -> None:
    data = bytearray(recipe.read_bytes())
    data[4:5000] = b"\xff" * 4996
    recipe.write_bytes(data)
    with pytest.raises(ValueError, match=r"embeddings\.parquet"):
        import_embeddings(read(pictures), recipe, tmp_path / "cache")


def test_a_full_disk_leaves_no_file(pictures: Path, tmp_path: Path) -> None:
    dataset = read(pictures)
    prompts = prompts_of(dataset, tmp_path / "cache")
    with small_disk(tmp_path / "disk") as disk:
        (disk / "other").write_bytes(bytes((1 << 20) - 8192))
        with pytest.raises(ValueError, match=r"The disk of .* is full"):
            export_embeddings(dataset, prompts, disk / "embeddings.parquet")
        assert [path.name for path in disk.iterdir()] == ["other"]
