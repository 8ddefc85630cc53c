"""Waiting with a deadline, videos, and servers of streams that can stall: MJPEG over HTTP, and RTSP."""

from __future__ import annotations

import base64
import io
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import StreamRequestHandler, TCPServer, ThreadingTCPServer
from typing import Any

import numpy as np
import pytest
from PIL import Image

DEADLINE_S = 20.0


@pytest.fixture
def until() -> Callable[[Callable[[], object]], None]:
    """Wait until a condition holds, or fail."""

    def wait(condition: Callable[[], object]) -> None:
        end = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < end, "it did not happen in time"
            time.sleep(0.005)

    return wait


@pytest.fixture
def make_video(tmp_path: Path) -> Callable[..., Path]:
    """A video whose frames differ in brightness: frame n is grey 8 n, with noise in its middle on request."""

    def make(name: str = "film.avi", frames: int = 20, fourcc: str = "MJPG", noise: bool = False) -> Path:
        import cv2

        generator = np.random.default_rng(0)
        path = tmp_path / name
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*fourcc), 10, (64, 48))
        for number in range(frames):
            picture = np.full((48, 64, 3), 8 * number, np.uint8)
            if noise:
                picture[:, 10:50] = generator.integers(0, 256, (48, 40, 3))
            writer.write(picture)
        writer.release()
        return path

    return make


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Three images, two of them in folders of their own; the colour of each is its number."""
    folder = tmp_path / "images"
    for number, name in enumerate(["a/one.png", "b/two.JPG", "c.bmp"]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8 + number, 6), (50 * number, 0, 0)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


@dataclass
class StreamServer:
    """A server of a grey stream. While ``stalled`` is set it sends nothing, and ends its connections afterwards."""

    url: str = ""
    stalled: threading.Event = field(default_factory=threading.Event)
    requests: list[str] = field(default_factory=list)

    def send(self, write: Callable[[bytes], Any], packet: bytes) -> None:
        """The packet again and again, until the stream stalls or the client goes away."""
        try:
            while not self.stalled.wait(0.02):
                write(packet)
            while self.stalled.is_set():
                time.sleep(0.02)
        except OSError:
            pass


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 48), (100, 100, 100)).save(file, "JPEG", quality=90, subsampling=2)
    return file.getvalue()


def serve(server: TCPServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def http_stream() -> Iterator[StreamServer]:
    """Motion JPEG, as cameras serve it over HTTP."""
    stream = StreamServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "multipart/x-mixed-replace;boundary=frame")
            self.end_headers()
            picture = jpeg()
            header = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(picture)}\r\n\r\n".encode()
            stream.send(self.wfile.write, header + picture + b"\r\n")

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    stream.url = f"http://user:top@secret@127.0.0.1:{server.server_port}/video"
    server.daemon_threads, server.block_on_close = True, False
    yield from (stream for _ in serve(server))
    stream.stalled.set()


SDP = ("v=0", "o=- 0 0 IN IP4 127.0.0.1", "s=test", "t=0 0", "m=video 0 RTP/AVP 26", "a=control:track", "")


def rtp_jpeg() -> bytes:
    """The picture as one interleaved RTP packet (RFC 2435) without its sequence number."""
    data = jpeg()
    tables = b"".join(match[1] for match in re.finditer(rb"\xff\xdb\x00\x43[\x00\x01](.{64})", data, re.DOTALL))
    scan = data.index(b"\xff\xda")
    body = data[scan + 2 + int.from_bytes(data[scan + 2 : scan + 4], "big") : -2]
    return struct.pack(">IBBBBBBH", 0, 1, 255, 64 // 8, 48 // 8, 0, 0, len(tables)) + tables + body


@pytest.fixture
def rtsp_stream() -> Iterator[StreamServer]:
    """An RTSP server that asks for a password and has one motion JPEG track, over the same connection only."""
    stream = StreamServer()
    expected = "Basic " + base64.b64encode(b"user:secret").decode()

    class Handler(StreamRequestHandler):
        def reply(self, request: str, status: str, *headers: str, body: str = "") -> None:
            number = re.search(r"(?im)^CSeq: *(\d+)", request)
            lines = [f"RTSP/1.0 {status}", f"CSeq: {number[1] if number else 0}", *headers]
            lines += [f"Content-Length: {len(body)}"] if body else []
            self.wfile.write(("\r\n".join(lines) + "\r\n\r\n" + body).encode())

        def handle(self) -> None:
            while True:
                request = ""
                while line := self.rfile.readline().decode():
                    if line == "\r\n":
                        break
                    request += line
                if not request:
                    return
                stream.requests.append(request)
                method = request.split()[0]
                if method == "OPTIONS":
                    self.reply(request, "200 OK", "Public: OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN")
                elif expected not in request:
                    self.reply(request, "401 Unauthorized", 'WWW-Authenticate: Basic realm="camera"')
                elif method == "DESCRIBE":
                    self.reply(request, "200 OK", "Content-Type: application/sdp", body="\r\n".join(SDP))
                elif method == "SETUP" and "RTP/AVP/TCP" not in request:
                    self.reply(request, "461 Unsupported Transport")
                elif method == "SETUP":
                    self.reply(request, "200 OK", "Transport: RTP/AVP/TCP;unicast;interleaved=0-1", "Session: 1")
                elif method == "PLAY":
                    self.reply(request, "200 OK", "Session: 1")
                    return self.play()
                else:
                    self.reply(request, "200 OK")

        def play(self) -> None:
            payload, number = rtp_jpeg(), 0

            def write(packet: bytes) -> None:
                nonlocal number
                header = struct.pack(">BBHII", 0x80, 0x80 | 26, number % 65536, number * 3000, 1)
                number += 1
                self.wfile.write(struct.pack(">cBH", b"$", 0, len(header + packet)) + header + packet)

            stream.send(write, payload)

    class Server(ThreadingTCPServer):
        allow_reuse_address, daemon_threads, block_on_close = True, True, False
        address_family = socket.AF_INET

    server = Server(("127.0.0.1", 0), Handler)
    stream.url = f"rtsp://user:secret@127.0.0.1:{server.server_address[1]}/live"
    yield from (stream for _ in serve(server))
    stream.stalled.set()
