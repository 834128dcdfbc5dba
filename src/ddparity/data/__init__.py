"""Which samples a step gets, and how they are loaded; the result does not depend on ranks and workers.

Read `plan` first: it cuts an epoch into steps and micro-batches. `rng` seeds the random streams and derives the seeds.
`loader` loads a plan's micro-batches with a torch DataLoader, and holds the position for a checkpoint; it yields the
`Step`s of `step`. `dataset` is the part of a loader that runs in its workers: it seeds the streams, and loads a batch.
`orders` and `lengths` are other plans. `stream` reads data that can only be iterated, in the workers, and
`stream_steps` makes steps of what it reads. `fitting` refuses a plan that does not fit.
"""
