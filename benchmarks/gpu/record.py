"""The result of one part: a JSON file that is written again at every new number."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from _measure import Ratio

from blockwise_lr.files import write_json_atomic
from blockwise_lr.train.environment import describe_environment

RECENT = timedelta(days=1)


class Record:
    """The result file of one part.

    Args:
        part: name of the part.
        out: folder of the file, created if missing.
        device: "cuda" or "cpu".
        tiny: the numbers mean nothing: the file's name says so, and no ratio is judged.
    """

    def __init__(self, part: str, out: Path, *, device: str, tiny: bool) -> None:
        environment = describe_environment(device)
        out.mkdir(parents=True, exist_ok=True)
        self._stem, self._out, self._tiny = f"gpu-{part}{'-tiny' if tiny else ''}", out, tiny
        self.path = out / f"{self._stem}-{environment['date'][:10]}.json"
        self._begin = time.monotonic()
        self.values: dict[str, Any] = {
            "benchmark": "gpu",
            "part": part,
            "command": shlex.join(["python", "benchmarks/gpu", *sys.argv[1:]]),
            "card": environment["hardware"].get("gpu", environment["hardware"]["cpu"]),
            "torch": environment["versions"]["torch"],
            **environment,
            "tiny": tiny,
            "finished": False,
        }

    def is_done(self) -> bool:
        """Return whether the folder holds this part, finished within a day, of this card and this commit."""
        return any(
            is_same(json.loads(path.read_text(encoding="utf-8")), self.values)
            for path in self._out.glob(f"{self._stem}-20*.json")
        )

    def add(
        self,
        *,
        measurements: Mapping[str, Any] | None = None,
        ratios: Sequence[Ratio] = (),
        **values: Any,
    ) -> None:
        """Add numbers and write the file.

        Args:
            measurements: quantity with its unit -> arm -> values. They join those of earlier calls.
            ratios: they join those of earlier calls; one of the same name is replaced.
            values: other entries of the file.
        """
        self.values |= values
        if measurements:
            self.values["measurements"] = self.values.get("measurements", {}) | dict(measurements)
        judged = [replace(r, at_most=None, at_least=None) for r in ratios] if self._tiny else ratios
        if judged:
            known = self.values.get("ratios", {})
            self.values["ratios"] = known | {each.name: each.to_dict() for each in judged}
        self.values["seconds"] = round(time.monotonic() - self._begin, 1)
        write_json_atomic(self.path, self.values)


def is_same(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Return whether a result that was found makes it needless to run the part again."""
    alike = all(found.get(key) == wanted[key] for key in ("part", "card", "torch", "git_commit", "tiny"))
    age = datetime.now(UTC) - datetime.fromisoformat(found["date"])
    return alike and bool(found.get("finished")) and age < RECENT
