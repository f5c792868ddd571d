"""Work in parts: what `--task I/N`, or a place in a SLURM array, makes a process do of it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from lit_gen.errors import UserError


@dataclass(frozen=True)
class Task:
    """One of `count` parts of the work: of its pieces, e.g. shards, number, number + count, number + 2 count, …"""

    number: int = 0
    count: int = 1

    @staticmethod
    def parse(text: str | None) -> Task:
        """`--task I/N`; without it this process's part of its SLURM job."""
        if text is None:
            return Task.of_job()
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if not match or int(match[1]) >= int(match[2]):
            raise UserError(f"--task {text}: a task is I/N with I from 0 to N - 1, e.g. 0/4, 1/4, 2/4 and 3/4")
        return Task(int(match[1]), int(match[2]))

    @staticmethod
    def of_array(environment: Mapping[str, str] = os.environ) -> Task:
        """The part of a task of a SLURM array; all of the work anywhere else.

        Raises:
            UserError: the array's numbers have gaps, so that nobody knows the other parts.
        """
        count = _variable(environment, "ARRAY_TASK_COUNT", 1)
        if count <= 1:
            return Task()
        first, last, step = (_variable(environment, f"ARRAY_TASK_{name}", 1) for name in ("MIN", "MAX", "STEP"))
        position, beyond = divmod(_variable(environment, "ARRAY_TASK_ID", first) - first, step)
        if beyond or (last - first) // step + 1 != count:
            raise UserError(
                f"the SLURM array has {count} tasks from {first} to {last}, with gaps; say which part of the work "
                "is this one's with --task, e.g. --task $SLURM_ARRAY_TASK_ID/64"
            )
        return Task(position, count)

    @staticmethod
    def of_job(environment: Mapping[str, str] = os.environ) -> Task:
        """The same, shared once more by the processes that `srun` started.

        Raises:
            UserError: as `of_array`.
        """
        task = Task.of_array(environment)
        # Not SLURM_NTASKS: a batch script has it too, and is the only process that runs it.
        processes = _variable(environment, "STEP_NUM_TASKS", 1)
        own = _variable(environment, "PROCID", 0) % processes
        return Task(task.number * processes + own, task.count * processes)


def _variable(environment: Mapping[str, str], name: str, default: int) -> int:
    return int(environment.get(f"SLURM_{name}") or default)
