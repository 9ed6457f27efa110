"""Steps of experts on a frozen trunk are timed on both sides, on the same scenes."""

from lumen_ray.bench import frozen_trunk


def test_a_rate_for_each_decoder_and_side(tmp_path, monkeypatch):
    monkeypatch.setattr(frozen_trunk, "IMAGES", 16)
    found = list(frozen_trunk.bench(tmp_path, turns=1, batch_size=8))
    assert [result.name for result in found] == ["frozen_trunk/grounding_dino", "frozen_trunk/unipose"]
    assert all(list(result.rates) == ["kept", "run"] for result in found)
