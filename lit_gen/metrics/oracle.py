"""The oracle: reads what is in a picture or video of the world. A judge, never a training signal.

    oracle = Oracle.from_pretrained("data/oracle")
    oracle.read(images).colour, oracle.read_video(videos).motion

It is trained on renders only (`lit_gen/pretrain/oracle.py`), has never seen a generated picture, and refuses gradients.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from lit_gen.errors import UserError
from lit_gen.files import write_tensors
from lit_gen.metrics.network import ImageReader, VideoHead
from lit_gen.metrics.reading import Reading, VideoReading, decode
from lit_gen.world import vocabulary as words
from lit_gen.world.styles import STYLE_PARAMETERS

SIZE = 64  # pixels a side; other sizes are resized
CHUNK = 64  # images read at once on a CPU: larger ones only cost memory
MOVES_ITSELF = tuple(name not in ("stays still", "is circled") for name in words.MOTIONS)
_MEANING = {
    name: list(getattr(words, name))
    for name in ("KINDS", "COLOURS", "PATTERNS", "SIZES", "RELATIONS", "FLOORS", "TIMES", "VIEWS", "MOTIONS", "STYLES")
} | {"STYLE_PARAMETERS": list(STYLE_PARAMETERS)}


class Oracle(nn.Module):
    """Reader of pictures and videos.

    Args:
        channels: of the trunk at 64, 32, 16 and 8 pixels.
        width: of slots and of the video head.
        layers: decoder layers of the slots.
        video_layers: transformer layers over the tokens of all frames.
        frames: frames a video is sampled to before it is read.
    """

    def __init__(
        self,
        channels: tuple[int, int, int, int] = (32, 64, 112, 128),
        width: int = 128,
        layers: int = 2,
        video_layers: int = 2,
        frames: int = 8,
    ) -> None:
        super().__init__()
        self.config = {
            "channels": list(channels),
            "width": width,
            "layers": layers,
            "video_layers": video_layers,
            "frames": frames,
        }
        self.frames = frames
        self.image = ImageReader(tuple(channels), width, layers)
        self.video = VideoHead(width, video_layers, frames)

    # -- reading ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def read(self, images: Tensor) -> Reading:
        """Read images (B 3 H W in [-1, 1], any size) on the oracle's device."""
        return decode(self.look(resize(images.to(self._device))))

    @torch.no_grad()
    def read_video(self, video: Tensor) -> VideoReading:
        """Read videos (B F 3 H W in [-1, 1], any size; F frames are sampled evenly to the oracle's own number)."""
        b, f = video.shape[:2]
        pick = torch.linspace(0, f - 1, self.frames).round().long()
        video = resize(video[:, pick.to(video.device)].flatten(0, 1).to(self._device)).unflatten(0, (b, self.frames))
        out = self.look(video.flatten(0, 1))
        head = self.motion_of(video, out)
        motion = head["motion"].float().softmax(-1)
        best = motion.argmax(-1)
        moves = torch.tensor(MOVES_ITSELF, device=best.device)[best]
        present = out["present"].view(b, self.frames, -1)[:, 0] > 0
        mover = head["mover"].float().masked_fill(~present, -1e4).argmax(-1)
        ends = {name: value.unflatten(0, (b, self.frames)) for name, value in out.items()}
        return VideoReading(
            motion=best,
            motion_certainty=motion.amax(-1),
            mover=mover.where(moves, torch.full_like(mover, words.ABSENT)),
            first=decode({name: value[:, 0] for name, value in ends.items()}),
            last=decode({name: value[:, -1] for name, value in ends.items()}),
        )

    def read_events(self, clips: Tensor) -> list[VideoReading]:
        """Read long videos clip by clip: clips B N F 3 H W, N consecutive clips. Returns N readings of B videos."""
        return [self.read_video(clip) for clip in clips.unbind(1)]

    def motion_of(self, video: Tensor, out: dict[str, Tensor]) -> dict[str, Tensor]:
        """Video head on the outputs for its frames, which get no gradients. video: B F 3 64 64, out: of B*F images."""
        shape = video.shape[:2]
        return self.video(video, out["tokens"].detach().unflatten(0, shape), out["box"].detach().unflatten(0, shape))

    def look(self, images: Tensor) -> dict[str, Tensor]:
        """The picture network's raw outputs for images B 3 64 64, in evaluation mode whatever mode the oracle is in."""
        training, parts = self.training, []
        self.eval()
        for chunk in images.split(CHUNK if images.device.type == "cpu" else 1024):
            parts.append(self.image(chunk.contiguous(memory_format=torch.channels_last)))  # twice as fast on CPUs
        self.train(training)
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    @property
    def _device(self) -> torch.device:
        return self.image.queries.device

    # -- files --------------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write config.json and model.safetensors (fp16)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = self.config | {"meaning": _MEANING}
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        state = {k: v.half() if v.is_floating_point() else v for k, v in self.state_dict().items()}
        write_tensors(folder / "model.safetensors", {k: v.contiguous().cpu() for k, v in state.items()})
        return folder

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Oracle:
        """Load a trained oracle, frozen and in evaluation mode.

        Raises:
            UserError: the folder lacks a file, or the oracle was trained on another vocabulary.
        """
        folder = Path(folder)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise UserError(f"{folder}: no oracle here ({name} is missing); `data/oracle` holds the bundled one")
        config = json.loads((folder / "config.json").read_text())
        meaning = config.pop("meaning")
        changed = [name for name, value in _MEANING.items() if meaning.get(name) != value]
        if changed:
            raise UserError(f"{folder}: trained on other words for {', '.join(changed)}; train it again")
        oracle = cls(**config)
        oracle.load_state_dict(load_file(folder / "model.safetensors"))
        return oracle.float().eval().requires_grad_(False).to(memory_format=torch.channels_last)


def resize(images: Tensor) -> Tensor:
    """Images B 3 H W of any size to B 3 64 64, float."""
    images = images.float()
    if images.shape[-2:] == (SIZE, SIZE):
        return images
    return F.interpolate(images, (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False).clamp(-1, 1)


@cache
def bundled(folder: str = "data/oracle") -> Oracle:
    """The oracle of a folder, loaded once and shared by all metrics of this process."""
    return Oracle.from_pretrained(folder)
