"""`python -m trainers job.json`: train a job without ComfyUI.

Every run of the Train LoRA node leaves its `job.json` in output/atelier/<run>/. Also, in place of
the job: `python -m trainers clear-caches`.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from .clearing import CACHES, clear_caches
from .hooks import Hooks, Step, explain
from .job import read_job, run_job


class Stopped(Exception):
    """Ctrl-C or a request to end, noticed between two micro-steps."""


class StopFlag:
    """Turns signals into a stop at the next micro-step, where the run can be saved whole."""

    def __init__(self) -> None:
        self._is_set = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._set)

    def _set(self, *_: object) -> None:
        self._is_set = True

    def check(self) -> None:
        if self._is_set:
            raise Stopped


CLEAR_CACHES = "clear-caches"
PACK = Path(__file__).absolute().parent.parent
OUTPUT_OF_COMFYUI = PACK.parent.parent / "output"
"""Where it is when this pack lies in custom_nodes/."""


def main() -> int:
    try:
        return _clear(sys.argv[2:]) if sys.argv[1:2] == [CLEAR_CACHES] else _train()
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 1


def _clear(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m trainers {CLEAR_CACHES}",
        description="Remove what is cached of pictures and captions. It is made again when needed.",
    )
    parser.add_argument(
        "what",
        nargs="?",
        choices=[*CACHES, "all"],
        default="all",
        help="encoded pictures, encoded captions, sizes and hashes of files, or the pictures of "
        "graphs and parquet files (default: all)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=OUTPUT_OF_COMFYUI,
        help=f"output folder of your ComfyUI (default: {OUTPUT_OF_COMFYUI})",
    )
    options = parser.parse_args(arguments)
    freed = clear_caches(options.output / "atelier" / "cache", options.what)
    sys.stdout.write(f"{freed / 2**20:.1f} MiB are free again\n")
    return 0


def _train() -> int:
    parser = argparse.ArgumentParser(prog="python -m trainers", description=__doc__)
    parser.add_argument("job", type=Path, help="the job file")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("output"),
        help="folder for the LoRA and the run (default: output)",
    )
    arguments = parser.parse_args()
    hooks = Hooks(check_stop=StopFlag().check, explain=_explain, on_step=_show, on_warning=_warn)
    try:
        path = run_job(read_job(arguments.job), arguments.output, hooks)
    except Stopped:
        sys.stderr.write("Stopped and saved. The same command goes on from here.\n")
        return 130
    sys.stdout.write(f"{path}\n")
    return 0


def _explain(error: BaseException) -> str | None:
    return None if isinstance(error, Stopped) else explain(error)


def _show(step: Step) -> None:
    sys.stderr.write(f"step {step.step}/{step.num_steps}  loss {step.loss:.4f}\n")


def _warn(sentence: str) -> None:
    sys.stderr.write(f"{sentence}\n")


if __name__ == "__main__":
    sys.exit(main())
