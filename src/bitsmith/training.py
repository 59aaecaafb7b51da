"""What needs training before it can be scored, and what trains it."""

from __future__ import annotations

from dataclasses import dataclass

from .plan import Plan
from .technique import Step, Technique


@dataclass(frozen=True)
class Training:
    """How techniques that need training come to be scored: after ``step``, which trains a plan, or as they are where
    the weights were ``trained`` under them. Without either they cannot be."""

    step: Step | None = None
    trained: tuple[Technique, ...] = ()

    def of(self, plan: Plan) -> Plan:
        """The plan, with the step where one of its techniques needs it."""
        if self.step is None or not any(self.needs(technique) for technique in plan.sites.values()):
            return plan
        return plan.replace(prepare=(*plan.prepare, self.step))

    def needs(self, technique: Technique) -> bool:
        """Whether the step has to come before its score."""
        return technique.needs_training and technique not in self.trained

    def can(self, technique: Technique) -> bool:
        """Whether the technique can be scored."""
        return not technique.needs_training or self.step is not None or technique in self.trained
