"""While a test here writes a checkpoint, modules of the reference's names are there."""

from collections.abc import Iterator

import pytest

from tests.reference_format.writer import modules_of_the_reference


@pytest.fixture(autouse=True)
def reference_modules() -> Iterator[None]:
    with modules_of_the_reference():
        yield
