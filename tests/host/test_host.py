"""What the pack asks of the host: folders, inference mode, differences of versions."""

from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import folder_paths
import pytest
import torch
from atelier.nodes import folders, host
from atelier.nodes.dataset import ImageFolderDataset
from comfy_api.latest import io
from PIL import Image


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    add_picture(tmp_path / "input" / "red")
    return tmp_path


def add_picture(folder: Path) -> None:
    folder.mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(folder / "one.png")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "No picture folder is chosen"),
        ("nowhere", "is not below"),
        ("../input/red", "must lie below input/, got '../input/red'"),
        ("red/../../input/red", "must lie below input/"),
        ("/etc", "must lie below input/"),
        ("//etc", "must lie below input/"),
        ("red/C:x", "must lie below input/"),
        ("C:\\Users", "must lie below input/"),
        ("..\\..", "must lie below input/"),
        ("out", "is a link that leads out of"),
        ("empty", "holds no pictures"),
    ],
)
def test_a_folder_out_of_reach_is_refused_before_the_graph_runs(
    workplace: Path, name: str, message: str
) -> None:
    add_picture(workplace / "elsewhere")
    (workplace / "input" / "out").symlink_to(workplace / "elsewhere")
    (workplace / "input" / "empty").mkdir()
    assert message in str(ImageFolderDataset.validate_inputs(folder=name))


def test_a_good_folder_is_valid(workplace: Path) -> None:
    add_picture(workplace / "input" / "a" / "b c")
    assert ImageFolderDataset.validate_inputs(folder="a/b c") is True


def test_an_administrator_may_add_folders(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_picture(workplace / "more" / "blue")
    added = ([str(workplace / "more")], set())
    monkeypatch.setitem(folder_paths.folder_names_and_paths, folders.DATASET_ROOTS_KEY, added)
    assert folders.dataset_folders() == ["blue", "red"]
    assert folders.dataset_folder("blue") == workplace / "more" / "blue"


def test_a_field_that_this_comfyui_lacks_is_dropped() -> None:
    assert host.schema(node_id="x", from_the_future=1).node_id == "x"


def test_an_option_that_this_comfyui_lacks_is_dropped() -> None:
    assert host.make_input(io.Int, "x", default=3, from_the_future=1).default == 3


def test_training_mode_leaves_inference_mode() -> None:
    with torch.inference_mode(), host.training_mode():
        weight = torch.ones(1, requires_grad=True)
        (weight * 2).backward()
    assert weight.grad is not None


def free_memory(device: torch.device, torch_free_too: bool = False) -> int | tuple[int, int]:
    """In place of ComfyUI's question to a driver that is not there."""
    return (10**10, 0) if torch_free_too else 10**10


def test_only_models_on_the_compute_device_count_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """`meta` stands for a GPU: ComfyUI moves a network there, whose bytes it could evict."""
    gpu, cpu = torch.device("meta"), torch.device("cpu")
    monkeypatch.setattr(comfy.model_management, "get_free_memory", free_memory)
    monkeypatch.setattr(host, "compute_device", lambda: gpu)
    patchers = [
        comfy.model_patcher.ModelPatcher(torch.nn.Linear(width, 100, bias=False), device, cpu)
        for width, device in ((1000, gpu), (3000, cpu))  # a network, and text encoders on the CPU
    ]
    try:
        for patcher in patchers:
            comfy.model_management.load_models_gpu([patcher])
        assert [patcher.loaded_size() for patcher in patchers] == [400_000, 1_200_000]
        assert host.free_memory() == 10**10 + 400_000
    finally:
        comfy.model_management.current_loaded_models.clear()
