# Paper B, BitSkip-V3: 8-bit activations behind a Hadamard transform, exits trained.
#   python train.py config/tinystories_v3.py                     1.06B parameters: several GPUs
# Paper B: PPL 427.94 (phase 2; it has no phase 1).
from config.paper_b_model import *
from config.paper_b_training import *
linear = 'hbitlinear'
