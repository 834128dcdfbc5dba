"""The comparison of runs of one Task on different numbers of processes; `ddparity.verify` starts them."""

from .comparison import CheckedStep, Comparison, Curve, Difference, Divergence
from .report import plot, show

__all__ = ["CheckedStep", "Comparison", "Curve", "Difference", "Divergence", "plot", "show"]
