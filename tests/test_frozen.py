"""LoRAs of the base model: what they compute, that they stay, and that they belong to a run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from atelier.trainers.adapters import Lora, attach_lora
from atelier.trainers.config import JobSettings, Length, TrainSettings
from atelier.trainers.data import TrainingData
from atelier.trainers.flux import build_transformer, recompute_blocks, velocity
from atelier.trainers.formats import FORMATS
from atelier.trainers.frozen import FrozenLora, fingerprint, load_frozen, save_frozen
from atelier.trainers.hooks import Hooks
from atelier.trainers.job import read_job, run_job
from atelier.trainers.load import LoadedFlux, load_flux
from atelier.trainers.loop import open_run, save_trained, train, workload
from atelier.trainers.lora_settings import LoraSettings
from atelier.trainers.memory import estimate_training
from dense import dense_transformer, stored_tensors
from flux_files import write_flux
from frozen_loras import frozen_loras, merged
from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from training import CONTEXT, VECTOR, training_data

CPU = torch.device("cpu")
NO_HOOKS = Hooks()


@pytest.fixture(scope="module")
def flux_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_flux(tmp_path_factory.mktemp("flux") / "flux.safetensors")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    return training_data(tmp_path_factory.mktemp("caches"))


def load(flux_file: Path, format: str = "bf16", **changes: object) -> LoadedFlux:
    base = load_flux(flux_file, format=format)
    return dataclasses.replace(base, **{"frozen": frozen_loras(), **changes})


def forward(transformer) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return velocity(
        transformer,
        torch.randn(2, 16, 8, 4, generator=generator),
        sigma=torch.tensor([0.6, 0.2]),
        prompt_embeds=torch.randn(2, 10, CONTEXT, generator=generator),
        pooled=torch.randn(2, VECTOR, generator=generator),
        guidance=2.0,
    )


def network(base: LoadedFlux):
    return build_transformer(base.store, base.config, torch.float32, base.frozen)


@pytest.mark.parametrize("format", FORMATS)
def test_the_velocity_is_that_of_the_dense_network_with_the_loras_merged(
    flux_file: Path, format: str
) -> None:
    stored = stored_tensors(format)
    with torch.no_grad():
        found = forward(network(load(flux_file, format)))
        expected = forward(dense_transformer(merged(stored, frozen_loras())))
        without = forward(dense_transformer(stored))
    assert torch.max(torch.abs(found - without)) > 0.01
    assert torch.max(torch.abs(found - expected)) <= 1e-5


@pytest.mark.parametrize("lora", frozen_loras(), ids=lambda lora: f"{lora.name} {lora.start}")
def test_each_of_them_counts(flux_file: Path, lora: FrozenLora) -> None:
    larger = dataclasses.replace(lora, scale=5 * lora.scale)
    with torch.no_grad():
        found = forward(network(load(flux_file, frozen=(larger,))))
        expected = forward(dense_transformer(merged(stored_tensors("bf16"), (larger,))))
        without = forward(dense_transformer(stored_tensors("bf16")))
    assert torch.max(torch.abs(found - without)) > 1e-4
    assert torch.max(torch.abs(found - expected)) <= 1e-5


def learning(transformer) -> Lora:
    """A new LoRA on every layer of the blocks, with values as if it had been trained."""
    lora = attach_lora(transformer.train(), LoraSettings(targets="all+ffs"), seed=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in lora.parameters.values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return lora


def pefts_gradients(transformer, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of peft's LoRA with these values."""
    names = sorted({name.rpartition(".lora_")[0] for name in state})
    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=names))
    assert not set_peft_model_state_dict(transformer, state).unexpected_keys
    forward(transformer).square().mean().backward()
    learned = {name: p.grad for name, p in transformer.named_parameters() if p.requires_grad}
    return {name.replace(".default", ""): grad for name, grad in learned.items()}


def gradients(transformer, checkpointing: bool = False) -> dict[str, Tensor]:
    lora = learning(transformer)
    if checkpointing:
        recompute_blocks(transformer)
    forward(transformer).square().mean().backward()
    trained = {id(parameter) for parameter in transformer.parameters() if parameter.requires_grad}
    assert trained == {id(parameter) for parameter in lora.parameters.values()}
    return {name: p.grad for name, p in lora.parameters.items()}  # pyright: ignore


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_merged_network_and_reach_the_new_lora_alone(
    flux_file: Path, checkpointing: bool
) -> None:
    base = load(flux_file)
    before = [tensor.clone() for lora in base.frozen for tensor in (lora.down, lora.up)]
    found = gradients(network(base), checkpointing)
    expected = pefts_gradients(
        dense_transformer(merged(stored_tensors("bf16"), base.frozen)),
        learning(network(load(flux_file))).state(),
    )
    assert found.keys() == expected.keys()
    for name in expected:
        error = torch.linalg.norm(found[name] - expected[name])
        assert error <= 1e-4 * torch.linalg.norm(expected[name]), name
    after = [tensor for lora in base.frozen for tensor in (lora.down, lora.up)]
    assert all(map(torch.equal, before, after))
    assert not any(tensor.requires_grad for tensor in after)


def test_tensors_of_inference_mode_train_too(flux_file: Path) -> None:
    """ComfyUI reads LoRA files in it."""
    with torch.inference_mode():
        loras = frozen_loras()
    assert loras[0].down.is_inference()
    found = gradients(network(load(flux_file, frozen=loras)))
    expected = gradients(network(load(flux_file)))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_streamed_blocks_compute_the_same(flux_file: Path) -> None:
    resident, streamed = load(flux_file, "nf4"), load(flux_file, "nf4")
    streamed.store.place("cpu", 0)
    expected = gradients(network(resident), checkpointing=True)
    found = gradients(network(streamed), checkpointing=True)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_without_loras_nothing_is_computed_beside_the_weights(flux_file: Path) -> None:
    base = load(flux_file, frozen=())
    with torch.no_grad():
        views = forward(build_transformer(base.store, base.config, torch.float32))
        assert torch.equal(forward(network(base)), views)


# ----- runs


def job(num_steps: int = 3, **settings: object) -> JobSettings:
    values = {"learning_rate": 1e-2, "compute_dtype": "fp32", "gradient_accumulation": 2}
    return JobSettings(
        name="test",
        length=Length(amount=num_steps),
        train=TrainSettings(**{**values, **settings}),  # pyright: ignore[reportArgumentType]
    )


def trained(
    root: Path, base: LoadedFlux, data: TrainingData, num_steps: int = 3, hooks: Hooks = NO_HOOKS
):
    run = open_run(root, job(num_steps), base, data)
    return train(run, base, data, job(num_steps), hooks), run


class Stop(BaseException):
    """What a host raises for Cancel."""


def test_a_stopped_run_ends_as_an_unbroken_one(
    flux_file: Path, data: TrainingData, tmp_path: Path
) -> None:
    base = load(flux_file, "nf4")
    before = base.store.content_hash()
    whole, _ = trained(tmp_path / "whole", base, data)
    calls = iter(range(100))

    def stop() -> None:
        if next(calls) == 3:  # within the second step
            raise Stop

    with pytest.raises(Stop):
        trained(tmp_path / "cut", base, data, hooks=Hooks(check_stop=stop))
    again = load(flux_file, "nf4")  # another start of the program
    resumed, run = trained(tmp_path / "cut", again, data)
    assert run.steps_saved() == [1, 3]
    assert resumed.losses == whole.losses
    assert all(torch.equal(resumed.lora[name], whole.lora[name]) for name in whole.lora)
    assert base.store.content_hash() == before


def hash_of(root: Path, base: LoadedFlux, data: TrainingData) -> str:
    return open_run(root, job(), base, data).identity.hash8()


def test_other_loras_are_another_run(flux_file: Path, data: TrainingData, tmp_path: Path) -> None:
    one, *others = frozen_loras()
    changes = [
        (),
        (one,),
        (one, *others),
        (dataclasses.replace(one, scale=one.scale * 0.5), *others),
        (dataclasses.replace(one, start=1), *others),
        (dataclasses.replace(one, name="double_blocks.0.txt_attn.qkv"), *others),
        (dataclasses.replace(one, up=one.up + 1e-6), *others),
        (dataclasses.replace(one, down=one.down.flip(0)), *others),
    ]
    bases = [load(flux_file, frozen=loras) for loras in changes]
    assert len({hash_of(tmp_path, base, data) for base in bases}) == len(changes)
    assert hash_of(tmp_path, load(flux_file), data) == hash_of(tmp_path, bases[2], data)


def test_the_lora_file_holds_only_the_new_lora(
    flux_file: Path, data: TrainingData, tmp_path: Path
) -> None:
    files = []
    for name, loras in {"with": frozen_loras(), "without": ()}.items():
        base = load(flux_file, frozen=loras)
        outcome, run = trained(tmp_path / name, base, data)
        files.append(load_file(save_trained(tmp_path, outcome, run, base)))
    shapes = [{name: tensor.shape for name, tensor in file.items()} for file in files]
    assert shapes[0] == shapes[1]
    assert any(not torch.equal(files[0][name], files[1][name]) for name in files[0])


def test_the_job_file_trains_the_same_again(
    flux_file: Path, data: TrainingData, tmp_path: Path
) -> None:
    outcome, run = trained(tmp_path / "first", load(flux_file), data)
    moved = (tmp_path / "first").rename(tmp_path / "moved") / run.name
    read = read_job(moved / "job.json")
    path = run_job(read, tmp_path / "second", NO_HOOKS)
    assert path.name == f"{run.name}-3.safetensors"  # the same identity
    tensors = load_file(path)
    assert all(
        torch.equal(tensors[f"transformer.{name}"], tensor) for name, tensor in outcome.lora.items()
    )
    assert read_job(tmp_path / "second" / run.name / "job.json").frozen


def test_a_job_file_without_its_loras_is_refused(
    flux_file: Path, data: TrainingData, tmp_path: Path
) -> None:
    _, run = trained(tmp_path, load(flux_file), data, num_steps=1)
    (run.folder / "frozen_loras.safetensors").unlink()
    with pytest.raises(ValueError, match=r"frozen_loras\.safetensors' cannot be read"):
        read_job(run.folder / "job.json")


@pytest.mark.parametrize(
    "metadata",
    [{}, {"loras": "[{"}, {"loras": "3"}, {"loras": '[{"name": "txt_in"}]'}, {"loras": "[[]]"}],
    ids=str,
)
def test_another_file_in_their_place_is_one_sentence_that_names_it(
    flux_file: Path, data: TrainingData, tmp_path: Path, metadata: dict[str, str]
) -> None:
    _, run = trained(tmp_path, load(flux_file), data, num_steps=1)
    other = {"0.down": torch.zeros(4, 128), "0.up": torch.zeros(256, 4)}
    save_file(other, run.folder / "frozen_loras.safetensors", metadata)
    with pytest.raises(ValueError, match=r"^'frozen_loras\.safetensors' does not hold the LoRAs "):
        read_job(run.folder / "job.json")


def test_a_run_without_loras_leaves_what_it_did_before(
    flux_file: Path, data: TrainingData, tmp_path: Path
) -> None:
    _, run = trained(tmp_path, load(flux_file, frozen=()), data, num_steps=1)
    written = {path.name: path.read_text() for path in run.folder.glob("*.json")}
    assert not [path for path in run.folder.rglob("*") if "frozen" in path.name]
    assert not any("frozen" in key for text in written.values() for key in json.loads(text))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_file_gives_them_back(tmp_path: Path, dtype: torch.dtype) -> None:
    loras = frozen_loras(1 / 3, dtype)
    path = tmp_path / "loras.safetensors"
    save_frozen(path, loras)
    found = load_frozen(path)
    for mine, theirs in zip(loras, found, strict=True):
        assert (mine.name, mine.start, mine.scale) == (theirs.name, theirs.start, theirs.scale)
        assert torch.equal(mine.down, theirs.down)
        assert torch.equal(mine.up, theirs.up)
    assert fingerprint(found) == fingerprint(loras)


def test_their_bytes_are_counted_in_what_a_training_takes(
    flux_file: Path, data: TrainingData
) -> None:
    def needed(base: LoadedFlux, compute_dtype: str) -> int:
        work = workload(job(compute_dtype=compute_dtype), base, data, CPU)
        return estimate_training(base.config, base.format, work).total

    base = load(flux_file)
    tensors = [tensor for lora in base.frozen for tensor in (lora.down, lora.up)]
    numbers = sum(tensor.numel() for tensor in tensors)
    for dtype, size in {"fp32": 4, "bf16": 2}.items():
        plain = needed(load(flux_file, frozen=()), dtype)
        assert needed(base, dtype) - plain == size * numbers
