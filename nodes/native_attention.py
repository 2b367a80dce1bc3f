"""With which of ComfyUI's attention functions a MODEL samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from comfy.ldm.modules import attention

_NAMES = {"sdpa": "pytorch", "flash": "flash", "sage": "sage"}
"""Ours and ComfyUI's own, which knows only those whose packages are installed."""
_PACKAGES = {"flash": "flash-attn", "sage": "sageattention"}
BACKENDS = tuple(_NAMES)
_OPTION = "optimized_attention_override"


@dataclass(frozen=True)
class _Chosen:
    """What ComfyUI calls in place of its own choice, which comes first."""

    backend: str
    function: Callable[..., Any]

    def __call__(self, _: Any, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def attention_of(model: Any) -> str:
    """The backend that was chosen for a MODEL; empty where none was."""
    chosen = model.model_options.get("transformer_options", {}).get(_OPTION)
    return chosen.backend if isinstance(chosen, _Chosen) else ""


def with_attention(model: Any, backend: str) -> Any:
    """A clone of the MODEL that samples with this backend.

    Raises:
        ValueError: if its package is not installed.
    """
    function = attention.get_attention_function(_NAMES[backend], None)
    if function is None:
        raise ValueError(
            f"The attention backend {backend} needs the package {_PACKAGES[backend]}, which is not "
            "installed here or cannot be loaded. Install it into the Python of ComfyUI, or choose "
            "sdpa."
        )

    clone = model.clone()
    options = clone.model_options.get("transformer_options", {})
    chosen = _Chosen(backend, function)
    clone.model_options["transformer_options"] = {**options, _OPTION: chosen}
    return clone
