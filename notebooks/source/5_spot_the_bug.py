# %% [markdown] lang="en"
# # Spot the bug
#
# Eight faults that are common in public code, each put into [`gspo.py`](../RL_HAND/gspo/gspo.py), one at a time. None of them crashes. For each you see what it does to training, if it does anything that can be seen, and a dozen lines: **which one is wrong?** The
# answer is folded in below. At the end you write three functions yourself, and the project's tests grade them.
#
# Needed: the packages of `requirements-dev.txt` (pytest among them); on Colab, clone the repository first and change into its folder. About two minutes: the training runs behind the curves were made beforehand, by [bugs.py](../benchmarks/bugs.py).

# %% [markdown] lang="zh"
# # 找出错误
#
# 公开代码里常见的八种错误，一次一种，放进 [`gspo.py`](../../RL_HAND/gspo/gspo.py)。没有一种会让程序崩溃。每一种都给出它对训练的影响（如果看得出来的话）和十来行代码：**哪一行错了？** 答案折叠在下方。最后请你自己写三个函数，由本项目的测试来评分。
#
# 需要：`requirements-dev.txt` 里的包（包括 pytest）；在 Colab 上请先克隆仓库并进入其目录。约两分钟：曲线背后的训练已由 [bugs.py](../../benchmarks/bugs.py) 事先跑好。

# %%
import contextlib, inspect, io, os, re, subprocess, sys, tempfile
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"  # no progress bars
PROJECT = next(at for at in [Path.cwd(), *Path.cwd().parents] if (at / "RL_HAND").is_dir())
sys.path += [str(PROJECT / "RL_HAND/gspo"), str(PROJECT / "benchmarks")]

import bugs
import gspo
import pandas as pd
import torch
from conftest import mutated_copy

table = pd.read_csv(bugs.TABLE)
print(table.groupby(["fault", "seed"]).ngroups, "runs by: python benchmarks/bugs.py; commit",
      *table.commit.unique(), "\nseeds", *table.seed.unique(), "with", *bugs.SETTINGS)

# %% [markdown] lang="en"
# How to read the figures: the mean of three seeds and their range, 25 steps each; metrics of the training itself are smoothed over seven steps, held-out accuracy is not, and the script as it should be measures it at temperature 1. Below each figure are numbered lines of the faulty script.
#
# ## 1. The accuracy hardly suffers
#
# But the gradient is more than ten times as large, from the first step on. **Which line?**

# %% [markdown] lang="zh"
# 图的读法：三个随机种子的均值与范围，各 25 步；训练过程中的指标按七步平滑，留出题的准确率未经平滑，由没有错误的脚本在温度 1 下测得。每张图下方是带行号的、有错误的脚本片段。
#
# ## 1. 准确率几乎没受影响
#
# 可是从第一步起，梯度就大了十倍以上。**是哪一行？**

# %%
bugs.show(1, "eval/accuracy", "ratio/mean", "grad_norm", before=2, count=11)

# %% [markdown] lang="en"
# <details><summary>Answer</summary>
#
# The division `/ length` is gone: the sum of an answer's log-ratios, where Eq. 7 has their mean. So the gradient is as many times larger as the answer has tokens, long answers outweigh short ones, and the ratio scatters the more the longer an answer is, though the range of 3e-4 is made for means: more is cut.
#
# Why does the accuracy hardly show it? MAX_GRAD_NORM and AdamW level the size of a gradient, and these answers have some twenty tokens. The ratio of an answer of a thousand tokens is e to the power of a sum of a thousand: next to 0, or huge. The number that shows it at any length is the ratio of two answers, a short and a long one, whose tokens have all changed alike: [its test](../tests/test_gspo_loss.py).
#
# </details>
#
# ## 2. A ratio of exactly 1
#
# Nothing is ever clipped, in no step of any seed, and it learns more slowly. Any other CLIP_RANGE would give this very curve. **Which line?**

# %% [markdown] lang="zh"
# <details><summary>答案</summary>
#
# 少了 `/ length`：公式 7 用的是各词元对数比率的均值，这里成了总和。于是梯度放大的倍数等于回答的词元数，长回答压过短回答；回答越长，比率越分散，而 3e-4 这个范围是为均值定的，被裁剪的也就更多。
#
# 为什么准确率几乎看不出来？MAX_GRAD_NORM 和 AdamW 抹平了梯度的大小，而且这里的回答只有二十来个词元。若有上千个词元，比率就是 e 的“上千项之和”次方：不是接近 0，就是大得离谱。在任何长度下都能看出问题的办法：取一长一短两个回答，让每个词元的变化都相同，再比较两者的比率，见[对应的测试](../../tests/test_gspo_loss.py)。
#
# </details>
#
# ## 2. 恰好等于 1 的比率
#
# 任何种子的任何一步都没有词元被裁剪，而且学得更慢。换成任何别的 CLIP_RANGE，曲线都一模一样。**是哪一行？**

# %%
bugs.show(2, "eval/accuracy", "ratio/mean", "clip_ratio/region_mean", before=3)

# %% [markdown] lang="en"
# <details><summary>Answer</summary>
#
# `for minibatch in [batch]`: one update per rollout, on all of it. In this update the policy still is the one that sampled, so every ratio is 1 and no clip can act. By itself that is no crime: it is the plain policy gradient, and it learns less from a rollout than the script's four updates do.
#
# But whoever compares GRPO, GSPO and a wider clip with such code compares nothing: what sets them apart begins with the second update. Look at the clip fraction before you look at the accuracy.
#
# </details>
#
# ## 3. Better in training than on held-out questions
#
# Overfitting? No: the two lines printed last are of the policy before any training. For answers that a policy has sampled itself, the mean of -log p *is* its entropy, but for chance. **Which lines?**

# %% [markdown] lang="zh"
# <details><summary>答案</summary>
#
# `for minibatch in [batch]`：每次采样只用全部数据更新一次。这次更新时，策略还是采样时的那个策略，所有比率都是 1，裁剪无从起作用。这本身并不算错：它就是最朴素的策略梯度，只是从一次采样里学到的比脚本的四次更新少。
#
# 但若用这样的代码比较 GRPO、GSPO 和更宽的裁剪范围，比的就是同一个东西：它们的差别从第二次更新才开始。看准确率之前，先看裁剪比例。
#
# </details>
#
# ## 3. 训练时比留出题上好
#
# 过拟合？不是：最后打印的两行来自训练之前的策略。对策略自己采样出的回答，-log p 的均值*就是*它的熵，只差随机误差。**是哪几行？**

# %%
bugs.show(3, "accuracy", "eval/accuracy", before=4)
with contextlib.redirect_stdout(io.StringIO()):
    run = gspo.start([*bugs.SETTINGS, f"OUTPUT_DIR={tempfile.mkdtemp()}/run"])
for name, fault in bugs.pair(3).items():
    script = bugs.script_with(fault)
    batch = script.sample_groups(run.policy, run.tokenizer, run.eval_rows, 4)
    sums = [values.sum() for values in script.score_tokens(run.policy, batch)]
    logps, entropy = torch.stack(sums) / batch.completion_mask.sum()
    print(f"{name:16} mean of -log p {-logps:.3f}, mean entropy {entropy:.3f}, nats per token")

# %% [markdown] lang="en"
# <details><summary>Answer</summary>
#
# `kept`: it draws from the 20 likeliest tokens at temperature 0.6, which is what the policy's generation_config.json says, and what a library's sampler does if you name no value of your own. Scored and trained are the log-probs at temperature 1 over all tokens, old and new alike. So ratios are 1 in the first update, and no metric of the loss complains.
#
# But the answers are not this policy's: it is rewarded for what it does when it is careful. The unlikely tokens that held-out sampling still draws are never drawn in training, hence never punished. (Greedy answers do not suffer, and if you decode greedily you may not care.) What shows it: -log p against the entropy, or both accuracies at one temperature.
#
# </details>
#
# ## 4. At first it learns faster
#
# Here the KL coefficient is held at 0.2, with the fault and without (ADAPTIVE_KL is off). **Which line?**

# %% [markdown] lang="zh"
# <details><summary>答案</summary>
#
# `kept`：这里从概率最大的 20 个词元中、以温度 0.6 抽样。策略自带的 generation_config.json 就是这么写的，调用采样库时若不亲自指定参数，用的就是这些值。而打分和训练用的是温度 1 下全部词元的对数概率，新旧都是。所以第一次更新的比率仍是 1，损失的任何指标都不报警。
#
# 但这些回答并不是这个策略的回答：得到奖励的是它“小心时”的表现。在留出题上采样仍会抽到的小概率词元，训练时从未出现，也就从未受罚。（贪心解码不受影响；如果只用贪心解码，也许无所谓。）能看出问题的是：-log p 与熵的对比，或者在同一温度下比较两个准确率。
#
# </details>
#
# ## 4. 起初学得更快
#
# 这里有错误和没有错误的两组都把 KL 系数固定在 0.2（关掉 ADAPTIVE_KL）。**是哪一行？**

# %%
bugs.show(4, "kl", "eval/accuracy", before=4)

# %% [markdown] lang="en"
# <details><summary>Answer</summary>
#
# `token_loss - kl_coef * kl`: being far from the start is rewarded. For some ten steps, away and better are one direction; then nothing is left that holds it, and away is all that counts. Losses have three terms here, with three signs: the policy's is negated, the KL is added, the entropy subtracted.
#
# What tells is the KL, long before the accuracy does. With ADAPTIVE_KL the coefficient would fall to 0.01 first, which hides the fault, and then grow with the KL, which pushes harder the farther it goes. (Not run here.)
#
# </details>
#
# ## 5. The same curves
#
# No difference but chance. Only the lengths of step 1, printed below, are odd: with one seed, step 1 samples the same answers whatever the fault (the sampler's own, the third, aside). **Why are they shorter by one token, and which line?**

# %% [markdown] lang="zh"
# <details><summary>答案</summary>
#
# `token_loss - kl_coef * kl`：离初始策略越远，奖励越高。头十步左右，“走远”与“变好”是同一个方向；之后再没有什么拉住它，只剩“走远”。这里的损失有三项、三个符号：策略项取负，KL 项相加，熵项相减。
#
# 最先露馅的是 KL，远早于准确率。若打开 ADAPTIVE_KL，系数会先降到 0.01，把错误藏起来，然后随 KL 增大，走得越远推得越狠。（这里没有跑。）
#
# </details>
#
# ## 5. 一样的曲线
#
# 除了随机误差看不出差别。只有下面打印的第 1 步长度不对劲：种子相同，第 1 步采样出的回答就相同，与错误无关（采样器本身出错的第三种除外）。**为什么短了一个词元？是哪一行？**

# %%
bugs.show(5, "completions/mean_length", "completions/clipped_ratio", "eval/accuracy", before=8)
for name, fault in bugs.pair(5).items():
    print(f"{name:16} step 1:", *table.query("fault == @fault and step == 1")["completions/mean_length"])

# %% [markdown] lang="en"
# <details><summary>Answer</summary>
#
# The mask is 0 at the end token. So the decision to stop is never trained: no reward reaches it, neither of a good end nor of an early one. Here it does no harm in 25 steps, since this policy has learned to stop before, and no reward hangs on it. Where answers should become shorter, or a base model has yet to learn to stop, nothing teaches it.
#
# The usual way to this fault is a mask made by comparing with the padding id: for many models padding *is* an end token (of Qwen3's two end ids the second is), and the mask eats both.
#
# </details>
#
# ## 6. The same accuracy
#
# But the gradient is larger. MICRO_BATCH says how many answers go through the model at a time. It may change memory and nothing else; the last lines vary it, on the same rollout. **Which line?**

# %% [markdown] lang="zh"
# <details><summary>答案</summary>
#
# 结束词元处的掩码成了 0。于是“停下来”这个决定从不受训练：停得好、停得早，都得不到奖励信号。在这里 25 步内无害，因为这个策略早已学会停，奖励也不取决于它。若要让回答变短，或者基座模型还没学会停，那就没有任何东西教它了。
#
# 这种错误最常见的来路，是用“不等于填充 id”来构造掩码：许多模型的填充词元*就是*结束词元（Qwen3 的两个结束 id 中，第二个就是），掩码把两者一起吃掉了。
#
# </details>
#
# ## 6. 一样的准确率
#
# 梯度却更大。MICRO_BATCH 是一次前向计算的回答个数，按理只影响显存；最后几行在同一批采样上改动它。**是哪一行？**

# %%
bugs.show(6, "eval/accuracy", "grad_norm", before=7)
STEP = ["MAX_STEPS=1", "EVAL_QUESTIONS=1"]
for name, fault in bugs.pair(6).items():
    norms = [bugs.metrics(fault, *STEP, f"MICRO_BATCH={n}").grad_norm[1].item() for n in (64, 24, 8)]
    print(f"{name:16} gradient's norm, micro-batches of 64, 24, 8:", *[round(x, 3) for x in norms])

# %% [markdown] lang="en"
# <details><summary>Answer</summary>
#
# `token_weights(micro.completion_mask)`: the weights of each micro-batch sum to 1, and the gradients add up, so they are too large by the number of micro-batches; where the parts are uneven, the answers in a smaller one weigh more. Right are weights made for the whole minibatch before it is split, `micro.weights`.
#
# AdamW divides by the size of past gradients, and MAX_GRAD_NORM cuts what is above 1: so no curve of the accuracy shows it, and such a fault can live for long. It shows where the weights within a minibatch depend on it more (a mean over tokens, as DAPO's, with answers of very unequal length), and to whoever finds that a setting for memory moves a gradient.
#
# </details>
#
# ## 7. What does a group teach in which all are right?
#
# Nothing: the advantages are 0. Here the verifier alone gives the reward, 0.9 for a right answer (1, say, less 0.1 for its form), advantages are divided by the std, and ADVANTAGE_EPSILON is 1e-8, with the fault and without. **What is wrong with these lines?** It is not to be seen until groups begin to be right as a whole.

# %% [markdown] lang="zh"
# <details><summary>答案</summary>
#
# `token_weights(micro.completion_mask)`：每个微批次的权重之和都是 1，梯度又相加，于是大了“微批次个数”倍；若各份大小不一，小的那份里的回答权重更大。正确的做法是在切分之前为整个小批次算好权重，即 `micro.weights`。
#
# AdamW 会除以以往梯度的大小，MAX_GRAD_NORM 会截掉超过 1 的部分，所以准确率曲线看不出来，这类错误可以潜伏很久。如果小批次内部的权重更依赖切分方式（例如 DAPO 那样对词元取平均，而回答长短悬殊），它就会显形；发现“一个只管显存的设置居然改变了梯度”的人，也会找到它。
#
# </details>
#
# ## 7. 全组都答对时，能学到什么？
#
# 什么也学不到：优势都是 0。这里只由验证器给奖励，答对得 0.9（比如满分 1，格式扣 0.1），优势除以标准差，ADVANTAGE_EPSILON 取 1e-8，有错误和没有错误的两组都是如此。**这几行哪里不对？** 要等到开始出现全组答对时，才看得出来。

# %%
bugs.show(7, "eval/accuracy", "grad_norm", before=5, count=6)
for name, fault in bugs.pair(7).items():
    advantages = bugs.script_with(fault).compute_advantages(0.9 * torch.ones(8 * 16))
    print(f"{name:16} a group whose answers all score 0.9: advantages {advantages.unique().tolist()}")

# %% [markdown] lang="en"
# <details><summary>Answer</summary>
#
# In the last line `.masked_fill(without_spread(groups), 0.0)` is missing. The float32 mean of eight times 0.9 is not 0.9, and what is left, a rounding error, is divided by a std of next to nothing and 1e-8: right answers are pushed *down*, by more than any wrong one is.
#
# Whether it strikes depends on the number: means of 1.0 and of 0.0 are exact, of 0.9, 0.7 or 0.3 they are not. That is why it is missed with rewards of 0 and 1. An epsilon of 1e-6 or 1e-4 makes it small, the mask makes it 0.
#
# </details>
#
# ## 8. Clipped before anything was learned
#
# In the first update after a rollout every ratio should be 1. The last lines make just that update. **Which line?**

# %% [markdown] lang="zh"
# <details><summary>答案</summary>
#
# 最后一行少了 `.masked_fill(without_spread(groups), 0.0)`。八个 0.9 的 float32 均值并不是 0.9，差出来的舍入误差再除以“几乎为零的标准差加 1e-8”：答对的回答反而被压*低*，力度比任何答错的都大。
#
# 会不会中招要看数字：1.0 和 0.0 的均值是精确的，0.9、0.7、0.3 则不是。所以奖励只有 0 和 1 时发现不了。epsilon 取 1e-6 或 1e-4 能让它变小，掩码则让它等于 0。
#
# </details>
#
# ## 8. 还没学，就被裁剪
#
# 采样之后的第一次更新，所有比率本应是 1。最后两行只做这一次更新。**是哪一行？**

# %%
bugs.show(8, "clip_ratio/region_mean", "eval/accuracy", before=2, count=4)
for name, fault in bugs.pair(8).items():
    one = bugs.metrics(fault, *STEP, "GSPO_EPOCHS=1", "MINIBATCH=128")
    print(f"{name:16} clipped in the first update: {one['clip_ratio/region_mean'][1]:.0%} of the tokens")

# %% [markdown] lang="en"
# <details><summary>Answer</summary>
#
# `.bfloat16()`: numbers near 10 have steps of 0.06 there, and log-probs near -1 of 0.008, while the clip range is 3e-4. What the sampler and the trainer say of the same token differs by rounding, the ratio is rounding, and a good part of the answers is thrown away for it. GRPO's range, 0.2, is wide enough to hide that. The accuracy may be a little lower; three seeds do not settle it.
#
# The script itself refuses to train so: `check_policy` compares log-probs at the start, and was switched off for these runs.
#
# </details>
#
# ## Your turn: three functions
#
# `grade` puts your function into a copy of the script and runs the project's own tests on it. Those below run, look plausible, and are wrong; what fails tells what is missed. `GROUP_SIZE`, `ADVANTAGE_TYPE`, `STD_CORRECTION` and the other constants may be used by name, and so may the script's other functions. The formulas are in the [first notebook](1_from_importance_sampling_to_gspo.ipynb).
#
# First the advantages: a group is GROUP_SIZE rewards in a row.

# %% [markdown] lang="zh"
# <details><summary>答案</summary>
#
# `.bfloat16()`：数值在 10 附近时，它的间隔是 0.06；对数概率在 -1 附近时是 0.008。而裁剪范围只有 3e-4。采样器与训练器对同一个词元给出的对数概率因舍入而不同，比率成了舍入误差，相当一部分回答因此被丢掉。GRPO 的范围是 0.2，宽得足以掩盖这一点。准确率也许略低，三个种子还不足以下结论。
#
# 脚本本身拒绝这样训练：`check_policy` 会在开始时核对对数概率，这些训练里把它关掉了。
#
# </details>
#
# ## 轮到你了：三个函数
#
# `grade` 把你的函数放进脚本的一份副本，再跑项目自己的测试。下面这三个能运行，看着也像回事，但都是错的；哪些测试不过，就说明漏了什么。`GROUP_SIZE`、`ADVANTAGE_TYPE`、`STD_CORRECTION` 等常量可以直接使用，脚本里的其他函数也可以。公式见[第一篇](1_from_importance_sampling_to_gspo.ipynb)。
#
# 先写优势：相邻的 GROUP_SIZE 个奖励是一组。

# %%
def grade(tests, *functions):
    """Run some of the project's tests on a copy of gspo.py that has these functions in it."""
    script, folder = bugs.SCRIPT, Path(tempfile.mkdtemp())
    for new in functions:
        script = mutated_copy(script, *map(inspect.getsource, (getattr(gspo, new.__name__), new)), folder)
    command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "--color=no", "-pno:cacheprovider",
               "tests/test_gspo_loss.py", "-k", tests]
    said = subprocess.run(command, cwd=PROJECT, env=os.environ | {"RL_HAND_SCRIPT": str(script)},
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
    print(said.splitlines()[-1], *dict.fromkeys(re.findall(r"FAILED .*?::(\w+)", said)), sep="\n  fails: ")


def compute_advantages(rewards):
    """Eq. 6's advantages of rewards (B,) or (B, K), or without the std: see ADVANTAGE_TYPE."""
    return (rewards - rewards.mean()) / (rewards.std() + ADVANTAGE_EPSILON)


grade("advantages or scores or spread or smallest", compute_advantages)

# %% [markdown] lang="en"
# Now the loss. This one is GRPO's, with a ratio for each token.

# %% [markdown] lang="zh"
# 再写损失。下面这个是 GRPO 的，每个词元一个比率。

# %%
def policy_loss(logps, old_logps, advantages, mask):
    """The clipped loss at each token, with GSPO's ratio of the whole answer; and statistics."""
    low, high = clip_range()
    ratio = torch.exp(logps - old_logps)
    loss = -torch.min(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    return loss, ratio_statistics(ratio.detach(), advantages, low, high)


grade("loss_and or ratio or clip or cut or token or first_step or huge", policy_loss)

# %% [markdown] lang="en"
# And the KL. The mean of this one is right. What about the mean of its gradient?

# %% [markdown] lang="zh"
# 最后是 KL。下面这个的均值是对的，但它的梯度的均值呢？

# %%
def kl_to_reference(logps, old_logps, ref_logps):
    """At each token a number whose mean is KL(pi || ref), and whose gradient's mean is the KL's."""
    return logps - ref_logps


grade("kl and not coefficient", kl_to_reference)

# %% [markdown] lang="en"
# <details><summary>Solutions</summary>
#
# `print(inspect.getsource(gspo.compute_advantages))`, and in the same way `gspo.policy_loss` and `gspo.kl_to_reference`: their docstrings say why they are as they are. Yours need not look alike; the tests decide.
#
# </details>
#
# With the script's own three functions all tests of the file pass:

# %% [markdown] lang="zh"
# <details><summary>解答</summary>
#
# `print(inspect.getsource(gspo.compute_advantages))`，`gspo.policy_loss` 和 `gspo.kl_to_reference` 同理：文档字符串里写着为什么这样写。你的写法不必相同，以测试为准。
#
# </details>
#
# 换上脚本自己的三个函数，这个文件里的测试全部通过：

# %%
grade("", gspo.compute_advantages, gspo.policy_loss, gspo.kl_to_reference)
