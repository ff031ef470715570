"""data/convert.py: every form of a file gives the plain rows, and bad input one line."""

import bz2
import csv
import gzip
import io
import json
import os
import re
import subprocess
import sys
import zipfile
from decimal import Decimal

import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, import_file

convert = import_file(ROOT / "data" / "convert.py", "data_convert")

ROWS = [{"question": "Wie viel – 3€ + 4€?", "answer": "7"},
        {"question": "Say \"2, or\n3\": which is odd?", "answer": "3"},
        {"question": "1,000 - 1; and then?", "answer": "007"}]


def run(folder, *arguments):
    """The rows that the command writes, for names of files in a folder and NAME=VALUE."""
    files = [*(name for name in arguments if "=" not in name), "out.parquet"]
    convert.main([*(str(folder / name) for name in files), *(a for a in arguments if "=" in a)])
    table = pq.read_table(folder / "out.parquet")
    assert set(table.schema.types) == {pa.string()}
    return table.to_pylist()


def converted(folder, rows, *settings):
    """The rows that the command writes for rows in a JSON lines file."""
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run(folder, "in.jsonl", *settings, "overwrite=1")


def pairs(rows):
    """The questions and answers of rows."""
    return [(row["question"], row["answer"]) for row in rows]


def fails(*arguments):
    """The one line with which the command ends."""
    with pytest.raises(SystemExit) as stop:
        convert.main([str(argument) for argument in arguments])
    assert stop.value.code.startswith("error: ") and "\n" not in stop.value.code
    return stop.value.code


# ---- The files that people have


def test_dapo_math_17k(tmp_path, capsys):
    """The columns and types of BytedTsinghua-SIA/DAPO-Math-17k, whose rows stand there often."""
    texts = ["Solve it step by step.\n\nWhat is $2+2$?", "Solve it step by step.\n\nWhat is $3-5$?"]
    rows = [{"data_source": "math_dapo", "prompt": [{"content": text, "role": "user"}],
             "ability": "MATH", "extra_info": {"index": f"9a9b6eb4-{index}"},
             "reward_model": {"ground_truth": truth, "style": "rule-lighteval/MATH_v2"}}
            for index, (text, truth) in enumerate(zip(texts, ["4", "-2"]))] * 3
    message = pa.struct([("content", pa.string()), ("role", pa.string())])
    pq.write_table(pa.Table.from_pylist(rows, pa.schema([
        ("data_source", pa.string()), ("prompt", pa.list_(message)), ("ability", pa.string()),
        ("reward_model", pa.struct([("ground_truth", pa.string()), ("style", pa.string())])),
        ("extra_info", pa.struct([("index", pa.string())]))])), tmp_path / "dapo.parquet")
    expected = [{"question": texts[0], "answer": "4"}, {"question": texts[1], "answer": "-2"}]
    assert run(tmp_path, "dapo.parquet", "unique=0") == expected * 3
    assert capsys.readouterr().out == (
        f"{tmp_path / 'dapo.parquet'}: 6 rows; question=prompt, answer=reward_model.ground_truth; "
        "columns: data_source, prompt, ability, reward_model, extra_info; dropped: none\n"
        f"{tmp_path / 'out.parquet'}: 6 rows, 2 different; 6 answers are plain numbers\n"
        "  question: Solve it step by step. What is $2+2$?\n    answer: 4\n"
        "  question: Solve it step by step. What is $3-5$?\n    answer: -2\n"
        "  question: Solve it step by step. What is $2+2$?\n    answer: 4\n")
    assert run(tmp_path, "dapo.parquet", "unique=1", "overwrite=1") == expected


def test_gsm8k_of_verl(tmp_path):
    """The reference is the bare number; the original texts are in extra_info."""
    told = "Ann has 3 apples and buys 4. How many?"
    asked = told + " Let's think step by step and output the final answer after \"####\"."
    worked = "She has 3+4=<<3+4=7>>7.\n#### 7"
    pd.DataFrame([{
        "data_source": "openai/gsm8k", "prompt": [{"role": "user", "content": asked}],
        "ability": "math", "reward_model": {"style": "rule", "ground_truth": "7"},
        "extra_info": {"split": "train", "index": 0, "answer": worked, "question": told},
    }]).to_parquet(tmp_path / "gsm8k.parquet")
    assert run(tmp_path, "gsm8k.parquet") == [{"question": asked, "answer": "7"}]
    assert run(tmp_path, "gsm8k.parquet", "question=extra_info.question", "overwrite=1",
               "answer=extra_info.answer", "data_source=data_source", "index=extra_info.index") == [
        {"question": told, "answer": worked, "data_source": "openai/gsm8k", "index": "0"}]


def packed(name, data):
    """A zip archive with one file, and what macOS and Windows put beside it."""
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        archive.writestr("folder/", "")
        archive.writestr("folder/" + name, data)
        archive.writestr("__MACOSX/._" + name, b"\0\1")
    return file.getvalue()


def arrow(kind):
    """The rows as arrow, a file or a stream, which is what `datasets` keeps."""
    table, file = pa.Table.from_pylist(ROWS), io.BytesIO()
    with getattr(pa.ipc, f"new_{kind}")(file, table.schema) as writer:
        writer.write_table(table)
    return file.getvalue()


TABLE = pd.DataFrame(ROWS)
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
CSV = TABLE.to_csv(index=False)
FORMS = {
    "a.parquet": TABLE.to_parquet(), "file.arrow": arrow("file"), "stream.arrow": arrow("stream"),
    "a.jsonl": LINES, "lines.json": LINES, "mark.jsonl": LINES.encode("utf-8-sig"),
    "array.json": json.dumps(ROWS), "array.jsonl": json.dumps(ROWS, indent=2),
    "windows.jsonl": LINES.replace("\n", "\r\n"), "no_end.jsonl": LINES[:-1],
    "indented.json": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "key.json": json.dumps({"version": 1, "tags": ["a"], "data": ROWS}),
    "columns.json": TABLE.to_json(), "lists.json": json.dumps(TABLE.to_dict("list")),
    "a.csv": CSV, "windows.csv": CSV.replace("\n", "\r\n").replace("or\r\n3", "or\n3"),
    "mark.csv": CSV.encode("utf-8-sig"), "semicolon.csv": TABLE.to_csv(index=False, sep=";"),
    "a.tsv": TABLE.to_csv(index=False, sep="\t"),
    "quoted.csv": TABLE.to_csv(index=False, quoting=csv.QUOTE_ALL),
    "utf16.csv": CSV.encode("utf-16"), "utf16.jsonl": LINES.encode("utf-16"),
    "a.jsonl.gz": gzip.compress(LINES.encode()), "a.csv.bz2": bz2.compress(CSV.encode()),
    "two.jsonl.gz": b"".join(gzip.compress(line.encode()) for line in LINES.splitlines(True)),
    "a.jsonl.zst": pa.compress(LINES.encode(), "zstd", asbytes=True), "no_extension": LINES,
    "a.csv.zip": packed("a.csv", CSV.encode()), "p.zip": packed("p.parquet", TABLE.to_parquet()),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_rows(tmp_path, name):
    data = FORMS[name]
    (tmp_path / name).write_bytes(data.encode() if isinstance(data, str) else data)
    assert run(tmp_path, name) == ROWS


def test_feather(tmp_path):
    pa.feather.write_feather(TABLE, tmp_path / "a.feather")
    assert run(tmp_path, "a.feather") == ROWS


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16-le", "utf-8"])
def test_an_encoding_that_is_said(tmp_path, encoding):
    (tmp_path / "a.csv").write_bytes(CSV.encode(encoding))
    assert run(tmp_path, "a.csv", f"encoding={encoding}") == ROWS


def test_several_sources_and_patterns(tmp_path, capsys):
    """Each has names of its own; a name with brackets is itself before it is a pattern."""
    (tmp_path / "train[0].jsonl").write_text('{"problem": "a?", "solution": 1}')
    (tmp_path / "train0.jsonl").write_text('{"problem": "no?", "solution": 0}')
    for name in "4135":
        (tmp_path / f"b{name}.csv").write_text(f"Question,Correct Answer\n{name}?,{name}\n")
    (tmp_path / "b2.csv").write_text("prompt,target\n2?,2\n")
    assert pairs(run(tmp_path, "train[0].jsonl", "b*.csv")) == [
        ("a?", "1"), ("1?", "1"), ("2?", "2"), ("3?", "3"), ("4?", "4"), ("5?", "5")]
    assert "question=Question, answer=Correct Answer; columns:" in capsys.readouterr().out


def test_many_and_long_rows(tmp_path):
    """More rows than columns are guessed from, and more letters than the csv module wants."""
    rows = [(f"{i}? " + "long " * 40_000 * (i == 7), str(i)) for i in range(2_500)]
    pd.DataFrame(rows, columns=["question", "answer"]).to_csv(tmp_path / "a.csv", index=False)
    assert pairs(run(tmp_path, "a.csv", "unique=0")) == rows
    pd.DataFrame(rows, columns=["question", "answer"]).to_parquet(tmp_path / "a.parquet")
    assert pairs(run(tmp_path, "a.parquet", "overwrite=1")) == rows


def test_a_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "a.jsonl").write_text('{"question": "1+1?", "answer": 2}')
    convert.main(["~/a.jsonl", "~/out.parquet"])
    assert pq.read_table(tmp_path / "out.parquet").to_pylist() == [
        {"question": "1+1?", "answer": "2"}]


# ---- Numbers


def test_numbers_are_as_json_and_csv_write_them(tmp_path):
    numbers = ["0.7", "2.675", "19.95", "1.005", str(2**63 + 11), "-0.50", "1e3", "1E400", "5.0",
               "3.14159265358979323846", "-0"]
    (tmp_path / "a.jsonl").write_text("".join(
        f'{{"question": "{i}?", "answer": {number}}}\n' for i, number in enumerate(numbers)))
    (tmp_path / "a.csv").write_text("question,answer\n" + "".join(
        f"{i}?,{number}\n" for i, number in enumerate(numbers)))
    expected = [(f"{i}?", number) for i, number in enumerate(numbers)]
    assert pairs(run(tmp_path, "a.jsonl")) == expected
    assert pairs(run(tmp_path, "a.csv", "overwrite=1")) == expected


@pytest.mark.parametrize("values, expected", [
    (pa.array([800, None, 2**62 + 1]), ["800", str(2**62 + 1)]),                # Int64 with a gap
    (pa.array([2**64 - 1], pa.uint64()), [str(2**64 - 1)]),
    (pa.array([0.7, 2.5, 800.0], pa.float32()), ["0.7", "2.5", "800"]),
    (pa.array([800.0, None, float("nan"), 0.1]), ["800", "0.1"]),               # pandas' way of it
    (pa.array([Decimal("0.0000000"), Decimal("12.5000000")]), ["0.0000000", "12.5000000"]),
    (pa.array(["7", "8"]).dictionary_encode(), ["7", "8"]),
    (pa.array([b"7"]), ["7"]),
    (pa.array([["7"], ["8"]]), ["7", "8"]),                                # the only one in a list
], ids=["gap", "uint64", "float32", "float64", "decimal", "categories", "bytes", "lists"])
def test_numbers_of_parquet(tmp_path, values, expected):
    pq.write_table(pa.table({"question": ["how many?"] * len(values), "answer": values}),
                   tmp_path / "a.parquet")
    assert [row["answer"] for row in run(tmp_path, "a.parquet")] == expected


# ---- Messages

USER = {"role": "user", "content": "1+1?"}
SYSTEM = {"role": "system", "content": "End with \\boxed{}."}
SAID = {"role": "assistant", "content": "It is 2."}
PARTS = [{"type": "text", "text": "1"}, {"type": "text", "text": "+1?"}]


@pytest.mark.parametrize("row, question, answer", [
    ({"prompt": [USER], "answer": 2}, "1+1?", "2"),
    ({"prompt": [SYSTEM, USER], "answer": 2}, "End with \\boxed{}.\n\n1+1?", "2"),
    ({"prompt": [{"role": "system", "content": ""}, USER], "answer": 2}, "1+1?", "2"),
    ({"prompt": [USER | {"content": PARTS}], "answer": 2}, "1+1?", "2"),
    ({"prompt": [USER | {"content": ["1+", "1?"]}], "answer": 2}, "1+1?", "2"),
    ({"messages": [SYSTEM, USER, SAID]}, "End with \\boxed{}.\n\n1+1?", "It is 2."),
    ({"messages": [USER, SAID], "answer": 2}, "1+1?", "2"),
    ({"prompt": [USER], "completion": [SAID]}, "1+1?", "It is 2."),
    ({"conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "It is 2."}]},
     "1+1?", "It is 2."),
    ([{"from": "system", "value": "Add."}, {"from": "human", "value": "1+1?"},
      {"from": "gpt", "value": "It is 2."}], "Add.\n\n1+1?", "It is 2."),
    ({"prompt": json.dumps([USER]), "reward_model": '{"ground_truth": 0.70}'}, "1+1?", "0.70"),
    ({"prompt": str([SYSTEM, USER]), "answer": 2}, "End with \\boxed{}.\n\n1+1?", "2"),
    ({"prompt": "[{1, 2}] has how many?", "answer": '["1", '}, "[{1, 2}] has how many?", '["1", '),
])
def test_messages(tmp_path, row, question, answer):
    assert pairs(converted(tmp_path, [row, row])) == [(question, answer)] * 2
    (tmp_path / "one.json").write_text(json.dumps(row if isinstance(row, dict) else [row]))
    assert pairs(run(tmp_path, "one.json", "overwrite=1")) == [(question, answer)]


@pytest.mark.parametrize("messages, why", [
    ([USER, SAID, USER], "1 a chat that goes on with the user"),
    ([USER, SAID, USER, SAID], "1 a chat that goes on with the user"),
    ([USER, {"role": "tool", "content": "2"}], "1 a chat that goes on with the tool"),
    ([USER | {"content": [{"type": "image", "url": "a.png"}, *PARTS]}],
     "1 a message that is not only text"),
    ([SYSTEM | {"content": " "}, USER | {"content": None}], "1 no question"),
    ([SAID], "1 no question"), ([], "1 no question"), ("", "1 no question"),
    (None, "1 no question"), ({"a": 1}, "1 question is not one text: name what is in it, "
                                        "question=prompt.KEY or .0"),
])
def test_what_is_no_question_is_dropped_and_counted(tmp_path, capsys, messages, why):
    rows = [{"prompt": [USER], "answer": 2}, {"prompt": messages, "answer": 3}]
    assert pairs(converted(tmp_path, rows)) == [("1+1?", "2")]
    assert f"1 rows; question=prompt, answer=answer; columns: prompt, answer; dropped: {why}\n" in (
        capsys.readouterr().out)


def test_parts_as_arrow_has_them(tmp_path):
    """Every part has all the keys of any part."""
    pq.write_table(pa.Table.from_pylist([
        {"messages": [USER | {"content": [{"type": "text", "text": "1+1?", "image": None}]}, {
            "role": "assistant", "content": [{"type": "text", "text": "2", "image": None}]}]},
        {"messages": [USER | {"content": [{"type": "image", "text": None, "image": "x"}]}]}]),
        tmp_path / "a.parquet")
    assert pairs(run(tmp_path, "a.parquet")) == [("1+1?", "2")]


# ---- Columns


@pytest.mark.parametrize("row, question, answer", [
    ({"id": 1, "problem": "1+1?", "solution": "So \\boxed{2}"}, "1+1?", "So \\boxed{2}"),
    ({"problem": "1+1?", "solution": "So \\boxed{2}", "answer": "2"}, "1+1?", "2"),
    ({"prompt": None, "messages": [USER, SAID]}, "1+1?", "It is 2."),
    ({"instruction": "Add.", "input": "1 and 1", "output": "2"}, "Add.\n\n1 and 1", "2"),
    ({"instruction": "Add 1 and 1.", "input": "", "output": "2"}, "Add 1 and 1.", "2"),
    ({"instruction": "Add 1 and 1.", "response": "2"}, "Add 1 and 1.", "2"),
    ({"input": "1+1?", "target": 2}, "1+1?", "2"),
    ({"Question": "1+1?", "Final Answer": 2}, "1+1?", "2"),
    ({"question": "1+1?", "reward_model.ground_truth": 2, "answer": "no"}, "1+1?", "2"),
])
def test_usual_columns_are_found(tmp_path, row, question, answer):
    assert pairs(converted(tmp_path, [row])) == [(question, answer)]


@pytest.mark.parametrize("column, expected", [
    ("b", "plain"), ("a.b", "flat"), ("c.d.1.e", "2.50"), ("c.d.0", "1"), ("x+y", "sum"),
    ("b+a.b", "plain\n\nflat"), ("none+b+empty", "plain")])
def test_paths_and_sums(tmp_path, column, expected):
    (tmp_path / "a.jsonl").write_text(
        '{"q": "1+1?", "b": "plain", "a.b": "flat", "a": {"b": "deep"}, "x+y": "sum", '
        '"empty": " ", "none": null, "c": {"d": [1, {"e": 2.50}]}}')
    assert run(tmp_path, "a.jsonl", "question=q", f"answer={column}", "more=q") == [
        {"question": "1+1?", "answer": expected, "more": "1+1?"}]


def test_rows_lack_what_was_asked_for(tmp_path, capsys):
    rows = [{"question": "a?", "answer": 1, "teacher": "x"}, {"question": "b?", "answer": 2},
            {"question": "c?", "answer": None, "teacher": "y"},
            {"question": "d?", "answer": [1, 2], "teacher": "z"},
            {"answer": 5, "teacher": "z"}, {"question": "e?", "answer": "none", "teacher": "NA"}]
    assert converted(tmp_path, rows, "said=teacher") == [
        {"question": "a?", "answer": "1", "said": "x"},
        {"question": "e?", "answer": "none", "said": "NA"}]
    out = capsys.readouterr().out
    assert ("dropped: 1 no said, 1 no answer, 1 answer is not one text: name what is in it, "
            "answer=answer.KEY or .0, 1 no question\n") in out
    assert "1 answers are plain numbers; of others the verifier compares the last number\n" in out


@pytest.mark.parametrize("choices, lines", [
    (["0", "4", "2", "6"], "A. 0\nB. 4\nC. 2\nD. 6"),
    ({"label": ["A", "B"], "text": ["x", "y"]}, "A. x\nB. y"),
    ({"A": "x", "B": "y", "C": None}, "A. x\nB. y")])
def test_multiple_choice(tmp_path, choices, lines):
    """An index counts from 0, as in MMLU, also where it is the text of another choice."""
    rows = [{"question": "Which?", "choices": choices, "answer": answer} for answer in (1, "B", 0)]
    assert pairs(converted(tmp_path, rows)) == [
        ("Which?\n" + lines, "B"), ("Which?\n" + lines, "B"), ("Which?\n" + lines, "A")]
    assert pairs(converted(tmp_path, rows, "choices="))[0] == ("Which?", "1")


# ---- What goes wrong


@pytest.mark.parametrize("data, settings, words", [
    (b"", [], "found no text, expected parquet, arrow, CSV or JSON"),
    (b"[]", [], "found no rows"),
    (b"[1, 2]", [], "found no rows, expected a table, or JSON objects"),
    (b'{"question": "1+1?", "answer": 2}\n{"question": ', [], "line 2 column 14"),
    (b'{"train": [{"a": 1}], "test": [{"a": 2}]}', [], "columns: train, test"),
    (b"PAR1 and then something else", [], "expected a whole parquet, arrow, CSV or JSON file"),
    (gzip.compress(b"question,answer\n1+1?,2\n" * 99)[:-20], [], "Truncated"),
    (packed("a.csv", CSV.encode())[:-30], [], "BadZipFile"),
    ("question,answer\nwie groß?,2\n".encode("cp1252"), [], "or as encoding=cp1252 says"),
    ("question,answer\n1+1?,2\n".encode("utf-16-le"), [], "found no text"),
    (b"question,answer\n1,5?,2\n", [], "found 3 fields in line 2, expected 2"),
    (b"question,answer\n1+1?\n", [], "found 1 fields in line 2, expected 2"),
    (b'question,answer\n"1+1?,2\n3?,4\n', [], "unexpected end of data"),
    (b"text,label\n1+1?,2\n", [],
     "found no question, expected question=COLUMN; columns: text, label"),
    (b"question,text\n1+1?,2\n", [], "found no answer, expected answer=COLUMN"),
    (b"question,answer\n1+1?,2\n", ["answer=anwser"],
     "found no row that can be used: question=question, answer=anwser; columns: question, answer; "
     "dropped: 1 no answer"),
    (b"question,answer\n1+1?,2\n", ["encoding=latin-17"], "unknown encoding: latin-17"),
    (b'{"question": "?", "choices": ["x", "y"], "answer": 2}', [],
     "found the answer '2' to 2 choices, expected a letter or an index from 0"),
])
def test_bad_input_is_one_line_that_says_what_to_do(tmp_path, data, settings, words):
    (tmp_path / "in").write_bytes(data)
    line = fails(tmp_path / "in", tmp_path / "out.parquet", *settings)
    assert words in line and line.startswith(f"error: {tmp_path / 'in'}: ")
    assert os.listdir(tmp_path) == ["in"]


def test_an_excel_workbook(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.xlsx", "w") as archive:
        archive.writestr("[Content_Types].xml", "<Types/>")
    assert "found an Excel workbook" in fails(tmp_path / "a.xlsx", tmp_path / "out.parquet")


def test_bad_arguments(tmp_path):
    (tmp_path / "a.csv").write_text(CSV, encoding="utf-8")
    usage = "expected SOURCE [SOURCE ...] TARGET.parquet"
    assert usage in fails() and usage in fails(tmp_path / "a.csv")
    assert usage in fails(tmp_path / "a.csv", tmp_path / "out.csv")
    assert "found no such folder" in fails(tmp_path / "a.csv", tmp_path / "no" / "out.parquet")
    assert "No such file" in fails(tmp_path / "no*.csv", tmp_path / "out.parquet")
    assert os.listdir(tmp_path) == ["a.csv"]


def test_nothing_is_overwritten_unless_it_is_asked_for(tmp_path):
    (tmp_path / "a.csv").write_text(CSV, encoding="utf-8")
    target = tmp_path / "out.parquet"
    target.write_bytes(b"before")
    for last in ([], ["overwrite=0"]):
        assert "expected a new name or overwrite=1" in fails(tmp_path / "a.csv", target, *last)
        assert target.read_bytes() == b"before"
    assert run(tmp_path, "a.csv", "overwrite=1") == ROWS
    assert run(tmp_path, "out.parquet", "overwrite=1") == ROWS  # onto itself


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    def fill_the_disk(table, path):
        open(path, "wb").write(b"PAR1")
        raise OSError("No space left on device")

    (tmp_path / "a.csv").write_text(CSV, encoding="utf-8")
    (tmp_path / "out.parquet").write_bytes(b"before")
    monkeypatch.setattr(convert.pq, "write_table", fill_the_disk)
    line = fails(tmp_path / "a.csv", tmp_path / "out.parquet", "overwrite=1")
    assert "No space left on device" in line
    assert sorted(os.listdir(tmp_path)) == ["a.csv", "out.parquet"]
    assert (tmp_path / "out.parquet").read_bytes() == b"before"


def test_the_command(tmp_path):
    """On a terminal that cannot write the texts; status 1 and one line when it fails."""
    (tmp_path / "zh.jsonl").write_text('{"question": "小明有9个?", "answer": 9}', encoding="utf-8")

    def call(*arguments):
        return subprocess.run([sys.executable, ROOT / "data" / "convert.py", *arguments],
                              cwd=tmp_path, env=os.environ | {"PYTHONIOENCODING": "ascii"},
                              capture_output=True, text=True, timeout=60)

    done = call("zh.jsonl", "out.parquet")
    assert (done.returncode, done.stderr) == (0, "") and "question: ???9??" in done.stdout
    assert pq.read_table(tmp_path / "out.parquet").to_pylist() == [
        {"question": "小明有9个?", "answer": "9"}]
    done = call("zh.jsonl", "out.parquet")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"error: out\.parquet: found a file there, .*\n", done.stderr)


def test_the_scripts_read_what_it_writes(tmp_path, gspo):
    class Words:
        def apply_chat_template(self, messages, **options):
            return {"input_ids": [[*message[0]["content"].encode()] for message in messages]}

    (tmp_path / "a.jsonl").write_text(LINES, encoding="utf-8")
    run(tmp_path, "a.jsonl")
    gspo.train_datasets = [{"path": str(tmp_path / "out.parquet"), "type": "parquet",
                            "input": "question", "output": "answer"}]
    assert pairs(gspo.load_rows("train_datasets", Words())) == pairs(ROWS)
