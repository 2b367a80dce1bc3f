"""What Train LoRA says and does around the loop, in ComfyUI's own modules, in this process."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.model_management
import executor
import folder_paths
import pytest
import torch
from atelier.nodes import host, live
from atelier.nodes.native import build_model
from atelier.nodes.native_attention import with_attention
from atelier.nodes.native_lora import add_lora
from atelier.nodes.sampling import draw_latents, encode_prompt
from atelier.nodes.session import Asker, Session
from atelier.nodes.train import TrainLora
from atelier.nodes.validation import EncodedPrompt, Sampler, Validation
from atelier.trainers.config import JobSettings, Length, TrainSettings
from atelier.trainers.control import Request
from atelier.trainers.data import TrainingData
from atelier.trainers.devices import describe_device
from atelier.trainers.flow_settings import FlowSettings
from atelier.trainers.load import load_flux
from atelier.trainers.lora_file import lora_facts
from atelier.trainers.lora_settings import LoraSettings
from atelier.trainers.memory import Workload, estimate_training
from atelier.trainers.preservation_settings import PreservationSettings
from atelier.trainers.rhythm import NEVER, Rhythm
from atelier.trainers.status import Status, read_status
from core_flux import core_model
from executor import Give, Keep, Runner, nano_clip, nano_vae
from flux_files import write_flux
from graphs import node
from small_disk import fill, small_disk
from training import TEXT_TOKENS, training_data, write_entries

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
        epochs, *resumed, base, size, takes, fits, device = shown[0]
        assert epochs == said
        assert resumed == (["The run goes on from step 2."] if num_steps == 3 else [])
        assert base.startswith("The base model is of FLUX.1-dev's kind: ")
        assert size == "The LoRA learns 0.01 million numbers on 7 layers."
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
        ({"flow": FlowSettings(guidance_max=4.0)}, False, "The setting guidance_max has no "),
        ({"activations_in_ram": True}, True, "The setting activations_in_ram has no "),
        (
            {"preservation": PreservationSettings(class_weight=2)},
            True,
            "The setting class_weight has no effect: there is no trigger.",
        ),
    ],
    ids=["defaults", "dev", "schnell", "range", "cpu", "no trigger"],
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


@pytest.mark.parametrize(
    ("captions", "samples", "is_told"),
    [(True, False, True), (True, True, False), (False, False, False)],
)
def test_samples_that_see_the_padding_that_captions_hide_are_told(
    tmp_path: Path,
    model: Any,
    data: TrainingData,
    shown: list[list[str]],
    captions: bool,
    samples: bool,
    is_told: bool,
) -> None:
    positive = encode_prompt(nano_clip(), "a cat", 2.5, hides_padding=samples)
    prompt = EncodedPrompt(name="cat", text="a cat", positive=positive, negative=positive)
    drawn = dataclasses.replace(watched(), prompts=(prompt,), rhythm=NEVER)
    if captions:
        write_entries(
            tmp_path / "caches", {"mask": {"mask": torch.ones(TEXT_TOKENS, dtype=torch.uint8)}}
        )
        entries = tuple(dataclasses.replace(e, mask="mask") for e in data.prompts.entries)
        prompts = dataclasses.replace(data.prompts, entries=entries)
        data = dataclasses.replace(data, prompts=prompts)
    Session(model, data, job(1), ASKER, drawn).train()
    assert any("(Hidden Padding)" in line for line in shown[0]) == is_told


def test_a_held_out_loss_without_progress_is_told_below_the_start(
    model: Any, data: TrainingData, shown: list[list[str]]
) -> None:
    watched = Validation(rhythm=Rhythm(every=1, at_start=True), held_out=data)
    Session(model, data, job(5, learning_rate=1e-50), ASKER, watched).train()
    start, told = shown
    assert told[:-1] == start
    assert "not once below that of the start in 5 evaluations" in told[-1]


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


def watched(*texts: str, every: int = 1) -> Validation:
    prompts = [
        EncodedPrompt(
            name=text,
            text=text,
            positive=encode_prompt(nano_clip(), text, 2.5),
            negative=encode_prompt(nano_clip(), "", 2.5),
        )
        for text in texts
    ]
    return Validation(
        rhythm=Rhythm(every=every),
        vae=nano_vae(),
        prompts=tuple(prompts),
        sizes=((64, 64),),
        sampler=Sampler(steps=3, seed=5, cfg=2.0),
    )


def status_of(output: Path) -> Status:
    (folder,) = (path.parent for path in output.glob("atelier/*/run.json"))
    found = read_status(folder)
    assert found is not None
    return found


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What pages hear; there is no browser here."""
    heard: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(host, "send_event", lambda name, data: heard.append((name, data)))
    return heard


def test_the_lora_that_a_training_gives_knows_how_it_was_made(
    model: Any, data: TrainingData
) -> None:
    facts = lora_facts(Session(model, data, job(2), ASKER, NO_SAMPLES).train().tensors)
    assert (facts.base_format, facts.rank, facts.alpha) == ("nf4", 4, 4.0)
    assert (facts.steps, facts.guidance, facts.trainer) == (2, 1.0, "Atelier")


def test_latents_are_those_of_a_ksampler_with_the_saved_file(
    model: Any, data: TrainingData, output: Path
) -> None:
    """ComfyUI's own LoRA loading and sampling, in float32, where pictures may hide a difference."""
    import comfy.sd
    import comfy.utils

    from nodes import common_ksampler

    result = Session(model, data, job(), ASKER, NO_SAMPLES).train()
    (prompt,), sampler = watched("a red circle").prompts, Sampler(steps=3, seed=5, cfg=2.0)
    mine = draw_latents(
        add_lora(model, result.tensors, 1.0),
        prompt.positive,
        prompt.negative,
        width=64,
        height=96,
        sampler=sampler,
        show=lambda _: None,
    )
    tensors = comfy.utils.load_torch_file(str(output / "loras" / result.lora_name), safe_load=True)
    loaded, _ = comfy.sd.load_lora_for_models(model, None, tensors, 1.0, 0.0)
    empty = {"samples": torch.zeros(1, 16, 12, 8)}
    (theirs,) = common_ksampler(
        loaded, 5, 3, 2.0, "euler", "simple", prompt.positive, prompt.negative, empty
    )
    assert mine.dtype == torch.float32
    assert mine.std() > 0.1
    assert (mine - theirs["samples"]).abs().max() <= 1e-4


def test_another_attention_backend_draws_pictures_of_its_own(
    model: Any, data: TrainingData, output: Path
) -> None:
    def drawn(on: Any) -> set[str]:
        Session(on, data, job(1), ASKER, watched("one")).train()
        return {path.name for path in output.glob("atelier/*/samples/step-000001-*.png")}

    plain, chosen = drawn(model), drawn(with_attention(model, "sdpa"))
    assert (len(plain), len(chosen)) == (1, 2)
    assert drawn(model) == chosen


def ask_when(output: Path, events: list[tuple[str, dict[str, Any]]], state: str, ask: Any) -> None:
    """In another thread, as soon as pages have heard of the state."""

    def look() -> None:
        while ("atelier.run", state) not in [(n, d.get("state")) for n, d in [*events]]:
            time.sleep(0.02)
        ask()

    threading.Thread(target=look, daemon=True).start()


def asking(monkeypatch: pytest.MonkeyPatch, what: Request, at: int) -> None:
    """The user presses a button after a step."""
    original = live.Reporter.step

    def step(self: live.Reporter, step: Any) -> None:
        original(self, step)
        if step.step == at:
            (run_id,) = live._controls
            control = live.find(run_id)
            assert control is not None
            control.request(what)

    monkeypatch.setattr(live.Reporter, "step", step)


def test_a_paused_training_holds_nothing_on_the_device_and_goes_on(
    model: Any,
    data: TrainingData,
    output: Path,
    events: list[tuple[str, dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    validation = watched("a red circle")
    other = dataclasses.replace(job(), name="unbroken")
    unbroken = Session(model, data, other, ASKER, validation).train()
    events.clear()
    loaded: list[int] = []
    asking(monkeypatch, "pause", at=2)

    def resume() -> None:
        loaded.append(len(comfy.model_management.current_loaded_models))
        (run_id,) = live._controls
        control = live.find(run_id)
        assert control is not None
        control.request("resume")

    ask_when(output, events, "paused", resume)
    resumed = Session(model, data, job(), ASKER, validation).train()
    assert loaded == [0]
    assert resumed.losses == unbroken.losses
    assert all(torch.equal(resumed.tensors[n], t) for n, t in unbroken.tensors.items())
    assert resumed.samples is not None
    assert unbroken.samples is not None
    assert torch.equal(resumed.samples, unbroken.samples)
    states = [data["state"] for name, data in events if name == "atelier.run"]
    changes = [state for n, state in enumerate(states) if not n or state != states[n - 1]]
    assert changes == ["training", "paused", "training", "finished"]
    assert not live._controls


def test_pages_hear_that_a_run_answered_from_disk_was_stopped(
    model: Any,
    data: TrainingData,
    events: list[tuple[str, dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as pressed:
        asking(pressed, "stop", at=1)
        Session(model, data, job(), ASKER, NO_SAMPLES).train()
    events.clear()
    Session(model, data, job(), ASKER, NO_SAMPLES).train()
    assert {data["state"] for name, data in events if name == "atelier.run"} == {"stopped"}


def test_cancel_works_while_paused(
    model: Any,
    data: TrainingData,
    output: Path,
    events: list[tuple[str, dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asking(monkeypatch, "pause", at=2)
    ask_when(output, events, "paused", comfy.model_management.interrupt_current_processing)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        Session(model, data, job(), ASKER, NO_SAMPLES).train()
    status = status_of(output)
    assert (status.state, status.step, status.error) == ("cancelled", 2, None)
    assert Session(model, data, job(), ASKER, NO_SAMPLES).train().losses
    assert status_of(output).state == "finished"


def test_the_sentence_of_an_error_is_that_of_the_run(
    model: Any, data: TrainingData, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out() -> None:
        raise comfy.model_management.OOM_EXCEPTION("CUDA out of memory")

    monkeypatch.setattr(host, "check_interrupted", run_out)
    with pytest.raises(ValueError, match=r"^The GPU's memory is not enough") as caught:
        Session(model, data, job(), ASKER, NO_SAMPLES).train()
    status = status_of(output)
    assert (status.state, status.error) == ("failed", str(caught.value))


def test_a_full_disk_while_a_picture_is_written_keeps_the_run(
    model: Any, data: TrainingData, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third picture has no room. The same graph goes on when there is some."""
    original, calls = nano_vae().decode, iter(range(100))
    with small_disk(output, 16) as disk:

        def decode(latents: torch.Tensor) -> torch.Tensor:
            if next(calls) == 2:
                fill(disk)
            return original(latents)

        validation = watched("a red circle")
        with monkeypatch.context() as full:
            full.setattr(nano_vae(), "decode", decode)
            with pytest.raises(ValueError, match=r"^The disk of .* is full\. Free some space"):
                Session(model, data, job(), ASKER, validation).train()
        (disk / "filler").unlink()
        resumed = Session(model, data, job(), ASKER, validation).train()
        assert status_of(output).state == "finished"
        assert resumed.samples is not None
        assert len(resumed.samples) == 4
        other = dataclasses.replace(job(), name="unbroken")
        unbroken = Session(model, data, other, ASKER, validation).train()
        assert resumed.losses == unbroken.losses
        assert unbroken.samples is not None
        assert torch.equal(resumed.samples, unbroken.samples)
