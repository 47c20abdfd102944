# Paper A, Table 2, row "Baseline": ternary weights (BitLinear), no Hadamard, no early exit.
#   python train.py config/baseline.py                     WikiText-2 at Paper A's scale
#   python train.py config/baseline.py config/cpu.py       at the scale of two CPU cores
# 7 to 10 minutes on two cores with cpu.py; at Paper A's scale an hour of a GPU that does 1e14 operations a second (an
# estimate: not run here).
# Paper A: best validation PPL 228.77 after 1,800 steps. Train.py's defaults are this very cell: nothing differs.
linear = 'bitlinear'
