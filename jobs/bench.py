"""`python jobs/bench.py KIND`, by itself or as a `ray job submit`: measures the speed of training (`train`), of
inference (`prompts`, `objects`, `yolo`, `chat`), of labelling (`label`), of serving (`serve`) or of the expert decoders
(`decoders`), with both sides of each comparison in one run. See `lumen_ray/bench`."""

import sys

from lumen_ray.bench.command import main

if __name__ == "__main__":
    sys.exit(main())
