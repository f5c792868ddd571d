"""Show what a method makes: contact sheets in TensorBoard, and png and mp4 files in the run folder."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lit_gen.errors import at_least

FRAMES_PER_SECOND = 8  # ours: the world's clips have 8 frames
GAP = 4  # pixels between the cells of a sheet


class Samples(L.Callback):
    """After each validation, shows the pictures and clips that the method's `preview()` returns.

    They go to TensorBoard (clips as GIF) and to `samples/step-N/` in the run folder (png and mp4). A method has a
    preview if it defines `preview() -> dict[str, Tensor]`: pictures 3 H W and clips F 3 H W by name, in [-1, 1].

    Args:
        frames_per_second: of the clips.
    """

    def __init__(self, frames_per_second: int = FRAMES_PER_SECOND) -> None:
        at_least(1, frames_per_second=frames_per_second)
        self.rate = frames_per_second

    # Not on_validation_end: there the averaged weights may already have been swapped out again.
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # With `validate_first` the sanity check is a whole validation, whose pictures are worth keeping.
        partial = trainer.sanity_checking and trainer.num_sanity_val_steps != float("inf")
        if partial or not hasattr(pl_module, "preview"):
            return
        # On every rank, since a sharded model can only be called by all of them together.
        previews: dict[str, Tensor] = pl_module.preview()
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir) / "samples" / f"step-{trainer.global_step:06d}"
        for name, picture in previews.items():
            save(folder / name.replace(" ", "-"), picture, self.rate)
            for logger in trainer.loggers:
                # the step at which Lightning logs the figures of this validation
                step = trainer.fit_loop.epoch_loop._batches_that_stepped
                show(logger, f"samples/{name}", picture, step, self.rate)


def show(logger: Any, tag: str, picture: Tensor, step: int, rate: int = FRAMES_PER_SECOND) -> None:
    """Put a picture 3 H W or a clip F 3 H W in [-1, 1] into TensorBoard; other loggers are left alone."""
    writer = logger.experiment
    if not hasattr(writer, "_get_file_writer"):
        return
    if picture.ndim == 3:
        writer.add_image(tag, to_uint8(picture), step, dataformats="HWC")
        return
    from tensorboard.compat.proto.summary_pb2 import Summary

    # add_video needs moviepy; an image summary may hold an animated GIF just as well.
    height, width = picture.shape[-2:]
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=to_gif(picture, rate))
    writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)


def save(path: Path, picture: Tensor, rate: int = FRAMES_PER_SECOND) -> Path:
    """Write a picture 3 H W as png or a clip F 3 H W as mp4, values in [-1, 1]; returns the path with its extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = to_uint8(picture)
    if picture.ndim == 3:
        path = path.with_name(path.name + ".png")
        Image.fromarray(pixels).save(path)
        return path
    import av  # only here: pictures need no video library

    path = path.with_name(path.name + ".mp4")
    # yuv420p plays everywhere, but wants even sides
    pixels = np.pad(pixels, ((0, 0), (0, pixels.shape[1] % 2), (0, pixels.shape[2] % 2), (0, 0)), mode="edge")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "12"})
        stream.height, stream.width, stream.pix_fmt = *pixels.shape[1:3], "yuv420p"
        for frame in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def to_uint8(picture: Tensor) -> np.ndarray:
    """[..] 3 H W in [-1, 1] to [..] H W 3 bytes."""
    return picture.detach().float().add(1).mul(127.5).round().clamp(0, 255).byte().movedim(-3, -1).cpu().numpy()


def to_gif(clip: Tensor, rate: int = FRAMES_PER_SECOND) -> bytes:
    """A clip F 3 H W in [-1, 1] as an endless GIF."""
    frames = [Image.fromarray(frame) for frame in to_uint8(clip)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=1000 // rate, loop=0)
    return buffer.getvalue()


def contact_sheet(
    cells: Sequence[Sequence[Tensor]],
    columns: Sequence[str] = (),
    rows: Sequence[Tensor | str] = (),
    size: int = 128,
) -> Tensor:
    """Pictures (3 h w) or clips (F 3 h w) in rows and columns, with a heading row and a heading column.

    Args:
        cells: rows of equally many pictures or clips in [-1, 1]; pictures among clips stand still.
        columns: a text above each column.
        rows: a picture or a text before each row.
        size: pixels of a cell's shorter side; its shape is that of the first picture.

    Returns:
        One picture 3 H W, or one clip F 3 H W if any cell is a clip.
    """
    frames = max((cell.shape[0] for row in cells for cell in row if cell.ndim == 4), default=1)
    own_height, own_width = cells[0][0].shape[-2:]
    height, width = (round(size * side / min(own_height, own_width)) for side in (own_height, own_width))
    grid = [[_fit(cell, height, width, frames) for cell in row] for row in cells]
    if rows:
        heads = [_words(r, width, height) if isinstance(r, str) else r for r in rows]
        grid = [[_fit(head, height, width, frames), *row] for head, row in zip(heads, grid, strict=True)]
    lines = [torch.cat([F.pad(cell, (0, GAP, 0, GAP), value=1.0) for cell in row], dim=-1) for row in grid]
    if columns:
        titles = [*([""] if rows else []), *columns]
        above = max(_text_height(title, width) for title in titles)
        line = torch.cat([F.pad(_words(title, width, above), (0, GAP, 0, GAP), value=1.0) for title in titles], dim=-1)
        lines.insert(0, line.expand(frames, -1, -1, -1))
    sheet = torch.cat(lines, dim=-2)
    return sheet if any(cell.ndim == 4 for row in cells for cell in row) else sheet[0]


def _fit(picture: Tensor, height: int, width: int, frames: int) -> Tensor:
    """F 3 height width of a picture or clip, white around another shape; shorter clips stop at their last frame."""
    clip = picture.detach().float().cpu()
    clip = clip[None] if clip.ndim == 3 else clip
    scale = min(height / clip.shape[-2], width / clip.shape[-1])
    inner = [min(max(round(scale * own), 1), most) for own, most in zip(clip.shape[-2:], (height, width), strict=True)]
    # Small pictures are enlarged by whole pixels, so that one sees what the model made.
    how: dict[str, Any] = {"mode": "nearest"} if scale == int(scale) else {"mode": "bilinear", "antialias": True}
    clip = F.interpolate(clip, inner, **how)
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    clip = F.pad(clip, (left, width - inner[1] - left, top, height - inner[0] - top), value=1.0)
    return torch.cat([clip, clip[-1:].expand(frames - len(clip), -1, -1, -1)])


_LINE = 13  # pixels of a line of text


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(width // 6, 1))


def _text_height(text: str, width: int) -> int:
    return _LINE * max(len(_wrap(text, width)), 1) + 4


def _words(text: str, width: int, height: int) -> Tensor:
    """Black text on white, 3 height width in [-1, 1]."""
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    for i, line in enumerate(_wrap(text, width)):
        draw.text((2, 2 + _LINE * i), line, fill="black", font=ImageFont.load_default(10))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1
