"""A small web server for one person and a few programs: pages and data of a site, from threads of its own.

It trusts nobody: requests and their time are limited, only requests that name this server are answered (a page of
another site could have its own name lead here), and nothing is shown inside pages of others.
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
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from socketserver import TCPServer
from typing import Any, Protocol
from urllib.parse import parse_qsl

from duallora_edge.errors import DualLoraEdgeError
from duallora_edge.runtime.closing import Closing

MAX_CONNECTIONS = 64
MAX_HEADER = 16384  # bytes of a request
MAX_BODY = 65536
TIMEOUT_S = 10.0
_TEXT = "text/plain; charset=utf-8"
_JSON = "application/json"
# Small, because pictures that wait in the network are old when they arrive.
_STREAM_BUFFER = 128 * 1024
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",  # pages of other sites cannot embed the pictures
}
_POLICY = (
    "default-src 'none'; connect-src 'self'; img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'"
)


class ServerError(DualLoraEdgeError):
    """Nothing can be served at the address that was asked for."""


class Stream(Protocol):
    """A reply without an end: what is written until the client leaves or the server closes."""

    kind: str

    def parts(self, closing: threading.Event) -> Iterator[bytes]: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Reply:
    """The answer to one request."""

    body: bytes
    kind: str = _TEXT
    status: HTTPStatus = HTTPStatus.OK
    headers: Mapping[str, str] = field(default_factory=dict)


class Site:
    """What a server serves; called from several threads at once."""

    def get(self, path: str, query: Mapping[str, str]) -> Reply | Stream | None:
        """The reply for a path and what follows its question mark, None where there is nothing."""
        raise NotImplementedError

    def post(self, path: str, token: str, body: dict[str, Any]) -> Reply | None:
        """What becomes of a JSON object sent with a bearer ``token``; None where nothing is taken."""
        return None


def json_reply(value: Any, status: HTTPStatus = HTTPStatus.OK) -> Reply:
    return Reply(json.dumps(value).encode(), _JSON, status)


def refusal(status: HTTPStatus, words: str) -> Reply:
    headers = {"Allow": "GET, HEAD"} if status is HTTPStatus.METHOD_NOT_ALLOWED else {}
    return Reply(f"{words}\n".encode(), status=status, headers=headers)


def page_reply(name: str, **values: str) -> Reply:
    """A page of this folder that runs and loads nothing but its own; ``{nonce}`` and the names of ``values`` in it are
    replaced.
    """
    nonce = secrets.token_urlsafe(16)
    document = files(__package__).joinpath(name).read_text(encoding="utf-8")
    for key, value in {"nonce": nonce, **values}.items():
        document = document.replace(f"{{{key}}}", value)
    headers = {"Content-Security-Policy": _POLICY.format(nonce=nonce)}
    return Reply(document.encode(), "text/html; charset=utf-8", headers=headers)


class WebServer(Closing):
    """Serves a site until `close`."""

    def __init__(self, site: Site, host: str, port: int) -> None:
        """Listen at the address or name ``host``, on ``port`` (0: any that is free).

        Raises `ServerError` when the address or the port is not available.
        """
        if not 0 <= port <= 65535:
            raise ValueError(f"port must be from 0 to 65535, not {port}")
        try:
            self._server = _Server(host, port, site)
        except (OSError, UnicodeError) as error:
            raise _explained(error, host, port) from error
        # The interval in seconds at which it checks for the end is how long `close` takes.
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="duallora-edge server", daemon=True
        )
        self._thread.start()

    @property
    def url(self) -> str:
        """The address of the site; with the name of this machine if all its addresses are served."""
        address, port = self._server.address, self._server.server_address[1]
        name = f"[{address}]" if address.version == 6 else str(address)
        return f"http://{socket.gethostname() if address.is_unspecified else name}:{port}/"

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        return self._server.address.is_loopback

    def close(self) -> None:
        """Stop at once and disconnect clients. Does nothing the second time."""
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


class _Server(ThreadingHTTPServer):
    """One thread per connection, up to a limit."""

    daemon_threads = True
    request_queue_size = MAX_CONNECTIONS  # new connections wait here, not for TCP to try again

    def __init__(self, host: str, port: int, site: Site) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.site = site
        self.closing = threading.Event()
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
        if not self._is_named():
            return
        path, _, query = self.path.partition("?")
        reply = self.server.site.get(path, dict(parse_qsl(query, keep_blank_values=True, errors="replace")))
        if reply is None:
            self._send(refusal(HTTPStatus.NOT_FOUND, "There is nothing here."))
        elif isinstance(reply, Reply):
            self._send(reply)
        else:
            self._stream(reply)

    def do_POST(self) -> None:
        self.close_connection = True
        if not self._is_named():
            return
        if self.headers.get_content_type() != _JSON or "Transfer-Encoding" in self.headers:
            return self._send(refusal(HTTPStatus.METHOD_NOT_ALLOWED, "Method Not Allowed"))
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal() and int(length) <= MAX_BODY):
            return self._send(refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "Content Too Large"))
        try:
            body = json.loads(self._read_body(int(length)))
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict):
            return self._send(refusal(HTTPStatus.BAD_REQUEST, "This is not a JSON object."))
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        reply = self.server.site.post(self.path.partition("?")[0], token, body)
        self._send(reply or refusal(HTTPStatus.METHOD_NOT_ALLOWED, "Method Not Allowed"))

    def _is_named(self) -> bool:
        """Whether the request means this server; if not, that is said."""
        hosts = self.headers.get_all("Host", [])
        if len(hosts) == 1 and self.server.is_named(hosts[0]):
            return True
        self._send(refusal(HTTPStatus.FORBIDDEN, "This server does not have that name; open it by its address."))
        return False

    def _read_body(self, length: int) -> bytes:
        deadline = time.monotonic() + self.timeout
        while len(self._received) < length:
            self.connection.settimeout(max(deadline - time.monotonic(), 1e-3))
            received = self.connection.recv(4096)
            if not received:
                raise ConnectionError("The client left.")
            self._received += received
        self.connection.settimeout(self.timeout)
        return self._received[:length]

    def do_HEAD(self) -> None:
        self.do_GET()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """The refusals of the base class; it knows methods by the functions that there are."""
        unknown_method = code == HTTPStatus.NOT_IMPLEMENTED
        status = HTTPStatus.METHOD_NOT_ALLOWED if unknown_method else HTTPStatus(code)
        self.close_connection = True
        self._send(refusal(status, status.phrase))

    def version_string(self) -> str:
        return "duallora-edge"

    def log_message(self, format: str, *args: Any) -> None:
        """Keep standard error free of requests."""

    def _send(self, reply: Reply) -> None:
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

    def _stream(self, stream: Stream) -> None:
        with closing(stream):
            self.close_connection = True
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _STREAM_BUFFER)
            self._send_head(HTTPStatus.OK, {"Content-Type": stream.kind})
            if self.command != "HEAD":
                for part in stream.parts(self.server.closing):
                    self.wfile.write(part)
