# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "pandas==3.1.1", "pyarrow==26.0.1",
#                 "matplotlib==3.11.2", "tqdm==4.70.1"]
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

GRPO (../grpo/grpo.py) and GSPO put the mean reward of a group in the critic's place: half the
networks, but one advantage for a whole answer. Here answers come in groups too, so that all scripts
sample alike, but nothing is compared inside a group: GROUP_SIZE=1 will do.

Simplified on purpose: sampling and training take turns in the same processes, and sampling is a
plain loop, many times slower on a GPU than an inference engine.

    python RL_HAND/ppo/ppo.py                                # small models where there is no GPU
    python RL_HAND/ppo/ppo.py LEARNING_RATE=5e-5 SEED=1     # any constant below can be set so
    python RL_HAND/ppo/ppo.py RESUME_FROM=runs/ppo/epoch_1  # go on exactly from that checkpoint
    torchrun --nproc_per_node=2 RL_HAND/ppo/ppo.py           # the same, shared by two GPUs
    python RL_HAND/ppo/ppo.py --help

One CPU core, small models: 1.3 s a step, 2.5 minutes of training, 0.9 GB of memory. A GPU with
Qwen3-0.6B: not run yet.
"""

import ast
import difflib
import glob
import json
import math
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import contextmanager, suppress
from decimal import Decimal
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pandas as pd
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from matplotlib.figure import Figure
from safetensors.torch import load_file, load_model, save_file, save_model
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer,
                          DynamicCache)
from transformers.modeling_layers import GradientCheckpointingLayer


class Either(NamedTuple):
    """A constant's values in the two profiles: full size on a GPU, or the small models in data/."""
    full: object
    embedded: object


# ========================================== Constants ===========================================
# Edit them here or on the command line (NAME=VALUE). `configure` makes one value of each Either: of
# the first on a GPU, of the second without one. A plain value in its place holds everywhere.

# --- Model
PROFILE = "auto"  # which value of Either(full, embedded); "auto": full where there is a CUDA GPU
POLICY_MODEL = Either("Qwen/Qwen3-0.6B", "data/policy")  # folder or model id; also the KL reference
REWARD_MODEL = Either(  # scores (question, answer) pairs; a folder or model id
    "OpenAssistant/reward-model-deberta-v3-large-v2", "data/reward_model")
ENABLE_THINKING = False  # the chat template's switch; a thought rarely fits into MAX_NEW_TOKENS
DEVICE = Either("cuda", "cpu")  # of the policy; several GPUs: CUDA_VISIBLE_DEVICES chooses
FROZEN_DEVICE = Either("cuda", "cpu")  # of reference and reward model; "cuda:1": a second GPU
DTYPE = Either("bfloat16", "float32")  # of passes and frozen weights; what is trained is float32
THREADS = Either(0, 1)  # on the CPU; 0: PyTorch's choice, faster on an idle machine only
LOGITS_AT_ONCE = 2**24  # logits alive at a time in training: (B, T, V) never exists; memory only
GRADIENT_CHECKPOINTING = Either(True, False)  # keep layers' inputs only: less memory, more time
LORA_RANK = 0  # train an adapter of this rank (pip install peft), not the weights; 0: all weights
LORA_ALPHA = 32  # an adapter's product is scaled by LORA_ALPHA / LORA_RANK

# --- Data
train_datasets = Either(  # questions to train on: file, pattern or hf://; parquet, json or jsonl
    [{"path": "hf://datasets/openai/gsm8k/main/train-00000-of-00001.parquet",
      "type": "parquet", "input": "question", "output": "answer"}],
    [{"path": "data/train.parquet", "type": "parquet", "input": "question", "output": "answer"}])
eval_datasets = Either(  # held-out questions, never trained on
    [{"path": "hf://datasets/openai/gsm8k/main/test-00000-of-00001.parquet",
      "type": "parquet", "input": "question", "output": "answer"}],
    [{"path": "data/heldout.parquet", "type": "parquet", "input": "question", "output": "answer"}])
MAX_PROMPT_TOKENS = Either(256, 64)  # tokens; longer prompts are dropped and counted

# --- Sampling
BATCH_SIZE = Either(2, 16)  # prompts per rollout
GROUP_SIZE = Either(4, 8)  # completions per prompt (G)
MAX_NEW_TOKENS = Either(512, 60)  # tokens per completion, the end token included
TEMPERATURE = 1.0  # of sampling, and of the log-probs that are trained: else ratios are wrong

# --- Reward
REWARD_WEIGHTS = {"model": 0.5, "verifier": 1.0}  # and "function"; their weighted sum
REWARD_SIGMOID = True  # squash the reward model's score into 0..1: it can't outweigh a right answer
REWARD_FUNCTION = ""  # "file.py:name": name(questions, responses, references) -> scores (README)
USE_SEQUENCE_LEVEL_REWARD = True  # False: each sentence is rewarded with what it added
MAX_REWARD_TOKENS = 512  # tokens of a pair, DeBERTa's training length; the longer part is cut
REWARD_BATCH = 64  # pairs per forward pass of the reward model; changes memory only

# --- Optimisation
NUM_EPOCHS = Either(1, 2)  # passes over the training questions
MAX_STEPS = 0  # stop after this many rollouts; 0: after NUM_EPOCHS
LEARNING_RATE = Either(1e-6, 1e-4)  # AdamW's
WARMUP_STEPS = 0  # optimiser steps of linear warm-up
ADAM_BETAS = (0.9, 0.95)  # AdamW's
ADAM_EPSILON = 1e-8  # AdamW's
WEIGHT_DECAY = 0.0  # AdamW's
MAX_GRAD_NORM = 1.0  # gradient clipping; 0: none
MINIBATCH = Either(8, 64)  # completions per optimiser step: part of the algorithm
MICRO_BATCH = Either(4, 24)  # completions per forward pass at most: memory and speed only
SEED = 0  # of sampling, data order and shuffling

# --- Algorithm
PPO_EPOCHS = Either(4, 2)  # passes over a rollout (sampling is slow); in update 1 all ratios are 1
CLIP_RANGE = 0.2  # (low, high), or one number, of a *token's* ratio; see policy_loss
GAMMA = 1.0  # discount per token; an answer is short and only its end is scored
GAE_LAMBDA = 0.95  # 1: what really came (no bias); 0: what the critic foretold next (little noise)
WHITEN_ADVANTAGES = True  # mean 0 and std 1 over the tokens of the rollout
KL_COEF = 0.05  # the KL penalty in the reward of each token; 0: no reference is loaded
NO_END_PENALTY = 0.0  # taken off the score of an answer truncated at MAX_NEW_TOKENS
CRITIC_LEARNING_RATE = Either(1e-5, 3e-4)  # AdamW's, for the critic
CRITIC_WARMUP = Either(0, 2)  # rollouts in which only the critic learns
VALUE_CLIP = 0.2  # how far a value may move from the old one before it is clipped; 0: free
TARGET_APPROX_KL = 0.0  # end a rollout's passes when approx_kl, their mean, exceeds it; 0: never
ENTROPY_COEF = 0.0  # weight of the entropy bonus

# --- Evaluation
EVAL_EVERY = Either(200, 10)  # rollouts between evaluations; also at step 0 and an epoch's end
EVAL_QUESTIONS = Either(256, 512)  # held-out questions used; 0: all
EVAL_BATCH = Either(32, 512)  # questions answered at once; changes memory only
EVAL_TEMPERATURE = 1.0  # of the sampled evaluation; the other one is greedy
SHOW_SAMPLES = 3  # held-out questions whose answers are printed at each evaluation

# --- Output
OUTPUT_DIR = "runs/{script}"  # in the project's folder; with _2, _3, ... if it is in use
SAVE_EVERY = 0  # rollouts between extra checkpoints step_N/; 0: only epoch_N/
RESUME_FROM = ""  # an epoch_N/ or step_N/ folder to go on from, exactly

DEFAULTS = {name: value for name, value in globals().items()
            if re.fullmatch("[A-Z][A-Z_]+|[a-z]+_datasets", name)}  # all of the above

# ========================================== Training ============================================


def train(run):
    """The whole algorithm, of B answers, b of them in a part, T tokens each. `run`: see `start`."""
    policy, critic = run.policy, run.trained["critic"][0]
    while run.step < run.total_steps:
        meter, critic_meter = begin_step(run), Meter()                    # what is measured goes in
        rows = next_questions(run, BATCH_SIZE)
        batch = sample_groups(policy, run.tokenizer, rows, GROUP_SIZE)    # B = BATCH x GROUP_SIZE
        meter.lap("rollout")
        scores, parts = score_completions(run, rows, batch)               # (B,), and by source
        meter.lap("reward")
        batch.old_logps = behaviour_logps(policy, batch)                  # (B, T) pi_old's
        if KL_COEF:
            batch.ref_logps = reference_logps(run, batch)                 # (B, T)
        batch.old_values = values_without_grad(critic, batch)             # (B, T)
        rewards = token_rewards(run, rows, batch, scores)                 # (B, T)
        batch.advantages = compute_advantages(rewards, batch.old_values, batch.completion_mask)
        batch.returns = batch.advantages + batch.old_values               # before whitening
        if WHITEN_ADVANTAGES:
            batch.advantages = whiten(batch.advantages, batch.completion_mask)
        meter.lap("logps")

        for minibatch in minibatches(batch, PPO_EPOCHS):                  # an optimiser step each
            minibatch.weights = token_weights(minibatch.completion_mask)  # (b, T), sums to 1
            for index in micro_batches(minibatch):                        # parts, for memory
                micro = minibatch.rows(index)
                logps, entropy = score_tokens(policy, micro)              # (b, T) each
                policy_term, statistics = policy_loss(logps, micro.old_logps, micro.advantages,
                                                      micro.completion_mask)
                token_loss = policy_term - ENTROPY_COEF * entropy
                (token_loss * micro.weights).sum().backward()
                meter.add({"loss": token_loss, "policy_loss": policy_term,
                           "entropy_loss": -entropy, "advantage/mean": micro.advantages,
                           "advantage/size": micro.advantages.abs()}, micro.weights)
                meter.add({"entropy": entropy, **statistics}, micro.completion_mask)
                values = critic(micro)                                    # (b, T)
                value_term, clipped = value_loss(values, micro.old_values, micro.returns)
                (value_term * micro.weights).sum().backward()
                meter.add({"value_loss": value_term}, micro.weights)
                meter.add({"value_clip_ratio": clipped}, micro.completion_mask)
            if run.step > CRITIC_WARMUP:
                optimiser_step(run, "policy", meter)
            else:
                policy.zero_grad()  # it waits for the critic
            optimiser_step(run, "critic", critic_meter)
            if TARGET_APPROX_KL and meter.means()["approx_kl"] > TARGET_APPROX_KL:
                break
        meter.lap("update")

        measure_rollout(run, meter, batch, scores, parts)
        measure_critic(meter, critic_meter, batch)
        finish_step(run, meter.means())


def minibatches(batch, passes):
    """`passes` times over the batch in new random order, MINIBATCH completions (of all processes)
    each. Answers to a question stay side by side: `states_before` runs their prompt once."""
    index = torch.arange(len(batch.ended), device=batch.ended.device)
    groups = index.unflatten(0, (-1, GROUP_SIZE))                         # (P, G)
    for _ in range(passes):
        order = groups[torch.randperm(len(groups))].flatten()
        yield from map(batch.rows, order.split(MINIBATCH // processes))


def prepare(run):
    """What this algorithm needs besides the policy: a critic, and the reference for the penalty."""
    critic = Critic(load_policy(POLICY_MODEL)).to(DEVICE)
    run.trained["critic"] = (critic, new_optimizer(critic, CRITIC_LEARNING_RATE))
    if KL_COEF:
        run.reference = None if LORA_RANK else load_policy(POLICY_MODEL, frozen=True)


# =========================================== Critic =============================================


class Critic(torch.nn.Module):
    """A network of the policy's architecture, started from its weights, with one number per state
    in place of the logits; that head starts at zero: at first nothing is foretold."""

    def __init__(self, model):
        super().__init__()
        self.base_model = model.base_model
        self.head = torch.nn.Linear(model.config.hidden_size, 1)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)

    def forward(self, batch):
        """V before each completion token is drawn, (b, T) float32; 0 in padding."""
        return at_tokens(batch, self.head(states_before(self, batch).float())[:, 0])


@torch.no_grad()
def values_without_grad(critic, batch):
    """The critic's V of a whole batch, (B, T), a micro-batch at a time."""
    values = torch.zeros_like(batch.completion_mask)
    for index in micro_batches(batch):
        values[index] = critic(batch.rows(index))
    return values


def value_loss(values, old_values, returns):
    """The clipped value loss of every token, and where the clip cuts it: no gradient. (b, T) each.

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
    clipped = (kept > free) & ((values - old_values).abs() > VALUE_CLIP)
    return 0.5 * torch.max(free, kept), clipped.float()


def measure_critic(meter, critic_meter, batch):
    """Measure how well the critic foretold the returns; and the KL that the penalty is about."""
    mask = batch.completion_mask
    meter.add({"value_mean": batch.old_values, "return_mean": batch.returns}, mask)
    return_std = mean_and_std(batch.returns, mask)[1]
    error_std = mean_and_std(batch.returns - batch.old_values, mask)[1]
    meter.add({"explained_variance": 1 - error_std**2 / max(return_std**2, 1e-12),
               "critic_grad_norm": critic_meter.means()["grad_norm"]})
    if KL_COEF:
        meter.add({"kl": batch.old_logps - batch.ref_logps}, mask)


# ========================================= Advantages ===========================================


def token_rewards(run, rows, batch, scores):
    """The reward of each token (B, T): minus the KL penalty, plus the score at the last real token
    (or what each sentence added, at its last token, where sentences are rewarded).

    The penalty is the plain log-ratio to the reference, k1: in a reward nothing is differentiated,
    and k1 has the right mean. NO_END_PENALTY comes off the score of a truncated answer.
    """
    mask = batch.completion_mask
    rewards = torch.zeros_like(mask)
    if KL_COEF:
        rewards = -KL_COEF * (batch.old_logps - batch.ref_logps) * mask
    last = mask * (mask.flip(1).cumsum(1).flip(1) == 1)                   # (B, T), 1 at the end
    if USE_SEQUENCE_LEVEL_REWARD:
        rewards = rewards + scores[:, None] * last
    else:
        sentence, added = sentence_rewards(run, rows, batch)              # (B, T), (B, K)
        ends = (sentence != F.pad(sentence[:, 1:], (0, 1))).float() * mask
        rewards = rewards + added.gather(1, sentence) * torch.max(ends, last)
    return rewards - NO_END_PENALTY * ~batch.ended[:, None] * last


def compute_advantages(rewards, values, mask):
    """Generalised advantage estimation (Eq. 11 and 12, arXiv:1707.06347), all (B, T).

    The answer is over after its last token: nothing is foretold beyond it, and the value there is
    0, also for a truncated answer (it gets no more reward either).

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
    mean, std = mean_and_std(advantages, mask)
    if std < 1e-6 * max(1.0, abs(mean)):  # float noise, which the std would blow up
        return torch.zeros_like(advantages)
    return (advantages - mean) / (std + 1e-8) * mask


def mean_and_std(values, mask):
    """Mean and std of (B, T) over the real tokens of all processes, as floats."""
    meter = Meter()  # knows them all
    meter.add({"mean": values}, mask)
    mean = meter.means()["mean"]
    meter.add({"variance": (values.double() - mean).square()}, mask)
    return mean, math.sqrt(meter.means()["variance"])


def without_spread(groups):
    """Where the values of a group, (P, G, ...), are equal up to float noise: (P, 1, ...) bool."""
    scale = groups.abs().amax(1, keepdim=True).clamp(min=1.0)
    return groups.std(1, correction=0, keepdim=True) < 1e-6 * scale


def sentence_rewards(run, rows, batch):
    """The sentence, from 0, of each token, (B, T), and what each adds to the reward of the answer's
    beginning, (B, K), 0 if an answer has no such sentence: K + 1 scorings, the first of nothing. A
    sentence ends after a full stop (or decimal point) or newline; the end token is in the last."""
    tokens, place = batch.completion_ids.unique(return_inverse=True)
    texts = run.tokenizer.batch_decode(tokens[:, None])
    ends = torch.tensor([text.rstrip(" ").endswith((".", "\n")) for text in texts],
                        device=place.device)[place]                       # (B, T)
    more = batch.completion_mask.flip(1).cumsum(1).flip(1) > 1 + batch.ended[:, None]  # than "end"
    ends &= more & ~F.pad(ends[:, 1:], (0, 1))  # of ".\n" only the second
    sentence = ends.cumsum(1) - ends.long()
    beginnings = [score_completions(run, rows, batch, sentence < k)[0]
                  for k in range(int(sentence.max()) + 2)]                # K + 1 times (B,)
    return sentence, torch.stack(beginnings, 1).diff(dim=1)


# ============================================ Loss ==============================================


def policy_loss(logps, old_logps, advantages, mask):
    """The clipped token-ratio loss at every token (Eq. 7, negated: to be minimised).

    logps, old_logps: (b, T) log-probs under the trained and the sampling policy; advantages (b, T);
    mask (b, T), 1 up to and including the end token. Returns the token losses and statistics,
    (b, T) each; `token_weights` takes their mean. A clipped token has *no* policy gradient:
    min() takes the constant branch.

    >>> old, new = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-0.9, -1.5]])
    >>> loss, statistics = policy_loss(new, old, torch.ones(1, 2), torch.ones(1, 2))
    >>> [f"{x:.4f}" for x in loss[0]]     # exp(0.1), inside the range; exp(0.5), clipped to 1.2
    ['-1.1052', '-1.2000']
    """
    low, high = clip_range()
    log_ratio = ((logps - old_logps) * mask).clamp(max=20.0)  # keeps inf x 0 from the gradient
    ratio = torch.exp(log_ratio)                                               # (b, T)
    clipped = ratio.clamp(1 - low, 1 + high)
    loss = -torch.min(ratio * advantages, clipped * advantages)
    moved = (ratio - 1 - log_ratio).detach()  # k3 of the update: how far the policy has moved
    return loss, ratio_statistics(ratio.detach(), advantages, low, high) | {"approx_kl": moved}


def ratio_statistics(ratio, advantages, low, high):
    """The ratio, and the tokens that are clipped: below, A < 0; above, A > 0. (b, T) each."""
    below = ((ratio < 1 - low) & (advantages < 0)).float()
    above = ((ratio > 1 + high) & (advantages > 0)).float()
    return {"ratio/mean": ratio, "clip_ratio/low_mean": below, "clip_ratio/high_mean": above,
            "clip_ratio/region_mean": below + above}


def clip_range():
    """CLIP_RANGE as (low, high)."""
    return CLIP_RANGE if isinstance(CLIP_RANGE, tuple) else (CLIP_RANGE, CLIP_RANGE)


def token_weights(mask):
    """Each token's weight in its minibatch's loss: the mean over all tokens.

    mask: (b, T). Made for the whole minibatch before it is split, so that MICRO_BATCH changes the
    memory and nothing else.

    >>> token_weights(torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])).tolist()
    [[0.25, 0.25, 0.25], [0.25, 0.0, 0.0]]
    """
    count = sum(everyone(float(mask.sum()))) / processes  # their gradients are averaged
    return mask / max(count, 1.0)


# ==================== The algorithm ends here: you may stop reading. ============================

ALGORITHM_RULES = """
    PPO_EPOCHS >= 1
    len(clip_range()) == 2 and 0 < clip_range()[0] <= 1  # CLIP_RANGE: a number, or (low, high)
    0 < clip_range()[1] < math.inf  # CLIP_RANGE
    0 <= GAMMA <= 1 and 0 <= GAE_LAMBDA <= 1
    min(KL_COEF, NO_END_PENALTY, CRITIC_LEARNING_RATE, CRITIC_WARMUP) >= 0
    min(VALUE_CLIP, TARGET_APPROX_KL, ENTROPY_COEF) >= 0
"""
ALGORITHM_PANELS = {"KL to the start, and of the update": "kl approx_kl",
                    "Value loss": "value_loss", "Critic": "value_mean return_mean",
                    "Explained variance of the returns": "explained_variance"}
ALGORITHM_SHOWN = ("PPO_EPOCHS CLIP_RANGE GAMMA GAE_LAMBDA KL_COEF CRITIC_LEARNING_RATE "
                   "CRITIC_WARMUP ENTROPY_COEF")

# ==================== From here on the scripts are the same, byte for byte. =====================
# =========================================== Rollout ============================================


class Batch(SimpleNamespace):
    """Completions, one a row, as tensors of B rows and nothing else; `train` adds what its
    algorithm needs. The completions of a prompt follow one another, equally many of each.

    prompt_index                     (B,), the number of its prompt
    prompt_ids, prompt_mask          (B, L), padded on the left
    completion_ids, completion_mask  (B, T), padded on the right; 1.0 up to and including the end
    sampled_logps                    (B, T), float32, as they were when the tokens were drawn
    ended                            (B,) bool, False where MAX_NEW_TOKENS truncated it
    """

    def rows(self, index):
        """The batch of the given rows."""
        return Batch(**{name: tensor[index] for name, tensor in vars(self).items()})

    def group_size(self):
        """How many completions there are of each prompt."""
        return int((self.prompt_index == self.prompt_index[0]).sum())


class Cache(DynamicCache):
    """Keys and values in the precision of the passes: under autocast norms make keys float32."""

    def update(self, keys, values, *rest, **options):
        """Put new keys and values in, and get all so far."""
        dtype = getattr(torch, DTYPE)
        return super().update(keys.to(dtype), values.to(dtype), *rest, **options)


@torch.no_grad()
def sample_groups(model, tokenizer, rows, group_size, temperature=None):
    """Sample `group_size` completions of each row's prompt: a Batch of len(rows) x group_size.

    Each prompt is run once, its keys and values are copied for its group, and all completions are
    decoded together; one that has ended is run no longer. Of the model's generation_config only the
    end ids are used (Qwen3's also says top_k 20): what is sampled is softmax(logits / temperature),
    which is what is trained. `temperature`: TEMPERATURE unless given; 0 is greedy. All
    random numbers are drawn first, one for each completion and token: what a completion becomes
    does not depend on those beside it, nor on the number of processes.
    """
    temperature = TEMPERATURE if temperature is None else temperature
    prompt_ids, prompt_mask = pad_prompts(rows, tokenizer, model.device)               # (P, L)
    index = torch.arange(len(rows), device=model.device).repeat_interleave(group_size)  # (B,)
    if temperature:
        chance = torch.rand(len(rows) * processes, group_size, MAX_NEW_TOKENS, dtype=torch.float64,
                            device=model.device)[rank::processes].flatten(0, 1)        # (B, T)
    mask, logps = torch.zeros(2, len(index), MAX_NEW_TOKENS, device=model.device)      # (B, T)
    ids = torch.full_like(mask, tokenizer.pad_token_id, dtype=torch.long)
    ends = model.generation_config.eos_token_id  # Qwen3 has two; the second is its padding id, too
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    ends = torch.tensor(sorted(ends), device=model.device)
    weight = model.get_output_embeddings().weight.to(getattr(torch, DTYPE))  # cast once
    cache, row = Cache(config=model.config), torch.arange(len(index), device=model.device)
    with autocast():  # one block, in which the other weights are cast once
        place = (prompt_mask.cumsum(1) - 1).clamp(min=0)                               # (P, L)
        states = run_model(model, prompt_ids, prompt_mask, place, cache)[:, -1]        # (P, H)
        if not states.isfinite().all():
            fail("the policy's outputs are not finite: lower LEARNING_RATE, RESUME_FROM earlier")
        cache.batch_repeat_interleave(group_size)
        prompt_ids, prompt_mask, states, place = (
            x[index] for x in (prompt_ids, prompt_mask, states, place[:, -1:]))
        seen = prompt_mask[:, None, None].bool()                                 # (n, 1, 1, L)
        for t in tqdm(range(MAX_NEW_TOKENS), "rollout", leave=False, delay=5, disable=rank > 0):
            if t:
                seen, place = F.pad(seen, (0, 1), value=True), place + 1
                states = run_model(model, token[:, None], seen, place, cache)[:, -1]   # (n, H)
            all_logps = torch.log_softmax(product(states, weight.T) / (temperature or 1.0), -1)
            token = draw(all_logps, chance[row, t]) if temperature else all_logps.argmax(-1)
            ids[row, t], mask[row, t] = token, 1.0
            logps[row, t] = all_logps.gather(1, token[:, None])[:, 0]
            going = (~torch.isin(token, ends)).nonzero()[:, 0]
            if len(going) < len(row):  # those that have ended leave
                row, token, seen, place = (x[going] for x in (row, token, seen, place))
                cache.batch_select_indices(going)
            if len(row) == 0:
                break
    ended = torch.ones(len(ids), dtype=torch.bool, device=ids.device).index_fill(0, row, False)
    return Batch(prompt_index=index, prompt_ids=prompt_ids, prompt_mask=prompt_mask, ended=ended,
                 completion_ids=ids[:, :t + 1], completion_mask=mask[:, :t + 1],
                 sampled_logps=logps[:, :t + 1])


def draw(logps, chance):
    """One token per row of (n, V) log-probs: the one where the cumulated probability passes
    `chance` (n,), uniform in [0, 1). The sum is float64: float32's of 150,000 is off by 1e-4.

    >>> logps = torch.tensor([[0.5, 0.2, 0.3]]).log()
    >>> [draw(logps, torch.tensor([c]).double()).item() for c in (0.49, 0.51, 0.71)]
    [0, 1, 2]
    """
    total = logps.exp().cumsum(-1, dtype=torch.float64)                                # (n, V)
    point = chance[:, None] * total[:, -1:]
    return torch.searchsorted(total, point, right=True)[:, 0].clamp(max=logps.shape[1] - 1)


def pad_prompts(rows, tokenizer, device):
    """The rows' prompts as ids and mask, (P, L), padded so that each ends in the last column."""
    prompts = {"input_ids": [row["prompt_ids"] for row in rows]}
    return tokenizer.pad(prompts, padding_side="left", return_tensors="pt").to(device).values()


# ====================================== Log-probabilities =======================================


def autocast():
    """bfloat16 arithmetic over float32 weights, if DTYPE says so."""
    return torch.autocast(torch.device(DEVICE).type, torch.bfloat16, DTYPE == "bfloat16")


def run_model(model, ids, mask, place, cache=None):
    """Last hidden states (n, l, H) of tokens (n, l) at their `place` among the real ones of their
    row; `mask` is 1 for what they may see, (n, L) or (n, 1, l, L); `cache` is read and extended."""
    return model.base_model(input_ids=ids, attention_mask=mask, position_ids=place,
                            past_key_values=cache, use_cache=cache is not None).last_hidden_state


def product(a, b):
    """a @ b in float32: GSPO's clip range (3e-4) is far below bfloat16's resolution (8e-3). With
    DTYPE bfloat16 that is the precision of what goes in, not of the sum."""
    with torch.autocast(a.device.type, enabled=False):
        if DTYPE == "bfloat16" and a.is_cuda:
            return torch.mm(a.bfloat16(), b.bfloat16(), out_dtype=torch.float32)
        return a.float() @ b.float()


def logps_and_entropy(logits, tokens):
    """Log-probs at TEMPERATURE of the tokens (n,), and the exact entropy: (2, n)."""
    logps = torch.log_softmax(logits / TEMPERATURE, -1)
    return torch.stack([logps.gather(1, tokens[:, None])[:, 0], -(logps.exp() * logps).sum(1)])


class InPieces(torch.autograd.Function):
    """logps_and_entropy of states (n, H) @ weight.T. The logits, (n, V), exist LOGITS_AT_ONCE at a
    time, and are made again in the backward pass."""

    @staticmethod
    def forward(ctx, states, weight, tokens):
        """The values, (2, n)."""
        ctx.save_for_backward(states, weight, tokens)
        size, head = max(1, LOGITS_AT_ONCE // len(weight)), weight.to(getattr(torch, DTYPE))
        return torch.cat([logps_and_entropy(product(some, head.T), ids) for some, ids in
                          zip(states.split(size), tokens.split(size))], 1)

    @staticmethod
    def backward(ctx, upstream):
        """The gradients of states and weight, a piece after the other, summed in float32."""
        states, weight, tokens = ctx.saved_tensors
        d_states = torch.empty_like(states)
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        size, head = max(1, LOGITS_AT_ONCE // len(weight)), weight.to(getattr(torch, DTYPE))
        for some, ids, d_values, d_some in zip(states.split(size), tokens.split(size),
                                               upstream.split(size, 1), d_states.split(size)):
            logits = product(some, head.T).requires_grad_()
            with torch.enable_grad():
                values = logps_and_entropy(logits, ids)
            d_logits, = torch.autograd.grad(values, logits, d_values)
            d_some.copy_(product(d_logits, head))
            if d_weight is not None:  # in slices: a second (V, H) would be 0.6 GB
                for total, part in zip(d_weight.split(2**14), d_logits.split(2**14, 1)):
                    total += product(part.T, some)
        return d_states, d_weight, None


def states_before(model, batch):
    """The last hidden state before each completion token, (n, H), in the order of the mask. A row
    of the forward pass is a prompt and its g completions: of "pq", "abc", "de" it is p q a b d, at
    positions 0 1 2 3 2. q predicts a and d; d sees p q d; what c and e predict is not needed."""
    group, mask = batch.group_size(), batch.completion_mask.bool()
    prompt_ids, prompt_mask = batch.prompt_ids[::group], batch.prompt_mask[::group]    # (p, L)
    (count, width), longest = prompt_mask.shape, mask.shape[1]
    length = prompt_mask.sum(1, keepdim=True)                                          # (p, 1)
    number = torch.arange(group * longest, device=mask.device)                         # (g T,)
    fed = F.pad(mask[:, 1:], (0, 1)).reshape(count, -1)  # of a completion all tokens but its last
    real = torch.cat([prompt_mask.bool(), fed], 1)                                # (p, L + g T)
    ids = torch.cat([prompt_ids, batch.completion_ids.reshape(count, -1)], 1)
    place = torch.cat([(prompt_mask.cumsum(1) - 1).clamp(min=0), length + number % longest], 1)
    part = torch.cat([prompt_mask * 0, (1 + number // longest).expand_as(fed)], 1)  # 0: the prompt
    order = (~real).byte().argsort(dim=1, stable=True)[:, :int(real.sum(1).max())]     # (p, S)
    ids, place, part = (x.gather(1, order) for x in (ids, place, part.masked_fill(~real, -1)))
    visible = (part[:, None] == 0) | (part[:, None] == part[:, :, None])               # (p, S, S)
    with autocast():
        states = run_model(model, ids, visible.tril()[:, None], place)                 # (p, S, H)
    column = (real.cumsum(1) - 1)[:, width:].reshape(-1, longest)                      # (b, T)
    column = torch.cat([(length - 1).repeat_interleave(group, 0), column[:, :-1]], 1)
    row = torch.arange(count, device=mask.device).repeat_interleave(group)[:, None]
    # index_select: the gradient of states[row, column] is summed in any order on several threads
    return states.flatten(0, 1).index_select(0, (row * states.shape[1] + column)[mask])


def at_tokens(batch, values):
    """A number for each completion token, (n,), at its place in (b, T); 0 in padding."""
    mask = batch.completion_mask
    return torch.zeros_like(mask).masked_scatter(mask.bool(), values)


def score_tokens(model, batch):
    """Log-probs at TEMPERATURE, and exact entropy; (b, T) each, 0 in padding."""
    tokens = batch.completion_ids[batch.completion_mask.bool()]
    values = InPieces.apply(states_before(model, batch), model.get_output_embeddings().weight,
                            tokens)                                                    # (2, n)
    return [at_tokens(batch, some) for some in values]


@torch.no_grad()
def score_without_grad(model, batch):
    """Log-probs (B, T) of a whole batch, a micro-batch at a time, wherever the model is."""
    logps = torch.zeros_like(batch.completion_mask)
    for rows in micro_batches(batch):
        here = {name: tensor.to(model.device) for name, tensor in vars(batch.rows(rows)).items()}
        logps[rows] = score_tokens(model, Batch(**here))[0].to(logps.device)
    return logps


def reference_logps(run, batch):
    """The reference's log-probs (B, T). With LoRA it is the policy without its adapter."""
    if run.reference is not None:
        return score_without_grad(run.reference, batch)
    run.policy.disable_adapters()
    logps = score_without_grad(run.policy, batch)
    run.policy.enable_adapters()
    return logps


def behaviour_logps(policy, batch):
    """The sampling policy's log-probs (B, T): in float32 the sampler's, equal to `score_tokens` but
    for float noise; bfloat16 rounds the two apart by more than GSPO's clip range: computed anew."""
    return batch.sampled_logps if DTYPE == "float32" else score_without_grad(policy, batch)


# ======================================== Optimisation ==========================================


def begin_step(run):
    """Count the step. Its chance depends on SEED and its number alone: resuming changes nothing."""
    run.step += 1
    torch.manual_seed(hash((SEED, run.step)))
    return Meter()


def micro_batches(batch):
    """A batch's row numbers, at most MICRO_BATCH at a time and equally many of each prompt: groups
    of like length together, so that little is padding. The gradients of the parts add up."""
    group = batch.group_size()
    size = max(n for n in range(1, MICRO_BATCH + 1) if n % group == 0 or group % n == 0)
    groups = torch.arange(len(batch.ended), device=batch.ended.device).unflatten(0, (-1, group))
    order = batch.completion_mask.sum(1)[groups].sum(1).argsort(stable=True)
    return groups[order].flatten().split(size)


def new_optimizer(module, learning_rate):
    """AdamW over a module's trained weights; `initial_lr` is what the warm-up grows to."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return torch.optim.AdamW([{"params": trained, "initial_lr": learning_rate}], learning_rate,
                             ADAM_BETAS, ADAM_EPSILON, WEIGHT_DECAY, fused=True)


def optimiser_step(run, name, meter):
    """One AdamW step of a trained module on its gradient: the mean of all processes', clipped."""
    optimizer = run.trained[name][1]
    settings = optimizer.param_groups[0]
    if processes > 1:
        for parameter in settings["params"]:
            dist.all_reduce(parameter.grad.div_(processes))
    with one_line(f"step {run.step}, {name}", "finite gradients: lower LEARNING_RATE, RESUME_FROM"):
        norm = torch.nn.utils.clip_grad_norm_(settings["params"], MAX_GRAD_NORM or math.inf,
                                              error_if_nonfinite=True)
    done = float(next(iter(optimizer.state.values()), {"step": 0})["step"])
    settings["lr"] = settings["initial_lr"] * min(1.0, (done + 1) / max(1, WARMUP_STEPS))
    optimizer.step()
    optimizer.zero_grad()
    meter.add({"grad_norm": norm, "learning_rate": settings["lr"]})


class Meter:
    """What a step measures: weighted means by name, of all processes; and seconds by phase."""

    def __init__(self):
        self.pairs, self.seconds = defaultdict(list), defaultdict(float)
        self.last = time.perf_counter()

    def add(self, values, weights=None):
        """Add tensors or numbers to the means of their names; all count alike without weights."""
        for name, value in values.items():
            value = torch.as_tensor(value, dtype=torch.float64).detach()
            weight = torch.ones_like(value) if weights is None else weights
            self.pairs[name].append(torch.stack([(value * weight).sum(), weight.sum()]))

    def lap(self, phase):
        """Add the seconds since the last lap to a phase, queued GPU work included."""
        if DEVICE != "cpu":
            torch.cuda.synchronize()
        self.seconds[phase] += time.perf_counter() - self.last
        self.last = time.perf_counter()

    def means(self):
        """The metrics by name."""
        sums = everyone({name: sum(pairs).tolist() for name, pairs in self.pairs.items()})
        metrics = {f"time/{phase}": seconds for phase, seconds in self.seconds.items()}
        for name in self.pairs:
            total, weight = map(sum, zip(*(each[name] for each in sums)))
            metrics[name] = total / weight if weight else math.nan
        return metrics


def measure_rollout(run, meter, batch, rewards, parts):
    """Measure a rollout: rewards, lengths, how far sampler and trainer are apart."""
    groups, lengths = rewards.unflatten(0, (-1, GROUP_SIZE)), batch.completion_mask.sum(1)
    run.num_tokens += sum(everyone(int(lengths.sum())))
    meter.add({"reward": rewards, "reward_std": groups.std(1, correction=min(1, GROUP_SIZE - 1)),
               "frac_reward_zero_std": without_spread(groups), "accuracy": parts["verifier"],
               **{f"rewards/{name}": scores for name, scores in parts.items()},
               "completions/mean_length": lengths, "completions/clipped_ratio": ~batch.ended})
    meter.add({"sampling_logp_difference": (batch.sampled_logps - batch.old_logps).abs()},
              batch.completion_mask)


# ======================================= Reward and data ========================================


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


def load_reward_function(rows):
    """REWARD_FUNCTION as (questions, responses, references) -> scores; compute_score, which answers
    one by one, with the data_source that `rows` have."""
    path, name = re.fullmatch(r"(.*?)(?::(\w+))?", REWARD_FUNCTION).groups("compute_score")
    with one_line(f"REWARD_FUNCTION={REWARD_FUNCTION}", "path/to/file.py:name of a function in it, "
                  "or path/to/file.py with a compute_score"):
        sys.path.append(str(find_path(path).parent))  # for what it imports from beside it
        function = runpy.run_path(str(find_path(path)), run_name="reward_function")[name]
    sources = {(row["question"], row["answer"]): row.get("data_source", "") for row in rows}
    return function if name != "compute_score" else lambda questions, responses, references: [
        function(sources[question, reference], response, reference, {"question": question})
        for question, response, reference in zip(questions, responses, references)]


def load_scorers(rows):
    """The sources of the reward by name: functions (questions, responses, references) -> scores.
    The reward model was trained on pairs, `tokenizer(question, answer)` = [CLS] q [SEP] a [SEP]:
    one joined string would be something it never saw. Equal pairs are scored once."""
    scorers = {"verifier": verify}
    if REWARD_FUNCTION:
        scorers["function"] = load_reward_function(rows)
        trial = [[rows[0][key]] for key in ("question", "answer", "answer")]
        checked_scores("function", scorers["function"], *trial)
    if not REWARD_WEIGHTS.get("model"):
        return scorers
    tokenizer = load(AutoTokenizer, REWARD_MODEL, "REWARD_MODEL")
    model = load(AutoModelForSequenceClassification, REWARD_MODEL, "REWARD_MODEL",
                 dtype=getattr(torch, DTYPE)).to(FROZEN_DEVICE).eval()
    if model.num_labels != 1:
        fail(f"REWARD_MODEL={REWARD_MODEL}: it has {model.num_labels} outputs; expected one score")

    @torch.no_grad()
    def score(questions, responses, references):
        pairs = sorted(set(zip(questions, responses)), key=lambda pair: (len("".join(pair)), pair))
        scores = {}  # of pairs of like length together
        for some in (pairs[at:at + REWARD_BATCH] for at in range(0, len(pairs), REWARD_BATCH)):
            inputs = tokenizer(*map(list, zip(*some)), truncation="longest_first", padding=True,
                             max_length=MAX_REWARD_TOKENS, return_tensors="pt").to(model.device)
            logits = model(**inputs).logits[:, 0].float()                              # (n,)
            scores |= zip(some, (logits.sigmoid() if REWARD_SIGMOID else logits).tolist())
        return [scores[pair] for pair in zip(questions, responses)]
    return scorers | {"model": score}


def check_reward_model(run):
    """Show the reward model a right answer and the same with another number; say what it thinks."""
    row = next((row for row in run.train_rows if last_number(row["answer"])), run.train_rows[0])
    question, right = row["question"], row["answer"]
    wrong = re.sub(r"[\d.,]*\d(?=\D*$)", str(abs(last_number(right) or 0) + 1), right)
    good, bad = run.scorers["model"]([question] * 2, [right, wrong], [right] * 2)
    return (f"the reward model scores {right[-36:]!r} {good:.2f} and {wrong[-36:]!r} {bad:.2f}" +
            ("" if good > bad else ": the wrong one is not lower, do not trust it alone"))


def checked_scores(name, scorer, questions, responses, references):
    """A source's scores, (n,); one line when it raises or returns anything else."""
    with one_line(f"the reward source {name!r}", f"{len(responses)} finite numbers"):
        scores = [float(score) for score in scorer(questions, responses, references)]
        if len(scores) != len(responses) or not all(map(math.isfinite, scores)):
            raise ValueError(f"it returned {len(scores)}: {scores}")
    return torch.tensor(scores, device=DEVICE)


def texts_of(run, batch, kept=True):
    """The completions as texts; of the `kept` tokens (B, T) only."""
    ids = batch.completion_ids.where(batch.completion_mask.bool() & kept,
                                     run.tokenizer.pad_token_id)
    return run.tokenizer.batch_decode(ids, skip_special_tokens=True)


def score_completions(run, rows, batch, kept=True):
    """Rewards (B,), and each source's unweighted scores (B,); of the `kept` tokens (B, T) only."""
    rows = [rows[i] for i in batch.prompt_index.tolist()]
    texts = ([row["question"] for row in rows], texts_of(run, batch, kept),
             [row["answer"] for row in rows])
    parts = {name: checked_scores(name, scorer, *texts) for name, scorer in run.scorers.items()}
    return sum(REWARD_WEIGHTS.get(name, 0.0) * scores for name, scores in parts.items()), parts


def load_rows(name, tokenizer):
    """All rows {question, answer, prompt_ids} of a dataset constant, less those whose prompt is too
    long. Any further key of an entry names a column that is kept under that key."""
    rows, readers = [], {"parquet": pd.read_parquet,  # dtype=False: "007" stays text
                         "json": partial(pd.read_json, dtype=False),
                         "jsonl": partial(pd.read_json, dtype=False, lines=True)}
    for entry in globals()[name]:
        path, kind = entry["path"], entry.get("type") or entry["path"].rpartition(".")[2]
        columns = {"question": entry["input"], "answer": entry["output"]} | {
            key: entry[key] for key in entry.keys() - {"path", "type", "input", "output"}}
        files = [path] if "://" in path else glob.glob(path) or glob.glob(str(PROJECT / path))
        with one_line(f"{name}: {path}", f"{'|'.join(readers)} with text in the columns "
                      f"{', '.join(columns.values())}; or PROFILE=embedded"):
            if not files:
                raise ValueError(f"no such file here or in {PROJECT}")
            table = pd.concat(readers[kind](file) for file in sorted(files))
            if missing := set(columns.values()) - set(table):
                raise ValueError(f"no column {', '.join(missing)}; it has {[*table]}")
            table = table[[*columns.values()]].set_axis([*columns], axis=1)
            text = table.map(lambda value: isinstance(value, (str, int, float)) and value == value)
            if table.empty or not text.all(axis=None):
                raise ValueError(f"{len(table)} rows, {(~text).sum().to_dict()} without text")
        rows += table.astype(str).to_dict("records")
    messages = [[{"role": "user", "content": row["question"]}] for row in rows]
    with one_line(f"POLICY_MODEL={POLICY_MODEL}", "a tokenizer with a chat template"):
        prompts = tokenizer.apply_chat_template(messages, add_generation_prompt=True,
                                                enable_thinking=ENABLE_THINKING)["input_ids"]
    kept = [row | {"prompt_ids": ids} for row, ids in zip(rows, prompts)
            if len(ids) <= MAX_PROMPT_TOKENS]
    if len(kept) < len(rows):
        print(f"{name}: kept {len(kept)} of {len(rows)} prompts ({MAX_PROMPT_TOKENS=})")
    return kept


def next_questions(run, count):
    """This process's share of the next `count` rows; each pass has an order of its own."""
    size, start = len(run.train_rows), run.questions
    run.questions += count
    ahead = [row for number in range(start // size, (run.questions - 1) // size + 1)
             for row in random.Random(f"{SEED} {number}").sample(run.train_rows, size)]
    return ahead[start % size:][:count][rank::processes]


# ========================================= Evaluation ===========================================


def evaluate(run):
    """Held-out accuracy, reward and length, always of the same questions and random numbers."""
    torch.manual_seed(SEED)
    meter, shown = Meter(), []
    blocks = (run.eval_rows[at:at + EVAL_BATCH] for at in range(0, len(run.eval_rows), EVAL_BATCH))
    for some in filter(None, (block[rank::processes] for block in blocks)):
        greedy = texts_of(run, sample_groups(run.policy, run.tokenizer, some, 1, temperature=0))
        right = torch.tensor(verify(None, greedy, [row["answer"] for row in some]))
        batch = sample_groups(run.policy, run.tokenizer, some, 1, EVAL_TEMPERATURE)
        rewards, parts = score_completions(run, some, batch)
        meter.add({"eval/accuracy": parts["verifier"], "eval/accuracy_greedy": right,
                   "eval/reward": rewards, "eval/mean_length": batch.completion_mask.sum(1)})
        for i, text in enumerate(texts_of(run, batch)):
            scores = ", ".join(f"{name} {scores[i]:.2f}" for name, scores in parts.items())
            scores = f"reward {rewards[i]:.2f} ({scores})"
            shown.append(f"  {some[i]['question']}\n    {text}\n    {scores}\n")
    meter.lap("eval")
    metrics = meter.means()
    heading = ("step {}: held-out accuracy {eval/accuracy:.3f} sampled, {eval/accuracy_greedy:.3f} "
               "greedy; reward {eval/reward:.3f}; {eval/mean_length:.1f} tokens\n")
    run.samples = heading.format(run.step, **metrics) + "".join(shown[:SHOW_SAMPLES])
    tqdm.write(run.samples)
    return metrics


# ==================================== Checkpoints and plots =====================================

SHOWN = {"reward": "reward", "accuracy": "accuracy", "kl": "KL",  # beside the progress bar
         "completions/mean_length": "length", "clip_ratio/region_mean": "clipped"}
PANELS = {  # of the plot: metrics and constants by title; what a script does not have is not drawn
    "Accuracy": "accuracy eval/accuracy eval/accuracy_greedy",
    "Mean reward": "reward eval/reward",
    "Policy loss": "policy_loss",
    "Relative advantage": "advantage/mean advantage/size",
    **ALGORITHM_PANELS,
    "Entropy, nats per token": "entropy",
    "Mean response length, tokens": "completions/mean_length eval/mean_length",
    "Clip fraction, of tokens": "clip_ratio/region_mean clip_ratio/high_mean clip_ratio/low_mean",
    "Shares": "completions/clipped_ratio frac_reward_zero_std",
    "Seconds per step": "time/update time/rollout time/reward time/logps",
}


def finish_step(run, metrics, name=""):
    """Evaluate, write the step's row, save and draw, each when it is due: all of it at the end of
    an epoch, of the run, or of a stage, whose `name` is then the checkpoint's."""
    if any(everyone(run.stopping)):
        run.total_steps = run.step  # Ctrl-C: this step is the last
    epoch, rest = divmod(run.step, run.steps_per_epoch)
    ends = name or rest == 0 or run.step == run.total_steps
    row = {"step": run.step, "epoch": run.step / run.steps_per_epoch,
           "num_tokens": run.num_tokens, **metrics}
    if metrics:
        row["step_time"] = sum(value for key, value in metrics.items() if key.startswith("time/"))
    if DEVICE != "cpu":
        row["peak_memory"] = torch.cuda.max_memory_allocated() / 1e9  # GB
    if ends or EVAL_EVERY and run.step % EVAL_EVERY == 0:
        row |= evaluate(run)
    run.history.append(row)
    if rank == 0:
        pd.DataFrame(run.history).to_csv(run.folder / ".metrics.csv", index=False)
        os.replace(run.folder / ".metrics.csv", run.folder / "metrics.csv")
        if ends or SAVE_EVERY and run.step % SAVE_EVERY == 0:
            save_checkpoint(run, name or (f"step_{run.step}" if rest else f"epoch_{epoch}"))
        if "eval/accuracy" in row:
            plot_metrics(run)
    run.bar.set_postfix_str(", ".join(f"{label} {row[key]:.3g}" for key, label in SHOWN.items()
                                      if key in row), refresh=False)
    run.bar.update(run.step - run.bar.n)


def save_checkpoint(run, name):
    """Write a checkpoint under a temporary name, then rename it: a kill leaves only whole ones."""
    new = run.folder / f".{name}.partial"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    (new / "train_script.py").write_bytes(run.source)
    (new / "samples.txt").write_text(run.samples, encoding="utf-8")
    (new / "constants.json").write_text(json.dumps(run.facts, indent=2))
    if run.step:  # epoch_0 is the start: nothing to go on from
        run.policy.save_pretrained(new)
        run.tokenizer.save_pretrained(new)
        for part, (module, optimizer) in run.trained.items():
            if part != "policy":
                save_model(module, str(new / f"{part}.safetensors"))  # tied weights once
            if optimizer is not None:
                state = {f"{i}.{key}": value for i, entry in optimizer.state_dict()["state"].items()
                         for key, value in entry.items()}
                save_file(state, new / f"{part}_optimizer.safetensors")
        counters = {key: vars(run)[key] for key in ("step", "questions", "num_tokens", "state")}
        (new / "trainer_state.json").write_text(json.dumps(counters))
        shutil.copyfile(run.folder / "metrics.csv", new / "metrics.csv")
    os.replace(new, run.folder / name)


def load_checkpoint(run, folder):
    """Put networks, optimisers and metrics back to where `folder` left them."""
    with one_line(f"RESUME_FROM={folder}", "a whole epoch_N or step_N folder, N > 0"):
        for part, (module, optimizer) in run.trained.items():
            if part != "policy":
                load_model(module, folder / f"{part}.safetensors")
            if optimizer is not None:
                state, saved = defaultdict(dict), optimizer.state_dict()
                for name, value in load_file(folder / f"{part}_optimizer.safetensors").items():
                    i, key = name.split(".")
                    state[int(i)][key] = value
                optimizer.load_state_dict(saved | {"state": dict(state)})
        if LORA_RANK:
            from peft import set_peft_model_state_dict
            set_peft_model_state_dict(run.policy, load_file(folder / "adapter_model.safetensors"))
        run.history = pd.read_csv(folder / "metrics.csv").to_dict("records")


def plot_metrics(run):
    """Draw PANELS into training_metrics.png."""
    table = pd.DataFrame(run.history).set_index("step").dropna(axis=1, how="all")
    panels = {title: names.split() for title, names in PANELS.items()
              if set(names.split()) & set(table)}
    rows = math.ceil(len(panels) / 4)
    figure = Figure(figsize=(15, 3 * rows), layout="constrained")
    for place, (title, names) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(rows, 4, place, title=title)
        for name in names:
            if name in constants():
                axes.axhline(globals()[name], color="grey", linestyle="--", label=name)
            elif name in table:  # what is not measured in each step is dots
                points = table[name].dropna()
                axes.plot(points, label=name, marker="" if len(points) == run.step else ".")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8, frameon=False)
    figure.suptitle(f"{run.facts['script']}: {POLICY_MODEL}, seed {SEED}, by step")
    figure.savefig(run.folder / ".training_metrics.png", dpi=110)
    os.replace(run.folder / ".training_metrics.png", run.folder / "training_metrics.png")


# ======================================== Command line ==========================================

RULES = """
    PROFILE in ("full", "embedded") and DTYPE in ("float32", "bfloat16") and OUTPUT_DIR != ""
    DEVICE == "cpu" or (torch.device(DEVICE).index or 0) < torch.cuda.device_count()  # or cpu
    FROZEN_DEVICE == "cpu" or (torch.device(FROZEN_DEVICE).index or 0) < torch.cuda.device_count()
    min(BATCH_SIZE, GROUP_SIZE, MAX_NEW_TOKENS, MAX_PROMPT_TOKENS, MINIBATCH, MICRO_BATCH) >= 1
    min(NUM_EPOCHS, EVAL_BATCH, REWARD_BATCH, LOGITS_AT_ONCE, LORA_ALPHA) >= 1
    min(MAX_STEPS, EVAL_EVERY, EVAL_QUESTIONS, SAVE_EVERY, SHOW_SAMPLES, WARMUP_STEPS) >= 0
    min(LEARNING_RATE, WEIGHT_DECAY, ADAM_EPSILON, MAX_GRAD_NORM, EVAL_TEMPERATURE, THREADS) >= 0
    0 <= SEED < 2**53 and LORA_RANK >= 0 and TEMPERATURE >= 0.01 and MAX_REWARD_TOKENS >= 8
    len(ADAM_BETAS) == 2 and 0 <= min(ADAM_BETAS) <= max(ADAM_BETAS) < 1
    BATCH_SIZE * GROUP_SIZE % MINIBATCH == 0  # a rollout is whole minibatches
    BATCH_SIZE % processes == MINIBATCH % processes == 0  # torchrun's processes share them
    MINIBATCH // processes % GROUP_SIZE == 0 or GROUP_SIZE % (MINIBATCH // processes) == 0
    set(REWARD_WEIGHTS) <= {"model", "verifier", "function"} and any(REWARD_WEIGHTS.values())
    math.isfinite(sum(REWARD_WEIGHTS.values())) and train_datasets and eval_datasets
    bool(REWARD_FUNCTION) == bool(REWARD_WEIGHTS.get("function"))  # a file and a weight, or neither
    all({"path", "input", "output"} <= set(entry) for entry in train_datasets + eval_datasets)
    all(type(text) is str for entry in train_datasets + eval_datasets for text in entry.values())
"""
rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's
PROJECT = next((folder for folder in (*Path(__file__).resolve().parents, Path.cwd())
                if (folder / "data" / "build.py").exists()), Path.cwd())  # where data/ is


def fail(message):
    """Stop with one line on standard error and exit status 1."""
    time.sleep(5 * (rank > 0))  # the first process speaks, and torchrun ends the others
    raise SystemExit(f"error: {message}")


@contextmanager
def one_line(what, expected):
    """Turn any error inside into one line: what it is about, the error's words, what to expect."""
    try:
        yield
    except (Exception, SystemExit) as error:  # files, libraries, users' functions raise anything
        if str(error).startswith("error: "):
            raise
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        fail(f"{what}: {kind}{' '.join(str(error).split())[:250]}; expected {expected}")


def everyone(value):
    """The list of all processes' values."""
    values = [value] * processes
    if processes > 1:
        dist.all_gather_object(values, value)
    return values


def find_path(path):
    """A path from the working directory, or from the project's folder if it is only there."""
    inside = PROJECT / path
    return inside if inside.exists() and not Path(path).exists() else Path(path)


def constants():
    """The constants by name, as they are now."""
    return {name: globals()[name] for name in DEFAULTS}


def resolve(values, profile):
    """The constants' values in a profile."""
    return {name: value[profile == "embedded"] if isinstance(value, Either) else value
            for name, value in values.items()}


def parse(argument):
    """'NAME=VALUE' as (name, value of the constant's type), or one line and exit."""
    name, equals, value = argument.partition("=")
    known = resolve(DEFAULTS, "full")
    if not equals or name not in known:
        close = difflib.get_close_matches(name.upper(), known, n=1)
        close = f" (did you mean {close[0]}?)" if close else ""
        fail(f"{argument!r} is not NAME=VALUE{close}; expected one of {', '.join(known)}")
    kind = float if name == "CLIP_RANGE" else type(known[name])
    if kind is str:
        return name, value
    with suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = ast.literal_eval(value)
    if type(value) in (int, float) and kind in (int, float) and math.isfinite(value):
        value = kind(value) if kind(value) == value else value  # 1 for 1.0, 1000 for 1e3
    value = tuple(value) if type(value) is list and kind in (tuple, float) else value
    if value != math.inf and type(value) in (kind, tuple if name == "CLIP_RANGE" else kind):
        return name, value
    fail(f"{argument}: found {type(value).__name__}, expected {kind.__name__}, as {known[name]!r}")


def configure(arguments):
    """Set the constants: this file's, those of the checkpoint that is resumed, the command line's;
    resolve what is Either by the profile; hold them to the rules. Returns where the run stands."""
    counters = {"step": 0, "questions": 0, "num_tokens": 0, "state": {}}  # `state`: the algorithm's
    if folder := dict(map(parse, arguments)).get("RESUME_FROM", DEFAULTS["RESUME_FROM"]):
        with one_line(f"RESUME_FROM={folder}", "an epoch_N or step_N folder, N > 0, of a run"):
            saved = json.loads((find_path(folder) / "constants.json").read_text())["constants"]
            counters = json.loads((find_path(folder) / "trainer_state.json").read_text())
        elsewhere = {"DEVICE", "FROZEN_DEVICE", "RESUME_FROM"} | saved.keys() - DEFAULTS.keys()
        arguments = [f"{name}={saved[name]}" for name in saved.keys() - elsewhere] + arguments
    values = DEFAULTS | dict(map(parse, arguments))
    if values["PROFILE"] == "auto":
        values["PROFILE"] = "full" if torch.cuda.is_available() else "embedded"
    values = resolve(values, values["PROFILE"])
    globals().update(values)
    for rule in filter(None, map(str.strip, (ALGORITHM_RULES + RULES).splitlines())):
        with suppress(TypeError, ValueError, AttributeError, RuntimeError):  # no: it does not hold
            if eval(rule, globals()):
                continue
        found = [f"{name}={values[name]!r}" for name in values if re.search(rf"\b{name}\b", rule)]
        fail(f"{', '.join(found)}: expected {rule}")
    return counters


def load(kind, name, constant, **options):
    """`kind.from_pretrained(name)`, a folder or id, with one line of help when that fails."""
    with one_line(f"{constant}={name}", f"a model that is here: `hf download {name}`, or "
                  f"{constant}=<folder>, or PROFILE=embedded"):
        return kind.from_pretrained(str(find_path(name)), **options)


def load_policy(name, frozen=False):
    """A causal model. Trained weights stay float32: AdamW's steps of 1e-6 round to nothing in
    bfloat16. Evaluation mode: dropout would train something else."""
    dtype = getattr(torch, DTYPE) if frozen or LORA_RANK else torch.float32
    constant = "RESUME_FROM" if name == RESUME_FROM else "POLICY_MODEL"
    model = load(AutoModelForCausalLM, name, constant, dtype=dtype)
    model = model.to(FROZEN_DEVICE if frozen else DEVICE).eval().requires_grad_(not frozen)
    if LORA_RANK and not frozen:  # beside every linear layer but the head
        with one_line(f"LORA_RANK={LORA_RANK}", "the package peft: pip install peft"):
            from peft import LoraConfig
            model.add_adapter(LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, lora_dropout=0.0,
                                         target_modules="all-linear"))
        for parameter in filter(lambda each: each.requires_grad, model.parameters()):
            parameter.data = parameter.data.float()  # peft gives it the base's dtype
    for layer in model.modules():  # transformers' own way works in training mode only
        if GRADIENT_CHECKPOINTING and not frozen and isinstance(layer, GradientCheckpointingLayer):
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False,
                                    preserve_rng_state=False)
    return model


def new_folder():
    """Make the run's folder: OUTPUT_DIR, or with _2, _3, ... behind it when that is in use."""
    number = 1
    folder = wanted = PROJECT / OUTPUT_DIR.replace("{script}", Path(__file__).stem)
    with one_line(f"OUTPUT_DIR={OUTPUT_DIR}", "a folder that can be made"):
        while folder.exists() and any(folder.iterdir()):
            number += 1
            folder = wanted.with_name(f"{wanted.name}_{number}")
        everyone(None)  # all have seen what there is
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def start(arguments):
    """From the command line to a run. What can be checked before models load is checked first."""
    counters = configure(arguments)
    torch.set_num_threads(THREADS or torch.get_num_threads())
    torch.manual_seed(SEED)
    if DEVICE != "cpu":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", torch.device(DEVICE).index or 0)))
    if processes > 1:
        dist.init_process_group("gloo" if DEVICE == "cpu" else "nccl")
    if rank:  # only the first process speaks
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = load(AutoTokenizer, POLICY_MODEL, "POLICY_MODEL")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # it is masked: any will do
    train_rows = load_rows("train_datasets", tokenizer)
    eval_rows = load_rows("eval_datasets", tokenizer)[:EVAL_QUESTIONS or None]
    if len(train_rows) < BATCH_SIZE or len(eval_rows) < processes:
        fail(f"train_datasets, eval_datasets: {len(train_rows)}, {len(eval_rows)} questions by "
             f"MAX_PROMPT_TOKENS={MAX_PROMPT_TOKENS}; expected {BATCH_SIZE=}, {processes}")
    epoch = len(train_rows) // BATCH_SIZE  # steps in it
    total_steps = min(NUM_EPOCHS * epoch, MAX_STEPS or math.inf)
    if counters["step"] >= total_steps:
        fail(f"RESUME_FROM={RESUME_FROM} is at step {counters['step']} of {total_steps}; expected "
             "steps to do: raise NUM_EPOCHS or MAX_STEPS")
    scorers = load_scorers(train_rows + eval_rows)
    policy = load_policy(POLICY_MODEL if LORA_RANK else RESUME_FROM or POLICY_MODEL)
    run = SimpleNamespace(
        policy=policy, tokenizer=tokenizer, scorers=scorers, train_rows=train_rows,
        trained={"policy": (policy, new_optimizer(policy, LEARNING_RATE))},  # saved; and a critic
        reference=None,  # the policy as it started, if the algorithm needs a copy of it
        eval_rows=eval_rows, steps_per_epoch=epoch, total_steps=total_steps, history=[], samples="",
        stopping=0.0, **counters | {"state": {}}, source=Path(__file__).read_bytes())  # as of now
    prepare(run)
    if RESUME_FROM:
        load_checkpoint(run, find_path(RESUME_FROM))
        run.state |= counters["state"]
    run.folder = new_folder()
    if REWARD_FUNCTION:
        shutil.copy(find_path(re.sub(r":\w+$", "", REWARD_FUNCTION)), run.folder)
    describe(run, arguments)
    return run


def describe(run, arguments):
    """Print what trains on what, and where to; keep for constants.json what describes the run."""
    status, commit = subprocess.getstatusoutput(f'git -C "{PROJECT}" rev-parse HEAD')
    device = (torch.cuda.get_device_name(DEVICE) if DEVICE != "cpu" else
              f"CPU, {torch.get_num_threads()} of {os.cpu_count()} cores")
    run.facts = {"script": Path(__file__).stem, "command": sys.argv, "device": device,
                 "processes": processes, "torch": torch.__version__, "transformers":
                 transformers.__version__, "commit": "" if status else commit,
                 "constants": constants()}
    trained = sum(p.numel() for p in run.policy.parameters() if p.requires_grad) / 1e6
    silent = sum(last_number(row["answer"]) is None for row in run.train_rows)
    few = DEVICE != "cpu" and BATCH_SIZE * GROUP_SIZE // processes < 32
    print(f"""{run.facts["script"]}
  profile   {PROFILE}, {"a" if torch.cuda.is_available() else "no"} CUDA GPU; {device}; {DTYPE}
  settings  {" ".join(arguments) or "as in the file"}
  policy    {POLICY_MODEL}, {trained:.2f} M parameters to train
  reward    {" + ".join(f"{weight} {name}" for name, weight in REWARD_WEIGHTS.items() if weight)}
  check     {check_reward_model(run) if "model" in run.scorers else "there is no reward model"}
  data      {len(run.train_rows)} questions, {len(run.eval_rows)} held out; {silent} lack a number
  rollout   {BATCH_SIZE} prompts x {GROUP_SIZE} = {BATCH_SIZE * GROUP_SIZE} completions \
of at most {MAX_NEW_TOKENS} tokens{": few for a GPU, raise BATCH_SIZE and MINIBATCH" * few}
  update    minibatch {MINIBATCH}, micro-batch {MICRO_BATCH}, learning rate {LEARNING_RATE:g}
  algorithm {", ".join(f"{name}={globals()[name]}" for name in ALGORITHM_SHOWN.split())}
  steps     {run.step} of {run.total_steps} done, {run.steps_per_epoch} an epoch; {processes=}
  output    {run.folder}
""", flush=True)


def main(arguments):
    """`python SCRIPT [NAME=VALUE ...]`, or `torchrun --nproc_per_node=N SCRIPT ...`"""
    if {"-h", "--help"} & set(arguments):
        source = Path(__file__).read_text(encoding="utf-8").partition("\nDEFAULTS")[0]
        return print(__doc__, source[source.index("# --- Model"):], sep="\n")
    run = None

    def stop_soon(number, frame):
        """The first time this step becomes the last. (torchrun passes signals on a second time.)"""
        if run is None or run.stopping and time.monotonic() > run.stopping + 2:
            raise KeyboardInterrupt
        run.stopping = run.stopping or time.monotonic()

    signal.signal(signal.SIGINT, stop_soon)
    signal.signal(signal.SIGTERM, stop_soon)
    try:
        run = start(arguments)
        with tqdm(total=run.total_steps, initial=run.step, unit="step", ncols=120,
                  disable=rank > 0) as run.bar:
            if run.step == 0:
                finish_step(run, {})  # what there is before training
            train(run)
        everyone(None)  # nobody leaves while another still writes
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except RuntimeError as error:
        if processes == 1 or not re.search("gloo|nccl|[Cc]onnection", str(error)):
            raise
        fail(f"another process of this run has ended; RESUME_FROM a checkpoint in {run.folder}")
    print(f"step {run.step}. In {run.folder}: training_metrics.png, metrics.csv, and checkpoints")
    if run.stopping:
        raise SystemExit(130)


globals().update(resolve(DEFAULTS, "full"))  # until `configure` knows the profile

if __name__ == "__main__":
    main(sys.argv[1:])
