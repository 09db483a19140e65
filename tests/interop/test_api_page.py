"""docs/api.md is what the docstrings say."""

from make_api import PAGE, page


def test_the_page_is_up_to_date():
    assert PAGE.read_text("utf-8") == page(), "run tools/make_api.py"
