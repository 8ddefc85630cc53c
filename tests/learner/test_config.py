"""Configuration files: every problem at once, and nothing in them can hang or crash the reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from duallora_edge.errors import ConfigError
from duallora_edge.learner.config import PER_CALL, SETTINGS, SOURCE, TrainConfig, load_config
from duallora_edge.learner.settings import GROUPS
from duallora_edge.learner.yaml_files import MAX_YAML_BYTES


def write(path: Path, text: str) -> Path:
    file = path / "train.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def problem(path: Path | None, **overrides: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".") and len(message) < 2000
    return message


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = write(tmp_path, "epochs: 7\nseed: 3\ntask_order: [b, a]\nlearning_rate: 1\nflip: true\nsize: null\n")
    config = load_config(file, {"seed": 5, "method": None})
    assert (config.epochs, config.seed, config.method, config.task_order) == (7, 5, "dual_lora", ("b", "a"))
    assert config.flip is True and config.learning_rate == 1 and config.size is None


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "# nothing yet\n"), {}) == TrainConfig()


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    text = "epoch: 3\nmethd: x\nseed: many\nflip: 1\nenergy: 2.5\nmethod: magic\ntask_order: [1, 2]\nbackbone: null\n"
    message = problem(write(tmp_path, text))
    for part in (
        "unknown key 'epoch', did you mean 'epochs'?",
        "unknown key 'methd', did you mean 'method'?",
        "seed must be a whole number, not 'many'",
        "flip must be true or false, not 1",
        "task_order must be a list of names, not [1, 2]",
        "backbone cannot be null; leave it out for the default",
        "energy must be between 0 and 1, not 2.5",
        "method must be one of dual_lora, inflora, sequential, first_session, task_arithmetic, frozen, joint, "
        "not 'magic'",
        "train.yaml",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("batch_size: true", "batch_size must be a whole number"),
        ("batch_size: 3.5", "batch_size must be a whole number"),
        ("learning_rate: fast", "learning_rate must be a number"),
        ("learning_rate: .nan", "learning_rate must be"),
        ("energy: .inf", "energy must be"),
        ("data: 5", "data must be text, not 5"),
        ("seed: -1", "seed must be"),
        ("completely-different: 1", "unknown key 'completely-different'"),
        ("5: 1", "unknown key 5"),
        ("- a\n- b", "must hold keys and values, not a list"),
        ("just text", "must hold keys and values, not a str"),
        ("a: [", "cannot be read as YAML"),
        ("a: !!python/object/apply:os.system [ls]", "cannot be read as YAML"),
        ("a: 2024-99-99", "cannot be read as YAML"),
        ("? [a]\n: 1", "cannot be read as YAML"),
        ("a: " + "9" * 5000, ""),
        ("a: " + "[" * 60_000, "nested too deeply"),
        ("seed: 0x" + "f" * 5000, "seed must be between 0 and 9223372036854775807, not a huge number"),
        ("seed: 0b" + "1" * 60_000, "seed must be between 0 and 9223372036854775807, not a huge number"),
        ("seed: " + "1:" * 3000 + "1", "not a huge number"),
        ("seed: " + "1:" * 3000 + "1.0", "cannot be read as YAML"),
        ("task_order: [0x" + "f" * 5000 + "]", "task_order must be a list of names, not [a huge number]"),
        ("? 0x" + "f" * 900 + "\n: 1", "unknown key a huge number"),
        ('"\\e[31m\\u202e": 1', "unknown key '\\x1b[31m\\u202e'"),
        ("".join(f"key{i}: 1\n" for i in range(5000)), "and maybe more"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in problem(write(tmp_path, text))


@pytest.mark.parametrize(("first", "level"), [("[x, x, x]", "[{}]"), ("{x: 1, y: 2}", "{{<<: [{}]}}")])
def test_a_bomb_of_references_is_refused_quickly(tmp_path: Path, first: str, level: str) -> None:
    """Nine levels of nine references each: four hundred million items if anything wrote them all out."""
    lines = [f"a0: &a0 {first}"]
    lines += [f"a{i}: &a{i} {level.format(', '.join([f'*a{i - 1}'] * 9))}" for i in range(1, 9)]
    assert "uses a YAML alias (*a0); write the value out" in problem(write(tmp_path, "\n".join([*lines, "seed: *a8"])))


def test_a_file_without_an_end_is_refused() -> None:
    assert f"larger than {MAX_YAML_BYTES} bytes" in problem(Path("/dev/zero"))


def test_a_large_file_is_refused(tmp_path: Path) -> None:
    assert "larger than" in problem(write(tmp_path, "#" * (MAX_YAML_BYTES + 1)))


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    binary = tmp_path / "train.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x01")
    for path in (binary, tmp_path / "missing.yaml", tmp_path):
        assert "cannot be read as YAML" in problem(path)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"rank_orthogonal": -1}, "rank_orthogonal must be between 0 and 256, not -1"),
        ({"batch_size": 0, "epochs": -1}, "epochs must be between 0 and 10000, not -1"),
        ({"batch_size": 0, "epochs": -1}, "batch_size must be between 1 and 65536, not 0"),
        ({"resize": "sqash"}, "resize must be one of crop, squash, not 'sqash', did you mean 'squash'?"),
        (
            {"learning_rate": "1e-3"},
            "learning_rate must be a number, not '1e-3' (YAML reads this as text; write 0.001)",
        ),
        ({"validation_fraction": 0.9}, "validation_fraction must be between 0 and 0.5"),
        ({"size": 7}, "size must be between 8 and 4096"),
        ({"summaries": 0}, "summaries must be between 1 and 1000, not 0"),
        ({"classifier": "svm"}, "classifier must be one of auto, lda, lda_f, mean_f, ridge, heads, not 'svm'"),
        ({"task_scale": -0.1}, "task_scale must be between 0 and 10"),
        ({"kl_weight": 1.5}, "kl_weight must be between 0 and 1, not 1.5"),
        ({"kept_images_per_class": -1}, "kept_images_per_class must be between 0 and 1000000, not -1"),
        ({"distillation": -1.0}, "distillation must be between 0 and 1000"),
    ],
)
def test_bad_flags(overrides: dict[str, Any], expected: str) -> None:
    assert expected in problem(None, **overrides)


def test_a_configuration_made_in_python_is_checked_too() -> None:
    with pytest.raises(ConfigError, match=r"epochs must be a whole number, not '4'; size must be between 8 and 4096"):
        TrainConfig(epochs="4", size=7)  # type: ignore[arg-type]
    assert TrainConfig(task_order=["b", "a"]).task_order == ("b", "a")  # type: ignore[arg-type]


def test_every_setting_is_declared_with_a_sentence_a_group_and_a_good_default() -> None:
    assert list(SETTINGS) == list(TrainConfig().to_json())
    for key, one in SETTINGS.items():
        assert one.key == key and one.group in GROUPS and one.help.endswith(".") and one.help.count(". ") == 0
        assert one.problem(one.default) is None and (one.default is not None or one.unset)
        assert one.kind not in (int, float) or one.range_text


def test_groups_of_settings_name_settings() -> None:
    assert set(SOURCE) < set(PER_CALL) < set(TrainConfig().to_json())
