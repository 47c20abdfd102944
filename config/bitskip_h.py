# Paper A, Table 2, row "H-only": a Walsh-Hadamard transform before every activation quantizer (A3).
#   python train.py config/bitskip_h.py config/cpu.py      at the scale of two CPU cores
#   python train.py config/bitskip_h.py                    WikiText-2 at Paper A's scale: a GPU
# Paper A: best validation PPL 185.46 in a run of 1,800 steps (the best likely at 1,300).
linear = 'hbitlinear'
