"""The trials of a search on disk: one JSON file each, written when it starts and again when it ends."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from blockwise_lr.errors import UserError
from blockwise_lr.files import make_folder, write_json_atomic
from blockwise_lr.tune.space import Point

Phase = Literal["uniform", "ratios", "repeat"]
Status = Literal["running", "finished", "diverged", "ended"]


@dataclass(frozen=True)
class TrialRecord:
    """One trial.

    Args:
        number: its number, in the order of starts.
        phase: "uniform" tunes the baseline, "ratios" searches, "repeat" trains a chosen point with another seed.
        point: base learning rate, warm-up and ratios.
        seed: seed of initial weights and data order.
        status: "ended" means that the run was clearly lost and did not reach its last step.
        order: its place in the order of ends; None while it is running.
        tune_loss, val_loss: losses at the end of a finished run, in nats per token.
        step: the last step of a run that diverged or was ended.
        gap: how far an ended run was above the best one, in nats.
        seconds: duration of the run.
        curve: training loss by logged step.
    """

    number: int
    phase: Phase
    point: Point
    seed: int
    status: Status = "running"
    order: int | None = None
    tune_loss: float | None = None
    val_loss: float | None = None
    step: int | None = None
    gap: float | None = None
    seconds: float | None = None
    curve: Mapping[int, float] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """The loss that the sampler is told: infinity for a run that diverged or was ended."""
        return math.inf if self.tune_loss is None else self.tune_loss

    @property
    def name(self) -> str:
        """The name of its file and of its run's folder."""
        return f"{self.number:04d}"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON, the curve as pairs."""
        return {
            **asdict(self),
            "point": self.point.to_dict(),
            "curve": [[step, loss] for step, loss in self.curve.items()],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrialRecord:
        """Return the record that :meth:`to_dict` wrote."""
        curve = {int(step): float(loss) for step, loss in values["curve"]}
        return cls(**{**values, "point": Point.from_dict(values["point"]), "curve": curve})


class TrialStore:
    """The records in a folder.

    Args:
        folder: the folder, created if missing.

    Raises:
        UserError: a record cannot be read; the message names the file.
    """

    def __init__(self, folder: Path) -> None:
        make_folder(folder)
        self._folder = folder
        self.records: dict[int, TrialRecord] = {}
        for path in sorted(folder.glob("[0-9]*.json")):
            try:
                record = TrialRecord.from_dict(json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError, KeyError, TypeError) as error:
                run = folder.parent / "runs" / path.stem  # it refuses a trial with another point
                raise UserError(
                    f"cannot read the trial {path}: {error}; delete the file and {run} to run the trial again"
                ) from None
            self.records[record.number] = record

    def save(self, record: TrialRecord) -> None:
        """Write a record, and replace the one with the same number."""
        write_json_atomic(self._folder / f"{record.name}.json", record.to_dict())
        self.records[record.number] = record

    @property
    def next_number(self) -> int:
        """The number of the next trial."""
        return max(self.records, default=0) + 1

    @property
    def next_order(self) -> int:
        """The place of the next trial in the order of ends."""
        return max((record.order or 0 for record in self.records.values()), default=0) + 1

    def of_phase(self, phase: Phase) -> list[TrialRecord]:
        """Return the trials of a phase: those that have ended in the order of their ends, then those running."""
        records = [record for record in self.records.values() if record.phase == phase]
        return sorted(records, key=lambda record: (record.order or math.inf, record.number))

    def best(self, *phases: Phase, uniform: bool = False) -> TrialRecord | None:
        """Return the finished trial with the lowest tune loss, the earlier one in a tie; None if there is none.

        Args:
            phases: the phases to look at.
            uniform: look only at trials with one learning rate for all blocks.
        """
        records = [record for phase in phases for record in self.of_phase(phase)]
        finished = [r for r in records if r.status == "finished" and not (uniform and r.point.ratios)]
        return min(finished, key=lambda record: (record.loss, record.number), default=None)
