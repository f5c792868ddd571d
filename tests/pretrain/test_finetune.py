"""The network of the speed experiment is Stable Diffusion's, and its fast options compute what the plain ones do."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_gen.diffusion.compile import Compile
from lit_gen.pretrain.finetune import Finetune, Network

EXPERIMENT = Path(__file__).parents[2] / "experiments/bench/sd15.yaml"
SMALL = Network(widths=[16, 32], layers=1, heads=2, text_width=16, latent_size=8)


def test_the_defaults_are_stable_diffusion_15() -> None:
    with torch.device("meta"):
        unet = Network().build()
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964


def gradients(**options: object) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    method = Finetune(network=SMALL, **options)
    method.configure_model()
    loss = method.loss({"latents": torch.randn(2, 4, 8, 8), "text_states": torch.randn(2, 5, 16)})
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in method.parameters()])


@pytest.mark.parametrize(
    "options",
    [
        {"channels_last": "weights"},
        {"channels_last": "all"},
        {"attention": ["math"]},
        {"attention": ["flash", "math"]},
        {"checkpointing": True},
        {"compile": Compile(backend="aot_eager", blocks=True), "channels_last": "all"},
    ],
    ids="-".join,
)
def test_fast_is_plain(options: dict[str, object]) -> None:
    loss, gradient = gradients(**{"channels_last": "none"} | options)
    plain_loss, plain_gradient = gradients(channels_last="none")
    torch.testing.assert_close(loss, plain_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, plain_gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("blocks", "graphs"), [(False, 1), (True, 5)])
def test_every_part_is_compiled_in_one_piece(blocks: bool, graphs: int) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    method = Finetune(network=SMALL, compile=Compile(backend="eager", blocks=blocks))
    method.configure_model()
    for _ in range(2):
        method.loss({"latents": torch.randn(2, 4, 8, 8), "text_states": torch.randn(2, 5, 16)})
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]


def test_blocks_are_not_cut_up_by_ddp(tmp_path: Path) -> None:
    compiled = []

    def count(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph

    torch._dynamo.reset()
    torch._dynamo.register_backend(count, name="count")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        method = Finetune(network=SMALL, compile=Compile(backend="count", blocks=True))
        method.configure_model()
        network = torch.nn.parallel.DistributedDataParallel(method.unet, bucket_cap_mb=0.01)  # smaller than a block
        network(torch.randn(2, 4, 8, 8), torch.tensor([3, 4]), torch.randn(2, 5, 16))
    finally:
        torch.distributed.destroy_process_group()
    assert len(compiled) == 5


def test_no_step_waits_for_the_device(lit_gen: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody reads a value between steps: the device would run dry while Python catches up with it."""
    readers: list[str] = []
    steps: list[int] = []
    for name in ("item", "tolist", "numpy", "cpu", "__float__", "__int__", "__bool__"):

        def read(*args: Any, real: Any = getattr(Tensor, name), **kwargs: Any) -> Any:
            caller = sys._getframe(1).f_code
            if "torch" not in caller.co_filename:  # AdamW reads its step counts, which lie on the CPU
                readers.append(caller.co_name)
            return real(*args, **kwargs)

        monkeypatch.setattr(Tensor, name, read)

    def begin(self: Finetune, batch: Any, batch_idx: int, real: Any = Finetune.on_train_batch_start) -> None:
        steps.append(len(readers))
        real(self, batch, batch_idx)

    monkeypatch.setattr(Finetune, "on_train_batch_start", begin)
    words = ["--trainer.max_steps", "8", "--trainer.log_every_n_steps", "100", "--speed.peak_tflops", "1"]
    assert lit_gen("fit", "-c", str(EXPERIMENT), "--smoke", *words) == 0
    assert len(steps) == 8 and steps[1] == steps[-1], readers
