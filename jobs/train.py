"""`ray job submit --working-dir . -- python jobs/train.py ...`, with the arguments of `lumen-ray train`."""

import sys

from lumen_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
