"""What is sent to a site arrives whole, from those who may send it, or not at all."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import pytest

from duallora_edge.runtime.service import web_server
from duallora_edge.runtime.service.web_server import MAX_BODY, Reply, Site, WebServer, json_reply

WAIT_S = 10.0


class Notes(Site):
    """Notes what it is sent."""

    def __init__(self) -> None:
        self.taken: list[tuple[str, str, dict[str, Any]]] = []

    def get(self, path: str, query: Mapping[str, str]) -> Reply | None:
        return Reply(b"hello") if path == "/" else None

    def post(self, path: str, token: str, body: dict[str, Any]) -> Reply | None:
        if path != "/note":
            return None
        self.taken.append((path, token, body))
        return json_reply(len(self.taken))


@pytest.fixture
def notes() -> Notes:
    return Notes()


@pytest.fixture
def server(notes: Notes) -> Iterator[WebServer]:
    with WebServer(notes, "127.0.0.1", 0) as server:
        yield server


def send(server: WebServer, *parts: bytes) -> bytes:
    """What comes back before the connection is closed."""
    with socket.create_connection(("127.0.0.1", server._server.server_address[1]), timeout=WAIT_S) as client:
        received = b""
        try:
            for part in parts:
                client.sendall(part)
                time.sleep(0.05)
            while block := client.recv(4096):
                received += block
        except ConnectionError:
            pass  # a server may close before it has read everything
        return received


def request(
    body: bytes, kind: str = "application/json", host: str = "localhost", path: str = "/note", extra: str = ""
) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{extra}\r\n"
    return head.encode() + body


def test_a_note_arrives_in_any_number_of_parts(server: WebServer, notes: Notes) -> None:
    body = json.dumps({"text": "x" * 10_000}).encode()
    whole = request(body, "application/json; charset=utf-8", extra="Authorization: Bearer secret\r\n")
    for cuts in ((), (1,), (90, 200), (len(whole) - 1,)):
        edges = [0, *cuts, len(whole)]
        parts = [whole[start:end] for start, end in pairwise(edges)]
        assert b" 200 OK" in send(server, *parts)
    assert notes.taken == [("/note", "secret", {"text": "x" * 10_000})] * 4


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (request(b"{}", host="example.org"), 403),  # a page of another site whose name leads here
        (request(b"{}", "text/plain"), 405),  # what a form of another site can send without asking
        (request(b"{}", "application/x-www-form-urlencoded"), 405),
        (request(b"{}", path="/other"), 405),
        (request(b""), 400),
        (request(b"[1]"), 400),
        (request(b"{'a': 1}"), 400),
        (request(b"[" * 60_000), 400),
        (request(b"\xff\xfe\x00"), 400),
        (request(b'"' + b"x" * MAX_BODY), 413),
        (b"POST /note HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\r\n", 413),
        (request(b"{}").replace(b"Length: 2", b"Length: -2"), 413),
        (request(b"{}").replace(b"Length: 2", b"Length: 0x2"), 413),
        (request(b"{}").replace(b"Content-Length: 2", b"Transfer-Encoding: chunked"), 405),
        (request(b"{}").replace(b"POST", b"PUT"), 405),
        (request(b"{}").replace(b"Host: localhost", b"Host: localhost\r\nHost: localhost"), 403),
    ],
)
def test_nothing_else_arrives(server: WebServer, notes: Notes, sent: bytes, status: int) -> None:
    assert f" {status} ".encode() in send(server, sent)
    assert notes.taken == []


def test_a_second_request_in_the_same_connection_is_not_read(server: WebServer, notes: Notes) -> None:
    answer = send(server, request(b"{}") + request(b'{"second": 1}'))
    assert answer.count(b"HTTP/1.1") == 1 and len(notes.taken) == 1


def test_a_body_that_never_ends(server: WebServer, notes: Notes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_server._Handler, "timeout", 0.3)
    assert send(server, request(b"{}").replace(b"Length: 2", b"Length: 3")) == b""
    assert notes.taken == [] and b" 200 OK" in send(server, request(b"{}"))
