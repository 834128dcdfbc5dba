"""Distributed inference: ranks share out the batches of one process; each sample is run once, results are in order.

Read predict.py first: it calls all others. source.py cuts the data set into batches, model.py runs the model and
restores it. outputs.py checks a batch's output, collect.py and sendbuffer.py bring outputs to ranks, metrics.py reduces
them. directory.py writes them as Parquet files, identity.py decides whether a directory can be resumed, description.py
and columns.py turn outputs into columns and back, and reading.py reads a directory.
"""
