"""The node that says which optimizer trains a LoRA, and how its learning rate goes."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..trainers.optimizer_settings import CLIPPING, LR_SCHEDULES, OPTIMIZERS, OptimizerSettings
from . import host
from .wires import AtelierOptimizerSettings


class OptimizerSettingsNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="AtelierOptimizerSettings",
            display_name="Optimizer Settings",
            category="Atelier/training",
            description="Which optimizer trains the LoRA, how its learning rate goes over the run, "
            "how gradients are clipped, and whether an average of the weights is kept. The "
            "learning rate itself is on Train LoRA. The defaults are the recipe's.",
            search_aliases=["prodigy", "lion", "adafactor", "lr scheduler", "warmup", "ema"],
            inputs=[*_optimizer(), *_schedule(), *_gradients()],
            outputs=[
                AtelierOptimizerSettings.Output(
                    display_name="optimizer_settings",
                    tooltip="For the input optimizer_settings of Train LoRA and Estimate Memory.",
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, **settings: Any) -> bool | str:
        try:  # a linked input is not known yet
            OptimizerSettings(**{name: of for name, of in settings.items() if of is not None})
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, **settings: Any) -> io.NodeOutput:
        return io.NodeOutput(OptimizerSettings(**settings))


def _optimizer() -> list[Any]:
    return [
        io.Combo.Input(
            "optimizer",
            options=list(OPTIMIZERS),
            default=OptimizerSettings.optimizer,
            tooltip="adamw8bit: the recipe's, 2 bytes of memory for each value of the LoRA. "
            "adamw: the same in 32 bits, 8 bytes. adamw_bf16: the LoRA itself in 16 bits, rounded "
            "at random, 4 bytes. The paged ones may move to system memory (CUDA only). lion and "
            "lion8bit: 4 and 1 bytes, for a learning rate 3 to 10 times smaller; they can spoil "
            "nf4. stableadamw: adamw that clips its own steps, 8 bytes. adafactor: almost no "
            "memory. came: the same with momentum, 4 bytes. ademamix8bit: a long memory of "
            "gradients, 3 bytes, slow at first. prodigy: finds the step size itself, for a "
            "learning rate of 1, 16 bytes, slow in the first hundred steps. The schedulefree ones "
            "average instead of a schedule. docs/methods.md has them side by side: adamw_"
            "schedulefree, lion and prodigy learned least of the demo's style in 80 steps.",
        ),
        io.Float.Input(
            "weight_decay",
            default=OptimizerSettings.weight_decay,
            min=0.0,
            max=1.0,
            step=0.0001,
            round=False,
            tooltip="Pulls the LoRA towards zero, in each step by this times the learning rate: "
            "less is learned by heart. 1e-4 is the recipe's, 1e-2 usual elsewhere. Costs nothing.",
        ),
    ]


def _schedule() -> list[Any]:
    return [
        io.Combo.Input(
            "schedule",
            options=list(LR_SCHEDULES),
            default=OptimizerSettings.schedule,
            tooltip="How the learning rate falls from the end of the warm-up to the end of the "
            "run. constant: not at all, so that a run can be made longer. With any other, the "
            "length belongs to the run, and another length is another run from the start. rex "
            "stays high longest and falls fastest at the end. Costs nothing, but a falling rate "
            "learns less in as many steps: the demo's style 3 to 7 %.",
        ),
        io.Int.Input(
            "warmup_steps",
            default=OptimizerSettings.warmup_steps,
            min=0,
            max=1_000_000,
            tooltip="Steps in which the learning rate rises from 0, with every schedule; 0 is off. "
            "Helps against a rough start at high rates; these steps learn less.",
        ),
        io.Int.Input(
            "cycles",
            default=OptimizerSettings.cycles,
            min=1,
            max=1000,
            tooltip="Of cosine_with_restarts: how often the learning rate falls and begins again.",
        ),
        io.Float.Input(
            "power",
            default=OptimizerSettings.power,
            min=0.1,
            max=100.0,
            step=0.1,
            tooltip="Of polynomial: 1 falls in a straight line, more falls faster at first.",
        ),
        io.Float.Input(
            "min_factor",
            default=OptimizerSettings.min_factor,
            min=0.0,
            max=0.99,
            step=0.01,
            tooltip="Where a schedule ends, as a share of the learning rate. 0 ends at nothing; "
            "0.1 keeps learning until the last step.",
        ),
    ]


def _gradients() -> list[Any]:
    return [
        io.Float.Input(
            "lora_plus_ratio",
            default=OptimizerSettings.lora_plus_ratio,
            min=1.0,
            max=1000.0,
            step=1.0,
            tooltip="LoRA+: how many times larger the learning rate of the B matrices is; 1 is "
            "off, 16 usual. Learns faster, and too much of it breaks the picture. Costs nothing.",
        ),
        io.Combo.Input(
            "clipping",
            options=list(CLIPPING),
            default=OptimizerSettings.clipping,
            tooltip="What is done with gradients that are too large. norm: all are scaled down "
            "together. value: each value is cut by itself. none: nothing, one bad picture may "
            "then spoil the LoRA.",
        ),
        io.Float.Input(
            "clip_limit",
            default=OptimizerSettings.clip_limit,
            min=1e-6,
            max=1e6,
            step=0.01,
            round=False,
            tooltip="The largest norm, or value. 1 is the recipe's norm. For nf4, 0.01 by value is "
            "advised; too little of it makes new subjects slow to learn.",
        ),
        io.Float.Input(
            "ema_decay",
            default=OptimizerSettings.ema_decay,
            min=0.0,
            max=0.99999,
            step=0.001,
            round=False,
            tooltip="Keep an average of the weights, with this share of the one before in each "
            "step; 0 is off, 0.99 follows about the last 100 steps. Samples, measures and the LoRA "
            "file show the average: smoother, and late by that many steps. Costs a second LoRA in "
            "memory, and one more on the disk in each checkpoint.",
        ),
    ]
