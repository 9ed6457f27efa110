"""`ray job submit --working-dir . -- python jobs/serve.py ...`, with the arguments of `lumen-ray serve`."""

import sys

from lumen_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
