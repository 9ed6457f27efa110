"""Messages with links: a target for each without instances that were cropped away; older shards have none."""

import numpy as np
import pytest
import torch
from support.tiny_models import SIDE, tiny_model, tiny_tokenizer

from lumen_ray.data.batches.collate import BranchSettings, Collator
from lumen_ray.data.batches.packing import Packing, fit_branches
from lumen_ray.data.images import decode
from lumen_ray.data.scenes import render as scenes
from lumen_ray.data.scenes import text as scenes_text
from lumen_ray.data.shards.schema import make_message, make_row, message_links
from lumen_ray.data.shards.shards import ShardWriter, build_manifest, read_manifest, read_rows, verify, write_manifest
from lumen_ray.errors import UserError
from lumen_ray.model.build import served_links
from lumen_ray.recipe import AugmentSettings
from lumen_ray.train.losses import TASK_NAMES, per_task
from lumen_ray.trunk.branch import Branch
from lumen_ray.trunk.layout import branch_tokens

TOKENIZER = tiny_tokenizer()
ONLY_CHAT = BranchSettings(negatives=0, max_classes=1, max_phrases=0)


def linked_row(index=4):
    """A scene whose only message is its grounded caption."""
    row = scenes.scene_row(0, index, SIDE, grounded_captions=True)
    row["messages"] = row["messages"][-1:]
    return row


def collate(rows, tasks=("chat", "detect"), augment=AugmentSettings(), seed=0, **options):  # noqa: B008  frozen
    collator = Collator(TOKENIZER, SIDE, tasks, scenes.SKELETONS, ONLY_CHAT, augment, **options)
    return collator(
        rows, [decode(row["image"]) for row in rows], [np.random.default_rng(seed + n) for n in range(len(rows))]
    )


def of_text(batch):
    """Numbers of the links in texts."""
    return torch.nonzero(batch.layout.text_routes["perception"] >= 0).flatten().tolist()


def test_scenes_get_a_chat_that_names_and_locates_every_group():
    row = linked_row(13)
    (message,) = row["messages"]
    assert message["turns"][0]["content"] == scenes_text.GROUNDED_CAPTION and message["task"] == "chat"
    answer = message["turns"][1]["content"]
    assert answer.replace(" [DET]", "") == scenes_text.caption(scenes.render(0, 13, SIDE).objects)
    assert answer.count("[DET]") == len(message["links"])
    assert sorted(i for link in message["links"] for i in link["instances"]) == list(range(len(row["instances"])))
    for link in message["links"]:
        names = {scenes_text.noun(row["instances"][i]["phrase"], len(link["instances"])) for i in link["instances"]}
        assert names == {link["phrase"]}
    plain = scenes.scene_row(0, 13, SIDE)
    with_caption = scenes.scene_row(0, 13, SIDE, grounded_captions=True)
    assert {**with_caption, "messages": with_caption["messages"][:-1], "tasks": plain["tasks"]} == plain


def test_shards_keep_links_count_them_and_old_ones_have_none(tmp_path):
    rows = [linked_row(1), scenes.scene_row(0, 2, SIDE)]
    with ShardWriter(tmp_path, "part.parquet") as writer:
        for row in rows:
            writer.write(row)
    write_manifest(tmp_path, build_manifest([writer.entry]))
    links = rows[0]["messages"][0]["links"]
    assert read_manifest(tmp_path)["links"] == len(links)
    first, second = read_rows(tmp_path)
    assert [message_links(m) for m in first["messages"]] == [links]
    assert all(message_links(m) == [] for m in second["messages"])
    # rows behind each other, the first without: groups that were written are written again
    with ShardWriter(tmp_path, "late.parquet", rows_per_group=1) as writer:
        for row in reversed(rows):
            writer.write(row)
    write_manifest(tmp_path, build_manifest([writer.entry]))
    assert verify(tmp_path) == []
    again = list(read_rows(tmp_path))
    assert [row["image_id"] for row in again] == [rows[1]["image_id"], rows[0]["image_id"]]
    assert again[1]["messages"] == rows[0]["messages"] and again[0]["image"] == rows[1]["image"]
    assert [len(m["turns"]) for m in again[0]["messages"]] == [len(m["turns"]) for m in rows[1]["messages"]]


def test_files_without_links_are_as_before_there_were_any(tmp_path):
    row = scenes.scene_row(0, 2, SIDE)
    with ShardWriter(tmp_path, "part.parquet") as writer:
        writer.write(row)
    write_manifest(tmp_path, manifest := build_manifest([writer.entry]))
    assert "links" not in writer.entry and "links" not in manifest
    (read,) = read_rows(tmp_path)
    assert read["messages"] == row["messages"] and not any("links" in message for message in read["messages"])
    assert collate([read], ("chat", "vqa", "caption", "detect")).layout.text_routes == {}


def test_each_link_has_its_instances_as_target():
    rows = [linked_row(0), linked_row(13)]
    batch = collate(rows)
    texts = of_text(batch)
    targets = batch.targets["perception"]
    assert len(texts) < len(targets.valid) == len(batch.layout.link_branches["perception"])
    wanted = [(row, link) for row in rows for link in row["messages"][0]["links"]]
    for number, (row, link) in zip(texts, wanted, strict=True):
        boxes = targets.boxes[number][targets.valid[number]]
        expected = torch.tensor([row["instances"][i]["box"] for i in link["instances"]])
        torch.testing.assert_close(boxes, expected, atol=1e-3, rtol=0)
        assert targets.counted[number]
    assert served_links("lumen", batch) == list(range(len(targets.valid)))
    losses = tiny_model()(batch)
    _, counts = per_task(batch, losses, ("heatmap",), torch.device("cpu"))[0]
    assert counts[TASK_NAMES.index("detect")] == len(targets.valid) and counts[TASK_NAMES.index("chat")] == 0


def test_instances_that_were_cropped_away_are_no_targets():
    row = linked_row(13)
    absent = 0
    for seed in range(12):
        batch = collate([row], augment=AugmentSettings(scale=(2.5, 2.5), shift=0.5), seed=seed)
        targets = batch.targets["perception"]
        texts = of_text(batch)
        assert len(texts) == len(row["messages"][0]["links"])  # the text is the same, whatever is visible
        kept = targets.valid[texts].sum(1)
        assert kept.sum() < len(row["instances"])
        absent += int((kept == 0).sum())
    assert absent > 0


def test_messages_with_links_are_drawn_where_their_task_is_trained():
    row = linked_row()
    assert "chat" in collate([row]).tasks
    for tasks in (("chat",), ("chat", "segment"), ("vqa", "detect")):
        assert "chat" not in collate([row], tasks).tasks
    with pytest.raises(UserError, match="needs prompt_layout 'branches'"):
        collate([row], prompt_layout="sequential")


def test_a_packed_row_that_is_too_long_loses_whole_links():
    row = linked_row(13)
    message = row["messages"][0]
    question, answer = (turn["content"] for turn in message["turns"])
    branch = Branch(0, question, response=answer, links=len(message["links"]))
    length = len(branch_tokens(branch, TOKENIZER)[0])
    seen = set()
    for cut in range(1, length - 40):
        (kept,), lost = fit_branches([branch], [0], length - cut, TOKENIZER)
        tokens = branch_tokens(kept, TOKENIZER)[0]
        assert lost == {"branches": 0, "tokens": length - len(tokens)} and len(tokens) <= length - cut
        seen.add(tokens.count(TOKENIZER.ids["[DET]"]))
    assert len(seen) > 1
    image_tokens = (SIDE // 16) ** 2
    for most in range(image_tokens + 64, image_tokens + length, 3):
        batch = collate([row], ("chat", "detect"), packing=Packing(most, image_tokens))
        if "perception" in batch.layout.link_branches:
            assert len(batch.targets["perception"].valid) == len(batch.layout.link_branches["perception"])
            assert tiny_model()(batch)["lm"].total.isfinite()


def test_wrong_links_are_refused():
    row = linked_row()
    message = row["messages"][0]
    cases = [
        ({**message, "links": message["links"] * 2}, "routing tokens but"),
        ({**message, "task": "vqa"}, "only chats may"),
        ({**message, "links": [{**link, "instances": [99]} for link in message["links"]]}, "names instance 99"),
        ({**make_message("chat", "what ?", "[DET] red"), "links": message["links"][:1]}, "no words before"),
    ]
    for wrong, text in cases:
        with pytest.raises(UserError, match=text) as error:
            collate([{**row, "messages": [wrong]}], ("chat", "vqa", "detect"))
        assert error.value.reason == "invalid_links"


def test_a_routing_token_without_links_is_a_word_as_before():
    row = make_row("a", scenes.scene_row(0, 1, SIDE)["image"], (SIDE, SIDE), "test", tasks=["chat"],
                   messages=[make_message("chat", "what ?", "a [DET] token")])  # fmt: skip
    layout = collate([row]).layout
    assert layout.query_slots == {} and (layout.input_ids == TOKENIZER.ids["[DET]"]).sum() == 1
