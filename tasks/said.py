"""said.py - what does a text say its answer is? A letter, a number or a text; None where it says none, or more than one.

1. `tidy` writes one way what can be written in several: full-width signs, dashes, **bold**, \\text{B}. Signs inside stay signs.
2. `statements` finds where an answer is stated. Strongest is the question's own mark (####), then "Answer: ...", \\boxed{...} and
   <answer>...</answer>, then sentences ("so the answer is B"). A sentence that denies, supposes or asks states nothing.
3. The last of the strongest kind counts, and it is read as a whole: one value, or none ("18 or 20", "3/4", "B; C"). Nothing that
   stands before an unreadable one, and no loose number, takes its place.
4. Only where nothing is stated, the last line (a letter, also as the first one; a text) or the last number is the answer.

Lost by decision, for each could be something else: an option's text without its letter; a fraction, root or power for a decimal
(3/4, 3\\sqrt{2}, 10^6); a number in words; two numbers in one statement ("2 hours and 5 minutes", "12 000", "72 (24 + 48)"); where
none is stated, what stands before the last ("72 apples in 3 baskets"); a letter that begins a sentence ("C. Earth has seas").

Depends on nothing of ours.   Try it:  python -m pytest tests/test_said.py -q
"""

import itertools
import re
import unicodedata
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_DASHES = dict.fromkeys(map(ord, "‐‑‒–−"), "-") | {ord("—"): " - ", ord("’"): "'", ord("‘"): "'", ord("“"): '"', ord("”"): '"'}
_BOLD = re.compile(r"(?<![\w*])(\*{1,3}|_{1,2})(?![\s*_]|[a-z]\w*_)([^*\n]{1,500}?)(?<!\s)\1(?![\w*])")  # not __init__
_FONT = re.compile(r"\\(?:text\w{0,2}|math\w\w|mbox|operatorname)\s?\{([^{}\n]{0,200})\}")
_BRACED = r"(?:[^{}\n]|\{(?:[^{}\n]|\{[^{}\n]{0,200}\}){0,200}\}){0,200}"
_BOXED = re.compile(rf"\\boxed\s?\{{({_BRACED})\}}|<answer>(.{{0,500}}?)</answer>", re.S | re.I)
_PAIRS = ("$$ $$", "$ $", "` `", '" "', "' '", "< >", r"\( \)", r"\[ \]")  # the dress of a text; signs are not
_BRACKETS = ("( )", "[ ]", "{ }")


def last_line(text: str) -> str:
    """The last line that is not empty."""
    return text.strip().rsplit("\n", 1)[-1].strip()


def tidy(text: str) -> str:
    """The text in one way of writing. What is raised, lowered or a fraction stays: x² is not x2, and 1½ is not 11/2."""
    if not text.isascii():
        kept = lambda c: unicodedata.decomposition(c).startswith(("<super>", "<sub>", "<fraction>"))
        parts = itertools.groupby(text, kept)
        text = "".join("".join(part) if keep else unicodedata.normalize("NFKC", "".join(part)) for keep, part in parts)
    return _BOLD.sub(r"\2", _FONT.sub(r"\1", text.translate(_DASHES)))


def undressed(text: str, pairs: Sequence[str] = _PAIRS) -> str:
    """The text without what stands around the whole of it, as quotes do, and without a last full stop, comma or colon."""
    text = re.sub(r"(?<=[^\s.,;:])[.,;:]$", "", text.strip())
    for left, right in map(str.split, pairs):
        inner = text[len(left) : -len(right)]
        if text.startswith(left) and text.endswith(right) and inner.strip() and left not in inner and right not in inner:
            return undressed(inner, pairs)
    return text


def plain(text: str) -> str:
    """A text without what does not count: its dress, case, spaces, the punctuation of prose. C# is not C, and -2/3 is not 2/3."""
    text = undressed(tidy(text)).translate(str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")).casefold()
    text = re.sub(r"(?<=,)\s", "", text) if text[:1] in ("(", "[", "{") else text
    text = re.sub(r"(?<=[^\W\d_][^\W\d_])(?:-(?=[^\W\d_]{2})|!(?=\s|$)|\?(?=\s))|(?<=[^\W\d_])[.,;:](?=\s)", " ", text)
    return " ".join(text.split())


# --- where an answer is stated ---------------------------------------------------------------------------------------
# All repeats are bounded: a model may write ten thousand spaces. A name may be dressed: "answer": "B".
_NAME = r"(?<![^\W_])(?:ans|answer(?:\s(?:option|choice|letter))?"
_NAME += r"|(?:correct|right|best|final|my|selected)\s(?:option|choice|letter|one))(?![^\W_])"
_NAME += r"[*_\"'`)\]]{0,3}(?:\shere|\s(?:to|for)(?:\s[\w']{1,20}){1,4}?)?"
_MUST_BE = r"(?:is|was|(?:would|must|should|will|has\sto|can\sonly)\sbe)"
_SURELY = r"(?:\s(?:therefore|thus|then|hence|clearly|definitely|simply|indeed|(?:most\s)?(?:likely|probably)))?"
_STRONG = re.compile(rf"{_NAME}(?:\s{{0,3}}[:=]|\s{{0,2}}(?:->|[→⇒])|\s{{1,3}}-{{1,2}}(?=\s))[*_]{{0,3}}", re.I)
_IS = re.compile(rf"{_NAME}(?:,\s(?:then|thus|hence|therefore),)?\s{{1,3}}{_MUST_BE}{_SURELY}\b:?[*_]{{0,3}}", re.I)
_CLAUSE = re.compile(r"[.!?;,:(\n]|\s-\s|\b(?:so|but|hence|thus|therefore|then|and(?=\sthe\s))\b", re.I)
_any = lambda words: re.compile(rf"\b(?:{'|'.join(words.split())})\b", re.I)
# Before an answer, in its clause: it is denied, supposed, or said by others.
_DENIES = _any(r"""\w+n't not never no(?!\sdoubt) nor neither none nobody few rule[sd]?\sout cannot whether if unless wrong
    incorrect false mistak\w* unlikely hardly tempt\w* trap avoid suppos\w* assum\w* imagine might may could some\w* told many
    people students? others? another they why least worst possible common (?<!no\s)(?<!a\s)doubt""")
Statement = tuple[int, int, str]  # strength: 2 own mark, 1 strong, 0 a sentence, -1 says nothing; its place; the rest of the line


def _sentence(text: str, place: int) -> str:
    """What is left of a sentence from `place` on, 300 characters of it at most."""
    return re.split(r"(?<=[.!?])(?=[\s\"'`)*_])|\n", text[place : place + 300], maxsplit=1)[0]


def statements(text: str, mark: str = "Answer:", sentences: Sequence[re.Pattern] = ()) -> tuple[str, list[Statement]]:
    """-> (the tidy text, its statements). `sentences`: patterns of weak ones beside "the answer is", the value after the match."""
    text = tidy(text)
    for _ in range(2):  # <answer>\\boxed{B}</answer>
        text = _BOXED.sub(lambda match: f" Answer: {match[1] or match[2]}\n", text)
    kinds = [(2, re.compile(re.escape(mark)))] if mark != "Answer:" else []
    found, pair = [], re.compile(r"\bor[\s$]*\Z|\n[\s$]*(?:,\s)?(?:,|and)[\s$]*\Z", re.I)
    for strength, pattern in [*kinds, (1, _STRONG), *((0, pattern) for pattern in (_IS, *sentences))]:
        for match in [*pattern.finditer(text)][-99:]:  # a broken model says it for pages
            value = text[match.end() : match.end() + 1000].strip().split("\n", 1)[0].strip()
            before = _CLAUSE.split(text[max(0, match.start() - 150) : match.start()])[-1] if strength < 2 else ""
            asks = strength == 0 and _sentence(text, match.end()).endswith("?")
            value = f"or {value}" if pair.search(text[max(0, match.start() - 9) : match.start()]) else value  # one of two
            value = re.sub(r"\Anot\s\W{0,3}(?:[A-Z]|\d[\d.,]*)\b[^.\n]{0,20}?\bbut\s", "", value)  # not B but C
            value = re.sub(r'\A("[^"\n]*")\s*(?:\}|,\s*"\w+"\s*:).*', r"\1", value)  # of JSON
            if value.strip("."):  # dots are the place for an answer
                found.append((-1 if asks or _DENIES.search(before) else strength, match.start(), value))
    return text, sorted(found, key=lambda statement: statement[1])


def last_stated(found: Sequence[Statement], read: Callable[[str], Any]) -> Any:
    """The last of the strongest statements, read; where it cannot be read, what is stated after it; else None."""
    found = [statement for statement in found if statement[0] >= 0]
    while found:
        strongest = max(found)
        if (value := read(strongest[2])) is not None:
            return value
        found = [statement for statement in found if statement[1] > strongest[1]]
    return None


def said_text(text: str, mark: str = "Answer:") -> str | None:
    """The text stated, else the last line, without its dress."""
    text, found = statements(text, mark)
    return last_stated(found, undressed) if found else undressed(last_line(text)) or None


# --- letters ---------------------------------------------------------------------------------------------------------
_BEGINS = r"(?:^|(?<=[.;,:!?(])|\b(?:so|thus|hence|therefore|then|that)\b,?)\s{0,3}"  # a clause
_X = r"(?-i:[A-Z])[)*_\"'\]]{0,4}"
_NAMED = r"(?:\s\([^()\n]{1,60}\)|(?:[.:]|(?<=\)))\s[^\n.;,:?]{1,60}?)?"  # C (Earth), C) Earth
_OPTION = r"(?:(?:option|choice|letter)\s)?[(*_\"']{0,4}"
_CLOSES = r"(?=\s{0,3}(?:[.,;:!)\n]|\Z|(?:because|since|as)\b))"
_CORRECT = rf"{_MUST_BE}\s(?:\w+ly\s)?(?:the\s)?(?:only\s)?(?:correct|right|best|answer)\b"
_SENTENCES = [
    re.compile(pattern, re.I | re.M)
    for pattern in (
        r"\b(?:I|we)(?:'ll|'d|'m|\sam)?\s(?:(?:will|would|must|should|can|therefore|thus)\s){0,2}(?:choose|pick|select|say|go(?:ing)?\swith)\s",
        rf"{_BEGINS}(?:please\s)?(?:choose|pick|select|go\swith)\s",
        rf"(?:\b(?:option|choice|answer)\s|{_BEGINS}|(?=\())\(?(?={_X}{_NAMED}\s{_CORRECT}(?:\s(?:answer|option|choice|one))?{_CLOSES})",
        rf"\bit(?:'s|\s{_MUST_BE})\s{_OPTION}(?={_X}{_CLOSES})",
        rf"\b(?:so|thus|hence|therefore),?\s{_OPTION}(?={_X}\s{{0,3}}(?:[.;!\n]|\Z))",
        r"^(?=(?-i:[A-Z])[).:,]?\s{1,3}(?:(?:this|that|it)\sis\s)?(?:because|since|as|due)\b)",
    )
]
_LETTER = re.compile(
    r"(?:(?:the\s)?(?:option|choice|letter)\s)?[\s*_\"'`(\[<{$]{0,9}(?P<x>[A-Z])(?!\w|['-]\w|[#+])(?P<rest>[^\n]*)", re.I
)
_MAY_FOLLOW = re.compile(  # a letter, so that it is no word: "The answer is a mammal" states none
    rf"(?:because|since|as|due|for|given|not|rather|instead|over|but|and(?=\snot)|[A-Z])\b|{_CORRECT}"
)
_ALSO = _any(r"""or maybe perhaps possibly could might also alternatively either both else well no wait actually then\sagain
    too(?=\W*\Z)""")
_RIGHT_TOO = _any(r"right correct possible plausible well too(?=\W*\Z)")
_LINKS = re.compile(r"(?:[\W_]|\b(?:and|plus|then|to|vs|versus|the|option|choice|letter|answer)\b)*", re.I)


def _letter(value: str, options: Sequence[str]) -> tuple[str | None, bool]:
    """(the one letter that a statement names, or None; does it name an option at all?)"""
    letters = LETTERS[: len(options)]
    for x, option in zip(letters, map(tidy, options), strict=True):
        if option.casefold() in value.casefold():  # C. Nice, (C) Nice, Nice (C)
            its = rf"(?<![\w'-])(?:{x}\W{{1,4}}{re.escape(option)}|{re.escape(option)}\s\({x})(?!\w)\)?"
            value = re.sub(its, f"{x})", value, flags=re.I)
    match = _LETTER.match(value)
    if not match or (letter := match["x"].upper()) not in letters:
        return None, False
    rest, own = match["rest"], plain(options[letters.index(letter)])
    word = re.match(r"[*_\"'`]{0,4}\s+(?=\w)", rest)
    if word and not _MAY_FOLLOW.match(rest, word.end()) and not plain(rest[word.end() :]).startswith(own):
        return None, bool(re.match(r"(?:or|and)\b", rest[word.end() :]))
    if re.match(r"[^.!]*\?", rest):
        return None, True
    others = letters.replace(letter, "")
    other = next((m for m in re.finditer(r"(?<![\w'-])[A-Z](?!\w|['-]\w)", rest, re.I) if m[0].upper() in others), None)
    if not other:
        return letter, True
    between, after = rest[: other.start()], rest[other.end() :]
    after = re.sub(r"\A(?:\s{0,3}(?:,|/|&|\band\b|\bor\b|)\s{0,3}\(?[A-Z]\b\)?){0,9}", "", after)
    if re.match(r"\)?\s+\w", after):  # a clause about the other letter
        clause = re.split("[.;,]", after)[0]
        adds = _ALSO.search(between) or (_RIGHT_TOO.search(clause) and not re.search(r"\bnot\b|n't\b|\bless\b", clause))
    else:  # one more answer, unless other words lead to it
        adds = _ALSO.search(between) or _LINKS.fullmatch(between)
    return None if adds else letter, True


def said_letter(text: str, options: Sequence[str]) -> str | None:
    """The letter stated last, or None if none is, or if the last statement names two."""
    text, found = statements(text, sentences=_SENTENCES)
    found = [s for s in found if _letter(s[2], options)[1] or (s[0] == 1 and not re.fullmatch(r"\W*[A-Za-z]\W*", s[2]))]
    label = re.compile(r"(?:(?:option|choice|letter)\s)?\(?(?P<x>[A-Z])(?:[).:]+\s+(?P<text>.+))?", re.I)
    lines = [line.lstrip("#>*-• \t") for line in text.split("\n") if line.strip()]
    labels = [label.fullmatch(undressed(line, (*_PAIRS, *_BRACKETS))) for line in lines[:50] + lines[50:][-50:]]
    match, place = None, 0
    if labels and labels[0] and sum(map(bool, labels)) == 1:  # the only one, and in the first line
        match = labels[0]
    elif labels and labels[-1] and not any(labels[-2:-1]):  # in the last line, and that ends no list
        match, place = labels[-1], len(text)
    if match and (letter := match["x"].upper()) in LETTERS[: len(options)]:
        option = options[LETTERS.index(letter)]
        if plain(match["text"] or option) == plain(option):
            found.append((0, place, letter))
    return last_stated(found, lambda value: _letter(value, options)[0])


# --- numbers ---------------------------------------------------------------------------------------------------------
# Thousands' commas, decimals, a sign, a currency, a power of ten. Not a part of a word or of a fraction (3/4 is neither 3 nor 4).
NUMBER = (
    r"(?<![\w/])(?<!\d\.)(?<!/\s)(?:[-+]?[$€£]\s?|[$€£][-+]|[-+])?"
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,4})?(?!\d|\.\d|\s?/\s?\d)"
)
SCALES = dict(hundred=100, thousand=10**3, million=10**6, billion=10**9, trillion=10**12, dozen=12)
_UNITS = "aghlmopsACFJLNVW"  # of one letter; another letter after a number is a variable, or thousands (k, M)
_POWER = re.compile(r"(?<=\d)\s?(?:[*×x·⋅]|\\times|\\cdot)\s?10\s?(?:\^|\*\*)\s?(\{[-+]?\d{1,4}\}|[-+]?\d{1,4}(?!\d))")
_MORE = re.compile(  # where what is said of a value begins
    r"[.!]\s+(?=[A-Za-z])(?!(?:or|maybe|perhaps|possibly|no)\b)"
    r"|[\s,(](?:because|since|as|which|where|due|so|not|instead|rather)\b",
    re.I,
)
# What makes another value of a number, or no certain one; what stands before a number that is no value ("Step 2: ...", "x - 5").
_ANOTHER = _any(r"""\w+n't or maybe perhaps possibly either no not never neither nor unknown undefined unclear at\s(?:least|most)
    plus minus negative half halves thirds fourths fifths sixths eighths tenths hundredths and\sa\s(?:third|quarter) pi sqrt squared
    cubed factorial is\s(?:wrong|incorrect|false) bn mn lakh crore""")
_ELSEWHERE = _any(r"up\sto than over under above below between twice double root if unless whether")
_LABEL = re.compile(r"(?:\b(?:step|part|case|question|problem|figure|table|equation|no\.|log|ln|sin|cos|tan)\s*|[\w.]|-\W*)$", re.I)
_UNIT = re.compile(r"(?<![^\W\d])([ckm]?m|in|ft|yd)(?:[²³]|\^(?:[23]|\{[23]\}))|(?<=[\w\s])/(?=[^\W\d]{2}|[hs]\b)")  # cm^2, km/h


def _numeric(text: str) -> str:
    """The tidy text, its numbers written in one way: 12{,}000 is 12,000, and 6.02 x 10^23 is 6.02e23."""
    text = re.sub(r"(?<=\d)\\,(?=\d{3})", ",", re.sub(r"<<[^<>\n]{0,99}>>|\\!", "", tidy(text))).replace("{,}", ",")
    text = re.sub(r"\\[()\[\],;:\s]|[≈~]", " ", text.replace("\\$", "$").replace("\\%", "%"))
    text = re.sub(r"(?<=10)[⁻⁰¹²³⁴-⁹]{1,5}", lambda power: "^" + tidy(unicodedata.normalize("NFKC", power[0])), text)
    text = _UNIT.sub(r"\1 ", re.sub(r"\^(?:\\circ|\{\\circ\})", "°", text))
    return _POWER.sub(lambda power: f"e{power[1].strip('{}')}", text)


_decimal = lambda text: Decimal(re.sub(r"[^\d.eE-]", "", text))


def as_number(text: str) -> Decimal | None:
    """The value of a text that is one number and nothing else ("$1,200.50", "-3", "25%", "1e3"), or None."""
    text = _numeric(text).strip()
    return _decimal(text) if re.fullmatch(rf"{NUMBER}\s?%?", text) else None


def number_in(text: str) -> Decimal | None:
    """The one number that a statement gives, whatever its unit ("72 apples", "3 * 6 = 18", "2 million"), or None."""
    digit = re.search(r"\d", text)
    more = digit and _MORE.search(text, digit.end())
    text = text[: more.start()] if more else text
    working, _, text = text.rpartition("=")  # x = 3 or x = 4 is no working
    text = undressed(text, (*_PAIRS, *_BRACKETS))
    text = re.sub(r"\A(?:-|minus\b|negative\b)\s+(?=[\d$.])", "-", text if re.search(r"[(\[{]", text) else text.rstrip(")]}."))
    match = re.search(NUMBER, text)
    if not match or text.endswith("?") or re.search(r"[,;|]\s|\b(?:or|and)\b|[<>!]\Z", working):
        return None
    value, before, after = _decimal(match[0]), text[: match.start()], text[match.end() :]
    while scale := re.match(r"\s?(hundred|thousand|million|billion|trillion|dozen)s?\b", after, re.I):
        value, after = value * SCALES[scale[1].lower()], after[scale.end() :]
    rest = f"{before} {after}"
    if any(unicodedata.category(c) in ("Nd", "Nl", "No", "Sm") or c in "*/^\\{}[]_&" for c in rest) or _ANOTHER.search(rest):
        return None
    if _ELSEWHERE.search(before) or _LABEL.search(before) or re.match(r"[:)]\s*\w|[^\W\d_](?<![ghlLs])(?![^\W\d_])", after):
        return None  # 5k is not 5
    return value if set(re.findall(r"(?<![^\W\d_])[^\W\d_](?![^\W\d_])", after)) <= set(_UNITS) else None


def said_number(text: str, mark: str = "####") -> Decimal | None:
    """The number that is stated (see the top of the file); the last number where nothing is stated; None if there is none."""
    text, found = statements(_numeric(text), mark)
    if any(strength >= 0 for strength, *_ in found):
        alone = [(0, len(text), line)] if as_number(undressed(line := last_line(text))) is not None else []
        return last_stated(found + alone, number_in)
    for _, place, _ in reversed(found):  # "I doubt that the answer is 18" does not say 18
        text = text[:place] + text[place + len(_sentence(text, place)) :]
    for word in reversed([*re.finditer(r"\S+", text)]):
        before = text[max(0, word.start() - 60) : word.start()]
        if not re.search(r"\d", word[0]) or re.search(r"(?:\bnot|n't)(?:\sbe)?\s$", before):
            continue
        if re.search(r"\b(?:or|may\s?be|(?:might|could)\sbe|perhaps|possibly)\s$|\d(?:[,;]|\S{0,20}\s(?:and|to|[+*×]))\s$", before):
            return None
        sign = re.search(r"(?:\b(?:minus|negative)\s)?\Z", before)[0]
        return number_in(sign + re.split(r"(?<=\S)[,;.!](?:\s|$)|\n", text[word.start() : word.start() + 200], maxsplit=1)[0])
    return None
