"""Train and evaluate a Task, which is a model, its data, its loss and its optimizer.

Read `task.py` first: what a Task has, and how it is loaded from a file. `train.py`: the whole training, the evaluation
and the prediction with a checkpoint.
"""
