"""
A right answer to each exercise and typical wrong ones, for the teacher. (This spoils all the fun.)

A wrong one is a piece of the right one, what stands there instead, and a word of what a check then
says.
"""
ANSWERS = {
    'ex01_butterfly': ("""
def fwht(x):
    n, half = x.shape[-1], 1
    y = x * n ** -0.5
    while half < n:
        a, b = y.reshape(*x.shape[:-1], -1, 2, half).unbind(-2)
        y = torch.stack((a + b, a - b), dim=-2).reshape(x.shape)
        half *= 2
    return y
""", [('x * n ** -0.5', 'x', 'not orthonormal'), ('n ** -0.5', '(1 / n)', 'too small'),
      ('a - b', 'b - a', 'by hand'), ('dim=-2', 'dim=-1', 'another order'),
      ('x * n ** -0.5', 'x.mul_(n ** -0.5)', 'belongs to the caller'),
      ('x.shape[-1], 1', 'x[0].numel(), 1', 'last dimension'),
      ('    n,', '    import hadamard\n    return hadamard.fwht(x)\n    n,', 'with a matrix'),
      ('    y =', '    import hadamard\n    H = hadamard.signs(n, x.dtype, x.device) / n ** 0.5\n'
       '    return (H * x[..., None, :]).sum(-1)\n    y =', 'n^2')]),
    'ex02_ternary': ("""
def ternary(w):
    alpha = w.abs().mean().clamp(min=1e-20)
    return (w / alpha).round().clamp(-1, 1).to(torch.int8), alpha
def ternary_by_thresholds(w):
    half = w.abs().mean() / 2
    return (w > half).int() - (w < -half).int()
""", [('w.abs().mean().clamp', 'w.abs().max().clamp', 'not its maximum'),
      ('mean().clamp', 'mean(dim=1, keepdim=True).clamp', 'whole matrix'),
      ('.clamp(min=1e-20)', '', 'NaN'), ('w > half', 'w >= half', 'on the threshold'),
      ('(w / alpha).round()', '(w / alpha + 0.5).floor()', 'even neighbour'),
      ('mean() / 2', 'mean() * 0.7', 'other codes')]),
    'ex03_activations': ("""
def activation_quant(x, bits):
    q = 2 ** (bits - 1) - 1
    step = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-20) / q
    return (x / step).round().clamp(-q - 1, q).to(torch.int8), step
""", [('amax(dim=-1, keepdim=True)', 'amax().expand(*x.shape[:-1], 1)', 'silenced'),
      ('- 1) - 1', '- 1)', 'q is 2^(b-1) - 1'), ('x.abs()', 'x', 'negative number'),
      ('x / step', 'x / step / 1.01', 'max|x| has'), ('.clamp(min=1e-20)', '', 'NaN')]),
    'ex04_straight_through': ("""
def ternary_ste(w):
    codes, alpha = weight_ternary(w)
    return w + (codes * alpha - w).detach()
""", [('w + (codes * alpha - w).detach()', 'ternary_plain(w)', 'that of a rounding'),
      ('w + (codes * alpha - w).detach()', 'w', 'W itself'),
      ('w + (codes * alpha - w).detach()', '(w + (codes - w).detach()) * alpha', 'by alpha')]),
    'ex05_pack': ("""
def pack(codes):
    digits = F.pad(codes.int() + 1, (0, -codes.shape[-1] % 5), value=1).unflatten(-1, (-1, 5))
    return (digits * torch.tensor([1, 3, 9, 27, 81])).sum(-1).to(torch.uint8)
def unpack(packed, k):
    digits = packed[..., None].int() // torch.tensor([1, 3, 9, 27, 81]) % 3
    return (digits.flatten(-2)[..., :k] - 1).to(torch.int8)
""", [('[1, 3, 9, 27, 81]', '[81, 27, 9, 3, 1]', 'wrong bytes'),
      ('int() + 1', 'int()', 'c + 1'), ('value=1', 'value=0', 'code 0 has the digit 1'),
      (' - 1).to', ').to', 'digit - 1')]),
    'ex06_integers': ("""
def integer_linear(x, w, bits=8):
    (x, s), (w, a) = activation_quant(x, bits), weight_ternary(w)
    return (x.int() @ w.int().T).float() * s * a
""", [('x.int() @ w.int().T', 'x @ w.T', 'holds them exactly'),
      ('x.int() @ w.int().T', 'x.short() @ w.short().T', 'sums go up to'),
      ('(x.int() @ w.int().T).float() * s * a', 'F.linear(x * s, w * a)', 'nearly cancels'),
      ('(x.int() @ w.int().T).float() * s', '((x * s) @ w.float().T)', 'scaled afterwards'),
      (' * s', '', 'each token is missing'), (' * a', ' / a', 'divided by alpha'),
      ('x, bits)', 'x)', 'number of bits'), ('* s', '* s.max()', 'a loud token')]),
    'ex07_kronecker': ("""
def fwht_kronecker(x):
    m = x.shape[-1].bit_length() - 1
    a, b = 2 ** (m // 2), 2 ** (m - m // 2)
    Y = signs(a, x.dtype, x.device) @ x.reshape(-1, a, b) @ signs(b, x.dtype, x.device)
    return Y.reshape(x.shape) * (a * b) ** -0.5
""", [('2 ** (m // 2), 2 ** (m - m // 2)', '1, 2 ** m', 'multiplications'),
      (' * (a * b) ** -0.5', '', 'not orthonormal'),
      ('Y.reshape(x.shape)', 'Y.reshape(-1, a * b)', 'four dimensions')]),
    'ex08_outliers': ("""
def quantization_error(x, bits, order):
    codes, step = activation_quant(fwht(x) if order == 'before' else x, bits)
    y = codes * step
    x_hat = {'none': y, 'before': fwht(y), 'after': fwht(fwht(y))}[order]
    return ((x_hat - x).norm() / x.norm()).item()
""", [("fwht(x) if order == 'before' else x", 'x', 'by the same H'),
      ('fwht(fwht(y))', 'fwht(y)', 'turns it back'), (' / x.norm()', '', 'divide by |x|'),
      (' / x.norm()', ' / x.norm().clamp(min=1)', 'scale of x')]),
    'ex09_exit_loss': ("""
def exit_loss(logits, tokens, weighting):
    L, exits = len(logits), logits[:-1]
    l = torch.arange(float(len(exits)))
    w = L - l if weighting == 'early' else l + 1
    losses = [F.cross_entropy(y[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()) for y in exits]
    return w / w.sum() @ torch.stack(losses)
""", [('y[:, :-1].flatten(0, 1), tokens[:, 1:]', 'y.flatten(0, 1), tokens', '*current*'),
      (':-1].flatten(0, 1), tokens[:, 1:', '1:].flatten(0, 1), tokens[:, :-1', 'the wrong way'),
      ('y[:, :-1].flatten(0, 1), tokens[:, 1:]', 'y.flatten(0, 1), tokens.roll(-1, 1)', 'last'),
      ('w / w.sum()', 'w', 'do not sum to 1'), ("'early'", "'late'", 'changed places'),
      ('L - l if', 'L - 1 - l if', 'see its weights'), ('logits[:-1]', 'logits', 'not an exit')]),
    'ex10_skipping': ("""
def skip_probabilities(n_layer, p_max):
    return [p_max * (l / (n_layer - 1)) ** 2 for l in range(n_layer - 1)] + [0.0]
def saved_share(n_layer, p_max):
    return sum(skip_probabilities(n_layer, p_max)) / n_layer
def run_block(block, h, p):
    keep = torch.rand(len(h)) >= p
    if not keep.any():
        return h
    y = h.clone()
    y[keep] = block(h[keep])
    return y
""", [('l / (n_layer - 1)', 'l / n_layer', 'divided by'), (') ** 2', ')', 'the square'),
      (' for l in range(n_layer - 1)] + [0.0]', ' for l in range(n_layer)]', 'last block'),
      ('/ n_layer\n', '/ (n_layer - 1)\n', 'all L blocks'), ('>= p', '< p', '*skip*'),
      ('torch.rand(len(h)) >= p', 'torch.arange(len(h)) >= p * len(h)', 'nothing is drawn'),
      ('torch.rand(len(h)) >= p', 'torch.randperm(len(h)) >= p * len(h)', 'exactly as many'),
      ('torch.rand(len(h))', 'torch.rand(1).expand(len(h))', 'draws for itself'),
      ('y[keep] = block(h[keep])', 'y[keep] = block(h)[keep]', 'a mask saves nothing'),
      ('not keep.any()', 'False', 'at least one sample'),
      ('block(h[k', 'h[keep] + (block(h[keep]) - h[keep]) / (1 - p) + 0 * (h[k', 'not dropout')]),
    'ex11_exit_layer': ("""
def expected_exit_layer(p):
    reach = torch.cumprod(1 - p, dim=-1)
    before = torch.cat((torch.ones_like(reach[..., :1]), reach[..., :-1]), dim=-1)
    l, L = torch.arange(p.shape[-1]), p.shape[-1] + 1
    return (l * p * before).sum(-1) + (L - 1) * reach[..., -1]
""", [(' + (L - 1) * reach[..., -1]', '', 'forgotten'), ('* before', '* reach', '*before*'),
      ('* before', '', 'get to layer l'), ('(L - 1)', 'L', 'not L'),
      ('1 - p,', '1 - p.detach(),', 'detached'), ('dim=-1)\n    b', 'dim=0)\n    b', 'last dim'),
      ('(L - 1)', '(L - 1) * (p.sum() > 0)', 'all gates shut')]),
    'ex12_no_holes': ("""
@torch.no_grad()
def step(model, token, cache, threshold):
    L, rope = model.config.n_layer, model.rope(cache.length, 1)
    h, left = model.embedding(token), None
    for l, block in enumerate(model.blocks):
        if left is not None:
            block.remember(h, rope, cache.layer(l))
            continue
        h = block(h, rope, cache.layer(l))
        logits = model.head(model.exit_state(h, l))
        if l == L - 1 or F.softmax(logits, dim=-1).max() > threshold:
            left = l
    cache.advance(1, depth=L)
    return logits[:, 0], left
""", [('block.remember(h, rope, cache.layer(l))', 'pass', 'a hole'),
      ('remember(h,', 'remember(model.embedding(token),', 'the token left with'),
      ('block.remember(h, rope', 'block(h, rope', 'no more'),
      ('continue', 'model.head(h); continue', 'the head was read'),
      ('    cache.advance(1, depth=L)\n', '', 'cache.advance'),
      ('model.exit_state(h, l)', 'h', 'model.exit_state'),
      ('return logits[:, 0]', 'return model.head(h)[:, 0]', 'not those of the exit')]),
    'ex13_cross_entropy': ("""
def linear_cross_entropy(h, w, targets, rows):
    def ce(h, t):
        return F.cross_entropy(h @ w.T, t, reduction='sum')
    return sum(torch.utils.checkpoint.checkpoint(ce, *chunk, use_reentrant=False)
               for chunk in zip(h.split(rows), targets.split(rows))) / len(h)
""", [('torch.utils.checkpoint.checkpoint(ce, *chunk, use_reentrant=False)', 'ce(*chunk)', 'keeps'),
      ('return F.cross', 'return ((h @ w.T).exp().sum(-1).log() - (h * w[t]).sum(-1)).sum()\n'
       '        F.cross', 'exp overflows'),
      ('return sum(', 'return F.cross_entropy(h @ w.T, targets)\n    sum(', 'was made'),
      ("reduction='sum'", "reduction='mean'", 'not the mean over'),
      ('h @ w.T', 'h.detach() @ w.T', 'no gradient comes'), (' / len(h)', '', 'the sum over')]),
    'ex14_speculative': ("""
def accept_probability(p, q):
    return (p / q).clamp(max=1)
def residual(p, q):
    r = (p - q).clamp(min=0)
    return r / r.sum(-1, keepdim=True)
def n_accepted(draft, target):
    return int((draft == target).int().cumprod(0).sum())
""", [('(p / q)', '(q / p)', 'too seldom'), ('(p / q).clamp(max=1)', '0 * p', 'nothing is'),
      ('(p / q)', '0.9 * (p / q)', 'every draft'), ('.clamp(max=1)', '', '0 to 1'),
      ('(p - q).clamp(min=0)', 'p', 'drawn from p again'), ('.clamp(min=0)', '', 'negative'),
      ('(p - q).clamp(min=0)', '(p - q).abs()', 'leave of p'),
      ('r / r.sum(-1, keepdim=True)', 'r', 'sum to 1'), ('.int().cumprod(0)', '', 'a mistake')]),
    'ex15_cliff': ("""
def total_loss(model, idx, targets, shifted):
    def ce(h, l, labels):
        return F.cross_entropy(model.head(model.exit_state(h, l)).flatten(0, 1), labels.flatten())
    *exits, h = model.hidden_states(idx)
    w = exit_weights(len(exits) + 1, 'early')
    ee = sum(w[l] * ce(x, l, targets if shifted else idx) for l, x in enumerate(exits))
    return ce(h, len(exits), targets) + 0.3 * ee
""", [('targets if shifted else idx', 'targets', 'not targets'),
      ('len(exits), targets)', 'len(exits), targets if shifted else idx)', 'still learns targets'),
      ('model.exit_state(h, l)', 'h', 'model.exit_state'), ("'early'", "'late'", "'late'"),
      ('0.3 * ee', 'ee', '0.3 is missing'), ('* ee', '* ee.detach()', 'detached')]),
    'ex16_future': ("""
def attention(q, k, v, causal):
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, -math.inf)
    return F.softmax(scores, dim=-1) @ v
@torch.no_grad()
def sees_the_future(model, idx):
    for t in range(1, idx.shape[1]):
        changed = idx.clone()
        changed[:, t] = (idx[:, t] + 1) % 16
        if not torch.equal(model(changed)[:, :t], model(idx)[:, :t]):
            return True
    return False
""", [('triu(1)', 'triu()', 'NaN'), ('if causal', 'if not causal', 'no effect'),
      ('-math.inf', '0', 'score of 0'), ('equal(', 'allclose(', 'bit by bit'),
      ('[:, :t], model(idx)[:, :t]', '[:, :t + 1], model(idx)[:, :t + 1]', 'is accused'),
      ('[:, :t], model(idx)[:, :t]', '[:, t - 1], model(idx)[:, t - 1]', 'each t, and'),
      ('[:, :t], model(idx)[:, :t]', '[0, :t], model(idx)[0, :t]', 'in sample 1'),
      ('idx.clone()', 'idx', 'belongs to the caller'), ('return True', 'pass', 'gets away')]),
    'ex17_quantization_loss': ("""
def quantization_loss(matrices):
    def loss(W, codes, alpha):
        return (W - alpha * codes).square().mean()
    return torch.stack([loss(W, *weight_ternary(W)) for W in matrices]).mean()
def gradient_ratio(a, b, matrices):
    a, b = (torch.cat([grad.flatten() for grad in torch.autograd.grad(
        x, matrices, retain_graph=True)]).norm() for x in (a, b))
    return (a / b).item()
""", [('matrices]).mean()', 'matrices]).sum()', 'sum over matrices'),
      ('.square().mean()', '.square().sum()', 'not a sum'), ('a / b', 'b / a', 'upside down'),
      ('(W - alpha * codes)', '(W.detach() - alpha * codes + 0 * W)', 'no gradient'),
      (', retain_graph=True', '', 'retain_graph'), ('.item()', '', 'should be a float')]),
    'ex18_nine_differences': ("""
def places():
    return dict(zip(range(1, 10), 'Block HBitLinear HBitLinear BitSkip BitSkip exit_loss exit_loss '
                    'routing_loss main'.split()))
def ffn_as_run(x, up, down, norm):
    def project(x, w):
        return F.relu(F.linear(F.layer_norm(x, x.shape[-1:]) if norm else x, w)).square()
    return project(F.relu(project(x, up)).square(), down)
def predict():
    return 'inner LayerNorm in both cells', 'exits learn the next token'
""", [('routing_loss', 'Gate', 'has number 8'), ("'exits learn", "'exits see", 'no rung'),
      ('F.relu(project(x, up)).square()', 'project(x, up)', 'three times'),
      ('F.layer_norm(x, x.shape[-1:]) if norm else x', 'x', 'a norm inside')]),
}
