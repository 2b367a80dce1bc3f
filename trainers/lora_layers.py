"""A frozen Linear with what is learned beside it: LoRA and DoRA. LoKr and LoHa are in `lycoris`.

Shapes: in and out features of the Linear, r the rank. What is learned is float32, or bfloat16 with
an optimizer of that; what is computed with it is float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .flow import seeded
from .flux import LinearView

Tensors = dict[str, Tensor]


@dataclass(kw_only=True)
class Dropout:
    """Which inputs the layers of a LoRA do not see: the same ones whenever a micro-step is
    computed, in the backward pass of checkpointing, and in a run that goes on."""

    share: float
    seed: int
    micro_step: int = 0

    def __call__(self, x: Tensor, layer: str) -> Tensor:
        """`x` with zeros, the rest larger for it; as it is where nothing is learned from it."""
        if not self.share or not torch.is_grad_enabled():
            return x
        return self._drop(x, layer)  # pyright: ignore[reportCallIssue]

    @torch.compiler.disable  # its random numbers are no part of a graph
    def _drop(self, x: Tensor, layer: str) -> Tensor:
        key = seeded(self.seed, "dropout", self.micro_step, layer).initial_seed()
        generator = torch.Generator(x.device).manual_seed(key)
        kept = torch.rand(x.shape, generator=generator, device=x.device) >= self.share
        return x * kept / (1 - self.share)


class Adapted(nn.Module):
    """What takes the place of a Linear in the network. While not `enabled` it is that Linear."""

    def __init__(self, base: LinearView, name: str, dropout: Dropout) -> None:
        super().__init__()
        self.base, self.name, self.dropout, self.enabled = base, name, dropout, True

    def forward(self, x: Tensor) -> Tensor:
        return self.adapted(x) if self.enabled else self.base(x)

    def adapted(self, x: Tensor) -> Tensor:
        """The Linear's output with what is learned, in the dtype of the Linear's."""
        y = self.base(x)
        return (y + self.added(x.float())).to(y.dtype)

    def added(self, x: Tensor) -> Tensor:
        """What is added to the Linear's output [..., out] for `x` [..., in], both float32."""
        raise NotImplementedError

    def trained(self) -> dict[str, nn.Parameter]:
        """What is learned, by its name in a file."""
        raise NotImplementedError

    def start(self, generator: torch.Generator, init: str) -> None:
        """Draw the numbers that it starts with, on the CPU."""
        raise NotImplementedError

    def kept(self) -> Tensors:
        """What else tells what it does, by its name in a state."""
        return {}

    def load_kept(self, tensors: Tensors) -> None:
        """What `kept` gave."""

    def _empty(self, rows: int, columns: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(rows, columns, device=self.base.weight.device))

    def _zeros(self, rows: int, columns: int) -> nn.Parameter:
        return nn.Parameter(torch.zeros(rows, columns, device=self.base.weight.device))


class LoraLinear(Adapted):
    """y = W x + scale * B A x, and less the product that it started with where that is kept."""

    def __init__(
        self, base: LinearView, name: str, dropout: Dropout, rank: int, scale: float
    ) -> None:
        super().__init__(base, name, dropout)
        self.scale = scale
        self.lora_A = self._empty(rank, base.in_features)
        self.lora_B = self._zeros(base.out_features, rank)
        # A and B at the start, where their product is taken off.
        self.start_A: Tensor | None
        self.start_B: Tensor | None
        self.register_buffer("start_A", None)
        self.register_buffer("start_B", None)

    def added(self, x: Tensor) -> Tensor:
        a, b = self.lora_A.float(), self.lora_B.float()
        result = F.linear(F.linear(self.dropout(x, self.name), a), b)
        if self.start_A is not None and self.start_B is not None:
            result = result - F.linear(F.linear(x, self.start_A), self.start_B)
        return result * self.scale

    def trained(self) -> dict[str, nn.Parameter]:
        return {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B}

    def start(self, generator: torch.Generator, init: str) -> None:
        """A ~ N(0, 1 / rank) for gaussian, as peft has it, else uniform within 1 / sqrt(in)
        (kaiming_uniform with a = sqrt(5)); B = 0."""
        rank, columns = self.lora_A.shape
        with torch.no_grad():
            if init == "gaussian":
                self.lora_A.copy_(torch.randn(rank, columns, generator=generator) / rank)
            else:
                self.lora_A.copy_(uniform(rank, columns, generator))

    def start_at(self, a: Tensor, b: Tensor, *, subtracted: bool) -> None:
        """Begin with these factors; `subtracted` takes their product off again."""
        with torch.no_grad():
            self.lora_A.copy_(a)
            self.lora_B.copy_(b)
        if subtracted:
            self.subtract_start()

    def subtract_start(self) -> None:
        """Take the product of the factors as they are off from now on."""
        self.start_A = self.lora_A.detach().to(torch.float32, copy=True)
        self.start_B = self.lora_B.detach().to(torch.float32, copy=True)

    def kept(self) -> Tensors:
        if self.start_A is None or self.start_B is None:
            return {}
        return {"start_A.weight": self.start_A, "start_B.weight": self.start_B}

    def load_kept(self, tensors: Tensors) -> None:
        if "start_A.weight" in tensors:
            device = self.lora_A.device
            self.start_A = tensors["start_A.weight"].to(device, copy=True)
            self.start_B = tensors["start_B.weight"].to(device, copy=True)


class DoraLinear(LoraLinear):
    """y = m / |W + scale B A| (W x + scale B A x): the norms are those of the rows and no part of
    the gradient (Liu et al. 2024, section 4.3).

    No dense matrix is made for them: |W + D|² = |W|² + 2 W·D + |D|² by rows, where W A^T comes from
    the packed matrix.
    """

    def __init__(
        self, base: LinearView, name: str, dropout: Dropout, rank: int, scale: float
    ) -> None:
        super().__init__(base, name, dropout, rank, scale)
        device = base.weight.device
        self.magnitude = nn.Parameter(torch.ones(base.out_features, device=device))
        # Lengths of W's rows [out]; W has the frozen LoRAs in it.
        self.base_norm: Tensor
        self.register_buffer("base_norm", torch.ones(base.out_features, device=device))

    def measure(self) -> None:
        """Learn the lengths of W's rows, and start with them."""
        with torch.no_grad():
            self.base_norm = self.base.dense().norm(dim=1)
            self.magnitude.copy_(self.base_norm)

    @torch.no_grad()
    def norm(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Lengths of the rows of W + scale B A [out]; the product with W in `dtype`."""
        a, b = self.lora_A.float(), self.lora_B.float()
        crossed = (b * self.base.times_unpacked(a.to(dtype)).float().T).sum(1)
        own = ((b @ (a @ a.T)) * b).sum(1)
        squared = self.base_norm**2 + 2 * self.scale * crossed + self.scale**2 * own
        return squared.clamp_min(torch.finfo(torch.float32).tiny).sqrt()

    def adapted(self, x: Tensor) -> Tensor:
        y = self.base.times(x)
        whole = (y + self.added(x.float())) * (self.magnitude / self.norm(x.dtype))
        bias = self.base.bias
        whole = whole if bias is None else whole + bias
        return self.base.assisted(whole.to(y.dtype), x)

    def trained(self) -> dict[str, nn.Parameter]:
        return {**super().trained(), "magnitude": self.magnitude}

    def kept(self) -> Tensors:
        """With both lengths, a file can be made without the base model."""
        return {**super().kept(), "base_norm": self.base_norm, "norm": self.norm()}

    def load_kept(self, tensors: Tensors) -> None:
        super().load_kept(tensors)
        self.base_norm = tensors["base_norm"].to(self.lora_A.device, copy=True)


def uniform(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """torch's own start of a Linear: uniform within 1 / sqrt(columns)."""
    return (2 * torch.rand(rows, columns, generator=generator) - 1) / math.sqrt(columns)
