"""What is used of TensorRT exists, in every version: as far as that can be checked without them.

Against a binding: every attribute that the modules use on TensorRT's objects is looked up in the installed
TensorRT-RTX, and every function of the CUDA runtime in the installed cuda-python. Against a table only: TensorRT 8.5,
8.6, 10.3, 10.13, 10.16 and 11 are imitations here that have exactly the attributes of the table ``HISTORY``, which was
written down from the bindings' sources; the worker runs against each. What their builders do, no test here tells.
"""

from __future__ import annotations

import ast
import ctypes
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from duallora_edge.files import sha256_file
from duallora_edge.runtime.backends import engine_worker, tensorrt_api
from duallora_edge.runtime.backends import tensorrt as tensorrt_backend
from duallora_edge.runtime.backends.contract import UnavailableError
from duallora_edge.runtime.backends.engine_worker import BuildError, Job
from duallora_edge.runtime.backends.tensorrt_api import TensorRT, find_gpu, load_tensorrt, make_runtime
from duallora_edge.runtime.device import cuda
from duallora_edge.runtime.device.cuda import Gpu

MODULES = (tensorrt_api, engine_worker, tensorrt_backend)
# The names of variables in these modules, and what they hold.
HOLDS = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "timing": "ITimingCache",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "layer": "ILayer",
    "tensor": "ITensor",
}
VERSIONS = ((8, 5), (8, 6), (10, 3), (10, 13), (10, 16), (11, 4))
# Attributes that not every version has: the first version that has it, the first that has it no more, and whether
# TensorRT-RTX has it. The modules use them only where they are.
HISTORY: dict[str, tuple[tuple[int, int], tuple[int, int], bool]] = {
    "NetworkDefinitionCreationFlag.EXPLICIT_BATCH": ((8, 5), (11, 0), False),
    "NetworkDefinitionCreationFlag.STRONGLY_TYPED": ((10, 0), (99, 0), True),
    "BuilderFlag.FP16": ((8, 5), (11, 0), False),
    "BuilderFlag.OBEY_PRECISION_CONSTRAINTS": ((8, 5), (11, 0), False),
    "ILayer.precision": ((8, 5), (11, 0), False),
    "ILayer.set_output_type": ((8, 5), (11, 0), False),
    "ICudaEngine.device_memory_size": ((8, 5), (10, 13), False),
    "ICudaEngine.device_memory_size_v2": ((10, 3), (99, 0), True),
    "IProgressMonitor": ((10, 0), (99, 0), True),
    "IBuilderConfig.progress_monitor": ((10, 0), (99, 0), True),
    "ComputeCapability": ((99, 0), (99, 0), True),
    "IBuilderConfig.num_compute_capabilities": ((99, 0), (99, 0), True),
    "IBuilderConfig.set_compute_capability": ((99, 0), (99, 0), True),
}


def has(version: tuple[int, int], name: str) -> bool:
    first, end, _ = HISTORY[name]
    return first <= version < end


def used_names() -> tuple[set[str], set[str]]:
    """The attributes used on TensorRT's objects ("Builder.create_network") and those of the CUDA runtime."""
    names, cuda = set(), set()
    for module in MODULES:
        for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text())):
            if not isinstance(node, ast.Attribute):
                continue
            path = ast.unparse(node).split(".")
            path = path[1:] if path[0] == "self" else path
            root = path[0].lstrip("_")
            if root == "trt" and len(path) > 1 and not path[-1].startswith("__"):
                names.add(".".join(path[1:]))
            elif root in HOLDS and len(path) == 2:
                names.add(f"{HOLDS[root]}.{path[1]}")
            elif root == "cudart" and len(path) > 1:
                cuda.add(".".join(path[1:]))
    return names, cuda


def found(owner: Any, name: str) -> bool:
    for part in name.split("."):
        if not hasattr(owner, part):
            return False
        owner = getattr(owner, part)
    return True


def test_every_attribute_exists_in_tensorrt_rtx() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (extra 'rtx')")
    names, _ = used_names()
    assert {"Builder.build_serialized_network", "IExecutionContext.execute_async_v3", "TensorIOMode.INPUT"} <= names
    assert set(HISTORY) <= names and len(names) > 40
    expected = {name for name in names if name not in HISTORY or HISTORY[name][2]}
    assert {name for name in names if found(trt, name)} == expected


def test_every_function_of_the_cuda_runtime_exists() -> None:
    cudart = pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not installed")
    _, names = used_names()
    names |= {f"cudaMemcpyKind.{kind}" for kind in ("cudaMemcpyHostToDevice", "cudaMemcpyDeviceToHost")}
    assert len(names) > 15 and [name for name in sorted(names) if not found(cudart, name)] == []


def test_nothing_of_it_is_imported_before_it_is_used() -> None:
    code = (
        "import sys, json; import duallora_edge.runtime.commands.build, duallora_edge.runtime.backends.tensorrt\n"
        "heavy = ['torch', 'onnx', 'onnxruntime', 'tensorrt', 'tensorrt_rtx', 'cuda']\n"
        "print(json.dumps([name for name in heavy if name in sys.modules]))"
    )
    assert json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout) == []


# -- finding what is there ------------------------------------------------------------------------------------


class FakeDriver:
    """libcuda with one device; ``broken`` functions answer with an error."""

    def __init__(self, devices: int = 1, broken: dict[str, int] | None = None) -> None:
        self.calls: list[str] = []
        self.devices = devices
        self.broken = broken or {}

    def __getattr__(self, function: str) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            self.calls.append(function)
            if function == "cuDeviceGetCount":
                arguments[0]._obj.value = self.devices
            elif function == "cuDeviceGetName":
                arguments[0].value = b"Orin"
            elif function == "cuDeviceTotalMem_v2":
                arguments[0]._obj.value = 8 * 10**9
            elif function == "cuDeviceGetAttribute":
                arguments[0]._obj.value = {75: 8, 76: 7, 16: 8}[arguments[1]]
            return self.broken.get(function, 0)

        return call


def test_the_gpu_is_asked_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    assert find_gpu() == Gpu("Orin", "sm87", 8, 8 * 10**9)
    assert driver.calls[0] == "cuInit"


@pytest.mark.parametrize(
    ("driver", "reason"),
    [
        (FakeDriver(devices=0), "lists no GPU"),
        (FakeDriver(broken={"cuInit": 100}), "cuInit failed with error .100"),
        (FakeDriver(broken={"cuDeviceGetAttribute": 1}), "cuDeviceGetAttribute failed with error .1"),
    ],
)
def test_why_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch, driver: FakeDriver, reason: str) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    with pytest.raises(UnavailableError, match=reason):
        find_gpu()


def test_no_runtime_is_made_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "LIBCUDA", "libnone.so")
    with pytest.raises(UnavailableError, match=r"no NVIDIA driver \(libnone.so"):
        make_runtime(SimpleNamespace(Runtime=lambda logger: pytest.fail("the process would have ended")), None)


def test_the_best_tensorrt_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    new, rtx = SimpleNamespace(__version__="10.3.0.30"), SimpleNamespace(__version__="1.7.1.116")
    monkeypatch.setitem(sys.modules, "tensorrt", new)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", rtx)
    assert str(load_tensorrt()) == "TensorRT 10.3.0.30"
    assert load_tensorrt(("tensorrt_rtx",)).trt is rtx
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="8.2.1.9"))
    assert str(load_tensorrt()) == "TensorRT-RTX 1.7.1.116"
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(UnavailableError, match=r"8\.2\.1\.9 is older than 8\.5: update JetPack; tensorrt_rtx cannot"):
        load_tensorrt()


def test_a_damaged_installation_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise OSError("libnvinfer.so.10: cannot open shared object\nand more")

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(UnavailableError, match=r"\(libnvinfer.so.10: cannot open shared object\): on a Jetson use"):
        load_tensorrt()


# -- an imitation of TensorRT of each version -----------------------------------------------------------------


class Strict:
    """An object that has what it is given, minus what the version does not have."""

    def __init__(self, kind: str, version: tuple[int, int], **attributes: Any) -> None:
        allowed = {f"{kind}.{name}" for name in attributes}
        missing = {name for name in allowed if name in HISTORY and not has(version, name)}
        allowed |= {name for name in HISTORY if name.startswith(f"{kind}.") and has(version, name)}
        object.__setattr__(self, "_kind", kind)
        object.__setattr__(self, "_allowed", allowed - missing)
        object.__setattr__(self, "_values", {k: v for k, v in attributes.items() if f"{kind}.{k}" not in missing})

    def __getattr__(self, name: str) -> Any:
        if name not in self._values:
            raise AttributeError(f"{self._kind} has no {name}")
        return self._values[name]

    def __setattr__(self, name: str, value: Any) -> None:
        if f"{self._kind}.{name}" not in self._allowed:
            raise AttributeError(f"{self._kind} has no {name} to set")
        self._values[name] = value


def enumeration(name: str, version: tuple[int, int], *members: str) -> Any:
    kept = [m for m in members if f"{name}.{m}" not in HISTORY or has(version, f"{name}.{m}")]
    return IntEnum(name, {member: index for index, member in enumerate(members) if member in kept})


class Imitation:
    """The module ``tensorrt`` of a version, and what was asked of it in ``asked``."""

    def __init__(self, version: tuple[int, int]) -> None:
        self.version = version
        self.__version__ = f"{version[0]}.{version[1]}.0.1"
        self.asked: dict[str, Any] = {"flags": [], "profile": None, "timing": None, "cleared": []}
        self.timing_fits = True
        self.parses = True
        self.plan: bytes | None = b"plan"
        self.float32, self.float16 = "float32", "float16"
        self.MemoryPoolType = enumeration("MemoryPoolType", version, "WORKSPACE")
        self.BuilderFlag = enumeration("BuilderFlag", version, "TF32", "FP16", "OBEY_PRECISION_CONSTRAINTS")
        self.NetworkDefinitionCreationFlag = enumeration(
            "NetworkDefinitionCreationFlag", version, "EXPLICIT_BATCH", "STRONGLY_TYPED"
        )
        self.ILogger = type("ILogger", (), {"__init__": lambda self: None, "ERROR": 1, "WARNING": 2})
        if has(version, "IProgressMonitor"):
            self.IProgressMonitor = type("IProgressMonitor", (), {"__init__": lambda self: None})
        self.layers = [
            self.layer("SOFTMAX", self.float32),
            self.layer("CAST", self.float32),
            self.layer("MATRIX_MULTIPLY", self.float16),
            self.layer("CONSTANT", self.float32),
        ]
        self.config: Any = None
        self.logger: Any = None

    def layer(self, kind: str, dtype: str) -> Strict:
        types: dict[int, str] = {}
        return Strict(
            "ILayer",
            self.version,
            type=SimpleNamespace(name=kind),
            num_outputs=1,
            get_output=lambda number: SimpleNamespace(dtype=dtype),
            set_output_type=types.__setitem__,
            types=types,
        )

    def Builder(self, logger: Any) -> Strict:  # noqa: N802
        self.logger = logger
        return Strict(
            "Builder",
            self.version,
            create_network=self.create_network,
            create_builder_config=self.create_config,
            create_optimization_profile=lambda: SimpleNamespace(
                set_shape=lambda *shapes: self.asked.update(profile=shapes)
            ),
            build_serialized_network=self.build,
        )

    def create_network(self, flags: int) -> Strict:
        self.asked["network"] = flags
        return Strict(
            "INetworkDefinition",
            self.version,
            num_layers=len(self.layers),
            get_layer=self.layers.__getitem__,
            num_inputs=1,
            get_input=lambda index: SimpleNamespace(name="image", shape=(-1, 32, 32, 3)),
        )

    def create_config(self) -> Strict:
        def set_timing(timing: Any, ignore_mismatch: bool) -> bool:
            if timing.content and not self.timing_fits:
                return False
            self.asked["timing"] = timing.content
            return True

        self.config = Strict(
            "IBuilderConfig",
            self.version,
            set_memory_pool_limit=lambda pool, size: self.asked.update(workspace=(pool.name, size)),
            clear_flag=self.asked["cleared"].append,
            set_flag=self.asked["flags"].append,
            add_optimization_profile=lambda profile: 0,
            create_timing_cache=lambda content: SimpleNamespace(content=content),
            set_timing_cache=set_timing,
            get_timing_cache=lambda: SimpleNamespace(serialize=lambda: b"new timings"),
        )
        return self.config

    def OnnxParser(self, network: Any, logger: Any) -> Strict:  # noqa: N802
        return Strict(
            "OnnxParser",
            self.version,
            parse=lambda content: self.parses,
            num_errors=5,
            get_error=lambda index: f"error {index}\nof the parser",
        )

    def build(self, network: Any, config: Any) -> bytes | None:
        if has(self.version, "IProgressMonitor"):
            config.progress_monitor.phase_start("Whole", None, 2)
            config.progress_monitor.phase_start("First part", "Whole", 1)
            config.progress_monitor.phase_start("Detail", "First part", 1)
            assert config.progress_monitor.step_complete("Detail", 0)
            config.progress_monitor.phase_finish("Whole")
        self.logger.log(2, "a\nwarning")
        self.logger.log(2, "a\nwarning")
        self.logger.log(3, "verbose")
        self.logger.log(1, "an error")
        return self.plan

    def Runtime(self, logger: Any) -> Strict:  # noqa: N802
        engine = Strict("ICudaEngine", self.version, device_memory_size=100, device_memory_size_v2=200)
        return Strict("Runtime", self.version, deserialize_cuda_engine=lambda plan: engine if plan != b"bad" else None)


@pytest.fixture
def imitate(monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[int, int]], Imitation]:
    """``imitate((10, 3))``: TensorRT 10.3 is installed and there is a GPU."""

    def install(version: tuple[int, int]) -> Imitation:
        imitation = Imitation(version)
        monkeypatch.setitem(sys.modules, "tensorrt", imitation)
        monkeypatch.setattr(tensorrt_api, "find_gpu", lambda: Gpu("Orin", "sm87", 8, 10**9))
        return imitation

    return install


def job(folder: Path, **changes: Any) -> Job:
    model = folder / "model.onnx"
    model.write_bytes(b"model")
    values = {
        "package": "tensorrt",
        "model": str(model),
        "model_sha256": sha256_file(model),
        "plan": str(folder / "engine.plan"),
        "max_batch": 4,
        "precision": "fp32",
        "workspace_bytes": 10**8,
        "compute_capability": None,
        "timing_cache": str(folder / "a.timing"),
    }
    return Job(**{**values, **changes})


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("version", VERSIONS)
def test_the_worker_uses_what_a_version_has(
    imitate: Callable[..., Imitation], tmp_path: Path, version: tuple[int, int], precision: str
) -> None:
    trt, lines = imitate(version), list[str]()
    facts = engine_worker.build(job(tmp_path, precision=precision), lines.append)
    assert (tmp_path / "engine.plan").read_bytes() == b"plan"
    assert (tmp_path / "a.timing").read_bytes() == b"new timings" and trt.asked["timing"] == b""
    assert trt.asked["workspace"] == ("WORKSPACE", 10**8)
    assert trt.asked["profile"] == ("image", (1, 32, 32, 3), (1, 32, 32, 3), (4, 32, 32, 3))
    assert trt.asked["cleared"] == [trt.BuilderFlag.TF32]
    assert facts["device_memory_bytes"] == (100 if version < (10, 3) else 200)
    strongly_typed = 2
    assert trt.asked["network"] == {8: 1, 10: strongly_typed, 11: 0}[version[0]]
    assert lines.count("TensorRT warns: a warning") == 1
    assert ("first part" in lines) == (version >= (10, 0)) and "detail" not in lines
    halves = version < (10, 0) and precision == "fp16"
    assert [flag.name for flag in trt.asked["flags"]] == ["FP16", "OBEY_PRECISION_CONSTRAINTS"] * halves
    assert [layer.types for layer in trt.layers] == [{0: "float32"} if halves else {}, {}, {}, {}]


def test_a_fixed_batch_needs_no_profile(imitate: Callable[..., Imitation], tmp_path: Path) -> None:
    trt = imitate((10, 3))
    engine_worker.build(job(tmp_path, max_batch=None, timing_cache=None), lambda text: None)
    assert trt.asked["profile"] is None and not (tmp_path / "a.timing").exists()


@pytest.mark.parametrize(("fits", "used"), [(True, b"old timings"), (False, b"")])
def test_timings_of_earlier_builds(imitate: Callable[..., Imitation], tmp_path: Path, fits: bool, used: bytes) -> None:
    trt, lines = imitate((10, 3)), list[str]()
    trt.timing_fits = fits
    (tmp_path / "a.timing").write_bytes(b"old timings")
    engine_worker.build(job(tmp_path), lines.append)
    assert trt.asked["timing"] == used and ("the stored timings do not fit and are ignored" in lines) == (not fits)
    assert (tmp_path / "a.timing").read_bytes() == b"new timings"


def test_timings_that_cannot_be_stored_do_no_harm(imitate: Callable[..., Imitation], tmp_path: Path) -> None:
    imitate((10, 3))
    lines: list[str] = []
    engine_worker.build(job(tmp_path, timing_cache=str(tmp_path / "none/a.timing")), lines.append)
    assert any("timings could not be stored (No such file or directory)" in line for line in lines)
    assert (tmp_path / "engine.plan").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"parses": False}, "refuses the model: error 0 of the parser; error 1 of the parser; error 2 .*; and 2 more"),
        ({"plan": None}, "its builder gave up: an error$"),
        ({"plan": b"bad"}, "was built, but cannot be loaded: an error"),
    ],
)
def test_what_the_worker_reports(
    imitate: Callable[..., Imitation], tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    vars(imitate((10, 3))).update(change)
    with pytest.raises(BuildError, match=words):
        engine_worker.build(job(tmp_path), lambda text: None)


def test_only_the_verified_model_is_built(imitate: Callable[..., Imitation], tmp_path: Path) -> None:
    imitate((10, 3))
    wanted = job(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"moder")
    with pytest.raises(BuildError, match=r"^model\.onnx has changed since it was verified$"):
        engine_worker.build(wanted, lambda text: None)
    assert not (tmp_path / "engine.plan").exists()


def test_a_job_survives_the_command_line(tmp_path: Path) -> None:
    assert Job(**json.loads(job(tmp_path).to_text())) == job(tmp_path)


def test_the_names_of_tensorrt_rtx() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (extra 'rtx')")
    assert {"sm75", "sm80", "sm86", "sm89", "sm120"} <= set(load_tensorrt(("tensorrt_rtx",)).compute_capabilities)
    assert TensorRT("tensorrt", "10.3", trt).compute_capabilities == ()
