"""Hostile HTTP clients on this machine: does anything stop the two servers, or get an answer that is none?

    python benchmarks/attack_http.py BUNDLE --count 2000 --seed 0

Starts ``examples/http_service.py`` and the live page of ``duallora-edge run``, each on a free loopback port, and sends
each of them ``count`` requests: good ones that were cut, doubled, mixed, garbled, made huge, and images that lie.
Meanwhile 16, 64 and 256 clients send a byte a second of a head or of a body that never ends, and between the attacks
an honest client asks. Prints what came back by kind, the slowest request of the honest client, and the resident memory
before and after. Exit code 1 when a server died, wrote a traceback, answered 500, or left the honest client waiting.
"""

from __future__ import annotations

import io
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import click
import numpy as np
from PIL import Image

SERVICE = Path(__file__).parents[1] / "examples" / "http_service.py"
HOST = "127.0.0.1"
WAIT_S = 15.0  # for an answer; silence after that is a failure
PAUSE_S = 1.0  # after which a client says that nothing more comes from it
SLOW = (16, 64, 256)
CLIENTS = 8


class Server:
    """A server in a process of its own, and how to ask it as an honest client."""

    def __init__(self, command: list[str], honest: bytes, slow: list[bytes], errors: Path) -> None:
        self.honest, self.slow, self.errors = honest, slow, errors
        with errors.open("w") as file:
            self.process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=file)
        deadline = time.monotonic() + 60
        while not (match := re.search(rf"http://{HOST}:(\d+)/", errors.read_text())):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise click.ClickException(f"The server did not start: {errors.read_text()}")
            time.sleep(0.1)
        self.port = int(match[1])

    def memory(self) -> float:
        """Resident megabytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) / 1000

    def send(self, raw: bytes) -> str:
        """The status that came back, or how it ended without one."""
        try:
            with socket.create_connection((HOST, self.port), timeout=WAIT_S) as client:
                with suppress(BrokenPipeError, ConnectionResetError):  # refused before its end, perhaps with an answer
                    client.sendall(raw)
                client.settimeout(PAUSE_S)
                try:
                    head = client.recv(4096)
                except TimeoutError:  # it waits for more
                    with suppress(OSError):
                        client.shutdown(socket.SHUT_WR)
                    client.settimeout(WAIT_S)
                    head = client.recv(4096)
        except TimeoutError:
            return "silence"
        except ConnectionResetError:
            return "closed"
        match = re.match(rb"HTTP/1\.[01] (\d{3}) ", head)
        return match[1].decode() if match else "closed" if not head else "nonsense"

    def close(self) -> str:
        """Ends the process. What it wrote to standard error."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        return self.errors.read_text()


def pictures() -> list[bytes]:
    """Image files that are good, cut, garbled, and a bomb of 400 million pixels in 50 kB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    files = []
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"):
        buffer = io.BytesIO()
        Image.new("RGB", (60, 40), (200, 30, 30)).save(buffer, kind)
        files += [buffer.getvalue(), buffer.getvalue()[:-20]]
    size = (20_000).to_bytes(4, "big")
    bomb = chunk(b"IHDR", size + size + b"\1\0\0\0\0") + chunk(b"IDAT", zlib.compress(bytes(50_020_000), 9))
    return [*files, b"\x89PNG\r\n\x1a\n" + bomb + chunk(b"IEND", b""), b"", b"GIF89a", b"not an image"]


def seeds() -> list[bytes]:
    """Requests to change: the good ones of both servers, and known tricks."""
    heads = [
        b"%s %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n" % (method, path)
        for method in (b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"OPTIONS", b"TRACE", b"CONNECT", b"BREW", b"get")
        for path in (b"/health", b"/classify", b"/", b"/state.json", b"/frame.jpg", b"/../../etc/passwd", b"*", b"/%00")
    ]
    start = b"POST /classify HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: image/png\r\n"
    images = [start + b"Content-Length: %d\r\n\r\n" % len(picture) + picture for picture in pictures()]
    chunks = [
        start + b"Transfer-Encoding: chunked\r\n\r\n" + body
        for body in (
            b"5\r\nhello\r\n0\r\n\r\n", b"zz\r\nhello\r\n", b"-1\r\nx\r\n", b"f" * 30 + b"\r\nx", b"5\r\nhel",
            b"5;" + b"x" * 50_000 + b"\r\nhello\r\n0\r\n\r\n", b"0\r\n" + b"X: y\r\n" * 5000 + b"\r\n",
        )
    ]  # fmt: skip
    lengths = [
        start + b"Content-Length: %s\r\n\r\nx" % length
        for length in (b"-1", b"9" * 5000, b"1e3", b"", b"+1", b"0x10", b"1\r\nContent-Length: 2", b"99999999999")
    ]
    tricks = [
        start + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + b"X: y\r\n" * 3000 + b"\r\n",
        b"GET /health HTTP/1.1\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
        b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/9.9\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 200,
        b"\r\n" * 2000,
        b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /health HTTP/1.1\nHost: localhost\n\n",
        b"GET /health HTTP/1.1\r\nHost : localhost\r\n folded: yes\r\n\r\n",
    ]
    return [*heads, *images * 3, *chunks * 3, *lengths * 3, *tricks]


def mutated(count: int, seed: int) -> Iterator[bytes]:
    """``count`` requests; the first are the known tricks as they are."""
    known, rng = seeds(), np.random.default_rng(seed)
    for number in range(count):
        raw = bytearray(known[number] if number < len(known) else known[rng.integers(len(known))])
        for _ in range(0 if number < len(known) else rng.integers(1, 5)):
            where, other = int(rng.integers(len(raw) + 1)), known[rng.integers(len(known))]
            match rng.integers(6):
                case 0:
                    raw = raw[:where]
                case 1:
                    raw[where : where + 1] = rng.bytes(1)
                case 2:
                    raw[where:where] = rng.bytes(int(rng.integers(1, 40)))
                case 3:
                    raw[where:where] = raw[:where]
                case 4:
                    raw = raw[:where] + other[int(rng.integers(len(other) + 1)) :]
                case 5:
                    raw = bytearray(raw.replace(b"\r\n", (b"\n", b"\r", b"\0", b"\r\n ")[rng.integers(4)], 3))
        yield bytes(raw)


def alive(client: socket.socket) -> bool:
    """Sends one more byte. Whether the server still listened."""
    try:
        client.sendall(b"x")
    except OSError:
        return False
    return True


@contextmanager
def slow_clients(server: Server, count: int) -> Iterator[None]:
    """``count`` clients that send a byte a second, and come back when they are sent away."""
    stop = threading.Event()

    def drip(share: int) -> None:
        clients: dict[int, socket.socket] = {}
        while not stop.is_set():
            for number in range(share, count, CLIENTS):
                if number not in clients:
                    with suppress(OSError):
                        clients[number] = socket.create_connection((HOST, server.port), timeout=1)
                        clients[number].sendall(server.slow[number % len(server.slow)])
                elif not alive(clients[number]):
                    clients.pop(number).close()
            stop.wait(1)
        for client in clients.values():
            client.close()

    threads = [threading.Thread(target=drip, args=(share,)) for share in range(CLIENTS)]
    for thread in threads:
        thread.start()
    time.sleep(3)
    yield
    stop.set()
    for thread in threads:
        thread.join()


def honest(server: Server, times: int) -> tuple[int, float]:
    """How many requests were answered with 200, and the slowest in seconds."""
    answered, slowest = 0, 0.0
    for _ in range(times):
        start = time.monotonic()
        answered += server.send(server.honest) == "200"
        slowest = max(slowest, time.monotonic() - start)
        time.sleep(0.2)
    return answered, slowest


def attack(name: str, server: Server, count: int, seed: int) -> bool:
    """Prints what happened. Whether the server stood."""
    honest(server, 20)
    before, fine = server.memory(), True
    for number in SLOW:
        with slow_clients(server, number):
            answered, slowest = honest(server, 20)
        fine &= answered == 20
        click.echo(f"{name}: {number} slow clients; {answered} of 20 honest requests answered, slowest {slowest:.2f} s")
    with ThreadPoolExecutor(CLIENTS) as pool:
        kinds = Counter(pool.map(server.send, mutated(count, seed)))
    answered, slowest = honest(server, 20)
    alive, after = server.process.poll() is None, server.memory()
    written = server.close()
    fine &= alive and answered == 20 and "Traceback" not in written and not kinds.keys() & {"500", "silence"}
    counts = ", ".join(f"{kind}: {number}" for kind, number in sorted(kinds.items()))
    click.echo(f"{name}: {count} hostile requests; {counts}; then {answered} of 20 answered, slowest {slowest:.2f} s")
    click.echo(f"{name}: {before:.0f} MB before, {after:.0f} MB after; {'stood' if fine else 'FAILED'}")
    if "Traceback" in written:
        click.echo(written[-3000:])
    return fine


@click.command()
@click.argument("bundle", type=click.Path(exists=True))
@click.option("--count", default=2000, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(bundle: str, count: int, seed: int) -> None:
    """Attack both servers of BUNDLE on this machine."""
    picture = pictures()[0]
    start = b"%s HTTP/1.1\r\nHost: localhost\r\n"
    classify = start % b"POST /classify" + b"Content-Type: image/png\r\nContent-Length: %d\r\n\r\n"
    slow = start % b"GET /health" + b"X: "
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        Image.new("RGB", (64, 48), (200, 30, 30)).save(folder / "0.png")
        live = ["-m", "duallora_edge", "run", bundle, "--source", str(folder / "0.png"), "--loop", "--rate", "2"]
        servers = {
            "service": ([str(SERVICE), bundle, "--port", "0"], classify % len(picture) + picture, classify % 100_000),
            "live page": ([*live, "--show", "--listen", f"{HOST}:0"], start % b"GET /state.json" + b"\r\n", slow),
        }
        results = []
        for name, (command, request, other) in servers.items():
            server = Server(command, request, [slow, other], folder / f"{name}.txt")
            stack.callback(server.process.kill)
            results.append(attack(name, server, count, seed))
    if not all(results):
        sys.exit(1)


if __name__ == "__main__":
    main()
