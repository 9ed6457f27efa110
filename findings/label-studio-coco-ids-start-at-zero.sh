#!/usr/bin/env bash
# label-studio-sdk 2.1.2 with pycocotools 2.0.11
#
# Guess:  a COCO file exported by Label Studio can be evaluated with COCOeval as
#         it is; predictions identical to the labels score AP 1.
# Seen:   the export numbers annotations from 0. COCOeval records a match by
#         storing the id of the matched object and reads 0 as "no match", so the
#         object with id 0 is never found. With one labelled box the perfect
#         answer scores AP 0. Numbering the same annotations from 1 gives AP 1.
# Output: exported ids [0], AP 0.0; renumbered ids [1], AP 1.0. No warning.
# Why it matters: one object per file is always a miss. In a large set the loss
#         hides in the noise; for a rare class with a handful of objects it does
#         not. Renumber annotations from 1 before evaluating an export.
source "$(dirname "$0")/lib.sh"

install "label-studio-sdk==2.1.2" "pycocotools==2.0.11" "numpy==2.2.6"

probe <<'PY'
import contextlib, io, json, os
from PIL import Image
from label_studio_sdk.converter import Converter
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

config = """<View><Image name="image" value="$image"/>
<RectangleLabels name="label" toName="image"><Label value="cat"/></RectangleLabels></View>"""
Image.new("RGB", (200, 100)).save("a.png")
box = dict(x=10, y=20, width=20, height=40, rotation=0, rectanglelabels=["cat"])
task = dict(id=1, data=dict(image=os.path.abspath("a.png")), annotations=[dict(id=1, result=[
    dict(id="r1", type="rectanglelabels", from_name="label", to_name="image",
         original_width=200, original_height=100, value=box)])])
json.dump([task], open("tasks.json", "w"))
Converter(config, ".", download_resources=False).convert_to_coco(
    "tasks.json", "out", output_image_dir="out/images", is_dir=False)
exported = json.load(open("out/result.json"))


def ap(truth, results):
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO()
        gt.dataset = truth
        gt.createIndex()
        run = COCOeval(gt, gt.loadRes(results), "bbox")
        run.evaluate(), run.accumulate(), run.summarize()
    return round(float(run.stats[0]), 3)


results = [dict(image_id=a["image_id"], category_id=a["category_id"], bbox=a["bbox"], score=0.9)
           for a in exported["annotations"]]
for first in ("exported", "renumbered"):
    print(first, "ids", [a["id"] for a in exported["annotations"]], "AP", ap(exported, results))
    for a in exported["annotations"]:
        a["id"] += 1
PY

expect <<'TXT'
exported ids [0] AP 0.0
renumbered ids [1] AP 1.0
TXT
