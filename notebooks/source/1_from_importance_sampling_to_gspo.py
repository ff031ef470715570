# %% [markdown] lang="en"
# # From importance sampling to GSPO
#
# You know PPO. This notebook leads from there to GSPO in ten short steps. Each formula is followed by the lines of the scripts that compute it, and by numbers, most of which you can check by hand.
#
# It trains a real, if small, language model ([its size](../data/README.md)) on one CPU core, and runs faster than you read. It needs this repository, `pip install -r requirements.txt` and Jupyter. On Colab, clone the repository first and change into its folder.
# %% [markdown] lang="zh"
# # 从重要性采样到 GSPO
#
# 假设你已经了解 PPO。本篇用十个小步从 PPO 走到 GSPO。每个公式后面都紧跟脚本里计算它的那几行代码，再跟着具体的数字，其中大部分可以手算验证。
#
# 这里训练的是一个真正的语言模型，只是很小（[有多小](../../data/README.md)），单核 CPU 就能跑，比你读得还快。需要本仓库、`pip install -r requirements.txt` 和 Jupyter。在 Colab 上请先克隆仓库并进入其目录。
# %%
import contextlib, inspect, io, os, re, sys, tempfile
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"  # no progress bars
project = next(at for at in [Path.cwd(), *Path.cwd().parents] if (at / "RL_HAND").is_dir())
sys.path += [str(project / "RL_HAND" / name) for name in ("gspo", "grpo")]
import gspo, grpo, torch, matplotlib.pyplot as plt

def show(function):  # its lines, less the docstring
    print(re.sub(r' *""".*?"""\n', "", inspect.getsource(function), flags=re.S), end="")
# %% [markdown] lang="en"
# ## 1. Three stages
#
# Pretraining predicts the next token of a great deal of text; supervised fine-tuning imitates good answers; in reinforcement learning the model answers by itself, and what a judge finds good becomes more likely. PPO, GRPO and GSPO are three ways to do the third.
#
# Our policy has the first two behind it. It can add and subtract in columns, but it was also taught bad habits on purpose. Here is one question and a *group* of eight answers that it samples, each with its reward: 1 if the last number is right.
# %% [markdown] lang="zh"
# ## 1. 三个阶段
#
# 预训练在海量文本上预测下一个 token；监督微调模仿好的回答；强化学习则让模型自己作答，裁判认为好的回答变得更可能出现。PPO、GRPO、GSPO 是完成第三阶段的三种做法。
#
# 我们的策略已经走完前两个阶段：它会列竖式做加减法，但也被故意教了一些坏习惯。下面是一道题，以及它采样出的一*组*八个回答，每个都带奖励：最后一个数正确得 1 分。
# %%
with contextlib.redirect_stdout(io.StringIO()):  # a run's start-up block
    run = gspo.start(["PROFILE=embedded", "BATCH_SIZE=64", "MINIBATCH=128", "KL_COEF=0",
                      "REWARD_WEIGHTS={'verifier': 1}", f"OUTPUT_DIR={tempfile.mkdtemp()}/run"])
gspo.begin_step(run)
rows = gspo.next_questions(run, gspo.BATCH_SIZE)
batch = gspo.sample_groups(run.policy, run.tokenizer, rows, gspo.GROUP_SIZE)
rewards, _ = gspo.score_completions(run, rows, batch)
print(rows[0]["question"], *zip(rewards[:8].tolist(), gspo.texts_of(run, batch)), sep="\n")
# %% [markdown] lang="en"
# ## 2. Importance sampling, with a die
#
# Sampling is slow, so a rollout is used for several updates. After the first one the answers come from an *older* policy. Importance sampling makes up for that: to learn about a distribution $q$ from samples of $p$, weigh each sample by $q/p$.
#
# $$E_{x \sim q}[f(x)] = E_{x \sim p}\left[\frac{q(x)}{p(x)} f(x)\right]$$
#
# By hand: $p$ is a fair die. $q$ is loaded: half of its throws are a six, the other faces have one chance in ten each. The weight of a six is $\frac{1/2}{1/6} = 3$, that of any other face $\frac{1/10}{1/6} = 0.6$.
#
# Throw the fair die six times and suppose that each face comes once. The weighted mean is $(0.6 \cdot (1+2+3+4+5) + 3 \cdot 6) / 6 = 4.5$. That is the mean of the loaded die, which nobody has thrown.
# %% [markdown] lang="zh"
# ## 2. 用骰子理解重要性采样
#
# 采样很慢，所以一批采样要用来更新好几次。第一次更新之后，这些回答就来自一个*更旧*的策略了。重要性采样用来弥补这一点：想用来自 $p$ 的样本了解分布 $q$，就给每个样本乘上权重 $q/p$。
#
# $$E_{x \sim q}[f(x)] = E_{x \sim p}\left[\frac{q(x)}{p(x)} f(x)\right]$$
#
# 手算一遍：$p$ 是一枚公平的骰子；$q$ 是灌了铅的骰子，一半的时候掷出六点，其余每面各占十分之一。六点的权重是 $\frac{1/2}{1/6} = 3$，其他各面的权重是 $\frac{1/10}{1/6} = 0.6$。
#
# 把公平骰子掷六次，假设每面恰好出现一次，加权平均是 $(0.6 \cdot (1+2+3+4+5) + 3 \cdot 6) / 6 = 4.5$。这正是灌铅骰子的均值，而那枚骰子谁也没有掷过。
# %%
faces, weight = torch.arange(1.0, 7), torch.tensor([0.1] * 5 + [0.5]) / (1 / 6)
print("each face once:", faces.mean().item(), " weighted:", (weight * faces).mean().item())
# %% [markdown] lang="en"
# ### Many throws in a row
#
# An answer is not one throw but a sequence of $n$ of them, and its weight is the *product* of the weights. The usual measure of what weights cost is the effective number of samples, $N / E_p[w^2]^n$. Here $E_p[w^2] = (5 \cdot 0.6^2 + 3^2)/6 = 1.8$.
#
# **Predict first:** you have 10,000 sequences of 25 throws each. Weighted, how many do they count for?
# %% [markdown] lang="zh"
# ### 连掷很多次
#
# 一个回答不是掷一次，而是连掷 $n$ 次，它的权重是各次权重的*乘积*。衡量加权代价的常用指标是有效样本数 $N / E_p[w^2]^n$。这里 $E_p[w^2] = (5 \cdot 0.6^2 + 3^2)/6 = 1.8$。
#
# **先猜一猜**：手里有 10,000 条序列，每条掷 25 次。加权之后，它们相当于多少个样本？
# %%
for n in (1, 2, 5, 10, 25):
    print(f"{n:2} throws: 10,000 count for {10_000 / (weight**2).mean().item()**n:9.3f}")
# %% [markdown] lang="en"
# Fewer than one. The exact weight of a long answer is correct on average and useless in practice: almost all weights are near zero, and a rare one is huge.
#
# So nobody uses it. PPO and GRPO weigh each *token* by its own ratio. GSPO keeps the whole answer but takes the $n$-th *root*. Neither is unbiased any more: a token's ratio ignores that the tokens before it, too, come from the older policy, and a root of a weight is not a weight. What each gets in exchange is the rest of this notebook.
# %% [markdown] lang="zh"
# 还不到一个。长回答的精确权重在期望上是对的，实际上却没法用：几乎所有权重都接近零，偶尔冒出一个巨大的。
#
# 所以没有人直接用它。PPO 和 GRPO 给每个 *token* 用它自己的比率；GSPO 保留整个回答，但开 $n$ 次*方根*。两者都不再无偏：token 的比率忽略了前文也出自旧策略；权重一开方，就不再是重要性权重。各自换来了什么，就是本篇余下的内容。
# %% [markdown] lang="en"
# ## 3. PPO: a ratio per token, and a clip
#
# $$r_t = \frac{\pi(y_t \mid x, y_{\lt t})}{\pi_{old}(y_t \mid x, y_{\lt t})} \qquad J = \frac{1}{|y|} \sum_t \min\left(r_t A_t,\ \mathrm{clip}(r_t, 1-\varepsilon, 1+\varepsilon)\, A_t\right)$$
#
# $A_t$, the advantage, says how much better than expected this token was. In PPO a *critic*, a second network, says what was to be expected. The rest of the objective is in these lines, GRPO's and PPO's alike. A loss is minimised, hence the minus.
# %% [markdown] lang="zh"
# ## 3. PPO：逐 token 的比率，加上裁剪
#
# $$r_t = \frac{\pi(y_t \mid x, y_{\lt t})}{\pi_{old}(y_t \mid x, y_{\lt t})} \qquad J = \frac{1}{|y|} \sum_t \min\left(r_t A_t,\ \mathrm{clip}(r_t, 1-\varepsilon, 1+\varepsilon)\, A_t\right)$$
#
# $A_t$ 是优势，表示这个 token 比预期好多少。在 PPO 里，“预期”由*评论家*（critic，即第二个网络）给出。目标函数的其余部分就是下面几行，GRPO 和 PPO 在这里相同。损失是要最小化的，所以有个负号。
# %%
show(grpo.policy_loss)
# %% [markdown] lang="en"
# Drawn, with answers of one token each. Where a line is flat, the gradient is zero.
#
# **Predict first:** a bad token ($A = -1$) has become *more* likely, $r = 1.3$. That is outside the range. Is it clipped?
# %% [markdown] lang="zh"
# 画出来看，每个回答只有一个 token。线平的地方，梯度为零。
#
# **先猜一猜**：一个坏 token（$A = -1$）反而变得*更*可能了，$r = 1.3$，已经超出范围。它会被裁剪吗？
# %%
ratio, A = torch.linspace(0.5, 1.5, 201)[:, None], torch.tensor([[+1.0, -1.0]])
loss, _ = grpo.policy_loss(ratio.log(), 0 * ratio, A, torch.ones_like(A))
axis = plt.figure(figsize=(6, 2.8)).add_subplot(xlabel="ratio r", ylabel="objective")
axis.plot(ratio, -loss, label=["A = +1", "A = -1"])
axis.axvspan(0.8, 1.2, alpha=0.15, label="range 0.2")
axis.legend();
# %% [markdown] lang="en"
# No. The clip is one-sided. It stops a token that has gone far enough *in the direction in which its advantage pushes*; a token that went the wrong way is still pulled back.
#
# The same in numbers, by a helper that we will use again. Its *push* is minus the gradient of the loss, summed over the tokens, with respect to the log-probs: above 0, the token is made more likely.
# %% [markdown] lang="zh"
# 不会。裁剪是单侧的：只有当 token *沿着优势推动的方向*已经走得够远时才停下；走错方向的 token 仍会被拉回来。
#
# 用数字再看一遍，借助一个后面还会用到的小函数。其中 push（推力）是各 token 的损失求和之后，对对数概率的梯度取负：大于 0 表示让这个 token 更可能。
# %%
def look(script, A, low, high, *changes):  # changes: of log-probs since the tokens were sampled
    script.CLIP_RANGE, new = (low, high), torch.tensor([changes], requires_grad=True)
    loss, found = script.policy_loss(new, 0 * new.detach(), 0 * new + A, 0 * new + 1)
    loss.sum().backward()
    print(script.__name__, f"A {A:+}  ratios", found["ratio/mean"][0].numpy().round(4),
          "  push", (0 - new.grad[0]).numpy().round(4))

look(grpo, +1, 0.2, 0.2, 0.1, 0.3)
look(grpo, -1, 0.2, 0.2, 0.3, -0.3)
# %% [markdown] lang="en"
# The first answer is good: its token at ratio 1.1052 is pushed up, its token at 1.3499 is clipped and gets nothing. The second is bad: its token at 1.3499 is pushed down, its token at 0.7408 gets nothing more.
# %% [markdown] lang="zh"
# 第一个回答是好的：比率 1.1052 的 token 被往上推，比率 1.3499 的 token 被裁剪，什么也得不到。第二个回答是坏的：比率 1.3499 的 token 被往下压，比率 0.7408 的 token 不再受力。
# %% [markdown] lang="en"
# ## 4. GRPO: the group instead of the critic
#
# $$A_i = R_i - \mathrm{mean}(R) \qquad \mathrm{or} \qquad A_i = \frac{R_i - \mathrm{mean}(R)}{\mathrm{std}(R)}$$
#
# GRPO throws the critic away. What was to be expected of a question is what the other answers to it got. All tokens of an answer share its advantage.
#
# By hand: rewards of 95, 70, 85 and 80 have a mean of 82.5. So the first answer is 12.5 better than expected, the second 12.5 worse. The standard deviation is 10.4, the one that divides by $n-1$ (`STD_CORRECTION=1`).
#
# **Predict first:** what do four answers get that all scored 80? And one right answer among four?
# %% [markdown] lang="zh"
# ## 4. GRPO：用组代替评论家
#
# $$A_i = R_i - \mathrm{mean}(R) \qquad \mathrm{or} \qquad A_i = \frac{R_i - \mathrm{mean}(R)}{\mathrm{std}(R)}$$
#
# GRPO 不用评论家。对一道题该有什么预期，看同一道题的一组回答平均得了多少分就知道，这就是组内相对优势。同一个回答的所有 token 共享这个优势。
#
# 手算一遍：奖励 95、70、85、80 的均值是 82.5。所以第一个回答比预期好 12.5，第二个差 12.5。标准差是 10.4，除的是 $n-1$（`STD_CORRECTION=1`）。
#
# **先猜一猜**：四个回答都得 80 分，优势是多少？四个回答里只有一个答对呢？
# %%
show(grpo.compute_advantages)
for scores in ([95.0, 70, 85, 80], [80.0, 80, 80, 80], [1.0, 0, 0, 0]):
    for grpo.ADVANTAGE_TYPE in ("relative", "normalized"):
        print(scores, grpo.ADVANTAGE_TYPE, grpo.compute_advantages(torch.tensor(scores)))
# %% [markdown] lang="en"
# A group of equals teaches nothing. One right answer among three wrong ones is pushed up three times as hard as each of those is pushed down.
#
# From here on we use the first kind, without the division: `gspo.py`'s default. The papers of GRPO and GSPO divide, and so does `grpo.py`.
# %% [markdown] lang="zh"
# 得分全都相同的一组什么也教不了。一对三错的一组里，答对的那个被往上推的力度，是每个答错的被往下压的三倍。
#
# 从这里起用第一种，即不除以标准差的：这是 `gspo.py` 的默认值。GRPO 和 GSPO 的论文都除，`grpo.py` 也除。
# %% [markdown] lang="en"
# ## 5. One optimiser step, token by token
#
# Now we train. This is the inner loop of the scripts: log-probs, loss, mean over tokens and then answers, gradient, step. We go through our 512 answers once, in four updates, and note after each how far *every* token's log-prob has moved since it was sampled.
#
# In the first update every ratio is exactly 1. No clip acts, and with the same advantages PPO's, GRPO's and GSPO's losses have the same gradient. The algorithms differ only from the second update on. The *value* of that first loss is minus the mean advantage, which in whole groups is 0. Its gradient is not 0: each advantage multiplies another $\nabla \log \pi$. So the value of this loss says nothing about learning.
#
# In `gspo.py` and `grpo.py` a KL to the starting policy is added to this loss, `KL_COEF` times, token by token (PPO has it in the reward). It holds the policy near where *training* began, the clip near where the *rollout* began. Here it is off.
# %% [markdown] lang="zh"
# ## 5. 一步优化，逐个 token 地看
#
# 现在开始训练。下面就是脚本的内层循环：对数概率、损失、先对 token 再对回答取平均、梯度、更新。我们把这 512 个回答过一遍，共四次更新，并在每次更新之后记下*每个* token 的对数概率自采样以来移动了多少。
#
# 第一次更新时，所有比率都恰好是 1，裁剪不起作用；只要优势相同，PPO、GRPO、GSPO 的损失梯度就相同。从第二次更新起，几种算法才有区别。这第一个损失的*数值*是优势均值取负，在完整的组里就是 0。梯度却不是 0：每个优势乘的是不同的 $\nabla \log \pi$。所以这个损失的数值说明不了学得怎样。
#
# `gspo.py` 和 `grpo.py` 还会给这个损失逐 token 加上一项：`KL_COEF` 乘以相对初始策略的 KL（PPO 则把它放进奖励）。它让策略不要离*训练*的起点太远，裁剪则让策略不要离*这批采样*的起点太远。这里把它关掉了。
# %%
mask, changes, grpo.CLIP_RANGE = batch.completion_mask, [], 0.2
batch.advantages = gspo.compute_advantages(rewards)[:, None].expand_as(mask)
batch.old_logps = gspo.behaviour_logps(run.policy, batch)
for part in gspo.minibatches(batch, passes=1):
    logps, _ = gspo.score_tokens(run.policy, part)
    loss, found = grpo.policy_loss(logps, part.old_logps, part.advantages, part.completion_mask)
    (loss := (loss * gspo.token_weights(part.completion_mask)).sum()).backward()
    gspo.optimiser_step(run, "policy", gspo.Meter())
    changes.append(gspo.score_without_grad(run.policy, batch) - batch.old_logps)
    print("loss {:z.4f}, ratios {:.4f} to {:.4f}".format(loss, *found["ratio/mean"].aminmax()))
# %% [markdown] lang="en"
# Here are two answers to the question above, before and after the *first* update, whose minibatch they were in. One is right, one wrong; they part at one digit. A bar is a token's change of log-prob. The dashed line is the mean of the bars; remember it.
#
# **Predict first:** the advantages are $+0.875$ and $-0.125$, the same for all tokens of an answer. What happens to the tokens that *both* answers have?
# %% [markdown] lang="zh"
# 下面是上面那道题的两个回答在*第一次*更新前后的对比，它们就在这次更新的小批量里。一对一错，从某个数字开始才分道扬镳。每根柱子是一个 token 的对数概率变化。虚线是这些柱子的平均值，请记住它。
#
# **先猜一猜**：两个回答的优势分别是 $+0.875$ 和 $-0.125$，同一回答的所有 token 共享。*两个*回答共有的 token 会怎样变化？
# %%
for i, axis in zip((7, 3), plt.subplots(2, 1, figsize=(9, 4), layout="constrained")[1]):
    words = [run.tokenizer.decode(token).strip("<|>") for token in batch.completion_ids[i][mask[i] > 0]]
    axis.bar(range(len(words)), changes[0][i, :len(words)])
    axis.axhline(changes[0][i, :len(words)].mean(), color="tab:red", linestyle="--")
    axis.set_xticks(range(len(words)), words)
    axis.set_title(f"reward {rewards[i]:.0f}, advantage {batch.advantages[i, 0]:+.3f}")
for what, move in ("tokens", changes[0]), ("answers", changes[0].sum(1, True) / mask.sum(1, True)):
    way = (move * batch.advantages[:, :1])[move.abs() > 4e-4].sign()
    print(f"of the {what} that moved, {(way > 0).sum() / way.abs().sum():.0%} went as they should")
# %% [markdown] lang="en"
# They go *up* in both: the first token, which begins to work in columns instead of guessing, by about 0.1. In the wrong answer it is pushed down, but less than right answers that begin the same way push it up. Only the deciding digit tells the two apart: 8 rises, 5 falls. Nearly all else follows from what stands before it and stays where it was.
#
# Nor do the dashed lines part *these* two: both are at about 0.006. Judged by them, as GSPO will do with its narrow range (Section 8), the right answer has had its step; the wrong one has risen along with it, has not begun to fall, and is still to be pushed down.
#
# The two lines above the figure count over all answers. (Moved is: by more than 4e-4, the upper end of that range.) Of the tokens, little more than half moved as their advantage says; of the answers' means, about three quarters. So one token's ratio says little about its answer; the mean says more, though not always enough.
# %% [markdown] lang="zh"
# 两个回答的第一个 token（开始列竖式，而不是乱猜）都*上升*了约 0.1。在答错的回答里它受到向下的推力，但敌不过同样开头的正确回答的上推。真正区分两者的只有那个关键数字：8 上升，5 下降。其余 token 几乎都由前文决定，原地不动。
#
# 虚线也分不开*这*两个回答：都在 0.006 左右。GSPO 将用它的窄范围（第 8 节）按虚线判断：对的回答这一步已经走完；错的回答跟着一起上升，还没有开始下降，仍要往下压。
#
# 图上方的两行统计全部回答（移动超过 4e-4，即那个窄范围的上端，才算移动）。token 里只有一半多一点朝优势所指的方向移动，回答的平均值里则约有四分之三。所以单个 token 的比率很难代表它所在的回答；平均值好一些，但也不总是够用。
# %% [markdown] lang="en"
# ## 6. How noisy is a ratio?
#
# Importance sampling corrects an *average over many samples*. Here a token's ratio meets a single sample, the one token that was drawn at this place, so its noise goes into the gradient as it is. That is GSPO's objection to GRPO. GSPO's own ratio meets a single sample as well, the one answer; what it does about the noise is to average over the answer's tokens *before* it weighs anything.
#
# Noise can be seen alone. Score the same answers twice with the *same* policy, once in bfloat16 and once in float32. Every true ratio is 1, so all that is left is rounding. (An inference engine that samples in other arithmetic than the trainer's does the same to you.)
#
# For the first $n$ tokens of our longer answers we compare the size of three log-ratios:
#
# - that of a **token**, which PPO and GRPO use;
# - their **sum**, the exact weight of Section 2;
# - their **mean**, which GSPO will use.
#
# **Predict first:** errors that know nothing of each other. How do the three grow with $n$?
# %% [markdown] lang="zh"
# ## 6. 比率有多吵？
#
# 重要性采样修正的是*大量样本的平均*。而这里一个 token 的比率只遇到一个样本，就是这个位置上采到的那个 token，于是噪声原样进入梯度。这正是 GSPO 对 GRPO 的质疑。GSPO 自己的比率同样只遇到一个样本，就是那一个回答；它对付噪声的办法，是在加权*之前*先对回答的各个 token 取平均。
#
# 噪声可以单独拿出来看。用*同一个*策略给同一批回答打两遍分，一遍用 bfloat16，一遍用 float32。真实的比率全是 1，剩下的只有舍入误差。（推理引擎采样时的数值精度若与训练端不同，效果也是这样。）
#
# 取较长的回答，对前 $n$ 个 token 比较三种对数比率的大小：
#
# - 单个 **token** 的：PPO 和 GRPO 用它；
# - 它们的**和**：第 2 节的精确权重；
# - 它们的**平均**：GSPO 将要用它。
#
# **先猜一猜**：如果误差彼此无关，这三者随 $n$ 怎样变化？
# %%
gspo.DTYPE = "bfloat16"
rounding = gspo.score_without_grad(run.policy, batch) - (batch.old_logps + changes[-1])
gspo.DTYPE, n = "float32", torch.arange(1, 25)
for change, title, axis in zip((rounding, changes[-1]), ("rounding only", "after four updates"),
                               plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")[1]):
    part = change[mask.sum(1) >= 24][:, :24]
    total, token = part.cumsum(1), (part**2).cumsum(1).div(n).sqrt()
    for label, value in (("sum", total), ("token", token), ("mean", total / n)):
        axis.loglog(n, value.square().mean(0).sqrt(), ".-", label=label)
    axis.loglog(n, part.std() * n**0.5, "k:", n, part.std() * n**-0.5, "k:")
    axis.set(title=f"{title}, {len(part)} answers", xlabel="tokens, n", ylabel="log-ratio (rms)")
    axis.legend()
# %% [markdown] lang="en"
# The dotted lines are $\sqrt{n}$ and $1/\sqrt{n}$. The same answers are behind every point. On the left, where there is only noise:
#
# - A token is about equally noisy, however many are taken in.
# - The sum grows about like $\sqrt{n}$: long answers would be clipped for being long, whatever was learned.
# - The mean shrinks about like $1/\sqrt{n}$: what is noise cancels.
#
# On the right, what was learned comes on top, and it is spread unevenly. The first two tokens, which choose how to work, moved most, and most of what follows hardly moves: so the line of the token falls. The jumps at $n = 14$ and $n = 23$ are not noise either, nor fewer answers, but single tokens of a few wrong answers that became far less likely. The order is the same: the sum is the largest, the mean the smallest.
# %% [markdown] lang="zh"
# 虚线是 $\sqrt{n}$ 和 $1/\sqrt{n}$。每个点背后都是同一批回答。左图只有噪声：
#
# - 不管取多少个 token，单个 token 的噪声都差不多。
# - 和大致按 $\sqrt{n}$ 增长：无论学到了什么，长回答都会仅仅因为长而被裁剪。
# - 平均大致按 $1/\sqrt{n}$ 缩小：噪声互相抵消。
#
# 右图叠加了学到的东西，而且分布不均。头两个 token 决定怎么做题，移动得最多，后面的大多几乎不动，所以 token 那条线往下走。$n = 14$ 和 $n = 23$ 处的跳跃也不是噪声，不是回答变少了，而是少数几个错误回答里的个别 token 变得远不如从前可能。次序不变：和最大，平均最小。
# %% [markdown] lang="en"
# ## 7. GSPO: one ratio per answer
#
# $$s_i = \left(\frac{\pi(y_i \mid x)}{\pi_{old}(y_i \mid x)}\right)^{1/|y_i|} = \exp\left(\frac{1}{|y_i|} \sum_t \log \frac{\pi(y_{i,t} \mid x, y_{i,\lt t})}{\pi_{old}(y_{i,t} \mid x, y_{i,\lt t})}\right)$$
#
# This is Eq. 7 of the paper: the exact weight of the answer, and of it the $|y|$-th root. It is the dashed line of Section 5, made a ratio. With the root it is no importance weight any more, not even on average. That is a deliberate trade: an exact weight that nobody can use is given up for a measure of how far the answer's likelihood has moved *per token*, around which a trust region can be drawn. The rest is as before:
#
# $$J = \frac{1}{G} \sum_i \min\left(s_i A_i,\ \mathrm{clip}(s_i, 1-\varepsilon, 1+\varepsilon)\, A_i\right)$$
#
# A reward is given to a whole answer, so the ratio is the whole answer's, too.
# %% [markdown] lang="zh"
# ## 7. GSPO：一个回答，一个比率
#
# $$s_i = \left(\frac{\pi(y_i \mid x)}{\pi_{old}(y_i \mid x)}\right)^{1/|y_i|} = \exp\left(\frac{1}{|y_i|} \sum_t \log \frac{\pi(y_{i,t} \mid x, y_{i,\lt t})}{\pi_{old}(y_{i,t} \mid x, y_{i,\lt t})}\right)$$
#
# 这是论文的 Eq. 7：整个回答的精确权重，再开 $|y|$ 次方根。它就是第 5 节那条虚线，只是取了指数。开了方根，它就不再是重要性权重，取期望也不再无偏。这是有意的取舍：放弃一个没法用的精确权重，换来一个尺度，衡量回答的似然*平均每个 token* 移动了多远，围绕它可以划出信任域。其余照旧：
#
# $$J = \frac{1}{G} \sum_i \min\left(s_i A_i,\ \mathrm{clip}(s_i, 1-\varepsilon, 1+\varepsilon)\, A_i\right)$$
#
# 奖励是给整个回答的，所以比率也应当是整个回答的：这就是序列级的比率。
# %%
show(gspo.policy_loss)
# %% [markdown] lang="en"
# By hand, an answer of two tokens whose log-probs have risen by 0.1 and by 0.5. GRPO has two ratios, $e^{0.1} = 1.105$ and $e^{0.5} = 1.649$. GSPO has one, $e^{(0.1 + 0.5)/2} = 1.350$. The range is wide here, so that nothing is clipped.
# %% [markdown] lang="zh"
# 手算一遍：一个回答有两个 token，对数概率分别上升了 0.1 和 0.5。GRPO 有两个比率，$e^{0.1} = 1.105$ 和 $e^{0.5} = 1.649$；GSPO 只有一个，$e^{(0.1 + 0.5)/2} = 1.350$。这里把范围放得很宽，什么都不裁剪。
# %%
for script in (grpo, gspo):
    look(script, +1, 0.9, 9.0, 0.1, 0.5)
# %% [markdown] lang="en"
# The push is the whole difference. GRPO weighs each token by its own ratio, noise included. GSPO weighs all tokens of an answer alike.
#
# Why 1.3499, and not half of it, with a $1/|y|$ inside $s_i$? `gspo.policy_loss` returns the answer's term once for each token, so that what follows is the same code as GRPO's. Each of the $|y|$ copies pushes every token by $s_i A_i / |y_i|$, and our helper adds the copies up. Training takes their mean instead (`gspo.token_weights`), and $1/|y|$ is back:
#
# $$\nabla J = \frac{1}{G} \sum_i s_i A_i \cdot \frac{1}{|y_i|} \sum_t \nabla \log \pi(y_{i,t} \mid x, y_{i,\lt t})$$
# %% [markdown] lang="zh"
# 全部区别就在推力上。GRPO 用每个 token 自己的比率加权，噪声也算了进去；GSPO 对一个回答里的所有 token 一视同仁。
#
# $s_i$ 里面有 $1/|y|$，为什么推力是 1.3499，而不是它的一半？`gspo.policy_loss` 把回答的那一项给每个 token 各返回一份，好让后面的代码与 GRPO 相同。$|y|$ 份里每一份都给每个 token $s_i A_i / |y_i|$ 的推力，我们的小函数把它们加了起来。训练时取的是平均（`gspo.token_weights`），$1/|y|$ 就回来了：
#
# $$\nabla J = \frac{1}{G} \sum_i s_i A_i \cdot \frac{1}{|y_i|} \sum_t \nabla \log \pi(y_{i,t} \mid x, y_{i,\lt t})$$
# %% [markdown] lang="en"
# ## 8. Why 3e-4?
#
# PPO and GRPO clip at 0.2. The paper's range for GSPO is 3e-4 below and 4e-4 above 1. That looks like a misprint. Here are all ratios after our four updates, GRPO's above and GSPO's below, with both ranges and the share of tokens that each cuts. The outermost bars hold all that lies beyond.
# %% [markdown] lang="zh"
# ## 8. 为什么是 3e-4？
#
# PPO 和 GRPO 的裁剪范围是 0.2。论文给 GSPO 的范围却是 1 以下 3e-4、1 以上 4e-4，看着像印错了。下面是四次更新之后的所有比率，上面是 GRPO 的，下面是 GSPO 的，各配两种范围，以及各自裁掉的 token 占多少。超出横轴的都算在最外侧的柱子里。
# %%
for script, low, high, axis in zip((grpo, grpo, gspo, gspo), (0.2, 3e-4) * 2, (0.2, 4e-4) * 2,
                                   plt.subplots(2, 2, layout="constrained", figsize=(9, 5))[1].flat):
    script.CLIP_RANGE, old = (low, high), batch.old_logps
    found = script.policy_loss(old + changes[-1], old, batch.advantages, mask)[1]
    cut = found["clip_ratio/region_mean"][mask > 0].mean()
    axis.hist(found["ratio/mean"][mask > 0].clamp(0.7, 1.3), bins=120, range=(0.7, 1.3), log=True)
    axis.axvspan(1 - low, 1 + high, color="tab:orange", alpha=0.4)
    axis.set(title=f"{script.__name__}, {low:g} / {high:g}: {cut:.1%} cut", ylabel="tokens")
# %% [markdown] lang="en"
# The range has to fit the ratio. A mean over an answer's tokens stays near 1: a range of 0.2 hardly ever acts on it, which is no clip at all. The paper's range does act, and cuts many times more tokens than GRPO's 0.2 does ([two orders of magnitude more](../RL_HAND/README.md#what-came-out) in the first steps of our comparison, as in the paper). That is as intended: an answer that has already moved the way its advantage pushes waits.
#
# GRPO with the paper's range (upper right) cuts fewer tokens than GSPO does, because most tokens have hardly moved. But it stops almost every token that has begun to move its way, and goes on pushing the others of the same answer.
#
# Why should GSPO be better? The case for it:
#
# - The answer is judged as a whole, so it is weighed and stopped as a whole.
# - A long answer is not clipped for being long, as it would be by its exact weight.
# - The narrow range is a tight trust region. It is meant to hold when there are many updates on a rollout, or the learning rate is large.
#
# What [our own comparison](../RL_HAND/README.md#what-came-out) shows, on models of this size: with a range of 0.2 GSPO is as fast as GRPO, with the paper's it is slower. That it is more stable did not show: no run was unstable.
#
# A range so narrow needs exact log-probs. bfloat16 keeps 8 binary digits, so near 1 its steps are $2^{-7}$, about 0.008; and in the left figure of Section 6 rounding alone moves the mean of 24 tokens by about 0.001, that of fewer by more. Hence log-probs are float32 in the scripts.
# %% [markdown] lang="zh"
# 范围要与比率相配。对整个回答的 token 取平均之后，比率总在 1 附近：0.2 的范围对它几乎从不起作用，等于没有裁剪。论文的范围确实起作用，裁掉的 token 比 GRPO 的 0.2 多得多（在我们的对比实验的最初几步里[多出两个数量级](../../RL_HAND/README.md#what-came-out)，与论文一致）。这是有意为之：一个回答既然已经朝优势推动的方向移动过了，就先等着。
#
# GRPO 配上论文的范围（右上）裁掉的 token 比 GSPO 少，因为大多数 token 几乎没动。但凡是朝自己的方向动了一点的 token，几乎都被它停下，同一回答里的其余 token 却继续被推。
#
# GSPO 凭什么更好？它的理由是：
#
# - 回答是作为整体评判的，所以也作为整体加权、整体停下。
# - 长回答不会像用精确权重那样，仅仅因为长就被裁剪。
# - 窄范围是一个紧的信任域。一批采样要更新很多次，或者学习率很大时，它应当仍能约束住策略。
#
# [我们自己的对比](../../RL_HAND/README.md#what-came-out)在这么小的模型上显示：范围取 0.2 时 GSPO 与 GRPO 一样快，取论文的范围则更慢。更稳定这一点没有显现出来：没有哪次训练不稳定。
#
# 范围这么窄，对数概率就必须精确。bfloat16 只有 8 位二进制有效数字，所以在 1 附近步长是 $2^{-7}$，约 0.008；第 6 节的左图里，单是舍入就让 24 个 token 的平均值移动约 0.001，token 更少时移动更多。所以脚本里的对数概率用 float32。
# %% [markdown] lang="en"
# ## 9. The gradient of a clipped answer is zero
#
# With GSPO a clip takes out a whole answer, all tokens at once.
#
# **Predict first:** four answers, with the paper's range. Good or bad, each a little more or less likely than when it was sampled. Which have a gradient?
# %% [markdown] lang="zh"
# ## 9. 被裁剪的回答梯度为零
#
# 在 GSPO 里，裁剪一次就拿掉整个回答，所有 token 一起。
#
# **先猜一猜**：用论文的范围，四个回答，有好有坏，各自比采样时更可能一点或更不可能一点。哪几个有梯度？
# %%
for A, way in (+1, +1), (+1, -1), (-1, +1), (-1, -1):
    look(gspo, A, 3e-4, 4e-4, 0.01 * way, 0.03 * way, -0.01 * way)
# %% [markdown] lang="en"
# The good answer that has become less likely, and the bad one that has become more likely: the two that went the wrong way. The others get no push of their own for now. Updates on other answers still move them, and if these bring one back into the range, it is pushed again.
#
# Note the third token of the first answer. It went *down* by 0.01 although its answer went up, and GSPO leaves it there. GRPO with 0.2 would go on pushing all three tokens, with 3e-4 only this one.
# %% [markdown] lang="zh"
# 有梯度的是变得更不可能的好回答，和变得更可能的坏回答：走错方向的那两个。另外两个暂时不再受自己的推力。其他回答的更新仍会带动它们；如果因此回到范围之内，又会重新受力。
#
# 注意第一个回答的第三个 token：整个回答上升了，它却*下降*了 0.01，GSPO 就让它留在那里。GRPO 用 0.2 会继续推全部三个 token，用 3e-4 则只推这一个。
# %% [markdown] lang="en"
# ## 10. What to keep
#
# | | PPO | GRPO | GSPO |
# |---|---|---|---|
# | what was expected | a critic | the group's mean | the group's mean |
# | the ratio of | a token | a token | an answer, length-normalised |
# | range | 0.2 | 0.2 | 3e-4 / 4e-4 |
# | what a clip takes out | a token | a token | an answer |
#
# Three questions, to try by changing a cell above:
#
# 1. In Section 8, put `rounding` in the place of `changes[-1]`: no learning, only bfloat16. What is cut?
# 2. What does GSPO do with answers of one token?
# 3. In Section 5, go through the rollout twice (`passes=2`), once with `grpo.policy_loss` and once with `gspo.policy_loss`. Which moves the policy further?
#
# <details><summary>Answers</summary>
#
# 1. A range of 0.2 cuts nothing, the paper's a good part of GSPO's answers, for no reason at all.
# 2. What GRPO does, with a narrower range: the mean over one token is that token.
# 3. GRPO's. Under GSPO more and more answers leave the range, and are left alone; under GRPO nearly all tokens go on.
#
# </details>
#
# Next: [thirty steps of `gspo.py`](2_train_and_look.ipynb), with the learning curve. The paper's GSPO is arXiv:2507.18071. Its case for mixture-of-experts models, whose routers add to the noise of a token, cannot be seen on a dense model like ours.
# %% [markdown] lang="zh"
# ## 10. 记住什么
#
# | | PPO | GRPO | GSPO |
# |---|---|---|---|
# | 预期从哪里来 | 评论家 | 组内均值 | 组内均值 |
# | 比率属于 | 一个 token | 一个 token | 一个回答，按长度归一化 |
# | 裁剪范围 | 0.2 | 0.2 | 3e-4 / 4e-4 |
# | 一次裁剪拿掉 | 一个 token | 一个 token | 一个回答 |
#
# 三个问题，改一改上面的单元格就能试：
#
# 1. 在第 8 节里用 `rounding` 代替 `changes[-1]`：什么都没学，只有 bfloat16 的舍入。会裁掉什么？
# 2. 如果回答只有一个 token，GSPO 会怎样？
# 3. 在第 5 节里把这批采样过两遍（`passes=2`），一次用 `grpo.policy_loss`，一次用 `gspo.policy_loss`。哪一个让策略走得更远？
#
# <details><summary>答案</summary>
#
# 1. 0.2 的范围什么也不裁，论文的范围却毫无理由地裁掉 GSPO 相当一部分回答。
# 2. 与 GRPO 相同，只是范围更窄：对一个 token 取平均，还是它自己。
# 3. GRPO。在 GSPO 下，越来越多的回答走出范围，于是不再受力；在 GRPO 下，几乎所有 token 都继续受力。
#
# </details>
#
# 接下来：[用 `gspo.py` 训练三十步](2_train_and_look.ipynb)，看学习曲线。GSPO 的论文是 arXiv:2507.18071。它的另一个理由是混合专家模型：路由会让 token 的比率更吵；这一点在我们这样的稠密模型上看不到。
