"""Eight faults that are common in public code, each put into a copy of gspo.py and trained with.

    python benchmarks/bugs.py                # 33 runs, two at a time: notebooks/source/bugs.csv
    python benchmarks/bugs.py kl end_token   # only these: their rows are replaced

They are of the kind of tests/test_mutations.py, where each makes a test fail. Held-out accuracy is
measured by the script as it is. The notebook 5_spot_the_bug draws the table and asks for the line.
"""

import contextlib
import io
import multiprocessing
import sys
import tempfile
from pathlib import Path

import pandas as pd
from common import ROOT, facts, import_file
from matplotlib import pyplot

sys.path.append(str(ROOT / "tests"))
from conftest import SCRIPT, mutated_copy

TABLE = ROOT / "notebooks" / "source" / "bugs.csv"
SEEDS = (0, 1, 2)
SETTINGS = ["PROFILE=embedded", "MAX_STEPS=25", "EVAL_EVERY=5", "EVAL_QUESTIONS=256"]
EQUAL = ["REWARD_WEIGHTS={'verifier': 0.9}", "ADVANTAGE_TYPE=normalized", "ADVANTAGE_EPSILON=1e-8"]
FAULTS = {  # name: (text of the script, what takes its place, constants besides SETTINGS)
    "right": ("SEED = 0", "SEED = 0", []),
    "sum": (".sum(1, keepdim=True) / length  ", ".sum(1, keepdim=True)           ", []),
    "one_update": ("in minibatches(batch, GSPO_EPOCHS):                 #",
                   "in [batch]:                                         #", []),
    "top_k": (
        "total = all_logps.exp().cumsum(-1, dtype=WIDE)                         # (n, V)",
        "least = all_logps.topk(20)[0][:, -1:]\n                "
        "kept = (all_logps / 0.6).exp().where(all_logps >= least, 0)\n                "
        "total = kept.cumsum(-1, dtype=WIDE)                                    # (n, V)", []),
    "right_kl": ("SEED = 0", "SEED = 0", ["ADAPTIVE_KL=False"]),
    "kl": ("token_loss + kl_coef * kl", "token_loss - kl_coef * kl", ["ADAPTIVE_KL=False"]),
    "end_token": ("= token, 1.0", "= token, (~torch.isin(token, ends)).float()", []),
    "micro_batch": ("(token_loss * micro.weights).sum().backward()",
                    "(token_loss * token_weights(micro.completion_mask)).sum().backward()", []),
    "right_equal": ("SEED = 0", "SEED = 0", EQUAL),
    "equal": ("advantages.masked_fill(without_spread(groups), 0.0)", "advantages", EQUAL),
    "bfloat16": ("(logits_of(states, weight) / TEMPERATURE, -1)",
                 "((logits_of(states, weight) / TEMPERATURE).bfloat16(), -1).float()", []),
}
KEPT = ("^(step$|eval/acc|accuracy|ratio|clip_ratio/region|kl$|kl_coef|entropy$|grad_norm|"
        "completions)")
COPIES = tempfile.TemporaryDirectory()


def script_with(fault):
    """gspo.py as a module with a fault in it, of a copy that lives as long as this process."""
    folder = Path(COPIES.name) / fault
    folder.mkdir(exist_ok=True)
    script = import_file(mutated_copy(SCRIPT, *FAULTS[fault][:2], folder), f"gspo_{fault}")
    script.configure([*SETTINGS, *FAULTS[fault][2]])
    return script


def pair(number):
    """A fault by its number in the notebook, and what it is compared with: names of FAULTS."""
    fault = [name for name in FAULTS if "right" not in name][number - 1]
    right = f"right_{fault}" if f"right_{fault}" in FAULTS else "right"
    return {"as it should be": right, "with the fault": fault}


def show(number, *names, before=6, count=12):
    """Draw metrics by step, with a fault and without, and print lines, the fault among them."""
    compare, table = import_file(ROOT / "RL_HAND" / "compare.py"), pd.read_csv(TABLE)
    labels = table.fault.map({fault: label for label, fault in pair(number).items()})
    table = table.assign(algorithm=labels, folder=table.seed).dropna(subset="algorithm")
    figure = pyplot.figure(figsize=(3.6 * len(names), 2.5), layout="constrained", dpi=80)
    for axes, name in zip(figure.subplots(1, len(names)), names):
        compare.curves(axes, table, "step", name)
        axes.set(title=name, xlabel="step")
    axes.legend(frameon=False)
    pyplot.show()
    text, instead, _ = FAULTS[pair(number)["with the fault"]]
    source = SCRIPT.read_text(encoding="utf-8")
    first = source[:source.index(text)].count("\n") - before
    for line in source.replace(text, instead).split("\n")[first:first + count]:
        print(f"{(first := first + 1):5}  {line}")


def metrics(fault, *arguments):
    """The metrics of a run with a fault, which is evaluated by the script as it is."""
    script, right = script_with(fault), import_file(SCRIPT, "right")
    right.configure(arguments := [*SETTINGS, *FAULTS[fault][2], *arguments])
    script.evaluate = right.evaluate
    script.check_policy = lambda run: None  # it would stop the run in bfloat16
    with tempfile.TemporaryDirectory() as folder, io.StringIO() as nowhere, \
            contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        script.main([*arguments, f"OUTPUT_DIR={folder}/run"])
        return pd.read_csv(Path(folder) / "run" / "metrics.csv")


def train(job):
    """The rows of the table for a fault's name and a seed."""
    fault, seed = job
    return metrics(fault, f"SEED={seed}").filter(regex=KEPT).round(5).assign(
        fault=fault, seed=seed, constants=" ".join(FAULTS[fault][2]))


def main(names):
    """Make the runs that are asked for, and put them into the table."""
    jobs = [(fault, seed) for seed in SEEDS for fault in names or FAULTS]
    table = pd.read_csv(TABLE) if TABLE.exists() else pd.DataFrame(columns=["fault", "seed"])
    commit = facts("cpu")["commit"]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for (fault, seed), new in zip(jobs, pool.imap(train, jobs)):
            table = table[(table.fault != fault) | (table.seed != seed)]
            table = pd.concat([table, new.assign(commit=commit)])
            table.to_csv(TABLE, index=False)
            print(fault, seed, *new["eval/accuracy"].dropna(), flush=True)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # what a terminal cannot show stops nothing
    main(sys.argv[1:])
