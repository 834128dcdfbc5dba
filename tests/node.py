"""Start one node of a job as its launcher does: the checks, then torch's elastic agent. For tests of the network.

python -m tests.node OPTIONS SCRIPT
"""

from __future__ import annotations

import os
import sys
import time

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import registry
from torch.distributed.launcher.api import elastic_launch

from ddparity.errors import RendezvousError
from ddparity.launcher.handlers import rendezvous_handler
from ddparity.launcher.options import parse
from ddparity.launcher.rendezvous import add_node_check, check_rendezvous, explain, node_info


def main() -> None:
    launch = parse(sys.argv[1:])
    start = time.monotonic()
    try:
        setup = check_rendezvous(launch)
        os.environ.update(setup.variables)
        registry.get_rendezvous_handler = lambda _: add_node_check(rendezvous_handler(setup), node_info(launch), 20)
        setup.config.logs_specs = DefaultLogsSpecs()
        try:
            elastic_launch(setup.config, sys.executable)(*launch.command)
        except RendezvousError:
            raise
        except Exception as error:
            if "endezvous" not in type(error).__name__ and "Dist" not in type(error).__name__:
                raise
            raise explain(error, launch, setup, time.monotonic() - start) from error
    except RendezvousError as error:
        print(f"ddparity: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
