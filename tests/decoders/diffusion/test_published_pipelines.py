"""Published folders: tiny checkpoints saved by the libraries' classes are loaded into a decoder."""

import json
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline
from support.diffusion_fakes import SIDE, TEXT, TOKENS, instruct_pix2pix, make_link, make_pixels, stable_diffusion
from support.tiny_models import clip_tokenizer
from transformers import CLIPTokenizer

from lumen_ray.config import validate
from lumen_ray.decoders.base import SampleSettings
from lumen_ray.decoders.diffusion.modules import empty_caption_ids
from lumen_ray.decoders.diffusion.published import load_published, published_settings, published_tokenizer
from lumen_ray.decoders.diffusion.settings import StableDiffusionSettings
from lumen_ray.decoders.diffusion.stable_diffusion import StableDiffusionDecoder
from lumen_ray.errors import UserError


def save(folder, decoder, scheduler, **options):
    decoder.unet.save_pretrained(folder / "unet", **options)
    decoder.vae.save_pretrained(folder / "vae", **options)
    decoder.text_encoder.save_pretrained(folder / "text_encoder")
    scheduler.save_pretrained(folder / "scheduler")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    scheduler = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True)
    save(folder, stable_diffusion(seed=5, text_encoder=TEXT), scheduler)
    return folder


def test_a_published_folder_becomes_a_decoder(folder):
    keys = published_settings(folder)
    assert keys["sampler"] == "PNDMScheduler"
    assert keys["num_tokens"] == TOKENS
    assert keys["image_size"] == SIDE
    settings = validate(StableDiffusionSettings, {**keys, "mapper_heads": 2}, "test")
    torch.manual_seed(99)
    decoder = StableDiffusionDecoder(settings).eval()
    load_published(decoder, folder)
    saved = stable_diffusion(seed=5, text_encoder=TEXT).state_dict()
    assert saved.keys() == decoder.state_dict().keys()
    assert all(torch.equal(value, saved[name]) for name, value in decoder.state_dict().items())


def test_its_pictures_are_those_of_the_pipeline_loaded_from_it(folder, tmp_path):
    decoder = StableDiffusionDecoder(
        validate(StableDiffusionSettings, {**published_settings(folder), "mapper_heads": 2}, "test")
    ).eval()
    load_published(decoder, folder)
    shutil.copytree(folder, tmp_path / "whole")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "scheduler": ["diffusers", "PNDMScheduler"],
    }
    (tmp_path / "whole" / "model_index.json").write_text(json.dumps(index))
    pipeline = StableDiffusionPipeline.from_pretrained(
        tmp_path / "whole",
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
        local_files_only=True,
    )
    pipeline.set_progress_bar_config(disable=True)
    link = make_link(1)
    ids = empty_caption_ids(pipeline.text_encoder.config)
    expected = pipeline(
        prompt_embeds=link.embeddings,
        negative_prompt_embeds=pipeline.text_encoder(ids).last_hidden_state.detach(),
        generator=torch.Generator().manual_seed(0),
        num_inference_steps=5,
        output_type="pt",
    ).images
    drawn = decoder.sample(link, make_pixels(), SampleSettings(steps=5))
    assert (drawn / 255 - expected).abs().max() < 0.5 / 255 + 1e-4


def test_pickles_are_read_only_where_allowed(tmp_path):
    decoder = stable_diffusion(seed=5, text_encoder=TEXT)
    save(tmp_path, decoder, DDIMScheduler(), safe_serialization=False)
    other = stable_diffusion(seed=6, text_encoder=TEXT)
    with pytest.raises(UserError, match="no unet weights in safetensors format can be read") as error:
        load_published(other, tmp_path)
    assert error.value.reason == "missing_weights"
    load_published(other, tmp_path, allow_pickle=True)
    assert torch.equal(other.unet.conv_in.weight, decoder.unet.conv_in.weight)


def test_missing_or_unsuitable_weights_raise_user_errors(folder, tmp_path):
    with pytest.raises(UserError, match="unet/config.json is missing"):
        published_settings(tmp_path)
    with pytest.raises(UserError, match="unet/config.json is missing"):
        load_published(stable_diffusion(), tmp_path)
    with pytest.raises(UserError, match=r"the unet in .* does not fit the settings instruct_pix2pix\.unet"):
        load_published(instruct_pix2pix(text_encoder=TEXT), folder)
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "KDPM2DiscreteScheduler"}')
    with pytest.raises(
        UserError, match="has the scheduler 'KDPM2DiscreteScheduler', which is not one of DDIMScheduler"
    ):
        published_settings(broken)
    (broken / "vae" / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        published_settings(broken)


CAPTIONS = ["red b", "", "A  RED red, dearer"]


@pytest.mark.parametrize("files", ["tokenizer.json", "vocab.json"])
def test_captions_become_ids_as_clip_reads_them(folder, tmp_path, files):
    whole = shutil.copytree(folder, tmp_path / "whole")
    if files == "tokenizer.json":
        clip_tokenizer().save_pretrained(whole / "tokenizer")
    else:  # as folders were published first
        (whole / "tokenizer").mkdir()
        clip_tokenizer().backend_tokenizer.model.save(str(whole / "tokenizer"))
        (whole / "tokenizer" / "tokenizer_config.json").write_text('{"model_max_length": 77}')
    tokenizer = published_tokenizer(whole)
    expected = clip_tokenizer()(CAPTIONS, padding="max_length", truncation=True, max_length=TOKENS).input_ids
    assert [tokenizer.encode(caption).ids for caption in CAPTIONS] == expected
    rows = len(clip_tokenizer())
    assert expected[0] == [rows - 2, 53, 27, *[rows - 1] * (TOKENS - 3)] and expected[2][-1] == rows - 1
    config = stable_diffusion(text_encoder={**TEXT, "vocab_size": rows}).text_encoder.config
    assert empty_caption_ids(config)[0].tolist() == expected[1]


def test_the_tokenizers_padding_token_is_kept(folder, tmp_path):
    """Stable Diffusion 2 pads with "!", which is id 0."""
    whole = shutil.copytree(folder, tmp_path / "whole")
    own = CLIPTokenizer(clip_tokenizer().get_vocab(), [], pad_token="z")
    own.save_pretrained(whole / "tokenizer")
    assert published_tokenizer(whole).encode("b").ids[-1] == own.pad_token_id == 25


def test_a_missing_or_damaged_tokenizer_raises_user_errors(folder, tmp_path):
    whole = shutil.copytree(folder, tmp_path / "whole")

    def refused():
        with pytest.raises(UserError) as error:
            published_tokenizer(whole)
        assert "\n" not in str(error.value) and str(whole) in str(error.value)
        return error.value.reason

    assert refused() == "missing_tokenizer"
    (whole / "tokenizer").mkdir()
    (whole / "tokenizer" / "vocab.json").write_text("{}")
    assert refused() == "missing_tokenizer"
    (whole / "tokenizer" / "tokenizer.json").write_text("nothing")
    assert refused() == "damaged_weights"
