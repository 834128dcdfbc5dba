"""Record what a training script does, in each of its processes, for a comparison after the run.

Read `install` first: `begin` runs before the script and waits for its import of torch. `journal` writes the records;
`loaders` watches data loaders (`draws`: the indices they draw, `streams`: random numbers, `items`: what the data sets
hold), `training` and `models` what trains, `collectives` the process group, and `files` what is written and printed.
The script's processes load this folder by its path, not as a part of ddparity, so that a script does not wait for
ddparity's imports. Nothing here calls a collective.
"""
