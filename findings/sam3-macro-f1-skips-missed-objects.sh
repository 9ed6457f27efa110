#!/usr/bin/env bash
# sam3 0.1.4 (its evaluator cgf1_eval) with pycocotools 2.0.11
#
# Guess:  "positive macro F1" is the mean F1 of the phrases whose object is in the
#         image, so a phrase of which nothing was found counts as 0.
# Seen:   such a phrase adds 0 to the sum but is not counted in the number that the
#         sum is divided by. The micro F1 beside it, and with it cgF1, do count its
#         misses.
# Output: four phrases with one object each. All found: macro F1 1.00. Three of them
#         not found at all: still 1.00, while micro F1 falls to 0.40. Three found in
#         the wrong place, which is the better answer: 0.25.
# Why it matters: a higher threshold always looks as good or better, and a model that
#         answers only where it is sure wins. Compare models by the micro F1 or cgF1,
#         or divide the sum by all phrases with objects.
source "$(dirname "$0")/lib.sh"

install "numpy==2.2.6" "scipy==1.15.3" "pycocotools==2.0.11" "tqdm==4.67.1"
# Only the evaluator is used, which needs none of the package's other requirements.
"$WORK/venv/bin/pip" install --quiet --no-deps "sam3==0.1.4" || exit 2

probe <<'PY'
import contextlib
import importlib.util
import io
import json
import sysconfig

path = f"{sysconfig.get_paths()['purelib']}/sam3/eval/cgf1_eval.py"
spec = importlib.util.spec_from_file_location("cgf1_eval", path)
cgf1 = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cgf1)

names = ["a", "b", "c", "d"]
images = [
    {"id": n, "file_name": f"{name}.jpg", "text_input": name, "width": 100, "height": 100, "is_instance_exhaustive": True}
    for n, name in enumerate(names, 1)
]
truth = [
    {"id": n, "image_id": n, "category_id": 1, "bbox": [10, 10, 40, 40], "area": 1600, "iscrowd": 0} for n in range(1, 5)
]
with open("truth.json", "w") as file:
    json.dump({"images": images, "annotations": truth, "categories": [{"id": 1, "name": "object"}]}, file)


def score(boxes):
    found = [{"image_id": n, "category_id": 1, "bbox": box, "score": 0.9} for n, box in boxes.items()]
    with open("found.json", "w") as file:
        json.dump(found, file)
    with contextlib.redirect_stdout(io.StringIO()):
        metrics = cgf1.CGF1Evaluator("truth.json", iou_type="bbox").evaluate("found.json")
    return " ".join(f"{kind} {metrics[f'cgF1_eval_bbox_positive_{kind}_F1']:.2f}" for kind in ("macro", "micro"))


right, wrong = [10, 10, 40, 40], [60, 60, 30, 30]
print("all found:", score(dict.fromkeys(range(1, 5), right)))
print("one found, three not:", score({1: right}))
print("one found, three elsewhere:", score({1: right, 2: wrong, 3: wrong, 4: wrong}))
PY

expect <<'TXT'
all found: macro 1.00 micro 1.00
one found, three not: macro 1.00 micro 0.40
one found, three elsewhere: macro 0.25 micro 0.25
TXT
