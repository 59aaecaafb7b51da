"""Which points no other betters, and how much of the space they better: two frontiers as two numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

Values = Sequence[float]


def non_dominated(points: Sequence[Values]) -> list[int]:
    """The indices of the points [n, objectives] that no other point betters, in order; less is better.

    One point betters another if it is nowhere worse and somewhere better (Deb et al. 2002, IEEE Trans. Evolutionary
    Computation 6:2, definition 1), so of equal points all stay. A point with a NaN or an infinity is left out.

    >>> non_dominated([(1.0, 3.0), (2.0, 2.0), (2.0, 3.0)])
    [0, 1]
    """
    known = [i for i, point in enumerate(points) if all(map(math.isfinite, point))]
    return [i for i in known if not any(_betters(points[j], points[i]) for j in known)]


def _betters(one: Values, other: Values) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def hypervolume(points: Sequence[Values], reference: Values) -> float:
    """The volume between the points [n, objectives] and ``reference`` [objectives]; less is better, more volume is too.

    In the product of the objectives' units, exact for any number of them: the volume is sliced along the last objective
    until two are left, and those are swept (While et al. 2006, IEEE Trans. Evolutionary Computation 10:1; Fonseca et
    al. 2006, CEC, build on the same sweep). What does not better the reference in every objective adds nothing. Raises
    ``ValueError`` for points of another number of objectives, and for a reference that is not finite.

    >>> hypervolume([(1.0, 3.0), (2.0, 2.0)], (4.0, 4.0))
    5.0
    """
    if not reference or not all(map(math.isfinite, reference)):
        raise ValueError(f"hypervolume: the reference {tuple(reference)} must hold one finite number per objective")
    for point in points:
        if len(point) != len(reference):
            raise ValueError(
                f"hypervolume: the point {tuple(point)} and the reference {tuple(reference)} must have as many numbers"
            )
    return _volume([point for point in points if all(a < b for a, b in zip(point, reference, strict=True))], reference)


def _volume(points: Sequence[Values], reference: Values) -> float:
    """Of points that all better the reference."""
    if not points:
        return 0.0
    if len(reference) == 1:
        return reference[0] - min(point[0] for point in points)
    ordered = sorted(points, key=lambda point: point[-1])
    ends = [*(point[-1] for point in ordered[1:]), reference[-1]]
    total, least = 0.0, math.inf
    for count, (point, end) in enumerate(zip(ordered, ends, strict=True), 1):
        if len(reference) == 2:
            least = min(least, point[0])
            total += (end - point[1]) * (reference[0] - least)
        elif end > point[-1]:
            total += (end - point[-1]) * _volume([other[:-1] for other in ordered[:count]], reference[:-1])
    return total
