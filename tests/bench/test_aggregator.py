"""The bench of uploads: its keys and its bytes, on a small layout. Never its seconds."""

import pytest

from bench.aggregator import ROW, Setting, ciphertexts, measure
from wardround.ciphertexts import check_upload
from wardround.layout import layout_of, network_layout
from wardround.networks import ResNet18

SMALL = Setting(channels=(8, 8), repetitions=1, few=3, many=5)


def test_keys_that_others_read() -> None:
    found = measure(SMALL)
    assert found["throughput_ratio"] > 0 and found["peak_memory_ratio"] > 0
    (rates,) = found["mb_per_s"]
    assert found["throughput_ratio"] == pytest.approx(rates["all"] / rates["bare"], abs=0.01)
    assert set(found["peak_mb"]) == {"3", "5"} and min(found["peak_mb"].values()) > 20
    assert found["upload_bytes"] == SMALL.upload_bytes == 2 * ROW.upload_chunk_bytes


def test_uploads_of_the_size_of_a_resnet18_that_pass_for_ciphertexts() -> None:
    resnet = network_layout(ResNet18(network="ResNet18"), spatial_dims=2, num_classes=3).num_parameters
    assert layout_of(Setting().plan).num_parameters == pytest.approx(resnet, rel=0.001)
    assert Setting().upload_bytes / resnet == pytest.approx(3.51, abs=0.01)
    data = ciphertexts(8 * ROW.upload_chunk_bytes)
    assert len(data) == 8 * ROW.upload_chunk_bytes
    check_upload(ROW, data)
