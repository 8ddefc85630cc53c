"""Engines: built by the real TensorRT-RTX in a process of its own, kept in a cache that survives kills and full disks.

No GPU is needed: TensorRT-RTX builds ahead of time. What a kill or a full disk leaves is compared file by file.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from duallora_edge.errors import BackendError, ConfigError
from duallora_edge.files import cache_folder, read_json, write_json
from duallora_edge.runtime.backends import engine_build as engines
from duallora_edge.runtime.backends import engine_cache
from duallora_edge.runtime.backends.engine_build import build_engine, engine_key
from duallora_edge.runtime.backends.engine_cache import (
    EngineError,
    EngineKey,
    engines_folder,
    evict,
    find_engine,
    read_engine,
)
from duallora_edge.runtime.backends.engine_worker import Job
from duallora_edge.runtime.backends.tensorrt_api import TensorRT
from duallora_edge.runtime.bundle import MANIFEST, MODEL, Bundle, Manifest
from duallora_edge.runtime.device.cuda import Gpu
from duallora_edge.runtime.process_memory import Reading, read_memory

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (extra 'rtx')")

HERE = Gpu("Imaginary Orin", "sm87", 8, 8 * 10**9)
LINKS = 200  # of the slow graph
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; returns the folder of the engines in it."""
    monkeypatch.setenv("DUALLORA_EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/engines"


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every name below a folder, hidden ones too, with the bytes of files."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def change_model(folder: Path, seal: Callable[[Path], None], change: Callable[[onnx.ModelProto], None]) -> Bundle:
    model = onnx.load(folder / MODEL)
    change(model)
    onnx.save(model, folder / MODEL)
    seal(folder)
    return Bundle.open(folder)


def slow(model: onnx.ModelProto) -> None:
    """A chain of large products in front of one output, which takes a while to build."""
    weights = np.random.default_rng(0).normal(size=(1024, 1024)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weights[:3], "wide"))
    model.graph.initializer.append(numpy_helper.from_array(weights, "large"))
    nodes = [onnx.helper.make_node("MatMul", ["features", "wide"], ["chain0"])]
    for index in range(LINKS):
        nodes.append(onnx.helper.make_node("MatMul", [f"chain{index}", "large"], [f"product{index}"]))
        nodes.append(onnx.helper.make_node("Sigmoid", [f"product{index}"], [f"chain{index + 1}"]))
    novelty = onnx.helper.make_node("ReduceMax", [f"chain{LINKS}"], ["novelty"], axes=[1], keepdims=0)
    del model.graph.node[6:]
    model.graph.node.extend([*nodes, novelty])


@pytest.fixture
def quick_builder(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """Instead of a process that takes a second, something writes a plan at once: the jobs that it got."""
    jobs: list[Job] = []

    def run(job: Job, *_: object) -> dict[str, Any]:
        jobs.append(job)
        Path(job.plan).write_bytes(b"plan" * 5000)
        return {"seconds": 1.0, "device_memory_bytes": None}

    monkeypatch.setattr(engines, "_run_worker", run)
    return jobs


# -- building -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capability", ["sm80", "sm86", "sm89", "sm120"])
def test_an_engine_for_another_gpu(shared_bundle: Path, cache: Path, capability: str) -> None:
    bundle, lines = Bundle.open(shared_bundle), list[str]()
    engine = build_engine(bundle, capability, say=lines.append)
    assert not engine.from_cache and engine.bytes == engine.plan.stat().st_size > 10_000
    assert engine.key.compute_capability == capability and engine.key.package == "tensorrt_rtx"
    assert engine.plan.parent == cache / engine.key.digest and engine.device_memory_bytes is None
    assert "model.onnx" in lines[0] and "building" in lines
    assert sorted(contents(cache)) == [
        engine.key.digest,
        f"{engine.key.digest}/engine.json",
        f"{engine.key.digest}/engine.plan",
    ]
    again, before = build_engine(bundle, capability, say=lines.append), len(lines)
    assert again == replace(engine, from_cache=True) and len(lines) == before
    assert find_engine(engine.key) == again


def in_half(model: onnx.ModelProto) -> None:
    """The two products in fp16, with casts around them."""
    for tensor in model.graph.initializer:
        if tensor.name not in ("full", "minus"):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    nodes = list(model.graph.node)
    del model.graph.node[:]
    for node in nodes:
        if node.op_type not in ("Gemm", "MatMul"):
            model.graph.node.append(node)
            continue
        source, target = node.input[0], node.output[0]
        node.input[0], node.output[0] = f"{source}_{target}_half", f"{target}_half"
        to_half = onnx.helper.make_node("Cast", [source], [node.input[0]], to=onnx.TensorProto.FLOAT16)
        to_float = onnx.helper.make_node("Cast", [node.output[0]], [target], to=onnx.TensorProto.FLOAT)
        model.graph.node.extend([to_half, node, to_float])


def test_turing_needs_every_product_in_half_precision(bundle: Path, seal: Callable[[Path], None]) -> None:
    """TensorRT-RTX 1.7 has no fp32 matrix product for compute capability 7.5, and says so."""
    with pytest.raises(EngineError, match=r"FP32 GEMM is not supported.*another target or precision"):
        build_engine(Bundle.open(bundle), "sm75")
    assert build_engine(change_model(bundle, seal, in_half), "sm75").bytes > 10_000


def test_a_fixed_batch(bundle: Path, seal: Callable[[Path], None]) -> None:
    def fix(model: onnx.ModelProto) -> None:
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = 3

    change_model(bundle, seal, fix)
    manifest = Manifest.from_json(read_json(bundle / MANIFEST))
    write_json(bundle / MANIFEST, replace(manifest, batch=3).to_json())
    engine = build_engine(Bundle.open(bundle), "sm86")
    assert (engine.key.batch, engine.key.max_batch) == (3, 3)


def test_the_workspace(shared_bundle: Path, quick_builder: list[Job]) -> None:
    bundle = Bundle.open(shared_bundle)
    assert build_engine(bundle, "sm86").workspace_mb == bundle.manifest.workspace_mb == 512
    other = build_engine(bundle, "sm86", workspace_mb=100)
    assert (other.workspace_mb, other.granted_mb, other.from_cache) == (100, 100, False)
    assert [job.workspace_bytes for job in quick_builder] == [512 * 10**6, 100 * 10**6]
    assert build_engine(bundle, "sm86", workspace_mb=100).from_cache
    assert build_engine(bundle, "sm86").workspace_mb == 100  # whoever asks for none takes what is there
    assert not build_engine(bundle, "sm86", force=True).from_cache


@pytest.mark.usefixtures("quick_builder")
@pytest.mark.parametrize(("free_mb", "granted"), [(None, 512), (5000, 512), (900, 299), (640, None)])
def test_memory_is_asked_for_before(
    shared_bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, free_mb: int | None, granted: int | None
) -> None:
    available = Reading("test", None if free_mb is None else free_mb * 10**6)
    monkeypatch.setattr(engines, "read_memory", lambda: replace(read_memory(), available=available))
    lines: list[str] = []
    if granted is None:
        with pytest.raises(EngineError, match=r"about 664 MB \(estimate\), but only 640 MB are available; close"):
            build_engine(Bundle.open(shared_bundle), "sm86")
        assert contents(cache) == {}
        return
    assert build_engine(Bundle.open(shared_bundle), "sm86", say=lines.append).granted_mb == granted
    assert any(f"{granted} MB of workspace instead of 512" in line for line in lines) == (granted < 512)


@pytest.fixture
def any_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """What TensorRT says of a graph that the check before it would refuse."""
    monkeypatch.setattr("duallora_edge.runtime.graph_check.check_graph", lambda *_: None)


@pytest.mark.usefixtures("any_graph")
def test_a_graph_that_the_parser_refuses(bundle: Path, cache: Path, seal: Callable[[Path], None]) -> None:
    def unknown(model: onnx.ModelProto) -> None:
        model.graph.node[6].op_type = "NoSuchOperation"

    with pytest.raises(EngineError, match=r"parser refuses the model: .*NoSuchOperation.*Plugin not found.*; use") as e:
        build_engine(change_model(bundle, seal, unknown), "sm86")
    assert isinstance(e.value, BackendError) and "\n" not in str(e.value)
    assert contents(cache) == {}


@pytest.mark.usefixtures("any_graph")
def test_no_model_at_all(bundle: Path, cache: Path, seal: Callable[[Path], None]) -> None:
    (bundle / MODEL).write_bytes(b"no model")
    seal(bundle)
    with pytest.raises(EngineError, match=r"parser refuses the model: .*Failed to parse"):
        build_engine(Bundle.open(bundle), "sm86")
    assert contents(cache) == {}


@pytest.mark.parametrize("capability", ["sm87", "current", "none"])
def test_a_capability_that_cannot_be_named(shared_bundle: Path, capability: str) -> None:
    with pytest.raises(EngineError, match=rf"cannot build for '{capability}', only for sm75, .*on the device itself"):
        build_engine(Bundle.open(shared_bundle), capability)


def test_without_a_gpu(shared_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("duallora_edge.runtime.device.cuda.LIBCUDA", "libnone.so")
    with pytest.raises(EngineError, match=r"no NVIDIA driver .*run this on the device, or name .*sm86"):
        build_engine(Bundle.open(shared_bundle))


def test_without_tensorrt_rtx(shared_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(EngineError, match=r"ahead of time needs .*pip install 'tensorrt-rtx>="):
        build_engine(Bundle.open(shared_bundle), "sm86")


def test_tensorrt_rtx_on_a_gpu_it_does_not_know(shared_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "find_gpu", lambda: HERE)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EngineError, match=r"builds for sm75, .*, not for sm87 \(Imaginary Orin\): install TensorRT"):
        build_engine(Bundle.open(shared_bundle))


# -- the key --------------------------------------------------------------------------------------------------


def test_everything_that_matters_is_in_the_key(shared_bundle: Path) -> None:
    bundle = Bundle.open(shared_bundle)
    trt, rtx = TensorRT("tensorrt", "10.3.0.30", None), TensorRT("tensorrt_rtx", "1.7.1.116", None)
    key = engine_key(bundle, trt, HERE)
    others = [
        engine_key(bundle, replace(trt, version="10.3.0.31"), HERE),
        engine_key(bundle, rtx, "sm87"),
        *(engine_key(bundle, trt, replace(HERE, **change)) for change in ({"name": "x"}, {"multiprocessors": 16})),
        engine_key(bundle, trt, replace(HERE, compute_capability="sm86")),
        engine_key(replace(bundle, manifest=replace(bundle.manifest, batch=2)), trt, HERE),
        replace(key, model_sha256="0" * 64),
        replace(key, precision="fp16"),
        replace(key, platform="linux-aarch64"),
        replace(key, recipe=key.recipe + 1),
    ]
    digests = {key.digest, *(other.digest for other in others)}
    assert len(digests) == 1 + len(others)
    assert engine_key(bundle, trt, replace(HERE, memory_bytes=1)) == key
    # An engine of TensorRT-RTX that was built elsewhere is found on every GPU of its kind.
    assert engine_key(bundle, rtx, HERE) == engine_key(bundle, rtx, "sm87")


def test_builds_for_one_gpu_share_their_timings(shared_bundle: Path) -> None:
    bundle, trt = Bundle.open(shared_bundle), TensorRT("tensorrt", "10.3.0.30", None)
    key = engine_key(bundle, trt, HERE)
    assert key.timing_name == replace(key, model_sha256="0" * 64).timing_name
    assert key.timing_name != engine_key(bundle, trt, replace(HERE, name="x")).timing_name
    assert engine_key(bundle, replace(trt, package="tensorrt_rtx"), "sm86").timing_name is None


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert engines_folder() == tmp_path / "cache/engines"
    monkeypatch.delenv("DUALLORA_EDGE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "duallora-edge"


# -- damage, kills and full disks -----------------------------------------------------------------------------


def cut(engine: Path) -> None:
    (engine / "engine.plan").write_bytes((engine / "engine.plan").read_bytes()[:-1])


def flip(engine: Path) -> None:
    plan = bytearray((engine / "engine.plan").read_bytes())
    plan[len(plan) // 2] ^= 1
    (engine / "engine.plan").write_bytes(plan)


def forget(name: str) -> Callable[[Path], None]:
    return lambda engine: (engine / name).unlink()


def write(text: str) -> Callable[[Path], None]:
    return lambda engine: (engine / "engine.json").write_text(text) and None


def other_key(engine: Path) -> None:
    record = read_json(engine / "engine.json")
    record["key"]["version"] = "1.0"
    write_json(engine / "engine.json", record)


def put(name: str, value: Any) -> Callable[[Path], None]:
    def change(engine: Path) -> None:
        record = json.loads((engine / "engine.json").read_text())
        (engine / "engine.json").write_text(json.dumps({**record, name: value}))

    return change


def other_plan(engine: Path) -> None:
    (engine / "engine.plan").unlink()
    os.mkfifo(engine / "engine.plan")  # opening it would wait for ever


DAMAGES = [
    *(cut, flip, other_key, other_plan, forget("engine.plan"), forget("engine.json")),
    *map(write, ("{", "[]", "{}", "[" * 10**6)),
    *(put("bytes", value) for value in (-1, True, "9", None, 1.5, 10**30)),
    *(put("seconds", value) for value in (-1, "1", None, float("nan"), 10**30)),
    *(put(name, -1) for name in ("workspace_mb", "granted_mb", "device_memory_bytes")),
    *(put("sha256", value) for value in (None, 1, "0" * 64)),
    put("driver_cuda", 12.6),
]


@pytest.mark.usefixtures("quick_builder")
def test_a_damaged_engine_is_noticed(shared_bundle: Path, tmp_path: Path) -> None:
    engine = build_engine(Bundle.open(shared_bundle), "sm86")
    folder = engine.plan.parent
    shutil.copytree(folder, tmp_path / "whole")
    for damage in DAMAGES:
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "whole", folder)
        assert read_engine(engine.key) == (
            replace(engine, from_cache=True),
            (tmp_path / "whole/engine.plan").read_bytes(),
        )
        damage(folder)
        with pytest.raises(EngineError, match=r"is damaged .*run 'duallora-edge build' again"):
            find_engine(engine.key)


@pytest.mark.usefixtures("quick_builder")
def test_a_damaged_engine_is_built_again(shared_bundle: Path) -> None:
    bundle, lines = Bundle.open(shared_bundle), list[str]()
    flip(build_engine(bundle, "sm86").plan.parent)
    again = build_engine(bundle, "sm86", say=lines.append)
    assert not again.from_cache and lines[0] == "the stored engine is damaged; it is deleted and built again"
    assert build_engine(bundle, "sm86").from_cache


def test_a_model_that_changed_after_it_was_verified(bundle: Path, cache: Path) -> None:
    opened = Bundle.open(bundle)
    (bundle / MODEL).write_bytes((bundle / MODEL).read_bytes()[:-1])
    with pytest.raises(EngineError, match=r"cannot build the engine, model\.onnx has changed since it was verified; "):
        build_engine(opened, "sm86")
    assert contents(cache) == {}


@pytest.mark.usefixtures("quick_builder")
def test_what_somebody_put_beside_an_engine_is_kept(shared_bundle: Path, cache: Path) -> None:
    bundle, lines = Bundle.open(shared_bundle), list[str]()
    folder = build_engine(bundle, "sm86").plan.parent
    (folder / "notes.txt").write_text("mine")
    flip(folder)
    assert build_engine(bundle, "sm86", say=lines.append).plan.parent == folder
    words = "files that do not belong to the engine are kept in "
    (kept,) = (line.removeprefix(words) for line in lines if "kept" in line)
    assert (Path(kept) / "notes.txt").read_text() == "mine"


@pytest.mark.usefixtures("quick_builder")
@pytest.mark.parametrize("what", ["world-writable", "foreign"])
def test_engines_in_a_folder_that_others_can_change_are_refused(
    shared_bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    bundle = Bundle.open(shared_bundle)
    key = build_engine(bundle, "sm86").key
    if what == "foreign":
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    else:
        cache.chmod(0o777)
    for use in (lambda: find_engine(key), lambda: build_engine(bundle, "sm86")):
        with pytest.raises(ConfigError, match="DUALLORA_EDGE_CACHE"):
            use()


def test_a_lock_that_is_a_link_is_not_followed(shared_bundle: Path, cache: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(shared_bundle)
    key = engine_key(bundle, engines.load_tensorrt(("tensorrt_rtx",)), "sm86")
    cache.mkdir(parents=True)
    (tmp_path / "precious").write_text("mine")
    (cache / f"{key.digest}.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(ConfigError, match="is not a lock file"):
        build_engine(bundle, "sm86")
    assert (tmp_path / "precious").read_text() == "mine"


class Spy:
    """Stands for `subprocess.Popen` in the module `engine`, and keeps the processes that were started."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.started: list[subprocess.Popen[Any]] = []
        real = subprocess.Popen

        def start(*arguments: Any, **options: Any) -> subprocess.Popen[Any]:
            self.started.append(real(*arguments, **options))
            return self.started[-1]

        monkeypatch.setattr(engines.subprocess, "Popen", start)


@pytest.mark.parametrize(
    ("number", "words"), [(signal.SIGKILL, "most likely because memory ran out"), (signal.SIGSEGV, "ended by SIGSEGV")]
)
def test_a_killed_builder_leaves_nothing(
    bundle: Path,
    cache: Path,
    seal: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    words: str,
) -> None:
    spy, opened = Spy(monkeypatch), change_model(bundle, seal, slow)

    def kill(line: str) -> None:
        if line == "building":
            spy.started[0].send_signal(number)

    with pytest.raises(EngineError, match=words):
        build_engine(opened, "sm86", say=kill)
    assert contents(cache) == {}
    assert build_engine(opened, "sm86").bytes > 10_000


def test_a_builder_killed_at_any_moment(shared_bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spy, bundle = Spy(monkeypatch), Bundle.open(shared_bundle)

    def kill() -> None:
        for process in spy.started:
            process.kill()

    for delay in (0.05, 0.15, 0.25, 0.4):
        timer = threading.Timer(delay, kill)
        timer.start()
        try:
            build_engine(bundle, "sm86", force=True)
        except EngineError:
            assert contents(cache) == {}
        else:
            assert len(contents(cache)) == 3 and build_engine(bundle, "sm86").from_cache
            shutil.rmtree(cache)
        finally:
            timer.join()


def test_a_killed_application_leaves_nothing_that_harms(
    bundle: Path, cache: Path, seal: Callable[[Path], None]
) -> None:
    """The builder ends with the process that started it, and the next build clears up."""
    opened = change_model(bundle, seal, slow)
    code = (
        "import sys; from duallora_edge.runtime.bundle import Bundle\n"
        "from duallora_edge.runtime.backends.engine_build import *\n"
        "build_engine(Bundle.open(sys.argv[1]), 'sm86', say=lambda line: print(line, flush=True))"
    )
    application = subprocess.Popen([sys.executable, "-c", code, str(bundle)], stdout=subprocess.PIPE, text=True)
    with application:
        assert application.stdout is not None
        while application.stdout.readline() != "building\n":
            pass
        application.kill()
    names = [name for name in contents(cache) if "/" not in name]
    assert len(names) == 2 and any(name.endswith(".lock") for name in names) and any(".tmp" in name for name in names)
    deadline = time.monotonic() + 20
    while running(str(cache)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running(str(cache))
    assert not build_engine(opened, "sm86").from_cache
    assert len(contents(cache)) == 3


def running(text: str) -> list[str]:
    """The processes whose command line holds ``text``."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if text.encode() in (process / "cmdline").read_bytes():
                found.append(process.name)
    return found


def test_a_failed_build_keeps_the_engine_that_was_there(shared_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(shared_bundle)
    engine = build_engine(bundle, "sm86")
    before = contents(engine.plan.parent)
    monkeypatch.setattr(engines, "WORKER", "duallora_edge.no_such_module")
    with pytest.raises(EngineError, match=r"ended with code 1 \(.*No module named .*\); use another backend"):
        build_engine(bundle, "sm86", force=True)
    assert contents(engine.plan.parent) == before and build_engine(bundle, "sm86").from_cache


@pytest.mark.parametrize("how", ["cancel", "time limit", "interrupt"])
def test_a_build_that_is_stopped(
    bundle: Path, cache: Path, seal: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    spy, cancel, opened = Spy(monkeypatch), threading.Event(), change_model(bundle, seal, slow)

    def stop(line: str) -> None:
        if line == "building" and how == "cancel":
            cancel.set()
        if line == "building" and how == "interrupt":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt if how == "interrupt" else EngineError, match=None if how[0] == "i" else how):
        build_engine(opened, "sm86", timeout_s=0.05 if how == "time limit" else 60, say=stop, cancel=cancel)
    assert contents(cache) == {} and spy.started[0].poll() is not None


def test_progress_is_reported_even_when_the_builder_is_silent(
    shared_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "HEARTBEAT_S", 0.0)
    monkeypatch.setattr(engines, "_POLL_S", 0.01)
    lines: list[str] = []
    build_engine(Bundle.open(shared_bundle), "sm86", say=lines.append)
    assert any("still building after" in line for line in lines)


@pytest.mark.usefixtures("quick_builder")
@pytest.mark.parametrize(
    ("name", "number"),
    [("atomic_directory", errno.EROFS), ("write_record", errno.ENOSPC), ("evict", errno.ENOSPC)],
)
def test_a_disk_that_cannot_be_written(
    shared_bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(engines, name, full)
    with pytest.raises(EngineError, match=rf"{os.strerror(number)}\); free some space, or name another folder in DUAL"):
        build_engine(Bundle.open(shared_bundle), "sm86")
    assert len(contents(cache)) == (3 if name == "evict" else 0)


def test_a_plan_that_does_not_fit(shared_bundle: Path, cache: Path) -> None:
    """The builder itself meets the limit, as it would meet the end of a disk."""
    code = (
        "import sys, resource; from duallora_edge.runtime.bundle import Bundle\n"
        "from duallora_edge.runtime.backends.engine_build import *\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: build_engine(Bundle.open(sys.argv[1]), 'sm86')\n"
        "except EngineError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(shared_bundle)], capture_output=True, text=True, check=True)
    assert "File too large); free some space, or name another folder" in done.stdout
    assert contents(cache) == {}


def test_a_full_disk(shared_bundle: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUALLORA_EDGE_CACHE", str(small_disk))
    with pytest.raises(EngineError, match="No space left on device"):
        build_engine(Bundle.open(shared_bundle), "sm86")
    assert contents(small_disk / "engines") == {}


# -- several processes, and the size of the cache -------------------------------------------------------------


def test_one_builder_at_a_time(shared_bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spy, bundle, lines = Spy(monkeypatch), Bundle.open(shared_bundle), list[str]()
    found: list[engine_cache.Engine] = []

    def build() -> None:
        found.append(build_engine(bundle, "sm86", say=lines.append))

    threads = [threading.Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(spy.started) == 1 and sorted(engine.from_cache for engine in found) == [False, True, True, True]
    waiting = [line for line in lines if line.endswith("is building this engine; waiting for it")]
    assert 1 <= len(waiting) <= 3
    assert len(contents(cache)) == 3


@pytest.mark.usefixtures("quick_builder")
def test_a_lock_of_a_dead_process_holds_nobody_up(shared_bundle: Path, cache: Path) -> None:
    bundle, lines = Bundle.open(shared_bundle), list[str]()
    key = engine_key(bundle, engines.load_tensorrt(("tensorrt_rtx",)), "sm86")
    cache.mkdir(parents=True)
    (cache / f"{key.digest}.lock").write_text("1")  # a process that runs, but does not hold the lock
    build_engine(bundle, "sm86", say=lines.append)
    assert not any("waiting" in line for line in lines) and len(contents(cache)) == 3


def test_waiting_has_an_end(shared_bundle: Path, cache: Path) -> None:
    bundle, lines = Bundle.open(shared_bundle), list[str]()
    key = engine_key(bundle, engines.load_tensorrt(("tensorrt_rtx",)), "sm86")
    cache.mkdir(parents=True)
    limit = pytest.raises(EngineError, match="longer than its time limit")
    with engine_cache.locked(cache, key, lambda process: None), limit:
        build_engine(bundle, "sm86", timeout_s=0.5, say=lines.append)
    assert lines == [f"process {os.getpid()} is building this engine; waiting for it"]
    assert contents(cache) == {}


def make_entry(folder: Path, name: str, size: int, age_s: float) -> Path:
    entry = folder / name
    if name.endswith(".timing"):
        entry.write_bytes(b"x" * size)
        used = entry
    else:
        entry.mkdir(parents=True)
        (entry / "engine.plan").write_bytes(b"x" * size)
        used = entry / "engine.json"
        used.write_text("{}")
    os.utime(used, (time.time() - age_s,) * 2)
    return entry


def key_of(name: str) -> EngineKey:
    return EngineKey("tensorrt", name, "linux-x86_64", "sm87", "Orin", 8, "0" * 64, "fp32", None, 16, 1)


@pytest.mark.parametrize(
    ("limit_gb", "left"),
    [("1", "abcde"), ("3.5e-6", "abce"), ("2.3e-6", "abe"), ("1e-6", "ae"), ("0", "ae")],
)
def test_what_was_used_longest_ago_goes_first(
    cache: Path, monkeypatch: pytest.MonkeyPatch, limit_gb: str, left: str
) -> None:
    cache.mkdir(parents=True)
    monkeypatch.setenv("DUALLORA_EDGE_ENGINES_GB", limit_gb)
    keep = key_of("10.3")
    assert keep.timing_name is not None
    entries = {
        "a": make_entry(cache, keep.digest, 1000, 500),
        "b": make_entry(cache, "1" * 32, 1000, 10),
        "c": make_entry(cache, "2" * 32, 1000, 20),
        "d": make_entry(cache, f"{'3' * 32}.timing", 1000, 30),
        "e": make_entry(cache, keep.timing_name, 100, 400),
    }
    (cache / f"{keep.digest}.lock").touch()
    old, new = (cache / f".{digit * 32}.timing.00000000.tmp" for digit in "45")
    foreign = [cache / name for name in (".mine.tmp", "notes.timing", f"{'6' * 32}.kept-00000000/file")]
    for path in (old, new, *foreign):
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    for path in (old, *foreign):
        os.utime(path, (time.time() - 2 * 24 * 3600,) * 2)
    (cache / ("7" * 32)).symlink_to(cache / foreign[2].parent)
    evict(cache, keep)
    assert "".join(name for name, path in entries.items() if path.exists()) == left
    assert (cache / f"{keep.digest}.lock").exists()
    assert new.exists() and not old.exists()
    assert all(path.exists() for path in foreign) and (cache / ("7" * 32)).is_symlink()


def test_eviction_keeps_what_somebody_put_beside_an_engine(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUALLORA_EDGE_ENGINES_GB", "0")
    entry = make_entry(cache, "1" * 32, 1000, 10)
    (entry / "notes.txt").write_text("mine")
    evict(cache, key_of("10.3"))
    assert contents(cache) == {entry.name: None, f"{entry.name}/notes.txt": b"mine"}


@pytest.mark.usefixtures("quick_builder")
def test_finding_an_engine_counts_as_use(shared_bundle: Path) -> None:
    engine = build_engine(Bundle.open(shared_bundle), "sm86")
    record = engine.plan.parent / "engine.json"
    os.utime(record, (1, 1))
    find_engine(engine.key)
    assert record.stat().st_mtime > 10**9


@pytest.mark.parametrize("text", ["many", "-1", "nan"])
def test_a_limit_that_is_no_number(cache: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    cache.mkdir(parents=True)
    monkeypatch.setenv("DUALLORA_EDGE_ENGINES_GB", text)
    with pytest.raises(ConfigError, match="DUALLORA_EDGE_ENGINES_GB must be a number"):
        evict(cache, key_of("10.3"))


# -- the command ----------------------------------------------------------------------------------------------


def test_the_command(call: Call, shared_bundle: Path, cache: Path) -> None:
    code, out, err = call("build", shared_bundle, "--compute-capability", "8.6")
    assert code == 0 and "building" in err.splitlines()
    check, last = out.splitlines()
    assert check.startswith("Golden check: not possible here, because the engine is for sm86")
    plan = next(cache.rglob("engine.plan"))
    assert last.startswith(f"Engine: {plan} (") and "built in" in last
    code, out, err = call("build", shared_bundle, "--compute-capability", "sm_86")
    assert (code, err) == (0, "") and out.splitlines()[-1].endswith("from the cache)")
    assert "built in" in call("build", shared_bundle, "--compute-capability", "sm86", "--force")[1]


def test_the_command_as_json(call: Call, shared_bundle: Path) -> None:
    code, out, _ = call("build", shared_bundle, "--compute-capability", "sm86", "--workspace-mb", "64", "--json")
    document = json.loads(out)
    (engine,) = document["engines"]
    assert code == 0 and Path(engine["plan"]).is_file() and document["golden_check"] is None
    assert (engine["workspace_mb"], engine["from_cache"], engine["key"]["compute_capability"]) == (64, False, "sm86")


def test_the_command_without_a_gpu(call: Call, shared_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("duallora_edge.runtime.device.cuda.LIBCUDA", "libnone.so")
    code, out, err = call("build", shared_bundle)
    assert (code, out) == (1, "") and err.startswith("Error: No engine can be built for this machine")
    assert len(err.splitlines()) == 1 and "--compute-capability sm86" in err


@pytest.mark.parametrize("value", ["turing", "sm", "sm8", "8.66"])
def test_what_is_no_compute_capability(call: Call, shared_bundle: Path, value: str) -> None:
    code, _, err = call("build", shared_bundle, "--compute-capability", value)
    assert code == 2 and "is not a compute capability such as sm86" in err
