"""Tensors on disk by key: complete or absent, checked, and safe beside other writers."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from atelier.trainers import entries
from atelier.trainers.entries import EntryFiles

KEY, OTHER = "a" * 64, "b" * 64
TENSORS = {"mean": torch.arange(12.0).reshape(3, 4), "count": torch.tensor([7], dtype=torch.int64)}


@pytest.fixture
def files(tmp_path: Path) -> EntryFiles:
    files = EntryFiles(tmp_path / "cache")
    files.write(KEY, TENSORS)
    return files


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "flipped bit":
        data[-5] ^= 1
    kept = {
        "cut": data[:-7],
        "empty": b"",
        "flipped bit": data,
        "text": b"x" * 50,
        "zeros": b"\0" * 9,
    }
    path.write_bytes(kept[how])


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8]
)
def test_tensors_come_back_as_they_were(files: EntryFiles, dtype: torch.dtype) -> None:
    tensor = torch.arange(24).reshape(2, 3, 4).to(dtype)
    files.write(OTHER, {"x": tensor})
    loaded = files.read(OTHER)["x"]
    assert loaded.dtype == dtype
    assert torch.equal(loaded, tensor)


def test_the_same_tensors_give_the_same_bytes(files: EntryFiles) -> None:
    before = files.path(KEY).read_bytes()
    files.write(KEY, TENSORS)
    assert files.path(KEY).read_bytes() == before


def test_missing_keys_are_listed_once_in_order(files: EntryFiles) -> None:
    assert files.missing(["d" * 64, KEY, "c" * 64, "d" * 64]) == ["d" * 64, "c" * 64]


@pytest.mark.parametrize("how", ["cut", "empty", "flipped bit", "text", "zeros"])
def test_a_damaged_file_is_refused_removed_and_missing(files: EntryFiles, how: str) -> None:
    path = files.path(KEY)
    damage(path, how)
    with pytest.raises(ValueError, match=rf"{path.name} is missing or damaged\. Queue the graph"):
        files.read(KEY)
    assert not path.exists()
    assert files.missing([KEY]) == [KEY]


@pytest.mark.parametrize("how", ["cut", "empty", "text", "zeros"])
def test_an_incomplete_file_is_missing_before_it_is_read(files: EntryFiles, how: str) -> None:
    damage(files.path(KEY), how)
    assert files.missing([KEY]) == [KEY]


def test_a_file_under_a_wrong_name_is_refused(files: EntryFiles) -> None:
    files.path(OTHER).parent.mkdir()
    files.path(OTHER).write_bytes(files.path(KEY).read_bytes())
    assert files.missing([OTHER]) == [OTHER]
    with pytest.raises(ValueError, match="missing or damaged"):
        files.read(OTHER)


def test_a_read_that_fails_for_another_reason_keeps_the_file(
    files: EntryFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Path) -> bytes:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", refuse)
        with pytest.raises(ValueError, match="Cannot read the cached file"):
            files.read(KEY)
    assert torch.equal(files.read(KEY)["mean"], TENSORS["mean"])


def test_the_generation_changes_only_when_something_is_gone(files: EntryFiles) -> None:
    before = files.generation()
    files.write(OTHER, TENSORS)
    files.read(KEY)
    assert files.generation() == before
    files.path(KEY).unlink()
    with pytest.raises(ValueError, match="missing or damaged"):
        files.read(KEY)
    assert files.generation() != before


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, r"The disk of .* is full\. Free some space"),
        (errno.EACCES, "Cannot write .*: Permission denied"),
    ],
)
def test_a_disk_that_refuses_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, number: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(entries.os, "fsync", refuse)
    with pytest.raises(ValueError, match=message):
        EntryFiles(tmp_path).write(KEY, TENSORS)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(entries.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        EntryFiles(tmp_path).write(KEY, TENSORS)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_cache_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="Cannot write"):
        EntryFiles(tmp_path / "cache").write(KEY, TENSORS)


def write_many(files: EntryFiles) -> None:
    for number in range(50):
        files.write(f"{number:064x}", {"mean": torch.full((64,), float(number))})


def test_several_writers_may_write_the_same_keys_at_once(files: EntryFiles) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write_many, [files] * 4))
    for number in range(50):
        assert torch.all(files.read(f"{number:064x}")["mean"] == number)
    assert not list(files.folder.rglob("*.tmp"))
