"""What runs the model: a ladder of backends, best first, of which a real inference picks one.

That a provider is compiled in, or even that a session lists it, does not mean that it computes on this machine:
a build without kernels for the GPU fails at the first run, and some computed silently wrong results. So every
candidate answers the golden images before it is used, and a candidate that was not used leaves its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from duallora_edge.errors import BackendError
from duallora_edge.runtime.bundle import INPUT, OUTPUTS, Bundle, FloatArray, Golden, Outputs
from duallora_edge.runtime.preprocess import Frame

MAX_DIFFERENCE = 1e-3
MIN_COSINE = 0.999

Run = Callable[[Frame], Outputs]


class UnavailableError(Exception):
    """A backend that this installation does not have; its message is the reason."""


@dataclass(frozen=True)
class GoldenCheck:
    """How the outputs of a backend compare with the golden ones, over ``images`` images.

    ``cosine`` is the smallest cosine between the two probability vectors of an image, ``max_difference`` the
    largest absolute difference of a class or task probability, ``top1_agreement`` the share of images with the
    same best class; two classes that the golden outputs hold closer than twice the tolerance count as the same.
    """

    images: int
    cosine: float
    max_difference: float
    top1_agreement: float

    @property
    def passed(self) -> bool:
        """Within `MAX_DIFFERENCE` (fp32) and `MIN_COSINE`, with the same best class everywhere. NaN fails."""
        close = self.max_difference <= MAX_DIFFERENCE and self.cosine >= MIN_COSINE
        return close and self.top1_agreement == 1.0

    def __str__(self) -> str:
        return (
            f"largest difference {self.max_difference:.2g} (at most {MAX_DIFFERENCE:g}), cosine {self.cosine:.6f}, "
            f"same best class on {self.top1_agreement:.0%} of {self.images} golden images"
        )


@dataclass(frozen=True)
class Backend:
    """The backend that runs, the check it passed, and why each better one was not used (name -> reason).

    ``run`` takes ``uint8 [N, S, S, 3]`` RGB images and returns `Outputs`; it may be called from several threads
    at once. It raises `BackendError` when the device fails.
    """

    name: str
    run: Run
    check: GoldenCheck
    not_used: Mapping[str, str]

    def __str__(self) -> str:
        reasons = [f"not {name}: {reason}" for name, reason in self.not_used.items()]
        return self.name + (f" ({'; '.join(reasons)})" if reasons else "")

    def to_json(self) -> dict[str, Any]:
        """Name, golden check and reasons as JSON values."""
        return {"name": self.name, "not_used": dict(self.not_used), "golden_check": asdict(self.check)}


def _open_cuda(bundle: Bundle, threads: int | None) -> Run:
    # TensorFloat-32 (10 bits of mantissa) is on by default and costs the parity that the bundle promises.
    return _open_onnxruntime(bundle, threads, "CUDAExecutionProvider", {"use_tf32": "0"})


def _open_cpu(bundle: Bundle, threads: int | None) -> Run:
    return _open_onnxruntime(bundle, threads, "CPUExecutionProvider", {})


# Best first. A rung raises UnavailableError when this installation lacks it, anything else when it fails.
LADDER: dict[str, Callable[[Bundle, int | None], Run]] = {"cuda": _open_cuda, "cpu": _open_cpu}
BACKENDS = ("auto", *LADDER)


def open_backend(bundle: Bundle, backend: str = "auto", threads: int | None = None, strict: bool = False) -> Backend:
    """Open the best backend, from ``backend`` downwards, that answers the golden images correctly.

    ``backend``: ``"auto"`` (the whole ladder), ``"cuda"`` or ``"cpu"``. ``threads``: CPU threads of one
    inference, by default ONNX Runtime's choice (the physical cores). ``strict``: a fallback is an error. With
    ``"auto"`` only a backend that is installed and fails counts as one, for a named backend any other than it.

    Raises `BackendError` when no backend works, or on a fallback with ``strict``.
    """
    if backend not in BACKENDS:
        raise BackendError(f"There is no backend '{backend}'; use one of {', '.join(BACKENDS)}.")
    if threads is not None and threads < 1:
        raise BackendError(f"The number of threads must be at least 1, not {threads}.")
    golden = bundle.golden()
    names = list(LADDER)
    not_used: dict[str, str] = {}
    for name in names if backend == "auto" else names[names.index(backend) :]:
        try:
            run = LADDER[name](bundle, threads)
            check = check_golden(run, golden)
        except UnavailableError as error:
            not_used[name] = str(error)
            if strict and backend == name:
                break
            continue
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            not_used[name] = _first_line(error)
        else:
            if check.passed:
                return Backend(name, run, check, not_used)
            not_used[name] = f"wrong results, {check}"
        if strict:
            break
    reasons = "; ".join(f"{name}: {reason}" for name, reason in not_used.items())
    fallback_left = strict and name != names[-1]
    remedy = "leave out 'strict' to fall back" if fallback_left else "reinstall ONNX Runtime or export the run again"
    raise BackendError(f"No backend can run {bundle.path} as asked ({reasons}); {remedy}.")


def check_golden(run: Run, golden: Golden) -> GoldenCheck:
    """Run the golden images one by one, as a camera would, and compare the probabilities."""
    cosines, differences, agreements = [], [], []
    for index in range(len(golden.image)):
        outputs = run(golden.image[index : index + 1])
        expected, actual = golden.probabilities[index].astype(np.float64), outputs.probabilities[0].astype(np.float64)
        cosines.append(expected @ actual / (np.linalg.norm(expected) * np.linalg.norm(actual)))
        differences.append(np.abs(expected - actual).max())
        differences.append(np.abs(golden.task_probabilities[index] - outputs.task_probabilities[0]).max())
        agreements.append(expected[actual.argmax()] >= expected.max() - 2 * MAX_DIFFERENCE)
    # np.min and np.max carry a NaN through, so that it fails the check.
    return GoldenCheck(len(cosines), float(np.min(cosines)), float(np.max(differences)), float(np.mean(agreements)))


def _open_onnxruntime(bundle: Bundle, threads: int | None, provider: str, options: dict[str, str]) -> Run:
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise UnavailableError(
            f"ONNX Runtime cannot be imported ({_first_line(error)}): pip install 'duallora-edge[cpu]'"
        ) from error
    if provider not in ort.get_available_providers():
        raise UnavailableError(f"this ONNX Runtime ({ort.__version__}) is built without {provider}")
    settings = ort.SessionOptions()
    settings.log_severity_level = 3  # errors only: graphs with named initializers cause a page of warnings
    settings.inter_op_num_threads = 1
    if threads is not None:
        settings.intra_op_num_threads = threads
    session = ort.InferenceSession(str(bundle.model_path), settings, providers=[(provider, options)])
    session.disable_fallback()  # or a failing GPU would be replaced by the CPU without a word
    if session.get_providers()[0] != provider:
        raise BackendError(f"ONNX Runtime could not start {provider} on this machine")
    shapes = bundle.manifest.output_shapes

    def run(images: Frame) -> Outputs:
        try:
            arrays: list[FloatArray] = session.run(list(OUTPUTS), {INPUT: images})
        except Exception as error:  # see above: no common base class
            raise BackendError(
                f"The model failed on {provider} ({_first_line(error)}); try a smaller batch."
            ) from error
        for array, (name, shape) in zip(arrays, shapes(len(images)).items(), strict=True):
            if array.shape != shape or array.dtype != np.float32:
                raise BackendError(
                    f"The model returned '{name}' as {array.dtype} {list(array.shape)} instead of float32 "
                    f"{list(shape)}; export the run again."
                )
        return Outputs(*arrays)

    return run


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]
