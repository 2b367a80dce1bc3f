"""Folders of pictures as datasets: what is read, and what is refused in which words."""

import dataclasses
import hashlib
import os
from pathlib import Path

import pytest
from atelier.trainers.buckets import Resolution
from atelier.trainers.captions import CaptionSettings
from atelier.trainers.dataset import Dataset, PictureSettings, Subset, open_picture
from atelier.trainers.image_folder import image_folder
from PIL import Image, ImageFile

RESOLUTION = Resolution(width=64, height=64)


def add_picture(folder: Path, name: str, caption: str | None = "a caption", side: int = 80) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    Image.new("RGB", (side, side), "red").save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def read(folder: Path, **options: object) -> Subset:
    return image_folder(folder, resolution=RESOLUTION, **options)


@pytest.mark.parametrize("extension", ["png", "jpg", "jpeg", "webp", "bmp", "PNG"])
def test_every_common_picture_format_is_read(tmp_path: Path, extension: str) -> None:
    add_picture(tmp_path, f"one.{extension}")
    assert [(r.width, r.height) for r in read(tmp_path).records] == [(80, 80)]


def test_records_are_sorted_by_name(tmp_path: Path) -> None:
    for name in ("b.png", "a10.png", "a1.png", "ü.png"):
        add_picture(tmp_path, name)
    names = [Path(record.path).name for record in read(tmp_path).records]
    assert names == ["a1.png", "a10.png", "b.png", "ü.png"]


def test_text_files_folders_and_hidden_files_are_no_pictures(tmp_path: Path) -> None:
    add_picture(tmp_path, "one.png")
    (tmp_path / "notes.md").write_text("x", encoding="utf-8")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "._one.png").write_bytes(b"made by macOS")
    assert len(read(tmp_path).records) == 1


def test_pictures_that_train_unlike_they_are_shown_are_named(tmp_path: Path) -> None:
    path = add_picture(tmp_path, "moving.png")
    Image.new("RGB", (80, 80)).save(path, save_all=True, append_images=[Image.open(path)])
    Image.new("RGB", (80, 80)).save(add_picture(tmp_path, "odd.png"), icc_profile=b"no profile")
    add_picture(tmp_path, "plain.png")
    assert read(tmp_path).warnings == (
        "Animated pictures, of which only the first frame is trained: moving.png.",
        "Pictures whose colour profile is broken or for another kind of picture, and is ignored: "
        "odd.png.",
    )


def test_the_id_is_the_hash_of_bytes_and_caption(tmp_path: Path) -> None:
    path = add_picture(tmp_path, "one.png", "a cat")
    content = hashlib.sha256(path.read_bytes()).hexdigest()
    expected = hashlib.sha256(f"{content}\0a cat".encode()).hexdigest()[:16]
    assert read(tmp_path).records[0].id == expected


def test_the_id_does_not_depend_on_the_place(tmp_path: Path) -> None:
    add_picture(tmp_path / "a", "one.png")
    add_picture(tmp_path / "b", "other.png")
    add_picture(tmp_path / "b", "first.png", "another")
    assert read(tmp_path / "a").records[0].id == read(tmp_path / "b").records[1].id


def test_a_rotated_picture_has_the_size_that_viewers_show(tmp_path: Path) -> None:
    path = add_picture(tmp_path, "one.jpg")
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.new("RGB", (90, 60)).save(path, exif=exif)
    record = read(tmp_path).records[0]
    assert (record.width, record.height) == (60, 90)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"a cat", "a cat"),
        ("\ufeffa cat".encode(), "a cat"),
        (b"  a cat\r\n", "a cat"),
        ("ein Kätzchen 猫".encode(), "ein Kätzchen 猫"),
        (b"(a cat:1.2) [x] embedding:y", "(a cat:1.2) [x] embedding:y"),
        (b"", ""),
    ],
)
def test_captions_are_read_literally(tmp_path: Path, data: bytes, expected: str) -> None:
    add_picture(tmp_path, "one.png").with_suffix(".txt").write_bytes(data)
    assert read(tmp_path).records[0].texts == ((expected,),)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [("a dog", "sks, a dog"), ("a sks dog", "a sks dog"), ("", "sks")],
)
def test_the_trigger_comes_before_captions_without_it(
    tmp_path: Path, caption: str, expected: str
) -> None:
    add_picture(tmp_path, "one.png", caption)
    assert (
        read(tmp_path, captions=CaptionSettings(trigger=" sks ")).records[0].texts[0][0] == expected
    )


@pytest.mark.parametrize(("choice", "expected"), [("file name", "a red cat"), ("empty", "")])
def test_missing_captions_can_be_filled(tmp_path: Path, choice: str, expected: str) -> None:
    add_picture(tmp_path, "a_red_cat.png", caption=None)
    assert (
        read(tmp_path, captions=CaptionSettings(missing=choice)).records[0].texts[0][0] == expected
    )


def test_distinct_captions_are_listed_once(tmp_path: Path) -> None:
    for name, caption in (("a.png", "x"), ("b.png", "y"), ("c.png", "x")):
        add_picture(tmp_path, name, caption)
    assert Dataset(subsets=(read(tmp_path),)).texts == ("x", "y")


def test_repeats_count_into_the_samples_of_an_epoch(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        add_picture(tmp_path, name)
    assert read(tmp_path, repeats=3).num_samples == 6


def test_pictures_smaller_than_the_size_are_named(tmp_path: Path) -> None:
    add_picture(tmp_path, "small.png", side=63)
    add_picture(tmp_path, "large.png", side=64)
    assert read(tmp_path).warnings == ("Pictures enlarged to the training size: small.png.",)


def test_random_sizes_are_drawn_for_each_content(tmp_path: Path) -> None:
    for number in range(30):
        path = add_picture(tmp_path, f"{number}.png")
        Image.new("RGB", (80, 80), (number, 0, 0)).save(path)
    resolution = Resolution(width=512, height=512, mode="random")
    first = image_folder(tmp_path, resolution=resolution)
    sizes = {record.content: first.size_of(record) for record in first.records}
    assert len(set(sizes.values())) > 10  # of 28 that can be drawn
    for path in [*tmp_path.iterdir()]:
        path.rename(path.with_stem(f"renamed {path.stem}"))
    again = image_folder(tmp_path, resolution=resolution)
    assert {record.content: again.size_of(record) for record in again.records} == sizes


def test_empty_captions_are_named(tmp_path: Path) -> None:
    add_picture(tmp_path, "silent.png", caption="")
    assert read(tmp_path).warnings == ("Pictures with an empty caption: silent.png.",)


def test_progress_is_reported_to_its_end(tmp_path: Path) -> None:
    seen = []
    for name in ("a.png", "b.png"):
        add_picture(tmp_path, name)
    read(tmp_path, on_progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (2, 2)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"folder .*nowhere does not exist"):
        read(tmp_path / "nowhere")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no pictures"):
        read(tmp_path)


def break_picture(path: Path, how: str) -> None:
    data = path.read_bytes()
    broken = {"half": data[: len(data) // 2], "empty": b"", "text": b"not a picture" * 99}
    path.write_bytes(broken[how])


@pytest.mark.parametrize("how", ["half", "empty", "text"])
@pytest.mark.parametrize("extension", ["png", "jpg", "webp", "bmp"])
def test_a_broken_picture_is_refused_by_name(tmp_path: Path, extension: str, how: str) -> None:
    add_picture(tmp_path, "good.png")
    break_picture(add_picture(tmp_path, f"bad.{extension}"), how)
    with pytest.raises(ValueError, match=rf"bad\.{extension} is damaged, cut off or not a picture"):
        [open_picture(record) for record in read(tmp_path).records]


def test_half_a_picture_is_refused_although_another_pack_accepts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    break_picture(add_picture(tmp_path, "bad.jpg"), "half")
    with pytest.raises(ValueError, match=r"bad\.jpg is damaged"):
        [open_picture(record) for record in read(tmp_path).records]
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_a_picture_of_absurd_size_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    add_picture(tmp_path, "bomb.png")
    with pytest.raises(ValueError, match=r"bomb\.png has too many pixels"):
        read(tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads all")
def test_an_unreadable_picture_is_refused(tmp_path: Path) -> None:
    add_picture(tmp_path, "secret.png").chmod(0)
    with pytest.raises(ValueError, match=r"Cannot read the file .*secret\.png"):
        read(tmp_path)


def test_a_missing_caption_is_refused_by_name(tmp_path: Path) -> None:
    add_picture(tmp_path, "one.png", caption=None)
    with pytest.raises(ValueError, match=r"one\.png has no caption file one\.txt"):
        read(tmp_path)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le"])
def test_a_caption_in_another_encoding_is_refused(tmp_path: Path, encoding: str) -> None:
    path = add_picture(tmp_path, "one.png").with_suffix(".txt")
    path.write_bytes("ein Kätzchen".encode(encoding))
    with pytest.raises(ValueError, match=r"one\.txt is not UTF-8 text"):
        read(tmp_path)


@pytest.mark.parametrize("repeats", [0, -1])
def test_no_repeats_are_refused(tmp_path: Path, repeats: int) -> None:
    with pytest.raises(ValueError, match=f"Repeats must be 1 or more, got {repeats}"):
        read(tmp_path, repeats=repeats)


def test_an_unknown_choice_for_missing_captions_is_refused() -> None:
    with pytest.raises(ValueError, match="error, file name, empty, got 'skip'"):
        CaptionSettings(missing="skip")


def test_a_picture_that_changed_since_is_refused(tmp_path: Path) -> None:
    path = add_picture(tmp_path, "one.png")
    record = read(tmp_path).records[0]
    add_picture(tmp_path, "one.png", side=90)
    with pytest.raises(ValueError, match=f"{path.name} changed after the dataset was read"):
        open_picture(record)


def test_a_picture_that_is_gone_is_refused(tmp_path: Path) -> None:
    path = add_picture(tmp_path, "one.png")
    record = read(tmp_path).records[0]
    path.unlink()
    with pytest.raises(ValueError, match=r"Cannot read the file .*one\.png"):
        open_picture(record)


def test_shuffled_tags_are_texts_of_one_caption(tmp_path: Path) -> None:
    add_picture(tmp_path, "one.png", "sks, cat, red, big")
    settings = CaptionSettings(shuffle=True, keep_tokens=1, variants=4)
    dataset = read(tmp_path, captions=settings)
    ((texts,),) = (record.texts for record in dataset.records)
    assert texts[0] == "sks, cat, red, big"
    assert len(set(texts)) == 4
    assert {tuple(sorted(text.split(", "))) for text in texts} == {("big", "cat", "red", "sks")}
    assert Dataset(subsets=(dataset,)).texts == texts


def test_every_line_of_a_file_can_be_a_caption(tmp_path: Path) -> None:
    add_picture(tmp_path, "one.png", "a cat\na pet\n")
    dataset = read(tmp_path, captions=CaptionSettings(lines="each"))
    assert dataset.records[0].texts == (("a cat",), ("a pet",))


def test_a_flipped_picture_is_a_second_transform() -> None:
    upright, mirrored = PictureSettings(flip=True).transforms((64, 80), "seed")
    assert (upright.width, upright.height, upright.flip) == (64, 80, False)
    assert mirrored == dataclasses.replace(upright, flip=True)


def test_a_random_crop_belongs_to_the_picture() -> None:
    settings = PictureSettings(crop="random")
    assert settings.transforms((64, 64), "a") == settings.transforms((64, 64), "a")
    assert settings.transforms((64, 64), "a") != settings.transforms((64, 64), "b")


def test_a_wrong_crop_is_refused() -> None:
    with pytest.raises(ValueError, match="The crop must be one of center"):
        PictureSettings(crop="middle")  # type: ignore[arg-type]


def test_a_bad_file_can_be_left_out(tmp_path: Path) -> None:
    add_picture(tmp_path, "good.png")
    break_picture(add_picture(tmp_path, "bad.png"), "text")
    dataset = read(tmp_path, on_bad_file="skip")
    assert [Path(record.path).name for record in dataset.records] == ["good.png"]
    (warning,) = dataset.warnings
    assert warning.startswith(f"Left out: The picture {tmp_path / 'bad.png'} is damaged")


def test_files_are_known_by_their_index(tmp_path: Path) -> None:
    """Nothing of an unchanged file is read again: it may hold anything now."""
    path, index = add_picture(tmp_path / "pictures", "one.png"), tmp_path / "index"
    long_ago = path.stat().st_mtime_ns - 10_000_000_000
    os.utime(path, ns=(long_ago, long_ago))
    first = read(tmp_path / "pictures", index_folder=index)
    path.write_bytes(b"x" * path.stat().st_size)
    os.utime(path, ns=(long_ago, long_ago))
    assert read(tmp_path / "pictures", index_folder=index) == first


def test_pictures_with_a_short_side_are_left_out_by_name(tmp_path: Path) -> None:
    add_picture(tmp_path, "large.png", side=80)
    add_picture(tmp_path, "small.png", side=79)
    subset = read(tmp_path).without_small(80)
    assert [Path(record.path).name for record in subset.records] == ["large.png"]
    assert subset.warnings == ("Left out, with a side of fewer than 80 pixels: small.png.",)
    assert len(read(tmp_path).without_small(79).records) == 2
    with pytest.raises(ValueError, match=r"have a side of fewer than 81 pixels\. Lower min_side"):
        read(tmp_path).without_small(81)
