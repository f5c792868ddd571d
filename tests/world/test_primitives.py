import pytest
import torch
from plain import first_hit, implicit

from lit_gen.world.primitives import FOOTPRINT, HEIGHT, PRIMITIVES, hit, normal, parts_of
from lit_gen.world.sampling import sample
from lit_gen.world.vocabulary import KINDS


def rays_around(count, seed=0):
    """Rays (3 Q each) that start outside the unit cube and mostly pass through it."""
    draw = torch.Generator().manual_seed(seed)
    start = torch.nn.functional.normalize(torch.randn(3, count, generator=draw), dim=0) * 5
    aim = (torch.rand(3, count, generator=draw) * 2 - 1) * 0.9
    return start, (aim - start) / 5


@pytest.mark.parametrize("name", PRIMITIVES)
def test_hits_agree_with_small_steps_in_double_precision(name):
    origin, ray = rays_around(1500)
    t = hit(name, origin, ray)
    plain, chord = first_hit(name, origin.T.double(), ray.T.double(), 2.0, 8.0)
    both = torch.isfinite(t) & torch.isfinite(plain)
    assert both.float().mean() > 0.2
    error = (t - plain)[both].abs()
    assert error.median() < 1e-6 and error.quantile(0.99) < 1e-4
    assert error.max() < (0.02 if name == "ring" else 1e-4)  # where a ray grazes the ring
    one = torch.isfinite(t) ^ torch.isfinite(plain)
    # Only rays that graze the surface may be judged differently: steps of 0.003 miss chords shorter than that.
    assert one.float().mean() < 0.01
    assert chord[one].max().item() < 0.08 if one.any() else True


@pytest.mark.parametrize("name", PRIMITIVES)
def test_normals_are_the_gradient_of_the_surface(name):
    origin, ray = rays_around(1500, seed=1)
    t = hit(name, origin, ray)
    met = torch.isfinite(t)
    point = (origin + t * ray)[:, met]
    ours = torch.nn.functional.normalize(normal(name, point), dim=0)
    p = point.T.double().requires_grad_()
    (slope,) = torch.autograd.grad(implicit(name, p).sum(), p)
    cosine = (torch.nn.functional.normalize(slope, dim=1).T * ours).sum(0)
    assert (cosine > 0.999).float().mean() > 0.985  # all but points at edges
    assert ((ours * ray[:, met]).sum(0) < 1e-3).float().mean() > 0.99  # towards where the ray came from


def test_parts_map_between_world_and_unit_space():
    parts = parts_of(sample("base", "train", 0, torch.arange(64)))
    product = parts.to_world @ parts.to_unit
    assert torch.allclose(product, torch.eye(3).expand_as(product), atol=1e-5)
    assert (parts.primitive.diff() >= 0).all()


@pytest.mark.parametrize("kind", range(len(KINDS)), ids=KINDS)
def test_footprint_and_height_hold_every_kind(kind):
    scenes = sample("objects", "train", 0, torch.arange(1))
    scenes = scenes.replace(kind=torch.tensor([[kind, -1, -1]]))
    parts = parts_of(scenes)
    cloud = (torch.rand(40000, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1) * 1.0
    points = []
    for e in range(len(parts.scene)):
        inside = implicit(PRIMITIVES[parts.primitive[e]], cloud) <= 0
        points.append(cloud[inside] @ parts.to_world[e].T + parts.centre[e])
    away = (torch.cat(points) - scenes.position[0, 0]) / scenes.radius[0, 0]
    assert away[:, 2].min() > -0.01
    assert HEIGHT[kind] - 0.15 < away[:, 2].max() < HEIGHT[kind] + 1e-3
    reach = away[:, :2].norm(dim=1).max()
    assert FOOTPRINT[kind] - 0.1 < reach < FOOTPRINT[kind] + 1e-3
