"""Where and in which precision to train."""

from __future__ import annotations

import torch

from duallora_edge.errors import ConfigError
from duallora_edge.learner import distributed


def pick_device(name: str) -> torch.device:
    """The device for ``auto`` (CUDA where there is one), ``cpu``, ``cuda`` or ``cuda:N``. Raises `ConfigError`."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, not {name!r}.") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, not {name!r}.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("No CUDA device is available; leave out --device or use --device cpu.")
    if device.type == "cuda" and distributed.world_size() > 1:
        if ":" in name:
            raise ConfigError(f"Several processes cannot share {name}; use --device cuda, which gives each its own.")
        if distributed.local_world_size() > torch.cuda.device_count():
            raise ConfigError(
                f"{distributed.local_world_size()} processes need as many CUDA devices, this machine has "
                f"{torch.cuda.device_count()}; use --nproc-per-node {torch.cuda.device_count()} or --device cpu."
            )
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """``bf16`` for ``auto`` where the hardware of rank 0 multiplies bf16 natively, else ``fp32``."""
    return name if name != "auto" else distributed.broadcast(_fastest_precision(device))


def _fastest_precision(device: torch.device) -> str:
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    fast = torch.backends.cpu.get_cpu_capability().startswith("AVX512") and torch.cpu._is_avx512_bf16_supported()
    return "bf16" if fast else "fp32"
