"""reward_func.py: how answers are found and compared, that hostile text costs little time; and
train.sh, which starts self_play.py."""

import ast
import doctest
import os
import stat
import subprocess
import sys
import threading
import time
from fractions import Fraction
from types import SimpleNamespace

import pytest
from conftest import ROOT, import_file

FOLDER = ROOT / "RL_HAND" / "self_play"


@pytest.fixture
def reward():
    """reward_func.py, imported anew, as if math-verify were not installed."""
    module = import_file(FOLDER / "reward_func.py", "reward_func_under_test")
    module.math_verify = lambda: None
    return module


# ============================================ Scores ============================================


@pytest.mark.parametrize("text, truth, score", [
    # named answers
    ("7+8=15 carry 1. 3+4+1=8. Answer: 85", "7+8=15 carry 1. 3+4+1=8. Answer: 85", 1.0),
    ("Answer: 85", "85", 1.0), ("the ANSWER is 85.", "85", 1.0), ("answer = 85", "85", 1.0),
    ("#### 85", "Some work.\n#### 85", 1.0), (r"so \boxed{85}", "85", 1.0),
    (r"The answer is $\boxed{85}$.", "85", 1.0), ("Final answer: **85**", "85", 1.0),
    ("Answer:\n85", "85", 1.0), ("Answer: 7\nNo. Answer: 85", "85", 1.0),
    (r"Answer: 7, no: \boxed{85}", "85", 1.0), ("Answer: 3 + 82 = 85", "85", 1.0),
    ("Answer: 85. Check: 85 - 3 = 82", "85", 1.0), ("Answer: x = 85", "85", 1.0),
    (r"\boxed{85", "85", 1.0),  # cut off
    # the last number, where no answer is named
    ("it is 85.", "85", 1.0), ("12-85", "85", 1.0), ("3 or 85", "85", 1.0), ("85 or 3", "85", 0.0),
    # partly right: one digit, or the sign
    ("Answer: 86", "85", 0.5), ("Answer: 95", "85", 0.5), ("Answer: 1528", "1538", 0.5),
    ("Answer: -85", "85", 0.5), ("Answer: 12.5", "12.6", 0.5), ("Answer: 1,234", "1235", 0.5),
    ("it is 86", "85", 0.5),
    # wrong: a single digit is all of the number; two digits; another length
    ("Answer: 7", "8", 0.1), ("Answer: 96", "85", 0.1), ("Answer: 850", "85", 0.1),
    ("Answer: -86", "85", 0.1), ("Answer: none", "85", 0.1), ("#### 3", "85", 0.1),
    ("Answer: 1/0", "85", 0.1),
    # neither right nor an answer
    ("it is 7", "85", 0.0), ("no idea", "85", 0.0), ("", "85", 0.0), ("Answer:", "85", 0.0),
    (r"\boxed{}", "85", 0.0), ("Answer: .", "85", 0.0),
])
def test_scores(reward, text, truth, score):
    assert reward.compute_score("any", text, truth) == score
    assert reward.compute_score("other", text, truth, extra_info={"question": "?"}) == score


@pytest.mark.parametrize("text, truth", [
    ("1,234,567.50", "1234567.5"), (r"1{,}000", "1000"), ("$1,000", "1000"), (r"\$1{,}000", "1000"),
    ("007", "7"), (".5", "1/2"), ("0.50", "1/2"), ("+5", "5"), ("-0", "0"), ("5.", "5"),
    ("\N{MINUS SIGN}5", "-5"), ("- 5", "-5"), ("-1/2", "-0.5"), ("2/4", "1/2"), ("3 1/2", "3.5"),
    (r"\frac{1}{2}", "0.5"), (r"\dfrac{1}{2}", "0.5"), (r"-\tfrac{1}{2}", "-0.5"),
    (r"\frac12", "0.5"), (r"3\frac{1}{2}", "7/2"), (r"\frac{1{,}000}{4}", "250"),
    ("50%", "0.5"), (r"50\%", "50"), ("50", "50%"), ("0.5", "50%"), ("50%", "50%"),
    ("1.5e3", "1500"), (r"1.5\times 10^{3}", "1500"), ("2 x 10^-2", "0.02"),
    ("42 apples", "42"), (r"42\text{ cm}", "42"), (r"42^\circ", "42"), ("42", "42 apples"),
    ("(42)", "42"), ("{42}", "42"), (r"\left(42\right)", "42"), ("x = 42", "42"),
    ("B", "b"), ("(B)", "B"), (r"\text{B}", "B"), ("x^{2} + 1", "x^{2}+1"),
    (r"\sqrt{2}", r"\sqrt{2}"), ("{1, 2}", "{1,2}"),
])
def test_equal_answers(reward, text, truth):
    for form in (r"\boxed{%s}", "Answer: %s", "#### %s"):
        assert reward.compute_score("", form % text, truth) == 1.0, form


@pytest.mark.parametrize("text, truth", [
    ("50%", "51"), ("50%", "5"), ("1/3", "0.33"), ("0.5", "5"), ("1/2", "1/3"), ("2", "2%1"),
    ("x+1", "x+2"), ("A", "B"), ("1e3", "100"), ("1 1/2", "1/2"), ("5", "x+5"), ("42", "forty"),
    ("10^3", "10"), ("1,00", "100"),
])
def test_other_answers(reward, text, truth):
    assert reward.compute_score("", f"Answer: {text}", truth) < 1.0


def test_docstring_examples(reward):
    result = doctest.testmod(reward)
    assert result.failed == 0 and result.attempted >= 10


@pytest.mark.parametrize("text, number", [
    ("so 1,234,567", 1234567), (r"1{,}234", 1234), (r"12\,345.5", "12345.5"), (r"1,\!234", 1234),
    ("1\u2009234", 1234), ("1\u202f234\u202f567", 1234567), ("1,23", 23), ("7,", 7), ("7.", 7),
    ("is .25.", "0.25"), ("-.5", "-0.5"), ("0.50", "1/2"), ("007", 7), ("80%", 80), (r"80\%", 80),
    ("10-7=3", 3), ("3-10=-7", -7), ("\u22127", -7), ("x = \u20137", -7), ("3\u20137", 7),
    ("3 - 7", 7), ("(2)-7", 7), ("(-7)", -7), ("-$7", -7), (r"-\$7", -7), ("-\u20ac7", -7),
    ("2.5e3", 2500), ("1E-05", "0.00001"), ("1e+3", 1000), ("1e999", 10**999), ("1e9999", None),
    ("2/4", "1/2"), ("-3 / 4", "-3/4"), ("3 1/2", "7/2"), ("1.5/2.5", "3/5"), ("48/2=24", 24),
    (r"\frac{3}{4}", "3/4"), (r"-\dfrac{3}{4}", "-3/4"), (r"\tfrac{-3}{4}", "-3/4"),
    (r"\frac34", "3/4"), (r"\frac1{20}", "1/20"), (r"-2\frac{1}{2}", "-5/2"),
    (r"\frac{1,000}{4}", 250), ("3 hundred", 300), ("1.5 Million", 1500000), ("2 thousands", 2000),
    ("5x", None), ("1.5n", None), ("3x4", None), ("4pi", None), (r"4\pi", None), ("A4", None),
    ("4m", 4), ("4cm", 4), ("4th", 4), ("4 x", 4), ("\u7b54\u6848\u662f-4", -4), ("\uff14", 4),
    ("10^3", None), ("10^{3}", None), ("10^-3", None), ("10^{-3}", None), ("x^2", None),
    (r"4^\circ", 4), (r"4^{\circ}", 4), ("so ...4", 4), ("1.2.3", 3),
    ("1/0", None), ("1/2/3", None), ("10:30", None), ("1/2/2026", None), (r"\frac{x}{2}", None),
    ("7 of 5x", 7), ("9" * 99, "9" * 99), ("9" * 100, None), ("", None), ("-./\\$", None),
])
def test_the_last_number(reward, text, number):
    """The grammar that the scripts' verifier shares."""
    assert reward.last_number(text) == (None if number is None else Fraction(number))


def test_numbers(reward):
    assert reward.quantity("3 1/2") == (Fraction(7, 2), "", False, None)
    assert reward.quantity("1,200.50%") == (Fraction(2401, 2), "1200.5", True, None)
    assert reward.quantity("-3") == (Fraction(-3), "3", False, None)
    assert reward.quantity("3 km") == (Fraction(3), "3", False, ("length", 1000))
    assert reward.quantity("2\N{VULGAR FRACTION ONE HALF}")[0] == Fraction(5, 2)
    for text in ("", "-", ".", "%", "x", "x+1", "1+1", "1..2", "--5", "1/0", "1 2",
                 "5x", "2 pi", "9 squared", "10:30", "1.2.3", "1/2/3", "7 or 8", "9" * 100,
                 "1e9999", "2ab", "5 thousandths", r"2\sqrt{3}", "3 trillion"):
        assert reward.quantity(text) is None, text


def test_a_number_as_ground_truth(reward):
    """JSON data may hold numbers instead of texts."""
    assert reward.compute_score("", "Answer: 85", 85) == 1.0
    assert reward.compute_score("", "Answer: 0.5", 0.5) == 1.0


def test_a_reference_in_prose(reward):
    """A worked solution without a mark: its last number. Nothing to compare with: no score."""
    assert reward.compute_score("", "85", "He has 12 and 73, so he has 85.") == 1.0
    assert reward.compute_score("", "12", "He has 12 and 73, so he has 85.") == 0.0
    for empty in ("", "  ", "Answer:"):
        assert reward.compute_score("", "Answer: 5", empty) == 0.0


def test_ranks(reward):
    texts = ["no", "Answer: 85", "Answer: 3", "so 85", "Answer: 86"]
    assert reward.rank_responses(texts, "85", "") == [(1, 1.0), (3, 1.0), (4, 0.5), (2, 0.1),
                                                      (0, 0.0)]
    assert reward.rank_responses([], "85", "") == []


def test_pairs(reward):
    """Each with its difference, the best first; none of equals, or of the margin itself."""
    texts = ["no", "Answer: 85", "Answer: 3"]
    assert reward.get_preference_pairs(texts, "85", "") == [
        ("Answer: 85", "Answer: 3", 0.9), ("Answer: 85", "no", 1.0)]
    assert reward.get_preference_pairs(texts, "85", "", margin=0.05)[2] == ("Answer: 3", "no", 0.1)
    assert reward.get_preference_pairs(texts, "85", "", margin=1.0) == []
    assert reward.get_preference_pairs(["Answer: 1"] * 4, "85", "") == []
    assert reward.get_preference_pairs(["Answer: 85"], "85", "") == []


# ========================================= Whole kinds ==========================================

RIGHT_ANSWERS = {  # what is written in another way: (answer, truth)
    "inline LaTeX": [
        ("The answer is $17$.", "17"), (r"So the answer is \[17\].", "17"),
        ("Answer: $$17$$", "17"), (r"Answer: \(\frac{3}{8}\)", "0.375"),
        ("The final answer is $x = 17$.", "17"), (r"Answer: $\dfrac{7}{2}$ hours", "3.5"),
        ("Final Answer: The final answer is $17$. I hope it is correct.", "17"),
        ("Answer:\n$$\n17\n$$", "17"), (r"Answer: \boxed{\mathbf{17}}", "17"),
        (r"\boxed{\textstyle -\frac{3}{4}}", "-0.75")],
    "decoration": [
        ("**Final answer:** 17", "17"), ("Answer: __17__", "17"), ("### Answer: 17", "17"),
        ("> Answer: 17", "17"), ("Answer: \u201c17\u201d", "17"), ("Answer: [17]", "17"),
        ("Answer: ***17***", "17"), ("Answer: 17 \u2705", "17"),
        ("Answer: <strong>17</strong>", "17"), ("Answer: `17`.", "17"), ("**Answer**: 17", "17"),
        ("Answer: 17;", "17"), ("Answer = (17)", "17"),
        ("Answer: 17 (i.e. 20-3)", "17"), (r"Answer: 17 \\", "17")],
    "tags": [
        ("<answer> 17 </answer>", "17"), ("<answer>\n17\n</answer>", "17"),
        ("<ANSWER>17</ANSWER>", "17"), ("Answer: 17</s>", "17"), ("Answer: 17<|eot_id|>", "17"),
        (r"<answer>$\boxed{17}$</answer>", "17"), ("Answer: 17<br>", "17"),
        ("<answer>x = 17 cm</answer>", "17")],
    "reasoning": [
        ("<think>maybe the answer is 3</think>17", "17"),
        (r"<think>\boxed{3}</think> <answer>17</answer>", "17"),
        ("<think>#### 3</think>\nThe answer is 17.<|endoftext|>", "17"),
        (r"answer: 3 </think> so \boxed{17}", "17")],
    "marks": [
        ("#### 17\nThe answer is in line with 3 others.", "17"),
        (r"\boxed{17}. Answer: see above, step 3", "17"),
        ("The answer is 17. This answer is checked against 5 cases.", "17"),
        ("<answer>17</answer> My answer is based on 4 steps.", "17"),
        ("Answer: 17. The answer is plausible since 17 < 20.", "17"),
        (r"\boxed{3} is tempting, but \boxed{17}", "17"), ("#### 3\n#### 17", "17"),
        ("<answer>3</answer> <answer>17</answer>", "17")],
    "phrases": [
        ("The answer should be 17.", "17"), ("The answer equals 17", "17"),
        ("My final answer: 17", "17"), ("Answer \u2013 17", "17"), ("Answer is: 17", "17"),
        ("The answer is seventeen (17).", "17"), ("The answer is therefore about 17.", "17"),
        ("Final answer\n17", "17"), ("The answer is 17, because 3 more than 14 is 17.", "17"),
        ("The answer comes out to $17.", "17"), ("ANSWER:17", "17"), ("\u7b54\u6848\u4e3a17", "17"),
        ("\u6240\u4ee5\u7b54\u6848\u662f\uff1a17\u3002", "17"),
        ("\u7b54\u6848\u662f17\u4e2a\u3002", "17"),
        ("\u6700\u7ec8\u7b54\u6848\uff1a17\u5143", "17")],
    "units": [
        ("Answer: 17 km/h", "17"), ("Answer: 17 sq. ft", "17"), (r"\boxed{17~\text{mph}}", "17"),
        (r"\boxed{17\text{ m}^2}", "17"), ("Answer: 17 ft\xb3", "17"), ("Answer: \u20ac17", "17"),
        ("Answer: EUR 17", "17"), ("Answer: 17\u20ac", "17"), ("Answer: 17 \xb0C", "17"),
        ("Answer: 17\xb0", "17"), ("Answer: 17 kg", "17 kilograms"), ("Answer: 17 hrs", "17 hours"),
        ("Answer: 17cm", "17"), ("Answer: 17 m^{2}", "17"), ("Answer: US$17", "17"),
        ("Answer: Rs. 17", "17"), ("Answer: 17 dollars per hour", "17"),
        ("Answer: $17 per hour", "17"), ("Answer: 5000 m", "5 km"), ("Answer: 9pm", "9 pm"),
        ("Answer: 3 eggs per day", "3 eggs"), (r"\boxed{17\,\mathrm{kg\cdot m}}", "17")],
    "spaces": [
        ("Answer: 1 234 567", "1234567"), (r"\boxed{1\ 234}", "1234"),
        (r"\boxed{1\;234\;567}", "1,234,567"), ("Answer: 1'234", "1234"),
        ("Answer: 1\u2009234\u2009567", "1234567"), (r"\boxed{1{,}234{,}567}", "1234567"),
        (r"\boxed{1,\!234}", "1234"), ("Answer: 98 765.4", "98765.4"),
        ("Answer: 1\xa0234", "1234")],
    "numbers": [
        ("Answer: -.25", "-1/4"), ("Answer: 6.02\xd710\xb2\xb3", "6.02e23"),
        (r"\boxed{3 \cdot 10^{-4}}", "0.0003"), ("Answer: 3*10^4", "30000"),
        ("Answer: 2.5 thousand", "2500"), ("Answer: 3 billion", "3e9"),
        ("Answer: 1.2 Million dollars", "1200000"), ("Answer: $4k", "4000"),
        ("Answer: \xbe", "0.75"), ("Answer: 2\xbd", "2.5"), ("Answer: 7 3/4", "7.75"),
        (r"\boxed{-\dfrac{3}{4}}", "-0.75"), (r"\boxed{\frac{3}{-4}}", "-0.75"),
        (r"\boxed{-2\tfrac{1}{4}}", "-2.25"), (r"\boxed{2^{10}}", "1024"),
        (r"\boxed{\frac{1,000}{4}}", "250"), ("Answer: 1e-3", "0.001"), ("Answer: 8%", "0.08"),
        (r"\boxed{3\times10^8}", "300000000"), ("Answer: 17.", "17.0"), (r"\boxed{\frac34}", "3/4"),
        ("Answer: 3 / 4", "0.75"), ("Answer: -3/4", r"-\frac{3}{4}"),
        ("Answer: 10\u207b\xb2", "0.01"), (r"\boxed{3^4}", "81"), ("Answer: 5\xb2", "25"),
        ("Answer: $4M", "4000000"), ("it is 3 billion", "3e9")],
    "minus": [
        ("Answer: \u221217", "-17"), ("Answer: \u201117", "-17"), ("Answer: \uff0d17", "-17"),
        ("Answer: - 17", "-17"), ("Answer: (-17)", "-17"), ("Answer: x = \u221217", "-17"),
        ("Answer: +17", "17"), ("Answer: -$17", "-17"), ("Answer: $-17", "-17"),
        ("Answer: **-17**", "-17"), ("3 - 20 = -17", "-17"), ("Answer: \u201417", "-17"),
        ("Answer: -\u20ac17", "-17"), (r"\boxed{x = - 17}", "-17"), ("it is -17 km", "-17")],
    "references": [
        ("Answer: 17", "17."), ("Answer: 17", "$17$"), ("Answer: 17", r"\boxed{17}"),
        ("Answer: 17", "17 km"), ("Answer: 17", "x = 17"), ("Answer: 17", "[17]"),
        ("Answer: 17", '"17"'), ("Answer: 17", "17\n"), ("Answer: 17", "The answer is 17"),
        ("Answer: 17", "17 (seventeen)"), ("Answer: 17", "**17**"),
        ("Answer: 17", "\u221217e-1\n#### 17"), ("Answer: 17", "<think>3</think> 17"),
        ("Answer: 1234", "1{,}234")],
    "texts": [
        ("Answer: (B)", "B"), ("The answer is B.", "B"), (r"\boxed{\textbf{(B)}}", "B"),
        ("Answer: **B**", "(B)"), ("<answer>b</answer>", "B"), (r"\boxed{(3, -4)}", "(3,-4)"),
        (r"\boxed{\left(\frac{1}{2}, 3\right)}", "(0.5, 3)"), (r"\boxed{x^2+1}", "x^{2} + 1"),
        ("Answer: 3:4", "3:4"), ("Answer: yes", "Yes"), (r"\boxed{[0, 1)}", "[0,1)")],
}
WRONG_ANSWERS = {  # what only looks like the truth
    "glued letters": [
        ("Answer: 7y", "7"), ("Answer: 3a", "3"), (r"\boxed{4\pi}", "4"), ("Answer: 4\u03c0", "4"),
        ("Answer: 4 pi", "4"), (r"\boxed{3\sqrt{2}}", "3"), (r"\boxed{\sqrt{2}}", "2"),
        (r"\boxed{x^2}", "2"), (r"\boxed{x^{2}}", "2"), (r"\boxed{x_2}", "2"),
        ("Answer: 3+4i", "3"), ("Answer: 5x + 3", "3"), ("Answer: 5 x", "5"),
        (r"\boxed{\frac{\pi}{2}}", "2"), (r"\boxed{\frac{x}{2}}", "2"), ("Answer: 2ab", "2"),
        ("it is 2ab", "2"), (r"it is 2\sqrt{5}", "2"), ("it is \u221a5", "5"), ("it is 4 pi", "4"),
        (r"it is \frac{x}{2}", "2")],
    "factors": [
        ("Answer: 17 thousand", "17"), ("Answer: 17 billion", "17"), ("Answer: 17\u4e07", "17"),
        ("Answer: 9 squared", "9"), ("Answer: 9\xb2", "9"), (r"\boxed{9^{2}}", "9"),
        ("Answer: $17M", "17"), ("Answer: 3 hundred", "3"), ("Answer: 17 million", "17 thousand"),
        ("it is 9 squared", "9"), ("it is 17\u4ebf", "17"), ("Answer: 5 thousandths", "5"),
        ("it is 3 trillion", "3")],
    "units": [
        ("Answer: 9 kg", "9 g"), ("Answer: 9 cm", "9 m"), ("Answer: 9 hours", "9 minutes"),
        ("Answer: 9 am", "9 pm"), ("Answer: 9 km", "9 kg"), ("Answer: 5 miles", "5 km"),
        ("Answer: 5 m^2", "5 m"), ("Answer: $5", "5 cents")],
    "digits": [
        ("Answer: 3 4", "34"), ("Answer: 1 000 0", "10000"), (r"\boxed{(3,4)}", "34"),
        (r"\boxed{3,4}", "34"), (r"\boxed{(3,4)}", "3,4"), (r"\boxed{[3,4)}", "(3,4)"),
        ("Answer: 3\n4", "34"), (r"\boxed{3\;4}", "34"), ("Answer: 1,23", "123"),
        ("Answer: 1.2.3", "1.23"), ("Answer: 17, 18", "18"), (r"\boxed{17, 18}", "17")],
    "fractions": [
        ("Answer: 3/4", "4"), ("Answer: 3/4", "3"), (r"\boxed{\frac{3}{4}}", "4"),
        ("Answer: 3/2", "1/2"), ("Answer: 10:30", "30"), ("Answer: 10:30", "10:45"),
        ("Answer: 1/2/3", "3"), ("Answer: 3 1/2", "1/2"), ("Answer: 5/0", "5")],
    "numbers": [
        ("Answer: .5", "5"), ("Answer: 1e3", "1"), ("Answer: 1e3", "3"), ("Answer: 50%", "0.05"),
        ("Answer: 5%", "0.5"), ("Answer: -5", "5"), ("Answer: \u22125", "5"),
        (r"\boxed{10^{3}}", "3"), (r"\boxed{10^{3}}", "10"), (r"\boxed{2\times 10^3}", "3"),
        (r"\boxed{1{,}234}", "234"), ("Answer: 17 or 18", "18"), ("Answer: 17 or 18", "17"),
        ("Answer: x > 5", "5"),
        ("Answer: > 5", "5"), ("Answer: 3 + 4", "4"), ("Answer: 1/3", "0.333")],
    "marks": [
        ("<think>The answer is 17</think> The answer is 3.", "17"), (r"\boxed{3} Answer: 17", "17"),
        ("<answer>3</answer>\nAnswer: 17", "17"), ("#### 3\nThe answer is 17", "17")],
}


@pytest.mark.parametrize("kind", RIGHT_ANSWERS)
def test_right_answers_in_any_dress(reward, kind):
    wrong = [pair for pair in RIGHT_ANSWERS[kind] if reward.compute_score("", *pair) != 1.0]
    assert not wrong


@pytest.mark.parametrize("kind", WRONG_ANSWERS)
def test_wrong_answers_that_look_right(reward, kind):
    right = [pair for pair in WRONG_ANSWERS[kind] if reward.compute_score("", *pair) == 1.0]
    assert not right


@pytest.mark.parametrize("text, answer", [
    ("Answer: 7 cm", ("7 cm", True)), (r"\boxed{7} Answer: 8", ("7", True)),
    ("it is 7 cm.", ("7 cm", False)), ("none", (None, False)), ("<answer></answer> 7", ("", True)),
    ("<answer>7</answer> #### 8", ("7", True)), ("#### 7\nAnswer: 8", ("7", True)),
    ("Answer: 7. The answer is clear.", ("7", True)), ("The answer is clear. 7", ("clear", True)),
    ("Answer: C. My answer is final", ("C", True)), ("<think>Answer: 8</think>7", ("7", False)),
    ("<think>7</think>", ("7", False)),
])
def test_where_the_answer_is(reward, text, answer):
    assert reward.final_answer(text) == answer


@pytest.mark.parametrize("answer, truth, same", [
    ("5 km", "5000 m", True), ("5 km", "5 m", False), ("5", "5 m", True), ("9 am", "9 pm", False),
    ("90 min", "1.5 hours", True), ("3 feet", "1 yd", True), ("2 m^2", "20000 cm^2", True),
    ("500 cents", "$5", True), ("5 lbs", "5 kg", False), ("5 m^2", "5 m", False),
    ("5 apples", "5 pears", True),  # what it does not know are words
])
def test_units(reward, answer, truth, same):
    assert reward.is_same(answer, truth) == reward.is_same(truth, answer) == same


@pytest.mark.parametrize("answer, truth", [("(1/2, 3)", "(0.5,3)"), ("[1e3, -2]", "[1000,-2.0]")])
def test_lists_are_compared_one_by_one(reward, answer, truth):
    assert reward.is_same(answer, truth)
    for other in (answer[1:-1], answer[:-1] + ", 4" + answer[-1], "(" + answer,
                  answer.replace("2", "7")):
        assert not reward.is_same(other, truth)


# ======================================== Hostile texts =========================================


BOMBS = {
    "digits": "9" * 100_000, "a named number": "Answer: " + "9" * 100_000,
    "braces": r"\boxed{" + "{" * 100_000, "closing braces": r"\boxed{1" + "}" * 100_000,
    "boxes": r"\boxed{" * 20_000, "fractions": r"\frac{" * 20_000, "commas": "1," * 50_000 + "2",
    "thousands": "1" + ",000" * 30_000, "marks": "answer " * 20_000,
    "answers": "answer is " * 9_999, "spaces": "answer" + " " * 100_000,
    "minuses": "-" * 100_000, "points": "1." * 50_000,
    "slashes": "1/" * 50_000, "texts": r"\text{" * 20_000, "exponents": "1e" * 50_000,
    "a tower": "Answer: 9^{9^{9^{9}}}", "a python tower": "Answer: 9**9**9**9",
    "a huge exponent": "Answer: 1e999999999", "mixed": "1 1/" * 30_000, "letters": "a" * 100_000,
    "words": "ab " * 40_000, "parentheses": "Answer: " + "(" * 50_000 + "5" + ")" * 50_000,
    "powers": "x 10^" * 20_000, "dots": "." * 100_000, "lines": "\n" * 100_000,
    "blanks": " " * 100_000, "subtractions": "5-" * 50_000, "code": "Answer: __import__('os').x",
    "a factorial": "Answer: 99999!", "nul": "Answer: \0", "a surrogate": "Answer: \ud800",
    "other digits": "Answer: \N{ARABIC-INDIC DIGIT FIVE}",
    "backslashes": "\\" * 100_000, "dollars": "$" * 100_000, "tags": "<answer>" * 12_000,
    "thoughts": "</think>" * 12_000, "accents": "\u0301\u0327" * 50_000,
    "named accents": "Answer: 5" + "\u0301\u0327" * 50_000, "grouped": "1 000" * 20_000,
    "powers of ten": "10^" * 30_000, "zeros": "1/" + "0," * 50_000, "wholes": "1 2/" * 25_000,
    "quotes": "'" * 100_000, "stars": "Answer: " + "*" * 100_000, "so": "Answer: " + "so " * 30_000,
    "a long fraction": "Answer: " + "7" * 99 + "/3", "long numbers": ("9" * 99 + " ") * 1000,
    "huge numbers": "1e999 million " * 7000, "signs": r"-\$" * 30_000, "tops": r"\frac1" * 15_000,
    "nested fractions": r"\frac{" * 7000 + "1" + "}{2}" * 7000, "a gap": "1" + " " * 100_000 + "/2",
    "large powers": "999999999^99 " * 7000, "glued": "5x" * 50_000, "factors": "2 pi " * 20_000}


@pytest.mark.parametrize("name", BOMBS)
def test_hostile_text_costs_little_time(reward, name):
    """As an answer, as a reference, and as both; each in a fraction of a second."""
    for pair in ((BOMBS[name], "85"), ("Answer: 85", BOMBS[name]), (BOMBS[name], BOMBS[name])):
        start = time.process_time()  # its own: another program's does not count
        assert reward.compute_score("", *pair) in (0.0, 0.1, 0.5, 1.0)
        assert time.process_time() - start < 0.5
    start = time.process_time()
    number = reward.last_number(BOMBS[name])
    assert time.process_time() - start < 0.2
    assert number is None or len(str(number)) < 2000


def test_nothing_is_evaluated():
    source = (FOLDER / "reward_func.py").read_text(encoding="utf-8")
    called = {node.func.id for node in ast.walk(ast.parse(source))
              if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not called & {"eval", "exec", "compile", "__import__", "globals", "getattr"}
    top = {alias.name for node in ast.parse(source).body
           if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
    assert top - {"Fraction", "cache"} <= set(sys.stdlib_module_names)  # nothing to install


# ========================================= math-verify ==========================================


def stand_in(seen):
    """A math-verify that finds everything equal to everything, and notes what it was given."""
    return lambda: SimpleNamespace(
        parse=lambda text, parsing_timeout: seen.append(text) or [text],
        verify=lambda wanted, given, timeout_seconds: True)


def test_formulas_go_to_math_verify_if_it_is_there(reward):
    seen = []
    assert reward.compute_score("", r"\boxed{1+x}", "x+1") == 0.1
    reward.math_verify = stand_in(seen)
    assert reward.compute_score("", r"\boxed{1+x}", "x+1") == 1.0
    assert seen == ["$x+1$", "$1+x$"]
    seen.clear()
    for answer, truth in (("7", "85"), ("2ab", "2"), ("(1, 2)", "1, 2"), ("5 m", "5 km")):
        assert reward.compute_score("", f"Answer: {answer}", truth) == 0.1, answer
    assert seen == []  # numbers do not, nor what it takes for numbers


def test_math_verify_is_asked_where_its_clock_runs(reward, monkeypatch):
    """It stops itself by an alarm, which needs a main thread and is not on Windows; without one a
    product of two 99th powers takes minutes."""
    seen, scores = [], []
    reward.math_verify = stand_in(seen)
    thread = threading.Thread(
        target=lambda: scores.append(reward.compute_score("", r"\boxed{1+x}", "x+1")))
    thread.start()
    thread.join()
    monkeypatch.delattr(reward.signal, "setitimer", raising=False)
    assert [*scores, reward.compute_score("", r"\boxed{1+x}", "x+1")] == [0.1, 0.1] and seen == []


@pytest.mark.parametrize("answer", ["9^{9^{9}}", "9^{999}", "9^99^99", "x^2x^2x^2", "9**9", "99!",
                                    r"\sum_{k}k", "1234567x", "x" * 201, r"\binom{9}{4}",
                                    "2^{-100}", "x^{10}"])
def test_what_may_explode_is_not_given_to_math_verify(reward, answer):
    seen = []
    reward.math_verify = stand_in(seen)
    assert reward.compute_score("", rf"\boxed{{{answer}}}", "x+1") == 0.1
    assert reward.compute_score("", r"\boxed{x+1}", answer) < 1.0
    assert seen == []


def test_what_math_verify_cannot_read_is_not_equal(reward):
    def parse(text, parsing_timeout):
        raise RuntimeError(text)

    reward.math_verify = lambda: SimpleNamespace(parse=parse)
    assert reward.compute_score("", r"\boxed{1+x}", "x+1") == 0.1


def test_the_real_math_verify():
    pytest.importorskip("math_verify")
    module = import_file(FOLDER / "reward_func.py", "reward_func_with_math_verify")
    assert module.compute_score("", r"\boxed{1+x}", "x+1") == 1.0
    assert module.compute_score("", r"\boxed{\frac{\sqrt{8}}{2}}", r"\sqrt{2}") == 1.0
    assert module.compute_score("", r"\boxed{\{2, 1\}}", r"\{1,2\}") == 1.0
    assert module.compute_score("", r"\boxed{x+2}", "x+1") == 0.1
    for kind, pairs in WRONG_ANSWERS.items():  # what it takes for right is not asked of it
        assert not [pair for pair in pairs if module.compute_score("", *pair) == 1.0], kind


# =========================================== train.sh ===========================================


@pytest.fixture
def shell(tmp_path):
    """shell(*arguments): train.sh in a project without .venv, with a python3 that only says what it
    is asked to run, from a folder of its own with a space in its name."""
    if sys.platform == "win32":
        pytest.skip("needs bash")
    project, here = tmp_path / "a project" / "RL_HAND" / "self_play", tmp_path / "somewhere else"
    project.mkdir(parents=True)
    here.mkdir()
    (project / "train.sh").write_bytes((FOLDER / "train.sh").read_bytes())
    (here / "my reward.py").touch()

    def python(folder, name):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('#!/bin/sh\necho "GPU=${CUDA_VISIBLE_DEVICES-unset}"\n'
                                   f'echo {name}\nfor a in "$@"; do echo "$a"; done\nexit 3\n')
        (folder / name).chmod(0o755)

    python(tmp_path / "bin", "python3")

    def run(*arguments, venv=False):
        if venv:
            python(tmp_path / "a project" / ".venv" / "bin", "python")
        path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(["bash", str(project / "train.sh"), *arguments], cwd=here, text=True,
                              capture_output=True, timeout=60, env=os.environ | {"PATH": path})
        lines = [line.replace(str(project), "HERE") for line in done.stdout.splitlines()]
        return SimpleNamespace(status=done.returncode, lines=lines, error=done.stderr)

    return run


def test_the_flags_become_constants(shell, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    done = shell("--model", "a b", "--rollout_n", "10", "--self_play_rounds=5", "--reward_func",
                 "my reward.py", "--n_gpus", "8", "SEED=1", "REWARD_WEIGHTS={'function': 2.0}")
    assert done.lines == [
        "GPU=unset", "python3", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
        "8", "HERE/self_play.py", "POLICY_MODEL=a b", "ROLLOUT_N=10", "MINIBATCH=160",
        "MICRO_BATCH=10", "SELF_PLAY_ROUNDS=5", "REWARD_FUNC=my reward.py", "SEED=1",
        "REWARD_WEIGHTS={'function': 2.0}"]
    assert (done.status, done.error) == (3, "")  # python's


@pytest.mark.parametrize("gpus, seen", [(None, "GPU=unset"), ("1", "GPU=unset"), ("0", "GPU=")])
def test_one_process(shell, monkeypatch, gpus, seen):
    """--n_gpus 0 hides a GPU that is there."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    done = shell(*(["--n_gpus", gpus] if gpus else []))
    assert done.lines == [seen, "python3", "HERE/self_play.py"]


def test_the_projects_python_first(shell):
    assert shell("SEED=1", venv=True).lines[1:] == ["python", "HERE/self_play.py", "SEED=1"]


def test_the_defaults_of_the_flags_can_be_run(shell):
    """What --rollout_n sets is accepted by the script, in both profiles; what is given wins."""
    script = import_file(FOLDER / "self_play.py", "self_play_for_the_shell")
    here = ["DEVICE=cpu", "FROZEN_DEVICE=cpu"]
    for n in ("2", "7", "010", "12"):
        for profile in ("full", "embedded"):
            script.configure(shell("--rollout_n", n, f"PROFILE={profile}", *here).lines[3:])
            assert script.ROLLOUT_N == script.MICRO_BATCH == script.MINIBATCH // 16 == int(n)
    script.configure(shell("--rollout_n", "10", *here, "MICRO_BATCH=40").lines[3:])
    assert script.MICRO_BATCH == 40


@pytest.mark.parametrize("arguments, says", [
    (["--rollout_m", "3"], ["--rollout_m", "--rollout_n"]), (["-x"], ["-x"]),
    (["SEED"], ["SEED", "NAME=VALUE"]), (["--model"], ["--model", "no value"]),
    (["--model", "--n_gpus", "1"], ["--model", "'--n_gpus'"]), (["--model="], ["--model", "''"]),
    (["--n_gpus", "two"], ["--n_gpus two", "0 or more"]), (["--n_gpus", "-1"], ["--n_gpus"]),
    (["--rollout_n", "1"], ["--rollout_n 1", "2 or more"]),
    (["--rollout_n", "8; echo"], ["--rollout_n", "whole number"]),
    (["--self_play_rounds", "0"], ["--self_play_rounds 0", "1 or more"]),
    (["--self_play_rounds", "99999999999999999999"], ["whole number"]),
    (["--reward_func", "nowhere.py"], ["--reward_func nowhere.py", "no such file"]),
    (["$(touch x)"], ["no such option"]), (["", "SEED=1"], ["expected"])])
def test_bad_flags_are_one_line(shell, arguments, says):
    done = shell(*arguments)
    assert done.status == 1 and done.lines == []
    assert done.error.startswith("error: ") and done.error.count("\n") == 1
    for words in says:
        assert words in done.error


def test_help_names_every_flag(shell):
    for flag in ("-h", "--help"):
        done = shell(flag)
        assert (done.status, done.error) == (0, "")
        for name in ("--model", "--rollout_n", "--self_play_rounds", "--reward_func", "--n_gpus",
                     "NAME=VALUE"):
            assert any(name in line for line in done.lines)


def test_train_sh_can_be_executed():
    assert os.stat(FOLDER / "train.sh").st_mode & stat.S_IXUSR or sys.platform == "win32"
