"""Matrices that bitsandbytes packed into 4 bits, as they lie in files.

Beside `….weight` lie its scales (`absmax`), which may be quantized themselves (`nested_…`), the
values that the 16 codes stand for (`quant_map`), and a small JSON text as bytes (`quant_state.…`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .formats import FORMATS, bitsandbytes_functional

_STATE = ".quant_state.bitsandbytes__"
_PLAIN = ("absmax", "quant_map")
AUXILIARIES = {False: _PLAIN, True: (*_PLAIN, "nested_absmax", "nested_quant_map")}
"""The tensors beside a matrix, by whether its scales are quantized too."""


@dataclass(frozen=True)
class FourBit:
    """What the small JSON text says of one matrix."""

    shape: tuple[int, ...]
    kind: str
    block_size: int
    is_nested: bool

    @classmethod
    def from_bytes(cls, text: bytes, name: str) -> FourBit:
        """Read the text of the tensor `name`."""
        values = json.loads(text)
        kind = name.rpartition(_STATE)[2]
        shape = tuple(values["shape"])
        return cls(shape, kind, values["blocksize"], "nested_offset" in values)

    @property
    def suffix(self) -> str:
        """The end of the state's name, after the matrix and a dot."""
        return f"{_STATE}{self.kind}"[1:]

    @property
    def store_format(self) -> str | None:
        """The format of the store with the same bytes, where no block crosses rows."""
        group = FORMATS["nf4"].group  # and that of fp4
        is_same = self.block_size == group and self.shape[-1] % group == 0
        return self.kind if is_same and self.kind in ("nf4", "fp4") else None

    def load(self, tensors: dict[str, Tensor], device: torch.device):
        """bitsandbytes' own state of the matrix, from the tensors beside it.

        Its `absmax` is one float32 scale per block: quantized scales are unpacked, exactly.
        """
        functional = bitsandbytes_functional()
        state = functional.QuantState.from_dict(dict(tensors), device=device)
        if state.nested:
            assert state.offset is not None
            scales = functional.dequantize_blockwise(state.absmax, state.state2)
            state.absmax, state.nested = torch.add(scales, state.offset).float(), False
        return state


def state_names(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(matrix, its state) for every matrix of 4 bits."""
    for name in names:
        matrix, mark, _ = name.rpartition(_STATE)
        if mark:
            yield matrix, name


def dequantize(data: Tensor, state) -> Tensor:
    """The matrix in float32."""
    state.dtype = torch.float32
    return bitsandbytes_functional().dequantize_4bit(data, state)
