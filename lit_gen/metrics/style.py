"""How far is a picture's style from the wanted one, in the parameters the world's styles are made of?"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_gen.metrics.oracle import Oracle
from lit_gen.metrics.prompt import OracleMetric
from lit_gen.metrics.reading import Reading
from lit_gen.world.styles import style_error

_GALLERY = 32  # styles among which retrieval has to find the right one


class StyleError(OracleMetric):
    """`error`: mean `style_error` (0..1) between the read and the wanted style; `rank1`: how often, among 32 wanted
    styles, the picture's own is the nearest to what was read (left out while fewer than 32 pictures were seen).

    Args:
        oracle: an oracle or the folder of one.
    """

    higher_is_better = False

    def __init__(self, oracle: Oracle | str = "data/oracle") -> None:
        super().__init__(oracle)
        self.add_state("read_styles", default=[], dist_reduce_fx="cat")
        self.add_state("wanted_styles", default=[], dist_reduce_fx="cat")

    def update(self, images: Tensor | Reading, style_parameters: Tensor) -> None:
        """images: B 3 H W in [-1, 1] or their reading; style_parameters: B P, those of the reference."""
        self.read_styles.append(self.read(images).style_parameters)
        self.wanted_styles.append(style_parameters)

    def compute(self) -> dict[str, Tensor]:
        read, wanted = (s if isinstance(s, Tensor) else torch.cat(s) for s in (self.read_styles, self.wanted_styles))
        result = {"error": style_error(read, wanted).mean()}
        if len(read) >= _GALLERY:
            groups = len(read) // _GALLERY * _GALLERY
            hits = [
                _distances(r, w).argmin(1) == torch.arange(_GALLERY, device=read.device)
                for r, w in zip(read[:groups].split(_GALLERY), wanted[:groups].split(_GALLERY), strict=True)
            ]
            result["rank1"] = torch.cat(hits).float().mean()
        return result


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """style_error of every pair of a (N P) and b (M P): N M."""
    n, m = len(a), len(b)
    return style_error(a.repeat_interleave(m, 0), b.repeat(n, 1)).view(n, m)
