# %% [markdown] lang="en"
# # Four algorithms, one rollout
#
# GSPO, GRPO, DAPO and PPO are four scripts here, each complete in one file. This notebook puts them side by side three times: as lines of code, as advantages of the same answers, and as what each loss does with the same tokens.
# Everything is computed by the scripts' own functions, on one CPU core, in about half a minute. What the ratios are and where they come from is in the [first notebook](1_from_importance_sampling_to_gspo.ipynb); curves of whole
# runs are on [the family's page](../RL_HAND/README.md#what-came-out).
#
# It needs this repository, `pip install -r requirements.txt` and Jupyter.
# %% [markdown] lang="zh"
# # 四种算法，同一次采样
#
# GSPO、GRPO、DAPO、PPO 在这里是四个脚本，各自完整地写在一个文件里。本篇把它们并排比较三次：比代码，比同一批回答的优势，比各自的损失对同一批 token 做了什么。
# 一切都由脚本自己的函数算出，一个 CPU 核，大约半分钟。比率是什么、从哪里来，见[第一篇](1_from_importance_sampling_to_gspo.ipynb)；完整训练的曲线见[四种算法的页面](../../RL_HAND/README.md#what-came-out)。
#
# 需要本仓库、`pip install -r requirements.txt` 和 Jupyter。
# %% [markdown] lang="en"
# ## 1. The lines
#
# Each script has a line, "From here on the scripts are the same", and keeps its word byte for byte: sampling, log-probabilities, rewards, checkpoints. Above it stand the functions of this table. Equal letters in a row: equal code (docstrings aside, and with one name for GSPO_EPOCHS, GRPO_EPOCHS and so on).
# %% [markdown] lang="zh"
# ## 1. 代码
#
# 每个脚本里都有一行 “From here on the scripts are the same”，这一行以下逐字节相同：采样、对数概率、奖励、检查点。以上就是下表里的函数。同一行中字母相同，表示代码相同（不计文档字符串；GSPO_EPOCHS、GRPO_EPOCHS 等视为同名）。
# %%
import contextlib, io, re, sys, tempfile
from pathlib import Path

project = next(at for at in [Path.cwd(), *Path.cwd().parents] if (at / "RL_HAND").is_dir())
sys.path += [str(project / "RL_HAND" / name) for name in ("gspo", "grpo", "dapo", "ppo", "../tools")]
import gspo, grpo, dapo, ppo, tables, torch, matplotlib.pyplot as plt, pandas as pd

scripts, functions = {"GSPO": gspo, "GRPO": grpo, "DAPO": dapo, "PPO": ppo}, {}
for label, script in scripts.items():
    script.configure(["PROFILE=embedded"])
    text = re.sub("[A-Z]+_EPOCHS", "EPOCHS", "\n".join(tables.lesson(script.__name__)))
    functions[label] = dict(re.findall(r"^(?:def|class) (\w+)(.*?)(?=^\S|\Z)", text, re.M | re.S))
lines = pd.DataFrame(functions).fillna("")  # names of functions x scripts
lines.apply(lambda row: row.map(dict(zip(row[row > ""].unique(), "ABCD"))), axis=1).fillna("")
# %% [markdown] lang="en"
# GSPO and GRPO are the same training loop. DAPO adds functions for its sampling and for answers that are too long. PPO is the one with a critic. What tells GSPO from GRPO is this and nothing else; `-` is GRPO, `+` is GSPO:
# %% [markdown] lang="zh"
# GSPO 与 GRPO 的训练循环完全相同。DAPO 多了几个函数，用于动态采样和过长的回答。只有 PPO 带价值网络（critic）。GSPO 与 GRPO 的区别全在下面这几行里；`-` 是 GRPO，`+` 是 GSPO：
# %%
print(tables.difference("gspo", "grpo"))
# %% [markdown] lang="en"
# In PPO, `policy_loss` has a letter of its own only for one more statistic; the loss *is* GRPO's. What tells PPO apart comes before the loss, where its advantages come from. Any other pair: `print(tables.difference("ppo", "grpo"))`.
#
# ## 2. The same answers, four advantages
#
# PPO needs a critic that has learned something. So PPO's script runs first, for fifteen rollouts in which only the critic learns (CRITIC_WARMUP); the policy stays as it was, and so there is no KL to penalise. Then it answers sixteen questions, eight times each, and every script computes its advantages.
#
# **Predict**, for a question that all eight answers get *wrong*: the verifier gives 0 to each, and the reward model's scores differ in the third decimal. How large are the advantages of GSPO (reward less mean), and of GRPO (that, divided by the group's standard deviation)? What does DAPO do with the group? And PPO, which compares with no group?
# %% [markdown] lang="zh"
# PPO 的 `policy_loss` 之所以另有一个字母，只因为多记了一个统计量；损失*就是* GRPO 的损失。PPO 的不同在损失之前：优势从哪里来。其他任意两个脚本：`print(tables.difference("ppo", "grpo"))`。
#
# ## 2. 同一批回答，四种优势
#
# PPO 需要一个已经学到些东西的价值网络，所以先运行 PPO 的脚本，采样十五次，其间只训练价值网络（CRITIC_WARMUP），策略保持不动，所以也没有 KL 可罚。然后策略回答十六道题，每题八次，各脚本算出各自的优势。
#
# **先预测**。假设某道题的八个回答*全错*：验证器都给 0 分，奖励模型的分数只在小数点后第三位有差别。GSPO 的优势（奖励减均值）有多大？GRPO 的（再除以组内标准差）呢？DAPO 会怎样处理这一组？不做组内比较的 PPO 呢？
# %%
with contextlib.redirect_stdout(io.StringIO()):
    run = ppo.start([f"OUTPUT_DIR={tempfile.mkdtemp()}/ppo", "PROFILE=embedded", "MAX_STEPS=15",
                     "CRITIC_WARMUP=15", "KL_COEF=0", "EVAL_EVERY=0", "EVAL_QUESTIONS=1"])
    run.bar = ppo.tqdm(disable=True)
    ppo.train(run)
rows = ppo.next_questions(run, ppo.BATCH_SIZE)
batch = ppo.sample_groups(run.policy, run.tokenizer, rows, ppo.GROUP_SIZE)
mask, (batch.rewards, parts) = batch.completion_mask, ppo.score_completions(run, rows, batch)
batch.old_logps, batch.verifier = batch.sampled_logps, parts["verifier"]
values = ppo.values_without_grad(run.trained["critic"][0], batch)  # (B, T)
rewards = ppo.token_rewards(run, rows, batch, batch.rewards)
gae = ppo.whiten(ppo.compute_advantages(rewards, values, mask), mask)
table = pd.DataFrame({
    "question": [rows[i]["question"] for i in batch.prompt_index], "answer": ppo.texts_of(run, batch),
    "reward": batch.rewards, "right": parts["verifier"],
    "GSPO": gspo.compute_advantages(batch.rewards), "GRPO": grpo.compute_advantages(batch.rewards),
    "PPO, mean": gae.sum(1) / mask.sum(1), "DAPO keeps it": torch.isin(
        batch.prompt_index, dapo.groups_with_spread(batch, len(rows), fill=False).prompt_index)})
groups = [group for _, group in table.round(3).groupby(batch.prompt_index.numpy())]
min(groups, key=lambda group: group.reward.std())
# %% [markdown] lang="en"
# - **GSPO** (as the script ships): thousandths. The group says nothing, and next to nothing is learned from it.
# - **GRPO** divides by a standard deviation of thousandths: a hair's difference between wrong answers becomes as loud as right against wrong. (The paper's GSPO divides, too: `ADVANTAGE_TYPE=normalized`.)
# - **DAPO** divides as GRPO does, but drops the group and asks another question in its place: by default some answers must be right and some wrong.
# - **PPO**, the mean over an answer's tokens: all negative. The critic had expected more of each; that the others failed as well is no excuse.
#
# Now the group with most right answers. Left, what the critic expects before each token; right, the advantage of each token, PPO's and, dotted, GRPO's.
# %% [markdown] lang="zh"
# - **GSPO**（脚本的默认设置）：千分之几。这一组没有信息，也就几乎不从中学什么。
# - **GRPO** 除以一个只有千分之几的标准差：几个错误回答之间的毫厘之差，被放大到与对错之分一样大。（论文中的 GSPO 也除：`ADVANTAGE_TYPE=normalized`。）
# - **DAPO** 同样要除，但它把这一组丢掉，另采一道题补上：默认要求组内有对有错。
# - **PPO**（表中是回答内各 token 的平均）：全是负的。价值网络对每个回答的期望都更高；同组其他回答也错了，并不能成为理由。
#
# 再看答对最多的一组。左图是价值网络在每个 token 之前的期望；右图是每个 token 的优势，实线是 PPO，虚线是 GRPO。
# %%
group = max(groups, key=lambda group: group.right.sum()).drop_duplicates("answer")
_, (left, right) = plt.subplots(1, 2, figsize=(13, 4), layout="constrained", dpi=80)
for number, (i, row) in enumerate(group.iterrows()):
    left.plot(values[i][mask[i] > 0], f"C{number}", label=f"{row.answer}  (reward {row.reward:.2f})")
    right.plot(gae[i][mask[i] > 0], f"C{number}")
    right.axhline(row.GRPO, color=f"C{number}", linestyle=":")
left.legend(title="what the critic expects", fontsize=8, frameon=False)
_ = right.set(title="advantages: PPO's; dotted, GRPO's", xlabel="token")
# %% [markdown] lang="en"
# The critic is young, but one thing it has understood: an answer that begins with "Answer" is a guess, and it expects less at once. So PPO blames the *decision* to guess where it was taken, in the first token, and a guess that happens to be right is a surprise, praised more than written work that was expected to be right. A group sees none of that: one number for all tokens of an answer, from rewards alone. But its baseline is right from the first step and needs no second network.
#
# ## 3. The same tokens, four losses
#
# Two passes of GRPO over this rollout move the policy, as in training. Then each script's `policy_loss` gets the same log-probabilities and the same advantages (GRPO's). The gradient says how much each token still counts: 1 as in the first update, 0 if it is cut. Blue: A > 0; red: A < 0.
#
# **Predict**: over a token's ratio π/π_old, where do the points of GRPO lie, for A > 0 and for A < 0? Where GSPO's: can a token whose own ratio is exactly 1 be cut? And below, over the length of an answer: how much do all its tokens weigh together?
# %% [markdown] lang="zh"
# 价值网络还很嫩，但已经明白一件事：以 “Answer” 开头的回答是在猜，它的期望当即下降。于是 PPO 在第一个 token、也就是*决定去猜*的地方就给出责备；而碰巧猜对是个意外，得到的褒奖比意料之中写对的步骤还多。组内比较看不到这些：一个回答的所有 token 共用一个数，只由奖励得出。但它的基线从第一步起就是对的，也不需要第二个网络。
#
# ## 3. 同一批 token，四种损失
#
# 先用 GRPO 在这批样本上更新两轮，像训练中那样让策略移动。然后把同样的对数概率、同样的优势（GRPO 的）交给每个脚本的 `policy_loss`。由梯度可知每个 token 还算多少：1 表示与第一次更新时一样，0 表示被裁剪。蓝色：A > 0；红色：A < 0。
#
# **先预测**：以 token 的比率 π/π_old 为横轴，A > 0 和 A < 0 时，GRPO 的点落在哪里？GSPO 的呢？自身比率恰好为 1 的 token 会被裁剪吗？再看下排，以回答的长度为横轴：一个回答的所有 token 合起来权重多大？
# %%
batch.advantages = grpo.compute_advantages(batch.rewards)[:, None].expand_as(mask)
for some in grpo.minibatches(batch, grpo.GRPO_EPOCHS):
    logps, _ = grpo.score_tokens(run.policy, some)
    loss, _ = grpo.policy_loss(logps, some.old_logps, some.advantages, some.completion_mask)
    (loss * grpo.token_weights(some.completion_mask)).sum().backward()
    ppo.optimiser_step(run, "policy", ppo.Meter())
logps = ppo.score_without_grad(run.policy, batch).requires_grad_()

def draw():  # blue: A > 0; red: A < 0
    _, panels = plt.subplots(2, 4, figsize=(14, 6), sharey="row", layout="constrained", dpi=80)
    for above, below, (name, script) in zip(*panels, scripts.items()):
        loss, seen = script.policy_loss(logps, batch.old_logps, batch.advantages, mask)
        weights = script.token_weights(mask)
        slope, = torch.autograd.grad((loss * weights).sum(), logps)
        ratio, counts = (logps - batch.old_logps).exp(), -slope / (batch.advantages * weights)
        above.scatter(ratio.detach(), counts, 6, batch.advantages.sign(), cmap="coolwarm_r")
        cut = (seen["clip_ratio/region_mean"] * mask).sum() / mask.sum()
        above.set(title=f"{name}: {cut:.0%} cut", xlabel="a token's ratio", ylabel="what it counts")
        below.plot(mask.sum(1), weights.sum(1) * len(mask), "k.")
        below.set(xlabel="an answer's length", ylabel="its weight")

draw()
# %% [markdown] lang="en"
# - **GRPO, PPO**: each token for itself. It counts as much as its ratio, up to 1.2 if A > 0, down to 0.8 if A < 0; beyond that nothing. DAPO lets a good token go on to 1.28.
# - **GSPO**: the tokens of an answer stand or fall together, at the height of the *answer's* ratio. So a token at exactly 1 can be cut, and one at 1.3 can count in full. The range is so narrow that most answers which have moved as they should are out of it; all of their tokens wait for the next rollout.
# - Blue left of 1, red right of 1: what has moved the *wrong* way is cut by nobody. `min` is one-sided.
# - Below: in GSPO and GRPO each answer counts the same, so a token of a long answer counts less. In DAPO and PPO each token counts the same, so a long answer counts more.
#
# ## 4. Your turn
#
# Constants can be set, and the figure drawn again. **Predict** what these two do: GSPO-token (Eq. 13 of the paper), and Dr. GRPO's sum over MAX_NEW_TOKENS.
# %% [markdown] lang="zh"
# - **GRPO、PPO**：每个 token 各管各的。它算多少就等于自己的比率：A > 0 时到 1.2 为止，A < 0 时到 0.8 为止，再往外就是零。DAPO 让好的 token 可以走到 1.28。
# - **GSPO**：一个回答的所有 token 同进退，高度都是*这个回答*的比率。所以比率恰好为 1 的 token 也可能被裁剪，1.3 的却可能照算。范围很窄，朝应有方向移动了的回答大多已经出界，它们的全部 token 都要等下一次采样。
# - 1 左边的蓝点、1 右边的红点：朝*错误*方向移动的，谁都不裁剪。`min` 只管一边。
# - 下排：GSPO 和 GRPO 中每个回答权重相同，所以长回答里的单个 token 权重较小。DAPO 和 PPO 中每个 token 权重相同，所以长回答的权重较大。
#
# ## 4. 轮到你了
#
# 常量可以改，改完重画即可。下面两处改动会怎样，请**先预测**：GSPO-token（论文式 13），以及 Dr. GRPO 的“求和后除以 MAX_NEW_TOKENS”。
# %%
gspo.USE_TOKEN_LEVEL_LOSS, grpo.AGGREGATION = True, "dr-grpo"
draw()
# %% [markdown] lang="en"
# GSPO-token changes nothing: where an answer has a single advantage its value and its gradient are GSPO's; it is made for answers whose parts have advantages of their own. Dr. GRPO's weights are proportional to the length, like DAPO's, but divided by a constant: they do not depend on what else is in the minibatch, and are smaller because MAX_NEW_TOKENS is larger than the mean length.
#
# More to try: `gspo.CLIP_RANGE = 0.2` (how much is cut then?), `grpo.CLIP_RANGE = (3e-4, 4e-4)` (GSPO's range on tokens: what is left?).
#
# ## What differs, where, and why
#
# | what | function or constant | GSPO | GRPO | DAPO | PPO | why |
# |---|---|---|---|---|---|---|
# | baseline | `compute_advantages` | the group's mean | mean, divided by std | as GRPO | the critic, token by token | a group is cheap and needs no learning; a critic knows which token it was, once it has learned |
# | second network | `Critic`, `value_loss` | – | – | – | as large as the policy | see above; memory and time |
# | ratio | `policy_loss` | of the answer | of the token | of the token | of the token | the reward is of the answer; one token's ratio is a single, noisy sample |
# | clip | `CLIP_RANGE` | 3e-4, 4e-4 | 0.2 | 0.2, 0.28 | 0.2 | a mean over tokens moves far less than a token; DAPO leaves unlikely tokens room to grow |
# | weights | `token_weights` | each answer alike | each answer alike | each token alike | each token alike | should a long answer count more? |
# | sampling | `sample_dynamically` | once | once | until groups have spread | once | a group without spread has advantage 0: sampled for nothing |
# | too long | `overlong_penalty` | – | – | a penalty | `NO_END_PENALTY`, off | a truncated answer is not just a wrong one |
# | KL to the start | `kl_to_reference`; PPO `token_rewards` | in the loss, weight adapted | in the loss | – | in each token's reward | it holds the policy near its start; DAPO lets go on purpose |
#
# Which learns fastest, in steps, tokens and seconds, and which differences are more than noise: [the family's page](../RL_HAND/README.md#what-came-out).
# %% [markdown] lang="zh"
# GSPO-token 什么也没有改变：当一个回答只有一个优势时，它的值和梯度都与 GSPO 相同；它是为各部分有各自优势的回答准备的。Dr. GRPO 的权重与长度成正比，这一点像 DAPO，但除以的是常数：不受同一小批中其他回答的影响，又因为 MAX_NEW_TOKENS 大于平均长度，权重更小。
#
# 还可以试试：`gspo.CLIP_RANGE = 0.2`（还会裁剪多少？）、`grpo.CLIP_RANGE = (3e-4, 4e-4)`（把 GSPO 的范围用在 token 上，还剩下什么？）。
#
# ## 区别是什么，在哪里，为什么
#
# | 区别 | 函数或常量 | GSPO | GRPO | DAPO | PPO | 为什么 |
# |---|---|---|---|---|---|---|
# | 基线 | `compute_advantages` | 组内均值 | 减均值，再除以标准差 | 同 GRPO | 价值网络，逐 token | 组内比较便宜，不必学习；价值网络学会之后能指出是哪个 token |
# | 第二个网络 | `Critic`、`value_loss` | – | – | – | 与策略一样大 | 同上；代价是显存和时间 |
# | 重要性比率 | `policy_loss` | 序列级 | token 级 | token 级 | token 级 | 奖励属于整个回答；单个 token 的比率只是一次带噪声的采样 |
# | 裁剪范围 | `CLIP_RANGE` | 3e-4, 4e-4 | 0.2 | 0.2, 0.28 | 0.2 | 对 token 取平均后波动小得多；DAPO 给低概率 token 留出上升空间 |
# | 权重 | `token_weights` | 每个回答相同 | 每个回答相同 | 每个 token 相同 | 每个 token 相同 | 长回答该不该算得更多？ |
# | 采样 | `sample_dynamically` | 一次 | 一次 | 直到各组有差别 | 一次 | 没有差别的组优势为 0，等于白采 |
# | 过长的回答 | `overlong_penalty` | – | – | 扣分 | `NO_END_PENALTY`，默认关闭 | 被截断的回答不只是一个错误的回答 |
# | 对初始策略的 KL | `kl_to_reference`；PPO 为 `token_rewards` | 在损失里，系数自适应 | 在损失里 | – | 在每个 token 的奖励里 | 把策略拉在起点附近；DAPO 有意放开 |
#
# 按步数、token 数、秒数各是谁学得最快，哪些差别超出了噪声，见[四种算法的页面](../../RL_HAND/README.md#what-came-out)。
