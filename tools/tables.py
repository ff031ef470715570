"""Write the tables and diffs that the pages take from the scripts, between their markers.

    python tools/tables.py           # rewrite what is stale
    python tools/tables.py --check   # exit status 1 if anything is stale

Between <!-- constants --> and <!-- end --> stand constants: in RL_HAND/constants.md those of
gspo.py outside the Algorithm group, in a script's README the others that it has: its Algorithm
group, and what has another name or value there. Between <!-- diff NAME --> and <!-- end --> stands
how the README's script differs from the script NAME in what it does: see `lesson`. Between
<!-- architectures --> and <!-- end --> stand the kinds of models that were tried: ARCHITECTURES.
Between <!-- results NAME --> and <!-- end --> stands a table of benchmarks/pages.py, made from the
rows of benchmarks/results/ in the page's language.
"""

import ast
import difflib
import itertools
import re
import sys
from importlib import import_module
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "RL_HAND"
ARCHITECTURES = [  # what comes of them, their names in tests/test_models.py, what to do
    ("works", "Arcee, Cohere with logit_scale=1, DeepSeek-V3, DiffLlama, ERNIE 4.5, Falcon, Gemma, "
     "Gemma 3, Gemma 3 with pictures, Gemma 4, GLM-4, GPT-2, GPT-BigCode, GPT-NeoX, Granite with "
     "logits_scaling=1, Helium, Hunyuan, Llama, Llama with an untied head, Mistral, Mistral with "
     "a long window, Mixtral, Nemotron, OLMo 2, OLMo 3, OPT, Phi-3, Qwen2, Qwen2-MoE, Qwen3, "
     "Qwen3-MoE, Seed-OSS, SmolLM3, StableLM, StarCoder2", "nothing"),
    ("refused: scaled logits", "Cohere, Granite", "take another"),
    ("refused: capped logits", "Gemma 2", "take Gemma 3"),
    ("refused: head with bias", "CodeGen, GPT-J, Phi", "take Phi-3"),
    ("refused: window too short", "Gemma 3 with a short window, Mistral with a short window, "
     "StarCoder2 with a short window", "lower MAX_PROMPT_TOKENS + MAX_NEW_TOKENS to at most one "
     "more than `sliding_window` in config.json"),
    ("refused: too few positions", "GPT-2 with 40 positions, Llama with 40 positions",
     "lower MAX_PROMPT_TOKENS + MAX_NEW_TOKENS to `max_position_embeddings`"),
    ("refused: positions that stretch", "Phi-3 with long positions",
     "lower MAX_PROMPT_TOKENS + MAX_NEW_TOKENS to `original_max_position_embeddings`"),
    ("refused: positions as biases", "BLOOM, Falcon with ALiBi, MPT", "take another Falcon"),
    ("refused: linear attention", "Jamba, LFM2, Mamba, Qwen3-Next, Qwen3.5", "take Qwen3"),
    ("refused: attention without SDPA", "GPT-Neo, GPT-OSS", "take another"),
]


def source_of(name):
    """The text of a script."""
    return (FOLDER / name / f"{name}.py").read_text(encoding="utf-8")


def constants(source):
    """A script's constants as pairs (group, row of a table), in the order of the file."""
    lines, found = source.splitlines(), []
    for node in itertools.takewhile(lambda node: getattr(node, "name", "") != "train",
                                    ast.parse(source).body):
        groups = re.findall(r"^# --- (\w+)$", "\n".join(lines[:node.lineno]), re.M)
        if isinstance(node, ast.Assign) and groups and node.targets[0].id != "DEFAULTS":
            either = isinstance(node.value, ast.Call) and node.value.func.id == "Either"
            values = [lines[value.lineno - 1][value.col_offset:value.end_col_offset]
                      if value.lineno == value.end_lineno
                      else ast.unparse(value)  # on one line, without the comments inside
                      for value in (node.value.args if either else [node.value])]
            cells = [f"`{text}`" for text in (node.targets[0].id, *values)] + [""] * (not either)
            cells.append(lines[node.lineno - 1].partition("  # ")[2])
            found.append((groups[-1], " | ".join(cell.replace("|", "\\|") for cell in cells)))
    return found


def table(pairs):
    """Pairs (group, row) as a Markdown table, with a line for each group."""
    rows = ["| constant | full | embedded | meaning |", "|---|---|---|---|"]
    for group, some in itertools.groupby(pairs, lambda pair: pair[0]):
        rows += [f"| **{group}** | | | |", *(f"| {row} |" for _, row in some)]
    return "\n".join(rows)


def lesson(name):
    """The lines of a script from `train` to where the algorithm ends, docstrings left out."""
    part = re.search(r"^def train.*?(?=^# =+ The algorithm ends)", source_of(name), re.M | re.S)[0]
    return re.sub(r'^ *""".*?"""\n', "", part, flags=re.M | re.S).splitlines()


def difference(name, other):
    """The diff from the lesson of `other` to that of `name`, with a blank line between places."""
    lines = difflib.unified_diff(lesson(other), lesson(name), n=0, lineterm="")
    return "\n".join(re.sub("^@@.*", "", line) for line in list(lines)[3:])


def architectures():
    """ARCHITECTURES as a Markdown table, and with what they were tried."""
    rows = ["| architecture | result | what to do |", "|---|---|---|"]
    rows += [f"| {names} | {result} | {advice} |" for result, names, advice in ARCHITECTURES]
    version = re.search(r'"(transformers)==(.*?)"', source_of("gspo")).groups()
    return "\n".join(rows) + "\n\n*By `tests/test_models.py`, with {} {}.*".format(*version)


def refreshed(text, name, rows, language="en"):
    """A page's text with its generated parts made anew; `name` is its script."""
    if "<!-- results " in text:
        if (benchmarks := str(Path(__file__).resolve().parents[1] / "benchmarks")) not in sys.path:
            sys.path.append(benchmarks)
        text = import_module("pages").with_tables(text, language)
    text = re.sub(r"(<!-- architectures -->\n).*?(?=<!-- end -->)",
                  lambda at: f"{at[1]}{architectures()}\n", text, flags=re.S)
    text = re.sub(r"(<!-- diff (\w+) -->\n).*?(?=<!-- end -->)", lambda at:
                  f"{at[1]}```diff\n{difference(name, at[2])}\n```\n", text, flags=re.S)
    return re.sub(r"(<!-- constants -->\n).*?(?=<!-- end -->)",
                  lambda at: f"{at[1]}{table(rows)}\n", text, flags=re.S)


def main(arguments):
    """Refresh or check the pages beside the scripts, the project's and benchmarks' README."""
    shared = [pair for pair in constants(source_of("gspo")) if pair[0] != "Algorithm"]
    pages = [(page, "gspo", shared) for page in sorted(FOLDER.glob("*.md"))
             if ".zh-CN" not in page.name]
    pages += [(page, "gspo", []) for page in (FOLDER.parent / "README.md",
                                              FOLDER.parent / "benchmarks" / "README.md")
              if page.exists()]
    for name in sorted(path.stem for path in FOLDER.glob("*/*.py")):
        if (page := FOLDER / name / "README.md").exists():
            own = [pair for pair in constants(source_of(name)) if pair not in shared]
            pages.append((page, name, own))
    pages += [(chinese, name, rows) for page, name, rows in pages
              if (chinese := page.with_name(f"{page.stem}.zh-CN.md")).exists()]
    stale = []
    for page, name, rows in pages:
        text = page.read_text(encoding="utf-8")
        new = refreshed(text, name, rows, "zh" if ".zh-CN" in page.name else "en")
        if new != text:
            stale.append(str(page.relative_to(FOLDER.parent)))
            if "--check" not in arguments:
                page.write_text(new, encoding="utf-8", newline="\n")
    if stale:
        print(("stale: " if "--check" in arguments else "rewrote ") + ", ".join(stale))
    return bool(stale) and "--check" in arguments


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # what a terminal cannot show stops nothing
    sys.exit(main(sys.argv[1:]))
