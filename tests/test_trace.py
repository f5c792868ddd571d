"""`bench --trace`: kernels are told by kind, overlap is not counted twice, and a real step is traced."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_gen.trace import STEPS, Kernel, kind_of, told


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "communication"),
        ("void pytorch_flash::flash_fwd_kernel<...>", "attention"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", "convolutions"),
        ("void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816dgrad_optimized>", "convolutions"),
        ("nvjet_tst_256x128_64x4_2x1_v_bz_coopA_TNT", "matrix products"),
        ("sm80_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "matrix products"),
        ("void at::native::multi_tensor_apply_kernel<... FusedAdamMathFunctor<float, 4> ...>", "optimizer"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("triton_poi_fused__to_copy_12", "copies"),
        ("triton_poi_fused__to_copy_add_mul_12", "fused by the compiler"),
        ("triton_poi_fused_convolution_5", "fused by the compiler"),
        ("triton_per_fused_native_group_norm_3", "fused by the compiler"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>", "other"),
        ("aten::addmm", "matrix products"),
        ("aten::bmm", "matrix products"),
        ("aten::mkldnn_convolution", "convolutions"),
        ("aten::add_", "other"),
    ],
)
def test_kinds_of_kernels(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_what_overlaps_is_counted_once() -> None:
    dice = random.Random(0)
    kernels = []
    for _ in range(60):
        start = dice.randrange(900)
        kernels.append(Kernel(dice.choice(["ncclKernel", "gemm"]), start, start + dice.randrange(1, 30)))
    first, last = min(k.start for k in kernels), max(k.end for k in kernels)
    running = [{kind_of(k.name) for k in kernels if k.start <= t < k.end} for t in range(first, last)]
    found = told(kernels)
    assert found["ms"] == pytest.approx((last - first) / STEPS / 1000)
    assert found["idle_ms"] == pytest.approx(sum(not kinds for kinds in running) / STEPS / 1000)
    alone = sum(kinds == {"communication"} for kinds in running)
    assert found["exposed_communication_ms"] == pytest.approx(alone / STEPS / 1000) and alone > 0
    spent = sum(k.end - k.start for k in kernels if k.name == "gemm")
    assert found["kinds"]["matrix products"]["ms"] == pytest.approx(spent / STEPS / 1000)
    assert told([])["kinds"] == {}


def test_bench_tells_where_a_step_goes(lit_gen: Callable[..., int], toy: Path, capsys: pytest.CaptureFixture) -> None:
    argv = ("bench", "-c", "toy.yaml", "--stage", "one", "--warmup", "2", "--steps", "3", "--rounds", "2")
    assert lit_gen(*argv, "--arm", "plain:", "--arm", "traced: --trace") == 0
    plain, traced = json.loads(Path("runs/bench/toy/bench.json").read_text())["rows"]
    assert "trace" not in plain and traced["steps"] == 6  # the traced steps come after the window
    found = traced["trace"]
    assert found["kinds"]["matrix products"]["ms"] > 0 and len(found["longest"]) <= 12
    assert all(row["launches"] > 0 for row in found["longest"])
    events = json.loads(gzip.decompress(Path(found["file"]).read_bytes()))["traceEvents"]
    assert any(event.get("name") == "aten::addmm" or event.get("name") == "aten::linear" for event in events)
    written = Path("runs/bench/toy/bench.md").read_text()
    assert "## Where a step of `traced one` goes" in written and "`plain" not in written
    assert "## Where a step of `traced one` goes" in capsys.readouterr().out
