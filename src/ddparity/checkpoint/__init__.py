"""Save and load checkpoints, and compare models by their bytes.

Read `checkpoint` first: `save_checkpoint` and `load_checkpoint`. `nodes` is what a value looks like in a file, and
`format` writes, reads and checks the file; `old_format` reads that of an earlier version. `objects` and `loading` are
what is compared and agreed on at a load, `sharded` the folder of a sharded model. `atomic` replaces a file so that a
crash leaves the old file or the new one. `fingerprint` is the SHA-256 of a model's weights.
"""
