"""gad.py: the discriminator, its loss, the advantages from its scores, the three stages and the
data they need; runs, resuming, the DeBERTa as the discriminator; and known bugs that these tests
must catch.

What the script shares with gspo.py is tested there, and that it is the same in test_family.py.
"""

import contextlib
import csv
import doctest
import io
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SCRIPT, import_file, must_fail, mutated_copy
from safetensors.torch import load_file
from test_gspo_loss import answers, small_batch, small_model, slow_advantages
from transformers import AutoTokenizer, BatchEncoding

GAD = ROOT / "RL_HAND" / "gad" / "gad.py"


def fresh(path=GAD):
    """The script as a new module, with the embedded profile's constants in force."""
    torch.set_num_threads(1)
    module = import_file(path, "gad_under_test")
    module.configure(["PROFILE=embedded", "DEVICE=cpu"])
    return module


@pytest.fixture
def gad():
    return fresh()


# ========================================= Discriminator =========================================


def test_discriminator_loss_by_hand(gad):
    """-log sigmoid of the gap, by math.exp; its slope is minus the chance of the other order."""
    gap = torch.tensor([-30.0, -2.0, 0.0, 0.5, 3.0, 30.0], dtype=torch.float64, requires_grad=True)
    loss = gad.discriminator_loss(gap)
    expected = [math.log(1 + math.exp(-x)) for x in gap.tolist()]
    np.testing.assert_allclose(loss.detach().numpy(), expected, rtol=1e-9, atol=1e-15)
    slope, = torch.autograd.grad(loss.sum(), gap)
    expected = [-1 / (1 + math.exp(x)) for x in gap.tolist()]
    np.testing.assert_allclose(slope.numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("huge", [200.0, 1e4, 1e30])
def test_discriminator_loss_of_huge_gaps(gad, huge):
    """Finite where exp overflows; the saturated side has no slope left."""
    gap = torch.tensor([huge, -huge], requires_grad=True)
    loss = gad.discriminator_loss(gap)
    assert loss.tolist() == [0.0, pytest.approx(huge)]
    assert torch.autograd.grad(loss.sum(), gap)[0].tolist() == [0.0, -1.0]


@pytest.mark.parametrize("smoothing", [0.1, 0.01])
def test_label_smoothing_bounds_the_gap(gad, smoothing):
    """The pair counts the other way round with its weight: no slope at the gap log((1 - e) / e),
    and beyond it the slope turns back."""
    gad.LABEL_SMOOTHING, best = smoothing, math.log((1 - smoothing) / smoothing)
    gap = torch.tensor([best - 1, best, best + 1, 1.5], dtype=torch.float64, requires_grad=True)
    loss = gad.discriminator_loss(gap)
    slope, = torch.autograd.grad(loss.sum(), gap)
    assert slope[0] < 0 < slope[2] and abs(slope[1]) < 1e-9
    one, other = math.log(1 + math.exp(-1.5)), math.log(1 + math.exp(1.5))
    assert loss[3].item() == pytest.approx((1 - smoothing) * one + smoothing * other)


def readings_of_plain_passes(model, head, prompts, batch):
    """The head's reading of each token of each answer, one answer at a time and without padding."""
    found = []
    for i, k in enumerate(batch.prompt_index.tolist()):
        length = int(batch.completion_mask[i].sum())
        ids = torch.tensor([prompts[k] + batch.completion_ids[i, :length].tolist()])
        states = model.base_model(input_ids=ids).last_hidden_state[0, len(prompts[k]):]  # (n, H)
        found.append(states @ head.weight[0] + head.bias[0])
    return found


@pytest.mark.parametrize("where", ["mean", "last"])
def test_scores_are_those_of_plain_forward_passes(gad, where):
    """The mean over the answer's own tokens, its last included, or the reading of that last one;
    so is the gradient, in the network and in the head."""
    gad.SCORE_AT, model = where, small_model()
    discriminator = gad.Discriminator(model)
    torch.nn.init.normal_(discriminator.head.weight)
    prompts, batch = small_batch(gad)
    scores = discriminator(None, None, batch)
    readings = readings_of_plain_passes(model, discriminator.head, prompts, batch)
    expected = torch.stack([r.mean() if where == "mean" else r[-1] for r in readings])
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
    weights, parameters = torch.randn(6), list(discriminator.parameters())
    ours = torch.autograd.grad((scores * weights).sum(), parameters)
    theirs = torch.autograd.grad((expected * weights).sum(), parameters)
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("where", ["mean", "last"])
def test_what_is_in_the_padding_never_matters(gad, where):
    """Nor what else is in the batch."""
    gad.SCORE_AT = where
    discriminator = gad.Discriminator(small_model())
    torch.nn.init.normal_(discriminator.head.weight)
    _, batch = small_batch(gad)
    scores = discriminator(None, None, batch)
    padding = 1 - batch.completion_mask.long()
    other = gad.Batch(**vars(batch) | {
        "completion_ids": (batch.completion_ids + 7 * padding) % 23})
    torch.testing.assert_close(discriminator(None, None, other), scores, rtol=0, atol=1e-6)
    for i in range(6):
        alone = discriminator(None, None, batch.rows(torch.tensor([i])))
        torch.testing.assert_close(alone, scores[i:i + 1], rtol=0, atol=1e-5)


def test_the_last_token_counts(gad):
    """Also that of an answer that was cut off: two that differ in it alone get two scores."""
    discriminator = gad.Discriminator(small_model())
    torch.nn.init.normal_(discriminator.head.weight)
    _, batch = small_batch(gad)
    other = batch.completion_ids.clone()
    other[0, 4] = (other[0, 4] + 1) % 23
    gap = discriminator(None, None, batch) - discriminator(
        None, None, gad.Batch(**vars(batch) | {"completion_ids": other}))
    assert gap[0].abs() > 1e-3 and torch.equal(gap[1:], torch.zeros(5))


class Tokenizer:
    """Token ids as text; 0 is padding, 1 is the end."""
    pad_token_id, eos_token_id = 0, 1

    def batch_decode(self, tokens, skip_special_tokens):
        assert skip_special_tokens
        return [" ".join(str(i) for i in ids if i > 1) for ids in tokens]

    def __call__(self, texts, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [[int(word) for word in text.split()] for text in texts]}

    def pad(self, prompts, padding_side, return_tensors):
        assert padding_side == "left" and return_tensors == "pt"
        prompts = [prompt["input_ids"] for prompt in prompts]
        blank = [[0] * (max(map(len, prompts)) - len(ids)) for ids in prompts]
        return BatchEncoding({
            "input_ids": torch.tensor([b + ids for b, ids in zip(blank, prompts)]),
            "attention_mask": torch.tensor([b + [1] * len(i) for b, i in zip(blank, prompts)])})


def small_game(gad, monkeypatch, step=1, same=(2,), **constants):
    """A run with a random discriminator, and a rollout of 3 questions with 2 answers each, of which
    those in `same` are the teacher's. Optimiser steps are recorded, not made."""
    for name, value in ({"GROUP_SIZE": 2, "SEQKD_STEPS": 5, "CRITIC_WARMUP": 5, "MICRO_BATCH": 64,
                         "MAX_NEW_TOKENS": 8} | constants).items():
        monkeypatch.setattr(gad, name, value)
    discriminator = gad.Discriminator(small_model(seed=3))
    torch.manual_seed(4)
    torch.nn.init.normal_(discriminator.head.weight)
    prompts, batch = small_batch(gad)
    teachers = [[5, 6, 7, 1], [8, 1], [9, 10, 11, 12, 13, 1]]
    rows = [{"question": f"q{i}", "prompt_ids": p, "teacher_ids": t, "has_teacher": True,
             "answer": "1"}
            for i, (p, t) in enumerate(zip(prompts, teachers))]
    for name in ("completion_ids", "completion_mask"):  # room for the longest text of the teacher
        setattr(batch, name, F.pad(getattr(batch, name), (0, 1)))
    for i in same:
        ids = teachers[int(batch.prompt_index[i])]
        batch.completion_ids[i, :len(ids)] = torch.tensor(ids)
        batch.completion_mask[i] = torch.tensor([float(t < len(ids)) for t in range(6)])
    steps = []

    def record(run, name, meter):
        gradients = [p.grad.clone() for p in run.trained[name][0].parameters()]
        steps.append(SimpleNamespace(name=name, gradients=gradients))

    monkeypatch.setattr(gad, "optimiser_step", record)
    run = SimpleNamespace(
        trained={"discriminator": (discriminator, gad.new_optimizer(discriminator, 1.0))},
        tokenizer=Tokenizer(), policy=SimpleNamespace(device=torch.device("cpu")), step=step)
    return run, rows, batch, steps


def played(gad, run, rows, batch):
    """discriminator_step: the scores, and what it measured (NaN: nothing to measure)."""
    meter = gad.Meter()
    scores = gad.discriminator_step(run, meter, rows, batch)
    gradients = [p.grad for p in run.trained["discriminator"][0].parameters()]
    assert all(gradient is None for gradient in gradients)  # nothing is left for the next step
    return scores, {name: mean for name, mean in meter.means().items() if not math.isnan(mean)}


def slow_game(gad, run, rows, batch, same):
    """Eq. 3 pair by pair: scores of student and teacher (6,), the mean loss, its gradient."""
    discriminator = run.trained["discriminator"][0]
    teachers = gad.teacher_answers(run, rows)
    student = torch.cat([discriminator(None, None, batch.rows(torch.tensor([i])))
                         for i in range(6)])
    teacher = torch.cat([discriminator(None, None, teachers.rows(torch.tensor([k])))
                         for k in batch.prompt_index.tolist()])
    losses = [-torch.log(torch.sigmoid(teacher[i] - student[i])) for i in range(6) if i not in same]
    loss = sum(losses) / len(losses)
    return (student.detach(), teacher.detach(), loss.item(),
            torch.autograd.grad(loss, list(discriminator.parameters())))


@pytest.mark.parametrize("micro_batch", [1, 4, 64])
def test_discriminator_step_is_that_of_the_equation(gad, monkeypatch, micro_batch):
    """The mean over pairs with different texts, whatever the size of the micro-batches."""
    run, rows, batch, steps = small_game(gad, monkeypatch, MICRO_BATCH=micro_batch)
    student, teacher, loss, gradients = slow_game(gad, run, rows, batch, same=(2,))
    scores, metrics = played(gad, run, rows, batch)
    step, = steps
    assert step.name == "discriminator" and not scores.requires_grad
    torch.testing.assert_close(scores, student, rtol=0, atol=1e-5)
    for ours, theirs in zip(step.gradients, gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    gap = (teacher - student)[[0, 1, 3, 4, 5]]
    norm = math.sqrt(sum(g.square().sum() for g in gradients))
    assert metrics == pytest.approx({
        "d_loss": loss, "d_acc": (gap > 0).double().mean().item(), "score_gap": gap.mean().item(),
        "student_score": student[[0, 1, 3, 4, 5]].mean().item(), "matches_teacher": 1 / 6,
        "teacher_score": teacher[[0, 1, 3, 4, 5]].mean().item(), "d_grad_norm": norm}, rel=1e-4)


def test_no_pair_at_all(gad, monkeypatch):
    """Every answer is the teacher's: nothing to learn, nothing to report, and no 0 / 0. D takes no
    step: its momentum would move it without a pair."""
    run, rows, batch, steps = small_game(gad, monkeypatch, same=range(6))
    scores, metrics = played(gad, run, rows, batch)
    assert metrics == {"d_grad_norm": 0.0, "matches_teacher": 1.0}
    assert scores.isfinite().all() and not steps


@pytest.mark.parametrize("micro_batch", [1, 64])
def test_a_question_without_a_text_makes_no_pair(gad, monkeypatch, micro_batch):
    """Its answers have D's scores, and neither loss, gradient nor metrics know of them."""
    run, rows, batch, steps = small_game(gad, monkeypatch, MICRO_BATCH=micro_batch)
    rows[1] |= {"teacher_ids": [1], "has_teacher": False}
    without = [i for i, question in enumerate(batch.prompt_index.tolist()) if question == 1]
    student, teacher, loss, gradients = slow_game(gad, run, rows, batch, same=(2, *without))
    scores, metrics = played(gad, run, rows, batch)
    torch.testing.assert_close(scores, student, rtol=0, atol=1e-5)
    for ours, theirs in zip(steps[0].gradients, gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    answered = [i for i in range(6) if i not in without]
    others = [i for i in answered if i != 2]
    assert metrics["d_loss"] == pytest.approx(loss, rel=1e-4)
    assert metrics["matches_teacher"] == pytest.approx((2 in answered) / len(answered))
    gap = (teacher - student)[others].mean().item()
    assert metrics["score_gap"] == pytest.approx(gap, rel=1e-4)
    for row in rows:
        row["has_teacher"] = False
    scores, metrics = played(gad, run, rows, batch)
    torch.testing.assert_close(scores, student, rtol=0, atol=1e-5)
    assert metrics == {"d_grad_norm": 0.0} and len(steps) == 1


def test_at_first_all_are_equal_and_ties_count_half(gad, monkeypatch):
    run, rows, batch, steps = small_game(gad, monkeypatch, same=())
    discriminator = gad.Discriminator(small_model())
    run.trained["discriminator"] = (discriminator, gad.new_optimizer(discriminator, 1.0))
    scores, metrics = played(gad, run, rows, batch)
    assert torch.equal(scores, torch.zeros(6))
    assert (metrics["d_acc"], metrics["score_gap"]) == (0.5, 0.0)
    assert metrics["d_loss"] == pytest.approx(math.log(2))
    assert metrics["d_grad_norm"] > 0  # it can learn from there


@pytest.mark.parametrize("step, every, frozen", [
    (1, 1, False), (8, 0, False), (10, 3, False),       # the warm-up is never frozen
    (11, 1, False), (11, 0, True), (12, 0, True), (11, 2, True), (12, 2, False), (12, 3, False)])
def test_when_the_discriminator_is_frozen(gad, monkeypatch, step, every, frozen):
    """Then too its gradient is measured, which tells a collapse, and thrown away."""
    run, rows, batch, steps = small_game(gad, monkeypatch, step=step, DISCRIMINATOR_EVERY=every)
    _, metrics = played(gad, run, rows, batch)
    assert len(steps) == 1 - frozen and metrics["d_grad_norm"] > 0


def test_signal_by_hand(gad):
    """Two groups of three: in the first D has one right answer above the wrong one and one level
    with it; the second has no wrong one and no spread."""
    gad.GROUP_SIZE = 3
    scores = torch.tensor([2.0, 1.0, 1.0, 0.3, 0.3, 0.3])

    def measured(scores, right):
        meter = gad.Meter()
        gad.measure_signal(meter, scores, torch.tensor(right))
        return meter.means()

    metrics = measured(scores, [1.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    assert metrics == pytest.approx({"d_rank": 0.75, "frac_no_signal": 0.5,
                                     "d_spread": math.sqrt(1 / 3) / 2})
    assert math.isnan(measured(scores, [1.0] * 6)["d_rank"])
    assert measured(-scores, [1.0, 0.0, 1.0, 0.0, 0.0, 0.0])["d_rank"] == 0.25


# ================================ Advantages, and the policy's loss ===============================


@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("by_std", [True, False])
def test_advantages_are_those_of_the_equation(gad, by_std, correction):
    gad.NORM_ADV_BY_STD, gad.STD_CORRECTION = by_std, correction
    gad.GROUP_SIZE, gad.ADVANTAGE_EPSILON = 4, 1e-3
    scores = torch.randn(12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scores[:4] += 5.0
    scores[8:] *= 3.0
    expected = slow_advantages(scores, 4, "normalized" if by_std else "relative", correction, 1e-3)
    np.testing.assert_allclose(gad.compute_advantages(scores).numpy(), expected[:, 0], rtol=1e-10,
                               atol=1e-12)


@pytest.mark.parametrize("by_std", [True, False])
def test_equal_scores_get_advantages_of_exactly_zero(gad, by_std):
    """Eight times the same answer: its scores differ by float noise, if at all."""
    gad.NORM_ADV_BY_STD, gad.GROUP_SIZE, gad.ADVANTAGE_EPSILON = by_std, 8, 1e-8
    for score in (0.0, 0.1, -0.3, 1 / 3, 12345.678):
        scores = torch.full((16,), score)
        scores[2] = torch.nextafter(scores[2], torch.tensor(1e9))
        scores[8:] = torch.arange(8.0)
        found = gad.compute_advantages(scores)
        assert torch.equal(found[:8], torch.zeros(8)) and found[8:].abs().min() > 0.2


@pytest.mark.parametrize("clip, spread", [((3e-4, 4e-4), 4e-4), ((0.2, 0.28), 0.3)])
def test_the_policy_loss_is_that_of_gspo(gad, clip, spread):
    """Value, gradient and statistics, of the function that test_gspo_loss.py holds to the paper."""
    gspo = import_file(SCRIPT)
    gspo.configure(["PROFILE=embedded", "DEVICE=cpu"])
    gad.CLIP_RANGE = gspo.CLIP_RANGE = clip
    found = []
    for module in (gad, gspo):
        new, old, advantages, mask, _ = answers(spread)
        loss, statistics = module.policy_loss(new, old, advantages, mask)
        total = (loss * module.token_weights(mask)).sum()
        found.append([total.detach(), torch.autograd.grad(total, new)[0], *statistics.values()])
    assert len(found[0]) == len(found[1]) > 4
    assert all(torch.equal(one, other) for one, other in zip(*found))
    assert 0 < found[0][1].count_nonzero()


# ============================================= Data ==============================================


def test_teachers_texts_become_tokens(gad, capsys, monkeypatch):
    """With the end token; those that are empty, or too long with it, are none, and counted."""
    monkeypatch.setattr(gad, "MAX_NEW_TOKENS", 4)
    rows = [{"teacher": text} for text in ("5 6 7", "5 6 7 8", "", "  ", " 9\n")]
    made = gad.with_teachers(rows, Tokenizer())
    assert [row["teacher_ids"] for row in made] == [[5, 6, 7, 1], [1], [1], [1], [9, 1]]
    assert [row["has_teacher"] for row in made] == [True, False, False, False, True]
    assert capsys.readouterr().out == (
        "train_datasets: 3 of 5 questions have no teacher's text (2 empty, 1 longer than "
        "MAX_NEW_TOKENS = 4 with the end token): they are asked in stage 3 only\n")
    assert gad.with_teachers(rows[:1], Tokenizer()) == made[:1]
    assert capsys.readouterr().out == ""
    with pytest.raises(SystemExit) as stop:
        gad.with_teachers(rows[1:4], Tokenizer())
    assert stop.value.code.startswith("error: train_datasets") and "MAX_NEW" in stop.value.code


def test_questions_without_a_text_are_asked_in_stage_3_only(gad, monkeypatch):
    """And there all are, in the order of one pass over all."""
    for name, value in {"SEQKD_STEPS": 4, "CRITIC_WARMUP": 4}.items():
        monkeypatch.setattr(gad, name, value)
    asked = {1: [], 2: [], 3: []}

    def step_of(stage):
        def one_step(run, meter):
            asked[stage] += [row["question"] for row in gad.next_questions(run, 2)]
        return one_step

    for stage, name in {1: "seqkd_step", 2: "warmup_step", 3: "adversarial_step"}.items():
        monkeypatch.setattr(gad, name, step_of(stage))
    monkeypatch.setattr(gad, "begin_game", lambda run: None)
    monkeypatch.setattr(gad, "finish_step", lambda *_: None)
    run = SimpleNamespace(step=0, total_steps=16, questions=0, train_rows=[
        {"question": i, "has_teacher": i % 4 == 0} for i in range(16)])
    gad.train(run)
    assert set(asked[1]) == set(asked[2]) == {0, 4, 8, 12} and len(asked[1] + asked[2]) == 16
    assert sorted(asked[3]) == list(range(16))


def test_teachers_answers_are_a_batch(gad, monkeypatch):
    run, rows, _, _ = small_game(gad, monkeypatch)
    batch = gad.teacher_answers(run, rows)
    assert batch.completion_ids.tolist() == [[5, 6, 7, 1, 0, 0], [8, 1, 0, 0, 0, 0],
                                             [9, 10, 11, 12, 13, 1]]
    assert batch.completion_mask.sum(1).tolist() == [4, 2, 6]
    assert batch.completion_mask.dtype == torch.float32 and batch.ended.all()
    for row, ids, mask in zip(rows, batch.prompt_ids, batch.prompt_mask):
        assert ids[mask.bool()].tolist() == row["prompt_ids"]


@pytest.mark.parametrize("longer", ["student", "teacher"])
def test_both_players_are_groups_of_one_more(gad, monkeypatch, longer):
    """Each question's answers, the teacher's last, whoever wrote the longest; as they were."""
    run, rows, batch, _ = small_game(gad, monkeypatch)
    if longer == "student":
        for name in ("completion_ids", "completion_mask"):
            setattr(batch, name, F.pad(getattr(batch, name), (0, 3), value=1))
    else:
        batch = gad.Batch(**vars(batch) | {name: getattr(batch, name)[:, :2] for name in
                                           ("completion_ids", "completion_mask")})
    teachers = gad.teacher_answers(run, rows)
    both = gad.both_players(batch, teachers)
    assert both.prompt_index.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] and both.group_size() == 3
    from_whom = [(batch, 0), (batch, 1), (teachers, 0), (batch, 2), (batch, 3), (teachers, 1),
                 (batch, 4), (batch, 5), (teachers, 2)]
    for i, (source, k) in enumerate(from_whom):
        for name in ("completion", "prompt"):
            ids, mask = (getattr(both, f"{name}_{part}")[i] for part in ("ids", "mask"))
            wanted, real = (getattr(source, f"{name}_{part}")[k] for part in ("ids", "mask"))
            assert ids[mask.bool()].tolist() == wanted[real.bool()].tolist()


def entry(path, **keys):
    """train_datasets as an argument."""
    return f"train_datasets={[{'path': str(path), 'input': 'question', 'output': 'answer'} | keys]}"


REFUSALS = [
    ([entry("data/train.parquet")], ["train_datasets", '"teacher" in entry', "teacher's texts"]),
    ([entry("data/train.parquet", teacher="no")], ["no column no", "teacher_response"]),
    (["SCORE_AT=first"], ["SCORE_AT='first'", '("mean", "last")']),
    (["DISCRIMINATOR="], ["DISCRIMINATOR=''", "DeBERTa"]),
    (["USE_SEQUENCE_LEVEL_REWARD=False"], ["USE_SEQUENCE_LEVEL_REWARD", "whole answers"]),
    (["GROUP_SIZE=1"], ["GROUP_SIZE=1", ">= 2"]),
    (["SEQKD_STEPS=-1"], ["SEQKD_STEPS=-1", ">= 0"]),
    (["CRITIC_WARMUP=-1"], ["CRITIC_WARMUP=-1", ">= 0"]),
    (["SEQKD_BATCH=0"], ["SEQKD_BATCH=0", ">= 1"]),
    (["WARMUP_BATCH=0"], ["WARMUP_BATCH=0", ">= 1"]),
    (["GAD_EPOCHS=0"], ["GAD_EPOCHS=0", ">= 1"]),
    (["DISCRIMINATOR_EVERY=-1"], ["DISCRIMINATOR_EVERY=-1", ">= 0"]),
    (["DISCRIMINATOR_LEARNING_RATE=-1.0"], ["DISCRIMINATOR_LEARNING_RATE=-1.0", ">= 0"]),
    (["SEQKD_LEARNING_RATE=-1.0"], ["SEQKD_LEARNING_RATE=-1.0", ">= 0"]),
    (["LABEL_SMOOTHING=0.5"], ["LABEL_SMOOTHING=0.5", "< 0.5"]),
    (["CLIP_RANGE=(1.5, 0.2)"], ["CLIP_RANGE=(1.5, 0.2)", "<= 1"]),
    (["KL_COEF=-0.1"], ["KL_COEF=-0.1", ">= 0"]),
    (["NORM_ADV_BY_STD=2"], ["NORM_ADV_BY_STD", "expected bool"]),
]


@pytest.mark.parametrize("arguments, says", REFUSALS)
def test_constants_and_data_that_cannot_work(gad, tmp_path, capsys, arguments, says):
    """One line that names it and what is expected; no model is loaded, nothing is written."""
    gad.load_policy = gad.load_scorers = None  # calling them would be a TypeError
    with pytest.raises(SystemExit) as stop:
        gad.main(["PROFILE=embedded", "DEVICE=cpu", f"OUTPUT_DIR={tmp_path / 'run'}", *arguments])
    line = stop.value.code
    assert isinstance(line, str) and line.startswith("error: ") and "\n" not in line
    for words in says:
        assert words in line, f"{words!r} is not in {line!r}"
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ""


def test_a_discriminator_that_is_not_there(tmp_path):
    """One line; nothing is written."""
    with pytest.raises(SystemExit) as stop:
        train(tmp_path / "run", *SMALL, "DISCRIMINATOR=data/policy_answers.parquet")
    line = stop.value.code
    assert line.startswith("error: DISCRIMINATOR=data/policy_answers.parquet") and "\n" not in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["SEQKD_BATCH", "WARMUP_BATCH"])
def test_batches_that_processes_cannot_share(gad, name):
    gad.processes = 2
    with pytest.raises(SystemExit) as stop:
        gad.configure(["PROFILE=embedded", "DEVICE=cpu", f"{name}=5"])
    assert f"{name}=5" in stop.value.code and "processes share them" in stop.value.code


# ============================================= Runs ==============================================

SMALL = ["PROFILE=embedded", "DEVICE=cpu", "BATCH_SIZE=2", "GROUP_SIZE=4", "MINIBATCH=4",
         "MICRO_BATCH=4", "SEQKD_STEPS=2", "SEQKD_BATCH=3", "SEQKD_LEARNING_RATE=1e-3",
         "CRITIC_WARMUP=2", "WARMUP_BATCH=5", "MAX_STEPS=7", "EVAL_QUESTIONS=4", "SHOW_SAMPLES=1",
         "EVAL_EVERY=0", "SAVE_EVERY=1", "REWARD_WEIGHTS={'verifier': 1.0}"]


def train(folder, *arguments, module=None):
    """A run in this process, without a plot; returns what it printed."""
    module, printed = module or fresh(), io.StringIO()
    module.plot_metrics = lambda run: None
    with contextlib.redirect_stdout(printed):
        module.main([*arguments, f"OUTPUT_DIR={folder}"])
    return printed.getvalue()


def metrics(folder):
    """metrics.csv as rows of {column: text}, less what was measured of the machine."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [{name: text for name, text in row.items() if not name.startswith("time/")
                 and name not in ("step_time", "peak_memory")} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of 2 + 2 + 3 steps."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return SimpleNamespace(printed=train(folder, *SMALL), folder=folder)


def weights(path, name="model"):
    """A network of a checkpoint, or of data/."""
    return load_file(path / f"{name}.safetensors")


def moments(path, name):
    """An optimiser's state of a checkpoint, flat: {"number of the weight, what": tensor}."""
    state = torch.load(path / f"{name}_optimizer.pt", weights_only=True)
    return {f"{number} {what}": value for number, values in state.items()
            for what, value in values.items()}


def same(one, other):
    """Whether two state dicts agree to the last bit."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_the_three_stages(whole):
    """Each leaves a checkpoint and an evaluation, and moves what it should, and nothing else."""
    folder = whole.folder
    assert {p.name for p in folder.iterdir()} == {
        "epoch_0", "step_1", "seqkd", "step_3", "warmup", "step_5", "step_6", "adversarial",
        "metrics.csv"}
    rows = metrics(folder)
    assert [row["stage"] for row in rows] == ["", "1.0", "1.0", "2.0", "2.0", *["3.0"] * 3]
    assert [row["step"] for row in rows if row["eval/accuracy"]] == ["0", "2", "4", "7"]
    start = weights(ROOT / "data" / "policy")
    seqkd, warmup, end = (folder / name for name in ("seqkd", "warmup", "adversarial"))
    assert not same(start, weights(seqkd))
    assert same(weights(seqkd), weights(folder / "step_3")) and same(weights(seqkd),
                                                                    weights(warmup))
    assert not same(weights(warmup), weights(end))
    for checkpoint in (folder / "step_3", warmup, end):  # the reference: the student after SeqKD
        assert same(weights(checkpoint, "reference"), weights(seqkd))
    judges = [weights(path, "discriminator") for path in (seqkd, folder / "step_3", warmup, end)]
    assert not any(same(one, other) for one, other in zip(judges, judges[1:]))
    assert not judges[0]["head.weight"].any() and judges[1]["head.weight"].any()
    assert "SEQKD_STEPS=2, CRITIC_WARMUP=2, GAD_EPOCHS=1, DISCRIMINATOR=policy" in whole.printed


def test_with_lora_each_network_is_the_base_with_an_adapter(tmp_path):
    """The student's, the discriminator's, and the reference's, which is the one that SeqKD left;
    the base stays as it was, and a resumed run is the same to the last bit."""
    folder = tmp_path / "run"
    train(folder, *SMALL, "LORA_RANK=4")
    ends = [folder / name for name in ("seqkd", "warmup", "adversarial")]
    seqkd, warmup, end = (weights(path, "adapter_model") for path in ends)
    assert same(seqkd, warmup) and not same(warmup, end)
    base = weights(ROOT / "data" / "policy")
    judges = [weights(path, "discriminator") for path in ends]
    for reference in (weights(path, "reference") for path in ends[1:]):
        adapter = {f"base_model.model.{name.replace('.default', '')}": value
                   for name, value in reference.items() if "lora_" in name}
        assert same(adapter, seqkd)
        assert torch.equal(reference["model.layers.0.mlp.up_proj.base_layer.weight"],
                           base["model.layers.0.mlp.up_proj.weight"])
    assert all("lora_" in name or "head." in name for judge in judges for name in judge)
    for name in ("base_model.layers.0.mlp.up_proj.lora_B.default.weight", "head.weight"):
        assert not any(torch.equal(one[name], other[name])
                       for one, other in zip(judges, judges[1:]))
    train(tmp_path / "rest", f"RESUME_FROM={ends[1]}")
    assert metrics(tmp_path / "rest") == metrics(folder)
    assert same(weights(tmp_path / "rest" / "adversarial", "adapter_model"), end)


def test_what_each_stage_measures(whole):
    """The columns of a stage are filled with finite numbers, those of the others are empty."""
    game = {"d_loss", "d_acc", "student_score", "teacher_score", "score_gap", "d_grad_norm",
            "matches_teacher"}
    signal = {"d_spread", "frac_no_signal"}
    policy = {"policy_loss", "kl", "kl_loss", "accuracy", "reward", "ratio/mean", "advantage/size"}
    for row in metrics(whole.folder)[1:]:
        filled = {name for name, text in row.items() if text}
        expected = {"1.0": {"seqkd_loss", "entropy", "grad_norm"}, "2.0": game,
                    "3.0": game | signal | policy | {"entropy", "grad_norm"}}[row["stage"]]
        others = {"seqkd_loss", "entropy"} | game | signal | policy
        assert expected <= filled and not (others - expected) & filled
        assert all(math.isfinite(float(text)) for text in row.values() if text)
    first = metrics(whole.folder)[3]  # a head of zeros: it cannot tell them apart, nor is it wrong
    assert first["d_acc"] == "0.5" and float(first["d_loss"]) == pytest.approx(math.log(2))


def test_learning_rates_of_the_stages(whole):
    rates = [float(row["learning_rate"] or 0.0) for row in metrics(whole.folder)]
    assert rates == pytest.approx([0.0, 1e-3, 1e-3, 0.0, 0.0, 1e-4, 1e-4, 1e-4], rel=1e-6)
    state = json.loads((whole.folder / "adversarial" / "trainer_state.json").read_text())
    assert state["step"] == 7 and state["questions"] == 2 * 3 + 2 * 5 + 3 * 2
    for name, steps in {"policy": 2 + 3 * 2, "discriminator": 2 + 3}.items():  # none in the warm-up
        assert moments(whole.folder / "adversarial", name)["0 step"].item() == steps


@pytest.mark.parametrize("checkpoint", ["step_1", "seqkd", "step_3", "warmup", "step_6"])
def test_resumed_run_equals_the_uninterrupted_one(whole, tmp_path, checkpoint):
    """To the last bit, out of each stage and from its end, and without the other checkpoints: both
    networks, the reference, the optimisers, counters and metrics."""
    shutil.copytree(whole.folder / checkpoint, tmp_path / "kept")
    printed = train(tmp_path / "run", f"RESUME_FROM={tmp_path / 'kept'}")
    assert "of 7 done" in printed and " 0 of 7" not in printed
    assert metrics(tmp_path / "run") == metrics(whole.folder)
    one, other = whole.folder / "adversarial", tmp_path / "run" / "adversarial"
    for name in ("model", "discriminator", "reference"):
        assert same(weights(one, name), weights(other, name)), name
    for name in ("policy", "discriminator"):
        assert same(moments(one, name), moments(other, name)), name
    assert (one / "trainer_state.json").read_text() == (other / "trainer_state.json").read_text()


def test_a_checkpoint_without_its_discriminator_is_refused(whole, tmp_path):
    shutil.copytree(whole.folder / "warmup", tmp_path / "warmup")
    (tmp_path / "warmup" / "discriminator.safetensors").unlink()
    with pytest.raises(SystemExit) as stop:
        train(tmp_path / "run", f"RESUME_FROM={tmp_path / 'warmup'}")
    assert stop.value.code.startswith("error: RESUME_FROM=") and "\n" not in stop.value.code
    assert "discriminator.safetensors" in stop.value.code


def test_stages_can_be_left_out(tmp_path):
    """SeqKD alone; the game at once, against the policy as it is; and no reference without a KL."""
    train(tmp_path / "seqkd", *SMALL, "SEQKD_STEPS=9", "MAX_STEPS=2", "SAVE_EVERY=0")
    assert {p.name for p in (tmp_path / "seqkd").iterdir()} == {"epoch_0", "seqkd", "metrics.csv"}
    train(tmp_path / "game", *SMALL, "SEQKD_STEPS=0", "CRITIC_WARMUP=0", "MAX_STEPS=1",
          "KL_COEF=0.0", "DISCRIMINATOR_EVERY=0")
    row = metrics(tmp_path / "game")[1]
    assert row["stage"] == "3.0" and row["frac_no_signal"] == "1.0"  # D is all zeros
    assert float(row["advantage/size"]) == 0.0 and "kl" not in row
    saved = tmp_path / "game" / "adversarial"
    assert not (saved / "reference.safetensors").exists()
    assert not weights(saved, "discriminator")["head.weight"].any()  # never stepped
    assert float(row["grad_norm"]) == 0.0 and same(weights(saved), weights(ROOT / "data/policy"))


def test_a_deberta_as_the_discriminator(tmp_path):
    """It reads texts, starts as it is on disk, learns, and is kept for resuming."""
    arguments = [*SMALL, "DISCRIMINATOR=data/reward_model", "SEQKD_STEPS=1", "CRITIC_WARMUP=1",
                 "MAX_STEPS=3"]
    train(tmp_path / "run", *arguments)
    rows = metrics(tmp_path / "run")
    assert float(rows[2]["d_acc"]) > 0.5 and float(rows[2]["d_loss"]) < math.log(2)  # it can judge
    start = load_file(ROOT / "data" / "reward_model" / "model.safetensors")
    judge = weights(tmp_path / "run" / "seqkd", "discriminator")
    assert all(torch.equal(judge[f"model.{key}"], value) for key, value in start.items())
    assert not same(judge, weights(tmp_path / "run" / "warmup", "discriminator"))
    train(tmp_path / "again", f"RESUME_FROM={tmp_path / 'run' / 'warmup'}")
    assert metrics(tmp_path / "again") == rows


def test_a_debertas_scores_are_those_of_its_class(gad, monkeypatch):
    """Pairs of texts, each as if it were alone."""
    folder = ROOT / "data" / "reward_model"
    discriminator = gad.PairDiscriminator(str(folder))
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "policy")
    rows = [{"question": "What is 3 plus 4?"}, {"question": "Compute 12 + 13."}]
    texts = ["3+4=7. Answer: 7", "Answer: 9", "2+3=5. 1+1=2. Answer: 25"]
    ids = [[*i, tokenizer.eos_token_id] for i in tokenizer(texts)["input_ids"]]
    made = [row | {"prompt_ids": [1], "teacher_ids": i} for row, i in zip([rows[0]] * 2 + rows[1:],
                                                                         ids)]
    run = SimpleNamespace(tokenizer=tokenizer, policy=SimpleNamespace(device=torch.device("cpu")))
    batch = gad.teacher_answers(run, made)
    batch.prompt_index = torch.tensor([0, 0, 1])
    scores = discriminator(run, rows, batch)
    pairs = AutoTokenizer.from_pretrained(folder)
    expected = [discriminator.model(**pairs(rows[k]["question"], text, return_tensors="pt"))
                .logits[0, 0] for k, text in zip((0, 0, 1), texts)]
    torch.testing.assert_close(scores, torch.stack(expected), rtol=0, atol=1e-4)
    assert scores.requires_grad


def test_seqkd_is_the_mean_cross_entropy(gad, monkeypatch):
    """Of the teacher's tokens, the end token included, over each text and then over texts."""
    run, rows, _, _ = small_game(gad, monkeypatch, SEQKD_BATCH=3)
    model = small_model()
    found = []

    def record(run, name, meter):
        found.append([p.grad.clone() for p in model.parameters()])

    monkeypatch.setattr(gad, "optimiser_step", record)
    monkeypatch.setattr(gad, "next_questions", lambda run, count: rows)
    run.policy = model
    run.trained["policy"] = (model, gad.new_optimizer(model, 1.0))
    meter = gad.Meter()
    gad.seqkd_step(run, meter)
    metrics = meter.means()
    losses = []
    for row in rows:
        ids = torch.tensor([row["prompt_ids"] + row["teacher_ids"]])
        logits = model(input_ids=ids).logits[0, len(row["prompt_ids"]) - 1:-1]
        losses.append(F.cross_entropy(logits.float(), torch.tensor(row["teacher_ids"])))
    loss = torch.stack(losses).mean()
    assert metrics["seqkd_loss"] == metrics["loss"] == pytest.approx(loss.item(), rel=1e-4)
    for ours, theirs in zip(found[0], torch.autograd.grad(loss, list(model.parameters()))):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_the_game_teaches_what_seqkd_left(tmp_path):
    """With the constants as shipped, but fewer steps of each stage. The bars stand between what the
    game reaches and 0, which a D that sees nothing adds: see the README for full runs."""
    train(tmp_path / "run", "PROFILE=embedded", "DEVICE=cpu", "CRITIC_WARMUP=25", "MAX_STEPS=47",
          "EVAL_EVERY=0", "SHOW_SAMPLES=1", "REWARD_WEIGHTS={'verifier': 1.0}")
    table = pd.read_csv(tmp_path / "run" / "metrics.csv").set_index("step")
    start, seqkd, end = (table.loc[step, "eval/accuracy"] for step in (0, 15, 47))
    game = table[table.stage == 3]
    assert seqkd - start > 0.2, f"SeqKD: {start:.3f} -> {seqkd:.3f}"
    assert end - seqkd >= 0.05, f"the game: {seqkd:.3f} -> {end:.3f}"
    assert table.loc[47, "eval/accuracy_greedy"] >= 0.88
    assert table.d_acc[31:40].mean() >= 0.6 and game.d_rank.mean() >= 0.6
    assert game.score_gap.max() < 3


def test_docstring_examples():
    gad = import_file(GAD, "gad_under_test")
    result = doctest.testmod(gad)
    assert result.failed == 0
    examples = {test.name.split(".")[-1] for test in doctest.DocTestFinder().find(gad)
                if test.examples}
    assert {"discriminator_loss", "compute_advantages", "policy_loss", "token_weights"} <= examples


# ============================ Known bugs, which these tests must catch ===========================

MUTATIONS = {  # name: (text, what takes its place, test, its parameters)
    "the discriminator's players are swapped": (
        "discriminator_loss(theirs - ours)", "discriminator_loss(ours - theirs)",
        test_discriminator_step_is_that_of_the_equation, {"micro_batch": 64}),
    "equal texts are pairs": (
        "pairs = answered & ~matches", "pairs = answered & (matches | ~matches)",
        test_discriminator_step_is_that_of_the_equation, {"micro_batch": 64}),
    "a mean for each micro-batch": (
        "((loss * pairs[some]).sum() / (count or 1.0))", "(loss * pairs[some]).mean()",
        test_discriminator_step_is_that_of_the_equation, {"micro_batch": 4}),
    "gradients are summed over the pairs": (
        "((loss * pairs[some]).sum() / (count or 1.0))", "(loss * pairs[some]).sum()",
        test_discriminator_step_is_that_of_the_equation, {"micro_batch": 64}),
    "a teacher's text stands against another question": (
        "torch.cat([ours.unflatten(0, (-1, group)), theirs[:, None]], 1)",
        "torch.cat([ours.unflatten(0, (-1, group)), theirs.roll(1, 0)[:, None]], 1)",
        test_both_players_are_groups_of_one_more, {"longer": "teacher"}),
    "scores come in the order of the lengths": (
        "student[some] = discriminator_loss(theirs - ours), ours.detach()",
        "student[by_length.argsort()[some]] = discriminator_loss(theirs - ours), ours.detach()",
        test_discriminator_step_is_that_of_the_equation, {"micro_batch": 1}),
    "ties are lost": (
        '"d_acc": (gap.sign() + 1) / 2', '"d_acc": gap > 0',
        test_at_first_all_are_equal_and_ties_count_half, {}),
    "the states before the tokens are read": (
        "readings = at_tokens(longer, self.head(states)[:, 0])[:, 1:]",
        "readings = at_tokens(longer, self.head(states)[:, 0])[:, :-1]",
        test_scores_are_those_of_plain_forward_passes, {"where": "mean"}),
    "the last token is not read": (
        '"completion_mask": F.pad(batch.completion_mask, (1, 0), value=1.0)})',
        '"completion_mask": F.pad(batch.completion_mask, (0, 1))})',
        test_the_last_token_counts, {}),
    "padding is averaged": (
        "(readings * batch.completion_mask).sum(1) / lengths", "readings.mean(1)",
        test_scores_are_those_of_plain_forward_passes, {"where": "mean"}),
    "the last column is taken for the last token": (
        "readings.gather(1, lengths[:, None].long() - 1)[:, 0]", "readings[:, -1]",
        test_scores_are_those_of_plain_forward_passes, {"where": "last"}),
    "equal scores are divided by noise": (
        "advantages.masked_fill(without_spread(groups), 0.0).flatten()", "advantages.flatten()",
        test_equal_scores_get_advantages_of_exactly_zero, {"by_std": True}),
    "the rank is that of the wrong answers": (
        "mixed = right[:, :, None] > right[:, None, :]",
        "mixed = right[:, :, None] < right[:, None, :]", test_signal_by_hand, {}),
    "the teacher's end token is missing": (
        '"teacher_ids": [*(i if has else []), tokenizer.eos_token_id]', '"teacher_ids": [*i]',
        test_teachers_texts_become_tokens, {}),
    "the discriminator is frozen in the warm-up": (
        "stage_of(run.step) < 3 or DISCRIMINATOR_EVERY", "DISCRIMINATOR_EVERY",
        test_when_the_discriminator_is_frozen, {"step": 8, "every": 0, "frozen": False}),
    "the warm-up is a step short": (
        "(step > SEQKD_STEPS + CRITIC_WARMUP)", "(step >= SEQKD_STEPS + CRITIC_WARMUP)",
        test_when_the_discriminator_is_frozen, {"step": 10, "every": 3, "frozen": False}),
    "without a pair AdamW's momentum still moves D": (
        "if due and count:", "if due:", test_no_pair_at_all, {}),
    "a frozen discriminator keeps its gradient for the next step": (
        "    optimizer.zero_grad()\n    return student.flatten()", "    return student.flatten()",
        test_when_the_discriminator_is_frozen, {"step": 11, "every": 0, "frozen": True}),
    "no text is a text": (
        "pairs = answered & ~matches", "pairs = ~matches",
        test_a_question_without_a_text_makes_no_pair, {"micro_batch": 64}),
    "SeqKD's loss has the wrong sign": (
        "(-logps * micro.weights).sum().backward()", "(logps * micro.weights).sum().backward()",
        test_seqkd_is_the_mean_cross_entropy, {}),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_caught(name, tmp_path, monkeypatch, capsys):
    """In a copy of the script, in which the text stands exactly once; and it is an assertion of the
    test that fails, not the script that crashes."""
    text, instead, test, parameters = MUTATIONS[name]
    copied = mutated_copy(GAD, text, instead, tmp_path)
    available = {"gad": fresh(copied), "monkeypatch": monkeypatch, "capsys": capsys, **parameters}
    must_fail(test, available)
