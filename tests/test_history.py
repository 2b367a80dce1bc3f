"""Runs read from disk: as they are, of other versions, damaged, half deleted, in training."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from atelier.trainers import history
from filelock import FileLock
from small_disk import small_disk

ROOT = Path(__file__).resolve().parent.parent
ID = "my_lora-1a2b3c4d"
STATUS = {
    "state": "stopped",
    "step": 700,
    "num_steps": 1000,
    "started": 1e9,
    "updated": 4e9,
    "error": None,
    "lora": None,
    "node": "12",
    "can_sample": True,
}
LINE = {
    "step": 1,
    "loss": 0.5,
    "grad_norm": 0.25,
    "learning_rate": 1e-4,
    "seconds": 2.0,
    "memory": None,
    "ram": 10**10,
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """output/atelier with caches and one run."""
    for name in ("cache/latents", "packed/flux"):
        (tmp_path / "atelier" / name).mkdir(parents=True)
    add_run(tmp_path / "atelier", ID)
    return tmp_path / "atelier"


def add_run(root: Path, run_id: str, **status: Any) -> Path:
    folder = root / run_id
    for step in (250, 500):
        (folder / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    (folder / "checkpoints" / ".step-000700.4711.tmp").mkdir()
    write(folder / "run.json", {"version": 1})
    write(folder / "status.json", STATUS | status)
    (folder / "lock").touch()
    return folder


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_metrics(folder: Path, *lines: dict[str, Any] | str) -> None:
    texts = [line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines]
    (folder / "metrics.jsonl").write_text("".join(texts), encoding="utf-8")


def metrics(root: Path, since: int = 0) -> dict[str, Any]:
    return json.loads(history.run_metrics(root, ID, since))


def test_a_run_is_listed_and_caches_are_not(root: Path) -> None:
    write_metrics(root / ID, LINE, LINE | {"step": 2, "loss": 0.25}, {"step": 2, "eval_loss": 9})
    assert history.list_runs(root) == [
        {
            "id": ID,
            "name": "my_lora",
            "state": "stopped",
            "step": 700,
            "num_steps": 1000,
            "loss": 0.25,
            "updated": 4e9,
            "node": "12",
            "thumbnail": None,
        }
    ]


def test_without_a_folder_there_are_no_runs(tmp_path: Path) -> None:
    assert history.list_runs(tmp_path / "atelier") == []


def test_the_newest_run_comes_first(root: Path) -> None:
    add_run(root, "old", updated=3e9)
    add_run(root, "new", updated=5e9)
    assert [run["id"] for run in history.list_runs(root)] == ["new", ID, "old"]


@pytest.mark.parametrize(
    "run_id",
    [
        "",
        ".",
        "..",
        f"../atelier/{ID}",
        f"{ID}/",
        f"{ID}/checkpoints",
        "cache",
        "nothing",
        f"{ID}\0",
    ],
)
@pytest.mark.parametrize(
    "ask",
    [
        history.run_summary,
        history.run_details,
        history.run_prompt,
        history.run_metrics,
        history.delete_run,
    ],
)
def test_what_is_no_run_is_refused(root: Path, ask: Callable, run_id: str) -> None:
    with pytest.raises(history.UnknownRun, match=r"There is no run .* Choose one of the list"):
        ask(root, run_id)
    assert (root / ID / "run.json").exists()


def test_the_details_of_a_run(root: Path) -> None:
    folder = root / ID
    strip = [
        {"key": "bb", "name": "second", "prompt": "a fox", "width": 64, "height": 32},
        {"key": "aa", "name": "first", "prompt": "a cat", "width": 64, "height": 64},
    ]
    write(folder / "samples" / "samples.json", strip)
    for name in ("step-000250-aa", "step-000000-bb", "step-000250-bb", "step-000250-gone"):
        (folder / "samples" / f"{name}.png").touch()
    inputs = {"model": ["1", 0], "rank": 4, "name": "x", "resume": ID}
    graph = {"12": {"class_type": "T", "inputs": inputs}}
    write(folder / "prompt.json", {"node": "12", "prompt": graph})
    lora = root.parent / "loras" / f"{ID}-700.safetensors"
    write(lora, {})
    write(folder / "status.json", STATUS | {"lora": lora.name})
    details = history.run_details(root, ID)
    view = {"subfolder": f"atelier/{ID}/samples", "type": "output"}
    assert [(sample["step"], sample["name"]) for sample in details["samples"]] == [
        (0, "second"),
        (250, "second"),
        (250, "first"),
    ]
    assert details["samples"][0] == strip[0] | view | {
        "step": 0,
        "filename": "step-000000-bb.png",
    }
    assert details["checkpoints"] == [250, 500]
    assert details["settings"] == {"rank": 4, "name": "x"}
    assert details["lora"] == {"filename": lora.name, "subfolder": "loras", "type": "output"}
    assert (details["folder"], details["path"]) == (f"atelier/{ID}", str(folder.resolve()))
    sizes = {file["path"]: file["bytes"] for file in details["files"]}
    found = subprocess.run(["find", ".", "-type", "f"], cwd=folder, capture_output=True, text=True)
    assert sorted(sizes) == sorted(line[2:] for line in found.stdout.splitlines())
    assert sizes["prompt.json"] == (folder / "prompt.json").stat().st_size
    assert history.run_prompt(root, ID) == ("12", graph)


def test_a_lora_that_was_deleted_is_none(root: Path) -> None:
    write(root / ID / "status.json", STATUS | {"lora": "../../secret.safetensors"})
    assert history.run_details(root, ID)["lora"] is None


def test_metrics_since_a_step_keep_every_validation(root: Path) -> None:
    validations = [{"step": 0, "eval_loss": 0.9}, {"step": 2, "score": 0.3}]
    steps = [LINE | {"step": step, "loss": step / 8} for step in (1, 2, 3, 4)]
    last = {"step": 4, "eval_loss": 1}
    write_metrics(root / ID, validations[0], *steps[:2], validations[1], *steps[2:], last)
    assert metrics(root, since=2) == {
        "step": [3, 4],
        "loss": [0.375, 0.5],
        "grad_norm": [0.25] * 2,
        "learning_rate": [1e-4] * 2,
        "seconds": [2.0] * 2,
        "memory": [None] * 2,
        "ram": [10**10] * 2,
        "eval_loss": {"step": [0, 4], "value": [0.9, 1]},
        "score": {"step": [2], "value": [0.3]},
        "num_steps": 1000,
    }
    assert metrics(root)["step"] == [1, 2, 3, 4]
    assert metrics(root, since=4)["step"] == metrics(root, since=10**400)["step"] == []
    assert metrics(root, since=-5)["step"] == [1, 2, 3, 4]


def test_a_run_without_metrics_has_empty_curves(root: Path) -> None:
    assert metrics(root)["loss"] == []


def test_numbers_come_out_as_they_were_written(root: Path) -> None:
    """Compared with json, which makes numbers of them."""
    numbers = random.Random(0)
    lines = [LINE | {"step": step, "loss": numbers.uniform(-1, 1) ** 9} for step in range(1, 300)]
    write_metrics(root / ID, *lines)
    assert metrics(root)["loss"] == [line["loss"] for line in lines]


def test_what_is_no_json_number_is_null(root: Path) -> None:
    """Browsers refuse NaN."""
    write_metrics(root / ID, LINE | {"loss": float("nan"), "grad_norm": float("inf")})
    text = history.run_metrics(root, ID)
    assert (json.loads(text)["loss"], json.loads(text)["grad_norm"]) == ([None], [None])
    assert "NaN" not in text
    assert history.run_summary(root, ID)["loss"] is None


@pytest.mark.parametrize("since", [0, 2])
def test_lines_that_a_crash_cut_are_left_out(root: Path, since: int) -> None:
    lines = [json.dumps(LINE | {"step": step}) + "\n" for step in range(1, 8)]
    lines[3] = lines[3][:20] + "\n"
    lines[4] = "5\n"
    lines[6] = lines[6][:-1]  # being written
    write_metrics(root / ID, *lines)
    assert metrics(root, since)["step"] == [step for step in (1, 2, 3, 6) if step > since]
    assert history.run_summary(root, ID)["loss"] == 0.5


@pytest.mark.parametrize("value", ["high", '","x":["', [1], True])
def test_metrics_that_are_no_numbers_are_named(root: Path, value: Any) -> None:
    write_metrics(root / ID, LINE | {"loss": value})
    with pytest.raises(ValueError, match="are damaged: a loss is no number"):
        history.run_metrics(root, ID)
    assert history.run_summary(root, ID)["state"] == "stopped"


def test_a_run_of_an_older_version_stands_at_its_last_checkpoint(root: Path) -> None:
    (root / ID / "status.json").unlink()
    write_metrics(root / ID, {"step": 600, "loss": 0.5, "grad_norm": None, "seconds": 1.0})
    (root / ID / "samples").mkdir()
    (root / ID / "samples" / "step-000250-abcd.png").touch()
    details = history.run_details(root, ID)
    assert (details["state"], details["step"], details["num_steps"]) == ("stopped", 500, None)
    assert (details["settings"], details["lora"]) == (None, None)
    assert [sample["key"] for sample in details["samples"]] == ["abcd"]
    assert details["thumbnail"]["filename"] == "step-000250-abcd.png"
    assert abs(details["updated"] - time.time()) < 60
    assert metrics(root)["memory"] == [None]
    shutil.rmtree(root / ID / "checkpoints")
    assert history.run_summary(root, ID)["state"] == "interrupted"


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("run.json", "{", "run.json cannot be read: Expecting"),
        ("run.json", "[]", "run.json holds no JSON object"),
        ("run.json", None, "run.json cannot be read: No such file or directory"),
        ("status.json", "{", "status.json' cannot be read as the state of a run"),
        ("status.json", json.dumps(STATUS | {"new": 1}), "cannot be read as the state of a run"),
        ("status.json", json.dumps(STATUS | {"updated": "?"}), "no number where one belongs"),
        ("status.json", json.dumps(STATUS | {"state": "dreaming"}), "not know: 'dreaming'"),
    ],
)
def test_a_damaged_run_says_what_is_wrong_and_can_be_deleted(
    root: Path, name: str, text: str | None, match: str
) -> None:
    path = root / ID / name
    path.unlink() if text is None else path.write_text(text, encoding="utf-8")
    add_run(root, "whole")
    states = {run["id"]: run["state"] for run in history.list_runs(root)}
    assert states == {ID: "damaged", "whole": "stopped"}
    details = history.run_details(root, ID)
    assert match in details["error"]
    assert details["step"] == 500
    history.delete_run(root, ID)
    assert not (root / ID).exists()


@pytest.mark.parametrize(
    "kept",
    [[], {}, {"node": "1", "prompt": {"1": []}}, {"node": "2", "prompt": {"1": {"inputs": {}}}}],
)
def test_a_damaged_graph_is_none(root: Path, kept: Any) -> None:
    write(root / ID / "prompt.json", kept)
    assert history.run_prompt(root, ID) is None
    assert history.run_details(root, ID)["settings"] is None


def hold_lock(folder: Path) -> subprocess.Popen:
    """Another process with the lock of a run."""
    code = (
        "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); "
        "print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder / "lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process


@pytest.mark.parametrize("state", ["training", "paused"])
def test_a_run_lives_as_long_as_its_process(root: Path, state: str) -> None:
    write(root / ID / "status.json", STATUS | {"state": state, "step": 0})
    write_metrics(root / ID, LINE | {"step": 612})
    with hold_lock(root / ID) as process:
        run = history.run_summary(root, ID)
        assert (run["state"], run["step"]) == (state, 612)
        with pytest.raises(ValueError, match=f"The run {ID} is being trained. Stop it"):
            history.delete_run(root, ID)
        process.kill()
    run = history.run_summary(root, ID)
    assert (run["state"], run["step"]) == ("interrupted", 500)
    history.delete_run(root, ID)
    assert not (root / ID).exists()


def test_looking_at_a_run_makes_no_lock_and_leaves_it_free(root: Path) -> None:
    write(root / ID / "status.json", STATUS | {"state": "training"})
    history.list_runs(root)
    with FileLock(root / ID / "lock", timeout=0):
        pass
    (root / ID / "lock").unlink()
    assert history.run_summary(root, ID)["state"] == "interrupted"
    assert not (root / ID / "lock").exists()


def test_deleting_frees_what_the_files_took(root: Path) -> None:
    (root / ID / "checkpoints" / "step-000500" / "adapter.safetensors").write_bytes(bytes(5000))
    outside = root.parent / "kept.txt"
    write(outside, {})
    (root / ID / "samples").mkdir()
    if os.name != "nt":
        (root / ID / "samples" / "link.png").symlink_to(outside)
    sizes = sum(file["bytes"] for file in history.run_details(root, ID)["files"])
    assert history.delete_run(root, ID) == sizes >= 5000
    assert sorted(path.name for path in root.iterdir()) == ["cache", "packed"]
    assert outside.exists()


def test_checkpoints_that_come_and_go_meanwhile_do_no_harm(root: Path) -> None:
    """As a training writes them: a folder under a temporary name, filled and renamed."""

    def write_checkpoints() -> None:
        for step in range(1000, 1400):
            temporary = root / ID / "checkpoints" / f".step-{step:06d}.tmp"
            temporary.mkdir()
            for name in ("adapter", "optimizer"):
                (temporary / name).touch()
            temporary.rename(temporary.with_name(f"step-{step:06d}"))
            shutil.rmtree(temporary.with_name(f"step-{step - 5:06d}"), ignore_errors=True)

    with ThreadPoolExecutor() as pool:
        writing = pool.submit(write_checkpoints)
        while not writing.done():
            assert history.run_details(root, ID)["state"] == "stopped"
        writing.result()


def test_a_disk_that_refuses_keeps_the_run(root: Path) -> None:
    with small_disk(root) as disk:
        folder = add_run(disk, ID)
        write(folder / "status.json", STATUS | {"state": "training"})
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(ValueError, match=r"Cannot delete .*: Read-only file system\. See"):
            history.delete_run(disk, ID)
        run = history.run_details(disk, ID)
        assert (run["state"], run["checkpoints"]) == ("interrupted", [250, 500])


def test_a_hundred_thousand_steps_are_answered_at_once(root: Path) -> None:
    numbers = random.Random(0)
    values = ("loss", "grad_norm", "learning_rate", "seconds")
    lines = [
        LINE | {"step": step} | {name: numbers.random() for name in values}
        for step in range(1, 100_001)
    ]
    write_metrics(root / ID, *lines)
    began = time.process_time()
    text = history.run_metrics(root, ID)
    took = time.process_time() - began
    began = time.process_time()
    history.run_metrics(root, ID, since=99_990)
    took_last = time.process_time() - began
    assert len(json.loads(text)["loss"]) == 100_000
    assert took < 1  # 0.4 s when it was written
    assert took_last < 0.3
