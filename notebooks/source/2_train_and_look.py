# %% [markdown] lang="en"
# # Thirty steps of GSPO, before your eyes
#
# [`gspo.py`](../RL_HAND/gspo/gspo.py) is run here as it is, for thirty steps, on one CPU core: a policy of half a million parameters learns to get sums right from nothing but a reward. Then
# one constant is changed, you say first what that will do, and both runs are laid over each other. Where the formulas come from is in the
# [first notebook](1_from_importance_sampling_to_gspo.ipynb).
#
# It needs this repository, `pip install -r requirements.txt` and Jupyter. Each of the two runs takes about 40 seconds.
# %% [markdown] lang="zh"
# # 亲眼看 GSPO 训练三十步
#
# 本篇原样运行 [`gspo.py`](../../RL_HAND/gspo/gspo.py)：三十步，一个 CPU 核，五十万参数的小模型只凭奖励学会做加减法。然后只改一个常量——请你先预测会发生什么——再把两次训练画在同一张图里。
# 公式的来历见[第一篇](1_from_importance_sampling_to_gspo.ipynb)。
#
# 需要本仓库、`pip install -r requirements.txt` 和 Jupyter。两次训练各约 40 秒。
# %% [markdown] lang="en"
# ## The run
#
# What `main` of the script does, less the progress bar and the handling of Ctrl-C: `start` goes from NAME=VALUE settings to a run (constants, data, models, a folder), `finish_step` evaluates what there is
# before training, `train` is [the algorithm](../RL_HAND/gspo/gspo.py). Settings are those of the command line.
# %% [markdown] lang="zh"
# ## 训练
#
# 下面就是脚本里 `main` 做的事，只是没有进度条，也不处理 Ctrl-C：`start` 由 NAME=VALUE 形式的设置建立一次训练（常量、数据、模型、输出目录），`finish_step` 先评测训练前的策略，`train` 就是[算法本身](../../RL_HAND/gspo/gspo.py)。设置的写法与命令行相同。
# %%
import contextlib, io, sys, tempfile
from pathlib import Path

project = next(at for at in [Path.cwd(), *Path.cwd().parents] if (at / "RL_HAND").is_dir())
sys.path += [str(project / "RL_HAND" / name) for name in (".", "gspo")]
import compare, gspo, torch, matplotlib.pyplot as plt, pandas as pd
from PIL import Image

folder = tempfile.mkdtemp()

def trained(name, *settings):
    """A run of thirty steps, in a temporary folder."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run = gspo.start([f"OUTPUT_DIR={folder}/{name}", "PROFILE=embedded", "MAX_STEPS=30",
                          "EVAL_QUESTIONS=256", "SHOW_SAMPLES=2", *settings])
    print(printed.getvalue().replace(folder, "..."))
    run.bar = gspo.tqdm(disable=True)
    gspo.finish_step(run, {})  # what there is before training
    gspo.train(run)
    return run

first = trained("first")
# %% [markdown] lang="en"
# At step 0 the policy often guesses ("Answer: 764"), though it can write the columns of a sum out. Greedy decoding is far better than sampling: the ability is there, the habit is not. Held-out questions are never trained on, so what rises is more than memory.
#
# Look at the second sample: if the answer is wrong but its work is written out, the reward model likes it nearly as much as a right one. Only the verifier knows. What becomes of that when the verifier is missing
# is the [fourth notebook](4_reward_hacking.ipynb).
#
# ## One question, eight answers, before and after
#
# The KL term needs a frozen copy of the policy as it started, the reference. So both are still here. The same question, the same random numbers:
# %% [markdown] lang="zh"
# 第 0 步时策略常常在猜（“Answer: 764”），其实竖式它会写。贪心解码远好于采样——能力是有的，习惯还没有。评测用的题目从不参与训练，所以上升的不只是记忆。
#
# 看第二个样本：答案错了、但步骤写得齐全时，奖励模型给的分几乎和正确答案一样高，只有验证器知道对错。如果没有验证器会怎样，见[第四篇](4_reward_hacking.ipynb)。
#
# ## 同一道题，八个回答：训练前与训练后
#
# KL 项需要一份冻结的初始策略，即参考策略，所以两个模型现在都在手边。同一道题，同样的随机数：
# %%
def answers(model, row):
    """A group's answers to a question, with the reward and the advantage of each."""
    torch.manual_seed(0)
    batch = gspo.sample_groups(model, first.tokenizer, [row], gspo.GROUP_SIZE)
    rewards, parts = gspo.score_completions(first, [row], batch)
    print(row["question"])
    for text, right, reward, advantage in zip(gspo.texts_of(first, batch), parts["verifier"],
                                              rewards, gspo.compute_advantages(rewards)):
        print(f"  {'x ' if right else '  '}reward {reward:4.2f}, advantage {advantage:+5.2f}  {text}")

for model in (first.reference, first.policy):
    answers(model, first.eval_rows[5])
# %% [markdown] lang="en"
# (x: right.) An advantage is relative to the group. As long as some answers are wrong, the right ones stand out, and their tokens are made likelier; in a group in which all is right there is next to nothing left to push. Try
# other questions: `answers(first.policy, first.eval_rows[7])`.
#
# ## The plot
#
# The script draws it into the run's folder at each evaluation; what each name means is in [constants.md](../RL_HAND/constants.md).
# %% [markdown] lang="zh"
# （x 表示答对。）优势是相对于本组而言的。只要组里有错的，正确的回答就显得突出，其 token 被推高；等到全组都答对，就几乎没有什么可推的了。换几道题试试：`answers(first.policy, first.eval_rows[7])`。
#
# ## 训练曲线
#
# 每次评测时脚本都会把这张图画进输出目录；各个名称的含义见 [constants.md](../../RL_HAND/constants.md)。
# %%
Image.open(first.folder / "training_metrics.png").convert("RGB").quantize(32)
# %% [markdown] lang="en"
# Three things to see:
#
# - **Policy loss** hardly moves and says nothing: advantages have mean zero and ratios are near 1, so it is near 0 whatever is learned. Reward and accuracy tell.
# - **Clip fraction**: at first more than half of all tokens have no policy gradient, and it learns all the same.
# - **KL coefficient**: it falls to its lower end, because the KL stays far below TARGET_KL: in these thirty steps hardly anything but the clip holds the policy back.
#
# ## Predict
#
# The paper's range for the sequence ratio is 3e-4 below and 4e-4 above 1. Below it becomes GRPO's, 0.2; the seed and all else stay. Write down, before you run it:
#
# 1. Which share of tokens will be cut?
# 2. Will it learn faster, slower, or as fast?
# 3. Both runs begin with the same policy and random numbers. What is the first thing to differ: the rewards of step 1, the updates of step 1, or later?
# %% [markdown] lang="zh"
# 图里有三点值得看：
#
# - **策略损失（Policy loss）** 几乎不动，也说明不了什么：优势的均值为零，比率又接近 1，无论学到多少它都在 0 附近。要看的是奖励和准确率。
# - **裁剪比例（Clip fraction）**：起初超过一半的 token 没有策略梯度，照样在学。
# - **KL 系数**：一路降到下限，因为 KL 远低于 TARGET_KL。也就是说，这三十步里约束策略的几乎只有裁剪。
#
# ## 先预测
#
# 论文给序列级比率的裁剪范围是 1 以下 3e-4、1 以上 4e-4。下面把它换成 GRPO 的 0.2，随机种子和其他一切不变。运行之前，请写下你的答案：
#
# 1. 会有多大比例的 token 被裁剪？
# 2. 学得更快、更慢，还是一样快？
# 3. 两次训练的初始策略和随机数都相同。最先出现差别的是什么：第 1 步的奖励，第 1 步里的参数更新，还是更晚？
# %%
CHANGE = ["CLIP_RANGE=0.2"]  # yours to change
second = trained("second", *CHANGE, "SHOW_SAMPLES=0")
# %%
NAMES = {"as in the file": first, " ".join(CHANGE): second}
table = pd.concat(pd.DataFrame(run.history).assign(algorithm=name, folder=name)
                  for name, run in NAMES.items())
figure, panels = plt.subplots(1, 4, figsize=(15, 3.4), layout="constrained", dpi=80)
for axes, metric in zip(panels, ("eval/accuracy", "clip_ratio/region_mean", "grad_norm", "kl")):
    compare.curves(axes, table, "step", metric)
    axes.set(title=metric, xlabel="step")
panels[0].legend(panels[0].lines, NAMES, frameon=False)
plt.show()
table[table.step.isin([1, 2, 3])].pivot(
    index="step", columns="algorithm", values=["reward", "clip_ratio/region_mean", "grad_norm"])
# %% [markdown] lang="en"
# The curves are drawn by [`compare.py`](../RL_HAND/compare.py), smoothed over seven steps (the accuracy is not); the table is not smoothed. What they say for 0.2:
#
# 1. Next to nothing is cut: the mean over an answer's tokens rarely leaves 1 ± 0.2. There is no working clip.
# 2. Faster. Nothing is thrown away, so the gradients are about twice as large, and at first the KL to the start grows more than twice as fast. The narrow range costs speed here. What it buys, a run that goes well cannot show; see below.
# 3. The rewards of step 1 are equal to the last digit, since the same policy drew the same answers. The *first* of its four updates is equal as well: nothing has moved, every ratio is exactly 1 and inside any range. From the second update on
#    the clip acts, and the gradients of step 1, a mean over its updates, differ.
#
# One seed each: enough to see a factor of two, not a difference of 0.02. [GSPO's page](../RL_HAND/gspo/README.md#clipping-the-papers-range-against-02) has this comparison with three seeds and 100 steps: there both end in the same place, within noise.
#
# ## Your turn
#
# Set CHANGE to one of these, predict, and run the last two cells again:
#
# - `["MINIBATCH=128", "GSPO_EPOCHS=1"]`: one update per rollout. Which share of tokens is cut? (It follows from the third answer above.)
# - `["LEARNING_RATE=3e-4"]` and `["LEARNING_RATE=3e-4", "CLIP_RANGE=0.2"]`: three times the default. Which of the two goes on rising, and which falls back after ten steps?
# - `["LEARNING_RATE=1e-3"]`: ten times. Does the narrow range hold it now? (A clip takes a gradient away. It does not take back a step that was too long.)
# %% [markdown] lang="zh"
# 曲线由 [`compare.py`](../../RL_HAND/compare.py) 绘制，按七步平滑（准确率除外）；表格未经平滑。换成 0.2 之后：
#
# 1. 几乎什么都没有被裁剪：对一个回答的所有 token 取平均以后，比率很少超出 1 ± 0.2，裁剪形同虚设。
# 2. 更快。没有梯度被丢掉，所以梯度大约是原来的两倍，起初对初始策略的 KL 也以两倍以上的速度增长。在这里，窄范围的代价是速度。它换来的是什么，一次顺利的训练看不出来；见下文。
# 3. 第 1 步的奖励分毫不差，因为同一个策略抽出了同样的回答。第 1 步共有四次更新，*第一次*也完全相同：策略还没有动，所有比率恰好是 1，落在任何范围之内。从第二次更新起裁剪才起作用，所以第 1 步的梯度范数（各次更新的平均）已经不同。
#
# 这里每种设置只有一个随机种子：两倍的差别看得出来，0.02 的差别看不出来。[GSPO 的页面](../../RL_HAND/gspo/README.md#clipping-the-papers-range-against-02)上有同一比较的三个种子、100 步的结果：最终两者相同，差别在噪声之内。
#
# ## 轮到你了
#
# 把 CHANGE 改成下面之一，先预测，再重新运行最后两个代码单元：
#
# - `["MINIBATCH=128", "GSPO_EPOCHS=1"]`：每次采样只更新一次。多大比例的 token 会被裁剪？（可由上面第 3 条推出。）
# - `["LEARNING_RATE=3e-4"]` 与 `["LEARNING_RATE=3e-4", "CLIP_RANGE=0.2"]`：默认值的三倍。两者之中，哪一个继续上升，哪一个十步之后掉了下去？
# - `["LEARNING_RATE=1e-3"]`：十倍。这时窄范围还稳得住吗？（裁剪能拿走梯度，却收不回已经迈得太大的一步。）
