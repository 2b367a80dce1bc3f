"""Pictures of a graph as a dataset: their files, captions and masks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from atelier.trainers.buckets import Resolution
from atelier.trainers.captions import CaptionSettings
from atelier.trainers.dataset import PictureSettings, Subset, mask_weights, open_picture
from atelier.trainers.graph_pictures import graph_pictures
from atelier.trainers.picture_files import PictureFiles
from atelier.trainers.pictures import Transform
from PIL import Image
from small_disk import fill, small_disk


def image(height: int = 48, width: int = 64, channels: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.rand(height, width, channels, generator=torch.Generator().manual_seed(seed))


def make(folder: Path, images: list[torch.Tensor], texts: list[str], **options: object) -> Subset:
    given = {"pictures": PictureSettings(), "captions": CaptionSettings(), **options}
    resolution = Resolution(width=64, height=64)
    return graph_pictures(images, texts, PictureFiles(folder), resolution=resolution, **given)


def test_files_hold_the_pixels_of_save_image(tmp_path: Path) -> None:
    """Which cuts 255 times the value off to eight bits."""
    pixels = image()
    record = make(tmp_path, [pixels], ["a"]).records[0]
    expected = np.clip(255.0 * pixels.numpy(), 0, 255).astype(np.uint8)
    with Image.open(record.path) as stored:
        assert np.array_equal(np.asarray(stored), expected)
    assert (record.width, record.height) == (64, 48)
    assert open_picture(record).size == (64, 48)


def test_lists_of_different_sizes_keep_their_order_and_captions(tmp_path: Path) -> None:
    images = [image(48, 64), image(80, 40, seed=1), image(64, 64, seed=2)]
    records = make(tmp_path, images, ["one", "two", "three"]).records
    assert [(r.width, r.height) for r in records] == [(64, 48), (40, 80), (64, 64)]
    assert [r.texts for r in records] == [(("one",),), (("two",),), (("three",),)]


def test_one_caption_is_for_all(tmp_path: Path) -> None:
    subset = make(tmp_path, [image(), image(seed=1)], ["cats"], repeats=3)
    assert [r.texts for r in subset.records] == [(("cats",),)] * 2
    assert subset.num_samples == 6


def test_caption_settings_hold(tmp_path: Path) -> None:
    captions = CaptionSettings(trigger="sks", suffix="in oil", lines="each")
    records = make(tmp_path, [image()], ["a cat\na dog"], captions=captions).records
    assert records[0].texts == (("sks, a cat in oil",), ("sks, a dog in oil",))


def test_a_source_of_captions_without_effect_is_told(tmp_path: Path) -> None:
    subset = make(tmp_path, [image()], ["a"], captions=CaptionSettings(source="file name"))
    assert subset.told == (
        "The source of Caption Settings has no effect here: the captions are those of texts.",
    )
    assert make(tmp_path, [image()], ["a"]).told == ()


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_grey_and_transparent_images_stay_so(tmp_path: Path, channels: int, mode: str) -> None:
    record = make(tmp_path, [image(channels=channels)], ["a"]).records[0]
    assert open_picture(record).mode == mode


def test_a_picture_is_written_once(tmp_path: Path) -> None:
    make(tmp_path, [image(), image(seed=1), image()], ["a"])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    assert len(before) == 2
    again = make(tmp_path, [image(), image(seed=2)], ["a"])
    assert len(list(tmp_path.rglob("*.png"))) == 3
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert again.records[0].path in map(str, before)


def test_a_file_that_is_gone_changes_the_generation_and_is_written_again(tmp_path: Path) -> None:
    files = PictureFiles(tmp_path)
    before = files.generation()
    kept = Path(files.keep_pixels(np.zeros((8, 8, 3), np.uint8)).path)
    assert files.generation() == before
    kept.unlink()
    gone = files.generation()
    assert gone != before
    assert files.generation() == gone
    assert Path(files.keep_pixels(np.zeros((8, 8, 3), np.uint8)).path) == kept
    assert kept.is_file()
    assert files.generation() == gone


def test_masks_weigh_their_pictures(tmp_path: Path) -> None:
    mask = torch.zeros(64, 64)
    mask[:, :32] = 1
    subset = make(tmp_path, [image(64, 64)], ["a"], masks=[mask])
    weights = mask_weights(subset.records[0].mask, Transform(width=64, height=64))
    assert torch.equal(weights, mask[::8, ::8])


@pytest.mark.parametrize(
    ("images", "texts", "masks", "message"),
    [
        (0, 1, 0, "There are no pictures"),
        (3, 2, 0, "2 captions for 3 pictures"),
        (1, 2, 0, "2 captions for 1 pictures"),
        (2, 1, 1, "1 masks for 2 pictures"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(
    tmp_path: Path, images: int, texts: int, masks: int, message: str
) -> None:
    given = [image(seed=seed) for seed in range(images)]
    with pytest.raises(ValueError, match=message):
        make(tmp_path, given, ["a"] * texts, masks=[torch.ones(48, 64)] * masks)
    assert not list(tmp_path.iterdir())


def test_a_mask_of_another_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mask 1 has 64x64 pixels and its picture 64x48"):
        make(tmp_path, [image()], ["a"], masks=[torch.ones(64, 64)])


def test_an_image_of_two_channels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="An image has 2 channels"):
        make(tmp_path, [image(channels=2)], ["a"])
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_sentence_and_leaves_no_part(tmp_path: Path) -> None:
    with small_disk(tmp_path) as disk:
        fill(disk)
        with pytest.raises(ValueError, match="is full"):
            make(disk / "pictures", [image(512, 512)], ["a"])
        assert not [p for p in (disk / "pictures").rglob("*") if p.is_file()]
