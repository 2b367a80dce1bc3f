"""The caches at scale: how long a batch takes to read, and how long to see what is cached.

    python -P benchmarks/caches.py [--out benchmarks/results/caches.json]

Entries are random, of the sizes of FLUX.1-dev's: latents of 512x768 pixels (mean and deviation) and
77 T5 tokens with the pooled vector. Files lie in a temporary folder and are in the system's cache
when they are read, as those of a small dataset are while training.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "scripts"), str(ROOT / "tests" / "support")]

from pack import load_pack  # noqa: E402

load_pack()

from atelier.trainers.caches import LatentCache, LatentEntry, LatentSubset, PromptCache, PromptEntry  # noqa: E402
from atelier.trainers.data import TrainingData  # noqa: E402
from atelier.trainers.shards import Shards  # noqa: E402

WIDTH, HEIGHT, TOKENS = 512, 768, 77
COUNTS = (1_000, 10_000, 100_000)


def batch_fetch_ms(folder: Path, dtype: torch.dtype, pictures: int = 64) -> float:
    """Median milliseconds to read one sample, in random order."""
    latent = torch.randn(2, 16, HEIGHT // 8, WIDTH // 8).to(dtype)
    entries = []
    with Shards(folder).writing() as write:
        for number in range(pictures):
            key, caption = f"{number:064x}", f"caption {number}"
            write(key, {"mean": latent[0], "std": latent[1]})
            embeds = torch.randn(TOKENS, 4096).to(dtype)
            write(f"{number:063x}t", {"prompt_embeds": embeds, "pooled": torch.randn(768)})
            entries.append(
                LatentEntry(
                    record=key, keys=(key,), texts=((caption,),), width=WIDTH, height=HEIGHT
                )
            )
    texts = [PromptEntry(text=e.texts[0][0], key=f"{n:063x}t") for n, e in enumerate(entries)]
    data = TrainingData(
        latents=LatentCache(
            folder=str(folder),
            encoder="",
            subsets=(LatentSubset(name="pictures", entries=tuple(entries)),),
        ),
        prompts=PromptCache(folder=str(folder), encoder="", length=TOKENS, entries=tuple(texts)),
    )
    generator = torch.Generator().manual_seed(0)
    times = []
    for index in torch.randint(pictures, (200,), generator=generator).tolist():
        began = time.perf_counter()
        picture = data.latents.load(entries[index].name)
        text = data.prompts.load(entries[index].texts[0][0])
        times.append(time.perf_counter() - began)
        assert picture.mean.shape == (16, HEIGHT // 8, WIDTH // 8)
        assert text.prompt_embeds.shape == (TOKENS, 4096)
    return statistics.median(times) * 1e3


def index_seconds(folder: Path, count: int) -> dict[str, float]:
    """Seconds until a fresh process-like reader knows which of `count` entries are there."""
    with Shards(folder).writing() as write:
        for number in range(count):
            write(f"{number:064x}", {"mean": torch.zeros(16), "std": torch.zeros(16)})
    keys = [f"{number:064x}" for number in range(count)]
    shards = Shards(folder)
    began = time.perf_counter()
    assert shards.missing([*keys, "none"]) == ["none"]
    first = time.perf_counter() - began
    began = time.perf_counter()
    assert shards.missing(keys) == []
    second = time.perf_counter() - began
    return {"first_s": first, "again_s": second}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/caches.json")
    arguments = parser.parse_args()
    result: dict[str, object] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as name:
        result["index"] = {str(n): index_seconds(Path(name) / str(n), n) for n in COUNTS}
        result["batch_fetch_ms"] = {
            title: batch_fetch_ms(Path(name) / title, dtype)
            for title, dtype in (("bf16", torch.bfloat16), ("float32", torch.float32))
        }
    text = json.dumps(result, indent=2) + "\n"
    sys.stdout.write(text)
    arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
