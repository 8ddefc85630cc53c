"""A page with the live picture and the answers of the model, and the same data for programs, over HTTP.

Anyone who can reach the address sees what the camera sees, so by default only this machine can. The interface is
read-only. Clients get copies of what the monitor knows at that moment, and the pipeline never waits for them.
"""

from __future__ import annotations

import errno
import io
import ipaddress
import json
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from socketserver import TCPServer
from typing import Any

from PIL import Image

from duallora_edge.errors import DualLoraEdgeError
from duallora_edge.runtime.closing import Closing
from duallora_edge.runtime.service.monitor import Monitor
from duallora_edge.runtime.service.pipeline import Answer
from duallora_edge.runtime.sources.frame import Frame

PAGE = "live_page.html"
TOP = 5
MAX_SIDE = 960  # pixels of a picture
QUALITY = 80
STREAM_RATE = 15  # pictures per second
MAX_VIEWERS = 8  # of the stream
MAX_CONNECTIONS = 64
MAX_HEADER = 16384  # bytes of a request
TIMEOUT_S = 10.0
# The stream repeats a picture when there is no new one, to notice clients that have left.
_REPEAT_S = 2.0
# Small, because pictures that wait in the network are old when they arrive.
_STREAM_BUFFER = 128 * 1024
_BOUNDARY = "picture"
_TEXT = "text/plain; charset=utf-8"
_METRICS = "text/plain; version=0.0.4; charset=utf-8"
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",  # pages of other sites cannot embed the picture
}
_POLICY = (
    "default-src 'none'; connect-src 'self'; img-src blob: data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'"
)


class ServerError(DualLoraEdgeError):
    """Nothing can be served at the address that was asked for."""


class LiveServer(Closing):
    """Serves what a monitor knows, from threads of its own, until `close`.

    ``/`` is a page, ``/frame.jpg`` the latest picture, ``/stream.mjpg`` every new picture, ``/state.json`` the latest
    answer and the health, ``/health`` the health with status 200 or 503, and ``/metrics`` is for Prometheus.
    """

    def __init__(self, monitor: Monitor, host: str = "127.0.0.1", port: int = 8080, pictures: bool = True) -> None:
        """Listen at the address or name ``host``, on ``port`` (0: any that is free).

        Without ``pictures`` there are only the last three of these. Raises `ServerError` when the address or the port
        is not available.
        """
        if not 0 <= port <= 65535:
            raise ValueError(f"port must be from 0 to 65535, not {port}")
        site = _Site(monitor, pictures)
        try:
            self._server = _Server(host, port, site)
        except (OSError, UnicodeError) as error:
            raise _explained(error, host, port) from error
        # The interval in seconds at which it checks for the end is how long `close` takes.
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="duallora-edge live", daemon=True
        )
        self._thread.start()

    @property
    def url(self) -> str:
        """The address of the page; with the name of this machine if all its addresses are served."""
        address, port = self._server.address, self._server.server_address[1]
        name = f"[{address}]" if address.version == 6 else str(address)
        return f"http://{socket.gethostname() if address.is_unspecified else name}:{port}/"

    def close(self) -> None:
        """Stop at once and disconnect viewers. Does nothing the second time."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.end()


def _explained(error: OSError | UnicodeError, host: str, port: int) -> ServerError:
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.EADDRINUSE:
        return ServerError(f"Port {port} of {host} is in use; choose another one with --listen.")
    if number == errno.EACCES:
        return ServerError(f"This user may not use port {port}; choose one above 1023 with --listen.")
    return ServerError(f"'{host}' is not an address of this machine ({error}); choose one with --listen.")


@dataclass(frozen=True)
class _Reply:
    """The answer to one request."""

    body: bytes
    kind: str = _TEXT
    status: HTTPStatus = HTTPStatus.OK
    headers: Mapping[str, str] = field(default_factory=dict)


class _Site:
    """The pages, and how each is made."""

    def __init__(self, monitor: Monitor, pictures: bool) -> None:
        self._monitor = monitor
        self.pages: dict[str, Callable[[], _Reply]] = {
            "/": self._page if pictures else self._index,
            "/state.json": self._state,
            "/health": self._health,
            "/metrics": lambda: _Reply(monitor.metrics().encode(errors="replace"), _METRICS),
        }
        if pictures:
            self.pages["/frame.jpg"] = self._picture
        self.stream = "/stream.mjpg" if pictures else None
        self._document = files(__package__).joinpath(PAGE).read_text(encoding="utf-8") if pictures else ""
        self._encoding = threading.Lock()  # guards the two below
        self._encoded: Frame | None = None
        self._jpeg = b""

    def jpeg(self) -> tuple[Frame, bytes] | None:
        """The latest frame and its picture, None before the first answer."""
        with self._encoding:
            answer = self._monitor.last
            if answer is None:
                return None
            if answer.frame is not self._encoded:
                self._encoded, self._jpeg = answer.frame, _encode(answer.frame)
            return answer.frame, self._jpeg

    def _page(self) -> _Reply:
        nonce = secrets.token_urlsafe(16)
        headers = {"Content-Security-Policy": _POLICY.format(nonce=nonce)}
        return _Reply(self._document.replace("{nonce}", nonce).encode(), "text/html; charset=utf-8", headers=headers)

    def _index(self) -> _Reply:
        paths = "".join(f"{path}\n" for path in self.pages if path != "/")
        return _Reply(f"duallora-edge, without pictures\n\n{paths}".encode())

    def _picture(self) -> _Reply:
        latest = self.jpeg()
        if latest is None:
            return _refusal(HTTPStatus.SERVICE_UNAVAILABLE, "There is no picture yet.")
        frame, jpeg = latest
        return _Reply(jpeg, "image/jpeg", headers={"ETag": f'"{frame.timestamp:.6f}"'})

    def _state(self) -> _Reply:
        answer, health = self._monitor.last, self._monitor.health()
        return _json({"state": _state(answer, health), "answer": answer and _answer(answer), "health": health})

    def _health(self) -> _Reply:
        health = self._monitor.health()
        return _json(health, HTTPStatus.OK if health["ok"] else HTTPStatus.SERVICE_UNAVAILABLE)


def _encode(frame: Frame) -> bytes:
    image = Image.fromarray(frame.pixels)
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.BILINEAR)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def _answer(answer: Answer) -> dict[str, Any]:
    return {**answer.prediction.to_json(TOP), "age_ms": answer.age_ms, "sequence": answer.frame.sequence}


def _state(answer: Answer | None, health: dict[str, Any]) -> str:
    """The state in one word."""
    source, status = health["source"], str(health["classifier"]["status"])
    if status in ("failed", "loading"):
        return status
    if not source["connected"] and source["last_error"]:
        return "lost"
    if answer is None:
        return "waiting"
    if not source["connected"]:
        return "ended"
    return status if health["ok"] else "silent"


def _json(value: dict[str, Any], status: HTTPStatus = HTTPStatus.OK) -> _Reply:
    return _Reply(json.dumps(value).encode(), "application/json", status)


def _refusal(status: HTTPStatus, words: str) -> _Reply:
    headers = {"Allow": "GET, HEAD"} if status is HTTPStatus.METHOD_NOT_ALLOWED else {}
    return _Reply(f"{words}\n".encode(), status=status, headers=headers)


class _Server(ThreadingHTTPServer):
    """One thread per connection, up to a limit."""

    daemon_threads = True
    request_queue_size = MAX_CONNECTIONS  # new connections wait here, not for TCP to try again

    def __init__(self, host: str, port: int, site: _Site) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.site = site
        self.closing = threading.Event()
        self.viewers = threading.BoundedSemaphore(MAX_VIEWERS)
        self._connections: set[socket.socket] = set()
        self._waiting: dict[socket.socket, None] = {}  # those without a whole request, the oldest first
        super().__init__((host, port), _Handler)
        self.address = ipaddress.ip_address(str(self.server_address[0]))
        self._names = {"localhost", host.lower()}
        if not self.address.is_loopback:
            machine = socket.gethostname().lower()
            self._names |= {machine, f"{machine}.local"}

    def server_bind(self) -> None:
        # HTTPServer's method looks up this machine's name, which can take seconds and is not needed.
        TCPServer.server_bind(self)

    def is_named(self, host: str) -> bool:
        """Whether the Host header of a request means this server.

        Any page can have its own name lead to this address and then read what is served here; the browser takes it
        for the same site. The header still holds that name. The port may be another one: that of a tunnel.
        """
        match = re.fullmatch(r"(\[[^\[\]]+\]|[^\[\]:]+)(:\d{1,5})?", host.strip())
        if match is None:
            return False
        name = match[1].strip("[]").rstrip(".").lower()
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return name in self._names
        return address.is_loopback or not self.address.is_loopback

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether there is room. If not, the connection that has been silent for longest is closed."""
        if len(self._connections) < MAX_CONNECTIONS:
            return True
        for silent in list(self._waiting):
            if self.ends_waiting(silent):
                self._connections.discard(silent)
                with suppress(OSError):
                    silent.shutdown(socket.SHUT_RDWR)
                return True
        return False

    def waits(self, connection: socket.socket) -> None:
        """A connection begins to wait for a request."""
        self._waiting[connection] = None

    def ends_waiting(self, connection: socket.socket) -> bool:
        """Whether it was still waiting; only the first caller gets True."""
        try:
            del self._waiting[connection]
        except KeyError:
            return False
        return True

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        self.waits(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._waiting.pop(request, None)
        self._connections.discard(request)
        super().shutdown_request(request)

    def end(self) -> None:
        """Let go of the port and of the clients."""
        self.closing.set()
        self.server_close()
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    """The requests of one connection."""

    server: _Server
    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.0"  # where the request does not tell; replies to 0.9 have no status
    timeout = TIMEOUT_S  # of a write, and of a request from its first byte to its last
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.rfile.close()  # each request is read by its end, see below
        self._received = b""

    def handle(self) -> None:
        with suppress(OSError):  # clients may disconnect at any time
            super().handle()

    def handle_one_request(self) -> None:
        self.command, self.requestline, self.request_version = "", "", self.protocol_version
        self.close_connection = True
        header = self._read_header()
        if len(header) >= MAX_HEADER:
            return self.send_error(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        self.rfile = io.BytesIO(header)
        super().handle_one_request()

    def _read_header(self) -> bytes:
        """A request up to its empty line; at least `MAX_HEADER` bytes if it is too long; nothing at the end.

        The base class limits each line and each wait by itself, so that a client could go on for hours.
        """
        deadline = time.monotonic() + self.timeout
        self.server.waits(self.connection)
        while b"\r\n\r\n" not in self._received:
            if len(self._received) >= MAX_HEADER:
                return self._received
            self.connection.settimeout(max(deadline - time.monotonic(), 1e-3))
            received = self.connection.recv(4096)
            if not received:
                return b""
            self._received += received
        if not self.server.ends_waiting(self.connection):
            return b""
        self.connection.settimeout(self.timeout)
        header, end, self._received = self._received.partition(b"\r\n\r\n")
        return header + end

    def do_GET(self) -> None:
        # The body of a request is not read, and must not be taken for the next request.
        self.close_connection |= "Content-Length" in self.headers or "Transfer-Encoding" in self.headers
        path = self.path.partition("?")[0]
        hosts = self.headers.get_all("Host", [])
        page = self.server.site.pages.get(path)
        if len(hosts) != 1 or not self.server.is_named(hosts[0]):
            self._send(_refusal(HTTPStatus.FORBIDDEN, "This server does not have that name; open it by its address."))
        elif path == self.server.site.stream:
            self._stream()
        elif page is None:
            self._send(_refusal(HTTPStatus.NOT_FOUND, "There is nothing here."))
        else:
            self._send(page())

    def do_HEAD(self) -> None:
        self.do_GET()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """The refusals of the base class; it knows methods by the functions that there are."""
        unknown_method = code == HTTPStatus.NOT_IMPLEMENTED
        status = HTTPStatus.METHOD_NOT_ALLOWED if unknown_method else HTTPStatus(code)
        self.close_connection = True
        self._send(_refusal(status, status.phrase))

    def version_string(self) -> str:
        return "duallora-edge"

    def log_message(self, format: str, *args: Any) -> None:
        """Keep standard error free of requests."""

    def _send(self, reply: _Reply) -> None:
        tag = reply.headers.get("ETag")
        known = tag is not None and self.headers.get("If-None-Match") == tag
        self._send_head(
            HTTPStatus.NOT_MODIFIED if known else reply.status,
            {"Content-Type": reply.kind, "Content-Length": str(len(reply.body)), **reply.headers},
        )
        if self.command != "HEAD" and not known:
            self.wfile.write(reply.body)

    def _send_head(self, status: HTTPStatus, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**_HEADERS, **headers}.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    def _stream(self) -> None:
        viewers = self.server.viewers
        if self.server.site.jpeg() is None:
            return self._send(_refusal(HTTPStatus.SERVICE_UNAVAILABLE, "There is no picture yet."))
        if not viewers.acquire(blocking=False):
            return self._send(
                _refusal(HTTPStatus.SERVICE_UNAVAILABLE, f"There are {MAX_VIEWERS} viewers already; try later.")
            )
        try:
            self.close_connection = True
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _STREAM_BUFFER)
            self._send_head(HTTPStatus.OK, {"Content-Type": f"multipart/x-mixed-replace; boundary={_BOUNDARY}"})
            if self.command != "HEAD":
                self._send_pictures()
        finally:
            viewers.release()

    def _send_pictures(self) -> None:
        shown, sent = None, 0.0
        self.wfile.write(f"--{_BOUNDARY}\r\n".encode())
        while not self.server.closing.wait(1 / STREAM_RATE):
            latest = self.server.site.jpeg()
            if latest is None or (latest[0] is shown and time.monotonic() - sent < _REPEAT_S):
                continue
            shown, jpeg = latest
            header = f"Content-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n".encode()
            # A picture is shown when the boundary after it has come, so it comes with it.
            self.wfile.write(header + jpeg + f"\r\n--{_BOUNDARY}\r\n".encode())
            sent = time.monotonic()
