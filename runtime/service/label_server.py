"""A page on which somebody names the frames that a camera kept."""

from __future__ import annotations

import hmac
import secrets
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

from duallora_edge.errors import DataError, DualLoraEdgeError
from duallora_edge.files import write_atomic
from duallora_edge.runtime.field.grouping import grouped
from duallora_edge.runtime.field.keeping import Kept, file_name, kept_frames, put_back, remove_kept
from duallora_edge.runtime.field.taught_folder import check_name
from duallora_edge.runtime.service.web_server import Reply, Site, WebServer, json_reply, page_reply, refusal

PAGE = "label_page.html"
BATCH = 1000  # frames at a time, the most novel first
UNDO = 50  # steps


class LabelServer(WebServer):
    """Serves a page that names kept frames, from threads of its own, until `close`; `url` holds a token."""

    def __init__(self, keep: Path, output: Path, host: str = "127.0.0.1", port: int = 8081) -> None:
        """Label the frames in ``keep`` into the folder ``output``, at ``host`` and ``port`` (0: any that is free).

        Raises `StoreError` when there are no frames, `ServerError` when the address or the port is not available.
        """
        site = _LabelSite(keep, output)
        site.load()
        super().__init__(site, host, port)
        self._path = site.path

    @property
    def url(self) -> str:
        """The address of the page, which nobody can guess."""
        return super().url + self._path[1:]


@dataclass(frozen=True)
class _Step:
    """Frames that were named or discarded, the files that were written of them, and the folder that was made."""

    frames: list[Kept]
    paths: list[Path] = field(default_factory=list)
    made: Path | None = None


class _LabelSite(Site):
    """The frames that are left, the steps that can be undone, and what is served of them.

    A named frame is a file first and then no longer kept, so that a kill loses none; what was written before a kill is
    removed when the frames are loaded again.
    """

    def __init__(self, keep: Path, output: Path) -> None:
        self.path = f"/{secrets.token_urlsafe(16)}/"
        self._keep, self._output = keep, output
        self._changing = threading.Lock()  # guards the two below
        self._frames: dict[int, Kept] = {}
        self._steps: list[_Step] = []

    def get(self, path: str, query: Mapping[str, str]) -> Reply | None:
        head, rest = path[: len(self.path)], path[len(self.path) :]
        if not hmac.compare_digest(head.encode(errors="replace"), self.path.encode()):
            return None
        if not rest:
            return page_reply(PAGE)
        if rest == "frames.json":
            return self._answer(self.load)
        number, _, kind = rest.partition(".")
        frame = self._frames.get(int(number)) if number.isascii() and number.isdecimal() and kind == "jpg" else None
        return Reply(frame.jpeg, "image/jpeg") if frame else None

    def post(self, path: str, token: str, body: dict[str, Any]) -> Reply | None:
        actions = {"name": self._name, "discard": self._discard, "undo": self._undo}
        head, rest = path[: len(self.path)], path[len(self.path) :]
        if rest not in actions or not hmac.compare_digest(head.encode(errors="replace"), self.path.encode()):
            return None
        return self._answer(lambda: actions[rest](body))

    def load(self) -> dict[str, Any]:
        """The next frames, their groups, and the names that are known."""
        with self._changing:
            folders = [path for path in sorted(self._output.glob("*")) if path.is_dir() and path.name[0] != "."]
            written = {path.name for folder in folders for path in folder.glob("*.jpg")}
            named_before: list[int] = []
            frames: list[Kept] = []
            count = 0
            for frame in kept_frames(self._keep):
                if file_name(frame) in written:
                    named_before.append(frame.id)
                    continue
                count += 1
                if len(frames) < BATCH:
                    frames.append(frame)
            if named_before:
                remove_kept(self._keep, named_before)
            pairs, groups = grouped(frames)
            self._frames = {frame.id: frame for frame in frames}
            return {
                "frames": [
                    {"id": frame.id, "time": frame.time, "label": frame.label, "confidence": frame.confidence}
                    for frame in frames
                ],
                "count": count,
                "pairs": pairs,
                "groups": groups,
                "names": sorted({*(path.name for path in folders), *(frame.label for frame in frames)}),
                "folder": str(self._output),
            }

    def _answer(self, action: Callable[[], dict[str, Any]]) -> Reply:
        try:
            return json_reply(action())
        except (DualLoraEdgeError, OSError) as error:
            return refusal(HTTPStatus.CONFLICT, str(error))

    def _name(self, body: dict[str, Any]) -> dict[str, Any]:
        """Write frames into the folder of a class."""
        name = body.get("name")
        if not isinstance(name, str):
            raise DataError("A name is needed.")
        folder = self._output / check_name(name)
        with self._changing:
            frames = self._chosen(body)
            made = None if folder.exists() else folder
            folder.mkdir(parents=True, exist_ok=True)
            paths = [folder / file_name(frame) for frame in frames]
            for frame, path in zip(frames, paths, strict=True):
                write_atomic(path, frame.jpeg)
            self._take(_Step(frames, paths, made))
        return {"named": len(frames)}

    def _discard(self, body: dict[str, Any]) -> dict[str, Any]:
        """Delete frames."""
        with self._changing:
            frames = self._chosen(body)
            self._take(_Step(frames))
        return {"discarded": len(frames)}

    def _undo(self, body: dict[str, Any]) -> dict[str, Any]:
        """Take the last step back."""
        with self._changing:
            if not self._steps:
                raise DataError("There is nothing to undo.")
            step = self._steps[-1]
            put_back(self._keep, step.frames)
            for path in step.paths:
                path.unlink(missing_ok=True)
            if step.made is not None:
                with suppress(OSError):  # other images are in it by now
                    step.made.rmdir()
            self._frames |= {frame.id: frame for frame in step.frames}
            self._steps.pop()
        return {"back": len(step.frames)}

    def _chosen(self, body: dict[str, Any]) -> list[Kept]:
        ids = body.get("ids")
        if not (isinstance(ids, list) and ids and all(type(each) is int for each in ids)):
            raise DataError("Frames are needed.")
        if not self._frames.keys() >= set(ids):
            raise DataError("Some of these frames are gone; load the page again.")
        return [self._frames[each] for each in dict.fromkeys(ids)]

    def _take(self, step: _Step) -> None:
        remove_kept(self._keep, [frame.id for frame in step.frames])
        for frame in step.frames:
            del self._frames[frame.id]
        self._steps = [*self._steps, step][-UNDO:]
