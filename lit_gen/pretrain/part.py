"""A part of the bundled base: a method whose result is written into the base's folder."""

from __future__ import annotations

from typing import Any

from lit_gen.methods.base import Method, Optimizer
from lit_gen.pretrain.architecture import save_base


class BasePart(Method):
    """Trains one or several parts of a base and writes them when a fit ends, finished or stopped by its time limit.

    Args:
        export: folder of the base; null writes nothing.
        optimizer: settings of the optimizer.
    """

    def __init__(self, export: str | None, optimizer: Optimizer) -> None:
        super().__init__(optimizer)
        self.export = export

    def parts(self) -> dict[str, Any]:
        """The trained parts by the names that `save_base` knows."""
        raise NotImplementedError

    def on_fit_end(self) -> None:
        if self.export and self.global_rank == 0:
            save_base(self.export, self.parts())
