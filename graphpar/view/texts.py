"""Names from models and clusters, made fit for a file."""

import re

# XML 1.0 (section 2.2) cannot hold these, not even escaped; names are shown with a stand-in.
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def xml_text(text: str) -> str:
    """Text without the characters that no XML file can hold."""
    return _NOT_XML.sub("\ufffd", text)


def short(text: str, most: int) -> str:
    """A long name keeps its end, which is where device names differ.

    >>> short("node-with-a-long-name/3", 8)
    '…-name/3'
    """
    return text if len(text) <= most else "…" + text[1 - most :]
