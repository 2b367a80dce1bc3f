"""Loggers write with their real packages; what they wrote is read back by other code."""

import io
import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from atelier.trainers import loggers
from atelier.trainers.loggers import open_logger
from atelier.trainers.packages import install_command
from PIL import Image
from small_disk import fill, small_disk
from wandb_server import WandbServer

ROOT = Path(__file__).resolve().parent.parent
RUN_ID = "my_lora-1a2b3c4d"
CONFIG = {"lora": {"rank": 16}, "train": {"learning_rate": 1e-4}}
RUN: dict[str, Any] = {"name": "my_lora", "run_id": RUN_ID, "config": CONFIG}
TALE = [(step, {"loss": 1 / step, "grad_norm": 2.0 * step}) for step in range(1, 6)]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "sample.png"
    image = Image.new("RGB", (32, 16), "red")
    image.putpixel((3, 5), (1, 2, 3))
    image.save(path)
    return path


@pytest.fixture
def wandb_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A wandb that knows no login, and begins anew afterwards."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    yield
    import wandb

    wandb.teardown()


@pytest.fixture
def wandb_server(wandb_home: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    """A server at which somebody is logged in."""
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        yield server


def test_none_keeps_nothing(tmp_path: Path, picture: Path) -> None:
    folder = tmp_path / "run"
    with open_logger("none", folder, **RUN) as log:
        log.log(1, {"loss": 1.0})
        log.log_picture(1, "a cat", picture)
    assert not folder.exists()


def test_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^Unknown logger 'mlflow'\. Choose one of: none, tensor"):
        open_logger("mlflow", tmp_path, **RUN)


@pytest.mark.parametrize(
    ("kind", "module", "package"),
    [
        ("tensorboard", "torch.utils.tensorboard", "tensorboard"),
        ("wandb", "wandb", "wandb"),
        ("wandb offline", "wandb", "wandb"),
    ],
)
def test_a_missing_package_is_named_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, module: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"^The package {package} is missing") as caught:
        open_logger(kind, tmp_path, **RUN)
    assert str(caught.value).endswith(install_command(package))
    assert not list(tmp_path.iterdir())


def events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "tensorboard"), {"scalars": 0, "images": 0})
    return accumulator.Reload()


def test_tensorboard_reads_back_what_was_logged(tmp_path: Path, picture: Path) -> None:
    with open_logger("tensorboard", tmp_path, **RUN) as log:
        log.log_picture(0, "a cat", picture)
        for step, values in TALE:
            log.log(step, values)
        log.log(5, {"eval_loss": 0.25})
    found = events(tmp_path)
    for name in ("loss", "grad_norm"):
        expected = [(step, pytest.approx(values[name])) for step, values in TALE]
        assert [(event.step, event.value) for event in found.Scalars(name)] == expected
    assert [(event.step, event.value) for event in found.Scalars("eval_loss")] == [(5, 0.25)]
    (image,) = found.Images("a cat")
    with Image.open(picture) as original:
        shown = Image.open(io.BytesIO(image.encoded_image_string))
        assert (image.step, shown.tobytes()) == (0, original.tobytes())
    text = found.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert json.loads(text.split("```")[1]) == CONFIG


def test_a_resumed_run_goes_on_in_tensorboard(tmp_path: Path) -> None:
    with open_logger("tensorboard", tmp_path, **RUN) as log:
        for step in range(1, 11):
            log.log(step, {"loss": 1.0})
    with open_logger("tensorboard", tmp_path, **RUN, start_step=6) as log:
        for step in range(7, 13):
            log.log(step, {"loss": 2.0})
    found = [(event.step, event.value) for event in events(tmp_path).Scalars("loss")]
    assert found == [(step, 1.0 if step <= 6 else 2.0) for step in range(1, 13)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_ends_the_logger_and_not_the_training(
    tmp_path: Path, picture: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with small_disk(tmp_path / "disk") as folder:
        with open_logger("tensorboard", folder, **RUN) as log:
            fill(folder)
            for step in range(2000):
                log.log_picture(step, "a cat", picture)
                if caplog.messages:
                    break
            log.log(2001, {"loss": 1.0})
        (message,) = caplog.messages
    assert message.startswith("TensorBoard failed and hears no more of this training, which goes")


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_bytes(b"")
    with pytest.raises(ValueError, match=r"^TensorBoard cannot write to .*tensorboard: "):
        open_logger("tensorboard", tmp_path, **RUN)


def records(path: Path) -> list[Any]:
    """All records of a .wandb file, which wandb's own process may still be writing."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        found = records_so_far(path)
        if any(record.HasField("exit") for record in found):
            return found
        time.sleep(0.1)
    raise AssertionError(f"{path} has no end")


def records_so_far(path: Path) -> list[Any]:
    """LevelDB's log format, after seven bytes that are wandb's own."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, found, part = path.read_bytes(), 7, [], b""
    while place + 7 <= len(data):
        rest = 32768 - place % 32768
        if rest < 7:
            place += rest
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        part += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            found.append(Record.FromString(part))
            part = b""
    return found


def offline_files(folder: Path) -> list[Path]:
    return sorted((folder / "wandb").glob("offline-run-*/*.wandb"))


def history(found: list[Any]) -> dict[int, dict[str, Any]]:
    """{step: values}"""
    rows = [record.history for record in found if record.HasField("history")]
    steps: dict[int, dict[str, Any]] = {}
    for row in rows:
        items = {".".join(i.nested_key): json.loads(i.value_json) for i in row.item}
        values = {key: value for key, value in items.items() if not key.startswith("_")}
        steps.setdefault(row.step.num, {}).update(values)
    return steps


def test_wandb_s_offline_file_holds_what_was_logged(
    tmp_path: Path, picture: Path, wandb_home: None
) -> None:
    with open_logger("wandb offline", tmp_path, **RUN) as log:
        log.log_picture(0, "a cat", picture)
        for step, values in TALE:
            log.log(step, values)
        log.log(5, {"eval_loss": 0.25})
    (file,) = offline_files(tmp_path)
    found = records(file)
    steps = history(found)
    shown = steps.pop(0)["a cat.path"]
    assert steps == {step: v | ({"eval_loss": 0.25} if step == 5 else {}) for step, v in TALE}
    assert (file.parent / "files" / shown).read_bytes() == picture.read_bytes()
    run = next(record.run for record in found if record.HasField("run"))
    assert (run.run_id, run.display_name, run.project) == (RUN_ID, "my_lora", "atelier")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert {key: config[key] for key in CONFIG} == CONFIG


def test_a_resumed_run_is_the_same_one_in_wandb(tmp_path: Path, wandb_home: None) -> None:
    for first in (1, 4):
        with open_logger("wandb offline", tmp_path, **RUN, start_step=first - 1) as log:
            for step in range(first, first + 3):
                log.log(step, {"loss": float(step)})
        time.sleep(1.1)  # wandb's folders are named by the second
    files = [records(file) for file in offline_files(tmp_path)]
    assert [sorted(history(found)) for found in files] == [[1, 2, 3], [4, 5, 6]]
    ids = {record.run.run_id for found in files for record in found if record.HasField("run")}
    assert ids == {RUN_ID}


OFFLINE = f"""
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(message)s")  # as ComfyUI has it
sys.path.append({str(ROOT / "scripts")!r})
from pack import load_pack
load_pack()
from pathlib import Path
from atelier.trainers.loggers import open_logger
with open_logger("wandb offline", Path(sys.argv[1]), **{RUN!r}) as log:
    for step in range(1, 6):
        log.log(step, {{"loss": 1 / step}})
"""


def in_python(code: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-P", "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_offline_sends_and_prints_nothing(
    tmp_path: Path, wandb_server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    done = in_python(OFFLINE, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert len(history(records(offline_files(tmp_path)[0]))) == 5
    assert wandb_server.paths == []


KILLED = (
    OFFLINE
    + """
    import os, psutil
    (core,) = [p for p in psutil.Process().children() if "wandb-core" in p.name()]
    core.kill()
    core.wait()
    for step in range(6, 9):
        log.log(step, {"loss": 1.0})
print("trained on")
os._exit(0)  # wandb's own end would show a traceback
"""
)


def test_a_wandb_that_dies_does_not_end_the_training(tmp_path: Path, wandb_home: None) -> None:
    done = in_python(KILLED, tmp_path)
    assert done.stdout == "trained on\n", done.stderr
    assert done.stderr.count("Weights & Biases failed and hears no more of this training") == 1
    assert len(done.stderr.splitlines()) == 1


def test_online_the_server_gets_the_run(
    tmp_path: Path, picture: Path, wandb_server: WandbServer
) -> None:
    with open_logger("wandb", tmp_path, **RUN) as log:
        log.log_picture(0, "a cat", picture)
        for step, values in TALE:
            log.log(step, values)
    assert set(wandb_server.runs) == {RUN_ID}
    run = wandb_server.runs[RUN_ID]
    config = json.loads(run["config"])
    assert {key: config[key]["value"] for key in CONFIG} == CONFIG
    assert "commit" not in run
    assert "host" not in run
    rows = {row["_step"]: row["loss"] for row in wandb_server.history if "loss" in row}
    assert rows == {step: pytest.approx(values["loss"]) for step, values in TALE}
    assert picture.read_bytes() in wandb_server.files.values()
    assert {Path(name).parts[0] for name in wandb_server.files} <= {
        *("media", "config.yaml", "wandb-summary.json")
    }


def test_without_a_network_the_training_goes_on_and_ends(
    tmp_path: Path, wandb_server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers, "_FINISH_SECONDS", 2)
    with open_logger("wandb", tmp_path, **RUN) as log:
        log.log(1, {"loss": 1.0})
        wandb_server.stop()
        began = time.monotonic()
        for step in range(2, 100):
            log.log(step, {"loss": 1.0})
        assert time.monotonic() - began < 2
    assert time.monotonic() - began < 20
    (file,) = (tmp_path / "wandb").glob("run-*/*.wandb")
    assert sorted(history(records(file))) == list(range(1, 100))  # for `wandb sync`


def test_without_a_login_it_says_so_and_asks_for_nothing(tmp_path: Path, wandb_home: None) -> None:
    with pytest.raises(ValueError, match=r"^Weights & Biases has no login here\. Run 'wandb login"):
        open_logger("wandb", tmp_path, **RUN)


def test_a_server_that_does_not_answer_is_one_sentence(
    tmp_path: Path, wandb_server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers, "_START_SECONDS", 2)
    wandb_server.stop()
    with pytest.raises(ValueError, match=r"^Weights & Biases cannot begin a run: .* Try again, or"):
        open_logger("wandb", tmp_path, **RUN)
