"""Whole runs of the script: what they print, what they write, and what the numbers in it say."""

import csv
import json
import os
import re
import shutil
import signal
import struct
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import ROOT, SCRIPT, fork, import_file, mutated_copy, run_script
from safetensors.torch import load_file
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification,
                          AutoTokenizer)

SMALL = ["PROFILE=embedded", "DEVICE=cpu", "BATCH_SIZE=2", "GROUP_SIZE=4", "MINIBATCH=4",
         "MICRO_BATCH=4", "EVAL_QUESTIONS=4", "SHOW_SAMPLES=1"]
NO_MODEL = "REWARD_WEIGHTS={'verifier': 1.0}"
PHASES = ["time/rollout", "time/reward", "time/logps", "time/update"]


def read_metrics(folder):
    """metrics.csv as a list of {column: text}."""
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def numbers(row, *names):
    """Some of a row's columns as floats."""
    return [float(row[name]) for name in names]


def tree(folder):
    """Every file below a folder with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def checkpoints(folder):
    """The names of a run's checkpoint folders."""
    return {p.name for p in folder.iterdir() if re.fullmatch(r"(epoch|step)_\d+", p.name)}


def question_file(folder, count):
    """A parquet file of `count` training questions, and the argument that makes it the data."""
    path = folder / "few.parquet"
    pd.read_parquet(ROOT / "data" / "train.parquet").head(count).to_parquet(path)
    entry = {"path": str(path), "type": "parquet", "input": "question", "output": "answer"}
    return f"train_datasets={[entry]!r}"


@pytest.fixture
def here(gspo, tmp_path, monkeypatch):
    """here(*arguments) trains in this process and returns the run's folder. No plot: it is slow."""
    monkeypatch.setattr(gspo, "plot_metrics", lambda run: None)

    def run_here(*arguments, out="run"):
        fresh = import_file(SCRIPT, f"gspo_{out}")
        for name in ("plot_metrics", "load"):
            setattr(fresh, name, vars(gspo)[name])  # what the test has put there
        fresh.main([*SMALL, NO_MODEL, f"OUTPUT_DIR={tmp_path / out}", *arguments])
        return tmp_path / out

    return run_here


# ---- A run of the default on a machine without a GPU, as a user starts it

SMOKE = ["MAX_STEPS=3", "EVAL_EVERY=2", "EVAL_QUESTIONS=32", "SAVE_EVERY=2", "WARMUP_STEPS=10"]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The finished process and the folder it wrote, started from a folder of its own."""
    here, out = tmp_path_factory.mktemp("elsewhere"), tmp_path_factory.mktemp("out") / "a" / "run"
    arguments = [*SMOKE, f"OUTPUT_DIR={out}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        done = run_script(*arguments, cwd=here)
    assert done.returncode == 0, done.stderr
    assert not list(here.iterdir()), "it wrote into the working directory"
    return done, out, arguments


def saved_constants(out):
    """The effective constants of a run."""
    return json.loads((out / "epoch_0" / "constants.json").read_text())["constants"]


def test_start_up_block(smoke):
    done, out, arguments = smoke
    lines = done.stdout.splitlines()
    block = {line[2:12].strip(): line[12:] for line in lines
             if re.match(r"  [a-z]+ +\S", line)}
    c = saved_constants(out)
    completions = c["BATCH_SIZE"] * c["GROUP_SIZE"]
    updates = c["GSPO_EPOCHS"] * completions // c["MINIBATCH"]
    questions = len(pd.read_parquet(ROOT / "data" / "train.parquet"))
    assert updates >= 2  # one update per rollout: every ratio is 1 and nothing is ever clipped
    assert lines[:4] == [
        f"train_datasets: {questions} of {questions} questions are within MAX_PROMPT_TOKENS=64",
        "eval_datasets: 512 of 512 questions are within MAX_PROMPT_TOKENS=64", "gspo",
        "  profile   embedded, no CUDA GPU; cpu; float32"]
    assert list(block)[:10] == "profile settings policy reward data rollout update algorithm " \
                               "steps output".split()
    assert block["settings"] == " ".join(arguments)
    assert re.match(r"data/policy, 0\.50 M parameters", block["policy"])
    assert block["reward"] == "0.5 model + 1.0 verifier"
    assert block["data"] == f"{questions} questions, 32 held out; 0 without a number"
    assert block["rollout"] == (f"{c['BATCH_SIZE']} prompts x {c['GROUP_SIZE']} completions of at "
                                f"most {c['MAX_NEW_TOKENS']} tokens")
    assert block["update"] == (f"minibatch {c['MINIBATCH']}, micro-batch {c['MICRO_BATCH']}, "
                               "learning rate 0.0001")
    assert "GSPO_EPOCHS=2, CLIP_RANGE=(0.0003, 0.0004)" in block["algorithm"]
    assert re.fullmatch(rf"0 of 3 done, {questions // c['BATCH_SIZE']} an epoch; processes\W+1",
                        block["steps"])
    assert block["output"] == str(out)


def test_what_is_printed(smoke):
    done, out, _ = smoke
    rows = read_metrics(out)
    for step in (0, 2, 3):
        sampled, greedy = numbers(rows[step], "eval/accuracy", "eval/accuracy_greedy")
        line = f"step {step}: held-out accuracy {sampled:.3f} sampled, {greedy:.3f} greedy; reward "
        assert done.stdout.count(line) == 1
    assert "step 1: held-out" not in done.stdout
    assert re.search(r"\n    reward \d\.\d\d \(verifier [01]\.00, model \d\.\d\d\)", done.stdout)
    assert done.stdout.splitlines()[-1].startswith(f"step 3. In {out}: ")
    assert "reward 0." in done.stderr and "100%" in done.stderr  # the progress bar
    assert "Warning" not in done.stderr and "Traceback" not in done.stderr


def test_columns_and_rows_of_the_metrics(smoke):
    rows = read_metrics(smoke[1])
    assert [row["step"] for row in rows] == ["0", "1", "2", "3"]
    questions = len(pd.read_parquet(ROOT / "data" / "train.parquet"))
    steps_per_epoch = questions // saved_constants(smoke[1])["BATCH_SIZE"]
    assert numbers(rows[3], "epoch") == [pytest.approx(3 / steps_per_epoch)]
    always = {"step", "epoch", "num_tokens", "step_time"}
    evaluation = {"eval/accuracy", "eval/accuracy_greedy", "eval/reward", "eval/mean_length",
                  "time/eval"}
    training = {"loss", "policy_loss", "kl_loss", "entropy_loss", "kl", "kl_coef", "entropy",
                "ratio/mean", "clip_ratio/low_mean", "clip_ratio/high_mean",
                "clip_ratio/region_mean", "advantage/mean", "advantage/size", "grad_norm",
                "learning_rate", "reward", "reward_std", "frac_reward_zero_std", "accuracy",
                "rewards/model", "rewards/verifier", "completions/mean_length",
                "completions/clipped_ratio", "sampling_logp_difference", *PHASES}
    assert set(rows[0]) == always | evaluation | training
    for row in rows:
        filled = {name for name, value in row.items() if value != ""}
        assert filled == (always | (evaluation if row["step"] in "023" else set())
                          | (training if row["step"] != "0" else set()))
    assert numbers(rows[0], "step_time") == [0]  # nothing was trained yet


def test_values_of_the_metrics(smoke):
    out = smoke[1]
    c, rows, tokens = saved_constants(out), read_metrics(out), 0
    completions, coefficient = c["BATCH_SIZE"] * c["GROUP_SIZE"], c["KL_COEF"]
    updates = c["GSPO_EPOCHS"] * completions // c["MINIBATCH"]
    for row in rows[1:]:
        value = {name: float(text) for name, text in row.items() if text}
        for name in ("accuracy", "frac_reward_zero_std", "completions/clipped_ratio",
                     "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"):
            assert 0 <= value[name] <= 1, name
        assert value["accuracy"] == value["rewards/verifier"]
        assert value["reward"] == pytest.approx(0.5 * value["rewards/model"]
                                                + value["rewards/verifier"], abs=1e-5)
        assert 0 <= value["rewards/model"] <= 1 and value["reward_std"] > 0
        assert value["advantage/mean"] == pytest.approx(0, abs=1e-6)
        assert value["advantage/size"] > 0.1
        assert -0.01 < value["kl"] < 0.1 and -0.01 < value["kl_loss"] < 0.1  # it has just begun
        assert value["kl_coef"] == coefficient  # what the step used: halved behind a small KL
        coefficient = max(0.01, coefficient * (0.5 if value["kl"] < 0.5 * c["TARGET_KL"] else
                                               1.5 if value["kl"] > 2 * c["TARGET_KL"] else 1))
        assert 0 < value["entropy"] < 3 and -3 < value["entropy_loss"] < 0
        assert value["loss"] == pytest.approx(value["policy_loss"] + value["kl_coef"]
                                              * value["kl_loss"] + c["ENTROPY_COEF"]
                                              * value["entropy_loss"], abs=1e-5)
        assert 0 < abs(value["ratio/mean"] - 1) < 0.02
        assert value["clip_ratio/region_mean"] == pytest.approx(
            value["clip_ratio/low_mean"] + value["clip_ratio/high_mean"], abs=1e-6)
        assert value["clip_ratio/region_mean"] > 0.05  # the paper's range cuts from the first step
        assert 1 <= value["completions/mean_length"] <= c["MAX_NEW_TOKENS"]
        tokens += completions * value["completions/mean_length"]
        assert value["num_tokens"] == pytest.approx(tokens, abs=0.5)
        assert value["grad_norm"] > 0
        done = updates * (int(value["step"]) - 1)  # before this step; WARMUP_STEPS is 10
        warm_up = sum(min(1.0, (done + k + 1) / 10) for k in range(updates)) / updates
        assert value["learning_rate"] == pytest.approx(c["LEARNING_RATE"] * warm_up)
        assert value["step_time"] == pytest.approx(sum(value[name] for name in PHASES), rel=1e-6)
        assert all(value[name] > 0 for name in ("time/rollout", "time/update", "time/reward"))
        assert value["sampling_logp_difference"] < 1e-5
    for row in (rows[0], rows[2], rows[3]):
        accuracy, greedy, reward, length = numbers(row, "eval/accuracy", "eval/accuracy_greedy",
                                                   "eval/reward", "eval/mean_length")
        assert (accuracy * 32).is_integer() and (greedy * 32).is_integer()
        assert accuracy <= reward <= accuracy + 0.5 and 1 <= length <= c["MAX_NEW_TOKENS"]


def test_files_of_a_run(smoke):
    out = smoke[1]
    assert {p.name for p in out.iterdir()} == {"epoch_0", "step_2", "step_3", "metrics.csv",
                                               "training_metrics.png"}
    assert set(tree(out / "epoch_0")) == {"samples.txt", "constants.json", "train_script.py"}
    for name in ("step_2", "step_3"):
        assert set(tree(out / name)) >= {
            "model.safetensors", "config.json", "generation_config.json", "tokenizer.json",
            "tokenizer_config.json", "chat_template.jinja", "constants.json", "samples.txt",
            "train_script.py", "trainer_state.json", "policy_optimizer.pt", "metrics.csv"}
    for path, content in tree(out).items():
        assert not path.endswith((".bin", ".pth", ".pkl", ".partial")), path
        if path.endswith("policy_optimizer.pt"):  # numbers and tensors: nothing in it is run
            assert len(torch.load(out / path, weights_only=True)) > 20
            continue
        # A pickle: protocol 2 and later start so, and torch.save's zip archive holds one.
        assert not re.match(rb"\x80[\x02-\x05]", content) and content[:2] != b"PK", path
        if path.endswith("train_script.py"):
            assert content == SCRIPT.read_bytes()
    assert tree(out / "step_3")["metrics.csv"] == (out / "metrics.csv").read_bytes()


def test_samples_are_the_evaluation_as_it_was_printed(smoke):
    done, out, _ = smoke
    texts = {name: (out / name / "samples.txt").read_text(encoding="utf-8")
             for name in ("epoch_0", "step_2", "step_3")}
    for name, text in texts.items():
        assert text.startswith(f"step {name[-1]}: held-out accuracy ")
        assert text in done.stdout
        assert len(re.findall(r"\n    reward ", text)) == 3  # SHOW_SAMPLES
    questions = [re.findall(r"\n  (\S.*)", text) for text in texts.values()]
    assert questions[0] == questions[1] == questions[2]  # before and after, of the same
    assert questions[0] == pd.read_parquet(ROOT / "data" / "heldout.parquet").question[:3].tolist()


def test_constants_of_a_run(smoke, gspo):
    _, out, arguments = smoke
    facts = json.loads((out / "step_3" / "constants.json").read_text())
    gspo.configure([*arguments, "PROFILE=embedded", "DEVICE=cpu"])
    constants = {name: vars(gspo)[name] for name in gspo.DEFAULTS}
    assert facts["constants"] == json.loads(json.dumps(constants)) and len(constants) > 40
    assert facts["constants"]["MAX_STEPS"] == 3 and facts["constants"]["PROFILE"] == "embedded"
    assert facts["constants"]["LEARNING_RATE"] == gspo.DEFAULTS["LEARNING_RATE"].embedded
    assert facts["script"] == "gspo" and facts["torch"] == torch.__version__
    assert facts["command"][1:] == arguments and facts["device"] == "cpu"
    assert facts["places"][1:] == [str(ROOT)] and len(facts["places"]) == 2  # it began elsewhere
    assert facts["processes"] == 1 and re.fullmatch(r"[0-9a-f]{40}|", facts["commit"])
    state = json.loads((out / "step_3" / "trainer_state.json").read_text())
    assert state["step"] == 3 and state["questions"] == 3 * gspo.BATCH_SIZE
    assert state["num_tokens"] == int(float(read_metrics(out)[3]["num_tokens"]))


def test_plot(smoke):
    data = (smoke[1] / "training_metrics.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR"
    width, height = struct.unpack(">II", data[16:24])
    assert 1000 <= width <= 3000 and 600 <= height <= 2000
    from matplotlib.image import imread
    image = imread(smoke[1] / "training_metrics.png")[..., :3]
    # Twelve panels: each shows something that is neither white nor grey, its curves.
    colour = image.max(2) - image.min(2) > 0.2
    for rows in range(3):
        for columns in range(4):
            panel = colour[height * rows // 3:height * (rows + 1) // 3,
                           width * columns // 4:width * (columns + 1) // 4]
            assert panel.sum() > 20, f"panel {rows + 1}, {columns + 1} is empty"


def test_checkpoint_is_a_model(smoke):
    """Loaded by its class; trained, and further at step 3 than at step 2; it answers."""
    out = smoke[1]
    start = load_file(ROOT / "data" / "policy" / "model.safetensors")
    weights = [AutoModelForCausalLM.from_pretrained(out / name).state_dict()
               for name in ("step_2", "step_3")]
    for name, value in start.items():
        assert not torch.equal(value, weights[0][name]) or value.ndim == 1, name
        assert value.dtype == torch.float32
    moved = [sum((w[name] - value).square().sum() for name, value in start.items()) ** 0.5
             for w in weights]
    assert 0 < moved[0] < moved[1] < 5
    tokenizer = AutoTokenizer.from_pretrained(out / "step_3")
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "What is 1 plus 2?"}],
                                           add_generation_prompt=True, enable_thinking=False,
                                           return_tensors="pt", return_dict=True)
    model = AutoModelForCausalLM.from_pretrained(out / "step_3")
    answer = model.generate(**prompt, do_sample=False, max_new_tokens=40)
    text = tokenizer.decode(answer[0, prompt["input_ids"].shape[1]:], skip_special_tokens=True)
    assert re.search(r"Answer: \d", text)


def test_the_saved_script_runs_where_it_lies(here, tmp_path):
    """Out of a run's folder it finds its project, and goes on from what lies beside it."""
    project = tmp_path / "project"
    (project / "RL_HAND").mkdir(parents=True)
    (project / "data").symlink_to(ROOT / "data")
    shutil.copy(SCRIPT, project / "RL_HAND" / "own.py")
    script = import_file(project / "RL_HAND" / "own.py", "gspo_of_a_project")
    script.plot_metrics = lambda run: None
    script.main([*SMALL, NO_MODEL, "MAX_STEPS=1"])
    assert {p.name for p in (project / "runs").iterdir()} == {"own"}  # beside RL_HAND/ and data/
    before, saved = tree(project / "runs"), project / "runs" / "own" / "step_1"
    done = run_script("RESUME_FROM=project/runs/own/step_1", "MAX_STEPS=2",
                      f"OUTPUT_DIR={tmp_path / 'again'}", script=saved / "train_script.py",
                      cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[2] == "train_script"
    assert checkpoints(tmp_path / "again") == {"step_2"}
    assert (tmp_path / "again" / "step_2" / "train_script.py").read_bytes() == SCRIPT.read_bytes()
    assert {path: data for path, data in tree(project / "runs").items()
            if "__pycache__" not in path} == before


# ---- Folders


def test_an_earlier_run_is_left_alone(here, tmp_path):
    first = here("MAX_STEPS=1")
    before = tree(first)
    here("MAX_STEPS=1", "SEED=1")
    here("MAX_STEPS=1", "SEED=2")
    assert tree(first) == before
    assert {p.name for p in tmp_path.iterdir()} == {"run", "run_2", "run_3"}
    weights = [tree(tmp_path / name)["step_1/model.safetensors"]
               for name in ("run", "run_2", "run_3")]
    assert len(set(weights)) == 3


def test_a_folder_that_is_there_is_somebody_elses(here, tmp_path):
    """An empty one, too: a run that has just begun has made it. So is what is no folder."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run_2").write_text("a file")
    here("MAX_STEPS=1")
    assert checkpoints(tmp_path / "run_3") == {"epoch_0", "step_1"}
    assert {p.name for p in tmp_path.iterdir()} == {"run", "run_2", "run_3"}
    assert not list((tmp_path / "run").iterdir())


def test_epochs_and_steps(here, tmp_path, capsys):
    """5 questions, 2 a step: 2 whole steps an epoch. SAVE_EVERY adds folders between epochs."""
    out = here(question_file(tmp_path, 5), "NUM_EPOCHS=2", "SAVE_EVERY=1", "EVAL_EVERY=0")
    printed = capsys.readouterr().out
    assert re.search(r"  steps +0 of 4 done, 2 an epoch", printed)
    assert re.search(r"  data +5 questions\b.* 4 held out\b", printed)
    assert checkpoints(out) == {"epoch_0", "step_1", "epoch_1", "step_3", "epoch_2"}
    rows = read_metrics(out)
    assert [float(row["epoch"]) for row in rows] == [0, 0.5, 1, 1.5, 2]
    assert [row["step"] for row in rows if row["eval/accuracy"]] == ["0", "2", "4"]
    for name, step in (("step_1", 1), ("epoch_1", 2), ("step_3", 3), ("epoch_2", 4)):
        assert json.loads((out / name / "trainer_state.json").read_text())["step"] == step
        assert len(read_metrics(out / name)) == step + 1


def test_every_question_is_asked_in_each_pass_over_the_data(here, tmp_path):
    """5 questions, 2 a step, so that passes end inside a batch: each has an order of its own."""
    log = tmp_path / "log.jsonl"
    (tmp_path / "reward.py").write_text(
        "import json\n"
        "def score(questions, responses, references):\n"
        f"    with open({str(log)!r}, 'a') as file:\n"
        "        file.write(json.dumps([questions, responses, references]) + '\\n')\n"
        "    return [float(len(response)) for response in responses]\n")
    out = here(question_file(tmp_path, 5), "NUM_EPOCHS=5", "EVAL_EVERY=0",
               f"REWARD_FUNCTION={tmp_path / 'reward.py'}:score",
               "REWARD_WEIGHTS={'function': 0.25, 'verifier': 2}")
    calls = [json.loads(line) for line in log.read_text().splitlines()]
    rollouts = [call for call in calls if len(call[0]) == 8]
    known = dict(pd.read_parquet(tmp_path / "few.parquet")[["question", "answer"]].to_numpy())
    asked = []
    for questions, responses, references in rollouts:
        assert len(responses) == 8 and references == [known[question] for question in questions]
        assert questions == [questions[0]] * 4 + [questions[4]] * 4  # groups of 4, in a row
        asked += [questions[0], questions[4]]
    passes = [tuple(asked[i:i + 5]) for i in range(0, 20, 5)]
    assert len(asked) == 20 and all(set(one) == set(known) for one in passes)
    assert len(set(passes)) > 1
    # Its scores are the reward, by their weight.
    for row, (_, responses, _) in zip(read_metrics(out)[1:], rollouts, strict=True):
        score, right, reward = numbers(row, "rewards/function", "accuracy", "reward")
        assert score == pytest.approx(sum(map(len, responses)) / 8)
        assert reward == pytest.approx(0.25 * score + 2 * right, rel=1e-6)
        assert "rewards/model" not in row


# ---- Settings


def edited(folder):
    """gspo.py after a reader has written a plain value in the place of Either(full, embedded)."""
    return import_file(mutated_copy(SCRIPT, "BATCH_SIZE = Either(2, 16)", "BATCH_SIZE = 32",
                                    folder), "gspo_edited")


def test_an_edited_constant_holds_in_every_profile(gspo, tmp_path):
    """On any machine. The command line overrules it; another profile can follow in the same
    process, and the first one again."""
    script, full, embedded = (edited(tmp_path), ["PROFILE=full", "DEVICE=cpu", "FROZEN_DEVICE=cpu"],
                              ["PROFILE=embedded", "DEVICE=cpu"])
    for module, profile, batch, group in (
            (gspo, embedded, 16, 8), (gspo, full, 2, 4), (gspo, embedded, 16, 8),
            (script, embedded, 32, 8), (script, full, 32, 4), (script, embedded, 32, 8)):
        module.configure(profile)
        assert (module.BATCH_SIZE, module.GROUP_SIZE) == (batch, group)
        module.configure([*profile, "BATCH_SIZE=64", "GROUP_SIZE=2"])
        assert (module.BATCH_SIZE, module.GROUP_SIZE) == (64, 2)


def test_the_start_up_block_shows_an_edited_constant(tmp_path, capsys):
    """32 questions a step, of 800, and what follows from that."""
    edited(tmp_path).start(["PROFILE=embedded", "DEVICE=cpu", NO_MODEL,
                            f"OUTPUT_DIR={tmp_path / 'run'}"])
    block = capsys.readouterr().out
    assert "32 prompts x 8 completions" in block and "25 an epoch" in block


def test_auto_is_what_the_machine_has(gspo, monkeypatch):
    for there, profile in ((False, "embedded"), (True, "full")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: int(there))
        gspo.configure([])
        assert gspo.PROFILE == profile and gspo.DEVICE == ("cuda" if there else "cpu")
        assert gspo.LEARNING_RATE == getattr(gspo.DEFAULTS["LEARNING_RATE"], profile)


@pytest.mark.parametrize("argument, expected", [
    ("LEARNING_RATE=5e-5", 5e-5), ("LEARNING_RATE=1", 1.0), ("GROUP_SIZE=8", 8),
    ("EVAL_EVERY=1e3", 1000), ("ADAPTIVE_KL=False", False), ("POLICY_MODEL=a b=c", "a b=c"),
    ("CLIP_RANGE=0.2", 0.2), ("CLIP_RANGE=(0.1, 0.2)", (0.1, 0.2)),
    ("CLIP_RANGE=[0.1, 0.2]", (0.1, 0.2)), ("REWARD_WEIGHTS={'verifier': 2}", {"verifier": 2})])
def test_values_from_the_command_line(gspo, argument, expected):
    """Of the constant's type, where that loses nothing; text as it is; the last one counts."""
    name = argument.partition("=")[0]
    value = dict(map(gspo.parse, [f"{name}={gspo.resolve(gspo.DEFAULTS, 'full')[name]}",
                                  argument]))[name]
    assert value == expected and type(value) is type(expected)


def test_model_alone_and_verifier_alone(here):
    row = read_metrics(here("MAX_STEPS=1", "REWARD_WEIGHTS={'model': 2.0}", out="model"))[1]
    model, reward, right, accuracy = numbers(row, "rewards/model", "reward", "rewards/verifier",
                                             "accuracy")
    assert reward == pytest.approx(2 * model, rel=1e-6) and accuracy == right
    row = read_metrics(here("MAX_STEPS=1", "REWARD_WEIGHTS={'verifier': 1.0}", out="verifier"))[1]
    assert "rewards/model" not in row
    assert numbers(row, "reward") == numbers(row, "accuracy")


def test_no_reference_without_kl(here, gspo, monkeypatch):
    loaded, load = [], gspo.load

    def counting(kind, *arguments, **options):
        loaded.append(kind.__name__)
        return load(kind, *arguments, **options)

    monkeypatch.setattr(gspo, "load", counting)
    row = read_metrics(here("MAX_STEPS=2", out="with"))[2]
    assert loaded.count("AutoModelForCausalLM") == 2 and float(row["kl"]) != 0
    loaded.clear()
    row = read_metrics(here("MAX_STEPS=2", "KL_COEF=0", out="without"))[2]
    assert loaded.count("AutoModelForCausalLM") == 1
    assert "kl" not in row and float(row["kl_coef"]) == 0
    assert float(row["loss"]) == pytest.approx(float(row["policy_loss"])
                                               + 0.01 * float(row["entropy_loss"]), abs=1e-6)


def test_sentence_rewards_and_token_level_loss(here):
    """Each sentence is credited with what it adds; together they add up to the answer's reward."""
    out = here("MAX_STEPS=2", "USE_TOKEN_LEVEL_LOSS=True", "USE_SEQUENCE_LEVEL_REWARD=False")
    whole = here("MAX_STEPS=2", out="whole")
    for row in read_metrics(out)[1:]:
        reward, accuracy = numbers(row, "reward", "accuracy")
        assert reward == pytest.approx(accuracy, abs=1e-6)  # an empty answer has 0
    same = ("reward", "accuracy", "completions/mean_length")  # the same first rollout ...
    first, plain = read_metrics(out)[1], read_metrics(whole)[1]
    assert numbers(first, *same) == pytest.approx(numbers(plain, *same))
    assert float(first["advantage/size"]) > 0  # ... credited in another way
    assert first["advantage/size"] != plain["advantage/size"]


def test_evaluation_does_not_touch_the_training(here):
    runs = [here("MAX_STEPS=3", f"EVAL_EVERY={every}", f"SHOW_SAMPLES={every}",
                 f"EVAL_QUESTIONS={questions}", out=f"every_{every}")
            for every, questions in ((0, 4), (1, 7), (2, 4))]
    rows = [read_metrics(out) for out in runs]
    assert [[row["step"] for row in some if row["eval/accuracy"]] for some in rows] == [
        ["0", "3"], ["0", "1", "2", "3"], ["0", "2", "3"]]
    for some in rows[1:]:
        for one, other in zip(rows[0], some):
            for name in one:
                if not name.startswith(("eval/", "time/")) and name != "step_time":
                    assert one[name] == other[name], (one["step"], name)
    weights = [load_file(out / "step_3" / "model.safetensors") for out in runs]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]) and torch.equal(value, weights[2][name])


def test_questions_that_are_of_less_use_are_counted(here, tmp_path, capsys):
    """Long ones are dropped. Where the verifier has no number to compare, it is said what has."""
    questions = [f"What is {number} plus 4?" for number in range(6)]
    questions[2] *= 12
    answers = ["7", "seven", "7", r"\boxed{x+y}", "the answer is 7", "Paris"]
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"q": q, "a": a}) + "\n"
                            for q, a in zip(questions, answers)))
    entry = {"path": str(path), "type": "jsonl", "input": "q", "output": "a"}
    out = here(f"train_datasets={[entry]!r}", "NUM_EPOCHS=1")
    printed = capsys.readouterr().out
    assert "train_datasets: 5 of 6 questions are within MAX_PROMPT_TOKENS=64\n" in printed
    assert ("  data      5 questions, 4 held out; 3 without a number: use REWARD_FUNCTION="
            "RL_HAND/self_play/reward_func.py\n") in printed
    assert (ROOT / "RL_HAND" / "self_play" / "reward_func.py").is_file()
    assert [row["step"] for row in read_metrics(out)] == ["0", "1", "2"]


# ---- Rewards


@pytest.mark.parametrize("squashed", [True, False])
def test_a_reward_models_scores_are_those_of_its_class(embedded, squashed):
    """Of each pair alone, in the order in which they were asked, whatever is beside it; a pair that
    is asked twice is scored once."""
    embedded.configure(["PROFILE=embedded", "DEVICE=cpu", "REWARD_BATCH=3",
                        "MAX_REWARD_TOKENS=40", f"REWARD_SIGMOID={squashed}"])
    table = pd.read_parquet(ROOT / "data" / "train.parquet").head(4)
    rows = [row for row in table.to_dict("records") for _ in range(2)]
    texts = [text for row in rows[::2] for text in (row["answer"], "Answer: 7")]
    texts[3], texts[5] = "", "7 " * 100  # longer than the model is given
    rows, texts = [*rows, rows[1], rows[4]], [*texts, texts[1], texts[4]]
    folder = ROOT / "data" / "reward_model"
    judge = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer, expected, seen = AutoTokenizer.from_pretrained(folder), [], []
    with torch.no_grad():
        for row, text in zip(rows, texts):
            pair = tokenizer([row["question"]], [text], truncation="longest_first", max_length=40,
                             return_tensors="pt")
            score = judge(**pair).logits[0, 0]
            expected.append((score.sigmoid() if squashed else score).item())
    load = embedded.load

    def counting(kind, *arguments, **options):
        loaded = load(kind, *arguments, **options)
        if kind is AutoModelForSequenceClassification:
            loaded[0].register_forward_pre_hook(
                lambda model, _, given: seen.append(len(given["input_ids"])), with_kwargs=True)
        return loaded

    embedded.load = counting
    score = embedded.load_scorers(rows[0])["model"]
    seen.clear()
    assert score(rows, texts) == pytest.approx(expected, abs=1e-5)
    assert seen == [3, 3, 2] and len(set(expected)) == 8


REWARDS = {  # files that a module may be, and a mere piece of source may not
    "a dataclass": """
        from __future__ import annotations
        from dataclasses import dataclass
        @dataclass
        class Weights:
            right: float = 1.0
        weights = Weights()
        def score(questions, responses, references):
            return [weights.right * (a in r) for r, a in zip(responses, references)]""",
    "what lies beside it": """
        import json
        from pathlib import Path
        from beside import right
        TABLE = json.loads(Path(__file__).with_name("table.json").read_text())
        def score(questions, responses, references):
            import beside_as_well
            return [TABLE["right"] * right(r, a) for r, a in zip(responses, references)]""",
    "an instance that counts": """
        calls = 0
        class Reward:
            def __call__(self, questions, responses, references):
                global calls
                calls += 1
                return [float(a in r) for r, a in zip(responses, references)]
        score = Reward()"""}


@pytest.mark.parametrize("name", REWARDS)
def test_reward_files(embedded, tmp_path, monkeypatch, name):
    """As people write them: the function of each gives 1 and 0, on the second call as well."""
    folder = tmp_path / "their files"
    folder.mkdir()
    lines = [line[8:] for line in REWARDS[name].splitlines()]
    (folder / "own reward.py").write_text("\n".join(lines))
    (folder / "beside.py").write_text("def right(r, a): return float(a in r)\n")
    (folder / "beside_as_well.py").write_text("")
    (folder / "table.json").write_text('{"right": 1.0}')
    monkeypatch.setattr(embedded.sys, "path", list(embedded.sys.path))
    embedded.configure(["PROFILE=embedded", "DEVICE=cpu", "REWARD_WEIGHTS={'function': 1.0}",
                        f"REWARD_FUNCTION={folder / 'own reward.py'}:score"])
    row = {"question": "1+1?", "answer": "2"}
    function = embedded.load_scorers(row)["function"]
    for _ in range(2):
        assert function([row] * 2, ["it is 2", "no"]) == [1.0, 0.0]
    module = embedded.sys.modules["reward_function"]
    assert Path(module.__file__) == folder / "own reward.py"  # pickling looks there, say


# ---- Interrupted and killed


def started(arguments, script=SCRIPT):
    """Run the script; its plot too, as it is the last thing that is written."""
    import_file(script, "gspo_started").main(list(map(str, arguments)))


def wait_for(condition, process, seconds=300):
    """Wait until condition() holds; fails if the process ends or the time is up."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.is_alive(), "it has ended"
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.02)


def test_ctrl_c_makes_this_step_the_last(here, tmp_path):
    """It is finished, evaluated, saved and drawn, status 130; and goes on from there as if nothing
    had happened."""
    out, log = tmp_path / "run", tmp_path / "log"
    arguments = [*SMALL, NO_MODEL, "EVAL_EVERY=0", "LEARNING_RATE=1e-3"]
    process = fork(started, log, [*arguments, f"OUTPUT_DIR={out}", "MAX_STEPS=10_000"])
    try:
        wait_for(lambda: (out / "metrics.csv").exists() and len(read_metrics(out)) > 2, process)
        os.kill(process.pid, signal.SIGINT)
        process.join(300)
    finally:
        process.kill()
    said = log.read_text()
    assert process.exitcode == 130 and "Traceback" not in said and "error" not in said
    rows = read_metrics(out)
    last = int(rows[-1]["step"])
    assert 2 <= last < 1000 and [int(row["step"]) for row in rows] == list(range(last + 1))
    assert [row["step"] for row in rows if row["eval/accuracy"]] == ["0", str(last)]
    assert checkpoints(out) == {"epoch_0", f"step_{last}"}
    assert said.splitlines()[-1].startswith(f"step {last}. In {out}: ")
    assert f"step {last}: held-out accuracy" in said
    assert (out / "training_metrics.png").read_bytes()[:4] == b"\x89PNG"
    rest = here(f"RESUME_FROM={out / f'step_{last}'}", "EVAL_EVERY=0", "LEARNING_RATE=1e-3",
                f"MAX_STEPS={last + 2}", out="rest")
    whole = here("EVAL_EVERY=0", "LEARNING_RATE=1e-3", f"MAX_STEPS={last + 2}", out="whole")
    for one, other in zip(read_metrics(rest), read_metrics(whole), strict=True):
        for name, text in other.items():
            measured = name.startswith("time/") or name == "step_time"
            if not measured and not (name.startswith("eval/") and one["step"] == str(last)):
                assert one[name] == text, (one["step"], name)
    weights = [load_file(folder / f"step_{last + 2}" / "model.safetensors")
               for folder in (rest, whole)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    """But not within two seconds of the first: torchrun passes each signal on a second time."""
    out, log, marker = tmp_path / "run", tmp_path / "log", tmp_path / "marker"
    (tmp_path / "slow.py").write_text(
        "import time\nfrom pathlib import Path\n"
        "def score(questions, responses, references):\n"
        "    if len(responses) == 8:\n"
        f"        Path({str(marker)!r}).touch()\n"
        "        time.sleep(300)\n"
        "    return [1.0] * len(responses)\n")
    process = fork(started, log, [*SMALL, f"REWARD_FUNCTION={tmp_path / 'slow.py'}:score",
                                  "REWARD_WEIGHTS={'function': 1.0}", f"OUTPUT_DIR={out}"])
    try:
        wait_for(marker.exists, process)
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.1)
        os.kill(process.pid, signal.SIGINT)
        process.join(2.1)
        assert process.is_alive()
        os.kill(process.pid, signal.SIGINT)
        process.join(30)
    finally:
        process.kill()
    assert process.exitcode == 130 and "Traceback" not in log.read_text()
    assert checkpoints(out) == {"epoch_0"} and len(read_metrics(out)) == 1


def test_ctrl_c_while_models_load(gspo, monkeypatch, capsys):
    """There is no step to finish: it ends at once, without a word."""
    monkeypatch.setattr(gspo, "load", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(SystemExit) as stop:
        gspo.main([*SMALL, NO_MODEL])
    assert stop.value.code == 130 and capsys.readouterr() == ("", "")


def killed(moment, arguments):
    """Train until the save of step 3 (or 2: "rename"), and die in the middle of it as from the
    kernel's hand: with half of the optimiser's or of the model's file, or before the renaming."""
    gspo = import_file(SCRIPT, "gspo_killed")
    gspo.plot_metrics = lambda run: None
    save, replace, kind = torch.save, os.replace, gspo.transformers.PreTrainedModel
    save_pretrained = kind.save_pretrained

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def dying_state(state, path):
        save(state, path)
        if ".step_3." in str(path):
            os.truncate(path, 1000)
            die()

    def dying_model(model, path, **options):
        if ".step_3." in str(path):
            (Path(path) / "model.safetensors").write_bytes(b"x")
            die()
        save_pretrained(model, path, **options)

    def dying_rename(source, target):
        if Path(target).name == "step_2":
            die()
        replace(source, target)

    if moment == "state":
        torch.save = dying_state
    elif moment == "model":
        kind.save_pretrained = dying_model
    else:
        os.replace = dying_rename
    gspo.main(arguments)


@pytest.mark.parametrize("moment", ["model", "state", "rename"])
def test_killed_in_the_middle_of_a_save(tmp_path, here, moment):
    """What has its name is whole, and can be gone on from; what was cut off has another name."""
    out = tmp_path / "killed"
    process = fork(killed, tmp_path / "log", moment, [
        *SMALL, NO_MODEL, "MAX_STEPS=5", "SAVE_EVERY=1", "EVAL_EVERY=0", f"OUTPUT_DIR={out}"])
    process.join(300)
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
    cut = 2 if moment == "rename" else 3
    whole = {"epoch_0", *(f"step_{step}" for step in range(1, cut))}
    assert checkpoints(out) == whole
    assert {p.name for p in out.iterdir()} - whole == {"metrics.csv", f".step_{cut}.partial"}
    assert len(read_metrics(out)) == cut + 1
    for name in whole - {"epoch_0"}:
        assert all(value.isfinite().all()
                   for value in load_file(out / name / "model.safetensors").values())
        assert json.loads((out / name / "trainer_state.json").read_text())["step"] == int(name[-1])
    again = here(f"RESUME_FROM={out / f'step_{cut - 1}'}", "MAX_STEPS=3", out="again")
    assert [row["step"] for row in read_metrics(again)] == ["0", "1", "2", "3"]
    assert "step_3" in checkpoints(again)
