# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0",
#   "transformers==5.23.0",
#   "pandas==3.1.1",
#   "pyarrow==26.0.1",
#   "matplotlib==3.11.2",
#   "tqdm==4.70.1",
# ]
# ///
"""PPO: Proximal Policy Optimization (arXiv:1707.06347) for language models, in one file.

The policy answers questions; a reward model and a verifier score each answer. The score is paid at
the answer's last token, a KL penalty at every token; a second network, the critic, learns to
foretell what is still to come, and a token's advantage is how much better it went than foretold
(GAE, arXiv:1506.02438). The policy and the critic each take a few clipped gradient steps.

    r_it  = pi(y_it | x, y_i<t) / pi_old(y_it | x, y_i<t)
    delta = reward_t + GAMMA V_t+1 - V_t              A_t = delta_t + GAMMA GAE_LAMBDA A_t+1

    L_policy = -mean min(r A, clip(r, 1-low, 1+high) A) - ENTROPY_COEF H(pi)
    L_value  = mean max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / 2,    R = A + V_old

GRPO and GSPO put the mean reward of a group in the critic's place: half the networks, but one
advantage for a whole answer. Here answers come in groups too, so that all scripts sample alike, but
nothing is compared inside a group: GROUP_SIZE=1 will do.

Simplified on purpose: one process, one device, no sampling while training.

    python RL_HAND/ppo/ppo.py                                # small models where there is no GPU
    python RL_HAND/ppo/ppo.py LEARNING_RATE=5e-5 SEED=1     # any constant below can be set so
    python RL_HAND/ppo/ppo.py RESUME_FROM=runs/ppo/epoch_1  # go on exactly from that checkpoint
    python RL_HAND/ppo/ppo.py --help

One CPU core, small models: 1.3 s a step, 2.5 minutes of training, 1 GB of memory. A GPU with
Qwen3-0.6B: not run yet.
"""

import ast
import csv
import difflib
import glob
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
import transformers
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification,
                          AutoTokenizer, DynamicCache)

# ========================================== Constants ===========================================
# Each can be set on the command line as NAME=VALUE. On a machine without a CUDA GPU the values in
# EMBEDDED (below) take the place of the ones here: there, change those.

# --- Model
PROFILE = "auto"  # "full": the models named here; "embedded": those in data/; "auto": full on CUDA
POLICY_MODEL = "Qwen/Qwen3-0.6B"  # what is trained, a folder or a model id; also the KL reference
REWARD_MODEL = "OpenAssistant/reward-model-deberta-v3-large-v2"  # scores (question, answer) pairs
ENABLE_THINKING = False  # the chat template's switch; a thought rarely fits into MAX_NEW_TOKENS
DEVICE = "auto"  # "auto": cuda if there is one, else cpu; or "cuda:1", "cpu"
DTYPE = "auto"  # of the passes (weights stay float32); "auto": bfloat16 on CUDA, else float32
THREADS = 0  # on the CPU; 0: PyTorch's choice. More than one is only faster on an idle machine
LOGITS_AT_ONCE = 2**26  # logits alive at a time: (B, T, V) never exists; changes memory only

# --- Data
train_datasets = [  # questions to train on: local file, pattern or hf://; parquet, json or jsonl
    {"path": "hf://datasets/openai/gsm8k/main/train-00000-of-00001.parquet",
     "type": "parquet", "input": "question", "output": "answer"}]
eval_datasets = [  # held-out questions, never trained on
    {"path": "hf://datasets/openai/gsm8k/main/test-00000-of-00001.parquet",
     "type": "parquet", "input": "question", "output": "answer"}]
MAX_PROMPT_TOKENS = 256  # tokens; longer prompts are dropped and counted

# --- Sampling
BATCH_SIZE = 2  # prompts per rollout
GROUP_SIZE = 4  # completions per prompt (G)
MAX_NEW_TOKENS = 512  # tokens per completion, the end token included
TEMPERATURE = 1.0  # of the sampled and of the trained distribution: they must be the same

# --- Reward
REWARD_WEIGHTS = {"model": 0.5, "verifier": 1.0}  # and "function"; the reward is their sum
REWARD_SIGMOID = True  # the reward model's score goes through a sigmoid: 0.5 x it < 1 right answer
REWARD_FUNCTION = ""  # "file.py:name": name(questions, responses, references) -> scores
USE_SEQUENCE_LEVEL_REWARD = True  # False: each segment is rewarded with what it added
SEGMENT_END = r"[.\n]\s*$"  # a segment ends behind a full stop (or decimal point) or a line
MAX_REWARD_TOKENS = 512  # tokens of a pair, DeBERTa's training length; the longer part is cut
REWARD_BATCH = 64  # pairs per forward pass of the reward model; changes memory only

# --- Optimisation
NUM_EPOCHS = 1  # passes over the training questions
MAX_STEPS = 0  # stop after this many rollouts; 0: after NUM_EPOCHS
LEARNING_RATE = 1e-6  # AdamW's
WARMUP_STEPS = 0  # optimiser steps of linear warm-up
ADAM_BETAS = (0.9, 0.95)  # AdamW's
ADAM_EPSILON = 1e-8  # AdamW's
WEIGHT_DECAY = 0.0  # AdamW's
MAX_GRAD_NORM = 1.0  # gradient clipping; 0: none
MINIBATCH = 8  # completions per optimiser step: part of the algorithm
MICRO_BATCH = 4  # completions per forward pass: memory only, gradients add up to a minibatch
LENGTH_BUCKET = 16  # completions padded to a common length: speed only
SEED = 0  # of sampling, data order and shuffling

# --- Algorithm
PPO_EPOCHS = 4  # passes over a rollout; with one optimiser step per rollout every ratio is 1
CLIP_RANGE = 0.2  # (low, high), or one number, of a *token's* ratio
GAMMA = 1.0  # discount per token; an answer is short and only its end is scored
GAE_LAMBDA = 0.95  # 1: what really came (no bias); 0: what the critic foretold next (little noise)
WHITEN_ADVANTAGES = True  # mean 0 and std 1 over the tokens of the rollout
KL_COEF = 0.05  # the KL penalty in the reward of each token; 0: no reference is loaded
NO_END_PENALTY = 0.0  # taken off the score of an answer that MAX_NEW_TOKENS cut off
CRITIC_LEARNING_RATE = 1e-5  # AdamW's, for the critic
CRITIC_WARMUP = 0  # rollouts in which only the critic learns
VALUE_CLIP = 0.2  # how far a value may move from the old one before its gradient is cut; 0: free
TARGET_APPROX_KL = 0.0  # end a rollout's passes when approx_kl, their mean, exceeds it; 0: never
ENTROPY_COEF = 0.0  # weight of the entropy bonus

# --- Evaluation
EVAL_EVERY = 200  # rollouts between evaluations (also at step 0 and at the end of each epoch)
EVAL_QUESTIONS = 256  # held-out questions used; 0: all
EVAL_BATCH = 32  # questions answered at once; changes memory only
EVAL_TEMPERATURE = 1.0  # of the sampled evaluation; the other one is greedy
TOP_P = 1.0  # nucleus of the sampled evaluation only: training samples the whole distribution
SHOW_SAMPLES = 3  # held-out questions whose answers are printed at each evaluation

# --- Output
OUTPUT_DIR = "runs/{script}"  # the run's folder; with _2, _3, ... if there is one: no overwriting
SAVE_EVERY = 0  # rollouts between extra checkpoints step_N/; 0: only epoch_N/
RESUME_FROM = ""  # an epoch_N/ or step_N/ folder to go on from, exactly
TENSORBOARD = False  # also write event files (pip install tensorboard)

EMBEDDED = {  # for a machine without a GPU: a 0.5 M Qwen3 and a 0.6 M DeBERTa on sums, see data/
    "POLICY_MODEL": "data/policy",
    "REWARD_MODEL": "data/reward_model",
    "train_datasets": [{"path": "data/train.parquet", "input": "question", "output": "answer"}],
    "eval_datasets": [{"path": "data/heldout.parquet", "input": "question", "output": "answer"}],
    "THREADS": 1,
    "MAX_PROMPT_TOKENS": 64,
    "BATCH_SIZE": 16,
    "GROUP_SIZE": 8,
    "MAX_NEW_TOKENS": 60,
    "NUM_EPOCHS": 2,
    "LEARNING_RATE": 1e-4,
    "MINIBATCH": 64,
    "MICRO_BATCH": 64,
    "PPO_EPOCHS": 2,
    "CRITIC_LEARNING_RATE": 3e-4,
    "CRITIC_WARMUP": 2,
    "EVAL_EVERY": 10,
    "EVAL_QUESTIONS": 512,
    "EVAL_BATCH": 512,
}

# ========================================== Training ============================================


def train(run):
    """The whole algorithm. `run` (see `start`) holds the models, the data and the run's folder."""
    policy, critic = run.policy, run.trained["critic"][0]
    while run.step < run.total_steps:
        clock = Clock()
        rows = next_questions(run, BATCH_SIZE)
        batch = sample_groups(policy, run.tokenizer, rows, GROUP_SIZE, run.sampler)  # B completions
        clock.lap("rollout")
        scores, parts = score_completions(run, rows, batch)               # (B,)
        clock.lap("reward")
        batch.old_logps = behaviour_logps(policy, batch)                  # (B, T)
        if run.reference is not None:
            batch.ref_logps = score_without_grad(run.reference, batch)    # (B, T)
        rewards = token_rewards(run, rows, batch, scores)                 # (B, T)
        with torch.no_grad():
            batch.old_values = state_values(critic, batch)                # (B, T)
        batch.advantages = compute_advantages(rewards, batch.old_values, batch.completion_mask)
        batch.returns = batch.advantages + batch.old_values               # before whitening
        if WHITEN_ADVANTAGES:
            batch.advantages = whiten(batch.advantages, batch.completion_mask)
        clock.lap("logps")

        meter, critic_meter = Meter(), Meter()
        for minibatch in minibatches(batch, PPO_EPOCHS, run.shuffler):
            minibatch.weights = token_weights(minibatch.completion_mask)  # (b, T), sums to 1
            for micro in micro_batches(minibatch):
                logps, entropy = score_tokens(policy, micro)              # (b, T) each
                policy_term, statistics = policy_loss(logps, micro.old_logps, micro.advantages,
                                                      micro.completion_mask)
                token_loss = policy_term - ENTROPY_COEF * entropy
                (token_loss * micro.weights).sum().backward()
                meter.add(micro,
                          losses={"loss": token_loss, "policy_loss": policy_term,
                                  "entropy_loss": -entropy},
                          statistics={"entropy": entropy, **statistics})
                values = state_values(critic, micro)                      # (b, T)
                value_term, clipped = value_loss(values, micro.old_values, micro.returns)
                (value_term * micro.weights).sum().backward()
                critic_meter.add(micro, losses={"loss": value_term},
                                 statistics={"value_clip_ratio": clipped})
            optimiser_step(run, "policy", meter, frozen=run.step < CRITIC_WARMUP)
            optimiser_step(run, "critic", critic_meter)
            if TARGET_APPROX_KL and meter.means()["approx_kl"] > TARGET_APPROX_KL:
                break
        clock.lap("update")

        metrics = meter.means() | batch_metrics(batch, scores, parts) | clock.times()
        finish_step(run, metrics | critic_metrics(batch, critic_meter))


def prepare(run):
    """What this algorithm needs besides the policy: a critic, and the reference for the penalty."""
    critic = Critic(load_policy(find_model("POLICY_MODEL"))).to(DEVICE)
    run.trained["critic"] = (critic, new_optimizer(critic, CRITIC_LEARNING_RATE))
    if KL_COEF:
        run.reference = load_policy(find_model("POLICY_MODEL"), frozen=True)


# =========================================== Critic =============================================


class Critic(torch.nn.Module):
    """A network of the policy's architecture, started from its weights, with one number per state
    in place of the logits; that head starts at zero: at first nothing is foretold."""

    def __init__(self, model):
        super().__init__()
        self.base_model, self.config = model.base_model, model.config
        self.head = torch.nn.Linear(model.config.hidden_size, 1)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)

    @property
    def device(self):
        """Where the weights are."""
        return self.head.weight.device


def state_values(critic, batch):
    """The critic's V before each completion token is drawn, (b, T) float32; 0 in padding."""
    def value(states, _):
        return (F.linear(states.float(), critic.head.weight, critic.head.bias)[:, 0],)

    with torch.autocast(critic.device.type, enabled=False):
        return at_tokens(critic, batch, value)[0]


def value_loss(values, old_values, returns):
    """The clipped value loss of every token, and where the clip cuts its gradient. (b, T) each.

    The larger of two squared errors, halved: of the value, and of the value kept within VALUE_CLIP
    of the old one: the policy's clip, for the critic.

    >>> one = torch.ones(1, 1)
    >>> loss, clipped = value_loss(0.5 * one, 0.0 * one, 1.0 * one)  # 0.8 squared / 2
    >>> round(loss.item(), 4), clipped.item()
    (0.32, 1.0)
    """
    free = (values - returns).square()
    if not VALUE_CLIP:
        return 0.5 * free, torch.zeros_like(free)
    near = old_values + (values - old_values).clamp(-VALUE_CLIP, VALUE_CLIP)
    kept = (near - returns).square()
    cut = (kept > free) & ((values - old_values).abs() > VALUE_CLIP)
    return 0.5 * torch.max(free, kept), cut.float()


# ========================================= Advantages ===========================================


def token_rewards(run, rows, batch, scores):
    """The reward of each token (B, T): minus the KL penalty, plus the score at the last real token
    (or what each segment added, at its last token, where segments are rewarded).

    The penalty is the plain log-ratio to the reference, k1: in a reward nothing is differentiated,
    and k1 has the right mean. NO_END_PENALTY comes off the score of an answer that was cut off.
    """
    mask = batch.completion_mask
    rewards = torch.zeros_like(mask)
    if run.reference is not None:
        rewards = -KL_COEF * (batch.old_logps - batch.ref_logps) * mask
    last = mask.sum(1).long() - 1                                         # (B,)
    line = torch.arange(len(mask), device=mask.device)
    if USE_SEQUENCE_LEVEL_REWARD:
        rewards[line, last] += scores
    else:
        increments, segments = segment_rewards(run, rows, batch)          # (B, K), (B, T)
        following = F.pad(segments[:, 1:], (0, 1), value=-1)
        ends = (segments != following) & mask.bool()
        ends[line, last] = True
        ends &= torch.arange(mask.shape[1], device=mask.device) <= last[:, None]
        rewards += increments.gather(1, segments).nan_to_num(0.0) * ends
    rewards[line, last] -= NO_END_PENALTY * (~batch.ended).float()
    return rewards


def compute_advantages(rewards, values, mask):
    """Generalised advantage estimation (Eq. 11 and 12, arXiv:1707.06347), all (B, T).

    The answer is over after its last token: nothing is foretold beyond it, and the value there is
    0, also for an answer that MAX_NEW_TOKENS cut off (it gets no more reward either).

    >>> rewards, values = torch.tensor([[0.0, 1.0, 9.0]]), torch.tensor([[0.5, 0.25, 9.0]])
    >>> compute_advantages(rewards, values, torch.tensor([[1.0, 1.0, 0.0]])).tolist()
    [[0.4624999761581421, 0.75, 0.0]]
    """
    advantages, following, value = torch.zeros_like(rewards), 0.0, 0.0
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + GAMMA * value - values[:, t]
        following = (delta + GAMMA * GAE_LAMBDA * following) * mask[:, t]
        value = values[:, t] * mask[:, t]
        advantages[:, t] = following
    return advantages


def whiten(advantages, mask):
    """Advantages with mean 0 and std 1 over the real tokens of the rollout, 0 in padding."""
    real = advantages[mask.bool()]
    if without_spread(real[None]):  # float noise, which the std would blow up
        return torch.zeros_like(advantages)
    return (advantages - real.mean()) / (real.std(correction=0) + 1e-8) * mask


def critic_metrics(batch, meter):
    """How well the critic foretells: loss, clipping, explained variance; and the penalty's KL."""
    mask = batch.completion_mask.bool()
    returns, errors = batch.returns[mask], (batch.returns - batch.old_values)[mask]
    means = meter.means()
    metrics = {"value_loss": means["loss"], "value_clip_ratio": means["value_clip_ratio"],
               "critic_grad_norm": means["grad_norm"],
               "explained_variance": float(1 - errors.var() / returns.var().clamp(min=1e-12)),
               "value_mean": float(batch.old_values[mask].mean()),
               "return_mean": float(returns.mean())}
    if batch.ref_logps is not None:
        metrics["kl"] = float((batch.old_logps - batch.ref_logps)[mask].mean())
    return metrics


# ============================================ Loss ==============================================


def policy_loss(logps, old_logps, advantages, mask):
    """The clipped token-ratio loss at every token (Eq. 7, negated: to be minimised).

    logps, old_logps: (b, T) log-probs under the trained and the sampling policy; advantages (b, T);
    mask (b, T), 1 up to and including the end token. Returns the token losses and statistics,
    (b, T) each; `token_weights` takes their mean.

    >>> old, new = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-0.9, -1.5]])
    >>> loss, statistics = policy_loss(new, old, torch.ones(1, 2), torch.ones(1, 2))
    >>> [f"{x:.4f}" for x in loss[0]]     # exp(0.1), inside the range; exp(0.5), cut off at 1.2
    ['-1.1052', '-1.2000']
    """
    low, high = clip_range()
    log_ratio = ((logps - old_logps) * mask).clamp(max=20.0)  # keeps inf x 0 from the gradient
    ratio = torch.exp(log_ratio)                                               # (b, T)
    clipped = ratio.clamp(1 - low, 1 + high)
    loss = -torch.min(ratio * advantages, clipped * advantages)
    moved = (ratio - 1 - log_ratio).detach()  # k3 of the update: how far the policy has moved
    return loss, ratio_statistics(ratio.detach(), advantages, low, high) | {"approx_kl": moved}


def clip_range():
    """CLIP_RANGE as (low, high)."""
    return CLIP_RANGE if isinstance(CLIP_RANGE, tuple) else (CLIP_RANGE, CLIP_RANGE)


def token_weights(mask):
    """Each token's weight in its minibatch's loss: the mean over all tokens.

    mask: (b, T). Made for the whole minibatch before it is cut into micro-batches, so that
    MICRO_BATCH changes the memory and nothing else.

    >>> token_weights(torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])).tolist()
    [[0.25, 0.25, 0.25], [0.25, 0.0, 0.0]]
    """
    return mask / mask.sum().clamp(min=1)


def check_algorithm():
    """Stop with one line if the Algorithm constants cannot work."""
    pair = clip_range()
    if len(pair) != 2 or not all(type(x) in (int, float) and x > 0 for x in pair) or pair[0] > 1:
        fail(f"CLIP_RANGE={CLIP_RANGE}: expected a positive number or a pair (low, high), low <= 1")
    if not 0 <= GAMMA <= 1 or not 0 <= GAE_LAMBDA <= 1:
        fail(f"GAMMA={GAMMA}, GAE_LAMBDA={GAE_LAMBDA}: expected numbers from 0 to 1")
    check_at_least(PPO_EPOCHS=1, ENTROPY_COEF=0, KL_COEF=0, NO_END_PENALTY=0, CRITIC_WARMUP=0,
                   CRITIC_LEARNING_RATE=0, VALUE_CLIP=0, TARGET_APPROX_KL=0)


def describe_algorithm():
    """The algorithm's line of the start-up block."""
    updates = PPO_EPOCHS * BATCH_SIZE * GROUP_SIZE // MINIBATCH
    return (f"{PPO_EPOCHS} passes = {updates} updates per rollout; clip {CLIP_RANGE}; GAE {GAMMA}, "
            f"{GAE_LAMBDA}; critic: learning rate {CRITIC_LEARNING_RATE}, {CRITIC_WARMUP} rollouts "
            f"alone; KL {KL_COEF} in the reward; entropy {ENTROPY_COEF}")


def algorithm_metrics():
    """The columns of metrics.csv that are this algorithm's own."""
    return ["policy_loss", "entropy_loss", "kl", "approx_kl", "value_loss", "value_clip_ratio",
            "critic_grad_norm", "explained_variance", "value_mean", "return_mean"]


def algorithm_panels():
    """The panels of the plot that are this algorithm's own: (title, {metric: label})."""
    return [("KL divergence, nats per token", {"kl": "to the starting policy",
                                               "approx_kl": "of the update"}),
            ("Value loss", {"value_loss": ""}),
            ("Explained variance of the returns", {"explained_variance": ""}),
            ("Critic", {"value_mean": "mean value", "return_mean": "mean return"})]


# ==== The algorithm ends here. From here on the scripts are the same: you may stop reading. =====

# =========================================== Rollout ============================================


@dataclass
class Batch:
    """Completions of a rollout, or some of them: B completions of P prompts, at most T tokens each.

    A prompt's tokens are kept once, padded on the left; completions are padded on the right, and
    `completion_mask` is 1.0 up to and including the first end token. Log-probs are float32.
    """
    prompt_ids: torch.Tensor  # (P, L)
    prompt_mask: torch.Tensor  # (P, L)
    prompt_index: torch.Tensor  # (B,) whose completion a row is
    completion_ids: torch.Tensor  # (B, T)
    completion_mask: torch.Tensor  # (B, T)
    sampled_logps: torch.Tensor  # (B, T) as they were when the tokens were drawn
    ended: torch.Tensor  # (B,) bool: False where MAX_NEW_TOKENS cut the completion off
    old_logps: torch.Tensor | None = None  # (B, T) the sampling policy's, for the ratio
    ref_logps: torch.Tensor | None = None  # (B, T)
    advantages: torch.Tensor | None = None  # (B, T)
    old_values: torch.Tensor | None = None  # (B, T) a critic's, if there is one
    returns: torch.Tensor | None = None  # (B, T) what the critic should have said
    weights: torch.Tensor | None = None  # (B, T)

    def rows(self, index):
        """The batch of the given rows (1-D index), trimmed to the longest of them."""
        longest = int(self.completion_mask[index].sum(1).max())
        picked = {"prompt_index": self.prompt_index[index], "ended": self.ended[index]}
        for name in ("completion_ids", "completion_mask", "sampled_logps", "old_logps", "ref_logps",
                     "advantages", "old_values", "returns", "weights"):
            value = getattr(self, name)
            picked[name] = None if value is None else value[index, :longest]
        return replace(self, **picked)


@torch.no_grad()
def sample_groups(policy, tokenizer, rows, group_size, generator, temperature=None, top_p=1.0):
    """Sample `group_size` completions of each row's prompt: a Batch of len(rows) x group_size.

    Each prompt is run once and its keys and values shared by its group; all completions are decoded
    together, and those that have ended leave. Of the model's generation_config only the end ids are
    used (Qwen3's also says top_k 20): what is sampled is softmax(logits / temperature), which is
    what is trained. `temperature`: TEMPERATURE unless given; 0 is greedy.
    """
    temperature = TEMPERATURE if temperature is None else temperature
    device, pad = policy.device, tokenizer.pad_token_id
    ends = torch.tensor(end_ids(policy, tokenizer), device=device)
    prompt_ids, prompt_mask = left_pad([row["prompt_ids"] for row in rows], pad, device)
    index = torch.arange(len(rows), device=device).repeat_interleave(group_size)        # (B,)
    count = len(index)
    ids = torch.full((count, MAX_NEW_TOKENS), pad, device=device)                       # (B, T)
    logps = torch.zeros(count, MAX_NEW_TOKENS, device=device)
    mask = torch.zeros(count, MAX_NEW_TOKENS, device=device)
    ended = torch.zeros(count, dtype=torch.bool, device=device)

    with autocast(device):
        cache = DynamicCache(config=policy.config)
        place = positions(prompt_mask)
        hidden = run_model(policy, prompt_ids, prompt_mask, place, cache)[:, -1]        # (P, H)
        if not hidden.isfinite().all():
            fail("the policy's outputs are not finite; expected numbers: lower LEARNING_RATE, go "
                 "on from an earlier checkpoint")
        cache.batch_select_indices(index)
        hidden, seen, place = hidden[index], prompt_mask[index], place[index, -1:]      # (B, ...)
        live = torch.arange(count, device=device)               # rows that are still being decoded
        for t in tqdm(range(MAX_NEW_TOKENS), "rollout", unit="token", leave=False, delay=5):
            scores = torch.log_softmax(head(policy, hidden) / (temperature or 1.0), -1)  # (live, V)
            token = draw(scores, temperature, top_p, generator)                         # (live,)
            running = ~ended[live]
            ids[live, t] = torch.where(running, token, pad)
            logps[live, t] = scores.gather(1, token[:, None])[:, 0] * running
            mask[live, t] = running.float()
            ended[live] |= torch.isin(token, ends)
            running = ~ended[live]
            left = int(running.sum())
            if left == 0:
                break
            if left <= 0.9 * len(live):  # not at every end: it copies the cache
                live, token, seen, place = (x[running] for x in (live, token, seen, place))
                cache.batch_select_indices(running.nonzero()[:, 0])
            if t + 1 < MAX_NEW_TOKENS:
                seen, place = F.pad(seen, (0, 1), value=1), place + 1
                hidden = run_model(policy, token[:, None], seen, place, cache)[:, -1]   # (live, H)
    ids, mask, logps = ids[:, :t + 1], mask[:, :t + 1], logps[:, :t + 1]
    return Batch(prompt_ids, prompt_mask, index, ids, mask, logps, ended)


def draw(logps, temperature, top_p, generator):
    """One token per row of (n, V) log-probs: greedy at temperature 0, else from the nucleus."""
    if temperature == 0:
        return logps.argmax(-1)
    probs = logps.exp()
    if top_p < 1.0:
        ordered, order = probs.sort(-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p  # the token that crosses top_p stays
        probs = probs.masked_fill(outside.scatter(1, order, outside), 0.0)
    return torch.multinomial(probs, 1, generator=generator)[:, 0]


def end_ids(policy, tokenizer):
    """Every id that ends a completion. Qwen3 has two, and the second is its padding id as well."""
    configured = policy.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in [*configured, tokenizer.eos_token_id] if i is not None})


def left_pad(sequences, pad_id, device):
    """Token lists as ids and mask (P, L), padded so that every prompt ends in the last column."""
    width = max(map(len, sequences))
    ids = torch.tensor([[pad_id] * (width - len(s)) + s for s in sequences], device=device)
    mask = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in sequences], device=device)
    return ids, mask


def positions(mask):
    """Position of each token among the unmasked ones of its row, (n, L)."""
    return (mask.cumsum(1) - 1).clamp(min=0)


# ====================================== Log-probabilities =======================================


def autocast(device):
    """bfloat16 arithmetic over float32 weights, if DTYPE says so. Log-probs are float32 anyway."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=DTYPE == "bfloat16")


def run_model(model, ids, mask, position_ids, cache):
    """Last hidden states (n, L, H) of a causal model; `cache` is read and extended."""
    return model.base_model(input_ids=ids, attention_mask=mask, position_ids=position_ids,
                            past_key_values=cache, use_cache=True).last_hidden_state


def head(model, hidden):
    """Logits in float32: GSPO's clip range (3e-4) is far below bfloat16's resolution (8e-3)."""
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(hidden.float(), model.get_output_embeddings().weight.float())


def score_tokens(model, batch):
    """Log-probs at TEMPERATURE and exact entropy at each completion token, (b, T); 0 in padding."""
    def score_chunk(states, ids):
        logits = head(model, states) / TEMPERATURE                            # (n, V)
        normaliser = logits.logsumexp(-1)
        expected = (torch.softmax(logits, -1) * logits).sum(-1)
        return logits.gather(1, ids[:, None])[:, 0] - normaliser, normaliser - expected

    def score(states, ids):
        size = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
        if len(ids) <= size:
            return score_chunk(states, ids)
        # Each chunk's logits are thrown away, and made again in the backward pass.
        chunks = [checkpoint(score_chunk, s, i, use_reentrant=False)
                  for s, i in zip(states.split(size), ids.split(size))]
        return tuple(torch.cat(column) for column in zip(*chunks))

    return at_tokens(model, batch, score)


def at_tokens(model, batch, function):
    """`function`(states (n, H), ids (n,)) -> tuple of (n,), of the state before each completion
    token. Returns a tuple of (b, T), 0 in padding.

    Each prompt's keys and values are computed once, with gradient, and shared by its completions;
    these are run LENGTH_BUCKET at a time, from the shortest to the longest: little is padding.
    """
    prompts, index = torch.unique(batch.prompt_index, return_inverse=True)
    ids, seen = batch.prompt_ids[prompts], batch.prompt_mask[prompts]         # (p, L)
    cache = DynamicCache(config=model.config)
    with autocast(model.device):
        last = run_model(model, ids, seen, positions(seen), cache)[:, -1:]    # (p, 1, H)
    order = batch.completion_mask.sum(1).argsort(stable=True)
    results = []
    for rows in order.split(LENGTH_BUCKET):
        some, of = batch.rows(rows), index[rows]                              # their prompts
        mask = some.completion_mask.bool()                                    # (r, t)
        states = last.index_select(0, of)                   # token 0 is drawn at the prompt's end,
        if mask.shape[1] > 1:                               # token t at token t - 1
            before = torch.cat([seen[of], mask[:, :-1].long()], 1)            # (r, L + t - 1)
            with autocast(model.device):
                place = positions(before)[:, seen.shape[1]:]                  # (r, t - 1)
                rest = run_model(model, some.completion_ids[:, :-1], before, place,
                                 select_cache(model, cache, of))
            states = torch.cat([states, rest], 1)                             # (r, t, H)
        blank = torch.zeros(mask.shape, device=mask.device)
        padding = (0, batch.completion_mask.shape[1] - mask.shape[1])
        results.append([F.pad(blank.masked_scatter(mask, values), padding)
                        for values in function(states[mask], some.completion_ids[mask])])
    back = order.argsort()
    return tuple(torch.cat(column)[back] for column in zip(*results))         # (b, T) each


def select_cache(model, cache, index):
    """A copy of the cache with the rows `index`, in the autograd graph. index_select, because the
    gradient of keys[index] is summed in any order on several threads: runs would not repeat."""
    copy = DynamicCache(config=model.config)
    for i, layer in enumerate(cache.layers):
        copy.update(layer.keys.index_select(0, index), layer.values.index_select(0, index), i)
    return copy


@torch.no_grad()
def score_without_grad(model, batch):
    """Log-probs (B, T) of a whole batch, a micro-batch at a time."""
    logps = torch.zeros_like(batch.completion_mask)
    for rows in torch.arange(len(logps), device=logps.device).split(MICRO_BATCH):
        some = score_tokens(model, batch.rows(rows))[0]
        logps[rows, :some.shape[1]] = some
    return logps


def behaviour_logps(policy, batch):
    """The sampling policy's log-probs (B, T). In float32 the sampler's own are exact; bfloat16
    rounds decoding and scoring apart by more than GSPO's clip range: then they are scored again."""
    exact = DTYPE == "float32"
    return batch.sampled_logps if exact else score_without_grad(policy, batch)


def minibatches(batch, passes, generator):
    """`passes` times over the batch in new random order, MINIBATCH completions each.

    Groups stay together: their prompt is then run once."""
    groups = torch.arange(len(batch.prompt_index)).reshape(-1, GROUP_SIZE)        # (P, G) rows
    for _ in range(passes):
        order = groups[torch.randperm(len(groups), generator=generator)].flatten()
        for rows in order.to(batch.prompt_index.device).split(MINIBATCH):
            yield batch.rows(rows)


def micro_batches(minibatch):
    """The minibatch in pieces of MICRO_BATCH completions."""
    rows = torch.arange(len(minibatch.prompt_index), device=minibatch.prompt_index.device)
    for some in rows.split(MICRO_BATCH):
        yield minibatch.rows(some)


def new_optimizer(module, learning_rate):
    """AdamW over a module's weights; `initial_lr` is what the warm-up grows to."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=learning_rate, betas=ADAM_BETAS,
                                  eps=ADAM_EPSILON, weight_decay=WEIGHT_DECAY, fused=True)
    optimizer.param_groups[0]["initial_lr"] = learning_rate
    return optimizer


def optimiser_step(run, name, meter, frozen=False):
    """One AdamW step of a trained module on its gradient, clipped to MAX_GRAD_NORM; stops with one
    line if loss or gradient are not finite. `frozen`: the gradient is thrown away."""
    module, optimizer = run.trained[name]
    norm = float(torch.nn.utils.clip_grad_norm_(module.parameters(), MAX_GRAD_NORM or math.inf))
    loss = meter.end_minibatch(norm)
    if not math.isfinite(loss) or not math.isfinite(norm):
        fail(f"step {run.step + 1}: the {name}'s loss is {loss} and its gradient norm {norm}; "
             f"expected finite numbers. The weights were not saved: lower LEARNING_RATE "
             f"({LEARNING_RATE}) and go on from a checkpoint in {run.folder}")
    if frozen:
        return optimizer.zero_grad()
    run.updates += name == "policy"
    done = 1 + int(next(iter(optimizer.state.values()), {"step": 0})["step"])  # this step included
    group = optimizer.param_groups[0]
    group["lr"] = group["initial_lr"] * min(1.0, done / max(1, WARMUP_STEPS))
    optimizer.step()
    optimizer.zero_grad()
    meter.learning_rate = group["lr"]


class Meter:
    """A step's means: losses over minibatches, statistics over all tokens, never means of means."""

    def __init__(self):
        self.losses, self.totals, self.tokens = defaultdict(float), defaultdict(float), 0.0
        self.low, self.high, self.norms, self.closed = math.inf, -math.inf, [], 0.0
        self.learning_rate = 0.0

    def add(self, micro, losses, statistics):
        """Add a micro-batch, (b, T) each: losses by their weights, statistics by token."""
        mask = micro.completion_mask
        for name, value in losses.items():
            self.losses[name] += (value.detach() * micro.weights).sum()
        for name, value in statistics.items():
            self.totals[name] += (value.detach() * mask).sum()
        self.tokens += mask.sum()
        if "ratio" in statistics:
            ratio = statistics["ratio"][mask.bool()]
            self.low = min(self.low, float(ratio.min()))
            self.high = max(self.high, float(ratio.max()))

    def end_minibatch(self, norm):
        """Count a minibatch; returns its loss."""
        self.norms.append(norm)
        loss, self.closed = float(self.losses["loss"]) - self.closed, float(self.losses["loss"])
        return loss

    def means(self):
        """The step's metrics by name."""
        means = {name: float(total) / len(self.norms) for name, total in self.losses.items()}
        means |= {name: float(total / self.tokens) for name, total in self.totals.items()}
        if "ratio" in means:
            means |= {"ratio/mean": means.pop("ratio"), "ratio/min": self.low,
                      "ratio/max": self.high}
        return means | {"grad_norm": mean(self.norms), "learning_rate": self.learning_rate}


def ratio_statistics(ratio, advantages, low, high):
    """The ratio, and the tokens whose gradient is cut: below, A < 0; above, A > 0. (b, T) each."""
    below = ((ratio < 1 - low) & (advantages < 0)).float()
    above = ((ratio > 1 + high) & (advantages > 0)).float()
    return {"ratio": ratio, "clip_ratio/low_mean": below, "clip_ratio/high_mean": above,
            "clip_ratio/region_mean": below + above}


# =========================================== Reward =============================================


def last_number(text):
    """The last number in a text, as a Decimal, or None. A minus counts unless it subtracts.

    >>> [str(last_number(text)) for text in ("so -1,234.50", "12-5", "none")]
    ['-1234.50', '5', 'None']
    """
    digits = r"[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?"
    found = re.findall(rf"(?<![0-9.)])-{digits}|{digits}", text.replace("\N{MINUS SIGN}", "-"))
    return Decimal(found[-1].replace(",", "")) if found else None


def verify(questions, responses, references):
    """1.0 where the response's last number equals the reference answer's last number, else 0.0."""
    wanted = [last_number(reference) for reference in references]
    return [float(w is not None and last_number(r) == w) for r, w in zip(responses, wanted)]


def model_scorer(model, tokenizer):
    """The reward model as a function (questions, responses, references) -> scores.

    It was trained on pairs, `tokenizer(question, answer)` = [CLS] q [SEP] a [SEP], and reads its
    score off the first token: one joined string would be something it never saw. Equal pairs are
    scored once, and pairs of like length together.
    """
    def score(questions, responses, references):
        pairs = sorted(set(zip(questions, responses)), key=lambda pair: (len("".join(pair)), pair))
        scores = {}
        for start in range(0, len(pairs), REWARD_BATCH):
            some = pairs[start:start + REWARD_BATCH]
            inputs = tokenizer(*map(list, zip(*some)), truncation="longest_first", padding=True,
                               max_length=MAX_REWARD_TOKENS, return_tensors="pt")
            with torch.inference_mode():
                logits = model(**inputs.to(model.device)).logits[:, 0].float()      # (n,)
            scores.update(zip(some, (logits.sigmoid() if REWARD_SIGMOID else logits).tolist()))
        return [scores[pair] for pair in zip(questions, responses)]
    return score


def checked_scores(name, function, questions, responses, references):
    """A source's scores as floats; stops with one line when it raises or returns anything else."""
    wanted = f"expected {len(responses)} finite numbers, one for each response"
    try:
        scores = function(questions, responses, references)
    except Exception as error:  # a user's function may raise anything: its own words are the help
        fail(f"the reward source {name!r} raised {short(error)}; {wanted}")
    try:
        scores = list(scores)
    except TypeError:
        fail(f"the reward source {name!r} returned {brief(scores)}; {wanted}")
    if len(scores) != len(responses):
        fail(f"the reward source {name!r} returned {len(scores)} scores; {wanted}")
    numbers = []
    for response, score in zip(responses, scores):
        with suppress(TypeError, ValueError):
            numbers.append(float(score))
            if math.isfinite(numbers[-1]):
                continue
        fail(f"the reward source {name!r} returned {brief(score)} for {brief(response)}; {wanted}")
    return numbers


def reward_of(scorers, rows, responses):
    """Rewards, a list, and each source's unweighted scores by name, the verifier among them."""
    questions, references = [row["question"] for row in rows], [row["answer"] for row in rows]
    parts = {name: checked_scores(name, function, questions, responses, references)
             for name, function in scorers.items()}
    weights = [REWARD_WEIGHTS.get(name, 0.0) for name in parts]
    return [sum(w * s for w, s in zip(weights, scores)) for scores in zip(*parts.values())], parts


def score_completions(run, rows, batch):
    """Score a rollout: its rewards (B,), and each source's unweighted scores by name."""
    owners = [rows[i] for i in batch.prompt_index.tolist()]
    rewards, parts = reward_of(run.scorers, owners, decode(run.tokenizer, completion_tokens(batch)))
    return torch.tensor(rewards, device=batch.completion_ids.device), parts


def segment_rewards(run, rows, batch):
    """What each segment of an answer adds to the reward, (B, K), and each token's segment, (B, T).

    An answer is cut where SEGMENT_END matches, and every prefix is scored; increments sum to the
    answer's reward less an empty answer's. NaN where an answer has fewer than K segments.
    """
    tokens, segments = completion_tokens(batch), torch.zeros_like(batch.completion_ids)
    cuts = [[0, *segment_ends(run.tokenizer, ids)] for ids in tokens]
    owners = [rows[i] for i, ends in zip(batch.prompt_index.tolist(), cuts) for _ in ends]
    prefixes = [ids[:end] for ids, ends in zip(tokens, cuts) for end in ends]
    scores, _ = reward_of(run.scorers, owners, decode(run.tokenizer, prefixes))
    increments = torch.full((len(cuts), max(map(len, cuts)) - 1), math.nan)
    for i, ends in enumerate(cuts):
        mine, scores = torch.tensor(scores[:len(ends)]), scores[len(ends):]
        increments[i, :len(ends) - 1] = mine.diff()
        for k, (start, end) in enumerate(zip(ends, ends[1:])):
            segments[i, start:end] = k
    return increments.to(segments.device), segments


def segment_ends(tokenizer, ids):
    """Where the segments of one completion end (token counts, the last is len(ids)). A segment and
    what follows it hold text: neither white space nor an end token is a segment of its own."""
    ends, start = [], 0
    for t in range(1, len(ids)):
        text, rest = decode(tokenizer, [ids[start:t], ids[t:]])
        if text.strip() and rest.strip() and re.search(SEGMENT_END, text):
            ends.append(t)
            start = t
    return [*ends, len(ids)]


def completion_tokens(batch):
    """The completions as lists of ids, without padding."""
    lengths = batch.completion_mask.sum(1).long().tolist()
    return [ids[:n] for ids, n in zip(batch.completion_ids.tolist(), lengths)]


def decode(tokenizer, tokens):
    """Lists of ids as texts, without special tokens."""
    return tokenizer.batch_decode(tokens, skip_special_tokens=True)


def group_std(groups, correction=1):
    """Standard deviation of each row of (groups, n), NaN left out. Returns (groups, 1)."""
    centred = groups - groups.nanmean(1, keepdim=True)
    count = groups.isfinite().sum(1, keepdim=True)
    variance = centred.square().nansum(1, keepdim=True) / (count - correction).clamp(min=1)
    return variance.sqrt()


def without_spread(groups):
    """(groups, 1) bool: where the values of a row of (groups, n) are equal up to float noise."""
    scale = groups.abs().nan_to_num(0.0).amax(1, keepdim=True).clamp(min=1.0)
    return group_std(groups) < 1e-6 * scale


def batch_metrics(batch, rewards, parts):
    """Metrics of a rollout: reward, accuracy, lengths, sampler against trainer."""
    groups, lengths = rewards.reshape(-1, GROUP_SIZE), batch.completion_mask.sum(1)
    mask = batch.completion_mask.bool()
    advantages = (batch.advantages * batch.completion_mask).sum(1) / lengths  # (B,)
    apart = (batch.sampled_logps - batch.old_logps)[mask].abs().mean()
    metrics = {
        "reward": rewards.mean(), "reward_std": group_std(groups).mean(),
        "frac_reward_zero_std": without_spread(groups).float().mean(),
        "advantage/mean": advantages.mean(), "advantage/std": advantages.std(correction=0),
        "completions/mean_length": lengths.mean(), "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": (~batch.ended).float().mean(),
        "sampling_logp_difference": apart, "tokens": mask.sum(),
    }
    sources = {f"rewards/{name}": sum(scores) / len(scores) for name, scores in parts.items()}
    metrics = {name: float(value) for name, value in metrics.items()} | sources
    return metrics | {"accuracy": sources["rewards/verifier"]}


# ============================================ Data ==============================================


def read_table(entry, name):
    """One entry of a dataset constant as a list of {question, answer}, or one line and exit."""
    if (not isinstance(entry, dict) or not {"path", "input", "output"} <= set(entry)
            or not all(isinstance(value, str) for value in entry.values())):
        fail(f"{name}: found {entry!r}; expected a dict of strings: path, input, output (and type)")
    path, columns = entry["path"], (entry["input"], entry["output"])
    kind = entry.get("type") or path.rsplit(".", 1)[-1]
    readers = {"parquet": pd.read_parquet,  # dtype=False: text that looks like a number stays text
               "json": lambda file: pd.read_json(file, dtype=False),
               "jsonl": lambda file: pd.read_json(file, dtype=False, lines=True)}
    if kind not in readers:
        fail(f"{name}: {path} has the type {kind!r}; expected {', '.join(readers)}")
    files = [path] if "://" in path else sorted(glob.glob(path) or
                                                glob.glob(str(project_root() / path)))
    if not files:
        fail(f"{name}: no file {path}, neither here nor in {project_root()}; expected a path, a "
             "pattern, or hf://datasets/...; the files of data/ are made by data/build.py")
    rows = []
    for file in files:
        try:
            table = readers[kind](file)
        except Exception as error:  # readers and networks raise anything; the path is the help
            fail(f"{name}: {file} is no readable {kind} file ({short(error)}); expected one" + (
                 ": download it and set its path, or PROFILE=embedded" if "://" in file else ""))
        if table.empty:
            fail(f"{name}: {file} has no rows; expected at least one")
        for column in columns:
            if column not in table:
                fail(f"{name}: {file} has no column {column!r}; expected one of "
                     f"{', '.join(map(str, table.columns))}")
            if nulls := int(table[column].isna().sum()):
                fail(f"{name}: {file} has {nulls} empty values in the column {column!r}; expected "
                     "none: drop those rows")
            odd = [v for v in table[column] if not isinstance(v, (str, int, float))]
            if odd:
                fail(f"{name}: {file} has {brief(odd[0])} in the column {column!r}; expected text")
        rows += [{"question": str(question), "answer": str(answer)}
                 for question, answer in zip(*(table[column] for column in columns))]
    return rows


def load_rows(datasets, name):
    """All rows of a dataset constant, in order."""
    if not isinstance(datasets, list) or not datasets:
        fail(f"{name}: found {datasets!r}; expected a list of dicts with path, input and output")
    rows = [row for entry in datasets for row in read_table(entry, name)]
    if not rows:
        fail(f"{name}: no rows in {', '.join(str(entry['path']) for entry in datasets)}; expected "
             "at least one")
    return rows


def with_prompts(rows, tokenizer, name):
    """The rows with `prompt_ids` by the chat template, less those above MAX_PROMPT_TOKENS."""
    texts = [tokenizer.apply_chat_template([{"role": "user", "content": row["question"]}],
                                           tokenize=False, add_generation_prompt=True,
                                           enable_thinking=ENABLE_THINKING) for row in rows]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    kept = [row | {"prompt_ids": i} for row, i in zip(rows, ids) if len(i) <= MAX_PROMPT_TOKENS]
    if not kept:
        fail(f"{name}: the shortest prompt has {min(map(len, ids))} tokens; expected at most "
             f"MAX_PROMPT_TOKENS = {MAX_PROMPT_TOKENS}: raise it")
    if len(kept) < len(rows):
        print(f"{name}: dropped {len(rows) - len(kept)} of {len(rows)} prompts, longer than "
              f"MAX_PROMPT_TOKENS = {MAX_PROMPT_TOKENS}")
    return kept


def next_questions(run, count):
    """The next `count` rows. Each pass over the data has an order of its own, from SEED."""
    rows = []
    for place in range(run.questions, run.questions + count):
        epoch, i = divmod(place, len(run.train_rows))
        if i == 0 or not rows:
            order = torch.Generator().manual_seed(SEED + 1000 * epoch)
            order = torch.randperm(len(run.train_rows), generator=order).tolist()
        rows.append(run.train_rows[order[i]])
    run.questions += count
    return rows


# ========================================= Evaluation ===========================================


def evaluate(run):
    """Held-out accuracy, sampled and greedy, the reward there, and the first answers as text.

    Always the same questions and random numbers, from a generator of its own: evaluating more often
    does not change the training.
    """
    clock, rows = Clock(), run.eval_rows
    generator = torch.Generator(run.policy.device).manual_seed(SEED + 12345)
    texts, lengths = {}, {}
    for mode, temperature in (("sampled", EVAL_TEMPERATURE), ("greedy", 0)):
        tokens = []
        for start in range(0, len(rows), EVAL_BATCH):
            some = rows[start:start + EVAL_BATCH]
            tokens += completion_tokens(sample_groups(run.policy, run.tokenizer, some, 1, generator,
                                                      temperature, TOP_P))
        texts[mode] = decode(run.tokenizer, tokens)
        lengths[mode] = [len(ids) for ids in tokens]
    rewards, parts = reward_of(run.scorers, rows, texts["sampled"])
    right = verify(None, texts["greedy"], [row["answer"] for row in rows])
    clock.lap("eval")
    metrics = {"eval/accuracy": mean(parts["verifier"]),
               "eval/accuracy_greedy": mean(right),
               "eval/reward": mean(rewards), "eval/mean_length": mean(lengths["sampled"])}
    lines = []
    for i in range(min(SHOW_SAMPLES, len(rows))):
        scores = ", ".join(f"{name} {values[i]:.2f}" for name, values in parts.items())
        lines += [f"  {rows[i]['question']}", f"    {texts['sampled'][i]}",
                  f"    reward {rewards[i]:.2f} ({scores})"]
    return metrics | clock.times(total=False), "\n".join(lines)


def mean(values):
    """The mean of a list."""
    return sum(values) / len(values)


# ==================================== Checkpoints and plots =====================================


def metric_names():
    """The columns of metrics.csv; the README beside this file explains each."""
    shared = """
        reward reward_std rewards/model rewards/verifier rewards/function accuracy
        frac_reward_zero_std advantage/mean advantage/std entropy clip_ratio/low_mean
        clip_ratio/high_mean clip_ratio/region_mean ratio/min ratio/mean ratio/max
        completions/mean_length completions/min_length completions/max_length
        completions/clipped_ratio sampling_logp_difference grad_norm learning_rate num_tokens
        time/rollout time/reward time/logps time/update step_time peak_memory
        eval/accuracy eval/accuracy_greedy eval/reward eval/mean_length time/eval
    """
    return ["step", "epoch", "loss", *algorithm_metrics(), *shared.split()]


class Clock:
    """Seconds per phase. Waits for the GPU at each lap: every phase pays for its own work."""

    def __init__(self):
        self.laps, self.last = {}, self.now()

    def now(self):
        """Seconds, after all queued GPU work."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def lap(self, phase):
        """Add the time since the last lap to `phase`."""
        now = self.now()
        self.laps[phase] = self.laps.get(phase, 0.0) + now - self.last
        self.last = now

    def times(self, total=True):
        """{time/phase: seconds}, and step_time, their sum."""
        times = {f"time/{phase}": seconds for phase, seconds in self.laps.items()}
        return times | ({"step_time": sum(self.laps.values())} if total else {})


def peak_memory():
    """The most memory so far, in GB: of the GPU if there is one, else of the process; NaN if the
    system does not tell (Windows)."""
    if DEVICE != "cpu":
        return torch.cuda.max_memory_allocated(DEVICE) / 1e9
    with suppress(ImportError):
        import resource
        unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    return math.nan


def finish_step(run, metrics):
    """Count the step; evaluate, write its row, save and draw, each when it is due."""
    run.step += 1
    run.num_tokens += int(metrics.pop("tokens"))
    epoch, place = divmod(run.step, run.steps_per_epoch)
    ends = place == 0 or run.step == run.total_steps
    evaluating = ends or (EVAL_EVERY and run.step % EVAL_EVERY == 0)
    metrics |= {"step": run.step, "epoch": run.step / run.steps_per_epoch,
                "num_tokens": run.num_tokens, "peak_memory": peak_memory()}
    shown = {"reward": "reward", "accuracy": "accuracy", "KL": "kl",
             "length": "completions/mean_length", "clipped": "clip_ratio/region_mean"}
    shown = ", ".join(f"{label} {metrics[name]:.3g}" for label, name in shown.items()
                      if name in metrics)
    run.bar.set_postfix_str(shown, refresh=False)
    run.bar.update()
    if evaluating:
        record_evaluation(run, metrics)
    write_metrics(run, metrics)
    if ends or (SAVE_EVERY and run.step % SAVE_EVERY == 0):
        save_checkpoint(run, f"step_{run.step}" if place else f"epoch_{epoch}")
    if evaluating:
        plot_metrics(run)


def record_evaluation(run, metrics):
    """Evaluate into `metrics`; print the accuracy and the sample answers, keep them to be saved."""
    evaluation, samples = evaluate(run)
    metrics |= evaluation
    run.samples = (f"step {metrics['step']}: held-out accuracy {metrics['eval/accuracy']:.3f} "
                   f"sampled, {metrics['eval/accuracy_greedy']:.3f} greedy; reward "
                   f"{metrics['eval/reward']:.3f}; {metrics['eval/mean_length']:.1f} tokens\n"
                   f"{samples}\n")
    tqdm.write(run.samples)


def write_metrics(run, metrics):
    """Append the step's row to metrics.csv, and remember it for the plot."""
    run.history.append(metrics)
    path = run.folder / "metrics.csv"
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, metric_names(), restval="")
        if new:
            writer.writeheader()
        writer.writerow(metrics)
    if run.board is not None:
        for name, value in metrics.items():
            run.board.add_scalar(name, value, metrics["step"])


def save_checkpoint(run, name):
    """Write a checkpoint under a temporary name, then rename it: a kill leaves only whole ones.

    epoch_0, before training, holds samples and constants; later ones also weights (safetensors),
    tokenizer, and what RESUME_FROM needs: optimiser, generators, counters, metrics so far.
    """
    partial = run.folder / f".{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    (partial / "samples.txt").write_text(run.samples, encoding="utf-8")
    (partial / "train_script.py").write_bytes(run.source)
    facts = {"constants": constants()} | run.facts
    (partial / "constants.json").write_text(json.dumps(facts, indent=2))
    if run.step:
        run.policy.save_pretrained(partial)
        run.tokenizer.save_pretrained(partial)
        state = {"sampler": run.sampler.get_state(), "shuffler": run.shuffler.get_state()}
        for part, (module, optimizer) in run.trained.items():
            if part != "policy":
                save_file(module.state_dict(), partial / f"{part}.safetensors")
            state |= {f"{part}.{key}.{i}": value for key, i, value in optimizer_state(optimizer)}
        save_file(state, partial / "trainer_state.safetensors")
        counters = {key: getattr(run, key) for key in run_counters()}
        (partial / "trainer_state.json").write_text(json.dumps(counters))
        shutil.copyfile(run.folder / "metrics.csv", partial / "metrics.csv")
    os.replace(partial, run.folder / name)


def run_counters():
    """The fields of Run that a checkpoint keeps as JSON."""
    return ("step", "updates", "questions", "num_tokens", "state")


def optimizer_state(optimizer):
    """An optimiser's state as (key, parameter number, tensor)."""
    for i, entry in optimizer.state_dict()["state"].items():
        for key, value in entry.items():
            yield key, i, value


def load_checkpoint(run, folder):
    """Put optimisers, generators, counters and metrics back to where `folder` left them."""
    try:
        state = load_file(folder / "trainer_state.safetensors")
        modules = {name: load_file(folder / f"{name}.safetensors")
                   for name in run.trained if name != "policy"}
    except Exception as error:  # safetensors has an exception of its own
        fail(f"RESUME_FROM={folder} is damaged ({short(error)}); expected a whole checkpoint")
    run.sampler.set_state(state.pop("sampler"))
    run.shuffler.set_state(state.pop("shuffler"))
    entries = defaultdict(lambda: defaultdict(dict))
    for name, value in state.items():
        module, key, i = name.split(".")
        entries[module][int(i)][key] = value
    for name, (module, optimizer) in run.trained.items():
        if name in modules:
            module.load_state_dict(modules[name])
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": dict(entries[name]), "param_groups": groups})
    counters = read_json(folder, "trainer_state.json")
    for name in run_counters():
        setattr(run, name, counters[name])
    shutil.copyfile(folder / "metrics.csv", run.folder / "metrics.csv")
    run.history = pd.read_csv(folder / "metrics.csv").to_dict("records")


def plot_metrics(run):
    """Draw training_metrics.png from the metrics so far."""
    table = pd.DataFrame(run.history).reindex(columns=metric_names())
    panels = [
        ("Accuracy", {"accuracy": "training", "eval/accuracy": "held out, sampled",
                      "eval/accuracy_greedy": "held out, greedy"}),
        ("Mean reward", {"reward": "training", "eval/reward": "held out"}),
        ("Policy loss", {"policy_loss": ""}),
        ("Relative advantage", {"advantage/mean": "mean", "advantage/std": "std"}),
        *algorithm_panels(),
        ("Entropy loss, nats", {"entropy_loss": ""}),
        ("Mean response length, tokens", {"completions/mean_length": "training",
                                          "eval/mean_length": "held out"}),
        ("Clip fraction, of tokens", {"clip_ratio/region_mean": "cut",
                                      "clip_ratio/high_mean": "above, A > 0",
                                      "clip_ratio/low_mean": "below, A < 0"}),
        ("Shares", {"completions/clipped_ratio": "truncated answers",
                    "frac_reward_zero_std": "groups without spread"}),
        ("Seconds per step", {"time/update": "update", "time/rollout": "rollout",
                              "time/reward": "reward", "time/logps": "log-probs"}),
    ]
    grid = (math.ceil(len(panels) / 4), 4)
    figure = Figure(figsize=(15, 3 * grid[0]), layout="constrained")
    cells = list(figure.subplots(*grid).flat)
    for axes in cells[len(panels):]:
        axes.remove()
    for axes, (title, curves) in zip(cells, panels):
        for name, label in curves.items():
            points = table[["step", name]].dropna()
            held_out = name.startswith("eval/")
            axes.plot(points["step"], points[name], label=label, marker="o" if held_out else "",
                      markersize=3.5, linewidth=1.8 if held_out else 1.0)
        axes.set_title(title, fontsize=11)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        if "kl" in curves and constants().get("ADAPTIVE_KL"):
            target = constants()["TARGET_KL"]
            axes.axhline(target, color="grey", linestyle="--", linewidth=0.9, label="TARGET_KL")
        if any(curves.values()):
            axes.legend(fontsize=8, frameon=False)
    figure.suptitle(f"{run.facts['script']}: {POLICY_MODEL}, seed {SEED}", fontsize=12)
    figure.supxlabel("step (one rollout and its updates)", fontsize=10)
    partial = run.folder / ".training_metrics.partial.png"
    figure.savefig(partial, dpi=110)
    os.replace(partial, run.folder / "training_metrics.png")


# ======================================== Command line ==========================================


@dataclass
class Run:
    """What a run carries from step to step."""
    folder: Path
    facts: dict  # versions, device, command: what constants.json keeps beside the constants
    source: bytes  # this file as it was at the start
    train_rows: list  # of {question, answer, prompt_ids}
    eval_rows: list
    scorers: dict  # name -> function(questions, responses, references) -> scores
    policy: torch.nn.Module
    trained: dict  # name -> (module, optimiser); "policy" is among them
    tokenizer: object
    sampler: torch.Generator  # draws tokens, on the policy's device
    shuffler: torch.Generator  # orders minibatches
    steps_per_epoch: int
    total_steps: int
    reference: torch.nn.Module | None = None  # the policy as it started, if the algorithm needs it
    state: dict = field(default_factory=dict)  # the algorithm's own numbers; checkpoints keep them
    step: int = 0  # rollouts done
    updates: int = 0  # optimiser steps of the policy done
    questions: int = 0  # training questions drawn
    num_tokens: int = 0  # completion tokens sampled for training
    samples: str = ""  # of the last evaluation
    history: list = field(default_factory=list)
    bar: object = None
    board: object = None  # TensorBoard's writer


def fail(message):
    """Stop with one line on standard error and exit status 1."""
    raise SystemExit(f"error: {message}")


def short(error):
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def brief(value):
    """A value's repr in one line."""
    return " ".join(repr(value).split())[:80]


def project_root():
    """The folder with data/: above this file, or what a saved copy's constants.json names."""
    here = Path(__file__).resolve()
    for folder in here.parents:
        if (folder / "data" / "build.py").exists():
            return folder
    with suppress(OSError, ValueError, KeyError):
        return Path(json.loads((here.parent / "constants.json").read_text())["project"])
    return here.parent


def read_json(folder, name):
    """A checkpoint's JSON file as a dict, or one line and exit."""
    try:
        return json.loads((Path(folder) / name).read_text())
    except (OSError, ValueError) as error:
        fail(f"RESUME_FROM={folder}: {name} is damaged ({short(error)}); expected a whole one")


def find_path(path):
    """An existing path, from the working directory or else from the project's folder; or None."""
    return next((p for p in (Path(path), project_root() / path) if path and p.exists()), None)


def constants():
    """The constants by name, as they are now."""
    return {name: value for name, value in globals().items() if name.endswith("_datasets") or
            (re.fullmatch("[A-Z][A-Z_]+", name) and name != "EMBEDDED")}


def is_number(value):
    """Whether a value is a finite int or float."""
    return type(value) in (int, float) and math.isfinite(value)


def parse_override(argument):
    """'NAME=VALUE' as (name, value of the constant's type), or one line and exit."""
    name, equals, text = argument.partition("=")
    known = constants()
    if not equals or name not in known:
        close = difflib.get_close_matches(name.upper(), known, n=1)
        fail(f"{argument!r} is not NAME=VALUE of a constant" +
             (f" (did you mean {close[0]}?)" if close else "") +
             f"; expected one of {', '.join(known)}")
    default = known[name]
    if isinstance(default, str):
        return name, str(Path(text).absolute()) if name == "OUTPUT_DIR" and text else text
    value = text
    with suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = ast.literal_eval(text)
    kind, number = type(default), is_number(value)
    if kind is float and number or kind is int and number and value == int(value):  # 1e3 for 1000
        value = kind(value)
    elif isinstance(value, list) and (kind is tuple or name == "CLIP_RANGE"):
        value = tuple(value)
    if (type(value) is kind and (number or kind is not float) or
            name == "CLIP_RANGE" and (number or type(value) is tuple)):
        return name, value
    fail(f"{name}={text}: found {type(value).__name__}; expected {kind.__name__}, as {default!r}")


def configure(arguments):
    """Set the constants: this file's, then the profile's, those of the checkpoint that is resumed,
    the command line's. Returns why the profile was chosen."""
    given = dict(parse_override(argument) for argument in arguments)
    saved = {}
    if folder := given.get("RESUME_FROM", RESUME_FROM):
        given["RESUME_FROM"] = folder = str((find_path(folder) or Path(folder)).absolute())
        for name in ("constants.json", "config.json", "model*.safetensors", "metrics.csv",
                     "trainer_state.json", "trainer_state.safetensors"):
            if not any(Path(folder).glob(name)):
                fail(f"RESUME_FROM={folder}: there is no {name}; expected an epoch_N or step_N "
                     "folder, N > 0, of a run")
        saved = read_json(folder, "constants.json")["constants"]
        saved = {name: tuple(value) if isinstance(value, list) and "datasets" not in name else value
                 for name, value in saved.items() if name in constants()}
    cuda = torch.cuda.is_available()
    profile, why = (saved | given).get("PROFILE", PROFILE), "as PROFILE says"
    if profile == "auto":
        profile = "full" if cuda else "embedded"
        why = "there is a CUDA GPU" if cuda else "there is no CUDA GPU"
    values = (EMBEDDED if profile == "embedded" else {}) | saved | given | {"PROFILE": profile}
    if values.get("DEVICE", DEVICE) == "auto":
        values["DEVICE"] = "cuda" if cuda else "cpu"
    if values.get("DTYPE", DTYPE) == "auto":
        values["DTYPE"] = "float32" if values.get("DEVICE", DEVICE) == "cpu" else "bfloat16"
    globals().update(values)
    check_constants()
    if THREADS:
        torch.set_num_threads(THREADS)
    return why


def check_constants():
    """Stop with one line if the constants cannot work together."""
    for name, allowed in {"PROFILE": "auto, full, embedded", "DTYPE": "auto, float32, bfloat16",
                          "DEVICE": "auto, cpu, cuda, cuda:N"}.items():
        if re.sub(":[0-9]+$", ":N", globals()[name]) not in allowed.split(", "):
            fail(f"{name}={globals()[name]}: expected one of {allowed}")
    if DEVICE != "cpu" and not torch.cuda.is_available():
        fail(f"DEVICE={DEVICE}: PyTorch finds no CUDA GPU; expected cpu, or a PyTorch with CUDA")
    check_at_least(THREADS=0, BATCH_SIZE=1, GROUP_SIZE=1, MAX_NEW_TOKENS=1, MAX_PROMPT_TOKENS=1,
                   MINIBATCH=1, MICRO_BATCH=1, LENGTH_BUCKET=1, NUM_EPOCHS=1, EVAL_BATCH=1,
                   REWARD_BATCH=1, LOGITS_AT_ONCE=1, MAX_REWARD_TOKENS=8,
                   MAX_STEPS=0, EVAL_EVERY=0, EVAL_QUESTIONS=0, SAVE_EVERY=0,
                   SHOW_SAMPLES=0, WARMUP_STEPS=0, MAX_GRAD_NORM=0, LEARNING_RATE=0, WEIGHT_DECAY=0,
                   ADAM_EPSILON=0, EVAL_TEMPERATURE=0)
    if not 0.01 <= TEMPERATURE or not 0 < TOP_P <= 1:
        fail(f"TEMPERATURE={TEMPERATURE}, TOP_P={TOP_P}: expected 0.01 or more, and 0 < TOP_P <= 1")
    if len(ADAM_BETAS) != 2 or not all(is_number(beta) and 0 <= beta < 1 for beta in ADAM_BETAS):
        fail(f"ADAM_BETAS={ADAM_BETAS}: expected two numbers in [0, 1)")
    if not 0 <= SEED < 2**53:
        fail(f"SEED={SEED}: expected an integer from 0 to 2**53")
    if not OUTPUT_DIR:
        fail("OUTPUT_DIR is empty; expected a folder to make, such as runs/mine")
    try:
        re.compile(SEGMENT_END)
    except re.error as error:
        fail(f"SEGMENT_END={SEGMENT_END}: {error}; expected a regular expression")
    check_algorithm()
    completions = BATCH_SIZE * GROUP_SIZE
    if completions % MINIBATCH:
        fail(f"MINIBATCH={MINIBATCH} does not divide BATCH_SIZE x GROUP_SIZE = {BATCH_SIZE} x "
             f"{GROUP_SIZE} = {completions} completions; expected a divisor")
    if (set(REWARD_WEIGHTS) - {"model", "verifier", "function"} or not any(REWARD_WEIGHTS.values())
            or not all(map(is_number, REWARD_WEIGHTS.values()))):
        fail(f"REWARD_WEIGHTS={REWARD_WEIGHTS}: expected weights of model, verifier or function, "
             "at least one of them not 0")
    if bool(REWARD_WEIGHTS.get("function")) != bool(REWARD_FUNCTION):
        fail(f"REWARD_FUNCTION={REWARD_FUNCTION!r} with REWARD_WEIGHTS={REWARD_WEIGHTS}: expected "
             "a file and a weight for 'function', or neither")


def check_at_least(**least):
    """Stop with one line if a constant is smaller than the value given for it."""
    for name, value in least.items():
        if not globals()[name] >= value:
            fail(f"{name}={globals()[name]}: expected {value} or more")


def load_reward_function():
    """The function that REWARD_FUNCTION, "file.py:name", names."""
    path, _, name = REWARD_FUNCTION.rpartition(":")
    file = find_path(path)
    if file is None or not file.is_file():
        fail(f"REWARD_FUNCTION={REWARD_FUNCTION}: no such file; expected path/to/file.py:name")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's file may raise anything
        fail(f"REWARD_FUNCTION={REWARD_FUNCTION}: {short(error)}; expected a file that can be run")
    if not callable(getattr(module, name, None)):
        fail(f"REWARD_FUNCTION={REWARD_FUNCTION}: the file has no function {name!r}; expected one")
    return getattr(module, name)


def find_model(constant):
    """The model that a constant names: its folder, which must be whole, or its id."""
    name = globals()[constant]
    folder = find_path(name)
    if folder is None:
        return name
    for kind in ("config.json", "*.safetensors", "tokenizer.json"):
        if not any(folder.glob(kind)):
            fail(f"{constant}={name}: the folder {folder} has no {kind}; expected config.json, "
                 "*.safetensors and a tokenizer")
    return str(folder)


def load_pretrained(kind, name, constant, **options):
    """`kind.from_pretrained(name)`, with one line of help when that fails."""
    try:
        return kind.from_pretrained(name, **options)
    except Exception as error:  # OSError, ValueError, KeyError, network errors of several libraries
        fail(f"{constant}={name} could not be loaded ({short(error)}); expected a model that is "
             f"here: `hf download {name}`, or {constant}=<folder>, or PROFILE=embedded")


def frozen_dtype():
    """Of models that are not trained."""
    return torch.bfloat16 if DTYPE == "bfloat16" else torch.float32


def load_policy(name, frozen=False):
    """A causal model on DEVICE. Trained weights stay float32: AdamW's steps of 1e-6 round to
    nothing in bfloat16. Evaluation mode: dropout would train something else."""
    return load_pretrained(AutoModelForCausalLM, name, "POLICY_MODEL",
                           dtype=frozen_dtype() if frozen else torch.float32,
                           attn_implementation="sdpa").to(DEVICE).eval().requires_grad_(not frozen)


def claim_folder():
    """Make the run's folder: OUTPUT_DIR, or with _2, _3, ... behind it when that is in use."""
    wanted = project_root() / OUTPUT_DIR.replace("{script}", Path(__file__).stem)
    folder, number = wanted, 1
    try:
        while folder.exists() and any(folder.iterdir()):
            number += 1
            folder = wanted.with_name(f"{wanted.name}_{number}")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".partial").touch()
        (folder / ".partial").unlink()
    except (OSError, ValueError) as error:
        fail(f"OUTPUT_DIR={OUTPUT_DIR}: {error}; expected a folder that can be made and written to")
    return folder


def start(arguments):
    """From the command line to a Run. All that can be checked is checked before models load."""
    why = configure(arguments)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    scorers = {"verifier": verify}
    if REWARD_FUNCTION:
        scorers["function"] = load_reward_function()
    policy_name = find_model("POLICY_MODEL")
    if uses_model := bool(REWARD_WEIGHTS.get("model")):
        reward_name = find_model("REWARD_MODEL")
    train_rows = load_rows(train_datasets, "train_datasets")
    eval_rows = load_rows(eval_datasets, "eval_datasets")
    if REWARD_FUNCTION:
        row = train_rows[0]
        checked_scores("function", scorers["function"], [row["question"]], *[[row["answer"]]] * 2)
    if uses_model:
        judge_tokenizer = load_pretrained(AutoTokenizer, reward_name, "REWARD_MODEL")
        outputs = load_pretrained(AutoConfig, reward_name, "REWARD_MODEL").num_labels
        if outputs != 1:
            fail(f"REWARD_MODEL={REWARD_MODEL}: it has {outputs} outputs; expected one, the score")
    tokenizer = load_pretrained(AutoTokenizer, policy_name, "POLICY_MODEL")
    if not tokenizer.chat_template:
        fail(f"POLICY_MODEL={POLICY_MODEL}: no chat template with its tokenizer; expected one")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked: any id will do
    train_rows = with_prompts(train_rows, tokenizer, "train_datasets")
    eval_rows = with_prompts(eval_rows, tokenizer, "eval_datasets")[:EVAL_QUESTIONS or None]
    steps_per_epoch = len(train_rows) // BATCH_SIZE
    if steps_per_epoch == 0:
        fail(f"train_datasets: {len(train_rows)} questions; expected at least "
             f"BATCH_SIZE = {BATCH_SIZE}")
    total_steps = min(NUM_EPOCHS * steps_per_epoch, MAX_STEPS or math.inf)
    board = None
    if TENSORBOARD:
        try:
            from torch.utils.tensorboard import SummaryWriter as board
        except ImportError:
            fail("TENSORBOARD=True: the package tensorboard is missing; pip install tensorboard")
    done = read_json(RESUME_FROM, "trainer_state.json")["step"] if RESUME_FROM else 0
    if done >= total_steps:
        fail(f"RESUME_FROM={RESUME_FROM} is at step {done} of {total_steps}; expected steps to do: "
             "raise NUM_EPOCHS or MAX_STEPS")
    folder = claim_folder()

    policy = load_policy(RESUME_FROM or policy_name)
    if uses_model:
        judge = load_pretrained(AutoModelForSequenceClassification, reward_name, "REWARD_MODEL",
                                dtype=frozen_dtype()).to(DEVICE).eval()
        scorers["model"] = model_scorer(judge, judge_tokenizer)
    device = torch.cuda.get_device_name(DEVICE) if DEVICE != "cpu" else \
        f"CPU, {torch.get_num_threads()} of {os.cpu_count()} cores"
    facts = {"script": Path(__file__).stem, "device": device, "python": platform.python_version(),
             "torch": torch.__version__, "transformers": transformers.__version__,
             "commit": git_commit(), "project": str(project_root()), "command": sys.argv,
             "started": time.strftime("%Y-%m-%d %H:%M:%S"), "steps": total_steps}
    run = Run(folder, facts, Path(__file__).read_bytes(), train_rows, eval_rows, scorers, policy,
              {"policy": (policy, new_optimizer(policy, LEARNING_RATE))}, tokenizer,
              torch.Generator(DEVICE).manual_seed(SEED), torch.Generator().manual_seed(SEED),
              steps_per_epoch, total_steps, board=board and board(folder))
    prepare(run)
    if RESUME_FROM:
        load_checkpoint(run, Path(RESUME_FROM))
    describe(run, why, arguments)
    return run


def git_commit():
    """The project's commit, or "" where there is no git."""
    with suppress(OSError):
        return subprocess.run(["git", "rev-parse", "HEAD"], cwd=project_root(), capture_output=True,
                              text=True).stdout.strip()
    return ""


def describe(run, why, arguments):
    """Print the start-up block: what trains on what, for how long, and where it goes."""
    size = sum(p.numel() for p in run.policy.parameters()) / 1e6
    weights = " + ".join(f"{weight} {name}" for name, weight in REWARD_WEIGHTS.items() if weight)
    silent = sum(last_number(row["answer"]) is None for row in run.train_rows)
    lines = {
        "profile": f"{PROFILE} ({why}); {run.facts['device']}; {DTYPE}; torch {torch.__version__}",
        "settings": " ".join(arguments) or "the defaults",
        "resumed": f"{RESUME_FROM}, at step {run.step}" if RESUME_FROM else "",
        "policy": f"{POLICY_MODEL}, {size:.2f} M parameters" +
                  (", and a frozen copy as the reference" if run.reference is not None else ""),
        "reward": weights + (f"; model: {REWARD_MODEL}" if "model" in run.scorers else ""),
        "data": f"{len(run.train_rows)} questions, {len(run.eval_rows)} held out" +
                (f"; {silent} reference answers without a number" if silent else ""),
        "rollout": f"{BATCH_SIZE} prompts x {GROUP_SIZE} = {BATCH_SIZE * GROUP_SIZE} completions "
                   f"of at most {MAX_NEW_TOKENS} tokens; minibatch {MINIBATCH}, "
                   f"micro-batch {MICRO_BATCH}",
        "algorithm": describe_algorithm(),
        "steps": f"{run.total_steps}, {run.steps_per_epoch} an epoch",
        "output": str(run.folder),
        "check": check_reward_model(run) if "model" in run.scorers else "",
    }
    shown = [f"  {name:10}{text}" for name, text in lines.items() if text]
    print(run.facts["script"], *shown, "", sep="\n", flush=True)


def check_reward_model(run):
    """Show the reward model a right answer and the same with another number; say what it thinks."""
    question, right = run.train_rows[0]["question"], run.train_rows[0]["answer"]
    wrong = re.sub(r"[0-9][0-9.,]*(?=[^0-9]*$)", str(abs(last_number(right) or 0) + 1), right)
    good, bad = run.scorers["model"]([question] * 2, [right, wrong], [right] * 2)
    return (f"the reward model scores {right[-36:]!r} {good:.2f} and {wrong[-36:]!r} {bad:.2f}" +
            ("" if good > bad else ": the wrong one is not lower, do not trust it alone"))


def show_help():
    """Print the docstring and the constants with their comments."""
    print(__doc__)
    source = Path(__file__).read_text(encoding="utf-8")
    print(source[source.index("# --- Model"):source.index("\n# ", source.index("EMBEDDED = {"))])


def main(arguments):
    """`python SCRIPT [NAME=VALUE ...]`"""
    if {"-h", "--help"} & set(arguments):
        return show_help()
    run, began = None, time.perf_counter()
    try:
        run = start(arguments)
        if run.step == 0:
            before = {"step": 0, "epoch": 0.0, "num_tokens": 0}
            record_evaluation(run, before)
            write_metrics(run, before)
            save_checkpoint(run, "epoch_0")
        with tqdm(total=run.total_steps, initial=run.step, unit="step", ncols=120) as run.bar:
            train(run)
    except KeyboardInterrupt:
        if run is not None:
            plot_metrics(run)
            saved = sorted(run.folder.glob("[!.]*/trainer_state.json"), key=os.path.getmtime)
            print(f"\nstopped at step {run.step}; RESUME_FROM goes on from one of {run.folder}'s: "
                  f"{', '.join(file.parent.name for file in saved) or 'none was saved yet'}")
        raise SystemExit(130) from None
    print(f"{run.total_steps} steps, {time.perf_counter() - began:.0f} s. In {run.folder}: "
          "training_metrics.png, metrics.csv, and the checkpoints")


if __name__ == "__main__":
    main(sys.argv[1:])
