"""Settings: every bad one is refused where it is made, and JSON gives them back."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from atelier.trainers.config import (
    COMPUTE_DTYPES,
    PROMPT_LENGTH,
    JobSettings,
    Length,
    TrainSettings,
    job_from_json,
    to_json,
)
from atelier.trainers.flow_settings import (
    FlowSettings,
    LossSettings,
    RolloutSettings,
    TimestepSettings,
)
from atelier.trainers.lora_settings import LORA_TARGETS, LoraSettings
from atelier.trainers.optimizer_settings import OptimizerSettings

BAD_SETTINGS = [
    (LoraSettings, {"rank": 0}, r"rank must be between 1 and 4096, got 0\. 4 to 32 is usual\."),
    (LoraSettings, {"rank": -1}, r"rank must be between 1 and 4096, got -1"),
    (LoraSettings, {"rank": 4097}, r"rank must be between 1 and 4096, got 4097"),
    (LoraSettings, {"alpha": 0.0}, r"alpha must be above 0, got 0\.0\. Use the rank if in doubt"),
    (LoraSettings, {"alpha": -2.0}, r"alpha must be above 0, got -2\.0"),
    (LoraSettings, {"alpha": math.nan}, r"alpha must be above 0, got nan"),
    (LoraSettings, {"targets": "all-linear"}, r"targets 'all-linear'\. Choose one of: .*qlora"),
    (TrainSettings, {"learning_rate": 0.0}, r"learning rate must be above 0, got 0\.0\. 1e-4"),
    (TrainSettings, {"learning_rate": -1e-4}, r"learning rate must be above 0, got -0\.0001"),
    (TrainSettings, {"learning_rate": math.nan}, r"learning rate must be above 0, got nan"),
    (TrainSettings, {"batch_size": 0}, r"batch size must be 1 or more, got 0"),
    (TrainSettings, {"gradient_accumulation": 0}, r"accumulation must be at least 1, got 0"),
    (TrainSettings, {"guidance": -0.5}, r"guidance must not be negative, got -0\.5"),
    (TrainSettings, {"guidance": math.nan}, r"guidance must not be negative, got nan"),
    (
        OptimizerSettings,
        {"optimizer": "sgd"},
        r"Unknown optimizer 'sgd'\. Choose one of: adamw8bit",
    ),
    (OptimizerSettings, {"schedule": "sine"}, r"Unknown schedule of the learning rate 'sine'"),
    (OptimizerSettings, {"clipping": "l1"}, r"Unknown clipping 'l1'\. Choose one of: norm, value"),
    (OptimizerSettings, {"weight_decay": -0.1}, r"decay must be between 0 and 1, got -0\.1"),
    (OptimizerSettings, {"weight_decay": math.nan}, r"decay must be between 0 and 1, got nan"),
    (OptimizerSettings, {"warmup_steps": -1}, r"0 steps \(off\) or more, got -1"),
    (OptimizerSettings, {"cycles": 0}, r"at least 1 cycle, got 0"),
    (OptimizerSettings, {"power": 0.0}, r"power .* above 0 and at most 100, got 0\.0"),
    (OptimizerSettings, {"min_factor": 1.0}, r"end between 0 and 1 .*, got 1\.0"),
    (OptimizerSettings, {"lora_plus_ratio": 0.5}, r"between 1 \(off\) and 1000, got 0\.5"),
    (OptimizerSettings, {"clip_limit": 0.0}, r"limit of gradients must be above 0, got 0\.0"),
    (OptimizerSettings, {"ema_decay": 1.0}, r"0 \(off\) or below 1, got 1\.0"),
    (
        OptimizerSettings,
        {"optimizer": "adamw_schedulefree", "schedule": "cosine"},
        r"adamw_schedulefree has no schedule, got 'cosine': it averages instead",
    ),
    (
        OptimizerSettings,
        {"optimizer": "prodigy_schedulefree", "ema_decay": 0.9},
        r"gives an average already, so ema_decay must be 0, got 0\.9",
    ),
    (
        OptimizerSettings,
        {"optimizer": "adamw_bf16", "ema_decay": 0.9},
        r"needs weights of 32 bits, .* got 0\.9, or choose adamw",
    ),
    (
        OptimizerSettings,
        {"optimizer": "prodigy", "lora_plus_ratio": 16.0},
        r"one step size for all weights, so lora_plus_ratio must be 1, got 16\.0",
    ),
    (TrainSettings, {"compute_dtype": "int8"}, r"dtype 'int8'\. Choose one of: auto, bf16, fp16"),
    (Length, {"amount": 0}, r"length must be at least 1, got 0 steps"),
    (Length, {"amount": -3, "unit": "epochs"}, r"length must be at least 1, got -3 epochs"),
    (Length, {"unit": "hours"}, r"steps or epochs, got 'hours'"),
    (JobSettings, {"checkpoint_every": 0}, r"distance of at least 1 step, got 0"),
    *(
        (JobSettings, {"name": name}, r"cannot be a file name\. Use up to 60 letters")
        for name in (
            "",
            " ",
            "a/b",
            "a\\b",
            "..",
            ".hidden",
            "a:b",
            "a\n",
            "end ",
            "a*",
            " a",
            "猫" * 61,
        )
    ),
]
ALL_SET = JobSettings(
    name="Katze 猫_1.5-b",
    length=Length(amount=3, unit="epochs"),
    lora=LoraSettings(rank=8, alpha=4.0, targets="all+ffs"),
    train=TrainSettings(
        learning_rate=2e-3,
        batch_size=3,
        gradient_accumulation=5,
        guidance=0.0,
        optimizer=OptimizerSettings(optimizer="lion", schedule="rex", clip_limit=0.5),
        gradient_checkpointing=False,
        compute_dtype="fp16",
        flow=FlowSettings(
            timesteps=TimestepSettings(sampling="custom", custom=(0.5, 250.0), shift=2.0),
            loss=LossSettings(loss="huber", weight="bell"),
            noise_offset=0.1,
            guidance_max=4.0,
            rollout=RolloutSettings(max_offset=5, ramp="cosine"),
        ),
        seed=2**53 - 1,
    ),
    checkpoint_every=7,
)


@pytest.mark.parametrize(("settings", "change", "message"), BAD_SETTINGS)
def test_a_bad_setting_is_refused(settings: type, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**change)


@pytest.mark.parametrize("job", [JobSettings(), ALL_SET], ids=["defaults", "all set"])
def test_json_gives_the_settings_back(job: JobSettings) -> None:
    assert job_from_json(json.loads(json.dumps(to_json(job)))) == job


def test_what_json_leaves_out_has_its_default() -> None:
    assert job_from_json({"name": "a", "lora": {"rank": 8}}) == JobSettings(
        name="a", lora=LoraSettings(rank=8)
    )


@pytest.mark.parametrize(
    "values",
    [{"epochs": 3}, {"lora": {"drop": 0.1}}, {"train": {"lr": 1e-4}}, {"length": {"steps": 3}}],
)
def test_an_unknown_field_is_refused(values: dict) -> None:
    with pytest.raises(ValueError, match=r"setting that this version does not know: .*argument"):
        job_from_json(values)


def test_a_bad_value_in_json_is_refused_as_in_code() -> None:
    with pytest.raises(ValueError, match="rank must be between"):
        job_from_json({"lora": {"rank": 0}})


@pytest.mark.parametrize("settings", [LoraSettings, TrainSettings, Length, JobSettings])
def test_settings_are_frozen_and_named(settings: type) -> None:
    field = dataclasses.fields(settings)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(settings(), field, 1)
    with pytest.raises(TypeError):
        settings(1)


def test_the_defaults_are_the_recipe_of_the_blog() -> None:
    """huggingface.co/blog/flux-qlora, its train_dreambooth_lora_flux_miniature.py."""
    job = JobSettings()
    assert (job.lora.rank, job.lora.resolved_alpha) == (4, 4.0)
    assert LORA_TARGETS[job.lora.targets] == ("to_k", "to_q", "to_v", "to_out.0")
    assert (job.train.learning_rate, job.train.guidance, job.length.amount) == (1e-4, 1.0, 700)
    assert (job.train.optimizer.clip_limit, job.train.gradient_checkpointing) == (1.0, True)
    assert (job.train.batch_size, job.train.gradient_accumulation, PROMPT_LENGTH) == (1, 4, 77)


@pytest.mark.parametrize(("alpha", "expected"), [(None, 8.0), (2.0, 2.0)])
def test_no_alpha_means_the_rank(alpha: float | None, expected: float) -> None:
    assert LoraSettings(rank=8, alpha=alpha).resolved_alpha == expected


@pytest.mark.parametrize(("unit", "expected"), [("steps", 3), ("epochs", 36)])
def test_the_length_in_steps(unit: str, expected: int) -> None:
    assert Length(amount=3, unit=unit).num_steps(12) == expected


@pytest.mark.parametrize("dtype", COMPUTE_DTYPES)
def test_every_dtype_that_is_offered_is_accepted(dtype: str) -> None:
    assert TrainSettings(compute_dtype=dtype).compute_dtype == dtype
