"""Makes `python benchmarks/gpu` work in a fresh clone, from any folder and without installing the package."""

import sys
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
sys.path.insert(0, str(HERE.parent))  # the other benchmarks, and this package as `gpu`
if find_spec("blockwise_lr") is None:
    sys.path.insert(0, str(HERE.parents[1] / "src"))

from gpu.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
