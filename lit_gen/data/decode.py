"""Bytes of a member to arrays and back, for a fixed list of formats. Nothing here can run code from a file."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from safetensors.numpy import load as load_safetensors

from lit_gen.data.shards import BadSample

IMAGE = ("png", "jpg", "jpeg", "webp")
VIDEO = ("mp4", "webm", "mov", "mkv", "avi")

# A file's content decides what reads it, not its name. These readers only compute; others of the same libraries start
# programs (Ghostscript for EPS), or open the files and addresses that a playlist names.
_PICTURES = ("PNG", "JPEG", "WEBP")
MORE_PICTURES = (*_PICTURES, "BMP", "GIF", "TIFF")  # that a user may name, but sets do not hold
CLIPS = {"format_whitelist": "mov,matroska,avi", "protocol_whitelist": "none"}


def open_picture(source: bytes | Path, formats: tuple[str, ...] = _PICTURES) -> Image.Image:
    """A picture in one of the formats, by default those of IMAGE, not decoded yet."""
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats)


def read_image(data: bytes, formats: tuple[str, ...] = _PICTURES) -> Image.Image:
    """An RGB picture of 8 bits, upright, on white where it is transparent."""
    open_picture(data, formats).verify()  # finds flipped bytes that decode to wrong pixels
    picture = open_picture(data, formats)
    if picture.mode.startswith("I"):  # grey of 16 bits, which `convert` would clip to white
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.format != "PNG":
        picture = ImageOps.exif_transpose(picture)
    if picture.has_transparency_data:  # `convert` would show whatever colour is behind
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def read_video(data: bytes) -> np.ndarray:
    """Every frame of a video: F H W 3, uint8."""
    import av  # here and below: what has no clips needs no video library

    with av.open(io.BytesIO(data), options=CLIPS) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1  # starting threads costs more than a short clip takes
        convert = converter()
        frames = []
        for frame in container.decode(stream):
            if frame.is_corrupt:  # what is missing was made up by the decoder
                raise ValueError(f"frame {len(frames)} is damaged")
            frames.append(upright(convert(frame, format="rgb24").to_ndarray(), getattr(frame, "rotation", 0)))
    if not frames:
        raise ValueError("the video has no frames")
    return np.stack(frames)


def upright(pixels: np.ndarray, rotation: int) -> np.ndarray:
    """A frame H W 3 as its camera was held: `rotation` is how far, in degrees against the clock, it is to be turned."""
    return np.rot90(pixels, round(rotation / 90))


def read_text(data: bytes) -> str:
    """A caption."""
    if b"\0" in data:  # blocks of zeros are what a crashed machine leaves of a file
        raise ValueError("it holds zero bytes")
    return data.decode("utf-8").strip()


DECODERS = {
    **dict.fromkeys(IMAGE, read_image),
    **dict.fromkeys(VIDEO, read_video),
    "txt": read_text,
    "json": json.loads,
    "npy": lambda data: np.lib.format.read_array(io.BytesIO(data), allow_pickle=False),
    "safetensors": load_safetensors,
}


def decode(extension: str, data: bytes):
    """The value of a member; BadSample says why it cannot be read."""
    if extension not in DECODERS:
        raise BadSample(f".{extension} is not one of the formats that are read: {', '.join(DECODERS)}")
    try:
        return DECODERS[extension](data)
    # Decoders of damaged bytes raise nearly anything: OSError, SyntaxError, ValueError, struct.error, av.error.…
    except Exception as error:
        said = re.sub(r" ?<_io\.\S+ object at \w+>", "", str(error))
        raise BadSample(f".{extension} of {len(data)} bytes: {type(error).__name__}: {said}") from error


def encode_image(rgb: np.ndarray) -> bytes:
    """H W 3 uint8 to PNG."""
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def encode_video(rgb: np.ndarray, rate: int = 8, ordinary: bool = False) -> bytes:
    """F H W 3 uint8 to a nearly lossless mp4 (full chroma, since half-resolution colour ruins small pictures).

    An `ordinary` one is as most videos are: colour at half the resolution, frames told from those before and after
    them, x264's usual quality.
    """
    import av

    buffer = io.BytesIO()
    convert = converter()
    with av.open(buffer, "w", format="mp4") as container:
        # With lookahead (which "zerolatency" turns off) x264 wrote other bytes for the same clip in one of ten runs.
        options = {"crf": "6", "preset": "veryfast", "tune": "zerolatency", "threads": "1"}
        if ordinary:
            options |= {"crf": "23", "x264-params": "bframes=3:b-adapt=0"}
        layout = "yuv420p" if ordinary else "yuv444p"
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width = rgb.shape[1:3]
        stream.pix_fmt = layout
        for pixels in rgb:
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(convert(frame, format=layout)))
        container.mux(stream.encode())
    return buffer.getvalue()


def converter() -> Callable[..., Any]:
    """What turns a frame into another pixel format."""
    from av import __version__ as version
    from av.video.reformatter import VideoReformatter

    # PyAV 17 began to convert each frame with a thread per core, which takes longer than the work for small pictures.
    alone = {"threads": 1} if int(version.split(".")[0]) >= 17 else {}
    return partial(VideoReformatter().reformat, **alone)
