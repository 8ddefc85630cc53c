"""The notebooks are small files without outputs, and all of their code runs."""

from __future__ import annotations

import json
import re
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = Path(__file__).parents[2] / "examples" / "notebooks"
NAMES = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)")
SECONDS = 300  # for what takes some ten

# Runs in a process of its own, whose outputs are those of the first test that started such a process.
PROGRAM = """
import os
import traceback
from contextlib import redirect_stdout

import matplotlib

matplotlib.use("Agg")
os.chdir(folder)
variables = {"__name__": "__main__"}
with open("said.txt", "w") as file, redirect_stdout(file):
    try:
        for name, code in cells:
            exec(compile(code, name, "exec"), variables)
    except BaseException:
        traceback.print_exc(file=file)
        raise
"""


def read(name: str) -> dict[str, Any]:
    notebook: dict[str, Any] = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))
    return notebook


def sources(name: str, kind: str) -> list[tuple[str, str]]:
    """The id and the text of each cell of a kind."""
    return [(cell["id"], "".join(cell["source"])) for cell in read(name)["cells"] if cell["cell_type"] == kind]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_valid_and_holds_no_outputs(name: str) -> None:
    notebook = read(name)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    names = [cell["id"] for cell in notebook["cells"]]
    assert len(set(names)) == len(names) and all(re.fullmatch(r"[\w-]{1,64}", each) for each in names)
    for cell in notebook["cells"]:
        keys = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
            keys |= {"outputs", "execution_count"}
        assert cell.keys() == keys and cell["metadata"] == {}


@pytest.mark.parametrize("name", NAMES)
def test_links_of_a_notebook_lead_somewhere(name: str) -> None:
    targets = [target for _, text in sources(name, "markdown") for target in LINK.findall(text)]
    assert targets and not [target for target in targets if not (NOTEBOOKS / target).exists()]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("compare_methods", ["sequential", "forgetting with the task given"]),
        ("own_images", ["last_accuracy", "undid digits-2-3", "left: ['digits-0-1']"]),
        ("to_a_camera", ["('0', '1')", "the same answer on 100%", "cpu (ONNX Runtime) False", "after: "]),
    ],
)
def test_the_code_of_a_notebook_runs(processes: ForkServerContext, tmp_path: Path, name: str, said: list[str]) -> None:
    """Cell after cell, in an empty folder."""
    variables = {"folder": str(tmp_path), "cells": sources(name, "code")}
    process = processes.Process(target=exec, args=(PROGRAM, variables))
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
    output = (tmp_path / "said.txt").read_text(encoding="utf-8")
    assert process.exitcode == 0, output
    assert not [text for text in said if text not in output]


def test_every_notebook_is_run_and_in_the_readme() -> None:
    run = test_the_code_of_a_notebook_runs.pytestmark[0].args[1]
    readme = (NOTEBOOKS.parent / "README.md").read_text(encoding="utf-8")
    assert sorted(name for name, _ in run) == NAMES
    assert not [name for name in NAMES if f"](notebooks/{name}.ipynb)" not in readme]
