"""Trying a bundle in a child process before this one loads it, and remembering the outcome.

A graph can crash or hang the library that runs it, or ask for all memory. So a bundle that was never loaded here first
answers its golden images in a child process with limits, while the application goes on. The outcome is stored in
``trials`` of the cache folder. A bundle that was refused, or during whose loading the process died twice, is not tried
again until the bundle, its engine or the installed software changes. This prevents restart loops.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from duallora_edge import __version__
from duallora_edge.errors import BackendError, BundleError, ConfigError
from duallora_edge.files import cache_folder, open_lock, own_folder, read_json, write_json
from duallora_edge.runtime.backends.ladder import BACKENDS, Backend, Rung, open_backend
from duallora_edge.runtime.bundle import GRAPHS, Bundle, Manifest
from duallora_edge.runtime.device.probes import ask
from duallora_edge.runtime.process_memory import available_memory

QUESTION = "duallora_edge.runtime.trial:attempt"
TIMEOUT_S = 180.0  # the first session of a GPU provider can take more than a minute
BUILD_TIMEOUT_S = 3600.0  # as long as a build may take by itself
# What a child may hold: libraries (CUDA's alone take half a gigabyte), and the graphs in several forms at once.
LIBRARY_BYTES = 10**9
MODEL_COPIES = 10
MEMORY_SHARE = 0.75  # of what the system has left
MAX_DEATHS = 2
MAX_RECORDS = 200
NICENESS = 10  # the camera has priority
_NAME = re.compile(r"[0-9a-f]{64}\.json")
_SOFTWARE = re.compile(r"(numpy|onnxruntime|onnxruntime_gpu|tensorrt|tensorrt_rtx|cuda_python)-.*\.(dist|egg)-info")


class RefusedError(BackendError):
    """A bundle crashed, hung, or gave wrong answers in its trial, now or before."""


@dataclass(frozen=True)
class Opening:
    """How the backend of a bundle is opened: the arguments of `open_backend`."""

    backend: str = "auto"
    threads: int | None = None
    strict: bool = False
    build: bool = False

    def __call__(self, bundle: Bundle) -> Backend:
        return open_backend(bundle, self.backend, self.threads, self.strict, self.build)


@dataclass(frozen=True)
class _Record:
    """The outcome: ``"trying"``, ``"good"`` on a backend in a precision, or ``"refused"`` for a ``reason``.

    ``deaths``: how often the process died while it was trying, before this time.
    """

    state: str
    bundle: str
    reason: str = ""
    backend: str = ""
    precision: str = ""
    deaths: int = 0


class Trial:
    """Tries bundles that are to be opened by ``opening``."""

    def __init__(self, opening: Opening) -> None:
        self._opening = opening

    @contextmanager
    def passed(self, bundle: Bundle, cancel: threading.Event | None = None) -> Iterator[Rung]:
        """Try a bundle, unless it was loaded before; the block, which gets the rung it will stand on, loads it.

        ``bundle`` may come from `Bundle.peek`; ``cancel`` ends the trial when it is set. Raises `RefusedError` when
        the bundle did not pass, now or before, and `BundleError` when it is damaged.
        """
        with _locked_record(self._file(bundle)) as file:
            before = _read(file)
            if before is not None and before.state == "good":
                yield Rung(before.backend, before.precision)
                return
            deaths = before.deaths + (before.state == "trying") if before else 0
            if before is not None and (before.state == "refused" or deaths >= MAX_DEATHS):
                raise RefusedError(_refusal(bundle, before, file))
            record = _Record("trying", str(bundle), deaths=deaths)
            _write(file, record)
            try:
                rung = self._try(bundle, cancel)
                yield rung
            except RefusedError as error:
                _write(file, replace(record, state="refused", reason=str(error)))
                raise
            except BaseException:  # the bundle is not to blame, and this process lives
                _write(file, before)
                raise
            _write(file, replace(record, state="good", backend=rung.backend, precision=rung.precision))

    def refuse(self, bundle: Bundle, reason: str) -> None:
        """Remember that a bundle that had passed its trial failed later."""
        with _locked_record(self._file(bundle)) as file:
            _write(file, _Record("refused", str(bundle), reason))

    def _try(self, bundle: Bundle, cancel: threading.Event | None) -> Rung:
        arguments = str(bundle.path), bundle.digest, json.dumps(asdict(self._opening))
        timeout_s = TIMEOUT_S + (BUILD_TIMEOUT_S if self._opening.build else 0)
        answer = ask(
            QUESTION, *arguments, timeout_s=timeout_s, memory_bytes=_memory_limit(bundle.manifest), cancel=cancel
        )
        if cancel is not None and cancel.is_set():
            raise BackendError(f"The trial of {bundle.path} was cancelled; start it again.")
        if not answer.ok:
            raise RefusedError(f"{bundle.path} {answer.state} in its trial ({answer.reason}); export the run again.")
        if "damaged" in answer.values:
            raise BundleError(answer.values["damaged"])
        if "refused" in answer.values:
            raise RefusedError(answer.values["refused"])
        return Rung(answer.values["backend"], answer.values["precision"])

    def _file(self, bundle: Bundle) -> Path | None:
        """The record file for this bundle and way of opening, engines and software; None without a cache.

        If engines are built, the trial itself builds them, which must not change the name.
        """
        engines = [] if self._opening.build else engines_of(bundle.manifest)
        facts = [bundle.digest, asdict(self._opening), engines, _software()]
        try:
            folder = own_folder(cache_folder() / "trials")
        except (OSError, ConfigError):
            return None
        return folder / f"{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()}.json"


def attempt(path: str, digest: str, opening: str) -> dict[str, Any]:
    """The child's side: open the bundle of this digest, and let it answer its golden images."""
    with suppress(OSError):
        os.nice(NICENESS)
    try:
        bundle = Bundle.open(path)
        if bundle.digest != digest:
            raise BundleError(f"{path} was replaced during its trial; try it again.")
    except BundleError as error:
        return {"damaged": str(error)}
    try:
        backend = Opening(**json.loads(opening))(bundle)
    except (BackendError, BundleError) as error:
        return {"refused": str(error)}
    return {"backend": backend.name, "precision": backend.precision}


def engines_of(manifest: Manifest) -> list[list[str]]:
    """Name and SHA-256 of the cached engines that were built from a bundle's graphs, in the order of names."""
    if not (cache_folder() / "engines").is_dir():
        return []
    from duallora_edge.runtime.backends.engine_cache import RECORD, engines_folder

    graphs = {manifest.graph(name).sha256 for name in GRAPHS.keys() & manifest.files.keys()}
    found = []
    with suppress(OSError):
        for folder in sorted(engines_folder().iterdir()):
            with suppress(OSError, ValueError, TypeError, KeyError):
                record = read_json(folder / RECORD)
                if record["key"]["model_sha256"] in graphs:
                    found.append([folder.name, str(record["sha256"])])
    return found


def _memory_limit(manifest: Manifest) -> int:
    """The bytes that a child may hold."""
    graphs = sum(manifest.graph(name).bytes for name in GRAPHS.keys() & manifest.files.keys())
    limit = LIBRARY_BYTES + MODEL_COPIES * graphs
    available = available_memory().bytes
    return limit if available is None else min(limit, int(MEMORY_SHARE * available))


def _software() -> list[str]:
    """The software that opens and runs a bundle, with versions."""
    found = [f"duallora-edge {__version__}", f"python {platform.python_version()}"]
    for folder in sys.path:
        with suppress(OSError):  # asking importlib.metadata would take longer than reading the bundle
            found += [name for name in os.listdir(folder or ".") if _SOFTWARE.fullmatch(name)]  # noqa: PTH208
    return sorted(found)


def _refusal(bundle: Bundle, record: _Record, file: Path | None) -> str:
    reason = record.reason or f"the process died {MAX_DEATHS} times while loading it"
    return (
        f"{bundle.path} was refused before and is not tried again until the bundle, its engine or the installation "
        f"changes ({reason.rstrip('.')}); delete {file} to try it anyway."
    )


@contextmanager
def _locked_record(file: Path | None) -> Iterator[Path | None]:
    """A record to be changed; None while another process tries the same bundle and will remember it."""
    if file is None:
        yield None
        return
    try:
        lock = open_lock(file.with_suffix(".lock"))
    except (OSError, ConfigError):  # a cache that cannot be written remembers nothing
        yield None
        return
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield None
            return
        yield file


def _read(file: Path | None) -> _Record | None:
    """The record; None if it is missing or unreadable."""
    if file is not None:
        with suppress(OSError, ValueError, TypeError, OverflowError):
            record = _Record(**read_json(file))
            texts = (record.bundle, record.reason, record.precision)
            known = BACKENDS if record.state == "good" else ("", *BACKENDS)
            if record.backend in known and all(isinstance(text, str) for text in texts):
                return replace(record, deaths=int(record.deaths))
    return None


def _write(file: Path | None, record: _Record | None) -> None:
    """Keep a record, or remove it for None; the oldest records above a limit are deleted."""
    if file is None:
        return
    with suppress(OSError):  # a full disk must not keep a good bundle from being loaded
        if record is None:
            file.unlink(missing_ok=True)
            return
        write_json(file, asdict(record))
        ages = {old: old.stat().st_mtime for old in file.parent.iterdir() if _NAME.fullmatch(old.name)}
        for old in sorted(ages, key=ages.__getitem__)[:-MAX_RECORDS]:
            old.unlink(missing_ok=True)
            old.with_suffix(".lock").unlink(missing_ok=True)
