"""Text to image: what is dropped in training, and the pipeline of `diffusers` as the known answer."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from support.diffusion_fakes import TEXT, make_link, make_pixels, make_targets, stable_diffusion

from lumen_ray.cancellation import Cancelled, wanted_while
from lumen_ray.decoders.base import SampleSettings
from lumen_ray.decoders.diffusion.schedulers import make_scheduler


def conditions(decoder, link, draws, monkeypatch):
    """What the UNet is conditioned on where the draws are as given."""
    seen = {}
    monkeypatch.setattr(torch, "rand", lambda *size, **kw: torch.tensor(draws))

    def unet(noisy, times, encoder_hidden_states):
        seen["condition"] = encoder_hidden_states
        return type("Output", (), {"sample": torch.zeros_like(noisy[:, :4])})

    monkeypatch.setattr(decoder.unet, "forward", unet)
    decoder.losses(link, make_pixels(), make_targets(len(link)))
    return seen["condition"]


@pytest.mark.parametrize("text", [None, TEXT])
def test_a_fifth_of_the_prompts_are_dropped_in_training(text, monkeypatch):
    decoder, link = stable_diffusion(text_encoder=text).eval(), make_link(4)
    condition = conditions(decoder, link, [0.0, 0.19, 0.21, 0.9], monkeypatch)
    empty = decoder.empty_condition()[0]
    assert torch.equal(condition, torch.stack([empty, empty, link.embeddings[2], link.embeddings[3]]))


@pytest.mark.parametrize("sampler", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"])
@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_pictures_are_those_of_the_pipeline(sampler, guidance):
    import diffusers

    keys = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    keys |= {"skip_prk_steps": True} if sampler == "PNDMScheduler" else {}
    keys |= {"clip_sample": False} if sampler == "DDIMScheduler" else {}
    decoder = stable_diffusion(text_encoder=TEXT, scheduler=keys, sampler=sampler).eval()
    pipeline = StableDiffusionPipeline(
        vae=decoder.vae,
        text_encoder=decoder.text_encoder,
        tokenizer=None,
        unet=decoder.unet,
        scheduler=getattr(diffusers, sampler)(**keys),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    link = make_link(2)
    noise = torch.cat([torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5)) for _ in range(2)])
    expected = pipeline(
        prompt_embeds=link.embeddings,
        negative_prompt_embeds=decoder.empty_condition().expand(2, -1, -1),
        latents=noise,
        num_inference_steps=6,
        guidance_scale=guidance,
        output_type="pt",
    ).images
    settings = SampleSettings(steps=6, guidance=guidance, seed=5)
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    drawn = decoder._draw(link, make_pixels(), (16, 16), settings, generators)
    assert drawn.std() > 0.05
    assert torch.allclose(drawn, expected, atol=1e-4)
    assert torch.equal(decoder.sample(link, make_pixels(), settings), (drawn * 255).round().to(torch.uint8))


@pytest.mark.parametrize("keys", [{}, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}])
def test_sampling_is_classifier_free_guidance_written_out(keys):
    """The same by hand: both conditions by themselves, extrapolated, DDIM's steps."""
    published = stable_diffusion().settings.scheduler
    decoder, link = stable_diffusion(scheduler={**published, **keys}).eval(), make_link(1)
    scheduler = make_scheduler("DDIMScheduler", decoder.settings.scheduler)
    scheduler.set_timesteps(4)
    with torch.no_grad():
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        for t in scheduler.timesteps:
            empty = decoder.unet(latents, t, encoder_hidden_states=decoder.empty_condition()).sample
            given = decoder.unet(latents, t, encoder_hidden_states=link.embeddings).sample
            latents = scheduler.step(empty + 3 * (given - empty), t, latents).prev_sample
        picture = decoder.vae.decode(latents / decoder.vae.config.scaling_factor).sample
    expected = (picture / 2 + 0.5).clamp(0, 1)
    drawn = decoder.sample(link, make_pixels(), SampleSettings(steps=4, guidance=3.0))
    assert (drawn / 255 - expected).abs().max() < 1 / 255


def test_pictures_that_nobody_waits_for_are_given_up_between_steps(monkeypatch):
    decoder, passes = stable_diffusion().eval(), []
    forward = decoder.unet.forward
    monkeypatch.setattr(decoder.unet, "forward", lambda *args, **more: passes.append(1) or forward(*args, **more))
    with wanted_while(lambda: len(passes) < 3), pytest.raises(Cancelled):
        decoder.sample(make_link(1), make_pixels(), SampleSettings(steps=50))
    assert len(passes) == 3
