"""Whether the tiny autoencoder is what keeps generated scenes from having shapes: `pytest -m slow -s` prints what it
keeps of held-out scenes after a minute of training from scratch."""

import numpy as np
import pytest
import torch
from PIL import Image

from lumen_ray import config
from lumen_ray.data.images import decode
from lumen_ray.data.scenes.render import scene_row
from lumen_ray.inference.engine import Engine
from lumen_ray.inference.request import make_request
from lumen_ray.model.build import build_decoder, load_model
from lumen_ray.model.settings import ModelSettings
from lumen_ray.presets import model_path

SIDE, STEPS = 64, 400


def pictures(rows):
    """float32 [N, 3, 64, 64] in -1..1."""
    small = [Image.fromarray(decode(row["image"])).resize((SIDE, SIDE), Image.Resampling.BOX) for row in rows]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2) / 127.5 - 1


def found(engine, images, rows):
    """Share of the objects that the bundled light decoder finds at IoU 0.5, of images in -1..1."""
    hits = []
    for image, row in zip(images, rows, strict=True):
        pixels = ((image + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
        shown = np.asarray(Image.fromarray(pixels).resize((128, 128), Image.Resampling.BICUBIC))
        classes = sorted({instance["phrase"] for instance in row["instances"]})
        (answer,) = engine.run([shown], [[make_request("detect", classes=classes)]], score_threshold=0.3)[0]
        boxes = {p.phrase: torch.as_tensor(p.boxes.xyxy).view(-1, 4) for p in answer.predictions}
        for instance in row["instances"]:
            wanted, ours = torch.tensor(instance["box"])[None], boxes[instance["phrase"]]
            inner = (torch.minimum(ours[:, 2:], wanted[:, 2:]) - torch.maximum(ours[:, :2], wanted[:, :2])).clamp_min(0)
            areas = [(b[:, 2:] - b[:, :2]).prod(1) for b in (ours, wanted)]
            overlap = inner.prod(1) / (areas[0] + areas[1] - inner.prod(1))
            hits.append(bool((overlap > 0.5).any()))
    return float(np.mean(hits))


@pytest.mark.slow
def test_the_autoencoder_keeps_the_shapes_of_scenes():
    torch.manual_seed(0)
    settings = config.load(ModelSettings, model_path("nano-experts"))
    decoder = build_decoder(settings, "stable_diffusion")
    seen, rows = pictures([scene_row(0, i, 128) for i in range(1024)]), [scene_row(10000, i, 128) for i in range(128)]
    held_out = pictures(rows)
    optimizer = torch.optim.AdamW(decoder.vae.parameters(), lr=2e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, STEPS, pct_start=0.05)
    for _ in range(STEPS):
        term = decoder._vae_loss(seen[torch.randint(len(seen), (8,))])
        optimizer.zero_grad()
        (term.total / term.count).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        again = decoder.vae.decode(decoder.vae.encode(held_out).latent_dist.mode()).sample.clamp(-1, 1)
    psnr = float((-10 * ((again - held_out) / 2).square().flatten(1).mean(1).log10()).mean())
    engine = Engine(load_model("nano"))
    before, after = found(engine, held_out, rows), found(engine, again, rows)
    print(f"PSNR {psnr:.1f} dB; objects found in 64-pixel scenes {before:.3f}, in reconstructions {after:.3f}")
    assert psnr > 24 and after > 0.95 * before
