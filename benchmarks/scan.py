"""What scanning and hashing a folder of pictures takes, for 1,000, 10,000 and 100,000 of them.

    python -P benchmarks/scan.py [--sizes 1000 10000 100000] [--out benchmarks/results/scan.json]

The pictures are made in a temporary folder and removed: PNG and JPEG in turn, 64x48 to 96x64
pixels, each with bytes of its own and a caption. Each stage runs in a new process, on files in the
system's page cache but for the cold one, where that can be emptied. Processor time depends less on
the machine's other work than seconds do; memory is the largest growth of the process during the
stage. Large files are hashed as well, where the bytes and not the number of files count.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("first scan, cold", "first scan", "second scan", "hash", "hash again")
PICTURE_SIZES = ((64, 48), (48, 64), (80, 64), (96, 64))
NUM_LARGE, LARGE_BYTES = 32, 8 << 20
LIMITS = {"first_s": 30, "second_s": 3, "growth_mb": 300}
"""Of 100,000 pictures, on two cores."""


sys.path.append(str(ROOT / "scripts"))

import psutil  # noqa: E402
from pack import load_pack  # noqa: E402
from PIL import Image  # noqa: E402

load_pack()

from atelier.trainers.content_hashes import ContentHashes  # noqa: E402
from atelier.trainers.scan import Picture, scan_folder  # noqa: E402


def prototypes() -> list[tuple[str, bytes]]:
    """(extension, bytes) of some small pictures of noise, which look like photos to a codec."""
    found = []
    for size in PICTURE_SIZES:
        noise = Image.effect_noise(size, 40)
        picture = Image.merge("RGB", (noise, noise.rotate(180), noise.transpose(0)))
        for extension, kind in (("png", "PNG"), ("jpg", "JPEG")):
            buffer = io.BytesIO()
            picture.quantize(16).save(buffer, kind) if kind == "PNG" else picture.save(buffer, kind)
            found.append((extension, buffer.getvalue()))
    return found


def with_comment(extension: str, data: bytes, comment: bytes) -> bytes:
    """The picture with a comment in its header: the same pixels in other bytes."""
    if extension == "jpg":  # after the marker of the start
        return data[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + data[2:]
    chunk = b"tEXtComment\0" + comment
    sealed = chunk + zlib.crc32(chunk).to_bytes(4, "big")
    after_header = 33  # the signature, then IHDR
    return data[:after_header] + (len(chunk) - 4).to_bytes(4, "big") + sealed + data[after_header:]


def make_pictures(folder: Path, count: int) -> int:
    """Returns the bytes of all pictures together."""
    folder.mkdir()
    kinds = prototypes()
    num_bytes = 0
    for number in range(count):
        extension, data = kinds[number % len(kinds)]
        data = with_comment(extension, data, b"%09d" % number)
        stem = f"{folder}/picture_{number:06d}"
        with open(f"{stem}.{extension}", "wb") as file:
            file.write(data)
        with open(f"{stem}.txt", "wb") as file:
            file.write(b"picture number %d, a photo" % number)
        num_bytes += len(data)
    return num_bytes


class PeakGrowth:
    """How much larger the process became, looked at a hundred times a second."""

    def __enter__(self) -> PeakGrowth:
        self._process = psutil.Process()
        self._before = self._process.memory_info().rss
        self.num_bytes = 0
        self._is_over = threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._watcher.join()

    def _watch(self) -> None:
        is_over = False
        while not is_over:
            is_over = self._is_over.wait(0.01)
            growth = self._process.memory_info().rss - self._before
            self.num_bytes = max(self.num_bytes, growth)


def measure(stage: str, folder: Path, cache: Path) -> dict[str, float]:
    """One stage in this process."""
    if "scan" in stage:
        with PeakGrowth() as memory:
            began, cpu_began = time.perf_counter(), time.process_time()
            scan = scan_folder(folder, cache)
            seconds, cpu = time.perf_counter() - began, time.process_time() - cpu_began
        row = {"seconds": seconds, "processor_s": cpu, "num_read": scan.num_read}
    else:
        pictures = scan_folder(folder, cache).pictures
        with PeakGrowth() as memory:
            began, cpu_began = time.perf_counter(), time.process_time()
            hashed = ContentHashes(cache / "hashes" / "hashes.json").of_all(pictures)
            seconds, cpu = time.perf_counter() - began, time.process_time() - cpu_began
        row = {"seconds": seconds, "processor_s": cpu, "num_read": hashed.num_read}
        if hashed.num_read:
            row["files_per_s"] = hashed.num_read / seconds
            row["mb_per_s"] = hashed.num_bytes / seconds / 1e6
    row["growth_mb"] = memory.num_bytes / 1e6
    return {name: round(value, 3) for name, value in row.items()}


def forget_contents(folder: Path) -> bool:
    """Empty the page cache of the folder's files; False where the system has no call for it."""
    if not hasattr(os, "posix_fadvise"):
        return False
    os.sync()  # what is not on the disk yet stays
    for entry in os.scandir(folder):
        descriptor = os.open(entry.path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    return True


def measure_in_new_process(stage: str, folder: Path, cache: Path) -> dict[str, float]:
    command = [sys.executable, "-P", __file__, "--stage", stage, "--folder", str(folder)]
    result = subprocess.run(
        [*command, "--cache", str(cache)], check=True, stdout=subprocess.PIPE, encoding="utf-8"
    )
    return json.loads(result.stdout)


def measure_size(count: int, folder: Path) -> dict:
    pictures = folder / str(count)
    num_bytes = make_pictures(pictures, count)
    time.sleep(2.5)  # younger files are not remembered
    cache = folder / f"cache {count}"
    stages = {}
    for stage in STAGES:
        if "cold" in stage and not forget_contents(pictures):
            continue
        stages[stage] = measure_in_new_process(stage, pictures, cache)
        if "cold" in stage:
            shutil.rmtree(cache)
    shutil.rmtree(pictures)
    return {"pictures_mb": round(num_bytes / 1e6, 1), **stages}


def measure_large_files(folder: Path) -> dict[str, float]:
    """Hashing files of random bytes, with the two threads of `of_all` and in one."""
    folder.mkdir()
    for number in range(NUM_LARGE):
        (folder / f"{number:02d}.bin").write_bytes(os.urandom(LARGE_BYTES))
    files = [
        Picture(
            path=str(path),
            num_bytes=LARGE_BYTES,
            mtime_ns=path.stat().st_mtime_ns,
            width=1,
            height=1,
            has_alpha=False,
            num_frames=1,
        )
        for path in sorted(folder.iterdir())
    ]
    hashed = ContentHashes(folder / "hashes.json").of_all(files)
    alone = ContentHashes(folder / "alone.json")
    began = time.perf_counter()
    for file in files:
        alone.of(file.path, file.num_bytes, file.mtime_ns)
    seconds = time.perf_counter() - began
    shutil.rmtree(folder)
    return {
        "files": NUM_LARGE,
        "mb_each": round(LARGE_BYTES / 1e6, 1),
        "two_threads_mb_per_s": round(hashed.num_bytes / hashed.seconds / 1e6, 1),
        "one_thread_mb_per_s": round(hashed.num_bytes / seconds / 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/scan.json")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        row = measure(arguments.stage, arguments.folder, arguments.cache)
        sys.stdout.write(json.dumps(row))
        return
    result = {"machine": platform.machine(), "cores": os.cpu_count(), "limits": LIMITS}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        result["sizes"] = {count: measure_size(count, folder) for count in arguments.sizes}
        result["large files"] = measure_large_files(folder / "large")
    sys.stdout.write(json.dumps(result, indent=2) + "\n")
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
