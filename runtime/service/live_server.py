"""A page with the live picture and the answers of the model, and the same data for programs, over HTTP.

Anyone who can reach the address sees what the camera sees, so by default only this machine can. Clients get
copies of what the monitor knows at that moment, and the pipeline never waits for them. All they can change is what is
taught, if that is allowed.
"""

from __future__ import annotations

import hmac
import io
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from typing import Any

from PIL import Image

from duallora_edge.errors import DualLoraEdgeError
from duallora_edge.runtime.service.monitor import Monitor
from duallora_edge.runtime.service.pipeline import Answer
from duallora_edge.runtime.service.recorder import Recorder
from duallora_edge.runtime.service.web_server import Reply, Site, Stream, WebServer, json_reply, page_reply, refusal
from duallora_edge.runtime.sources.frame import Frame

PAGE = "live_page.html"
TOP = 5
MAX_SIDE = 960  # pixels of a picture
QUALITY = 80
STREAM_RATE = 15  # pictures per second
MAX_VIEWERS = 8  # of the stream
# The stream repeats a picture when there is no new one, to notice clients that have left.
_REPEAT_S = 2.0
_BOUNDARY = "picture"
_METRICS = "text/plain; version=0.0.4; charset=utf-8"


class LiveServer(WebServer):
    """Serves what a monitor knows, from threads of its own, until `close`.

    ``/`` is a page, ``/frame.jpg`` the latest picture, ``/stream.mjpg`` every new picture (of the first camera, or of
    ``?camera=NAME``), ``/state.json`` the latest answers and the health, ``/health`` the health with status 200 or 503,
    and ``/metrics`` is for Prometheus. With a ``recorder`` the page can teach, by ``POST /teach`` and ``POST /unteach``
    with a token that a page of this machine alone holds, and that others have to bring: see `teach_url`.
    """

    def __init__(
        self,
        monitor: Monitor,
        host: str = "127.0.0.1",
        port: int = 8080,
        pictures: bool = True,
        recorder: Recorder | None = None,
    ) -> None:
        """Listen at the address or name ``host``, on ``port`` (0: any that is free).

        Without ``pictures``, the page, the pictures and teaching are left out. Raises `ServerError` when the address or
        the port is not available.
        """
        site = _LiveSite(monitor, pictures, recorder)
        super().__init__(site, host, port)
        site.shows_token = self.is_local
        self._token = site.token

    @property
    def teach_url(self) -> str:
        """The address of the page that may teach."""
        return self.url if self.is_local else f"{self.url}#{self._token}"


class _LiveSite(Site):
    """The pages, and how each is made."""

    def __init__(self, monitor: Monitor, pictures: bool, recorder: Recorder | None) -> None:
        self._monitor = monitor
        self._recorder = recorder if pictures else None
        self.token, self.shows_token = secrets.token_urlsafe(16), False
        self._pages: dict[str, Callable[[str], Reply | Stream]] = {
            "/": self._page if pictures else self._index,
            "/state.json": self._state,
            "/health": self._health,
            "/metrics": lambda _: Reply(monitor.metrics().encode(errors="replace"), _METRICS),
        }
        if pictures:
            self._pages |= {"/frame.jpg": self._picture, "/stream.mjpg": self._stream}
        self._viewers = threading.BoundedSemaphore(MAX_VIEWERS)
        self._encoding = threading.Lock()  # guards what follows
        self._encoded: dict[str, tuple[Frame, bytes]] = {}

    def get(self, path: str, query: Mapping[str, str]) -> Reply | Stream | None:
        page, camera = self._pages.get(path), query.get("camera", self._monitor.cameras[0])
        return page(camera) if page and camera in self._monitor.cameras else None

    def post(self, path: str, token: str, body: dict[str, Any]) -> Reply | None:
        if self._recorder is None or path not in ("/teach", "/unteach"):
            return None
        if not hmac.compare_digest(token.encode(errors="replace"), self.token.encode()):
            return refusal(HTTPStatus.FORBIDDEN, "This page may not teach; open it by the address that 'run' prints.")
        name, seconds, cameras = body.get("name"), body.get("seconds", 5), self._monitor.cameras
        camera = body.get("camera", cameras[0])
        if not (isinstance(name, str) and type(seconds) in (int, float) and camera in cameras):
            return refusal(HTTPStatus.BAD_REQUEST, "A name, seconds and a camera are needed.")
        try:
            if path == "/unteach":
                self._recorder.forget(name)
                return json_reply({"forgot": name})
            return json_reply({"frames": self._recorder.record(name, seconds, camera)})
        except (DualLoraEdgeError, OSError) as error:
            return refusal(HTTPStatus.CONFLICT, str(error))

    def jpeg(self, camera: str) -> tuple[Frame, bytes] | None:
        """The latest frame of a camera and its picture, None before the first answer."""
        with self._encoding:
            answer = self._monitor.last(camera)
            if answer is None:
                return None
            known = self._encoded.get(camera)
            if known is None or answer.frame is not known[0]:
                known = self._encoded[camera] = answer.frame, _encode(answer.frame)
            return known

    def _page(self, _: str) -> Reply:
        can_teach = json.dumps(self._recorder is not None)
        return page_reply(PAGE, can_teach=can_teach, token=self.token if self.shows_token else "")

    def _index(self, _: str) -> Reply:
        paths = "".join(f"{path}\n" for path in self._pages if path != "/")
        return Reply(f"duallora-edge, without pictures\n\n{paths}".encode())

    def _picture(self, camera: str) -> Reply:
        latest = self.jpeg(camera)
        if latest is None:
            return refusal(HTTPStatus.SERVICE_UNAVAILABLE, "There is no picture yet.")
        frame, jpeg = latest
        return Reply(jpeg, "image/jpeg", headers={"ETag": f'"{frame.timestamp:.6f}"'})

    def _stream(self, camera: str) -> Reply | Stream:
        if self.jpeg(camera) is None:
            return refusal(HTTPStatus.SERVICE_UNAVAILABLE, "There is no picture yet.")
        if not self._viewers.acquire(blocking=False):
            return refusal(HTTPStatus.SERVICE_UNAVAILABLE, f"There are {MAX_VIEWERS} viewers already; try later.")
        return _Pictures(self, camera)

    def leave(self) -> None:
        """A viewer of the stream has left."""
        self._viewers.release()

    def _state(self, _: str) -> Reply:
        health = self._monitor.health()
        cameras = {}
        for name in self._monitor.cameras:
            answer = self._monitor.last(name)
            cameras[name] = {"state": _state(answer, health, name), "answer": answer and _answer(answer)}
        return json_reply({"cameras": cameras, "health": health})

    def _health(self, _: str) -> Reply:
        health = self._monitor.health()
        return json_reply(health, HTTPStatus.OK if health["ok"] else HTTPStatus.SERVICE_UNAVAILABLE)


class _Pictures:
    """Every new picture of a camera, for one viewer."""

    kind = f"multipart/x-mixed-replace; boundary={_BOUNDARY}"

    def __init__(self, site: _LiveSite, camera: str) -> None:
        self._site, self._camera = site, camera

    def parts(self, closing: threading.Event) -> Iterator[bytes]:
        shown, sent = None, 0.0
        yield f"--{_BOUNDARY}\r\n".encode()
        while not closing.wait(1 / STREAM_RATE):
            latest = self._site.jpeg(self._camera)
            if latest is None or (latest[0] is shown and time.monotonic() - sent < _REPEAT_S):
                continue
            shown, jpeg = latest
            header = f"Content-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n".encode()
            # A picture is shown when the boundary after it has come, so it comes with it.
            yield header + jpeg + f"\r\n--{_BOUNDARY}\r\n".encode()
            sent = time.monotonic()

    def close(self) -> None:
        self._site.leave()


def _encode(frame: Frame) -> bytes:
    image = Image.fromarray(frame.pixels)
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.BILINEAR)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def _answer(answer: Answer) -> dict[str, Any]:
    return {**answer.prediction.to_json(TOP), "age_ms": answer.age_ms, "sequence": answer.frame.sequence}


def _state(answer: Answer | None, health: dict[str, Any], name: str) -> str:
    """The state of a camera in one word."""
    camera, status = health["cameras"][name], str(health["classifier"]["status"])
    if status in ("failed", "loading"):
        return status
    if not camera["connected"] and camera["last_error"]:
        return "lost"
    if answer is None:
        return "waiting"
    if not camera["connected"]:
        return "ended"
    return "silent" if camera["silent"] else status
