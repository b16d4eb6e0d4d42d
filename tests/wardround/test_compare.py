"""Two runs side by side: numbers by hand, and what such a table must admit."""

from dataclasses import replace

from wardround.compare import ONE_RUN_EACH, Side, as_text, compare

A = Side(
    run="brain-1",
    phase="completed",
    params={"training.mu": "0.0", "rounds": "4", "dataset": "brain-t1"},
    hospitals={"charite": "sha256:1", "leuven": "sha256:2"},
    curve={"dice": {0: 0.1, 2: 0.5, 4: 0.8}, "hd95_mm": {0: 30.0, 4: 6.0}},
    own={"charite": {"dice": 0.82}, "leuven": {"dice": 0.78}},
    rounds=5,
    epsilon=None,
    upload_bytes=1000,
    download_bytes=3000,
    seconds=10.04,
)
B = replace(
    A,
    run="brain-2",
    params=A.params | {"training.mu": "0.1"},
    curve={"dice": {0: 0.1, 2: 0.77, 4: 0.84}, "hd95_mm": {0: 30.0, 4: 5.5}},
    own={"charite": {"dice": 0.81}, "leuven": {"dice": 0.87}},
    epsilon=8.0,
    upload_bytes=1500,
    seconds=12.5,
)


def test_differences_by_hand() -> None:
    found = compare(A, B)
    assert found["runs"] == ["brain-1", "brain-2"] and found["plan"] == {"training.mu": ["0.0", "0.1"]}
    assert found["final"]["dice"] == {"a": 0.8, "b": 0.84, "difference": 0.04}
    assert found["final"]["hd95_mm"] == {"a": 6.0, "b": 5.5, "difference": -0.5}
    assert found["hospitals"]["leuven"] == {"a": 0.78, "b": 0.87, "difference": 0.09}
    assert found["upload_bytes"]["difference"] == 500 and found["seconds"] == {"a": 10.0, "b": 12.5, "difference": 2.5}
    assert found["epsilon"] == {"a": None, "b": 8.0, "difference": None}  # nothing is bounded in one: no number says by how much
    assert found["rounds_to_95_percent"] == {"dice": 0.76, "a": 4, "b": 2}  # 95 % of 0.8, the lesser


def test_the_text_says_what_the_facts_say() -> None:
    text = as_text(compare(A, B))
    assert "# brain-2 against brain-1" in text
    assert "| validation dice | 0.8 | 0.84 | +0.04 |" in text
    assert "| validation hd95_mm (lower is better) | 6 | 5.5 | -0.5 |" in text
    assert "| epsilon | none | 8 |  |" in text and "| upload bytes | 1,000 | 1,500 | +500 |" in text
    assert "| round of the first measured model with dice 0.76, 95% of the lesser final one | 4 | 2 | |" in text
    assert "1 of 2 hospitals have a higher Dice in brain-2, 1 a lower one." in text
    assert "| training.mu | 0.0 | 0.1 |" in text and f"- {ONE_RUN_EACH}" in text


def test_what_cannot_be_compared_is_said() -> None:
    assert not [caveat for caveat in compare(A, B)["caveats"] if "hospital" in caveat and "other" in caveat]
    others = replace(
        B,
        hospitals={"charite": "sha256:1"},
        params=B.params | {"dataset": "brain-t2"},
        phase="failed",
        degraded="leuven in round 2",
    )
    said = "\n".join(compare(A, others)["caveats"])
    assert "other hospitals, charite, leuven against charite: measured on other patients" in said
    assert "differ in dataset: the measures do not measure the same" in said
    assert "brain-2 has failed" in said and "brain-2 lost hospitals: leuven in round 2" in said
    pending = "\n".join(compare(A, replace(B, hospitals={}, curve={}, own={}, phase="pending"))["caveats"])
    assert "no hospital has joined brain-2: there is nothing to compare yet" in pending and "other hospitals" not in pending
    assert "brain-2 is pending: it is no finished run" in pending and "other facts" not in pending
    declared = replace(B, hospitals=A.hospitals | {"leuven": "sha256:3"})
    assert "declared other facts" in "\n".join(compare(A, declared)["caveats"])


def test_runs_that_measured_nothing() -> None:
    empty = replace(A, curve={}, own={}, rounds=0)
    found = compare(empty, replace(empty, run="brain-3"))
    assert found["final"] == {} and found["rounds_to_95_percent"] == {"dice": None, "a": None, "b": None}
    assert "| the same plan | | |" in as_text(found)
