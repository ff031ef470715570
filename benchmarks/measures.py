"""What is measured of the losses without a run: a row each, as the runs of experiments.py.

gradients: the cosine of a loss's gradient to GRPO's, at each of the 16 updates of one rollout of
128 answers to the verifier's reward, that GRPO's loss makes; "cosine": each with its own mean over
tokens, "same mean": both with GRPO's. And, of a single token, the weight that a loss gives to the
gradient of its log-prob against its ratio, for A = 1 and A = -1.

length: the standard deviation of the log-ratio of a token, of its mean and of its sum over an
answer, against the answer's length: of 1,024 answers that the starting policy samples, after 4
updates by GRPO on others.
"""

import contextlib
import functools
import inspect
import time

import results
import torch
from pages import LENGTHS
from results import ROOT, source_of

RATIOS = [2 ** (i / 20) for i in range(-40, 41)]  # from 1/4 to 4
FIXED = ["PROFILE=embedded", "DEVICE=cpu", "REWARD_WEIGHTS={'verifier': 1.0}"]


def load(script, constants):
    """A script as a module, with constants set."""
    module = results.import_file(ROOT / "RL_HAND" / script / f"{script}.py")
    module.configure([*FIXED, *(word for word in constants if word.partition("=")[0] in
                                module.DEFAULTS)])
    return module


@functools.cache
def start(seed):
    """GRPO as a module, its starting policy, tokenizer and training questions."""
    torch.set_num_threads(1)
    grpo = load("grpo", ["KL_COEF=0", "MINIBATCH=32", "GRPO_EPOCHS=4", "MAX_NEW_TOKENS=120"])
    grpo.transformers.utils.logging.disable_progress_bar()
    tokenizer = grpo.AutoTokenizer.from_pretrained(ROOT / "data" / "policy")
    with contextlib.redirect_stdout(None):
        rows = grpo.load_rows("train_datasets", tokenizer)
    torch.manual_seed(seed)
    return grpo, tokenizer, [rows[i] for i in torch.randperm(len(rows))]


def rollout(seed, count=16):
    """A policy at its start, and its answers to `count` questions with their advantages."""
    grpo, tokenizer, rows = start(seed)
    policy = grpo.load_policy(grpo.POLICY_MODEL)
    batch = grpo.sample_groups(policy, tokenizer, rows[:count], grpo.GROUP_SIZE)
    texts = tokenizer.batch_decode(batch.completion_ids.where(
        batch.completion_mask > 0, tokenizer.pad_token_id), skip_special_tokens=True)
    rewards = torch.tensor(grpo.verify([rows[i] for i in batch.prompt_index.tolist()], texts))
    batch.advantages = grpo.compute_advantages(rewards)[:, None].expand_as(batch.completion_mask)
    batch.old_logps = batch.sampled_logps
    return policy, batch


def loss_of(script, logps, batch, weights):
    """A script's loss of a minibatch, summed with the weights of its tokens."""
    known = {"logps": logps, "old_logps": batch.old_logps, "advantages": batch.advantages,
             "mask": batch.completion_mask}
    losses = script.policy_loss(*(known[name] for name in inspect.signature(
        script.policy_loss).parameters))
    return ((losses[0] if isinstance(losses, tuple) else losses) * weights).sum()


def token_weight(script, advantage):
    """By how much a loss multiplies the gradient of a token's log-prob, at each of RATIOS."""
    logps = torch.tensor(RATIOS).log()[:, None].requires_grad_()          # (81, 1): an answer each
    one = torch.ones_like(logps)
    batch = script.Batch(old_logps=0 * one, advantages=advantage * one, completion_mask=one)
    loss_of(script, logps, batch, one).backward()
    return (-logps.grad[:, 0] / advantage).tolist()


def gradients(script, constants, seed):
    """What a row of this measure has: curves by name."""
    grpo, loss = start(seed)[0], load(script, constants)
    torch.manual_seed(seed)
    policy, batch = rollout(seed)
    rate = dict(word.split("=") for word in constants if "LEARNING_RATE" in word)["LEARNING_RATE"]
    optimizer = grpo.new_optimizer(policy, float(rate))
    parameters = optimizer.param_groups[0]["params"]
    found = {"cosine": [], "same mean": []}
    for part in grpo.minibatches(batch, grpo.GRPO_EPOCHS):
        logps, _ = grpo.score_tokens(policy, part)
        weights = grpo.token_weights(part.completion_mask)

        def gradient(script, weights):
            return torch.cat([each.flatten() for each in torch.autograd.grad(
                loss_of(script, logps, part, weights), parameters,  # noqa: B023
                retain_graph=True)])
        own = gradient(grpo, weights)
        for name, each in (("cosine", loss.token_weights(part.completion_mask)),
                           ("same mean", weights)):
            found[name].append(float(torch.cosine_similarity(gradient(loss, each), own, 0)))
        loss_of(grpo, logps, part, weights).backward()
        torch.nn.utils.clip_grad_norm_(parameters, grpo.MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
    if seed == 0:
        found |= {"ratio": RATIOS, "weight, A > 0": token_weight(loss, 1.0),
                  "weight, A < 0": token_weight(loss, -1.0)}
    return found


def length(script, constants, seed):
    """What a row of this measure has: by bins of the length."""
    grpo, tokenizer, rows = start(seed)
    torch.manual_seed(seed)
    policy, batch = rollout(seed)
    with torch.no_grad():
        others = grpo.sample_groups(policy, tokenizer, rows[16:144], grpo.GROUP_SIZE)
    optimizer = grpo.new_optimizer(policy, grpo.LEARNING_RATE)
    for part in [*grpo.minibatches(batch, 1)]:
        weights = grpo.token_weights(part.completion_mask)
        loss_of(grpo, grpo.score_tokens(policy, part)[0], part, weights).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), grpo.MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
    mask = others.completion_mask
    change = (grpo.score_without_grad(policy, others) - others.sampled_logps) * mask
    tokens, found = mask.sum(1), {name: [] for name in (
        "answers", "length", "sd of a token", "sd of the mean", "sd of the sum")}
    for low, high in zip(LENGTHS, [*LENGTHS[1:], 10**9]):
        some = (tokens >= low) & (tokens < high)
        sums = change[some].sum(1)
        for name, value in zip(found, (some.sum(), tokens[some].mean(),
                                       change[some][mask[some] > 0].std(),
                                       (sums / tokens[some]).std(), sums.std())):
            found[name].append(float(value))
    return found


MEASURES = {"gradients": gradients, "length": length}


def measure(script, constants, seed):
    """The row of a measure; constants[0] names it: MEASURE=gradients."""
    began, facts = time.monotonic(), results.facts_here()
    found = MEASURES[constants[0].partition("=")[2]](script, constants[1:], seed)
    key = results.key_of(script, constants, seed)
    row = dict(zip(("script", "constants", "seed"), key)) | facts | {
        "code": results.code_now(key), "data": results.data_of(source_of(script), constants),
        "threads": "1", "end": "", "seconds": f"{time.monotonic() - began:.3g}",
        "seconds of evaluations": "0"}
    return row | {name: " ".join(results.number(value, 3) for value in values)
                  for name, values in found.items()}
