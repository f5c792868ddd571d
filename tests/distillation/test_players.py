"""Teacher and discriminators over one shared UNet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_gen.diffusion.base import Base, load_base
from lit_gen.diffusion.objective import Schedule
from lit_gen.diffusion.text import encode_text
from lit_gen.distillation.contract import Noised, Prompts, Score
from lit_gen.distillation.editing import CDS, DDS, DualASD
from lit_gen.distillation.players import EmbeddingFake, LoRAFake, UNetTeacher, grow_discriminator
from lit_gen.distillation.siblings import ASD
from lit_gen.methods.asd import Particles
from lit_gen.methods.asd_distill import OneStep


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


@pytest.mark.parametrize("kind", ["lora", "embedding"])
def test_a_teacher_of_lower_precision_trains_a_discriminator_of_full(base: Base, prompts: Prompts, kind: str) -> None:
    schedule, x, t = Schedule(base.scheduler), latents(base), torch.tensor([100, 900])
    exact = UNetTeacher(base.unet, schedule)(x, t, prompts.target)
    base.unet.to(torch.bfloat16)
    fake = make_fake(kind, base, prompts)
    method = ASD(UNetTeacher(base.unet, schedule), schedule, Score(), fake)
    assert all(weight.dtype == torch.float32 for weight in fake.trained())
    for context in (torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False)):
        with context:
            found = fake(x, t, prompts)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, exact, rtol=0.1, atol=0.05)
            method(x.requires_grad_(), prompts).total.backward()
        assert any(weight.grad.abs().max() > 0 for weight in fake.trained())


def test_a_step_does_not_look_through_all_modules(
    base: Base, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = Schedule(base.scheduler)
    method = ASD(UNetTeacher(base.unet, schedule), schedule, Score(), make_fake("lora", base, prompts))
    method(latents(base).requires_grad_(), prompts)  # the first one does
    walk, seen = nn.Module.named_modules, []

    def counted(module: nn.Module, *args: Any, **kwargs: Any) -> Iterator[Any]:
        for found in walk(module, *args, **kwargs):
            seen.append(found)
            yield found

    monkeypatch.setattr(nn.Module, "named_modules", counted)
    method(latents(base).requires_grad_(), prompts)
    assert len(seen) < 50 < len([*base.unet.named_modules()])


def count_passes(unet: nn.Module) -> list[tuple[int, bool]]:
    """Batch size and whether gradients were recorded, of each coming pass of the UNet."""
    seen: list[tuple[int, bool]] = []
    unet.register_forward_pre_hook(lambda _, inputs: seen.append((len(inputs[0]), torch.is_grad_enabled())))
    return seen


def make_fake(kind: str, base: Base, prompts: Prompts) -> nn.Module:
    return grow_discriminator(kind, base.unet, Schedule(base.scheduler), prompts.target[:1])


@pytest.mark.parametrize("kind", ["lora", "embedding"])
def test_asd_makes_two_passes_a_step(base: Base, prompts: Prompts, kind: str) -> None:
    schedule = Schedule(base.scheduler)
    method = ASD(UNetTeacher(base.unet, schedule), schedule, Score(), make_fake(kind, base, prompts))
    seen = count_passes(base.unet)
    method(latents(base).requires_grad_(), prompts)
    assert sorted(seen) == [(2, True), (4, False)]  # the discriminator's; the teacher's, with and without prompt
    seen.clear()
    method(latents(base).requires_grad_(), prompts, real=latents(base))
    assert sorted(seen) == [(2, False), (2, True), (2, True), (4, False)]  # and the same two of real latents


@pytest.mark.parametrize("kind", ["lora", "embedding"])
def test_editing_asks_the_teacher_once(base: Base, prompts: Prompts, kind: str) -> None:
    schedule = Schedule(base.scheduler)
    common = (UNetTeacher(base.unet, schedule), schedule, Score())
    seen = count_passes(base.unet)
    for make, passes in (
        (lambda: DDS(*common), [(8, False)]),  # edit and source, with and without their prompts
        (lambda: CDS(*common, base.unet), [(2, True), (8, False)]),  # and the edit's features with gradient
        # and each under the other's prompt; both discriminators, of edit and source
        (
            lambda: DualASD(*common, *(ASD(*common, make_fake(kind, base, prompts)) for _ in range(2))),
            [(4, True), (4, True), (12, False)],
        ),
    ):
        method = make()
        method.source = latents(base).flip(0)
        seen.clear()
        method(latents(base).requires_grad_(), prompts)
        assert sorted(seen) == passes


@pytest.mark.parametrize("space", ["latents", "pixels"])
@pytest.mark.parametrize("sibling", ["asd", "sds"])
def test_a_step_in_latent_space_leaves_the_autoencoder_alone(tiny_base: Path, sibling: str, space: str) -> None:
    """Pixels are encoded once; pictures are never decoded."""
    method = Particles(str(tiny_base), prompts=["a ball"], particles=2, sibling=sibling, space=space)
    seen: list[str] = []
    for part in ("encoder", "decoder"):
        getattr(method.base.vae, part).register_forward_hook(lambda *_, part=part: seen.append(part))
    method.log_dict = lambda *_, **__: None
    method.training_step(torch.arange(2), 0).backward()
    assert seen == (["encoder"] if space == "pixels" else [])


def test_one_step_generators_pass_once_beside_asd(tiny_base: Path) -> None:
    method = OneStep(str(tiny_base), prompts=["a ball"])
    method.log_dict = lambda *_, **__: None
    made, seen = count_passes(method.generator), count_passes(method.base.unet)
    batch = {"posterior": torch.rand(2, 2, *latents(method.base).shape[1:]), "text_states": method._states(["a", "b"])}
    method.training_step(batch, 0)
    assert made == [(2, True)]
    assert sorted(seen) == [(2, False), (2, True), (2, True), (4, False)]


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
