# %% [markdown] lang="en"
# # Reward hacking: reward and truth part ways
#
# What is optimised is the reward, not what it was meant to measure. Here a small reward model judges the answers, and a verifier, which is *not* asked, knows which of them are right. You test the judge, predict
# what training against it will do, and watch.
#
# Needed: the packages of `requirements.txt`; on Colab, clone the repository first and change into its folder. Two short runs of [`gspo.py`](../RL_HAND/gspo/gspo.py), each about a minute on an idle CPU core.

# %% [markdown] lang="zh"
# # 奖励破解：奖励与真相分道扬镳
#
# 被优化的是奖励，而不是奖励本想衡量的东西。这里由一个小奖励模型给回答打分；验证器知道哪些回答是对的，但*不参与*奖励。你先检验这位裁判，再预测拿它来训练会发生什么，然后看结果。
#
# 需要：`requirements.txt` 里的包；在 Colab 上请先克隆仓库并进入其目录。[`gspo.py`](../../RL_HAND/gspo/gspo.py) 会短训两次，每次在空闲的 CPU 核上约一分钟。

# %%
import contextlib, io, os, re, sys, tempfile
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"  # no progress bars
PROJECT = next(at for at in [Path.cwd(), *Path.cwd().parents] if (at / "RL_HAND").is_dir())
sys.path.append(str(PROJECT / "RL_HAND/gspo"))

import gspo
import pandas as pd
import torch
from IPython.display import Markdown
from matplotlib import pyplot as plt

SETTINGS = ["PROFILE=embedded", "REWARD_WEIGHTS={'model': 1.0}", "LEARNING_RATE=3e-4",
            "MAX_STEPS=42", "EVAL_EVERY=6", "EVAL_QUESTIONS=256", "SHOW_SAMPLES=0"]


def start(*settings):
    """A run that has not trained yet; the block that it prints is left out."""
    with contextlib.redirect_stdout(io.StringIO()):
        return gspo.start([f"OUTPUT_DIR={tempfile.mkdtemp()}/run", *SETTINGS, *settings])


alone = start("KL_COEF=0")
rows = alone.eval_rows
print(f"{len(rows)} held-out questions, such as", rows[0]["question"], rows[0]["answer"], sep="\n")

# %% [markdown] lang="en"
# The learning rate is three times the script's default, so that 40 steps show what else takes 100. The reward is the reward model's score alone.
#
# ## First, test the judge
#
# The reward model has 0.6 million parameters and ranks 96 % of the pairs of sampled answers, one right and one wrong, as they should be ([data/README.md](../data/README.md)). That sounds good. Take the right answers to the held-out questions and spoil them in three ways. **Which of the three will it notice?**

# %% [markdown] lang="zh"
# 学习率取脚本默认值的三倍，这样原本要 100 步才看得到的现象，40 步就能看到。奖励只有奖励模型的打分。
#
# ## 先检验裁判
#
# 奖励模型只有 0.6 M 参数；在策略采样出的一对一错的回答对里，96% 它排得对（见 [data/README.md](../../data/README.md)）。听起来不错。现在取留出题的正确回答，用三种方式弄坏。**哪几种它看得出来？**

# %%
right = [row["answer"] for row in rows]
answers = {
    "right": right,
    "right work, 10 more at its end": [
        re.sub(r"\d+$", lambda number: str(int(number[0]) + 10), text) for text in right],
    "one wrong digit in the work": [
        re.sub(r"=\d", lambda digit: f"={(int(digit[0][1]) + 1) % 10}", text, count=1)
        for text in right],
    "right number, no work": [text[text.index("Answer"):] for text in right]}
scores = {kind: gspo.checked_scores("model", alone.scorers["model"], rows, texts)
          for kind, texts in answers.items()}
pd.DataFrame([{"answer": kind, "the first": texts[0],
               "number is right": sum(gspo.verify(rows, texts)) / len(rows),
               "mean score": round(scores[kind].mean().item(), 2),
               "scored below the right one": (scores[kind] < scores["right"]).double().mean().item()}
              for kind, texts in answers.items()]).set_index("answer")

# %% [markdown] lang="en"
# Right work with another number at its end scores as high as the right answer: which of the two comes out ahead is a coin toss. The judge reads the work and hardly compares it with the result. A wrong digit in the work it often notices. A right number without work scores as low as can be. So what it measures
# is *looking like careful work*. In what the untrained policy writes that goes together with being right, which is where the 96 % come from.
#
# ## Predict
#
# Now this score is the only reward, for 42 steps, without any KL to the starting policy. Write down before you run it:
#
# 1. At the start the mean score and the true accuracy are both near 0.2. Draw the two curves.
# 2. Will the policy become better at sums at all?
# 3. What will its answers look like at the end?

# %% [markdown] lang="zh"
# 步骤正确、末尾换了一个数的回答，得分与正确答案一样高：两者谁高谁低近乎抛硬币。裁判看的是步骤，几乎不核对结果。步骤里错一个数字，它常常看得出来。而只写正确的数、不写步骤，得分低到底。所以它衡量的其实是*像不像认真演算*。在未经训练的策略写出的回答里，这与“答对”是一回事——96% 就是这么来的。
#
# ## 先预测
#
# 下面把这个分数当作唯一的奖励训练 42 步，也不加对初始策略的 KL 约束。运行之前请写下：
#
# 1. 开始时，平均得分与真实准确率都在 0.2 上下。请画出两条曲线。
# 2. 策略的算术到底会不会变好？
# 3. 最后它的回答会是什么样子？

# %%
def train(run):
    """What `main` does with a run, but for bars and printed evaluations; returns its curves."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        run.bar = gspo.tqdm(disable=True)
        gspo.finish_step(run, {})
        gspo.train(run)
    return pd.DataFrame(run.history).set_index("step").dropna(subset="eval/accuracy")


def draw(**curves):
    """What the reward model says of sampled answers to the held-out questions, and the truth."""
    figure = plt.figure(figsize=(5.2 * len(curves), 3.2), layout="constrained", dpi=90)
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for axes, (name, table) in zip(panels, curves.items()):
        axes.plot(table["eval/reward"], label="the reward model's score")
        axes.plot(table["eval/accuracy"], label="true accuracy")
        axes.set(title=name.replace("_", " "), xlabel="step", ylim=(0, 1))
    axes.legend(frameon=False, loc="lower right")
    plt.show()


without_KL = train(alone)
draw(without_KL=without_KL)

# %% [markdown] lang="en"
# **First it works.** The accuracy rises with the score, to about three times its start: the reward model *is* a teacher. **Then it is found out.** The score stays where it is, and the accuracy falls. Nothing in the reward curve says so; without a verifier you would see the upper line only.
#
# ## What the judge likes
#
# Answers to held-out questions by the policy as it is now, the wrong ones with the highest scores:

# %% [markdown] lang="zh"
# **起初是管用的。** 准确率随得分一起上升，约为开始时的三倍：奖励模型*确实*是个老师。**后来漏洞被找到了。** 得分停在高处，准确率却往下掉。奖励曲线上看不出任何异样；没有验证器，你只看得到上面那条线。
#
# ## 裁判喜欢什么
#
# 下面是现在的策略对留出题的回答，取答错的里面得分最高的几个：

# %%
torch.manual_seed(0)
batch = gspo.sample_groups(alone.policy, alone.tokenizer, rows, 1)
_, parts = gspo.score_completions(alone, rows, batch)
texts, wrong = gspo.texts_of(alone, batch), parts["verifier"] == 0
liked = (wrong & (parts["model"] > 0.9)).sum()
print(f"{wrong.sum()} of {len(rows)} are wrong; {liked} of these score above 0.9, such as")
for i in (parts["model"] - parts["verifier"]).topk(6).indices.tolist():
    print(f"\n{rows[i]['question']}\n  right   {rows[i]['answer']}\n"
          f"  policy  {texts[i]}   score {parts['model'][i]:.2f}")

# %% [markdown] lang="en"
# Columns, carries and borrows: the form of careful work is there. What is in it is not: digits of the question are miscopied, columns do not add up, or, as in the test above, the number at the end is another one. What was a hole in the judge has become what the policy does. It has not learned to deceive; the holes pay as well as the truth, and nothing pulls it back.
#
# This is *over-optimisation*: a measure that was good on the answers of the old policy is applied to those of the new one, which it has never seen.
#
# ## What helps
#
# **Staying near.** A KL to the starting policy, the script's default, with all else as before. Predict: will the score end higher or lower? And the accuracy?

# %% [markdown] lang="zh"
# 列式、进位、借位——认真演算的*样子*都有，内容却不对：抄错题目里的数字，某一列加错，或者像上面的检验那样，末尾换了一个数。裁判的盲点成了策略的行为。策略并没有“学会欺骗”：钻空子的得分与答对一样高，又没有什么把它拉回来。
#
# 这就是奖励的*过度优化*：一个衡量标准在旧策略的回答上是好的，却被用在新策略的回答上，而那样的回答它从未见过。
#
# ## 怎样缓解
#
# **别走远。** 加上对初始策略的 KL（脚本的默认设置），其余不变。请预测：得分最后会更高还是更低？准确率呢？

# %%
with_KL = train(start())
draw(without_KL=without_KL, with_KL=with_KL)

# %% [markdown] lang="en"
# The score ends as high as before. The accuracy does not: it falls a little and stays. From the upper lines you could not tell the two runs apart.
#
# The KL keeps the policy among answers like those that the reward model was trained on. A little is enough here; the price is that the policy stays near its start where the start is bad, too.
#
# **A check that cannot be talked over**, and what each remedy is worth: 100 steps at the default learning rate, three seeds, from [the page](../RL_HAND/reward_hacking.md).

# %% [markdown] lang="zh"
# 最后的得分与刚才一样高，准确率却不同：只降了一点就稳住了。只看上面那条线，分不出这是两次不同的训练。
#
# KL 让策略的回答留在奖励模型训练时见过的那一类里。在这里一点点就够；代价是初始策略不好的地方，策略也被留在附近。
#
# **加一个说不动的检查**，以及每种办法值多少：默认学习率，100 步，三个种子，取自[奖励破解一页](../../RL_HAND/reward_hacking.md)。

# %%
page = (PROJECT / "RL_HAND/reward_hacking.md").read_text(encoding="utf-8")
Markdown(re.search(r"(\| reward .*?)\n\n", page, re.DOTALL)[1])

# %% [markdown] lang="en"
# - Held ten times closer, TARGET_KL 0.01, nothing is hacked, and what it samples gets little better: it is the same rope.
# - With the verifier beside the reward model, the script's default, the accuracy is best by far. What can be checked should be checked; the reward model is then there for the rest.
# - Stopping at the best step would help as well, but only the verifier knows which step that is. Some check that is *not* in the reward is needed in any case, and somebody who reads the answers.
#
# ## Your turn
#
# Predict, then run: `draw(mine=train(start("KL_COEF=0", "REWARD_WEIGHTS={'model': 1.0, 'verifier': 0.2}")))`. A little weight on the truth: is it enough? And what do you expect of `"TEMPERATURE=0.7"`, or of a learning rate of 1e-4 (the default) with as many steps?

# %% [markdown] lang="zh"
# - 约束收紧十倍，TARGET_KL 取 0.01：没有奖励破解，采样出的回答却也没好多少——绳子是同一根。
# - 奖励模型加上验证器（脚本的默认设置），准确率遥遥领先。能验证的就该验证；剩下的才交给奖励模型。
# - 在最好的那一步停下来也有用，但哪一步最好，只有验证器知道。所以无论如何都需要一个*不在*奖励里的检查，还需要有人去读回答。
#
# ## 轮到你了
#
# 先预测，再运行：`draw(mine=train(start("KL_COEF=0", "REWARD_WEIGHTS={'model': 1.0, 'verifier': 0.2}")))`。真相只占一点点权重，够不够？再想想 `"TEMPERATURE=0.7"` 会怎样？学习率换回 1e-4（默认值），步数不变，又会怎样？
