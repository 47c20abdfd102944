"""
A lens on one text: what would each exit say next, and where would each rule let a token go?

    python -m exercises.lens --text='def main():'             the newest run
    python -m exercises.lens --text='Return' --out_dir=out/... --confidence=0.8 --to=slides

Prints a table, and writes lens.html. The page needs no network; its cells open under the mouse. A
column is a token that was read, a row is an exit, and a cell holds the likeliest next token there.
The darker it is, the surer. A rule lets a token go at the first exit where its score is above the
rule's threshold:

    gate          p_l of A6, if it was trained
    confidence    the largest probability

All states are those of full depth, as if no earlier token had left. (In decode.py a token that has
left hands on the state that it left with, so later ones may leave elsewhere.)
"""
import html
import os
import unicodedata
from dataclasses import dataclass

import torch

from checkpoint import find_run, open_model, run_file
from common import atomic_write, pick_device
from configurator import UserError, check, configure, run
from decode import EXIT_MODES, exit_score
from prepare import get_tokenizer

MOST, TOP = 64, 5  # tokens that are looked at; guesses that are kept
THRESHOLDS = {'gate': 0.5, 'confidence': 0.5}
RULES = {'gate': ('G', '#D55E00'), 'confidence': ('C', '#009E73')}  # letter and colour


@dataclass
class Lens:
    """What `look` saw of T tokens at L exits. tokens: T words, and following: the T that come next
    ('' where the text ends); words, p: [layer][token] -> the likeliest next words, and their
    probabilities; scores: {rule: [layer][token]}, without the last layer; leaves: {rule: [token] ->
    layer}; thresholds: {rule: number}."""
    tokens: list
    following: list
    words: list
    p: list
    scores: dict
    leaves: dict
    thresholds: dict

    @property
    def cells(self):
        """(layer, token) of all cells, the last layer first."""
        return [(l, t) for l in reversed(range(len(self.words))) for t in range(len(self.tokens))]


@torch.no_grad()
def look(model, tokenizer, text, thresholds=THRESHOLDS):
    """A Lens on the text, or on its first MOST tokens. UserError if there are none."""
    ids = list(tokenizer.encode(text))
    if not ids:
        raise UserError("there is no text to look at: --text='def main():' is one")
    n, L = min(len(ids), MOST, model.config.block_size), model.config.n_layer
    was_training = model.training
    model.eval()
    idx = torch.tensor([ids[:n]], device=model.device)
    trained = len(model.gates) and model.config.lambda_r
    scores = {rule: [] for rule in EXIT_MODES if rule != 'gate' or trained}
    words, p = [], []
    for layer, h in enumerate(model.hidden_states(idx)):
        chances = model.head(model.exit_state(h, layer))[0].float().softmax(dim=-1)  # (T, V)
        best = chances.topk(min(TOP, chances.shape[-1]))
        p.append(best.values.tolist())
        words.append([[word(tokenizer, i) for i in row] for row in best.indices.tolist()])
        for rule in scores if layer < L - 1 else ():
            scores[rule].append(exit_score(model, h, layer, rule)[0].tolist())
    model.train(was_training)
    leaves = {rule: [next((l for l in range(L - 1) if by_layer[l][t] > thresholds[rule]),
                          L - 1) for t in range(n)] for rule, by_layer in scores.items()}
    following = [word(tokenizer, i) for i in ids[1:n + 1]] + [''] * (n + 1 - len(ids))
    read = [word(tokenizer, i) for i in ids[:n]]
    return Lens(read, following, words, p, scores, leaves, thresholds)


def word(tokenizer, i):
    """A token, as one can see it."""
    if i == tokenizer.eot:
        return '∅'
    data = tokenizer.decode_bytes([i])
    try:
        text = data.decode()
    except UnicodeDecodeError:  # a part of a character
        return 'x' + data.hex()
    shown = {' ': '␣', '\n': '↵', '\t': '→'}
    return ''.join(shown.get(c, c if c.isprintable() else f'x{ord(c):02x}') for c in text)


# --------------------------------------------------------------------------------------------------
# the terminal

def table(lens, width=79):
    """Lines of at most `width` columns: a token in two, its guesses and their percentages."""
    L, rules = len(lens.words), list(lens.leaves)
    room = width - 8 - 5 * len(rules)
    step = -(-4 * L // room)  # every so many layers, if they are many
    layers = list(range(L - 1, -1, -step))[::-1]
    cell = min(9, room // len(layers))
    head = f'{"token":8}' + ''.join(f'{l:>{cell}}' for l in layers)
    lines = [head + ''.join(f'{rule[:4]:>5}' for rule in rules)]
    for t, token in enumerate(lens.tokens):
        guesses = [fit(lens.words[l][t][0], cell - 1) for l in layers]
        lines.append(fit(token, 7) + ' ' * (8 - columns(fit(token, 7)))
                     + ''.join(' ' * (cell - columns(guess)) + guess for guess in guesses)
                     + ''.join(f'{lens.leaves[rule][t]:5}' for rule in rules))
        lines.append(' ' * 8 + ''.join(f'{100 * lens.p[l][t][0]:{cell}.0f}' for l in layers))
    return lines


def columns(text):
    """How many a terminal needs for it."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in 'WF')
               for c in text)


def fit(text, most):
    while columns(text) > most:
        text = text[:-1]
    return text


# --------------------------------------------------------------------------------------------------
# the page

STYLE = """
.lens { font: 16px/1.4 system-ui, sans-serif; color: #111; background: #fff; padding: 1.5em }
.lens h1 { font-size: 1.5em; margin: 0 0 .3em }
.lens p { margin: 0 0 1em; color: #333 }
.lens table { border-collapse: separate; border-spacing: 2px }
.lens th { font-weight: normal; color: #555; padding: .2em .4em; text-align: center }
.lens th:first-child { position: sticky; left: 0; background: #fff; z-index: 1 }
.lens th.word, .lens td { font-family: ui-monospace, monospace; color: #111; white-space: pre }
.lens td { position: relative; min-width: 2.6em; height: 2.5em; text-align: center; cursor: default;
  padding: 0 .3em; border-radius: 4px; outline-offset: 1px }
.lens td:hover, .lens td:focus { outline: 2px solid #111 }
.lens td.right { font-weight: bold; box-shadow: inset 0 0 0 3px #009E73 }
.lens .marks { position: absolute; right: 2px; bottom: 0; font: bold 13px sans-serif }
.lens .marks i, .lens p i { font-style: normal; font-weight: bold; color: #fff; padding: 0 3px;
  border-radius: 3px; margin-left: 1px }
.lens .tip { display: none; position: absolute; z-index: 1; top: 105%; left: 0; width: 17em;
  padding: .6em .8em; text-align: left; font: 14px/1.5 system-ui, sans-serif; color: #111;
  white-space: normal;
  background: #fff; border: 1px solid #777; border-radius: 6px; box-shadow: 0 3px 12px #0004 }
.lens td:hover .tip, .lens td:focus .tip { display: block }
.lens td:hover { z-index: 2 }
.lens .left .tip { left: auto; right: 0 }
.lens .up .tip { top: auto; bottom: 105% }
.lens .tip div { display: flex; gap: .5em; align-items: center }
.lens .tip code { width: 5em; overflow: hidden; white-space: pre }
.lens .tip b { height: .8em; background: #0072B2 }
"""


def page(lens):
    """One HTML page, with nothing to load."""
    L, T, say = len(lens.words), len(lens.tokens), html.escape
    legend = ', '.join(f'<i style="background:{RULES[r][1]}">{RULES[r][0]}</i> {r} &gt; '
                       f'{lens.thresholds[r]:g}' for r in lens.leaves)
    rows = ['<tr><th>next</th>' + ''.join(f'<th class="word">{say(w)}</th>' for w in lens.following)
            + '</tr>']
    for layer in reversed(range(L)):
        rows.append(f'<tr><th>{layer}</th>' + ''.join(
            html_cell(lens, layer, t, t > T // 2, layer < L // 2) for t in range(T)) + '</tr>')
    rows.append('<tr><th>read</th>' + ''.join(f'<th class="word">{say(w)}</th>'
                                              for w in lens.tokens) + '</tr>')
    safe = "default-src 'none'; style-src 'unsafe-inline'"
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>BitSkip: a lens on one text</title>
<meta http-equiv="Content-Security-Policy" content="{safe}">
<style>{STYLE}</style></head>
<body><main class="lens"><h1>What would each exit say next?</h1>
<p>A column is a token that was read, a row the exit after a block. A cell holds the likeliest next
token there: framed if it is right, dark if it is sure. Point at a cell for the first five.<br>
A token leaves where it is marked: {legend}</p>
<table>{''.join(rows)}</table></main></body></html>
"""


def html_cell(lens, layer, t, left, up):
    p, words, say = lens.p[layer][t], lens.words[layer][t], html.escape
    red, green, blue = (round(255 - (255 - full) * p[0]) for full in (8, 69, 130))
    marks = ''.join(f'<i style="background:{RULES[r][1]}">{RULES[r][0]}</i>'
                    for r, leaves in lens.leaves.items() if leaves[t] == layer)
    bars = ''.join(f'<div><code>{say(w)}</code><b style="width:{8 * chance:.2f}em"></b>'
                   f'{chance:.1%}</div>' for w, chance in zip(words, p))
    scores = ', '.join(f'{rule} {by_layer[layer][t]:.2f}' for rule, by_layer in
                       lens.scores.items() if layer < len(by_layer))
    kind = ' '.join(['right'] * (words[0] == lens.following[t]) + ['left'] * left + ['up'] * up)
    return (f'<td class="{kind}" tabindex="0" style="background:rgb({red},{green},{blue});color:'
            f'{"#fff" if p[0] > 0.6 else "#111"}">{say(words[0])}<span class="marks">{marks}</span>'
            f'<div class="tip">exit {layer}, after “{say(lens.tokens[t])}”{bars}{scores}</div>'
            '</td>')


# --------------------------------------------------------------------------------------------------

def lens(model, tokenizer, text, folder, thresholds=THRESHOLDS):
    """Look at the text, print the table, and write lens.html into the folder. Returns the Lens.
    UserError if there is no text."""
    seen = look(model, tokenizer, text, thresholds)
    n, given = len(seen.tokens), len(list(tokenizer.encode(text)))
    if n < given:
        print(f'the text has {given} tokens, the first {n} are looked at')
    rules = ', '.join(f'{rule} > {thresholds[rule]:g}' for rule in seen.leaves)
    print('the likeliest next token at each exit, its probability in % below it, and the exit where'
          f'\na token leaves by {rules}')
    print('\n'.join(table(seen)))
    path = os.path.join(folder, 'lens.html')
    with atomic_write(path, 'w') as file:
        file.write(page(seen))
    print(f'written: {path}')
    return seen


@dataclass
class LensSettings:
    """Shows what each exit of a model says about one text."""
    text: str = 'Return the number of'  # the text to look at
    gate: float = THRESHOLDS['gate']  # a token leaves where the gate's probability is above
    confidence: float = THRESHOLDS['confidence']  # or where the largest probability is
    out_dir: str = ''  # the run to look into; empty: the newest
    checkpoint: str = ''  # the file in its folder; empty: ckpt.pt, or else packed.pt
    to: str = ''  # the folder to write into; empty: the run's
    device: str = 'auto'  # auto, cpu, cuda, cuda:1, mps

    def __post_init__(self):
        check(self, dict.fromkeys(THRESHOLDS, (0, 1)))


def main(argv):
    s = configure(LensSettings, argv)
    out_dir = find_run(s.out_dir)
    model, settings = open_model(run_file(out_dir, s.checkpoint), pick_device(s.device))
    lens(model, get_tokenizer(settings['meta']['tokenizer']), s.text, s.to or out_dir,
         {rule: getattr(s, rule) for rule in THRESHOLDS})


if __name__ == '__main__':
    run(main)
