"""Run a search: the uniform baseline first, then the ratios, then both again with other seeds."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from blockwise_lr.compare.execute import sigterm_interrupts
from blockwise_lr.compare.write_report import check_no_other_report
from blockwise_lr.errors import UserError
from blockwise_lr.files import make_folder, write_json_atomic
from blockwise_lr.locks import HeldError, take_lock
from blockwise_lr.train.config import TrainConfig, config_from_dict
from blockwise_lr.train.config_fields import flatten
from blockwise_lr.tune.ask_tell import Sampler
from blockwise_lr.tune.samplers import make_sampler
from blockwise_lr.tune.search_plan import SearchPlan
from blockwise_lr.tune.search_progress import SearchProgress
from blockwise_lr.tune.space import Point
from blockwise_lr.tune.trial_store import Phase, TrialRecord, TrialStore
from blockwise_lr.tune.uniform_ladder import UniformLadder
from blockwise_lr.tune.worker_pool import COMMAND, WorkerPool

PLAN = "plan.json"
_POLL_SECONDS = 0.2


def run_search(
    plan: SearchPlan,
    out: Path,
    workers: int = 1,
    progress: SearchProgress | None = None,
    *,
    worker: Sequence[str] = COMMAND,
) -> TrialStore:
    """Run every trial of a plan that has not ended yet. Ctrl-C and SIGTERM end the search; a second call continues it.

    A trial's record is out/trials/NUMBER.json and its run is out/runs/NUMBER. With one worker, an interrupted and
    continued search has the trials of an uninterrupted one. With several, the proposals depend on which trial ends
    first.

    Args:
        plan: the search.
        out: its folder, created if missing.
        workers: number of trials in parallel.
        progress: where to show progress. Default: standard output.
        worker: the command line of a worker process, for tests.

    Returns:
        All trials.

    Raises:
        UserError: a trial failed, `out` holds another search or is in use, or no run of a phase finished.
        KeyboardInterrupt: on Ctrl-C, after the workers have ended; on SIGTERM, its subclass SigtermInterrupt.
    """
    check_workers(workers)
    make_folder(out)
    try:
        lock = take_lock(out / ".lock")
    except HeldError as held:
        raise UserError(
            f"another search is running in {out}; wait for it, or give another --out{held.advice}"
        ) from None
    try:
        store = TrialStore(out / "trials")
        with (
            sigterm_interrupts(),
            progress or SearchProgress() as shown,
            WorkerPool(workers, out, cpu=plan.base.device != "cuda", command=worker) as pool,
        ):
            _Search(plan, out, store, pool, shown).run()
        return store
    finally:
        lock.release()


def check_workers(workers: int) -> None:
    """Check the number of trials in parallel.

    Raises:
        UserError: it is below 1.
    """
    if workers < 1:
        raise UserError(f"--workers must be at least 1; got {workers}")


def check_folder(plan: SearchPlan, out: Path) -> None:
    """Check that `out` holds no other search and no report of another command, and record the plan there.

    Raises:
        UserError: `out` holds a search with other settings; the message names the first that differs. Or it holds
            a comparison, a sweep or a fit over sizes.
    """
    check_no_other_report("tune", out)
    path = out / PLAN
    identity = json.loads(json.dumps(plan.identity()))
    if path.exists():
        before, base = _read_plan(path)
        for name in sorted(identity.keys() | before.keys()):
            if before.get(name) != identity.get(name):
                there, here = _typed(name, before, config_from_dict(base)), _typed(name, identity, plan.base)
                if there == here:  # two rules for the early end, which only Python code can set
                    there, here = f"{there} {before[name]}", f"{here} {identity[name]}"
                raise UserError(
                    f"{out} holds a search with {there}, and this one has {here}: choose another --out, or give the "
                    "same settings to continue it"
                )
    make_folder(out)
    write_json_atomic(path, {"identity": identity, "plan": plan.to_dict()})


def _read_plan(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the identity of the search in plan.json, and the configuration of its run.

    Raises:
        UserError: it is not the plan of a search.
    """
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        identity, base = stored["identity"], stored["plan"]["base"]
    except (ValueError, KeyError, TypeError):
        identity = base = None
    if not (isinstance(identity, dict) and isinstance(base, dict)):
        raise UserError(f"{path} is not the plan of a search; choose another --out")
    return identity, base


def _typed(name: str, identity: Mapping[str, Any], base: TrainConfig) -> str:
    """Return a setting as it is typed, such as "--steps 100" or "--no-early-end".

    Args:
        name: the name of the setting in the identity.
        identity: the identity of the search. Without the name, the value is that of `base`.
        base: the configuration of the search's run.
    """
    flag = name.rpartition(".")[2].replace("_", "-")
    value = identity[name] if name in identity else flatten(base.to_dict()).get(name)
    if name == "early_end" or isinstance(value, bool):
        return f"--{'' if value else 'no-'}{flag}"
    return f"--{flag} {shlex.quote(str(value))}"


@dataclass
class _Search:
    """The phases of a search, one after another."""

    plan: SearchPlan
    out: Path
    store: TrialStore
    pool: WorkerPool
    progress: SearchProgress
    known: list[Point] = field(default_factory=list)  # the start points

    def run(self) -> None:
        plan, store = self.plan, self.store
        blocks = plan.blocks()
        ladder = UniformLadder(plan.space({}), plan.uniform_start(), plan.seed)
        self._sample("uniform", ladder, plan.uniform_trials)
        uniform = store.best("uniform")
        if uniform is None:
            raise UserError(
                "every run with one learning rate for all blocks diverged, so there is nothing to compare with: "
                "lower --base-lr, with another --out"
            )
        space = plan.space(blocks)
        self.known = plan.ratio_start(space, uniform.point)
        sampler = make_sampler(plan.sampler_name, space, self.known, plan.seed)
        sampler.tell(uniform.point, uniform.loss, prior=True)
        self._sample("ratios", sampler, plan.ratio_trials)
        best = store.best("uniform", "ratios")
        assert best is not None
        self._repeat([uniform.point, best.point])

    def _sample(self, phase: Phase, sampler: Sampler, runs: int) -> None:
        records = self.store.of_phase(phase)
        for record in records:
            if record.order is not None:
                sampler.tell(record.point, record.loss)
        unfinished = [record for record in records if record.order is None]
        for record in unfinished:
            sampler.restore(record.point)

        def new() -> Iterator[TrialRecord]:
            yield from unfinished
            while True:
                yield TrialRecord(self.store.next_number, phase, sampler.ask(), self.plan.seed)

        ended = len(records) - len(unfinished)
        self._train(phase, runs, ended, new(), lambda record: sampler.tell(record.point, record.loss))

    def _repeat(self, points: Sequence[Point]) -> None:
        """Train the points with the seeds after the search's own."""
        seeds = range(self.plan.seed + 1, self.plan.seed + self.plan.repeats)
        wanted = [(point, seed) for seed in seeds for point in points]
        wanted = [pair for i, pair in enumerate(wanted) if pair not in wanted[:i]]
        records = self.store.of_phase("repeat")
        known = [(record.point, record.seed) for record in records if record.order is not None]
        unfinished = {(r.seed, str(r.point)): r for r in records if r.order is None}

        def new() -> Iterator[TrialRecord]:
            for point, seed in wanted:
                if (point, seed) not in known:
                    started = unfinished.get((seed, str(point)))
                    yield started or TrialRecord(self.store.next_number, "repeat", point, seed)

        done = sum(pair in known for pair in wanted)
        self._train("repeat", len(wanted), done, new(), lambda record: None)

    def _train(self, phase: Phase, runs: int, ended: int, trials: Iterator[TrialRecord], tell: Any) -> None:
        """Train `runs` trials of a phase, of which `ended` have ended before."""
        if ended >= runs:
            return
        self.progress.phase(phase, runs, ended)
        trials = islice(trials, runs - ended)
        left = runs - ended
        following = True
        while left:
            while following and not self.pool.is_full:
                record = next(trials, None)
                if record is None:
                    following = False
                    break
                self._start(record)
            answer = self.pool.poll(_POLL_SECONDS)
            if answer is not None:
                left -= 1
                tell(self._end(*answer))
            self.progress.poll(self.pool.running, self.out / "runs")

    def _start(self, record: TrialRecord) -> None:
        self.store.save(record)
        rule = self.plan.early_end if self._may_end(record) else None
        # Uniform runs against itself alone, also where a continued search tunes it further: else ratios that are better
        # by the margin would end every new trial of their own baseline.
        phases: tuple[Phase, ...] = ("uniform",) if record.phase == "uniform" else ("uniform", "ratios")
        best = self.store.best(*phases) if rule else None
        folder = self.out / "runs" / record.name
        make_folder(folder)
        task = {
            "config": self.plan.config(record.point, record.seed).to_dict(),
            "folder": str(folder),
            "early_end": rule and {"share": rule.share, "margin": rule.margin, "rows": rule.rows},
            "best": [] if best is None else [[step, loss] for step, loss in best.curve.items()],
        }
        self.pool.submit(record.number, task)
        self.progress.started(record, self.plan.base.steps)

    def _may_end(self, record: TrialRecord) -> bool:
        """Return whether a trial may end early. The known points and the repeats go to their last step."""
        return record.phase != "repeat" and record.point not in self.known

    def _end(self, number: int, answer: dict[str, Any]) -> TrialRecord:
        answer["curve"] = {int(step): float(loss) for step, loss in answer["curve"]}
        record = replace(self.store.records[number], order=self.store.next_order, **answer)
        self.store.save(record)
        self.progress.finished(record)
        return record
