r"""The last number of a text, however it is written. Linear in the text's length.

Read as one number: `-1,234.50`, `1{,}000`, `3/4`, `\frac{3}{4}`, `\frac34`, `12.5%`, `12\%`, `-$5`,
`1.5e-3`, `2 \times 10^{6}`, `10^6`. Not numbers of their own: exponents and indices (`x^2`, `x_1`),
digits that go on a word or a number (`H2O`, the 3 of 1.2.3). A minus sign behind a letter, a digit
or a bracket is a subtraction or a range.
"""

from __future__ import annotations

import re
import unicodedata

_SEPARATOR = r"(?:,\\!|\{,\}|,|\\[,;:! ]|[\u00a0\u2009\u202f])"
_PLAIN = rf"(?:(?:\d{{1,3}}(?:{_SEPARATOR}\d{{3}})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
_POWER = r"\^ ?(?:\{{ ?(?P<{0}>[-+\u2212]?\d{{1,9}}) ?\}}|(?P<{0}_bare>[-+\u2212]?\d{{1,9}}))"
_NUMBER = re.compile(
    rf"""
    (?<![A-Za-z\d.^])(?<![^\W_]_)(?<![\^_]\{{)(?<!\^[-+\u2212])(?<![\^_]\{{[-+\u2212])
    (?P<sign>(?<![)\]}}%])[-+\u2212\u2013])?
    (?:\\?[$€£¥])?
    (?:
        \\[dtc]?frac[ ]?(?:
            \{{[ ]?(?P<top>-?\d+)[ ]?\}}[ ]?\{{[ ]?(?P<bottom>-?\d+)[ ]?\}}
          | (?P<top1>\d)(?P<bottom1>\d)
        )
      | (?P<plain>{_PLAIN})
        (?:
            [eE](?P<e>[-+]?\d{{1,3}})(?!\w)(?!\.\d)
          | [ ]?(?:\\times|\\cdot|[×·x*])[ ]?10[ ]?{_POWER.format("ten").replace(" ?", "[ ]?")}
          | {_POWER.format("power").replace(" ?", "[ ]?")}
          | [ ]?/[ ]?(?P<under>{_PLAIN})
        )?
    )
    (?P<percent>[ ]?\\?%)?
    """,
    re.VERBOSE,
)
_SEPARATORS = re.compile(_SEPARATOR)


def last_number(text: str) -> str | None:
    """Returns the last number of `text` in one spelling, or None where there is none.

    That spelling has ASCII digits, no separators of thousands, no currency and no plus sign:
    "-1234.5", "3/4", "-3/4", "12.5%", "1.5e-3", "10^{6}".
    """
    found = None
    for found in _NUMBER.finditer(text):  # noqa: B007 (the last one)
        pass
    if found is None:
        return None
    sign = "-" if found["sign"] in ("-", "\u2212", "\u2013") else ""
    top = found["top"] or found["top1"]
    if top:
        value = f"{top}/{found['bottom'] or found['bottom1']}"
        value = value.removeprefix("-") if sign and value.startswith("-") else sign + value
    else:
        value = sign + _SEPARATORS.sub("", found["plain"])
        if ten := found["e"] or found["ten"] or found["ten_bare"]:
            value += f"e{ten}"
        elif power := found["power"] or found["power_bare"]:
            value += f"^{{{power}}}"
        elif found["under"]:
            value += f"/{_SEPARATORS.sub('', found['under'])}"
    value = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in value)
    return value.replace("\u2212", "-") + ("%" if found["percent"] else "")
