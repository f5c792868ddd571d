"""The array script's reading of its list, without a cluster."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def array(here: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`bash SLURM/array.sbatch WORDS`, where `sbatch` only says what it is given."""
    (here / "sbatch").write_text("#!/bin/bash\nprintf '<%s>' \"$@\"\n")
    (here / "sbatch").chmod(0o755)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")} | environment
    clean["PATH"] = f"{here}:{clean['PATH']}"
    command = ["bash", str(ROOT / "SLURM" / "array.sbatch"), *words]
    return subprocess.run(command, cwd=here, env=clean, capture_output=True, text=True, check=False)


def test_a_list_with_the_line_ends_of_windows(here: Path) -> None:
    (here / "list").write_bytes(b"-c a.yaml\r\n\r\n# b\r\n-c c.yaml")
    done = array(here, "list", SEEDS="0 1")
    assert done.returncode == 0 and "\r" not in done.stdout
    assert (
        "<--array=0-3>" in done.stdout
        and "<-c a.yaml --seed_everything 1><-c c.yaml --seed_everything 0>" in done.stdout
    )


def test_a_line_that_cannot_be_read(here: Path) -> None:
    done = array(here, '-c "a.yaml', SLURM_ARRAY_TASK_ID="0")
    assert done.returncode == 2 and 'cannot be read: -c "a.yaml' in done.stderr
