"""The front matter of a README.md, which the Hugging Face Hub reads."""

from __future__ import annotations

from typing import Any

import timm
import yaml

from duallora_edge.errors import RunError
from duallora_edge.learner.measurements import stored_metrics
from duallora_edge.learner.report.metrics import Metrics
from duallora_edge.learner.run_directory import RunDirectory

README = "README.md"


def front_matter(run: RunDirectory, library: str, task: str, tags: list[str], metrics: Metrics | None = None) -> str:
    """YAML between two lines of dashes: library and task of a model, what it was made of, and ``metrics`` of it.

    The license is left out, because only the owner of the images knows it. Metrics are left out where a part of
    the training images took the place of the test images.
    """
    values: dict[str, Any] = {"library_name": library, "pipeline_tag": task, "tags": ["duallora-edge", *tags]}
    if (base := hub_id(run)) is not None:
        values["base_model"] = base
    if metrics is not None and not run.config.develop:
        named = {"accuracy": "last_accuracy", "calibration_error": "calibration_error"}
        measured = {kind: metrics.summary[key] for kind, key in named.items()}
        found = [{"type": kind, "value": round(value, 4)} for kind, value in measured.items() if value is not None]
        dataset = {"type": "images", "name": f"{metrics.last.n} test images of {len(metrics.tasks)} tasks"}
        result = {"task": {"type": task}, "dataset": dataset, "metrics": found}
        if found:
            values["model-index"] = [{"name": run.path.resolve().name, "results": [result]}]
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---\n"


def hub_id(run: RunDirectory) -> str | None:
    """Where the Hub has the weights of the run's backbone; None where they came from elsewhere."""
    config = timm.get_pretrained_cfg(run.info.name, allow_unregistered=True)
    return None if run.config.weights or config is None else config.hf_hub_id or None


def metrics_of(run: RunDirectory) -> Metrics | None:
    """The metrics of the run; None where it was not measured, or the records of it are damaged."""
    try:
        return stored_metrics(run)
    except RunError:
        return None
