"""Arms and seeds of an experiment, and the report that compares them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from toy import TOY

from lit_gen import sweep
from lit_gen.errors import UserError
from lit_gen.metrics import scores
from lit_gen.metrics.scores import Scores, bootstrap, difference
from lit_gen.task import Task

Command = Callable[..., int]

SWEEP = """\
stages:
  one: {trainer: {max_steps: 6}}
  two: {trainer: {max_steps: 4}}
sweep:
  seeds: [0, 1, 2]
  test: [one, two]
  arms:
    slow: {model: {init_args: {sgd: {lr: 0.0001}}}}
    quick: {model: {init_args: {sgd: {lr: 0.1}}}}
    quick then still: {take: {one: quick}, stages: {two: {model: {init_args: {sgd: {lr: 0.0}}}}}}
  report:
    out: results/toy.md
    text: Three learning rates.
    reference: slow
    measures: {error: {stage: two, better: lower}}
    claims:
      - {say: fast learns more, measure: error, arm: quick, below: slow}
      - {say: fast learns less, measure: error, arm: quick, above: slow}
      - {say: a thousand times more, measure: error, arm: quick, below: slow, times: 0.001}
"""


@pytest.fixture
def arms(here: Path) -> str:
    (here / "arms.yaml").write_text(TOY + SWEEP)
    return "arms.yaml"


def test_every_arm_and_seed_is_trained_tested_and_compared(
    lit_gen: Command, arms: str, capsys: pytest.CaptureFixture
) -> None:
    assert lit_gen("sweep", "-c", arms, "--run_root", "far", "--experiment", "other") == 0
    for arm in ("slow", "quick", "quick-then-still"):
        for seed in (0, 1, 2):
            assert Path(f"far/other/{arm}-seed{seed}/two/scores.json").is_file()
    # A taken stage is not trained again, and the next one starts from it.
    assert not Path("far/other/quick-then-still-seed0/one").exists()
    assert scores.read(Path("far/other/quick-then-still-seed0/two")) == scores.read(Path("far/other/quick-seed0/one"))
    assert scores.read(Path("far/other/quick-seed0/one")) != scores.read(Path("far/other/quick-seed1/one"))
    report = Path("results/toy.md").read_text()
    assert "| fast learns more | yes |" in report and "| fast learns less | no |" in report
    assert "| a thousand times more | no |" in report and "20 samples, 3 seeds" in report
    before = Path("far/other/quick-seed0/two/trace").read_text()
    capsys.readouterr()
    assert (
        lit_gen("sweep", "-c", arms, "--run_root", "far", "--experiment", "other") == 0
    )  # again: nothing is left but the report
    assert Path("far/other/quick-seed0/two/trace").read_text() == before
    assert "two: step" not in capsys.readouterr().out


def test_tasks_of_an_array_share_the_cells(arms: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sweep.read([arms], smoke=True).report["out"] == "runs/smoke/arms/report.md"  # the real one is left alone
    cells = sweep.read([arms]).cells
    shares = [sweep.share(cells, Task(i, 4)) for i in range(4)]
    assert sorted((c.arm, c.seed) for part in shares for c in part) == sorted((c.arm, c.seed) for c in cells)
    for part in shares:  # an arm that takes another's stage is in its task
        assert {("quick", c.seed) for c in part if c.taken} <= {(c.arm, c.seed) for c in part}
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "1")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "4")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MAX", "4")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")  # the ranks of one training, and no parts of the sweep
    done: list[tuple[str, int]] = []
    monkeypatch.setattr(sweep, "run", lambda cell, *_: done.append((cell.arm, cell.seed)))
    assert sweep.main(["-c", arms]) == 0
    assert done == [(cell.arm, cell.seed) for cell in shares[2]]


@pytest.mark.parametrize(
    "old,new,message",
    [
        ("seeds: [0", "seed: [0", "`sweep.seed`, did you mean `seeds`"),
        ("take: {one: quick}", "take: {one: quik}", "`quick then still` cannot take a stage from `quik`"),
        ("take: {one: quick}", "take: {onne: quick}", "no stage `onne`, did you mean `one`"),
        ("test: [one, two]", "test: [one, tow]", "no stage `tow` to test"),
        ("sweep:", "swep:", "a sweep needs"),
        ("lr: 0.1", "lrr: 0.1", "lrr"),
    ],
)
def test_slips_are_one_line(
    lit_gen: Command, arms: str, capsys: pytest.CaptureFixture, old: str, new: str, message: str
) -> None:
    Path(arms).write_text((TOY + SWEEP).replace(old, new))
    assert lit_gen("sweep", "-c", arms, "--arm", "quick") == 2
    assert message in capsys.readouterr().err


def test_an_interrupted_sweep_reports_what_there_is(lit_gen: Command, arms: str, capsys: pytest.CaptureFixture) -> None:
    assert lit_gen("sweep", "-c", arms, "--arm", "slow", "--seed", "1") == 0
    assert "the report waits" in capsys.readouterr().out and not Path("results").exists()
    with pytest.raises(UserError, match="no arm `slw`, did you mean `slow`"):
        sweep.main(["-c", arms, "--arm", "slw"])
    with pytest.raises(UserError, match="no seed 7, only 0, 1, 2"):
        sweep.main(["-c", arms, "--seed", "7"])
    with pytest.raises(UserError, match="a sweep has seeds of its own"):
        sweep.main(["-c", arms, "--seed_everything", "7"])


def test_arms_that_have_changed_since_are_refused(
    lit_gen: Command, arms: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else their report would be of the settings that they had."""
    one = ("sweep", "-c", arms, "--arm", "slow", "--seed", "0")
    assert lit_gen(*one) == lit_gen(*one) == 0
    for words, said in (
        (("--model.sgd.lrr", "0.5"), "did you mean `lr`"),
        (("--model.sgd.lr", "0.5"), "is finished with other settings (model.init_args.sgd.lr: 0.0001 -> 0.5)"),
        ((), "is finished with other settings (model.init_args.sgd.lr: 0.0001 -> 0.0002)"),
    ):
        if not words:
            Path(arms).write_text((TOY + SWEEP).replace("lr: 0.0001", "lr: 0.0002"))
        assert lit_gen(*one, *words) == 2
        assert said in capsys.readouterr().err


def test_intervals_cover_the_mean_and_pair_what_belongs_together() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for i in range(60):
        estimate = bootstrap(rng.normal(1.0, 1.0, (3, 80)), draws=300, seed=i)
        hits += estimate.low <= 1.0 <= estimate.high
    assert hits >= 52
    # Samples differ far more than the arms do; in pairs the difference shows all the same.
    hard = {str(i): float(v) for i, v in enumerate(rng.normal(0, 10, 200))}
    ours = [{"error": {k: v - 0.5 + rng.normal(0, 0.3) for k, v in hard.items()}} for _ in range(3)]
    theirs = [{"error": dict(reversed(hard.items()))} for _ in range(3)]
    paired = difference(ours, theirs, "error")
    assert paired.high < 0 and abs(paired.mean + 0.5) < 0.1
    with pytest.raises(UserError, match="share no sample"):
        difference(ours, [{"error": {"other": 1.0}}] * 3, "error")


def test_scores_leave_out_what_does_not_apply(tmp_path: Path) -> None:
    kept = Scores()
    kept.add(["a", "b"], style_error=np.array([0.5, float("nan")]))
    kept.write(tmp_path)
    assert scores.read(tmp_path) == {"style error": {"a": 0.5}}


def test_scores_are_kept_small_and_older_files_are_read(tmp_path: Path) -> None:
    found, keys = Scores(), [f"000000.tar/{i:08d}" for i in range(100)]
    for measure in range(20):
        found.add(keys[measure:], **{f"R@{measure}": torch.arange(100 - measure) / 7})
    found.write(tmp_path)
    assert (tmp_path / "scores.json").stat().st_size < 8 * 20 * 100 + 30 * 100
    again = scores.read(tmp_path)
    assert {name: list(column) for name, column in again.items()} == {n: list(c) for n, c in found.values.items()}
    assert all(again[n][k] == pytest.approx(v, rel=1e-4) for n, c in found.values.items() for k, v in c.items())
    (tmp_path / "scores.json").write_text(json.dumps(found.values))
    assert scores.read(tmp_path) == found.values


def test_a_claim_may_compare_two_measures(tmp_path: Path) -> None:
    from lit_gen.report import judge

    kept = Scores()
    kept.add(list("abcd"), short=np.array([0.1, 0.2, 0.3, 0.4]), long=np.array([0.6, 0.7, 0.8, 0.9]))
    kept.write(tmp_path)
    cell = sweep.Cell("arm", 0, tmp_path, (), {"stage": tmp_path}, ("stage",), "arm")
    claim = {"say": "x", "measure": "short", "arm": "arm", "below": "arm", "against": "long"}
    verdict = judge(claim, {"arm": [cell]}, {"short": {}, "long": {}})
    assert verdict.holds == "yes" and abs(verdict.figure.mean + 0.5) < 1e-6
    with pytest.raises(UserError, match="no measure `lng`, did you mean `long`"):
        judge(claim | {"against": "lng"}, {"arm": [cell]}, {"short": {}, "long": {}})


@pytest.mark.parametrize(
    "direction,margin,holds",
    [("above", 0.0, "no"), ("above", 0.4, "no"), ("above", 0.6, "yes"), ("below", 0.0, "yes"), ("below", 0.1, "yes")],
)
def test_a_claim_may_have_a_margin(tmp_path: Path, direction: str, margin: float, holds: str) -> None:
    from lit_gen.report import judge

    kept = Scores()
    kept.add(list("abcd"), ours=np.array([0.1, 0.2, 0.3, 0.4]), theirs=np.array([0.6, 0.7, 0.8, 0.9]))
    kept.write(tmp_path)
    cell = sweep.Cell("arm", 0, tmp_path, (), {"stage": tmp_path}, ("stage",), "arm")
    claim = {"measure": "ours", "arm": "arm", direction: "arm", "against": "theirs", "margin": margin}
    verdict = judge(claim, {"arm": [cell]}, {"ours": {}, "theirs": {}})
    assert verdict.holds == holds and abs(verdict.figure.mean + 0.5) < 1e-6


def test_an_arm_may_do_without_a_value(lit_gen: Command, here: Path, capsys: pytest.CaptureFixture) -> None:
    (here / "over.yaml").write_text(TOY)
    text = "base: [over.yaml]\n" + OVER.replace("half: {over: [0.0005, 0.05]}", "half: {over: [null, 0.05]}")
    (here / "arms.yaml").write_text(text)
    assert [c.arm for c in sweep.read(["arms.yaml"]).cells if c.series == "half"] == ["half, lr 0.1"]
    (here / "arms.yaml").write_text(text.replace("[null, 0.05]", "[null, null]"))
    assert lit_gen("sweep", "-c", "arms.yaml") == 2
    assert "`over` of `half` needs a list of 2" in capsys.readouterr().err


def test_overviews_show_means_and_medians(tmp_path: Path) -> None:
    from lit_gen.report import write

    cells = []
    for arm, ranks in (("near", [1.0, 2.0, 30.0]), ("far", [4.0, 50.0, 60.0])):
        folder = tmp_path / arm
        kept = Scores()
        columns = {"rank short": ranks, "rank long": [1.0, 1.0, 1.0], "ceiling short": [0.5, 0.5, 1.0]}
        kept.add(list("abc"), **{name: np.array(values) for name, values in columns.items()})
        kept.write(folder)
        (folder / "DONE").touch()
        os.utime(folder / "DONE", (0, 0))
        cells.append(sweep.Cell(arm, 0, tmp_path, (), {"stage": folder}, ("stage",), arm))
    overviews = [
        {"measures": ["rank"], "of": ["short", "long"], "statistic": "median"},
        {"measures": ["rank", "ceiling"], "of": ["short"], "arms": ["near"]},
    ]
    claims = [{"say": "nearer", "measure": "rank short", "arm": "near", "below": "far"}]
    measures = {"rank long": {"better": "neither"}, "untested": {}}
    report = {"out": str(tmp_path / "r.md"), "measures": measures, "overviews": overviews, "claims": claims}
    write(sweep.Sweep("s", cells, report))
    text = (tmp_path / "r.md").read_text()
    assert "rank long (neither is better)" in text and "untested" not in text  # a measure that no arm has
    assert "| rank of | near | far |\n|---|---|---|\n| short | 2 | 50 |\n| long | 1 | 1 |" in text
    assert "| near: | rank | ceiling |\n|---|---|---|\n| short | 11 | 0.667 |" in text
    assert "| nearer | yes |" in text
    with pytest.raises(UserError, match="an overview has no setting `men`"):
        write(sweep.Sweep("s", cells, report | {"overviews": [{"men": 1}]}))


def test_an_arm_may_do_without_a_stage(lit_gen: Command, here: Path) -> None:
    without = "    pictures: {stages: {two: null}}\n    only two: {stages: {one: null}}\n"
    (here / "arms.yaml").write_text(TOY + SWEEP.replace("[0, 1, 2]", "[0]").replace("  report:", without + "  report:"))
    cells = {cell.arm: cell for cell in sweep.read(["arms.yaml"]).cells}
    assert cells["pictures"].tested == ("one",) and cells["only two"].tested == ("two",)
    with pytest.raises(UserError, match="arm `pictures` has no stage `two`"):
        cells["pictures"].folder("two")
    assert lit_gen("sweep", "-c", "arms.yaml") == 0
    assert not Path("runs/arms/pictures-seed0/two").exists() and not Path("runs/arms/only-two-seed0/one").exists()
    report = Path("results/toy.md").read_text()  # whose measure is of stage two
    assert "| only two |" in report and "| pictures |" not in report


OVER = """\
trainer: {max_steps: 4}
vars: {lr: 0.01}
model: {init_args: {sgd: {lr: "${vars.lr}"}}}
sweep:
  seeds: [1]
  over: {lr: [0.001, 0.1]}
  arms:
    narrow: {}
    half: {over: [0.0005, 0.05]}
    still: {over: [0.0, 0.0]}
  report:
    out: results/over.md
    measures: {error: {better: lower}}
    plots: [error]
    claims:
      - {say: quick learns more, measure: error, arm: "narrow, lr 0.1", below: "half, lr 0.001"}
      - {say: falls with the rate, slope: error, arm: narrow, below: still}
      - {say: falls at half the rate twice as fast, slope: error, arm: half, below: narrow, times: 2}
"""


def test_arms_over_values_are_told_as_lines_and_slopes(
    lit_gen: Command, here: Path, capsys: pytest.CaptureFixture
) -> None:
    (here / "over.yaml").write_text(TOY)
    (here / "arms.yaml").write_text("base: [over.yaml]\n" + OVER)
    assert lit_gen("sweep", "-c", "arms.yaml") == 0, capsys.readouterr().err
    assert "lr: 0.05" in Path("runs/arms/half-lr-0.1-seed1/config.yaml").read_text()
    report = Path("results/over.md").read_text()
    assert "| error (lower is better) | lr 0.001 | lr 0.1 |" in report and report.count("| narrow |") == 1
    assert "| quick learns more | yes |" in report and "| falls with the rate | yes |" in report
    assert "| falls at half the rate twice as fast | no |" in report
    svg = Path("results/images/arms-error.svg").read_text()
    assert svg.startswith("<?xml") and "![error over lr](images/arms-error.svg)" in report
    assert lit_gen("sweep", "-c", "arms.yaml", "--report") == 0
    assert Path("results/images/arms-error.svg").read_text() == svg
    shutil.rmtree("runs/arms/still-lr-0.001-seed1")
    shutil.rmtree("runs/arms/half-lr-0.1-seed1")
    shutil.rmtree("runs/arms/half-lr-0.001-seed1")
    assert lit_gen("sweep", "-c", "arms.yaml", "--report") == 0  # of what there is
    report = Path("results/over.md").read_text()
    assert "| half |" not in report and "quick learns more" not in report and "| falls with the rate |" in report
    for old, new, message in (
        ("lr: [0.001, 0.1]", "lr: 0.1", "`over` is one name with a list of numbers"),
        ("lr: [0.001, 0.1]", "lr: [small, large]", "`over` is one name with a list of numbers"),
        ("{lr: [0.001, 0.1]}", "[0.001, 0.1]", "`over` is one name with a list of numbers"),
        ("  over: {lr: [0.001, 0.1]}\n", "", "`over` of `half` goes with `sweep.over`"),
        ("[0.0, 0.0]", "[0.0]", "`over` of `still` needs a list of 2, one for each lr"),
    ):
        (here / "arms.yaml").write_text("base: [over.yaml]\n" + OVER.replace(old, new))
        assert lit_gen("sweep", "-c", "arms.yaml") == 2
        assert message in capsys.readouterr().err


def test_findings_stand_before_the_figures(tmp_path: Path) -> None:
    from lit_gen.report import write

    kept = Scores()
    kept.add(list("ab"), right=np.array([0.0, 1.0]))
    kept.write(tmp_path / "run")
    (tmp_path / "run" / "DONE").touch()
    os.utime(tmp_path / "run" / "DONE", (0, 0))
    cell = sweep.Cell("arm", 0, tmp_path, (), {"stage": tmp_path / "run"}, ("stage",), "arm")
    report = {"out": str(tmp_path / "r.md"), "measures": {"right": {}}, "text": "What.", "findings": "It is so."}
    write(sweep.Sweep("s", [cell], report))
    assert "What.\n\n## Findings\n\nIt is so.\n\n## Figures\n\n| arm |" in (tmp_path / "r.md").read_text()


def test_arms_that_would_share_a_folder_are_refused(here: Path) -> None:
    (here / "toy.yaml").write_text(TOY + "sweep: {seeds: [0], arms: {a b: {}, a-b: {}}}\n")
    with pytest.raises(UserError, match="`a b` and `a-b` would share their folders"):
        sweep.read(["toy.yaml"])
