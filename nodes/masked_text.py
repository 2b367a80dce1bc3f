"""Prompts for models that do not see the padding behind them."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from . import host
from .sampling import encode_prompt


class MaskedTextEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="AtelierMaskedTextEncode",
            display_name="CLIP Text Encode (Hidden Padding)",
            category="Atelier/sampling",
            description="A prompt whose padding the model does not see, for LibreFLUX, which was "
            "trained that way, and for LoRAs trained with mask_padding of Encode Prompts.",
            search_aliases=["attention mask", "libreflux", "t5 mask"],
            inputs=[
                io.Clip.Input("clip", tooltip="FLUX's two text encoders."),
                io.String.Input(
                    "text", multiline=True, tooltip="The prompt, as in CLIP Text Encode."
                ),
                io.Float.Input(
                    "guidance",
                    default=3.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="As FluxGuidance sets it; LibreFLUX takes none and ignores it.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    tooltip="The prompt with its mask. A step of sampling may be a little slower."
                )
            ],
        )

    @classmethod
    def execute(cls, clip: Any, text: str, guidance: float) -> io.NodeOutput:
        return io.NodeOutput(encode_prompt(clip, text, guidance, hides_padding=True))
