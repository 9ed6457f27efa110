"""`python jobs/bench.py train`, alone or by `ray job submit`: speed of training, both sides of each comparison in one
run. See `lumen_ray/bench`."""

import sys

from lumen_ray.bench.command import main

if __name__ == "__main__":
    sys.exit(main())
