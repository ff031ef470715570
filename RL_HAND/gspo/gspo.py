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
"""GSPO: Group Sequence Policy Optimization (arXiv:2507.18071), in one file.

For each question the policy samples a group of answers; a reward model and a verifier score each answer;
an answer's advantage is its reward minus the mean reward of its group, so no critic is needed; the policy
then takes a few clipped gradient steps on these answers, and the next questions are drawn.

What makes it GSPO is one number per *answer*, the length-normalised likelihood ratio (Eq. 7),

    s_i = (pi(y_i | x) / pi_old(y_i | x)) ^ (1 / |y_i|) = exp( mean_t [ log pi(y_it) - log pi_old(y_it) ] )

and the objective that this script *minimises* (Eq. 5 with the sign of a loss, plus two optional terms) is

    L = - mean_i min( s_i A_i, clip(s_i, 1 - low, 1 + high) A_i )  +  KL_COEF KL(pi || pi_ref)  -  ENTROPY_COEF H(pi)

GRPO has one ratio per *token* in the same place. An answer is either inside GSPO's clip range or outside it
as a whole, which is why the range is so narrow (0.0003, not 0.2) and why it cuts so many more tokens.

Simplifications, on purpose: one process, one device, the whole update between two rollouts.

    python RL_HAND/gspo/gspo.py                                   # Qwen3-0.6B with a GPU, small models without
    python RL_HAND/gspo/gspo.py CLIP_RANGE=0.2 SEED=1             # any constant below can be set like this
    python RL_HAND/gspo/gspo.py RESUME_FROM=runs/gspo/epoch_1     # go on exactly where that checkpoint was
    python RL_HAND/gspo/gspo.py --help
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
from dataclasses import dataclass, field, fields, replace
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
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer,
                          DynamicCache)

# ============================================== Constants ==============================================
# Each can be set on the command line as NAME=VALUE. On a machine without a CUDA GPU the values in EMBEDDED
# (below) take the place of the ones here: change those there.

# --- Model
PROFILE = "auto"                   # "full": the models named here; "embedded": the small ones in data/; "auto": full on CUDA
POLICY_MODEL = "Qwen/Qwen3-0.6B"   # what is trained: a folder or a model id; its start is also the KL reference
REWARD_MODEL = "OpenAssistant/reward-model-deberta-v3-large-v2"  # scores (question, answer) pairs; higher is better
ENABLE_THINKING = False            # the chat template's switch; thinking rarely fits into MAX_NEW_TOKENS
DEVICE = "auto"                    # "auto": cuda if there is one, else cpu; or "cuda:1", "cpu"
DTYPE = "auto"                     # arithmetic of the passes (weights stay float32): "auto": bfloat16 on CUDA, else float32
LOGITS_AT_ONCE = 2**26             # logits alive at a time, in numbers: (B, T, V) never exists; memory only

# --- Data
train_datasets = [{"path": "hf://datasets/openai/gsm8k/main/train-00000-of-00001.parquet",
                   "type": "parquet", "input": "question", "output": "answer"}]  # questions to train on
eval_datasets = [{"path": "hf://datasets/openai/gsm8k/main/test-00000-of-00001.parquet",
                  "type": "parquet", "input": "question", "output": "answer"}]   # held out: never trained on
MAX_PROMPT_TOKENS = 256            # tokens; longer prompts are dropped and counted

# --- Sampling
BATCH_SIZE = 2                     # prompts per rollout
GROUP_SIZE = 4                     # completions per prompt (G)
MAX_NEW_TOKENS = 512               # tokens per completion, the end token included
TEMPERATURE = 1.0                  # of the sampled *and* of the trained distribution: they must be the same

# --- Reward
REWARD_WEIGHTS = {"model": 0.5, "verifier": 1.0}  # reward = sum of weight x source; sources: model, verifier, function
REWARD_SIGMOID = True              # the reward model's score goes through a sigmoid, so that 0.5 x it stays below 1 right answer
REWARD_FUNCTION = ""               # "path/to/file.py:name", name(questions, responses, references) -> scores; weight: "function"
MAX_REWARD_TOKENS = 512            # tokens of (question, answer); DeBERTa was trained on 512. Cut from the longer one's end
REWARD_BATCH = 64                  # pairs per forward pass of the reward model; memory only

# --- Optimisation
NUM_EPOCHS = 1                     # passes over the training questions
MAX_STEPS = 0                      # stop after this many rollouts; 0: after NUM_EPOCHS
LEARNING_RATE = 1e-6               # AdamW
WARMUP_STEPS = 0                   # optimiser steps of linear warm-up
ADAM_BETAS = (0.9, 0.95)           # AdamW
WEIGHT_DECAY = 0.0                 # AdamW
MAX_GRAD_NORM = 1.0                # gradient clipping; 0: none
MINIBATCH = 8                      # completions per optimiser step (changes the algorithm)
MICRO_BATCH = 4                    # completions per forward pass (memory only: gradients accumulate to MINIBATCH)
SEED = 0                           # of sampling, data order and shuffling

# --- Algorithm
GSPO_EPOCHS = 4                    # passes over a rollout. With a single optimiser step per rollout every ratio is 1
CLIP_RANGE = (3e-4, 4e-4)          # (low, high) or one number. Of a *sequence* ratio: GSPO sec. 5.1; 0.2 never clips one
ADVANTAGE_TYPE = "normalized"      # "relative": R - mean(R); "normalized": (R - mean(R)) / std(R), GSPO Eq. 6
USE_GROUP_NORMALIZATION = True     # mean and std over each group; False: over the whole rollout
STD_CORRECTION = 1                 # the std divides by n - 1 (TRL, verl); 0: by n
ADVANTAGE_EPSILON = 1e-6           # added to the std
USE_TOKEN_LEVEL_LOSS = False       # True: GSPO-token (Eq. 13), whose advantages may differ within an answer
USE_SEQUENCE_LEVEL_REWARD = True   # False: every line or sentence is credited with what it added to the reward
ENTROPY_COEF = 0.01                # weight of the entropy bonus
KL_COEF = 0.2                      # weight of the KL to the starting policy; 0: the reference is never loaded
ADAPTIVE_KL = True                 # move the coefficient to keep the KL near TARGET_KL
TARGET_KL = 0.01                   # nats per token

# --- Evaluation
EVAL_EVERY = 200                   # rollouts between evaluations on the held-out questions (also at 0 and at each epoch's end)
EVAL_QUESTIONS = 256               # held-out questions used; 0: all
EVAL_BATCH = 32                    # questions answered at once; memory only
EVAL_TEMPERATURE = 1.0             # of the sampled evaluation; the greedy one has none
TOP_P = 1.0                        # nucleus of the sampled evaluation only; training samples the full distribution
SHOW_SAMPLES = 3                   # held-out questions whose answers are printed at each evaluation

# --- Output
OUTPUT_DIR = "runs/gspo"           # the run's folder; gspo_2, gspo_3, ... if it exists: nothing is overwritten
SAVE_EVERY = 0                     # rollouts between extra checkpoints step_N/; 0: only epoch_N/
RESUME_FROM = ""                   # an epoch_N/ or step_N/ folder: go on exactly from there
TENSORBOARD = False                # also write event files (pip install tensorboard)

EMBEDDED = {  # the profile for a machine without a GPU: a 0.5 M Qwen3 and a 0.6 M DeBERTa, on two-operand sums
    "POLICY_MODEL": "data/policy",
    "REWARD_MODEL": "data/reward_model",
    "train_datasets": [{"path": "data/train.parquet", "type": "parquet", "input": "question", "output": "answer"}],
    "eval_datasets": [{"path": "data/heldout.parquet", "type": "parquet", "input": "question", "output": "answer"}],
    "MAX_PROMPT_TOKENS": 64,
    "BATCH_SIZE": 16,
    "GROUP_SIZE": 8,
    "MAX_NEW_TOKENS": 60,
    "NUM_EPOCHS": 2,
    "LEARNING_RATE": 1e-4,
    "MINIBATCH": 64,
    "MICRO_BATCH": 32,
    "GSPO_EPOCHS": 2,
    "TARGET_KL": 0.1,
    "EVAL_EVERY": 20,
    "EVAL_QUESTIONS": 512,
    "EVAL_BATCH": 512,
}

# ============================================== Training ===============================================


def train(run):
    """The whole algorithm. `run` (see `start`) holds the models, the data, the generators and the run's folder."""
    policy, tokenizer = run.policy, run.tokenizer
    for rows in question_batches(run):                                                 # BATCH_SIZE questions
        clock = Clock()
        batch = sample_groups(policy, tokenizer, rows, GROUP_SIZE, generator=run.sampler)  # B = prompts x G
        clock.lap("rollout")
        rewards, parts, segments = score_completions(run, rows, batch)                 # (B, K): K = 1 unless segmented
        clock.lap("reward")
        batch.advantages = compute_advantages(rewards).gather(1, segments)             # (B, T)
        batch.old_logps = behaviour_logps(policy, batch)                               # (B, T)
        if run.reference is not None:
            batch.ref_logps = score_without_grad(run.reference, batch)                 # (B, T)
        clock.lap("logps")

        meter = Meter()
        for minibatch in minibatches(batch, GSPO_EPOCHS, run.shuffler):
            minibatch.weights = token_weights(minibatch.completion_mask)               # (b, T), sums to 1
            for micro in micro_batches(minibatch):
                logps, entropy = score_tokens(policy, micro)                           # (b, T) each
                token_loss, stats = policy_loss(logps, micro.old_logps, micro.advantages, micro.completion_mask)
                kl = kl_to_reference(logps, micro.old_logps, micro.ref_logps)
                losses = {"policy_loss": token_loss, "entropy_loss": -entropy, "kl_loss": kl}
                loss = (micro.weights * (token_loss - ENTROPY_COEF * entropy + run.kl_coef * kl)).sum()
                loss.backward()
                meter.add(micro, loss, losses, {"kl": kl, "entropy": entropy, **stats})
            optimiser_step(run, meter)
        clock.lap("update")

        metrics = meter.means() | batch_metrics(batch, rewards, parts) | clock.times()
        metrics |= {"kl_coef": run.kl_coef, "learning_rate": run.optimizer.param_groups[0]["lr"]}
        if ADAPTIVE_KL and run.reference is not None:
            run.kl_coef = adapt_kl_coef(run.kl_coef, metrics["kl"])
        finish_step(run, metrics)


# ============================================= Advantages ==============================================


def compute_advantages(rewards):
    """Group-relative advantages (Eq. 6, arXiv:2507.18071).

    rewards: (B, K) float, GROUP_SIZE consecutive rows per prompt; K segments per completion (1 for a reward of
    the whole sequence), NaN where a completion has fewer. Returns (B, K), 0 where NaN.
    A group without spread (std below 1e-6 max(1, |reward|)) carries no signal and gets exactly 0: dividing
    float noise by itself would give advantages of any size, whatever the epsilon.

    >>> compute_advantages(torch.tensor([[95.0], [70.0], [85.0], [80.0]]) - 82.5).flatten().tolist()[3] < 0
    True
    """
    groups = rewards.reshape(-1, GROUP_SIZE * rewards.shape[1]) if USE_GROUP_NORMALIZATION else rewards.reshape(1, -1)
    centred = groups - groups.nanmean(1, keepdim=True)
    std = group_std(groups)
    if ADVANTAGE_TYPE == "normalized":
        advantages = centred / (std + ADVANTAGE_EPSILON)
    else:
        advantages = centred
    return advantages.masked_fill(without_spread(groups), 0.0).nan_to_num(0.0).reshape(rewards.shape)


def group_std(groups):
    """Standard deviation of each row of (groups, n), NaN entries left out. Returns (groups, 1)."""
    centred = groups - groups.nanmean(1, keepdim=True)
    count = groups.isfinite().sum(1, keepdim=True)
    return (centred.square().nansum(1, keepdim=True) / (count - STD_CORRECTION).clamp(min=1)).sqrt()


def without_spread(groups):
    """(groups, 1) bool: the rows of (groups, n) whose values are equal up to float noise."""
    scale = groups.abs().nan_to_num(0.0).amax(1, keepdim=True).clamp(min=1.0)
    return group_std(groups) < 1e-6 * scale


# ================================================ Loss =================================================


def policy_loss(logps, old_logps, advantages, mask):
    """The clipped sequence-ratio loss of every token (Eq. 5 and 7, arXiv:2507.18071; negated, to be minimised).

    logps, old_logps: (b, T) log-probs under the trained and the sampling policy; advantages: (b, T); mask: (b, T),
    1 up to and including the end token. Returns the token losses (b, T) and statistics, (b, T) each. All
    tokens of an answer share its ratio, so the mean over sequences of the mean over tokens is Eq. 5.

    With USE_TOKEN_LEVEL_LOSS the ratio is GSPO-token's sg[s_i] pi / sg[pi] (Eq. 14): the same value, and the
    same gradient when the advantage is constant over the answer, but free to differ per token when it is not.

    >>> old, new = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-0.9, -1.9]])
    >>> loss, stats = policy_loss(new, old, torch.ones(1, 2), torch.ones(1, 2))
    >>> round(stats["ratio"][0, 0].item(), 4), round(loss[0, 0].item(), 4)      # exp(0.1), cut to 1 + 4e-4
    (1.1052, -1.0004)
    """
    low, high = clip_range()
    log_ratio = ((logps - old_logps) * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)  # (b, 1)
    log_ratio = log_ratio.clamp(max=20.0)  # e^20 is far outside every range; this only keeps inf x 0 out of the gradient
    if USE_TOKEN_LEVEL_LOSS:
        ratio = torch.exp(log_ratio.detach() + logps - logps.detach())  # (b, T)
    else:
        ratio = torch.exp(log_ratio).expand_as(mask)  # (b, T)
    clipped = ratio.clamp(1 - low, 1 + high)
    loss = -torch.min(ratio * advantages, clipped * advantages)
    return loss, ratio_statistics(ratio, advantages, low, high)


def clip_range():
    """CLIP_RANGE as (low, high)."""
    return tuple(CLIP_RANGE) if isinstance(CLIP_RANGE, (tuple, list)) else (CLIP_RANGE, CLIP_RANGE)


def ratio_statistics(ratio, advantages, low, high):
    """The ratio, and which tokens' gradient the clip cuts: below with A < 0, above with A > 0. (b, T) each."""
    with torch.no_grad():
        cut_low = ((ratio < 1 - low) & (advantages < 0)).float()
        cut_high = ((ratio > 1 + high) & (advantages > 0)).float()
        return {"ratio": ratio.detach(), "clip_ratio/low_mean": cut_low, "clip_ratio/high_mean": cut_high,
                "clip_ratio/region_mean": cut_low + cut_high}


def token_weights(mask):
    """Weight of each token in a minibatch's loss: the mean over sequences of the mean over tokens. Sums to 1.

    mask: (b, T). Taken over the whole minibatch before it is cut into micro-batches, so that MICRO_BATCH
    changes the memory and nothing else.

    >>> token_weights(torch.tensor([[1.0, 1.0], [1.0, 0.0]]))
    tensor([[0.2500, 0.2500],
            [0.5000, 0.0000]])
    """
    return mask / mask.sum(1, keepdim=True).clamp(min=1) / len(mask)


def kl_to_reference(logps, old_logps, ref_logps):
    """KL(pi || pi_ref) at each sampled token, estimated as r (e^g - g - 1), g = log pi_ref - log pi. (b, T)

    r = pi / pi_old is live: it carries gradient. Over tokens drawn from pi_old the expectation of the value is the
    reverse KL *and* the expectation of its gradient is the reverse KL's, however stale the rollout. Without r the
    gradient of this k3 estimator is the *forward* KL's; that of plain k1 = -g is zero in expectation.
    """
    if ref_logps is None:
        return torch.zeros_like(logps)
    gap = (ref_logps - logps).clamp(-20.0, 20.0)
    return torch.exp((logps - old_logps).clamp(max=20.0)) * (torch.exp(gap) - gap - 1.0)


def adapt_kl_coef(coefficient, kl):
    """The next KL coefficient: x 1.5 when the mean KL is above 2 TARGET_KL, x 0.5 below half of it, in [0.01, 1].

    >>> adapt_kl_coef(0.2, 3 * TARGET_KL), adapt_kl_coef(0.2, 0.1 * TARGET_KL), adapt_kl_coef(0.2, TARGET_KL)
    (0.30000000000000004, 0.1, 0.2)
    """
    factor = 1.5 if kl > 2 * TARGET_KL else 0.5 if kl < 0.5 * TARGET_KL else 1.0
    return min(max(coefficient * factor, 0.01), 1.0)


# ========= The algorithm ends here. From here on the scripts are the same: you may stop reading. ==========

# =============================================== Rollout ===============================================


@dataclass
class Batch:
    """Some completions of a rollout: B completions of P prompts, T completion tokens at most.

    The prompt's tokens are kept once, left-padded; `prompt_index` says whose completion a row is. Completions are
    right-padded; `completion_mask` is 1.0 up to and including the first end token. Log-probs are float32.
    """
    prompt_ids: torch.Tensor                    # (P, L)
    prompt_mask: torch.Tensor                   # (P, L)
    prompt_index: torch.Tensor                  # (B,)
    completion_ids: torch.Tensor                # (B, T)
    completion_mask: torch.Tensor               # (B, T)
    sampled_logps: torch.Tensor                 # (B, T) as they were when the tokens were drawn
    ended: torch.Tensor                         # (B,) bool: False where MAX_NEW_TOKENS cut the completion off
    old_logps: torch.Tensor | None = None       # (B, T) the sampling policy's, in the ratio
    ref_logps: torch.Tensor | None = None       # (B, T)
    advantages: torch.Tensor | None = None      # (B, T)
    weights: torch.Tensor | None = None         # (B, T)

    def rows(self, index):
        """The batch of the given rows (1-D index), its padding trimmed to the longest of them."""
        longest = max(1, int(self.completion_mask[index].sum(1).max()))
        chosen = {f.name: getattr(self, f.name) for f in fields(self) if not f.name.startswith("prompt_")}
        chosen = {name: t[index] if t is None or t.dim() == 1 else t[index, :longest]
                  for name, t in chosen.items() if t is not None}
        return replace(self, prompt_index=self.prompt_index[index], **chosen)


@torch.no_grad()
def sample_groups(policy, tokenizer, rows, group_size, temperature=None, top_p=1.0, generator=None):
    """Sample `group_size` completions for each row's prompt; returns a Batch of len(rows) x group_size completions.

    Each prompt is run once and its key/value cache shared by its group; all completions are decoded together and
    those that ended leave the batch. Nothing comes from the model's generation_config (Qwen3's says top_k 20) but
    the end ids: what is sampled is softmax(logits / temperature), exactly what is trained. `temperature` 0 is greedy.
    """
    temperature = TEMPERATURE if temperature is None else temperature
    device, ends = policy.device, torch.tensor(end_ids(policy, tokenizer), device=policy.device)
    prompt_ids, prompt_mask = left_pad([row["prompt_ids"] for row in rows], tokenizer.pad_token_id, device)
    index = torch.arange(len(rows), device=device).repeat_interleave(group_size)      # (B,)
    count = len(index)
    ids = torch.full((count, MAX_NEW_TOKENS), tokenizer.pad_token_id, device=device)  # (B, T)
    logps = torch.zeros(count, MAX_NEW_TOKENS, device=device)
    mask = torch.zeros(count, MAX_NEW_TOKENS, device=device)
    ended = torch.zeros(count, dtype=torch.bool, device=device)

    with autocast(device):
        cache = DynamicCache(config=policy.config)
        hidden = run_model(policy, prompt_ids, prompt_mask, positions(prompt_mask), cache)[:, -1]  # (P, H)
        cache.batch_select_indices(index)
        hidden, attention = hidden[index], prompt_mask[index]                         # (B, H), (B, L)
        position = attention.sum(1, keepdim=True)                                     # (B, 1)
        live = torch.arange(count, device=device)                                     # rows still in the decoded batch
        for t in tqdm(range(MAX_NEW_TOKENS), "rollout", unit="token", leave=False, delay=3):
            scores = torch.log_softmax(head(policy, hidden) / (temperature or 1.0), -1)   # (live, V) float32
            token = draw(scores, temperature, top_p, generator)                       # (live,)
            running = ~ended[live]
            ids[live, t] = torch.where(running, token, tokenizer.pad_token_id)
            logps[live, t] = scores.gather(1, token[:, None])[:, 0] * running
            mask[live, t] = running.float()
            ended[live] |= torch.isin(token, ends)
            running = ~ended[live]
            left = int(running.sum())
            if left == 0 or t == MAX_NEW_TOKENS - 1:
                break
            if left <= 0.9 * len(live):                                               # drop the rows that ended
                live, token, attention, position = live[running], token[running], attention[running], position[running]
                cache.batch_select_indices(running.nonzero()[:, 0])
            attention = F.pad(attention, (0, 1), value=1)
            hidden = run_model(policy, token[:, None], attention, position, cache)[:, -1]
            position = position + 1
    longest = t + 1
    return Batch(prompt_ids, prompt_mask, index, ids[:, :longest], mask[:, :longest], logps[:, :longest], ended)


def draw(logps, temperature, top_p, generator):
    """One token per row of (n, V) log-probs: greedy at temperature 0, else sampled, from the top_p nucleus if < 1."""
    if temperature == 0:
        return logps.argmax(-1)
    probs = logps.exp()
    if top_p < 1.0:
        ordered, order = probs.sort(-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p                # the token that crosses top_p stays
        probs = probs.masked_fill(outside.scatter(1, order, outside), 0.0)
    return torch.multinomial(probs, 1, generator=generator)[:, 0]


def end_ids(policy, tokenizer):
    """Every id that ends a completion. Qwen3 has two, and the second is its padding id as well."""
    configured = policy.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in [*configured, tokenizer.eos_token_id] if i is not None})


def left_pad(sequences, pad_id, device):
    """Token lists -> ids and mask (P, L), padded on the left so that every prompt ends in the last column."""
    width = max(map(len, sequences))
    ids = torch.tensor([[pad_id] * (width - len(s)) + s for s in sequences], device=device)
    mask = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in sequences], device=device)
    return ids, mask


def positions(mask):
    """Position of each token among the unmasked ones of its row, (n, L)."""
    return (mask.cumsum(1) - 1).clamp(min=0)


# ========================================== Log-probabilities ==========================================


def autocast(device):
    """bfloat16 arithmetic over float32 weights when DTYPE says so. Log-probs are float32 in either case."""
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=DTYPE == "bfloat16")


def run_model(model, ids, mask, position_ids, cache):
    """Last hidden states (n, L, H) of a causal model without its head; `cache` is read and extended."""
    return model.base_model(input_ids=ids, attention_mask=mask, position_ids=position_ids, past_key_values=cache,
                            use_cache=True).last_hidden_state


def head(model, hidden):
    """Logits in float32: GSPO's clip range (3e-4) is far below bfloat16's resolution (8e-3)."""
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(hidden.float(), model.get_output_embeddings().weight.float())


def score_tokens(model, batch):
    """Log-probs of the completion tokens at TEMPERATURE, and the exact entropy at each position. (b, T) each, 0 in padding.

    A prompt's keys and values are computed once, with gradient, and shared by its completions.
    """
    used, index = torch.unique(batch.prompt_index, return_inverse=True)
    mask, prompt_mask = batch.completion_mask.bool(), batch.prompt_mask[used]
    with autocast(model.device):
        cache = DynamicCache(config=model.config)
        hidden = run_model(model, batch.prompt_ids[used], prompt_mask, positions(prompt_mask), cache)[:, -1:][index]
        if mask.shape[1] > 1:  # token t is predicted from the state after token t - 1; the first, from the prompt's end
            cache.batch_select_indices(index)
            prompt_mask = prompt_mask[index]                                              # (b, L)
            seen = torch.cat([prompt_mask, mask[:, :-1].to(prompt_mask.dtype)], 1)        # (b, L + T - 1)
            place = prompt_mask.sum(1, keepdim=True) + torch.arange(mask.shape[1] - 1, device=mask.device)
            hidden = torch.cat([hidden, run_model(model, batch.completion_ids[:, :-1], seen, place, cache)], 1)

    def of_chunk(states, ids):
        logits = head(model, states) / TEMPERATURE                                        # (n, V) float32
        normaliser = logits.logsumexp(-1)
        entropy = normaliser - (torch.softmax(logits, -1) * logits).sum(-1)
        return logits.gather(1, ids[:, None])[:, 0] - normaliser, entropy

    states, ids = hidden[mask], batch.completion_ids[mask]                                # (N, H), (N,): real tokens only
    size = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    if len(ids) <= size:
        logps, entropy = of_chunk(states, ids)
    else:  # several chunks: the logits of each are thrown away and computed again in the backward pass
        parts = [checkpoint(of_chunk, s, i, use_reentrant=False) for s, i in zip(states.split(size), ids.split(size))]
        logps, entropy = (torch.cat(column) for column in zip(*parts))
    blank = torch.zeros(mask.shape, device=mask.device)
    return blank.masked_scatter(mask, logps), blank.masked_scatter(mask, entropy)


@torch.no_grad()
def score_without_grad(model, batch):
    """Log-probs (B, T) of a whole batch, a micro-batch at a time."""
    logps = torch.zeros_like(batch.completion_mask)
    for rows in by_length(batch.completion_mask).split(MICRO_BATCH):
        part = score_tokens(model, batch.rows(rows))[0]
        logps[rows, :part.shape[1]] = part
    return logps


def behaviour_logps(policy, batch):
    """The sampling policy's log-probs (B, T). In float32 the sampler's own are exact. bfloat16 rounds decoding and
    scoring differently, by more than GSPO's clip range: then the trainer scores them once more before the first update."""
    return batch.sampled_logps if DTYPE == "float32" else score_without_grad(policy, batch)


def minibatches(batch, epochs, generator):
    """`epochs` passes over the batch, each in new random order; groups stay together, their prompt is run once."""
    groups = torch.arange(len(batch.prompt_index)).reshape(-1, GROUP_SIZE)                # (P, G) rows
    for _ in range(epochs):
        shuffled = groups[torch.randperm(len(groups), generator=generator)].flatten().to(batch.prompt_index.device)
        for rows in shuffled.split(MINIBATCH):
            yield batch.rows(rows)


def micro_batches(minibatch):
    """The minibatch in pieces of MICRO_BATCH completions of similar length, so that little is padding."""
    for rows in by_length(minibatch.completion_mask).split(MICRO_BATCH):
        yield minibatch.rows(rows)


def by_length(mask):
    """Row numbers from the shortest completion to the longest."""
    return mask.sum(1).argsort(stable=True)


def optimiser_step(run, meter):
    """One AdamW step on the accumulated gradient, clipped to MAX_GRAD_NORM, at the warmed-up learning rate."""
    norm = torch.nn.utils.clip_grad_norm_(run.policy.parameters(), MAX_GRAD_NORM or math.inf)
    loss = meter.end_minibatch(norm)
    if not math.isfinite(loss) or not math.isfinite(norm):
        fail(f"step {run.step + 1}: the loss is {loss} and the gradient norm {float(norm)}, which should be finite. The "
             f"weights were not changed; lower LEARNING_RATE ({LEARNING_RATE}) and resume from a checkpoint in {run.folder}")
    run.updates += 1
    for group in run.optimizer.param_groups:
        group["lr"] = LEARNING_RATE * min(1.0, run.updates / max(1, WARMUP_STEPS))
    run.optimizer.step()
    run.optimizer.zero_grad()


class Meter:
    """Means over all tokens (or minibatches) of a step, never means of means over unequal pieces."""

    def __init__(self):
        self.losses, self.totals, self.tokens = defaultdict(float), defaultdict(float), 0.0
        self.low, self.high, self.loss, self.norms = math.inf, -math.inf, 0.0, []

    def add(self, micro, loss, losses, statistics):
        """Add a micro-batch: `losses` are weighted as the loss is, `statistics` by token; (b, T) each."""
        mask = micro.completion_mask
        self.loss = self.loss + loss.detach()
        for name, value in losses.items():
            self.losses[name] = self.losses[name] + (value.detach() * micro.weights).sum()
        for name, value in statistics.items():
            self.totals[name] = self.totals[name] + (value.detach() * mask).sum()
        self.tokens = self.tokens + mask.sum()
        ratio = statistics["ratio"][mask.bool()]
        self.low, self.high = min(self.low, float(ratio.min())), max(self.high, float(ratio.max()))

    def end_minibatch(self, norm):
        """Close a minibatch; returns its loss as a float."""
        self.norms.append(float(norm))
        loss, self.loss = float(self.loss), 0.0
        self.losses["loss"] += loss
        return loss

    def means(self):
        """The step's metrics by name, floats."""
        result = {name: float(value) / len(self.norms) for name, value in self.losses.items()}
        result |= {name: float(value / self.tokens) for name, value in self.totals.items()}
        result["ratio/mean"], result["ratio/min"], result["ratio/max"] = result.pop("ratio"), self.low, self.high
        return result | {"grad_norm": sum(self.norms) / len(self.norms)}


# =============================================== Reward ================================================


def last_number(text):
    """The last number written in a text as a Decimal, or None: '1,234.50' -> 1234.5; a minus counts unless it subtracts.

    >>> last_number("12-5=7. Answer: -1,234.50"), last_number("12-5"), last_number("none")
    (Decimal('-1234.50'), Decimal('5'), None)
    """
    found = re.findall(r"(?<![0-9.)])-?[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?|[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?", text)
    return Decimal(found[-1].replace(",", "")) if found else None


def verify(questions, responses, references):
    """1.0 where the response's last number equals the reference answer's, else 0.0."""
    wanted = [last_number(reference) for reference in references]
    return [float(w is not None and last_number(r) == w) for r, w in zip(responses, wanted)]


def model_scorer(model, tokenizer):
    """The reward model as a function (questions, responses, references) -> scores.

    The model was trained on pairs, `tokenizer(question, answer)` = [CLS] q [SEP] a [SEP], and reads its score from
    the first token: one concatenated string would be something it never saw. Equal pairs are scored once.
    """
    def score(questions, responses, references):
        pairs = sorted(set(zip(questions, responses)), key=lambda pair: len(pair[0]) + len(pair[1]))
        scores = {}
        for start in range(0, len(pairs), REWARD_BATCH):
            some = pairs[start:start + REWARD_BATCH]
            inputs = tokenizer([q for q, _ in some], [a for _, a in some], truncation="longest_first",
                               max_length=MAX_REWARD_TOKENS, padding=True, return_tensors="pt").to(model.device)
            with torch.inference_mode():
                logits = model(**inputs).logits[:, 0].float()
            scores.update(zip(some, (logits.sigmoid() if REWARD_SIGMOID else logits).tolist()))
        return [scores[pair] for pair in zip(questions, responses)]
    return score


def checked_scores(name, function, questions, responses, references):
    """A reward source's scores as floats; stops with one line when it raises or returns anything else."""
    try:
        scores = list(function(questions, responses, references))
    except Exception as error:
        fail(f"the reward source {name!r} raised {type(error).__name__}: {error}. Expected: {len(responses)} scores")
    if len(scores) != len(responses):
        fail(f"the reward source {name!r} returned {len(scores)} scores for {len(responses)} responses; expected one each")
    for response, score in zip(responses, scores):
        if not isinstance(score, (int, float)) or not math.isfinite(score):
            fail(f"the reward source {name!r} returned {score!r} for {response[:60]!r}; expected a finite number")
    return [float(score) for score in scores]


def reward_of(scorers, questions, responses, references):
    """Total rewards (n,) as a list, and the sources' unweighted scores by name; the verifier's is always there."""
    parts = {name: checked_scores(name, function, questions, responses, references)
             for name, function in scorers.items() if REWARD_WEIGHTS.get(name) or name == "verifier"}
    total = [sum(REWARD_WEIGHTS.get(name, 0.0) * parts[name][i] for name in parts) for i in range(len(responses))]
    return total, parts


def score_completions(run, rows, batch):
    """Score a rollout. Returns rewards (B, K), the sources' scores by name, and each token's segment (B, T) in 0..K-1.

    K = 1: one reward for the whole answer. With USE_SEQUENCE_LEVEL_REWARD False an answer is cut at the ends of its
    lines and sentences, every prefix is scored, and each segment's reward is what it added: score(prefix with
    it) - score(prefix without it). They sum to the answer's reward less that of an empty answer. NaN pads (B, K).
    """
    questions = [rows[i]["question"] for i in batch.prompt_index.tolist()]
    references = [rows[i]["answer"] for i in batch.prompt_index.tolist()]
    texts = decode(run.tokenizer, batch)
    total, parts = reward_of(run.scorers, questions, texts, references)
    device, segments = batch.completion_ids.device, torch.zeros_like(batch.completion_ids)
    if USE_SEQUENCE_LEVEL_REWARD:
        return torch.tensor(total, device=device)[:, None], parts, segments

    prefixes, owners = [], []                                                 # every prefix, and whose it is
    for i, length in enumerate(batch.completion_mask.sum(1).long().tolist()):
        ids, start = batch.completion_ids[i, :length].tolist(), 0
        prefixes, owners = prefixes + [""], owners + [i]
        for t in range(length):
            segments[i, t] = owners.count(i) - 1
            text = run.tokenizer.decode(ids[start:t + 1], skip_special_tokens=True)
            if t + 1 == length or (text.rstrip(" ").endswith(("\n", ".")) and t + 2 < length):
                prefixes.append(run.tokenizer.decode(ids[:t + 1], skip_special_tokens=True))
                owners, start = owners + [i], t + 1
    scores, _ = reward_of(run.scorers, [questions[i] for i in owners], prefixes, [references[i] for i in owners])
    rewards = torch.full((len(texts), int(segments.max()) + 1), math.nan, device=device)
    column = 0
    for j in range(1, len(owners)):
        column = column + 1 if owners[j] == owners[j - 1] else 0
        if column:
            rewards[owners[j], column - 1] = scores[j] - scores[j - 1]
    return rewards, parts, segments


def decode(tokenizer, batch):
    """The completions' texts, without special tokens."""
    lengths = batch.completion_mask.sum(1).long().tolist()
    return tokenizer.batch_decode([ids[:n] for ids, n in zip(batch.completion_ids.tolist(), lengths)],
                                  skip_special_tokens=True)


def batch_metrics(batch, rewards, parts):
    """Metrics of a rollout: rewards, accuracy, advantages, lengths, and how far sampler and trainer disagree."""
    total, lengths, mask = rewards.nansum(1), batch.completion_mask.sum(1), batch.completion_mask.bool()
    groups, advantages = rewards.reshape(-1, GROUP_SIZE * rewards.shape[1]), batch.advantages[mask]
    return {
        "reward": float(total.mean()), "reward_std": float(group_std(groups).mean()),
        "frac_reward_zero_std": float(without_spread(groups).float().mean()),
        **{f"rewards/{name}": sum(scores) / len(scores) for name, scores in parts.items()},
        "accuracy": sum(parts["verifier"]) / len(parts["verifier"]),
        "advantage/mean": float(advantages.mean()), "advantage/std": float(advantages.std(correction=0)),
        "completions/mean_length": float(lengths.mean()), "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()), "completions/clipped_ratio": float((~batch.ended).float().mean()),
        "sampling_logp_difference": float((batch.sampled_logps - batch.old_logps)[mask].abs().mean()),
        "tokens": int(mask.sum()),
    }


# ================================================ Data =================================================


def read_table(entry, name):
    """One entry of a dataset constant as a list of {question, answer}; stops with one line if it cannot be."""
    if not isinstance(entry, dict) or not {"path", "input", "output"} <= set(entry):
        fail(f"{name}: found {entry!r}; expected a dict with path, input and output, and type if the name does not tell")
    path = str(entry["path"])
    kind = entry.get("type") or path.rsplit(".", 1)[-1]
    readers = {"parquet": pd.read_parquet, "json": lambda p: pd.read_json(p, dtype=False, convert_dates=False),
               "jsonl": lambda p: pd.read_json(p, lines=True, dtype=False, convert_dates=False)}
    if kind not in readers:
        fail(f"{name}: {path} has the type {kind!r}; expected one of {', '.join(readers)}")
    if "://" in path:
        paths = [path]
    else:
        paths = sorted(glob.glob(path)) or sorted(glob.glob(str(project_root() / path)))
        if not paths:
            fail(f"{name}: no file {path} here or in {project_root()}; check the path" +
                 (", or make it with data/build.py" if path.startswith("data/") else ""))
    rows = []
    for file in paths:
        try:
            table = readers[kind](file)
        except Exception as error:  # whatever a reader or a network raises, the user needs the path and the reason
            reason = " ".join(str(error).split())[:200]
            fail(f"{name}: {file} could not be read as {kind} ({type(error).__name__}: {reason})")
        for column in (entry["input"], entry["output"]):
            if column not in table:
                fail(f"{name}: {file} has no column {column!r}; it has {', '.join(map(str, table.columns))}")
            if table[column].isna().any():
                fail(f"{name}: {file} has {int(table[column].isna().sum())} empty values in the column {column!r}; "
                     "expected none: drop those rows")
        rows += [{"question": str(q), "answer": str(a)} for q, a in zip(table[entry["input"]], table[entry["output"]])]
    return rows


def load_rows(datasets, name):
    """All rows of a dataset constant, in order."""
    if not isinstance(datasets, list) or not datasets:
        fail(f"{name}: found {datasets!r}; expected a list of at least one dict")
    rows = [row for entry in datasets for row in read_table(entry, name)]
    if not rows:
        fail(f"{name}: no rows in {', '.join(str(entry['path']) for entry in datasets)}; expected at least one")
    return rows


def tokenize_prompts(rows, tokenizer, name):
    """The rows with their `prompt_ids` (the chat template's), those longer than MAX_PROMPT_TOKENS dropped."""
    for row in rows:
        text = tokenizer.apply_chat_template([{"role": "user", "content": row["question"]}], tokenize=False,
                                             add_generation_prompt=True, enable_thinking=ENABLE_THINKING)
        row["prompt_ids"] = tokenizer(text, add_special_tokens=False)["input_ids"]
    kept = [row for row in rows if len(row["prompt_ids"]) <= MAX_PROMPT_TOKENS]
    if not kept:
        shortest = min(len(row["prompt_ids"]) for row in rows)
        fail(f"{name}: every prompt is longer than MAX_PROMPT_TOKENS = {MAX_PROMPT_TOKENS} (the shortest has {shortest}); "
             "raise it")
    if len(kept) < len(rows):
        print(f"  {name}: dropped {len(rows) - len(kept)} of {len(rows)} prompts longer than {MAX_PROMPT_TOKENS} tokens")
    return kept


def question_batches(run):
    """BATCH_SIZE rows a step, from the step where the run stands; each epoch in its own order, which the seed fixes."""
    while run.step < run.total_steps:
        epoch, position = divmod(run.step, run.steps_per_epoch)
        order = torch.randperm(len(run.train_rows), generator=torch.Generator().manual_seed(SEED + 1000 * epoch))
        yield [run.train_rows[i] for i in order[position * BATCH_SIZE:(position + 1) * BATCH_SIZE].tolist()]


# ============================================= Evaluation ==============================================


def evaluate(run):
    """Sampled and greedy accuracy on the held-out questions, the reward there, and the first few answers as text.

    The same questions and the same random numbers every time, from a generator of its own: evaluating more or
    less often does not change the training.
    """
    clock, rows = Clock(), run.eval_rows
    generator = torch.Generator(run.policy.device).manual_seed(SEED + 12345)
    questions, references = [row["question"] for row in rows], [row["answer"] for row in rows]
    results = {}
    for mode, temperature in (("sampled", EVAL_TEMPERATURE), ("greedy", 0)):
        texts, lengths = [], []
        for start in range(0, len(rows), EVAL_BATCH):
            batch = sample_groups(run.policy, run.tokenizer, rows[start:start + EVAL_BATCH], 1, temperature, TOP_P, generator)
            texts += decode(run.tokenizer, batch)
            lengths += batch.completion_mask.sum(1).tolist()
        results[mode] = texts, lengths
    texts, lengths = results["sampled"]
    total, parts = reward_of(run.scorers, questions, texts, references)
    greedy = verify(questions, results["greedy"][0], references)
    metrics = {"eval/accuracy": sum(parts["verifier"]) / len(rows), "eval/accuracy_greedy": sum(greedy) / len(rows),
               "eval/reward": sum(total) / len(rows), "eval/mean_length": sum(lengths) / len(rows)}
    clock.lap("eval")
    lines = []
    for i in range(min(SHOW_SAMPLES, len(rows))):
        scores = "  ".join(f"{name} {scores[i]:.2f}" for name, scores in parts.items())
        lines += [f"  {questions[i]}", f"    -> {texts[i]}", f"       reward {total[i]:.2f}  ({scores})"]
    return metrics | clock.times(total=False), "\n".join(lines)


# ======================================== Checkpoints and plots ========================================


def metric_names():
    """The columns of metrics.csv; RL_HAND/gspo/README.md explains each."""
    return [
        "step", "epoch", "loss", "policy_loss", "entropy_loss", "kl_loss", "reward", "reward_std", "rewards/model",
        "rewards/verifier", "rewards/function", "accuracy", "frac_reward_zero_std", "advantage/mean", "advantage/std",
        "kl", "kl_coef", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "ratio/min",
        "ratio/mean", "ratio/max", "completions/mean_length", "completions/min_length", "completions/max_length",
        "completions/clipped_ratio", "sampling_logp_difference", "grad_norm", "learning_rate", "num_tokens",
        "time/rollout", "time/reward", "time/logps", "time/update", "step_time", "eval/accuracy",
        "eval/accuracy_greedy", "eval/reward", "eval/mean_length", "time/eval",
    ]


class Clock:
    """Seconds per phase; waits for the GPU at each lap, so that a phase pays for its own work."""

    def __init__(self):
        self.laps, self.last = {}, self.now()

    @staticmethod
    def now():
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def lap(self, name):
        """Give the time since the last lap to the phase `name`."""
        now = self.now()
        self.laps[name], self.last = now - self.last, now

    def times(self, total=True):
        """{time/phase: seconds}, and their sum as step_time."""
        times = {f"time/{name}": seconds for name, seconds in self.laps.items()}
        return times | ({"step_time": sum(self.laps.values())} if total else {})


def finish_step(run, metrics):
    """Count the step; evaluate, save and draw when they are due; write the step's row of metrics.csv."""
    run.step += 1
    run.num_tokens += metrics.pop("tokens")
    epoch, position = divmod(run.step, run.steps_per_epoch)
    last, epoch_ends = run.step == run.total_steps, position == 0
    metrics |= {"step": run.step, "epoch": run.step / run.steps_per_epoch, "num_tokens": run.num_tokens}
    due = EVAL_EVERY and run.step % EVAL_EVERY == 0
    if due or epoch_ends or last:
        record_evaluation(run, metrics)
    write_metrics(run, metrics)
    if epoch_ends or last:
        save_checkpoint(run, f"epoch_{epoch}" if epoch_ends else f"step_{run.step}")
    elif SAVE_EVERY and run.step % SAVE_EVERY == 0:
        save_checkpoint(run, f"step_{run.step}")
    if due or epoch_ends or last:
        plot_metrics(run)
    shown = {"reward": "reward", "acc": "accuracy", "kl": "kl", "len": "completions/mean_length",
             "clip": "clip_ratio/region_mean"}
    run.bar.set_postfix_str("  ".join(f"{label} {metrics[name]:.3g}" for label, name in shown.items()), refresh=False)
    run.bar.update()


def record_evaluation(run, metrics):
    """Evaluate into `metrics`; print the held-out accuracy and the sample answers, and keep them for the checkpoint."""
    evaluation, run.samples = evaluate(run)
    metrics |= evaluation
    line = (f"step {metrics['step']}: held-out accuracy {evaluation['eval/accuracy']:.3f} sampled, "
            f"{evaluation['eval/accuracy_greedy']:.3f} greedy; reward {evaluation['eval/reward']:.3f}; "
            f"length {evaluation['eval/mean_length']:.1f}")
    run.samples = f"{line}\n{run.samples}"
    tqdm.write(run.samples + "\n")


def write_metrics(run, metrics):
    """Append one row to metrics.csv and remember it."""
    run.history.append(metrics)
    path = run.folder / "metrics.csv"
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, metric_names(), restval="")
        if new:
            writer.writeheader()
        writer.writerow(metrics)
    if run.board is not None:
        for name, value in metrics.items():
            run.board.add_scalar(name, value, metrics["step"])


def save_checkpoint(run, name):
    """Write a checkpoint under a temporary name and rename it: a killed run leaves only whole ones.

    epoch_0 (before training) holds the samples and the constants; later ones also the weights (safetensors), the
    tokenizer, and all that RESUME_FROM needs: optimiser, generators, KL coefficient and the metrics so far.
    """
    target, partial = run.folder / name, run.folder / f".{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / "samples.txt").write_text(run.samples + "\n", encoding="utf-8")
    shutil.copyfile(__file__, partial / "train_script.py")
    (partial / "constants.json").write_text(json.dumps({"constants": constants(), **run.facts}, indent=2) + "\n")
    if run.step:
        run.policy.save_pretrained(partial)
        run.tokenizer.save_pretrained(partial)
        state = {f"{key}.{i}": value for i, entry in run.optimizer.state_dict()["state"].items()
                 for key, value in entry.items()}
        generators = {"sampler": run.sampler.get_state(), "shuffler": run.shuffler.get_state()}
        save_file({k: v.contiguous() for k, v in (state | generators).items()}, partial / "trainer_state.safetensors")
        (partial / "trainer_state.json").write_text(json.dumps(
            {"step": run.step, "updates": run.updates, "num_tokens": run.num_tokens, "kl_coef": run.kl_coef}))
        shutil.copyfile(run.folder / "metrics.csv", partial / "metrics.csv")
    os.replace(partial, target)


def load_checkpoint(run, folder):
    """Put optimiser, generators, counters and metrics back to where `folder` left them. The weights are loaded before."""
    state = load_file(folder / "trainer_state.safetensors")
    run.sampler.set_state(state.pop("sampler"))
    run.shuffler.set_state(state.pop("shuffler"))
    entries = defaultdict(dict)
    for name, value in state.items():
        key, i = name.rsplit(".", 1)
        entries[int(i)][key] = value
    run.optimizer.load_state_dict({"state": dict(entries), "param_groups": run.optimizer.state_dict()["param_groups"]})
    for name, value in json.loads((folder / "trainer_state.json").read_text()).items():
        setattr(run, name, value)
    shutil.copyfile(folder / "metrics.csv", run.folder / "metrics.csv")
    table = pd.read_csv(folder / "metrics.csv")
    run.history = [{k: v for k, v in row.items() if pd.notna(v)} for row in table.to_dict("records")]


def plot_metrics(run):
    """Draw the run's metrics to training_metrics.png: the losses, the reward, the KL, the lengths, the clipping."""
    table = pd.DataFrame(run.history).reindex(columns=metric_names())
    trained = table[table["step"] > 0]
    panels = [
        ("Accuracy", {"eval/accuracy_greedy": "held out, greedy", "eval/accuracy": "held out, sampled", "accuracy": "training"}),
        ("Mean reward", {"reward": "training", "eval/reward": "held out"}),
        ("Policy loss", {"policy_loss": ""}),
        ("Relative advantage", {"advantage/mean": "mean", "advantage/std": "std"}),
        ("KL divergence", {"kl": "nats per token"}),
        ("KL coefficient", {"kl_coef": ""}),
        ("KL loss", {"kl_loss": ""}),
        ("Entropy loss", {"entropy_loss": "minus the entropy, nats"}),
        ("Mean response length", {"completions/mean_length": "tokens", "eval/mean_length": "held out"}),
        ("Clip fraction of tokens", {"clip_ratio/region_mean": "cut", "clip_ratio/high_mean": "above, A > 0",
                                     "clip_ratio/low_mean": "below, A < 0"}),
        ("Share of the rollout", {"completions/clipped_ratio": "truncated answers", "frac_reward_zero_std": "groups without spread"}),
        ("Seconds per step", {f"time/{name}": name for name in ("rollout", "reward", "logps", "update")}),
    ]
    figure = Figure(figsize=(15, 9.5), layout="constrained")
    for axes, (title, curves) in zip(figure.subplots(3, 4).flat, panels):
        for name, label in curves.items():
            source = table if name.startswith("eval/") else trained
            points = source[["step", name]].dropna()
            style = {"marker": "o", "markersize": 3.5, "linewidth": 1.6} if name.startswith("eval/") else {"linewidth": 1.0}
            if len(points):
                axes.plot(points["step"], points[name], label=label, **style)
        if title == "KL divergence" and run.reference is not None:
            axes.axhline(TARGET_KL, color="grey", linestyle="--", linewidth=0.8, label="TARGET_KL")
        axes.set_title(title, fontsize=11)
        axes.grid(alpha=0.25)
        axes.tick_params(labelsize=8)
        if axes.get_legend_handles_labels()[1] and any(curves.values()):
            axes.legend(fontsize=7.5, frameon=False)
    figure.suptitle(f"{Path(__file__).stem if run.step == 0 else run.folder.name}: "
                    f"{Path(POLICY_MODEL).name}, seed {SEED} (x: steps, one rollout each)", fontsize=12)
    partial = run.folder / ".training_metrics.partial.png"
    figure.savefig(partial, dpi=110)
    os.replace(partial, run.folder / "training_metrics.png")


# ============================================ Command line =============================================


@dataclass
class Run:
    """What a run carries from step to step."""
    folder: Path
    train_rows: list
    eval_rows: list
    scorers: dict                        # source name -> function(questions, responses, references) -> scores
    policy: torch.nn.Module
    reference: torch.nn.Module | None    # the policy as it started; None when KL_COEF is 0
    tokenizer: object
    optimizer: torch.optim.Optimizer
    sampler: torch.Generator             # draws tokens, on the policy's device
    shuffler: torch.Generator            # orders minibatches
    steps_per_epoch: int
    total_steps: int
    facts: dict                          # versions, device, command: what constants.json keeps beside the constants
    kl_coef: float
    board: object = None                 # TensorBoard's writer
    bar: object = None
    samples: str = ""
    step: int = 0                        # rollouts done
    updates: int = 0                     # optimiser steps done
    num_tokens: int = 0                  # completion tokens sampled for training
    history: list = field(default_factory=list)


def fail(message):
    """Stop with one line on standard error and exit status 1."""
    raise SystemExit(f"error: {message}")


def project_root():
    """The folder that holds data/: above this file, or, for a copy kept elsewhere, the one its constants.json names."""
    here = Path(__file__).resolve()
    for folder in here.parents:
        if (folder / "data" / "build.py").exists():
            return folder
    with suppress(OSError, ValueError, KeyError):
        return Path(json.loads((here.parent / "constants.json").read_text())["project"])
    return here.parent


def constants():
    """The constants of this file by name, as they are now."""
    return {name: value for name, value in globals().items()
            if (re.fullmatch(r"[A-Z][A-Z_]*", name) and name not in ("F", "EMBEDDED")) or name.endswith("_datasets")}


def parse_override(argument):
    """'NAME=VALUE' -> (name, value of the constant's type); stops with one line if there is no such constant or type."""
    name, equals, text = argument.partition("=")
    known = constants()
    if not equals or name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        fail(f"{argument!r} is not NAME=VALUE of a constant" + (f"; did you mean {close[0]}?" if close else "") +
             f" The constants: {', '.join(known)}")
    default = known[name]
    if isinstance(default, str):
        return name, str(Path(text).absolute()) if name == "OUTPUT_DIR" else text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(default, float) and number:
        return name, float(value)
    if isinstance(default, int) and not isinstance(default, bool) and isinstance(value, float) and value == int(value):
        return name, int(value)                                        # 1e3 for 1000
    if isinstance(default, (tuple, list)) and isinstance(value, (tuple, list)):
        return name, type(default)(value)
    if type(value) is type(default) or (name == "CLIP_RANGE" and number):
        return name, value
    fail(f"{name}={text}: expected {type(default).__name__}, such as {default!r}; found {type(value).__name__}")


def configure(arguments):
    """Set the constants: this file's, then the profile's, then the checkpoint's that is resumed, then the command line's."""
    overrides = dict(parse_override(argument) for argument in arguments)
    profile = overrides.get("PROFILE", PROFILE)
    if profile not in ("auto", "full", "embedded"):
        fail(f"PROFILE={profile}: expected auto, full or embedded")
    resumed, folder = {}, overrides.get("RESUME_FROM", RESUME_FROM)
    if folder:
        needed = ["constants.json", "trainer_state.safetensors", "trainer_state.json", "metrics.csv", "config.json"]
        missing = [name for name in needed if not (Path(folder) / name).is_file()]
        if missing:
            fail(f"RESUME_FROM={folder}: no {missing[0]} there; expected an epoch_N or step_N folder (N > 0) of a run")
        resumed = json.loads((Path(folder) / "constants.json").read_text())["constants"]
        resumed = {name: tuple(value) if isinstance(globals().get(name), tuple) and isinstance(value, list) else value
                   for name, value in resumed.items() if name in constants()}
        overrides["RESUME_FROM"] = str(Path(folder).absolute())
        profile = overrides.get("PROFILE", resumed["PROFILE"])
    if profile == "auto":
        profile, why = ("full", "there is a CUDA GPU") if torch.cuda.is_available() else ("embedded", "there is no CUDA GPU")
    else:
        why = "PROFILE says so"
    chosen = (EMBEDDED if profile == "embedded" else {}) | resumed | overrides | {"PROFILE": profile}
    device = chosen.get("DEVICE", DEVICE)
    chosen["DEVICE"] = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if chosen.get("DTYPE", DTYPE) == "auto":
        chosen["DTYPE"] = "bfloat16" if chosen["DEVICE"].startswith("cuda") else "float32"
    globals().update(chosen)
    check_constants()
    return why


def check_constants():
    """Stop with one line if the constants cannot work together."""
    choices = {"DTYPE": ("float32", "bfloat16"), "ADVANTAGE_TYPE": ("relative", "normalized")}
    for name, allowed in choices.items():
        if globals()[name] not in allowed:
            fail(f"{name}={globals()[name]}: expected {' or '.join(allowed)}")
    if DEVICE.startswith("cuda") and not torch.cuda.is_available():
        fail(f"DEVICE={DEVICE}, but PyTorch sees no CUDA GPU; expected cpu, or a PyTorch with CUDA")
    at_least = {"BATCH_SIZE": 1, "GROUP_SIZE": 2, "MAX_NEW_TOKENS": 1, "MAX_PROMPT_TOKENS": 1, "MINIBATCH": 1,
                "MICRO_BATCH": 1, "GSPO_EPOCHS": 1, "NUM_EPOCHS": 1, "EVAL_BATCH": 1, "REWARD_BATCH": 1, "MAX_STEPS": 0,
                "EVAL_EVERY": 0, "EVAL_QUESTIONS": 0, "SAVE_EVERY": 0, "SHOW_SAMPLES": 0, "KL_COEF": 0, "ENTROPY_COEF": 0,
                "TARGET_KL": 0, "WARMUP_STEPS": 0, "MAX_GRAD_NORM": 0, "LEARNING_RATE": 0, "LOGITS_AT_ONCE": 1}
    for name, least in at_least.items():
        if not globals()[name] >= least:
            fail(f"{name}={globals()[name]}: expected at least {least}" +
                 (": a group of one has no other answer to be compared with" if name == "GROUP_SIZE" else ""))
    if not 0 < TEMPERATURE or not 0 < TOP_P <= 1:
        fail(f"TEMPERATURE={TEMPERATURE}, TOP_P={TOP_P}: expected TEMPERATURE > 0 and 0 < TOP_P <= 1")
    pair = clip_range()
    if len(pair) != 2 or not all(isinstance(x, (int, float)) and x > 0 for x in pair) or pair[0] > 1:
        fail(f"CLIP_RANGE={CLIP_RANGE}: expected a positive number or a (low, high) pair, low at most 1")
    completions = BATCH_SIZE * GROUP_SIZE
    if completions % MINIBATCH:
        fail(f"BATCH_SIZE x GROUP_SIZE = {BATCH_SIZE} x {GROUP_SIZE} = {completions} completions cannot be cut into "
             f"minibatches of MINIBATCH = {MINIBATCH}; expected a divisor of {completions}")
    if not USE_SEQUENCE_LEVEL_REWARD and not USE_TOKEN_LEVEL_LOSS:
        fail("USE_SEQUENCE_LEVEL_REWARD=False gives advantages per token, which only the token-level loss can use; "
             "set USE_TOKEN_LEVEL_LOSS=True too")
    if not any(REWARD_WEIGHTS.values()) or not set(REWARD_WEIGHTS) <= {"model", "verifier", "function"}:
        fail(f"REWARD_WEIGHTS={REWARD_WEIGHTS}: expected a weight that is not 0 for model, verifier or function, and no other name")
    if REWARD_WEIGHTS.get("function") and not REWARD_FUNCTION:
        fail("REWARD_WEIGHTS has a weight for function, but REWARD_FUNCTION is empty; expected path/to/file.py:name")


def load_reward_function():
    """The function that REWARD_FUNCTION ("file.py:name") names."""
    path, colon, name = REWARD_FUNCTION.rpartition(":")
    file = next((p for p in (Path(path), project_root() / path) if p.is_file()), None)
    if not colon or file is None:
        fail(f"REWARD_FUNCTION={REWARD_FUNCTION}: no such file; expected path/to/file.py:name")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's file may do anything; its own error is the message
        fail(f"REWARD_FUNCTION={REWARD_FUNCTION}: the file could not be loaded ({type(error).__name__}: {error})")
    if not callable(getattr(module, name, None)):
        fail(f"REWARD_FUNCTION={REWARD_FUNCTION}: {file} defines no function {name}")
    return getattr(module, name)


def load_pretrained(kind, name, constant, **options):
    """`kind.from_pretrained(name)` with one line of help when that fails."""
    local = next((p for p in (Path(name), project_root() / name) if p.is_dir()), None)
    if local is not None and kind is not AutoTokenizer and not [*local.glob("*.safetensors"), *local.glob("*.bin")]:
        fail(f"{constant}={name}: the folder holds no weights; expected config.json, model.safetensors and a tokenizer")
    try:
        return kind.from_pretrained(local or name, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        fail(f"{constant}={name} could not be loaded ({type(error).__name__}: {reason}). Download it where there is a network "
             f"(hf download {name}), or set {constant} to a folder that holds it, or run the embedded models: PROFILE=embedded")


def claim_folder():
    """Make and return the run's folder: OUTPUT_DIR, or with _2, _3, ... when that holds something already."""
    wanted = project_root() / OUTPUT_DIR
    number, folder = 1, wanted
    try:
        while folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            number += 1
            folder = wanted.with_name(f"{wanted.name}_{number}")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        fail(f"OUTPUT_DIR={OUTPUT_DIR}: {error.strerror or error}; expected a folder that can be made and written")
    return folder


def start(arguments):
    """From command line to a Run: set the constants, read the data, then load the models; say what was found and why."""
    why = configure(arguments)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    train_rows, eval_rows = load_rows(train_datasets, "train_datasets"), load_rows(eval_datasets, "eval_datasets")
    scorers = {"verifier": verify}
    if REWARD_FUNCTION:
        scorers["function"] = load_reward_function()
    script = Path(__file__).stem
    print(f"{script}: PROFILE {PROFILE} ({why}); {DEVICE}, {DTYPE}, {torch.get_num_threads()} threads, torch {torch.__version__}")

    tokenizer = load_pretrained(AutoTokenizer, POLICY_MODEL, "POLICY_MODEL")
    train_rows = tokenize_prompts(train_rows, tokenizer, "train_datasets")
    eval_rows = tokenize_prompts(eval_rows, tokenizer, "eval_datasets")[:EVAL_QUESTIONS or None]
    if len(train_rows) < BATCH_SIZE:
        fail(f"train_datasets: {len(train_rows)} questions, fewer than BATCH_SIZE = {BATCH_SIZE}; expected at least one batch")
    steps_per_epoch = len(train_rows) // BATCH_SIZE
    total_steps = min(NUM_EPOCHS * steps_per_epoch, MAX_STEPS or math.inf)

    # Evaluation mode throughout: dropout would make the trained distribution another than the sampled one.
    low = torch.bfloat16 if DTYPE == "bfloat16" else torch.float32
    load_policy = {"dtype": torch.float32, "attn_implementation": "sdpa"}   # AdamW at 1e-6 rounds to nothing in bfloat16
    policy = load_pretrained(AutoModelForCausalLM, RESUME_FROM or POLICY_MODEL, "POLICY_MODEL", **load_policy).to(DEVICE).eval()
    reference = None
    if KL_COEF:
        reference = load_pretrained(AutoModelForCausalLM, POLICY_MODEL, "POLICY_MODEL", dtype=low, attn_implementation="sdpa")
        reference = reference.to(DEVICE).eval().requires_grad_(False)
    if REWARD_WEIGHTS.get("model"):
        reward_model = load_pretrained(AutoModelForSequenceClassification, REWARD_MODEL, "REWARD_MODEL", dtype=low)
        scorers["model"] = model_scorer(reward_model.to(DEVICE).eval(),
                                        load_pretrained(AutoTokenizer, REWARD_MODEL, "REWARD_MODEL"))
    folder = claim_folder()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, betas=ADAM_BETAS, weight_decay=WEIGHT_DECAY, fused=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=project_root(), capture_output=True, text=True).stdout.strip() \
        if shutil.which("git") else ""
    facts = {"script": str(Path(__file__).resolve()), "project": str(project_root()), "commit": commit, "profile": PROFILE,
             "device": torch.cuda.get_device_name() if DEVICE.startswith("cuda") else platform.processor() or platform.machine(),
             "threads": torch.get_num_threads(), "python": platform.python_version(), "torch": torch.__version__,
             "transformers": transformers.__version__, "command": sys.argv, "started": time.strftime("%Y-%m-%d %H:%M:%S")}
    run = Run(folder, train_rows, eval_rows, scorers, policy, reference, tokenizer, optimizer,
              torch.Generator(DEVICE).manual_seed(SEED), torch.Generator().manual_seed(SEED),
              steps_per_epoch, total_steps, facts, float(KL_COEF))
    if RESUME_FROM:
        load_checkpoint(run, Path(RESUME_FROM))
    describe(run, overrides=arguments)
    return run


def describe(run, overrides):
    """The start-up block: what will be trained, how much of it, where it goes, and whether the reward model can tell."""
    size = sum(p.numel() for p in run.policy.parameters())
    completions = BATCH_SIZE * GROUP_SIZE
    numbers = sum(last_number(row["answer"]) is not None for row in run.train_rows)
    print(f"  policy     {POLICY_MODEL}, {size / 1e6:.2f} M parameters" +
          ("" if run.reference is None else "; the reference is its copy"))
    print(f"  reward     {' + '.join(f'{w} x {name}' for name, w in REWARD_WEIGHTS.items() if w)}" +
          (f"; model: {REWARD_MODEL}" if REWARD_WEIGHTS.get('model') else ""))
    print(f"  data       {len(run.train_rows)} questions to train on, {len(run.eval_rows)} held out" +
          ("" if numbers == len(run.train_rows) else f"; {len(run.train_rows) - numbers} reference answers hold no number"))
    print(f"  batch      {BATCH_SIZE} prompts x {GROUP_SIZE} = {completions} completions per rollout; minibatch {MINIBATCH}, "
          f"micro-batch {MICRO_BATCH}; {GSPO_EPOCHS} epochs = {GSPO_EPOCHS * completions // MINIBATCH} updates per rollout")
    print(f"  steps      {run.total_steps} ({run.steps_per_epoch} rollouts per epoch)" +
          (f", from {run.step}: {RESUME_FROM}" if run.step else "") +
          (f"; {len(run.train_rows) % BATCH_SIZE} questions of each epoch's order are left over"
           if len(run.train_rows) % BATCH_SIZE else ""))
    print(f"  settings   {' '.join(overrides) or 'the defaults'}")
    print(f"  output     {run.folder}")
    if "model" in run.scorers:
        row = run.train_rows[0]
        right = row["answer"]
        number = last_number(right)
        wrong = "I do not know." if number is None else re.sub(r"[0-9][0-9,.]*(?=[^0-9]*$)", str(abs(number) + 1), right)
        good, bad = run.scorers["model"]([row["question"]] * 2, [right, wrong], [right] * 2)
        print(f"  check      the reward model gives {good:.2f} to {right[-40:]!r} and {bad:.2f} to {wrong[-40:]!r}" +
              ("" if good > bad else "  <- the wrong answer scores higher: do not trust this reward alone"))
    print(flush=True)


def show_help():
    """Print the docstring and every constant with its value and comment."""
    source = Path(__file__).read_text(encoding="utf-8")
    print(__doc__)
    print("Constants, as NAME=VALUE:")
    for line in source[source.index("# --- Model"):source.index("EMBEDDED = {")].splitlines():
        found = re.match(r"([A-Za-z_]+) = (.*?)(?:\s+# (.*))?$", line)
        if line.startswith("# ---"):
            print(f"\n{line[6:]}")
        elif found:
            print(f"  {found[1]} = {found[2]}" + (f"\n      {found[3]}" if found[3] else ""))
    print(f"\nWithout a GPU (PROFILE=embedded): {json.dumps(EMBEDDED)}")


def main(arguments):
    """Run the script: `python gspo.py [NAME=VALUE ...]`."""
    if {"-h", "--help"} & set(arguments):
        return show_help()
    run = start(arguments)
    if TENSORBOARD:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            fail("TENSORBOARD=True needs the package tensorboard: pip install tensorboard")
        run.board = SummaryWriter(run.folder)
    began = time.perf_counter()
    try:
        if not run.step:
            first = {"step": 0, "epoch": 0.0, "num_tokens": 0}
            record_evaluation(run, first)
            write_metrics(run, first)
            save_checkpoint(run, "epoch_0")
        with tqdm(total=run.total_steps, initial=run.step, desc=Path(__file__).stem, unit="step") as run.bar:
            train(run)
    except KeyboardInterrupt:
        plot_metrics(run)
        saved = sorted(p.name for p in run.folder.iterdir() if (p / "trainer_state.json").exists())
        print(f"\ninterrupted at step {run.step}; checkpoints: {', '.join(saved) or 'none yet'}; plot and metrics are in {run.folder}")
        raise SystemExit(130)
    seconds = time.perf_counter() - began
    print(f"{run.step} steps in {seconds:.0f} s; metrics.csv, training_metrics.png and the checkpoints are in {run.folder}")


if __name__ == "__main__":
    main(sys.argv[1:])
