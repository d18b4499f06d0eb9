"""MLflow, and the only room that imports it: one experiment a study, one run a row, trials as child runs."""

from raysyn.tracking.entries import flatten
from raysyn.tracking.places import git_commit, tracking_uri
from raysyn.tracking.study import log_study
from raysyn.tracking.tracker import Tracker

__all__ = ["Tracker", "flatten", "git_commit", "log_study", "tracking_uri"]
