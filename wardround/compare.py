"""Two runs side by side, as a paper would put them: what differed in their plans, how good, at what cost, and what the
comparison is not. Pure: both sides are plain facts, out of the aggregator's store or out of MLflow, and give the same result
from either."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wardround.measures import headline, title

SHARE = 0.95  # of the lesser final headline measure (Dice, AUC): how soon each run came that far
LOWER = {"hd95_mm": " (lower is better)"}
ONE_RUN_EACH = (
    "one run each, and one draw of patients: a difference of the order of what another seed gives says nothing, and no test of "
    "significance is possible from two runs"
)


@dataclass(frozen=True)
class Side:
    """One run. `curve` and `own` hold validation means: of the cohort by step, of a hospital's final model."""

    run: str
    phase: str
    params: Mapping[str, str]  # the plan, flattened
    hospitals: Mapping[str, str]  # silo -> digest of its declared facts
    curve: Mapping[str, Mapping[int, float]]  # measure -> model's round -> value
    own: Mapping[str, Mapping[str, float]]  # silo -> measure -> value, of the final model
    rounds: int  # completed ones that trained
    epsilon: float | None  # spent; None: none is bounded
    upload_bytes: int  # of all silos together
    download_bytes: int
    seconds: float  # sum over the rounds, by the aggregator's clock
    degraded: str = ""


def compare(a: Side, b: Side) -> dict[str, Any]:
    """What `run compare --json` prints. Differences are b minus a; `headline` is what the task of a is judged by."""
    name = headline(a.params.get("task", "segmentation"))
    return {
        "runs": [a.run, b.run],
        "phase": [a.phase, b.phase],
        "plan": {key: [a.params.get(key), b.params.get(key)] for key in sorted({*a.params, *b.params}) if _differs(a, b, key)},
        "final": {name: _pair(_final(a, name), _final(b, name)) for name in sorted({*a.curve, *b.curve})},
        "hospitals": {silo: _pair(*(side.own.get(silo, {}).get(name) for side in (a, b))) for silo in sorted({*a.own, *b.own})},
        "gains": {silo: _pair(*(side.own.get(silo, {}).get(f"gain/{name}") for side in (a, b))) for silo in _gained(a, b, name)},
        "headline": name,
        "rounds_to_95_percent": _soon(a, b, name),
        "rounds": _pair(a.rounds, b.rounds),
        "epsilon": _pair(a.epsilon, b.epsilon),
        "upload_bytes": _pair(a.upload_bytes, b.upload_bytes),
        "download_bytes": _pair(a.download_bytes, b.download_bytes),
        "seconds": _pair(round(a.seconds, 1), round(b.seconds, 1)),
        "caveats": list(_caveats(a, b)),
    }


def _differs(a: Side, b: Side, key: str) -> bool:
    return a.params.get(key) != b.params.get(key)


def _pair(a: float | None, b: float | None) -> dict[str, float | None]:
    difference = None if a is None or b is None else round(b - a, 4)
    return {"a": a, "b": b, "difference": difference}


def _final(side: Side, measure: str) -> float | None:
    points = side.curve.get(measure, {})
    return points[max(points)] if points else None


def _gained(a: Side, b: Side, name: str) -> list[str]:
    """Silos where a run also trained a model alone and published how far the global one is ahead of it."""
    return sorted({silo for side in (a, b) for silo, own in side.own.items() if f"gain/{name}" in own})


def _soon(a: Side, b: Side, name: str) -> dict[str, Any]:
    """The first measured round at which each run had SHARE of the lesser final headline measure."""
    finals = [_final(side, name) for side in (a, b)]
    if finals[0] is None or finals[1] is None:
        return {name: None, "a": None, "b": None}
    target = SHARE * min(finals[0], finals[1])

    def first(side: Side) -> int | None:
        return min((step for step, value in side.curve[name].items() if value >= target), default=None)

    return {name: round(target, 4), "a": first(a), "b": first(b)}


def _caveats(a: Side, b: Side) -> Sequence[str]:
    said = [ONE_RUN_EACH, "validation patients of the hospitals themselves, means to 3 decimals; no outside test"]
    none_yet = [side.run for side in (a, b) if not side.hospitals]
    said += [f"no hospital has joined {run}: there is nothing to compare yet" for run in none_yet]
    if not none_yet and a.hospitals.keys() != b.hospitals.keys():
        ours, theirs = (", ".join(sorted(side.hospitals)) for side in (a, b))
        said.append(f"other hospitals, {ours} against {theirs}: measured on other patients")
    elif not none_yet and a.hospitals != b.hospitals:
        said.append("a hospital declared other facts about its data: the patients may not be the same")
    for key in ("dataset", "classes", "task"):
        if _differs(a, b, key):
            said.append(f"the plans differ in {key}: the measures do not measure the same")
    said += [f"{side.run} lost hospitals: {side.degraded}" for side in (a, b) if side.degraded]
    said += [f"{side.run} {_standing(side.phase)}: it is no finished run" for side in (a, b) if side.phase != "completed"]
    return said


def _standing(phase: str) -> str:
    return f"has {phase}" if phase in ("failed", "aborted") else f"is {phase}"


def as_text(found: Mapping[str, Any]) -> str:
    """Markdown, to be pasted: the same facts."""
    (a, b), name = found["runs"], found["headline"]
    lines = [f"# {b} against {a}", ""]
    rows = [(f"validation {one}{LOWER.get(one, '')}", pair) for one, pair in found["final"].items()]
    rows += [(f"{name} at {silo}", pair) for silo, pair in found["hospitals"].items()]
    rows += [(f"gain at {silo} over its own model alone", pair) for silo, pair in found["gains"].items()]
    rows += [(one.replace("_", " "), found[one]) for one in ("rounds", "epsilon", "upload_bytes", "download_bytes", "seconds")]
    lines += [f"| measure | {a} | {b} | difference |", "|---|---|---|---|"]
    lines += [f"| {one} | {_cell(pair['a'])} | {_cell(pair['b'])} | {_signed(pair['difference'])} |" for one, pair in rows]
    soon = found["rounds_to_95_percent"]
    if soon[name] is not None:
        reached = f"round of the first measured model with {name} {_cell(soon[name])}, {SHARE:.0%} of the lesser final one"
        lines.append(f"| {reached} | {_cell(soon['a'])} | {_cell(soon['b'])} | |")
    own = [pair["difference"] for pair in found["hospitals"].values() if pair["difference"] is not None]
    if own:
        up, down = (sum(sign * d > 0 for d in own) for sign in (1, -1))
        lines += ["", f"{up} of {len(own)} hospitals have a higher {title(name)} in {b}, {down} a lower one."]
    lines += ["", "| plan | " + f"{a} | {b} |", "|---|---|---|"]
    plan = [f"| {key} | {_cell(pair[0])} | {_cell(pair[1])} |" for key, pair in found["plan"].items()]
    lines += plan or ["| the same plan | | |"]
    lines += ["", *(f"- {caveat}" for caveat in found["caveats"])]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:,.4f}".rstrip("0").rstrip(".")
    return f"{value:,}" if isinstance(value, int) else str(value)


def _signed(value: float | None) -> str:
    return "" if value is None else f"{'+' if value > 0 else ''}{_cell(value)}"
