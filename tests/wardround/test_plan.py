from pathlib import Path

import pytest
import yaml

from tests.support.plans import TINY, private, tiny
from wardround.errors import PlanError
from wardround.he import he_parameters
from wardround.plan import MAX_PLAN_BYTES, load_plan, parse_plan

PRIVACY = {"unit": "patient", "epsilon": 8.0, "delta": 1.0e-5, "max_grad_norm": 1.0, "sample_rate": 0.08}
PLANS = sorted((Path(__file__).parents[2] / "configs" / "plans").glob("*.yaml"))


PRIVACY = {"unit": "patient", "epsilon": 8.0, "delta": 1e-5, "max_grad_norm": 1.0, "sample_rate": 0.1}


def changed(path: str, value: object) -> bytes:
    """TINY with one key set, or removed with None."""
    plan = yaml.safe_load(TINY)
    *parents, key = path.split(".")
    part = plan
    for name in parents:
        part = part[name]
    if value is None:
        del part[key]
    else:
        part[key] = value
    return yaml.safe_dump(plan).encode()


def test_every_plan_in_configs_holds():
    assert PLANS
    for path in PLANS:
        plan = load_plan(path)
        assert parse_plan(plan.canonical()) == plan


@pytest.mark.parametrize("text", [b"1e-5", b"1E-05", b"1.0e-5", b"0.00001"])
def test_a_small_number_is_a_number_however_it_is_written(text):
    plan = parse_plan(changed("training.mu", 0.625).replace(b"0.625", text))
    assert plan.training.mu == 1e-5 and parse_plan(plan.canonical()) == plan


def test_the_digest_is_of_the_value_not_the_text():
    plan = parse_plan(TINY.encode())
    assert parse_plan(yaml.safe_dump(yaml.safe_load(TINY), sort_keys=True).encode()).digest == plan.digest
    assert parse_plan(changed("training.optimizer.momentum", 0.0)).digest == plan.digest  # a default written out
    assert parse_plan(changed("rounds", 3)).digest != plan.digest


def test_a_private_plan_survives_its_own_canonical_bytes():
    plan = private(delta=1e-5)
    assert parse_plan(plan.canonical()) == plan and b"1e-05" in plan.canonical()  # YAML 1.1 would read a string
    assert plan.privacy is not None and plan.privacy.delta == 1e-5
    assert private(delta=1e-6).digest != plan.digest


@pytest.mark.parametrize(("written", "read"), [("1e-5", 1e-5), ("1E+2", 100.0), ("+2e0", 2.0), ("1.0e-5", 1e-5), ("3", 3)])
def test_numbers_are_read_as_people_write_them(written, read):
    plan = parse_plan(TINY.replace("mu: 0.01", f"mu: {written}").encode())
    assert plan.training.mu == read


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("colour", "red", "colour: unknown key"),
        ("training.colour", "red", "training.colour: unknown key"),
        ("model.colour", "red", "model.colour: unknown key"),
        ("rounds", None, "rounds: missing"),
        ("rounds", "2", "rounds: .*got '2'"),
        ("rounds", 0, "rounds: "),
        ("rounds", True, "rounds: "),
        ("protocol", 2, "protocol: "),
        ("task", "regression", "task: "),
        ("name", "../x", "name: "),
        ("dataset", "Brain T1", "dataset: "),
        ("classes", ["background"], "classes: "),
        ("classes", ["background", "grey", "grey"], "classes must differ"),
        ("classes", ["grey", "background"], "the first of classes must be background"),
        ("initial.seed", -1, "initial.seed: "),
        ("model.network", "Transformer", "model: "),
        ("model.strides", [2, 2], "one entry fewer than model.channels: expected 1, got 2"),
        ("model.channels", [4, 5], "multiples of model.norm_groups"),
        ("model", {"network": "ResNet18"}, "segmentation needs UNet"),
        ("model", {"network": "DenseNet121"}, "segmentation needs UNet"),
        ("model", {"network": "ResNet18", "norm_groups": 5}, "ResNet18's widths must be multiples of model.norm_groups .5.: 64"),
        ("model", {"network": "BasicUNet", "features": [8, 8, 8, 8, 8]}, "model.features"),
        ("model", {"network": "BasicUNet", "features": [8, 8, 8, 8, 8, 8], "norm_groups": 3}, "norm_groups .3.: 8 is not"),
        ("model", {"network": "BasicUNet", "features": [3, 3, 3, 4, 4, 3], "norm_groups": 1}, "must be even.*: 3 is not"),
        ("model", {"network": "SegResNet", "blocks_up": [1, 1]}, "one entry fewer than model.blocks_down: expected 3, got 2"),
        ("model", {"network": "SegResNet", "init_filters": 12}, "model.init_filters must be multiples"),
        ("initial.shapes_steps", -1, "initial.shapes_steps: "),
        ("training.batch_size", None, "training.batch_size: missing"),
        ("privacy", PRIVACY, "exclude each other"),
        ("data.patch", [16, 17], "must be a multiple of 2 .*: 17 is not"),
        ("data.patch", [16], "data.patch: "),
        ("data.spacing_mm", [1.0, 1.0, 0.0], "data.spacing_mm.2: "),
        ("data.spacing_mm", [1.0, 1.0, float("nan")], "data.spacing_mm.2: "),
        ("training.mu", float("inf"), "training.mu: "),
        ("training.mu", -0.1, "training.mu: "),
        ("training.optimizer.momentum", 1.0, "training.optimizer.momentum: "),
        ("training.optimizer.name", "__import__('os')", "training.optimizer.name: "),
        ("aggregation.min_silos", 1, "aggregation.min_silos: "),
        ("aggregation.min_silos", 33, "33 silos do not fit the packing, which holds 32"),
        ("aggregation.max_silos", 16, "aggregation.max_silos: "),
        ("aggregation.max_silos", 1000, "1000 silos x 16 bits is none of them"),
        ("aggregation.bits", 12, "32 silos x 12 bits is none of them"),
        ("aggregation.bits", 8, "aggregation.bits: "),
        ("aggregation.encryption", "ckks", "aggregation.encryption: "),
        ("aggregation.encryption", "none", "aggregation.encryption: "),
        ("aggregation.masking", "pairwise", "aggregation.masking: "),
        ("release", "public", "release: "),
        ("training.batch_size", None, "training.batch_size: missing"),
        ("training.batch_size", -1, "training.batch_size: "),
        ("privacy", {}, "privacy.epsilon: missing"),
        ("privacy", PRIVACY, "training.batch_size and privacy exclude each other"),
        ("privacy", PRIVACY | {"unit": "record"}, "privacy.unit: "),
        ("privacy", PRIVACY | {"epsilon": 0.0}, "privacy.epsilon: "),
        ("privacy", PRIVACY | {"epsilon": 51.0}, "privacy.epsilon: "),
        ("privacy", PRIVACY | {"epsilon": float("nan")}, "privacy.epsilon: "),
        ("privacy", PRIVACY | {"delta": 0.0}, "privacy.delta: "),
        ("privacy", PRIVACY | {"delta": 0.5}, "privacy.delta: "),
        ("privacy", PRIVACY | {"max_grad_norm": float("inf")}, "privacy.max_grad_norm: "),
        ("privacy", PRIVACY | {"sample_rate": 0.0}, "privacy.sample_rate: "),
        ("privacy", PRIVACY | {"sample_rate": 1.5}, "privacy.sample_rate: "),
        ("privacy", PRIVACY | {"noise_multiplier": 1.0}, "privacy.noise_multiplier: unknown key"),
    ],
)
def test_a_plan_that_does_not_hold_names_the_key(path, value, told):
    with pytest.raises(PlanError, match=told):
        parse_plan(changed(path, value))


def section(algorithm: str, **more: object) -> dict[str, object]:
    """A training section of TINY's, without mu."""
    return {"algorithm": algorithm, "steps": 1, "batch_size": 2, "optimizer": {"name": "sgd", "learning_rate": 0.1}} | more


ADAM = {"server_learning_rate": 0.01}


@pytest.mark.parametrize(
    ("training", "top", "told"),
    [
        (section("fedprx"), {}, "algorithm 'fedprx' is none of 'fedprox', 'fednova', 'scaffold', 'fedadam', 'fedyogi'"),
        (section("FedAvg"), {}, "training: algorithm 'FedAvg' is none of 'fedprox'"),
        ({"steps": 1}, {}, "training.algorithm: missing"),
        (section("fedprox", steps=0), {}, "training.steps: missing; or training.epochs"),
        (section("fedprox", epochs=1), {}, "training.steps and training.epochs exclude each other"),
        (section("scaffold", mu=0.1), {}, "training.mu and algorithm scaffold exclude each other"),
        (section("scaffold", steps=0, epochs=1), {}, "training.epochs and algorithm scaffold exclude each other"),
        (
            section("scaffold", optimizer={"name": "sgd", "learning_rate": 0.1, "momentum": 0.9}), {},
            "training.optimizer.momentum and algorithm scaffold exclude each other",
        ),
        (section("fedadam"), {}, "training.server_learning_rate: missing"),
        (section("fedprox") | ADAM, {}, "training.server_learning_rate: unknown key"),
        (section("fedyogi", beta2=1.0) | ADAM, {}, "training.beta2: "),
        (section("fedadam", adaptivity=0.0) | ADAM, {}, "training.adaptivity: "),
        (
            section("fedadam") | ADAM, {"aggregation": {"server": {"momentum": 0.9}}},
            "aggregation.server and algorithm fedadam exclude each other",
        ),
        (section("fedprox", at_home="biases"), {}, "training.at_home: "),
        (section("fedprox", at_home="head"), {"release": "registry"}, "training.at_home head and release registry exclude"),
        (section("scaffold", batch_size=0), {"privacy": PRIVACY}, "algorithm scaffold and privacy exclude each other: its"),
        (section("fednova", batch_size=0), {"privacy": PRIVACY}, "algorithm fednova and privacy exclude each other: .*say fedprox"),
        (
            section("fedprox", batch_size=0, steps=0, epochs=1), {"privacy": PRIVACY},
            "training.epochs and privacy exclude each other: how many steps a silo takes would tell of its patients",
        ),
    ],
)  # fmt: skip
def test_an_algorithm_that_cannot_keep_its_promise_is_not_constructible(training, top, told):
    plan = yaml.safe_load(TINY) | {"training": training}
    plan["aggregation"] |= top.pop("aggregation", {})
    with pytest.raises(PlanError, match=told):
        parse_plan(yaml.safe_dump(plan | top).encode())


@pytest.mark.parametrize(
    "training",
    [
        section("fednova", steps=0, epochs=1.5, mu=0.1),
        section("scaffold", at_home="norms"),
        section("fedadam", at_home="head") | ADAM,
        section("fedyogi", mu=0.1) | ADAM,
    ],
    ids=lambda training: training["algorithm"],
)
def test_every_algorithm_survives_its_own_canonical_bytes(training):
    plan = parse_plan(yaml.safe_dump(yaml.safe_load(TINY) | {"training": training}).encode())
    assert parse_plan(plan.canonical()) == plan and plan.training.algorithm == training["algorithm"]


@pytest.mark.parametrize("algorithm", ["fedprox", "fedadam", "fedyogi"])
def test_what_only_moves_the_sum_may_be_private(algorithm):
    training = section(algorithm, batch_size=0) | (ADAM if algorithm != "fedprox" else {})
    assert parse_plan(yaml.safe_dump(yaml.safe_load(TINY) | {"training": training, "privacy": PRIVACY}).encode()).privacy


@pytest.mark.parametrize(("epochs", "patients", "steps"), [(1.0, 12, 6), (1.0, 13, 7), (0.5, 13, 4), (0.01, 1, 1)])
def test_steps_follow_from_epochs(epochs, patients, steps):
    training = section("fednova", steps=0, epochs=epochs)
    plan = parse_plan(yaml.safe_dump(yaml.safe_load(TINY) | {"training": training}).encode())
    assert plan.training.steps_of(patients) == steps and tiny().training.steps_of(patients) == 1


@pytest.mark.parametrize(("max_silos", "bits"), [(32, 16), (64, 16), (128, 16), (1000, 12)])
def test_a_plan_has_room_for_as_many_silos_as_its_row_holds(max_silos, bits):
    plan = tiny({"max_silos": max_silos, "bits": bits, "min_silos": max_silos})
    assert plan.aggregation.he == he_parameters(max_silos, bits)
    with pytest.raises(PlanError, match=f"the packing, which holds {max_silos}|less than or equal to 1000"):
        tiny({"max_silos": max_silos, "bits": bits, "min_silos": max_silos + 1})


def test_the_row_is_32_silos_of_16_bits_where_nothing_is_said():
    assert parse_plan(TINY.encode()).aggregation.he == he_parameters(32, 16)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"a: [", r"not YAML \(line 1\)"),
        (b"\xff\xfe\xff", "not YAML"),
        (b"", "mapping .*NoneType"),
        (b"- a", "mapping .*list"),
        (b"a: !!python/object/apply:os.system [true]", "not YAML"),
        (b" " * (MAX_PLAN_BYTES + 1), "at most 65536 bytes"),
    ],
)
def test_what_is_no_plan(text, told):
    with pytest.raises(PlanError, match=told):
        parse_plan(text)


@pytest.mark.parametrize(
    ("model", "factor"),
    [
        ({"network": "UNet", "channels": [4, 4, 4], "strides": [2, 3]}, 6),
        ({"network": "BasicUNet"}, 16),
        ({"network": "SegResNet"}, 8),
    ],
)
def test_patches_are_what_the_network_can_shrink(model, factor):
    fitting = parse_plan(changed("model", model) + b"\ndata: {modality: MR, spacing_mm: [1.0, 1.0, 1.0], patch: [48, 48]}")
    assert fitting.model.patch_factor == factor
    with pytest.raises(PlanError, match=f"must be a multiple of {factor} .*: 49 is not"):
        parse_plan(fitting.canonical().replace(b"[48,48]", b"[48,49]"))


def test_every_problem_is_named_at_once():
    with pytest.raises(PlanError) as caught:
        parse_plan(b"name: x\nrounds: -1\ncolour: red")
    lines = str(caught.value).splitlines()
    assert any(line.startswith("rounds: ") for line in lines)
    assert "colour: unknown key" in lines
    assert "task: missing" in lines


def test_a_long_value_is_shortened():
    with pytest.raises(PlanError) as caught:
        parse_plan(changed("name", "x" * 5000))
    assert len(str(caught.value)) < 300


def test_a_missing_file(tmp_path):
    """Whoever typed the path reads it back; what comes over the wire goes through parse_plan and names no file."""
    with pytest.raises(PlanError) as caught:
        load_plan(tmp_path / "none.yaml")
    assert str(caught.value) == f"cannot read the plan {tmp_path / 'none.yaml'}: No such file or directory"
