"""A run that starts from the released model of an earlier one: `initial: {bundle: sha256:...}`, the digest of its arrays.

The digest in the plan fixes every byte, and at least T signed reports say that silos of this federation computed them: nobody
plants a model of his own. Aggregator, silos and the offline CLI hold a plan against its parent by the same words.
"""

from pathlib import Path

from wardround.canonical import digest_name, sha256
from wardround.errors import PlanError, SettingsError
from wardround.layout import Layout, layout_of, trained_layout
from wardround.plan import Plan
from wardround.release import MAX_HEADER_BYTES, layout_in_safetensors, parameters_digest


def check_parent(plan: Plan, parent: Plan, run: str) -> None:
    """Raises PlanError, with both layouts, unless `plan` trains the network that `parent`, the plan of `run`, released."""
    check_layout(plan, layout_of(parent), f"the released model of {run}")
    if plan.model != parent.model:
        ours, theirs = plan.model.model_dump(mode="json"), parent.model.model_dump(mode="json")
        key = next(key for key in ours if ours[key] != theirs.get(key))
        raise PlanError(
            f"initial.bundle: {run} released such arrays of another network: its plan says model.{key}: {theirs.get(key)}, this "
            f"one {ours[key]}. Name a model of this network, or train that one"
        )


def check_layout(plan: Plan, theirs: Layout, whose: str) -> None:
    """Raises PlanError, with both layouts, unless they have the same arrays, by name, shape and order."""
    ours = trained_layout(plan)
    if ours.arrays == theirs.arrays:
        return
    for mine, other in zip(ours.arrays, theirs.arrays, strict=False):
        if mine != other:
            where = f"the first to differ is {mine.name} {list(mine.shape)} against {other.name} {list(other.shape)}"
            break
    else:
        where = "one has more arrays than the other"
    raise PlanError(
        f"initial.bundle: the plan's layout is {_told(plan.model.network, ours)}; {whose} has {_told('a layout', theirs)}; "
        f"{where}. Name a model of this layout, or train that one"
    )


def _told(what: str, layout: Layout) -> str:
    return f"{what} of {layout.num_parameters:,} parameters in {len(layout.arrays)} arrays"


def check_bundle(plan: Plan, folder: Path) -> None:
    """Offline: the bundle in `folder`, as MLflow serves it, is the one that the plan starts from, and fits. Raises PlanError, or
    SettingsError for a folder that holds no bundle."""
    try:
        content = (folder / "models" / "model.safetensors").read_bytes()
        theirs = layout_in_safetensors(content[: MAX_HEADER_BYTES + 8])
    except (OSError, ValueError):
        raise SettingsError(
            "there is no bundle: name the folder that `mlflow.artifacts.download_artifacts` wrote, with models/model.safetensors"
        ) from None
    check_layout(plan, theirs, "the bundle")
    parameters = content[len(content) - theirs.num_bytes :]
    found = {parameters_digest(Layout(theirs.arrays, variates=variates), parameters) for variates in (False, True)}
    if plan.parent is not None and plan.parent not in found:
        raise PlanError(
            f"initial.bundle: the plan names {digest_name(plan.parent)}; the bundle's arrays are another model's "
            f"(model.safetensors has {digest_name(sha256(content))}): take the parameters_digest out of its configs/metadata.json"
        )


def cost_of(parent: Plan, run: str) -> str:
    """What a run that starts from the model of `run` inherits, as a sentence for whoever reads its numbers."""
    if parent.privacy is None:
        told = f"starts from the model of {run}, trained without privacy: nothing bounds what that tells about one patient"
    else:
        told = (
            f"starts from the model of {run}, which cost its patients up to epsilon {parent.privacy.epsilon:g} at delta "
            f"{parent.privacy.delta:g}: that comes on top"
        )
    return told + ("; it too began from a released model" if parent.parent else "")
