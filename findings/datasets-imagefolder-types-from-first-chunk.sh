#!/usr/bin/env bash
# datasets 5.2.0 with pyarrow 26.0.1
#
# Guess:  imagefolder takes the type of a column from the whole metadata.jsonl, or
#         from the features in the folder's README.md if they are given there. A
#         list that is empty in many rows is a list.
# Seen:   types come from the first 10 MiB of the file alone. A list that is empty in
#         all of its rows gets the type "list of null", and the first filled one after
#         it ends the loading with a cast error. Features in README.md do not help;
#         features= in the call does, and so does a filled list in the first 10 MiB.
# Output: 11 rows of 1.05 MB. Boxes in row 10: loads. In row 11, the first after 10
#         MiB: cast error, with README.md as well. With features=: loads.
# Why it matters: rows sorted by class or source, negatives first, are usual. A small
#         sample of the set loads, and the full set fails after some minutes. Pass
#         features=, or put a row with all columns filled first.
source "$(dirname "$0")/lib.sh"

install "datasets==5.2.0" "pyarrow==26.0.1" "pillow==12.3.0" "numpy==2.2.6"

probe <<'PY'
import json, os
import datasets
from datasets import Features, Image, List, Value
from PIL import Image as Pillow

datasets.disable_progress_bars()
README = """---
dataset_info:
  features:
  - name: image
    dtype: image
  - name: boxes
    list:
      list: float64
  - name: note
    dtype: string
---
"""
FEATURES = Features({"image": Image(), "boxes": List(List(Value("float64"))), "note": Value("string")})


def show(folder, filled, readme=False, **options):
    os.mkdir(folder)
    with open(f"{folder}/metadata.jsonl", "w") as file:
        for row in range(1, 12):
            Pillow.new("RGB", (8, 6)).save(f"{folder}/{row}.png")
            boxes = [[1.0, 1.0, 4.0, 3.0]] if row == filled else []
            file.write(json.dumps({"file_name": f"{row}.png", "boxes": boxes, "note": "x" * 1_050_000}) + "\n")
    if readme:
        with open(f"{folder}/README.md", "w") as file:
            file.write(README)
    try:
        data = datasets.load_dataset(f"./{folder}", split="train", cache_dir="cache", **options)
        seen = f"{len(data)} rows, boxes in {sum(len(boxes) for boxes in data['boxes'])}"
    except datasets.exceptions.DatasetGenerationError as error:
        seen = f"{type(error.__cause__).__name__}: {error.__cause__}"
    print(f"{folder}: {seen}")


show("row10", 10)
show("row11", 11)
show("row11_readme", 11, readme=True)
show("row11_features", 11, features=FEATURES)
PY

expect <<'TXT'
row10: 11 rows, boxes in 1
row11: TypeError: Couldn't cast array of type list<item: double> to null
row11_readme: TypeError: Couldn't cast array of type list<item: double> to null
row11_features: 11 rows, boxes in 1
TXT
