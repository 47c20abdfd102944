"""The pages keep their promises: what they point to exists, what they say to type is understood."""
import ast
import re
import shlex
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import ablate
import bench
import campaign_fuzz
import campaign_kill
import compare_llama_cpp
import eval_exits
import export_gguf
import export_hf
import pack
import plots
import prepare
import sample
import tables
import tradeoff
import train
from configurator import configure

ROOT = Path(__file__).resolve().parent.parent
PAGES = {path.name: path.read_text() for path in sorted(ROOT.glob('*.md'))}
README, TEXT = PAGES['README.md'], '\n'.join(PAGES.values())
SETTINGS = {'train.py': train.TrainSettings, 'sample.py': sample.SampleSettings, 'prepare.py': prepare.Settings,
            'eval_exits.py': eval_exits.EvalSettings, 'pack.py': pack.PackSettings, 'bench.py': bench.BenchSettings,
            'export_gguf.py': export_gguf.ExportSettings, 'export_hf.py': export_hf.ExportSettings,
            'ablate.py': ablate.AblateSettings, 'tables.py': tables.TablesSettings,
            'tradeoff.py': tradeoff.TradeoffSettings, 'plots.py': plots.PlotsSettings,
            'tests/campaign_kill.py': campaign_kill.KillSettings, 'tests/campaign_fuzz.py': campaign_fuzz.FuzzSettings,
            'tests/compare_llama_cpp.py': compare_llama_cpp.CompareSettings}
WALKTHROUGH = [line for line in README.splitlines() if re.match(r'\| [^|]*\b[AB]\d\b', line)]
PLAN = PAGES['PRACTICE.md'][PAGES['PRACTICE.md'].index('### A plan for'):]
COMMANDS = [command for block in re.findall(r'```sh\n(.*?)```', TEXT, re.S) for command in block.splitlines()]


def names_in(path):
    """Every function, class and method of a file, as `name` and `Class.method`."""
    tree = ast.parse((ROOT / path).read_text())
    top = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    inner = {f'{c.name}.{m.name}' for c in top if isinstance(c, ast.ClassDef) for m in c.body
             if isinstance(m, ast.FunctionDef)}
    return {node.name for node in top} | inner


def pointers(text):
    """All `file.py:name` in a text, tests being under tests/."""
    for file, name in re.findall(r'`(\w+\.py):([\w.]+)`', text):
        yield ('tests/' + file if file.startswith('test_') else file), name


def test_walkthrough_covers_every_equation():
    told = ' '.join(line.split('|')[1] for line in WALKTHROUGH)
    assert {*re.findall(r'\b[AB]\d\b', told)} == {f'A{i}' for i in range(1, 10)} | {f'B{i}' for i in range(1, 8)}


@pytest.mark.parametrize('line', WALKTHROUGH, ids=lambda line: line.split('|')[1].split(':')[0].strip())
def test_walkthrough_row_resolves(line):
    _, _, code, test, _, _ = re.split(r'(?<!\\)\|', line)
    (path, name), (test_path, test_name) = next(pointers(code)), next(pointers(test))
    assert name in names_in(path) and test_name in names_in(test_path)


def test_every_pointer_resolves():
    found = list(pointers(TEXT))
    assert len(found) > 40
    for path, name in found:
        assert name in names_in(path), (path, name)


def test_every_file_exists():
    named = {name.rstrip('/') for name in re.findall(r'`((?:config/|tests/|results/)?[\w.]+(?:\.py|\.txt|/))`', TEXT)}
    assert len(named) > 15
    for name in named:
        assert (ROOT / name).exists() or (ROOT / 'tests' / name).exists(), name


def anchors(page):
    """What GitHub calls the headings of a page."""
    headings = re.findall(r'^#+ (.*)$', re.sub(r'```.*?```', '', page, flags=re.S), re.M)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('page', PAGES)
def test_every_link_resolves(page):
    for target in re.findall(r'\]\((?!https?://)([^)\s]+)\)', PAGES[page]):
        path, _, anchor = target.partition('#')
        assert not path or (ROOT / path).exists(), target
        assert not anchor or anchor in anchors(PAGES[path or page]), target


@pytest.mark.parametrize('command', COMMANDS)
def test_every_command_is_understood(command):
    words = shlex.split(command.split('|')[-1].split('&&')[-1])
    if 'pytest' in words:
        return
    if '-m' in words:
        assert (ROOT / words[-1].replace('.', '/')).with_suffix('.py').exists()
        return
    script = next(word for word in words if word.endswith('.py'))
    rest = words[words.index(script) + 1:]
    for word in rest:
        if word.startswith('--'):
            assert word[2:].split('=')[0] in {field.name for field in fields(SETTINGS[script])}, word
        elif word.endswith('.py'):
            assert (ROOT / word).exists(), word


def test_every_flag_in_the_text_exists():
    known = {field.name for settings in SETTINGS.values() for field in fields(settings)}
    for flag in re.findall(r'`--(\w+)', TEXT):
        assert flag in known | {'help'}, flag


def test_the_plan_for_paper_b_is_what_the_code_computes():
    """Parameters, operations, tokens/s, hours and dollars of the plan, from settings, peak and price."""
    phases = [configure(train.TrainSettings, [str(ROOT / 'config/tinystories_v1.py'), '--tokenizer=gpt2', *flags])
              for flags in (['--lambda_ee=0'], [], ['--ee_positions=sampled'])]
    with torch.device('meta'):
        model = train.BitSkip(train.BitSkipConfig.of(vars(phases[0])))
    everything = sum(p.numel() for p in model.parameters())
    for count in (everything, model.quantizable_parameters(), model.head.weight.numel()):
        assert f'{count:,}' in PLAN
    assert phases[0].gradient_accumulation_steps * phases[0].batch_size == 8 * 8
    tokens = phases[0].max_iters * 64 * phases[0].block_size
    for flops in map(train.training_flops, phases):
        for number in (flops, flops / tokens):
            assert f'{number:.2e}'.replace('e+0', 'e').replace('e+', 'e') in PLAN
    rows = re.findall(r'^\| [^|]*, (\d+), \$([\d.]+) \|(.*)\|$', PLAN, re.M)
    assert len(rows) == 3
    for peak, price, cells in rows:
        for s, cell in zip(phases, cells.split('|'), strict=True):
            hours = train.training_flops(s) / (8 * 0.3 * float(peak) * 1e12) / 3600
            assert cell.strip() == (f'{tokens / hours / 3.6e6:.0f}k, {hours:.1f} h, ${8 * hours * float(price):.0f}')


def test_requirements_are_the_named_packages():
    named = {re.split('[= ]', line)[0] for line in (ROOT / 'requirements.txt').read_text().splitlines()}
    assert named == {'torch', 'numpy', 'tiktoken', 'datasets', 'pytest', 'tqdm', 'matplotlib'}


@pytest.mark.parametrize('script', SETTINGS)
def test_help_lists_every_setting_with_its_comment(script, capsys, monkeypatch):
    monkeypatch.setattr(sys, 'argv', [script])
    with pytest.raises(SystemExit) as stop:
        sys.modules[SETTINGS[script].__module__].main(['--help'])
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0
    for field in fields(SETTINGS[script]):
        assert any(re.match(rf'  --{field.name}=\S+\s+\S', line) for line in lines), field.name
