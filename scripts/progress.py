"""What a terminal shows while ComfyUI works: a bar with the numbers that the nodes report."""

import shutil
import sys
import time
from typing import Any

from comfy_server import Event, node_name
from workflow import Graph

BAR_LENGTH = 16
LINE_EVERY_S = 3
"""How long a bar waits between two lines where the output is not a terminal."""


class Bar:
    """A bar in one line of a terminal; elsewhere a line now and then."""

    def __init__(self) -> None:
        self._printed = time.monotonic()
        self._is_open = False

    def show(self, done: int, total: int, text: str) -> None:
        filled = BAR_LENGTH * done // total
        line = f"  [{'#' * filled}{'-' * (BAR_LENGTH - filled)}] {text}"
        if sys.stdout.isatty():
            columns = shutil.get_terminal_size().columns - 1
            print(f"\r{line[:columns]:<{columns}}", end="", flush=True)
            self._is_open = True
        elif time.monotonic() - self._printed > LINE_EVERY_S:
            self._printed = time.monotonic()
            print(line, flush=True)

    def close(self) -> None:
        """End the line; the next bar begins a new one."""
        if self._is_open:
            print(flush=True)
        self._printed, self._is_open = time.monotonic(), False


class NodeProgress:
    """Names each node when it starts, shows its bar, and times it."""

    def __init__(self, graph: Graph) -> None:
        self.seconds: dict[str, float] = {}
        """How long each node took, by id; a node answered from the cache is not in it."""
        self._graph = graph
        self._bar = Bar()
        self._node, self._text, self._since = "", "", time.monotonic()

    def __call__(self, event: Event) -> None:
        if event.type == "executing":
            self._enter(event.data.get("node") or "")
        elif event.type in ("execution_success", "execution_error", "execution_interrupted"):
            self._enter("")
        elif event.type == "execution_cached" and event.data.get("nodes"):
            print(f"{len(event.data['nodes'])} nodes are answered from the cache", flush=True)
        elif event.type == "progress_text":
            self._text = " ".join(event.data["text"].split())
        elif event.type == "atelier.step":
            self._text = step_text(event.data)
        elif event.type == "progress" and event.data.get("max"):
            value, total = int(event.data["value"]), int(event.data["max"])
            self._bar.show(value, total, self._text or f"{value}/{total}")

    def _enter(self, node_id: str) -> None:
        if node_id == self._node:
            return
        now = time.monotonic()
        if self._node:
            self.seconds[self._node] = self.seconds.get(self._node, 0) + now - self._since
        self._bar.close()
        self._node, self._text, self._since = node_id, "", now
        if node_id:
            print(node_name(self._graph, node_id).rpartition(" (")[0], flush=True)


def step_text(data: dict[str, Any]) -> str:
    """A training's `atelier.step` event as a line."""
    minutes, seconds = divmod(round(data["seconds_left"]), 60)
    metrics = data["metrics"]
    return (
        f"step {data['step']}/{data['num_steps']}  loss {metrics['loss'][-1]:.4f}  "
        f"{metrics['seconds'][-1]:.2f} s/step  {minutes}:{seconds:02d} left"
    )


class OutputProgress:
    """One bar over many pictures: how many of the nodes `outputs` have theirs."""

    def __init__(self, outputs: list[str]) -> None:
        self._waiting = set(outputs)
        self._total = len(self._waiting)
        self._bar, self._began = Bar(), time.monotonic()

    def __call__(self, event: Event) -> None:
        if event.type == "executed" and event.data.get("node") in self._waiting:
            self._waiting.remove(event.data["node"])
            done = self._total - len(self._waiting)
            left = (time.monotonic() - self._began) / done * len(self._waiting)
            minutes, seconds = divmod(round(left), 60)
            text = f"{done}/{self._total} pictures  {minutes}:{seconds:02d} left"
            self._bar.show(done, self._total, text)
        elif event.type == "execution_success":
            self._bar.close()
