"""A model that answers in bf16 gives what it gives in fp32, but for its rounding."""

from itertools import count, islice

import numpy as np
import pytest
import torch
from support.tiny_models import EXPERTS, SIDE, tiny_folder, tiny_loaded

from lumen_ray.data.images import decode
from lumen_ray.data.scenes import render as scenes
from lumen_ray.errors import UserError
from lumen_ray.inference.decoder_stage import DecoderStage
from lumen_ray.inference.engine import Engine
from lumen_ray.inference.request import make_request
from lumen_ray.inference.trunk_stage import TrunkStage
from lumen_ray.meta_init import put_weights
from lumen_ray.model.build import load_model


@pytest.fixture(scope="module")
def answers():
    """Of the bundled model, in both: segment, pose and caption of three scenes."""
    found = []
    for dtype in ("float32", "bfloat16"):
        engine = Engine.load("nano", dtype=dtype)
        asked = [
            make_request("segment", classes=list(engine.classes)),
            make_request("pose", classes=list(engine.skeletons)),
            make_request("caption"),
        ]
        rows = (scenes.scene_row(7, n) for n in count())
        posed = (row for row in rows if any(i["keypoints"] for i in row["instances"]))
        pictures = [decode(row["image"]) for row in islice(posed, 3)]
        found.append(engine.run(pictures, [asked] * 3, score_threshold=0.4))
    return found


def pairs(answers, request):
    """Pairs of predictions with instances, of one request about all scenes."""
    exact, low = ([p for answer in rows for p in answer[request].predictions] for rows in answers)
    assert [len(p) for p in exact] == [len(p) for p in low]
    found = [(p, q) for p, q in zip(exact, low, strict=True) if len(p)]
    assert found
    return found


def test_boxes_scores_and_masks(answers):
    shifts, apart, overlaps = [], [], []
    for exact, low in pairs(answers, 0):
        shifts.append(np.abs(exact.boxes.xyxy[:, None] - low.boxes.xyxy[None]).max(-1).min(1))
        apart.append(np.abs(exact.scores - low.scores))
        one, other = (p.masks.to_arrays().any(0) for p in (exact, low))
        overlaps.append((one & other).sum() / (one | other).sum())
    shifts, apart = np.concatenate(shifts), np.concatenate(apart)
    assert 0 < shifts.max() < 0.5 and apart.max() < 0.03 and min(overlaps) > 0.97


def test_keypoints(answers):
    for exact, low in pairs(answers, 1):
        assert np.abs(exact.keypoints.xyv[..., :2] - low.keypoints.xyv[..., :2]).max() < 1.0
        assert np.abs(exact.keypoints.xyv[..., 2] - low.keypoints.xyv[..., 2]).max() < 0.05


def test_texts(answers):
    exact, low = ([answer[2].text for answer in rows] for rows in answers)
    assert exact == low and all(exact)


def test_large_weights_are_stored_in_it_and_small_ones_are_not():
    loaded = tiny_loaded(**EXPERTS)
    loaded.dtype = "bfloat16"
    engine = Engine(loaded)
    counts = {torch.float32: 0, torch.bfloat16: 0}
    for p in engine.trunk.trunk.parameters():
        counts[p.dtype] += p.numel()
    assert counts[torch.bfloat16] > 9 * counts[torch.float32]
    assert engine.decoders["lumen"].decoder.box_head[1].weight.dtype == torch.float32
    picture = decode(scenes.scene_row(3, 0, SIDE)["image"])
    for decoder, request in (
        ("grounding_dino", make_request("detect", classes=["red circle"])),
        ("unipose", make_request("pose", classes=["figure"])),
        ("stable_diffusion", make_request("generate", text="a red circle")),
        ("instruct_pix2pix", make_request("edit", text="remove the red circle")),
    ):
        loaded.settings.serving[request.task] = decoder
        seen = None if request.task == "generate" else picture
        (answer,) = engine.run([seen], [[request]], score_threshold=0.0)[0]
        assert answer.images or len(answer.predictions[0])


def test_weights_are_read_into_it(tmp_path, monkeypatch):
    """None of them is there in fp32 first, and asking twice changes nothing."""
    folder, put = tiny_folder(tmp_path, **EXPERTS), []

    def watched(module, read, device):
        put.append({p.dtype for p in module.parameters()})
        assert all(p.is_meta for p in module.parameters())
        put_weights(module, read, device)

    monkeypatch.setattr("lumen_ray.model.build.put_weights", watched)
    loaded = load_model(folder, parts=("trunk",), dtype="bfloat16")
    assert put == [{torch.float32, torch.bfloat16}]
    assert loaded.model.trunk.llm.lm_head.weight.dtype == torch.bfloat16
    for name in loaded.model.decoders:
        decoder = loaded.decoder(name)
        kinds = {p.dtype: p for p in decoder.parameters()}
        assert set(kinds) == {torch.float32, torch.bfloat16}
        methods = {path: vars(decoder.get_submodule(path)).get("forward") for path in decoder.exact}
        stage = DecoderStage(loaded, name)
        assert stage.decoder is decoder and put[-1] == set(kinds)
        assert methods == {path: vars(decoder.get_submodule(path)).get("forward") for path in decoder.exact}


def test_every_way_to_load_takes_it(tmp_path):
    folder = tiny_folder(tmp_path)
    assert Engine.load(folder).dtype == "float32"
    assert TrunkStage.load(folder, dtype="bfloat16").trunk.llm.lm_head.weight.dtype == torch.bfloat16
    assert DecoderStage.load(folder, "lumen", dtype="bfloat16").decoder.heat_place[1].weight.dtype == torch.bfloat16
    with pytest.raises(UserError, match="unknown dtype 'float16'.*float32.*bfloat16|unknown dtype 'float16'") as caught:
        Engine.load(folder, dtype="float16")
    assert "bfloat16" in str(caught.value)
