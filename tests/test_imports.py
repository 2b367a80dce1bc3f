"""Dataset configurations of other trainers, written as their documentation shows them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from atelier.trainers.config import Schedule
from atelier.trainers.dataset import Dataset
from atelier.trainers.import_dataset import imported_files, plan_import, read_import
from atelier.trainers.import_settings import Places, Plan
from PIL import Image


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The folder input/ with the folders of pictures that the configurations name."""
    root = tmp_path / "input"
    for folder in ("cats", "dogs", "reg"):
        for name in ("a_one", "b_two"):
            add(root / folder / f"{name}.png", f"{name} of {folder}, red, round")
    return root


def add(path: Path, caption: str | None = None, size: tuple[int, int] = (96, 64)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")


def plan(root: Path, name: str, text: str | list | dict) -> Plan:
    path = root / name
    path.write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")
    return plan_import(Places(config=path, roots=(root,)))


def read(root: Path, name: str, text: str | list | dict) -> Dataset:
    return read_import(plan(root, name, text))


def refusal(root: Path, name: str, text: str | list | dict) -> str:
    with pytest.raises(ValueError, match=r"\.$") as caught:
        read(root, name, text)
    return str(caught.value).replace(str(root), "R")


def texts(dataset: Dataset) -> list[tuple[str, ...]]:
    """The captions of each record in their own order of tags."""
    records = (record for subset in dataset.subsets for record in subset.records)
    return [tuple(variants[0] for variants in record.texts) for record in records]


KOHYA = """
[general]
shuffle_caption = true
caption_extension = '.txt'
keep_tokens = 1

[[datasets]]
resolution = 512
batch_size = 4
keep_tokens = 2

  [[datasets.subsets]]
  image_dir = 'cats'
  class_tokens = 'sks cat'

  [[datasets.subsets]]
  image_dir = 'dogs'
  keep_tokens = 3
  num_repeats = 10
  flip_aug = true
  random_crop = true
  caption_dropout_rate = 0.1
  caption_prefix = "best quality,"
  caption_suffix = ", from side"

  [[datasets.subsets]]
  is_reg = true
  image_dir = 'reg'
  shuffle_caption = false

[[datasets]]
resolution = [768, 512]
enable_bucket = true
min_bucket_reso = 256
max_bucket_reso = 1024
bucket_reso_steps = 64

  [[datasets.subsets]]
  image_dir = 'cats'
"""


def test_kohyas_settings_are_inherited_from_dataset_and_general(root: Path) -> None:
    cats, dogs, reg, large = read(root, "kohya.toml", KOHYA).subsets
    assert [subset.name for subset in (cats, dogs, reg, large)] == ["cats", "dogs", "reg", "cats"]
    assert [subset.captions.shuffle for subset in (cats, dogs, reg, large)] == [True] * 2 + [
        False,
        True,
    ]
    assert [subset.captions.keep_tokens for subset in (cats, dogs, large)] == [2, 2, 1]
    assert [subset.is_prior for subset in (cats, dogs, reg, large)] == [0, 0, 1, 0]
    assert [subset.num_samples for subset in (cats, dogs)] == [2, 20]
    assert (dogs.pictures.flip, dogs.pictures.crop, dogs.captions.dropout) == (True, "random", 0.1)
    assert cats.captions.default == "sks cat"
    shapes = [(s.resolution.mode, s.resolution.width, s.resolution.height) for s in (cats, large)]
    assert shapes == [("fixed", 512, 512), ("buckets", 768, 512)]
    # The longest bucket of 768 x 512 pixels with no side above 1024 is 1024 x 384.
    assert large.resolution.max_aspect == pytest.approx(1024 / 384)
    assert large.resolution.size_for(4000, 100) == (1024, 384)


def test_kohyas_prefix_and_suffix_stand_around_the_shuffled_tags(root: Path) -> None:
    dogs = read(root, "kohya.toml", KOHYA).subsets[1]
    (variants,) = dogs.records[0].texts
    assert variants[0] == "best quality, a_one of dogs, red, round, from side"
    # keep_tokens = 3 keeps, with the prefix, two tags of the caption: one is left to shuffle.
    assert len(variants) == 1


def test_what_kohya_has_besides_is_listed(root: Path) -> None:
    notes = plan(root, "kohya.toml", KOHYA + "color_aug = true\nflip_agu = true\n").notes
    assert "batch_size = 4 (dataset 1): this is an input of Train LoRA." in notes
    assert "flip_agu = True (dataset 2, subset 1): this setting is not known here." in notes
    assert any(note.startswith("color_aug = True (dataset 2, subset 1): ") for note in notes)
    assert any(note.startswith("is_reg = True (dataset 1, subset 3): ") for note in notes)
    assert any("caption_suffix = ', from side' (dataset 1, subset 2)" in note for note in notes)


def test_kohyas_masks_extensions_and_missing_captions(root: Path) -> None:
    add(root / "masks" / "a_one.png")
    add(root / "masks" / "b_two.png")
    (root / "cats" / "a_one.caption").write_text("the first line\nanother", encoding="utf-8")
    config = """
[[datasets]]
resolution = 64
enable_bucket = true
bucket_no_upscale = true
  [[datasets.subsets]]
  image_dir = "cats"
  class_tokens = "a cat"
  conditioning_data_dir = "masks"
  [[datasets.subsets]]
  image_dir = "dogs"
  alpha_mask = true
  caption_extension = ".txt"
"""
    dataset = read(root, "kohya.toml", config)
    masked, _ = dataset.subsets
    assert texts(dataset)[:2] == [("the first line",), ("a cat",)]
    paths = [Path(record.mask.path) for record in masked.records if record.mask]
    assert paths == [root / "masks" / "a_one.png", root / "masks" / "b_two.png"]
    assert (masked.resolution.mode, masked.resolution.upscale) == ("preserved", False)


def test_kohyas_metadata_file_has_the_captions(root: Path) -> None:
    metadata = {
        "/home/someone/cats/a_one.png": {"caption": "a cat\nanother cat", "tags": "red, round"},
        "b_two": {"tags": "blue"},
    }
    (root / "meta.json").write_text(json.dumps(metadata), encoding="utf-8")
    config = """
[[datasets]]
resolution = [512, 512]
  [[datasets.subsets]]
  image_dir = "cats"
  metadata_file = "meta.json"
  enable_wildcard = true
"""
    assert texts(read(root, "kohya.toml", config)) == [
        ("a cat, red, round", "another cat, red, round"),
        ("blue",),
    ]


def test_a_subset_of_kohya_that_stands_twice_counts_once(root: Path) -> None:
    twice = "[[datasets]]\nresolution = 64\n" + 2 * "[[datasets.subsets]]\nimage_dir = 'cats'\n"
    twice = twice.replace("'cats'\n", "'cats'\ncaption_extension = '.txt'\n")
    found = plan(root, "kohya.toml", twice)
    assert len(found.folders) == 1
    assert found.notes == (
        "image_dir = 'cats' (dataset 1, subset 2): it stands in this dataset before, and counts "
        "once.",
    )


AI_TOOLKIT = """
---
job: extension
config:
  name: "my_lora"
  process:
    - type: 'sd_trainer'
      trigger_word: "p3r5on"
      network: {type: "lora", linear: 16}
      datasets:
        - folder_path: "cats"
          mask_path: "masks"
          mask_min_value: 0.1
          caption_ext: "txt"
          caption_dropout_rate: 0.05  # 5% of the time
          shuffle_tokens: false
          cache_latents_to_disk: true
          resolution: [ 512, 768, 1024 ]
          num_repeats: 3
        - folder_path: "reg"
          is_reg: true
          default_caption: "a person"
          caption_ext: caption
          flip_x: true
          buckets: false
          num_frames: 1
          controls: []
"""


def test_ai_toolkits_datasets_come_at_each_of_their_sizes(root: Path) -> None:
    for name in ("a_one", "b_two"):
        add(root / "masks" / f"{name}.png")
    dataset = read(root, "job.yaml", AI_TOOLKIT)
    shown = [
        (s.name, s.resolution.width, s.resolution.mode, s.num_samples) for s in dataset.subsets
    ]
    assert shown == [
        ("cats", 512, "preserved", 6),
        ("cats", 768, "preserved", 6),
        ("cats", 1024, "preserved", 6),
        ("reg", 512, "square", 4),  # the mirrored pictures come besides
    ]
    cats, reg = dataset.subsets[0], dataset.subsets[3]
    assert not cats.resolution.upscale
    assert all(record.mask for record in cats.records)
    assert cats.captions.dropout == 0.05
    assert (reg.is_prior, reg.is_regularization, reg.pictures.flip) == (True, False, True)
    assert texts(dataset)[0] == ("p3r5on, a_one of cats, red, round",)
    assert texts(dataset)[-1] == ("a person",)


def test_ai_toolkits_control_pictures_are_references(root: Path) -> None:
    """Its Kontext example has such a dataset."""
    for name in ("a_one", "b_two"):
        add(root / "before" / f"{name}.png")
    (subset,) = read(root, "part.json", [{"folder_path": "cats", "control_path": "before"}]).subsets
    paths = [Path(record.reference.path) for record in subset.records if record.reference]
    assert paths == [root / "before" / f"{name}.png" for name in ("a_one", "b_two")]


def test_what_ai_toolkit_has_besides_is_listed(root: Path) -> None:
    (root / "masks").mkdir()
    notes = plan(root, "job.yaml", AI_TOOLKIT.replace("is_reg", "unheard_of: 3\n          is_reg"))
    shown = "\n".join(notes.notes)
    assert "mask_min_value = 0.1 (dataset 1): set unmasked_weight of Preservation" in shown
    assert "cache_latents_to_disk = True (dataset 1): " in shown
    assert "unheard_of = 3 (dataset 2): this setting is not known here." in shown
    assert "flip_x = True (dataset 2): " in shown
    assert "num_frames" not in shown
    assert "controls" not in shown


@pytest.mark.parametrize("is_part", [True, False])
def test_a_part_of_ai_toolkits_job_is_enough(root: Path, is_part: bool) -> None:
    datasets = [{"folder_path": "cats", "alpha_mask": True, "trigger_word": "sks"}]
    (subset,) = read(root, "part.json", {"datasets": datasets} if is_part else datasets).subsets
    assert subset.resolution.width == 512
    assert subset.captions.trigger == "sks"
    assert subset.captions.extension == ".txt"


def test_ai_toolkit_reads_subfolders(root: Path) -> None:
    add(root / "cats" / "more" / "c.png", "below")
    dataset = read(root, "part.yaml", "datasets: [{folder_path: cats}]")
    assert texts(dataset)[-1] == ("below",)


def backend(**settings: Any) -> dict[str, Any]:
    """A backend as in SimpleTuner's first example."""
    common = {"type": "local", "instance_data_dir": "cats", "caption_strategy": "textfile"}
    shape = {"crop": True, "crop_style": "center", "crop_aspect": "square", "resolution": 1024}
    limits = {"minimum_image_size": 0, "resolution_type": "pixel_area", "repeats": 0}
    return {**common, **shape, **limits, **settings}


TEXTS = {"id": "texts", "dataset_type": "text_embeds", "default": True, "type": "local"}


def test_simpletuners_repeats_come_besides_the_first_time(root: Path) -> None:
    config = [backend(id="a"), backend(id="b", repeats=9, instance_data_dir="dogs"), TEXTS]
    assert [s.num_samples for s in read(root, "backends.json", config).subsets] == [2, 20]


@pytest.mark.parametrize(
    ("settings", "mode", "side"),
    [
        ({"crop": False}, "preserved", 1024),
        ({"crop_aspect": "preserve"}, "preserved", 1024),
        ({"crop_aspect": "closest", "crop_aspect_buckets": [0.5, 1.0, 1.5]}, "buckets", 1024),
        ({"crop_aspect": "random", "crop_aspect_buckets": [1.0, 0.75]}, "random", 1024),
        ({"resolution": 1.05, "resolution_type": "area"}, "square", 1024),
        ({"resolution": 0.25, "resolution_type": "area"}, "square", 496),  # 500 is no multiple
        ({"resolution": 512, "resolution_type": "pixel"}, "square", 512),
    ],
)
def test_simpletuners_sizes(root: Path, settings: dict, mode: str, side: int) -> None:
    (subset,) = read(root, "backends.json", [backend(id="a", **settings), TEXTS]).subsets
    found = subset.resolution
    assert (found.mode, found.width, found.height) == (mode, side, side)
    if "crop_aspect_buckets" in settings:
        assert found.max_aspect == pytest.approx(2 if mode == "buckets" else 1 / 0.75)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"resolution_type": "pixel", "minimum_image_size": 512, "resolution": 512}, ["large"]),
        ({"resolution_type": "pixel_area", "minimum_image_size": 512}, ["large", "wide"]),
        ({"resolution_type": "area", "minimum_image_size": 0.262144, "resolution": 1.0},
         ["large", "wide"]),
        ({"minimum_aspect_ratio": 1.0, "maximum_aspect_ratio": 2.0}, ["large", "small"]),
    ],
)  # fmt: skip
def test_simpletuners_limits_leave_pictures_out(root: Path, settings: dict, kept: list) -> None:
    folder = root / "sizes"
    add(folder / "large.png", "large", (512, 512))
    add(folder / "small.png", "small", (100, 80))
    add(folder / "wide.png", "wide", (1040, 256))
    dataset = read(root, "b.json", [backend(id="a", instance_data_dir="sizes", **settings)])
    assert [name for (name,) in texts(dataset)] == kept
    assert any("Left out by the settings of the dataset" in text for text in dataset.warnings)


def test_simpletuners_captions(root: Path) -> None:
    path = root / "cats" / "a_one.txt"
    path.write_text("one\ntwo, red", encoding="utf-8")
    shuffle = {"enable": True, "count": 3, "seed": 42, "split_on": "comma", "position_start": 1}
    config = [
        backend(id="lines", prepend_instance_prompt=True, instance_prompt="sks"),
        backend(id="whole", disable_multiline_split=True),
        backend(id="name", caption_strategy="filename"),
        backend(id="prompt", caption_strategy="instanceprompt", instance_prompt="a sks cat"),
        backend(id="only", only_instance_prompt=True, instance_prompt="the cat"),
        backend(id="tags", instance_data_dir="dogs", caption_shuffle=shuffle),
    ]
    dataset = read(root, "backends.json", config)
    assert texts(dataset)[:10:2] == [
        ("sks one", "sks two, red"),
        ("one\ntwo, red",),
        ("a one",),
        ("a sks cat",),
        ("the cat",),
    ]
    tags = dataset.subsets[-1]
    assert (tags.captions.keep_tokens, tags.captions.variants) == (1, 4)
    assert [len(record.texts[0]) for record in tags.records] == [2, 2]  # of two loose tags


def test_simpletuners_parquet_of_captions(root: Path) -> None:
    for number in (1, 2):
        add(root / "bucket" / f"{number}.png")
    columns = {"id": [1, 2], "cogvlm": ["a cat", None], "tags": ["x", "red, round"]}
    pyarrow.parquet.write_table(pyarrow.table(columns), root / "bucket.parquet")
    table = {"path": "bucket.parquet", "filename_column": "id", "caption_column": "cogvlm"}
    table |= {"fallback_caption_column": "tags", "width_column": "width"}
    settings = {"caption_strategy": "parquet", "metadata_backend": "parquet", "parquet": table}
    config = [backend(id="a", instance_data_dir="bucket", **settings)]
    assert texts(read(root, "backends.json", config)) == [("a cat",), ("red, round",)]
    assert root / "bucket.parquet" in imported_files(plan(root, "backends.json", config))


def test_simpletuners_masks_schedules_and_regularization(root: Path) -> None:
    for name in ("a_one", "b_two"):
        add(root / "masks" / f"{name}.png")
    mask = {"id": "masks", "type": "local", "dataset_type": "conditioning"}
    mask |= {"conditioning_type": "mask", "instance_data_dir": "masks"}
    config = [
        backend(id="subject", conditioning_data="masks", probability=0.5),
        mask,
        backend(id="reg", instance_data_dir="reg", is_regularisation_data=True, repeats=1),
        backend(id="late", instance_data_dir="dogs", start_step=300),
    ]
    subject, reg, late = read(root, "backends.json", config).subsets
    assert [Path(r.mask.path).parent.name for r in subject.records if r.mask] == ["masks"] * 2
    assert [s.is_regularization for s in (subject, reg, late)] == [False, True, False]
    # A picture of the subject comes half as often as one of the others: 2, 4 and 2 of 8 samples.
    assert [s.schedule for s in (subject, reg, late)] == [
        Schedule(probability=0.125),
        Schedule(probability=0.5),
        Schedule(probability=0.25, start_step=300),
    ]


def test_simpletuners_equal_probabilities_are_none(root: Path) -> None:
    config = [backend(id="a", probability=1.0), backend(id="b", start_step=1)]
    assert [s.schedule for s in read(root, "b.json", config).subsets] == [Schedule(), Schedule()]


def test_what_simpletuner_has_besides_is_listed(root: Path) -> None:
    settings = {"cache_dir_vae": "cache/vae", "crop_style": "face", "max_num_samples": 10}
    sizes = {"maximum_image_size": 1536, "target_downsample_size": 1280}
    config = [
        backend(id="a", **settings, **sizes),
        backend(id="off", disabled=True),
        backend(id="film", dataset_type="video"),
        backend(id="bucket", type="aws"),
        TEXTS,
    ]
    found = plan(root, "backends.json", config)
    assert len(found.folders) == 1
    shown = "\n".join(found.notes)
    assert "cache_dir_vae = 'cache/vae' (a); dataset_type = 'text_embeds' (texts): Cache " in shown
    assert "crop_style = 'face' (a): faces are not looked for." in shown
    assert "max_num_samples = 10 (a): all pictures" in shown
    assert "maximum_image_size = 1536 (a); target_downsample_size = 1280 (a): " in shown
    assert "disabled = True (off): it is left out." in shown
    assert "dataset_type = 'video' (film): only pictures are trained." in shown
    assert "type = 'aws' (bucket): it is left out, since" in shown


OUTSIDE = "lies outside of the folders that may be read. Move it below input/ and write its path"
SUBSET = "[[datasets]]\nresolution = {}\n[[datasets.subsets]]\nimage_dir = '{}'\n{}"
FORMS = "no dataset configuration that is known"
BOMB = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{'*a%d, ' % (i - 1) * 9}]\n" for i in range(1, 12))  # noqa: UP031

BAD = [
    ("a.toml", SUBSET.format(512, "../other", ""), OUTSIDE),
    ("a.toml", SUBSET.format(512, "/etc", ""), OUTSIDE),
    ("a.toml", SUBSET.format(512, "C:\\hoge", ""), OUTSIDE),
    ("a.toml", SUBSET.format(512, "~/pictures", ""), OUTSIDE),
    ("a.toml", SUBSET.format(512, "link", ""), OUTSIDE),
    ("a.toml", SUBSET.format(512, "none", ""), "The folder 'none', which a.toml names, is"),
    ("a.toml", SUBSET.format("'512'", "cats", ""), "The setting resolution (dataset 1) in R/a.toml "
     "must be a number of pixels or a list of width and height, got '512'."),
    ("a.toml", SUBSET.format(99999, "cats", ""), "must be a size of 64 to 8192 pixels, got 99999."),
    ("a.toml", SUBSET.format(512, "cats", "num_repeats = 0"), "must be 1 or more, got 0."),
    ("a.toml", SUBSET.format(512, "cats", "num_repeats = '3'"), "must be a whole number, got '3'."),
    ("a.toml", SUBSET.format(512, "cats", "flip_aug = 1"), "must be true or false, got 1."),
    ("a.toml", SUBSET.format(512, "cats", "caption_dropout_rate = 3"), "dropout must be between 0"),
    ("a.toml", SUBSET.format(512, "cats", "caption_extension = '/../x'"), "must start with a dot"),
    ("a.toml", SUBSET.format(512, "cats", ""), "has no caption file a_one.caption."),
    ("a.toml", SUBSET.format(512, "cats", "metadata_file = 'cats/a_one.txt'"), "is no metadata of"),
    ("a.toml", "[[datasets]\n", "The file R/a.toml is not valid TOML: "),
    ("a.toml", "[[datasets]]\nresolution = 512\n", FORMS),
    ("a.toml", "general = 3\n" + SUBSET.format(512, "cats", ""), "a section of settings, got 3."),
    ("a.yaml", "a: [1, 2", "The file R/a.yaml is not valid YAML: "),
    ("a.yaml", "!!python/object/apply:os.system ['echo']", "The file R/a.yaml is not valid YAML: "),
    ("a.yaml", "a: 2020-13-45", "The file R/a.yaml is not valid YAML: "),
    ("a.yaml", BOMB, FORMS),
    ("a.yaml", BOMB + "datasets: [{folder_path: cats, resolution: *a11}]", "of them, got [["),
    ("a.yaml", "[" * 2000, "nested too deeply"),
    ("a.yaml", "x" * 2_000_000, "a configuration at most"),
    ("a.yaml", "datasets: [{folder_path: ''}]", "There is no folder_path (dataset 1)"),
    ("a.yaml", "datasets: [{folder_path: cats}, 3]", "must be a section of settings, got 3."),
    ("a.yaml", "datasets: [{folder_path: cats, mask_path: /masks}]", OUTSIDE),
    ("a.yaml", "datasets: [{folder_path: cats, invert_mask: true}]", "invert_mask (dataset 1)"),
    ("a.yaml", "datasets: [{folder_path: cats, caption_dropout_rate: .nan}]", "a number, got nan."),
    ("a.json", "{", "The file R/a.json is not valid JSON: "),
    ("a.json", "[" * 100_000, "nested too deeply"),
    ("a.json", [TEXTS], "names no folder of pictures to train on. dataset_type = "),
    ("a.json", [backend(id="a"), backend(id="a")], "Two backends of R/a.json have the id 'a'."),
    ("a.json", [backend(id="a", repeats=-1)], "must be 0 or more, got -1."),
    ("a.json", [backend(id="a", crop_aspect="round")], "square, preserve, closest or random, got"),
    ("a.json", [backend(id="a", caption_strategy="csv")], "(a) in R/a.json must be textfile"),
    ("a.json", [backend(id="a", caption_strategy="instanceprompt")], "The instance prompt is"),
    ("a.json", [backend(id="a", minimum_image_size=500)], "leave out all pictures of R/cats."),
    ("a.json", [backend(id="a", caption_strategy="parquet")], "(a, parquet) in R/a.json must be "
     "the path of a .parquet or .jsonl file, got None."),
    ("a.json", [backend(id="a", caption_strategy="parquet", parquet={"path": "cats/a_one.png"})],
     "The file R/cats/a_one.png cannot be read as parquet"),
    ("a.txt", "x", "is not TOML, YAML or JSON by its name."),
]  # fmt: skip


@pytest.mark.parametrize(("name", "config", "message"), BAD, ids=[bad[2][:40] for bad in BAD])
def test_what_cannot_be_imported_is_a_sentence(
    root: Path, name: str, config: Any, message: str
) -> None:
    (root.parent / "other").mkdir()
    add(root.parent / "other" / "a.png", "a")
    (root / "link").symlink_to(root.parent / "other")
    found = refusal(root, name, config)
    assert message in found
    assert len(found) < 1000


def test_folders_of_other_roots_and_beside_the_file_are_found(root: Path) -> None:
    other = root.parent / "other"
    add(other / "birds" / "a.png", "a bird")
    add(root / "sets" / "near" / "b.png", "near")
    path = root / "sets" / "config.yaml"
    names = ["near", "birds", str(other / "birds")]
    path.write_text(json.dumps([{"folder_path": name} for name in names]), encoding="utf-8")
    found = plan_import(Places(config=path, roots=(root, other)))
    expected = [root / "sets" / "near", other / "birds", other / "birds"]
    assert [folder.folder for folder in found.folders] == expected


def test_aspects_without_a_limit_are_not_cropped(root: Path) -> None:
    (subset,) = read(root, "a.yaml", "datasets: [{folder_path: cats, resolution: 1024}]").subsets
    width, height = subset.resolution.size_for(8000, 1000)
    assert math.isclose(width / height, 8, rel_tol=0.05)
