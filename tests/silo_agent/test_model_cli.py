"""`silo-agent model export`: this hospital's copy as a bundle. The trainer is a script here; tests/federation/test_release.py
has a real one."""

import json
from pathlib import Path

import numpy as np
import pytest

from silo_agent import model_cli
from silo_agent.custody.spool import Spool
from silo_agent.secure_sum.global_model import GlobalModel
from silo_agent.work import TrainerResult, TrainerWork
from tests.silo_agent.test_cli import refused
from tests.support.hospital import Hospital, Typed
from tests.support.plans import tiny
from wardround.canonical import digest_name
from wardround.layout import layout_of
from wardround.release import parameters_digest, safetensors_header

PLAN = tiny()
MODEL = GlobalModel.initial(np.linspace(-1, 1, layout_of(PLAN).num_parameters).astype("<f4").tobytes(), layout_of(PLAN))


@pytest.fixture(autouse=True)
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[TrainerWork]:
    asked: list[TrainerWork] = []

    def errand(work: TrainerWork, doing: str) -> TrainerResult:
        asked.append(work)
        return TrainerResult(values=b"model.pt", versions={"monai": "1.6.1", "numpy": "2.4.6", "torch": "2.13.0"})

    monkeypatch.setattr(model_cli, "run_errand", errand)
    return asked


def hold(hospital: Hospital, run: str, round_: int, **more: str) -> None:
    """This hospital holds the model of a round of that run."""
    hospital.state.judged(run, PLAN.canonical(), PLAN.digest, None, "")
    row = {"mac": bytes(32), "state": Spool(hospital.settings.data / "spool").put(MODEL.dump()), "exponents": "[]", **more}
    hospital.state.model_made(run, round_, row, [])


def test_the_final_model_is_written_with_what_this_silo_knows(
    hospital: Hospital, typed: Typed, tmp_path: Path, scripted: list[TrainerWork]
) -> None:
    hold(hospital, "tiny-1", PLAN.rounds + 1, means=json.dumps({"dice": 0.812}), declared=json.dumps({"leuven": 20, "charite": 30}))
    status, out, _ = typed("model", "export", tmp_path / "bundle", "--json")
    told = json.loads(out)
    assert status == 0 and (told["run"], told["round"], told["rounds"]) == ("tiny-1", 2, 2)
    assert told["parameters_digest"] == digest_name(parameters_digest(layout_of(PLAN), MODEL.parameters))
    assert [work.kind for work in scripted] == ["export"] and scripted[0].parameters == MODEL.parameters
    bundle = tmp_path / "bundle"
    assert (bundle / "models" / "model.safetensors").read_bytes() == safetensors_header(layout_of(PLAN)) + MODEL.parameters
    card = (bundle / "docs" / "model_card.md").read_text()
    assert "| charite | 30 |" in card and "| dice | 0.812 |" in card and "exported by one of them" in card
    assert sorted(told["files"]) == sorted(str(p.relative_to(bundle)) for p in bundle.rglob("*") if p.is_file())


def test_status_counts_rounds_as_the_export_does(hospital: Hospital, typed: Typed) -> None:
    """The closing round trains nothing; JSON has the round as it is stored."""
    hold(hospital, "tiny-1", PLAN.rounds + 1)
    assert "tiny-1: accepted, model of round 2 of 2, key epoch 0" in typed("status")[1]
    assert json.loads(typed("status", "--json")[1])["runs"][0]["model_round"] == PLAN.rounds + 1


def test_a_model_in_the_middle_of_a_run_says_so_and_claims_no_measure(hospital: Hospital, typed: Typed, tmp_path: Path) -> None:
    hold(hospital, "tiny-1", 1, means=json.dumps({"dice": 0.9}))
    assert typed("model", "export", tmp_path / "bundle")[0] == 0
    card = (tmp_path / "bundle" / "docs" / "model_card.md").read_text()
    assert "taken after round 1 of 2: no final model" in card and "0.9" not in card


def test_the_newest_run_or_the_one_that_is_named(hospital: Hospital, typed: Typed, tmp_path: Path) -> None:
    for run in ("tiny-1", "tiny-2"):
        hold(hospital, run, PLAN.rounds + 1)
    assert json.loads(typed("model", "export", tmp_path / "a", "--json")[1])["run"] == "tiny-2"
    assert json.loads(typed("model", "export", tmp_path / "b", "--run", "tiny-1", "--json")[1])["run"] == "tiny-1"


def test_what_cannot_be_exported(hospital: Hospital, typed: Typed, tmp_path: Path) -> None:
    assert "this hospital holds no model: see `silo-agent status`" in refused(typed("model", "export", tmp_path / "bundle"))
    hold(hospital, "tiny-1", PLAN.rounds + 1)
    assert "no model of tiny-9" in refused(typed("model", "export", tmp_path / "bundle", "--run", "tiny-9"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter").touch()
    assert "holds something already" in refused(typed("model", "export", tmp_path / "full"))
    (tmp_path / "file").touch()
    assert "cannot be written" in refused(typed("model", "export", tmp_path / "file" / "bundle"))
    assert not (tmp_path / "bundle").exists()
