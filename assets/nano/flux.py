"""The transformer in FLUX's own layout and key names.

Shapes: B batch, C latent channels, H W latent size, L image tokens, T text tokens, D width,
N heads, K head size.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, rms_norm, scaled_dot_product_attention, silu


@dataclass(frozen=True)
class FluxShape:
    """Sizes of the transformer; names as in ComfyUI's `FluxParams`."""

    in_channels: int = 64
    hidden_size: int = 256
    num_heads: int = 2
    depth: int = 2
    depth_single_blocks: int = 4
    mlp_ratio: int = 4
    context_in_dim: int = 128
    vec_in_dim: int = 64
    axes_dim: tuple[int, int, int] = (16, 56, 56)
    theta: int = 10000


class Embedder(nn.Module):
    """Linear, SiLU, Linear: for the time, the guidance and the pooled text vector."""

    def __init__(self, in_dim: int, width: int) -> None:
        super().__init__()
        self.in_layer, self.out_layer = nn.Linear(in_dim, width), nn.Linear(width, width)

    def forward(self, vector_BD: Tensor) -> Tensor:
        return self.out_layer(silu(self.in_layer(vector_BD)))


class Scale(nn.Module):
    """Root-mean-square norm whose weight is called `scale`, as in FLUX's files."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, (x.shape[-1],), self.scale, 1e-6)


class HeadNorm(nn.Module):
    def __init__(self, head_size: int) -> None:
        super().__init__()
        self.query_norm, self.key_norm = Scale(head_size), Scale(head_size)

    def split(self, qkv_BLD: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """Fused projection [B, L, 3 N K] to normed q, k and plain v, each [B, N, L, K]."""
        q, k, v = qkv_BLD.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.query_norm(q), self.key_norm(k), v


class Modulation(nn.Module):
    """AdaLN: `multiplier` vectors [B, 1, D] from the conditioning; zero at the start."""

    def __init__(self, width: int, multiplier: int) -> None:
        super().__init__()
        self.multiplier = multiplier
        self.lin = nn.Linear(width, multiplier * width)

    def forward(self, vec_BD: Tensor) -> tuple[Tensor, ...]:
        return self.lin(silu(vec_BD))[:, None].chunk(self.multiplier, dim=-1)


class StreamAttention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.qkv, self.norm, self.proj = (
            nn.Linear(width, 3 * width),
            HeadNorm(width // num_heads),
            nn.Linear(width, width),
        )


def modulate(x_BLD: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return layer_norm(x_BLD, (x_BLD.shape[-1],), eps=1e-6) * (1 + scale) + shift


def rotate(x_BNLK: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of neighbouring pairs; `rotation` is (cos, sin), each [L, K/2]."""
    cos, sin = rotation
    real, imaginary = x_BNLK.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack(
        (real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1
    ).flatten(-2)


def attend(q: Tensor, k: Tensor, v: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """q, k, v [B, N, L, K] to [B, L, N K]."""
    return (
        scaled_dot_product_attention(rotate(q, rotation), rotate(k, rotation), v)
        .transpose(1, 2)
        .flatten(2)
    )


class DoubleBlock(nn.Module):
    def __init__(self, shape: FluxShape) -> None:
        super().__init__()
        width, inner = shape.hidden_size, shape.hidden_size * shape.mlp_ratio
        self.num_heads = shape.num_heads
        for stream in ("img", "txt"):
            self.add_module(f"{stream}_mod", Modulation(width, 6))
            self.add_module(f"{stream}_attn", StreamAttention(width, shape.num_heads))
            mlp = nn.Sequential(
                nn.Linear(width, inner), nn.GELU(approximate="tanh"), nn.Linear(inner, width)
            )
            self.add_module(f"{stream}_mlp", mlp)

    def forward(
        self, img: Tensor, txt: Tensor, vec: Tensor, rotation: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        img_mod, txt_mod = self.img_mod(vec), self.txt_mod(vec)
        img_qkv = self.img_attn.norm.split(
            self.img_attn.qkv(modulate(img, *img_mod[:2])), self.num_heads
        )
        txt_qkv = self.txt_attn.norm.split(
            self.txt_attn.qkv(modulate(txt, *txt_mod[:2])), self.num_heads
        )
        mixed = attend(
            *(torch.cat(pair, dim=2) for pair in zip(txt_qkv, img_qkv, strict=True)), rotation
        )
        txt_mixed, img_mixed = mixed.split((txt.shape[1], img.shape[1]), dim=1)
        img = img + img_mod[2] * self.img_attn.proj(img_mixed)
        img = img + img_mod[5] * self.img_mlp(modulate(img, *img_mod[3:5]))
        txt = txt + txt_mod[2] * self.txt_attn.proj(txt_mixed)
        txt = txt + txt_mod[5] * self.txt_mlp(modulate(txt, *txt_mod[3:5]))
        return img, txt


class SingleBlock(nn.Module):
    def __init__(self, shape: FluxShape) -> None:
        super().__init__()
        width, inner = shape.hidden_size, shape.hidden_size * shape.mlp_ratio
        self.num_heads, self.split_sizes = shape.num_heads, (3 * width, inner)
        self.linear1, self.linear2 = (
            nn.Linear(width, 3 * width + inner),
            nn.Linear(width + inner, width),
        )
        self.norm, self.modulation = HeadNorm(width // shape.num_heads), Modulation(width, 3)

    def forward(self, x: Tensor, vec: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        shift, scale, gate = self.modulation(vec)
        qkv, mlp = self.linear1(modulate(x, shift, scale)).split(self.split_sizes, dim=-1)
        mixed = attend(*self.norm.split(qkv, self.num_heads), rotation)
        return x + gate * self.linear2(
            torch.cat((mixed, nn.functional.gelu(mlp, approximate="tanh")), dim=-1)
        )


class FinalLayer(nn.Module):
    def __init__(self, width: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        return self.linear(modulate(x, *self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)))


def sinusoid(t_B: Tensor, dim: int = 256) -> Tensor:
    frequencies = torch.exp(
        -math.log(10000) * torch.arange(dim // 2, device=t_B.device) / (dim // 2)
    )
    angles = 1000 * t_B[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class NanoFlux(nn.Module):
    """FLUX with the original parameter names, so that its state dict is the file."""

    def __init__(self, shape: FluxShape = FluxShape()) -> None:
        super().__init__()
        self.shape, width = shape, shape.hidden_size
        self.img_in, self.txt_in = (
            nn.Linear(shape.in_channels, width),
            nn.Linear(shape.context_in_dim, width),
        )
        self.time_in, self.guidance_in = Embedder(256, width), Embedder(256, width)
        self.vector_in = Embedder(shape.vec_in_dim, width)
        self.double_blocks = nn.ModuleList(DoubleBlock(shape) for _ in range(shape.depth))
        self.single_blocks = nn.ModuleList(
            SingleBlock(shape) for _ in range(shape.depth_single_blocks)
        )
        self.final_layer = FinalLayer(width, shape.in_channels)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for zeroed in (m.lin for m in self.modules() if isinstance(m, Modulation)):
            nn.init.zeros_(zeroed.weight)
        nn.init.zeros_(self.final_layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def rotation(
        self, num_text: int, rows: int, columns: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """cos and sin [T + rows x columns, K/2]; text tokens stand at position 0 of every axis."""
        grid = torch.cartesian_prod(
            torch.zeros(1), torch.arange(float(rows)), torch.arange(float(columns))
        )
        positions = torch.cat((torch.zeros(num_text, 3), grid)).to(device)
        angles = [
            positions[:, axis, None]
            / self.shape.theta ** (torch.arange(0, size, 2, device=device) / size)
            for axis, size in enumerate(self.shape.axes_dim)
        ]
        return torch.cat(angles, dim=-1).cos(), torch.cat(angles, dim=-1).sin()

    def forward(
        self,
        tokens_BLD: Tensor,
        t_B: Tensor,
        context_BTD: Tensor,
        pooled_BD: Tensor,
        guidance_B: Tensor,
    ) -> Tensor:
        """Velocity [B, L, 64] of square pictures; t is sigma in 0..1, guidance is unscaled."""
        side = math.isqrt(tokens_BLD.shape[1])
        rotation = self.rotation(context_BTD.shape[1], side, side, tokens_BLD.device)
        vec = (
            self.time_in(sinusoid(t_B))
            + self.guidance_in(sinusoid(guidance_B))
            + self.vector_in(pooled_BD)
        )
        img, txt = self.img_in(tokens_BLD), self.txt_in(context_BTD)
        for block in self.double_blocks:
            img, txt = block(img, txt, vec, rotation)
        x = torch.cat((txt, img), dim=1)
        for block in self.single_blocks:
            x = block(x, vec, rotation)
        return self.final_layer(x[:, txt.shape[1] :], vec)


def pack(latents_BCHW: Tensor) -> Tensor:
    """[B, C, H, W] to tokens [B, H/2 x W/2, 4 C], channel order (c, row, column) as in FLUX."""
    return nn.functional.pixel_unshuffle(latents_BCHW, 2).flatten(2).transpose(1, 2)


def unpack(tokens_BLD: Tensor) -> Tensor:
    side = math.isqrt(tokens_BLD.shape[1])
    return nn.functional.pixel_shuffle(tokens_BLD.transpose(1, 2).unflatten(2, (side, side)), 2)
