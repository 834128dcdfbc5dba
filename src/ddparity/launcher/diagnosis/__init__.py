"""Find out why a job fails or hangs: from outside of its ranks, without a word from the user's script.

Read `watch.py` first: it polls the ranks of one machine and reports a hang. `instruments.py` is installed in each rank
and answers. `flight.py` reads its collectives, `stacks.py` where it is; `desync.py` compares the collectives of all
ranks, `hang_report.py` describes a hang, and `messages.py` joins the agents of several machines. `exits.py` is about
ranks that have ended: how each one ended and which one is the root cause. Nothing here imports from `launcher/` itself.
"""
