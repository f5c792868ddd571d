"""Scripts that two processes run together, as ranks of one job."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any


def run_twice(script: str, words: list[Any], folder: Path, **environment: str) -> None:
    """Run a script in two processes, whose output goes to `folder`, until both have ended well."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    shared = {
        **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0",
        "PYTHONPATH": path, **environment,
    }  # fmt: skip
    argv = [sys.executable, script, *map(str, words)]
    pair, logs = [], [folder / f"log.{rank}" for rank in (0, 1)]
    for rank, log in enumerate(logs):
        with log.open("w") as file:
            env = {**shared, "LOCAL_RANK": str(rank)}
            pair.append(subprocess.Popen(argv, env=env, stdout=file, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(600) for process in pair]
    finally:
        for process in pair:
            process.kill()
    assert codes == [0, 0], "\n".join(log.read_text()[-4000:] for log in logs)
