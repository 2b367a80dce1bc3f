"""A run that was chosen to go on with: the same, or in what it differs."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
from atelier.trainers.config import JobSettings
from atelier.trainers.data import TrainingData
from atelier.trainers.load import LoadedFlux, load_flux
from atelier.trainers.loop import open_run, train
from atelier.trainers.lora_settings import LoraSettings
from atelier.trainers.run import Run
from flux_files import write_flux
from frozen_loras import frozen_loras
from runs import assert_same_lora, job
from training import training_data, with_entries

CHOICES = (
    ". Set it back to go on with that run, or set resume to automatic to train a run of its own "
    "beside it."
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("given")


@pytest.fixture(scope="module")
def base(folder: Path) -> LoadedFlux:
    return load_flux(write_flux(folder / "flux.safetensors"), format="nf4")


@pytest.fixture(scope="module")
def data(folder: Path) -> TrainingData:
    return training_data(folder / "caches")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def run(root: Path, base: LoadedFlux, data: TrainingData) -> Run:
    """One of two steps."""
    made = open_run(root, job(2), base, data)
    train(made, base, data, job(2))
    return made


def refused(
    root: Path, settings: JobSettings, base: LoadedFlux, data: TrainingData, resume: str
) -> str:
    """The sentence; nothing is made."""
    before = sorted(root.rglob("*")) if root.exists() else []
    with pytest.raises(ValueError, match=re.escape(resume)) as caught:
        open_run(root, settings, base, data, resume=resume)
    assert (sorted(root.rglob("*")) if root.exists() else []) == before
    return str(caught.value)


def test_the_chosen_run_goes_on_whatever_the_name_and_what_is_only_looked_at(
    root: Path, run: Run, base: LoadedFlux, data: TrainingData
) -> None:
    whole = train(open_run(root.with_name("whole"), job(4), base, data), base, data, job(4))
    other = dataclasses.replace(
        job(4, checkpoint_every=1, keep_checkpoints=3, gradient_checkpointing=True), name="other"
    )
    chosen = open_run(root, other, base, data, resume=run.name)
    assert chosen.folder == run.folder
    assert_same_lora(train(chosen, base, data, other, go_on=True), whole)
    assert [path.name for path in root.iterdir()] == [run.name]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"lora": LoraSettings(rank=8)}, "rank (there 16, here 8)"),
        (
            {"lora": LoraSettings(rank=8, targets="all")},
            "rank (there 16, here 8); targets (there qlora, here all)",
        ),
        ({"lora": LoraSettings(rank=16, alpha=4)}, "alpha (there that of rank, here 4.0)"),
        ({"train": job(learning_rate=1e-3).train}, "learning_rate (there 0.01, here 0.001)"),
        ({"train": job(seed=3).train}, "seed (there 0, here 3)"),
        (
            {"train": job(batch_size=2, compute_dtype="bf16").train},
            "batch_size (there 1, here 2); compute_dtype (there fp32, here bf16)",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_settings_are_named_with_both_values(
    root: Path, run: Run, base: LoadedFlux, data: TrainingData, change: dict, found: str
) -> None:
    settings = dataclasses.replace(job(2), **change)
    sentence = refused(root, settings, base, data, run.name)
    assert sentence == f"The run {run.name} was trained differently: {found}{CHOICES}"


def test_another_base_is_named(
    root: Path, run: Run, folder: Path, data: TrainingData, base: LoadedFlux
) -> None:
    said = f"The run {run.name} was trained differently: the base model (there flux.safetensors, "
    other = load_flux(write_flux(folder / "other.safetensors", seed=1), format="nf4")
    assert refused(root, job(2), other, data, run.name) == (
        f"{said}here other.safetensors){CHOICES}"
    )
    (folder / "elsewhere").mkdir(exist_ok=True)
    renamed = load_flux(write_flux(folder / "elsewhere" / "flux.safetensors", seed=1), format="nf4")
    assert refused(root, job(2), renamed, data, run.name) == (
        f"{said}here another of that name){CHOICES}"
    )
    in_8_bits = load_flux(folder / "flux.safetensors", format="int8")
    assert "the base model's format (there nf4, here int8)" in refused(
        root, job(2), in_8_bits, data, run.name
    )


def test_another_dataset_is_counted(
    root: Path, run: Run, base: LoadedFlux, data: TrainingData, tmp_path: Path
) -> None:
    fewer = dataclasses.replace(data, latents=with_entries(data.latents, data.latents.entries[1:]))
    assert refused(root, job(2), base, fewer, run.name) == (
        f"The run {run.name} was trained differently: the pictures (there 4, here 3, 3 of them the "
        f"same){CHOICES}"
    )
    first, *others = data.latents.entries
    other = dataclasses.replace(first, repeats=2)
    repeated = dataclasses.replace(data, latents=with_entries(data.latents, (other, *others)))
    assert "the pictures (the same ones in other sizes, numbers, masks or another encoding)" in (
        refused(root, job(2), base, repeated, run.name)
    )
    texts = tuple(dataclasses.replace(one, key=f"0{one.key}") for one in data.prompts.entries)
    encoded = dataclasses.replace(data.prompts, entries=texts)
    said = refused(root, job(2), base, dataclasses.replace(data, prompts=encoded), run.name)
    assert said.endswith(f"differently: the captions or their encoder{CHOICES}")


def test_loras_on_the_model_are_named(
    root: Path, run: Run, base: LoadedFlux, data: TrainingData
) -> None:
    loaded = dataclasses.replace(base, frozen=frozen_loras())
    said = refused(root, job(2), loaded, data, run.name)
    assert said.endswith(f"differently: the LoRAs on the MODEL{CHOICES}")


@pytest.mark.parametrize("name", ["gone-00000000", "gone"])
def test_an_unknown_run_is_one_sentence(
    root: Path, run: Run, base: LoadedFlux, data: TrainingData, name: str
) -> None:
    assert refused(root, job(2), base, data, name) == (
        f"There is no run {name} any more. Set resume to automatic to train a run of its own, or "
        "press R and choose another."
    )


@pytest.mark.parametrize("new", ["test-11111111", "{0} (copy)", "mine"])
def test_a_folder_that_was_copied_or_renamed_is_no_run_of_that_name(
    root: Path, run: Run, base: LoadedFlux, data: TrainingData, new: str
) -> None:
    name = new.format(run.name)
    shutil.copytree(run.folder, root / name)
    said = refused(root, job(2), base, data, name)
    assert said.startswith(f"The folder of the run {name} was renamed or copied: ")


@pytest.mark.parametrize("file", ["run.json", "job.json"])
@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", "null"])
def test_a_damaged_run_is_one_sentence(
    root: Path, run: Run, base: LoadedFlux, data: TrainingData, file: str, damage: str
) -> None:
    (run.folder / file).write_text(damage, encoding="utf-8")
    settings = dataclasses.replace(job(2), lora=LoraSettings(rank=8))
    fewer = dataclasses.replace(data, latents=with_entries(data.latents, data.latents.entries[1:]))
    said = refused(root, settings, base, fewer, run.name)
    assert re.fullmatch(
        rf"The run {run.name} cannot be read: .*\. Set resume to automatic .*", said
    )


def test_a_run_without_its_job_file_is_one_sentence(
    root: Path, run: Run, base: LoadedFlux, data: TrainingData
) -> None:
    (run.folder / "job.json").unlink()
    settings = dataclasses.replace(job(2), lora=LoraSettings(rank=8))
    assert "cannot be read: " in refused(root, settings, base, data, run.name)


def test_a_run_of_another_version_says_so(
    root: Path, run: Run, base: LoadedFlux, data: TrainingData
) -> None:
    path = run.folder / "run.json"
    values = json.loads(path.read_text()) | {"version": 2}
    newer = root / "test-22222222"
    run.folder.rename(newer)
    (newer / "run.json").write_text(json.dumps(values), encoding="utf-8")
    assert "the version of run folders (there 2, here 1)" in (
        refused(root, job(2), base, data, newer.name)
    )
