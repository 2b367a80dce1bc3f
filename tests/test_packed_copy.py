"""Quantized copies: read in place of the source, and never used when anything is wrong with them.

That a copy was read, and not the source, is seen by zeroing bytes of the source which its identity
does not sample: a load that reads them comes to another store.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
import torch
from atelier.trainers import packed_copy
from atelier.trainers.formats import FORMATS
from atelier.trainers.load import LoadedFlux, load_flux
from atelier.trainers.packed_copy import PackedCopies
from dense import dense_transformer
from flux_files import flux_tensors, write_flux
from four_bit_files import FourBitFlux
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_disk import small_disk

QUANTIZING = [format for format in FORMATS if format != "bf16"]
MATRIX = "double_blocks.0.img_mlp.0.weight"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_flux(tmp_path / "models" / "flux.safetensors")


@pytest.fixture
def copies(tmp_path: Path) -> PackedCopies:
    return PackedCopies(tmp_path / "packed", min_source_bytes=0)


def load(source: Path, copies: PackedCopies | None, format: str = "nf4") -> LoadedFlux:
    return load_flux(source, format=format, copies=copies)


def copy_of(copies: PackedCopies) -> Path:
    (path,) = copies.folder.iterdir()
    return path


def zero_unsampled_bytes(source: Path) -> None:
    """Change a matrix of the source without changing its identity."""
    with source.open("rb+") as file:
        length = int.from_bytes(file.read(8), "little")
        begin, end = json.loads(file.read(length))[MATRIX]["data_offsets"]
        file.seek(8 + length + begin + (end - begin) // 6)  # between the first two samples
        file.write(bytes(1024))


def metadata(path: Path) -> dict:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["atelier"])


@pytest.mark.parametrize("format", QUANTIZING)
def test_the_next_load_reads_the_copy_and_not_the_source(
    source: Path, copies: PackedCopies, format: str
) -> None:
    first = load(source, copies, format)
    expected = first.store.content_hash()
    zero_unsampled_bytes(source)
    second = load(source, copies, format)
    assert second.store.content_hash() == expected
    assert load(source, None, format).store.content_hash() != expected
    assert (second.identity, second.config) == (first.identity, first.config)


@pytest.mark.parametrize("format", QUANTIZING)
def test_a_copy_is_a_safetensors_file_of_the_packed_bytes(
    source: Path, copies: PackedCopies, format: str
) -> None:
    store = load(source, copies, format).store
    found = load_file(copy_of(copies))
    expected = dict(store.plain)
    for name, weight in store.packed.items():
        expected[name] = weight.data
        if weight.scale is not None:
            expected[f"{name}.scale"] = weight.scale
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_a_folder_of_shards_has_one_copy(tmp_path: Path, copies: PackedCopies) -> None:
    folder = tmp_path / "models" / "FLUX.1-dev"
    dense_transformer(flux_tensors()).save_pretrained(folder / "transformer", max_shard_size="4MB")
    expected = load(folder, copies).store.content_hash()
    assert copy_of(copies).name.startswith("FLUX.1-dev-")
    assert load(folder, copies).store.content_hash() == expected


def test_every_place_and_format_has_its_own_copy(tmp_path: Path, copies: PackedCopies) -> None:
    sources = [write_flux(tmp_path / str(seed) / "flux.safetensors", seed=seed) for seed in (0, 1)]
    pairs = [(source, format) for source in sources for format in QUANTIZING]
    hashes = [load(source, copies, f).store.content_hash() for source, f in pairs]
    assert len({*copies.folder.iterdir()}) == len(pairs) == len({*hashes})
    assert [load(source, copies, f).store.content_hash() for source, f in pairs] == hashes


def test_a_changed_source_makes_the_copy_again(source: Path, copies: PackedCopies) -> None:
    before = load(source, copies)
    write_flux(source, seed=1)
    after = load(source, copies)
    assert after.store.content_hash() == load(source, None).store.content_hash()
    assert after.store.content_hash() != before.store.content_hash()
    assert metadata(copy_of(copies))["source"] == after.identity


def test_a_copy_of_another_version_is_made_again(
    source: Path, copies: PackedCopies, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(source, copies)
    zero_unsampled_bytes(source)
    monkeypatch.setattr(packed_copy, "LAYOUT_VERSION", packed_copy.LAYOUT_VERSION + 1)
    expected = load(source, None).store.content_hash()
    assert load(source, copies).store.content_hash() == expected
    assert metadata(copy_of(copies))["version"] == packed_copy.LAYOUT_VERSION


DAMAGES = {
    "cut": lambda data: data[:-1],
    "empty": lambda data: b"",
    "text": lambda data: b"<html>" * 20,
    "zeroed page": lambda data: data[:-8192] + bytes(4096) + data[-4096:],
    "another safetensors file": lambda data: b"\x02\0\0\0\0\0\0\0{}",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_copy_is_made_again(
    source: Path, copies: PackedCopies, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = load(source, copies).store.content_hash()
    path = copy_of(copies)
    whole = path.read_bytes()
    path.write_bytes(DAMAGES[damage](whole))
    with caplog.at_level(logging.INFO, "atelier"):
        assert load(source, copies).store.content_hash() == expected
    assert f"The quantized copy {path} is old or damaged: it is made again." in caplog.messages
    assert path.read_bytes() == whole


def test_a_flipped_bit_anywhere_is_found(source: Path, copies: PackedCopies) -> None:
    """Read back alone, so that every place of the header can be tried: a read gives None."""
    load(source, copies)
    path = copy_of(copies)
    whole = path.read_bytes()
    loaded = load(source, copies)
    key = packed_copy.CopyKey(source, loaded.identity, "nf4")
    header_end = 8 + int.from_bytes(whole[:8], "little")
    places = [*range(0, header_end, 41), *range(header_end, len(whole), len(whole) // 40)]
    for place in [*places, len(whole) - 1]:
        flipped = bytearray(whole)
        flipped[place] ^= 1
        path.write_bytes(flipped)
        store = copies.read(key, torch.device("cpu"), lambda done, total: None)
        assert store is None, place
        assert not path.exists()


def test_a_device_without_fp8_leaves_a_sound_copy(source: Path, copies: PackedCopies) -> None:
    load(source, copies, "fp8")
    path = copy_of(copies)
    before = path.stat()
    with pytest.raises(ValueError, match=r"^Apple's GPUs cannot hold weights in fp8\. "):
        load_flux(source, format="fp8", device="mps", copies=copies)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_device_without_fp8_takes_no_fp8_of_a_file(tmp_path: Path, source: Path) -> None:
    """Nothing is quantized, so that the numbers go there as they are."""
    path = tmp_path / "fp8.safetensors"
    tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(source).items()}
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"^Apple's GPUs cannot hold weights in fp8\. "):
        load_flux(path, format="fp8", device="mps")


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_not_quantized_has_no_copy(
    tmp_path: Path, source: Path, copies: PackedCopies, format: str
) -> None:
    packed = FourBitFlux(nested=False).write(tmp_path / "packed.safetensors")
    load(packed, copies, format)
    assert copies.folder.exists() == (format not in ("bf16", "nf4"))
    load(source, copies, format)
    assert copies.folder.exists() == (format != "bf16")


def test_a_small_source_has_no_copy(tmp_path: Path, source: Path) -> None:
    load(source, PackedCopies(tmp_path / "packed"))
    assert not (tmp_path / "packed").exists()


def test_a_load_counts_the_tensors_it_packs_and_those_it_keeps(
    source: Path, copies: PackedCopies
) -> None:
    seen: list[tuple[int, int]] = []
    load_flux(source, format="nf4", copies=copies, on_progress=lambda *pair: seen.append(pair))
    tensors, kept = len(flux_tensors()), len(load_file(copy_of(copies)))
    expected = [(done, total) for total in (tensors, kept) for done in range(1, total + 1)]
    assert seen == expected


class Cancelled(Exception):
    pass


def test_cancelling_while_a_copy_is_written_leaves_nothing(
    source: Path, copies: PackedCopies
) -> None:
    packed = len(flux_tensors())

    def cancel(done: int, total: int) -> None:
        if total > packed and done > total // 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        load_flux(source, format="nf4", copies=copies, on_progress=cancel)
    assert list(copies.folder.iterdir()) == []


def test_cancelling_while_a_copy_is_read_keeps_it(source: Path, copies: PackedCopies) -> None:
    load(source, copies)
    path = copy_of(copies)
    content = path.read_bytes()

    def cancel(done: int, total: int) -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        load_flux(source, format="nf4", copies=copies, on_progress=cancel)
    assert path.read_bytes() == content


ROOM = r"It takes 0\.0 GB, and the disk of .* has 0\.0 GB free, of which 1\.1 are left alone\.$"
FULL = r"The disk of .* is full\. "


@pytest.mark.parametrize(("reserve", "reason"), [(1 << 30, ROOM), (-(1 << 50), FULL)])
def test_a_full_disk_is_one_logged_sentence_and_a_model(
    tmp_path: Path,
    source: Path,
    reserve: int,
    reason: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Seen before writing, and, with no bytes to be left free, by the system while writing."""
    monkeypatch.setattr(packed_copy, "_DISK_RESERVE", reserve)
    with small_disk(tmp_path / "disk") as disk:
        copies = PackedCopies(disk / "packed", min_source_bytes=0)
        loaded = load(source, copies)
        assert list(copies.folder.iterdir()) == []
    assert loaded.store.content_hash() == load(source, None).store.content_hash()
    (message,) = caplog.messages
    assert message.startswith("The model is loaded, but no quantized copy of it was kept, ")
    assert re.search(reason, message)


def test_a_folder_that_cannot_be_made_is_one_logged_sentence_and_a_model(
    tmp_path: Path, source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    loaded = load(source, PackedCopies(tmp_path / "file" / "packed", min_source_bytes=0))
    assert loaded.store.num_bytes > 0
    (message,) = caplog.messages
    assert "Cannot write " in message


def resident_kib(kind: str) -> int:
    status = Path("/proc/self/status")
    if not status.is_file():
        pytest.skip("only Linux tells how much of a process is mapped files")
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(lines[kind].split()[0])


def test_a_copy_is_not_mapped_into_memory(tmp_path: Path, copies: PackedCopies) -> None:
    """A mapped file would count in the resident set as long as its tensors live."""
    source = write_flux(tmp_path / "wide.safetensors", width=512)
    load(source, copies)
    before = resident_kib("RssFile")
    store = load(source, copies).store
    assert store.num_bytes > 6 << 20
    assert resident_kib("RssFile") - before < store.num_bytes / 1024 / 4


def test_a_copy_read_in_inference_mode_can_be_trained(source: Path, copies: PackedCopies) -> None:
    """ComfyUI runs nodes in that mode, and its tensors may not be saved for backward."""
    load(source, copies)
    with torch.inference_mode():
        store = load(source, copies).store
    tensors = [*store.plain.values(), *(weight.data for weight in store.packed.values())]
    assert not any(tensor.is_inference() for tensor in tensors)
