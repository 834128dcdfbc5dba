"""Whole trainings of kinds that people run, each written twice: with ddparity, and by hand in plain PyTorch.

Read `test_trainings.py` first: it lists them, and compares the two on 1, 2 and 3 processes.
"""
