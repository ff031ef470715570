"""Keep what the scripts share the same, byte for byte. RL_HAND/gspo/gspo.py is the original.

    python tools/sync.py           # copy the shared parts to the other scripts
    python tools/sync.py --check   # say what differs and exit with status 1

Shared are: requirements, imports, the constants outside the Algorithm group; every top-level
function or class of the lesson whose name stands in several scripts, unless OWN names it with the
reason; and everything below the line SAME. A script whose source has names of its own for shared
constants keeps them (RENAMED, in compare.py), and the values in OWN_VALUES. One that needs a few
shared lines to be others has them in EDITS. A reward function, a file of its own, has the GRAMMAR
of numbers.
"""

import ast
import difflib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ORIGINAL = ROOT / "RL_HAND" / "gspo" / "gspo.py"
LINE = "# ==================== The algorithm ends here"
SAME = "# ==================== From here on the scripts are the same"
SHARED = [("requirements", "# /// script", '\n"""'),
          ("imports, first constants", "\nimport ast\n", "\n# --- Algorithm"),
          ("constants after Algorithm", "\n# --- Evaluation", "\n# ====="),
          ("the part below the line", SAME, "")]  # what, where it begins, where it ends
OWN = {  # name -> why it differs between scripts
    "train": "it is the algorithm",
    "prepare": "an algorithm's own networks and numbers",
    "policy_loss": "the ratio, and over what it is taken, is what tells the algorithms apart",
    "token_weights": "the aggregation is part of the algorithm",
    "compute_advantages": "baseline, paper and worked example differ; PPO's is GAE",
}
GRAMMAR = ("NUMBER", "last_number")
RENAMED = next(  # script -> shared name -> its name
    ast.literal_eval(node.value)
    for node in ast.parse((ROOT / "RL_HAND" / "compare.py").read_text(encoding="utf-8")).body
    if isinstance(node, ast.Assign) and node.targets[0].id == "RENAMED")
OWN_VALUES = {
    "gad": {"train_datasets"},  # with the teacher's texts
    "reinforce": {"LEARNING_RATE", "MINIBATCH"},  # one update per rollout
    "moe": {"POLICY_MODEL", "LORA_RANK"},  # with experts; whole, it would fit on no single GPU
    "self_play": {  # a few large rounds that its reward function scores
        "TRAIN_BATCH_SIZE", "ROLLOUT_N", "ROLLOUT_TEMPERATURE", "SELF_PLAY_ROUNDS", "NUM_EPOCHS",
        "REWARD_FUNC", "REWARD_WEIGHTS", "MINIBATCH", "MICRO_BATCH", "EVAL_EVERY"}}

EDITS = {  # script -> (why, shared lines of the original, what it has in their place)
    "moe": [
        ("a batch has its tape", """
    ended                            (B,) bool, False where MAX_NEW_TOKENS truncated it
""", """
    ended                            (B,) bool, False where MAX_NEW_TOKENS truncated it
    routes                           (B, S, layers, K), the experts of its tokens: see `Tape`
"""),
        ("a rollout begins with a blank one, a row for each prompt", """
    with autocast():  # one block, in which the other weights are cast once
""", """
    tape = Tape(blank(model, len(rows), prompt_ids.shape[1] + length))
    with autocast():  # one block, in which the other weights are cast once
"""),
        ("prompts are recorded, for all their answers", """
        states = run_model(model, prompt_ids, prompt_mask, place, cache)[:, -1]        # (P, H)
        cache.batch_repeat_interleave(group_size)
""", """
        states = run_model(model, prompt_ids, prompt_mask, place, cache,
                           tape.at(index[::group_size, None], place, prompt_mask > 0))[:, -1]
        cache.batch_repeat_interleave(group_size)
        tape.own = tape.own[index]
"""),
        ("so are the tokens of the rows that are left", """
                states = run_model(model, token[:, None], seen, place, cache)[:, -1]   # (n, H)
""", """
                states = run_model(model, token[:, None], seen, place, cache,
                                   tape.at(row[:, None], place, place >= 0))[:, -1]    # (n, H)
"""),
        ("the batch takes it along", """
                 sampled_logps=logps[:, :t + 1])
""", """
                 sampled_logps=logps[:, :t + 1], routes=tape.own)
"""),
        ("a pass has a tape or none", """
def run_model(model, ids, mask, place, cache=None):
""", """
def run_model(model, ids, mask, place, cache=None, tape=None):
"""),
        ("the model hands it to its layers", """
    return model.base_model(input_ids=ids, attention_mask=mask, position_ids=place,
""", """
    return model.base_model(input_ids=ids, attention_mask=mask, position_ids=place, tape=tape,
"""),
        ("the trainer's passes have that of their batch", """
        states = run_model(model, ids, visible.tril()[:, None], place)                 # (p, S, H)
""", """
        states = run_model(model, ids, visible.tril()[:, None], place,
                           tape=tape_of(batch, place, part))                           # (p, S, H)
"""),
        ("it has GSPO's default and GRPO's", """
    \"\"\"CLIP_RANGE as (low, high).\"\"\"
""", """
    \"\"\"CLIP_RANGE as (low, high); without one GSPO's (sec. 5.1), or GRPO's usual one.\"\"\"
    if not CLIP_RANGE:
        return (3e-4, 4e-4) if RATIO == "sequence" else (0.2, 0.2)
"""),
    ],
}


def scripts():
    """The scripts that share with the original."""
    return [path for path in sorted((ROOT / "RL_HAND").glob("*/*.py"))
            if path.stem == path.parent.name and path != ORIGINAL]


def definitions(source):
    """Top-level functions, classes and constants: name -> source lines, comments included."""
    lines, found = source.splitlines(keepends=True), {}
    for node in ast.parse(source).body:
        name = getattr(node, "name", None)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        found[name] = "".join(lines[first - 1:node.end_lineno])
    return found


def renamed(source, name):
    """The original's text with the names that the script `name` has for shared constants."""
    for ours, theirs in RENAMED.get(name, {}).items():
        source = re.sub(rf"\b{ours}\b", theirs, source)
    return source


def edited(source, name):
    """The original's text with what the script `name` has in the place of some of its lines."""
    for _, ours, theirs in EDITS.get(name, ()):
        source = source.replace(ours, theirs)
    return source


def localised(original, name, source):
    """The original as the script `name` shares it: with its names, EDITS and OWN_VALUES."""
    for why, ours, _ in EDITS.get(name, ()):
        assert original.count(ours) == 1, f"{why}: {original.count(ours)} times in gspo.py:{ours}"
    original = edited(renamed(original, name), name)
    ours, theirs = definitions(source), definitions(original)
    for constant in OWN_VALUES.get(name, ()):
        original = original.replace(theirs[constant], ours[constant])
    return original


def block(source, start, end):
    """The text from one mark up to the next."""
    at = source.index(start)
    return source[at:source.index(end, at + len(start)) if end else len(source)]


def synchronised(source, original):
    """The script's text with the shared parts of the original."""
    for _, start, end in SHARED:
        source = source.replace(block(source, start, end), block(original, start, end))
    ours, theirs = (definitions(block(text, "\n# --- Evaluation", LINE))
                    for text in (source, original))
    for name in ours.keys() & theirs.keys() - OWN.keys() - {None}:
        source = source.replace(ours[name], theirs[name])
    return source


def with_grammar(source, original):
    """A reward function's text with the original's grammar of numbers."""
    ours, theirs = definitions(source), definitions(original)
    for name in GRAMMAR:
        source = source.replace(ours[name], theirs[name])
    return source


def main(arguments):
    """Repair, or with --check only report."""
    original, stale = ORIGINAL.read_text(encoding="utf-8"), 0
    for path in [*scripts(), *sorted((ROOT / "RL_HAND").glob("*/reward_func.py"))]:
        source = path.read_text(encoding="utf-8")
        wanted = (with_grammar(source, original) if path.stem == "reward_func" else
                  synchronised(source, localised(original, path.stem, source)))
        if wanted == source:
            continue
        stale += 1
        where = path.relative_to(ROOT)
        if "--check" in arguments:
            print(*difflib.unified_diff(source.splitlines(), wanted.splitlines(), str(where),
                                        "as in gspo.py", lineterm="", n=1), sep="\n")
            print(f"\n{where} differs from gspo.py in what they share; repair it with: "
                  "python tools/sync.py")
        else:
            path.write_text(wanted, encoding="utf-8", newline="\n")
            print(f"rewrote {where}")
    return bool(stale) and "--check" in arguments


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # what a terminal cannot show stops nothing
    sys.exit(main(sys.argv[1:]))
