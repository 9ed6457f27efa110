"""`ray job submit --working-dir . -- python jobs/evaluate.py ...`, with the arguments of `lumen-ray evaluate`."""

import sys

from lumen_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
