"""A Weights & Biases on this machine, as far as its client needs it to take a run."""

from __future__ import annotations

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer:
    """Keeps what it is sent: history rows, and of runs their ids and settings."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.history: list[dict[str, Any]] = []
        self.runs: dict[str, dict[str, Any]] = {}
        self.files: dict[str, bytes] = {}
        server = self

        class Handler(_Handler):
            wandb = server

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> WandbServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Answer no more: connections are refused."""
        self._server.shutdown()
        self._server.server_close()

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        name = re.search(r"(?:query|mutation)\s+(\w+)", query)
        return getattr(self, f"_{name.group(1)}", self._unknown)(variables) if name else {}

    def _Viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        viewer = {"id": "v", "entity": "me", "username": "me", "email": "", "flags": "{}"}
        return {"viewer": {**viewer, "teams": {"edges": []}}}

    def _RunResumeStatus(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"model": {"name": variables["project"], "bucket": None}}

    def _UpsertBucket(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.setdefault(variables["name"], {})
        run |= {key: value for key, value in variables.items() if value is not None}
        project = {"id": "p", "name": "atelier", "entity": {"id": "e", "name": "me"}}
        bucket = {"id": "b", "name": variables["name"], "displayName": "", "config": "{}"}
        return {
            "upsertBucket": {
                "bucket": {**bucket, "project": project, "historyLineCount": 0},
                "inserted": True,
            }
        }

    def _CreateRunFiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": n, "uploadUrl": f"{self.url}/upload/{n}"} for n in variables["files"]]
        return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}

    def _unknown(self, _: dict[str, Any]) -> dict[str, Any]:
        return {}


class _Handler(BaseHTTPRequestHandler):
    wandb: WandbServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.wandb.paths.append(self.path)
        answer: dict[str, Any] = {}
        if self.path == "/graphql":
            asked = json.loads(body)
            answer = {"data": self.wandb.answer(asked["query"], asked.get("variables") or {})}
        elif self.path.endswith("/file_stream"):
            rows = json.loads(body).get("files", {}).get("wandb-history.jsonl", {})
            self.wandb.history += [json.loads(row) for row in rows.get("content", [])]
        elif self.path.startswith("/upload/"):
            self.wandb.files[self.path.removeprefix("/upload/")] = body
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_PUT = do_GET = do_POST

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on the console."""
