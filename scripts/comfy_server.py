"""A headless ComfyUI with this pack, and a client of its queue; used by dev.py, demo.py and tests.

Needs the package websocket-client; everything else is the standard library.
"""

import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import websocket

ROOT = Path(__file__).absolute().parent.parent
START_TIMEOUT_S = 180
DRAIN_TIMEOUT_S = 40
"""How long a stopping server may take to end its run; the pack saves a checkpoint meanwhile."""
BINARY_TEXT_EVENT = 3


class ServerError(Exception):
    """ComfyUI did not start, stopped, or could not be reached."""


class GraphError(Exception):
    """The graph was refused, failed, or was cancelled; the message is what a user should read."""

    def __init__(self, message: str, details: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.details = details or {}


@dataclass(frozen=True)
class Event:
    """One message of the websocket: its type (`progress`, `executed`, …) and data."""

    type: str
    data: dict[str, Any] = field(default_factory=dict)


class ComfyClient:
    """The queue of a running ComfyUI, at a URL such as http://127.0.0.1:8188."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.client_id = uuid.uuid4().hex

    def get(self, path: str) -> Any:
        return self._request(path)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        return self._request(path, json.dumps(body).encode())

    def object_info(self) -> dict[str, Any]:
        return self.get("/object_info")

    def queue(self, graph: dict[str, Any]) -> str:
        """Queue a graph in API form and return its prompt id; GraphError when it is refused."""
        try:
            answer = self.post("/prompt", {"prompt": graph, "client_id": self.client_id})
        except urllib.error.HTTPError as err:
            details = json.loads(err.read() or b"{}")
            raise GraphError(describe_refusal(details, graph), details) from err
        return answer["prompt_id"]

    def history(self, prompt_id: str) -> dict[str, Any] | None:
        """The entry of a finished prompt: `outputs` by node id, and `status`."""
        return self.get(f"/history/{prompt_id}").get(prompt_id)

    def interrupt(self) -> None:
        self.post("/interrupt", {})

    def view(self, image: dict[str, str]) -> bytes:
        """The bytes of a file that a node reported as its output."""
        with urllib.request.urlopen(self.view_url(image), timeout=60) as response:
            return response.read()

    def view_url(self, image: dict[str, str]) -> str:
        return f"{self.url}/view?{urllib.parse.urlencode(image)}"

    @contextlib.contextmanager
    def listen(self) -> Iterator[Iterator[Event]]:
        """Connect to the websocket before a graph is queued: `with client.listen() as events`."""
        address = f"ws{self.url.removeprefix('http')}/ws?clientId={self.client_id}"
        connection = websocket.create_connection(address, timeout=10)
        try:
            yield self._events(connection)
        finally:
            connection.close()

    def run(
        self,
        graph: dict[str, Any],
        on_event: Callable[[Event], None] | None = None,
        *,
        timeout_s: float | None = None,
    ) -> dict[str, Any]:
        """Queue a graph, wait for its end and return its history entry; GraphError on failure."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self.listen() as events:
            prompt_id = self.queue(graph)
            for event in events:
                if on_event is not None:
                    on_event(event)
                if event.data.get("prompt_id") == prompt_id and is_last(event, graph):
                    break
                if deadline is not None and time.monotonic() > deadline:
                    self.interrupt()
                    raise GraphError(f"The graph did not end within {timeout_s:g} s.")
        return self._wait_for_history(prompt_id)

    def check_alive(self) -> None:
        """Raise ServerError when this client knows that its server is gone."""

    def _wait_for_history(self, prompt_id: str) -> dict[str, Any]:
        for _ in range(100):
            entry = self.history(prompt_id)
            if entry is not None:
                return entry
            time.sleep(0.05)
        raise ServerError(f"{self.url} ended prompt {prompt_id} but lists no result for it.")

    def _events(self, connection: websocket.WebSocket) -> Iterator[Event]:
        """Every message; `tick` once a second in between, so that callers can watch a deadline."""
        connection.settimeout(1)
        while True:
            try:
                message = connection.recv()
            except websocket.WebSocketTimeoutException:
                self.check_alive()
                yield Event("tick")
                continue
            except (websocket.WebSocketException, OSError) as err:
                self.check_alive()
                raise ServerError(f"The connection to {self.url} broke: {err}") from err
            if event := parse_message(message):
                yield event

    def _request(self, path: str, body: bytes | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data=body, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                content = response.read()
        except urllib.error.HTTPError:
            raise
        except OSError as err:
            self.check_alive()
            raise ServerError(f"No ComfyUI answers at {self.url}: {err}") from err
        return json.loads(content) if content else None


class ComfyServer(ComfyClient):
    """A ComfyUI process of our own on a free port, with a base directory of its own.

    Only this pack is loaded. `models` names a folder such as ComfyUI/models whose files are to be
    found as well. With `log_to_console` the server writes to our output instead of its log file.
    """

    def __init__(
        self,
        comfyui: Path,
        base_directory: Path,
        *,
        models: Path | None = None,
        arguments: tuple[str, ...] = (),
        port: int | None = None,
        log_to_console: bool = False,
    ) -> None:
        self.comfyui = comfyui
        self.base_directory = base_directory
        self.port = port or free_port()
        self.log = base_directory / "comfyui.log"
        self._models = models
        self._arguments = arguments
        self._log_to_console = log_to_console
        self._process: subprocess.Popen[bytes] | None = None
        super().__init__(f"http://127.0.0.1:{self.port}")

    def __enter__(self) -> "ComfyServer":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        (self.base_directory / "custom_nodes").mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "main.py", *self._command_line()]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
        with contextlib.ExitStack() as stack:
            log = None if self._log_to_console else stack.enter_context(self.log.open("wb"))
            self._process = subprocess.Popen(
                command,
                cwd=self.comfyui,
                env=environment,
                stdout=log,
                stderr=None if log is None else subprocess.STDOUT,
                # Ctrl-C must reach us alone, so that `stop` lets a run save before the server ends.
                start_new_session=True,
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Cancel what runs, let it save, and end the process."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            with contextlib.suppress(ServerError, OSError):
                self._drain(process)
            process.terminate()
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            pass
        finally:
            process.kill()
            process.wait()

    def wait(self) -> int:
        """Wait until the server ends by itself."""
        if self._process is None:
            raise ServerError("The server was not started.")
        return self._process.wait()

    @property
    def pid(self) -> int:
        """Id of the server's process."""
        if self._process is None:
            raise ServerError("The server was not started.")
        return self._process.pid

    def log_text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def path_of(self, image: dict[str, str]) -> Path:
        """Where a file lies that a node reported as its output."""
        return self.base_directory / image["type"] / image.get("subfolder", "") / image["filename"]

    def check_alive(self) -> None:
        if self._process is not None and self._process.poll() is not None:
            tail = "\n".join(self.log_text().splitlines()[-20:])
            raise ServerError(f"{tail}\n\nComfyUI stopped; its whole log is {self.log}.")

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            self.check_alive()
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.url}/system_stats", timeout=5).close()
                return
            time.sleep(0.2)
        raise ServerError(f"ComfyUI gave no answer in {START_TIMEOUT_S} s; its log is {self.log}.")

    def _drain(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + DRAIN_TIMEOUT_S
        if process.poll() is None and self.get("/queue")["queue_running"]:
            text = "Waiting for the running node to stop; Ctrl-C again ends it at once."
            print(text, file=sys.stderr, flush=True)
            self.post("/queue", {"clear": True})
            self.interrupt()
        while process.poll() is None and time.monotonic() < deadline:
            if not self.get("/queue")["queue_running"]:
                return
            time.sleep(0.1)

    def _command_line(self) -> list[str]:
        return [
            *("--listen", "127.0.0.1", "--port", str(self.port), "--disable-auto-launch"),
            *("--base-directory", str(self.base_directory)),
            *("--database-url", "sqlite:///:memory:", "--disable-api-nodes"),
            *("--disable-all-custom-nodes", "--whitelist-custom-nodes", ROOT.name),
            *("--extra-model-paths-config", str(self._write_search_paths())),
            *(() if "--cpu" in self._arguments or has_accelerator() else ("--cpu",)),
            *self._arguments,
        ]

    def _write_search_paths(self) -> Path:
        """Tell ComfyUI where this pack is (a list of folders that hold packs) and where models are.

        The folder around the repository may hold other things: the whitelist leaves only the pack.
        """
        paths = {"atelier": {"custom_nodes": str(ROOT.parent)}}
        if self._models is not None and self._models.is_dir():
            folders = sorted(p for p in self._models.iterdir() if p.is_dir())
            paths["models"] = {folder.name: str(folder) for folder in folders}
        target = self.base_directory / "search_paths.yaml"
        # JSON is YAML, and the standard library writes it.
        target.write_text(json.dumps(paths, indent=1, ensure_ascii=False), encoding="utf-8")
        return target


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def has_accelerator() -> bool:
    """Whether torch has a device other than the CPU; ComfyUI must be told if not."""
    code = (
        "import torch; xpu = getattr(torch, 'xpu', None); raise SystemExit(not ("
        "torch.cuda.is_available() or torch.backends.mps.is_available()"
        " or (xpu is not None and xpu.is_available())))"
    )
    return subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def parse_message(message: str | bytes) -> Event | None:
    """Text messages, and the binary one that carries a progress text; previews are dropped."""
    if isinstance(message, str):
        content = json.loads(message) if message else {}
        return Event(content["type"], content.get("data") or {}) if "type" in content else None
    if len(message) >= 8 and struct.unpack(">I", message[:4])[0] == BINARY_TEXT_EVENT:
        end = 8 + struct.unpack(">I", message[4:8])[0]
        texts = {"node": message[8:end].decode(), "text": message[end:].decode()}
        return Event("progress_text", texts)
    return None


def is_last(event: Event, graph: dict[str, Any]) -> bool:
    """Whether the prompt of this event ended with it; GraphError when it ended badly."""
    if event.type == "execution_error":
        name = node_name(graph, event.data.get("node_id"))
        text = str(event.data.get("exception_message", "")).strip()
        raise GraphError(f"{name}: {text}", event.data)
    if event.type == "execution_interrupted":
        name = node_name(graph, event.data.get("node_id"))
        raise GraphError(f"Cancelled while {name} was running.", event.data)
    return event.type == "execution_success"


def node_name(graph: dict[str, Any], node_id: str | None) -> str:
    """A node as the user knows it: its title, else its class."""
    node = graph.get(str(node_id), {})
    title = node.get("_meta", {}).get("title") or node.get("class_type", "A node")
    return f"{title} ({node_id})"


def describe_refusal(details: dict[str, Any], graph: dict[str, Any]) -> str:
    """ComfyUI's answer to a graph that it does not queue, as sentences."""
    sentences = []
    for node_id, problem in (details.get("node_errors") or {}).items():
        for error in problem.get("errors", ()):
            name = (error.get("extra_info") or {}).get("input_name", "")
            where = f"{node_name(graph, node_id)}{f', input {name}' if name else ''}"
            text = error.get("details") or error.get("message", "")
            sentences.append(f"{where}: {error.get('message', '')}: {text}".rstrip(": "))
    if sentences:
        return " ".join(sentences)
    error = details.get("error") or {}
    if isinstance(error, str):
        return error
    parts = [error.get("message", "The graph was refused."), error.get("details", "")]
    return ": ".join(part for part in parts if part)
