#!/usr/bin/env bash
# supervision 0.31.2 with pycocotools 2.0.11
#
# Guess:  a mask written as a COCO polygon by supervision and rasterised again by
#         pycocotools has about the same pixels; for an upright square, exactly.
# Seen:   the outline runs through the centres of the border pixels, while COCO
#         measures polygons from pixel edge to pixel edge. Every object loses its
#         last row and column, and bbox loses one pixel each way, while `area`
#         keeps the true count. supervision reads its own file back without loss,
#         so a round trip does not show it.
# Output: squares of side 10, 20 and 40: area says 100, 400 and 1600; pycocotools
#         reads 81, 361 and 1521 pixels, IoU with the original 0.81, 0.90, 0.95.
# Why it matters: a perfect prediction of a 10x10 object has IoU 0.81 with such a
#         truth and fails the thresholds 0.85 to 0.95; small objects lose most.
source "$(dirname "$0")/lib.sh"

install "supervision==0.31.2" "pycocotools==2.0.11" "opencv-python-headless==4.12.0.88" "numpy==2.2.6"

probe <<'PY'
import contextlib, io, os
import numpy as np
import supervision as sv
from PIL import Image
from pycocotools.coco import COCO

os.mkdir("images")
image = os.path.abspath("images/a.png")
Image.new("RGB", (60, 60)).save(image)
for side in (10, 20, 40):
    mask = np.zeros((60, 60), bool)
    mask[10:10 + side, 10:10 + side] = True
    found = sv.Detections(xyxy=sv.mask_to_xyxy(mask[None]), mask=mask[None], class_id=np.array([0]))
    data = sv.DetectionDataset(classes=["cat"], images=[image], annotations={image: found})
    data.as_coco(annotations_path="out.json")
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO("out.json")
    ann = coco.dataset["annotations"][0]
    read = coco.annToMask(ann).astype(bool)
    again = sv.DetectionDataset.from_coco("images", "out.json", force_masks=True)
    back = next(iter(again))[2].mask[0]
    print(f"side {side}: area {ann['area']:.0f}, bbox {[int(n) for n in ann['bbox']]},",
          f"pycocotools reads {read.sum()} px, IoU {(read & mask).sum() / (read | mask).sum():.2f},",
          f"supervision reads {back.sum()} px")
PY

expect <<'TXT'
side 10: area 100, bbox [10, 10, 9, 9], pycocotools reads 81 px, IoU 0.81, supervision reads 100 px
side 20: area 400, bbox [10, 10, 19, 19], pycocotools reads 361 px, IoU 0.90, supervision reads 400 px
side 40: area 1600, bbox [10, 10, 39, 39], pycocotools reads 1521 px, IoU 0.95, supervision reads 1600 px
TXT
