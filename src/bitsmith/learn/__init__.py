from .choice import differentiable_search as differentiable_search
