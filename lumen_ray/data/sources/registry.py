"""The sources of `lumen-ray prepare` and their arguments, as data: the command line is built without importing them.

An `Argument`'s `name` is the field of the source's dataclass that it fills; ``--the-name`` on the command line.
"""

from __future__ import annotations

import argparse
import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lumen_ray.data.sources.base import Source


@dataclass(frozen=True)
class Argument:
    """`options` are those of `argparse.ArgumentParser.add_argument`; required unless they hold a `default`."""

    name: str
    help: str
    options: dict[str, Any]

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        options = self.options if "default" in self.options else {"required": True, **self.options}
        parser.add_argument("--" + self.name.replace("_", "-"), dest=self.name, help=self.help, **options)


@dataclass(frozen=True)
class Entry:
    """`target`: ``module:class`` of the source; `layout`: how its files must look, for ``--help``."""

    target: str
    help: str
    arguments: tuple[Argument, ...]
    layout: str = ""

    def make(self, values: dict[str, Any]) -> Source:
        """The source, from a dict that holds its arguments by name (others are ignored)."""
        module, _, name = self.target.partition(":")
        cls = getattr(importlib.import_module(module), name)
        return cls(**{a.name: values[a.name] for a in self.arguments})


def arg(name: str, help: str, **options: Any) -> Argument:
    return Argument(name, help, options)


def _source(target: str, help: str, *arguments: Argument, layout: str = "") -> Entry:
    return Entry(f"lumen_ray.data.sources.{target}", help, arguments, layout)


_IMAGES = arg("images", "folder of the images")
_BOX_FORMAT = arg(
    "box_format",
    "how plain boxes are written: xyxy or xywh in pixels, or relative (xyxy in 0..1) (default: xyxy)",
    default="xyxy",
)

SOURCES: dict[str, Entry] = {
    "scenes": _source(
        "scenes:ScenesSource",
        "render synthetic mixed-task scenes",
        arg("num", "number of scenes", type=int),
        arg("seed", "another seed is another, disjoint set (default: 0)", type=int, default=0),
        arg("side", "height and width in pixels (default: 128)", type=int, default=128),
        arg(
            "edits",
            "also ask for an edit of every scene that has an unambiguous one",
            action="store_true",
            default=False,
        ),
    ),
    "coco": _source(
        "coco:CocoSource",
        "COCO json: boxes, masks, keypoints, captions",
        arg("annotations", "one or more COCO json files over the same images", nargs="+"),
        _IMAGES,
    ),
    "panoptic": _source(
        "panoptic:PanopticSource",
        "COCO panoptic: things and stuff with exact masks",
        arg("annotations", "panoptic json"),
        arg("segments", "folder of its PNG files"),
        _IMAGES,
        arg(
            "stuff",
            "keep: one object per stuff class and image (default); skip",
            choices=("keep", "skip"),
            default="keep",
        ),
    ),
    "voc": _source(
        "voc:VocSource",
        "Pascal VOC: a folder of xml files, with masks if there are any",
        arg("annotations", "folder of the xml files (VOC: Annotations)"),
        _IMAGES,
        arg("split", "text file of image names (VOC: ImageSets/Main/train.txt); default: all xml files", default=None),
        arg("masks", "folder of object masks as PNG (VOC: SegmentationObject)", default=None),
        arg(
            "difficult",
            "difficult objects: neither asked for nor counted against (crowd, default), or as others (object)",
            choices=("crowd", "object"),
            default="crowd",
        ),
        arg(
            "first_pixel",
            "1: pixels count from 1, far edge included (VOC, default); 0: from 0, excluded",
            type=int,
            choices=(0, 1),
            default=1,
        ),
    ),
    "yolo": _source(
        "yolo:YoloSource",
        "YOLO text labels: boxes, segments, poses",
        arg("data", "data.yaml of the set; or give --images and --classes", default=None),
        arg("split", "split of the data.yaml (default: train)", default="train"),
        arg("images", "folder of the images, where there is no data.yaml", default=None),
        arg("labels", "folder of the label files (default: 'labels' instead of 'images' in the path)", default=None),
        arg("classes", "text file with one class name per line, where there is no data.yaml", default=None),
    ),
    "refer": _source(
        "refer:ReferSource",
        "referring expressions: RefCOCO/+/g, gRefCOCO (several objects, or none), plain json",
        arg("refs", "one or more refs files, or json/jsonl of plain records", nargs="+"),
        _IMAGES,
        arg("instances", "COCO json that the refs' ann_id point into; not for plain records", default=None),
        arg("split", "only expressions of that split, e.g. train or testA (default: all)", default=None),
        _BOX_FORMAT,
        layout="Refs: 'refs(unc).p' or json [{ref_id, ann_id, image_id, split, sentences: [{sent}]}] with --instances. "
        "Plain: [{image, expression, bbox or segmentation or no_target}].",
    ),
    "chat": _source(
        "chat:ChatSource",
        "LLaVA-style conversations, with regions",
        arg("conversations", "one or more json or jsonl files", nargs="+"),
        arg("images", "folder of the images; not for text-only records", default=None),
        arg("task", "which task the answers train: chat, caption, vqa, region_caption (default: chat)", default="chat"),
        _BOX_FORMAT,
        layout="Records: {id, image, conversations: [{from: human, value: '<image> What is <region>?'}, {from: gpt, "
        "value}], regions: [[x1, y1, x2, y2], {segmentation}, {point}]}.",
    ),
    "vqa": _source(
        "vqa:VqaSource",
        "visual questions: VQA v2, GQA, plain json",
        arg("questions", "one or more json or jsonl files of questions", nargs="+"),
        _IMAGES,
        arg("annotations", "VQA v2's answers; not where the records hold them", nargs="+", default=[]),
        arg("image_pattern", "image name by image_id, e.g. COCO_val2014_%%012d.jpg (default: VQA v2's)", default=None),
        arg(
            "answers", "'majority' of the annotators' answers, or 'all' of them (default: majority)", default="majority"
        ),
        layout="VQA v2: {questions: [{question_id, image_id, question}]} and {annotations: [{question_id, answers}]}. "
        "Plain: [{image, question, answer}].",
    ),
    "pairs": _source(
        "pairs:PairsSource",
        "image-text pairs: csv, tsv, jsonl, parquet, WebDataset tar",
        arg("data", "tables and tars; * and ? as in a shell", nargs="+"),
        arg("images", "folder of the images, where tables hold paths", default=None),
        arg("image_column", "column of the path or the bytes (default: image, filepath, ..)", default=None),
        arg("caption_column", "column of the text (default: caption, text, ..)", default=None),
        arg(
            "caption_key",
            "take captions from this key of the json files in tars (default: .txt, or caption)",
            default=None,
        ),
        arg(
            "header",
            "whether the first line of csv and tsv files names the columns",
            default=True,
            action=argparse.BooleanOptionalAction,
        ),
        layout="Tables: a column with the image's path (beneath --images) or bytes, and one with its caption. "
        "Tars: 000.jpg and 000.txt (or 000.json with a key 'caption') side by side.",
    ),
    "edits": _source(
        "edits:EditsSource",
        "edit triples: image, instruction, edited image",
        arg("data", "InstructPix2Pix folders, or csv, tsv, jsonl, parquet tables", nargs="+"),
        arg("images", "folder of the images, where tables hold paths", default=None),
        arg("image_column", "column of the image (default: image, original_image, ..)", default=None),
        arg("instruction_column", "column of the instruction (default: instruction, edit_prompt, ..)", default=None),
        arg("target_column", "column of the edited image (default: target_image, edited_image, ..)", default=None),
        arg(
            "sizes", "how the two sizes must agree: same, aspect (2 percent) or any (default: aspect)", default="aspect"
        ),
        layout="Folders: NAME/prompt.json {edit} beside SEED_0.jpg (before) and SEED_1.jpg (after). "
        "Tables: columns of both images (paths or bytes) and of the instruction.",
    ),
}
