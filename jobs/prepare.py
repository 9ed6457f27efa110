"""`ray job submit --working-dir . -- python jobs/prepare.py ...`, with the arguments of `lumen-ray prepare`."""

import sys

from lumen_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["prepare", *sys.argv[1:]]))
