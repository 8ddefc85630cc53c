"""Answers to an MQTT broker, by paho-mqtt, which is imported when a broker is named.

A broker that is away, silent or slow holds nobody up: answers wait in a queue that has an end, and a thread sends them.
"""

from __future__ import annotations

import os
import queue
import secrets
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

from duallora_edge.errors import ConfigError
from duallora_edge.extras import install_hint
from duallora_edge.runtime.closing import Closing

PASSWORD_VARIABLE = "DUALLORA_EDGE_MQTT_PASSWORD"
WAITING = 1000  # answers that wait for the broker; then the oldest is given up for each new one
IN_FLIGHT = 20  # answers sent and not yet acknowledged
KEEPALIVE_S = 30
MAX_PAUSE_S = 30
CLOSE_S = 2.0
MAX_TOPIC_BYTES = 60_000
_PORTS = {"mqtt": 1883, "mqtts": 8883}


@dataclass(frozen=True)
class Broker:
    """A topic of a broker; with ``tls``, its certificate is checked. The password comes from the environment."""

    host: str
    port: int
    topic: str
    tls: bool
    user: str | None
    password: str | None = field(repr=False)

    @classmethod
    def parse(cls, address: str) -> Broker:
        """Read ``mqtt://[USER@]HOST[:PORT]/TOPIC``, with ``mqtts`` for TLS. Raises `ConfigError` for anything else."""
        try:
            url = urlsplit(address)
            port = url.port or _PORTS[url.scheme]
            topic = unquote(url.path[1:], errors="strict")
            whole = url.hostname and topic and not set(address) & set("?#") and not set(topic) & set("+#\0")
            if not whole or len(topic.encode()) > MAX_TOPIC_BYTES:
                raise ValueError
            str(url.hostname).encode("idna")  # or the first connection would fail on it
        except (ValueError, KeyError) as error:
            scheme = address.partition("://")[0]
            raise ConfigError(
                f"The address that begins with '{scheme[:20]}' is not one of a topic, such as "
                "mqtt://broker.local/site/camera (mqtts:// for TLS)."
            ) from error
        if url.password is not None:
            raise ConfigError(
                f"A command line can be read by others: give the password of the broker in {PASSWORD_VARIABLE} instead."
            )
        password = os.environ.get(PASSWORD_VARIABLE)
        user = unquote(url.username) if url.username else None
        if password and not user:
            raise ConfigError(f"{PASSWORD_VARIABLE} is set, so name its user: mqtt://USER@{url.hostname}/{topic}.")
        return cls(str(url.hostname), port, topic, url.scheme == "mqtts", user, password)

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


class Publisher(Closing):
    """Sends lines to a topic, each at least once (QoS 1), while the broker is there.

    ``TOPIC/status`` says ``online`` or ``offline``, for those who come later too (retained). Where the process or its
    network dies, the broker itself says ``offline``.
    """

    def __init__(self, address: str, say: Callable[[str], object]) -> None:
        """Connect, and again whenever the connection is lost; ``say`` is told of changes.

        Raises `ConfigError` when the address is none or paho-mqtt is missing.
        """
        self.broker = Broker.parse(address)
        try:
            from paho.mqtt import client, enums
        except ImportError as error:
            raise ConfigError(f"--mqtt needs paho-mqtt ({error}): {install_hint('mqtt')}.") from error
        self._say = say
        self._said = ""
        self._lost = 0  # only grows, so that two threads cannot count against each other
        self._lost_said = 0
        self._lines: queue.Queue[str | None] = queue.Queue(WAITING)
        self._in_flight: set[int] = set()
        self._acknowledged: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._closing = False
        self._disconnected = threading.Event()
        name = f"duallora-edge-{secrets.token_hex(4)}"
        self._client = client.Client(enums.CallbackAPIVersion.VERSION2, name, reconnect_on_failure=True)
        self._client.suppress_exceptions = True  # an error of `say` must not end its thread
        self._client.on_connect = self._on_connect
        self._client.on_connect_fail = self._on_connect_fail
        self._client.on_disconnect = self._on_disconnect
        self._client.on_publish = self._on_publish
        self._client.reconnect_delay_set(1, MAX_PAUSE_S)
        self._client.will_set(self._status, "offline", qos=1, retain=True)
        if self.broker.user:
            self._client.username_pw_set(self.broker.user, self.broker.password)
        if self.broker.tls:
            self._client.tls_set()
        self._client.connect_async(self.broker.host, self.broker.port, KEEPALIVE_S)
        self._client.loop_start()
        self._thread = threading.Thread(target=self._send, name="duallora-edge mqtt", daemon=True)
        self._thread.start()

    def write(self, line: str) -> None:
        """Send a line soon; returns at once."""
        self._put(line)

    def close(self) -> None:
        """Send what waits, for `CLOSE_S` seconds at most, and leave the broker. Does nothing the second time."""
        if self._closing:
            return
        self._closing = True
        self._put(None)
        if self._client.is_connected():
            self._thread.join(CLOSE_S)
        self._acknowledged.put(None)  # ends the thread where it waits for the broker
        self._thread.join(CLOSE_S / 2)
        if self._client.is_connected():
            with suppress(RuntimeError, ValueError):
                self._client.publish(self._status, "offline", qos=1, retain=True).wait_for_publish(CLOSE_S / 2)
            self._client.disconnect()
            # Not for the thread of the client, which may stand still in a dead connection.
            self._disconnected.wait(CLOSE_S / 2)
        self._client.disconnect()
        lost = self._lost - self._lost_said + len(self._in_flight) + sum(line is not None for line in self._lines.queue)
        if lost:
            self._say(f"answers that did not reach the MQTT broker {self.broker}: {lost}")

    @property
    def _status(self) -> str:
        return f"{self.broker.topic}/status"

    def _put(self, line: str | None) -> None:
        while True:
            with suppress(queue.Full):
                return self._lines.put_nowait(line)
            with suppress(queue.Empty):
                self._lines.get_nowait()
                self._lost += 1

    def _send(self) -> None:
        """Hand lines to the client, which keeps those that are not acknowledged and sends them again."""
        while (line := self._lines.get()) is not None:
            if not self._waits_for(IN_FLIGHT - 1):
                self._lost += 1
                return
            self._in_flight.add(self._client.publish(self.broker.topic, line, qos=1).mid)
        self._waits_for(0)

    def _waits_for(self, most: int) -> bool:
        """Wait until at most so many lines are not acknowledged; False when the end comes before that."""
        while len(self._in_flight) > most:
            if (number := self._acknowledged.get()) is None:
                return False
            self._in_flight.discard(number)
        return True

    def _tell(self, text: str) -> None:
        """Say what has changed; not again and again what stays."""
        if text != self._said:
            self._said = text
            self._say(text)

    def _on_connect(self, client: Any, userdata: Any, flags: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure:
            return self._tell(f"the MQTT broker {self.broker} refuses ({reason}); trying again")
        client.publish(self._status, "online", qos=1, retain=True)
        lost = self._lost - self._lost_said
        self._lost_said += lost
        self._tell(f"connected to the MQTT broker {self.broker}" + (f"; answers lost: {lost}" if lost else ""))

    def _on_connect_fail(self, client: Any, userdata: Any) -> None:
        # It is called while the client handles the error, which it does not pass on.
        self._tell(f"the MQTT broker {self.broker} cannot be reached ({sys.exc_info()[1]}); trying again")

    def _on_disconnect(self, client: Any, userdata: Any, flags: Any, reason: Any, properties: Any) -> None:
        if self._closing:
            self._disconnected.set()
        elif self._said.startswith("connected"):
            self._tell(f"the connection to the MQTT broker {self.broker} is lost; trying again")

    def _on_publish(self, client: Any, userdata: Any, mid: int, reason: Any, properties: Any) -> None:
        self._acknowledged.put(mid)
