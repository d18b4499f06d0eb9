"""`python jobs/prepare.py [key=value ...]`; the same file and arguments under `ray job submit`. --help says more."""

import sys

from raysyn.cluster.job import run_job

if __name__ == "__main__":
    sys.exit(run_job("prepare", "raysyn.cluster.inputs:prepare"))
