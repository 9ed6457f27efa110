#!/usr/bin/env bash
# datasets 5.2.0 with pyarrow 26.0.1
#
# Guess:  load_dataset("webdataset", data_dir=...), which reads sample by sample, takes the
#         types of a JSON member from enough of the tar to know them, or from the
#         features in the folder's README.md. A list that is empty in many samples is
#         a list.
# Seen:   types come from the first 5 samples of the first tar. A list that is empty in
#         all of them gets the type "list of null", and the first filled one after it
#         ends the loading with a cast error. README.md counts only if the folder is
#         given as the set's path, not as data_dir; features= counts. The 5 samples
#         are taken together: one may fill "boxes" and another "masks".
# Output: 7 samples. First filled list in sample 5: loads. In 6: cast error, with
#         README.md in data_dir as well. With README.md in a path, or features=: loads.
#         Two lists, filled in samples 1 and 2 only: loads.
# Why it matters: in a set with negatives, five empty samples in front are usual.
#         imagefolder takes 10 MiB for the same (see the script beside this one). Put
#         samples that together fill every list first, or pass features=.
source "$(dirname "$0")/lib.sh"

install "datasets==5.2.0" "pyarrow==26.0.1" "pillow==12.3.0" "numpy==2.2.6"

probe <<'PY'
import io, json, os, tarfile
import datasets
from datasets import Features, Image, List, Value
from PIL import Image as Pillow

datasets.disable_progress_bars()
README = """---
dataset_info:
  features:
  - name: __key__
    dtype: string
  - name: __url__
    dtype: string
  - name: png
    dtype: image
  - name: json
    struct:
    - name: boxes
      list:
        list: float64
    - name: masks
      list: string
---
"""
FEATURES = Features(
    {
        "png": Image(),
        "json": {"boxes": List(List(Value("float64"))), "masks": List(Value("string"))},
        "__key__": Value("string"),
        "__url__": Value("string"),
    }
)
picture = io.BytesIO()
Pillow.new("RGB", (8, 6)).save(picture, "PNG")


def show(folder, boxes_in, masks_in=0, readme=False, by_path=False, **options):
    os.mkdir(folder)
    with tarfile.open(f"{folder}/0.tar", "w") as tar:
        for number in range(1, 8):
            labels = {
                "boxes": [[1.0, 1.0, 4.0, 3.0]] if number == boxes_in else [],
                "masks": ["01"] if number == masks_in else [],
            }
            for extension, data in (("png", picture.getvalue()), ("json", json.dumps(labels).encode())):
                member = tarfile.TarInfo(f"{number}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    if readme:
        with open(f"{folder}/README.md", "w") as file:
            file.write(README)
    try:
        options |= {"path": f"./{folder}"} if by_path else {"path": "webdataset", "data_dir": folder}
        data = datasets.load_dataset(split="train", cache_dir="cache", **options)
        boxes = sum(len(labels["boxes"]) for labels in data["json"])
        masks = sum(len(labels["masks"]) for labels in data["json"])
        seen = f"{len(data)} samples, {boxes} box, {masks} masks"
    except datasets.exceptions.DatasetGenerationError as error:
        seen = f"{type(error.__cause__).__name__}: {error.__cause__}"
    print(f"{folder}: {seen}")


show("sample5", 5)
show("sample6", 6)
show("sample6_readme", 6, readme=True)
show("sample6_readme_path", 6, readme=True, by_path=True)
show("sample6_features", 6, features=FEATURES)
show("samples1and2", 1, 2)
PY

expect <<'TXT'
sample5: 7 samples, 1 box, 0 masks
sample6: TypeError: Couldn't cast array of type list<item: double> to null
sample6_readme: TypeError: Couldn't cast array of type list<item: double> to null
sample6_readme_path: 7 samples, 1 box, 0 masks
sample6_features: 7 samples, 1 box, 0 masks
samples1and2: 7 samples, 1 box, 1 masks
TXT
