"""Ray Tune's Optuna search, made to agree with a study that knows more than Ray Tune's last snapshot.

Optuna's database is written at each event, Ray Tune's own state every second or so. After kill -9 a restored search may
meet a trial again that the study has as finished; the plain class then fails on its next report.
"""

from __future__ import annotations

import time
import warnings
from typing import Any

from ray.tune.search.optuna import OptunaSearch

from raysyn.types import UserError

ATTEMPTS = 5  # at a database whose tables another search may be making at this moment


def study_storage(url: str) -> Any:
    """Optuna's storage at `url`, its tables made where they are not there. Raises UserError where it cannot be opened.

    Searches that begin on one new database at the same moment all find no tables, and all but one then fail to make
    them, in whichever way the database words it: they look again.
    """
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    for attempt in range(1, ATTEMPTS + 1):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return optuna.storages.RDBStorage(url)
        except (SQLAlchemyError, ImportError, ValueError, RuntimeError) as error:
            if not isinstance(error, SQLAlchemyError) or attempt == ATTEMPTS:
                first = str(error).strip().splitlines()[0]
                raise UserError(f"search.optuna_url: cannot open {_without_password(url)}: {first}") from error
            time.sleep(0.2 * 2**attempt)
    raise AssertionError("unreachable")


def _without_password(url: str) -> str:
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return "that URL"


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
