"""Training in processes that can be killed, without paying for the imports each time.

A server imports everything once; each run is a fork of it. `Forks` is the test's side, the rest the server's.
"""

from __future__ import annotations

import contextlib
import json
import os
import pkgutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


class Forks:
    """Starts runs, kills them, waits for them."""

    def __init__(self) -> None:
        path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
        self.server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip

    def start(self, words: list[str], folder: Path, **how: Any) -> int:
        """Begin `python -m lit_gen WORDS` in a folder and return its process id.

        Args:
            words: the command line; "smoke" in the place of the verb is `fit --smoke` that keeps an earlier run.
            folder: working directory.
            how: `env`: more environment variables. `die`: [function, n], a dotted name on whose n-th call the process
                kills itself with signal 9.
        """
        log = folder / f"log-{time.monotonic_ns()}"
        return self._ask({"words": [str(w) for w in words], "folder": str(folder), "log": str(log), **how})

    def wait(self, process: int) -> int:
        """Exit status, negative for a signal."""
        return self._ask({"wait": process})

    def run(self, words: list[str], folder: Path, **how: Any) -> int:
        return self.wait(self.start(words, folder, **how))

    def kill(self, process: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)

    def close(self) -> None:
        self.server.kill()
        self.server.wait()

    def _ask(self, request: dict[str, Any]) -> int:
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())


def over(process: int) -> bool:
    """Whether a process has ended, waited for or not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def until(reached: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, "it did not come to this"
        time.sleep(0.002)


def serve() -> None:
    import toy  # noqa: F401

    import lit_gen.methods.stylecrafter  # noqa: F401
    import lit_gen.pretrain.clip  # noqa: F401
    import lit_gen.pretrain.motion  # noqa: F401
    import lit_gen.pretrain.oracle  # noqa: F401
    import lit_gen.stage  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            signal.alarm(240)  # a run that hangs ends the server, and with it the test
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
            signal.alarm(0)
        elif (answer := os.fork()) == 0:
            os._exit(_child(request))
        print(answer, flush=True)


def _child(request: dict[str, Any]) -> int:
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    from lit_gen import cli, interrupts, stage

    interrupts.die_with_parent()
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(request["folder"])
    os.environ.update(request.get("env", {}))
    rank_zero_only.rank = int(os.environ.get("RANK", 0))  # which was read at import
    if "die" in request:
        _die_at(*request["die"])
    interrupts.install()
    cli.launch = stage.main
    verb, *words = request["words"]
    try:
        return _smoke(words) if verb == "smoke" else cli.main([verb, *words])
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _smoke(words: list[str]) -> int:
    from lit_gen import cli, experiment, stage

    files, _, overrides = cli.parse(words)
    for run in experiment.runs(files, overrides, smoke=True):
        if not run.done.is_file() and (code := stage.main(["run", str(run.write_request("fit", words))])):
            return code
    return 0


def _die_at(name: str, call: int) -> None:
    owner, _, attribute = name.rpartition(".")
    owner = pkgutil.resolve_name(owner)
    real, calls = getattr(owner, attribute), []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == call:
            if name == "torch.save":  # in the middle of a write
                args[1].write(b"PK\x03\x04 half a checkpoint")
                args[1].flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(owner, attribute, counted)


if __name__ == "__main__":
    serve()
