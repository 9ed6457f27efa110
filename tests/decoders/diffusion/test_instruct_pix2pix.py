"""Edits: what is dropped in training, where the picture comes in, and the pipeline of `diffusers` as known answer."""

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionInstructPix2PixPipeline
from support.diffusion_fakes import SIDE, TEXT, instruct_pix2pix, make_link, make_pixels, make_targets

from lumen_ray.config import validate
from lumen_ray.decoders.base import SampleSettings
from lumen_ray.decoders.diffusion.modules import fit_pixels
from lumen_ray.decoders.diffusion.settings import InstructPix2PixSettings
from lumen_ray.errors import UserError
from lumen_ray.targets import Pixels


def source_latents(decoder, link, view):
    pixels = fit_pixels(view.images[link.image_index], view.extents[link.image_index], (SIDE, SIDE))
    with torch.no_grad():
        return decoder.vae.encode(2 * pixels - 1).latent_dist.mode()


def test_text_both_and_picture_are_dropped_in_turn(monkeypatch):
    decoder, link, view = instruct_pix2pix(text_encoder=TEXT).eval(), make_link(4), make_pixels()
    seen = {}
    monkeypatch.setattr(torch, "rand", lambda *size, **kw: torch.tensor([0.04, 0.06, 0.14, 0.16]))

    def unet(noisy, times, encoder_hidden_states):
        seen.update(condition=encoder_hidden_states, source=noisy[:, 4:])
        return type("Output", (), {"sample": torch.zeros_like(noisy[:, :4])})

    monkeypatch.setattr(decoder.unet, "forward", unet)
    decoder.losses(link, view, make_targets(4))
    empty = decoder.empty_condition()[0]
    assert torch.equal(seen["condition"], torch.stack([empty, empty, link.embeddings[2], link.embeddings[3]]))
    sources = source_latents(decoder, link, view)  # not scaled
    kept = torch.tensor([True, False, False, True])
    assert torch.equal(seen["source"], sources * kept[:, None, None, None])


def test_the_source_is_the_links_image_without_padding():
    decoder, link, view = instruct_pix2pix().eval(), make_link(3), make_pixels()
    settings = SampleSettings(steps=2)
    before = decoder.sample(link, view, settings)
    padded = Pixels(view.images.clone(), view.extents)
    padded.images[:, :, :, view.extents[0, 1] :] = 7
    assert torch.equal(decoder.sample(link, padded, settings), before)
    other = Pixels(view.images.clone(), view.extents)
    other.images[1] = 0
    changed = (decoder.sample(link, other, settings) != before).flatten(1).any(1)
    assert changed.tolist() == [False, True, False]


@pytest.mark.parametrize(("guidance", "image_guidance"), [(7.5, 1.5), (3.0, 1.0), (1.0, 1.0)])
def test_pictures_are_those_of_the_pipeline(guidance, image_guidance):
    keys = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    decoder = instruct_pix2pix(text_encoder=TEXT, scheduler=keys, sampler="EulerAncestralDiscreteScheduler").eval()
    pipeline = StableDiffusionInstructPix2PixPipeline(
        vae=decoder.vae,
        text_encoder=decoder.text_encoder,
        tokenizer=None,
        unet=decoder.unet,
        scheduler=EulerAncestralDiscreteScheduler(**keys),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    link, view = make_link(2), make_pixels()
    expected = pipeline(
        prompt_embeds=link.embeddings,
        negative_prompt_embeds=decoder.empty_condition().expand(2, -1, -1),
        image=fit_pixels(view.images, view.extents, (SIDE, SIDE)),
        generator=[torch.Generator().manual_seed(3) for _ in range(2)],
        num_inference_steps=6,
        guidance_scale=guidance,
        image_guidance_scale=image_guidance,
        output_type="pt",
    ).images
    settings = SampleSettings(steps=6, guidance=guidance, image_guidance=image_guidance, seed=3)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    drawn = decoder._draw(link, view, (SIDE, SIDE), settings, generators)
    assert drawn.std() > 0.05
    assert torch.allclose(drawn, expected, atol=1e-4)


def test_sampling_is_guidance_of_both_kinds_written_out():
    decoder, link, view = instruct_pix2pix().eval(), make_link(1), make_pixels()
    scheduler = decoder._scheduler("DDIMScheduler")
    scheduler.set_timesteps(4)
    source, empty = source_latents(decoder, link, view), decoder.empty_condition().detach()

    def predict(latents, t, image, condition):
        return decoder.unet(torch.cat([latents, image], 1), t, encoder_hidden_states=condition).sample

    with torch.no_grad():
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        for t in scheduler.timesteps:
            nothing = predict(latents, t, torch.zeros_like(source), empty)
            image = predict(latents, t, source, empty)
            both = predict(latents, t, source, link.embeddings)
            noise = nothing + 1.5 * (image - nothing) + 4 * (both - image)
            latents = scheduler.step(noise, t, latents).prev_sample
        picture = decoder.vae.decode(latents / decoder.vae.config.scaling_factor).sample
    drawn = decoder.sample(link, view, SampleSettings(steps=4, guidance=4.0, image_guidance=1.5))
    assert (drawn / 255 - (picture / 2 + 0.5).clamp(0, 1)).abs().max() < 1 / 255


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"image_guidance": 0.5}, "image_guidance must be at least 1, got 0.5"),
        ({"guidance": 1.0}, "guidance 1.0 is off, and image_guidance needs it"),
    ],
)
def test_guidance_that_the_pipeline_would_drop_raises_user_errors(keys, message):
    with pytest.raises(UserError, match=message):
        instruct_pix2pix().sample(make_link(1), make_pixels(), SampleSettings(**keys))


def test_default_guidance_that_would_refuse_every_edit_raises_user_errors():
    keys = {"image_size": 64, "unet": {}, "vae": {}, "guidance": 1.0}
    with pytest.raises(UserError, match="guidance 1 is off.*image_guidance: 1"):
        validate(InstructPix2PixSettings, keys, "test")
    validate(InstructPix2PixSettings, keys | {"image_guidance": 1.0}, "test")


def test_dropped_shares_add_up_to_less_than_one():
    keys = {"image_size": 64, "unet": {}, "vae": {}, "drop_text": 0.5, "drop_both": 0.3, "drop_image": 0.2}
    with pytest.raises(UserError, match="shares that add up to less than 1, got 1"):
        validate(InstructPix2PixSettings, keys, "test")
    with pytest.raises(UserError, match="max_image_size 32 must be at least image_size 64"):
        validate(InstructPix2PixSettings, {"image_size": 64, "max_image_size": 32, "unet": {}, "vae": {}}, "test")
