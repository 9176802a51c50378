"""What a text says its answer is: one value, stated, or none. Most rows here were once read as something else."""

from decimal import Decimal

import pytest

from tasks.data import Example
from tasks.said import as_number, plain, said_letter, said_number, said_text
from tasks.scoring import score_all

OPTIONS = ["Paris", "Lyon", "Nice", "Lille"]
# Under each "--- answer" the texts that say it, or say none; ⏎ is the end of a line.
LETTERS = r"""
--- C
Answer: C⏎Do not pick A.
Answer: C⏎A common mistake is to pick B.
Answer: C⏎(The wrong answer is B.)
Answer: C⏎The answer is A for beginners only
Answer: C⏎Wrong answer: B
Answer: D⏎Answer: C
Answer: C⏎D
--- B
The answer is B.⏎Do not pick A.
The answer is B. (The wrong answer is A.)
I was tempted by A. The answer is B.
Since A is not right, the answer is B
It cannot be A, so the answer is B.
Some think A. Still, the answer is B.
--- None
I don't think the answer is A
You should never pick D
Let us see whether the answer is A
Don't select B
I doubt the answer is A
If the answer is A, we are lost
Some say the answer is A
Suppose the answer is A.
Is the answer: A?
The answer is A?⏎No.
C is not correct.
Answer: A is wrong
We can rule out: wrong answer: A
--- B
There is no doubt that the answer is B
I never said A; the answer is B
--- None
Answer: B or maybe C
Answer: B; C
Answer: B|C
Answer: B + C
Answer: B+C
Answer: B/C
Answer: B C
Answer: b or c
Answer: either B or C
Answer: B (maybe C)
Answer: B. Maybe C.
Answer: B or Nice
B, C
Answer: B, C is also right
Answer: A, no, B
\boxed{A} or \boxed{B}
Answer: A or Answer: B
Answer: B?
The answer is A and B.
Both B and C are correct
A⏎B. Paris
A. Paris⏎B. Lyon⏎C. Nice⏎D. Lille
--- B
Answer: B, not C
Answer: B rather than C
Answer: B. It comes after A.
Answer: B. Neither A nor C fits.
Answer: B. A is too small, so B is right.
The correct answer is B, not A or C.
The answer is B and not C
B. This is since A is too small.
__Answer: B__
Answer：Ｂ
*Answer: B*
The answer is (B) Lyon.
`Answer: B`
--- C
C is correct.
It must be C.
So the answer should be C
<answer>C</answer>
\boxed{\mathrm{C}}
Thus, C.
--- D
None of A, B or C; so D
Answer - D
Answer – D
**Answer** — D
I'd go with D
The answer to this is D
--- B
Answer: let me think.⏎So the answer is B.
Answer: ...⏎The answer is B
Answer:⏎⏎The right option is B.
--- None
Answer: B⏎Answer: unknown
Answer: C#
It is A mammal
You may pick a card
--- C
Answer: (C) Nice, B) Lyon is too small
Answer: C (Nice). B (Lyon) is too small.
The answer is C. Nice, not B. Lyon.
The answer is Nice (C).
The answer is not B but C.
The answer is most likely C.
The answer, then, is C.
The correct answer choice is C.
B is wrong and the answer is C
So B is wrong, and my choice is C.
Selected option: C
Ans: C
Answer → C
I am going with option C.
I would say C.
Option C (Nice) is correct.
C) Nice is the correct answer.
C, because it is.
<answer>\boxed{C}</answer>
I think.⏎Option C
I think.⏎#### C
I think.⏎- C. Nice
C. Nice⏎⏎It is the only one at the sea, unlike A and B.
C⏎⏎Explanation: it is.
B. Lyon⏎⏎Wait, no. The answer is C.
--- None
A. Paris⏎It is big.⏎⏎B. Lyon⏎It is not.
C) Nice is not the correct answer.
Someone told me the answer is C.
Answer: C. Nice and D. Lille
Answer: (C) Nice / (D) Lille
Answer: C, plus D
Answer: not only C but also D
\boxed{C} and \boxed{D}
$\boxed{C}$, $\boxed{D}$
$\boxed{C}$ or $\boxed{D}$
"""
NUMBERS = r"""
--- None
3/4
\frac{3}{4}
3\sqrt{2}
1 1/2
3½
½
3²
3^2
3 and a half
5k
3x
3π
3:4
12 000
18 or 20
18-20
18–20
18; 20
18 to 20
18|20
18 + 20
2 hours and 5 minutes
1.200,50
±5
at least 18
18?
unknown
unknown (18)
not 18
x = 3 or x = 4
log 5
x - 5
x >= 18
!= 18
up to 18
18 is wrong
3₂
-(-3)
--- 1000
1e3
1 × 10^3
1 \times 10^{3}
1,000
1{,}000
1,\!000
1\,000
1 × 10³
1·10^3
one thousand = 1000
1 thousand
--- -5
–5
−5
-$5
- 5
negative 5
minus 5 degrees
$-5$
−5 €
--- 18
**18 apples**
18.
$18/hour
18 cm^2
3 * 6 = 18
18 because 3*6=18
She has 18 apples.
\(18\)
(18)
x = 18
\text{18 cm}
１８
18, not 20
not 20, but 18
18\,\text{cm}
18\ \mathrm{cm}
<<20-2=18>>18
The answer is 18
The number of apples which remain is 18
--- 2000000
2 million
$2 million
2,000,000
--- 6.02e23
6.02e23
6.02 x 10^23
--- 0
0
$0
"""


def rows(block):
    """[(text, what it says)] of such a block."""
    parts = [part.strip("\n").split("\n") for part in block.split("--- ")[1:]]
    return [(text.replace("⏎", "\n"), None if said == "None" else said) for said, *texts in parts for text in texts]


@pytest.mark.parametrize(("text", "said"), rows(LETTERS))
def test_a_letter(text, said):
    assert said_letter(text, OPTIONS) == said


@pytest.mark.parametrize(("text", "value"), rows(NUMBERS))
def test_a_number(text, value):
    value = None if value is None else Decimal(value)
    for mark in ("####", "Answer:"):
        assert said_number(f"2 + 2 = 4\n{mark} {text}", mark) == value, mark
    assert said_number(f"2 + 2 = 4, \\boxed{{{text}}}") == value
    if value is not None and not text.startswith("- "):  # "10 - 4" is no statement
        assert said_number(f"so it is {text}") == value


def test_a_number_by_the_mark_of_its_question():
    assert said_number("#### Step 2: add them\nAnswer: 42", "Answer:") == 42
    assert said_number("#### Step 2: add them\nAnswer: 42") == 42
    assert said_number("#### 18\nAnswer: 20") == 18 and said_number("#### 18\nAnswer: 20", "Answer:") == 20
    assert said_number("6 * 3 = 18\n#### unknown") is None and said_number("6 * 3 = 18\nAnswer: unknown", "Answer:") is None
    assert said_number("Answer: 18\nDo not write 20.") == 18 and said_number("Answer: let us add.\nThe answer is 18.") == 18
    assert said_number("I don't think the answer is 18") is None and said_number("6*3=18. I doubt the answer is 20.") == 18
    assert (
        said_number("The answer is not 18") is None
        and said_number("maybe 18, maybe 20") is None
        and said_number("12, 18, 20") is None
    )
    assert said_number("#### 18, where x is 3") == 18 and said_number("20 minus 2") != 2
    assert said_number("6*3=18. It isn't 20.") == 18 and said_number("The answer might be 18") is None
    assert said_number("so $a = 2$ and \\boxed{18}") == 18 and said_number("$\\boxed{18}$ or $\\boxed{20}$") is None


def test_what_is_one_number():
    read = [as_number(text) for text in ("1e3", "6.02e23", "–5", "+5", "12{,}000", "1e99999", "2 million", "3²", "1½")]
    assert read == [1000, Decimal("6.02e23"), -5, 5, 12000, None, None, None, None]


def test_a_text_keeps_its_signs_and_loses_its_dress():
    different = [
        "2/3",
        "-2/3",
        "3/4",
        "3.4",
        "C",
        "C#",
        "C++",
        "[0,1)",
        "(0,1]",
        "A*",
        "A",
        "x²",
        "x2",
        "n!",
        "n",
        "x-y",
        "x y",
        ".5",
        "5",
    ]
    assert len({plain(text) for text in different}) == len(different)
    for dress in ("{}", "<{}>", "`{}`", '"{}".', "${}$", "\\text{{{}}}", "**{}**", "“{}”", "{}."):
        for text in ("C#", "-2/3", "[0,1)", "New York"):
            said = said_text(f"I think.\nAnswer: {dress.format(text)}")
            assert plain(said) == plain(text), (dress, text)
    assert plain("New-York, U.S.") == plain("new york U.S") and plain("−2/3") == plain("-2/3") and plain("H₂O") == plain("h2o")
    assert plain("[0, 1)") == plain("[0,1)") and plain("1, 200") != plain("1,200") and plain("Paris?") != plain("Paris")
    assert said_text('{"answer": "Paris", "sure": true}') == said_text('{"answer": "Paris"}') == "Paris"
    assert said_text("Answer: Paris\nThe answer is not Lyon.") == "Paris" and said_text("I don't think the answer is Paris") is None


def test_strict_and_abstained_follow_what_is_said():
    e = Example("t", "q", "r", {"kind": "number", "value": "3", "mark": "Answer:"})
    results = score_all([e] * 4, ["Answer: 3", "Answer: 3/4", "It is 3.", "Answer: 4"])
    assert [(r["correct"], r["abstained"], r["strict"]) for r in results] == [
        (True, False, True),
        (False, True, False),
        (True, False, False),
        (False, False, False),
    ]
