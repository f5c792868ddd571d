import contextlib
import errno
import gc
import gzip
import io
import json
import pickle
import sys
import tarfile

import pytest
import webdataset
from shard_sets import image_set

from lit_gen.data.decode import decode
from lit_gen.data.sets import SetFile
from lit_gen.data.shards import BadSample, ShardSet
from lit_gen.data.tar import Table
from lit_gen.data.write import write_tar
from lit_gen.errors import ShardError

EVERYTHING = {"png", "txt", "json"}


@pytest.fixture
def folder(tmp_path):
    return image_set(tmp_path / "grey")


def error_of(source) -> str:
    with pytest.raises(ShardError) as caught:
        ShardSet.open(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_any_sample_can_be_read_in_any_order(folder):
    shards = ShardSet.open(folder)
    assert len(shards) == 22 and shards.kind == "images"
    for index in (21, 0, 7, 6, 12):
        name, members = shards.read(index, EVERYTHING)
        assert members["txt"] == f"sample {index}".encode() and json.loads(members["json"]) == {"i": index}
        assert name.endswith(f"{index:06d}") and members.keys() == EVERYTHING


def test_webdataset_reads_our_shards(folder):
    urls = [str(s.file) for s in ShardSet.open(folder).shards]
    texts = [sample["txt"].decode() for sample in webdataset.WebDataset(urls, shardshuffle=False)]
    assert texts == [f"sample {i}" for i in range(22)]


@pytest.mark.parametrize("pattern", ["{000000..000003}.tar", "*.tar", "{000000,000001,000002,000003}.tar"])
def test_patterns_need_no_index(folder, pattern):
    (folder / "index.json").unlink()
    shards = ShardSet.open(f"{folder}/{pattern}")
    assert [s.samples for s in shards.shards] == [7, 5, 6, 4]
    assert shards.read(13, {"txt"})[1] == {"txt": b"sample 13"}


def test_missing_things_are_named_in_one_line(folder, tmp_path):
    assert error_of(tmp_path / "gray") == f"{tmp_path}/gray does not exist; did you mean {folder}?"
    assert error_of(tmp_path).startswith(f"{tmp_path} has no index.json")
    assert "set file nothing.yaml does not exist" in error_of("nothing.yaml")
    assert "no shard matches" in error_of(f"{tmp_path}/none*.tar")
    assert "000009.tar does not exist" in error_of(f"{folder}/{{000003,000009}}.tar")
    (folder / "000002.tar").unlink()
    assert f"shard {folder}/000002.tar is missing (1 of 4 are)" in error_of(folder)


def test_an_empty_shard_is_named_and_left_out(folder, caplog):
    write_tar(folder / "000004.tar", [])
    (folder / "000005.tar").touch()
    shards = ShardSet.open(f"{folder}/*.tar")
    assert len(shards) == 22 and len(shards.shards) == 4
    assert f"shard {folder}/000004.tar holds no samples, it is left out" in caplog.text
    assert f"shard {folder}/000005.tar holds no samples, it is left out" in caplog.text
    assert error_of(f"{folder}/00000[45].tar").endswith("000004.tar holds no samples")


def test_what_is_no_tar_is_told_apart(folder):
    (folder / "page.tar").write_text("<!DOCTYPE html><title>Sign in</title>")
    assert "it is no tar but begins with b'<!DOCTYPE html>" in error_of(folder / "page.tar")
    (folder / "zipped.tar").write_bytes(gzip.compress((folder / "000000.tar").read_bytes()))
    assert "it is compressed, which does not allow reading at random places" in error_of(folder / "zipped.tar")


def test_verify_names_a_changed_shard(folder):
    assert ShardSet.open(folder).verify() == []
    file = folder / "000001.tar"
    data = bytearray(file.read_bytes())
    data[700] ^= 1
    file.write_bytes(data)
    assert ShardSet.open(folder).verify() == [f"{file} does not match its checksum"]


def test_samples_of_the_same_name_are_never_mixed(tmp_path):
    file = tmp_path / "twice.tar"
    with tarfile.open(file, "w") as tar:
        for name, data in (("a.png", b"1"), ("a.txt", b"one"), ("a.png", b"2"), ("b.txt", b"x"), ("a.txt", b"two")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    shards = ShardSet.open(str(file))
    found = [shards.read(i, EVERYTHING)[1] for i in range(len(shards))]
    # the second caption may belong to a third picture that got lost, so it is given to none
    assert found == [{"png": b"1", "txt": b"one"}, {"png": b"2"}, {"txt": b"x"}, {"txt": b"two"}]


def test_scan_reads_long_names_and_folders(tmp_path):
    file = tmp_path / "long.tar"
    name = "folder/" + "x" * 150
    with tarfile.open(file, "w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo(name + ".txt")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"abc"))
    assert Table.scan(file).keys == [name]
    assert ShardSet.open(str(file)).read(0, {"txt"})[1] == {"txt": b"abc"}


def test_nothing_is_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    bomb = pickle.dumps(Bomb())
    for extension in ("pyd", "pickle", "pkl", "pth", "pt", "npy", "json", "safetensors", "png", "mp4"):
        with pytest.raises(BadSample):
            decode(extension, bomb)
    assert not (tmp_path / "exploded").exists()


SET = {"kind": "images", "recipe": "photo", "split": "val", "count": 4}


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"cout": 3}, "unknown key 'cout'; did you mean 'count'?"),
        ({"count": "many"}, "count must be int, not 'many'"),
        ({"count": 0}, "count must be positive"),
        ({"split": "valid"}, "split must be one of train, val, test, not 'valid'"),
        ({"captions": {"levle": "full"}}, "captions: unknown key 'levle'; did you mean 'level'?"),
        ({"count": None}, "count must be int"),
    ],
)
def test_a_mistake_in_a_set_file_is_one_line(tmp_path, change, expected):
    file = tmp_path / "set.yaml"
    file.write_text(json.dumps(SET | change))
    message = error_of(file)
    assert message.startswith(str(file)) and expected in message


def test_a_missing_key_is_named(tmp_path):
    file = tmp_path / "set.yaml"
    file.write_text("kind: images\nrecipe: photo\nsplit: val\n")
    assert "count is missing" in error_of(file)


def test_the_set_files_of_the_project_are_valid():
    from pathlib import Path

    files = sorted((Path(__file__).parents[2] / "data").glob("*.yaml"))
    sets = {file.stem: SetFile.read(file) for file in files}
    assert {"styled-images", "photo-images", "motion-videos"} <= sets.keys()
    assert sets["styled-images-heldout"].split == "test"
    assert all(file.read_text().startswith("# ") for file in files)


def test_an_index_that_cannot_be_true_is_one_line(folder):
    index = json.loads((folder / "index.json").read_text())
    for samples in (-5, 10**13, 10**20, float("inf")):
        index["shards"][0]["samples"] = samples
        (folder / "index.json").write_text(json.dumps(index))
        assert "index.json" in error_of(folder)
    (folder / "index.json").write_text("[" * 100_000)
    assert "is not valid JSON" in error_of(folder)


def test_verify_counts_samples(folder):
    index = json.loads((folder / "index.json").read_text())
    index["shards"][1]["samples"] += 1
    (folder / "index.json").write_text(json.dumps(index))
    assert ShardSet.open(folder).verify() == [f"{folder}/000001.tar holds 5 samples, and the index says 6"]


def test_a_shard_that_may_not_be_read_is_one_line(folder, monkeypatch):
    def scan(file, progress=None):
        raise PermissionError(errno.EACCES, "Permission denied", str(file))

    shards = ShardSet.open(folder)
    monkeypatch.setattr(Table, "scan", scan)
    with pytest.raises(BadSample, match="000000.tar: Permission denied"):
        shards.read(0, EVERYTHING)
    assert error_of(f"{folder}/000000.tar") == f"{folder}/000000.tar: Permission denied"


def test_the_advice_for_a_folder_with_magic_in_its_name_works(tmp_path):
    folder = image_set(tmp_path / "sp ace é [1] {a,b}")
    (folder / "index.json").unlink()
    pattern = error_of(folder).split("'")[1]
    assert len(ShardSet.open(pattern)) == 22


def test_what_cannot_be_packed_leaves_no_other_complaint(tmp_path, monkeypatch):
    def samples():
        yield {"__key__": "a", "txt": b"a"}
        raise ShardError("cannot be read")

    complaints = []
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)
    with contextlib.suppress(ShardError):
        write_tar(tmp_path / "000000.tar", samples())
    gc.collect()  # a writer that is still open would complain now
    assert not complaints and not (tmp_path / "000000.tar").exists()
