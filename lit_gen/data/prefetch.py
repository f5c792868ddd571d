"""Fetching the shards that come next while others are read."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Sequence

from lit_gen.errors import ShardError


class Prefetcher:
    """Fetches shards in the background while others are read; what goes wrong is told by the one who needs them."""

    def __init__(self, fetch: Callable[[int], None]) -> None:
        self._fetch = fetch
        self._wanted: Sequence[int] = ()
        self._tried: set[int] = set()
        self._owner = 0  # process whose thread it is; a forked worker needs its own
        self._running = False
        self._lock = threading.Lock()

    def want(self, numbers: Sequence[int]) -> None:
        """Fetch these next, in this order, and forget earlier wishes."""
        if self._owner != os.getpid():
            self._owner, self._lock, self._tried, self._running = os.getpid(), threading.Lock(), set(), False
        with self._lock:
            self._wanted = [n for n in numbers if n not in self._tried]
            if self._wanted and not self._running:
                self._running = True
                threading.Thread(target=self._run, name="prefetch", daemon=True).start()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._wanted:
                    self._running = False
                    return
                number, self._wanted = self._wanted[0], self._wanted[1:]
                self._tried.add(number)
            with contextlib.suppress(ShardError):
                self._fetch(number)
