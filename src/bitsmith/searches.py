"""The search methods, as values: ``bitsmith.searches.Exact()``."""

from typing import TYPE_CHECKING

from ._lazy import loader

if TYPE_CHECKING:
    from .search.bisection import Bisection as Bisection
    from .search.exact import Exact as Exact
    from .search.greedy import Greedy as Greedy
    from .search.pareto import Pareto as Pareto
    from .search.random_plans import RandomPlans as RandomPlans

__all__ = ["Bisection", "Exact", "Greedy", "Pareto", "RandomPlans"]
__getattr__ = loader(
    __name__,
    {
        "Bisection": "search.bisection",
        "Exact": "search.exact",
        "Greedy": "search.greedy",
        "Pareto": "search.pareto",
        "RandomPlans": "search.random_plans",
    },
)
