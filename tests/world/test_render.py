import math

import pytest
import torch
from plain import plain_buffers

from lit_gen.world.camera import camera_of
from lit_gen.world.render import NO_SURFACE, render
from lit_gen.world.sampling import sample
from lit_gen.world.styles import NAMED
from lit_gen.world.textures import PALETTE
from lit_gen.world.trace import FAR
from lit_gen.world.vocabulary import COLOURS, FLOORS, KINDS, PATTERNS, TIMES


def one_object(count, **changes):
    """`count` scenes of one plain red ball on a grey backdrop by day, seen from the front; changes replace fields."""
    scenes = sample("objects", "train", 0, torch.zeros(count, dtype=torch.long))
    absent = torch.full((count, 2), -1)

    def slots(value):
        return torch.cat([torch.as_tensor(value).expand(count)[:, None], absent], 1)

    fields = dict(kind=0, colour=0, pattern=0, subject=-1) | {
        k: changes.pop(k) for k in ("kind", "colour", "pattern", "subject") if k in changes
    }
    everywhere = dict(
        floor=FLOORS.index("backdrop"),
        time=0,
        azimuth=0.0,
        elevation=math.radians(15),
        distance=4.0,
        fov=math.radians(40),
    ) | {k: changes.pop(k) for k in ("floor", "time", "azimuth", "elevation") if k in changes}
    return scenes.replace(
        **{name: slots(value) for name, value in fields.items()},
        **{name: torch.as_tensor(value).expand(count).clone() for name, value in everywhere.items()},
        marked=torch.zeros(count, 3, dtype=torch.bool) | changes.pop("marked", False),
        radius=torch.full((count, 3), 0.6),
        position=torch.zeros(count, 3, 3),
        yaw=torch.zeros(count, 3),
        target=torch.tensor([0.0, 0.0, 0.6]).expand(count, 3),
        backdrop=torch.full((count, 3), 0.6),
        style_parameters=NAMED[:1].expand(count, -1),
        normals=torch.zeros(count, dtype=torch.bool) | changes.pop("normals", False),
        **changes,
    )


def test_buffers_agree_with_the_plain_renderer():
    scenes = sample("base", "val", 3, torch.arange(300))
    picked = [int((scenes.kind == kind).any(1).nonzero()[0]) for kind in range(len(KINDS))]
    scenes = scenes[torch.tensor(picked)]
    frames = render(scenes, 20)
    depth, instance, normal = plain_buffers(scenes, 20)
    same = frames.instance == instance
    assert same.float().mean() > 0.995  # a small step may miss what a ray grazes
    error = (frames.depth - depth).abs()[same]
    assert error.quantile(0.99) < 2e-4
    cosine = (frames.normal * normal).sum(1)[same & (instance > 0)]
    assert (cosine > 0.999).float().mean() > 0.99
    assert (instance > 0).float().mean() > 0.05


def test_normals_are_those_of_the_depth():
    scenes = one_object(2, kind=torch.tensor([KINDS.index("ball"), KINDS.index("ring")]))
    frames = render(scenes, 96)
    points = frames.camera.position[:, :, None, None] + frames.depth[:, None] * frames.camera.rays(96)
    right, down = points[..., 1:-1, 2:] - points[..., 1:-1, :-2], points[..., 2:, 1:-1] - points[..., :-2, 1:-1]
    slope = torch.nn.functional.normalize(torch.linalg.cross(down, right, dim=1), dim=1)
    cosine = (slope * frames.normal[..., 1:-1, 1:-1]).sum(1)
    thing = frames.instance > 0
    inner = -torch.nn.functional.max_pool2d(-thing[:, None].float(), 5, 1, 2)[:, 0, 1:-1, 1:-1] > 0
    assert inner.sum() > 500
    assert cosine[inner].quantile(0.05) > 0.995
    floor = ~thing & (frames.depth < FAR)
    assert torch.equal(frames.normal.permute(0, 2, 3, 1)[floor][0], torch.tensor([0.0, 0.0, 1.0]))


def test_sky_is_far_away_and_has_no_normal():
    frames = render(one_object(1, floor=FLOORS.index("grass"), elevation=0.1), 32)
    assert (frames.depth[0, 0] == FAR).all() and (frames.normal[0, :, 0] == 0).all()
    assert (frames.depth[0, -1] < 10).all()


def test_pictures_do_not_depend_on_the_chunk_or_the_run():
    scenes = sample("base", "train", 0, torch.arange(24))
    together, again, alone = render(scenes), render(scenes), render(scenes, chunk=5)
    assert torch.equal(together.rgb, again.rgb)
    assert torch.equal(together.instance, alone.instance) and torch.equal(together.depth, alone.depth)
    assert (together.rgb - alone.rgb).abs().max() < 2e-5  # matrix products of other sizes round otherwise
    assert together.rgb.min() >= 0 and together.rgb.max() <= 1


def test_mixed_precision_around_it_changes_nothing():
    scenes = sample("styled", "train", 0, torch.arange(2))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = render(scenes).rgb
    assert mixed.dtype == torch.float32 and torch.equal(mixed, render(scenes).rgb)


def test_supersampling_smooths_but_does_not_shift():
    scenes = sample("photo", "train", 0, torch.arange(8))
    coarse, fine = render(scenes, supersample=1), render(scenes, supersample=4)
    assert torch.equal(coarse.instance, fine.instance)
    assert (coarse.rgb.mean((2, 3)) - fine.rgb.mean((2, 3))).abs().max() < 0.01
    shifted = (coarse.rgb[..., 1:] - fine.rgb[..., :-1]).abs().mean()
    assert (coarse.rgb - fine.rgb).abs().mean() < 0.5 * shifted


@pytest.mark.parametrize("time", TIMES)
def test_colours_are_unmistakable_at_all_times(time):
    colours = torch.arange(len(COLOURS))
    scenes = one_object(len(COLOURS), kind=1, colour=colours, time=TIMES.index(time), floor=FLOORS.index("stone"))
    frames = render(scenes)
    seen = [frames.rgb[i].permute(1, 2, 0)[frames.instance[i] == 1].mean(0) for i in range(len(COLOURS))]
    seen = torch.stack(seen)
    tint = seen[COLOURS.index("white")]
    # As eyes do: relative to what white looks like, by direction of colour more than by brightness.
    guess = []
    for colour in seen:
        light = (colour / tint)[None] - PALETTE.sqrt()
        guess.append(int(light.square().sum(1).argmin()))
    if time == "fog":
        chroma = seen - seen.mean(1, keepdim=True)
        paint = PALETTE.sqrt() - PALETTE.sqrt().mean(1, keepdim=True)
        cosine = torch.nn.functional.normalize(chroma, dim=1) @ torch.nn.functional.normalize(paint, dim=1).T
        assert cosine[:6, :6].argmax(1).tolist() == list(range(6))
    else:
        assert guess == colours.tolist()


def test_night_is_dark_and_fog_pales_the_distance():
    day, night, fog = (render(one_object(1, time=t, floor=FLOORS.index("grass"))).rgb[0] for t in range(3))
    assert night.mean() < 0.6 * day.mean()
    assert fog[:, 0].std() < 0.1  # far floor and sky have one colour
    assert (fog[:, 0].mean(1) - fog[:, 0].mean()).abs().max() < 0.08


def test_marks_and_fronts_show_from_the_front_only():
    plain = one_object(2, azimuth=torch.tensor([0.0, math.pi]))
    marked = one_object(2, azimuth=torch.tensor([0.0, math.pi]), marked=True)
    change = (render(plain).rgb - render(marked).rgb).abs().amax((1, 2, 3))
    assert change[0] > 0.5 and change[1] == 0
    for kind in ("snowman", "house", "mushroom", "dumbbell", "rocket"):
        turned = one_object(2, kind=KINDS.index(kind), azimuth=torch.tensor([0.0, math.pi]), elevation=0.05)
        front, back = render(turned, 128).rgb
        sides = one_object(1, kind=KINDS.index(kind), azimuth=math.pi, elevation=0.05)
        shape = render(sides, 128).instance[0] > 0
        # Compare fronts with backs by how varied they are in colour within the outline.
        assert front[:, shape.flip(1)].std(1).sum() > back[:, shape].std(1).sum()


def test_shadows_fall_away_from_the_sun_and_touch_the_object():
    scenes = one_object(1, elevation=math.radians(35))
    with_ball, frames = render(scenes, 96), render(scenes.replace(position=torch.full((1, 3, 3), 50.0)), 96)
    floor = (with_ball.instance[0] == 0) & (frames.instance[0] == 0)
    darker = (frames.rgb - with_ball.rgb)[0].mean(0) * floor
    columns = torch.arange(96.0)
    assert darker.max() > 0.1
    assert (darker.sum(0) * columns).sum() / darker.sum() > 52  # the sun is on the left
    assert darker.min() > -1e-3


def test_a_backdrop_is_seamless():
    rgb = render(one_object(1, elevation=0.1)).rgb[0]
    assert torch.allclose(rgb[:, 0], torch.full((3, 64), 0.6), atol=0.01)
    assert (rgb[:, :, 0] - 0.6).abs().max() < 0.02
    below = render(one_object(1, elevation=-0.15))
    assert (below.rgb[0].permute(1, 2, 0)[below.instance[0] == 0] - 0.6).abs().median() < 1e-3


def test_normal_maps_show_camera_space():
    frames = render(one_object(3, normals=True, elevation=0.0, azimuth=torch.tensor([0.0, 1.0, 4.0])), 65)
    for rgb in frames.rgb:  # a ball looks the same from everywhere
        assert torch.allclose(rgb[:, 32, 32], torch.tensor([0.5, 0.5, 1.0]), atol=0.05)
        assert torch.allclose(rgb[:, 1, 1], torch.full((3,), NO_SURFACE))
    row = frames.rgb[0, :, 32][:, frames.instance[0, 32] == 1]
    assert row[0, 1] < 0.3 and row[0, -2] > 0.7  # red grows to the right
    column = frames.rgb[0, :, :, 32][:, frames.instance[0, :, 32] == 1]
    assert column[1, 1] > 0.7 and column[1, -2] < 0.3  # green grows upwards


def test_subjects_have_textures_of_their_own():
    a, b, again = render(one_object(3, subject=torch.tensor([4, 5, 4]))).rgb
    assert torch.equal(a, again)
    assert (a - b).abs().mean() > 0.02
    plain = render(one_object(1)).rgb[0]
    assert (a - plain).abs().amax() > 0.3


def test_surfaces_keep_their_paint_when_seen_from_elsewhere():
    scenes = one_object(2, azimuth=torch.tensor([0.1, 0.4]), subject=torch.tensor([7, 7]), time=TIMES.index("fog"))
    frames = render(scenes, 96)
    camera = camera_of(scenes)
    points = camera.position[:1, :, None, None] + frames.depth[:1, None] * camera.rays(96)[:1]
    x, y, depth = camera[1:].project(points, 96)
    place = torch.stack([x, y], -1) / 96 * 2 + 1 / 96 - 1
    there = torch.nn.functional.grid_sample(frames.depth[1:, None], place, align_corners=False)[:, 0]
    colour = torch.nn.functional.grid_sample(frames.rgb[1:], place, align_corners=False)
    visible = (frames.instance[:1] == 1) & ((there - depth).abs() < 0.01)
    change = (colour - frames.rgb[:1]).abs().mean(1)[visible]
    assert visible.sum() > 500 and change.median() < 0.02


def test_every_pattern_differs_and_keeps_its_colour():
    for kind in range(5):
        frames = render(one_object(len(PATTERNS), kind=kind, pattern=torch.arange(len(PATTERNS))))
        thing = frames.instance[0] == 1
        shades = frames.rgb[:, :, thing]
        red = (shades[:, 0] - shades[:, 1:].amax(1) > 0.25).float().mean(1)
        assert (red > 0.4).all() and (red[1:] < 0.85).all()
        for i in range(len(PATTERNS)):
            for j in range(i):
                assert (shades[i] - shades[j]).abs().mean() > 0.03


def test_flat_caps_have_no_speckles():
    """Points of a flat face lie exactly on a border of the pattern's rows, where rounding must not decide."""
    for kind in ("cylinder", "cone", "cube"):
        # From above, neighbouring pixels of a face seldom differ: sectors and squares are large.
        rgb = render(one_object(1, kind=KINDS.index(kind), pattern=2, elevation=1.4), 96, supersample=1).rgb[0, 1]
        turns = (rgb[:, 2:] - rgb[:, 1:-1]) * (rgb[:, 1:-1] - rgb[:, :-2])
        assert (turns < -0.05).float().mean() < 0.005  # a speckle goes up and down again


def test_a_place_without_objects_shows_its_surroundings():
    empty = one_object(1, kind=-1, floor=FLOORS.index("sand"))
    away = one_object(1, floor=FLOORS.index("sand")).replace(position=torch.full((1, 3, 3), -80.0))
    frames = render(empty, 32)
    assert (frames.instance == 0).all() and torch.allclose(frames.rgb, render(away, 32).rgb)


def test_no_scenes_are_an_error():
    with pytest.raises(ValueError, match="no scenes"):
        render(one_object(1)[:0])
