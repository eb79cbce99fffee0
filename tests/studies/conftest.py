"""Several studies have scripts of the same name, such as run.py: each test imports those of its own study."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

STUDIES = Path(__file__).parents[2] / "studies"


@pytest.fixture(autouse=True)
def _no_scripts_of_another_study() -> Iterator[None]:
    _forget()
    yield
    _forget()


def _forget() -> None:
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and STUDIES in Path(file).parents:
            del sys.modules[name]
