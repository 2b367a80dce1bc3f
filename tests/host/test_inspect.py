"""Inspect Dataset and Images to Dataset in ComfyUI's own executor, in this process."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import executor
import folder_paths
import pytest
import torch
from atelier.nodes.caches import CacheLatents, EncodePrompts
from atelier.nodes.dataset import ImageFolderDataset
from atelier.nodes.encoders import unknown_texts
from atelier.nodes.images import ImagesToDataset
from atelier.nodes.inspect import InspectDataset
from atelier.trainers.dataset import Dataset
from executor import Give, Runner
from PIL import Image

NODES = [ImageFolderDataset, CacheLatents, EncodePrompts, ImagesToDataset, InspectDataset]
SIZE = {"width": 64, "height": 64, "mode": "fixed", "repeats": 1, "trigger": ""}


class GiveList(Give):
    """Gives the items of a list one by one, as nodes with list outputs do."""

    OUTPUT_IS_LIST: ClassVar[tuple] = (True,)


@pytest.fixture(scope="module", autouse=True)
def networks_are_forgotten() -> Iterator[None]:
    yield
    executor.forget_networks()


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders of ComfyUI's kind with two pictures in input/red."""
    for name in ("input", "output", "temp"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
    folder = tmp_path / "input" / "red"
    folder.mkdir()
    for name, size in (("one", (64, 64)), ("two", (128, 64))):
        Image.new("RGB", size, "red").save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"caption {name}", encoding="utf-8")
    return tmp_path


@pytest.fixture
def known_nodes(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nodes

    classes: dict[str, Any] = {node.GET_SCHEMA().node_id: node for node in NODES}
    classes |= {"VAELoader": executor.NanoVaeLoader, "Keep": executor.Keep}
    classes |= {"Give": Give, "GiveList": GiveList}
    for name, node in classes.items():
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, name, node)
    monkeypatch.setattr(Give, "values", {})


@pytest.fixture
def runner(known_nodes: None) -> Runner:
    return Runner()


def image(height: int = 64, width: int = 64, count: int = 1, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height + width)
    return torch.rand(count, height, width, channels, generator=generator)


def inspect_graph(output: int = 0, **inputs: Any) -> dict[str, Any]:
    values = {"length": 77, "batch_size": 2, "gradient_accumulation": 1, "max_pictures": 48}
    dataset = {"folder": "red", "missing_captions": "error", **SIZE}
    look = {"dataset": ["dataset", 0], "page": 1, **values, **inputs}
    return {
        "dataset": {"class_type": "AtelierImageFolderDataset", "inputs": dataset},
        "look": {"class_type": "AtelierInspectDataset", "inputs": look},
        "keep": {"class_type": "Keep", "inputs": {"value": ["look", output]}},
    }


def images_graph(images: Any, texts: Any = "a caption", **inputs: Any) -> dict[str, Any]:
    """Lists come one item after the other, everything else as one value."""
    graph: dict[str, Any] = {}
    values: dict[str, Any] = {**SIZE, "images": images, "texts": texts, **inputs}
    for name, value in values.items():
        if isinstance(value, torch.Tensor | list):
            Give.values[name] = value
            kind = "GiveList" if isinstance(value, list) else "Give"
            graph[f"give {name}"] = {"class_type": kind, "inputs": {"name": name}}
            values[name] = [f"give {name}", 0]
    graph["dataset"] = {"class_type": "AtelierImagesToDataset", "inputs": values}
    graph["keep"] = {"class_type": "Keep", "inputs": {"value": ["dataset", 0]}}
    return graph


def stored(workplace: Path) -> list[Path]:
    return sorted((workplace / "output" / "atelier" / "cache" / "pictures").rglob("*.png"))


def test_the_sheet_is_an_image_and_shown_on_the_node(runner: Runner, workplace: Path) -> None:
    sheet = runner.run(inspect_graph())
    (shown,) = runner.images["look"]
    with Image.open(workplace / "temp" / shown["filename"]) as preview:
        assert sheet.shape == (1, preview.height, preview.width, 3)
    assert 0 <= sheet.min() < sheet.max() <= 1


def test_the_report_is_a_text_and_shown_on_the_node(runner: Runner) -> None:
    report = runner.run(inspect_graph(output=1))
    assert report.split("\n") == runner.texts["look"]
    assert "Size 64x64 of red: samples 2, batches 1." in report


def test_the_inspector_runs_without_anything_behind_it(runner: Runner) -> None:
    graph = inspect_graph()
    del graph["keep"]
    runner.run(graph)
    assert runner.texts["look"][0].startswith("Epoch: samples 2 of 2 pictures")


def test_captions_that_do_not_reach_the_encoder_are_reported(
    runner: Runner, workplace: Path
) -> None:
    folder = workplace / "input" / "red"
    (folder / "one.txt").write_text("cat " * 100, encoding="utf-8")
    (folder / "two.txt").write_text("一只猫", encoding="utf-8")
    report = runner.run(inspect_graph(output=1))
    assert "Captions longer than 77 tokens, whose end is cut off: 1, for example 'cat cat" in report
    assert "such as Chinese, which it cannot learn from: 1, for example '一只猫'." in report
    assert "Captions longer" not in runner.run(inspect_graph(output=1, length=128))


@pytest.mark.parametrize(
    ("text", "is_unknown"),
    [("a cat", False), ("ein Kätzchen, façade", False), ("猫", True), ("кот и 猫", True)],
)
def test_texts_that_t5_cannot_read_are_found(text: str, is_unknown: bool) -> None:
    assert unknown_texts((text, "plain")) == ([text] if is_unknown else [])


def test_a_page_that_is_not_there_is_one_sentence(runner: Runner) -> None:
    with pytest.raises(RuntimeError, match="There is no page 3 of the contact sheet"):
        runner.run(inspect_graph(page=3, max_pictures=1))


def test_a_batch_becomes_a_dataset(runner: Runner, workplace: Path) -> None:
    dataset = runner.run(images_graph(image(count=3)))
    assert isinstance(dataset, Dataset)
    assert len(dataset.subsets[0].records) == len(stored(workplace)) == 3
    assert runner.texts["dataset"] == ["Pictures: 3, seen per epoch: 3."]


def test_a_list_of_sizes_with_a_list_of_captions_becomes_a_dataset(runner: Runner) -> None:
    given = [image(64, 64), image(96, 64, count=2), image(64, 80, channels=4)]
    dataset = runner.run(images_graph(given, ["one", "two", "three", "four"], trigger="sks"))
    records = dataset.subsets[0].records
    sizes = [(record.width, record.height) for record in records]
    assert sizes == [(64, 64), (64, 96), (64, 96), (80, 64)]
    assert [record.texts[0][0] for record in records] == [
        *("sks, one", "sks, two"),
        *("sks, three", "sks, four"),
    ]


@pytest.mark.parametrize("shape", [(2, 64, 64), (64, 64)])
def test_masks_come_as_batches_or_alone(runner: Runner, shape: tuple[int, ...]) -> None:
    masks = torch.ones(shape)
    count = shape[0] if len(shape) == 3 else 1
    dataset = runner.run(images_graph(image(count=count), masks=masks))
    assert all(record.mask for record in dataset.subsets[0].records)


def test_a_wrong_number_of_captions_is_one_sentence(runner: Runner) -> None:
    with pytest.raises(RuntimeError, match="There are 2 captions for 3 pictures"):
        runner.run(images_graph(image(count=3), ["one", "two"]))


def test_warnings_are_those_of_a_folder(runner: Runner) -> None:
    runner.run(images_graph(image(), "", width=128))
    assert [text.split(":")[0] for text in runner.texts["dataset"][1:]] == [
        "Pictures enlarged to the training size",
        "Pictures with an empty caption",
    ]


def with_latents(graph: dict[str, Any]) -> dict[str, Any]:
    latents = {"dataset": ["dataset", 0], "vae": ["vae", 0], "batch_size": 1}
    return {
        **graph,
        "vae": {"class_type": "VAELoader", "inputs": {"vae_name": "a.safetensors"}},
        "latents": {"class_type": "AtelierCacheLatents", "inputs": latents},
        "keep": {"class_type": "Keep", "inputs": {"value": ["latents", 0]}},
    }


def test_its_latents_are_cached_and_kept(runner: Runner) -> None:
    graph = with_latents(images_graph(image(count=2)))
    first = runner.run(graph)
    assert len(first.entries) == 2
    first.require_complete()
    assert runner.run(graph) == first


def test_deleted_pictures_are_written_again_when_the_graph_is_queued_again(
    known_nodes: None, workplace: Path
) -> None:
    runner, graph = Runner(one_after_the_other=True), images_graph(image(count=2))
    runner.run(graph)
    assert runner.run(graph) is None  # ComfyUI kept what it gave
    for path in stored(workplace)[:1]:
        path.unlink()
    assert runner.run(graph) is not None
    assert len(stored(workplace)) == 2
    assert runner.run(graph) is None
