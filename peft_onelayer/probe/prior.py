"""The depth prior: which blocks the published profiles say are worth training, before anything is run.

In the seven profiles of arXiv 2607.01232 that `peft_onelayer/profiles/` holds the best block lies at 37 to 59 % of the
depth. The prior is a bump over relative depth; its centre is the mean of the seven best depths, its width the one
that fits the only profile published whole (Qwen3-1.7B-Base) best. It costs nothing, and it is wrong for every model
whose weak block lies elsewhere.
"""

from __future__ import annotations

import functools
import json
import statistics
from importlib.resources import files

import numpy as np


@functools.cache
def fitted() -> tuple[float, float]:
    """Centre and width of the bump, both in relative depth k / (L - 1)."""
    profiles = [
        json.loads(path.read_text(encoding="utf-8")) for path in (files("peft_onelayer") / "profiles").iterdir()
    ]
    centre = statistics.fmean(_best_depth(profile["contribution"]) for profile in profiles)
    whole = next(profile["contribution"] for profile in profiles if not profile["partial"])
    depths = np.linspace(0, 1, len(whole))

    def misfit(width: float) -> float:
        design = np.stack([np.ones_like(depths), np.exp(-((depths - centre) ** 2) / (2 * width**2))], axis=1)
        return float(np.linalg.lstsq(design, np.array(whole), rcond=None)[1][0])

    return centre, min((width / 100 for width in range(10, 61)), key=misfit)


def depth_prior(num_layers: int) -> list[float]:
    """The bump at each block, 1 at its centre.

    >>> scores = depth_prior(28)
    >>> max(range(28), key=scores.__getitem__)
    13
    """
    centre, width = fitted()
    last = max(num_layers - 1, 1)
    return [float(np.exp(-((k / last - centre) ** 2) / (2 * width**2))) for k in range(num_layers)]


def _best_depth(contribution: list[float | None]) -> float:
    measured = {k: c for k, c in enumerate(contribution) if c is not None}
    return max(measured, key=lambda k: measured[k]) / (len(contribution) - 1)
