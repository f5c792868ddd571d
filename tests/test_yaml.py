"""Settings files as they are read."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_gen.errors import UserError
from lit_gen.settings import read


def test_merged_keys_give_way_to_a_mappings_own(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(
        "a: &a {lr: 1, seed: 2}\n"
        "b: &b {<<: *a, seed: 3}\n"
        "c: {seed: 4, <<: *b}\n"  # an anchor's mapping that itself has been merged into
        "d: {<<: [*b, {seed: 5, steps: 6}]}\n"
    )
    settings = read(file)
    assert settings.data["b"] == {"lr": 1, "seed": 3} and settings.data["c"] == {"lr": 1, "seed": 4}
    assert settings.data["d"] == {"lr": 1, "seed": 3, "steps": 6}
    assert settings.origins[("b", "seed")].endswith(":2") and settings.origins[("b", "lr")].endswith(":1")
    file.write_text("a: &a {lr: 1}\nb:\n  <<: *a\n  seed: 3\n  seed: 4\n")
    with pytest.raises(UserError, match="x.yaml:5: key `seed` is written twice"):
        read(file)


@pytest.mark.parametrize("merged", ["3", "[*a, 3]"])
def test_only_mappings_are_merged(tmp_path: Path, merged: str) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(f"a: &a {{lr: 1}}\nb: {{<<: {merged}}}\n")
    with pytest.raises(UserError, match="x.yaml:2: not valid YAML: `<<` merges a mapping"):
        read(file)
