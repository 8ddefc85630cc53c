"""The examples do what they say: each is run as a user would run it, and ends properly on SIGTERM."""

from __future__ import annotations

import http.client
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
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

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


@pytest.mark.parametrize("name", ["camera_app.py", "gstreamer_app.py", "http_service.py"])
def test_an_error_is_one_sentence(start: Start, tmp_path: Path, name: str) -> None:
    process = start(name, tmp_path / "nothing", *(["photos"] if name == "camera_app.py" else []))
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


@pytest.fixture
def web(start: Start, colour_bundle: Path, tmp_path: Path) -> Web:
    """The service on a bundle at ``tmp_path / "current"``, a link."""
    (tmp_path / "current").symlink_to(colour_bundle)
    return Web(start("http_service.py", "current", "--port", 0))


def test_http_service_answers_and_refuses(web: Web) -> None:
    red, jpeg, huge = image((250, 5, 5)), image((5, 250, 5), "JPEG", (400, 300)), bytes(21 * 2**20)
    cases: list[tuple[int, str, str, str, bytes, dict[str, str | int] | None]] = [
        (200, '"label": "red"', "POST", "/classify", red, None),
        (200, '"label": "green"', "POST", "/classify", jpeg, {"Content-Length": len(jpeg), "Content-Type": "image/x"}),
        (400, "image", "POST", "/classify", b"not an image", None),
        (400, "truncated", "POST", "/classify", jpeg[:-99], None),
        (400, "image", "POST", "/classify", b"", None),
        (400, "25000000 pixels", "POST", "/classify", image(0, size=(5001, 5000), mode="1"), None),
        (400, "number", "POST", "/classify", red, {"Content-Length": "-1"}),
        (400, "number", "POST", "/classify", red, {"Content-Length": "9" * 5000}),
        (404, "/classify", "POST", "/clasify", red, None),
        (404, "/classify", "GET", "/classify", b"", {}),
        (411, "Content-Length", "POST", "/classify", b"", {}),
        (411, "Content-Length", "POST", "/classify", b"0\r\n\r\n", {"Transfer-Encoding": "chunked"}),
        (413, "21,500,000", "POST", "/classify", b"", {"Content-Length": 21_500_000}),
        (413, f"{len(huge):,}", "POST", "/classify", huge, None),
        (415, "text/plain", "POST", "/classify", red, {"Content-Length": len(red), "Content-Type": "text/plain"}),
        (501, "PUT", "PUT", "/classify", red, None),
        (200, '"status": "ok"', "GET", "/health", b"", {}),
        (200, 'duallora_edge_bundle_info{bundle="colours, version 3"', "GET", "/metrics", b"", {}),
        (200, "duallora_edge_answers_total 2\n", "GET", "/metrics", b"", {}),
    ]
    for status, words, method, path, body, headers in cases:
        got, text = web.ask(method, path, body, headers)
        assert (got, words in text) == (status, True), (method, path, headers, text)
        assert path == "/metrics" or (status == 200) != ("error" in json.loads(text))
    with socket.create_connection(("127.0.0.1", web.port), timeout=SECONDS) as connection:
        connection.sendall(b"POST /classify HTTP/1.1\r\nContent-Length: 100\r\n\r\nhalf of it")
        connection.shutdown(socket.SHUT_WR)
        text = b"".join(iter(lambda: connection.recv(4096), b"")).decode()
    assert " 400 " in text and "Only 10 of 100 bytes" in text
    stop(web.process)


def test_http_service_answers_eight_clients_as_one(web: Web, colour_bundle: Path) -> None:
    bodies = [
        image((40 * n, 30 * n % 256, 255 - 30 * n), kind, (20 + n, 90)) for n in range(6) for kind in ("PNG", "JPEG")
    ]
    classifier = Classifier.load(colour_bundle)
    expected = [classifier(read_image(io.BytesIO(body))).to_json() for body in bodies]

    def client(_: int) -> list[dict[str, Any]]:
        answers = []
        with closing(web.connect()) as connection:  # one for all of them
            for body in bodies:
                connection.request("POST", "/classify", body)
                answers.append(json.loads(connection.getresponse().read()))
        return answers

    with ThreadPoolExecutor(8) as clients:
        for answers in clients.map(client, range(8)):
            assert [{**answer, "timings": None} for answer in answers] == [{**one, "timings": None} for one in expected]
    stop(web.process)


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


def test_http_service_ends_while_clients_are_silent(web: Web) -> None:
    with closing(web.connect()) as waiting, socket.create_connection(("127.0.0.1", web.port)) as half:
        waiting.connect()
        half.sendall(b"POST /classify HTTP/1.1\r\nContent-Length: 100\r\n\r\nhalf of it")
        assert web.classify(image((5, 5, 250)))["label"] == "blue"
        stop(web.process)


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
    assert [json.loads(line)["name"] for line in out.splitlines()] == [str(photos / "0.jpg"), str(photos / "3.jpg")]


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
