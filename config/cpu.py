# Overlay for two CPU cores and no network: shrinks any recipe and trains it on the embedded text, byte by byte.
#   python train.py config/bitskip_h_ee.py config/cpu.py
dataset = 'pydocs'
block_size = 256
n_head = 4
n_kv_head = 2
n_embd = 256
ffn_dim = 1024
batch_size = 8
gradient_accumulation_steps = 1
max_iters = 1200
learning_rate = 2e-3
