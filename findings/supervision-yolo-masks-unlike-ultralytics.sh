#!/usr/bin/env bash
# supervision 0.31.2 with ultralytics 8.4.190 and pycocotools 2.0.11
#
# Guess:  from_yolo(force_masks=True) makes the masks that ultralytics trains on from
#         the same label, and an outline along pixel edges gives the pixels inside.
# Seen:   both fill the outline with OpenCV, which draws its points as pixels, so that
#         the right and bottom edge add a column and a row. But supervision rounds
#         the coordinates and ultralytics cuts them off. An edge at 17 of 60 pixels,
#         written with six decimals (0.283333), is 16.99998: 17 and 16. pycocotools,
#         which measures between pixel edges, gives the square itself.
# Output: square from 3 to 17, 14x14 = 196 pixels: in an image of 40 pixels 225, 225
#         and 196 (supervision, ultralytics, pycocotools); of 60: 225, 196 and 196.
#         From 3.25 to 17.75, area 210.25, in 40: 256, 225 and 225.
# Why it matters: masks scored against truth that supervision has read differ by a row
#         and a column from those that the model learned: IoU 0.87 for an object
#         found exactly. Which objects do depends on the last decimal of the label.
source "$(dirname "$0")/lib.sh"

install "supervision==0.31.2" "ultralytics==8.4.190" "torch==2.13.0" "pycocotools==2.0.11" \
    "opencv-python==4.12.0.88" "numpy==2.2.6"

probe <<'PY'
import os

os.environ.update(YOLO_OFFLINE="true", YOLO_VERBOSE="false")
import numpy as np
import supervision as sv
from PIL import Image
from pycocotools import mask as coco
from ultralytics.cfg import get_cfg
from ultralytics.data.dataset import YOLODataset

for low, high, side in ((3, 17, 40), (3, 17, 60), (3.25, 17.75, 40)):
    folder = os.path.abspath(f"{low}_{high}_{side}")
    os.makedirs(f"{folder}/images")
    os.mkdir(f"{folder}/labels")
    Image.new("RGB", (side, side)).save(f"{folder}/images/a.png")
    outline = [low, low, high, low, high, high, low, high]
    with open(f"{folder}/labels/a.txt", "w") as file:
        file.write("0 " + " ".join(f"{n / side:.6f}" for n in outline) + "\n")
    with open(f"{folder}/data.yaml", "w") as file:
        file.write("names: [cat]\nnc: 1\n")

    data = sv.DetectionDataset.from_yolo(
        f"{folder}/images", f"{folder}/labels", f"{folder}/data.yaml", force_masks=True
    )
    read = next(iter(data))[2].mask[0]
    settings = get_cfg(overrides={"mask_ratio": 1, "overlap_mask": False})
    trained = YOLODataset(
        img_path=f"{folder}/images", data={"names": {0: "cat"}, "channels": 3}, task="segment",
        imgsz=side, augment=False, hyp=settings,
    )[0]["masks"].numpy()[0] > 0
    inside = coco.decode(coco.frPyObjects([outline], side, side))[..., 0]
    print(f"{low} to {high} of {side}, area {(high - low) ** 2}: supervision {read.sum()} px,",
          f"ultralytics {trained.sum()} px, pycocotools {inside.sum()} px,",
          f"IoU of the first two {(read & trained).sum() / (read | trained).sum():.2f}")
PY

expect <<'TXT'
3 to 17 of 40, area 196: supervision 225 px, ultralytics 225 px, pycocotools 196 px, IoU of the first two 1.00
3 to 17 of 60, area 196: supervision 225 px, ultralytics 196 px, pycocotools 196 px, IoU of the first two 0.87
3.25 to 17.75 of 40, area 210.25: supervision 256 px, ultralytics 225 px, pycocotools 225 px, IoU of the first two 0.88
TXT
