"""The network behind the oracle: a small convolutional trunk, three object slots, one global token, a video head.

Letters: B images, F frames, K = 3 slots, H W pixels, D token width. Slots are in no particular order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_gen.world import vocabulary as words
from lit_gen.world.styles import CIRCULAR, STYLE_PARAMETERS

FACING_BINS = 24  # 15 degrees each
EMBEDDING = 64

# Sizes of what is read from each slot and from the whole picture.
SLOT_HEADS = {
    "present": 1,
    "kind": len(words.KINDS),
    "colour": len(words.COLOURS),
    "pattern": len(words.PATTERNS),
    "size": len(words.SIZES),
    "marked": 1,
    "special": 1,
    "facing": FACING_BINS,
    "box": 4,
    "embedding": EMBEDDING,
}
GLOBAL_HEADS = {
    "style": len(words.STYLES) + 1,  # the last class is "a continuous style without a name"
    "time": len(words.TIMES),
    "floor": len(words.FLOORS),
    "view": len(words.VIEWS),
    "normals": 1,
    "elevation": 1,
}


class Residual(nn.Module):
    """Two 3x3 convolutions with batch norm around a skip; stride 1 keeps the number of channels."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm_first = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm_second = nn.BatchNorm2d(outputs)
        # Pooled, not strided: nothing is thrown away, and oneDNN crashes in the backward of some strided 1x1 ones.
        self.skip = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(inputs, outputs, 1)) if stride == 2 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm_first(self.first(x)), inplace=True)
        return F.relu(self.norm_second(self.second(y)) + self.skip(x), inplace=True)


class Attention(nn.Module):
    """Multi-head attention through scaled_dot_product_attention. x: B Q D, memory: B M D."""

    def __init__(self, width: int, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        def split(t: Tensor) -> Tensor:  # B N D -> B heads N D/heads
            return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        key, value = self.key_value(memory).chunk(2, dim=-1)
        y = F.scaled_dot_product_attention(split(self.query(x)), split(key), split(value))
        return self.out(y.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Pre-norm transformer layer: self-attention, attention to a memory if there is one, feed-forward."""

    def __init__(self, width: int, cross: bool):
        super().__init__()
        self.norm_self, self.norm_feed = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend_self = Attention(width)
        self.norm_cross = nn.LayerNorm(width) if cross else None
        self.attend_cross = Attention(width) if cross else None
        self.feed = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        y = self.norm_self(x)
        x = x + self.attend_self(y, y)
        if self.attend_cross is not None:
            x = x + self.attend_cross(self.norm_cross(x), memory)
        return x + self.feed(self.norm_feed(x))


class ImageReader(nn.Module):
    """Image B 3 64 64 in [-1, 1] to a dict of logits: SLOT_HEADS (B K n), GLOBAL_HEADS (B n), and
    "mask" B K 64 64, "relation" B K K 6 (slot i stands in relation r to slot j), "style_parameters" B P in 0..1,
    "style_circle" B len(CIRCULAR) 2 (circular parameters as points), "tokens" B K+1 D (slots, then the picture)."""

    def __init__(self, channels: tuple[int, int, int, int], width: int, layers: int):
        super().__init__()
        a, b, c, d = channels
        self.stem = nn.Conv2d(3, a, 3, 1, 1)
        self.stage64 = Residual(a, a)
        self.stage32 = nn.Sequential(Residual(a, b, 2), Residual(b, b))
        self.stage16 = nn.Sequential(Residual(b, c, 2), Residual(c, c))
        self.stage8 = nn.Sequential(Residual(c, d, 2), Residual(d, d))

        pixel = 48  # width of the pixel features that masks are read from
        self.lateral64, self.lateral32 = nn.Conv2d(a, pixel, 1), nn.Conv2d(b, pixel, 1)
        self.lateral16, self.lateral8 = nn.Conv2d(c, pixel, 1), nn.Conv2d(d, pixel, 1)
        self.smooth = nn.Conv2d(pixel, pixel, 3, 1, 1)

        self.memory16, self.memory8 = nn.Conv2d(c, width, 1), nn.Conv2d(d, width, 1)
        self.place = nn.Parameter(torch.randn(256, width) * 0.2)
        self.queries = nn.Parameter(torch.randn(words.OBJECTS_PER_SCENE + 1, width))
        self.decoder = nn.ModuleList(Layer(width, cross=True) for _ in range(layers))
        self.to_mask = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, pixel))

        # What lies under a slot's own mask says its colour and pattern; statistics over the picture say its style.
        self.under_mask = nn.Sequential(nn.LayerNorm(a + b + c + d), nn.Linear(a + b + c + d, width), nn.GELU())
        self.statistics = nn.Sequential(
            nn.LayerNorm(2 * (a + b + c + d)), nn.Linear(2 * (a + b + c + d), width), nn.GELU()
        )
        self.refine = nn.ModuleList([Layer(width, cross=False)])
        self.norm = nn.LayerNorm(width)
        self.slot_head = nn.Linear(width, sum(SLOT_HEADS.values()))
        self.global_head = nn.Linear(width, sum(GLOBAL_HEADS.values()))
        styles = len(STYLE_PARAMETERS) + 2 * len(CIRCULAR)
        self.style_head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, styles))
        self.relation_head = nn.Sequential(
            nn.Linear(2 * width, width // 2), nn.GELU(), nn.Linear(width // 2, len(words.RELATIONS))
        )

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x64 = self.stage64(self.stem(image))
        x32 = self.stage32(x64)
        x16 = self.stage16(x32)
        x8 = self.stage8(x16)

        def double(x: Tensor) -> Tensor:
            return F.interpolate(x, scale_factor=2, mode="nearest")

        pixels = self.lateral16(x16) + double(self.lateral8(x8))
        pixels = self.smooth(F.relu(self.lateral32(x32) + double(pixels)))
        pixels = F.relu(self.lateral64(x64) + double(pixels))  # B pixel 64 64

        memory = (self.memory16(x16) + double(self.memory8(x8))).flatten(2).transpose(1, 2) + self.place
        tokens = self.queries.expand(len(image), -1, -1)  # B K+1 D
        for layer in self.decoder:
            tokens = layer(tokens, memory)
        mask = torch.einsum("bkc,bchw->bkhw", self.to_mask(tokens[:, :-1]), pixels)

        tokens = tokens + self._evidence(mask, (x64, x32, x16, x8))
        for layer in self.refine:
            tokens = layer(tokens)
        tokens = self.norm(tokens)
        slots, whole = tokens[:, :-1], tokens[:, -1]
        out = dict(zip(SLOT_HEADS, self.slot_head(slots).split(list(SLOT_HEADS.values()), -1), strict=True))
        out |= dict(zip(GLOBAL_HEADS, self.global_head(whole).split(list(GLOBAL_HEADS.values()), -1), strict=True))
        k = slots.shape[1]
        pairs = torch.cat([slots[:, :, None].expand(-1, -1, k, -1), slots[:, None].expand(-1, k, -1, -1)], -1)
        out["box"] = out["box"].sigmoid()
        out["mask"], out["relation"] = mask, self.relation_head(pairs)
        style = self.style_head(whole)
        out["style_circle"] = style[:, len(STYLE_PARAMETERS) :].unflatten(-1, (-1, 2))
        out["style_parameters"] = style[:, : len(STYLE_PARAMETERS)].sigmoid()
        out["tokens"] = tokens
        return out

    def _evidence(self, mask: Tensor, maps: tuple[Tensor, ...]) -> Tensor:
        """Features under each slot's mask, and means and deviations over the picture. Returns B K+1 D."""
        cover, under, spread = mask.detach().sigmoid(), [], []
        for x in maps:
            weight = F.adaptive_avg_pool2d(cover, x.shape[-2:]).flatten(2)  # B K hw
            weight = weight / (weight.sum(-1, keepdim=True) + 1e-3)
            flat = x.flatten(2)
            under.append(torch.einsum("bkn,bcn->bkc", weight.to(flat.dtype), flat))
            spread += [flat.mean(-1), flat.float().var(-1).add(1e-4).sqrt()]
        slots = self.under_mask(torch.cat(under, -1))
        return torch.cat([slots, self.statistics(torch.cat(spread, -1))[:, None]], dim=1)


class VideoHead(nn.Module):
    """Motion and mover from the readings of F frames. The frame readings are inputs only: training this head
    leaves the image reader as it is. A second, thin stream sees how pixels change from frame to frame, because
    slots are trained to ignore how a pattern is turned."""

    def __init__(self, width: int, layers: int, frames: int):
        super().__init__()
        steps = (6, 16, 32, 64, 32)
        self.change = nn.Sequential(
            *[
                m
                for i, o in zip(steps, steps[1:], strict=False)
                for m in (nn.Conv2d(i, o, 3, 2, 1), nn.GroupNorm(4, o), nn.ReLU())
            ]
        )
        self.change_in = nn.Linear(32 * 16, width)
        self.slot_in = nn.Linear(width + 4, width)
        self.when = nn.Parameter(torch.randn(frames, 1, width) * 0.2)
        self.role = nn.Parameter(torch.randn(words.OBJECTS_PER_SCENE + 2, width) * 0.2)
        self.layers = nn.ModuleList(Layer(width, cross=False) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.motion = nn.Linear(width, len(words.MOTIONS))
        self.mover = nn.Linear(width, 1)

    def forward(self, video: Tensor, tokens: Tensor, box: Tensor) -> dict[str, Tensor]:
        """video: B F 3 64 64, tokens: B F K+1 D, box: B F K 4. Returns "motion" B 8, "mover" B K (frame 0's slots)."""
        b, f = video.shape[:2]
        step = video - torch.cat([video[:, :1], video[:, :-1]], 1)
        change = self.change(torch.cat([video, 2 * step], 2).flatten(0, 1))  # BF 32 4 4
        change = self.change_in(change.flatten(1)).unflatten(0, (b, f))[:, :, None]
        place = F.pad(box, (0, 0, 0, 1))  # the global token has no box
        x = self.slot_in(torch.cat([tokens, place.to(tokens.dtype)], -1))
        x = torch.cat([x, change.to(x.dtype)], 2) + self.when + self.role  # B F K+2 D
        x = x.flatten(1, 2)
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x).unflatten(1, (f, -1))
        return {"motion": self.motion(x.mean((1, 2))), "mover": self.mover(x[:, 0, :-2]).squeeze(-1)}
