"""`python jobs/bench.py KIND`, alone or by `ray job submit`: speed of training (`train`) and of the expert decoders
(`decoders`), both sides of each comparison in one run. See `lumen_ray/bench`."""

import sys

from lumen_ray.bench.command import main

if __name__ == "__main__":
    sys.exit(main())
