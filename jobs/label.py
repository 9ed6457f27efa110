"""`ray job submit --working-dir . -- python jobs/label.py ...`, with the arguments of `lumen-ray label`."""

import sys

from lumen_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["label", *sys.argv[1:]]))
