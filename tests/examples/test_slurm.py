"""The Slurm scripts as text, and run with imitations of Slurm's commands; no Slurm was at hand."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "slurm"
NUMBER, TIME = r"\d+", r"\d\d:\d\d:\d\d"
OPTIONS = {
    "job-name": r"[a-z-]+", "nodes": NUMBER, "ntasks": NUMBER, "ntasks-per-node": NUMBER, "gpus": NUMBER,
    "gpus-per-node": NUMBER, "cpus-per-task": NUMBER, "mem": r"\d+G", "time": TIME, "requeue": "", "array": r"0-\d+",
    "open-mode": "append", "output": r"[%A-Za-z-]+\.log",
}  # fmt: skip


def options(script: Path) -> dict[str, str]:
    """The #SBATCH lines. Slurm reads them up to the first command only."""
    found = {}
    lines = script.read_text().splitlines()
    for line in lines[: next(i for i, text in enumerate(lines) if text and not text.startswith("#"))]:
        if line.startswith("#SBATCH"):
            match = re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line)
            assert match, line
            found[match[1]] = match[2] or ""
    assert sum(line.startswith("#SBATCH") for line in lines) == len(found)
    return found


def launched(script: Path, folder: Path, *arguments: str, **variables: str) -> list[str]:
    """The words that the script gives to srun."""
    for name, program in {
        "srun": 'printf "%s\\n" "$@"',
        "scontrol": 'test "$*" = "show hostnames gpu[1-2]" && printf "gpu1\\ngpu2\\n"',
    }.items():
        (folder / name).write_text(f"#!/bin/bash\n{program}\n")
        (folder / name).chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", **variables}
    answer = subprocess.run(
        ["bash", str(script), *arguments], env=environment, capture_output=True, text=True, check=True
    )
    return answer.stdout.splitlines()


@pytest.mark.parametrize("name", ["train.sbatch", "compare.sbatch"])
def test_scripts(name: str) -> None:
    subprocess.run(["bash", "-n", str(FOLDER / name)], check=True)
    for option, value in options(FOLDER / name).items():
        assert re.fullmatch(OPTIONS[option], value), option
    answer = subprocess.run(["bash", str(FOLDER / name)], capture_output=True, text=True, check=False)
    assert answer.returncode and "name the images" in answer.stderr


def test_the_job_on_several_machines_starts_one_torchrun_on_each(tmp_path: Path) -> None:
    given = options(FOLDER / "train.sbatch")
    words = launched(
        FOLDER / "train.sbatch", tmp_path, "my photos", "run", "--epochs", "2",
        SLURM_JOB_NODELIST="gpu[1-2]", SLURM_NNODES=given["nodes"], SLURM_JOB_ID="7",
    )  # fmt: skip
    assert given["ntasks-per-node"] == "1"
    assert words[:5] == ["torchrun", "--nnodes", given["nodes"], "--nproc-per-node", given["gpus-per-node"]]
    assert words[words.index("--rdzv-endpoint") + 1] == "gpu1:29400"
    expected = shlex.split("-m -- duallora_edge train --data 'my photos' --run run --device cuda --epochs 2")
    assert words[-len(expected) :] == expected


def test_the_array_takes_every_method_with_every_seed_once(tmp_path: Path) -> None:
    last = int(options(FOLDER / "compare.sbatch")["array"].split("-")[1])
    taken = set()
    for index in range(last + 1):
        words = launched(FOLDER / "compare.sbatch", tmp_path, "photos", "out", SLURM_ARRAY_TASK_ID=str(index))
        assert words[:2] == ["duallora-edge", "compare"]
        taken.add((words[words.index("--methods") + 1], words[words.index("--seeds") + 1]))
    methods, seeds = ({pair[i] for pair in taken} for i in (0, 1))
    assert len(taken) == last + 1 == len(methods) * len(seeds)
