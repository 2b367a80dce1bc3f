"""Uploads by the hub's own client to a hub on this machine.

The client reads its variables when it is imported, so every upload is a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from atelier.trainers.hub_push import require_repo_id
from upload_hub import UploadHub

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """
import json, sys
from pathlib import Path
from trainers.hub_push import push
for repo_id in sys.argv[2:]:
    files = {"README.md": b"---\\nlicense: other\\n---\\n# A LoRA", "images/1.png": b"a picture"}
    files["my lora.safetensors"] = Path(sys.argv[1])
    try:
        print(json.dumps(push(repo_id, files, private=True, message="A first one")))
    except ValueError as error:
        print(json.dumps({"error": str(error)}))
"""
DATA = bytes(range(256)) * 100


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[UploadHub]:
    (tmp_path / "data").write_bytes(DATA)
    owners = {"a-writer": ("me",), "a-reader": ()}
    with UploadHub(tmp_path / "repositories", owners) as server:
        yield server


def push(repo_ids: list[str], endpoint: str, folder: Path, **variables: str) -> list[Any]:
    """For each id what `push` gave, or {"error": …}."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    own = {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "home"), "NO_PROXY": "127.0.0.1"}
    own["HF_HUB_DISABLE_XET"] = "1"  # its storage is not on this hub
    command = [sys.executable, "-c", SCRIPT, str(folder / "data"), *repo_ids]
    environment = {**kept, **own, **variables}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_all_files_arrive_in_one_commit(hub: UploadHub, tmp_path: Path) -> None:
    ids = ["me/lora", "me/lora"]
    pages = push(ids, hub.url, tmp_path, HF_TOKEN="a-writer")
    assert pages == [f"{hub.url}/me/lora"] * 2
    assert hub.commits == [{"repo": "me/lora", "summary": "A first one"}] * 2
    assert hub.is_private == {"me/lora": True}
    place = hub.folder / "me" / "lora"
    names = {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()}
    assert names == {"README.md", "images/1.png", "my lora.safetensors"}
    assert (place / "my lora.safetensors").read_bytes() == DATA
    assert (place / "images" / "1.png").read_bytes() == b"a picture"
    assert (place / "README.md").read_bytes() == b"---\nlicense: other\n---\n# A LoRA"
    assert len(hub.uploads) == 2  # the second time nothing large is sent


def test_the_login_of_the_hub_is_enough(hub: UploadHub, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text("a-writer", encoding="utf-8")
    assert push(["me/lora"], hub.url, tmp_path) == [f"{hub.url}/me/lora"]


def test_without_a_login_nothing_is_asked(hub: UploadHub, tmp_path: Path) -> None:
    (answer,) = push(["me/lora"], hub.url, tmp_path)
    assert answer["error"].startswith("There is no login of the Hugging Face Hub. Run `hf auth ")
    (answer,) = push(["me/lora"], hub.url, tmp_path, HF_TOKEN="a-writer", HF_HUB_OFFLINE="1")
    assert answer["error"].startswith("HF_HUB_OFFLINE forbids the upload")
    assert hub.requests == []


def test_what_the_hub_refuses_is_a_sentence(hub: UploadHub, tmp_path: Path) -> None:
    (answer,) = push(["other/lora"], hub.url, tmp_path, HF_TOKEN="a-writer")
    assert answer["error"].startswith("Your token may not write to 'other/lora'. Use a token of ")
    (answer,) = push(["me/lora"], hub.url, tmp_path, HF_TOKEN="nobody")
    assert answer["error"].startswith(f"{hub.url} does not accept the token of your login. ")
    (answer,) = push(["me/lora"], "http://127.0.0.1:9", tmp_path, HF_TOKEN="a-writer")
    start = "'me/lora' could not be uploaded to http://127.0.0.1:9 (Connect"
    assert answer["error"].startswith(start)
    assert not hub.folder.exists()


@pytest.mark.parametrize("repo_id", ["lora", "https://huggingface.co/me/lora", "me/lora/x", ""])
def test_what_is_no_id_is_refused(repo_id: str) -> None:
    with pytest.raises(ValueError, match=r"^The repository to upload to is named by its owner"):
        require_repo_id(repo_id)
