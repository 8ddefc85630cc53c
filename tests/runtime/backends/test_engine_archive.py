"""An engine goes to a twin in an archive, and to nobody else; what is wrong with an archive leaves the cache alone.

The GPU, the builder and the run on the golden images are imitated; `test_tensorrt.py` has the latter whole.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from duallora_edge.errors import ConfigError
from duallora_edge.files import read_json, write_json
from duallora_edge.runtime.backends import engine_archive, engine_build
from duallora_edge.runtime.backends.contract import GoldenCheck, UnavailableError
from duallora_edge.runtime.backends.engine_archive import UnfitEngineError, load_engines, save_engines
from duallora_edge.runtime.backends.engine_build import build_engine, build_engines
from duallora_edge.runtime.backends.engine_cache import EngineError, find_engine, locked
from duallora_edge.runtime.backends.tensorrt_api import TensorRT
from duallora_edge.runtime.bundle import MANIFEST, Bundle
from duallora_edge.runtime.device.cuda import Gpu

GPU = Gpu("Imaginary Orin", "sm87", 8, 8 * 10**9)
TRT = TensorRT("tensorrt", "10.3.0.30", None)
GOOD = GoldenCheck(4, 1.0, 0.0, 0.0, 0.0, 1.0)
BAD = replace(GOOD, max_difference=0.5)
Call = Callable[..., tuple[int, str, str]]


class Device:
    """The machine: what is installed, which driver it has, and how the golden images are answered."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tmp_path, self.monkeypatch = tmp_path, monkeypatch
        self.tensorrt, self.gpu, self.driver, self.check = TRT, GPU, "12.6", GOOD
        self.plans: list[list[bytes]] = []
        self.go("here")
        monkeypatch.setattr(engine_build, "local_target", lambda: (self.tensorrt, self.gpu))
        monkeypatch.setattr(engine_archive, "local_target", lambda: (self.tensorrt, self.gpu))
        monkeypatch.setattr(engine_archive, "load_cudart", lambda: None)
        monkeypatch.setattr(engine_archive, "check_plans", self.answer)
        monkeypatch.setattr(engine_build, "_run_worker", self.build)
        for module in (engine_build, engine_archive):
            monkeypatch.setattr(module, "driver_cuda", lambda key: self.driver)

    def go(self, name: str) -> None:
        """Continue on a machine with another cache."""
        self.cache = self.tmp_path / name / "engines"
        self.monkeypatch.setenv("DUALLORA_EDGE_CACHE", str(self.cache.parent))

    def answer(self, bundle: Bundle, plans: list[bytes]) -> GoldenCheck:
        self.plans.append(plans)
        return self.check

    def build(self, job: Any, *_: object) -> dict[str, Any]:
        Path(job.plan).write_bytes(f"plan of {Path(job.model).name} ".encode() * 5000)
        return {"seconds": 1.0, "device_memory_bytes": 10}


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(tmp_path, monkeypatch)


@pytest.fixture
def archive(device: Device, shared_bundle: Path, tmp_path: Path) -> Path:
    """Saved on one device; the next step is on another one."""
    save_engines(tmp_path / "engines.tar", build_engines(Bundle.open(shared_bundle)))
    device.go("twin")
    return tmp_path / "engines.tar"


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def test_a_twin_gets_the_same_engine(device: Device, archive: Path, shared_bundle: Path) -> None:
    with tarfile.open(archive) as tar:  # as any other program sees it
        names = tar.getnames()
    for _ in range(2):  # the second one replaces the first
        (engine,), check = load_engines(archive, Bundle.open(shared_bundle))
        assert check is GOOD and names == [f"{engine.key.digest}/engine.json", f"{engine.key.digest}/engine.plan"]
        assert contents(device.cache) == contents(device.cache.parents[1] / "here" / "engines")
        assert find_engine(engine.key) == replace(engine, from_cache=True) and engine.driver_cuda == "12.6"
        assert device.plans.pop() == [engine.plan.read_bytes()] and device.plans == []


def other_bundle(device: Device, bundle: Path, seal: Callable[[Path], None]) -> None:
    (bundle / "model.onnx").write_bytes((bundle / "model.onnx").read_bytes() + b"\x0a\x00")
    seal(bundle)


def change(**changes: Any) -> Callable[..., None]:
    def apply(device: Device, *_: object) -> None:
        for name, value in changes.items():
            setattr(device, name, value)

    return apply


@pytest.mark.parametrize(
    ("difference", "message"),
    [
        (change(gpu=replace(GPU, name="Orin Nano")), "GPU Orin Nano here, Imaginary Orin there; build on this device"),
        (change(gpu=replace(GPU, multiprocessors=4)), "multiprocessors 4 here, 8 there"),
        (change(gpu=replace(GPU, compute_capability="sm101")), "compute capability sm101 here, sm87 there"),
        (change(tensorrt=replace(TRT, version="10.13.0")), "TensorRT 10.13.0 here, 10.3.0.30 there"),
        (change(tensorrt=TensorRT("tensorrt_rtx", "1.7", None)), "package tensorrt_rtx here, tensorrt there"),
        (change(driver="13.0"), "the driver supports CUDA 13.0 here, 12.6 there"),
        (change(driver=None), "the driver supports CUDA None here, 12.6 there"),
        (other_bundle, "another bundle: load it with the one that it was saved with"),
    ],
)
def test_what_does_not_fit(
    device: Device,
    archive: Path,
    bundle: Path,
    seal: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
    difference: Callable[..., None],
    message: str,
) -> None:
    monkeypatch.setattr("duallora_edge.runtime.graph_check.check_graph", lambda *_: None)
    difference(device, bundle, seal)
    with pytest.raises(UnfitEngineError, match=f"engines.tar does not fit: {message}"):
        load_engines(archive, Bundle.open(bundle))
    assert contents(device.cache) == {} and device.plans == []


def test_a_bundle_of_another_version_with_the_same_model(device: Device, archive: Path, bundle: Path) -> None:
    write_json(bundle / MANIFEST, read_json(bundle / MANIFEST) | {"bundle_version": 9})
    assert load_engines(archive, Bundle.open(bundle))[1] is GOOD


def test_wrong_answers(device: Device, archive: Path, shared_bundle: Path) -> None:
    device.check = BAD
    with pytest.raises(EngineError, match=r"answer wrongly here, .*; build on this device with 'duallora-edge build'"):
        load_engines(archive, Bundle.open(shared_bundle))
    assert contents(device.cache) == {}


def test_another_process_builds_it(device: Device, archive: Path, shared_bundle: Path) -> None:
    bundle = Bundle.open(shared_bundle)
    key = engine_build.engine_key(bundle, TRT, GPU)
    device.cache.mkdir(parents=True)
    with locked(device.cache, key, lambda _: None), pytest.raises(EngineError, match=f"Process {os.getpid()} is build"):
        load_engines(archive, bundle)


def test_without_a_gpu(device: Device, archive: Path, shared_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise UnavailableError("no NVIDIA driver")

    monkeypatch.setattr(engine_archive, "local_target", none)
    with pytest.raises(EngineError, match=r"No engine can be loaded on this machine: no NVIDIA driver\."):
        load_engines(archive, Bundle.open(shared_bundle))


# -- damaged and hostile archives -------------------------------------------------------------------------------


def rewrite(archive: Path, *members: tuple[tarfile.TarInfo, bytes]) -> None:
    with tarfile.open(archive, "w", format=tarfile.GNU_FORMAT) as tar:
        for member, content in members:
            member.size = len(content) if member.isreg() else 0
            tar.addfile(member, io.BytesIO(content))


def read(archive: Path) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(archive) as tar:
        return [(member, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]


def named(name: str, number: int = 1) -> Callable[[Path], None]:
    def apply(archive: Path) -> None:
        members = read(archive)
        members[number][0].name = name
        rewrite(archive, *members)

    return apply


def typed(kind: bytes) -> Callable[[Path], None]:
    def apply(archive: Path) -> None:
        record, (plan, content) = read(archive)
        plan.type, plan.linkname = kind, "/etc/passwd"
        rewrite(archive, record, (plan, content))

    return apply


def recorded(old: bytes, new: bytes) -> Callable[[Path], None]:
    def apply(archive: Path) -> None:
        (record, content), plan = read(archive)
        assert old in content
        rewrite(archive, (record, content.replace(old, new)), plan)

    return apply


def flip(archive: Path) -> None:
    content = bytearray(archive.read_bytes())
    content[20_000] ^= 1
    archive.write_bytes(content)


def huge(archive: Path) -> None:
    """A plan that is said to have 1 TB, and a file with holes that has them."""
    (record, content), (plan, _) = read(archive)
    rewrite(archive, (record, content))
    plan.size = 10**12
    with archive.open("r+b") as file:
        file.seek(1024 + -(-len(content) // 512) * 512 - 512)
        file.write(plan.tobuf(tarfile.GNU_FORMAT))
        file.truncate(10**12 + 10_000)


def cut_at(position: int) -> Callable[[Path], None]:
    return lambda archive: archive.write_bytes(archive.read_bytes()[:position]) and None


def content(value: bytes) -> Callable[[Path], None]:
    return lambda archive: archive.write_bytes(value) and None


def pipe(archive: Path) -> None:
    archive.unlink()
    os.mkfifo(archive)


def folder(archive: Path) -> None:
    archive.unlink()
    archive.mkdir()


def repeated(archive: Path) -> None:
    rewrite(archive, *read(archive), *read(archive))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (content(b""), "no header of tar: empty header"),
        (content(b"x" * 9000), "no header of tar"),
        (content(bytes(1024)), "an engine is missing"),
        *((cut_at(position), "damaged") for position in (100, 512, 700, 3000, 50_000, -1100, -1024)),
        (flip, "SHA-256 is not the recorded one"),
        (huge, "a file engine.plan of 1000000000000 bytes"),
        *((named(name), "in place of a file engine.plan") for name in ("../../engine.plan", "/engine.plan", "x" * 200)),
        (named(f"{'0' * 32}/engine.plan"), "a plan is missing"),
        (named(f"{'0' * 32}/engine.json", 0), "a record is not in its folder"),
        (named("engine.json", 0), "in place of a file engine.json"),
        *(
            (typed(kind), "in place of a file engine.plan")
            for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE)
        ),
        (recorded(b'"key"', b'"kay"'), "damaged"),
        (recorded(b"{", b"["), "damaged"),
        (recorded(b'"seconds": 1.0', b'"seconds": "1"'), "no number in 'seconds'"),
        (lambda archive: rewrite(archive, read(archive)[0]), "a plan is missing"),
        (repeated, "it has more engines than the bundle"),
        (pipe, "it is not a file"),
        (folder, "cannot be read"),
        (lambda archive: archive.unlink(), "No such file"),
    ],
)
def test_a_damaged_archive(
    device: Device, archive: Path, shared_bundle: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(archive)
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(EngineError, match=message):
        load_engines(archive, Bundle.open(shared_bundle))
    assert contents(device.cache) == {} and {path.name for path in tmp_path.iterdir()} - {"twin"} == before - {"twin"}


@pytest.mark.parametrize("small_disk", ["128k"], indirect=True)
def test_a_full_disk(device: Device, archive: Path, shared_bundle: Path, small_disk: Path) -> None:
    bundle = Bundle.open(shared_bundle)
    (small_disk / "other").write_bytes(bytes(80_000))
    device.monkeypatch.setenv("DUALLORA_EDGE_CACHE", str(small_disk))
    with pytest.raises(EngineError, match="No space left on device"):
        load_engines(archive, bundle)
    assert contents(small_disk / "engines") == {}
    device.go("here")
    with pytest.raises(EngineError, match=r"No space left on device.; free some space, or name another file in --save"):
        save_engines(small_disk / "engines.tar", [build_engine(bundle)])
    assert sorted(path.name for path in small_disk.iterdir()) == ["engines", "other"]


# -- saving, and the command ------------------------------------------------------------------------------------


def test_saving_replaces_an_archive_and_nothing_else(device: Device, shared_bundle: Path, tmp_path: Path) -> None:
    engine = build_engine(Bundle.open(shared_bundle))
    save_engines(tmp_path / "engines.tar", [engine])
    first = (tmp_path / "engines.tar").read_bytes()
    save_engines(tmp_path / "engines.tar", [engine])
    assert (tmp_path / "engines.tar").read_bytes() == first
    (tmp_path / "notes").write_text("mine")
    for name in ("notes", "here", "nothing/engines.tar"):
        with pytest.raises(ConfigError, match="name another file in --save"):
            save_engines(tmp_path / name, [engine])
    assert (tmp_path / "notes").read_text() == "mine"
    engine.plan.unlink()
    with pytest.raises(EngineError, match="damaged"):
        save_engines(tmp_path / "engines.tar", [engine])
    assert (tmp_path / "engines.tar").read_bytes() == first
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]


def test_the_command(call: Call, device: Device, archive: Path, shared_bundle: Path) -> None:
    device.monkeypatch.setattr("duallora_edge.runtime.commands.build.load_cudart", lambda: None)
    code, out, err = call("build", shared_bundle, "--load", archive)
    assert (code, err) == (0, "") and out.startswith("Golden check: passed in fp32") and out.endswith("MB, loaded)\n")
    for option in ("--force", "--save=x", "--workspace-mb=99", "--compute-capability=sm86"):
        assert "leave out the other options" in " ".join(
            call("build", shared_bundle, "--load", archive, option)[2].split()
        )


def test_an_engine_built_ahead_of_time(
    call: Call, shared_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the real TensorRT-RTX; it fits every GPU of its compute capability, whatever the driver."""
    rtx = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (extra 'rtx')")
    archive = tmp_path / "engines.tar"
    monkeypatch.setenv("DUALLORA_EDGE_CACHE", str(tmp_path / "here"))
    code, _, err = call("build", shared_bundle, "--compute-capability", "sm86", "--save", archive)
    assert code == 0 and err.endswith(f"saved in {archive}\n")
    driver_cuda, twin = engine_build.driver_cuda, Device(tmp_path, monkeypatch)
    monkeypatch.setattr(engine_archive, "driver_cuda", driver_cuda)
    twin.go("twin")
    twin.tensorrt = TensorRT("tensorrt_rtx", rtx.__version__, rtx)
    with pytest.raises(UnfitEngineError, match="compute capability sm87 here, sm86 there"):
        load_engines(archive, Bundle.open(shared_bundle))
    twin.gpu = replace(GPU, compute_capability="sm86")
    (engine,), _ = load_engines(archive, Bundle.open(shared_bundle))
    assert engine.bytes > 10_000 and engine.driver_cuda is None
