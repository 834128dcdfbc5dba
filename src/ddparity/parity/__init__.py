"""Compare the training of a Task on one process with its training on several processes.

Read `verify.py` first: it starts the runs and compares them. `run.py`: one run of the training steps. `recorder.py`:
what a rank records in a run. `notes.py`: the records and their files. `stages.py`: where two runs first diverge.
`noise.py`: the effect of rounding, and what is tolerated. `comparison.py`: the result. `causes.py`: likely causes.
`report.py`: the table and the plot.
"""

from .comparison import CheckedStep, Comparison, Curve, Difference, Divergence
from .report import plot, show

__all__ = ["CheckedStep", "Comparison", "Curve", "Difference", "Divergence", "plot", "show"]
