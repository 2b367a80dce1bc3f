"""The commands of dev.py that need the environment; dev.py runs this file inside it."""

import importlib
import os
import signal
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import comfy_server
import workflow
from comfy_server import ComfyClient, ComfyServer, GraphError, ServerError
from dev import build_parser
from progress import NodeProgress


def run(options: Namespace) -> None:
    """Queue a workflow and print its outputs."""
    if options.server:
        client = ComfyClient(options.server)
        try:
            run_on(client, options)
        except KeyboardInterrupt:
            client.interrupt()
            raise
        return
    with start_server(options) as server:
        run_on(server, options)


def run_on(client: ComfyClient, options: Namespace) -> None:
    object_info = client.object_info()
    graph = workflow.load(options.workflow, object_info)
    for setting in options.set:
        workflow.apply_setting(graph, setting, object_info)
    print_outputs(client, graph, client.run(graph, NodeProgress(graph)))


def print_outputs(client: ComfyClient, graph: workflow.Graph, entry: dict[str, Any]) -> None:
    for node_id, output in entry.get("outputs", {}).items():
        for value in (value for values in output.values() if values for value in values):
            if isinstance(value, dict) and "filename" in value:
                local = isinstance(client, ComfyServer)
                value = client.path_of(value) if local else client.view_url(value)
            elif not isinstance(value, str | int | float) or isinstance(value, bool):
                continue
            print(f"{comfy_server.node_name(graph, node_id)}: {value}", flush=True)


def serve(options: Namespace) -> None:
    """Run ComfyUI in the foreground until it is stopped."""
    with start_server(options, port=options.port, log_to_console=True) as server:
        print(f"\nComfyUI with Atelier: {server.url}    (Ctrl-C ends it)\n", flush=True)
        server.wait()


def demo(options: Namespace) -> None:
    """Run `demo.main(server, out_dir)`; what it has to do is said in dev.py."""
    started = time.monotonic()
    with start_server(options) as server:
        print(f"ComfyUI is up after {time.monotonic() - started:.0f} s", flush=True)
        importlib.import_module("demo").main(server, options.out)


def start_server(
    options: Namespace, *, port: int | None = None, log_to_console: bool = False
) -> ComfyServer:
    comfyui = Path(os.environ["ATELIER_COMFYUI"])
    models = None if os.environ.get("ATELIER_OWN_COMFYUI") else comfyui / "models"
    return ComfyServer(
        comfyui,
        options.home.absolute(),
        models=models,
        arguments=tuple(options.comfyui_argument),
        port=port,
        log_to_console=log_to_console,
    )


def main() -> int:
    options = build_parser().parse_args()
    for name in ("SIGTERM", "SIGHUP"):  # the second where it exists: the terminal was closed
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda *_: sys.exit(143))
    try:
        {"run": run, "serve": serve, "demo": demo}[options.command](options)
    except (GraphError, ServerError, workflow.WorkflowError) as err:
        print(err, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
