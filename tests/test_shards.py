"""Tensors on disk by key: complete or absent, checked, and safe beside other writers."""

import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors.torch
import torch
from atelier.trainers import files, shards
from atelier.trainers.shards import Shards
from training import write_entries

KEY, OTHER, THIRD = "a" * 64, "b" * 64, "c" * 64
TENSORS = {"mean": torch.arange(12.0).reshape(3, 4), "count": torch.tensor([7], dtype=torch.int64)}
HEADER_END = 8


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One shard of two entries."""
    write_entries(tmp_path / "cache", {KEY: TENSORS, OTHER: {"x": torch.full((64,), 2.0)}})
    return tmp_path / "cache"


def shard_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    kept = {
        "empty": b"",
        "text": b"x" * 50,
        "zeros": b"\0" * 9,
        "half a header": data[:40],
    }
    path.write_bytes(kept[how])


def flip_a_byte_of(path: Path, name: str) -> None:
    data = bytearray(path.read_bytes())
    header_size = int.from_bytes(data[:HEADER_END], "little")
    offsets = json.loads(data[HEADER_END : HEADER_END + header_size])[name]["data_offsets"]
    data[HEADER_END + header_size + offsets[0]] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8]
)
def test_tensors_come_back_as_they_were(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.arange(24).reshape(2, 3, 4).to(dtype)
    write_entries(tmp_path, {KEY: {"x": tensor}})
    loaded = Shards(tmp_path).read(KEY)["x"]
    assert loaded.dtype == dtype
    assert torch.equal(loaded, tensor)


def test_a_tensor_that_is_not_contiguous_comes_back(tmp_path: Path) -> None:
    write_entries(tmp_path, {KEY: {"x": TENSORS["mean"].T}})
    assert torch.equal(Shards(tmp_path).read(KEY)["x"], TENSORS["mean"].T)


def test_entries_may_be_views_of_one_tensor(tmp_path: Path) -> None:
    write_entries(tmp_path, {KEY: {"x": TENSORS["mean"]}, OTHER: {"x": TENSORS["mean"]}})
    assert torch.equal(Shards(tmp_path).read(OTHER)["x"], TENSORS["mean"])


def test_other_programs_read_a_shard(folder: Path) -> None:
    (path,) = shard_files(folder)
    tensors = safetensors.torch.load_file(path)
    assert torch.equal(tensors[f"{KEY}.mean"], TENSORS["mean"])
    assert tensors.keys() == {f"{KEY}.mean", f"{KEY}.count", f"{OTHER}.x"}


def test_missing_keys_are_listed_once_in_order(folder: Path) -> None:
    assert Shards(folder).missing(["d" * 64, KEY, THIRD, "d" * 64]) == ["d" * 64, THIRD]


def test_what_another_writer_adds_is_found(folder: Path) -> None:
    reader = Shards(folder)
    assert reader.missing([KEY, THIRD]) == [THIRD]
    write_entries(folder, {THIRD: TENSORS})
    assert reader.missing([KEY, THIRD]) == []
    assert torch.equal(reader.read(THIRD)["mean"], TENSORS["mean"])


def test_the_size_is_that_of_the_tensors(folder: Path) -> None:
    assert Shards(folder).num_bytes([KEY, KEY, THIRD]) == 12 * 4 + 8


def test_a_full_shard_is_written_and_another_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 1000)
    with Shards(tmp_path).writing() as write:
        for number in range(10):
            write(f"{number:064x}", {"x": torch.zeros(100)})
            assert len(shard_files(tmp_path)) == (number + 1) // 3
    assert len(shard_files(tmp_path)) == 4
    assert not Shards(tmp_path).missing(f"{number:064x}" for number in range(10))


def test_a_shard_that_waits_too_long_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_SECONDS", 0.0)
    with Shards(tmp_path).writing() as write:
        write(KEY, TENSORS)
        assert not Shards(tmp_path).missing([KEY])


def test_what_was_added_before_an_interruption_stays(tmp_path: Path) -> None:
    def interrupted() -> None:
        with Shards(tmp_path).writing() as write:
            write(KEY, TENSORS)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert torch.equal(Shards(tmp_path).read(KEY)["mean"], TENSORS["mean"])


@pytest.mark.parametrize("how", ["empty", "text", "zeros", "half a header"])
def test_a_file_that_is_no_shard_holds_nothing(folder: Path, how: str) -> None:
    damage(shard_files(folder)[0], how)
    assert Shards(folder).missing([KEY, OTHER]) == [KEY, OTHER]


def test_a_shard_cut_in_half_keeps_what_is_whole(folder: Path) -> None:
    (path,) = shard_files(folder)
    order = sorted(safetensors.torch.load_file(path), key=lambda name: name.endswith("x"))
    assert order[-1] == f"{OTHER}.x"
    path.write_bytes(path.read_bytes()[:-7])
    (lost,) = Shards(folder).missing([KEY, OTHER])
    (kept,) = {KEY, OTHER} - {lost}
    assert Shards(folder).read(kept)


def test_a_changed_byte_is_refused_and_costs_only_its_entry(folder: Path) -> None:
    flip_a_byte_of(shard_files(folder)[0], f"{KEY}.mean")
    reader = Shards(folder)
    with pytest.raises(ValueError, match=r"^An entry of the cache .* is missing or damaged\."):
        reader.read(KEY)
    assert reader.missing([KEY, OTHER]) == [KEY]
    assert torch.all(reader.read(OTHER)["x"] == 2)
    assert Shards(folder).missing([KEY, OTHER]) == [KEY]


def test_an_entry_that_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="is missing or damaged"):
        Shards(folder).read(THIRD)


def test_a_read_that_fails_for_another_reason_keeps_the_entry(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> torch.Tensor:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    reader = Shards(folder)
    with monkeypatch.context() as patched:
        patched.setattr(shards, "read_bytes", refuse)
        with pytest.raises(ValueError, match=r"^Cannot read the cache .*: Too many open files"):
            reader.read(KEY)
    assert torch.equal(reader.read(KEY)["mean"], TENSORS["mean"])


def test_the_generation_changes_only_when_something_is_gone(folder: Path) -> None:
    cache = Shards(folder)
    before = cache.generation()
    write_entries(folder, {THIRD: TENSORS})
    cache.read(KEY)
    assert cache.generation() == before
    for path in shard_files(folder):
        path.unlink()
    with pytest.raises(ValueError, match="missing or damaged"):
        cache.read(KEY)
    assert cache.generation() != before


def test_clearing_frees_the_disk(folder: Path) -> None:
    write_entries(folder, {THIRD: TENSORS})
    size = sum(path.stat().st_size for path in shard_files(folder))
    cache = Shards(folder)
    before = cache.generation()
    assert cache.clear() == size
    assert cache.missing([KEY, OTHER, THIRD]) == [KEY, OTHER, THIRD]
    assert cache.generation() != before


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

    monkeypatch.setattr(files.os, "fsync", refuse)
    with pytest.raises(ValueError, match=message):
        write_entries(tmp_path, {KEY: TENSORS})
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_entries(tmp_path, {KEY: TENSORS})
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_cache_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="Cannot write"):
        write_entries(tmp_path / "cache", {KEY: TENSORS})


def write_many(folder: Path) -> None:
    numbers = range(50)
    write_entries(folder, {f"{n:064x}": {"mean": torch.full((64,), float(n))} for n in numbers})


def test_several_writers_may_write_the_same_keys_at_once(folder: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write_many, [folder] * 4))
    for number in range(50):
        assert torch.all(Shards(folder).read(f"{number:064x}")["mean"] == number)
    assert not list(folder.rglob("*.tmp"))
