"""The toy method, slow while the working directory has a file `slow`: long enough for what a test has in store."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from torch import Tensor
from toy import Regression


class Slow(Regression):
    """The toy method, which sleeps where it is told to."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        if Path("slow").exists():
            time.sleep(1)
        return super().training_step(batch, batch_idx)
