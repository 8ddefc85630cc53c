"""A run as an adapter of PEFT: the updates of all tasks as one LoRA on the fused qkv projections of a timm model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from duallora_edge import __version__
from duallora_edge.errors import ExportError
from duallora_edge.export.card import README, front_matter, hub_id
from duallora_edge.export.delta import folded_adapters
from duallora_edge.files import atomic_directory
from duallora_edge.learner import embedded
from duallora_edge.learner.methods import compose
from duallora_edge.learner.network.adapters import Adapter
from duallora_edge.learner.network.answers import ComposedModel
from duallora_edge.learner.network.backbone import Backbone
from duallora_edge.learner.network.task_record import TaskRecord
from duallora_edge.learner.run_directory import RunDirectory

CONFIG, ADAPTER, BACKBONE = "adapter_config.json", "adapter_model.safetensors", "backbone.safetensors"
_MADE_BY = "duallora-edge"

Pair = tuple[Tensor, Tensor]
"""A [r, d] and B [3d, r] of a LoRA; B A is added to a fused qkv weight."""


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter that was written: its folder, the rank of each module by its name in the timm model, and its size."""

    path: Path
    ranks: Mapping[str, int]
    bytes: int


def export_peft(
    run: str | Path, output: str | Path, *, task: str | None = None, weights: str | None = None
) -> PeftAdapter:
    """Write the adapters of a run as a folder that ``peft.PeftModel.from_pretrained`` loads onto its timm model.

    The model then gives the final feature f of the run. The classifier, the novelty and the gates are not in it.

    Args:
        run: The run directory.
        output: The folder of the adapter; an adapter that an export wrote there is replaced.
        task: The residual adapters are open as for an image that surely belongs to this task. It is needed where
            that differs from task to task, since PEFT has no gates.
        weights: The file of the backbone's weights, when it was moved.

    Returns:
        Where the adapter lies, and its ranks.

    Raises:
        ExportError: The run has no task or no adapters, ``task`` is unknown or missing, or something else than an
            adapter is at ``output``.
        RunError: The run is missing or damaged.
    """
    opened, folder = RunDirectory.open(Path(run)), Path(output)
    replaced = _replaced(folder)
    records = opened.records()
    if not records:
        raise ExportError(f"The run {opened.path} has learned no task yet; 'duallora-edge train' teaches it one.")
    backbone = opened.backbone(weights)
    pairs = loras(compose(backbone, records), records, task)
    if not pairs:
        raise ExportError(
            f"The run {opened.path} has no adapters: {records[-1].info.method} left the backbone as it was."
        )
    ranks = {name: len(down) for name, (down, _) in pairs.items()}
    tensors = {}
    for name, (down, up) in pairs.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = down.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = up.contiguous()
    facts = {"version": __version__, "run_digest": opened.digest(), "task": task}
    contents = {
        CONFIG: (json.dumps(_config(ranks, hub_id(opened)), indent=2) + "\n").encode(),
        ADAPTER: save(tensors, {_MADE_BY: json.dumps(facts)}),
        README: _readme(opened, backbone, task).encode(),
    }
    if _own_backbone(opened):
        contents[BACKBONE] = save({key: value.contiguous() for key, value in backbone.model.state_dict().items()})
    with atomic_directory(folder, replaces=replaced) as staging:
        for name, content in contents.items():
            (staging / name).write_bytes(content)
    return PeftAdapter(folder, ranks, sum(map(len, contents.values())))


def loras(model: ComposedModel, records: Sequence[TaskRecord], task: str | None) -> Mapping[str, Pair]:
    """The LoRA of each adapted block, by the name of its qkv projection; blocks without one are left out.

    ``model`` is that of ``records``. Raises `ExportError` where the gates of the residual adapters depend on the
    image and no ``task`` says which ones to take.
    """
    names = [record.info.name for record in records]
    if task is not None and task not in names:
        raise ExportError(f"The run has no task {task!r}; it has {', '.join(names)}.")
    pairs = {}
    for index, block in enumerate(model.network.blocks):
        adapters = [updates[index] for updates in folded_adapters(records)]
        if block.adapter is not None and block.gate_map is not None:
            gates = block.gate_map[names.index(task) if task is not None else 0]
            if task is None and not torch.equal(block.gate_map, gates.expand_as(block.gate_map)):
                raise ExportError(
                    "The residual adapters of this run open for each image by its task, which PEFT cannot do; name the "
                    f"task whose images the adapter is for with --task ({', '.join(names)})."
                )
            residual = block.adapter
            adapters.append(residual._replace(q_up=gates[:, None] * residual.q_up, v_up=gates[:, None] * residual.v_up))
        down, up = _pair(adapters)
        if len(down):
            pairs[f"blocks.{model.network.backbone.info.prefix_blocks + index}.attn.qkv"] = down, up
    return pairs


def _pair(adapters: Sequence[Adapter]) -> Pair:
    """The sum of adapters as one LoRA, without ranks that add nothing."""
    downs, ups = [], []
    for adapter in adapters:
        d = adapter.q_down.shape[1]
        for start, down, up in ((0, adapter.q_down, adapter.q_up), (2 * d, adapter.v_down, adapter.v_up)):
            wide = torch.zeros(len(up), 3 * d)
            wide[:, start : start + d] = up
            downs.append(down.float())
            ups.append(wide)
    down, up = torch.cat(downs), torch.cat(ups)
    used = up.any(dim=1)
    return down[used], up[used].T


def _config(ranks: Mapping[str, int], base: str | None) -> dict[str, object]:
    """The configuration of PEFT's LoRA; alpha is the rank, so that nothing is scaled."""
    most = max(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != most}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "target_modules": list(ranks),
        "r": most,
        "lora_alpha": most,
        "rank_pattern": others,
        "alpha_pattern": others,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _own_backbone(run: RunDirectory) -> bool:
    """Whether the backbone is not the one that the Hub has, so that the folder needs a copy of it."""
    return run.info.base is not None or hub_id(run) is None


def _replaced(output: Path) -> tuple[str, ...]:
    """The files of the adapter that will be replaced. Raises `ExportError` for what no export wrote."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return ()
    known, ours = (CONFIG, ADAPTER, BACKBONE, README), False
    if (output / ADAPTER).is_file() and all(path.name in known for path in output.iterdir()):
        with suppress(OSError, SafetensorError), safe_open(output / ADAPTER, "pt") as file:
            ours = _MADE_BY in (file.metadata() or {})
    if not ours:
        raise ExportError(f"{output} exists and is not an adapter that an export wrote; give another name with -o.")
    return known


def _readme(run: RunDirectory, backbone: Backbone, task: str | None) -> str:
    size, name = run.info.size, run.info.name
    if name == embedded.NAME:
        arguments = ", ".join(f"{key}={value!r}" for key, value in {**embedded.ARCHITECTURE, "img_size": size}.items())
        made = f"timm.models.VisionTransformer({arguments})"
    else:
        pretrained = not _own_backbone(run)
        made = f'timm.create_model("{name}", pretrained={pretrained}, num_classes=0, img_size={size})'
    own = [f'model.load_state_dict(load_file("THIS_FOLDER/{BACKBONE}"))'] if _own_backbone(run) else []
    gates = "every image" if task is None else f"images of the task {task}: its gates are assumed for all images"
    mean, std = (tuple(round(value, 6) for value in values) for values in (run.info.mean, run.info.std))
    lines = [
        front_matter(run, "peft", "image-feature-extraction", ["lora"]),
        f"# {run.path.resolve().name}",
        "",
        f"A LoRA on the qkv projections of a vision transformer, for {gates}. The model gives the final feature "
        f"[N, {backbone.dim}] of images [N, 3, {size}, {size}], normalised with mean {mean} and std {std}. "
        "Classifier, novelty and gates are in the exported bundle alone.",
        "",
        "```python",
        "import peft",
        "import timm",
        *(["from safetensors.torch import load_file"] if own else []),
        "",
        f"model = {made}",
        *own,
        'model = peft.PeftModel.from_pretrained(model, "THIS_FOLDER").eval()',
        "```",
        "",
    ]
    return "\n".join(lines)
