"""The command line itself: lazy commands, exit codes, and errors that are one sentence."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import click
import pytest

from duallora_edge import __version__, cli, errors

Call = Callable[..., tuple[int, str, str]]
HEAVY = ["torch", "timm", "onnx", "onnxruntime", "matplotlib"]


def fail_with(error: BaseException) -> click.Command:
    """A command that raises ``error``."""

    @click.command()
    def command() -> None:
        raise error

    return command


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """``failing(error)``: from now on, ``duallora-edge status`` raises it."""

    def install(error: BaseException) -> None:
        monkeypatch.setattr(cli.LazyGroup, "get_command", lambda *_: fail_with(error))

    return install


@pytest.mark.parametrize("arguments", [("--help",), ("-h",)])
def test_help_lists_every_command_with_an_example(call: Call, arguments: tuple[str, ...]) -> None:
    code, out, err = call(*arguments)
    assert (code, err) == (0, "")
    assert "duallora-edge export runs/site-a --target jetson -o bundle" in out
    lines = [line.split() for line in out[out.index("Commands:") :].splitlines()[1:]]
    assert [words[0] for words in lines if words] == list(cli.COMMANDS)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_with_an_example(call: Call, name: str) -> None:
    code, out, _ = call(name, "--help")
    assert code == 0 and f"duallora-edge {name}" in out[out.index("Example") :]


def test_version(call: Call) -> None:
    assert call("--version") == (0, f"duallora-edge, version {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("exprot",), "No command 'exprot'. Did you mean 'export'?"),
        (("bench", "bundle"), "No command 'bench'. Did you mean 'benchmark'?"),
        (("xyz",), "No command 'xyz'. 'duallora-edge --help' lists the commands."),
        (("--fast",), "No such option"),
        (("status",), "Missing argument 'RUN'"),
        (("devices", "--jsonn"), "No such option"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_usage_exits_with_2(call: Call, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = call(*arguments)
    assert (code, out) == (2, "") and message in err and "Traceback" not in err


def test_a_missing_package_says_what_to_install(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.COMMANDS, "train", ("package_that_is_not_there.commands:train", "train", "Learn."))
    code, out, err = call("train", "--data", "photos")
    assert (code, out) == (1, "")
    assert err.startswith(
        "Error: 'train' needs the package package_that_is_not_there, which is not installed: pip install 'torch>="
    )
    assert call("--help")[0] == 0  # the others still work


@pytest.mark.parametrize("name", [n for n in vars(errors) if n.endswith("Error")])
def test_an_error_of_the_user_is_its_sentence(call: Call, failing: Callable[[BaseException], None], name: str) -> None:
    error = getattr(errors, name)
    assert issubclass(error, errors.DualLoraEdgeError) and error.__doc__
    failing(error("The run is locked; wait for it."))
    assert call("status") == (1, "", "Error: The run is locked; wait for it.\n")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
            "Error: No space left on device. Free some space and run the same command again.\n",
        ),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/a/HEAD.json"),
            "Error: No space left on device (runs/a/HEAD.json). Free some space and run the same command again.\n",
        ),
        (
            PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/photos"),
            "Error: Permission denied (/photos).\n",
        ),
        (OSError("the camera went away"), "Error: the camera went away.\n"),
    ],
)
def test_an_error_of_the_system_is_one_sentence(
    call: Call, failing: Callable[[BaseException], None], error: OSError, message: str
) -> None:
    failing(error)
    assert call("status") == (1, "", message)


def test_an_interrupt_is_no_traceback(call: Call, failing: Callable[[BaseException], None]) -> None:
    failing(KeyboardInterrupt())
    code, _, err = call("status")
    assert code == 1 and err.strip() == "Interrupted; everything committed so far is kept."


@pytest.mark.parametrize("arguments", [("--debug", "status"), ("status", "--debug")])
@pytest.mark.parametrize("error", [errors.RunError("The run is locked."), OSError(errno.EIO, "Input/output error")])
def test_debug_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, error: Exception, arguments: tuple[str, ...]
) -> None:
    monkeypatch.setitem(sys.modules, "failing", SimpleNamespace(command=fail_with(error)))
    monkeypatch.setitem(cli.COMMANDS, "status", ("failing:command", "train", "Fail."))
    with pytest.raises(type(error)) as caught:
        cli.main(list(arguments))
    assert caught.value is error


@pytest.mark.parametrize("arguments", [(), ("devices",), ("run",)])
def test_debug_is_in_the_help(call: Call, arguments: tuple[str, ...]) -> None:
    assert call(*arguments, "--help")[1].count("--debug") == 1


@pytest.mark.parametrize(
    "arguments",
    [("predict", "RUN", "x.png"), ("run", "RUN", "--source", "x.png"), ("build", "RUN"), ("benchmark", "RUN")],
)
def test_a_run_in_the_place_of_a_bundle_is_recognised(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("RUN").mkdir()
    for name in ("HEAD.json", "run.yaml"):
        Path("RUN", name).touch()
    monkeypatch.setattr("duallora_edge.runtime.commands.build._require_cudart", lambda: None)
    message = "Error: RUN is a run, not a bundle; 'duallora-edge export RUN -o BUNDLE' makes one.\n"
    code, out, err = call(*arguments)
    assert (code, out) == (1, "") and err.replace(str(tmp_path) + "/", "") == message


def test_a_mistake_of_the_program_is_not_hidden(failing: Callable[[BaseException], None]) -> None:
    failing(ZeroDivisionError("division by zero"))
    with pytest.raises(ZeroDivisionError):
        cli.main(["status"])


@pytest.mark.parametrize(("value", "code"), [(None, 0), (0, 0), (1, 1)])
def test_the_value_of_a_command_is_the_exit_code(
    call: Call, monkeypatch: pytest.MonkeyPatch, value: int | None, code: int
) -> None:
    monkeypatch.setattr(cli.LazyGroup, "get_command", lambda *_: click.Command("status", callback=lambda: value))
    assert call("status") == (code, "", "")


def imported(*arguments: str) -> tuple[int, list[str]]:
    """Exit code of the command line in a fresh process, and which heavy packages it imported."""
    code = (
        "import json, sys; from duallora_edge.cli import main\n"
        "try: main(sys.argv[1:])\n"
        f"except SystemExit as stop: print(json.dumps([stop.code, [m for m in {HEAVY} if m in sys.modules]]))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    status, modules = json.loads(done.stdout.splitlines()[-1])
    return status, modules


@pytest.mark.parametrize("arguments", [("--help",), ("devices",), ("predict", "--help"), ("exprot",)])
def test_nothing_heavy_is_imported(arguments: tuple[str, ...]) -> None:
    status, modules = imported(*arguments)
    assert status == (2 if arguments == ("exprot",) else 0) and modules == []


def test_the_module_runs_as_a_program() -> None:
    done = subprocess.run([sys.executable, "-m", "duallora_edge", "xyz"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == "" and "No command 'xyz'" in done.stderr


def test_a_reader_that_stops_reading_is_no_traceback() -> None:
    """``duallora-edge devices | head -1``"""
    with subprocess.Popen(
        [sys.executable, "-m", "duallora_edge", "devices"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 1
