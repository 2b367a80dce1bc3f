"""Metrics and pictures of a training for TensorBoard and Weights & Biases, by their own packages.

They are imported when they are chosen. What they keep lies below the run's folder. A training never
ends because its logger fails: that is told once, and the logger is left out.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from .checks import require
from .packages import importing

LoggerKind = Literal["none", "tensorboard", "wandb", "wandb offline"]
LOGGERS: tuple[LoggerKind, ...] = ("none", "tensorboard", "wandb", "wandb offline")

_PROJECT = "atelier"
_START_SECONDS = 30
_FINISH_SECONDS = 60
"""How long the end of a training waits for Weights & Biases to take what is not uploaded yet."""

logger = logging.getLogger("atelier")


class Logger:
    """What hears of a training while it runs. This one keeps nothing."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Keep numbers of one step by their names. Steps ascend; one may come several times."""

    def log_picture(self, step: int, name: str, path: Path) -> None:
        """Keep a picture file that was drawn at a step."""

    def close(self) -> None:
        """Keep what is not written yet. Nothing is logged after that."""

    def __enter__(self) -> Logger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_logger(
    kind: LoggerKind,
    folder: Path,
    *,
    name: str,
    run_id: str,
    config: Mapping[str, Any],
    start_step: int = 0,
) -> Logger:
    """The logger of a run, which goes on where it was when the run is resumed.

    Weights & Biases takes its login from where its own package keeps it, never from here.

    Args:
        folder: of the run; files go to `tensorboard/` or `wandb/` in it.
        name: what people read.
        run_id: what tells the run from all others.
        config: the settings, as JSON values.
        start_step: the step from which the training goes on; what a logger has of later ones was
            never saved, and comes again.

    Raises:
        ValueError: the kind is unknown, its package is missing, or it cannot begin: no login, no
            network, a folder that cannot be written.
    """
    require_logger(kind)
    if kind == "none":
        return Logger()
    if kind == "tensorboard":
        return _open_tensorboard(folder / "tensorboard", name, config, start_step)
    return _open_wandb(folder / "wandb", name, run_id, config, is_online=kind == "wandb")


def require_logger(kind: LoggerKind) -> None:
    """See that a logger can be opened, without opening it.

    Raises:
        ValueError: the kind is unknown, its package is missing, or there is no login.
    """
    require(kind in LOGGERS, f"Unknown logger '{kind}'. Choose one of: {', '.join(LOGGERS)}.")
    if kind == "tensorboard":
        _summary_writer()
    elif kind != "none":
        _import_wandb(is_online=kind == "wandb")


class _Careful(Logger):
    """Another logger, left out from its first error on."""

    def __init__(self, inner: Logger, label: str, errors: tuple[type[Exception], ...]) -> None:
        self._inner, self._label, self._errors = inner, label, errors
        self._has_failed = False

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._try(self._inner.log, step, values)

    def log_picture(self, step: int, name: str, path: Path) -> None:
        self._try(self._inner.log_picture, step, name, path)

    def close(self) -> None:
        self._try(self._inner.close)

    def _try(self, call: Callable[..., None], *arguments: Any) -> None:
        if self._has_failed:
            return
        try:
            call(*arguments)
        except self._errors as error:
            self._has_failed = True
            logger.warning(
                f"{self._label} failed and hears no more of this training, which goes on: {error}"
            )


class _TensorBoard(Logger):
    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def log_picture(self, step: int, name: str, path: Path) -> None:
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        self._writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


def _open_tensorboard(
    folder: Path, name: str, config: Mapping[str, Any], start_step: int
) -> Logger:
    settings = json.dumps(dict(config), indent=1, ensure_ascii=False)
    try:
        # The steps after the checkpoint come again: TensorBoard hides what it has of them.
        writer = _summary_writer()(folder, purge_step=start_step + 1, flush_secs=10)
        writer.add_text("settings", f"**{name}**\n\n```\n{settings}\n```", start_step)
    except OSError as error:
        raise ValueError(f"TensorBoard cannot write to {folder}: {error.strerror}.") from error
    return _Careful(_TensorBoard(writer), "TensorBoard", (OSError,))


def _summary_writer() -> Any:
    with importing("tensorboard"):
        from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter


class _Wandb(Logger):
    def __init__(self, run: Any, picture: Callable[[str], Any]) -> None:
        self._run, self._picture = run, picture

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def log_picture(self, step: int, name: str, path: Path) -> None:
        self._run.log({name: self._picture(str(path))}, step=step)

    def close(self) -> None:
        self._run.finish()


def _open_wandb(
    folder: Path, name: str, run_id: str, config: Mapping[str, Any], *, is_online: bool
) -> Logger:
    wandb = _import_wandb(is_online=is_online)
    errors = (wandb.Error, OSError)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        run = wandb.init(
            project=_PROJECT,
            id=run_id,
            name=name,
            # wandb makes the folder `wandb` in it.
            dir=str(folder.parent),
            config=dict(config),
            mode="online" if is_online else "offline",
            # The same run again. Of steps that come twice it keeps the first, which are the same.
            # Offline each start has a file of its own under the one id.
            resume="allow" if is_online else None,
            reinit="create_new",  # other packs may have a run of theirs in this process
            settings=_wandb_settings(wandb),
        )
    except errors as error:
        raise ValueError(
            f"Weights & Biases cannot begin a run: {str(error).splitlines()[0]}. Try again, or "
            "choose 'wandb offline' or another logger."
        ) from error
    return _Careful(_Wandb(run, wandb.Image), "Weights & Biases", errors)


def _import_wandb(*, is_online: bool) -> Any:
    # Without this, wandb reports its own errors to its makers, and asks for their server's address
    # before it has read that it is offline (0.31).
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    with importing("wandb"):
        import wandb
    require(
        not is_online or _is_logged_in(wandb),
        "Weights & Biases has no login here. Run 'wandb login' with the Python of ComfyUI, then "
        "queue again, or choose 'wandb offline'.",
    )
    return wandb


def _is_logged_in(wandb: Any) -> bool:
    """Whether there is a login; nobody is asked for one."""
    return wandb.run is not None or wandb.login(prompt=False, verify=False)


def _wandb_settings(wandb: Any) -> Any:
    """Nothing on the console, and nothing sent but what is logged here."""
    return wandb.Settings(
        silent=True,
        console="off",  # what ComfyUI prints
        disable_git=True,
        save_code=False,
        x_disable_meta=True,
        x_disable_stats=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
        symlink=False,
        init_timeout=_START_SECONDS,
        # Without a network it would wait for it, a whole night if need be.
        finish_timeout=_FINISH_SECONDS,
    )
