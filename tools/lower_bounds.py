"""Print the lower bound of every dependency that users install, one `name==version` a line, for pip.

    python tools/lower_bounds.py > lower.txt

The core and every extra but those for developing. torch is left out: its lowest wheel is a CUDA build of gigabytes on
Linux, so `make lower-bounds` takes the release of constraints.txt, and another by `TORCH=2.9.0`.
"""

from __future__ import annotations

import re
from pathlib import Path

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
EXTRAS = ("train", "plot", "report", "optimizers", "lightning")
LEFT_OUT = ("torch", "blockwise-lr")


def lower_bounds(project: Path = PROJECT) -> dict[str, str]:
    """The lower bound of every dependency, by its name.

    Args:
        project: a pyproject.toml.

    Raises:
        ValueError: a dependency is declared without a lower bound.
    """
    import tomllib

    declared = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    every = [*declared["dependencies"]]
    for extra in EXTRAS:
        every += declared["optional-dependencies"][extra]
    found = {}
    for requirement in every:
        name = re.match(r"[\w.-]+", requirement)[0]
        if name in LEFT_OUT:
            continue
        # A marker (`; python_version < ...`) holds for the Python that this runs with, or pip leaves the package out.
        bound = re.fullmatch(r"[\w.-]+(?:>=|==)([\w.]+)", requirement.partition(";")[0].strip())
        if bound is None:
            raise ValueError(f"{requirement}: expected name>=version, so that the lower bound can be tested")
        found[name] = bound[1]
    return found


if __name__ == "__main__":
    print("\n".join(f"{name}=={version}" for name, version in lower_bounds().items()))
