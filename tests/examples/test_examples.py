"""The examples do what they say: each is run as a user would run it, and ends properly on SIGTERM."""

from __future__ import annotations

import http.client
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import uvicorn
from PIL import Image

from duallora_edge.errors import BackendError
from duallora_edge.runtime import Classifier, open_source
from duallora_edge.runtime.preprocess import read_image

EXAMPLES = Path(__file__).parents[2] / "examples"
RED = "videotestsrc is-live=true pattern=red ! video/x-raw,width=320,height=240,framerate=30/1"
SECONDS = 20  # for what takes one or two

needs_gstreamer = pytest.mark.skipif(shutil.which("gst-launch-1.0") is None, reason="gst-launch-1.0 is not installed")
needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")

Start = Callable[..., "subprocess.Popen[str]"]
Until = Callable[[Callable[[], object]], Any]


def image(
    colour: tuple[int, ...] | int, kind: str = "PNG", size: tuple[int, int] = (40, 30), mode: str = "RGB"
) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, kind)
    return buffer.getvalue()


def stop(process: subprocess.Popen[str], number: int = signal.SIGTERM) -> str:
    """What a process still wrote, to both outputs, when it was told to end."""
    process.send_signal(number)
    out, err = process.communicate(timeout=SECONDS)
    assert (process.returncode, "Traceback" in err) == (0, False), err
    return out + err


def test_the_readme_has_all_examples() -> None:
    words = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    files = {file.name for file in EXAMPLES.iterdir() if file.is_file()}
    assert {name for name in files if f"]({name})" not in words} == {"README.md"}


def test_camera_app_acts_on_what_it_is_sure_of(start: Start, colour_bundle: Path, photos: Path) -> None:
    process = start("camera_app.py", colour_bundle, photos)
    out, err = process.communicate(timeout=SECONDS)
    labels = re.findall(r"^frame \d+: (\S+), \d+%$", out, re.MULTILINE)
    assert (process.returncode, err) == (0, "")
    assert out.startswith("colours, version 3, on ") and labels == ["red", "(new)", "red", "(unsure)", "blue"]
    assert out.endswith("red: 2, (new): 1, (unsure): 1, blue: 1\n")


@pytest.mark.parametrize("background", [255, 0])
def test_crops_app_names_what_it_finds(start: Start, colour_bundle: Path, tmp_path: Path, background: int) -> None:
    picture = Image.new("RGB", (200, 100), (background,) * 3)
    for colour, left in (((250, 5, 5), 20), ((5, 5, 250), 120)):
        picture.paste(colour, (left, 30, left + 40, 80))
    picture.save(tmp_path / "parts.png")
    out, err = start("crops_app.py", colour_bundle, "parts.png").communicate(timeout=SECONDS)
    assert (out, err) == ("20,30 to 60,80: red, 100%\n120,30 to 160,80: blue, 100%\n", "")
    Image.new("RGB", (20, 10)).save(tmp_path / "empty.png")
    assert start("crops_app.py", colour_bundle, "empty.png").communicate(timeout=SECONDS) == ("", "")


@pytest.mark.parametrize("name", ["camera_app.py", "crops_app.py", "gstreamer_app.py", "http_service.py"])
def test_an_error_is_one_sentence(start: Start, tmp_path: Path, name: str) -> None:
    process = start(name, tmp_path / "nothing", *(["photos"] if name in ("camera_app.py", "crops_app.py") else []))
    out, err = process.communicate(timeout=SECONDS)
    assert (process.returncode, out) == (1, "") and err.count("\n") == 1 and "is not a folder" in err


@needs_gstreamer
@pytest.mark.parametrize(
    ("name", "arguments", "answer"),
    [
        ("camera_app.py", [f"gst://{RED}?width=320&height=240"], ": red, 100%"),
        ("gstreamer_app.py", ["--camera", RED, "--record", "my clip.mkv"], ": red, 100%"),
        ("gstreamer_pipe.sh", ["64x48", *RED.split()], '"label": "red"'),
    ],
)
def test_a_live_pipeline_until_sigterm(
    start: Start, colour_bundle: Path, tmp_path: Path, until: Until, name: str, arguments: list[str], answer: str
) -> None:
    process = start(name, colour_bundle, *arguments)
    assert process.stdout is not None
    first = next((line for line in iter(process.stdout.readline, "") if line.startswith(("frame", "{"))), "nothing")
    assert answer in first
    clip = tmp_path / "my clip.mkv"
    if "--record" in arguments:
        until(lambda: clip.exists() and clip.stat().st_size > 20_000)
    stop(process)
    assert not clip.exists() or len(list(open_source(clip))) > 3


@needs_gstreamer
def test_gstreamer_app_names_the_cause_of_a_broken_pipeline(start: Start, colour_bundle: Path) -> None:
    process = start("gstreamer_app.py", colour_bundle, "--camera", "nosuchcamera")
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 1 and 'no element "nosuchcamera"' in err and "Traceback" not in err


@pytest.mark.parametrize("arguments", [["bundle", "64x48"], ["bundle", "65x48", "videotestsrc"]])
def test_gstreamer_pipe_refuses(start: Start, arguments: list[str]) -> None:
    process = start("gstreamer_pipe.sh", *arguments)
    out, err = process.communicate(timeout=SECONDS)
    assert (process.returncode, out) == (2, "") and re.search("usage|multiple of 4", err)


class Web:
    """``http_service.py`` as a client sees it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        self.process = process
        self.port = int(process.stderr.readline().rpartition(":")[2].rstrip("/\n"))

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)

    def ask(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str | int] | None = None
    ) -> tuple[int, str]:
        """Status and body; exactly the ``headers`` given, those of a picture when None."""
        with closing(self.connect()) as connection:
            connection.putrequest(method, path)
            for name, value in ({"Content-Length": len(body)} if headers is None else headers).items():
                connection.putheader(name, str(value))
            connection.endheaders(body)
            response = connection.getresponse()
            return response.status, response.read().decode()

    def classify(self, body: bytes) -> dict[str, Any]:
        status, text = self.ask("POST", "/classify", body)
        assert status == 200, text
        return json.loads(text)


@pytest.fixture(scope="module")
def shared_web(colour_bundle: Path) -> Iterator[Web]:
    """The service for several tests."""
    command = [sys.executable, str(EXAMPLES / "http_service.py"), str(colour_bundle), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        yield Web(process)
        assert stop(process) == ""


@pytest.fixture
def web(start: Start, colour_bundle: Path, tmp_path: Path) -> Web:
    """The service on a bundle at ``tmp_path / "current"``, a link."""
    (tmp_path / "current").symlink_to(colour_bundle)
    return Web(start("http_service.py", "current", "--port", 0))


def chunked(body: bytes) -> bytes:
    return b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)


def test_http_service_answers_and_refuses(web: Web) -> None:
    red, jpeg, huge = image((250, 5, 5)), image((5, 250, 5), "JPEG", (400, 300)), bytes(21 * 2**20)
    in_chunks: dict[str, str | int] = {"Transfer-Encoding": "chunked"}
    cases: list[tuple[int, str, str, str, bytes, dict[str, str | int] | None]] = [
        (200, '"label":"red"', "POST", "/classify", red, None),
        (200, '"label":"green"', "POST", "/classify", jpeg, {"Content-Length": len(jpeg), "Content-Type": "image/x"}),
        (200, '"label":"red"', "POST", "/classify", chunked(red), in_chunks),
        (400, "image", "POST", "/classify", b"not an image", None),
        (400, "truncated", "POST", "/classify", jpeg[:-99], None),
        (400, "image", "POST", "/classify", b"", None),
        (400, "25000000 pixels", "POST", "/classify", image(0, size=(5001, 5000), mode="1"), None),
        (404, "Not Found", "POST", "/clasify", red, None),
        (405, "Not Allowed", "GET", "/classify", b"", {}),
        (405, "Not Allowed", "PUT", "/classify", red, None),
        (413, "20,971,520", "POST", "/classify", huge, None),
        (413, "20,971,520", "POST", "/classify", chunked(huge), in_chunks),
        (415, "text/plain", "POST", "/classify", red, {"Content-Length": len(red), "Content-Type": "text/plain"}),
        (200, '"status":"ok"', "GET", "/health", b"", {}),
        (200, '"answers":3', "GET", "/health", b"", {}),
    ]
    for status, words, method, path, body, headers in cases:
        got, text = web.ask(method, path, body, headers)
        assert (got, words in text) == (status, True), (method, path, headers, text)
        assert (status == 200) != ("error" in json.loads(text))
    assert stop(web.process) == ""


@pytest.mark.parametrize(
    ("raw", "answer"),
    [
        (b"hello\r\n\r\n", b"400"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"400"),
        (b"GET /health HTTP/1.1\r\nX: " + b"x" * 60_000, b"400"),
        (b"POST /classify HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\nx", b"400"),
        (b"POST /classify HTTP/1.1\r\nHost: a\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n", b"400"),
        (b"POST /classify HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx", b"400"),
        (b"POST /classify HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", b"400"),
        (b"POST /classify HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nhalf of it", None),
        (b"POST /classify HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nha", None),
        (b"", None),
    ],
)
def test_http_service_survives_what_is_no_request(shared_web: Web, raw: bytes, answer: bytes | None) -> None:
    with socket.create_connection(("127.0.0.1", shared_web.port), timeout=SECONDS) as connection, suppress(OSError):
        connection.sendall(raw)
        if answer is None:
            connection.shutdown(socket.SHUT_WR)
        received = connection.recv(4096)
        assert received.startswith(b"HTTP/1.1 %s " % answer if answer else b"")
        assert received if answer else not received
    assert shared_web.ask("GET", "/health", headers={})[0] == 200


@pytest.mark.parametrize(("path", "status"), [("/x", b"404"), ("/classify", b"400")])
def test_http_service_answers_once_when_a_body_goes_wrong(shared_web: Web, path: str, status: bytes) -> None:
    with socket.create_connection(("127.0.0.1", shared_web.port), timeout=SECONDS) as connection, suppress(OSError):
        connection.sendall(f"POST {path} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        received = connection.recv(4096) if status == b"404" else b""
        connection.sendall(b"zz\r\n")
        while chunk := connection.recv(4096):
            received += chunk
    assert received.startswith(b"HTTP/1.1 " + status) and received.count(b"HTTP/1.1 ") == 1


def test_http_service_is_not_stopped_by_slow_clients(web: Web) -> None:
    heads = (
        b"POST /classify HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nhalf of it",
        b"GET /health HTTP/1.1\r\n",
    )
    with ExitStack() as stack:
        for number in range(128):
            slow = stack.enter_context(socket.create_connection(("127.0.0.1", web.port), timeout=SECONDS))
            slow.sendall(heads[number % 2])
        assert web.classify(image((5, 5, 250)))["label"] == "blue"
        stop(web.process)


def test_http_service_answers_eight_clients_as_one(shared_web: Web, colour_bundle: Path) -> None:
    bodies = [
        image((40 * n, 30 * n % 256, 255 - 30 * n), kind, (20 + n, 90)) for n in range(6) for kind in ("PNG", "JPEG")
    ]
    classifier = Classifier.load(colour_bundle)
    expected = [classifier(read_image(io.BytesIO(body))).to_json() for body in bodies]

    def client(_: int) -> list[dict[str, Any]]:
        answers = []
        with closing(shared_web.connect()) as connection:  # one for all of them
            for body in bodies:
                connection.request("POST", "/classify", body)
                answers.append(json.loads(connection.getresponse().read()))
        return answers

    with ThreadPoolExecutor(8) as clients:
        for answers in clients.map(client, range(8)):
            assert [{**answer, "timings": None} for answer in answers] == [{**one, "timings": None} for one in expected]


def test_http_service_swaps_on_sighup(web: Web, colour_bundle: Path, tmp_path: Path, until: Until) -> None:
    red, link, folder = image((250, 5, 5)), tmp_path / "current", tmp_path / "new"
    shutil.copytree(colour_bundle, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "bundle_version": 4}))
    broken = tmp_path / "broken"
    broken.mkdir()

    def ended() -> str:
        """How the last swap did."""
        return (json.loads(web.ask("GET", "/health")[1])["last_swap"] or {}).get("state", "")

    assert web.classify(red)["bundle_version"] == 3
    for target, state in ((folder, "probation"), (broken, "refused")):
        link.unlink()
        link.symlink_to(target)
        web.process.send_signal(signal.SIGHUP)
        until(lambda state=state: ended() == state)
        assert web.classify(red)["bundle_version"] == 4
    written = stop(web.process)
    assert "swapped to colours, version 4" in written and "cannot be swapped in" in written


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """``http_service.py`` as a module with small limits."""
    spec = importlib.util.spec_from_file_location("http_service", EXAMPLES / "http_service.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, value in {"BODY_S": 0.2, "IDLE_S": 0.2, "MAX_BYTES": 5000, "MAX_HELD": 6000, "MAX_WAITING": 1}.items():
        monkeypatch.setattr(module, name, value)
    return module


class Blocked:
    """A classifier that works on an image until it is let go."""

    def __init__(self) -> None:
        self.go, self.begun = threading.Event(), threading.Event()

    def __call__(self, pixels: object) -> Any:
        self.begun.set()
        assert self.go.wait(SECONDS)
        raise BackendError("The model failed; restart it.")


@contextmanager
def serving(service: ModuleType, routes: Any) -> Iterator[int]:
    """The port of the service, in a thread of this process."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(service.configure(routes))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(SECONDS)
        assert not thread.is_alive()


def test_http_service_has_a_bounded_queue(service: ModuleType, until: Until) -> None:
    classifier, png = Blocked(), image((5, 5, 250))
    routes = service.Service(classifier, 1)

    def post(body: bytes = png) -> tuple[int, str]:
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)) as connection:
            connection.request("POST", "/classify", body)
            response = connection.getresponse()
            return response.status, json.loads(response.read())["error"]

    with serving(service, routes) as port, ThreadPoolExecutor(2) as clients:
        first = clients.submit(post)
        assert classifier.begun.wait(SECONDS)
        second = clients.submit(post)
        until(lambda: routes.held == 2 * len(png))
        assert post() == (503, "Too many images at once; send it again later.")
        classifier.go.set()
        assert {first.result(), second.result()} == {(503, "The model failed; restart it.")}
        assert post(bytes(5001))[0] == 413 and post(bytes(4999))[0] == 400


@pytest.mark.parametrize(
    ("raw", "answer"),
    [
        (b"", b""),
        (b"GET /health HTTP/1.1\r\nX: ", b""),
        (b"POST /classify HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nhalf", b"HTTP/1.1 408 "),
        (b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nhalf", b"HTTP/1.1 404 "),
    ],
)
def test_http_service_closes_slow_connections(service: ModuleType, raw: bytes, answer: bytes) -> None:
    with (
        serving(service, service.Service(Blocked(), 1)) as port,
        socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as slow,
    ):
        slow.sendall(raw)
        received = b""
        with suppress(ConnectionError):  # the rest of its body was not read
            while chunk := slow.recv(4096):
                received += chunk
                slow.sendall(b"x")
        assert received.startswith(answer) and bool(received) == bool(answer)


def test_http_service_says_that_it_has_no_password(start: Start, colour_bundle: Path) -> None:
    process = start("http_service.py", colour_bundle, "--port", 0, "--host", "0.0.0.0")
    assert process.stderr is not None
    assert "http://0.0.0.0:" in process.stderr.readline() and "no password" in process.stderr.readline()
    stop(process)


SIGNAL_FIRST = """
import runpy, signal, sys, uvicorn
serve = uvicorn.Server.run
uvicorn.Server.run = lambda *args, **settings: (signal.raise_signal(signal.SIGTERM), serve(*args, **settings))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_http_service_ends_in_order_by_a_signal_before_it_serves(colour_bundle: Path) -> None:
    command = [sys.executable, "-c", SIGNAL_FIRST, str(EXAMPLES / "http_service.py"), str(colour_bundle), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert (done.returncode, done.stderr.count("\n")) == (0, 1), done.stderr


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit with the command that is installed here."""
    text = (EXAMPLES / "duallora-edge.service").read_text(encoding="utf-8")
    assert "ExecStart=/opt/duallora-edge/bin/duallora-edge " in text
    path = tmp_path / "duallora-edge.service"
    path.write_text(text.replace("/opt/duallora-edge/bin", str(Path(sys.executable).parent)), encoding="utf-8")
    return path


@needs_systemd
@pytest.mark.parametrize("command", [["verify"], ["security", "--offline=yes", "--threshold=25"]])
def test_systemd_accepts_the_unit(unit: Path, command: list[str]) -> None:
    done = subprocess.run(["systemd-analyze", *command, str(unit)], capture_output=True, text=True, check=False)
    if "unrecognized option" in done.stderr:
        pytest.skip("this systemd cannot judge a unit that is not installed")
    assert done.returncode == 0 and unit.name not in done.stderr, done.stdout + done.stderr


def test_the_command_of_the_unit(start: Start, unit: Path, colour_bundle: Path, photos: Path) -> None:
    command = re.search(r"^ExecStart=\S+ (.*)$", unit.read_text().replace("\\\n", " "), re.MULTILINE)
    assert command is not None
    text = command[1].replace("127.0.0.1:8080", "127.0.0.1:0")
    places = {"${BUNDLE}": colour_bundle, "${SOURCE}": photos, "/var/lib/duallora-edge/bundles": colour_bundle.parent}
    process = start("duallora-edge", *(places.get(word, word) for word in shlex.split(text)))
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, err
    # Of the frames 0 and 3 that are answered, the second one changes nothing.
    assert [json.loads(line)["name"] for line in out.splitlines()] == [str(photos / "0.jpg")]


@pytest.fixture(params=["file", "abstract"])
def supervisor(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """The socket at which systemd would listen, and its address as it stands in ``NOTIFY_SOCKET``."""
    address = str(tmp_path / "s") if request.param == "file" else f"@duallora-edge-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(address.replace("@", "\0", 1))
        listener.settimeout(SECONDS)
        yield listener, address


def test_run_tells_systemd_how_it_is(start: Start, supervisor: tuple[socket.socket, str], colour_bundle: Path) -> None:
    listener, address = supervisor
    process = start(
        *("duallora-edge", "run", colour_bundle, "--source", "-", "--size", "8x8"),
        env={"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "100000"},
        stdin=subprocess.PIPE,
    )
    messages = iter(lambda: listener.recv(4096).decode(), "")
    told = [next(messages)]
    while told.count("WATCHDOG=1") < 3:
        told.append(next(messages))
    process.send_signal(signal.SIGTERM)
    while told[-1] != "STOPPING=1":
        told.append(next(messages))
    assert process.wait(SECONDS) == 0
    assert told.count("READY=1") == told.count("STOPPING=1") == 1
