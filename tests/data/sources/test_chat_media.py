"""Pictures, clips and sounds of conversations: what is read, and that nothing is overlooked."""

import base64
import json

import pytest
from support.language_fakes import prepared, write_photos
from support.source_fakes import jpeg

from lumen_ray.data.sources.chat import ChatSource
from lumen_ray.data.sources.chat_media import check_markers
from lumen_ray.errors import UserError


def human(text):
    return [{"from": "human", "value": text}, {"from": "gpt", "value": "a cat"}]


def parts(*items):
    return [{"role": "user", "content": list(items)}, {"role": "assistant", "content": "a cat"}]


@pytest.fixture
def read(tmp_path):
    images = write_photos(tmp_path / "images", ["a.jpg", "b.jpg"])

    def prepare(record):
        (tmp_path / "chat.json").write_text(json.dumps([record, {"id": "sound", "conversations": human("2 + 2?")}]))
        rows, rejected, _ = prepared(ChatSource([str(tmp_path / "chat.json")], str(images)))
        return [row for row in rows if row["image_id"] != "sound"], rejected

    return prepare


INLINE = base64.b64encode(jpeg()).decode()
DATA_URL = f"data:image/jpeg;base64,{INLINE}"
TEXT = {"type": "text", "text": "What is it?"}
WITH_PICTURE = {
    "images list": {"messages": human("What is it?"), "images": ["a.jpg"]},
    "images text": {"messages": human("What is it?"), "images": "a.jpg"},
    "images path": {"messages": human("<image>What is it?"), "images": [{"path": "a.jpg", "bytes": None}]},
    "images bytes": {"messages": human("<image>What is it?"), "images": [{"path": None, "bytes": INLINE}]},
    "data url": {"messages": parts({"type": "image_url", "image_url": {"url": DATA_URL}}, TEXT)},
    "list of one": {"image": ["a.jpg"], "conversations": human("<image>\nWhat is it?")},
    "marker inside": {"image": "a.jpg", "conversations": human("Look at <image> here")},
    "openai parts": {"messages": parts({"type": "image_url", "image_url": {"url": "a.jpg"}}, TEXT)},
    "plain url": {"messages": parts({"type": "image_url", "image_url": "a.jpg"}, TEXT)},
    "hf parts": {"messages": parts({"type": "image", "image": "a.jpg"}, TEXT)},
    "trl parts": {"messages": parts({"type": "image"}, TEXT), "images": ["a.jpg"]},
    "facts beside": {"image": "a.jpg", "image_url": "https://x/a.jpg", "image_size": [60, 40], "image_id": 7,
                     "source": "coco/a.jpg", "conversations": human("What is it?")},
    "key of the turn": {"messages": [{"role": "user", "content": "What is it?", "images": ["a.jpg"]}, human("")[1]]},
    "anthropic part": {"messages": parts({"type": "image", "source": {"type": "base64", "data": INLINE}}, TEXT)},
    "same image twice": {"image": "a.jpg", "messages": parts({"type": "image", "image": "./a.jpg"}, TEXT)},
    "no video": {"image": "a.jpg", "video": None, "audios": [], "conversations": human("What is it?")},
}  # fmt: skip


@pytest.mark.parametrize("record", WITH_PICTURE.values(), ids=WITH_PICTURE)
def test_read_with_its_picture(read, record):
    (row,), rejected = read(record)
    assert rejected == [] and row["image"] is not None
    text = row["messages"][0]["turns"][0]["content"]
    assert "<image>" not in text and text.startswith(("What is it?", "Look at\nhere"))


TEXT_ONLY = {
    "plain": {"conversations": human("2 + 2?")},
    "empty keys": {"image": "", "images": [], "video": None, "has_image": False, "conversations": human("2 + 2?")},
    "facts": {"id": 3, "model": "gpt-4", "url": "https://sharegpt.com/c/x", "num_images": 0, "source": "wiki",
              "conversations": human("2 + 2?")},
    "numbers": {"n_frames": 3, "num_images": 0, "image_size": [2, 2], "conversations": human("2 + 2?")},
    "html answer": {"conversations": [human("Html?")[0], {"from": "gpt", "value": '<img src="a.jpg"> ![](b.jpg)'}]},
    "a word": {"conversations": human("Write about images, video and <b>sound</b> files such as a.jpg")},
    "comparison": {"conversations": human("is a < image b > c?")},
}  # fmt: skip


@pytest.mark.parametrize("record", TEXT_ONLY.values(), ids=TEXT_ONLY)
def test_read_as_text_alone(read, record):
    (row,), rejected = read(record)
    assert rejected == [] and row["image"] is None


KEYS = [
    "image_file",
    "imagePath",
    "photo",
    "image_url",
    "path",
    "image_paths",
    "picture",
    "media",
    "file",
    "frames",
    "visuals",
]
OTHERS = {
    **{key: {key: "a.jpg", "conversations": human("What is it?")} for key in KEYS},
    "list under another key": {"inputs": [{"x": "a.png"}], "conversations": human("What is it?")},
    "id of a picture": {"image_id": 7, "conversations": human("What is it?")},
    **{key: {key: 7, "conversations": human("q")} for key in ("img_id", "image_ids", "photo_id", "video_id")},
    "a bare picture": {"data": INLINE, "conversations": human("q")},
    "a media list": {"media": [{"type": "image", "id": "x1"}], "conversations": human("q")},
    "pixels": {"pixel_values": [[1, 2]], "conversations": human("q")},
    "a second picture": {"image": "a.jpg", "image_2": "b.jpg", "conversations": human("q")},
    "a second one in a list": {"image": "a.jpg", "media": ["b.jpg"], "conversations": human("q")},
    "a depth map": {"image": "a.jpg", "depth": "d.png", "conversations": human("q")},
    "video of a turn": {"messages": [{"role": "user", "content": "q", "video": "v.mp4"}, human("")[1]]},
    "attachment of a turn": {"messages": [{"role": "user", "content": "q", "attachments": ["a.jpg"]}, human("")[1]]},
    "file of a part": {"image": "a.jpg", "messages": parts({"type": "image", "file": "b.jpg"}, TEXT)},
    "video": {"video": "v.mp4", "conversations": human("What happens?")},
    "videos and image": {"image": "a.jpg", "videos": ["v.mp4"], "conversations": human("What happens?")},
    "audios": {"audios": ["v.wav"], "messages": human("What is said?")},
    "video part": {"messages": parts({"type": "video", "video": "v.mp4"}, TEXT)},
    "audio part": {"messages": parts({"type": "input_audio", "input_audio": {}}, TEXT)},
}
MARKERS = [
    "<video>", "<audio>", "<image_1>", "<image1> x", "<IMAGE>", "<img>a.jpg</img>", '<img src="a.jpg">', "![](a.jpg)",
    "![x](a.jpg)", "<|image_pad|>", "<|image|>", "<|vision_start|>", "<|audio_1|>", "<ImageHere>",
    "<start_of_image>", "<image_soft_token>", "<im_start>", "<im_patch>", "<|media_start|>", "![cat][1]",
    "[img: a.jpg]", "<image_placeholder>", "[IMG]", "<image/>", "<video_0>",
]  # fmt: skip
OTHERS |= {marker: {"conversations": human(f"{marker}\nWhat is it?")} for marker in MARKERS}
OTHERS["marker beside an image"] = {"image": "a.jpg", "conversations": human("<image> <video> What is it?")}


@pytest.mark.parametrize("record", OTHERS.values(), ids=OTHERS)
def test_rejected_by_name(read, record):
    rows, rejected = read(record)
    assert rows == [] and rejected[0]["rule"] == "other_media"
    named = [key for key in record if key not in ("conversations", "messages", "image")]
    assert not named or any(f"key '{key}' names" in rejected[0]["reason"] for key in named)


@pytest.mark.parametrize(
    ("record", "rule"),
    [
        ({"image": "a.jpg", "images": ["b.jpg"], "messages": human("q")}, "image_order"),
        ({"image": ["a.jpg", "b.jpg"], "images": ["b.jpg", "a.jpg"], "messages": human("q")}, "image_order"),
        ({"image": "b.jpg", "messages": parts({"type": "image", "image": "a.jpg"}, TEXT)}, "image_order"),
        ({"messages": parts({"type": "image", "image": "a.jpg", "path": "b.jpg"}, TEXT)}, "image_order"),
        ({"images": ["a.jpg", "b.jpg"], "messages": human("<image>q")}, "image_count"),
        ({"images": ["a.jpg", None], "messages": human("q")}, "invalid_image"),
        ({"messages": parts({"type": "image"}, TEXT)}, "missing_image"),
        (
            {"image": "a.jpg", "conversations": [*human("q")[:1], {"from": "gpt", "value": "<image>"}]},
            "marker_in_answer",
        ),
        ({"images": [{"bytes": "no base64"}], "messages": human("q")}, "invalid_image"),
        ({"images": [None], "messages": human("q")}, "invalid_image"),
        ({"images": [""], "messages": human("q")}, "invalid_image"),
        ({"images": [{"path": "", "bytes": None}], "messages": human("q")}, "invalid_image"),
        *(
            ({"image": "a.jpg", "conversations": [human("q")[0], {"from": "gpt", "value": value}]}, "marker_in_answer")
            for value in ("<img>b.jpg</img>", "<video>", "<|image_pad|>")
        ),
        ({"image": "a.jpg", "messages": parts({"type": "text", "text": 3})}, "invalid_turn"),
        ({"image": "a.jpg", "system": ["x"], "messages": human("q")}, "invalid_text"),
    ],
)
def test_what_cannot_be_read_is_rejected(read, record, rule):
    rows, rejected = read(record)
    assert rows == [] and rejected[0]["rule"] == rule


def test_system_texts_come_first_once(read):
    turns = [{"from": "system", "value": "Be short."}, *human("What is it?")]
    for system, text in (("Be kind.", "Be kind.\nBe short.\nWhat is it?"), ("Be short.", "Be short.\nWhat is it?")):
        (row,), _ = read({"image": "a.jpg", "system": system, "conversations": turns})
        assert row["messages"][0]["turns"][0]["content"] == text


def test_markers_in_answers_are_text():
    check_markers([{"role": "user", "content": "Write html."}, {"role": "assistant", "content": '<img src="a.jpg">'}])
    with pytest.raises(UserError):
        check_markers([{"role": "user", "content": "a [IMG]"}])
