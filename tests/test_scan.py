"""Scans of picture folders: the facts are Pillow's, unchanged files are not read again."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
from atelier.trainers.content_hashes import ContentHashes
from atelier.trainers.pictures import display_size
from atelier.trainers.scan import Picture, Scan, scan_folder
from PIL import Image, ImageCms, ImageFile, ImageOps, PngImagePlugin
from small_disk import fill, small_disk

LONG_AGO = 1_600_000_000_123_456_700
"""In nanoseconds; Windows keeps hundreds of them."""
ORIENTATION = 0x0112
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
BROKEN = SRGB[:200]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    return folder


def scan(folder: Path, **options: object) -> Scan:
    return scan_folder(folder, folder.parent / "index", **options)


def add(folder: Path, name: str, size: tuple[int, int] = (80, 60), **options: object) -> Path:
    """A picture that was changed long ago."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(options.pop("mode", "RGB"), size).save(path, **options)
    return age(path)


def age(path: Path, mtime_ns: int = LONG_AGO) -> Path:
    os.utime(path, ns=(mtime_ns, mtime_ns))
    return path


def sizes(found: Scan) -> dict[str, tuple[int, int]]:
    return {Path(p.path).name: (p.width, p.height) for p in found.pictures}


def names(found: Scan) -> list[str]:
    """Paths below the folder, with forward slashes."""
    return [Path(p.path).relative_to(found.folder).as_posix() for p in found.pictures]


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags.tobytes()


def xmp(orientation: int) -> str:
    return f'<rdf:Description tiff:Orientation="{orientation}"/>'


def xmp_chunk(orientation: int) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp(orientation))
    return info


def move_chunk_to_end(path: Path, kind: bytes) -> None:
    """Put a chunk of a PNG behind the pixels."""
    data = path.read_bytes()
    start = data.index(kind) - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    path.write_bytes(data[:start] + data[end:-12] + data[start:end] + data[-12:])
    age(path)


# Facts.


def add_many_kinds(folder: Path) -> None:
    for extension in ("png", "jpg", "jpeg", "webp", "bmp", "PNG"):
        add(folder, f"plain.{extension}", (70, 50))
    for mode in ("1", "L", "LA", "P", "RGBA", "I;16"):
        add(folder, f"mode_{mode.replace(';', '_')}.png", mode=mode)
    for mode in ("L", "CMYK"):
        add(folder, f"mode_{mode}.jpg", mode=mode)
    add(folder, "keyed.png", transparency=(0, 0, 0))
    add(folder, "alpha.webp", mode="RGBA")
    for name in ("profile.png", "profile.jpg", "profile.webp"):
        add(folder, name, icc_profile=SRGB)
        add(folder, f"ignored_{name}", icc_profile=BROKEN)
    frames = [Image.new("RGB", (40, 30), color) for color in ("red", "green", "blue")]
    for name in ("moving.png", "moving.webp"):
        frames[0].save(folder / name, save_all=True, append_images=frames[1:])
    for orientation in range(1, 9):
        for extension in ("jpg", "png", "webp"):
            add(folder, f"exif_{orientation}.{extension}", exif=exif(orientation))
        add(folder, f"xmp_{orientation}.jpg", xmp=xmp(orientation).encode())
        add(folder, f"xmp_{orientation}.png", pnginfo=xmp_chunk(orientation))
        move_chunk_to_end(add(folder, f"late_{orientation}.png", exif=exif(orientation)), b"eXIf")
        late_xmp = add(folder, f"late_xmp_{orientation}.png", pnginfo=xmp_chunk(orientation))
        move_chunk_to_end(late_xmp, b"iTXt")


def facts_of_pillow(path: Path) -> Picture:
    """From the decoded picture."""
    facts = path.stat()
    with Image.open(path) as image:
        image.load()
        upright = ImageOps.exif_transpose(image)
        return Picture(
            path=str(path),
            num_bytes=facts.st_size,
            mtime_ns=facts.st_mtime_ns,
            width=upright.width,
            height=upright.height,
            has_alpha=image.has_transparency_data,
            num_frames=getattr(image, "n_frames", 1),
            has_unusable_profile=path.name.startswith("ignored"),
        )


def test_the_facts_are_those_of_the_decoded_pictures(pictures: Path) -> None:
    add_many_kinds(pictures)
    expected = [facts_of_pillow(path) for path in sorted(pictures.iterdir())]
    assert list(scan(pictures).pictures) == expected
    assert list(scan(pictures).pictures) == expected  # from the index
    assert {p.num_frames for p in expected} == {1, 3}
    assert {p.has_alpha for p in expected} == {True, False}
    assert {p.has_unusable_profile for p in expected} == {True, False}
    assert sum((p.width, p.height) == (60, 80) for p in expected) == 7 * 4


def test_the_second_frame_of_a_jpeg_is_no_animation(pictures: Path) -> None:
    frames = [Image.new("RGB", (40, 30), color) for color in ("red", "green")]
    frames[0].save(pictures / "phone.jpg", "MPO", save_all=True, append_images=frames[1:])
    assert Image.open(pictures / "phone.jpg").format == "MPO"
    assert [p.num_frames for p in scan(pictures).pictures] == [1]


def test_only_a_png_with_late_metadata_is_decoded(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(
        ImageFile.ImageFile, "load", lambda image: decoded.append(image.format) or load(image)
    )
    add(pictures, "plain.png")
    add(pictures, "early.png", exif=exif(6))
    late = add(pictures, "late.png", exif=exif(6))
    move_chunk_to_end(late, b"eXIf")
    add(pictures, "photo.jpg", exif=exif(6))
    decoded.clear()
    assert sizes(scan(pictures))["late.png"] == (60, 80)
    assert decoded == ["PNG"]
    assert display_size(Image.open(late)) == (60, 80)


# What is listed.


def test_pictures_come_in_the_order_of_their_names_in_every_script(pictures: Path) -> None:
    found = ["b.png", "a10.png", "a1.png", "ü.png", "猫 と.jpg", "кот.webp", "🐈.png", "قط.bmp"]
    for name in found:
        add(pictures, name)
    assert names(scan(pictures)) == names(scan(pictures)) == sorted(found)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_names_that_are_no_text_are_read_and_remembered(pictures: Path) -> None:
    path = add(pictures, "one.png")
    path.rename(pictures / os.fsdecode(b"caf\xe9.png"))
    assert scan(pictures).num_read == 1
    again = scan(pictures)
    assert again.num_read == 0
    assert os.path.exists(again.pictures[0].path)


def test_hidden_files_folders_and_other_files_are_no_pictures(pictures: Path) -> None:
    add(pictures, "one.png")
    add(pictures, ".hidden.png")
    add(pictures, ".thumbnails/two.png")
    add(pictures, "folder.png/three.png")
    for name in ("one.txt", "notes.md", "._one.png", "._one.txt"):
        (pictures / name).write_text("x", encoding="utf-8")
    found = scan(pictures)
    assert names(found) == ["one.png"]
    assert found.other_files == {str(pictures / "one.txt"), str(pictures / "notes.md")}


def test_subfolders_are_read_when_asked_for(pictures: Path) -> None:
    for name in ("one.png", "b/two.png", "b/c/three.png", ".git/four.png"):
        add(pictures, name)
    (pictures / "b" / "two.txt").write_text("x", encoding="utf-8")
    assert names(scan(pictures)) == ["one.png"]
    found = scan(pictures, recursive=True)
    assert names(found) == ["b/c/three.png", "b/two.png", "one.png"]
    assert found.other_files == {str(pictures / "b" / "two.txt")}
    assert scan(pictures).num_read == scan(pictures, recursive=True).num_read == 0


def link(path: Path, target: Path | str) -> None:
    try:
        path.symlink_to(target, target_is_directory=Path(target).is_dir())
    except OSError:
        pytest.skip("this user may not make links")


def test_links_that_lead_back_are_followed_once(pictures: Path) -> None:
    add(pictures, "sub/one.png")
    link(pictures / "sub" / "up", pictures)
    link(pictures / "sub" / "again", pictures / "sub")
    link(pictures / "self", "self")
    add(pictures.parent / "elsewhere", "two.png")
    link(pictures / "there", pictures.parent / "elsewhere")
    link(pictures / "there too", pictures.parent / "elsewhere")
    assert names(scan(pictures, recursive=True)) == ["sub/one.png", "there/two.png"]


def test_a_linked_picture_has_the_facts_of_its_target(pictures: Path) -> None:
    target = add(pictures.parent / "elsewhere", "two.png", (30, 40))
    link(pictures / "one.png", target)
    expected = facts_of_pillow(target)
    (found,) = scan(pictures).pictures
    assert (found.num_bytes, found.mtime_ns) == (expected.num_bytes, LONG_AGO)
    assert (found.width, found.height) == (30, 40)


def test_a_missing_folder_is_refused(pictures: Path) -> None:
    with pytest.raises(ValueError, match=r"folder .*nowhere does not exist"):
        scan(pictures / "nowhere")


def test_an_unknown_choice_for_bad_files_is_refused(pictures: Path) -> None:
    with pytest.raises(ValueError, match="on_bad_file must be one of stop, skip, got 'ask'"):
        scan(pictures, on_bad_file="ask")


def test_a_folder_without_pictures_has_none(pictures: Path) -> None:
    assert scan(pictures).pictures == ()


# Bad files.


def bad_zero_bytes(path: Path) -> None:
    path.write_bytes(b"")


def bad_text(path: Path) -> None:
    path.write_bytes(b"<html>404 Not Found</html>" * 9)


def bad_header(path: Path) -> None:
    path.write_bytes(add(path.parent, path.name).read_bytes()[:20])


def bad_exif(path: Path) -> None:
    """Which no decoder of ours could turn upright either."""
    Image.new("RGB", (80, 60)).save(path, "WEBP", exif=b"Exif\0\0garbage")


def bad_bomb(path: Path) -> None:
    """A PNG whose header promises 30,000 pixels on each side."""
    data = add(path.parent, "small.png").read_bytes()
    (path.parent / "small.png").unlink()
    header = b"IHDR" + (30_000).to_bytes(4, "big") * 2 + data[24:29]
    path.write_bytes(data[:12] + header + zlib.crc32(header).to_bytes(4, "big") + data[33:])


def bad_dangling_link(path: Path) -> None:
    link(path, "gone.png")


def bad_link_to_itself(path: Path) -> None:
    link(path, path.name)


DAMAGED = "The picture {0} is damaged, cut off or not a picture. Replace or remove it."
BAD_FILES = {
    bad_zero_bytes: DAMAGED,
    bad_text: DAMAGED,
    bad_header: DAMAGED,
    bad_exif: DAMAGED,
    bad_bomb: "The picture {0} has too many pixels to be opened. Make it smaller.",
    bad_dangling_link: "Cannot read the file {0}: No such file or directory.",
}
if os.name != "nt":  # its sentence is another
    BAD_FILES[bad_link_to_itself] = "Cannot read the file {0}: Too many levels of symbolic links."


@pytest.mark.parametrize("extension", ["png", "jpg", "webp", "bmp"])
@pytest.mark.parametrize("make", BAD_FILES, ids=lambda make: make.__name__)
def test_a_bad_file_stops_or_is_skipped_by_name(pictures: Path, make, extension: str) -> None:
    add(pictures, "a good.png")
    add(pictures, "z good.png")
    bad = pictures / f"bad.{extension}"
    make(bad)
    expected = BAD_FILES[make].format(bad)
    with pytest.raises(ValueError, match=r"bad\.") as caught:
        scan(pictures)
    assert str(caught.value) == expected
    for _ in range(2):  # a bad file is tried again
        found = scan(pictures, on_bad_file="skip")
        assert found.skipped == ((str(bad), expected),)
        assert names(found) == ["a good.png", "z good.png"]


def test_a_bad_file_that_is_replaced_is_found(pictures: Path) -> None:
    bad_text(pictures / "one.png")
    assert scan(pictures, on_bad_file="skip").pictures == ()
    add(pictures, "one.png")
    assert names(scan(pictures)) == ["one.png"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads all")
def test_files_and_folders_without_permission_are_named(pictures: Path) -> None:
    add(pictures, "secret.png").chmod(0)
    add(pictures, "secrets/two.png")
    (pictures / "secrets").chmod(0)
    try:
        found = scan(pictures, recursive=True, on_bad_file="skip")
    finally:
        (pictures / "secrets").chmod(0o700)
    assert [sentence for _, sentence in found.skipped] == [
        f"Cannot read the folder {pictures / 'secrets'}: Permission denied.",
        f"Cannot read the file {pictures / 'secret.png'}: Permission denied.",
    ]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no such files")
def test_a_pipe_with_a_pictures_name_is_not_waited_for(pictures: Path) -> None:
    os.mkfifo(pictures / "pipe.png")
    assert scan(pictures).pictures == ()


# The index.


def replace_unseen(path: Path, size: tuple[int, int]) -> None:
    """Another picture with the same number of bytes and the same time."""
    before = path.stat()
    add(path.parent, path.name, size)
    assert path.stat().st_size == before.st_size
    age(path, before.st_mtime_ns)


def test_unchanged_files_are_not_opened_again(pictures: Path) -> None:
    path = add(pictures, "one.bmp", (80, 60))
    assert scan(pictures).num_read == 1
    replace_unseen(path, (60, 80))
    again = scan(pictures)
    assert sizes(again) == {"one.bmp": (80, 60)}  # as remembered, not as it is
    assert again.num_read == 0
    age(path, LONG_AGO + 1_000_000)
    assert sizes(scan(pictures)) == {"one.bmp": (60, 80)}


def test_a_file_of_another_length_is_read_again(pictures: Path) -> None:
    path = add(pictures, "one.bmp")
    scan(pictures)
    add(pictures, "one.bmp", (100, 70))
    assert path.stat().st_mtime_ns == LONG_AGO
    assert sizes(scan(pictures)) == {"one.bmp": (100, 70)}


def test_a_file_that_changed_just_now_is_not_remembered(pictures: Path) -> None:
    path = age(add(pictures, "one.bmp", (80, 60)), time.time_ns())
    scan(pictures)
    replace_unseen(path, (60, 80))  # within the same tick of a coarse clock
    assert sizes(scan(pictures)) == {"one.bmp": (60, 80)}


def test_new_and_deleted_files_are_seen(pictures: Path) -> None:
    for name in ("a.png", "b.png"):
        add(pictures, name)
    scan(pictures)
    (pictures / "a.png").unlink()
    add(pictures, "c.png")
    found = scan(pictures)
    assert names(found) == ["b.png", "c.png"]
    assert found.num_read == 1
    (index,) = (pictures.parent / "index").iterdir()
    assert "a.png" not in index.read_text(encoding="utf-8")


def test_nothing_is_written_beside_the_pictures_or_without_a_change(pictures: Path) -> None:
    add(pictures, "one.png")
    scan(pictures)
    assert [path.name for path in pictures.iterdir()] == ["one.png"]
    (index,) = (pictures.parent / "index").iterdir()
    age(index)
    scan(pictures)
    assert index.stat().st_mtime_ns == LONG_AGO


def test_without_an_index_folder_nothing_is_remembered(pictures: Path) -> None:
    add(pictures, "one.png")
    assert scan_folder(pictures, None).num_read == 1
    assert scan_folder(pictures, None).num_read == 1
    assert [path.name for path in pictures.parent.iterdir()] == ["pictures"]


def test_folders_with_the_same_names_do_not_share_facts(pictures: Path) -> None:
    other = pictures.parent / "other"
    add(pictures, "one.bmp", (80, 60))
    add(other, "one.bmp", (60, 80))
    assert sizes(scan(pictures)) == {"one.bmp": (80, 60)}
    assert sizes(scan(other)) == {"one.bmp": (60, 80)}
    assert scan(pictures).num_read == 0


def with_change(change) -> bytes:
    def damage(data: bytes) -> bytes:
        index = json.loads(data)
        change(index)
        return json.dumps(index).encode()

    return damage


DAMAGES = {
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "no JSON": lambda data: b"\xff\x00" * 50,
    "nested too deep": lambda data: b"[" * 100_000,
    "a list": lambda data: b"[1, 2]",
    "a number": lambda data: b"3",
    "no columns": with_change(lambda index: index.pop("columns")),
    "names are a number": with_change(lambda index: index.update(names=3)),
    "a name is a number": with_change(lambda index: index.update(names=[3])),
    "columns are a number": with_change(lambda index: index.update(columns=3)),
    "a column is missing": with_change(lambda index: index["columns"].pop()),
    "a column is short": with_change(lambda index: index["columns"][2].pop()),
    "a column is a number": with_change(lambda index: index["columns"].__setitem__(2, 3)),
    "a column of texts": with_change(lambda index: index["columns"].__setitem__(2, ["x"])),
    "older version": with_change(lambda index: index.update(version=0)),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_index_is_made_again(pictures: Path, how: str) -> None:
    add(pictures, "one.png")
    expected = scan(pictures).pictures
    (index,) = (pictures.parent / "index").iterdir()
    whole = index.read_bytes()
    index.write_bytes(DAMAGES[how](whole))
    again = scan(pictures)
    assert (again.pictures, again.num_read) == (expected, 1)
    assert index.read_bytes() == whole


def test_an_index_that_cannot_be_written_is_one_sentence(pictures: Path) -> None:
    add(pictures, "one.png")
    with small_disk(pictures.parent / "index") as disk:
        fill(disk)
        with pytest.raises(ValueError, match="is full"):
            scan(pictures)
        assert [path.name for path in disk.iterdir()] == ["filler"]


def test_progress_ends_with_all_pictures(pictures: Path) -> None:
    for number in range(5):
        add(pictures, f"{number}.png")
    for _ in range(2):
        seen: list[tuple[int, int]] = []
        scan(pictures, on_progress=lambda done, total, seen=seen: seen.append((done, total)))
        assert seen[-1] == (5, 5)
        assert seen == sorted(set(seen))


class Stopped(Exception):
    pass


def stop(done: int, total: int) -> None:
    raise Stopped


def test_what_was_read_before_a_stop_is_remembered(pictures: Path) -> None:
    for number in range(5):
        add(pictures, f"{number}.png")
    with pytest.raises(Stopped):
        scan(pictures, on_progress=stop)
    assert scan(pictures).num_read == 4


def test_two_processes_may_scan_one_folder(pictures: Path) -> None:
    for number in range(300):
        add(pictures, f"{number:03d}.png")
    program = (
        "import sys; sys.path[:0] = sys.argv[1:2]; from pack import load_pack; load_pack()\n"
        "from pathlib import Path; from atelier.trainers.scan import scan_folder\n"
        "index = Path(sys.argv[3])\n"
        "for _ in range(20):\n"
        "    assert len(scan_folder(sys.argv[2], index).pictures) == 300\n"
        "    for file in index.glob('*.json'): file.write_bytes(file.read_bytes()[:-9])\n"
    )
    scripts = Path(__file__).resolve().parent.parent / "scripts"
    command = [sys.executable, "-P", "-c", program]
    arguments = [str(scripts), str(pictures), str(pictures.parent / "index")]
    running = [subprocess.Popen([*command, *arguments]) for _ in range(2)]
    assert [process.wait(timeout=200) for process in running] == [0, 0]
    scan(pictures)
    found = scan(pictures)
    assert (len(found.pictures), found.num_read) == (300, 0)
    assert len(list((pictures.parent / "index").iterdir())) == 1


# Hashes.


@pytest.fixture
def hash_file(tmp_path: Path) -> Path:
    return tmp_path / "index" / "hashes.json"


def hash_of(hashes: ContentHashes, path: Path) -> str:
    facts = path.stat()
    return hashes.of(str(path), facts.st_size, facts.st_mtime_ns)


def write(path: Path, data: bytes, mtime_ns: int = LONG_AGO) -> Path:
    path.write_bytes(data)
    return age(path, mtime_ns)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("num_bytes", [0, 1, (1 << 20) - 1, 1 << 20, (3 << 20) + 5])
def test_the_hash_is_sha_256_of_the_bytes(tmp_path: Path, hash_file: Path, num_bytes: int) -> None:
    data = bytes(range(256)) * (num_bytes // 256) + bytes(num_bytes % 256)
    path = write(tmp_path / "one", data)
    assert hash_of(ContentHashes(hash_file), path) == sha256(data)


def test_a_file_of_the_same_size_and_time_is_not_read_again(
    tmp_path: Path, hash_file: Path
) -> None:
    path = write(tmp_path / "one", b"before")
    hashes = ContentHashes(hash_file)
    assert hash_of(hashes, path) == sha256(b"before")
    hashes.save()
    write(path, b"after!")
    assert hash_of(hashes, path) == sha256(b"before")
    assert hash_of(ContentHashes(hash_file), path) == sha256(b"before")


@pytest.mark.parametrize(
    ("data", "mtime_ns"), [(b"after!", LONG_AGO + 100), (b"longer than before", LONG_AGO)]
)
def test_a_changed_file_is_read_again(
    tmp_path: Path, hash_file: Path, data: bytes, mtime_ns: int
) -> None:
    path = write(tmp_path / "one", b"before")
    hashes = ContentHashes(hash_file)
    hash_of(hashes, path)
    hashes.save()
    write(path, data, mtime_ns)
    assert hash_of(ContentHashes(hash_file), path) == sha256(data)


@pytest.mark.parametrize("seconds", [0, 1.5, -3600])
def test_a_file_that_changed_just_now_is_hashed_again(
    tmp_path: Path, hash_file: Path, seconds: float
) -> None:
    """So are files from the future."""
    now = time.time_ns() - int(seconds * 1e9)
    path = write(tmp_path / "one", b"before", now)
    hashes = ContentHashes(hash_file)
    hash_of(hashes, path)
    hashes.save()
    write(path, b"after!", now)
    assert hash_of(hashes, path) == sha256(b"after!")
    assert hash_of(ContentHashes(hash_file), path) == sha256(b"after!")


def test_a_file_that_changed_after_it_was_listed_is_not_remembered(
    tmp_path: Path, hash_file: Path
) -> None:
    path = write(tmp_path / "one", b"before")
    hashes = ContentHashes(hash_file)
    write(path, b"after!", LONG_AGO + 100)
    assert hashes.of(str(path), 6, LONG_AGO) == sha256(b"after!")
    write(path, b"before", LONG_AGO)  # as a backup would
    assert hashes.of(str(path), 6, LONG_AGO) == sha256(b"before")


def test_all_pictures_are_hashed_once(pictures: Path, hash_file: Path) -> None:
    for number in range(200):
        add(pictures, f"{number:03d}.png", (80, number + 1))
    found = scan(pictures).pictures
    expected = tuple(sha256(path.read_bytes()) for path in sorted(pictures.iterdir()))
    seen: list[tuple[int, int]] = []
    first = ContentHashes(hash_file).of_all(found, lambda *progress: seen.append(progress))
    assert first.digests == expected
    assert (first.num_read, first.num_bytes) == (200, sum(p.num_bytes for p in found))
    assert first.seconds > 0
    assert seen[-1] == (200, 200)
    again = ContentHashes(hash_file).of_all(found)
    assert (again.digests, again.num_read, again.num_bytes) == (expected, 0, 0)


def test_hashes_of_no_pictures_are_none(hash_file: Path) -> None:
    assert ContentHashes(hash_file).of_all(()).digests == ()
    assert not hash_file.exists()


def test_hashes_made_before_a_stop_are_kept(pictures: Path, hash_file: Path) -> None:
    for number in range(200):
        add(pictures, f"{number:03d}.png")
    found = scan(pictures).pictures
    with pytest.raises(Stopped):
        ContentHashes(hash_file).of_all(found, stop)
    assert ContentHashes(hash_file).of_all(found).num_read < 200


def test_a_file_that_is_gone_is_named_and_the_other_hashes_kept(
    pictures: Path, hash_file: Path
) -> None:
    for number in range(200):
        add(pictures, f"{number:03d}.png")
    found = scan(pictures).pictures
    (pictures / "199.png").unlink()
    with pytest.raises(ValueError, match=r"Cannot read the file .*199\.png: No such file"):
        ContentHashes(hash_file).of_all(found)
    assert ContentHashes(hash_file).of_all(found[:64]).num_read == 0


def test_two_users_of_one_file_keep_each_others_hashes(tmp_path: Path, hash_file: Path) -> None:
    paths = [write(tmp_path / name, name.encode()) for name in ("one", "two")]
    users = [ContentHashes(hash_file) for _ in paths]
    for user, path in zip(users, paths, strict=True):
        hash_of(user, path)
    for user in users:
        user.save()
    for path in paths:
        write(path, path.name[::-1].encode())
    assert [hash_of(ContentHashes(hash_file), p) for p in paths] == [sha256(b"one"), sha256(b"two")]


@pytest.mark.parametrize(
    "how", ["empty", "half", "no JSON", "a list", "no columns", "older version"]
)
def test_damaged_hashes_are_made_again(tmp_path: Path, hash_file: Path, how: str) -> None:
    path = write(tmp_path / "one", b"before")
    hashes = ContentHashes(hash_file)
    hash_of(hashes, path)
    hashes.save()
    hash_file.write_bytes(DAMAGES[how](hash_file.read_bytes()))
    write(path, b"after!")
    assert hash_of(ContentHashes(hash_file), path) == sha256(b"after!")


def test_the_index_may_be_removed_at_any_time(pictures: Path, hash_file: Path) -> None:
    add(pictures, "one.png")
    found = scan(pictures).pictures
    hashes = ContentHashes(hash_file)
    hashes.of_all(found)
    shutil.rmtree(hash_file.parent)
    assert scan(pictures).num_read == 1
    assert ContentHashes(hash_file).of_all(found).num_read == 1
