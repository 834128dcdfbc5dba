"""Find faults of anybody's DDP script: run it as it is, record what each rank does, and compare afterwards.

Read `run` first. `recording` runs in the script's processes and `records` reads what it wrote. Then pure functions, a
module a family of codes, compare the ranks: `data` (with `orders` and `randomness`), `model`, `gradients`,
`evaluation`, `files`, `output` and `speed`; `source` reads what only the script's text tells. `catalogue` has the table
of the codes, `selection` what a user silences, `report` and `page` the reports.
"""

from .catalogue import CATALOGUE, Finding

__all__ = ["CATALOGUE", "Finding"]
