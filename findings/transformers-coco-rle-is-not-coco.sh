#!/usr/bin/env bash
# transformers 5.23.0 with pycocotools 2.0.11
#
# Guess:  post_process_instance_segmentation(..., return_coco_annotation=True),
#         documented as "COCO run-length encoding", gives one COCO RLE for each
#         entry of segments_info, ready for pycocotools.
# Seen:   each entry is a flat list of (start, length) pairs, row by row, counted
#         from 1; COCO counts alternating runs down the columns. As a COCO
#         `segmentation` the list is taken for a polygon and gives an empty mask,
#         silently; as RLE counts it has the right area and cannot be decoded. And the
#         first entry is the background, so the list is one longer than segments_info and zip() pairs
#         the background with the first object.
# Output: one object found; 2 encodings for 1 segment; encoding 0 is the
#         background; as polygons 0 and 0 px; as counts ValueError from decode;
#         read as 1-based row-major pairs, encoding 1 is the object exactly.
# Why it matters: results written this way score 0 in an evaluation, or pair every
#         score with the mask of its neighbour. Ask for return_binary_maps=True and
#         encode the maps with pycocotools.mask.encode.
source "$(dirname "$0")/lib.sh"

install "torch==2.13.0" "transformers==5.23.0" "pycocotools==2.0.11" "pillow==12.3.0" "numpy==2.2.6"

probe <<'PY'
from types import SimpleNamespace
import numpy as np
import torch
from pycocotools import mask as rle
from transformers import Mask2FormerImageProcessorPil

H, W = 96, 128
classes = torch.full((1, 1, 3), -20.0)
classes[0, 0, 0] = 20.0
masks = torch.full((1, 1, H, W), -20.0)
masks[0, 0, 20:50, 30:90] = 20.0
output = SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)

processor = Mask2FormerImageProcessorPil(num_labels=2)
post = processor.post_process_instance_segmentation
truth = post(output, target_sizes=[(H, W)], return_binary_maps=True)[0]["segmentation"][0].numpy() > 0
found = post(output, target_sizes=[(H, W)], return_coco_annotation=True)[0]
codes = [[int(n) for n in code] for code in found["segmentation"]]
print(len(codes), "encodings for", len(found["segments_info"]), "segment")


def pairs(code):
    flat = np.zeros(H * W, bool)
    for start, length in zip(code[::2], code[1::2]):
        flat[start - 1:start - 1 + length] = True
    return flat.reshape(H, W)


for n, code in enumerate(codes):
    polygon = rle.decode(rle.merge(rle.frPyObjects([code], H, W)))
    runs = rle.frPyObjects(dict(size=[H, W], counts=code), H, W)
    try:
        counts = f"{rle.decode(runs).sum()} px"
    except ValueError:
        counts = f"area {rle.area(runs)}, decode ValueError"
    print(f"encoding {n}: as polygon {polygon.sum()} px; as counts {counts};",
          f"as 1-based row-major pairs: object {(pairs(code) == truth).all()},",
          f"background {(pairs(code) == ~truth).all()}")
PY

expect <<'TXT'
2 encodings for 1 segment
encoding 0: as polygon 0 px; as counts area 10489, decode ValueError; as 1-based row-major pairs: object False, background True
encoding 1: as polygon 0 px; as counts area 1799, decode ValueError; as 1-based row-major pairs: object True, background False
TXT
