"""The picture of replicas over time."""

import xml.etree.ElementTree as ElementTree

from lumen_ray.bench.scaling import Sample, draw, model, settings_of
from lumen_ray.model.settings import read_settings


def test_the_picture_has_a_row_of_steps_for_each_deployment():
    samples = [Sample(0.0, {"Trunk": 1, "A": 1}, 0.0), Sample(10.0, {"Trunk": 1, "A": 3}, 8.0)]
    root = ElementTree.fromstring(draw(samples, (2, 8)))
    texts = [element.text for element in root.findall(".//{*}text")]
    lines = [element.get("points").split() for element in root.findall(".//{*}polyline")]
    assert {"Trunk", "A", "answers"} <= set(texts) and "replicas, up to 3" in texts and len(lines) == 3
    heights = [[float(point.split(",")[1]) for point in line] for line in lines]
    assert len(set(heights[0])) == 1 and heights[1][-1] < heights[1][0]


def test_the_model_has_decoders_that_scale_apart(tmp_path):
    folder = model(tmp_path / "model")
    assert set(read_settings(folder).decoder_names) == {"lumen", "grounding_dino", "unipose"}
    settings = settings_of(folder, 8000)
    assert settings.serving == {"detect": "grounding_dino"} and settings.decoder("unipose").max_replicas == 3
