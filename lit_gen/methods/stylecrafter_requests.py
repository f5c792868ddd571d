"""What `predict` is asked for: prompts, and references from picture files, folders and tables."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_gen.callbacks.samples import contact_sheet
from lit_gen.data.images import read_picture
from lit_gen.errors import UserError

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TOGETHER = ";"  # between the pictures of one style
ROWS = 12  # styles on a contact sheet
COLUMNS = ("prompt", "style")


@dataclass
class Request:
    """Prompts to be drawn in one style.

    Args:
        name: of the style, and the beginning of its files' names.
        references: its pictures, N 3 s s in [-1, 1].
        prompts: by their number among all prompts of the command.
    """

    name: str
    references: Tensor
    prompts: dict[int, str]


def read_requests(prompts: Sequence[str], styles: Sequence[str], pairs: str | None, size: int) -> list[Request]:
    """Every prompt in every style, and each row of a table of pairs.

    Args:
        prompts: texts, or .txt files with one in each line.
        styles: pictures, and folders whose pictures are a style each; several with ";" between are one style together.
        pairs: a .csv with the columns "prompt" and "style"; there a folder is one style, and paths are relative to the
            table's folder.
        size: pixels that the references are resized and cropped to.

    Raises:
        UserError: nothing was asked for, or something cannot be read; one line that names it.
    """
    texts = read_prompts(prompts)
    if bool(texts) != bool(styles) or not (texts or pairs):
        missing = "styles (--style FILE)" if texts else "prompts (--prompt TEXT)"
        raise UserError(f"predict draws prompts in the style of pictures, and no {missing} were given")
    wanted: dict[tuple[Path, ...], list[str]] = {files: list(texts) for files in find_styles(styles)}
    for prompt, files in read_pairs(pairs) if pairs else ():
        wanted.setdefault(files, []).append(prompt)
    numbers = {text: i for i, text in enumerate(dict.fromkeys(t for own in wanted.values() for t in own))}
    requests: list[Request] = []
    for files, own in wanted.items():
        base = "+".join(file.stem for file in files)[:80]
        taken = {request.name for request in requests}  # by pictures of one name in several folders
        name = next(n for n in (base, *(f"{base}-{i}" for i in range(2, len(taken) + 2))) if n not in taken)
        pictures = torch.stack([read_picture(file, size) for file in files])
        requests.append(Request(name, pictures, {numbers[text]: text for text in own}))
    return requests


def read_prompts(entries: Sequence[str]) -> list[str]:
    """Texts, and the lines of those entries that name a .txt file."""
    texts = []
    for entry in entries:
        if entry.endswith(".txt"):
            try:
                texts += [line.strip() for line in Path(entry).read_text("utf-8").splitlines() if line.strip()]
            except (OSError, ValueError) as error:
                raise UserError(f"prompts {entry!r}: not a text file that can be read") from error
        else:
            texts.append(entry)
    return list(dict.fromkeys(texts))


def read_pairs(table: str) -> list[tuple[str, tuple[Path, ...]]]:
    """(prompt, pictures of its style) of each row of a .csv."""
    rows: list[tuple[str, tuple[Path, ...]]] = []
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise UserError(f"{table}: has no column {missing[0]!r}; it needs `prompt` and `style`")
            for row in reader:
                prompt, style = ((row[name] or "").strip() for name in COLUMNS)
                if not prompt or not style:
                    raise UserError(f"{table}, line {reader.line_num}: the {'style' if prompt else 'prompt'} is empty")
                try:
                    files = _find(style, Path(table).parent)
                except UserError as error:
                    raise UserError(f"{table}, line {reader.line_num}: {error}") from error
                rows.append((prompt, tuple(files)))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{table!r}: not a table that can be read ({type(error).__name__})") from error
    if not rows:
        raise UserError(f"{table}: has no rows")
    return rows


def find_styles(entries: Sequence[str]) -> list[tuple[Path, ...]]:
    """The picture files of each style; every picture of a folder is a style of its own."""
    found: list[tuple[Path, ...]] = []
    for entry in entries:
        files = _find(entry)
        alone = Path(entry).is_dir()
        found += [(file,) for file in files] if alone else [tuple(files)]
    return list(dict.fromkeys(found))


def _find(entry: str, root: Path = Path()) -> list[Path]:
    """All pictures that one entry names."""
    files: list[Path] = []
    for name in filter(None, map(str.strip, entry.split(TOGETHER))):
        path = root / name
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURES)
            if not inside:
                raise UserError(f"style {str(path)!r}: the folder has no pictures ({', '.join(PICTURES)})")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"style {str(path)!r}: no such file or folder")
    if not files:
        raise UserError(f"style {entry!r}: names no picture")
    return files


def sheets(drawn: Sequence[tuple[Request, Sequence[Tensor]]]) -> Iterator[Tensor]:
    """Contact sheets 3 H W, or F 3 H W of clips: references in the first column, prompts in the first row.

    Args:
        drawn: each request with the pictures or clips of its prompts.
    """
    for start in range(0, len(drawn), ROWS):
        page = drawn[start : start + ROWS]
        columns = dict(sorted({i: text for request, _ in page for i, text in request.prompts.items()}.items()))
        blank = torch.ones_like(page[0][1][0])
        rows = []
        for request, samples in page:
            own = dict(zip(request.prompts, samples, strict=True))
            rows.append([own.get(i, blank) for i in columns])
        yield contact_sheet(rows, list(columns.values()), [mosaic(request.references) for request, _ in page])


def mosaic(pictures: Tensor) -> Tensor:
    """N pictures N 3 s s in the space of one, 3 s s."""
    if len(pictures) == 1:
        return pictures[0]
    side, size = math.ceil(math.sqrt(len(pictures))), pictures.shape[-1]
    small = F.interpolate(pictures, (size // side, size // side), mode="bilinear", antialias=True)
    result = torch.ones_like(pictures[0])
    for i, picture in enumerate(small):
        top, left = i // side * (size // side), i % side * (size // side)
        result[:, top : top + size // side, left : left + size // side] = picture
    return result
