"""What a user may do wrong, through a real queue: one clear sentence, and nothing half-written.

Wrong model files are in test_loaders, cancelling there and in test_main_line.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from comfy_server import ComfyServer, GraphError
from flux_files import write_flux
from graphs import Graph, node, train_graph, write_base, write_pictures
from safetensors.torch import save_file
from small_disk import fill, small_disk


@pytest.fixture(scope="module")
def base(server: ComfyServer) -> Path:
    """The server's folders, with a base model and pictures."""
    write_base(server.base_directory / "models")
    write_pictures(server.base_directory / "input" / "circles")
    return server.base_directory


def half_written(base: Path) -> list[Path]:
    return [path for path in (base / "output").rglob("*") if path.suffix in (".tmp", ".part")]


def cache_graph(folder: str, cache: str = "prompts") -> Graph:
    graph = train_graph(folder, sampling=False)
    wanted = {name: graph[name] for name in ("nano", "data", cache)}
    return {**wanted, "end": node("PreviewAny", source=[cache, 0])}


def refused(server: ComfyServer, graph: Graph, message: str) -> None:
    """The graph ends with `message`, which is one line, and leaves nothing half-written."""
    with pytest.raises(GraphError, match=message) as caught:
        server.run(graph)
    assert "\n" not in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert not half_written(server.base_directory)


@pytest.mark.parametrize("name", ["rank", "length", "batch_size", "checkpoint_every"])
def test_zero_is_refused_before_the_graph_runs(server: ComfyServer, base: Path, name: str) -> None:
    graph = train_graph("circles", sampling=False, **{"name": "zero", name: 0})
    refused(server, graph, rf"^AtelierTrainLoRA \(train\), input {name}: Value 0 smaller than min")
    assert not list((base / "output").glob("atelier/zero-*"))


def gone(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def cut(folder: Path) -> None:
    path = folder / "1.png"
    path.write_bytes(path.read_bytes()[:-100])


def text(folder: Path) -> None:
    (folder / "1.png").write_text("<html>not found</html>", encoding="utf-8")


def no_caption(folder: Path) -> None:
    (folder / "1.txt").unlink()


def latin_1(folder: Path) -> None:
    (folder / "1.txt").write_bytes("ein Kätzchen".encode("latin-1"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (gone, r"The picture folder 'gone' is not below .*input\. Put it there, or press R"),
        (empty, r"The folder .*empty holds no pictures \(.*png.*\)\. Put them directly into it"),
        (cut, r"The picture .*1\.png is damaged, cut off or not a picture\. Replace or remove"),
        (text, r"The picture .*1\.png is damaged, cut off or not a picture\. Replace or remove"),
        (no_caption, r"The picture .*1\.png has no caption file 1\.txt\. Write one"),
        (latin_1, r"The caption .*1\.txt is not UTF-8 text\. Save it as UTF-8\."),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_spoilt_dataset_is_one_sentence(
    server: ComfyServer, base: Path, spoil: Callable[[Path], None], message: str
) -> None:
    folder = base / "input" / spoil.__name__
    write_pictures(folder)
    server.object_info()  # the browser has listed it
    spoil(folder)
    # Pixels are decoded when they are encoded.
    refused(server, cache_graph(folder.name, "latents" if spoil is cut else "prompts"), message)


def test_a_clip_of_another_model_is_one_sentence(server: ComfyServer, base: Path) -> None:
    """CLIP-L alone, as for Stable Diffusion 1.5, by ComfyUI's own loader."""
    weight = torch.zeros(3072, 768, dtype=torch.float16)
    (base / "models" / "text_encoders").mkdir(parents=True, exist_ok=True)
    save_file(
        {"text_model.encoder.layers.0.mlp.fc1.weight": weight},
        base / "models" / "text_encoders" / "only_clip_l.safetensors",
    )
    graph = cache_graph("circles")
    graph["clip"] = node("CLIPLoader", clip_name="only_clip_l.safetensors", type="stable_diffusion")
    graph["prompts"]["inputs"]["clip"] = ["clip", 0]
    message = r"This CLIP is not FLUX's, .*\. Load both with Load Quantized Text Encoders, or"
    refused(server, graph, message)


def test_a_model_that_is_not_trained_is_one_sentence(server: ComfyServer, base: Path) -> None:
    write_flux(base / "models" / "diffusion_models" / "fill.safetensors", channels=384)
    graph = train_graph("circles", sampling=False, name="fill")
    graph["load"]["inputs"]["model"] = "fill.safetensors"
    refused(
        server, graph, r"This FLUX takes 96 latent channels \(Fill, Depth or Canny\)\. It samples"
    )
    assert not list((base / "output" / "atelier").glob("fill-*"))


@pytest.mark.parametrize("place", ["atelier/cache/latents", "checkpoints", "loras"])
def test_a_full_disk_is_one_sentence_and_space_is_all_that_is_needed(
    server: ComfyServer, base: Path, place: str
) -> None:
    """A full disk in the place of one folder, so that only what is written there fails."""
    pictures = base / "input" / f"full {place.replace('/', ' ')}"
    write_pictures(pictures, size=72)  # other latents than those of other tests
    name = f"full {place.rpartition('/')[2]}"
    graph = train_graph(pictures.name, sampling=False, name=name, length=1)
    folder = base / "output" / place
    if place == "checkpoints":
        server.run(graph)  # makes the run's folder
        (run,) = (base / "output" / "atelier").glob(f"{name}-*")
        folder = run / place
        graph["train"]["inputs"]["length"] = 2
    with small_disk(folder):
        fill(folder)
        refused(server, graph, r"[Tt]he disk of .* (is full|has 0\.0 MB free)\. Free some space")
        assert not list(folder.rglob("*.safetensors"))
    lora = server.run(graph)["outputs"]["name"]["text"][0]
    assert (base / "output" / "loras" / lora).is_file()
    assert not half_written(base)
