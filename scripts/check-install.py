"""Check an installation of the duallora-edge runtime on the device that it was installed on.

    python3 check-install.py [BUNDLE]

One line a check, then the output of ``duallora-edge doctor``; with a bundle its golden images are classified. Exit
code 0 when everything works, else 1. Python 3.6 can run this file, to be told that it is too old.
"""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

# Children start here: in a checkout they would import its folder instead of what is installed.
FOLDER = str(Path(__file__).resolve().parent)
NEEDED = (3, 10)
IMPORT_TIMEOUT_S = 120
# Two classes may be as close as the differences between two machines.
CLOSE = 0.01

IMPORTS = {
    "duallora_edge.runtime": "import sys, duallora_edge.runtime as m; print('without torch' if 'torch' not in "
    "sys.modules else sys.exit('it imports torch'))",
    "numpy": "import numpy; print(numpy.__version__)",
    "pillow": "import PIL.Image; print(PIL.__version__)",
}
# One of these is enough. None may be broken.
BACKENDS = {
    "onnxruntime": "import onnxruntime; print(onnxruntime.__version__)",
    "tensorrt": "import tensorrt; from duallora_edge.runtime.backends import tensorrt as backend; "
    "backend.load_cudart(); print(tensorrt.__version__)",
}
REMEDY = "see docs/jetson.md"


def say(passed: bool, text: str) -> bool:
    """Print the line of one check and hand back whether it passed."""
    print(("ok      " if passed else "FAILED  ") + text, flush=True)
    return passed


def check_python() -> bool:
    """This Python can run the package."""
    version = ".".join(map(str, sys.version_info[:3]))
    remedy = "" if sys.version_info >= NEEDED else ": too old, 3.10 or later is needed (docs/jetson.md)"
    return say(not remedy, f"Python {version}{remedy}")


def check_import(name: str, code: str) -> bool:
    """The package imports, in a process of its own: a broken one may kill it, or hang."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            cwd=FOLDER,
            timeout=IMPORT_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return say(False, f"import {name}: no answer within {IMPORT_TIMEOUT_S} s; reinstall it")
    answer = done.stdout if done.returncode == 0 else done.stderr
    last = (answer.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return say(done.returncode == 0, f"import {name}: {last}" + (f"; {REMEDY}" if done.returncode else ""))


def check_backends() -> bool:
    """A backend is installed, and none that is installed is broken."""
    installed = [name for name in BACKENDS if find_spec(name)]
    passed = [check_import(name, BACKENDS[name]) for name in installed]
    return all(passed) if installed else say(False, f"neither {' nor '.join(BACKENDS)} is installed; {REMEDY}")


def check_doctor(bundle: list) -> bool:
    """``duallora-edge doctor`` finds a backend."""
    print("", flush=True)
    code = subprocess.call([sys.executable, "-m", "duallora_edge", "doctor", *bundle], cwd=FOLDER)
    print("", flush=True)
    return say(code == 0, "duallora-edge doctor" + ("" if code == 0 else ": see its advice above"))


def check_golden(path: str) -> bool:
    """The classifier gives the golden images of the bundle the labels that they had before the export."""
    from duallora_edge.errors import DualLoraEdgeError
    from duallora_edge.runtime import Bundle, Classifier

    try:
        classifier = Classifier.load(path)
        golden = Bundle.open(path).golden()
        predictions = [classifier(image) for image in golden.image]
    except DualLoraEdgeError as error:
        return say(False, str(error))
    right = 0
    for prediction, expected in zip(predictions, golden.probabilities, strict=True):
        right += bool(expected[classifier.classes.index(prediction.label)] >= expected.max() - CLOSE)
    milliseconds = sorted(prediction.timings.infer_ms for prediction in predictions)[len(predictions) // 2]
    text = f"{right} of {len(predictions)} golden images get the expected label"
    return say(right == len(predictions), f"{text}, {milliseconds:.2f} ms each, on {classifier.backend.name}")


def main(arguments: list) -> int:
    """Run the checks; what needs an earlier one is left out when that failed."""
    if len(arguments) > 1 or arguments[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 2
    bundle = [str(Path(path).resolve()) for path in arguments]
    passed = check_python()
    if passed:
        imports = [check_import(name, code) for name, code in IMPORTS.items()]
        passed = all(imports) and all([check_backends(), check_doctor(bundle)])  # the doctor says what to do
        passed = passed and all(check_golden(path) for path in bundle)
    print("The installation works." if passed else "The installation does not work yet.")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
