"""Measures a base of the world on held-out scenes, with the oracle as judge.

    python -m lit_gen.pretrain.evaluate data/world-base --out data/world-base/card

writes metrics.json and pictures; the base's README quotes them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lit_gen.diffusion.base import Base, load_base
from lit_gen.diffusion.objective import Schedule
from lit_gen.diffusion.sampling import ddim, guided, noise_from
from lit_gen.diffusion.text import encode_text
from lit_gen.metrics.clip import CLIPEncoders
from lit_gen.metrics.oracle import Oracle
from lit_gen.metrics.prompt import PromptAccuracy
from lit_gen.metrics.video import Flicker, MotionAccuracy
from lit_gen.world.grammar import captions
from lit_gen.world.render import render, render_video
from lit_gen.world.sampling import sample
from lit_gen.world.scene import Scenes

SEED = 2024
FRAMES = 8
# Which recipe answers for which attributes of a generated picture, and how often a picture of it is drawn.
QUESTIONS = {
    "photo": ("shape", "colour", "pattern", "marked", "count"),
    "pairs": ("shape", "colour", "relation", "count"),
    "views": ("view",),
    "named": ("style",),
    "times": ("time",),
}


class Painter:
    """Draws pictures and clips with a base.

    Args:
        folder: the base.
        device: to draw on.
        guidance: classifier-free guidance scale.
        steps: DDIM steps.
    """

    def __init__(self, folder: str, device: str, guidance: float, steps: int) -> None:
        parts = ["tokenizer", "text_encoder", "vae", "unet", "scheduler"]
        self.motion = (Path(folder) / "motion_adapter").is_dir()
        self.base: Base = load_base(folder, parts=[*parts, "motion_adapter"] if self.motion else parts).to(device)
        self.schedule = Schedule(self.base.scheduler).to(device)
        self.device, self.guidance, self.steps = device, guidance, steps
        if self.motion:
            from diffusers import UNetMotionModel

            self.video_unet = UNetMotionModel.from_unet2d(self.base.unet, self.base.motion_adapter).to(device).eval()

    def _text(self, prompts: list[str]) -> Tensor:
        """Text states of no prompt and of the prompts, 2B L D."""
        return encode_text(self.base.tokenizer, self.base.text_encoder, ["" for _ in prompts] + prompts)

    @torch.no_grad()
    def images(self, prompts: list[str], first_seed: int = 0) -> Tensor:
        """Pictures B 3 H W in -1..1."""

        def predict(x: Tensor, t: Tensor, states: Tensor) -> Tensor:
            return self.base.unet(x, t, states).sample

        denoise = guided(predict, *self._text(prompts).chunk(2), self.guidance)
        return self.base.decode(self._sample(denoise, len(prompts), first_seed, ()))

    @torch.no_grad()
    def clips(self, prompts: list[str], first_seed: int = 0) -> Tensor:
        """Clips B F 3 H W in -1..1."""

        def predict(x: Tensor, t: Tensor, states: Tensor) -> Tensor:
            return self.video_unet(x.transpose(1, 2), t, states).sample.transpose(1, 2)

        denoise = guided(predict, *self._text(prompts).repeat_interleave(FRAMES, 0).chunk(2), self.guidance)
        latent = self._sample(denoise, len(prompts), first_seed, (FRAMES,))
        return self.base.decode(latent.flatten(0, 1)).unflatten(0, latent.shape[:2])

    def _sample(self, denoise: Callable, count: int, first_seed: int, frames: tuple[int, ...]) -> Tensor:
        config = self.base.unet.config
        shape = (*frames, config.in_channels, config.sample_size, config.sample_size)
        noise = noise_from(list(range(first_seed, first_seed + count)), shape, self.device)
        return ddim(denoise, self.schedule, noise, self.steps)


def evaluate(
    folder: str, oracle: str, out: Path, images: int, clips: int, guidance: float, steps: int, device: str
) -> dict[str, Any]:
    """All figures of the base's card, by name; pictures go to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    painter = Painter(folder, device, guidance, steps)
    judge = Oracle.from_pretrained(oracle).to(device)
    figures: dict[str, Any] = {"guidance": guidance, "steps": steps, "images": images, "clips": clips}
    figures["autoencoder"] = _reconstruction(painter.base, images, device, out)
    if (Path(folder) / "image_encoder").is_dir():
        figures["clip"] = _retrieval(folder, images, device)
    figures["generated"], figures["rendered"] = _pictures(painter, judge, images, device, out)
    if painter.motion and clips:
        figures["video"] = _clips(painter, judge, clips, device, out)
    (out / "metrics.json").write_text(json.dumps(figures, indent=1) + "\n")
    return figures


def _scenes(recipe: str, count: int, device: str) -> Scenes:
    return sample(recipe, "test", SEED, torch.arange(count)).to(device)


def _render(scenes: Scenes) -> Tensor:
    return render(scenes).rgb * 2 - 1


@torch.no_grad()
def _reconstruction(base: Base, count: int, device: str, out: Path) -> dict[str, float]:
    image = _render(_scenes("photo", count, device))
    restored = torch.cat([base.vae(chunk).sample.clamp(-1, 1) for chunk in image.split(64)])
    psnr = -10 * torch.log10((restored - image).square().mean((1, 2, 3)) / 4)
    save_grid(out / "reconstruction.png", torch.stack([image[:24], restored[:24]], 1).flatten(0, 1), 12)
    return {"psnr_photo": float(psnr.mean()), "psnr_photo_worst_decile": float(psnr.quantile(0.1))}


def _retrieval(folder: str, count: int, device: str) -> dict[str, float]:
    encoders = CLIPEncoders(folder).to(device)
    scenes = _scenes("photo", count, device)
    text = encoders.embed_text([c.text for c in captions(scenes)])
    hit = (text @ encoders.embed_image(_render(scenes)).T).argmax(1) == torch.arange(count, device=device)
    return {"recall_at_1": float(hit.float().mean())}


def _pictures(
    painter: Painter, judge: Oracle, count: int, device: str, out: Path
) -> tuple[dict[str, float], dict[str, float]]:
    generated: dict[str, float] = {}
    rendered: dict[str, float] = {}
    gallery = []
    size = 64 if device == "cpu" else 256
    with tqdm(total=count * len(QUESTIONS), desc="drawing", unit=" images") as progress:
        for recipe, attributes in QUESTIONS.items():
            scenes = _scenes(recipe, count, device)
            drawn, truth = PromptAccuracy(judge).to(device), PromptAccuracy(judge).to(device)
            said = captions(scenes)
            truth.update(_render(scenes), scenes, said)
            for start in range(0, count, size):
                part = said[start : start + size]
                picture = painter.images([c.text for c in part], first_seed=start)
                drawn.update(picture, scenes[start : start + size], part)
                progress.update(len(picture))
                if start == 0:
                    gallery.append(picture[:10])
            for name, accuracy in (("generated", drawn.compute()), ("rendered", truth.compute())):
                figures = generated if name == "generated" else rendered
                figures.update({f"{recipe}/{a}": float(accuracy[a]) for a in attributes if a in accuracy})
    save_grid(out / "samples.png", torch.cat(gallery), 10)
    return generated, rendered


def _clips(painter: Painter, judge: Oracle, count: int, device: str, out: Path) -> dict[str, float]:
    scenes = _scenes("motion", count, device)
    prompts = [c.text for c in captions(scenes)]
    motion, truth = MotionAccuracy(judge).to(device), MotionAccuracy(judge).to(device)
    flicker, real_flicker = Flicker().to(device), Flicker().to(device)
    shown = []
    for start in tqdm(range(0, count, 16), desc="filming", unit=" x 16 clips"):
        part = scenes[start : start + 16]
        clip, real = painter.clips(prompts[start : start + 16], first_seed=start), render_video(part).rgb * 2 - 1
        motion.update(clip, part)
        truth.update(real, part)
        flicker.update(clip)
        real_flicker.update(real)
        shown.append(clip[:2])
    save_grid(out / "clips.png", torch.cat(shown)[:10].flatten(0, 1), FRAMES)
    return {
        "motion": float(motion.compute()["motion"]),
        "motion_rendered": float(truth.compute()["motion"]),
        "mover": float(motion.compute()["mover"]),
        "flicker": float(flicker.compute()),
        "flicker_rendered": float(real_flicker.compute()),
        "flicker_ratio": float(flicker.compute() / real_flicker.compute()),
    }


def save_grid(path: Path, images: Tensor, columns: int) -> None:
    """Write images N 3 H W in -1..1 as one PNG with `columns` columns."""
    from PIL import Image

    images = images[: len(images) // columns * columns].cpu()
    grid = images.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    Image.fromarray(grid.add(1).mul(127.5).round().clamp(0, 255).byte().numpy()).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", help="folder of the base")
    parser.add_argument("--oracle", default="data/oracle", help="folder of the oracle")
    parser.add_argument("--out", type=Path, required=True, help="folder for metrics.json and pictures")
    parser.add_argument("--images", type=int, default=512, help="generated pictures per question")
    parser.add_argument("--clips", type=int, default=256, help="generated clips")
    parser.add_argument("--guidance", type=float, default=4.0, help="classifier-free guidance scale")
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = parser.parse_args()
    figures = evaluate(a.base, a.oracle, a.out, a.images, a.clips, a.guidance, a.steps, a.device)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
