"""StyleCrafter's `predict`: prompts in the style of pictures, drawn into the run folder."""

from __future__ import annotations

import logging
from functools import cached_property
from pathlib import Path

from torch import Tensor
from torch.utils.data import DataLoader

from lit_gen.callbacks.samples import save
from lit_gen.methods.base import Method
from lit_gen.methods.stylecrafter_judgement import seed_of
from lit_gen.methods.stylecrafter_requests import Request, read_requests, sheets

log = logging.getLogger(__name__)
PICTURES, CLIPS = 8, 2  # drawn together; ours, what fits beside a model of Stable Diffusion's size


class Prediction(Method):
    """What `predict` of StyleCrafter does; the method has the settings and draws."""

    prompts: list[str]
    styles: list[str]
    pairs: str | None
    frames: int
    frames_per_second: int
    negative: str

    @cached_property
    def _drawn(self) -> list[tuple[Request, list[Tensor]]]:
        return []

    def setup(self, stage: str) -> None:
        if stage == "predict":  # else Lightning asks the experiment's data module, which knows no prompts
            self.trainer.predict_loop._data_source.instance = self

    def predict_dataloader(self) -> DataLoader:
        """Each style with its prompts.

        Raises:
            UserError: no prompts or no styles, a reference that cannot be read, or a prompt that is too long.
        """
        requests = read_requests(self.prompts, self.styles, self.pairs, self.base.image_encoder.config.image_size)
        for prompt in {text for request in requests for text in request.prompts.values()} | {self.negative}:
            self.text([prompt], strict=True)
        return DataLoader(requests, batch_size=None)

    def on_predict_start(self) -> None:
        if not any(name.startswith("adapter.") for name in self._inherited):
            log.warning("the style adapter is not trained: neither a checkpoint nor model.adapter_weights has it")

    def predict_step(self, request: Request, batch_idx: int) -> list[Tensor]:
        """All prompts of one style, written to `samples/predict/` of the run folder."""
        texts, drawn = list(request.prompts.values()), []
        together = PICTURES if self.frames == 1 else CLIPS
        references = self.read(request.references[None].to(self.device))
        for start in range(0, len(texts), together):
            prompts = texts[start : start + together]
            views, seeds = references.expand(len(prompts)), [seed_of(p) for p in prompts]
            drawn += self.sample(prompts, views, seeds, self.frames, strict=True).cpu()
        for number, sample in zip(request.prompts, drawn, strict=True):
            save(self.predictions / f"{request.name}-{number:02d}", sample, self.frames_per_second)
        self._drawn.append((request, drawn))
        return drawn

    def on_predict_epoch_end(self) -> None:
        rank = f"-{self.global_rank}" if self.trainer.world_size > 1 else ""
        for page, sheet in enumerate(sheets(self._drawn)):
            name = f"contact-sheet{rank}{f'-{page}' if page else ''}"
            path = save(self.predictions / name, sheet, self.frames_per_second)
            print(f"drawn: {path}")
        self._drawn.clear()

    @property
    def predictions(self) -> Path:
        """Where `predict` writes."""
        return self.run_dir / "samples" / "predict"
