"""Deltas between bundles of one run: what a new task changes, and proof that a device makes the same of it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from duallora_edge.errors import ExportError
from duallora_edge.learner.methods import METHODS
from duallora_edge.learner.network.adapters import Adapter
from duallora_edge.learner.network.answers import ComposedModel
from duallora_edge.learner.network.task_record import TaskRecord
from duallora_edge.learner.run_directory import RunDirectory
from duallora_edge.runtime.bundle import GOLDEN, Bundle
from duallora_edge.runtime.field.delta import Changes, Rows, Term, add_terms, apply_delta, write_delta
from duallora_edge.runtime.graph_weights import WEIGHTS
from duallora_edge.runtime.tensor_file import Array, TensorFile, header

Terms = list[tuple[str, int, Rows, Rows]]
"""Name, first row, up [r, rows] and down [r, columns] of what is added to a tensor."""


def fold_by_ranks(model: ComposedModel, records: Sequence[TaskRecord]) -> None:
    """Fold the orthogonal adapters of all tasks into the qkv weights again, one rank after the other.

    It differs from `network.fold_all` by rounding alone, but in a way that a device can repeat (see `field.delta`).
    """
    updates = folded_adapters(records)
    for index, block in enumerate(model.network.blocks):
        terms = [term for task in updates for term in _terms("", task[index])]
        base = block.block.attn.qkv.weight.detach().cpu().numpy()
        block.weight = torch.from_numpy(add_terms(base, [term[1:] for term in terms])).to(block.weight)


def make_delta(run: RunDirectory, records: Sequence[TaskRecord], old: Bundle, new: Bundle, file: Path) -> None:
    """Write the delta between two bundles, after it was applied and gave the new one, bit for bit.

    ``old`` and ``new`` hold their contents; ``records`` are those of the active tasks of ``run``, of which ``new`` was
    made. Raises `ExportError` where it gave something else.
    """
    changes = {
        WEIGHTS: _changes(old, new, WEIGHTS, _new_terms(run, records, old, new)),
        GOLDEN: _changes(old, new, GOLDEN, {}),
    }
    write_delta(file, old, new, changes)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        made = apply_delta(old.path, file, Path(folder) / "new")
    if made.digest != new.digest:
        raise ExportError("The delta does not make the new bundle of the old one; please report this run.")


def folded_adapters(records: Sequence[TaskRecord]) -> Sequence[Sequence[Adapter]]:
    """The adapters of each task and block that are folded into the weights."""
    applied = METHODS[records[-1].info.method].updates([record.blocks for record in records])
    return [[block.orthogonal for block in blocks] for blocks in applied]


def _terms(name: str, adapter: Adapter) -> Terms:
    d = adapter.q_down.shape[1]
    parts = (("q", 0, adapter.q_up, adapter.q_down), ("v", 2 * d, adapter.v_up, adapter.v_down))
    return [
        (f"{name}.{part}", start, up.float().cpu().numpy(), down.float().cpu().numpy())
        for part, start, up, down in parts
        if len(up)
    ]


def _new_terms(run: RunDirectory, records: Sequence[TaskRecord], old: Bundle, new: Bundle) -> Mapping[str, Terms]:
    """What the tasks add that were learned after ``old`` was exported, by tensor; nothing where that is not known."""
    active = run.active_tasks()
    states = [run.digest(active[:count]) for count in range(len(active) + 1)]
    exported = old.manifest.provenance.get("run_digest")
    if exported not in states[1:]:
        return {}
    updates = folded_adapters(records)
    first, prefix = states.index(exported), run.info.prefix_blocks
    terms: dict[str, Terms] = {}
    for index in range(len(updates[0])):
        name = f"blocks.{prefix + index}.attn.qkv.weight"
        added = [_terms(f"{name}.{task}", updates[task][index]) for task in range(first, len(updates))]
        terms[name] = [term for each in added for term in each]
    return terms


def _changes(old: Bundle, new: Bundle, name: str, terms: Mapping[str, Terms]) -> Changes:
    before, after = (TensorFile(bundle.content(name).view()) for bundle in (old, new))
    tensors: dict[str, Array] = {}
    sums: dict[str, tuple[Term, ...]] = {}
    for tensor, entry in after.entries.items():
        value, known = after[tensor], before.entries.get(tensor)
        if known is not None and (known.dtype, known.shape) == (entry.dtype, entry.shape):
            if before[tensor].tobytes() == value.tobytes():
                continue
            added = terms.get(tensor, [])
            if added and np.array_equal(add_terms(before[tensor], (term[1:] for term in added)), value):
                sums[tensor] = tuple(Term(start, factors) for factors, start, _, _ in added)
                tensors |= dict(_factors(added))
                continue
        tensors[tensor] = value
    return Changes(header(after.arrays()), tensors, sums)


def _factors(terms: Terms) -> Iterator[tuple[str, Array]]:
    for factors, _, up, down in terms:
        yield f"{factors}.up", np.ascontiguousarray(up)
        yield f"{factors}.down", np.ascontiguousarray(down)
