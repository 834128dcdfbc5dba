"""Measure where a training step's time goes, and predict it for more ranks and other links.

Read `bench.py` first: it measures, predicts and shows. `measure.py`: the parts of a Task's step, on the processes at
hand. `training.py`: the copies of its model. `collectives.py`: this machine's collectives. `links.py`: what a
collective moves, and how long that takes. `model.py`: how long a step takes on N ranks. `report.py`: the tables.
`picture.py`: the picture.
"""
