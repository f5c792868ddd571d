import pytest
import torch
from diffusers import DDIMScheduler

from lit_gen.diffusion.objective import Schedule
from lit_gen.diffusion.sampling import classifier_free, ddim, noise_from, two_scale


def scheduler(**changes):
    given = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
    return DDIMScheduler(**{**given, "set_alpha_to_one": False, **changes})


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_is_the_one_of_diffusers(spacing, prediction, eta):
    theirs = scheduler(timestep_spacing=spacing, prediction_type=prediction)
    schedule = Schedule(theirs)
    theirs.set_timesteps(20)
    assert theirs.timesteps.tolist() == schedule.timesteps(20)

    def network(x, t):
        return torch.tanh(x) * t.view(-1, 1) / 1000

    start = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    expected, generator = start, torch.Generator().manual_seed(1)
    for t in theirs.timesteps:
        expected = theirs.step(network(expected, t.view(1)), t, expected, eta=eta, generator=generator).prev_sample
    generator = torch.Generator().manual_seed(1)
    actual = ddim(network, schedule, start, 20, eta, lambda x: torch.randn(x.shape, generator=generator))
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-3)


def test_ddim_with_the_true_noise_recovers_the_picture():
    schedule = Schedule(scheduler())
    clean, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    t = schedule.timesteps(10)[0]
    start = schedule.add_noise(clean, noise, torch.full((2,), t))

    def oracle(x, t):  # the noise that is in x, if the picture is `clean`
        a = schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
        return (x - a.sqrt() * clean) / (1 - a).sqrt()

    end = ddim(oracle, schedule, start, 10)
    left = (1 - schedule.final_alpha) ** 0.5  # the last step of "leading" stops at abar_0, not at 1
    torch.testing.assert_close(end, schedule.final_alpha**0.5 * clean + left * noise, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_target_and_split_are_inverse(prediction):
    schedule = Schedule(scheduler(prediction_type=prediction))
    clean, noise, t = torch.randn(3, 8), torch.randn(3, 8), torch.tensor([1, 400, 900])
    noisy = schedule.add_noise(clean, noise, t)
    back, eps = schedule.split(schedule.target(clean, noise, t), noisy, t)
    torch.testing.assert_close(back, clean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(eps, noise, atol=1e-4, rtol=1e-4)
    assert schedule.loss(schedule.target(clean, noise, t), clean, noise, t).max() == 0


def test_min_snr_weights_easy_timesteps_down_only():
    schedule = Schedule(scheduler())
    clean, noise, t = torch.zeros(2, 8), torch.ones(2, 8), torch.tensor([0, 999])
    plain = schedule.loss(torch.zeros(2, 8), clean, noise, t)
    weighted = schedule.loss(torch.zeros(2, 8), clean, noise, t, min_snr=5.0)
    assert weighted[0] < plain[0] / 100 and weighted[1] == plain[1]


def test_lowest_snr_gives_the_noisiest_timesteps_a_say():
    schedule = Schedule(scheduler())
    clean, noise, t = torch.randn(3, 8), torch.randn(3, 8), torch.tensor([999, 500, 10])
    plain, raised = (schedule.loss(clean, clean, noise, t, 5.0, lowest) for lowest in (0.0, 0.2))
    snr = schedule.alphas_cumprod[t] / (1 - schedule.alphas_cumprod[t])
    assert snr[0] < 0.2 < snr[1]
    torch.testing.assert_close(raised / plain, torch.tensor([0.2 / snr[0], 1.0, 1.0]))


def test_two_scale_guidance_is_equation_2():
    null, text, both = torch.randn(3, 5).unbind(0)
    guided = two_scale(null, text, both, text_scale=7.5, style_scale=5.0)
    torch.testing.assert_close(guided, null + 5.0 * (both - text) + 7.5 * (text - null))
    # Equal scales are one difference to the doubly conditioned output.
    torch.testing.assert_close(two_scale(null, text, both, 3.0, 3.0), classifier_free(null, both, 3.0))


def test_noise_of_a_sample_does_not_depend_on_its_batch():
    together, alone = noise_from([1, 2, 3], (4, 2), "cpu"), noise_from([2], (4, 2), "cpu")
    assert torch.equal(together[1], alone[0])
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_clean_weight_gives_the_error_of_the_clean_latent(prediction):
    schedule = Schedule(scheduler(prediction_type=prediction))
    clean, noise, output = torch.randn(3, 4, 64, generator=torch.Generator().manual_seed(0)).unbind(0)
    t = torch.tensor([5, 300, 700, 900])
    implied, _ = schedule.split(output, schedule.add_noise(clean, noise, t), t)
    literal = (implied - clean).square().mean(1)
    weighted = schedule.loss(output, clean, noise, t) * schedule.clean_weight(t)
    if prediction == "epsilon":  # whose weight has a bound, which the noisiest steps feel
        snr = schedule.alphas_cumprod[t] / (1 - schedule.alphas_cumprod[t])
        literal = literal * snr / (snr + 0.005)
    torch.testing.assert_close(weighted, literal, rtol=1e-3, atol=1e-6)
    assert schedule.clean_weight(torch.arange(1000)).max() <= (200 if prediction == "epsilon" else 1)


def test_timesteps_are_drawn_as_often_as_the_bias_says():
    schedule = Schedule(scheduler())
    torch.manual_seed(0)
    for bias in (0.0, 2.0):
        t = schedule.sample_timesteps(100_000, "cpu", bias)
        assert t.min() >= 0 and t.max() <= 999
        for quarter in (250, 500, 750):  # the integral of a density that goes with t ** bias
            assert (t < quarter).float().mean() == pytest.approx((quarter / 1000) ** (1 + bias), abs=0.006)


def test_half_precision_does_not_reach_the_noise_levels():
    schedule = Schedule(scheduler())
    exact = schedule.alphas_cumprod.clone()
    network = torch.nn.ModuleList([schedule, torch.nn.Linear(1, 1)]).to(torch.bfloat16)
    assert network[1].weight.dtype == torch.bfloat16
    assert schedule.alphas_cumprod.dtype == torch.float32 and torch.equal(schedule.alphas_cumprod, exact)
    clean, t = torch.ones(2, 3, dtype=torch.bfloat16), torch.tensor([0, 900])
    noisy = schedule.add_noise(clean, clean, t)
    assert noisy.dtype == schedule.target(clean, clean, t).dtype == torch.bfloat16
    assert all(part.dtype == torch.bfloat16 for part in schedule.split(noisy, noisy, t))
    torch.set_default_dtype(torch.bfloat16)  # as Lightning does around the steps of "bf16-true"
    try:
        assert len(schedule.sample_timesteps(4000, "cpu", bias=1.0).unique()) > 700
        assert max(schedule.timesteps(10)) < len(schedule)
    finally:
        torch.set_default_dtype(torch.float32)
