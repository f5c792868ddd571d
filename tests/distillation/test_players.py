"""Teacher and discriminators over one shared UNet."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lit_gen.diffusion.base import Base, load_base
from lit_gen.diffusion.objective import Schedule
from lit_gen.diffusion.text import encode_text
from lit_gen.distillation.contract import Noised, Prompts, Score
from lit_gen.distillation.editing import CDS, DualASD
from lit_gen.distillation.players import EmbeddingFake, LoRAFake, UNetTeacher
from lit_gen.distillation.siblings import ASD


@pytest.fixture
def base(tiny_base: Path) -> Base:
    return load_base(str(tiny_base))


@pytest.fixture
def prompts(base: Base) -> Prompts:
    text = encode_text(base.tokenizer, base.text_encoder, ["a red cube", "", "a blue ball", "a red cube"])
    return Prompts(text[[0, 0]], text[[1, 1]], text[[2, 2]], torch.tensor([0, 0]))


def latents(base: Base, count: int = 2) -> Tensor:
    config = base.unet.config
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, config.in_channels, config.sample_size, config.sample_size, generator=generator)


def test_teacher_predicts_noise_whatever_the_base_predicts(base: Base, prompts: Prompts) -> None:
    x, t = latents(base), torch.tensor([100, 900])
    output = base.unet(x, t, prompts.target).sample
    schedule = Schedule(base.scheduler)
    assert torch.equal(UNetTeacher(base.unet, schedule)(x, t, prompts.target), output)
    schedule.prediction = "v_prediction"
    a, s = schedule._coefficients(t, 4)
    assert torch.allclose(UNetTeacher(base.unet, schedule)(x, t, prompts.target), a * output + s * x)


def test_discriminators_start_as_the_teacher_and_leave_it_alone(base: Base, prompts: Prompts) -> None:
    schedule, x, t = Schedule(base.scheduler), latents(base), torch.tensor([100, 900])
    teacher = UNetTeacher(base.unet, schedule)
    before = teacher(x, t, prompts.target)
    lora, other = (LoRAFake(base.unet, schedule, rank=2) for _ in range(2))
    embedding = EmbeddingFake(base.unet, schedule, prompts.target[:1])
    for fake in (lora, other, embedding):
        assert torch.allclose(fake(x, t, prompts), before, atol=1e-6)
    with torch.no_grad():
        for parameter in [*lora.trained(), *embedding.trained()]:
            parameter.add_(torch.randn_like(parameter) * 0.3)
    assert not torch.allclose(lora(x, t, prompts), before, atol=1e-3)
    assert not torch.allclose(embedding(x, t, prompts), before, atol=1e-3)
    assert torch.allclose(other(x, t, prompts), before, atol=1e-6)  # two adapters do not mix
    assert torch.equal(teacher(x, t, prompts.target), before)


@pytest.mark.parametrize("make", [LoRAFake, EmbeddingFake])
def test_only_the_discriminator_and_the_generator_get_gradients(base: Base, prompts: Prompts, make: type) -> None:
    schedule = Schedule(base.scheduler)
    other = LoRAFake(base.unet, schedule)
    fake = make(base.unet, schedule) if make is LoRAFake else make(base.unet, schedule, prompts.target[:1])
    method = ASD(UNetTeacher(base.unet, schedule), schedule, Score(), fake, gamma=-0.5)
    z = latents(base).requires_grad_()
    torch.manual_seed(0)
    method(z, prompts).total.backward()
    own = {id(p) for p in fake.trained()}
    # (a LoRA's first factor gets none at the start, where the second is zero)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in fake.trained()) and z.grad.abs().sum() > 0
    assert all(p.grad is None for p in [*base.parameters(), *other.trained()] if id(p) not in own)
    assert all(p.requires_grad for p in [*fake.trained(), *other.trained()])
    assert {id(p) for p in base.parameters() if p.requires_grad} - own == {id(p) for p in other.trained()}


def test_switching_adapters_touches_no_requires_grad(base: Base, prompts: Prompts) -> None:
    """An adapter acts only in its own discriminator's passes; one that is added later is found, and what is trained
    stays so within the passes too."""
    schedule, x, t = Schedule(base.scheduler), latents(base), torch.tensor([100, 900])
    teacher, first = UNetTeacher(base.unet, schedule), LoRAFake(base.unet, schedule, rank=2)
    plain = teacher(x, t, prompts.target)
    first(x, t, prompts)  # its layers are known now
    second = LoRAFake(base.unet, schedule, rank=2)
    with torch.no_grad():
        for fake in (first, second):
            for parameter in fake.trained():
                parameter.add_(torch.randn_like(parameter) * 0.3)
    trained = {id(p) for fake in (first, second) for p in fake.trained()}

    def check(*_) -> None:
        assert {id(p) for p in base.unet.parameters() if p.requires_grad} == trained

    base.unet.register_forward_hook(check)
    for fake in (first, second):
        once = fake(x, t, prompts)
        assert torch.equal(teacher(x, t, prompts.target), plain) and not torch.allclose(once, plain, atol=1e-3)
        base.unet.enable_adapters()
        base.unet.set_adapter(fake.name)  # as peft does it itself, and freezes the others
        assert torch.equal(base.unet.forward(x, t, prompts.target).sample, once)
        for parameter in [*first.trained(), *second.trained()]:
            parameter.requires_grad_(True)
    check()


def count_passes(unet: nn.Module) -> list[tuple[int, bool]]:
    """Batch size and whether gradients were recorded, of each coming pass of the UNet."""
    seen: list[tuple[int, bool]] = []
    unet.register_forward_pre_hook(lambda _, inputs: seen.append((len(inputs[0]), torch.is_grad_enabled())))
    return seen


def test_asd_makes_two_passes_a_step(base: Base, prompts: Prompts) -> None:
    schedule = Schedule(base.scheduler)
    method = ASD(UNetTeacher(base.unet, schedule), schedule, Score(), LoRAFake(base.unet, schedule))
    seen = count_passes(base.unet)
    method(latents(base).requires_grad_(), prompts)
    assert sorted(seen) == [(2, True), (4, False)]  # the discriminator's; the teacher's, with and without prompt


def test_contrast_prefers_the_source_s_own_layout(base: Base, prompts: Prompts) -> None:
    schedule = Schedule(base.scheduler)
    method = CDS(UNetTeacher(base.unet, schedule), schedule, Score(), base.unet)
    features = torch.randn(2, 64, 8, generator=torch.Generator().manual_seed(0))
    turned = features[:, torch.randperm(64, generator=torch.Generator().manual_seed(1))]
    assert method.contrast(features, features) < 0.1 < 2 < method.contrast(turned, features)
    z = latents(base).requires_grad_()
    method.source = latents(base).flip(0)
    torch.manual_seed(0)
    step = method(z, prompts)
    gradient = torch.autograd.grad(step.generator, z)[0]
    method.weight = 0.0
    torch.manual_seed(0)
    plain = torch.autograd.grad(method(z, prompts).generator, z)[0]
    assert step.logs["contrast"] > 0 and not torch.allclose(gradient, plain)


class Noise(nn.Module):
    """A discriminator that knows the noise."""

    noise: Tensor

    def forward(self, noisy: Tensor, t: Tensor, prompts: Prompts) -> Tensor:
        return self.noise.repeat(len(noisy) // len(self.noise), 1, 1, 1)


def test_dual_asd_with_perfect_discriminators_is_dds(base: Base, prompts: Prompts) -> None:
    schedule, score = Schedule(base.scheduler), Score()
    teacher, know = UNetTeacher(base.unet, schedule), Noise()
    players = [ASD(teacher, schedule, score, know) for _ in range(2)]
    method = DualASD(teacher, schedule, score, *players)
    z, source = latents(base).requires_grad_(), latents(base).flip(0)
    method.source = source
    torch.manual_seed(0)
    drawn: Noised = method.noised(z)
    know.noise = drawn.noise
    torch.manual_seed(0)
    ours = torch.autograd.grad(method(z, prompts).generator, z)[0]
    dds = CDS(teacher, schedule, score, base.unet, weight=0.0)
    dds.source = source
    torch.manual_seed(0)
    theirs = torch.autograd.grad(dds(z, prompts).generator, z)[0]
    assert torch.allclose(ours, theirs, atol=1e-6)
