"""Lines of batch files: the page's example, and that any bytes are a request or one sentence."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.chat_fakes import line

from lumen_ray.errors import UserError
from lumen_ray.label.batch.lines import InvalidLine, RequestListing, parse_line
from lumen_ray.wire.chat import parse_chat

PAGE = Path(__file__).resolve().parents[3] / "docs" / "labelling.md"


def test_the_example_of_the_page_is_a_request():
    (text,) = re.findall(r"^```text batch\n(.*?)\n```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    request = parse_line(text.encode(), "line 1")
    assert request.custom_id == "q-1" and parse_chat(request.body, takes_sampling=True).num_images == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(JSON | st.fixed_dictionaries({"custom_id": JSON, "method": st.just("POST") | JSON, "url": JSON, "body": JSON}))
def test_any_json_is_a_request_or_a_line_with_its_reason(value):
    try:
        parse_line(json.dumps(value).encode(), "line 1")
    except InvalidLine as error:
        assert error.reason and "line 1" in str(error) and len(str(error)) < 1500


@given(st.binary(max_size=40))
def test_any_bytes_are_a_request_or_a_line_with_its_reason(data):
    with pytest.raises(InvalidLine):
        parse_line(data, "line 1")


def test_deep_nesting_is_no_request():
    with pytest.raises(InvalidLine, match="is not a JSON object"):
        parse_line(b"[" * 100_000, "line 1")


def test_places_of_lines_are_those_in_the_file(tmp_path):
    path = tmp_path / "requests.jsonl"
    path.write_bytes("\r\n".join([line("a"), "", line("ü"), " ", "{", line("a")]).encode())
    items = list(RequestListing(path))
    data = path.read_bytes()
    assert [item.image_id for item in items] == ["line 1", "line 3", "line 5", "line 6"]
    assert [bool(item.fault) for item in items] == [False, False, False, True]
    lines = [data[item.offset : item.offset + item.length].strip() for item in items]
    assert lines == [data.splitlines()[n] for n in (0, 2, 4, 5)]


def test_a_web_address_of_the_file_is_refused():
    with pytest.raises(UserError):
        RequestListing("https://example.org/requests.jsonl").check()
