"""The main text of a web page."""

from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.encoding import bytes_to_str, detect_encoding, map_encoding_to_html5
from resiliparse.parse.html import HTMLTree

_MAX_DEPTH = 300  # the search for main content takes 0.4 s at a depth of 3,000, 7 s at 10,000 and minutes beyond
_DEEPER = ">".join("*" * (_MAX_DEPTH + 1))


def page_text(body: bytes, charset: str | None) -> str:
    """Plain text without navigation, advertisements and the like; all the text of a page that nests absurdly.

    charset: what the server declares; browsers believe it too, unless there is no such encoding.
    """
    declared = map_encoding_to_html5(charset, fallback_utf8=False) if charset else None
    encoding = declared or detect_encoding(body, from_html_meta=True) or "utf-8"
    tree = HTMLTree.parse(bytes_to_str(body, encoding, errors="replace"))
    document = tree.document
    is_deep = document is not None and document.query_selector(_DEEPER) is not None
    return extract_plain_text(tree, main_content=not is_deep)
