"""Runs YOLOv8n for `yolo.bench` in a process and environment of its own, which has `ultralytics` and no `lumen_ray`:
reads requests as JSON lines, writes results as JSON lines."""

import base64
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

STATISTICS_PHOTOS = 4  # photographs that the batch norms see


def load(classes: int, folder: Path, images: Any) -> Any:
    """YOLOv8n with random weights for a number of classes, from its YAML, as `ultralytics` builds models. Writes into
    `folder`.

    `images`: float32 [B, 3, H, W] in 0..1, from which its batch norms take their statistics: without them, values
    vanish from layer to layer, and all scores are equal."""
    import torch
    import yaml
    from ultralytics import YOLO
    from ultralytics.nn.tasks import yaml_model_load

    settings = yaml_model_load("yolov8n.yaml") | {"nc": classes}
    written = folder / "yolov8n.yaml"
    written.write_text(yaml.safe_dump({k: v for k, v in settings.items() if k not in ("scale", "yaml_file")}))
    torch.manual_seed(0)
    model = YOLO(str(written))
    for module in model.model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.model.train()(images)
    model.model.eval()
    return model


def main(classes: int, side: int, threads: int, folder: str) -> None:
    """First reads {"photos": [JPEG in base64, ..]}, then answers every line {"thresholds": [of each photo]}: seconds,
    and for each photo the scores of its boxes, best first."""
    os.environ |= {"YOLO_OFFLINE": "true", "YOLO_CONFIG_DIR": folder}
    printed, sys.stdout = sys.stdout, sys.stderr  # the library prints as well
    import cv2
    import numpy as np
    import torch
    import ultralytics

    photos = [base64.b64decode(photo) for photo in json.loads(sys.stdin.readline())["photos"]]

    def decode(photo: bytes) -> Any:
        return cv2.imdecode(np.frombuffer(photo, np.uint8), cv2.IMREAD_COLOR)

    some = np.stack([cv2.resize(decode(photo), (side, side))[..., ::-1] for photo in photos[:STATISTICS_PHOTOS]])
    model = load(classes, Path(folder), torch.from_numpy(some).permute(0, 3, 1, 2) / 255)

    def detect(photo: bytes, threshold: float) -> Any:
        (found,) = model.predict(decode(photo), conf=threshold, imgsz=side, device="cpu", verbose=False)
        return found.boxes.numpy()

    detect(photos[0], 0.5)
    torch.set_num_threads(threads)  # the first call sets it to a number of its own
    versions = {"torch": torch.__version__, "ultralytics": ultralytics.__version__, "opencv": cv2.__version__}
    print(json.dumps({"versions": versions}), file=printed, flush=True)
    for line in sys.stdin:
        thresholds = json.loads(line)["thresholds"]
        wall, cpu = time.perf_counter(), time.process_time()
        found = [detect(photo, threshold) for photo, threshold in zip(photos, thresholds, strict=True)]
        seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        scores = [sorted(map(float, boxes.conf), reverse=True) for boxes in found]
        answer = {"seconds": seconds, "scores": scores, "threads": torch.get_num_threads()}
        print(json.dumps(answer), file=printed, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
