"""Editing by score distillation: ASD with a discriminator for each prompt (arXiv 2312.00739), DDS, CDS and SDS.

`Edits` moves the latents of source pictures from their own prompts to others, all of them in one batch.
"""

from __future__ import annotations

import csv
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_gen.callbacks.samples import contact_sheet
from lit_gen.data.images import read_picture
from lit_gen.diffusion.text import encode_text
from lit_gen.distillation.contract import Prompts, Score, ScoreDistillation, Timesteps
from lit_gen.distillation.editing import CDS, DDS, DualASD, OriginReal
from lit_gen.distillation.pictures import DistilledPictures, FrozenDtype
from lit_gen.distillation.players import UNetTeacher, grow_discriminator
from lit_gen.distillation.siblings import ASD, SDS
from lit_gen.errors import UserError, at_least
from lit_gen.methods.asd import numbered, picture_shape
from lit_gen.methods.base import Optimizer
from lit_gen.metrics.counterparts import CHANGES, WorldEdits
from lit_gen.world.render import render

COLUMNS = ("source", "prompt", "target")
# AdamW with an epsilon far above any gradient is momentum descent: its steps are proportional to gradients, so what the
# teacher does not ask to change stays. Adam's own would move every number as far.
_EPSILON = 1e3


@dataclass
class Edit:
    """One edit.

    Args:
        source: picture file.
        prompt: what it shows.
        target: what it is to show.
    """

    source: str
    prompt: str
    target: str


class Edits(DistilledPictures):
    """Text-guided editing of pictures, without training data.

    Args:
        base: Hub id, diffusers folder or single-file checkpoint of the teacher.
        edits: what to edit; by default that of `world`.
        table: the same as a .csv with columns source (a file, from the table's folder on), prompt and target.
        world: edits of the world, whose results are known.
        negative: the null prompt of the guidance.
        sibling: "asd" (dual discriminators), "dds", "cds", or "sds" from the source picture on.
        kind: of the discriminators of asd: "lora", or a learnable text "embedding" of each prompt.
        rank: of the LoRA.
        gamma: of asd, see lit_gen.distillation.siblings.ASD.
        eta: of asd, weight of the real samples' penalty.
        origin_real: of asd, what the source prompt's discriminator is shown as real, the "edit" or the "source"; see
            lit_gen.distillation.editing.DualASD.
        discriminator_lr: learning rate of the discriminators.
        discriminator_weight_decay: decay of the discriminators towards the teacher.
        contrast_weight: of cds (official code 3).
        score: guidance, weighting and timesteps.
        oracle: folder of the oracle that judges edits of the world; null for none.
        frozen_dtype: precision that the teacher's network is kept in. "bfloat16" with `precision: bf16-mixed` saves the
            casts of every pass and memory; what is trained stays float32.
        optimizer: settings of the optimizer; `lr` is the step of an edit's latents in units of the gradient w (e - b).
    """

    def __init__(
        self,
        base: str = "data/world-base",
        edits: list[Edit] | None = None,
        table: str | None = None,
        world: WorldEdits = WorldEdits(),
        negative: str = "",
        sibling: Literal["asd", "dds", "cds", "sds"] = "asd",
        kind: Literal["lora", "embedding"] = "lora",
        rank: int = 4,
        gamma: float = -1.0,
        eta: float = 0.5,
        origin_real: OriginReal = "edit",
        discriminator_lr: float = 1e-4,
        discriminator_weight_decay: float = 0.0,
        contrast_weight: float = 3.0,
        score: Score = Score(guidance=7.5, weighting="uniform", timesteps=Timesteps(low=0.05, high=0.95)),
        oracle: str | None = None,
        frozen_dtype: FrozenDtype = "float32",
        optimizer: Optimizer = Optimizer(lr=0.05, betas=(0.0, 0.99), weight_decay=0.0, clip_norm=0.0),
    ) -> None:
        at_least(1, rank=rank)
        at_least(0, contrast_weight=contrast_weight)
        super().__init__(base, discriminator_lr, discriminator_weight_decay, oracle, frozen_dtype, optimizer)
        self.truth: Tensor | None = None
        if edits is not None and table is not None:
            raise UserError("give edits or a table of them, not both")
        wanted = edits if table is None else read_edits(table)
        if wanted is None:
            self.prompts, self.targets, before, self.after, self.changed = world.draw()
            pictures = render(before).rgb * 2 - 1
            self.truth = render(self.after).rgb * 2 - 1
            self.sources = [f"{world.split} picture {world.seed}-{i} of the world" for i in range(world.count)]
        else:
            if not wanted:
                raise UserError("edits: there are none")
            self.prompts, self.targets = [e.prompt for e in wanted], [e.target for e in wanted]
            pictures = torch.stack(
                [read_picture(Path(e.source), picture_shape(self.base)[1], "source") for e in wanted]
            )
            # by content: a folder may move, and another picture may take a file's name
            self.sources = [f"picture {hashlib.sha256(Path(e.source).read_bytes()).hexdigest()[:12]}" for e in wanted]
        self.register_buffer("originals", pictures, False)
        for name, texts in (("source", self.prompts), ("target", self.targets), ("null", [negative])):
            self.register_buffer(name, encode_text(self.base.tokenizer, self.base.text_encoder, texts), False)
        with torch.no_grad():
            mean = self.base.encode_mean(pictures.to(self.base.vae.device))
        self.register_buffer("start", mean, False)
        self.latents = nn.Parameter(mean.clone())
        self.distillation = self._sibling(sibling, score, kind, rank, contrast_weight, gamma, eta, origin_real)

    def _sibling(
        self,
        name: str,
        score: Score,
        kind: Any,
        rank: int,
        contrast_weight: float,
        gamma: float,
        eta: float,
        origin_real: OriginReal,
    ) -> ScoreDistillation:
        common = (UNetTeacher(self.base.unet, self.schedule), self.schedule, score)
        if name == "sds":
            return SDS(*common)
        if name == "dds":
            return DDS(*common)
        if name == "cds":
            return CDS(*common, self.base.unet, contrast_weight)
        texts = (self.target, self.source)
        self.discriminators = [grow_discriminator(kind, self.base.unet, self.schedule, text, rank) for text in texts]
        players = [ASD(*common, phi, gamma, eta) for phi in self.discriminators]
        return DualASD(*common, *players, origin_real)

    def parameter_groups(self) -> list[dict[str, Any]]:
        pictures, *others = super().parameter_groups()
        return [pictures | {"lr": pictures["lr"] * _EPSILON, "eps": _EPSILON}, *others]

    # -- training -----------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self.remember(self.latents)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        null = self.null.expand(len(batch), -1, -1)
        prompts = Prompts(self.target[batch], null, self.source[batch], index=batch)
        if isinstance(self.distillation, DDS):
            self.distillation.source = self.start[batch]
        step = self.distillation(self.latents[batch], prompts, self.global_step)
        self.log_dict({f"train/{name}": value for name, value in step.logs.items()}, batch_size=len(batch))
        # the contract's gradient is a mean over the batch; how many edits are made together shall not matter
        generator = step.generator * len(batch)
        return generator if step.discriminator is None else generator + step.discriminator

    # -- judgement ----------------------------------------------------------------------------------------------------

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        if self.truth is not None:
            found = self.judge(self.pictures())
            self.scores.add(
                numbered(self.targets), **{name.replace(" ", "_"): values for name, values in found.items()}
            )
            means = {name: values[~values.isnan()].mean() for name, values in found.items()}
            seen = {name: mean for name, mean in means.items() if mean == mean}
            self.log_dict(seen, batch_size=len(batch), sync_dist=True)  # all processes have seen the same

    def judge(self, pictures: Tensor) -> dict[str, Tensor]:
        """Measures of edits of the world, each of B values: likeness to the true result and to the source where
        nothing was to change, and what the oracle reads."""
        truth = self.truth.to(pictures.device)
        kept = (truth - self.originals).abs().amax(1, keepdim=True) < 0.02  # pixels that the true edit leaves alone
        moved = (
            ((pictures - self.originals).square() * kept).sum((1, 2, 3)) / (3 * kept.sum((1, 2, 3)).clamp(min=1))
        ).sqrt()
        found = {"psnr": psnr(pictures, truth), "psnr of source": psnr(self.originals, truth), "moved elsewhere": moved}
        if self._oracle:
            from lit_gen.metrics.oracle import bundled

            reading = bundled(self._oracle).to(pictures.device).read(pictures)
            seen = reading.present.any(1)
            slot = reading.present.float().argmax(1, keepdim=True)
            names = {column: name for name, (column, _) in CHANGES.items()}
            right = {
                n: seen & (getattr(reading, c).gather(1, slot)[:, 0] == getattr(self.after, c)[:, 0].to(slot.device))
                for c, n in names.items()
            }
            rows = torch.arange(len(pictures), device=pictures.device)
            changed = torch.tensor([list(right).index(c) for c in self.changed], device=pictures.device)
            table = torch.stack([*right.values()], 1).float()  # B x attributes
            found["edit made"] = table[rows, changed]
            found["rest kept"] = (table.sum(1) - table[rows, changed]) / (table.shape[1] - 1)
        return found

    def preview(self) -> dict[str, Tensor]:
        """Rows of source, edit over time, edit and, in the world, the true result."""
        moments = [self.base.decode(latents.to(self.device)) for latents in self.strips[1:]]
        columns = [self.originals, *moments, self.pictures(), *([] if self.truth is None else [self.truth])]
        rows = [[column[i].cpu() for column in columns] for i in range(len(self.latents))]
        titles = ["source", *[""] * len(moments), "edit", *([] if self.truth is None else ["truth"])]
        return {"edits": contact_sheet(rows, columns=titles, rows=self.targets, size=max(64, self.originals.shape[-1]))}

    def subjects(self) -> list[str]:
        told = zip(self.sources, self.prompts, self.targets, strict=True)
        return [f"{source} from {prompt!r} to {target!r}" for source, prompt, target in told]

    def name(self, index: int) -> str:
        return f"{index:02d}"


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of pictures B 3 H W in [-1, 1]: B."""
    return -10 * torch.log10(((a - b) / 2).square().flatten(1).mean(1).clamp(min=1e-10))


def read_edits(table: str) -> list[Edit]:
    """Edits of a .csv with columns source (a file, from the table's folder on), prompt and target.

    Raises:
        UserError: no such table, or a column, value or file is missing.
    """
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
                raise UserError(f"{table}: has no column {missing[0]!r}; it needs {', '.join(COLUMNS)}")
            edits = []
            for row in reader:
                values = {name: (row[name] or "").strip() for name in COLUMNS}
                if empty := [name for name, value in values.items() if not value]:
                    raise UserError(f"{table}, line {reader.line_num}: the {empty[0]} is empty")
                values["source"] = str(Path(table).parent / values["source"])
                if not Path(values["source"]).is_file():
                    raise UserError(f"{table}, line {reader.line_num}: source {values['source']!r}: no such file")
                edits.append(Edit(**values))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{table!r}: not a table that can be read ({type(error).__name__})") from error
    return edits
