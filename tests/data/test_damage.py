"""Damage planted in shards ends in a named replacement or in one line, never in a wrong pair and never in a hang."""

import io
import json
import logging
import os
import random
import tarfile

import numpy as np
import pytest
import torch
from damage import SIZES, edit, epoch, headers, make, numbers, one_line
from PIL import Image
from shard_sets import image_set, picture, video_set

from lit_gen.data import videos
from lit_gen.data.decode import decode, encode_image, encode_video
from lit_gen.data.loader import ShardLoader, collate
from lit_gen.data.order import epoch_order
from lit_gen.data.shards import BadSample, ShardSet
from lit_gen.data.tar import Table, walk
from lit_gen.data.videos import VideoSample
from lit_gen.data.write import write_index, write_tar
from lit_gen.errors import ShardError

# -- tars --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_whole_tars_are_read_as_tarfile_reads_them(layout):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=layout) as tar:
        for i in range(40):
            long = 0 if layout == tarfile.USTAR_FORMAT else 7 * i
            name = f"folder{i}/" + "äx"[i % 2] * (20 + long)
            for member in (tarfile.TarInfo(f"{name}.png"), tarfile.TarInfo(f"{name}.seg.txt")):
                member.size, member.mtime = 97 * i % 1500, 1.5
                tar.addfile(member, io.BytesIO(bytes(member.size)))
            for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
                member = tarfile.TarInfo(f"{name}.{kind.decode()}.txt")
                member.type, member.linkname = kind, "y" * min(long + 1, 150)
                tar.addfile(member)
    with tarfile.open(fileobj=io.BytesIO(stream.getvalue())) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar if m.isreg()]
    problems = []
    assert [(m.name, m.offset, m.size) for m in walk(stream, problems)] == expected
    assert len(expected) == 80 and problems == []


def test_a_damaged_header_costs_its_own_member(folder, caplog):
    """tarfile takes it for the end of the tar, without a word."""
    lost = next(m for m in headers(folder / "000000.tar") if m.name == "000002.png")
    edit(folder / "000000.tar", lambda data: data.__setitem__(lost.offset + 5, 0))
    table = Table.scan(folder / "000000.tar")
    assert len(table.keys) == 7 and table.problem == f"it is damaged at byte {lost.offset}"
    loader = make(f"{folder}/*.tar", tolerance=0.1)
    assert set(epoch(loader)) == set(range(22)) - {2}
    assert list(loader.bad) == ["000000.tar/000002"]
    assert f"000000.tar: it is damaged at byte {lost.offset}; only its whole samples are used" in caplog.text


def test_a_hole_of_zeros_is_not_the_end(folder):
    """What a crashed machine leaves of the last blocks it wrote."""
    at = headers(folder / "000000.tar")[6].offset
    edit(folder / "000000.tar", lambda data: data.__setitem__(slice(at, at + 1536), bytes(1536)))
    assert len(Table.scan(folder / "000000.tar").keys) >= 6


def test_a_header_of_negative_size_ends(tmp_path):
    """tarfile before Python 3.11.14 and 3.12.12 reads such a tar for ever (CVE-2025-8194)."""
    write_tar(tmp_path / "0.tar", ({"__key__": str(i), "txt": b"a caption"} for i in range(3)))
    member = headers(tmp_path / "0.tar")[1]
    header = bytearray((tmp_path / "0.tar").read_bytes()[member.offset : member.offset + 512])
    header[124:136] = b"\xff" * 12
    header[148:156] = b"        "
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    edit(tmp_path / "0.tar", lambda data: data.__setitem__(slice(member.offset, member.offset + 512), header))
    assert Table.scan(tmp_path / "0.tar").keys == ["0", "2"]


def test_a_name_too_long_to_be_true_is_damage(tmp_path):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("x" * 3_000_000 + ".txt"))
        tar.addfile(tarfile.TarInfo("b.txt"))
    problems = []
    assert [m.name for m in walk(stream, problems)][-1] == "b.txt" and "damaged at byte 0" in problems[0]


@pytest.mark.parametrize("seed", range(40))
def test_no_damage_mixes_two_samples(tmp_path, seed):
    """Bytes flipped in headers and pictures, parts cut out, doubled, moved and lost: pairs stay pairs."""
    chance = random.Random(seed)
    folder = image_set(tmp_path / "grey", SIZES)
    for file in sorted(folder.glob("*.tar")):
        members = headers(file)
        # a caption whose own bytes flip is another caption; only the checksum of the index can tell
        borders = [m.offset for m in members]
        blocks = [m.offset + i for m in members for i in range(512)]
        blocks += [m.offset_data + i for m in members if m.name.endswith("png") for i in range(m.size)]
        data = bytearray(file.read_bytes())
        for _ in range(chance.choice([0, 1, 3, 30])):
            data[chance.choice(blocks)] ^= 1 << chance.randrange(8)
        for _ in range(chance.choice([0, 1, 2])):
            start, end = sorted(chance.sample(borders, 2))
            part = data[start:end]
            place = chance.choice(borders)
            match chance.randrange(4):
                case 0:
                    end = start + 512 * chance.randrange(1, 9)
                    data[start:end] = bytes(end - start)
                case 1:
                    data[start:end] = part * 2
                case 2:
                    data[start:end] = b""
                case 3:
                    data[place:place] = part
        if data and chance.random() < 0.3:
            data = data[: chance.randrange(len(data))]
        file.write_bytes(data)
    for source in (folder, f"{folder}/*.tar"):
        try:
            for shuffle in (True, False):
                epoch(make(source, shuffle=shuffle, tolerance=1))
        except ShardError as error:  # everything lost
            assert "\n" not in str(error)


def test_a_missing_member_costs_its_sample(tmp_path):
    (tmp_path / "set").mkdir()
    samples = [{"__key__": f"{i:06d}", "png": encode_image(picture(i)), "txt": b"sample %d" % i} for i in range(8)]
    del samples[2]["txt"], samples[5]["png"]
    write_index(tmp_path / "set", "images", [write_tar(tmp_path / "set/0.tar", samples)], {})
    loader = make(tmp_path / "set", tolerance=1)
    captions = [text for batch in loader for text in batch["caption"]]
    assert {f"sample {i}" for i in range(8)} - set(captions) == {"sample 2", "sample 5"}
    assert loader.bad == {
        "0.tar/000002": "it has none of the members txt",
        "0.tar/000005": "it has none of the members png, jpg, jpeg, webp",
    }


def test_a_shard_that_is_not_the_indexed_one_is_told(folder):
    """Of the right samples in the wrong number none can be trusted; a lost end, on the other hand, is only lost."""
    write_tar(folder / "000001.tar", [{"__key__": "000007", "txt": b"sample 7"}])
    with pytest.raises(ShardError, match="000001.tar has 10240 bytes, not the 20480 of its index; copy it again"):
        ShardSet.open(folder)


def test_an_index_is_held_against_what_an_index_holds(folder):
    whole = json.loads((folder / "index.json").read_text())
    for change in ({"shards": None}, {"shards": [{"file": "0.tar"}]}, {"kind": 3}, {"shards": [{}] * 2}):
        (folder / "index.json").write_text(json.dumps(whole | change))
        with pytest.raises(ShardError, match="lacks what an index holds") as caught:
            ShardSet.open(folder)
        one_line(caught)


# -- during the run ----------------------------------------------------------------------------------------------------


def test_a_shard_that_goes_away_is_one_line(folder):
    loader = make(folder, 22)
    next(iter(loader))
    (folder / "000001.tar").unlink()
    with pytest.raises(ShardError, match="shard .*000001.tar has disappeared") as caught:
        epoch(loader)
    one_line(caught)


def test_a_shard_that_is_replaced_is_never_read_at_the_old_places(folder, tmp_path):
    loader = make(folder, 22)
    next(iter(loader))
    other = image_set(tmp_path / "other", (7, 9))
    os.replace(other / "000001.tar", folder / "000001.tar")
    with pytest.raises(ShardError, match="000001.tar was replaced by another during the run") as caught:
        epoch(loader)
    one_line(caught)


def test_a_shard_that_is_copied_back_is_the_same_shard(folder):
    loader = make(folder, 22)
    next(iter(loader))
    file = folder / "000001.tar"
    file.write_bytes(file.read_bytes())
    os.utime(file, (1, 1))
    assert sorted(epoch(loader)) == list(range(22))


def test_a_shard_cut_off_during_the_run_costs_its_lost_samples(folder):
    loader = make(folder, 22, tolerance=1)
    next(iter(loader))
    os.truncate(folder / "000001.tar", headers(folder / "000001.tar")[6].offset)
    with pytest.raises(ShardError, match="replaced by another") as caught:
        epoch(loader)
    one_line(caught)


# -- members -----------------------------------------------------------------------------------------------------------


def test_grey_of_sixteen_bits_is_not_clipped_to_white():
    buffer = io.BytesIO()
    Image.fromarray(np.array([[0, 1000, 30000, 65535]], np.uint16)).save(buffer, "PNG")
    assert np.asarray(decode("png", buffer.getvalue()))[0, :, 0].tolist() == [0, 3, 117, 255]


def test_a_damaged_video_is_not_made_up_by_the_decoder():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 3)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
    clip = np.stack([np.roll(pixels, i, 1) for i in range(8)])
    whole = encode_video(clip)
    seen = decode("mp4", whole)
    chance = random.Random(0)
    wrong = refused = 0
    for _ in range(150):
        data = bytearray(whole)
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        try:
            found = decode("mp4", bytes(data))
        except BadSample:
            refused += 1
        else:
            wrong += found.shape == seen.shape and not np.array_equal(found, seen)
    assert refused > 40 and wrong <= 3  # video has no checksums: a flipped bit can be valid too


@pytest.mark.parametrize("edit", [lambda d: d[: len(d) // 2], lambda d: b"", lambda d: b"not a video", None])
def test_an_undecodable_video_is_replaced_counted_and_named(tmp_path, edit):
    folder = video_set(tmp_path / "clips", count=5, lost={} if edit else {2: 3})
    if edit:
        members = {f"{i}": ShardSet.open(folder).read(i, {"mp4", "txt"})[1] for i in range(5)}
        members["2"]["mp4"] = edit(members["2"]["mp4"])
        samples = ({"__key__": key} | parts for key, parts in members.items())
        write_index(folder, "videos", [write_tar(folder / "000000.tar", samples)], {})
    loader = ShardLoader(ShardSet.open(folder), VideoSample(frames=8), videos.EXTENSIONS, 5, tolerance=0.2)
    (batch,) = loader
    assert sorted(int(key.split("/")[1]) for key in batch["key"])[:1] == [0]
    assert "000000.tar/2" not in batch["key"] and list(loader.bad) == ["000000.tar/2"]
    seen = (batch["video"][:, 3, 0, 0, 0] + 1) * 127.5 - 24  # nearly lossless
    assert all(abs(float(i) - int(key.split("/")[1])) < 1.5 for i, key in zip(seen, batch["key"], strict=True))


class _Arrays:
    """A picture with an array beside it, as caches have."""

    def __call__(self, sample, rng):
        return {"latent": torch.from_numpy(sample["npy"]), "key": sample["key"]}


def _npy(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def array_set(folder, arrays):
    folder.mkdir()
    samples = ({"__key__": str(i), "npy": _npy(array)} for i, array in enumerate(arrays))
    write_index(folder, "images", [write_tar(folder / "0.tar", samples)], {})
    return ShardSet.open(folder)


def test_an_array_of_objects_is_replaced_and_never_unpickled(tmp_path):
    arrays = [np.full(3, i, np.float32) for i in range(6)]
    arrays[4] = np.array([{}, None], object)
    loader = ShardLoader(array_set(tmp_path / "set", arrays), _Arrays(), {"npy"}, 6, tolerance=0.2)
    (batch,) = loader
    assert list(loader.bad) == ["0.tar/4"] and "allow_pickle" in loader.bad["0.tar/4"]
    assert batch["latent"][:, 0].tolist() == [float(key.split("/")[1]) for key in batch["key"]]


@pytest.mark.parametrize(
    "odd, told",
    [
        (np.zeros(3, np.float64), "the type of latent: torch.float32 (0.tar/"),
        (np.zeros(4, np.float32), "the shape of latent: (3,) (0.tar/"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_arrays_of_another_type_or_shape_are_one_line_that_names_both(tmp_path, odd, told, workers):
    arrays = [np.zeros(3, np.float32)] * 4 + [odd]
    loader = ShardLoader(array_set(tmp_path / "set", arrays), _Arrays(), {"npy"}, 5, shuffle=False, workers=workers)
    with pytest.raises(ShardError) as caught:
        next(iter(loader))
    assert told in one_line(caught) and "(0.tar/4)" in one_line(caught)


def test_samples_of_different_contents_are_one_line():
    with pytest.raises(ShardError, match=r"differ in contents: \['key', 'x'\] \(a\), \['key', 'x', 'y'\] \(b\)"):
        collate([{"key": "a", "x": 1}, {"key": "b", "x": 1, "y": 2}])


# -- sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [0, 1, 3])
@pytest.mark.parametrize("sizes, world, workers", [((22,), 4, 2), ((1, 20, 1), 3, 2), ((3, 2), 4, 3), ((1,), 2, 2)])
def test_fewer_shards_than_readers_and_unequal_ones_give_each_sample_once(tmp_path, sizes, world, workers, window):
    folder = image_set(tmp_path / "grey", sizes)
    total = sum(sizes)
    loaders = [make(folder, 1, rank=r, world=world, workers=workers, window=window) for r in range(world)]
    assert len({len(loader) for loader in loaders}) == 1
    passes = -(-total // len(loaders[0]) // 1)
    batches = [[b for _ in range(passes) for b in loader] for loader in loaders]
    stream = [i for step in zip(*batches, strict=True) for batch in step for i in numbers(batch)]
    for start in range(0, len(stream) - total + 1, total):
        assert sorted(stream[start : start + total]) == list(range(total))
    assert len(stream) >= total


@pytest.mark.parametrize("window", [1, 2, 3, 4, 9])
def test_a_window_mixes_only_so_many_shards(window):
    sizes = np.array(SIZES, np.int64)
    order = epoch_order(3, 1, sizes.tobytes(), window, True)
    assert sorted(order.samples.tolist()) == list(range(22))
    shards = np.searchsorted(np.cumsum(sizes), order.samples, side="right")
    groups = [sorted(set(shards.tolist()), key=shards.tolist().index)[i : i + window] for i in range(0, 4, window)]
    start = 0
    for group in groups:
        end = start + sum(SIZES[s] for s in group)
        assert set(shards[start:end].tolist()) == set(group)
        start = end
    upcoming = order.shards_after(1, 4)
    assert upcoming == [s for g in groups for s in g][1:]
    assert epoch_order(3, 2, sizes.tobytes(), window, True).samples.tolist() != order.samples.tolist()


@pytest.mark.parametrize("stop", [0, 5, 11, 17])
def test_a_window_resumes_exactly(folder, stop):
    def take(loader, count):
        found = []
        while len(found) < count:
            for batch in loader:
                found.append(numbers(batch))
                if len(found) == count:
                    break
        return found

    straight = take(make(folder, window=2), 24)
    first = make(folder, window=2)
    take(first, stop)
    second = make(folder)  # another default: the checkpoint's counts
    second.load_state_dict(first.state_dict())
    assert take(second, 24 - stop) == straight[stop:]


def test_an_evaluation_survives_a_shard_that_is_lost_nearly_whole(tmp_path):
    """Neighbours are lost together, and more of them than may be unreadable in a row."""
    folder = image_set(tmp_path / "grey", (130, 110))
    os.truncate(folder / "000000.tar", headers(folder / "000000.tar")[6].offset)
    loader = make(folder, 16, shuffle=False, tolerance=0.6)
    valid = [int(b["key"][i].split("/")[1]) for b in loader for i in range(16) if b["valid"][i]]
    assert valid == [0, 1, *range(130, 240)] and len(loader.bad) == 128


def test_names_in_the_log_do_not_flood_it(tmp_path, caplog):
    folder = image_set(tmp_path / "grey", (140, 100))
    os.truncate(folder / "000000.tar", headers(folder / "000000.tar")[3].offset)
    loader = make(folder, 10, tolerance=1)
    with caplog.at_level(logging.WARNING, logger="lit_gen"):
        epoch(loader)
    assert len(loader.bad) == 139
    assert sum("cannot be read and was replaced" in r.getMessage() for r in caplog.records) == 100
