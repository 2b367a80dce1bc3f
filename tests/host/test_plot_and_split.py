"""Plot Loss and Split Dataset in ComfyUI's own executor, in this process."""

from pathlib import Path
from typing import Any

import executor
import folder_paths
import numpy as np
import pytest
import torch
from atelier.nodes.dataset import ImageFolderDataset, SplitDataset
from atelier.nodes.plot import PlotLoss
from atelier.trainers.loss_plot import loss_plot
from executor import Give, Runner
from graphs import write_pictures

NODES = [ImageFolderDataset, SplitDataset, PlotLoss]
LOSSES = [1.0, 0.5, 0.25, 0.5]


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    import nodes

    for name in ("input", "output", "temp"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
    write_pictures(tmp_path / "input" / "circles", count=6)
    classes: dict[str, Any] = {node.GET_SCHEMA().node_id: node for node in NODES}
    classes |= {"Keep": executor.Keep, "Give": Give}
    for name, node in classes.items():
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, name, node)
    monkeypatch.setattr(Give, "values", {"loss": {"loss": LOSSES}})
    return Runner()


def plot_graph(**inputs: Any) -> dict[str, Any]:
    values = {"smoothing": 0.5, "log_scale": False, "width": 500, "height": 300, **inputs}
    return {
        "give": {"class_type": "Give", "inputs": {"name": "loss"}},
        "plot": {"class_type": "AtelierPlotLoss", "inputs": {"loss": ["give", 0], **values}},
        "keep": {"class_type": "Keep", "inputs": {"value": ["plot", 0]}},
    }


def test_the_plot_is_an_image_of_comfyui(runner: Runner) -> None:
    image = runner.run(plot_graph(title="my_lora"))
    expected = loss_plot(LOSSES, smoothing=0.5, size=(500, 300), title="my_lora")
    assert (image.dtype, tuple(image.shape)) == (torch.float32, (1, 300, 500, 3))
    assert np.array_equal((image[0].numpy() * 255).round(), np.asarray(expected))


def split_graph(output: int, **inputs: Any) -> dict[str, Any]:
    size = {"width": 64, "height": 64, "mode": "fixed", "repeats": 1, "trigger": ""}
    folder = {"folder": "circles", "missing_captions": "empty", **size}
    values = {"dataset": ["folder", 0], "amount": 2, "unit": "pictures", **inputs}
    return {
        "folder": {"class_type": "AtelierImageFolderDataset", "inputs": folder},
        "split": {"class_type": "AtelierSplitDataset", "inputs": values},
        "keep": {"class_type": "Keep", "inputs": {"value": ["split", output]}},
    }


def test_both_sides_together_are_the_dataset(runner: Runner) -> None:
    sides = []
    for output in (0, 1):
        dataset = runner.run(split_graph(output))
        sides.append({record.path for record in dataset.subsets[0].records})
    assert [len(side) for side in sides] == [4, 2]
    assert len(sides[0] | sides[1]) == 6
    assert runner.texts["split"] == ["Pictures to train on: 4, held out: 2."]


def test_the_sentence_of_a_dataset_that_is_too_small_arrives(runner: Runner) -> None:
    with pytest.raises(
        RuntimeError, match=r"^Holding 6 pictures out of 'circles' would leave noth"
    ):
        runner.run(split_graph(0, amount=6))
