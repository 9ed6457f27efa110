"""Prompts whose object is not in the image are answered by nothing; the gate changes nothing for the others."""

import pytest
import torch
from support.tiny_models import scrambled

from lumen_ray.decoders.base import PredictSettings, PromptSpec
from lumen_ray.decoders.lumen import presence
from lumen_ray.decoders.lumen.decoder import LumenDecoder
from lumen_ray.decoders.lumen.presence import PresenceHead
from lumen_ray.decoders.lumen.settings import LumenSettings
from lumen_ray.superlink import SuperLink
from lumen_ray.targets import Frame

SIDE, DENSE, LINK = 64, 12, 10
FRAME = Frame.fit((SIDE, SIDE), SIDE)
LOW = PredictSettings(score_threshold=0.0, max_per_phrase=5)


def make(threshold):
    torch.manual_seed(0)
    settings = LumenSettings(hidden_size=16, num_heads=2, num_layers=1, presence=True, presence_threshold=threshold)
    return scrambled(LumenDecoder(settings, DENSE, LINK), 0.3).eval()


def inputs(prompts=7, images=2):
    generator = torch.Generator().manual_seed(3)
    dense = torch.randn(images, DENSE, SIDE // 4, SIDE // 4, generator=generator)
    about = torch.arange(prompts) % images
    return SuperLink("lumen", torch.randn(prompts, LINK, generator=generator), about, torch.full((prompts,), -1)), dense


def answers(model, link, dense, masks=False):
    specs = [PromptSpec(str(i), masks=masks) for i in range(len(link))]
    with torch.no_grad():
        raw = model(link, dense)
        return raw, model.predict(raw, [FRAME] * len(dense), specs, LOW)


def test_only_prompts_above_the_threshold_have_places():
    link, dense = inputs()
    everything, whole = answers(make(0.0), link, dense)
    order = everything.presence.sigmoid().sort().values
    threshold = float(order[2:4].mean())
    gated, found = answers(make(threshold), link, dense)
    assert everything.absent.tolist() == [] and len(gated.absent) == 3 and len(gated.objects) == 4
    assert sorted([*gated.absent.tolist(), *gated.objects.tolist()]) == list(range(7))
    for i, (a, b) in enumerate(zip(whole, found, strict=True)):
        if i in gated.absent:
            assert len(b) == 0 and b.phrase == str(i) and b.boxes.size == (SIDE, SIDE)
        else:
            torch.testing.assert_close(torch.tensor(b.scores), torch.tensor(a.scores), atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(torch.tensor(b.boxes.xyxy), torch.tensor(a.boxes.xyxy), atol=1e-3, rtol=1e-4)


def test_scores_are_multiplied_by_the_presence():
    link, dense = inputs()
    raw, found = answers(make(0.0), link, dense)
    for p, i in enumerate(raw.objects.tolist()):
        best = raw.logits[p].sigmoid().max() * raw.presence[p].sigmoid()
        assert float(found[i].scores[0]) == pytest.approx(float(best), rel=1e-5)


@pytest.mark.parametrize("products", [1, 300])
def test_a_logit_depends_on_its_prompt_and_image_alone(products, monkeypatch):
    torch.manual_seed(0)
    head = scrambled(PresenceHead(16), 0.3)
    tokens, places, about = torch.randn(9, 16), torch.randn(2, 30, 16), torch.tensor([0, 1, 0, 0, 1, 0, 1, 1, 1])
    with torch.no_grad():
        together = head(tokens, places, about)
        monkeypatch.setattr(presence, "MOST_MATCHES", products)
        torch.testing.assert_close(head(tokens, places, about), together, atol=1e-5, rtol=1e-5)
        for i, image in enumerate(about.tolist()):
            alone = head(tokens[i : i + 1], places[image : image + 1], torch.tensor([0]))
            torch.testing.assert_close(alone, together[i : i + 1], atol=1e-5, rtol=1e-5)
        assert head(tokens[:0], places, about[:0]).shape == (0,)
    assert together.std() > 1e-2


def test_all_prompts_absent_gives_empty_answers_with_masks():
    link, dense = inputs()
    model = make(0.5)
    model.presence.bias.data.fill_(-50.0)
    raw, found = answers(model, link, dense, masks=True)
    assert len(raw.objects) == 0 and [len(p) for p in found] == [0] * 7
    assert all(p.masks is not None and len(p.masks) == 0 for p in found)


def test_training_looks_at_every_prompt():
    link, dense = inputs()
    raw = make(0.99)(link, dense)
    assert len(raw.objects) == 7 and raw.presence.requires_grad
