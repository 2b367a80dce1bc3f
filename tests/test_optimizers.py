"""Every optimizer is that of its package, and resumes to the bit (DESIGN I5)."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from atelier.trainers.config import JobSettings
from atelier.trainers.data import TrainingData
from atelier.trainers.evaluate import held_out_loss, predict_by
from atelier.trainers.hooks import Hooks, Trained
from atelier.trainers.learning_rates import rate_factor
from atelier.trainers.load import LoadedFlux, load_flux
from atelier.trainers.loop import open_run, train
from atelier.trainers.lora_settings import LoraSettings
from atelier.trainers.optimizer_settings import OPTIMIZERS, SCHEDULE_FREE, OptimizerSettings
from atelier.trainers.optimizers import (
    cast_parameters,
    clip_gradients,
    make_optimizer,
    own_draws,
    set_rate,
)
from atelier.trainers.rhythm import Rhythm
from atelier.trainers.run import Checkpoint, Run
from atelier.trainers.step import TrainState
from bitsandbytes import optim as bitsandbytes
from diffusers.training_utils import EMAModel
from flux_files import write_flux
from optimi import Lion, StableAdamW
from prodigyopt import Prodigy
from prodigyplus import ProdigyPlusScheduleFree
from pytorch_optimizer import CAME
from runs import Stop, assert_same_checkpoint, assert_same_lora, job, stop_before
from schedulefree import AdamWScheduleFree
from torch import Tensor, nn
from training import training_data
from transformers.optimization import Adafactor


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> LoadedFlux:
    path = write_flux(tmp_path_factory.mktemp("flux") / "flux.safetensors")
    return load_flux(path, format="bf16")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    return training_data(tmp_path_factory.mktemp("caches"))


@pytest.fixture
def run_job(tmp_path: Path, base: LoadedFlux, data: TrainingData):
    """Train a job in a folder below the test's own; returns what came out and the run."""

    def run_it(
        settings: JobSettings, hooks: Hooks | None = None, folder: str = "runs"
    ) -> tuple[Trained, Run]:
        made = open_run(tmp_path / folder, settings, base, data)
        return train(made, base, data, settings, hooks), made

    return run_it


def job_with(num_steps: int, checkpoint_every: int = 250, **settings: Any) -> JobSettings:
    optimizer = OptimizerSettings(**settings)
    rate = 1.0 if "prodigy" in optimizer.optimizer else 1e-3
    return job(
        num_steps, checkpoint_every=checkpoint_every, optimizer=optimizer, learning_rate=rate
    )


RESUMED: dict[str, dict[str, Any]] = {name: {"optimizer": name} for name in OPTIMIZERS} | {
    "cosine": {"schedule": "cosine", "warmup_steps": 1},
    "average": {"ema_decay": 0.9},
    "LoRA+": {"optimizer": "stableadamw", "lora_plus_ratio": 4.0},
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_stopped_and_resumed_run_ends_as_an_uninterrupted_one(run_job, name: str) -> None:
    settings = job_with(4, **RESUMED[name])
    whole, whole_run = run_job(settings, folder="whole")
    with pytest.raises(Stop):
        run_job(settings, stop_before(2), folder="halved")
    torch.manual_seed(0)  # of what else the process draws, nothing may follow
    resumed, resumed_run = run_job(settings, folder="halved")
    assert resumed_run.steps_saved() == [2, 4]
    assert_same_lora(resumed, whole)
    assert_same_checkpoint(resumed_run.load(4), whole_run.load(4))
    assert len(set(whole.losses)) == 4
    assert all(bool(tensor.isfinite().all()) for tensor in whole.lora.values())


THEIRS: dict[str, Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer]] = {
    "adamw8bit": lambda p, lr: bitsandbytes.AdamW8bit(p, lr=lr, weight_decay=0.1),
    "adamw8bit_paged": lambda p, lr: bitsandbytes.AdamW8bit(p, lr=lr, weight_decay=0.1),
    "adamw": lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.1),
    "lion8bit": lambda p, lr: bitsandbytes.Lion8bit(p, lr=lr, weight_decay=0.1),
    "lion8bit_paged": lambda p, lr: bitsandbytes.Lion8bit(p, lr=lr, weight_decay=0.1),
    "lion": lambda p, lr: Lion(p, lr=lr, weight_decay=0.1),
    "stableadamw": lambda p, lr: StableAdamW(p, lr=lr, weight_decay=0.1),
    "adafactor": lambda p, lr: Adafactor(
        p, lr=lr, weight_decay=0.1, relative_step=False, scale_parameter=False
    ),
    "came": lambda p, lr: CAME(p, lr=lr, weight_decay=0.1),
    "ademamix8bit": lambda p, lr: bitsandbytes.AdEMAMix8bit(p, lr=lr, weight_decay=0.1),
    "prodigy": lambda p, lr: Prodigy(
        p, lr=lr, weight_decay=0.1, use_bias_correction=True, safeguard_warmup=True
    ),
    "prodigy_schedulefree": lambda p, lr: ProdigyPlusScheduleFree(p, lr=lr, weight_decay=0.1),
    "adamw_schedulefree": lambda p, lr: AdamWScheduleFree(p, lr=lr, weight_decay=0.1),
}


def matrices() -> dict[str, nn.Parameter]:
    """A and B as a LoRA has them after some steps."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.lora_A.weight": (16, 300), "a.lora_B.weight": (300, 16)}
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator))
        for name, shape in shapes.items()
    }


def slope(parameters: Iterable[nn.Parameter], step: int) -> None:
    """Give them gradients, which differ from step to step."""
    for parameter in parameters:
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
        parameter.grad = (parameter.detach().float() + noise).to(parameter.dtype)


@pytest.mark.parametrize("name", THEIRS)
def test_a_step_is_that_of_the_package(name: str) -> None:
    """With the step size of a warm-up and a cosine, which torch's LambdaLR gives the package's."""
    schedule = "constant" if name in SCHEDULE_FREE else "cosine"
    settings = OptimizerSettings(
        optimizer=name, weight_decay=0.1, schedule=schedule, warmup_steps=2
    )
    rate = 1.0 if "prodigy" in name else 1e-2
    mine, theirs = matrices(), matrices()
    ours = make_optimizer(settings, mine, rate)
    other = THEIRS[name](list(theirs.values()), rate)
    if name == "adamw_schedulefree":
        other.train()  # pyright: ignore[reportAttributeAccessIssue]
    scheduler = torch.optim.lr_scheduler.LambdaLR(other, lambda n: rate_factor(settings, n, 8))
    for step in range(8):
        slope(mine.values(), step)
        set_rate(ours, rate_factor(settings, step, 8))
        ours.step()
        slope(theirs.values(), step)
        other.step()
        scheduler.step()
    for key, parameter in mine.items():
        assert torch.equal(parameter, theirs[key])
        assert not torch.equal(parameter, matrices()[key])


def test_bf16_is_rounded_at_random_and_right_in_the_mean() -> None:
    """Steps of a hundredth of what bf16 can tell apart: rounded to the nearest they are lost."""
    settings = OptimizerSettings(optimizer="adamw_bf16", weight_decay=0)
    parameter, exact = (nn.Parameter(torch.ones(64, 64)) for _ in range(2))
    cast_parameters(settings, [parameter])
    assert parameter.dtype == torch.bfloat16
    ours = make_optimizer(settings, {"a": parameter}, 1e-4)
    plain = torch.optim.AdamW([exact], lr=1e-4, eps=1e-6, weight_decay=0)
    for step in range(20):
        for one, optimizer in ((parameter, ours), (exact, plain)):
            one.grad = torch.ones_like(one)
            with own_draws(0, step, one.device):
                optimizer.step()
    assert 1 < len(parameter.unique()) < 9
    moved, wanted = (1 - float(p.detach().float().mean()) for p in (parameter, exact))
    assert moved == pytest.approx(wanted, rel=0.1)


def test_bf16_steps_grow_again_when_gradients_fall() -> None:
    """The second moment, in bf16 too, follows that of float32."""
    settings = OptimizerSettings(optimizer="adamw_bf16", weight_decay=0)
    parameter, exact = (nn.Parameter(torch.zeros(32, 32)) for _ in range(2))
    cast_parameters(settings, [parameter])
    ours = make_optimizer(settings, {"a": parameter}, 1e-3)
    plain = torch.optim.AdamW([exact], lr=1e-3, betas=(0.9, 0.99), eps=1e-6, weight_decay=0)
    generator = torch.Generator().manual_seed(0)
    moved = [0.0, 0.0]
    for step in range(900):
        gradient = (1.0 if step < 100 else 0.1) * (0.5 + torch.rand(32, 32, generator=generator))
        for index, (one, optimizer) in enumerate(((parameter, ours), (exact, plain))):
            one.grad = gradient.to(one.dtype)
            with own_draws(0, step, one.device):
                optimizer.step()
            if step == 699:
                moved[index] = float(one.detach().float().mean())
    found, wanted = (
        float(one.detach().float().mean()) - before
        for one, before in zip((parameter, exact), moved, strict=True)
    )
    assert found == pytest.approx(wanted, rel=0.2)


def test_draws_of_a_step_follow_from_it_and_leave_others_alone() -> None:
    state, device = torch.get_rng_state(), torch.device("cpu")
    drawn = []
    for step in (3, 4, 3):
        with own_draws(0, step, device):
            drawn.append(torch.rand(4))
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["adamw8bit", "adamw", "lion", "came", "stableadamw"])
def test_lora_plus_gives_b_matrices_a_larger_step(name: str) -> None:
    settings = OptimizerSettings(optimizer=name, lora_plus_ratio=16.0, weight_decay=0.1)
    mine, theirs = matrices(), matrices()
    ours = make_optimizer(settings, mine, 1e-3)
    a, b = theirs.values()
    others = [THEIRS[name]([a], 1e-3), THEIRS[name]([b], 16e-3)]
    for step in range(3):
        slope(mine.values(), step)
        set_rate(ours, 0.5)
        ours.step()
        slope(theirs.values(), step)
        for other in others:
            other.param_groups[0]["lr"] = 0.5 * (16e-3 if other is others[1] else 1e-3)
            other.step()
    for key, parameter in mine.items():
        assert torch.allclose(parameter, theirs[key], rtol=1e-6, atol=0)


def test_lora_plus_without_b_matrices_is_refused() -> None:
    settings = OptimizerSettings(lora_plus_ratio=16.0)
    parameters = {"a.lokr_w1": nn.Parameter(torch.zeros(2, 2))}
    with pytest.raises(ValueError, match=r"^LoRA\+ trains the B matrices .* has none\. Set lora_"):
        make_optimizer(settings, parameters, 1e-3)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if "prodigy" not in name])
def test_no_decay_pulls_the_magnitudes_of_a_dora(name: str) -> None:
    """Their steps are those without any. (Prodigy's step size follows from all weights.)"""
    ends = []
    for decay in (0.0, 0.5):
        settings = OptimizerSettings(optimizer=name, weight_decay=decay)
        parameters = {
            **matrices(),
            "a.magnitude": nn.Parameter(torch.linspace(1, 2, 300)),
        }
        optimizer = make_optimizer(settings, parameters, 1e-2)
        for step in range(3):
            for parameter in parameters.values():
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
                parameter.grad = noise
            optimizer.step()
        ends.append(parameters)
    plain, pulled = ends
    assert torch.allclose(plain["a.magnitude"], pulled["a.magnitude"], rtol=1e-5)
    assert not torch.allclose(plain["a.lora_A.weight"], pulled["a.lora_A.weight"], rtol=1e-5)


@pytest.mark.parametrize("clipping", ["norm", "value", "none"])
def test_gradients_are_clipped_as_was_asked_for(clipping: str) -> None:
    parameters = list(matrices().values())
    slope(parameters, 0)
    before = [parameter.grad.clone() for parameter in parameters]  # pyright: ignore
    length = sum(float(gradient.double().square().sum()) for gradient in before) ** 0.5
    settings = OptimizerSettings(clipping=clipping, clip_limit=0.5)
    assert clip_gradients(settings, parameters) == pytest.approx(length, rel=1e-5)
    wanted = {
        "norm": [gradient * (0.5 / length) for gradient in before],
        "value": [gradient.clamp(-0.5, 0.5) for gradient in before],
        "none": before,
    }[clipping]
    for parameter, gradient in zip(parameters, wanted, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-5)  # pyright: ignore


def trained(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The weights that are trained, of a checkpoint whose adapter is another."""
    prefix = "trained/"
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in checkpoint.optimizer.items()
        if name.startswith(prefix)
    }


def test_the_average_is_that_of_diffusers(run_job) -> None:
    """Over the weights after every step, which are those of a run without it."""
    plain, plain_run = run_job(job_with(5, checkpoint_every=1), folder="plain")
    averaged, run = run_job(job_with(5, checkpoint_every=2, ema_decay=0.3), folder="average")
    assert averaged.losses == plain.losses
    parameters = {name: nn.Parameter(t) for name, t in plain_run.load(1).adapter.items()}
    model = EMAModel(parameters.values(), decay=0.3)
    expected = {}
    for step in range(1, 6):
        for name, tensor in plain_run.load(step).adapter.items():
            parameters[name].data.copy_(tensor)
        model.step(parameters.values())
        expected[step] = [shadow.clone() for shadow in model.shadow_params]
    for step in (2, 4, 5):
        checkpoint = run.load(step)
        for name, average in zip(parameters, expected[step], strict=True):
            assert torch.allclose(checkpoint.adapter[name], average, rtol=1e-5, atol=1e-8)
        assert all(
            torch.equal(tensor, plain_run.load(step).adapter[name])
            for name, tensor in trained(checkpoint).items()
        )
    assert all(torch.equal(averaged.lora[name], run.load(5).adapter[name]) for name in parameters)
    assert any(not torch.equal(averaged.lora[name], plain.lora[name]) for name in parameters)


@pytest.mark.parametrize("name", sorted(SCHEDULE_FREE))
def test_a_schedule_free_run_gives_the_weights_of_eval(
    run_job, base: LoadedFlux, name: str
) -> None:
    """x of y = (1 - beta1) z + beta1 x (Defazio et al., 2024, equation 1)."""
    out, run = run_job(job_with(5, optimizer=name))
    checkpoint = run.load(5)
    y = trained(checkpoint)
    assert y.keys() == checkpoint.adapter.keys()
    for index, key in enumerate(TrainState(base, job(1)).lora.parameters):
        z = checkpoint.optimizer[f"{index}/z"]
        x = (y[key] - 0.1 * z) / 0.9
        assert torch.allclose(checkpoint.adapter[key], x, rtol=1e-4, atol=1e-9)
        assert torch.equal(out.lora[key], checkpoint.adapter[key])
        assert not torch.equal(y[key], checkpoint.adapter[key])


@pytest.mark.parametrize("name", ["average", *sorted(SCHEDULE_FREE)])
def test_what_is_measured_and_drawn_is_what_is_saved(
    run_job, base: LoadedFlux, data: TrainingData, name: str
) -> None:
    """Looking in between changes nothing, and no other weights are looked at."""
    changes = {"ema_decay": 0.9} if name == "average" else {"optimizer": name}
    settings = job_with(3, checkpoint_every=2, **changes)
    unseen, _ = run_job(settings, folder="unseen")
    drawn: dict[int, dict[str, Tensor]] = {}
    hooks = Hooks(
        held_out=data,
        validation=Rhythm(every=2, at_start=False, at_end=False),
        sample=lambda step, lora: drawn.update({step: lora}),
    )
    looked_at, run = run_job(settings, hooks, folder="seen")
    assert_same_lora(looked_at, unseen)
    assert list(drawn) == [2]
    adapter = run.load(2).adapter
    assert all(torch.equal(drawn[2][key], adapter[key]) for key in adapter)
    plain = TrainState(base, job(4))
    plain.lora.load_state(adapter)
    predict = predict_by(plain.transformer, guidance=1.0, dtype=plain.dtype)
    loss = held_out_loss(predict, data, device=plain.device, check_stop=lambda: None)
    assert run.eval_losses() == {2: loss}


def test_a_schedule_that_follows_the_length_makes_runs_of_their_own(
    run_job, tmp_path: Path, base: LoadedFlux, data: TrainingData
) -> None:
    lengths = (3, 4)
    for schedule, num_runs in (("constant", 1), ("cosine", 2)):
        jobs = [job_with(length, schedule=schedule) for length in lengths]
        assert len({open_run(tmp_path, one, base, data).name for one in jobs}) == num_runs
    rates = [
        [line["learning_rate"] for line in run_job(job_with(n, schedule="linear"))[1].metrics()]
        for n in lengths
    ]
    assert rates == [pytest.approx([1e-3 * (1 - step / n) for step in range(n)]) for n in lengths]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"train": {"compute_dtype": "fp16"}, "optimizer": "adamw_bf16"}, "computes in bf16, and"),
        ({"lora": LoraSettings(kind="loha"), "lora_plus_ratio": 4.0}, r"^LoRA\+ trains the B"),
        ({"lora": LoraSettings(init="loftq")}, "^LoftQ makes up for"),
        ({"optimizer": "came"}, "package pytorch-optimizer is missing"),
    ],
    ids=["fp16", "LoRA+", "LoftQ", "absent"],
)
def test_what_cannot_be_trained_leaves_no_run(
    run_job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], says: str
) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    changes = dict(changes)
    values, lora = changes.pop("train", {}), changes.pop("lora", LoraSettings())
    settings = job(1, optimizer=OptimizerSettings(**changes), **values)
    with pytest.raises(ValueError, match=says):
        run_job(dataclasses.replace(settings, lora=lora))
    assert not (tmp_path / "runs").exists()


def test_a_warm_up_that_is_too_long_leaves_no_run(run_job, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="warm-up of 3 steps is not shorter than the run, which"):
        run_job(job_with(3, warmup_steps=3))
    assert not (tmp_path / "runs").exists()


def test_a_cycle_of_one_step_is_refused() -> None:
    """It would have the whole rate in every step."""
    settings = OptimizerSettings(schedule="cosine_with_restarts", cycles=4, warmup_steps=2)
    settings.check_length(10)
    assert min(rate_factor(settings, step, 10) for step in range(2, 10)) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="the 4 cycles have 7 together"):
        settings.check_length(9)


REMARKS: list[tuple[dict[str, Any], float, str, list[str]]] = [
    ({}, 1e-4, "cpu", []),
    ({"optimizer": "prodigy"}, 1.0, "cpu", []),
    ({"optimizer": "prodigy"}, 1e-4, "cpu", [r"should be about 1: it is 0\.0001\.$"]),
    ({"optimizer": "prodigy_schedulefree"}, 1e-4, "cpu", [r"^The optimizer prodigy_schedulefree"]),
    ({"optimizer": "lion"}, 2e-5, "cpu", []),
    ({"optimizer": "lion8bit"}, 1e-4, "cpu", [r"^Every step of .* It is 0\.0001\.$"]),
    ({"optimizer": "adamw8bit_paged"}, 1e-4, "cuda", []),
    ({"optimizer": "adamw8bit_paged"}, 1e-4, "cpu", [r"needs CUDA .* here adamw8bit computes"]),
    ({"cycles": 2}, 1e-4, "cpu", [r"setting cycles .* the schedule constant"]),
    ({"cycles": 2, "schedule": "cosine_with_restarts"}, 1e-4, "cpu", []),
    ({"power": 3.0, "min_factor": 0.1}, 1e-4, "cpu", [r"setting power", r"setting min_factor"]),
    ({"clip_limit": 2.0, "clipping": "none"}, 1e-4, "cpu", [r"clip_limit .* clipping none"]),
]


@pytest.mark.parametrize(("changes", "rate", "device", "wanted"), REMARKS, ids=str)
def test_what_does_not_fit_together_is_told(
    changes: dict[str, Any], rate: float, device: str, wanted: list[str]
) -> None:
    said = list(OptimizerSettings(**changes).remarks(rate, device))
    assert len(said) == len(wanted)
    assert all(re.search(pattern, text) for pattern, text in zip(wanted, said, strict=True))


def test_checkpoints_of_the_recipe_are_what_they_were(run_job) -> None:
    """Those of before optimizers could be chosen go on: no group has values of its own."""
    saved = run_job(job(1))[1].load(1)
    indices = {str(index) for index in range(len(saved.adapter))}
    assert {name.split("/")[0] for name in saved.optimizer} == indices
    assert saved.values["optimizer"] == {f"{index}/step": 1 for index in indices}
