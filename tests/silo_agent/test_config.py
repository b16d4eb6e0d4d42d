"""The hospital's settings: what is refused, and how it is said."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from silo_agent.config import load_settings
from tests.support.photographs import pairs
from tests.support.plans import tiny
from wardround.errors import DataError, SettingsError

BINDING = {"source": "dicom", "labels": {"segments": {"grey": "SCT:1", "white": "White"}}, "declared_patients": 120}


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def written(**changed: Any) -> Path:
        (tmp_path / "silo-agent.yaml").write_text(yaml.safe_dump({"data": "data", "datasets": {"brain-t1": BINDING}} | changed))
        return tmp_path / "silo-agent.yaml"

    return written


def test_paths_are_relative_to_the_file(write: Any, tmp_path: Path) -> None:
    settings = load_settings(write(policy="policy.yaml"))
    assert (settings.data, settings.policy) == (tmp_path / "data", tmp_path / "policy.yaml")
    assert settings.dataset("brain-t1").source == tmp_path / "dicom"
    assert settings.roster_approval == "manual" and settings.network.proxy is None


def test_the_login_file_is_relative_to_the_file_too(write: Any, tmp_path: Path) -> None:
    network = {"proxy": {"url": "http://proxy.example.org:3128", "login_file": "login"}}
    proxy = load_settings(write(network=network)).network.proxy
    assert proxy is not None and proxy.login_file == tmp_path / "login"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"colour": "blue"}, "^colour: unknown key$"),
        ({"roster_approval": "never"}, "roster_approval: .*'manual' or 'signed', got 'never'"),
        ({"datasets": {"brain-t1": BINDING | {"classes": []}}}, "^datasets.brain-t1.classes: unknown key$"),
        ({"datasets": {"Brain T1": BINDING}}, "datasets.Brain T1"),
        ({"datasets": {"brain-t1": {"source": "dicom"}}}, "datasets.brain-t1.labels: missing\ndatasets.brain-t1.declared_patients"),
        ({"datasets": {"brain-t1": BINDING | {"declared_patients": 0}}}, "greater than or equal to 1, got 0"),
        ({"datasets": {"brain-t1": BINDING | {"note": "two\nlines"}}}, "note is one line of at most 500 characters"),
        ({"network": {"proxy": {"url": "https://proxy.example.org"}}}, "^network.proxy.url is http://host:port alone"),
        ({"network": {"proxy": {"url": "http://user:secret@proxy.example.org"}}}, "network.proxy.url"),
        ({"network": {"proxy": {"url": "http://proxy.example.org", "password": "secret"}}}, "network.proxy.password: unknown key"),
    ],
)
def test_every_wrong_key_is_named(write: Any, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        load_settings(write(**changed))


TABLE = {"csv": "labels.csv", "column": "pair", "values": {"different": "nonSimilar", "similar": "Similar"}}


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ({}, "csv, column, values missing"),
        ({"csv": "labels.csv", "column": "pair"}, "values missing"),
        (TABLE | {"segments": {"grey": "G"}}, "labels.segments and labels.csv exclude each other"),
        (TABLE | {"csv": "../labels.csv"}, r"inside the dataset's source: no / in front and no \.\. in it"),
        (TABLE | {"csv": "/labels.csv"}, "inside the dataset's source"),
        (TABLE | {"column": "StudyInstanceUID"}, "which names the study"),
        (TABLE | {"values": {"different": "x", "similar": " x"}}, "gives two classes one word"),
    ],
)
def test_labels_come_from_one_place_inside_the_source(write: Any, labels: dict[str, Any], said: str) -> None:
    load_settings(write(datasets={"pairs": BINDING | {"labels": TABLE}}))
    with pytest.raises(SettingsError, match=said):
        load_settings(write(datasets={"pairs": BINDING | {"labels": labels}}))


def test_a_class_without_a_word_is_named(write: Any) -> None:
    binding = load_settings(write(datasets={"pairs": BINDING | {"labels": TABLE}})).dataset("pairs")
    binding.check_labels(pairs())
    with pytest.raises(DataError, match=r"binds no word for other \(bound: different, similar\): add it under labels.values"):
        binding.check_labels(pairs(classes=["similar", "other"]))
    with pytest.raises(DataError, match=r"binds no segment for grey, white \(bound: none\)"):
        binding.check_labels(tiny())


@pytest.mark.parametrize(("number", "fine"), [(1, True), (99, True), (120, True), (4200, True), (121, False), (1001, False)])
def test_declared_patients_has_two_significant_digits(write: Any, number: int, fine: bool) -> None:
    path = write(datasets={"brain-t1": BINDING | {"declared_patients": number}})
    if fine:
        assert load_settings(path).dataset("brain-t1").declared_patients == number
    else:
        with pytest.raises(SettingsError, match=f"two significant digits, so that it says nothing exact: {number} has more"):
            load_settings(path)


def test_a_login_in_the_proxys_address_is_not_repeated(write: Any) -> None:
    """It belongs in login_file; whoever wrote it into the settings does not find it in a log."""
    with pytest.raises(SettingsError) as caught:
        load_settings(write(network={"proxy": {"url": "http://user:secret@proxy.example.org"}}))
    assert "secret" not in str(caught.value)


def test_files_that_are_no_settings(tmp_path: Path) -> None:
    path = tmp_path / "silo-agent.yaml"
    with pytest.raises(SettingsError, match=r"^cannot read the settings .*yaml: No such file or directory; name them before"):
        load_settings(path)
    path.write_text("data: [unclosed")
    with pytest.raises(SettingsError, match="not YAML"):
        load_settings(path)
    path.write_bytes(b"data: \xff\xfe")
    with pytest.raises(SettingsError, match="not YAML"):
        load_settings(path)
    path.write_text("just words")
    with pytest.raises(SettingsError):
        load_settings(path)


def test_a_dataset_or_class_that_is_not_bound_names_what_is(write: Any) -> None:
    settings = load_settings(write())
    with pytest.raises(DataError, match=r"binds no dataset 'liver-ct' \(bound here: brain-t1\)"):
        settings.dataset("liver-ct")
    binding = settings.dataset("brain-t1")
    binding.check_labels(tiny())
    with pytest.raises(DataError, match=r"binds no segment for lesion, csf \(bound: grey, white\)"):
        binding.check_labels(tiny(classes=("background", "lesion", "white", "csf")))
