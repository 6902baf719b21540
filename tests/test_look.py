"""What the page shows is exactly the text."""

import html
import string
from urllib.request import urlopen

from PIL import Image

from support.page import look


def test_what_is_shown_is_exactly_the_text(tmp_path):
    for text in ("a", '<b onclick="x">&amp;</b>', "&lt;", "&&#38;", "'\n\\($x$"):
        (part,) = look.exactly(text)
        assert html.unescape(part["text"]) == text and "<" not in part["text"]
    differences = (-5, -4.9, -2, -1.9, -0.5, -0.4, 0, 0.4, 0.5, 1.9, 2, 4.9, 5)
    assert "|".join(look.mark(gain) or "" for gain in differences) == "−−−|−−|−−|−|−||||+|+|++|++|+++"
    Image.new("P", (640, 320)).save(tmp_path / "a.gif")
    with urlopen(look.portrait("a", tmp_path / "a.gif")) as data, Image.open(data) as picture:
        assert (picture.format, picture.size) == ("PNG", (128, 64))
    fields = [{key: sorted(str(part[1]) for part in string.Formatter().parse(text) if part[1]) for key, text in texts.items()}
              for texts in look.TEXTS.values()]  # fmt: skip
    assert fields[0] == fields[1] and len(fields) == 2  # both languages say the same
