"""Labelling: names become folders, nothing is lost on the way, and only who has the address can do it."""

from __future__ import annotations

import http.client
import io
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from duallora_edge.errors import StoreError
from duallora_edge.learner.data.images import ImageFile
from duallora_edge.runtime.field.keeping import Keeper, kept_frames
from duallora_edge.runtime.prediction import Prediction, Timings
from duallora_edge.runtime.service import label_server
from duallora_edge.runtime.service.label_server import LabelServer

KINDS = {"cup": (200, 60, 60), "hat": (60, 200, 60), "key": (60, 60, 200), "pen": (200, 200, 60), "bag": (60, 200, 200)}


def fill(folder: Path, count: int) -> None:
    """Frames of five kinds, as many of each, which the model took for something else."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(len(KINDS), 32))
    with closing(Keeper(folder, 50, interval_s=0)) as keeper:
        for number in range(count):
            kind = number % len(KINDS)
            features = (centres[kind] + 0.3 * rng.normal(size=32)).astype(np.float32)
            noise = rng.integers(-40, 40, (48, 64, 3))
            pixels = np.clip(np.array(list(KINDS.values())[kind]) + noise, 0, 255).astype(np.uint8)
            values = np.array([0.6, 0.4], np.float32)
            keeper.add(
                pixels,
                Prediction(
                    "dog", 0.6, "t", 1, rng.random(), None, Timings(0, 0, 0), "b", 1, values, ("dog",), features
                ),
            )


def kind_of(jpeg: bytes) -> str:
    with Image.open(io.BytesIO(jpeg)) as image:
        colour = np.asarray(image).mean(axis=(0, 1))
    return min(KINDS, key=lambda name: float(np.abs(colour - KINDS[name]).sum()))


def labelled(folder: Path) -> dict[str, int]:
    """How many files each class has; all are of the kind that the class is named after."""
    found: dict[str, int] = {}
    for path in (folder / "labelled").glob("*/*"):
        assert kind_of(path.read_bytes()) == path.parent.name
        found[path.parent.name] = found.get(path.parent.name, 0) + 1
    return found


def ask(server: LabelServer, path: str, content: Any = None, start: str | None = None) -> tuple[int, Any]:
    address = urlsplit(server.url)
    with closing(http.client.HTTPConnection(address.hostname or "", address.port or 0, timeout=10)) as connection:
        prefix = address.path if start is None else start
        if content is None:
            connection.request("GET", prefix + path)
        else:
            connection.request("POST", prefix + path, json.dumps(content), {"Content-Type": "application/json"})
        response = connection.getresponse()
        body = response.read()
        return response.status, json.loads(body) if response.headers["Content-Type"] == "application/json" else body


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LabelServer]:
    fill(tmp_path, 20)
    with LabelServer(tmp_path, tmp_path / "labelled", port=0) as server:
        yield server


def ids_of(server: LabelServer, kind: str) -> list[int]:
    return [
        frame["id"]
        for frame in ask(server, "frames.json")[1]["frames"]
        if kind_of(ask(server, f"{frame['id']}.jpg")[1]) == kind
    ]


def test_names_become_folders_that_training_reads(server: LabelServer, tmp_path: Path) -> None:
    page = ask(server, "frames.json")[1]
    assert page["count"] == 20 and page["names"] == ["dog"] and page["folder"] == str(tmp_path / "labelled")
    assert ask(server, "name", {"ids": ids_of(server, "cup"), "name": "cup"}) == (200, {"named": 4})
    assert labelled(tmp_path) == {"cup": 4} and len(list(kept_frames(tmp_path))) == 16
    page = ask(server, "frames.json")[1]
    assert page["count"] == 16 and page["names"] == ["cup", "dog"]
    camera, time = ImageFile(next((tmp_path / "labelled" / "cup").iterdir())).taken()
    assert camera == "duallora-edge" and time.year >= 2026  # training tells scenes by them


def test_discarded_frames_are_gone_and_each_step_can_be_undone(server: LabelServer, tmp_path: Path) -> None:
    before = sorted((frame.id, frame.jpeg, frame.features.tobytes()) for frame in kept_frames(tmp_path))
    assert ask(server, "name", {"ids": ids_of(server, "cup"), "name": "cup"})[0] == 200
    assert ask(server, "discard", {"ids": ids_of(server, "hat")}) == (200, {"discarded": 4})
    assert ask(server, "name", {"ids": ids_of(server, "pen")[:1], "name": "cup"})[0] == 200
    assert len(list(kept_frames(tmp_path))) == 11
    assert [ask(server, "undo", {})[0] for _ in range(4)] == [200, 200, 200, 409]
    assert labelled(tmp_path) == {} and not (tmp_path / "labelled" / "cup").exists()
    assert sorted((frame.id, frame.jpeg, frame.features.tobytes()) for frame in kept_frames(tmp_path)) == before


def test_undo_leaves_a_folder_that_was_there(server: LabelServer, tmp_path: Path) -> None:
    (tmp_path / "labelled" / "cup").mkdir(parents=True)
    assert ask(server, "name", {"ids": ids_of(server, "cup"), "name": "cup"})[0] == 200
    assert ask(server, "undo", {})[0] == 200
    assert list((tmp_path / "labelled").iterdir()) == [tmp_path / "labelled" / "cup"] and labelled(tmp_path) == {}


@pytest.mark.parametrize(
    ("path", "content", "words"),
    [
        ("name", {"ids": [1]}, "A name is needed"),
        ("name", {"ids": [1], "name": "x/../y"}, "slashes"),
        ("name", {"ids": [1], "name": " "}, "cannot name a class"),
        ("name", {"ids": [], "name": "x"}, "Frames are needed"),
        ("name", {"ids": [True], "name": "x"}, "Frames are needed"),
        ("name", {"ids": "1", "name": "x"}, "Frames are needed"),
        ("discard", {"ids": [999]}, "load the page again"),
        ("discard", {}, "Frames are needed"),
        ("undo", {}, "nothing to undo"),
    ],
)
def test_what_cannot_be_done(server: LabelServer, tmp_path: Path, path: str, content: Any, words: str) -> None:
    status, body = ask(server, path, content)
    assert status == 409 and words in body.decode()
    assert len(list(kept_frames(tmp_path))) == 20 and labelled(tmp_path) == {}


def test_nobody_without_the_address(server: LabelServer, tmp_path: Path) -> None:
    ids = [frame.id for frame in kept_frames(tmp_path)]
    for start in ("/", "/guess/", urlsplit(server.url).path.swapcase()):
        assert ask(server, "", start=start)[0] == 404
        assert ask(server, "frames.json", start=start)[0] == 404
        assert ask(server, f"{ids[0]}.jpg", start=start)[0] == 404
        assert ask(server, "discard", {"ids": ids}, start=start)[0] == 405
    assert len(list(kept_frames(tmp_path))) == 20
    assert ask(server, "999.jpg")[0] == ask(server, "x.jpg")[0] == ask(server, "1.png")[0] == 404
    assert ask(server, "load", {})[0] == 405


def test_a_batch_at_a_time(server: LabelServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_server, "BATCH", 8)
    page = ask(server, "frames.json")[1]
    assert page["count"] == 20 and len(page["frames"]) == 8
    assert ask(server, "discard", {"ids": [frame["id"] for frame in page["frames"]]})[0] == 200
    page = ask(server, "frames.json")[1]
    assert page["count"] == 12 and len(page["frames"]) == 8


def test_the_camera_goes_on_meanwhile(server: LabelServer, tmp_path: Path) -> None:
    ask(server, "discard", {"ids": ids_of(server, "cup")})
    fill(tmp_path, 5)
    assert ask(server, "frames.json")[1]["count"] == 16 + 1  # four of them show what is there already


KILLED = """
import os, sys
from pathlib import Path
from duallora_edge.runtime.service import label_server
folder = Path(sys.argv[1])
site = label_server._LabelSite(folder, folder / "labelled")
frames = site.load()["frames"]
label_server.remove_kept = lambda *_: os.kill(os.getpid(), 9)
site.post(site.path + "name", "", {"name": "cup", "ids": [frame["id"] for frame in frames[:3]]})
"""


def test_a_kill_between_file_and_record_names_no_frame_twice(tmp_path: Path) -> None:
    fill(tmp_path, 20)
    child = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)])
    assert child.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "labelled" / "cup").iterdir())) == 3 and len(list(kept_frames(tmp_path))) == 20
    with LabelServer(tmp_path, tmp_path / "labelled", port=0) as server:
        assert ask(server, "frames.json")[1]["count"] == 17
    assert len(list(kept_frames(tmp_path))) == 17


def test_nothing_to_label(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="holds no kept frames"):
        LabelServer(tmp_path, tmp_path / "labelled", port=0)


def test_two_hundred_frames_by_the_keyboard(browser: Any, tmp_path: Path) -> None:
    fill(tmp_path, 200)
    with LabelServer(tmp_path, tmp_path / "labelled", port=0) as server:
        page = browser.new_page()
        problems: list[str] = []
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(server.url)
        page.wait_for_selector("#pictures button")
        title, notice = page.locator("#title"), page.locator("#notice")
        assert title.inner_text().startswith("Group 1 of 14")
        assert page.evaluate("document.querySelectorAll('#pictures img')[0].naturalWidth") == 64

        page.keyboard.press("ArrowDown")  # the second group joins the first, and leaves it again
        page.keyboard.press("m")
        assert title.inner_text().startswith("Group 1 of 13")
        page.keyboard.press("u")
        assert title.inner_text().startswith("Group 2 of 14")
        page.keyboard.press("ArrowRight")  # two frames become a group of their own
        page.keyboard.press(" ")
        page.keyboard.press("ArrowRight")
        page.keyboard.press(" ")
        assert title.inner_text().endswith("2 chosen") and page.locator("#assign").inner_text() == "Name 2 frames"
        page.keyboard.press("s")
        assert title.inner_text() == "Group 2 of 15, 2 frames"
        page.keyboard.press("s")
        assert title.inner_text() == "Group 2 of 16, 1 frame"
        page.keyboard.press("u")
        page.keyboard.press("d")
        notice.get_by_text("Discarded 2 frames.").wait_for()
        page.keyboard.press("u")
        notice.get_by_text("Undone.").wait_for()

        left = 200
        while left:
            image = page.locator("#groups [aria-current=true] img").get_attribute("src")
            kind = kind_of(ask(server, image)[1])
            count = int(page.locator("#groups [aria-current=true] span").inner_text())
            page.keyboard.press("Enter")
            page.keyboard.type(kind)
            page.keyboard.press("Enter")
            left -= count
            page.locator("#left").get_by_text(f"{left} frame").or_(page.locator("#end:visible")).wait_for()
        assert page.locator("#end").inner_text().startswith("Nothing is left to name")
        assert labelled(tmp_path) == dict.fromkeys(KINDS, 40) and list(kept_frames(tmp_path)) == []

        page.keyboard.press("u")
        page.wait_for_selector("#pictures button")
        assert len(list(kept_frames(tmp_path))) == count and problems == []
        page.close()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_the_page_fits(browser: Any, server: LabelServer, width: int, scheme: str) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.goto(server.url)
    page.wait_for_selector("#pictures button")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 120) == (scheme == "dark")
    page.close()
