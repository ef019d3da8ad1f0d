"""CaseOps: capitals of ASCII words moved into control symbols, without loss.

The public format `lossless_caps_caseops_v1`. A word is a run of letters a-z, A-Z; all else stays:
    Title -> TITLE title     NASA -> ALLCAPS nasa     iPhone -> i CAPNEXT phone     (no spaces)
A word whose first letter alone is a capital is a title, "A" too; ALLCAPS takes two letters or more;
a mixed word has TITLE if it begins with a capital, and CAPNEXT before every later capital. A
symbol that the text itself contains is written behind ESC. The symbols stand for no bytes.
"""

import re

MARKS = TITLE, ALLCAPS, CAPNEXT, ESC = "\ue001", "\ue002", "\ue003", "\ue004"

_LITERAL = re.compile("([%s])" % "".join(MARKS))
# A run of letters that has a capital. The look-behind keeps the search linear: a run of lowercase
# letters is tried from its first letter only.
_CAPITALS = re.compile("(?<![a-z])[a-z]*[A-Z][A-Za-z]*")
_CODED = re.compile(f"{ESC}(.)|[{TITLE}{CAPNEXT}]([a-z])|{ALLCAPS}([a-z]+)", re.DOTALL)
_CAPNEXT_LETTER = {code: CAPNEXT + chr(code).lower() for code in range(ord("A"), ord("Z") + 1)}


def _encode_word(match):
    """The matched word, which has a capital, in small letters with its symbols."""
    word = match[0]
    if len(word) > 1 and word.isupper():
        return ALLCAPS + word.lower()
    head = TITLE + word[0].lower() if word[0].isupper() else word[0]
    return head + word[1:].translate(_CAPNEXT_LETTER)


def encode(text):
    """text with its capitals A-Z as lowercase letters and symbols."""
    return _CAPITALS.sub(_encode_word, _LITERAL.sub(ESC + r"\1", text))


def decode(text):
    """The text that encode() made text of."""
    return _CODED.sub(lambda match: match[1] or (match[2] or match[3]).upper(), text)
