"""What one process knows of its job, and how its rank acts together with the others. Read `world` first.

`environment` reads the launcher's variables, `network` this machine's addresses and ports, and `members` tells every
rank where the others run. `agreement` makes all ranks reach a point or raise; `first` and `preemption` are built on it.
`logging` and `progress` make the output of N processes look like that of one.
"""
