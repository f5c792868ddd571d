"""Sets that are named by URL or pipe: fetched once, checked, and read like any other."""

import multiprocessing
import time

import pytest
from damage import SIZES, epoch, make, one_line
from shard_sets import image_set

from lit_gen.data.shards import ShardSet
from lit_gen.errors import ShardError

# -- ways to name a set ------------------------------------------------------------------------------------------------

pytestmark = pytest.mark.usefixtures("cache")


@pytest.mark.parametrize("name", ["grey", "grey/", "grey/index.json", "grey?token=1", "grey/index.json?token=1"])
def test_a_folder_on_a_server_is_read_by_its_index(server, folder, name):
    shards = ShardSet.open(f"{server.url}/{name}")
    assert server.fetched(".tar") + server.fetched(".tar?token=1") == 0  # only when they are needed
    assert len(shards) == 22 and shards.kind == "images"
    assert shards.fingerprint == ShardSet.open(folder).fingerprint
    assert shards.read(8, {"txt"}) == ("000001.tar/000008", {"txt": b"sample 8"})
    assert server.fetched(".tar") + server.fetched(".tar?token=1") == 1


@pytest.mark.parametrize("pattern", ["{000000..000003}.tar", "{000000,000001,000002,000003}.tar?key=a%20b"])
def test_a_brace_pattern_on_a_server_is_fetched_once_to_be_counted(server, pattern):
    for _ in range(2):
        shards = ShardSet.open(f"{server.url}/grey/{pattern}")
        assert [s.samples for s in shards.shards] == list(SIZES) and shards.kind == ""
    assert len(server.asked) == 4
    assert shards.read(13, {"txt"}) == ("000002.tar/000013", {"txt": b"sample 13"})


def test_one_tar_on_a_server(server):
    assert len(ShardSet.open(f"{server.url}/grey/000002.tar")) == 6


def test_pipes(folder):
    shards = ShardSet.open(f"pipe:cat '{folder}/{{000000..000003}}.tar' | cat")
    assert [s.samples for s in shards.shards] == list(SIZES)
    assert shards.read(8, {"txt"}) == ("000001.tar/000008", {"txt": b"sample 8"})


@pytest.mark.parametrize("scheme, told", [("s3", "pipe:aws s3 cp 's3://b/0.tar' -"), ("gs", "pipe:gsutil cat")])
def test_other_schemes_are_told_as_pipes(scheme, told):
    with pytest.raises(ShardError) as caught:
        ShardSet.open(f"{scheme}://b/0.tar")
    assert told in one_line(caught)


def test_a_server_cannot_be_globbed(server):
    with pytest.raises(ShardError, match="files of a server cannot be listed"):
        ShardSet.open(f"{server.url}/grey/*.tar")


def test_the_same_set_has_one_order_here_and_there(server, folder):
    far = make(f"{server.url}/grey", window=0)
    near = make(folder)
    assert epoch(far) == epoch(near)
    state = far.state_dict()
    near.load_state_dict(state)
    assert epoch(far) == epoch(near)


# -- fetching ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_set_streams_while_it_is_fetched(server, workers):
    loader = make(f"{server.url}/grey", workers=workers, window=1, batch_size=1)
    assert sorted(epoch(loader)) == list(range(22))
    assert all(server.fetched(f"{i:06d}.tar") == 1 for i in range(4))  # by whichever process was first


def test_a_window_needs_few_shards_to_begin(server):
    server.manner = "slow"
    loader = make(f"{server.url}/grey", window=1)
    batch = next(iter(loader))
    assert server.fetched(".tar") <= 2  # the one that is read and the one after it
    assert len({key.split("/")[0] for key in batch["key"]}) == 1


def test_the_next_shards_are_fetched_in_the_background(server):
    loader = make(f"{server.url}/grey", window=2)
    next(iter(loader))
    limit = time.monotonic() + 5
    while server.fetched(".tar") < 4 and time.monotonic() < limit:
        time.sleep(0.01)
    assert server.fetched(".tar") == 4


def test_another_run_fetches_nothing(server):
    for _ in range(2):
        assert sorted(epoch(make(f"{server.url}/grey", 11))) == list(range(22))
    assert server.fetched(".tar") == 4 and server.fetched("index.json") == 2


def test_a_server_that_is_gone_is_not_needed_for_what_is_here(server, caplog):
    epoch(make(f"{server.url}/grey", 11))
    server.shutdown()
    server.server_close()
    assert sorted(epoch(make(f"{server.url}/grey", 11))) == list(range(22))
    assert "the index of an earlier run is used" in caplog.text


def test_a_cached_shard_of_another_size_or_gone_is_fetched_again(server, cache):
    shards = ShardSet.open(f"{server.url}/grey")
    for i in range(22):
        shards.read(i, {"txt"})
    shards.shards[0].file.write_bytes(b"half")
    shards.shards[1].file.unlink()
    assert shards.read(8, {"txt"})[1] == {"txt": b"sample 8"}
    assert ShardSet.open(f"{server.url}/grey").read(0, {"txt"})[1] == {"txt": b"sample 0"}
    assert server.fetched(".tar") == 6


def test_a_changed_set_does_not_mix_with_the_old_one(server, folder, tmp_path):
    ShardSet.open(f"{server.url}/grey").read(0, {"txt"})
    old = folder.rename(tmp_path / "old")
    image_set(folder, (6, 6, 6, 4))
    shards = ShardSet.open(f"{server.url}/grey")
    assert shards.fingerprint != ShardSet.open(old).fingerprint
    assert [shards.read(i, {"txt"})[1]["txt"] for i in (0, 6)] == [b"sample 0", b"sample 6"]


def _read_all(url: str, results) -> None:
    shards = ShardSet.open(url)
    results.put([shards.read(i, {"txt"})[1]["txt"] for i in range(len(shards))])


def test_processes_of_one_machine_fetch_a_shard_once(server):
    server.manner = "slow"
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    processes = [fork.Process(target=_read_all, args=(f"{server.url}/grey", results)) for _ in range(4)]
    for process in processes:
        process.start()
    found = [results.get(timeout=30) for _ in processes]
    for process in processes:
        process.join()
    assert found == [[f"sample {i}".encode() for i in range(22)]] * 4
    assert server.fetched(".tar") == 4


def test_what_a_killed_process_left_is_fetched_again(server, cache):
    server.manner = "stall"
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=_read_all, args=(f"{server.url}/grey", fork.Queue()))
    process.start()
    while not list(cache.rglob("*.partial")) or not list(cache.rglob("*.partial"))[0].stat().st_size:
        time.sleep(0.01)
    process.kill()
    process.join()
    server.manner = "honest"
    assert ShardSet.open(f"{server.url}/grey").read(0, {"txt"})[1] == {"txt": b"sample 0"}
    assert not list(cache.rglob("*.partial"))


def test_verify_fetches_and_compares(server):
    shards = ShardSet.open(f"{server.url}/grey")
    assert shards.verify() == []
    file = shards.shards[1].file
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert shards.verify() == [f"{file} does not match its checksum"]


@pytest.mark.parametrize("url", ["http://[::1/a", "http:///a.tar", "http://x:99999/a.tar"])
def test_what_is_no_url_is_one_line(url):
    with pytest.raises(ShardError, match="is not a URL"):
        ShardSet.open(url)


def test_urls_may_hold_spaces_and_other_letters(server, folder):
    (folder.parent / "sp ace é").symlink_to(folder)
    assert len(ShardSet.open(f"{server.url}/sp ace é".replace("/grey/", "/"))) == 22
