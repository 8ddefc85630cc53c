"""The methods by name. Each is one file against the interface of `base.Method`, and is imported when it is used.

A method of your own is registered by name, and is then accepted wherever a method is named::

    METHODS["mine"] = Mine

From Python that line is all. For the command line, put it into the file of the method and name the file in
``DUALLORA_EDGE_METHODS`` (several are separated by ``:``). Only this variable makes a command run such a file; a run
or a configuration holds the name of the method alone.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING

from duallora_edge.errors import ConfigError, DualLoraEdgeError
from duallora_edge.lazy import lazy_names

if TYPE_CHECKING:
    from duallora_edge.learner.methods.base import Method
    from duallora_edge.learner.methods.learning import compose, learn_task

__all__ = ["BUILT_IN", "METHODS", "VARIABLE", "compose", "learn_task"]

VARIABLE = "DUALLORA_EDGE_METHODS"
MAX_NAME = 60

# name -> ("module:class", one line for users), known without importing torch
BUILT_IN = {
    "dual_lora": ("dual_lora:DualLora", "orthogonal and residual adapters, dynamic memory, task identity"),
    "inflora": ("inflora:InfLora", "orthogonal adapters with bases from all tokens (InfLoRA)"),
    "sequential": ("sequential:Sequential", "unconstrained adapters of the same size, one linear head for each task"),
    "first_session": (
        "first_session:FirstSession",
        "adapters trained on the first task alone, then only statistics (RanPAC with the classifier ridge)",
    ),
    "task_arithmetic": ("task_arithmetic:TaskArithmetic", "task vectors added up, then fine-tuned on stored images"),
    "frozen": ("frozen:Frozen", "no training: a closed-form classifier on the untouched network"),
    "joint": ("joint:Joint", "adapters trained on all tasks at once: what forgetting nothing could reach"),
}


class Methods(MutableMapping[str, "Method"]):
    """The registry. Looking up a built-in method imports it; looking up any other name runs the user's files first."""

    def __init__(self) -> None:
        self._methods: dict[str, Method] = {}
        self._files: set[str] = set()

    def __getitem__(self, name: str) -> Method:
        if name in BUILT_IN and name not in self._methods:
            module, attribute = BUILT_IN[name][0].split(":")
            self._methods[name] = getattr(importlib.import_module(f"{__name__}.{module}"), attribute)()
        elif name not in self._methods:
            self._run_files()
        return self._methods[name]

    def __setitem__(self, name: str, method: Method | type[Method]) -> None:
        """Register a method under its name. Raises `ConfigError` when it cannot be one."""
        from duallora_edge.learner.methods.base import Method

        if not isinstance(name, str) or not name.isidentifier() or len(name) > MAX_NAME:
            raise ConfigError(f"{str(name)[:MAX_NAME]!r} cannot name a method; use letters, digits and underscores.")
        if name in BUILT_IN:
            raise ConfigError(f"{name!r} is a built-in method; register yours under another name.")
        if isinstance(method, type) and issubclass(method, Method):
            try:
                method = method()
            except TypeError as error:  # an abstract class, or one with arguments
                raise ConfigError(f"The method {name!r} is not complete ({error}).") from error
        if not isinstance(method, Method):
            raise ConfigError(f"The method {name!r} must be a subclass of {Method.__module__}.Method.")
        if getattr(method, "name", None) != name:
            raise ConfigError(f"The class of the method {name!r} must have the line: name = {name!r}.")
        self._methods[name] = method

    def __delitem__(self, name: str) -> None:
        """Forget a method that was registered. Raises `ConfigError` for a built-in one."""
        if name in BUILT_IN:
            raise ConfigError(f"{name!r} is a built-in method and stays.")
        del self._methods[name]

    def __contains__(self, name: object) -> bool:
        if name not in BUILT_IN and name not in self._methods:
            self._run_files()
        return name in BUILT_IN or name in self._methods

    def __iter__(self) -> Iterator[str]:
        self._run_files()
        return iter([*BUILT_IN, *(name for name in self._methods if name not in BUILT_IN)])

    def __bool__(self) -> bool:
        return True

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def summaries(self) -> dict[str, str]:
        """One line about each method, in which no built-in one is imported."""
        return {name: BUILT_IN[name][1] if name in BUILT_IN else getattr(self[name], "summary", "") for name in self}

    def _run_files(self) -> None:
        """Run the files that `VARIABLE` names, each once."""
        for path in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
            if path not in self._files:
                self._files.add(path)
                try:
                    self._run_file(path)
                except BaseException:
                    self._files.discard(path)
                    raise

    def _run_file(self, path: str) -> None:
        before = set(self._methods)
        try:
            name = f"duallora_edge_methods_{Path(path).stem}"
            spec = importlib.util.spec_from_file_location(name, path)
            if spec is None or spec.loader is None:
                raise ImportError("it is not a Python file")
            sys.modules[name] = module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        except DualLoraEdgeError as error:
            raise ConfigError(f"{path}, which {VARIABLE} names: {error}") from error
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            raise ConfigError(f"{path}, which {VARIABLE} names, cannot be run ({reason}).") from error
        if not set(self._methods) - set(BUILT_IN) - before:
            raise ConfigError(f'{path}, which {VARIABLE} names, registers no method; add METHODS["name"] = Class.')


METHODS = Methods()


# They need torch, which a registry does not.
__getattr__ = lazy_names(__name__, {"compose": "learning", "learn_task": "learning"})
