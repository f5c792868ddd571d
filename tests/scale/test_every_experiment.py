"""Every experiment that is here trains on two processes, under DDP and under ZeRO."""

from __future__ import annotations

from typing import Any


def test_two_steps_on_two_processes(experiment_pair: list[dict[str, Any]]) -> None:
    for rank in experiment_pair:
        assert "error" not in rank, rank["error"]
        assert rank["done"] and all(rank["done"])
        assert rank["saved"] == [rank["zero"]] * len(rank["done"])  # a folder with a part per process, or a file
