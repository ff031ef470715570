"""What identifies a run, and the row that a finished run leaves in benchmarks/results/.

A run is its script's code, the data that it reads, its constants and its seed:

    code  sha256 of the script's syntax tree, 12 digits. Comments, docstrings, the layout and values
          of the full-size profile do not count; whatever else is changed does, until
          `experiments.py equal` has shown that old and new give the same bits: a line in
          results/equal.csv.
    data  sha256 of what lies where its constants lead: tables by their content, a reward function
          by its code, models file by file. Tables that experiments.py makes: by what makes them.

A row has the run's facts, what its tables quote, and its curves, thinned: numbers with spaces
between, the evaluations one by one, what each step measures as means of 25 parts of the run (of
the many runs of the map: of 5). There is one row for each script, constants and seed, in
results/<experiment>.csv of the first experiment that has it; the tables and figures of the pages
are made from these files alone.
"""

import ast
import contextlib
import csv
import functools
import hashlib
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MADE = "runs/experiments/data/"  # here experiments.make_gad_data puts tables
FACTS = ["script", "constants", "seed", "code", "data", "commit", "python", "torch",
         "transformers", "device", "threads", "steps", "end", "seconds", "seconds of evaluations"]
EVALUATIONS = ["step", "num_tokens", "seconds", "eval/accuracy", "eval/accuracy_greedy",
               "eval/mean_length"]  # of a row, at each evaluation
CURVES = [  # of a row, by step: what figures and tables need
    "accuracy", "rewards/model", "kl", "kl_coef", "entropy", "clip_ratio/region_mean",
    "completions/mean_length", "frac_reward_zero_std", "grad_norm", "explained_variance",
    "kl_divergence", "watched/chosen_logp", "watched/rejected_logp", "watched/preference_accuracy",
    "watched/implicit_accuracy", "pairs_per_prompt", "stage", "d_loss", "d_acc", "d_grad_norm",
    "student_score", "teacher_score", "score_gap", "d_spread", "d_rank", "frac_no_signal",
    "matches_teacher", "engine_kl", "engine_extreme", "routing/routers_changed",
    "routing/tokens_changed", "routing/layers_changed", "ratio/token_max", "ratio/sequence_max",
    "experts/effective_min", "experts/busiest_max"]
BRIEF = ["accuracy", "entropy", "clip_ratio/region_mean", "completions/mean_length", "grad_norm"]
PHASES = ["time/rollout", "time/reward", "time/logps", "time/update"]  # mean seconds of a step


class Hash(bytes):
    """A sha256: so that what is large is read once."""


def import_file(path, name=None):
    """A file as a module, by the file's name unless another is given."""
    name = name or path.stem
    spec = importlib.util.spec_from_file_location(name, os.path.expanduser(path))
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ========================================== Identity ============================================


def plain(node):
    """A syntax tree as lists, the same in every version of Python: without docstrings, and of an
    Either the value for the small models, which all these runs train."""
    if isinstance(node, list):
        return [plain(each) for each in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Either":
        return plain(node.args[1])
    fields = dict(ast.iter_fields(node))
    body = fields.get("body")
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and body and isinstance(
            body[0], ast.Expr) and isinstance(getattr(body[0].value, "value", None), str):
        fields["body"] = body[1:]
    return [type(node).__name__, *([name, plain(value)] for name, value in sorted(fields.items())
                                   if value not in (None, []) and name != "kind")]


def hashed(part):
    """The sha256 of a text or of bytes; one that was made is what it is."""
    if isinstance(part, Hash):
        return part
    return Hash(hashlib.sha256(part.encode() if isinstance(part, str) else part).digest())


def short(*parts):
    """The first 12 digits of the sha256 of some texts, bytes or hashes."""
    return hashlib.sha256(b"".join(map(hashed, parts))).hexdigest()[:12]


@functools.cache
def code_of(source):
    """What identifies the code of a Python file: its text, less comments and docstrings."""
    return short(repr(plain(ast.parse(source))))


@functools.cache
def function_code(path, name):
    """The same of one function in a file."""
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    return short(repr(plain(next(node for node in tree.body if getattr(node, "name", "") == name))))


@functools.cache
def constants_in(source):
    """A script's constants as its small profile has them: name -> value, where it is literal."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            value = node.value
            if isinstance(value, ast.Call) and getattr(value.func, "id", "") == "Either":
                value = value.args[1]
            with contextlib.suppress(ValueError):
                found[node.targets[0].id] = ast.literal_eval(value)
            if node.targets[0].id == "DEFAULTS":
                break
    return found


def source_of(script):
    """The text of a script as it is today; None if there is none of that name."""
    path = ROOT / "RL_HAND" / script / f"{script}.py"
    return path.read_text(encoding="utf-8") if path.exists() else None


def texts_in(value):
    """All texts within a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from texts_in(each)


@functools.cache
def digest(path, changed):
    """The hash of a file: of a table what is in it, of Python what is run. `changed`: when."""
    if path.suffix == ".parquet":
        return hashed(pd.read_parquet(path).to_csv(lineterminator="\n"))
    if path.suffix == ".py":
        return hashed(code_of(path.read_text(encoding="utf-8")))
    content = path.read_bytes()
    return hashed(content if path.suffix == ".safetensors" else content.replace(b"\r\n", b"\n"))


def data_of(source, words, places=(ROOT,)):
    """What identifies the data that a script with these constants reads: where they are texts with
    a slash that lead, from one of the places, to a file or folder."""
    given = dict(word.split("=", 1) for word in words)
    for name, text in given.items():
        with contextlib.suppress(ValueError, SyntaxError):
            given[name] = ast.literal_eval(text)
    values = {name: value for name, value in (constants_in(source) | given).items()
              if name not in ("OUTPUT_DIR", "RESUME_FROM")}
    parts = []
    for text in sorted({text.partition(":")[0] for text in texts_in(values) if "/" in text}):
        if text.startswith(MADE):
            parts += [text, function_code(ROOT / "benchmarks" / "experiments.py", "make_gad_data"),
                      function_code(ROOT / "data" / "build.py", "column_work")]
            text = "data/train.parquet"  # of which they are made
        where = next((place / text for place in places if (place / text).exists()), None)
        for file in sorted(where.rglob("*") if where and where.is_dir() else [where] * bool(where)):
            if file.is_file():
                parts += [file.relative_to(where.parent).as_posix(),
                          digest(file, file.stat().st_mtime_ns)]
    return short(*parts)


def normal(words):
    """A command line's constants in one order, less what identifies no run."""
    kept = (word for word in words
            if word.partition("=")[0] not in ("SEED", "OUTPUT_DIR", "PROFILE"))
    return sorted(kept, key=lambda word: (word[:8] != "MEASURE=", word))


def key_of(script, words, seed):
    """What tells runs of one state of the scripts apart."""
    return script, "; ".join(normal(words)), str(seed)


def key(row):
    """The same of a row."""
    return row["script"], row["constants"], row["seed"]


def words_of(row):
    """A row's constants as they are given on a command line."""
    return row["constants"].split("; ") if row["constants"] else []


def same_code(script, constants, one, other):
    """Whether two codes of a script are the same, or `experiments.py equal` has shown that with
    these constants they give the same bits."""
    pairs = [{row["code_old"], row["code_new"]} for row in read(RESULTS / "equal.csv")
             if (row["script"], row["constants"]) == (script, constants)]
    known, more = set(), {one}
    while more:
        known |= more
        more = set().union(*(pair for pair in pairs if pair & known)) - known
    return other in known


def code_now(key):
    """The code of a row's script as it is today; of what measures.py measures, with that. None: the
    script is not there."""
    source = source_of(key[0])
    if source is None or not key[1].startswith(("MEASURE=gradients", "MEASURE=length")):
        return source and code_of(source)
    measures = (ROOT / "benchmarks" / "measures.py").read_text(encoding="utf-8")
    return short(code_of(source), code_of(source_of("grpo")), code_of(measures))


def stale(row):
    """What of a row is not today's: "", "script", "data" or both."""
    now = code_now(key(row))
    if now is None:
        return "script"
    parts = ["script"] * (not same_code(*key(row)[:2], row["code"], now))
    data = data_of(source_of(row["script"]), words_of(row))
    return " and ".join(parts + ["data"] * (row["data"] != data))


# ============================================= Rows =============================================


def git(*arguments):
    """What a command of git prints; nothing where it fails."""
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, encoding="utf-8",
                          errors="replace").stdout


def facts_here():
    """The facts of a row that is made here and now."""
    from importlib.metadata import version
    return {"commit": git("rev-parse", "HEAD").strip()[:10], "python": platform.python_version(),
            "torch": version("torch"), "transformers": version("transformers"), "device": "cpu"}


def number(value, digits):
    """A number as rows have it."""
    return f"{float(value):.{digits}g}"


def thinned(values, parts, how=np.mean):
    """At most so many numbers: the means of equal parts of the values, or what `how` makes."""
    with np.errstate(all="ignore"):
        means = [how(part[~np.isnan(part)]) if not np.isnan(part).all() else np.nan
                 for part in np.array_split(np.asarray(values, float), min(parts, len(values)))]
    return " ".join(number(mean, 3) for mean in means)


def facts_of(folder):
    """What a run's folder says of it, and the script that ran: (constants.json, source), or none:
    of its first checkpoint."""
    files = sorted(folder.glob("[!.]*/constants.json"), key=os.path.getmtime)
    if not files or not (folder / "metrics.csv").exists():
        return None
    return (json.loads(files[0].read_text(encoding="utf-8")),
            (files[0].parent / "train_script.py").read_text(encoding="utf-8"))


def key_in(folder):
    """The key of the run in a folder; None if it holds none."""
    if found := facts_of(folder):
        words = found[0]["command"][1:]
        return key_of(found[0]["script"], words,
                      dict(word.split("=", 1) for word in words).get("SEED", "0"))
    return None


def row_of(folder, brief=False, end=""):
    """The row of the run in a folder. `end`: why it ended before its last step. `brief`: of what
    each step measures but the accuracy a few curves, of 5 numbers each."""
    (facts, source), (script, constants, seed) = facts_of(folder), key_in(folder)
    words, table = facts["command"][1:], pd.read_csv(folder / "metrics.csv")
    places = [*dict.fromkeys([*map(Path, facts["places"]), ROOT])]
    here = folder.resolve().is_relative_to(ROOT)
    table["seconds"] = table["step_time"].fillna(0).cumsum()
    evaluations, trained = table.dropna(subset=["eval/accuracy"]), table[table.step > 0]
    row = {
        "script": script, "constants": constants, "seed": seed,
        "code": code_of(source), "data": data_of(source, words, places),
        "commit": facts["commit"][:10], "python": platform.python_version() if here else "",
        "torch": facts["torch"], "transformers": facts["transformers"], "device": facts["device"],
        "threads": facts["constants"]["THREADS"], "steps": int(table.step.iloc[-1]), "end": end,
        "seconds": number(table.seconds.iloc[-1], 4),
        "seconds of evaluations": number(evaluations.get("time/eval", pd.Series([0])).sum(), 3)}
    row |= {name: number(trained[name].mean(), 3) for name in PHASES if name in trained}
    for name in EVALUATIONS:
        digits = 7 if name == "num_tokens" else 4
        row["at " * (not name.startswith("eval/")) + name] = " ".join(
            number(value, digits) for value in evaluations[name])
    for name in BRIEF if brief else CURVES:
        if name in trained and trained[name].notna().any():
            row[name] = thinned(trained[name], 5 if brief and name != "accuracy" else 25,
                                np.max if name.endswith("_max") else np.mean)
    return {name: str(value) for name, value in row.items()}


def curve(row, name):
    """A row's numbers of that name, as an array; of none, where it has none."""
    return np.array([float(text) for text in row.get(name, "").split()])


def places(row, name):
    """The steps that a row's numbers stand at: evaluations, or the middles of the run's parts."""
    if name.startswith(("eval/", "at ")):
        return curve(row, "at step")
    steps = np.arange(1, int(row["steps"]) + 1)
    return np.array([part.mean() for part in np.array_split(steps, len(curve(row, name)))])


def fifth(row, name, which=-1):
    """A metric's mean over the last fifth (-1) or the first (0) of a run: of 100 steps, 20."""
    values = curve(row, name)
    if not len(values):
        return np.nan
    return float(np.array_split(values, 5)[which].mean()) if len(values) >= 5 else values[which]


# ============================================= Files ============================================


def read(path):
    """The rows of a file, as dicts of texts; none where there is no file."""
    if not path.exists():
        return []
    csv.field_size_limit(10**7)
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: text for name, text in row.items() if text or name in FACTS}
                for row in csv.DictReader(file)]


def write(path, rows):
    """Write rows whole, sorted, in the place of the old file; without any there is no file."""
    if not rows:
        return path.unlink(missing_ok=True)
    known = [*FACTS[:4], "code_old", "code_new", *FACTS[4:], *PHASES,
             *("at " * ("/" not in name) + name for name in EVALUATIONS), *CURVES]
    names = dict.fromkeys(name for row in rows for name in row)
    columns = [*(name for name in known if name in names), *sorted(names.keys() - set(known))]
    new = path.with_name(f".{path.name}")
    with new.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        table.writeheader()
        table.writerows(sorted(rows, key=lambda row: [natural(row.get(name, "")) for name in (
            "script", "constants", "seed", "code_old", "code_new")]))
    os.replace(new, path)


def natural(text):
    """A text so that sorting puts 2 before 10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part)
            for part in re.split(r"(\d+)", text)]


def all_rows():
    """Every row there is: {key: row}."""
    files = [path for path in sorted(RESULTS.glob("*.csv")) if path.stem != "equal"]
    return {key(row): row for path in files for row in read(path)}


@contextlib.contextmanager
def alone(folder):
    """One writer at a time: the others wait. (Windows: start one only.)"""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".rows").open("ab") as file:
        if sys.platform != "win32":
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def keep(new, owners, lock):
    """Put rows into the files of their experiments: {key: name}. One of today's script and data
    replaces a stale one, a stale one only fills a gap. Returns how many were put."""
    with alone(lock):
        files = {path.stem: {key(row): row for row in read(path)}
                 for path in RESULTS.glob("*.csv") if path.stem != "equal"}
        before, count = {name: dict(rows) for name, rows in files.items()}, 0
        for row in new:
            old = next((rows[key(row)] for rows in files.values() if key(row) in rows), None)
            if key(row) not in owners or old and (not stale(old) or stale(row)):
                continue
            for rows in files.values():
                rows.pop(key(row), None)
            files.setdefault(owners[key(row)], {})[key(row)] = row
            count += 1
        for name, rows in files.items():
            if rows != before.get(name):
                write(RESULTS / f"{name}.csv", [*rows.values()])
        return count
