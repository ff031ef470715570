"""The mathematics of gspo.py: advantages, loss, KL, entropy, and how `train` puts them together.

Each is compared with numbers worked out by hand, with a slow loop over python floats that is
written from the paper's equations, or with an expectation enumerated exactly.
"""

import doctest
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

# ========================================== Advantages ==========================================


def slow_advantages(rewards, group, kind, correction, epsilon):
    """Eq. 6 for rewards of the shape (B,) or (B, K): each sentence against the others' same one."""
    rewards = np.asarray(rewards, dtype=np.float64).reshape(len(rewards), -1)
    result = np.zeros_like(rewards)
    for start, k in np.ndindex(rewards.shape):
        if start % group == 0:
            scores = rewards[start:start + group, k].tolist()
            centre, std = sum(scores) / group, float(np.std(scores, ddof=correction))
            divisor = std + epsilon if kind == "normalized" else 1.0
            result[start:start + group, k] = [(x - centre) / divisor for x in scores]
    return result


@pytest.mark.parametrize("sentences", [(), (3,)])
@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("per_group", [True, False])
@pytest.mark.parametrize("kind", ["relative", "normalized"])
def test_advantages_are_those_of_the_equation(gspo, kind, per_group, correction, sentences):
    gspo.ADVANTAGE_TYPE, gspo.USE_GROUP_NORMALIZATION = kind, per_group
    gspo.STD_CORRECTION, gspo.GROUP_SIZE, gspo.ADVANTAGE_EPSILON = correction, 4, 1e-3
    generator = torch.Generator().manual_seed(1)
    rewards = torch.randn(12, *sentences, generator=generator, dtype=torch.float64)
    rewards[:4] += 5.0  # groups of different means: group and rollout statistics differ
    rewards[8:] *= 3.0  # and of different spread
    if sentences:
        rewards[..., 1] += 7.0  # so have the sentences
    expected = slow_advantages(rewards, 4 if per_group else 12, kind, correction, 1e-3)
    advantages = gspo.compute_advantages(rewards)
    assert advantages.shape == rewards.shape
    np.testing.assert_allclose(advantages.reshape(12, -1).numpy(), expected, rtol=1e-10,
                               atol=1e-12)


def test_advantages_by_hand(gspo):
    """The tutorial's example: 95, 70, 85, 80 have the mean 82.5 and the variance 325 / 3."""
    gspo.GROUP_SIZE = 4
    rewards = torch.tensor([[95.0], [70.0], [85.0], [80.0]])
    assert gspo.compute_advantages(rewards)[:, 0].tolist() == [12.5, -12.5, 2.5, -2.5]
    gspo.ADVANTAGE_TYPE = "normalized"
    expected = [x / math.sqrt(325 / 3) for x in (12.5, -12.5, 2.5, -2.5)]
    assert gspo.compute_advantages(rewards)[:, 0].tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["relative", "normalized"])
@pytest.mark.parametrize("per_group", [True, False])
def test_equal_scores_get_advantages_of_exactly_zero(gspo, kind, per_group):
    """Also where float32's mean of equal scores is not their value: divided by a std that is only
    rounding, and by an epsilon of 1e-8, such scores would get advantages of any size."""
    gspo.ADVANTAGE_TYPE, gspo.USE_GROUP_NORMALIZATION = kind, per_group
    gspo.ADVANTAGE_EPSILON = 1e-8
    rounded = 0
    for group in (2, 3, 5, 6, 7, 8, 12):
        gspo.GROUP_SIZE = group
        for score in (0.0, 0.1, 1 / 3, 0.7, -0.3, 1.1, 9999.9, 12345.678, -1e6 / 7):
            rewards = score * torch.ones(2 * group, 1)
            rounded += bool((rewards - rewards.mean() != 0).any())
            assert torch.equal(gspo.compute_advantages(rewards), torch.zeros(2 * group, 1))
    assert rounded > 5  # the trap is in the data: the naive formula has something to divide


def test_scores_equal_up_to_float_noise_get_zero(gspo):
    """Scores that differ in their last bits only: a sum of parts, added in another order."""
    gspo.GROUP_SIZE, gspo.ADVANTAGE_TYPE, gspo.ADVANTAGE_EPSILON = 8, "normalized", 1e-8
    for score in (0.1, 0.7, 1e4):
        rewards = torch.full((8, 1), score)
        rewards[3:6] = torch.nextafter(rewards[3:6], torch.tensor(2e4))
        assert rewards.unique().numel() == 2
        assert torch.equal(gspo.compute_advantages(rewards), torch.zeros(8, 1))


def test_a_small_real_spread_is_kept(gspo):
    """A reward model may well score a group within 1e-4: a signal, which Eq. 6 enlarges."""
    gspo.GROUP_SIZE, gspo.ADVANTAGE_TYPE, gspo.ADVANTAGE_EPSILON = 4, "normalized", 1e-8
    for score, spread in ((0.5, 1e-4), (0.5, 1e-5), (100.0, 1e-2)):
        rewards = torch.tensor([[score], [score + spread], [score], [score + spread]])
        std = math.sqrt(4 * 0.25 / 3)  # of 0, 1, 0, 1
        expected = torch.tensor([[-0.5], [0.5], [-0.5], [0.5]]) / std
        torch.testing.assert_close(gspo.compute_advantages(rewards), expected, rtol=2e-3, atol=0)
    gspo.ADVANTAGE_TYPE = "relative"
    assert gspo.compute_advantages(rewards).abs().min() > 4e-3


def test_a_group_without_spread_leaves_its_neighbours_alone(gspo):
    gspo.GROUP_SIZE = 4
    gspo.ADVANTAGE_TYPE = "normalized"
    live = torch.tensor([[0.2], [0.9], [0.5], [0.1]])
    both = gspo.compute_advantages(torch.cat([torch.full((4, 1), 0.3), live]))
    assert torch.equal(both[:4], torch.zeros(4, 1))
    assert torch.equal(both[4:], gspo.compute_advantages(live))
    assert both[4:].abs().min() > 0.1  # the mean is 0.425: no advantage is 0 by chance


def test_smallest_group(gspo):
    """G = 2: the advantages are +-d/2, normalized +-1/sqrt(2)."""
    gspo.GROUP_SIZE = 2
    rewards = torch.tensor([1.0, 0.0])
    assert gspo.compute_advantages(rewards).tolist() == [0.5, -0.5]
    gspo.ADVANTAGE_TYPE, gspo.ADVANTAGE_EPSILON = "normalized", 0.0
    expected = [math.sqrt(0.5), -math.sqrt(0.5)]
    assert gspo.compute_advantages(rewards).tolist() == pytest.approx(expected, rel=1e-6)


# ============================================= Loss =============================================


def slow_ratio(new, old):
    """Eq. 7 for one answer: lists of log-probs to a float."""
    return math.exp(sum(n - o for n, o in zip(new, old)) / len(new))


def slow_loss(gspo, new, old, advantages, lengths, token_level):
    """-J of Eq. 5 (or of Eq. 13 and 14) and its gradient by the log-probs, float by float.

    Derivatives by hand: of s_i by each of its |y_i| log-probs s_i / |y_i|; of Eq. 14's
    sg[s_i] pi / sg[pi] by its own log-prob s_i; of a cut term 0.
    """
    low, high = gspo.clip_range()
    total, gradient = 0.0, np.zeros(tuple(new.shape))
    for i, length in enumerate(lengths):
        s = slow_ratio(new[i, :length].tolist(), old[i, :length].tolist())
        for t in range(length):
            a = float(advantages[i, t])
            total += min(s * a, min(max(s, 1 - low), 1 + high) * a) / length / len(lengths)
            cut = s > 1 + high if a > 0 else s < 1 - low
            slope = 0.0 if cut else s * a / length / len(lengths)
            if token_level:
                gradient[i, t] += slope
            else:  # every log-prob of the answer moves this token's term by the same amount
                gradient[i, :length] += slope / length
    return -total, -gradient


def answers(spread, per_token=False, dtype=torch.float64, seed=6):
    """Random log-probs of 12 answers of 1 to 7 tokens, with ratios around 1 +- spread."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)
    lengths = [1, 7, 3, 5, 2, 7, 6, 1, 4, 3, 7, 2]
    mask = torch.tensor([[t < n for t in range(7)] for n in lengths]).to(dtype)
    old = -normal(12, 7).abs() - 0.1
    new = old + spread * normal(12, 1) + spread * normal(12, 7)
    advantages = normal(12, 7) if per_token else normal(12, 1).expand(12, 7)
    # What stands in the padding must not matter: here it is large, and not the same in both.
    new, old = new + 3.0 * (1 - mask), old - 2.0 * (1 - mask)
    return (new.to(dtype).requires_grad_(), old.to(dtype), advantages.to(dtype).contiguous(), mask,
            lengths)


def loss_of(gspo, new, old, advantages, mask):
    """The scalar that `train` makes of policy_loss's token losses."""
    return (gspo.policy_loss(new, old, advantages, mask)[0] * gspo.token_weights(mask)).sum()


CLIPS = [((3e-4, 4e-4), 4e-4), ((0.2, 0.28), 0.3), (0.05, 0.1)]  # each with a spread that fits it


@pytest.mark.parametrize("token_level", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("clip, spread", CLIPS)
def test_loss_and_gradient_are_those_of_the_paper(gspo, clip, spread, per_token, token_level):
    gspo.CLIP_RANGE, gspo.USE_TOKEN_LEVEL_LOSS = clip, token_level
    new, old, advantages, mask, lengths = answers(spread, per_token)
    loss = loss_of(gspo, new, old, advantages, mask)
    gradient, = torch.autograd.grad(loss, new)
    expected, slope = slow_loss(gspo, new, old, advantages, lengths, token_level)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(gradient.numpy(), slope, rtol=1e-9, atol=1e-15)
    assert 0 < np.count_nonzero(slope) < mask.sum()  # some tokens are cut and some are not


@pytest.mark.parametrize("token_level", [False, True])
def test_gradient_by_finite_differences(gspo, token_level):
    """With one advantage an answer GSPO-token's stop-gradients cancel: its gradient is that of the
    value, as finite differences see it."""
    gspo.CLIP_RANGE, gspo.USE_TOKEN_LEVEL_LOSS = (0.2, 0.28), token_level
    new, old, advantages, mask, _ = answers(0.3)
    assert torch.autograd.gradcheck(lambda x: loss_of(gspo, x, old, advantages, mask), new)


def test_float32_is_exact_to_a_thousandth_of_the_clip_range(gspo):
    """What training computes in: at log-probs around -10 rounding must stay far below 3e-4."""
    for token_level in (False, True):
        gspo.USE_TOKEN_LEVEL_LOSS = token_level
        new, old, advantages, mask, lengths = answers(2e-4, dtype=torch.float32)
        new, old = new.detach() - 9.0, old - 9.0
        ratio = gspo.policy_loss(new, old, advantages, mask)[1]["ratio/mean"]
        for i, length in enumerate(lengths):
            expected = slow_ratio(new[i, :length].tolist(), old[i, :length].tolist())
            assert ratio[i, :length].tolist() == pytest.approx([expected] * length, abs=3e-7)


def test_ratio_by_hand(gspo):
    """Eq. 7: the log-ratios 0.3, -0.1, 0.4 have the mean 0.2, whatever stands in the padding."""
    old = torch.tensor([[-1.0, -2.0, -3.0, -9.0]], dtype=torch.float64)
    new = old + torch.tensor([[0.3, -0.1, 0.4, 50.0]], dtype=torch.float64)
    mask = torch.tensor([[1.0, 1.0, 1.0, 0.0]], dtype=torch.float64)
    for gspo.USE_TOKEN_LEVEL_LOSS in (False, True):
        ratio = gspo.policy_loss(new, old, torch.ones_like(new), mask)[1]["ratio/mean"]
        assert ratio[0, :3].tolist() == pytest.approx([math.exp(0.2)] * 3, rel=1e-12)


def test_ratio_does_not_grow_with_length(gspo):
    """The same change at every token gives the same ratio, be the answer long or short: the sum of
    the log-ratios in place of their mean would give exp(0.1), exp(1) and exp(10)."""
    for length in (1, 10, 100):
        old = torch.full((1, length), -2.0, dtype=torch.float64)
        _, statistics = gspo.policy_loss(old + 0.1, old, torch.ones_like(old), torch.ones_like(old))
        torch.testing.assert_close(statistics["ratio/mean"], torch.full_like(old, math.exp(0.1)))


@pytest.mark.parametrize("token_level", [False, True])
def test_only_the_harmful_side_is_cut(gspo, token_level):
    """An answer far above the range is cut if it is good, far below if it is bad; on the other side
    the gradient is what brings it back, and must be there."""
    gspo.CLIP_RANGE, gspo.USE_TOKEN_LEVEL_LOSS = (0.1, 0.2), token_level
    for shift, advantage, cut in ((0.5, 1.0, True), (0.5, -1.0, False),
                                  (-0.5, 1.0, False), (-0.5, -1.0, True),
                                  (0.05, 1.0, False), (-0.05, -1.0, False)):
        old = torch.full((1, 4), -1.0, dtype=torch.float64)
        new = (old + shift).requires_grad_()
        ones = torch.ones_like(old)
        loss = loss_of(gspo, new, old, advantage * ones, ones)
        gradient, = torch.autograd.grad(loss, new)
        bound = 1.2 if shift > 0 else 0.9
        value = -advantage * (bound if cut else math.exp(shift))
        slope = 0.0 if cut else -advantage * math.exp(shift) / 4
        assert loss.item() == pytest.approx(value, rel=1e-12)
        assert gradient[0].tolist() == pytest.approx([slope] * 4, rel=1e-12, abs=0)
        statistics = gspo.policy_loss(new, old, advantage * ones, ones)[1]
        assert statistics["clip_ratio/region_mean"].unique().tolist() == [float(cut)]


def test_the_clip_range_may_be_asymmetric(gspo):
    """(low, high): a ratio of 0.85 is outside of (0.1, 0.2) and inside of (0.2, 0.1); 1.15 the
    other way round. One number is both."""
    old = torch.full((2, 2), -1.0, dtype=torch.float64)
    new = old + torch.tensor([[0.85], [1.15]], dtype=torch.float64).log()
    advantages = torch.tensor([[-1.0, -1.0], [1.0, 1.0]], dtype=torch.float64)
    for clip, expected in (((0.1, 0.2), [0.9, -1.15]), ((0.2, 0.1), [0.85, -1.1]),
                           (0.1, [0.9, -1.1]), (0.2, [0.85, -1.15])):
        gspo.CLIP_RANGE = clip
        loss = gspo.policy_loss(new, old, advantages, torch.ones_like(old))[0]
        assert loss[:, 0].tolist() == pytest.approx(expected, rel=1e-12)


def test_gspo_token_is_gspo_where_an_answer_has_one_advantage(gspo):
    """Sec. 4.3: value and gradient are the same; with advantages per token the gradient is not."""
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-6)):
        for per_token in (False, True):
            new, old, advantages, mask, _ = answers(4e-4, per_token, dtype)
            results = []
            for gspo.USE_TOKEN_LEVEL_LOSS in (False, True):
                loss = loss_of(gspo, new, old, advantages, mask)
                results.append((loss.detach(), *torch.autograd.grad(loss, new)))
            (loss, gradient), (token_loss, token_gradient) = results
            torch.testing.assert_close(token_loss, loss, rtol=tolerance, atol=0)
            apart = (token_gradient - gradient).norm() / gradient.norm()
            assert apart > 0.1 if per_token else apart < tolerance


def test_gspo_token_has_the_very_ratio_of_gspo(gspo):
    """To the last bit, also for improbable tokens: at the edge of the range all of an answer's
    tokens are on the same side, and clip fractions do not depend on the form."""
    generator = torch.Generator().manual_seed(0)
    new = -40.0 * torch.rand(50, 9, generator=generator) - 1.0
    old = new - 3e-4 * torch.randn(50, 9, generator=generator)
    ratios = []
    for gspo.USE_TOKEN_LEVEL_LOSS in (False, True):
        ones = torch.ones_like(new)
        ratios.append(gspo.policy_loss(new, old, ones, ones)[1]["ratio/mean"])
    assert torch.equal(*ratios)


def test_clip_fractions_count_what_is_cut(gspo):
    """Above with A > 0 or below with A < 0, and nothing else; low + high = region."""
    gspo.CLIP_RANGE = (3e-4, 4e-4)
    for per_token in (False, True):
        new, old, advantages, mask, lengths = answers(5e-4, per_token)
        advantages[9] = 0.0  # far above the range, but no gradient to cut
        _, statistics = gspo.policy_loss(new, old, advantages, mask)
        outside = 0
        for i, length in enumerate(lengths):
            s = slow_ratio(new[i, :length].tolist(), old[i, :length].tolist())
            outside += (s < 1 - 3e-4 or s > 1 + 4e-4) * length
            for t in range(length):
                a = float(advantages[i, t])
                low, high = float(s < 1 - 3e-4 and a < 0), float(s > 1 + 4e-4 and a > 0)
                found = {name: float(value[i, t]) for name, value in statistics.items()}
                assert found == {"ratio/mean": pytest.approx(s), "clip_ratio/low_mean": low,
                                 "clip_ratio/high_mean": high, "clip_ratio/region_mean": low + high}
        low, high, region = (float((statistics[f"clip_ratio/{name}_mean"] * mask).sum())
                             for name in ("low", "high", "region"))
        assert low > 0 and high > 0 and low + high == region < outside
        assert not any(value.requires_grad for value in statistics.values())


def test_at_the_first_step_the_gradient_is_the_policy_gradient(gspo):
    """Where new = old every ratio is 1, nothing is cut, and the gradient is -A / |y| / B."""
    _, old, advantages, mask, _ = answers(0.0)
    for gspo.USE_TOKEN_LEVEL_LOSS in (False, True):
        new = old.clone().requires_grad_()
        loss = loss_of(gspo, new, old, advantages, mask)
        gradient, = torch.autograd.grad(loss, new)
        torch.testing.assert_close(gradient, -advantages * mask / mask.sum(1, keepdim=True) / 12)
        assert loss.item() == pytest.approx(-advantages[:, 0].mean().item())


@pytest.mark.parametrize("token_level", [False, True])
@pytest.mark.parametrize("shift", [1e4, -1e4])
@pytest.mark.parametrize("advantage", [0.0, 1.0, -1.0])
def test_huge_log_ratios(gspo, token_level, shift, advantage):
    """exp(1e4) is infinite, and inf x 0 not a number: loss and gradient must stay finite."""
    gspo.CLIP_RANGE, gspo.USE_TOKEN_LEVEL_LOSS = (0.1, 0.2), token_level
    old = torch.full((2, 3), -1.0)
    new = torch.cat([old[:1] + shift, old[1:] + 0.01]).requires_grad_()  # and a normal neighbour
    ones = torch.ones_like(old)
    loss = gspo.policy_loss(new, old, advantage * ones, ones)[0]
    gradient, = torch.autograd.grad((loss * gspo.token_weights(ones)).sum(), new)
    assert loss.isfinite().all() and gradient.isfinite().all()
    expected = {(1e4, 1.0): -1.2, (-1e4, 1.0): 0.0, (-1e4, -1.0): 0.9}
    if advantage == 0:
        assert not loss.any() and not gradient.any()
    elif (shift, advantage) in expected:  # 0 is the limit of s A for s -> 0
        assert loss[0].tolist() == pytest.approx([expected[shift, advantage]] * 3, rel=1e-6)
        assert gradient[0].tolist() == [0.0] * 3
    else:  # a bad answer that became far too likely is not cut, only kept finite
        assert loss[0].min() > 1e3
    if advantage:
        slope = -advantage * math.exp(0.01) / 6
        assert gradient[1].tolist() == pytest.approx([slope] * 3, rel=1e-4)


@pytest.mark.parametrize("token_level", [False, True])
def test_empty_and_one_token_answers(gspo, token_level):
    """A row without any token adds nothing, and no NaN; one token has the plain ratio."""
    gspo.CLIP_RANGE, gspo.USE_TOKEN_LEVEL_LOSS = 0.5, token_level
    mask = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    old = torch.tensor([[-1.0, -1.0], [-2.0, -7.0], [-1.0, -3.0]], dtype=torch.float64)
    change = torch.tensor([[5.0, 5.0], [0.2, 5.0], [0.1, 0.3]], dtype=torch.float64)
    new = (old + change).requires_grad_()
    advantages = torch.tensor([[1.0], [2.0], [-1.0]], dtype=torch.float64).expand(3, 2)
    loss = loss_of(gspo, new, old, advantages, mask)
    gradient, = torch.autograd.grad(loss, new)
    s = math.exp(0.2)  # of both: 0.2, and the mean of 0.1 and 0.3
    assert loss.item() == pytest.approx(-(0 + 2 * s - s) / 3, rel=1e-12)
    expected = [0, 0, -2 * s / 3, 0, s / 6, s / 6]
    assert gradient.flatten().tolist() == pytest.approx(expected, rel=1e-12, abs=0)


def test_token_weights(gspo):
    """The mean over answers of the mean over tokens: each answer weighs 1 / b, however long."""
    mask = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0],
                         [0.0, 0.0, 0.0, 0.0]])
    expected = [[1 / 16] * 4, [1 / 4, 0, 0, 0], [1 / 8, 1 / 8, 0, 0], [0] * 4]
    assert gspo.token_weights(mask).tolist() == expected
    _, _, _, mask, _ = answers(0.0)
    assert gspo.token_weights(mask).sum().item() == pytest.approx(1.0, rel=1e-12)


# ============================================== KL ==============================================


def distributions(stale, size=6, seed=5):
    """Log-probs of a policy (of its logits, which carry gradient), of the policy that sampled and
    of the reference, (size,) each. Not stale: the sampling policy is the policy itself."""
    generator = torch.Generator().manual_seed(seed)
    logits, other, reference = (1.5 * torch.randn(size, generator=generator, dtype=torch.float64)
                                for _ in range(3))
    logits.requires_grad_()
    new = logits.log_softmax(0)
    old = (logits + stale * other).log_softmax(0).detach()
    return logits, new, old, reference.log_softmax(0)


def expectation_under(old, values):
    """The exact mean of a value for each token over tokens drawn from `old`; no gradient to it."""
    return (old.detach().exp() * values).sum()


@pytest.mark.parametrize("stale", [0.0, 0.5])
def test_kl_is_unbiased_in_value_and_in_gradient(gspo, stale):
    """All tokens of a small vocabulary, each weighed by its chance to be drawn from pi_old."""
    logits, new, old, ref = distributions(stale)
    exact = (new.exp() * (new - ref)).sum()  # KL(pi || ref) by its definition
    slope, = torch.autograd.grad(exact, logits, retain_graph=True)
    estimate = expectation_under(old, gspo.kl_to_reference(new[:, None], old[:, None],
                                                           ref[:, None])[:, 0])
    gradient, = torch.autograd.grad(estimate, logits)
    assert estimate.item() == pytest.approx(exact.item(), rel=1e-12)
    torch.testing.assert_close(gradient, slope, rtol=1e-10, atol=1e-14)
    assert slope.norm() > 0.1


def test_kl_estimators_that_would_be_wrong(gspo):
    """What the docstring says of the others: k1's gradient is 0 in the mean, which is what is left
    without the ratio's gradient; k3's without the ratio is the forward KL's."""
    logits, new, old, ref = distributions(stale=0.0)
    reverse, = torch.autograd.grad((new.exp() * (new - ref)).sum(), logits, retain_graph=True)
    forward, = torch.autograd.grad((ref.exp() * (ref - new)).sum(), logits, retain_graph=True)
    without = gspo.kl_to_reference(new[:, None], new[:, None], ref[:, None])[:, 0]  # r is 1
    torch.testing.assert_close(without, new - ref)
    k1, = torch.autograd.grad(expectation_under(old, without), logits, retain_graph=True)
    torch.testing.assert_close(k1, torch.zeros_like(k1), rtol=0, atol=1e-15)
    k3, = torch.autograd.grad(expectation_under(old, torch.exp(ref - new) - 1 - (ref - new)),
                              logits, retain_graph=True)
    torch.testing.assert_close(k3, forward, rtol=1e-10, atol=1e-14)
    assert (forward - reverse).norm() > 0.1 * reverse.norm()


def test_kl_is_r_times_k3_without_its_heavy_tail(gspo):
    """At each single token the gradient is that of r (e^g - 1 - g); the value has its mean, and
    where pi_old hardly ever draws what the reference likes, a far smaller second moment."""
    logits, new, old, ref = distributions(stale=0.3)
    kl = gspo.kl_to_reference(new[:, None], old[:, None], ref[:, None])[:, 0]
    gap = ref - new
    k3 = (new - old).exp() * (gap.exp() - 1 - gap)
    for mine, other in zip(kl, k3):
        found, = torch.autograd.grad(mine, logits, retain_graph=True)
        expected, = torch.autograd.grad(other, logits, retain_graph=True)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)
    rare = torch.tensor([1e-6, 0.4, 0.599999], dtype=torch.float64).log()
    ref = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log()
    kl = gspo.kl_to_reference(rare[:, None], rare[:, None], ref[:, None])[:, 0]
    k3 = (ref - rare).exp() - 1 - (ref - rare)
    assert expectation_under(rare, kl).item() == pytest.approx(expectation_under(rare, k3).item())
    assert expectation_under(rare, k3 ** 2) > 1e4 > 1e3 * expectation_under(rare, kl ** 2)


def test_kl_by_hand(gspo):
    """1 - r (1 + g) at one token: pi 0.5, pi_old 0.4, ref 0.25 make r 1.25 and g -ln 2."""
    new, old, ref = (torch.tensor([[math.log(p)]], dtype=torch.float64) for p in (0.5, 0.4, 0.25))
    kl = gspo.kl_to_reference(new, old, ref)
    assert kl.item() == pytest.approx(1 - 1.25 * (1 - math.log(2)), rel=1e-12)
    assert gspo.kl_to_reference(new, new, new).item() == 0.0


def test_kl_stays_finite(gspo):
    """Huge gaps and ratios overflow neither value nor gradient."""
    for gap in (1e4, -1e4, 0.0):
        for shift in (1e4, -1e4, 0.0):
            new = torch.full((1, 1), -1.0, requires_grad=True)
            kl = gspo.kl_to_reference(new, new.detach() - shift, new.detach() + gap)
            gradient, = torch.autograd.grad(kl.sum(), new)
            assert kl.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("coefficient, kl_over_target, expected", [
    (0.2, 3.0, 0.3), (0.2, 2.0001, 0.3), (0.2, 2.0, 0.2), (0.2, 1.0, 0.2), (0.2, 0.5, 0.2),
    (0.2, 0.4999, 0.1), (0.2, 0.0, 0.1), (0.2, -1.0, 0.1),
    (0.9, 100.0, 1.0), (1.0, 3.0, 1.0), (1.0, 1.0, 1.0), (0.015, 0.1, 0.01), (0.01, 0.1, 0.01),
    (0.01, 1.0, 0.01), (0.01, 9.0, 0.015), (1.0, 0.1, 0.5)])
def test_adaptive_kl_coefficient(gspo, coefficient, kl_over_target, expected):
    """x 1.5 above twice the target, x 0.5 below half of it, kept in [0.01, 1]; the bounds stay."""
    for gspo.TARGET_KL in (0.25, 0.5):  # powers of two: the boundaries are exact
        found = gspo.adapt_kl_coef(coefficient, kl_over_target * gspo.TARGET_KL)
        assert found == pytest.approx(expected, rel=1e-12)


# =========================================== Entropy ============================================


def small_model(vocabulary=23, seed=0):
    """A random Qwen3 whose distributions are far from uniform."""
    torch.manual_seed(seed)
    config = Qwen3Config(vocab_size=vocabulary, hidden_size=16, intermediate_size=32,
                         num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                         head_dim=8, initializer_range=0.6, tie_word_embeddings=True)
    return Qwen3ForCausalLM(config).eval()


def small_batch(gspo, seed=0, vocabulary=23):
    """Six completions, of 1 to 5 tokens, of three prompts of 2 to 4 tokens."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in (4, 2, 3)]
    padded = torch.tensor([[0] * (4 - len(ids)) + ids for ids in prompts])
    real = torch.tensor([[0] * (4 - len(ids)) + [1] * len(ids) for ids in prompts])
    ids = torch.randint(vocabulary, (6, 5), generator=generator)
    mask = torch.tensor([[float(t < n) for t in range(5)] for n in (5, 1, 3, 2, 4, 5)])
    index = torch.tensor([0, 0, 1, 1, 2, 2])
    return prompts, gspo.Batch(
        prompt_index=index, prompt_ids=padded[index], prompt_mask=real[index], completion_ids=ids,
        completion_mask=mask, sampled_logps=torch.zeros(6, 5),
        ended=torch.ones(6, dtype=torch.bool))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("logits_at_once", [2**26, 60])
def test_entropy_is_that_of_the_distribution(embedded, temperature, logits_at_once):
    """-sum p log p over the whole vocabulary, at each position, and not an estimate from the token
    that was drawn; its gradient is there, and is that of the same sum."""
    gspo, gspo.TEMPERATURE, gspo.LOGITS_AT_ONCE = embedded, temperature, logits_at_once
    model = small_model()
    prompts, batch = small_batch(gspo)
    logps, entropy = gspo.score_tokens(model, batch)
    assert entropy.dtype == torch.float32 and entropy.shape == (6, 5)
    weights = torch.rand(6, 5, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((entropy * weights).sum(), list(model.parameters()))
    exact = torch.zeros(6, 5)
    for i, prompt in enumerate(prompts[k] for k in batch.prompt_index):
        length = int(batch.completion_mask[i].sum())
        ids = torch.tensor([prompt + batch.completion_ids[i, :length].tolist()])
        logits = model(input_ids=ids).logits[0, len(prompt) - 1:-1]
        log_p = torch.log_softmax(logits.float() / temperature, -1)
        exact[i, :length] = -(log_p.exp() * log_p).sum(-1)
    torch.testing.assert_close(entropy, exact, rtol=0, atol=1e-5)
    expected = torch.autograd.grad((exact * weights).sum(), list(model.parameters()))
    apart = torch.stack([(g - e).norm() for g, e in zip(gradients, expected)]).norm()
    size = torch.stack([e.norm() for e in expected]).norm()
    assert size > 0.1 and apart < 1e-5 * size
    real = batch.completion_mask.bool()
    assert entropy[real].std() > 0.1 and (entropy + logps)[real].abs().min() > 1e-4  # not -log p


# ============================== How `train` puts the loss together ==============================


def train_on_numbers(gspo, monkeypatch, coefficient=0.3, passes=2, nudge=(0, {}), resumed=None):
    """`train` for one rollout of two groups of four, with the models replaced by tables of numbers.

    Minibatches of 4 completions of unequal length, in micro-batches of 2. After each optimiser step
    the log-probs move by a fixed amount. `nudge`: rows, and what is added to their numbers in some
    tables. A coefficient of 0: there is no reference; `resumed`: where a checkpoint had left it.
    Returns what went in and came out: for each step its rows, the log-probs and the gradients by
    log-probs and entropies, and the metrics.
    """
    gspo.GROUP_SIZE, gspo.BATCH_SIZE, gspo.MINIBATCH, gspo.MICRO_BATCH = 4, 2, 4, 3
    gspo.GSPO_EPOCHS, gspo.ENTROPY_COEF, gspo.KL_COEF = passes, 0.07, coefficient
    gspo.CLIP_RANGE, gspo.DEVICE = (0.02, 0.04), "cpu"
    generator = torch.Generator().manual_seed(0)

    def table(scale=1.0):
        return scale * torch.randn(8, 6, generator=generator, dtype=torch.float64)
    lengths = [1, 6, 2, 4, 3, 6, 1, 5]
    mask = torch.tensor([[float(t < n) for t in range(6)] for n in lengths], dtype=torch.float64)
    old = table() * mask - 2 * mask
    new, ref, entropy = old + table(0.2) * mask, old + table(0.5) * mask, table().abs() * mask
    tables, (nudged, nudges) = {"new": new, "ref": ref, "entropy": entropy}, nudge
    for name, shift in nudges.items():
        tables[name][nudged] += shift * mask[nudged]
    new.requires_grad_()
    entropy.requires_grad_()
    rewards = torch.randn(8, generator=generator, dtype=torch.float64)
    row = torch.arange(8)[:, None].expand(8, 6)  # the "tokens" tell which row they are from
    ones = torch.ones(8, 1).long()
    batch = gspo.Batch(prompt_index=torch.arange(2).repeat_interleave(4), prompt_ids=ones,
                       prompt_mask=ones, completion_ids=row.clone(), completion_mask=mask,
                       sampled_logps=old + 0.01 * mask, ended=torch.arange(8) < 6)
    state = SimpleNamespace(old=old, ref=ref, entropy=entropy.detach().clone(), lengths=lengths,
                            rewards=rewards, steps=[], rows=[], metrics=None)

    def score_tokens(model, micro):
        rows = micro.completion_ids[:, 0]
        state.rows += rows.tolist()
        return new[rows], entropy[rows]

    def reference_logps(run, batch):
        assert coefficient, "there is no reference"
        return ref

    def optimiser_step(run, name, meter):
        mean, losses = meter.means()["loss"], [step.loss for step in state.steps]
        state.steps.append(SimpleNamespace(
            rows=state.rows, new=new.detach().clone(), by_logps=new.grad.clone(),
            by_entropy=entropy.grad.clone(), loss=mean * (len(losses) + 1) - sum(losses)))
        state.rows, new.grad, entropy.grad = [], None, None
        with torch.no_grad():
            new.add_(0.05 * mask * torch.sin(torch.arange(48.0).reshape(8, 6)))

    def finish_step(run, metrics):
        state.metrics, state.next_coefficient = metrics, run.state["kl_coef"]

    parts = {"verifier": torch.tensor([1.0, 0, 0, 0, 1, 1, 0, 0])}
    monkeypatch.setattr(gspo, "next_questions", lambda run, count: [None] * count)
    monkeypatch.setattr(gspo, "sample_groups", lambda *arguments: batch)
    monkeypatch.setattr(gspo, "score_completions", lambda *arguments: (rewards, parts))
    monkeypatch.setattr(gspo, "behaviour_logps", lambda policy, batch: old)
    monkeypatch.setattr(gspo, "reference_logps", reference_logps)
    monkeypatch.setattr(gspo, "score_tokens", score_tokens)
    monkeypatch.setattr(gspo, "optimiser_step", optimiser_step)
    monkeypatch.setattr(gspo, "finish_step", finish_step)
    gspo.train(SimpleNamespace(step=0, total_steps=1, policy=None, tokenizer=None, num_tokens=0,
                               state={"kl_coef": coefficient if resumed is None else resumed}))
    return state


def slow_total(gspo, state, step, coefficient):
    """L = -J + coefficient KL - ENTROPY_COEF H of a minibatch, and its parts, from the equations;
    and its gradient by log-probs and entropies."""
    advantages = slow_advantages(state.rewards, 4, gspo.ADVANTAGE_TYPE, 1, gspo.ADVANTAGE_EPSILON)
    lengths = [state.lengths[i] for i in step.rows]
    policy, slope = slow_loss(gspo, step.new[step.rows], state.old[step.rows],
                              torch.tensor(advantages[step.rows]).expand(-1, 6), lengths, False)
    by_logps, by_entropy = np.zeros((8, 6)), np.zeros((8, 6))
    by_logps[step.rows] = slope
    kl = entropy = 0.0
    for i, length in zip(step.rows, lengths):
        for t in range(length):
            weight = 1 / length / len(lengths)
            gap = float(state.ref[i, t] - step.new[i, t])
            r = math.exp(float(step.new[i, t] - state.old[i, t]))
            kl += weight * (1 - r * (1 + gap))
            entropy += weight * float(state.entropy[i, t])
            by_logps[i, t] += coefficient * weight * -r * gap  # r's slope is r, that of g is -1
            by_entropy[i, t] = -gspo.ENTROPY_COEF * weight
    total = policy + coefficient * kl - gspo.ENTROPY_COEF * entropy
    return SimpleNamespace(loss=total, policy_loss=policy, kl_loss=kl, entropy_loss=-entropy,
                           by_logps=by_logps, by_entropy=by_entropy)


@pytest.mark.parametrize("coefficient", [0.3, 0.0])
def test_train_minimises_the_stated_loss(gspo, monkeypatch, coefficient):
    """Loss and gradient of every optimiser step, over two passes and uneven micro-batches: with
    the signs of the docstring, the old log-probs of the rollout, and the minibatch's normaliser."""
    state = train_on_numbers(gspo, monkeypatch, coefficient)
    assert len(state.steps) == 4
    for step in state.steps:
        expected = slow_total(gspo, state, step, coefficient)
        assert step.loss == pytest.approx(expected.loss, rel=1e-9)
        np.testing.assert_allclose(step.by_logps, expected.by_logps, rtol=1e-9, atol=1e-14)
        np.testing.assert_allclose(step.by_entropy, expected.by_entropy, rtol=1e-9, atol=1e-14)
    assert not torch.equal(state.steps[0].new, state.steps[3].new)
    assert state.metrics["kl_coef"] == coefficient
    assert ({"kl", "kl_loss"} <= set(state.metrics)) == (coefficient > 0)


def test_metrics_are_means_over_what_they_say(gspo, monkeypatch):
    """Losses: the mean over the minibatches. Statistics: over all tokens, padding left out, and not
    the mean of micro-batches' means (they are uneven here)."""
    state = train_on_numbers(gspo, monkeypatch)
    slow = [slow_total(gspo, state, step, 0.3) for step in state.steps]
    for name in ("loss", "policy_loss", "kl_loss", "entropy_loss"):
        expected = sum(getattr(one, name) for one in slow) / len(slow)
        assert state.metrics[name] == pytest.approx(expected, rel=1e-9)
    advantages = slow_advantages(state.rewards, 4, "relative", 1, 0.0)[:, 0]
    ratios, values = [], {name: [] for name in ("kl", "entropy", "low", "high", "region")}
    for step in state.steps:
        for i in step.rows:
            n = state.lengths[i]
            ratio = slow_ratio(step.new[i, :n].tolist(), state.old[i, :n].tolist())
            ratios += [ratio] * n
            gap = state.ref[i, :n] - step.new[i, :n]
            r = (step.new[i, :n] - state.old[i, :n]).exp()
            values["kl"] += (1 - r * (1 + gap)).tolist()
            values["entropy"] += state.entropy[i, :n].tolist()
            low, high = ratio < 0.98 and advantages[i] < 0, ratio > 1.04 and advantages[i] > 0
            values["low"] += [low] * n
            values["high"] += [high] * n
            values["region"] += [low or high] * n
    assert len(ratios) == 2 * sum(state.lengths)
    metrics = state.metrics
    for name, column in values.items():
        logged = metrics[name if name in metrics else f"clip_ratio/{name}_mean"]
        assert logged == pytest.approx(sum(column) / len(column), rel=1e-6, abs=1e-12)
    assert metrics["ratio/mean"] == pytest.approx(sum(ratios) / len(ratios), rel=1e-6)
    assert 0 < metrics["clip_ratio/region_mean"] < 1
    assert metrics["advantage/mean"] == pytest.approx(0.0, abs=1e-12)  # of answers, not of tokens
    assert metrics["advantage/size"] == pytest.approx(np.abs(advantages).mean(), rel=1e-9)
    assert metrics["reward"] == pytest.approx(state.rewards.mean().item(), rel=1e-9)
    spread = [np.std(group, ddof=1) for group in state.rewards.reshape(2, 4).numpy()]
    assert metrics["reward_std"] == pytest.approx(np.mean(spread), rel=1e-9)
    assert metrics["completions/mean_length"] == pytest.approx(np.mean(state.lengths))
    assert metrics["completions/clipped_ratio"] == 0.25  # two of eight did not end
    assert metrics["accuracy"] == metrics["rewards/verifier"] == pytest.approx(3 / 8)
    assert metrics["frac_reward_zero_std"] == 0
    assert metrics["sampling_logp_difference"] == pytest.approx(0.01)


def test_the_kl_coefficient_moves_after_the_step(gspo, monkeypatch):
    """By the mean KL of the step's tokens; the step itself is made, and logged, with the old one.
    Without ADAPTIVE_KL, or without a reference, it stays."""
    for adaptive, coefficient, target, factor in ((True, 0.3, 1e-6, 1.5), (True, 0.3, 1e6, 0.5),
                                                  (False, 0.3, 1e-6, 1.0), (True, 0.0, 1e6, 1.0)):
        gspo.ADAPTIVE_KL, gspo.TARGET_KL = adaptive, target
        state = train_on_numbers(gspo, monkeypatch, coefficient,
                                 nudge=(slice(None), {"ref": -3.0}))  # far away: the KL is > 0
        assert state.metrics["kl_coef"] == coefficient
        assert state.next_coefficient == pytest.approx(coefficient * factor)
        assert (state.metrics.get("kl", 0.0) > 1) == bool(coefficient)
    for gspo.ADAPTIVE_KL, expected in ((True, 0.9), (False, 0.3)):  # not adaptive: KL_COEF counts
        state = train_on_numbers(gspo, monkeypatch, 0.3, resumed=0.9)
        assert state.metrics["kl_coef"] == expected
        for step in state.steps:
            np.testing.assert_allclose(step.by_logps, slow_total(gspo, state, step,
                                                                 expected).by_logps, atol=1e-12)


def test_signs_of_the_three_terms(gspo, monkeypatch):
    """Seen from outside: the loss of a minibatch falls when a better answer becomes more likely,
    or a worse one less, and when the entropy rises; it rises when the reference likes it less."""
    def loss_of_first(row, coefficient=0.3, **nudges):
        state = train_on_numbers(gspo, monkeypatch, coefficient, passes=1, nudge=(row, nudges))
        step, = (step for step in state.steps if row in step.rows)
        return step.loss, slow_advantages(state.rewards, 4, "relative", 1, 0.0)[row, 0]
    tried = set()
    for row in range(8):
        (loss, advantage), (nudged, _) = (loss_of_first(row, 0.0, new=shift) for shift in (0, 0.01))
        if loss != nudged:  # cut answers do not move it
            assert (nudged < loss) == (advantage > 0)
            tried.add(advantage > 0)
        loss, _ = loss_of_first(row)
        assert loss_of_first(row, entropy=0.1)[0] < loss
        assert loss_of_first(row, ref=-0.1)[0] > loss
    assert tried == {True, False}


# =========================================== Doctests ===========================================


def test_docstring_examples(gspo):
    """The worked examples of the docstrings, with the constants as in the file."""
    result = doctest.testmod(gspo)
    assert result.failed == 0
    assert result.attempted >= 6  # advantages, loss, weights, KL coefficient, last_number
