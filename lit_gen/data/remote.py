"""Shards that are elsewhere: fetched once per machine into a local folder, checked, and then read like any other.

A source is an http(s) URL or `pipe:COMMAND`, whose output is the shard, e.g. `pipe:aws s3 cp s3://bucket/0.tar -`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import http.client
import json
import logging
import os
import re
import select
import signal
import string
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from lit_gen.data.tar import walk
from lit_gen.errors import ShardError

logger = logging.getLogger(__name__)

STALL_SECONDS = 60.0  # without a byte, after which a source is taken for dead
RETRY_AFTER = (0.5, 1.0, 2.0, 4.0)  # seconds; more failures in a row without a new byte are final
HOPELESS = {400, 401, 403, 404, 405, 410}  # answers of a server that asking again does not change
_PIECE = 1 << 18  # bytes read at a time


def is_remote(source: str) -> bool:
    """Whether a source is not a path of this machine."""
    return source.startswith("pipe:") or "://" in source


def cache_folder() -> Path:
    """Where fetched shards are kept: $LIT_GEN_CACHE, or data/cache."""
    return Path(os.environ.get("LIT_GEN_CACHE") or "data/cache")


def cached(source: str) -> Path:
    """The local file of a source that has no index."""
    return cache_folder() / _short(source) / name_of(source)


def name_of(source: str) -> str:
    """The name of a shard for people and in samples' keys: the last word of its source that looks like a tar."""
    if source.startswith("pipe:"):
        named = re.findall(r"[^\s/'\"=:|]+\.tar\b", source)
    else:
        named = [urllib.parse.unquote(urllib.parse.urlsplit(source).path).rpartition("/")[2]]
    name = re.sub(r"[^\w.+-]", "_", named[-1]) if named else ""
    return name if name.strip(".") else "shard.tar"


def check_scheme(source: str) -> None:
    """ShardError for a source that cannot be fetched, with what to write instead."""
    scheme = source.partition(":")[0].lower()
    if scheme == "pipe":
        return
    if scheme not in ("http", "https"):
        told = {"s3": f"aws s3 cp '{source}' -", "gs": f"gsutil cat '{source}'"}.get(scheme, f"COMMAND {source}")
        raise ShardError(f"{source}: {scheme}:// is not read directly; write pipe:{told}")
    try:
        parts = urllib.parse.urlsplit(source)
        if not parts.hostname or parts.port == 0:
            raise ValueError("it names no server")
    except ValueError as error:
        raise ShardError(f"{source} is not a URL: {error}") from None
    if re.search(r"[*?\[]", parts.path):
        raise ShardError(f"{source}: files of a server cannot be listed; name them by a brace pattern or an index.json")


def fetch_index(folder: str) -> dict:
    """The parsed index.json of a folder on a server; the last one seen when the server does not answer."""
    parts = urllib.parse.urlsplit(folder)
    path = parts.path if parts.path.endswith("/index.json") else parts.path.rstrip("/") + "/index.json"
    url = urllib.parse.urlunsplit(parts._replace(path=path))
    file = cache_folder() / _short(url) / "index.json"
    try:
        with tempfile.TemporaryFile() as stream:
            _fill(stream, url, -1, "", STALL_SECONDS, lambda: None)
            stream.seek(0)
            text = stream.read()
        try:
            index = json.loads(text)
        except (ValueError, RecursionError):
            raise ShardError(f"{url} is not an index: it begins with {text[:40]!r}") from None
        with _disk(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            fresh = file.with_name(f"{os.getpid()}.{threading.get_ident()}")
            fresh.write_bytes(text)
            fresh.replace(file)
        return index
    except Unreachable as error:
        if not file.is_file():
            raise
        logger.warning("data: %s; the index of an earlier run is used", error)
        return json.loads(file.read_bytes())


class Unreachable(ShardError):
    """A source gives no answer, or not the whole of it."""


def fetch(
    source: str,
    file: Path,
    size: int = -1,
    sha256: str = "",
    stall_seconds: float = STALL_SECONDS,
    progress: Callable[[], None] = lambda: None,
) -> None:
    """Have `source` in `file`, complete and checked; of several processes one fetches and the others wait for it.

    Args:
        size: bytes, -1 where unknown.
        sha256: checksum, "" where unknown.
        stall_seconds: without a new byte, after which ShardError is raised.
        progress: called whenever there are new bytes.

    Raises:
        ShardError: the source does not answer, breaks off, or gives something else.
    """
    if is_here(file, size):
        return
    partial = file.with_name(f"{file.name}.partial")
    with _disk(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with _alone(source, partial, file, size, stall_seconds, progress) as stream:
            if stream is None:
                return
            try:
                _fill(stream, source, size, sha256, stall_seconds, progress)
                stream.flush()
                os.fsync(stream.fileno())
                partial.rename(file)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise


@contextlib.contextmanager
def _disk(file: Path) -> Iterator[None]:
    """Failures of the local disk as one line."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        todo = "free some space or name another folder" if full else "name a folder that can be written"
        raise ShardError(f"{file}: {error.strerror or error}; {todo} with LIT_GEN_CACHE") from None


def is_here(file: Path, size: int = -1) -> bool:
    """Whether a shard has been fetched."""
    try:
        return file.stat().st_size == size or size < 0
    except (FileNotFoundError, NotADirectoryError):
        return False


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextlib.contextmanager
def _alone(
    source: str, partial: Path, file: Path, size: int, stall_seconds: float, progress: Callable[[], None]
) -> Iterator[BinaryIO | None]:
    """The partial file, locked; None when another process has finished it meanwhile.

    The lock is on the partial file itself, so it is gone with the process that held it and leaves nothing behind.
    """
    seen, since = -1, time.monotonic()
    while True:
        stream = os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT, 0o666), "rb+")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.close()
            with contextlib.suppress(FileNotFoundError):
                if (now := partial.stat().st_size) != seen:
                    seen, since = now, time.monotonic()
                    progress()
            if time.monotonic() - since > stall_seconds:
                raise ShardError(
                    f"{source}: no data for {stall_seconds:g} s; another reader of this machine fetches {file} and has "
                    "stalled"
                ) from None
            time.sleep(0.05)
            continue
        with stream:
            if is_here(file, size):
                if _same_file(stream, partial):  # made by opening it above
                    partial.unlink(missing_ok=True)
                yield None
                return
            if _same_file(stream, partial):  # else its maker gave up and removed it, or renamed it
                yield stream
                return


def _same_file(stream: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False


class _Clock:
    """Seconds since the last new byte."""

    def __init__(self, source: str, limit: float, progress: Callable[[], None]) -> None:
        self.source, self.limit, self.progress = source, limit, progress
        self.last = time.monotonic()

    def tick(self) -> None:
        self.last = time.monotonic()
        self.progress()

    def left(self) -> float:
        """Seconds that remain; ShardError when none do."""
        left = self.limit - (time.monotonic() - self.last)
        if left <= 0:
            raise Unreachable(f"{self.source}: no data for {self.limit:g} s; its server or command has stalled")
        return left


def _fill(
    stream: BinaryIO, source: str, size: int, sha256: str, stall_seconds: float, progress: Callable[[], None]
) -> None:
    """Write a source to a file and compare it with what is known about it."""
    for attempt in (1, 2):
        _empty(stream)  # what a killed process left may be of another version
        clock = _Clock(source, stall_seconds, progress)
        if source.startswith("pipe:"):
            sure = _run_pipe(source, stream, size, clock)
        else:
            sure = _download(source, stream, size, clock)
        stream.flush()
        got = stream.tell()
        if size >= 0 and got != size:
            wrong = f"it has {'more than ' * (got > size)}{min(got, size) if got > size else got} bytes, not {size}"
        elif sha256 and _digest(stream, clock) != sha256:
            wrong = f"its checksum is not that of the index ({sha256[:12]}…)"
        elif not sure and not sha256 and name_of(source).endswith(".tar") and (told := _incomplete(stream)):
            wrong = f"{told}, and the transfer did not say how long it would be"
        else:
            return
        if attempt == 2:
            raise ShardError(f"{source}: {wrong}, twice; the set or its index is stale or damaged at the source")


def _empty(stream: BinaryIO) -> None:
    stream.seek(0)
    stream.truncate()


def _incomplete(stream: BinaryIO) -> str:
    problems: list[str] = []
    for _ in walk(stream, problems):
        pass
    return "; ".join(problems)


def _digest(stream: BinaryIO, clock: _Clock) -> str:
    digest = hashlib.sha256()
    stream.seek(0)
    while block := stream.read(1 << 20):
        digest.update(block)
        clock.tick()
    return digest.hexdigest()


def _write(stream: BinaryIO, block: bytes, clock: _Clock) -> None:
    try:
        stream.write(block)
        stream.flush()  # so that processes that wait see it grow
    except OSError as error:
        raise _DiskError(error.errno, error.strerror) from None
    clock.tick()


class _DiskError(OSError):
    """A failure of the local disk, told apart from one of the network."""


def _download(url: str, stream: BinaryIO, size: int, clock: _Clock) -> bool:
    """Returns whether the server said how long the file is; goes on where a connection broke off."""
    best, failures = 0, 0
    while True:
        try:
            return _transfer(url, stream, size, clock)
        except _DiskError:
            raise
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code} {error.reason}"
            if error.code in HOPELESS:
                raise ShardError(f"{url}: {reason}") from None
        # http.client raises its own; an answer that is no HTTP at all may raise ValueError
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = str(getattr(error, "reason", error) or type(error).__name__)
        clock.left()
        failures = 0 if stream.tell() > best else failures + 1
        best = max(best, stream.tell())
        if failures > len(RETRY_AFTER):
            raise Unreachable(f"{url}: {' '.join(reason.split())} ({failures} times in a row)")
        time.sleep(min(RETRY_AFTER[max(failures - 1, 0)], clock.left()))


def _transfer(url: str, stream: BinaryIO, size: int, clock: _Clock) -> bool:
    start = stream.seek(0, os.SEEK_END)
    headers = {"User-Agent": "lit_gen", "Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    address = urllib.parse.quote(url, safe=string.punctuation)  # spaces, and letters beyond ASCII
    with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=clock.left()) as answer:
        if start and answer.status != 206:  # it starts again
            start = 0
            _empty(stream)
        elif start and not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise ConnectionError("the server answers with another part than the one asked for")
        length = answer.headers.get("Content-Length")
        chunked = answer.headers.get("Transfer-Encoding", "").lower() == "chunked"
        end = start + int(length) if length is not None and not chunked else -1
        while block := answer.read1(_PIECE):
            _write(stream, block, clock)
            if 0 <= size < stream.tell():
                return True  # more than there should be; the caller says so
        if stream.tell() < end:
            raise ConnectionError(f"the connection ended after {stream.tell()} of {end} bytes")
        return end >= 0 or chunked


def _run_pipe(source: str, stream: BinaryIO, size: int, clock: _Clock) -> bool:
    """Write what a command prints; False, since nothing tells whether that is all of it."""
    command = source.removeprefix("pipe:")
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(
            command,
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=complaints,
            start_new_session=True,
        )
        try:
            out = process.stdout.fileno()
            ready = select.poll()
            ready.register(out, select.POLLIN | select.POLLHUP)
            while True:
                if not ready.poll(clock.left() * 1000):
                    clock.left()
                    continue
                block = os.read(out, _PIECE)
                if not block or 0 <= size < stream.tell():
                    break
                _write(stream, block, clock)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(clock.left())
            if process.poll() != 0 and not 0 <= size < stream.tell():
                complaints.seek(0)
                said = complaints.read().decode(errors="replace").strip().splitlines()
                status = f"status {process.returncode}" if process.returncode is not None else "no end"
                raise ShardError(f"{source}: the command ended with {status}{f': {said[-1]}' if said else ''}")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()
    return False
