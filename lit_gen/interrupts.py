"""What asks a run to pause: a signal, Ctrl-C or the clock. Training then saves and stops at the next step border.

Signals only raise a flag. A scheduler sends SIGUSR1 (time is nearly up) or SIGTERM (preempted) at any moment, also
while libraries are being imported; saving inside the handler, in the middle of a step, is what corrupts checkpoints.
It sends them to every process of a job, so workers that serve a training ignore them.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import NoReturn

from lit_gen.errors import UserError

PAUSING = (signal.SIGTERM, signal.SIGUSR1)
PAUSED = 75  # exit status of a command that a signal stopped before its end: run it again (EX_TEMPFAIL of sysexits.h)
OUT_OF_TIME = 74  # of a stage that met `trainer.max_time`; the command itself did what it was asked to and returns 0

received: signal.Signals | None = None
_child: subprocess.Popen[bytes] | None = None


def _remember(signum: int, _: object) -> None:
    global received
    received = signal.Signals(signum)
    if _child is not None and _child.poll() is None:
        _pass_on(_child, received)


def _pass_on(child: subprocess.Popen[bytes], signum: signal.Signals) -> None:
    child.send_signal(signal.SIGTERM if signum == signal.SIGINT else signum)  # that one it does not hear


def install() -> None:
    """Take over the pausing signals, and let those through that arrived before anyone could listen."""
    for signum in PAUSING:
        signal.signal(signum, _remember)
    if signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()):  # by `call`; multiprocessing lifts the block
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PAUSING)


@contextlib.contextmanager
def ctrl_c_pauses() -> Iterator[None]:
    """Within, Ctrl-C asks for a pause, and a second one ends the child of `call` and raises KeyboardInterrupt.

    The terminal sends it to all that a command has started. Only this process listens, or ranks would stop in the
    middle of a step, and commands that data is read from would be gone before that.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # of `nohup`, say, which nothing should stop
        yield
        return

    def asked(signum: int, _: object) -> None:
        if received == signal.SIGINT:
            if _child is not None:
                _child.kill()
            raise KeyboardInterrupt
        os.write(2, b"\nstopping as soon as all is saved; Ctrl-C again stops at once\n")
        _remember(signum, None)

    signal.signal(signal.SIGINT, asked)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def end(status: int) -> NoReturn:
    """End this process with an exit status that nothing changes any more, neither a signal nor a thread.

    What multiprocessing does in its children: exit handlers run and files are flushed, but the interpreter is not taken
    apart, since a thread within torch (gloo's, a loader's) that wants it back just then aborts the process.
    """
    for signum in PAUSING:
        signal.signal(signum, signal.SIG_IGN)
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(status)


def leave_at_once() -> None:
    """Have the pausing signals end this process: for work with nothing to save, or that saves as it goes."""

    def leave(signum: int, _: object) -> None:
        os.write(2, f"stopped by {signal.Signals(signum).name}\n".encode())  # print may be at work already
        raise SystemExit(PAUSED)

    for signum in PAUSING:
        signal.signal(signum, leave)
    if received is not None:
        leave(received, None)


def seconds(limit: str | timedelta | dict[str, int]) -> float:
    """`trainer.max_time` in seconds: "DD:HH:MM:SS", "HH:MM:SS", a timedelta or its arguments."""
    if isinstance(limit, timedelta):
        return limit.total_seconds()
    if isinstance(limit, dict):
        try:
            return timedelta(**limit).total_seconds()
        except TypeError:
            units = "weeks, days, hours, minutes, seconds"
            raise UserError(f"trainer.max_time: {limit} is not a time; its units are {units}") from None
    if not re.fullmatch(r"(\d+:)?\d+:\d\d:\d\d", limit):
        raise UserError(f"trainer.max_time: `{limit}` is not a time; write HH:MM:SS or DD:HH:MM:SS")
    days, hours, minutes, secs = (int(part) for part in ("0:" * (3 - limit.count(":")) + limit).split(":"))
    return timedelta(days=days, hours=hours, minutes=minutes, seconds=secs).total_seconds()


def start_clock() -> None:
    """Time limits of this command and its children count from now."""
    os.environ["LIT_GEN_STARTED"] = str(time.time())


def time_is_up(limit: float | None) -> bool:
    """Whether the command has run longer than so many seconds, imports and data building included."""
    return limit is not None and time.time() - float(os.environ.get("LIT_GEN_STARTED", time.time())) > limit


def status(limit: float | None) -> int:
    """The exit status to stop with now, 0 to go on; of several processes' the highest is the one to agree on."""
    if received is not None:
        return PAUSED
    return OUT_OF_TIME if time_is_up(limit) else 0


def call(command: list[str]) -> int:
    """Run a child that shares our fate: it gets our signals, and it dies when we are killed.

    Returns:
        The child's exit status, as a shell would give it.
    """
    global _child
    # The child inherits the blocked mask and unblocks in `install`, so no signal finds it without a handler. Ctrl-C it
    # never hears where that pauses.
    blocked = {*PAUSING} if signal.getsignal(signal.SIGINT) is signal.default_int_handler else {*PAUSING, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        _child = subprocess.Popen(command, env={**os.environ, "LIT_GEN_PARENT": str(os.getpid())})
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)
    if received is not None:  # before there was a child to pass it on to
        _pass_on(_child, received)
    try:
        code = _child.wait()
    except KeyboardInterrupt:  # the terminal sends Ctrl-C to both of us; let the child tidy up
        _child.wait()
        raise
    finally:
        _child = None
    return code if code >= 0 else 128 - code


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it dies, even by kill -9 (Linux only)."""
    if not sys.platform.startswith("linux"):
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    started_by = multiprocessing.parent_process()  # of a worker; a container's first process may have some
    parent = os.environ.pop("LIT_GEN_PARENT", None) or getattr(started_by, "pid", None)
    if parent is not None and os.getppid() != int(parent):  # it died before we asked
        os.kill(os.getpid(), signal.SIGKILL)
