"""A bundle goes to the Hugging Face Hub and comes back by the documented commands; a local server is the Hub."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from duallora_edge.device_profiles import resolve_target
from duallora_edge.errors import BundleError
from duallora_edge.export.bundle import write_bundle
from duallora_edge.learner.network.answers import ComposedModel
from duallora_edge.learner.run_directory import RunDirectory
from duallora_edge.runtime.bundle import Bundle

COMMIT = "a" * 40


class Hub(BaseHTTPRequestHandler):
    """One repository, as far as `hf upload` and `hf download` ask for it."""

    files: dict[str, bytes]
    address: str

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.partition("?")[0]
        if "/preupload/" in path:
            asked = json.loads(body)["files"]
            self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]})
        elif "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"{self.address}/a/b/commit/{COMMIT}", "commitOid": COMMIT, "success": True})
        else:
            answers = {
                "/api/validate-yaml": {"errors": [], "warnings": []},
                "/api/repos/create": {"url": f"{self.address}/a/b"},
            }
            self.answer(answers[path])

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if "/resolve/" in path:
            content = self.files[path.partition(f"/resolve/{COMMIT}/")[2]]
            self.answer(content, ETag=f'"{hashlib.sha256(content).hexdigest()}"')
        elif "/tree/" in path:
            self.answer(
                [{"type": "file", "path": name, "size": len(self.files[name]), "oid": name} for name in self.files]
            )
        else:
            self.answer({"id": "a/b", "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.files]})

    def do_HEAD(self) -> None:
        self.do_GET()

    def answer(self, value: Any, **headers: str) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(200)
        for name, text in {"Content-Length": str(len(content)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def hub() -> Iterator[str]:
    """The address of an empty Hub."""
    Hub.files = {}
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        Hub.address = f"http://127.0.0.1:{server.server_port}"
        yield Hub.address
        server.shutdown()


def test_up_and_down(run: RunDirectory, model: ComposedModel, tmp_path: Path, hub: str) -> None:
    write_bundle(run, model, resolve_target("x86-cpu"), tmp_path / "bundle", None)
    given = {"HF_ENDPOINT": hub, "HF_TOKEN": "hf_any", "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}

    def hf(*arguments: str | Path) -> None:
        command = [Path(sys.executable).with_name("hf"), *arguments]
        done = subprocess.run(command, env={**os.environ, **given}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    hf("upload", "a/b", tmp_path / "bundle")
    hf("download", "a/b", "--local-dir", tmp_path / "again")
    assert Bundle.open(tmp_path / "again").digest == Bundle.open(tmp_path / "bundle").digest
    hf("download", "a/b")
    with pytest.raises(BundleError, match="holds links in place of files, as the cache of the Hugging Face Hub does"):
        Bundle.open(next(tmp_path.glob("home/hub/*/snapshots/*")))
