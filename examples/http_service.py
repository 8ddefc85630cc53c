"""An HTTP service that classifies the images it is sent.

    python http_service.py BUNDLE --port 8000
    curl -H 'Content-Type: image/jpeg' --data-binary @photo.jpg http://127.0.0.1:8000/classify

POST /classify takes the bytes of an image file and answers with JSON, errors too. GET /health is for a supervisor,
GET /metrics for Prometheus. SIGHUP swaps in the bundle that is at the same path by then, without a pause; SIGTERM and
Ctrl-C let the requests in progress end. It serves this machine alone and knows neither passwords nor encryption: for
others put a proxy such as nginx before it, which also keeps slow clients away.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import signal
import socket
import sys
import threading
import time
import warnings
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

from duallora_edge.errors import BackendError, DataError, DualLoraEdgeError, SwapError
from duallora_edge.runtime import Classifier, read_image
from duallora_edge.runtime.metrics import counter, info

MAX_BYTES = 20 * 2**20
MAX_PIXELS = 25_000_000  # which take 300 MB when they are decoded; a file of a few kB may hold more
MAX_CONNECTIONS = 16  # each may hold an image
BODY_S = 30.0  # for the whole of an image to arrive
QUEUE_S = 10.0  # how long a request waits for its turn
LINGER_S = 1.0


class Service(ThreadingHTTPServer):
    """A thread per connection; ``workers`` of them at a time decode an image and run the model."""

    daemon_threads = False  # `server_close` waits for them
    request_queue_size = MAX_CONNECTIONS

    def __init__(self, address: tuple[str, int], classifier: Classifier, workers: int) -> None:
        self.classifier = classifier
        self.turns = threading.BoundedSemaphore(workers)
        self._connections: set[Any] = set()
        super().__init__(address, Handler)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        return len(self._connections) < MAX_CONNECTIONS

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # clients may leave when they like
            super().handle_error(request, client_address)

    def server_close(self) -> None:
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RD)  # nothing more is asked; what was asked is answered
        super().server_close()


class RefusedError(Exception):
    """A request that gets no answer, with the reason."""

    def __init__(self, status: HTTPStatus, words: str) -> None:
        super().__init__(words)
        self.status = status


class Handler(BaseHTTPRequestHandler):
    """The requests of one connection."""

    server: Service
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "duallora-edge", ""
    timeout = 10.0  # without a byte from the client, or to it
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        try:
            if self.path != "/classify":
                raise RefusedError(HTTPStatus.NOT_FOUND, "There is only POST /classify, GET /health and GET /metrics.")
            self._send_json(HTTPStatus.OK, self._classify(self._body()))
        except RefusedError as refusal:
            self._refuse(refusal.status, str(refusal))

    def do_GET(self) -> None:
        self.close_connection = True
        health = self.server.classifier.health()
        if self.path == "/health":
            failed = health.status == "failed"
            self._send_json(HTTPStatus.SERVICE_UNAVAILABLE if failed else HTTPStatus.OK, health.to_json())
        elif self.path == "/metrics":
            lines = (
                info("bundle_info", "The bundle that answers.", {"bundle": health.bundle, "backend": health.backend}),
                counter("answers_total", "Images answered.", health.answers),
                counter("failures_total", "Runs of the model that failed.", health.failures),
            )
            self._send(HTTPStatus.OK, "".join(lines).encode(), "text/plain; version=0.0.4; charset=utf-8")
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "There is only POST /classify, GET /health and GET /metrics.")

    def _body(self) -> io.BytesIO:
        """What was sent, if it may be an image. Raises `RefusedError`."""
        lengths = self.headers.get_all("Content-Length", [])
        if not lengths or "Transfer-Encoding" in self.headers:
            raise RefusedError(HTTPStatus.LENGTH_REQUIRED, "Send the image with a Content-Length, not in chunks.")
        if len(lengths) > 1 or not re.fullmatch("[0-9]{1,18}", lengths[0]):
            raise RefusedError(HTTPStatus.BAD_REQUEST, "The Content-Length is no number of bytes.")
        length = int(lengths[0])
        if length > MAX_BYTES:
            raise RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"{length:,} bytes are more than {MAX_BYTES:,}.")
        kind = self.headers.get_content_type() if "Content-Type" in self.headers else "image/*"
        if not kind.startswith("image/") and kind != "application/octet-stream":
            raise RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"Send the bytes of an image, not {kind}.")
        body, deadline = io.BytesIO(), time.monotonic() + BODY_S
        while body.tell() < length:
            try:
                part = self.rfile.read1(min(length - body.tell(), 2**16))
            except TimeoutError:
                deadline = 0.0
            if time.monotonic() > deadline:
                raise RefusedError(HTTPStatus.REQUEST_TIMEOUT, "The image took too long to arrive.")
            if not part:
                raise RefusedError(HTTPStatus.BAD_REQUEST, f"Only {body.tell():,} of {length:,} bytes came.")
            body.write(part)
        body.seek(0)
        return body

    def _classify(self, body: io.BytesIO) -> dict[str, Any]:
        if not self.server.turns.acquire(timeout=QUEUE_S):
            raise RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, "Too many images at once; send it again later.")
        try:
            return self.server.classifier(read_image(body)).to_json()
        except DataError as error:
            raise RefusedError(HTTPStatus.BAD_REQUEST, str(error)) from error
        except BackendError as error:
            raise RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, str(error)) from error
        finally:
            self.server.turns.release()

    def _refuse(self, status: HTTPStatus, words: str) -> None:
        self.close_connection = True  # what follows may be the rest of an image
        self._send_json(status, {"error": words})
        # A connection that is closed before everything was read is reset, and the client would not see the answer.
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(LINGER_S)
            deadline = time.monotonic() + LINGER_S
            while self.connection.recv(2**16) and time.monotonic() < deadline:
                pass

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class refuses: requests that are no HTTP, and methods that are not here."""
        self._refuse(HTTPStatus(code), message or HTTPStatus(code).phrase)

    def _send_json(self, status: HTTPStatus, value: dict[str, Any]) -> None:
        self._send(status, json.dumps(value).encode() + b"\n", "application/json")

    def _send(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)


def say(words: object) -> None:
    print(words, file=sys.stderr, flush=True)


def run(bundle: str, host: str, port: int, workers: int) -> None:
    """Serve until a signal comes."""
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    classifier = Classifier.load(bundle)

    def swap() -> None:
        try:
            say(f"swapped to {classifier.swap(bundle).new}")
        except SwapError as error:  # the old one goes on
            say(error)

    with Service((host, port), classifier, workers) as service:
        # In threads: a handler runs inside the loop that accepts connections, which must not wait for it.
        signal.signal(signal.SIGHUP, lambda *_: threading.Thread(target=swap).start())
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: threading.Thread(target=service.shutdown).start())
        say(f"{classifier.bundle} on {classifier.backend.name}: http://{host}:{service.server_port}/")
        service.serve_forever(poll_interval=0.1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--workers", type=int, default=2, help="images that are decoded and classified at once")
    arguments = parser.parse_args()
    try:
        run(arguments.bundle, arguments.host, arguments.port, arguments.workers)
    except (DualLoraEdgeError, OSError) as error:  # OSError: the port is in use
        sys.exit(str(error))
