# Paper B, BitSkip-V1 (and the model card): 8-bit activations, no Hadamard, exits trained.
#   python train.py config/tinystories_v1.py                     1.06B parameters: several GPUs
#   python train.py config/tinystories_v1.py config/phase1.py    without early exit
# Paper B: PPL 1.13 at 24 blocks, 1.18 at 18. Published TinyStories models are at 3.2 and up.
from config.paper_b_model import *
from config.paper_b_training import *
linear = 'bitlinear'
