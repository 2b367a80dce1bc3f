"""Load Quantized FLUX in a real ComfyUI: every place and layout of a file, and every wrong one."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comfy_server import ComfyServer, Event, GraphError
from dense import dense_transformer
from flux_files import flux_tensors, write_flux
from graphs import Graph, node, sampled, train_graph
from PIL import Image
from safetensors.torch import load_file, save_file

SIZES = {"depth": 1, "depth_single": 1}
PLACES = {
    "original": "places.safetensors",
    "fp8": "places_fp8.safetensors",
    "checkpoint": "checkpoints/places.safetensors",
    "folder": "diffusers/places",
}


@pytest.fixture(scope="module")
def models(server: ComfyServer) -> Path:
    """The same random FLUX at the places where ComfyUI's users have theirs."""
    folder = server.base_directory / "models"
    write_flux(folder / "diffusion_models" / "places.safetensors", **SIZES)
    tensors = flux_tensors(**SIZES)
    cast = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}
    save_file(cast, folder / "diffusion_models" / "places_fp8.safetensors")
    prefix = "model.diffusion_model."
    write_flux(folder / "checkpoints" / "places.safetensors", prefix=prefix, **SIZES)
    transformer = folder / "diffusers" / "places" / "transformer"
    dense_transformer(tensors).save_pretrained(transformer, max_shard_size="4MB")
    return folder


def loader(model: str, format: str = "nf4", **inputs: Any) -> Graph:
    load = node("AtelierLoadQuantizedFlux", model=model, format=format, compute_dtype="fp32")
    load["inputs"] |= inputs
    return {"load": load}


def sample_graph(model: str, **inputs: Any) -> Graph:
    """KSampler on the model; text and decoding are nano's."""
    return {
        **loader(model, **inputs),
        "nano": node(
            "AtelierLoadQuantizedFlux", model="nano (built in)", format="bf16", compute_dtype="fp32"
        ),
        "text": node("CLIPTextEncode", clip=["nano", 1], text="a red circle"),
        "guided": node("FluxGuidance", conditioning=["text", 0], guidance=2.5),
        "empty": node("EmptySD3LatentImage", width=64, height=64, batch_size=1),
        **sampled("out", ["load", 0]),
    }


def picture(server: ComfyServer, model: str, **inputs: Any) -> np.ndarray:
    (image,) = server.run(sample_graph(model, **inputs))["outputs"]["out.save"]["images"]
    return np.asarray(Image.open(io.BytesIO(server.view(image))))


def test_every_file_is_offered(server: ComfyServer, models: Path) -> None:
    info = server.object_info()["AtelierLoadQuantizedFlux"]["input"]["required"]["model"]
    offered = info[1]["options"] if info[0] == "COMBO" else info[0]
    assert {*PLACES.values(), "nano (built in)"} <= {*offered}


@pytest.fixture(scope="module")
def expected(server: ComfyServer, models: Path) -> np.ndarray:
    return picture(server, PLACES["original"])


@pytest.mark.parametrize("place", ["checkpoint", "folder"])
def test_every_place_gives_the_same_picture(
    server: ComfyServer, expected: np.ndarray, place: str
) -> None:
    assert np.array_equal(picture(server, PLACES[place]), expected)


def test_an_fp8_file_gives_nearly_the_same_picture(
    server: ComfyServer, expected: np.ndarray
) -> None:
    found = picture(server, PLACES["fp8"]).astype(float)
    assert 0 < np.abs(found - expected).mean() < 8


def test_the_second_load_reads_the_quantized_copy(server: ComfyServer, models: Path) -> None:
    """Of a file of more than 256 MB: then bytes of it are zeroed that its identity does not see."""
    path = models / "diffusion_models" / "large.safetensors"
    tensors = {name: tensor.float() for name, tensor in flux_tensors(width=1152).items()}
    save_file(tensors, path)
    packed = server.base_directory / "output" / "atelier" / "packed"
    first = picture(server, path.name)
    (copy,) = packed.glob("large-*-nf4.safetensors")
    written = copy.stat().st_mtime_ns
    zero_a_tenth(path, "single_blocks.0.linear1.weight")
    assert np.array_equal(picture(server, path.name), first)
    assert copy.stat().st_mtime_ns == written
    assert not np.array_equal(picture(server, path.name, keep_copy=False), first)
    assert copy.stat().st_mtime_ns == written


def zero_a_tenth(path: Path, name: str) -> None:
    with path.open("rb+") as file:
        length = int.from_bytes(file.read(8), "little")
        begin, end = json.loads(file.read(length))[name]["data_offsets"]
        file.seek(8 + length + begin + (end - begin) // 8)
        file.write(bytes((end - begin) // 10))


@pytest.mark.parametrize("keep_copy", [True, False])
def test_a_small_model_has_no_quantized_copy(
    server: ComfyServer, models: Path, keep_copy: bool
) -> None:
    picture(server, PLACES["original"], keep_copy=keep_copy)
    packed = server.base_directory / "output" / "atelier" / "packed"
    assert not list(packed.glob("places-*"))


def test_matrices_are_quantized_on_the_cpu_as_well(
    server: ComfyServer, expected: np.ndarray
) -> None:
    assert np.array_equal(picture(server, PLACES["original"], quantize_on="cpu"), expected)


def test_a_gpu_that_is_not_there_is_one_sentence(server: ComfyServer, models: Path) -> None:
    """The server of these tests runs on the CPU."""
    with pytest.raises(GraphError, match=r"There is no GPU to quantize on: .*Set quantize_on to"):
        picture(server, PLACES["original"], quantize_on="gpu")


ABSENT = {
    "clip": "Add the node Load Quantized Text Encoders, or DualCLIPLoader",
    "vae": "Add the node Load VAE with ae.safetensors",
}


@pytest.mark.parametrize(
    ("place", "output"),
    [(place, output) for place in PLACES for output in ABSENT],
)
def test_an_absent_encoder_names_the_node_to_add(
    server: ComfyServer, models: Path, place: str, output: str
) -> None:
    graph = loader(PLACES[place])
    if output == "clip":
        graph["use"] = node("CLIPTextEncode", clip=["load", 1], text="a")
        graph["end"] = node("PreviewAny", source=["use", 0])
    else:
        graph["empty"] = node("EmptySD3LatentImage", width=64, height=64, batch_size=1)
        graph["use"] = node("VAEDecode", vae=["load", 2], samples=["empty", 0])
        graph["end"] = node("PreviewImage", images=["use", 0])
    with pytest.raises(GraphError, match=ABSENT[output]):
        server.run(graph)


def cut(path: Path) -> None:
    write_flux(path, **SIZES)
    path.write_bytes(path.read_bytes()[:-100])


def pickled(path: Path) -> None:
    torch.save({"img_in.weight": torch.zeros(4, 4)}, path)


def stable_diffusion(path: Path) -> None:
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 4, 3, 3)}, path)


def incomplete(path: Path) -> None:
    tensors = flux_tensors(**SIZES)
    del tensors["double_blocks.0.txt_mlp.0.weight"]
    save_file(tensors, path)


def odd_width(path: Path) -> None:
    """A matrix whose width NF4 cannot hold."""
    tensors = flux_tensors(**SIZES)
    tensors["double_blocks.0.img_attn.proj.weight"] = torch.zeros(256, 100, dtype=torch.bfloat16)
    save_file(tensors, path)


WRONG = {
    cut: "The file 'wrong_cut.safetensors' is cut short: download it again.",
    pickled: "'wrong_pickled.safetensors' is not a whole safetensors file.",
    stable_diffusion: "'wrong_stable_diffusion.safetensors' is not a FLUX.1 model: ",
    incomplete: "is an incomplete FLUX.1 model: 'double_blocks.0.txt_mlp.0.weight' is missing.",
    odd_width: "needs a multiple of 64. Load this file as bf16.",
}


@pytest.mark.parametrize("write", WRONG, ids=lambda write: write.__name__)
def test_a_wrong_file_is_one_sentence_in_the_error_box(
    server: ComfyServer, models: Path, write
) -> None:
    name = f"wrong_{write.__name__}.safetensors"
    write(models / "diffusion_models" / name)
    with pytest.raises(GraphError, match=re.escape(WRONG[write])) as caught:
        server.run({**loader(name), "end": node("PreviewAny", source=["load", 0])})
    assert str(caught.value).startswith("AtelierLoadQuantizedFlux (load): ")
    assert "Traceback" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pickle_is_refused_before_the_graph_runs(server: ComfyServer, models: Path) -> None:
    pickled(models / "checkpoints" / "old.ckpt")
    graph = {**loader("checkpoints/old.ckpt"), "end": node("PreviewAny", source=["load", 0])}
    with pytest.raises(
        GraphError, match=r"'old\.ckpt' is a pickle, .*Choose the \.safetensors file"
    ):
        server.run(graph)


def test_a_file_that_was_removed_is_one_sentence(server: ComfyServer, models: Path) -> None:
    path = write_flux(models / "diffusion_models" / "removed.safetensors", **SIZES)
    server.object_info()  # the browser has listed it
    path.unlink()
    with pytest.raises(GraphError, match=r"removed\.safetensors"):
        server.run({**loader("removed.safetensors"), "end": node("PreviewAny", source=["load", 0])})


def caching_graph(folder: str) -> Graph:
    graph = train_graph(folder, sampling=False)
    names = ("nano", "data", "latents")
    return {
        **{name: graph[name] for name in names},
        "end": node("PreviewAny", source=["latents", 0]),
    }


def write_many_pictures(folder: Path, count: int) -> None:
    folder.mkdir()
    for index in range(count):
        Image.new("RGB", (64, 64), (index, 0, 0)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text("a caption", encoding="utf-8")


def cached_keys(cache: Path) -> set[str]:
    names = (name for path in cache.glob("*.safetensors") for name in load_file(path))
    return {name.rpartition(".")[0] for name in names}


def test_cancel_during_caching_keeps_what_was_encoded_and_goes_on(server: ComfyServer) -> None:
    # More pictures than are encoded before the request to cancel arrives.
    write_many_pictures(server.base_directory / "input" / "many", 60)
    cache = server.base_directory / "output" / "atelier" / "cache" / "latents"
    before = cached_keys(cache)

    def cancel(event: Event) -> None:
        is_caching = event.type == "progress" and event.data["node"] == "latents"
        if is_caching and event.data["value"] >= 2:
            server.interrupt()

    with pytest.raises(GraphError, match=r"^Cancelled while AtelierCacheLatents"):
        server.run(caching_graph("many"), cancel)
    kept = {path: path.stat().st_mtime_ns for path in cache.glob("*.safetensors")}
    assert 0 < len(cached_keys(cache) - before) < 60
    assert not list(cache.rglob("*.tmp"))
    server.run(caching_graph("many"))
    assert len(cached_keys(cache) - before) == 60
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
