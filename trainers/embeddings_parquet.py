"""embeddings.parquet of Hugging Face's QLoRA recipe: the embeddings of captions, by picture.

One row for each picture, as diffusers' examples/research_projects/flux_lora_quantization writes and
reads it: `image_hash` is the SHA-256 of its decoded pixels in hex, and three flat lists of numbers
are `prompt_embeds` [L * D], `pooled_prompt_embeds` [D2] and `text_ids` [L * 3], all zeros. The file
holds no captions: rows and pictures are paired by that hash.

Shapes: L text tokens, D width, D2 width of the pooled vector.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import ImageOps
from torch import Tensor

from .caches import PromptCache, PromptEmbeds, PromptEntry
from .captions import listed
from .checks import require
from .dataset import Dataset, Record, open_picture
from .files import require_room, write_atomically
from .packages import importing
from .progress import OnProgress
from .shards import Shards

HASH, LISTS = "image_hash", ("prompt_embeds", "pooled_prompt_embeds", "text_ids")
ENCODER = "embeddings.parquet"
"""In place of an encoder's identity: the file does not tell it."""
_ROWS_AT_ONCE = 16  # of 2.5 MB each at 77 tokens and float64


def pixel_hash(record: Record) -> str:
    """SHA-256 in hex of a picture's pixels as the package `datasets` decodes it: upright, in the
    colours and bits of its file.

    Raises:
        ValueError: as `open_picture`.
    """
    return hashlib.sha256(ImageOps.exif_transpose(open_picture(record)).tobytes()).hexdigest()


def import_embeddings(
    dataset: Dataset, path: Path, folder: str | Path, on_progress: OnProgress | None = None
) -> PromptCache:
    """The captions of `dataset`, with the embeddings that a file has for its pictures.

    Numbers are kept as float32. `on_progress(done, total)` may raise to stop.

    Raises:
        ValueError: the file is no such file, lacks a picture, its lists have not the lengths of one
            kind of embedding, or the dataset has not one caption for each picture.
    """
    texts = _captions(dataset, on_progress)
    shards, keys, length = Shards(folder), {}, 0
    with _opened(path) as file, shards.writing() as write:
        _require_columns(file, path)
        rows = _read_hashes(file, path)
        missing = [name for image_hash, (name, _) in texts.items() if image_hash not in rows]
        require(
            not missing,
            f"The file {path} has no embeddings of these pictures: {listed(missing)}. It knows "
            "pictures by their pixels, so it must have been made from the same files.",
        )
        wanted = {rows[image_hash]: text for image_hash, (_, text) in texts.items()}
        sizes: tuple[int, ...] = ()
        for number, embeds in _read_rows(file, wanted, path):
            found = (*embeds.prompt_embeds.shape, *embeds.pooled.shape)
            sizes = sizes or found
            require(
                found == sizes,
                f"Row {number + 1} of {path} has lists of other lengths than the rows before it. "
                "All captions must be encoded with one max_sequence_length.",
            )
            length = sizes[0]
            tensors = {"prompt_embeds": embeds.prompt_embeds, "pooled": embeds.pooled}
            key, text = _key(tensors), wanted[number]
            require(
                keys.setdefault(text, key) == key,
                f"Several pictures have the caption {text[:80]!r}, and {path} has different "
                "embeddings for them. Give each picture the caption that was encoded, or set "
                "missing_captions to file name and remove the caption files.",
            )
            if shards.missing([key]):
                left = (len(wanted) - len(keys) + 1) * sum(t.nbytes for t in tensors.values())
                require_room(shards.folder, left)
                write(key, tensors)
    entries = tuple(PromptEntry(text=text, key=key) for text, key in keys.items())
    return PromptCache(folder=str(shards.folder), encoder=ENCODER, length=length, entries=entries)


def export_embeddings(
    dataset: Dataset, prompts: PromptCache, path: Path, on_progress: OnProgress | None = None
) -> int:
    """Write a file that the recipe's scripts read; returns the number of its rows, one for each
    distinct picture.

    Raises:
        ValueError: the dataset has not one caption for each picture, one is not in `prompts`, or
            the file cannot be written.
    """
    texts = _captions(dataset, on_progress)
    prompts.require(text for _, text in texts.values())
    with importing("pyarrow"):
        import pyarrow  # pyright: ignore[reportMissingImports]
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
    numbers = pyarrow.list_(pyarrow.float32())
    schema = pyarrow.schema([(HASH, pyarrow.string()), *((name, numbers) for name in LISTS)])

    def write(temporary: Path) -> None:
        # Our own file object: its errors are the system's.
        with (
            temporary.open("wb") as file,
            pyarrow.parquet.ParquetWriter(file, schema) as writer,
        ):
            for image_hash, (_, text) in texts.items():
                embeds = prompts.load(text)
                lists = (
                    embeds.prompt_embeds,
                    embeds.pooled,
                    torch.zeros(len(embeds.prompt_embeds), 3),
                )
                flat = [tensor.float().flatten().numpy() for tensor in lists]
                columns = [[image_hash], *([one] for one in flat)]
                arrays = [pyarrow.array(c, f.type) for c, f in zip(columns, schema, strict=True)]
                writer.write_batch(pyarrow.record_batch(arrays, schema=schema))

    write_atomically(path, write)
    return len(texts)


def _captions(dataset: Dataset, on_progress: OnProgress | None) -> dict[str, tuple[str, str]]:
    """{hash of the pixels: (file name, caption)} of every distinct picture."""
    records = [record for subset in dataset.subsets for record in subset.records]
    require(
        not any(subset.captions.dropout for subset in dataset.subsets),
        "embeddings.parquet has no empty caption, which caption dropout needs. Set dropout to 0.",
    )
    found: dict[str, tuple[str, str]] = {}
    for done, record in enumerate(records):
        if on_progress is not None:
            on_progress(done, len(records))
        name = Path(record.path).name
        texts = {text for variants in record.texts for text in variants}
        image_hash = pixel_hash(record)
        text = found.setdefault(image_hash, (name, record.texts[0][0]))[1]
        require(
            texts == {text},
            f"The picture {name} has several captions or variants of one, and embeddings.parquet "
            "one for each picture. Turn shuffle off, and keep one caption.",
        )
    return found


def _key(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(ENCODER.encode())
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()


def _opened(path: Path) -> Any:
    with importing("pyarrow"):
        import pyarrow  # pyright: ignore[reportMissingImports]
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise _unreadable(path) from error


def _unreadable(path: Path) -> ValueError:
    return ValueError(
        f"The file {path} cannot be read as parquet: it is damaged or another kind of file. Make "
        "it again with compute_embeddings.py or Export Embeddings."
    )


def _require_columns(file: Any, path: Path) -> None:
    import pyarrow  # pyright: ignore[reportMissingImports]

    kinds, schema = pyarrow.types, file.schema_arrow

    def is_right(name: str) -> bool:
        if name not in schema.names:
            return False
        kind = schema.field(name).type
        if name == HASH:
            return kinds.is_string(kind) or kinds.is_large_string(kind)
        is_list = kinds.is_list(kind) or kinds.is_large_list(kind)
        return is_list and kinds.is_floating(kind.value_type)

    wrong = [name for name in (HASH, *LISTS) if not is_right(name)]
    require(
        not wrong,
        f"The file {path} is no embeddings.parquet of the QLoRA recipe: it has no column "
        f"{listed(wrong)} of the right type. It needs image_hash (text), prompt_embeds, "
        "pooled_prompt_embeds and text_ids (lists of numbers).",
    )


def _read_hashes(file: Any, path: Path) -> dict[str, int]:
    """The row of each picture; of a picture that is there twice, the last one."""
    import pyarrow  # pyright: ignore[reportMissingImports]

    try:
        hashes = file.read(columns=[HASH])[HASH].to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise _unreadable(path) from error
    return {image_hash: number for number, image_hash in enumerate(hashes)}


def _read_rows(file: Any, wanted: dict[int, str], path: Path) -> Iterator[tuple[int, PromptEmbeds]]:
    """(number, embeddings) of the rows in `wanted`. A few are in memory at a time."""
    import pyarrow  # pyright: ignore[reportMissingImports]

    number = 0
    try:
        for batch in file.iter_batches(_ROWS_AT_ONCE, columns=list(LISTS)):
            for place in range(batch.num_rows):
                if number in wanted:
                    lists = [batch.column(name)[place].values for name in LISTS]
                    yield number, _embeds(lists, number, path)
                number += 1
    except (OSError, pyarrow.ArrowException) as error:
        raise _unreadable(path) from error


def _embeds(lists: list[Any], number: int, path: Path) -> PromptEmbeds:
    embeds, pooled, text_ids = (
        torch.tensor([] if one is None else one.to_numpy(zero_copy_only=False)).float()
        for one in lists
    )
    length = len(text_ids) // 3
    fits = length and len(text_ids) == 3 * length and len(embeds) and len(embeds) % length == 0
    require(
        bool(fits and len(pooled)),
        f"Row {number + 1} of {path} has lists of {len(embeds)}, {len(pooled)} and {len(text_ids)} "
        "numbers, which do not match. For L tokens they are L x 4096, 768 and L x 3.",
    )
    require(
        bool(torch.isfinite(embeds).all() and torch.isfinite(pooled).all()),
        f"Row {number + 1} of {path} holds numbers that are not finite. Make the file again with "
        "text encoders in bf16 or fp32.",
    )
    return PromptEmbeds(prompt_embeds=embeds.view(length, -1), pooled=pooled)
