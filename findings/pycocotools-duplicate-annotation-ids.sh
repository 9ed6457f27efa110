#!/usr/bin/env bash
# pycocotools 2.0.11 and faster-coco-eval 1.8.0
#
# Guess:  two COCO files joined without renumbering, so that two annotations share
#         an id, are either refused or scored right: the ids only need to be
#         unique within their image.
# Seen:   both libraries accept the file without a warning. Annotations are looked
#         up by id, the later one replaces the earlier one, and evaluation then
#         uses the later one twice. The earlier image has no truth left; the later
#         image has its object doubled.
# Output: predictions identical to the labels: AP 1.0 with ids 1 and 2, AP 0.252
#         with ids 1 and 1, in both libraries.
# Why it matters: merging shards, sources or annotators by concatenating lists is
#         common, and the result looks like a bad model. Renumber when merging, and
#         check that ids are unique across the whole file.
source "$(dirname "$0")/lib.sh"

install "pycocotools==2.0.11" "faster-coco-eval==1.8.0" "numpy==2.2.6"

probe <<'PY'
import contextlib, io
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from faster_coco_eval import COCO as FastCOCO, COCOeval_faster

BOXES = {1: [10, 10, 20, 20], 2: [50, 50, 30, 30]}  # image id -> its only box


def ap(coco_class, eval_class, ids):
    truth = dict(
        images=[dict(id=i, width=100, height=100, file_name=f"{i}.png") for i in BOXES],
        categories=[dict(id=1, name="cat")],
        annotations=[dict(id=n, image_id=i, category_id=1, bbox=b, area=b[2] * b[3], iscrowd=0)
                     for n, (i, b) in zip(ids, BOXES.items())])
    results = [dict(image_id=i, category_id=1, bbox=b, score=0.9) for i, b in BOXES.items()]
    with contextlib.redirect_stdout(io.StringIO()):
        gt = coco_class()
        gt.dataset = truth
        gt.createIndex()
        run = eval_class(gt, gt.loadRes(results), "bbox")
        run.evaluate(), run.accumulate(), run.summarize()
    where = [a["image_id"] for a in gt.loadAnns(gt.getAnnIds())]
    return f"AP {run.stats[0]:.3f}, truths in images {where}"


for name, c, e in (("pycocotools", COCO, COCOeval), ("faster-coco-eval", FastCOCO, COCOeval_faster)):
    for ids in ((1, 2), (1, 1)):
        print(name, "ids", ids, ap(c, e, ids))
PY

expect <<'TXT'
pycocotools ids (1, 2) AP 1.000, truths in images [1, 2]
pycocotools ids (1, 1) AP 0.252, truths in images [2, 2]
faster-coco-eval ids (1, 2) AP 1.000, truths in images [1, 2]
faster-coco-eval ids (1, 1) AP 0.252, truths in images [2, 2]
TXT
