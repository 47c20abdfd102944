# Overlay on config/cpu.py: the length of the runs in papers/ (2.9M tokens).
#   python train.py config/bitskip_h_ee.py config/cpu.py config/cpu_long.py
max_iters, eval_interval = 1400, 700
