"""Turn files of questions in any usual form into the plain parquet that the scripts read.

    python data/convert.py SOURCE [SOURCE ...] TARGET.parquet [question=COLUMN] [answer=COLUMN]
        [NAME=COLUMN ...] [choices=COLUMN] [encoding=cp1252] [unique=1] [overwrite=1]

SOURCE: parquet, arrow, CSV, TSV or JSON, plain or in gz, bz2, zst or zip. TARGET: the text columns
`question`, `answer` and each NAME, of the rows that have all of them. COLUMN: a name, a path
(reward_model.ground_truth, solutions.0) or several (instruction+input); usual ones are guessed.
unique=1 keeps one of equal rows.

Messages: what comes before the assistant's is the question. A system message is its first
paragraph, as it often says in what form to answer. (The scripts read such a column too, and keep
the roles.) Where no column has the answer, it is what the assistant says. A chat in which the user
speaks again, or with pictures or tools, is dropped.

Choices follow the question as lettered lines, and an answer that is an index, from 0, becomes a
letter; choices= leaves them out.
"""

import ast
import csv
import glob
import io
import json
import os
import re
import sys
import zipfile
from collections import Counter
from contextlib import suppress
from itertools import chain, islice

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

NAMES = {  # the usual names of columns in lower case, the likeliest first
    "question": ["question", "problem", "prompt", "query", "instruction+input", "messages",
                 "conversations", "conversation"],
    "answer": ["reward_model.ground_truth", "answer", "final_answer", "correct_answer", "answerkey",
               "expected_answer", "ground_truth", "target", "solution", "output", "response",
               "completion", "label", "messages", "conversations", "conversation"],
    "choices": ["choices", "options"]}
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
         "model": "assistant", "developer": "system"}
PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"(\xb5/\xfd": "zstd"}
EXACT = json.JSONDecoder(parse_float=str, parse_int=str, parse_constant=lambda name: None)


class Dropped(Exception):
    """Why a row cannot be used."""


def read(file, encoding):
    """Yield the rows of a binary file as dicts; its first bytes tell what it is, not its name."""
    head = file.read(8)
    file.seek(0)
    if packed := next((PACKED[magic] for magic in PACKED if head.startswith(magic)), None):
        yield from read(io.BytesIO(pa.CompressedInputStream(file, packed).read()), encoding)
    elif head.startswith(b"PK\3\4"):
        archive = zipfile.ZipFile(file)
        for name in archive.namelist():
            if name == "[Content_Types].xml":
                raise ValueError("found an Excel workbook, expected a table: save it as CSV UTF-8")
            if not name.endswith("/") and not name.startswith("__MACOSX"):
                yield from read(io.BytesIO(archive.read(name)), encoding)
    elif head.startswith(b"PAR1"):
        yield from arrow_rows(pq.ParquetFile(file).iter_batches(1024))
    elif head.startswith(b"ARROW1"):
        yield from arrow_rows(pa.ipc.open_file(file).read_all().to_batches(1024))
    elif head.startswith(b"\xff\xff\xff\xff"):
        yield from arrow_rows(pa.ipc.open_stream(file))
    else:
        coding = "utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8"
        text = file.read().decode(encoding or coding).lstrip("\N{BYTE ORDER MARK}\r\n ")
        if not text or "\0" in text[:1000]:
            raise ValueError("found no text, expected parquet, arrow, CSV or JSON")
        yield from json_rows(text) if text[0] in "[{" else csv_rows(text)


def arrow_rows(batches):
    """The rows of arrow batches. Floats become text here: in Python a 32-bit 0.7 would be
    0.699999988079071, and 800 would be 800.0 in a column that pandas made float for a gap."""
    for batch in batches:
        yield from batch.cast(pa.schema([
            (field.name, pa.string() if pa.types.is_floating(field.type) else field.type)
            for field in batch.schema])).to_pylist()


def json_rows(text):
    """The rows of a JSON text: an array, objects one after the other, columns, or under a key."""
    values, end, blank = [], 0, re.compile(r"\s*")
    while (start := blank.match(text, end).end()) < len(text):
        value, end = EXACT.raw_decode(text, start)
        values.append(value)
    if len(values) > 1 or not isinstance(values[0], dict):
        return values if len(values) > 1 else values[0]
    parts = list(values[0].values())
    lists = [part for part in parts if isinstance(part, list) and part and type(part[0]) is dict]
    if len(lists) == 1 and not messages_in(lists[0]):
        return lists[0]
    if lists or not all(isinstance(part, (dict, list)) for part in parts):
        return values
    return pd.DataFrame(values[0], dtype=object).to_dict("records")


def csv_rows(text):
    """The rows of a CSV text, separated by what its first line has most of."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True,
                        delimiter=max(",;\t|", key=text.partition("\n")[0].count))
    header = next(reader)
    for fields in filter(None, reader):
        if len(fields) != len(header):
            raise ValueError(f"found {len(fields)} fields in line {reader.line_num}, expected "
                             f"{len(header)} as in the first; quote texts with a separator inside")
        yield dict(zip(header, fields))


def opened(value):
    """A list or dict that a file holds as text, as JSON or as Python prints it; or the value."""
    if isinstance(value, str) and re.match(r"\s*[\[{]\s*[\[{\"']", value):
        for parse in (EXACT.decode, ast.literal_eval):
            with suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
                return parse(value)
    return value


def look(row, column):
    """The value at a column or path, or of several columns joined by +; or None."""
    if isinstance(row, dict) and column in row:
        return row[column]
    if "+" in column:
        texts = [look(row, part) for part in column.split("+")]
        return "\n\n".join(text for text in texts if isinstance(text, str) and text.strip())
    for part in column.split("."):
        row = opened(row)
        row = dict(zip(map(str, range(len(row))), row)) if isinstance(row, list) else row
        row = row.get(part) if isinstance(row, dict) else None
    return row


def guess(sample, names):
    """The first of the usual names under which a row of the sample has something, or None."""
    spelt = {name.strip().lower().replace(" ", "_"): name for row in sample for name in row}
    columns = (re.sub(r"\w+", lambda part: spelt.get(part[0], part[0]), name) for name in names)
    return next((column for column in columns for row in sample
                 if look(row, column) not in (None, "", [])), None)


def messages_in(value):
    """A value as a list of messages, or None."""
    value = opened(value)
    chat = isinstance(value, list) and value and all(
        isinstance(message, dict) and {"role", "from"} & message.keys() for message in value)
    return value if chat else None


def chat_texts(messages):
    """What is said before the assistant speaks, and what the assistant says; or Dropped."""
    before, after = [], []
    for message in messages:
        role = str(message.get("role") or message.get("from")).lower()
        role, body = ROLES.get(role, role), message.get("content") or message.get("value") or ""
        parts = [part if isinstance(part, dict) else {"text": str(part)}
                 for part in (body if isinstance(body, list) else [body])]
        if any((part.get("type") or "text") != "text" for part in parts):
            raise Dropped("a message that is not only text")
        if role not in ("system", "user", "assistant") or role == "user" and after:
            raise Dropped(f"a chat that goes on with the {role}")
        (after if after or role == "assistant" else before).append(
            "".join(part.get("text") or "" for part in parts))
    return ["\n\n".join(filter(str.strip, texts)) for texts in (before, after)]


def text_of(row, column, name):
    """The text of a row's column, or Dropped."""
    value = look(row, column)
    while isinstance(value, list) and len(value) == 1 and not isinstance(value[0], dict):
        value = value[0]
    if messages := messages_in(value):
        value = chat_texts(messages)[name != "question"]
    value = value.decode() if isinstance(value, bytes) else value
    if isinstance(value, (dict, list)) and value:
        raise Dropped(f"{name} is not one text: name what is in it, {name}={column}.KEY or .0")
    text = f"{value:f}" if hasattr(value, "as_tuple") else str(value)  # Decimal: 0 would be 0E-10
    if value in (None, [], {}) or text.strip() in ("", "nan"):
        raise Dropped(f"no {name}")
    return text


def with_choices(row, choices):
    """A row of texts with the choices in its question, and a letter as its answer."""
    choices = opened(choices) or {}
    if isinstance(choices, list):
        choices = dict(zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", choices))
    elif "label" in choices:
        choices = dict(zip(choices["label"], choices["text"]))
    letter = dict(zip("0123456789", choices)) | dict(zip(choices, choices))
    if row["answer"] not in letter:
        raise ValueError(f"found the answer {row['answer']!r} to {len(choices)} choices, expected "
                         "a letter or an index from 0; choices= leaves the choices out")
    lines = [f"{name}. {choice}" for name, choice in choices.items() if choice is not None]
    return row | {"question": "\n".join([row["question"], *lines]),
                  "answer": letter[row["answer"]]}


def texts_of(path, columns, encoding):
    """The rows of a file as dicts of texts; says what was taken, and what dropped and why."""
    rows, dropped, same = [], Counter(), {}  # `same`: equal texts share their memory
    with open(path, "rb") as file:
        found = ({"messages": row} if messages_in(row) else row for row in read(file, encoding))
        sample = list(islice(found, 100))
        if not sample or not all(isinstance(row, dict) for row in sample):
            raise ValueError("found no rows, expected a table, or JSON objects")
        columns = {name: guess(sample, NAMES[name]) for name in NAMES} | columns
        said = f"columns: {', '.join(dict.fromkeys(chain(*sample)))[:300]}"
        if missing := [name for name in columns if not columns[name] and name != "choices"]:
            raise ValueError(f"found no {missing[0]}, expected {missing[0]}=COLUMN; {said}")
        said = "; ".join([", ".join(f"{name}={columns[name]}" for name in columns if columns[name]),
                          said])
        choices = columns.pop("choices")
        for row in chain(sample, found):
            try:
                texts = {name: text_of(row, columns[name], name) for name in columns}
                texts = with_choices(texts, look(row, choices)) if choices else texts
                rows.append({name: same.setdefault(text, text) for name, text in texts.items()})
            except Dropped as reason:
                dropped[str(reason)] += 1
    reasons = ", ".join(f"{dropped[why]:,} {why}" for why in dropped)
    said += f"; dropped: {reasons or 'none'}"
    if not rows:
        raise ValueError(f"found no row that can be used: {said}")
    print(f"{path}: {len(rows):,} rows; {said}")
    return rows


def main(arguments):
    """Read, convert and write; or say in one line why not, with exit status 1."""
    if {"-h", "--help"} & {*arguments}:
        raise SystemExit(print(__doc__))
    settings = [argument for argument in arguments
                if re.match(r"\w+=", argument) and not os.path.exists(argument)]
    columns = dict(setting.split("=", 1) for setting in settings)
    encoding, unique, overwrite = (columns.pop(name, "") for name in
                                   ("encoding", "unique", "overwrite"))
    paths = [os.path.expanduser(path) for path in arguments if path not in settings]
    at = target = paths[-1] if paths else "no arguments"
    temporary, rows = f"{target}.{os.getpid()}", []
    try:
        if len(paths) < 2 or not target.endswith(".parquet"):
            raise ValueError("expected SOURCE [SOURCE ...] TARGET.parquet [NAME=COLUMN ...]")
        if not os.path.isdir(os.path.dirname(target) or "."):
            raise ValueError("found no such folder, expected one that is there")
        if os.path.exists(target) and overwrite != "1":
            raise ValueError("found a file there, expected a new name or overwrite=1")
        for path in paths[:-1]:
            for at in [path] if os.path.exists(path) else sorted(glob.glob(path)) or [path]:
                rows += texts_of(at, columns, encoding)
        at, different = target, {tuple(row.values()): row for row in rows}
        rows = list(different.values()) if unique == "1" else rows
        pq.write_table(pa.table({name: pa.array([row[name] for row in rows], pa.string())
                                 for name in rows[0]}), temporary)
        os.replace(temporary, target)
    except Exception as error:  # files and libraries raise anything
        words = " ".join(str(error).split())[:600]
        raise SystemExit(f"error: {at}: {words}" if type(error) is ValueError else
                         f"error: {at}: {type(error).__name__}: {words}; expected a whole parquet, "
                         "arrow, CSV or JSON file, in UTF-8 or as encoding=cp1252 says") from None
    finally:
        with suppress(OSError):
            os.remove(temporary)
    plain = sum(bool(re.fullmatch(r"[-+]?[\d,]*\.?\d+", row["answer"].strip())) for row in rows)
    print(f"{target}: {len(rows):,} rows, {len(different):,} different; {plain:,} answers are plain"
          " numbers" + "; of others the verifier compares the last number" * (plain < len(rows)))
    for row in rows[:3]:
        print("  " + "\n    ".join(f"{name}: {' '.join(text.split())[:90]}"
                                  for name, text in row.items()))


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal's encoding cannot stop it
    main(sys.argv[1:])
