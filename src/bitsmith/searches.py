"""The search methods, as values: ``bitsmith.searches.Exact()``."""

from .search.bisection import Bisection as Bisection
from .search.exact import Exact as Exact
from .search.greedy import Greedy as Greedy
from .search.pareto import Pareto as Pareto
from .search.random_plans import RandomPlans as RandomPlans

__all__ = ["Bisection", "Exact", "Greedy", "Pareto", "RandomPlans"]
