"""Compare Grid in a real ComfyUI: its pictures are those of KSamplers, and are kept."""

from __future__ import annotations

import csv
import io
import itertools
import os
import signal
from pathlib import Path
from typing import Any

import comfy.model_management
import executor
import numpy as np
import pytest
import torch
from atelier.nodes import folders
from atelier.nodes.grid_cells import Cells, Comparison
from atelier.nodes.looks import Look
from atelier.nodes.native import build_model
from atelier.nodes.validation import Sampler
from atelier.trainers.load import load_flux
from comfy_server import ComfyServer, Event, GraphError, ServerError
from flux_files import write_flux
from graphs import Graph, node, train_graph, write_base, write_pictures
from lora_files import lora_tensors
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

SETTINGS = {
    "prompts": "a red circle\n\n a blue circle ",
    "negative": "a green circle",
    "loras": "none",
    "run": "none",
    "strengths": "1",
    "guidances": "2.5",
    "cfgs": "1",
    "seed": 7,
    "steps": 2,
    "sampler_name": "euler",
    "scheduler": "simple",
    "width": 96,
    "height": 64,
    "name": "grid",
}


@pytest.fixture(scope="module")
def run(server: ComfyServer) -> str:
    """The id of a training with checkpoints at 1, 2 and 3 steps; there are LoRA files too."""
    write_base(server.base_directory / "models")
    write_pictures(server.base_directory / "input" / "compared", 2)
    loras = server.base_directory / "models" / "loras"
    loras.mkdir(parents=True, exist_ok=True)
    plain = lora_tensors("plain")
    save_file(plain, loras / "plain.safetensors")
    save_file(plain | text_layer(), loras / "with_text.safetensors")
    save_file(plain | layer("unet_blocks.0", 8, 8), loras / "odd.safetensors")
    save_file(layer("unet_blocks.0", 8, 8), loras / "strange.safetensors")
    graph = train_graph("compared", sampling=False, name="compared", checkpoint_every=1)
    (run_id,) = server.run(graph)["outputs"]["train"]["atelier_run"]
    return run_id


def layer(name: str, rows: int, columns: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        f"{name}.lora_down.weight": torch.randn(4, columns, generator=generator),
        f"{name}.lora_up.weight": torch.randn(rows, 4, generator=generator),
    }


def text_layer() -> dict[str, Tensor]:
    """A strong LoRA of a layer of CLIP-L, as kohya's tools write it."""
    text_model = executor.nano_clip().cond_stage_model.clip_l.transformer.text_model
    shape = text_model.encoder.layers[0].mlp.fc1.weight.shape
    return layer("lora_te1_text_model_encoder_layers_0_mlp_fc1", *shape)


def networks() -> Graph:
    graph = train_graph("compared", sampling=False)
    return {name: graph[name] for name in ("load", "nano")}


def grid_graph(model: str = "load", **changed: Any) -> Graph:
    inputs = {"model": [model, 0], "clip": ["nano", 1], "vae": ["nano", 2], **SETTINGS, **changed}
    return {
        **networks(),
        "grid": node("AtelierCompareGrid", **inputs),
        "shown": node("SaveImage", images=["grid", 0], filename_prefix="grid"),
        "table": node("PreviewAny", source=["grid", 1]),
    }


def message(entry: dict[str, Any]) -> str:
    return entry["outputs"]["grid"]["text"][0]


def folder_of(entry: dict[str, Any]) -> Path:
    return Path(message(entry).partition(", in ")[2].removesuffix("."))


def rows_of(entry: dict[str, Any]) -> list[dict[str, str]]:
    (text,) = entry["outputs"]["table"]["text"]
    return list(csv.DictReader(io.StringIO(text)))


def by_core(server: ComfyServer, row: dict[str, str], lora: str | None) -> np.ndarray:
    """Core's LoRA loader, CLIP Text Encode, FluxGuidance, KSampler, VAE Decode and Save Image."""
    graph, model, clip = networks(), ["load", 0], ["nano", 1]
    if lora is not None:
        strength = float(row["strength"])
        both = {"strength_model": strength, "strength_clip": strength}
        graph["lora"] = node("LoraLoader", model=model, clip=clip, lora_name=lora, **both)
        model, clip = ["lora", 0], ["lora", 1]
    for name, text in {"positive": row["prompt"], "negative": SETTINGS["negative"]}.items():
        graph[f"{name}.text"] = node("CLIPTextEncode", clip=clip, text=text)
        graph[name] = node(
            "FluxGuidance", conditioning=[f"{name}.text", 0], guidance=float(row["guidance"])
        )
    graph |= {
        "empty": node("EmptySD3LatentImage", width=96, height=64, batch_size=1),
        "sampler": node(
            "KSampler",
            model=model,
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["empty", 0],
            denoise=1.0,
            cfg=float(row["cfg"]),
            **{name: SETTINGS[name] for name in ("seed", "steps", "scheduler", "sampler_name")},
        ),
        "decode": node("VAEDecode", samples=["sampler", 0], vae=["nano", 2]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="core"),
    }
    (image,) = server.run(graph)["outputs"]["save"]["images"]
    return np.asarray(Image.open(io.BytesIO(server.view(image))))


def test_every_picture_is_that_of_a_ksampler(server: ComfyServer, run: str) -> None:
    entry = server.run(
        grid_graph(
            prompts="a red circle",
            loras="none\nplain\nwith_text.safetensors",
            run=run,
            checkpoints="3",
            strengths="0.5",
            cfgs="1, 3",
        )
    )
    rows = rows_of(entry)
    looks = {
        "without LoRA": None,
        "plain": "plain.safetensors",
        "with_text": "with_text.safetensors",
        "step 3": f"{run}-3.safetensors",
    }
    assert [(row["lora"], row["cfg"]) for row in rows] == list(
        itertools.product(looks, ("1.0", "3.0"))
    )
    drawn = []
    for row in rows:
        drawn.append(np.asarray(Image.open(folder_of(entry) / row["file"])))
        assert np.array_equal(drawn[-1], by_core(server, row, looks[row["lora"]]))
    for one, other in itertools.combinations(drawn, 2):
        assert not np.array_equal(one, other)


def test_the_sheet_is_an_image_and_a_file(server: ComfyServer, run: str) -> None:
    entry = server.run(grid_graph(loras="", run=run, name="sheet"))
    (image,) = entry["outputs"]["shown"]["images"]
    shown = np.asarray(Image.open(io.BytesIO(server.view(image))))
    assert np.array_equal(shown, np.asarray(Image.open(folder_of(entry) / "grid.png")))
    text = (folder_of(entry) / "grid.csv").read_text(encoding="utf-8")
    assert [*csv.DictReader(io.StringIO(text))] == rows_of(entry)
    assert [row["lora"] for row in rows_of(entry)] == ["step 1", "step 2", "step 3"] * 2


def test_the_checkpoints_of_a_training_in_the_same_graph(server: ComfyServer, run: str) -> None:
    training = train_graph("compared", sampling=False, name="compared", checkpoint_every=1)
    grid = grid_graph(loras="", trained=["train", 2], checkpoints="1, 2", name="linked")
    entry = server.run({**training, **grid})
    assert [row["lora"] for row in rows_of(entry)] == ["step 1", "step 2"] * 2


def test_a_grid_that_grows_draws_only_what_is_new(server: ComfyServer, run: str) -> None:
    """What has no LoRA is the same at every strength."""
    first = server.run(grid_graph(loras="none", name="grows"))
    assert message(first).startswith("Pictures: 2, new: 2, in ")
    grown = grid_graph(loras="none\nplain", strengths="0.5, 1", name="grows")
    second = server.run(grown)
    assert message(second).startswith("Pictures: 6, new: 4, in ")
    assert folder_of(second) == folder_of(first)
    grown["grid"]["inputs"]["prompts"] = "a blue circle\na red circle"
    third = server.run(grown)
    assert message(third).startswith("Pictures: 6, new: 0, in ")
    files = [{(row["prompt"], row["lora"], row["strength"]): row["file"]} for row in rows_of(third)]
    assert all(one in files for one in files)
    order = [row["prompt"] for row in rows_of(third)]
    assert order == ["a blue circle"] * 4 + ["a red circle"] * 4


def test_the_same_nodes_under_other_numbers_are_the_same_grid(
    server: ComfyServer, run: str
) -> None:
    graph = grid_graph(prompts="a red circle", name="renamed")
    server.run(graph)
    graph["other"] = graph.pop("load")
    # Without another prompt ComfyUI would not ask the node at all.
    graph["grid"]["inputs"] |= {"model": ["other", 0], "prompts": "a red circle\na blue circle"}
    assert message(server.run(graph)).startswith("Pictures: 2, new: 1, in ")


def test_a_lora_file_that_was_changed_is_drawn_again(server: ComfyServer, run: str) -> None:
    path = server.base_directory / "models" / "loras" / "changing.safetensors"
    graph = grid_graph(prompts="a red circle", loras="none\nchanging", name="changing")
    for factor in (1.0, 2.0):
        save_file({k: v * factor for k, v in lora_tensors("plain").items()}, path)
        entry = server.run(graph)
    assert message(entry).startswith("Pictures: 2, new: 1, in ")


def test_layers_that_are_left_out_are_told(server: ComfyServer, run: str) -> None:
    entry = server.run(grid_graph(prompts="a red circle", loras="odd", name="odd"))
    (warning,) = entry["outputs"]["grid"]["text"][1:]
    assert warning.startswith("Layers of odd that are not in this MODEL, and were left out: 1 (")


def test_another_guidance_on_the_model_is_another_grid(server: ComfyServer, run: str) -> None:
    """Nodes before the grid count, though they change neither weights nor LoRAs."""
    plain = grid_graph(prompts="a red circle", cfgs="3", name="guided")
    graph = grid_graph("slg", prompts="a red circle", cfgs="3", name="guided")
    graph["slg"] = node("RescaleCFG", model=["load", 0], multiplier=0.7)
    first, second = server.run(plain), server.run(graph)
    assert folder_of(first) != folder_of(second)
    pictures = [
        np.asarray(Image.open(folder_of(entry) / rows_of(entry)[0]["file"]))
        for entry in (first, second)
    ]
    assert not np.array_equal(*pictures)


def test_cancel_keeps_what_is_drawn_and_the_next_time_goes_on(
    server: ComfyServer, run: str
) -> None:
    graph = grid_graph(
        prompts="\n".join(f"circle {number}" for number in range(8)), steps=8, name="cancelled"
    )

    def stop(event: Event) -> None:
        if "1 of 8 pictures are drawn" in str(event.data.get("text", "")):
            server.interrupt()

    with pytest.raises(GraphError):
        server.run(graph, stop)
    (folder,) = (server.base_directory / "output" / "atelier" / "grids").glob("cancelled-*")
    kept = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert 1 <= len(kept) < 8
    entry = server.run(graph)
    assert message(entry).startswith(f"Pictures: 8, new: {8 - len(kept)}, in ")
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == kept
    whole = {row["file"] for row in rows_of(entry)}
    assert {path.name for path in folder.iterdir()} == {*whole, "grid.png", "grid.csv"}


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals for another process")
def test_a_grid_whose_server_was_killed_goes_on_in_another(
    server: ComfyServer, tmp_path: Path
) -> None:
    write_base(tmp_path / "models")
    graph = grid_graph(prompts="\n".join(f"circle {number}" for number in range(8)), steps=8)

    def kill(event: Event) -> None:
        if "2 of 8 pictures are drawn" in str(event.data.get("text", "")):
            os.kill(killed.pid, signal.SIGKILL)

    with (
        ComfyServer(server.comfyui, tmp_path, arguments=("--cpu",)) as killed,
        pytest.raises(ServerError),
    ):
        killed.run(graph, kill)
    (folder,) = (tmp_path / "output" / "atelier" / "grids").iterdir()
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    assert 2 <= len(kept) < 8
    with ComfyServer(server.comfyui, tmp_path, arguments=("--cpu",)) as fresh:
        entry = fresh.run(graph)
    assert message(entry).startswith(f"Pictures: 8, new: {8 - len(kept)}, in {folder}")
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == kept


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"prompts": " \n"}, "Compare Grid has no prompt."),
        ({"strengths": "a lot"}, "strengths must be numbers from -10 to 10 with commas"),
        ({"guidances": ""}, "guidances must be numbers from 0 to 100 with commas"),
        ({"cfgs": "1, -2"}, "cfgs must be numbers from 0 to 100 with commas"),
        ({"loras": "none\nnowhere"}, "There is no LoRA file 'nowhere'."),
        ({"loras": "plain\nstrange"}, "The LoRA 'strange' changes nothing in this MODEL: it was"),
        ({"name": "../up"}, "The name '../up' cannot be a file name."),
        ({"checkpoints": "last"}, "checkpoints must be steps with commas between them"),
        ({"checkpoints": "4", "run": True}, "has no checkpoint of step 4. It has those of 1, 2, 3"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_what_cannot_be_drawn_is_told(
    server: ComfyServer, run: str, changed: dict[str, Any], said: str
) -> None:
    values = {**changed, "run": run} if "run" in changed else changed
    with pytest.raises(GraphError) as caught:
        server.run(grid_graph(**values))
    assert said in f"{caught.value} {caught.value.details}"


WITHOUT = Look(label="without LoRA")


def comparison(**compared: Any) -> Comparison:
    """Of small pictures in one step."""
    values = {
        "looks": (WITHOUT,),
        "strengths": (1.0,),
        "guidances": (2.5,),
        "cfgs": (1.0,),
        "negative": "",
        "width": 64,
        "height": 64,
        "sampler": Sampler(steps=1),
    }
    return Comparison(**{**values, **compared})


def test_one_loaded_model_draws_all(tmp_path: Path) -> None:
    """LoRAs change and no packed byte moves, though the device is not where the model waits."""
    path = write_flux(tmp_path / "flux.safetensors")
    model = build_model(load_flux(path, format="nf4"), torch.float32)
    model.offload_device = torch.device("cpu", 0)
    model.store.place(model.offload_device)
    save_file(lora_tensors("plain"), tmp_path / "plain.safetensors")
    plain = Look(label="plain", path=tmp_path / "plain.safetensors")
    compared = comparison(prompts=("a red circle",), looks=(WITHOUT, plain), strengths=(0.5, 1.0))
    shown: list[tuple[str, int]] = []
    cells = Cells(tmp_path / "grid", compared)
    cells.draw(
        model,
        executor.nano_clip(),
        executor.nano_vae(),
        lambda text: shown.append((text, model.store.bytes_moved)),
    )
    assert [text.partition(",")[0] for text, _ in shown] == [
        "Pictures: 3",
        *(f"{number} of 3 pictures are drawn" for number in (1, 2, 3)),
    ]
    moved = [number for _, number in shown]
    assert moved[1:] == [moved[0] + model.store.num_bytes] * 3
    comfy.model_management.unload_all_models()
    executor.forget_networks()


def test_a_textual_inversion_that_was_changed_is_drawn_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "embedding_folders", lambda: [str(tmp_path)])
    embedding = tmp_path / "ink.safetensors"
    names = []
    for width in (4, 8):
        save_file({"emb_params": torch.zeros(1, width)}, embedding)
        cells = Cells(tmp_path, comparison(prompts=("in embedding:ink, a cat", "a cat")))
        names.append([cells.path((row, 0, 0, 0, 0)).name for row in range(2)])
    assert names[0][0] != names[1][0]
    assert names[0][1] == names[1][1]
