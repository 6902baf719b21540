"""What the page shows is exactly the text."""

import html
import re
import string
from urllib.request import urlopen

from PIL import Image

from support.page import look


def test_what_is_shown_is_exactly_the_text(tmp_path):
    for text in ("a", '<b onclick="x">&amp;</b>', "&lt;", "&&#38;", "&ltx", "'\n\\($x$", "<!--", 'AT&T, 1 < 2: "q"'):
        (part,) = look.exactly(text)
        assert html.unescape(part["text"]) == text and not re.search("<[a-z/!]", part["text"])
    differences = (-5, -4.9, -2, -1.9, -0.5, -0.4, 0, 0.4, 0.5, 1.9, 2, 4.9, 5)
    assert "|".join(look.mark(gain) or "" for gain in differences) == "−−−|−−|−−|−|−||||+|+|++|++|+++"
    Image.new("P", (640, 320)).save(tmp_path / "a.gif")
    with urlopen(look.portrait("a", tmp_path / "a.gif")) as data, Image.open(data) as picture:
        assert (picture.format, picture.size) == ("PNG", (128, 64))
    english, chinese = ([{part[1] for part in string.Formatter().parse(text) if part[1]} for text in texts.values()]
                        for texts in look.TEXTS.values())  # fmt: skip
    assert english == chinese  # both languages say the same
