"""Ray Tune's Optuna search, made to agree with a study that knows more than Ray Tune's last snapshot, wherever that lies.

Optuna's database is written at each event, Ray Tune's own state every second or so. After kill -9 a restored search may
meet a trial again that the study has as finished; the plain class then fails on its next report.
"""

from __future__ import annotations

import sqlite3
import tempfile
import time
import warnings
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from raysyn.data.sqlite import sqlite_url
from raysyn.data.storage import Storage
from raysyn.types import UserError

STUDY = "optuna.db"

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


@dataclass(frozen=True)
class StudyCopy:
    """A study's sqlite database in an object store: a file on this machine, put there whole after each event."""

    uri: str
    name: str

    @property
    def path(self) -> Path:
        """The file here, the same on every machine that goes on with the search."""
        return Path(tempfile.gettempdir()) / f"raysyn-{self.name}-{STUDY}"

    def fetch(self) -> str:
        """Bring what the store has, and nothing older, here; returns the file's URL."""
        self.path.unlink(missing_ok=True)
        if (storage := Storage.at(self.uri)).exists(STUDY):
            self.path.write_bytes(storage.read_bytes(STUDY))
        return sqlite_url(self.path)

    def keep(self) -> None:
        """Put the file as it is now into the store."""
        with closing(sqlite3.connect(self.path)) as database:
            Storage.at(self.uri).write_atomic(STUDY, database.serialize())


class DurableOptunaSearch(OptunaSearch):
    """OptunaSearch that leaves trials alone which its study has as finished, and has `copy` keep each of its events.

    The store is never behind what Ray Tune's snapshots know, as these are taken after an event is handled.
    """

    def __init__(self, *, copy: StudyCopy | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self._copy = copy

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """The next trial's values."""
        suggested = super().suggest(trial_id)
        if self._copy is not None and suggested not in (None, Searcher.FINISHED):
            self._copy.keep()
        return suggested

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
        if self._copy is not None:
            self._copy.keep()

    def _ended(self, trial_id: str) -> bool:
        trial = self._ot_trials.get(trial_id)
        if trial is None or trial_id in self._completed_trials:
            return False
        return bool(self._ot_study.trials[trial.number].state.is_finished())
