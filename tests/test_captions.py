"""Captions: each source and what it refuses, and the texts that are trained for one caption."""

import json
import os
import subprocess
import sys
from collections import Counter
from itertools import permutations
from pathlib import Path
from random import Random

import pytest
import torch
from atelier.trainers.caption_variants import caption_text, caption_variants, choose_text
from atelier.trainers.captions import CaptionSettings, read_captions
from scipy.stats import chisquare

NAMES = (
    "cat.png",
    "two words.jpg",
    "猫.png",
    "кот.webp",
    "Ä_ß.png",
    "قطة.png",
    "a.b.c.png",
    "😺.bmp",
)
WORDS = " ".join(["word"] * 10_000)


def write(folder: Path, files: dict[str, str | bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)


def read(
    folder: Path, *names: str, root: Path | None = None, **settings: object
) -> tuple[list[tuple[str, ...]], list[str]]:
    """Of pictures that need not be there: captions are read without them."""
    return read_captions([folder / name for name in names], CaptionSettings(**settings), root)


def refusal(folder: Path, *names: str, **settings: object) -> str:
    with pytest.raises(ValueError, match=r"\.$") as caught:
        read(folder, *names, **settings)
    return str(caught.value).replace(str(folder), "F")


# Text files


@pytest.mark.parametrize("name", NAMES)
def test_a_text_file_of_any_name_is_read(tmp_path: Path, name: str) -> None:
    write(tmp_path, {f"{name.rpartition('.')[0]}.txt": f"of {name}"})
    assert read(tmp_path, name) == ([(f"of {name}",)], [])


@pytest.mark.parametrize(
    ("data", "one", "each"),
    [
        (b"a cat", ("a cat",), ("a cat",)),
        (b"\xef\xbb\xbfa cat", ("a cat",), ("a cat",)),
        (b"a cat\r\na dog\r\n", ("a cat\r\na dog",), ("a cat", "a dog")),
        (b"\n a cat \n\n \na dog", ("a cat \n\n \na dog",), ("a cat", "a dog")),
        (b"a\na", ("a\na",), ("a", "a")),
        (b"", ("",), ("",)),
        (b" \n\n", ("",), ("",)),
        (WORDS.encode(), (WORDS,), (WORDS,)),
        ("ein Kätzchen\n猫".encode(), ("ein Kätzchen\n猫",), ("ein Kätzchen", "猫")),
    ],
)
def test_a_text_file_is_one_caption_or_one_per_line(
    tmp_path: Path, data: bytes, one: tuple[str, ...], each: tuple[str, ...]
) -> None:
    write(tmp_path, {"cat.txt": data})
    assert read(tmp_path, "cat.png") == ([one], [])
    assert read(tmp_path, "cat.png", lines="each") == ([each], [])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "The picture F/cat.png has no caption file cat.txt. Write one, or let missing "
        "captions be the file name or empty."),
        *(
            (data, "The caption F/cat.txt is not UTF-8 text. Save it as UTF-8.")
            for data in (b"a\0b", b"K\xe4tzchen", "a cat".encode("utf-16"),
                         "a cat".encode("utf-16-le"))
        ),
    ],
)  # fmt: skip
def test_text_files_are_refused_by_name(tmp_path: Path, data: bytes | None, message: str) -> None:
    write(tmp_path, {} if data is None else {"cat.txt": data})
    assert refusal(tmp_path, "cat.png") == message


def test_a_folder_in_place_of_a_text_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cat.txt").mkdir()
    assert refusal(tmp_path, "cat.png").startswith("Cannot read the file F/cat.txt: ")


def test_pictures_that_share_a_text_file_are_named(tmp_path: Path) -> None:
    write(tmp_path, {"cat.txt": "a cat", "dog.txt": "a dog"})
    assert read(tmp_path, "cat.jpg", "cat.png", "dog.png") == (
        [("a cat",), ("a cat",), ("a dog",)],
        ["Pictures that share a caption file: cat.jpg, cat.png."],
    )


# File names, one prompt, and what is missing


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("a_red_cat.png", "a red cat"),
        ("_cat_.png", "cat"),
        ("a.b.png", "a.b"),
        ("红_猫.png", "红 猫"),
        ("two words.png", "two words"),
    ],
)
def test_a_file_name_is_a_caption(tmp_path: Path, name: str, caption: str) -> None:
    assert read(tmp_path, name, source="file name") == ([(caption,)], [])
    assert read(tmp_path, name, missing="file name") == ([(caption,)], [])
    assert read(tmp_path, name, missing="empty") == ([("",)], [])


@pytest.mark.parametrize("settings", [{"source": "file name"}, {"missing": "file name"}])
def test_a_name_that_is_not_utf_8_is_no_caption(tmp_path: Path, settings: dict[str, str]) -> None:
    """Python gives the byte 0xFF of such a name as the lone surrogate U+DCFF."""
    assert refusal(tmp_path, "cat\udcff.png", **settings).endswith(
        "cat\\udcff.png' is not UTF-8 and cannot be a caption. Rename the picture."
    )


def test_one_prompt_is_the_caption_of_all(tmp_path: Path) -> None:
    settings = {"source": "instance prompt", "instance_prompt": " a cat\n"}
    assert read(tmp_path, "a.png", "b.png", **settings) == ([("a cat",)] * 2, [])


def test_a_mark_for_a_trigger_that_is_not_set_is_told(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": "[trigger] on a hill", "b.txt": "a dog"})
    warning = "Captions hold [trigger], but there is no trigger word: a.png."
    assert read(tmp_path, "a.png", "b.png")[1] == [warning]
    assert read(tmp_path, "a.png", "b.png", trigger="sks")[1] == []


# Metadata files


def jsonl(*rows: object) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def parquet(folder: Path, columns: dict[str, list]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(
        pyarrow.table(columns), folder / "metadata.parquet"
    )


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_metadata_file_gives_each_picture_its_caption(tmp_path: Path, kind: str) -> None:
    texts = [f'of "{name}",\na 😺' for name in NAMES]
    if kind == "jsonl":
        rows = [{"text": text, "file_name": name} for name, text in zip(NAMES, texts, strict=True)]
        write(tmp_path, {"metadata.jsonl": jsonl(*rows)})
    elif kind == "csv":
        lines = [f'"of ""{name}"",\na 😺",x,{name}\r\n' for name in NAMES]
        write(tmp_path, {"metadata.csv": "\ufefftext,other,file_name\r\n\r\n" + "".join(lines)})
    else:
        parquet(tmp_path, {"text": texts, "x": [1] * len(texts), "file_name": list(NAMES)})
    captions, warnings = read(tmp_path, *reversed(NAMES), source="metadata file")
    assert captions == [(text,) for text in reversed(texts)]
    assert warnings == []


@pytest.mark.parametrize(
    ("row", "column", "captions"),
    [
        ({"text": "a", "caption": "b"}, "", ("a",)),
        ({"caption": "b"}, "", ("b",)),
        ({"text": "a", "caption": "b", "long": "c"}, "long", ("c",)),
        ({"text": ["a ", "", "b"]}, "", ("a", "b")),
        ({"text": ""}, "", ("",)),
        ({"text": [" "]}, "", ("",)),
        ({"text": WORDS}, "", (WORDS,)),
        ({"text": "a\u2028b"}, "", ("a\u2028b",)),
    ],
)
def test_a_column_holds_one_caption_or_several(
    tmp_path: Path, row: dict, column: str, captions: tuple[str, ...]
) -> None:
    data = "\ufeff" + jsonl({"file_name": "a.png", **row}).replace("\n", "\r\n\r\n")
    write(tmp_path, {"metadata.jsonl": data})
    assert read(tmp_path, "a.png", source="metadata file", column=column) == ([captions], [])


def test_a_line_break_in_a_csv_value_stays_as_it_is(tmp_path: Path) -> None:
    write(tmp_path, {"metadata.csv": 'file_name,text\r\na.png,"x\r\ny"\r\n'})
    assert read(tmp_path, "a.png", source="metadata file") == ([("x\r\ny",)], [])


def test_a_list_column_of_a_parquet_file_is_several_captions(tmp_path: Path) -> None:
    parquet(tmp_path, {"file_name": ["a.png", "b.png"], "text": [["x", "y"], ["z"]]})
    captions, _ = read(tmp_path, "b.png", "a.png", source="metadata file")
    assert captions == [("z",), ("x", "y")]


@pytest.mark.parametrize("value", [None, []])
def test_an_entry_without_a_text_is_a_missing_caption(tmp_path: Path, value: object) -> None:
    write(tmp_path, {"metadata.jsonl": jsonl({"file_name": "a_b.png", "text": value})})
    settings = {"source": "metadata file"}
    assert refusal(tmp_path, "a_b.png", **settings).startswith("The picture F/a_b.png has no capt")
    assert read(tmp_path, "a_b.png", **settings, missing="file name") == ([("a b",)], [])


def test_entries_without_a_picture_are_told(tmp_path: Path) -> None:
    rows = [{"file_name": f"{name}.png", "text": name} for name in "abcdef"]
    write(tmp_path, {"metadata.jsonl": jsonl(*rows)})
    captions, (warning,) = read(tmp_path, "b.png", source="metadata file")
    assert captions == [("b",)]
    path = tmp_path / "metadata.jsonl"
    assert warning == f"Entries of {path} without a picture: a.png, c.png, d.png and 2 more."


def test_each_folder_has_the_nearest_metadata_file_up_to_the_root(tmp_path: Path) -> None:
    def row(name: str) -> str:
        return jsonl({"file_name": name, "text": "from the root"})

    write(tmp_path, {"metadata.jsonl": row("never.png")})
    write(tmp_path, {"set/metadata.jsonl": row("a/1.png") + row("b\\.\\2.png")})
    write(tmp_path, {"set/c/metadata.csv": "file_name,text\n./3.png,own"})
    names = ("set/a/1.png", "set/b/2.png", "set/c/3.png")
    settings = {"source": "metadata file", "root": tmp_path / "set"}
    assert read(tmp_path, *names, **settings) == (
        [("from the root",), ("from the root",), ("own",)],
        [],
    )
    settings["root"] = tmp_path / "set" / "c"
    assert refusal(tmp_path, *names, **settings).startswith("The folder F/set/")


GOOD = jsonl({"file_name": "b.png", "text": "b"})


def json_row(**columns: object) -> str:
    return GOOD + jsonl({"file_name": "a.png", **columns})


MUST_BE_PATH = (
    "It must be the path of a picture below the folder of that file, such as cat.png or "
    "cats/cat.png."
)
NOT_JSON = (
    "Line 2 of F/metadata.jsonl is not a JSON object. Every line must be one, with file_name and "
    "text."
)
NO_TEXT = "in the column text. Write a text there, or a list of texts."
QUOTES = "Put texts that contain commas into double quotes."

BAD_METADATA = [
    ("jsonl", GOOD + '{"file_name": ', NOT_JSON),
    ("jsonl", GOOD + '["a.png", "a"]', NOT_JSON),
    ("jsonl", GOOD + "[" * 100_000, NOT_JSON),
    ("jsonl", GOOD.encode() + b"\xff", "Line 2 of F/metadata.jsonl is not UTF-8 text. Save the "
     "file as UTF-8."),
    ("jsonl", GOOD.encode() + b"\n\0", "Line 3 of F/metadata.jsonl is not UTF-8 text. Save the "
     "file as UTF-8."),
    ("jsonl", GOOD.encode("utf-16"), "Line 1 of F/metadata.jsonl is not UTF-8 text. Save the file "
     "as UTF-8."),
    ("jsonl", json_row(txt="a"), "Line 2 of F/metadata.jsonl has no column text or caption or "
     "prompt. Its columns: file_name, txt."),
    ("jsonl", GOOD + "{}", "Line 2 of F/metadata.jsonl has no column file_name or image. "
     "Its columns: -."),
    ("jsonl", json_row(text=3), f"Line 2 of F/metadata.jsonl has 3 {NO_TEXT}"),
    ("jsonl", json_row(text=["a", None]), f"Line 2 of F/metadata.jsonl has ['a', None] {NO_TEXT}"),
    ("jsonl", json_row(text="a\0"), f"Line 2 of F/metadata.jsonl has 'a\\x00' {NO_TEXT}"),
    ("jsonl", GOOD + r'{"file_name": "a.png", "text": "\ud800"}',
     f"Line 2 of F/metadata.jsonl has '\\ud800' {NO_TEXT}"),
    ("jsonl", GOOD + "\n" + jsonl({"file_name": "./b.png", "text": "c"}),
     "Line 3 of F/metadata.jsonl names the picture b.png again, after line 1. Keep one of the two; "
     "several captions of a picture are a list of texts in one entry."),
    *(
        ("jsonl", jsonl({"file_name": name, "text": "a"}),
         f"Line 1 of F/metadata.jsonl has the file_name {name!r}. {MUST_BE_PATH}")
        for name in ("../a.png", "x/../../a.png", "..\\a.png", "/a.png", "\\a.png", "C:\\a.png",
                     "c:/a.png", "", ".", None, 3, "a\0.png")
    ),
    ("csv", b"file_name,text\na.png,\xe4\n", "Line 2 of F/metadata.csv is not UTF-8 text. Save the "
     "file as UTF-8."),
    ("csv", "file_name,text\na.png,a, b\n", f"Line 2 of F/metadata.csv has 3 values for 2 columns. "
     f"{QUOTES}"),
    ("csv", 'file_name,text\nb.png,"x\ny"\na.png\n', f"Line 4 of F/metadata.csv has 1 values for 2 "
     f"columns. {QUOTES}"),
    ("csv", "file_name;text\na.png;a\n", "Line 2 of F/metadata.csv has no column file_name or "
     "image. Its columns: file_name;text."),
    ("csv", 'file_name,text\nb.png,b\na.png,"a', "Line 3 of F/metadata.csv is not valid CSV: "
     "unexpected end of data."),
    ("csv", "file_name,text\n", "The picture F/a.png has no caption in metadata.csv. Write one, or "
     "let missing captions be the file name or empty."),
    ("jsonl", GOOD, "The picture F/a.png has no caption in metadata.jsonl. Write one, or let "
     "missing captions be the file name or empty."),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "data", "message"), BAD_METADATA)
def test_bad_metadata_is_refused_with_its_line(
    tmp_path: Path, kind: str, data: str | bytes, message: str
) -> None:
    write(tmp_path, {f"metadata.{kind}": data})
    assert refusal(tmp_path, "a.png", source="metadata file") == message


def test_a_column_that_was_named_must_be_there(tmp_path: Path) -> None:
    write(tmp_path, {"metadata.jsonl": GOOD})
    assert refusal(tmp_path, "b.png", source="metadata file", column="long") == (
        "Line 1 of F/metadata.jsonl has no column long. Its columns: file_name, text."
    )


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"file_name": ["a.png"], "txt": ["a"]}, "Line 1 of F/metadata.parquet has no column text "
         "or caption or prompt. Its columns: file_name, txt."),
        ({"path": ["a.png"], "text": ["a"]}, "Line 1 of F/metadata.parquet has no column "
         "file_name or image. Its columns: path, text."),
        ({"file_name": ["b.png", "a.png"], "text": [1, 2]},
         f"Line 1 of F/metadata.parquet has 1 {NO_TEXT}"),
    ],
)  # fmt: skip
def test_a_parquet_file_with_other_columns_is_refused(
    tmp_path: Path, columns: dict[str, list], message: str
) -> None:
    parquet(tmp_path, columns)
    assert refusal(tmp_path, "a.png", source="metadata file") == message


@pytest.mark.parametrize("part", [0, 8, 100, -20])
def test_a_damaged_parquet_file_is_refused(tmp_path: Path, part: int) -> None:
    parquet(tmp_path, {"file_name": ["a.png"] * 99, "text": ["a"] * 99})
    path = tmp_path / "metadata.parquet"
    path.write_bytes(path.read_bytes()[:part])
    assert refusal(tmp_path, "a.png", source="metadata file") == (
        "The file F/metadata.parquet cannot be read as parquet: it is damaged or another kind of "
        "file. Write it again, or write metadata.jsonl in its place."
    )


def test_text_in_a_parquet_file_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    broken = pyarrow.StringArray.from_buffers(
        1, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0"), pyarrow.py_buffer(b"\xff")
    )
    parquet(tmp_path, {"file_name": ["a.png"], "text": broken})
    assert refusal(tmp_path, "a.png", source="metadata file") == (
        "The file F/metadata.parquet holds text that is not UTF-8."
    )


def test_two_metadata_files_in_a_folder_are_refused(tmp_path: Path) -> None:
    write(tmp_path, {"metadata.jsonl": GOOD, "metadata.csv": "file_name,text\n"})
    assert refusal(tmp_path, "b.png", source="metadata file") == (
        "The folder F holds metadata.jsonl and metadata.csv. Keep only one of them."
    )


def test_a_folder_without_a_metadata_file_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, "b.png", source="metadata file", missing="empty") == (
        "The folder F holds none of metadata.jsonl, metadata.csv, metadata.parquet, metadata.json. "
        "Put one beside the pictures, or choose another source of captions."
    )


@pytest.mark.parametrize("source", ["text file", "metadata file"])
def test_a_hundred_thousand_pictures_are_no_hard_case(tmp_path: Path, source: str) -> None:
    """Each takes seconds; a search through a list for each picture would take half an hour."""
    names = [f"{number:06}.png" for number in range(100_000)]
    rows = [{"file_name": name, "text": name} for name in reversed(names)]
    write(tmp_path, {"metadata.jsonl": jsonl(*rows)})
    captions, warnings = read(tmp_path, *names, source=source, missing="file name")
    expected = names if source == "metadata file" else [name[:-4] for name in names]
    assert captions == [(text,) for text in expected]
    assert warnings == []


# Texts of one caption


@pytest.mark.parametrize(
    ("caption", "settings", "expected"),
    [
        ("a dog", {}, "a dog"),
        ("a dog", {"trigger": " sks "}, "sks, a dog"),
        ("a sks dog", {"trigger": "sks"}, "a sks dog"),
        ("", {"trigger": "sks"}, "sks"),
        ("a [trigger] dog, [trigger]", {"trigger": "sks"}, "a sks dog, sks"),
        ("a [trigger] dog", {}, "a [trigger] dog"),
        ("a dog", {"prefix": "photo of"}, "photo of a dog"),
        ("a dog", {"prefix": "photo of [trigger],", "trigger": "sks"}, "photo of sks, a dog"),
        ("a dog", {"prefix": "photo of", "trigger": "sks"}, "photo of sks, a dog"),
        ("a dog", {"suffix": ", best"}, "a dog, best"),
        ("a dog", {"suffix": "at night "}, "a dog at night"),
        ("狗", {"suffix": "，夜晚"}, "狗，夜晚"),
        ("", {"prefix": "photo", "suffix": "at night"}, "photo at night"),
        ("", {}, ""),
        ("a, ,b", {"separator": "|", "trigger": "sks"}, "sks| a, ,b"),
    ],
)
def test_trigger_prefix_and_suffix_are_put_on(caption: str, settings: dict, expected: str) -> None:
    assert caption_text(caption, CaptionSettings(**settings)) == expected
    assert caption_variants(caption, CaptionSettings(**settings), 0, "r") == (expected,)


def variants(caption: str, **settings: object) -> tuple[str, ...]:
    return caption_variants(caption, CaptionSettings(shuffle=True, **settings), 7, "0123abcd")


def test_variants_are_the_same_in_every_process() -> None:
    """Embeddings are cached by these texts: another order would encode everything again."""
    expected = ("a, b, c, d", "d, b, a, c", "d, c, a, b", "a, d, c, b")
    assert variants("a, b, c, d", variants=4) == expected
    code = (
        "import sys, runpy; sys.path.insert(0, sys.argv[1]); from pack import load_pack; "
        "load_pack(); from atelier.trainers.captions import *; "
        "from atelier.trainers.caption_variants import *; "
        "print(*caption_variants('a, b, c, d', CaptionSettings(shuffle=True, variants=4), 7, "
        "'0123abcd'), sep='|')"
    )
    scripts = Path(__file__).parent.parent / "scripts"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, scripts],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONHASHSEED": "123"},
    )
    assert tuple(done.stdout.strip().split("|")) == expected


def test_variants_depend_on_seed_record_and_caption() -> None:
    settings = CaptionSettings(shuffle=True)
    tags = ", ".join("abcdefgh")
    found = {
        caption_variants(tags, settings, 0, "r"),
        caption_variants(tags, settings, 1, "r"),
        caption_variants(tags, settings, 0, "s"),
    }
    assert len(found) == 3


@pytest.mark.parametrize("seed", range(40))
def test_variants_are_distinct_orders_of_the_same_tags(seed: int) -> None:
    random = Random(seed)
    tags = [random.choice("abcde猫") * random.randint(1, 3) for _ in range(random.randint(0, 7))]
    kept = random.randint(0, 4)
    number = random.choice([1, 2, 8, 1000])
    written = random.choice([",", " , ", ",,", ",\n"]).join(tags)
    texts = variants(written, keep_tokens=kept, variants=number)
    orders = [tuple(text.split(", ")) if text else () for text in texts]
    possible = {(*tags[:kept], *order) for order in permutations(tags[kept:])}
    assert orders[0] == tuple(tags)
    assert set(orders) <= possible
    assert len(orders) == len(set(orders)) == min(number, len(possible))


def test_prefix_and_suffix_stay_outside_and_the_trigger_is_the_first_tag() -> None:
    texts = variants(
        "a, b", trigger="sks", keep_tokens=1, prefix="photo of", suffix=", x, y", variants=9
    )
    assert texts == ("photo of sks, a, b, x, y", "photo of sks, b, a, x, y")
    assert len(variants("a, b", trigger="sks", variants=9)) == 6


def test_other_separators(tmp_path: Path) -> None:
    assert set(variants("a, b | c |", separator="|")) == {"a, b| c", "c| a, b"}
    assert set(variants("a  b", separator=" ")) == {"a b", "b a"}
    assert set(variants("一，二", separator="，")) == {"一， 二", "二， 一"}


def test_a_caption_of_ten_thousand_words_has_variants() -> None:
    words = [f"w{number}" for number in range(10_000)]
    texts = variants(", ".join(words))
    assert len(set(texts)) == 8
    assert all(Counter(text.split(", ")) == Counter(words) for text in texts)


def test_orders_are_equally_likely() -> None:
    settings = CaptionSettings(shuffle=True, variants=2)
    seconds = Counter(caption_variants("a,b,c", settings, 0, str(n))[1] for n in range(5000))
    assert len(seconds) == 5  # all but the unshuffled one
    assert chisquare(list(seconds.values())).pvalue > 0.001


# The draw


TEXTS = (("a",), ("b", "c"), ("d", "e", "f"))
SHARES = {"a": 1 / 3, "b": 1 / 6, "c": 1 / 6, "d": 1 / 9, "e": 1 / 9, "f": 1 / 9}


def draws(number: int, dropout: float, seed: int = 0) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    return [choose_text(TEXTS, dropout, generator) for _ in range(number)]


@pytest.mark.parametrize("dropout", [0, 0.1, 0.75])
def test_captions_and_then_their_variants_are_equally_likely(dropout: float) -> None:
    shares = {text: share * (1 - dropout) for text, share in SHARES.items()}
    shares |= {"": dropout} if dropout else {}
    counts = Counter(draws(20_000, dropout))
    assert counts.keys() == shares.keys()
    expected = [20_000 * share for share in shares.values()]
    assert chisquare([counts[text] for text in shares], expected).pvalue > 0.001


def test_full_dropout_is_always_the_empty_prompt() -> None:
    assert set(draws(1000, 1)) == {""}


def test_the_draw_follows_its_generator_alone() -> None:
    torch.manual_seed(1)
    first = draws(50, 0.5, seed=3)
    torch.manual_seed(2)
    assert draws(50, 0.5, seed=3) == first
    assert draws(50, 0.5, seed=4) != first


def test_dropout_changes_no_other_draw() -> None:
    """Three numbers are drawn whatever comes out, so the samples that keep a text keep the same."""
    pairs = list(zip(draws(500, 0.3), draws(500, 0), strict=True))
    assert all(some in ("", every) for some, every in pairs)
    assert 100 < sum(some == "" for some, _ in pairs) < 200


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "txt"}, "Unknown source of captions 'txt'. Choose one of: text file, file "
         "name, instance prompt, metadata file."),
        ({"source": "instance prompt", "instance_prompt": " "}, "The instance prompt is empty. "
         "Write one, or choose another source of captions."),
        ({"lines": "all"}, "The lines of a caption file must be one of one, each, "
         "first, got 'all'."),
        ({"missing": "skip"}, "missing_captions must be one of error, file name, empty, got "
         "'skip'."),
        ({"separator": ""}, "The separator of tags is empty. A comma is usual."),
        ({"keep_tokens": -1}, "The number of tags that keep their place must not be negative, got "
         "-1."),
        *(
            ({"dropout": value}, f"The caption dropout must be between 0 and 1, got {value}. 0.1 "
             "leaves out every tenth caption.")
            for value in (-0.1, 1.5, float("nan"))
        ),
        *(
            ({"variants": value}, f"The number of caption variants must be between 1 and 1000, got "
             f"{value}. 8 is usual.")
            for value in (0, 1001)
        ),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=r"\.$") as caught:
        CaptionSettings(**settings)
    assert str(caught.value) == message
