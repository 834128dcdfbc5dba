"""Run the command line with `python -m ddparity`."""

from .cli import main

main()
