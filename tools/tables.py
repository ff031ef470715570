"""Write the tables that the scripts' READMEs take from the code, between their markers.

    python tools/tables.py           # rewrite what is stale
    python tools/tables.py --check   # exit status 1 if anything is stale

Shared constants that a script has under another name (tools/sync.py) do not count as a difference.
Between <!-- constants --> and <!-- end --> stand the script's constants in both profiles; between
<!-- diff NAME --> and <!-- end -->, how the script differs from that one.
"""

import ast
import difflib
import re
import sys
from pathlib import Path

from sync import renamed

ROOT = Path(__file__).resolve().parents[1]


def constants_table(source):
    """The constants of a script as a Markdown table, a row each, grouped as in the file."""
    block = source[source.index("# --- Model"):source.index("\nEMBEDDED = {")]
    tree = ast.parse(source)
    assigned = {node.targets[0].id: node for node in tree.body
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)}
    embedded = {key.value: ast.unparse(value) for key, value in
                zip(assigned["EMBEDDED"].value.keys, assigned["EMBEDDED"].value.values)}
    rows = ["| constant | default | embedded | meaning |", "|---|---|---|---|"]
    for line in block.splitlines():
        if line.startswith("# --- "):
            rows.append(f"| **{line[6:]}** | | | |")
        elif found := re.match(r"([A-Za-z_]+) = (.*?)(?:\s+# (.*))?$", line):
            name, meaning = found[1], (found[3] or "").replace("|", "\\|")
            default = ast.unparse(assigned[name].value)
            rows.append(f"| `{name}` | `{default}` | " +
                        (f"`{embedded[name]}`" if name in embedded else "") + f" | {meaning} |")
    return "\n".join(rows)


def difference(source, other):
    """The diff from `other` to `source`, folded away, as Markdown."""
    lines = difflib.unified_diff(other.splitlines(), source.splitlines(), n=0, lineterm="")
    lines = list(lines)[2:]
    added = sum(line.startswith("+") for line in lines)
    removed = sum(line.startswith("-") for line in lines)
    body = "\n".join(line for line in lines if not line.startswith("@@"))
    return (f"<details><summary>{added} lines added, {removed} removed</summary>\n\n"
            f"```diff\n{body}\n```\n\n</details>")


def refreshed(readme, source, name=""):
    """The README's text with its generated parts made anew; `name` is the script's."""
    def diff(found):
        other = ROOT / "RL_HAND" / found[2] / f"{found[2]}.py"
        other = renamed(other.read_text(encoding="utf-8"), name)
        return found[1] + difference(source, other) + "\n" + found[3]

    readme = re.sub(r"(<!-- diff (\w+) -->\n).*?(<!-- end -->)", diff, readme, flags=re.S)
    return re.sub(r"(<!-- constants -->\n).*?(<!-- end -->)",
                  lambda found: found[1] + constants_table(source) + "\n" + found[2], readme,
                  flags=re.S)


def main(arguments):
    """Refresh or check the README of every script."""
    stale = []
    for script in sorted((ROOT / "RL_HAND").glob("*/*.py")):
        readme = script.with_name("README.md")
        if script.stem != script.parent.name or not readme.exists():
            continue
        text = readme.read_text(encoding="utf-8")
        new = refreshed(text, script.read_text(encoding="utf-8"), script.stem)
        if new != text:
            stale.append(str(readme.relative_to(ROOT)))
            if "--check" not in arguments:
                readme.write_text(new, encoding="utf-8")
    if stale:
        print(("stale: " if "--check" in arguments else "rewrote ") + ", ".join(stale))
    return bool(stale) and "--check" in arguments


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
