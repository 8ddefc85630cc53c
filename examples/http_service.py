"""An HTTP service that classifies the images it is sent. Needs the extra ``[serve]``.

    python http_service.py BUNDLE --port 8000
    curl -H 'Content-Type: image/jpeg' --data-binary @photo.jpg http://127.0.0.1:8000/classify

POST /classify takes the bytes of an image file and answers with JSON, errors too. GET /health is for a supervisor.
SIGHUP swaps in the bundle that is at the same path by then, without a pause; SIGTERM and Ctrl-C let the requests in
progress end.

Limits: the constants below. A few hundred slow clients at a time do no harm; more of them fill CONNECTIONS or the
file descriptors, and others get 503 until those are closed. There is no password and no encryption. For clients on
other machines put a proxy such as nginx before it.
"""

from __future__ import annotations

import argparse
import io
import ipaddress
import signal
import socket
import sys
import threading
import warnings
from typing import Any

import anyio
import h11
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from duallora_edge.errors import BackendError, DataError, DualLoraEdgeError, SwapError
from duallora_edge.runtime import Classifier, read_image

MAX_BYTES = 20 * 2**20  # of one image file
MAX_HELD = 200 * 2**20  # of all image files that have come in part or wait
MAX_PIXELS = 25_000_000  # which take 300 MB when they are decoded; a file of a few kB may hold more
MAX_WAITING = 32  # images; more get 503
MAX_HEAD = 16384  # bytes of a request before the image
CONNECTIONS = 512
BODY_S = 20.0  # for the whole of an image to arrive
IDLE_S = 5.0  # without a request, or a client that does not read; a connection is closed after one to two of these


class ImpatientProtocol(H11Protocol):
    """uvicorn's protocol, which by itself waits for ever for the end of a request's head or of a refused body."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.close_if_idle(since=False)

    def close_if_idle(self, since: object) -> None:
        idle = self.cycle is None or self.cycle.response_complete or self.flow.write_paused
        if idle and self.cycle is since:
            self.transport.abort()
        elif not self.transport.is_closing():
            self.loop.call_later(IDLE_S, self.close_if_idle, self.cycle if idle else False)

    def send_400_response(self, msg: str) -> None:
        if self.cycle is not None:
            self.cycle.disconnected = True  # this is the answer to a body that is wrong; another one must not follow
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:  # it was answered before the body went wrong
            self.transport.abort()

    def shutdown(self) -> None:
        super().shutdown()
        if self.cycle is not None and self.cycle.more_body:  # an image that is still arriving is not waited for
            self.transport.abort()


class Service:
    """The routes. ``workers`` images at a time are decoded and classified, in threads beside the event loop."""

    def __init__(self, classifier: Classifier, workers: int) -> None:
        self.classifier, self.turns, self.held = classifier, anyio.CapacityLimiter(workers), 0

    async def classify(self, request: Request) -> Response:
        kind = request.headers.get("content-type", "image/*").partition(";")[0].strip().lower()
        if not kind.startswith("image/") and kind != "application/octet-stream":
            raise HTTPException(415, f"Send the bytes of an image, not {kind}.")
        body = bytearray()
        try:
            with anyio.move_on_after(BODY_S) as time:
                async for part in request.stream():  # what the client says about the length does not count
                    body += part
                    self.held += len(part)
                    if len(body) > MAX_BYTES:
                        raise HTTPException(413, f"The image has more than {MAX_BYTES:,} bytes.")
                    if self.held > MAX_HELD:
                        raise HTTPException(503, "Too many images at once; send it again later.")
            if time.cancelled_caught:
                raise HTTPException(408, "The image took too long to arrive.")
            if self.turns.statistics().tasks_waiting >= MAX_WAITING:
                raise HTTPException(503, "Too many images at once; send it again later.")
            return JSONResponse(await anyio.to_thread.run_sync(self.answer, body, limiter=self.turns))
        finally:
            self.held -= len(body)

    def answer(self, body: bytearray) -> dict[str, Any]:
        return self.classifier(read_image(io.BytesIO(body))).to_json()

    async def health(self, request: Request) -> Response:
        health = self.classifier.health()
        return JSONResponse(health.to_json(), 503 if health.status == "failed" else 200)


async def refuse(request: Request, error: Exception) -> Response:
    """An error as JSON: that of a limit, of an image (400), or of the model (503)."""
    if isinstance(error, HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)
    return JSONResponse({"error": str(error)}, 503 if isinstance(error, BackendError) else 400)


def say(words: object) -> None:
    print(words, file=sys.stderr, flush=True)


def configure(service: Service) -> uvicorn.Config:
    routes = [Route("/classify", service.classify, methods=["POST"]), Route("/health", service.health)]
    errors = (HTTPException, DataError, BackendError, ClientDisconnect)
    app = Starlette(routes=routes, exception_handlers=dict.fromkeys(errors, refuse))
    return uvicorn.Config(
        app, http=ImpatientProtocol, ws="none", h11_max_incomplete_event_size=MAX_HEAD, limit_concurrency=CONNECTIONS,
        timeout_keep_alive=int(IDLE_S), log_level="error", server_header=False,
    )  # fmt: skip


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

    server = uvicorn.Server(configure(Service(classifier, workers)))
    signal.signal(signal.SIGHUP, lambda *_: threading.Thread(target=swap).start())
    for number in (signal.SIGINT, signal.SIGTERM):  # a signal that comes before the server runs ends it in order too
        signal.signal(number, server.handle_exit)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listener:
        address, port = listener.getsockname()[:2]
        say(f"{classifier.bundle} on {classifier.backend.name}: http://{host}:{port}/")
        if not ipaddress.ip_address(address).is_loopback:
            say("There is no password and no encryption: whoever reaches this address can use it.")
        server.run(sockets=[listener])


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
