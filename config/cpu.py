# Overlay for two CPU cores and no network: shrinks any recipe and trains it on the embedded text,
# byte by byte.
#   python train.py config/bitskip_h_ee.py config/cpu.py
dataset = 'pydocs'
block_size = 256
n_head, n_kv_head = 2, 1
n_embd, ffn_dim = 64, 256
batch_size = 8
gradient_accumulation_steps = 1
max_iters, eval_interval = 1000, 500
learning_rate = 8e-3
ee_positions = 'all'  # exits read a head of 256 words
threads = 1  # a second one brings nothing at this size
