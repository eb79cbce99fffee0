"""Write docs/reference/reliability.md: `python tools/docs/reliability_page.py` (15 to 20 minutes on 2 cores).

Run the tests named below and write what each passed test has reported: fault, times tried, outcome. A test that failed
or was skipped has a row that says so.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

from blockwise_lr.files import write_text_atomic
from blockwise_lr.train.environment import describe_environment

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reference" / "reliability.md"
TESTS = (
    *(
        f"tests/faults/test_{name}.py"
        for name in ("killed", "lost_process", "damage", "disk_full", "two_runs")
    ),
    "tests/train/test_sigterm.py",
    "tests/train/test_nonfinite_guard.py",
)
HEAD = """\
# Reliability

This page lists the faults that tests inflict on runs of `blockwise-lr train`, and the outcome of
each. Most of these runs are separate processes. `python tools/docs/reliability_page.py` runs the
tests and writes the page.

| tests passed | failed | skipped | hardware | PyTorch | date |
| --- | --- | --- | --- | --- | --- |
| {passed} | {failed} | {skipped} | {hardware} | {torch} | {date} |

| fault | times | outcome | test |
| --- | --- | --- | --- |
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tests.xml"
        command = [
            "-m",
            "pytest",
            "-q",
            "-m",
            "slow or not slow",
            "--timeout",
            "1200",
            f"--junitxml={path}",
            *TESTS,
        ]
        subprocess.run([sys.executable, *command], cwd=ROOT)
        cases = list(ET.parse(path).getroot().iter("testcase"))
    write_text_atomic(PAGE, page(cases))


def page(cases: list[ET.Element]) -> str:
    """Return the page for the test cases of a junit report."""
    states = [state(case) for case in cases]
    about = describe_environment("cpu")
    lines = []
    for case, how in zip(cases, states):
        told = {p.get("name"): p.get("value", "") for p in case.iter("property")}
        test = f"{case.get('classname', '').removeprefix('tests.')}.{case.get('name', '').partition('[')[0]}"
        if "fault" in told:
            lines.append(f"| {told['fault']} | {told['times']} | {told['outcome']} | `{test}` |")
        elif how != "passed":
            lines.append(f"| | | **{how}** | `{test}` |")
    counts = {name: states.count(name) for name in ("passed", "failed", "skipped")}
    head = HEAD.format(
        date=about["date"][:10],
        hardware=f"{about['hardware']['cpu']}, {about['hardware']['cores']} cores",
        torch=about["versions"]["torch"],
        **counts,
    )
    return head + "\n".join(lines) + "\n"


def state(case: ET.Element) -> str:
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    return "passed" if case.find("skipped") is None else "skipped"


if __name__ == "__main__":
    main()
