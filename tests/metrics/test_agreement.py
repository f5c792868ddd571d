"""What counts as right: order-free, attribute by attribute, and only what the picture can show."""

import copy

import torch
from perfect import perfect_reading, random_order

from lit_gen.metrics.agreement import ATTRIBUTES, compare
from lit_gen.metrics.objects import MaskIoU, SubjectSimilarity, mask_iou
from lit_gen.metrics.prompt import ContentAccuracy, LeakRate, PromptAccuracy
from lit_gen.metrics.reading import VideoReading
from lit_gen.metrics.style import StyleError
from lit_gen.metrics.video import Flicker, MotionAccuracy, flicker
from lit_gen.world.grammar import captions
from lit_gen.world.sampling import sample
from lit_gen.world.vocabulary import MOTIONS, RELATIONS

SCENES = sample("base", "val", 0, torch.arange(300))


def test_a_perfect_reading_is_right_in_any_order_of_slots():
    order = random_order(300)
    reading = perfect_reading(SCENES, order)
    metric = PromptAccuracy()
    metric.update(reading, SCENES)
    assert {name: float(value) for name, value in metric.compute().items()} == dict.fromkeys(metric.compute(), 1.0)
    assert {"shape", "colour", "pattern", "relation", "style", "view", "count", "time", "all"} <= set(metric.compute())
    there = SCENES.kind >= 0
    assert torch.equal(compare(reading, SCENES).slot[there], order[there])


def test_one_wrong_attribute_costs_exactly_that_attribute():
    single = SCENES[SCENES.kind[:, 1] < 0]
    reading = perfect_reading(single, random_order(len(single)))
    reading.colour = (reading.colour + 1) % 8
    metric = PromptAccuracy()
    metric.update(reading, single)
    result = metric.compute()
    assert result["colour"] == 0 and result["shape"] == 1 and result["pattern"] == 1
    coloured = compare(reading, single).counted["colour"].any(1)
    assert result["all"] == (~coloured).float().mean()
    content = ContentAccuracy(attributes=("shape", "colour"))(reading, single)
    assert content == len(single) / (len(single) + coloured.sum())


def test_swapped_colours_of_two_objects_are_not_forgiven():
    scenes = sample("pairs", "val", 0, torch.arange(64))
    reading = perfect_reading(scenes, torch.arange(3).expand(64, -1))
    reading.colour[:, :2] = reading.colour[:, :2].flip(1)
    agreement = compare(reading, scenes)
    differ = scenes.kind[:, 0] != scenes.kind[:, 1]
    assert not (agreement.right["colour"] & agreement.counted["colour"])[differ].any()
    assert agreement.accuracy("shape") == 1


def test_only_what_the_captions_say_counts():
    said = captions(SCENES, "partial")
    reading = perfect_reading(SCENES, random_order(300))
    reading.view = reading.view + 1
    whole, partial = PromptAccuracy(), PromptAccuracy()
    whole.update(reading, SCENES)
    partial.update(reading, SCENES, said)
    views = sum("view" in caption.facts and int(view) >= 0 for caption, view in zip(said, SCENES.view, strict=True))
    colours = sum("colour" in stated for caption in said for stated in caption.facts["objects"].values())
    names = list(ATTRIBUTES)
    assert partial.counted[names.index("view")] == views and 0 < views < 300
    assert partial.counted[names.index("colour")] <= colours < whole.counted[names.index("colour")]
    assert partial.compute()["view"] == 0 and partial.compute()["shape"] == 1 and partial.compute()["relation"] == 1


def test_missing_and_extra_objects_fail_the_count():
    reading = perfect_reading(SCENES, torch.arange(3).expand(300, -1))
    reading.present[:, 0] = False
    metric = PromptAccuracy(attributes=("count", "shape"))
    metric.update(reading, SCENES)
    assert metric.compute()["count"] == 0 and metric.compute()["shape"] < 1


def test_next_to_holds_in_any_direction_but_not_stacked():
    scenes = sample("pairs", "val", 0, torch.arange(200))
    scenes = scenes[(scenes.relation[:, 0] >= 0) & (scenes.relation[:, 0] != RELATIONS.index("on top of"))]
    truth = perfect_reading(scenes, torch.arange(3).expand(len(scenes), -1))
    beside = scenes.replace(relation=torch.where(scenes.relation >= 0, RELATIONS.index("next to"), -1))
    assert compare(truth, beside).accuracy("relation") == 1
    stacked = scenes.replace(relation=torch.where(scenes.relation >= 0, RELATIONS.index("on top of"), -1))
    assert compare(perfect_reading(stacked, torch.arange(3).expand(len(scenes), -1)), beside).accuracy("relation") == 0
    assert compare(truth, stacked).accuracy("relation") == 0


def test_leak_rate_counts_the_reference_shape():
    single = SCENES[(SCENES.kind[:, 1] < 0)][:40]
    other = single.replace(kind=torch.where(single.kind >= 0, (single.kind + 1) % 5, -1))
    order = torch.arange(3).expand(len(single), -1)
    metric = LeakRate()
    metric.update(perfect_reading(single, order), single, other)
    assert metric.compute() == 0
    metric.update(perfect_reading(other, order), single, other)
    assert metric.compute() == 0.5


def test_style_error_and_retrieval():
    styles = sample("styled", "val", 0, torch.arange(64))
    reading = perfect_reading(styles, torch.arange(3).expand(64, -1))
    metric = StyleError()
    metric.update(reading, styles.style_parameters)
    assert metric.compute()["error"] == 0 and metric.compute()["rank1"] == 1
    reading.style_parameters = reading.style_parameters.roll(1, 0)
    metric.reset()
    metric.update(reading, styles.style_parameters)
    assert metric.compute()["error"] > 0.1 and metric.compute()["rank1"] < 0.1


def test_motion_accuracy_wants_the_right_object_to_move():
    scenes = sample("motion", "val", 0, torch.arange(64))
    first = perfect_reading(scenes, torch.arange(3).expand(64, -1))
    moves = torch.tensor([name not in ("stays still", "is circled") for name in MOTIONS])[scenes.motion]
    mover = scenes.mover.where(moves, torch.full_like(scenes.mover, -1))
    metric = MotionAccuracy()
    metric.update(VideoReading(scenes.motion, torch.ones(64), mover, first, first), scenes)
    assert metric.compute() == {"motion": 1, "mover": 1, "still": 0}
    wrong = (mover + 1).where(moves, mover)
    metric.update(VideoReading(torch.zeros_like(mover), torch.ones(64), wrong, first, first), scenes)
    assert metric.compute()["still"] == 0.5 and metric.compute()["mover"] < 0.9


def test_flicker_ignores_steady_change_and_sees_noise():
    ramp = torch.linspace(-1, 1, 8).view(1, 8, 1, 1, 1).expand(2, 8, 3, 4, 4)
    assert flicker(ramp).max() < 1e-6
    metric = Flicker()
    metric.update(torch.tensor([0.0, 1.0, 0.0, 1.0]).view(1, 4, 1, 1, 1).expand(1, 4, 3, 4, 4))
    assert metric.compute() == 2


def test_mask_iou_is_order_free_and_small_objects_can_be_left_out():
    instance = torch.zeros(1, 64, 64, dtype=torch.long)
    instance[0, :20, :20], instance[0, 40:, 40:] = 1, 2
    reading = perfect_reading(SCENES[:1], torch.arange(3)[None])
    reading.present[:] = True
    reading.mask[0, 2, :20, :20] = True
    reading.mask[0, 0, 40:, 40:52] = True
    assert mask_iou(reading, instance).tolist() == [[1.0, 0.5, -1.0]]
    metric = MaskIoU(smallest=500)
    metric.update(reading, instance)
    assert metric.compute() == 0.5


def test_subject_similarity_prefers_the_own_reference():
    subjects = sample("subjects", "val", 0, torch.arange(0, 64, 8))
    reading = perfect_reading(subjects, torch.arange(3).expand(8, -1))
    reading.mask[:, :, :8] = True
    metric = SubjectSimilarity()
    metric.update(reading, reading)
    assert metric.compute()["identity"] == 1 and metric.compute()["similarity"] > 0.999
    other = copy.copy(reading)
    other.embedding = reading.embedding.roll(1, 0)
    metric.reset()
    metric.update(reading, other)
    assert metric.compute()["identity"] < 0.5
