"""The learner's commands: what they print, their exit codes, and one sentence for every bad input."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from duallora_edge.learner import adapt as base_adaptation
from duallora_edge.learner import commands, terminal
from duallora_edge.learner.commands import folder_bytes
from duallora_edge.learner.run_directory import RunDirectory

Call = Callable[..., tuple[int, str, str]]
QUICK = ("--rank-orthogonal", 2, "--rank-residual", 2, "--epochs", 1, "--min-steps", 4, "--precision", "fp32")
QUICK = (*QUICK, "--summaries", 1, "--device", "cpu")


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory, image_stream: Path) -> Path:
    """A run that learned both tasks of the stream; to be copied before it is changed."""
    from duallora_edge.cli import main

    path = tmp_path_factory.mktemp("learned") / "run"
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in ("train", "--data", image_stream, "--run", path, *QUICK)])
    assert not stopped.value.code
    return path


@pytest.fixture
def run(tmp_path: Path, learned: Path) -> Path:
    return Path(shutil.copytree(learned, tmp_path / "run"))


def failure(result: tuple[int, str, str]) -> str:
    """The message of a command that failed as it should: code 1, and the last line on standard error a sentence."""
    code, _, err = result
    assert code == 1 and "Traceback" not in err
    message = err.strip().splitlines()[-1]
    assert message.startswith("Error: ") and message.endswith(".")
    return message


@pytest.mark.parametrize(("good", "named"), [(0.0, False), (1.01, True)])
def test_a_larger_backbone_is_named_where_the_embedded_one_errs(
    call: Call, tmp_path: Path, image_stream: Path, monkeypatch: pytest.MonkeyPatch, good: float, named: bool
) -> None:
    monkeypatch.setattr(commands, "GOOD", good)
    _, out, _ = call("train", "--data", image_stream / "01-round", "--run", tmp_path / "run", *QUICK)
    assert (commands.LARGER_BACKBONE in out.splitlines()) == named


def test_train_says_what_it_found_and_where_the_run_is(call: Call, tmp_path: Path, image_stream: Path) -> None:
    code, out, err = call("train", "--data", image_stream, "--run", tmp_path / "run", *QUICK)
    assert code == 0
    assert "task folders, 2 tasks" in err and "after 1 task: " in err
    assert "after 2 tasks: " not in err  # the summary says it
    assert "  01-round: disc 9, square 9\n" in err
    assert "Last accuracy" in out
    assert out.splitlines()[-1] == f"Run: {tmp_path}/run  report: {tmp_path}/run/reports/report.html"


def test_after_one_task_no_number_is_printed_twice(call: Call, tmp_path: Path, image_stream: Path) -> None:
    code, out, err = call("train", "--data", image_stream / "01-round", "--run", tmp_path / "run", *QUICK)
    assert code == 0 and "after 1 task" not in err
    titles = [re.split(r"  |\.|:", line)[0] for line in out.splitlines()]
    assert titles == ["Last accuracy", "Calibration error (ECE)", "Known images called novel", "In brackets", "Run"]


def test_measuring_can_wait(call: Call, tmp_path: Path, learned: Path, image_stream: Path) -> None:
    path = tmp_path / "run"
    code, out, err = call("train", "--data", image_stream, "--run", path, *QUICK, "--no-evaluate")
    assert code == 0 and "after 1 task" not in err
    assert out.startswith(f"Not measured; 'duallora-edge evaluate {path}' does it.")
    assert RunDirectory.open(path).digest() == RunDirectory.open(learned).digest()
    rows = Path("reports", "rows.json")
    assert not (path / rows).exists()
    assert "after 1 task" in call("train", "--run", path)[2]  # the same call measures what is missing
    assert (path / rows).read_bytes() == (learned / rows).read_bytes()
    assert call("rollback", path)[0] == 0
    assert call("train", "--run", path, "--no-evaluate")[0] == 0
    assert (path / rows).read_bytes() == (learned / rows).read_bytes()


def test_json_on_standard_output_alone(call: Call, run: Path, image_stream: Path) -> None:
    for arguments in (
        ("train", "--data", image_stream, "--run", run, "--json"),
        ("evaluate", run, "--json", "--device", "cpu"),
        ("status", run, "--json"),
        ("status", run, "--privacy", "--json"),
    ):
        code, out, _ = call(*arguments)
        assert code == 0 and isinstance(json.loads(out), dict), arguments


def test_status(call: Call, run: Path) -> None:
    code, out, err = call("status", run)
    assert (code, err) == (0, "")
    assert "dual_lora on embedded, 64 px: 2 task(s), 4 classes" in out and "Base adaptation: none\n" in out
    assert out.splitlines()[-1] == f"Run: {run}"
    assert "\n  disc 9, square 9\n" in out
    value = json.loads(call("status", run, "--json")[1])
    assert [(task["name"], task["classes"]) for task in value["tasks"]] == [("01-round", 2), ("02-lines", 2)]
    assert value["digest"] == RunDirectory.open(run).digest() and value["in_training"] is None
    assert value["bytes"] == sum(path.stat().st_size for path in run.rglob("*") if path.is_file()) == folder_bytes(run)


def test_status_privacy_lists_every_file_of_the_tasks(call: Call, run: Path) -> None:
    listed = {
        entry["file"]: entry["bytes"] for entry in json.loads(call("status", run, "--privacy", "--json")[1])["files"]
    }
    pictures = [run / "reports" / name for name in ("data.png", "answers.json", "report.html")]
    for path in [*(run / "tasks").rglob("*.*"), *pictures]:
        if path.is_file():
            assert listed[str(path.relative_to(run))] == path.stat().st_size
    assert "No pixels are stored in the run but thumbnails in reports/data.png," in call("status", run, "--privacy")[1]
    for path in pictures:
        assert f"reports/{path.name}" in call("status", run, "--privacy")[1].split(", and features")[0]
        path.unlink()
    assert "No pixels are stored in the run, and" in call("status", run, "--privacy")[1]


def test_adapt_and_train_with_it(
    call: Call, tmp_path: Path, image_stream: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On 56 images without labels; every stage of it has a name on the terminal and in the profile."""
    monkeypatch.setattr(base_adaptation, "STEPS", 3)
    monkeypatch.setattr(terminal, "PLAIN_INTERVAL", -1.0)
    file, run = tmp_path / "base.safetensors", tmp_path / "run"
    adapt = ("adapt", image_stream, "-o", file, "--size", 32, "--device", "cpu", "--precision", "fp32")
    code, out, err = call(*adapt)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert code == 0 and out == (
        f"Adapted embedded to 32 px on 56 images, sha256 {digest[:12]}; "
        f"use it with 'duallora-edge train --base {file}' and --size 32.\n"
    )
    for stage in ("taking images 1/2000", "backbone at its own size 56/56", "base adaptation 3/3"):
        assert stage in err
    assert call(*adapt)[1] == out
    train = ("train", "--data", image_stream / "01-round", "--size", 32, *QUICK, "--no-evaluate")
    assert call(*train, "--run", run, "--base", file)[0] == 0
    status = without_torch("status", run)[1]
    assert "dual_lora on embedded, 32 px" in status
    assert "Base adaptation: fitted from 64 to 32 px on 56 images\n" in status
    value = json.loads(call("status", run, "--json")[1])
    assert value["base_adaptation"] == {"native_size": 64, "images": 56} and value["backbone"]["base"] == digest
    listed = json.loads(call("status", run, "--privacy", "--json")[1])["files"]
    assert {"file": "base.safetensors", "bytes": file.stat().st_size} == {
        key: entry[key] for entry in listed if entry["file"] == "base.safetensors" for key in ("file", "bytes")
    }
    assert "from images without labels; no pixels" in call("status", run, "--privacy")[1]
    code, _, err = call(*train, "--run", tmp_path / "own", "--profile")
    assert code == 0 and "without labels" in err and re.search(r"^base adaptation +\d+\.\d\d s", err, re.M)


def test_adapt_is_refused_in_a_sentence(call: Call, tmp_path: Path, image_stream: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"years of work")
    for output, options, reason in (
        ("photo.jpg", ("--size", 32), "photo.jpg exists and is not a base adaptation; give another name with -o."),
        ("base", (), "embedded was trained for 64 px, so there is nothing to adapt"),
        ("base", ("--size", 32, "--images", 10), "images must be a whole number from 64 to"),
    ):
        message = failure(call("adapt", image_stream, "-o", tmp_path / output, *options, "--device", "cpu"))
        assert reason in message
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]
    assert call("adapt", image_stream)[0] == call("adapt", "-o", "base")[0] == 2
    assert f"[default: {base_adaptation.MAX_FRAMES}]" in call("adapt", "--help")[1]


def test_status_tells_of_interrupted_training(call: Call, run: Path) -> None:
    RunDirectory.open(run).checkpoint("key").save(30, {"a": torch.zeros(1)})
    assert "in training, 30 steps done; 'duallora-edge train' continues it" in call("status", run)[1]
    call("rollback", run)
    assert "in training" not in call("status", run)[1]


def test_rollback_until_nothing_is_left(call: Call, run: Path) -> None:
    assert "Undid 02-lines; 1 task(s) left" in call("rollback", run)[1]
    for name in ("data.png", "answers.json", "report.html"):
        assert not (run / "reports" / name).exists()  # it showed images of the task
    assert "Undid 01-round; 0 task(s) left" in call("rollback", run)[1]
    assert "has no task to undo" in failure(call("rollback", run))
    assert call("status", run)[0] == 0
    assert "learned no task yet" in failure(call("evaluate", run, "--device", "cpu"))


def test_remove_and_measure(call: Call, run: Path) -> None:
    assert "has no task '01'; it has 01-round, 02-lines" in failure(call("remove", run, "01"))
    code, out, _ = call("remove", run, "01-round")
    assert code == 0 and "Removed 01-round; 1 task(s) left" in out
    assert "not measured" in call("status", run)[1]
    assert call("evaluate", run, "--device", "cpu")[0] == 0
    assert "not measured" not in call("status", run)[1]


def test_images_of_no_task_of_the_run_are_not_passed_over(call: Call, run: Path, image_stream: Path) -> None:
    message = failure(call("evaluate", run, "--device", "cpu", "--data", image_stream / "01-round" / "train"))
    assert "holds images of 'train', but the run learned '01-round', '02-lines'; call the folder as" in message


def test_evaluate_beside_another_run(call: Call, run: Path, learned: Path) -> None:
    code, out, _ = call("evaluate", run, "--device", "cpu", "--compare", learned)
    assert code == 0 and "this run" in out


def test_a_locked_run_can_be_read_but_not_changed(call: Call, run: Path, image_stream: Path) -> None:
    with RunDirectory.open(run).locked():
        for arguments in (
            ("rollback", run),
            ("remove", run, "01-round"),
            ("train", "--data", image_stream, "--run", run),
        ):
            assert "is writing to" in failure(call(*arguments))
        assert call("status", run)[0] == 0


@pytest.mark.parametrize("command", ["train", "adapt", "evaluate", "status", "rollback", "remove"])
def test_help_shows_an_example(call: Call, command: str) -> None:
    code, out, _ = call(command, "--help")
    assert code == 0 and "Example:\n" in out and f"duallora-edge {command}" in out


@pytest.mark.parametrize(
    "arguments",
    [
        ("train",),
        ("train", "--run", "x", "--epochs", "many"),
        ("train", "--run", "x", "--method", "magic"),
        ("train", "--run", "x", "--no-such-option"),
        ("status",),
        ("remove", "x"),
        ("statsu", "x"),
    ],
)
def test_wrong_usage(call: Call, arguments: tuple[str, ...]) -> None:
    code, out, err = call(*arguments)
    assert (code, out) == (2, "") and "Error: " in err


def without_torch(*arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the command line where torch is not installed."""
    code = "import sys; sys.modules['torch'] = None; from duallora_edge.cli import main; main(sys.argv[1:])"
    words = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def test_help_and_status_need_no_torch(run: Path) -> None:
    calls: list[tuple[tuple[object, ...], str]] = [(("--help",), "Commands:"), (("status", run), "Run: ")]
    for name, section in {
        "train": "Ablations:",
        "evaluate": "Output:",
        "export": "Graph:",
        "compare": "Methods:",
    }.items():
        calls.append(((name, "--help"), section))
    for arguments, shown in calls:
        code, out, err = without_torch(*arguments)
        assert (code, err) == (0, "") and shown in out


def test_a_missing_torch_is_said_with_what_to_install(tmp_path: Path) -> None:
    code, out, err = without_torch("train", "--data", tmp_path, "--run", tmp_path / "run")
    assert (code, out) == (1, "")
    assert err.startswith("Error: 'train' needs the package torch, which is not installed: pip install 'torch>=")


@pytest.mark.parametrize("command", [("status",), ("evaluate",), ("rollback",), ("remove", "t"), ("export", "-o", "b")])
def test_a_bundle_is_not_a_run(call: Call, tmp_path: Path, command: tuple[str, ...]) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    message = failure(call(command[0], tmp_path, *command[1:]))
    assert message == (
        f"Error: {tmp_path} is a bundle, not a run; 'duallora-edge predict', 'run' and 'benchmark' take it."
    )


@pytest.mark.parametrize("command", [("status",), ("evaluate",), ("rollback",), ("remove", "task")])
def test_no_run_there(call: Call, tmp_path: Path, command: tuple[str, ...]) -> None:
    assert "is not a folder; 'duallora-edge train" in failure(call(command[0], tmp_path / "none", *command[1:]))
    assert "is not a run" in failure(call(command[0], tmp_path, *command[1:]))


def test_train_without_data(call: Call, tmp_path: Path) -> None:
    assert "--data" in failure(call("train", "--run", tmp_path / "run"))


def test_all_problems_of_a_configuration_at_once(call: Call, tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text("epoch: 1\nseed: x\n")
    message = failure(call("train", "--config", tmp_path / "train.yaml", "--data", tmp_path, "--run", tmp_path / "run"))
    assert "did you mean 'epochs'" in message and "seed must be a whole number" in message


def test_settings_come_from_file_and_flags(call: Call, tmp_path: Path, image_stream: Path) -> None:
    (tmp_path / "train.yaml").write_text(f"data: {image_stream}\ntask_order: [02-lines]\nseed: 4\nepochs: 3\n")
    code, _, _ = call("train", "--config", tmp_path / "train.yaml", "--run", tmp_path / "run", *QUICK)
    run = RunDirectory.open(tmp_path / "run")
    assert code == 0 and (run.config.seed, run.config.epochs) == (4, 1)
    assert [run.read_info(task).name for task in run.active_tasks()] == ["02-lines"]


def test_images_that_cannot_be_used(call: Call, tmp_path: Path, image_stream: Path) -> None:
    (tmp_path / "empty").mkdir()
    run = ("--run", tmp_path / "run", *QUICK)
    assert "holds no images" in failure(call("train", "--data", tmp_path / "empty", *run))
    assert "does not exist" in failure(call("train", "--data", tmp_path / "nowhere", *run))
    assert "unknown task 'x'" in failure(call("train", "--data", image_stream, "--task-order", "x", *run))
    assert not (tmp_path / "run").exists()  # nothing half-made is left behind
    assert call("train", "--data", image_stream, *run)[0] == 0  # the failures left nothing in the way


def test_a_broken_image_is_left_out_and_said(call: Call, tmp_path: Path, image_task: Callable[..., Path]) -> None:
    data = image_task(tmp_path / "data", {"disc": 0, "square": 1})
    (data / "train" / "disc" / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more of it")
    code, _, err = call("train", "--data", data, "--run", tmp_path / "run", *QUICK)
    assert code == 0 and "1 unreadable: left out" in err and "torn.jpg" in err


def test_the_same_and_other_images_under_a_learned_name(
    call: Call, run: Path, tmp_path: Path, image_stream: Path, image_task: Callable[..., Path]
) -> None:
    code, _, err = call("train", "--data", image_stream, "--run", run)
    assert code == 0 and "Task 01-round is already learned" in err
    image_task(tmp_path / "other" / "01-round", {"disc": 0, "square": 1}, seed=7)
    message = failure(call("train", "--data", tmp_path / "other", "--run", run))
    assert "learned a task '01-round' from other images" in message and "--task-name" in message
    assert "--again '01-round'" in message
    code, out, err = call("train", "--data", tmp_path / "other", "--run", run, "--again", "01-round")
    assert code == 0 and "Task 2 01-round, again: 2 classes" in err and "Last accuracy" in out
    names = [task["name"] for task in json.loads(call("status", run, "--json")[1])["tasks"]]
    assert names == ["02-lines", "01-round"]
    code, _, err = call("train", "--run", run, "--again", "01-round")
    assert code == 0 and "Task 01-round is already learned from these images" in err
    assert "has no task 'x'; it has 02-lines, 01-round" in failure(call("train", "--run", run, "--again", "x"))


def test_weights_that_do_not_fit(call: Call, tmp_path: Path, image_stream: Path) -> None:
    noise, pickled = tmp_path / "noise.safetensors", tmp_path / "model.pth"
    noise.write_bytes(np.random.default_rng(0).bytes(1000))
    torch.save({"a": torch.zeros(1)}, pickled)
    for path in (noise, pickled):
        options = ("--backbone", "test_vit", "--weights", path)
        message = failure(call("train", "--data", image_stream, "--run", tmp_path / "run", *options))
        assert "is not a readable safetensors file" in message
    assert not (tmp_path / "run").exists()


def test_an_altered_task_is_noticed(call: Call, run: Path, image_stream: Path) -> None:
    path = run / "tasks" / "0001-01-round" / "adapters.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    assert "was altered since it was written" in failure(call("evaluate", run, "--device", "cpu"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_keeps_what_was_learned(call: Call, run: Path, small_disk: Path, image_stream: Path) -> None:
    shutil.copytree(run, small_disk / "run")
    call("rollback", small_disk / "run")
    digest = RunDirectory.open(small_disk / "run").digest()
    stopper = small_disk / "stopper"
    with pytest.raises(OSError), stopper.open("wb", buffering=0) as file:
        while file.write(bytes(4096)) == 4096:
            pass
        raise OSError  # a last write that was cut short says the same
    message = failure(call("train", "--data", image_stream, "--run", small_disk / "run"))
    assert "No space left on device" in message and "Free some space and run the same command again" in message
    assert call("status", small_disk / "run")[0] == 0
    assert RunDirectory.open(small_disk / "run").digest() == digest
    stopper.unlink()
    assert call("train", "--data", image_stream, "--run", small_disk / "run")[0] == 0
    assert RunDirectory.open(small_disk / "run").digest() == RunDirectory.open(run).digest()


def test_a_task_that_later_ones_build_on_is_not_removed(
    call: Callable[..., tuple[int, str, str]], image_stream: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    options = [
        "--method",
        "task_arithmetic",
        "--epochs",
        "0",
        "--min-steps",
        "1",
        "--summaries",
        "1",
        "--device",
        "cpu",
    ]
    assert call("train", "--data", image_stream, "--run", run, *options)[0] == 0
    code, _, errors = call("remove", run, "01-round")
    assert code == 1
    assert "only the newest can be removed or learned again" in errors
    assert call("remove", run, "02-lines")[0] == 0
    code, printed, _ = call("status", run, "--privacy")
    assert code == 0
    assert "TRAINING IMAGES ARE STORED" in printed


def test_rows_that_do_not_fit_the_state(call: Call, run: Path) -> None:
    path = run / "reports" / "rows.json"
    rows = json.loads(path.read_text())
    last = RunDirectory.open(run).digest()
    for damage in ({last: rows[last][:1]}, {last: 5}, {last: [{"n": 10**400}]}, [], {last: [{"bin_count": "x"}] * 2}):
        path.write_text(json.dumps(damage))
        assert "rows.json is damaged" in failure(call("status", run))
    for command in (("train", "--run", run, *QUICK), ("evaluate", run, "--compare", run)):
        assert "rows.json is damaged" in failure(call(*command))


def test_names_and_paths_of_others_do_no_harm_on_a_terminal(call: Call, run: Path, tmp_path: Path) -> None:
    """A run that came from elsewhere, with names that `train` would refuse, in a folder with such a name."""
    evil = "a\x1b[2J\u202e\nb"
    for folder in (run / "tasks").iterdir():
        description = json.loads((folder / "task.json").read_text())
        description["name"] = f"{evil} {folder.name}"
        (folder / "task.json").write_text(json.dumps(description))
        head = json.loads((run / "HEAD.json").read_text())
        content = json.dumps(description, sort_keys=True, ensure_ascii=False).encode()
        ids = {folder.name: hashlib.sha256(content).hexdigest()}
        head["tasks"] = [{**entry, "id": ids.get(entry["folder"], entry["id"])} for entry in head["tasks"]]
        (run / "HEAD.json").write_text(json.dumps(head))
    run = run.rename(tmp_path / "run\x1b[2J\u202e")
    commands = (
        ("status", run), ("status", run, "--privacy"), ("status", run, "--json"), ("remove", run, f"x{evil}"),
        ("rollback", run), ("remove", run, f"{evil} 0001-01-round"), ("rollback", run),
        ("train", "--run", run, "--method", f"x{evil}"), ("train", "--run", run, "--data", f"x{evil}"),
        ("train", "--run", tmp_path / "new", "--config", tmp_path / evil), (f"x{evil}",),
    )  # fmt: skip
    outputs = [call(*command) for command in commands]
    assert [code for code, _, _ in outputs] == [0, 0, 0, 1, 0, 0, 1, 2, 1, 1, 2]
    for _, out, err in outputs:
        assert "\x1b" not in out + err and "\u202e" not in out + err and "Traceback" not in err
    assert r"a\x1b[2J\u202e\nb" in outputs[0][1] and r"Undid a\x1b[2J\u202e\nb 0002" in outputs[4][1]
