"""The same rollout through gspo.py and through TRL's GRPOTrainer: log-probs, advantages, loss,
gradient.

TRL computes GSPO with importance_sampling_level="sequence" and loss_type="grpo" (the mean over
sequences of the mean over tokens). Both sides get the same sampled tokens and the same scores, and
each computes everything else by itself, from its own padding to the gradient of the weights.
"""

import copy

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from conftest import ROOT

GROUP, PROMPTS, TEMPERATURE = 4, 4, 0.8
COUNT = GROUP * PROMPTS


def rewards_of_rows(prompts, completions, **columns):
    """Any scores will do; one group's are all equal."""
    scores = [0.1 * (i * 7 % 10) for i in range(COUNT)]
    scores[GROUP:2 * GROUP] = [0.7] * GROUP
    return scores


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """TRL's trainer around the shipped policy, with the embedded profile's kind of settings."""
    folder = ROOT / "data" / "policy"
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                  attn_implementation="sdpa")
    arguments = GRPOConfig(
        output_dir=tmp_path_factory.mktemp("trl"), use_cpu=True, bf16=False, report_to="none",
        per_device_train_batch_size=COUNT, num_generations=GROUP, temperature=TEMPERATURE,
        importance_sampling_level="sequence", loss_type="grpo", scale_rewards="group", beta=0.0,
        epsilon=3e-4, epsilon_high=4e-4, num_iterations=2, gradient_checkpointing=False)
    questions = Dataset.from_dict({"prompt": ["1 + 1"] * COUNT})
    trainer = GRPOTrainer(policy, rewards_of_rows, args=arguments, train_dataset=questions,
                          processing_class=AutoTokenizer.from_pretrained(folder))
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()  # as in training; there is no dropout
    return trainer


@pytest.fixture
def rollout(embedded, trainer, monkeypatch):
    """One rollout by gspo.py: our Batch, TRL's inputs made of the same tokens, and the module."""
    gspo, policy, tokenizer = embedded, trainer.model, trainer.processing_class
    gspo.TEMPERATURE, gspo.GROUP_SIZE, gspo.ADVANTAGE_TYPE = TEMPERATURE, GROUP, "normalized"
    gspo.ADVANTAGE_EPSILON, gspo.MAX_NEW_TOKENS = 1e-4, 40  # 1e-4 is TRL's
    rows = gspo.load_rows("eval_datasets", tokenizer)[:PROMPTS]
    torch.manual_seed(0)
    batch = gspo.sample_groups(policy, tokenizer, rows, GROUP)
    assert batch.completion_mask.sum(1).unique().numel() > 4  # unequal lengths, as in real life
    rewards = torch.tensor(rewards_of_rows(None, None))[:, None]
    batch.advantages = gspo.compute_advantages(rewards).expand_as(batch.completion_mask)
    batch.old_logps = gspo.behaviour_logps(policy, batch)
    prompts = [row["prompt_ids"] for row in rows for _ in range(GROUP)]
    tokens = [ids[mask.bool()].tolist()
              for ids, mask in zip(batch.completion_ids, batch.completion_mask)]
    texts = tokenizer.batch_decode(tokens)
    monkeypatch.setattr(trainer, "_generate", lambda given: (
        prompts, tokens, None, texts, None, {}, None, []))
    inputs = trainer._generate_and_score_completions([{"prompt": "1 + 1"}] * COUNT)
    return gspo, batch, inputs


@pytest.fixture
def moved(rollout, trainer):
    """The trainer's policy with some noise on its weights, put back at the end: without, every
    ratio is 1. As much noise as it takes for the paper's clip range to cut some answers on both
    sides, none of them so close to the range's ends that rounding decides."""
    gspo, batch, _ = rollout
    before = copy.deepcopy(trainer.model.state_dict())
    for seed in range(40):
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in trainer.model.named_parameters():
                size = (1e-4, 3e-4, 1e-3)[seed % 3]
                p.copy_(before[name] + size * torch.randn(p.shape, generator=noise))
            logps = gspo.score_tokens(trainer.model, batch)[0]
        statistics = gspo.policy_loss(logps, batch.old_logps, batch.advantages,
                                      batch.completion_mask)[1]
        ratio = statistics["ratio/mean"][:, 0]
        clear = min((ratio - 1 + 3e-4).abs().min(), (ratio - 1 - 4e-4).abs().min()) > 1e-5
        if clear and all(statistics[f"clip_ratio/{side}_mean"].any() for side in ("low", "high")):
            break
    else:
        raise AssertionError("no noise moved the ratios as wanted")
    yield trainer.model
    trainer.model.load_state_dict(before)


def gradient(model, loss):
    """The gradient by all weights, as one vector."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def assert_same_gradient(ours, theirs, model, tolerance):
    """The gradients of two losses agree, relative to their length, which is not 0."""
    found, expected = gradient(model, ours), gradient(model, theirs)
    assert expected.norm() > 1e-3
    assert (found - expected).norm() < tolerance * expected.norm()


def test_tokens_advantages_and_old_log_probs(rollout):
    """What goes into the loss: TRL's mask, its z-scores of a group, its log-probs."""
    gspo, batch, inputs = rollout
    mask = batch.completion_mask
    assert torch.equal(inputs["completion_mask"].float(), mask)
    real = mask.bool()
    assert torch.equal(inputs["completion_ids"][real], batch.completion_ids[real])
    torch.testing.assert_close(inputs["advantages"], batch.advantages[:, 0], rtol=1e-5, atol=1e-6)
    assert not batch.advantages[GROUP:2 * GROUP].any()
    assert batch.advantages.abs().max() > 1.0
    theirs = inputs["old_per_token_logps"]
    torch.testing.assert_close(batch.old_logps[real], theirs[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("token_level", [False, True])
def test_loss_and_gradient(rollout, trainer, moved, token_level):
    """Eq. 5 with the paper's clip range, on a policy that has moved off the sampling one."""
    gspo, batch, inputs = rollout
    gspo.USE_TOKEN_LEVEL_LOSS, gspo.CLIP_RANGE = token_level, (3e-4, 4e-4)
    inputs = inputs | {"old_per_token_logps": batch.old_logps}
    trainer._metrics["train"].clear()
    theirs = trainer._compute_loss(moved, inputs)
    logps, _ = gspo.score_tokens(moved, batch)
    losses, statistics = gspo.policy_loss(logps, batch.old_logps, batch.advantages,
                                          batch.completion_mask)
    ours = (losses * gspo.token_weights(batch.completion_mask)).sum()
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)
    assert_same_gradient(ours, theirs, moved, 1e-5)
    for side in ("low", "high", "region"):  # TRL's mean is over sequences
        cut = statistics[f"clip_ratio/{side}_mean"][:, 0].mean().item()
        logged, = trainer._metrics["train"][f"clip_ratio/{side}_mean"]
        assert cut == pytest.approx(logged, abs=1e-6) and 0 < cut < 1


def test_gradients_of_kl_and_entropy(rollout, trainer, moved):
    """TRL's KL term is r k3; ours leaves out r e^g, which has no gradient: the gradients agree.
    Its entropy, value and gradient, is ours. (At the token level: with the sequence's ratio TRL
    multiplies each token's KL by that.)"""
    gspo, batch, inputs = rollout
    mask = batch.completion_mask
    noise = torch.randn(mask.shape, generator=torch.Generator().manual_seed(2))
    ref = batch.old_logps + 0.5 * noise
    inputs = inputs | {"old_per_token_logps": batch.old_logps, "ref_per_token_logps": ref,
                       "advantages": torch.zeros(COUNT)}
    logps, entropy = gspo.score_tokens(moved, batch)
    kl = (gspo.kl_to_reference(logps, batch.old_logps, ref) * gspo.token_weights(mask)).sum()
    trainer.beta, trainer.importance_sampling_level = 1.0, "token"
    try:
        theirs = trainer._compute_loss(moved, inputs)
    finally:
        trainer.beta, trainer.importance_sampling_level = 0.0, "sequence"
    assert_same_gradient(kl, theirs, moved, 1e-4)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    seen = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    _, entropies, _ = trainer._get_per_token_logps_and_entropies(moved, ids, seen, mask.shape[1],
                                                                 compute_entropy=True)
    logps, entropy = gspo.score_tokens(moved, batch)
    torch.testing.assert_close(entropy, entropies * mask, rtol=1e-5, atol=1e-4)
    assert_same_gradient(entropy.sum(), (entropies * mask).sum(), moved, 1e-4)
