#!/usr/bin/env bash
# faster-coco-eval 1.8.0 and pycocotools 2.0.11
#
# Guess:  num_keypoints only repeats what the keypoints already say, so a drop-in
#         evaluator either counts the visible points itself or complains, as
#         pycocotools does.
# Seen:   pycocotools raises KeyError. faster-coco-eval takes a person without
#         num_keypoints for one without any labelled point, ignores it, finds no
#         truth left and reports -1.
# Output: perfect keypoints: pycocotools 1.0 with the field and KeyError without;
#         faster-coco-eval 1.0 with the field and -1.0 without. With two persons,
#         of which one has the field and only that one is found: 1.0, not 0.5.
# Why it matters: -1 is at least odd. A merged file in which some persons have the
#         field and others do not gives a good-looking number on part of the
#         truth. Fill the field in before evaluating.
source "$(dirname "$0")/lib.sh"

install "faster-coco-eval==1.8.0" "pycocotools==2.0.11" "numpy==2.2.6"

probe <<'PY'
import contextlib, io
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from faster_coco_eval import COCO as FastCOCO, COCOeval_faster

POINTS = [n for i in range(17) for n in (20 + 3 * i, 30 + 2 * i, 2)]


def ap(coco_class, eval_class, has_field):
    """One image a person; has_field says which persons carry num_keypoints. Only the first is found."""
    people = []
    for n, has in enumerate(has_field, 1):
        people.append(dict(id=n, image_id=n, category_id=1, bbox=[20, 30, 48, 32], area=1536, iscrowd=0,
                           keypoints=POINTS, **({"num_keypoints": 17} if has else {})))
    truth = dict(images=[dict(id=p["id"], width=100, height=100) for p in people], annotations=people,
                 categories=[dict(id=1, name="person", keypoints=[f"k{i}" for i in range(17)], skeleton=[])])
    results = [dict(image_id=1, category_id=1, keypoints=POINTS, score=0.9)]
    with contextlib.redirect_stdout(io.StringIO()):
        gt = coco_class()
        gt.dataset = truth
        gt.createIndex()
        run = eval_class(gt, gt.loadRes(results), "keypoints")
        try:
            run.evaluate(), run.accumulate(), run.summarize()
        except KeyError as e:
            return f"KeyError {e}"
    return f"AP {run.stats[0]:.1f}"


for name, c, e in (("pycocotools", COCO, COCOeval), ("faster-coco-eval", FastCOCO, COCOeval_faster)):
    for has_field in ([True], [False], [True, True], [True, False]):
        print(name, has_field, ap(c, e, has_field))
PY

expect <<'TXT'
pycocotools [True] AP 1.0
pycocotools [False] KeyError 'num_keypoints'
pycocotools [True, True] AP 0.5
pycocotools [True, False] KeyError 'num_keypoints'
faster-coco-eval [True] AP 1.0
faster-coco-eval [False] AP -1.0
faster-coco-eval [True, True] AP 0.5
faster-coco-eval [True, False] AP 1.0
TXT
