"""Scenes rendered on the training device: where a GPU draws pictures faster than any disk delivers them.

A pool of scenes is rendered once, kept on the device as bytes (or as latents), and drawn from in an order that is a
function of (seed, epoch). Every rank renders its own share of the pool.
"""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor
from tqdm import tqdm

from lit_gen import interrupts
from lit_gen.data.captions import write_captions
from lit_gen.errors import UserError, at_least
from lit_gen.metrics.clip import CLIPEncoders
from lit_gen.world import render
from lit_gen.world.motion import animate
from lit_gen.world.sampling import sample
from lit_gen.world.scene import Scenes

_CHUNK = 4096  # pictures rendered or captioned at a time
_ENCODED = 1024  # pictures encoded at a time


class Draws:
    """This rank's rows of a pool that is dealt out like cards: number i is row i // world of rank i % world.

    Batches are {"rows": B, "draws": B} with a random number (int64 below 2**31) for each row. Sample number c of the
    endless stream is a function of (seed, c) alone, and a global batch takes the next `batch_size * world` numbers: a
    run continues exactly, and on another number of ranks too, as long as that divides the columns described below.

    Args:
        count: size of the pool, over all ranks.
        batch_size: rows in a batch of one rank.
        seed: of the order and of the random numbers.
        shuffle: False gives this rank's rows in order, once, the last batch short.
    """

    waited = 0.0  # seconds spent waiting for data: none, since what is drawn is on the device already

    def __init__(
        self, count: int, batch_size: int, seed: int, rank: int = 0, world: int = 1, shuffle: bool = True
    ) -> None:
        self.batch_size, self.seed, self.rank, self.world, self.shuffle = batch_size, seed, rank, world, shuffle
        # Each epoch shuffles the columns of a table of the pool, and then reads it row by row: so any `world` numbers
        # in a row belong to as many ranks, and each rank has the same share of every batch.
        self.columns = math.lcm(1 << max(min(count // 4, 64), 1).bit_length() - 1, world)
        self.total = count // self.columns * self.columns
        self.own = count // world
        self.clock = 0  # samples seen by all ranks together
        if shuffle and self.total < batch_size * world:
            raise UserError(f"a pool of {count} scenes gives no batch of {batch_size} to each of {world} processes")

    def __len__(self) -> int:
        return self.total // (self.batch_size * self.world) if self.shuffle else -(-self.own // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if not self.shuffle:
            draws = self._epoch(0)[1]
            for rows in torch.arange(self.own).split(self.batch_size):
                yield {"rows": rows, "draws": draws[rows % self.total]}
            return
        together = self.batch_size * self.world
        for _ in range(len(self)):
            epoch, position = divmod(self.clock, self.total)
            self.clock += together
            parts = [tuple(column[position : position + together] for column in self._epoch(epoch))]
            if short := together - len(parts[0][0]):
                parts.append(tuple(column[:short] for column in self._epoch(epoch + 1)))
            index, draws = (torch.cat(column) for column in zip(*parts, strict=True))
            own = index % self.world == self.rank
            yield {"rows": index[own] // self.world, "draws": draws[own]}

    def _epoch(self, epoch: int) -> tuple[Tensor, Tensor]:
        """The order of an epoch and the random numbers that go with it."""
        if getattr(self, "_cached", (None,))[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            table = torch.rand(self.total // self.columns, self.columns, generator=generator).argsort(0)
            order = (table * self.columns + torch.arange(self.columns)).flatten()
            self._cached = epoch, order, torch.randint(2**31, (self.total,), generator=generator)
        return self._cached[1:]

    def state_dict(self) -> dict[str, int]:
        return {"samples": self.clock, "total": self.total, "columns": self.columns}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.clock = state["samples"]
        if (state["total"], state["columns"]) != (self.total, self.columns):  # another order: its next epoch
            self.clock = (self.clock // state["total"] + 1) * self.total


@dataclass
class Pool:
    """Rendered scenes on a device: tensors with one row a scene, and the scenes themselves."""

    scenes: Scenes
    tensors: dict[str, Tensor] = field(default_factory=dict)
    captions: list[list[str]] = field(default_factory=list)


class RenderedWorld(L.LightningDataModule):
    """Batches of rendered scenes: image or video (or latent), scenes, instance masks, captions and their tokens.

    Args:
        recipes: what to draw, as recipe names with their shares of the pool.
        pool: scenes rendered before training starts, over all ranks.
        batch_size: scenes per batch and rank.
        val_pool: scenes of split "val" for validation, over all ranks.
        val_batch_size: scenes per validation batch.
        seed: of the scenes and of their order.
        size: pixels of the square pictures.
        frames: pictures per scene; more than one renders videos.
        captions: captions kept per scene; 0 for none.
        tokenizer: folder of the tokenizer that turns captions into "tokens" (B L).
        autoencoder: folder of an autoencoder; training batches then hold "latent", scaled as a diffusion model sees it.
        clip: folder of a base; batches then hold its image encoder's "image_embedding" (B D, of length 1).
        twins: whether batches also hold "twin_tokens" (B L), the same captions wrong in one fact.
        masks: whether batches hold the instance mask "instance" (B H W, 0 the background).
        workers: processes that write captions; 0 writes them in the training process.
        held_out: share of the training pool from split "test", whose combinations and styles nothing else is trained
            on: for a judge, who has to know them.
    """

    def __init__(
        self,
        recipes: dict[str, float] = {"base": 1.0},  # noqa: B006 (jsonargparse reads the default; it is never changed)
        pool: int = 100_000,
        batch_size: int = 256,
        val_pool: int = 1024,
        val_batch_size: int = 256,
        seed: int = 0,
        size: int = 64,
        frames: int = 1,
        captions: int = 0,
        tokenizer: str | None = None,
        autoencoder: str | None = None,
        clip: str | None = None,
        twins: bool = False,
        masks: bool = False,
        workers: int = 8,
        held_out: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= held_out <= 1:
            raise UserError(f"held_out is a share of the pool, 0 to 1, not {held_out}")
        at_least(1, batch_size=batch_size, val_batch_size=val_batch_size, pool=pool, val_pool=val_pool)
        at_least(0, workers=workers)
        self.recipes, self.pool_size, self.batch_size = recipes, pool, batch_size
        self.val_pool_size, self.val_batch_size = val_pool, val_batch_size
        self.seed, self.size, self.frames, self.caption_count = seed, size, frames, captions
        self.tokenizer, self.autoencoder, self.masks, self.workers = tokenizer, autoencoder, masks, workers
        self.clip, self.twins, self.held_out = clip, twins, held_out
        self.train_pool: Pool | None = None
        self.val_pool: Pool | None = None

    def setup(self, stage: str) -> None:
        trainer = self.trainer
        device = trainer.strategy.root_device
        if stage == "fit" and self.train_pool is None:
            self.train_pool = self._fill("train", self.pool_size, trainer.global_rank, trainer.world_size, device)
        if self.val_pool is None:
            self.val_pool = self._fill("val", self.val_pool_size, trainer.global_rank, trainer.world_size, device)

    def train_dataloader(self) -> Draws:
        return self._draws(self.pool_size, self.batch_size, shuffle=True)

    def val_dataloader(self) -> Draws:
        return self._draws(self.val_pool_size, self.val_batch_size, shuffle=False)

    def _draws(self, count: int, batch_size: int, shuffle: bool) -> Draws:
        return Draws(count, batch_size, self.seed, self.trainer.global_rank, self.trainer.world_size, shuffle)

    def transfer_batch_to_device(
        self, batch: dict[str, Tensor], device: torch.device, dataloader_idx: int
    ) -> dict[str, Any]:
        """Turn positions into what stands there."""
        pool = self.train_pool if self.trainer.training else self.val_pool
        rows = batch["rows"].to(device, non_blocking=True)
        found: dict[str, Any] = {name: tensor[rows] for name, tensor in pool.tensors.items()}
        for name in ("image", "video"):
            if name in found:
                found[name] = found[name].float() / 127.5 - 1
        if "tokens" in found:  # a scene has several captions; which one a visit sees changes with the epoch
            pick = batch["draws"].to(device, non_blocking=True) % found["tokens"].shape[1]
            for name in {"tokens", "twin_tokens"} & found.keys():
                found[name] = found[name][torch.arange(len(rows), device=device), pick].long()
        if pool.captions and not self.trainer.training:
            found["caption"] = [pool.captions[i][0] for i in batch["rows"].tolist()]
        return {**found, "scenes": pool.scenes[rows]}

    def _fill(self, split: str, size: int, rank: int, world: int, device: torch.device) -> Pool:
        jobs = self._jobs(split, size, rank, world)
        train = split == "train"
        keep_images = not (train and self.autoencoder)
        encoder = _load_autoencoder(self.autoencoder, device) if self.autoencoder else None
        clip = CLIPEncoders(self.clip).to(device) if self.clip else None
        columns: dict[str, list[Tensor]] = {}
        scenes: list[Scenes] = []
        # captions are written by other processes while this one renders
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(max(self.workers, 1), context, initializer=interrupts.die_with_parent) as processes:
            rest = (self.seed, self.caption_count, self.tokenizer, self.twins)
            written = []
            if self.caption_count and self.workers:
                written = [processes.submit(write_captions, *job, *rest) for job in jobs]
            progress = tqdm(total=size // world, desc=f"rendering {split} scenes", unit=" scenes", disable=rank > 0)
            for recipe, chunk, source in jobs:
                part, pictures = self._render(recipe, source, chunk.to(device), encoder, clip, keep_images)
                scenes.append(part)
                for name, tensor in pictures.items():
                    columns.setdefault(name, []).append(tensor)
                progress.update(len(chunk))
                if interrupts.received is not None:
                    processes.shutdown(cancel_futures=True)
                    raise SystemExit(interrupts.PAUSED)
            progress.close()
            results = [job.result() for job in written]
        if self.caption_count and not self.workers:
            results = [write_captions(*job, *rest) for job in jobs]
        pool = Pool(Scenes.cat(scenes), {name: torch.cat(parts) for name, parts in columns.items()})
        for name in results[0][1] if results else ():
            pool.tensors[name] = torch.cat([tokens[name] for _, tokens in results]).to(device)
        if results and not train:
            pool.captions = [texts for chunk, _ in results for texts in chunk]
        return pool

    def _jobs(self, split: str, size: int, rank: int, world: int) -> list[tuple[str, Tensor, str]]:
        """Chunks (recipe, indices, split) of this rank's share; the recipes divide the pool's range of indices."""
        total, size = sum(self.recipes.values()), size // world * world
        counts = [int(size * share / total) for share in self.recipes.values()]
        counts[0] += size - sum(counts)
        ranges = zip(self.recipes, torch.arange(size).split(counts), strict=True)
        size, jobs = max(_CHUNK // self.frames, 1), []
        for recipe, index in ranges:
            kept = len(index) - (round(self.held_out * len(index)) if split == "train" else 0)
            for part, source in ((index[:kept], split), (index[kept:], "test")):
                jobs += [(recipe, c, source) for c in part[part % world == rank].split(size) if len(c)]
        return jobs

    @torch.no_grad()
    def _render(
        self, recipe: str, split: str, index: Tensor, encoder: Any, clip: CLIPEncoders | None, keep_images: bool
    ) -> tuple[Scenes, dict[str, Tensor]]:
        scenes = sample(recipe, split, self.seed, index)
        if self.frames == 1:  # a moving scene as its clip begins, where "moves left" and "moves right" look different
            scenes = animate(scenes, torch.zeros(1))
            picture = render.render(scenes, self.size)
        else:
            picture = render.render_video(scenes, self.frames, self.size)
        columns: dict[str, Tensor] = {}
        if keep_images:
            name = "image" if self.frames == 1 else "video"
            columns[name] = (picture.rgb.clamp(0, 1) * 255).round().byte()
        if encoder is not None:
            images = picture.rgb.flatten(0, -4) * 2 - 1
            with torch.autocast(index.device.type, torch.bfloat16, enabled=index.is_cuda):
                latent = torch.cat([encoder.encode(i).latent_dist.mean for i in images.split(_ENCODED)])
            latent = latent.float() * encoder.config.scaling_factor
            columns["latent"] = latent.half().unflatten(0, picture.rgb.shape[:-3])
        if clip is not None:
            columns["image_embedding"] = torch.cat([clip.embed_image(i) for i in (picture.rgb * 2 - 1).split(_ENCODED)])
        if self.masks:
            columns["instance"] = picture.instance.byte()
        return scenes, columns


def _load_autoencoder(folder: str, device: torch.device) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(folder, use_safetensors=True).to(device).eval()
