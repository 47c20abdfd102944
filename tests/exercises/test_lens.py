"""exercises/lens.py: what it sees is what the model says, and its page needs no network."""
import re

import pytest
import torch

from checkpoint import save_checkpoint
from configurator import UserError
from decode import EXIT_MODES, KVCache, step_with_exits
from exercises.lens import MOST, columns, lens, look, main, table
from prepare import get_tokenizer

BYTES = get_tokenizer('bytes')

@pytest.fixture
def model(make_model):
    return make_model(vocab_size=256, block_size=32, lambda_r=0.2)

def test_a_cell_holds_what_the_exit_says(model):
    text = 'def f(x):'
    seen = look(model, BYTES, text)
    assert len(seen.cells) == 3 * len(text)
    assert ''.join(seen.tokens).replace('␣', ' ') == text and seen.following[-1] == ''
    for layer in range(3):
        logits, _ = model(torch.tensor([list(text.encode())]), exit_layer=layer)
        p, ids = logits[0].softmax(dim=-1).topk(5)
        torch.testing.assert_close(torch.tensor(seen.p[layer]), p)
        assert seen.words[layer][2][0] in (repr(chr(ids[2, 0]))[1:-1], f'x{ids[2, 0]:02x}', '␣')

@pytest.mark.parametrize('threshold', [0.0, 0.3, 0.6, 0.9, 1.0])
def test_tokens_leave_where_decoding_lets_them_go(model, threshold):
    """For a first token, which has none before it."""
    for byte in b'aB(':
        seen = look(model, BYTES, chr(byte), dict.fromkeys(EXIT_MODES, threshold))
        for rule in EXIT_MODES:
            token, cache = torch.tensor([[byte]]), KVCache(model, 1)
            layers = step_with_exits(model, token, cache, 2, rule, threshold)[1]
            assert seen.leaves[rule] == layers.tolist()

@pytest.mark.parametrize('layers', [1, 3, 12, 24])
def test_the_table_fits_into_a_terminal(make_model, layers):
    model = make_model(vocab_size=256, n_layer=layers)  # of untrained gates
    seen = look(model, BYTES, 'a\tb\né漢')
    lines = table(seen)
    assert max(map(columns, lines)) <= 79 and len(lines) == 1 + 2 * len(seen.tokens)
    assert f' {layers - 1}' in lines[0] and 'gate' not in lines[0] and 'conf' in lines[0]

def test_a_page_is_whole_and_loads_nothing(model, tmp_path, capsys):
    lens(model, BYTES, '<script>alert("$x$")&amp;', str(tmp_path))
    text = (tmp_path / 'lens.html').read_text(encoding='utf-8')
    assert text.count('<td') == text.count('class="tip"') == 3 * 25
    assert '>&lt;<' in text and '><<' not in text and '&amp;' in text
    assert not re.search(r'<script|\b(src|href) *=|url\(', text)
    assert 'http' not in text.replace('http-equiv', '') and "default-src 'none'" in text
    assert 'lens.html' in capsys.readouterr().out

def test_long_texts_are_cut_and_no_text_is_one_sentence(model, make_model, tmp_path, capsys):
    lens(make_model(vocab_size=256, block_size=128), BYTES, 'x' * 100, str(tmp_path))
    assert f'has 100 tokens, the first {MOST} are' in capsys.readouterr().out
    assert len(look(model, BYTES, 'x' * 100).tokens) == 32  # block_size
    with pytest.raises(UserError, match='no text to look at'):
        look(model, BYTES, '')

def test_the_command_looks_into_a_run(model, tmp_path, capsys):
    save_checkpoint(str(tmp_path / 'ckpt.pt'), {
        'model': model.state_dict(), 'settings': vars(model.config), 'progress': {},
        'meta': {'tokenizer': 'bytes', 'splits': {'val': {}}}, 'model_class': 'model:BitSkip'})
    main([f'--out_dir={tmp_path}', '--text=ab', f'--to={tmp_path}/slides', '--confidence=0.9'])
    assert (tmp_path / 'slides' / 'lens.html').exists() and 'conf' in capsys.readouterr().out
