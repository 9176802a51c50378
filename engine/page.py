"""page.py - how one explained answer looks: a table for a terminal, a self-contained page for a browser.

Both show the same numbers, those of explain.Explained. Tokens are made safe for a terminal: one may be a line break, half an emoji,
or a sequence that recolours it. The page needs nothing from the network, and all in it that a person or a model wrote is escaped.

Depends on nothing of ours.   Try it:  python -m pytest tests/test_explain.py -q
"""

import math
import os
import shutil
import sys
import unicodedata
from html import escape
from operator import itemgetter
from pathlib import Path
from string import Template

NAMES = dict(forward="KL(teacher || student) in nats", reverse="KL(student || teacher) in nats")
NAMES["jsd"] = "Jensen-Shannon, eq. 7, in nats"
WARM, HOT = 0.1, 1.0  # nats: from here on a token is worth a look; stands out


def worst(tokens: list) -> set[int]:
    """The places of the three tokens with the largest D, none below WARM."""
    order = sorted(range(len(tokens)), key=lambda i: -tokens[i].div)
    return {i for i in order[:3] if tokens[i].div >= WARM}


def number(x: float, digits: int = 3) -> str:
    """Five characters, or few more: 0.123, 12.35, 123.5."""
    digits = max(0, digits + 1 - len(str(int(abs(x)))))
    return f"{round(x, digits) + 0.0:.{digits}f}"  # + 0.0: no "-0.00"


def chance(p: float) -> str:
    """A probability: 0.123, and 3e-07 for what would round to nothing."""
    return f"{p:.3f}" if p >= 0.0005 or p == 0 else f"{p:.0e}"


def visible(text: str) -> str:
    """Line breaks, tabs, control characters and the like as escapes: one line, all of which can be seen."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def printable(text: str, encoding: str = "utf-8") -> str:
    """The same for a terminal: what its encoding lacks is an escape, too, and blank edges are in quotes."""
    text = visible(text).encode(encoding, "backslashreplace").decode(encoding)
    return text if text and text == text.strip() else f"'{text}'"


def fitted(text: str, width: int) -> str:
    """Cut or padded to so many columns of a terminal, where a Chinese character or an emoji takes two and an accent none."""
    size = lambda c: 0 if unicodedata.category(c) in ("Mn", "Me") else 1 + (unicodedata.east_asian_width(c) in "WF")
    if sum(map(size, text)) > width:
        while sum(map(size, text)) > width - 1:
            text = text[:-1]
        text += "~"
    return text + " " * (width - sum(map(size, text)))


def title_of(x) -> list[tuple[str, str]]:
    """(name, text) of what stands above the tokens."""
    verdict = {True: "right answer", False: "wrong answer", None: "answer"}[x.correct]
    rows = [("question", x.example.question), ("reference", x.example.reference), ("wrong reference", x.example.negative)]
    return [*(row for row in rows if row[1]), (verdict, x.answer)]


def columns_of(x) -> list[tuple[str, str, list[str]]]:
    """(title, meaning, a cell per token) of what is known beside the probabilities. More than four readings: their ends."""
    k = len(x.tokens[0].contexts)
    out = [("D", NAMES.get(x.cfg.divergence, x.cfg.divergence), [number(t.div) for t in x.tokens])]
    if x.cfg.w_contrast:
        why = "contrast, eq. 5: 0 once the wrong teacher is further off by the margin"
        out.append(("C", why, [number(t.contrast) for t in x.tokens]))
    shown = [(f"l{i + 1}", f"log-prob of the token under context {i + 1}", itemgetter(i)) for i in range(k)]
    if k > 4:
        shown = [("low", f"lowest of {k} contexts", min), ("high", f"highest of {k} contexts", max)]
    out += [(title, meaning, [number(pick(t.contexts), 2) for t in x.tokens]) for title, meaning, pick in shown]
    if k:
        why = f"agreement weight, eq. 2, gamma {x.cfg.gamma:g}: smaller where they differ"
        out.append(("w", why, [number(t.weight, 2) for t in x.tokens]))
    return out


def sums_of(x) -> list[tuple[str, str, str]]:
    """(name, value, remark) of the terms of eq. 1, in the order in which they are added up."""
    weights, clip = [t.weight for t in x.tokens], x.cfg.clip
    remark = f"w from {min(weights):.3f} to {max(weights):.3f}" if x.tokens[0].contexts else "no contexts: w is 1"
    remark += f"; {sum(t.div > clip for t in x.tokens)} clipped at {clip:g}" if clip else ""
    terms = [("weighted mean D", x.cfg.w_div, remark), ("mean contrast", x.cfg.w_contrast, f"margin {x.cfg.margin:g}")]
    terms += [("mean match", x.cfg.w_match, "features, eq. 6"), ("mean nll", x.cfg.w_nll, "cross-entropy")]
    how = " + ".join(f"{w:g} * {x.sums[name]:.6f}" for name, w, _ in terms if w)
    rows = [("mean D", f"nats a token, {len(x.tokens)} tokens"), *((name, remark) for name, w, remark in terms if w)]
    return [(name, f"{x.sums[name]:.6f}", remark) for name, remark in [*rows, ("loss", f"= {how} (eq. 1)")]]


def table(x, width: int = 100, color: bool = False, encoding: str = "utf-8") -> str:
    """The question, a row per token, and what they add up to, in `width` columns. x: explain.Explained."""
    paint = lambda text, code: f"\033[{code}m{text}\033[0m" if color and code else text
    columns, marked = columns_of(x), worst(x.tokens)
    names = [(printable(t.text, encoding), printable(t.top_teacher[0][0], encoding)) for t in x.tokens]
    side = min(20, (width - 26 - 6 * len(columns)) // 2, max(9, *(len(name) for pair in names for name in pair)))
    lines = [f"{name:<16} {fitted(printable(text, encoding), width - 17).rstrip()}" for name, text in title_of(x)]
    titles = "".join(f"{title:>6}" for title, _, _ in columns)
    lines += ["", f"  {'token':<{side}} student teacher  {fitted('would say', side)}      {titles}"]
    for i, (t, (text, top)) in enumerate(zip(x.tokens, names, strict=True)):
        heat = "1;31" if t.div >= HOT else "33" if t.div >= WARM else ""
        other = paint(fitted("=", side), "2") if t.top_teacher[0][0] == t.text else paint(fitted(top, side), heat)
        row = f"{'*' if i in marked else ' '} {paint(fitted(text, side), heat)} {chance(t.student):>7} {chance(t.teacher):>7}"
        row += f"  {other} {chance(t.top_teacher[0][1]):>5}" + "".join(f"{cells[i]:>6}" for _, _, cells in columns)
        lines.append(row)
    lines += ["", *(f"{name:<16} {value:>9}   {remark}" for name, value, remark in sums_of(x)), ""]
    notes = [("*", "the worst tokens"), ("=", "what was written is what the teacher, too, would most likely say")]
    return "\n".join(lines + [f"{title:<4} {meaning}" for title, meaning, *_ in notes + columns])


def has_colour() -> bool:
    """Does the terminal show colours, and does its user want them?"""
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def show(x, html: str | None = None) -> None:
    """Print the table, in colour where the terminal has any, and write the page. Raises ValueError if it cannot be written."""
    width = min(120, max(80, shutil.get_terminal_size((100, 0)).columns))
    print(table(x, width, has_colour(), sys.stdout.encoding or "utf-8"), flush=True)
    if html:
        try:
            Path(html).write_text(html_page(x), encoding="utf-8")
        except OSError as error:
            raise ValueError(f"--html {html}: {error.strerror}") from error
        print(f"\nthe page: {html}")


def html_page(x) -> str:
    """The page: a card per token, in view while the pointer or the focus is on the token, so no script is needed."""
    columns, marked = columns_of(x), worst(x.tokens)
    first = max(range(len(x.tokens)), key=lambda i: x.tokens[i].div)  # its card is open until another one is asked for
    say = lambda text: escape("␣" if text == " " else visible(text))
    paragraphs = lambda text: escape("\n".join(map(visible, text.split("\n"))))
    heat = lambda d: f"--heat: {1 - math.exp(-1.4 * d):.3f}"  # 0.1 nats just show, 2 are nearly full

    def token(i: int, t) -> str:
        facts = [("token", f"{i + 1} of {len(x.tokens)}"), ("student", chance(t.student)), ("teacher", chance(t.teacher))]
        facts += [(title, cells[i]) for title, _, cells in columns]
        card = f"<b>{say(t.text)}</b>" + "".join(f"<span><i>{title}</i> {value}</span>" for title, value in facts)
        card = f'<span class="facts">{card}</span>'
        for who, top in (("student", t.top_student), ("teacher", t.top_teacher)):
            bars = [(' class="own"' * (word == t.text), p, say(word)) for word, p in top]
            bars = "".join(f'<span{own} style="--p: {p:.3f}"><b>{word}</b>{chance(p)}</span>' for own, p, word in bars)
            card += f'<span class="top"><i>what the {who} would say</i>{bars}</span>'
        kind = "tok" + " worst" * (i in marked) + " first" * (i == first)
        token = f'{say(t.text)}<span class="card" tabindex="-1">{card}</span>'
        return f'<span class="{kind}" tabindex="0" style="{heat(t.div)}">{token}</span>' + "<br>" * ("\n" in t.text)

    box = '<details><summary>the prompt: {}</summary><pre class="box">{}</pre></details>'.format
    return Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8")).substitute(
        title=escape(visible(x.example.question)),
        head="".join(f"<tr><th>{title}<td>{paragraphs(value)}</tr>" for title, value in title_of(x)),
        tokens="".join(token(i, t) for i, t in enumerate(x.tokens)),
        scale=" ".join(f'<span class="tok" style="{heat(d)}">{d:g}</span>' for d in (0, 0.1, 0.3, 1, 3)),
        sums="".join(f'<tr><th>{title}<td class="n">{value}<td>{escape(remark)}</tr>' for title, value, remark in sums_of(x)),
        numbers=escape(table(x, 120)),
        prompts="".join(box(reader, paragraphs(prompt)) for reader, prompt in x.prompts.items()),
    )
