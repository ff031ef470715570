"""Bad input and bad luck: one line that helps, exit status 1, and nothing lost.

Nearly all cases run `main` in this process. `refused` turns what it leaves behind into what a shell
would show, and holds for every case: the only line on standard error starts with "error: ", no
earlier file changed, and no model weights were loaded where the mistake is visible without them.
"""

import json
import re
import shutil
import sys

import pandas as pd
import pytest
import torch
from conftest import ROOT, run_script

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

    `loaded`: which classes may have loaded weights by then; none is the rule.
    """
    weights, load = [], gspo.load_pretrained

    def recording(kind, *arguments, **options):
        if kind.__name__.startswith("AutoModel"):
            weights.append(kind.__name__)
        return load(kind, *arguments, **options)

    monkeypatch.setattr(gspo, "load_pretrained", recording)
    earlier = tmp_path / "runs" / "run"
    earlier.mkdir(parents=True)
    (earlier / "metrics.csv").write_text("an earlier run's\n")

    def check(*arguments, says, loaded=()):
        before = tree(tmp_path)
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            gspo.main([*SMALL, NO_MODEL, f"OUTPUT_DIR={earlier}", *arguments])
        # The interpreter prints a message of SystemExit to standard error and exits with 1.
        assert isinstance(stop.value.code, str), f"exit status {stop.value.code}"
        lines = [*lines_of(capfd.readouterr().err), *stop.value.code.split("\n")]
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
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
    (["GROUP_SISE=8"], ["GROUP_SISE", "did you mean GROUP_SIZE?", "LEARNING_RATE", "SEED"]),
    (["LEARNING_RATE=1e30", NO_MODEL], ["step ", "LEARNING_RATE", "1e+30", "expected finite"]),
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


@pytest.mark.parametrize("argument, meant", [
    ("GROUPSIZE=4", "GROUP_SIZE"), ("group_size=4", "GROUP_SIZE"), ("--seed=3", "SEED"),
    ("GROUP_SIZE", "GROUP_SIZE"),
    ("xyzzy=1", None),
    ("EMBEDDED={}", None),  # the constants' other values, not a constant
    ("main=1", None),  # a global, but not a constant
])
def test_unknown_constant(refused, gspo, argument, meant):
    line = refused(argument, says=[repr(argument), "NAME=VALUE"])
    listed = line.partition("expected one of ")[2].split(", ")
    assert set(listed) == set(gspo.constants()) and len(listed) > 40
    suggested = re.search(r"\(did you mean (.*?)\?\)", line)
    assert (suggested and suggested.group(1)) == meant


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
    ("CLIP_RANGE=narrow", "str", "tuple"),
    ("CLIP_RANGE=True", "bool", "tuple"),
    ("ADAM_BETAS=0.9", "float", "tuple"),
    ("REWARD_WEIGHTS=1.0", "float", "dict"),
    ("REWARD_WEIGHTS=['model']", "list", "dict"),
    ("train_datasets=data/train.parquet", "str", "list"),
])
def test_ill_typed_constant(refused, argument, found, expected):
    refused(argument, says=[argument.partition("=")[0], found, "expected", expected])


@pytest.mark.parametrize("argument, says", [
    ("GROUP_SIZE=1", ["GROUP_SIZE=1", "2 or more"]),
    ("GROUP_SIZE=-4", ["GROUP_SIZE=-4", "or more"]),
    ("BATCH_SIZE=0", ["BATCH_SIZE=0", "1 or more"]),
    ("MINIBATCH=3", ["MINIBATCH=3", "2 x 4 = 8", "divisor"]),
    ("MINIBATCH=16", ["MINIBATCH=16", "2 x 4 = 8", "divisor"]),
    ("MICRO_BATCH=0", ["MICRO_BATCH=0", "1 or more"]),
    ("MAX_STEPS=-1", ["MAX_STEPS=-1", "0 or more"]),
    ("NUM_EPOCHS=0", ["NUM_EPOCHS=0", "1 or more"]),
    ("GSPO_EPOCHS=0", ["GSPO_EPOCHS=0", "1 or more"]),
    ("MAX_NEW_TOKENS=0", ["MAX_NEW_TOKENS=0", "1 or more"]),
    ("LEARNING_RATE=-1e-6", ["LEARNING_RATE=-1e-06", "0 or more"]),
    ("WEIGHT_DECAY=-1", ["WEIGHT_DECAY=-1", "0 or more"]),
    ("KL_COEF=-0.1", ["KL_COEF=-0.1", "0 or more"]),
    ("EVAL_EVERY=-1", ["EVAL_EVERY=-1", "0 or more"]),
    ("TEMPERATURE=0", ["TEMPERATURE=0", "0.01 or more"]),
    ("TEMPERATURE=1e-50", ["TEMPERATURE=1e-50", "0.01 or more"]),  # logits / 1e-50 overflow
    ("TOP_P=1.5", ["TOP_P=1.5", "<= 1"]),
    ("TOP_P=0", ["TOP_P=0"]),
    ("ADAM_BETAS=(0.9,)", ["ADAM_BETAS=(0.9,)", "expected"]),
    ("ADAM_BETAS=(0.9, 1.5)", ["ADAM_BETAS=(0.9, 1.5)", "expected"]),
    ("ADAM_BETAS=('a', 'b')", ["ADAM_BETAS=('a', 'b')", "expected"]),
    ("SEED=1e30", ["SEED", "expected"]),
    ("CLIP_RANGE=-0.2", ["CLIP_RANGE=-0.2", "(low, high)"]),
    ("CLIP_RANGE=(0.1, 0.2, 0.3)", ["CLIP_RANGE=(0.1, 0.2, 0.3)", "(low, high)"]),
    ("CLIP_RANGE=('low', 'high')", ["CLIP_RANGE=('low', 'high')", "(low, high)"]),
    ("ADVANTAGE_TYPE=absolute", ["ADVANTAGE_TYPE=absolute", "relative", "normalized"]),
    ("USE_SEQUENCE_LEVEL_REWARD=False", ["USE_TOKEN_LEVEL_LOSS=True"]),
    ("SEGMENT_END=[", ["SEGMENT_END=[", "regular expression"]),
    ("PROFILE=gpu", ["PROFILE=gpu", "embedded", "full", "auto"]),
    ("DTYPE=float16", ["DTYPE=float16", "float32", "bfloat16"]),
    ("DEVICE=gpu", ["DEVICE=gpu", "cpu", "cuda"]),
    ("REWARD_WEIGHTS={}", ["REWARD_WEIGHTS={}", "model, verifier or function"]),
    ("REWARD_WEIGHTS={'model': 0.0}", ["REWARD_WEIGHTS={'model': 0.0}", "not 0"]),
    ("REWARD_WEIGHTS={'judge': 1.0}", ["REWARD_WEIGHTS={'judge': 1.0}", "model, verifier"]),
    ("REWARD_WEIGHTS={'model': 'a'}", ["REWARD_WEIGHTS={'model': 'a'}", "expected"]),
    ("REWARD_WEIGHTS={'verifier': 1.0, 'model': None}", ["REWARD_WEIGHTS", "None", "expected"]),
    ("REWARD_WEIGHTS={'function': 1.0}", ["REWARD_FUNCTION", "expected a file"]),
    ("REWARD_FUNCTION=reward.py:score", ["REWARD_FUNCTION", "a weight for 'function'"]),
])
def test_constants_that_cannot_work(refused, argument, says):
    refused(argument, says=says)


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_no_gpu(refused, monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(f"DEVICE={device}", says=[f"DEVICE={device}", "no CUDA GPU", "expected cpu"])


def test_tensorboard_is_not_installed(refused, monkeypatch):
    for name in ("tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)  # the import fails, installed or not
    refused("TENSORBOARD=True", says=["TENSORBOARD=True", "pip install tensorboard"])


# ---- Data


@pytest.mark.parametrize("constant", ["train_datasets", "eval_datasets"])
def test_missing_file(refused, tmp_path, constant):
    path = tmp_path / "nowhere.parquet"
    refused(dataset(path, constant=constant), says=[constant, f"no file {path}", "data/build.py"])


@pytest.mark.parametrize("kind, content", [
    ("parquet", b"question,answer\n1,2\n"), ("json", b"{"), ("jsonl", b"not json\n"),
    ("jsonl", b"\xff\xfe\x00"), ("json", b"")])
def test_unreadable_file(refused, tmp_path, kind, content):
    path = tmp_path / f"text.{kind}"
    path.write_bytes(content)
    refused(dataset(path, kind), says=["train_datasets", str(path), f"no readable {kind} file"])


def test_wrong_column(refused, tmp_path):
    path = parquet(tmp_path / "ok.parquet", ["1+1?"], ["2"])
    refused(dataset(path, question="prompt"),
            says=[str(path), "no column 'prompt'", "question, answer"])
    refused(dataset(path, answer="solution"),
            says=[str(path), "no column 'solution'", "question, answer"])


@pytest.mark.parametrize("kind, content", [("jsonl", ""), ("json", "[]")])
def test_empty_file(refused, tmp_path, kind, content):
    path = tmp_path / f"empty.{kind}"
    path.write_text(content)
    refused(dataset(path, kind), says=["train_datasets", str(path), "no rows", "at least one"])


def test_empty_table(refused, tmp_path):
    path = parquet(tmp_path / "empty.parquet", [], [])
    refused(dataset(path), says=["train_datasets", str(path), "no rows", "at least one"])


@pytest.mark.parametrize("questions, answers, column", [
    (["1+1?", None, None], ["2", "3", "4"], "question"),
    (["1+1?", "1+2?", "1+3?"], [None, "3", None], "answer")])
def test_nulls(refused, tmp_path, questions, answers, column):
    path = parquet(tmp_path / "nulls.parquet", questions, answers)
    refused(dataset(path), says=[str(path), "2 empty values", f"column '{column}'", "drop"])


def test_values_that_are_no_text(refused, tmp_path):
    """Chat messages, say, must not become the text of a Python list."""
    messages = [{"role": role, "content": "1+1? " * 20} for role in ("system", "user", "user")]
    path = parquet(tmp_path / "messages.parquet", [messages] * 4, ["2"] * 4)
    refused(dataset(path), says=[str(path), "'question'", "expected text"])


def test_wrong_type_field(refused, tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("question,answer\n1+1?,2\n")
    refused(dataset(path, "csv"), says=[str(path), "'csv'", "parquet", "jsonl"])
    entry = f"train_datasets=[{{'path': '{path}', 'input': 'question', 'output': 'answer'}}]"
    refused(entry, says=[str(path), "'csv'", "parquet", "jsonl"])  # the type as the name has it


@pytest.mark.parametrize("value", [
    "[]", "['data/train.parquet']", "[{'path': 'data/train.parquet'}]",
    "[{'path': 'data/train.parquet', 'input': ['question'], 'output': 'answer'}]",
    "[{'path': 'data/train.parquet', 'type': ['parquet'], 'input': 'question', "
    "'output': 'answer'}]"])
def test_dataset_entries_of_the_wrong_shape(refused, value):
    refused(f"train_datasets={value}", says=["train_datasets", "expected", "input"])


def test_every_prompt_is_too_long(refused):
    line = refused("MAX_PROMPT_TOKENS=5", says=["MAX_PROMPT_TOKENS = 5", "raise it"])
    assert int(re.search(r"shortest prompt has (\d+) tokens", line).group(1)) > 5


def test_fewer_questions_than_a_batch(refused, tmp_path):
    path = parquet(tmp_path / "one.parquet", ["1+1?"], ["2"])
    refused(dataset(path), says=["train_datasets", "1 questions", "BATCH_SIZE = 2"])


def test_data_that_cannot_be_reached(refused):
    """What someone with a GPU and no network sees first: how to get it, and how to go without."""
    refused("PROFILE=full", says=["hf://datasets/openai/gsm8k", "download", "PROFILE=embedded"])


# ---- Reward


def reward_file(folder, body):
    """A reward function's file; returns the arguments that make it the only reward."""
    path = folder / "reward.py"
    path.write_text("def score(questions, responses, references):\n"
                    + "".join(f"    {line}\n" for line in body.split("\n")))
    return [f"REWARD_FUNCTION={path}:score", "REWARD_WEIGHTS={'function': 1.0}"]


@pytest.mark.parametrize("body, says", [
    ("raise KeyError('no such thing')", ["raised KeyError", "no such thing"]),
    ("raise ValueError('two\\nlines')", ["raised ValueError", "two lines"]),
    ("return [0.5] * (len(responses) + 1)", ["returned 2 scores", "expected 1", "one for each"]),
    ("return []", ["returned 0 scores", "expected 1", "one for each"]),
    ("return 0.5", ["returned 0.5"]),
    ("import torch; return torch.tensor(0.5)", ["returned tensor(0.5", "one for each"]),
    ("return None", ["returned None"]),
    ("return [None] * len(responses)", ["returned", "None", "finite number"]),
    ("return [float('nan')] * len(responses)", ["returned nan", "finite number"]),
    ("return [float('inf')] * len(responses)", ["returned inf", "finite number"]),
    ("return ['good'] * len(responses)", ["returned", "'good'", "finite number"]),
    ("import torch; return torch.zeros(len(responses), 2)", ["returned", "finite number"]),
    ("import torch; return torch.rand(len(responses), 99)", ["returned", "finite number"]),
])
def test_reward_function_that_fails(refused, tmp_path, body, says):
    """Tried on a reference answer before models load: it would be known only minutes later."""
    refused(*reward_file(tmp_path, body), says=["'function'", "expected", *says])


@pytest.mark.parametrize("later, says", [
    ("None", ["returned None", "expected 8"]),
    ("[0.1234567890123456] * 7 + [None]", ["None", "expected 8"]),  # shown behind all the others
    ("[0.125] * 7", ["returned 7 scores", "expected 8"]),
    ("[0.125] * 7 + [float('nan')]", ["returned nan for '", "expected 8"])])
def test_reward_function_that_fails_later(refused, tmp_path, later, says):
    """In the middle of a run the line and the files of the run so far are what is left."""
    body = f"return [0.5] * len(responses) if len(responses) < 8 else {later}"
    refused(*reward_file(tmp_path, body), says=["'function'", *says],
            loaded=["AutoModelForCausalLM"])
    left = tmp_path / "runs" / "run_2"
    assert (left / "epoch_0" / "samples.txt").exists()
    assert len((left / "metrics.csv").read_text().splitlines()) == 2  # the header and step 0


def test_reward_function_that_is_not_there(refused, tmp_path):
    path = tmp_path / "reward.py"
    weights = "REWARD_WEIGHTS={'function': 1.0}"
    refused(f"REWARD_FUNCTION={path}:score", weights, says=[str(path), "no such file", ".py:name"])
    path.write_text("other = len\nnumber = 3\n")
    refused(f"REWARD_FUNCTION={path}:score", weights, says=[str(path), "score", "expected"])
    refused(f"REWARD_FUNCTION={path}", weights, says=[str(path), "expected", ".py:name"])
    refused(f"REWARD_FUNCTION={path}:number", weights, says=["no function 'number'"])


@pytest.mark.parametrize("text, says", [
    ("import no_such_package\n", ["ModuleNotFoundError", "no_such_package"]),
    ("def score(:\n", ["SyntaxError"]),
    ("raise RuntimeError('two\\nlines')\n", ["RuntimeError", "two lines"])])
def test_reward_file_that_does_not_import(refused, tmp_path, text, says):
    path = tmp_path / "reward.py"
    path.write_text(text)
    refused(f"REWARD_FUNCTION={path}:score", "REWARD_WEIGHTS={'function': 1.0}",
            says=["REWARD_FUNCTION", str(path), *says])


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
            says=["REWARD_MODEL=", "judge", "2 outputs", "expected one"])


# ---- Models


@pytest.mark.parametrize("constant", ["POLICY_MODEL", "REWARD_MODEL"])
@pytest.mark.parametrize("missing", ["*.safetensors", "config.json", "tokenizer.json"])
def test_model_folder_that_is_not_whole(refused, tmp_path, constant, missing):
    folder = tmp_path / "model"
    shutil.copytree(POLICY, folder)
    for path in folder.glob(missing):
        path.unlink()
    refused(f"{constant}={folder}", "REWARD_WEIGHTS={'model': 1.0}",
            says=[f"{constant}={folder}", f"no {missing}", "expected config.json"])


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
            says=[f"{constant}=nobody/no-such-model", "could not be loaded",
                  "hf download nobody/no-such-model", f"{constant}=<folder>", "PROFILE=embedded"])


def test_weights_that_are_damaged(refused, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(POLICY, folder)
    (folder / "model.safetensors").write_bytes(b"cut off")
    refused(f"POLICY_MODEL={folder}", loaded=["AutoModelForCausalLM"],
            says=[f"POLICY_MODEL={folder}", "could not be loaded"])


def test_tokenizer_without_chat_template(refused, tmp_path):
    """A base model in the place of an instruct one."""
    folder = tmp_path / "model"
    shutil.copytree(POLICY, folder)
    (folder / "chat_template.jinja").unlink()
    refused(f"POLICY_MODEL={folder}", says=[f"POLICY_MODEL={folder}", "no chat template"])


# ---- Output


@pytest.mark.parametrize("below", ["file", "file/run", "file/a/b"])
def test_output_folder_that_cannot_be_made(refused, tmp_path, below):
    (tmp_path / "file").write_text("a regular file")
    refused(f"OUTPUT_DIR={tmp_path / below}",
            says=[f"OUTPUT_DIR={tmp_path / below}", "expected a folder"])


@pytest.mark.parametrize("value", ["", "/"])
def test_output_folder_without_a_name(refused, tmp_path, monkeypatch, value):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    refused(f"OUTPUT_DIR={value}", says=["OUTPUT_DIR", "expected a folder"])


# ---- Numbers that break down


def test_loss_that_is_not_finite(refused, tmp_path):
    line = refused("LEARNING_RATE=1e30", "SAVE_EVERY=1", loaded=["AutoModelForCausalLM"],
                   says=["loss is", "gradient norm nan", "expected finite", "not saved",
                         "lower LEARNING_RATE (1e+30)"])
    assert line.startswith("error: step 1: ")
    left = tmp_path / "runs" / "run_2"
    assert str(left) in line
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
    from conftest import SCRIPT, import_file
    gspo, folder = import_file(SCRIPT), tmp_path_factory.mktemp("resume") / "run"
    gspo.plot_metrics = lambda run: None
    gspo.main([*SMALL, NO_MODEL, f"OUTPUT_DIR={folder}"])
    return folder / "step_2"


def test_resume_from_what_is_no_checkpoint(refused, checkpoint, tmp_path):
    expected = ["RESUME_FROM=", "there is no ", "expected an epoch_N or step_N folder"]
    refused(f"RESUME_FROM={tmp_path / 'nowhere'}", says=expected)
    (tmp_path / "empty").mkdir()
    refused(f"RESUME_FROM={tmp_path / 'empty'}", says=expected)
    refused(f"RESUME_FROM={POLICY}", says=expected)
    refused(f"RESUME_FROM={checkpoint.parent}", says=expected)  # the run in place of a checkpoint
    refused(f"RESUME_FROM={checkpoint.parent / 'epoch_0'}", says=[*expected, "N > 0"])


@pytest.mark.parametrize("missing", ["constants.json", "model.safetensors", "config.json",
                                     "metrics.csv", "trainer_state.json",
                                     "trainer_state.safetensors"])
def test_resume_from_a_checkpoint_that_is_not_whole(refused, checkpoint, tmp_path, missing):
    shutil.copytree(checkpoint, tmp_path / "step_2")
    (tmp_path / "step_2" / missing).unlink()
    refused(f"RESUME_FROM={tmp_path / 'step_2'}", "MAX_STEPS=3",
            says=["RESUME_FROM=", missing.replace("model.", ""), "expected an epoch_N or step_N"])


@pytest.mark.parametrize("damaged", ["constants.json", "trainer_state.json",
                                     "trainer_state.safetensors"])
def test_resume_from_a_damaged_checkpoint(refused, checkpoint, tmp_path, damaged):
    shutil.copytree(checkpoint, tmp_path / "step_2")
    path = tmp_path / "step_2" / damaged
    path.write_bytes(path.read_bytes()[:20])
    refused(f"RESUME_FROM={tmp_path / 'step_2'}", "MAX_STEPS=3",
            says=["RESUME_FROM=", "damaged", "" if "safetensors" in damaged else damaged],
            loaded=["AutoModelForCausalLM"] if damaged.endswith("safetensors") else ())


def test_resume_with_nothing_left_to_do(refused, checkpoint):
    step = json.loads((checkpoint / "trainer_state.json").read_text())["step"]
    refused(f"RESUME_FROM={checkpoint}",
            says=[f"step {step} of 2", "raise NUM_EPOCHS or MAX_STEPS"])
