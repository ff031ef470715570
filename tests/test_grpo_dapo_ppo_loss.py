"""The mathematics of grpo.py, dapo.py and ppo.py: advantages, losses, weights, dynamic sampling,
the critic, and how each `train` puts them together.

Each is compared with numbers worked out by hand, with a slow loop written from the paper's
equations, and, where TRL computes the same, with TRL's own loss. What the scripts share with
gspo.py is tested there. At the end: known bugs, put in one at a time, that these tests must catch.
"""

import copy
import doctest
import json
import math
import os
import subprocess
import sys
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, fresh, must_fail, mutated_copy
from test_gspo_loss import answers, slow_advantages, small_batch, small_model
from transformers import AutoModelForCausalLM

SCRIPTS = {name: ROOT / "RL_HAND" / name / f"{name}.py" for name in ("grpo", "dapo", "ppo")}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ============================================= Loss =============================================

AGGREGATIONS = [("grpo", "seq-mean-token-mean"), ("grpo", "token-mean"), ("grpo", "dr-grpo"),
                ("dapo", "token-mean"), ("ppo", "token-mean")]


def aggregating(name, aggregation):
    """A fresh script that takes this mean; MAX_NEW_TOKENS is longer than any answer here."""
    module = fresh(name)
    module.MAX_NEW_TOKENS = 11
    if name == "grpo":
        module.AGGREGATION = aggregation
    return module


def slow_weights(aggregation, lengths, longest):
    """The weight of every token of each answer."""
    weights = {"seq-mean-token-mean": lambda n: 1 / n / len(lengths),
               "token-mean": lambda n: 1 / sum(lengths),
               "dr-grpo": lambda n: 1 / (longest * len(lengths))}
    return [weights[aggregation](n) for n in lengths]


def slow_loss(new, old, advantages, lengths, weights, low, high):
    """The clipped objective with the sign of a loss and its gradient by the log-probs, float by
    float: r is differentiated to r, and a cut term to 0."""
    total, gradient, new = 0.0, np.zeros(tuple(new.shape)), new.detach()
    for i, length in enumerate(lengths):
        for t in range(length):
            r = math.exp(float(new[i, t]) - float(old[i, t]))
            a = float(advantages[i, t])
            total -= weights[i] * min(r * a, min(max(r, 1 - low), 1 + high) * a)
            cut = r > 1 + high if a > 0 else r < 1 - low
            gradient[i, t] = 0.0 if cut else -weights[i] * r * a
    return total, gradient


def loss_of(module, new, old, advantages, mask):
    """The scalar that `train` makes of policy_loss's token losses."""
    return (module.policy_loss(new, old, advantages, mask)[0] * module.token_weights(mask)).sum()


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("clip", [(0.2, 0.28), (0.35, 0.1), 0.2])
@pytest.mark.parametrize("name, aggregation", AGGREGATIONS)
def test_loss_and_gradient_are_those_of_the_paper(name, aggregation, clip, per_token):
    """GRPO Eq. 3, DAPO Eq. 8, PPO Eq. 7. The padding is full of garbage, which must not matter."""
    module = aggregating(name, aggregation)
    module.CLIP_RANGE = clip
    new, old, advantages, mask, lengths = answers(0.3, per_token)
    loss = loss_of(module, new, old, advantages, mask)
    gradient, = torch.autograd.grad(loss, new)
    low, high = clip if isinstance(clip, tuple) else (clip, clip)
    expected, slope = slow_loss(new, old, advantages, lengths,
                                slow_weights(aggregation, lengths, 11), low, high)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(gradient.numpy(), slope, rtol=1e-9, atol=1e-15)
    assert 0 < np.count_nonzero(slope) < mask.sum()  # some tokens are cut and some are not


def test_each_token_is_cut_by_itself_and_only_on_the_harmful_side():
    """One good and one bad answer with the ratios 0.5, 0.75, 1.25, 1.5 in each, in the range
    (0.2, 0.28): of the good one 1.5 is cut, of the bad one 0.5 and 0.75. 1.25 never is: the high
    side is cut later than the low one."""
    ratios = torch.tensor([[0.5, 0.75, 1.25, 1.5]] * 2, dtype=torch.float64)
    advantages = torch.tensor([[2.0], [-2.0]], dtype=torch.float64).expand(2, 4)
    values = [[-1.0, -1.5, -2.5, -2.56], [1.6, 1.6, 2.5, 3.0]]
    slopes = [[-1.0, -1.5, -2.5, 0.0], [0.0, 0.0, 2.5, 3.0]]
    for name in SCRIPTS:
        module = fresh(name)
        module.CLIP_RANGE = (0.2, 0.28)
        old = torch.full_like(ratios, -1.0)
        new = (old + ratios.log()).requires_grad_()
        loss, statistics = module.policy_loss(new, old, advantages, torch.ones_like(old))
        gradient, = torch.autograd.grad(loss.sum(), new)
        np.testing.assert_allclose(loss.detach().numpy(), values, rtol=1e-12)
        np.testing.assert_allclose(gradient.numpy(), slopes, rtol=1e-12)
        cut = {side: statistics[f"clip_ratio/{side}_mean"].tolist()
               for side in ("low", "high", "region")}
        assert cut == {"low": [[0, 0, 0, 0], [1, 1, 0, 0]], "high": [[0, 0, 0, 1], [0, 0, 0, 0]],
                       "region": [[0, 0, 0, 1], [1, 1, 0, 0]]}
        np.testing.assert_allclose(statistics["ratio/mean"].numpy(), ratios.numpy(), rtol=1e-12)
        assert not any(value.requires_grad for value in statistics.values())


def test_dapo_cuts_the_high_side_later_than_the_low_side(dapo):
    """With the constants of the file, DAPO's sec. 4.1: 1.25 is inside, 0.75 and 1.3 are outside;
    for GRPO and PPO 1.25 is outside as well."""
    assert dapo.CLIP_RANGE == (0.2, 0.28)
    old = torch.full((1, 3), -1.0, dtype=torch.float64)
    new = old + torch.tensor([[1.25, 1.3, 0.75]], dtype=torch.float64).log()
    advantages, ones = torch.tensor([[1.0, 1.0, -1.0]], dtype=torch.float64), torch.ones_like(old)
    loss = dapo.policy_loss(new, old, advantages, ones)[0]
    assert loss[0].tolist() == pytest.approx([-1.25, -1.28, 0.8], rel=1e-12)
    for name in ("grpo", "ppo"):
        module = fresh(name)
        assert module.CLIP_RANGE == 0.2
        loss = module.policy_loss(new, old, advantages, ones)[0]
        assert loss[0].tolist() == pytest.approx([-1.2, -1.2, 0.8], rel=1e-12)


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("shift", [1e4, -1e4])
@pytest.mark.parametrize("advantage", [0.0, 1.0, -1.0])
def test_huge_log_ratios(name, shift, advantage):
    """exp(1e4) is infinite, and inf x 0 not a number: loss and gradient stay finite, and the next
    token of the same answer is as it would be."""
    module = fresh(name)
    module.CLIP_RANGE = (0.1, 0.2)
    old = torch.full((1, 2), -1.0)
    new = torch.tensor([[-1.0 + shift, -0.99]], requires_grad=True)
    ones = torch.ones(1, 2)
    loss, statistics = module.policy_loss(new, old, advantage * ones, ones)
    gradient, = torch.autograd.grad(loss.sum(), new)
    assert loss.isfinite().all() and gradient.isfinite().all()
    assert all(value.isfinite().all() for value in statistics.values())
    expected = {(1e4, 1.0): -1.2, (-1e4, 1.0): 0.0, (-1e4, -1.0): 0.9, (1e4, 0.0): 0.0,
                (-1e4, 0.0): 0.0}
    if (shift, advantage) in expected:
        assert loss[0, 0].item() == pytest.approx(expected[shift, advantage], rel=1e-6)
        assert gradient[0, 0].item() == 0.0
    else:  # a bad token that became far too likely is not cut, only kept finite
        assert loss[0, 0] > 1e3
    assert loss[0, 1].item() == pytest.approx(-advantage * math.exp(0.01), rel=1e-6, abs=0)


@pytest.mark.parametrize("name, aggregation", AGGREGATIONS)
def test_empty_and_one_token_answers(name, aggregation):
    """A row without any token adds nothing, and no NaN; one token has the plain ratio."""
    module = aggregating(name, aggregation)
    module.CLIP_RANGE = 0.5
    mask = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    old = torch.tensor([[-1.0, -1.0], [-2.0, -7.0], [-1.0, -3.0]], dtype=torch.float64)
    change = torch.tensor([[5.0, 5.0], [0.2, 5.0], [0.1, 0.3]], dtype=torch.float64)
    new = (old + change).requires_grad_()
    advantages = torch.tensor([[1.0], [2.0], [-1.0]], dtype=torch.float64).expand(3, 2)
    loss = loss_of(module, new, old, advantages, mask)
    gradient, = torch.autograd.grad(loss, new)
    one, two = {"seq-mean-token-mean": (1 / 3, 1 / 6), "token-mean": (1 / 3, 1 / 3),
                "dr-grpo": (1 / 33, 1 / 33)}[aggregation]
    a, b, c = (math.exp(x) for x in (0.2, 0.1, 0.3))
    assert loss.item() == pytest.approx(-2 * a * one + (b + c) * two, rel=1e-12)
    expected = [0, 0, -2 * a * one, 0, b * two, c * two]
    assert gradient.flatten().tolist() == pytest.approx(expected, rel=1e-12, abs=0)
    nothing = torch.zeros(2, 2, dtype=torch.float64)
    assert torch.equal(module.token_weights(nothing), nothing)


def test_weights_by_hand(grpo):
    """Answers of 4, 1 and 2 tokens. Weights of the two means sum to 1; those of Dr. GRPO to the
    share of the tokens that were used, and a token weighs the same in every answer and batch."""
    mask = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    grpo.MAX_NEW_TOKENS = 8
    expected = {"seq-mean-token-mean": [[1 / 12] * 4, [1 / 3, 0, 0, 0], [1 / 6, 1 / 6, 0, 0]],
                "token-mean": [[1 / 7] * 4, [1 / 7, 0, 0, 0], [1 / 7, 1 / 7, 0, 0]],
                "dr-grpo": [[1 / 24] * 4, [1 / 24, 0, 0, 0], [1 / 24, 1 / 24, 0, 0]]}
    for grpo.AGGREGATION, weights in expected.items():
        found = grpo.token_weights(mask)
        np.testing.assert_allclose(found.numpy(), weights, rtol=1e-6)
        total = 7 / 24 if grpo.AGGREGATION == "dr-grpo" else 1.0
        assert found.sum().item() == pytest.approx(total, rel=1e-6)
    wider = torch.nn.functional.pad(mask, (0, 3))  # the same answers beside a longer one's padding
    for grpo.AGGREGATION in expected:
        found = grpo.token_weights(wider)
        torch.testing.assert_close(found[:, :4], grpo.token_weights(mask))
        assert not found[:, 4:].any()


def test_dapo_and_ppo_take_one_mean_over_all_tokens(dapo, ppo):
    """One count for the minibatch: every token weighs 1 / 7, long answer or short."""
    mask = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    for module in (dapo, ppo):
        np.testing.assert_allclose(module.token_weights(mask).numpy(), (mask / 7).numpy(),
                                   rtol=1e-6)


# ======================================= The same by TRL ========================================


def trl_loss(kind, new, old, advantages, mask, clip, longest):
    """The loss of GRPOTrainer, and what it logs, with its forward pass replaced by numbers."""
    trainer_class = pytest.importorskip("trl").GRPOTrainer
    low, high = clip if isinstance(clip, tuple) else (clip, clip)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **b: (new, torch.zeros_like(new), None),
        importance_sampling_level="token", loss_type=kind, epsilon_low=low, epsilon_high=high,
        beta=0.0, max_completion_length=longest, current_gradient_accumulation_steps=1,
        args=SimpleNamespace(delta=None, steps_per_generation=1), aux_loss_enabled=False,
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False,
        _entropy_bonus_enabled=False, model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x,
                                    reduce=lambda x, reduction: x),
        _metrics={"train": defaultdict(list)})
    ids, prompt = torch.zeros(mask.shape).long(), torch.ones(len(mask), 1).long()
    loss = trainer_class._compute_loss(trainer, None, {
        "prompt_ids": prompt, "prompt_mask": prompt, "completion_ids": ids,
        "completion_mask": mask, "advantages": advantages, "old_per_token_logps": old,
        "num_items_in_batch": mask.sum()})
    return loss, {name: values[0] for name, values in trainer._metrics["train"].items()}


@pytest.mark.parametrize("name, aggregation, kind", [
    ("grpo", "seq-mean-token-mean", "grpo"), ("grpo", "token-mean", "bnpo"),
    ("grpo", "dr-grpo", "dr_grpo"), ("dapo", "token-mean", "dapo"), ("dapo", "token-mean", "bnpo"),
    ("ppo", "token-mean", "bnpo")])
def test_loss_and_gradient_are_those_of_trl(name, aggregation, kind):
    """With the shipped clip ranges. TRL's "dapo" divides by the tokens of the whole rollout, which
    is here the minibatch, as in its "bnpo"."""
    module = aggregating(name, aggregation)
    new, old, advantages, mask, _ = answers(0.3, per_token=name == "ppo")
    of_answers = advantages if name == "ppo" else advantages[:, 0]
    theirs, logged = trl_loss(kind, new, old, of_answers, mask, module.CLIP_RANGE, 11)
    ours = loss_of(module, new, old, advantages, mask)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12) and abs(ours.item()) > 1e-3
    found, = torch.autograd.grad(ours, new)
    expected, = torch.autograd.grad(theirs, new)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
    assert expected.norm() > 1e-3
    statistics = module.policy_loss(new, old, advantages, mask)[1]
    for side in ("low", "high", "region"):
        cut = statistics[f"clip_ratio/{side}_mean"]
        share = (cut * mask).sum().item() / mask.sum().item()
        assert share == pytest.approx(logged[f"clip_ratio/{side}_mean"]) and share > 0


def test_overlong_penalty_is_that_of_trl(dapo):
    """Every length from 0 to the limit, and several caches."""
    rewards = pytest.importorskip("trl.rewards")
    dapo.MAX_NEW_TOKENS = 20
    lengths = list(range(21))
    for dapo.OVERLONG_CACHE in (1, 3, 8, 20):
        theirs = rewards.get_soft_overlong_punishment(20, dapo.OVERLONG_CACHE)
        expected = theirs(completion_ids=[[1] * n for n in lengths])
        found = -dapo.overlong_penalty(torch.tensor(lengths, dtype=torch.float64))
        assert found.tolist() == pytest.approx(expected, abs=1e-12)
        assert min(expected) == -1.0 and max(expected) == 0.0


# ========================================== Advantages ==========================================


@pytest.mark.parametrize("name", ["grpo", "dapo"])
def test_advantages_are_the_papers_z_scores(name):
    """With the constants of the file: (R - mean) / (std + 1e-6) of the group, the std by n - 1."""
    module = fresh(name)
    assert (module.ADVANTAGE_TYPE, module.STD_CORRECTION) == ("normalized", 1)
    module.GROUP_SIZE = 4
    rewards = torch.randn(12, generator=generator(1), dtype=torch.float64)
    rewards[:4] += 5.0  # groups of different means and spread
    rewards[8:] *= 3.0
    found = module.compute_advantages(rewards)
    expected = slow_advantages(rewards, 4, "normalized", 1, module.ADVANTAGE_EPSILON)[:, 0]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10)
    np.testing.assert_allclose(found.reshape(3, 4).std(1).numpy(), [1.0] * 3, rtol=1e-4)
    module.ADVANTAGE_TYPE = "relative"  # Dr. GRPO's: without the std
    relative = module.compute_advantages(rewards)
    expected = slow_advantages(rewards, 4, "relative", 1, 0)[:, 0]
    np.testing.assert_allclose(relative.numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("name", ["grpo", "dapo"])
def test_equal_scores_get_advantages_of_exactly_zero(name):
    """Also where the mean of equal float32 scores is not their value: the shipped epsilon alone
    would leave as much as rounding is large, and a smaller one everything."""
    module = fresh(name)
    rounded = 0
    for module.ADVANTAGE_EPSILON in (1e-6, 1e-12, 0.0):
        for module.GROUP_SIZE in (2, 3, 5, 6, 7, 8):
            for score in (0.0, 0.1, 1 / 3, 0.7, -0.3, 1.1, 9999.9):
                rewards = score * torch.ones(2 * module.GROUP_SIZE)
                rounded += bool((rewards[:module.GROUP_SIZE].mean() != rewards[0]).any())
                assert torch.equal(module.compute_advantages(rewards), torch.zeros_like(rewards))
    assert rounded > 5  # the trap is in the data


# ================================= How `train` puts them together ================================

SCORES = [0.9, 0.1, 0.2, 1.3, 0.3, 1.1]  # of six answers in three groups of two
RIGHT = [1.0, 0.0, 0.0, 1.0, 0.0, 1.0]  # every group has one right answer
LENGTHS = [5, 1, 3, 2, 4, 5]  # as small_batch makes them
ENDED = [False, True, True, True, True, False]


def vector(gradients):
    """Gradients as one vector."""
    return torch.cat([g.flatten() for g in gradients])


def train(module, patch, micro=6, minibatch=6, noise=0.4, steps=1, really=False, **constants):
    """`train` on the same small rollout each step, made by a random model of 23 tokens.

    The sampling policy's log-probs are the policy's plus noise. Unless `really`, no weight moves:
    the gradients of each optimiser step are kept instead. Returns what went in and came out.
    """
    name = module.__name__.split("_")[0]
    constants = {"DTYPE": "float32", "DEVICE": "cpu", "GROUP_SIZE": 2, "BATCH_SIZE": 3,
                 "MAX_NEW_TOKENS": 5, "MICRO_BATCH": micro, "MINIBATCH": minibatch} | (
        {"ENTROPY_COEF": 0.07, f"{name.upper()}_EPOCHS": 1} if name != "reinforce" else {}) | (
        {"KL_COEF": 0.3} if name == "grpo" else {}) | constants
    for constant, value in constants.items():
        assert constant in module.DEFAULTS, constant
        setattr(module, constant, value)
    policy, reference = small_model(seed=0), small_model(seed=1)
    trained = {"policy": (policy, module.new_optimizer(policy, 0.02))}
    if name == "ppo":
        critic = random_critic(module)
        trained["critic"] = (critic, module.new_optimizer(critic, 0.02))
    _, batch = small_batch(module)
    assert batch.completion_mask.sum(1).tolist() == LENGTHS
    with torch.no_grad():
        logps = module.score_tokens(policy, batch)[0]
        batch.ref_logps = module.score_tokens(reference, batch)[0]
    away = noise * torch.randn(6, 5, generator=generator(4))
    batch.sampled_logps = (logps + away) * batch.completion_mask
    batch.ended = torch.tensor(ENDED)
    state = SimpleNamespace(batch=batch, policy=policy, trained=trained, steps=[], metrics=[],
                            weights=[])
    step_for_real = module.optimiser_step

    def optimiser_step(run, which, meter):
        found = [p.grad.clone() for p in run.trained[which][0].parameters() if p.grad is not None]
        state.steps.append(SimpleNamespace(which=which, gradient=vector(found)))
        if really:
            return step_for_real(run, which, meter)
        meter.add({"grad_norm": 1.0})
        return run.trained[which][0].zero_grad()

    def finish_step(run, metrics):
        state.metrics.append(metrics)
        state.weights.append({which: copy.deepcopy(one.state_dict())
                              for which, (one, _) in run.trained.items()})

    patch.setattr(module, "next_questions", lambda run, count: [None] * count)
    patch.setattr(module, "sample_groups", lambda *arguments: module.Batch(
        **{key: value.clone() for key, value in vars(batch).items() if key != "ref_logps"}))
    patch.setattr(module, "score_completions", lambda *arguments: (
        torch.tensor(SCORES), {"verifier": torch.tensor(RIGHT), "model": torch.tensor(SCORES)}))
    patch.setattr(module, "optimiser_step", optimiser_step)
    patch.setattr(module, "finish_step", finish_step)
    state.run = SimpleNamespace(
        step=0, total_steps=steps, policy=policy, reference=reference, trained=trained,
        tokenizer=None, state={"kl_coef": 0.3}, num_tokens=0, folder="runs/none")
    module.train(state.run)
    assert state.run.step == steps and state.run.num_tokens == sum(LENGTHS) * steps
    return state


def slow_policy_loss(module, state, advantages, weights, kl_coef):
    """Sum over the tokens of weight x (clipped term + kl_coef KL - ENTROPY_COEF H) as a tensor in
    the graph of the policy, token by token. advantages, weights: lists of lists."""
    low, high = module.clip_range()
    batch = state.batch
    logps, entropy = module.score_tokens(state.policy, batch)
    total = 0.0
    for i, length in enumerate(LENGTHS):
        for t in range(length):
            r = torch.exp(logps[i, t] - batch.sampled_logps[i, t])
            a, g = advantages[i][t], batch.ref_logps[i, t] - logps[i, t]
            inside = 1 - low <= r.item() <= 1 + high
            bound = max(min(r.item(), 1 + high), 1 - low)
            term = r * a if inside or r.item() * a < bound * a else torch.tensor(bound * a)
            term = -term + kl_coef * (1 - r * (1 + g)) - module.ENTROPY_COEF * entropy[i, t]
            total = total + weights[i][t] * term
    return total


def assert_same_step(step, expected, model, loss, scale=1e-2):
    """The loss that was measured and the gradient of a recorded optimiser step are those of a
    tensor in the model's graph."""
    assert loss == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
    parameters = list(model.parameters())
    gradient = vector(torch.autograd.grad(expected, parameters))
    assert gradient.norm() > scale
    assert (step.gradient - gradient).norm() < 1e-4 * gradient.norm()


def spread_out(values):
    """A number for each answer as one for each of its tokens."""
    return [[float(value)] * length for value, length in zip(values, LENGTHS)]


@pytest.mark.parametrize("aggregation", ["seq-mean-token-mean", "token-mean", "dr-grpo"])
def test_grpo_minimises_the_stated_loss(grpo, monkeypatch, aggregation):
    """Whatever the size of the micro-batches, loss and gradient are those of the minibatch."""
    grpo.AGGREGATION = aggregation
    for micro in (1, 2, 4, 6):
        state = train(grpo, monkeypatch, micro, MAX_NEW_TOKENS=9)
        advantages = slow_advantages(torch.tensor(SCORES, dtype=torch.float64), 2, "normalized", 1,
                                     1e-6)[:, 0]
        weights = spread_out(slow_weights(aggregation, LENGTHS, 9))
        expected = slow_policy_loss(grpo, state, spread_out(advantages), weights, 0.3)
        (step,), metrics = state.steps, state.metrics[0]
        total = sum(map(sum, weights))  # below 1 for Dr. GRPO; what is measured is a mean
        assert (total < 0.5) == (aggregation == "dr-grpo")
        assert_same_step(step, expected, state.policy, metrics["loss"] * total)
        assert 0 < metrics["clip_ratio/region_mean"] < 1 and metrics["kl_coef"] == 0.3


def test_grpo_without_a_reference(grpo, monkeypatch):
    """KL_COEF=0: nothing asks for a reference, no KL is in the loss, and none is measured."""
    monkeypatch.setattr(grpo, "reference_logps", None)
    state = train(grpo, monkeypatch, 2, KL_COEF=0.0, ADAPTIVE_KL=True)
    advantages = slow_advantages(torch.tensor(SCORES, dtype=torch.float64), 2, "normalized", 1,
                                 1e-6)[:, 0]
    weights = spread_out(slow_weights("seq-mean-token-mean", LENGTHS, 9))
    expected = slow_policy_loss(grpo, state, spread_out(advantages), weights, 0.0)
    assert_same_step(state.steps[0], expected, state.policy, state.metrics[0]["loss"])
    assert not {"kl", "kl_loss"} & state.metrics[0].keys()
    assert state.run.state == {"kl_coef": 0.3}


@pytest.mark.parametrize("adaptive", [False, True])
def test_grpos_kl_coefficient(grpo, monkeypatch, adaptive):
    """It moves only where that is asked for; the KL of this rollout is far above the target."""
    state = train(grpo, monkeypatch, ADAPTIVE_KL=adaptive, TARGET_KL=1e-3, steps=2)
    assert state.metrics[0]["kl"] > 0.01
    assert [metrics["kl_coef"] for metrics in state.metrics] == pytest.approx(
        [0.3, 0.45 if adaptive else 0.3])


@pytest.mark.parametrize("filtering", [False, True])
def test_dapo_minimises_the_stated_loss(dapo, monkeypatch, filtering):
    """The penalty is taken off the rewards before the groups' means; the mean is over all tokens of
    the minibatch, however it is cut; there is no KL. With OVERLONG_FILTERING truncated answers
    count in their group's mean and std, and neither in the loss nor in the count of tokens."""
    for micro in (1, 2, 4, 6):
        state = train(dapo, monkeypatch, micro, OVERLONG_FILTERING=filtering, OVERLONG_CACHE=2,
                      OVERLONG_PENALTY=0.5)
        shaped = [score - 0.5 * max(0, length - 3) / 2 for score, length in zip(SCORES, LENGTHS)]
        advantages = slow_advantages(torch.tensor(shaped, dtype=torch.float64), 2, "normalized", 1,
                                     1e-6)[:, 0]
        counted = [length * (ended or not filtering) for length, ended in zip(LENGTHS, ENDED)]
        weights = [1 / sum(counted) if count else 0.0 for count in counted]
        expected = slow_policy_loss(dapo, state, spread_out(advantages), spread_out(weights), 0.0)
        step, = state.steps
        assert_same_step(step, expected, state.policy, state.metrics[0]["loss"])
        assert state.metrics[0]["reward"] == pytest.approx(np.mean(SCORES), rel=1e-6)  # unshaped
        assert state.metrics[0]["accuracy"] == 0.5
        assert "kl" not in state.metrics[0]


def test_dapo_with_nothing_but_truncated_answers(dapo, monkeypatch):
    """Filtered away, all of them: the gradient is 0, without a NaN. There is no loss to measure."""
    monkeypatch.setattr(f"{__name__}.ENDED", [False] * 6)
    state = train(dapo, monkeypatch, 4, OVERLONG_FILTERING=True)
    step, = state.steps
    assert math.isnan(state.metrics[0]["loss"]) and state.metrics[0]["entropy"] > 0
    assert torch.equal(step.gradient, torch.zeros_like(step.gradient)) and len(step.gradient) > 100
    assert state.metrics[0]["completions/clipped_ratio"] == 1.0


def test_the_reward_that_dapo_logs(dapo, monkeypatch):
    """Two groups of three have spread and are trained on; accuracy and reward are of all three."""
    monkeypatch.setattr(f"{__name__}.RIGHT", [1.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    state = train(dapo, monkeypatch, MAX_SAMPLING_ROUNDS=1, OVERLONG_PENALTY=0.0)
    metrics, step = state.metrics[0], state.steps[0]
    assert metrics["accuracy"] == pytest.approx(2 / 6) and metrics["rewards/verifier"] == 0.5
    assert metrics["reward"] == pytest.approx(np.mean(SCORES))
    assert metrics["rewards/model"] == pytest.approx(np.mean(SCORES[:2] + SCORES[4:]))
    assert metrics["dynamic/groups"] == 2 and metrics["dynamic/rounds"] == 1
    assert metrics["completions/mean_length"] == np.mean(LENGTHS[:2] + LENGTHS[4:])
    advantages = slow_advantages(torch.tensor(SCORES), 2, "normalized", 1, 1e-6)[:, 0]
    weights = spread_out([1 / 15, 1 / 15, 0, 0, 1 / 15, 1 / 15])
    expected = slow_policy_loss(dapo, state, spread_out(advantages), weights, 0.0)
    assert_same_step(step, expected, state.policy, metrics["loss"])


def slow_gae(rewards, values, gamma, lam):
    """Eq. 11 and 12 for one answer: lists of floats, and nothing after their ends."""
    deltas = [reward + gamma * following - value for reward, value, following in
              zip(rewards, values, [*values[1:], 0.0])]
    return [sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[t:]))
            for t in range(len(deltas))]


@pytest.mark.parametrize("whitened", [True, False])
def test_ppo_minimises_the_stated_losses(ppo, monkeypatch, whitened):
    """Rewards, GAE, returns, whitening and both losses, token by token from the equations; the
    returns are those of the advantages before whitening; the metrics of the critic."""
    for micro in (1, 2, 4, 6):
        state = train(ppo, monkeypatch, micro, GAMMA=0.9, GAE_LAMBDA=0.7, KL_COEF=0.3,
                      NO_END_PENALTY=0.5, WHITEN_ADVANTAGES=whitened)
        batch, critic = state.batch, state.trained["critic"][0]
        values = critic(batch)
        advantages, returns, gaps = [], [], []
        for i, length in enumerate(LENGTHS):
            gap = (batch.sampled_logps - batch.ref_logps)[i, :length].tolist()
            rewards = [-0.3 * x for x in gap]
            rewards[-1] += SCORES[i] - 0.5 * (not ENDED[i])
            old = values[i, :length].tolist()
            advantages.append(slow_gae(rewards, old, 0.9, 0.7))
            returns.append([a + v for a, v in zip(advantages[-1], old)])
            gaps += gap
        if whitened:
            flat = np.concatenate(advantages)
            advantages = [[(a - flat.mean()) / flat.std() for a in row] for row in advantages]
        weights = spread_out([1 / sum(LENGTHS)] * 6)
        expected = slow_policy_loss(ppo, state, advantages, weights, 0.0)
        of_critic = sum(weights[i][t] * 0.5 * (values[i, t] - returns[i][t]) ** 2
                        for i, length in enumerate(LENGTHS) for t in range(length))
        assert [step.which for step in state.steps] == ["policy", "critic"]
        metrics, flat = state.metrics[0], np.concatenate(returns)
        assert_same_step(state.steps[0], expected, state.policy, metrics["loss"])
        assert_same_step(state.steps[1], of_critic, critic, metrics["value_loss"])
        old = np.concatenate([values[i, :n].tolist() for i, n in enumerate(LENGTHS)])
        explained = 1 - np.var(flat - old) / np.var(flat)
        assert metrics["explained_variance"] == pytest.approx(explained, rel=1e-3)
        assert metrics["critic_grad_norm"] == 1.0 and "time/update" in metrics
        assert metrics["value_mean"] == pytest.approx(old.mean(), rel=1e-4)
        assert metrics["return_mean"] == pytest.approx(flat.mean(), rel=1e-4)
        assert metrics["kl"] == pytest.approx(np.mean(gaps), rel=1e-4) and abs(metrics["kl"]) > 0.1
        assert metrics["reward"] == pytest.approx(np.mean(SCORES), rel=1e-6)


# ==================================== DAPO: dynamic sampling ====================================


def left_padded(prompts):
    """Lists of ids as (ids, mask), each ending in the last column."""
    width = max(map(len, prompts))
    return (torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts]),
            torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]))


def sampling(dapo, patch, right, scores=None, lengths=None):
    """Replace questions, sampling and scoring by tables. `right`: for question 0, 1, ... the
    verifier's scores of its answers; `scores`: the rewards, the same unless given; `lengths`: of
    its answers. A question's prompt and its answers' tokens say which question it is. Returns
    the `run`, and what was asked and sampled."""
    log = SimpleNamespace(asked=[], batches=[])
    run = SimpleNamespace(questions=0, num_tokens=0, policy=None, tokenizer=None)
    scores = scores or right
    dapo.DEVICE = "cpu"

    def next_questions(run, count):
        rows = [{"question": f"q{n}", "n": n} for n in range(run.questions, run.questions + count)]
        run.questions += count
        log.asked.append([row["n"] for row in rows])
        return rows[dapo.rank::dapo.processes]

    def sample_groups(policy, tokenizer, rows, group):
        index = torch.arange(len(rows)).repeat_interleave(group)
        ids, real = left_padded([[1000 + row["n"]] * (1 + row["n"] % 3) for row in rows])
        sizes = [lengths[row["n"]][k] if lengths else 1 + (row["n"] + k) % 4
                 for row in rows for k in range(group)]
        mask = torch.tensor([[float(t < n) for t in range(max(sizes))] for n in sizes])
        names = torch.tensor([10 * row["n"] + k for row in rows for k in range(group)])
        batch = dapo.Batch(prompt_index=index, prompt_ids=ids[index], prompt_mask=real[index],
                           completion_ids=names[:, None] * mask.long(), completion_mask=mask,
                           sampled_logps=-(names[:, None] + 1) * mask, ended=names % 2 == 0)
        log.batches.append(copy.deepcopy(batch))
        return batch

    def score_completions(run, rows, batch):
        flat = torch.tensor([float(score) for row in rows for score in scores[row["n"]]])
        accuracy = torch.tensor([float(s) for row in rows for s in right[row["n"]]])
        return flat, {"verifier": accuracy, "model": flat / 10}

    for function in (next_questions, sample_groups, score_completions):
        patch.setattr(dapo, function.__name__, function)
    return run, log


FLAT, WRONG = [1.0] * 4, [0.0] * 4
ROUNDS = [FLAT, [1.0, 0, 0, 0], WRONG, [1.0, 1, 0, 1], WRONG, [0, 0, 0, 1.0], [1.0, 0, 0, 0]]


def sampled(dapo, run):
    """sample_dynamically's results, with some names; `kept`: the questions that are trained on."""
    found = SimpleNamespace(**dict(zip(("rows", "batch", "rewards", "parts", "metrics"),
                                       dapo.sample_dynamically(run, dapo.Meter()))))
    found.kept = [found.rows[i]["n"] for i in found.batch.prompt_index[::dapo.GROUP_SIZE].tolist()]
    return found


def test_groups_without_spread_are_replaced(dapo, monkeypatch):
    """Three groups wanted. Of questions 0, 1, 2 only 1 has spread, of 3 and 4 only 3, then 5 has:
    each round asks for what is missing, no more, and nothing that has spread is thrown away."""
    dapo.BATCH_SIZE, dapo.GROUP_SIZE, dapo.OVERLONG_CACHE = 3, 4, 0
    run, log = sampling(dapo, monkeypatch, ROUNDS)
    found = sampled(dapo, run)
    assert log.asked == [[0, 1, 2], [3, 4], [5]] and run.questions == 6
    assert found.kept == [1, 3, 5]
    expected = [*ROUNDS[1], *ROUNDS[3], *ROUNDS[5]]
    assert found.rewards.tolist() == found.parts["verifier"].tolist() == expected
    assert found.parts.keys() == {"verifier", "model"}
    assert found.parts["model"].tolist() == pytest.approx([x / 10 for x in expected])
    assert found.batch.completion_ids[:, 0].tolist() == [10, 11, 12, 13, 30, 31, 32, 33,
                                                         50, 51, 52, 53]
    groups = found.batch.prompt_index.reshape(3, 4)
    assert (groups == groups[:, :1]).all()
    prompts = [ids[mask.bool()].tolist() for ids, mask in
               zip(found.batch.prompt_ids[::4], found.batch.prompt_mask[::4])]
    assert prompts == [[1001] * 2, [1003], [1005] * 3]
    everything = sum(ROUNDS[:6], [])
    tokens = sum(int(batch.completion_mask.sum()) for batch in log.batches)
    kept = int(found.batch.completion_mask.sum())
    assert run.num_tokens == tokens - kept > 0 < kept  # measure_rollout adds what is kept
    assert found.metrics == {"dynamic/rounds": 3, "dynamic/questions": 6, "dynamic/groups": 3,
                             "dynamic/dropped_ratio": 0.5,
                             "reward": pytest.approx(np.mean(everything)),
                             "accuracy": pytest.approx(np.mean(everything))}


def test_one_round_is_enough_where_every_group_has_spread(dapo, monkeypatch):
    dapo.BATCH_SIZE, dapo.GROUP_SIZE = 2, 4
    run, log = sampling(dapo, monkeypatch, [[1.0, 0, 0, 0], [0, 1.0, 1, 1], FLAT])
    found = sampled(dapo, run)
    assert log.asked == [[0, 1]]
    assert found.metrics["dynamic/rounds"] == 1 and found.metrics["dynamic/dropped_ratio"] == 0.0


def test_sampling_stops_after_the_stated_rounds(dapo, monkeypatch):
    """Then the step makes do with the groups that it has, none of them without spread."""
    dapo.BATCH_SIZE, dapo.GROUP_SIZE, dapo.MAX_SAMPLING_ROUNDS = 3, 4, 2
    run, log = sampling(dapo, monkeypatch, [FLAT, ROUNDS[1], WRONG, WRONG, FLAT, ROUNDS[1]])
    found = sampled(dapo, run)
    assert log.asked == [[0, 1, 2], [3, 4]]
    assert found.kept == [1]
    assert len(found.batch.ended) == len(found.rewards) == len(found.parts["model"]) == 4
    assert found.batch.prompt_ids.tolist() == [[0, 1001, 1001]] * 4
    assert found.metrics["dynamic/rounds"] == 2 and found.metrics["dynamic/groups"] == 1
    assert found.metrics["dynamic/dropped_ratio"] == pytest.approx(4 / 5)
    assert found.metrics["accuracy"] == pytest.approx((4 + 1 + 4) / 20)


def test_where_no_group_has_spread_the_advantages_are_zero(dapo, monkeypatch):
    """The last round is taken as it is, so that the step has something to measure."""
    dapo.BATCH_SIZE, dapo.GROUP_SIZE, dapo.MAX_SAMPLING_ROUNDS = 2, 4, 3
    run, log = sampling(dapo, monkeypatch, [FLAT, WRONG, FLAT, FLAT, WRONG, FLAT])
    found = sampled(dapo, run)
    assert log.asked == [[0, 1], [2, 3], [4, 5]]
    assert found.kept == [4, 5]
    assert found.rewards.tolist() == [*WRONG, *FLAT]
    advantages = dapo.token_advantages(run, found.rows, found.batch, found.rewards)
    assert advantages.shape == found.batch.completion_mask.shape and not advantages.any()
    assert found.metrics["dynamic/rounds"] == 3 and found.metrics["dynamic/questions"] == 6
    assert found.metrics["accuracy"] == pytest.approx(4 / 6)


def test_without_dynamic_sampling_there_is_one_round(dapo, monkeypatch):
    """And its groups are taken whatever their spread."""
    dapo.BATCH_SIZE, dapo.GROUP_SIZE, dapo.DYNAMIC_SAMPLING = 3, 4, False
    run, log = sampling(dapo, monkeypatch, ROUNDS)
    found = sampled(dapo, run)
    assert log.asked == [[0, 1, 2]]
    assert found.kept == [0, 1, 2]
    assert found.rewards.tolist() == sum(ROUNDS[:3], [])
    assert found.metrics["dynamic/rounds"] == 1 and found.metrics["dynamic/dropped_ratio"] == 0.0


def test_spread_of_the_reward_with_a_threshold(dapo, monkeypatch):
    """A reward model's scores hardly ever tie: the std must exceed the threshold. Answers that are
    all right have spread in the reward, and none in the accuracy."""
    dapo.BATCH_SIZE, dapo.GROUP_SIZE, dapo.OVERLONG_CACHE = 2, 4, 0
    scores = [[0.5, 0.51, 0.52, 0.5], [0.2, 0.8, 0.2, 0.8], [0.1, 0.1, 0.9, 0.5]]
    right = [FLAT, FLAT, [0.0, 0, 1, 0]]
    for of, threshold, kept in (("reward", 0.0, [0, 1]), ("reward", 0.1, [1, 2]),
                                ("reward", 0.36, [2]), ("accuracy", 0.0, [2])):
        dapo.SPREAD_OF, dapo.SPREAD_THRESHOLD = of, threshold
        dapo.MAX_SAMPLING_ROUNDS = 2
        run, _ = sampling(dapo, monkeypatch, [*right, WRONG], [*scores, WRONG])
        assert sampled(dapo, run).kept == kept, (of, threshold)
    dapo.SPREAD_OF, dapo.SPREAD_THRESHOLD = "reward", 0.5  # the std of 1, 0, 0, 0
    run, _ = sampling(dapo, monkeypatch, [ROUNDS[1], [1.0, 1, 0, 0], ROUNDS[1]])
    assert sampled(dapo, run).kept == [1]  # it must be exceeded


def test_scores_equal_up_to_float_noise_have_no_spread(dapo, monkeypatch):
    """0.1 + 0.2 and 0.3: at a threshold of 0 such a group would be kept for its rounding."""
    dapo.BATCH_SIZE, dapo.GROUP_SIZE, dapo.SPREAD_OF, dapo.OVERLONG_CACHE = 1, 4, "reward", 0
    noise = [0.7, float(np.nextafter(np.float32(0.7), np.float32(1))), 0.7, 0.7]
    assert len(set(noise)) == 2
    run, log = sampling(dapo, monkeypatch, [FLAT, ROUNDS[1]], [noise, ROUNDS[1]])
    assert sampled(dapo, run).kept == [1] and log.asked == [[0], [1]]


def test_the_penalty_is_in_the_reward_and_not_in_the_accuracy(dapo, monkeypatch):
    """Right answers of which some are too long: no spread in the accuracy, spread in the shaped
    reward, which is what is trained on; logged is the reward as it was scored."""
    dapo.BATCH_SIZE, dapo.GROUP_SIZE, dapo.MAX_SAMPLING_ROUNDS = 1, 4, 1
    dapo.MAX_NEW_TOKENS, dapo.OVERLONG_CACHE, dapo.OVERLONG_PENALTY = 4, 2, 1.0
    for dapo.SPREAD_OF, kept in (("reward", 0), ("accuracy", 1)):
        dapo.MAX_SAMPLING_ROUNDS = 2
        run, _ = sampling(dapo, monkeypatch, [FLAT, [1.0, 1, 1, 0]], lengths=[[1, 2, 3, 4]] * 2)
        found = sampled(dapo, run)
        assert found.kept == [kept]
        shaped = [1.0, 1.0, 0.5, 0.0] if kept == 0 else [1.0, 1.0, 0.5, -1.0]
        assert found.rewards.tolist() == shaped
        assert found.metrics["reward"] == (1.0 if kept == 0 else pytest.approx(7 / 8))


def two_batches(dapo):
    """A batch with narrow prompts and wide completions, and one the other way round."""
    batches, index = [], torch.tensor([0, 0, 1, 1])
    for seed, sizes, lengths in ((1, [2, 1], [6, 2, 3, 1]), (2, [3, 5], [2, 1, 2, 2])):
        random = generator(seed)
        ids, real = left_padded([torch.randint(3, 30, (n,), generator=random).tolist()
                                 for n in sizes])
        mask = torch.tensor([[float(t < n) for t in range(max(lengths))] for n in lengths])
        batches.append(dapo.Batch(
            prompt_index=index + 2 * (seed - 1), prompt_ids=ids[index], prompt_mask=real[index],
            completion_ids=torch.randint(3, 30, mask.shape, generator=random), completion_mask=mask,
            sampled_logps=-torch.rand(mask.shape, generator=random) * mask,
            ended=torch.tensor([True, False, True, seed == 1]), rewards=torch.rand(4)))
    return batches


def completions_of(batch):
    """Each completion as (prompt, tokens, log-probs, ended), in lists, padding left out."""
    found = []
    for i, p in enumerate(batch.prompt_index.tolist()):
        real = batch.completion_mask[i].bool()
        assert real[:int(real.sum())].all() and batch.prompt_mask[i, -1] == 1
        found.append((p, batch.prompt_ids[i][batch.prompt_mask[i].bool()].tolist(),
                      batch.completion_ids[i][real].tolist(), batch.sampled_logps[i][real].tolist(),
                      bool(batch.ended[i]), float(batch.rewards[i])))
    return found


def test_joined_batches_keep_every_completion(dapo):
    """Its prompt, its tokens, their log-probs and how it ended; padding is masked, on the left of
    prompts and on the right of completions."""
    one, other = two_batches(dapo)
    joined = dapo.join_batches([one, other])
    assert joined.prompt_ids.shape == (8, 5) and joined.completion_ids.shape == (8, 6)
    assert joined.prompt_mask.sum(1).tolist() == [2, 2, 1, 1, 3, 3, 5, 5]
    assert completions_of(joined) == completions_of(one) + completions_of(other)
    assert not joined.sampled_logps[joined.completion_mask == 0].any()
    assert joined.completion_ids.dtype == joined.prompt_ids.dtype == torch.int64
    assert completions_of(dapo.join_batches([one])) == completions_of(one)


def test_a_joined_batch_scores_as_its_parts(dapo):
    """The shipped policy's log-probs and entropies of every token: wider padding is nothing."""
    policy = AutoModelForCausalLM.from_pretrained(ROOT / "data" / "policy", dtype=torch.float32,
                                                  attn_implementation="sdpa").eval()
    dapo.DEVICE, dapo.DTYPE = "cpu", "float32"
    one, other = two_batches(dapo)
    joined = dapo.join_batches([one, other])
    with torch.no_grad():
        whole = dapo.score_tokens(policy, joined)
        parts = [dapo.score_tokens(policy, batch) for batch in (one, other)]
    for values, first, second in zip(whole, *parts):
        torch.testing.assert_close(values[:4], first, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(values[4:, :2], second, rtol=1e-5, atol=1e-5)
        assert values[joined.completion_mask.bool()].abs().max() > 0.1


@pytest.mark.parametrize("limit, cache, penalty, lengths, expected", [
    (100, 20, 1.0, [0, 1, 79, 80, 81, 90, 99, 100], [0, 0, 0, 0, 0.05, 0.5, 0.95, 1.0]),
    (100, 20, 0.5, [80, 90, 100], [0.0, 0.25, 0.5]),
    (100, 1, 1.0, [98, 99, 100], [0.0, 0.0, 1.0]),
    (100, 100, 1.0, [0, 25, 100], [0.0, 0.25, 1.0]),
    (100, 0, 1.0, [0, 99, 100], [0.0, 0.0, 0.0]),
    (100, 20, 0.0, [80, 90, 100], [0.0, 0.0, 0.0])])
def test_overlong_penalty(dapo, limit, cache, penalty, lengths, expected):
    """Eq. 13: 0 up to the limit less the cache, -1 at the limit, a straight line between."""
    dapo.MAX_NEW_TOKENS, dapo.OVERLONG_CACHE, dapo.OVERLONG_PENALTY = limit, cache, penalty
    found = dapo.overlong_penalty(torch.tensor(lengths, dtype=torch.float32))
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_what_the_loss_sees(dapo):
    """With OVERLONG_FILTERING no token of a truncated answer; without, all."""
    one, _ = two_batches(dapo)
    assert one.ended.tolist() == [True, False, True, True]
    assert torch.equal(dapo.loss_mask(one), one.completion_mask)
    dapo.OVERLONG_FILTERING = True
    assert dapo.loss_mask(one).sum(1).tolist() == [6, 0, 3, 1]


# ======================================== PPO: advantages =======================================


def random_answers(dtype=torch.float64):
    """Rewards and values of five answers of 1 to 6 tokens, garbage behind them; mask, lengths.
    The third fills the batch's width, as an answer that was cut off does."""
    lengths = [4, 1, 6, 2, 5]
    mask = torch.tensor([[float(t < n) for t in range(6)] for n in lengths], dtype=dtype)
    rewards, values = (torch.randn(5, 6, generator=generator(seed), dtype=torch.float64).to(dtype)
                       for seed in (1, 2))
    return rewards + 50 * (1 - mask), values - 70 * (1 - mask), mask, lengths


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (0.99, 0.0), (0.5, 1.0),
                                        (0.0, 0.5)])
def test_gae_is_that_of_the_equation(ppo, gamma, lam):
    """The garbage behind the last token has no part in it, neither for an answer that ended nor for
    one that fills the batch: after the last token nothing is foretold."""
    ppo.GAMMA, ppo.GAE_LAMBDA = gamma, lam
    rewards, values, mask, lengths = random_answers()
    found = ppo.compute_advantages(rewards, values, mask)
    for i, length in enumerate(lengths):
        expected = slow_gae(rewards[i, :length].tolist(), values[i, :length].tolist(), gamma, lam)
        assert found[i, :length].tolist() == pytest.approx(expected, rel=1e-12, abs=1e-14)
        assert found[i, length:].tolist() == [0.0] * (6 - length)


def test_gae_by_hand(ppo):
    """Values 0.5, 0.25, rewards 0 and 1, gamma 0.5, lambda 0.5: the deltas are 0.5 x 0.25 - 0.5 =
    -0.375 and 1 - 0.25 = 0.75; the advantages -0.375 + 0.25 x 0.75 = -0.1875 and 0.75."""
    ppo.GAMMA = ppo.GAE_LAMBDA = 0.5
    rewards, values = torch.tensor([[0.0, 1.0, 8.0]]), torch.tensor([[0.5, 0.25, 4.0]])
    for mask, expected in (([1.0, 1.0, 0.0], [-0.1875, 0.75, 0.0]),
                           ([1.0, 0.0, 0.0], [-0.5, 0.0, 0.0])):
        found = ppo.compute_advantages(rewards, values, torch.tensor([mask]))
        assert found[0].tolist() == pytest.approx(expected, rel=1e-6, abs=0)


def test_the_two_ends_of_lambda(ppo):
    """1: what came less what was foretold. 0: the step's own surprise. The returns are then the
    discounted sum of the rewards, and the one-step target."""
    rewards, values, mask, lengths = random_answers()
    ppo.GAMMA = 0.9
    for ppo.GAE_LAMBDA in (1.0, 0.0):
        found = ppo.compute_advantages(rewards, values, mask)
        for i, length in enumerate(lengths):
            r, v = rewards[i, :length].tolist(), values[i, :length].tolist()
            for t in range(length):
                if ppo.GAE_LAMBDA:
                    target = sum(0.9 ** k * x for k, x in enumerate(r[t:]))
                else:
                    target = r[t] + (0.9 * v[t + 1] if t + 1 < length else 0.0)
                assert found[i, t].item() == pytest.approx(target - v[t], rel=1e-12)


def test_whitened_advantages(ppo):
    """Mean 0 and std 1 over the real tokens of all answers together; 0 in the padding, whose
    content has no part in it; the order of the advantages stays."""
    raw, _, mask, _ = random_answers()
    real = mask.bool()
    found = ppo.whiten(raw, mask)
    assert found[real].mean().item() == pytest.approx(0.0, abs=1e-12)
    assert found[real].std(correction=0).item() == pytest.approx(1.0, rel=1e-6)
    assert not found[~real].any()
    flat = raw[real].numpy()
    np.testing.assert_allclose(found[real].numpy(), (flat - flat.mean()) / flat.std(), rtol=1e-6)
    torch.testing.assert_close(ppo.whiten(7 * raw + 3, mask)[real], found[real], rtol=1e-6,
                               atol=1e-6)


def test_whitening_makes_nothing_of_rounding(ppo):
    """Equal advantages, of which float32's mean is not their value, are 0 and not +-1."""
    rounded = 0
    for value in (0.1, 0.7, 1 / 3):
        for count in (24, 64, 1000):
            advantages = torch.full((1, count), value)
            rounded += bool((advantages - advantages.mean()).any())
            assert ppo.whiten(advantages, torch.ones_like(advantages)).abs().max() < 0.01
    assert rounded  # the trap is in the data


# ========================================= PPO: rewards =========================================


def scored_batch(ppo, lengths=(3, 1, 4, 2)):
    """A batch of log-probs, old and of the reference, with garbage in the padding."""
    mask = torch.tensor([[float(t < n) for t in range(4)] for n in lengths])
    old, ref = (torch.randn(4, 4, generator=generator(seed)) for seed in (1, 2))
    return SimpleNamespace(completion_mask=mask, old_logps=old, ref_logps=ref,
                           ended=torch.tensor([True, True, False, True]))


def test_the_score_is_paid_at_the_last_real_token(ppo):
    """And nowhere else: not at the end of the batch, not behind the end token."""
    ppo.KL_COEF, batch = 0.0, scored_batch(ppo)
    del batch.ref_logps  # there is no reference
    found = ppo.token_rewards(None, None, batch, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert found.tolist() == [[0, 0, 1, 0], [2, 0, 0, 0], [0, 0, 0, 3], [0, 4, 0, 0]]


def test_the_kl_penalty_of_each_token(ppo):
    """- KL_COEF (log pi_old - log ref) at every real token: a token that the policy likes more than
    the reference costs, one that it likes less pays. The score comes on top."""
    ppo.KL_COEF = 0.5
    batch = scored_batch(ppo)
    found = ppo.token_rewards(None, None, batch, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    for i, length in enumerate((3, 1, 4, 2)):
        expected = [-0.5 * (float(batch.old_logps[i, t]) - float(batch.ref_logps[i, t]))
                    for t in range(length)]
        expected[-1] += i + 1.0
        assert found[i, :length].tolist() == pytest.approx(expected, rel=1e-5)
        assert found[i, length:].tolist() == [0.0] * (4 - length)
    batch.old_logps = batch.ref_logps + 0.2
    found = ppo.token_rewards(None, None, batch, torch.zeros(4))
    torch.testing.assert_close(found, -0.1 * batch.completion_mask)


def test_the_penalty_for_answers_that_never_end(ppo):
    """It comes off once, at the last token, of the answers that were cut off."""
    ppo.KL_COEF, batch = 0.0, scored_batch(ppo)
    for ppo.NO_END_PENALTY in (0.0, 0.75):
        found = ppo.token_rewards(None, None, batch, torch.tensor([1.0, 2.0, 3.0, 4.0]))
        third = 3.0 - ppo.NO_END_PENALTY
        assert found.tolist() == [[0, 0, 1, 0], [2, 0, 0, 0], [0, 0, 0, third], [0, 4, 0, 0]]


def test_sentences_are_paid_at_their_ends(ppo, monkeypatch):
    """Answers of two sentences, of one, of three and of a single token; in the padding the last
    sentence goes on, as sentence_rewards leaves it. What is paid is what was added, to the bit."""
    ppo.USE_SEQUENCE_LEVEL_REWARD, ppo.NO_END_PENALTY, ppo.KL_COEF = False, 0.5, 0.0
    added = torch.tensor([[0.25, -0.5, 0], [0.75, 0, 0], [0.5, 0.125, 1.0], [2.0, 0, 0]])
    sentence = torch.tensor([[0, 1, 1, 1], [0, 0, 0, 0], [0, 1, 1, 2], [0, 0, 0, 0]])
    batch = scored_batch(ppo, lengths=(3, 2, 4, 1))
    monkeypatch.setattr(ppo, "sentence_rewards", lambda *arguments: (sentence, added))
    found = ppo.token_rewards(None, None, batch, torch.full((4,), 99.0))
    assert found.tolist() == [[0.25, 0, -0.5, 0], [0, 0.75, 0, 0], [0.5, 0, 0.125, 0.5],
                              [2.0, 0, 0, 0]]


# ========================================== PPO: critic =========================================


def random_critic(ppo, seed=2):
    """A small critic whose head is not zero."""
    critic = ppo.Critic(small_model(seed=seed))
    torch.manual_seed(seed)
    torch.nn.init.normal_(critic.head.weight)
    torch.nn.init.normal_(critic.head.bias)
    return critic


def on_cpu(ppo, dtype="float32", micro=6):
    ppo.DEVICE, ppo.DTYPE, ppo.MICRO_BATCH = "cpu", dtype, micro
    return random_critic(ppo)


def plain_values(critic, prompts, batch):
    """V before each token by a forward pass for each completion, without anything beside it."""
    found = []
    for i, length in enumerate(LENGTHS):
        prompt = prompts[batch.prompt_index[i]]
        ids = torch.tensor([prompt + batch.completion_ids[i, :length].tolist()])
        states = critic.base_model(input_ids=ids).last_hidden_state[0, len(prompt) - 1:-1]
        found.append(states @ critic.head.weight[0] + critic.head.bias)
    return found


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("bfloat16", 0.05)])
def test_values_are_those_of_plain_forward_passes(ppo, dtype, tolerance):
    """V before each token is the head of the state that the token is drawn from, whatever a
    completion is batched with; 0 in padding. The gradients of all of its weights are right as well;
    in bfloat16 as near as its rounding allows."""
    critic = on_cpu(ppo, dtype)
    prompts, batch = small_batch(ppo)
    upstream = torch.randn(6, 5, generator=generator(8))
    expected, total = plain_values(critic, prompts, batch), 0.0
    for i, length in enumerate(LENGTHS):
        total = total + (expected[i] * upstream[i, :length]).sum()
    wanted = vector(torch.autograd.grad(total, list(critic.parameters())))
    for micro in (1, 2, 6):
        ppo.MICRO_BATCH = micro
        found = ppo.values_without_grad(critic, batch)
        assert found.dtype == torch.float32 and not found.requires_grad
        for i, length in enumerate(LENGTHS):
            torch.testing.assert_close(found[i, :length], expected[i], rtol=10 * tolerance,
                                       atol=tolerance * torch.cat(expected).detach().std().item())
            assert not found[i, length:].any()
        for some in ppo.micro_batches(batch):
            (critic(batch.rows(some)) * upstream[some]).sum().backward()
        gradient = vector([p.grad for p in critic.parameters()])
        critic.zero_grad()
        assert (gradient - wanted).norm() < tolerance * wanted.norm() and wanted.norm() > 1.0
    assert found[batch.completion_mask.bool()].std() > 0.1


def test_a_value_does_not_know_the_token_that_it_comes_before(ppo):
    """V at t stays when the tokens at and after t change, and moves with the one before it."""
    critic = on_cpu(ppo)
    _, batch = small_batch(ppo)
    with torch.no_grad():
        before = critic(batch)
        for t in range(5):
            other = copy.copy(batch)
            other.completion_ids = batch.completion_ids.clone()
            other.completion_ids[:, t:] = (batch.completion_ids[:, t:] + 1) % 23
            after = critic(other)
            torch.testing.assert_close(after[:, :t + 1], before[:, :t + 1], rtol=1e-5, atol=1e-6)
            if t < 4:
                reached = batch.completion_mask[:, t + 1].bool()
                assert ((after - before)[reached, t + 1].abs() > 1e-3).all()


def test_at_first_nothing_is_foretold(ppo):
    """The head starts at zero: values are exactly 0; the first gradient moves it."""
    on_cpu(ppo)
    critic = ppo.Critic(small_model(seed=2))
    _, batch = small_batch(ppo)
    values = critic(batch)
    assert torch.equal(values, torch.zeros(6, 5))
    values.sum().backward()
    assert critic.head.weight.grad.norm() > 0.1 and critic.head.bias.grad.item() == sum(LENGTHS)


@pytest.mark.parametrize("value, old, target, loss, slope", [
    (0.5, 0.0, 1.0, 0.32, 0.0),  # further than the clip towards the target: as if at 0.2; cut
    (0.1, 0.0, 1.0, 0.405, -0.9),  # inside
    (-0.5, 0.0, 1.0, 1.125, -1.5),  # away from the target: the larger error is its own; not cut
    (0.5, 0.0, 0.2, 0.045, 0.3),  # past the target: its own error is the larger
    (0.5, 0.0, 0.3, 0.02, 0.2),  # both errors count, 0.2 beyond and 0.1 short: the larger, 0.2
    (1.0, 1.0, 1.0, 0.0, 0.0),
    (0.5, 1.0, -1.0, 1.62, 0.0),  # downwards: as if at 0.8
])
def test_value_loss_by_hand(ppo, value, old, target, loss, slope):
    """max((V - R)^2, (clip(V, old - 0.2, old + 0.2) - R)^2) / 2, and where its gradient is cut."""
    ppo.VALUE_CLIP = 0.2
    v, o, r = (torch.tensor([[x]], dtype=torch.float64) for x in (value, old, target))
    v.requires_grad_()
    found, cut = ppo.value_loss(v, o, r)
    gradient, = torch.autograd.grad(found.sum(), v)
    assert found.item() == pytest.approx(loss, rel=1e-9, abs=1e-12)
    assert gradient.item() == pytest.approx(slope, rel=1e-9, abs=1e-12)
    assert cut.item() == float(slope == 0.0 and loss > 0) and not cut.requires_grad


def test_value_loss_is_that_of_the_equation(ppo):
    """On random numbers, and without a clip the plain squared error."""
    v, o, r = (torch.randn(20, 5, generator=generator(seed), dtype=torch.float64)
               for seed in (1, 2, 3))
    for ppo.VALUE_CLIP in (0.2, 1.0, 0.0):
        leaf = v.clone().requires_grad_()
        found, cut = ppo.value_loss(leaf, o, r)
        gradient, = torch.autograd.grad(found.sum(), leaf)
        clipped = 0
        for i, t in np.ndindex(20, 5):
            value, old, target = (float(x[i, t]) for x in (v, o, r))
            free, slope = (value - target) ** 2, value - target
            near = min(max(value, old - ppo.VALUE_CLIP), old + ppo.VALUE_CLIP)
            if ppo.VALUE_CLIP and (near - target) ** 2 > free:
                free, slope, clipped = (near - target) ** 2, 0.0, clipped + 1
            assert found[i, t].item() == pytest.approx(free / 2, rel=1e-12)
            assert gradient[i, t].item() == pytest.approx(slope, rel=1e-12, abs=1e-15)
            assert cut[i, t].item() == float(slope == 0.0)
        assert cut.sum() == clipped and (clipped > 5) == (ppo.VALUE_CLIP > 0)


def test_explained_variance_by_hand(ppo):
    """Returns 1, 2, 3 foretold as 1, 2, 2: the errors 0, 0, 1 have the variance 2/9, the returns
    2/3. A critic that is right explains all, a constant one nothing, a worse one less than that."""
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    returns = torch.tensor([[1.0, 2.0, 70.0], [3.0, -70.0, 9.0]])

    def measured(values, returns, **logps):
        batch = SimpleNamespace(
            completion_mask=mask, returns=returns, **logps,
            old_values=torch.tensor([[values[0], values[1], 1e3], [values[2], 1e3, -1e3]]))
        meter, critic_meter = ppo.Meter(), ppo.Meter()
        critic_meter.add({"grad_norm": 6.0, "learning_rate": 1.0})
        critic_meter.add({"grad_norm": 8.0, "learning_rate": 1.0})
        ppo.measure_critic(meter, critic_meter, batch)
        return meter.means()

    for values, expected in (([1.0, 2.0, 2.0], 2 / 3), ([1.0, 2.0, 3.0], 1.0),
                             ([0.5, 0.5, 0.5], 0.0), ([3.0, 2.0, 1.0], -3.0)):
        found = measured(values, returns, ref_logps=mask - 0.25, old_logps=mask)
        assert found.pop("explained_variance") == pytest.approx(expected, abs=1e-6)
        assert found == {"critic_grad_norm": 7.0, "value_mean": pytest.approx(sum(values) / 3),
                         "return_mean": 2.0, "kl": 0.25}
    ppo.KL_COEF = 0.0
    found = measured(values, torch.full((2, 3), 0.5))  # no variance to explain: still a number
    assert "kl" not in found and math.isfinite(found["explained_variance"])


def moved(before, after):
    """Whether any weight differs, and whether all are equal to the bit."""
    return any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("warm_up_of_rate", [0, 40])
def test_critic_warmup(ppo, monkeypatch, warm_up_of_rate):
    """In its rollouts the policy keeps its weights to the last bit and the critic learns; then both
    do. The same where the learning rate warms up, too."""
    start = small_model(seed=0).state_dict()
    state = train(ppo, monkeypatch, steps=3, really=True, minibatch=2, CRITIC_WARMUP=2,
                  WARMUP_STEPS=warm_up_of_rate)
    first, second, third = state.weights
    assert not moved(start, first["policy"]) and not moved(start, second["policy"])
    assert moved(start, third["policy"])
    torch.manual_seed(3)
    head = torch.nn.init.normal_(torch.empty(1, 16))
    assert not torch.equal(first["critic"]["head.weight"], head)
    assert moved(first["critic"], second["critic"]) and moved(second["critic"], third["critic"])
    assert state.metrics[0]["ratio/mean"] != 1.0  # the policy's loss is measured all the same
    assert not {"learning_rate", "grad_norm"} & state.metrics[1].keys()  # it makes no step
    assert state.metrics[2]["learning_rate"] > 0.0
    alone = train(ppo, monkeypatch, minibatch=6, CRITIC_WARMUP=0)
    state = train(ppo, monkeypatch, minibatch=6, CRITIC_WARMUP=1, steps=2)
    assert [step.which for step in state.steps] == ["critic", "policy", "critic"]
    torch.testing.assert_close(state.steps[1].gradient, alone.steps[0].gradient)  # nothing is left


def test_the_critic_learns_what_it_is_asked(ppo, monkeypatch):
    """The same rollout again and again, with the policy held: the value loss falls far."""
    state = train(ppo, monkeypatch, steps=30, really=True, CRITIC_WARMUP=30, VALUE_CLIP=0.0,
                  GAE_LAMBDA=1.0)
    losses = [metrics["value_loss"] for metrics in state.metrics]
    assert losses[-1] < 0.1 * losses[0]
    assert state.metrics[-1]["explained_variance"] > 0.5 > state.metrics[0]["explained_variance"]


def test_target_approx_kl_stops_the_passes(ppo, monkeypatch):
    """Twelve updates without it; fewer with a target that they pass, and then the critic has made
    as many; the first minibatch, where nothing has moved yet, is always used."""
    counts = {}
    for target in (0.0, 1e-3, 1e3):
        state = train(ppo, monkeypatch, minibatch=2, noise=0.0, really=True, PPO_EPOCHS=4,
                      TARGET_APPROX_KL=target)
        which = [step.which for step in state.steps]
        counts[target] = which.count("policy")
        assert which == ["policy", "critic"] * counts[target]
        moved_by = state.metrics[0]["approx_kl"]
        assert 1e-3 < moved_by < 1e3
    assert counts[0.0] == counts[1e3] == 12
    assert 2 <= counts[1e-3] < 12


def test_approx_kl_of_an_update(ppo):
    """r - 1 - ln r at each token: 0 where nothing has moved, never negative."""
    new, old, advantages, mask, _ = answers(0.3)
    found = ppo.policy_loss(new, old, advantages, mask)[1]["approx_kl"]
    gap = (new - old).detach()[mask.bool()].numpy()
    np.testing.assert_allclose(found[mask.bool()].numpy(), np.exp(gap) - 1 - gap, rtol=1e-9,
                               atol=1e-15)
    assert found.min() >= 0 and not found.requires_grad
    still = ppo.policy_loss(old, old, advantages, mask)[1]["approx_kl"]
    assert not still.any()


@pytest.mark.parametrize("coefficient", [0.05, 0.0])
def test_the_critic_has_its_own_weights_and_rate(ppo, monkeypatch, coefficient):
    """It starts as the policy is, shares no tensor with it, and has an optimiser of its own. The
    reference is loaded for the penalty only."""
    ppo.configure(["PROFILE=embedded", "DEVICE=cpu", "CRITIC_LEARNING_RATE=5e-3",
                   "LEARNING_RATE=1e-4", f"KL_COEF={coefficient}"])
    policy = ppo.load_policy(ppo.POLICY_MODEL)
    run = SimpleNamespace(policy=policy, reference=None, state={},
                          trained={"policy": (policy, ppo.new_optimizer(policy, 1e-4))})
    ppo.prepare(run)
    critic, optimizer = run.trained["critic"]
    weights = dict(critic.base_model.named_parameters())
    start = dict(policy.base_model.named_parameters())
    assert weights.keys() == start.keys() and len(weights) > 10
    assert all(torch.equal(weights[name], start[name]) for name in start)
    memory = {p.data_ptr() for p in policy.parameters()}
    assert memory.isdisjoint({p.data_ptr() for p in critic.parameters()})
    assert all(p.requires_grad for p in critic.parameters())
    group, = optimizer.param_groups
    assert group["lr"] == group["initial_lr"] == 5e-3
    assert {id(p) for p in group["params"]} == {id(p) for p in critic.parameters()}
    assert run.trained["policy"][1].param_groups[0]["lr"] == 1e-4
    assert (run.reference is not None) == (coefficient > 0)
    if run.reference is not None:
        assert not any(p.requires_grad for p in run.reference.parameters())


# ====================================== Several processes =======================================

PROBE = """
import json, sys
import pytest, torch
import torch.distributed as dist
sys.path.append({tests!r})
import test_grpo_dapo_ppo_loss as tests

dist.init_process_group("gloo", init_method="file://{meeting}", rank=int(sys.argv[1]), world_size=2)
mask = torch.tensor([[1.0, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]])
values = torch.arange(16.0).reshape(4, 4) ** 2
found = {{}}
for name in tests.SCRIPTS:
    module = tests.fresh(name)
    module.AGGREGATION = "token-mean"
    found[name] = module.token_weights(mask[module.rank::2]).tolist()
    if name == "ppo":
        found["whitened"] = module.whiten(values[module.rank::2], mask[module.rank::2]).tolist()
dapo = tests.fresh("dapo")
dapo.BATCH_SIZE, dapo.GROUP_SIZE, dapo.OVERLONG_CACHE, dapo.MAX_SAMPLING_ROUNDS = 4, 4, 0, 2
for case, fourth in (("found", [1.0, 0, 1, 0]), ("filled", tests.FLAT)):
    table = [tests.FLAT, *[[1.0, 0, 0, 0]] * 3, fourth, tests.WRONG]
    run, log = tests.sampling(dapo, pytest.MonkeyPatch(), table)
    batch = tests.sampled(dapo, run)
    found[case] = [batch.kept, log.asked, batch.metrics, run.num_tokens]
print(json.dumps(found))
"""


def test_two_processes_count_what_both_have(tmp_path, ppo):
    """The mean over all tokens, and whitening, are those of one process with all answers. DAPO: the
    first process misses a group, and both ask again; at the last round it takes what there is."""
    (tmp_path / "probe.py").write_text(PROBE.format(tests=str(ROOT / "tests"),
                                                    meeting=tmp_path / "meeting"))
    started = [subprocess.Popen(
        [sys.executable, tmp_path / "probe.py", str(rank)], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2"}) for rank in (0, 1)]
    first, second = (json.loads(process.communicate(timeout=120)[0].splitlines()[-1])
                     for process in started)
    mask = torch.tensor([[1.0, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]])

    def joined(name):
        return torch.stack([torch.tensor(first[name]), torch.tensor(second[name])], 1).flatten(0, 1)

    for name in SCRIPTS:
        torch.testing.assert_close(joined(name), 2 * mask / 10)  # the mean of two gradients halves
    values = torch.arange(16.0).reshape(4, 4) ** 2
    torch.testing.assert_close(joined("whitened"), ppo.whiten(values, mask))
    for case, right in (("found", 5), ("filled", 7)):
        assert first[case][0] == [2, 4] and second[case][0] == [1, 3]
        assert first[case][1:] == second[case][1:]
        _, asked, metrics, dropped = first[case]
        assert asked == [[0, 1, 2, 3], [4, 5]] and dropped > 8
        assert metrics == {"dynamic/rounds": 2, "dynamic/questions": 6, "dynamic/groups": 4,
                           "dynamic/dropped_ratio": pytest.approx(1 / 3),
                           "accuracy": pytest.approx((4 + right) / 24),
                           "reward": pytest.approx((4 + right) / 24)}


# =========================================== Doctests ===========================================


@pytest.mark.parametrize("name, functions", [
    ("grpo", ["compute_advantages", "policy_loss", "token_weights", "adapt_kl_coef"]),
    ("dapo", ["overlong_penalty", "compute_advantages", "policy_loss", "token_weights"]),
    ("ppo", ["value_loss", "compute_advantages", "policy_loss", "token_weights"])])
def test_docstring_examples(name, functions):
    """The worked examples of the docstrings, with the constants as in the file."""
    module = fresh(name)
    result = doctest.testmod(module)
    assert result.failed == 0
    examples = {test.name.split(".")[-1] for test in doctest.DocTestFinder().find(module)
                if test.examples}
    assert set(functions) <= examples


# ============================ Known bugs, which these tests must catch ===========================

MUTATIONS = {  # name: (script, text, what takes its place, test, its parameters)
    "the value behind the last token is foretold": (
        "ppo", "value = values[:, t] * mask[:, t]", "value = values[:, t]",
        test_gae_by_hand, {}),
    "the mask of the values is shifted by one": (
        "ppo", "following) * mask[:, t]", "following) * F.pad(mask, (1, 0), value=1.0)[:, t]",
        test_gae_by_hand, {}),
    "the KL penalty is a bonus": (
        "ppo", "rewards = -KL_COEF *", "rewards = KL_COEF *",
        test_the_kl_penalty_of_each_token, {}),
    "the score is paid behind the last token": (
        "ppo", "mask * (mask.flip(1).cumsum(1).flip(1) == 1)",
        "torch.roll(mask * (mask.flip(1).cumsum(1).flip(1) == 1), 1, 1)",
        test_the_score_is_paid_at_the_last_real_token, {}),
    "a sentence is paid where it begins": (
        "ppo", "(sentence != F.pad(sentence[:, 1:], (0, 1)))",
        "(sentence != F.pad(sentence[:, :-1], (1, 0)))",
        test_sentences_are_paid_at_their_ends, {}),
    "the policy's gradient of the warm-up is kept": (
        "ppo", "policy.zero_grad()  #", "pass  #",
        test_critic_warmup, {"warm_up_of_rate": 0}),
    "the warm-up is a rollout too short": (
        "ppo", "run.step > CRITIC_WARMUP", "run.step >= CRITIC_WARMUP",
        test_critic_warmup, {"warm_up_of_rate": 0}),
    "returns are taken after whitening": (
        "ppo", "batch.returns = batch.advantages +",
        "batch.returns = whiten(batch.advantages, batch.completion_mask) +",
        test_ppo_minimises_the_stated_losses, {"whitened": True}),
    "the smaller of the critic's two errors": (
        "ppo", "0.5 * torch.max(free, kept)", "0.5 * torch.min(free, kept)",
        test_value_loss_is_that_of_the_equation, {}),
    "a mean for each micro-batch": (
        "dapo", "(token_loss * micro.weights).sum().backward()",
        "(token_loss * token_weights(loss_mask(micro))).sum().backward()",
        test_dapo_minimises_the_stated_loss, {"filtering": False}),
    "truncated answers are left out of their group": (
        "dapo", "token_advantages(run, rows, batch, rewards)    #",
        "token_advantages(run, rows, batch, torch.where(batch.ended, rewards, 0.0))  #",
        test_dapo_minimises_the_stated_loss, {"filtering": True}),
    "the range is as narrow above as below": (
        "dapo", "ratio.clamp(1 - low, 1 + high)", "ratio.clamp(1 - low, 1 + low)",
        test_dapo_cuts_the_high_side_later_than_the_low_side, {}),
    "groups without spread are kept": (
        "dapo", "(groups.std(1) > SPREAD_THRESHOLD) & ~without_spread(groups)[:, 0]",
        "(groups.std(1) >= SPREAD_THRESHOLD)",
        test_groups_without_spread_are_replaced, {}),
    "rounding counts as spread": (
        "dapo", " & ~without_spread(groups)[:, 0]", "",
        test_scores_equal_up_to_float_noise_have_no_spread, {}),
    "accuracy is that of the selection": (
        "dapo", "finish_step(run, meter.means() | sampling)",
        "finish_step(run, sampling | meter.means())",
        test_the_reward_that_dapo_logs, {}),
    "questions of later rounds are mistaken for the first one's": (
        "dapo", "batch.prompt_index += len(rows)", "pass",
        test_groups_without_spread_are_replaced, {}),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_caught(name, tmp_path, monkeypatch):
    """In a copy of the script, in which the text stands exactly once; and it is an assertion of the
    test that fails, not the script that crashes."""
    script, text, instead, test, parameters = MUTATIONS[name]
    copied = mutated_copy(SCRIPTS[script], text, instead, tmp_path)
    available = {script: fresh(script, copied), "monkeypatch": monkeypatch, **parameters}
    must_fail(test, available)
