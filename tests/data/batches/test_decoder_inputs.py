"""Inputs of decoders with another image size: the same samples as for the trunk, in the frame of the decoder."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from support.tiny_models import EXPERTS, SIDE, tiny_model, tiny_settings, tiny_tokenizer

from lumen_ray.data.batches.collate import Collator
from lumen_ray.data.batches.feed import BatchReader
from lumen_ray.data.images import decode
from lumen_ray.data.shards.schema import make_message, make_row
from lumen_ray.data.shards.shards import ShardWriter, build_manifest, write_manifest
from lumen_ray.input_size import PictureSize, ShortSide
from lumen_ray.model.build import images_and_targets
from lumen_ray.recipe import AugmentSettings, BranchSettings, Recipe
from lumen_ray.structures import Masks

RULE = ShortSide(2 * SIDE, 3 * SIDE)
OWN = {"grounding_dino": RULE, "unipose": RULE}
NAMES = ("left eye", "right eye")
MOVED = AugmentSettings(flip_x=True, flip_y=True, turn=True, scale=(0.6, 1.6), shift=0.1, color=0.4)
FEW = BranchSettings(negatives=1, max_poses=1)


def photo(height, width, box, stripe=8):
    """Dark stripes, and a bright square at `box` with two keypoints in it: (image, row)."""
    image = np.zeros((height, width, 3), np.uint8)
    image[:, np.arange(width) // stripe % 2 == 0] = 60
    x1, y1, x2, y2 = box
    image[y1:y2, x1:x2] = 250
    mask = np.zeros((1, height, width), bool)
    mask[0, y1:y2, x1:x2] = True
    middle = (y1 + y2) / 2
    points = [x1 + 2.0, middle, 2, x2 - 2.0, middle, 2]
    instance = {
        "phrase": "face", "box": [float(v) for v in box], "mask": Masks.from_arrays(mask).rles[0], "keypoints": points,
        "crowd": False, "area": float((x2 - x1) * (y2 - y1)),
    }  # fmt: skip
    Image.fromarray(image).save(buffer := io.BytesIO(), "PNG")
    columns = {"tasks": ["detect", "segment", "pose"], "classes": ["face"], "instances": [instance]}
    return image, make_row("photo", buffer.getvalue(), (height, width), "test", **columns)


PHOTOS = [photo(120, 160, (30, 20, 90, 80)), photo(160, 100, (20, 40, 70, 110)), photo(90, 90, (8, 8, 60, 70))]


def collate(photos=PHOTOS, input_rules=None, augment=AugmentSettings(), tasks=("detect", "segment", "pose"), seed=0):  # noqa: B008
    collator = Collator(
        tiny_tokenizer(),
        SIDE,
        tasks,
        {"face": NAMES},
        FEW,
        augment,
        input_rules=OWN if input_rules is None else input_rules,
    )
    rngs = [np.random.default_rng((seed, i)) for i in range(len(photos))]
    return collator([row for _, row in photos], [image for image, _ in photos], rngs)


def bright(image):
    """xyxy [4] of the bright square in uint8 [3, h, w]."""
    ys, xs = torch.nonzero(image.float().mean(0) > image.float().mean(0).max() * 0.75, as_tuple=True)
    return torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).float()


def test_the_trunk_input_does_not_change():
    """No random draw is made for another size."""
    plain, own = collate(input_rules={}, augment=MOVED), collate(augment=MOVED)
    assert plain.pixels == {} and set(plain.targets) == {"perception"}
    assert torch.equal(plain.images, own.images) and plain.tasks == own.tasks
    for name, value in vars(plain.targets["perception"]).items():
        assert torch.equal(value, getattr(own.targets["perception"], name)), name


def test_the_image_comes_from_the_stored_one():
    """Every stripe of a pixel is there, where the trunk's copy is grey."""
    image, row = photo(2 * SIDE, 3 * SIDE, (30, 20, 90, 80), stripe=1)
    batch = collate([(image, row)])
    seen = batch.pixels["grounding_dino"]
    assert np.array_equal(seen.images[0].permute(1, 2, 0), image) and seen.extents.tolist() == [[2 * SIDE, 3 * SIDE]]
    trunk = batch.images[0, :, : SIDE * 2 // 3].float()
    assert trunk[:, :5].std() < 15 < 2 * 15 <= seen.images[0, :, :10].float().std()


@pytest.mark.parametrize("augment", [AugmentSettings(), MOVED])
@pytest.mark.parametrize("seed", range(4))
def test_targets_match_the_image(augment, seed):
    batch = collate(augment=augment, seed=seed)
    seen, own, trunk = batch.pixels["grounding_dino"], batch.targets["unipose"], batch.targets["perception"]
    assert batch.targets["grounding_dino"] is own and len(seen.images) == 3
    layout = batch.layout
    images, parents = layout.link_images["perception"].tolist(), layout.link_parents["perception"].tolist()
    assert torch.equal(own.valid, trunk.valid) and torch.equal(own.counted, trunk.counted) and own.valid.any()
    checked = 0
    for link in torch.nonzero(own.valid[:, 0]).flatten().tolist():
        image = images[link]
        height, width = seen.extents[image].tolist()
        grown = seen.extents[image].max() / batch.extents[image].max()
        assert grown > 1.5
        box = own.boxes[link, 0]
        assert (box / grown - trunk.boxes[link, 0]).abs().max() < 1
        place = bright(seen.images[image, :, :height, :width])
        if parents[link] < 0 and (box[:2] > 1).all() and (box[2:] < torch.tensor([width, height]) - 1).all():
            assert (box - place).abs().max() < 2
            checked += 1
        mask = own.masks[own.mask_index[link, 0]]
        assert (bright(mask[None].expand(3, -1, -1)) * 4 - place).abs().max() < 6
        if parents[link] >= 0 and own.keypoints[link, 0, 2]:
            x, y = own.keypoints[link, 0, :2]
            assert place[0] - 1 <= x <= place[2] + 1 and place[1] - 1 <= y <= place[3] + 1
            assert ((own.keypoints - grown * trunk.keypoints)[link, 0, :2]).abs().max() < 1.5
    assert checked >= 3 or augment == MOVED


def test_colours_change_alike():
    batch = collate(augment=AugmentSettings(color=1.0), seed=3)
    plain = collate(seed=3)
    for i, (height, width) in enumerate(batch.extents.tolist()):
        own_height, own_width = batch.pixels["unipose"].extents[i].tolist()
        changes = [
            b.pixels["unipose"].images[i, :, :own_height, :own_width].float().mean()
            - b.images[i, :, :height, :width].float().mean()
            for b in (batch, plain)
        ]
        assert abs(changes[0] - changes[1]) < 8
        assert (batch.images[i].float() - plain.images[i].float()).abs().mean() > 5


def test_zoom_and_crop_stay_within_the_rule():
    for seed in range(12):
        for zoom in ((0.5, 0.5), (2.0, 2.0)):
            seen = collate(augment=AugmentSettings(scale=zoom), seed=seed).pixels["grounding_dino"]
            asked = seen.extents[seen.extents.amin(1) > 1]
            short, long = asked.amin(1), asked.amax(1)
            assert len(asked) > 0
            assert (short <= RULE.short).all() and (long <= RULE.long).all()
            if zoom[0] < 1:  # half as large as it would be otherwise
                assert ((short <= RULE.short // 2 + 1) | (long <= RULE.long // 2 + 1)).all()
            else:
                assert ((short >= RULE.short - 1) | (long >= RULE.long - 1)).all()


def test_only_prompted_images_are_enlarged():
    image, row = PHOTOS[0]
    silent = {**row, "instances": [], "classes": [], "messages": [make_message("caption", "describe .", "a face")]}
    batch = collate([(image, silent), (image, row)], tasks=("detect", "caption"))
    assert batch.pixels["grounding_dino"].extents.tolist() == [[1, 1], [2 * SIDE, 171]]
    posed = collate([(image, row)], tasks=("pose",), input_rules={"grounding_dino": RULE, "unipose": ShortSide(96, 96)})
    assert set(posed.pixels) == {"unipose"}  # what poses say nothing to makes no image
    assert posed.pixels["unipose"].extents.tolist() == [[72, 96]]


def test_a_model_learns_from_images_of_several_shapes():
    keys = {name: {**EXPERTS[name], "input_size": [RULE.short, RULE.long]} for name in ("grounding_dino", "unipose")}
    model, batch = tiny_model(**keys), collate().to("cpu")
    assert model.settings.input_rules == OWN
    for name in keys:
        pixels, targets = images_and_targets(model.decoders[name], batch)
        assert pixels.images.shape == (3, 3, 192, 171) and targets.boxes.max() > 2 * SIDE
    assert batch.targets["grounding_dino"] is batch.targets["unipose"]
    losses = model(batch)
    assert all(losses[name].count > 0 for name in ("gdino_box", "gdino_mask", "unipose_keypoint", "heatmap"))
    assert all(torch.isfinite(term.total) for term in losses.values())
    losses["gdino_mask"].total.backward()


# -- pictures ---------------------------------------------------------------------------------------------------------

DRAWN = {name: PictureSize(SIDE, 2 * SIDE, 8) for name in ("stable_diffusion", "instruct_pix2pix")}


def edit_batch(height, width, augment=AugmentSettings()):  # noqa: B008
    """The square is made darker; the picture after is stored twice as large."""
    image, row = photo(height, width, (20, 20, 60, 60))
    after = np.asarray(Image.fromarray(image // 2).resize((2 * width, 2 * height), Image.Resampling.NEAREST))
    message = make_message("edit", "make it darker", "")
    message["turns"] = message["turns"][:1]
    collator = Collator(tiny_tokenizer(), SIDE, ("edit",), {}, FEW, augment, input_rules=DRAWN)
    return collator([{**row, "messages": [message]}], [image], [np.random.default_rng(1)], [after])


@pytest.mark.parametrize(
    ("shape", "size"), [((128, 128), (64, 64)), ((100, 200), (48, 88)), ((200, 100), (88, 48)), ((64, 64), (64, 64))]
)
def test_target_images_keep_their_shape(shape, size):
    batch = edit_batch(*shape)
    targets, source = batch.targets["editing"], batch.pixels["instruct_pix2pix"]
    assert targets.images.shape[2:] == source.images.shape[2:] == size
    assert targets.extents.tolist() == source.extents.tolist() == [list(size)]
    wanted = torch.tensor([20, 20, 60, 60]) * torch.tensor([size[1] / shape[1], size[0] / shape[0]] * 2)
    for pictures in (targets.images, source.images):
        assert (bright(pictures[0]) - wanted).abs().max() <= 1.5
    assert (targets.images.float() - source.images.float() / 2).abs().mean() < 3


def test_a_crop_is_drawn_as_large_as_a_whole_picture():
    batch = edit_batch(100, 200, AugmentSettings(scale=(2.0, 2.0)))
    targets, source = batch.targets["editing"], batch.pixels["instruct_pix2pix"]
    assert targets.images.shape[2:] == source.images.shape[2:] == (64, 64)  # all of a square is seen
    assert (targets.images.float() - source.images.float() / 2).abs().mean() < 4


# -- files ------------------------------------------------------------------------------------------------------------


def rotated_file(image):
    """A JPEG that stores `image` lying on its side, with the EXIF tag that turns it upright."""
    picture = Image.fromarray(np.rot90(image).copy())  # tag 6 is turned clockwise by who shows it
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(buffer := io.BytesIO(), "JPEG", quality=95, subsampling=0, exif=exif)
    return buffer.getvalue()


def test_a_rotated_file_is_decoded_large_enough_for_the_largest_size(tmp_path):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 120, (128, 96, 3), dtype=np.uint8)).resize((192, 256), Image.BICUBIC)
    image, (_, row) = np.asarray(noise).copy(), photo(256, 192, (60, 40, 150, 140))
    image[40:140, 60:150] = 250
    row = {**row, "image": rotated_file(image)}
    assert np.abs(decode(row["image"]).astype(int) - image).mean() < 3
    with ShardWriter(tmp_path, "part.parquet") as writer:
        writer.write(row)
    categories = [{"name": "face", "keypoints": list(NAMES), "skeleton": []}]
    write_manifest(tmp_path, build_manifest([writer.entry], categories=categories))
    groups = [{"tasks": ["detect"], "decoders": decoders} for decoders in (["grounding_dino"], ["lumen"])]
    stage = {"name": "a", "steps": 1, "groups": groups}
    recipe = Recipe.model_validate({"name": "r", "model": "nano", "stages": [stage]})
    dino = {**EXPERTS["grounding_dino"], "input_size": [96, 128]}
    settings = tiny_settings(grounding_dino=dino)
    reader = BatchReader(str(tmp_path), recipe, tiny_tokenizer(), SIDE, {}, input_rules=settings.input_rules)
    item = {"step": 0, "stage": 0, "parts": [("part.parquet", 0, 1)]}
    batch, light = (reader(item | {"group": group}) for group in (0, 1))
    assert light.pixels == {}  # what does not learn gets nothing
    seen = batch.pixels["grounding_dino"]
    assert seen.extents.tolist() == [[128, 96]] and batch.extents.tolist() == [[SIDE, 48]]
    wanted = np.asarray(Image.fromarray(image).resize((96, 128), Image.BOX)).astype(int)
    copied = Image.fromarray(batch.images[0, :, :, :48].permute(1, 2, 0).numpy()).resize((96, 128))
    own = np.abs(seen.images[0].permute(1, 2, 0).numpy() - wanted).mean()
    assert 3 * own < np.abs(np.asarray(copied) - wanted).mean()
    targets = batch.targets["grounding_dino"]
    (box,) = targets.boxes[targets.valid]
    assert (box - torch.tensor([30.0, 20, 75, 70])).abs().max() < 0.01
    assert (bright(seen.images[0]) - box).abs().max() < 2
