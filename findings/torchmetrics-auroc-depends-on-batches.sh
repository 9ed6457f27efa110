#!/usr/bin/env bash
# torchmetrics 1.9.0 with torch 2.13.0
#
# Guess:  AUROC depends only on the order of the scores, so logits, probabilities
#         and any split into batches give the same number.
# Seen:   each update() looks at its own batch: if any score is outside 0..1 the
#         whole batch goes through a float32 sigmoid, otherwise it is kept as it
#         is. A batch of logits that all happen to lie in 0..1 is not squashed and
#         is then ranked against batches that are. And logits above about 17 all
#         become exactly 1.0, which makes ties of scores that were ordered.
# Output: four logits that rank perfectly: 1.0 in one batch, 0.5 in two. Logits 18,
#         20, 22, 24 in perfect order: 0.5; divided by 100: 1.0.
# Why it matters: image-text logits (cosine times 100) are in that range, and a
#         metric that moves with the batch size makes runs incomparable. Apply the
#         sigmoid, or divide by the temperature, in float64 before update().
source "$(dirname "$0")/lib.sh"

install "torch==2.13.0" "torchmetrics==1.9.0" "numpy==2.2.6"

probe <<'PY'
import torch
from torchmetrics.classification import BinaryAUROC


def auroc(scores, labels, batch):
    metric = BinaryAUROC()
    for s, y in zip(torch.tensor(scores).split(batch), torch.tensor(labels).split(batch)):
        metric.update(s, y)
    return f"{metric.compute():.2f}"


labels = [1, 1, 0, 0]
logits = [0.55, 0.60, 0.50, -4.0]
print("small logits, one batch of 4:", auroc(logits, labels, 4))
print("small logits, two batches of 2:", auroc(logits, labels, 2))
large = [24.0, 22.0, 20.0, 18.0]
print("large logits:", auroc(large, labels, 4))
print("large logits / 100:", auroc([x / 100 for x in large], labels, 4))
PY

expect <<'TXT'
small logits, one batch of 4: 1.00
small logits, two batches of 2: 0.50
large logits: 0.50
large logits / 100: 1.00
TXT
