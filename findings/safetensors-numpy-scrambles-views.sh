#!/usr/bin/env bash
# safetensors 0.8.0 with numpy 2.2.6
#
# Guess:  safetensors.numpy.save writes any array right, or refuses one that is not
#         contiguous, as safetensors.torch does.
# Seen:   it writes the bytes of the underlying buffer in memory order under the
#         shape of the view. Transposed, strided and Fortran-ordered arrays come
#         back with the right shape and dtype and the wrong values, without an
#         error. np.ascontiguousarray before saving cures it.
# Output: transpose, every second column and Fortran order: all read back wrong;
#         made contiguous first: all read back right. Of a small HWC image turned
#         into CHW by transpose, 2 of 18 values are still in place.
# Why it matters: img.transpose(2, 0, 1), masks from pycocotools (Fortran order)
#         and weights transposed in a conversion script are saved scrambled, and
#         every check of shapes and dtypes passes.
source "$(dirname "$0")/lib.sh"

install "safetensors==0.8.0" "numpy==2.2.6"

probe <<'PY'
import numpy as np
from safetensors.numpy import load, save

x = np.arange(12, dtype=np.float32).reshape(3, 4)
views = {"transpose": x.T, "every second column": x[:, ::2], "Fortran order": np.asfortranarray(x)}
for name, view in views.items():
    for label, array in ((name, view), (name + ", made contiguous", np.ascontiguousarray(view))):
        back = load(save({"x": array}))["x"]
        print(f"{label}: shape and dtype kept {back.shape == view.shape and back.dtype == view.dtype},",
              f"values kept {np.array_equal(back, view)}, first row {back[0].astype(int).tolist()}")

image = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
chw = image.transpose(2, 0, 1)
print("HWC to CHW:", int((load(save({"x": chw}))["x"] == chw).sum()), "of", chw.size, "values in place")
PY

expect <<'TXT'
transpose: shape and dtype kept True, values kept False, first row [0, 1, 2]
transpose, made contiguous: shape and dtype kept True, values kept True, first row [0, 4, 8]
every second column: shape and dtype kept True, values kept False, first row [0, 1]
every second column, made contiguous: shape and dtype kept True, values kept True, first row [0, 2]
Fortran order: shape and dtype kept True, values kept False, first row [0, 4, 8, 1]
Fortran order, made contiguous: shape and dtype kept True, values kept True, first row [0, 1, 2, 3]
HWC to CHW: 2 of 18 values in place
TXT
