"""The main line in a real ComfyUI: load, cache, train, apply, sample, through the API queue."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from comfy_server import ComfyServer, Event, GraphError
from flux_files import write_flux
from graphs import node, sampled, train_graph, write_base, write_pictures
from PIL import Image
from safetensors.numpy import load_file, save_file


@pytest.fixture(scope="module")
def pictures(server: ComfyServer) -> str:
    write_base(server.base_directory / "models")
    write_pictures(server.base_directory / "input" / "circles")
    return "circles"


def pixels(server: ComfyServer, entry: dict, node_id: str) -> list[np.ndarray]:
    images = entry["outputs"][node_id]["images"]
    return [np.asarray(Image.open(io.BytesIO(server.view(image)))) for image in images]


def run_folder(server: ComfyServer, lora_name: str):
    run = lora_name.rpartition("-")[0]  # what follows is the number of steps
    return server.base_directory / "output" / "atelier" / run


def test_a_graph_trains_a_lora_and_samples_with_it(server: ComfyServer, pictures: str) -> None:
    graph = train_graph(pictures, name="main", sample_every=2)
    graph |= sampled("before", ["load", 0])
    graph |= {
        "lora": node(
            "AtelierApplyLoRA",
            model=["load", 0],
            lora_name="from the lora input",
            strength=1.0,
            lora=["train", 0],
        ),
        **sampled("applied", ["lora", 0]),
    }
    entry = server.run(graph)
    before, after = pixels(server, entry, "before.save")[0], pixels(server, entry, "after.save")[0]
    applied = pixels(server, entry, "applied.save")[0]
    samples = pixels(server, entry, "samples")
    assert before.shape == (64, 64, 3)
    assert not np.array_equal(before, after)
    assert np.array_equal(after, applied)
    # Steps 0, 2 and 3; a KSampler with the same seed gives the pictures of the first and the last.
    assert len(samples) == 3
    assert np.array_equal(samples[0], before)
    assert np.array_equal(samples[-1], after)


def test_the_saved_lora_is_listed_and_the_core_loader_gives_the_same_picture(
    server: ComfyServer, pictures: str
) -> None:
    graph = train_graph(pictures, name="listed")
    entry = server.run(graph)
    name = entry["outputs"]["name"]["text"][0]
    listed = server.object_info()["LoraLoaderModelOnly"]["input"]["required"]["lora_name"][0]
    assert name in listed
    core = {key: graph[key] for key in ("load", "nano", "text", "guided", "empty")}
    core["lora"] = node(
        "LoraLoaderModelOnly", model=["load", 0], lora_name=name, strength_model=1.0
    )
    core |= sampled("core", ["lora", 0])
    loaded = pixels(server, server.run(core), "core.save")[0]
    assert np.array_equal(loaded, pixels(server, entry, "after.save")[0])


def test_the_same_graph_queued_again_trains_nothing(server: ComfyServer, pictures: str) -> None:
    graph = train_graph(pictures, name="queued twice", sampling=False)
    name = server.run(graph)["outputs"]["name"]["text"][0]
    metrics = run_folder(server, name) / "metrics.jsonl"
    first = metrics.read_text()
    graph["train"]["inputs"]["checkpoint_every"] = 100  # another node input, the same run
    assert server.run(graph)["outputs"]["name"]["text"][0] == name
    assert metrics.read_text() == first


@pytest.mark.slow
def test_a_comfyui_that_keeps_no_outputs_trains_once_and_samples_twice(
    server_without_caches: ComfyServer,
) -> None:
    server = server_without_caches
    write_base(server.base_directory / "models")
    write_pictures(server.base_directory / "input" / "circles")
    graph = train_graph("circles", name="forgotten", sample_every=2)
    entries, metrics = [], []
    for _ in range(2):
        entries.append(server.run(graph))
        name = entries[-1]["outputs"]["name"]["text"][0]
        metrics.append((run_folder(server, name) / "metrics.jsonl").read_text())
    assert metrics[0] == metrics[1]
    first, second = (pixels(server, entry, "after.save")[0] for entry in entries)
    samples = pixels(server, entries[0], "samples")
    assert np.array_equal(first, samples[-1])
    assert not np.array_equal(first, samples[0])
    assert np.array_equal(second, first)


def test_a_cancelled_run_goes_on_and_ends_as_an_uninterrupted_one(
    server: ComfyServer, pictures: str
) -> None:
    whole = train_graph(pictures, name="whole", sampling=False, length=40, seed=5)
    whole_name = server.run(whole)["outputs"]["name"]["text"][0]
    # Another name alone is the same computation in another folder.
    halted = train_graph(pictures, name="halted", sampling=False, length=40, seed=5)

    def cancel(event) -> None:
        # Whichever step it names: newer ComfyUI sends at most ten of these a second.
        if event.type == "progress" and event.data["node"] == "train":
            server.interrupt()

    with pytest.raises(GraphError):
        server.run(halted, cancel)
    folder = run_folder(server, whole_name.replace("whole", "halted"))
    saved = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert saved
    assert saved[-1] < "step-000040"
    halted_name = server.run(halted)["outputs"]["name"]["text"][0]
    loras = server.base_directory / "output" / "loras"
    one, other = load_file(loras / whole_name), load_file(loras / halted_name)
    assert all(np.array_equal(one[key], other[key]) for key in one)


def test_the_job_file_trains_the_same_weights_without_comfyui(
    server: ComfyServer, pictures: str, tmp_path
) -> None:
    from atelier.trainers.hooks import Hooks
    from atelier.trainers.job import read_job, run_job

    graph = train_graph(pictures, name="headless", sampling=False)
    name = server.run(graph)["outputs"]["name"]["text"][0]
    job = read_job(run_folder(server, name) / "job.json")
    path = run_job(job, tmp_path, Hooks())
    mine = load_file(server.base_directory / "output" / "loras" / name)
    headless = load_file(path)
    assert mine.keys() == headless.keys()
    assert all(np.array_equal(mine[key], headless[key]) for key in mine)


@pytest.mark.parametrize("streaming", ["off", "ram", "disk"])
def test_streamed_blocks_train_the_same_lora(
    server: ComfyServer, pictures: str, tmp_path: Path, streaming: str
) -> None:
    from atelier.trainers.hooks import Hooks
    from atelier.trainers.job import read_job, run_job

    loras = server.base_directory / "output" / "loras"
    names = []
    for choice in ("auto", streaming):
        name = f"streamed {choice} {streaming}"
        graph = train_graph(pictures, name=name, sample_every=2)
        graph["load"]["inputs"]["block_streaming"] = choice
        graph["train"]["inputs"]["activations_in_ram"] = choice != "auto"
        entry = server.run(graph)
        names.append(entry["outputs"]["name"]["text"][0])
    whole, streamed = (load_file(loras / name) for name in names)
    job = read_job(run_folder(server, names[1]) / "job.json")
    assert (job.block_streaming, job.settings.activations_in_ram) == (streaming, True)
    headless = load_file(run_job(job, tmp_path, Hooks()))
    assert whole.keys() == streamed.keys() == headless.keys()
    for key, tensor in whole.items():
        assert np.array_equal(streamed[key], tensor)
        assert np.array_equal(headless[key], tensor)


def test_pages_hear_of_every_step_and_of_the_state(server: ComfyServer, pictures: str) -> None:
    """The events carry the same numbers as the run's metrics, each step once and in order."""
    events: list[Event] = []
    graph = train_graph(pictures, name="shown", sample_every=2, seed=9)
    entry = server.run(graph, events.append)
    folder = run_folder(server, entry["outputs"]["name"]["text"][0])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [event.data for event in events if event.type == "atelier.step"]
    for name in ("step", "loss", "grad_norm", "learning_rate", "seconds", "memory", "ram"):
        told = [value for data in steps for value in data["metrics"][name]]
        assert told == [line[name] for line in lines]
    assert {data["run"] for data in steps} == {folder.name}
    assert {data["node"] for data in steps} == {"train"}
    assert steps[-1]["seconds_left"] == 0
    states = [event.data["state"] for event in events if event.type == "atelier.run"]
    assert states[0] == "training"
    assert "finished" in states
    previews = [event.data for event in events if event.type == "atelier.preview"]
    assert previews
    assert all(data["picture"].startswith("data:image/jpeg;base64,") for data in previews)
    assert entry["outputs"]["train"]["atelier_run"] == [folder.name]


def test_text_encoders_of_another_model_are_one_sentence(
    server: ComfyServer, pictures: str
) -> None:
    write_flux(
        server.base_directory / "models" / "diffusion_models" / "other.safetensors", context=192
    )
    graph = train_graph(pictures, name="widths", sampling=False)
    graph["load"]["inputs"]["model"] = "other.safetensors"
    with pytest.raises(GraphError, match="widths 128 and 64; this model needs 192"):
        server.run(graph)
    assert not list((server.base_directory / "output" / "atelier").glob("widths-*"))


def test_samples_need_both_of_their_inputs(server: ComfyServer, pictures: str) -> None:
    graph = train_graph(pictures, name="half")
    del graph["train"]["inputs"]["positive"]
    with pytest.raises(GraphError, match="need both the vae and the positive input"):
        server.run(graph)


def apply_lora(server: ComfyServer, model: str, tensors: dict[str, np.ndarray]) -> dict:
    """A graph that samples `model` with a LoRA file of these tensors."""
    folder = server.base_directory / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "given.safetensors")
    graph = train_graph("unused")
    graph["load"]["inputs"]["model"] = model
    graph["lora"] = node(
        "AtelierApplyLoRA", model=["load", 0], lora_name="given.safetensors", strength=1.0
    )
    kept = {key: graph[key] for key in ("load", "nano", "text", "guided", "empty", "lora")}
    return kept | sampled("out", ["lora", 0])


def one_lora(module: str, width: int) -> dict[str, np.ndarray]:
    return {
        f"{module}.lora_A.weight": np.ones((2, width), np.float32),
        f"{module}.lora_B.weight": np.ones((width, 2), np.float32),
    }


@pytest.mark.parametrize(
    ("module", "width", "message"),
    [
        ("transformer.transformer_blocks.0.attn.to_q", 384, "was made for another model"),
        ("lora_unet_input_blocks_1_1_proj_in", 256, "changes nothing in this MODEL"),
    ],
)
def test_a_lora_of_another_model_is_one_sentence(
    server: ComfyServer, pictures: str, module: str, width: int, message: str
) -> None:
    with pytest.raises(GraphError, match=message):
        server.run(apply_lora(server, "tiny.safetensors", one_lora(module, width)))


def test_a_lora_of_this_model_samples(server: ComfyServer, pictures: str) -> None:
    module = "transformer.transformer_blocks.0.attn.to_q"
    assert server.run(apply_lora(server, "tiny.safetensors", one_lora(module, 256)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "../escape"}, "cannot be a file name"),
        ({"name": ""}, "cannot be a file name"),
    ],
)
def test_a_wrong_setting_is_one_sentence_in_the_error_box(
    server: ComfyServer, pictures: str, change: dict, message: str
) -> None:
    with pytest.raises(GraphError, match=message):
        server.run(train_graph(pictures, sampling=False, **change))
