"""Ray Tune's Optuna search, made to agree with a study that knows more than Ray Tune's last snapshot.

Optuna's database is written at each event, Ray Tune's own state every second or so. After kill -9 a restored search may
meet a trial again that the study has as finished; the plain class then fails on its next report.
"""

from __future__ import annotations

from typing import Any

from ray.tune.search.optuna import OptunaSearch


class DurableOptunaSearch(OptunaSearch):
    """OptunaSearch that leaves trials alone which its study has as finished."""

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Pass an intermediate result on, unless the study has this trial's end already."""
        if not self._ended(trial_id):
            super().on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Pass the end on, unless the study has it already."""
        if self._ended(trial_id):
            self._completed_trials.add(trial_id)
        else:
            super().on_trial_complete(trial_id, result, error)

    def _ended(self, trial_id: str) -> bool:
        trial = self._ot_trials.get(trial_id)
        if trial is None or trial_id in self._completed_trials:
            return False
        return bool(self._ot_study.trials[trial.number].state.is_finished())
