"""Exact gradients of a global batch: `replicate` and `accumulate`.

Read `accumulate` first: it yields a step's micro-batches with their weights. `window` is the life of one step: what is
held back in the loop, and what is reduced after it. `early` starts the averages of a large model in the last backward.
`replica` is what is kept for each replicated model. `replicate` makes a model's DDP module. `strict` sums gradients
along one tree over micro-batches.
"""
