"""`python -m raysyn.tracking [folder] [--port N]`: MLflow's pages over the runs below the folder."""

from __future__ import annotations

import argparse
import signal
import sys

from raysyn.tracking.server import serve
from raysyn.types import Fault, UserError


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 after Ctrl-C or SIGTERM, 2 when there is nothing to show, 1 when the server does not start."""
    parser = argparse.ArgumentParser(prog="python -m raysyn.tracking", description=__doc__)
    parser.add_argument("folder", nargs="?", default="runs", help="where the jobs' storage folders are")
    parser.add_argument("--port", type=int, default=5000, help="first port to try on 127.0.0.1")
    chosen = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        serve(chosen.folder, chosen.port)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Fault as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
