import pytest
import torch

from lit_gen.world.render import render
from lit_gen.world.sampling import sample
from lit_gen.world.scene import Scenes
from lit_gen.world.styles import (
    CIRCULAR,
    KEEPS_COLOUR,
    NAMED,
    STYLE_PARAMETERS,
    nearest_named,
    sample_style,
    style_error,
    style_is_held_out,
    visibility,
)
from lit_gen.world.stylise import Layers, stylise
from lit_gen.world.vocabulary import STYLES

P = len(STYLE_PARAMETERS)


def uniforms(count, seed=0):
    return torch.rand(count, P, generator=torch.Generator().manual_seed(seed))


def drawn(styles, count=3):
    """The same scenes in each style (rows P): rows count 3 H W."""
    scenes = sample("pairs", "train", 2, torch.arange(count))
    scenes = Scenes.cat([scenes.replace(style_parameters=row.expand(count, -1)) for row in styles])
    return render(scenes).rgb.unflatten(0, (len(styles), count))


def test_error_is_a_distance_in_0_to_1():
    a, b = sample_style(uniforms(500)), sample_style(uniforms(500, 1))
    error = style_error(a, b)
    assert torch.equal(style_error(a, a), torch.zeros(500))
    assert torch.allclose(error, style_error(b, a))
    assert error.min() > 0 and error.max() < 1
    nearer = style_error(a, torch.lerp(a, b, 0.1))
    assert (nearer < error).float().mean() > 0.9


@pytest.mark.parametrize("name", CIRCULAR)
def test_hues_and_angles_go_round(name):
    column = STYLE_PARAMETERS.index(name)
    a, b, c = (sample_style(torch.full((1, P), 0.5)) for _ in range(3))
    a[0, column], b[0, column], c[0, column] = 0.02, 0.98, 0.5
    assert 0 < style_error(a, b) < style_error(a, c) / 5


def test_what_cannot_be_seen_does_not_count():
    a = NAMED[:1].clone()
    b = a.clone()
    for name in ("ink_hue", "paper_hue", "hatch_angle", "hatch_period", "dots", "own_ink"):
        b[0, STYLE_PARAMETERS.index(name)] = 0.3
    assert style_error(a, b) == 0
    assert (drawn(a) - drawn(b)).abs().max() == 0
    assert ((visibility(NAMED) >= 0) & (visibility(NAMED) <= 1)).all()


def test_named_styles_are_their_own_nearest():
    assert nearest_named(NAMED).tolist() == list(range(len(STYLES)))
    apart = torch.stack([style_error(NAMED, row.expand_as(NAMED)) for row in NAMED])
    assert (apart + torch.eye(len(STYLES))).min() > 0.1


def test_held_out_styles_are_a_fixed_box():
    u = uniforms(20000)
    assert 0.08 < style_is_held_out(sample_style(u)).float().mean() < 0.16
    assert style_is_held_out(sample_style(u, held_out=True)).all()
    assert not style_is_held_out(sample_style(u, held_out=False)).any()
    assert not style_is_held_out(NAMED).any()
    for held_out in (None, True, False):
        style = sample_style(u, held_out)
        assert style.min() >= 0 and style.max() <= 1
        assert (style.amax(0) - style.amin(0) > 0.25).all()


def test_a_photo_is_the_identity():
    scenes = sample("photo", "train", 0, torch.arange(2))
    picture = torch.rand(2, 3, 64, 64)
    layers = Layers(picture, torch.rand(2, 1, 64, 64), torch.ones(2, 1, 64, 64), torch.zeros(2, 3, 64, 64))
    assert torch.equal(stylise(layers, NAMED[:1].expand(2, -1)), picture)
    assert torch.equal(scenes.style_parameters, NAMED[:1].expand(2, -1))


@pytest.mark.parametrize("lightness", [0.15, 0.8])
def test_every_parameter_shows(lightness):
    middle = sample_style(torch.full((1, P), 0.5))
    middle[0, STYLE_PARAMETERS.index("paper_lightness")] = lightness
    middle[0, STYLE_PARAMETERS.index("dots")] = 0.2
    ends = middle.repeat(2 * P, 1)
    for i, name in enumerate(STYLE_PARAMETERS):
        low, high = sample_style(torch.tensor([[0.0], [1.0]]).expand(2, P))[:, i]
        if name in CIRCULAR:
            high = (low + high) / 2
        if name == "paper_lightness":
            low, high = (0.0, 0.35) if lightness < 0.4 else (0.45, 1.0)
        ends[2 * i, i], ends[2 * i + 1, i] = low, high
    pictures = drawn(ends, 2).unflatten(0, (P, 2))
    change = (pictures[:, 0] - pictures[:, 1]).abs().amax(2)  # P scenes H W
    for i, name in enumerate(STYLE_PARAMETERS):
        assert (change[i] > 0.06).float().mean() > 0.03, name


def test_styles_differ_from_one_another():
    pictures = drawn(NAMED)
    for i in range(len(STYLES)):
        for j in range(i):
            assert (pictures[i] - pictures[j]).abs().mean() > 0.06, (STYLES[i], STYLES[j])
    assert pictures.min() >= 0 and pictures.max() <= 1


def test_a_style_looks_the_same_at_every_size():
    scenes = sample("styled", "train", 0, torch.arange(6))
    small = render(scenes, 64).rgb
    large = torch.nn.functional.avg_pool2d(render(scenes, 128).rgb, 2)
    assert (small - large).abs().mean() < 0.03


def test_nothing_drawn_is_too_fine_for_an_autoencoder():
    """Most of what a style adds to a photo lies in features of three pixels and more."""
    scenes = sample("styled", "train", 0, torch.arange(16))
    added = render(scenes).rgb - render(scenes.replace(style_parameters=NAMED[:1].expand(16, -1))).rgb
    spectrum = torch.fft.fft2(added - added.mean((2, 3), keepdim=True)).abs().square()
    pitch = torch.fft.fftfreq(64).abs()
    fine = torch.maximum(pitch[:, None], pitch[None]) > 1 / 3.5
    assert spectrum[..., fine].sum() < 0.1 * spectrum.sum()


def test_colours_keep_their_names_where_promised():
    scenes = sample("objects", "train", 0, torch.zeros(6, dtype=torch.long))
    column = torch.full((6, 2), -1)
    scenes = scenes.replace(
        kind=torch.cat([torch.zeros(6, 1, dtype=torch.long), column], 1),
        colour=torch.cat([torch.arange(6)[:, None], column], 1),
        pattern=torch.zeros_like(scenes.pattern),
        marked=torch.zeros_like(scenes.marked),
        subject=torch.full_like(scenes.subject, -1),
    )
    continuous = sample_style(uniforms(24, 3))
    rows = torch.cat([NAMED[torch.tensor(KEEPS_COLOUR)], continuous])
    frames = render(Scenes.cat([scenes.replace(style_parameters=row.expand(6, -1)) for row in rows]))
    thing = (frames.instance == 1).float()[:, None]
    mean = ((frames.rgb * thing).sum((2, 3)) / thing.sum((2, 3))).view(len(rows), 6, 3)
    chroma = torch.nn.functional.normalize(mean - mean.mean(2, keepdim=True), dim=2)
    guess = torch.einsum("sic,jc->sij", chroma, chroma[0]).argmax(2)
    right = guess == torch.arange(6)
    assert right[: sum(KEEPS_COLOUR)].all()
    assert right.float().mean() > 0.9
