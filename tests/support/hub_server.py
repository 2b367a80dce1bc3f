"""A Hugging Face Hub on this machine, as far as its client needs it to list and download files."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer:
    """Serves `<folder>/<owner>/<name>/` as models and `<folder>/datasets/<owner>/<name>/` as
    datasets; gated ones by this path and their token."""

    def __init__(self, folder: Path, gated: Mapping[str, str]) -> None:
        self.folder, self.gated = folder, gated
        self.requests: list[tuple[str, str]] = []
        self.bytes_sent = 0
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def downloads(self) -> list[str]:
        """The paths of the files that were asked for."""
        return [path for method, path in self.requests if method == "GET" and "/resolve/" in path]

    def take(self, path: str, headers: Mapping[str, str], body: bytes) -> tuple[int, dict]:
        """The status and the JSON that answer what is sent; this hub takes nothing."""
        return 405, {}


class _Handler(BaseHTTPRequestHandler):
    server_hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(has_body=True)

    def do_HEAD(self) -> None:
        self._answer(has_body=False)

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server_hub.requests.append((self.command, path))
        body = self.rfile.read(int(self.headers["Content-Length"]))
        status, answer = self.server_hub.take(path, self.headers, body)
        headers = {"Content-Type": "application/json"}
        self._send(status, json.dumps(answer).encode(), headers, has_body=True)

    do_PUT = do_POST

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on the console."""

    def _answer(self, *, has_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server_hub.requests.append((self.command, path))
        is_list = path.startswith("/api/")
        parts = path.removeprefix("/api").removeprefix("/models")[1:].split("/")
        length = 3 if parts[0] == "datasets" else 2
        hub_id, rest = "/".join(parts[:length]), parts[length:]
        folder = self.server_hub.folder / hub_id
        token = self.server_hub.gated.get(hub_id)
        if is_list and not rest:  # /api/models/<id>
            status, answer = self.server_hub.take(path, self.headers, b"")
            data, headers = json.dumps(answer).encode(), {"Content-Type": "application/json"}
            self._send(status, data, headers, has_body)
        elif not folder.is_dir():
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"}, has_body)
        elif is_list:  # /api/models/<id>/tree/<revision>, also of datasets; gated ones are listed
            self._send(200, _tree(folder), {"Content-Type": "application/json"}, has_body)
        elif token and self.headers["Authorization"] != f"Bearer {token}":
            self._send(401, b"", {"X-Error-Code": "GatedRepo"}, has_body)
        else:  # /<id>/resolve/<revision>/<file>
            data = folder.joinpath(*rest[2:]).read_bytes()
            etag = hashlib.sha256(data).hexdigest()
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}
            if wanted := self.headers["Range"]:  # bytes=<first>-<last>
                first, last = (int(place) for place in wanted.partition("=")[2].split("-"))
                headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
                self._send(206, data[first : last + 1], headers, has_body)
            else:
                self._send(200, data, headers, has_body)

    def _send(self, status: int, data: bytes, headers: Mapping[str, str], has_body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if has_body:
            self.server_hub.bytes_sent += len(data)
            self.wfile.write(data)


def _tree(folder: Path) -> bytes:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = [
        {
            "type": "file",
            "path": path.relative_to(folder).as_posix(),
            "size": path.stat().st_size,
            "oid": COMMIT,
        }
        for path in files
    ]
    return json.dumps(entries).encode()
