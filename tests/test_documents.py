"""The documents tell the truth: what they name exists, every stored key is explained, and the README's code runs."""

from __future__ import annotations

import ast
import io
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from duallora_edge.cli import main
from duallora_edge.learner.history import HISTORY
from duallora_edge.learner.methods import METHODS
from duallora_edge.learner.run_directory import RunDirectory
from duallora_edge.runtime.device.cuda import CUDA_PYTHON

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    path.relative_to(ROOT)
    for path in [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("benchmarks/*.md"),
        *ROOT.glob("examples/*.md"),
        *ROOT.glob("learner/**/*.md"),
    ]
)
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=str)

FENCE = re.compile(r"^(?P<indent> *)```.*?^(?P=indent)```", re.M | re.S)
FOLDERS = "benchmarks|device_profiles|docs|duallora_edge|examples|export|jetson|learner|runtime|scripts|tests"
FILE = re.compile(rf"`((?:{FOLDERS})/[\w./-]+\.(?:py|md|yaml|sh|sbatch|service|png|txt|Dockerfile))(?:: ([\w.]+))?`")
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)\s]*))?\)")


@each_document
def test_files_and_functions_that_a_document_names_exist(document: Path) -> None:
    missing = [
        f"{file}: {name}" if name else file
        for file, name in FILE.findall((ROOT / document).read_text(encoding="utf-8"))
        if "NAME" not in file and not ((ROOT / file).is_file() and (not name or defines(ROOT / file, name)))
    ]
    assert not missing


@each_document
def test_links_of_a_document_lead_somewhere(document: Path) -> None:
    text = FENCE.sub("", (ROOT / document).read_text(encoding="utf-8"))
    broken = []
    for target, anchor in LINK.findall(text):
        path = (ROOT / document).parent / target if target else ROOT / document
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(f"{target}#{anchor}")
    assert not broken


def defines(file: Path, name: str) -> bool:
    """Whether a source file defines a dotted name such as ``GaussianClassifier.fit``, without importing it."""
    node: Any = ast.parse(file.read_text(encoding="utf-8"))
    for part in name.split("."):
        node = next((child for child in node.body if part in names(child)), None)
        if node is None:
            return False
    return True


def names(node: ast.stmt) -> list[str]:
    """The names that a statement defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def anchors(page: Path) -> set[str]:
    """The anchors of the headings of a page, as GitHub and MkDocs make them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    slugs = [re.sub(r"[^\w\- ]", "", re.sub(r"\]\([^)]*\)", "", heading)).strip().lower() for heading in headings]
    return {re.sub(r"\s", "-", slug) for slug in slugs}


# -- what to install -----------------------------------------------------------------------------------------------

COMMAND = re.compile(r"pip (?:install|download)\b[^\n`]*")
_, _, PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.optional-dependencies]\n")
EXTRAS = set(re.findall(r"^(\w+) = ", PROJECT.partition("\n\n")[0], re.M))
PARTS = ("device_profiles", "duallora_edge", "examples", "export", "learner", "runtime", "scripts")
CONTAINERS = [Path("jetson/jetpack6.Dockerfile"), Path("jetson/jetpack7.Dockerfile")]


def pip_commands(file: Path) -> list[str]:
    """The commands of pip in a file, each in one line."""
    return COMMAND.findall(re.sub(r" *\\\n *", " ", (ROOT / file).read_text(encoding="utf-8")))


@pytest.mark.parametrize("file", [*DOCUMENTS, *CONTAINERS, Path("examples/duallora-edge.service")], ids=str)
def test_commands_of_pip(file: Path) -> None:
    """None asks an index for duallora-edge, a name that anybody could register there, and all extras exist."""
    for command in pip_commands(file):
        assert not re.search(r"duallora-edge(?!/)", command), command
        assert set(re.findall(r"\w+", " ".join(re.findall(r"\[([\w,-]+)\]", command)))) <= EXTRAS, command


def test_no_message_installs_the_package_by_its_name() -> None:
    sources = [file for part in PARTS for file in (ROOT / part).rglob("*.py")]
    assert len(sources) > 100
    assert not [file for file in sources if re.search(r"pip install ['\"]?duallora", file.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(
    ("file", "constraints"), [(Path("docs/jetson.md"), "66767"), (CONTAINERS[0], "6"), (CONTAINERS[1], "7")], ids=str
)
def test_what_a_jetpack_needs_is_constrained(file: Path, constraints: str) -> None:
    """Every command for a JetPack with a GPU names its constraints, here in the order of the page."""
    commands = [command for command in pip_commands(file) if "cuda-python" in command]
    named = [re.findall(r" -c (?:/tmp/)?constraints-jp(\d)\.txt ", command) for command in commands]
    assert named == [[digit] for digit in constraints]


@pytest.mark.parametrize(("jetpack", "cuda"), [(6, 12), (7, 13)])
def test_constraints_and_messages_name_the_same_cuda_python(jetpack: int, cuda: int) -> None:
    text = (ROOT / "jetson" / f"constraints-jp{jetpack}.txt").read_text(encoding="utf-8")
    assert re.findall(r"^cuda-python\S*", text, re.M) == [CUDA_PYTHON[cuda].strip("'")]


# -- formats ------------------------------------------------------------------------------------------------------


def test_every_key_of_a_run_and_a_bundle_is_explained(readme: tuple[Path, list[str]]) -> None:
    run, bundle = readme[0] / "runs" / "site-a", readme[0] / "bundle"
    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    explained = set(re.split(r"[\s`,:;/|()]+", text))
    found: dict[str, set[str]] = {}
    found["history.jsonl"] = set(json.loads((run / HISTORY).read_text(encoding="utf-8").splitlines()[0]))
    for path in [*run.rglob("*.json"), *bundle.rglob("*.json")]:
        value = json.loads(path.read_text(encoding="utf-8"))
        found[path.name] = set(keys(list(value.values()) if path.name == "sources.json" else value))  # tasks by name
    found["run.yaml"] = set(re.findall(r"^(\w+):", (run / "run.yaml").read_text(encoding="utf-8"), re.M))
    for path in run.glob("tasks/*/*.safetensors"):
        with safe_open(path, "pt") as file:
            found[path.name] = {re.sub(r"\d+", "N", name) for name in file.keys()}  # noqa: SIM118
    for path in [*run.rglob("*"), *bundle.rglob("*")]:
        if path.is_file() and not path.name.startswith(("prefix-", "suffix-")):
            found.setdefault("files", set()).add(path.name)
    assert {"HEAD.json", "task.json", "metrics.json", "rows.json", "manifest.json"} <= found.keys()
    missing = {
        name: [key for key in sorted(known) if not {key, f".{key.rpartition('.')[2]}"} & explained]
        for name, known in found.items()
    }
    assert not {name: known for name, known in missing.items() if known}


def keys(value: Any, parent: str = "") -> Iterator[str]:
    """All keys of a JSON value that the format gives: not names of classes, tasks and files, digests and operators."""
    if isinstance(value, dict):
        for key, inner in value.items():
            given = re.fullmatch(r"[a-z][a-z0-9_]*", key) and not re.fullmatch(r"[0-9a-f]{64}", key)
            if given and parent not in ("counts", "details"):
                yield key
            yield from keys(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from keys(inner, parent)


# -- the README's code ----------------------------------------------------------------------------------------------

BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>[^>]+) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)
QUICK = ("--epochs", "1", "--min-steps", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def readme(image_task: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder in which the README's code ran, in order and on generated photos, and what of it was run.

    Blocks that cannot run here say why in a comment above them.
    """
    folder = photos(image_task, tmp_path_factory.mktemp("readme"))
    run: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in BLOCK.finditer((ROOT / "README.md").read_text(encoding="utf-8")):
            language, code = block["language"], block["code"]
            assert language in ("sh", "python", "text"), f"a block of code without a known language: {code}"
            if block["reason"] or language == "text":
                continue
            if language == "python":
                said = io.StringIO()
                with redirect_stdout(said):
                    exec(compile(code, "README.md", "exec"), {})
                assert len(said.getvalue().splitlines()) > 8  # the backend, and one line for each photo
                run.append(language)
                continue
            for line in code.splitlines():
                program, *arguments = shlex.split(line, comments=True)
                assert program == "duallora-edge"
                with pytest.raises(SystemExit) as stopped:
                    main([*arguments, *(QUICK if arguments[0] == "train" else ())])
                assert not stopped.value.code, line
                run.append(arguments[0])
    return folder, run


def photos(image_task: Callable[..., Path], folder: Path) -> Path:
    """The folder with the photos that the documents' code reads."""
    image_task(folder / "photos", {"disc": 0, "square": 1}, train=6, test=2)
    image_task(folder / "new-products", {"cross": 2, "ring": 3}, train=6, test=2)
    shutil.copy(folder / "photos" / "test" / "disc" / "00.png", folder / "some-photo.jpg")
    return folder


def test_the_code_of_the_readme_runs(readme: tuple[Path, list[str]]) -> None:
    assert readme[1] == ["train", "train", "status", "export", "predict", "python"]


def test_the_code_of_the_python_page_runs(
    image_task: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As one program, on generated photos."""
    monkeypatch.chdir(photos(image_task, tmp_path))
    blocks = list(BLOCK.finditer((ROOT / "docs" / "python.md").read_text(encoding="utf-8")))
    assert {block["language"] for block in blocks} == {"python"}
    try:
        exec(compile("\n".join(block["code"] for block in blocks), "python.md", "exec"), {})
        assert RunDirectory.open(tmp_path / "runs" / "site-b").config.method == "free"
    finally:
        METHODS.pop("free", None)
    said = capfd.readouterr().out
    assert "['photos', 'new-products']" in said and "learned new-products in" in said
    assert "new-products: " in said and "loss " in said
