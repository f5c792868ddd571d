import numpy as np
import pytest
from PIL import Image
from shard_sets import picture

from lit_gen.data.command import main
from lit_gen.data.decode import encode_video, read_image
from lit_gen.data.pack import pack
from lit_gen.data.shards import ShardSet
from lit_gen.errors import ShardError


@pytest.fixture
def folder(tmp_path):
    """Five pictures of different formats, one in a folder, with captions beside them."""
    folder = tmp_path / "mine"
    (folder / "sub").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b.jpg", "c.webp", "v1.2 final.png", "sub/a.png")):
        file = folder / name
        Image.fromarray(picture(40 * number, 16)).save(file)
        file.with_suffix(".txt").write_text(f"picture {number}\n")
    return folder


def read(out) -> dict[str, str]:
    """Name -> caption."""
    shards = ShardSet.open(out)
    samples = [shards.read(i, {"txt", "png", "jpg", "webp", "mp4", "json"}) for i in range(len(shards))]
    assert all(len(members) == 2 for _, members in samples)
    return {name: members["txt"].decode() for name, members in samples}


def test_packs_a_folder_with_captions_beside_the_pictures(folder, tmp_path, capsys):
    out = tmp_path / "packed"
    assert main(["pack", str(folder), "--out", str(out), "--samples-per-shard", "2"]) == 0
    assert "5 images samples in 3 shards" in capsys.readouterr().out
    assert read(out) == {
        "000000.tar/00000000-a": "picture 0",
        "000000.tar/00000001-b": "picture 1",
        "000001.tar/00000002-c": "picture 2",
        "000001.tar/00000003-sub-a": "picture 4",
        "000002.tar/00000004-v1-2-final": "picture 3",
    }
    shards = ShardSet.open(out)
    assert shards.read(0, {"png"})[1]["png"] == (folder / "a.png").read_bytes()
    assert main(["verify", str(out)]) == 0


def test_packs_videos_with_a_csv(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.mp4").write_bytes(encode_video(np.stack([picture(9 * i, 16)] * 4)))
    table = tmp_path / "captions.csv"
    table.write_text('file_name,text,licence\n0.mp4,"zero, nought",x\n1.mp4,one,x\n2.mp4,two,x\n')
    out = pack(folder, tmp_path / "out", table)
    assert list(read(out).values()) == ["zero, nought", "one", "two"]
    assert ShardSet.open(out).kind == "videos"


def fails(folder, out, expected, captions=None) -> None:
    with pytest.raises(ShardError, match=expected) as caught:
        pack(folder, out, captions)
    assert "\n" not in str(caught.value)
    assert not out.exists() and not list(out.parent.glob(".*"))  # nothing half is left


def test_what_is_wrong_is_said_in_one_line(folder, tmp_path):
    out = tmp_path / "out"
    (folder / "b.txt").unlink()
    fails(folder, out, r"b.jpg has no caption: b.txt is missing beside it \(1 of 5 files\)")
    table = tmp_path / "captions.csv"
    table.write_text("name,words\na.png,x\n")
    fails(folder, out, "needs a header with a column of files", table)
    table.write_text("file,caption\na.png,x\n")
    fails(folder, out, r"has no caption for .*b.jpg \(4 of 5 files\)", table)
    table.write_text("file,caption\nz.png,x\n")
    fails(folder, out, "names .*z.png, which does not exist", table)
    fails(tmp_path / "nowhere", out, "is not a folder")
    (folder / "b.txt").write_text("b")
    (folder / "b.jpg").write_bytes((folder / "b.jpg").read_bytes()[:200])
    fails(folder, out, "1 of 5 files cannot be read, the first is .*b.jpg")
    (folder / "clip.mp4").write_bytes(b"")
    fails(folder, out, "5 images and 1 videos; pack them from separate folders")


def test_rows_of_a_csv_are_held_against_the_files(folder, tmp_path, caplog):
    out, table = tmp_path / "out", tmp_path / "captions.csv"
    rows = "".join(f"{name},x\n" for name in ("b.jpg", "c.webp", "v1.2 final.png", "sub/a.png"))
    table.write_text(f"file,caption\n{rows}a.png,one\n./a.png,two\n")
    fails(folder, out, r"captions.csv:7: ./a.png has a caption already", table)
    table.write_text(f"caption,file\nonly a caption\n{rows}")
    fails(folder, out, r"captions.csv:2: the row names no file", table)
    table.write_bytes("file,caption\na.png,caf\u00e9\n".encode("latin-1"))
    fails(folder, out, r"captions.csv is not a text in UTF-8", table)
    table.write_text(f'file,caption\na.png,"{"long " * 30000}"\n')
    fails(folder, out, r"captions.csv:\d+: field larger", table)
    table.write_text(f"file,caption\n{rows}a.png,a cat, sitting\n")
    fails(folder, out, r"captions.csv:6: the row has more cells than the header", table)
    table.write_text(f"file,caption\n{rows}a.png\n")
    assert pack(folder, out, table) == out
    assert "1 of 5 captions are empty, the first is that of a.png" in caplog.text


def test_files_of_other_formats_are_counted(folder, tmp_path, caplog):
    for name in ("x.gif", "y.gif", "z.bmp", "notes.md"):
        (folder / name).write_bytes(b"")
    pack(folder, tmp_path / "out")
    assert "of formats that are not read: 2 .gif, 1 .bmp" in caplog.text


def test_links_to_folders_are_told(folder, tmp_path, caplog):
    (folder / "more").symlink_to(tmp_path)
    pack(folder, tmp_path / "out")
    assert "links to folders are not followed, e.g." in caplog.text and "more (1)" in caplog.text


@pytest.mark.parametrize("words", ["--samples-per-shard=0", "--samples-per-shard=-5", "--workers=-1"])
def test_numbers_that_make_no_sense(words, folder, tmp_path, capsys):
    assert main(["pack", str(folder), "--out", str(tmp_path / "out"), words]) == 2
    assert f"`{words.partition('=')[0]}` must be at least 1" in capsys.readouterr().err


def test_folders_in_the_place_of_files_and_files_in_that_of_folders(folder, tmp_path, lit_gen, capsys):
    assert lit_gen("data", "pack", str(folder), "--out", str(folder / "a.txt" / "out")) == 2
    assert lit_gen("data", "-c", str(folder)) == 2
    assert lit_gen("data", "-c", str(folder / "a.txt"), "--workers", "-2") == 2
    assert all(line.startswith("error: ") for line in capsys.readouterr().err.splitlines())


def test_a_cut_tar_without_an_index_is_not_called_whole(folder, tmp_path, capsys):
    out = pack(folder, tmp_path / "out")
    shard = out / "000000.tar"
    assert main(["verify", str(shard)]) == 0
    assert "index says" not in capsys.readouterr().out
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    assert main(["verify", str(shard)]) == 2
    assert "000000.tar: it is truncated" in capsys.readouterr().err


def test_a_few_unreadable_files_are_left_out(folder, tmp_path):
    (folder / "b.jpg").write_bytes(b"not a picture")
    out = pack(folder, tmp_path / "out", tolerance=0.5)
    assert "picture 1" not in read(out).values() and len(read(out)) == 4
    data = ShardSet.open(out).read(1, {"webp"})[1]["webp"]
    assert np.asarray(read_image(data)).mean() == pytest.approx(80, abs=3)


def test_an_existing_set_is_not_overwritten(folder, tmp_path):
    out = pack(folder, tmp_path / "out")
    with pytest.raises(ShardError, match="exists already"):
        pack(folder, out)
