"""FLUX models of Hugging Face repositories, by the hub's own client from a hub on this machine.

The client reads its variables when it is imported, so every fetch is a process of its own.
"""

from __future__ import annotations

import filecmp
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from atelier.trainers.hub import require_hub_id
from dense import dense_transformer
from flux_files import flux_tensors, write_flux
from hub_server import HubServer
from small_disk import small_disk

ROOT = Path(__file__).resolve().parent.parent
FETCH = """
import json, sys
from trainers.hub import fetch_flux
for hub_id in sys.argv[1:]:
    try:
        print(json.dumps(str(fetch_flux(hub_id))))
    except ValueError as error:
        print(json.dumps({"error": str(error)}))
"""
SIZES = {"depth": 1, "depth_single": 1}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    repositories = tmp_path_factory.mktemp("repositories")
    folder = repositories / "flux" / "folder"
    dense = dense_transformer(flux_tensors(**SIZES))
    dense.save_pretrained(folder / "transformer", max_shard_size="4MB")
    write_flux(folder / "flux.safetensors", **SIZES)
    write_flux(repositories / "flux" / "single" / "flux-dev.safetensors", **SIZES)
    (repositories / "flux" / "single" / "README.md").write_text("A model.", encoding="utf-8")
    write_flux(repositories / "flux" / "gated" / "flux-dev.safetensors", **SIZES)
    for name in ("fp8", "bf16"):
        write_flux(repositories / "flux" / "many" / f"{name}.safetensors", **SIZES)
    with HubServer(repositories, gated={"flux/gated": "a-token"}) as server:
        yield server


def fetch(hub_ids: list[str], endpoint: str, home: Path, **variables: str) -> list[Path | str]:
    """For each id where the model is now, or the sentence of the error."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    hub = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", FETCH, *hub_ids]
    environment = {**kept, **hub, **variables}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    return [a["error"] if isinstance(a, dict) else Path(a) for a in answers]


def is_same(found: Path, original: Path) -> bool:
    """Whether a folder or file has the bytes of the other and no more files."""
    if found.is_file():
        return filecmp.cmp(found, original, shallow=False)
    names = sorted(path.name for path in original.iterdir())
    return sorted(path.name for path in found.iterdir()) == names and all(
        filecmp.cmp(found / name, original / name, shallow=False) for name in names
    )


def test_only_the_model_is_downloaded_and_only_once(hub: HubServer, tmp_path: Path) -> None:
    ids = ["flux/folder", "flux/single"]
    folder, single = fetch(ids, hub.url, tmp_path)
    assert isinstance(folder, Path)
    assert isinstance(single, Path)
    assert is_same(folder, hub.folder / "flux" / "folder" / "transformer")
    assert is_same(single, hub.folder / "flux" / "single" / "flux-dev.safetensors")
    names = {path.rpartition("/")[2] for path in hub.downloads()}
    assert names == {path.name for path in folder.iterdir()} | {"flux-dev.safetensors"}
    hub.requests.clear()
    assert fetch(ids, hub.url, tmp_path) == [folder, single]
    assert hub.requests == []
    assert fetch(ids, hub.url, tmp_path, HF_HUB_OFFLINE="1") == [folder, single]
    next(folder.glob("*-of-*.safetensors")).unlink()  # as a download that was cut off leaves it
    assert fetch(["flux/folder"], hub.url, tmp_path) == [folder]
    assert is_same(folder, hub.folder / "flux" / "folder" / "transformer")


def test_the_token_opens_a_gated_repository(hub: HubServer, tmp_path: Path) -> None:
    (found,) = fetch(["flux/gated"], hub.url, tmp_path, HF_TOKEN="a-token")
    assert isinstance(found, Path)
    assert is_same(found, hub.folder / "flux" / "gated" / "flux-dev.safetensors")


def test_what_the_hub_refuses_is_a_sentence(hub: HubServer, tmp_path: Path) -> None:
    gated, missing, many = fetch(["flux/gated", "flux/missing", "flux/many"], hub.url, tmp_path)
    assert gated == (
        f"The repository 'flux/gated' is gated. Accept its licence on {hub.url}/flux/gated, then "
        "log in with `hf auth login`, or start ComfyUI with HF_TOKEN set."
    )
    assert str(missing).startswith(f"There is no repository 'flux/missing' at {hub.url}, or it is ")
    assert "has no folder transformer, and 2 .safetensors files instead of one." in str(many)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_without_a_network_it_is_a_sentence(tmp_path: Path) -> None:
    closed = "http://127.0.0.1:9"
    (forbidden,) = fetch(["flux/single"], closed, tmp_path, HF_HUB_OFFLINE="1")
    assert str(forbidden).startswith("'flux/single' is not in the cache of the Hugging Face Hub, ")
    (closed_port,) = fetch(["flux/single"], closed, tmp_path)
    message = rf"'flux/single' could not be downloaded from {closed} \(Connect\w*\)\. Check .*"
    assert re.fullmatch(message, str(closed_port))


def test_a_full_disk_is_a_sentence(hub: HubServer, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        (found,) = fetch(["flux/single"], hub.url, disk)
    assert str(found).startswith(f"The disk of {disk / 'hub'} is full.")


@pytest.mark.parametrize("hub_id", ["black-forest-labs/FLUX.1-dev", "a/b", "a_1/b.c-d_e"])
def test_an_id_is_owner_and_name(hub_id: str) -> None:
    require_hub_id(hub_id)


WRONG = [
    *("https://huggingface.co/a/b", "a/b/c", "FLUX.1-dev", "/models/flux", "../flux", "C:\\flux"),
    *("a/b.git", "a/..", "a/b--c", " a/b", "a/b\n", "a/-b", "datasets/a/b"),
]


@pytest.mark.parametrize("hub_id", WRONG)
def test_what_is_no_id_is_refused(hub_id: str) -> None:
    expected = f"^A Hugging Face repository is named .*, got {re.escape(repr(hub_id))}"
    with pytest.raises(ValueError, match=expected):
        require_hub_id(hub_id)
