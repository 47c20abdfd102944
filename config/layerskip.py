# Paper B, LayerSkip: the same model in full precision, exits trained.
#   python train.py config/layerskip.py                          1.06B parameters: several GPUs
from config.paper_b_model import *
from config.paper_b_training import *
linear = 'fp'
