"""The two noise predictors of score distillation: a frozen teacher, and discriminators grown out of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lit_gen.diffusion.base import precision_of
from lit_gen.diffusion.objective import Schedule
from lit_gen.distillation.contract import Prompts
from lit_gen.errors import at_least


class UNetTeacher:
    """A frozen UNet as a noise predictor, whatever it predicts, without the adapters that discriminators added.

    Args:
        unet: UNet2DConditionModel.
        schedule: its noise schedule, which also says what it predicts.
    """

    def __init__(self, unet: nn.Module, schedule: Schedule) -> None:
        self.unet, self.schedule = unet, schedule

    def __call__(self, noisy: Tensor, t: Tensor, text: Tensor, **given: Any) -> Tensor:
        """Predicted noise B C h w, float32, at latents B C h w, timesteps B and text states B L D."""
        with only_adapter(self.unet, None):
            return predict(self.unet, self.schedule, noisy, t, text, **given)


class EmbeddingFake(nn.Module):
    """Discriminator (a) of ASD: the frozen UNet under a learnable text embedding, one for each prompt.

    Args:
        unet: the teacher's; not a part of this module.
        schedule: its noise schedule.
        text: where the embeddings start, the prompts' text states P L D.
    """

    def __init__(self, unet: nn.Module, schedule: Schedule, text: Tensor) -> None:
        super().__init__()
        self.__dict__["teacher"] = UNetTeacher(unet, schedule)
        self.register_buffer("start", text.detach().clone().float(), False)
        # What is added to the prompts, so that weight decay leads back to them.
        self.offsets = nn.Parameter(torch.zeros_like(self.start))

    def forward(self, noisy: Tensor, t: Tensor, prompts: Prompts) -> Tensor:
        """Predicted noise B C h w of latents that belong to prompts `prompts.index`."""
        index = torch.zeros(len(noisy), dtype=torch.long) if prompts.index is None else prompts.index
        index = index.to(noisy.device)
        return self.teacher(noisy, t, self.start[index] + self.offsets[index])

    def trained(self) -> list[nn.Parameter]:
        return [self.offsets]


class LoRAFake(nn.Module):
    """Discriminator (b) of ASD: the frozen UNet with a low-rank adapter on all its attentions.

    The adapter's weights lie in the UNet, which is not a part of this module, so they have one owner and one name.

    Args:
        unet: the teacher's UNet2DConditionModel; gets the adapter.
        schedule: its noise schedule.
        rank: of the adapter; official code 4. Its scale is 1, as in that code, so peft's alpha equals the rank.
    """

    def __init__(self, unet: nn.Module, schedule: Schedule, rank: int = 4) -> None:
        super().__init__()
        at_least(1, rank=rank)
        self.__dict__["unet"] = unet
        self.schedule, self.name = schedule, f"fake{len(getattr(unet, 'peft_config', {}))}"
        before = {id(p): p.requires_grad for p in unet.parameters()}
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
        unet.add_adapter(config, adapter_name=self.name)
        for parameter in unet.parameters():  # peft freezes the adapters that are already there
            parameter.requires_grad_(before.get(id(parameter), True))
        self._trained = [p for p in unet.parameters() if id(p) not in before]
        for parameter in self._trained:  # they come in the precision of the frozen weights
            parameter.data = parameter.data.float()

    def forward(self, noisy: Tensor, t: Tensor, prompts: Prompts) -> Tensor:
        """Predicted noise B C h w."""
        with only_adapter(self.unet, self.name):
            return predict(self.unet, self.schedule, noisy, t, prompts.target)

    def trained(self) -> list[nn.Parameter]:
        return self._trained


def grow_discriminator(
    kind: Literal["lora", "embedding"], unet: nn.Module, schedule: Schedule, text: Tensor, rank: int = 4
) -> EmbeddingFake | LoRAFake:
    """A discriminator over a frozen UNet; `text` (P L D) are the prompts an embedding starts from."""
    return LoRAFake(unet, schedule, rank) if kind == "lora" else EmbeddingFake(unet, schedule, text)


def predict(unet: nn.Module, schedule: Schedule, noisy: Tensor, t: Tensor, text: Tensor, **given: Any) -> Tensor:
    """Noise B C h w, float32, that a UNet's output means."""
    dtype = precision_of(unet)
    output = unet(noisy.to(dtype), t, text.to(dtype), **given).sample
    # A copy in any precision: what CUDA graphs return is a buffer of theirs, which the step's next pass overwrites.
    output = output.to(torch.float32, copy=True)
    return schedule.split(output, noisy, t)[1]


@contextmanager
def only_adapter(unet: nn.Module, name: str | None) -> Iterator[None]:
    """The UNet with one of its adapters, or with none.

    Which adapter acts is state of the module, so a pass that is recomputed in the backward (gradient checkpointing)
    would be recomputed under another one: do not combine the two.
    """
    layers = _tuner_layers(unet)
    # What peft's own enable_adapters and set_adapter set, without the walk over all parameters in which they freeze
    # what is switched off: that takes longer than the launch of a small network's kernels.
    for layer in layers:
        layer._disable_adapters = name is None
        if name is not None:
            layer._active_adapter = [name]
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


_LAYERS: WeakKeyDictionary[nn.Module, tuple[tuple[str, ...], list[BaseTunerLayer]]] = WeakKeyDictionary()


def _tuner_layers(unet: nn.Module) -> list[BaseTunerLayer]:
    """The layers that hold adapters, looked for again only when an adapter was added."""
    adapters = tuple(getattr(unet, "peft_config", ()))
    found = _LAYERS.get(unet)
    if found is None or found[0] != adapters:
        found = _LAYERS[unet] = (adapters, [m for m in unet.modules() if isinstance(m, BaseTunerLayer)])
    return found[1]
