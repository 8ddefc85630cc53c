"""What is served is what the monitor knows, to those who may see it, and nobody who looks slows the pipeline."""

from __future__ import annotations

import http.client
import io
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from duallora_edge.errors import DataError, DualLoraEdgeError
from duallora_edge.files import read_json, write_json
from duallora_edge.runtime import Classifier, Prediction
from duallora_edge.runtime.bundle import MANIFEST
from duallora_edge.runtime.prediction import Timings
from duallora_edge.runtime.service import live_server, web_server
from duallora_edge.runtime.service.live_server import LiveServer
from duallora_edge.runtime.service.monitor import Monitor
from duallora_edge.runtime.service.pipeline import Answer, Pipeline
from duallora_edge.runtime.service.web_server import ServerError
from duallora_edge.runtime.sources import Frame, open_source

WAIT_S = 10.0
SCRIPT = "<script>document.title = 'taken'</script>"


class Known:
    """A monitor that knows what it is told, of as many cameras as are named."""

    def __init__(self, last: Answer | None = None, *cameras: str, **classifier: Any) -> None:
        self.cameras = cameras or ("1",)
        self.answer = last
        self.ok, self.source = True, {"connected": True, "last_error": None, "silent": False}
        self.facts = {"description": "a", "rate": 1.0, "age_ms": {"p50": None}, "dropped": 0, "idle_s": 0.0}
        self.classifier = {"status": "ok", **classifier}

    def last(self, camera: str) -> Answer | None:
        return self.answer

    def health(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "cameras": dict.fromkeys(self.cameras, self.facts | self.source),
            "classifier": self.classifier,
        }

    def metrics(self) -> str:
        return 'bundle{name="\ud800"} 1\n'


def answer_to(pixels: np.ndarray, sequence: int = 0) -> Answer:
    values = np.array([0.75, 0.25], np.float32)
    prediction = Prediction(
        SCRIPT, 0.75, "t", 1.0, 0.0, None, Timings(0, 0, 0), "b", 2, values, (SCRIPT, "\N{CJK UNIFIED IDEOGRAPH-99AC}")
    )
    return Answer(Frame(pixels, sequence, float(sequence), float(sequence)), prediction, prediction, 12.5)


def noise(sequence: int) -> Answer:
    pixels = np.random.default_rng(sequence).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    return answer_to(pixels, sequence)


@pytest.fixture
def known() -> Known:
    return Known(answer_to(np.full((30, 40, 3), 200, np.uint8)))


@pytest.fixture
def server(known: Known) -> Iterator[LiveServer]:
    with LiveServer(known, port=0) as server:
        yield server


@pytest.fixture(scope="module")
def servers() -> Iterator[list[LiveServer]]:
    """One of this machine alone, and one of all its addresses."""
    with LiveServer(Known(), port=0) as here, LiveServer(Known(), "0.0.0.0", 0) as everywhere:
        yield [here, everywhere]


@contextmanager
def watched(bundle: Path) -> Iterator[Monitor]:
    """A monitor of a camera that sees red."""
    red = np.full((24, 36, 3), (250, 5, 5), np.uint8)
    with Pipeline(open_source([red], live=True, rate=30, loop=True), Classifier.load(bundle, "cpu", 1)) as pipeline:
        monitor = Monitor(pipeline)
        thread = threading.Thread(target=lambda: [monitor.add(answer) for answer in pipeline], daemon=True)
        thread.start()
        wait_for(lambda: monitor.last("1") is not None)
        yield monitor
    thread.join()


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def port_of(server: LiveServer) -> int:
    return int(server.url.rsplit(":", 1)[1].strip("/"))


def ask(
    server: LiveServer, path: str, method: str = "GET", **headers: str
) -> tuple[int, http.client.HTTPMessage, bytes]:
    with closing(http.client.HTTPConnection("127.0.0.1", port_of(server), timeout=WAIT_S)) as connection:
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return response.status, response.headers, response.read()


def connect(server: LiveServer, request: str, buffer: int | None = None) -> socket.socket:
    client = socket.socket()
    client.settimeout(WAIT_S)
    if buffer is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    client.connect(("127.0.0.1", port_of(server)))
    client.sendall(request.replace("\n", "\r\n").encode())
    return client


def watch(server: LiveServer, buffer: int | None = None) -> tuple[int, socket.socket]:
    """Ask for the stream: the status, and the connection with everything after."""
    client = connect(server, "GET /stream.mjpg HTTP/1.1\nHost: localhost\n\n", buffer)
    return int(client.recv(64).split()[1]), client


@pytest.mark.parametrize("pictures", [True, False])
@pytest.mark.parametrize("started", [True, False])
@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/state.json", "application/json"),
        ("/health?x=1", "application/json"),
        ("/metrics", "text/plain; version=0.0.4; charset=utf-8"),
        ("/frame.jpg", "image/jpeg"),
    ],
)
def test_what_there_is(known: Known, path: str, kind: str, started: bool, pictures: bool) -> None:
    known.answer = known.answer if started else None
    with LiveServer(known, port=0, pictures=pictures) as server:
        status, headers, body = ask(server, path)
        assert ask(server, path, "HEAD")[::2] == (status, b"")
        assert pictures or ask(server, "/stream.mjpg")[0] == 404
    expected = 200
    if path == "/frame.jpg" and not (pictures and started):
        expected = 503 if pictures else 404
    if expected != 200 or (path == "/" and not pictures):
        kind = "text/plain; charset=utf-8"
    assert (status, headers["Content-Type"]) == (expected, kind)
    assert headers["Cache-Control"] == "no-store" and headers["X-Content-Type-Options"] == "nosniff"
    assert not [name for name in headers if name.startswith("Access-Control")]
    assert len(body) == int(headers["Content-Length"])


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        *((method, "/", 405) for method in ("POST", "PUT", "DELETE", "OPTIONS", "TRACE", "BREW")),
        *(("GET", path, 404) for path in ("/live_page.html", "/../pyproject.toml", "//etc/passwd", "/..%2f", "x", "*")),
    ],
)
def test_what_there_is_not(server: LiveServer, method: str, path: str, status: int) -> None:
    found, headers, body = ask(server, path, method)
    assert found == status and headers.get("Allow") == ("GET, HEAD" if status == 405 else None)
    assert len(body) < 100


@pytest.mark.parametrize(
    ("host", "at_home", "elsewhere"),
    [
        ("localhost", True, True),
        ("LOCALHOST.:9000", True, True),
        ("127.0.0.1:80", True, True),
        ("[::1]:8080", True, True),
        ("192.168.0.7:8080", False, True),
        ("[fd00::7]", False, True),
        (socket.gethostname(), socket.gethostname() == "localhost", True),
        (f"{socket.gethostname()}.local", False, True),
        ("evil.example", False, False),
        ("127.0.0.1.evil.example", False, False),
        ("localhost@evil.example", False, False),
        ("evil.example:80:localhost", False, False),
        ("", False, False),
    ],
)
def test_only_its_own_names(servers: list[LiveServer], host: str, at_home: bool, elsewhere: bool) -> None:
    for server, allowed in zip(servers, (at_home, elsewhere), strict=True):
        assert ask(server, "/state.json", Host=host)[0] == (200 if allowed else 403)


def test_what_a_bundle_says(shared_bundle: Path) -> None:
    with watched(shared_bundle) as monitor, LiveServer(monitor, port=0) as server:
        state = json.loads(ask(server, "/state.json")[2])
        assert state["cameras"]["1"]["state"] == "ok" and state["health"]["ok"] and state["health"]["answers"] > 0
        answer = state["cameras"]["1"]["answer"]
        assert (answer["label"], answer["task"], answer["bundle"], answer["bundle_version"]) == (
            "red",
            "warm",
            "colours",
            3,
        )
        assert answer["top"][0]["label"] == "red" and len(answer["top"]) == 4
        assert answer["is_novel"] is False and answer["age_ms"] > 0 and answer["sequence"] >= 0
        assert json.loads(ask(server, "/health")[2]).keys() == state["health"].keys()
        assert b"duallora_edge_answers_total" in ask(server, "/metrics")[2]
        picture = Image.open(io.BytesIO(ask(server, "/frame.jpg")[2]))
        assert picture.size == (36, 24) and np.allclose(np.asarray(picture).mean((0, 1)), (250, 5, 5), atol=4)


@pytest.mark.parametrize(
    ("word", "change"),
    [
        ("ok", {}),
        ("probation", {"classifier": {"status": "probation"}}),
        ("loading", {"classifier": {"status": "loading"}, "answer": None}),
        ("failed", {"classifier": {"status": "failed"}, "ok": False}),
        ("waiting", {"answer": None}),
        ("waiting", {"answer": None, "source": {"connected": False, "last_error": None, "silent": False}}),
        ("lost", {"answer": None, "source": {"connected": False, "last_error": "unplugged", "silent": True}}),
        ("lost", {"source": {"connected": False, "last_error": "unplugged", "silent": True}, "ok": False}),
        ("ok", {"source": {"connected": True, "last_error": "unplugged", "silent": False}}),
        ("ended", {"source": {"connected": False, "last_error": None, "silent": False}}),
        ("silent", {"source": {"connected": True, "last_error": None, "silent": True}, "ok": False}),
    ],
)
def test_states(known: Known, server: LiveServer, word: str, change: dict[str, Any]) -> None:
    vars(known).update(change)
    assert json.loads(ask(server, "/state.json")[2])["cameras"]["1"]["state"] == word
    assert ask(server, "/health")[0] == (200 if known.ok else 503)
    assert f'{word}: "' in ask(server, "/")[2].decode()  # there are words for it


@pytest.mark.parametrize(
    ("size", "expected"),
    [((640, 480), (640, 480)), ((1920, 1080), (960, 540)), ((1080, 1920), (540, 960)), ((4000, 1), (960, 1))],
)
def test_pictures_are_scaled(
    known: Known, server: LiveServer, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    known.answer = answer_to(np.zeros((size[1], size[0], 3), np.uint8))
    assert Image.open(io.BytesIO(ask(server, "/frame.jpg")[2])).size == expected


def test_a_picture_is_encoded_once_and_only_when_asked_for(
    known: Known, server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    encode = live_server._encode
    monkeypatch.setattr(live_server, "_encode", lambda frame: encoded.append(frame.sequence) or encode(frame))
    known.answer = noise(1)
    ask(server, "/state.json")
    known.answer = noise(2)
    clients = [threading.Thread(target=ask, args=(server, "/frame.jpg")) for _ in range(8)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert encoded == [2]
    _, headers, _ = ask(server, "/frame.jpg")
    status, _, body = ask(server, "/frame.jpg", If_None_Match=headers["ETag"])
    assert (status, body) == (304, b"")
    known.answer = noise(3)
    assert ask(server, "/frame.jpg", If_None_Match=headers["ETag"])[0] == 200 and encoded == [2, 3]


def test_the_stream(known: Known, server: LiveServer) -> None:
    with closing(http.client.HTTPConnection("127.0.0.1", port_of(server), timeout=WAIT_S)) as connection:
        connection.request("GET", "/stream.mjpg")
        response = connection.getresponse()
        assert response.headers["Content-Type"] == "multipart/x-mixed-replace; boundary=picture"
        assert response.readline() == b"--picture\r\n"
        for sequence in range(1, 4):
            known.answer = answer_to(np.full((10, 10 * sequence, 3), 9, np.uint8), sequence)
            while True:
                assert response.readline() == b"Content-Type: image/jpeg\r\n"
                length = int(response.readline().split()[1])
                assert response.readline() == b"\r\n"
                image = Image.open(io.BytesIO(response.read(length)))
                assert response.readline() + response.readline() == b"\r\n--picture\r\n"
                if image.size == (10 * sequence, 10):
                    break
    assert ask(server, "/stream.mjpg", "HEAD")[0] == 200
    known.answer = None
    assert ask(server, "/stream.mjpg")[0] == 503


def test_so_many_viewers_and_no_more(known: Known, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_server, "MAX_VIEWERS", 2)
    monkeypatch.setattr(live_server, "_REPEAT_S", 0.05)
    with LiveServer(known, port=0) as server:
        (first, one), (second, two), (third, three) = (watch(server) for _ in range(3))
        assert (first, second, third) == (200, 200, 503)
        received = b""
        while received.count(b"--picture\r\n") < 2:
            received += one.recv(4096)
        one.close()  # noticed, though there is no new picture

        def admitted() -> bool:
            status, client = watch(server)
            client.close()
            return status == 200

        wait_for(admitted)
        two.close()
        three.close()


def test_a_viewer_who_does_not_read_is_dropped(known: Known, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_server._Handler, "timeout", 0.3)
    monkeypatch.setattr(live_server, "STREAM_RATE", 200)
    with LiveServer(known, port=0) as server:
        _, client = watch(server, buffer=4096)
        sequence = 0

        def gone() -> bool:
            nonlocal sequence
            sequence += 1
            known.answer = noise(sequence)
            return not server._server._connections

        wait_for(gone)
        client.close()


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ("GET / HTTP/1.1\nHost: localhost\n", None),
        ("", None),
        ("GET / HTTP/1.1\nHost: localhost\nX: " + "x" * 20000, 431),
        ("GET /" + "x" * 20000, 431),
        ("GET / HTTP/1.1\n" + "X: x\n" * 200 + "\n", 431),
        ("GET / HTTP/1.1\n\n", 403),
        ("GET / HTTP/1.1\nHost: localhost\nHost: evil.example\n\n", 403),
        ("GET / HTTP/3.0\nHost: localhost\n\n", 505),
        ("hello\n\n", 400),
        ("\x16\x03\x01\n\n", 400),
    ],
)
def test_requests_that_never_end_or_make_no_sense(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch, request_: str, status: int | None
) -> None:
    monkeypatch.setattr(web_server._Handler, "timeout", 0.2)
    with closing(connect(server, request_)) as client:
        received = b""
        with suppress(ConnectionResetError):  # the rest of the request was not read
            while chunk := client.recv(4096):
                received += chunk
    assert received == b"" if status is None else received.startswith(f"HTTP/1.1 {status} ".encode())


def test_requests_one_after_the_other(server: LiveServer) -> None:
    one = "GET /health HTTP/1.1\nHost: localhost\n\n"
    with closing(connect(server, one * 2 + one.replace("\n\n", "\nConnection: close\n\n"))) as client:
        received = b"".join(iter(lambda: client.recv(4096), b""))
    assert received.count(b"HTTP/1.1 200 OK") == 3
    with closing(connect(server, one.replace("\n\n", f"\nContent-Length: {len(one)}\n\n") + one)) as client:
        assert b"".join(iter(lambda: client.recv(4096), b"")).count(b"HTTP/1.1") == 1


def test_slow_clients_make_room_for_others(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_server, "MAX_CONNECTIONS", 4)
    slow = [connect(server, "GET /health HTTP/1.1\nX: ") for _ in range(12)]
    assert [ask(server, "/health")[0] for _ in range(3)] == [200] * 3
    assert slow[0].recv(1) == b""  # it had waited for longest
    for client in slow:
        client.close()
    wait_for(lambda: not server._server._connections and not server._server._waiting)


def test_so_many_connections_and_no_more(known: Known, server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_server, "MAX_CONNECTIONS", 2)
    clients = [watch(server)[1] for _ in range(2)]  # these do not wait for anything
    with closing(connect(server, "")) as refused:
        assert refused.recv(1) == b""
    for client in clients:
        client.close()
    known.answer = noise(1)  # sending it, the server finds out
    wait_for(lambda: not server._server._connections)
    assert ask(server, "/health")[0] == 200


@pytest.mark.parametrize(
    ("host", "port", "message"),
    [
        ("127.0.0.1", None, r"Port \d+ of 127\.0\.0\.1 is in use; choose another one with --listen\."),
        ("192.0.2.1", 0, r"'192\.0\.2\.1' is not an address of this machine .*; choose one with --listen\."),
        ("no such host", 0, "'no such host' is not an address of this machine .* --listen"),
        ("x" * 70, 0, "is not an address of this machine .* --listen"),
    ],
)
def test_where_nothing_can_be_served(
    known: Known, server: LiveServer, host: str, port: int | None, message: str
) -> None:
    with pytest.raises(ServerError, match=message) as raised:
        LiveServer(known, host, port_of(server) if port is None else port)
    assert isinstance(raised.value, DualLoraEdgeError)
    for wrong in (-1, 65536):
        with pytest.raises(ValueError, match="port must be"):
            LiveServer(known, host, wrong)


def test_the_end_with_clients_connected(known: Known, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_server._Handler, "timeout", 100.0)
    server = LiveServer(known, port=0)
    port = port_of(server)
    (_, watching), silent = watch(server), connect(server, "GET")
    wait_for(lambda: len(server._server._connections) == 2)
    server.close()
    server.close()
    for client in (watching, silent):
        with suppress(ConnectionResetError), client:
            while client.recv(65536):
                pass
    with LiveServer(known, port=port) as again:  # the port is free at once
        assert again.url == f"http://127.0.0.1:{port}/" and ask(again, "/health")[0] == 200


@pytest.mark.parametrize(("host", "name"), [("0.0.0.0", socket.gethostname()), ("::1", "[::1]")])
def test_the_address(known: Known, host: str, name: str) -> None:
    if host == "::1" and not Path("/proc/net/if_inet6").is_file():
        pytest.skip("this machine has no IPv6")
    with LiveServer(known, host, 0) as server:
        assert re.fullmatch(rf"http://{re.escape(name)}:\d+/", server.url)


def test_the_page_runs_nothing_but_its_own(server: LiveServer) -> None:
    nonces = set()
    for _ in range(2):
        _, headers, body = ask(server, "/")
        policy, page = headers["Content-Security-Policy"], body.decode()
        (nonce,) = set(re.findall(r"'nonce-([\w-]+)'", policy))
        nonces.add(nonce)
        assert page.count(f'nonce="{nonce}"') == 2 == len(re.findall("<(?:script|style)", page))
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert not re.search(r"https?:|innerHTML|insertAdjacent| on\w+=| style=", page)
    assert len(nonces) == 2


class Hand:
    """A recorder that notes what it is told."""

    def __init__(self) -> None:
        self.taught: list[str] = []

    def record(self, name: str, seconds: float, camera: str) -> int:
        if name == "bad":
            raise DataError("There is no such thing.")
        self.taught.append(f"{name} {seconds:g}" + (f" {camera}" if camera != "1" else ""))
        return 20

    def forget(self, name: str) -> None:
        self.taught.remove(f"{name} 5")


def post(server: LiveServer, path: str, content: Any, token: str) -> tuple[int, bytes]:
    with closing(http.client.HTTPConnection("127.0.0.1", port_of(server), timeout=WAIT_S)) as connection:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
        connection.request("POST", path, json.dumps(content), headers)
        response = connection.getresponse()
        return response.status, response.read()


def token_of(server: LiveServer) -> str:
    """What the page of this machine holds."""
    return re.findall(r'TOKEN = "([\w-]*)"', ask(server, "/")[2].decode())[0]


def test_the_page_of_this_machine_may_teach(known: Known) -> None:
    hand = Hand()
    with LiveServer(known, port=0, recorder=hand) as server:
        token = token_of(server)
        assert server.teach_url == server.url and len(token) > 20
        assert post(server, "/teach", {"name": "mug"}, token) == (200, b'{"frames": 20}')
        assert post(server, "/teach", {"name": "hat", "seconds": 2.5}, token)[0] == 200
        assert post(server, "/unteach", {"name": "mug"}, token)[0] == 200
        assert post(server, "/teach", {"name": "bad"}, token) == (409, b"There is no such thing.\n")
        for wrong in (
            {},
            {"name": 1},
            {"name": "x", "seconds": "5"},
            {"name": "x", "seconds": True},
            {"name": "x", "camera": "2"},
        ):
            assert post(server, "/teach", wrong, token)[0] == 400
        for guess in ("", "x" * len(token), token[:-1], token + "x", "\N{LATIN SMALL LETTER U WITH DIAERESIS}"):
            assert post(server, "/teach", {"name": "mug"}, guess)[0] == 403
        assert post(server, "/state.json", {"name": "mug"}, token)[0] == 405
    assert hand.taught == ["hat 2.5"]


def test_a_page_of_all_addresses_has_to_bring_its_token(known: Known) -> None:
    hand = Hand()
    with LiveServer(known, "0.0.0.0", 0, recorder=hand) as server:
        assert token_of(server) == ""
        url, _, token = server.teach_url.partition("#")
        assert url == server.url and len(token) > 20
        assert post(server, "/teach", {"name": "mug"}, "")[0] == 403 and hand.taught == []
        assert post(server, "/teach", {"name": "mug"}, token)[0] == 200 and hand.taught == ["mug 5"]


@pytest.mark.parametrize("pictures", [True, False])
def test_without_a_page_or_a_folder_nothing_is_taught(known: Known, pictures: bool) -> None:
    with LiveServer(known, port=0, pictures=pictures, recorder=None if pictures else Hand()) as server:
        assert post(server, "/teach", {"name": "mug"}, "x")[0] == 405


def test_the_page_in_a_browser(browser: Any, bundle: Path) -> None:
    document = read_json(bundle / MANIFEST)
    document["classes"][0], document["tasks"][0]["name"] = SCRIPT, "<i>warm</i>"
    write_json(bundle / MANIFEST, document)
    hand = Hand()
    with watched(bundle) as monitor, LiveServer(monitor, port=0, recorder=hand) as server:
        page = browser.new_page()
        problems: list[str] = []
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(server.url)
        page.locator("#state").get_by_text("running").wait_for()
        wait_for(lambda: page.evaluate("[...document.images].every((image) => image.naturalWidth > 0)"))
        assert page.inner_text("#label") == SCRIPT and page.title() == "duallora-edge live"
        assert "<i>warm</i>" in page.inner_text("#task")
        rows = page.locator("#top li").all_inner_texts()
        assert len(rows) == 4 and rows[0].startswith(SCRIPT) and all(row.endswith("%") for row in rows)
        page.fill("#name", " mug ")
        page.keyboard.press("Enter")
        page.get_by_text("mug\u2069 has 20 frames").wait_for()
        assert hand.taught == ["mug 5"]
        page.click("text=Forget it")
        page.get_by_text("mug\u2069 is forgotten").wait_for()
        page.fill("#name", "bad")
        page.click("text=Teach 5 seconds")
        page.get_by_text("There is no such thing.").wait_for()
        assert hand.taught == [] and [text for text in problems if "409" not in text] == []
        page.close()


@pytest.mark.parametrize("here", [True, False])
def test_the_form_shows_where_it_can_be_used(browser: Any, known: Known, here: bool) -> None:
    with LiveServer(known, "127.0.0.1" if here else "0.0.0.0", 0, recorder=Hand()) as server:
        local = f"http://127.0.0.1:{port_of(server)}/"
        page = browser.new_page()
        page.goto(local)
        page.wait_for_selector("#top li")
        assert page.locator("#teach").is_visible() == here
        if not here:
            page.goto(local + "#" + server.teach_url.partition("#")[2])
            page.reload()
            page.locator("#teach").wait_for(state="visible")
        page.close()


def test_several_cameras(browser: Any) -> None:
    known, hand = Known(noise(1), "door", "yard & <gate>", "hall"), Hand()
    with LiveServer(known, port=0, recorder=hand) as server:
        assert ask(server, "/frame.jpg?camera=yard%20%26%20%3Cgate%3E")[0] == ask(server, "/frame.jpg")[0] == 200
        assert ask(server, "/frame.jpg?camera=nowhere")[0] == ask(server, "/stream.mjpg?camera=")[0] == 404
        page = browser.new_page()
        problems: list[str] = []
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(server.url)
        page.locator("figure").nth(2).wait_for()
        wait_for(lambda: page.evaluate("[...document.images].every((image) => image.naturalWidth > 0)"))
        assert page.locator("figcaption b").all_inner_texts() == ["door", "yard & <gate>", "hall"]
        page.locator("figure").nth(1).focus()
        page.keyboard.press("Enter")
        assert page.locator("figure").nth(1).get_attribute("aria-pressed") == "true"
        page.fill("#name", "cat")
        page.click("text=Teach 5 seconds")
        page.get_by_text("has 20 frames").wait_for()
        assert hand.taught == ["cat 5 yard & <gate>"] and problems == []
        page.close()
