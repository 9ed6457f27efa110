#!/usr/bin/env bash
# datasets 5.2.0 with pyarrow 26.0.1
#
# Guess:  Dataset.to_parquet writes the images into the file, as save_to_disk
#         does, so that the file can be moved to the machines that train.
# Seen:   for images given by path, to_parquet writes {bytes: None, path: <absolute
#         path>}: no pixels. save_to_disk of the same data set embeds the encoded
#         files. The Parquet file works as long as the original folder is there,
#         which is exactly where one tries it first.
# Output: save_to_disk: bytes present, path "a.png". to_parquet: bytes None, absolute
#         path. After removing the image folder the first still decodes and the
#         second raises FileNotFoundError.
# Why it matters: a Parquet "copy" of a set can be a list of paths; the loss shows
#         on another machine or after the source was cleaned up, and readers such
#         as pyarrow see a null where the image should be. Check the bytes column
#         before deleting anything.
source "$(dirname "$0")/lib.sh"

install "datasets==5.2.0" "pyarrow==26.0.1" "pillow==12.3.0" "numpy==2.2.6"

probe <<'PY'
import os, shutil
import datasets
import pyarrow.parquet as pq
from PIL import Image

datasets.disable_progress_bars()
os.mkdir("pictures")
path = os.path.abspath("pictures/a.png")
Image.new("RGB", (8, 6), (10, 20, 30)).save(path)
data = datasets.Dataset.from_dict({"image": [path]}).cast_column("image", datasets.Image())
data.save_to_disk("saved")
data.to_parquet("data.parquet")

saved = datasets.load_from_disk("saved")
stored = {
    "save_to_disk": saved.with_format("arrow")[:].column("image").to_pylist()[0],
    "to_parquet": pq.read_table("data.parquet").column("image").to_pylist()[0],
}
for name, cell in stored.items():
    print(f"{name}: bytes {'None' if cell['bytes'] is None else 'present'},",
          f"path {'absolute' if os.path.isabs(cell['path']) else cell['path']}")

shutil.rmtree("pictures")
parquet = datasets.Dataset.from_parquet("data.parquet", cache_dir="cache")
for name, again in (("save_to_disk", saved), ("to_parquet", parquet)):
    try:
        print(f"{name}, pictures gone: {again[0]['image'].size}")
    except FileNotFoundError:
        print(f"{name}, pictures gone: FileNotFoundError")
PY

expect <<'TXT'
save_to_disk: bytes present, path a.png
to_parquet: bytes None, path absolute
save_to_disk, pictures gone: (8, 6)
to_parquet, pictures gone: FileNotFoundError
TXT
