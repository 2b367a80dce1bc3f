"""What Train LoRA says and does around the loop, in ComfyUI's own modules, in this process."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.model_management
import executor
import folder_paths
import pytest
import torch
from atelier.nodes import host
from atelier.nodes.native import build_model
from atelier.nodes.session import Asker, Session
from atelier.nodes.train import TrainLora
from atelier.nodes.validation import Validation
from atelier.trainers.config import JobSettings, Length, LoraSettings, TrainSettings
from atelier.trainers.data import TrainingData
from atelier.trainers.devices import describe_device
from atelier.trainers.load import load_flux
from atelier.trainers.memory import Workload, estimate_training
from atelier.trainers.rhythm import NEVER
from core_flux import core_model
from executor import Give, Keep, Runner
from flux_files import write_flux
from graphs import node
from training import TEXT_TOKENS, training_data

LORA = LoraSettings(rank=4)
NO_SAMPLES = Validation(rhythm=NEVER)
ASKER = Asker(node_id="1")


def job(num_steps: int = 3, *, activations_in_ram: bool = False, **settings: Any) -> JobSettings:
    values = {"gradient_accumulation": 1, "batch_size": 2, "compute_dtype": "fp32", **settings}
    return JobSettings(
        name="test",
        length=Length(amount=num_steps),
        lora=LORA,
        train=TrainSettings(**values),
        activations_in_ram=activations_in_ram,
    )


@pytest.fixture
def data(tmp_path: Path) -> TrainingData:
    return training_data(tmp_path / "caches")


@pytest.fixture
def model(tmp_path: Path) -> Any:
    return flux(tmp_path)


def flux(tmp_path: Path, **sizes: Any) -> Any:
    path = write_flux(tmp_path / "flux.safetensors", **sizes)
    return build_model(load_flux(path, format="nf4"), torch.float32)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The lines of every text that was shown on the node; there is no browser here."""
    texts: list[list[str]] = []
    monkeypatch.setattr(host, "show_text", lambda text, node_id: texts.append(text.splitlines()))
    return texts


@pytest.fixture(autouse=True)
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    yield tmp_path / "output"
    comfy.model_management.unload_all_models()
    executor.forget_networks()


def test_the_start_says_epochs_resuming_and_memory(
    model: Any, data: TrainingData, shown: list[list[str]]
) -> None:
    """Four pictures in batches of two: two steps are an epoch."""
    for num_steps, said in ((2, "2 steps = 1.0 epochs."), (3, "3 steps = 1.5 epochs.")):
        Session(model, data, job(num_steps), ASKER, NO_SAMPLES).train()
        epochs, *resumed, takes, fits, device = shown[0]
        assert epochs == said
        assert resumed == (["The run goes on from step 2."] if num_steps == 3 else [])
        assert takes.startswith("The training takes 0.")
        assert fits.startswith("It fits: ")
        assert device == describe_device(torch.device("cpu"))
        shown.clear()
    Session(model, data, job(3), ASKER, NO_SAMPLES).train()
    assert shown == [["3 steps = 1.5 epochs."]]  # answered from disk


@pytest.mark.parametrize(
    ("changed", "guidance_in_model", "expected"),
    [
        ({}, False, None),
        ({"guidance": 3.5}, True, None),
        ({"guidance": 3.5}, False, "The setting guidance has no effect: "),
        ({"activations_in_ram": True}, True, "The setting activations_in_ram has no "),
    ],
    ids=["defaults", "dev", "schnell", "cpu"],
)
def test_a_setting_without_effect_is_told(
    tmp_path: Path,
    data: TrainingData,
    shown: list[list[str]],
    changed: dict[str, Any],
    guidance_in_model: bool,
    expected: str | None,
) -> None:
    model = flux(tmp_path, guidance=guidance_in_model)
    Session(model, data, job(1, **changed), ASKER, NO_SAMPLES).train()
    warnings = [line for line in shown[0] if " no effect: " in line]
    assert len(warnings) == (0 if expected is None else 1)
    assert all(line.startswith(expected) for line in warnings if expected)


def needed(batch_size: int, model: Any) -> int:
    """Bytes beside the weights of a training on pictures of 64x64."""
    workload = Workload(
        width=64,
        height=64,
        prompt_length=TEXT_TOKENS,
        batch_size=batch_size,
        lora=LORA,
        dtype=torch.float32,
        gradient_checkpointing=True,
        accumulates=False,
    )
    return estimate_training(model.model.atelier.config, "nf4", workload).beside_weights


def test_a_training_that_cannot_fit_is_refused_before_it_begins(
    model: Any, data: TrainingData, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through ComfyUI's executor; the machine has just what a batch of 1 needs."""
    import nodes

    for kind, name in {Give: "Give", Keep: "Keep", TrainLora: "AtelierTrainLoRA"}.items():
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, name, kind)
    values = {"model": model, "latents": data.latents, "prompts": data.prompts}
    monkeypatch.setattr(Give, "values", values)
    declared = TrainLora.GET_SCHEMA().inputs
    inputs = {one.id: one.default for one in declared if getattr(one, "default", None) is not None}
    inputs |= {"length": 1, "compute_dtype": "fp32", "gradient_accumulation": 1, "batch_size": 4}
    inputs |= {name: [name, 0] for name in values}
    graph = {name: node("Give", name=name) for name in values}
    graph["train"] = node("AtelierTrainLoRA", **inputs)
    graph["keep"] = node("Keep", value=["train", 2])
    monkeypatch.setattr(host, "free_memory", lambda: needed(1, model))
    with pytest.raises(RuntimeError) as caught:
        Runner().run(graph)
    first, *others = str(caught.value).strip().splitlines()
    assert first.startswith("This training does not fit: 0.")
    assert any(line.startswith("With a batch size of 1 ") for line in others)
    assert not output.exists()
    graph["train"]["inputs"]["batch_size"] = 1
    assert (output / "loras" / Runner().run(graph)).is_file()


def test_out_of_memory_of_a_core_model_names_no_setting_that_it_lacks(
    data: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out() -> None:
        raise comfy.model_management.OOM_EXCEPTION("CUDA out of memory")

    monkeypatch.setattr(host, "check_interrupted", run_out)
    with pytest.raises(ValueError, match=r"^The GPU's memory is not enough") as caught:
        Session(core_model("bf16"), data, job(), ASKER, NO_SAMPLES).train()
    kept, new = str(caught.value).split("Or start a new run: ")
    assert "Load Quantized FLUX" not in kept
    assert "loaded by Load Quantized FLUX in fewer bits" in new


def test_out_of_memory_is_one_sentence_and_the_run_goes_on(
    model: Any, data: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device's error in the third step: two are kept, and no byte of the base changes (I2)."""
    store, micro_steps = model.model.atelier.store, iter(range(100))
    before = store.content_hash()

    def run_out() -> None:
        if next(micro_steps) == 2:
            raise comfy.model_management.OOM_EXCEPTION("CUDA out of memory")

    with monkeypatch.context() as little:
        little.setattr(host, "check_interrupted", run_out)
        with pytest.raises(ValueError, match=r"^The GPU's memory is not enough .* is saved\. Turn"):
            Session(model, data, job(), ASKER, NO_SAMPLES).train()
    assert store.content_hash() == before
    starts = []
    session = Session(model, data, job(), ASKER, NO_SAMPLES)
    monkeypatch.setattr(host, "show_text", lambda text, node_id: starts.append(text))
    resumed = session.train()
    assert "The run goes on from step 2." in starts[0]
    other = dataclasses.replace(job(), name="unbroken")
    unbroken = Session(model, data, other, ASKER, NO_SAMPLES).train()
    assert resumed.losses == unbroken.losses
    assert store.content_hash() == before
