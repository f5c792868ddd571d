"""The family against closed forms, on a teacher whose scores are exact."""

from __future__ import annotations

import pytest
import torch
from mixture import NULL, Mixture, coefficients, rendered, schedule, words
from torch import Tensor, nn

from lit_gen.diffusion.sampling import classifier_free
from lit_gen.distillation.contract import Noised, Prompts, Score, Timesteps
from lit_gen.distillation.editing import DDS, DualASD
from lit_gen.distillation.players import LoRAFake
from lit_gen.distillation.siblings import ASD, SDS, ClassifierSD, vsd
from lit_gen.errors import UserError

OVER = schedule()
COUNT = 64


class Told(nn.Module):
    """A discriminator that gives a known answer."""

    def __init__(self, answer) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, noisy: Tensor, t: Tensor, prompts: Prompts) -> Tensor:
        return self.answer(noisy, t)


def prompts(count: int = COUNT) -> Prompts:
    return Prompts(words(0, count), words(NULL, count), source=words(2, count))


def points(seed: int = 0, count: int = COUNT) -> Tensor:
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def gradient(method, z: Tensor, seed: int = 1, **more) -> Tensor:
    torch.manual_seed(seed)
    return torch.autograd.grad(method(z, prompts(len(z)), **more).generator, z)[0]


def same_draw(z: Tensor, seed: int = 1) -> Noised:
    """What `gradient` noised z to, drawn once more."""
    torch.manual_seed(seed)
    return SDS(Mixture(OVER), OVER).noised(z)


def guided(noised: Noised, lam: float, label: int = 0) -> Tensor:
    teacher, count = Mixture(OVER), len(noised.t)
    null, text = (teacher(noised.noisy, noised.t, words(c, count)) for c in (NULL, label))
    return classifier_free(null, text, lam)


@pytest.mark.parametrize("weighting", ["sds", "asd", "uniform", "fantasia3d"])
@pytest.mark.parametrize("lam", [1.0, 7.5])
def test_gradients_equal_their_formulas(lam: float, weighting: str) -> None:
    score, z = Score(guidance=lam, weighting=weighting), points()
    drawn = same_draw(z)
    a, s = coefficients(OVER, drawn.t)
    weight = {"sds": s**2, "asd": s / a, "uniform": torch.ones_like(a), "fantasia3d": a * s**2}[weighting] / COUNT
    text = guided(drawn, 1.0)
    crooked = Told(lambda noisy, t: noisy.sin())
    wanted = {
        SDS(Mixture(OVER), OVER, score): drawn.noise,
        ClassifierSD(Mixture(OVER), OVER, score): text,
        vsd(Mixture(OVER), OVER, score, crooked): drawn.noisy.sin(),
        ASD(Mixture(OVER), OVER, score, crooked): drawn.noisy.sin(),
    }
    for method, baseline in wanted.items():
        expected = weight * (guided(drawn, lam) - baseline)
        assert torch.allclose(gradient(method, z), expected, atol=1e-5), type(method).__name__


def test_editing_compares_with_the_source_at_the_same_noise() -> None:
    score, z = Score(guidance=7.5), points()
    method = DDS(Mixture(OVER), OVER, score)
    method.source = points(5).detach()
    drawn = same_draw(z)
    source = method.noised_source(drawn)
    assert torch.equal(source.noise, drawn.noise) and torch.equal(source.t, drawn.t)
    _, s = coefficients(OVER, drawn.t)
    expected = s**2 / COUNT * (guided(drawn, 7.5) - guided(source, 7.5, label=2))
    assert torch.allclose(gradient(method, z), expected, atol=1e-5)
    assert method.teacher.calls == [4 * COUNT]  # edit and source, each with and without its prompt
    method.source = points(5, 3).detach()
    with pytest.raises(UserError, match="3 source pictures for 64 edits"):
        method(z, prompts())


def mse(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().mean()


def wavy(noisy: Tensor, t: Tensor) -> Tensor:
    return noisy.sin()


@pytest.mark.parametrize("gamma,eta,shared", [(-0.5, 0.5, True), (-1.0, 1.0, True), (-0.75, 0.25, False)])
def test_the_discriminators_loss_is_equations_8_and_9(gamma: float, eta: float, shared: bool) -> None:
    """|e_phi(x_g) - eps|^2 - |e_phi(x_r) - eps|^2 + eta |e_y(x_r) - e_phi(x_r)|^2 + gamma |e_y(x_g) - e_phi(x_g)|^2."""
    levels = Timesteps(0.4, 0.41)  # so that others would show
    z, real, score = points(), points(7).detach(), Score(7.5, timesteps=levels)
    method = ASD(Mixture(OVER), OVER, score, Told(wavy), gamma, eta, shared)
    torch.manual_seed(3)
    loss = method(z, prompts(), real=real).discriminator
    torch.manual_seed(3)
    if not shared:
        method.noised(z)
    g, r = (method.noised(x) if shared else method.noised_anywhere(x) for x in (z, real))
    e_y = {id(x): Mixture(OVER)(x.noisy, x.t, words(0, COUNT)) for x in (g, r)}
    e_phi = {id(x): x.noisy.sin() for x in (g, r)}
    expected = mse(e_phi[id(g)], g.noise) + gamma * mse(e_y[id(g)], e_phi[id(g)])
    without = expected
    expected = expected - mse(e_phi[id(r)], r.noise) + eta * mse(e_y[id(r)], e_phi[id(r)])
    assert torch.allclose(loss, expected, atol=1e-5) and not torch.allclose(loss, without, atol=1e-4)
    assert ((r.t >= 400) & (r.t < 410)).all() == shared
    torch.manual_seed(3)
    assert torch.allclose(method(z, prompts()).discriminator, without, atol=1e-5)  # Algorithm 1


def test_the_official_v_target_is_what_its_code_makes_of_e_y() -> None:
    """get_velocity(x_0, e_y) = a e_y - s x_0, and the discriminator's v likewise from its noise and x_t; a^2 times
    their distance is that of noises."""
    z = points().detach()
    drawn = same_draw(z)
    a, s = coefficients(OVER, drawn.t)
    text, fake = guided(drawn, 1.0), drawn.noisy.sin()
    target = a * text - s * drawn.clean
    own = (fake - s * drawn.noisy) / a
    method = ASD(Mixture(OVER), OVER, Score(), Told(wavy), -0.5, official_v_target=True)
    pull = (method.judge(fake, text, drawn) - mse(fake, drawn.noise)) / -0.5
    assert torch.allclose(pull, (a * (own - target)).square().mean(), rtol=1e-4)
    assert torch.allclose(a * target + s * drawn.noisy, a**2 * text + s**2 * drawn.noise, atol=1e-4)  # card 7.2
    plain = ASD(Mixture(OVER), OVER, Score(), Told(wavy), -0.5)
    assert torch.allclose((plain.judge(fake, text, drawn) - mse(fake, drawn.noise)) / -0.5, mse(fake, text))


@pytest.mark.parametrize("lam", [1.0, 7.5])
@pytest.mark.parametrize("origin_real", ["edit", "source"])
def test_two_discriminators_have_the_losses_and_the_gradient_of_their_own(lam: float, origin_real: str) -> None:
    """As if each prediction were made by itself; the teacher is asked once for all of them."""
    gamma, eta, score, z = -0.5, 1.0, Score(lam, "uniform"), points()
    phis = [Told(lambda noisy, t: noisy.sin()), Told(lambda noisy, t: noisy.cos())]
    teacher = Mixture(OVER)
    players = [ASD(teacher, OVER, score, phi, gamma, eta) for phi in phis]
    method = DualASD(teacher, OVER, score, *players, origin_real)
    method.source = points(5).detach()
    torch.manual_seed(1)
    step = method(z, prompts())
    assert teacher.calls == [(4 if lam == 1 else 6) * COUNT]
    edit = same_draw(z)
    source = method.noised_source(edit)

    def loss(phi: Told, label: int, generated: Noised, real: Noised) -> Tensor:
        e_g, e_r = (phi(x.noisy, x.t, None) for x in (generated, real))
        y_g, y_r = (guided(x, 1.0, label) for x in (generated, real))
        true = eta * mse(y_r, e_r) - mse(e_r, real.noise)
        return mse(e_g, generated.noise) + gamma * mse(y_g, e_g) + true

    second = (edit, source) if origin_real == "source" else (source, edit)
    expected = loss(phis[0], 0, edit, source) + loss(phis[1], 2, *second)
    assert torch.allclose(step.discriminator, expected, atol=1e-5)
    gap = guided(edit, lam) - edit.noisy.sin() - (guided(source, lam, 2) - source.noisy.cos())
    assert torch.allclose(torch.autograd.grad(step.generator, z)[0], gap / COUNT, atol=1e-5)


@pytest.mark.parametrize("gamma", [-0.75, -0.5, -0.25])
def test_optimal_discriminator_has_a_closed_form(gamma: float) -> None:
    """(f + gamma e_y) / (1 + gamma) minimises the discriminator's loss at a noisy point."""
    particles, count = points(3, 5).detach(), 4000
    t = torch.full((count,), 600)
    a, s = coefficients(OVER, t)
    x = torch.tensor([[0.3, -0.2]]).expand(count, -1)
    likely = (-0.5 * (x[:1, None] - a[:1] * particles).square().sum(-1) / s[0] ** 2).softmax(-1)[0]
    whose = torch.multinomial(likely, count, replacement=True, generator=torch.Generator().manual_seed(0))
    noised = Noised(particles[whose], x, (x - a * particles[whose]) / s, t)
    text = Mixture(OVER)(x[:1], t[:1], words(0, 1)).expand(count, -1)
    best = ((noised.noise.mean(0) + gamma * text[0]) / (1 + gamma)).requires_grad_()
    method = ASD(Mixture(OVER), OVER, Score(), Told(None), gamma)
    slope = torch.autograd.grad(method.judge(best.expand(count, -1), text, noised), best)[0]
    assert slope.abs().max() < 1e-5
    assert torch.allclose(noised.noise.mean(0), rendered(OVER, particles, x[:1], t[:1])[0], atol=0.05)


@pytest.mark.parametrize("lam,gamma,effective", [(7.5, -0.5, 4.25), (7.5, -0.75, 2.625), (20.0, -0.5, 10.5)])
def test_asd_is_vsd_at_a_smaller_guidance(lam: float, gamma: float, effective: float) -> None:
    """At the optimal discriminator ASD(lam, gamma) = VSD(1 + (lam - 1)(1 + gamma)) / (1 + gamma)."""
    z, teacher = points(), Mixture(OVER)
    fake = Told(lambda noisy, t: rendered(OVER, z.detach(), noisy, t))
    best = Told(lambda noisy, t: (fake(noisy, t, None) + gamma * teacher(noisy, t, words(0, COUNT))) / (1 + gamma))
    ours = gradient(ASD(teacher, OVER, Score(lam), best, gamma), z)
    theirs = gradient(vsd(teacher, OVER, Score(effective), fake), z)
    assert torch.allclose(ours, theirs / (1 + gamma), rtol=1e-4, atol=1e-5)


def test_what_is_not_finite_moves_nothing() -> None:
    z, t = points(), torch.full((COUNT,), 500)
    wanted = torch.ones(COUNT, 2)
    wanted[:3, 0] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    given = torch.autograd.grad(SDS(Mixture(OVER), OVER, Score(weighting="uniform")).inject(z, wanted, t), z)[0] * COUNT
    assert (given[:3, 0] == 0).all() and torch.allclose(given[3:], torch.ones(COUNT - 3, 2), atol=1e-5)


def test_passes_of_the_teacher() -> None:
    """No more than a method needs: e_0 only with guidance, e_y once, nothing for a discriminator's own turn."""
    told = Told(wavy)

    def calls(make, lam: float = 7.5, step: int = 0) -> list[int]:
        teacher = Mixture(OVER)
        make(teacher, Score(lam))(points(), prompts(), step)
        return teacher.calls

    both, one = [2 * COUNT], [COUNT]
    for make in (SDS, ClassifierSD):
        assert calls(lambda t, s, m=make: m(t, OVER, s)) == both
        assert calls(lambda t, s, m=make: m(t, OVER, s), lam=1.0) == one
    assert calls(lambda t, s: vsd(t, OVER, s, told)) == both
    assert calls(lambda t, s: ASD(t, OVER, s, told)) == both  # one noising for both players
    assert calls(lambda t, s: ASD(t, OVER, s, told, shared=False)) == both + one
    assert calls(lambda t, s: vsd(t, OVER, s, told, shared=False)) == both
    assert calls(lambda t, s: vsd(t, OVER, s, told, every=2), step=0) == []
    assert calls(lambda t, s: ASD(t, OVER, s, told, every=2), step=0) == one
    assert calls(lambda t, s: ASD(t, OVER, s, told, every=2), step=1) == both


def test_only_the_discriminator_learns_from_its_loss() -> None:
    fake = nn.Linear(2, 2)
    method = ASD(Mixture(OVER), OVER, Score(), Told(lambda noisy, t: fake(noisy)))
    z = points()
    step = method(z, prompts())
    assert torch.autograd.grad(step.discriminator, z, retain_graph=True, allow_unused=True)[0] is None
    assert torch.autograd.grad(step.generator, fake.weight, retain_graph=True, allow_unused=True)[0] is None
    step.total.backward()
    assert z.grad.abs().sum() > 0 and fake.weight.grad.abs().sum() > 0
    assert not [*method.schedule.parameters()] and "teacher" not in dict(method.named_modules())


class Waves(nn.Module):
    """A discriminator of random features over the teacher: e_phi = e_y + features(noisy, t) W."""

    def __init__(self, teacher: Mixture, features: int = 300) -> None:
        super().__init__()
        self.__dict__["teacher"] = teacher
        generator = torch.Generator().manual_seed(0)
        self.register_buffer(
            "pitch", torch.randn(3, features, generator=generator) * torch.tensor([[2.0], [2.0], [3.0]])
        )
        self.register_buffer("phase", torch.rand(features, generator=generator) * 6.2832)
        self.weight = nn.Parameter(torch.zeros(features, 2))

    def forward(self, noisy: Tensor, t: Tensor, prompts: Prompts) -> Tensor:
        at = torch.cat([noisy, t[:, None] / len(OVER)], 1)
        with torch.no_grad():
            text = self.teacher(noisy, t, prompts.target)
        return text + (at @ self.pitch + self.phase).cos() @ self.weight * (2 / len(self.phase)) ** 0.5


def radius(gamma: float, lam: float, steps: int = 900) -> float:
    """Mean distance from the centre, relative to the class's 1, of particles after distillation."""
    torch.manual_seed(0)
    teacher = Mixture(OVER)
    fake, z = Waves(teacher), (torch.randn(COUNT, 2) * 0.5).requires_grad_()
    method = ASD(teacher, OVER, Score(lam, "uniform", Timesteps(0.02, 0.98)), fake, gamma)
    optimizer = torch.optim.Adam([{"params": [z], "lr": 0.02}, {"params": [*fake.parameters()], "lr": 3e-3}])
    far = []
    for step in range(steps):
        optimizer.zero_grad()
        method(z, prompts(), step).total.backward()
        optimizer.step()
        if step >= steps - 200:
            far.append(z.detach().norm(dim=1).mean())
    return float(torch.stack(far).mean())


def test_with_gamma_minus_one_guidance_hardly_matters() -> None:
    """The paper's claim, on a discriminator that has to learn: VSD leaves the class with guidance, ASD(-1) stays."""
    vsd_radius, asd_radius = ({lam: radius(gamma, lam) for lam in (1.0, 7.5)} for gamma in (0.0, -1.0))
    print("radius by guidance: VSD", vsd_radius, "ASD", asd_radius)
    assert abs(vsd_radius[1.0] - 1) < 0.15 and abs(asd_radius[1.0] - 1) < 0.15
    assert vsd_radius[7.5] > 1.5
    assert abs(asd_radius[7.5] - asd_radius[1.0]) < 0.3 * (vsd_radius[7.5] - vsd_radius[1.0])


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: Score(guidance=-1.0), "guidance is -1.0"),
        (lambda: Score(guidance=float("nan")), "guidance is nan"),
        (lambda: ASD(Mixture(OVER), OVER, Score(), Told(None), gamma=-1.5), "gamma is -1.5"),
        (lambda: ASD(Mixture(OVER), OVER, Score(), Told(None), gamma=0.5), "gamma is 0.5"),
        (lambda: ASD(Mixture(OVER), OVER, Score(), Told(None), gamma=float("nan")), "gamma is nan"),
        (lambda: ASD(Mixture(OVER), OVER, Score(), Told(None), eta=-0.5), "eta is -0.5"),
        (lambda: ASD(Mixture(OVER), OVER, Score(), Told(None), eta=float("nan")), "eta is nan"),
        (lambda: ASD(Mixture(OVER), OVER, Score(), Told(None), every=0), "`every` must be at least 1, not 0"),
        (lambda: LoRAFake(nn.Linear(1, 1), OVER, rank=0), "`rank` must be at least 1, not 0"),
        (lambda: Timesteps(low=0.5, high=0.2), "timesteps.high is 0.2"),
    ],
)
def test_values_out_of_range_are_one_line(make, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_annealing_narrows_the_noise_levels() -> None:
    jump, line = Timesteps(end=0.5, anneal_from=100), Timesteps(end=0.5, anneal_from=100, anneal_to=200)
    assert [jump.highest(s) for s in (0, 99, 100, 500)] == [0.98, 0.98, 0.5, 0.5]
    assert line.highest(150) == pytest.approx(0.74) and line.highest(300) == 0.5
    drawn = line.sample(5000, 1000, 300, torch.device("cpu"))
    assert drawn.min() >= 20 and 490 < drawn.max() < 500
