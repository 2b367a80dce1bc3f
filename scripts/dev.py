"""One command for each thing a developer does; see `python scripts/dev.py --help`.

Standard library only. The first call makes an environment under .dev/ (environment.py); the command
then runs inside it (commands.py). With --comfyui, or when the pack lies in ComfyUI/custom_nodes,
that ComfyUI and its packages are used and left as they are.

The demo itself is scripts/demo.py, which offers `main(server, out_dir)`: `server` is a started
`comfy_server.ComfyServer` with nothing in its folders, `out_dir` a `Path` that may not exist yet.
It queues the quickstart workflow, writes the pictures, loss.png, the LoRA and summary.json there,
and raises `comfy_server.GraphError` for what a user should read.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import environment

ROOT = environment.ROOT
# With the folder that we are in off sys.path: there our `nodes` would hide ComfyUI's.
PYTEST = "import sys; sys.path[:] = filter(None, sys.path); import pytest; sys.exit(pytest.main())"

# Two files at a time, each in a process with a ComfyUI of its own.
WHOLE_SUITE = ["-n", "2", "--dist", "loadfile"]


def build_parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    common.add_argument("--comfyui", type=Path, metavar="PATH", help="a ComfyUI folder to use")
    hosted = argparse.ArgumentParser(add_help=False, parents=[common], allow_abbrev=False)
    hosted.add_argument(
        "--comfyui-argument",
        action="append",
        default=[],
        metavar="ARG",
        help="passed on to ComfyUI, for example --comfyui-argument=--lowvram; may be repeated",
    )
    parser = argparse.ArgumentParser(prog="dev.py", description="Atelier, for developers.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, parent: argparse.ArgumentParser, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name, parents=[parent], help=text, description=text, allow_abbrev=False
        )

    demo = add("demo", hosted, "train a LoRA on the nano model and paint with it")
    demo.add_argument("--out", type=Path, default=Path("demo_output"), metavar="FOLDER")
    demo.set_defaults(home=environment.HOME / "demo")
    add("test", common, "run the tests; further arguments go to pytest")
    serve = add("serve", hosted, "run ComfyUI with the pack, for the browser")
    serve.add_argument("--port", type=int, help="default: a free one")
    run = add("run", hosted, "queue a workflow, show its progress and print its outputs")
    run.add_argument("workflow", type=Path, metavar="WORKFLOW.json")
    run.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NODE.INPUT=VALUE",
        help="change an input; NODE is a node's id, title or class",
    )
    run.add_argument("--server", metavar="URL", help="queue there instead of starting a ComfyUI")
    for command in (serve, run):
        command.add_argument(
            "--home",
            type=Path,
            default=environment.HOME / "home",
            metavar="FOLDER",
            help="holds ComfyUI's input, output and models folders (default: .dev/home)",
        )
    add("setup", common, "only make the environment")
    return parser


def main() -> int:
    parser = build_parser()
    options, others = parser.parse_known_args()
    if others and options.command != "test":
        parser.error(f"unknown arguments: {' '.join(others)}")
    started = time.monotonic()
    try:
        prepared = environment.prepare(options.comfyui)
    except environment.SetupError as err:
        print(err, file=sys.stderr)
        return 1
    if (seconds := time.monotonic() - started) > 5:
        print(f"[set-up] ready after {seconds:.0f} s", flush=True)
    if options.command == "setup":
        print(f"{prepared.python}\n{prepared.comfyui}")
        return 0
    variables = {**os.environ, "ATELIER_COMFYUI": str(prepared.comfyui)}
    if prepared.is_own:
        variables["ATELIER_OWN_COMFYUI"] = "1"
    if options.command == "test":
        arguments = others or WHOLE_SUITE
        return wait_for([prepared.python, "-c", PYTEST, *arguments], variables, cwd=ROOT)
    if options.command == "demo":
        shutil.rmtree(options.home, ignore_errors=True)
    return wait_for([prepared.python, ROOT / "scripts" / "commands.py", *sys.argv[1:]], variables)


def wait_for(command: list[str | Path], variables: dict[str, str], cwd: Path | None = None) -> int:
    """Run a command to its end. Ctrl-C reaches it too, and it cleans up before it ends."""
    process = subprocess.Popen(command, env=variables, cwd=cwd)
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


if __name__ == "__main__":
    sys.exit(main())
