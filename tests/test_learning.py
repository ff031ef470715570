"""The embedded default learns: the whole of it, on held-out questions, and not by itself.

Measured on the shipped data: gain of 15 steps on 256 held-out questions, rewarded as by default
and with rewards of the same kind, shuffled, for the seeds 0 to 6:

    sampled   +0.36 +0.41 +0.41 +0.37 +0.44 +0.39 +0.36
    shuffled  -0.04 -0.02 -0.02 -0.01 -0.02 +0.02 -0.02
    greedy    +0.45 +0.45 +0.43 +0.43 +0.46 +0.44 +0.45
    shuffled  -0.01 +0.01 +0.06 +0.07 +0.04 +0.09 +0.06

Each bar stands between the two; other random numbers for the same seeds once took the shuffled ones
to +0.07 sampled and +0.18 greedy (the most of twelve). That of the greedy accuracy is higher,
because it moves more by itself: a small drift of the policy turns many answers at once.
"""

import pandas as pd
import pytest
from conftest import ROOT, SCRIPT, import_file

SAMPLED, GREEDY = 0.20, 0.30  # the bars
SHORT = ["PROFILE=embedded", "DEVICE=cpu", "MAX_STEPS=15", "EVAL_EVERY=0", "EVAL_QUESTIONS=256",
         "SHOW_SAMPLES=1"]

SHUFFLED = """
import random

dice = random.Random(0)

def score(questions, responses, references):
    scores = [float(response.split()[-1:] == reference.split()[-1:])
              for response, reference in zip(responses, references)]
    dice.shuffle(scores)
    return scores
"""


def gains(folder, *arguments, script=SCRIPT):
    """What a short run adds to (sampled accuracy, greedy accuracy, reward), and its metrics."""
    module = import_file(script)
    module.plot_metrics = lambda run: None
    module.main([*SHORT, *arguments, f"OUTPUT_DIR={folder}"])
    table = pd.read_csv(folder / "metrics.csv").set_index("step")
    names = ["eval/accuracy", "eval/accuracy_greedy", "eval/reward"]
    return *(table.loc[15, names] - table.loc[0, names]), table


def late_minus_early(table):
    """Accuracy on the training questions in steps 11 to 15, less that in steps 1 to 4."""
    return table.accuracy.loc[11:].mean() - table.accuracy.loc[1:4].mean()


@pytest.fixture(autouse=True)
def one_thread(gspo):
    """The fixture gspo sets it."""


@pytest.mark.parametrize("script", ["gspo", "reinforce", "gmpo", "cispo"])  # losses or loops apart
def test_the_default_learns(tmp_path, script):
    path = ROOT / "RL_HAND" / script / f"{script}.py"
    sampled, greedy, reward, table = gains(tmp_path / "run", script=path)
    assert sampled >= SAMPLED and greedy >= GREEDY, f"sampled {sampled:+.3f}, greedy {greedy:+.3f}"
    assert reward >= SAMPLED
    # The answers to the training questions say the same: gspo.py +0.19 or more, shuffled at most
    # +0.05.
    assert late_minus_early(table) > 0.12
    assert table.entropy[11:].mean() > 0.02, "it collapsed"


def test_shuffled_rewards_teach_nothing(tmp_path):
    """As many rewards as before, for anyone: what is learnt above comes from the right answers."""
    (tmp_path / "shuffled.py").write_text(SHUFFLED)
    sampled, greedy, _, table = gains(
        tmp_path / "run", f"REWARD_FUNCTION={tmp_path / 'shuffled.py'}:score",
        "REWARD_WEIGHTS={'function': 1.5}")
    assert sampled < SAMPLED and greedy < GREEDY, f"sampled {sampled:+.3f}, greedy {greedy:+.3f}"
    assert late_minus_early(table) < 0.12
    # It did try: there were rewards, advantages, and updates.
    assert table["rewards/function"][1:].mean() > 0.1
    assert table["advantage/size"][1:].min() > 0.1 and table["grad_norm"][1:].min() > 0
