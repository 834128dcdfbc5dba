"""`python -m ddparity`."""

from .cli import main

main()
