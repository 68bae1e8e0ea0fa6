"""Weight pruning as ten papers define it: one formula after another, on small tensors in float64.

Independent of the library: statistics are taken from the raw activations [tokens, in], all at
once, and nothing is blocked, cached or shared. Slow, for tests.

Masks are True where a weight stays. Whatever is ranked, the lowest goes first and, among equals,
the lower index; how many go is counted, `floor(share * total + 1e-9)`, and never found by a
threshold, with which official codes remove one more (and all that tie with it).
"""

import math

import torch

from model_prune.core.target import SITES


def count(total, share):
    """How many of `total` a share is, in spite of 10 * (1 - 0.9) being less than one."""
    return math.floor(total * share + 1e-9)


def _lowest(scores, removed):
    """The indices of the `removed` lowest of a list of scores."""
    return sorted(range(len(scores)), key=lambda i: (float(scores[i]), i))[:removed]


def _norms(x):
    """Of the columns of [tokens, in]."""
    return x.double().square().sum(0).sqrt()


def row_mask(scores, sparsity=None, nm=None):
    """bool [out, in]: each row on its own; nm = (keep, block): `keep` of each `block` in a row.

    The official codes read n:m as "remove n of m", which is the same only for 2:4 and 4:8, and
    round every row's count down. Here the matrix's count is met: the first rows lose one more.
    """
    mask = torch.ones(scores.shape, dtype=torch.bool)
    keep, block = nm or (None, scores.shape[1])
    total = 0 if nm else count(scores.numel(), sparsity)
    for row in range(scores.shape[0]):
        for start in range(0, scores.shape[1], block):
            share = total // len(scores) + (row < total % len(scores))
            removed = block - keep if nm else share
            for i in _lowest(scores[row, start : start + block], removed):
                mask[row, start + i] = False
    return mask


def magnitude_mask(weight, sparsity=None, nm=None):
    """abs(w), ranked in the whole matrix; within each block of a row for n:m.

    Han et al. 2015, as locuslab/wanda has it, which removes all that is not above the value at
    place k of the sorted ones: k + 1 weights and their ties.
    """
    if nm:
        return row_mask(weight.abs(), nm=nm)
    return row_mask(weight.abs().reshape(1, -1), sparsity).view_as(weight)


def wanda_scores(weight, x):
    """abs(w_ij) * norm2(x_j): Sun et al. 2023 (arXiv 2306.11695), equation 1.

    The official code divides the squared norm by the number of windows, which changes no order.
    """
    return weight.double().abs() * _norms(x)


def wanda_mask(weight, x, sparsity=None, nm=None):
    """The best of each output row, Sun et al. 2023, section 3."""
    return row_mask(wanda_scores(weight, x), sparsity, nm)


def ria_scores(weight, x, a=0.5):
    """(|w_ij| / sum of column j + |w_ij| / sum of row i) * norm2(x_j)^a.

    Zhang et al. 2024, "Plug-and-Play" (ICLR), definition of RIA. The official code takes the norm
    over the root of the number of windows: one factor for the whole matrix. By default it ranks
    the whole matrix by a threshold, and rows only if asked to. An all-zero column or row gives NaN
    there; here it has no share.
    """
    size = weight.double().abs()
    columns, rows = size.sum(0, keepdim=True), size.sum(1, keepdim=True)
    share = torch.where(columns > 0, size / columns, 0) + torch.where(rows > 0, size / rows, 0)
    return share * _norms(x) ** a


def owl_sparsities(layers, sparsity, M=5, lam=0.08):
    """Sparsity of each layer by its outliers; layers: per layer, the (weight, x) of its matrices.

    Yin et al. 2023 (arXiv 2310.05175), section 3: D_l is the share of a layer's Wanda scores above
    M times their mean, all its matrices pooled; 1 - sparsity follows D. The paper keeps every
    sparsity within lam of the target. The official code spreads D over exactly 2 * lam and
    centres it, so the mean is exact and one end may leave that range; so does this. Official code
    divides by zero where all D are equal (here: uniform) and lifts a sparsity below 0 to .01.
    """
    shares = []
    for matrices in layers:
        scores = torch.cat([wanda_scores(weight, x).flatten() for weight, x in matrices])
        shares.append(100 * float((scores > M * scores.mean()).double().mean()))
    low, high = min(shares), max(shares)
    if low == high:
        return [sparsity] * len(shares)
    spread = [(share - low) / (high - low) * 2 * lam for share in shares]
    return [sparsity - (s - sum(spread) / len(spread)) for s in spread]


def dsnot(weight, x, mask, cycles=50, threshold=0.1, windows=1):
    """The mask after growing and pruning in turn; x: [tokens, in] of `windows` windows together.

    Zhang et al. 2023, "Dynamic Sparse No Training" (arXiv 2310.08915), section 3. A row's error
    is e = sum over its removed weights of w_j * s_j. While abs(e) > threshold, at most `cycles`
    times: the removed weight with w_j s_j / var_j furthest on e's side comes back, and of the kept
    ones whose w_j s_j has the other sign, the one with the lowest Wanda score goes. Both move e
    towards 0, and together they may carry it past. A weight moves once.

    Where the official code differs from the paper: s_j is the sum of x_j over the tokens of a
    window, averaged over windows, not the mean over tokens, so the threshold depends on the
    window's length. The stop at a change of e's sign exists as an option, but is off: the option
    `--without_same_sign` is true by default (and `type=bool` makes any text true). So abs(e) can
    grow, and the sides swap. Both are so here. By default only attention is repaired
    (`--skip_layer mlp`): the caller's matter.

    Where this differs from the official code: there, var_j is the mean of the windows' variances,
    without that between windows; here it is the paper's, over all tokens. There, a row that has
    run out of helpful weights goes on with unhelpful ones, and a row that is done still walks
    through its lists and may write to the mask past the weights that it removed (or past the
    lists' end, an IndexError); here such a row ends. Weights with w_j s_j = 0 never move.
    """
    weight, x = weight.double(), x.double()
    metric = weight * (x.sum(0) / windows)
    variance = x.var(0, correction=0)
    wanda = wanda_scores(weight, x)
    out = mask.clone()
    for row in range(weight.shape[0]):
        removed = [j for j in range(weight.shape[1]) if not mask[row, j]]
        kept = [j for j in range(weight.shape[1]) if mask[row, j]]
        error = float(metric[row, removed].sum())
        for _ in range(cycles):
            if abs(error) <= threshold:
                break
            side = 1 if error > 0 else -1
            grow = [j for j in removed if side * metric[row, j] > 0]
            prune = [j for j in kept if side * metric[row, j] < 0]
            if not grow or not prune:
                break
            # Of equals, the official lists give the last on the positive side, else the first.
            grown = max(grow, key=lambda j: (side * _over(metric[row, j], variance[j]), side * j))
            pruned = min(prune, key=lambda j: (float(wanda[row, j]), j))
            error += float(metric[row, pruned] - metric[row, grown])
            out[row, grown], out[row, pruned] = True, False
            removed.remove(grown)
            kept.remove(pruned)
    return out


def _over(value, variance):
    """A constant feature comes first, as in IEEE division."""
    return float(value / variance)


def sparsegpt(weight, x, sparsity=None, nm=None, blocksize=128, damp=0.01, mask=None):
    """(weights, mask) after the sweep over columns; a given mask is only swept.

    Frantar and Alistarh 2023 (arXiv 2301.00774), algorithm 1; blocks of the mask (B_s) and of the
    updates (B) have one size here, as in the official code. H = 2 X^T X / tokens; columns that are
    never active get H_jj = 1 and weight 0; then damp * mean(diag H) is added to the diagonal. With
    H^-1 = U^T U, U upper triangular, column j gives e = (w_j - q_j) / U_jj, and all later columns
    lose e * U_j,later. Unstructured: at each block's start, the lowest w^2 / U_jj^2 over all rows
    of the block, by row-major index where equal. nm: for each row when its first column comes up.

    The official code differs: it removes k + 1 (threshold), ties included; it divides H by windows
    instead of tokens, which matters only through H_jj = 1 of dead columns, in the mean that damps;
    and updates of later blocks wait until a block ends, which is the same arithmetic.
    """
    w, x = weight.double().clone(), x.double()
    rows, columns = w.shape
    hessian = 2 * x.T @ x / x.shape[0]
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    w[:, dead] = 0
    hessian += damp * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    kept = torch.ones(rows, columns, dtype=torch.bool) if mask is None else mask.clone()
    for j in range(columns):
        if mask is None and nm and j % nm[1] == 0:
            some = slice(j, j + nm[1])
            kept[:, some] = row_mask((w[:, some] / upper.diagonal()[some]).square(), nm=nm)
        elif mask is None and not nm and j % blocksize == 0:
            some = slice(j, min(j + blocksize, columns))
            scores = (w[:, some] / upper.diagonal()[some]).square()
            chosen = row_mask(scores.reshape(1, -1), sparsity)
            kept[:, some] = chosen.view_as(scores)
        error = torch.where(kept[:, j], 0, w[:, j]) / upper[j, j]
        w[:, j + 1 :] -= error[:, None] * upper[j, j + 1 :]
        w[~kept[:, j], j] = 0
    return w, kept


def flap_columns(weight, x):
    """WIFV of each input column: var(x_j) * norm2(W_:j)^2, An et al. 2023 (arXiv 2312.11983).

    The paper's variance is that over the calibration samples; the official recursion uses the new
    mean in both factors, counts the first window not at all and divides sums over tokens by counts
    of windows: another constant and, nearly, the same order.
    """
    return x.double().var(0) * weight.double().square().sum(0)


def flap_scores(o_weight, o_x, down_weight, down_x, columns):
    """(unit scores, neuron scores) of one layer, comparable between layers and families.

    columns: of o_proj in a unit: head_dim for a query head, as published; G * head_dim for a KV
    group. Each family's columns are standardised in the layer (n - 1 in the deviation, as
    torch.std has it); a unit has the mean of its columns. Attention scores are squared first: in
    the official code only, the paper does not say so. Equal scores have deviation 0: here all 0,
    NaN officially. An et al. 2023, the adaptive structure search (AL-AM).
    """
    heads = _standard(flap_columns(o_weight, o_x).square())
    return heads.view(-1, columns).mean(1), _standard(flap_columns(down_weight, down_x))


def _standard(values):
    deviation = values.std()
    return (values - values.mean()) / deviation if deviation > 0 else torch.zeros_like(values)


def flap_keep(units, neurons, unit_cost, neuron_cost, remove):
    """Keep masks (units, neurons) of all layers together; both [layers, n] scores.

    Removes the lowest first, whatever its family, while the weights removed stay nearest to
    `remove` of all (fewer where two counts are equally near). The official code ranks from the
    top, at the cost 512/3 neurons of an MHA head of 128 whatever the model, and drops the unit at
    the threshold as well.
    """
    scores = torch.cat([units.flatten(), neurons.flatten()])
    costs = [unit_cost] * units.numel() + [neuron_cost] * neurons.numel()
    order = _lowest(scores, len(costs))
    spent = [0]
    for i in order:
        spent.append(spent[-1] + costs[i])
    target = remove * sum(costs)
    removed = min(range(len(spent)), key=lambda k: (abs(spent[k] - target), k))
    keep = torch.ones(len(costs), dtype=torch.bool)
    keep[order[:removed]] = False
    return keep[: units.numel()].view_as(units), keep[units.numel() :].view_as(neurons)


def flap_bias(weight, mean, removed):
    """What the removed columns gave on average: [out]; An et al. 2023, bias compensation.

    The official code overwrites a bias that the layer has, and holds means in half precision.
    """
    return weight.double()[:, removed] @ mean.double()[removed]


def amp_head(o_weight, x, head_dim):
    """[heads]: mean over tokens of norm1(W_o,h a_t,h). AMP (c2d-usp, 2025), heads.

    The official code averages over a prompt's tokens and then over prompts; windows of one length
    make that the same.
    """
    scores = []
    for start in range(0, o_weight.shape[1], head_dim):
        some = slice(start, start + head_dim)
        outputs = x.double()[:, some] @ o_weight.double()[:, some].T
        scores.append(outputs.abs().sum(1).mean())
    return torch.stack(scores)


def amp_neuron(x, down_weight=None):
    """[neurons]: mean over tokens of abs(a_tj); with weights, times norm1(W_down,:j).

    The code of AMP has the first. Its abstract speaks of activations projected on weights: the
    second. Averages as in `amp_head`.
    """
    scores = x.double().abs().mean(0)
    return scores if down_weight is None else scores * down_weight.double().abs().sum(0)


def cfsp_coarse(hidden, sparsity, a=1.0, slope=13.1):
    """Share of neurons that each block keeps; hidden: [blocks + 1, tokens, d], inputs of blocks.

    Wang et al. 2024 (arXiv 2409.13199), coarse-grained importance: sigmoid of the centred angle
    between a block's input and output, scaled to a mean of 1 - sparsity, and drawn towards that
    mean where a block would keep more than all. The official code *sums* angles over tokens and
    divides by 1e4: for its 128 windows of 1,024 tokens that is a slope of 13.1 on the mean angle,
    used here for any count. It clamps no cosine and takes .5 for the similarity to a zero state.
    """
    angles = []
    for before, after in zip(hidden.double(), hidden.double()[1:], strict=False):
        cosine = (before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))
        angles.append(torch.arccos(cosine.clamp(-1, 1)).mean() / math.pi)
    angles = torch.stack(angles)
    gates = 1 / (1 + torch.exp(-slope * a * (angles - angles.mean())))
    mean, top = gates.mean(), gates.max()
    if top / mean * (1 - sparsity) >= 1:
        shrink = mean * (1 / (1 - sparsity) - 1) / (top - mean) / 1.05
        gates = mean + (gates - mean) * shrink
    return gates / gates.mean() * (1 - sparsity)


def cfsp_fine(gate, up, down, x, b=1.0, c=1.0):
    """[neurons], as published by Wang et al. 2024 (code's `three_w_one_wa`).

    U = abs(W_down) * norm(x)^b; the shares of U, abs(W_up) and abs(W_gate) of a neuron in that
    neuron's own column (row) sums are added, multiplied by norm(x)^c and averaged over the hidden
    dimension. A column's shares add up to 1, so weights and b drop out: see `cfsp_norm`.
    """
    norms = _norms(x)
    total = 0
    for matrix in (down.double() * norms**b, up.double().T, gate.double().T):
        total = total + matrix.abs() / matrix.abs().sum(0)
    return (total * norms**c).mean(0)


def cfsp_norm(x, hidden, c=1.0):
    """What `cfsp_fine` comes to: 3 / hidden * norm(x_j)^c."""
    return 3 / hidden * _norms(x) ** c


def llm_pruner_taylor(weights, gradients, order, kv_groups):
    """(KV group scores, neuron scores) of one layer; weights by name ("mlp.down_proj").

    gradients: one such dict per sample, of the sample's mean loss. Ma et al. 2023 (LLM-Pruner,
    arXiv 2305.11627), element-wise importance by a Taylor series, summed within a unit:
    "first" abs(w g), "second" abs(w^2 f), "mixed" abs(w g - w^2 f / 2), where g is the mean over
    samples and f the mean of squares. The paper sums over samples, the official code means: one
    factor on g and f alike. A unit adds up all its weights, of q, k, v and o or of gate, up and
    down (reduction "sum").

    The official code folds wider matrices onto k's channels with `view(G, -1).sum(0)`, which adds
    query head h to KV head h mod Hkv; under GQA it reads KV head h // G, as here.
    """
    salience = {}
    for name in (name for names in SITES.values() for name in names):
        w = weights[name].double()
        g = sum(sample[name].double() for sample in gradients) / len(gradients)
        f = sum(sample[name].double() ** 2 for sample in gradients) / len(gradients)
        salience[name] = {
            "first": (w * g).abs(),
            "second": (w * w * f).abs(),
            "mixed": (w * g - w * w * f / 2).abs(),
        }[order]
    groups = torch.zeros(kv_groups, dtype=torch.float64)
    for name in SITES["attn_in"]:
        groups += salience[name].view(kv_groups, -1).sum(1)
    groups += salience["self_attn.o_proj"].T.reshape(kv_groups, -1).sum(1)
    neurons = salience["mlp.gate_proj"].sum(1) + salience["mlp.up_proj"].sum(1)
    return groups, neurons + salience["mlp.down_proj"].sum(0)


def adapt_pruner_step(previous, cosines, delta, A):
    """The next sparsity of each layer; cosines: mean between its input and output.

    Adapt-Pruner (research4pan, 2025), sections on layer importance and on the update: I_l = -cos,
    centred and divided by the largest abs; s_l + delta - A * I_l, clipped to [0, .99]. Equal
    cosines are 0/0 in the official code, no difference here. With A > delta a sparsity may fall,
    though what was cut does not come back; not repaired here.
    """
    importance = -torch.as_tensor(cosines, dtype=torch.float64)
    importance = importance - importance.mean()
    if importance.abs().max() > 0:
        importance = importance / importance.abs().max()
    return (torch.as_tensor(previous, dtype=torch.float64) + delta - A * importance).clamp(0, 0.99)


def angular_distance(hidden, n):
    """[blocks + 1 - n]: mean over windows of arccos(cos) / pi between states n blocks apart.

    hidden: [blocks + 1, windows, d] at the last token, the input of each block and the last
    block's output before the final norm. Entry l: blocks l .. l + n - 1 would go. Gromov et al.
    2024 (arXiv 2403.17887), the angular distance that picks the blocks.

    arcee-ai/PruneMe drops the embeddings, so it never offers block 0, numbers from 1, and its last
    state has gone through the final norm, as `output_hidden_states` has it.
    """
    hidden = hidden.double()
    distances = []
    for start in range(hidden.shape[0] - n):
        a, b = hidden[start], hidden[start + n]
        cosine = ((a / a.norm(dim=-1, keepdim=True)) * (b / b.norm(dim=-1, keepdim=True))).sum(-1)
        distances.append(torch.arccos(cosine.clamp(-1, 1)).mean() / math.pi)
    return torch.stack(distances)


def shortgpt_bi(hidden):
    """[blocks]: 1 - mean over tokens of cos(input, output); hidden: [blocks + 1, tokens, d].

    Men et al. 2024 (ShortGPT, arXiv 2403.03853), equation 1 (Block Influence).
    """
    pairs = zip(hidden.double(), hidden.double()[1:], strict=False)
    return torch.stack([1 - torch.cosine_similarity(a, b, dim=-1).mean() for a, b in pairs])
