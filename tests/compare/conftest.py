from pathlib import Path
from typing import Any

import pytest
from synthetic_comparison import synthetic_compare


@pytest.fixture(scope="session")
def tuned_comparison(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Three arms, three seeds, a grid of five: its folder and its compare.json. Not to be changed."""
    out = tmp_path_factory.mktemp("comparison")
    arms = ["uniform=adamw:uniform", "paper=adamw:paper", "quickstart=adamw:quickstart"]
    return out, synthetic_compare(out, arms, seeds=[0, 1, 2], base_lrs=[5e-4, 1e-3, 2e-3, 4e-3, 8e-3])
