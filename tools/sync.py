"""Keep what the scripts share the same, byte for byte. RL_HAND/gspo/gspo.py is the original.

    python tools/sync.py           # copy the shared parts to the other scripts
    python tools/sync.py --check   # say what differs and exit with status 1

Shared are: everything below the line "The algorithm ends here"; the constants outside the
Algorithm group; every top-level function or class above the line whose name stands in several
scripts, unless it is listed in OWN with the reason why scripts differ in it. A script whose source
has names of its own for shared constants keeps them (RENAMED), and the values that go with another
shape of training (OWN_VALUES).
"""

import ast
import difflib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ORIGINAL = ROOT / "RL_HAND" / "gspo" / "gspo.py"
LINE = "# ==== The algorithm ends here."
OWN = {  # name -> why it differs between scripts
    "train": "it is the algorithm",
    "prepare": "an algorithm's own networks and numbers",
    "policy_loss": "the ratio, and over what it is taken, is what tells the algorithms apart",
    "token_weights": "the aggregation is part of the algorithm",
    "compute_advantages": "baseline, paper and worked example differ; PPO's is GAE",
    "check_algorithm": "the Algorithm constants differ",
    "describe_algorithm": "the Algorithm constants differ",
    "algorithm_metrics": "what there is to be measured differs",
    "algorithm_panels": "what there is to be drawn differs",
}
OWN_EMBEDDED = {"GSPO_EPOCHS", "GRPO_EPOCHS", "DAPO_EPOCHS", "PPO_EPOCHS", "TARGET_KL",
                "OVERLONG_CACHE", "CRITIC_LEARNING_RATE", "CRITIC_WARMUP",
                "ROLLOUT_TEMPERATURE", "SELF_PLAY_ROUNDS", "TOTAL_EPOCHS",
                "SAMPLE_AT_ONCE", "GAD_EPOCHS", "SEQKD_STEPS", "SEQKD_BATCH",
                "SEQKD_LEARNING_RATE", "WARMUP_BATCH",
                "DISCRIMINATOR_LEARNING_RATE"}  # of the Algorithm group, or in OWN_VALUES
RENAMED = next(  # script -> shared name -> its name
    ast.literal_eval(node.value)
    for node in ast.parse((ROOT / "RL_HAND" / "compare.py").read_text(encoding="utf-8")).body
    if isinstance(node, ast.Assign) and node.targets[0].id == "RENAMED")
OWN_VALUES = {"self_play": {  # a few large rounds that its reward function scores
    "TRAIN_BATCH_SIZE", "ROLLOUT_N", "ROLLOUT_TEMPERATURE", "SELF_PLAY_ROUNDS", "NUM_EPOCHS",
    "REWARD_FUNC", "REWARD_WEIGHTS", "MINIBATCH", "MICRO_BATCH", "EVAL_EVERY"}}


def scripts():
    """The scripts that share with the original."""
    return [path for path in sorted((ROOT / "RL_HAND").glob("*/*.py"))
            if path.stem == path.parent.name and path != ORIGINAL]


def renamed(source, name):
    """The original's text with the names that the script `name` has for shared constants."""
    for ours, theirs in RENAMED.get(name, {}).items():
        source = re.sub(rf"\b{ours}\b", theirs, source)
    return source


def localised(original, name, source):
    """The original as the script `name` shares it: with its names, and its lines of OWN_VALUES."""
    original = renamed(original, name)
    for constant in OWN_VALUES.get(name, ()):
        for start in (f"{constant} = ", f'    "{constant}": '):
            line = re.compile(rf"^{re.escape(start)}.*\n", re.M)
            own = line.search(source)
            original = line.sub(lambda _: own[0] if own else "", original, count=1)
    return original


def functions(source):
    """Top-level functions and classes above the line: name -> source text, decorators included."""
    above = source[:source.index(LINE)]
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            text = "\n".join(source.splitlines()[first - 1:node.end_lineno])
            if text in above:
                found[node.name] = text
    return found


def shared_blocks(source):
    """The parts that must be equal as they are: [(what, text)]. Each occurs once in its script."""
    def between(start, end):
        return source[source.index(start):source.index(end, source.index(start))]

    return [("imports, first constants", between("\nimport ast\n", "\n# --- Algorithm")),
            ("constants after Algorithm", between("\n# --- Evaluation", "\nEMBEDDED = {")),
            ("EMBEDDED", "\n".join(line for line in between("\nEMBEDDED = {", "\n}\n").splitlines()
                                   if not any(f'"{name}"' in line for name in OWN_EMBEDDED))),
            ("the part below the line", source[source.index(LINE):])]


def synchronised(source, original):
    """The script's text with the shared parts of the original."""
    for (what, ours), (_, theirs) in zip(shared_blocks(source), shared_blocks(original)):
        if what == "EMBEDDED":
            block = re.search(r"\nEMBEDDED = \{(.*?)\n\}\n", source, re.S)[1].splitlines()
            own = [line for line in block if any(f'"{name}"' in line for name in OWN_EMBEDDED)]
            lines = theirs.strip("\n").splitlines()
            at = next(i for i, line in enumerate(lines) if "EVAL_EVERY" in line)
            block = "\n" + "\n".join(lines[:at] + own + lines[at:])
            source = re.sub(r"\nEMBEDDED = \{.*?(?=\n\}\n)", lambda _: block, source, flags=re.S)
        else:
            source = source.replace(ours, theirs)
    mine, reference = functions(source), functions(original)
    for name in mine.keys() & reference.keys() - OWN.keys():
        source = source.replace(mine[name], reference[name])
    return source


def main(arguments):
    """Repair, or with --check only report."""
    original, stale = ORIGINAL.read_text(encoding="utf-8"), 0
    for path in scripts():
        source = path.read_text(encoding="utf-8")
        wanted = synchronised(source, localised(original, path.stem, source))
        if wanted == source:
            continue
        stale += 1
        if "--check" in arguments:
            where = str(path.relative_to(ROOT))
            print("\n".join(difflib.unified_diff(source.splitlines(), wanted.splitlines(), where,
                                                 "as in gspo.py", lineterm="", n=1)))
            print(f"\n{where} differs from gspo.py in what they share; repair it with: "
                  "python tools/sync.py")
        else:
            path.write_text(wanted, encoding="utf-8")
            print(f"rewrote {path.relative_to(ROOT)}")
    return bool(stale) and "--check" in arguments


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
