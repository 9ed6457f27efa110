#!/usr/bin/env bash
# torch 2.13.0 (CPU), nn.Linear under autocast in bfloat16
#
# Guess:  a linear layer keeps nothing from one call to the next, so a loop over batches
#         of different lengths needs the memory of the longest one.
# Seen:   in bfloat16 the product is oneDNN's, and for every number of rows that occurs a
#         compiled one is kept, in the forward and the backward pass, with a buffer as large
#         as the weights. Up to 1,024 are kept. In float32, which is MKL's, nothing is.
# Output: 100 steps with 300 rows each: a few MiB more. 100 steps with 200 to 299 rows:
#         about 200 MiB more, 2 MiB each, for one layer whose weights take 2 MiB in bfloat16.
#         With LRU_CACHE_CAPACITY and ONEDNN_PRIMITIVE_CACHE_CAPACITY at 8: a few MiB.
# Why it matters: fine-tuning on a CPU with sentences of any length looks like a leak of
#         gigabytes. Pad to a few lengths, or set both variables.
source "$(dirname "$0")/lib.sh"

install "numpy==2.2.6" "torch==2.13.0"

probe <<'PY'
import os
import subprocess
import sys

GROW = """
import sys
import torch

torch.set_num_threads(1)
layer = torch.nn.Linear(1024, 1024)
dtype = getattr(torch, sys.argv[1])


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20


def growth(rows):
    before = resident()
    for number in rows:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            layer(torch.ones(number, 1024)).sum().backward()
        layer.zero_grad()
    return resident() - before


growth([300, 300])
print(growth([300] * 100), growth(range(200, 300)))
"""


def run(dtype, **environment):
    command = [sys.executable, "-c", GROW, dtype]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    same, different = map(float, done.stdout.split())
    print(dtype, *environment, f"{same:.0f} and {different:.0f} MiB", file=sys.stderr)
    return "stays" if same < 40 else "grows", "stays" if different < 60 else "grows" if different > 100 else "?"


both = {"LRU_CACHE_CAPACITY": "8", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8"}
for dtype, environment in (("float32", {}), ("bfloat16", {}), ("bfloat16", both)):
    same, different = run(dtype, **environment)
    print(f"{dtype}, {len(environment)} variables set: same rows {same}, different rows {different}")
PY

expect <<'TXT'
float32, 0 variables set: same rows stays, different rows stays
bfloat16, 0 variables set: same rows stays, different rows grows
bfloat16, 2 variables set: same rows stays, different rows stays
TXT
