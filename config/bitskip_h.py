# Paper A, Table 2, row "H-only": a Walsh-Hadamard transform before every activation quantizer (A3).
#   python train.py config/bitskip_h.py                    WikiText-2 at Paper A's scale
#   python train.py config/bitskip_h.py config/cpu.py      at the scale of two CPU cores
# 7 to 10 minutes on two cores with cpu.py; at Paper A's scale an hour of a GPU that does 1e14 operations a second (an
# estimate: not run here).
# Paper A: best validation PPL 185.46 after 1,800 steps.
linear = 'hbitlinear'
