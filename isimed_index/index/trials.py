"""Trials: candidates are built and tuned; the quickest that reaches the target is judged on rows that it never saw."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from isimed_index.errors import RecallBelowTarget
from isimed_index.index.candidates import candidates, intrinsic, is_small
from isimed_index.index.card import Tried
from isimed_index.index.exact import ExactIndex
from isimed_index.index.faiss_index import FaissIndex, copies
from isimed_index.index.goal import Goal, Samples
from isimed_index.index.recall import RecallTest
from isimed_index.index.recipe import Recipe, ram_bytes
from isimed_index.index.spectrum import Axes
from isimed_index.index.strata import Filter
from isimed_index.index.tune import Tuned, live, stronger, tune

TRIAL_FLOATS = 1 << 26  # rows x dimensions of a trial: 65,536 rows of 1024
_AXES_FLOATS = 1 << 25  # of the sample that principal axes are taken from
_STEPS_UP = 4  # settings that are judged, each stronger than the one before, before the next recipe is
_TAKEN, _SLOWER, _TOO_SLOW = "taken", "slower", "too slow"


@dataclass(frozen=True, slots=True)
class Trained:
    """What recipes over some rows are built from."""

    exact: ExactIndex
    test: RecallTest  # of the rows that tune
    sample: NDArray[np.float32]  # (s, d) training vectors, as an index holds them
    axes: Axes | None  # None where there are so few rows that nothing but flat is tried

    def build(self, recipe: Recipe) -> FaissIndex:
        """An index of this recipe over all of the rows."""
        pieces, dim = self.exact.pieces(None), self.exact.dim or 0
        return FaissIndex.build(pieces, self.exact.metric, recipe, dim, self.sample, self.axes)


@dataclass(slots=True)
class _Trial:
    """A recipe as it was last tuned, over so many rows, and what became of it."""

    tuned: Tuned
    rows: int
    verdict: str = "recall out of reach"

    def ms(self) -> float:
        """Of a query; infinite where the recall is out of reach."""
        return math.inf if self.tuned.ms is None else self.tuned.ms


def choose(
    exact: ExactIndex, goal: Goal, samples: Samples, judge: RecallTest, tuning: Iterable[Filter]
) -> tuple[tuple[Tried, ...], Tuned]:
    """The quickest index that reaches the goal, and what was tried; `RecallBelowTarget` when none does.

    `judge` has rows that tune nothing; the filters `tuning` have a say in how many dimensions are kept.
    """
    n, dim = len(exact), exact.dim or 0
    test = RecallTest.prepare(exact, samples.tuners) if samples.tuners.size else judge
    sample = copies(exact.vectors(samples.training), exact.metric)
    step = max(1, sample.size // _AXES_FLOATS)
    axes = None if is_small(n, dim) else Axes.of(sample[::step])
    trained = Trained(exact, test, sample, axes)
    tried: list[Tried] = []
    for recipes in _groups(trained, tuning, goal.min_recall):
        fitting = [recipe for recipe in recipes if goal.fits(recipe, n, dim)]
        tried += [_untried(recipe, n, dim) for recipe in recipes if recipe not in fitting]
        chosen = _best(trained, fitting, goal, judge, tried)
        if chosen is not None:
            return tuple(tried), chosen
    raise _below_target(tried, goal, ram_bytes(Recipe("Flat"), n, dim))


def _groups(trained: Trained, tuning: Iterable[Filter], min_recall: float) -> Iterator[list[Recipe]]:
    """Candidates in groups: a later one only where none of the earlier reaches the goal. Flat, exact, is the last."""
    n, dim = len(trained.exact), trained.exact.dim or 0
    if trained.axes is not None:
        dims = intrinsic(trained.exact, trained.axes, trained.test, tuning, min_recall)
        yield from candidates(n, dim, dims)
    yield [Recipe("Flat", fetch=2.0)]


def _best(
    trained: Trained, recipes: Sequence[Recipe], goal: Goal, judge: RecallTest, tried: list[Tried]
) -> Tuned | None:
    """The quickest of the recipes that the judges let pass; adds to `tried`, what was judged as it was judged."""
    on_sample = _on_sample(trained)
    whole = on_sample is trained
    ended = [_Trial(_try(on_sample, recipe, goal), len(on_sample.exact)) for recipe in recipes]
    passed: list[_Trial] = []
    for trial in sorted((one for one in ended if one.tuned.ms is not None), key=_Trial.ms):
        # One that had to be made stronger may be slower than the next; times on a sample are no match for it.
        if passed and (not whole or min(map(_Trial.ms, passed)) <= trial.ms()):
            trial.verdict = _SLOWER
            continue
        if not whole:
            trial.tuned, trial.rows = _try(trained, trial.tuned.index.recipe, goal), len(trained.exact)
        _judge(trial, trained, goal, judge)
        passed += [trial] if trial.verdict == _TAKEN else []
    chosen = min(passed, key=_Trial.ms, default=None)
    for trial in passed:
        trial.verdict = _TAKEN if trial is chosen else _SLOWER
    tried += [_entry(one, trained.exact) for one in ended]
    return None if chosen is None else chosen.tuned


def _try(trained: Trained, recipe: Recipe, goal: Goal) -> Tuned:
    return tune(trained.build(recipe), trained.exact, trained.test, goal.min_recall)


def _judge(trial: _Trial, trained: Trained, goal: Goal, judge: RecallTest) -> None:
    """Give the verdict on an index over all rows, which is made stronger if need be, as long as it is in time."""
    if trial.tuned.ms is None:
        trial.verdict = "recall out of reach over all rows"
        return
    for _ in range(_STEPS_UP):
        if not goal.in_time(trial.tuned.ms):
            trial.verdict = _TOO_SLOW
            return
        if judge.recall(live(trained.exact, trial.tuned.index)) >= goal.min_recall:
            trial.verdict = _TAKEN
            return
        if not trial.tuned.index.recipe.lists:
            break
        trial.tuned = stronger(trial.tuned, trained.exact, trained.test)
    trial.verdict = "refused by the judges"


def _on_sample(trained: Trained) -> Trained:
    """The same over so few rows that a trial is quick; itself where there are not more."""
    exact = trained.exact
    rows = TRIAL_FLOATS // (exact.dim or 1)
    if rows >= len(exact):
        return trained
    row_ids = np.concatenate([ids for ids, _ in exact.blocks])
    drawn = np.random.default_rng(0).choice(row_ids, rows, replace=False)
    asked = np.random.default_rng(1).choice(drawn, trained.test.queries.shape[0], replace=False)
    some = np.sort(drawn)
    sample = ExactIndex([(some, exact.vectors(some))], exact.metric)
    return replace(trained, exact=sample, test=RecallTest.prepare(sample, np.sort(asked)))


def _entry(trial: _Trial, exact: ExactIndex) -> Tried:
    tuned, recipe = trial.tuned, trial.tuned.index.recipe
    return Tried(
        recipe.factory,
        trial.rows,
        recipe.probes,
        recipe.fetch,
        tuned.recall,
        tuned.at_least,
        tuned.ms,
        ram_bytes(recipe, len(exact), exact.dim or 0),
        trial.verdict,
    )


def _untried(recipe: Recipe, n: int, dim: int) -> Tried:
    size = ram_bytes(recipe, n, dim)
    return Tried(recipe.factory, n, 0, recipe.fetch, None, None, None, size, "more memory than allowed")


def _below_target(tried: Sequence[Tried], goal: Goal, flat_bytes: int) -> RecallBelowTarget:
    """What was reached, and what would reach the target: a flat index is exact, if it may take memory and time."""
    asked = f"the target is {goal.min_recall:g}"
    slow = [one for one in tried if one.verdict == _TOO_SLOW and one.ms is not None]
    if slow:
        quickest = min(one.ms or 0.0 for one in slow)
        return RecallBelowTarget(
            f"{asked}, which takes {quickest:.2f} ms a query here, more than {goal.max_latency_ms:g} ms",
            next_step=f"allow a max_latency of {_above(quickest)} ms, or ask for a lower min_recall",
        )
    best = max((one.recall for one in tried if one.recall is not None), default=0.0)
    found = f"recall@10 is {best:.4f}" if best else "no index fits"
    lower = f", or ask for a min_recall of {int(best * 1e4) / 1e4} or less" if best else ""
    if goal.max_ram_bytes is None:
        return RecallBelowTarget(f"{found}, {asked}", next_step=f"search with exact=True{lower}")
    return RecallBelowTarget(
        f"{found} within {goal.max_ram_bytes / 2**20:.1f} MiB, {asked}",
        next_step=f"raise max_ram to {_above(flat_bytes / 2**20)} MiB, which holds an exact index{lower}",
    )


def _above(number: float) -> float:
    """Rounded up to two digits behind the point, so that what is named is enough."""
    return float(np.ceil(number * 100) / 100)
