"""Bad input and bad luck: one line that helps, exit status 1, and nothing lost.

Nearly all cases run `main` in this process. `refused` turns what it leaves behind into what a shell
would show, and holds for every case: the only line on standard error starts with "error: " and
says what is expected, no earlier file changed, and no model weights were loaded where the mistake
is visible without them.
"""

import json
import os
import re
import shutil

import pandas as pd
import pytest
import torch
from conftest import ROOT, SCRIPT, import_file, run_script

SMALL = ["PROFILE=embedded", "DEVICE=cpu", "BATCH_SIZE=2", "GROUP_SIZE=4", "MINIBATCH=8",
         "MICRO_BATCH=8", "MAX_STEPS=2", "EVAL_QUESTIONS=4", "SHOW_SAMPLES=1"]
NO_MODEL = "REWARD_WEIGHTS={'verifier': 1.0}"  # saves loading the reward model where it is no help
POLICY = ROOT / "data" / "policy"


def tree(folder):
    """Every file below a folder with its bytes, and every folder with None."""
    return {p.relative_to(folder): p.read_bytes() if p.is_file() else None
            for p in folder.rglob("*")}


def lines_of(text):
    """The lines of a terminal's text, less the progress bars."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", text)]
    return [line for line in lines if line and not re.match(r"(\w+: )?\s*\d+%\|", line)]


@pytest.fixture
def refused(gspo, tmp_path, capfd, monkeypatch):
    """refused(*arguments, says=[...]) runs main, holds it to all of the above, returns the line.

    `loaded`: which classes may have loaded weights by then; none is the rule. `prints`: lines that
    stand on standard output by then.
    """
    weights, load = [], gspo.load

    def recording(kind, *arguments, **options):
        if kind.__name__.startswith("AutoModel"):
            weights.append(kind.__name__)
        return load(kind, *arguments, **options)

    monkeypatch.setattr(gspo, "load", recording)
    earlier = tmp_path / "runs" / "run"
    earlier.mkdir(parents=True)
    (earlier / "metrics.csv").write_text("an earlier run's\n")

    def check(*arguments, says, loaded=(), prints=()):
        before = tree(tmp_path)
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            gspo.main([*SMALL, NO_MODEL, f"OUTPUT_DIR={earlier}", *arguments])
        # The interpreter prints a message of SystemExit to standard error and exits with 1.
        assert isinstance(stop.value.code, str), f"exit status {stop.value.code}"
        printed = capfd.readouterr()
        lines = [*lines_of(printed.err), *stop.value.code.split("\n")]
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ") and "expected " in lines[0]
        assert set(prints) <= set(lines_of(printed.out))
        for words in says:
            assert words in lines[0], f"{words!r} is not in {lines[0]!r}"
        assert set(weights) <= set(loaded), f"{weights} loaded before: {lines[0]}"
        after = tree(tmp_path)
        assert {path: after.get(path, "gone") for path in before} == before
        if not loaded:
            assert set(after) == set(before), "it left files or folders behind"
        assert tree(earlier) == {next(iter(tree(earlier))): b"an earlier run's\n"}
        return lines[0]

    return check


def dataset(path, kind="parquet", question="question", answer="answer", constant="train_datasets"):
    """An argument that makes `path` the data."""
    entry = {"path": str(path), "type": kind, "input": question, "output": answer}
    return f"{constant}={[entry]!r}"


def parquet(path, questions, answers):
    """Write a table of questions and answers; returns its path."""
    pd.DataFrame({"question": questions, "answer": answers}).to_parquet(path)
    return path


# ---- As the shell shows it


@pytest.mark.parametrize("arguments, says", [
    (["GROUP_SISE=8"], ["'GROUP_SISE=8' is not NAME=VALUE; expected one of PROFILE, ", "SEED"]),
    (["LEARNING_RATE=1e30", NO_MODEL], ["step 1", "expected finite gradients", "lower"]),
], ids=["before anything runs", "in the middle of a run"])
def test_the_shell_sees_one_line_and_status_1(tmp_path, arguments, says):
    out = tmp_path / "run"
    done = run_script(*SMALL, f"OUTPUT_DIR={out}", *arguments)
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    lines = lines_of(done.stderr)
    assert len(lines) == 1 and lines[0].startswith("error: ")
    assert done.stderr.rstrip().split("\n")[-1] == lines[0]  # alone, not behind a progress bar
    for words in says:
        assert words in lines[0]
    assert "error" not in done.stdout


# ---- Constants


@pytest.mark.parametrize("argument", [
    "GROUPSIZE=4", "group_size=4", "--seed=3", "GROUP_SIZE", "xyzzy=1", "=", "",
    "main=1", "RULES="])  # globals, but no constants
def test_unknown_constant(refused, gspo, argument):
    line = refused(argument, says=[repr(argument), "NAME=VALUE"])
    listed = line.partition("expected one of ")[2].split(", ")
    assert set(listed) == set(gspo.DEFAULTS) and len(listed) > 40


@pytest.mark.parametrize("argument, found, expected", [
    ("GROUP_SIZE=four", "str", "int"),
    ("GROUP_SIZE=", "str", "int"),
    ("GROUP_SIZE=2.5", "float", "int"),
    ("GROUP_SIZE=True", "bool", "int"),
    ("GROUP_SIZE=1e999", "", "int"),  # Python reads infinity
    ("LEARNING_RATE=fast", "str", "float"),
    ("LEARNING_RATE=None", "NoneType", "float"),
    ("LEARNING_RATE=1e999", "", "float"),
    ("LEARNING_RATE={[]: 1}", "", "float"),  # not even a literal
    ("ADAPTIVE_KL=yes", "str", "bool"),
    ("ADAPTIVE_KL=1", "int", "bool"),
    ("CLIP_RANGE=narrow", "str", "(0.0003, 0.0004)"),
    ("CLIP_RANGE=True", "bool", "(0.0003, 0.0004)"),
    ("ADAM_BETAS=0.9", "float", "tuple"),
    ("REWARD_WEIGHTS=1.0", "float", "dict"),
    ("REWARD_WEIGHTS=['model']", "list", "dict"),
    ("train_datasets=data/train.parquet", "str", "list"),
])
def test_ill_typed_constant(refused, argument, found, expected):
    refused(argument, says=[argument.partition("=")[0], found, "expected", expected])


@pytest.mark.parametrize("argument, says", [
    ("MINIBATCH=3", ["BATCH_SIZE=2", "GROUP_SIZE=4", "BATCH_SIZE * GROUP_SIZE % MINIBATCH == 0"]),
    ("MINIBATCH=16", ["BATCH_SIZE * GROUP_SIZE % MINIBATCH == 0"]),
    ("MINIBATCH=6 & GROUP_SIZE=4 & BATCH_SIZE=3", ["MINIBATCH // processes % GROUP_SIZE"]),
    ("ADAM_BETAS=(0.9,)", []), ("ADAM_BETAS=0.9", []), ("ADAM_BETAS=('a', 'b')", []),
    ("CLIP_RANGE=(0.1, 0.2, 0.3)", ["clip_range()"]), ("CLIP_RANGE=('low', 'high')", []),
    ("ADVANTAGE_TYPE=absolute", ["relative", "normalized"]),
    ("USE_SEQUENCE_LEVEL_REWARD=False", ["or USE_TOKEN_LEVEL_LOSS", "only GSPO-token"]),
    ("PROFILE=gpu", ["embedded", "full"]), ("DTYPE=float16", ["float32", "bfloat16"]),
    ("DEVICE=gpu", ["cpu", "cuda"]), ("DEVICE=cuda:x", ["cpu", "cuda"]),
    ("REWARD_WEIGHTS={}", ['"model", "verifier", "function"']),
    ("REWARD_WEIGHTS={'model': 0.0}", ["any("]),
    ("REWARD_WEIGHTS={'judge': 1.0}", ['"model", "verifier", "function"']),
    ("REWARD_WEIGHTS={'model': 'a'}", ["isfinite"]),
    ("REWARD_WEIGHTS={'verifier': 1.0, 'model': None}", ["isfinite"]),
    ("REWARD_WEIGHTS={'function': 1.0}", ["REWARD_FUNCTION=''", "a file and a weight"]),
    ("REWARD_FUNCTION=reward.py:score", ["REWARD_FUNCTION='reward.py:score'", "a weight"]),
])
def test_constants_that_cannot_work(refused, argument, says):
    """The line has the rule that does not hold, and what stands in it of the constants."""
    refused(*argument.split(" & "), says=[f"{argument.partition('=')[0]}=", "expected", *says])


# Just outside of what each number may be: the rules are of no use where one is missing.
BELOW = {"at least 1": ("BATCH_SIZE MAX_NEW_TOKENS MAX_PROMPT_TOKENS MINIBATCH MICRO_BATCH "
                        "NUM_EPOCHS EVAL_BATCH REWARD_BATCH LOGITS_AT_ONCE LORA_ALPHA GSPO_EPOCHS",
                        ["0", "-1"]),
         "at least 2": ("GROUP_SIZE", ["1", "0", "-4"]),
         "at least 0": ("MAX_STEPS EVAL_EVERY EVAL_QUESTIONS SAVE_EVERY SHOW_SAMPLES WARMUP_STEPS "
                        "THREADS LORA_RANK SEED STD_CORRECTION LEARNING_RATE WEIGHT_DECAY "
                        "ADAM_EPSILON MAX_GRAD_NORM EVAL_TEMPERATURE ADVANTAGE_EPSILON "
                        "ENTROPY_COEF KL_COEF TARGET_KL", ["-1"]),
         "in between": ("CLIP_RANGE", ["0", "-0.2", "(0.2, 0.0)", "(1.5, 0.2)"]),
         "the betas": ("ADAM_BETAS", ["(0.9, 1.0)", "(-0.1, 0.9)"]),
         "and": ("MAX_REWARD_TOKENS", ["7"]), "or": ("TEMPERATURE", ["0", "1e-50"]),
         "at most": ("SEED", ["1e30"])}
# Python reads 1e999 as infinity.
INFINITE = {"": ("LEARNING_RATE WEIGHT_DECAY ADAM_EPSILON MAX_GRAD_NORM EVAL_TEMPERATURE "
                 "ADVANTAGE_EPSILON ENTROPY_COEF KL_COEF TARGET_KL TEMPERATURE CLIP_RANGE SEED "
                 "GROUP_SIZE", ["1e999", "-1e999"]),
            "pairs": ("ADAM_BETAS", ["(0.2, 1e999)", "(1e999, 0.2)"]),
            "weights": ("REWARD_WEIGHTS", ["{'verifier': 1e999}", "{'verifier': -1e999}"])}


# A std that divides by nothing, or less; a range that a checkpoint cannot give back.
MORE = {"one of": ("STD_CORRECTION", ["2", "5"]), "pairs": ("CLIP_RANGE", ["(0.2, 1e999)"])}


@pytest.mark.parametrize("outside", [BELOW, INFINITE, MORE])
def test_every_number_has_its_range(gspo, outside):
    """Outside of it: one line, which names the constant; at its edge it is accepted."""
    tried = set()
    for names, values in outside.values():
        for name, value in ((name, value) for name in names.split() for value in values):
            with pytest.raises(SystemExit) as stop:
                gspo.configure([*SMALL, NO_MODEL, f"{name}={value}"])
            line = stop.value.code
            assert line.startswith("error: ") and "\n" not in line and "expected" in line
            assert f"{name}=" in line, line
            tried.add(name)
    numbers = {name for name, value in gspo.resolve(gspo.DEFAULTS, "full").items()
               if type(value) in (int, float)}
    if outside is BELOW:
        assert numbers <= tried
        edge = ["LEARNING_RATE=0", "TEMPERATURE=0.01", "MICRO_BATCH=1", "MAX_NEW_TOKENS=1",
                "CLIP_RANGE=1.0", "ADAM_BETAS=(0, 0)", "STD_CORRECTION=0", "EVAL_TEMPERATURE=0"]
        gspo.configure([*SMALL, NO_MODEL, *edge])
        assert (gspo.LEARNING_RATE, gspo.CLIP_RANGE, gspo.ADAM_BETAS) == (0.0, 1.0, (0, 0))


@pytest.mark.parametrize("constant", ["DEVICE", "FROZEN_DEVICE"])
@pytest.mark.parametrize("gpus, device, there", [
    (0, "cuda", False), (0, "cuda:1", False), (1, "cuda:1", False), (1, "cuda", True),
    (2, "cuda:1", True), (0, "cpu", True)])
def test_a_gpu_that_is_not_there(gspo, monkeypatch, constant, gpus, device, there):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    arguments = [*SMALL, NO_MODEL, f"{constant}={device}"]
    if there:
        gspo.configure(arguments)
        assert vars(gspo)[constant] == device
    else:
        with pytest.raises(SystemExit) as stop:
            gspo.configure(arguments)
        other = {"DEVICE", "FROZEN_DEVICE"} - {constant}
        for words in (f"{constant}='{device}'", f"{other.pop()}='cpu'",
                      "expected all(int(d[5:] or 0) < torch.cuda.device_count()"):
            assert words in stop.value.code and "\n" not in stop.value.code


# ---- Data


FORMS = ("expected parquet or json with text in the columns question, answer; "
         "see data/convert.py, or `hf download` it")


@pytest.mark.parametrize("constant", ["train_datasets", "eval_datasets"])
@pytest.mark.parametrize("name", ["nowhere.parquet", "nowhere.jsonl", "nowhere/*.parquet"])
def test_missing_file(refused, tmp_path, constant, name):
    path = tmp_path / name
    refused(dataset(path, kind=name.split(".")[1], constant=constant),
            says=[f"error: {constant}: {path}: FileNotFoundError: ", FORMS])


@pytest.mark.parametrize("kind, content", [
    ("parquet", b"question,answer\n1,2\n"), ("json", b"{"), ("jsonl", b"not json\n"),
    ("jsonl", b"\xff\xfe\x00"), ("json", b""), ("json", b"3"), ("jsonl", b""), ("json", b"[]"),
    ("json", b"[3]"), ("jsonl", b"null"), ("json", b'{"question": {"a": "1+1?"}, "answer": "2"}'),
    ("csv", b"question,answer\n1+1?,2\n")])
def test_unreadable_file(refused, tmp_path, kind, content):
    path = tmp_path / f"text.{kind}"
    path.write_bytes(content)
    refused(dataset(path, kind), says=["train_datasets", str(path), FORMS])
    entry = f"train_datasets=[{{'path': '{path}', 'input': 'question', 'output': 'answer'}}]"
    refused(entry, says=[str(path), FORMS])  # the type as the name has it


def test_wrong_column(refused, tmp_path):
    path = parquet(tmp_path / "ok.parquet", ["1+1?"], ["2"])
    refused(dataset(path, question="prompt"),
            says=[str(path), "no column prompt", "'question', 'answer'"])
    refused(dataset(path, answer="solution"),
            says=[str(path), "no column solution", "'question', 'answer'"])


@pytest.mark.parametrize("questions, answers, found", [
    (["1+1?", None, None], ["2", "3", "4"], "3 rows, {'question': 2, 'answer': 0} without text"),
    (["1+1?", "1+2?", "1+3?"], [None, "3", None], "3 rows, {'question': 0, 'answer': 2} without"),
    ([], [], "no column"), ([["1+1?"]], ["2"], "TypeError"),
    ([[{"role": "user", "content": None}]], ["2"], "{'question': 1, 'answer': 0} without text"),
    ([[{"role": "user", "content": "1+1?"}], None], ["2"] * 2, "{'question': 1, 'answer': 0}"),
    ([[]], ["2"], "IndexError")])
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_rows_without_text(refused, tmp_path, kind, questions, answers, found):
    """Neither None nor a list that is no list of messages is read as the text that Python shows."""
    path, table = tmp_path / f"table.{kind}", pd.DataFrame({"question": questions,
                                                            "answer": answers})
    if kind == "parquet":
        table.to_parquet(path)
    else:
        table.to_json(path, orient="records", lines=True)
    refused(dataset(path, kind), says=["train_datasets", str(path), found, FORMS])


@pytest.mark.parametrize("value", [
    "[]",
    "['data/train.parquet']", "[{'path': 'data/train.parquet'}]",
    "[{'path': 'data/train.parquet', 'input': ['question'], 'output': 'answer'}]",
    "[{'path': 'data/train.parquet', 'type': ['parquet'], 'input': 'question', "
    "'output': 'answer'}]"])
@pytest.mark.parametrize("constant", ["train_datasets", "eval_datasets"])
def test_dataset_entries_of_the_wrong_shape(refused, constant, value):
    refused(f"{constant}={value}", says=[f"{constant}={value}", "expected"])


MORE_STEPS = "expected more: raise NUM_EPOCHS, MAX_STEPS, lower BATCH_SIZE"


def test_every_prompt_is_too_long(refused):
    refused("MAX_PROMPT_TOKENS=5", says=["step 0 of 0 with 0, 0 questions", MORE_STEPS], prints=[
        "train_datasets: 0 of 800 questions are within MAX_PROMPT_TOKENS=5",
        "eval_datasets: 0 of 512 questions are within MAX_PROMPT_TOKENS=5"])


def test_every_held_out_prompt_is_too_long(refused, tmp_path):
    path = parquet(tmp_path / "long.parquet", ["1+1? " * 99], ["2"])
    refused(dataset(path, constant="eval_datasets"), says=["of 2 with 800, 0 questions"], prints=[
        "eval_datasets: 0 of 1 questions are within MAX_PROMPT_TOKENS=64"])


def test_fewer_questions_than_a_batch(refused, tmp_path):
    path = parquet(tmp_path / "one.parquet", ["1+1?"], ["2"])
    refused(dataset(path), says=["step 0 of 0 with 1, 4 questions", MORE_STEPS], prints=[
        "train_datasets: 1 of 1 questions are within MAX_PROMPT_TOKENS=64"])


def test_what_cannot_be_reached(refused):
    """What someone with a GPU and no network sees first: how to get it, and how to go without."""
    full = ["PROFILE=full", "FROZEN_DEVICE=cpu"]
    refused(*full, says=["Qwen/Qwen3-0.6B", "hf download Qwen/Qwen3-0.6B", "PROFILE=embedded"])
    refused(*full, f"POLICY_MODEL={POLICY}",
            says=["train_datasets: hf://datasets/openai/gsm8k", "cache", "`hf download` it"])


# ---- Reward


def reward_file(folder, body):
    """A reward function's file; returns the arguments that make it the only reward."""
    path = folder / "reward.py"
    path.write_text("def score(questions, responses, references):\n"
                    + "".join(f"    {line}\n" for line in body.split("\n")))
    return [f"REWARD_FUNCTION={path}:score", "REWARD_WEIGHTS={'function': 1.0}"]


@pytest.mark.parametrize("body, says", [
    ("raise KeyError('no such thing')", ["KeyError", "no such thing"]),
    ("raise ValueError('two\\nlines')", ["two lines"]),
    ("return [0.5] * (len(responses) + 1)", ["returned 5: [0.5, 0.5, 0.5, 0.5, 0.5]"]),
    ("return []", ["returned 0: []"]),
    ("return 0.5", ["TypeError", "not iterable"]),
    ("import torch; return torch.tensor(0.5)", ["TypeError", "0-d tensor"]),
    ("return None", ["TypeError", "not iterable"]),
    ("return [None] * len(responses)", ["TypeError", "'NoneType'"]),
    ("return [float('nan')] * len(responses)", ["returned 4: [nan, nan, nan, nan]"]),
    ("return [float('inf')] * len(responses)", ["returned 4: [inf, inf, inf, inf]"]),
    ("return ['good'] * len(responses)", ["'good'"]),
    ("import torch; return torch.zeros(len(responses), 2)", ["one element"]),
    ("import sys; sys.exit('no licence')", ["SystemExit", "no licence"]),
    ("import sys; sys.exit()", ["SystemExit"]),
    ("return [{'scores': 1.0}] * len(responses)", ["KeyError", "'score'"]),
    ("return [{'score': None}] * len(responses)", ["TypeError", "'NoneType'"]),
])
def test_reward_function_that_fails(refused, tmp_path, body, says):
    """Tried on a group of answers before models load: it would be known only minutes later."""
    refused(*reward_file(tmp_path, body), says=["the reward source 'function'",
                                                "expected 4 finite numbers", *says])


@pytest.mark.parametrize("later, says", [
    ("None", ["not iterable"]), ("[0.125] * 7 + [None]", ["'NoneType'"]),
    ("[0.125] * 7", ["returned 7"]), ("[0.125] * 7 + [float('nan')]", ["returned 8", "nan"]),
    ("__import__('sys').exit(0)", ["SystemExit: 0"])])
def test_reward_function_that_fails_later(refused, tmp_path, later, says):
    """In the middle of a run the line and the files of the run so far are what is left."""
    body = f"return [0.5] * len(responses) if len(responses) < 8 else {later}"
    line = refused(*reward_file(tmp_path, body), says=["the reward source 'function'", *says],
                   loaded=["AutoModelForCausalLM"])
    assert line.endswith("; expected 8 finite numbers; nothing was trained yet")
    left = tmp_path / "runs" / "run_2"
    assert (left / "epoch_0" / "samples.txt").exists()
    assert len((left / "metrics.csv").read_text().splitlines()) == 2  # the header and step 0


@pytest.mark.parametrize("text, name, says", [
    (None, ":score", ["No such file"]), ("other = len\n", ":score", ["'score'"]),
    ("other = len\n", "", ["compute_score"]), ("number = 3\n", ":number", ["not callable"]),
    ("import no_such_package\n", ":score", ["ModuleNotFoundError", "no_such_package"]),
    ("def score(:\n", ":score", ["SyntaxError"]),
    ("raise RuntimeError('two\\nlines')\n", ":score", ["RuntimeError", "two lines"]),
    ("import sys\nsys.exit('no licence')\n", ":score", ["SystemExit", "no licence"])])
def test_reward_file_that_is_of_no_use(refused, tmp_path, text, name, says):
    path = tmp_path / "reward.py"
    if text is not None:
        path.write_text(text)
    line = refused(f"REWARD_FUNCTION={path}{name}", "REWARD_WEIGHTS={'function': 1.0}", says=says)
    if name != ":number":  # seen when it is called
        assert f"REWARD_FUNCTION={path}{name}: " in line
        assert line.endswith("; expected file.py:name or file.py (compute_score)")


def reward_model(folder, labels):
    """A reward model of the right class with so many outputs, without training."""
    from transformers import AutoTokenizer, DebertaV2Config, DebertaV2ForSequenceClassification
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    config = DebertaV2Config(vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1,
                             num_attention_heads=1, intermediate_size=8, num_labels=labels)
    DebertaV2ForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_reward_model_with_two_outputs(refused, tmp_path):
    reward_model(tmp_path / "judge", labels=2)
    refused(f"REWARD_MODEL={tmp_path / 'judge'}", "REWARD_WEIGHTS={'model': 1.0}",
            says=["REWARD_MODEL=", "judge", "2 outputs", "expected one score"],
            loaded=["AutoModelForSequenceClassification"])


# ---- Models


@pytest.mark.parametrize("constant", ["POLICY_MODEL", "REWARD_MODEL"])
@pytest.mark.parametrize("missing, says", [("model.safetensors", "no file named model.safetensors"),
                                           ("config.json", "config.json"),
                                           ("tokenizer.json", "tokenizer")])
def test_model_folder_that_is_not_whole(refused, tmp_path, constant, missing, says):
    folder = tmp_path / "model"
    shutil.copytree(POLICY, folder)
    (folder / missing).unlink()
    refused(f"{constant}={folder}", "REWARD_WEIGHTS={'model': 1.0}",
            says=[f"{constant}={folder}: ", says, "expected a folder, `hf download"],
            loaded=["AutoModelForCausalLM", "AutoModelForSequenceClassification"])


def test_unused_reward_model_may_be_missing(gspo, tmp_path, monkeypatch):
    """Checks are for what is used: a verifier needs no reward model."""
    (tmp_path / "judge").mkdir()
    monkeypatch.setattr(gspo, "train", lambda run: None)
    gspo.main([*SMALL, NO_MODEL, f"REWARD_MODEL={tmp_path / 'judge'}",
               f"OUTPUT_DIR={tmp_path / 'run'}"])
    assert (tmp_path / "run" / "epoch_0" / "samples.txt").exists()


@pytest.mark.parametrize("constant", ["POLICY_MODEL", "REWARD_MODEL"])
def test_model_that_cannot_be_reached(refused, constant):
    refused(f"{constant}=nobody/no-such-model", "REWARD_WEIGHTS={'model': 1.0}",
            says=[f"{constant}=nobody/no-such-model", "connect",
                  "expected a folder, `hf download nobody/no-such-model`, or PROFILE=embedded"])


def test_weights_that_are_damaged(refused, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(POLICY, folder)
    (folder / "model.safetensors").write_bytes(b"cut off")
    refused(f"POLICY_MODEL={folder}", loaded=["AutoModelForCausalLM"],
            says=[f"POLICY_MODEL={folder}", "deserializing", "expected a folder, `hf download"])


def test_tokenizer_without_chat_template(refused, tmp_path):
    """A base model in the place of an instruct one."""
    folder = tmp_path / "model"
    shutil.copytree(POLICY, folder)
    (folder / "chat_template.jinja").unlink()
    refused(f"POLICY_MODEL={folder}", says=[f"POLICY_MODEL={folder}", "a chat template"])


# ---- Output


def test_output_folder_that_cannot_be_made(refused, tmp_path):
    path = tmp_path / "file" / "run"
    path.parent.write_text("a regular file")
    refused(f"OUTPUT_DIR={path}", loaded=["AutoModelForCausalLM"],
            says=[f"OUTPUT_DIR={path}: ", "expected a folder that can be made"])


@pytest.mark.parametrize("system", ["this one", "Windows"])
def test_output_folder_far_below_a_file(gspo, tmp_path, monkeypatch, system):
    """Windows does not say that a file is no folder, but that what is below it is not there."""
    (tmp_path / "file").write_text("a regular file")
    make = os.mkdir

    def mkdir(path, *arguments):
        try:
            make(path, *arguments)
        except NotADirectoryError as error:
            raise FileNotFoundError(3, "cannot find the path", str(path)) from error

    if system == "Windows":
        monkeypatch.setattr(os, "mkdir", mkdir)
    gspo.OUTPUT_DIR = str(tmp_path / "file" / "a" / "b")
    with pytest.raises(SystemExit, match="^error: OUTPUT_DIR=.*: .*; expected a folder that can"):
        gspo.new_folder()


@pytest.mark.parametrize("value", ["", "/"])
def test_output_folder_without_a_name(refused, tmp_path, monkeypatch, value):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    refused(f"OUTPUT_DIR={value}", says=["OUTPUT_DIR", "expected"],
            loaded=["AutoModelForCausalLM"])
    assert not list((tmp_path / "here").iterdir())


# ---- Numbers that break down


def test_loss_that_is_not_finite(refused, tmp_path):
    line = refused("LEARNING_RATE=1e30", "SAVE_EVERY=1", loaded=["AutoModelForCausalLM"],
                   says=["policy", "non-finite", "expected finite gradients", "lower",
                         "RESUME_FROM"])
    assert line.startswith("error: step 1, ") and line.endswith("; nothing was trained yet")
    left = tmp_path / "runs" / "run_2"
    assert [p.name for p in left.glob("*_*/")] == ["epoch_0"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(refused, tmp_path, gspo, monkeypatch, bad):
    """One optimiser step per rollout: what it did is first seen when the next answers are drawn."""
    step = torch.optim.AdamW.step

    def broken_step(optimizer, *arguments, **options):
        step(optimizer, *arguments, **options)
        optimizer.param_groups[0]["params"][0].data.fill_(bad)

    monkeypatch.setattr(torch.optim.AdamW, "step", broken_step)
    refused("GSPO_EPOCHS=1", "SAVE_EVERY=1", loaded=["AutoModelForCausalLM"],
            says=["finite", "LEARNING_RATE"])


# ---- Resume


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint at step 2 of 2."""
    gspo, folder = import_file(SCRIPT), tmp_path_factory.mktemp("resume") / "run"
    gspo.plot_metrics = lambda run: None
    gspo.main([*SMALL, NO_MODEL, f"OUTPUT_DIR={folder}"])
    return folder / "step_2"


def test_resume_from_what_is_no_checkpoint(refused, checkpoint, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "nowhere", tmp_path / "empty", POLICY, checkpoint.parent,
                   checkpoint.parent / "epoch_0"):  # the run in place of a checkpoint; its start
        refused(f"RESUME_FROM={folder}",
                says=[f"RESUME_FROM={folder}", "expected an epoch_N or step_N folder, N > 0"])


@pytest.mark.parametrize("damage", ["missing", "cut off"])
@pytest.mark.parametrize("name", ["constants.json", "trainer_state.json", "model.safetensors",
                                  "config.json", "metrics.csv", "policy_optimizer.pt"])
def test_resume_from_a_checkpoint_that_is_not_whole(refused, checkpoint, tmp_path, name, damage):
    """What can be seen before the weights are loaded is seen then."""
    folder, whole = tmp_path / "step_2", (checkpoint / name).read_bytes()
    shutil.copytree(checkpoint, folder)
    (folder / name).unlink()
    if damage == "cut off":
        (folder / name).write_bytes(whole[:0 if name == "metrics.csv" else 20])
    early = name in ("constants.json", "trainer_state.json")
    line = refused(f"RESUME_FROM={folder}", "MAX_STEPS=3", says=[f"={folder}: ", "expected a"],
                   loaded=[] if early else ["AutoModelForCausalLM"])
    if name not in ("model.safetensors", "config.json"):  # which transformers reads
        assert line.startswith(f"error: RESUME_FROM={folder}") and "epoch_N or step_N" in line


class Harm:
    """What a pickle can do: a call of anything when it is read."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def test_an_optimisers_file_runs_nothing(refused, checkpoint, tmp_path):
    folder, mark = tmp_path / "step_2", tmp_path / "mark"
    shutil.copytree(checkpoint, folder)
    torch.save({0: Harm(os.mkdir, (str(mark),))}, folder / "policy_optimizer.pt")
    line = refused(f"RESUME_FROM={folder}", "MAX_STEPS=3", loaded=["AutoModelForCausalLM"],
                   says=["UnpicklingError: Weights only load failed"])
    assert line.startswith(f"error: RESUME_FROM={folder}: ") and not mark.exists()
    torch.load(folder / "policy_optimizer.pt", weights_only=False)
    assert mark.exists()


def test_resume_with_nothing_left_to_do(refused, checkpoint):
    step = json.loads((checkpoint / "trainer_state.json").read_text())["step"]
    refused(f"RESUME_FROM={checkpoint}", says=[f"step {step} of 2 with 800, 4 ", MORE_STEPS])
