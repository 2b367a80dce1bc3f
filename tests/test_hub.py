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
from typing import Any

import pytest
import torch
from atelier.trainers.hub import require_hub_id
from atelier.trainers.load import inspect_flux
from dense import dense_transformer
from diffusers import SD3Transformer2DModel
from flux_files import flux_tensors, write_flux
from four_bit_files import FourBitFlux
from hub_server import HubServer
from safetensors.torch import save_file
from small_disk import small_disk

ROOT = Path(__file__).resolve().parent.parent
FETCH = "str(fetch_flux(hub_id))"
INSPECT = "vars(inspect_hub_flux(hub_id))"
SCRIPT = """
import json, sys
from trainers.hub import fetch_flux, inspect_hub_flux
for hub_id in sys.argv[1:]:
    try:
        print(json.dumps({"answer": ANSWER}))
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
    dense.save_pretrained(repositories / "flux" / "shards", max_shard_size="4MB")
    write_flux(repositories / "flux" / "single" / "flux-dev.safetensors", **SIZES)
    (repositories / "flux" / "single" / "README.md").write_text("A model.", encoding="utf-8")
    write_flux(repositories / "flux" / "gated" / "flux-dev.safetensors", **SIZES)
    for name in ("fp8", "bf16"):
        write_flux(repositories / "flux" / "many" / f"{name}.safetensors", **SIZES)
    FourBitFlux().write(repositories / "flux" / "four-bit" / "transformer" / "nf4.safetensors")
    stable_diffusion_3().save_pretrained(repositories / "other" / "sd3" / "transformer")
    flux_2 = repositories / "other" / "flux.2" / "flux2-dev.safetensors"
    flux_2.parent.mkdir()
    save_file({"double_stream_modulation_img.lin.weight": torch.zeros(1000, 1000)}, flux_2)
    pickle = repositories / "other" / "pickle" / "model.safetensors"
    pickle.parent.mkdir()
    torch.save({"weight": torch.zeros(1000, 1000)}, pickle)
    with HubServer(repositories, gated={"flux/gated": "a-token"}) as server:
        yield server


def stable_diffusion_3() -> SD3Transformer2DModel:
    """diffusers' own, in little."""
    text = {"joint_attention_dim": 64, "caption_projection_dim": 256, "pooled_projection_dim": 64}
    return SD3Transformer2DModel(
        num_layers=1, num_attention_heads=4, attention_head_dim=64, in_channels=16, **text
    )


def fetch(hub_ids: list[str], endpoint: str, home: Path, **variables: str) -> list[Path | str]:
    """For each id where the model is now, or the sentence of the error."""
    answers = ask(FETCH, hub_ids, endpoint, home, **variables)
    return [a["error"] if "error" in a else Path(a["answer"]) for a in answers]


def ask(
    answer: str, hub_ids: list[str], endpoint: str, home: Path, **variables: str
) -> list[dict[str, Any]]:
    """For each id the `answer`, or the sentence of the `error`, by a process of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    hub = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", SCRIPT.replace("ANSWER", answer), *hub_ids]
    environment = {**kept, **hub, **variables}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


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


def test_the_shards_of_a_transformer_alone_are_one_model(hub: HubServer, tmp_path: Path) -> None:
    (found,) = fetch(["flux/shards"], hub.url, tmp_path)
    assert isinstance(found, Path)
    assert len([*found.glob("*-of-*.safetensors")]) > 1
    assert inspect_flux(found).config == inspect_flux(hub.folder / "flux" / "folder").config
    hub.requests.clear()
    assert fetch(["flux/shards"], hub.url, tmp_path) == [found]
    assert hub.requests == []


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


def test_another_model_is_refused_before_it_is_downloaded(hub: HubServer, tmp_path: Path) -> None:
    ids = ["other/sd3", "other/flux.2", "other/pickle"]
    files = [file for name in ids for file in (hub.folder / name).rglob("*.safetensors")]
    assert min(file.stat().st_size for file in files) > 4_000_000
    hub.bytes_sent = 0
    stable_diffusion, flux_2, pickle = fetch(ids, hub.url, tmp_path)
    assert str(stable_diffusion).startswith("'other/sd3' is not a FLUX.1 model: it has no 'img_in.")
    assert str(flux_2).startswith("'other/flux.2' is a FLUX.2 model, which is not known here.")
    assert str(pickle).startswith("'model.safetensors' of the repository 'other/pickle' is not a ")
    assert hub.bytes_sent < 400_000
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_headers_tell_the_sizes_without_a_download(hub: HubServer, tmp_path: Path) -> None:
    files = {
        "flux/folder": hub.folder / "flux" / "folder" / "transformer",
        "flux/single": hub.folder / "flux" / "single" / "flux-dev.safetensors",
        "flux/four-bit": hub.folder / "flux" / "four-bit" / "transformer",
    }
    answers = ask(INSPECT, [*files, "flux/gated"], hub.url, tmp_path)
    expected = [vars(inspect_flux(file).config) for file in files.values()]
    assert [answer["answer"] for answer in answers[:-1]] == expected
    assert "is gated. Accept its licence" in answers[-1]["error"]
    assert not list(tmp_path.rglob("*.safetensors"))
    (downloaded,) = fetch(["flux/single"], hub.url, tmp_path)
    assert isinstance(downloaded, Path)
    hub.requests.clear()
    assert ask(INSPECT, ["flux/single"], hub.url, tmp_path) == [{"answer": expected[1]}]
    assert hub.requests == []


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
