"""``duallora-edge demo --field``: the story comes to its end as it is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.mark.slow
def test_the_story(call: Any, tmp_path: Path) -> None:
    code, out, err = call("demo", "--run", tmp_path, "--field")
    assert code == 0, err
    assert "version 1 finds 100 % of the images of 0 to 7 and 0 % of the images of 8" in out
    assert "taught classes: none, the bundle knows it now" in out
    assert "slot a is given up: " in out and "are novel" in out
    assert "version 2 answers; given up: " in out
    code, _, err = call("demo", "--run", tmp_path, "--field")  # nothing that is there is deleted
    assert code == 1 and "is there already" in err
