"""The search methods, as values: ``bitsmith.searches.Exact()``."""

from .search.exact import Exact as Exact

__all__ = ["Exact"]
