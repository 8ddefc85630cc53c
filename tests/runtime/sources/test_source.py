"""The thread behind a source, with captures that do as the test says."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from duallora_edge.errors import DataError, SourceError
from duallora_edge.runtime.sources import EndOfStream, Source, open_source
from duallora_edge.runtime.sources import source as source_module
from duallora_edge.runtime.sources.capture import Capture, Picture
from duallora_edge.runtime.sources.policy import Policy

Until = Callable[[Callable[[], object]], None]

STREAM = Policy(live=True, reopens=True, stall=0.2, max_backoff=0.02)
FILE = Policy(live=False, reopens=False)


@pytest.fixture(autouse=True)
def every_thread_ends(monkeypatch: pytest.MonkeyPatch, until: Until) -> Iterator[None]:
    """After each test; captures that hang do so until their event is set, so a source need not wait for them long."""
    monkeypatch.setattr(source_module, "WORKER_END_S", 0.05)
    monkeypatch.setattr(source_module, "CLOSE_S", 0.2)
    yield
    until(lambda: threads() == 0)


def threads() -> int:
    return sum(thread.name.startswith("duallora-edge") for thread in threading.enumerate())


class Script(Capture):
    """Does what its script says: a picture, a number for a frame of that grey, an error to raise, an event to await."""

    def __init__(self, script: Iterator[Any]) -> None:
        self.script = script
        self.closed = threading.Event()

    def read(self) -> Picture | None:
        for step in self.script:
            if isinstance(step, Exception):
                raise step
            if isinstance(step, Picture):
                return step
            if not isinstance(step, threading.Event):
                return Picture(np.full((2, 3, 3), step, np.uint8))
            step.wait()
        return None

    def close(self) -> None:
        self.closed.set()


class Scripts:
    """An opener that gives one capture after the other; an error is raised instead of opening."""

    def __init__(self, *scripts: Any) -> None:
        self.scripts = iter(scripts)
        self.opened: list[Script] = []

    def __call__(self, stop: threading.Event) -> Capture:
        script = next(self.scripts, SourceError("The camera is gone; connect it."))
        if isinstance(script, Exception):
            raise script
        self.opened.append(Script(iter(script)))
        return self.opened[-1]


def grey(source: Source) -> int:
    """The brightness of the next frame, however long it takes."""
    frame = next(iter(source))
    return int(frame.pixels[0, 0, 0])


def test_a_file_loses_nothing_however_slow_the_reader() -> None:
    with Source(Scripts(range(50)), "film", FILE) as source:
        time.sleep(0.05)
        assert source.stats.captured == 1 and source.stats.connected
        assert [(frame.sequence, int(frame.pixels[0, 0, 0])) for frame in source] == [(n, n) for n in range(50)]
        stats = source.stats
    assert (stats.captured, stats.delivered, stats.dropped, stats.connected) == (50, 50, 0, False)


def test_a_camera_drops_the_oldest(until: Until) -> None:
    """The reader gets the newest frames, and the sequence shows how many it missed."""
    more = threading.Event()
    policy = Policy(live=True, reopens=False, buffer=2)
    with Source(Scripts([*range(20), more, 20]), "camera", policy) as source:
        until(lambda: source.stats.captured == 20)
        frames = [source.read(), source.read()]
        assert [frame.sequence for frame in frames if frame is not None] == [18, 19]
        assert (source.stats.dropped, source.stats.delivered) == (18, 2)
        more.set()
        assert [frame.sequence for frame in source] == [20]


def test_times_of_a_frame() -> None:
    before, wall = time.monotonic(), time.time()
    with Source(Scripts([1, 2]), "film", FILE) as source:
        first, second = source
    assert before <= first.captured <= second.captured <= time.monotonic()
    assert wall <= first.timestamp <= second.timestamp <= time.time()


@pytest.mark.parametrize(("age", "shown"), [(7.0, 7.0), (0.0, 0.0), (-7.0, 0.0)])
def test_a_capture_that_knows_its_time(age: float, shown: float) -> None:
    """A clock that is wrong cannot put a frame into the future."""
    picture = Picture(np.zeros((2, 3, 3), np.uint8), captured=time.monotonic() - age)
    with Source(Scripts([picture]), "film", FILE) as source:
        (frame,) = source
    assert abs(time.monotonic() - frame.captured - shown) < 2
    assert abs(time.time() - frame.timestamp - shown) < 2


def test_a_timeout_is_no_error() -> None:
    more = threading.Event()
    with Source(Scripts([more, 7]), "film", FILE) as source:
        assert source.read(timeout=0.01) is None and source.read(timeout=0) is None
        assert source.stats.timeouts == 2
        more.set()
        assert grey(source) == 7


@pytest.mark.parametrize(
    "end",
    [
        [],  # the stream ends
        [SourceError("The cable is out.")],
        [OSError("input/output error")],
        [threading.Event()],  # it stalls inside the library
    ],
)
@pytest.mark.parametrize("failures", [0, 3])
def test_a_camera_that_is_lost_comes_back(end: list[Any], failures: int, until: Until) -> None:
    gone = [SourceError("It is not there.")] * failures
    forever = threading.Event()
    scripts = Scripts([1, *end], *gone, [2, forever])
    with Source(scripts, "camera", STREAM) as source:
        assert grey(source) == 1
        assert grey(source) == 2
        stats = source.stats
        assert (stats.reconnects, stats.delivered, stats.connected) == (1, 2, True)
        assert stats.last_error is not None
    for event in (forever, *(step for step in end if isinstance(step, threading.Event))):
        event.set()
    until(lambda: all(capture.closed.is_set() for capture in scripts.opened))


def test_a_camera_whose_first_frame_takes_time_is_lost_as_soon_as_any(
    monkeypatch: pytest.MonkeyPatch, until: Until
) -> None:
    monkeypatch.setattr(source_module, "START_S", 1e6)
    first, hang = threading.Event(), threading.Event()
    with Source(Scripts([first, 1, hang]), "camera", Policy(live=True, reopens=True, stall=0.05, wait=True)) as source:
        assert source.read(timeout=0.1) is None
        first.set()
        until(lambda: "gave no frame for 0.05 s" in (source.stats.last_error or ""))
    hang.set()


def test_late_frames_of_a_capture_that_was_given_up_are_ignored(until: Until) -> None:
    hang, forever = threading.Event(), threading.Event()
    scripts = Scripts([1, hang, 99, 98], [2, forever])
    with Source(scripts, "camera", STREAM) as source:
        assert (grey(source), grey(source)) == (1, 2)
        hang.set()
        until(scripts.opened[0].closed.is_set)
        assert source.read(timeout=0.02) is None and source.stats.captured == 2
    forever.set()


def test_pauses_double_up_to_the_limit(monkeypatch: pytest.MonkeyPatch, until: Until) -> None:
    monkeypatch.setattr(source_module, "FIRST_BACKOFF_S", 0.01)
    moments: list[float] = []

    def opener(stop: threading.Event) -> Capture:
        moments.append(time.monotonic())
        raise SourceError("It is not there.")

    with Source(opener, "camera", Policy(live=True, reopens=True, max_backoff=0.08, wait=True)) as source:
        until(lambda: len(moments) == 7)
        assert source.stats.last_error == "It is not there." and source.stats.reconnects == 0
    pauses = np.diff(moments)
    assert all(pauses >= [0.01, 0.02, 0.04, 0.08, 0.08, 0.08])


def test_threads_that_hang_do_not_pile_up(until: Until) -> None:
    hang = threading.Event()
    scripts = Scripts(*([[1, hang]] * 20))
    with Source(scripts, "camera", Policy(live=True, reopens=True, stall=0.02, max_backoff=0.01)) as source:
        until(lambda: "restart the program" in (source.stats.last_error or ""))
        assert len(scripts.opened) == source_module.MAX_STUCK
        hang.set()
        until(lambda: len(scripts.opened) > source_module.MAX_STUCK)


@pytest.mark.parametrize("script", [SourceError("It is not there."), [], OSError("busy")])
def test_a_camera_that_cannot_be_opened_is_an_error_at_once(script: Any) -> None:
    with pytest.raises(SourceError):
        Source(Scripts(script), "camera", STREAM)


def test_a_camera_that_never_answers_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "START_S", 0.05)
    hang = threading.Event()
    with pytest.raises(SourceError, match=r"gave no frame for 0\.2 s; check the camera"):
        Source(Scripts([hang]), "camera", STREAM)
    hang.set()


def test_a_picture_that_cannot_be_used_is_counted_and_left_out() -> None:
    reasons = [DataError(f"Picture {number} is damaged.") for number in range(12)]
    with Source(Scripts([1, *reasons, 2]), "folder", FILE) as source:
        assert [frame.sequence for frame in source] == [0, 1]
        assert source.stats.refused == 12
        assert source.stats.refusals == tuple(map(str, reasons[2:]))


def test_what_breaks_in_the_middle_is_an_error_after_the_good_frames() -> None:
    with Source(Scripts([1, 2, OSError("disk gone")]), "film", FILE) as source:
        assert (grey(source), grey(source)) == (1, 2)
        for _ in range(2):
            with pytest.raises(SourceError, match=r"film failed \(OSError: disk gone\)"):
                source.read()
        assert source.stats.last_error == "OSError: disk gone"


@pytest.mark.parametrize("policy", [FILE, STREAM])
def test_closing_ends_a_read_that_waits(policy: Policy) -> None:
    hang = threading.Event()
    source = Source(Scripts([1, hang]), "camera", policy)
    grey(source)
    with ThreadPoolExecutor(3) as pool:
        reads = [pool.submit(source.read, 60.0) for _ in range(2)]
        iteration = pool.submit(list, source)
        source.close()
        assert all(isinstance(read.exception(10), EndOfStream) for read in reads)
        assert iteration.result(10) == []
    source.close()
    with pytest.raises(EndOfStream):
        source.read()
    assert (source.stats.connected, source.stats.last_error) == (False, None)
    hang.set()


def test_closing_drops_what_waits() -> None:
    source = Source(Scripts(range(5)), "film", FILE)
    source.close()
    with pytest.raises(EndOfStream):
        source.read()
    assert list(source) == []


def test_a_signal_may_close_the_source_that_is_being_read() -> None:
    hang = threading.Event()
    source = Source(Scripts([hang]), "film", FILE)
    old = signal.signal(signal.SIGUSR1, lambda *_: source.close())
    try:
        timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1))
        timer.start()
        with pytest.raises(EndOfStream):
            source.read(timeout=60)
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, old)
        hang.set()


def test_eight_threads_share_the_frames() -> None:
    with Source(Scripts(range(200)), "film", FILE) as source, ThreadPoolExecutor(8) as pool:
        parts = [pool.submit(list, source) for _ in range(8)]
        assert sorted(frame.sequence for part in parts for frame in part.result(20)) == list(range(200))


def test_a_rate_is_kept_whatever_the_reader_does() -> None:
    """Nothing comes early; a live source drops what a slow reader leaves."""
    policy = Policy(live=False, reopens=False, rate=200)
    with Source(Scripts(range(21)), "film", policy) as source:
        moments = [frame.captured for frame in source]
    assert moments[-1] - moments[0] >= 20 / 200 * 0.99
    with Source(Scripts(range(21)), "film", Policy(live=True, reopens=False, rate=200)) as source:
        for _ in source:
            time.sleep(0.03)
        assert source.stats.dropped >= 5 and source.stats.captured == 21


def test_looping_ends_when_a_pass_gives_nothing() -> None:
    policy = Policy(live=False, reopens=False, loop=True)
    with Source(Scripts([1, 2], [3], []), "folder", policy) as source:
        assert [int(frame.pixels[0, 0, 0]) for frame in source] == [1, 2, 3]
        assert [frame.sequence for frame in source] == []


def test_passwords_are_not_told(until: Until) -> None:
    leak = SourceError("rtsp://user:top@secret@camera/ is gone.")
    with Source(Scripts([1, leak], leak), "rtsp://user:top@secret@camera/", STREAM) as source:
        until(lambda: source.stats.last_error)
        assert source.stats.last_error == "rtsp://***@camera/ is gone."
        assert "secret" not in source.description
    with pytest.raises(SourceError) as caught:
        Source(Scripts(leak), "camera", STREAM)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("kind", ["arrays", "folder", "video", "camera"])
def test_fifty_sources_leave_nothing_behind(
    kind: str, image_folder: Path, make_video: Callable[..., Path], until: Until
) -> None:
    openers: dict[str, Callable[[], Source]] = {
        "arrays": lambda: open_source([np.zeros((4, 4), np.uint8)] * 5),
        "folder": lambda: open_source(image_folder, loop=True, live=True),
        "video": lambda: open_source(make_video(frames=3)),
        "camera": lambda: Source(Scripts(iter(lambda: 1, 2)), "camera", STREAM),
    }
    opener = openers[kind]

    def files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    def once() -> None:
        with opener() as source:
            source.read()

    once()
    until(lambda: threads() == 0)
    before = files()
    for _ in range(50):
        once()
    until(lambda: threads() == 0 and files() <= before)
