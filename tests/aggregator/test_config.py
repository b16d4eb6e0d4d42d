from pathlib import Path

import pytest

from aggregator.config import load_settings
from tests.support.identities import OPERATOR_PUBLIC
from wardround.errors import SettingsError
from wardround.roster import write_public_key

CONFIGS = Path(__file__).parents[2] / "configs"
LEAST = "federation: neuro\ndata: data\noperator_key: operator.pub\nhost: fed.example.org\n"


def test_the_example_loads() -> None:
    settings = load_settings(CONFIGS / "aggregator.yaml")
    assert (settings.federation, settings.host, settings.certificate_names) == ("neuro", "fed.example.org", ["fed.example.org"])


def test_paths_are_relative_to_the_file_and_the_environment_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.yaml").write_text(LEAST)
    (tmp_path / "operator.pub").write_text(write_public_key(OPERATOR_PUBLIC))
    monkeypatch.setenv("WARDROUND_AGGREGATOR_LISTEN_PORT", "9999")
    settings = load_settings(tmp_path / "a.yaml")
    assert (settings.data, settings.listen_port) == (tmp_path / "data", 9999)
    assert settings.operator_public_key() == OPERATOR_PUBLIC


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("- a", "a mapping of keys"),
        ("a: [", "not YAML"),
        (LEAST + "hots: x\n", "hots: unknown key"),
        (LEAST.replace("federation: neuro\n", ""), "federation: missing"),
        (LEAST.replace("fed.example.org", "https://fed.example.org"), "host is a DNS name or an address alone"),
        (LEAST + "port: 70000\n", "port: "),
    ],
)
def test_what_does_not_hold_is_named(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(SettingsError, match=match):
        load_settings(tmp_path / "a.yaml")


def test_a_missing_file_and_a_missing_key(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot read the settings"):
        load_settings(tmp_path / "none.yaml")
    (tmp_path / "a.yaml").write_text(LEAST)
    with pytest.raises(SettingsError, match="cannot read operator_key"):
        load_settings(tmp_path / "a.yaml").operator_public_key()
