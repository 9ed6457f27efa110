"""`python jobs/answers.py write|compare ...`, by itself or as a `ray job submit`: an LLM's own answers to questions of
text alone, as training data and to see what training kept. See `lumen_ray/evaluate/answers.py`."""

import sys

from lumen_ray.evaluate.answers import main

if __name__ == "__main__":
    sys.exit(main())
