"""The file of settings that a program is started with, before the program's own model has looked at its values."""

from collections.abc import Set
from pathlib import Path
from typing import Any

import yaml

from wardround.errors import SettingsError


def read_settings(path: Path, foreign: Set[str], told: str) -> dict[str, Any]:
    """A mapping of keys to values. Raises SettingsError; `told` when one of `foreign` shows that it is the other program's file."""
    try:
        value = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise SettingsError(
            f"cannot read the settings {path}: {error.strerror}; name them before the command, with --config FILE"
        ) from None
    except yaml.YAMLError:
        raise SettingsError("the settings are not YAML") from None
    if not isinstance(value, dict):
        raise SettingsError("the settings are a mapping of keys to values")
    if value.keys() & foreign:
        raise SettingsError(f"{path} {told} before the command, with --config FILE")
    return value
