"""The sources of `lumen-ray prepare` and their arguments, as data: building the command line imports none of them.

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
    """An option of a source; `options` are those of `argparse.ArgumentParser.add_argument`. Required unless they hold a
    `default`."""

    name: str
    help: str
    options: dict[str, Any]

    @property
    def flag(self) -> str:
        """The option on the command line."""
        return "--" + self.name.replace("_", "-")

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        options = self.options if "default" in self.options else {"required": True, **self.options}
        parser.add_argument(self.flag, dest=self.name, help=self.help, **options)


@dataclass(frozen=True)
class SourceSpec:
    """A source: `target` is its ``module:class``; `layout` describes its files, for ``--help``."""

    target: str
    help: str
    arguments: tuple[Argument, ...]
    layout: str = ""

    @property
    def description(self) -> str:
        """The text above the options in ``--help``."""
        return f"{self.help}. {self.layout}".strip()

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        for argument in self.arguments:
            argument.add_to(parser)

    def make(self, values: dict[str, Any]) -> Source:
        """Builds the source from a dict of its arguments by name; other keys are ignored."""
        module, _, name = self.target.partition(":")
        cls = getattr(importlib.import_module(module), name)
        return cls(**{a.name: values[a.name] for a in self.arguments})


def arg(name: str, help: str, **options: Any) -> Argument:
    return Argument(name, help, options)


def _source(target: str, help: str, *arguments: Argument, layout: str = "") -> SourceSpec:
    return SourceSpec(f"lumen_ray.data.sources.{target}", help, arguments, layout)


_IMAGES = arg("images", "folder of the images")
_BOX_FORMAT = arg(
    "box_format",
    "format of plain boxes: xyxy or xywh in pixels, or relative (xyxy in 0..1) (default: xyxy)",
    default="xyxy",
)

SOURCES: dict[str, SourceSpec] = {
    "scenes": _source(
        "scenes:ScenesSource",
        "render synthetic mixed-task scenes",
        arg("num", "number of scenes", type=int),
        arg("seed", "seed of the set; sets of different seeds are disjoint (default: 0)", type=int, default=0),
        arg("side", "height and width in pixels (default: 128)", type=int, default=128),
        arg(
            "edits",
            "add an edit to every scene that has an unambiguous one",
            action="store_true",
            default=False,
        ),
        arg(
            "grounded_captions",
            "add a chat to every scene whose answer locates each object it names, in the middle of the text",
            action="store_true",
            default=False,
        ),
        arg(
            "region_questions",
            "add questions to every scene whether a box shows a class, as 'label --verify' asks them",
            action="store_true",
            default=False,
        ),
    ),
    "coco": _source(
        "coco:CocoSource",
        "COCO json: boxes, masks, keypoints, captions",
        arg("annotations", "one or more COCO json files over the same images", nargs="+"),
        _IMAGES,
        layout="Annotations: instances, keypoints, captions and LVIS files {images, annotations, categories}. "
        "Images: below --images, by file_name or coco_url.",
    ),
    "panoptic": _source(
        "panoptic:PanopticSource",
        "COCO panoptic: things and stuff with exact masks",
        arg("annotations", "panoptic json"),
        arg("segments", "folder of its PNG files"),
        _IMAGES,
        arg(
            "stuff",
            "keep: stuff becomes one object per class and image (default); skip: things only",
            choices=("keep", "skip"),
            default="keep",
        ),
        layout="Annotations: {images, annotations: [{image_id, file_name, segments_info}], categories}. PNG pixels: "
        "segment ids as R + 256 G + 65536 B.",
    ),
    "voc": _source(
        "voc:VocSource",
        "Pascal VOC: a folder of xml files, optionally with masks",
        arg("annotations", "folder of the xml files (VOC: Annotations)"),
        _IMAGES,
        arg("split", "text file of image names (VOC: ImageSets/Main/train.txt); default: all xml files", default=None),
        arg("masks", "folder of object masks as PNG (VOC: SegmentationObject)", default=None),
        arg(
            "difficult",
            "difficult objects: ignored in training and evaluation (crowd, default), or ordinary ones (object)",
            choices=("crowd", "object"),
            default="crowd",
        ),
        arg(
            "first_pixel",
            "1: pixels count from 1, far edge included (VOC); 0: from 0, far edge excluded (default: inferred)",
            type=int,
            choices=(0, 1),
            default=None,
        ),
        layout="Annotations: NAME.xml per image. Masks: NAME.png per image, value k for the k-th object of the xml.",
    ),
    "yolo": _source(
        "yolo:YoloSource",
        "YOLO text labels: boxes, segments, poses",
        arg("data", "data.yaml of the data set; or give --images and --classes", default=None),
        arg("split", "split of the data.yaml (default: train)", default="train"),
        arg("images", "folder of the images, without a data.yaml", default=None),
        arg("labels", "folder of the label files (default: the images' path with 'labels' for 'images')", default=None),
        arg("classes", "text file with one class name per line, without a data.yaml", default=None),
        layout="Labels: NAME.txt per image, a line per object: 'class cx cy w h', 'class x1 y1 x2 y2 x3 y3 ...' or, "
        "with kpt_shape, 'class cx cy w h' and keypoints; fractions of the image's sides.",
    ),
    "refer": _source(
        "refer:ReferSource",
        "referring expressions: RefCOCO/+/g, gRefCOCO (several objects, or none), plain json",
        arg("refs", "one or more refs files, or json/jsonl of plain records", nargs="+"),
        _IMAGES,
        arg("instances", "COCO json with the objects of the refs' ann_id; not for plain records", default=None),
        arg("split", "only expressions of that split, e.g. train or testA (default: all)", default=None),
        _BOX_FORMAT,
        layout="Refs: 'refs(unc).p' or json [{ref_id, ann_id, image_id, split, sentences: [{sent}]}] with --instances. "
        "Plain: [{image, expression, bbox or segmentation or no_target}].",
    ),
    "chat": _source(
        "chat:ChatSource",
        "LLaVA-style conversations, with regions, or about several images",
        arg("conversations", "one or more json or jsonl files", nargs="+"),
        arg("images", "folder of the images; not needed for text-only records", default=None),
        arg("task", "task that the answers train: chat, caption, vqa, region_caption (default: chat)", default="chat"),
        _BOX_FORMAT,
        arg("max_images", "most images of a record; those with more are rejected (default: 8)", type=int, default=8),
        layout="Records: {id, image, conversations: [{from: human, value: '<image> What is <region>?'}, {from: gpt, "
        "value}], regions: [[x1, y1, x2, y2], {segmentation}, {point}]}. Several images: {images: [..], conversations: "
        "[{from: human, value: 'What differs between <image> and <image>?'}, ..]}.",
    ),
    "vqa": _source(
        "vqa:VqaSource",
        "visual questions: VQA v2, GQA, plain json",
        arg("questions", "one or more json or jsonl files of questions", nargs="+"),
        _IMAGES,
        arg("annotations", "VQA v2's files of answers; not needed if the records contain them", nargs="+", default=[]),
        arg(
            "image_pattern", "image file of an image_id, e.g. COCO_val2014_%%012d.jpg (default: VQA v2's)", default=None
        ),
        arg(
            "answers",
            "keep the 'majority' answer of the annotators, or 'all' answers (default: majority)",
            default="majority",
        ),
        layout="VQA v2: {questions: [{question_id, image_id, question}]} and {annotations: [{question_id, answers}]}. "
        "Plain: [{image, question, answer}].",
    ),
    "pairs": _source(
        "pairs:PairsSource",
        "image-text pairs: csv, tsv, jsonl, parquet, WebDataset tar",
        arg("data", "tables and tars; wildcards * and ? are expanded", nargs="+"),
        arg("images", "folder of the images, if tables contain paths", default=None),
        arg("image_column", "column of the image's path or bytes (default: image, filepath, ...)", default=None),
        arg("caption_column", "column of the caption (default: caption, text, ...)", default=None),
        arg(
            "caption_key",
            "key of the caption in the json files of tars (default: the .txt file, or key 'caption')",
            default=None,
        ),
        arg(
            "header",
            "the first line of csv and tsv files names the columns",
            default=True,
            action=argparse.BooleanOptionalAction,
        ),
        layout="Tables: a column with the image's path (below --images) or bytes, and one with its caption. "
        "Tars: 000.jpg and 000.txt (or 000.json with a key 'caption') side by side.",
    ),
    "edits": _source(
        "edits:EditsSource",
        "edit triples: image, instruction, edited image",
        arg("data", "InstructPix2Pix folders, or csv, tsv, jsonl, parquet tables", nargs="+"),
        arg("images", "folder of the images, if tables contain paths", default=None),
        arg("image_column", "column of the image (default: image, original_image, ...)", default=None),
        arg("instruction_column", "column of the instruction (default: instruction, edit_prompt, ...)", default=None),
        arg("target_column", "column of the edited image (default: target_image, edited_image, ...)", default=None),
        arg(
            "sizes",
            "how the two sizes must agree: same, aspect (within 2 percent) or any (default: aspect)",
            default="aspect",
        ),
        layout="Folders: NAME/prompt.json {edit} beside SEED_0.jpg (before) and SEED_1.jpg (after). "
        "Tables: columns of both images (paths or bytes) and of the instruction.",
    ),
}
