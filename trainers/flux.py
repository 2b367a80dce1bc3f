"""FLUX.1: its names, its shape, and the diffusers network over a weight store.

Shapes: B batch, C latent channels (16), H W latent size, L image tokens (H/2 * W/2), T text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .blocks import BlockRunner
from .eight_bit import eight_bit_input_gradient, eight_bit_linear
from .frozen import FrozenLora
from .packages import importing
from .packed_weight import Matrix, PackedWeight
from .segments import segments_of
from .speed_settings import SpeedSettings
from .store import Weights, WeightStore

HEAD_SIZE = 128
AXES = (16, 56, 56)
LATENT_CHANNELS = 16


@dataclass(frozen=True, kw_only=True)
class FluxConfig:
    """The numbers that tell one FLUX from another; all are read from the shapes in its file."""

    hidden_size: int
    depth: int
    depth_single: int
    in_channels: int
    context_dim: int
    vector_dim: int
    guidance: bool

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> FluxConfig:
        """Read from the shapes of the tensors under their original names."""
        hidden_size, in_channels = shapes["img_in.weight"]
        return cls(
            hidden_size=hidden_size,
            depth=_count_blocks(shapes, "double_blocks."),
            depth_single=_count_blocks(shapes, "single_blocks."),
            in_channels=in_channels,
            context_dim=shapes["txt_in.weight"][1],
            vector_dim=shapes["vector_in.in_layer.weight"][1],
            guidance="guidance_in.in_layer.weight" in shapes,
        )

    @property
    def num_blocks(self) -> int:
        return self.depth + self.depth_single

    @property
    def num_heads(self) -> int:
        return self.hidden_size // HEAD_SIZE


def _count_blocks(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> int:
    return len({name.split(".")[1] for name in shapes if name.startswith(prefix)})


@dataclass(frozen=True)
class Source:
    """Where a diffusers tensor lies in the original file: a name and a range of its rows."""

    name: str
    rows: slice = field(default_factory=lambda: slice(None))


_DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
_DOUBLE_QKV = {
    ("attn.to_q", "attn.to_k", "attn.to_v"): "img_attn.qkv",
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"): "txt_attn.qkv",
}
_DOUBLE_NORMS = {
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
}
_SINGLE = {"norm.linear": "modulation.lin", "proj_out": "linear2"}
_SINGLE_NORMS = {"attn.norm_q": "norm.query_norm", "attn.norm_k": "norm.key_norm"}
_TOP = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "proj_out": "final_layer.linear",
}
_TOP_GUIDANCE = {
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
}
FINAL_MODULATION = ("norm_out.linear", "final_layer.adaLN_modulation.1")
"""diffusers' name and the original one; the halves shift and scale are swapped between them."""


def linear_sources(config: FluxConfig) -> dict[str, Source]:
    """diffusers' Linear module name -> rows of an original Linear, without FINAL_MODULATION."""
    width = config.hidden_size
    sources = {ours: Source(theirs) for ours, theirs in _TOP.items()}
    if config.guidance:
        sources |= {ours: Source(theirs) for ours, theirs in _TOP_GUIDANCE.items()}
    for index in range(config.depth):
        ours, theirs = f"transformer_blocks.{index}", f"double_blocks.{index}"
        sources |= {f"{ours}.{a}": Source(f"{theirs}.{b}") for a, b in _DOUBLE.items()}
        for names, fused in _DOUBLE_QKV.items():
            for part, name in enumerate(names):
                rows = slice(part * width, (part + 1) * width)
                sources[f"{ours}.{name}"] = Source(f"{theirs}.{fused}", rows)
    for index in range(config.depth_single):
        ours, theirs = f"single_transformer_blocks.{index}", f"single_blocks.{index}"
        sources |= {f"{ours}.{a}": Source(f"{theirs}.{b}") for a, b in _SINGLE.items()}
        for part, name in enumerate(("attn.to_q", "attn.to_k", "attn.to_v")):
            rows = slice(part * width, (part + 1) * width)
            sources[f"{ours}.{name}"] = Source(f"{theirs}.linear1", rows)
        sources[f"{ours}.proj_mlp"] = Source(f"{theirs}.linear1", slice(3 * width, 7 * width))
    return sources


def norm_sources(config: FluxConfig) -> dict[str, str]:
    """diffusers' QK-norm module name -> the original module, whose tensor is called `scale`."""
    names: dict[str, str] = {}
    for index in range(config.depth):
        ours, theirs = f"transformer_blocks.{index}", f"double_blocks.{index}"
        names |= {f"{ours}.{a}": f"{theirs}.{b}" for a, b in _DOUBLE_NORMS.items()}
    for index in range(config.depth_single):
        ours, theirs = f"single_transformer_blocks.{index}", f"single_blocks.{index}"
        names |= {f"{ours}.{a}": f"{theirs}.{b}" for a, b in _SINGLE_NORMS.items()}
    return names


def original_linears(config: FluxConfig) -> dict[str, list[str]]:
    """Original Linear module -> the diffusers modules whose rows, in order, make it up."""
    parts: dict[str, list[tuple[int, str]]] = {}
    for ours, source in linear_sources(config).items():
        parts.setdefault(source.name, []).append((source.rows.start or 0, ours))
    merged = {name: [ours for _, ours in sorted(rows)] for name, rows in parts.items()}
    return merged | {FINAL_MODULATION[1]: [FINAL_MODULATION[0]]}


def is_block_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of the original file is one of those that are quantized."""
    return len(shape) == 2 and name.startswith(("double_blocks.", "single_blocks."))


class LinearView(nn.Linear):
    """A Linear of the diffusers network: some rows of a matrix that the store owns, a copy of
    their bias in the dtype that computes, and frozen LoRAs.

    The rows are cut at forward time, so the store may move its bytes at any moment. The LoRAs of
    `assistant`, pairs as the others, compute only while `is_assisted`.
    """

    assistant: Sequence[tuple[Matrix, Matrix]] = ()
    is_assisted = True
    number: Tensor | None = None
    """By which compiled blocks find it."""

    def __init__(
        self,
        store: Weights,
        source: Source,
        dtype: torch.dtype,
        loras: Sequence[tuple[Matrix, Matrix]] = (),
    ) -> None:
        """`loras` are pairs of `down` [rank, in] and `up` [out, rank]."""
        nn.Module.__init__(self)
        self.store, self.source, self._loras = store, source, loras
        self.product: Callable[[Matrix, Tensor, Tensor | None, slice], Tensor] = Matrix.linear
        self.gradient: Callable[[Matrix, Tensor, slice], Tensor] = Matrix.input_gradient
        packed, bias = store.packed[self._name], store.plain.get(f"{source.name}.bias")
        self.bias = _frozen_copy(bias[source.rows], dtype) if bias is not None else None
        self.in_features = packed.shape[1]
        self.out_features = len(range(*source.rows.indices(packed.shape[0])))

    @property
    def _name(self) -> str:
        return f"{self.source.name}.weight"

    @property
    def is_in_block(self) -> bool:
        """Whether its matrix is one of those that are quantized."""
        return is_block_matrix(self._name, self.store.packed[self._name].shape)

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Empty: tells the device for what is learned beside it, and nothing else."""
        return torch.empty(0, dtype=torch.float32, device=self.store.device)

    def forward(self, x: Tensor) -> Tensor:
        return self.assisted(self.times(x, self.bias), x)

    def times(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x` [..., in] by the transposed rows and the LoRAs that stay, with no bias but this."""
        if self.number is None:
            return self.seen_times(x, bias)
        y = torch.ops.atelier.frozen_product(x, self.number, self.out_features)
        return y if bias is None else y + bias.to(y.dtype)

    def seen_times(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """As `times`; autograd sees into it."""
        y = self.product(self.store.packed[self._name], x, bias, self.source.rows)
        return self._with_loras(y, x)

    def times_unpacked(self, x: Tensor) -> Tensor:
        """As `times`, in 8 bits never and without a gradient: for what is a property of the
        matrix."""
        if self.number is None:
            return self.seen_times_unpacked(x)
        return torch.ops.atelier.unpacked_product(x, self.number, self.out_features)

    def seen_times_unpacked(self, x: Tensor) -> Tensor:
        y = self.store.packed[self._name].linear(x, rows=self.source.rows)
        return self._with_loras(y, x)

    def assisted(self, y: Tensor, x: Tensor) -> Tensor:
        """`y` [..., out] with what the assistant adds for `x`, while it computes."""
        if not self.assistant or not self.is_assisted:
            return y
        return self._assist(y, x)  # pyright: ignore[reportCallIssue]

    @torch.compiler.disable
    def _assist(self, y: Tensor, x: Tensor) -> Tensor:
        for down, up in self.assistant:
            y = y + up.linear(down.linear(x))
        return y

    def _with_loras(self, y: Tensor, x: Tensor) -> Tensor:
        for down, up in self._loras:
            y = y + up.linear(down.linear(x))
        return y

    def input_gradient(self, grad_output: Tensor) -> Tensor:
        """The gradient [..., in] of `x` in `times`."""
        grad = self.gradient(self.store.packed[self._name], grad_output, self.source.rows)
        for down, up in self._loras:
            grad = grad + down.input_gradient(up.input_gradient(grad_output))
        return grad

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The rows [out, in] in `dtype`, without LoRAs."""
        return self.store.packed[self._name].dequantize(dtype, self.source.rows)

    def dense(self) -> Tensor:
        """The rows [out, in] with the LoRAs that stay, in float32; without any it may alias the
        store."""
        whole = self.dequantize(torch.float32)
        for down, up in self._loras:
            whole = whole + up.dequantize(torch.float32) @ down.dequantize(torch.float32)
        return whole


def require_trainable(config: FluxConfig) -> None:
    """Raises ValueError for extra input channels (Fill, Depth, Canny), which sample only."""
    if config.in_channels != 4 * LATENT_CHANNELS:
        raise ValueError(
            f"This FLUX takes {config.in_channels // 4} latent channels (Fill, Depth or Canny). "
            "It samples, but LoRAs are trained on FLUX.1-dev, schnell, Krea or Kontext."
        )


def build_transformer(
    store: Weights,
    config: FluxConfig,
    dtype: torch.dtype,
    frozen: Sequence[FrozenLora] = (),
    assistant: Sequence[FrozenLora] = (),
):
    """diffusers' `FluxTransformer2DModel` whose Linears are views into `store`; it holds no matrix
    of its own but the final modulation, a copy with diffusers' order of scale and shift.

    Args:
        config: of a network that `require_trainable` accepts.
        dtype: what the network will compute in; the biases, the QK-norm scales and the final
            modulation are kept in it.
        frozen: LoRAs that it computes with; they are copied to the store's device.
        assistant: others, which it leaves out `without_assistant`.
    """
    transformer = empty_transformer(config)
    frozen, assistant = (
        [lora.ready(store.device, dtype) for lora in loras] for loras in (frozen, assistant)
    )
    for name, source in linear_sources(config).items():
        rows = range(*source.rows.indices(store.packed[f"{source.name}.weight"].shape[0]))
        view = LinearView(store, source, dtype, _loras_on(frozen, source.name, rows))
        view.assistant = _loras_on(assistant, source.name, rows)
        transformer.set_submodule(name, view)
    swapped, source = _final_modulation(store, dtype)
    rows = range(2 * config.hidden_size)
    final = LinearView(swapped, source, dtype, _loras_on(frozen, source.name, rows, swap_halves))
    final.assistant = _loras_on(assistant, source.name, rows, swap_halves)
    transformer.set_submodule(FINAL_MODULATION[0], final)
    for ours, theirs in norm_sources(config).items():
        scale = _frozen_copy(store.plain[f"{theirs}.scale"], dtype)
        transformer.get_submodule(ours).weight = scale
    return transformer.requires_grad_(False)


@contextmanager
def without_assistant(transformer: nn.Module) -> Iterator[None]:
    """Within it the network computes without the LoRAs that only help it to train."""
    views = [module for module in transformer.modules() if isinstance(module, LinearView)]
    for view in views:
        view.is_assisted = False
    try:
        yield
    finally:
        for view in views:
            view.is_assisted = True


def _loras_on(
    loras: Sequence[FrozenLora],
    name: str,
    rows: range,
    order: Callable[[Tensor], Tensor] = lambda up: up,
) -> list[tuple[Matrix, Matrix]]:
    """`down` and `up` of those that reach some of these rows of an original Linear; `order` brings
    the rows of `up` into that of the network."""
    reaching = ((lora, lora.up_for(rows)) for lora in loras if lora.name == name)
    return [(_matrix(lora.down), _matrix(order(up))) for lora, up in reaching if up is not None]


def _matrix(tensor: Tensor) -> Matrix:
    """A matrix that autograd never sees: nothing of it is kept for backward."""
    return PackedWeight("bf16", tensor, None, tensor.shape[1])


def _frozen_copy(tensor: Tensor, dtype: torch.dtype) -> nn.Parameter:
    # Autograd keeps some of them for backward, which a host's own tensor may not allow.
    with torch.inference_mode(False):
        return nn.Parameter(tensor.to(dtype, copy=True), requires_grad=False)


def recompute_blocks(transformer) -> BlockRunner:
    """Gradient checkpointing: blocks keep their inputs only, and run once more in backward."""
    num_blocks = transformer.config.num_layers + transformer.config.num_single_layers
    segments = segments_of(SpeedSettings(), num_blocks, gradient_checkpointing=True)
    return BlockRunner(transformer, segments)


def multiply_in_8_bits(transformer) -> None:
    """Compute with the block matrices in 8 bits, forward and backward; LoRAs stay as they are."""
    for module in transformer.modules():
        if isinstance(module, LinearView) and module.is_in_block:
            module.product, module.gradient = eight_bit_linear, eight_bit_input_gradient


def empty_transformer(config: FluxConfig):
    with importing("diffusers"):
        from diffusers import FluxTransformer2DModel
    with torch.device("meta"):
        return FluxTransformer2DModel(
            in_channels=config.in_channels,
            num_layers=config.depth,
            num_single_layers=config.depth_single,
            attention_head_dim=HEAD_SIZE,
            num_attention_heads=config.num_heads,
            joint_attention_dim=config.context_dim,
            pooled_projection_dim=config.vector_dim,
            guidance_embeds=config.guidance,
            axes_dims_rope=AXES,
        )


def _final_modulation(store: Weights, dtype: torch.dtype) -> tuple[WeightStore, Source]:
    theirs = FINAL_MODULATION[1]
    weight = store.packed[f"{theirs}.weight"]
    with torch.inference_mode(False):
        swapped = swap_halves(weight.dequantize(dtype))
        bias = swap_halves(store.plain[f"{theirs}.bias"])
    packed = PackedWeight("bf16", swapped, None, weight.shape[1])
    return WeightStore({f"{theirs}.weight": packed}, {f"{theirs}.bias": bias}), Source(theirs)


def swap_halves(tensor: Tensor) -> Tensor:
    """(shift, scale) rows as (scale, shift) rows, and back; a new tensor."""
    first, second = tensor.chunk(2, dim=0)
    return torch.cat([second, first], dim=0)


def pack_latents(latents: Tensor) -> Tensor:
    """Latents [B, C, H, W] -> tokens [B, H/2 * W/2, 4C]; H and W must be even."""
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * 4)


def unpack_latents(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack_latents`, to latents [B, C, height, width]."""
    batch, _, channels = tokens.shape
    patches = tokens.view(batch, height // 2, width // 2, channels // 4, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // 4, height, width)


def image_ids(height: int, width: int, device: torch.device) -> Tensor:
    """Positions [H/2 * W/2, 3] of the image tokens: 0, row, column."""
    ids = torch.zeros(height // 2, width // 2, 3, device=device)
    ids[..., 1] = torch.arange(height // 2, device=device)[:, None]
    ids[..., 2] = torch.arange(width // 2, device=device)[None, :]
    return ids.reshape(-1, 3)


def reference_ids(height: int, width: int, device: torch.device) -> Tensor:
    """Positions [h/2 * w/2, 3] of the tokens of Kontext's one reference picture: 1, row, column.

    As ComfyUI's `Flux` has them with its default method, "offset", for the first of `ref_latents`.
    """
    ids = image_ids(height, width, device)
    ids[:, 0] = 1
    return ids


def attention_mask(text_mask: Tensor, num_image_tokens: int) -> Tensor:
    """[B, 1, 1, T + image tokens]: which tokens are seen, the text's by `text_mask` [B, T] and all
    of the pictures'."""
    seen = text_mask.new_ones(len(text_mask), num_image_tokens, dtype=torch.bool)
    return torch.cat([text_mask != 0, seen], dim=1)[:, None, None]


def velocity(
    transformer,
    latents: Tensor,
    *,
    sigma: Tensor,
    prompt_embeds: Tensor,
    pooled: Tensor,
    guidance: float | Tensor,
    text_mask: Tensor | None = None,
    reference: Tensor | None = None,
) -> Tensor:
    """The network's prediction of noise - image, [B, C, H, W] like `latents`.

    Args:
        latents: [B, C, H, W], in the dtype to compute with.
        sigma: [B], the share of noise, 0 to 1.
        prompt_embeds: [B, T, D] of the T5 encoder.
        pooled: [B, D2] of the CLIP encoder.
        guidance: the value embedded by a guidance-distilled network, ignored by others; one for
            all, or [B].
        text_mask: [B, T], not 0 where a token of the text is seen by the others; None if all are.
        reference: [B, C, h, w] latents without noise of the picture that Kontext edits.
    """
    if not isinstance(guidance, Tensor):
        guidance = sigma.new_full(sigma.shape, guidance)
    height, width = latents.shape[-2:]
    device, dtype = latents.device, latents.dtype
    image, ids = pack_latents(latents), image_ids(height, width, device)
    if reference is not None:
        image = torch.cat([image, pack_latents(reference.to(dtype))], dim=1)
        down, across = reference.shape[-2:]
        ids = torch.cat([ids, reference_ids(down, across, device)])
    tokens = transformer(
        hidden_states=image,
        encoder_hidden_states=prompt_embeds.to(dtype),
        pooled_projections=pooled.to(dtype),
        timestep=sigma,
        img_ids=ids,
        txt_ids=torch.zeros(prompt_embeds.shape[1], 3, device=device),
        guidance=guidance if transformer.config.guidance_embeds else None,
        joint_attention_kwargs=None
        if text_mask is None
        else {"attention_mask": attention_mask(text_mask, image.shape[1])},
        return_dict=False,
    )[0]
    return unpack_latents(tokens[:, : height * width // 4], height, width)
