"""ComfyUI's executor in this process, with stand-ins for two of its loaders.

The loaders count their runs and give the nano networks, whatever file they are asked for.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

from atelier.nodes.encoders import build_clip, build_vae

NANO = Path(__file__).resolve().parents[2] / "assets" / "nano"


@functools.cache
def nano_vae() -> Any:
    return build_vae(NANO)


@functools.cache
def nano_clip() -> Any:
    return build_clip(NANO)


class CountingLoader:
    """A loader in the old style of nodes; `runs` counts how often it was executed."""

    runs = 0
    FUNCTION = "load"
    CATEGORY = "test"

    @classmethod
    def counted(cls) -> None:
        CountingLoader.runs += 1


class NanoVaeLoader(CountingLoader):
    RETURN_TYPES = ("VAE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"vae_name": ("STRING", {})}}

    def load(self, vae_name: str) -> tuple:
        self.counted()
        return (nano_vae(),)


class NanoClipLoader(CountingLoader):
    RETURN_TYPES = ("CLIP",)

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"clip_name1": ("STRING", {}), "clip_name2": ("STRING", {})}}

    def load(self, clip_name1: str, clip_name2: str) -> tuple:
        self.counted()
        return (nano_clip(),)


class Keep:
    """An output node that keeps what it is given."""

    kept: list[Any] = []  # noqa: RUF012
    FUNCTION, CATEGORY, OUTPUT_NODE, RETURN_TYPES = "keep", "test", True, ()

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"value": ("*", {})}}

    def keep(self, value: Any) -> tuple:
        Keep.kept.append(value)
        return ()


class Give:
    """A node that gives one of the values that a test put here."""

    values: ClassVar[dict[str, Any]] = {}
    FUNCTION, CATEGORY, RETURN_TYPES = "give", "test", ("*",)

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"name": ("STRING", {})}}

    def give(self, name: str) -> tuple:
        return (Give.values[name],)


class Name:
    """A node that gives a file's name, so that a loader's input is linked."""

    FUNCTION, CATEGORY, RETURN_TYPES = "name", "test", ("STRING",)

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {}}

    def name(self) -> tuple:
        return ("a.safetensors",)


class Runner:
    """Runs graphs as ComfyUI does, each time with an empty cache of node outputs or with none; or
    one after the other, with what it keeps between them."""

    def __init__(self, *, caches: bool = True, one_after_the_other: bool = False) -> None:
        self._caches = caches
        self._keeps = one_after_the_other
        self._executor: Any = None

    def run(self, graph: dict[str, Any]) -> Any:
        """The value that the graph's Keep node got, None if it did not run. Raises RuntimeError
        with ComfyUI's message."""
        import execution  # brings in all of ComfyUI's nodes

        from nodes import NODE_CLASS_MAPPINGS  # noqa: TID251

        kinds = {name: NODE_CLASS_MAPPINGS[node["class_type"]] for name, node in graph.items()}
        outputs = [name for name, kind in kinds.items() if getattr(kind, "OUTPUT_NODE", False)]
        Keep.kept.clear()
        CountingLoader.runs = 0
        if not (self._keeps and self._executor):
            server = SimpleNamespace(client_id=None, last_node_id=None, send_sync=lambda *_: None)
            kind = execution.CacheType.CLASSIC if self._caches else execution.CacheType.NONE
            sizes = {"ram": 0, "ram_inactive": 0, "lru": 0}
            self._executor = execution.PromptExecutor(server, kind, cache_args=sizes)
        executor = self._executor
        executor.execute(copy.deepcopy(graph), "prompt", {}, outputs)
        event, data = executor.status_messages[-1]
        if event != "execution_success":
            raise RuntimeError(data.get("exception_message", event))
        outputs = executor.history_result["outputs"]
        self.texts = {name: output["text"] for name, output in outputs.items() if "text" in output}
        self.images = {name: out["images"] for name, out in outputs.items() if "images" in out}
        return Keep.kept[0] if Keep.kept else None


def forget_networks() -> None:
    """Free the nano networks while ComfyUI's modules still exist."""
    nano_vae.cache_clear()
    nano_clip.cache_clear()
