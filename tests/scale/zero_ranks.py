"""Trainings that tests of tests/scale compare, in one process or in a pair of them over gloo.

`python tests/scale/zero_ranks.py BASE FOLDER [CASE...]` is one of a pair; starting a pair costs more than any case.
"""

from __future__ import annotations

import gc
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import lightning.pytorch as L
import torch
import torch.distributed as dist
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.accelerators import CPUAccelerator
from normed import interrupted, validated_apart
from pair import run_twice
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lit_gen.callbacks.checkpoint import AtomicCheckpointIO, Checkpoint
from lit_gen.callbacks.ema import EMA
from lit_gen.diffusion.style_adapter import Adapter
from lit_gen.errors import UserError
from lit_gen.methods.base import Optimizer
from lit_gen.methods.stylecrafter import StyleCrafter
from lit_gen.scale import ddp, peers
from lit_gen.scale.ddp import DDP, Averaging, AveragingByCopies, AveragingInPlace
from lit_gen.scale.zero import ZeRO

GLOBAL_BATCH, STEPS, MIDDLE = 4, 4, 2
BUCKET = 20_000  # numbers, so that there are several buckets
RANK, WORLD = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # Lightning will forget them


def in_files(numel: int, dtype: torch.dtype, device: torch.device, group: Any) -> peers.Shared:
    """What `lit_gen.scale.peers.share` does between GPUs, between processes on a CPU."""
    folder = [tempfile.mkdtemp() if RANK == 0 else None]
    dist.broadcast_object_list(folder)
    vectors = {}
    for ranks in ([RANK], [rank for rank in range(WORLD) if rank != RANK]):  # one's own is made, and others' opened
        for rank in ranks:
            path = f"{folder[0]}/{rank}"
            vectors[rank] = torch.from_file(path, shared=True, size=max(numel, 1), dtype=dtype)[:numel]
        dist.barrier()
    return peers.Shared(vectors.pop(RANK), vectors, dist.barrier)


class CPUZeRO(ZeRO):
    """ZeRO over gloo: DeepSpeed itself runs on CPUs, only Lightning and we want GPUs for it."""

    accelerators = (CPUAccelerator,)

    def setup_distributed(self) -> None:
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", self.local_rank)  # DeepSpeed wants an index


class GlobalDraws(TorchFunctionMode):
    """Random numbers of a process as its share of those that one process would draw for the global batch."""

    def __init__(self, rank: int, world: int) -> None:
        super().__init__()
        self.rank, self.world = rank, world

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.randn_like:
            func, args = torch.randn, (args[0].shape,)
        elif func not in (torch.randn, torch.rand, torch.randint):
            return func(*args, **kwargs)
        *bounds, size = args if isinstance(args[-1], tuple | list) else ([], args)[1:]
        size = tuple(size) if isinstance(size, tuple | list) else (size,)
        return func(*bounds, (size[0] * self.world, *size[1:]), **kwargs).chunk(self.world)[self.rank]


class Parity(StyleCrafter):
    """StyleCrafter whose result does not depend on the number of processes, and which writes its losses down.

    If it is `turned`, it is nearer to what it is on a GPU: matrices lie in memory the other way round, as weights of
    convolutions do in channels last, and the optimizer is fused. The loss of the batch `spoilt` is not a number.
    """

    def __init__(
        self,
        base: str,
        stage: str = "adapter",
        clip_norm: float = 0.05,
        turned: bool = False,
        spoilt: int | None = None,
    ) -> None:
        torch.manual_seed(0)
        size = Adapter(tokens=3, extractor_layers=1, predictor_layers=1, heads=2)
        super().__init__(base, stage, adapter=size, optimizer=Optimizer(3e-3, warmup_steps=2, clip_norm=clip_norm))
        for weight in self.trainable_parameters() if turned else ():
            if weight.ndim == 2:
                weight.data = weight.data.t().contiguous().t()
        self.turned, self.spoilt = turned, spoilt
        self.losses: list[float] = []
        self.validated: list[float] = []
        self.seen_dtypes: set[torch.dtype] = set()
        self.vectors: list[int] = []  # of all weights' length, and of a process's part's, in the last step under ZeRO-2

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{**group, "fused": True} if self.turned else group for group in super().parameter_groups()]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        divided = getattr(
            getattr(self.trainer.strategy.model, "optimizer", None), "parallel_partitioned_bit16_groups", None
        )
        if batch_idx == STEPS - 1 and divided:
            ((part, *others),) = divided
            self.vectors = [count_vectors(length) for length in (len(part) * (1 + len(others)), len(part))]
        torch.manual_seed(1000 + self.trainer.fit_loop.epoch_loop.total_batch_idx)
        with GlobalDraws(self.global_rank, self.trainer.world_size):
            loss = self.loss(batch).mean()
        self.seen_dtypes.add(self.base.vae.encoder.conv_in.weight.dtype)
        self.losses.append(loss.item())
        return loss * float("nan") if batch_idx == self.spoilt else loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        torch.manual_seed(0)
        with GlobalDraws(self.global_rank, self.trainer.world_size):
            self.validated.append(self.loss(batch).mean().item())


def count_vectors(length: int) -> int:
    """Vectors of so many float32 numbers that something refers to, or to a part of."""
    gc.collect()
    storages = [each.untyped_storage() for each in gc.get_objects() if type(each) in (Tensor, torch.nn.Parameter)]
    return len({storage.data_ptr() for storage in storages if storage.nbytes() == 4 * length})


class Batches:
    """`count` global batches, of which a process gets its rows."""

    def __init__(self, count: int, rank: int, world: int, size: int = GLOBAL_BATCH, clips: bool = False) -> None:
        self.count, self.rank, self.world, self.size, self.clips = count, rank, world, size, clips
        self.position = 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Any:
        self.position %= self.count
        while self.position < self.count:
            generator = torch.Generator().manual_seed(self.position)
            tint = torch.rand(self.size, 3, 1, 1, generator=generator) * 2 - 1
            rows = slice(self.rank * self.size // self.world, (self.rank + 1) * self.size // self.world)
            pictures = tint.expand(-1, -1, 32, 32)[rows].contiguous()
            self.position += 1
            yield {"image": pictures, "style": pictures, "caption": ["a red ball"] * len(pictures)}

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def train(
    folder: Path,
    base: str,
    strategy: Any = "auto",
    ckpt: Path | None = None,
    accumulate: int = 1,
    precision: str = "32-true",
    init_from: Path | None = None,
    **model: Any,
) -> dict[str, Any]:
    """Fit, and tell: losses of this process per batch and per validation, and the weights as training left them."""
    module = Parity(base, **model)
    if init_from is not None and ckpt is None:
        module.load_weights(init_from)
    trainer = L.Trainer(
        accelerator="cpu", devices=WORLD, strategy=strategy, precision=precision, max_steps=STEPS,
        val_check_interval=MIDDLE * accumulate, accumulate_grad_batches=accumulate, num_sanity_val_steps=0,
        default_root_dir=folder, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[EMA(), Checkpoint(every_n_steps=MIDDLE, keep_every_n_steps=MIDDLE)], plugins=[AtomicCheckpointIO()],
    )  # fmt: skip
    data = Batches(STEPS * accumulate, RANK, WORLD, GLOBAL_BATCH // accumulate)
    trainer.fit(module, data, Batches(1, RANK, WORLD), ckpt_path=ckpt)
    return {
        "losses": module.losses,
        "validated": module.validated,
        "weights": {k: v.clone() for k, v in module.state_dict().items()},
        "vectors": module.vectors,
        "frozen dtypes": [str(d) for d in module.seen_dtypes],
        "devices": [str(p.device) for p in module.parameters()][:1],
    }


def middle(folder: Path) -> Path:
    return folder / "checkpoints" / f"step-{MIDDLE:08d}.ckpt"


def zero(stage: int, offload: str = "none", exchange: peers.Exchange = "collectives") -> CPUZeRO:
    return CPUZeRO(stage, offload, BUCKET, exchange)


def averaged(exchange: peers.Exchange = "collectives") -> DDP:
    return DDP(BUCKET, exchange)


def refused(folder: Path, base: str, ckpt: Path) -> dict[str, Any]:
    """What continuing from `ckpt` under ZeRO objects."""
    try:
        train(folder, base, zero(2), ckpt=ckpt)
    except UserError as error:
        return {"error": str(error)}
    return {"error": ""}


def halved(checkpoint: Path, folder: Path) -> Path:
    """A checkpoint as if one process had saved it."""
    if RANK == 0:
        shutil.copytree(checkpoint, folder / "half.ckpt")
        next((folder / "half.ckpt" / "checkpoint").glob("*rank_1*optim_states.pt")).unlink()
    dist.barrier()
    return folder / "half.ckpt"


def full_disk(folder: Path, base: str) -> dict[str, Any]:
    """A training in which the second process finds no room for its part of the second checkpoint."""
    limits, real, saves = resource.getrlimit(resource.RLIMIT_FSIZE), torch.save, []

    def save(*args: Any, **kwargs: Any) -> None:
        saves.append(None)
        try:
            if RANK == 1 and len(saves) == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
            real(*args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    torch.save = save
    try:
        train(folder, base, zero(2))
    except UserError as error:
        return {"error": str(error)}
    finally:
        torch.save = real
    return {"error": ""}


def without_a_gradient(folder: Path, base: str) -> dict[str, Any]:
    """What DDP objects when a trained weight takes no part."""
    model = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2) for name in ("used", "idle")})
    averaging = AveragingInPlace(dict(model.named_parameters()), 100)
    try:
        model["used"](torch.ones(1, 2)).sum().backward()
    except RuntimeError as error:
        return {"error": str(error)}
    finally:
        averaging.remove()
    return {"error": ""}


def laid_out_otherwise(kind: type[Averaging]) -> dict[str, Any]:
    """The gradient that DDP gives if the second process's lies in memory otherwise than its weight."""
    weight = torch.nn.Parameter(torch.zeros(30, 40))  # of more than LARGE numbers

    def turn(weight: torch.nn.Parameter) -> None:
        if RANK == 1:
            weight.grad = weight.grad.t().contiguous().t()

    weight.register_post_accumulate_grad_hook(turn)
    averaging = kind({"weight": weight}, 2000)
    (weight * torch.arange(1200.0).view(30, 40) * (RANK + 1)).sum().backward()
    averaging.remove()
    return {"gradient": weight.grad.clone()}


def one_cannot(folder: Path, base: str) -> dict[str, Any]:
    """Whether processes read each other's memory if they all can, if one cannot, and on several nodes."""

    def share(*_: Any) -> None:
        if RANK == 1:
            raise UserError("cannot")

    device = torch.device("cpu")
    told = {"all": peers.by_copies("auto", device, 1)}
    peers.share = share
    try:
        return {**told, "one not": peers.by_copies("auto", device, 1), "nodes": peers.by_copies("auto", device, 2)}
    finally:
        peers.share = in_files


CASES: dict[str, Callable[[Path, str], dict[str, Any]]] = {
    "torch's ddp": lambda f, b: train(f, b, "ddp"),
    "ddp": lambda f, b: train(f, b, averaged(), turned=True),
    "ddp copies": lambda f, b: train(f, b, averaged("copies"), turned=True),
    "ddp copies accumulated": lambda f, b: train(f, b, averaged("copies"), accumulate=2),
    **{f"zero{i}": lambda f, b, i=i: train(f, b, zero(i), turned=i == 2) for i in (1, 2, 3)},
    **{
        f"zero{i} resumed": lambda f, b, i=i: train(f, b, zero(i), ckpt=middle(f.with_name(f"zero{i}")), turned=i == 2)
        for i in (2, 3)
    },
    "zero2 copies": lambda f, b: train(f, b, zero(2, exchange="copies"), turned=True),
    "zero2 copies resumed": lambda f, b: train(
        f, b, zero(2, exchange="copies"), ckpt=middle(f.with_name("zero2 copies")), turned=True
    ),
    "zero2 copies accumulated": lambda f, b: train(f, b, zero(2, exchange="copies"), accumulate=2),
    "zero2 copies mixed": lambda f, b: train(f, b, zero(2, exchange="copies"), precision="bf16-mixed"),
    "zero2 spoilt": lambda f, b: train(f, b, zero(2), turned=True, spoilt=1),
    "zero2 offloaded": lambda f, b: train(f, b, zero(2, offload="optimizer")),
    "zero3 offloaded": lambda f, b: train(f, b, zero(3, offload="all")),
    "ddp accumulated": lambda f, b: train(f, b, averaged(), accumulate=2),
    "zero2 accumulated": lambda f, b: train(f, b, zero(2), accumulate=2),
    "zero3 accumulated": lambda f, b: train(f, b, zero(3), accumulate=2),
    "ddp mixed": lambda f, b: train(f, b, averaged(), precision="bf16-mixed"),
    "zero2 mixed": lambda f, b: train(f, b, zero(2), precision="bf16-mixed"),
    "zero3 mixed": lambda f, b: train(f, b, zero(3), precision="bf16-mixed"),
    "zero3 second stage": lambda f, b: train(
        f, b, zero(3), stage="temporal", init_from=f.with_name("zero2") / "checkpoints" / "last.ckpt"
    ),
    "zero3 second stage resumed": lambda f, b: train(
        f, b, zero(3), stage="temporal", ckpt=middle(f.with_name("zero3 second stage"))
    ),
    "from a file": lambda f, b: refused(f, b, middle(f.with_name("ddp"))),
    "from one process": lambda f, b: refused(f, b, halved(middle(f.with_name("zero2")), f)),
    "from another order": lambda f, b: refused(f, b, middle(f.with_name("zero2"))),
    "from another stage": lambda f, b: refused(f, b, middle(f.with_name("zero3"))),
    "ddp validated apart": lambda f, b: validated_apart(f, averaged),
    "zero2 validated apart": lambda f, b: validated_apart(f, lambda: zero(2)),
    "zero3 validated apart": lambda f, b: validated_apart(f, lambda: zero(3)),
    "zero3 interrupted": lambda f, b: interrupted(f, zero(3)),
    "full disk": full_disk,
    "without a gradient": without_a_gradient,
    "one cannot": one_cannot,
    "laid out otherwise": lambda f, b: laid_out_otherwise(AveragingInPlace),
    "laid out otherwise, copies": lambda f, b: laid_out_otherwise(AveragingByCopies),
}


def run_pair(base: Path, folder: Path, cases: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Run cases in two processes -> results of both ranks by case."""
    run_twice(__file__, [base, folder, *cases], folder, OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    files = {case: [folder / f"{case}.{rank}.pt" for rank in (0, 1)] for case in cases}
    return {case: [torch.load(file, weights_only=True) for file in pair] for case, pair in files.items()}


if __name__ == "__main__":
    base, folder, *cases = sys.argv[1:]
    peers.share = in_files
    ddp.LARGE = 500  # so that some gradients are sent from where they lie, and some are copied
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled for half a minute
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.setdefault(name, "0")
    dist.init_process_group("gloo", rank=RANK, world_size=WORLD)
    for case in cases:
        begin = time.monotonic()
        result = CASES[case](Path(folder) / case, base)
        result["seconds"] = time.monotonic() - begin
        torch.save(result, Path(folder) / f"{case}.{RANK}.pt")
    dist.destroy_process_group()
