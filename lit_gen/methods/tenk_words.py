"""10k Words (arXiv 2312.00115): long videos found by any valid description, from a paragraph to a few words.

A dual encoder learns from one sampled caption per video beside the video's paragraph. There is no official code, and
the paper's equations are not public: where the card marks a reading as ours, it is a setting here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_gen.errors import UserError
from lit_gen.methods.base import Method, Optimizer
from lit_gen.retrieval import search
from lit_gen.retrieval.contrast import gather, nce
from lit_gen.retrieval.embeddings import Embeddings, fingerprint_of
from lit_gen.retrieval.evaluation import Gallery, evaluate, queries_of, summarise
from lit_gen.retrieval.ranking import Expansion
from lit_gen.retrieval.towers import FrameEncoder, TemporalPooling, TextEncoder, TextTower, VideoHead, VideoTower

Head = Literal["shared", "projected"]

_TEXTS_AT_ONCE = 256
_MAX_SCALE = 100.0  # CLIP's bound on one over the temperature


@dataclass
class Objective:
    """What is learned from a paragraph and a sampled caption of each video (card §3).

    Args:
        mix: f_t of the first loss, l_itc: the "paragraph" alone (the baseline "Domain"); for each video its paragraph
            or its caption, to "choose" at random; or a "blend" of both features.
        paragraph: chance, or weight, of the paragraph in the mix.
        projected: weight of l_proj, caption features through the projection theta_p against videos.
        text_to_text: weight of l_t2t, the same features against the paragraphs'.
        multi_positive: contrast the paragraph and every sampled caption with the video (SupCon), in place of the mix.
        exchanged: give each video the captions of another one, which no method can learn from; a control.
    """

    mix: Literal["paragraph", "choose", "blend"] = "choose"
    paragraph: float = 0.5
    projected: float = 1.0
    text_to_text: float = 1.0
    multi_positive: bool = False
    exchanged: bool = False


class TenKWords(Method):
    """Dual encoder for text-to-video retrieval.

    Args:
        vision: folder or Hub id of the CLIP vision model that reads frames.
        text: folder or Hub id of the text encoder (CLIP's, BERT, ...).
        tokenizer: folder or Hub id of its tokenizer; by default that of the text encoder.
        video_tower: how frames become a video's feature.
        text_tower: how texts become features.
        aligned: start from the space that the encoders, both parts of one CLIP, were trained to share, as the paper
            starts from a pretrained video-text model; else, or for unrelated encoders, from random heads.
        width: of the shared space; by default that of the encoders where they are aligned, else COSA's 512.
        temperature: at the start; it is learned, and never below 0.01.
        temperature_rate: times the learning rate with which it is learned: AdamW moves its logarithm by at most about
            the learning rate a step, with that of the weights hardly at all.
        objective: the losses.
        query_head: which head's feature of a query is compared with videos: the "shared" theta_t, or the "projected"
            theta_p after it. `test` compares R@1 of both where there is a theta_p ("R@1 projected").
        expansion: score queries in `test` also together with their paraphrases: the mean of the "features", or of the
            "scores" (probabilities); null for not at all.
        folders: folders of videos that `predict` searches.
        prompts: what `predict` searches for: descriptions of any kind.
        top: how many videos `predict` shows for each.
        frames: of a video, in `predict`.
        optimizer: settings of the optimizer.
    """

    def __init__(
        self,
        vision: str | None = "data/world-base/image_encoder",
        text: str | None = "data/world-base/text_encoder",
        tokenizer: str | None = None,
        video_tower: VideoTower = VideoTower(),
        text_tower: TextTower = TextTower(),
        aligned: bool = True,
        width: int | None = None,
        temperature: float = 0.07,
        temperature_rate: float = 10.0,
        objective: Objective = Objective(),
        query_head: Head = "shared",
        expansion: Expansion | None = None,
        folders: list[str] | None = None,
        prompts: list[str] | None = None,
        top: int = 5,
        frames: int = 18,
        optimizer: Optimizer = Optimizer(lr=2e-5, betas=(0.9, 0.98), clip_norm=5.0),
    ) -> None:
        super().__init__(optimizer)
        self.objective, self.query_head, self.expansion = objective, query_head, expansion
        self.folders, self.prompts, self.top, self.frames = folders or [], prompts or [], top, frames
        self.frame_encoder = FrameEncoder(vision, video_tower)
        self.text_encoder = TextEncoder(text, tokenizer, text_tower)
        frame, word = (self.frame_encoder.projection, self.text_encoder.projection) if aligned else (None, None)
        if aligned and (frame is None or word is None or len(frame) != len(word) or width not in (None, len(frame))):
            raise UserError(
                "the encoders share no space of model.width to start from; set model.init_args.aligned false"
            )
        width = width or (512 if frame is None else len(frame))
        pooling = TemporalPooling(self.frame_encoder.width, video_tower)
        self.video_head = VideoHead(pooling, width, frame)  # theta_v
        self.text_head = nn.Linear(self.text_encoder.width, width, bias=False)  # theta_t
        if word is not None:
            self.text_head.weight.data.copy_(word)
        projects = objective.projected > 0 or objective.text_to_text > 0
        if query_head == "projected" and not projects:
            raise UserError('query_head "projected" needs objective.projected or objective.text_to_text above 0')
        self.projection = nn.Linear(width, width) if projects else None  # theta_p
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))
        self.temperature_rate = temperature_rate
        self._gallery, self._queries = Gallery(), []
        self._embeddings: Embeddings | None = None
        self._index: search.Index | None = None

    def parameter_groups(self) -> list[dict[str, Any]]:
        """No decay of gains, biases and the temperature, and a learning rate of its own for that."""
        own = [p for p in self.trainable_parameters() if p is not self.log_scale]
        rate = self.temperature_rate * self.optimizer_settings.lr
        return [
            {"params": [p for p in own if p.ndim > 1]},
            {"params": [p for p in own if p.ndim <= 1], "weight_decay": 0.0},
            {"params": [self.log_scale], "weight_decay": 0.0, "lr": rate},
        ]

    # -- features -----------------------------------------------------------------------------------------------------

    @property
    def scale(self) -> Tensor:
        """One over the temperature."""
        return self.log_scale.exp().clamp(max=_MAX_SCALE)

    def embed_videos(self, batch: dict[str, Any]) -> Tensor:
        """f_v B D of "video" B F 3 H W (bytes, or in [-1, 1]), or of "frame_features" B F D'."""
        features = (
            batch["frame_features"] if "frame_features" in batch else self.encode_for_cache(batch)["frame_features"]
        )
        return self.video_head(features.to(self.text_head.weight.dtype))

    def embed_texts(self, texts: list[str]) -> Tensor:
        """f_gt or f_10k of B texts: B D."""
        return self.text_head(self.text_encoder(texts).to(self.text_head.weight.dtype))

    def cached_parts(self) -> dict[str, Any]:
        return {"frame_encoder": self.frame_encoder}

    def encode_for_cache(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Features B F D of every frame."""
        video = batch["video"]
        return {"frame_features": self.frame_encoder(video.flatten(0, 1)).unflatten(0, video.shape[:2])}

    # -- training -----------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        with torch.no_grad():  # as CLIP does, so that it can come back from the bound
            self.log_scale.clamp_(max=math.log(_MAX_SCALE))
        losses = self.losses(batch)
        weights = {"itc": 1.0, "proj": self.objective.projected, "t2t": self.objective.text_to_text}
        total = sum(weights[name] * loss for name, loss in losses.items())
        self.log_dict({f"train/{name}": loss.detach() for name, loss in losses.items()}, batch_size=len(batch["key"]))
        self.log("train/temperature", 1 / self.scale.detach(), batch_size=len(batch["key"]))
        self.log("train/loss", total, batch_size=len(batch["key"]))
        return total

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The losses of the card's §3 by name, over the batches of all ranks."""
        how, count = self.objective, len(batch["paragraph"])
        paragraphs, captions = batch["paragraph"], batch["captions"]
        if how.exchanged:
            captions = [*captions[1:], captions[0]]
        if not how.multi_positive and max(map(len, captions)) > 1:
            raise UserError("data.captions_per_video above 1 needs objective.multi_positive")
        ids = batch["video_id"].to(self.device)
        ids = gather(ids)
        videos = gather(self.embed_videos(batch))  # N D
        rows = torch.arange(len(videos), device=self.device)

        def against(a: Tensor, b: Tensor, row_a: Tensor = rows, id_a: Tensor = ids) -> Tensor:
            return nce(a, b, self.scale, row_a, rows, id_a, ids)

        if self.projection is None and not how.multi_positive and how.mix != "blend":
            # One text per video is all that is needed, so only that is encoded.
            chosen = [True] * count if how.mix == "paragraph" else (torch.rand(count) < how.paragraph).tolist()
            texts = [p if own else c[0] for own, p, c in zip(chosen, paragraphs, captions, strict=True)]
            return {"itc": against(gather(self.embed_texts(texts)), videos)}

        each = len(captions[0])
        told = self.embed_texts([*paragraphs, *(text for group in captions for text in group)])
        full = told[:count]  # f_gt, n D
        other = told[count:].unflatten(0, (count, each))  # f_10k, n K D
        found: dict[str, Tensor] = {}
        all_full = gather(full)
        if how.multi_positive:
            texts = gather(torch.cat([full[:, None], other], 1)).flatten(0, 1)  # N (1 + K) D
            repeated = rows.repeat_interleave(1 + each)
            found["itc"] = against(texts, videos, repeated, ids[repeated])
        else:
            found["itc"] = against(gather(self._mixed(full, other[:, 0])), videos)
        if self.projection is not None:
            projected = gather(self.projection(other[:, 0]))
            if how.projected > 0:
                found["proj"] = against(projected, videos)
            if how.text_to_text > 0:
                found["t2t"] = against(projected, all_full)
        return found

    def _mixed(self, full: Tensor, other: Tensor) -> Tensor:
        """f_t = Mix(f_gt, f_10k): n D."""
        how = self.objective
        if how.mix == "paragraph":
            return full
        if how.mix == "choose":
            chosen = torch.rand(len(full)) < how.paragraph
            return torch.where(chosen.to(full.device)[:, None], full, other)
        return how.paragraph * F.normalize(full, dim=-1) + (1 - how.paragraph) * F.normalize(other, dim=-1)

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._collect(batch, testing=False)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._collect(batch, testing=True)

    def on_test_epoch_start(self) -> None:
        module = self.trainer.datamodule
        known = {"set": module.test_fingerprint(), "frames": str(module.frames)} if module is not None else {}
        self._embeddings = Embeddings.open(self.run_dir / "embeddings", fingerprint_of(self), known)

    def on_validation_epoch_end(self) -> None:
        figures, _ = self._evaluate()
        shown = {n: v for n, v in figures.items() if n.endswith(("/R@1", "/R@1 of ceiling")) and "-" not in n}
        self.log_dict({f"val/{name}": value for name, value in shown.items()}, sync_dist=True)

    def on_test_epoch_end(self) -> None:
        figures, scores = self._evaluate()
        scores.write(self.run_dir)
        shown = {n: v for n, v in figures.items() if "unseen" not in n or n.startswith("mean")}  # all: scores.json
        self.log_dict({f"test/{name}": value for name, value in shown.items()}, sync_dist=True)
        self._embeddings.save()
        self._embeddings = None

    @torch.no_grad()
    def _collect(self, batch: dict[str, Any], testing: bool) -> None:
        keep = batch["valid"].tolist()
        stories = [story for story, valid in zip(batch["story"], keep, strict=True) if valid]
        keys = [key for key, valid in zip(batch["key"], keep, strict=True) if valid]
        ids = [story["id"] for story in stories]
        features = self._embeddings.videos(ids) if self._embeddings is not None else None
        if features is None:
            features = F.normalize(self.embed_videos(batch).float(), dim=-1).cpu()[batch["valid"].cpu()]
        if self._embeddings is not None:
            self._embeddings.add_videos(ids, features)
        self._gallery.add(ids, features, [story.get("truth") for story in stories])
        for story, key in zip(stories, keys, strict=True):
            found = queries_of(story, key, testing and self.expansion is not None)
            self._queries += found if testing else [q for q in found if q.wording == "seen"]

    @torch.no_grad()
    def _evaluate(self) -> tuple[dict[str, float], Any]:
        gallery, queries = self._gallery.gathered(), self._queries
        self._gallery, self._queries = Gallery(), []
        for query in queries:
            query.cut = self.text_encoder.cuts(query.text)
        features = self.embed_queries([q.text for q in queries])
        most = max((len(q.paraphrases) for q in queries), default=0)
        expanded = None
        if most:
            # Queries with fewer paraphrases count themselves again; those without are not scored as expanded.
            rows = [[q.text, *q.paraphrases, *[q.text] * (most - len(q.paraphrases))] for q in queries]
            expanded = self.embed_queries([text for row in rows for text in row]).unflatten(0, (len(rows), -1))
        projected = None
        if self._embeddings is not None and self.projection is not None:  # in `test`, where texts are not encoded twice
            projected = self.embed_queries([q.text for q in queries], "projected")
        how = self.expansion or "features"
        return summarise(evaluate(gallery, queries, features, expanded, projected, how, float(self.scale), self.device))

    @torch.no_grad()
    def embed_queries(self, texts: list[str], head: Head | None = None) -> Tensor:
        """Unit features Q D of queries, on the CPU, as a head gives them, by default `query_head`.

        Each different text is encoded once, texts of a length together.
        """
        unknown = sorted(set(texts), key=lambda text: (len(text), text))
        known: dict[str, Tensor] = {}
        if self._embeddings is not None:
            known = self._embeddings.texts(unknown)
            unknown = [text for text in unknown if text not in known]
        for start in range(0, len(unknown), _TEXTS_AT_ONCE):
            part = unknown[start : start + _TEXTS_AT_ONCE]
            known |= dict(zip(part, self.embed_texts(part).float().cpu(), strict=True))
        if self._embeddings is not None:
            self._embeddings.add_texts(known)
        found = torch.stack([known[text] for text in texts]) if texts else torch.zeros(0, self.text_head.out_features)
        if (head or self.query_head) == "projected":
            found = self.projection(found.to(self.text_head.weight)).float().cpu()
        return F.normalize(found, dim=-1)

    # -- prediction ---------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        if stage == "predict":  # else Lightning asks the experiment's data module, which knows no folders
            self.trainer.predict_loop._data_source.instance = self

    def predict_dataloader(self) -> DataLoader:
        """Videos of the folders that the index does not have yet.

        Raises:
            UserError: no folder, an empty description, a folder without videos, or several processes.
        """
        if self.trainer.world_size > 1:
            raise UserError(
                f"predict keeps one index, which {self.trainer.world_size} processes would overwrite for each other; "
                "add --trainer.devices 1 --trainer.num_nodes 1"
            )
        if not self.folders:
            raise UserError("predict searches folders of videos, and none was given (--folder FOLDER)")
        if any(not text.strip() for text in self.prompts):
            raise UserError("a --prompt to search for is empty; say what happens in the video")
        place = self.run_dir / "index"
        model = f"{fingerprint_of(self)} {self.frames} frames"
        self._index = search.Index.open(place, model, [Path(folder) for folder in self.folders])
        size = self.frame_encoder.size
        return DataLoader(search.NewVideos(self._index, self.frames, size), batch_size=None)

    def predict_step(self, video: tuple[str, Tensor | str], batch_idx: int) -> None:
        """Add one video to the index."""
        file, frames = video
        if isinstance(frames, Tensor):
            features = self.embed_videos({"video": frames[None].to(self.device)})
            self._index.add(file, F.normalize(features.float(), dim=-1)[0].cpu())
        elif file:
            self._index.leave_out(file, frames)

    def on_predict_epoch_end(self) -> None:
        """Save the index and answer: a table on the screen and in `answers.csv`, and a sheet of frames."""
        self._index.save()
        print(self._index.summary())
        if self.prompts:
            answers = self._index.find(self.embed_queries(self.prompts), self.top)
            folder = self.run_dir / "samples" / "predict"
            print(search.answer(self.prompts, answers, folder))
