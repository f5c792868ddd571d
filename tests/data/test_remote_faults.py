"""Servers, commands and disks that misbehave end in another attempt or in one line."""

import errno
import json
import multiprocessing
import os
import resource
import time

import pytest
from damage import make, one_line

from lit_gen.data import remote
from lit_gen.data.shards import ShardSet
from lit_gen.errors import ShardError

pytestmark = pytest.mark.usefixtures("cache")


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("manner, faults", [("drop", 3), ("busy", 3), ("longer", 2), ("flip", 2), ("shorter", 2)])
def test_a_server_that_recovers_costs_nothing(server, manner, faults, ranges):
    server.manner, server.faults, server.ranges = manner, faults, ranges
    shards = ShardSet.open(f"{server.url}/grey")
    assert shards.read(0, {"txt"})[1] == {"txt": b"sample 0"}
    assert shards.verify() == []
    assert server.fetched("000000.tar") > 1


def test_a_connection_that_always_breaks_still_gets_there_in_parts(server):
    server.manner = "drop"  # after 4 kB each time
    shards = ShardSet.open(f"{server.url}/grey")
    assert shards.verify() == []
    assert server.fetched("000000.tar") == -(-shards.shards[0].bytes // 4096)


@pytest.mark.parametrize(
    "manner, told",
    [
        ("drop", "the connection ended after 4096 of"),  # and it cannot go on in the middle
        ("longer", "the connection ended after"),
        ("shorter", "bytes, not"),
        ("flip", "its checksum is not that of the index"),
        ("page", "it has 27 bytes, not"),
        ("busy", "HTTP 503 Service Unavailable (4 times in a row)"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_server_that_does_not_recover_is_one_line_with_the_shard(server, manner, told, workers):
    server.manner, server.ranges = manner, False
    with pytest.raises(ShardError) as caught:
        next(iter(make(f"{server.url}/grey", workers=workers)))
    assert told in one_line(caught) and f"{server.url}/grey/00000" in one_line(caught)


@pytest.mark.parametrize(
    "manner, told",
    [
        ("cut", "the transfer did not say how long it would be, twice"),
        ("drop", "the connection ended after 4096 of"),
        ("page", "it is no tar but begins with b'<html>please sign in</html>'"),
    ],
)
def test_without_an_index_a_lost_end_is_noticed_too(server, manner, told):
    server.manner, server.ranges = manner, False
    with pytest.raises(ShardError) as caught:
        ShardSet.open(f"{server.url}/grey/000000.tar")
    assert told in one_line(caught) and "000000.tar" in one_line(caught)


def test_without_a_length_a_whole_tar_is_whole(server):
    server.manner = "unsaid"
    assert len(ShardSet.open(f"{server.url}/grey/000000.tar")) == 7


def test_a_missing_shard_is_asked_for_once(server, folder):
    (folder / "000002.tar").unlink()
    shards = ShardSet.open(f"{server.url}/grey")
    with pytest.raises(ShardError, match="000002.tar: HTTP 404"):
        shards.read(13, {"txt"})
    assert server.fetched("000002.tar") == 1
    with pytest.raises(ShardError, match="nothing/index.json: HTTP 404"):
        ShardSet.open(f"{server.url}/nothing")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stalled_server_ends_in_time_and_is_named(server, workers):
    server.manner = "stall"
    start = time.monotonic()
    with pytest.raises(ShardError) as caught:
        next(iter(make(f"{server.url}/grey", workers=workers, stall_seconds=1)))
    assert 0.9 < time.monotonic() - start < 15
    assert f"{server.url}/grey/00000" in one_line(caught) and "1 s" in one_line(caught)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_slow_server_is_not_a_stalled_one(server, workers):
    server.manner, server.pause = "slow", 0.07
    start = time.monotonic()
    next(iter(make(f"{server.url}/grey", 1, window=1, workers=workers, stall_seconds=1)))
    assert time.monotonic() - start > 1.2  # or the test would prove nothing


def test_no_server_at_all():
    with pytest.raises(ShardError) as caught:
        ShardSet.open("http://127.0.0.1:9/grey")
    assert "Connection refused (4 times in a row)" in one_line(caught)


@pytest.mark.parametrize(
    "index, told",
    [
        ("<html>", "is not an index: it begins with b'<html>'"),
        ("[]", "lacks what an index holds"),
        ('{"format": 2}', "has format 2, this version reads format 1"),
        ('{"format": 1, "shards": []}', "lacks what an index holds (KeyError('fingerprint'))"),
    ],
)
def test_what_is_no_index_is_told(server, folder, index, told):
    (folder / "index.json").write_text(index)
    with pytest.raises(ShardError) as caught:
        ShardSet.open(f"{server.url}/grey")
    assert told in one_line(caught)


@pytest.mark.parametrize("name", ["../../canary.tar", "/tmp/canary.tar", "..", "a/b.tar", "pipe:touch canary"])
def test_an_index_cannot_lead_out_of_its_folder(server, folder, cache, name):
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0]["file"] = name
    (folder / "index.json").write_text(json.dumps(index))
    (folder.parents[0] / "canary.tar").write_bytes(b"")
    for source in (f"{server.url}/grey", folder):
        if name == "pipe:touch canary" and source != folder:
            with pytest.raises(ShardError, match="HTTP 404"):  # a file's name, nothing more
                ShardSet.open(source).read(0, {"txt"})
            continue
        with pytest.raises(ShardError):
            ShardSet.open(source).read(0, {"txt"})
    assert not list(cache.parent.rglob("cache*/**/canary*")) and not os.path.exists("canary")


def test_a_throttled_pipe_is_slow_and_nothing_else(folder):
    drip = f"pipe:python3 -c \"import sys,time; d=open('{folder}/000000.tar','rb').read(); "
    drip += (
        '[(sys.stdout.buffer.write(d[i:i+2048]), sys.stdout.flush(), time.sleep(.02)) for i in range(0,len(d),2048)]"'
    )
    assert len(ShardSet.open(drip)) == 7


@pytest.mark.parametrize(
    "command, told",
    [
        ("cat {folder}/nothing.tar", "the command ended with status 1: cat: {folder}/nothing.tar: No such file"),
        ("head -c 5000 {folder}/000000.tar", "its end is missing after 5000 bytes"),
        ("cat {folder}/000000.tar; exit 3", "the command ended with status 3"),
        ("no-such-program", "not found"),
        ("true", "it is empty"),
    ],
)
def test_a_pipe_that_fails_is_one_line(folder, cache, command, told):
    with pytest.raises(ShardError) as caught:
        ShardSet.open("pipe:" + command.format(folder=folder))
    assert told.format(folder=folder) in one_line(caught) and command.format(folder=folder) in one_line(caught)
    assert not list(cache.rglob("*.tar*"))


def test_a_pipe_that_stalls_is_ended(folder, tmp_path):
    start = time.monotonic()
    with pytest.raises(ShardError, match="no data for 0.5 s; its server or command has stalled"):
        remote.fetch(
            f"pipe:head -c 100 {folder}/000000.tar; echo $$ > {tmp_path}/pid; sleep 1000",
            tmp_path / "x",
            stall_seconds=0.5,
        )
    assert time.monotonic() - start < 15
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_cache_that_cannot_be_written_is_one_line(server, cache):
    cache.write_text("a file, not a folder")
    with pytest.raises(ShardError, match="name a folder that can be written with LIT_GEN_CACHE") as caught:
        ShardSet.open(f"{server.url}/grey/000000.tar")
    one_line(caught)


def _fetch_onto_small_disk(url: str, results) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))  # the kernel refuses to write further, as a full disk does
    try:
        ShardSet.open(url)
    except ShardError as error:
        results.put(str(error))


def test_a_disk_that_takes_no_more_is_one_line_and_leaves_nothing(server, cache, monkeypatch):
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    process = fork.Process(target=_fetch_onto_small_disk, args=(f"{server.url}/grey/000000.tar", results))
    process.start()
    message = results.get(timeout=20)
    process.join()
    assert os.strerror(errno.EFBIG) in message and "LIT_GEN_CACHE" in message and "000000.tar" in message
    assert not list(cache.rglob("*.tar*"))
    assert server.fetched(".tar") == 1  # asking the server again would not help
