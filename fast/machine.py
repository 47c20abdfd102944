"""What a measurement says of its circumstances: which machine, which code."""
import os
import platform
import shutil
import subprocess

import torch

HERE = os.path.dirname(os.path.abspath(__file__))

def machine(device):
    """The processor that `device` (a name or torch.device) is, the threads of a CPU, and torch."""
    device = torch.device(device)
    if device.type == 'cuda':
        name = torch.cuda.get_device_name(device)
    else:
        name = f'{processor()}, {torch.get_num_threads()} threads'
        name = name if device.type == 'cpu' else f'{name}, {device.type}'
    return f'{name}, torch {torch.__version__}'

def processor():
    if os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo') as file:
            for line in file:
                if line.startswith('model name'):
                    return line.split(':')[1].strip()
    return platform.processor() or platform.machine()

def commit():
    """The commit of the code, with a + where the code differs from it; '' without git."""
    if shutil.which('git') is None:
        return ''
    options = dict(capture_output=True, text=True, cwd=os.path.dirname(HERE))
    head = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], **options).stdout.strip()
    differs = subprocess.run(['git', 'diff', '--quiet', 'HEAD', '--', '*.py', '*.c'], **options)
    return head + '+' * (differs.returncode == 1)
