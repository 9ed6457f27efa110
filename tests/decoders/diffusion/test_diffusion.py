"""The base of the image decoders: sizes, losses, frozen modules, errors for invalid settings."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from support.diffusion_fakes import (
    SIDE,
    TEXT,
    TOKENS,
    UNET,
    VAE,
    WIDTH,
    instruct_pix2pix,
    make_link,
    make_pixels,
    make_targets,
    stable_diffusion,
)
from transformers import CLIPTextConfig

from lumen_ray.decoders.diffusion.modules import empty_caption_ids, fit_pixels
from lumen_ray.errors import UserError
from lumen_ray.precision import autocast_context, cast_weights_
from lumen_ray.structures import SampleSettings
from lumen_ray.superlink import SuperLink
from lumen_ray.targets import ImageTargets, Pixels

MAKERS = [stable_diffusion, instruct_pix2pix]


def test_the_modules_are_imported_without_the_libraries():
    code = (
        "import sys, lumen_ray.decoders.diffusion.stable_diffusion, lumen_ray.decoders.diffusion.instruct_pix2pix, "
        "lumen_ray.decoders.diffusion.published; print([m for m in ('diffusers', 'transformers') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"


def test_fit_pixels_downsamples_the_image_without_padding_by_area():
    images = torch.full((2, 3, 8, 8), 255, dtype=torch.uint8)
    images[0, :, :4, :2] = 0  # of a shown part 4 high and 4 wide: the left half
    images[1] = 100
    out = fit_pixels(images, torch.tensor([[4, 4], [8, 8]]), (2, 2))
    assert out.shape == (2, 3, 2, 2)
    assert torch.allclose(out[1], torch.full((3, 2, 2), 100 / 255))
    assert (out[0, :, :, 0] < 0.3).all()
    assert (out[0, :, :, 1] > 0.7).all()
    checkers = (torch.arange(16) % 2 * 255).to(torch.uint8).expand(1, 3, 16, 16)
    assert torch.allclose(fit_pixels(checkers, None, (4, 4)), torch.tensor(0.5), atol=0.1)  # no aliasing


def test_fit_pixels_of_an_image_does_not_depend_on_the_others():
    pixels = make_pixels(4, 20)
    extents = torch.tensor([[20, 12], [9, 20], [20, 12], [5, 5]])
    together = fit_pixels(pixels.images, extents, (16, 8))
    for i in range(4):
        alone = fit_pixels(pixels.images[i : i + 1], extents[i : i + 1], (16, 8))
        assert torch.allclose(together[i], alone[0], atol=1e-6)


@pytest.mark.parametrize("make", MAKERS)
def test_losses_are_sums_over_prompts_with_gradients_to_the_link(make):
    decoder = make(train_unet=True, train_vae=True, vae_images=2)
    link = make_link()
    link.embeddings.requires_grad_()
    torch.manual_seed(1)
    losses = decoder.losses(link, make_pixels(), make_targets())
    noise, _, vae = decoder.loss_names
    assert set(losses) == {noise, vae}
    assert losses[noise].count == 3
    assert losses[vae].count == 2
    assert torch.allclose(losses[noise].each.sum(), losses[noise].total)
    assert 0.5 < losses[noise].total / 3 < 2.5  # of unit noise
    (losses[noise].total + losses[vae].total).backward()
    assert link.embeddings.grad.abs().sum() > 0
    assert all(p.grad is not None for p in decoder.unet.parameters())
    assert all(p.grad is not None for p in decoder.vae.parameters())


@pytest.mark.parametrize("make", MAKERS)
def test_the_noise_loss_does_not_reach_the_vae(make):
    decoder = make(train_unet=True, train_vae=True)
    losses = decoder.losses(make_link(), make_pixels(), make_targets())
    losses[decoder.loss_names[0]].total.backward()
    assert all(p.grad is None for p in decoder.vae.parameters())


@pytest.mark.parametrize("make", MAKERS)
def test_the_vae_loss_is_reconstruction_and_kl(make):
    decoder = make(train_vae=True, vae_images=1, vae_kl_weight=0.5, vae_weight=2.0)
    targets = make_targets(1)
    pixels = 2 * fit_pixels(targets.images, None, (SIDE, SIDE)) - 1
    torch.manual_seed(4)
    loss = decoder.losses(make_link(1), make_pixels(), targets)[decoder.loss_names[2]]
    torch.manual_seed(4)
    torch.randperm(1)
    with torch.no_grad():
        posterior = decoder.vae.encode(pixels).latent_dist
        made = decoder.vae.decode(posterior.sample()).sample
    kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
    assert torch.allclose(loss.total, 2 * (F.mse_loss(made, pixels) + 0.5 * kl), atol=1e-5)


@pytest.mark.parametrize("make", MAKERS)
def test_no_prompts_give_finite_losses(make):
    decoder = make(train_unet=True, train_vae=True, text_encoder=TEXT)
    losses = decoder.losses(make_link(0), make_pixels(), make_targets(0))
    assert set(losses) == set(decoder.loss_names)
    assert all(term.total == 0 and term.count == 0 for term in losses.values())


@pytest.mark.parametrize("make", MAKERS)
def test_modules_that_the_settings_do_not_train_stay_frozen(make):
    decoder = make(train_unet=False, train_vae=False, text_encoder=TEXT)
    decoder.requires_grad_(True)  # as a stage of a recipe does with the parts it names
    assert not [name for name, p in decoder.named_parameters() if p.requires_grad]
    link = make_link()
    link.embeddings.requires_grad_()
    losses = decoder.losses(link, make_pixels(), make_targets())
    assert decoder.loss_names[2] not in losses
    losses[decoder.loss_names[0]].total.backward()
    assert link.embeddings.grad.abs().sum() > 0  # through the frozen UNet
    decoder = make(train_unet=True, train_vae=True)
    assert all(p.requires_grad for p in decoder.parameters())
    decoder.requires_grad_(False)
    assert decoder.loss_names[2] not in decoder.losses(make_link(), make_pixels(), make_targets())


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_target_of_the_unet_follows_prediction_type(make, kind, monkeypatch):
    decoder = make(train_unet=True, scheduler={"prediction_type": kind})
    seen = {}

    def unet(noisy, times, encoder_hidden_states):
        seen.update(noisy=noisy[:, :4], times=times)
        return type("Output", (), {"sample": torch.zeros_like(noisy[:, :4])})

    monkeypatch.setattr(decoder.unet, "forward", unet)
    torch.manual_seed(3)
    loss = decoder.losses(make_link(), make_pixels(), make_targets())[decoder.loss_names[0]]
    torch.manual_seed(3)
    with torch.no_grad():
        pixels = 2 * fit_pixels(make_targets().images, None, (SIDE, SIDE)) - 1
        latents = decoder.vae.encode(pixels).latent_dist.sample() * 0.18215
    noise = torch.randn_like(latents)
    share = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)[seen["times"]].view(-1, 1, 1, 1)
    a, b = share.sqrt(), (1 - share).sqrt()
    assert torch.allclose(seen["noisy"], a * latents + b * noise, atol=1e-5)
    wanted = {"epsilon": noise, "v_prediction": a * noise - b * latents, "sample": latents}[kind]
    assert torch.allclose(loss.each, wanted.square().flatten(1).mean(1), atol=1e-5)


@pytest.mark.parametrize("make", MAKERS)
def test_a_schedule_can_end_in_noise_alone(make, monkeypatch):
    """With "rescale_betas_zero_snr" nothing of a picture is left in the last step, in which sampling starts."""
    keys = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    decoder = make(train_unet=True, scheduler=keys)
    monkeypatch.setattr(torch, "randint", lambda most, size, **_: torch.full(size, most - 1))
    seen = {}

    def unet(noisy, times, encoder_hidden_states):
        seen.update(noisy=noisy[:, :4], times=times)
        return type("Output", (), {"sample": torch.zeros_like(noisy[:, :4])})

    monkeypatch.setattr(decoder.unet, "forward", unet)
    found = []
    for value in (0, 255):
        targets = make_targets()
        targets.images = torch.full_like(targets.images, value)
        torch.manual_seed(3)
        decoder.losses(make_link(), make_pixels(), targets)
        found.append(seen["noisy"])
    assert torch.allclose(*found, atol=1e-3)
    scheduler = decoder._scheduler(decoder.settings.sampler)
    scheduler.set_timesteps(5)
    assert scheduler.timesteps[0] == seen["times"][0] == 999


@pytest.mark.parametrize("make", MAKERS)
def test_the_first_steps_add_noise_in_bfloat16(make, monkeypatch):
    """Where sqrt(1 - share) is 0.01 to 0.03, of which bf16 would leave nothing."""
    decoder, link, view, targets, seen = make(train_unet=True), make_link(), make_pixels(), make_targets(), {}
    monkeypatch.setattr(torch, "randint", lambda most, size, **_: torch.arange(size[0]))

    def unet(noisy, times, encoder_hidden_states):
        seen["noisy"] = noisy[:, :4]
        return type("Output", (), {"sample": torch.zeros_like(noisy[:, :4])})

    monkeypatch.setattr(decoder.unet, "forward", unet)
    found = []
    for noise in (0.0, 1.0):
        monkeypatch.setattr(torch, "randn_like", lambda like, noise=noise: torch.full_like(like, noise))
        torch.manual_seed(0)
        with autocast_context(True, torch.device("cpu")):
            decoder.losses(link, view, targets)
        found.append(seen["noisy"])
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000)[:3] ** 2
    wanted = (1 - torch.cumprod(1 - betas, 0)).sqrt()
    added = (found[1] - found[0]).float().flatten(1)
    torch.testing.assert_close(added, wanted[:, None].expand_as(added), atol=1e-4, rtol=0)


@pytest.mark.parametrize("make", MAKERS)
def test_links_are_aligned_with_encoded_captions(make):
    decoder = make(text_encoder=TEXT, align_weight=0.5).eval()
    ids = torch.randint(20, (3, TOKENS))
    with torch.no_grad():
        said = decoder.text_encoder(ids).last_hidden_state
    link = make_link()
    link.embeddings = said.clone()
    link.embeddings[1:] += torch.tensor([2.0, 4.0])[:, None, None]
    losses = decoder.losses(link, make_pixels(), make_targets(caption_ids=ids))
    align = losses[decoder.loss_names[1]]
    assert align.count == 3
    assert torch.allclose(align.total, torch.tensor(0.5 * (4 + 16)), atol=1e-4)
    assert losses.keys() == decoder.losses(link, make_pixels(), make_targets()).keys()


def test_the_empty_condition_is_the_encoded_empty_text_or_learned():
    decoder = stable_diffusion(text_encoder=TEXT).eval()
    assert decoder.null is None
    ids = torch.tensor([[18, *[19] * (TOKENS - 1)]])
    assert torch.equal(empty_caption_ids(decoder.text_encoder.config), ids)
    with torch.no_grad():
        assert torch.equal(decoder.empty_condition(), decoder.text_encoder(ids).last_hidden_state)
    own = CLIPTextConfig(**{**TEXT, "bos_token_id": 5, "eos_token_id": 6})
    assert empty_caption_ids(own).tolist() == [[5, *[6] * (TOKENS - 1)]]
    decoder = stable_diffusion(train_unet=True)
    assert decoder.empty_condition().shape == (1, TOKENS, WIDTH)
    torch.manual_seed(0)
    decoder.settings = decoder.settings.model_copy(update={"drop_text": 1.0})
    decoder.losses(make_link(), make_pixels(), make_targets())["generate"].total.backward()
    assert decoder.null.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"unet": {**UNET, "in_chanels": 4}}, "unknown key 'stable_diffusion.unet.in_chanels'; did you mean 'in_cha"),
        ({"vae": {**VAE, "norm_groups": 4}}, "unknown key 'stable_diffusion.vae.norm_groups'"),
        ({"scheduler": {"beta_begin": 0.1}}, "unknown key 'stable_diffusion.scheduler.beta_begin'"),
        ({"text_encoder": {**TEXT, "width": 4}}, "unknown key 'stable_diffusion.text_encoder.width'"),
        ({"unet": {**UNET, "in_channels": 8}}, "unet.in_channels must be 4"),
        ({"unet": {**UNET, "out_channels": 3}}, "unet.out_channels must be vae.latent_channels, 4"),
        ({"unet": {**UNET, "down_block_types": ["DownBlock2D"]}}, "stable_diffusion.unet: "),
        ({"image_size": 20}, "image_size must be a multiple of 8"),
        ({"mapper_heads": 3}, "mapper_heads must divide unet.cross_attention_dim, 16"),
        ({"text_encoder": {**TEXT, "hidden_size": 8}}, "text_encoder.hidden_size must be"),
        ({"num_tokens": 5, "text_encoder": TEXT}, "text_encoder.max_position_embeddings must be num_tokens, 5"),
    ],
)
def test_settings_that_do_not_fit_raise_user_errors(keys, message):
    with pytest.raises(UserError) as error:
        stable_diffusion(**keys)
    assert message in str(error.value)
    assert error.value.reason == "invalid_config"


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"size": (16, 20)}, "the size 20x16 cannot be drawn; give a width and a height that are multiples of 8"),
        ({"size": (0, 16)}, "the size 16x0 cannot be drawn"),
        ({"size": (16, 72)}, "the size 72x16 is too large; give sides of at most 64"),
        ({"steps": 0}, "cannot draw in 0 steps; give a number from 1 to 999"),
        ({"steps": 1000}, "cannot draw in 1000 steps; give a number from 1 to 999"),
        ({"steps": 1001}, "cannot draw in 1001 steps"),
        ({"guidance": float("nan")}, "guidance must be a finite number"),
        ({"num_images": 0}, "num_images must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"seed": -1}, "the seed must not be negative"),
    ],
)
def test_invalid_sampling_raises_user_errors(make, keys, message):
    with pytest.raises(UserError) as error:
        make().sample(make_link(), make_pixels(), SampleSettings(**keys))
    assert message in str(error.value)
    assert error.value.reason == "invalid_sampling"


@pytest.mark.parametrize("make", MAKERS)
def test_guidance_defaults_to_the_decoders_settings(make):
    own = {"guidance": 3.0} | ({"image_guidance": 2.0} if make is instruct_pix2pix else {})
    decoder = make(**own).eval()

    def draw(**keys):
        return decoder.sample(make_link(), make_pixels(), SampleSettings(steps=2, **keys))

    assert torch.equal(draw(), draw(**own))
    for name in own:
        assert not torch.equal(draw(), draw(**{name: 5.0}))


@pytest.mark.parametrize("make", MAKERS)
def test_a_picture_depends_on_seed_and_prompt_not_on_its_neighbours(make):
    decoder = make().eval()
    link, view = make_link(3), make_pixels()
    settings = SampleSettings(steps=2, num_images=2, batch_size=6, size=(16, 24))
    together = decoder.sample(link, view, settings)
    assert together.shape == (6, 3, 16, 24)
    assert together.dtype == torch.uint8
    in_chunks = decoder.sample(link, view, SampleSettings(steps=2, num_images=2, batch_size=4, size=(16, 24)))
    for i in range(3):
        part = SuperLink("x", link.embeddings[i : i + 1], link.image_index[i : i + 1], link.parent[i : i + 1])
        alone = decoder.sample(part, view, settings)
        for other in (together, in_chunks):
            assert (alone.int() - other[2 * i : 2 * i + 2].int()).abs().max() <= 1
        assert (alone[0] != alone[1]).float().mean() > 0.3  # two pictures of one prompt
    later = decoder.sample(link, view, SampleSettings(steps=2, seed=1, size=(16, 24)))
    assert (later.int() - together[1::2].int()).abs().max() <= 1  # picture n is that of seed + n
    assert not decoder.vae.use_slicing  # as training wants it


@pytest.mark.parametrize("make", MAKERS)
def test_no_prompts_give_no_pictures(make):
    pictures = make().sample(make_link(0), make_pixels(), SampleSettings(steps=1))
    assert pictures.shape == (0, 3, SIDE, SIDE)


@pytest.mark.parametrize("make", MAKERS)
def test_sampling_chunks_bound_the_batch(make, monkeypatch):
    decoder = make().eval()
    sizes = []
    draw = decoder._draw
    monkeypatch.setattr(decoder, "_draw", lambda link, *rest: (sizes.append(len(link)), draw(link, *rest))[1])
    decoder.sample(make_link(3), make_pixels(), SampleSettings(steps=1, num_images=3, batch_size=4))
    assert sizes == [4, 4, 1]


@pytest.mark.parametrize("sampler", ["DDPMScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_samplers_that_draw_noise_keep_prompts_apart(sampler):
    decoder = stable_diffusion(sampler=sampler).eval()
    link, view = make_link(2), make_pixels()
    together = decoder.sample(link, view, SampleSettings(steps=3))
    part = SuperLink("x", link.embeddings[1:], link.image_index[1:], link.parent[1:])
    alone = decoder.sample(part, view, SampleSettings(steps=3))
    assert (alone.int() - together[1:].int()).abs().max() <= 1


def test_targets_move_with_all_they_hold():
    targets = ImageTargets(make_targets().images, torch.ones(3, 2, dtype=torch.int64))
    moved = targets.to("meta")
    assert moved.images.is_meta
    assert moved.extents.is_meta
    assert moved.caption_ids is None


def test_targets_are_cropped_to_their_extents():
    decoder = stable_diffusion(train_unet=True)
    images = make_targets(2, side=24).images
    extents = torch.tensor([[24, 16], [16, 24]])
    other = images.clone()
    other[0, :, :, 16:], other[1, :, 16:] = 0, 255
    losses = []
    for pictures in (images, other):
        torch.manual_seed(0)
        targets = ImageTargets(pictures, extents)
        losses.append(decoder.losses(make_link(2), make_pixels(), targets)["generate"].total)
    assert losses[0] == losses[1]


@pytest.mark.parametrize("make", MAKERS)
def test_images_are_batched_by_size_and_not_stretched(make, monkeypatch):
    decoder, seen = make(train_unet=True, train_vae=True, vae_images=3), []
    extents = torch.tensor([[24, 16], [16, 16], [24, 16], [16, 24]])
    targets = ImageTargets(make_targets(4, side=24).images, extents)
    shown = [image[:, :h, :w].float() / 127.5 - 1 for image, (h, w) in zip(targets.images, extents, strict=True)]
    learn, encode = decoder._noise_loss, decoder.vae.encode

    def noise_loss(link, view, pixels):
        seen.append((tuple(pixels.shape), link.embeddings))
        return learn(link, view, pixels)._replace(each=pixels.flatten(1).mean(1))

    monkeypatch.setattr(decoder, "_noise_loss", noise_loss)
    link = make_link(4)
    losses = decoder.losses(link, make_pixels(), targets)
    noise, _, vae = decoder.loss_names
    assert losses[noise].count == 4 and losses[vae].count == 3
    torch.testing.assert_close(losses[noise].each, torch.stack([image.mean() for image in shown]))
    together = dict(seen)
    assert set(together) == {(2, 3, 24, 16), (1, 3, 16, 16), (1, 3, 16, 24)}
    assert torch.equal(together[2, 3, 24, 16], link.embeddings[[0, 2]])
    sources = {tuple(pixels.shape[-2:]) for pixels in _encoded(decoder, encode, link, targets, monkeypatch)}
    assert sources == {(24, 16), (16, 16), (16, 24)}  # a picture to edit is as large as the one that it becomes


def _encoded(decoder, encode, link, targets, monkeypatch):
    """All that the VAE encodes in a training step."""
    found = []
    monkeypatch.setattr(decoder.vae, "encode", lambda pixels: found.append(pixels) or encode(pixels))
    decoder.losses(link, make_pixels(), targets)
    return found


def test_pixels_of_the_view_do_not_matter_to_text_to_image():
    decoder = stable_diffusion().eval()
    settings = SampleSettings(steps=1)
    blank = Pixels(torch.zeros(2, 3, 24, 24, dtype=torch.uint8), torch.tensor([[24, 24]] * 2))
    first, second = (decoder.sample(make_link(), view, settings) for view in (make_pixels(), blank))
    assert torch.equal(first, second)


@pytest.mark.parametrize("make", MAKERS)
def test_losses_in_bfloat16_are_close_to_float32(make):
    """Autocast, as in training; the VAE with it, whose latents get noise."""
    decoder, found = make(train_unet=True, train_vae=True), {}
    for low in (False, True):
        decoder.zero_grad()
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            losses = decoder.losses(make_link(), make_pixels(), make_targets())
        sum(term.total for term in losses.values()).backward()
        found[low] = losses, torch.cat([p.grad.flatten() for p in decoder.parameters() if p.grad is not None])
    for name, term in found[False][0].items():
        low = found[True][0][name].total
        assert low.dtype == torch.float32 and low != term.total
        torch.testing.assert_close(low, term.total, rtol=0.02, atol=0)
    exact, low = (gradient for _, gradient in found.values())
    assert low.dtype == torch.float32 and (exact - low).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("make", MAKERS)
def test_pictures_in_bfloat16_are_close_to_float32(make):
    """Weights as a model that answers has them: the noise is the same, latents and the VAE stay fp32."""
    decoder, settings = make(), SampleSettings(steps=6, num_images=2)
    exact = decoder.sample(make_link(), make_pixels(), settings)
    cast_weights_(decoder, "bfloat16")
    assert {p.dtype for p in decoder.vae.parameters()} == {torch.float32} == {decoder.unet.dtype}
    assert decoder.unet.down_blocks[0].resnets[0].conv1.weight.dtype == torch.bfloat16
    with autocast_context(True, torch.device("cpu")):
        low = decoder.sample(make_link(), make_pixels(), settings)
    apart = (exact.int() - low.int()).abs().float()
    assert 0 < apart.mean() < 1 and apart.max() < 16  # of 255
