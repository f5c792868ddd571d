import pytest
import torch
from torch.nn.functional import grid_sample

from lit_gen.world.camera import camera_of
from lit_gen.world.motion import animate
from lit_gen.world.render import render_video
from lit_gen.world.sampling import sample
from lit_gen.world.vocabulary import MOTIONS

SIZE = 64


@pytest.fixture(scope="module")
def scenes():
    """A film of each motion."""
    scenes = sample("motion", "train", 0, torch.arange(200))
    first = [int(((scenes.motion == m) & (scenes.time != 2)).nonzero()[0]) for m in range(len(MOTIONS))]
    return scenes[torch.tensor(first)]


@pytest.fixture(scope="module")
def clip(scenes):
    return render_video(scenes, frames=8, size=SIZE)


def look(buffer, flow, mode="bilinear"):
    """What `buffer` (B C H W) of the next frame shows where the points of this frame have gone."""
    grid = torch.arange(SIZE, dtype=torch.float32)
    place = torch.stack([grid[None, None, :] + flow[:, 0], grid[None, :, None] + flow[:, 1]], -1)
    return grid_sample(buffer, (place * 2 + 1) / SIZE - 1, mode=mode, align_corners=False, padding_mode="border"), place


def test_shapes(clip):
    assert clip.rgb.shape == (len(MOTIONS), 8, 3, SIZE, SIZE)
    assert clip.flow.shape == (len(MOTIONS), 7, 2, SIZE, SIZE)
    assert clip.instance.shape == clip.depth.shape == (len(MOTIONS), 8, SIZE, SIZE)


@pytest.mark.parametrize("motion", range(len(MOTIONS)), ids=MOTIONS)
def test_flow_leads_to_the_same_point_of_the_next_frame(clip, motion):
    flow = clip.flow[motion]
    now, then = clip.rgb[motion, :-1], clip.rgb[motion, 1:]
    warped, place = look(then, flow)
    thing, _ = look(clip.instance[motion, 1:, None].float(), flow, "nearest")
    inside = ((place >= 0) & (place <= SIZE - 1)).all(-1)
    mover = (clip.instance[motion, :-1] == 1) & inside
    seen = mover & (thing[:, 0] == 1)
    assert seen.sum() > 200
    # What leaves sight (the far side of what spins, the ground before what moves) is a small part.
    assert seen.sum() / mover.sum() > 0.85
    error = (warped - now).abs().mean(1)
    if MOTIONS[motion] == "stays still":
        assert error.max() < 1e-3
    else:
        assert error[seen].median() < 0.1  # light changes on what turns
        assert error[seen].mean() < 0.75 * (then - now).abs().mean(1)[seen].mean()
    ground = (clip.instance[motion, :-1] == 0) & (thing[:, 0] == 0) & inside
    assert error[ground].median() < 0.03


def test_flow_follows_points_of_the_moving_object(scenes, clip):
    """The point that flow leads to has the same place on the object, whose pose is known in both frames."""
    moments = animate(scenes, torch.linspace(0, 1, 8))
    camera = camera_of(moments)
    depth = clip.depth.flatten(0, 1)
    points = camera.position[:, :, None, None] + depth[:, None] * camera.rays(SIZE)
    x, y, z = (points - moments.position[:, 0, :, None, None]).unbind(1)
    cosine, sine = (f(moments.yaw[:, 0])[:, None, None] for f in (torch.cos, torch.sin))
    local = torch.stack([cosine * x + sine * y, cosine * y - sine * x, z], 1) / moments.radius[:, 0, None, None, None]
    local = local.unflatten(0, (-1, 8))
    for motion in range(len(MOTIONS)):
        now, then = clip.instance[motion, :-1] == 1, clip.instance[motion, 1:, None].float()
        there, _ = look(local[motion, 1:], clip.flow[motion])
        # Pixels whose four neighbours in the next frame all show the object, which is not cut by its outline there.
        whole, _ = look((then == 1).float(), clip.flow[motion])
        seen = now & (whole[:, 0] > 0.999)
        miss = (there - local[motion, :-1]).norm(dim=1)[seen]
        assert seen.sum() > 200
        assert miss.median() < 0.02 and miss.quantile(0.9) < 0.1, MOTIONS[motion]


def test_only_what_moves_has_flow(clip):
    still, left = (MOTIONS.index(m) for m in ("stays still", "moves left"))
    assert clip.flow[still].abs().max() < 1e-3
    mover = clip.instance[left, :-1] == 1
    assert (clip.flow[left, :, 0][mover] < -0.5).all()
    assert clip.flow[left].abs().amax(1)[clip.instance[left, :-1] == 0].max() < 1e-3
    circled = MOTIONS.index("is circled")
    assert clip.flow[circled].abs().amax(1)[clip.instance[circled, :-1] == 0].mean() > 0.5
