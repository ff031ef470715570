"""What people really have and do: files of questions, reward files, terminals, folders, machines.

Each kind of fault that others reported is here with an input of its own. What can be is called
directly; the runs are as small as they can be.
"""

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import huggingface_hub.constants
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, SCRIPT, fork, import_file
from safetensors.torch import load_file
from transformers import AutoTokenizer

SMALL = ["PROFILE=embedded", "BATCH_SIZE=2", "GROUP_SIZE=4", "MINIBATCH=8", "MICRO_BATCH=8",
         "GSPO_EPOCHS=1", "MAX_NEW_TOKENS=6", "EVAL_QUESTIONS=8", "SHOW_SAMPLES=1", "MAX_STEPS=2",
         "LEARNING_RATE=1e-3", "TARGET_KL=0.01"]
ASKED = [f"A shop has {900 + i} apples and sells {100 + i}. How many are left?" for i in range(8)]
FUNCTION = "REWARD_WEIGHTS={'function': 1.0, 'verifier': 0.5}"
NO_MODEL = "REWARD_WEIGHTS={'verifier': 1.0}"


def lines(path, rows, first=""):
    """Write rows as JSON lines."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((first + text).encode())
    return path


def dataset(path, constant="train_datasets", **further):
    """The argument that makes a file one of the dataset constants."""
    entry = {"path": str(path), "input": "question", "output": "answer"} | further
    return f"{constant}={[entry]!r}"


def questions(folder):
    """Small files of questions, and the arguments that make them the data."""
    rows = [{"question": question, "answer": "800"} for question in ASKED]
    path = lines(folder / "questions.jsonl", rows)
    return [dataset(path), dataset(path, "eval_datasets")]


def train(folder, *arguments):
    """Train in this process, without a plot; returns the run's folder."""
    gspo = import_file(SCRIPT, f"gspo_{folder.name}")
    gspo.plot_metrics = lambda run: None
    gspo.main([*arguments, f"OUTPUT_DIR={folder}"])
    return folder


def stopped(folder, *arguments):
    """The one line that a run ends with, which it must."""
    with pytest.raises(SystemExit) as stop:
        train(folder, *arguments)
    line = stop.value.code
    assert isinstance(line, str) and line.startswith("error: ") and "\n" not in line, line
    return line


def metrics(folder):
    """metrics.csv as rows of {column: text}, less the seconds."""
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [{name: text for name, text in row.items()
             if not name.startswith("time/") and name != "step_time"} for row in rows]


def assert_same_end(one, other, name):
    """Equal weights, to the last bit, in two runs' checkpoints of a name."""
    first, second = (load_file(folder / name / "model.safetensors") for folder in (one, other))
    assert set(first) == set(second) and len(first) > 20
    assert all(torch.equal(value, second[key]) for key, value in first.items())


@pytest.fixture(autouse=True)
def same_modules():
    """Reward files change what is imported and from where: give it back."""
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if re.match("gspo_|mine_|reward_function", name):
            del sys.modules[name]


# ----------------------------------------------------------------------------- data


@pytest.fixture(scope="module")
def tokenizer():
    """The embedded policy's."""
    return AutoTokenizer.from_pretrained(ROOT / "data" / "policy")


@pytest.fixture
def rows_of(embedded, tokenizer):
    """rows_of(path, ...) is what the script reads of a dataset entry."""
    embedded.MAX_PROMPT_TOKENS = 1000

    def read(path, **further):
        entry = {"path": str(path), "input": "question", "output": "answer"} | further
        embedded.train_datasets = [entry]
        return embedded.load_rows("train_datasets", tokenizer)
    return read


@pytest.fixture
def refused(rows_of):
    """refused(path, ...) is the one line that says why a dataset entry cannot be read; it names the
    file, and what to do with other forms."""
    def read(path, **further):
        with pytest.raises(SystemExit) as stop:
            rows_of(path, **further)
        line = stop.value.code
        assert line.startswith(f"error: train_datasets: {path}: ") and "\n" not in line, line
        assert "data/convert.py" in line and (ROOT / "data" / "convert.py").exists()
        return line
    return read


def answers(rows):
    """The answers of rows."""
    return [row["answer"] for row in rows]


WRITTEN = ["0.7", "0.70", "2.675", "1.005", "-0", "-0.0", "1e3", "1E400", "5e-324", "2.50",
           str(2**63), str(2**63 + 11), str(2**64 + 1), str(2**53 + 1), "12345678901234567890.5"]


@pytest.mark.parametrize("form", ["lines", "array"])
def test_json_numbers_arrive_as_written(rows_of, tmp_path, form):
    texts = [f'{{"question": "q{i}", "answer": {value}, "n": {i}.0}}'
             for i, value in enumerate(WRITTEN)]
    path = tmp_path / "numbers.json"
    path.write_text("\n".join(texts) if form == "lines" else f"[{', '.join(texts)}]")
    rows = rows_of(path, place="n")
    assert answers(rows) == WRITTEN and [row["place"] for row in rows][:2] == ["0.0", "1.0"]


def test_texts_that_look_like_numbers_stay_texts(rows_of, tmp_path):
    texts = ["007", "0.70", "1_000", "+5", " 12 ", "nan", "NA", "null", "", "1/2", "١٢"]
    rows = [{"question": f"q{i}", "answer": text} for i, text in enumerate(texts)]
    assert answers(rows_of(lines(tmp_path / "a.jsonl", rows))) == texts
    pd.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    assert answers(rows_of(tmp_path / "a.parquet")) == texts


def test_every_two_decimal_number_is_its_own_right_answer(embedded, rows_of, tmp_path):
    """As pandas reads JSON, one in nine is another number: 0.7 was 0.7000000000000001."""
    numbers = [f"{n // 100}.{n % 100:02}" for n in range(0, 10_000, 7)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"question": "q{n}", "answer": {n}}}\n' for n in numbers))
    rows = rows_of(path)
    assert embedded.verify(rows, [f"Answer: {n}" for n in numbers]) == [1.0] * len(numbers)
    assert embedded.verify(rows, [f"Answer: {n}1" for n in numbers]) == [0.0] * len(numbers)


@pytest.mark.parametrize("values, expected", [
    (pd.array([800, 2**63 - 1], dtype="Int64"), ["800", "9223372036854775807"]),
    (pd.array([0, 2**64 - 1], dtype="UInt64"), ["0", "18446744073709551615"]),
    (pd.array([2**53 + 1, -5], dtype="int64[pyarrow]"), ["9007199254740993", "-5"]),
    ([0.7, 2.675], ["0.7", "2.675"]), (pd.array([0.1, 1e22], dtype="Float64"), ["0.1", "1e+22"]),
    (pd.Categorical(["7", "08"]), ["7", "08"]), (pd.array(["a", "b"], dtype="string"), ["a", "b"]),
    (pd.Series([1, 2], index=[5, 9]), ["1", "2"])])
def test_parquet_columns_of_any_type_of_number_or_text(rows_of, tmp_path, values, expected):
    path = tmp_path / "a.parquet"
    pd.DataFrame({"question": pd.Categorical(["q", "r"]), "answer": list(values)}).assign(
        answer=values if isinstance(values, list) else pd.Series(values).array).to_parquet(path)
    rows = rows_of(path)
    assert answers(rows) == expected and [row["question"] for row in rows] == ["q", "r"]


@pytest.mark.parametrize("values", [
    pd.array([800, None], dtype="Int64"), [800, None], ["800", None], [0.5, float("nan")]])
def test_a_missing_answer_is_no_answer(refused, tmp_path, values):
    """Not "nan", "None" or "<NA>", which a response would be compared with."""
    path = tmp_path / "a.parquet"
    pd.DataFrame({"question": ["q", "r"], "answer": values}).to_parquet(path)
    assert "{'question': 0, 'answer': 1} without text" in refused(path)


ROW = '{"question": "Was kostet 1 €?\u2028小明\x85", "answer": "1"}'


@pytest.mark.parametrize("name, content", [
    ("bom.jsonl", "\ufeff" + ROW + "\n"), ("bom.json", "\ufeff[" + ROW + "]"),
    ("lines.json", ROW + "\n"), ("array.jsonl", "[" + ROW + "]"),
    ("array.jsonl", "\n  [\n" + ROW.replace(", ", ",\n  ") + "\n]\n"),
    ("no_end.jsonl", ROW), ("windows.jsonl", ROW + "\r\n\r\n"),
    ("empty_lines.json", f"\n\n{ROW}\n\n"), ("train[0].jsonl", ROW),
    ("[a-b]*.json" if sys.platform != "win32" else "[a-b].json", ROW), ("train.jsonl.1", ROW),
    ("no_ending", ROW), ("Fragen (neu) ä.jsonl", ROW)])
def test_forms_of_json(rows_of, tmp_path, name, content):
    """Also a raw U+2028 or U+0085 inside a text, which is no end of a line in JSON; and names that
    are patterns, beside files that these patterns find."""
    for other in ("train0.jsonl", "a.json", "b2.json"):
        (tmp_path / other).write_text('{"question": "another", "answer": "2"}')
    (tmp_path / name).write_bytes(content.encode())
    row, = rows_of(tmp_path / name)
    assert (row["question"], row["answer"]) == ("Was kostet 1 €?\u2028小明\x85", "1")


def chat(*turns):
    """A list of messages."""
    return [{"role": role, "content": text} for role, text in turns]


CHATS = [chat(("user", "1+1?")), chat(("system", "Be brief."), ("user", "1+1?")),
         chat(("user", "1+1?"), ("assistant", "2"), ("user", "And 2+2?")),
         chat(("system", "Be kind."), ("user", "1?"), ("assistant", "1"), ("user", "And 2+2?"))]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_messages_are_prompts(rows_of, tokenizer, tmp_path, form):
    """All of a chat is the prompt; its last message is the question that rewards and samples see.
    The same question behind another history is another prompt."""
    path = tmp_path / f"chat.{form}"
    rows = [{"prompt": one, "answer": str(i)} for i, one in enumerate(CHATS)]
    if form == "jsonl":
        lines(path, [*rows, {"prompt": "5+5?", "answer": "10"}])  # beside plain texts
    else:
        pd.DataFrame(rows).to_parquet(path)
    found = rows_of(path, input="prompt")
    for row, messages in zip(found, CHATS):
        text = tokenizer.decode(row["prompt_ids"])
        assert text == tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        assert all(one["content"] in text for one in messages)
        assert row["question"] == messages[-1]["content"]
    assert len({tuple(row["prompt_ids"]) for row in found}) == len(found) == 4 + (form == "jsonl")


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_files_as_other_frameworks_make_them(embedded, rows_of, tmp_path, form):
    """verl's and DAPO-Math-17k's: the answer is in a struct, and functions see other columns."""
    (tmp_path / "theirs.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    seen = (data_source, ground_truth, extra_info['index'])\n"
        "    return {'score': float(seen == ('math_dapo', '800', '3')), 'acc': seen}\n")
    row = {"data_source": "math_dapo", "prompt": chat(("user", "What is 1600 / 2?")),
           "ability": "MATH", "reward_model": {"ground_truth": "800", "style": "rule"},
           "extra_info": {"index": 3, "split": "train"}}
    path = tmp_path / f"theirs.{form}"
    lines(path, [row]) if form == "jsonl" else pd.DataFrame([row]).to_parquet(path)
    row, = rows_of(path, input="prompt", output="reward_model.ground_truth",
                   data_source="data_source", index="extra_info.index")
    assert (row["question"], row["answer"]) == ("What is 1600 / 2?", "800")
    embedded.REWARD_FUNCTION = str(tmp_path / "theirs.py")
    function = embedded.load_reward_function()
    assert embedded.checked_scores("function", function, [row] * 2, ["", "x"]).tolist() == [1, 1]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_dotted_columns_at_any_depth(rows_of, tmp_path, form):
    rows = [{"ask": {"en": f"q{i}"}, "plain.name": "p",
             "answer": {"final": {"value": i + 0.5, "as": {"text": f"{i}"}}}} for i in range(3)]
    path = tmp_path / f"deep.{form}"
    lines(path, rows) if form == "jsonl" else pq.write_table(pa.Table.from_pylist(rows), path)
    deep = {"input": "ask.en", "name": "plain.name"}
    assert answers(rows_of(path, output="answer.final.value", **deep)) == ["0.5", "1.5", "2.5"]
    found = rows_of(path, output="answer.final.as.text", **deep)
    assert [(row["question"], row["answer"], row["name"]) for row in found] == [
        ("q0", "0", "p"), ("q1", "1", "p"), ("q2", "2", "p")]


def home(folder, monkeypatch):
    """Make a folder the home folder, and another one the working directory."""
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(folder))
    (folder.parent / "elsewhere").mkdir(exist_ok=True)
    monkeypatch.chdir(folder.parent / "elsewhere")
    return folder


def test_home_patterns_and_relative_paths(rows_of, tmp_path, monkeypatch):
    """`~`, patterns (in the order of their names), and both together; a working directory whose own
    name reads like a pattern."""
    at = home(tmp_path / "home", monkeypatch)
    for i in (2, 0, 1):
        lines(at / "parts" / f"part-{i}.jsonl", [{"question": f"q{i}", "answer": "1"}])
    (at / "parts" / "notes.txt").write_text("no data")
    for path, expected in {"~/parts/part-1.jsonl": ["q1"], "~/parts/*.jsonl": ["q0", "q1", "q2"],
                           str(at / "parts" / "part-[02].jsonl"): ["q0", "q2"],
                           "~/part?/part-0.*": ["q0"]}.items():
        assert [row["question"] for row in rows_of(path)] == expected
    odd = tmp_path / "work [1]"
    shutil.copytree(at / "parts", odd / "parts")
    monkeypatch.chdir(odd)
    script = import_file(SCRIPT)  # looks from where it is started
    assert script.find_path("parts/part-1.jsonl") == odd / "parts" / "part-1.jsonl"
    assert len(rows_of("parts/*.jsonl")) == 3
    assert not (tmp_path / "elsewhere" / "~").exists()


@pytest.mark.parametrize("name, content, says", [
    ("a.jsonl", '{"text": "q", "label": "1"}\n', "it has ['text', 'label']"),
    ("a.json", '{"data": [{"question": "q", "answer": "1"}]}', "it has ['data']"),
    ("a.jsonl", "", "it has []"), ("a.json", "[]", "it has []"), ("a.parquet", "", "0 bytes"),
    ("a.jsonl", "\ufeff", "it has []"), ("a.jsonl", "null", "no column"),
    ("a.jsonl", '{"question": "q", "answer": null}', "'answer': 1} without text"),
    ("a.jsonl", '{"question": null, "answer": "1"}', "{'question': 1, 'answer': 0} without"),
    ("a.jsonl", '{"question": "q", "answer": NaN}', "'answer': 1} without text"),
    ("a.jsonl", '{"question": "q", "answer": ["1", "2"]}', "'answer': 1} without text"),
    ("a.jsonl", '{"question": "q", "answer": "1"}\n{"question": "r"}', "'answer': 1} without"),
    ("a.jsonl", '{"question": [], "answer": "1"}', "IndexError"),
    ("a.jsonl", '{"question": [{"from": "human", "value": "q"}], "answer": "1"}', "'content'"),
    ("a.jsonl", '{"question": [{"role": "user", "content": [{"type": "text", "text": "q"}]}], '
     '"answer": "1"}', "{'question': 1,"),
    ("a.jsonl", '{"question": "q", "answer": "1"', "JSONDecodeError"),
    ("a.csv", "question,answer\nq,1\n", "JSONDecodeError"), ("a.jsonl.gz", "\x1f\x8b", "Error"),
    ("a.xlsx", "PK\x03\x04", "Error"), ("missing.parquet", None, "FileNotFound"),
    ("missing-*.jsonl", None, "FileNotFound")])
def test_what_the_scripts_do_not_read(refused, tmp_path, name, content, says):
    """One line that says what was found, and the command for other forms."""
    if content is not None:
        (tmp_path / name).write_bytes(content.encode())
    assert says in refused(tmp_path / name)


def test_what_is_refused_can_be_converted(refused, rows_of, tmp_path):
    """The line's advice, followed."""
    path = tmp_path / "theirs.csv"
    path.write_text("problem;solution\n1+1?;The answer is 2\n", encoding="utf-8-sig")
    refused(path)
    convert = import_file(ROOT / "data" / "convert.py", "convert")
    convert.main([str(path), str(tmp_path / "ours.parquet")])
    row, = rows_of(tmp_path / "ours.parquet")
    assert (row["question"], row["answer"]) == ("1+1?", "The answer is 2")


def in_hub_cache(folder, repository, files, kind="datasets"):
    """Lay out what the hub's library keeps of a repository: a commit's files, and its branch."""
    at, commit = folder / f"{kind}--{repository.replace('/', '--')}", "0123456789" * 4
    for name, path in files.items():
        target = at / "snapshots" / commit / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    (at / "refs").mkdir()
    (at / "refs" / "main").write_text(commit)


def test_the_hubs_cache_without_a_network(embedded, rows_of, refused, tmp_path, monkeypatch):
    """Questions at hf:// and models by their id, as an earlier run or `hf download` left them."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    pd.DataFrame({"question": ASKED, "answer": "800"}).to_parquet(tmp_path / "a.parquet")
    lines(tmp_path / "b.jsonl", [{"question": "q", "answer": 0.70}])
    hub, name = tmp_path / "hub", "main/train-00000-of-00001.parquet"
    in_hub_cache(hub, "some-one/some.questions",
                 {name: tmp_path / "a.parquet", "b.jsonl": tmp_path / "b.jsonl"})
    rows = rows_of(f"hf://datasets/some-one/some.questions/{name}")
    assert [row["question"] for row in rows] == ASKED
    assert answers(rows_of("hf://datasets/some-one/some.questions/b.jsonl")) == ["0.7"]
    refused("hf://datasets/some-one/some.questions/main/test.parquet")
    refused("hf://datasets/some-one/others/main/train.parquet")
    model = ROOT / "data" / "policy"
    in_hub_cache(hub, "some-one/policy", {path.name: path for path in model.iterdir()}, "models")
    ours, theirs = (embedded.load_policy(name) for name in ("data/policy", "some-one/policy"))
    assert all(torch.equal(value, theirs.state_dict()[name])
               for name, value in ours.state_dict().items())


# --------------------------------------------------------------------- reward files


def score_with(gspo, path, responses, name=":score"):
    """What a reward file gives, after the script has tried it on a group of answers."""
    gspo.configure([*SMALL, FUNCTION, f"REWARD_FUNCTION={path}{name}"])
    row = {"question": "1+1?", "answer": "2"}
    scorer = gspo.load_scorers(row)["function"]
    return gspo.checked_scores("function", scorer, [row] * len(responses), responses).tolist()


FILES = {
    "a dataclass under postponed annotations": """
from __future__ import annotations
from dataclasses import dataclass, field

@dataclass
class Weights:
    right: float = 1.0
    seen: list[str] = field(default_factory=list)

weights = Weights()

def score(questions, responses, references):
    return [weights.right * (a in r) for r, a in zip(responses, references)]
""",
    "types that are looked up in its module": """
from __future__ import annotations
import typing, enum
Verdict = enum.Enum("Verdict", {"RIGHT": 1.0, "WRONG": 0.0})
class Judged(typing.NamedTuple):
    verdict: Verdict
assert typing.get_type_hints(Judged) == {"verdict": Verdict}

def score(questions, responses, references):
    return [Judged(Verdict(float(a in r))).verdict.value for r, a in zip(responses, references)]
""",
    "what lies beside it": """
from mine_helper import right
import mine_package.inner

def score(questions, responses, references):
    return [right(r, a) * mine_package.inner.ONE for r, a in zip(responses, references)]
""",
    "pickles of its own classes": """
import copy, pickle
class Case:
    def __init__(self, text): self.text = text
    def judge(self, answer): return float(answer in self.text)

def score(questions, responses, references):
    cases = pickle.loads(pickle.dumps([Case(r) for r in responses]))
    function = pickle.loads(pickle.dumps(score))
    assert function is score and type(copy.deepcopy(cases[0])) is Case
    return [case.judge(a) for case, a in zip(cases, references)]
""",
    "a data file by __file__": """
import json, pathlib
TABLE = json.loads(pathlib.Path(__file__).with_name("table.json").read_text())
assert pathlib.Path(__file__).is_absolute()

def score(questions, responses, references):
    return [TABLE["right"] * (a in r) for r, a in zip(responses, references)]
""",
    "an object that counts": """
class Reward:
    def __init__(self): self.calls = 0
    def __call__(self, questions, responses, references):
        self.calls += 1
        return (float(a in r) for r, a in zip(responses, references))
score = Reward()
""",
    "arrays": """
import numpy as np
def score(questions, responses, references):
    assert {type(x) for x in (questions, responses, references)} == {list}
    return np.array([a in r for r, a in zip(responses, references)], dtype=np.float16)
""",
    "dicts": """
import numpy as np
def score(questions, responses, references):
    return [{"score": np.float32(a in r), "acc": None} for r, a in zip(responses, references)]
"""}


@pytest.mark.parametrize("where", ["absolute", "relative", "home"])
@pytest.mark.parametrize("name", FILES)
def test_a_reward_file_is_a_module(gspo, tmp_path, monkeypatch, name, where):
    folder = home(tmp_path / "my rewards", monkeypatch)
    (folder / "mine_package").mkdir(parents=True)
    for file, text in {"reward.py": FILES[name], "mine_helper.py": "def right(r, a): return a in r",
                       "mine_package/__init__.py": "", "mine_package/inner.py": "ONE = 1.0",
                       "table.json": '{"right": 1.0}'}.items():
        (folder / file).write_text(text)
    if where == "relative":
        monkeypatch.chdir(folder.parent)
        gspo = import_file(SCRIPT)  # looks from where it is started
    path = {"absolute": folder / "reward.py", "relative": "my rewards/reward.py",
            "home": "~/reward.py"}[where]
    assert score_with(gspo, path, ["it is 2", "3", "", "2"]) == [1.0, 0.0, 0.0, 1.0]


GROUP = """
import statistics
def score(questions, responses, references):
    sizes = list(map(len, responses))
    return [(size - statistics.mean(sizes)) / statistics.stdev(sizes) for size in sizes]
"""
RANKS = """
def score(questions, responses, references):
    order = sorted(range(len(responses)), key=lambda i: len(responses[i]))
    return [order.index(i) / (len(responses) - 1) for i in range(len(responses))]
"""


@pytest.mark.parametrize("text, expected", [(GROUP, [-1.0, 0.0, 1.0]), (RANKS, [0.0, 0.5, 1.0])])
def test_a_reward_that_needs_a_group(gspo, tmp_path, text, expected):
    """It is tried on one before models are loaded: a single answer has no spread."""
    (tmp_path / "reward.py").write_text(text)
    assert score_with(gspo, tmp_path / "reward.py", ["a", "bb", "ccc"]) == expected


STOPS = [
    ("import sys; sys.exit()", "SystemExit"), ("import sys; sys.exit('no licence')", "no licence"),
    ("raise SystemExit(0)", "SystemExit: 0"), ("quit()", "SystemExit"),
    ("raise RuntimeError('error: 503')", "RuntimeError: error: 503"),
    ("return [{'acc': 1.0}] * len(responses)", "KeyError: 'score'"),
    ("return [{'score': None}] * len(responses)", "TypeError"),
    ("return {'score': 1.0}", "could not convert"), ("import mine_nothing", "No module named")]


@pytest.mark.parametrize("text, says", [
    *((f"def score(questions, responses, references):\n    {text}\n", says)
      for text, says in STOPS), *(case for case in STOPS if not case[0].startswith("return"))])
def test_a_reward_file_that_stops(gspo, tmp_path, text, says):
    """It cannot end the run with a status of its own, or silently, or with a traceback: neither
    its function nor, without one, the file."""
    (tmp_path / "reward.py").write_text(text)
    with pytest.raises(SystemExit) as stop:
        score_with(gspo, tmp_path / "reward.py", [""])
    line = stop.value.code
    assert line.startswith("error: ") and "\n" not in line and "; expected " in line
    assert says in line


# ------------------------------------------------------- a source that fails in a run


FAILS = """
from pathlib import Path
import sys
calls = 0

def score(questions, responses, references):
    global calls
    calls += 1
    if calls == int(Path(__file__).with_name("at.txt").read_text()):
        {}
    return [len(set(r)) % 5 / 5 + (a in r) for r, a in zip(responses, references)]
"""  # call 1 tries it, 2 is the evaluation at step 0, then one a step and an evaluation


def failing(folder, at, how="raise TimeoutError('the judge did not answer')"):
    """A reward file that fails at one of its calls, and the arguments of a run of 4 steps."""
    folder.mkdir(exist_ok=True)
    (folder / "reward.py").write_text(FAILS.format(how))
    (folder / "at.txt").write_text(str(at))
    return [*SMALL, *questions(folder), FUNCTION, "MAX_STEPS=4", "EVAL_EVERY=2",
            f"REWARD_FUNCTION={folder / 'reward.py'}:score"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing interrupts."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    return train(folder / "whole", *failing(folder, 0))


def saved(folder):
    """The names of a run's checkpoints, with whatever else there is of folders."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


@pytest.mark.parametrize("how, says", [
    ("raise TimeoutError('the judge did not answer')", "TimeoutError: the judge did not answer"),
    ("sys.exit('no licence')", "SystemExit: no licence"), ("sys.exit(0)", "SystemExit: 0"),
    ("raise RuntimeError('error: 503')", "RuntimeError: error: 503"),
    ("return [None] * len(responses)", "TypeError"),
    ("return [float('nan')] * len(responses)", "it returned 8: [nan")])
def test_what_is_trained_is_saved(whole, tmp_path, how, says):
    """Fails in step 2 (its fourth call): step 1 is there to go on from, exactly."""
    arguments = failing(tmp_path / "mine", 4, how)
    line = stopped(tmp_path / "run", *arguments)
    last = tmp_path / "run" / "step_1"
    assert says in line
    assert line.endswith(f"; expected 8 finite numbers; go on with RESUME_FROM={last}")
    assert saved(tmp_path / "run") == ["epoch_0", "step_1"]
    state = json.loads((last / "trainer_state.json").read_text())
    assert (state["step"], state["questions"]) == (1, 2)
    (tmp_path / "mine" / "at.txt").write_text("0")  # the judge answers again
    resumed = train(tmp_path / "resumed", f"RESUME_FROM={last}")
    assert metrics(resumed) == metrics(whole) and len(metrics(whole)) == 5
    assert_same_end(resumed, whole, "epoch_1")


def test_fails_at_the_fifth_call_inside_an_evaluation(whole, tmp_path):
    """Step 2 is trained: it is saved before its evaluation is lost, which is not made up for."""
    line = stopped(tmp_path / "run", *failing(tmp_path / "mine", 5))
    last = tmp_path / "run" / "step_2"
    assert "TimeoutError" in line and line.endswith(f"; go on with RESUME_FROM={last}")
    (tmp_path / "mine" / "at.txt").write_text("0")
    resumed = train(tmp_path / "resumed", f"RESUME_FROM={last}")
    rows, expected = metrics(resumed), metrics(whole)
    lost = {name for name in expected[2] if rows[2][name] != expected[2][name]}
    assert lost == {name for name in expected[2] if name.startswith("eval/")}
    assert [row for row in rows if row["step"] != "2"] == [expected[i] for i in (0, 1, 3, 4)]
    assert_same_end(resumed, whole, "epoch_1")


@pytest.mark.parametrize("call", [1, 2, 3])
def test_nothing_to_go_on_from(tmp_path, call):
    """Before there is a run; in its first evaluation; in the first step."""
    line = stopped(tmp_path / "run", *failing(tmp_path / "mine", call))
    assert "TimeoutError: the judge did not answer" in line and "RESUME_FROM" not in line
    assert line.endswith("; nothing was trained yet") == (call > 1)
    assert (tmp_path / "run").exists() == (call > 1)
    if call > 1:
        assert saved(tmp_path / "run") == ["epoch_0"] * (call > 2)


def test_a_checkpoint_that_is_there_is_not_written_again(tmp_path):
    arguments = failing(tmp_path / "mine", 6)
    line = stopped(tmp_path / "run", *arguments, "EVAL_EVERY=0", "SAVE_EVERY=1")
    last = tmp_path / "run" / "step_3"
    assert line.endswith(f"; go on with RESUME_FROM={last}")
    assert saved(tmp_path / "run") == ["epoch_0", "step_1", "step_2", "step_3"]


def test_a_resumed_run_that_fails_at_once(tmp_path):
    """What it began from is still what to go on from."""
    first = train(tmp_path / "first", *failing(tmp_path / "mine", 0), "MAX_STEPS=2")
    (tmp_path / "mine" / "at.txt").write_text("2")
    line = stopped(tmp_path / "run", f"RESUME_FROM={first / 'step_2'}", "MAX_STEPS=4")
    assert line.endswith(f"; go on with RESUME_FROM={first / 'step_2'}")
    assert saved(tmp_path / "run") == []


def test_a_full_disk_leaves_no_half_checkpoint_to_go_on_from(tmp_path, monkeypatch):
    """What could not be saved is not named; the checkpoint before it is."""
    arguments, replace, tried = failing(tmp_path / "mine", 6), os.replace, []

    def full(source, target):
        if Path(target).name == "step_3":
            tried.append(target)
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    line = stopped(tmp_path / "run", *arguments, "EVAL_EVERY=0", "SAVE_EVERY=2")
    assert tried and line.endswith(f"; go on with RESUME_FROM={tmp_path / 'run' / 'step_2'}")


# ----------------------------------------------------------------------------- runs


ODD = "Was kostet \N{EURO SIGN}5\N{RIGHTWARDS ARROW}小明\x81 \N{GRINNING FACE}?"


def odd_questions(folder):
    """Arguments of a run whose every sample has characters that few terminals can show."""
    rows = [{"question": f"{ODD} {i}", "answer": "8"} for i in range(8)]
    path = lines(folder / "odd.jsonl", rows)
    return [*SMALL, NO_MODEL, dataset(path), dataset(path, "eval_datasets"),
            "MAX_PROMPT_TOKENS=200"]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp932"])
def test_a_terminal_that_is_not_utf_8(tmp_path, monkeypatch, encoding):
    for name in ("stdout", "stderr"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding)
        monkeypatch.setattr(sys, name, stream)
        monkeypatch.setattr(sys, f"__{name}__", stream)
        with pytest.raises(UnicodeEncodeError):
            stream.write(ODD)
    run = train(tmp_path / "run", *odd_questions(tmp_path))
    sys.stdout.flush()
    printed = sys.stdout.buffer.getvalue().decode(encoding)
    assert printed.count("  Was kostet ") == 2 and "?" in printed  # steps 0 and 2
    assert f"  {ODD} 0\n" in (run / "step_2" / "samples.txt").read_text(encoding="utf-8")


def test_a_system_that_is_not_utf_8(tmp_path):
    """A whole run, as a user starts it, where all that is opened without an encoding is ASCII."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *odd_questions(tmp_path), f"OUTPUT_DIR={tmp_path / 'run'}"],
        capture_output=True, timeout=300, env=os.environ | {
            "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
            "LC_ALL": "C", "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr.decode("cp1252")[-2000:]
    assert "Was kostet \N{EURO SIGN}5???" in done.stdout.decode("cp1252")
    assert (tmp_path / "run" / "step_2" / "train_script.py").read_bytes() == SCRIPT.read_bytes()
    assert (tmp_path / "run" / "training_metrics.png").stat().st_size > 10_000


def start_together(folder, number, arguments):
    """Run the script; make the run's folder at the moment at which another process does, too."""
    gspo = import_file(SCRIPT)
    gspo.plot_metrics, make = lambda run: None, gspo.new_folder

    def new_folder():
        (folder / f"ready_{number}").touch()
        while len(list(folder.glob("ready_*"))) < 2:
            time.sleep(0.0005)
        return make()

    gspo.new_folder = new_folder
    gspo.main(arguments)


def test_two_runs_started_at_once(tmp_path):
    """Into one OUTPUT_DIR: two folders, each with a whole run of its own."""
    arguments = [*SMALL, NO_MODEL, *questions(tmp_path)]
    both = [fork(start_together, tmp_path / f"log_{seed}", tmp_path, seed,
                 [*arguments, f"SEED={seed}", f"OUTPUT_DIR={tmp_path / 'run'}"]) for seed in (1, 2)]
    for seed, process in zip((1, 2), both):
        process.join(120)
        assert process.exitcode == 0, (tmp_path / f"log_{seed}").read_text()
    seeds = set()
    for folder in (tmp_path / "run", tmp_path / "run_2"):
        facts = json.loads((folder / "step_2" / "constants.json").read_text())
        seed = facts["constants"]["SEED"]
        alone = train(tmp_path / f"alone_{seed}", *arguments, f"SEED={seed}")
        assert metrics(folder) == metrics(alone) and saved(folder) == ["epoch_0", "step_2"]
        assert_same_end(folder, alone, "step_2")
        seeds.add(seed)
    assert seeds == {1, 2} and not (tmp_path / "run_3").exists()


def test_a_folder_has_one_owner(embedded, tmp_path):
    """Also if many ask at once; one that is there, empty or a file, is somebody's."""
    embedded.OUTPUT_DIR = str(tmp_path / "new" / "run")
    (tmp_path / "new" / "run_3").mkdir(parents=True)
    (tmp_path / "new" / "run_5").write_text("a file")
    found, barrier = [], threading.Barrier(8)

    def ask():
        barrier.wait()
        found.append(embedded.new_folder().name)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == ["run", *(f"run_{i}" for i in (10, 2, 4, 6, 7, 8, 9))]


def test_home_stands_for_a_folder_everywhere(tmp_path, monkeypatch):
    """OUTPUT_DIR, both models, data, the reward file and RESUME_FROM, none of which makes "~"."""
    at = home(tmp_path / "home", monkeypatch)
    for name in ("policy", "reward_model"):
        shutil.copytree(ROOT / "data" / name, at / name)
    questions(at)
    (at / "reward.py").write_text(RANKS)
    train(Path("~/runs/{script}"), *SMALL, dataset("~/questions.jsonl"),
          dataset("~/quest*.jsonl", "eval_datasets"), "POLICY_MODEL=~/policy",
          "REWARD_MODEL=~/reward_model", "REWARD_FUNCTION=~/reward.py:score",
          "REWARD_WEIGHTS={'function': 1.0, 'model': 1.0}")
    train(Path("~/more"), "RESUME_FROM=~/runs/gspo/step_2", "MAX_STEPS=3")
    assert saved(at / "runs" / "gspo") == ["epoch_0", "step_2"] and saved(at / "more") == ["step_3"]
    assert (at / "more" / "reward.py").read_text() == RANKS
    assert not list((tmp_path / "elsewhere").iterdir()) and not (ROOT / "~").exists()


BESIDE = """
import json, pathlib
from mine_beside import weight
RIGHT = json.loads(pathlib.Path(__file__).with_name("table.json").read_text())["right"]

def score(questions, responses, references):
    return [weight * len(set(r)) % 5 + RIGHT * (a in r) for r, a in zip(responses, references)]
"""


def test_resumed_from_another_working_directory(tmp_path, monkeypatch):
    """Relative paths of data, models and the reward file (which imports and reads what lies beside
    it) lead to where they led when the run began, though the same names exist here, too."""
    begun, here = tmp_path / "begun", tmp_path / "here"
    for folder in (begun, here):
        questions(folder)
        (folder / "rewards").mkdir()
        (folder / "rewards" / "mine.py").write_text(BESIDE if folder == begun else "raise OSError")
        (folder / "rewards" / "mine_beside.py").write_text("weight = 1.5")
        (folder / "rewards" / "table.json").write_text('{"right": 1.0}')
    (here / "questions.jsonl").write_text('{"question": "What?", "answer": "1"}\n' * 8)
    for name in ("policy", "reward_model"):
        shutil.copytree(ROOT / "data" / name, begun / "models" / name)
        (here / "models" / name).mkdir(parents=True)
    arguments = [*SMALL, dataset("questions.jsonl"), dataset("quest*.jsonl", "eval_datasets"),
                 "POLICY_MODEL=models/policy", "REWARD_MODEL=models/reward_model",
                 "REWARD_FUNCTION=rewards/mine.py:score", "MAX_STEPS=3", "SAVE_EVERY=1",
                 "REWARD_WEIGHTS={'function': 1.0, 'model': 1.0}", "EVAL_EVERY=1"]
    monkeypatch.chdir(begun)
    alone = train(tmp_path / "alone", *arguments)
    monkeypatch.chdir(here)
    first = train(tmp_path / "first", f"RESUME_FROM={alone / 'step_1'}", "MAX_STEPS=2")
    monkeypatch.chdir(tmp_path)
    second = train(tmp_path / "second", "RESUME_FROM=first/step_2", "MAX_STEPS=3")
    assert metrics(second) == metrics(alone) and len(metrics(alone)) == 4
    assert metrics(first) == metrics(alone)[:3]
    assert_same_end(second, alone, "step_3")
    assert float(metrics(alone)[3]["rewards/function"]) > 0
    monkeypatch.chdir(here)  # what is new on the command line is looked for here, too
    (here / "rewards" / "new.py").write_text(RANKS)
    train(tmp_path / "third", f"RESUME_FROM={first / 'step_2'}", "MAX_STEPS=3",
          "REWARD_FUNCTION=rewards/new.py:score")


@pytest.mark.parametrize("device", ["cuda:1", "mps", "cpu"])
def test_resumed_on_another_device(whole, tmp_path, device):
    """A checkpoint of a machine with a GPU goes on where there is none: the device is not the
    checkpoint's, and its random numbers are no GPU's."""
    first = train(tmp_path / "first", *failing(tmp_path, 0), "MAX_STEPS=2")
    path = first / "step_2" / "constants.json"
    facts = json.loads(path.read_text())
    facts["constants"] |= {"DEVICE": device, "FROZEN_DEVICE": device}
    path.write_text(json.dumps(facts))
    further = ["DEVICE=cpu", "FROZEN_DEVICE=cpu"] * (device == "cuda:1")  # said, or by profile
    resumed = train(tmp_path / "resumed", f"RESUME_FROM={first / 'step_2'}", "MAX_STEPS=4",
                    *further)
    rows, expected = metrics(resumed), metrics(whole)
    assert rows == expected
    assert_same_end(resumed, whole, "epoch_1")


@pytest.mark.parametrize("given", [
    ["DEVICE=mps", "FROZEN_DEVICE=mps"], ["DEVICE=mps"], ["FROZEN_DEVICE=mps"], ["DEVICE=mps:0"],
    ["DEVICE=cuda"], ["DEVICE=xpu"], ["DEVICE=gpu"], ["DEVICE=CPU"], ["DEVICE="]])
def test_a_device_that_is_not_there(tmp_path, monkeypatch, given):
    monkeypatch.setattr(torch.mps, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    line = stopped(tmp_path / "run", *SMALL, NO_MODEL, *given)
    name, _, value = given[0].partition("=")
    assert f"{name}='{value}'" in line and "expected" in line
    assert not (tmp_path / "run").exists()


def test_apples_gpu_computes_in_float32(gspo, monkeypatch):
    """Where there is one; it was tried on none."""
    monkeypatch.setattr(torch.mps, "device_count", lambda: 1)
    gspo.configure([*SMALL, "DEVICE=mps", "FROZEN_DEVICE=mps"])
    assert (gspo.DEVICE, gspo.DTYPE) == ("mps", "float32")
    with pytest.raises(SystemExit, match="DTYPE"):
        gspo.configure([*SMALL, "DEVICE=mps", "DTYPE=bfloat16"])


def test_a_file_that_a_program_has_open(embedded, tmp_path, monkeypatch):
    """On Windows a table that a spreadsheet shows cannot be replaced: the run goes on."""
    path = tmp_path / "metrics.csv"
    embedded.put(path, lambda at: at.write_text("one"))
    with monkeypatch.context() as patch:
        def refuse(source, target):
            raise PermissionError(13, "in use")
        patch.setattr(os, "replace", refuse)
        embedded.put(path, lambda at: at.write_text("two"))
    assert path.read_text() == "one"
    embedded.put(path, lambda at: at.write_text("three"))
    assert path.read_text() == "three" and [p.name for p in tmp_path.iterdir()] == [path.name]
