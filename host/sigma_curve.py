"""A factor on a LoRA's strength that depends on sigma, written as text: `1.0:0, 0.9:0.6, 0:0.3`, or the name of a preset.

The curve is piecewise linear in sigma and flat beyond its ends. Sigma may stand twice for a step; at the step itself the value of the
larger sigmas counts, as the high-noise expert takes a sampling step that starts exactly at the boundary. `web/sigma_curve.js` reads the
same text; `tests/web/curve_cases.json` holds both to the same numbers.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

MAX_POINTS = 64
MAX_FACTOR = 10.0
DEFAULT_BOUNDARY = 0.875  # Wan2.2 T2V; I2V switches at 0.9. Source: Wan-Video/Wan2.2, wan/configs (Apache-2.0)
SIGMA_TOLERANCE = 1e-6  # a sigma comes back from the host as timestep / 1000 in float32

PRESETS = ("constant", "ramp", "above", "below", "late")
_PRESET = re.compile(r"^(constant|ramp|above|below|late)(?:\s+(\S+))?$")


@dataclass(frozen=True, kw_only=True)
class SigmaCurve:
    """Points (sigma, factor) with falling sigma; no points is the factor 1 everywhere."""

    points: tuple[tuple[float, float], ...] = ()

    def at(self, sigma: float) -> float:
        """Return the factor at a sigma in [0, 1]."""
        for i, (point_sigma, factor) in enumerate(self.points):
            if sigma >= point_sigma - SIGMA_TOLERANCE:
                if i == 0:
                    return factor
                above_sigma, above_factor = self.points[i - 1]
                width = above_sigma - point_sigma
                share = min(1.0, max(0.0, (sigma - point_sigma) / width)) if width > 0 else 1.0
                return factor + share * (above_factor - factor)
        return self.points[-1][1] if self.points else 1.0

    def is_constant(self) -> bool:
        """Tell whether the factor is the same at every sigma."""
        return len({factor for _, factor in self.points}) <= 1

    def largest(self) -> float:
        """Return the factor of largest size."""
        return max((factor for _, factor in self.points), key=abs, default=1.0)

    def text(self) -> str:
        """Return the curve as text that `parse_curve` reads; empty for the factor 1."""
        return ", ".join(f"{sigma:g}:{factor:g}" for sigma, factor in self.points)


def parse_curve(text: str) -> SigmaCurve:
    """Read a curve.

    Args:
        text: `sigma:factor` pairs in falling or rising order of sigma, split by commas, semicolons or new lines; or a preset: `constant`,
            `ramp` (0 at sigma 1, 1 at sigma 0), `above 0.875` and `below 0.875` (1 on that side of the boundary, 0 on the other), `late 0.5`
            (0 down to that sigma, 1 from half of it). Empty is `constant`.

    Returns:
        The curve.

    Raises:
        ValueError: Not such text, a sigma outside [0, 1], a factor outside ±10, sigmas out of order, or more than 64 points.
    """
    plain = text.strip().lower()
    preset = _PRESET.match(plain)
    if not plain or preset:
        return SigmaCurve(points=_preset_points(*(preset.groups() if preset else ("constant", None))))
    points = [_point(part) for part in re.split(r"[,;\n]", plain) if part.strip()]
    if len(points) > MAX_POINTS:
        raise ValueError(f"The strength curve has {len(points)} points; {MAX_POINTS} are allowed. Leave out those on straight lines.")
    sigmas = [sigma for sigma, _ in points]
    if sigmas == sorted(sigmas) and sigmas != sorted(sigmas, reverse=True):
        points.reverse()
    elif sigmas != sorted(sigmas, reverse=True):
        raise ValueError(f"The sigmas of the strength curve {text.strip()!r} are out of order. Write them from 1 down to 0.")
    if any(sigmas.count(sigma) > 2 for sigma in set(sigmas)):
        raise ValueError(f"The strength curve {text.strip()!r} has more than two points at one sigma. Two make a step; leave out the others.")
    return SigmaCurve(points=tuple(points))


def _preset_points(name: str, number: str | None) -> tuple[tuple[float, float], ...]:
    """Return the points of a preset."""
    if name in ("constant", "ramp"):
        if number is not None:
            raise ValueError(f"The strength curve {name!r} takes no number, but {number!r} follows. Leave it out.")
        return ((1.0, 0.0), (0.0, 1.0)) if name == "ramp" else ()
    sigma = _number(number, 0.0, 1.0, f"The sigma of the strength curve {name!r}") if number is not None else (0.5 if name == "late" else DEFAULT_BOUNDARY)
    if name == "late":
        return ((1.0, 0.0), (sigma, 0.0), (sigma / 2, 1.0), (0.0, 1.0))
    above, below = (1.0, 0.0) if name == "above" else (0.0, 1.0)
    return ((1.0, above), (sigma, above), (sigma, below), (0.0, below))


def _point(part: str) -> tuple[float, float]:
    """Read one `sigma:factor`."""
    sigma, colon, factor = part.partition(":")
    if not colon:
        raise ValueError(f"{part.strip()!r} is no point of a strength curve. Write sigma:factor such as 0.9:0.6, or one of {', '.join(PRESETS)}.")
    return _number(sigma, 0.0, 1.0, "A sigma of the strength curve"), _number(factor, -MAX_FACTOR, MAX_FACTOR, "A factor of the strength curve")


def _number(text: str, low: float, high: float, what: str) -> float:
    """Read a number between two limits. Only plain decimals, so that the page reads the same."""
    number = float(text) if re.fullmatch(r"\s*[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\s*", text) else math.nan
    if not low <= number <= high:
        raise ValueError(f"{what} is {text.strip()!r}; it must be a number from {low:g} to {high:g}.")
    return number
