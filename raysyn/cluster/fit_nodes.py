"""The nodes that an elastic fit counts on, as they are when its group is sized.

Ray looks for new and lost nodes every 20 s. A group sized by what it knew before leaves out a node that has just joined,
until Ray Train thinks of it again a minute later, or waits for one that has just gone, until the group's start times out.
"""

from __future__ import annotations

import logging
from typing import Any

from ray.train.v2._internal.execution.callback import ControllerCallback

log = logging.getLogger(__name__)
PATIENCE_SECONDS = 5.0


class CountNodes(ControllerCallback):
    """Makes Ray look before a fit's first group is sized and after each failure, a group that could not start among them.

    Ray Train calls it in its controller. A count that fails is a warning: the fit goes on by what was known before.
    """

    def after_controller_start(self, train_run_context: Any) -> None:
        count_nodes()

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        count_nodes()


def count_nodes() -> None:
    """Have Ray Train's coordinator look at the cluster now; waits for `PATIENCE_SECONDS` at most."""
    import ray
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        get_or_create_autoscaling_coordinator,
    )

    nobody = ""  # whose share is told is of no interest here
    try:
        counted = get_or_create_autoscaling_coordinator().get_reserved_resources.remote(nobody, recompute=True)
        ray.get(counted, timeout=PATIENCE_SECONDS)
    except ray.exceptions.RayError as error:
        log.warning("the cluster's nodes could not be counted anew: %s", error)
