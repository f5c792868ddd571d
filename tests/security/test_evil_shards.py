"""Set files and shards from strangers: nothing in them runs, and they reach nothing outside of themselves."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import av
import numpy as np
import pytest
from security.evil import CANARY, Evil, link, npy, picture, tar, torch_file

from lit_gen.errors import ShardError, UserError

SET = "kind: images\nrecipe: base\nsplit: train\ncount: 2\nsize: 16\n"


@pytest.mark.parametrize("name", ["../../precious", "..", "/tmp/precious", ".", "a/b", "[a]", "''"])
def test_a_set_file_replaces_only_its_own_folder(name: str, here: Path) -> None:
    from lit_gen.data.build import build

    (here / "precious").mkdir()
    (here / "precious" / "thesis.txt").write_text("years of work")
    (here / "data").mkdir()
    (here / "data" / "x.yaml").write_text(f"{SET}name: {name}\n")
    with pytest.raises(ShardError, match="plain name of a folder"):
        build(here / "data" / "x.yaml")
    assert (here / "precious" / "thesis.txt").read_text() == "years of work"


def test_a_set_file_with_a_tag(here: Path) -> None:
    from lit_gen.data.sets import SetFile

    (here / "x.yaml").write_text(SET + "seed: !!python/object/apply:os.system [touch canary]\n")
    with pytest.raises(ShardError, match="not valid YAML"):
        SetFile.read("x.yaml")


def read_all(source: str | Path) -> list[dict]:
    from lit_gen.data.images import EXTENSIONS, ImageSample
    from lit_gen.data.loader import ShardLoader
    from lit_gen.data.shards import ShardSet

    shards = ShardSet.open(source)
    return list(ShardLoader(shards, ImageSample(), EXTENSIONS, 1, shuffle=False, tolerance=1.0))


def test_members_that_carry_code_are_not_touched(here: Path) -> None:
    evil = pickle.dumps(Evil())
    planted = {f"a.{e}": evil for e in ("pyd", "pickle", "pkl", "dill", "py", "so", "sh", "cls")}
    planted |= {"a.pt": torch_file(Evil()), "a.pth": torch_file(Evil()), "a.npy": npy(Evil()), "a.npz": npy(Evil())}
    tar(here / "x.tar", {"a.png": picture(), "a.txt": b"a", **planted})
    (batch,) = read_all(here / "x.tar")
    assert batch["caption"] == ["a"] and bool(batch["valid"].all())


@pytest.mark.parametrize("extension", ["pyd", "pickle", "pt", "pth", "npy", "npz", "safetensors"])
def test_decoders_never_unpickle(extension: str) -> None:
    from lit_gen.data.decode import decode
    from lit_gen.data.shards import BadSample

    for data in (pickle.dumps(Evil()), torch_file(Evil()), npy(Evil())):
        with pytest.raises(BadSample):
            decode(extension, data)


def test_a_shard_leads_nowhere_else(here: Path) -> None:
    (here / "secret.txt").write_text("secret")
    where = str(here / CANARY)
    tar(
        here / "x.tar",
        {
            "a.png": picture(),
            "a.txt": b"a",
            f"../{CANARY}.png": picture(),  # names are only names: nothing is ever extracted
            f"../{CANARY}.txt": b"b",
            where: b"",
            "c.png": picture(),
            "c.txt": link(tarfile.SYMTYPE, "secret.txt"),
            "d.png": picture(),
            "d.txt": link(tarfile.LNKTYPE, "secret.txt"),
            "e.txt": link(tarfile.FIFOTYPE, ""),
        },
    )
    captions = [batch["caption"][0] for batch in read_all(here / "x.tar") if bool(batch["valid"].all())]
    assert captions == ["a", "b"]
    assert not (here.parent / CANARY).exists() and not (here.parent / f"{CANARY}.png").exists()


def test_a_picture_that_is_a_program(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow has Ghostscript run what is EPS, whatever its name."""
    from lit_gen.data.decode import decode
    from lit_gen.data.images import read_picture
    from lit_gen.data.shards import BadSample

    (here / "gs").write_text(f"#!/bin/sh\ntouch {here / CANARY}\n")
    (here / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(here), prepend=os.pathsep)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None, raising=False)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(BadSample):
        decode("png", eps)
    (here / "style.png").write_bytes(eps)
    with pytest.raises(UserError, match="not a picture"):
        read_picture(here / "style.png", 8)


def test_a_clip_that_is_a_playlist(here: Path) -> None:
    """FFmpeg opens the files that a list names, whatever the list's own name."""
    from lit_gen.data.decode import decode, encode_video
    from lit_gen.data.shards import BadSample

    (here / "private.mp4").write_bytes(encode_video(np.zeros((2, 16, 16, 3), np.uint8)))
    script = b"ffconcat version 1.0\nfile private.mp4\n"
    with av.open(io.BytesIO(script)) as container:
        assert container.streams.video  # the attack works without the guard
    playlist = b"#EXTM3U\n#EXTINF:1,\nfile:private.mp4\n#EXT-X-ENDLIST\n"
    for data in (script, playlist):
        with pytest.raises(BadSample):
            decode("mp4", data)


@pytest.mark.parametrize(
    "file", ["../secret.tar", "/etc/passwd", "pipe:touch canary", "http://127.0.0.1:9/x.tar", "a/../../x.tar", "..", ""]
)
def test_an_index_names_only_its_own_shards(file: str, here: Path) -> None:
    from lit_gen.data.shards import ShardSet
    from lit_gen.data.write import write_index, write_tar

    (here / "set").mkdir()
    shard = write_tar(here / "set" / "0.tar", [{"__key__": "a", "png": picture(), "txt": b"a"}])
    shutil.copy(here / "set" / "0.tar", here / "secret.tar")
    write_index(here / "set", "images", [shard], {})
    index = json.loads((here / "set" / "index.json").read_text())
    index["shards"][0]["file"] = file
    (here / "set" / "index.json").write_text(json.dumps(index))
    with pytest.raises(ShardError):
        ShardSet.open(here / "set").read(0, {"txt"})
