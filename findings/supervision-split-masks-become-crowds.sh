#!/usr/bin/env bash
# supervision 0.31.2 with pycocotools 2.0.11
#
# Guess:  exporting one object whose mask has a hole, or is cut in two by something
#         in front of it, gives one ordinary COCO object; iscrowd marks groups.
# Seen:   supervision writes such a mask as RLE, exactly, but sets iscrowd to 1
#         with it. Evaluators ignore crowd regions, so the object is no longer
#         asked for: with nothing else in the file AP is -1 even for a perfect
#         prediction, and a missed object costs nothing.
# Output: solid square iscrowd 0, AP 1.0; ring iscrowd 1, AP -1.0; square cut in
#         two iscrowd 1, AP -1.0.
# Why it matters: occluded objects and rings, often the hard ones, disappear from
#         the evaluation, and from training in loaders that drop crowds. Reset
#         iscrowd after the export unless the labels really are groups.
source "$(dirname "$0")/lib.sh"

install "supervision==0.31.2" "pycocotools==2.0.11" "opencv-python-headless==4.12.0.88" "numpy==2.2.6"

probe <<'PY'
import contextlib, io, os
import numpy as np
import supervision as sv
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

image = os.path.abspath("a.png")
Image.new("RGB", (100, 100)).save(image)
solid = np.zeros((100, 100), bool)
solid[10:50, 10:50] = True
ring, cut = solid.copy(), solid.copy()
ring[25:35, 25:35] = False
cut[:, 28:32] = False

for name, mask in (("solid", solid), ("ring", ring), ("cut in two", cut)):
    found = sv.Detections(xyxy=sv.mask_to_xyxy(mask[None]), mask=mask[None], class_id=np.array([0]))
    data = sv.DetectionDataset(classes=["cat"], images=[image], annotations={image: found})
    data.as_coco(annotations_path="out.json")
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO("out.json")
        ann = gt.dataset["annotations"][0]
        same = rle.encode(np.asfortranarray(gt.annToMask(ann)))  # predict the file's own mask
        run = COCOeval(gt, gt.loadRes([dict(image_id=1, category_id=1, segmentation=same, score=0.9)]), "segm")
        run.evaluate(), run.accumulate(), run.summarize()
    print(f"{name}: {len(gt.dataset['annotations'])} object, iscrowd {ann['iscrowd']}, AP {run.stats[0]:.1f}")
PY

expect <<'TXT'
solid: 1 object, iscrowd 0, AP 1.0
ring: 1 object, iscrowd 1, AP -1.0
cut in two: 1 object, iscrowd 1, AP -1.0
TXT
