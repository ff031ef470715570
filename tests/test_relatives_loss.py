"""The mathematics of reinforce.py, gmpo.py and cispo.py, and of the constants by which grpo.py
becomes one of its other relatives.

Each loss is compared with a slow loop written from the paper's equation, its gradient with one
worked out by hand and, where the loss has one, with finite differences; REINFORCE's with the
gradient of the expected reward, enumerated exactly; and all with TRL where it computes the same.
At the end: known bugs, put in one at a time, that these tests must catch.
"""

import doctest
import itertools
import math
import re
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, fresh, must_fail, mutated_copy
from test_grpo_dapo_ppo_loss import LENGTHS, RIGHT, SCORES, loss_of, train, trl_loss, vector
from test_gspo_loss import answers
from transformers import AutoTokenizer

SCRIPTS = {name: ROOT / "RL_HAND" / name / f"{name}.py"
           for name in ("reinforce", "gmpo", "cispo", "grpo", "gspo")}


def pair(clip):
    """A range as (low, high)."""
    return clip if isinstance(clip, tuple) else (clip, clip)


# =========================================== REINFORCE ==========================================


def chances(logits, sequence):
    """The probability of a sequence under a policy without memory: logits (T, V)."""
    logps = torch.log_softmax(logits, -1)
    return torch.stack([logps[t, token] for t, token in enumerate(sequence)]).sum().exp()


@pytest.mark.parametrize("baseline, factor", [("none", 1.0), ("leave-one-out", 1.0), ("mean", 0.5)])
def test_the_mean_gradient_is_that_of_the_expected_reward(reinforce, baseline, factor):
    """Over all pairs of answers that a small policy can give, each as often as it gives it: the
    gradient of REINFORCE's loss is minus that of the expected reward, over MAX_NEW_TOKENS; with the
    group's mean as the baseline (G - 1) / G of it. Answers end early: token 0 is the end, so that
    they differ in length, and the mean over their tokens would be another gradient."""
    reinforce.GROUP_SIZE, reinforce.MAX_NEW_TOKENS, reinforce.BASELINE = 2, 5, baseline
    logits = torch.tensor([[0.3, -0.2, 0.5], [0.1, 0.4, -0.6]], dtype=torch.float64,
                          requires_grad=True)
    every = [(0,), *((first, second) for first in (1, 2) for second in range(3))]
    reward = {one: 0.7 * len(one) + 0.9 * (one[0] == 1) - 0.5 * (one[-1] == 2) for one in every}
    expected, = torch.autograd.grad(sum(chances(logits, one) * reward[one] for one in every),
                                    logits)
    logps, total = torch.log_softmax(logits, -1), 0.0
    assert sum(chances(logits, one).item() for one in every) == pytest.approx(1.0)
    for group in itertools.product(every, repeat=2):
        mask = torch.tensor([[float(t < len(one)) for t in range(2)] for one in group]).double()
        ours = torch.stack([torch.stack([logps[t, one[t]] if t < len(one) else 7.0 * logps[0, 0]
                                         for t in range(2)]) for one in group])
        advantages = reinforce.compute_advantages(torch.tensor([reward[one] for one in group],
                                                               dtype=torch.float64))
        loss = (reinforce.policy_loss(ours, advantages[:, None].expand(2, 2))
                * reinforce.token_weights(mask)).sum()
        chance = math.prod(chances(logits, one).item() for one in group)
        total += chance * torch.autograd.grad(loss, logits, retain_graph=True)[0]
    torch.testing.assert_close(total, -factor * expected / 5, rtol=1e-10, atol=1e-14)
    assert expected.norm() > 0.1


def test_baselines_by_hand(reinforce):
    """Rewards 1, 0, 0, 0.5: the mean is 0.375, those of the others 1/6, 1/2, 1/2, 1/3. Equal
    rewards: exactly 0, but for the reward itself."""
    reinforce.GROUP_SIZE = 4
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.5] + [0.1] * 4)
    for reinforce.BASELINE, expected in (
            ("mean", [0.625, -0.375, -0.375, 0.125]), ("none", [1.0, 0.0, 0.0, 0.5]),
            ("leave-one-out", [5 / 6, -1 / 2, -1 / 2, 1 / 6])):
        found = reinforce.compute_advantages(rewards)
        assert found[:4].tolist() == pytest.approx(expected, rel=1e-6)
        assert torch.equal(found[4:], rewards[4:] * (reinforce.BASELINE == "none"))


def test_leave_one_out_is_that_of_trl(reinforce):
    """RLOO's advantages are the mean's times G / (G - 1), and the formula of TRL's trainer."""
    reinforce.GROUP_SIZE, reinforce.BASELINE = 5, "leave-one-out"
    rewards = torch.randn(15, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = reinforce.compute_advantages(rewards)
    groups = rewards.view(-1, 5)
    expected = rewards - ((groups.nansum(1, keepdim=True) - groups) / 4).view(-1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    reinforce.BASELINE = "mean"
    torch.testing.assert_close(reinforce.compute_advantages(rewards), found * 4 / 5)


def test_weights_of_reinforce_by_hand(reinforce):
    """Answers of 4, 1 and 2 tokens of at most 8: a token weighs 1 / (3 x 8) in each; or an answer
    weighs 1/3."""
    mask = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    reinforce.MAX_NEW_TOKENS = 8
    for reinforce.AGGREGATION, expected in (
            ("seq-mean-token-sum", [[1 / 24] * 4, [1 / 24, 0, 0, 0], [1 / 24, 1 / 24, 0, 0]]),
            ("seq-mean-token-mean", [[1 / 12] * 4, [1 / 3, 0, 0, 0], [1 / 6, 1 / 6, 0, 0]])):
        np.testing.assert_allclose(reinforce.token_weights(mask).numpy(), expected, rtol=1e-6)
        assert torch.equal(reinforce.token_weights(0 * mask), 0 * mask)


@pytest.mark.parametrize("micro", [1, 2, 6])
@pytest.mark.parametrize("baseline", ["mean", "leave-one-out"])
@pytest.mark.parametrize("aggregation", ["seq-mean-token-sum", "seq-mean-token-mean"])
def test_train_makes_one_step_of_the_policy_gradient(reinforce, monkeypatch, aggregation, baseline,
                                                     micro):
    """Token by token from the equation, whatever the micro-batch; the sampler's log-probs, which
    are others here, do not enter, and their distance from the trainer's is measured."""
    state = train(reinforce, monkeypatch, micro, AGGREGATION=aggregation, BASELINE=baseline)
    logps, entropy = reinforce.score_tokens(state.policy, state.batch)
    total, size = 0.0, 0.0
    for i, length in enumerate(LENGTHS):
        other = SCORES[i + 1 if i % 2 == 0 else i - 1]
        a = (SCORES[i] - other) * (0.5 if baseline == "mean" else 1.0)
        each = (1 / length if aggregation == "seq-mean-token-mean" else 1 / 5) / 6
        total = total - each * a * logps[i, :length].sum()
        size += each * length
    step, = state.steps
    expected = vector(torch.autograd.grad(total, list(state.policy.parameters())))
    torch.testing.assert_close(step.gradient, expected, rtol=1e-3, atol=1e-6)
    assert expected.norm() > 1e-3
    metrics = state.metrics[0]
    assert metrics["loss"] == pytest.approx(total.item() / size, rel=1e-4)
    apart = (state.batch.sampled_logps - logps).abs().sum().item() / sum(LENGTHS)
    assert metrics["sampling_logp_difference"] == pytest.approx(apart, rel=1e-4) and apart > 0.1
    real = state.batch.completion_mask.bool()
    assert metrics["entropy"] == pytest.approx(entropy[real].mean().item(), rel=1e-4)
    assert metrics["accuracy"] == pytest.approx(np.mean(RIGHT))
    assert not {"ratio/mean", "kl", "policy_loss", "time/logps"} & metrics.keys()


def test_it_is_the_first_step_of_the_others(monkeypatch):
    """On one rollout, sampled by the policy itself, one minibatch: the gradients are REINFORCE's,
    of Dr. GRPO (its sum over tokens) and of GRPO, GMPO and GSPO with relative advantages (the mean
    over tokens); of CISPO that of GRPO's token mean."""
    def step(name, **constants):
        state = train(fresh(name), monkeypatch, noise=0.0, **constants)
        assert len(state.steps) == 1
        return state.steps[0].gradient

    plain = {"ENTROPY_COEF": 0.0, "KL_COEF": 0.0, "ADVANTAGE_TYPE": "relative"}
    total, mean = (step("reinforce", AGGREGATION=f"seq-mean-token-{kind}")
                   for kind in ("sum", "mean"))
    assert (total - mean).norm() > 0.1 * mean.norm()
    for name, constants, expected in (
            ("grpo", {"AGGREGATION": "dr-grpo"}, total), ("grpo", {}, mean), ("gmpo", {}, mean),
            ("gspo", {}, mean)):
        torch.testing.assert_close(step(name, **plain, **constants), expected, rtol=1e-4, atol=1e-7)
    token_mean = step("grpo", **plain, AGGREGATION="token-mean")
    torch.testing.assert_close(step("cispo", **plain), token_mean, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(token_mean, total * 5 * 6 / sum(LENGTHS), rtol=1e-4, atol=1e-7)


FIRST_STEPS = {  # as RL_HAND/reinforce/README.md has them: the script, and its constants
    "REINFORCE, the default": ("reinforce", []),
    "`BASELINE=leave-one-out`, RLOO": ("reinforce", ["BASELINE=leave-one-out"]),
    "`BASELINE=none`": ("reinforce", ["BASELINE=none"]),
    "`AGGREGATION=seq-mean-token-mean`": ("reinforce", ["AGGREGATION=seq-mean-token-mean"]),
    "Dr. GRPO": ("grpo", ["AGGREGATION=dr-grpo", "ADVANTAGE_TYPE=relative"]),
    "GRPO without the std, `ADVANTAGE_TYPE=relative`": ("grpo", ["ADVANTAGE_TYPE=relative"]),
    "GRPO": ("grpo", []),
    "GMPO": ("gmpo", []),
    "GSPO, `ENTROPY_COEF=0`": ("gspo", []),
    "CISPO": ("cispo", [])}


def first_steps():
    """The gradients of the losses on the first rollout of the embedded default, by label."""
    sampler = fresh("reinforce")
    sampler.configure(["PROFILE=embedded", "DEVICE=cpu"])
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "policy")
    rows = sampler.load_rows("train_datasets", tokenizer)
    policy = sampler.load_policy("data/policy")
    run = SimpleNamespace(train_rows=rows, step=0, questions=0, tokenizer=tokenizer,
                          scorers=sampler.load_scorers(rows[0]))
    sampler.begin_step(run)
    rows = sampler.next_questions(run, sampler.BATCH_SIZE)
    batch = sampler.sample_groups(policy, tokenizer, rows, sampler.GROUP_SIZE)
    rewards, mask = sampler.score_completions(run, rows, batch)[0], batch.completion_mask
    logps, gradients = sampler.score_tokens(policy, batch)[0], {}
    for label, (name, constants) in FIRST_STEPS.items():
        module = fresh(name)
        module.configure(["PROFILE=embedded", "DEVICE=cpu", *constants])
        advantages = module.compute_advantages(rewards)[:, None].expand_as(mask)
        losses = (module.policy_loss(logps, advantages) if name == "reinforce" else
                  module.policy_loss(logps, logps.detach(), advantages, mask)[0])
        loss = (losses * module.token_weights(mask)).sum()
        gradients[label] = vector(torch.autograd.grad(loss, list(policy.parameters()),
                                                      retain_graph=True)).double()
    return gradients


def test_the_first_steps_on_the_shipped_policy_are_those_of_the_page():
    """The cosines of RL_HAND/reinforce/README.md, to the default REINFORCE and to GRPO. A row that
    says 1.00000 is so to the fifth digit on any machine; the others may sample other answers."""
    gradients = first_steps()
    page = (SCRIPTS["reinforce"].parent / "README.md").read_text(encoding="utf-8")
    for label, gradient in gradients.items():
        found = [torch.cosine_similarity(gradient, gradients[other], dim=0).item()
                 for other in ("REINFORCE, the default", "GRPO")]
        print(f"| {label} | {found[0]:.5f} | {found[1]:.5f} |")  # pytest -s shows them
        row = re.search(rf"^\| {re.escape(label)} \| ([\d.]+) \| ([\d.]+) \|$", page, re.M)
        for cosine, written in zip(found, row.groups()):
            exact = written == "1.00000"
            assert cosine == pytest.approx(float(written), abs=6e-6 if exact else 0.03), label


# ============================================= GMPO =============================================


def slow_gmpo(new, old, advantages, lengths, low, high):
    """-J and its gradient by the log-probs, float by float. Of the ratio, a geometric
    mean, by a log-prob: the ratio over the length, or 0 where the token is cut."""
    total, gradient = 0.0, np.zeros(tuple(new.shape))
    for i, length in enumerate(lengths):
        a, product, free = float(advantages[i, 0]), 1.0, []
        for t in range(length):
            r, sign = math.exp(float(new[i, t]) - float(old[i, t])), 1.0 if a > 0 else -1.0
            bounded = min(max(r ** sign, math.exp(-low if a > 0 else -high)),
                          math.exp(high if a > 0 else low))
            product *= min(r ** sign, bounded) ** sign
            free.append(r < math.exp(high) if a > 0 else r > math.exp(-low))
        ratio = product ** (1 / length)
        total -= ratio * a / len(lengths)
        gradient[i, :length] = [-ratio * a / length / len(lengths) * x for x in free]
    return total, gradient


@pytest.mark.parametrize("clip, spread", [(0.4, 0.5), ((0.2, 0.28), 0.3), ((0.35, 0.1), 0.3)])
def test_gmpo_is_that_of_the_paper(gmpo, clip, spread):
    """Loss and gradient; the padding is full of garbage, which must not matter."""
    gmpo.CLIP_RANGE = clip
    new, old, advantages, mask, lengths = answers(spread)
    loss = loss_of(gmpo, new, old, advantages, mask)
    gradient, = torch.autograd.grad(loss, new)
    expected, slope = slow_gmpo(new.detach(), old, advantages, lengths, *pair(clip))
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(gradient.numpy(), slope, rtol=1e-9, atol=1e-15)
    assert 0 < np.count_nonzero(slope) < mask.sum()  # some tokens are cut and some are not
    assert torch.autograd.gradcheck(lambda x: loss_of(gmpo, x, old, advantages, mask), new)


def test_gmpo_by_hand(gmpo):
    """Log-ratios 0.1, 0.5 and -0.5, range 0.4: of a good answer 0.5 is cut to 0.4, of a bad one
    -0.5 to -0.4; a cut token has no gradient, and the others share the answer's ratio."""
    old = torch.full((2, 3), -1.0, dtype=torch.float64)
    new = (old + torch.tensor([0.1, 0.5, -0.5], dtype=torch.float64)).requires_grad_()
    advantages = torch.tensor([[2.0], [-2.0]], dtype=torch.float64).expand(2, 3)
    loss, statistics = gmpo.policy_loss(new, old, advantages, torch.ones_like(old))
    good, bad = math.exp((0.1 + 0.4 - 0.5) / 3), math.exp((0.1 + 0.5 - 0.4) / 3)
    np.testing.assert_allclose(loss.detach().numpy(), [[-2 * good] * 3, [2 * bad] * 3], rtol=1e-12)
    gradient, = torch.autograd.grad((loss / 3).sum(), new)
    np.testing.assert_allclose(gradient.numpy(), [[-2 * good / 3, 0, -2 * good / 3],
                                                  [2 * bad / 3, 2 * bad / 3, 0]], rtol=1e-12)
    np.testing.assert_allclose(statistics["ratio/mean"].numpy(), [[good] * 3, [bad] * 3],
                               rtol=1e-12)
    cut = {side: statistics[f"clip_ratio/{side}_mean"].tolist()
           for side in ("low", "high", "region")}
    assert cut == {"low": [[0, 0, 0], [0, 0, 1]], "high": [[0, 1, 0], [0, 0, 0]],
                   "region": [[0, 1, 0], [0, 0, 1]]}
    assert not any(value.requires_grad for value in statistics.values())


def test_gmpo_stands_between_its_neighbours(gmpo):
    """Where nothing is cut it is GSPO with nothing cut; and by the inequality of the two means no
    larger than GRPO's, the arithmetic one."""
    gspo, grpo = fresh("gspo"), fresh("grpo")
    gmpo.CLIP_RANGE, gspo.CLIP_RANGE, grpo.CLIP_RANGE = 20.0, (1.0, 1e9), (1.0, 1e9)
    new, old, advantages, mask, _ = answers(0.3)
    ours, theirs = (loss_of(module, new, old, advantages, mask) for module in (gmpo, gspo))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(x, new)[0] for x in (ours, theirs)))
    for sign in (1.0, -1.0):
        size, arithmetic = (abs(loss_of(module, new, old, sign * advantages.abs(), mask).item())
                            for module in (gmpo, grpo))
        assert size < arithmetic


# ============================================= CISPO ============================================


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("clip", [(1.0, 0.2), (1.0, 4.0), (0.2, 0.2), 0.1])
def test_cispo_is_that_of_the_paper(cispo, clip, per_token):
    """Eq. 4 and 5: the gradient by a log-prob is -A times the clipped ratio over the number of all
    tokens, for every token; the value has the log-prob in it."""
    cispo.CLIP_RANGE = clip
    low, high = pair(clip)
    new, old, advantages, mask, lengths = answers(0.6, per_token)
    loss = loss_of(cispo, new, old, advantages, mask)
    gradient, = torch.autograd.grad(loss, new)
    total, slope, capped = 0.0, np.zeros((12, 7)), [0, 0]
    for i, length in enumerate(lengths):
        for t in range(length):
            r, a = math.exp(new[i, t].item() - old[i, t].item()), advantages[i, t].item()
            slope[i, t] = -min(max(r, 1 - low), 1 + high) * a / sum(lengths)
            total += slope[i, t] * new[i, t].item()
            capped[0] += r < 1 - low
            capped[1] += r > 1 + high
    assert loss.item() == pytest.approx(total, rel=1e-12)
    np.testing.assert_allclose(gradient.numpy(), slope, rtol=1e-9, atol=1e-15)
    assert np.count_nonzero(slope) == mask.sum()  # nothing is cut
    statistics = cispo.policy_loss(new, old, advantages, mask)[1]
    for side, count in (("low", capped[0]), ("high", capped[1]), ("region", sum(capped))):
        assert (statistics[f"clip_ratio/{side}_mean"] * mask).sum().item() == count
    assert capped[1] > 0 or high == 4.0
    assert (capped[0] > 0) == (low < 1)
    assert not any(value.requires_grad for value in statistics.values())


def test_where_grpo_cuts_cispo_caps(cispo, grpo):
    """Ratios 0.5, 1, 1.5 of a good and a bad answer, CISPO's weight at most 1.2. GRPO with 0.2 has
    no gradient at the good 1.5 and the bad 0.5, and 1.5 at the bad 1.5, which CISPO holds to 1.2.
    Elsewhere the two have the same gradient."""
    assert cispo.CLIP_RANGE == (1.0, 0.2) and grpo.CLIP_RANGE == 0.2  # as in the files
    ratios = torch.tensor([[0.5, 1.0, 1.5]] * 2, dtype=torch.float64)
    old = torch.full_like(ratios, -2.0)
    advantages = torch.tensor([[1.0], [-1.0]], dtype=torch.float64).expand(2, 3)
    for module, expected in ((cispo, [[-0.5, -1.0, -1.2], [0.5, 1.0, 1.2]]),
                             (grpo, [[-0.5, -1.0, 0.0], [0.0, 1.0, 1.5]])):
        new = (old + ratios.log()).requires_grad_()
        loss = module.policy_loss(new, old, advantages, torch.ones_like(old))[0]
        gradient, = torch.autograd.grad(loss.sum(), new)
        np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-12)


# ============================================== Both ============================================


@pytest.mark.parametrize("name", ["gmpo", "cispo"])
@pytest.mark.parametrize("shift", [1e4, -1e4])
@pytest.mark.parametrize("advantage", [0.0, 1.0, -1.0])
def test_huge_log_ratios(name, shift, advantage):
    """exp(1e4) is infinite, and inf x 0 not a number: loss and gradient stay finite."""
    module = fresh(name)
    old = torch.full((1, 2), -1.0)
    new = torch.tensor([[-1.0 + shift, -0.99]], requires_grad=True)
    ones = torch.ones(1, 2)
    loss, statistics = module.policy_loss(new, old, advantage * ones, ones)
    gradient, = torch.autograd.grad(loss.sum(), new)
    assert loss.isfinite().all() and gradient.isfinite().all()
    assert all(value.isfinite().all() for value in statistics.values())
    if name == "cispo":
        weight = 1.2 if shift > 0 else 0.0
        assert gradient[0].tolist() == pytest.approx([-advantage * weight,
                                                      -advantage * math.exp(0.01)], rel=1e-6)
    else:  # cut at 0.4, or at -0.4 if it is bad; if that became far too likely, kept finite
        mean = {(1e4, 1.0): 0.4, (-1e4, -1.0): -0.4, (1e4, -1.0): 20.0}.get((shift, advantage),
                                                                            -1e4)
        expected = -advantage * math.exp((mean + 0.01) / 2)
        assert loss[0].tolist() == pytest.approx([expected] * 2, rel=1e-5, abs=0)
        assert gradient[0, 0] == 0


@pytest.mark.parametrize("name", ["gmpo", "cispo"])
def test_empty_and_one_token_answers(name):
    """A row without any token adds nothing, and no NaN; one token has its plain ratio."""
    module = fresh(name)
    module.CLIP_RANGE = 0.5
    mask = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    old = torch.tensor([[-1.0, -1.0], [-2.0, -7.0], [-1.0, -3.0]], dtype=torch.float64)
    change = torch.tensor([[5.0, 5.0], [0.2, 5.0], [0.1, 0.3]], dtype=torch.float64)
    new = (old + change).requires_grad_()
    advantages = torch.tensor([[1.0], [2.0], [-1.0]], dtype=torch.float64).expand(3, 2)
    gradient, = torch.autograd.grad(loss_of(module, new, old, advantages, mask), new)
    both = math.exp(0.2) / 6
    expected = {"gmpo": [0, 0, -2 * math.exp(0.2) / 3, 0, both, both],
                "cispo": [0, 0, -2 * math.exp(0.2) / 3, 0, math.exp(0.1) / 3, math.exp(0.3) / 3]}
    assert gradient.flatten().tolist() == pytest.approx(expected[name], rel=1e-12, abs=0)
    nothing = torch.zeros(2, 2, dtype=torch.float64)
    assert torch.equal(module.token_weights(nothing), nothing)


@pytest.mark.parametrize("name", ["gmpo", "cispo"])
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_train_minimises_the_stated_loss(name, monkeypatch, kl_coef):
    """Sum of the policy term, the KL and the entropy bonus, whatever the micro-batch, on a policy
    that has moved from the sampling one."""
    for micro in (1, 2, 6):
        module = fresh(name)
        state = train(module, monkeypatch, micro, KL_COEF=kl_coef, STD_CORRECTION=1)
        batch, mask = state.batch, state.batch.completion_mask
        logps, entropy = module.score_tokens(state.policy, batch)
        pairs = np.array(SCORES).reshape(3, 2)
        z = (pairs - pairs.mean(1, keepdims=True)) / (pairs.std(1, ddof=1, keepdims=True) + 1e-6)
        advantages = torch.tensor(z.flatten())[:, None].float().expand(6, 5)
        r = torch.exp(logps - batch.sampled_logps)
        if name == "gmpo":
            weights = mask / mask.sum(1, keepdim=True) / 6
            change = torch.where(advantages > 0, (logps - batch.sampled_logps).clamp(max=0.4),
                                 (logps - batch.sampled_logps).clamp(min=-0.4)) * mask
            term = -advantages * torch.exp(change.sum(1, keepdim=True) / mask.sum(1, keepdim=True))
        else:
            weights = mask / sum(LENGTHS)
            term = -advantages * r.clamp(max=1.2).detach() * logps
        kl = 1 - r * (1 + batch.ref_logps - logps)
        total = ((term + kl_coef * kl - 0.07 * entropy) * weights).sum()
        step, = state.steps
        expected = vector(torch.autograd.grad(total, list(state.policy.parameters())))
        torch.testing.assert_close(step.gradient, expected, rtol=1e-3, atol=1e-6)
        metrics = state.metrics[0]
        assert metrics["loss"] == pytest.approx(total.item(), rel=1e-4)
        assert metrics["policy_loss"] == pytest.approx((term * weights).sum().item(), rel=1e-4)
        assert metrics["clip_ratio/region_mean"] > 0 and ("kl" in metrics) == (kl_coef > 0)


# ====================================== Constants of grpo.py ====================================


def slow_divisor(kind, rewards, size):
    """What R - mean of each group is divided by, as numbers of the first definition."""
    groups = np.array(rewards).reshape(-1, size)
    centred = groups - groups.mean(1, keepdims=True)
    return {"normalized": groups.std(1, ddof=1, keepdims=True),
            "relative": np.ones((len(groups), 1)),
            "batch-std": np.full((len(groups), 1), groups.flatten().std(ddof=1)),
            "reinforce++": np.full((len(groups), 1), centred.flatten().std(ddof=1)),
            "maxrl": groups.mean(1, keepdims=True)}[kind]


@pytest.mark.parametrize("kind", ["normalized", "relative", "batch-std", "reinforce++", "maxrl"])
def test_what_grpo_divides_by(grpo, kind):
    """R - mean over the group's std; over the rewards' of the rollout; over that of all R - mean;
    over the mean. Groups of different means and spread, one of them without any."""
    grpo.GROUP_SIZE, grpo.ADVANTAGE_TYPE, grpo.ADVANTAGE_EPSILON = 4, kind, 1e-3
    rewards = torch.rand(16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rewards[:4] += 2.0
    rewards[4:8] = 0.7
    rewards[8:12] *= 0.1
    groups = rewards.view(4, 4).numpy()
    expected = groups - groups.mean(1, keepdims=True)
    if kind != "relative":
        expected = expected / (slow_divisor(kind, rewards.tolist(), 4) + 1e-3)
    expected[1] = 0.0
    found = grpo.compute_advantages(rewards)
    np.testing.assert_allclose(found.view(4, 4).numpy(), expected, rtol=1e-10, atol=1e-14)
    sentences = torch.stack([rewards, 3 * rewards + 1], 1)  # each by itself
    both = grpo.compute_advantages(sentences)
    torch.testing.assert_close(both[:, 0], found, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(both[:, 1], grpo.compute_advantages(3 * rewards + 1), rtol=1e-10,
                               atol=1e-14)


def test_divisors_by_hand(grpo):
    """Groups of two with the rewards 1, 0; 1, 1; 1, 0: the variance of all six is 4/15, that of
    R - mean = 1/2, -1/2, 0, 0, 1/2, -1/2 is 1/5. MaxRL: the means are 1/2, 1, 1/2."""
    grpo.GROUP_SIZE, grpo.ADVANTAGE_EPSILON = 2, 0.0
    rewards = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 0.0])
    for grpo.ADVANTAGE_TYPE, size in (("normalized", math.sqrt(0.5)), ("relative", 0.5),
                                      ("batch-std", 0.5 / math.sqrt(4 / 15)),
                                      ("reinforce++", 0.5 / math.sqrt(1 / 5)), ("maxrl", 1.0)):
        found = grpo.compute_advantages(rewards).tolist()
        assert found == pytest.approx([size, -size, 0, 0, size, -size], rel=1e-6)


def test_maxrl_is_the_gradient_of_the_log_of_the_pass_rate(grpo):
    """For rewards of 0 and 1, a right answer with chance p: log p = -sum over k of (1 - p)^k / k,
    and MaxRL's mean gradient is that of the first G - 1 terms, (1 - (1 - p)^(G - 1)) / p. (Of G, if
    a group without any right answer got -1 at all its answers; here, without spread, it gets 0.)"""
    grpo.ADVANTAGE_TYPE, grpo.ADVANTAGE_EPSILON, grpo.GROUP_SIZE = "maxrl", 0.0, 3
    for p in (0.2, 0.6):
        slope = 0.0  # the mean over all groups of A d/dp log chance(answer)
        for group in itertools.product((0.0, 1.0), repeat=3):
            chance = math.prod(p if right else 1 - p for right in group)
            advantages = grpo.compute_advantages(torch.tensor(group, dtype=torch.float64))
            slopes = torch.tensor([1 / p if right else -1 / (1 - p) for right in group])
            slope += chance * (advantages * slopes).mean().item()
        assert slope == pytest.approx((1 - (1 - p) ** 2) / p, rel=1e-6)


def test_reinforce_plus_plus_without_its_baseline_is_a_constant_too(grpo):
    """(R - mean) / std over the rollout, whatever the groups."""
    grpo.USE_GROUP_NORMALIZATION, grpo.GROUP_SIZE = False, 2
    rewards = torch.rand(8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    expected = (rewards - rewards.mean()) / (rewards.std() + grpo.ADVANTAGE_EPSILON)
    torch.testing.assert_close(grpo.compute_advantages(rewards), expected)


def test_a_range_that_cuts_nothing(grpo):
    """CLIP_RANGE=(1.0, 1e9), which the rules allow: the plain ratio times the advantage, and its
    gradient, at ratios from 1/400 to 400, and none is counted as cut."""
    grpo.configure(["PROFILE=embedded", "DEVICE=cpu", "CLIP_RANGE=(1.0, 1e9)"])
    new, old, advantages, mask, _ = answers(2.0)
    loss, statistics = grpo.policy_loss(new, old, advantages, mask)
    real = mask.bool()
    plain = -torch.exp(new - old)[real] * advantages[real]
    torch.testing.assert_close(loss[real], plain)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), new)[0] for x in (loss[real], plain)))
    assert not statistics["clip_ratio/region_mean"][real].any()


def test_batch_std_is_that_of_trl(grpo):
    """TRL's scale_rewards="batch", whose epsilon is 1e-4: the formula of its trainer, in which the
    std is of all rewards, by n - 1, and the mean the group's."""
    utils = pytest.importorskip("trl.trainer.utils")
    grpo.GROUP_SIZE, grpo.ADVANTAGE_TYPE, grpo.ADVANTAGE_EPSILON = 4, "batch-std", 1e-4
    rewards = torch.rand(12, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    centred = rewards - rewards.view(-1, 4).mean(1).repeat_interleave(4)
    torch.testing.assert_close(grpo.compute_advantages(rewards),
                               centred / (utils.nanstd(rewards) + 1e-4))


# ======================================= The same by TRL ========================================


def trl_gmpo_loss(new, old, advantages, mask, clip):
    """The loss of TRL's GMPOTrainer, and what it logs; its forward pass is replaced by numbers."""
    trainer_class = pytest.importorskip("trl.experimental.gmpo").GMPOTrainer
    low, high = pair(clip)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **b: (new, torch.zeros_like(new), None),
        epsilon_low=low, epsilon_high=high, beta=0.0, current_gradient_accumulation_steps=1,
        top_entropy_quantile=1.0, model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x),
        _metrics={"train": defaultdict(list)})
    ids, prompt = torch.zeros(mask.shape).long(), torch.ones(len(mask), 1).long()
    loss = trainer_class._compute_loss(trainer, None, {
        "prompt_ids": prompt, "prompt_mask": prompt, "completion_ids": ids,
        "completion_mask": mask, "advantages": advantages, "old_per_token_logps": old})
    return loss, {name: values[0] for name, values in trainer._metrics["train"].items()}


def test_gmpo_is_that_of_trl(gmpo):
    """With the shipped range, 0.4."""
    new, old, advantages, mask, _ = answers(0.5)
    theirs, logged = trl_gmpo_loss(new, old, advantages[:, 0], mask, gmpo.CLIP_RANGE)
    ours = loss_of(gmpo, new, old, advantages, mask)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12) and abs(ours.item()) > 1e-3
    found, expected = (torch.autograd.grad(loss, new)[0] for loss in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
    statistics = gmpo.policy_loss(new, old, advantages, mask)[1]
    for side in ("low", "high", "region"):
        share = (statistics[f"clip_ratio/{side}_mean"] * mask).sum().item() / mask.sum().item()
        assert share == pytest.approx(logged[f"clip_ratio/{side}_mean"]) and share > 0


@pytest.mark.parametrize("cap", [1.2, 5.0])
def test_cispo_is_that_of_trl(cispo, cap):
    """TRL's epsilon_high is the cap itself, ours what is above 1; it counts the capped tokens of
    good answers only."""
    cispo.CLIP_RANGE = (1.0, cap - 1)
    new, old, advantages, mask, _ = answers(1.0)
    theirs, logged = trl_loss("cispo", new, old, advantages[:, 0], mask, (0.0, cap), 11)
    ours = loss_of(cispo, new, old, advantages, mask)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12) and abs(ours.item()) > 1e-3
    found, expected = (torch.autograd.grad(loss, new)[0] for loss in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
    capped = cispo.policy_loss(new, old, advantages, mask)[1]["clip_ratio/high_mean"]
    share = (capped * (advantages > 0) * mask).sum().item() / mask.sum().item()
    assert share == pytest.approx(logged["cispo_clip_ratio"]) and share > 0


def test_reinforce_is_rloo_of_trl_on_the_sampling_policy(reinforce):
    """TRL's RLOO has a ratio of whole answers, exp of the *sum*, and clips it: at the sampling
    policy its gradient is REINFORCE's, without the constant MAX_NEW_TOKENS."""
    trainer_class = pytest.importorskip("trl").RLOOTrainer
    reinforce.MAX_NEW_TOKENS = 11
    _, old, advantages, mask, _ = answers(0.0)
    new = old.clone().requires_grad_()
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **b: (new, torch.zeros_like(new), None),
        epsilon_low=0.2, epsilon_high=0.2, aux_loss_enabled=False,
        model=SimpleNamespace(training=True), _metrics={"train": defaultdict(list)},
        accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x))
    ids, prompt = torch.zeros(mask.shape).long(), torch.ones(len(mask), 1).long()
    theirs = trainer_class._compute_loss(trainer, None, {
        "prompt_ids": prompt, "prompt_mask": prompt, "completion_ids": ids,
        "completion_mask": mask, "advantages": advantages[:, 0],
        "old_logps": (old * mask).sum(1)})
    ours = (reinforce.policy_loss(new, advantages) * reinforce.token_weights(mask)).sum()
    found, expected = (torch.autograd.grad(loss, new)[0] for loss in (ours, theirs))
    torch.testing.assert_close(found, expected / 11, rtol=1e-12, atol=1e-15)
    assert expected.norm() > 1e-3


# =========================================== Doctests ===========================================


@pytest.mark.parametrize("name, functions", [
    ("reinforce", ["compute_advantages", "policy_loss", "token_weights"]),
    ("gmpo", ["compute_advantages", "policy_loss", "token_weights", "adapt_kl_coef"]),
    ("cispo", ["compute_advantages", "policy_loss", "token_weights", "adapt_kl_coef"])])
def test_docstring_examples(name, functions):
    """The worked examples of the docstrings, with the constants as in the file."""
    module = fresh(name)
    assert doctest.testmod(module).failed == 0
    examples = {test.name.split(".")[-1] for test in doctest.DocTestFinder().find(module)
                if test.examples}
    assert set(functions) <= examples


# ============================ Known bugs, which these tests must catch ===========================

MUTATIONS = {  # name: (script, text, what takes its place, test, its parameters)
    "the rollout's std is that of a group": (
        "grpo", '"batch-std": spread(groups, (0, 1))', '"batch-std": spread(groups, 1)',
        test_divisors_by_hand, {}),
    "the two stds of the rollout are mixed up": (
        "grpo", '"reinforce++": spread(advantages,', '"reinforce++": spread(groups,',
        test_divisors_by_hand, {}),
    "sentences share a std": (
        "grpo", '"reinforce++": spread(advantages, (0, 1))', '"reinforce++": advantages.std()',
        test_what_grpo_divides_by, {"kind": "reinforce++"}),
    "MaxRL divides by the std": (
        "grpo", '"maxrl": mean}', '"maxrl": spread(groups, 1)}',
        test_maxrl_is_the_gradient_of_the_log_of_the_pass_rate, {}),
    "the baseline is added": (
        "reinforce", "(groups - baseline)", "(groups + baseline)",
        test_baselines_by_hand, {}),
    "the others' mean has the answer in it": (
        "reinforce", "(total - groups) / (GROUP_SIZE - 1)", "total / (GROUP_SIZE - 1)",
        test_the_mean_gradient_is_that_of_the_expected_reward,
        {"baseline": "leave-one-out", "factor": 1.0}),
    "the others' mean is divided by all": (
        "reinforce", "(total - groups) / (GROUP_SIZE - 1)", "(total - groups) / GROUP_SIZE",
        test_baselines_by_hand, {}),
    "bad answers are made likelier": (
        "reinforce", "return -advantages * logps", "return advantages * logps",
        test_the_mean_gradient_is_that_of_the_expected_reward,
        {"baseline": "none", "factor": 1.0}),
    "the log-prob of an answer is the mean of its tokens'": (
        "reinforce", 'mean = AGGREGATION == "seq-mean-token-mean"', "mean = True",
        test_the_mean_gradient_is_that_of_the_expected_reward,
        {"baseline": "none", "factor": 1.0}),
    "each micro-batch has weights of its own": (
        "reinforce", "(token_loss * micro.weights).sum().backward()",
        "(token_loss * token_weights(micro.completion_mask)).sum().backward()",
        test_train_makes_one_step_of_the_policy_gradient,
        {"micro": 2, "baseline": "mean", "aggregation": "seq-mean-token-mean"}),
    "a token is cut whatever the sign": (
        "gmpo", "torch.where(advantages > 0, log_ratio.clamp(max=high), log_ratio.clamp(min=-low))",
        "log_ratio.clamp(-low, high)", test_gmpo_by_hand, {}),
    "the wrong side is cut": (
        "gmpo", "torch.where(advantages > 0,", "torch.where(advantages < 0,",
        test_gmpo_by_hand, {}),
    "the answer is cut, not the token": (
        "gmpo", "ratio = torch.exp(cut.sum(1, keepdim=True) / length)",
        "ratio = torch.exp((log_ratio.sum(1, keepdim=True) / length).clamp(-low, high))",
        test_gmpo_by_hand, {}),
    "the product is without its root": (
        "gmpo", "cut.sum(1, keepdim=True) / length)", "cut.sum(1, keepdim=True))",
        test_gmpo_by_hand, {}),
    "the arithmetic mean of the cut ratios": (
        "gmpo", "torch.exp(cut.sum(1, keepdim=True) / length)",
        "((cut.exp() * mask).sum(1, keepdim=True) / length)", test_gmpo_by_hand, {}),
    "padding counts in the geometric mean": (
        "gmpo", "log_ratio = ((logps - old_logps) * mask)", "log_ratio = (logps - old_logps)",
        test_gmpo_is_that_of_the_paper, {"clip": 0.4, "spread": 0.5}),
    "the range is of ratios": (
        "gmpo", "1 - math.exp(-low), math.exp(high) - 1", "low, high", test_gmpo_by_hand, {}),
    "the weight carries gradient": (
        "cispo", "* mask).detach().clamp(", "* mask).clamp(",
        test_where_grpo_cuts_cispo_caps, {}),
    "a capped token is dropped": (
        "cispo", "-ratio.clamp(1 - low, 1 + high) * advantages * logps",
        "-ratio * (ratio <= 1 + high) * advantages * logps",
        test_cispo_is_that_of_the_paper, {"clip": (1.0, 0.2), "per_token": False}),
    "the cap is high itself": (
        "cispo", "-ratio.clamp(1 - low, 1 + high)", "-ratio.clamp(1 - low, high)",
        test_cispo_is_that_of_trl, {"cap": 5.0}),
    "the probability in place of its log": (
        "cispo", "* advantages * logps", "* advantages * torch.exp(logps)",
        test_cispo_is_that_of_the_paper, {"clip": (1.0, 0.2), "per_token": False}),
    "the mean is over answers": (
        "cispo", "return mask / max(count, 1.0)",
        "return mask / mask.sum(1, keepdim=True).clamp(min=1) / len(mask)",
        test_cispo_is_that_of_the_paper, {"clip": (1.0, 0.2), "per_token": False}),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_caught(name, tmp_path, monkeypatch):
    """In a copy of the script, in which the text stands exactly once; and it is an assertion of the
    test that fails, not the script that crashes."""
    script, text, instead, test, parameters = MUTATIONS[name]
    copied = mutated_copy(SCRIPTS[script], text, instead, tmp_path)
    available = {"grpo": fresh("grpo"), "monkeypatch": monkeypatch, **parameters,
                 script: fresh(script, copied)}
    must_fail(test, available)
