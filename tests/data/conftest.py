"""A CAMUS folder as a fixture."""

from pathlib import Path

import pytest

from tests.data.camus_files import write_nifti, write_patient, write_splits


@pytest.fixture
def nifti(tmp_path: Path) -> Path:
    """Four patients in the NIfTI release: 0001 and 0004 train, 0002 validation, 0003 test."""
    for number in range(1, 5):
        write_patient(tmp_path / "database_nifti" / f"patient{number:04d}", "nii.gz", write_nifti)
    write_splits(
        tmp_path, training=["patient0004", "patient0001"], validation=["patient0002"], testing=["patient0003", ""]
    )
    return tmp_path
