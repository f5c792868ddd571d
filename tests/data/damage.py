"""What the tests of damaged and stalled sets share."""

import tarfile

from lit_gen.data import images
from lit_gen.data.images import ImageSample
from lit_gen.data.loader import ShardLoader
from lit_gen.data.shards import ShardSet

SIZES = (7, 5, 6, 4)  # samples in the shards of `folder`


def make(source, batch_size=2, transform=None, **options) -> ShardLoader:
    return ShardLoader(ShardSet.open(source), transform or ImageSample(), images.EXTENSIONS, batch_size, **options)


def numbers(batch) -> list[int]:
    """Which samples a batch holds; picture, caption, name, and facts where there are any, must agree."""
    seen = ((batch["image"][:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
    assert batch["caption"] == [f"sample {i}" for i in seen]
    assert all(f in ({}, {"i": i}) for f, i in zip(batch["facts"], seen, strict=True))
    assert [int(key.split("/")[1]) for key in batch["key"]] == seen
    return seen


def epoch(loader) -> list[int]:
    return [i for batch in loader for i in numbers(batch)]


def one_line(caught) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(file, change) -> None:
    data = bytearray(file.read_bytes())
    file.write_bytes(change(data) or data)


def headers(file) -> list[tarfile.TarInfo]:
    with tarfile.open(file) as tar:
        return list(tar)
