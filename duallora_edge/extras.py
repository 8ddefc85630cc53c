"""What to install when a package is missing: package by package, because duallora-edge is on no public index."""

from __future__ import annotations

import re

_REQUIREMENT = re.compile(r"""([^\s;]+)\s*(?:;.*\bextra == ["']([\w-]+)["'])?""")
_OWN = re.compile(r"duallora-edge\[([\w,-]+)\]")


def install_hint(extra: str = "", *, with_onnxruntime: bool = False) -> str:
    """The command that installs what an extra adds, or what duallora-edge itself needs.

    Where there is an ONNX Runtime, the command leaves it out unless it is asked for: ``onnxruntime`` and
    ``onnxruntime-gpu`` overwrite each other's files.
    """
    packages = _packages(extra)
    if not with_onnxruntime and any(map(_is_onnxruntime, packages)) and onnxruntimes():
        packages = [package for package in packages if not _is_onnxruntime(package)]
    return "pip install " + (" ".join(f"'{one}'" for one in packages) or f"the packages of [{extra}] in pyproject.toml")


def onnxruntimes() -> list[str]:
    """The installed distributions that hold ONNX Runtime, working or not: ``onnxruntime``, ``onnxruntime-gpu``."""
    from importlib import metadata  # here, because it takes longer to import than the rest of the runtime

    return sorted(set(metadata.packages_distributions().get("onnxruntime", ())))


def _is_onnxruntime(package: str) -> bool:
    return package.startswith("onnxruntime")


def _packages(extra: str) -> list[str]:
    """The requirements of an extra, [] where the metadata of duallora-edge is missing."""
    from importlib import metadata

    try:
        lines = metadata.requires("duallora-edge") or []
    except metadata.PackageNotFoundError:  # its folder is imported without being installed
        return []
    packages: list[str] = []
    for line in lines:
        match = _REQUIREMENT.match(line)
        if match is None or (match[2] or "") != extra:
            continue
        own = _OWN.fullmatch(match[1])
        packages += [one for name in own[1].split(",") for one in _packages(name)] if own else [match[1]]
    return packages
