#!/usr/bin/env bash
# ray 2.60.0 (ray.util.metrics) and prometheus_client 0.26.0
#
# Guess:  the _sum that Ray exports for a Histogram is the sum of the observed values,
#         as the Prometheus format says, so _sum / _count is their mean.
# Seen:   a Ray process hands on the counts of the buckets only, and the exporter makes
#         the sum up from them: each observation counts as the middle of its bucket,
#         and as twice the last bound if it lies above that. Counts and buckets are
#         right. A Counter of the same values is exact.
# Output: bounds 1 and 10. Four times 0.05: mean 0.50 instead of 0.05. Four times 12:
#         mean 20.00 instead of 12.00.
# Why it matters: _sum / _count is the usual panel for the mean latency, and it stays
#         the same whether requests take 0.05 or 0.9 seconds: a service ten times as
#         slow does not show. Ray's own histograms are exported in the same way. Add a
#         Counter that is increased by the value, and divide that by _count.
source "$(dirname "$0")/lib.sh"

install "ray[default]==2.60.0" "prometheus_client==0.26.0"

probe <<'PY'
import os, time, urllib.request

os.environ["RAY_AUTH_MODE"] = "disabled"  # a local Ray needs no token
import prometheus_client
import ray
from prometheus_client.parser import text_string_to_metric_families
from ray.util.metrics import Counter, Histogram

BOUNDS = [1.0, 10.0]
VALUES = {"fast": [0.05] * 4, "slow": [12.0] * 4}


def samples(text):
    """(name of the sample without Ray's prefix, case) -> value."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if "case" in sample.labels:
                bound = sample.labels.get("le", "")
                found[sample.name.removeprefix("ray_") + bound, sample.labels["case"]] = sample.value
    return found


def show(name, found):
    for case in VALUES:
        count, total = found["probe_seconds_count", case], found["probe_seconds_sum", case]
        buckets = [int(found[f"probe_seconds_bucket{bound}", case]) for bound in ("1.0", "10.0", "+Inf")]
        print(f"{name} {case}: buckets {buckets}, count {count:.0f}, sum {total:.2f}, mean {total / count:.2f}")


registry = prometheus_client.CollectorRegistry()
reference = prometheus_client.Histogram("probe_seconds", "-", ["case"], buckets=BOUNDS, registry=registry)
ray.init(num_cpus=1, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
histogram = Histogram("probe_seconds", "-", boundaries=BOUNDS, tag_keys=("case",))
counter = Counter("probe_spent", "-", tag_keys=("case",))
for case, values in VALUES.items():
    for value in values:
        reference.labels(case).observe(value)
        histogram.observe(value, {"case": case})
        counter.inc(value, {"case": case})

node = ray.nodes()[0]
url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
local = urllib.request.build_opener(urllib.request.ProxyHandler({}))
exported = {}
deadline = time.monotonic() + 120
while len(exported) < 12 and time.monotonic() < deadline:  # Ray reports every few seconds
    time.sleep(1)
    try:
        exported = samples(local.open(url, timeout=10).read().decode())
    except OSError:  # the exporter is not up yet
        continue
show("prometheus_client", samples(prometheus_client.generate_latest(registry).decode()))
show("ray", exported)
for case in VALUES:
    print(f"ray {case}, Counter: {exported['probe_spent_total', case]:.2f}")
ray.shutdown()
PY

expect <<'TXT'
prometheus_client fast: buckets [4, 4, 4], count 4, sum 0.20, mean 0.05
prometheus_client slow: buckets [0, 0, 4], count 4, sum 48.00, mean 12.00
ray fast: buckets [4, 4, 4], count 4, sum 2.00, mean 0.50
ray slow: buckets [0, 0, 4], count 4, sum 80.00, mean 20.00
ray fast, Counter: 0.20
ray slow, Counter: 48.00
TXT
