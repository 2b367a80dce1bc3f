"""The node that says how a training is looked at."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..trainers.buckets import parse_sizes
from ..trainers.checks import require
from ..trainers.config import UNITS
from ..trainers.data import TrainingData
from ..trainers.prompt_list import prompts_of_library, prompts_of_lines
from ..trainers.rhythm import Rhythm
from . import folders, host
from .inputs import sampler_inputs
from .sampling import encode_prompt
from .validation import EncodedPrompt, Sampler, Score, Validation
from .wires import AtelierLatentCache, AtelierPromptCache, AtelierValidation

NO_LIBRARY = "none"
_SIDE_STEP = 16
"""FLUX sees squares of 16x16 pixels."""


class ValidationSettings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="AtelierValidationSettings",
            display_name="Validation Settings",
            category="Atelier/training",
            description="How a training is looked at while it runs: sample pictures of several "
            "prompts, drawn by ComfyUI's own sampler, the loss on held out pictures, and how well "
            "the samples fit their prompts. Nothing of it changes what is trained.",
            search_aliases=["sample prompts", "eval loss", "validation", "preview"],
            inputs=[*_when(), *_pictures(), *_optional()],
            outputs=[
                AtelierValidation.Output(
                    display_name="validation", tooltip="For the input validation of Train LoRA."
                )
            ],
        )

    @classmethod
    def validate_inputs(
        cls, library: str | None, sizes: str | None, prompts: str | None
    ) -> bool | str:
        try:
            _sizes(sizes or "")
            if library is not None and library != NO_LIBRARY:
                prompts_of_library(folders.dataset_file(library))
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, library: str, **_: Any) -> list[tuple[str, int, int]]:
        return (
            [] if library == NO_LIBRARY else folders.fingerprints([folders.dataset_file(library)])
        )

    @classmethod
    def execute(cls, **settings: Any) -> io.NodeOutput:
        prompts = _encoded_prompts(settings)
        vae = settings.get("vae")
        require(
            not prompts or vae is not None,
            "Validation Settings has prompts and no vae to draw their pictures: connect its vae "
            "input.",
        )
        return io.NodeOutput(
            Validation(
                rhythm=Rhythm(
                    every=settings["every"],
                    unit=settings["unit"],
                    at_start=settings["at_start"],
                    at_end=settings["at_end"],
                ),
                vae=vae,
                prompts=prompts,
                sizes=_sizes(settings["sizes"]),
                sampler=Sampler(
                    steps=settings["steps"],
                    seed=settings["seed"],
                    name=settings["sampler_name"],
                    scheduler=settings["scheduler"],
                    cfg=settings["cfg"],
                ),
                held_out=_held_out(settings),
                score=_score(settings, has_prompts=bool(prompts)),
            )
        )


def _when() -> list[Any]:
    return [
        io.Int.Input(
            "every",
            default=250,
            min=0,
            max=1_000_000,
            tooltip="How often, in the unit below; 0 for only the start and the end.",
        ),
        io.Combo.Input(
            "unit",
            options=list(UNITS),
            default=UNITS[0],
            tooltip="steps: updates of the LoRA. epochs: passes over all pictures.",
        ),
        io.Boolean.Input(
            "at_start", default=True, tooltip="Also before the first step, to compare with."
        ),
        io.Boolean.Input("at_end", default=True, tooltip="Also after the last step."),
    ]


def _pictures() -> list[Any]:
    return [
        io.String.Input(
            "prompts",
            default="",
            multiline=True,
            tooltip="One prompt in each line; a picture is drawn of each. Empty draws none.",
        ),
        io.Combo.Input(
            "library",
            options=[NO_LIBRARY, *folders.dataset_files((".json",))],
            default=NO_LIBRARY,
            tooltip="A prompt library below input/, as SimpleTuner has it: a JSON file of names "
            "and prompts. Its prompts come after the lines above.",
        ),
        io.String.Input(
            "negative",
            default="",
            tooltip="What should not be in the pictures. It has an effect when cfg is above 1.",
        ),
        io.String.Input(
            "sizes",
            default="",
            tooltip="Width x height of the pictures, several with commas: 1024x1024, 768x1152. "
            "Empty takes the size of the first trained picture.",
        ),
        *sampler_inputs(),
        io.Float.Input(
            "guidance",
            default=3.5,
            min=0.0,
            max=100.0,
            step=0.1,
            tooltip="Guidance of FLUX.1-dev for the pictures, as FluxGuidance sets it.",
        ),
        io.Float.Input(
            "cfg",
            default=Sampler.cfg,
            min=0.0,
            max=100.0,
            step=0.1,
            tooltip="True classifier-free guidance, as in KSampler. 1 is off and twice as fast.",
        ),
    ]


def _optional() -> list[Any]:
    return [
        io.Clip.Input(
            "clip", optional=True, tooltip="The text encoders, for the prompts of the pictures."
        ),
        io.Vae.Input("vae", optional=True, tooltip="The autoencoder, to draw the pictures."),
        AtelierLatentCache.Input(
            "held_out_latents",
            optional=True,
            tooltip="Pictures that are not trained, from Cache Latents: the loss on them, with "
            "noise that stays the same, tells when a LoRA begins to learn by heart.",
        ),
        AtelierPromptCache.Input(
            "held_out_prompts", optional=True, tooltip="Their captions, from Encode Prompts."
        ),
        io.ClipVision.Input(
            "score_vision",
            optional=True,
            tooltip="A CLIP vision model, from Load CLIP Vision: says how well the sample pictures "
            "fit their prompts.",
        ),
        io.Clip.Input(
            "score_clip",
            optional=True,
            tooltip="The text encoder of the same CLIP model, from Load CLIP.",
        ),
        host.make_input(
            io.Boolean,
            "mask_padding",
            default=False,
            optional=True,
            advanced=True,
            tooltip="Hide the padding after each prompt when its picture is drawn, as mask_padding "
            "of Encode Prompts does while training. For LibreFLUX only. Sampling may be a little "
            "slower.",
        ),
    ]


def _encoded_prompts(settings: dict[str, Any]) -> tuple[EncodedPrompt, ...]:
    prompts = prompts_of_lines(settings["prompts"])
    if settings["library"] != NO_LIBRARY:
        prompts += prompts_of_library(folders.dataset_file(settings["library"]))
    clip, guidance = settings.get("clip"), settings["guidance"]
    require(
        not prompts or clip is not None,
        "Validation Settings has prompts and no clip to encode them: connect its clip input.",
    )
    if not prompts:
        return ()
    hides = settings.get("mask_padding", False)
    negative = encode_prompt(clip, settings["negative"], guidance, hides_padding=hides)
    return tuple(
        EncodedPrompt(
            name=prompt.name,
            text=prompt.text,
            positive=encode_prompt(clip, prompt.text, guidance, hides_padding=hides),
            negative=negative,
        )
        for prompt in prompts
    )


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    sizes = parse_sizes(text)
    for width, height in sizes:
        for side in (width, height):
            require(
                64 <= side <= 8192 and side % _SIDE_STEP == 0,
                f"The sides of sample pictures must be multiples of {_SIDE_STEP} between 64 and "
                f"8192, got {width}x{height}.",
            )
    return sizes


def _held_out(settings: dict[str, Any]) -> TrainingData | None:
    latents, prompts = settings.get("held_out_latents"), settings.get("held_out_prompts")
    require(
        (latents is None) == (prompts is None),
        "The loss on held out pictures needs both held_out_latents and held_out_prompts of "
        "Validation Settings: connect the other one too, or neither.",
    )
    return None if latents is None else TrainingData(latents=latents, prompts=prompts)


def _score(settings: dict[str, Any], *, has_prompts: bool) -> Score | None:
    vision, text = settings.get("score_vision"), settings.get("score_clip")
    require(
        (vision is None) == (text is None),
        "The picture–text score needs both score_vision and score_clip of Validation Settings: "
        "connect the other one too, or neither.",
    )
    require(
        vision is None or has_prompts,
        "The picture–text score needs sample pictures: write prompts into Validation Settings.",
    )
    return None if vision is None else Score(vision=vision, text=text)
