"""The speed model: what a workload should take on this machine, and how far off that was."""

from hasten.speed.estimate import Efficiency, estimate
from hasten.speed.judge import EstimateError, efficiency, error

__all__ = ["Efficiency", "EstimateError", "efficiency", "error", "estimate"]
