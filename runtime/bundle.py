"""A bundle: the folder that a device receives, its manifest, and a reader that trusts nothing in it.

Every file is read once, through one open folder, so the bytes that were hashed are the bytes that are parsed and
executed, even if the files are replaced meanwhile.

BUNDLE/manifest.json       what the model expects and returns, and size and SHA-256 of every other file
BUNDLE/model.onnx          the graph: uint8 images in, calibrated probabilities out
BUNDLE/model-fp16.onnx     the same with half-precision products, for GPUs; not in every bundle
BUNDLE/prefix-*.onnx, suffix-*.onnx  the same in two parts, for engines that are rebuilt quickly; not in every bundle
BUNDLE/model.safetensors   the weights of all graphs, in fp32
BUNDLE/golden.safetensors  generated images and the outputs that the original model gave for them
BUNDLE/teach.safetensors   how features vary within a class, to teach further ones; not in every bundle
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import mmap
import os
import re
import reprlib
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from duallora_edge.device_profiles.reader import Section
from duallora_edge.errors import BundleError
from duallora_edge.files import MAX_JSON_BYTES
from duallora_edge.folder_kind import folder_kind
from duallora_edge.runtime.graph_weights import WEIGHTS
from duallora_edge.runtime.preprocess import Pixels, Preprocessing
from duallora_edge.runtime.tensor_file import TensorFile
from duallora_edge.text import UNSAFE, escaped

SCHEMA = 3
MANIFEST = "manifest.json"
MODEL = "model.onnx"
MODEL_FP16 = "model-fp16.onnx"
GOLDEN = "golden.safetensors"
TEACH = "teach.safetensors"
INPUT = "image"
OUTPUTS = ("probabilities", "task_probabilities", "novelty", "features")
BETWEEN = ("tokens", "phi")
"""What the frozen prefix hands to the suffix where a bundle holds them as two graphs."""

MAX_FILES = 64
MAX_FILE_BYTES = 2**31 - 1  # what one protobuf message may have, and what no supported ViT exceeds
MAX_FEATURES = 2**20
MAX_BATCH = 1024
PRECISIONS = ("fp32", "fp16")
MAX_DIFFERENCE = {"fp32": 1e-3, "fp16": 2e-2}
"""By how much a probability may differ from that of the trained model, by precision."""
MAX_NOVELTY_DIFFERENCE = 0.05
"""By how much a novelty may differ: wide, because for training images it is a small difference of large numbers."""
MAX_FEATURE_DIFFERENCE = {"fp32": 1e-2, "fp16": 5e-2}
"""By how much the features of an image may differ, as a share of their length, by precision."""
MAX_PROBLEMS = 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_BLOCK = 2**20
_READ_ATTEMPTS = 10  # of a bundle that is replaced while it is read

FloatArray = npt.NDArray[np.float32]
Buffer = bytes  # a record has a field of that name


@dataclass(frozen=True, eq=False)
class Outputs:
    """What the graph returns for N images, all float32.

    ``probabilities [N, C]`` are calibrated and sum to 1 over the classes, ``task_probabilities [N, T]`` over the
    tasks, ``novelty [N]`` is the share of validation images of known classes that look less novel (0..1),
    ``features [N, d]`` describe the image.
    """

    probabilities: FloatArray
    task_probabilities: FloatArray
    novelty: FloatArray
    features: FloatArray


@dataclass(frozen=True, eq=False)
class Golden(Outputs):
    """Generated images, ``image: uint8 [N, S, S, 3]``, and the outputs of the model before its export."""

    image: Pixels


@dataclass(frozen=True)
class Task:
    """A task and the classes it brought examples of, as indices into the class list, in any order.

    A class may belong to several tasks: a known class that was met again in another domain.
    """

    name: str
    classes: tuple[int, ...]


@dataclass(frozen=True)
class Calibration:
    """``temperature`` is inside the graph already; an image is novel when its novelty exceeds the threshold.

    ``confidence_deciles`` are the nine deciles of the confidence on test images, 0..1, by which drift is noticed; empty
    where nothing was measured.
    """

    temperature: float
    novelty_threshold: float | None
    method: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    confidence_deciles: tuple[float, ...] = ()


@dataclass(frozen=True)
class FileRecord:
    """SHA-256 (hexadecimal) and size of a file in the bundle."""

    sha256: str
    bytes: int

    @classmethod
    def of(cls, content: Buffer) -> FileRecord:
        """The record of a file with this content."""
        return cls(hashlib.sha256(content).hexdigest(), len(content))


@dataclass(frozen=True)
class Manifest:
    """Everything a device needs to know about a bundle; ``target``, ``parity`` and ``provenance`` are free JSON.

    ``feature_size`` is d of the output ``features [N, d]``; the other tensor shapes follow from the number of
    classes, the number of tasks and the image size. ``batch`` is the number of images in one run of the graph, None
    where it takes any number. ``precision`` is what a GPU should use: with fp16 there is a second graph, in which it
    is baked in. ``workspace_mb`` limits the memory (in 10^6 bytes) with which TensorRT builds an engine.
    With ``split``, the graph for a GPU also exists in two parts, and a new task changes only the second one.
    ``backends`` are those to try on the device, best first; none: all that the runtime knows. ``graphs`` has the
    records of graphs with their weights inside (see `graph_weights.inlined`), by which engines are known.
    """

    bundle_version: int
    name: str
    classes: tuple[str, ...]
    tasks: tuple[Task, ...]
    preprocessing: Preprocessing
    feature_size: int
    calibration: Calibration
    files: Mapping[str, FileRecord]
    graphs: Mapping[str, FileRecord] = field(default_factory=dict)
    batch: int | None = None
    precision: str = "fp32"
    workspace_mb: int = 512
    split: bool = False
    backends: tuple[str, ...] = ()
    target: Mapping[str, Any] = field(default_factory=dict)
    parity: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def output_shapes(self, images: int) -> dict[str, tuple[int, ...]]:
        """The shape of every output for a batch of ``images``."""
        columns = {"probabilities": len(self.classes), "task_probabilities": len(self.tasks)}
        columns["features"] = self.feature_size
        return {name: (images, columns[name]) if name in columns else (images,) for name in OUTPUTS}

    def graph(self, name: str) -> FileRecord:
        """The record of a graph with its weights inside. Raises ``KeyError`` where the bundle has no such graph."""
        return self.graphs.get(name) or self.files[name]

    def to_json(self) -> dict[str, Any]:
        """The content of manifest.json."""
        rows, size = self.batch or "N", self.preprocessing.size
        return {
            "schema": SCHEMA,
            "bundle_version": self.bundle_version,
            "name": self.name,
            "classes": list(self.classes),
            "tasks": [{"name": task.name, "classes": list(task.classes)} for task in self.tasks],
            "preprocessing": self.preprocessing.to_json(),
            "input": {"name": INPUT, "dtype": "uint8", "shape": [rows, size, size, 3]},
            "outputs": {
                name: {"dtype": "float32", "shape": [rows, *shape[1:]]} for name, shape in self.output_shapes(1).items()
            },
            "engine": {
                "precision": self.precision,
                "workspace_mb": self.workspace_mb,
                "split": self.split,
                "backends": list(self.backends),
            },
            "calibration": {
                **self.calibration.extra,
                "temperature": self.calibration.temperature,
                "novelty_threshold": self.calibration.novelty_threshold,
                "method": self.calibration.method,
                "confidence_deciles": list(self.calibration.confidence_deciles),
            },
            "target": dict(self.target),
            "parity": dict(self.parity),
            "provenance": dict(self.provenance),
            "files": {name: asdict(record) for name, record in self.files.items()},
            "graphs": {name: asdict(record) for name, record in self.graphs.items()},
        }

    @classmethod
    def from_json(cls, document: object) -> Manifest:
        """Read the content of manifest.json; keys it does not know are ignored.

        Raises `BundleError` for an unknown schema, or with every problem at once.
        """
        schema = document.get("schema") if isinstance(document, dict) else None
        if not isinstance(document, dict) or type(schema) is not int:
            raise BundleError("The manifest has no schema version, so this is not a bundle; export the run again.")
        if schema != SCHEMA:
            remedy = "upgrade duallora-edge on this device" if schema > SCHEMA else "export the run again"
            raise BundleError(f"The manifest has schema {reprlib.repr(schema)}, this version reads {SCHEMA}; {remedy}.")
        problems: list[str] = []
        try:
            # NaN, infinities and lone surrogates are read by Python, but are neither JSON nor printable.
            json.dumps(document, ensure_ascii=False, allow_nan=False).encode()
            manifest = _read_manifest(Section(document, "", problems))
        except (ValueError, OverflowError, RecursionError) as error:
            raise BundleError(f"The manifest is not valid ({str(error)[:200]}); export the run again.") from error
        if problems or manifest is None:
            more = f"; and {len(problems) - MAX_PROBLEMS} more" if len(problems) > MAX_PROBLEMS else ""
            listed = "; ".join(problems[:MAX_PROBLEMS])
            raise BundleError(f"The manifest is not valid ({listed}{more}); export the run again.")
        return manifest


def gpu_graphs(precision: str, split: bool) -> tuple[str, ...]:
    """The names of the graphs of which engines for a GPU are built, in the order in which they run."""
    if split:
        return f"prefix-{precision}.onnx", f"suffix-{precision}.onnx"
    return (MODEL if precision == "fp32" else f"model-{precision}.onnx",)


GRAPHS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    graph: ((INPUT,) if place == 0 else BETWEEN, OUTPUTS if place == len(graphs) - 1 else BETWEEN)
    for graphs in (gpu_graphs(precision, split) for precision in PRECISIONS for split in (False, True))
    for place, graph in enumerate(graphs)
}
"""What each graph that a bundle may hold reads and returns."""


class Content:
    """Verified bytes in memory that no other process can change, until the last reference to them goes.

    On Linux it is a file without a name: a library reads it by its path, and needs no further copy of a large model.
    """

    def __init__(self, content: bytes = b"") -> None:
        named = hasattr(os, "memfd_create")
        self._file = os.fdopen(os.memfd_create("duallora-edge"), "w+b", buffering=0) if named else io.BytesIO()
        self.source = f"/proc/self/fd/{self._file.fileno()}" if named else None
        self.write(content)

    def write(self, block: bytes) -> None:
        """Add bytes at the end."""
        view = memoryview(block)
        while view:
            view = view[self._file.write(view) :]

    def read(self) -> bytes:
        """All bytes."""
        self._file.seek(0)
        return self._file.read()

    def view(self) -> memoryview:
        """All bytes, mapped where that can be done."""
        if self.source is None or not self._file.tell():
            return memoryview(self.read())
        return memoryview(mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ))


@dataclass(frozen=True)
class Bundle:
    """A bundle that was opened: every file is there and unaltered.

    Attributes:
        path: The folder.
        manifest: What manifest.json says.
        digest: SHA-256 of the manifest, which holds those of all other files: bundles with the same digest are equal.
        contents: The verified graphs and golden outputs; by far the largest part in memory.
    """

    path: Path
    manifest: Manifest
    digest: str
    contents: Mapping[str, Content] = field(default_factory=dict, repr=False, compare=False)

    def __str__(self) -> str:
        return escaped(f"{self.manifest.name}, version {self.manifest.bundle_version}")

    @property
    def model_path(self) -> Path:
        """The ONNX file in fp32."""
        return self.path / MODEL

    def graph(self, precision: str) -> Path:
        """The ONNX file of a precision that the manifest names, or fp32."""
        return self.path / gpu_graphs(precision, split=False)[0]

    @property
    def in_fp32(self) -> Bundle:
        """The same bundle as one fp32 graph."""
        return replace(self, manifest=replace(self.manifest, precision="fp32", split=False))

    @property
    def without_contents(self) -> Bundle:
        """The same bundle without its large contents, for use once the model is loaded."""
        return replace(self, contents={})

    @property
    def gpu_graphs(self) -> tuple[Path, ...]:
        """The ONNX files of which engines for a GPU are built, in the order in which they run: one, or two parts."""
        return tuple(self.path / name for name in gpu_graphs(self.manifest.precision, self.manifest.split))

    @classmethod
    def open(cls, path: str | Path, tried: str | None = None) -> Bundle:
        """Open a bundle: read every file once and compare it with the manifest.

        A bundle that is replaced meanwhile is read as it was before or after.

        Args:
            path: The folder of the bundle.
            tried: The digest of a bundle that was opened on this machine before. Any other bundle is refused, and the
                graphs of this one are not checked node by node again.

        Returns:
            The verified bundle.

        Raises:
            BundleError: A file is missing, altered or damaged, or the folder is not a bundle.
        """
        bundle = cls._read(Path(path), whole=True)
        if tried is None:
            bundle._check_graphs()
        elif bundle.digest != tried:
            raise BundleError(f"{path} was replaced during its trial; try it again.")
        return bundle

    @classmethod
    def peek(cls, path: str | Path) -> Bundle:
        """Read only the manifest of a bundle.

        Args:
            path: The folder of the bundle.

        Returns:
            The bundle without its contents; its other files are not verified.

        Raises:
            BundleError: The manifest is missing or damaged, or the folder is not a bundle.
        """
        return cls._read(Path(path), whole=False)

    @classmethod
    def _read(cls, root: Path, whole: bool) -> Bundle:
        for _ in range(_READ_ATTEMPTS):
            with _opened(root) as folder:
                try:
                    return _read_folder(root, folder, whole)
                except BundleError:
                    if not _is_replaced(root, folder):
                        raise
        raise BundleError(f"{root} keeps being replaced while it is read; try again later.")

    def _check_graphs(self) -> None:
        from duallora_edge.runtime.graph_check import (
            check_graph,
        )  # here, because bundles that passed a trial do not need it

        name = ""
        try:
            weights = self.weights
            for name in GRAPHS.keys() & self.contents.keys():
                check_graph(self.contents[name].view(), *GRAPHS[name], weights)
        except BundleError as error:
            raise BundleError(f"{self.path / name}: {error}") from error

    def content(self, name: str) -> Content:
        """A verified graph, the weights or the golden outputs. Raises `BundleError` where they were let go."""
        try:
            return self.contents[name]
        except KeyError:
            raise BundleError(f"{self.path / name} is no longer in memory; open the bundle again.") from None

    @property
    def weights(self) -> TensorFile | None:
        """The weights of the graphs, None where these hold them. Raises `BundleError` for a damaged file."""
        return self.tensors(WEIGHTS) if WEIGHTS in self.manifest.files else None

    def tensors(self, name: str) -> TensorFile:
        """The tensors in a file of the bundle. Raises `BundleError` for a damaged one."""
        try:
            return TensorFile(self.content(name).view())
        except ValueError as error:
            raise BundleError(f"{self.path / name} cannot be read ({error}); export the run again.") from error

    def golden(self) -> Golden:
        """Read the golden images and outputs.

        Returns:
            Generated images, and the outputs of the model before its export.

        Raises:
            BundleError: They are damaged, do not fit the manifest, or are no longer in memory.
        """
        file, tensors = self.path / GOLDEN, self.tensors(GOLDEN)
        try:
            arrays = {name: tensors[name] for name in (INPUT, *OUTPUTS)}
        except KeyError as error:
            raise BundleError(f"{file} lacks {error}; export the run again.") from None
        size, images = self.manifest.preprocessing.size, len(np.atleast_1d(arrays[INPUT]))
        expected = {INPUT: (images, size, size, 3), **self.manifest.output_shapes(images)}
        for name, array in arrays.items():
            dtype = np.dtype(np.uint8 if name == INPUT else np.float32)
            if array.dtype != dtype or array.shape != expected[name] or images == 0 or not np.isfinite(array).all():
                raise BundleError(
                    f"{file}: '{name}' must be finite {dtype} {list(expected[name])} for at least one image, "
                    f"not {array.dtype} {list(array.shape)}; export the run again."
                )
        return Golden(**arrays)


@contextmanager
def _opened(root: Path) -> Iterator[int]:
    """The folder ``root`` (or the target of that link), held open so that all names are looked up in it."""
    try:
        folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise BundleError(f"{root} is not a folder; give the folder that 'duallora-edge export' wrote.") from error
    try:
        yield folder
    finally:
        os.close(folder)


def _is_replaced(root: Path, folder: int) -> bool:
    try:
        return not os.path.samestat(root.stat(), os.fstat(folder))
    except OSError:
        return False


def _read_folder(root: Path, folder: int, whole: bool) -> Bundle:
    file = root / MANIFEST
    try:
        with _opened_file(folder, MANIFEST) as stream:
            content = stream.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        if folder_kind(root) == "run":
            remedy = f"'duallora-edge export {root} -o BUNDLE' makes one"
            raise BundleError(f"{root} is a run, not a bundle; {remedy}.") from error
        if error.errno == errno.ELOOP:
            raise BundleError(
                f"{root} holds links in place of files, as the cache of the Hugging Face Hub does; copy it with "
                "'cp -rL', or fetch it with 'hf download --local-dir'."
            ) from error
        raise BundleError(f"{root} has no {MANIFEST}, so it is not a bundle; copy the whole folder again.") from error
    try:
        if len(content) > MAX_JSON_BYTES:
            raise ValueError(f"larger than {MAX_JSON_BYTES} bytes")
        manifest = Manifest.from_json(json.loads(content.decode()))
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{file} cannot be read ({escaped(str(error))[:200]}); copy the bundle again.") from error
    except BundleError as error:
        raise BundleError(f"{file}: {error}") from error
    contents: dict[str, Content] = {}
    for name, record in manifest.files.items() if whole else ():
        contents |= _verified(root, folder, name, record)
    return Bundle(root, manifest, hashlib.sha256(content).hexdigest(), contents)


@contextmanager
def _opened_file(folder: int, name: str) -> Iterator[BinaryIO]:
    """A regular file in an open folder; follows no link and waits for no pipe. Raises ``OSError``."""
    handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    with os.fdopen(handle, "rb") as stream:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError("not a regular file")
        yield stream


def _verified(root: Path, folder: int, name: str, record: FileRecord) -> dict[str, Content]:
    """The content of a file that will be parsed or executed, by its name, after it was compared with the manifest.

    Other files are compared as well, but not kept.
    """
    file, digest = root / name, hashlib.sha256()
    content = Content() if name in GRAPHS or name in (WEIGHTS, GOLDEN, TEACH) else None
    try:
        with _opened_file(folder, name) as stream:
            size = os.fstat(stream.fileno()).st_size
            if size != record.bytes:
                raise BundleError(f"{file} has {size} bytes instead of {record.bytes}; copy the whole bundle again.")
            left = size + 1  # a growing file must not be read forever
            while block := stream.read(min(left, _BLOCK)):
                digest.update(block)
                left -= len(block)
                if content is not None:
                    content.write(block)
    except OSError as error:
        raise BundleError(f"{file} is missing or leads outside the bundle; copy the whole bundle again.") from error
    if digest.hexdigest() != record.sha256:
        raise BundleError(f"{file} was altered (its SHA-256 differs from the manifest); copy the whole bundle again.")
    return {} if content is None else {name: content}


def _read_manifest(top: Section) -> Manifest | None:
    """The manifest, or None when something was added to the list of problems."""
    classes = _names(top, "classes")
    tasks = _read_tasks(top, len(classes))
    preprocessing = _read_preprocessing(top.section("preprocessing"))
    features = top.section("outputs").section("features")
    shape = features.values.get("shape")
    feature_size = shape[1] if isinstance(shape, list) and len(shape) == 2 else None
    if type(feature_size) is not int or not 1 <= feature_size <= MAX_FEATURES:
        features.problem("shape", f'must be ["N", d] with d from 1 to {MAX_FEATURES}')
    image = top.section("input")
    rows = image.values.get("shape")
    batch = rows[0] if isinstance(rows, list) and rows and rows[0] != "N" else None
    if batch is not None and (type(batch) is not int or not 1 <= batch <= MAX_BATCH):
        image.problem("shape", f'must begin with "N" or a number of images from 1 to {MAX_BATCH}')
        batch = None
    engine = top.section("engine")
    precision = engine.choice("precision", PRECISIONS)
    files, graphs = _read_files(top.section("files")), _read_records(top.section("graphs"))
    for graph in sorted(graphs.keys() - GRAPHS.keys() & files.keys()):
        top.problem("graphs", f"{reprlib.repr(graph)} is not a graph in the list of files")
    split = engine.boolean("split")
    for key, parts in (("precision", False), *((("split", True),) if split else ())):
        missing = [name for name in gpu_graphs(precision, parts) if name not in files]
        if missing:
            engine.problem(key, f"needs {', '.join(missing)}, missing from the list of files")
    manifest = Manifest(
        bundle_version=top.integer("bundle_version", 1, 2**53),
        name=_name(top, "name"),
        classes=classes,
        tasks=tasks,
        preprocessing=preprocessing or Preprocessing(8),
        feature_size=feature_size if type(feature_size) is int else 1,
        calibration=_read_calibration(top.section("calibration")),
        files=files,
        graphs=graphs,
        batch=batch,
        precision=precision or "fp32",
        workspace_mb=engine.integer("workspace_mb", 16, 2**20),
        split=split,
        backends=engine.texts("backends"),
        target=top.section("target").values,
        parity=top.section("parity").values,
        provenance=top.section("provenance").values,
    )
    if top.problems:
        return None
    written = manifest.to_json()
    for key in ("input", "outputs"):
        given = top.section(key).values
        for name, value in written[key].items():
            if given.get(name) != value:
                top.problem(f"{key}.{name}", f"does not match the classes, tasks and image size, which give {value}")
    return None if top.problems else manifest


def _name(section: Section, key: str) -> str:
    value = section.text(key)
    if UNSAFE.search(value):
        section.problem(key, "must not contain control characters or change the text direction")
    return value


def _names(section: Section, key: str) -> tuple[str, ...]:
    values = section.texts(key)
    if section.has(key) and section.values[key] == []:
        section.problem(key, "must not be empty")
    if len(set(values)) < len(values):
        section.problem(key, "contains the same name twice")
    if any(UNSAFE.search(value) for value in values):
        section.problem(key, "must not contain control characters or change the text direction")
    return values


def _read_tasks(top: Section, class_count: int) -> tuple[Task, ...]:
    entries = top.values.get("tasks")
    if not isinstance(entries, list) or not entries:
        top.problem("tasks", "must be a list of at least one task")
        return ()
    tasks = []
    for index, entry in enumerate(entries):
        section = Section(entry, f"tasks[{index}]", top.problems)
        members = section.values.get("classes")
        if not isinstance(members, list) or not members or not all(_is_index(item, class_count) for item in members):
            section.problem("classes", f"must be a list of indices below {class_count}, the number of classes")
            members = []
        tasks.append(Task(_name(section, "name"), tuple(members)))
    if len({task.name for task in tasks}) < len(tasks):
        top.problem("tasks", "contains the same name twice")
    missing = set(range(class_count)) - {index for task in tasks for index in task.classes}
    if missing and not top.problems:
        top.problem("tasks", f"do not cover {len(missing)} of the {class_count} classes")
    return tuple(tasks)


def _is_index(value: object, below: int) -> bool:
    return type(value) is int and 0 <= value < below


def _read_preprocessing(section: Section) -> Preprocessing | None:
    before = len(section.problems)
    size = section.integer("size", 8, 4096)
    resize, interpolation = section.text("resize"), section.text("interpolation")
    gap = section.number("reducing_gap", 0, 100)
    if len(section.problems) > before:
        return None
    try:
        return Preprocessing(size, resize, interpolation, gap)
    except ValueError as error:
        section.problem("", str(error))
        return None


def _read_calibration(section: Section) -> Calibration:
    threshold = None
    if section.values.get("novelty_threshold", 0) is not None:
        threshold = section.number("novelty_threshold", -1e30, 1e30)
    deciles = section.numbers("confidence_deciles", 0, 1) if section.values.get("confidence_deciles") else ()
    if deciles and (len(deciles) != 9 or list(deciles) != sorted(deciles)):
        section.problem("confidence_deciles", "must be nine rising numbers")
    known = ("temperature", "novelty_threshold", "method", "confidence_deciles")
    return Calibration(
        temperature=section.number("temperature", 1e-6, 1e6),
        novelty_threshold=threshold,
        method=section.text("method"),
        confidence_deciles=deciles,
        extra={key: value for key, value in section.values.items() if key not in known},
    )


def _read_files(section: Section) -> dict[str, FileRecord]:
    for required in (MODEL, GOLDEN):
        if required not in section.values:
            section.problem("", f"must list {required}")
    return _read_records(section)


def _read_records(section: Section) -> dict[str, FileRecord]:
    if len(section.values) > MAX_FILES:
        section.problem("", f"must list at most {MAX_FILES} files")
        return {}
    records = {}
    for name in section.values:
        if not _FILE_NAME.fullmatch(name) or name == MANIFEST:
            section.problem("", f"{reprlib.repr(name)} is not a valid file name in a bundle")
            continue
        record = section.section(name)
        digest = record.text("sha256")
        if digest and not _SHA256.fullmatch(digest):
            record.problem("sha256", "must be 64 hexadecimal digits")
        records[name] = FileRecord(digest, record.integer("bytes", 0, MAX_FILE_BYTES))
    return records
