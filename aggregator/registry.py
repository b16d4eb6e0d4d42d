"""Final models in MLflow: the logged model, the registered version, and the alias that people download by.

Every step looks first, for half of MLflow's calls are not idempotent: killed between any two and repeated, nothing is there twice.
The alias moves forward only, and only from where this program put it: an alias that somebody moved by hand stays where it is.
"""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aggregator.run_view import ModelView, RunView
from wardround.canonical import digest_name
from wardround.release import ALIAS

if TYPE_CHECKING:
    from mlflow import MlflowClient

Files = Callable[[], Mapping[str, bytes]]  # path in the bundle -> content; asked only where MLflow lacks them
MODEL_TYPE = "monai-bundle"
MOVED = "wardround.released_version"  # tag of a registered model: where this program put the alias


def log_model(client: "MlflowClient", experiment: str, run: str, view: RunView, files: Files) -> str | None:
    """The id of the run's logged model, with its artifacts if it is released; None before the run has completed."""
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    if view.model is None:
        return None
    found = client.search_logged_models([experiment], f"source_run_id = '{run}'", max_results=1)
    if found:
        model = found[0]
    else:
        model = client.create_logged_model(
            experiment, view.plan.name, run, tags_of(view, view.model), {"plan_digest": digest_name(view.plan.digest)}, MODEL_TYPE
        )
    if model.status != LoggedModelStatus.READY:
        if view.model.released:
            with tempfile.TemporaryDirectory(prefix="wr-bundle-") as folder:
                for name, content in files().items():
                    path = Path(folder, name)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)
                client.log_model_artifacts(model.model_id, folder)
        client.finalize_logged_model(model.model_id, "READY")
    outputs = client.get_run(run).outputs
    if outputs is None or model.model_id not in [output.model_id for output in outputs.model_outputs]:
        client.log_outputs(run, [LoggedModelOutput(model.model_id, view.last_round)])
    return str(model.model_id)


def tags_of(view: RunView, model: ModelView) -> dict[str, str]:
    """Of the logged model and of the version alike."""
    release = "registry" if model.released else view.plan.release if view.plan.release == "silos-only" else "not released"
    tags = {
        "wardround.run_id": view.run_id,
        "wardround.release": release,
        "wardround.plan_digest": digest_name(view.plan.digest),
        "wardround.model_mac": model.model_mac.hex(),
        "wardround.parent_model": view.parent_model,
        "wardround.ended_ms": str(view.ended_ms),
    }
    if model.released:
        tags |= {
            "wardround.parameters_digest": digest_name(model.parameters_digest),
            "wardround.signed_by": ", ".join(model.signed_by),
            "wardround.bundle_digest": digest_name(model.content_digest),
            "wardround.bundle_made_by": model.made_by,
        }
    return tags


def register(client: "MlflowClient", run: str, model_id: str, view: RunView) -> str:
    """Make the run's model a version of the registered model that is named as the plan, and move the alias to it where it may.

    Returns what a reader of the run is told of it.
    """
    name, model = view.plan.name, view.model
    if model is None or not model.released:
        return ""
    registered = _registered(client, name, view.federation)
    if registered is None:
        return f"logged and not registered: the registered model {name} belongs to another federation; rename the plan"
    found = client.search_model_versions(f"name = '{name}' and run_id = '{run}'", max_results=1)
    if found:
        version = str(found[0].version)
    else:
        about = f"{view.run_id}, trained across {len(model.declared)} hospitals; docs/model_card.md says on what and what not for"
        made = client.create_model_version(
            name, f"models:/{model_id}", run, tags_of(view, model), None, about, await_creation_for=0, model_id=model_id
        )
        version = str(made.version)
    at, put = registered.aliases.get(ALIAS), registered.tags.get(MOVED)
    if at is not None and str(at) not in (put, version):
        return (
            f"version {version} of {name} is registered, and the alias {ALIAS} stays at version {at}, where somebody moved it "
            f"by hand: set it to {version}, or delete it and the next run sets it"
        )
    if at is not None and str(at) != version and _ended_ms(client, name, str(at)) > (view.ended_ms or 0):
        return f"version {version} of {name} is registered; the alias {ALIAS} stays at version {at}, of a newer run"
    if str(at) != version:
        client.set_registered_model_alias(name, ALIAS, version)
    if put != version:
        client.set_registered_model_tag(name, MOVED, version)
    return f"models:/{name}@{ALIAS} is version {version}"


def _registered(client: "MlflowClient", name: str, federation: str) -> Any:
    """The registered model of that name, made if need be; None where it is another federation's."""
    found = client.search_registered_models(f"name = '{name}'", max_results=1)
    if not found:
        return client.create_registered_model(name, {"wardround.federation": federation})
    return found[0] if found[0].tags.get("wardround.federation", federation) == federation else None


def _ended_ms(client: "MlflowClient", name: str, version: str) -> int:
    return int(client.get_model_version(name, version).tags.get("wardround.ended_ms", "0"))
