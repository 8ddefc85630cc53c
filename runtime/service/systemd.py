"""Telling systemd that a service is ready and alive: https://www.freedesktop.org/software/systemd/man/sd_notify.html."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

SOCKET = "NOTIFY_SOCKET"
WATCHDOG = "WATCHDOG_USEC"


def notify(text: str) -> None:
    """Send lines such as ``READY=1`` to systemd; does nothing when it did not start this process or does not ask."""
    address = os.environ.get(SOCKET, "")
    if not address.startswith(("/", "@")):
        return
    # A leading "@" is how an address without a file is written down.
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as connection:
        connection.sendto(text.encode(), address.replace("@", "\0", 1))


@contextmanager
def watchdog(healthy: Callable[[], bool]) -> Iterator[None]:
    """Tell systemd every half of its ``WatchdogSec`` that the service is alive, as long as ``healthy`` says so."""
    interval = os.environ.get(WATCHDOG, "")
    if not interval.isdecimal() or int(interval) == 0:
        yield
        return
    stop = threading.Event()

    def tell() -> None:
        while not stop.wait(int(interval) / 2e6):
            if healthy():
                notify("WATCHDOG=1")

    thread = threading.Thread(target=tell, name="duallora-edge watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
