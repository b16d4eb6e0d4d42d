"""What training costs a patient: noise, reported epsilon and the enforced filter, by dp-accounting. Every side computes the same.

Adjacency: one patient added or removed. One step is the Poisson-subsampled Gaussian: each patient is drawn with `sample_rate`,
the sum of clipped gradients gets Gaussian noise of `noise_multiplier` times the clip.

- Reported: the privacy loss distribution (PLD) over all events; pessimistic, never below the true epsilon. It says what a fixed
  list of events costs, and is no bound when later events are chosen after seeing earlier results.
- Enforced: a filter in Renyi differential privacy (RDP) at one order fixed beforehand. As long as the RDP of the events stays
  within `rdp_budget`, all of them together are (epsilon_cap, delta)-DP, however adaptively they were chosen
  (Feldman & Zrnic 2021, arXiv 2008.11193: fully adaptive composition at a fixed order; the conversion is Proposition 12 of
  Canonne, Kamath & Steinke, arXiv 2004.00010).

dp-accounting is imported where it is first needed: it brings scipy, which takes seconds.
"""

import math
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from wardround.errors import DataError, PlanError, SettingsError
from wardround.plan import Plan

NOISE_GRID = 1000  # a noise multiplier is a whole number of thousandths, rounded up: the same on every machine
MIN_NOISE_MULTIPLIER = 0.3  # a plan that asks for less gets this; below it epsilon is meaningless and slow to compute
MAX_NOISE_MULTIPLIER = 100.0  # above it nothing is learned
MAX_EPSILON_CAP = 100.0  # of a ledger
PLD_INTERVAL, PLD_FINE_INTERVAL = 1e-3, 1e-4  # discretisation of the privacy loss; dp-accounting's default is the fine one
PLD_COARSE_LOSS = 0.005  # root mean square loss of a step above which the coarse one costs at most 0.5 % of epsilon


@dataclass(frozen=True, order=True)
class Event:
    """What is charged to every patient at once: the steps of one round."""

    sample_rate: float  # 0 < q <= 1
    noise_multiplier: float  # standard deviation of the noise over the clip, >= MIN_NOISE_MULTIPLIER
    steps: int  # >= 1

    def __post_init__(self) -> None:
        if not (0 < self.sample_rate <= 1 and MIN_NOISE_MULTIPLIER <= self.noise_multiplier < math.inf and self.steps >= 1):
            raise SettingsError(
                f"an event has a sample rate in (0, 1], a noise multiplier of {MIN_NOISE_MULTIPLIER} or more and at least 1 step: "
                f"got {self.sample_rate}, {self.noise_multiplier}, {self.steps}"
            )


# --- plans -----------------------------------------------------------------------------------------------------------------------


def round_event(plan: Plan) -> Event | None:
    """What one round of a plan costs; None for a plan without privacy, or that trains nothing. Raises PlanError when its numbers
    cannot fit together."""
    privacy, steps = plan.privacy, plan.training.steps
    if privacy is None or plan.rounds == 0:
        return None
    return Event(
        privacy.sample_rate,
        noise_multiplier(privacy.epsilon, privacy.delta, privacy.sample_rate, plan.rounds * steps),
        steps,
    )


def epsilon_after(plan: Plan, round_: int, last_round: int | None = None) -> float | None:
    """What a run has cost each patient once `round_` is over, at the plan's delta: reported, see above. The closing round costs
    nothing; it follows `last_round`, the plan's if None. None without privacy: there is no bound; 0 where nothing trains,
    or only on drawn tensors."""
    if plan.rounds == 0:
        return 0.0
    event = round_event(plan)
    if event is None or plan.privacy is None:
        return None
    rounds = 0 if plan.rehearse else min(round_, plan.rounds if last_round is None else last_round)
    return _epsilon_of(event, rounds, plan.privacy.delta) if rounds > 0 else 0.0


@lru_cache(maxsize=256)  # who shows a run asks every few seconds
def _epsilon_of(event: Event, rounds: int, delta: float) -> float:
    return pld_epsilon(Counter({event: rounds}), delta)


def batch_constant(sample_rate: float, declared_patients: int) -> float:
    """The expected batch, by which noised sums are divided: public, never from the data. Raises DataError below one patient."""
    if sample_rate * declared_patients < 1:
        raise DataError(
            f"privacy.sample_rate {sample_rate:g} of {declared_patients} declared patients is less than one patient a step: "
            f"it needs at least {math.ceil(1 / sample_rate)} patients, or a sample rate of {1 / declared_patients:.2g} or more"
        )
    return sample_rate * declared_patients


@lru_cache(maxsize=64)
def noise_multiplier(epsilon: float, delta: float, sample_rate: float, total_steps: int) -> float:
    """The least noise multiplier on the grid with which `total_steps` steps are (epsilon, delta)-DP by PLD.

    It is what a plan means and no part of its digest: each side computes it. A side on which a tie falls the other way (floating
    point, about 1 plan in 10^9) has other bounds, so its Join differs and the run does not start. Raises PlanError.
    """

    def enough(thousandths: int) -> bool:
        return pld_epsilon([Event(sample_rate, thousandths / NOISE_GRID, total_steps)], delta) <= epsilon

    low, high = round(MIN_NOISE_MULTIPLIER * NOISE_GRID), round(MAX_NOISE_MULTIPLIER * NOISE_GRID)
    if not enough(high):
        raise PlanError(_what_would_fit(epsilon, delta, sample_rate, total_steps))
    return (low + bisect_left(range(low, high), True, key=enough)) / NOISE_GRID


def _what_would_fit(epsilon: float, delta: float, sample_rate: float, total_steps: int) -> str:
    def cost(steps: int) -> float:
        return pld_epsilon([Event(sample_rate, MAX_NOISE_MULTIPLIER, steps)], delta)

    steps = bisect_right(range(1, total_steps + 1), epsilon, key=cost)
    fewer = f", or at most {steps} steps in all" if steps else ""
    return (
        f"privacy: epsilon {epsilon:g} at delta {delta:g} cannot be kept over {total_steps} steps (rounds x training.steps) at "
        f"sample_rate {sample_rate:g}: it needs a noise multiplier above {MAX_NOISE_MULTIPLIER:g}. "
        f"What fits: epsilon {math.ceil(cost(total_steps) * 1000) / 1000:g} or more{fewer}, or a smaller sample_rate"
    )


# --- reported --------------------------------------------------------------------------------------------------------------------


def pld_epsilon(events: Iterable[Event], delta: float) -> float:
    """Epsilon of all events together at `delta`; 0 without events. Equal steps are composed at once, whatever their number."""
    steps = _steps(events)
    coarse = all(sample_rate * math.sqrt(math.expm1(noise**-2)) >= PLD_COARSE_LOSS for sample_rate, noise in steps)
    interval = PLD_INTERVAL if coarse else PLD_FINE_INTERVAL
    composed: Any = None
    for (sample_rate, noise), count in sorted(steps.items()):
        part = _one_step(sample_rate, noise, interval).self_compose(count)
        composed = part if composed is None else composed.compose(part)
    return 0.0 if composed is None else float(composed.get_epsilon_for_delta(delta))


@lru_cache(maxsize=32)  # a distribution takes up to 2 MB, 20 MB in the fine interval
def _one_step(sample_rate: float, noise: float, interval: float) -> Any:
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        noise, value_discretization_interval=interval, sampling_prob=sample_rate
    )


# --- enforced --------------------------------------------------------------------------------------------------------------------


def filter_order(epsilon_cap: float, delta: float) -> float:
    """The order for a new filter: the one that admits the most Gaussian noise, that is with the largest budget per order.

    It lies under 1 + sqrt(L / c), L = ln(1/delta), c = (sqrt(L + epsilon_cap) - sqrt(L))^2, which is the same maximum for the
    simpler conversion (Mironov 2017, Proposition 3). Two decimals; stored once, never computed again for a ledger.
    """
    from scipy.optimize import minimize_scalar

    log = math.log(1 / delta)
    c = (math.sqrt(log + epsilon_cap) - math.sqrt(log)) ** 2
    best = minimize_scalar(
        lambda order: -rdp_budget(epsilon_cap, delta, order) / order, bounds=(1.05, 2 + math.sqrt(log / c)), method="bounded"
    )
    return round(float(best.x), 2)


def rdp_budget(epsilon_cap: float, delta: float, order: float) -> float:
    """The RDP at `order` that gives exactly (epsilon_cap, delta)-DP. Negative: at this order no event fits such a cap."""
    return epsilon_cap - math.log1p(-1 / order) + math.log(delta * order) / (order - 1)


def rdp_cost(events: Iterable[Event], order: float) -> float:
    """RDP of all events together at `order`; infinite for events so noiseless that the order says nothing about them.

    Summed exactly over equal steps: the same events cost the same bits in any sequence.
    """
    return math.fsum(count * _rdp_of_a_step(*key, order) for key, count in _steps(events).items())


def cap_needed(events: Iterable[Event], delta: float) -> float | None:
    """The least epsilon_cap, in tenths, of a new ledger that admits all of the events; None: no ledger does."""
    steps = Counter(events)
    least = math.ceil(10 * pld_epsilon(steps, delta))  # no filter admits what costs more than its cap
    for tenths in range(max(least, 1), round(10 * MAX_EPSILON_CAP) + 1):
        order = filter_order(tenths / 10, delta)
        if rdp_cost(steps, order) <= rdp_budget(tenths / 10, delta, order):
            return tenths / 10
    return None


@lru_cache(maxsize=4096)
def _rdp_of_a_step(sample_rate: float, noise: float, order: float) -> float:
    from absl import logging
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    logging.set_verbosity(logging.ERROR)  # a series that does not converge costs infinity, which refuses: nothing to warn of
    event = PoissonSampledDpEvent(sample_rate, GaussianDpEvent(noise))
    return float(RdpAccountant([order]).compose(event).rdp[0])


def _steps(events: Iterable[Event]) -> dict[tuple[float, float], int]:
    """(sample rate, noise multiplier) -> steps in all. `events` may be a Counter: then each counts that often."""
    steps: dict[tuple[float, float], int] = defaultdict(int)
    for event, count in Counter(events).items():
        steps[event.sample_rate, event.noise_multiplier] += count * event.steps
    return {key: count for key, count in steps.items() if count}
