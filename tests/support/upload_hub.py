"""A Hugging Face Hub on this machine that takes uploads: repositories, large files, commits."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hub_server import COMMIT, HubServer

Answer = tuple[int, dict[str, Any]]


class UploadHub(HubServer):
    """As its client speaks to it, with git-lfs for large files and pictures.

    Args:
        owners: for each token the names under which it may write.
    """

    def __init__(self, folder: Path, owners: Mapping[str, tuple[str, ...]]) -> None:
        super().__init__(folder, gated={})
        self.owners = owners
        self.is_private: dict[str, bool] = {}
        self.commits: list[dict[str, Any]] = []
        self.uploads: list[str] = []
        self._large: dict[str, bytes] = {}

    def take(self, path: str, headers: Mapping[str, str], body: bytes) -> Answer:
        if path.startswith("/lfs/"):
            return self._take_large(path.removeprefix("/lfs/"), body)
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        token = headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in self.owners:
            return 401, {"error": "Invalid username or password."}
        if path == "/api/repos/create":
            return self._create(json.loads(body), self.owners[token])
        hub_id = path.removeprefix("/api/models")[1:].partition("/preupload/")[0]
        if path.endswith("/preupload/main"):
            return self._preupload(json.loads(body))
        if path.endswith("/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        hub_id, _, rest = hub_id.partition("/commit/")
        if not rest:
            return (200, {"id": hub_id}) if hub_id in self.is_private else (404, {})
        return self._commit(hub_id, [json.loads(line) for line in body.splitlines()])

    def _create(self, asked: dict[str, Any], owners: tuple[str, ...]) -> Answer:
        hub_id = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] not in owners:
            return 403, {"error": "You don't have the rights to create a model here"}
        if hub_id in self.is_private:
            return 409, {"error": "You already created this model repo", "url": self._page(hub_id)}
        # The client says "visibility" from 1.0 on.
        self.is_private[hub_id] = asked.get("private") or asked.get("visibility") == "private"
        (self.folder / hub_id).mkdir(parents=True)
        return 200, {"url": self._page(hub_id)}

    def _preupload(self, asked: dict[str, Any]) -> Answer:
        def mode(path: str) -> str:
            return "lfs" if path.endswith((".safetensors", ".png")) else "regular"

        names = [file["path"] for file in asked["files"]]
        files = [{"path": n, "uploadMode": mode(n), "shouldIgnore": False} for n in names]
        return 200, {"files": files}

    def _batch(self, asked: dict[str, Any]) -> Answer:
        objects = []
        for one in asked["objects"]:
            upload = {"upload": {"href": f"{self.url}/lfs/{one['oid']}"}}
            objects.append(one if one["oid"] in self._large else {**one, "actions": upload})
        return 200, {"transfer": "basic", "objects": objects}

    def _take_large(self, oid: str, body: bytes) -> Answer:
        assert hashlib.sha256(body).hexdigest() == oid
        self.uploads.append(oid)
        self._large[oid] = body
        return 200, {}

    def _commit(self, hub_id: str, lines: list[dict[str, Any]]) -> Answer:
        header, *operations = lines
        for operation in operations:
            value = operation["value"]
            is_large = operation["key"] == "lfsFile"
            path = self.folder / hub_id / value["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(
                self._large[value["oid"]] if is_large else base64.b64decode(value["content"])
            )
        self.commits.append({"repo": hub_id, "summary": header["value"]["summary"]})
        return 200, {"commitUrl": f"{self._page(hub_id)}/commit/{COMMIT}", "commitOid": COMMIT}

    def _page(self, hub_id: str) -> str:
        return f"{self.url}/{hub_id}"
