"""torch.compile of the networks of diffusion models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from lit_gen.errors import UserError

# Whether the compiler also finds a graph in its cache where that has functions with a backward pass of their own, such
# as those of layout.py: otherwise each new process derives its backward pass once more.
_OWN_FUNCTIONS = "autograd_cache_allow_custom_autograd_functions"


@dataclass
class Compile:
    """How torch.compile makes the network faster.

    Args:
        mode: null compiles as usual in about two minutes; "reduce-overhead" replays CUDA graphs; the others try more
            kernels, for much longer.
        options: settings of the compiler instead of a mode, e.g. {conv_1x1_as_mm: true}.
        blocks: compile each block of the network by itself. The gradients of a block are then there, and sent to the
            other GPUs, while those of the next are computed; a network in one piece has all of them at the end.
        backend: of torch.compile.
    """

    mode: Literal["reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None = None
    options: dict[str, bool | int | str] | None = None
    blocks: bool = False
    backend: str = "inductor"

    @property
    def replays_graphs(self) -> bool:
        """Whether CUDA graphs are replayed, into whose buffers every call writes its outputs anew."""
        return self.mode in ("reduce-overhead", "max-autotune") or bool((self.options or {}).get("triton.cudagraphs"))

    def refuse_accumulation(self, batches: int) -> None:
        """UserError for gradients of several batches that would be added up in buffers that each replay overwrites."""
        if self.replays_graphs and batches > 1:
            named = f"mode: {self.mode}" if self.mode else "options: {triton.cudagraphs: true}"
            raise UserError(
                f"trainer.accumulate_grad_batches is {batches}, which the CUDA graphs of compile ({named}) rule out: "
                "take compile without them, or more at a time"
            )

    def apply(self, unet: nn.Module) -> None:
        """Have a UNet of diffusers, or VideoCrafter's over one, compiled when it is first called."""
        if self.blocks and not hasattr(unet, "down_blocks"):
            raise UserError(f"compile.blocks: {type(unet).__name__} runs through its blocks' layers; leave it false")
        parts = [*unet.down_blocks, unet.mid_block, *unet.up_blocks] if self.blocks else [unet]
        # All parts count as one function to the compiler, which by default gives up at its ninth version.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(parts))
        if self.blocks:  # else DDP has each block cut where its buckets of gradients end, and compiled once more
            torch._dynamo.config.optimize_ddp = False
        if hasattr(torch._functorch.config, _OWN_FUNCTIONS):
            setattr(torch._functorch.config, _OWN_FUNCTIONS, True)
        for part in parts:
            if part._compiled_call_impl is None:
                part.compile(backend=self.backend, mode=self.mode, options=self.options, dynamic=False)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Within, compiled networks run as they were written, so that a new shape is not compiled."""
    with torch.compiler.set_stance("force_eager"):
        yield
