"""The privacy report of a run, for a data-protection officer: what left the hospitals, who could read it, what it cost, what is not
covered. Markdown and HTML say the same. A pure function of the run's view: everything in it is in the store and in its audit chain.
"""

import html
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from aggregator.run_view import RunView
from wardround.accounting import pld_epsilon, round_event
from wardround.bundle import privacy_sentence
from wardround.canonical import digest_name
from wardround.layout import layout_of

NOT_COVERED = (
    "The declared numbers of patients, the validation means, wall clock, sizes, retries and who dropped out: none is "
    "noised, and all "
    "are told as the tables above say.",
    "A patient treated in two of these hospitals pays in both ledgers, and no number here adds the two.",
    "Other runs: a hospital's ledger adds up every run of that hospital (`silo-agent ledger show` there), this report one "
    "run alone.",
    "Two runs or cohorts that differ by one hospital show their difference, which is that hospital's part; only "
    "differential privacy "
    "bounds what it tells about a patient.",
    "What a hospital, its machines and whoever holds its keys see inside it. Images that carry an identity in their pixels.",
    "A formal proof about floating-point noise: none is claimed.",
)


@dataclass(frozen=True)
class Table:
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


Block = str | Table | tuple[str, ...]  # a paragraph, a table, a list
Report = tuple[tuple[str, tuple[Block, ...]], ...]  # (title, blocks); the first is the report's own


def report_of(view: RunView) -> Report:
    return (
        (f"Privacy report of {view.run_id}", tuple(_head(view))),
        ("What left the hospitals, and who could read it", (_left(view),)),
        ("Who took part, and what it cost", tuple(_cost(view))),
        *([("Models it starts from", tuple(_inherited(view)))] if view.ancestors else []),
        ("Key epochs", (_epochs(view),)),
        ("What is not covered", (NOT_COVERED,)),
        ("Caveats that everyone is told", (tuple(dict.fromkeys((*view.plan.caveats, *view.notes))) or "None.",)),
    )


def _head(view: RunView) -> Iterator[Block]:
    plan = view.plan
    yield (
        f"Federation {view.federation}; {plan.task} of {', '.join(plan.bound_classes)} on dataset {plan.dataset}; "
        f"{view.phase.value}" + (f": {view.reason}" if view.reason else "") + "."
    )
    yield privacy_sentence(plan)
    rows = [("submitted", _when(view.created_ms)), ("ended", _when(view.ended_ms)), ("submitted by", view.submitted_by)]
    rows += [("rounds completed", f"{sum(r.round <= view.last_round for r in view.rounds)} of {plan.rounds}")]
    rows += [("plan", digest_name(plan.digest)), ("roster", digest_name(view.roster_digest))]
    rows += [("newest audit record", digest_name(view.audit_head))]
    rows += [("software", f"aggregator {view.version}, protocol {view.protocol}")]
    yield Table(("fact", "value"), tuple(rows))


def _left(view: RunView) -> Table:
    plan, up = view.plan, sum(r.upload_bytes for r in view.rounds)
    trained = [r for r in view.rounds if r.round <= view.last_round]
    uploads, measured = sum(r.cohort_size for r in view.rounds), [r for r in view.rounds if r.means]
    own = sorted({silo for r in view.rounds for silo in r.own})
    noised = "each with the noise above" if plan.privacy else "without noise"
    masked = "one hospital together with the aggregator" if plan.aggregation.masking == "none" else "nobody but its sum"
    parameters = 4 * layout_of(plan).num_parameters
    model = view.model
    final = ("the final model", "the silos alone", f"0; {parameters:,} bytes stay at the silos")
    if plan.rounds == 0:
        final = ("the model that was measured", "as its own run released it", "0")
    if model is not None and model.released:
        final = ("the final model", f"whoever may read MLflow; signed by {', '.join(model.signed_by)}", f"{parameters:,}")
    rows = [
        (f"encrypted updates of {len(trained)} rounds, {noised}, and the closing sum", masked, f"{up:,} in {uploads} uploads"),
        ("the sums of these updates", "every hospital of the key epoch", f"{sum(r.download_bytes for r in view.rounds):,} fetched"),
        ("declared patients, once a run", "everyone in the federation and whoever may read MLflow", "a number a hospital"),
        (
            f"validation means over the hospitals, 3 decimals, of {len(measured)} models; a hospital with fewer than 10 validation "
            "patients adds nothing",
            "everyone in the federation and whoever may read MLflow",
            ", ".join(sorted({name for r in measured for name in r.means})) or "none",
        ),
        (
            "a hospital's own validation means, where its policy says so",
            "the aggregator and whoever may read MLflow",
            ", ".join(own) or "none",
        ),
        ("joins, seals and reports, signed; when, how long, how often", "the aggregator", "in its audit chain"),
        final,
    ]
    return Table(("what", "readable by", "bytes or names"), tuple(rows))


def _cost(view: RunView) -> Iterator[Block]:
    plan, event = view.plan, round_event(view.plan)
    lost = [silo for r in view.rounds for silo in r.missing]
    rows = []
    for data in view.datasets:
        summed = sum(r.round <= view.last_round for r in view.rounds) - sum(
            data.silo in r.missing for r in view.rounds if r.round <= view.last_round
        )
        spent, left = ("unbounded", "unbounded") if plan.rounds else ("0", "0")
        if event is not None and plan.privacy is not None:
            epsilon = pld_epsilon(Counter({event: summed}), plan.privacy.delta) if summed else 0.0
            spent, left = f"{epsilon:.3f}", f"{max(0.0, plan.privacy.epsilon - epsilon):.3f}"
        rows.append((data.silo, str(data.declared_patients), str(summed), str(lost.count(data.silo)), spent, left))
    columns = ("hospital", "declared patients", "rounds in sums", "rounds missed", "epsilon of these", "left of the plan's")
    yield Table(columns, tuple(rows))
    if event is not None:
        yield (
            "Epsilon as PLD reports it, of the rounds whose sums hold the hospital's update, for each of its patients. A "
            "round that it "
            "trained and whose update came too late costs its patients as much and is in its own ledger alone."
        )


def _inherited(view: RunView) -> Iterator[Block]:
    yield (
        "Nothing above counts what these cost. A hospital that took part in one and in this run has both in its ledger, which adds "
        "them up for the same patients; to one that did not, this run brings a model that tells of others' patients."
    )
    rows = []
    for run, plan in view.ancestors:
        bound = (f"{plan.privacy.epsilon:g}", f"{plan.privacy.delta:g}") if plan.privacy else ("unbounded", "")
        rows.append((run, *bound, digest_name(plan.digest)))
    yield Table(("run", "epsilon, at most", "delta", "plan"), tuple(rows))


def _epochs(view: RunView) -> Table:
    epochs: dict[int, list[int]] = {}
    for r in view.rounds:
        epochs.setdefault(r.key_epoch, []).append(r.round)
    rows = tuple((str(number), f"{min(of)} to {max(of)}", str(len(of))) for number, of in sorted(epochs.items()))
    return Table(("key epoch", "rounds", "sums that its keys open"), rows)


def _when(time_ms: int | None) -> str:
    return "not yet" if time_ms is None else datetime.fromtimestamp(time_ms / 1000, UTC).isoformat(timespec="seconds")


# --- as text ---------------------------------------------------------------------------------------------------------------------


def as_markdown(report: Report) -> str:
    lines = []
    for number, (title, blocks) in enumerate(report):
        lines.append(f"{'##' if number else '#'} {title}")
        lines += [_markdown(block) for block in blocks]
    return "\n\n".join(lines) + "\n"


def _markdown(block: Block) -> str:
    if isinstance(block, Table):
        rows: list[Sequence[str]] = [block.columns, ["---"] * len(block.columns), *block.rows]
        return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows)
    if isinstance(block, tuple):
        return "\n".join(f"- {item}" for item in block)
    return block


def as_html(report: Report) -> str:
    """One file without a script, a style sheet or anything else from elsewhere."""
    title = html.escape(report[0][0])
    body = []
    for number, (heading, blocks) in enumerate(report):
        body.append(f"<h{2 if number else 1}>{html.escape(heading)}</h{2 if number else 1}>")
        body += [_html(block) for block in blocks]
    style = "body{font-family:sans-serif;max-width:60em;margin:2em auto}td,th{border:1px solid #999;padding:.3em}"
    head = f'<meta charset="utf-8"><title>{title}</title><style>{style}table{{border-collapse:collapse}}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(body) + "\n</body></html>\n"


def _html(block: Block) -> str:
    if isinstance(block, Table):
        header = "".join(f"<th>{html.escape(cell)}</th>" for cell in block.columns)
        rows = "\n".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in block.rows)
        return f"<table>\n<tr>{header}</tr>\n{rows}\n</table>"
    if isinstance(block, tuple):
        return "<ul>\n" + "\n".join(f"<li>{html.escape(item)}</li>" for item in block) + "\n</ul>"
    return f"<p>{html.escape(block)}</p>"
