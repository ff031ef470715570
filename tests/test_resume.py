"""RESUME_FROM goes on exactly: in the metrics, the weights and the optimiser, to the last bit.

The runs are small but have what could go wrong: warm-up, an adaptive KL coefficient that moves,
minibatches in random order, resuming inside an epoch and at its end.
"""

import csv
import json
import shutil

import pandas as pd
import pytest
import torch
from conftest import ROOT, SCRIPT, import_file, mutated_copy
from safetensors.torch import load_file

# 9 questions, 2 a step: 4 steps an epoch, and the first pass over the questions ends inside a
# batch. The KL target is one that the first steps do not reach, so that the coefficient falls; the
# rate is one at which the KL then climbs.
SMALL = ["PROFILE=embedded", "DEVICE=cpu", "BATCH_SIZE=2", "GROUP_SIZE=4", "MINIBATCH=4",
         "MICRO_BATCH=2", "GSPO_EPOCHS=2", "EVAL_QUESTIONS=4", "SHOW_SAMPLES=1", "EVAL_EVERY=3",
         "REWARD_WEIGHTS={'verifier': 1.0}", "WARMUP_STEPS=10", "LEARNING_RATE=1e-3",
         "TARGET_KL=0.05", "NUM_EPOCHS=2", "SAVE_EVERY=1"]


def train(folder, *arguments, script=None):
    """Train in this process, without a plot; returns the run's folder."""
    gspo = import_file(script or SCRIPT)
    gspo.plot_metrics = lambda run: None
    gspo.main([*arguments, f"OUTPUT_DIR={folder}"])
    return folder


def questions(folder):
    """The argument that makes 9 questions the training data."""
    path = folder / "nine.parquet"
    pd.read_parquet(ROOT / "data" / "train.parquet").head(9).to_parquet(path)
    entry = {"path": str(path), "type": "parquet", "input": "question", "output": "answer"}
    return f"train_datasets={[entry]!r}"


def metrics(folder):
    """metrics.csv as rows of {column: text}, less the seconds."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: text for name, text in row.items()
             if not name.startswith("time/") and name != "step_time"}
            for row in rows]


def tensors(path):
    """A checkpoint file's tensors by name: of weights, or of an optimiser's state."""
    if path.suffix == ".safetensors":
        return load_file(path)
    state = torch.load(path, weights_only=True)
    return {f"{number} {key}": value for number, values in state.items()
            for key, value in values.items()}


def assert_same_run(one, other, at="epoch_2"):
    """Equal strings in the tables; equal bits in all weights and optimisers at the end."""
    for row, again in zip(metrics(one), metrics(other), strict=True):
        for name, text in row.items():
            assert again[name] == text, f"step {row['step']}, {name}"
    names, again = ({path.name for path in (folder / at).iterdir()} for folder in (one, other))
    assert names == again and "policy_optimizer.pt" in names
    for name in names:
        if name.endswith((".safetensors", ".pt")):
            last, again = (tensors(folder / at / name) for folder in (one, other))
            assert set(last) == set(again) and len(last) > 5
            for key, value in last.items():
                assert torch.equal(value, again[key]), f"{name}: {key}"
    last, again = ((folder / at / "trainer_state.json").read_text() for folder in (one, other))
    assert last == again


def whole_run(folder):
    """An uninterrupted run of 8 steps, and the arguments it was started with."""
    torch.set_num_threads(1)
    arguments = [*SMALL, questions(folder)]
    return train(folder / "run", *arguments), arguments


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run that others are compared with."""
    return whole_run(tmp_path_factory.mktemp("whole"))


def test_the_run_has_what_could_go_wrong(whole):
    """Else the comparisons below would be weaker than they look."""
    rows = metrics(whole[0])
    assert [row["step"] for row in rows] == list("012345678")
    rates = [float(row["learning_rate"]) for row in rows[1:]]
    assert rates[0] < rates[1] < rates[2] < rates[3] == rates[7] == pytest.approx(1e-3)
    coefficients = [float(row["kl_coef"]) for row in rows[1:]]
    steps = [b - a for a, b in zip(coefficients, coefficients[1:])]
    assert min(steps) < 0 < max(steps), coefficients
    assert {float(row["accuracy"]) for row in rows[1:]} != {0.0}
    losses = [row["loss"] for row in rows[1:]]
    assert len(set(losses)) == 8


@pytest.mark.parametrize("checkpoint", ["step_1", "step_3", "epoch_1", "step_6", "step_7"])
def test_resumed_run_equals_the_uninterrupted_one(whole, tmp_path, checkpoint):
    """Inside the warm-up, inside an epoch, at its end, and past it."""
    folder, _ = whole
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    torch.manual_seed(99)  # what chance stood at is no part of a checkpoint
    resumed = train(tmp_path / "resumed", f"RESUME_FROM={folder / checkpoint}")
    assert_same_run(folder, resumed)
    step = {"epoch_1": 4}.get(checkpoint) or int(checkpoint[-1])
    names = {p.name for p in resumed.iterdir() if p.is_dir()}
    assert names == {"step_1", "step_2", "step_3", "epoch_1", "step_5", "step_6", "step_7",
                     "epoch_2"} - {f"step_{s}" for s in range(step + 1)} - (
                         {"epoch_1"} if step >= 4 else set())
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_resumed_twice(whole, tmp_path):
    """A run that has itself been resumed can be resumed, by then without its first checkpoint."""
    folder, _ = whole
    shutil.copytree(folder / "step_2", tmp_path / "step_2")
    train(tmp_path / "first", f"RESUME_FROM={tmp_path / 'step_2'}", "MAX_STEPS=6")
    shutil.rmtree(tmp_path / "step_2")
    resumed = train(tmp_path / "second", f"RESUME_FROM={tmp_path / 'first' / 'step_6'}",
                    "MAX_STEPS=8")
    assert_same_run(folder, resumed)


def test_one_seed_one_run(whole, tmp_path):
    """The same again from the start is the same; another seed is not."""
    folder, arguments = whole
    assert_same_run(folder, train(tmp_path / "again", *arguments))
    other = metrics(train(tmp_path / "other", *arguments, "SEED=1", "MAX_STEPS=1"))
    assert other[0]["eval/accuracy_greedy"] == metrics(folder)[0]["eval/accuracy_greedy"]
    assert other[1]["loss"] != metrics(folder)[1]["loss"]
    assert other[1]["num_tokens"] != metrics(folder)[1]["num_tokens"]


def test_stopping_early_changes_nothing_before(whole, tmp_path):
    """MAX_STEPS is no part of the schedule: then a longer run would not be the same run."""
    folder, arguments = whole
    short = train(tmp_path / "short", *arguments, "MAX_STEPS=2", "SAVE_EVERY=0")
    for row, again in zip(metrics(folder), metrics(short)):
        for name, text in row.items():
            if not name.startswith("eval/"):  # it also evaluates at its end
                assert again[name] == text, f"step {row['step']}, {name}"
    one, other = (load_file(path / "step_2" / "model.safetensors") for path in (folder, short))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def constants(folder):
    """The constants that a checkpoint was made with."""
    return json.loads((folder / "constants.json").read_text())["constants"]


def test_the_checkpoints_constants_count_and_the_command_line_wins(whole, tmp_path):
    """Over what the file says: what was edited there after the run began changes nothing. But for
    RESUME_FROM itself, which may stand in the file."""
    folder, _ = whole
    script = mutated_copy(SCRIPT, 'RESUME_FROM = ""', f'RESUME_FROM = "{folder / "step_2"}"',
                          tmp_path)
    text = script.read_text()
    assert text.count("WARMUP_STEPS = 0") == text.count("GROUP_SIZE = Either(4, 8)") == 1
    script.write_text(text.replace("WARMUP_STEPS = 0", "WARMUP_STEPS = 7")
                      .replace("GROUP_SIZE = Either(4, 8)", "GROUP_SIZE = 16"))
    resumed = train(tmp_path / "run", "MAX_STEPS=3", "LEARNING_RATE=5e-4", "MICRO_BATCH=4",
                    script=script)
    now, saved = constants(resumed / "step_3"), constants(folder / "step_2")
    changed = {name for name in saved if now[name] != saved[name]}
    assert changed == {"LEARNING_RATE", "MICRO_BATCH", "MAX_STEPS", "RESUME_FROM", "OUTPUT_DIR"}
    assert now["WARMUP_STEPS"] == 10 and now["GROUP_SIZE"] == 4  # not the file's
    assert now["RESUME_FROM"] == str(folder / "step_2")
    row, before = metrics(resumed)[3], metrics(folder)[3]
    assert metrics(resumed)[:3] == [  # the columns of the earlier rows are as they were
        {name: one[name] for name in metrics(resumed)[0]} for one in metrics(folder)[:3]]
    assert row["num_tokens"] == before["num_tokens"] and row["kl_coef"] == before["kl_coef"]
    assert float(row["learning_rate"]) == pytest.approx(float(before["learning_rate"]) / 2)


def test_resumed_from_another_folder_by_a_relative_path(whole, tmp_path, monkeypatch, capsys):
    folder, _ = whole
    monkeypatch.chdir(folder.parent)
    train(tmp_path / "run", "RESUME_FROM=run/step_6", "MAX_STEPS=7")
    printed = capsys.readouterr().out
    assert "  settings  " in printed and "RESUME_FROM=run/step_6" in printed
    assert "  steps     6 of 7 done" in printed
    assert "step 0: held-out" not in printed  # it does not begin again
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == list("01234567")
    assert rows[:7] == metrics(folder)[:7]
    assert rows[7]["loss"] == metrics(folder)[7]["loss"]


REWARD = """
calls = 0

def score(questions, responses, references):
    return [len(response) % 7 / 7 for response in responses]
"""


@pytest.mark.parametrize("name", ["gspo", "ppo"])
def test_what_else_is_resumed(tmp_path, name):
    """An adapter, with its optimiser, on the model it was made for; PPO's critic, which has one,
    too; a reward function, which is the file itself: the run's folder has a copy for the record."""
    pytest.importorskip("peft")
    (tmp_path / "reward.py").write_text(REWARD)
    script, trained, arguments = SCRIPT, ["policy"], SMALL
    if name == "ppo":
        script, trained = ROOT / "RL_HAND" / "ppo" / "ppo.py", ["policy", "critic"]
        arguments = [*(setting for setting in SMALL if setting.partition("=")[0] not in
                       ("GSPO_EPOCHS", "TARGET_KL")), "CRITIC_WARMUP=1"]  # the policy waits for it
    whole = train(tmp_path / "whole", *arguments, questions(tmp_path), "LORA_RANK=4",
                  "EVAL_EVERY=0", "MAX_STEPS=3", f"REWARD_FUNCTION={tmp_path / 'reward.py'}:score",
                  "REWARD_WEIGHTS={'function': 1.0, 'verifier': 0.5}", script=script)
    rest = train(tmp_path / "rest", f"RESUME_FROM={whole / 'step_1'}", script=script)
    assert_same_run(whole, rest, "step_3")
    for file in ("adapter_model.safetensors", *(f"{part}{end}" for part in trained for end in (
            ".safetensors", "_optimizer.pt"))):  # else equality would say little
        before, after = (tensors(whole / at / file) for at in ("step_2", "step_3"))
        assert set(before) == set(after)
        assert any(not torch.equal(value, before[key]) for key, value in after.items()), file
    # The adapter alone is saved of the policy, in float32.
    assert not (whole / "step_3" / "model.safetensors").exists()
    saved = tensors(whole / "step_3" / "policy.safetensors")
    assert all("lora_" in key and value.dtype == torch.float32 for key, value in saved.items())
    assert metrics(whole)[3]["kl"] != "0.0"  # against the model without it
    assert (whole / "reward.py").read_text() == (rest / "reward.py").read_text() == REWARD
    assert metrics(whole)[1]["rewards/function"] != "0.0"


def test_resuming_warns_of_nothing(whole, tmp_path, recwarn):
    train(tmp_path / "run", f"RESUME_FROM={whole[0] / 'step_7'}")
    assert not [str(warning.message) for warning in recwarn]


def test_a_second_configure_knows_nothing_of_the_first(whole):
    """In a notebook: without RESUME_FROM the constants are the file's again."""
    gspo = import_file(SCRIPT)
    gspo.configure([f"RESUME_FROM={whole[0] / 'step_2'}", "MAX_STEPS=9"])
    assert (gspo.GROUP_SIZE, gspo.WARMUP_STEPS) == (4, 10)
    gspo.configure(["PROFILE=embedded"])
    assert (gspo.GROUP_SIZE, gspo.WARMUP_STEPS, gspo.RESUME_FROM) == (8, 0, "")
