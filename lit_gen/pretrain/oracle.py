"""Trains the oracle on rendered scenes, in two stages: pictures, then videos on the frozen picture reader."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_gen.methods.base import Method, Optimizer
from lit_gen.metrics.degradation import degrade
from lit_gen.metrics.evaluate import judge, judge_motion
from lit_gen.metrics.network import EMBEDDING
from lit_gen.metrics.oracle import MOVES_ITSELF, Oracle
from lit_gen.metrics.supervision import WEIGHTS, Targets, arrange, losses, match, targets

_SUBJECT_SCALE, _SUBJECT_MARGIN = 16.0, 0.15  # sharpness of the subject classifier and its margin (ours)


class OracleTraining(Method):
    """Supervised training of the oracle. Batches come from `RenderedWorld(masks=True)`: images or videos.

    Args:
        read: what is trained, the reader of images, or the motion head over its frozen readings of frames.
        oracle: the network.
        subjects: proxies for telling subjects apart; ids share one only when their difference is a multiple of this.
        damage: strength of blur, noise, colour shifts and codec artefacts on training pictures; 0 for none.
        export: folder the oracle is written to when a fit ends; null writes nothing.
        optimizer: settings of the optimizer.
    """

    def __init__(
        self,
        read: Literal["images", "videos"] = "images",
        oracle: Oracle | None = None,
        subjects: int = 65536,
        damage: float = 1.0,
        export: str | None = None,
        optimizer: Optimizer = Optimizer(lr=2e-3, warmup_steps=200, schedule="cosine", weight_decay=0.02),
    ) -> None:
        super().__init__(optimizer)
        self.read, self.damage, self.export = read, damage, export
        self.oracle = (oracle or Oracle()).to(memory_format=torch.channels_last)
        self.proxies = nn.Parameter(torch.randn(subjects, EMBEDDING))
        self.oracle.image.requires_grad_(read == "images")
        self.oracle.video.requires_grad_(read == "videos")
        self.proxies.requires_grad_(read == "images")

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss, parts = self._images(batch) if self.read == "images" else self._videos(batch)
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:  # not at every step: there are two dozen
            self.log_dict({f"train/{name}": value.detach() for name, value in parts.items()})
        self.log("train/loss", loss.detach())
        return loss

    def _images(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        truth = targets(batch["scenes"], batch["instance"])
        image = degrade(batch["image"], strength=self.damage) if self.damage else batch["image"]
        out = self.oracle.image(image.contiguous(memory_format=torch.channels_last))
        order = match(out, truth)
        parts = losses(out, truth, order)
        parts["subject"] = self._subject(arrange(out["embedding"], order)[:, 0], truth)  # subjects come first
        return sum(WEIGHTS[name] * value for name, value in parts.items()), parts

    def _subject(self, embedding: Tensor, truth: Targets) -> Tensor:
        """Cosine softmax with a margin over the subjects' proxies (CosFace, Wang et al. 2018). embedding: B 64."""
        valid = truth.subject[:, 0] >= 0
        label = truth.subject[:, :1].clamp(min=0) % len(self.proxies)
        cosine = F.normalize(embedding.float(), dim=-1) @ F.normalize(self.proxies.float(), dim=-1).T
        logits = _SUBJECT_SCALE * cosine.scatter_add(1, label, cosine.new_full(label.shape, -_SUBJECT_MARGIN))
        loss = F.cross_entropy(logits, label[:, 0], reduction="none")
        return (loss * valid).sum() / valid.sum().clamp(min=1)

    def _videos(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        video, scenes = batch["video"], batch["scenes"]
        frames = video.shape[1]
        if self.damage:
            video = degrade(video.flatten(0, 1), frames, self.damage).unflatten(0, (-1, frames))
        with torch.no_grad():
            out = self.oracle.look(video.flatten(0, 1))
            first = {name: value.unflatten(0, (-1, frames))[:, 0] for name, value in out.items()}
            order = match(first, targets(scenes, batch["instance"][:, 0]))
        head = self.oracle.motion_of(video, out)
        moves = scenes.mover >= 0
        for motion, itself in enumerate(MOVES_ITSELF):
            moves = moves & ((scenes.motion != motion) | itself)
        slot = order.gather(1, scenes.mover.clamp(min=0)[:, None]).squeeze(1)
        mover = F.cross_entropy(head["mover"].float(), slot, reduction="none")
        parts = {
            "motion": F.cross_entropy(head["motion"].float(), scenes.motion.clamp(min=0)),
            "mover": (mover * moves).sum() / moves.sum().clamp(min=1),
        }
        return parts["motion"] + 0.5 * parts["mover"], parts

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        if self.read == "images":
            found = judge(self.oracle, batch["image"], batch["scenes"], batch["instance"])
        else:
            found = judge_motion(self.oracle, batch["video"], batch["scenes"])
        for name, (total, count) in found.items():
            if count:
                self.log(f"val/{name}", total / count, batch_size=int(count), sync_dist=True)

    def on_fit_end(self) -> None:
        if self.export and self.global_rank == 0:
            self.oracle.save_pretrained(self.export)
