"""Lines while batches go by."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lit_gen.callbacks.progress import Progress


def test_testing_and_predicting_tell_rate_and_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("lit_gen.callbacks.progress.time.monotonic", lambda: now)
    progress = Progress("stylecrafter/adapter", every=5.0)
    trainer = SimpleNamespace(num_test_batches=[4], num_predict_batches=[float("inf")])
    for i in range(4):
        progress.on_test_batch_end(trainer, None, None, None, i)
        now += 3.0
    now += 10.0
    progress.on_predict_batch_end(trainer, None, None, None, 7)
    assert capsys.readouterr().out.splitlines() == [
        "stylecrafter/adapter: testing, batch 1/4",
        "stylecrafter/adapter: testing, batch 3/4, 3.0 s each, left 0:00:03",
        "stylecrafter/adapter: predicting, batch 8/inf",
    ]
