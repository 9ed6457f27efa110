#!/usr/bin/env bash
# torch 2.13.0 (torch.distributed.checkpoint)
#
# Guess:  a failed load raises an ordinary error, so "try the newest checkpoint,
#         except Exception: try the one before" resumes after a bad save.
# Seen:   CheckpointException derives from BaseException, like KeyboardInterrupt.
#         `except Exception` does not catch it and the job ends, with a good older
#         checkpoint beside the one that failed.
# Output: a key missing in the newest checkpoint and a tensor of another shape both
#         raise CheckpointException, not an Exception; the fallback is not reached.
# Why it matters: resume code with a fallback, quarantine and clean-up written with
#         `except Exception` all look right and never run. Name the class:
#         torch.distributed.checkpoint.CheckpointException.
source "$(dirname "$0")/lib.sh"

install "torch==2.13.0" "numpy==2.2.6"

probe <<'PY'
import torch
import torch.distributed.checkpoint as dcp

print("bases", [c.__name__ for c in dcp.CheckpointException.__mro__[1:]])
dcp.save({"weight": torch.ones(2), "bias": torch.ones(2)}, checkpoint_id="step1")
dcp.save({"weight": torch.ones(2)}, checkpoint_id="step2")
dcp.save({"weight": torch.ones(3), "bias": torch.ones(2)}, checkpoint_id="step3")


def resume(newest):
    state = {"weight": torch.zeros(2), "bias": torch.zeros(2)}
    for step in (newest, "step1"):
        try:
            dcp.load(state, checkpoint_id=step)
            return f"resumed from {step}"
        except Exception:
            continue


for newest, what in (("step1", "intact"), ("step2", "key missing"), ("step3", "other shape")):
    try:
        print(f"{what}: {resume(newest)}")
    except BaseException as e:
        print(f"{what}: {type(e).__name__} got past except Exception")
PY

expect <<'TXT'
bases ['BaseException', 'object']
intact: resumed from step1
key missing: CheckpointException got past except Exception
other shape: CheckpointException got past except Exception
TXT
