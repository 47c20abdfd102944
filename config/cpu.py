# Overlay for two CPU cores and no network: shrinks any recipe and trains it on the embedded text, byte by byte.
#   python train.py config/bitskip_h_ee.py config/cpu.py
dataset = 'pydocs'
block_size = 256
n_head = 8
n_embd = 256
ffn_dim = 1024
batch_size = 16
gradient_accumulation_steps = 1
max_iters = 1000
learning_rate = 2e-3
warmup_iters = 100
