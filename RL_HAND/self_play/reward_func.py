"""What an answer is worth: the reward function of self_play.py, to be used, read, or replaced.

    python RL_HAND/self_play/self_play.py REWARD_FUNC=./my_reward.py

asks my_reward.py's compute_score(data_source, solution_str, ground_truth, extra_info=None) instead;
that function is all that such a file needs. This one reads numbers as people and LaTeX write them,
never runs any text, and looks at a bounded piece of it: hostile text costs milliseconds.

The package math-verify is optional. Where it is installed, what is no plain number (a root, a
formula, a set) is compared by it; else such answers must be equal as text.
"""

import re
from fractions import Fraction
from functools import cache

RIGHT, PARTLY, WELL_FORMED, WRONG = 1.0, 0.5, 0.1, 0.0
MAX_TEXT = 20_000  # characters of a text that are read: its last ones, where the answer is
MAX_ANSWER = 1_000  # characters of an answer
MAX_DIGITS = 400  # of a number; what has more is no answer
EPSILON = 1e-6  # a difference of exactly the margin is no pair, however floats round it

MARK = re.compile(r"\\boxed\s{0,9}\{|####|\banswer\s{0,9}(?:is\b|:|=)", re.IGNORECASE)
DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
POWER = r"(?:[eE][+-]?[0-9]{1,3}(?![0-9])|\s?(?:\\times|\\cdot|x|\*)\s?10\^\{?[+-]?[0-9]{1,3}\}?)"
QUANTITY = re.compile(rf"(?P<sign>[+-]?)\s?(?:(?P<whole>[0-9]{{1,9}})\s(?=[0-9]+/))?"
                      rf"(?P<top>{DIGITS})(?P<power>{POWER})?"
                      rf"(?:\s?/\s?(?P<bottom>{DIGITS}))?\s?(?P<percent>%)?")


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    """The score of one answer: 1.0 right; 0.5 partly right: right but for its sign, or for one of
    two or more digits; 0.1 wrong, but an answer was named; 0.0 otherwise.

    An answer is named by \\boxed{...}, "#### ..." or "Answer: ..." (also "the answer is"); the last
    one counts, and where there is none, the last number. `ground_truth` may be the bare answer or a
    worked solution that ends with it. data_source and extra_info are for functions that treat data
    sets differently; this one does not.

    >>> [compute_score("", text, "1/2") for text in ("Answer: 0.5", "Answer: -1/2", "Answer: 7")]
    [1.0, 0.5, 0.1]
    """
    truth = true_answer(str(ground_truth))
    answer, named = final_answer(solution_str)
    if answer is None or truth == "":
        return WRONG
    if is_same(answer, truth):
        return RIGHT
    if is_close(answer, truth):
        return PARTLY
    return WELL_FORMED if named and answer else WRONG


def rank_responses(responses, ground_truth, data_source):
    """[(index, score)] of the responses, best first; equal ones stay in their order.

    >>> rank_responses(["no idea", "Answer: 4", "Answer: 9"], "4", "")
    [(1, 1.0), (2, 0.1), (0, 0.0)]
    """
    scores = [compute_score(data_source, response, ground_truth) for response in responses]
    return sorted(enumerate(scores), key=lambda pair: -pair[1])


def get_preference_pairs(responses, ground_truth, data_source, margin=0.1):
    """[(chosen, rejected, score_diff)]: every two responses whose scores differ by more than the
    margin. 0.1 against 0.0 is a pair at a margin of 0.05, not at 0.1.

    >>> get_preference_pairs(["Answer: 9", "Answer: 4"], "4", "")
    [('Answer: 4', 'Answer: 9', 0.9)]
    """
    ranked = rank_responses(responses, ground_truth, data_source)
    return [(responses[i], responses[j], better - worse)
            for place, (i, better) in enumerate(ranked) for j, worse in ranked[place + 1:]
            if better - worse > margin + EPSILON]


# ======================================== Finding the answer ======================================


def final_answer(text):
    """The answer in a text, and whether it is named as one: (answer or None, bool)."""
    text = text[-MAX_TEXT:]
    marks = list(MARK.finditer(text))
    if marks:
        start = marks[-1].end()
        if marks[-1][0].startswith("\\"):
            inside = in_braces(text, start)
            if inside is not None:
                return clean(inside), True
        line = text[start:start + MAX_ANSWER].strip().split("\n")[0]
        return clean(re.split(r"\.(?=\s|$)", line)[0].rsplit("=", 1)[-1]), True
    numbers = list(QUANTITY.finditer(without_subtraction(clean(text))))
    return (numbers[-1][0], False) if numbers else (None, False)


def true_answer(text):
    """The answer of a reference: the one that it names, or the whole text, or in prose the last
    number."""
    if MARK.search(text[-MAX_TEXT:]):
        return final_answer(text)[0]
    prose = re.search(r"[A-Za-z]{2}\s{1,9}[A-Za-z]{2}|[0-9]\s{1,9}[A-Za-z]{2}", text[-MAX_TEXT:])
    return (final_answer(text)[0] or clean(text)) if prose else clean(text)


def in_braces(text, start):
    """The text from `start` to the brace that closes what was opened before it, or None."""
    depth = 1
    for i, character in enumerate(text[start:start + MAX_ANSWER], start):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[start:i]
    return None


def without_subtraction(text):
    """The text with a space behind each minus that subtracts: in 12-5 the last number is 5."""
    return re.sub(r"(?<=[0-9)])(\s?)-(?=[0-9.])", r"\1- , ", text)


def clean(text):
    """A text in plain characters: LaTeX's fractions, signs, spaces, units and currency undone.

    >>> clean(r"$-\\dfrac{1{,}000}{3}\\,\\text{cm}$"), clean(r"3\\frac12"), clean("50\\\\%")
    ('-1,000/3  cm', '3 1/2', '50%')
    """
    for old, new in (("\N{MINUS SIGN}", "-"), ("{,}", ","), ("\\%", "%"), ("\\$", ""), ("$", ""),
                     ("\\left", ""), ("\\right", ""), ("\\!", ""), ("\N{DEGREE SIGN}", ""),
                     ("\N{EURO SIGN}", ""), ("\N{POUND SIGN}", ""), ("^\\circ", ""),
                     ("^{\\circ}", "")):
        text = text.replace(old, new)
    text = re.sub(r"(?<![0-9A-Za-z)])\*\*|\*\*(?![0-9A-Za-z(])", "", text)  # bold, no power
    text = re.sub(r"\\[,;: ]|~", " ", text)
    text = re.sub(r"\\(?:text|mathrm|mbox|textbf)\s?\{([^{}]{0,99})\}", r" \1", text)
    text = re.sub(r"\\[dtc]?frac", r"\\frac", text)
    text = re.sub(r"\\frac\s?([0-9])\s?([0-9])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"(?<=[0-9])\s?\\frac", r" \\frac", text)
    text = re.sub(r"\\frac\s?\{([^{}]{1,99})\}\s?\{([^{}]{1,99})\}",
                  lambda f: "/".join(p if re.fullmatch(r"\s*[\w.,]+\s*", p) else f"({p})"
                                     for p in f.groups()), text)
    return text.strip(" \n\t,;:").rstrip(".,;: \n\t")


# ========================================== Comparing it ==========================================


def quantity(text):
    """A number's (value as a Fraction, its digits, whether in per cent), or None if it is none.

    A unit behind it, "x =" before it and parentheses around it do not count.

    >>> quantity("1,234.50"), quantity("3 1/2")[0], quantity("2e3")[0], quantity("x+1")
    ((Fraction(2469, 2), '1234.5', False), Fraction(7, 2), Fraction(2000, 1), None)
    """
    text = re.sub(r"^\s*[A-Za-z]\s*=", "", text[:MAX_ANSWER]).strip()
    while len(text) > 1 and text[0] + text[-1] in ("()", "{}", "[]"):
        text = text[1:-1].strip()
    found = QUANTITY.match(text)
    if not found or not re.fullmatch(r"(?:\s?[A-Za-z][A-Za-z ./]*)?", text[found.end():]):
        return None
    parts = [found[name] for name in ("top", "bottom")]
    if sum(len(part or "") for part in parts) > MAX_DIGITS:
        return None
    top, bottom = (Fraction(part.replace(",", "")) if part else Fraction(1) for part in parts)
    if bottom == 0:
        return None
    if found["power"]:
        top *= Fraction(10) ** int(re.search(r"[+-]?[0-9]+(?=\}?$)", found["power"])[0])
    value = (top / bottom + int(found["whole"] or 0)) * (-1 if found["sign"] == "-" else 1)
    digits = parts[0].replace(",", "").lstrip("0")
    digits = digits.rstrip("0").rstrip(".") if "." in digits else digits
    plain = not (found["power"] or found["bottom"])
    return value, digits if plain else "", bool(found["percent"])


def is_same(answer, truth):
    """Whether two answers are equal: as numbers (50% is 0.5, and 50 where per cent are meant), as
    text, or else as math-verify sees it."""
    one, other = quantity(answer), quantity(truth)
    if one and other:
        if one[0] == other[0]:
            return True
        return one[2] != other[2] and (one if one[2] else other)[0] / 100 == \
            (other if one[2] else one)[0]
    plain = [re.sub(r"[\s()]", "", text).casefold() for text in (answer, truth)]
    return plain[0] == plain[1] != "" or is_same_formula(answer, truth)


def is_close(answer, truth):
    """Whether a number is right but for its sign, or for one of its two or more digits."""
    one, other = quantity(answer), quantity(truth)
    if not one or not other or not other[0]:
        return False
    if one[0] == -other[0]:
        return True
    same_shape = len(one[1]) == len(other[1]) > 1 and (one[0] < 0) == (other[0] < 0)
    return same_shape and sum(a != b for a, b in zip(one[1], other[1])) == 1


@cache
def math_verify():
    """The optional package (pip install math-verify), or None."""
    try:
        import math_verify as package
    except ImportError:
        return None
    return package


def is_same_formula(answer, truth):
    """Whether math-verify, if it is installed, finds two formulas equal. It computes: so what is
    long, or would make huge numbers (towers of powers, factorials, sums), is not given to it."""
    package = math_verify()
    for text in (answer, truth):
        powers = text.count("^")
        small = len(re.findall(r"\^(?:[0-9a-z]|\{[+-]?(?:[0-9]{1,2}|[a-z])\})(?![0-9])", text))
        if (package is None or len(text) > 200 or powers > 2 or small < powers
                or re.search(r"\*\*|!|[0-9]{7}|\\(?:sum|prod|int|lim|binom)", text)):
            return False
    try:
        wanted, given = (package.parse(f"${text}$") for text in (truth, answer))
        return bool(package.verify(wanted, given))
    except Exception:  # its parsers raise whatever they like on what is no formula
        return False
