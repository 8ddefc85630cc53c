"""The doctor and scripts/check-install.py: questions that crash, hang or lie, machines of every kind, and this one."""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from duallora_edge.device_profiles import Detected
from duallora_edge.runtime.bundle import Bundle
from duallora_edge.runtime.commands import doctor
from duallora_edge.runtime.device.probes import MODULE, NOT_INSTALLED, Answer, ask

Call = Callable[..., tuple[int, str, str]]
Write = Callable[[str], str]

ABSENT = Answer("no", reason=NOT_INSTALLED)
CPU_BUILD = Answer("ok", {"version": "1.20.0", "providers": ["CPUExecutionProvider"]})
CUDA_BUILD = Answer("ok", {"version": "1.20.0", "providers": ["CUDAExecutionProvider", "CPUExecutionProvider"]})
GPU = Answer(
    "ok", {"version": "12.6", "devices": [{"name": "Orin", "compute_capability": "8.7", "memory_bytes": 8 * 2**30}]}
)
NO_GPU = Answer("no", reason="no NVIDIA driver")
CUDA_13 = Answer("ok", {**GPU.values, "version": "13.0"})
PASSED = Answer("ok", {"check": "largest difference 0"})
STARTS = {"tensorrt_start": PASSED, "cuda": GPU}


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """``write(code)``: a module with this code, which this process and its children can import; returns its name."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def create(code: str, name: str = "fake_questions") -> str:
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(code))
        return name

    return create


def on_ladder(write: Write, rung: str) -> str:
    """A module of questions whose ladder begins with a rung ``bad``, a function body."""
    return write(
        f"""
        import ctypes, os, time
        from duallora_edge.runtime.backends import ladder as backends
        from duallora_edge.runtime.backends.ladder import rung, rungs

        def bad(bundle, threads):
            {rung}

        backends.LADDER = {{"bad": bad, "cpu": backends.LADDER["cpu"]}}
        backends.BACKENDS = ("auto", *backends.LADDER)
        """
    )


@pytest.mark.parametrize(
    ("body", "state", "reason"),
    [
        ("return {'words': list(words)}", "ok", ""),
        ("print('noise'); os.write(1, b'more noise, no newline'); return {'words': list(words)}", "ok", ""),
        ("raise ValueError('first line\\nsecond')", "no", "ValueError: first line"),
        ("raise NoAnswerError('there is none')", "no", "there is none"),
        ("raise KeyError", "no", "KeyError"),
        (
            "import sys; sys.stderr.write('A module that was compiled using NumPy 1.x cannot run'); raise ImportError",
            "no",
            "ImportError (compiled using NumPy 1)",
        ),
        ("ctypes.string_at(0)", "crashed", "the process was killed by SIGSEGV"),
        ("os.abort()", "crashed", "the process was killed by SIGABRT"),
        (
            "os.kill(os.getpid(), 9)",
            "crashed",
            "the process was killed by SIGKILL, as Linux does when memory runs out",
        ),
        (
            "import sys; print('driver lost', file=sys.stderr); sys.stderr.flush(); os._exit(3)",
            "crashed",
            "the process ended with code 3 and no answer (driver lost)",
        ),
        ("os._exit(0)", "crashed", "the process ended with code 0 and no answer"),
        ("import atexit; atexit.register(os.abort); return {}", "crashed", "the process was killed by SIGABRT"),
        ("time.sleep(60)", "hung", "no answer within 2 s"),
        ("os.system('sleep 60')", "hung", "no answer within 2 s"),
        ("os.write(1, b'x' * 10**6); return {'words': list(words)}", "ok", ""),
    ],
)
def test_a_question_always_comes_back(write: Write, body: str, state: str, reason: str) -> None:
    name = write(
        f"""
        import ctypes, os, time
        from duallora_edge.runtime.device.probes import NoAnswerError

        def question(*words):
            {body}
        """
    )
    answer = ask(f"{name}:question", "two words", "ü", timeout_s=2.0)
    expected = {"words": ["two words", "ü"]} if state == "ok" else {}
    assert (answer.state, answer.values, answer.reason) == (state, expected, reason)


def test_a_child_imports_what_its_parent_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "json.py").write_text("raise RuntimeError('the current folder was searched first')")
    monkeypatch.chdir(tmp_path)
    assert ask(f"{MODULE}:package", "json", "", timeout_s=30).ok


@pytest.mark.parametrize(
    ("code", "state", "text"),
    [
        ("__version__ = '1.2'", "ok", "1.2"),
        ("", "ok", None),
        ("import package_that_is_not_there", "no", "No module named 'package_that_is_not_there'"),
        ("import ctypes; ctypes.string_at(0)", "crashed", "SIGSEGV"),
        (
            "import types\nfloat32 = 0\nnumpy = types.ModuleType('numpy')\n"
            "def nptype(kind): return {0: numpy.float32, 1: numpy.bool}[kind]",
            "no",
            "module 'numpy' has no attribute",
        ),
    ],
)
def test_a_package_is_imported(write: Write, code: str, state: str, text: str | None) -> None:
    name = write(code, "fake_package")
    answer = ask(f"{MODULE}:package", f"{name}_that_is_older,{name}", "no-such-distribution", timeout_s=30)
    assert answer.state == state
    if state == "ok":
        assert answer.values == {"version": text}
    else:
        assert text is not None and text in answer.reason


def test_a_package_that_is_not_there(write: Write, tmp_path: Path) -> None:
    write("", "unrelated")
    assert ask(f"{MODULE}:package", "fake_package,fake.part", "", timeout_s=30) == ABSENT
    (tmp_path / "fake_package").mkdir()  # what an uninstallation may leave
    assert ask(f"{MODULE}:package", "fake_package", "", timeout_s=30).reason == "its folder is there, but empty"


FAKE_DRIVER = """
#include <stddef.h>
#include <string.h>
int cuInit(unsigned flags) { INIT; return 0; }
int cuDriverGetVersion(int *version) { *version = 12060; return 0; }
int cuDeviceGetCount(int *count) { *count = COUNT; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal + 5; return 0; }
int cuDeviceGetName(char *name, int length, int device) { strncpy(name, "Orin", length); return device != 5; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = 7ul << 30; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = attribute == 75 ? 8 : 7; return 0; }
int cuGetErrorName(int error, const char **name) { *name = "CUDA_ERROR_NO_DEVICE"; return 0; }
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler for a pretended driver")
@pytest.mark.parametrize(
    ("init", "count", "state", "reason"),
    [
        ("", 1, "ok", ""),
        ("return 100", 1, "no", "cuInit failed with CUDA_ERROR_NO_DEVICE (100)"),
        ("", 0, "no", "the NVIDIA driver lists no GPU"),
        ("*(volatile int *)0 = 1", 1, "crashed", "the process was killed by SIGSEGV"),
    ],
)
def test_the_driver_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, init: str, count: int, state: str, reason: str
) -> None:
    source = tmp_path / "driver.c"
    source.write_text(FAKE_DRIVER)
    library = tmp_path / "libcuda.so.1"
    options = ["-shared", "-fPIC", f"-DINIT={init}", f"-DCOUNT={count}"]
    subprocess.run(["cc", *options, "-o", str(library), str(source)], check=True)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    answer = ask(f"{MODULE}:cuda", timeout_s=30)
    assert (answer.state, answer.reason) == (state, reason)
    if answer.ok:
        device = {"name": "Orin", "compute_capability": "8.7", "memory_bytes": 7 * 2**30}
        assert answer.values == {"version": "12.6", "devices": [device]}


def test_nothing_heavy_is_imported() -> None:
    """A broken NumPy must not keep the doctor from saying so."""
    code = (
        "import sys; import duallora_edge.runtime.commands.doctor\n"
        "print([m for m in ('numpy', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_without_a_bundle(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    code, out, _ = call("doctor")
    assert code == 0 and "Backends" not in out
    assert out.splitlines()[-1] == "No backend was tried, because that needs a bundle: duallora-edge doctor BUNDLE"


def test_json(call: Call, monkeypatch: pytest.MonkeyPatch, shared_bundle: Path) -> None:
    pretend(monkeypatch, really="numpy onnxruntime rungs rung")
    code, out, _ = call("doctor", str(shared_bundle), "--json")
    found = json.loads(out)
    assert code == 0 and found["ok"] and found["working"] in found["backends"]
    check = found["backends"]["cpu"]["values"]["golden_check"]
    assert check["images"] == 4 and check["top1_agreement"] == 1.0
    assert found["packages"]["numpy"]["state"] == "ok" and "CPUExecutionProvider" in str(found["packages"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "is not a folder"),
        (lambda folder: (folder / "model.onnx").write_bytes(b"nonsense"), "model.onnx"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json"),
    ],
)
def test_a_nonsense_bundle(
    call: Call, monkeypatch: pytest.MonkeyPatch, bundle: Path, damage: Callable[[Path], Any], message: str
) -> None:
    damage(bundle)
    pretend(monkeypatch, really="rungs")
    code, out, _ = call("doctor", str(bundle))
    last = out.splitlines()[-1]
    assert (
        code == 1 and last.startswith("No backend was tried, because the bundle cannot be used: ") and message in last
    )
    assert "Error:" not in last


def test_no_backend_can_run_a_bundle_with_other_answers(
    call: Call, write: Write, bundle: Path, change_golden: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    change_golden(bundle, features=Bundle.open(bundle).golden().features + 1)
    monkeypatch.setattr(doctor, "LADDER", on_ladder(write, "raise backends.UnavailableError('not here')"))
    pretend(monkeypatch, really="rungs rung")
    code, out, _ = call("doctor", str(bundle), "--json")
    found = json.loads(out)
    assert code == 1 and found["conclusion"] == "No backend can run this bundle here."
    assert found["backends"]["cpu"]["state"] == "no" and "wrong results" in found["backends"]["cpu"]["reason"]


@pytest.mark.parametrize(
    ("body", "state", "reason", "last"),
    [
        (
            "ctypes.string_at(0)",
            "crashed",
            "SIGSEGV",
            "Use --backend cpu here: by default the runtime tries others first (bad crashed)",
        ),
        (
            "time.sleep(60)",
            "hung",
            "no answer within 3 s",
            "Use --backend cpu here: by default the runtime tries others first (bad hung)",
        ),
        (
            "raise RuntimeError('CUDA error cudaErrorNoKernelImageForDevice:no kernel image (x); y')",
            "no",
            "CUDA error cudaErrorNoKernelImageForDevice:no kernel image (x); y",
            "Here the runtime uses: cpu in fp32 (not bad: see above)",
        ),
        (
            "raise backends.UnavailableError('not installed on this machine')",
            "no",
            "not installed on this machine",
            "Here the runtime uses: cpu in fp32 (not bad: see above)",
        ),
    ],
)
def test_a_bad_rung(
    call: Call,
    write: Write,
    monkeypatch: pytest.MonkeyPatch,
    shared_bundle: Path,
    body: str,
    state: str,
    reason: str,
    last: str,
) -> None:
    monkeypatch.setattr(doctor, "LADDER", on_ladder(write, body))
    if state == "hung":
        monkeypatch.setattr(doctor, "RUNG_TIMEOUT_S", 3.0)
    both = ["bad", "cpu"]
    pretend(monkeypatch, really="rung", rungs=Answer("ok", {"rungs": both, "auto": both}))
    code, out, _ = call("doctor", str(shared_bundle), "--json")
    found = json.loads(out)
    assert code == 0 and found["working"] == "cpu"
    bad = found["backends"]["bad"]
    assert bad["state"] == state and bad["reason"].endswith(reason)
    assert found["conclusion"].startswith(last)
    assert any(line.startswith("bad") for line in found["advice"]) == ("not installed" not in reason)


def fake_jetson(root: Path, l4t: str = "R36 (release), REVISION: 4.3") -> Path:
    """A file system of an Orin Nano."""
    files = {
        "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
        "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005\0nvidia,p3767-0005\0nvidia,tegra234\0",
        "proc/meminfo": "MemTotal:  7800000 kB\nMemAvailable:  500000 kB\n",
        "etc/nv_tegra_release": f"# {l4t}, GCID: 1\n",
        "usr/sbin/nvpmodel": '#!/bin/sh\n[ "$1" = -q ] && printf "NV Power Mode: 15W\\n0\\n"\n',
        "usr/bin/jetson_clocks": "#!/bin/sh\necho Error: run as root; exit 1\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    for program in ("usr/sbin/nvpmodel", "usr/bin/jetson_clocks"):
        (root / program).chmod(0o755)
    return root


def pretend(monkeypatch: pytest.MonkeyPatch, really: str = "", **answers: Answer) -> list[str]:
    """Questions are answered from ``answers``, by function or package name, else "not installed"; what was asked.

    Those named in ``really`` are asked, each in a child. ONNX Runtime is installed where there is an answer for it.
    """
    asked = []

    def instead(question: str, *arguments: str, timeout_s: float) -> Answer:
        function = question.split(":")[1]
        asked.append(" ".join([function, *arguments]))
        key = arguments[0].split(".")[0].split(",")[0] if function == "package" else function
        key = "cuda_python" if key == "cuda" and function == "package" else key
        if key in really.split():
            return ask(question, *arguments, timeout_s=timeout_s)
        return answers.get(key, ABSENT)

    monkeypatch.setattr(doctor, "ask", instead)
    monkeypatch.setattr(doctor, "onnxruntimes", lambda: ["onnxruntime"] if "onnxruntime" in answers else [])
    return asked


def test_a_jetson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = pretend(monkeypatch, numpy=PASSED, onnxruntime=CPU_BUILD, tensorrt=PASSED, tensorrt_start=PASSED, cuda=GPU)
    monkeypatch.setattr(doctor.platform, "machine", lambda: "aarch64")
    found = doctor.diagnose(None, fake_jetson(tmp_path))
    assert found.machine["power mode"] == "NV Power Mode: 15W, 0"
    assert found.machine["clocks"] == "unknown: jetson_clocks --show ended with code 1 (Error: run as root)"
    assert found.machine["memory"] == "0.5 GiB available"
    assert "orin-nano-8gb" in found.machine["device"] and "JetPack 6.2" in found.machine["device"]
    assert "tensorrt_start tensorrt" in asked
    text = "\n".join(found.advice)
    assert "Only 0.5 GiB of memory" in text and "built for the CPU only" not in text  # TensorRT is better than either


def test_clocks_that_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    root = fake_jetson(tmp_path)
    clocks = "SOC family:tegra234\\ncpu0: x\\nGPU MinFreq=306 MaxFreq=625\\nEMC MinFreq=204\\nNV Power Mode: 15W\\n"
    (root / "usr/bin/jetson_clocks").write_text(f'#!/bin/sh\nprintf "{clocks}"\n')
    assert doctor.diagnose(None, root).machine["clocks"] == "GPU MinFreq=306 MaxFreq=625; EMC MinFreq=204"
    (root / "usr/bin/jetson_clocks").write_text("#!/bin/sh\nsleep 60\n")
    monkeypatch.setattr(doctor, "TOOL_TIMEOUT_S", 0.3)
    assert doctor.diagnose(None, root).machine["clocks"].endswith("jetson_clocks --show failed (TimeoutExpired)")


def test_an_empty_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    monkeypatch.setenv("DUALLORA_EDGE_CACHE", str(tmp_path / "deep" / "cache"))
    found = doctor.diagnose(None, tmp_path)
    assert found.machine["memory"].startswith("unknown: ") and "power mode" not in found.machine
    assert found.machine["disk"].endswith(f"free in {tmp_path}/deep/cache")
    assert doctor.table(found).splitlines()[-1] == found.conclusion
    json.dumps(found.to_json(), allow_nan=False)


@pytest.mark.parametrize("driver", [NO_GPU, Answer("crashed", reason="SIGSEGV")])
def test_tensorrt_is_never_started_without_a_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: Answer
) -> None:
    asked = pretend(monkeypatch, tensorrt=PASSED, tensorrt_rtx=PASSED, cuda=driver)
    assert doctor.diagnose(None, tmp_path).packages["tensorrt"] == PASSED
    assert not any("tensorrt_start" in question for question in asked)


def test_a_tensorrt_that_does_not_start_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crash = Answer("crashed", reason="the process was killed by SIGSEGV")
    pretend(monkeypatch, tensorrt=PASSED, tensorrt_start=crash, cuda=GPU)
    found = doctor.diagnose(None, tmp_path)
    assert found.packages["tensorrt"] == crash and any(line.startswith("tensorrt is ins") for line in found.advice)


@pytest.mark.parametrize(
    ("answers", "l4t", "expected"),
    [
        ({}, None, "ONNX Runtime is not installed: pip install 'onnxruntime>=1.17'."),
        ({"cuda": GPU}, None, "ONNX Runtime is not installed: pip install 'onnxruntime-gpu>=1.18'."),
        ({"cuda": GPU}, "R36 (release)", "ONNX Runtime is not installed: install the build for this JetPack (docs/"),
        ({}, "R35 (release), REVISION: 4.1", "ONNX Runtime is not installed: pip install 'onnxruntime>=1.17'."),
        (
            {"tensorrt": Answer("no", reason="AttributeError: module 'numpy' has no attribute 'bool'.")},
            None,
            "This tensorrt is too old for the installed NumPy: pip install 'numpy<1.24'",
        ),
        (
            {"onnxruntime": Answer("no", reason="ImportError: numpy.core.multiarray failed to import")},
            None,
            "This onnxruntime was built for NumPy 1: pip install 'numpy<2'",
        ),
        (
            {"cv2": Answer("no", reason="ImportError (compiled using NumPy 1)")},
            None,
            "This opencv was built for NumPy 1: pip install 'numpy<2'",
        ),
        (
            {"onnxruntime": Answer("no", reason="ImportError")},
            None,
            "onnxruntime is installed, but cannot be imported (ImportError): pip uninstall onnxruntime, then pip",
        ),
        (
            {"onnxruntime": Answer("crashed", reason="SIGILL")},
            None,
            "onnxruntime is installed, but crashed (SIGILL): pip uninstall onnxruntime, then pip install 'onnxruntime>",
        ),
        (
            {"cv2": Answer("hung", reason="no answer within 60 s")},
            None,
            "opencv is installed, but hung (no answer within 60 s): reinstall",
        ),
        ({"onnxruntime": CUDA_BUILD}, None, "The GPU does not answer (not installed): check the driver"),
        (
            {"onnxruntime": CPU_BUILD, "cuda": GPU},
            None,
            "built for the CPU only: pip uninstall onnxruntime, then pip install 'onnxruntime-gpu>=1.18'.",
        ),
        (
            {"onnxruntime": CPU_BUILD, "cuda": GPU},
            "R36 (release), REVISION: 4.3",
            "built for the CPU only: pip uninstall onnxruntime, then install the build for this JetPack (docs/",
        ),
        ({"tensorrt": PASSED, **STARTS}, None, "TensorRT needs cuda-python: pip install 'cuda-python>=12.9.1,<13'."),
        (
            {"tensorrt": PASSED, **STARTS, "cuda": CUDA_13},
            None,
            "TensorRT needs cuda-python: pip install 'cuda-python>=13,<14'.",
        ),
        (
            {"tensorrt": PASSED, **STARTS, "cuda_python": Answer("ok", {"version": "12.6.2.post1"})},
            None,
            "cuda-python 12.6.2.post1 stops the other threads while the GPU works: pip uninstall cuda-python "
            "cuda-bindings, then pip install 'cuda-python>=12.9.1,<13'.",
        ),
        ({}, "R32 (release), REVISION: 7.1", "JetPack 4 ships TensorRT 8.2"),
        ({}, "R35 (release), REVISION: 4.1", "JetPack 5.1 has Python 3.8, and Python 3.10 cannot import its TensorRT"),
        ({}, "R36 (release), REVISION: 4.3", "sudo apt install python3-libnvinfer"),
    ],
)
def test_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: dict[str, Answer], l4t: str | None, expected: str
) -> None:
    pretend(monkeypatch, **answers)
    monkeypatch.setattr(doctor.platform, "python_version_tuple", lambda: ("3", "10", "12"))
    monkeypatch.setattr(doctor.platform, "machine", lambda: "x86_64")
    found = doctor.diagnose(None, fake_jetson(tmp_path, l4t) if l4t else tmp_path)
    assert any(expected in line for line in found.advice), found.advice


@pytest.mark.parametrize(
    "answers",
    [
        {"tensorrt": PASSED, **STARTS, "cuda_python": Answer("ok", {"version": "12.9.1"})},
        {"tensorrt": PASSED, **STARTS, "cuda_python": Answer("ok", {"version": "12.9.10"}), "onnxruntime": CPU_BUILD},
        {"onnxruntime": CPU_BUILD},
        {"onnxruntime": CUDA_BUILD, "cuda": GPU},
    ],
)
def test_nothing_to_advise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: dict[str, Answer]) -> None:
    pretend(monkeypatch, **answers)
    assert doctor.diagnose(None, tmp_path).advice == ()


NO_KERNELS = Answer("no", reason="CUDA failure 209: no kernel image is available for execution on the device")
ONE_ONNXRUNTIME = (["onnxruntime"], ["onnxruntime-gpu"])


@pytest.mark.parametrize("l4t", [None, "R35 (release), REVISION: 4.1", "R36 (release), REVISION: 4.3"])
@pytest.mark.parametrize("driver", [GPU, NO_GPU])
@pytest.mark.parametrize("answer", [ABSENT, CPU_BUILD, CUDA_BUILD, Answer("hung"), Answer("no", reason="ImportError")])
@pytest.mark.parametrize("there", [[], *ONE_ONNXRUNTIME, ["onnxruntime", "onnxruntime-gpu"]])
def test_no_advice_leads_to_a_second_onnxruntime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: list[str], answer: Answer, driver: Answer, l4t: str | None
) -> None:
    """Whatever is installed is uninstalled first, working or not, in the same sentence."""
    rungs = Answer("ok", {"rungs": ["cuda"], "auto": ["cuda"]})
    pretend(monkeypatch, onnxruntime=answer, cuda=driver, rungs=rungs, rung=NO_KERNELS)
    monkeypatch.setattr(doctor, "onnxruntimes", lambda: there)
    monkeypatch.setattr(doctor.platform, "python_version_tuple", lambda: ("3", "10", "12"))
    advice = doctor.diagnose(tmp_path, fake_jetson(tmp_path, l4t) if l4t else tmp_path).advice
    about = [line for line in advice if re.search(r"onnxruntime|ONNX Runtime|no kernels", line)]
    for line in about:
        if re.search(r"install ('onnxruntime|the build|another one)", line):
            assert not there or f"pip uninstall {' '.join(there)}, then " in line
    assert about or (len(there) == 1 and answer.ok)
    assert len([line for line in about if "no kernels" not in line and "JetPack 5" not in line]) <= 1


def test_a_kernel_image_that_is_missing_names_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, rungs=Answer("ok", {"rungs": ["cuda"], "auto": ["cuda"]}), rung=NO_KERNELS, cuda=GPU)
    found = doctor.diagnose(tmp_path, tmp_path)
    assert not found.ok and "cuda: this build has no kernels for compute capability 8.7" in "\n".join(found.advice)


OK = Answer("ok", {"precision": "fp16", "check": "largest difference 0", "not_used": {}})
NO = Answer("no", reason="not here")
HUNG = Answer("hung", reason="no answer within 180 s")


@pytest.mark.parametrize(
    ("auto", "backends", "conclusion"),
    [
        ("a b c", {"a": OK, "b": OK, "c": OK}, "Here the runtime uses: a in fp16"),
        ("a b c", {"a": NO, "b": OK, "c": OK}, "Here the runtime uses: b in fp16 (not a: see above)"),
        ("c b", {"a": OK, "b": OK, "c": NO}, "Here the runtime uses: b in fp16 (not c: see above)"),
        ("b c", {"a": HUNG, "b": OK, "c": OK}, "Here the runtime uses: b in fp16"),
        ("a b", {"a": NO, "b": NO, "c": OK}, "Use --backend c here: no backend of the bundle works (a, b)."),
        ("a b", {"a": HUNG, "b": OK}, "Use --backend b here: by default the runtime tries others first (a hung)."),
        ("a b", {"a": HUNG, "b": NO}, "No backend can run this bundle here."),
    ],
)
def test_the_conclusion_follows_the_order_of_the_bundle(
    tmp_path: Path, auto: str, backends: dict[str, Answer], conclusion: str
) -> None:
    opened = Answer("ok", {"rungs": list(backends), "auto": auto.split()})
    found = doctor.Diagnosis({}, doctor.detect(tmp_path), {}, NO_GPU, opened, backends, ())
    assert found.conclusion == conclusion == doctor.table(found).splitlines()[-1]
    assert found.ok is not conclusion.startswith("No backend")


def test_a_second_try_is_shown(tmp_path: Path) -> None:
    second = Answer("ok", {"precision": "fp32", "check": "fine", "not_used": {"cuda": "wrong results in fp16"}})
    opened = Answer("ok", {"rungs": ["cuda"], "auto": ["cuda"]})
    found = doctor.Diagnosis({}, doctor.detect(tmp_path), {}, GPU, opened, {"cuda": second}, ())
    assert "  cuda     ok       fp32, fine; not cuda: wrong results in fp16" in doctor.table(found).splitlines()


def test_a_long_name_moves_the_columns(tmp_path: Path) -> None:
    opened = Answer("ok", {"rungs": ["a-rung-with-a-long-name", "b"], "auto": ["b"]})
    backends = {"a-rung-with-a-long-name": NO, "b": NO}
    lines = doctor.table(doctor.Diagnosis({}, doctor.detect(tmp_path), {}, GPU, opened, backends, ())).splitlines()
    assert len({line.index("not here") for line in lines if "not here" in line}) == 1
    assert "  a-rung-with-a-long-name  no       not here" in lines


def test_a_jetson_is_no_detected_gpu(tmp_path: Path) -> None:
    """nvidia-smi of an Orin is a stub and is not even run."""
    root = fake_jetson(tmp_path)
    (root / "usr/bin/nvidia-smi").write_text(f"#!/bin/sh\ntouch {root}/was-run; echo 'Orin (nvgpu), [N/A]'\n")
    (root / "usr/bin/nvidia-smi").chmod(0o755)
    found: Detected = doctor.detect(root)
    assert found.is_jetson and found.gpu is None and not (root / "was-run").exists()


CHECK_INSTALL = Path(__file__).parents[3] / "scripts" / "check-install.py"


def check_install(*arguments: str) -> tuple[int, list[str]]:
    """Exit code and lines of the script."""
    done = subprocess.run([sys.executable, str(CHECK_INSTALL), *arguments], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()


def test_check_install(shared_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it on this machine, with what the doctor says of it."""
    monkeypatch.chdir(shared_bundle.parent)
    code, lines = check_install(shared_bundle.name)
    assert code == 0 and lines[-1] == "The installation works."
    assert lines[-2].startswith("ok      4 of 4 golden images get the expected label, ")
    last = lines.index("ok      duallora-edge doctor") - 2
    assert lines[last].startswith(("Here the runtime uses: ", "Use --backend "))
    assert any(line.split()[:2] == ["cpu", "ok"] for line in lines[:last])
    assert max(map(len, lines)) <= 200


def test_check_install_where_the_doctor_finds_a_problem(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = runpy.run_path(str(CHECK_INSTALL))
    script["main"].__globals__["check_import"] = lambda name, code: True
    asked: list[tuple[list[str], str]] = []
    monkeypatch.setattr(subprocess, "call", lambda command, cwd: asked.append((command, cwd)) or 1)
    assert script["main"]([str(bundle)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [
        "FAILED  duallora-edge doctor: see its advice above",
        "The installation does not work yet.",
    ]
    command = [sys.executable, "-m", "duallora_edge", "doctor", str(bundle)]
    assert asked == [(command, str(CHECK_INSTALL.parent))]


CUDA_PYTHON = {"cuda/__init__": "", "cuda/bindings/__init__": "", "cuda/bindings/runtime": ""}
TENSORRT = {"tensorrt": "__version__ = '10.3.0'"}


@pytest.mark.parametrize(
    ("modules", "passed", "line"),
    [
        ({**TENSORRT, **CUDA_PYTHON}, True, "ok      import tensorrt: 10.3.0"),
        ({**TENSORRT, "cuda/__init__": "raise ImportError"}, False, "cuda-python is not installed: pip install 'cuda-"),
        ({**TENSORRT, "onnxruntime": "raise ImportError('NumPy 1')"}, False, "FAILED  import onnxruntime: ImportError"),
        ({"onnxruntime": "__version__ = '1.23.2'"}, True, "ok      import onnxruntime: 1.23.2"),
        ({}, False, "FAILED  neither onnxruntime nor tensorrt is installed; see docs/jetson.md"),
    ],
    ids=["tensorrt", "without cuda-python", "broken onnxruntime", "onnxruntime", "none"],
)
def test_check_install_needs_one_backend(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    modules: dict[str, str],
    passed: bool,
    line: str,
) -> None:
    for name, code in modules.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    script = runpy.run_path(str(CHECK_INSTALL))
    script["main"].__globals__["find_spec"] = lambda name: name in modules
    script["main"].__globals__["check_doctor"] = lambda bundle: True
    assert script["main"]([]) == (not passed)
    assert line in capsys.readouterr().out


def test_check_install_tells_an_old_python(capsys: pytest.CaptureFixture[str]) -> None:
    ast.parse(CHECK_INSTALL.read_text(), feature_version=(3, 7))
    script = runpy.run_path(str(CHECK_INSTALL))
    script["main"].__globals__["NEEDED"] = (99, 0)
    assert script["main"]([]) == 1
    assert ": too old, 3.10 or later is needed" in capsys.readouterr().out
