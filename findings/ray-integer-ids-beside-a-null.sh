#!/usr/bin/env bash
# ray 2.60.0 (Ray Data)
#
# Guess:  an int64 id column with one missing value passes through map_batches
#         unchanged, as it does through map.
# Seen:   the default batch format is NumPy, which has no null for integers, so a
#         batch with a null arrives as float64. Ids above 2**53 lose their last
#         digits and different ids become equal; the column leaves as double, even
#         though the function returned the batch untouched. It depends on the batch:
#         without a null the same function keeps int64.
# Output: map and batch_format="pyarrow": 3 distinct ids, as given. Default: float64,
#         3 ids become 1. Same rows without the null: int64, 3 distinct ids.
# Why it matters: 64-bit hashes are common row and image ids. One row without an id
#         makes joins, deduplication and "already done" lists go wrong for its whole
#         batch. Use batch_format="pyarrow", or keep such ids as strings.
source "$(dirname "$0")/lib.sh"

install "ray[data]==2.60.0" "numpy==2.2.6"

probe <<'PY'
import ray

ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
IDS = [2**60 + 1, 2**60 + 2, 2**60 + 3]


def same(batch):
    return batch


def show(name, data):
    ids = [row["id"] for row in data.take_all()]
    ids = [int(i) for i in ids if i is not None and i == i]
    print(f"{name}: {data.schema().types[0]}, {len(set(ids))} distinct ids, as given {ids == IDS}")


with_null = ray.data.from_items([{"id": i} for i in IDS + [None]], override_num_blocks=1)
without = ray.data.from_items([{"id": i} for i in IDS], override_num_blocks=1)
show("map", with_null.map(same).materialize())
show("map_batches pyarrow", with_null.map_batches(same, batch_format="pyarrow").materialize())
show("map_batches", with_null.map_batches(same).materialize())
show("map_batches, no null", without.map_batches(same).materialize())
ray.shutdown()
PY

expect <<'TXT'
map: int64, 3 distinct ids, as given True
map_batches pyarrow: int64, 3 distinct ids, as given True
map_batches: double, 1 distinct ids, as given False
map_batches, no null: int64, 3 distinct ids, as given True
TXT
