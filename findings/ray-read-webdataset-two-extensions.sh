#!/usr/bin/env bash
# ray 2.60.0 (Ray Data), datasets 5.2.0 and webdataset 1.0.2
#
# Guess:  a tar in the WebDataset layout may hold PNG and JPEG samples side by side:
#         a sample is the files that share a name, whatever their extensions are.
# Seen:   webdataset reads it. Ray makes a column of each extension and fails on the
#         decoded ones as soon as anything is read: the missing images become NaN,
#         which do not go into a tensor column. datasets takes its columns from the
#         first five samples: if they differ, it refuses the tar; if they agree, the
#         pictures of another extension further on become None, without a word.
# Output: k0.png, k1.jpg: webdataset 2 images, Ray ValueError, datasets ValueError.
#         Five PNG, then one JPEG: Ray ValueError, datasets 6 rows with 5 images.
#         Ray with decoder=None or with the extensions renamed reads both tars.
# Why it matters: pictures of several sources are often packed as they come. Whether a
#         reader fails or loses some then depends on their order. Give all of them
#         one extension before packing, or read with Ray's filerename=.
source "$(dirname "$0")/lib.sh"

install "ray[data]==2.60.0" "datasets==5.2.0" "webdataset==1.0.2" "pillow==12.3.0" "pyarrow==26.0.1" "numpy==2.2.6"

probe <<'PY'
import io, os, tarfile

os.environ["RAY_AUTH_MODE"] = "disabled"  # a local Ray needs no token
import datasets
import ray
import webdataset as wds
from PIL import Image

datasets.disable_progress_bars()
FORMATS = {"png": "PNG", "jpg": "JPEG"}
REASONS = ("column png to the TensorArray tensor extension type", "don't share the same prefix or the same types")


def write(name, extensions):
    with tarfile.open(name, "w") as tar:
        for n, extension in enumerate(extensions):
            data = io.BytesIO()
            Image.new("RGB", (8, 6)).save(data, FORMATS[extension])
            member = tarfile.TarInfo(f"k{n}.{extension}")
            member.size = data.tell()
            data.seek(0)
            tar.addfile(member, data)


def read_webdataset(path):
    return wds.WebDataset(path, shardshuffle=False).decode("pil")


def read_ray(path, **options):
    return ray.data.read_webdataset(os.path.abspath(path), **options).take_all()


def read_datasets(path):
    return datasets.load_dataset("webdataset", data_files={"train": path}, split="train", cache_dir="cache")


def same_extension(name):
    return name.replace(".jpg", ".png")


def show(name, read, path, **options):
    try:
        rows = list(read(path, **options))
        images = sum(row.get(column) is not None for row in rows for column in FORMATS)
        seen = f"{len(rows)} rows, {images} images"
    except ValueError as error:  # Ray's task errors derive from their cause
        seen = "ValueError, " + next((text for text in REASONS if text in str(error)), str(error))
    print(f"{path} {name}: {seen}")


write("two.tar", ["png", "jpg"])
write("late.tar", ["png"] * 5 + ["jpg"])
ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
for path in ("two.tar", "late.tar"):
    show("webdataset", read_webdataset, path)
    show("datasets", read_datasets, path)
    show("ray", read_ray, path)
    show("ray decoder=None", read_ray, path, decoder=None)
    show("ray filerename", read_ray, path, filerename=same_extension)
ray.shutdown()
PY

expect <<'TXT'
two.tar webdataset: 2 rows, 2 images
two.tar datasets: ValueError, don't share the same prefix or the same types
two.tar ray: ValueError, column png to the TensorArray tensor extension type
two.tar ray decoder=None: 2 rows, 2 images
two.tar ray filerename: 2 rows, 2 images
late.tar webdataset: 6 rows, 6 images
late.tar datasets: 6 rows, 5 images
late.tar ray: ValueError, column png to the TensorArray tensor extension type
late.tar ray decoder=None: 6 rows, 6 images
late.tar ray filerename: 6 rows, 6 images
TXT
