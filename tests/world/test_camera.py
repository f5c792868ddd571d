import math

import pytest
import torch

from lit_gen.world.camera import camera_of
from lit_gen.world.sampling import sample


def test_points_on_rays_project_back_to_their_pixels():
    camera = camera_of(sample("objects", "train", 0, torch.arange(16)))
    depth = torch.rand(16, 1, 8, 8) * 5 + 1
    points = camera.position[:, :, None, None] + depth * camera.rays(8)
    x, y, found = camera.project(points, 8)
    grid = torch.arange(8.0)
    assert torch.allclose(x, grid[None, None, :].expand_as(x), atol=1e-3)
    assert torch.allclose(y, grid[None, :, None].expand_as(y), atol=1e-3)
    assert torch.allclose(found, depth[:, 0], atol=1e-4)


def test_axes_are_orthonormal_at_every_elevation():
    scenes = sample("objects", "train", 0, torch.arange(8))
    scenes = scenes.replace(elevation=torch.linspace(-math.pi / 2, math.pi / 2, 8))
    camera = camera_of(scenes)
    axes = torch.stack([camera.right, camera.up, -camera.forward], 1)
    assert torch.allclose(axes @ axes.transpose(1, 2), torch.eye(3).expand(8, 3, 3), atol=1e-6)
    assert torch.allclose(torch.linalg.det(axes), torch.ones(8), atol=1e-6)


@pytest.mark.parametrize(
    "azimuth,point,side",
    [(0, (1, 0, 0), "right"), (90, (0, 1, 0), "right"), (180, (1, 0, 0), "left"), (0, (0, 0, 1), "above")],
)
def test_sides_are_those_the_conventions_promise(azimuth, point, side):
    scenes = sample("objects", "train", 0, torch.arange(1))
    scenes = scenes.replace(
        azimuth=torch.tensor([math.radians(azimuth)]), elevation=torch.zeros(1), target=torch.zeros(1, 3)
    )
    camera = camera_of(scenes)
    x, y, depth = camera.project(torch.tensor([point]).float(), 65)
    assert torch.allclose(depth, scenes.distance, atol=1e-5)
    if side == "above":
        assert y < 31 and abs(x - 32) < 1e-3
    else:
        assert (x > 33) if side == "right" else (x < 31)
    # Azimuth 0 stands at -y, and grows towards +x.
    expected = torch.tensor([math.sin(math.radians(azimuth)), -math.cos(math.radians(azimuth)), 0]) * scenes.distance
    assert torch.allclose(camera.position[0], expected, atol=1e-5)
