"""``duallora-edge build``."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click

from duallora_edge.runtime.backends.contract import GoldenCheck, UnavailableError
from duallora_edge.runtime.backends.engine_archive import check_archive_target, load_engines, save_engines
from duallora_edge.runtime.backends.engine_build import TIMEOUT_S, build_engines
from duallora_edge.runtime.backends.engine_cache import Engine, EngineError, RefusedModelError
from duallora_edge.runtime.backends.ladder import Backend, open_backend
from duallora_edge.runtime.backends.tensorrt import load_cudart
from duallora_edge.runtime.bundle import Bundle
from duallora_edge.text import escaped


def _capability(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """A compute capability written as sm86, sm_86 or 8.6."""
    if value is None:
        return None
    match = re.fullmatch(r"(?:sm_?)?(\d{1,2})\.?(\d)", value.lower())
    if match is None:
        raise click.BadParameter(f"'{value}' is not a compute capability such as sm86.")
    return f"sm{match[1]}{match[2]}"


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--compute-capability",
    "capability",
    callback=_capability,
    metavar="SM",
    help="Build ahead of time with TensorRT-RTX, for RTX-class GPUs of this compute capability, such as sm86.",
)
@click.option(
    "--workspace-mb", type=click.IntRange(min=16), help="Working memory for the builder. Default: as in the bundle."
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=1),
    default=TIMEOUT_S,
    show_default=True,
    help="Seconds to build at most.",
)
@click.option("--force", is_flag=True, help="Build again even if the engine exists.")
@click.option(
    "--save", type=click.Path(path_type=Path), metavar="FILE", help="Write the engine to an archive for equal devices."
)
@click.option(
    "--load", type=click.Path(path_type=Path), metavar="FILE", help="Take the engine from an archive and build nothing."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def build(
    bundle: Path,
    capability: str | None,
    workspace_mb: int | None,
    timeout: float,
    force: bool,
    save: Path | None,
    load: Path | None,
    as_json: bool,
) -> None:
    """Build the TensorRT engine of the bundle BUNDLE for the GPU of this machine, and check it.

    The engine is kept in the cache folder, where 'predict', 'benchmark' and applications find it; the golden images of
    the bundle decide whether it is used. Building with TensorRT on a GPU is untested on a device. Building ahead of
    time with TensorRT-RTX is tested, but running the result is not.

    Devices of the same kind and software need not build it again: save it on one and load it on the others. It is
    refused where anything differs that an engine depends on, and the golden images are checked there too. An engine
    is code, so load only archives of your own. Loading is untested on a device.

    \b
    Example:
      duallora-edge build bundle
      duallora-edge build bundle --save engines.tar      on one device
      duallora-edge build bundle --load engines.tar      on its twins
      duallora-edge build bundle --compute-capability sm86
    """
    if load and (save or capability or force or workspace_mb):
        raise click.UsageError("--load builds nothing; leave out the other options.")
    opened = Bundle.open(bundle)
    if capability is None:
        _require_cudart()
    if save:
        check_archive_target(save)

    def say(text: str) -> None:
        click.echo(escaped(text), err=True)

    if load:
        engines, check = load_engines(load, opened, say)
        _show(engines, check, as_json, "loaded")
        return

    def make(chosen: Bundle) -> tuple[list[Engine], Backend | None]:
        engines = build_engines(chosen, capability, workspace_mb, force, timeout, say)
        return engines, None if capability else open_backend(chosen, "tensorrt")

    precision, wrong = opened.manifest.precision, ""
    try:
        engines, backend = make(opened)
        if backend and (backend.name, backend.precision) != ("tensorrt", precision):
            wrong = backend.not_used["tensorrt"]
    except RefusedModelError as error:
        if precision == "fp32":
            raise
        wrong = str(error)
    if wrong and precision != "fp32":
        say(f"{wrong}\nAn engine in fp32 is built instead.")
        engines, backend = make(opened.in_fp32)
    if backend and backend.name != "tensorrt":
        raise EngineError(
            f"The engine was built, but cannot be used ({backend.not_used['tensorrt']}); '{backend.name}' runs "
            "instead. Please report this."
        )
    if save:
        save_engines(save, engines)
        say(f"saved in {save}")
    _show(engines, backend.check if backend else None, as_json)


def _require_cudart() -> None:
    """Make sure, before minutes of building, that the engine can be run and checked."""
    try:
        load_cudart()
    except UnavailableError as error:
        raise EngineError(f"An engine could be built, but not checked or run: {error}.") from error


def _show(engines: list[Engine], check: GoldenCheck | None, as_json: bool, loaded: str = "") -> None:
    if as_json:
        golden = None if check is None else {**vars(check), "passed": check.passed}
        found = {"engines": [engine.to_json() for engine in engines], "golden_check": golden}
        click.echo(json.dumps(found, indent=2, allow_nan=False))
        return
    key = engines[0].key
    if check is None:
        click.echo(
            f"Golden check: not possible here, because the engine is for {key.compute_capability}; it runs where the "
            "engine is loaded."
        )
    else:
        click.echo(f"Golden check: passed in {key.precision}, {check}")
    for engine in engines:
        how = "from the cache" if engine.from_cache else loaded or f"built in {engine.seconds:.1f} s"
        click.echo(escaped(f"Engine: {engine.plan} ({engine.bytes / 1e6:.1f} MB, {how})"))
