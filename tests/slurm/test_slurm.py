"""The scripts of SLURM/ on a cluster of three nodes, all on this machine: interrupted jobs end as if they had not been.

The jobs run side by side, since most of their time goes into imports.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("cluster.sh")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
MISSING = [p for p in PROGRAMS if not shutil.which(p, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")]
STEPS = {"one": 40, "two": 4}  # of each stage
LENGTHS = [f"--stages.{stage}.trainer.max_steps={steps}" for stage, steps in STEPS.items()]

pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"needs SLURM; not installed: {', '.join(MISSING)}"),
    pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can start SLURM's daemons"),
]


class Cluster:
    """SLURM, and a user's folder with the toy experiment and the scripts."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, environment

    def __call__(self, *words: str, **environment: str) -> str:
        """Run a command; returns what it prints."""
        environment = self.environment | environment
        done = subprocess.run(words, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def job(self, name: str) -> dict[str, str]:
        """What SLURM knows of a job, or of one task of an array."""
        text = self("scontrol", "--oneliner", "show", "job", name).splitlines()[0]
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait(self, what: str, reached: Callable[[], bool], seconds: float = 180) -> None:
        deadline = time.monotonic() + seconds
        while not reached():
            logs = "\n".join(f"== {log}\n{log.read_text()}" for log in self.folder.glob("slurm-*.out"))
            assert time.monotonic() < deadline, f"in vain for {what}\n{logs}"
            time.sleep(0.3)

    def wait_for(self, name: str, state: str, restarts: tuple[int, ...] = (1,)) -> None:
        def reached() -> bool:
            job = self.job(name)
            return job["JobState"] == state and int(job["Restarts"]) in restarts

        self.wait(f"{name} to be {state}", reached)

    def continue_now(self, *names: str) -> None:
        """Have requeued jobs start; by themselves they wait two minutes."""
        time.sleep(2)  # slurmd refuses a job in the very second in which it was stopped
        for name in names:
            self("scontrol", "update", f"JobId={name}", "StartTime=now")

    def steps(self, run: str) -> list[int]:
        """Steps that were begun, in order; of several tasks all of them."""
        file = self.folder / "runs" / run / "trace"
        return [int(line.partition(":")[0]) for line in file.read_text().split()] if file.exists() else []


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    from toy import TOY, TWO_STAGES

    daemons, folder = tmp_path_factory.mktemp("slurm"), tmp_path_factory.mktemp("user")
    (folder / "toy.yaml").write_text(TOY.replace("toy.Regression", "slow.Slow") + TWO_STAGES)
    (folder / "SLURM").symlink_to(ROOT / "SLURM")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "LIT_GEN_", "PL_"))}
    subprocess.run([SCRIPT, "start", daemons], env=clean, check=True, timeout=60)
    own = {
        "SLURM_CONF": str(daemons / "slurm.conf"),
        "PYTHON": sys.executable,
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "slurm"))),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",  # the nodes' names are known to SLURM alone
    }
    yield Cluster(folder, clean | own)
    subprocess.run([SCRIPT, "stop", daemons], env=clean, check=True, timeout=60)


@pytest.fixture(scope="module")
def jobs(cluster: Cluster) -> dict[str, str]:
    """Two tasks of an array, a job on two nodes, one with a short time limit: each interrupted, then continued."""
    fit = ["SLURM/fit.sbatch", "-c", "toy.yaml", *LENGTHS]
    (cluster.folder / "slow").touch()
    (cluster.folder / "list.txt").write_text(f"# for fit\n\n-c 'toy.yaml' {' '.join(LENGTHS)} --model.width \"2\"\n")
    array = cluster("bash", "SLURM/array.sbatch", "list.txt", "--parsable", "--nodelist=n1", SEEDS="3 4").split()[-1]
    (cluster.folder / "list.txt").write_text("")  # what was submitted is submitted
    nodes = cluster("sbatch", "--parsable", "--nodes=2", "--nodelist=n2,n3", *fit)
    limits = ["--time=1", "--signal=USR1@30", "--nodelist=n2"]
    limited = cluster("sbatch", "--parsable", *limits, *fit, "--experiment=limited", "--trainer.max_steps=100000")
    first, last = f"{array}_0", f"{array}_1"
    for run in ("toy-seed3", "toy-seed4", "toy"):
        cluster.wait(f"{run} to train", lambda run=run: len(cluster.steps(f"{run}/one")) > 2)

    # A signal to one process of one node.
    os.kill(stage_of(nodes, rank=1), signal.SIGTERM)
    # The last task has the number of the array itself; requeuing it must not touch the others.
    assert cluster.job(last)["JobId"] == array
    cluster("scancel", "--signal=USR1", last)
    cluster.wait_for(last, "PENDING")
    assert cluster.job(first)["JobState"] == "RUNNING"
    # A more important job takes the whole node of the first task.
    urgent = cluster("sbatch", "--parsable", "--partition=urgent", "--nodelist=n1", "--exclusive", "--wrap=true")
    cluster.wait_for(first, "PENDING")
    cluster.wait_for(urgent, "COMPLETED", restarts=(0,))
    cluster.wait_for(nodes, "PENDING")
    for run in ("toy-seed3", "toy-seed4", "toy"):
        assert max(cluster.steps(f"{run}/one")) < STEPS["one"] - 1

    (cluster.folder / "slow").unlink()
    cluster.continue_now(first, last, nodes)
    return {"first": first, "last": last, "nodes": nodes, "limited": limited}


def test_preempted_and_signalled_tasks_of_an_array(
    cluster: Cluster, jobs: dict[str, str], lit_gen: Callable[..., int]
) -> None:
    for job, seed in (("first", 3), ("last", 4)):
        cluster.wait_for(jobs[job], "COMPLETED")
        for stage, length in STEPS.items():  # no step was lost, none made twice
            assert cluster.steps(f"toy-seed{seed}/{stage}") == list(range(length))
        fit_straight(lit_gen, cluster, "--seed_everything", str(seed))
        assert_same(cluster, f"toy-seed{seed}")
    assert curve(Path("runs/toy-seed3/one")) != curve(Path("runs/toy-seed4/one"))


def test_two_nodes_stop_together_when_one_is_asked_to(
    cluster: Cluster, jobs: dict[str, str], lit_gen: Callable[..., int]
) -> None:
    cluster.wait_for(jobs["nodes"], "COMPLETED")
    for stage, length in STEPS.items():  # made by both tasks, also before the interruption
        assert sorted(cluster.steps(f"toy/{stage}")) == sorted([*range(length)] * 2)
    log = (cluster.folder / f"slurm-lit_gen-{jobs['nodes']}.out").read_text()
    assert log.count("paused") == 1 and log.count("continuing at step") == 1  # said once, not by every task
    # Both tasks saw the same batches, so that the mean of their gradients is that of a single process.
    fit_straight(lit_gen, cluster)
    assert_same(cluster, "toy")


def test_notice_of_the_time_limit_requeues_and_a_cancelled_job_stays_cancelled(
    cluster: Cluster, jobs: dict[str, str]
) -> None:
    job = jobs["limited"]
    often = tuple(range(1, 10))
    cluster.wait_for(job, "PENDING", restarts=often)
    before = cluster.steps("limited/one")
    assert before == list(range(len(before)))
    cluster("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    cluster.continue_now(job)
    cluster.wait("it to continue", lambda: len(cluster.steps("limited/one")) > len(before) + 2)
    cluster("scancel", job)
    cluster.wait_for(job, "CANCELLED", restarts=often)
    after = cluster.steps("limited/one")
    assert after == list(range(len(after)))
    assert not (cluster.folder / "runs/limited/one/DONE").exists()


def stage_of(job: str, rank: int) -> int:
    """Process id of the stage that a task of a job is in."""
    wanted = {f"SLURM_JOB_ID={job}", f"SLURM_PROCID={rank}"}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = set((process / "environ").read_text().split("\0"))
            words = (process / "cmdline").read_text().split("\0")
        except OSError:  # it has ended, or is not ours
            continue
        if wanted <= environment and words[1:4] == ["-m", "lit_gen", "stage"]:
            return int(process.name)
    raise AssertionError(f"job {job} has no task {rank}")


def fit_straight(lit_gen: Callable[..., int], cluster: Cluster, *words: str) -> None:
    """The same experiment in this process and the present folder, without an interruption."""
    shutil.copy(cluster.folder / "toy.yaml", "toy.yaml")
    assert lit_gen("fit", "-c", "toy.yaml", *LENGTHS, *words) == 0


def assert_same(cluster: Cluster, run: str) -> None:
    """The cluster's run and the one here have the same losses and weights, bit for bit."""
    for stage, length in STEPS.items():
        folders = [root / "runs" / run / stage for root in (cluster.folder, Path())]
        one, other = (curve(folder) for folder in folders)
        assert [step for step, _ in one] == list(range(length)) and one == other
        one, other = (torch.load(folder / "checkpoints/last.ckpt", weights_only=True) for folder in folders)
        assert one["global_step"] == other["global_step"] == length
        for name, value in one["state_dict"].items():
            assert torch.equal(value, other["state_dict"][name]), name


def curve(folder: Path) -> list[tuple[int, float]]:
    """(step, loss) of a run as TensorBoard shows them."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("train/loss")]
