"""Mutate run folders and show that every command answers with a result or with one sentence.

    python benchmarks/attack_runs.py --count 2000

A small run is learned once. Each mutation damages one file of a copy, as a disk, an editor or an attacker would: bytes,
JSON and YAML values, tensors. Where the damage would be noticed by a hash, the hash is put right half of the time, so
that the damage reaches what lies behind it. Every command then works on the copy in a process of its own. An outcome
other than ``ok`` and ``refused`` is a defect.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
import yaml
from safetensors.torch import load_file, save, save_file

from duallora_edge.cli import COMMANDS
from duallora_edge.cli import main as command_line
from duallora_edge.demo import write_digits

SECONDS = 300
TENSOR_TYPES = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 3, 2**63, 10**40, 0.5, -0.5, 1e308, "", "x", "../..", "/", "0001-a\0b", "\u202e\x1b[2J", "\n",
    "\ud800", "é" * 3000, [], [None], [[]], {}, {"": 0}, ["a", "a"], "dual_lora", "frozen", "ridge", "heads", "auto",
)  # fmt: skip
TEXTS = (
    b"", b"\0", b"{", b"null", b"7", b"[]", b"\xff\xfe", b"NaN", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000,
    b'{"tasks": [NaN, Infinity]}', b"a: &a [x]\nb: [*a, *a]\n", b"a: &a {x: 1}\n<<: [*a, *a]\n",
    b"seed: 0x" + b"f" * 5000, b"seed: 1e400", b"- a\n", b"? [a]\n: 1\n",
)  # fmt: skip


def main(count: int = 2000, seed: int = 0) -> Counter[str]:
    """Attack ``count`` mutated runs; print outcomes, the largest memory and the slowest; return the outcomes.

    A defect is printed with its mutation, command and last line.
    """
    rng = random.Random(seed)
    torch.set_num_threads(1)
    for name in ("train", "export"):  # once, and not again in every child
        importlib.import_module(COMMANDS[name][0].split(":")[0])
    for name in ("train", "evaluate", "learner", "terminal", "methods.learning"):
        importlib.import_module(f"duallora_edge.learner.{name}")
    outcomes: Counter[str] = Counter()
    largest, slowest = (0.0, ""), (0.0, "")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.environ["DUALLORA_EDGE_CACHE"] = str(root / "cache")
        base = make_run(root)
        for number in range(count):
            run = root / "mutated"
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(base, run, copy_function=os.link)
            (run / ".lock").unlink()  # it is written in place
            what = mutate(run, rng)
            for words in pick_commands(run, root, rng):
                outcome, line, megabytes, seconds = execute(words, root / "out.txt")
                outcomes[f"{words[0]}: {outcome}"] += 1
                name = f"{number} {what} -> {words[0]}"
                largest, slowest = max(largest, (megabytes, name)), max(slowest, (seconds, name))
                if outcome not in ("ok", "refused"):
                    click.echo(f"DEFECT {name}: {outcome}: {line}")
    for key, times in sorted(outcomes.items()):
        click.echo(f"{times:>6}  {key}")
    click.echo(f"largest memory {largest[0]:.0f} MB ({largest[1]}), slowest {slowest[0]:.1f} s ({slowest[1]})")
    return outcomes


def make_run(root: Path) -> Path:
    """A run of two tasks of two classes with few images, with reports and a checkpoint."""
    write_digits(root / "all")
    for task in ("digits-0-1", "digits-2-3", "digits-4-5"):
        for path in sorted((root / "all" / task).glob("*/*/*.png"))[::9]:
            target = root / "images" / path.relative_to(root / "all")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    (root / "settings.yaml").write_text(
        "summaries: 1\nprecision: fp32\ndevice: cpu\nepochs: 0\nmin_steps: 2\ncheckpoint_steps: 1\n"
    )
    words = ["train", "--data", str(root / "images"), "--config", str(root / "settings.yaml")]
    for name, order in (("run", "digits-0-1,digits-2-3"), ("next", "digits-0-1,digits-2-3,digits-4-5")):
        outcome, line, _, _ = execute([*words, "--run", str(root / name), "--task-order", order], root / "out.txt")
        if outcome != "ok":
            raise click.ClickException(f"The run to be attacked cannot be made: {line}")
    save_checkpoint(root / "run")
    return root / "run"


def save_checkpoint(run: Path) -> None:
    """A checkpoint such as a killed training leaves."""
    (run / "checkpoint").mkdir()
    tensors = {f"0.{key}": torch.zeros(2, 193) for key in ("value", "exp_avg", "exp_avg_sq")}
    save_file(tensors, run / "checkpoint" / "state.safetensors", {"key": "0" * 64, "step": "1"})


def pick_commands(run: Path, root: Path, rng: random.Random) -> list[list[str]]:
    """The commands that only read descriptions, and one of the others: those change the run or take a second."""
    heavy = [
        ["evaluate", str(run), "--device", "cpu"],
        ["export", str(run), "--target", "x86-cpu", "-o", str(root / "bundle")],
        ["train", "--run", str(run), "--device", "cpu", "--data", str(root / "images")],
        ["train", "--run", str(run), "--device", "cpu"],
        ["evaluate", str(root / "next"), "--compare", str(run), "--device", "cpu"],
        ["rollback", str(run)],
        ["remove", str(run), "digits-0-1"],
    ]
    return [["status", str(run)], ["status", str(run), "--privacy"], rng.choice(heavy)]


def execute(words: list[str], output: Path) -> tuple[str, str, float, float]:
    """Run the command line in a child process: outcome, last line of output, peak megabytes, seconds."""
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        with output.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        signal.alarm(SECONDS)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        code = 99
        try:
            command_line(words)
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    _, status, usage = os.wait4(child, 0)
    seconds = time.monotonic() - started
    lines = output.read_bytes().decode("utf-8", "replace").strip().splitlines() or [""]
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        outcome = f"killed by {signal.Signals(-code).name}"
    else:
        outcome = {0: "ok", 1: "refused", 2: "refused"}.get(code, "traceback")
    if outcome == "refused" and not any(line.startswith(("Error: ", "Usage: ")) for line in lines):
        outcome = "no sentence"
    if "\x1b" in "".join(lines):
        outcome = "escape sequence"
    return outcome, lines[-1][:300], usage.ru_maxrss / 1024, seconds


def mutate(run: Path, rng: random.Random) -> str:
    """Damage one file of a run; returns what was done."""
    files = sorted(path for path in run.rglob("*") if path.suffix in (".json", ".yaml", ".safetensors"))
    path = rng.choice([path for path in files if path.name not in ("metrics.json", "profile.json")])
    structured: Callable[[Path, random.Random], str] = {
        ".json": mutate_json, ".yaml": mutate_yaml, ".safetensors": mutate_tensors
    }[path.suffix]  # fmt: skip
    change = rng.choice([mutate_bytes, structured, structured, structured])
    what = f"{path.relative_to(run)} {change(path, rng)}"
    if path.parent.parent.name == "tasks" and (path.parent / "task.json").is_file() and rng.random() < 0.75:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            put_hashes_right(run, path.parent)
            what += ", hashes put right"
    return what


def mutate_bytes(path: Path, rng: random.Random) -> str:
    """Flip, cut, repeat or replace the bytes of a file, or put something else in its place."""
    content = path.read_bytes()
    kind = rng.choice(["flip", "cut", "repeat", "replace", "missing", "folder", "pipe", "loop"])
    path.unlink()
    if kind == "flip":
        damaged = bytearray(content)
        for _ in range(rng.choice([1, 8])):
            damaged[rng.randrange(min(len(damaged), rng.choice([200, len(damaged)])))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
    elif kind == "cut":
        path.write_bytes(content[: rng.randrange(len(content))])
    elif kind == "repeat":
        path.write_bytes(content * 2)
    elif kind == "replace":
        path.write_bytes(rng.choice(TEXTS))
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path.name)
    return kind


def mutate_json(path: Path, rng: random.Random) -> str:
    """Change one value of a JSON file, delete it, or add one."""
    value = json.loads(path.read_text("utf-8"))
    what = _mutate_value(value, rng)
    path.unlink()
    path.write_text(json.dumps(value), "utf-8")
    return what


def mutate_yaml(path: Path, rng: random.Random) -> str:
    """The same for a YAML file."""
    value = yaml.safe_load(path.read_text("utf-8"))
    what = _mutate_value(value, rng)
    path.unlink()
    path.write_text(yaml.safe_dump(value) if "\ud800" not in what else 'seed: "\\ud800"\n', "utf-8")
    return what


def _mutate_value(value: Any, rng: random.Random) -> str:
    """Walk to a random place of nested lists and mappings, and change it."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key, inner in node.items() if isinstance(node, dict) else enumerate(node):
            places.append((node, key))
            if isinstance(inner, (dict, list)):
                walk(inner)

    walk(value)
    node, key = rng.choice(places)
    kind = rng.choice(["set", "set", "set", "delete", "add", "double"])
    new = rng.choice(VALUES)
    if kind == "set":
        node[key] = new
    elif kind == "delete":
        del node[key]
    elif isinstance(node, list):
        node.append(node[key] if kind == "double" else new)
    else:
        node["added" if kind == "add" else f"{key}2"] = new if kind == "add" else node[key]
    return f"{kind} {key!r} {new!r:.40}"


def mutate_tensors(path: Path, rng: random.Random) -> str:
    """Change the shape, type or numbers of one tensor, or delete, rename or add one."""
    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    value = tensors[name]
    kind = rng.choice(["shape", "cut", "more", "type", "nan", "huge", "tiny", "negative", "noise", "missing", "name"])
    if kind == "shape":
        value = rng.choice([value.flatten(), value[None], value.new_zeros(0), value.new_zeros(())])
    elif kind in ("cut", "more") and value.dim():
        value = value[: len(value) // 2] if kind == "cut" else torch.cat([value, value])
    elif kind == "type":
        value = value.to(rng.choice(TENSOR_TYPES))
    elif kind == "nan" and value.numel():
        value.view(-1)[rng.randrange(value.numel())] = rng.choice([float("nan"), float("inf"), -float("inf")])
    elif kind in ("huge", "tiny"):
        value = value * (1e30 if kind == "huge" else 1e-30)
    elif kind == "negative":
        value = -value - 1
    elif kind == "noise":
        value = torch.randn(value.shape)
    del tensors[name]
    if kind != "missing":
        tensors["x" if kind == "name" else name] = value.contiguous()
    path.unlink()
    path.write_bytes(save(tensors, {"key": "0" * 64, "step": rng.choice(["1", "-1", "x", "9" * 30])}))
    return f"{kind} {name}"


def put_hashes_right(run: Path, task: Path) -> None:
    """Write the sha256 of the files of a task into its description, and that of the description into HEAD."""
    description = json.loads((task / "task.json").read_text("utf-8"))
    for name in description["files"]:
        if (task / name).is_file():
            description["files"][name] = hashlib.sha256((task / name).read_bytes()).hexdigest()
    (task / "task.json").unlink()
    (task / "task.json").write_text(json.dumps(description), "utf-8")
    content = json.dumps(description, sort_keys=True, ensure_ascii=False).encode()
    head = json.loads((run / "HEAD.json").read_text("utf-8"))
    for entry in head["tasks"]:
        if entry["folder"] == task.name:
            entry["id"] = hashlib.sha256(content).hexdigest()
    (run / "HEAD.json").unlink()
    (run / "HEAD.json").write_text(json.dumps(head), "utf-8")


@click.command()
@click.option("--count", default=2000, show_default=True, type=click.IntRange(1))
@click.option("--seed", default=0, show_default=True, type=int)
def cli(count: int, seed: int) -> None:
    outcomes = main(count, seed)
    sys.exit(any(not key.endswith((": ok", ": refused")) for key in outcomes))


if __name__ == "__main__":
    cli()
