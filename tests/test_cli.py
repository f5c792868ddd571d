"""The front door: speed, help, listing, merging of files."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from lit_gen import cli, experiment
from lit_gen.errors import UserError

Command = Callable[..., int]
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--help"], 0, "usage: python -m lit_gen VERB"),
        ([], 0, "usage: python -m lit_gen VERB"),
        (["list"], 0, "experiments/base/autoencoder.yaml"),
        (["fti"], 2, "did you mean `fit`?"),
        (["fit"], 2, "-c FILE"),
        (["check", "--help"], 0, "usage: python -m lit_gen check -c FILE"),
        (["export", "-h"], 0, "--format safetensors|checkpoint"),
        (["list", "--help"], 0, "usage: python -m lit_gen list"),
        (["cache", "--help"], 0, "--task I/N"),
    ],
)
def test_the_front_door_is_quick(words: list[str], code: int, said: str) -> None:
    began = time.process_time(), time.monotonic()
    command = [sys.executable, "-X", "importtime", "-m", "lit_gen", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    wall = time.monotonic() - began[1]
    output = done.stdout + done.stderr
    assert done.returncode == code and said in output, output
    for heavy in ("torch", "lightning", "jsonargparse", "numpy"):
        assert f" {heavy}\n" not in done.stderr
    assert "Traceback" not in output
    assert wall < 1.5 * 3  # other work may keep the machine busy; what is not imported above is the real bound


def test_list_tells_what_each_experiment_is(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = here / "experiments" / "sub"
    folder.mkdir(parents=True)
    (folder / "a.yaml").write_text("# the first line\nmodel: x\n")
    (folder / "b.yaml").write_text("# not this\ndescription: but this\n")
    assert cli.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["experiments/sub/a.yaml  the first line", "experiments/sub/b.yaml  but this"]


def test_help_explains_every_key(lit_gen: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert lit_gen("fit", "--help") == 0
    text = capsys.readouterr().out
    keys = ("stages:", "init_from:", "validate_first:", "--fresh", "--stage ", "vars:", "base:", "description:")
    for key in (*keys, "--trainer.max_steps", "--checkpoint.every_n_steps", "optimizer steps between saves"):
        assert key in text, key
    assert lit_gen("fit", "--model.help", "toy.Regression") == 0
    text = capsys.readouterr().out
    assert "--model.sgd.lr" in text and "learning rate" in text


def test_help_explains_the_classes_of_the_files(
    lit_gen: Command, toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    over = "trainer: {callbacks: [{class_path: lit_gen.callbacks.ema.EMA}, {class_path: EarlyStopping}]}\n"
    toy.with_name("over.yaml").write_text(over)
    assert lit_gen("fit", "-c", "toy.yaml", "-c", "over.yaml", "--help") == 0
    text = capsys.readouterr().out
    of_callbacks = ("--trainer.callbacks.decay", "--trainer.callbacks.monitor")
    for key in ("--trainer.max_steps", "size of the inputs", "--data.batches", *of_callbacks):
        assert key in text, key
    assert text.count("model = toy.Regression") == 1  # though both stages have it
    assert lit_gen("fit", "-c", "toy.yaml", "--data.help") == 0
    text = capsys.readouterr().out
    assert "--data.batches" in text and "--model.width" not in text and "--trainer.max_steps" not in text
    assert lit_gen("fit", "-c", "toy.yaml", "--speed.help") == 2
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "words", ["--base x.yaml", "--sweep", "--description x", "--sweep.seeds 3", "--experiment", "--run_root"]
)
def test_what_only_a_file_can_say_is_refused(
    words: str, lit_gen: Command, toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lit_gen("fit", "-c", "toy.yaml", *words.split()) == 2
    assert capsys.readouterr().err.startswith(f"error: {words.split()[0]}")
    assert not Path("runs").exists()


def test_a_file_in_the_place_of_a_folder_is_one_line(
    lit_gen: Command, toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lit_gen("fit", "-c", "toy.yaml", "--run_root", "toy.yaml") == 2
    assert lit_gen("fit", "-c", "toy.yaml", "--stage", "one", "--trainer.max_steps", "1") == 0
    capsys.readouterr()
    assert lit_gen("export", "-c", "toy.yaml", "--stage", "one", "--out", "toy.yaml") == 2
    assert capsys.readouterr().err == "error: toy.yaml: File exists\n"


def test_switches_can_be_switched_off() -> None:
    assert cli.parse(["--fresh=false", "--smoke=no"])[1] == {"fresh": False, "smoke": False}
    assert cli.parse(["--fresh", "--smoke=true"])[1] == {"fresh": True, "smoke": True}
    with pytest.raises(UserError, match="--fresh is true or false, not `never`"):
        cli.parse(["--fresh=never"])
    assert cli.parse(["--validate_first", "-c", "x.yaml", "--a", "-1"])[::2] == (
        ["x.yaml"],
        [("validate_first", None), ("a", "-1")],
    )


def test_print_config_is_a_config(lit_gen: Command, toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        lit_gen("fit", "-c", "toy.yaml", "--stage", "two", "--model.sgd.lr", "1e-3", "--print_config")
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["init_args"] == {
        "sgd": {"lr": 0.001},
        "width": 2,
        "pause": 0.0,
        "prompts": None,
        "reads": None,
    }
    assert printed["trainer"]["max_steps"] == 6
    assert not Path("runs").exists()


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)


def test_files_are_merged_over_their_bases(here: Path) -> None:
    (here / "deep").mkdir()
    write(here, common="trainer: {max_steps: 1, callbacks: [A]}\nmodel: {class_path: m.A, init_args: {a: 1, b: 2}}\n")
    write(here / "deep", x="base: ../common.yaml\nmodel: {init_args: {b: 3}}\nx: 1e-4\n")
    write(here, y="trainer: {callbacks+: [B]}\nmodel: {class_path: m.B, init_args: {c: 4}}\n")
    one = experiment.read(["deep/x.yaml"], [])
    assert one.data == {
        "trainer": {"max_steps": 1, "callbacks": ["A"]},
        "model": {"class_path": "m.A", "init_args": {"a": 1, "b": 3}},
        "x": 1e-4,
    }
    assert one.origin(("model", "init_args", "b")) == "deep/x.yaml:2"
    assert one.origin(("model", "init_args", "a")) == "deep/../common.yaml:2"
    both = experiment.read(["deep/x.yaml", "y.yaml"], [])
    assert both.data["trainer"]["callbacks"] == ["A", "B"]
    assert both.data["model"] == {"class_path": "m.B", "init_args": {"c": 4}}  # a's and b's class is gone
    assert both.origin(("trainer", "callbacks", 1)) == "y.yaml:1"


def test_bases_in_a_circle(here: Path) -> None:
    write(here, a="base: [b.yaml]\n", b="base: [a.yaml]\n")
    with pytest.raises(UserError, match="circle"):
        experiment.read(["a.yaml"], [])


def test_values_are_what_they_look_like(here: Path) -> None:
    write(here, a="a: 1e-4\nb: 00:08:30\nc: 2024-01-01\nd: yes\ne: 0x10\nf: 010\ng: 1_000\nh: ~\n")
    assert experiment.read(["a.yaml"], []).data == {
        "a": 1e-4, "b": "00:08:30", "c": "2024-01-01", "d": True, "e": 16, "f": "010", "g": 1000, "h": None,
    }  # fmt: skip


def test_workers_of_any_data_module_are_no_other_setting(here: Path) -> None:
    for workers in (0, 4):
        inner = (
            f"{{class_path: m.I, init_args: {{workers: {workers}, cached: float{16 + 4 * workers}, size: {workers}}}}}"
        )
        write(here, a=f"data: {{class_path: m.D, init_args: {{workers: {workers}, images: {inner}}}}}\n")
        (run,) = experiment.runs(["a.yaml"], [])
        if not workers:
            run.asked.parent.mkdir(parents=True)
            run.asked.write_text(run.as_request("fit", []))
    assert run.changes() == {"data.init_args.images.init_args.size": (0, 4)}


def test_paths_at_home(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    write(here, a="run_root: ~/runs\ndata: {train: ~/set, val: ~}\n")
    (run,) = experiment.runs(["a.yaml"], [])
    assert str(run.folder) == "/home/me/runs/a" and run.settings.data == {
        "data": {"train": "/home/me/set", "val": None}
    }
    assert cli.parse(["--model.base=~/sd", "--x", "~y"])[2] == [("model.base", "/home/me/sd"), ("x", "~y")]


def test_stages_of_several_files(here: Path) -> None:
    write(here, a="stages:\n  one: {s: 1}\n  two: {s: 2}\n", b="stages:\n  two: {t: 3}\n  one: null\n")
    runs = experiment.runs(["a.yaml", "b.yaml"], [("experiment", "name"), ("stages.two.u", "4")])
    assert [run.name for run in runs] == ["name/two"]
    assert runs[0].settings.data == {"s": 2, "t": 3} and runs[0].overrides == [("u", "4")]
    runs = experiment.runs(["a.yaml"], [])
    assert "init_from" not in runs[0].settings.data
    assert runs[1].settings.data["init_from"] == "runs/a/one/checkpoints/last.ckpt"
    write(
        here, c="stages:\n  one: {s: 1}\n  again: {s: 1}\n  two: {s: 2}\nsmoke: {stages: {again: null, two: {s: 3}}}\n"
    )
    assert len(experiment.runs(["c.yaml"], [])) == 3
    small = experiment.runs(["c.yaml"], [], smoke=True)
    assert [run.folder.name for run in small] == ["one", "two"] and small[1].settings.data["s"] == 3
    assert Path(small[1].settings.data["init_from"]) == small[0].last


def test_a_misspelt_stage_of_an_overlay_is_no_new_stage(here: Path) -> None:
    write(here, a="stages:\n  adapter: {data: {x: 1}}\n", b="stages:\n  adaptr: {s: 2}\n")
    with pytest.raises(UserError, match=r"b.yaml:2: there is no stage `adaptr` .*, did you mean `adapter`\?"):
        experiment.runs(["a.yaml", "b.yaml"], [])
    write(here, b="stages:\n  adapter2: {data: {x: 2}}\n")
    assert len(experiment.runs(["a.yaml", "b.yaml"], [])) == 2


def test_interpolation_reads_vars(lit_gen: Command, toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(toy.parent, over="vars: {rate: 0.5}\nmodel: {init_args: {sgd: {lr: '${vars.rate}'}}}\nstages: {two: null}\n")
    assert lit_gen("fit", "-c", "toy.yaml", "-c", "over.yaml", "--vars.rate", "0.25", "--trainer.max_steps", "1") == 0
    config = yaml.safe_load(Path("runs/toy/one/config.yaml").read_text())
    assert config["model"]["init_args"]["sgd"]["lr"] == 0.25
