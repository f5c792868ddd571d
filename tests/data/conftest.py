"""Sets that tests of data share, here and on a server."""

import threading

import pytest
from servers import Server
from shard_sets import image_set

from lit_gen.data import remote


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_GEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "RETRY_AFTER", (0.01, 0.01, 0.01))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    return image_set(tmp_path / "far" / "grey")


@pytest.fixture
def server(folder, cache):
    server = Server(folder.parent)
    server.released = threading.Event()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()
