"""Synthetic captions of annotated videos by a language model: every level of a paragraph, checked before it is kept.

`python -m lit_gen data describe ANNOTATIONS.json --model FOLDER --out captions.jsonl` continues where it was, with the
model that captions.model.json names; what was refused, and why, stands in captions.refused.jsonl.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lit_gen.data.annotations import Annotated
from lit_gen.data.stories import split_sentences
from lit_gen.errors import UserError

logger = logging.getLogger(__name__)

_TASK = "Here is a description of a video:\n\n{source}\n\n{request} Answer with the text alone."
REQUESTS = {
    "short": "Say what the video is about in about six words, like a headline.",
    "medium": "Summarise it in one sentence of about ten words.",
    "long": "Summarise it in one fluent sentence of about fifteen words.",
    "elementary": "Tell the same for a young child: plain words, short sentences, and nothing left out or added.",
    "intermediate": "Say the same in other, ordinary words. Leave nothing out and add nothing.",
    "university": "Say the same in formal, academic language with rare words. Leave nothing out and add nothing.",
}
# Least and most words: of summaries, and of retellings as shares of the source's.
_SUMMARY = {"short": (2, 10), "medium": (4, 18), "long": (7, 30)}
_RETELLING = (0.4, 3.0)
_SAMPLED = 1024  # values of each weight that tell one model from another
_PREAMBLE = re.compile(r"^(sure|certainly|of course|okay|here is|here's|here are)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Work:
    """One caption to be written."""

    video: str
    level: str
    source: str  # text it is made from
    span: tuple[int, int] | None = None  # segments of the source, where it is not all of them

    @property
    def name(self) -> tuple[str, str]:
        return self.video, self.level

    @property
    def how(self) -> str:
        return self.level.partition("-")[2]


def plan(annotated: list[Annotated], partial: bool = True) -> Iterator[Work]:
    """Every level of every paragraph and, with `partial`, of one part of the video, chosen by its name."""
    for one in annotated:
        sources: list[tuple[str, str, tuple[int, int] | None]] = [("full", one.paragraph, None)]
        parts = one.partials() if partial else []
        if parts:
            part = parts[zlib.crc32(one.video.encode()) % len(parts)]
            sources.append(("partial", part["text"], tuple(part["span"])))
        for duration, source, span in sources:
            for how in REQUESTS:
                yield Work(one.video, f"{duration}-{how}", source, span)


@dataclass(frozen=True)
class Answer:
    """What a model said, and whether it stopped by itself."""

    text: str
    whole: bool


def refusal(text: str, work: Work, whole: bool = True) -> str | None:
    """Why an answer cannot be a caption; None if it can."""
    words, given = text.split(), work.source.split()
    if not words:
        return "empty"
    if "\n" in text or _PREAMBLE.match(text):
        return "not the text alone"
    if _plain(text) == _plain(work.source):
        return "a copy of the description"
    if _plain(text) in map(_plain, split_sentences(work.source)):
        return "a copy of one sentence of the description"
    if work.how in _SUMMARY:
        least, most = _SUMMARY[work.how]
    else:
        least, most = max(1, round(_RETELLING[0] * len(given))), round(_RETELLING[1] * len(given)) + 10
    if not least <= len(words) <= most:
        return f"{len(words)} words, not {least} to {most}"
    return None if whole else "cut off, as long as answers may be"


def _plain(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


class Writer:
    """A local instruct model that answers prompts.

    Args:
        folder: of a transformers causal language model and its tokenizer.
        device: where it runs.
    """

    def __init__(self, folder: str | Path, device: str = "cpu") -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if not Path(folder).is_dir():
            raise UserError(f"--model {folder}: no such folder")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
            dtype = torch.bfloat16 if device != "cpu" else torch.float32
            self.model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, dtype=dtype).to(device)
        except (OSError, ValueError) as error:
            raise UserError(f"--model {folder}: no language model: {str(error).splitlines()[0]}") from None
        self.model.eval()
        self.name = str(folder)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def fingerprint(self) -> str:
        """sha256 of the beginning of every weight, the same on every device."""
        digest = hashlib.sha256()
        for name, weight in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tuple(weight.shape)}\n".encode())
            start = weight.flatten()[:_SAMPLED].to("cpu", torch.bfloat16).contiguous()
            digest.update(start.view(torch.uint8).numpy())
        return digest.hexdigest()

    @torch.no_grad()
    def answer(self, prompts: list[str], longest: int, seed: int, greedy: bool) -> list[Answer]:
        """One answer for each prompt, the same each time."""
        if getattr(self.tokenizer, "chat_template", None):
            prompts = [
                self.tokenizer.apply_chat_template(
                    [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
                )
                for prompt in prompts
            ]
        given = self.tokenizer(prompts, return_tensors="pt", padding=True).to(self.model.device)
        tokens = {name: given[name] for name in ("input_ids", "attention_mask")}
        choice: dict[str, Any] = (
            {"do_sample": False} if greedy else {"do_sample": True, "temperature": 0.7, "top_p": 0.9}
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            found = self.model.generate(
                **tokens, **choice, max_new_tokens=longest, pad_token_id=self.tokenizer.pad_token_id
            )
        found = found[:, tokens["input_ids"].shape[1] :]
        ends = torch.tensor(self._ends(), device=found.device)
        whole = (torch.isin(found, ends).any(1) | (found.shape[1] < longest)).tolist()
        texts = self.tokenizer.batch_decode(found, skip_special_tokens=True)
        return [Answer(_unquoted(text), stopped) for text, stopped in zip(texts, whole, strict=True)]

    def _ends(self) -> list[int]:
        """Tokens that end an answer; a model may have several."""
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return [token for token in {*ends, self.tokenizer.eos_token_id} if token is not None]


def _unquoted(text: str) -> str:
    text = text.strip()
    return text[1:-1].strip() if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text


def describe(
    annotated: list[Annotated],
    writer: Writer,
    out: str | Path,
    batch_size: int = 8,
    attempts: int = 3,
    partial: bool = True,
    again: bool = False,
) -> tuple[int, int]:
    """Write the captions that are not in `out` yet; returns how many were written and how many refused for good.

    The first attempt is greedy, later ones are drawn; each depends on the caption alone, so that an interrupted run
    ends as an uninterrupted one. With `again`, what was refused is tried once more, with answers drawn anew.

    Raises:
        UserError: `out` was begun with another model, or has a line that is none of its own.
    """
    out = Path(out)
    refused_file = out.with_suffix(".refused.jsonl")
    done, refused_before = _done(out), _done(refused_file)
    _keep_to_model(out, writer, bool(done or refused_before))
    if again:
        refused_file.unlink(missing_ok=True)  # each is written or refused anew
    else:
        done |= refused_before
    todo = [work for work in plan(annotated, partial) if work.name not in done]
    written = refused = 0
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", encoding="utf-8") as kept, refused_file.open("a", encoding="utf-8") as log:
        for start in range(0, len(todo), batch_size):
            waiting = todo[start : start + batch_size]
            for attempt in range(attempts):
                again = []
                answers = _answers(writer, waiting, attempt + (attempts if again else 0))
                for work, answer in zip(waiting, answers, strict=True):
                    text, reason = answer.text, refusal(answer.text, work, answer.whole)
                    if reason is None:
                        span = {"span": work.span} if work.span else {}
                        _append(kept, {"video": work.video, "level": work.level, "text": text, **span})
                        written += 1
                    elif attempt + 1 < attempts:
                        again.append(work)
                    else:
                        _append(log, {"video": work.video, "level": work.level, "text": text, "reason": reason})
                        refused += 1
                waiting = again
                if not waiting:
                    break
            logger.info("described %d of %d, %d refused", start + batch_size, len(todo), refused)
    return written, refused


def _keep_to_model(out: Path, writer: Writer, begun: bool) -> None:
    """Write down whose captions a file has; UserError where they are another model's."""
    file, model = out.with_suffix(".model.json"), {"model": writer.name, "weights": writer.fingerprint()}
    if file.is_file():
        was = json.loads(file.read_text())
        if was["weights"] != model["weights"]:
            raise UserError(f"{out} has the captions of another model ({was['model']}); choose another --out")
        return
    if begun:
        logger.warning("%s does not tell whose captions it has; taken to be those of %s", out, writer.name)
    out.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(model))


def _answers(writer: Writer, waiting: list[Work], attempt: int) -> list[Answer]:
    prompts = [_TASK.format(source=work.source, request=REQUESTS[work.how]) for work in waiting]
    most = max(
        _SUMMARY[w.how][1] if w.how in _SUMMARY else round(_RETELLING[1] * len(w.source.split())) for w in waiting
    )
    if attempt == 0:
        return writer.answer(prompts, 3 * most + 16, 0, greedy=True)
    return [  # one by one: what is drawn would depend on the others of a batch
        writer.answer([prompt], 3 * most + 16, zlib.crc32(f"{work.name}{attempt}".encode()), greedy=False)[0]
        for prompt, work in zip(prompts, waiting, strict=True)
    ]


def _append(stream: Any, row: dict[str, Any]) -> None:
    stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    stream.flush()


def _done(file: Path) -> set[tuple[str, str]]:
    """What a file has; a last line that a killed run left unfinished is removed."""
    if not file.is_file():
        return set()
    data = file.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with file.open("r+b") as stream:
            stream.truncate(len(whole))
            os.fsync(stream.fileno())
    names = set()
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            row = json.loads(line)
            names.add((row["video"], row["level"]))
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{file}:{number}: not an object with `video` and `level`; remove the line") from None
    return names
