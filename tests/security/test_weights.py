"""Checkpoints and bases from strangers: they are read as tensors and plain values, or refused in one line."""

from __future__ import annotations

import ast
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from security.evil import CANARY, COMMAND, Evil, torch_file
from toy import TOY

from lit_gen.diffusion.base import load_base
from lit_gen.errors import UserError

Command, Refused = Callable[..., int], Callable[..., str]
FIT = ("fit", "-c", "toy.yaml", "--trainer.max_steps=3")
PARTS = ("tokenizer", "text_encoder", "vae", "unet", "scheduler", "image_encoder", "motion_adapter")


def test_the_attacks_are_real(here: Path) -> None:
    pickle.loads(pickle.dumps(Evil()))
    assert (here / CANARY).exists()
    (here / CANARY).unlink()
    torch.load(write(here / "evil.ckpt"), weights_only=False)
    assert (here / CANARY).exists()
    (here / CANARY).unlink()


def write(path: Path, **how: bool) -> Path:
    """A checkpoint that is whole but for a value that runs code."""
    torch.save({"state_dict": {}, "hyper_parameters": {"x": Evil()}, "pytorch-lightning_version": "2.6.0"}, path, **how)
    return path


@pytest.fixture
def yaml(here: Path) -> Path:
    (here / "toy.yaml").write_text(TOY)
    return here / "toy.yaml"


# -- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old_format", [False, True], ids=["zip", "pickle"])
@pytest.mark.parametrize(
    "words",
    [
        (*FIT, "--ckpt_path=evil.ckpt"),
        (*FIT, "--init_from=evil.ckpt"),
        ("test", "-c", "toy.yaml", "--ckpt_path=evil.ckpt"),
        ("test", "-c", "toy.yaml", "--ckpt_path=evil.ckpt", "--weights_only=false"),
    ],
    ids=lambda words: " ".join(words[-1:]),
)
def test_a_checkpoint_runs_nothing(words: tuple[str, ...], old_format: bool, yaml: Path, refused: Refused) -> None:
    write(Path("evil.ckpt"), _use_new_zipfile_serialization=not old_format)
    line = refused(*words)
    assert "evil.ckpt: refused" in line and "posix.system" in line


def test_weights_only_cannot_be_turned_off_by_a_yaml(yaml: Path, refused: Refused) -> None:
    yaml.write_text(TOY + "weights_only: false\nckpt_path: evil.ckpt\n")
    write(Path("evil.ckpt"))
    assert "evil.ckpt: refused" in refused(*FIT)


def test_a_checkpoint_in_a_run_folder_runs_nothing(yaml: Path, lit_gen: Command) -> None:
    assert lit_gen(*FIT) == 0
    checkpoints = Path("runs/toy/checkpoints")
    for path in [p for p in checkpoints.iterdir() if p.suffix == ".ckpt"]:
        write(path)
    for checksum in checkpoints.glob("*.sha256*"):
        checksum.unlink()
    Path("runs/toy/DONE").unlink()
    lit_gen(*FIT)  # refused, or passed over as damaged


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"x" * 100, "not a checkpoint"),
        (b"", "evil.ckpt"),
        (torch_file([1, 2]), "no `state_dict`"),
        (torch_file({"a": 1}), "no `state_dict`"),
        (torch_file({"state_dict": 3}), "no `state_dict`"),
        (torch_file({"state_dict": {}})[:-100], "evil.ckpt"),
    ],
    ids=["junk", "empty", "list", "without weights", "number for weights", "cut off"],
)
@pytest.mark.parametrize("way", ["--ckpt_path", "--init_from"])
def test_what_is_no_checkpoint_is_told_in_a_line(
    way: str, content: bytes, said: str, yaml: Path, refused: Refused
) -> None:
    Path("evil.ckpt").write_bytes(content)
    assert said in refused(*FIT, f"{way}=evil.ckpt")


def test_a_sharded_checkpoint_runs_nothing(here: Path, yaml: Path, refused: Refused) -> None:
    folder = here / "evil.ckpt" / "checkpoint"
    folder.mkdir(parents=True)
    (here / "evil.ckpt" / "latest").write_text("checkpoint")
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        (folder / name).write_bytes(torch_file({"module": Evil()}))
    (here / "evil.ckpt" / ".metadata").write_bytes(pickle.dumps(Evil()))  # of torch's own sharded format
    (here / "evil.ckpt" / "zero_to_fp32.py").write_text(f"import os; os.system({COMMAND!r})")
    for way in ("--ckpt_path", "--init_from"):
        assert "refused" in refused(*FIT, f"{way}=evil.ckpt")


def test_deepspeed_does_not_unpickle(here: Path) -> None:
    pytest.importorskip("deepspeed")
    from lit_gen.scale.zero import checkpoint_engine

    engine = checkpoint_engine(SimpleNamespace(_config=None))
    with pytest.raises(UserError, match="evil.pt: refused"):
        engine.load(str(write(here / "evil.pt")))


# -- bases ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def base(here: Path, tiny_base: Path) -> Path:
    return Path(shutil.copytree(tiny_base, here / "base"))


@pytest.mark.parametrize("part", ["text_encoder", "vae", "unet", "image_encoder", "motion_adapter"])
@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "pytorch_model.bin"])
def test_pickled_weights_of_a_base_are_refused(part: str, name: str, base: Path) -> None:
    (weights,) = (base / part).glob("*.safetensors")
    weights.unlink()
    (base / part / name).write_bytes(torch_file({"x": Evil()}))
    with pytest.raises(UserError, match=rf"{part}/{name}: .*convert them to .safetensors"):
        load_base(str(base), parts=(part,))


def test_pickled_weights_beside_safe_ones_are_not_touched(base: Path) -> None:
    for part in ("text_encoder", "vae", "unet", "image_encoder", "motion_adapter"):
        for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin", "training_args.bin", "optimizer.pt"):
            (base / part / name).write_bytes(torch_file({"x": Evil()}))
    assert load_base(str(base), parts=PARTS).unet is not None


@pytest.mark.parametrize("name", ["sd.ckpt", "sd.safetensors"])
def test_a_pickled_single_file_base_is_refused(name: str, base: Path) -> None:
    Path(name).write_bytes(torch_file({"state_dict": {"x": Evil()}}))
    with pytest.raises(UserError, match=name) as error:
        load_base(name, config=str(base))
    assert "\n" not in str(error.value)


def plant_module(folder: Path) -> None:
    (folder / "payload.py").write_text(f"open({CANARY!r}, 'w')\nclass X:\n    from_pretrained = print\n")


@pytest.mark.parametrize("part", ["scheduler", "text_encoder", "unet", "_class_name"])
def test_a_model_index_names_no_other_code(part: str, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers imports the modules that a pipeline's index names."""
    plant_module(base)
    monkeypatch.syspath_prepend(str(base.parent))
    index = json.loads((base / "model_index.json").read_text())
    index[part] = ["base.payload", "X"]
    (base / "model_index.json").write_text(json.dumps(index))
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4, 4, 3, 3)}, "sd.safetensors")
    with pytest.raises(UserError, match="refused"):
        load_base("sd.safetensors", config=str(base))


def test_code_that_a_config_asks_for_is_not_run(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Configs of the Hub can name modules of their repository, and kernels of another."""
    monkeypatch.syspath_prepend(str(base))
    for config in base.rglob("*config.json"):
        plant_module(config.parent)
        content = json.loads(config.read_text())
        names = ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoImageProcessor", "AutoencoderKL")
        content |= {"auto_map": {name: "payload.X" for name in names}, "trust_remote_code": True}
        content |= {"attn_implementation": "evil/kernel", "_attn_implementation": "evil/kernel"}
        config.write_text(json.dumps(content))
    loaded = load_base(str(base), parts=PARTS)
    assert loaded.text_encoder.config._attn_implementation == "sdpa"


def test_an_oracle_is_read_as_tensors(here: Path) -> None:
    from lit_gen.metrics.oracle import Oracle

    folder = Oracle(channels=(8, 8, 8, 8), width=16, layers=1).save_pretrained(here / "oracle")
    (folder / "model.safetensors").write_bytes(torch_file({"x": Evil()}))
    with pytest.raises(Exception, match="header"):
        Oracle.from_pretrained(folder)


# -- the code itself --------------------------------------------------------------------------------------------------

FORBIDDEN = ("eval", "exec", "__import__")
SAFE_ONLY_WITH = {("torch", "load"): ("weights_only", "True"), ("np", "load"): ("allow_pickle", "False")}
NEVER = {("yaml", "unsafe_load"), ("yaml", "full_load"), ("pickle", "load"), ("pickle", "loads"), ("os", "system")}
NEVER |= {("tar", "extractall"), ("tar", "extract"), ("shutil", "unpack_archive")}


def test_nothing_here_can_unpickle() -> None:
    root = Path(__file__).parents[2] / "lit_gen"
    found = []
    for file in root.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call):
                continue
            where = f"{file.relative_to(root)}:{node.lineno}"
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN:
                found.append(f"{where} {node.func.id}")
            if isinstance(node.func, ast.Attribute):
                name = (ast.unparse(node.func.value), node.func.attr)
                keyword, value = SAFE_ONLY_WITH.get(name, ("", None))
                if given.get(keyword) != value:
                    found.append(f"{where} {'.'.join(name)} without {keyword}")
                if name in NEVER or node.func.attr == "load_from_checkpoint":  # that calls what a checkpoint names
                    found.append(f"{where} {'.'.join(name)}")
                if name == ("yaml", "load") and "_Loader" not in ast.unparse(node):
                    found.append(f"{where} yaml.load")
            if given.get("shell") == "True" and file.name != "remote.py":  # whose `pipe:` is a command by definition
                found.append(f"{where} shell")
    assert not found
