"""Strategies: the same global batch gives the same run, however it is divided, stopped or stored."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

pytest.importorskip("deepspeed")

from zero_ranks import CASES, MIDDLE, STEPS, middle, run_pair, train

from lit_gen.errors import UserError
from lit_gen.methods.base import Method
from lit_gen.scale.consolidate import parts_of, read_part
from lit_gen.scale.zero import ZeRO, ZeROPrecision, checkpoint_engine, refuse
from lit_gen.weights import read_checkpoint

ZEROS = ("zero1", "zero2", "zero2 copies", "zero3")
OFFLOADED = ("zero2 offloaded", "zero3 offloaded")
Trainings = tuple[Path, dict[str, list[dict[str, Any]]]]
# One process sums a batch in another order than two sum their halves; AdamW then divides by the square root of nearly
# nothing for some weights. A wrong scale, share or norm of the gradients moves weights by 1e-2.
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


def tensors(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Every tensor of a checkpoint's weights, average and optimizer, by name."""
    optimizer = checkpoint["optimizer_states"][0]["state"]
    found = {f"weight {k}": v for k, v in checkpoint["state_dict"].items()}
    found |= {f"average {k}": v for k, v in checkpoint["ema"].items()}
    return found | {f"optimizer {i} {k}": v for i, of in optimizer.items() for k, v in of.items()}


def last(folder: Path) -> dict[str, Any]:
    return read_checkpoint(folder / "checkpoints" / "last.ckpt")


@pytest.fixture(scope="module")
def trainings(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    """Folder and results of both ranks of every case of `zero_ranks.py`, all in one pair of processes."""
    folder = tmp_path_factory.mktemp("pair")
    return folder, run_pair(tiny_base, folder, list(CASES))


@pytest.fixture(scope="module")
def alone(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """Folder, result, and result with accumulation of the same training in one process."""
    folder = tmp_path_factory.mktemp("alone")
    plain = train(folder / "plain", str(tiny_base))
    return folder / "plain", plain, train(folder / "accumulated", str(tiny_base), accumulate=2)


@pytest.mark.parametrize(
    "case",
    ["torch's ddp", "ddp", "ddp copies", *ZEROS, *OFFLOADED]
    + [f"{kind} accumulated" for kind in ("ddp", "ddp copies", "zero2", "zero2 copies", "zero3")],
)
def test_a_global_batch_gives_one_run_under_any_strategy(case: str, trainings: Trainings, alone: Any) -> None:
    folder, results = trainings
    own, accumulated = alone[1:]
    wanted = accumulated if "accumulated" in case else own
    pair = results[case]
    for kind in ("losses", "validated"):  # the mean of the halves; what is validated is the average
        assert [sum(x) / 2 for x in zip(*(r[kind] for r in pair), strict=True)] == pytest.approx(wanted[kind], rel=1e-5)
    for rank in pair:
        assert rank["weights"].keys() == wanted["weights"].keys()
        for name, weight in wanted["weights"].items():
            torch.testing.assert_close(rank["weights"][name], weight, **CLOSE)
    assert all(torch.equal(pair[0]["weights"][n], pair[1]["weights"][n]) for n in wanted["weights"])


@pytest.mark.parametrize("case", ["ddp", *ZEROS])
def test_checkpoints_hold_what_one_process_would_save(case: str, trainings: Trainings, alone: Any) -> None:
    saved, wanted = last(trainings[0] / case), last(alone[0])
    assert saved["global_step"] == STEPS and saved["loops"].keys() == wanted["loops"].keys()
    assert saved["lr_schedulers"] == wanted["lr_schedulers"]
    groups, own = (c["optimizer_states"][0]["param_groups"] for c in (saved, wanted))
    assert [g["params"] for g in groups] == [g["params"] for g in own] and groups[0]["lr"] == own[0]["lr"]
    found, expected = tensors(saved), tensors(wanted)
    assert found.keys() == expected.keys()  # nothing frozen, for one thing
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", ZEROS)
def test_a_process_writes_no_more_than_its_part(case: str, trainings: Trainings) -> None:
    for part in parts_of(middle(trainings[0] / case), "optim"):
        state = read_part(part)["optimizer_state_dict"]
        for weights in state["fp32_flat_groups" if case == "zero3" else "single_partition_of_fp32_groups"]:
            assert weights.untyped_storage().nbytes() - weights.nbytes < 1000  # padding, and not the others' parts


def test_zero_holds_nothing_twice(trainings: Trainings) -> None:
    for rank in trainings[1]["zero2"]:  # all weights; this process's gradients, and AdamW's two numbers
        assert rank["vectors"] == [1, 3]
    for rank in trainings[1]["zero2 copies"]:  # and those of the other process
        assert rank["vectors"] == [2, 3]


@pytest.mark.parametrize("case", ["zero2", "zero2 copies", "zero3", "zero3 second stage"])
def test_a_resumed_run_is_the_same_bit_for_bit(case: str, trainings: Trainings) -> None:
    folder, results = trainings
    for straight, resumed in zip(results[case], results[f"{case} resumed"], strict=True):
        assert resumed["losses"] == straight["losses"][MIDDLE:]
        assert resumed["validated"] == straight["validated"][1:]
        assert all(torch.equal(resumed["weights"][n], w) for n, w in straight["weights"].items())
    one, other = tensors(last(folder / case)), tensors(last(folder / f"{case} resumed"))
    assert one.keys() == other.keys() and all(torch.equal(other[n], t) for n, t in one.items())


def test_gradients_that_are_not_finite_change_nothing(trainings: Trainings) -> None:
    for straight, spoilt in zip(trainings[1]["zero2"], trainings[1]["zero2 spoilt"], strict=True):
        assert spoilt["losses"][:2] == straight["losses"][:2]  # the second step is lost
        assert all(torch.isfinite(weight).all() for weight in spoilt["weights"].values())
        assert spoilt["losses"][2:] != straight["losses"][2:]


def test_ddp_names_a_weight_without_a_gradient(trainings: Trainings) -> None:
    for rank in trainings[1]["without a gradient"]:
        assert "2 of 4 weights had no gradient, e.g. idle.weight" in rank["error"]


def test_memory_is_read_where_every_process_can(trainings: Trainings) -> None:
    for rank in trainings[1]["one cannot"]:
        assert {key: rank[key] for key in ("all", "one not", "nodes")} == {
            "all": True,
            "one not": False,
            "nodes": False,
        }


@pytest.mark.parametrize("case", ["laid out otherwise", "laid out otherwise, copies"])
def test_ddp_averages_gradients_that_lie_otherwise_on_one_process(case: str, trainings: Trainings) -> None:
    for rank in trainings[1][case]:
        torch.testing.assert_close(rank["gradient"], torch.arange(1200.0).view(30, 40) * 1.5)


def test_weights_of_an_earlier_stage_stay_in_the_checkpoint(trainings: Trainings) -> None:
    first, second = (last(trainings[0] / case) for case in ("zero2", "zero3 second stage"))
    assert set(first["state_dict"]) < set(second["state_dict"])
    new = set(second["state_dict"]) - set(first["state_dict"])
    assert second["ema"].keys() < new and all(n.endswith(".pe") for n in new - second["ema"].keys())  # a buffer
    assert all(torch.equal(second["state_dict"][name], average) for name, average in first["ema"].items())


@pytest.mark.parametrize("case", ["zero2 mixed", "zero2 copies mixed", "zero3 mixed"])
def test_mixed_precision_leaves_weights_and_frozen_parts_float32(case: str, trainings: Trainings) -> None:
    folder, results = trainings
    for ours, theirs in zip(results[case], results["ddp mixed"], strict=True):
        assert ours["frozen dtypes"] == ["torch.float32"]
        assert all(w.dtype == torch.float32 for w in ours["weights"].values())
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=5e-3)
    exact = results["zero2"][0]["losses"]
    assert results[case][0]["losses"] != exact  # something was cast


def test_a_sharded_checkpoint_continues_in_one_process(trainings: Trainings, alone: Any, tiny_base: Path) -> None:
    folder, _ = trainings
    for case in ZEROS:
        resumed = train(folder / f"{case} alone", str(tiny_base), ckpt=middle(folder / case))
        assert resumed["losses"] == pytest.approx(alone[1]["losses"][MIDDLE:], rel=1e-5)
        for name, weight in alone[1]["weights"].items():
            torch.testing.assert_close(resumed["weights"][name], weight, **CLOSE)


def test_what_zero_cannot_continue_is_said_in_one_line(trainings: Trainings) -> None:
    results = trainings[1]
    for rank in (0, 1):
        assert "ZeRO continues only from what it saved itself" in results["from a file"][rank]["error"]
        assert "saved by 1 processes and ZeRO cannot divide it among 2" in results["from one process"][rank]["error"]
        assert "its weights lie in memory in another order" in results["from another order"][rank]["error"]
        assert "was saved at stage 3, and this is stage 2" in results["from another stage"][rank]["error"]


@pytest.mark.parametrize("case", ["ddp", "zero2", "zero3"])
def test_a_run_that_has_ended_is_validated_alike_by_all_and_again(case: str, trainings: Trainings) -> None:
    """Also with statistics of batch norms, and averages, which ZeRO-3 has divided until then."""
    pair = trainings[1][f"{case} validated apart"]
    (straight, again), other = pair[0]["figures"], pair[1]["figures"]
    assert len(straight) == 2 and straight[0] != straight[1] and again == straight[1:]
    assert other == [straight, again]
    assert pair[0]["hooks"] == 0  # they would keep the engine, and all that it holds


def test_after_an_error_no_process_waits_for_others(trainings: Trainings) -> None:
    assert [rank["error"] for rank in trainings[1]["zero3 interrupted"]] == ["bad data"] * 2


def test_a_full_disk_on_one_process_stops_both_and_leaves_the_checkpoint_before(trainings: Trainings) -> None:
    folder, results = trainings
    for rank in (0, 1):
        assert "cannot be written" in results["full disk"][rank]["error"]
    saved = last(folder / "full disk")
    assert saved["global_step"] == MIDDLE
    kept = [p.name for p in (folder / "full disk" / "checkpoints").iterdir() if p.is_dir()]
    assert set(kept) <= {middle(folder).name, "last.ckpt"}


def test_parts_are_needed_and_nothing_in_them_runs(trainings: Trainings, tmp_path: Path) -> None:
    folder, _ = trainings
    copy = Path(shutil.copytree(middle(folder / "zero2"), tmp_path / "copy.ckpt"))
    parts = sorted((copy / "checkpoint").glob("*_optim_states.pt"))
    parts[1].rename(tmp_path / "aside")
    with pytest.raises(UserError, match="holds 1 parts of 2"):
        read_checkpoint(copy)

    class Malicious:
        def __reduce__(self) -> Any:
            return (Path(tmp_path / "canary").touch, ())

    torch.save({"optimizer_state_dict": Malicious()}, parts[1])
    with pytest.raises(UserError, match="more than tensors and plain values"):
        read_checkpoint(copy)
    with pytest.raises(UserError, match="more than tensors and plain values"):  # what DeepSpeed's engine reads with
        checkpoint_engine(SimpleNamespace(_config=None)).load(str(parts[1]))
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("case", ZEROS)
def test_sharded_checkpoints_are_exported_as_averaged_weights_and_as_one_file(
    case: str, trainings: Trainings, lit_gen: Callable[..., int], toy: Path
) -> None:
    folder, results = trainings
    source = str(folder / case / "checkpoints" / "last.ckpt")
    assert lit_gen("export", "-c", "toy.yaml", "--ckpt_path", source, "--out", "out") == 0
    weights, trained = load_file("out/weights.safetensors"), results[case][0]["weights"]
    assert weights.keys() == trained.keys()  # what training ended with is the average
    assert all(torch.equal(weights[name], w) for name, w in trained.items())
    assert lit_gen("export", "-c", "toy.yaml", "--ckpt_path", source, "--out", "out", "--format", "checkpoint") == 0
    one, parts = read_checkpoint("out/checkpoint.ckpt"), read_checkpoint(source)
    assert one.keys() == parts.keys() and one["global_step"] == 4
    assert all(torch.equal(one["state_dict"][n], w) for n, w in parts["state_dict"].items())


def test_zero_says_what_it_does_not_do() -> None:
    with pytest.raises(UserError, match="offload: all needs stage: 3"):
        ZeRO(stage=2, offload="all")
    with pytest.raises(UserError, match="16-mixed does not go with ZeRO"):
        ZeRO().precision_plugin = ZeROPrecision("16-mixed")

    class Growing(Method):
        refuses_zero = "it adds parameters while it trains"

    with pytest.raises(UserError, match="Growing cannot run under DeepSpeed: it adds parameters while it trains; use"):
        refuse(Growing())


def test_zero_asks_for_gpus(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs NVIDIA GPUs; on CPUs use --trainer.strategy ddp"):
        train(tmp_path, str(tiny_base), ZeRO())
