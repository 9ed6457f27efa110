#!/usr/bin/env bash
# ray 2.60.0 (Ray Data) and webdataset 1.0.2
#
# Guess:  read_webdataset returns the json member of a sample as webdataset does: a
#         list of objects stays a list, whether there are none, one or five.
# Seen:   a list with exactly one element is replaced by that element. None and two
#         are kept. webdataset itself keeps all three.
# Output: objects in the images: 0, 1, 2. webdataset: list, list, list. Ray: list,
#         dict, list.
# Why it matters: images with one object are the most common ones in many sets. Code
#         that loops over the list then loops over the keys of a dict, and len()
#         counts fields instead of objects. Store {"objects": [...]} instead of a
#         bare list.
source "$(dirname "$0")/lib.sh"

install "ray[data]==2.60.0" "webdataset==1.0.2" "numpy==2.2.6"

probe <<'PY'
import os
import ray
import webdataset as wds

with wds.TarWriter("a.tar") as tar:
    for n in range(3):
        tar.write({"__key__": f"image{n}", "json": [{"bbox": [i, i, 5, 5], "label": "cat"} for i in range(n)]})

ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
ray_rows = ray.data.read_webdataset(os.path.abspath("a.tar")).take_all()
wds_rows = list(wds.WebDataset("a.tar", shardshuffle=False).decode())
for name, rows in (("webdataset", wds_rows), ("ray", ray_rows)):
    for row in sorted(rows, key=lambda r: r["__key__"]):
        print(name, row["__key__"], type(row["json"]).__name__, "len", len(row["json"]))
ray.shutdown()
PY

expect <<'TXT'
webdataset image0 list len 0
webdataset image1 list len 1
webdataset image2 list len 2
ray image0 list len 0
ray image1 dict len 2
ray image2 list len 2
TXT
