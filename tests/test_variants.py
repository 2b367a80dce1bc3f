"""Which FLUX.1 a file is, as far as it tells, and what is said of settings that do not fit it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from atelier.trainers.config import JobSettings, TrainSettings
from atelier.trainers.data import TrainingData
from atelier.trainers.flow_settings import FlowSettings, TimestepSettings
from atelier.trainers.load import BaseFlux, load_flux
from atelier.trainers.variants import tell_variant, variant_of
from flux_files import flux_tensors, write_flux
from frozen_loras import frozen_loras
from safetensors.torch import save_file
from training import training_data

DEV, SCHNELL = "a model of FLUX.1-dev's kind", "a model of FLUX.1-schnell's kind"
SNAPSHOT = "hub/models--{}/snapshots/0123abcd"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, BaseFlux]:
    """Without a path, by whether they take guidance."""
    folder = tmp_path_factory.mktemp("flux")
    return {
        guidance: dataclasses.replace(
            load_flux(
                write_flux(folder / f"{guidance}.safetensors", guidance=guidance), format="bf16"
            ),
            path="",
        )
        for guidance in (True, False)
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    return training_data(tmp_path_factory.mktemp("caches"))


@pytest.mark.parametrize(
    ("path", "takes_guidance", "name"),
    [
        ("flux1-dev.safetensors", True, "FLUX.1-dev"),
        ("diffusion_models/flux1-dev-fp8.safetensors", True, "FLUX.1-dev"),
        ("flux1-krea-dev_fp8_scaled.safetensors", True, "FLUX.1-Krea"),
        ("flux1-dev-kontext_fp8_scaled.safetensors", True, "FLUX.1-Kontext"),
        ("flux1-schnell.safetensors", False, "FLUX.1-schnell"),
        (f"{SNAPSHOT.format('black-forest-labs--FLUX.1-schnell')}/transformer", False,
         "FLUX.1-schnell"),
        (f"{SNAPSHOT.format('jimmycarter--LibreFLUX')}/transformer", False, "LibreFLUX"),
        (f"{SNAPSHOT.format('ashen0209--Flux-Dev2Pro')}", True, "Flux-Dev2Pro"),
        ("diffusers/fluxbooru-v0.3/transformer", True, "Fluxbooru"),
        ("flux-dev-de-distill.safetensors", False, "De-distilled FLUX.1"),
        ("my_model.safetensors", True, DEV),
        ("my_model.safetensors", False, SCHNELL),
        ("", True, DEV),
        ("krea/pictures/model.safetensors", True, DEV),  # a folder says nothing of a file
    ],
)  # fmt: skip
def test_a_model_is_known_by_the_names_around_it(
    bases: dict[bool, BaseFlux], path: str, takes_guidance: bool, name: str
) -> None:
    base = dataclasses.replace(bases[takes_guidance], path=path)
    assert variant_of(base).name == name


def test_a_model_is_known_by_its_metadata(bases: dict[bool, BaseFlux], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(flux_tensors(), path, {"modelspec.title": "FLUX.1 Kontext [dev]"})
    assert variant_of(dataclasses.replace(bases[True], path=str(path))).name == "FLUX.1-Kontext"


def job(timesteps: str = "uniform", **settings: Any) -> JobSettings:
    flow = FlowSettings(timesteps=TimestepSettings(sampling=timesteps))
    return JobSettings(train=TrainSettings(flow=flow, **settings))


def told(base: BaseFlux, data: TrainingData, job: JobSettings = job(), cfg: float = 1.0) -> str:  # noqa: B008
    return "\n".join(tell_variant(base, job, data, cfg))


def named(bases: dict[bool, BaseFlux], name: str, guidance: bool = True) -> BaseFlux:
    return dataclasses.replace(bases[guidance], path=f"{name}.safetensors")


def referenced(data: TrainingData) -> TrainingData:
    (subset,) = data.latents.subsets
    entries = tuple(
        dataclasses.replace(e, references=e.keys, reference_width=64, reference_height=64)
        for e in subset.entries
    )
    subset = dataclasses.replace(subset, entries=entries)
    return dataclasses.replace(data, latents=dataclasses.replace(data.latents, subsets=(subset,)))


def masked(data: TrainingData) -> TrainingData:
    entries = tuple(dataclasses.replace(e, mask=e.key) for e in data.prompts.entries)
    return dataclasses.replace(data, prompts=dataclasses.replace(data.prompts, entries=entries))


def long(data: TrainingData, length: int) -> TrainingData:
    return dataclasses.replace(data, prompts=dataclasses.replace(data.prompts, length=length))


def test_what_a_file_leaves_open_is_said(bases: dict[bool, BaseFlux], data: TrainingData) -> None:
    assert told(bases[True], data).startswith("The base model is of FLUX.1-dev's kind: its file")
    assert told(bases[False], data).startswith("The base model takes no guidance, and its file")


def test_nothing_but_its_name_is_said_of_flux_dev(
    bases: dict[bool, BaseFlux], data: TrainingData
) -> None:
    lines = told(named(bases, "flux1-dev"), data)
    assert lines == "The base model is FLUX.1-dev, by the name of its file."


def test_schnell_without_its_recipe_is_told_each_part_of_it(
    bases: dict[bool, BaseFlux], data: TrainingData
) -> None:
    schnell = named(bases, "flux1-schnell", guidance=False)
    text = told(schnell, long(data, 512))
    assert "Without an assistant" in text
    assert "the timesteps are uniform" in text
    assert "the captions have 512" in text
    assisted = dataclasses.replace(schnell, assistant=frozen_loras())
    assert told(assisted, long(data, 256), job("fast")).count("\n") == 0


def test_schnells_recipe_on_another_model_is_told(
    bases: dict[bool, BaseFlux], data: TrainingData
) -> None:
    dev = dataclasses.replace(named(bases, "flux1-dev"), assistant=frozen_loras())
    text = told(dev, data, job("fast"))
    assert "The timesteps are fast" in text
    assert "The assistant computes along, though" in text


@pytest.mark.parametrize(
    ("name", "guidance", "wanted"),
    [("fluxbooru", 1.0, 3.5), ("fluxbooru", 3.5, None), ("Dev2Pro", 3.5, 1), ("Dev2Pro", 1, None)],
)
def test_a_guidance_that_the_model_was_not_trained_with_is_told(
    bases: dict[bool, BaseFlux],
    data: TrainingData,
    name: str,
    guidance: float,
    wanted: float | None,
) -> None:
    text = told(named(bases, name), data, job(guidance=guidance), cfg=3.0)
    assert ("was trained with a guidance" in text) == (wanted is not None)
    assert wanted is None or f"set guidance to {wanted:g}." in text
    without = told(named(bases, name, guidance=False), data, job(guidance=guidance), cfg=3.0)
    assert "guidance of" not in without


@pytest.mark.parametrize(("name", "needs"), [("libreflux", True), ("flux-dev-de-distill", True),
                                             ("flux1-schnell", False)])  # fmt: skip
def test_models_without_distilled_guidance_ask_for_true_guidance(
    bases: dict[bool, BaseFlux], data: TrainingData, name: str, needs: bool
) -> None:
    base = named(bases, name, guidance=False)
    assert ("draws with true guidance" in told(base, data)) == needs
    assert "draws with true guidance" not in told(base, data, cfg=3.5)


def test_references_and_kontext_belong_together(
    bases: dict[bool, BaseFlux], data: TrainingData
) -> None:
    kontext, dev = named(bases, "flux1-kontext-dev"), named(bases, "flux1-dev")
    assert "these pictures have no references" in told(kontext, data)
    assert "which only Kontext knows" in told(dev, referenced(data))
    for base, fits in ((kontext, referenced(data)), (dev, data)):
        assert "references" not in told(base, fits)


def test_hidden_padding_and_libreflux_belong_together(
    bases: dict[bool, BaseFlux], data: TrainingData
) -> None:
    libre, dev = named(bases, "libreflux", guidance=False), named(bases, "flux1-dev")
    assert "turn mask_padding of Encode Prompts on" in told(libre, data)
    assert "which only LibreFLUX is used to" in told(dev, masked(data))
    for base, fits in ((libre, masked(data)), (dev, data)):
        assert "padding" not in told(base, fits)
