# Paper A, Table 2, row "Baseline": ternary weights (BitLinear), no Hadamard, no early exit.
#   python train.py config/baseline.py config/cpu.py       at the scale of two CPU cores
#   python train.py config/baseline.py                     WikiText-2 at Paper A's scale: a GPU
# Paper A: best validation PPL 228.77 in a run of 1,800 steps (the best likely at 1,300).
# The defaults of train.py are this cell.
linear = 'bitlinear'
