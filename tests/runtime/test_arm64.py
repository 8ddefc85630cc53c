"""The runtime on arm64 Debian: installed by pip, and its golden images classified there, natively or in QEMU.

Takes about eight minutes in QEMU, five of them to make the system; a folder in DUALLORA_EDGE_ARM64_ROOT that already
holds one (Python 3.10 or later with pip, and /proc mounted) is used as it is, and left as it was.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from duallora_edge.runtime.bundle import Bundle

pytestmark = pytest.mark.slow

PROJECT = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "duallora_edge", "learner", "export", "runtime", "device_profiles")
BINFMT = Path("/proc/sys/fs/binfmt_misc")
SUITE = "bookworm"


def run(*command: str | Path, **settings: Any) -> str:
    """The standard output of a command; what it said is in the failure when it fails."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **settings)
    assert done.returncode == 0, (
        f"{command} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    )
    return done.stdout


def what_is_missing() -> str | None:
    """Why this machine cannot run programs in a root folder of arm64, or None."""
    if platform.system() != "Linux" or os.geteuid() != 0:
        return "chroot needs Linux and root"
    if platform.machine() == "aarch64":
        return None
    if not any("enabled" in file.read_text() for file in BINFMT.glob("qemu-aarch64")):
        return f"no qemu-aarch64 in {BINFMT}: install qemu-user-static and binfmt-support"
    return None


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    """The root folder of an arm64 system with Python and pip."""
    missing = what_is_missing()
    if missing:
        pytest.skip(missing)
    if given := os.environ.get("DUALLORA_EDGE_ARM64_ROOT"):
        yield Path(given)
        return
    if shutil.which("debootstrap") is None:
        pytest.skip("debootstrap is not installed, and DUALLORA_EDGE_ARM64_ROOT names no root folder")
    # Not in tmp_path, which pytest keeps: several hundred megabytes, owned by root.
    with tempfile.TemporaryDirectory(prefix="duallora-arm64-") as folder:
        target = Path(folder) / "root"
        run("debootstrap", "--arch=arm64", "--variant=minbase", "--include=python3,python3-pip", SUITE, target)
        yield target


@pytest.fixture
def home(root: Path) -> Iterator[Path]:
    """An empty folder inside the root, deleted afterwards."""
    folder = Path(tempfile.mkdtemp(dir=root / "tmp", prefix="duallora-"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def vit_bundle(make_task: Callable[..., Any], tmp_path: Path) -> Path:
    """The bundle of the embedded ViT after one small task."""
    train = make_task("shapes", ["round", "square"], [0, 1]).train
    for index, (image, label) in enumerate(zip(train.pixels, train.labels, strict=True)):
        file = tmp_path / "photos" / label / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    command = [sys.executable, "-m", "duallora_edge"]
    run(*command, "train", "--data", tmp_path / "photos", "--run", tmp_path / "run", "--epochs", "1", "--device", "cpu")
    run(*command, "export", tmp_path / "run", "--target", "arm64-cpu", "-o", tmp_path / "vit")
    return tmp_path / "vit"


def test_install_and_classify(root: Path, home: Path, vit_bundle: Path, shared_bundle: Path, tmp_path: Path) -> None:
    inside = Path("/") / home.relative_to(root)

    def python(*arguments: str) -> str:
        settings = {"PYTHONPATH": str(inside / "site"), "HOME": str(inside), "OMP_NUM_THREADS": "1"}
        variables = [f"{name}={value}" for name, value in settings.items()]
        return run("chroot", root, "/usr/bin/env", "-i", "PATH=/usr/bin:/bin", *variables, "python3", *arguments)

    facts = python("-c", "import platform as p; print(p.machine(), p.python_version(), p.libc_ver()[1])")
    machine, version, glibc = facts.split()
    assert machine == "aarch64"

    # The wheels are fetched and built out here: the root needs neither a network nor a compiler.
    (tmp_path / "source").mkdir()  # setuptools leaves its files in the source folder
    for name in SOURCES:
        copy = shutil.copytree if (PROJECT / name).is_dir() else shutil.copy2
        copy(PROJECT / name, tmp_path / "source" / name)
    pip = [sys.executable, "-m", "pip"]
    run(*pip, "wheel", "--no-deps", "--wheel-dir", home / "wheels", tmp_path / "source")
    wheel = next((home / "wheels").glob("duallora_edge-*.whl"))
    options = ["--only-binary=:all:", "--implementation=cp", f"--python-version={version}"]
    # pip does not derive the older tags, with which many wheels are marked, from the newest.
    newest = int(glibc.removeprefix("2."))
    options += ["--platform=manylinux2014_aarch64"]
    options += [f"--platform=manylinux_2_{minor}_aarch64" for minor in range(17, newest + 1)]
    run(*pip, "download", *options, "--dest", home / "wheels", f"{wheel}[cpu]")
    offline = ["--no-index", "--find-links", str(inside / "wheels")]
    python("-m", "pip", "install", *offline, "--target", str(inside / "site"), f"{inside}/wheels/{wheel.name}[cpu]")

    shutil.copy2(PROJECT / "scripts" / "check-install.py", home)
    for source, name in ((vit_bundle, "vit"), (shared_bundle, "colours")):
        shutil.copytree(source, home / name)
        found = json.loads(python("-m", "duallora_edge", "doctor", str(inside / name), "--json"))
        assert found["working"] == "cpu" and " on aarch64 " in found["machine"]["python"]
        lines = python(str(inside / "check-install.py"), str(inside / name)).splitlines()
        images = len(Bundle.open(source).golden().image)
        assert f"ok      {images} of {images} golden images get the expected label" in lines[-2]
        print(name, found["backends"]["cpu"]["values"]["check"], lines[-2], sep="\n")
