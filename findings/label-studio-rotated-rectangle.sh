#!/usr/bin/env bash
# label-studio-sdk 2.1.2
#
# Guess:  exporting a rectangle rotated by 90 degrees to COCO gives the upright
#         box that covers the same pixels the annotator saw.
# Seen:   the corners are turned while still in percent of the width and height.
#         In an image that is not square a percent is not the same length on both
#         axes, so the box lands elsewhere and has the wrong shape. The Pascal VOC
#         export of the same task ignores the angle altogether.
# Output: 200x100 image, a 40x20 px box with its top left at (100, 20), turned
#         clockwise about that corner: it covers x 80..100, y 20..60. COCO says
#         x 60..100, y 20..40; VOC says x 100..140, y 20..40.
# Why it matters: boxes drawn at an angle become wrong training targets, silently
#         and only in images that are not square. Turn the corners in pixels
#         from the JSON export instead of trusting these two.
source "$(dirname "$0")/lib.sh"

install "label-studio-sdk==2.1.2" "numpy==2.2.6"

probe <<'PY'
import json, math, os
import xml.etree.ElementTree as ET
from PIL import Image
from label_studio_sdk.converter import Converter

config = """<View><Image name="image" value="$image"/>
<RectangleLabels name="label" toName="image"><Label value="cat"/></RectangleLabels></View>"""
W, H = 200, 100
Image.new("RGB", (W, H)).save("a.png")
v = dict(x=50, y=20, width=20, height=20, rotation=90, rectanglelabels=["cat"])
task = dict(id=1, data=dict(image=os.path.abspath("a.png")), annotations=[dict(id=1, result=[
    dict(id="r1", type="rectanglelabels", from_name="label", to_name="image",
         original_width=W, original_height=H, value=v)])])
json.dump([task], open("tasks.json", "w"))

x, y, w, h = v["x"] * W / 100, v["y"] * H / 100, v["width"] * W / 100, v["height"] * H / 100
t = math.radians(v["rotation"])
corners = [(x + a * math.cos(t) - b * math.sin(t), y + a * math.sin(t) + b * math.cos(t))
           for a, b in ((0, 0), (w, 0), (w, h), (0, h))]
xs, ys = zip(*corners)
print("pixels", [round(n) for n in (min(xs), min(ys), max(xs), max(ys))])

conv = Converter(config, ".", download_resources=False)
conv.convert_to_coco("tasks.json", "coco", output_image_dir="coco/images", is_dir=False)
bx, by, bw, bh = json.load(open("coco/result.json"))["annotations"][0]["bbox"]
print("coco  ", [round(n) for n in (bx, by, bx + bw, by + bh)])

conv.convert_to_voc("tasks.json", "voc", output_image_dir="voc/images", is_dir=False)
name = [os.path.join(d, f) for d, _, fs in os.walk("voc") for f in fs if f.endswith(".xml")][0]
print("voc   ", [int(e.text) for e in ET.parse(name).find(".//bndbox")])
PY

expect <<'TXT'
pixels [80, 20, 100, 60]
coco   [60, 20, 100, 40]
voc    [100, 20, 140, 40]
TXT
