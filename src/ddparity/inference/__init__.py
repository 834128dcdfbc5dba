"""Distributed inference: the batches of one process, shared out whole, each sample once and in order."""
