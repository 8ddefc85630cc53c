"""Answers reach a real broker (mosquitto); one that is away, frozen or refuses holds nobody up."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from duallora_edge.errors import ConfigError
from duallora_edge.runtime.service import mqtt
from duallora_edge.runtime.service.mqtt import IN_FLIGHT, PASSWORD_VARIABLE, WAITING, Broker, Publisher

pytest.importorskip("paho.mqtt", reason="paho-mqtt is not installed (extra 'mqtt')")
from paho.mqtt import client, enums

MOSQUITTO = shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin:/opt/homebrew/sbin")
needs_broker = pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed (apt-get install mosquitto)")


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


class Mosquitto:
    """A broker on a port of its own, which can go away and come back."""

    def __init__(self, folder: Path, *settings: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.config = folder / "mosquitto.conf"
        lines = [f"listener {self.port} 127.0.0.1", *(settings or ["allow_anonymous true"]), "user root"]
        self.config.write_text("\n".join(lines))
        self.start()

    def start(self) -> None:
        assert MOSQUITTO is not None
        self.process = subprocess.Popen([MOSQUITTO, "-c", str(self.config)], stderr=subprocess.DEVNULL)
        until(self.answers)

    def answers(self) -> bool:
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port), 1).close()
            return True
        return False

    def end(self) -> None:
        """Stop as a service is stopped: it writes down what it keeps for those who are away."""
        self.process.terminate()
        self.process.wait()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    broker = Mosquitto(tmp_path)
    yield broker
    broker.stop()


class Reader:
    """Somebody who subscribed to everything; with a name, the broker keeps what comes while they are away."""

    def __init__(self, broker: Mosquitto, name: str = "") -> None:
        self.messages: list[tuple[str, str]] = []
        self.client = client.Client(enums.CallbackAPIVersion.VERSION2, name, clean_session=not name)
        self.client.on_message = lambda _, __, message: self.messages.append((message.topic, message.payload.decode()))
        ready = threading.Event()
        self.client.on_connect = lambda *_: self.client.subscribe("#", 1)
        self.client.on_subscribe = lambda *_: ready.set()
        self.client.connect("127.0.0.1", broker.port)
        self.client.loop_start()
        assert ready.wait(10)

    def lines(self) -> list[str]:
        return [payload for topic, payload in self.messages if not topic.endswith("/status")]

    def statuses(self) -> list[str]:
        return [payload for topic, payload in self.messages if topic == "site/camera/status"]

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


@pytest.fixture
def reader(broker: Mosquitto) -> Iterator[Reader]:
    reader = Reader(broker)
    yield reader
    reader.close()


def address(broker: Mosquitto) -> str:
    return f"mqtt://127.0.0.1:{broker.port}/site/camera"


@needs_broker
def test_every_line_arrives_in_order(broker: Mosquitto, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mqtt, "CLOSE_S", 60)
    said: list[str] = []
    lines = [f"line {number}" for number in range(300)]
    with Publisher(address(broker), said.append) as publisher:
        until(lambda: said)
        for line in lines:
            publisher.write(line)
    until(lambda: reader.statuses() == ["online", "offline"])
    assert reader.lines() == lines and {topic for topic, _ in reader.messages} == {"site/camera", "site/camera/status"}
    assert said == [f"connected to the MQTT broker 127.0.0.1:{broker.port}"]


@needs_broker
def test_a_broker_that_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits has an end; the newest lines stay, and arrive."""
    monkeypatch.setattr(mqtt, "MAX_PAUSE_S", 1)
    keeps = ["persistence true", f"persistence_location {tmp_path}/", "max_queued_messages 0"]
    broker = Mosquitto(tmp_path, "allow_anonymous true", *keeps)
    said: list[str] = []
    try:
        Reader(broker, "reader").close()
        with Publisher(address(broker), said.append) as publisher:
            until(lambda: said)
            broker.end()
            until(lambda: len(said) == 3)
            assert said[1].endswith("is lost; trying again") and "Connection refused" in said[2]
            for number in range(3 * WAITING):
                publisher.write(str(number))
            broker.start()
            until(lambda: len(said) > 3 and said[-1].startswith("connected"))
            publisher.write("last")
        reader = Reader(broker, "reader")
        until(lambda: "last" in reader.lines())
        reader.close()
    finally:
        broker.stop()
    lost = re.search(r"connected to the MQTT broker [\d.:]+; answers lost: (\d+)", "\n".join(said))
    *numbers, last = reader.lines()
    seen = [int(line) for line in numbers]
    assert lost and last == "last"
    newest = [*range(2 * WAITING + 10, 3 * WAITING)]  # a few more go where the sender takes one at the same time
    assert seen == sorted(set(seen)) and seen[-len(newest) :] == newest
    assert 0 <= 3 * WAITING - len(seen) - int(lost[1]) <= 2  # "last" may have found the queue full, after the count


@needs_broker
def test_a_broker_that_freezes(broker: Mosquitto, reader: Reader) -> None:
    said: list[str] = []
    with Publisher(address(broker), said.append) as publisher:
        until(lambda: said)
        broker.process.send_signal(signal.SIGSTOP)
        for number in range(3 * WAITING):
            publisher.write(str(number))
        broker.process.send_signal(signal.SIGCONT)
        until(lambda: str(3 * WAITING - 1) in reader.lines())
    seen = [int(line) for line in reader.lines()]
    assert seen == sorted(seen) and seen[-WAITING:] == [*range(2 * WAITING, 3 * WAITING)]
    assert WAITING <= len(seen) <= WAITING + IN_FLIGHT + 1


@needs_broker
@pytest.mark.parametrize("how", ["away", "frozen", "never there"])
def test_closing_does_not_wait_for_a_broker(broker: Mosquitto, how: str) -> None:
    said: list[str] = []
    if how == "never there":
        broker.stop()
    publisher = Publisher(address(broker), said.append)
    until(lambda: said)
    if how == "away":
        broker.stop()
    if how == "frozen":
        broker.process.send_signal(signal.SIGSTOP)
    for number in range(30):
        publisher.write(str(number))
    closing = threading.Thread(target=publisher.close, daemon=True)
    closing.start()
    closing.join(10)
    assert not closing.is_alive()
    assert said[-1] == f"answers that did not reach the MQTT broker 127.0.0.1:{broker.port}: 30"
    publisher.close()


@needs_broker
def test_the_broker_tells_of_a_process_that_died(broker: Mosquitto, reader: Reader) -> None:
    code = (
        "import sys, time; from duallora_edge.runtime.service.mqtt import Publisher\n"
        "publisher = Publisher(sys.argv[1], print); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, address(broker)]) as process:
        until(lambda: reader.statuses() == ["online"])
        process.kill()
    until(lambda: reader.statuses() == ["online", "offline"])


@needs_broker
@pytest.mark.skipif(shutil.which("mosquitto_passwd") is None, reason="mosquitto_passwd is not installed")
def test_a_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run(["mosquitto_passwd", "-b", "-c", str(tmp_path / "users"), "camera", "secret"], check=True)
    (tmp_path / "users").chmod(0o644)
    broker = Mosquitto(tmp_path, "allow_anonymous false", f"password_file {tmp_path / 'users'}")
    url, said = f"mqtt://camera@127.0.0.1:{broker.port}/a", list[str]()
    try:
        for password, words in (("wrong", "refuses (Not authorized); trying again"), ("secret", "connected to")):
            monkeypatch.setenv(PASSWORD_VARIABLE, password)
            with Publisher(url, said.append):
                until(lambda words=words: any(words in text for text in said))  # type: ignore[misc]
    finally:
        broker.stop()
    assert len(said) == 2


@pytest.mark.parametrize(
    ("text", "host", "port", "topic", "tls", "user"),
    [
        ("mqtt://broker/a", "broker", 1883, "a", False, None),
        ("mqtts://10.0.0.1/site/camera%201", "10.0.0.1", 8883, "site/camera 1", True, None),
        ("mqtt://me%40site@[::1]:99//a/", "::1", 99, "/a/", False, "me@site"),
    ],
)
def test_addresses(text: str, host: str, port: int, topic: str, tls: bool, user: str | None) -> None:
    assert Broker.parse(text) == Broker(host, port, topic, tls, user, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *((f"mqtt://{rest}", "such as mqtt://broker.local/site/camera") for rest in ("", "broker", "broker/", "/a")),
        *((f"mqtt://broker/{topic}", "is not one of a topic") for topic in ("a/#", "a/+/b", "a?b", "%00", "%ff")),
        *((f"mqtt://{host}/a", "is not one of a topic") for host in ("broker:0x1", "broker:99999", "b" * 300, "[a")),
        ("http://broker/a", "begins with 'http'"),
        ("broker/a", "such as mqtt://"),
        (f"mqtt://broker/{'a' * 70_000}", "is not one of a topic"),
        ("mqtt://me:secret@broker/a", f"give the password of the broker in {PASSWORD_VARIABLE}"),
    ],
)
def test_what_is_no_address(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        Broker.parse(text)
    assert "secret" not in str(error.value)


def test_a_password_needs_a_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PASSWORD_VARIABLE, "secret")
    with pytest.raises(ConfigError, match="mqtt://USER@broker/a"):
        Broker.parse("mqtt://broker/a")
    assert "secret" not in repr(Broker.parse("mqtt://me@broker/a"))


def test_without_paho(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "paho.mqtt", None)
    with pytest.raises(ConfigError, match="pip install 'paho-mqtt"):
        Publisher("mqtt://broker/a", print)
