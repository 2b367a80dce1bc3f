"""The caches at scale: filling them, reading a batch, and seeing what is cached.

    python -P benchmarks/caches.py [--out benchmarks/results/caches.json]

- Filling: pictures of photo size and captions through the nano networks, against a plain loop over
  the same functions that keeps its results in memory, and one that saves a file for each. They take
  turns, and the best round of each counts, since other work on the machine only adds time; a ratio
  is above 1 where the cache is faster. Seconds of the processor are compared as well.
  Pictures are read while others are encoded; captions can only be as fast, or encoded together.
- Reading: batches of one from caches of 1,000 to 100,000 entries, chosen at random, each of which
  was read before. Entries are of the sizes of FLUX.1-dev's: latents of 512x768 pixels (mean and
  deviation), 77 T5 tokens and the pooled vector.
- Seeing: how long a new process takes to know which of so many small entries are there.

Exits with 1 where a batch takes more than `FETCH_MS` or filling is slower than the loop that saves.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "scripts"), str(ROOT / "tests" / "support")]

from comfy_in_process import make_comfy_importable  # noqa: E402
from pack import load_pack  # noqa: E402

COMFYUI = Path(os.environ.get("ATELIER_COMFYUI") or ROOT / ".dev" / "ComfyUI")
HOME = tempfile.TemporaryDirectory(prefix="atelier-")

load_pack()
make_comfy_importable(COMFYUI, HOME.name)

from atelier.nodes.encoders import build_clip, build_vae, latent_encoder, prompt_encoder  # noqa: E402
from atelier.trainers.buckets import Resolution  # noqa: E402
from atelier.trainers.caches import LatentCache, LatentEntry, LatentSubset, PromptCache, PromptEntry  # noqa: E402
from atelier.trainers.caching import cache_latents, cache_prompts  # noqa: E402
from atelier.trainers.captions import CaptionSettings  # noqa: E402
from atelier.trainers.data import Sample, TrainingData  # noqa: E402
from atelier.trainers.dataset import Dataset  # noqa: E402
from atelier.trainers.image_folder import image_folder  # noqa: E402
from atelier.trainers.pictures import decode, transform  # noqa: E402
from atelier.trainers.shards import Shards  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

WIDTH, HEIGHT, TOKENS = 512, 768, 77
COUNTS = (1_000, 10_000, 100_000)
FETCH_MS = 2.0
LEAST = 0.97
"""Of the throughput of the loop that saves: captions one by one are the same work, and repeats of
one program differ by about that."""
FREE_BYTES = 8 << 30
"""What is left on the disk: a count that would take more is left out."""
ROUNDS, NUM_PICTURES, NUM_CAPTIONS = 5, 16, 96
PHOTO, SIDE = (2000, 1500), 256
"""Pixels of the pictures and of their training size: reading one takes about as long as encoding it
with the nano networks on a CPU, as with FLUX's on a GPU."""
NUM_FETCHED = 300
"""Batches that are fetched, once to warm the caches and once more for the time."""


def filling(folder: Path) -> dict[str, object]:
    """Pictures and captions a second, ours and of the two loops."""
    folder.mkdir()
    noise = Image.effect_noise(PHOTO, 40)
    for number in range(NUM_PICTURES):
        channels = (noise.rotate(number), noise.rotate(180 + number), noise)
        Image.merge("RGB", channels).save(folder / f"{number}.jpg")
    resolution = Resolution(width=SIDE, height=SIDE)
    captions = CaptionSettings(missing="empty")
    subset = image_folder(folder, resolution=resolution, captions=captions)
    dataset = Dataset(subsets=(subset,))
    texts = [f"a photo of thing number {number} on a table" for number in range(NUM_CAPTIONS)]
    encode, encoder_id = latent_encoder(build_vae(ROOT / "assets/nano"))
    encode_texts, texts_id = prompt_encoder(build_clip(ROOT / "assets/nano"), TOKENS)
    target = folder / "cache"

    def pictures_in_a_loop(keep) -> None:
        for record in subset.records:
            how = subset.pictures.transforms(subset.size_of(record), record.content)[0]
            picture = decode(Path(record.path).read_bytes(), record.path)
            mean, std = encode(transform(picture, how)[None])
            keep({"mean": mean[0], "std": std[0]})

    def texts_in_a_loop(keep) -> None:
        for text in texts:
            embeds, pooled = encode_texts([text])
            keep({"prompt_embeds": embeds[0], "pooled": pooled[0]})

    def saving(loop) -> None:
        target.mkdir()
        numbers = iter(range(NUM_CAPTIONS))
        loop(lambda tensors: save_file(tensors, target / f"{next(numbers)}.safetensors"))

    kinds = {
        "pictures": (
            pictures_in_a_loop,
            lambda: cache_latents(dataset, encode, encoder_id, target),
            NUM_PICTURES,
        ),
        "captions": (
            texts_in_a_loop,
            lambda: cache_prompts(texts, encode_texts, texts_id, TOKENS, target),
            NUM_CAPTIONS,
        ),
        "captions, 8 at once": (
            texts_in_a_loop,
            lambda: cache_prompts(texts, encode_texts, texts_id, TOKENS, target, batch_size=8),
            NUM_CAPTIONS,
        ),
    }
    result = {}
    for kind, (loop, ours, count) in kinds.items():
        ways = {
            "ours": ours,
            "loop in memory": lambda loop=loop: loop([].append),
            "loop that saves": lambda loop=loop: saving(loop),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        processor: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, run in ways.items():
                shutil.rmtree(target, ignore_errors=True)
                began, began_processor = time.perf_counter(), time.process_time()
                run()
                seconds[name].append(time.perf_counter() - began)
                processor[name].append(time.process_time() - began_processor)
        sys.stderr.write(f"{kind}: {seconds}\n")
        best, least = ({n: min(t) for n, t in times.items()} for times in (seconds, processor))
        loops = [name for name in ways if name != "ours"]
        result[kind] = {
            "per_s": {name: count / value for name, value in best.items()},
            "ratio_to": {name: best[name] / best["ours"] for name in loops},
            "processor_ratio_to": {name: least[name] / least["ours"] for name in loops},
        }
    return result


def batch_fetch_ms(folder: Path, dtype: torch.dtype, count: int) -> dict[str, float]:
    """Median and 95th percentile of the milliseconds of a batch of one, in random order."""
    latent = torch.randn(2, 16, HEIGHT // 8, WIDTH // 8).to(dtype)
    embeds, pooled = torch.randn(TOKENS, 4096).to(dtype), torch.randn(768)
    entries, texts = [], []
    with Shards(folder).writing() as write:
        for number in range(count):
            key, text_key, caption = f"{number:064x}", f"{number:063x}t", f"caption {number}"
            write(key, {"mean": latent[0], "std": latent[1]})
            write(text_key, {"prompt_embeds": embeds, "pooled": pooled})
            sides = {"width": WIDTH, "height": HEIGHT}
            entries.append(LatentEntry(record=key, keys=(key,), texts=((caption,),), **sides))
            texts.append(PromptEntry(text=caption, key=text_key))
    subset = LatentSubset(name="pictures", entries=tuple(entries))
    data = TrainingData(
        latents=LatentCache(folder=str(folder), encoder="", subsets=(subset,)),
        prompts=PromptCache(folder=str(folder), encoder="", length=TOKENS, entries=tuple(texts)),
    )
    sys.stderr.write(f"{count} entries of {dtype} are written\n")
    data.latents.require_complete()
    data.prompts.require([texts[0].text])  # as before a training
    generator, cpu = torch.Generator().manual_seed(0), torch.device("cpu")
    times = []
    fetched = torch.randint(count, (NUM_FETCHED,), generator=generator).tolist()
    for index in (*fetched, *reversed(fetched)):
        began = time.perf_counter()
        batch = data.load([Sample(entries[index].name, texts[index].text)], cpu, generator)
        times.append((time.perf_counter() - began) * 1e3)
        assert batch.latents.shape == (1, 16, HEIGHT // 8, WIDTH // 8)
        assert batch.prompt_embeds.shape == (1, TOKENS, 4096)
    times = times[NUM_FETCHED:]
    return {"median": statistics.median(times), "p95": statistics.quantiles(times, n=20)[-1]}


def index_seconds(folder: Path, count: int) -> dict[str, float]:
    """Seconds until a fresh process-like reader knows which of `count` entries are there."""
    with Shards(folder).writing() as write:
        for number in range(count):
            write(f"{number:064x}", {"mean": torch.zeros(16), "std": torch.zeros(16)})
    sys.stderr.write(f"{count} small entries are written\n")
    keys = [f"{number:064x}" for number in range(count)]
    shards = Shards(folder)
    began = time.perf_counter()
    assert shards.missing([*keys, "none"]) == ["none"]
    first = time.perf_counter() - began
    began = time.perf_counter()
    assert shards.missing(keys) == []
    second = time.perf_counter() - began
    return {"first_s": first, "again_s": second}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/caches.json")
    parser.add_argument("--counts", type=int, nargs="+", default=list(COUNTS))
    arguments = parser.parse_args()
    result: dict[str, object] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    fetch: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        result["filling"] = filled = filling(Path(name) / "filling")
        result["index"] = {str(n): index_seconds(Path(name) / str(n), n) for n in arguments.counts}
        for count in arguments.counts:
            kinds = (("bf16", torch.bfloat16), ("float32", torch.float32))
            for title, dtype in kinds if count <= 1_000 else kinds[:1]:
                numbers = 2 * 16 * (WIDTH // 8) * (HEIGHT // 8) + TOKENS * 4096
                needed = count * numbers * dtype.itemsize
                if shutil.disk_usage(name).free - needed < FREE_BYTES:
                    continue
                folder = Path(name) / f"{title} {count}"
                fetch[f"{title} {count}"] = batch_fetch_ms(folder, dtype, count)
                shutil.rmtree(folder)
    result["batch_fetch_ms"] = fetch
    text = json.dumps(result, indent=2) + "\n"
    sys.stdout.write(text)
    arguments.out.write_text(text, encoding="utf-8")
    slow = [
        one for name, one in fetch.items() if name.startswith("bf16") if one["median"] > FETCH_MS
    ]
    behind = [kind for kind in filled.values() if kind["ratio_to"]["loop that saves"] < LEAST]
    return 1 if slow or behind else 0


if __name__ == "__main__":
    sys.exit(main())
