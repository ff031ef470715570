"""What an answer is worth: the reward function of self_play.py, to be used, read, or replaced.

    python RL_HAND/self_play/self_play.py REWARD_FUNC=./my_reward.py

asks my_reward.py's compute_score(data_source, solution_str, ground_truth, extra_info=None) instead;
that function is all that such a file needs. This one reads numbers as people and LaTeX write them,
never runs any text, and looks at a bounded piece of it: hostile text costs milliseconds.

The package math-verify is optional. Where it is installed, what is no plain number (a root, a
formula, a set) is compared by it; else such answers must be equal as text.
"""

import re
import signal
import threading
import unicodedata
from fractions import Fraction
from functools import cache

RIGHT, PARTLY, WELL_FORMED, WRONG = 1.0, 0.5, 0.1, 0.0
MAX_TEXT = 20_000  # characters of a text that are read: its last ones, where the answer is
MAX_ANSWER = 1_000  # characters of an answer
EPSILON = 1e-6  # a difference of exactly the margin is no pair, however floats round it

# Marks of an answer, the surest first; of several the last counts.
BOX = re.compile(r"\\(?:boxed|fbox)(?:\s{0,9}\{|\s{1,9}(?=[^\s{]))")
TAG = re.compile(r"<answer>", re.IGNORECASE)
HASHES = re.compile(r"####(?!#)")
PHRASE = re.compile(  # in English and in Chinese
    r"(?:\banswer\b|\u7b54\u6848)[\s*_]{0,9}(?:[:=\uff1a\u662f\u4e3a]|(?:is|equals|comes (?:out )?"
    r"to|(?:would|should|must|will|has to) be)\b)[\s:\uff1a*_]{0,9}", re.IGNORECASE)
BEFORE = re.compile(  # what may stand before a number in an answer that is this number
    r"(?:[A-Za-z]\w{0,9}\s?=|[=+~\u2248$\xa3\xa5\u20ac\u20b9\s]|(?:about|approx(?:imately|\.)?|"
    r"around|roughly|exactly|equals?|to|just|only|thus|therefore|so|USD|US|EUR|GBP|INR|CNY|JPY|"
    r"Rs\.?)(?![A-Za-z]))*", re.IGNORECASE)
AFTER = re.compile(  # and behind it: a unit, decoration
    r"(?:\s|[^\W\d]|\\?[-/.\xb7*](?=\s?[A-Za-z])|[%'!?.\xb0$\u20ac\xa3]|[^\w\s\x21-\x7e])*")
FORMULA = re.compile(  # a number with this behind it is part of another one
    r"\s?(?:[\u03c0\u221a\u4e07\u4ebf]|[bdeio-rtuxyz]$|\\?(?:pi|sqrt|squared|cubed|trillions?|"
    r"(?:hundred|thousand|million)ths?)(?![A-Za-z]))", re.IGNORECASE)
UNITS = {name: (what, Fraction(size)) for what, sizes in {  # how many of its first unit a unit is
    "length": "m 1 mm 1/1000 cm 1/100 km 1000 in 0.0254 ft 0.3048 yd 0.9144 mi 1609.344",
    "mass": "g 1 mg 1/1000 kg 1000 lb 453.59237 oz 28.349523125", "volume": "l 1 ml 1/1000",
    "time": "s 1 min 60 h 3600 day 86400 week 604800", "am": "am 1", "pm": "pm 1",
    "dollars": "$ 1 cent 1/100", "euros": "\u20ac 1", "pounds": "\xa3 1", "miles an hour": "mph 1",
    "a place": "st 1 nd 1 rd 1 th 1"}.items() for name, size in re.findall(r"(\S+) (\S+)", sizes)}
NAMES = {  # other names of units, without a plural's s
    "meter": "m", "metre": "m", "kilometer": "km", "kilometre": "km", "centimeter": "cm",
    "centimetre": "cm", "millimeter": "mm", "millimetre": "mm", "inch": "in", "inche": "in",
    "foot": "ft", "feet": "ft", "yard": "yd", "mile": "mi", "gram": "g", "kilogram": "kg",
    "kilo": "kg", "milligram": "mg", "pound": "lb", "ounce": "oz", "liter": "l", "litre": "l",
    "milliliter": "ml", "millilitre": "ml", "second": "s", "sec": "s", "minute": "min", "hour": "h",
    "hr": "h", "dollar": "$", "usd": "$", "euro": "\u20ac", "eur": "\u20ac"}


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    """The score of one answer: 1.0 right; 0.5 partly right: right but for its sign, or for one of
    two or more digits; 0.1 wrong, but an answer was named; 0.0 otherwise.

    An answer is named by \\boxed{...}, <answer>...</answer>, "#### ..." or "Answer: ..." (also "the
    answer is"): the first of these that there is, and of several the last; where there is none, the
    last number. What stands before </think> is not read. `ground_truth` may be the bare answer or a
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
    """The answer in a text, and whether it is named as one: (answer or None, bool).

    >>> final_answer("<think>Answer: 3</think>The answer is **17**, since 20 - 3 = 17.")
    ('17', True)
    """
    text = text[-MAX_TEXT:]
    answer = text.rpartition("</think>")[2]
    text = answer if answer.strip() else text  # nothing behind the reasoning: then what is in it
    for mark in (BOX, TAG, HASHES):
        if found := list(mark.finditer(text)):
            start = found[-1].end()
            if mark is BOX:
                inside = in_braces(text, start) if found[-1][0].endswith("{") else \
                    re.match(r"[^\s$]{0,99}", text[start:])[0]
                if inside is not None:
                    return clean(inside), True
            if mark is TAG:
                inside = text[start:start + MAX_ANSWER].partition("</")[0]
                phrase = PHRASE.search(inside)
                return clean(inside[phrase.end():] if phrase else inside), True
            return named_answer(text[start:]), True
    if found := list(PHRASE.finditer(text)):
        behind = [(each[0], text[each.end():][:MAX_ANSWER]) for each in found[-20:]]
        direct = [rest for _, rest in behind if quantity(line_of(rest))]  # a number is the answer
        marked = [rest for mark, rest in behind if re.search(r"[:=\uff1a]", mark)]
        return named_answer((direct or marked or [behind[-1][1]])[-1]), True
    return last_quantity(text), False


def line_of(text):
    """The rest of the line behind a phrase, less an explanation.

    >>> line_of("3 + 82 = 85. Check: 85 - 3 = 82"), line_of("17, because it is odd")
    ('85', '17')
    """
    lines = [clean(line) for line in text[:MAX_ANSWER].lstrip().split("\n")[:4]]
    line = re.sub(r"(?<=\d)\s*\([^()]*\)", "", next(filter(None, lines), ""))  # 42 (6 x 7)
    line = re.split(r"(?<!\bRs)\.(?=\s|$)|\u3002|[,;:]?\s(?:because|since|as|which|so|where)\b|"
                    r"[,;]\s(?=[A-Za-z]{2})", line + " ")[0].rsplit("=", 1)[-1]
    return clean(PHRASE.sub("", line))


def named_answer(text):
    """What follows a phrase; if that is prose, its last number.

    >>> named_answer("42 apples"), named_answer("Ann has 42 apples."), named_answer("x + 42")
    ('42 apples', '42 apples', 'x + 42')
    """
    line = line_of(text)
    prose = re.search(r"[A-Za-z]{2}[\s-][A-Za-z]{2}[^\d]*\d|^[A-Za-z -]{2,60}\(", line)
    return last_quantity(line) or line if prose and not quantity(line) else line


def last_quantity(text):
    """A text's last number with the unit behind it, or None."""
    for end in range(len(text), 0, -MAX_ANSWER):  # it is seldom far from the end
        part = plain_numbers(clean(text[max(0, end - MAX_ANSWER):end]))
        for found in list(NUMBER.finditer(part))[:-20:-1]:
            rest = re.split(r"[.,;:)](?=\s|$)|\n", part[found.start():][:99] + " ")[0]
            if quantity(rest) or not re.match(rf"[A-Za-z]|{FORMULA.pattern}", part[found.end():]):
                return rest.strip() if quantity(rest) else found[0]


def true_answer(text):
    """The answer of a reference: the one that it names, or the whole text, or in prose the last
    number."""
    text = text[-MAX_TEXT:]
    if any(mark.search(text) for mark in (BOX, TAG, HASHES, PHRASE)):
        return final_answer(text)[0]
    text = text.rpartition("</think>")[2]
    whole = clean(text[-MAX_ANSWER:])
    prose = re.search(r"[A-Za-z]{2}\s{1,9}[A-Za-z]{2}|[0-9]\s{1,9}[A-Za-z]{2}", text)
    return (last_quantity(text) or whole) if prose and not quantity(whole) else whole


def in_braces(text, start):
    """The text from `start` to the brace that closes what was opened before it, or None."""
    depth = 1
    for i, character in enumerate(text[start:start + MAX_ANSWER], start):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[start:i]
    return None


def clean(text):
    """A text in plain characters: LaTeX's fractions, spaces and fonts, tags, quotes undone.

    >>> clean(r"$-\\dfrac{1{,}000}{3}\\,\\text{cm}$"), clean(r"3\\frac12"), clean("**50\\\\%**")
    ('-1,000/3 cm', '3 1/2', '50%')
    """
    text = text[:MAX_ANSWER]
    if not text.isascii():  # raised digits are a power, 2\xbd is 2 1/2, wide characters are plain
        text = re.sub("([\u2070\xb9\xb2\xb3\u2074-\u2079\u207b]+)|([\xbc-\xbe\u2150-\u215e])",
                      lambda found: ("^" if found[1] else " ") + found[0], text)
        text = unicodedata.normalize("NFKC", text).translate(str.maketrans(
            "\u2010\u2011\u2012\u2013\u2014\u2212\u2044\u201c\u201d\u2018\u2019", "------/\"\"''"))
    text = re.sub(r"</?[A-Za-z|][\w|]{0,20}\s?/?>", "", text)  # tags, and <|im_end|>
    for old, new in (("{,}", ","), (",\\!", ","), ("\\%", "%"), ("\\$", "\0"), ("\\left", ""),
                     ("\\right", ""), ("\\!", ""), ("^\\circ", "\xb0"), ("^{\\circ}", "\xb0"),
                     ("\\degree", "\xb0"), ("\\displaystyle", ""), ("\\textstyle", ""),
                     ("\\approx", ""), ("\\(", ""), ("\\)", ""), ("\\[", ""), ("\\]", ""),
                     ("\\over", "/"), ("\\cdot", "*"), ("`", "")):
        text = text.replace(old, new)
    text = re.sub(r"\$([^$]*)\$", r"\1", text).replace("$$", "").replace("\0", "$")
    text = re.sub(r"(?<![0-9A-Za-z)])\*\*|\*\*(?![0-9A-Za-z(])", "", text)  # bold, no power
    for _ in range(3):  # one in the other
        text = re.sub(r"\\(?:text|math|mbox|boxed|fbox|operatorname)[a-z]{0,6}\s?\{([^{}]{0,99})\}",
                      r" \1", text)
    part = r"\s?(?:\{\s?(-?)([^{}]{1,99}?)\s?\}|()([0-9]))"
    text = re.sub(rf"(-?)\\[dtc]?frac{part}{part}", fraction, text)
    text = re.sub(r"(?:\\[,;: ]|[~ \t])+", " ", text)
    while True:
        shorter = text.strip(" \n\t,;:\"'*_#|").rstrip(".\\")
        if len(shorter) > 1 and shorter[0] + shorter[-1] in ("()", "{}", "[]") and not re.search(
                r"[(){}\[\],]", shorter[1:-1]):
            shorter = shorter[1:-1]
        if shorter == text:
            return text
        text = shorter


def fraction(found):
    """What \\frac{a}{b} is in plain characters: a/b behind a space, with one sign before it."""
    sign, *parts = (found[i] or "" for i in range(1, 10))
    minus, top, below_minus, below = (parts[i] or parts[i + 2] for i in (0, 1, 4, 5))
    sign = "-" * ([sign, minus, below_minus].count("-") % 2)
    top, below = (part if re.fullmatch(r"[\w.,]+", part) else f"({part})" for part in (top, below))
    return f" {sign}{top}/{below}"


# ========================================== Comparing it ==========================================


NUMBER = re.compile(r"""
    (?:(?<![a-z\d.)}\]])([-\u2013\u2212]))?  # a minus, unless it subtracts
    \\?[$\xa3\xa5\u20ac\u20b9]?  # a currency
    (?<![a-z\d^/])(?<!\d:)(?<!\^[-{])(?<!\^\{-)  # not inside a word, a power, a date or a time
    (?:(\d{1,9})[ \\](?=\d+/))?+  # the 3 of 3 1/2; then its 1, or any number: 5, 0.5, .5, 5e-3
    ((?:\d{1,99}+(?:\.\d{1,99})?+|(?<![\d.])\.\d{1,99}+)(?:e[+-]?\d{1,3})?+)
    (?:[ ]?/[ ]?([1-9]\d{0,98}+(?:\.\d{1,99})?+))?+(?:[ ]?(hundred|thousand|million)s?\b)?+  # 2
    (?!\d|[:/]\d|\^(?!\{?\\circ)  # no digits or power may follow, nor a variable: 5x (5m is fine)
      |\\?(?:pi|[a-fi-kn-rt-z])(?![a-z]))""", re.VERBOSE | re.IGNORECASE)


def last_number(text):
    r"""The last number in a text, as a Fraction; None without one. 99 digits are the most.

    >>> [str(last_number(text)) for text in ("-1,234.50", "12-5", r"3\frac12", "2 million", "5x")]
    ['-2469/2', '5', '7/2', '2000000', 'None']
    """
    text = re.sub(r"(?<=\d)(?:\{?,\}?|,?\\[,!]|[\u2009\u202f])(?=\d{3}(?!\d))", "", text)  # 1,234
    part = r" *(?:{([^{}]*)}|(\d))"
    text = re.sub(rf"\\[dt]?frac{part}{part}", r"\\\1\2/\3\4", text)  # 3\frac{1}{2} -> 3\1/2
    if found := NUMBER.findall(text):
        minus, whole, top, bottom, factor = found[-1]
        value = Fraction(top) / Fraction(bottom) + int(whole or 0) if bottom else Fraction(top)
        value *= {"": 1, "h": 100, "t": 1000, "m": 10**6}[factor[:1].lower()]
        return -value if minus else value


def plain_numbers(text):
    """A cleaned text with its numbers as NUMBER reads them. A root makes them part of a word.

    >>> plain_numbers("1 234 567, 3*10^4, 2^{10}, $4k, \u221a2"), plain_numbers("- 3")
    ('1234567, 3e4, 1024, $4e3, sqrt2', '-3')
    """
    text = re.sub(r"(?<![\d.,])\d{1,3}(?:[ ,']\d{3})+(?!\d)",
                  lambda found: re.sub(r"\D", "", found[0]), text)
    text = re.sub(r"(?<=\d) ?(?:\\times|[*x\xb7\xd7]) ?10\^\{?(-?\d\d?)\}?(?!\d)", r"e\1", text)
    text = re.sub(r"(?<![\w.^/])([1-9]\d{0,8})\^\{?(-?\d\d?)\}?(?![\d^])",
                  lambda found: str(Fraction(int(found[1])) ** int(found[2])), text)
    text = re.sub(r"(?<=\d) ?(k|M|[Bb]illion)s?\b",
                  lambda found: {"k": "e3", "M": "e6"}.get(found[1], "e9"), text)
    text = re.sub(r"(?:\u221a|sqrt) ?[({]?(?=\d)", "sqrt", text)
    return re.sub(r"(^|[=:(] ?)- (?=[\d.$])", r"\1-", text)


def quantity(text):
    """A number's (value as a Fraction, its digits, whether in per cent, unit or None), or None if
    the text is anything else. The unit is (what it measures, its size).

    >>> quantity("1,234.50"), quantity("x = 3 1/2")[0], quantity("2 min")[3][0], quantity("x+1")
    ((Fraction(2469, 2), '1234.5', False, None), Fraction(7, 2), 'time', None)
    """
    text = plain_numbers(clean(text))
    found = NUMBER.match(text, BEFORE.match(text).end())
    if not found:
        return None
    rest = re.sub(r"\([^()]*\)", "", text[found.end():]).rstrip(")}] ")
    power = "".join(re.findall(r"(?<=[A-Za-z])\s?\^\{?([23])", rest)[:1])  # of the unit
    rest = re.sub(r"(?<=[A-Za-z])\s?\^\{?-?[0-9]\}?", "", rest)
    if FORMULA.match(rest) or not AFTER.fullmatch(rest):
        return None
    words = re.findall(r"[A-Za-z]+", rest.lower())
    unit = NAMES.get(words[0].removesuffix("s"), words[0].removesuffix("s") or "s") if words else ""
    unit = "$" if re.search(r"\$|USD|US\b", text[:found.start(3)]) else unit
    if re.match("[A-Za-z]", rest) and unit not in UNITS:
        return None  # 2ab
    known = unit in UNITS and len(words) < 2
    unit = (UNITS[unit][0] + power, UNITS[unit][1] ** int(power or 1)) if known else None
    digits = re.fullmatch(r"\W*?0*(\d*(?:\.\d*[1-9])?)\.?0*", found[0])
    per_cent = rest.startswith("%") or words[:1] == ["percent"]
    return last_number(found[0]), digits[1] if digits else "", per_cent, unit


def is_same(answer, truth):
    """Whether two answers are equal: as numbers (50% is 0.5, and 50 where per cent are meant) whose
    units do not differ, as text, as lists of such, or else as math-verify sees it.

    >>> [is_same(answer, "5 km") for answer in ("5000 m", "5 m", "5", "5x")]
    [True, False, True, False]
    """
    one, other = quantity(answer), quantity(truth)
    if one and other:
        if one[3] and other[3]:
            return one[3][0] == other[3][0] and one[0] * one[3][1] == other[0] * other[3][1]
        return one[0] == other[0] or one[0] * 100 ** other[2] == other[0] * 100 ** one[2]
    plain = [as_text(text) for text in (answer, truth)]
    if plain[0] == plain[1]:
        return plain[0] != ""
    lists = [re.fullmatch(r"([(\[{])(.{1,200})([)\]}])", text) for text in plain]
    if all(lists) and lists[0].group(1, 3) == lists[1].group(1, 3):
        parts = [found[2].split(",") for found in lists]
        if len(parts[0]) == len(parts[1]) > 1:
            return all(quantity(a) and quantity(b) and is_same(a, b) for a, b in zip(*parts))
    if bool(one) != bool(other) and not re.search(r"[-+*/^]|\\[a-z]", answer + truth):
        return False  # math-verify takes 2ab for 2, and what it does not know for a unit
    both = "".join(plain)
    if "," in both and "\\" not in both and plain[0][:1] != plain[1][:1]:
        return False  # and 1, 2 for a point
    return is_same_formula(answer, truth)


def as_text(text):
    """A text without what does not matter: case, spaces that part no words, braces of one sign."""
    text = re.sub(r"(?<![^\W_])\s+|\s+(?![^\W_])", "", clean(text)).casefold()
    return re.sub(r"(?<=[\^_])\{(\w)\}", r"\1", text)


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
    long, or would make huge numbers (towers of powers, factorials, sums), is not given to it, and
    its clock of a second is needed: an alarm, which only a main thread has, and not Windows."""
    package = math_verify()
    if (package is None or not hasattr(signal, "setitimer")
            or threading.current_thread() is not threading.main_thread()):
        return False
    for text in (answer, truth):
        powers = text.count("^")
        small = len(re.findall(r"\^(?:[0-9a-z]|\{[+-]?[0-9a-z]\})(?![0-9])", text))
        if (len(text) > 200 or powers > 2 or small < powers
                or re.search(r"\*\*|!|[0-9]{7}|\\(?:sum|prod|int|lim|binom)", text)):
            return False
    try:
        wanted, given = (package.parse(f"${text}$", parsing_timeout=1) for text in (truth, answer))
        return bool(package.verify(wanted, given, timeout_seconds=1))
    except Exception:  # its parsers raise whatever they like on what is no formula
        return False
