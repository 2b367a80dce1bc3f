"""Validation Settings in a real ComfyUI: its pictures are those of a KSampler with the LoRA."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comfy_server import ComfyServer, Event, GraphError
from graphs import (
    WATCHED,
    Graph,
    node,
    train_graph,
    validated,
    write_base,
    write_pictures,
)
from PIL import Image


@pytest.fixture(scope="module")
def pictures(server: ComfyServer) -> str:
    write_base(server.base_directory / "models")
    write_pictures(server.base_directory / "input" / "validated", 5)
    return "validated"


def run_folder(server: ComfyServer, entry: dict) -> Path:
    (run_id,) = entry["outputs"]["train"]["atelier_run"]
    return server.base_directory / "output" / "atelier" / run_id


def strip(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "samples" / "samples.json").read_text(encoding="utf-8"))


def picture(folder: Path, step: int, key: str) -> np.ndarray:
    return np.asarray(Image.open(folder / "samples" / f"step-{step:06d}-{key}.png"))


def steps_drawn(folder: Path, key: str) -> list[int]:
    paths = (folder / "samples").glob(f"step-*-{key}.png")
    return sorted(int(path.name.split("-")[1]) for path in paths)


def sampled_by_core(
    server: ComfyServer, lora: str | None, prompt: str, size: tuple[int, int], **changed: Any
) -> np.ndarray:
    """Core's LoRA loader, CLIP Text Encode, FluxGuidance, KSampler, VAE Decode and Save Image."""
    settings = {**WATCHED, **changed}
    graph = train_graph("unused", sampling=False)
    graph = {name: graph[name] for name in ("load", "nano")}
    model = ["load", 0]
    if lora is not None:
        graph["lora"] = node("LoraLoaderModelOnly", model=model, lora_name=lora, strength_model=1.0)
        model = ["lora", 0]
    for name, text in {"positive": prompt, "negative": settings["negative"]}.items():
        graph[f"{name}.text"] = node("CLIPTextEncode", clip=["nano", 1], text=text)
        graph[name] = node(
            "FluxGuidance", conditioning=[f"{name}.text", 0], guidance=settings["guidance"]
        )
    graph |= {
        "empty": node("EmptySD3LatentImage", width=size[0], height=size[1], batch_size=1),
        "sampler": node(
            "KSampler",
            model=model,
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["empty", 0],
            denoise=1.0,
            **{name: settings[name] for name in ("seed", "steps", "cfg", "scheduler")},
            sampler_name=settings["sampler_name"],
        ),
        "decode": node("VAEDecode", samples=["sampler", 0], vae=["nano", 2]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="core"),
    }
    (image,) = server.run(graph)["outputs"]["save"]["images"]
    return np.asarray(Image.open(io.BytesIO(server.view(image))))


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"sampler_name": "dpmpp_2m", "scheduler": "beta", "steps": 3, "seed": 2**53 - 1},
        {"cfg": 3.0, "negative": "a blue circle", "guidance": 1.0},
        {"sampler_name": "euler_ancestral", "scheduler": "normal", "cfg": 2.0, "sizes": "96x64"},
    ],
    ids=["defaults", "sampler", "cfg", "ancestral"],
)
def test_pictures_are_those_of_a_ksampler_with_the_saved_lora(
    server: ComfyServer, pictures: str, changed: dict[str, Any]
) -> None:
    """Of the start, of a checkpoint in the middle and of the end, to the bit."""
    train = {"name": "same", "checkpoint_every": 2}
    entry = server.run(validated(pictures, train=train, **changed))
    folder = run_folder(server, entry)
    (sample,) = strip(folder)
    assert steps_drawn(folder, sample["key"]) == [0, 2, 3]
    shorter = server.run(train_graph(pictures, sampling=False, length=2, **train))
    names = {step: run["outputs"]["name"]["text"][0] for step, run in ((2, shorter), (3, entry))}
    assert names[2].endswith("-2.safetensors")
    size = (sample["width"], sample["height"])
    drawn = []
    for step in (0, 2, 3):
        lora = names.get(step)
        drawn.append(picture(folder, step, sample["key"]))
        expected = sampled_by_core(server, lora, "a red circle", size, **changed)
        assert np.array_equal(drawn[-1], expected)
    assert not np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[1], drawn[2])
    shown = [server.view(image) for image in entry["outputs"]["samples"]["images"]]
    assert len(shown) == 3
    for one, expected in zip(shown, drawn, strict=True):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(one))), expected)


def test_lines_and_a_library_in_several_sizes(server: ComfyServer, pictures: str) -> None:
    """One picture of each prompt in each size, listed with its name; a prompt twice is one."""
    library = {"blue": "a blue circle", "bear": "ein Bär, 熊", "again": "a red circle"}
    path = server.base_directory / "input" / "library.json"
    path.write_text(json.dumps(library, ensure_ascii=False), encoding="utf-8")
    graph = validated(
        pictures,
        train={"name": "library", "length": 1},
        prompts="a red circle\n\n  a green circle ",
        library="library.json",
        sizes="64x64, 96x64",
    )
    entry = server.run(graph)
    folder = run_folder(server, entry)
    found = [(one["prompt"], one["width"], one["height"]) for one in strip(folder)]
    prompts = ["a red circle", "a green circle", "a blue circle", "ein Bär, 熊"]
    assert found == [(prompt, w, 64) for prompt in prompts for w in (64, 96)]
    assert [one["name"] for one in strip(folder)][2:6:2] == ["a green circle", "blue"]
    for one in strip(folder):
        assert picture(folder, 1, one["key"]).shape == (64, one["width"], 3)
        assert steps_drawn(folder, one["key"]) == [0, 1]
    sizes = {
        Image.open(io.BytesIO(server.view(image))).size
        for image in entry["outputs"]["samples"]["images"]
    }
    assert sizes == {(64, 64)}  # an IMAGE has one size: the first
    expected = sampled_by_core(server, entry["outputs"]["name"]["text"][0], "ein Bär, 熊", (96, 64))
    assert np.array_equal(picture(folder, 1, strip(folder)[-1]["key"]), expected)


@pytest.mark.parametrize(
    ("changed", "steps"),
    [
        ({"at_start": False, "every": 0}, [3]),
        ({"at_end": False}, [0, 2]),
        ({"at_start": False, "at_end": False}, [2]),
        ({"unit": "epochs", "every": 1}, [0, 3]),  # five pictures in batches of two
        ({"at_start": False, "at_end": False, "every": 0}, [3]),  # its output must be something
    ],
    ids=["end", "start", "between", "epochs", "never"],
)
def test_when_pictures_are_drawn(
    server: ComfyServer, pictures: str, changed: dict[str, Any], steps: list[int]
) -> None:
    name = f"when {len(steps)} {'-'.join(map(str, changed.values()))}"
    entry = server.run(validated(pictures, train={"name": name}, **changed))
    folder = run_folder(server, entry)
    (sample,) = strip(folder)
    assert steps_drawn(folder, sample["key"]) == steps
    assert len(entry["outputs"]["samples"]["images"]) == len(steps)


def test_changed_prompts_are_drawn_from_the_checkpoints_of_a_finished_run(
    server: ComfyServer, pictures: str
) -> None:
    """As if they had been there from the start, and nothing is trained."""
    train = {"length": 5, "checkpoint_every": 2}
    whole = server.run(
        validated(pictures, train={"name": "whole", **train}, prompts="a blue circle")
    )
    train["name"] = "changed"
    folder = run_folder(server, server.run(validated(pictures, train=train)))
    (first,) = strip(folder)
    trained = ["metrics.jsonl", "status.json", "run.json", *_files(folder / "checkpoints")]
    before = {name: (folder / name).stat().st_mtime_ns for name in trained if "status" not in name}
    metrics = (folder / "metrics.jsonl").read_bytes()
    events: list[Event] = []
    server.run(validated(pictures, train=train, prompts="a blue circle"), events.append)
    assert not [event for event in events if event.type == "atelier.step"]
    assert (folder / "metrics.jsonl").read_bytes() == metrics
    assert {name: (folder / name).stat().st_mtime_ns for name in before} == before
    (second,) = strip(folder)
    assert (second["prompt"], second["key"] != first["key"]) == ("a blue circle", True)
    other = run_folder(server, whole)
    assert steps_drawn(folder, second["key"]) == [0, 2, 4, 5] == steps_drawn(other, second["key"])
    for step in (0, 2, 4, 5):
        expected = picture(other, step, second["key"])
        assert np.array_equal(picture(folder, step, second["key"]), expected)
    assert steps_drawn(folder, first["key"]) == [0, 2, 4, 5]
    server.run(validated(pictures, train=train, prompts="a red circle", steps=2))
    assert strip(folder) == [first]  # and back again


def _files(folder: Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return [path.relative_to(folder.parent).as_posix() for path in paths]


def held_out(server: ComfyServer, graph: Graph, folder: str) -> Graph:
    """The same graph with held out pictures of a folder."""
    data = {**graph["data"]["inputs"], "folder": folder}
    graph |= {
        "other": node("AtelierImageFolderDataset", **data),
        "other latents": node(
            "AtelierCacheLatents", dataset=["other", 0], vae=["nano", 2], batch_size=1
        ),
        "other prompts": node(
            "AtelierEncodePrompts", dataset=["other", 0], clip=["nano", 1], length=77
        ),
    }
    graph["validation"]["inputs"] |= {
        "held_out_latents": ["other latents", 0],
        "held_out_prompts": ["other prompts", 0],
    }
    return graph


def lines(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_the_loss_on_held_out_pictures_is_measured_without_sample_pictures(
    server: ComfyServer, pictures: str
) -> None:
    write_pictures(server.base_directory / "input" / "held out", 2, size=96)
    nothing = {"prompts": "", "clip": None, "vae": None}
    train = {"name": "eval", "checkpoint_every": 1, "keep_checkpoints": 1}
    graph = held_out(server, validated(pictures, train=train, **nothing), "held out")
    events: list[Event] = []
    folder = run_folder(server, server.run(graph, events.append))
    measured = {line["step"]: line["eval_loss"] for line in lines(folder) if "eval_loss" in line}
    assert list(measured) == [0, 2, 3]
    assert len({*measured.values()}) == 3
    best = min(measured, key=measured.__getitem__)
    kept = {path.name for path in (folder / "checkpoints").iterdir()}
    assert kept == {f"step-{step:06d}" for step in {best, 3} - {0}}
    texts = [event.data["text"] for event in events if event.type == "progress_text"]
    assert not [text for text in texts if "learns by heart" in text]
    plain = server.run(train_graph(pictures, sampling=False, name="no eval"))
    plain_lines = lines(run_folder(server, plain))
    assert [line["loss"] for line in plain_lines] == [
        line["loss"] for line in lines(folder) if "loss" in line
    ]


def test_pictures_that_are_held_out_and_trained_are_told(
    server: ComfyServer, pictures: str
) -> None:
    graph = held_out(server, validated(pictures, train={"name": "overlap"}), pictures)
    events: list[Event] = []
    server.run(graph, events.append)
    texts = "\n".join(event.data["text"] for event in events if event.type == "progress_text")
    assert "5 of the held out pictures are trained too: the loss on them also falls when" in texts


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"clip": None}, "has prompts and no clip to encode them: connect its clip input"),
        ({"vae": None}, "has prompts and no vae to draw their pictures: connect its vae input"),
        ({"sizes": "64x72"}, "must be multiples of 16 between 64 and 8192, got 64x72"),
        ({"sizes": "64x64, 48x64"}, "must be multiples of 16 between 64 and 8192, got 48x64"),
        ({"sizes": "64x64; 96x64"}, "is no size. Write sizes as width x height"),
        ({"sizes": "large"}, "'large' is no size. Write sizes as width x height"),
        ({"held_out_latents": ["latents", 0]}, "needs both held_out_latents and held_out_prompts"),
        ({"held_out_prompts": ["prompts", 0]}, "needs both held_out_latents and held_out_prompts"),
        ({"score_clip": ["nano", 1]}, "needs both score_vision and score_clip"),
        ({"library": "broken.json"}, "The prompt library 'broken.json' cannot be read: "),
        ({"library": "list.json"}, "'list.json' is not a prompt library. It must be a JSON object"),
        ({"library": "gone.json"}, "The file 'gone.json' is not below "),
        ({"library": "../secret.json"}, "The file '../secret.json' is not below "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_mistake_is_one_sentence(
    server: ComfyServer, pictures: str, changed: dict[str, Any], message: str
) -> None:
    files = server.base_directory / "input"
    (files / "broken.json").write_text('{"a": ', encoding="utf-8")
    (files / "list.json").write_text('["a"]', encoding="utf-8")
    with pytest.raises(GraphError) as caught:
        server.run(validated(pictures, train={"name": "mistake"}, **changed))
    assert message in str(caught.value)
    assert not list((server.base_directory / "output" / "atelier").glob("mistake-*"))


@pytest.mark.parametrize("name", ["vae", "positive", "both"])
def test_a_validation_beside_a_prompt_of_its_own_is_one_sentence(
    server: ComfyServer, pictures: str, name: str
) -> None:
    graph = validated(pictures, train={"name": "mistake"})
    given = {"vae": ["nano", 2], "positive": ["text", 0]}
    graph["text"] = node("CLIPTextEncode", clip=["nano", 1], text="a red circle")
    graph["train"]["inputs"] |= given if name == "both" else {name: given[name]}
    with pytest.raises(GraphError, match=r"Train LoRA has a validation, .* Disconnect vae and pos"):
        server.run(graph)
    assert not list((server.base_directory / "output" / "atelier").glob("mistake-*"))
