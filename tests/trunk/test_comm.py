"""COMM's merge against a plain sum over the encoders' own hidden states; the ablation settings; other input sizes."""

import pytest
import torch
from support.tiny_models import CLIP, DINOV2, SIDE, random_images, scene_batch, tiny_model

from lumen_ray.trunk.comm import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, CommVision
from lumen_ray.trunk.settings import VisionSettings


def images(count=2, side=SIDE):
    return random_images(count, side).float() / 255


def scrambled(module):
    """Random values in every parameter: fresh norms and merge weights are too regular to tell errors apart."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape) * 0.2)
    return module.eval()


def comm(**changes):
    return scrambled(CommVision(VisionSettings(**{"clip": CLIP, "dinov2": DINOV2, "mlp_ratio": 2} | changes), SIDE, 24))


def written_out(encoder, pixels, mean, std, chosen):
    """sum_i w_i * Linear_i(LN_i(h_i)) from `transformers`' own list of hidden states (its entry 0 is the embedding)."""
    normalised = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    states = encoder.model(normalised, output_hidden_states=True).hidden_states
    total = 0.0
    for i, layer in enumerate(chosen):
        h = states[layer + 1][:, 1:]
        norm, linear = encoder.merge.norms[i], encoder.merge.projections[i]
        centred = h - h.mean(-1, keepdim=True)
        h = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + norm.eps) * norm.weight + norm.bias
        total = total + encoder.merge.weights[i] * (h @ linear.weight.T + linear.bias)
    return total


def test_clip_merges_all_layers_as_the_written_out_sum():
    vision = comm()
    pixels = images()
    expected = written_out(vision.clip, pixels, CLIP_MEAN, CLIP_STD, range(2))
    assert vision.clip(pixels).shape == (2, 16, 16)
    torch.testing.assert_close(vision.clip(pixels), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("choice,layers", [("all", (0, 1, 2, 3, 4)), ("last_quarter", (3, 4)), ("last", (4,))])
def test_dinov2_merges_the_chosen_layers_as_the_written_out_sum(choice, layers):
    vision = comm(dinov2=DINOV2 | {"num_hidden_layers": 5}, dinov2_layers=choice)
    pixels = images()
    expected = written_out(vision.dinov2, pixels, IMAGENET_MEAN, IMAGENET_STD, layers)
    torch.testing.assert_close(vision.dinov2(pixels), expected, atol=2e-5, rtol=2e-5)


def projected(vision, features):
    """The projection and its normalisation, written out."""
    x = features @ vision.projector.weight.T + vision.projector.bias
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    return x * vision.token_norm.weight + vision.token_norm.bias


def test_tokens_are_clip_beside_the_mlp_of_dinov2_projected():
    vision = comm()
    pixels = images()
    tokens, merged = vision(pixels)
    first, _, second = vision.dinov2_mlp
    dino = second(torch.nn.functional.gelu(first(vision.dinov2(pixels))))
    both = torch.cat([vision.clip(pixels), dino], dim=-1)
    torch.testing.assert_close(tokens, projected(vision, both), atol=2e-5, rtol=2e-5)
    assert merged.shape == (2, 32, 4, 4)
    torch.testing.assert_close(merged[:, :, 1, 2], both[:, 1 * 4 + 2])  # row-major: y, then x


def test_token_merge_puts_a_square_of_neighbours_into_one_token():
    vision = comm(token_merge=2)
    tokens, merged = vision(images())
    assert tokens.shape == (2, 4, 24)
    square = torch.cat([merged[:, :, y, x] for y in (2, 3) for x in (0, 1)], dim=-1)  # third token: row 1, column 0
    torch.testing.assert_close(tokens[:, 2], projected(vision, square), atol=2e-5, rtol=2e-5)


def test_tokens_that_read_the_stem_add_its_cells_mean_colours_and_places():
    vision = scrambled(CommVision(VisionSettings(clip=CLIP, token_merge=2), SIDE, 24, stem_width=6))
    pixels, stem = images(), torch.randn(2, 6, 4, 4)  # the stem at twice the tokens' resolution
    tokens, merged = vision(pixels, stem)
    square = torch.cat([merged[:, :, y, x] for y in (2, 3) for x in (0, 1)], dim=-1)  # third token: row 1, column 0
    colour = pixels[:, :, SIDE // 2 :, : SIDE // 2].mean((2, 3)) * 4 - 2
    place = torch.tensor([-0.5, 0.5]).expand(2, -1)  # x, y of the cell's centre
    cell = torch.cat([stem[:, :, 2:, :2].mean((2, 3)), colour, place], dim=-1)
    read = square @ vision.projector.weight.T + vision.projector.bias
    read = read + cell @ vision.from_stem.weight.T + vision.from_stem.bias
    expected = torch.nn.functional.layer_norm(read, (24,), vision.token_norm.weight, vision.token_norm.bias)
    torch.testing.assert_close(tokens[:, 2], expected, atol=2e-5, rtol=2e-5)


def test_tokens_enter_the_llm_on_the_scale_of_its_embeddings():
    vision = CommVision(VisionSettings(clip=CLIP), 64, 24, token_std=0.05)
    assert vision(images())[0].std().item() == pytest.approx(0.05, rel=0.1)
    assert vision(images() * 0.1)[0].std().item() == pytest.approx(0.05, rel=0.1)  # whatever the encoders' scale


def test_native_size_uses_the_positions_as_they_are_and_other_sizes_interpolate_them():
    vision = comm()
    with torch.no_grad():
        native, _ = vision(images())
        for side, tokens in ((96, 36), (32, 4)):
            out, merged = vision(images(side=side))
            assert out.shape == (2, tokens, 24) and merged.shape[-1] == side // 16
            assert out.isfinite().all()
        # other sizes leave nothing behind
        torch.testing.assert_close(vision(images())[0], native)
        before = vision(images(side=96))[0]
        vision.clip.model.embeddings.position_embedding.weight.add_(torch.randn(17, 16))
        assert (vision(images(side=96))[0] - before).abs().max() > 1e-3  # positions do enter at other sizes


@pytest.mark.parametrize("off", ["clip", "dinov2", None])
def test_every_ablation_trains(off):
    settings = {"clip": CLIP, "dinov2": DINOV2, "mlp_ratio": 2}
    if off:
        settings[off] = None
    model = tiny_model(vision=settings)
    batch = scene_batch(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(4):
        total = sum(term.total / term.count.clamp_min(1) for term in model(batch).values())
        optimizer.zero_grad()
        total.backward()
        for name in {"clip", "dinov2"} - {off}:
            encoder = getattr(model.trunk.vision, name)
            assert encoder.merge.weights.grad.abs().min() > 0
            embedded = [p.grad for p in encoder.model.embeddings.parameters() if p.grad is not None]
            assert embedded and all(g.abs().sum() > 0 for g in embedded)  # all the way down to the pixels
        optimizer.step()
        losses.append(float(total.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("shape", [(96, 32), (32, 128), (64, 64)])
def test_positions_of_an_input_that_is_not_square_are_interpolated_per_axis(shape):
    vision = comm(token_merge=2)
    rows, columns = shape[0] // 16, shape[1] // 16
    clip = vision.clip.model.embeddings.position_embedding.weight[1:]
    dinov2 = vision.dinov2.model.embeddings.position_embeddings[0, 1:]
    for encoder, stored in ((vision.clip, clip), (vision.dinov2, dinov2)):
        grid = stored.detach().T.reshape(1, -1, 4, 4)
        wanted = torch.nn.functional.interpolate(grid, (rows, columns), mode="bicubic", align_corners=False)
        if encoder is vision.clip:
            encoder.model.pre_layrnorm = torch.nn.Identity()
        patches = encoder._embed(torch.zeros(1, 3, *shape))[:, 1:] - wanted.flatten(2).transpose(1, 2)
        torch.testing.assert_close(patches, patches[:, :1].expand_as(patches), atol=1e-5, rtol=1e-5)  # all one colour
    tokens, merged = vision(torch.rand(1, 3, *shape, generator=torch.Generator().manual_seed(0)))
    assert vision.grid(*shape) == (rows // 2, columns // 2)
    assert tokens.shape[1] == (rows // 2) * (columns // 2) and merged.shape == (1, 32, rows, columns)
    last = torch.cat([merged[:, :, y, x] for y in (rows - 2, rows - 1) for x in (columns - 2, columns - 1)], dim=-1)
    torch.testing.assert_close(tokens[:, -1], projected(vision, last), atol=2e-5, rtol=2e-5)
