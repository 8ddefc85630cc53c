"""The process that builds one engine: ``python -m duallora_edge.runtime.backends.engine_worker JOB``.

A build can take so much memory that the system kills the process, and some graphs crash the builder. In a child
process, neither harms the application. JOB is a `Job` as JSON. Each line on standard output is a JSON object:
``{"progress": text}``, and at the end either ``{"done": facts}`` or ``{"error": text, "errno": number or null}``. The
process ends at once when its standard input does, that is, when the process that started it is gone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from duallora_edge.files import write_atomic
from duallora_edge.runtime.backends.tensorrt_api import (
    TensorRT,
    device_memory_bytes,
    load_tensorrt,
    make_runtime,
    network_flags,
    set_precision,
    tensorrt_logger,
)
from duallora_edge.runtime.device.probes import OOM_SCORE
from duallora_edge.runtime.graph_weights import WEIGHTS, inlined
from duallora_edge.runtime.tensor_file import TensorFile

MAX_ERRORS = 3
MAX_ERROR_CHARACTERS = 400

Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """What to build: the ONNX file ``model`` with package ``package``, into the file ``plan``.

    ``model_sha256`` (hexadecimal) is that of the graph when it is read, with its weights from the file beside it.
    ``max_batch`` is the largest number of images where the graph takes any number, otherwise None.
    ``compute_capability`` ("sm86") is None for the GPU of this machine. ``timing_cache`` names a file that makes later
    builds faster, or is None.
    """

    package: str
    model: str
    model_sha256: str
    plan: str
    max_batch: int | None
    precision: str
    workspace_bytes: int
    compute_capability: str | None
    timing_cache: str | None

    def to_text(self) -> str:
        """The job as the one argument of the process."""
        return json.dumps(asdict(self))


class BuildError(Exception):
    """The model cannot become an engine; the message holds TensorRT's own words."""


def build(job: Job, say: Say) -> dict[str, Any]:
    """Build the engine and write ``job.plan``; returns its facts as JSON values.

    ``device_memory_bytes`` is None for another machine's engine. Raises `BuildError`, and ``OSError`` when the file
    cannot be written.
    """
    start = time.perf_counter()
    tensorrt = load_tensorrt((job.package,))
    trt = tensorrt.trt
    logger = tensorrt_logger(trt)
    logger.warn, errors = say, logger.errors
    builder = trt.Builder(logger)
    network = builder.create_network(network_flags(tensorrt))
    say(f"{tensorrt} reads {Path(job.model).name}")
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(_read_model(job)):
        found = [str(parser.get_error(index)) for index in range(parser.num_errors)]
        raise BuildError(f"its parser refuses the model: {_joined(found or errors)}")
    config = builder.create_builder_config()
    _configure(tensorrt, builder, network, config, job)
    timing = None if job.timing_cache is None else _load_timing(config, Path(job.timing_cache), say)
    monitor = _monitor(trt, config, say)
    say("building")
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BuildError(f"its builder gave up: {_joined(errors)}")
    Path(job.plan).write_bytes(plan)
    if timing is not None and job.timing_cache is not None:
        _save_timing(config, Path(job.timing_cache), say)
    # The builder's memory is given back before the engine takes its own: small boards cannot hold both.
    del timing, monitor, parser, config, network, builder
    memory_bytes = None
    if job.compute_capability is None:
        runtime = make_runtime(trt, logger)
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise BuildError(f"the engine was built, but cannot be loaded: {_joined(errors)}")
        memory_bytes = device_memory_bytes(engine)
    return {"seconds": time.perf_counter() - start, "device_memory_bytes": memory_bytes}


def _read_model(job: Job) -> bytes:
    model, weights = Path(job.model), Path(job.model).with_name(WEIGHTS)
    content = model.read_bytes()
    with contextlib.suppress(FileNotFoundError, ValueError):
        content = b"".join(inlined(content, TensorFile(weights.read_bytes())))
    if hashlib.sha256(content).hexdigest() != job.model_sha256:
        raise BuildError(f"{model.name} has changed since it was verified")
    return content


def _configure(tensorrt: TensorRT, builder: Any, network: Any, config: Any, job: Job) -> None:
    trt = tensorrt.trt
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.workspace_bytes)
    set_precision(tensorrt, network, config, job.precision)
    if job.compute_capability is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.__members__[job.compute_capability.upper()], 0)
    if job.max_batch is not None:
        profile = builder.create_optimization_profile()
        for index in range(network.num_inputs):  # the image, or what a prefix hands over
            tensor = network.get_input(index)
            rest = tuple(tensor.shape)[1:]
            profile.set_shape(tensor.name, (1, *rest), (1, *rest), (job.max_batch, *rest))
        config.add_optimization_profile(profile)


def _load_timing(config: Any, path: Path, say: Say) -> Any:
    """Give the builder what earlier builds measured; it refuses what another version or GPU measured."""
    content = b""
    with contextlib.suppress(OSError):
        content = path.read_bytes()
    timing = config.create_timing_cache(content)
    if content and (timing is None or not config.set_timing_cache(timing, False)):
        say("the stored timings do not fit and are ignored")
        content = b""
        timing = config.create_timing_cache(content)
    if not content:
        config.set_timing_cache(timing, False)
    return timing


def _save_timing(config: Any, path: Path, say: Say) -> None:
    timing = config.get_timing_cache()
    try:
        write_atomic(path, bytes(timing.serialize()))
    except OSError as error:
        say(f"the timings could not be stored ({error.strerror or error}), so the next build takes as long")


def _monitor(trt: Any, config: Any, say: Say) -> Any:
    """Report the main phases of the build; None before TensorRT 10, which cannot tell them."""
    if not hasattr(trt, "IProgressMonitor"):
        return None

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.whole = ""

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self.whole = phase_name
            elif parent_phase == self.whole:
                say(phase_name[:1].lower() + phase_name[1:])

        def step_complete(self, phase_name: str, step: int) -> bool:
            return True

        def phase_finish(self, phase_name: str) -> None:
            pass

    monitor = Monitor()
    config.progress_monitor = monitor
    return monitor


def _joined(errors: Iterable[str]) -> str:
    texts = [" ".join(text.split())[:MAX_ERROR_CHARACTERS] for text in errors]
    more = f"; and {len(texts) - MAX_ERRORS} more" if len(texts) > MAX_ERRORS else ""
    return "; ".join(texts[:MAX_ERRORS]) + more if texts else "it gave no reason"


def _end_with_parent() -> None:
    while os.read(0, 4096):
        pass
    os._exit(1)


def main() -> None:
    """Build the job that the command line names."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # output of libraries must not mix with the protocol
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(OOM_SCORE)

    def send(**message: Any) -> None:
        channel.write(json.dumps(message) + "\n")

    try:
        job = Job(**json.loads(sys.argv[1]))
        send(done=build(job, lambda text: send(progress=text)))
    except BuildError as error:
        send(error=str(error), errno=None)
    except OSError as error:
        send(error=error.strerror or str(error), errno=error.errno)
    except Exception as error:  # the bindings raise many types; the caller has to know all of them
        send(error=f"{type(error).__name__}: {_joined([str(error)])}", errno=None)


if __name__ == "__main__":
    main()
