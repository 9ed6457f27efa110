"""Which files are pictures, and which file is the picture that annotations name."""

import unicodedata
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.source_fakes import write

from lumen_ray.data import images, pictures
from lumen_ray.errors import UserError


def test_the_suffixes_are_those_of_the_formats_that_are_decoded():
    Image.init()
    registered = {suffix for suffix, kind in Image.registered_extensions().items() if kind in images._FORMATS}
    assert registered <= set(pictures.SUFFIXES)
    assert not set(pictures.SUFFIXES) & (set(Image.registered_extensions()) - registered)


def test_hidden_files_are_neither_listed_nor_counted(tmp_path):
    names = ["a.JPG", "sub/b.avif", "._a.jpg", "sub/.DS_Store", "__MACOSX/c.jpg", ".git/d.png", "e.heic", "notes.txt"]
    write(tmp_path, dict.fromkeys(names, b"x"))
    found, others = pictures.list_pictures(str(tmp_path))
    assert found == ["a.JPG", "sub/b.avif"]
    assert others == {".heic": 1, ".txt": 1}
    note = pictures.left_out_note(others, "photos")
    assert note == "left out in 'photos': 2 files not of a picture format that is read (.heic 1, .txt 1)"
    assert pictures.left_out_note(Counter()) == ""


def test_a_note_names_the_most_frequent_suffixes():
    others = Counter({f".{n}": n for n in range(1, 12)})
    assert pictures.left_out_note(others).endswith(".5 5, .4 4 and 3 more kinds)")


def test_a_note_names_what_is_left_out_for_another_reason():
    assert pictures.left_out_note(Counter({"listed again": 1})) == "left out: 1 listed again"
    others = Counter({".txt": 1, "broken link": 2, "link to a folder": 1})
    found = pictures.left_out_note(others)
    assert found == "left out: 2 broken links, 1 link to a folder, 1 file not of a picture format that is read (.txt 1)"


def test_images_are_found_by_bare_name_too(tmp_path):
    write(tmp_path, {"sub/b.jpg": b"b", "a.jpg": b"a"})

    def find(*names, trust=pictures.BARE):
        return pictures.read_picture(str(tmp_path), names, trust)

    assert find("sub/b.jpg") == b"b"
    assert find("/home/someone/a.jpg") == b"a"
    assert find("C:\\photos\\a.jpg") == b"a"
    assert find("no.jpg", "train/a.jpg") == b"a"
    for name in ("c.jpg", "sub", "x" * 5000, ""):
        with pytest.raises(UserError) as error:
            find(name)
        assert error.value.reason == "missing_image"
    assert find("sub/b.jpg", trust=pictures.EXACT) == find("sub\\b.JPG", trust=pictures.SPELLING) == b"b"
    for name, trust in (("cam2/a.jpg", pictures.SPELLING), ("sub/b.JPG", pictures.EXACT)):
        with pytest.raises(UserError, match="other listed images have the same file name") as error:
            find(name, trust=trust)
        assert error.value.reason == "ambiguous_image"


NFC, NFD = (unicodedata.normalize(form, "é.jpg") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
    ("there", "listed"),
    [("sub/a.jpg", "sub\\a.jpg"), ("a b.jpg", "a%20b.jpg"), ("a.JPG", "a.jpg"), ("a.jpg", "a.JPG"), (NFC, NFD),
     (NFD, NFC), ("a b.JPG", "x\\a%20b.jpg"), ("a%20b.jpg", "a%20b.jpg"), ("sub/a.JPEG", "sub/a.jpeg")],
)  # fmt: skip
def test_a_similar_name_is_taken_if_it_is_the_only_one(tmp_path, there, listed):
    write(tmp_path, {there: b"x"})
    assert pictures.read_picture(str(tmp_path), listed) == b"x"


def test_of_two_similar_names_none_is_taken_unless_they_are_equal(tmp_path):
    write(tmp_path, {"b c.JPG": b"1", "b%20c.JPG": b"2"})
    with pytest.raises(UserError, match="several similar names exist"):
        pictures.read_picture(str(tmp_path), "b%20c.jpg")
    write(tmp_path, {"b c.JPG": b"2"})
    assert pictures.read_picture(str(tmp_path), "b%20c.jpg") == b"2"


def test_how_far_names_may_be_guessed():
    names = ["cam1/1.jpg", "cam2/1.jpg", "2.jpg", "./2.jpg", "3.JPG", "3.jpg", "a b.png", "a%20b.png", f"x/{NFC}",
             f"y/{NFD}", "sub\\4.jpg", "sub/4.jpg", "5.jpg", "5.png"]  # fmt: skip
    listed = pictures.ListedNames(names)
    by_trust = {trust: {name for name in names if listed.trust(name) == trust} for trust in range(3)}
    assert by_trust[pictures.EXACT] == {"3.JPG", "3.jpg", "a b.png", "a%20b.png"}
    assert by_trust[pictures.SPELLING] == {"cam1/1.jpg", "cam2/1.jpg", f"x/{NFC}", f"y/{NFD}"}
    assert by_trust[pictures.BARE] == {"2.jpg", "./2.jpg", "sub\\4.jpg", "sub/4.jpg", "5.jpg", "5.png"}


@given(st.lists(st.sampled_from(["a", "a#2", "a#3", "b", "a#2#2"]), max_size=12))
def test_numbered_ids_are_unique(names):
    times = Counter()
    found = [pictures.unique_id(name, times) for name in names]
    assert len(set(found)) == len(found)
    assert all(new.startswith(name) for name, new in zip(names, found, strict=True))


@given(st.lists(st.sampled_from(["a.jpg", "A.jpg", "a_2.jpg", "b/a.jpg", "b\\a.jpg", NFC, NFD, "x"]), max_size=12))
def test_file_names_never_collide(names):
    free = pictures.FileNames()
    found = [free.free(name) for name in names]
    keys = {unicodedata.normalize("NFC", pictures.identity(name)).casefold() for name in found}
    assert len(keys) == len(found)


def test_distinct_names_have_as_many_folders_as_they_need():
    names = pictures.distinct_names(["/x/a/1.tar", "/x/b/1.tar", "/y/c/2.tar"])
    assert list(names.values()) == ["a/1.tar", "b/1.tar", "c/2.tar"]
    assert list(pictures.distinct_names(["/x/a/1.tar", "/x/b/2.tar"]).values()) == ["1.tar", "2.tar"]
