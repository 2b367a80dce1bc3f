"""Datasets in the forms of the Hugging Face Hub: local folders, and repositories of a hub that runs
on this machine.

The hub's client reads its variables when it is imported, so every download is a process of its own.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from atelier.trainers.buckets import Resolution
from atelier.trainers.captions import CaptionSettings
from atelier.trainers.dataset import PictureSettings, Subset, open_picture
from atelier.trainers.hub_dataset import hub_folder
from atelier.trainers.picture_files import PictureFiles
from hub_server import HubServer
from PIL import Image
from small_disk import fill, small_disk

ROOT = Path(__file__).resolve().parent.parent
FETCH = """
import json, sys
from pathlib import Path
from trainers.hub_dataset import fetch_dataset
for hub_id in sys.argv[2:]:
    try:
        print(json.dumps({"answer": str(fetch_dataset(hub_id, Path(sys.argv[1])))}))
    except ValueError as error:
        print(json.dumps({"error": str(error)}))
"""
COLOURS = ("red", "green", "blue", "orange", "purple")


def picture(colour: str, kind: str = "PNG", size: tuple[int, int] = (80, 64)) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size, colour).save(data, kind)
    return data.getvalue()


def write_parquet(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


def rows(*colours: str, kind: str = "PNG") -> list[dict[str, Any]]:
    """Rows as `datasets` writes them."""
    return [
        {"image": {"bytes": picture(colour, kind), "path": f"a_{colour}.png"}, "text": colour}
        for colour in colours
    ]


def read(folder: Path, **options: Any) -> Subset:
    settings: dict[str, Any] = {"captions": CaptionSettings(), "pictures": PictureSettings()}
    settings |= {"repeats": 1, "on_bad_file": "stop", "index_folder": None}
    settings |= {"files": PictureFiles(folder.parent / "pictures")}
    return hub_folder(folder, resolution=Resolution(width=64, height=64), **{**settings, **options})


def captions_of(subset: Subset) -> list[tuple[str, ...]]:
    return [tuple(variants[0] for variants in record.texts) for record in subset.records]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_pictures_inside_of_parquet_are_kept_as_they_are(tmp_path: Path, kind: str) -> None:
    expected = rows(*COLOURS, kind=kind)
    write_parquet(tmp_path / "set" / "train.parquet", expected, row_group_size=2)
    subset = read(tmp_path / "set")
    assert captions_of(subset) == [(colour,) for colour in COLOURS]
    for record, row in zip(subset.records, expected, strict=True):
        data = row["image"]["bytes"]
        assert Path(record.path).read_bytes() == data
        assert record.content == hashlib.sha256(data).hexdigest()
        assert open_picture(record).size == (80, 64)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "pictures").rglob("*.*")}
    assert len(times) == len(COLOURS)
    read(tmp_path / "set")
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_several_files_and_plain_columns_and_lists_of_captions(tmp_path: Path) -> None:
    first = [{"img": picture("red"), "caption": ["red", "all red"]}]
    write_parquet(tmp_path / "set" / "data" / "train-00000-of-00002.parquet", first)
    write_parquet(tmp_path / "set" / "data" / "train-00001-of-00002.parquet", rows("green"))
    write_parquet(tmp_path / "set" / "data" / "test-00000-of-00001.parquet", rows("blue"))
    assert captions_of(read(tmp_path / "set")) == [("red", "all red"), ("green",)]


def test_the_same_picture_twice_is_one_file(tmp_path: Path) -> None:
    twice = [*rows("red"), {**rows("red")[0], "text": "again"}]
    write_parquet(tmp_path / "set" / "a.parquet", twice)
    subset = read(tmp_path / "set")
    assert captions_of(subset) == [("red",), ("again",)]
    assert len({record.path for record in subset.records}) == 1


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"column": "long"}, "a long text"),
        ({"source": "file name"}, "a red"),
        ({"source": "instance prompt", "instance_prompt": "sks"}, "sks"),
        ({"column": "none", "missing": "file name"}, "a red"),
        ({"column": "none", "missing": "empty"}, ""),
    ],
)
def test_captions_of_parquet(tmp_path: Path, settings: dict, expected: str) -> None:
    row = {**rows("red")[0], "long": "a long text", "none": None}
    write_parquet(tmp_path / "set" / "a.parquet", [row])
    assert captions_of(read(tmp_path / "set", captions=CaptionSettings(**settings))) == [
        (expected,)
    ]


def test_the_imagefolder_form_has_metadata_in_subfolders(tmp_path: Path) -> None:
    train = tmp_path / "set" / "train"
    for part in ("one", "two"):
        (train / part).mkdir(parents=True)
        (train / part / "a.png").write_bytes(picture("red"))
    table = 'file_name,text\none/a.png,"red, round"\ntwo/a.png,blue\n'
    (train / "metadata.csv").write_text(table, encoding="utf-8")
    other = tmp_path / "set" / "validation"
    other.mkdir()
    (other / "x.png").write_bytes(picture("red"))
    assert captions_of(read(tmp_path / "set")) == [("red, round",), ("blue",)]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json"])
def test_diffsynths_metadata_names_image_and_prompt(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    entries = [{"image": f"image_{n}.jpg", "prompt": f"a dog, {n}"} for n in (1, 2)]
    for entry in entries:
        (folder / entry["image"]).write_bytes(picture("red", "JPEG"))
    lines = [json.dumps(entry) for entry in entries]
    text = {
        "csv": "image,prompt\n" + "".join(f'{e["image"]},"{e["prompt"]}"\n' for e in entries),
        "jsonl": "\n".join(lines),
        "json": json.dumps(entries),
    }
    (folder / f"metadata.{kind}").write_text(text[kind], encoding="utf-8")
    assert captions_of(read(folder)) == [("a dog, 1",), ("a dog, 2",)]


def test_the_folders_images_and_prompts_belong_together(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    for name in ("1", "2"):
        for kind in ("images", "prompts"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
        (folder / "images" / f"{name}.jpg").write_bytes(picture("red", "JPEG"))
        (folder / "prompts" / f"{name}.txt").write_text(f"a dog, {name}\n", encoding="utf-8")
    assert captions_of(read(folder)) == [("a dog, 1",), ("a dog, 2",)]
    (folder / "prompts" / "2.txt").unlink()
    with pytest.raises(ValueError, match=r"2\.jpg has no caption in the table or folder"):
        read(folder)


def damaged(path: Path) -> None:
    data = write_parquet(path, rows(*COLOURS)).read_bytes()
    path.write_bytes(data[: len(data) // 2])


def overwritten(path: Path) -> None:
    """The pages of the columns are not what the footer says."""
    data = bytearray(write_parquet(path, rows(*COLOURS), compression="snappy").read_bytes())
    data[4:200] = b"\xff" * 196
    path.write_bytes(bytes(data))


UNREADABLE = "cannot be read as parquet: it is damaged or another kind of file."
BAD_PARQUET = [
    (damaged, UNREADABLE),
    (overwritten, UNREADABLE),
    (lambda path: path.write_bytes(b""), UNREADABLE),
    (lambda path: path.write_bytes(b"PAR1 and no more"), UNREADABLE),
    (lambda path: write_parquet(path, [{"url": "x", "text": "a"}]), "has no column image or"),
    (lambda path: write_parquet(path, [{"image": b"", "txt": "a"}]), "has no column text or"),
    (lambda path: write_parquet(path, [{"image": b"", "text": 3}]), "has 3 in the column text."),
    (lambda path: write_parquet(path, [{"image": b"x", "text": "a"}]), "F/a.parquet:1 is no png, "
     "jpg, webp or bmp picture."),
    (lambda path: write_parquet(path, [{"image": "cat.png", "text": "a"}]), "F/a.parquet:1 has no "
     "bytes of a picture."),
    (lambda path: write_parquet(path, [{"image": picture("red")[:30], "text": "a"}]), "damaged,"),
    (lambda path: write_parquet(path, [{"image": picture("red"), "text": None}]), "F/a.parquet:1 "
     "has no caption."),
    (lambda path: pyarrow.parquet.write_table(
        pyarrow.table({"image": pyarrow.array([], pyarrow.binary()), "text": []}), path),
     "The parquet files of F hold no pictures."),
]  # fmt: skip


@pytest.mark.parametrize(("write", "message"), BAD_PARQUET)
def test_bad_parquet_is_a_sentence(tmp_path: Path, write: Any, message: str) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "a.parquet")
    with pytest.raises(ValueError, match=r"\.$") as caught:
        read(folder)
    assert message in str(caught.value).replace(str(folder), "F")


def test_bad_rows_are_left_out_if_the_user_wants_it(tmp_path: Path) -> None:
    bad = [{"image": {"bytes": data, "path": "x"}, "text": "x"} for data in (b"x", None)]
    cut = {"image": {"bytes": picture("red")[:40], "path": "x"}, "text": "x"}
    some = [*rows("red"), *bad, cut, *rows("green")]
    write_parquet(tmp_path / "set" / "a.parquet", some)
    subset = read(tmp_path / "set", on_bad_file="skip")
    assert captions_of(subset) == [("red",), ("green",)]
    assert sum(text.startswith("Left out: ") for text in subset.warnings) == 3


def test_a_full_disk_stops_also_if_bad_rows_are_left_out(tmp_path: Path) -> None:
    noise = Image.frombytes("RGB", (900, 900), os.urandom(900 * 900 * 3))
    data = io.BytesIO()
    noise.save(data, "PNG")
    write_parquet(tmp_path / "set" / "a.parquet", [{"image": data.getvalue(), "text": "noise"}])
    with small_disk(tmp_path / "disk") as disk:
        fill(disk)
        with pytest.raises(ValueError, match=r"The disk of .* is full"):
            read(tmp_path / "set", files=PictureFiles(disk / "pictures"), on_bad_file="skip")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    repositories = tmp_path_factory.mktemp("repositories")
    sets = repositories / "datasets" / "sets"
    write_parquet(sets / "inside" / "data" / "train-0.parquet", rows("red", "green"))
    write_parquet(sets / "inside" / "data" / "test-0.parquet", rows("blue"))
    (sets / "inside" / "README.md").write_text("A dataset.", encoding="utf-8")
    write_parquet(sets / "gated" / "train.parquet", rows("red"))
    files = {"train/a.png": picture("red"), "train/metadata.jsonl": b'{"file_name": "a.png", '}
    files["train/metadata.jsonl"] += b'"text": "a red one"}'
    files |= {"test/b.png": picture("blue"), "model.bin": b"x", ".gitattributes": b"x"}
    for name, data in files.items():
        (sets / "pictures" / name).parent.mkdir(parents=True, exist_ok=True)
        (sets / "pictures" / name).write_bytes(data)
    (sets / "empty").mkdir()
    (sets / "empty" / "README.md").write_text("Nothing.", encoding="utf-8")
    with HubServer(repositories, gated={"datasets/sets/gated": "a-token"}) as server:
        yield server


def fetch(hub_ids: list[str], endpoint: str, home: Path, **variables: str) -> list[dict[str, str]]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    own = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", FETCH, str(home / "index"), *hub_ids]
    environment = {**kept, **own, **variables}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_only_what_is_trained_is_downloaded_and_only_once(hub: HubServer, tmp_path: Path) -> None:
    ids = ["sets/inside", "sets/pictures"]
    hub.requests.clear()
    answers = fetch(ids, hub.url, tmp_path)
    inside, pictures = (Path(answer["answer"]) for answer in answers)
    names = {path.rpartition("/")[2] for path in hub.downloads()}
    assert names == {"train-0.parquet", "a.png", "metadata.jsonl"}
    assert captions_of(read(inside, files=PictureFiles(tmp_path / "kept"))) == [
        ("red",),
        ("green",),
    ]
    assert captions_of(read(pictures)) == [("a red one",)]
    hub.requests.clear()
    assert fetch(ids, hub.url, tmp_path) == answers
    assert hub.requests == []
    assert fetch(ids, hub.url, tmp_path, HF_HUB_OFFLINE="1") == answers
    (pictures / "train" / "a.png").unlink()  # as a download that was cut off leaves it
    assert fetch(["sets/pictures"], hub.url, tmp_path) == answers[1:]
    assert (pictures / "train" / "a.png").is_file()


def test_what_the_hub_refuses_is_a_sentence(hub: HubServer, tmp_path: Path) -> None:
    ids = ["sets/gated", "sets/none", "sets/empty", "no id"]
    gated, missing, empty, no_id = (a["error"] for a in fetch(ids, hub.url, tmp_path))
    assert gated.startswith("The repository 'sets/gated' is gated. Accept its licence on ")
    assert f"{hub.url}/datasets/sets/gated, then log in" in gated
    assert missing.startswith(f"There is no repository 'sets/none' at {hub.url}, or it is private.")
    assert "'sets/empty' holds neither parquet files nor pictures." in empty
    assert no_id.startswith("A Hugging Face repository is named by its owner and its name")
    assert "answer" in fetch(["sets/gated"], hub.url, tmp_path, HF_TOKEN="a-token")[0]
    (offline,) = fetch(["sets/inside"], hub.url, tmp_path, HF_HUB_OFFLINE="1")
    assert offline["error"].startswith("'sets/inside' is not in the cache of the Hugging Face Hub")
    (closed,) = fetch(["sets/inside"], "http://127.0.0.1:9", tmp_path)
    assert closed["error"].startswith("'sets/inside' could not be downloaded from http://127.0.0.1")
