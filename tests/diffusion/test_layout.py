"""Convolutions whose tensors stay channels last."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from lit_gen.diffusion.compile import Compile
from lit_gen.diffusion.layout import keep_channels_last
from lit_gen.pretrain.finetune import Network


@pytest.fixture()
def block() -> nn.Module:
    """Residual blocks, attention and downsampling of a UNet."""
    torch.manual_seed(0)
    unet = Network(widths=[16, 32], layers=1, heads=2, text_width=16, latent_size=8).build()
    return unet.down_blocks[0].double()


def step(block: Any) -> list[torch.Tensor]:
    """A forward and a backward pass: the output, and the gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"hidden_states": (16, 8, 8), "temb": (64,), "encoder_hidden_states": (8, 16)}
    given = {name: torch.randn(2, *shape, generator=generator).double() for name, shape in shapes.items()}
    given["hidden_states"] = given["hidden_states"].to(memory_format=torch.channels_last).requires_grad_()
    output, _ = block(**given)
    output.square().sum().backward()
    return [output.detach(), *(p.grad for p in block.parameters())]


@pytest.mark.parametrize("twice", [False, True])
def test_numbers_are_the_same(block: nn.Module, twice: bool) -> None:
    plain = step(copy.deepcopy(block))
    for _ in range(1 + twice):
        keep_channels_last(block)
    convolutions = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
    assert all(len(m._forward_pre_hooks) == len(m._forward_hooks) == 1 for m in convolutions)
    kept = step(block)
    assert len(kept) == len(plain) > 20
    for ours, theirs in zip(kept, plain, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_compiler_sees_no_convolution_of_channels_first(block: nn.Module) -> None:
    seen: dict[bool, list[tuple[bool, ...]]] = {}

    def look(kept: bool) -> Any:
        def compile(graph: Any, inputs: Any) -> Any:
            for node in graph.graph.nodes:
                if node.op == "call_function" and "convolution" in str(node.target):
                    tensors = [a.meta["val"] for a in node.args[:3] if hasattr(a, "meta")]
                    formats = (t.is_contiguous(memory_format=torch.channels_last) for t in tensors if t.ndim == 4)
                    seen.setdefault(kept, []).append(tuple(formats))
            return graph

        return aot_autograd(fw_compiler=compile, bw_compiler=compile)

    block.to(memory_format=torch.channels_last)
    for kept in (False, True):
        network = copy.deepcopy(block)
        if kept:
            keep_channels_last(network)
        torch._dynamo.reset()
        step(torch.compile(network, backend=look(kept), dynamic=False))
    assert len(seen[False]) == len(seen[True]) == 10
    assert not all(map(all, seen[False])) and all(map(all, seen[True]))


@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler of CPUs needs g++")
def test_what_was_compiled_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward pass, by a process that starts afresh, as one that continues a run."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    given, counters = torch.randn(2, 4, 6, 6), torch._dynamo.utils.counters
    torch.manual_seed(0)
    network = Upsample2D(4, use_conv=True)
    keep_channels_last(network)
    gradients = []
    for hits in (0, 1):
        torch._dynamo.reset()
        counters.clear()
        compiled = copy.deepcopy(network)
        Compile().apply(compiled)
        compiled(given).square().sum().backward()
        gradients.append([p.grad for p in compiled.parameters()])
        assert counters["aot_autograd"]["autograd_cache_hit"] == hits
    network(given).square().sum().backward()
    for first, again, plain in zip(*gradients, [p.grad for p in network.parameters()], strict=True):
        assert torch.equal(first, again)
        torch.testing.assert_close(first, plain)
