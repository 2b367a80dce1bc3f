"""The node that chooses how attention is computed while pictures are sampled."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from . import host
from .native_attention import BACKENDS, with_attention


class AttentionBackend(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="AtelierAttentionBackend",
            display_name="Attention Backend",
            category="Atelier/sampling",
            description="Which program computes the attention of this MODEL while pictures are "
            "sampled. Training never uses it: its gradients need torch's own attention.",
            search_aliases=["sage attention", "flash attention", "sdpa", "speed"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL to sample with."),
                io.Combo.Input(
                    "backend",
                    options=list(BACKENDS),
                    default=BACKENDS[0],
                    tooltip="sdpa: torch's own, exact. flash: flash-attn, exact, for fp16 and bf16 "
                    "on NVIDIA cards. sage: sageattention, in 8 bits, by its authors the fastest: "
                    "pictures change a little. Both need their package; where one of them cannot "
                    "compute, ComfyUI takes sdpa and says so in its log.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="MODEL", tooltip="The MODEL with this backend, for samplers."
                )
            ],
        )

    @classmethod
    def execute(cls, model: Any, backend: str) -> io.NodeOutput:
        return io.NodeOutput(with_attention(model, backend))
