"""From a run directory to a bundle in one call."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from duallora_edge.device_profiles import DeviceProfile, Target, resolve_target
from duallora_edge.errors import BundleError, DataError, ExportError
from duallora_edge.export.bundle import Exported, write_bundle
from duallora_edge.export.delta import fold_by_ranks, make_delta
from duallora_edge.files import write_atomic
from duallora_edge.learner.callbacks import Callback
from duallora_edge.learner.methods import compose
from duallora_edge.learner.network.task_record import TaskRecord
from duallora_edge.learner.reading import read_images, source_groups
from duallora_edge.learner.run_directory import RunDirectory
from duallora_edge.runtime.bundle import Bundle, Manifest
from duallora_edge.runtime.field.delta import delta_facts
from duallora_edge.runtime.preprocess import Pixels

REAL_IMAGES = 256


@dataclass(frozen=True)
class Delta:
    """A delta that was written: its file and size, and the manifest of the bundle that it makes."""

    path: Path
    bytes: int
    manifest: Manifest

    @property
    def share(self) -> float:
        """Its size as a share of that of the bundle."""
        return self.bytes / sum(record.bytes for record in self.manifest.files.values())


def export_run(
    run: str | Path,
    output: str | Path,
    target: str = "jetson",
    *,
    jetpack: str | None = None,
    precision: str = "auto",
    batch: int | None = None,
    split: bool = False,
    bundle_version: int | None = None,
    weights: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Exported:
    """Write a verified bundle for a device: ONNX graphs, golden outputs, manifest.

    Every graph is compared with the trained model on generated images and, where the images of the run can still be
    read, on up to `REAL_IMAGES` real ones. A bundle is written only when they agree.

    Args:
        run: The run directory.
        output: The folder of the bundle; a bundle that is there is replaced as a whole or not at all.
        target: A device of ``duallora-edge devices``, ``jetson``, or the YAML file of a profile.
        jetpack: The JetPack version on the device, by default that of the profile.
        precision: Precision of the graph for the GPU: ``auto`` (fp16 where the device has it), ``fp16`` or ``fp32``.
        batch: Images in one run of the graph: a number, 0 for any number, None for 1 (any number on a CPU).
        split: Add the GPU's graph in two parts, of which a new task changes only the second.
        bundle_version: By default one more than the bundle that is replaced.
        weights: The file of the backbone's weights, when it was moved.
        say: Called with lines for the user.

    Returns:
        The manifest, the estimates for the target, and where the bundle lies.

    Raises:
        ExportError: The run has no task, the device cannot do what was asked for, something else than a bundle is at
            ``output``, or a graph does not answer as the trained model. What is at ``output`` stays untouched.
        RunError: The run is missing or damaged.
        ProfileError: The target is unknown.
    """
    resolved = resolve_target(target, jetpack)
    return _export(
        RunDirectory.open(Path(run)), Path(output), resolved, precision, batch, split, bundle_version, weights, say
    )[0]


def export_delta(
    run: str | Path,
    old: str | Path,
    output: str | Path,
    target: str | None = None,
    *,
    jetpack: str | None = None,
    bundle_version: int | None = None,
    weights: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Delta:
    """Export a run as the difference to an older bundle of it, for devices that have that one.

    The new bundle is built and verified as by `export_run`, with the precision, batch and parts of the older one. The
    delta was applied and made the same bundle, bit for bit, before it is written.

    Args:
        run: The run directory.
        old: The folder of the older bundle, usually of fewer tasks of this run.
        output: The file of the delta; a delta that is there is replaced.
        target: As for `export_run`; by default that of the older bundle.
        jetpack: The same.
        bundle_version: By default one more than that of the older bundle.
        weights: The file of the backbone's weights, when it was moved.
        say: Called with lines for the user.

    Returns:
        The size of the delta and of the bundle, and the manifest of the bundle.

    Raises:
        ExportError: As for `export_run`, or something else than a delta is at ``output``.
        BundleError: ``old`` is not a bundle, or is damaged.
        RunError: The run is missing or damaged.
        ProfileError: The target is unknown.
    """
    base, file = Bundle.open(old), Path(output)
    before = base.manifest
    if target is None:
        target, jetpack = str(before.target.get("profile")), jetpack or before.target.get("jetpack")
    if file.exists():
        try:
            delta_facts(file)
        except BundleError as error:
            raise ExportError(f"{file} exists and is not a delta; give another name with -o.") from error
    resolved = resolve_target(target, jetpack)
    opened = RunDirectory.open(Path(run))
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as folder:
        exported, records = _export(
            opened, Path(folder) / "bundle", resolved, before.precision, before.batch or 0, before.split,
            bundle_version or before.bundle_version + 1, weights, say,
        )  # fmt: skip
        made = Path(folder) / "delta"
        make_delta(opened, records, base, exported.bundle, made)
        content = made.read_bytes()
    write_atomic(file, content)
    return Delta(file, len(content), exported.manifest)


def _export(
    run: RunDirectory,
    output: Path,
    target: Target,
    precision: str,
    batch: int | None,
    split: bool,
    version: int | None,
    weights: str | None,
    say: Callable[[str], None],
) -> tuple[Exported, Sequence[TaskRecord]]:
    records = run.records()
    if not records:
        raise ExportError(f"The run {run.path} has learned no task yet; 'duallora-edge train' teaches it one.")
    say(f"Target: {target.reason}")
    model = compose(run.backbone(weights), records).eval()
    fold_by_ranks(model, records)
    on_cpu = target.profile.kind == "cpu"
    exported = write_bundle(
        run,
        model,
        target,
        output,
        training_images(run, say),
        version,
        precision=pick_precision(target.profile, precision),
        batch=batch or (None if on_cpu or batch == 0 else 1),
        split=split,
    )
    return exported, records


def pick_precision(profile: DeviceProfile, wanted: str) -> str:
    """The precision for a device: ``auto`` is its default. Raises `ExportError` with the reason when it is refused."""
    if wanted == "auto":
        return profile.default_precision
    if wanted not in ("fp32", "fp16"):
        reason = profile.precisions.get(wanted) or "this project has no such graph"
        raise ExportError(f"{wanted} is not exported for {profile.name}: {reason.rstrip('.')}; use --precision auto.")
    refused = profile.precisions.get(wanted, "the device does not offer it")
    if refused is not None:
        raise ExportError(f"{wanted} is not exported for {profile.name}: {refused.rstrip('.')}; use --precision fp32.")
    return wanted


def training_images(run: RunDirectory, say: Callable[[str], None]) -> Pixels | None:
    """Up to `REAL_IMAGES` training images, spread over the tasks, or None (said) where no source can be read."""
    names = {run.read_info(task).name for task in run.active_tasks()}
    pixels: list[Pixels] = []
    for settings in source_groups(run, names):
        if not settings:
            say("Parity is not checked on real images of tasks whose source is no longer known.")
            continue
        try:
            stream = read_images(replace(run.config, **settings), run.info, Callback())
        except DataError as error:
            say(f"Parity is not checked on real images of {settings.get('data')}: {error}")
            continue
        for task in stream.tasks:
            if task.name in names and len(task.train):
                count = min(len(task.train), -(-REAL_IMAGES // len(names)))
                pixels.append(task.train.pixels[np.linspace(0, len(task.train) - 1, count, dtype=np.int64)])
    return np.concatenate(pixels) if pixels else None
