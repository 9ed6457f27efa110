"""`python jobs/score.py LABELS --shards SHARDS`: how good the boxes of a labelled folder are, where its images are
annotated in shards. See `lumen_ray/evaluate/labelled.py`."""

import sys

from lumen_ray.evaluate.labelled import main

if __name__ == "__main__":
    sys.exit(main())
