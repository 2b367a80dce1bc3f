"""Import Dataset and Hub Dataset in ComfyUI's own executor, in this process."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import executor
import folder_paths
import pyarrow
import pyarrow.parquet
import pytest
from atelier.nodes import folders
from atelier.nodes.importers import HubDataset, ImportDataset
from atelier.nodes.settings import CaptionSettingsNode
from atelier.trainers.clearing import clear_caches
from executor import Runner
from PIL import Image

NODES = [ImportDataset, HubDataset, CaptionSettingsNode]
CONFIG = [{"folder_path": "cats", "resolution": [64, 128], "num_repeats": 3, "flip_y": True}]


@pytest.fixture
def runner(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    import nodes

    for node in NODES:
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, node.GET_SCHEMA().node_id, node)
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "Keep", executor.Keep)
    return Runner()


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("input", "output"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
    cats = tmp_path / "input" / "cats"
    cats.mkdir()
    (cats / "one.png").write_bytes(picture())
    (cats / "one.txt").write_text("a cat", encoding="utf-8")
    write_config(tmp_path, CONFIG)
    rows = [{"image": {"bytes": picture(), "path": "a.png"}, "text": "a dog", "long": "long"}]
    (tmp_path / "input" / "dogs" / "data").mkdir(parents=True)
    path = tmp_path / "input" / "dogs" / "data" / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return tmp_path


def picture() -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (80, 64), "red").save(data, "PNG")
    return data.getvalue()


def write_config(workplace: Path, datasets: Any) -> None:
    path = workplace / "input" / "sets" / "toolkit.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"datasets": datasets}), encoding="utf-8")


def graph(kind: str, **inputs: Any) -> dict[str, Any]:
    return {
        "dataset": {"class_type": kind, "inputs": inputs},
        "keep": {"class_type": "Keep", "inputs": {"value": ["dataset", 0]}},
    }


def imported(file: str = "sets/toolkit.json") -> dict[str, Any]:
    return graph("AtelierImportDataset", file=file, on_bad_file="stop")


def hub(folder: str, **inputs: Any) -> dict[str, Any]:
    sizes = {"width": 64, "height": 64, "mode": "fixed", "repeats": 2, "trigger": "sks"}
    choices = {"missing_captions": "error", "on_bad_file": "stop"}
    return graph("AtelierHubDataset", folder=folder, **sizes, **choices, **inputs)


def test_a_configuration_becomes_a_dataset_and_says_what_it_leaves_out(runner: Runner) -> None:
    dataset = runner.run(imported())
    assert [s.resolution.width for s in dataset.subsets] == [64, 128]
    assert dataset.num_samples == 6
    assert runner.texts["dataset"][:2] == [
        "Pictures: 2, seen per epoch: 6.",
        "flip_y = True (dataset 1): pictures are mirrored left and right only.",
    ]


def test_files_and_folders_are_offered(workplace: Path) -> None:
    inputs = ImportDataset.INPUT_TYPES()["required"], HubDataset.INPUT_TYPES()["required"]
    assert inputs[0]["file"][1]["options"] == ["sets/toolkit.json"]
    assert inputs[1]["folder"][1]["options"] == ["none", "cats", "dogs", "dogs/data"]


def test_a_wrong_file_is_refused_before_the_graph_runs(workplace: Path) -> None:
    assert ImportDataset.validate_inputs(file="sets/toolkit.json") is True
    away = ("../input/sets/toolkit.json", "/etc/passwd", "sets\\..\\..\\x.json", "", "sets")
    for name in (*away, str(workplace / "input" / "sets" / "toolkit.json"), "sets/none.json"):
        assert "is not below" in str(ImportDataset.validate_inputs(file=name))
    (workplace / "outside.json").write_text("[]", encoding="utf-8")
    (workplace / "input" / "link.json").symlink_to(workplace / "outside.json")
    assert "is not below" in str(ImportDataset.validate_inputs(file="link.json"))
    write_config(workplace, [{"folder_path": str(workplace / "output")}])
    found = str(ImportDataset.validate_inputs(file="sets/toolkit.json"))
    assert "lies outside of the folders that may be read" in found


def test_what_the_administrator_allowed_is_read(
    runner: Runner, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (workplace / "shared" / "birds").mkdir(parents=True)
    (workplace / "shared" / "birds" / "a.png").write_bytes(picture())
    allowed = ([str(workplace / "shared")], set())
    monkeypatch.setitem(folder_paths.folder_names_and_paths, folders.DATASET_ROOTS_KEY, allowed)
    write_config(workplace, [{"folder_path": str(workplace / "shared" / "birds")}])
    assert runner.run(imported()).num_samples == 1


def test_a_changed_picture_or_caption_is_noticed(workplace: Path) -> None:
    found = [ImportDataset.fingerprint_inputs(file="sets/toolkit.json", on_bad_file="stop")]
    (workplace / "input" / "cats" / "one.txt").write_text("another cat", encoding="utf-8")
    found.append(ImportDataset.fingerprint_inputs(file="sets/toolkit.json", on_bad_file="stop"))
    assert found[0] != found[1]
    before = HubDataset.fingerprint_inputs(folder="cats")
    (workplace / "input" / "cats" / "two.png").write_bytes(picture())
    assert HubDataset.fingerprint_inputs(folder="cats") != before


@pytest.mark.parametrize("folder", ["dogs", "dogs/data"])
def test_a_folder_of_parquet_is_a_dataset(runner: Runner, workplace: Path, folder: str) -> None:
    dataset = runner.run(hub(folder))
    (record,) = dataset.subsets[0].records
    assert record.texts == (("sks, a dog",),)
    assert (dataset.num_samples, record.width, record.height) == (2, 80, 64)
    assert Path(record.path).is_relative_to(workplace / "output" / "atelier" / "cache" / "pictures")


def test_pictures_of_parquet_that_were_cleared_are_written_again(
    runner: Runner, workplace: Path
) -> None:
    runner = Runner(one_after_the_other=True)
    path = Path(runner.run(hub("dogs")).subsets[0].records[0].path)
    before = path.read_bytes()
    freed = clear_caches(workplace / "output" / "atelier" / "cache", "pictures")
    assert freed == len(before)
    assert not path.exists()
    assert Path(runner.run(hub("dogs")).subsets[0].records[0].path) == path
    assert path.read_bytes() == before == picture()


def test_caption_settings_name_the_column(runner: Runner) -> None:
    settings = {"source": "text file", "instance_prompt": "", "column": "long", "lines": "one"}
    settings |= {"prefix": "", "suffix": "", "shuffle": False, "keep_tokens": 0, "variants": 8}
    settings |= {"separator": ",", "dropout": 0.0}
    node = {"class_type": "AtelierCaptionSettings", "inputs": settings}
    dataset = runner.run({**hub("dogs", captions=["settings", 0]), "settings": node})
    assert dataset.subsets[0].records[0].texts == (("sks, long",),)


def test_hub_dataset_wants_a_folder_or_a_repository(workplace: Path) -> None:
    assert HubDataset.validate_inputs(folder="none", hub_id="owner/name") is True
    assert "No folder is chosen" in str(HubDataset.validate_inputs(folder="none", hub_id=""))
    assert "A Hugging Face repository is named" in str(
        HubDataset.validate_inputs(folder="none", hub_id="https://huggingface.co/a/b")
    )
