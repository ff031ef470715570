# %% [markdown] lang="en"
# # Experts and routing replay
#
# In a mixture of experts each layer has many small networks, and a router chooses for each token which few of them it goes through. The choice is a step: a rounding error or one update can tip it, and then the token's probability jumps. This notebook follows one token through the layers, counts such changes, and plays a recorded choice back: *routing replay*, R2 and R3.
#
# The script is [`moe.py`](../RL_HAND/moe/README.md); `benchmarks/routing.py` calls its functions as the measurements of that page do. Here is one rollout of it, on one CPU core, in about half a minute. What ratios and clipping are is in the [first notebook](1_from_importance_sampling_to_gspo.ipynb).
#
# It needs this repository, `pip install -r requirements.txt` and Jupyter.
# %% [markdown] lang="zh"
# # 混合专家与路由回放
#
# 混合专家（MoE）模型的每一层有许多小网络，称为专家；路由器为每个 token 选出其中几个来处理它。这个选择是跳变的：一点舍入误差、一次更新，就可能让它翻到另一边，token 的概率随之一跳。本篇跟着一个 token 逐层走一遍，数一数这样的变化有多少，再把记录下来的选择回放出来：这就是*路由回放*，R2 和 R3。
#
# 用到的脚本是 [`moe.py`](../../RL_HAND/moe/README.md)；`benchmarks/routing.py` 调用它的函数，做法与该页面上的测量相同。这里只用其中一次采样，单核 CPU 大约半分钟。比率和裁剪是什么，见[第一篇](1_from_importance_sampling_to_gspo.ipynb)。
#
# 需要本仓库、`pip install -r requirements.txt` 和 Jupyter。
# %%
import contextlib, copy, functools, inspect, io, itertools, re, sys
from pathlib import Path

project = next(at for at in [Path.cwd(), *Path.cwd().parents] if (at / "RL_HAND").is_dir())
sys.path.append(str(project / "benchmarks"))
import routing, torch, matplotlib.pyplot as plt

def start(*constants):  # the script as a module, a run before its first step, a rollout
    with contextlib.redirect_stderr(io.StringIO()):  # no progress bars
        return routing.start("moe", 0, *constants)

moe, run, batch, right = start("RATIO=token")
mask, score = batch.completion_mask.bool(), functools.partial(routing.scored, moe)
print(*map(repr, moe.texts_of(run, batch)[:3]), f"{len(mask)} answers, {right:.1%} right", sep="\n")
# %% [markdown] lang="en"
# ## 1. One token's way
#
# This policy has 8 layers with 32 experts each. A router is one linear layer: it gives a token a score for every expert, by a softmax. The token goes through the 2 experts with the highest scores, and their outputs are added up, weighted by those two scores, made to sum to 1.
#
# Two *engines* run it, as in large systems: the **sampler** (there: an inference engine) draws the answers, the **trainer** computes the log-probs that the loss needs. They have the same weights. The sampler computes in bfloat16, the trainer in float32.
#
# We follow one token, which will turn out to be of interest. Left: what the router of one layer says of it. Right: the experts that it takes in the trainer, layer by layer. The greyer a field, the more tokens go there.
# %% [markdown] lang="zh"
# ## 1. 一个 token 走过的路
#
# 这个策略有 8 层，每层 32 个专家。路由器就是一个线性层：用 softmax 给 token 在每个专家上打一个分。token 通过得分最高的 2 个专家，它们的输出按这两个分数（归一化到和为 1）加权相加。
#
# 和大型系统一样，这里有两个*引擎*：**采样端**（大型系统里是推理引擎）生成回答，**训练端**（训练引擎）计算损失要用的对数概率。两边权重相同，只是采样端用 bfloat16 计算，训练端用 float32。
#
# 我们跟踪一个 token，后面会看到它为什么有意思。左图：某一层的路由器给它的打分。右图：它在训练端逐层经过的专家。格子越深，去那里的 token 越多。
# %%
batch.old_logps, batch.old_routes = score(run.policy, batch)  # the trainer's
changed = moe.changed_routers(batch, batch.routes, batch.old_routes) * mask[..., None]  # (B, T, layers)
i, t = divmod(int(changed.sum(2).argmax()), mask.shape[1])  # an answer, and a token of it
layer, use = int(changed[i, t].argmax()), moe.expert_load(batch, batch.completion_mask, run.experts)
ids = torch.cat([batch.prompt_ids[i][batch.prompt_mask[i] > 0], batch.completion_ids[i, :t]])
scores = run.policy(ids[None], output_router_logits=True).router_logits[layer][-1].softmax(-1).detach()

def way(axis, **tapes):  # of the token through the layers
    axis.pcolormesh(range(run.experts), range(1, len(use) + 1), use, cmap="Greys", vmax=0.2)
    for mark, (name, tape) in zip(("C3x", "C0o"), tapes.items()):
        axis.plot(moe.at_answers(batch, tape)[i, t], range(1, len(use) + 1), mark, ms=9, mfc="none", label=[name, "_"])
    axis.set(xlabel="expert", ylabel="layer", ylim=(len(use) + 0.5, 0.5))
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)

left, axis = plt.subplots(1, 2, figsize=(12, 3), layout="constrained", width_ratios=(2, 3))[1]
left.bar(range(run.experts), scores)
left.set(xlabel="expert", ylabel=f"score in layer {layer + 1}")
way(axis, trainer=batch.old_routes)
print(repr(run.tokenizer.decode(ids)), "\nbest scores:", *map("{:.4f}".format, scores.topk(4)[0]))
# %% [markdown] lang="en"
# Only the highest two bars count, whatever the third is: here it is nearly as high as the second. On the right no column and no field has all the tokens: when this policy was made, a balancing loss saw to that.
#
# ## 2. The same weights, in two precisions
#
# A bfloat16 has eight significant bits, so each number is off by up to 1 in 500. What its routers chose while the answers were drawn is in `batch.routes`.
#
# **Predict first:** in how many of all routers, one per token and layer, does the trainer take another pair of experts than the sampler did? What share of the tokens has at least one such layer among its eight? Which layers change most?
# %% [markdown] lang="zh"
# 只有最高的两根柱子算数，第三根多高都没用：这里它与第二根几乎一样高。右图里没有哪一列、哪一格包揽所有 token：训练出这个策略时用了负载均衡损失。
#
# ## 2. 同样的权重，两种精度
#
# bfloat16 只有八位有效二进制数字，每个数的误差可达 500 分之一。采样时路由器选了哪些专家，记在 `batch.routes` 里。
#
# **先猜一猜**：每个 token 在每一层各有一次路由。训练端选出的两个专家与采样端不同的，占全部路由的多少？八层里至少有一层不同的 token 占多少？哪些层变得最多？
# %%
def count(one, other, log_ratio):  # where two tapes differ, and how far log-probs are apart there
    differ, size = moe.changed_routers(batch, one, other)[mask], log_ratio[mask].abs()  # (n, layers); (n,)
    later, some = differ.cumsum(1) - differ > 0, differ.any(1)
    print(f"{differ.mean():.1%} of routers, {some.float().mean():.1%} of tokens")
    print("by layer:", *map("{:.1%}".format, differ.mean(0)), sep="  ")
    print(f"if an earlier layer has changed {differ[later].mean():.1%}, else {differ[~later].mean():.1%}")
    for name, some in ("changed tokens:", some), ("other tokens:  ", ~some):
        print(name, "|log-ratio| of median {:.4f}, mean {:.4f}, at most {:.2f}".format(
            size[some].median(), size[some].mean(), size[some].max()))

count(batch.routes, batch.old_routes, batch.old_logps - batch.sampled_logps)
print("our token's log-ratio: {:.4f}".format((batch.old_logps - batch.sampled_logps)[i, t]))
way(plt.figure(figsize=(8, 3)).add_subplot(), trainer=batch.old_routes, sampler=batch.routes)
# %% [markdown] lang="en"
# - A single router rarely changes, about twice in a hundred times. But a token has eight, and one is enough: about one token in seven is affected. (Independent changes would give $1 - (1 - p)^8$, a little more: they come in company.)
# - **Deeper layers change more**, by and large. If an earlier layer of the same token has changed, a router is several times as likely to change: the other expert's output is in all that comes after it. And if none has, rounding errors have had more layers to add up, and other tokens' changes come in by attention.
# - Our token was tipped in layer 2, where two scores were nearly the same, and went other ways in four more layers. Yet its log-prob stayed where it was. So it is with more than half of the changed tokens. But some jump: the mean of their log-ratio's size is several times that of the others, and the largest makes a ratio far beyond GRPO's range of 0.2, although the policy is the *same*.
# %% [markdown] lang="zh"
# - 单看一次路由，变化很少见，一百次里大约两次。但一个 token 有八次，变一次就够了：大约每七个 token 就有一个受影响。（若各次变化相互独立，应为 $1 - (1 - p)^8$，比这略多：变化喜欢扎堆。）
# - 总的来说，**越深的层变得越多**。同一个 token 在前面某层变过之后，再变的可能性是平时的好几倍：换了专家，其输出就混进了之后的一切。即使前面没有变过，舍入误差也累积了更多层，别的 token 的变化还会通过注意力传进来。
# - 我们的 token 在第 2 层被推了过去，那里有两个分数几乎相同；此后又有四层走了别的路。它的对数概率却几乎没动。变了的 token 有一半以上都是这样。但有一些会猛跳：它们对数比率的平均大小是其余 token 的好几倍，最大的那个换成比率，已远远超出 GRPO 的范围 0.2，而策略还是*同一个*。
# %% [markdown] lang="en"
# ## 3. One update
#
# Now the trainer against itself: one optimiser step of GRPO on 64 of the answers, at the script's learning rate for small models.
#
# **Predict first:** does one update change more routers than bfloat16 does, or fewer?
# %% [markdown] lang="zh"
# ## 3. 更新一次
#
# 现在让训练端和它自己比：用 GRPO 在其中 64 个回答上更新一步，学习率取脚本给小模型的默认值。
#
# **先猜一猜**：一次更新改变的路由，比 bfloat16 多还是少？
# %%
weights = copy.deepcopy(run.policy.state_dict())

def restart(rate=moe.LEARNING_RATE):  # the policy as it was; returns minibatches to update it with
    run.policy.load_state_dict(weights)
    run.trained["policy"] = run.policy, moe.new_optimizer(run.policy, rate)
    torch.manual_seed(0)
    return moe.minibatches(batch, passes=4)

routing.update(moe, run, next(restart()), None)
logps, routes = score(run.policy, batch)
count(batch.old_routes, routes, logps - batch.old_logps)
# %% [markdown] lang="en"
# About as many, and again more of them deep down. These log-ratios are what PPO, GRPO and GSPO clip. Now they hold two things at once: what was learned, which is wanted (here the largest of all is of a token without a change), and jumps to other experts, which are noise. To tell the two apart, one has to hold the experts fixed.
#
# ## 4. The tape
#
# That is all that routing replay is: write down which experts were taken, and take the same ones again. A hook on each router calls the first function here. `own` is written; `play`, if there is one, is taken. `where` says which answer and which place each token of this pass is.
# %% [markdown] lang="zh"
# 差不多，而且同样是深层居多。PPO、GRPO、GSPO 裁剪的正是这些对数比率。现在它们混着两样东西：学到的，这是我们要的（这里最大的一个就来自没有换专家的 token）；跳到别的专家，这是噪声。要分开两者，就得把专家固定住。
#
# ## 4. 记录与回放
#
# 路由回放做的仅此一件事：记下经过了哪些专家，下次仍走这些专家。每个路由器上的钩子（hook）会调用下面第一个函数。`own` 是写下的记录；如果有 `play`，就照它走。`where` 指明这次前向计算里的每个 token 属于哪个回答、在哪个位置。
# %%
for function in (moe.Tape.route, moe.scores_of):  # less their docstrings
    print(re.sub(r' *""".*?"""\n', "", inspect.getsource(function), flags=re.S))
# %% [markdown] lang="en"
# Only *which* experts is replayed. Their weights are today's scores on that set, so the router is still trained.
#
# **Predict first:** the trainer takes the sampler's experts, for prompts and answers. How much of the distance between the engines is left? The *engine KL* is the KL from sampler to trainer per token, estimated over the sampler's tokens.
# %% [markdown] lang="zh"
# 回放的只是走*哪些*专家。它们的权重仍由当前的分数在这个集合上算出，所以路由器照样能训练。
#
# **先猜一猜**：让训练端走采样端的专家，提示和回答都照走。两个引擎之间的距离还剩多少？这里的*引擎 KL* 是采样端到训练端的 KL，按 token 计，用采样端采到的 token 估计。
# %%
def apart(name, run, batch, played=None):  # how far sampler and trainer are apart
    found = routing.distance(batch, score(run.policy, batch, played)[0])
    print(name, "engine KL {engine_kl:.1e}, beyond 2: {extreme:.2%}, largest ratio {largest:.6g}".format(**found))
    return found["engine_kl"]

restart()
for name, tape in ("free:  ", None), ("played:", batch.routes):
    apart(name, run, batch, tape)
# %% [markdown] lang="en"
# About nine tenths are gone. (Beyond 2 are tokens whose ratio is above 2 or below 1/2.) What is left is the rounding of everything else, as a dense model has it, too.
#
# A tape can also ask questions. Back to our token: let the trainer route by itself, but for *one* router, in the layer of the bars, which must take the sampler's pair for this one token. What do the deeper layers choose then?
#
# **Predict first:** do they go the sampler's way?
# %% [markdown] lang="zh"
# 去掉了大约十分之九。（“beyond 2” 指比率大于 2 或小于 1/2 的 token。）剩下的是其余部分的舍入误差，稠密模型也有。
#
# 记录还可以用来提问。回到我们的 token：让训练端自己路由，只有*一个*路由器例外，就是柱状图那一层的，对这一个 token 它必须走采样端的那两个专家。更深的各层会怎样选？
#
# **先猜一猜**：它们会走采样端的路吗？
# %%
place, played = batch.prompt_mask[i].sum().int() - 1 + t, batch.old_routes.clone()
played[i, place, layer] = batch.routes[i, place, layer]
way(plt.figure(figsize=(8, 3)).add_subplot(), trainer=score(run.policy, batch, played)[1], sampler=batch.routes)
# %% [markdown] lang="en"
# (In layer 2 the cross is what the router would have chosen.) The next two layers do: one tipped choice has tipped them. Then the trainer goes its own way again; there something else must have tipped the sampler. And it does not end with this token: those behind it read what it left in the keys and values. That is why prompts are replayed as well as answers.
#
# Now the hardest test of a tape: a sampler whose routers are drowned in noise, as large as their scores are spread (`ROUTER_NOISE`). It is in float32, so nothing else differs.
#
# **Predict first:** the engine KL, free and played. And how many of its answers are right?
# %% [markdown] lang="zh"
# （第 2 层的叉是路由器自己本来会选的。）接下来的两层会：一处翻转，带动了它们。再往后，训练端仍走自己的路；采样端在那里翻转，必另有原因。影响也不止于这个 token：后面的 token 会读到它留在 key 和 value 里的东西。所以回放不只针对回答，提示也要回放。
#
# 接下来是对记录最严格的检验：用噪声淹没采样端的路由器，噪声与各分数之间的差别一样大（`ROUTER_NOISE`）。它用 float32 计算，所以此外没有任何差别。
#
# **先猜一猜**：不回放和回放，引擎 KL 各是多少？它的回答又有多少是对的？
# %%
_, noisy, drowned, right = start("SAMPLER_DTYPE=float32", "ROUTER_NOISE=1.0")
print(*map(repr, moe.texts_of(noisy, drowned)[:3]), f"{right:.1%} right", sep="\n")
for name, tape in ("free:  ", None), ("played:", drowned.routes):
    apart(name, noisy, drowned, tape)
# %% [markdown] lang="en"
# Played, the KL is zero but for float noise: the tape is exact. Note what else that says. This sampler gets next to nothing right, and the trainer follows it everywhere. **A small engine KL means that two engines agree, not that either is good.**
#
# ## 5. R2 and R3
#
# What is recorded where, and played where?
#
# - **none**: every pass routes by itself.
# - **R2**: recorded in the trainer's pass for $\pi_{old}$, played in all updates.
# - **R3**: recorded in the sampler, played in the pass for $\pi_{old}$ and in all updates.
#
# **Predict first:** the engine KL of each, after 0, 1, 4 and 16 updates. Which two of the curves meet, and where?
# %% [markdown] lang="zh"
# 回放之后，KL 除了浮点噪声就是零：记录分毫不差。但也要看到另一面：这个采样端几乎什么都答不对，训练端却处处跟着它走。**引擎 KL 小，只说明两个引擎一致，不说明哪一个好**。
#
# ## 5. R2 与 R3
#
# 在哪里记录，在哪里回放？
#
# - **none**：每次前向计算都自己路由。
# - **R2**：在训练端计算 $\pi_{old}$ 时记录，所有更新都回放它。
# - **R3**：在采样端记录，计算 $\pi_{old}$ 时和所有更新都回放它。
#
# **先猜一猜**：更新 0、1、4、16 次之后，三者的引擎 KL 各是多少？哪两条曲线会相遇，在哪里？
# %%
axis = plt.figure(figsize=(6, 3)).add_subplot(xlabel="updates", yscale="log", title="engine KL, nats per token")
for mode, name, colour in ("R3", "routes", "C0"), ("R2", "old_routes", "C1"), ("none", "", "C3"):
    parts, played, curve = restart(), getattr(batch, name, None), []
    batch.old_logps, _ = score(run.policy, batch, played if mode == "R3" else None)
    for updates, more in (0, 0), (1, 1), (4, 3), (16, 12):
        for part in itertools.islice(parts, more):
            routing.update(moe, run, part, name)
        curve.append(apart(f"{mode:4} after {updates:2} updates:", run, batch, played))
    axis.plot(["0", "1", "4", "16"], curve, f"{colour}o-", label=mode)
axis.legend();
# %% [markdown] lang="en"
# - Before any update R2 is as good as nothing: it does not know what the sampler did. R3 is lower by about ten times.
# - After one update both are below none: they have taken away what the changed experts add, and left what was learned.
# - The more was learned, the less is left to remove. R2 and R3 soon meet, and after 16 updates none is not far above them.
#
# An engine KL has heavy tails: a few tokens make most of it. Three seeds, and a dense model beside them, are on [the page](../RL_HAND/moe/README.md).
#
# ## 6. Do the ratios of answers feel it?
#
# GSPO's paper says that it needs no replay: a token may jump, but the likelihood of a whole answer hardly notices. GSPO's ratio is the mean of the tokens' log-ratios (then the exponential of it), and its clip range is 7e-4 wide in all; GRPO's reaches 0.2 to each side.
#
# That can be measured: one update, scored twice, freely and with the experts of before it (R2). The difference is by other experts alone.
#
# **Predict first:** how many tokens does it move by more than 0.2? How many answers by more than 7e-4? At the learning rate 1e-4, and at 1e-6, which the script takes for full-size models?
# %% [markdown] lang="zh"
# - 更新之前，R2 等于没有：它不知道采样端做了什么。R3 则低了大约十倍。
# - 更新一次之后，两者都低于 none：去掉了换专家带来的那一份，留下了学到的那一份。
# - 学到的越多，可去掉的就越少。R2 和 R3 很快相遇，更新 16 次之后，none 也只高出不多。
#
# 引擎 KL 是重尾的：少数几个 token 就占去大半。三个随机种子的结果，以及一个稠密模型作对照，见[该页面](../../RL_HAND/moe/README.md)。
#
# ## 6. 序列级比率感觉得到吗？
#
# GSPO 的论文说它不需要路由回放：个别 token 会跳，整个回答的似然却几乎不受影响。GSPO 的比率是各 token 对数比率的平均（再取指数），裁剪范围总共只有 7e-4 宽；GRPO 的范围则是两边各 0.2。
#
# 这可以测：更新一次，打两遍分，一遍自由路由，一遍走更新之前的专家（R2）。两者之差纯粹来自换了专家。
#
# **先猜一猜**：它让多少 token 移动超过 0.2？让多少回答移动超过 7e-4？学习率为 1e-4 时如何，为 1e-6（脚本给大模型的默认值）时又如何？
# %%
for rate in (1e-4, 1e-6):
    routing.update(moe, run, next(restart(rate)), None)
    free, forced = (score(run.policy, batch, tape)[0] for tape in (None, batch.old_routes))
    tokens, answers = (free - forced)[mask], ((free - forced) * mask).sum(1) / mask.sum(1)
    for name, moved, width in ("tokens ", tokens, 0.2), ("answers", answers, routing.WIDTH):
        beyond = (moved.abs() > width).float().mean()
        print(f"rate {rate:.0e}, {name}: sd {moved.std():.1e}, {beyond:.1%} beyond {width}")
# %% [markdown] lang="en"
# The mean does what it promises: it makes the noise several times smaller. But the range that goes with it is smaller by hundreds of times. So at 1e-4 hardly a token leaves GRPO's range because of other experts alone, and most answers leave GSPO's. At 1e-6 few answers do: there is little to feel. A ratio of an answer is calmer than a token's; it is not immune.
#
# ## 7. What training makes of it
#
# All of this was about ratios. Does a policy learn better with replay? The page has thirty steps of training with each of none, R2 and R3, for GRPO and for GSPO, with three seeds.
#
# **Predict first:** which of these tells runs with replay from runs without, by more than seeds differ: the largest ratio of a run, the engine KL, the accuracy? Then look at [the table](../RL_HAND/moe/README.md), and at how far the seeds of a row are apart before you compare rows.
#
# In short: the largest ratio does, and the engine KL of R3. The accuracy does not: all of them learn, with replay or without. So the mechanism shows here, and its use for learning does not. But this is a small model, with eight layers and answers of some twenty tokens; those of the papers have many times as many of both.
#
# ## Your turn
#
# Begin each with `restart()`, and predict before you run it.
#
# 1. A classical bug: the tape is played one place late, `apart("late:", run, batch, batch.routes.roll(1, dims=1))`. Better or worse than free?
# 2. Only the answers are replayed, not the prompts. Build that tape with `torch.where` and hand it to `apart`. How much of what replay had removed comes back?
# 3. A little noise: `ROUTER_NOISE=0.1` instead of 1.0 in the cell above Section 5. How many routers change (`moe.changed_routers`), and how many more answers are wrong?
# 4. Train: `python RL_HAND/moe/moe.py RATIO=token ROUTING_REPLAY=none`, then with R3. Compare `ratio/token_max` and `engine_kl` in the two files metrics.csv.
#
# <details><summary>Solutions</summary>
#
# 1. Far worse than free: more than a thousand times its KL. A tape that is off by one sends each token to the experts of its neighbour. So compare with free before you trust a tape.
# 2. `prompt = torch.arange(batch.routes.shape[1]) < batch.prompt_mask.sum(1, keepdim=True)`, then `torch.where(prompt[..., None, None], batch.old_routes, batch.routes)`. The KL is two to three times that of the whole tape here, and still well below free.
# 3. About a fifth of the routers, and about as many answers are right as before. Experts that score nearly alike seem to do nearly alike; what ruins an answer is a choice at random, not one among equals.
# 4. See the table. One run each is not enough to compare by.
#
# </details>
# %% [markdown] lang="zh"
# 取平均兑现了它的承诺：噪声缩小了几倍。但与它相配的范围缩小了几百倍。所以学习率为 1e-4 时，单单因为换专家，几乎没有 token 跑出 GRPO 的范围，却有多数回答跑出 GSPO 的范围。1e-6 时出界的回答很少：本来就没有多少可感觉的。序列级比率比 token 级的平静，但谈不上免疫。
#
# ## 7. 对训练有什么影响
#
# 以上说的都是比率。用了回放，策略会学得更好吗？该页面上有 none、R2、R3 各三十步的训练，GRPO 和 GSPO 都有，各三个随机种子。
#
# **先猜一猜**：一次训练中的最大比率、引擎 KL、准确率，哪些能把用回放的和不用回放的区分开，而且超出种子之间的差别？再去看[那张表](../../RL_HAND/moe/README.md)；比较不同的行之前，先看同一行的几个种子相差多少。
#
# 简单说：最大比率可以，R3 的引擎 KL 也可以，准确率不行：用不用回放，都学得会。所以机制在这里看得到，它对学习的好处看不到。不过这是个小模型：八层，每个回答二十来个 token；论文里的模型，层数和长度都是这里的许多倍。
#
# ## 轮到你了
#
# 每题先运行 `restart()`，并且先猜再跑。
#
# 1. 一个经典错误：回放时错后一个位置，`apart("late:", run, batch, batch.routes.roll(1, dims=1))`。比不回放好还是差？
# 2. 只回放回答，不回放提示。用 `torch.where` 拼出这样的记录，交给 `apart`。回放去掉的差距，会回来多少？
# 3. 只加一点噪声：把第 5 节前面那个单元里的 1.0 改成 `ROUTER_NOISE=0.1`。有多少路由改变（`moe.changed_routers`）？答错的会多出多少？
# 4. 训练：`python RL_HAND/moe/moe.py RATIO=token ROUTING_REPLAY=none`，再换成 R3。比较两个 metrics.csv 里的 `ratio/token_max` 和 `engine_kl`。
#
# <details><summary>解答</summary>
#
# 1. 比不回放差得多，KL 超过它的一千倍。记录错开一位，每个 token 走的就是邻居的专家。所以先与不回放的结果比一比，再相信你的记录。
# 2. 先 `prompt = torch.arange(batch.routes.shape[1]) < batch.prompt_mask.sum(1, keepdim=True)`，再 `torch.where(prompt[..., None, None], batch.old_routes, batch.routes)`。这里 KL 是完整回放时的两三倍，仍远低于不回放。
# 3. 大约五分之一的路由改变了，答对的却与原来差不多。得分相近的专家，作用似乎也相近；毁掉回答的是漫无目的地乱选，而不是在相近的几个里换着选。
# 4. 见那张表。各跑一次，还不足以比较。
#
# </details>
