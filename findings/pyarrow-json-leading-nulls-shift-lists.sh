#!/usr/bin/env bash
# pyarrow 26.0.1 (pyarrow.json) and datasets 5.2.0 (imagefolder)
#
# Guess:  [null, 0.9] in a JSON line is read as [null, 0.9], and imagefolder gives each
#         image the values of its own line in metadata.jsonl.
# Seen:   until a list column has met its first value, the reader drops nulls of its
#         lists but keeps the lengths of the lists. All values that follow move forward
#         into the wrong places and rows, and the last ones are made up, without an
#         error; only table.validate() finds it. If no value follows, imagefolder ends
#         with ArrowIndexError. Nulls after the first value are read well, as are lists
#         of one null and empty lists. It begins anew in each block of the file, which
#         imagefolder makes of 320 KiB. features= does not help it; a schema given to
#         pyarrow does, and so does metadata.parquet. (Reported: apache/arrow#51305.)
# Output: scores [null, 0.9], [0.8, 0.7] come out as [0.9, 0.8], [0.7, 0.0].
# Why it matters: the score is null for a box drawn by hand and a number for one of a
#         model. The set loads, each image has as many scores as boxes, and they belong
#         to others. Write metadata.parquet, or -1 instead of null.
source "$(dirname "$0")/lib.sh"

install "datasets==5.2.0" "pyarrow==26.0.1" "pillow==12.3.0" "numpy==2.2.6"

probe <<'PY'
import io, json, os
import datasets
import pyarrow
import pyarrow.json
import pyarrow.parquet
from datasets import Features, Image, List, Value
from PIL import Image as Pillow

datasets.disable_progress_bars()
SCHEMA = pyarrow.schema(
    {"file_name": pyarrow.string(), "note": pyarrow.string(), "scores": pyarrow.list_(pyarrow.float64())}
)
FEATURES = Features({"image": Image(), "note": Value("string"), "scores": List(Value("float64"))})
NULL_FIRST = [[None, 0.9], [0.8, 0.7]]
LIST_OF_NULLS = [[None, None], [0.9, 0.8]]
ONLY_NULLS = [[None, None], [None, None]]
VALUE_FIRST = [[0.9, None], [None, 0.7]]
SINGLE = [[None], [0.9], []]


def rows(scores, note=""):
    return [{"file_name": f"{n}.png", "note": note, "scores": values} for n, values in enumerate(scores)]


def lines(scores, note=""):
    return "".join(json.dumps(row) + "\n" for row in rows(scores, note)).encode()


def read_pyarrow(scores, **options):
    table = pyarrow.json.read_json(io.BytesIO(lines(scores)), **options)
    try:
        table.validate()
    except pyarrow.ArrowInvalid:
        print("(validate: ArrowInvalid) ", end="")
    return table["scores"].to_pylist()


def read_imagefolder(scores, note="", parquet=False, **options):
    folder = f"set{len(os.listdir('.'))}"
    os.mkdir(folder)
    for n in range(len(scores)):
        Pillow.new("RGB", (8, 6)).save(f"{folder}/{n}.png")
    if parquet:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows(scores), SCHEMA), f"{folder}/metadata.parquet")
    else:
        with open(f"{folder}/metadata.jsonl", "wb") as file:
            file.write(lines(scores, note))
    return datasets.load_dataset(f"./{folder}", split="train", cache_dir="cache", **options)["scores"][:]


def show(name, read, scores, **options):
    print(f"{name}: ", end="")
    try:
        seen = read(scores, **options)
        print(f"{scores} is {'right' if seen == scores else seen}")
    except datasets.exceptions.DatasetGenerationError as error:
        print(f"{scores} is {type(error.__cause__).__name__}")


show("pyarrow", read_pyarrow, NULL_FIRST)
show("pyarrow", read_pyarrow, LIST_OF_NULLS)
show("pyarrow", read_pyarrow, VALUE_FIRST)
show("pyarrow", read_pyarrow, SINGLE)
show("pyarrow, schema", read_pyarrow, NULL_FIRST, parse_options=pyarrow.json.ParseOptions(explicit_schema=SCHEMA))
show("imagefolder", read_imagefolder, NULL_FIRST)
show("imagefolder", read_imagefolder, LIST_OF_NULLS)
show("imagefolder", read_imagefolder, ONLY_NULLS)
show("imagefolder, features=", read_imagefolder, NULL_FIRST, features=FEATURES)
show("imagefolder, parquet", read_imagefolder, NULL_FIRST, parquet=True)
show("imagefolder", read_imagefolder, VALUE_FIRST)
# With lines of 200 kB the second one is in a block of its own.
show("imagefolder, two blocks", read_imagefolder, VALUE_FIRST, note="x" * 200_000)
PY

expect <<'TXT'
pyarrow: (validate: ArrowInvalid) [[None, 0.9], [0.8, 0.7]] is [[0.9, 0.8], [0.7, 0.0]]
pyarrow: (validate: ArrowInvalid) [[None, None], [0.9, 0.8]] is [[None, 0.9], [0.8, None]]
pyarrow: [[0.9, None], [None, 0.7]] is right
pyarrow: [[None], [0.9], []] is right
pyarrow, schema: [[None, 0.9], [0.8, 0.7]] is right
imagefolder: [[None, 0.9], [0.8, 0.7]] is [[0.9, 0.8], [0.7, 0.0]]
imagefolder: [[None, None], [0.9, 0.8]] is [[None, 0.9], [0.8, None]]
imagefolder: [[None, None], [None, None]] is ArrowIndexError
imagefolder, features=: [[None, 0.9], [0.8, 0.7]] is [[0.9, 0.8], [0.7, 0.0]]
imagefolder, parquet: [[None, 0.9], [0.8, 0.7]] is right
imagefolder: [[0.9, None], [None, 0.7]] is right
imagefolder, two blocks: [[0.9, None], [None, 0.7]] is [[0.9, None], [0.7, 0.0]]
TXT
