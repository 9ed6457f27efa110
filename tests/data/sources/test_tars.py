"""WebDataset tars: samples by stem, and what is left of a damaged one."""

import gzip
import io
import tarfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lumen_ray.data.sources.tars import samples
from lumen_ray.errors import UserError

WANTED = ("jpg", "txt")


def make_tar(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if data is None:
                info.type = tarfile.DIRTYPE
            else:
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data or b""))
    return buffer.getvalue()


def read(path, data):
    path.write_bytes(data)
    return list(samples(str(path), WANTED))


MEMBERS = [
    ("d", None), ("d/0.jpg", b"j0"), ("d/0.TXT", b"t0"), ("d/0.seg.png", b"s"), ("d/1.jpg", b"j" * 3000),
    ("d/1.txt", b"t1"), ("e/1.jpg", b"j2"),
]  # fmt: skip
EXPECTED = [
    ("d/0", {"jpg": b"j0", "txt": b"t0", "seg.png": None}),
    ("d/1", {"jpg": b"j" * 3000, "txt": b"t1"}),
    ("e/1", {"jpg": b"j2"}),
]


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_members_with_the_same_stem_are_a_sample(tmp_path, name):
    data = make_tar(MEMBERS)
    assert read(tmp_path / name, gzip.compress(data) if name.endswith("gz") else data) == EXPECTED


def test_long_names_and_no_members(tmp_path):
    long = "x" * 150 + "/" + "y" * 120
    assert read(tmp_path / "a.tar", make_tar([(f"{long}.jpg", b"1")])) == [(long, {"jpg": b"1"})]
    assert read(tmp_path / "b.tar", make_tar([])) == []


@pytest.mark.parametrize("packed", [False, True])
@given(cut=st.integers(0, 10300))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_tar_that_is_cut_off_keeps_the_samples_before(tmp_path, packed, cut):
    data = make_tar(MEMBERS)
    end_mark = 7 * 512 + 5 * 512 + 3072  # behind 7 headers, 5 small members and one of 3000 bytes
    data = gzip.compress(data) if packed else data
    found = read(tmp_path / "a.tar", data[:cut])
    if found == EXPECTED:
        assert packed or cut >= end_mark + 512
        return
    *before, last = found
    assert isinstance(last[1], UserError)
    assert "cannot be read" in str(last[1])
    for (key, parts), (expected_key, expected) in zip(before, EXPECTED, strict=False):
        assert key == expected_key
        assert all(parts[name] == expected[name] for name in parts if parts[name] is not None)
    assert all(parts == expected for (_, parts), (_, expected) in zip(before[:-1], EXPECTED, strict=False))


def test_a_broken_header_in_the_middle_is_reported(tmp_path):
    """`tarfile` alone would take it for the end."""
    data = bytearray(make_tar(MEMBERS))
    place = data.index(b"d/1.jpg")
    data[place + 148 : place + 156] = b"garbage\0"
    found = read(tmp_path / "a.tar", bytes(data))
    assert found[0] == EXPECTED[0]
    assert len(found) == 2 and "after 'd/0'" in str(found[1][1])


@given(place=st.integers(0, 9000), value=st.integers(0, 255))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_byte_never_raises(tmp_path, place, value):
    data = bytearray(make_tar(MEMBERS))
    data[place % len(data)] = value
    samples_or_errors = read(tmp_path / "a.tar", bytes(data))
    assert samples_or_errors and all(isinstance(found, dict | UserError) for _, found in samples_or_errors)


def test_a_file_that_is_not_a_tar(tmp_path):
    for data in (b"", b"hello" * 300, gzip.compress(b"x")):
        ((key, error),) = read(tmp_path / "a.tar", data)
        assert key == "" and isinstance(error, UserError)
    with pytest.raises(UserError, match="does not exist"):
        list(samples(str(tmp_path / "absent.tar"), WANTED))


def test_hidden_members_do_not_split_their_neighbours(tmp_path):
    members = [("./._0.jpg", b"x"), ("./0.jpg", b"j"), ("./._0.txt", b"x"), ("./0.txt", b"t"), (".DS_Store", b"x"),
               ("__MACOSX/._1.jpg", b"x"), ("1.jpg", b"k")]  # fmt: skip
    assert read(tmp_path / "a.tar", make_tar(members)) == [("0", {"jpg": b"j", "txt": b"t"}), ("1", {"jpg": b"k"})]


def test_an_extension_that_comes_again_starts_a_new_sample(tmp_path):
    members = [("0.jpg", b"1"), ("0.txt", b"a"), ("0.jpg", b"2"), ("0.txt", b"b"), ("0.TXT", b"c")]
    assert [m for _, m in read(tmp_path / "a.tar", make_tar(members))] == [
        {"jpg": b"1", "txt": b"a"}, {"jpg": b"2", "txt": b"b"}, {"txt": b"c"},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "key", "extension"),
    [("frame.001.jpg", "frame.001", "jpg"), ("a/b.1.2.JPG", "a/b.1.2", "jpg"), ("24-01.12.jpg", "24-01.12", "jpg"),
     ("b.seg.jpg", "b", "seg.jpg"), ("b.v2.jpg", "b", "v2.jpg"), ("noextension", "noextension", "")],
)  # fmt: skip
def test_keys_end_at_the_first_dot_that_no_digits_follow(tmp_path, name, key, extension):
    ((found, members),) = read(tmp_path / "a.tar", make_tar([(name, b"1")]))
    assert (found, list(members)) == (key, [extension])
