"""Where the runs of these tests are found again."""

from raysyn.config import TrackingConfig
from raysyn.tracking import Tracker
from raysyn.tracking.places import open_client

ON = TrackingConfig()


def run_of(logged: Tracker):
    return open_client(logged.uri).get_run(logged.run_id)
