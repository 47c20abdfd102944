# Paper B's architecture, 1.06B parameters, shared by its five variants (Tables 2 to 4):
#   python train.py config/tinystories_v1.py
# The variants import config/paper_b_model.py and config/paper_b_training.py.
n_layer = 24
n_embd = 2048
n_head = 32
n_kv_head = 8
ffn_dim = 4096
ffn = 'swiglu'
norm = 'rmsnorm'
sub_norm = False
gate_dim = 0  # Paper B has no gates
