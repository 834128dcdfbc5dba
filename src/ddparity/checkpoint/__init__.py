"""Save and load checkpoints, and compare models by their bytes.

Read `checkpoint` first: `save_checkpoint` and `load_checkpoint`, with what all ranks agree on. `format` writes, reads
and checks the file. `atomic` replaces a file so that a crash leaves the old file or the new one. `fingerprint` is the
SHA-256 of a model's weights.
"""
