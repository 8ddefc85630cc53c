"""Large files go on after an interruption, whatever the server does, and only what was signed is used."""

from __future__ import annotations

import http.server
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

tuf = pytest.importorskip("tuf")

from tuf.api.exceptions import DownloadError, LengthOrHashMismatchError  # noqa: E402

from duallora_edge.runtime.field import fetching  # noqa: E402
from duallora_edge.runtime.field.fetching import HttpFetcher  # noqa: E402

CONTENT = np.random.default_rng(0).bytes(300_000)


class Server(http.server.ThreadingHTTPServer):
    """Serves one content, in the ways of ``ranges``: "yes", "no" (always the whole), "lies" (another range), "416"."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.ranges, self.breaks_at = CONTENT, "yes", 10**9
        self.asked: list[str] = []
        self.sent = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/targets/{'a' * 64}.whole"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range", "")
        self.server.asked.append(wanted)
        match = re.fullmatch(r"bytes=(\d+)-", wanted)
        start = int(match[1]) if match and self.server.ranges != "no" else 0
        if match and self.server.ranges == "416":
            self.send_error(416)
            return
        if match and self.server.ranges == "lies":
            start += 1
        body = self.server.content[start:]
        self.send_response(206 if match and self.server.ranges != "no" else 200)
        if match and self.server.ranges != "no":
            self.send_header(
                "Content-Range", f"bytes {start}-{len(self.server.content) - 1}/{len(self.server.content)}"
            )
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        body = body[: max(self.server.breaks_at - start, 0)]
        self.server.sent += len(body)
        self.wfile.write(body)  # and the connection ends, perhaps too early

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(autouse=True)
def few_bytes_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "LARGE_BYTES", 1000)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@contextmanager
def fetched(server: Server, parts: Path, length: int = len(CONTENT)) -> Iterator[bytes]:
    with HttpFetcher(parts).download_file(server.url, length) as file:
        yield file.read()


def interrupted(server: Server, parts: Path, at: int) -> int:
    """How many bytes are there after a connection that broke."""
    server.breaks_at = at
    with pytest.raises(DownloadError), fetched(server, parts):
        pass
    server.breaks_at = 10**9
    (part,) = parts.iterdir()
    return part.stat().st_size


def test_it_goes_on_where_it_ended(server: Server, tmp_path: Path) -> None:
    first = interrupted(server, tmp_path, 100_000)
    second = interrupted(server, tmp_path, 250_000)
    assert 0 < first <= 100_000 < second <= 250_000
    with fetched(server, tmp_path) as content:
        assert content == CONTENT
    assert server.asked == ["", f"bytes={first}-", f"bytes={second}-"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ranges", ["no", "lies"])
def test_a_server_that_does_not_go_on(server: Server, tmp_path: Path, ranges: str) -> None:
    interrupted(server, tmp_path, 100_000)
    server.ranges = ranges
    if ranges == "no":
        with fetched(server, tmp_path) as content:
            assert content == CONTENT
    else:  # its bytes are of another place, so the check of the whole file fails, and the next try is a new one
        with pytest.raises(LengthOrHashMismatchError), fetched(server, tmp_path) as content:
            assert content != CONTENT
            raise LengthOrHashMismatchError
        assert list(tmp_path.iterdir()) == []


def test_what_was_not_signed_is_not_kept(server: Server, tmp_path: Path) -> None:
    interrupted(server, tmp_path, 100_000)
    server.content = bytes(len(CONTENT))
    with pytest.raises(LengthOrHashMismatchError), fetched(server, tmp_path) as content:
        assert content[-1000:] == bytes(1000)
        raise LengthOrHashMismatchError  # as python-tuf does
    assert list(tmp_path.iterdir()) == []


def test_no_more_than_was_announced_is_written(server: Server, tmp_path: Path) -> None:
    with fetched(server, tmp_path, 50_000) as content:
        assert content == CONTENT[:50_000]


def test_refusals(server: Server, tmp_path: Path) -> None:
    interrupted(server, tmp_path, 100_000)
    server.ranges = "416"
    with pytest.raises(DownloadError, match="416"), fetched(server, tmp_path):
        pass
    url = server.url
    server.shutdown()
    server.server_close()
    with pytest.raises(DownloadError), HttpFetcher(tmp_path).download_file(url, len(CONTENT)):
        pass


def test_parts_of_other_files_are_deleted(server: Server, tmp_path: Path) -> None:
    (tmp_path / ("b" * 64 + ".part")).write_bytes(b"old")
    (tmp_path / "other").write_bytes(b"not ours")
    with fetched(server, tmp_path) as content:
        assert content == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
