"""With which of ComfyUI's attention functions a MODEL samples."""

from __future__ import annotations

from typing import Any

from comfy.ldm.modules import attention

_NAMES = {"sdpa": "pytorch", "flash": "flash", "sage": "sage"}
"""Ours and ComfyUI's own, which knows only those whose packages are installed."""
_PACKAGES = {"flash": "flash-attn", "sage": "sageattention"}
BACKENDS = tuple(_NAMES)


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

    def compute(_: Any, *args: Any, **kwargs: Any) -> Any:
        """What ComfyUI calls in place of its own choice, which comes first."""
        return function(*args, **kwargs)

    clone = model.clone()
    options = clone.model_options.setdefault("transformer_options", {})
    clone.model_options["transformer_options"] = {
        **options,
        "optimized_attention_override": compute,
    }
    return clone
